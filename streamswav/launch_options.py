"""What `streamswav launch` is told: by flags, by PET_* as torchrun reads them, or by what a pod is given."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from streamswav.arguments import Parser
from streamswav.errors import EXIT_CONFIG, EXIT_RETRY, ConfigError

Value = TypeVar("Value")

_DEFAULT_PORT = 29500
_NAMED_COUNTS = ("auto", "gpu", "cpu")
_VARIABLES = {
    "nnodes": ("PET_NNODES",),
    "nproc_per_node": ("PET_NPROC_PER_NODE",),
    "node_rank": ("PET_NODE_RANK", "NODE_RANK", "JOB_COMPLETION_INDEX"),
    "master_addr": ("PET_MASTER_ADDR", "MASTER_ADDR"),
    "master_port": ("PET_MASTER_PORT", "MASTER_PORT"),
    "max_restarts": ("PET_MAX_RESTARTS",),
    "rdzv_id": ("PET_RDZV_ID",),
    "retry_code": ("STREAMSWAV_RETRY_CODE",),
    "grace_seconds": ("STREAMSWAV_GRACE_SECONDS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"),
    "dns_seconds": ("STREAMSWAV_DNS_SECONDS",),
    "join_seconds": ("STREAMSWAV_JOIN_SECONDS",),
}
_EPILOG = """\
Each flag can come from the environment as PET_NNODES, PET_NPROC_PER_NODE and so on, as torchrun reads them,
or as MASTER_ADDR, MASTER_PORT, NODE_RANK and JOB_COMPLETION_INDEX; flags win. Without any of them the ranks
of this machine run alone.

exit codes: 0 all ranks are done · 75 (or --retry-code) drained after a signal, storage refused for too long,
a hang was ended, or another node is gone: the same command continues · 78 do not restart before something
was changed · 1 anything else
"""


@dataclass(frozen=True)
class LaunchOptions:
    """Where the ranks are, and how long things may take.

    Attributes:
        nodes: launchers of the run.
        ranks: of this machine: a number, `auto` (its GPUs, or one), `gpu` or `cpu`.
        node: number of this launcher.
        address: name of the machine of launcher 0; None for a single one.
        port: there.
        run_id: names the run among those that share the port.
        max_restarts: of all ranks after one crashed, on one node.
        retry_code: exit code in place of 75.
        grace_seconds: how long drained ranks have to save.
        dns_seconds: how long the address may take to be known.
        join_seconds: how long the other launchers may take to come.
    """

    nodes: int = 1
    ranks: str = "auto"
    node: int = 0
    address: str | None = None
    port: int = _DEFAULT_PORT
    run_id: str = "streamswav"
    max_restarts: int = 0
    retry_code: int = EXIT_RETRY
    grace_seconds: float = 600.0
    dns_seconds: float = 300.0
    join_seconds: float = 900.0


def parse_launch(arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[LaunchOptions, list[str]]:
    """Part the launcher's flags from the command that the ranks run.

    Raises:
        ConfigError: naming the flag or the variable.
        SystemExit: with the code 78 after a line, for a flag that does not exist; after the help.
    """
    given = vars(_build_parser().parse_args(arguments))
    command = given.pop("command")
    if command[:1] == ["--"]:
        command = command[1:]
    if not command:
        raise ConfigError("launch", "say what the ranks run: streamswav launch pretrain --config FILE ...")
    return read_options(given, environment), command


def read_options(flags: Mapping[str, str | None], environment: Mapping[str, str]) -> LaunchOptions:
    """Return where the ranks are, by the flags of `add_flags` and the environment.

    Raises:
        ConfigError: naming the flag or the variable.
    """
    return _Given(flags, environment).options()


class _Given:
    """Values as they were given, with the name under which each was."""

    def __init__(self, flags: Mapping[str, str | None], environment: Mapping[str, str]) -> None:
        self._flags, self._environment = flags, environment

    def options(self) -> LaunchOptions:
        nodes = self._read("nnodes", _nodes, 1)
        restarts = self._read("max_restarts", _at_least(0), 0)
        if nodes > 1 and restarts:
            reason = (
                "with several nodes no launcher can restart the ranks of all: set it to 0, "
                "the cluster restarts the gang"
            )
            raise ConfigError(self._name("max_restarts"), reason, value=restarts)
        self._refuse_other_rendezvous()
        address, port = self._meeting_point()
        return LaunchOptions(
            nodes=nodes,
            ranks=self._read("nproc_per_node", _ranks, "auto"),
            node=self._node(nodes),
            address=self._address(address, nodes),
            port=port,
            run_id=self._read("rdzv_id", str, LaunchOptions.run_id),
            max_restarts=restarts,
            retry_code=self._read("retry_code", _exit_code, EXIT_RETRY),
            grace_seconds=self._read("grace_seconds", _seconds, LaunchOptions.grace_seconds),
            dns_seconds=self._read("dns_seconds", _seconds, LaunchOptions.dns_seconds),
            join_seconds=self._read("join_seconds", _seconds, self._configured_timeout()),
        )

    def _find(self, key: str) -> tuple[str, str] | None:
        """The name under which a value was given, and its text; an empty variable is none."""
        if (text := self._flags.get(key)) is not None:
            return f"--{key.replace('_', '-')}", text
        return next(
            ((name, self._environment[name]) for name in _VARIABLES[key] if self._environment.get(name)), None
        )

    def _name(self, key: str) -> str:
        found = self._find(key)
        return found[0] if found else f"--{key.replace('_', '-')}"

    def _read(self, key: str, read: Callable[[str], Value], default: Value) -> Value:
        found = self._find(key)
        return _parse(found[0], found[1], read) if found else default

    def _node(self, nodes: int) -> int:
        """This launcher's number; on a single node a pod's index may be about something else."""
        found = self._find("node_rank")
        if found is None:
            if nodes > 1:
                raise ConfigError(
                    "--node-rank", f"is missing: which of the {nodes} nodes is this? (0 is first)"
                )
            return 0
        if nodes == 1 and not found[0].startswith(("--", "PET_")):
            return 0
        node = _parse(*found, _at_least(0))
        if node >= nodes:
            raise ConfigError(found[0], f"must be below the number of nodes ({nodes})", value=node)
        return node

    def _address(self, address: str | None, nodes: int) -> str | None:
        if nodes == 1:
            return None
        if address is None:
            raise ConfigError("--master-addr", f"is missing: where is node 0 of the {nodes}?")
        return address

    def _meeting_point(self) -> tuple[str | None, int]:
        """Address and port, of their own or as a rendezvous endpoint `host:port`."""
        endpoint = self._environment.get("PET_RDZV_ENDPOINT", "")
        host, colon, end = endpoint.rpartition(":")
        if not colon:
            host, end = endpoint, ""
        port = _parse("PET_RDZV_ENDPOINT", end, _port) if end else _DEFAULT_PORT
        address = self._read("master_addr", str, host or None)
        return address, self._read("master_port", _port, port)

    def _refuse_other_rendezvous(self) -> None:
        backend = self._environment.get("PET_RDZV_BACKEND", "static")
        if backend not in ("static", "c10d", ""):
            reason = "is not supported: the nodes meet at node 0 (static); unset it, or set static"
            raise ConfigError("PET_RDZV_BACKEND", reason, value=backend)

    def _configured_timeout(self) -> float:
        """`timeout=600,join_timeout=300` as torchrun's rendezvous takes it."""
        pairs = self._environment.get("PET_RDZV_CONF", "").split(",")
        found = dict(pair.strip().partition("=")[::2] for pair in pairs if pair.strip())
        for key in ("join_timeout", "timeout"):
            if key in found:
                return _parse("PET_RDZV_CONF", found[key], _seconds)
        return LaunchOptions.join_seconds


def _build_parser() -> Parser:
    parser = Parser(
        prog="streamswav launch",
        description=(
            "Start the ranks of a command on this machine, and end as they do. COMMAND is pretrain,\n"
            "cooldown, finetune, embed, knn, linear, svm or evaluate, with its own arguments."
        ),
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="streamswav launch [flags] COMMAND [--config FILE] [--section.key value]...",
        allow_abbrev=False,
    )
    add_flags(parser)
    add = parser.add_argument
    add(
        "--max-restarts", metavar="N", help="restarts of the ranks after a crash, on one machine (default: 0)"
    )
    add("--retry-code", metavar="CODE", help="exit code in place of 75 (PyTorchJob wants 143)")
    add("--grace-seconds", metavar="S", help="time to save after a signal (default: 600)")
    add("--join-seconds", metavar="S", help="time for the other machines to come (default: 900)")
    add("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Declare the flags that say where the ranks are."""
    add = parser.add_argument
    add("--nnodes", metavar="N", help="machines that run this command (default: 1)")
    add("--nproc-per-node", metavar="N", help="ranks of this machine: a number, auto, gpu or cpu")
    add("--node-rank", metavar="N", help="number of this machine, from 0")
    add("--master-addr", metavar="NAME", help="machine 0")
    add("--master-port", metavar="PORT", help=f"a free port there (default: {_DEFAULT_PORT})")
    add("--rdzv-id", metavar="ID", help="tells apart runs that share the port")
    add("--dns-seconds", metavar="S", help="time for the master's name to be known (default: 300)")


def _parse(name: str, text: str, read: Callable[[str], Value]) -> Value:
    try:
        return read(text.strip())
    except ValueError as error:
        raise ConfigError(name, str(error), value=text) from None


def _at_least(least: int, most: int | None = None) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
            raise ValueError(f"must be a whole number from {least}" + (f" to {most}" if most else " on"))
        return int(text)

    return read


_port = _at_least(1, 65535)


def _exit_code(text: str) -> int:
    code = _at_least(1, 255)(text)
    if code == EXIT_CONFIG:
        raise ValueError("means that a restart is in vain; choose another code")
    return code


def _nodes(text: str) -> int:
    """A number, or a range `n:n` that is none."""
    least, colon, most = text.partition(":")
    if colon and least != most:
        raise ValueError("a range of nodes is not supported: give the number that this gang has")
    return _at_least(1)(least)


def _ranks(text: str) -> str:
    return text if text in _NAMED_COUNTS else str(_read_count(text))


def _read_count(text: str) -> int:
    try:
        return _at_least(1)(text)
    except ValueError:
        raise ValueError("must be a whole number from 1 on, or auto, gpu or cpu") from None


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not 0 <= seconds < float("inf"):
        raise ValueError("must be a number of seconds")
    return seconds
