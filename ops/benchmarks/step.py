"""What a step costs beside trunk and head: Sinkhorn, loss, LARS, collectives; theirs and ours, side by side.

    .venv/bin/python ops/benchmarks/step.py                     # 2 minutes on one core
    .venv/bin/python ops/benchmarks/step.py --no-network --json step.json

"Direct" is the paper's pseudo-code written down line by line: the matrix is rescaled at each normalisation,
each assigned crop has a call and each sum a collective of its own, each pair of crops its own log-softmax,
and LARS goes through the tensors one by one. Both run in this process, on one thread pinned to one core, turn
by turn on the same inputs; what counts is the core's time, as the median over the rounds. The floor of
Sinkhorn is what nobody can leave out: one exponential of the matrix in place, six matrix-vector products, one
scaling of the rows that are returned.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from machine import machine
from torch import Tensor, multiprocessing, nn
from torch.nn import functional as F
from torch.nn.utils import get_total_norm
from torch.profiler import ProfilerActivity, profile

from streamswav.config import Config, ModelSection
from streamswav.models import build_network
from streamswav.swav import SwAVLoss, sinkhorn, swapped_prediction_loss
from streamswav.training.build import build_learner
from streamswav.training.distributed import Ranks
from streamswav.training.optim import LARS

EPSILON, ITERATIONS, TEMPERATURE, PROTOTYPES, DIM = 0.05, 3, 0.1, 3000, 128
ASSIGNED = (0, 1)
CROPS = ((2, 224), (6, 96))


def main() -> int:
    options = parse()
    pin_to_one_core()
    torch.manual_seed(0)
    results = [
        measure_sinkhorn(options.batch, options.queue, options.rounds),
        measure_loss(options.images, options.rounds),
        measure_lars(options.rounds),
        count_collectives(),
    ]
    if not options.no_network:
        results.append(measure_overhead(options.network_images, max(3, options.rounds // 3)))
    for each in results:
        print(*(f"{name}: {value}" for name, value in each.items()), sep="\n  ")
    if options.json:
        options.json.write_text(
            json.dumps({"machine": machine("torch"), "results": results}, indent=1) + "\n"
        )
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--batch", type=int, default=4096, help="samples for Sinkhorn (default: 4096)")
    add("--queue", type=int, default=3840, help="rows of the queue beside them (default: 3840)")
    add("--images", type=int, default=512, help="batch for the loss, 8 crops each (default: 512)")
    add("--network-images", type=int, default=16, help="batch for the overhead table (default: 16)")
    add("--no-network", action="store_true", help="leave the overhead table out")
    add("--rounds", type=int, default=9, help="rounds, of which the median counts (default: 9)")
    add("--json", type=Path, metavar="FILE", help="write the figures there")
    return parser.parse_args()


def pin_to_one_core() -> None:
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def turn_by_turn(work: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of the core by name; each is run once before."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(rounds + 1):
        for name, each in work.items():
            began = time.process_time()
            each()
            if turn:
                seconds[name].append(time.process_time() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def direct_codes(scores: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """One assigned crop [B, K]; all sums over the ranks where there is a group."""
    q = torch.exp(scores / EPSILON).t()
    ranks = dist.get_world_size(group) if group else 1
    prototypes, samples = q.shape[0], q.shape[1] * ranks
    q /= summed(torch.sum(q), group)
    for _ in range(ITERATIONS):
        q /= summed(torch.sum(q, dim=1, keepdim=True), group)
        q /= prototypes
        q /= torch.sum(q, dim=0, keepdim=True)
        q /= samples
    q *= samples
    return q.t()


def summed(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None:
        dist.all_reduce(values, group=group)
    return values


def floor(scores: Tensor, rows: int) -> Tensor:
    matrix, r = scores.mul_(1 / EPSILON).exp_(), torch.ones(scores.shape[1])
    for _ in range(ITERATIONS):
        c = torch.mv(matrix, r)
        r = torch.mv(matrix.t(), c).reciprocal_()
    return matrix[-rows:].mul_(r)


def measure_sinkhorn(batch: int, queue: int, rounds: int) -> dict[str, Any]:
    scores = unit(2, batch + queue, DIM) @ unit(PROTOTYPES, DIM).T
    copy = torch.empty_like(scores)

    def ours(epsilon: float = EPSILON) -> Tensor:
        return sinkhorn(copy, epsilon=epsilon, iterations=ITERATIONS, rows=batch, inplace=True)

    def refilled(work: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            copy.copy_(scores)
            return work()

        return run

    seconds = turn_by_turn(
        {
            "refill": refilled(lambda: None),
            "direct": refilled(lambda: [direct_codes(each)[-batch:] for each in copy]),
            "ours": refilled(ours),
            "ours, epsilon .03": refilled(lambda: ours(0.03)),
            "floor": refilled(lambda: [floor(each, batch) for each in copy]),
        },
        rounds,
    )
    net = {name: value - seconds["refill"] for name, value in seconds.items() if name != "refill"}
    copy.copy_(scores)
    difference = (ours() - torch.stack([direct_codes(each)[-batch:] for each in scores])).abs().max()
    return {
        "what": f"Sinkhorn, 2 crops, B = {batch} + {queue}, K = {PROTOTYPES}",
        "milliseconds": {name: round(1000 * value, 1) for name, value in net.items()},
        "direct / ours": round(net["direct"] / net["ours"], 2),
        "ours / floor": round(net["ours"] / net["floor"], 2),
        "largest difference of a code": float(difference),
    }


def direct_loss(scores: Tensor, codes: Tensor) -> Tensor:
    total = scores.new_zeros(())
    for code, crop in zip(codes, ASSIGNED, strict=True):
        pairs = scores.new_zeros(())
        for other in (each for each in range(len(scores)) if each != crop):
            predicted = F.log_softmax(scores[other] / TEMPERATURE, dim=1)
            pairs = pairs - torch.mean(torch.sum(code * predicted, dim=1))
        total = total + pairs / (len(scores) - 1)
    return total / len(ASSIGNED)


def measure_loss(images: int, rounds: int) -> dict[str, Any]:
    crops = sum(count for count, _ in CROPS)
    scores = (unit(crops, images, DIM) @ unit(PROTOTYPES, DIM).T).requires_grad_()
    codes = sinkhorn(scores[: len(ASSIGNED)].detach(), epsilon=EPSILON)
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def run(name: str, loss: Callable[[], Tensor]) -> Callable[[], None]:
        def once() -> None:
            scores.grad = None
            value = loss()
            value.backward()
            assert scores.grad is not None
            found[name] = (value.detach(), scores.grad)

        return once

    ours = lambda: swapped_prediction_loss(scores, codes, assigned=ASSIGNED, temperature=TEMPERATURE)  # noqa: E731
    work = {"direct": run("direct", lambda: direct_loss(scores, codes)), "ours": run("ours", ours)}
    seconds = turn_by_turn(work, rounds)
    (loss, slope), (expected, expected_slope) = found["ours"], found["direct"]
    return {
        "what": f"loss forward and backward, {crops} crops, B = {images}, K = {PROTOTYPES}",
        "milliseconds": {name: round(1000 * value, 1) for name, value in seconds.items()},
        "direct / ours": round(seconds["direct"] / seconds["ours"], 2),
        "relative difference of the loss": float((loss - expected).abs() / expected),
        "of the gradient": float((slope - expected_slope).abs().max() / expected_slope.abs().max()),
    }


class LoopedLARS:
    """LARS and momentum, a tensor at a time."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters, self.momenta = list(parameters), [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self, rate: float = 0.1, decay: float = 1e-6) -> None:
        for p, m in zip(self.parameters, self.momenta, strict=True):
            assert p.grad is not None
            p_norm, g_norm = torch.norm(p), torch.norm(p.grad)
            if p_norm != 0 and g_norm != 0:
                p.grad = (p.grad + decay * p) * (0.001 * p_norm / (g_norm + decay * p_norm + 1e-8))
            m.mul_(0.9).add_(p.grad)
            p.add_(m, alpha=-rate)


