"""What a new network takes of weights it begins with, and what stays as it was drawn."""

import pytest
import torch
from tiny_run import save_tiny_run, tiny_config

from streamswav.errors import CheckpointError, ConfigError
from streamswav.models import build_network
from streamswav.telemetry.secrecy import without_secrets
from streamswav.transfer.weights.initial import begin_with, read_initial

STORAGE = tiny_config().storage


@pytest.fixture
def begun(tmp_path):
    """Begin a network with a tiny run's weights; return both, and what was said."""

    def begin(*, prototypes=8, change_state=lambda state: None, **model):
        theirs, _ = save_tiny_run(str(tmp_path / "run"), change_state=change_state)
        section = tiny_config(**model).model
        network = build_network(section, prototypes=prototypes)
        drawn = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        told = begin_with(network, read_initial(str(tmp_path / "run"), section, storage=STORAGE))
        own, there = network.state_dict(), theirs.state_dict()
        taken = {name.partition(".")[0] for name in own if name in there and same(own[name], there[name])}
        kept = {name.partition(".")[0] for name in own if not same(own[name], drawn[name])}
        assert taken >= kept
        return told, kept

    return begin


def same(one, other):
    return one.shape == other.shape and torch.equal(one, other)


def test_trunk_head_and_prototypes_are_taken_where_they_fit(begun):
    told, taken = begun()
    assert taken == {"trunk", "projection_head", "prototypes"}
    assert told == ["the projection head is taken", "the prototypes are taken"]


def test_prototypes_of_another_number_are_drawn_anew(begun):
    told, taken = begun(prototypes=9)
    assert taken == {"trunk", "projection_head"}
    assert told[1] == "the prototypes are drawn anew (8 there, 9 here)"


def test_prototypes_stay_with_the_head_they_were_trained_with(begun):
    told, taken = begun(head_hidden=32)
    assert taken == {"trunk"}
    assert told == [
        "the projection head is drawn anew (projection_head.0.weight is [16, 64] there and [32, 64] here)",
        "the prototypes are drawn anew (they belong to the head that is not taken)",
    ]


def test_a_head_without_batch_norm_does_not_take_one_with_it(begun):
    told, taken = begun(head_batch_norm=False)
    assert taken == {"trunk"}
    assert told[0] == "the projection head is drawn anew (it has more layers there)"


def test_a_trunk_alone_is_taken(begun):
    def cut(state):
        for name in [name for name in state if not name.startswith("trunk.")]:
            del state[name]

    told, taken = begun(change_state=cut)
    assert taken == {"trunk"}
    assert "there is none" in told[0]
    assert told[1] == "the prototypes are drawn anew (there are none)"


def test_a_head_that_holds_no_numbers_is_refused(begun):
    def spoil(state):
        state["projection_head.3.bias"] = torch.full((8,), torch.nan)

    with pytest.raises(CheckpointError, match=r"projection_head\.3\.bias holds 8 values that are NaN"):
        begun(change_state=spoil)


@pytest.mark.parametrize(
    ("model", "asked"),
    [
        ({"width": 0.25}, "resnet10 at width 0.25 with the small stem"),
        ({"trunk": "resnet18"}, "resnet18 at width 0.125 with the small stem"),
        ({"stem": "imagenet"}, "resnet10 at width 0.125"),
    ],
)
def test_a_trunk_of_another_model_is_refused_naming_both(begun, model, asked):
    with pytest.raises(CheckpointError) as caught:
        begun(**model)
    message = str(caught.value)
    assert "holds resnet10 at width 0.125 with the small stem, but the run's network is" in message
    assert f"{asked}: set model.trunk resnet10, model.width 0.125, model.stem small" in message


def test_a_model_that_does_not_exist_is_named_before_anything_is_read():
    with pytest.raises(ConfigError, match=r"model\.trunk"):
        read_initial("nowhere", tiny_config(trunk="resnet11").model, storage=STORAGE)


def test_the_configuration_tells_the_stride_that_a_file_does_not(tmp_path):
    section = tiny_config(stem="strided").model
    trunk = build_network(section, prototypes=8).trunk
    torch.save(trunk.state_dict(), tmp_path / "weights.pth")
    report = read_initial(str(tmp_path / "weights.pth"), section, storage=STORAGE).info.report
    assert str(report).startswith("resnet10 at width 0.125 with the strided stem")
    assert report.notes == ()


def test_a_signed_url_does_not_come_to_lie_in_the_runs_folder():
    config = tiny_config(init="https://host/weights.pth?X-Amz-Signature=secret")
    assert without_secrets(config).model.init == "https://host/weights.pth"
