"""Parts on their way to their folder: encoded, summed and written while the next ones are computed."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from streamswav.transfer.extraction.part_folder import PartFolder, Record, summary
from streamswav.transfer.extraction.part_formats import Layout, encode_part
from streamswav.transfer.extraction.parts import Part

_THREADS = 2
_WAITING = 4


class PartWriter:
    """Writes parts in threads. As its context ends all are there; after an error, those that could be.

    Args:
        folder: where they go; None: nowhere.
        shards: keys of the shards.
        layout: of the files.
        multi: whether images have several labels.
    """

    def __init__(
        self, folder: PartFolder | None, shards: list[str], layout: Layout, *, multi: bool = False
    ) -> None:
        self._folder, self._shards, self._layout, self._multi = folder, shards, layout, multi
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="part-writer")
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        self._pool.shutdown(wait=True)
        while kind is None and self._waiting:
            self._waiting.popleft().result()

    def save(self, part: Part) -> None:
        """Write a part soon; waits where several are on their way.

        Raises:
            StorageError: an earlier one could not be written.
        """
        if self._folder is None:
            return
        while len(self._waiting) >= _WAITING or (self._waiting and self._waiting[0].done()):
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(self._write, self._folder, part))

    def _write(self, folder: PartFolder, part: Part) -> None:
        shard = self._shards[part.stretch.shard]
        files = encode_part(part, shard, self._layout, multi=self._multi)
        listed = {end: summary(data) for end, data in files.items()}
        folder.save(Record(part.stretch, shard, len(part.rows), part.account, listed), files)
