"""/metrics of a real run, scraped over HTTP while it trains from S3."""

import math
import time
from itertools import pairwise

import pytest
from runs import arguments, free_port, scrape_text, start, values_of

from streamswav.errors import EXIT_DONE
from streamswav.telemetry.families import FAMILIES, PHASES, RUN_STATES, STAGES

COUNTS = [40] * 8
BATCH, PASSES = 16, 4


@pytest.fixture(scope="module")
def story(s3, make_shards, tmp_path_factory):
    """Every scrape of a run's life, with the time at which it was made, and how the run ended."""
    url, bucket = s3.make_bucket()
    make_shards(bucket / "train", counts=COUNTS)
    folder, port, seen = tmp_path_factory.mktemp("run"), free_port(), []
    made = arguments(
        run={"directory": folder / "run"},
        stream={"urls": f"{url}/train/", "samples": sum(COUNTS), "passes": PASSES, "rows": 1},
        storage={"endpoint_url": s3.endpoint},
        loader={"workers": 1},
        checkpoint={"images": 320},
        telemetry={"port": port, "bind": "127.0.0.1"},
    )
    began = time.time()
    with start(made, folder) as running:
        while not running.ended:
            if text := scrape_text(port):
                seen.append((time.monotonic(), text))
            time.sleep(0.05)
        return began, seen, running.wait()


@pytest.fixture(scope="module")
def values(story):
    """The scrapes from the first step on, as (time, value by name and labels)."""
    parsed = [(moment, values_of(text)) for moment, text in story[1]]
    return [each for each in parsed if each[1].get("streamswav_step", 0) > 0]


def test_every_family_that_is_declared_is_there_with_its_help(story):
    _, seen, outcome = story
    assert outcome.code == EXIT_DONE, outcome.err
    declared = [f"# HELP streamswav_{name} {FAMILIES[name].text}" for name in sorted(FAMILIES)]
    for _, text in seen:
        told = [line for line in text.splitlines() if line.startswith("# HELP streamswav_")]
        assert sorted(told) == sorted(declared)
    for phase in PHASES:
        assert f'streamswav_step_phase_seconds_total{{phase="{phase}"}}' in seen[0][1]


def test_counters_and_gauges_tell_what_happened(story, values):
    began, _, _ = story
    assert len(values) > 10
    for (_, before), (_, after) in pairwise(values):
        for name in after:
            if name.endswith("_total") or "_total{" in name or name == "streamswav_step":
                assert after[name] >= before.get(name, 0), name
    last = values[-1][1]
    step = last["streamswav_step"]
    assert step > values[0][1]["streamswav_step"]
    assert step >= 0.8 * PASSES * sum(COUNTS) / BATCH
    assert abs(last["streamswav_images_total"] - BATCH * step) <= BATCH
    assert abs(last["streamswav_step_duration_seconds_count"] - step) <= 1
    assert last['streamswav_samples_total{outcome="quarantined"}'] == 0
    assert last["streamswav_prototypes"] == 10
    assert 0 < last["streamswav_loss"] < 10
    assert 0 < last["streamswav_learning_rate"] < 1
    assert 0 < last["streamswav_prototype_usage_ratio"] <= 1
    assert 0 <= last["streamswav_run_images_remaining"] < PASSES * sum(COUNTS)
    assert last['streamswav_stream_shards{state="manifest"}'] == len(COUNTS)
    now = time.time()
    for name in ("process_start", "last_step", "checkpoint_last_success"):
        assert began <= last[f"streamswav_{name}_timestamp_seconds"] <= now


def test_storage_and_checkpoints_are_counted(values):
    last = values[-1][1]
    assert last['streamswav_s3_requests_total{outcome="ok"}'] >= len(COUNTS)
    assert last["streamswav_s3_received_bytes_total"] > sum(COUNTS) * 500
    for stage in STAGES:
        assert last[f'streamswav_stage_seconds_total{{stage="{stage}"}}'] > 0
    assert last['streamswav_checkpoints_total{outcome="ok"}'] >= 3
    assert last["streamswav_checkpoint_last_success_step"] % (320 // BATCH) == 0
    assert last["streamswav_checkpoint_bytes"] > 1000
    assert last["streamswav_checkpoint_interval_seconds"] == 600


def test_phases_add_up_to_wall_time(values):
    training = [each for _, each in values if each['streamswav_run_state{state="training"}']]
    first, last = training[0], training[-1]

    def spent(scraped, phase):
        return scraped[f'streamswav_step_phase_seconds_total{{phase="{phase}"}}']

    seconds = {phase: spent(last, phase) - spent(first, phase) for phase in PHASES}
    moments = [each["streamswav_last_step_timestamp_seconds"] for each in (first, last)]
    wall = moments[1] - moments[0]
    assert math.isclose(sum(seconds.values()), wall, rel_tol=0.05), (seconds, wall)
    assert all(seconds[phase] > 0 for phase in PHASES if phase not in ("evaluation", "allreduce"))
    assert seconds["evaluation"] == 0  # nobody asked for a probe


def test_the_run_is_in_one_state_at_a_time(story):
    """A scrape in the very moment of a change may see it half done."""
    states = []
    for _, text in story[1]:
        scraped = values_of(text)
        states.append([state for state in RUN_STATES if scraped[f'streamswav_run_state{{state="{state}"}}']])
    single = [held[0] for held in states if len(held) == 1]
    assert len(single) >= 0.9 * len(states)
    assert single[0] == "init"
    assert {"init", "training"} <= set(single) <= {"init", "training", "checkpoint", "done"}
    assert "init" not in single[single.index("training") :]
