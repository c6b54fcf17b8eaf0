"""The stream on its own, on real tar files."""

import itertools
import json

import pytest

from streamswav.errors import ManifestError, PositionError
from streamswav.stream import Position, open_stream


def identities(stream):
    return [(sample.id.turn, sample.id.shard, sample.id.ordinal) for sample in stream]


def test_every_sample_comes_once_a_pass_and_another_pass_in_another_order(make_shards, tmp_path):
    make_shards(tmp_path, counts=[7, 11, 3])
    seen = identities(open_stream([str(tmp_path)], passes=2, window=4))
    whole = sorted((shard, ordinal) for shard, count in enumerate([7, 11, 3]) for ordinal in range(count))
    first, second = ([each[1:] for each in seen if each[0] == turn] for turn in (0, 1))
    assert sorted(first) == whole
    assert sorted(second) == whole
    assert first != second


def test_a_stream_goes_on_after_a_position_that_went_through_json(make_shards, tmp_path):
    make_shards(tmp_path, counts=[9, 14])
    whole = identities(open_stream([str(tmp_path)], window=5))
    stream = open_stream([str(tmp_path)], window=5)
    begun = [sample.id for sample in itertools.islice(stream, 10)]
    position = Position.from_json(json.loads(json.dumps(stream.position.to_json())))
    rest = identities(open_stream([str(tmp_path)], window=5, position=position))
    assert [(each.turn, each.shard, each.ordinal) for each in begun] + rest == whole


def test_samples_carry_key_label_and_image(make_shards, tmp_path):
    make_shards(tmp_path, counts=[3])
    samples = list(open_stream([str(tmp_path)]))
    assert all(sample.image and isinstance(sample.label, int) and sample.key for sample in samples)


def test_parts_divide_the_shards(make_shards, tmp_path):
    make_shards(tmp_path, counts=[4, 5, 6])
    keys = [[sample.key for sample in open_stream([str(tmp_path)], part=(i, 2))] for i in (0, 1)]
    assert sum(map(len, keys)) == 15
    assert not set(keys[0]) & set(keys[1])


def test_an_empty_prefix_is_refused(tmp_path):
    with pytest.raises(ManifestError, match=r"no \.tar objects"):
        open_stream([str(tmp_path)])


def test_a_position_of_other_shards_is_refused(make_shards, tmp_path):
    make_shards(tmp_path / "a", counts=[4])
    make_shards(tmp_path / "b", counts=[50])
    position = open_stream([str(tmp_path / "a")]).position
    with pytest.raises(PositionError, match="manifest"):
        open_stream([str(tmp_path / "b")], position=position)


def test_one_location_may_be_given_bare_as_text_or_path(make_shards, tmp_path):
    make_shards(tmp_path, counts=[3])
    assert identities(open_stream(tmp_path)) == identities(open_stream(str(tmp_path)))
    assert identities(open_stream([tmp_path])) == identities(open_stream(tmp_path))
