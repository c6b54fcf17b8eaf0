"""Weights: a trunk comes out of a checkpoint whole, or not at all."""

import builtins

import pytest
import torch
from tiny_run import PROTOTYPES, save_tiny_run, tiny_config

from streamswav.config import dump_config
from streamswav.errors import CheckpointError
from streamswav.models import build_network, build_trunk, to_reference_layout
from streamswav.training.checkpoint import pack
from streamswav.transfer import load_trunk
from streamswav.transfer.weights import Layout, open_trunk, recognise, untrained_trunk

IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def run(tmp_path):
    return str(tmp_path / "run")


def refusal(run, **changes):
    save_tiny_run(run, **changes)
    with pytest.raises(CheckpointError) as caught:
        load_trunk(run)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("below", ["", "/checkpoints", "/checkpoints/step-000000012", "/"])
def test_the_trunk_is_the_networks_wherever_in_the_run_the_path_points(run, below):
    network, _ = save_tiny_run(run)
    trunk = load_trunk(run + below)
    assert not trunk.training
    torch.testing.assert_close(trunk(IMAGES), network.trunk(IMAGES), rtol=0, atol=0)


def test_a_trunk_comes_out_of_a_bucket(s3):
    bucket, _ = s3.make_bucket()
    network, url = save_tiny_run(f"{bucket}/run", storage=s3.section)
    trunk, info = open_trunk(f"{bucket}/run", storage=s3.section)
    torch.testing.assert_close(trunk(IMAGES), network.trunk(IMAGES), rtol=0, atol=0)
    assert info.url == url


def test_info_tells_step_images_and_configuration(run):
    _, url = save_tiny_run(run)
    _, info = open_trunk(run)
    assert (info.url, info.step, info.images, info.config) == (url, 12, 3072, tiny_config())


def test_weights_of_another_width_are_refused_with_both_shapes(run):
    wider = dump_config(tiny_config(width=0.25)).encode()
    message = refusal(run, change=lambda files: files.update({"config.yaml": wider}))
    assert "another trunk" in message
    assert "conv1.weight (and" in message
    assert "should be [16, 3, 3, 3], is [8, 3, 3, 3]" in message


def test_a_missing_tensor_is_named(run):
    message = refusal(run, change_state=lambda state: state.pop("trunk.layer2.0.conv1.weight"))
    assert message.endswith("lacks layer2.0.conv1.weight")


def test_a_tensor_too_many_is_named(run):
    message = refusal(run, change_state=lambda state: state.update({"trunk.fc.weight": torch.ones(1)}))
    assert message.endswith("has no place for fc.weight")


def test_a_tensor_outside_the_network_is_not_passed_over(run):
    message = refusal(run, change_state=lambda state: state.update({"teacher.conv1.weight": torch.ones(1)}))
    assert "teacher.conv1.weight" in message


@pytest.mark.parametrize("name", ["model.pt", "config.yaml"])
def test_a_checkpoint_without_one_of_its_files_is_refused(run, name):
    assert f"no {name}" in refusal(run, change=lambda files: files.pop(name))


def test_a_configuration_of_another_version_is_refused(run):
    strange = b"model: {trunk: resnet10, attention: 8}"
    message = refusal(run, change=lambda files: files.update({"config.yaml": strange}))
    assert "model.attention" in message


def test_a_folder_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_trunk(str(tmp_path))


def network_state():
    return build_network(tiny_config().model, prototypes=PROTOTYPES).state_dict()


@pytest.mark.parametrize(
    ("content", "layout"),
    [
        (lambda: {"network": network_state(), "optimizer": {}}, Layout.CHECKPOINT_FILE),
        (lambda: to_reference_layout(network_state()), Layout.PUBLISHED),
        (lambda: {"state_dict": to_reference_layout(network_state()), "epoch": 800}, Layout.PUBLISHED),
        (lambda: build_trunk(tiny_config().model).state_dict(), Layout.TORCHVISION),
        (lambda: {"encoder.0.weight": torch.ones(2)}, Layout.TENSORS),
        (lambda: [1, 2, 3], Layout.OTHER),
    ],
)
def test_a_single_file_is_told_by_its_tensors_and_refused_by_what_it_is(tmp_path, content, layout):
    path = tmp_path / "weights.pth.tar"
    path.write_bytes(pack(content()))
    assert recognise(path.read_bytes()) is layout
    with pytest.raises(CheckpointError) as caught:
        load_trunk(str(path))
    assert layout.value in str(caught.value)


class RunsCode:
    def __reduce__(self):
        return builtins.exec, ("import builtins; builtins.was_run = True",)


def test_a_file_with_code_is_refused_and_not_executed(tmp_path):
    (tmp_path / "weights.pt").write_bytes(pack({"conv1.weight": torch.ones(1), "trap": RunsCode()}))
    with pytest.raises(CheckpointError, match=r"weights\.pt: no file of tensors"):
        load_trunk(str(tmp_path / "weights.pt"))
    assert not hasattr(builtins, "was_run")


@pytest.mark.parametrize("data", [b"", b"<html>404</html>", pack({"a": torch.ones(9)})[:-200]])
def test_a_file_that_is_no_archive_is_unreadable(data):
    assert recognise(data) is Layout.UNREADABLE


def test_the_untrained_trunk_is_the_one_a_run_begins_with():
    config = tiny_config()
    torch.manual_seed(config.stream.seed)
    begun = build_network(config.model, prototypes=PROTOTYPES).trunk.eval()
    torch.testing.assert_close(
        untrained_trunk(config, config.stream.seed)(IMAGES), begun(IMAGES), rtol=0, atol=0
    )


def test_making_an_untrained_trunk_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    untrained_trunk(tiny_config(), 3)
    assert torch.equal(torch.get_rng_state(), before)
