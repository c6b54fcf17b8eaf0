"""What is printed: a line a check, or JSON. No secret of the environment is in either."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from streamswav import __version__
from streamswav.doctor.finding import NO_CONFIGURATION, STATUSES
from streamswav.doctor.running import Result
from streamswav.redact import Redactor


class Report:
    """Collects results.

    Args:
        command: that was asked about.
        environment: whose secrets are kept out.
    """

    def __init__(self, command: str, environment: Mapping[str, str]) -> None:
        self._command, self._redactor = command, Redactor.of(environment)
        self.results: list[Result] = []

    def add(self, result: Result) -> Result:
        """Take a result, and return it without secrets."""
        finding = result.finding
        clean = replace(finding, text=self._clean(finding.text), remedy=self._clean(finding.remedy))
        self.results.append(replace(result, finding=clean))
        return self.results[-1]

    def summary(self, code: int) -> str:
        """Return the closing line."""
        counts = Counter(each.finding.status for each in self.results)
        failures = [each.name for each in self.results if each.finding.status == "fail"]
        named = {"fail": f" ({', '.join(failures)})" if failures else ""}
        told = ", ".join(f"{counts[status]} {status}{named.get(status, '')}" for status in STATUSES)
        return f"doctor for {self._command}: {told}; exit {code}"

    def to_json(self, code: int) -> str:
        """Return everything as JSON."""
        checks: list[dict[str, Any]] = [
            {
                "name": each.name,
                "status": each.finding.status,
                "text": each.finding.text,
                "remedy": each.finding.remedy,
                "waits": each.finding.waits,
                "seconds": round(each.seconds, 3),
            }
            for each in self.results
        ]
        counts = Counter(each.finding.status for each in self.results)
        return json.dumps(
            {
                "version": __version__,
                "command": self._command,
                "exit_code": code,
                "counts": {status: counts[status] for status in STATUSES},
                "checks": checks,
            },
            indent=1,
        )

    def _clean(self, text: str) -> str:
        return " ".join(self._redactor.text(text).split())


def line(result: Result) -> str:
    """Return a result as a line for people."""
    finding = result.finding
    remedy = f" -> {finding.remedy}" if finding.remedy else ""
    return f"{finding.status}  {result.name:<14}{finding.text}{remedy}"


def without_configuration(result: Result) -> bool:
    """Tell whether there was nothing to look at for want of a configuration."""
    return result.finding.text == NO_CONFIGURATION


def say(text: str) -> None:
    """Print now: whoever watches a pod's log sees a check as it ends."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
