"""What a step holds, how long its parts take, and whether the host ever waits in it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from certify.context import CheckError, Context, Figures
from certify.workload import Workload, half, paper, resolved, tiny
from streamswav.config import Config
from streamswav.defaults import known
from streamswav.planning.memory import Memory, count_memory
from streamswav.planning.rehearsal import rehearse
from streamswav.swav import SwAVLoss
from streamswav.training.distributed import compute_repeatably

ALLOWANCES = ("context", "workspaces", "communication", "fragments")
MEMORY_BARS = (0.8, 1.25)
"""Held by tensors over what `plan` says of them; and all of it may not exceed the plan's total."""
IMAGES = 64


def memory(context: Context, **training: Any) -> Figures:
    """Peak memory of a step against `streamswav plan`."""
    context.need_gpu()
    return _largest(context, IMAGES, _memory_of, **training)


def _largest(context: Context, images: int, work: Callable[[Workload], Figures], **training: Any) -> Figures:
    """Do it with so many images, or with half of them as long as that does not fit."""
    while images >= 8:
        try:
            return work(Workload(resolved(paper(context, images, **training), context), context))
        except torch.cuda.OutOfMemoryError:
            images //= 2
        torch.cuda.empty_cache()
    raise CheckError("not even 8 images fit")


def _memory_of(work: Workload) -> Figures:
    device = work.context.device
    for _ in range(2):
        work.step()
    crops = work.augmented(work.send(work.pixels()[0]), work.pixels()[1])
    torch.cuda.reset_peak_memory_stats(device)
    work.learn(crops)
    work.context.synchronise()
    allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    free, total = torch.cuda.mem_get_info(device)
    planned, tensors = plan_of(work.config)
    figures: Figures = {
        "images": work.local,
        "precision": work.config.training.precision,
        "allocated_gb": round(allocated / 1e9, 2),
        "reserved_gb": round(reserved / 1e9, 2),
        "in_use_gb": round((total - free) / 1e9, 2),
        "planned_tensors_gb": round(tensors / 1e9, 2),
        "planned_total_gb": round(planned.total / 1e9, 2),
        "planned_parts_gb": {part: round(size / 1e9, 3) for part, size in planned.parts.items()},
        "allocated_to_planned": round(allocated / tensors, 3),
    }
    low, high = MEMORY_BARS
    if not low <= allocated / tensors <= high:
        raise CheckError(f"tensors hold {allocated / tensors:.2f} of what plan says", figures)
    if reserved > planned.total:
        raise CheckError("the allocator took more than the whole of the plan", figures)
    return figures


def plan_of(config: Config) -> tuple[Memory, int]:
    """What `streamswav plan` says of one GPU, and how much of it are tensors."""
    batch = known(config.training.batch)
    planned = count_memory(rehearse(config, world_size=1), config, world_size=1, local=batch)
    return planned, sum(size for part, size in planned.parts.items() if part not in ALLOWANCES)


