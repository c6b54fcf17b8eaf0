"""Checks of what was given: the configuration, what it leaves open, and the versions installed."""

from __future__ import annotations

import importlib.metadata
import platform
import re

from streamswav import __version__
from streamswav.commands.training_run import refuse_incomplete
from streamswav.config import Config
from streamswav.defaults import known
from streamswav.doctor.case import TRAINING, Case, config_of
from streamswav.doctor.finding import Finding, failed, passed, warned
from streamswav.doctor.running import PLANNING_SECONDS, Check
from streamswav.errors import CheckpointError, ConfigError
from streamswav.stream.store import redact
from streamswav.training.feeding import build_reader
from streamswav.training.restore import describe_model, refuse_other_model

_SHOWN = ("torch", "torchvision", "numpy", "s3fs", "aiobotocore")


def check_configuration(case: Case) -> Finding:
    """Read as the command reads it, complete for a run that is written, with the ranks' whereabouts."""
    try:
        config = config_of(case)
    except ConfigError as error:
        if not error.key.startswith("--"):
            raise
        return failed(str(error), "correct the argument: `streamswav doctor --help`")
    if case.command in TRAINING:
        refuse_incomplete(config)
    given = sum(len(getattr(config, name).model_fields_set) for name in Config.model_fields)
    ranks = f"nodes {case.options.nodes}, ranks on each {case.ranks_here}"
    return passed(f"{case.command}: {ranks}, {given} keys are given{_places(config)}")


def _places(config: Config) -> str:
    where = [redact(config.stream.urls[0])] if config.stream.urls else []
    where += [redact(config.run.directory)] if config.run.directory else []
    return f"; {' -> '.join(where)}" if where else ""


def check_settings(case: Case) -> Finding:
    """Choose what was left open as the run will, and hold it against these ranks and these shards."""
    manifest, config = case.shards, case.resolved
    if case.trains and case.begun is not None and case.newest is not None:
        refuse_other_model(case.newest[0], describe_model(config))
    batch, workers = known(config.training.batch), known(config.loader.workers)
    lanes = max(1, known(config.stream.rows) // max(1, workers))
    build_reader(config, manifest, lanes=lanes * max(1, known(config.stream.columns) // case.world_size))
    if manifest.samples is not None and manifest.samples < batch and not config.stream.follow:
        return failed(
            f"{manifest.samples} samples are fewer than one global batch (training.batch = {batch})",
            "lower training.batch or add data",
        )
    grid = f"{config.stream.columns} x {config.stream.rows} lanes"
    return passed(
        f"batches of {batch}, {batch // case.world_size} a rank; {workers} loader processes a rank; {grid}"
    )


def check_versions(case: Case) -> Finding:  # noqa: ARG001 - all checks take it
    """Hold what is installed against the ranges that the package asks for."""
    wanted = {name: text for name, text in map(_parse, _requirements("streamswav")) if name}
    found = {name: _installed(name) for name in wanted}
    outside = [
        f"{name} {version or '(missing)'}, tested with {wanted[name]}"
        for name, version in found.items()
        if version is None or not _within(version, wanted[name])
    ]
    vision = dict(map(_parse, _requirements("torchvision"))).get("torch", "")
    if vision and not _within(found.get("torch") or "", vision):
        outside.append(f"torchvision is built for torch{vision}, torch is {found.get('torch')}")
    shown = ", ".join(f"{name} {found[name]}" for name in _SHOWN if found.get(name))
    text = f"streamswav {__version__}, Python {platform.python_version()}, {shown}"
    if outside:
        remedy = "install what the image pins: pip install -c ops/constraints.txt"
        return warned(f"{'; '.join(outside)} ({text})", remedy)
    return passed(text)


def _requirements(name: str) -> list[str]:
    """What an installed package needs; extras are left out."""
    try:
        return [each for each in importlib.metadata.requires(name) or [] if "extra ==" not in each]
    except importlib.metadata.PackageNotFoundError:
        return []


def _parse(requirement: str) -> tuple[str, str]:
    found = re.match(r"([A-Za-z0-9_.-]+)\s*\(?([^;)]*)", requirement)
    return (found[1].lower(), found[2].strip()) if found else ("", "")


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _within(version: str, wanted: str) -> bool:
    """Tell whether a version is in a range such as `>=2.6,<3`; what is no comparison is met."""
    here = _numbers(version)
    for operator, text in re.findall(r"(>=|<=|==|!=|<|>)\s*([\d.]+)", wanted):
        there = _numbers(text)
        length = max(len(here), len(there))
        one, other = (each + (0,) * (length - len(each)) for each in (here, there))
        met = {">=": one >= other, "<=": one <= other, "==": one == other, "!=": one != other}
        if not (met | {"<": one < other, ">": one > other})[operator]:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"[\d.]+", version)
    return tuple(int(each) for each in found[0].split(".") if each) if found else ()


CHECKS = (
    Check("configuration", check_configuration),
    Check("versions", check_versions),
)
SETTINGS = Check(
    "settings",
    check_settings,
    seconds=PLANNING_SECONDS,
    remedies={
        ConfigError: "change the key that is named, or the number of ranks",
        CheckpointError: "set it back, or choose another run.directory",
    },
)
