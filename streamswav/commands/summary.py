"""What a run came to, in figures, beside its checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from streamswav.commands.run_folder import LEFT_FILE, Run
from streamswav.config import Config
from streamswav.stream.account import list_left
from streamswav.stream.outcomes import OUTCOMES
from streamswav.stream.position import Position
from streamswav.stream.store import join, redact
from streamswav.training.feed import Feed
from streamswav.training.feeding import build_reader
from streamswav.training.monitor import Monitor
from streamswav.training.saver import Saver
from streamswav.training.trainer import Trainer

SUMMARY_FILE = "summary.json"


def summarise(
    run: Run, trainer: Trainer, feed: Feed, monitor: Monitor, saver: Saver, *, more: Mapping[str, Any]
) -> dict[str, Any]:
    """Write what the run came to; of a run that was at its end before, what was written then stands.

    `more` is what the run's kind of training says of it.
    """
    config, position, passes = run.config, feed.position, feed.position.passes
    place = join(config.run.directory, SUMMARY_FILE)
    loss = monitor.loss_last
    left = sum(len(piece.named() or ()) for piece in position.carried) if position.finished else None
    counts = {outcome: position.total(outcome).samples for outcome in OUTCOMES}
    listed = feed.manifest.total(position.passes)
    missing = None if left is None or listed is None else listed - sum(counts.values()) - left
    if missing:
        run.reporter.event(
            "missing",
            f"{missing} samples of _stats.json were not in the shards ({len(position.damages)} damages)",
        )
    summary = {
        "images": position.trained,
        "steps": trainer.step,
        "images_per_second": round(monitor.images_per_second, 1),
        "seed": config.stream.seed,
        "loss_first": monitor.loss_first,
        "loss_last": loss if math.isfinite(loss) else None,
        **more,
        "stream": {
            "manifest": listed,
            **counts,
            "damages": len(position.damages),
            "left": left,
            "missing": missing,
            "passes": passes[0] if len({*passes}) == 1 else list(passes),
            "sources": _by_source(config, position),
        },
        "checkpoint": saver.last.url if saver.last else None,
        "shards_url": redact(config.stream.urls[0]),
    }
    if monitor.images_per_second == 0 and run.store.exists(place):
        before: dict[str, Any] = json.loads(run.store.read(place))
        if before["stream"]["left"] == left:
            return before
        summary |= {name: before[name] for name in ("images_per_second", "loss_first", "loss_last")}
    if position.finished:
        _list_left(run, feed)
    run.store.write(place, json.dumps(summary, indent=1).encode())
    return summary


def _list_left(run: Run, feed: Feed) -> None:
    """Name the samples that were left over, fewer than a batch, beside the checkpoints."""
    reader = build_reader(run.config, feed.manifest)
    left = list_left(feed.position.carried, reader.open)
    lines = "".join(json.dumps(each.to_json(feed.manifest)) + "\n" for each in left)
    run.store.write(join(run.config.run.directory, LEFT_FILE), lines.encode())


def _by_source(config: Config, position: Position) -> dict[str, dict[str, int]]:
    """Samples of each URL by outcome."""
    urls = enumerate(map(redact, config.stream.urls))
    return {
        url: {outcome: by_source[source].samples for outcome, by_source in position.tallies.items()}
        for source, url in urls
    }
