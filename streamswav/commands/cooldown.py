"""`streamswav cooldown`: end a run of constant rate."""

from __future__ import annotations

import json
from typing import Any

import yaml

from streamswav.commands.pretrain import pretrain
from streamswav.commands.training_run import refuse_incomplete
from streamswav.config import Config, StreamSection, parse_config
from streamswav.defaults import run_samples
from streamswav.drain import Drain
from streamswav.errors import ConfigError
from streamswav.stream.position import Position
from streamswav.stream.store import Store
from streamswav.training.checkpoint import find_checkpoint


def cooldown(config: Config, drain: Drain, *, images: int | None) -> dict[str, Any]:
    """Go on with a run of constant rate for `images` more, over which the rate falls to its end.

    Args:
        config: the run's configuration.
        drain: whether to stop.
        images: default: a tenth of those seen.

    Raises:
        CheckpointError: there is nothing to go on from.
        StreamswavError: as `pretrain`.
    """
    refuse_incomplete(config)
    _, files = find_checkpoint(config.run.directory, Store(config.storage))
    position = Position.from_json(json.loads(files["position.json"]))
    saved = parse_config(yaml.safe_load(files["config.yaml"]))
    # A cool-down that was interrupted goes on to the end it had.
    if saved.optimizer.cooldown_images and saved.training.images:
        return pretrain(_with_end(config, saved.optimizer.cooldown_images, saved.training.images), drain)
    if position.with_passes(config.stream.passes_by_url).finished:
        reason = "the stream is at its end; a cool-down needs images: ask for one pass more"
        raise ConfigError("stream.passes", reason, value=config.stream.passes)
    length = images or position.seen.samples // 10
    whole = run_samples(saved.model_copy(update={"stream": _with_passes(saved, config)}), None)
    if whole:
        left = whole - position.seen.samples
        if images and images > left:
            reason = f"only {left} images are left in the stream: ask for fewer, or for another pass"
            raise ConfigError("--images", reason, value=images)
        length = min(length, left)
    return pretrain(_with_end(config, length, position.seen.samples + length), drain)


def _with_passes(saved: Config, config: Config) -> StreamSection:
    return saved.stream.model_copy(update={"passes": config.stream.passes})


def _with_end(config: Config, length: int, end: int) -> Config:
    values = config.model_dump()
    values["optimizer"] |= {"schedule": "constant", "cooldown_images": length}
    values["training"]["images"] = end
    return parse_config(values)
