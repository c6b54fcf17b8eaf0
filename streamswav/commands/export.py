"""`streamswav export`: a trained trunk for torchvision, timm, detectron2, ONNX and others."""

from __future__ import annotations

import argparse
import posixpath
import sys

from streamswav.config import Config
from streamswav.errors import ConfigError
from streamswav.transfer.export.exporting import export
from streamswav.transfer.export.files import ALL, DEFAULT, DTYPES, FORMATS

_USAGE = "streamswav export --checkpoint PATH [--to FORMAT...] [options] OUT"
_EPILOG = f"""\
OUT is a folder, or the name of a file (swav.safetensors, swav.onnx); local or s3://. Beside the weights lie
README.md, which says how to load them and where they come from, and export.json, which says it to machines.
Formats: {", ".join(FORMATS)}; {ALL} writes all that are possible. ONNX needs pip install onnx onnxscript.
How storage is reached can be set by --storage.KEY, as for pretrain.
"""


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `run_export`."""
    parser.usage, parser.epilog = _USAGE, _EPILOG
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="a run, a checkpoint, or a file of weights")
    add(
        "--to",
        nargs="+",
        action="extend",
        default=[],
        metavar="FORMAT",
        help=f"what to write (default: {' '.join(DEFAULT)})",
    )
    add("--dtype", choices=tuple(DTYPES), default="float32", help="of the weights (default: float32)")
    add("--head", type=int, metavar="N", help="which of several classifiers of a finetuned run, from 0")
    add("--results", nargs="+", action="extend", default=[], metavar="FILE", help="evaluations, for the card")
    add("--overwrite", action="store_true", help="replace files that are there")
    parser.set_defaults(words=[])


def run_export(args: argparse.Namespace, *, given: Config) -> list[str]:
    """Write the files and print their names.

    Args:
        args: parsed by a parser that `add_export_arguments` prepared; `words` are its other words.
        given: its `storage` says how storage is reached.

    Raises:
        StreamswavError: as `streamswav.transfer.export.exporting.export`.
    """
    out, formats, results = _part(args)
    written = export(
        args.checkpoint,
        out,
        formats=formats,
        dtype=args.dtype,
        head=args.head,
        results=results,
        overwrite=args.overwrite,
        storage=given.storage,
        tell=lambda text: sys.stderr.write(f"streamswav: {text}\n"),
    )
    sys.stdout.write("\n".join(written) + "\n")
    return written


def _part(args: argparse.Namespace) -> tuple[str, list[str], list[str]]:
    """Tell OUT from the formats or results that it follows, and commas from formats."""
    words, results = list(args.words), list(args.results)
    to = [name for word in args.to for name in _split(word)]
    if not words and to and to[-1].lower() not in (*FORMATS, ALL):
        words.append(to.pop())
    elif not words and len(results) > 1 and posixpath.splitext(results[-1])[1] != ".json":
        words.append(results.pop())
    if len(words) != 1:
        reason = f"one place for the files is needed: {_USAGE}"
        raise ConfigError("OUT", reason, value=" ".join(words) or None)
    return words[0], to, results


def _split(word: str) -> list[str]:
    return word.split(",") if {*word.lower().split(",")} <= {*FORMATS, ALL} else [word]
