"""One step of the configured learner on tensors that have shapes and types, but no memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from streamswav.config import Config
from streamswav.defaults import known
from streamswav.planning.ledger import CROPS, GRADIENTS, QUEUE, STATE, WEIGHTS, Ledger, watch
from streamswav.training.build import assemble, build_queue, prepare_network
from streamswav.training.optim import build_optimizer


@dataclass(frozen=True)
class Rehearsal:
    """What a step of one rank takes.

    Attributes:
        ledger: memory and operations of the step.
        trunk, head, prototypes: parameters.
        standing: bytes by part once the step is over: what stays.
        buffers: bytes of the network's buffers (running statistics).
        optimizer: bytes of the optimizer's state.
        queue: bytes of this rank's queue.
        crops: bytes of the augmented crops.
        normalised: channels of each BatchNorm layer, of the trunk and of the head.
    """

    ledger: Ledger
    trunk: int
    head: int
    prototypes: int
    standing: dict[str, int]
    buffers: int
    optimizer: int
    queue: int
    crops: int
    normalised: tuple[tuple[int, ...], tuple[int, ...]]

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.trunk + self.head + self.prototypes


def rehearse(config: Config, *, world_size: int, local: int | None = None) -> Rehearsal:
    """Take a step of a resolved configuration on one of `world_size` ranks, without memory and without a GPU.

    The code is the trainer's own: its network, objective, optimizer and learner. Types follow autocast, for
    which the CPU's rules stand in; convolutions and linear layers are in the configured precision on both.

    Args:
        config: resolved.
        world_size: ranks that share the batch; their gradients stay in DDP's buckets.
        local: images of this rank; by default its share of the batch.

    Raises:
        ConfigError: as the network's and the queue's construction.
    """
    batch = known(config.training.batch)
    with FakeTensorMode():
        return _rehearse(config, world_size=world_size, local=local or batch // world_size)


def _rehearse(config: Config, *, world_size: int, local: int) -> Rehearsal:
    eager = config.training.model_copy(update={"compile": False})  # which would not change what is kept much
    network = prepare_network(config.model_copy(update={"training": eager}))
    optimizer = build_optimizer(config.optimizer, network.parameters())
    _fill_state(network, optimizer)
    queue = build_queue(config, world_size)
    if queue is not None:
        queue.push(torch.ones_like(queue.features))
    learner = assemble(config, network, optimizer, queue)
    crops = [
        torch.empty(count * local, 3, size, size).to(memory_format=torch.channels_last)
        for count, size in zip(config.crops.counts, config.crops.sizes, strict=True)
    ]
    ledger = Ledger(standing_gradients=_bytes(list(network.parameters())) if world_size > 1 else 0)
    state = [each for of in optimizer.state.values() for each in of.values() if isinstance(each, Tensor)]
    parameters, buffers = list(network.parameters()), list(network.buffers())
    ledger.hold([*parameters, *buffers], WEIGHTS)
    ledger.hold(state, STATE)
    ledger.hold(queue.buffers() if queue is not None else [], QUEUE)
    ledger.hold(crops, CROPS)
    with watch(ledger, network, optimizer):
        learner.step(crops, rate=0.1, freeze_prototypes=False, use_queue=queue is not None)
    ledger.hold((each.grad for each in parameters), GRADIENTS)
    return Rehearsal(
        ledger,
        standing=dict(ledger.held),
        trunk=_count(network.trunk),
        head=_count(network.projection_head),
        prototypes=_count(network.prototypes),
        buffers=_bytes(buffers),
        optimizer=_bytes(state),
        queue=_bytes(list(queue.buffers())) if queue is not None else 0,
        crops=_bytes(crops),
        normalised=(_normalised(network.trunk), _normalised(network.projection_head)),
    )


def _fill_state(network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer allocate what it keeps, as it has from the second step on."""
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def _count(module: nn.Module) -> int:
    return sum(each.numel() for each in module.parameters())


def _bytes(tensors: list[Tensor]) -> int:
    return sum(each.numel() * each.element_size() for each in tensors)


def _normalised(module: nn.Module) -> tuple[int, ...]:
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d)
    return tuple(each.num_features for each in module.modules() if isinstance(each, kinds))
