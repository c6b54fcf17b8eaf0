"""Checks of the network around the ranks: where they meet, and where metrics are scraped."""

from __future__ import annotations

import errno
import socket
import time

from streamswav.doctor.case import Case
from streamswav.doctor.finding import Finding, NotLookedAtError, failed, passed, warned
from streamswav.doctor.running import Check
from streamswav.errors import ConfigError
from streamswav.launch_options import LaunchOptions
from streamswav.telemetry.exporter import Source, serve
from streamswav.telemetry.metrics import Metrics

CONNECT_SECONDS = 3.0
DNS_SECONDS = LaunchOptions.dns_seconds
"""A name is waited for as long as by the launcher: in a cluster its record comes after the pods."""

_NAMED = (
    "give the pods a headless Service with publishNotReadyAddresses, and see that --master-addr "
    "(PET_MASTER_ADDR) is node 0's name in it"
)


def check_meeting(case: Case) -> Finding:
    """Resolve node 0's name; on node 0 bind its port, elsewhere knock at it."""
    options = case.options
    if options.address is None:
        raise NotLookedAtError("one machine: the ranks meet on it")
    place = f"{options.address}:{options.port}"
    found = _resolve(options.address, min(options.dns_seconds, DNS_SECONDS))
    if isinstance(found, str):
        return failed(f"{options.address} is no name that is known here: {found}", _NAMED, waits=True)
    if options.node == 0:
        return _try_binding(found, options.port, place)
    return _knock(found, options.port, place)


def _resolve(name: str, seconds: float) -> str | tuple[socket.AddressFamily, str]:
    """Return the address of a name, or why there is none; its record may come after this pod."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            family, *_, address = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0]
            return family, str(address[0])
        except OSError as error:
            if time.monotonic() >= deadline:
                return error.strerror or str(error)
        time.sleep(0.5)


def _try_binding(found: tuple[socket.AddressFamily, str], port: int, place: str) -> Finding:
    family, address = found
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            return failed(
                f"port {port} cannot be had on this machine ({error.strerror})",
                "choose another --master-port (PET_MASTER_PORT) on all nodes",
            )
    with socket.socket(family) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return warned(
                f"{place} is {address}, which is not this machine's, although it is node 0",
                "see that the node rank 0 and the master's name mean the same machine",
            )
    return passed(f"{place} is this machine ({address}), and the port is free")


def _knock(found: tuple[socket.AddressFamily, str], port: int, place: str) -> Finding:
    family, address = found
    with socket.socket(family) as probe:
        probe.settimeout(CONNECT_SECONDS)
        code = probe.connect_ex((address, port))
    if code == 0:
        return passed(f"{place} is {address}, and answers")
    if code == errno.ECONNREFUSED:
        return passed(f"{place} is {address}; nobody listens there yet, as before a run")
    return warned(
        f"{place} is {address}, and does not answer ({errno.errorcode.get(code, code)})",
        "let the pods of the run reach one another (NetworkPolicy, security groups)",
    )


def check_metrics(case: Case) -> Finding:
    """Serve metrics for a moment where the run will."""
    section = case.config.telemetry
    if section.port == 0:
        raise NotLookedAtError("no metrics are served (telemetry.port 0)")
    with serve(Source(Metrics()), port=section.port, bind=section.bind):
        return passed(f"{section.bind}:{section.port} is free")


CHECKS = (
    Check("meeting", check_meeting, seconds=DNS_SECONDS + 30),
    Check("metrics", check_metrics, remedies={ConfigError: "choose another telemetry.port, or 0 for none"}),
)
