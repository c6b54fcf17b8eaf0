"""The learner of a resolved configuration, on this rank's device."""

from __future__ import annotations

import shutil
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer

from streamswav.config import Config, TrainingSection
from streamswav.defaults import known
from streamswav.errors import ConfigError
from streamswav.models import SwAVNetwork, Trunk, build_network, share_statistics
from streamswav.swav import FeatureQueue, SwAVLoss, usable_length
from streamswav.training.distributed import Ranks
from streamswav.training.optim import build_optimizer
from streamswav.training.swav_learner import SwAVLearner

Network = TypeVar("Network", bound=nn.Module)

AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build_learner(config: Config, ranks: Ranks) -> SwAVLearner:
    """Build network, objective, queue and optimizer of a resolved configuration on this rank's device.

    Raises:
        ConfigError: what the configuration asks for does not exist or does not fit.
    """
    training = config.training
    network = prepare_network(config).to(memory_format=torch.channels_last).to(ranks.device)
    queue = build_queue(config, ranks.world_size)
    optimizer = build_optimizer(config.optimizer, network.parameters())
    scaler = build_scaler(config, ranks)
    learner = assemble(
        config,
        distribute(network, config, ranks),
        optimizer,
        queue.to(ranks.device) if queue is not None else None,
        group=ranks.group,
        scaler=scaler,
    )
    if ranks.world_size > 1:
        local = known(training.batch) // ranks.world_size
        sizes = zip(config.crops.counts, config.crops.sizes, strict=True)
        learner.rehearse([torch.zeros(n * local, 3, size, size, device=ranks.device) for n, size in sizes])
    return learner


def build_scaler(config: Config, ranks: Ranks) -> torch.amp.GradScaler | None:
    """Build what scales the loss, where float16 needs it."""
    float16 = config.training.precision == "float16"
    return torch.amp.GradScaler(ranks.device.type) if float16 else None


def prepare_network(config: Config) -> SwAVNetwork:
    """Build the network and say how it is run; parameters and their names do not depend on the latter."""
    network = build_network(config.model, prototypes=known(config.swav.prototypes))
    network.chunks = config.training.micro_batches
    assert isinstance(network.trunk, Trunk)
    prepare_trunk(network.trunk, config.training)
    return network


def prepare_trunk(trunk: Trunk, section: TrainingSection) -> None:
    """Say how a trunk is run.

    Raises:
        ConfigError: it is to be compiled, and nothing here can.
    """
    trunk.recompute_blocks = section.activation_checkpointing
    if section.compile:
        _require_compiler()
        # Block by block: they share their code, and may be computed again for the backward pass.
        for block in trunk.blocks():
            block.compile()


def _require_compiler() -> None:
    """Refuse before the first step, which would meet it deep inside torch."""
    if not any(shutil.which(name) for name in ("gcc", "g++", "cc", "c++", "clang")):
        reason = "needs a C compiler, and there is none; take an image of ops/build-image --compile, or false"
        raise ConfigError("training.compile", reason, value=True)


def build_queue(config: Config, world_size: int) -> FeatureQueue | None:
    """Build one rank's share of the queue; None where there is none.

    Raises:
        ConfigError: it is shorter than the batch.
    """
    swav = config.swav
    length = usable_length(known(swav.queue_length), known(config.training.batch)) // world_size
    if not length:
        return None
    return FeatureQueue(length=length, dim=config.model.embedding, crops=len(swav.assigned_crops))


def assemble(
    config: Config,
    network: SwAVNetwork | DistributedDataParallel,
    optimizer: Optimizer,
    queue: FeatureQueue | None,
    *,
    group: dist.ProcessGroup | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> SwAVLearner:
    """Put a learner together from its parts; `group`: the ranks that share the codes."""
    swav = config.swav
    objective = SwAVLoss(
        epsilon=known(swav.epsilon),
        iterations=known(swav.iterations),
        temperature=swav.temperature,
        assigned=tuple(swav.assigned_crops),
        hard_codes=swav.hard_codes,
        group=group,
    )
    return SwAVLearner(
        network,
        objective,
        optimizer,
        crops=sum(config.crops.counts),
        queue=queue,
        scaler=scaler,
        autocast=AUTOCAST[config.training.precision],
        learn_prototypes=swav.learn_prototypes,
    )


def distribute(network: Network, config: Config, ranks: Ranks) -> Network | DistributedDataParallel:
    """Wrap for several ranks, which all begin with rank 0's parameters and buffers.

    The running statistics that count are rank 0's, which saves them.
    """
    if ranks.world_size == 1:
        return network
    assert ranks.group is not None
    share = config.training.sync_batch_norm
    if share != 1:
        group = ranks.group
        if share and share < ranks.world_size:
            group = dist.new_subgroups(share)[0]
        share_statistics(network, group)
    wrapped = DistributedDataParallel(
        network,
        device_ids=[ranks.device.index] if ranks.device.type == "cuda" else None,
        process_group=ranks.group,
        gradient_as_bucket_view=True,
    )
    wrapped.broadcast_buffers = False  # as an argument its name depends on torch's version
    return wrapped
