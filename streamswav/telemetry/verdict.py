"""A verdict on a run, from the readings of its log lines: pure, with hysteresis.

    warming_up            too early to tell
    healthy               none of what follows
    queue_rebound         since the queue took part the loss is higher than before
    stuck                 the loss is ln K: all images get the same, even assignment
    diverging             the loss is above ln K, rises, or is not a number
    dimensional_collapse  embeddings or features fill few of their dimensions
    prototype_collapse    few prototypes are used, or many are one

A condition has to hold for a while before it is the verdict, and to be gone as long before it is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from streamswav.telemetry.remedies import Remedy, Settings, remedies_for

HEALTHY, WARMING_UP = "healthy", "warming_up"
BAD = ("queue_rebound", "stuck", "diverging", "dimensional_collapse", "prototype_collapse")
"""The worst, or what explains the others, first."""

VERDICTS = (HEALTHY, WARMING_UP, *BAD)


@dataclass(frozen=True)
class Thresholds:
    """When a reading is bad. Tuned on the trials of `ops/health.md`.

    Attributes:
        at_ln_k: the loss is ln K if it is closer.
        information: below it assignments tell nothing of the image (`assignment_information_ratio`).
        above_ln_k: a loss so far above ln K diverges.
        far_above_ln_k: so many times ln K does so even while warming up.
        lost_gain: share of ln K less the lowest loss that may be lost again.
        rebound: share of ln K less the loss before the queue by which the loss may rise with it.
        spread: of the embeddings, at least.
        embedding_rank: share of D that RankMe of the embeddings reaches at least.
        feature_rank: RankMe of the trunk's features, at least.
        usage: share of the prototypes that is used at least.
        unique: share of the prototypes that differ at least.
        warmup_steps: steps from the end of the frozen prototypes until a verdict.
        hold_logs: log lines in a row that a condition has to hold, or to be gone.
        hold_steps: and so many steps.
    """

    at_ln_k: float = 0.02
    information: float = 0.01
    above_ln_k: float = 0.1
    far_above_ln_k: float = 1.3
    lost_gain: float = 0.5
    rebound: float = 0.25
    spread: float = 0.1
    embedding_rank: float = 0.05
    feature_rank: float = 2.0
    usage: float = 0.1
    unique: float = 0.5
    warmup_steps: int = 200
    hold_logs: int = 3
    hold_steps: int = 30


@dataclass(frozen=True)
class Moment:
    """What a log line tells.

    Attributes:
        step: optimizer steps done.
        images: images trained.
        loss: mean since the last line; NaN where no step counted.
        readings: of the task, by name.
    """

    step: int
    images: int
    loss: float
    readings: Mapping[str, float]

    def get(self, name: str) -> float:
        """Return a reading; NaN, which no comparison holds for, where it is not there."""
        return self.readings.get(name, math.nan)


@dataclass(frozen=True)
class Verdict:
    """What holds, since when, why, and what helps.

    Attributes:
        name: one of `VERDICTS`.
        sentence: why, with figures and thresholds.
        remedies: known to work, in the order in which to try them.
        step: since when.
        images: since when.
    """

    name: str
    sentence: str
    remedies: tuple[Remedy, ...] = ()
    step: int = 0
    images: int = 0

    @property
    def bad(self) -> bool:
        """Whether something is to be done."""
        return self.name in BAD

    @property
    def why_to_stop(self) -> str:
        """One line: what is wrong, since when, and what to try."""
        tried = "; or ".join(map(str, self.remedies))
        return (
            f"{self.name} since step {self.step}: {self.sentence}; saved, and ended by health.stop. "
            f"Try {tried}"
        )


@dataclass
class _Memory:
    """What a judge knows of the lines before: plain, so that it lies in checkpoints."""

    name: str = WARMING_UP
    step: int = 0
    images: int = 0
    candidate: str = WARMING_UP
    candidate_step: int = 0
    candidate_images: int = 0
    candidate_logs: int = 0
    frozen_step: int = 0
    frozen: bool = False
    loss: float | None = None
    lowest: float | None = None
    before_queue: float | None = None
    queue_step: int | None = None
    readings: dict[str, float] = field(default_factory=dict)


@dataclass
class Judge:
    """Hears every log line and says what holds.

    Attributes:
        settings: what the run is configured with, for the remedies.
        thresholds: when a reading is bad.
        warmup_images: images from which on there is a verdict; None: by `warmup_steps`.
    """

    settings: Settings
    thresholds: Thresholds = field(default_factory=Thresholds)
    warmup_images: int | None = None
    _memory: _Memory = field(default_factory=_Memory)

    @property
    def name(self) -> str:
        """The verdict's name, as of the last line."""
        return self._memory.name

    def hear(self, moment: Moment) -> Verdict:
        """Take a log line and return the verdict that holds after it."""
        memory = self._memory
        moment = self._remember(moment)
        found = dict(self._conditions(moment))
        first = next(iter(found), HEALTHY)
        if self._warming_up(moment):
            first = "diverging" if "diverging" in found else WARMING_UP
        elif memory.name in found:  # what holds, and is still there, gives way only to what is worse
            first = min(first, memory.name, key=BAD.index)
        self._weigh(first, moment)
        bad = memory.name in BAD
        sentence = found.get(memory.name) or _describe(moment) + ("; better, but not for long" if bad else "")
        remedies = remedies_for(memory.name, self.settings, moment.readings) if bad else ()
        return Verdict(memory.name, sentence, remedies, memory.step, memory.images)

    def state(self) -> dict[str, Any]:
        """Return plain data from which `restore` goes on."""
        return asdict(self._memory)

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Go on from a state; None, or what a later version wrote, as if the run had just begun."""
        known = {name: value for name, value in (state or {}).items() if hasattr(self._memory, name)}
        self._memory = replace(_Memory(), **known)

    def _weigh(self, name: str, moment: Moment) -> None:
        """Make a condition the verdict once it, or one as bad, has held for long enough."""
        memory, bounds = self._memory, self.thresholds
        if name == memory.name:
            memory.candidate_logs = 0
            return
        if not memory.candidate_logs or (name in BAD) != (memory.candidate in BAD):
            memory.candidate_logs = 0
            memory.candidate_step, memory.candidate_images = moment.step, moment.images
        memory.candidate = name
        memory.candidate_logs += 1
        held = moment.step - memory.candidate_step
        long = memory.candidate_logs >= bounds.hold_logs and held >= bounds.hold_steps
        if long or {name, memory.name} == {HEALTHY, WARMING_UP}:
            memory.name, memory.candidate_logs = name, 0
            memory.step, memory.images = memory.candidate_step, memory.candidate_images

    def _remember(self, moment: Moment) -> Moment:
        """Take note of a line, and return it with the last of those readings that it does not have."""
        memory = self._memory
        memory.frozen = bool(moment.readings.get("prototypes_frozen"))
        if memory.frozen:
            memory.frozen_step = moment.step
        if memory.queue_step is None and "queue_staleness_ratio" in moment.readings:
            memory.queue_step, memory.before_queue = moment.step, memory.loss
        memory.readings |= {name: moment.readings[name] for name in _KEPT if name in moment.readings}
        moment = replace(moment, readings={**memory.readings, **moment.readings})
        if math.isfinite(moment.loss):
            before = moment.loss if memory.loss is None else memory.loss
            memory.loss = before + _NEWEST * (moment.loss - before)
            if not self._warming_up(moment):
                memory.lowest = min(memory.loss, math.inf if memory.lowest is None else memory.lowest)
        return moment

    def _warming_up(self, moment: Moment) -> bool:
        if self.warmup_images is not None:
            return moment.images < self.warmup_images
        # Frozen prototypes hold the loss up; afterwards it is given as long again.
        memory = self._memory
        return memory.frozen or moment.step < 2 * memory.frozen_step + self.thresholds.warmup_steps

    def _conditions(self, moment: Moment) -> Iterator[tuple[str, str]]:
        """Yield what is wrong in a line, and why."""
        tests: tuple[tuple[str, Callable[[Moment], str]], ...] = (
            ("queue_rebound", self._rebounds),
            ("stuck", self._is_stuck),
            ("diverging", self._diverges),
            ("dimensional_collapse", self._is_flat),
            ("prototype_collapse", self._is_few),
        )
        for name, test in tests:
            if sentence := test(moment):
                yield name, sentence

    def _diverges(self, moment: Moment) -> str:
        bounds, loss, ln_k = self.thresholds, moment.loss, moment.get("ln_prototypes")
        if not math.isfinite(loss):
            return "no step since the last line had a loss and a gradient that are finite"
        if self._warming_up(moment):
            if loss > bounds.far_above_ln_k * ln_k:
                return f"loss {loss:.3f} is more than {bounds.far_above_ln_k:g} times ln K = {ln_k:.3f}"
            return ""
        if loss > ln_k + bounds.above_ln_k:
            return f"loss {loss:.3f} is more than {bounds.above_ln_k:g} above ln K = {ln_k:.3f}"
        lowest = self._memory.lowest
        if lowest is not None and self._memory.queue_step is None:
            gain = ln_k - lowest
            if gain > bounds.above_ln_k and loss > lowest + bounds.lost_gain * gain:
                return (
                    f"loss {loss:.3f} has lost more than {bounds.lost_gain:.0%} of what it had gained: it "
                    f"was {lowest:.3f}, ln K is {ln_k:.3f}"
                )
        return ""

    def _rebounds(self, moment: Moment) -> str:
        bounds, memory, ln_k = self.thresholds, self._memory, moment.get("ln_prototypes")
        if memory.before_queue is None:
            return ""
        gain = max(ln_k - memory.before_queue, bounds.above_ln_k)
        if moment.loss > memory.before_queue + bounds.rebound * gain:
            return (
                f"loss {moment.loss:.3f}, and {memory.before_queue:.3f} before the queue took part at step "
                f"{memory.queue_step}: more than {bounds.rebound:.0%} of what was gained below "
                f"ln K = {ln_k:.3f} is lost (staleness {moment.get('queue_staleness_ratio'):.2f})"
            )
        return ""

    def _is_stuck(self, moment: Moment) -> str:
        bounds, loss, ln_k = self.thresholds, moment.loss, moment.get("ln_prototypes")
        told = moment.get("assignment_information_ratio")
        at = abs(loss - ln_k) < bounds.at_ln_k
        if at or (told < bounds.information and abs(loss - ln_k) < bounds.above_ln_k):
            return (
                f"loss {loss:.3f} is at ln K = {ln_k:.3f}, assignments tell {told:.2%} of what they could "
                f"(at least {bounds.information:.0%}), spread {moment.get('embedding_std_ratio'):.2f}"
            )
        return ""

    def _is_flat(self, moment: Moment) -> str:
        bounds, dim = self.thresholds, self.settings.embedding
        spread, rank, trunk = map(moment.get, ("embedding_std_ratio", "embedding_rankme", "rankme"))
        if spread < bounds.spread:
            return f"spread of the embeddings {spread:.3f} (at least {bounds.spread:g}; 1 is healthy)"
        if rank < bounds.embedding_rank * dim:
            least = bounds.embedding_rank * dim
            return f"RankMe of the embeddings {rank:.1f} of {dim} dimensions (at least {least:.1f})"
        if trunk < bounds.feature_rank:
            return f"RankMe of the trunk's features {trunk:.1f} (at least {bounds.feature_rank:g})"
        return ""

    def _is_few(self, moment: Moment) -> str:
        bounds = self.thresholds
        used, unique = moment.get("prototype_usage_ratio"), moment.get("prototypes_unique_ratio")
        if used < bounds.usage:
            return f"{used:.1%} of the prototypes are some image's best (at least {bounds.usage:.0%})"
        if unique < bounds.unique:
            return f"{unique:.1%} of the prototypes differ from one another (at least {bounds.unique:.0%})"
        return ""


def _describe(moment: Moment) -> str:
    shown = [f"loss {moment.loss:.3f} (ln K {moment.get('ln_prototypes'):.3f})"]
    shown += [text.format(moment.readings[name]) for name, text in _SHOWN.items() if name in moment.readings]
    return ", ".join(shown)


_SHOWN = {
    "embedding_std_ratio": "spread {:.2f}",
    "embedding_rankme": "RankMe {:.1f}",
    "prototype_usage_ratio": "{:.0%} of the prototypes used",
}
_KEPT = ("embedding_rankme", "rankme", "embedding_std_ratio", "assignment_information_ratio")
_NEWEST = 0.3  # weight of a line in the smoothed loss
