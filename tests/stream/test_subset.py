"""Subsets of real shards: what is drawn, by whom it does not matter, and what lies in the folder then."""

import json
import multiprocessing
import os
import signal
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist
import webdataset
from conftest import encode_image
from distributed.ranks import run_ranks
from shard_parts import END, join, sample

from streamswav.config import LabelsSection, StorageSection, StreamSection
from streamswav.errors import ConfigError, DataError, DeniedError
from streamswav.stream import open_stream
from streamswav.stream.labels import Labels, load_labels
from streamswav.stream.select import load_selection
from streamswav.stream.store import Store
from streamswav.training.distributed import Ranks
from streamswav.transfer.subsets import write as subset_write
from streamswav.transfer.subsets.subset import SubsetRequest, draw_subset, draw_subsets


def draw(source, target, request=None, *, storage=None, labels=None, **options):
    wanted = SubsetRequest(**(request or {"per_class": 3}))
    storage, labels = storage or StorageSection(), labels or Labels.from_shards()
    return draw_subset([str(source)], wanted, str(target), storage=storage, labels=labels, **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def keys_in(folder):
    return json.loads((folder / "subset.json").read_text())["keys"]


@pytest.fixture
def source(make_shards, tmp_path):
    """100 images of 10 classes in 5 shards; keys are `SHARD_NUMBER`, the class is that of the number."""
    make_shards(tmp_path / "all", counts=[31, 9, 20, 17, 23], image=(12, 10))
    return tmp_path / "all"


def on_ranks(folder: Path, rank: int, group: dist.ProcessGroup) -> list[int]:
    drawn = draw(
        folder / "all", folder / "ranks", ranks=Ranks(rank, 2, group=group, control=group), workers=1
    )
    return sorted(drawn.counts.values())


def test_the_same_subset_is_drawn_by_any_number_of_ranks_and_workers(source, tmp_path):
    drawn = draw(source, tmp_path / "alone")
    assert (drawn.samples, dict(drawn.counts)) == (30, dict.fromkeys(range(10), 3))
    draw(source, tmp_path / "workers", workers=2)
    assert run_ranks(partial(on_ranks, tmp_path), 2, tmp_path / "talk") == [[3] * 10] * 2
    assert contents(tmp_path / "workers") == contents(tmp_path / "ranks") == contents(tmp_path / "alone")


def test_fewer_images_of_a_class_are_part_of_more_by_the_same_seed(source, tmp_path):
    wanted = {(n, seed): tmp_path / f"{n}-{seed}" for n in (2, 7) for seed in (0, 1)}
    requests = {str(folder): SubsetRequest(per_class=n, seed=seed) for (n, seed), folder in wanted.items()}
    passes = []
    found = draw_subsets(
        [str(source)],
        requests,
        storage=StorageSection(),
        labels=Labels.from_shards(),
        on_shard=lambda: passes.append(1),
    )
    assert len(passes) == 5, "one pass for all of them"
    assert [found[str(folder)].samples for folder in wanted.values()] == [20, 20, 70, 70]
    keys = {name: set(keys_in(folder)) for name, folder in wanted.items()}
    assert keys[2, 0] < keys[7, 0]
    assert keys[2, 1] < keys[7, 1]
    assert keys[2, 0] != keys[2, 1]


def test_what_was_drawn_is_read_by_webdataset_and_by_the_stream_as_it_was(source, tmp_path):
    drawn = draw(source, tmp_path / "subset", {"per_class": 4, "seed": 3})
    before = {each.key: each.members for each in open_stream(source)}
    here = {each.key: each.members for each in open_stream(list(drawn.urls))}
    assert here == {key: before[key] for key in keys_in(tmp_path / "subset")}
    shards = sorted(map(str, (tmp_path / "subset").glob("*.tar")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its files to the collector
        there = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert {each["__key__"]: {"jpg": each["jpg"], "cls": each["cls"]} for each in there} == here
    stats = json.loads((tmp_path / "subset/_stats.json").read_text())
    assert sum(each["samples"] for each in stats["shards"].values()) == stats["samples"] == 40
    assert {name: each["bytes"] for name, each in stats["shards"].items()} == {
        Path(name).name: Path(name).stat().st_size for name in shards
    }
    assert len(shards) == 5, "eight samples a shard, up to 16 shards"


def test_a_class_with_too_few_images_is_named_and_all_of_it_is_taken(source, tmp_path, caplog):
    drawn = draw(source, tmp_path / "subset", {"per_class": 11})
    assert drawn.samples == 100
    assert dict(drawn.short) == dict.fromkeys(range(10), 10)
    assert "10 classes have fewer than 11 images: 0 (10), 1 (10)" in caplog.text
    few = draw(source, tmp_path / "few", {"per_class": 1}, labels=Labels(classes=12))
    assert dict(few.short) == {10: 0, 11: 0}


def write_list(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines))
    return {"keys": str(path), "option": "finetune.keys"}


def write_tar(path, *parts):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(join([*parts, END]))
    return path


def test_simclrs_lists_name_images_without_their_folders(tmp_path, caplog):
    parts = [sample(f"n{name}/n{name}_{number}") for name in ("01", "02") for number in range(4)]
    write_tar(tmp_path / "all/a.tar", *parts)
    listed = write_list(tmp_path / "1percent.txt", "n01_3.JPEG", "", "n02_0.JPEG", "n01_3.JPEG", "n02_9.JPEG")
    drawn = draw(tmp_path / "all", tmp_path / "subset", listed)
    assert sorted(keys_in(tmp_path / "subset")) == ["n01/n01_3", "n02/n02_0"]
    assert (drawn.samples, drawn.missing) == (2, 1)
    assert "1 of the 3 keys" in caplog.text
    assert "n02_9" in caplog.text
    one = draw(tmp_path / "all", tmp_path / "one", listed | {"per_class": 1})
    assert (one.samples, one.missing) == (1, 1), "one of the class of both"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["n01_9.JPEG", "x.JPEG"], "none of the 2 keys"),
        (["# nothing"], "lists no keys"),
        (["1.JPEG"], "1 keys of .* fit several samples each, as '1'"),
    ],
)
def test_a_list_that_cannot_be_met_is_refused(tmp_path, lines, said):
    write_tar(tmp_path / "all/a.tar", *(sample(f"{name}/{number}") for name in "ab" for number in range(3)))
    with pytest.raises(ConfigError, match=f"^finetune.keys: .*{said}"):
        draw(tmp_path / "all", tmp_path / "subset", write_list(tmp_path / "list", *lines))
    assert not list(tmp_path.glob("subset/*.tar"))


