"""A parser of command lines that fails as everything else here does: one line, and the exit code 78."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from streamswav.errors import EXIT_CONFIG
from streamswav.redact import Redactor


def whole(text: str) -> int:
    """Read a whole number from 0 on, as the type of an argument."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def count(text: str) -> int:
    """Read a whole number from 1 on, as the type of an argument."""
    number = whole(text)
    if number == 0:
        raise argparse.ArgumentTypeError("0 is too few")
    return number


class Parser(argparse.ArgumentParser):
    """argparse's, but that a mistake is told in one line; parsers of subcommands become such ones too."""

    def error(self, message: str) -> NoReturn:
        """Tell what is wrong with which argument and where help is; exit with `EXIT_CONFIG`."""
        program = self.prog.partition(" ")[0]
        reason = Redactor().text(" ".join(message.removeprefix("argument ").split()))
        sys.stderr.write(f"{program}: {reason}; see `{self.prog} --help`\n")
        raise SystemExit(EXIT_CONFIG)
