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


def assert_tiled(items, data):
    """Every byte from the first to the end-of-archive blocks belongs to one sample or damage."""
    stops = [0, *(item.stop for item in items)]
    assert [item.start for item in items] == stops[:-1]
    assert stops == sorted(stops)
    assert stops[-1] <= len(data)
    assert not any(data[stops[-1] :])
    assert [item.ordinal for item in samples(items)] == list(range(len(samples(items))))


NAMES = [
    "a.jpg",
    "a.cls",
    "b.cls",
    "b.jpg",
    "README",
    "c.json",
    "deep/c.jpg",
    "c.jpg",
    "c.jpg",
    "n" * 80 + "/" + "n" * 80 + ".jpg",
]
names = st.lists(st.sampled_from(NAMES), max_size=12)
edits = st.lists(
    st.tuples(
        st.sampled_from(["flip", "zeros", "noise", "insert", "remove", "cut"]),
        st.integers(0, 20_000),
        st.one_of(st.integers(1, 3000), st.sampled_from([512, 1024, 1536])),
    ),
    max_size=4,
)


def damage(data, kind, at, length):
    at, noise = at % (len(data) + 1), bytes((7 * i + at) % 256 for i in range(length))
    match kind:
        case "flip":
            return data[:at] + bytes(255 - each for each in data[at : at + 1]) + data[at + 1 :]
        case "zeros":
            return data[:at] + bytes(length) + data[at + length :]
        case "noise":
            return data[:at] + noise + data[at + length :]
        case "insert":
            return data[:at] + noise + data[at:]
        case "remove":
            return data[:at] + data[at + length :]
    return data[:at]


