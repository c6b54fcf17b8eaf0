"""Building shards from folders, idx files and torchvision, and reading them back with webdataset."""

from __future__ import annotations

import gc
import gzip
import io
import json
import struct
import sys
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import webdataset
from conftest import encode_image
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from shards.build import BuildOptions, build
from shards.cli import main
from shards.sources import open_source, unique_keys
from streamswav.errors import ConfigError, DecodeError, ManifestError, NotFoundError, UnsupportedError
from streamswav.stream.store import Store
from streamswav.stream.tar import TarSample, read_samples


def write_classes(folder: Path, counts: dict[str, int]) -> dict[str, bytes]:
    """Write a folder of images for each class; return the bytes by path."""
    files = {}
    for label, (name, count) in enumerate(counts.items()):
        for index in range(count):
            path = folder / name / f"img_{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_image(100 * label + index))
            files[f"{name}/img_{index}"] = path.read_bytes()
    return files


def write_idx(
    folder: Path, split: str, images: NDArray[np.uint8], labels: list[int], *, packed: bool = True
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    heads = {
        f"{split}-images-idx3-ubyte": struct.pack(">I3I", 0x803, *images.shape) + images.tobytes(),
        f"{split}-labels-idx1-ubyte": struct.pack(">2I", 0x801, len(labels)) + bytes(labels),
    }
    for name, data in heads.items():
        (folder / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(data) if packed else data)


def read_with_webdataset(folder: Path) -> list[dict[str, bytes]]:
    """Read all shards of a folder by webdataset's own pipeline, undecoded."""
    tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its files to the collector
        samples = list(webdataset.WebDataset(tars, shardshuffle=False, handler=webdataset.reraise_exception))
        gc.collect()
    return samples


def read_strictly(path: Path) -> list[TarSample]:
    data = path.read_bytes()
    samples = [item for item in read_samples([data], size=len(data)) if isinstance(item, TarSample)]
    assert len(samples) == len(list(read_samples([data], size=len(data))))
    return samples


def make(
    source: Path | str, folder: Path, options: BuildOptions | None = None, *, split: str = "train"
) -> None:
    build(open_source(str(source), split=split), str(folder), Store(), options or BuildOptions())


def test_webdataset_reads_what_was_built_with_bytes_and_labels_kept(tmp_path: Path) -> None:
    files = write_classes(tmp_path / "in", {"cat": 4, "dog": 3, "eel": 2})
    make(tmp_path / "in", tmp_path / "out", BuildOptions(samples_per_shard=4))
    samples = read_with_webdataset(tmp_path / "out")
    assert {sample["__key__"]: sample["jpg"] for sample in samples} == files
    classes = json.loads((tmp_path / "out/classes.json").read_text())
    assert classes == ["cat", "dog", "eel"]
    for sample in samples:
        assert classes[int(sample["cls"])] == str(sample["__key__"]).split("/")[0]


def test_the_strict_parser_reads_what_was_built(tmp_path: Path) -> None:
    files = write_classes(tmp_path / "in", {"cat": 2, "dog": 2})
    make(tmp_path / "in", tmp_path / "out", BuildOptions(shuffle=None))
    samples = read_strictly(tmp_path / "out/train-000000.tar")
    assert [(sample.key, sample.members["jpg"]) for sample in samples] == list(files.items())
    assert [sample.members["cls"] for sample in samples] == [b"0", b"0", b"1", b"1"]


def test_the_same_source_makes_the_same_bytes(tmp_path: Path) -> None:
    write_classes(tmp_path / "in", {"cat": 5, "dog": 5})
    for name in ("one", "two"):
        make(tmp_path / "in", tmp_path / name, BuildOptions(samples_per_shard=3))
    one = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert one == {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()}
    assert len(one) == 4 + 2
    make(tmp_path / "in", tmp_path / "three", BuildOptions(samples_per_shard=3, shuffle=1))
    assert (tmp_path / "three/train-000000.tar").read_bytes() != one["train-000000.tar"]


def test_shards_end_at_the_count_or_at_the_size(tmp_path: Path) -> None:
    write_classes(tmp_path / "in", {"a": 10})
    make(tmp_path / "in", tmp_path / "count", BuildOptions(samples_per_shard=4))
    assert [len(read_strictly(path)) for path in sorted((tmp_path / "count").glob("*.tar"))] == [4, 4, 2]
    make(tmp_path / "in", tmp_path / "size", BuildOptions(bytes_per_shard=9000))
    shards = sorted((tmp_path / "size").glob("*.tar"))
    assert 3 < len(shards) < 10
    assert sum(len(read_strictly(path)) for path in shards) == 10
    make(tmp_path / "in", tmp_path / "tiny", BuildOptions(bytes_per_shard=1))
    assert len(list((tmp_path / "tiny").glob("*.tar"))) == 10


def test_statistics_count_what_the_shards_hold(tmp_path: Path) -> None:
    write_classes(tmp_path / "in", {"a": 5, "b": 2})
    make(tmp_path / "in", tmp_path / "out", BuildOptions(samples_per_shard=3, prefix="pics"))
    stats = json.loads((tmp_path / "out/_stats.json").read_text())
    paths = sorted((tmp_path / "out").glob("*.tar"))
    assert stats["shards"] == {
        path.name: {"samples": len(read_strictly(path)), "bytes": path.stat().st_size} for path in paths
    }
    assert [path.name for path in paths] == [f"pics-00000{number}.tar" for number in range(3)]
    assert (stats["samples"], stats["classes"], stats["skipped"]) == (7, ["a", "b"], 0)
    assert stats["bytes"] == sum(path.stat().st_size for path in paths)


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    (tmp_path / "in/more").mkdir(parents=True)
    (tmp_path / "in/a.png").write_bytes(encode_image(1, kind="PNG"))
    (tmp_path / "in/more/b.jpeg").write_bytes(encode_image(2))
    make(tmp_path / "in", tmp_path / "out", BuildOptions(shuffle=None))
    samples = read_strictly(tmp_path / "out/train-000000.tar")
    assert [(sample.key, list(sample.members)) for sample in samples] == [("a", ["png"]), ("more/b", ["jpg"])]
    assert not (tmp_path / "out/classes.json").exists()


def test_extensions_follow_the_bytes_and_not_the_file_name(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for index, kind in enumerate(("PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG")):
        (tmp_path / f"in/{index}.jpg").write_bytes(encode_image(index, kind=kind))
    make(tmp_path / "in", tmp_path / "out", BuildOptions(shuffle=None))
    samples = read_strictly(tmp_path / "out/train-000000.tar")
    kinds = ["png", "webp", "gif", "bmp", "tiff", "ppm", "jpg"]
    assert [list(sample.members) for sample in samples] == [[kind] for kind in kinds]
    assert all(sample.image for sample in samples)


def test_dots_in_names_make_neither_extensions_nor_collisions(tmp_path: Path) -> None:
    names = ["v1.0/a.b.jpg", "v1.0/a_b.jpg", "v1.0/a.b.png", "v1.0/a.b.c.jpg"]
    for index, name in enumerate(names):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_image(index))
    make(tmp_path / "in", tmp_path / "out", BuildOptions(shuffle=None))
    samples = read_with_webdataset(tmp_path / "out")
    assert len({sample["__key__"] for sample in samples}) == 4
    assert all(set(sample) >= {"__key__", "jpg", "cls"} for sample in samples)
    assert sorted(sample["jpg"] for sample in samples) == sorted(encode_image(index) for index in range(4))


@given(st.lists(st.text("ab.-_2/", min_size=1, max_size=6).map(lambda name: f"{name}.jpg"), unique=True))
def test_keys_are_unique_and_without_dots(files: list[str]) -> None:
    keys = unique_keys(files)
    assert len(set(keys)) == len(files)
    assert not any("." in key for key in keys)


def test_long_and_foreign_names_survive(tmp_path: Path) -> None:
    name = "ü" * 60 + "/" + "n" * 120
    path = tmp_path / "in" / f"{name}.jpg"
    path.parent.mkdir(parents=True)
    path.write_bytes(encode_image(1))
    make(tmp_path / "in", tmp_path / "out")
    assert [sample.key for sample in read_strictly(tmp_path / "out/train-000000.tar")] == [name]
    assert [sample["__key__"] for sample in read_with_webdataset(tmp_path / "out")] == [name]


def test_unreadable_files_are_skipped_and_counted_or_an_error_if_strict(tmp_path: Path) -> None:
    write_classes(tmp_path / "in", {"a": 3})
    (tmp_path / "in/a/text.jpg").write_text("this is no image")
    (tmp_path / "in/a/empty.png").touch()
    (tmp_path / "in/a/dangling.jpg").symlink_to("nowhere")
    (tmp_path / "in/a/notes.txt").write_text("not taken for an image in the first place")
    built = build(open_source(str(tmp_path / "in")), str(tmp_path / "out"), Store(), BuildOptions())
    assert built.samples == 3
    assert len(built.skipped) == 3
    assert {reason.partition(":")[0] for reason in built.skipped} == {"not_an_image", "empty", "unreadable"}
    assert all("a/" in reason for reason in built.skipped)
    assert json.loads((tmp_path / "out/_stats.json").read_text())["skipped"] == 3
    with pytest.raises(DecodeError):
        make(tmp_path / "in", tmp_path / "strict", BuildOptions(strict=True))


def test_a_source_without_a_single_image_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(NotFoundError, match="no images"):
        make(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in/a.jpg").write_text("no image")
    with pytest.raises(ManifestError, match="not_an_image"):
        make(tmp_path / "in", tmp_path / "out")
    with pytest.raises(NotFoundError, match="no such folder"):
        make(tmp_path / "none", tmp_path / "out")


def test_idx_files_become_lossless_png_with_labels(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 28, 28), dtype=np.uint8)
    labels = [index % 10 for index in range(30)]
    write_idx(tmp_path / "in", "train", images, labels)
    write_idx(tmp_path / "in", "t10k", images[:7], labels[:7], packed=False)
    make(tmp_path / "in", tmp_path / "train", BuildOptions(samples_per_shard=20))
    samples = read_with_webdataset(tmp_path / "train")
    assert len(samples) == 30
    for sample in samples:
        index = int(sample["__key__"])
        assert int(sample["cls"]) == labels[index]
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(sample["png"]))), images[index])
    make(tmp_path / "in", tmp_path / "test", split="test")
    assert len(read_with_webdataset(tmp_path / "test")) == 7


