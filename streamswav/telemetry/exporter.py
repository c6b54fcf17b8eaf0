"""The /metrics endpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import start_http_server

from streamswav.errors import ConfigError
from streamswav.telemetry.metrics import Metrics


@contextmanager
def serve_metrics(metrics: Metrics, *, port: int, bind: str) -> Iterator[None]:
    """Serve `/metrics` for as long as the context lasts; port 0 serves nothing.

    Raises:
        ConfigError: the port is in use, or the address is not this machine's.
    """
    if port == 0:
        yield
        return
    try:
        server, thread = start_http_server(port, addr=bind, registry=metrics.registry)
    except OSError as error:
        reason = (
            f"cannot serve metrics on {bind}:{port} ({error.strerror}); choose another port, or 0 for none"
        )
        raise ConfigError("telemetry.port", reason, value=port) from None
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
