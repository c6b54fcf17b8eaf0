"""The verdict: what readings come to, how long they have to, and what it says."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from streamswav.config import keys
from streamswav.telemetry.families import VERDICTS as EXPORTED
from streamswav.telemetry.remedies import Settings, remedies_for
from streamswav.telemetry.verdict import BAD, VERDICTS, Judge, Moment, Thresholds, Verdict

LN_K = math.log(3000)
SETTINGS = Settings(
    epsilon=0.05,
    prototypes=3000,
    embedding=128,
    batch=256,
    rate=0.6,
    queue_length=3840,
    scales=[(0.14, 1.0), (0.05, 0.14)],
    jitter=0.64,
)
GOOD = {
    "ln_prototypes": LN_K,
    "prototype_usage_ratio": 0.95,
    "assignment_information_ratio": 0.25,
    "embedding_std_ratio": 0.9,
    "embedding_rankme": 40.0,
    "rankme": 300.0,
    "prototypes_unique_ratio": 1.0,
}
AT_LN_K = {"assignment_information_ratio": 0.0002, "embedding_std_ratio": 0.2}
STALE = {"queue_staleness_ratio": 0.7}
EVERY = 20


class Log:
    """A run that logs every 20 steps."""

    def __init__(self, judge: Judge | None = None, *, step: int = 0) -> None:
        self.judge = judge or Judge(SETTINGS)
        self.step = step
        self.verdicts: list[Verdict] = []

    def lines(self, count: int, *, loss: float, **readings: float) -> Log:
        for _ in range(count):
            self.step += EVERY
            moment = Moment(self.step, 256 * self.step, loss, {**GOOD, **readings})
            self.verdicts.append(self.judge.hear(moment))
        return self

    @property
    def names(self) -> list[str]:
        return [each.name for each in self.verdicts]

    @property
    def last(self) -> Verdict:
        return self.verdicts[-1]


def healthy() -> Log:
    log = Log().lines(10, loss=7.5).lines(20, loss=5.0)
    assert log.last.name == "healthy"
    return log


def test_the_names_are_those_that_are_exported() -> None:
    assert set(VERDICTS) == set(EXPORTED)


def test_a_run_warms_up_and_is_healthy() -> None:
    log = Log().lines(30, loss=5.0)
    assert log.names == ["warming_up"] * 9 + ["healthy"] * 21
    assert (log.last.step, log.last.images) == (200, 256 * 200)


def test_frozen_prototypes_are_given_their_time_twice() -> None:
    log = Log().lines(15, loss=LN_K, prototypes_frozen=1.0).lines(60, loss=5.0)
    first = log.names.index("healthy")
    assert log.verdicts[first].step == 2 * 300 + 200


def test_the_warm_up_may_be_set() -> None:
    log = Log(Judge(SETTINGS, warmup_images=256 * 100)).lines(6, loss=5.0)
    assert log.names == ["warming_up"] * 4 + ["healthy"] * 2


@pytest.mark.parametrize(
    ("name", "loss", "readings"),
    [
        ("stuck", LN_K + 0.001, AT_LN_K),
        ("stuck", LN_K - 0.05, AT_LN_K),
        ("diverging", LN_K + 0.5, {}),
        ("diverging", 6.8, {}),
        ("diverging", math.nan, {}),
        ("dimensional_collapse", 5.0, {"embedding_std_ratio": 0.05}),
        ("dimensional_collapse", 5.0, {"embedding_rankme": 3.0}),
        ("dimensional_collapse", 5.0, {"rankme": 1.1}),
        ("prototype_collapse", 5.0, {"prototype_usage_ratio": 0.05}),
        ("prototype_collapse", 5.0, {"prototypes_unique_ratio": 0.2}),
    ],
)
def test_what_is_bad_is_called_by_its_name_once_it_has_held(
    name: str, loss: float, readings: dict[str, float]
) -> None:
    log = healthy()
    before = len(log.verdicts)
    log.lines(6, loss=loss, **readings)
    assert log.names[before:] == ["healthy"] * 2 + [name] * 4
    assert log.last.step == 30 * EVERY + EVERY, "since the first line that was so"
    assert log.last.remedies


def test_the_queue_is_blamed_for_what_began_with_it() -> None:
    log = healthy().lines(2, loss=5.0, queue_staleness_ratio=0.1).lines(6, loss=6.5, **STALE)
    assert log.last.name == "queue_rebound"
    assert [each.key for each in log.last.remedies][:2] == ["swav.queue_start_images", "swav.queue_length"]
    worse = log.lines(6, loss=LN_K, **STALE, **AT_LN_K)
    assert worse.last.name == "queue_rebound"


def test_a_queue_that_does_no_harm_is_not_blamed() -> None:
    assert healthy().lines(10, loss=5.3, queue_staleness_ratio=0.1).last.name == "healthy"


def test_one_bad_line_is_no_verdict() -> None:
    log = healthy()
    for _ in range(10):
        log.lines(2, loss=LN_K, **AT_LN_K).lines(1, loss=5.0)
    assert set(log.names[30:]) == {"healthy"}


def test_one_good_line_does_not_take_it_back() -> None:
    log = healthy().lines(5, loss=LN_K, **AT_LN_K)
    before = len(log.verdicts)
    log.lines(2, loss=5.0)
    assert log.names[before:] == ["stuck"] * 2
    assert "better, but not for long" in log.last.sentence
    assert log.lines(1, loss=5.0).last.name == "healthy"


def test_many_lines_of_few_steps_do_not_make_it_hold() -> None:
    judge = Judge(SETTINGS)
    for step in range(1000, 1025):
        verdict = judge.hear(Moment(step, 256 * step, LN_K, {**GOOD, **AT_LN_K}))
    assert verdict.name in ("warming_up", "healthy")
    for step in range(1025, 1035):
        verdict = judge.hear(Moment(step, 256 * step, LN_K, {**GOOD, **AT_LN_K}))
    assert verdict.name == "stuck"


def test_two_kinds_of_bad_by_turns_are_bad() -> None:
    log = healthy()
    for _ in range(4):
        log.lines(1, loss=LN_K + 0.05, **AT_LN_K).lines(1, loss=LN_K + 0.2, **AT_LN_K)
    assert log.last.bad


def test_while_warming_up_only_what_is_far_off_diverges() -> None:
    assert Log().lines(9, loss=LN_K + 0.5, prototype_usage_ratio=0.01).last.name == "warming_up"
    assert Log().lines(9, loss=2 * LN_K).last.name == "diverging"


def test_a_loss_that_falls_by_its_schedule_and_wavers_does_not_diverge() -> None:
    log = healthy()
    for loss in (4.5, 4.8, 4.3, 4.6, 4.0, 4.4, 4.1, 3.9, 4.3):
        log.lines(1, loss=loss)
    assert set(log.names[30:]) == {"healthy"}


def test_a_resumed_run_goes_on_with_its_verdict() -> None:
    log = healthy().lines(5, loss=LN_K, **AT_LN_K)
    state: dict[str, Any] = json.loads(json.dumps(log.judge.state()))
    resumed = Judge(SETTINGS)
    resumed.restore(state)
    again = Log(resumed, step=log.step).lines(3, loss=LN_K, **AT_LN_K)
    assert again.names == ["stuck"] * 3
    assert again.last.step == log.last.step


def test_readings_that_take_long_to_come_back_are_those_of_before() -> None:
    log = healthy().lines(5, loss=5.0, embedding_rankme=2.0)
    resumed = Judge(SETTINGS)
    resumed.restore(log.judge.state())
    without = {name: value for name, value in GOOD.items() if "rankme" not in name}
    verdicts = [resumed.hear(Moment(step, 256 * step, 5.0, without)) for step in range(800, 1200, EVERY)]
    assert {each.name for each in verdicts} == {"dimensional_collapse"}


def test_a_run_without_a_state_far_on_is_judged_at_once() -> None:
    resumed = Judge(SETTINGS)
    resumed.restore(None)
    assert Log(resumed, step=50_000).lines(3, loss=LN_K, **AT_LN_K).last.name == "stuck"


def test_a_state_of_a_later_version_is_read_as_far_as_it_is_known() -> None:
    judge = Judge(SETTINGS)
    judge.restore({**healthy().judge.state(), "unheard_of": 1})
    assert judge.name == "healthy"


@pytest.mark.parametrize("name", BAD)
def test_remedies_are_keys_that_exist_and_change_something(name: str) -> None:
    found = remedies_for(name, SETTINGS, STALE)
    assert found
    assert {each.key for each in found} <= {*keys()}
    assert len({each.key for each in found}) == len(found)


def test_what_the_run_has_already_is_no_remedy() -> None:
    tried = replace(SETTINGS, epsilon=0.03, hard_codes=True, scales=[(0.3, 1.0)], jitter=0.4, queue_length=0)
    found = {each.key for each in remedies_for("stuck", tried, {})}
    assert not found & {
        "swav.epsilon",
        "swav.hard_codes",
        "crops.scales",
        "crops.jitter",
        "swav.queue_length",
    }
    assert found >= {"swav.freeze_prototypes_images", "optimizer.rate", "swav.prototypes"}


def test_against_ln_k_epsilon_comes_first_and_hard_codes_last() -> None:
    found = [each.key for each in remedies_for("stuck", SETTINGS, {})]
    assert found[0] == "swav.epsilon"
    assert found[-1] == "swav.hard_codes"


def test_the_sentence_shows_figures_and_thresholds() -> None:
    stuck = healthy().lines(5, loss=8.007, **AT_LN_K).last.sentence
    assert "8.007" in stuck
    assert "8.006" in stuck
    few = healthy().lines(5, loss=5.0, prototype_usage_ratio=0.05).last.sentence
    assert "5.0%" in few
    assert f"{Thresholds().usage:.0%}" in few


GOLDENS = json.loads((Path(__file__).parents[1] / "goldens" / "verdicts.json").read_text())


@pytest.mark.parametrize("name", GOLDENS["runs"])
def test_real_runs_get_the_verdicts_that_they_got(name: str) -> None:
    """Readings of the trials of `ops/benchmarks/verdicts.py`, as they were logged."""
    run = GOLDENS["runs"][name]
    settings = replace(SETTINGS, prototypes=128, batch=128)
    judge = Judge(settings, Thresholds(hold_steps=15), warmup_images=9600)
    names: list[str] = []
    for step, loss, *values in run["lines"]:
        pairs = zip(GOLDENS["columns"][2:], values, strict=True)
        readings = {column: value for column, value in pairs if value is not None}
        found = judge.hear(Moment(step, 128 * step, math.nan if loss is None else loss, readings)).name
        names += [] if names and names[-1] == found else [found]
    assert names == run["verdicts"]
