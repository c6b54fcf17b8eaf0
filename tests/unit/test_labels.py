"""Labels of samples: from their members, or by key from tables; what cannot be understood is told by line."""

import gzip
import pickle
import re
import sys

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from streamswav.config import LabelsSection, parse_config
from streamswav.errors import ConfigError, DecodeError, NotFoundError
from streamswav.stream.labels import Labels, load_labels
from streamswav.stream.store import Store


@pytest.fixture
def table(tmp_path):
    """A function that writes a table and returns the labels that it gives."""

    def load(content, *, name="labels.csv", part="", **section):
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(data)
        return load_labels(LabelsSection(file=str(tmp_path / name), **section), Store(), split=part)

    return load


def reason(labels, key="x", **members):
    with pytest.raises(DecodeError) as caught:
        labels.of(key, members)
    return caught.value.reason


def refusal(load, *arguments, **section):
    with pytest.raises(ConfigError) as caught:
        load(*arguments, **section)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_shards_own_label_is_the_number_of_its_cls_member():
    labels = Labels.from_shards()
    assert labels.of("x", {"cls": b" 7\n"}) == 7
    assert (labels.classes, labels.names, labels.multi) == (None, None, False)
    assert reason(labels) == "no_label"
    assert reason(labels, cls=b"cat") == reason(labels, cls=b"-1") == "label_not_a_class_number"
    assert reason(labels, tombstone=b"00") == "redacted"


def test_class_names_in_shards_are_numbered_by_a_file_of_names(tmp_path):
    for name, content in (
        ("names.txt", "dog\ncat\n"),
        ("classes.json", '["dog", "cat"]'),
        ("numbers.json", '{"cat": 1, "dog": 0}'),
    ):
        (tmp_path / name).write_text(content)
        labels = load_labels(LabelsSection(names=str(tmp_path / name)), Store())
        assert (labels.classes, labels.names) == (2, ("dog", "cat"))
        assert labels.of("x", {"cls": b"cat"}) == 1
        assert labels.of("x", {"cls": b"0"}) == 0
        assert reason(labels, cls=b"cow") == reason(labels, cls=b"2") == "label_not_a_class_number"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "has no names"),
        ("a\nb\na\n", "'a' twice"),
        ('{"a": 1, "b": 2}', "from 0 to 1"),
        ("[1,", "is not JSON"),
        (b"\xff", "is not UTF-8"),
    ],
)
def test_a_file_of_names_that_cannot_be_understood_is_refused(tmp_path, content, said):
    path = tmp_path / "names"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=said):
        load_labels(LabelsSection(names=str(path)), Store())


def test_a_label_may_be_any_place_of_the_json_member():
    labels = load_labels(LabelsSection(member="json.meta.class"), Store())
    assert labels.of("x", {"json": b'{"meta": {"class": 4}}', "cls": b"1"}) == 4
    for sidecar in (b'{"meta": {}}', b'{"meta": 3}', b"[", b'{"meta": {"class": null}}'):
        assert reason(labels, json=sidecar) == "no_label"
    assert reason(labels, json=b'{"meta": {"class": true}}') == "label_not_a_class_number"


def test_several_labels_in_a_member_are_told_by_a_separator_or_a_list():
    parted = load_labels(LabelsSection(separator=";"), Store())
    assert parted.multi
    assert parted.of("x", {"cls": b"7; 3;7"}) == (3, 7)
    listed = load_labels(LabelsSection(member="json.labels", multi_label=True), Store())
    assert listed.of("x", {"json": b'{"labels": [2, 0]}'}) == (0, 2)
    assert listed.of("x", {"json": b'{"labels": []}'}) == ()


def test_a_key_is_found_whole_else_by_its_longest_end_that_the_table_has(table):
    labels = table("key,label\ntrain/cat/1.jpg,0\ncat/1.png,1\n./dog.b/1,2\n1.tar.gz,3\n")
    keys = ("train/cat/1", "val/cat/1", "dog.b/1", "cow/1", "1")
    assert [labels.of(key, {}) for key in keys] == [0, 1, 2, 3, 3]
    assert reason(labels, "2") == reason(labels, "at/11") == "no_label"


def test_names_of_a_table_are_numbered_as_they_sort_over_all_splits(table):
    text = "file\tclass\tfold\na.JPEG\tzebra\t1\nb.JPEG\tant\t2\nc.JPEG\tbee\t3\nd.JPEG\t\t1\n"
    section = {"key": "file", "label": ["class"], "split": "fold", "train_split": ["1", "2"], "name": "a.tsv"}
    train, test = (table(text, part=part, test_split=["3"], **section) for part in ("train", "test"))
    assert train.names == test.names == ("ant", "bee", "zebra")
    assert (train.classes, train.of("a", {}), train.of("b", {}), test.of("c", {})) == (3, 2, 0, 1)
    assert reason(train, "c") == reason(test, "a") == "other_split"
    assert reason(train, "d") == "no_label"
    assert table(text, **section).of("c", {}) == 1, "no split is asked for"


def test_numbers_may_be_written_with_a_point_and_count_classes_over_all_rows(table):
    labels = table("key,label\na,3.0\nb,0\n")
    assert (labels.classes, labels.of("a", {}), labels.names) == (4, 3, None)
    assert table("key,label\na,3\n", classes=10).classes == 10


def test_columns_of_ones_are_a_class_each(table):
    labels = table("key,cat,dog,cow\na,1,0,1\nb,-1,,0\n", label=["cat", "dog", "cow"])
    assert (labels.classes, labels.names, labels.multi) == (3, ("cat", "dog", "cow"), True)
    assert (labels.of("a", {}), labels.of("b", {})) == ((0, 2), ())


