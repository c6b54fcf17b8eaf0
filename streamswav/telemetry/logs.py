"""The lines of this process on standard error: JSON where a machine reads them, text on a terminal.

A process has one log, which `set_up_logs` makes: what Python's logging and warnings tell goes there as well,
and no line leaves it with a secret.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from types import TracebackType
from typing import Any, TextIO

from streamswav.config import Config
from streamswav.redact import Redactor

WARNINGS = frozenset({"warning", "launcher", "lost_shard", "skipped_steps", "put_off"})
"""Events that tell of something that is not as it should be."""

_USUAL_WIDTH = 100
_COLOURS = {"red": 31, "green": 32, "yellow": 33, "cyan": 36}


@dataclass(frozen=True)
class LogSettings:
    """What a process knows of its lines; loader processes are handed their rank's.

    Attributes:
        run: name of the run, the last part of `run.directory`; None where there is none.
        rank: number of the rank; None: the launcher.
        worker: number of the loader process; None: it is none.
        format: auto, json or human.
        colour: whether a terminal may be written to in colours.
        redactor: takes secrets out.
    """

    run: str | None = None
    rank: int | None = 0
    worker: int | None = None
    format: str = "auto"
    colour: bool = True
    redactor: Redactor = field(default_factory=Redactor, repr=False)


class Log:
    """Writes lines, each as a whole; on a terminal the last one may be live, which later ones replace.

    Attributes:
        settings: who speaks, and how.
    """

    def __init__(self, settings: LogSettings | None = None, stream: TextIO | None = None) -> None:
        self.settings = settings or LogSettings()
        self._stream = stream
        self._live = ""
        self._lock = threading.RLock()

    @property
    def stream(self) -> TextIO:
        """Where the lines go; standard error is looked up each time, since it may be replaced."""
        return self._stream or sys.stderr

    @property
    def terminal(self) -> bool:
        """Whether people look on."""
        return self.stream.isatty()

    @property
    def human(self) -> bool:
        """Whether lines are text."""
        return self.settings.format == "human" or (self.settings.format == "auto" and self.terminal)

    @property
    def width(self) -> int:
        """Columns of the terminal."""
        try:
            return os.get_terminal_size(self.stream.fileno()).columns or _USUAL_WIDTH
        except (OSError, ValueError):
            return _USUAL_WIDTH

    def describe(self, config: Config) -> None:
        """Take name and format from a configuration."""
        name = PurePosixPath(config.run.directory.rstrip("/")).name or None
        self.settings = replace(self.settings, run=name, format=config.telemetry.log_format)

    def tell(self, event: str, message: str, *, level: str = "", **fields: Any) -> None:
        """Tell that something happened; `message` is for people, `fields` for machines."""
        level = level or ("warning" if event in WARNINGS else "info")
        if self.human:
            self.text(self._for_people(event, message, level, fields))
        else:
            self.json(event, {"message": message, **fields}, level=level)

    def json(self, event: str, fields: Mapping[str, Any], *, level: str = "info") -> None:
        """Write one JSON line."""
        settings, now = self.settings, time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03}Z"
        worker = {} if settings.worker is None else {"worker": settings.worker}
        who = {"run": settings.run, "rank": settings.rank, **worker}
        told = {name: _plain(value) for name, value in fields.items()}
        line = {"time": stamp, "event": event, "level": level, **who, **told}
        self._write(json.dumps(settings.redactor.tree(line), default=str) + "\n")

    def text(self, text: str) -> None:
        """Write text, above the live line."""
        text = self.settings.redactor.text(text)
        with self._lock:
            # The line may be another process' live one: launcher and ranks have one terminal.
            clear = "\r\x1b[K" if self.terminal else ""
            self._write(f"{clear}{text}\n{self._live}")

    def show(self, line: str) -> None:
        """Replace the live line; anywhere but on a terminal it is a line as any."""
        if not self.terminal:
            self.text(line)
            return
        with self._lock:
            self._live = self.settings.redactor.text(line)
            self._write(f"\r\x1b[K{self._live}")

    def close(self) -> None:
        """End the live line; it stays where it is."""
        with self._lock:
            if self._live:
                self._write(f"\r\x1b[K{self._live}\n")
                self._live = ""

    def fail(self, message: str, exit_code: int) -> None:
        """Say with which error a command ends: the one line that is text everywhere.

        Where lines are JSON and belong to a run, that tells it as well.
        """
        self.close()
        if self.settings.run is not None and not self.human:
            self.tell("error", message, level="error", exit_code=exit_code)
        self.text(f"streamswav: {message}")

    def paint(self, text: str, colour: str) -> str:
        """Return the text in a colour, where there may be colours."""
        if not (self.terminal and self.settings.colour):
            return text
        return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m"

    def _for_people(self, event: str, message: str, level: str, fields: Mapping[str, object]) -> str:
        rank = self.settings.rank
        who = f"rank {rank}: " if rank else "streamswav: " if event == "launcher" else ""
        word = {"warning": "warning: ", "error": "error: "}.get(level, "") if event != "launcher" else ""
        more = "".join(f"\n{fields[name]}" for name in ("stacks", "traceback") if name in fields)
        return self.paint(word, "yellow" if level == "warning" else "red") * bool(word) + who + message + more

    def _write(self, text: str) -> None:
        with self._lock:
            stream = self.stream
            stream.write(text)
            stream.flush()


class LogHandler(logging.Handler):
    """Hands what Python's logging tells to a process' log."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self.log = log

    def emit(self, record: logging.LogRecord) -> None:
        """Tell a record as the event `warning`, or `error` from that level on."""
        try:
            serious = record.levelno >= logging.ERROR
            more = {"traceback": _format(*record.exc_info)} if record.exc_info else {}
            event = level = "error" if serious else "warning"
            self.log.tell(event, record.getMessage().strip(), level=level, logger=record.name, **more)
        except Exception:
            self.handleError(record)


def set_up_logs(settings: LogSettings) -> Log:
    """Make this process' log: what is logged and warned of anywhere goes there from now on."""
    root = logging.getLogger()
    for handler in [each for each in root.handlers if isinstance(each, LogHandler)]:
        root.removeHandler(handler)
    log = Log(settings)
    root.addHandler(LogHandler(log))
    logging.captureWarnings(True)
    return log


def own_log() -> Log:
    """Return this process' log; one that knows nothing of the process where none was set up."""
    found = [each.log for each in logging.getLogger().handlers if isinstance(each, LogHandler)]
    return found[0] if found else Log()


def tell_crashes() -> None:
    """Tell of exceptions that nobody caught as of anything else: in one line, without secrets."""

    def tell(
        kind: type[BaseException], error: BaseException | None, trace: TracebackType | None, where: str = ""
    ) -> None:
        if issubclass(kind, KeyboardInterrupt | SystemExit):
            return
        reason = f"{where}{kind.__name__}: {error}"
        own_log().tell("crash", reason, level="error", traceback=_format(kind, error, trace))

    def in_thread(args: threading.ExceptHookArgs) -> None:
        name = args.thread.name if args.thread else "a thread"
        tell(args.exc_type, args.exc_value, args.exc_traceback, where=f"{name}: ")

    sys.excepthook, threading.excepthook = tell, in_thread


def _plain(value: Any) -> Any:
    """JSON has no word for NaN."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _format(kind: Any, error: Any, trace: TracebackType | None) -> str:
    return "".join(traceback.format_exception(kind, error, trace)).rstrip()