def test_damaged_idx_files_are_refused(tmp_path: Path) -> None:
    images = np.zeros((3, 4, 4), dtype=np.uint8)
    write_idx(tmp_path / "counts", "train", images, [0, 1])
    write_idx(tmp_path / "magic", "train", images, [0, 1, 2], packed=False)
    file = tmp_path / "magic/train-images-idx3-ubyte"
    file.write_bytes(b"\0\0\x0d\3" + file.read_bytes()[4:])
    write_idx(tmp_path / "short", "train", images, [0, 1, 2])
    file = tmp_path / "short/train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-9])
    for name in ("counts", "magic", "short"):
        with pytest.raises(ConfigError, match="SOURCE"):
            open_source(str(tmp_path / name))
    with pytest.raises(NotFoundError, match="split test"):
        open_source(str(tmp_path / "counts"), split="test")


def test_torchvision_sets_are_read_from_their_root(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    for split in ("train", "t10k"):
        write_idx(tmp_path / "root/FashionMNIST/raw", split, images, [0, 1, 2, 3, 4], packed=False)
    source = open_source("torchvision:FashionMNIST", split="train", root=tmp_path / "root")
    assert source.classes[1] == "Trouser"
    build(source, str(tmp_path / "out"), Store(), BuildOptions(shuffle=None))
    samples = read_with_webdataset(tmp_path / "out")
    assert [int(sample["cls"]) for sample in samples] == [0, 1, 2, 3, 4]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(samples[2]["png"]))), images[2])


