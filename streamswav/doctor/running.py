"""Runs checks one after the other: each bounded in time, none able to end the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from streamswav.doctor.case import Case
from streamswav.doctor.finding import Finding, NotLookedAtError, failed, skipped
from streamswav.errors import (
    EXIT_CONFIG,
    EXIT_DONE,
    EXIT_RETRY,
    ConfigError,
    DeniedError,
    NotFoundError,
    StreamswavError,
    UnavailableError,
    UnsupportedError,
)

THREAD = "doctor: "
"""What the names of the checks' threads begin with."""

PLANNING_SECONDS = 120.0
"""For checks that plan: seconds of arithmetic, many more where cores are few."""

Remedies = Mapping[type[StreamswavError], str]

_REMEDIES: Remedies = {
    ConfigError: "set the key that is named; `streamswav keys` describes them all",
    NotFoundError: "correct the address, or make what it names",
    DeniedError: "give this identity the permission (`identity` says whose), or use another",
    UnsupportedError: "use an address that can do this",
    UnavailableError: "see that this machine reaches it (name, proxies, network policies); then try again",
    StreamswavError: "mend what the line names",
}


@dataclass(frozen=True)
class Check:
    """One thing to look at.

    Attributes:
        name: for `--only` and `--skip`.
        look: looks at it. What it raises is a failure; `NotLookedAtError`: there is nothing to see.
        seconds: that it may take, beyond `Case.seconds` where it measures.
        remedies: for the errors that it may raise, before those that hold for all checks.
        asks: the URLs that it asks storage for; where one before it did not get through, it does not try.
    """

    name: str
    look: Callable[[Case], Finding]
    seconds: float = 30.0
    remedies: Remedies = field(default_factory=dict)
    asks: Callable[[Case], Sequence[str]] = lambda _: ()


@dataclass(frozen=True)
class Result:
    """What became of a check, and the seconds it took."""

    name: str
    finding: Finding
    seconds: float


def run_checks(checks: Sequence[Check], case: Case) -> Iterator[Result]:
    """Yield the result of each check as it comes."""
    for check in checks:
        began = time.monotonic()
        finding = _run(check, case)
        if finding.status == "fail":
            case.failures.add(check.name)
        yield Result(check.name, finding, time.monotonic() - began)


def exit_code(results: Sequence[Result], *, strict: bool) -> int:
    """Return 0, 78 for what a restart cannot mend, or 75 where waiting alone helps.

    Args:
        results: of all checks.
        strict: warnings count as failures.
    """
    found = [result.finding for result in results]
    if strict and any(each.status == "warn" for each in found):
        return EXIT_CONFIG
    failures = [each for each in found if each.status == "fail"]
    if not failures:
        return EXIT_DONE
    return EXIT_RETRY if all(each.waits for each in failures) else EXIT_CONFIG


def _run(check: Check, case: Case) -> Finding:
    """Look in a thread, which is left alone when its time is over: what it waits for cannot be broken off."""
    found: list[Finding] = []
    seconds = check.seconds + case.seconds
    thread = threading.Thread(
        target=lambda: found.append(_look(check, case)), name=THREAD + check.name, daemon=True
    )
    thread.start()
    thread.join(seconds)
    if found:
        return found[0]
    return failed(
        f"no answer within {seconds:.0f} s",
        f"see what it waits for (network, disk), then try again; --skip {check.name} leaves it out",
        waits=True,
    )


def _look(check: Check, case: Case) -> Finding:
    try:
        case.reach(*check.asks(case))
        return check.look(case)
    except NotLookedAtError as reason:
        return skipped(str(reason))
    except StreamswavError as error:
        case.learn(error, check.name)
        return _of_error(error, check.remedies)
    except Exception as error:  # a check that crashes is a finding, not the end of the others
        text = " ".join(f"the check itself failed: {type(error).__name__}: {error}".split())
        return failed(text, f"report it; --skip {check.name} leaves it out")


def _of_error(error: StreamswavError, remedies: Remedies) -> Finding:
    for kind in type(error).__mro__:
        remedy = remedies.get(kind) or _REMEDIES.get(kind)
        if remedy:
            break
    return failed(str(error), remedy or "", waits=error.exit_code == EXIT_RETRY)
