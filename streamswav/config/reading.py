"""From file, environment and command line to one configuration; what is wrong with them, in one line."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from streamswav.config.combinations import check_combinations
from streamswav.config.sections import REFUSAL, Config, keys
from streamswav.errors import ConfigError

ENVIRONMENT_PREFIX = "STREAMSWAV_"

_RENAMED = {"loader.memory": "stream.memory"}
_NO_ACCUMULATION = (
    "gradients are not accumulated: codes are those of the batch that is embedded together, so the gradients "
    "of small batches add up to another objective; micro_batches keeps the objective and saves the memory"
)


def load_config(
    file: Path | None = None,
    environment: Mapping[str, str] = types.MappingProxyType({}),
    arguments: Sequence[str] = (),
    *,
    base: Mapping[str, Mapping[str, Any]] = types.MappingProxyType({}),
) -> Config:
    """Merge file, environment and `--section.key value` arguments, later ones winning.

    Args:
        file: YAML.
        environment: of the process.
        arguments: of the command line.
        base: a command's own defaults, by section; like all defaults they are not in `model_fields_set`.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, an impossible combination.
    """
    merged = _read_yaml(file) if file else {}
    for key, text in _environment_items(environment):
        _assign(merged, key, _parse(key, text))
    for key, text in _argument_items(arguments):
        _assign(merged, key, _parse(key, text))
    if not base:
        return parse_config(merged)
    return _without_given(parse_config(_above(merged, base)), merged, base)


def _above(values: Mapping[str, Any], base: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Put values over defaults; what is no section is left for validation to refuse."""
    below = {name: dict(section) for name, section in base.items()}
    for name, section in values.items():
        below[name] = below.get(name, {}) | section if isinstance(section, dict) else section
    return below


def _without_given(
    config: Config, values: Mapping[str, Any], base: Mapping[str, Mapping[str, Any]]
) -> Config:
    """Return the configuration with only what was given beyond the base counted as set."""
    sections = {}
    for name, defaults in base.items():
        section = getattr(config, name)
        given = set(values.get(name, {}))
        kept = section.model_fields_set - (set(defaults) - given)
        sections[name] = type(section).model_construct(_fields_set=kept, **dict(section))
    return config.model_copy(update=sections)


def parse_config(values: Mapping[str, Any]) -> Config:
    """Validate a nested mapping.

    Raises:
        ConfigError: as `load_config`.
    """
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise _explain(error) from None
    check_combinations(config)
    return config


def dump_config(config: Config) -> str:
    """Return the configuration as YAML that `load_config` reads back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=110)


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text())
    except FileNotFoundError:
        raise ConfigError("--config", "there is no such file", value=str(file)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("--config", f"cannot be read ({error})", value=str(file)) from None
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())
        raise ConfigError("--config", f"is not YAML: {where}", value=str(file)) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            "--config", "must hold sections, as `stream:`, with keys below them", value=str(file)
        )
    # Values of the Helm chart: what is below its `config:` is the configuration.
    if "image" in values and isinstance(values.get("config"), dict):
        return dict(values["config"])
    return values


def _environment_items(environment: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    """Only names with a double underscore are keys; `STREAMSWAV_HOME` and the like are others' business."""
    for name, text in sorted(environment.items()):
        if name.startswith(ENVIRONMENT_PREFIX) and "__" in name:
            yield name.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", "."), text


def _argument_items(arguments: Sequence[str]) -> Iterable[tuple[str, str]]:
    rest = list(arguments)
    while rest:
        name = rest.pop(0)
        if not name.startswith("--") or "." not in name:
            raise ConfigError(name, "is not understood; keys are given as --section.key value")
        key, equals, text = name.removeprefix("--").partition("=")
        if not equals:
            if not rest:
                raise ConfigError(key, "has no value; keys are given as --section.key value")
            text = rest.pop(0)
        yield key.replace("-", "_"), text


def _parse(key: str, text: str) -> Any:
    """Read a value as YAML, so that lists, numbers and null can be written; any other text is itself.

    Where a text is wanted, what YAML takes for a number, a date or the like is text as well.
    """
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # the latter for a date that no calendar has
        return text
    return value if key not in _TEXT_KEYS or isinstance(value, str | list | None) else text


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(section, "is a section, not a value", value=inner)
        values = inner
    values[last] = value


def _explain(error: ValidationError) -> ConfigError:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"] if isinstance(part, str))
    if first["type"] == "extra_forbidden":
        if "accumul" in key:
            return ConfigError(key, _NO_ACCUMULATION, value=first["input"], nearest="training.micro_batches")
        return ConfigError(key, "there is no such key", value=first["input"], nearest=_nearest(key))
    if first["type"] == "model_type":
        return ConfigError(key, f"is a section; its keys stand below it, as {key}.KEY", value=first["input"])
    if first["type"] == REFUSAL:
        return ConfigError(**first["ctx"])
    return ConfigError(key, first["msg"].removeprefix("Value error, "), value=first["input"])


def _nearest(key: str) -> str | None:
    """The valid key that is closest: by the whole name first, then by the last part alone."""
    if key in _RENAMED:
        return _RENAMED[key]
    known = [*keys(), *Config.model_fields]
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if close:
        return close[0]
    last = key.rpartition(".")[2]
    by_last = {name.rpartition(".")[2]: name for name in known}
    close = difflib.get_close_matches(last, by_last, n=1, cutoff=0.6)
    return by_last[close[0]] if close else None


def _text_keys() -> frozenset[str]:
    found = set()
    for key in keys():
        section, name = key.split(".")
        model = typing.cast("type[BaseModel]", Config.model_fields[section].annotation)
        if model.model_fields[name].annotation in (str, str | None, list[str]):
            found.add(key)
    return frozenset(found)


_TEXT_KEYS = _text_keys()