def test_torchvision_sets_that_read_files_keep_their_bytes(tmp_path: Path) -> None:
    files = write_classes(tmp_path / "root", {"cat": 2, "dog": 1})
    source = open_source("torchvision:ImageFolder", root=tmp_path / "root")
    assert source.classes == ["cat", "dog"]
    assert [source.read(index).data for index in range(3)] == list(files.values())


def test_an_unknown_torchvision_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="no such data set"):
        open_source("torchvision:Nonsense", root=tmp_path)
    with pytest.raises(NotFoundError, match="is not below"):
        open_source("torchvision:Cityscapes", root=tmp_path)


def test_a_package_that_a_torchvision_set_needs_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(UnsupportedError, match="scipy"):
        open_source("torchvision:ImageNet", root=tmp_path)


def test_a_destination_that_holds_anything_is_refused_unless_overwritten(tmp_path: Path) -> None:
    write_classes(tmp_path / "in", {"a": 5})
    make(tmp_path / "in", tmp_path / "out", BuildOptions(samples_per_shard=1))
    (tmp_path / "out/mine.txt").write_text("keep me")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(ConfigError, match="holds 8 objects"):
        make(tmp_path / "in", tmp_path / "out")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    make(tmp_path / "in", tmp_path / "out", BuildOptions(samples_per_shard=3, overwrite=True))
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["_stats.json", "classes.json", "mine.txt", "train-000000.tar", "train-000001.tar"]


