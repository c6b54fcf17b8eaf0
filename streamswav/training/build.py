"""The learner of a resolved configuration, on this rank's device."""

from __future__ import annotations

import torch
from torch.nn.parallel import DistributedDataParallel

from streamswav.config import Config
from streamswav.defaults import known
from streamswav.models import SwAVNetwork, Trunk, build_network, share_statistics
from streamswav.swav import FeatureQueue, SwAVLoss, usable_length
from streamswav.training.distributed import Ranks
from streamswav.training.learner import Learner
from streamswav.training.optim import build_optimizer

_AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build_learner(config: Config, ranks: Ranks) -> Learner:
    """Build network, objective, queue and optimizer of a resolved configuration on this rank's device.

    Raises:
        ConfigError: what the configuration asks for does not exist or does not fit.
    """
    swav, training = config.swav, config.training
    batch, local = known(training.batch), known(training.batch) // ranks.world_size
    network = build_network(config.model, prototypes=known(swav.prototypes))
    network = _prepare(network, config).to(ranks.device)
    length = usable_length(known(swav.queue_length), batch) // ranks.world_size
    queue = None
    if length:
        queue = FeatureQueue(length=length, dim=config.model.embedding, crops=len(swav.assigned_crops))
        queue = queue.to(ranks.device)
    optimizer = build_optimizer(config.optimizer, network.parameters())
    wrapped = _distribute(network, config, ranks)
    precision = training.precision
    learner = Learner(
        wrapped,
        SwAVLoss(
            epsilon=known(swav.epsilon),
            iterations=known(swav.iterations),
            temperature=swav.temperature,
            assigned=tuple(swav.assigned_crops),
            hard_codes=swav.hard_codes,
            group=ranks.group,
        ),
        optimizer,
        crops=sum(config.crops.counts),
        queue=queue,
        scaler=torch.amp.GradScaler("cuda") if precision == "float16" else None,
        autocast=_AUTOCAST[precision],
        learn_prototypes=swav.learn_prototypes,
    )
    if ranks.world_size > 1:
        sizes = zip(config.crops.counts, config.crops.sizes, strict=True)
        learner.rehearse([torch.zeros(n * local, 3, size, size, device=ranks.device) for n, size in sizes])
    return learner


def _prepare(network: SwAVNetwork, config: Config) -> SwAVNetwork:
    """Say how the network is run; its parameters and their names stay what they are."""
    training = config.training
    network.chunks = training.micro_batches
    assert isinstance(network.trunk, Trunk)
    network.trunk.recompute_blocks = training.activation_checkpointing
    if training.compile:
        network.trunk.compile()
    return network.to(memory_format=torch.channels_last)


def _distribute(network: SwAVNetwork, config: Config, ranks: Ranks) -> SwAVNetwork | DistributedDataParallel:
    """Wrap for several ranks. The running statistics that count are rank 0's, which saves them."""
    if ranks.world_size == 1:
        return network
    assert ranks.group is not None
    share = config.training.sync_batch_norm
    if share != 1:
        group = ranks.group
        if share and share < ranks.world_size:
            group = torch.distributed.new_subgroups(share)[0]
        share_statistics(network, group)
    wrapped = DistributedDataParallel(
        network,
        device_ids=[ranks.device.index] if ranks.device.type == "cuda" else None,
        process_group=ranks.group,
        gradient_as_bucket_view=True,
    )
    wrapped.broadcast_buffers = False  # as an argument its name depends on torch's version
    return wrapped
