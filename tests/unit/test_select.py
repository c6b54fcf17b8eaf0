"""Selection before decoding: what is excluded, what is filtered and why, and what is refused at the start."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from conftest import encode_image

from streamswav.config import StreamSection
from streamswav.crops.decode import image_size
from streamswav.errors import EXIT_CONFIG, ConfigError, NotFoundError
from streamswav.stream.select import Selection, load_selection
from streamswav.stream.store import Store
from streamswav.stream.tar import TarSample

IMAGE = encode_image(0, (48, 40))


def sample(
    key: str = "a/1", *, image: bytes | None = IMAGE, sidecar: Any = None, **members: bytes
) -> TarSample:
    held = {} if image is None else {"jpg": image}
    if sidecar is not None:
        held["json"] = sidecar if isinstance(sidecar, bytes) else json.dumps(sidecar).encode()
    return TarSample(key, 0, 0, 512, held | members)


def load(**keys: Any) -> Selection:
    return load_selection(StreamSection(**keys), Store(), size_of=image_size)


def excluding(path: Path, text: str) -> Selection:
    path.write_text(text)
    return load(exclude=str(path))


def reason(condition: str, judged: TarSample) -> str | None:
    outcome = load(where=condition).judge(judged, "s.tar")
    assert outcome is None or outcome[0] == "filtered"
    return outcome and outcome[1]


# Functions that conditions below name as `test_select:...`.


def has_caption(judged: Any) -> object:
    return judged.members.get("txt")


def sees_all(judged: Any) -> object:
    return (judged.key, judged.label, judged.image, sorted(judged.members)) == (
        "a/1",
        7,
        IMAGE,
        ["cls", "jpg"],
    )


def is_wide(judged: Any) -> object:
    height, width = judged.size
    return width > height


def breaks(judged: Any) -> object:
    return judged.members["nothing"]


number = 3


def test_without_keys_all_but_tombstones_are_trained() -> None:
    for selection in (Selection.none(), load()):
        assert selection.judge(sample(), "s.tar") is None
        assert selection.judge(sample(image=None), "s.tar") is None
        assert selection.judge(sample(image=None, tombstone=b"\0"), "s.tar") == ("excluded", "redacted")
        assert selection.judge(sample(tombstone=b"\0"), "s.tar") is None
        assert selection.excluded_keys == 0


def test_listed_keys_are_excluded_in_every_shard_or_in_the_one_that_is_named(tmp_path: Path) -> None:
    text = "# opted out\n\na/1\r\n  b/2  \np/s.tar:c/3\na/1\np/s.tar:a/1\n"
    selection = excluding(tmp_path / "keys", text)
    listed = ("excluded", "list")
    assert [selection.judge(sample(key), "x.tar") for key in ("a/1", "b/2", "c/3", "1")] == [
        listed,
        listed,
        None,
        None,
    ]
    assert selection.judge(sample("c/3"), "p/s.tar") == listed
    assert selection.judge(sample("c/3"), "s.tar") is None
    assert selection.excluded_keys == 4


def test_every_key_of_a_long_list_is_found_and_no_other(tmp_path: Path) -> None:
    selection = excluding(tmp_path / "keys", "".join(f"{index}\n" for index in range(0, 6000, 2)))
    excluded = [index for index in range(6000) if selection.judge(sample(str(index)), "s.tar")]
    assert excluded == list(range(0, 6000, 2))


def test_lists_add_up_and_may_be_gzipped(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("a/1\n")
    (tmp_path / "two.gz").write_bytes(gzip.compress(b"\xef\xbb\xbfb/2\nc/\xc3\xa9\n"))
    selection = load(exclude=[str(tmp_path / "one"), str(tmp_path / "two.gz")])
    assert all(selection.judge(sample(key), "s.tar") for key in ("a/1", "b/2", "c/é"))
    assert selection.excluded_keys == 3
    damaged = gzip.compress(b"a/1\n" * 1000)[:-12]
    (tmp_path / "two.gz").write_bytes(damaged)
    with pytest.raises(ConfigError, match=r"stream\.exclude.*two\.gz is damaged"):
        load(exclude=str(tmp_path / "two.gz"))


@pytest.mark.parametrize("line", ["a/1.jpg", "s.tar:1.jpg", "s.tar:", "part-1.tar"])
def test_a_line_that_can_match_nothing_is_refused_with_its_number(tmp_path: Path, line: str) -> None:
    with pytest.raises(ConfigError, match=r"line 2 of .*keys can match no sample.*extension"):
        excluding(tmp_path / "keys", f"v1.5/fine\n{line}\n")


def test_a_list_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nowhere"):
        load(exclude=str(tmp_path / "nowhere"))


HOLDS = [
    "bytes > 100",
    "width == 48",
    "height<=40",
    "pixels >= 1.92e3",
    "pixels < 2e3",
    "label == 7",
    "label in [3, 7]",
    "label not in [cat, 3]",
    "json.width >= 256",
    "json.a.b == text",
    "json.a.b != 'other  text'",
    "json.a.tags == [x, 1]",
    "json.a.b < u",
    "json.taken >= 2024-01-01",
    "json.none == null",
    "json.width != null",
    "json.nsfw == false",
    "json.in in [no]",
]
FAILS = [
    "bytes > 1e6",
    "width != 48",
    "height > 40",
    "label != 7",
    "label in [cat]",
    "label not in [3, 7]",
    "json.width < 256",
    "json.a.b == 'text '",
    "json.nsfw == 0",
    "json.nsfw in [0, no]",
    "json.width == '500'",
    "json.a.tags == [1, x]",
    "json.none != null",
    "json.taken < 2024-01-01",
]
SIDECAR = {"width": 500, "a": {"b": "text", "tags": ["x", 1]}, "taken": "2024-05-06", "none": None}
SIDECAR |= {"nsfw": False, "in": "no"}


@pytest.mark.parametrize("condition", HOLDS)
def test_a_sample_is_trained_where_its_condition_holds(condition: str) -> None:
    assert reason(condition, sample(sidecar=SIDECAR, cls=b"7")) is None


@pytest.mark.parametrize("condition", FAILS)
def test_a_sample_is_filtered_with_the_condition_that_does_not_hold(condition: str) -> None:
    assert reason(condition, sample(sidecar=SIDECAR, cls=b"7\n")) == condition


def test_the_reason_is_a_short_label_and_the_first_condition_gives_it() -> None:
    judged = sample(sidecar=SIDECAR)
    assert reason("  json.width \t<\n256 ", judged) == "json.width < 256"
    long = reason(f"json.a.b in [{', '.join('abcdefghijklmnopqrst')}]", judged)
    assert long is not None
    assert (len(long), long[-3:]) == (60, "...")
    both = load(where=["width > 1", "height > 1000", "width > 1000"])
    assert both.judge(judged, "s.tar") == ("filtered", "height > 1000")


@pytest.mark.parametrize(
    "sidecar", [None, b"{broken", b"[" * 100_000, b"\xff", [1], {"a": 1}, {"a": {"c": 1}}]
)
def test_a_field_that_is_not_there_has_a_reason_of_its_own(sidecar: Any) -> None:
    for sign in ("==", "!=", "<"):
        assert reason(f"json.a.b {sign} 1", sample(sidecar=sidecar)) == "missing json.a.b"
    assert reason("label != 1", sample()) == "missing label"


@pytest.mark.parametrize("value", [True, None, "9", [9], {"x": 9}])
def test_values_that_do_not_compare_have_a_reason_of_their_own(value: Any) -> None:
    assert reason("json.a > 3", sample(sidecar={"a": value})) == "incomparable json.a"


@pytest.mark.parametrize("image", [None, b"", b"no image at all", IMAGE[:12]])
def test_what_has_no_readable_header_is_left_to_the_decoder(image: bytes | None) -> None:
    for condition in ("width > 1000", "pixels in [1]", "height == 0"):
        assert reason(condition, sample(image=image)) is None
    assert reason("bytes < 1", sample(image=None)) is None
    conditions = load(where=["width > 1000", "label == 3"])
    assert conditions.judge(sample(image=image, cls=b"4"), "s.tar") == ("filtered", "label == 3")


def test_redacted_comes_before_excluded_and_that_before_filtered(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("a/1\n")
    selection = load(exclude=str(tmp_path / "keys"), where="width > 1000")
    assert selection.judge(sample(image=None, tombstone=b"\0"), "s.tar") == ("excluded", "redacted")
    assert selection.judge(sample(), "s.tar") == ("excluded", "list")
    assert selection.judge(sample("b"), "s.tar") == ("filtered", "width > 1000")


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ("width = 3", "is no condition FIELD OP VALUE"),
        ("wide", "is no condition FIELD OP VALUE"),
        ("heigth > 3", r"no field 'heigth'.*did you mean height\?"),
        ("json. == 3", "no field 'json.'"),
        ("json.a..b == 3", "no field"),
        ("width >", "has no value"),
        ("width > [1", "not YAML"),
        ("width > true", "'>' wants a number or text"),
        ("label in 3", "'in' wants a list"),
        ("label not in a", "'not in' wants a list"),
        ("no_such_package.module:function", "cannot be imported.*no_such_package"),
        ("test_select:nothing", "cannot be imported.*nothing"),
        ("test_select:number", "is not a function"),
    ],
)
def test_a_condition_that_cannot_be_understood_is_named(condition: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        load(where=condition)
    assert (caught.value.key, caught.value.value) == ("stream.where", condition)
    assert "\n" not in str(caught.value)


def test_an_installed_function_decides() -> None:
    assert reason("test_select:has_caption", sample()) == "test_select:has_caption"
    assert reason("test_select:has_caption", sample(txt=b"a cat")) is None
    assert reason("test_select:sees_all", sample(cls=b"7")) is None
    assert reason("test_select:is_wide", sample()) is None
    assert reason("test_select:is_wide", sample(image=encode_image(0, (40, 48)))) == "test_select:is_wide"
    assert reason("test_select:is_wide", sample(image=b"?")) is None


def test_a_function_that_raises_is_told_in_one_line_and_ends_the_run() -> None:
    with pytest.raises(ConfigError, match=r"test_select:breaks.*KeyError: 'nothing'.*sample 'a/1'") as caught:
        reason("test_select:breaks", sample())
    assert caught.value.exit_code == EXIT_CONFIG
    assert caught.value.__suppress_context__


def test_a_selection_judges_the_same_in_another_process(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("".join(f"{index}\n" for index in range(1000)))
    where = ["test_select:has_caption", "width > 1", "json.a in [1, 2]"]
    selection = load(exclude=str(tmp_path / "keys"), where=where)
    data = pickle.dumps(selection)
    assert len(data) < 8 * 1000 + 1500
    other = pickle.loads(data)
    for judged in (
        sample("7"),
        sample(),
        sample(txt=b"t"),
        sample(txt=b"t", sidecar={"a": 1}),
        sample(txt=b"t", sidecar={"a": 3}),
    ):
        assert other.judge(judged, "s.tar") == selection.judge(judged, "s.tar")
    assert (other.digest, other.excluded_keys) == (selection.digest, 1000)


def test_the_digest_is_of_keys_and_conditions_whatever_their_files(tmp_path: Path) -> None:
    one = excluding(tmp_path / "one", "a\nb\n").digest
    assert excluding(tmp_path / "two", "# order\nb\na\na\n").digest == one
    others = {
        excluding(tmp_path / "two", "a\n").digest,
        excluding(tmp_path / "two", "s.tar:a\ns.tar:b\n").digest,
        load(exclude=str(tmp_path / "one"), where="width > 1").digest,
        load().digest,
    }
    assert len(others | {one}) == 5


def test_the_header_is_read_once_a_sample() -> None:
    calls: list[int] = []

    def counted(image: bytes) -> tuple[int, int]:
        calls.append(len(image))
        return image_size(image)

    section = StreamSection(where=["width > 1", "height > 1", "pixels > 1", "bytes > 1"])
    assert load_selection(section, Store(), size_of=counted).judge(sample(), "s.tar") is None
    assert len(calls) == 1