def test_a_key_that_several_shards_have_stays_one_sample_each(tmp_path):
    for name, picture in (("a", 1), ("b", 2)):
        write_tar(tmp_path / f"all/{name}.tar", sample("same", jpg=encode_image(picture, (8, 8)), cls=b"1"))
    drawn = draw(tmp_path / "all", tmp_path / "subset")
    images = {each.key: each.image for each in open_stream(list(drawn.urls))}
    assert images == {
        "a/00000000/same": encode_image(1, (8, 8)),
        "b/00000000/same": encode_image(2, (8, 8)),
    }


def test_labels_of_a_table_are_written_so_that_the_subset_stands_alone(source, tmp_path):
    rows = (f"{shard}_{n}.jpg,{'cat' if n % 2 else 'ant'}\n" for shard in range(4) for n in range(31))
    (tmp_path / "labels.csv").write_text("key,label\n" + "".join(rows))
    labels = load_labels(LabelsSection(file=str(tmp_path / "labels.csv")), Store())
    drawn = draw(source, tmp_path / "subset", {"per_class": 6}, labels=labels)
    assert dict(drawn.skipped) == {"no_label": 23}
    assert {each.key: each.label for each in open_stream(list(drawn.urls))} == {
        key: int(key.partition("_")[2]) % 2 for key in keys_in(tmp_path / "subset")
    }
    assert json.loads((tmp_path / "subset/classes.json").read_text()) == ["ant", "cat"]


def test_what_has_no_label_or_image_or_cannot_be_parsed_is_not_drawn(tmp_path):
    parts = [sample("a"), sample("b", jpg=b"x"), sample("c", cls=b"1"), sample("d", jpg=b"x", cls=b"dog")]
    path = write_tar(tmp_path / "all/a.tar", *parts, sample("e"))
    path.write_bytes(path.read_bytes()[:-2600])
    drawn = draw(tmp_path / "all", tmp_path / "subset")
    assert keys_in(tmp_path / "subset") == ["a"]
    assert dict(drawn.skipped) == {
        "no_label": 1,
        "no_image": 1,
        "label_not_a_class_number": 1,
        "truncated": 1,
    }
    write_tar(tmp_path / "none/a.tar", *parts[1:])
    with pytest.raises(DataError, match=r"nothing to draw.*1 no_label.*\.cls member"):
        draw(tmp_path / "none", tmp_path / "empty")


