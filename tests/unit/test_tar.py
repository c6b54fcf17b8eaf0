"""The strict tar parser: what is whole is read, what is not is named, and no byte is unaccounted for."""

import gzip
import io
import itertools
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamswav.stream.tar import Damage, TarSample, read_samples

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def make_tar(names, form=tarfile.USTAR_FORMAT, size=1000):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name)
            data = bytes([number % 256]) * (size + number)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def pairs(count, folder=""):
    return [f"{folder}{number:04d}.{extension}" for number in range(count) for extension in ("jpg", "cls")]


def parse(data, block=7777):
    return list(read_samples([data[i : i + block] for i in range(0, len(data), block)], size=len(data)))


def samples(items):
    return [item for item in items if isinstance(item, TarSample)]


def damages(items):
    return [item for item in items if isinstance(item, Damage)]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("folder", ["", "deep/" * 40])
def test_members_are_grouped_by_key_in_every_format_and_with_long_names(form, folder):
    if form == "ustar" and folder:
        folder = "d" * 90 + "/" + "e" * 90 + "/"
    items = parse(make_tar(pairs(30, folder), FORMATS[form]))
    assert [item.key for item in items] == [f"{folder}{number:04d}" for number in range(30)]
    assert all(list(item.members) == ["jpg", "cls"] for item in items)
    assert items[3].image == bytes([6]) * 1006


def test_it_reads_what_python_reads():
    data = make_tar(pairs(25), tarfile.PAX_FORMAT)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        theirs = [tar.extractfile(member).read() for member in tar]
    assert [part for item in parse(data) for part in item.members.values()] == theirs


@given(cut=st.integers(0, 60_000), block=st.integers(1, 20_000))
@settings(max_examples=80, deadline=None)
def test_a_cut_anywhere_is_told_and_whole_samples_before_it_are_kept(cut, block):
    whole = make_tar(pairs(20))
    content = 20 * 2 * (512 + 1024)
    data = whole[: min(cut, content)]
    items = parse(data, block)
    assert damages(items)
    assert damages(items)[0].reason in {"truncated", "no_end_of_archive"}
    for mine, theirs in zip(samples(items), samples(parse(whole)), strict=False):
        assert mine.key == theirs.key
        assert mine.image == theirs.image


@given(position=st.integers(0, 60_000), value=st.integers(1, 255))
@settings(max_examples=80, deadline=None)
def test_one_flipped_byte_never_joins_samples_and_every_byte_is_accounted_for(position, value):
    whole = bytearray(make_tar(pairs(20)))
    whole[position] ^= value
    items = parse(bytes(whole))
    assert items[0].start == 0
    assert all(one.stop == other.start for one, other in itertools.pairwise(items))
    by_key = {}
    for item in samples(items):
        for extension in item.members:
            assert (item.key, extension) not in by_key
            by_key[item.key, extension] = item
    assert len(samples(items)) >= 19


def test_a_damaged_header_costs_its_own_sample_alone():
    data = bytearray(make_tar(pairs(10)))
    third = parse(bytes(data))[3].start
    data[third + 20] ^= 0xFF
    items = parse(bytes(data))
    assert [item.reason for item in damages(items)] == ["bad_header"]
    assert damages(items)[0].start == third
    with_image = [item.key for item in samples(items) if item.image]
    assert with_image == [f"{number:04d}" for number in range(10) if number != 3]


def test_a_whole_archive_after_another_is_read_and_the_seam_told():
    items = parse(make_tar(pairs(3)) + make_tar(pairs(2, "b/")))
    assert [item.reason for item in damages(items)] == ["zero_blocks"]
    assert len(samples(items)) == 5


def test_zeros_in_the_middle_do_not_end_the_archive():
    data = bytearray(make_tar(pairs(10)))
    fourth = parse(bytes(data))[4]
    data[fourth.start : fourth.stop] = bytes(fourth.stop - fourth.start)
    items = parse(bytes(data))
    assert [item.reason for item in damages(items)] == ["zero_blocks"]
    assert len(samples(items)) == 9


def test_a_compressed_archive_is_named_as_such():
    assert [item.reason for item in parse(gzip.compress(make_tar(pairs(5))))] == ["compressed"]


@pytest.mark.parametrize("data", [b"", b"hello", bytes(100), b"x" * 5000])
def test_what_is_no_archive_is_damage(data):
    items = parse(data)
    assert damages(items)
    assert not samples(items)


def test_an_archive_without_members_is_whole_and_empty():
    assert parse(make_tar([])) == []


def test_a_repeated_key_is_two_samples():
    items = parse(make_tar(["a.jpg", "a.cls", "a.jpg", "a.cls"]))
    assert [(item.key, list(item.members)) for item in items] == [("a", ["jpg", "cls"])] * 2


def test_hidden_files_and_names_without_extension_belong_to_no_sample():
    items = parse(make_tar(["README", ".hidden.jpg", "a.jpg", "notes", "b.jpg"]))
    assert [item.key for item in items] == ["a", "b"]
    assert items[0].start == 0
    assert items[0].stop == items[1].start


def test_the_extension_begins_at_the_first_dot_of_the_file_name():
    items = parse(make_tar(["v1.0/a.seg.png", "v1.0/a.jpg"]))
    assert [(item.key, list(item.members)) for item in items] == [("v1.0/a", ["seg.png", "jpg"])]


def test_reading_from_a_samples_start_gives_the_same_samples():
    data = make_tar(pairs(12))
    whole = parse(data)
    rest = list(
        read_samples([data[whole[5].start :]], size=len(data), start=whole[5].start, ordinal=whole[5].ordinal)
    )
    assert rest == whole[5:]
