"""What a run says while it works: one live line on a terminal, JSON lines anywhere else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, TextIO

from tqdm import tqdm
from tqdm.utils import disp_len

from streamswav.telemetry.logs import Log, own_log
from streamswav.telemetry.sinks import Sink, numbers

SHOWN = {
    "prototype_usage_ratio": "prototypes used {:.0%}",
    "train_accuracy_ratio": "right {:.1%}",
}
"""How people are told of a reading."""

_COLOUR_OF = {"healthy": "green", "warming_up": "cyan"}
"""Of a verdict; any other one is bad."""

_SHORTEST_BAR = 10


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
        verdict: name of what the readings say of the run's health; None: the last one that was told, if any.
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
    verdict: str | None = None


class Reporter:
    """Tells of a run; only rank 0 has one that speaks.

    Args:
        log: where to; by default this process' log.
        silent: say nothing.
    """

    def __init__(self, log: Log | None = None, *, silent: bool = False) -> None:
        self._log = log or own_log()
        self._silent = silent
        self._sinks: list[Sink] = []
        self._images = 0
        self._verdict: str | None = None

    def add_sinks(self, sinks: Iterable[Sink], *, images: int) -> None:
        """Have progress and events go to these as well, until `close`; so many images were trained before."""
        self._sinks += sinks
        self._images = images

    def progress(self, progress: Progress) -> None:
        """Show how far the run is."""
        if self._silent:
            return
        progress = replace(progress, verdict=progress.verdict or self._verdict)
        values = asdict(progress)
        if progress.verdict is None:
            del values["verdict"]
        values |= values.pop("readings")
        if self._log.human:
            self._log.show(_human(progress, self._log))
        else:
            self._log.json("progress", {name: _rounded(value) for name, value in values.items()})
        self._images = progress.images
        readings = numbers({name: values[name] for name in values if name not in ("step", "images")})
        for sink in self._sinks:
            sink.write(progress.step, progress.images, readings)

    def event(self, name: str, message: str, **fields: Any) -> None:
        """Tell that something happened; `message` is for people, `fields` for machines.

        The last `verdict` stands in every progress line from then on.
        """
        if self._silent:
            return
        level = ""
        if name == "verdict":
            self._verdict = str(fields["verdict"])
            level = "info" if self._verdict in _COLOUR_OF else "warning"
        self._log.tell(name, message, level=level, **fields)
        images = fields.get("images", self._images)
        for sink in self._sinks:
            sink.event(name, self._log.settings.redactor.text(message), images, numbers(fields))

    def close(self) -> None:
        """End the live line, and let the sinks write what they have."""
        self._log.close()
        for sink in self._sinks:
            sink.close()
        self._sinks = []


def _human(progress: Progress, log: Log) -> str:
    """Lay a line out that fits the terminal: what matters least is left out first, then the bar."""
    (_, head), *parts = _parts(progress, log)
    width = log.width - 1 if log.terminal else 10_000  # in the last column a terminal may break the line
    bar = log.terminal and progress.fraction is not None
    while True:
        rest = "  ".join(text for _, text in parts if text)
        room = width - disp_len(f"{head}   {rest}")
        if room >= (_SHORTEST_BAR if bar else 0) or len(parts) == 1:
            break
        parts.remove(max(parts, key=lambda part: part[0]))
    if not bar:
        return f"{head}  {rest}" if head else rest
    texts: dict[str, Any] = {"head": head, "rest": rest}
    shown: str = tqdm.format_meter(
        n=progress.fraction or 0.0,
        total=1,
        elapsed=0,
        ncols=width,
        ascii=not _has_blocks(log.stream),
        bar_format="{head} {bar}  {rest}",
        **texts,
    )
    return shown


def _parts(progress: Progress, log: Log) -> list[tuple[int, str]]:
    """Return what there is to say, in order, each with its rank among what can be done without."""
    known = progress.readings.get("ln_prototypes")
    against = f" (ln K {known:.3f})" if known is not None else ""
    told = [(8, SHOWN[name].format(value)) for name, value in progress.readings.items() if name in SHOWN]
    verdict = progress.verdict or ""
    return [
        (0, f"{100 * progress.fraction:3.0f}%" if progress.fraction is not None else ""),
        (2, f"{_clock(progress.seconds_left)} left" if progress.seconds_left is not None else ""),
        (1, f"loss {progress.loss:.3f}{against}"),
        (1, log.paint(verdict.replace("_", " "), _COLOUR_OF.get(verdict, "red")) if verdict else ""),
        (4, f"{progress.images_per_second:,.0f}/s"),
        (5, f"step {progress.step:,}"),
        *told,
        (6, f"data wait {100 * progress.data_wait_ratio:.0f}%"),
        (3, log.paint(f"{progress.quarantined} quarantined", "yellow") if progress.quarantined else ""),
        (9, f"rate {progress.rate:.2g}"),
        (7, f"{progress.images:,} images"),
    ]


def _has_blocks(stream: TextIO) -> bool:
    try:
        "█▏".encode(stream.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _rounded(value: Any) -> Any:
    """Five significant digits; JSON has no word for NaN."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.5g}") if math.isfinite(value) else str(value)