def test_what_is_not_trained_is_not_drawn(source, tmp_path):
    (tmp_path / "gone.txt").write_text("0_0\nshard-000001.tar:1_3\n")
    section = StreamSection(exclude=[str(tmp_path / "gone.txt")], where=["label != 9"])
    select = load_selection(section, Store(), size_of=lambda _: (1, 1))
    drawn = draw(source, tmp_path / "subset", {"per_class": 11}, select=select)
    assert drawn.samples == 88
    assert not {"0_0", "1_3"} & set(keys_in(tmp_path / "subset"))
    assert dict(drawn.skipped) == {"list": 2, "filtered: label != 9": 10}
    with pytest.raises(ConfigError, match="is another"):
        draw(source, tmp_path / "subset", {"per_class": 11})


def test_a_finished_subset_is_used_and_another_is_not_written_over_it(source, tmp_path):
    first = draw(source, tmp_path / "subset")
    before, scanned = contents(tmp_path / "subset"), []
    assert draw(source, tmp_path / "subset", on_shard=lambda: scanned.append(1)) == first
    assert (contents(tmp_path / "subset"), scanned) == (before, [])
    others = ({"per_class": 4}, {"per_class": 3, "seed": 1})
    for other in others:
        with pytest.raises(ConfigError, match=r"is another \(3 a class of all samples by seed 0\)"):
            draw(source, tmp_path / "subset", other)
    (tmp_path / "subset/subset-000002.tar").unlink()
    assert draw(source, tmp_path / "subset") == first
    assert contents(tmp_path / "subset") == before, "a shard that was lost is written again"
    os.utime(source / "shard-000000.tar", (1, 1))
    with pytest.raises(ConfigError, match="was drawn from other shards"):
        draw(source, tmp_path / "subset")


def test_a_folder_that_cannot_be_used_is_refused_before_anything_is_read(source, tmp_path):
    def no_reading():
        raise AssertionError("a shard was read")

    with pytest.raises(ConfigError, match=r"holds other things, as shard-000000\.tar"):
        draw(source, source, on_shard=no_reading)
    (tmp_path / "file").write_text("")
    with pytest.raises(DeniedError):
        draw(source, tmp_path / "file/subset", on_shard=no_reading)
    for request in ({}, {"per_class": 0}):
        with pytest.raises(ConfigError):
            draw(source, tmp_path / "x", {"seed": 1} | request, on_shard=no_reading)
    with pytest.raises(ConfigError, match="of no one class"):
        draw(source, tmp_path / "x", labels=Labels(multi=True), on_shard=no_reading)


def die_amid_samples(folder: Path) -> None:
    read, count = subset_write._read, iter(range(100))

    def dying(*arguments):
        if next(count) == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(*arguments)

    subset_write._read = dying
    draw(folder / "all", folder / "killed", {"per_class": 6})


def test_a_subset_whose_writer_was_killed_is_drawn_again(source, tmp_path):
    child = multiprocessing.get_context("forkserver").Process(target=die_amid_samples, args=(tmp_path,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert (tmp_path / "killed/subset.begun.json").exists()
    assert not (tmp_path / "killed/subset.json").exists()
    draw(source, tmp_path / "killed", {"per_class": 2})
    draw(source, tmp_path / "direct", {"per_class": 2})
    left = {name for name in contents(tmp_path / "killed") if not name.endswith(".partial")}
    assert left == contents(tmp_path / "direct").keys()
    assert keys_in(tmp_path / "killed") == keys_in(tmp_path / "direct")


def test_from_s3_to_s3(source, tmp_path, s3):
    bucket, folder = s3.make_bucket()
    source.rename(folder / "all")
    drawn = draw(f"{bucket}/all/", f"{bucket}/run/subset", storage=s3.section, workers=1)
    assert drawn.urls == (f"{bucket}/run/subset",)
    here = {each.key for each in open_stream(list(drawn.urls), storage=s3.section)}
    assert here == set(keys_in(folder / "run/subset"))
    assert len(here) == 30
    assert draw(f"{bucket}/all/", f"{bucket}/run/subset", storage=s3.section) == drawn
