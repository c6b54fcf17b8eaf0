"""Classes of which nobody knows whether an image has them (VOC's difficult objects), from table to target."""

import pytest

from streamswav.config import LabelsSection, parse_config
from streamswav.errors import ConfigError
from streamswav.loader import _stack
from streamswav.stream.labels import load_labels
from streamswav.stream.store import Store

COLUMNS = ["dog", "cat", "cow"]
# VOC's own files: 1 present, 0 difficult, -1 not present.
TABLE = "key,dog,cat,cow\na,1,0,-1\nb,-1,-1,1.0\nc,0,0.0,0\n"


def labels(tmp_path, unknown):
    (tmp_path / "voc.csv").write_text(TABLE)
    section = LabelsSection(file=str(tmp_path / "voc.csv"), label=COLUMNS, unknown=unknown)
    return load_labels(section, Store())


@pytest.mark.parametrize(
    ("unknown", "expected"),
    [
        ("", [[1, 0, 0], [0, 0, 1], [0, 0, 0]]),
        ("0", [[1, -1, 0], [0, 0, 1], [-1, -1, -1]]),
        ("-1", [[1, 0, -1], [-1, -1, 1], [0, 0, 0]]),
    ],
)
def test_a_cell_says_present_absent_or_unknown(tmp_path, unknown, expected):
    known = labels(tmp_path, unknown)
    found = [known.of(key, {}) for key in "abc"]
    assert _stack(found, known).tolist() == expected


def test_the_numbers_of_unknown_classes_are_complements(tmp_path):
    assert labels(tmp_path, "0").of("a", {}) == (0, ~1)


def test_what_is_unknown_is_part_of_what_decides_labels(tmp_path):
    assert len({labels(tmp_path, unknown).digest for unknown in ("", "0", "-1")}) == 3


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"unknown": "2", "label": COLUMNS}, "is 0 or -1"),
        ({"unknown": "0"}, "name them in labels.label"),
    ],
)
def test_what_cannot_be_meant_is_refused(section, reason):
    with pytest.raises(ConfigError, match=f"labels.unknown = .*{reason}"):
        parse_config({"labels": {"file": "x.csv", **section}})
