"""`streamswav-shards`: build, verify, describe and redact tar shards."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from tqdm import tqdm

from streamswav import __version__
from streamswav.arguments import Parser
from streamswav.config import Config, load_config
from streamswav.errors import EXIT_DONE, EXIT_FAILED, ConfigError, StreamswavError
from streamswav.redact import Redactor

if TYPE_CHECKING:
    from shards.build import Built
    from shards.redact import Key, Redactions
    from shards.verify import ShardCheck
    from streamswav.stream.store import Store

_INTERRUPTED = 130
_SHOWN = 20

_EPILOG = """\
Keys of the section `storage` are understood as by `streamswav`: --storage.region eu-west-1, or
STREAMSWAV_STORAGE__REGION in the environment. Credentials come by the usual AWS chain.

exit codes: 0 done, all is well · 1 verify found problems, redact did not find a key · 78 the place, the
source or an option is wrong · 75 the storage is unavailable, try later
"""
_BUILD = """\
SOURCE is a folder of images (in folders of classes or not), a folder with MNIST's idx files (Fashion-MNIST),
or torchvision:NAME. Images keep their bytes; what is not a file becomes PNG. The same source and options give
the same bytes."""
_REDACT = """\
Takes samples out of shards, for those who opted out: their bytes become zeros, in place, so that all other
samples stay where they are. A running training goes on: SHARD.redacted.json beside each shard vouches for the
new version. Run it again after an interruption. Older versions that the bucket keeps, and copies elsewhere,
are yours to delete.

