"""Replays the golden training runs (tests/goldens/README.md) with the product's own classes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from streamswav.models import ProjectionHead, Prototypes, SwAVNetwork
from streamswav.swav import FeatureQueue, SwAVLoss, usable_length
from streamswav.training.optim import LARS
from streamswav.training.schedule import Schedule
from streamswav.training.swav_learner import SwAVLearner

GOLDENS = Path(__file__).parent / "goldens"
BEFORE_A_BATCH_NORM = ("projection_head.0.bias", "projection_head.1.running_mean")


class TinyTrunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)

    def forward(self, images: Tensor) -> Tensor:
        return torch.relu(self.bn1(self.conv1(images))).mean(dim=(2, 3))


def tiny_network() -> SwAVNetwork:
    return SwAVNetwork(TinyTrunk(), ProjectionHead(8, 16, 12), Prototypes(12, 20))


class GoldenRun:
    """One recorded run: its configuration, its input, and what must come out."""

    def __init__(self, name: str) -> None:
        with np.load(GOLDENS / f"{name}.npz") as file:
            self.arrays: dict[str, Any] = dict(file)
        self.world_size = int(self.cfg("world_size"))
        self.batch = int(self.cfg("batch_size")) * self.world_size

    def cfg(self, key: str) -> float:
        return float(self.arrays[f"cfg/{key}"])

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        start = prefix + "/"
        return {k.removeprefix(start): torch.tensor(v) for k, v in self.arrays.items() if k.startswith(start)}

    def images(self, epochs: str) -> int:
        return int(self.cfg(epochs) * self.cfg("steps_per_epoch")) * self.batch

    def schedule(self) -> Schedule:
        return Schedule(
            base=self.cfg("base_lr"),
            start=self.cfg("start_warmup"),
            final=self.cfg("final_lr"),
            warmup_images=self.images("warmup_epochs"),
            total_images=self.images("epochs"),
            batch=self.batch,
        )

    def learner(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        device: torch.device | None = None,
        autocast: torch.dtype | None = None,
        **wrapping: Any,
    ) -> SwAVLearner:
        network = tiny_network()
        network.load_state_dict({_our_name(name): each for name, each in self.tensors("init").items()})
        network.to(device)
        objective = SwAVLoss(
            epsilon=self.cfg("epsilon"),
            iterations=int(self.cfg("sinkhorn_iterations")),
            temperature=self.cfg("temperature"),
            group=group,
        )
        length = usable_length(int(self.cfg("queue_length")), self.batch) // self.world_size
        return SwAVLearner(
            network if group is None else DistributedDataParallel(network, process_group=group, **wrapping),
            objective,
            LARS(network.parameters(), 0.0, weight_decay=self.cfg("wd")),
            crops=5,
            queue=FeatureQueue(length=length, dim=12, crops=2).to(device) if length else None,
            autocast=autocast,
            scaler=torch.amp.GradScaler(network.prototypes.weight.device.type, init_scale=128.0)
            if autocast is torch.float16  # a scale from which no step of the recorded ones overflows
            else None,
        )

    def crops(self, rank: int, step: int) -> list[Tensor]:
        pixels = [torch.tensor(self.arrays[f"rank{rank}/crop{i}"][step]) for i in range(5)]
        return [(crop.float() - 128) / 64 for crop in pixels]

    def train(self, learner: SwAVLearner, rank: int, steps: range | None = None) -> Iterator[float]:
        """Yield the loss of each step."""
        schedule, device = self.schedule(), learner.module.prototypes.weight.device
        for step in steps or range(len(self.arrays["lr"])):
            result = learner.step(
                [crop.to(device) for crop in self.crops(rank, step)],
                rate=schedule.rate(step * self.batch),
                freeze_prototypes=step < self.cfg("freeze_prototypes_niters"),
                use_queue=step * self.batch >= self.images("epoch_queue_starts"),
            )
            yield float(result.loss)

    def check_losses(self, losses: list[float], rank: int) -> None:
        torch.testing.assert_close(
            torch.tensor(losses, dtype=torch.float64), self.tensors(f"rank{rank}")["loss"], rtol=1e-4, atol=0
        )

    def check_state(self, learner: SwAVLearner, rank: int) -> None:
        """Compare network, momentum and queue with the recorded ones, every tensor within its bar."""
        momentum = {
            name: learner.optimizer.state[parameter]["momentum_buffer"]
            for name, parameter in learner.module.named_parameters()
        }
        self._compare("final", learner.module.state_dict())
        self._compare("momentum", momentum)
        if learner.queue is not None:
            recorded = torch.tensor(self.arrays[f"rank{rank}/queue"])
            assert _distance(learner.queue.features, recorded) < 1e-4

    def _compare(self, prefix: str, actual: dict[str, Tensor]) -> None:
        recorded = {_our_name(name): each for name, each in self.tensors(prefix).items()}
        assert actual.keys() == recorded.keys()
        far = {
            name: _distance(actual[name], tensor)
            for name, tensor in recorded.items()
            if _distance(actual[name], tensor) >= (2e-2 if name in BEFORE_A_BATCH_NORM else 1e-4)
        }
        assert not far


def _our_name(name: str) -> str:
    return name if name.startswith(("projection_head.", "prototypes.")) else f"trunk.{name}"


def sinkhorn_golden(name: str) -> dict[str, Any]:
    with np.load(GOLDENS / f"{name}.npz") as file:
        return dict(file)


def published_codes(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """The published algorithm, step by step, in float64 and in logarithms."""
    log_q = scores.double().T / epsilon
    prototypes, batch = log_q.shape
    log_q = log_q - torch.logsumexp(log_q.flatten(), dim=0)
    for _ in range(iterations):
        log_q = log_q - torch.logsumexp(log_q, dim=1, keepdim=True) - math.log(prototypes)
        log_q = log_q - torch.logsumexp(log_q, dim=0, keepdim=True) - math.log(batch)
    return (log_q + math.log(batch)).exp().T


def _distance(actual: Tensor, recorded: Tensor) -> float:
    return float((actual.cpu() - recorded).abs().max() / recorded.abs().max())