def test_one_column_may_hold_several_labels(table):
    labels = table("key,label\na,cow|ant\nb,ant\nc,\n", separator="|", name="x.csv")
    assert (labels.names, labels.of("a", {}), labels.of("b", {})) == (("ant", "cow"), (0, 1), (0,))
    assert reason(labels, "c") == "no_label"


def test_a_gzipped_table_with_a_byte_order_mark_is_read(table):
    labels = table(gzip.compress("\ufeffkey;label\r\n\"a\";'7'\r\n".replace("'", "").encode()))
    assert labels.of("a", {}) == 7


def test_a_parquet_table_gives_what_a_csv_table_gives(table, tmp_path):

    columns = {
        "key": ["d/a.jpg", "b", "c"],
        "label": ["cow", "ant", None],
        "tags": [[1, 0], [], None],
        "n": [1, 2, 3],
    }
    parquet.write_table(pa.table(columns), tmp_path / "x")
    data = (tmp_path / "x").read_bytes()
    names = table(data, name="labels.parquet")
    assert (names.names, names.of("d/a", {}), names.of("b", {})) == (("ant", "cow"), 1, 0)
    assert reason(names, "c") == "no_label"
    assert table(data, label=["n"]).of("b", {}) == 2
    assert table(data, label=["tags"], multi_label=True).of("d/a", {}) == (0, 1)
    assert "labels.multi_label" in refusal(table, data, label=["tags"])
    assert "there are 'key', 'label', 'tags', 'n'" in refusal(table, data, key="file")
    assert "no parquet file" in refusal(table, data[:60])


def test_without_pyarrow_a_parquet_table_is_refused_with_what_to_install(table, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'streamswav[embed]'" in refusal(table, b"PAR1")


@pytest.mark.parametrize(
    ("content", "section", "said"),
    [
        ("", {}, "is empty"),
        ("\n\n", {}, "is empty"),
        ("key,label\n", {}, "has no rows"),
        ("file,class\na,1\n", {}, "labels.key = 'key'.*there are 'file', 'class'"),
        ("key,class\na,1\n", {}, "labels.label = 'label'.*there are 'key', 'class'"),
        ("key,key,label\na,b,1\n", {}, "this column twice"),
        ("key,label\na,1\nb,2,3\n", {}, "line 3 has 3 columns"),
        ("key,label\na,1\n,2\n", {}, "line 3 has no key"),
        ("key,label\na,1\nb,-1\n", {}, "line 3: '-1' is no class number; leave the cell empty"),
        ("key,label\na,1\nb,ant\n", {}, "line 3: 'ant' is no class number"),
        ("key,label\na,1\nb,12\n", {"classes": 10}, r"line 3: class 12 where there are 10 \(0 to 9\)"),
        ("key,label\na.jpg,1\nb,1\na.png,2\n", {}, "lines 2 and 4 give one key two labels"),
        ("key,s,label\na,train,1\na,test,1\n", {"split": "s"}, "lines 2 and 3 give one key two"),
        ("key,s,label\na,0,1\n", {"split": "s"}, "no row of .* is train; there are '0'"),
        ("key,a,b\nx,1,0\ny,2,0\n", {"label": ["a", "b"]}, "line 3 has '2'"),
        (b"key,label\na,1\nb\xff,2\n", {}, "is not UTF-8 text: line 3"),
        (gzip.compress(b"key,label\na,1\n")[:-9], {}, "is damaged"),
    ],
)
def test_a_table_that_cannot_be_understood_is_refused_with_the_place(table, content, section, said):
    assert re.search(said, refusal(table, content, part="train", **section))


def test_a_row_that_comes_again_is_no_conflict(table):
    assert table("key,label\na,1\na.jpg,1\n").of("a", {}) == 1


def test_labels_cross_process_borders_with_12_bytes_a_key(table):
    rows = "".join(f"n{number}/{number}.jpg,{number % 10}\n" for number in range(20_000))
    labels = table("key,label\n" + rows)
    packed = pickle.dumps(labels)
    assert len(packed) < 13 * 20_000
    there = pickle.loads(packed)
    wanted = np.random.default_rng(0).integers(0, 20_000, 500)
    assert [there.of(f"n{number}/{number}", {}) for number in wanted] == [number % 10 for number in wanted]
    assert there.digest == labels.digest != table("key,label\n" + rows + "z,3\n").digest


def test_a_table_is_read_from_s3(s3):
    bucket, folder = s3.make_bucket()
    (folder / "labels.csv").write_text("key,label\na,3\n")
    labels = load_labels(LabelsSection(file=f"{bucket}/labels.csv"), Store(s3.section))
    assert labels.of("a", {}) == 3
    with pytest.raises(NotFoundError):
        load_labels(LabelsSection(file=f"{bucket}/none.csv"), Store(s3.section))


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"split": "s"}, "labels.split"),
        ({"label": ["a", "b"]}, "labels.label"),
        ({"label": [], "file": "x"}, "labels.label"),
        ({"label": ["a", "b"], "file": "x", "separator": ";"}, "labels.separator"),
    ],
)
def test_what_cannot_work_together_is_refused_before_anything_is_read(section, key):
    with pytest.raises(ConfigError) as caught:
        parse_config({"labels": section})
    assert caught.value.key == key


def test_what_is_needed_is_said_for_each_source(table):
    assert ".cls member that holds its class number" in Labels.from_shards().needed
    assert "such as 'd/a'" in table("key,label\nd/a.jpg,1\n").needed
    assert "at a.b of its .json" in Labels(member="json.a.b").needed
    assert "has a .txt member" in Labels(member="txt").needed
