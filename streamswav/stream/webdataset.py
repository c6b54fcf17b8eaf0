"""The stream as the first stage of a webdataset pipeline, whose own stages follow behind it.

    source = WebDatasetSource(open_stream(urls))
    pipeline = webdataset.DataPipeline(source, webdataset.decode("rgb"), webdataset.map(...))

Everything runs in this process. The position is that of the source, so it depends on the stages behind it:

* Stages that give a sample, or drop it, before they take the next one (decode, map, select, rename): the
  position is exact as it is.
* Stages that hold samples back (shuffle, and batched, which takes one more than it gives): `commits=True`.
  Samples then carry `__position__`, and the state covers those that were named by `source.commit(sample)`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from streamswav.errors import ConfigError, PositionError
from streamswav.stream.open import Ledger, Step, Stream
from streamswav.stream.samples import Sample, SampleId
from streamswav.stream.store import redact

POSITION_KEY = "__position__"

WebDatasetSample = dict[str, Any]


class WebDatasetSource:
    """Gives the stream's samples as webdataset's: `__key__`, `__url__`, and bytes by extension.

    Called again it goes on where the state is: after the last sample pulled, or, with commits, with all
    samples that were not committed.

    Args:
        stream: it belongs to the source from now on.
        commits: samples count only once they are committed.
    """

    def __init__(self, stream: Stream, *, commits: bool = False) -> None:
        self._stream, self._account = stream, _Account(stream) if commits else None

    def __call__(self) -> Iterator[WebDatasetSample]:
        """Iterate from the state on.

        Raises:
            PositionError: in a DataLoader's worker, of which each would read everything.
        """
        _refuse_worker()
        if self._account is None:
            return (self._describe(sample) for sample in self._stream)
        self.load_state_dict(self.state_dict())
        return ({**self._describe(sample), POSITION_KEY: number} for number, sample in self._account.pull())

    def survivors(self, samples: Iterable[WebDatasetSample]) -> Iterator[WebDatasetSample]:
        """A stage behind the last filter and before what holds samples back; useful with commits alone.

        What a filter dropped nobody commits. This stage sees what is missing, and counts it as done; without
        it the state stays right, but grows, and a resumed stream reads again from the first one dropped.
        """
        for sample in samples:
            if self._account is not None:
                self._account.arrived(_number(sample))
            yield sample

    def commit(self, *samples: Mapping[str, Any]) -> None:
        """Count samples as done, in any order; they, or what stages made of them, carry `__position__`.

        Raises:
            PositionError: one does not carry it.
            ConfigError: the source was made without commits.
        """
        if self._account is None:
            raise ConfigError("commits", "make the source with commits=True")
        for sample in samples:
            self._account.done(_number(sample))

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and with commits what is done beyond it: plain data, fit for JSON."""
        if self._account is None:
            return {"position": self._stream.state_dict(), "done": []}
        return self._account.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after what `state_dict` gave, on this source or another over the same shards.

        Raises:
            PositionError: it belongs to other shards, or is no such state.
        """
        if "position" not in state:
            raise PositionError(
                "this is not the state of a WebDatasetSource; give what its state_dict returned"
            )
        if state["done"] and self._account is None:
            raise PositionError("this state has commits; make the source with commits=True")
        self._stream.load_state_dict(state["position"])
        if self._account is not None:
            self._account.begin(done=state["done"])

    def _describe(self, sample: Sample) -> WebDatasetSample:
        url = redact(self._stream.manifest.shards[sample.id.shard].url)
        return {"__key__": sample.key, "__url__": url, **sample.members}


@dataclass(slots=True)
class _Pulled:
    """A step of the stream, without the bytes of its sample, and whether it counts."""

    step: Step
    done: bool


class _Account:
    """Which samples are done. The position ends at the first that is not; those beyond are named."""

    def __init__(self, stream: Stream) -> None:
        self._stream, self._next = stream, 0
        self.begin()

    def begin(self, done: Iterable[Iterable[int]] = ()) -> None:
        """Start at the stream's position, beyond which these samples (pass, shard, ordinal) are done."""
        self._ledger = Ledger(self._stream.position, self._stream.manifest)
        self._known = {SampleId(shard, turn, ordinal) for turn, shard, ordinal in done}
        self._pulled: dict[int, _Pulled] = {}
        # Numbers never come again: what belongs to an earlier state is not taken for something else.
        self._arrived = self._next

    def pull(self) -> Iterator[tuple[int, Sample]]:
        """Yield samples that are not done yet, with their numbers."""
        for step in self._stream.steps():
            number, sample = self._next, step.sample
            self._next += 1
            known = sample is None or sample.id in self._known
            if sample is not None:
                self._known.discard(sample.id)
            bare = None if sample is None else replace(sample, members={}, image=None)
            self._pulled[number] = _Pulled(Step(bare, step.passed), known)
            if sample is not None and not known:
                yield number, sample
            else:
                self._settle()

    def done(self, number: int) -> None:
        """A sample is done; one of an earlier state says nothing."""
        if number in self._pulled:
            self._pulled[number].done = True
            self._settle()

    def arrived(self, number: int) -> None:
        """A sample came through the filters; those before it that did not were dropped."""
        for dropped in range(self._arrived, number):
            self.done(dropped)
        self._arrived = max(self._arrived, number + 1)

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and what is done beyond it."""
        pulled = (each.step.sample.id for each in self._pulled.values() if each.done and each.step.sample)
        done = sorted([each.turn, each.shard, each.ordinal] for each in (*pulled, *self._known))
        return {"position": self._ledger.position.to_json(), "done": done}

    def _settle(self) -> None:
        """Move the position past everything that is done."""
        for number in list(self._leading()):
            self._ledger.take(self._pulled.pop(number).step)

    def _leading(self) -> Iterator[int]:
        for number, pulled in self._pulled.items():
            if not pulled.done:
                return
            yield number


def _number(sample: Mapping[str, Any]) -> int:
    try:
        number: int = sample[POSITION_KEY]
    except (KeyError, TypeError, IndexError):
        raise PositionError(
            f"a sample without {POSITION_KEY}: stages must keep it, and the source be made with commits=True"
        ) from None
    return number


def _refuse_worker() -> None:
    """Only torch makes workers that would all iterate; where it is not imported this is none of them."""
    data = sys.modules.get("torch.utils.data")
    if data is not None and data.get_worker_info() is not None:
        reason = "each would read everything; use num_workers=0, or one stream a process with part=(i, n)"
        raise PositionError(f"a WebDatasetSource cannot be used in the workers of a DataLoader: {reason}")
