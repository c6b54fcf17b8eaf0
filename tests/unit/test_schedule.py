from __future__ import annotations

import dataclasses

import pytest

from streamswav.errors import ConfigError
from streamswav.training.schedule import Schedule

BATCH = 4096
IMAGENET = Schedule(
    base=4.8,
    start=0.3,
    final=0.0048,
    warmup_images=10 * 312 * BATCH,
    total_images=100 * 312 * BATCH,
    batch=BATCH,
)
CONSTANT = Schedule(base=1.0, final=0.1, shape="constant", total_images=1000, cooldown_images=200)


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 0.3),
        (1, 0.30144277011862775),
        (3119, 4.8),
        (3120, 4.8),
        (17160, 2.4024),
        (31199, 0.004800015005562328),
    ],
)
def test_the_published_rates_come_out_of_the_images_of_100_epochs(step: int, rate: float) -> None:
    assert IMAGENET.rate(step * BATCH) == pytest.approx(rate, rel=1e-14)


def test_rates_between_steps_lie_between_their_neighbours() -> None:
    rates = [IMAGENET.rate(images) for images in range(0, 3118 * BATCH, 1000)]
    assert rates == sorted(rates)


def test_after_the_end_the_rate_stays_final() -> None:
    assert IMAGENET.rate(101 * 312 * BATCH) == 0.0048
    assert CONSTANT.rate(2000) == pytest.approx(0.1)


def test_a_warmup_that_the_batch_does_not_divide_ends_at_the_base_rate() -> None:
    schedule = dataclasses.replace(IMAGENET, warmup_images=1000, batch=300)
    assert [schedule.rate(images) for images in (0, 900, 1200)] == pytest.approx([0.3, 4.8, 4.8], rel=1e-3)


def test_a_warmup_of_one_step_is_its_start() -> None:
    schedule = dataclasses.replace(IMAGENET, warmup_images=BATCH)
    assert [schedule.rate(0), schedule.rate(BATCH)] == [0.3, 4.8]


def test_without_warmup_the_first_step_has_the_base_rate() -> None:
    assert dataclasses.replace(IMAGENET, warmup_images=0).rate(0) == 4.8


def test_a_constant_rate_cools_down_over_the_last_images() -> None:
    rates = [CONSTANT.rate(images) for images in (0, 500, 800, 900, 1000)]
    assert rates == pytest.approx([1.0, 1.0, 1.0, 0.55, 0.1])


def test_a_constant_rate_without_cooldown_stays() -> None:
    schedule = dataclasses.replace(CONSTANT, cooldown_images=0)
    assert [schedule.rate(images) for images in (0, 999)] == [1.0, 1.0]


def test_a_constant_rate_needs_no_end() -> None:
    endless = Schedule(base=1.0, start=0.5, warmup_images=100, shape="constant")
    assert [endless.rate(images) for images in (0, 50, 100, 10**12)] == [0.5, 0.75, 1.0, 1.0]


def test_bytes_serve_as_the_unit() -> None:
    total = 7 * 10**14
    schedule = dataclasses.replace(IMAGENET, warmup_images=total // 10, total_images=total, batch=0)
    expected = [0.3, 2.55, 4.8, 2.4024, 0.0048]
    positions = (0, total // 20, total // 10, total * 55 // 100, total)
    assert [schedule.rate(position) for position in positions] == pytest.approx(expected)


def test_progress_runs_along_the_cosine() -> None:
    assert [IMAGENET.rate_at(share) for share in (0.0, 0.5, 1.0)] == pytest.approx([4.8, 2.4024, 0.0048])


@pytest.mark.parametrize(
    ("changes", "key"),
    [({"shape": "cosine"}, "optimizer.schedule"), ({"cooldown_images": 5}, "optimizer.cooldown_images")],
)
def test_what_needs_an_end_is_refused_without_one(changes: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as error:
        Schedule(**{"base": 1.0, "shape": "constant", **changes})  # type: ignore[arg-type]
    assert error.value.key == key


def test_a_step_schedule_multiplies_the_rate_at_its_milestones():
    steps = Schedule(
        base=0.02, total_images=20_000, batch=1000, shape="step", milestones=(0.6, 0.8), factor=0.2
    )
    rates = [steps.rate(epoch * 1000) for epoch in range(20)]
    assert rates == pytest.approx([0.02] * 12 + [0.004] * 4 + [0.0008] * 4)


def test_a_step_schedule_needs_an_end():
    with pytest.raises(ConfigError, match=r"optimizer\.schedule"):
        Schedule(base=0.1, shape="step", milestones=(0.5,), factor=0.1)
