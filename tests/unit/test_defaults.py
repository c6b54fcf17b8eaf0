"""The rules by which open values are chosen: what they give, why, and what they leave alone."""

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamswav.config import Config, keys, parse_config
from streamswav.defaults import Facts, resolve
from streamswav.errors import ConfigError

GPU = Facts(
    world_size=64,
    cores=12,
    cuda=True,
    bfloat16=True,
    shards=100_000,
    samples=500_000_000,
    trunk_parameters=23_508_032,
)


def facts(**changes):
    return dataclasses.replace(GPU, **changes)


def chosen(sections=None, **changes):
    """The complete configuration for `{"section": {"key": value}}` on these facts."""
    return resolve(parse_config(sections or {}), facts(**changes))[0]


def value_of(config, key):
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def test_each_choice_has_a_reason_and_is_what_the_configuration_got():
    config, choices = resolve(Config(), GPU)
    assert len({choice.key for choice in choices}) == len(choices) > 20
    for choice in choices:
        assert choice.key in keys()
        assert value_of(config, choice.key) == choice.value
        assert len(choice.reason) > 4


def test_nothing_that_a_step_needs_stays_open():
    config, _ = resolve(Config(), GPU)
    may_be_open = {
        "training.images",
        "checkpoint.images",
        "stream.follow_idle_seconds",
        "health.warmup_images",
    }
    of_others = ("storage.", "labels.", "evaluation.", "finetune.")
    left = {key for key in keys() if value_of(config, key) is None and not key.startswith(of_others)}
    assert left == may_be_open


def test_amounts_stay_shares_of_the_bytes_where_samples_are_not_counted():
    config = chosen(samples=None, world_size=4)
    for key in (
        "stream.samples",
        "optimizer.warmup_images",
        "swav.freeze_prototypes_images",
        "swav.queue_start_images",
    ):
        assert value_of(config, key) is None
    assert config.optimizer.schedule == "cosine"


EXPLICIT = {
    "stream.samples": 777_777,
    "stream.columns": 16,
    "stream.rows": 6,
    "loader.workers": 3,
    "swav.prototypes": 77,
    "swav.epsilon": 0.07,
    "swav.iterations": 5,
    "swav.freeze_prototypes_images": 7,
    "swav.queue_length": 512,
    "swav.queue_start_images": 11,
    "optimizer.rate": 0.123,
    "optimizer.start_rate": 0.01,
    "optimizer.final_rate": 0.002,
    "optimizer.warmup_images": 999,
    "optimizer.schedule": "constant",
    "training.batch": 128,
    "training.precision": "float32",
    "training.sync_batch_norm": 4,
    "checkpoint.keep_every_images": 12_345,
}


def nested(values):
    sections = {}
    for key, value in values.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    return sections


@settings(max_examples=60, deadline=None)
@given(names=st.sets(st.sampled_from(sorted(EXPLICIT))), begun=st.booleans())
def test_what_is_given_is_never_overridden(names, begun):
    given_values = {"training.batch": 128, **{name: EXPLICIT[name] for name in names}}
    before = chosen({"training": {"batch": 128}}, world_size=4) if begun else None
    config = parse_config(nested(given_values))
    resolved, choices = resolve(config, facts(world_size=4, begun=before))
    for name, value in given_values.items():
        assert value_of(resolved, name) == value
        assert name not in {choice.key for choice in choices}


@pytest.mark.parametrize(
    ("world_size", "width", "batch"),
    [(1, 1, 64), (4, 1, 256), (64, 1, 4096), (256, 1, 4096), (64, 2, 2048), (64, 4, 2048), (128, 5, 1024)],
)
def test_the_batch_is_about_the_papers_a_rank_and_4096_at_most(world_size, width, batch):
    assert chosen({"model": {"width": width}}, world_size=world_size).training.batch == batch


@pytest.mark.parametrize(
    ("world_size", "fitting", "batch"), [(1, 256, 256), (8, 128, 1024), (64, 256, 4096), (3, 1, 3)]
)
def test_on_a_gpu_the_batch_is_what_fits_and_4096_at_most(world_size, fitting, batch):
    assert chosen(world_size=world_size, images_that_fit=fitting).training.batch == batch


