"""Where the launchers of several nodes meet."""

from __future__ import annotations

from datetime import timedelta

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from streamswav.errors import PeerError, StreamswavError
from streamswav.launch_options import LaunchOptions

LOOPBACK = "127.0.0.1"


class Meeting(RendezvousHandler):
    """Brings the launchers together at the first one's store, which the ranks use as well."""

    def __init__(self, options: LaunchOptions) -> None:
        self._options = options

    def get_backend(self) -> str:
        """Return the kind: who is node 0 is known beforehand."""
        return "static"

    @property
    def use_agent_store(self) -> bool:
        """Tell the ranks that node 0's launcher serves their store."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Open or reach the store, and wait for all launchers.

        Raises:
            PeerError: somebody did not come in time.
            StreamswavError: the port is taken.
        """
        options = self._options
        alone = options.address is None
        address, port = options.address or LOOPBACK, 0 if alone else options.port
        try:
            store = TCPStore(
                address,
                port,
                options.nodes,
                options.node == 0,
                timedelta(seconds=max(1.0, options.join_seconds)),
            )
        except RuntimeError as error:  # DistError and what has no kind of its own
            raise _explain(error, options) from None
        own = PrefixStore(options.run_id, store)
        return RendezvousInfo(own, options.node, options.nodes, RendezvousStoreInfo(address, store.port))

    def is_closed(self) -> bool:
        """Tell that nobody closes it."""
        return False

    def set_closed(self) -> None:
        """Do nothing: nodes do not come and go."""

    def num_nodes_waiting(self) -> int:
        """Tell that nobody joins later."""
        return 0

    def get_run_id(self) -> str:
        """Return the run's name."""
        return self._options.run_id

    def shutdown(self) -> bool:
        """Leave the store to the ranks; it ends with this process."""
        return True


def _explain(error: RuntimeError, options: LaunchOptions) -> StreamswavError:
    text = str(error)
    if "EADDRINUSE" in text or "in use" in text:
        return StreamswavError(
            f"port {options.port} is taken on this machine: choose another --master-port on all nodes"
        )
    place, seconds = f"{options.address}:{options.port}", f"{options.join_seconds:g} s"
    if options.node == 0:
        return PeerError(f"not all {options.nodes} nodes came to {place} within {seconds} (--join-seconds)")
    return PeerError(
        f"node 0 did not answer at {place}, or not all nodes came, within {seconds} (--join-seconds)"
    )
