"""What a run is told of its representation: the verdict, its history, and when there is no hope."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from streamswav.config import Config
from streamswav.telemetry.remedies import settings_of
from streamswav.telemetry.verdict import Judge, Moment, Thresholds, Verdict


class Health:
    """Judges every log line on rank 0, and keeps what was found until a checkpoint is written.

    Args:
        judge: decides.
        stop_steps: steps of this process that a bad verdict holds until there is no hope; None: there is.

    Attributes:
        verdict: what holds; None before the first line.
    """

    def __init__(self, judge: Judge, *, stop_steps: int | None = None) -> None:
        self._judge, self._stop_steps = judge, stop_steps
        self._lines: list[str] = []
        self._bad_from: int | None = None
        self._step = 0
        self.verdict: Verdict | None = None

    def hear(self, moment: Moment) -> Verdict | None:
        """Take a log line; return the verdict if it is another than before, or the first of this process."""
        before = self.verdict.name if self.verdict else None
        verdict = self.verdict = self._judge.hear(moment)
        self._step = moment.step
        if not verdict.bad:
            self._bad_from = None
        elif self._bad_from is None:
            self._bad_from = moment.step
        self._lines.append(json.dumps(to_record(moment, verdict)) + "\n")
        return verdict if verdict.name != before else None

    @property
    def hopeless(self) -> Verdict | None:
        """The bad verdict that has held for as long as it may, if one has."""
        if self._stop_steps is None or self._bad_from is None:
            return None
        return self.verdict if self._step - self._bad_from >= self._stop_steps else None

    def take_lines(self) -> list[str]:
        """Return the history since the last time."""
        lines, self._lines = self._lines, []
        return lines

    def state(self) -> dict[str, Any]:
        """Return plain data from which `restore` goes on."""
        return self._judge.state()

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Go on from a state; None: from none."""
        self._judge.restore(state)


def build_health(config: Config) -> Health | None:
    """Build what judges a run of a resolved configuration; None where nothing does."""
    section = config.health
    if config.run.task != "pretrain" or not section.verdict:
        return None
    judge = Judge(
        settings_of(config), Thresholds(hold_steps=section.hold_steps), warmup_images=section.warmup_images
    )
    return Health(judge, stop_steps=section.stop_steps if section.stop else None)


def to_record(moment: Moment, verdict: Verdict) -> dict[str, Any]:
    """Return a line of the history; what is not finite has no number in JSON and is null."""
    return {
        "step": moment.step,
        "images": moment.images,
        "loss": _plain(moment.loss),
        **{name: _plain(value) for name, value in moment.readings.items()},
        "verdict": {
            "name": verdict.name,
            "since_step": verdict.step,
            "since_images": verdict.images,
            "sentence": verdict.sentence,
            "remedies": [str(each) for each in verdict.remedies],
        },
    }


def _plain(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None