def test_statistics_are_gone_while_shards_are_replaced(tmp_path: Path) -> None:
    write_classes(tmp_path / "in", {"a": 2})
    make(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in/a/broken.jpg").touch()
    with pytest.raises(DecodeError):
        make(tmp_path / "in", tmp_path / "out", BuildOptions(overwrite=True, strict=True))
    assert not (tmp_path / "out/_stats.json").exists()


def test_limit_takes_that_many_images(tmp_path: Path) -> None:
    write_classes(tmp_path / "in", {"a": 9})
    make(tmp_path / "in", tmp_path / "out", BuildOptions(limit=4))
    assert len(read_with_webdataset(tmp_path / "out")) == 4


def test_members_have_no_time_and_a_fixed_owner(tmp_path: Path) -> None:
    write_classes(tmp_path / "in", {"a": 1})
    make(tmp_path / "in", tmp_path / "out")
    with tarfile.open(tmp_path / "out/train-000000.tar") as tar:
        members = [(each.mtime, each.uname, each.gname, each.mode, each.uid) for each in tar]
    assert members == [(0, "streamswav", "streamswav", 0o444, 0)] * 2


def test_the_command_builds_and_names_the_next_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_classes(tmp_path / "in", {"a": 4})
    (tmp_path / "in/a/broken.jpg").touch()
    command = [
        "build",
        str(tmp_path / "in"),
        str(tmp_path / "out"),
        "--samples-per-shard",
        "3",
        "--split",
        "test",
    ]
    assert main(command) == 0
    out, error = capsys.readouterr()
    assert out.startswith("4 samples (1 skipped) in 2 shards, ")
    assert f"--stream.urls {tmp_path}/out" in out
    assert error == "skipped: empty: a/broken: no bytes\n"
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == [
        "test-000000.tar",
        "test-000001.tar",
    ]
    assert main(command) == 78
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    assert error.startswith("streamswav-shards: DEST")


def test_an_unwritable_destination_is_one_line_and_code_78(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_classes(tmp_path / "in", {"a": 1})
    (tmp_path / "file").touch()
    for place in (f"{tmp_path}/file/below", "/proc/streamswav", "https://host/prefix"):
        assert main(["build", str(tmp_path / "in"), place]) == 78
        out, error = capsys.readouterr()
        assert (out, error.count("\n")) == ("", 1)


@pytest.mark.parametrize(
    ("option", "value"),
    [("--samples-per-shard", "0"), ("--bytes-per-shard", "-3MB"), ("--bytes-per-shard", "x")],
)
def test_impossible_numbers_are_refused(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["build", "in", "out", option, value])
    assert caught.value.code == 78
    error = capsys.readouterr().err
    assert error.startswith(f"streamswav-shards: {option}: ")
    assert error.endswith("see `streamswav-shards build --help`\n")
    assert error.count("\n") == 1
