"""Verifying and describing shards, those of webdataset's own writer and damaged ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import MakeShards, encode_image

from shards.cli import main
from shards.describe import describe
from shards.scan import find_shards
from shards.verify import ShardCheck, verify
from streamswav.config import StorageSection
from streamswav.errors import DataError, ManifestError, NotFoundError
from streamswav.stream.store import Store

STORE = Store(StorageSection(block_bytes=4096))


def check(url: Path | str, workers: int = 1) -> list[ShardCheck]:
    return verify(find_shards(str(url), STORE), STORE, max_pixels=10**6, workers=workers)


def reasons(checks: list[ShardCheck]) -> list[str]:
    return [problem.reason for each in checks for problem in each.problems]


def damage(path: Path, change: Callable[[bytearray], None]) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def test_whole_shards_have_no_problems(tmp_path: Path, make_shards: MakeShards) -> None:
    make_shards(tmp_path, counts=[5, 3], kind="PNG")
    checks = check(tmp_path)
    assert [(Path(each.shard).name, each.samples) for each in checks] == [
        ("shard-000000.tar", 5),
        ("shard-000001.tar", 3),
    ]
    assert reasons(checks) == []


def test_a_truncated_shard_is_found(tmp_path: Path, make_shards: MakeShards) -> None:
    _, path = make_shards(tmp_path, counts=[3, 5], labels=False)
    cut = path.read_bytes().index(b"1_3.jpg") + 1000
    damage(path, lambda data: data.__delitem__(slice(cut, None)))
    first, second = check(tmp_path)
    assert first.problems == []
    assert [problem.reason for problem in second.problems] == ["truncated"]
    assert second.samples == 3


def test_a_cut_between_two_members_is_found(tmp_path: Path, make_shards: MakeShards) -> None:
    (path,) = make_shards(tmp_path, counts=[3], labels=False)
    end = path.read_bytes().rstrip(b"\0")
    path.write_bytes(end + bytes(-len(end) % 512))
    assert reasons(check(path)) == ["no_end_of_archive"]


def test_a_flipped_header_byte_is_found_with_its_offset(tmp_path: Path, make_shards: MakeShards) -> None:
    (path,) = make_shards(tmp_path, counts=[4], labels=False)
    offset = path.read_bytes().index(b"0_2.jpg")

    def flip(data: bytearray) -> None:
        data[offset] ^= 1

    damage(path, flip)
    (result,) = check(path)
    assert [(problem.offset, problem.reason) for problem in result.problems] == [(offset, "bad_header")]
    assert result.samples == 3


def test_an_undecodable_image_is_found_with_its_key(tmp_path: Path, make_shards: MakeShards) -> None:
    def image(number: int) -> bytes:
        return encode_image(number)[: 400 if number == 2 else None]

    (path,) = make_shards(tmp_path, counts=[4], image=image)
    (result,) = check(path)
    assert [(problem.key, problem.reason.partition(":")[0]) for problem in result.problems] == [
        ("0_2", "truncated")
    ]
    assert result.samples == 4


def test_an_image_that_is_too_large_is_found(tmp_path: Path, make_shards: MakeShards) -> None:
    make_shards(tmp_path, counts=[1], image=(1200, 1000), kind="PNG")
    assert [reason.partition(":")[0] for reason in reasons(check(tmp_path))] == ["too_large"]


def test_a_sample_without_an_image_is_found(tmp_path: Path, make_shards: MakeShards) -> None:
    make_shards(tmp_path, counts=[1], image=lambda number: b"text", kind="TXT")
    assert reasons(check(tmp_path)) == ["no_image: only cls, txt"]


def test_several_processes_find_the_same(tmp_path: Path, make_shards: MakeShards) -> None:
    paths = make_shards(tmp_path, counts=[2, 2, 2])
    damage(paths[1], lambda data: data.__delitem__(slice(3000, None)))
    assert check(tmp_path, workers=2) == check(tmp_path, workers=1)


def test_the_command_exits_with_1_and_a_table_if_there_are_problems(
    tmp_path: Path, make_shards: MakeShards, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = make_shards(tmp_path, counts=[2, 3], labels=False)
    assert main(["verify", str(tmp_path), "--workers", "1"]) == 0
    assert capsys.readouterr().out == "5 samples in 2 shards, no problems\n"
    damage(paths[1], lambda data: data.__delitem__(slice(1000, None)))
    assert main(["verify", f"{tmp_path}/shard-*.tar", "--workers", "1"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["SHARD", "OFFSET", "KEY", "REASON"]
    assert lines[1].split()[0] == str(paths[1])
    assert lines[1].split()[3] == "truncated"
    assert lines[-1].endswith("in 2 shards, 1 problems")


def test_counts_of_the_producer_are_held_against_the_shards(
    tmp_path: Path, make_shards: MakeShards, capsys: pytest.CaptureFixture[str]
) -> None:
    make_shards(tmp_path / "a", counts=[2, 3])
    counts = {"shard-000000.tar": {"samples": 2}, "shard-000001.tar": {"samples": 4}}
    counts["shard-000002.tar"] = {"samples": 9}
    (tmp_path / "a/_stats.json").write_text(json.dumps({"shards": counts}))
    assert main(["verify", str(tmp_path / "a"), "--workers", "1"]) == 1
    out = capsys.readouterr().out
    assert "3 samples, where _stats.json has 4" in out
    assert "shard-000002.tar  0       -    missing, though _stats.json names it" in out
    assert main(["verify", f"{tmp_path}/a/shard-000000.tar"]) == 0
    (tmp_path / "a/_stats.json").write_text("[]")
    assert main(["verify", str(tmp_path / "a")]) == DataError.exit_code


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"no \.tar objects"):
        find_shards(str(tmp_path), STORE)
    with pytest.raises(NotFoundError):
        find_shards(f"{tmp_path}/a.tar", STORE)


def test_describe_counts_what_is_there(tmp_path: Path, make_shards: MakeShards) -> None:
    make_shards(tmp_path / "a", counts=[4, 6], image=(48, 40), classes=5)
    make_shards(tmp_path / "b", counts=[3], image=(30, 20), kind="PNG", labels=False)
    shards = find_shards(str(tmp_path), STORE)
    found = describe(shards, STORE).to_json()
    assert (found["shards"], found["samples"]) == (3, 13)
    assert found["bytes"] == sum(info.size for info in shards)
    assert found["samples_per_shard"] == {"min": 3, "median": 4, "max": 6}
    assert found["width"] == {"min": 30, "median": 48, "max": 48}
    assert found["height"] == {"min": 20, "median": 40, "max": 40}
    assert found["resolutions"] == {"48x40": 10, "30x20": 3}
    assert found["formats"] == {"jpeg": 10, "png": 3}
    assert found["extensions"] == {"jpg": 10, "cls": 10, "png": 3}
    assert found["labels"] == {str(label): 2 for label in range(5)}
    assert found["classes"] == 5
    assert found["damaged"] == {}
    sizes = [len(encode_image(seed)) for seed in range(10)]
    sizes += [len(encode_image(seed, (30, 20), "PNG")) for seed in range(3)]
    assert found["bytes_per_image"]["max"] == max(sizes)
    assert describe(shards, STORE, workers=2).to_json() == found


def test_describe_counts_damage_and_goes_on(tmp_path: Path, make_shards: MakeShards) -> None:
    def image(number: int) -> bytes:
        return b"no image" if number == 1 else encode_image(number)

    paths = make_shards(tmp_path, counts=[3, 2], image=image)
    damage(paths[1], lambda data: data.__delitem__(slice(-2000, None)))
    found = describe(find_shards(str(tmp_path), STORE), STORE).to_json()
    assert found["damaged"]["not_an_image"] == 1
    assert found["formats"]["unknown"] == 1
    assert sum(found["resolutions"].values()) == found["samples"] - 1


def test_the_command_describes_for_people_and_for_machines(
    tmp_path: Path, make_shards: MakeShards, capsys: pytest.CaptureFixture[str]
) -> None:
    make_shards(tmp_path, counts=[1200], image=lambda number: encode_image(0))
    assert main(["describe", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 1200
    assert main(["describe", str(tmp_path)]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["samples"] in ("1,200", "a class  min 120, median 120, max 120")
    assert rows["formats"] == "jpeg 1,200"
    assert rows["classes"] == "10"
