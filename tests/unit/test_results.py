"""Results as they are written, read and shown."""

import json

import pytest
import torch

from streamswav.errors import ConfigError, NotFoundError
from streamswav.stream.store import Store
from streamswav.transfer.measuring.intervals import wilson
from streamswav.transfer.measuring.results import (
    Accuracy,
    DataUsed,
    Hits,
    Results,
    Value,
    count_hits,
    over_runs,
    to_value,
)
from streamswav.transfer.measuring.results_file import read_results


def some_results(*values: Value) -> Results:
    data = {"test": DataUsed(["s3://b/test"], 200, 4, {"no_label": 3}, digest="ab", shards="cd")}
    return Results({"trunk": "resnet10"}, data, {"resize": 16}, {"linear": 0}, values, "evaluate")


@pytest.fixture
def results() -> Results:
    runs = {0: {"top1": 0.5}, 1: {"top1": 0.6}, 2: {"top1": 0.55}}
    return some_results(
        to_value("kNN, k = 20", {"k": 20}, "checkpoint", Accuracy(0.75, 0.9, 200)),
        over_runs("lowshot, n = 13", {"images_per_class": 13}, "checkpoint", runs),
    )


def test_what_is_written_is_read_again(results, tmp_path):
    file = tmp_path / "results.json"
    file.write_text(results.to_json())
    again = read_results(str(file), Store())
    assert again.to_json() == results.to_json()
    assert again.value("kNN, k = 20").intervals["top1"] == wilson(0.75, 200)


def test_several_seeds_give_mean_spread_and_interval(results):
    value = results.value("lowshot, n = 13")
    assert value.scores["top1"] == pytest.approx(0.55)
    assert value.spread["top1"] == pytest.approx(0.05)
    assert value.by_seed == {"top1": {"0": 0.5, "1": 0.6, "2": 0.55}}
    assert value.intervals["top1"].low == pytest.approx(0.55 - 4.303 * 0.05 / 3**0.5)
    alone = over_runs("x", {}, "checkpoint", {7: {"top1": 0.5}})
    assert (alone.scores, alone.intervals, alone.spread) == ({"top1": 0.5}, {}, {})


def test_the_table_shows_intervals(results):
    assert "kNN, k = 20, top-1" in results.to_table()
    assert "75.00 (68.57-80.49)" in results.to_table()


def test_files_of_the_first_format_are_read_and_get_intervals(tmp_path):
    file = tmp_path / "old.json"
    value = {"protocol": "linear", "settings": {}, "column": "pixels", "scores": {"top1": 0.5, "top5": 0.75}}
    used = {"urls": ["x"], "images": 400, "classes": 10, "skipped": {}}
    old = {"format_version": 1, "model": {}, "data": {"test": used}, "preprocessing": {}, "seeds": {}}
    file.write_text(json.dumps({**old, "values": [value]}))
    read = read_results(str(file), Store())
    assert read.value("linear", "pixels").intervals["top1"] == wilson(0.5, 400)
    assert (read.command, read.program) == ("", "")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is not JSON"),
        ('{"a": ', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1, 2]", "is no results file"),
        ('{"format_version": 2}', "is no results file"),
        ('{"format_version": "2", "values": []}', "is no results file"),
        ('{"format_version": 3, "values": []}', "has format 3, and this version reads up to 2"),
        ('{"format_version": 2, "values": [{"protocol": 3}]}', "is damaged: "),
    ],
)
def test_a_file_that_holds_no_results_is_one_line(tmp_path, text, reason):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ConfigError, match=reason) as caught:
        read_results(str(tmp_path / "bad.json"), Store())
    assert "bad.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_not_found(tmp_path):
    with pytest.raises(NotFoundError):
        read_results(str(tmp_path / "none.json"), Store())


def test_hits_add_up_to_the_accuracy_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(100, 20, generator=generator)
    labels = torch.randint(0, 20, (100,), generator=generator)
    whole = count_hits(scores, labels)
    assert count_hits(scores[:33], labels[:33]) + count_hits(scores[33:], labels[33:]) == whole
    assert whole.accuracy == Accuracy(whole.top1 / 100, whole.top5 / 100, 100)
    assert Hits().accuracy == Accuracy(0.0, 0.0, 0)
