"""A parser of command lines that fails as everything else here does: one line, and the exit code 78."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from streamswav.errors import EXIT_CONFIG


class Parser(argparse.ArgumentParser):
    """argparse's, but that a mistake is told in one line; parsers of subcommands become such ones too."""

    def error(self, message: str) -> NoReturn:
        """Tell what is wrong with which argument and where help is; exit with `EXIT_CONFIG`."""
        program = self.prog.partition(" ")[0]
        reason = " ".join(message.removeprefix("argument ").split())
        sys.stderr.write(f"{program}: {reason}; see `{self.prog} --help`\n")
        raise SystemExit(EXIT_CONFIG)
