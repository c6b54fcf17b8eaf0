"""Probes while pretraining: they are right, they disturb nothing, and an unlabelled set is told in time."""

from __future__ import annotations

import io
import json
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from runs import Outcome, arguments, differences, free_port, run, start, start_ranks, state_of

from streamswav.errors import EXIT_CONFIG, EXIT_DONE, EXIT_RETRY
from streamswav.transfer.measuring.evaluation import Wanted, evaluate
from streamswav.transfer.measuring.knn import KnnSettings

COUNTS = [20, 20, 20, 20]
EVERY = 32
CLASSES = 4


def coloured(number: int) -> bytes:
    """A picture whose class is its colour, under noise."""
    random = np.random.default_rng(number)
    colours = [[200, 40, 40], [40, 200, 40], [40, 40, 200], [200, 200, 40]]
    noisy = np.array(colours[number % CLASSES]) + random.normal(0, 40, (20, 24, 3))
    data = io.BytesIO()
    Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(data, "PNG")
    return data.getvalue()


@pytest.fixture(scope="module")
def data(make_shards: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probed")
    make_shards(folder / "stream", counts=COUNTS, labels=False)
    make_shards(folder / "train", counts=[24, 24], image=coloured, kind="PNG", classes=CLASSES)
    make_shards(folder / "test", counts=[24], image=lambda i: coloured(1000 + i), kind="PNG", classes=CLASSES)
    return folder


def command(data: Path, directory: Path, **more: dict[str, Any]) -> list[str]:
    sections: dict[str, dict[str, Any]] = {
        "run": {"directory": directory},
        "stream": {"urls": data / "stream", "samples": sum(COUNTS)},
        "evaluation": {"every": EVERY, "train": data / "train", "test": data / "test", "neighbours": 5},
        "checkpoint": {"images": 32},
    }
    return arguments(**{name: sections.get(name, {}) | more.get(name, {}) for name in {*sections, *more}})


@pytest.fixture(scope="module")
def probed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    folder = tmp_path_factory.mktemp("run")
    outcome = run(command(data, folder / "run"), folder)
    assert outcome.code == EXIT_DONE, outcome.err
    return folder / "run", outcome


def probes(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "probes.json").read_text())
    return found


def test_a_run_is_probed_before_its_first_step_at_every_so_many_images_and_at_its_end(
    probed: tuple[Path, Outcome],
) -> None:
    folder, outcome = probed
    assert [each["images"] for each in probes(folder)] == [0, 32, 64, 80]
    events = outcome.of("probe")
    assert [{name: each[name] for name in probes(folder)[0]} for each in events] == probes(folder)
    assert all(0 <= each[name] <= 1 for each in probes(folder) for name in ("knn_5", "linear"))


def test_the_last_probe_is_what_the_last_checkpoint_measures(
    probed: tuple[Path, Outcome], data: Path
) -> None:
    folder, _ = probed
    wanted = Wanted(protocols=("knn",), knn=KnnSettings((5,)), workers=0, batch=16)
    results = evaluate(str(folder), [str(data / "train")], [str(data / "test")], wanted)
    assert results is not None
    last = probes(folder)[-1]
    assert last["step"] == state_of(folder)["run"]["step"]
    assert last["knn_5"] == results.values[0].scores["top1"]


def test_a_run_that_is_probed_ends_in_the_same_bits_as_one_that_is_not(
    probed: tuple[Path, Outcome], data: Path, tmp_path: Path
) -> None:
    given = command(data, tmp_path / "run")
    at = given.index("--evaluation.every")
    outcome = run(given[:at] + given[at + 2 :], tmp_path)
    assert outcome.code == EXIT_DONE, outcome.err
    assert not (tmp_path / "run" / "probes.json").exists()
    assert differences(state_of(probed[0]), state_of(tmp_path / "run")) == []


def test_probes_of_a_killed_run_are_those_of_one_that_was_not(
    probed: tuple[Path, Outcome], data: Path, tmp_path: Path
) -> None:
    with start(command(data, tmp_path / "run"), tmp_path) as running:
        running.wait_until(lambda so_far: len(so_far.of("probe")) == 2)
        running.kill()
    outcome = run(command(data, tmp_path / "run"), tmp_path)
    assert outcome.code == EXIT_DONE, outcome.err
    assert probes(tmp_path / "run") == probes(probed[0])
    assert differences(state_of(probed[0]), state_of(tmp_path / "run")) == []


