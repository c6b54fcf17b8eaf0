"""Checks of object storage: who asks, what time it is, what is listed, whether ranges and versions hold."""

from __future__ import annotations

import time

from streamswav.commands.audit_checks import count
from streamswav.doctor.case import Case
from streamswav.doctor.finding import Finding, NotLookedAtError, failed, passed, size, skipped, warned
from streamswav.doctor.running import Check
from streamswav.errors import (
    ChangedError,
    DeniedError,
    ManifestError,
    NotFoundError,
    StorageError,
    UnavailableError,
    UnsupportedError,
)
from streamswav.stream.manifest import Shard
from streamswav.stream.store import find_identity, redact

CLOCK_WARN_SECONDS = 30.0
CLOCK_FAIL_SECONDS = 900.0
"""S3 refuses signatures that are older or newer than 15 minutes."""

_RANGE_BYTES = 64 << 10
_REACH = (
    "see that this machine reaches storage.endpoint_url, or AWS where none is set: name, port, proxies, "
    "network policies; then try again"
)
_READ = "allow s3:GetObject below this prefix to the identity"


def check_identity(case: Case) -> Finding:
    """Find out whose requests S3 will see; never a key."""
    if not any(url.startswith("s3://") for url in _places(case)):
        raise NotLookedAtError("nothing lies in S3")
    found = find_identity(case.config.storage)
    who = f"{found.arn}, by {found.link}" if found.arn else f"credentials come from {found.link}"
    if case.config.storage.anonymous:
        who = found.link
    if found.expires:
        return warned(
            f"{who}: they are temporary, and nobody renews them",
            "use a role (IRSA, Pod Identity, instance), or a file that something renews",
        )
    if found.silence:
        return skipped(f"{who}; AWS (STS) was not reached to tell the ARN: {found.silence}")
    return passed(who if found.arn or case.config.storage.anonymous else f"{who}; this server knows no ARN")


def check_clock(case: Case) -> Finding:
    """Hold this machine's clock against the server's Date."""
    urls = [url for url in _places(case) if "://" in url and not url.startswith("file://")]
    if not urls:
        raise NotLookedAtError("all storage is local")
    case.after("identity")
    case.reach(urls[0], signed=False)  # a clock that is wrong is a reason why nobody is let in
    ahead = case.store.clock_ahead(urls[0].removeprefix("@"))
    if ahead is None:
        raise NotLookedAtError("the server tells no time")
    off = abs(ahead)
    text = f"this clock is {off:.0f} s {'behind' if ahead > 0 else 'ahead of'} the server's"
    remedy = "set the node's clock (chrony, NTP)"
    if off >= CLOCK_FAIL_SECONDS:
        return failed(f"{text}: S3 refuses signatures from 15 minutes on", remedy)
    if off >= CLOCK_WARN_SECONDS:
        return warned(f"{text}; from 15 minutes on S3 refuses signatures", remedy)
    return passed(f"within {max(1, round(off))} s of the server's")


def check_listing(case: Case) -> Finding:
    """List the shards, as a run does."""
    began = time.monotonic()
    try:
        manifest = case.shards
    except NotFoundError as error:
        if "://" in error.url:
            raise
        remedy = "correct stream.urls: it names a folder of this machine; a bucket is s3://BUCKET/PREFIX/"
        return failed(str(error), remedy)
    seconds = time.monotonic() - began
    counted = f", {count(manifest.samples, 'sample')}" if manifest.samples is not None else ""
    shards = count(len(manifest.shards), "shard")
    return passed(f"{shards}, {size(manifest.size)}{counted}, in {seconds:.1f} s")


def check_ranges(case: Case) -> Finding:
    """Read a range of the first shard of each URL, in the middle of it."""
    began, shards = time.monotonic(), _first_of_each(case)
    for shard in shards:
        start = shard.size // 2
        case.store.read_range(shard.url, start, min(start + _RANGE_BYTES, shard.size))
    milliseconds = 1000 * (time.monotonic() - began) / len(shards)
    return passed(f"a range of {redact(shards[0].url)} came in {milliseconds:.0f} ms")


def check_tags(case: Case) -> Finding:
    """Hold the versions of the listing against those that come with the bytes."""
    shards = _first_of_each(case)
    for shard in shards:
        if not shard.version:
            return warned(
                f"{redact(shard.url)} has neither an ETag nor a time of change: a shard that is replaced "
                "during the run is not noticed",
                "use a server that gives ETags, or replace no shards",
            )
        try:
            case.store.read_range(shard.url, 0, min(_RANGE_BYTES, shard.size), version=shard.version)
        except ChangedError as error:
            return failed(
                f"{error}: the listing and the object tell different versions",
                "wait until nobody writes to the shards; if it stays, a proxy or gateway changes ETags: go "
                "around it",
            )
    return passed(f"bytes come with the version of the listing ({len(shards)} looked at)")


def _first_of_each(case: Case) -> list[Shard]:
    """The first shard of each of the URLs."""
    first: dict[int, Shard] = {}
    for shard in case.shards.shards:
        first.setdefault(shard.source, shard)
    return list(first.values())


def _places(case: Case) -> list[str]:
    """All URLs that the configuration names for shards and for the run."""
    config = case.config
    given = [*config.stream.urls, config.run.directory, config.checkpoint.copy_to, *config.finetune.test]
    return [url for url in given if url]


CHECKS = (
    Check(
        "identity",
        check_identity,
        remedies={
            DeniedError: "give the pod a role or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY that are valid, "
            "or set storage.anonymous for a public bucket"
        },
    ),
    Check(
        "listing",
        check_listing,
        seconds=300,
        remedies={
            NotFoundError: "correct bucket and prefix in stream.urls, or storage.endpoint_url",
            DeniedError: "use credentials that the server knows (and see `clock`), and allow them "
            "s3:ListBucket on the bucket",
            ManifestError: "correct stream.urls: shards are objects whose names end in .tar",
            UnsupportedError: "correct stream.urls or the storage section as the line says",
            UnavailableError: _REACH,
            StorageError: "correct stream.urls or the storage section",
        },
    ),
    Check("clock", check_clock, remedies={UnavailableError: _REACH}),
    Check(
        "ranges",
        check_ranges,
        remedies={
            DeniedError: _READ,
            UnsupportedError: "use a server that honours ranges (S3, nginx); a proxy on the way may "
            "strip the Range header",
            ChangedError: "wait until nobody writes to the shards",
            UnavailableError: _REACH,
        },
    ),
    Check("tags", check_tags, remedies={DeniedError: _READ, UnavailableError: _REACH}),
)
