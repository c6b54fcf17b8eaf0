"""How fast a GPU takes steps: a roofline over the operations of one step, and what the paper reports."""

from __future__ import annotations

from dataclasses import dataclass

from streamswav.planning.gpus import Gpu
from streamswav.planning.ledger import BACKWARD, FORWARD, OBJECTIVE, OPTIMIZER, Ledger

EFFICIENCY = 0.5
"""Of the roofline: about what tuned ResNet-50 training reaches on a V100 or an A100 in mixed precision.

The roofline of an operation is the longer of its arithmetic at the peak and its bytes at the memory's
bandwidth; nothing is taken to be fused, nothing to overlap.
"""
PUBLISHED_RATE = 91.0
"""Images a second and V100 that the authors report, ResNet-50, 2x224 + 6x96, 64 GPUs."""
PUBLISHED_FLOPS = 75.57e9
"""Floating point operations an image of that setting, forward and backward."""


@dataclass(frozen=True)
class Flops:
    """Floating point operations of a step of one GPU; a multiply-add is two.

    Attributes:
        forward: of the network.
        backward: of its gradients, and of what is computed again for them.
        objective: of the queue's scores.
        image: all of a step for one image.
    """

    forward: int
    backward: int
    objective: int
    image: float


@dataclass(frozen=True)
class Speed:
    """What to expect of one GPU.

    Attributes:
        images_per_second: at the efficiency that is assumed.
        step_seconds: of one step.
        efficiency: assumed share of the roofline.
        roofline_images_per_second: the bound.
        arithmetic_share: of the roofline's time, where arithmetic is the limit and not memory bandwidth.
        mfu: floating point operations a second over the GPU's peak.
        published_images_per_second: the paper's rate on a V100, by operations from its setting to this one;
            None for other trunks and GPUs.
    """

    images_per_second: float
    step_seconds: float
    efficiency: float
    roofline_images_per_second: float
    arithmetic_share: float
    mfu: float
    published_images_per_second: float | None


def count_flops(ledger: Ledger, *, local: int) -> Flops:
    """Add up the operations of a step of `local` images."""
    forward, objective = ledger.flops(FORWARD), ledger.flops(OBJECTIVE)
    backward = ledger.flops(BACKWARD)
    whole = ledger.flops(FORWARD, OBJECTIVE, BACKWARD, OPTIMIZER)
    return Flops(forward, backward, objective, whole / local)


def estimate_speed(
    ledger: Ledger, gpu: Gpu, *, precision: str, local: int, efficiency: float, paper: bool = False
) -> Speed:
    """Bound the time of a step by its operations, each at the GPU's peaks, and divide by the efficiency.

    `paper` says that the trunk is the one that the paper has a speed of.
    """
    peak = gpu.peak(precision)
    arithmetic = [each.flops / peak for each in ledger.work]
    movement = [each.moved / gpu.bandwidth for each in ledger.work]
    bound = sum(map(max, arithmetic, movement))
    limited = sum(a for a, m in zip(arithmetic, movement, strict=True) if a > m)
    image = sum(each.flops for each in ledger.work) / local
    published = PUBLISHED_RATE * PUBLISHED_FLOPS / image if paper and gpu.name.startswith("V100") else None
    rate = local / bound * efficiency
    return Speed(
        images_per_second=rate,
        step_seconds=local / rate,
        efficiency=efficiency,
        roofline_images_per_second=local / bound,
        arithmetic_share=limited / bound,
        mfu=rate * image / peak,
        published_images_per_second=published,
    )
