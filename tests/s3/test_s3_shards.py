"""The shard tools against a real S3 server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import S3Server, encode_image

from shards.cli import main
from streamswav.stream.store import Store


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for index in range(7):
        path = tmp_path / "in" / f"class{index % 2}" / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_image(index))
    return tmp_path / "in"


def test_shards_are_built_verified_and_described_on_s3(
    s3: S3Server, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket, _ = s3.make_bucket()
    place = ["--endpoint-url", s3.endpoint]
    build = ["build", str(images), f"{bucket}/data", "--samples-per-shard", "3", *place]
    assert main(build) == 0
    out = capsys.readouterr().out
    assert out.startswith("7 samples in 3 shards, ")
    assert f"--stream.urls {bucket}/data --storage.endpoint_url {s3.endpoint}" in out
    names = [info.url.rpartition("/")[2] for info in Store(s3.section).list(f"{bucket}/data")]
    assert names == ["_stats.json", "classes.json", *(f"train-00000{number}.tar" for number in range(3))]
    assert main(["verify", f"{bucket}/data", "--workers", "2", *place]) == 0
    assert capsys.readouterr().out == "7 samples in 3 shards, no problems\n"
    assert main(["describe", f"{bucket}/data/train-*.tar", "--json", "--workers", "1", *place]) == 0
    assert json.loads(capsys.readouterr().out)["labels"] == {"0": 4, "1": 3}
    assert main(build) == 78


def test_shards_on_s3_are_the_bytes_of_those_in_a_folder(s3: S3Server, images: Path, tmp_path: Path) -> None:
    bucket, folder = s3.make_bucket()
    assert main(["build", str(images), f"{bucket}/data", "--endpoint-url", s3.endpoint]) == 0
    assert main(["build", str(images), str(tmp_path / "out")]) == 0
    for path in (tmp_path / "out").iterdir():
        assert (folder / "data" / path.name).read_bytes() == path.read_bytes()


def test_a_truncated_shard_on_s3_is_found(
    s3: S3Server, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket, folder = s3.make_bucket()
    assert main(["build", str(images), f"{bucket}/data", "--endpoint-url", s3.endpoint]) == 0
    shard = folder / "data/train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:5000])
    assert main(["verify", f"{bucket}/data", "--endpoint-url", s3.endpoint, "--workers", "1"]) == 1
    assert "truncated" in capsys.readouterr().out


def test_wrong_keys_are_one_line_and_code_78(
    s3: S3Server, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket, _ = s3.make_bucket()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    monkeypatch.setenv("STREAMSWAV_STORAGE__ENDPOINT_URL", s3.endpoint)
    assert main(["build", str(images), f"{bucket}/data"]) == 78
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    assert "secret key does not belong" in error