def measure_lars(rounds: int) -> dict[str, Any]:
    networks = [build_network(ModelSection(), prototypes=PROTOTYPES) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    for network in networks:
        for index, p in enumerate(network.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(index)) / 1000
    looped, ours = (
        LoopedLARS(list(networks[0].parameters())),
        LARS(networks[1].parameters(), 0.1, weight_decay=1e-6),
    )
    kept = [p.grad for p in networks[0].parameters()]

    def loop() -> None:
        for p, gradient in zip(networks[0].parameters(), kept, strict=True):
            p.grad = gradient
        looped.step()

    ours.found_inf = torch.zeros(())  # as in training, where a step that is not finite is masked
    seconds = turn_by_turn({"direct": loop, "ours": ours.step}, rounds)
    pairs = zip(networks[0].parameters(), networks[1].parameters(), strict=True)
    return {
        "what": "LARS on ResNet-50 with head and prototypes (ours masks steps that are not finite)",
        "milliseconds": {name: round(1000 * value, 1) for name, value in seconds.items()},
        "direct / ours": round(seconds["direct"] / seconds["ours"], 2),
        "largest relative difference": max(apart(a.detach(), b.detach()) for a, b in pairs),
    }


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / one.abs().max().clamp(min=1e-12))


def count_collectives() -> dict[str, Any]:
    """Collectives of a step's codes, seen by the profiler on two gloo ranks."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_count_on_rank, args=(folder,), nprocs=2)  # type: ignore[no-untyped-call]  # torch
        counts = json.loads((Path(folder) / "counts.json").read_text())
    return {"what": "collectives a step, both assigned crops", **counts}


def _count_on_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    group = dist.group.WORLD
    scores = unit(2, 64, DIM) @ unit(100, DIM).T
    work = {
        "direct": lambda: [direct_codes(each, group) for each in scores],
        "ours": lambda: sinkhorn(scores, epsilon=EPSILON, iterations=ITERATIONS, group=group),
    }
    counts = {}
    for name, each in work.items():
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            each()
        counts[name] = sum(event.name.startswith("gloo:") for event in profiler.events())
    if rank == 0:
        (Path(folder) / "counts.json").write_text(json.dumps(counts))
    dist.destroy_process_group()


def measure_overhead(images: int, rounds: int) -> dict[str, Any]:
    """Share of a step that is not trunk and head, for ResNet-50 and the paper's small-batch setting."""
    length = 15 * images
    values = {
        "training": {"batch": images, "precision": "float32", "sync_batch_norm": 0},
        "swav": {
            "prototypes": PROTOTYPES,
            "epsilon": EPSILON,
            "iterations": ITERATIONS,
            "queue_length": length,
        },
    }
    learner = build_learner(Config.model_validate(values), Ranks())
    network, queue = learner.module, learner.queue
    assert queue is not None
    queue.push(unit(2, length, DIM))
    crops = [torch.randn(count * images, 3, size, size) for count, size in CROPS]
    total = sum(count for count, _ in CROPS)
    scores = (unit(total, images, DIM) @ unit(PROTOTYPES, DIM).T).requires_grad_()
    looped = LoopedLARS(list(network.parameters()))

    learner.step(crops, rate=0.1, freeze_prototypes=False, use_queue=True)
    gradients = [p.grad for p in network.parameters()]

    def with_gradients() -> None:
        for p, gradient in zip(network.parameters(), gradients, strict=True):
            p.grad = gradient

    def trunk_and_head() -> None:
        network.zero_grad()
        features = torch.cat([network.trunk(each) for each in crops])
        projected = network.projection_head(features)
        projected.backward(torch.ones_like(projected))

    def directly() -> None:
        network.prototypes.normalise_()
        past = queue.features @ network.prototypes.weight.T
        codes = [direct_codes(torch.cat([past[i], scores[i]]).detach())[-images:] for i in ASSIGNED]
        direct_loss(scores, torch.stack(codes)).backward()
        with_gradients()
        get_total_norm([p.grad for p in network.parameters() if p.grad is not None])
        looped.step()

    def ours() -> None:
        scores.grad = None
        learner._undo.remember()
        network.prototypes.normalise_()
        objective = SwAVLoss(epsilon=EPSILON, iterations=ITERATIONS, temperature=TEMPERATURE)
        objective(scores, network.prototypes.weight, queue).loss.backward()
        with_gradients()
        _, skipped = learner._update(0.1)
        learner._undo.where(skipped)
        queue.push(unit(2, images, DIM), unless=skipped)

    seconds = turn_by_turn({"trunk and head": trunk_and_head, "direct": directly, "ours": ours}, rounds)
    base = seconds["trunk and head"]
    shares = {name: f"{100 * seconds[name] / (seconds[name] + base):.2f}%" for name in ("direct", "ours")}
    return {
        "what": f"ResNet-50, {images} images, {total} crops, queue {length}: beside trunk and head",
        "milliseconds": {name: round(1000 * value, 1) for name, value in seconds.items()},
        "share of the step": shares,
    }


if __name__ == "__main__":
    raise SystemExit(main())
