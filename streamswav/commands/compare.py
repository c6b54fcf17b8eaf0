"""`streamswav compare`: results of several measurements side by side."""

from __future__ import annotations

import argparse
import json
import sys

from streamswav.config import Config
from streamswav.errors import ConfigError
from streamswav.stream.store import Store, redact
from streamswav.transfer.measuring.comparison import Comparison
from streamswav.transfer.measuring.results_file import read_results


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `run_compare`."""
    parser.usage = "streamswav compare FIRST.json OTHER.json... [--json | --markdown]"
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="print JSON")
    how.add_argument("--markdown", action="store_true", help="print a table for a document")
    parser.set_defaults(words=())


def run_compare(args: argparse.Namespace, *, given: Config) -> None:
    """Print what is the same and what changed in result files.

    Args:
        args: parsed by a parser that `add_compare_arguments` prepared; `words` are the files.
        given: its `storage` tells how files are reached.

    Raises:
        ConfigError: less than two files, or one that holds no results.
        StorageError: a file that cannot be read.
    """
    if len(args.words) < 2:
        raise ConfigError("compare", "takes two files or more, which --json of knn, linear and others wrote")
    store = Store(given.storage)
    results = [read_results(file, store) for file in args.words]
    comparison = Comparison([redact(file) for file in args.words], results)
    if args.json:
        text = json.dumps(comparison.to_data(), indent=1)
    else:
        text = comparison.to_markdown() if args.markdown else comparison.to_table()
    sys.stdout.write(text + "\n")
