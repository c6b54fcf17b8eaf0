"""The check that measures: what the loader gives here, against what the GPUs take."""

from __future__ import annotations

from streamswav.commands.stream import Report, measure
from streamswav.config import Config
from streamswav.defaults import known
from streamswav.doctor.case import Case
from streamswav.doctor.finding import Finding, NotLookedAtError, failed, passed, warned
from streamswav.doctor.running import Check
from streamswav.drain import Drain
from streamswav.errors import StreamswavError

PATIENCE_SECONDS = 60.0


def check_rate(case: Case) -> Finding:
    """Read and crop for a while with the loader processes of one rank."""
    if case.seconds <= 0:
        raise NotLookedAtError("nothing is measured (--seconds 0)")
    case.after("settings")
    manifest, config = case.shards, _of_one_rank(case)
    report, failure = measure(
        config, Drain(), manifest=manifest, seconds=case.seconds, patience=PATIENCE_SECONDS
    )
    if failure:
        raise failure
    if not report.samples:
        remedy = "look closer: streamswav stream URL --seconds 60"
        return failed(f"no batch came within {PATIENCE_SECONDS:g} s", remedy, waits=True)
    whole = (report.first_batch_seconds or 0.0) + report.seconds
    rate = report.samples_per_second or report.samples / whole
    workers = known(config.loader.workers)
    text = f"{rate:,.0f} images/s with {workers} loader processes, for one rank"
    wanted = _wanted(case)
    if wanted is None:
        return passed(f"{text}{_duration(case, report, rate)}")
    text = f"{text}; a {case.gpu.name if case.gpu else 'GPU'} takes {wanted:,.0f}"
    text += _duration(case, report, min(rate, wanted))
    if rate < wanted:
        return warned(text, f"the GPUs will wait; {report.limit}")
    return passed(text)


def _of_one_rank(case: Case) -> Config:
    """The configuration of a single rank that reads what one of the run's does."""
    config = case.resolved
    sections = {
        "training": {"batch": known(config.training.batch) // case.world_size},
        "stream": {"columns": None},
    }
    copies = {name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    return config.model_copy(update={**copies, "storage": case.store.section})


def _wanted(case: Case) -> float | None:
    """Images a second that planning expects of one GPU; None where no type is known, or not for this."""
    try:
        return case.plan.speed.images_per_second if case.gpu else None
    except NotLookedAtError:
        return None


def _duration(case: Case, report: Report, rate: float) -> str:
    """Say how long the run takes at this rate of every rank; samples by their size where nobody counted."""
    config, passes = case.config, case.config.stream.passes_by_url
    total = case.shards.total(passes)
    if total is None:
        total = round(case.shards.total_bytes(passes) / (report.sample_bytes / report.samples))
    images = min(total, config.training.images or total)
    hours = images / (rate * case.world_size) / 3600
    return f"; {images:,} images take {_hours(hours)} at that rate"


def _hours(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{60 * hours:.1f} min" if 60 * hours >= 1 else "less than a minute"


CHECKS = (
    Check(
        "rate",
        check_rate,
        seconds=PATIENCE_SECONDS + 30,
        remedies={StreamswavError: "look closer: streamswav stream URL --seconds 60"},
    ),
)
