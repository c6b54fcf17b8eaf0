"""Is the arithmetic right on this device: recorded results, Sinkhorn against float64, ranks against one."""

from __future__ import annotations

from typing import Any

import golden_runs
import torch
from golden_runs import GoldenRun, published_codes, sinkhorn_golden
from torch.nn import functional as F

from certify.context import CheckError, Context, Figures, within
from certify.workload import resolved, tiny
from streamswav.swav import sinkhorn
from streamswav.training.build import build_learner
from streamswav.training.distributed import Ranks

LOSS_BAR, CODES_BAR, SINKHORN_BAR = 1e-4, 1e-6, 5e-7
AUTOCAST_BARS = {"bfloat16": 0.05, "float16": 0.01}
RANKS_BAR = 1e-5


def goldens(context: Context) -> Figures:
    """The recorded codes and training runs of one rank, in float32."""
    golden_runs.GOLDENS = context.options.goldens
    figures: Figures = {}
    _codes(context, "sinkhorn_1rank", figures)
    for name in ("train_1rank_noqueue", "train_1rank_queue"):
        _train(context, name, figures)
    return figures


def goldens_of_two_ranks(context: Context) -> Figures:
    golden_runs.GOLDENS = context.options.goldens
    figures: Figures = {}
    _codes(context, "sinkhorn_2rank", figures)
    _train(context, "train_2rank_queue", figures)
    return figures


def goldens_under_autocast(context: Context) -> Figures:
    """The same runs in half precision: near, within what the type resolves."""
    golden_runs.GOLDENS = context.options.goldens
    figures: Figures = {}
    for dtype, bar in AUTOCAST_BARS.items():
        if context.cuda and dtype == "bfloat16" and not torch.cuda.is_bf16_supported(False):
            figures[dtype] = "not on this GPU"
            continue
        run = GoldenRun("train_1rank_queue")
        learner = run.learner(device=context.device, autocast=getattr(torch, dtype))
        within(figures, f"loss, {dtype}", _off(run, list(run.train(learner, 0)), 0), bar)
    return figures


def _codes(context: Context, name: str, figures: Figures) -> None:
    golden, rank = sinkhorn_golden(name), context.ranks.rank
    codes = sinkhorn(
        torch.tensor(golden[f"rank{rank}/scores"]).to(context.device),
        epsilon=float(golden["epsilon"]),
        iterations=int(golden["iterations"]),
        group=context.ranks.group,
    )
    off = (codes.cpu() - torch.tensor(golden[f"rank{rank}/codes"])).abs().max()
    within(figures, f"codes, {name}", float(off), CODES_BAR)


def _train(context: Context, name: str, figures: Figures) -> None:
    ranks, run = context.ranks, GoldenRun(name)
    wrapping: dict[str, Any] = {"gradient_as_bucket_view": True} if ranks.world_size > 1 else {}
    learner = run.learner(ranks.group, device=context.device, **wrapping)
    losses = list(run.train(learner, ranks.rank))
    within(figures, f"loss, {name}", _off(run, losses, ranks.rank), LOSS_BAR)
    if ranks.rank == 0:  # batch norms are each rank's own there, and rank 0's were recorded
        try:
            run.check_state(learner, 0)
        except AssertionError as error:
            raise CheckError(f"{name}: weights, momenta or queue are off: {error}", figures) from None


def _off(run: GoldenRun, losses: list[float], rank: int) -> float:
    recorded = run.tensors(f"rank{rank}")["loss"]
    return float(((torch.tensor(losses, dtype=torch.float64) - recorded) / recorded).abs().max())


def sinkhorn_against_float64(context: Context) -> Figures:
    figures: Figures = {}
    batch, prototypes = (500, 200) if context.options.quick else (4096, 3000)
    generator = torch.Generator().manual_seed(0)
    samples = F.normalize(torch.randn(batch, 64, generator=generator), dim=1)
    scores = samples @ F.normalize(torch.randn(prototypes, 64, generator=generator), dim=1).T
    scores = scores.to(context.device)
    for epsilon in (0.05, 0.01, 0.001):
        for iterations in (3, 10):
            codes = sinkhorn(scores, epsilon=epsilon, iterations=iterations)
            off = (codes.double() - published_codes(scores, epsilon, iterations)).abs().max()
            within(figures, f"epsilon {epsilon:g}, {iterations} iterations", float(off), SINKHORN_BAR)
    return figures


def ranks_against_one(context: Context) -> Figures:
    """Losses of the same global batches on all GPUs, with batch statistics over all, and on one."""
    ranks, figures = context.ranks, Figures()
    batch = 8 * ranks.world_size
    split = _losses(context, ranks, batch)
    whole = _losses(context, Ranks(device=context.device), batch)
    mean = torch.tensor(ranks.gather(split)).mean(dim=0)
    off = ((mean - torch.tensor(whole)) / torch.tensor(whole)).abs().max()
    figures["ranks"] = ranks.world_size
    within(figures, "loss, relative", float(off), RANKS_BAR)
    return figures


def _losses(context: Context, ranks: Ranks, batch: int) -> list[float]:
    torch.manual_seed(0)
    config = resolved(
        tiny(batch, precision="float32", sync_batch_norm=0), context, world_size=ranks.world_size
    )
    learner = build_learner(config, ranks)
    losses = []
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        crops = [
            torch.randn(count, batch, 3, size, size, generator=generator)
            .chunk(ranks.world_size, dim=1)[ranks.rank]
            .flatten(0, 1)
            .to(context.device)
            for count, size in zip(config.crops.counts, config.crops.sizes, strict=True)
        ]
        result = learner.step(crops, rate=0.05, freeze_prototypes=step == 0, use_queue=True)
        losses.append(float(result.loss))
    return losses