A key is the sample's name in the tar up to the first dot of the file name (n01440764/10026, without .jpg); or
SHARD:KEY for one shard, as part-7/train-000012.tar:n01440764/10026, SHARD being its path below URL."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = _build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if arguments.endpoint_url is not None:
        rest += ["--storage.endpoint_url", arguments.endpoint_url]
    try:
        arguments.config = load_config(None, os.environ, rest)
        return int(arguments.run(arguments))
    except StreamswavError as error:
        sys.stderr.write(f"streamswav-shards: {Redactor().text(str(error))}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("streamswav-shards: interrupted\n")
        return _INTERRUPTED


def _build_parser() -> Parser:
    parser = Parser(prog="streamswav-shards", description=__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"streamswav {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    build = _add_command(commands, "build", _build, "write a data set as shards")
    build.description = _BUILD
    build.add_argument("source", metavar="SOURCE", help="image folder, idx folder or torchvision:NAME")
    build.add_argument("dest", metavar="DEST", help="folder or s3:// prefix")
    build.add_argument("--samples-per-shard", type=_positive, default=1000, metavar="N", help="default 1000")
    build.add_argument("--bytes-per-shard", type=_size, default="300MB", metavar="SIZE", help="default 300MB")
    build.add_argument("--split", default="train", help="of idx files and torchvision (train, test, ...)")
    build.add_argument("--prefix", help="shards are called PREFIX-000000.tar (default: the split)")
    build.add_argument("--shuffle", type=int, default=0, metavar="SEED", help="seed of the order (default 0)")
    build.add_argument("--in-order", action="store_true", help="keep the source's order, classes together")
    build.add_argument("--limit", type=_positive, metavar="N", help="take only N images")
    build.add_argument("--root", type=Path, default=Path("data"), help="where torchvision's data lies")
    build.add_argument("--strict", action="store_true", help="stop at an image that cannot be read")
    build.add_argument("--overwrite", action="store_true", help="replace the shards at DEST")
    verify = _add_command(commands, "verify", _verify, "parse and decode every sample")
    describe = _add_command(commands, "describe", _describe, "count samples, sizes, formats and labels")
    describe.add_argument("--json", action="store_true", help="for machines")
    redact = _add_command(commands, "redact", _redact, "take samples out, for those who opted out")
    redact.description = _REDACT
    redact.add_argument("--keys", action="append", default=[], metavar="FILE", help="keys, one a line")
    redact.add_argument("--key", action="append", default=[], metavar="KEY", help="one key; may be repeated")
    redact.add_argument("--dry-run", action="store_true", help="only look")
    for each in (verify, describe, redact):
        more = "; braces; or @FILE of these" if each is redact else ""
        each.add_argument("url", metavar="URL", help=f"prefix, pattern or single tar{more}")
        each.add_argument("--workers", type=_positive, default=os.cpu_count() or 1, help="processes")
    return parser


def _add_command(commands: argparse._SubParsersAction[Parser], name: str, run: object, text: str) -> Parser:
    parser = commands.add_parser(name, help=text, description=text, epilog=_EPILOG, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--endpoint-url", metavar="URL", help="S3 endpoint other than AWS")
    parser.set_defaults(run=run)
    return parser


def _build(arguments: argparse.Namespace) -> int:
    # The commands bring numpy, webdataset and more: not before the arguments are known to be right.
    from shards.build import BuildOptions, build  # noqa: PLC0415
    from shards.sources import open_source  # noqa: PLC0415
    from streamswav.stream.store import Store  # noqa: PLC0415

    source = open_source(arguments.source, split=arguments.split, root=arguments.root)
    options = BuildOptions(
        samples_per_shard=arguments.samples_per_shard,
        bytes_per_shard=arguments.bytes_per_shard,
        prefix=arguments.prefix or arguments.split,
        shuffle=None if arguments.in_order else arguments.shuffle,
        limit=arguments.limit,
        strict=arguments.strict,
        overwrite=arguments.overwrite,
    )
    total = min(len(source), arguments.limit or len(source))
    with _progress(total, "image") as progress:
        built = build(
            source,
            arguments.dest,
            Store(arguments.config.storage),
            options,
            on_image=progress.update,
        )
    _report_skipped(built)
    sys.stdout.write(f"{_summary(built)}. Next: {_next_command(arguments)}\n")
    return EXIT_DONE


def _report_skipped(built: Built) -> None:
    for reason in built.skipped[:_SHOWN]:
        sys.stderr.write(f"skipped: {reason}\n")
    if len(built.skipped) > _SHOWN:
        sys.stderr.write(f"skipped: {len(built.skipped) - _SHOWN} more\n")


def _summary(built: Built) -> str:
    skipped = f" ({len(built.skipped)} skipped)" if built.skipped else ""
    return f"{built.samples} samples{skipped} in {len(built.shards)} shards, {built.bytes:,} bytes"


def _next_command(arguments: argparse.Namespace) -> str:
    endpoint = arguments.config.storage.endpoint_url
    suffix = f" --storage.endpoint_url {endpoint}" if endpoint else ""
    return f"streamswav pretrain --run.directory RUN --stream.urls {arguments.dest}{suffix}"


def _verify(arguments: argparse.Namespace) -> int:
    from shards.scan import find_shards, is_folder  # noqa: PLC0415
    from shards.verify import read_counts, verify  # noqa: PLC0415
    from streamswav.stream.store import Store  # noqa: PLC0415

    config: Config = arguments.config
    store = Store(config.storage)
    shards = find_shards(arguments.url, store)
    with _progress(len(shards), "shard") as progress:
        checks = verify(
            shards,
            store,
            max_pixels=config.crops.max_pixels,
            counted=read_counts(arguments.url, store) if is_folder(arguments.url) else {},
            workers=arguments.workers,
            on_shard=progress.update,
        )
    problems = sum(len(check.problems) for check in checks)
    sys.stdout.write(_problem_table(checks))
    samples = sum(check.samples for check in checks)
    sys.stdout.write(f"{samples} samples in {len(shards)} shards, {problems or 'no'} problems\n")
    return EXIT_FAILED if problems else EXIT_DONE


def _problem_table(checks: Sequence[ShardCheck]) -> str:
    rows = [
        (problem.shard, str(problem.offset), problem.key or "-", problem.reason)
        for check in checks
        for problem in check.problems
    ]
    if not rows:
        return ""
    rows.insert(0, ("SHARD", "OFFSET", "KEY", "REASON"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) + "\n"
        for row in rows
    )


def _describe(arguments: argparse.Namespace) -> int:
    from shards.describe import describe, format_contents  # noqa: PLC0415
    from shards.scan import find_shards  # noqa: PLC0415
    from streamswav.stream.store import Store  # noqa: PLC0415

    store = Store(arguments.config.storage)
    shards = find_shards(arguments.url, store)
    with _progress(len(shards), "shard") as progress:
        contents = describe(shards, store, workers=arguments.workers, on_shard=progress.update)
    values = contents.to_json()
    sys.stdout.write(json.dumps(values, indent=1) + "\n" if arguments.json else format_contents(values))
    return EXIT_DONE


def _redact(arguments: argparse.Namespace) -> int:
    from shards.redact import redact_samples  # noqa: PLC0415
    from streamswav.stream.manifest import list_manifest  # noqa: PLC0415
    from streamswav.stream.store import Store  # noqa: PLC0415

    store = Store(arguments.config.storage)
    keys = _read_keys(arguments, store)
    shards = list_manifest([arguments.url], store).shards
    with _progress(len(shards), "shard") as progress:
        done = redact_samples(
            shards,
            keys,
            store,
            dry_run=arguments.dry_run,
            workers=arguments.workers,
            on_shard=progress.update,
        )
    sys.stdout.write(
        "".join(f"{shard}: {_count(samples, 'sample')}\n" for shard, samples in done.samples.items())
    )
    did = "would be redacted" if arguments.dry_run else "redacted"
    total, among = sum(done.samples.values()), f"{len(done.samples)} of {len(shards)} shards"
    missing = _count(len(done.missing), "key")
    sys.stdout.write(f"{_count(total, 'sample')} {did} in {among}, {missing} not found\n")
    _report_unfound(done)
    return EXIT_FAILED if done.missing else EXIT_DONE


def _read_keys(arguments: argparse.Namespace, store: Store) -> set[Key]:
    from streamswav.stream.select import read_keys, split_key  # noqa: PLC0415

    keys = {split_key(text, option="--key", where=repr(text)) for text in arguments.key}
    for url in arguments.keys:
        keys.update(read_keys(url, store, option="--keys"))
    if not keys:
        raise ConfigError("--keys", "names no sample; give --keys FILE with one key a line, or --key KEY")
    return keys


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


def _report_unfound(done: Redactions) -> None:
    for shard, damage in done.unsearched:
        sys.stderr.write(f"not searched: {shard} bytes {damage.start} to {damage.stop} ({damage.reason})\n")
    for name, key in done.missing[:_SHOWN]:
        sys.stderr.write(f"not found: {name + ':' if name else ''}{key}\n")
    if len(done.missing) > _SHOWN:
        sys.stderr.write(f"not found: {len(done.missing) - _SHOWN} more\n")


def _progress(total: int, unit: str) -> tqdm[NoReturn]:
    """A bar on a terminal, nothing elsewhere."""
    return tqdm(total=total, unit=unit, disable=not sys.stderr.isatty(), leave=False)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _size(text: str) -> int:
    """Bytes, or with kB, MB, GB (powers of 1000)."""
    for unit, factor in (("kB", 1_000), ("MB", 1_000_000), ("GB", 1_000_000_000)):
        if text.lower().endswith(unit.lower()):
            return _positive_size(text[: -len(unit)], factor)
    return _positive_size(text, 1)


def _positive_size(text: str, factor: int) -> int:
    try:
        size = int(float(text) * factor)
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size of at least 1 byte, as 300MB")
    return size


if __name__ == "__main__":
    sys.exit(main())
