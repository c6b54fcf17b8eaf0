"""The sinks of a run: TensorBoard and Weights & Biases, for those who use them."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from functools import partial

from streamswav.commands.run_folder import Run
from streamswav.config import dump_config
from streamswav.errors import StreamswavError
from streamswav.stream.store import join
from streamswav.telemetry.logs import own_log
from streamswav.telemetry.secrecy import without_secrets
from streamswav.telemetry.sinks import BackgroundSink, Sink, TensorBoardSink, WandbSink, sink_folder

IDENTITY_FILE = "wandb.json"


def open_sinks(run: Run, *, images: int) -> None:
    """Have the run's reporter feed the sinks that are configured; of rank 0, others have nothing to say.

    Args:
        run: that has begun.
        images: trained before this process.
    """
    if not run.ranks.leads:
        return
    makers: dict[str, Callable[[], Sink]] = {
        "tensorboard": partial(_tensorboard, run, images=images),
        "wandb": partial(_wandb, run),
    }

    def warn(text: str) -> None:
        run.reporter.event("warning", text)

    sinks = [BackgroundSink(name, makers[name], warn) for name in run.config.telemetry.sinks]
    run.reporter.add_sinks(sinks, images=images)


def _tensorboard(run: Run, *, images: int) -> Sink:
    folder = sink_folder(run.config.telemetry, run.config.run.directory)
    assert folder is not None, "refuse_missing has seen to it"
    return TensorBoardSink(
        join(folder, "tensorboard"), dump_config(without_secrets(run.config)), images=images
    )


def _wandb(run: Run) -> Sink:
    section, directory = run.config.telemetry, run.config.run.directory
    return WandbSink(
        section.wandb_project,
        own_log().settings.run or "run",
        _identity(run),
        sink_folder(section, directory),
        without_secrets(run.config).model_dump(mode="json"),
    )


def _identity(run: Run) -> str:
    """Return the run's id at Weights & Biases: made once, and kept with the run, however often it starts."""
    place = join(run.config.run.directory, IDENTITY_FILE)
    try:
        if run.store.exists(place):
            identity: str = json.loads(run.store.read(place))["id"]
            return identity
        identity = uuid.uuid4().hex[:12]
        run.store.write(place, json.dumps({"id": identity}).encode())
    except StreamswavError as error:
        raise StreamswavError(f"{IDENTITY_FILE} cannot be kept: {error}") from None
    return identity
