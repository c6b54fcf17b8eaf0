"""Finetuning in miniature: labelled shards whose classes can be learnt, and the command's arguments."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from runs import EMPTY, TINY, arguments

CLASSES = 4
BATCH = 16
_COLOURS = np.array([[190, 60, 60], [60, 190, 60], [60, 60, 190], [190, 190, 60]])
_KEYS = ("run.", "stream.", "loader.", "training.", "telemetry.", "model.trunk", "model.width", "model.stem")
TINY_FINETUNE = {
    **{key: text for key, text in TINY.items() if key.startswith(_KEYS)},
    "crops.sizes": "[16]",
    "crops.scales": "[[0.3, 1.0]]",
    "labels.classes": str(CLASSES),
    "optimizer.rate": "0.05",
    "training.batch": str(BATCH),
}


def coloured(number: int) -> bytes:
    """A small picture whose class, `number` modulo `CLASSES`, is its colour under noise."""
    noise = np.random.default_rng(number).normal(0, 30, (18, 20, 3))
    data = io.BytesIO()
    pixels = np.clip(_COLOURS[number % CLASSES] + noise, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def make_sets(make_shards: Callable[..., list[Path]], folder: Path, *, counted: bool = True) -> None:
    """Write `train` (4 shards, 70 images) and `test` (1 shard, 24 images)."""
    counts = [20, 17, 13, 20]
    paths = make_shards(folder / "train", counts=counts, image=coloured, kind="PNG", classes=CLASSES)
    make_shards(folder / "test", counts=[24], image=lambda i: coloured(1000 + i), kind="PNG", classes=CLASSES)
    if counted:
        by_name = {path.name: {"samples": count} for path, count in zip(paths, counts, strict=True)}
        (folder / "train" / "_stats.json").write_text(json.dumps({"shards": by_name}))


def finetune(data: str, *, keys: Mapping[str, Any] = EMPTY, **sections: Mapping[str, Any]) -> list[str]:
    """`streamswav finetune` on the sets below `data`; `keys` are dotted."""
    given = {
        "stream.urls": f"{data}/train/",
        "finetune.test": f"{data}/test/",
        "stream.passes": 3,
        **{f"{name}.{key}": value for name, values in sections.items() for key, value in values.items()},
        **keys,
    }
    merged = {**TINY_FINETUNE, **{key: str(value) for key, value in given.items()}}
    return ["finetune", *arguments(tiny=merged)[1:]]


def top1(run: Path) -> float:
    """What the run came to, as it says itself."""
    results = json.loads((run / "results.json").read_text())
    share: float = results["values"][0]["scores"]["top1"]
    return share