def test_a_run_that_has_begun_keeps_its_batch_whatever_fits_now():
    begun = chosen(world_size=8, images_that_fit=64)
    assert chosen(world_size=4, images_that_fit=256, begun=begun).training.batch == 512
    assert chosen({"training": {"batch": 32}}, world_size=8, images_that_fit=256).training.batch == 32


def test_a_batch_that_the_ranks_do_not_divide_is_refused():
    with pytest.raises(ConfigError, match=r"training\.batch = 100: must be a multiple of the 8 ranks"):
        chosen({"training": {"batch": 100}}, world_size=8)


def test_the_grid_leaves_room_for_other_ranks_and_workers():
    config = chosen(world_size=8)
    assert (config.stream.columns, config.stream.rows, config.loader.workers) == (64, 12, 12)
    assert chosen(world_size=32).stream.columns == 128
    assert chosen(world_size=8, cores=5).loader.workers == 4
    assert chosen({"stream": {"rows": 9}}, world_size=8, cores=5).loader.workers == 3
    small = chosen(world_size=1, shards=40, cores=2)
    assert (small.stream.rows, small.stream.columns) == (2, 4)


@settings(max_examples=200, deadline=None)
@given(
    world_size=st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16, 24, 64, 96]),
    cores=st.integers(1, 32),
    shards=st.integers(1, 100_000),
    workers=st.sampled_from([None, 0, 1, 2, 5, 8]),
)
def test_every_grid_is_divided_by_its_ranks_and_workers(world_size, cores, shards, workers):
    config = chosen({"loader": {"workers": workers}}, world_size=world_size, cores=cores, shards=shards)
    stream, batch = config.stream, config.training.batch
    assert batch % world_size == 0
    assert batch <= 4096
    assert batch % stream.columns == 0
    assert stream.columns % world_size == 0
    assert stream.rows % max(1, config.loader.workers) == 0
    enough = stream.columns * stream.rows * 4 <= shards
    smallest = (stream.columns, stream.rows) == (world_size, max(1, config.loader.workers))
    assert enough or smallest


def test_the_rate_goes_through_both_settings_of_the_paper():
    def rates(batch):
        optimizer = chosen({"training": {"batch": batch}}).optimizer
        return optimizer.rate, optimizer.start_rate, optimizer.final_rate

    assert rates(4096) == pytest.approx((4.8, 0.3, 0.0048))
    assert rates(256)[0] == pytest.approx(0.6, rel=1e-3)
    assert rates(8192)[0] == pytest.approx(4.8)


def test_warm_up_and_freeze_are_shares_of_the_images_with_the_papers_as_bounds():
    small = chosen(samples=10_000_000)
    assert small.optimizer.warmup_images == 1_000_000
    assert small.swav.freeze_prototypes_images == 100_000
    large = chosen(samples=2_000_000_000)
    assert large.optimizer.warmup_images == 12_800_000
    assert large.swav.freeze_prototypes_images == 1_281_167
    assert chosen(world_size=4).optimizer.warmup_images == 0
    twice = chosen({"stream": {"passes": 2}}, samples=10_000_000)
    assert twice.optimizer.warmup_images == 2_000_000
    limited = chosen({"training": {"images": 1_000_000}}, samples=10_000_000)
    assert limited.optimizer.warmup_images == 100_000


@pytest.mark.parametrize(
    ("batch", "length", "start"),
    [
        (64, 4032, 19_200_000),
        (256, 3840, 19_200_000),
        (1024, 3072, 19_200_000),
        (1536, 1536, 0),
        (2560, 2560, 0),
        (4096, 0, 0),
    ],
)
def test_the_queue_fills_small_batches_up_to_4096(batch, length, start):
    swav = chosen({"training": {"batch": batch}}, world_size=1).swav
    assert (swav.queue_length, swav.queue_start_images) == (length, start)


def test_the_queue_starts_after_a_share_of_a_short_run():
    assert chosen(world_size=4, samples=1_000_000).swav.queue_start_images == 75_000


@pytest.mark.parametrize(
    ("parameters", "samples", "expected"),
    [
        (23_508_032, 500_000_000, (3000, 0.05, 3)),
        (23_508_032, None, (3000, 0.05, 3)),
        (23_508_032, 999_999, (512, 0.05, 3)),
        (100_000_001, 500_000_000, (16_000, 0.03, 10)),
    ],
)
def test_prototypes_follow_the_size_of_trunk_and_data(parameters, samples, expected):
    swav = chosen(trunk_parameters=parameters, samples=samples).swav
    assert (swav.prototypes, swav.epsilon, swav.iterations) == expected


