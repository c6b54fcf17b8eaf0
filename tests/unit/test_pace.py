"""Where a run is between its start and its end, in images or in bytes, and what follows for a step."""

import pytest

from streamswav.config import parse_config
from streamswav.errors import ConfigError
from streamswav.training.pace import make_pace
from streamswav.training.pretraining import make_calendar

BATCH = 512
BASE = {
    "training": {"batch": BATCH},
    "optimizer": {"rate": 1.0, "start_rate": 0.1, "final_rate": 0.01, "schedule": "cosine"},
}


def pace(manifest_bytes=1 << 40, bytes_per_image=None, **sections):
    return pace_and_calendar(manifest_bytes, bytes_per_image, **sections)[0]


def pace_and_calendar(manifest_bytes=1 << 40, bytes_per_image=None, **sections):
    names = {*BASE, *sections}
    config = parse_config({name: BASE.get(name, {}) | sections.get(name, {}) for name in names})
    passes = config.stream.turns
    samples = config.stream.samples and config.stream.samples * passes
    size = manifest_bytes * passes
    made = make_pace(config, samples=samples, size=size, bytes_per_image=bytes_per_image)
    return made, make_calendar(config, made)


def test_a_run_whose_samples_are_known_counts_images():
    made, calendar = pace_and_calendar(
        stream={"samples": 51_200},
        optimizer={"warmup_images": 5120},
        swav={"freeze_prototypes_images": 1024, "queue_start_images": 2048},
    )
    assert not made.in_bytes
    assert made.stride(0, 999).rate == pytest.approx(0.1)
    assert made.stride(5120 - BATCH, 0).rate == pytest.approx(1.0)
    assert made.stride(51_200, 0).rate == pytest.approx(0.01)
    assert [calendar.freezes(made.stride(n, 0)) for n in (0, 512, 1024)] == [True, True, False]
    assert [calendar.queues(made.stride(n, 0)) for n in (0, 1536, 2048)] == [False, False, True]
    assert [made.fraction(n, 0) for n in (0, 25_600, 51_200, 60_000)] == [0, 0.5, 1, 1]


def test_all_passes_together_make_the_run_but_for_what_no_batch_is_left_for():
    made = pace(stream={"samples": 1000, "passes": 3})
    assert made.total == 3000 // BATCH * BATCH
    assert made.stride(made.total, 0).rate == pytest.approx(0.01)


def test_a_limit_of_images_ends_the_schedule():
    assert pace(stream={"samples": 51_200}, training={"images": 10_240}).total == 10_240
    assert pace(training={"images": 10_240}).total == 10_240


def test_a_run_whose_samples_are_not_known_counts_bytes_with_the_same_shares():
    made, calendar = pace_and_calendar(manifest_bytes=1_000_000, stream={"passes": 2})
    assert made.in_bytes
    assert made.stride(123, 0).rate == pytest.approx(0.1)
    assert made.stride(123, 200_000).rate == pytest.approx(1.0)
    assert made.stride(123, 2_000_000).rate == pytest.approx(0.01)
    assert [calendar.freezes(made.stride(0, n)) for n in (0, 19_999, 20_000)] == [True, True, False]
    assert [calendar.queues(made.stride(0, n)) for n in (0, 149_999, 150_000)] == [False, False, True]
    assert made.fraction(123, 500_000) == 0.25


def test_the_bounds_in_images_hold_in_bytes_where_a_samples_size_is_known():
    large = 10**15
    assert pace(large).schedule.warmup_images == large // 10
    made, calendar = pace_and_calendar(large, bytes_per_image=1000.0)
    assert made.in_bytes
    assert made.schedule.warmup_images == 12_800_000_000
    assert (calendar.freeze_until, calendar.queue_from) == (1_281_167_000, 19_200_000_000)
    assert pace(10**9, bytes_per_image=1000.0).schedule.warmup_images == 10**8
    assert pace(training={"batch": 256}, bytes_per_image=1000.0).schedule.warmup_images == 0


def test_shares_and_bounds_are_those_of_the_defaults_also_in_images():
    made, calendar = pace_and_calendar(stream={"samples": 10**9})
    assert made.schedule.warmup_images == 12_800_000
    assert (calendar.freeze_until, calendar.queue_from) == (1_281_167, 19_200_000)


def test_small_batches_have_no_warm_up_in_bytes_either():
    assert pace(training={"batch": 256}).stride(0, 0).rate == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("optimizer", "warmup_images"),
        ("swav", "freeze_prototypes_images"),
        ("swav", "queue_start_images"),
        ("optimizer", "cooldown_images"),
    ],
)
def test_amounts_of_images_need_a_number_of_samples(section, key):
    with pytest.raises(ConfigError, match=rf"{section}\.{key} = 64: .*stream\.samples"):
        pace(**{section: {key: 64}})
    pace(**{section: {key: 0}})
    pace(**{section: {key: 64}, "stream": {"samples": 51_200}})


def test_a_constant_rate_falls_only_in_the_cool_down():
    made = pace(
        stream={"samples": 51_200},
        optimizer={"warmup_images": 0, "schedule": "constant", "cooldown_images": 10_240},
    )
    assert made.stride(40_960, 0).rate == pytest.approx(1.0)
    assert made.stride(46_080, 0).rate == pytest.approx(0.505)
    assert made.stride(51_200, 0).rate == pytest.approx(0.01)
