"""Weights: a trunk comes out of a checkpoint of this trainer whole, or not at all."""

import shutil

import pytest
import torch
from tiny_run import PROTOTYPES, save_tiny_run, tiny_config

from streamswav.config import dump_config
from streamswav.errors import CheckpointError
from streamswav.models import build_network
from streamswav.transfer import load_trunk
from streamswav.transfer.weights.trunks import open_network, open_trunk, untrained_trunk

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


def test_the_report_counts_what_was_taken_and_what_was_not(run):
    save_tiny_run(run)
    _, info = open_trunk(run)
    assert info.layout == "streamswav"
    assert info.report.beside == {"head": 9, "prototypes": 1}
    assert (info.report.missing, info.report.left_over, info.report.cast) == ((), {}, {})
    assert str(info.report).startswith("resnet10 at width 0.125 with the small stem, all 72 tensors")


def test_weights_of_another_width_are_refused_with_both_shapes(run):
    wider = dump_config(tiny_config(width=0.25)).encode()
    message = refusal(run, change=lambda files: files.update({"config.yaml": wider}))
    assert "not the resnet10 at width 0.25 with the small stem of its config.yaml" in message
    assert "60 of 60 tensors of another shape, first conv1.weight" in message
    assert "should be [16, 3, 3, 3] and is [8, 3, 3, 3]" in message


def test_a_missing_tensor_is_named(run):
    message = refusal(run, change_state=lambda state: state.pop("trunk.layer2.0.conv1.weight"))
    assert message.endswith("1 of 60 tensors missing, first layer2.0.conv1.weight")


def test_a_tensor_too_many_is_named(run):
    message = refusal(run, change_state=lambda state: state.update({"trunk.conv9.weight": torch.ones(1)}))
    assert message.endswith("1 too many, first conv9.weight")


@pytest.mark.parametrize("name", ["teacher.conv1.weight", "trunk.fc.weight"])
def test_a_tensor_outside_the_network_is_not_passed_over(run, name):
    message = refusal(run, change_state=lambda state: state.update({name: torch.ones(1)}))
    assert message.endswith(f"{name} belongs to no network that is known here")


def test_the_network_is_the_whole_one(run):
    network, _ = save_tiny_run(run)
    opened, info = open_network(run)
    assert not opened.training
    for own, theirs in zip(opened([IMAGES]), network([IMAGES]), strict=True):
        torch.testing.assert_close(own, theirs, rtol=0, atol=0)
    assert info.config == tiny_config()


def test_a_network_whose_head_is_not_its_configurations_is_refused(run):
    other = dump_config(tiny_config(head_hidden=32)).encode()
    save_tiny_run(run, change=lambda files: files.update({"config.yaml": other}))
    assert open_trunk(run)[1].config.model.head_hidden == 32
    with pytest.raises(CheckpointError, match=r"projection_head\.0\.weight is not that of"):
        open_network(run)


def test_a_finetuned_checkpoint_gives_its_trunk_and_has_no_prototypes(run):
    def finetune(state):
        for name in [name for name in state if not name.startswith("trunk.")]:
            del state[name]
        state.update({"head.weight": torch.zeros(4, 64), "head.bias": torch.zeros(4)})

    network, _ = save_tiny_run(run, change_state=finetune)
    trunk, info = open_trunk(run)
    torch.testing.assert_close(trunk(IMAGES), network.trunk(IMAGES), rtol=0, atol=0)
    assert info.report.beside == {"head": 2}
    with pytest.raises(CheckpointError, match="no projection head with prototypes"):
        open_network(run)


def test_model_pt_itself_stands_for_its_checkpoint(run):
    network, url = save_tiny_run(run, config=tiny_config(stem="strided"))
    trunk, info = open_trunk(f"{url}/model.pt")
    assert (info.step, info.config.model.stem) == (12, "strided")
    torch.testing.assert_close(trunk(IMAGES), network.trunk(IMAGES), rtol=0, atol=0)


def test_model_pt_taken_out_of_its_folder_is_read_as_a_file_that_says_less(run, tmp_path):
    network, url = save_tiny_run(run)
    shutil.copy(f"{url}/model.pt", tmp_path / "alone.pt")
    trunk, info = open_trunk(str(tmp_path / "alone.pt"))
    assert (info.step, info.images, info.layout) == (None, None, "streamswav")
    assert "the stride of the 3x3 stem is not seen" in str(info.report)
    torch.testing.assert_close(trunk(IMAGES), network.trunk(IMAGES), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["model.pt", "config.yaml"])
def test_a_checkpoint_without_one_of_its_files_is_refused(run, name):
    assert f"no {name}" in refusal(run, change=lambda files: files.pop(name))


def test_a_configuration_of_another_version_is_refused(run):
    strange = b"model: {trunk: resnet10, attention: 8}"
    message = refusal(run, change=lambda files: files.update({"config.yaml": strange}))
    assert "model.attention" in message


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_trunk(str(tmp_path))


def test_a_path_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.pth: there is neither a checkpoint nor a file"):
        load_trunk(tmp_path / "none.pth")


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
