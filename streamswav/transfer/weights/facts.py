"""What an export of this package says of its weights, which tensors alone do not tell.

Strides are not seen in shapes, nor how images were normalised. safetensors files carry it; beside the others
lies `export.json`, or a JSON file of the same name, which lists the files it is about.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from streamswav.config import Config, parse_config
from streamswav.errors import ConfigError, StorageError
from streamswav.stream.store import Store, join

_FOLDERS = "export.json"
_PLANES = 64
_STEMS = ("small", "strided")
_MOST_DIGITS = 18

Facts = dict[str, str]
"""Texts under the keys of a safetensors file: width, stem, mean, std, size, images; any may be missing."""


def read_facts(url: str, about: Facts, store: Store) -> Facts:
    """Return what an export says of the file at `url`, in it (`about`) or beside it; else nothing."""
    if "streamswav" in about:
        return about
    folder, _, name = url.partition("?")[0].rpartition("/")
    for beside in (_FOLDERS, f"{posixpath.splitext(name)[0].removesuffix('.pth')}.json"):
        # Where nothing may be listed, S3 denies what is not there.
        with suppress(StorageError, ValueError, KeyError, TypeError, AttributeError):
            facts = json.loads(store.read(join(folder, beside) if folder else beside))
            if name in facts["files"]:
                return _flatten(facts)
    return {}


def configure(model: Mapping[str, Any], prototypes: int | None, facts: Facts) -> Config:
    """Return a configuration for weights that came without one: the model, the images, and defaults.

    Args:
        model: keys of the section `model`.
        prototypes: K, where it is known.
        facts: of an export; what is not understood there is left alone.
    """
    values: dict[str, Any] = {"model": dict(model), "swav": {"prototypes": prototypes} if prototypes else {}}
    if model["stem"] in _STEMS and facts.get("stem") in _STEMS:
        values["model"]["stem"] = facts["stem"]
    with suppress(ValueError, KeyError, OverflowError):
        width = float(facts["width"])  # of several that come to as many channels
        if round(_PLANES * width) == round(_PLANES * model["width"]):
            values["model"]["width"] = width
    with suppress(ValueError, KeyError, ConfigError):
        crops = {name: [float(number) for number in facts[name].split()] for name in ("mean", "std")}
        size = {"sizes": [int(facts["size"])], "counts": [2], "scales": [[0.14, 1.0]]}
        return parse_config(values | {"crops": crops | size})
    return parse_config(values)


def images_seen(facts: Facts) -> int | None:
    """Return the images that the weights were trained on; None where nobody says."""
    text = facts.get("images", "")
    return int(text) if text.isdecimal() and len(text) <= _MOST_DIGITS else None


def _flatten(facts: Mapping[str, Any]) -> Facts:
    """Bring the JSON of an export to the form that safetensors have."""
    images, seen = facts["normalisation"], facts["source"]["images"]
    return {
        "streamswav": str(facts["streamswav"]),
        "width": str(facts["model"]["width"]),
        "stem": str(facts["model"]["stem"]),
        "mean": " ".join(map(str, images["mean"])),
        "std": " ".join(map(str, images["std"])),
        "size": str(images["crop"]),
        **({} if seen is None else {"images": str(seen)}),
    }
