"""Reading results: the JSON of `Results.to_json`, also that of older versions."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from streamswav.errors import ConfigError
from streamswav.stream.store import Store, redact
from streamswav.transfer.measuring.intervals import wilson
from streamswav.transfer.measuring.results import FORMAT_VERSION, Results, Value

_SHAPE = TypeAdapter(Results)
_COUNTED = ("top1", "top5")


def read_results(url: str, store: Store) -> Results:
    """Read what a measurement wrote.

    Files of format 1, which had no intervals, get Wilson's from the number of their test images.

    Args:
        url: a file, local or in object storage.
        store: how it is reached.

    Raises:
        ConfigError: it is not such a file, or a newer version's.
        StorageError: it cannot be read.
    """
    try:
        read = json.loads(store.read(url))
    except (ValueError, RecursionError):
        raise ConfigError(redact(url), "is not JSON") from None
    version = read.get("format_version") if isinstance(read, dict) else None
    if not isinstance(version, int) or version < 1 or "values" not in read:
        reason = "is no results file: those are what --json of knn, linear, svm, evaluate and others writes"
        raise ConfigError(redact(url), reason)
    if version > FORMAT_VERSION:
        reason = f"has format {version}, and this version reads up to {FORMAT_VERSION}; use a newer one"
        raise ConfigError(redact(url), reason)
    results = _parse(url, read)
    return _with_intervals(results) if version == 1 else results


def _parse(url: str, read: dict[str, Any]) -> Results:
    try:
        results = _SHAPE.validate_python(read)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(redact(url), f"is damaged: {place}: {first['msg']}") from None
    return results if "program" in read else replace(results, program="")


def _with_intervals(results: Results) -> Results:
    images = results.data["test"].images if "test" in results.data else 0

    def complete(value: Value) -> Value:
        shares = {metric: share for metric, share in value.scores.items() if metric in _COUNTED}
        return replace(value, intervals={name: wilson(share, images) for name, share in shares.items()})

    return replace(results, values=[complete(each) for each in results.values])
