"""Results side by side."""

import argparse
import json
from dataclasses import replace

import pytest

from streamswav.commands.compare import add_compare_arguments, run_compare
from streamswav.config import Config
from streamswav.errors import ConfigError
from streamswav.transfer.measuring.comparison import Comparison
from streamswav.transfer.measuring.intervals import difference, wilson
from streamswav.transfer.measuring.results import Accuracy, DataUsed, Results, to_value


def results(top1, *, k=20, temperature=0.1, test="ab", resize=16, column="checkpoint"):
    data = {"test": DataUsed(["s3://b/test"], 200, 4, digest=test)}
    settings = {"k": k, "temperature": temperature}
    value = to_value(f"kNN, k = {k}", settings, column, Accuracy(top1, 0.9, 200))
    return Results({"checkpoint": "run", "step": 3}, data, {"resize": resize}, {}, [value], "knn")


@pytest.fixture
def write(tmp_path):
    def write(**named):
        for name, each in named.items():
            (tmp_path / f"{name}.json").write_text(each.to_json())
        return [str(tmp_path / f"{name}.json") for name in named]

    return write


def run(*arguments):
    parser = argparse.ArgumentParser()
    add_compare_arguments(parser)
    parsed, words = parser.parse_known_args(arguments)
    parsed.words = words
    run_compare(parsed, given=Config())


def test_a_row_has_both_figures_and_their_difference_with_its_interval(write, capsys):
    run(*write(before=results(0.75), after=results(0.8)))
    out = capsys.readouterr().out
    low, high = difference(0.75, wilson(0.75, 200), 0.8, wilson(0.8, 200))
    (row,) = (line for line in out.splitlines() if "top-1" in line)
    assert row.split("  ")[0] == "kNN, k = 20, top-1"
    assert "75.00 (68.57 to 80.49)" in row
    assert f"+5.00 ({100 * low:+.2f} to {100 * high:+.2f})" in row
    assert "before: knn, checkpoint run, step 3" in out
    assert "NOT THE SAME" not in out
    assert "after - before" in out


@pytest.mark.parametrize(
    ("other", "note"),
    [
        ({"test": "cd"}, "b: test data: other images or labels, 200 each"),
        ({"resize": 32}, "b: preprocessing: resize 16 against 32"),
        ({"temperature": 0.07}, "b: settings of kNN, k = 20: temperature 0.1 against 0.07"),
        ({"k": 5}, "no measurement is in all files"),
        ({"column": "pixels"}, "no measurement is in all files"),
    ],
)
def test_what_makes_figures_incomparable_is_said(write, capsys, other, note):
    run(*write(a=results(0.75), b=results(0.75, **other)))
    assert f"NOT THE SAME: {note}\n" in capsys.readouterr().out


def test_other_numbers_of_images_are_said_also_of_files_without_digest():
    first = results(0.5, test="")
    fewer = replace(first, data={"test": DataUsed(["s3://b/test"], 100, 4)})
    elsewhere = replace(first, data={"test": DataUsed(["s3://c/test"], 200, 4)})
    notes = Comparison(["a.json", "b.json", "c.json", "d.json"], [first, fewer, elsewhere, first]).notes
    assert notes == [
        "b: test data: 200 images of 4 classes against 100 images of 4 classes",
        "c: test data: s3://b/test against s3://c/test, as many images and classes",
    ]


def test_three_files_are_compared_with_the_first(write, capsys):
    run("--json", *write(a=results(0.5), b=results(0.6), c=results(0.4, k=1)))
    read = json.loads(capsys.readouterr().out)
    row = read["rows"][0]
    assert [value and value["score"] for value in row["values"]] == [0.5, 0.6, None]
    assert row["differences"][0]["change"] == pytest.approx(0.1)
    assert row["differences"][0]["low"] < 0.1 < row["differences"][0]["high"]
    assert row["differences"][1] is None
    assert [each["command"] for each in read["files"]] == ["knn"] * 3


def test_markdown_is_a_table(write, capsys):
    run("--markdown", *write(a=results(0.5), b=results(0.6)))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| per cent | a | b | b - a |"
    assert lines[1] == "| --- | ---: | ---: | ---: |"
    assert lines[2].startswith("| kNN, k = 20, top-1 | 50.00 (")


def test_files_of_one_name_are_told_apart_by_their_folders():
    both = [results(0.5)] * 2
    assert Comparison(["s3://b/one/r.json", "s3://b/two/r.json"], both).names == ["one/r", "two/r"]
    assert Comparison(["r.json", "r.json"], both).names == ["r.json (1)", "r.json (2)"]


def test_one_file_is_too_few(write):
    with pytest.raises(ConfigError, match="takes two files or more"):
        run(*write(a=results(0.5)))


def test_a_bad_file_is_named(write, tmp_path):
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"bad\.json: is no results file"):
        run(*write(a=results(0.5)), str(tmp_path / "bad.json"))