@given(
    names=names,
    form=st.sampled_from(sorted(FORMATS)),
    edits=edits,
    aligned=st.booleans(),
    block=st.integers(1, 9000),
    limit=st.one_of(st.none(), st.integers(0, 4000)),
)
@settings(max_examples=150, deadline=None)
def test_samples_and_damages_tile_whatever_was_done_to_the_archive(names, form, edits, aligned, block, limit):
    data = make_tar(names, FORMATS[form], size=700)
    for kind, at, length in edits:
        data = damage(data, kind, at // 512 * 512 if aligned else at, length)
    blocks = [data[i : i + block] for i in range(0, len(data), block)]
    items = list(read_samples(blocks, size=len(data), limit=limit))
    assert_tiled(items, data)
    # Neither the length of blocks nor the limit has a say in what is where.
    places = [(type(item), item.start, item.stop) for item in items]
    assert places == [(type(item), item.start, item.stop) for item in parse(data)]
    # From wherever a sample begins, the rest is the same.
    for item in samples(items):
        rest = read_samples(
            [data[item.start :]], size=len(data), start=item.start, ordinal=item.ordinal, limit=limit
        )
        assert list(rest) == items[items.index(item) :]


# Five members of a header and 1024 bytes each: a.jpg, a.cls, b.jpg, b.cls, c.jpg.
CUTS = {
    "before anything": (0, [], [("no_end_of_archive", 0, 0)]),
    "in the first header": (100, [], [("truncated", 0, 100)]),
    "after the first header": (512, [], [("truncated", 0, 512)]),
    "in the first bytes": (1000, [], [("truncated", 0, 1000)]),
    "at a block within bytes": (1024, [], [("truncated", 0, 1024)]),
    "in the padding": (1530, ["a"], [("no_end_of_archive", 1530, 1530)]),
    "between members of a sample": (1536, ["a"], [("no_end_of_archive", 1536, 1536)]),
    "in a later header": (1700, ["a"], [("truncated", 1536, 1700)]),
    "between samples": (3072, ["a"], [("no_end_of_archive", 3072, 3072)]),
    "in the second sample": (4000, ["a"], [("truncated", 3072, 4000)]),
    "before the end": (7680, ["a", "b", "c"], [("no_end_of_archive", 7680, 7680)]),
    "in the end": (7780, ["a", "b", "c"], [("truncated", 7680, 7780)]),
    "after one block of the end": (8192, ["a", "b", "c"], []),
}


@pytest.mark.parametrize(("cut", "keys", "told"), CUTS.values(), ids=CUTS.keys())
def test_a_cut_is_told_wherever_it_is(cut, keys, told):
    whole = make_tar(["a.jpg", "a.cls", "b.jpg", "b.cls", "c.jpg"])
    items = parse(whole[:cut])
    assert [item.key for item in samples(items)] == keys
    assert [(item.reason, item.start, item.stop) for item in damages(items)] == told
    assert_tiled(items, whole[:cut])


@pytest.mark.parametrize("form", ["gnu", "pax"])
@pytest.mark.parametrize("cut", range(0, 2560, 256))
def test_a_cut_within_a_long_name_is_told(form, cut):
    whole = make_tar(pairs(2, "deep/" * 40), FORMATS[form])
    first = parse(whole)[0]
    data = whole[: first.stop + cut]
    items = parse(data)
    assert [item.key for item in samples(items)][:1] == [first.key]
    assert damages(items)
    assert_tiled(items, data)


def test_garbage_in_the_middle_costs_what_it_covers_and_the_rest_is_read():
    data = bytearray(make_tar(pairs(10)))
    third, fifth = (samples(parse(bytes(data)))[number] for number in (3, 5))
    data[third.start + 600 : fifth.start + 100] = b"\xa5" * (fifth.start + 100 - third.start - 600)
    items = parse(bytes(data))
    assert_tiled(items, data)
    assert [item.key for item in samples(items) if item.image] == [
        f"{n:04d}" for n in (0, 1, 2, 3, 6, 7, 8, 9)
    ]
    assert {item.reason for item in damages(items)} == {"bad_header"}


@pytest.mark.parametrize("magic", [b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ\0", b"BZh9"])
def test_every_compression_is_told_and_nothing_is_looked_for_in_it(magic):
    data = magic + bytes(509) + make_tar(pairs(2))
    assert parse(data) == [Damage("compressed", 0, len(data))]


def test_members_out_of_order_are_samples_of_their_own():
    items = parse(make_tar(["a.jpg", "b.jpg", "a.txt", "b.txt"]))
    assert [(item.key, list(item.members)) for item in items] == [
        ("a", ["jpg"]),
        ("b", ["jpg"]),
        ("a", ["txt"]),
        ("b", ["txt"]),
    ]
    assert [item.image is None for item in items] == [False, False, True, True]


def test_a_sample_without_an_image_is_a_sample():
    (item,) = parse(make_tar(["a.cls", "a.json"]))
    assert (item.key, list(item.members), item.image) == ("a", ["cls", "json"], None)


def test_what_is_no_samples_counts_with_the_next_sample_or_with_the_last():
    data = make_tar(["README", "a.jpg", "notes", "b.jpg", "LICENSE"])
    items = parse(data)
    assert [item.key for item in items] == ["a", "b"]
    assert_tiled(items, data)
    only = make_tar(["README", "LICENSE"])
    assert parse(only) == [Damage("no_sample", 0, 4096 - 1024)]


@pytest.mark.parametrize("field", [b"-0000000001\0", b"0000_0001\0  ", b"9\0          "])
def test_a_length_that_is_no_octal_number_is_damage(field):
    data = bytearray(make_tar(["a.jpg", "b.jpg"]))
    data[124:136] = field
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    items = parse(bytes(data))
    assert [item.reason for item in damages(items)] == ["bad_header"]
    assert [item.key for item in samples(items)] == ["b"]
    assert_tiled(items, data)


@pytest.mark.parametrize("order", [["cls", "jpg", "txt"], ["jpg", "txt", "cls"]])
def test_a_sample_over_the_limit_keeps_its_place_and_loses_its_members(order):
    names = [f"{number}.{extension}" for number in range(5) for extension in order]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 50_000 if name == "2.jpg" else 400
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    data = buffer.getvalue()
    limited = list(read_samples([data], size=len(data), limit=1200))
    whole = parse(data)
    assert [item.reason for item in limited] == ["", "", "too_large", "", ""]
    assert limited[2].members == {}
    assert [(item.key, item.ordinal, item.start, item.stop) for item in limited] == [
        (item.key, item.ordinal, item.start, item.stop) for item in whole
    ]
    assert limited[:2] + limited[3:] == whole[:2] + whole[3:]
    assert {item.reason for item in read_samples([data], size=len(data), limit=1199)} == {"too_large"}
