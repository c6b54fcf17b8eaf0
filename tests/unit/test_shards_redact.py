"""Redacting shards: what goes, what stays where it is, and what a run that has pinned a version is told."""

from __future__ import annotations

import gc
import io
import itertools
import json
import tarfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import webdataset
from conftest import MakeShards, WebServer, encode_image

from shards.cli import main
from shards.redact import Redactions, redact_samples
from streamswav.errors import ChangedError, StorageError
from streamswav.stream import redaction
from streamswav.stream.manifest import list_manifest
from streamswav.stream.redaction import find_redacted, newest_version, read_record, record_url
from streamswav.stream.select import Selection
from streamswav.stream.store import Store
from streamswav.stream.tar import Damage, TarSample, read_samples

STORE = Store()


def redact(folder: Path, *keys: str, store: Store = STORE, **options: Any) -> Redactions:
    shards = list_manifest([str(folder)], store).shards
    wanted = [("", key) if ":" not in key else tuple(key.split(":")) for key in keys]
    return redact_samples(shards, wanted, store, **options)  # type: ignore[arg-type]


def parse(path: Path) -> list[TarSample]:
    data = path.read_bytes()
    items = list(read_samples([data], size=len(data)))
    assert not [item for item in items if isinstance(item, Damage)]
    return [item for item in items if isinstance(item, TarSample)]


def version(path: Path) -> str:
    return STORE.info(str(path)).version


def record_of(path: Path) -> redaction.Record:
    record = read_record(STORE, str(path))
    assert record
    return record


@pytest.mark.parametrize("gone", [[0], [1, 2], [4], [0, 1, 2, 3, 4]])
def test_the_bytes_of_a_sample_are_zeros_and_all_else_stays_where_it_is(
    tmp_path: Path, make_shards: MakeShards, gone: list[int]
) -> None:
    (path,) = make_shards(tmp_path, counts=[5])
    before, bytes_before = parse(path), path.read_bytes()
    redact(tmp_path, *(f"0_{index}" for index in gone))
    after, bytes_after = parse(path), path.read_bytes()
    expected = bytearray(bytes_before)
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        assert (new.ordinal, new.start, new.stop) == (old.ordinal, old.start, old.stop)
        if index in gone:
            assert new.key == f"redacted-{index:08d}"
            assert Selection.none().judge(new, "s.tar") == ("excluded", "redacted")
            assert new.members == {"tombstone": bytes(old.stop - old.start - 512)}
            expected[old.start + 512 : old.stop] = bytes(old.stop - old.start - 512)
            expected[old.start : old.start + 512] = bytes_after[old.start : old.start + 512]
            assert f"0_{index}".encode() not in bytes_after
        else:
            assert new == old
    assert bytes_after == expected


def test_tarfile_and_webdataset_read_what_is_left(tmp_path: Path, make_shards: MakeShards) -> None:
    (path,) = make_shards(tmp_path, counts=[4])
    redact(tmp_path, "0_0", "0_2")
    with tarfile.open(path) as archive:
        names = [member.name for member in archive]
        held = archive.extractfile("redacted-00000002.tombstone")
        assert held
        assert not any(held.read())
    assert [name.partition(".")[0] for name in names] == [
        "redacted-00000000",
        *["0_1"] * 2,
        "redacted-00000002",
        *["0_3"] * 2,
    ]
    with warnings.catch_warnings():  # webdataset leaves its file open
        warnings.simplefilter("ignore", ResourceWarning)
        samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
        gc.collect()
    assert [sample["__key__"] for sample in samples] == [
        "redacted-00000000",
        "0_1",
        "redacted-00000002",
        "0_3",
    ]
    assert samples[1]["jpg"] == encode_image(1)


