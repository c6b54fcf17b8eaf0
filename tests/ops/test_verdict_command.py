"""`streamswav verdict`, and what a run keeps of its health: real runs, resumed and given up."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from runs import arguments, run, start_ranks

from streamswav import cli
from streamswav.errors import EXIT_CONFIG, EXIT_DONE, EXIT_FAILED
from streamswav.stream.store import Store
from streamswav.training.history import read_history

BATCH, STEPS = 16, 12
HASTY = {"warmup_images": 0, "hold_steps": 2}
HOPEFUL = {"warmup_images": 10**9}


@pytest.fixture(scope="module")
def shards(make_shards: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder, counts=[50, 60, 50, BATCH * STEPS - 160])
    return folder


def command(shards: Path, directory: Path, **sections: dict[str, Any]) -> list[str]:
    """A run of twelve steps that saves every third; its loss begins far above ln K."""
    sections = {"checkpoint": {"images": 3 * BATCH}, "health": HOPEFUL} | sections
    return arguments(run={"directory": directory}, stream={"urls": shards}, **sections)


def history(directory: Path) -> list[dict[str, Any]]:
    return read_history(Store(), str(directory), most=10**6)


def slow(**more: Any) -> dict[str, Any]:
    """A rate at which nothing changes."""
    return {"rate": 1e-9, **more}


@pytest.fixture(scope="module")
def bad(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to its end whose loss stays above ln K."""
    folder = tmp_path_factory.mktemp("bad") / "run"
    outcome = run(command(shards, folder, health=HASTY, optimizer=slow()), folder.parent / "out")
    assert outcome.code == EXIT_DONE, outcome.err
    changes = [each["verdict"] for each in outcome.of("verdict")]
    assert changes[-1] == "diverging"
    assert len(changes) == len(set(changes))
    return folder


def test_every_log_line_is_in_the_history_once(bad: Path) -> None:
    lines = history(bad)
    assert [each["step"] for each in lines] == list(range(1, STEPS + 1))
    assert [each["images"] for each in lines] == [BATCH * step for step in range(1, STEPS + 1)]
    assert lines[-1]["verdict"]["name"] == "diverging"


def test_a_bad_verdict_is_printed_with_remedies_and_exits_with_1(
    bad: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verdict", str(bad)]) == EXIT_FAILED
    told = capsys.readouterr()
    assert f"{bad}: diverging since step" in told.out
    assert "above ln K = 2.303" in told.out
    assert "--optimizer.rate" in told.out
    assert told.err.startswith(f"streamswav: {bad}: diverging since step")


def test_as_json_the_verdict_has_its_figures(bad: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["verdict", str(bad), "--json", "--lines", "3"])
    report = json.loads(capsys.readouterr().out)
    assert (report["verdict"], report["step"]) == ("diverging", STEPS)
    assert [each["step"] for each in report["history"]] == [STEPS - 2, STEPS - 1, STEPS]
    assert report["readings"]["ln_prototypes"] == pytest.approx(2.3026)
    assert report["remedies"]


def test_a_run_that_warms_up_exits_with_0(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command(shards, tmp_path / "run"), tmp_path / "out").code == EXIT_DONE
    assert cli.main(["verdict", str(tmp_path / "run")]) == EXIT_DONE
    assert "warming_up since step" in capsys.readouterr().out


def test_a_run_without_a_history_says_what_is_missing_and_what_is_known(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert run(command(shards, folder, health={"verdict": False}), tmp_path / "out").code == EXIT_DONE
    assert not (folder / "health").exists()
    assert cli.main(["verdict", str(folder)]) == EXIT_CONFIG
    told = capsys.readouterr().err
    assert "there is no health/" in told
    assert "ln K is 2.303" in told
    assert cli.main(["verdict", str(tmp_path / "nowhere")]) == EXIT_CONFIG
    assert "there is no run here" in capsys.readouterr().err


def test_a_run_that_goes_on_keeps_its_verdict_and_its_history(
    shards: Path, bad: Path, tmp_path: Path
) -> None:
    """It goes on from the checkpoint before the last, as after a crash: what came after it comes again."""
    folder = tmp_path / "run"
    shutil.copytree(bad, folder)
    for last in (folder / "checkpoints").glob(f"step-{STEPS:09d}*"):  # one of the end of the pass as well
        shutil.rmtree(last)
    (folder / "summary.json").unlink()
    before = max(int(each.name[5:14]) for each in (folder / "checkpoints").glob("step-*"))
    assert before < STEPS
    outcome = run(command(shards, folder, health=HASTY, optimizer=slow()), tmp_path / "out")
    assert outcome.code == EXIT_DONE, outcome.err
    told = outcome.of("verdict")
    assert [each["verdict"] for each in told] == ["diverging"], "no flapping"
    assert [each["step"] for each in history(folder)] == list(range(1, STEPS + 1))


def test_a_checkpoint_from_before_there_was_a_verdict_is_gone_on_from(shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    half = {"images": BATCH * 6}
    for words in (
        command(shards, folder, health={"verdict": False}, training=half),
        command(shards, folder, training={"images": BATCH * STEPS}),
    ):
        outcome = run(words, tmp_path / "out")
        assert outcome.code == EXIT_DONE, outcome.err
    assert [each["step"] for each in history(folder)] == list(range(7, STEPS + 1))


@pytest.mark.parametrize("ranks", [1, 2])
def test_health_stop_ends_a_hopeless_run_with_78_saved(shards: Path, tmp_path: Path, ranks: int) -> None:
    folder = tmp_path / "run"
    health = {**HASTY, "stop": True, "stop_steps": 3}
    words = command(shards, folder, health=health, optimizer=slow(), checkpoint={"images": 10**6})
    with start_ranks(ranks, words, tmp_path / "out") as running:
        outcome = running.wait()
    assert outcome.code == EXIT_CONFIG, outcome.err
    (said,) = outcome.said
    assert said.startswith("streamswav: diverging since step")
    assert "optimizer.rate" in said
    assert "health.stop" in said
    last = history(folder)[-1]
    assert last["step"] < STEPS
    assert (folder / "checkpoints" / f"step-{last['step']:09d}" / "checkpoint.json").exists()
