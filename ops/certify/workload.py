"""The steps that are measured: configuration, learner, and pixels that lie ready, so no loader counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from certify.context import Context
from streamswav.config import Config, parse_config
from streamswav.crops import Augment, ParameterLaw, uniforms
from streamswav.crops.parameters import PARAMETER_DRAWS
from streamswav.defaults import Facts, known, resolve
from streamswav.training.build import build_learner
from streamswav.training.swav_learner import SwAVLearner, SwAVStep

RATE = 0.05
_QUICK: dict[str, dict[str, Any]] = {
    "crops": {"sizes": [32, 16], "counts": [2, 2], "scales": [[0.3, 1.0], [0.1, 0.3]]},
    "model": {"trunk": "resnet10", "width": 0.25, "head_hidden": 32, "embedding": 16},
    "swav": {"prototypes": 20, "queue_length": 0},
}
_PAPER: dict[str, dict[str, Any]] = {
    "crops": {"sizes": [224, 96], "counts": [2, 6], "scales": [[0.14, 1.0], [0.05, 0.14]]},
    "model": {"trunk": "resnet50"},
    "swav": {"prototypes": 3000, "queue_length": 0},
}


def tiny(batch: int, **training: Any) -> Config:
    """A network of which whole runs take seconds, with a queue."""
    swav = {**_QUICK["swav"], "queue_length": 2 * batch}
    return parse_config({**_QUICK, "swav": swav, "training": {"batch": batch, **training}})


def paper(context: Context, batch: int, **training: Any) -> Config:
    """ResNet-50 on 2x224+6x96, as in the paper; tiny where it has to be quick."""
    sections = _QUICK if context.options.quick else _PAPER
    return parse_config({**sections, "training": {"batch": batch, **training}})


def resolved(config: Config, context: Context, *, world_size: int = 1) -> Config:
    """Choose what was left open as a run would."""
    facts = Facts(
        world_size=world_size,
        cores=8,
        cuda=context.cuda,
        bfloat16=half(context) == "bfloat16",
        shards=1000,
        samples=1_000_000,
        trunk_parameters=1,
    )
    return resolve(config, facts)[0]


def half(context: Context) -> str:
    """The half precision of this device."""
    return "bfloat16" if not context.cuda or torch.cuda.is_bf16_supported(False) else "float16"


class Workload:
    """Steps of a resolved configuration on this rank, on random pixels."""

    def __init__(self, config: Config, context: Context) -> None:
        torch.manual_seed(0)
        self.config, self.context = config, context
        self.local = known(config.training.batch) // context.ranks.world_size
        self.learner: SwAVLearner = build_learner(config, context.ranks)
        self.augment = Augment(config.crops)
        self._batches = [self._draw(seed) for seed in range(2)]
        self.steps = 0

    def pixels(self) -> tuple[list[Tensor], list[Tensor]]:
        """The next batch as the loader gives it: pixels in page-locked memory, parameters."""
        return self._batches[self.steps % len(self._batches)]

    def send(self, pixels: list[Tensor]) -> list[Tensor]:
        return [each.to(self.context.device, non_blocking=True) for each in pixels]

    def augmented(self, pixels: list[Tensor], parameters: list[Tensor]) -> list[Tensor]:
        return [self.augment(*each) for each in zip(pixels, parameters, strict=True)]

    def learn(self, crops: list[Tensor]) -> SwAVStep:
        self.steps += 1
        queue = self.learner.queue is not None
        return self.learner.step(crops, rate=RATE, freeze_prototypes=False, use_queue=queue)

    def step(self) -> SwAVStep:
        """All of a step that is not the loader's."""
        pixels, parameters = self.pixels()
        return self.learn(self.augmented(self.send(pixels), parameters))

    def _draw(self, seed: int) -> tuple[list[Tensor], list[Tensor]]:
        generator, section = torch.Generator().manual_seed(seed), self.config.crops
        law = ParameterLaw(section)
        pixels, parameters = [], []
        for number, (count, size) in enumerate(zip(section.counts, section.sizes, strict=True)):
            shape = (count, self.local, size, size, 3)
            drawn = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
            pixels.append(drawn.pin_memory() if self.context.cuda else drawn)
            draws = uniforms(count * self.local * PARAMETER_DRAWS, "certify", seed, number)
            rows = law.draw(draws.reshape(-1, PARAMETER_DRAWS))
            parameters.append(torch.from_numpy(rows).view(count, self.local, -1))
        return pixels, parameters
