"""The configuration as it may be shown and kept."""

from __future__ import annotations

from typing import Any, cast

from streamswav.config import Config, Section
from streamswav.redact import Redactor, redact
from streamswav.telemetry.logs import own_log


def without_secrets(config: Config) -> Config:
    """Return the configuration as it may lie in the run's folder: no text in it tells a secret."""
    return cast("Config", _clean(config, own_log().settings.redactor))


def _clean(value: Any, redactor: Redactor) -> Any:
    """Clean what a section, list or text holds. Nothing is checked anew: what is hidden need not be valid."""
    if isinstance(value, Section):
        return value.model_copy(update={name: _clean(each, redactor) for name, each in value})
    if isinstance(value, list | tuple):
        return type(value)(_clean(each, redactor) for each in value)
    return redactor.text(redact(value)) if isinstance(value, str) else value
