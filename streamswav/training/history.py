"""The history of a run's health: a JSON object a log line, in pieces that are written with the checkpoints.

    <run>/health/step-000001200.jsonl   the lines up to that step, from where the piece before ends

Object storage cannot append; and a run that goes on from a checkpoint has the history up to there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from streamswav.errors import NotFoundError
from streamswav.stream.listed import new_list
from streamswav.stream.store import Store, join

HISTORY_FOLDER = "health"
_PIECE = re.compile(r"/step-(\d+)(?:\.(\d+))?\.jsonl$")


def write_history(store: Store, directory: str, step: int, lines: Sequence[str]) -> None:
    """Write the next piece of a run's history, if there are any lines.

    Raises:
        StorageError: it could not be written.
    """
    if lines:
        store.write(new_list(store, directory, HISTORY_FOLDER, step), "".join(lines).encode())


def forget_history(store: Store, directory: str, step: int) -> None:
    """Remove what came after a step: it comes again.

    Raises:
        StorageError: the folder is out of reach.
    """
    for _, written, url in list(_pieces(store, directory)):
        if written > step:
            store.delete(url)


def read_history(store: Store, directory: str, *, most: int) -> list[dict[str, Any]]:
    """Return the last lines of a run's history, at most so many, oldest first; lines cut short are left out.

    Raises:
        StorageError: the folder is out of reach.
    """
    lines: list[dict[str, Any]] = []
    for _, _, url in sorted(_pieces(store, directory), reverse=True):
        lines = [*_parse(store.read(url)), *lines]
        if len(lines) >= most:
            break
    return lines[-most:]


def _pieces(store: Store, directory: str) -> Iterator[tuple[tuple[int, int], int, str]]:
    """Yield order, step and URL of every piece."""
    try:
        found = store.list(join(directory, HISTORY_FOLDER))
    except NotFoundError:
        return
    for info in found:
        if written := _PIECE.search(info.url):
            yield (int(written[1]), int(written[2] or 1)), int(written[1]), info.url


def _parse(data: bytes) -> Iterator[dict[str, Any]]:
    for line in data.splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue
