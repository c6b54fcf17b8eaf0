"""What the tests of `streamswav doctor` share: cases, and the page that they are held against."""

from __future__ import annotations

from pathlib import Path

from runs import TINY, free_port
from tables import tables

from streamswav.config import load_config
from streamswav.defaults import FINETUNE_BASE
from streamswav.doctor import CHECKS, Case, exit_code, run_checks
from streamswav.launch_options import LaunchOptions

PAGE = (Path(__file__).parents[1] / "ops" / "doctor.md").read_text()
TABLES = {table[0][0]: table for table in tables(PAGE)}
ROWS = {row[0]: row[1:] for row in TABLES["broken on purpose"][1:]}
BY_NAME = {check.name: check for check in CHECKS}
ALL = tuple(BY_NAME)


def config(*, base=None, **keys):
    """The tiny run's configuration with keys such as `stream__urls`."""
    given = {**TINY, **{key.replace("__", "."): value for key, value in keys.items()}}
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    return load_config(None, {}, words, base=base or {})


def case(given=None, *, command="pretrain", **parts):
    return Case(command=command, given=given or config(), **parts)


def on_s3(server, url, **keys):
    """A configuration whose storage is a server."""
    endpoint = getattr(server, "endpoint", None) or server.url
    return config(storage__endpoint_url=endpoint, stream__urls=url, **keys)


def look(asked, *names):
    """Run checks one after the other, as the command does, and return the last one's finding."""
    *_, last = run_checks([BY_NAME[name] for name in names], asked)
    return last.finding


def shown(fault, asked, *before):
    """Run the check that ops/doctor.md names for a fault, and hold what it says against the page."""
    name, status, code, says, remedy, _ = ROWS[fault]
    *_, result = run_checks([BY_NAME[each] for each in (*before, name.strip("`"))], asked)
    found = result.finding
    assert found.status == status, found
    assert says.strip('"') in found.text, found
    assert remedy.strip('"') in found.remedy, found
    assert str(exit_code([result], strict=False)) == code, found
    return found


def finetuning(shards, **keys):
    given = {"crops.sizes": "[16]", "crops.counts": "[1]", "crops.scales": "[[0.3, 1.0]]"}
    named = {key.replace(".", "__"): value for key, value in given.items()}
    return config(base=FINETUNE_BASE, stream__urls=shards, **named, **keys)


def of_two(**changes):
    port = changes.pop("port", None) or free_port()
    return LaunchOptions(
        nodes=2, address=changes.pop("address", "127.0.0.1"), port=port, dns_seconds=0, **changes
    )
