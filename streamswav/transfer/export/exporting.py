"""Weights out: one trunk in the formats of those who are to use it, with a card that says what it is."""

from __future__ import annotations

import json
import posixpath
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from streamswav.config import StorageSection
from streamswav.errors import CheckpointError, ConfigError, DeniedError, UnsupportedError
from streamswav.stream.store import Store, join, redact
from streamswav.transfer.export.files import (
    ALL,
    DEFAULT,
    DTYPES,
    FORMATS,
    Job,
    digest_of,
    formats_named,
    refuse_format,
)
from streamswav.transfer.export.model_card import describe, in_short, load_lines, write_card
from streamswav.transfer.export.source import Source, read_results, read_source
from streamswav.transfer.extraction.preprocessing import choose_preprocessing

_PICKLED = ("torchvision", "timm", "reference", "detectron2")
_OF_SUFFIX = {
    ".pth": _PICKLED,
    ".pt": _PICKLED,
    ".tar": _PICKLED,
    ".safetensors": ("safetensors",),
    ".onnx": ("onnx",),
    ".pt2": ("torch.export",),
}
_WEB = ("http", "https")
_MOST_WORDS = 300
_STORAGE = StorageSection()


@dataclass(frozen=True)
class Places:
    """Where an export goes.

    Attributes:
        folder: that holds all of it.
        files: names of the files, by format.
        card: name of the model card.
        facts: name of the same for machines.
    """

    folder: str
    files: dict[str, str]
    card: str = "README.md"
    facts: str = "export.json"

    @property
    def names(self) -> list[str]:
        """All names, in the order in which they are put in place."""
        return [*self.files.values(), self.card, self.facts]


def export(
    checkpoint: str,
    out: str,
    *,
    formats: Sequence[str] = (),
    dtype: str = "float32",
    head: int | None = None,
    results: Sequence[str] = (),
    overwrite: bool = False,
    storage: StorageSection = _STORAGE,
    tell: Callable[[str], object] = lambda _: None,
) -> list[str]:
    """Write a checkpoint's weights for others to load. Nothing is there before everything has been made.

    Args:
        checkpoint: whatever `load_trunk` reads.
        out: a folder, or the name of a single file, whose suffix then says the format where none is given.
        formats: of `FORMATS`; `all` is all that are possible. By default torchvision's and safetensors.
        dtype: of the floating-point weights: float32, float16 or bfloat16.
        head: which classifier of a finetuned run goes with the trunk, from 0, where there are several.
        results: files of evaluations for the card; by default `results.json` in the run's folder.
        overwrite: replace files that are there.
        storage: how object storage is reached.
        tell: told, in words, what is left out.

    Returns:
        URLs of the files, then of the card and of its JSON.

    Raises:
        ConfigError: a format that is not possible here, and why.
        DeniedError: a file is there already, or nothing can be written.
        UnsupportedError: a web address to write to.
        CheckpointError, StorageError: as `load_trunk`.
    """
    places = choose_places(out, formats)
    if dtype not in DTYPES:
        raise ConfigError("--dtype", f"there are {', '.join(DTYPES)}", value=dtype)
    store = Store(storage)
    if not overwrite:
        _refuse_existing(places, store)
    source = read_source(checkpoint, storage, head=head, tell=tell)
    evaluations = read_results(results, source.info, store)
    places = _leave_out(places, source, dtype, tell) if ALL in formats else places
    for name in places.files:
        refuse_format(name, source, dtype=dtype)
    with tempfile.TemporaryDirectory(prefix="streamswav-export-") as aside:
        made = _make(places, Path(aside), source, dtype, evaluations)
        for path in made:
            store.upload(path, join(places.folder, path.name))
    return [join(places.folder, path.name) for path in made]


def choose_places(out: str, formats: Sequence[str] = ()) -> Places:
    """Say which files there will be.

    Raises:
        ConfigError: an unknown format; several for one file, or one that has another suffix.
        UnsupportedError: a web address.
    """
    if out.partition("://")[0] in _WEB:
        raise UnsupportedError(redact(out), "web servers are only read; give a path or s3://")
    names = formats_named(formats)
    folder, _, file = out.rpartition("/")
    stem, suffix = posixpath.splitext(file)
    fitting = _OF_SUFFIX.get(suffix, ())
    if not fitting:
        return Places(out, {name: FORMATS[name].file for name in names or DEFAULT})
    names = names or [fitting[0]]
    if len(names) > 1:
        raise ConfigError(
            "OUT", f"one file holds one format, not {', '.join(names)}; give a folder", value=out
        )
    if names[0] not in fitting:
        wanted = posixpath.splitext(FORMATS[names[0]].file)[1]
        raise ConfigError("OUT", f"a file of {names[0]} has a name that ends with {wanted}", value=out)
    stem = stem.removesuffix(".pth")
    return Places(folder or ".", {names[0]: file}, f"{stem}.md", f"{stem}.json")


def _refuse_existing(places: Places, store: Store) -> None:
    for name in places.names:
        url = join(places.folder, name)
        if store.exists(url):
            reason = "is there already; choose another folder, or replace it with --overwrite"
            raise DeniedError(redact(url), reason)


def _leave_out(places: Places, source: Source, dtype: str, tell: Callable[[str], object]) -> Places:
    """Keep of all formats those that are possible."""
    files = {}
    for name, file in places.files.items():
        try:
            refuse_format(name, source, dtype=dtype)
        except ConfigError as error:
            tell(f"{name} is left out: {error.reason}")
        else:
            files[name] = file
    return replace(places, files=files)


def _make(
    places: Places, aside: Path, source: Source, dtype: str, evaluations: Sequence[Mapping[str, Any]]
) -> list[Path]:
    """Make every file in a local folder; the card and its JSON come last, with what there is to say."""
    preprocessing = choose_preprocessing(source.info.config.crops)
    facts = describe(source, preprocessing, evaluations)
    job = Job(source, dtype, preprocessing.crop, in_short(facts))
    for name, file in places.files.items():
        for path in _make_one(name, job, aside / file):
            load = load_lines(name, file, source, preprocessing.crop) if path.name == file else []
            facts["files"][path.name] = {
                "format": name,
                "dtype": dtype,
                "bytes": path.stat().st_size,
                "sha256": digest_of(path),
                "load": load,
            }
    made = [aside / name for name in [*facts["files"], places.card, places.facts]]
    made[-2].write_text(write_card(facts))
    made[-1].write_text(json.dumps(facts, indent=1) + "\n")
    return made


def _make_one(name: str, job: Job, path: Path) -> list[Path]:
    """Write one format; ONNX may need a second file.

    Raises:
        CheckpointError: the disk is full, or what was written differs from what is read back.
    """
    before = {*path.parent.iterdir()}
    try:
        FORMATS[name].write(job, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:_MOST_WORDS]
        raise CheckpointError(f"{name} could not be made in {path.parent}: {reason}") from None
    return sorted({*path.parent.iterdir()} - before)
