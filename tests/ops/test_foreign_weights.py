"""`knn --checkpoint FILE` as its users run it: weights that this trainer did not write."""

import json
import pickle

import pytest
import torch
from runs import run
from tiny_run import save_tiny_run

from streamswav.errors import EXIT_CONFIG


@pytest.fixture
def given(make_shards, tmp_path):
    """A run, and its trunk in a file of MoCo v2's layout; arguments for either."""
    network, _ = save_tiny_run(str(tmp_path / "run"))
    encoder = {f"module.encoder_q.{name}": tensor for name, tensor in network.trunk.state_dict().items()}
    rest = {"module.encoder_q.fc.0.weight": torch.ones(2), "module.queue": torch.ones(2)}
    torch.save({"epoch": 200, "state_dict": {**encoder, **rest}}, tmp_path / "moco.pth.tar")
    make_shards(tmp_path / "data", counts=[30, 30], image=(24, 20), classes=3)

    def arguments(checkpoint, *more):
        data = ["--train", str(tmp_path / "data"), "--test", str(tmp_path / "data")]
        usual = ["--workers", "0", "--resize", "16", "--crop", "16", "--k", "3"]
        return ["knn", "--checkpoint", str(tmp_path / checkpoint), *data, *usual, *more]

    return arguments


def test_a_file_measures_as_the_run_it_came_from(given, tmp_path):
    outcomes = {}
    for name in ("run", "moco.pth.tar"):
        more = ["--baselines", "untrained", "pixels", "--json", str(tmp_path / "results.json")]
        outcomes[name] = run(given(name, *more), tmp_path / "out")
        assert outcomes[name].code == 0, outcomes[name].err
        outcomes[name, "json"] = json.loads((tmp_path / "results.json").read_text())
    (event,) = outcomes["moco.pth.tar"].of("weights")
    assert event["layout"] == "MoCo v2"
    for words in ("all 72 tensors, laid down as by MoCo v2", "left over: fc 1, queue 1"):
        assert words in event["message"]
    ours, theirs = outcomes["run", "json"], outcomes["moco.pth.tar", "json"]
    scores = [[(each["column"], each["scores"]) for each in found["values"]] for found in (ours, theirs)]
    assert scores[0][0] == scores[1][0]
    assert {column for column, _ in scores[1]} == {"checkpoint", "untrained", "pixels"}
    model = theirs["model"]
    assert (model["layout"], model["step"], model["images"]) == ("MoCo v2", None, None)
    assert "step unknown, images unknown" in outcomes["moco.pth.tar"].out


def test_what_cannot_be_loaded_is_refused_in_one_line_before_the_shards_are_read(given, tmp_path):
    class RunsCode:
        def __reduce__(self):
            return print, ("was run",)

    whole = (tmp_path / "moco.pth.tar").read_bytes()
    state = torch.load(tmp_path / "moco.pth.tar", weights_only=True)["state_dict"]
    del state["module.encoder_q.layer1.0.conv1.weight"]
    for shard in (tmp_path / "data").glob("*.tar"):
        shard.unlink()

    def check(name, words):
        refused = run(given(name), tmp_path / "out")
        assert refused.code == EXIT_CONFIG
        (line,) = refused.said
        assert line.startswith(f"streamswav: {tmp_path / name}: ")
        assert words in line
        assert "Traceback" not in refused.err
        assert refused.out == ""

    (tmp_path / "cut.pth").write_bytes(whole[:-100])
    check("cut.pth", "it is cut off or damaged")
    (tmp_path / "trap.pkl").write_bytes(pickle.dumps(RunsCode()))
    check("trap.pkl", "a plain pickle")
    torch.save({"trap": RunsCode()}, tmp_path / "trap.pth")
    check("trap.pth", "it holds print, which would have to be executed; nothing was")
    torch.save(state, tmp_path / "less.pth")
    check("less.pth", "closest to resnet10 at width 0.125 with the small stem, but 1 of 60 tensors missing")
    check("none.pth", "there is neither a checkpoint nor a file of weights")
