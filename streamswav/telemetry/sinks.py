"""Other places that a run's readings go to: TensorBoard's files, Weights & Biases.

They are a convenience: each has a thread of its own, so that none can slow the training or stop it. One that
fails is told of once and left out. Rank 0 alone has them.
"""

from __future__ import annotations

import importlib.util
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from streamswav.config import TelemetrySection
from streamswav.errors import ConfigError

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}
"""What each needs, which is also the name of the extra that installs it."""

_WAITING = 1000
_CLOSE_SECONDS = 20.0
_LOGIN_SECONDS = 1.0


class Sink(Protocol):
    """Where readings go. The axis is images, which neither batch nor number of ranks stretches."""

    def write(self, step: int, images: int, readings: Mapping[str, float]) -> None:
        """Take the readings of one log interval, by name."""

    def event(self, name: str, message: str, images: int, readings: Mapping[str, float]) -> None:
        """Take what happened, and the numbers that belong to it."""

    def close(self) -> None:
        """Write what is not written yet."""


class TensorBoardSink:
    """Event files as TensorBoard reads them.

    Args:
        folder: of this machine.
        config: the configuration as YAML, without secrets.
        images: trained before; what an earlier process wrote beyond, a crash has undone.
    """

    def __init__(self, folder: str, config: str, *, images: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415

        self._writer: Any = SummaryWriter(folder, purge_step=images + 1)
        self._writer.add_text("config", "\n".join("    " + line for line in config.splitlines()), images)

    def write(self, step: int, images: int, readings: Mapping[str, float]) -> None:
        """Write a scalar for each."""
        for name, value in {"step": step, **readings}.items():
            self._writer.add_scalar(name, value, images)
        self._writer.flush()

    def event(self, name: str, message: str, images: int, readings: Mapping[str, float]) -> None:
        """Write the message as text, and a scalar for each number."""
        self._writer.add_text(f"event/{name}", message, images)
        for each, value in readings.items():
            self._writer.add_scalar(f"{name}/{each}", value, images)

    def close(self) -> None:
        """Write what is not written yet."""
        self._writer.close()


class WandbSink:
    """A run of Weights & Biases; key, entity and mode are its own environment variables.

    Args:
        project: where the run is.
        name: of the run.
        identity: of the run there; the same one goes on after a restart.
        folder: of this machine, for what is not sent yet; None: its own choice.
        config: the configuration, without secrets.
    """

    def __init__(
        self, project: str, name: str, identity: str, folder: str | None, config: Mapping[str, Any]
    ) -> None:
        import wandb  # noqa: PLC0415

        # It must not ask for a key on a terminal, nor write to it.
        wandb.setup(wandb.Settings(silent=True, login_timeout=_LOGIN_SECONDS))
        # What it would find out by itself has command lines, and with them signed URLs.
        settings = wandb.Settings(
            silent=True,
            console="off",
            x_disable_meta=True,
            x_save_requirements=False,
            disable_git=True,
            disable_code=True,
            save_code=False,
        )
        self._run: Any = wandb.init(
            project=project,
            name=name,
            id=identity,
            resume="allow",
            dir=folder,
            config=dict(config),
            settings=settings,
        )
        self._run.define_metric("images")
        self._run.define_metric("*", step_metric="images")

    def write(self, step: int, images: int, readings: Mapping[str, float]) -> None:
        """Log one row."""
        self._run.log({"images": images, "step": step, **readings})

    def event(self, name: str, message: str, images: int, readings: Mapping[str, float]) -> None:
        """Keep the last message of each kind in the summary, and log a row of the numbers."""
        self._run.summary[f"event/{name}"] = message
        if readings:
            self._run.log({"images": images, **{f"{name}/{each}": value for each, value in readings.items()}})

    def close(self) -> None:
        """Send what is not sent yet."""
        self._run.finish()


class BackgroundSink:
    """Opens and feeds a sink in a thread, and leaves it out once it has failed.

    Args:
        name: of the sink.
        make: opens it.
        warn: told why it is left out.
    """

    def __init__(self, name: str, make: Callable[[], Sink], warn: Callable[[str], None]) -> None:
        self._name, self._make, self._warn = name, make, warn
        self._waiting: queue.Queue[Callable[[Sink], None]] = queue.Queue(_WAITING)
        self._failed = self._behind = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"sink {name}", daemon=True)
        self._thread.start()

    def write(self, step: int, images: int, readings: Mapping[str, float]) -> None:
        """As `Sink.write`, soon."""
        self._put(lambda sink: sink.write(step, images, readings))

    def event(self, name: str, message: str, images: int, readings: Mapping[str, float]) -> None:
        """As `Sink.event`, soon."""
        self._put(lambda sink: sink.event(name, message, images, readings))

    def close(self, seconds: float = _CLOSE_SECONDS) -> None:
        """Wait until all is written, but no longer than so many seconds."""
        self._closing.set()
        self._put(lambda _: None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._leave_out(f"it is not done {seconds:g} s after the end")

    def _put(self, work: Callable[[Sink], None]) -> None:
        if self._failed:
            return
        try:
            self._waiting.put_nowait(work)
        except queue.Full:
            if not self._behind:
                self._behind = True
                self._warn(f"{self._name} falls behind: some readings do not get there")

    def _work(self) -> None:
        try:
            sink = self._make()
            while not (self._closing.is_set() and self._waiting.empty()):
                self._waiting.get()(sink)
            sink.close()
        except BaseException as error:  # whatever it is, the training goes on
            self._leave_out(" ".join(str(error).split()) or type(error).__name__)

    def _leave_out(self, reason: str) -> None:
        if not self._failed:
            self._failed = True
            self._warn(f"{self._name} is left out from here on: {reason}")


def refuse_missing(section: TelemetrySection, directory: str) -> None:
    """Refuse sinks that cannot work here, before anything is started.

    Raises:
        ConfigError: a package is not installed, or there is no folder for TensorBoard's files.
    """
    for name in section.sinks:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            reason = f"the package is not installed: pip install 'streamswav[{name}]'"
            raise ConfigError("telemetry.sinks", reason, value=name)
    folder = section.sink_folder
    if "://" in folder.removeprefix("file://"):
        raise ConfigError("telemetry.sink_folder", "must be a folder of this machine", value=folder)
    if "tensorboard" in section.sinks and not sink_folder(section, directory):
        reason = "TensorBoard's files need a folder of this machine, where run.directory is none"
        raise ConfigError("telemetry.sink_folder", reason)


def sink_folder(section: TelemetrySection, directory: str) -> str | None:
    """Return the folder for what sinks keep: the one that is given, else the run's if that is a local one."""
    folder = (section.sink_folder or directory).removeprefix("file://")
    return None if "://" in folder else folder


def numbers(fields: Mapping[str, Any]) -> dict[str, float]:
    """Return what of some fields is a number."""
    return {
        name: value
        for name, value in fields.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
