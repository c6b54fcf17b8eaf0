"""Redacting shards on a real S3 server, while a reader has their versions pinned."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path

import pytest
import webdataset
from conftest import MakeShards, S3Server, encode_image

from shards.cli import main
from streamswav.errors import ChangedError
from streamswav.stream.manifest import Shard, list_manifest
from streamswav.stream.redaction import find_redacted, newest_version
from streamswav.stream.store import Store
from streamswav.stream.tar import TarSample, read_samples


def read(store: Store, shard: Shard, version: str, start: int = 0, ordinal: int = 0) -> list[TarSample]:
    data = store.read_range(shard.url, start, shard.size, version=version)
    items = list(read_samples([data], size=shard.size, start=start, ordinal=ordinal))
    assert all(isinstance(item, TarSample) for item in items)
    return [item for item in items if isinstance(item, TarSample)]


def test_a_reader_goes_on_in_a_redacted_shard_where_it_was(
    s3: S3Server, make_shards: MakeShards, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket, folder = s3.make_bucket()
    make_shards(folder / "data", counts=[4, 4])
    store = Store(s3.section)
    manifest = list_manifest([f"{bucket}/data"], store)
    shard, other = manifest.shards
    before = read(store, shard, shard.version)
    assert main(["redact", f"{bucket}/data", "--key", "0_2", "--endpoint-url", s3.endpoint]) == 0
    out = f"{bucket}/data/shard-000000.tar: 1 sample\n1 sample redacted in 1 of 2 shards, no keys not found\n"
    assert capsys.readouterr().out == out
    with pytest.raises(ChangedError):
        read(store, shard, shard.version, before[1].start, 1)
    version = newest_version(store, shard.url, shard.version)
    assert version not in (None, shard.version)
    after = read(store, shard, str(version), before[1].start, 1)
    assert (after[0], after[2]) == (before[1], before[3])
    assert (after[1].key, set(after[1].members)) == ("redacted-00000002", {"tombstone"})
    assert (after[1].ordinal, after[1].start, after[1].stop) == (2, before[2].start, before[2].stop)
    assert find_redacted(store, shard.url, "0_2") == [(2, before[2].start, before[2].stop)]
    assert newest_version(store, other.url, other.version) is None
    assert list_manifest([f"{bucket}/data"], store).digest == manifest.digest


def test_nothing_of_the_sample_is_left_and_webdataset_reads_the_others(
    s3: S3Server, make_shards: MakeShards
) -> None:
    bucket, folder = s3.make_bucket()
    (path,) = make_shards(folder / "data", counts=[4])
    (folder / "keys").write_text("0_0\nshard-000000.tar:0_2\n")
    place = ["--endpoint-url", s3.endpoint]
    assert main(["redact", f"{bucket}/data", "--keys", f"{bucket}/keys", *place]) == 0
    data = Store(s3.section).read(f"{bucket}/data/shard-000000.tar")
    assert not [
        trace for trace in (b"0_0", b"0_2", encode_image(0)[-64:], encode_image(2)[-64:]) if trace in data
    ]
    with warnings.catch_warnings():  # webdataset leaves its file open
        warnings.simplefilter("ignore", ResourceWarning)
        samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
        gc.collect()
    images = {sample["__key__"]: sample.get("jpg") for sample in samples}
    assert images == {
        "redacted-00000000": None,
        "0_1": encode_image(1),
        "redacted-00000002": None,
        "0_3": encode_image(3),
    }


def test_a_shard_that_was_replaced_in_another_way_is_not_accepted(
    s3: S3Server, make_shards: MakeShards, tmp_path: Path
) -> None:
    bucket, folder = s3.make_bucket()
    make_shards(folder / "data", counts=[3])
    store = Store(s3.section)
    (shard,) = list_manifest([f"{bucket}/data"], store).shards
    (other,) = make_shards(tmp_path, counts=[3], seed=5)
    store.upload(other, shard.url)
    assert newest_version(store, shard.url, shard.version) is None
    (replaced,) = list_manifest([f"{bucket}/data"], store).shards
    assert main(["redact", shard.url, "--key", "0_1", "--endpoint-url", s3.endpoint]) == 0
    assert newest_version(store, shard.url, shard.version) is None
    redacted = store.info(shard.url).version
    assert newest_version(store, shard.url, replaced.version) == redacted
    store.upload(other, shard.url)
    assert newest_version(store, shard.url, redacted) is None