def test_two_ranks_share_the_labelled_images_and_measure_the_same(
    probed: tuple[Path, Outcome], data: Path, tmp_path: Path
) -> None:
    """Before the first step the trunk is the same on any number of ranks; afterwards up to rounding."""
    given = command(data, tmp_path / "run", loader={"workers": 1})
    with start_ranks(2, given, tmp_path) as running:
        outcome = running.wait()
    assert outcome.code == EXIT_DONE, outcome.err
    ours, alone = probes(tmp_path / "run"), probes(probed[0])
    assert [each["images"] for each in ours] == [each["images"] for each in alone]
    assert ours[0]["knn_5"] == alone[0]["knn_5"]


def test_probes_are_in_the_metrics(data: Path, tmp_path: Path) -> None:
    port = free_port()
    given = command(
        data, tmp_path / "run", telemetry={"port": port, "bind": "127.0.0.1"}, stream={"passes": 60}
    )
    with start(given, tmp_path) as running:
        so_far = running.wait_until(lambda so_far: len(so_far.of("probe")) >= 2)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            text = answer.read().decode()
        running.kill()
    measured = {each["knn_5"] for each in running.so_far().of("probe")}
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(lines['streamswav_probe_accuracy_ratio{probe="knn_5"}']) in measured
    assert 0 <= float(lines['streamswav_probe_accuracy_ratio{probe="linear"}']) <= 1
    assert float(lines['streamswav_step_phase_seconds_total{phase="evaluation"}']) > 0
    assert so_far.of("probe")[0]["step"] == 0


def test_a_labelled_set_that_goes_away_ends_no_run(data: Path, make_shards: Any, tmp_path: Path) -> None:
    make_shards(tmp_path / "test", counts=[12], image=coloured, kind="PNG", classes=CLASSES)
    given = command(data, tmp_path / "run", evaluation={"test": tmp_path / "test"}, stream={"passes": 4})
    with start(given, tmp_path) as running:
        running.wait_until(lambda so_far: so_far.of("probe"))
        (tmp_path / "test" / "shard-000000.tar").unlink()
        outcome = running.wait()
    assert outcome.code == EXIT_DONE, outcome.err
    failed = [each["message"] for each in outcome.of("warning")]
    assert any("the probe at step" in each for each in failed), failed


def test_a_drain_does_not_wait_for_a_probe(data: Path, tmp_path: Path) -> None:
    """The labelled set is large, so that the signal meets the probe."""
    given = command(data, tmp_path / "run", stream={"passes": 400}, evaluation={"every": 16})
    with start(given, tmp_path) as running:
        running.wait_until(lambda so_far: len(so_far.of("probe")) >= 2)
        running.signal(signal.SIGTERM)
        outcome = running.wait()
    assert outcome.code == EXIT_RETRY, outcome.err
    assert state_of(tmp_path / "run")["run"]["step"] == outcome.of("progress")[-1]["step"]


@pytest.fixture
def refused(data: Path, make_shards: Any, tmp_path: Path) -> Iterator[dict[str, list[str]]]:
    make_shards(tmp_path / "bare", counts=[12], labels=False)
    yield {
        "no label": command(data, tmp_path / "run", evaluation={"test": tmp_path / "bare"}),
        "no such folder": command(data, tmp_path / "run", evaluation={"test": tmp_path / "nowhere"}),
        "evaluation.test": command(data, tmp_path / "run", evaluation={"test": "[]"}),
    }


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("no label", "a labelled sample has a .cls member"),
        ("no such folder", "nowhere"),
        ("evaluation.test", "evaluation.test"),
    ],
)
def test_sets_that_cannot_be_used_are_refused_before_the_first_step(
    refused: dict[str, list[str]], case: str, said: str, tmp_path: Path
) -> None:
    outcome = run(refused[case], tmp_path)
    assert outcome.code == EXIT_CONFIG, outcome.err
    assert said in outcome.said[-1]
    assert not outcome.of("progress")


def test_probes_may_be_asked_for_no_longer_when_a_run_goes_on(data: Path, tmp_path: Path) -> None:
    given = command(data, tmp_path / "run", stream={"passes": 60})
    with start(given, tmp_path) as running:
        running.wait_until(lambda so_far: so_far.of("checkpoint"))
        running.kill()
    at = given.index("--evaluation.every")
    outcome = run([*given[:at], *given[at + 2 :], "--training.images", "320"], tmp_path)
    assert outcome.code == EXIT_DONE, outcome.err
    assert outcome.of("resumed")
    assert not outcome.of("probe")
