"""The stream on its own, on real tar files."""

import itertools
import json

import pytest
from conftest import encode_image

from streamswav.errors import ConfigError, ManifestError, PositionError
from streamswav.stream import Position, open_stream
from streamswav.stream.grid import Grid


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


def through_json(stream):
    return json.loads(json.dumps(stream.state_dict()))


@pytest.mark.parametrize("given", [0, 1, 5, 12, 20, 23])
def test_a_state_taken_anywhere_gives_exactly_the_rest(make_shards, tmp_path, given):
    make_shards(tmp_path, counts=[9, 14])
    whole = identities(open_stream(tmp_path, window=5))
    stream = open_stream(tmp_path, window=5)
    begun = identities(itertools.islice(stream, given))
    again = open_stream(tmp_path, window=5)
    again.load_state_dict(through_json(stream))
    assert begun + identities(again) == whole
    assert again.state_dict() == run_through(tmp_path).state_dict()


def run_through(folder):
    stream = open_stream(folder, window=5)
    list(stream)
    return stream


def test_a_stream_left_in_the_middle_goes_on_where_it_was(make_shards, tmp_path):
    make_shards(tmp_path, counts=[9, 14])
    stream = open_stream(tmp_path, window=5)
    begun = identities(itertools.islice(stream, 7))
    assert begun + identities(stream) == identities(open_stream(tmp_path, window=5))
    assert identities(stream) == []


def test_what_is_excluded_or_filtered_is_not_given_and_counted(make_shards, tmp_path):
    make_shards(tmp_path / "shards", counts=[10, 10])
    (tmp_path / "keys.txt").write_text("0_3\n1_4\n")
    stream = open_stream(
        tmp_path / "shards",
        window=4,
        exclude=[str(tmp_path / "keys.txt")],
        where=["label < 7", "width == 48"],
    )
    assert sorted(sample.key for sample in stream) == sorted(
        f"{shard}_{index}" for shard in (0, 1) for index in range(7) if (shard, index) not in {(0, 3), (1, 4)}
    )
    counts = {
        outcome: stream.position.total(outcome).samples for outcome in ("trained", "excluded", "filtered")
    }
    assert counts == {"trained": 12, "excluded": 2, "filtered": 6}


def test_what_is_passed_over_is_counted_once_wherever_the_stream_was_cut(make_shards, tmp_path):
    make_shards(tmp_path / "shards", counts=[10, 10])
    (tmp_path / "keys.txt").write_text("0_3\n1_4\n")
    tar = tmp_path / "shards" / "shard-000001.tar"
    data = bytearray(tar.read_bytes())
    at = data.index(b"1_5.")
    data[at : at + 512] = b"x" * 512
    tar.write_bytes(data)
    options = {"window": 4, "exclude": [str(tmp_path / "keys.txt")]}
    whole = open_stream(tmp_path / "shards", **options)
    count = len(list(whole))
    assert len(whole.damages) == 1
    for given in range(count):
        stream = open_stream(tmp_path / "shards", **options)
        list(itertools.islice(stream, given))
        again = open_stream(tmp_path / "shards", **options)
        again.load_state_dict(through_json(stream))
        assert len(list(again)) == count - given
        assert again.state_dict() == whole.state_dict()


def test_each_url_has_passes_of_its_own(make_shards, tmp_path):
    make_shards(tmp_path / "a", counts=[4])
    make_shards(tmp_path / "b", counts=[6])
    seen = identities(open_stream([tmp_path / "a", tmp_path / "b"], passes=[3, 1]))
    assert len(seen) == len(set(seen)) == 3 * 4 + 6
    with pytest.raises(ConfigError, match="one for each of the 2 urls"):
        open_stream([tmp_path / "a", tmp_path / "b"], passes=[3])


def test_the_memory_does_not_change_the_order(make_shards, tmp_path):
    make_shards(tmp_path, counts=[40], image=lambda number: encode_image(number, (320, 240)))
    small = open_stream(tmp_path, memory=6 << 20)
    assert identities(small) == identities(open_stream(tmp_path))
    with pytest.raises(ConfigError, match="memory"):
        next(open_stream(tmp_path, memory=1 << 16))


def test_the_position_of_many_lanes_goes_on_in_one_process(make_shards, tmp_path):
    make_shards(tmp_path, counts=[9, 14])
    manifest = open_stream(tmp_path).manifest
    state = Position(manifest.digest, Grid(8, 4, 2, 5), seed=0).to_json()
    stream = open_stream(tmp_path)
    stream.load_state_dict(state)
    assert len(set(identities(stream))) == 23


@pytest.mark.parametrize("state", [{}, {"order_version": 2}, {"order_version": 2, "grid": 1}])
def test_what_is_no_state_is_refused(make_shards, tmp_path, state):
    make_shards(tmp_path, counts=[3])
    with pytest.raises(PositionError, match="not the state of a stream"):
        open_stream(tmp_path).load_state_dict(state)


@pytest.mark.parametrize("part", [(2, 2), (-1, 2)])
def test_a_part_that_does_not_exist_is_refused(make_shards, tmp_path, part):
    make_shards(tmp_path, counts=[3])
    with pytest.raises(ConfigError, match="part"):
        open_stream(tmp_path, part=part)