class Stopwatch:
    """Adds up phases: CUDA events, read at the end; on a CPU the clock."""

    def __init__(self, context: Context) -> None:
        self._cuda = context.cuda
        self._marks: list[tuple[str, Any, Any]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = self._now()
        yield
        self._marks.append((name, began, self._now()))

    def timed(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            with self.phase(name):
                return work(*given, **named)

        return call

    def milliseconds(self, steps: int) -> dict[str, float]:
        """A step's phases; the device must be idle."""
        total: dict[str, float] = {}
        for name, began, ended in self._marks:
            spent = began.elapsed_time(ended) if self._cuda else 1000 * (ended - began)
            total[name] = total.get(name, 0.0) + spent
        return {name: round(spent / steps, 2) for name, spent in total.items()}

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch
        event.record()
        return event


class TimedLoss:
    """The objective with Sinkhorn and loss as a phase: all that a learner asks of it."""

    def __init__(self, objective: SwAVLoss, watch: Stopwatch) -> None:
        self._objective, self._watch = objective, watch
        self.assigned = objective.assigned

    def codes(self, *given: Any) -> Any:
        """As the objective's."""
        with self._watch.phase("sinkhorn+loss"):
            return self._objective.codes(*given)

    def loss(self, *given: Any) -> Any:
        """As the objective's."""
        with self._watch.phase("sinkhorn+loss"):
            return self._objective.loss(*given)


def speed(context: Context, *, compiled: bool, exact: bool) -> Figures:
    """Images a second of one GPU by phase, without a loader."""
    if compiled:
        context.need_gpu()
    if context.cuda:
        torch.backends.cudnn.allow_tf32 = True  # as torch, and so pretrain, has it
        torch.backends.cudnn.benchmark = True
    images = 8 if context.options.quick else IMAGES
    precision = "float32" if exact else half(context)
    return _largest(context, images, _speed_of, precision=precision, compile=compiled)


def _speed_of(work: Workload) -> Figures:
    context = work.context
    warm, steps = (1, 3) if context.options.quick else (5, 20)
    for _ in range(warm):
        loss = work.step().loss
    whole = images_per_second(work, steps)
    watch, learner = Stopwatch(context), work.learner
    learner.objective = TimedLoss(learner.objective, watch)  # type: ignore[assignment]
    for name, method in (("forward", "_forward"), ("backward", "_backward"), ("optimizer", "_update")):
        setattr(learner, method, watch.timed(name, getattr(learner, method)))
    for _ in range(steps):
        pixels, parameters = work.pixels()
        with watch.phase("h2d"):
            sent = work.send(pixels)
        with watch.phase("augment"):
            crops = work.augmented(sent, parameters)
        with watch.phase("step"):
            loss = work.learn(crops).loss
    context.synchronise()
    figures: Figures = {
        "images": work.local,
        "precision": work.config.training.precision,
        "images_per_second": round(whole, 1),
        "milliseconds_a_step": watch.milliseconds(steps),
    }
    if not loss.isfinite():
        raise CheckError("the loss is not finite", figures)
    return figures


def images_per_second(work: Workload, steps: int) -> float:
    work.context.synchronise()
    began = time.perf_counter()
    for _ in range(steps):
        work.step()
    work.context.synchronise()
    return work.local * steps / (time.perf_counter() - began)


def no_hidden_synchronisation(context: Context) -> Figures:
    """Steps during which torch refuses every call that waits for the device; on all GPUs and on one."""
    context.need_gpu()
    steps = 5
    for optimizer, precision in (
        ("lars", half(context)),
        ("lars", "float16"),
        ("sgd", "float32"),
        ("adamw", "float16"),
    ):
        config = tiny(8 * context.ranks.world_size, precision=precision, sync_batch_norm=0)
        section = config.optimizer.model_copy(update={"name": optimizer})
        config = resolved(
            config.model_copy(update={"optimizer": section}), context, world_size=context.ranks.world_size
        )
        work = Workload(config, context)
        for _ in range(4):  # buffers, bands of the blur, DDP's buckets
            work.step()
        context.synchronise()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(steps):
                work.step()
        except RuntimeError as error:
            raise CheckError(f"{optimizer}, {precision}: {error}") from None
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return {"steps": steps, "ranks": context.ranks.world_size}


def deterministic(context: Context) -> Figures:
    """Two runs of some steps, equal to the bit; and their speed beside that without the key."""
    compute_repeatably()
    quick = context.options.quick
    steps, precision = (3, "float32") if quick else (10, half(context))
    config = resolved(paper(context, 8 if quick else 32, precision=precision), context)
    first, second = (_trained(Workload(config, context), steps) for _ in range(2))
    apart = [name for name, tensor in first.items() if not torch.equal(tensor, second[name])]
    figures: Figures = {"steps": steps, "images": known(config.training.batch), "precision": precision}
    figures["tensors"] = len(first)
    if apart:
        raise CheckError(f"{len(apart)} tensors differ, the first is {apart[0]}", figures)
    figures["images_per_second"] = round(_warm_speed(config, context, steps), 1)
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = False, True
    figures["images_per_second_without"] = round(_warm_speed(config, context, steps), 1)
    return figures


def _trained(work: Workload, steps: int) -> dict[str, Tensor]:
    for _ in range(steps):
        loss = work.step().loss
    state = {f"network {name}": tensor for name, tensor in work.learner.module.state_dict().items()}
    for number, kept in work.learner.optimizer.state_dict()["state"].items():
        state |= {f"{name} {number}": each for name, each in kept.items() if isinstance(each, Tensor)}
    return {name: tensor.detach().cpu() for name, tensor in {**state, "loss": loss}.items()}


def _warm_speed(config: Any, context: Context, steps: int) -> float:
    work = Workload(config, context)
    for _ in range(2):
        work.step()
    return images_per_second(work, steps)
