"""Shards of other writers read here, ours read by webdataset, and the stream before webdataset's stages."""

import io
import itertools
import json
import tarfile
import warnings

import pytest
import webdataset
from conftest import encode_image

from shards.build import BuildOptions, build
from shards.sources import open_source
from streamswav.errors import ConfigError, PositionError
from streamswav.stream import WebDatasetSource, open_stream
from streamswav.stream.store import Store


def read_with_webdataset(folder):
    """All samples of a folder, undecoded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its files to the collector
        return list(
            webdataset.WebDataset([str(path) for path in sorted(folder.glob("*.tar"))], shardshuffle=False)
        )


def by_key(samples):
    return {
        sample["__key__"]: {k: v for k, v in sample.items() if not k.startswith("__")} for sample in samples
    }


def test_shards_of_webdatasets_shard_writer_are_read_whole(tmp_path):
    written = {
        f"{index:05d}": {"jpg": encode_image(index), "cls": str(index).encode()} for index in range(25)
    }
    with webdataset.ShardWriter(str(tmp_path / "part-%04d.tar"), maxcount=10, verbose=0) as writer:
        for key, members in written.items():
            writer.write({"__key__": key, **members})
    stream = open_stream(tmp_path)
    assert {sample.key: sample.members for sample in stream} == written
    assert len(stream.manifest.shards) == 3
    assert not stream.damages


def write_img2dataset(folder, *, shard, count, failed):
    """A shard as img2dataset lays it out: padded keys, jpg, txt and json, counts and a table beside it."""
    with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for index in range(count):
            key = f"{shard:05d}{index:04d}"
            about = {
                "key": key,
                "status": "success",
                "width": 48,
                "height": 40,
                "caption": f"picture {index}",
            }
            members = {
                "jpg": encode_image(index),
                "txt": about["caption"].encode(),
                "json": json.dumps(about).encode(),
            }
            for extension, data in members.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    stats = {"count": count + failed, "successes": count, "failed_to_download": failed, "status_dict": {}}
    (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats))
    (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1")


def test_shards_of_img2dataset_are_read_with_their_counts_known(tmp_path):
    write_img2dataset(tmp_path, shard=0, count=12, failed=3)
    write_img2dataset(tmp_path, shard=1, count=7, failed=0)
    stream = open_stream(tmp_path, where=["json.width >= 48"])
    assert [shard.key for shard in stream.manifest.shards] == ["00000.tar", "00001.tar"]
    assert stream.manifest.samples == 19
    samples = {sample.key: sample for sample in stream}
    assert len(samples) == 19
    assert samples["000010003"].members["txt"] == b"picture 3"
    assert all(sample.image for sample in samples.values())


def test_our_shards_are_read_by_webdataset(tmp_path):
    for index in range(11):
        path = tmp_path / "photos" / f"class{index % 3}" / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_image(index))
    destination, store = tmp_path / "shards", Store()
    build(open_source(str(tmp_path / "photos")), str(destination), store, BuildOptions(samples_per_shard=4))
    theirs = by_key(read_with_webdataset(destination))
    assert len(theirs) == 11
    assert theirs == {sample.key: sample.members for sample in open_stream(destination)}


def test_dots_in_extensions_and_folders_in_keys_mean_the_same_to_both(tmp_path):
    members = {
        "train/n01/10026": {"jpg": encode_image(1), "seg.png": b"mask", "cls": b"4"},
        "train/n01/10027": {"image.jpg": encode_image(2), "meta.v2.json": b"{}"},
        "train.v2/n02/1": {"JPG": encode_image(3)},
    }
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for key, files in members.items():
            for extension, data in files.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    ours = list(open_stream(tmp_path))
    assert {sample.key: sample.members for sample in ours} == by_key(read_with_webdataset(tmp_path))
    assert all(sample.image for sample in ours)


# The stream as a source


class Pipeline:
    """The source with stages behind it, as a user has them."""

    def __init__(self, folder, stages, **options):
        self.source = WebDatasetSource(open_stream(folder, window=5), **options)
        self.pipeline = webdataset.DataPipeline(self.source, *stages(self.source))

    def take(self, count=None):
        return [sample["__key__"] for sample in itertools.islice(self.pipeline, count)]


def decode_and_select(_):
    return [
        webdataset.decode("rgb8"),
        webdataset.select(lambda sample: sample["cls"] != 3),
        webdataset.map(lambda sample: {**sample, "shape": sample["jpg"].shape}),
    ]


@pytest.fixture
def shards(make_shards, tmp_path):
    make_shards(tmp_path, counts=[9, 14, 6])
    return tmp_path


def resumed(pipeline, other):
    other.source.load_state_dict(json.loads(json.dumps(pipeline.source.state_dict())))
    return other


def test_samples_come_as_webdataset_gives_them(shards):
    theirs = by_key(read_with_webdataset(shards))
    source = WebDatasetSource(open_stream(shards))
    samples = list(webdataset.DataPipeline(source))
    assert by_key(samples) == theirs
    assert {sample["__url__"] for sample in samples} == {str(path) for path in shards.glob("*.tar")}


@pytest.mark.parametrize("given", [0, 1, 8, 17, 26])
def test_behind_filters_and_maps_a_resumed_pipeline_gives_exactly_the_rest(shards, given):
    whole = Pipeline(shards, decode_and_select).take()
    assert len(whole) == 26  # 3 of 29 have the label 3
    pipeline = Pipeline(shards, decode_and_select)
    begun = pipeline.take(given)
    assert begun + resumed(pipeline, Pipeline(shards, decode_and_select)).take() == whole


def test_batches_that_are_committed_come_once_and_in_the_same_order(shards):
    def stages(_):
        return [webdataset.decode("rgb8"), webdataset.batched(4, collation_fn=None)]

    def commit_batches(pipeline, count=None):
        keys = []
        for batch in itertools.islice(pipeline.pipeline, count):
            pipeline.source.commit(*batch)
            keys.append([sample["__key__"] for sample in batch])
        return keys

    whole = commit_batches(Pipeline(shards, stages, commits=True))
    pipeline = Pipeline(shards, stages, commits=True)
    begun = commit_batches(pipeline, 3)
    assert begun + commit_batches(resumed(pipeline, Pipeline(shards, stages, commits=True))) == whole


def shuffled(source):
    return [*decode_and_select(source), source.survivors, webdataset.shuffle(10, initial=10)]


def commit(pipeline, count):
    """Take and commit so many samples; return their keys."""
    keys = []
    for sample in itertools.islice(pipeline.pipeline, count):
        pipeline.source.commit(sample)
        keys.append(sample["__key__"])
    return keys


@pytest.mark.parametrize("given", [0, 1, 9, 25, 26])
def test_behind_a_shuffle_what_was_committed_never_comes_again_and_all_else_does(shards, given):
    whole = Pipeline(shards, decode_and_select).take()
    pipeline = Pipeline(shards, shuffled, commits=True)
    begun = commit(pipeline, given)
    again = resumed(pipeline, Pipeline(shards, shuffled, commits=True))
    rest = again.take()
    assert sorted(begun + rest) == sorted(whole)


def test_what_was_taken_but_not_committed_comes_again_also_in_the_same_process(shards):
    pipeline = Pipeline(shards, shuffled, commits=True)
    begun = commit(pipeline, 7)
    pipeline.take(5)
    assert sorted(begun + commit(pipeline, None)) == sorted(Pipeline(shards, decode_and_select).take())
    assert pipeline.take() == []


def test_once_all_is_committed_the_state_names_nothing_and_the_stream_is_finished(shards):
    pipeline = Pipeline(shards, shuffled, commits=True)
    commit(pipeline, None)
    state = pipeline.source.state_dict()
    assert state["done"] == []
    assert state["position"]["finished"]


def test_without_survivors_the_state_is_right_too_but_holds_what_came_after_the_first_dropped(shards):
    def unsieved(source):
        return [*decode_and_select(source), webdataset.shuffle(10, initial=10)]

    pipeline = Pipeline(shards, unsieved, commits=True)
    begun = commit(pipeline, 20)
    assert pipeline.source.state_dict()["done"]
    rest = resumed(pipeline, Pipeline(shards, unsieved, commits=True)).take()
    assert sorted(begun + rest) == sorted(Pipeline(shards, decode_and_select).take())


def test_a_sample_without_its_position_cannot_be_committed(shards):
    source = WebDatasetSource(open_stream(shards), commits=True)
    with pytest.raises(PositionError, match="__position__"):
        source.commit({"__key__": "0_0"})
    with pytest.raises(ConfigError, match="commits=True"):
        WebDatasetSource(open_stream(shards)).commit({"__key__": "0_0"})


def test_in_workers_that_would_each_read_everything_the_source_is_refused(shards):
    source = WebDatasetSource(open_stream(shards))
    loader = webdataset.WebLoader(
        webdataset.DataPipeline(source), batch_size=None, num_workers=2, multiprocessing_context="fork"
    )
    with pytest.raises(PositionError, match="num_workers=0"):
        next(iter(loader))
