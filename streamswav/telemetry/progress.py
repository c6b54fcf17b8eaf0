"""What a run says while it works: one live line on a terminal, JSON lines anywhere else."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TextIO

SHOWN = {
    "ln_prototypes": " (ln K {:.3f})",
    "prototype_usage_ratio": "  prototypes used {:.0%}",
    "train_accuracy_ratio": "  right {:.1%}",
}
"""How people are told of a reading."""


@dataclass(frozen=True)
class Progress:
    """The state of a run at one moment.

    Attributes:
        step: optimizer steps done.
        images: images trained, all passes.
        fraction: share of the run that is done, 0 to 1; None for a stream without end.
        loss: of the last step.
        rate: learning rate.
        images_per_second: since the last line.
        data_wait_ratio: share of that time spent waiting for the loader.
        readings: what else the task tells, by name (`SHOWN` has those for people).
        quarantined: samples and stretches that were not trained.
        seconds_left: an estimate; None where the end is not known.
    """

    step: int
    images: int
    fraction: float | None
    loss: float
    rate: float
    images_per_second: float
    data_wait_ratio: float
    readings: Mapping[str, float]
    quarantined: int
    seconds_left: float | None


class Reporter:
    """Writes lines for people or machines; only rank 0 has one that speaks."""

    def __init__(self, stream: TextIO | None = None, *, silent: bool = False) -> None:
        self._stream = stream or sys.stderr
        self._silent = silent
        self._live = self._stream.isatty()
        self._open_line = False
        self._lock = threading.RLock()  # checkpoints are told of by the thread that writes them

    def progress(self, progress: Progress) -> None:
        """Show how far the run is."""
        if self._live:
            with self._lock:
                self._write("\r\x1b[K" + _human(progress), end="")
                self._open_line = True
        else:
            values = asdict(progress)
            values |= values.pop("readings")
            fields = {name: _rounded(value) for name, value in values.items()}
            self._json("progress", fields)

    def event(self, name: str, message: str, **fields: object) -> None:
        """Tell that something happened; `message` is for people, `fields` for machines."""
        if not self._live:
            self._json(name, {"message": message, **fields})
            return
        with self._lock:
            self.close()
            self._write(message)

    def close(self) -> None:
        """End the live line."""
        if self._open_line:
            self._write("")
            self._open_line = False

    def _json(self, name: str, fields: dict[str, Any]) -> None:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._write(json.dumps({"time": stamp, "event": name, **fields}))

    def _write(self, text: str, end: str = "\n") -> None:
        if self._silent:
            return
        with self._lock:
            self._stream.write(text + end)
            self._stream.flush()


def _human(progress: Progress) -> str:
    done = f"{100 * progress.fraction:5.1f}%  " if progress.fraction is not None else ""
    left = f"  {_clock(progress.seconds_left)} left" if progress.seconds_left is not None else ""
    told = "".join(SHOWN[name].format(value) for name, value in progress.readings.items() if name in SHOWN)
    passed = f"  {progress.quarantined} quarantined" if progress.quarantined else ""
    return (
        f"{done}step {progress.step:,}  {progress.images:,} images  {progress.images_per_second:,.0f}/s  "
        f"loss {progress.loss:.3f}{told}  data wait {100 * progress.data_wait_ratio:.0f}%{passed}{left}"
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _rounded(value: Any) -> Any:
    """Five significant digits; JSON has no word for NaN."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.5g}") if math.isfinite(value) else str(value)