def test_precision_is_what_the_device_has():
    assert chosen().training.precision == "bfloat16"
    assert chosen(bfloat16=False).training.precision == "float16"
    assert chosen(cuda=False, bfloat16=False).training.precision == "float32"


def test_batch_statistics_are_shared_by_8_ranks_from_16_on():
    assert chosen(world_size=8).training.sync_batch_norm == 0
    assert chosen(world_size=16).training.sync_batch_norm == 8
    invariant = {"training": {"topology_invariant": True}}
    assert chosen(invariant, world_size=16).training.sync_batch_norm == 0


@pytest.mark.parametrize(("world_size", "group"), [(16, 8), (20, 5), (24, 8), (36, 6), (22, 2), (17, 0)])
def test_groups_of_batch_statistics_divide_the_ranks(world_size, group):
    assert chosen(world_size=world_size).training.sync_batch_norm == group


def test_groups_that_leave_ranks_over_are_refused():
    with pytest.raises(ConfigError, match=r"training\.sync_batch_norm = 8: the 20 ranks"):
        chosen({"training": {"sync_batch_norm": 8}}, world_size=20)
    for share, world_size in [(8, 4), (8, 16), (0, 20), (1, 20)]:
        given_share = {"training": {"sync_batch_norm": share}}
        assert chosen(given_share, world_size=world_size).training.sync_batch_norm == share


def test_statistics_of_the_whole_batch_are_shared_on_any_device():
    invariant = {"training": {"topology_invariant": True}}
    for cuda in (False, True):
        assert chosen(invariant, world_size=32, cuda=cuda).training.sync_batch_norm == 0


def test_more_pieces_than_images_are_refused():
    with pytest.raises(ConfigError, match=r"training\.micro_batches = 9: a rank has only 8 images"):
        chosen({"training": {"batch": 16, "micro_batches": 9}}, world_size=2)


def test_workers_must_divide_the_rows_of_a_new_run_and_not_of_one_that_goes_on():
    given = {"stream": {"rows": 6}, "loader": {"workers": 4}}
    with pytest.raises(ConfigError, match=r"stream\.rows = 6: must be a multiple of loader\.workers \(4\)"):
        chosen(given)
    config, _ = resolve(parse_config(given), facts(world_size=3, begun=chosen(world_size=16)))
    assert (config.stream.rows, config.loader.workers) == (6, 4)


def test_a_followed_stream_has_a_constant_rate_unless_it_has_an_end():
    assert chosen({"stream": {"follow": True}}).optimizer.schedule == "constant"
    assert chosen({"stream": {"follow": True}, "training": {"images": 10**6}}).optimizer.schedule == "cosine"


def test_prototypes_follow_distinct_images_not_passes():
    assert chosen({"stream": {"passes": 100}}, samples=50_000).swav.prototypes == 512
    assert chosen({"training": {"images": 900_000}}, samples=5_000_000).swav.prototypes == 512
    assert chosen({"stream": {"passes": 2}}, samples=1_000_000).swav.prototypes == 3000


def test_checkpoints_come_every_10_minutes_and_one_in_5_percent_stays():
    section = chosen(samples=1_000_000).checkpoint
    assert (section.minutes, section.keep, section.keep_every_images) == (10, 3, 50_000)


def test_a_continued_run_keeps_what_it_chose_on_other_machines():
    before = chosen(world_size=16)
    config, choices = resolve(Config(), facts(world_size=4, cores=2, shards=10, begun=before))
    kept = {choice.key: choice.value for choice in choices if choice.reason == "as the run began"}
    for key in (
        "training.batch",
        "stream.columns",
        "stream.rows",
        "swav.queue_length",
        "swav.prototypes",
        "optimizer.rate",
        "optimizer.warmup_images",
    ):
        assert kept[key] == value_of(config, key) == value_of(before, key)
    assert config.loader.workers == 2
    assert config.training.sync_batch_norm == 0
    assert math.isclose(config.optimizer.final_rate, before.optimizer.rate / 1000)
