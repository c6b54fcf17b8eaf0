"""`pretrain --init` as its users run it."""

import pytest
import torch
from runs import TINY, arguments, run, state_of
from tiny_run import as_published

from streamswav.config import parse_config
from streamswav.errors import EXIT_CONFIG
from streamswav.models import build_network

MODEL = {key.removeprefix("model."): value for key, value in TINY.items() if key.startswith("model.")}
HARDLY = {"name": "sgd", "rate": 1e-30, "start_rate": 0, "final_rate": 0, "warmup_images": 0}


@pytest.fixture
def given(make_shards, tmp_path):
    """Arguments of a run of one step that hardly moves the weights, and a file in the authors' layout."""
    make_shards(tmp_path / "shards", counts=[16, 16])
    section = parse_config({"model": MODEL}).model
    torch.manual_seed(7)
    network = build_network(section, prototypes=12)
    torch.save(as_published(network), tmp_path / "swav.pth.tar")

    def build(*more, model=None, images=16):
        keys = arguments(
            run={"directory": tmp_path / "run"},
            stream={"urls": tmp_path / "shards"},
            optimizer=HARDLY,
            training={"images": images},
            model=model or {},
        )
        return [*keys, *map(str, more)]

    return network, build


def test_a_run_begins_with_a_file_and_goes_on_without_it(given, tmp_path):
    network, build = given
    file = tmp_path / "swav.pth.tar"
    begun = run(build("--init", file), tmp_path / "begun")
    assert begun.code == 0, begun.err
    (event,) = begun.of("init")
    assert event["layout"] == "SwAV"
    for words in (
        f"the run begins with {file}: resnet10 at width 0.125 with the small stem, all 72 tensors",
        "the projection head is taken",
        "the prototypes are drawn anew (12 there, 10 here)",
    ):
        assert words in event["message"]
    after = state_of(tmp_path / "run")
    for name, parameter in network.named_parameters():
        if name != "prototypes.weight":
            torch.testing.assert_close(after[f"model.pt/.network.{name}"], parameter.data, rtol=0, atol=1e-20)
    file.unlink()
    again = run(build("--init", file, images=32), tmp_path / "again")
    assert again.code == 0, again.err
    assert again.of("resumed")
    assert not again.of("init")


def test_weights_of_another_width_are_refused_before_the_shards_are_listed(given, tmp_path):
    _, build = given
    wider = build("--init", tmp_path / "swav.pth.tar", model={"width": 0.25})
    refused = run(["pretrain", *wider[1:], "--stream.urls", str(tmp_path / "nowhere")], tmp_path / "out")
    assert refused.code == EXIT_CONFIG
    (line,) = refused.said
    assert "holds resnet10 at width 0.125 with the small stem, but the run's network is resnet10" in line
    assert "set model.trunk resnet10, model.width 0.125" in line
    assert "Traceback" not in refused.err


@pytest.mark.parametrize(("content", "words"), [(None, "there is neither"), (b"<html>", "a web page")])
def test_a_file_that_is_no_weights_is_refused_in_one_line(given, tmp_path, content, words):
    _, build = given
    file = tmp_path / "file.pth"
    if content:
        file.write_bytes(content)
    refused = run(build("--init", file), tmp_path / "out")
    assert refused.code == EXIT_CONFIG
    (line,) = refused.said
    assert line.startswith(f"streamswav: {file}: {words}")
