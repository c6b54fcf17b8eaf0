"""Steps that are not finite, through a whole run: counted, listed, bounded, and never saved."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from signal import SIGTERM
from typing import Any

import pytest
import torch
from runs import Outcome, arguments, differences, state_of
from torch import Tensor

from streamswav import cli
from streamswav.commands import pretrain as command
from streamswav.crops import Augment
from streamswav.errors import EXIT_CONFIG, EXIT_DONE, EXIT_RETRY

BATCH, SAMPLES = 8, 160

Train = Callable[..., Outcome]


class Poisoned(Augment):
    """The crops of some steps are not numbers: what a kernel gone wrong gives."""

    def __init__(self, section: Any, steps: Collection[int]) -> None:
        super().__init__(section)
        self._steps, self._calls = steps, 0

    @staticmethod
    def at_step(step: int) -> None:
        """What else happens then."""

    def __call__(self, *given: Any) -> Tensor:
        crops = super().__call__(*given)
        step, self._calls = self._calls // 2, self._calls + 1  # two resolutions a step
        self.at_step(step)
        return crops * torch.nan if step in self._steps else crops


@pytest.fixture(scope="module")
def shards(make_shards: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder, counts=[SAMPLES // 2, SAMPLES // 2], labels=False)
    return folder


@pytest.fixture
def train(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Train:
    """Runs the command in this process; steps are counted from where it begins."""

    def run(*poisoned: int, **sections: dict[str, Any]) -> Outcome:
        monkeypatch.setattr(command, "Augment", lambda section: Poisoned(section, poisoned))
        given = {
            "run": {"directory": tmp_path / "run"},
            "stream": {"urls": shards},
            "training": {"batch": BATCH},
            **sections,
        }
        code = cli.main(arguments(**given))
        return Outcome(code, *capfd.readouterr())

    return run


def position(folder: Path) -> dict[str, Any]:
    latest = folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text()
    read: dict[str, Any] = json.loads((latest / "position.json").read_text())
    return read


def skipped_keys(folder: Path) -> list[str]:
    files = sorted((folder / "skipped_step").glob("*.jsonl"))
    return [json.loads(line)["key"] for file in files for line in file.read_text().splitlines()]


def audited(folder: Path, capfd: Any) -> Outcome:
    code = cli.main(["audit", str(folder), "--recount", "--workers", "1"])
    return Outcome(code, *capfd.readouterr())


def test_samples_of_skipped_steps_are_an_outcome_of_their_own(
    train: Train, tmp_path: Path, capfd: Any
) -> None:
    ended = train(3, 6, 7)
    assert ended.code == EXIT_DONE, ended.err
    stream = json.loads((tmp_path / "run" / "summary.json").read_text())["stream"]
    assert stream["skipped_step"] == 3 * BATCH
    assert stream["trained"] == SAMPLES - 3 * BATCH
    assert len({*skipped_keys(tmp_path / "run")}) == 3 * BATCH
    assert sum(event["steps"] for event in ended.of("skipped_steps")) == 3
    balance = audited(tmp_path / "run", capfd)
    assert balance.code == EXIT_DONE, balance.out + balance.err


def newest(folder: Path) -> Path:
    return folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text()


def test_the_first_loss_is_that_of_the_first_step_that_counted(train: Train, tmp_path: Path) -> None:
    assert train(0, 1).code == EXIT_DONE
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["loss_first"] > 0


def until_written() -> None:
    """Wait for the checkpoint that is being written in the background, if any."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()


def test_too_many_in_a_row_end_the_run_with_their_keys_and_no_checkpoint(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """No writer is busy when they have begun, so that nothing but they can put a checkpoint off."""
    monkeypatch.setattr(
        Poisoned, "at_step", staticmethod(lambda step: until_written() if step == 6 else None)
    )
    ended = train(
        *range(5, 20), checkpoint={"images": BATCH}, training={"batch": BATCH, "nonfinite_in_a_row": 4}
    )
    assert ended.code == EXIT_CONFIG
    assert "the last 4 steps up to step 9" in ended.said[-1]
    assert "training.nonfinite_in_a_row = 4" in ended.said[-1]
    assert len(skipped_keys(tmp_path / "run")) == 4 * BATCH
    assert int(newest(tmp_path / "run").name.removeprefix("step-")) <= 5  # they are written meanwhile
    assert ended.of("put_off")
    again = train()
    assert again.code == EXIT_DONE, again.err
    assert skipped_keys(tmp_path / "run") == []
    assert audited(tmp_path / "run", capfd).code == EXIT_DONE


def test_a_checkpoint_waits_for_a_step_that_is_finite(train: Train, tmp_path: Path) -> None:
    ended = train(4, 5, checkpoint={"images": 5 * BATCH, "keep": 99})
    assert ended.code == EXIT_DONE, ended.err
    steps = [
        int(each.name.removeprefix("step-")) for each in sorted((tmp_path / "run/checkpoints").glob("step-*"))
    ]
    assert steps[0] == 7
    assert position(tmp_path / "run")["finished"]


def test_a_burst_between_two_logs_counts_although_a_good_step_followed(train: Train) -> None:
    ended = train(
        3, 4, 5, training={"batch": BATCH, "nonfinite_in_a_row": 3}, telemetry={"log_seconds": 1000}
    )
    assert ended.code == EXIT_CONFIG
    assert "3 steps in a row" in ended.said[-1]


@pytest.mark.parametrize("bad", [1, 3])
def test_a_drain_after_a_skipped_step_saves_but_not_after_several(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: int
) -> None:
    """The signal comes while step 8, the last that is skipped, is computed."""
    poisoned = range(8, 8 - bad, -1)
    monkeypatch.setattr(
        Poisoned, "at_step", staticmethod(lambda step: step == 8 and os.kill(os.getpid(), SIGTERM))
    )
    ended = train(*poisoned)
    assert ended.code == EXIT_RETRY
    assert (tmp_path / "run/checkpoints/latest").exists() == (bad < 3)
    assert ("begins again" in ended.said[-1]) == (bad == 3)


def test_when_somebody_looks_changes_nothing(train: Train, tmp_path: Path) -> None:
    """A step is skipped while the queue fills: whether it is full is found out at the same step."""
    states = []
    for number, seconds in enumerate((0.0001, 1000)):
        queue = {"queue_length": 6 * BATCH, "queue_start_images": 0}
        assert train(1, swav=queue, telemetry={"log_seconds": seconds}).code == EXIT_DONE
        (tmp_path / "run").rename(tmp_path / f"run{number}")
        states.append(state_of(tmp_path / f"run{number}"))
    assert differences(*states) == []


def test_a_run_does_not_end_well_with_steps_that_were_all_skipped(train: Train) -> None:
    ended = train(*range(17, 20))
    assert ended.code == EXIT_CONFIG
    assert "the last 3 steps up to step 20" in ended.said[-1]


def test_weights_beyond_all_bounds_are_not_saved(train: Train, tmp_path: Path) -> None:
    ended = train(optimizer={"rate": 1e30}, checkpoint={"images": BATCH})
    assert ended.code == EXIT_CONFIG
    assert "the weights have grown beyond all bounds at step 1" in ended.said[-1]
    assert not list((tmp_path / "run/checkpoints").glob("step-*/checkpoint.json"))