@pytest.mark.parametrize("style", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_and_members_of_no_sample_go_too(tmp_path: Path, style: int) -> None:
    key, path = "photos/" + "n" * 200 + "/Jürgen", tmp_path / "a.tar"
    with tarfile.open(path, "w", format=style, pax_headers={"comment": "Jürgen"}) as archive:
        for name in (f"{key}.jpg", f"{key}.json", "other.jpg"):
            folder = tarfile.TarInfo(name.rpartition("/")[0] or "folder")
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
            member = tarfile.TarInfo(name)
            member.size = 700
            archive.addfile(member, io.BytesIO(b"x" * 700))
    _, other = parse(path)
    assert redact(tmp_path, key).samples == {str(path): 1}
    assert [sample.key for sample in parse(path)] == ["redacted-00000000", "other"]
    assert parse(path)[1] == other
    data = path.read_bytes()
    assert b"nnn" not in data
    assert "Jürgen".encode() not in data


def test_a_shard_without_its_last_padding_keeps_its_length(tmp_path: Path, make_shards: MakeShards) -> None:
    (path,) = make_shards(tmp_path, counts=[2], image=lambda number: b"i" * 600, labels=False)
    last = parse(path)[-1]
    path.write_bytes(path.read_bytes()[: last.start + 512 + 600])
    redact(tmp_path, "0_1")
    assert path.stat().st_size == last.start + 512 + 600
    data = path.read_bytes()
    *_, tombstone, end = read_samples([data], size=len(data))
    assert isinstance(tombstone, TarSample)
    assert tombstone.members == {"tombstone": bytes(600)}
    assert isinstance(end, Damage)


def test_a_key_goes_everywhere_or_in_the_shard_that_is_named(tmp_path: Path, make_shards: MakeShards) -> None:
    for name in "ab":
        make_shards(tmp_path / name, counts=[2, 1])
    done = redact(tmp_path, "0_1", "b/shard-000000.tar:0_0", "a/shard-000001.tar:0_0")
    assert [
        (Path(shard).relative_to(tmp_path).as_posix(), count) for shard, count in done.samples.items()
    ] == [
        ("a/shard-000000.tar", 1),
        ("b/shard-000000.tar", 2),
    ]
    assert done.missing == [("a/shard-000001.tar", "0_0")]
    assert [sample.key for sample in parse(tmp_path / "a/shard-000000.tar")] == ["0_0", "redacted-00000001"]


def test_only_shards_that_are_named_are_read(tmp_path: Path, make_shards: MakeShards) -> None:
    one, other = make_shards(tmp_path, counts=[2, 2])
    other.write_bytes(other.read_bytes()[:2000])
    assert redact(tmp_path, "shard-000000.tar:0_1").unsearched == []
    ((shard, damage),) = redact(tmp_path, "0_1", dry_run=True).unsearched
    assert (shard, damage.reason) == (str(other), "truncated")
    assert read_record(STORE, str(one))
    assert not read_record(STORE, str(other))


def test_the_record_tells_what_went_and_no_names(tmp_path: Path, make_shards: MakeShards) -> None:
    (path,) = make_shards(tmp_path, counts=[3])
    manifest, first, sample = list_manifest([str(tmp_path)], STORE), version(path), parse(path)[1]
    redact(tmp_path, "0_1")
    text = Path(record_url(str(path))).read_text()
    values = json.loads(text)
    assert (values["versions"], values["pending"]) == ([first, version(path)], None)
    assert values["size"] == path.stat().st_size
    assert "0_1" not in text
    assert find_redacted(STORE, str(path), "0_1") == [(1, sample.start, sample.stop)]
    assert find_redacted(STORE, str(path), "0_2") == []
    assert list_manifest([str(tmp_path)], STORE).digest == manifest.digest


def test_redacting_again_changes_nothing(tmp_path: Path, make_shards: MakeShards) -> None:
    (path,) = make_shards(tmp_path, counts=[3])
    redact(tmp_path, "0_1")
    pinned, record = version(path), record_of(path)
    again = redact(tmp_path, "0_1")
    assert (again.samples, again.missing) == ({}, [])
    assert (version(path), record_of(path)) == (pinned, record)


def test_a_run_that_pinned_any_version_of_the_chain_goes_on_with_the_last(
    tmp_path: Path, make_shards: MakeShards
) -> None:
    (path,) = make_shards(tmp_path, counts=[3])
    versions = [version(path)]
    for key in ("0_1", "0_0"):
        redact(tmp_path, key)
        versions.append(version(path))
    assert len(set(versions)) == 3
    assert [newest_version(STORE, str(path), each) for each in versions] == [versions[-1]] * 3
    assert newest_version(STORE, str(path), "0") is None
    assert [each.ordinal for each in record_of(path).samples] == [1, 0]


def test_any_other_replacement_is_refused_and_begins_a_new_chain(
    tmp_path: Path, make_shards: MakeShards
) -> None:
    path, other = make_shards(tmp_path, counts=[3, 3])
    first = version(path)
    assert newest_version(STORE, str(other), version(other)) is None
    redact(tmp_path, "0_1")
    second = version(path)
    make_shards(tmp_path, counts=[3], seed=7)
    third = version(path)
    assert newest_version(STORE, str(path), first) is None
    assert newest_version(STORE, str(path), second) is None
    redact(tmp_path, "0_2")
    assert [newest_version(STORE, str(path), each) for each in (first, second)] == [None, None]
    assert newest_version(STORE, str(path), third) == version(path)
    assert find_redacted(STORE, str(path), "0_1") == []


class CrashingStore(Store):
    """A store whose process dies after so many writes."""

    left = 0

    def write(self, url: str, data: bytes) -> None:
        self._spend(url)
        super().write(url, data)

    def upload(self, path: Path, url: str) -> None:
        self._spend(url)
        super().upload(path, url)

    def _spend(self, url: str) -> None:
        if not self.left:
            raise StorageError(url, "killed")
        self.left -= 1


@pytest.mark.parametrize("writes", [0, 1, 2])
@pytest.mark.parametrize("then", ["0_1", "0_2"])
def test_what_was_interrupted_is_completed_by_the_next_run(
    tmp_path: Path, make_shards: MakeShards, writes: int, then: str
) -> None:
    (path,) = make_shards(tmp_path, counts=[4])
    redact(tmp_path, "0_3")
    pinned = version(path)
    crashing = CrashingStore()
    crashing.left = writes
    with pytest.raises(StorageError, match="killed"):
        redact(tmp_path, "0_1", store=crashing)
    assert newest_version(STORE, str(path), pinned, patience_seconds=0) == (None if writes == 2 else pinned)
    assert redact(tmp_path, then).missing == []
    record = record_of(path)
    assert record.pending is None
    assert newest_version(STORE, str(path), pinned) == version(path) == record.versions[-1]
    gone = {"0_3", then} | ({"0_1"} if writes == 2 else set())
    assert {f"0_{each.ordinal}" for each in record.samples} == gone
    assert [sample.key for sample in parse(path)] == [
        f"redacted-{index:08d}" if f"0_{index}" in gone else f"0_{index}" for index in range(4)
    ]


def test_a_reader_waits_for_a_redaction_under_way(
    tmp_path: Path, make_shards: MakeShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = make_shards(tmp_path, counts=[2])
    pinned = version(path)
    crashing = CrashingStore()
    crashing.left = 2
    with pytest.raises(StorageError, match="killed"):
        redact(tmp_path, "0_1", store=crashing)
    polls = itertools.count(1)

    def sleep(_: float) -> None:
        if next(polls) == 3:
            redact(tmp_path, "0_1")

    monkeypatch.setattr(redaction.time, "sleep", sleep)
    assert newest_version(STORE, str(path), pinned) == version(path)
    assert next(polls) == 4


def test_a_shard_that_changes_while_it_is_searched_is_left_alone(
    tmp_path: Path, make_shards: MakeShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = make_shards(tmp_path, counts=[2])
    download = Store.download

    def replace_then_download(store: Store, url: str, to: Path) -> None:
        make_shards(tmp_path, counts=[2], seed=5)
        download(store, url, to)

    monkeypatch.setattr(Store, "download", replace_then_download)
    with pytest.raises(ChangedError, match="run this again"):
        redact(tmp_path, "0_1")
    assert [sample.key for sample in parse(path)] == ["0_0", "0_1"]
    assert read_record(STORE, str(path)) is None


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"size": 1, "versions": 3}', "null"])
def test_a_record_that_is_none_vouches_for_nothing(
    tmp_path: Path, make_shards: MakeShards, content: str
) -> None:
    (path,) = make_shards(tmp_path, counts=[2])
    Path(record_url(str(path))).write_text(content)
    assert newest_version(STORE, str(path), version(path)) is None
    assert find_redacted(STORE, str(path), "0_1") == []


def test_shards_behind_a_web_server_are_vouched_for_but_not_written(
    web: WebServer, make_shards: MakeShards, capsys: pytest.CaptureFixture[str]
) -> None:
    (path,) = make_shards(web.folder, counts=[2])
    url = f"{web.url}/{path.name}"
    pinned = STORE.info(url).version
    assert main(["redact", url, "--key", "0_1"]) == 78
    assert "read only" in capsys.readouterr().err
    redact(web.folder, "0_1")
    now = STORE.info(url).version
    assert now != pinned
    assert newest_version(STORE, url, pinned) == now
    assert newest_version(STORE, f"{url}?signed=1", pinned) == now
    assert "/shard-000000.tar.redacted.json" in {request[1] for request in web.requests}


def test_the_command_tells_what_it_did_and_what_it_did_not_find(
    tmp_path: Path, make_shards: MakeShards, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = make_shards(tmp_path / "data", counts=[3, 2])
    contents = one.read_bytes(), other.read_bytes()
    (tmp_path / "keys").write_text("# asked on Monday\n0_0\n0_2\n1_9\n")
    command = ["redact", str(tmp_path / "data"), "--keys", str(tmp_path / "keys"), "--key", "1_1"]
    assert main([*command, "--dry-run"]) == 1
    out, error = capsys.readouterr()
    assert out == (
        f"{one}: 2 samples\n{other}: 1 sample\n"
        "3 samples would be redacted in 2 of 2 shards, 1 key not found\n"
    )
    assert error == "not found: 1_9\n"
    assert (one.read_bytes(), other.read_bytes()) == contents
    assert not list((tmp_path / "data").glob("*.json"))
    assert main(command) == 1
    assert "3 samples redacted in 2 of 2 shards, 1 key not found\n" in capsys.readouterr().out
    assert main(["redact", str(tmp_path / "data"), "--key", "0_0", "--key", "shard-000001.tar:1_1"]) == 0
    assert capsys.readouterr() == ("no samples redacted in 0 of 2 shards, no keys not found\n", "")
    assert main(["verify", str(tmp_path / "data"), "--workers", "1"]) == 0
    capsys.readouterr()
    assert main(["describe", str(tmp_path / "data"), "--json", "--workers", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["damaged"] == {"redacted": 3}


@pytest.mark.parametrize("keys", [[], ["--key", "0_1.jpg"], ["--keys", "nowhere"]])
def test_keys_that_cannot_be_are_one_line_and_code_78(
    tmp_path: Path, make_shards: MakeShards, keys: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    make_shards(tmp_path, counts=[2])
    assert main(["redact", str(tmp_path), *keys]) == 78
    assert capsys.readouterr().err.count("\n") == 1
