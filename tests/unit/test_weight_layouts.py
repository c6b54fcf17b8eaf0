"""Every layout gives the trunk that is in it, and says what else was there; less than a trunk is refused."""

import argparse
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_run import as_published, tiny_config
from torchvision.models import wide_resnet50_2
from torchvision.models.resnet import Bottleneck

from streamswav.errors import CheckpointError
from streamswav.models import Trunk, build_network, build_trunk
from streamswav.models.trunk import Architecture
from streamswav.transfer.weights.names import to_detectron2
from streamswav.transfer.weights.trunks import open_network, open_trunk

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SECTION = tiny_config(stem="imagenet").model


@pytest.fixture(scope="module")
def network():
    """A tiny network whose running statistics are not those of a new one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        network = build_network(SECTION, prototypes=6)
    with torch.no_grad():
        network(torch.split(torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(1)), 8))
    return network.eval()


@pytest.fixture(scope="module")
def other():
    """The tensors of another trunk of the same kind, which must not be taken."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return build_trunk(SECTION).state_dict()


@pytest.fixture
def opened(tmp_path, network):
    """Save a file and open it; its features must be those of the network's trunk."""

    def save_and_open(content, name="weights.pth", **options):
        torch.save(content, tmp_path / name, **options)
        trunk, info = open_trunk(str(tmp_path / name))
        assert not trunk.training
        torch.testing.assert_close(trunk(IMAGES), network.trunk(IMAGES), rtol=0, atol=0)
        assert (info.config.model.trunk, info.config.model.width) == ("resnet10", 0.125)
        assert (info.step, info.images, info.url) == (None, None, str(tmp_path / name))
        return info

    return save_and_open


@pytest.fixture
def refused(tmp_path):
    def save_and_fail(content, name="weights.pth"):
        torch.save(content, tmp_path / name)
        with pytest.raises(CheckpointError) as caught:
            open_trunk(str(tmp_path / name))
        message = str(caught.value)
        assert message.startswith(f"{tmp_path / name}: ")
        assert "\n" not in message
        return message

    return save_and_fail


def below(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def classifier(count):
    """`count` tensors of a classifier: a layer, or MoCo's two."""
    layers = [""] if count == 2 else ["0.", "2."]
    return {f"fc.{layer}{kind}": torch.ones(3) for layer in layers for kind in ("weight", "bias")}


def test_the_authors_released_files(opened, network):
    info = opened(as_published(network), "swav_800ep_pretrain.pth.tar")
    assert (info.layout, info.report.prefix) == ("SwAV", "module.")
    assert info.report.beside == {"head": 9, "prototypes": 1}
    assert info.config.swav.prototypes == 6
    assert info.config.model == SECTION


def test_the_authors_training_checkpoints_with_numpys_scalars(opened, network):
    group = {"lr": np.float64(4.8), "eta": np.float32(1), "steps": np.int64(3), "nesterov": np.bool_(0)}
    momenta = {number: {"momentum_buffer": torch.ones(3)} for number in range(2)}
    optimizer = {"state": momenta, "param_groups": [group]}
    state = as_published(network)
    content = {"epoch": 400, "state_dict": state, "optimizer": optimizer, "amp": {"scale": torch.ones(1)}}
    info = opened(content, "checkpoint.pth.tar")
    assert (info.layout, info.report.prefix) == ("SwAV", "state_dict.module.")
    assert info.report.left_over == {"optimizer": 3}


def test_numpys_older_names_are_known_as_well(opened, network, tmp_path):
    """numpy 1 wrote `numpy.core`, in a pickle of the old format."""
    content = {"state_dict": as_published(network), "lr": np.float64(1)}
    options = {"_use_new_zipfile_serialization": False}
    opened(content, **options)
    data = (tmp_path / "weights.pth").read_bytes()
    assert b"numpy._core.multiarray" in data
    (tmp_path / "old.pth").write_bytes(data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    trunk, _ = open_trunk(str(tmp_path / "old.pth"))
    torch.testing.assert_close(trunk(IMAGES), network.trunk(IMAGES), rtol=0, atol=0)


def vissl(network, heads="heads.0."):
    trunk = below("_feature_blocks.", network.trunk.state_dict())
    head = below("0.projection_head.", network.projection_head.state_dict())
    head["0.prototypes0.weight"] = network.prototypes.weight.detach()
    return {
        "phase_idx": 799,
        "loss": {"num_iteration": 5, "local_queue": torch.ones(4, 8), "_queue": torch.ones(3)},
        "classy_state_dict": {
            "train_phase_idx": 799,
            "base_model": {"model": {"trunk": trunk, "heads": head}, "meta": {"name": "m"}},
            "optimizer": {"optim": {"state": {0: {"momentum_buffer": torch.ones(3)}}}},
        },
    }


def test_vissls_checkpoints(opened, network, tmp_path):
    info = opened(vissl(network), "model_final_checkpoint_phase799.torch")
    assert info.layout == "VISSL"
    assert info.report.prefix == "classy_state_dict.base_model.model.trunk._feature_blocks."
    assert info.report.left_over == {"queue": 2, "optimizer": 1}
    assert info.report.beside == {"head": 9, "prototypes": 1}
    whole, _ = open_network(str(tmp_path / "model_final_checkpoint_phase799.torch"))
    torch.testing.assert_close(whole([IMAGES]), network([IMAGES]), rtol=0, atol=0)


@pytest.mark.parametrize(
    "prefix", ["_feature_blocks.", "trunk._feature_blocks.", "trunk.base_model._feature_blocks."]
)
def test_vissls_flat_files(opened, network, prefix):
    assert opened(below(prefix, network.trunk.state_dict())).layout == "VISSL"


@pytest.mark.parametrize("wrapped", [None, "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_torchvisions_and_timms_state_dicts(opened, network, wrapped, prefix):
    state = below(prefix, {**network.trunk.state_dict(), **classifier(2)})
    info = opened(state if wrapped is None else {wrapped: state, "epoch": 3})
    assert info.layout == "torchvision"
    assert info.report.left_over == {"fc": 2}


def test_timms_training_checkpoints_give_the_moving_average(opened, network, other):
    content = {
        "epoch": 3,
        "arch": "resnet10",
        "state_dict": other,
        "state_dict_ema": network.trunk.state_dict(),
        "args": argparse.Namespace(model="resnet10", lr=0.1),
        "metric": np.float64(70.1),
    }
    info = opened(content)
    assert info.layout == "timm, moving average"
    assert info.report.left_over == {"state_dict": 72}


def test_dinos_plain_files(opened, network):
    assert opened(network.trunk.state_dict(), "dino_resnet50_pretrain.pth").report.left_over == {}


@pytest.mark.parametrize("prefix", ["module.backbone.", "backbone."])
def test_dinos_full_checkpoints_give_the_teacher(opened, network, other, prefix):
    head = {prefix.replace("backbone", "head") + "last_layer.weight_g": torch.ones(3)}
    content = {
        "student": {**below(prefix, other), **head},
        "teacher": {**below(prefix, network.trunk.state_dict()), **head},
        "optimizer": {"state": {}, "param_groups": []},
        "epoch": 400,
        "args": argparse.Namespace(arch="resnet50", lr=0.3),
        "dino_loss": {"center": torch.ones(1, 5)},
    }
    info = opened(content)
    assert info.layout == "DINO"
    assert info.report.left_over == {f"student.{prefix[:-1]}": 72, "head": 2, "loss": 1}


def test_moco_v2_gives_the_encoder_that_learns(opened, network, other):
    state = {
        **below("module.encoder_q.", {**network.trunk.state_dict(), **classifier(4)}),
        **below("module.encoder_k.", {**other, **classifier(4)}),
        "module.queue": torch.ones(128, 10),
        "module.queue_ptr": torch.zeros(1, dtype=torch.long),
    }
    info = opened({"epoch": 200, "arch": "resnet50", "state_dict": state, "optimizer": {"state": {}}})
    assert info.layout == "MoCo v2"
    assert info.report.left_over == {"fc": 4, "state_dict.module.encoder_k": 76, "queue": 2}


def test_moco_v3_gives_the_encoder_that_learns(opened, network, other):
    state = {
        **below("module.base_encoder.", {**network.trunk.state_dict(), **classifier(4)}),
        **below("module.momentum_encoder.", {**other, **classifier(4)}),
        "module.predictor.0.weight": torch.ones(3, 3),
    }
    info = opened({"epoch": 1000, "state_dict": state, "scaler": {"scale": 1.0}})
    assert info.layout == "MoCo v3"
    assert info.report.left_over == {"fc": 4, "state_dict.module.momentum_encoder": 76, "head": 1}


def test_a_lone_trunk_below_any_other_prefix(opened, network):
    info = opened({"state_dict": below("detector.backbone.body.", network.trunk.state_dict())})
    assert (info.layout, info.report.prefix) == (
        "torchvision's names",
        "state_dict.detector.backbone.body.",
    )


def test_a_learning_trunk_is_preferred_to_its_moving_average(opened, network, other):
    opened({**below("momentum_backbone.", other), **below("backbone.", network.trunk.state_dict())})


def test_several_trunks_of_equal_right_are_refused(refused, network, other):
    state = network.trunk.state_dict()
    message = refused({**below("left.", state), **below("right.", other)})
    assert "it holds 2 trunks (left.conv1.weight, right.conv1.weight)" in message


def test_detectron2s_names(opened, network):
    """Its own networks may have the stride elsewhere, which the names do not tell."""
    trunk = below("backbone.bottom_up.", to_detectron2(network.trunk.state_dict()))
    info = opened({"model": {**trunk, "roi_heads.box_head.fc1.weight": torch.ones(3)}, "iteration": 9})
    assert info.layout == "detectron2"
    assert info.report.left_over == {"head": 1}
    assert "STRIDE_IN_1X1: false" in str(info.report)


def test_safetensors(network, tmp_path):
    save_file(network.trunk.state_dict(), tmp_path / "model.safetensors")
    trunk, info = open_trunk(str(tmp_path / "model.safetensors"))
    torch.testing.assert_close(trunk(IMAGES), network.trunk(IMAGES), rtol=0, atol=0)
    assert info.layout == "torchvision"


def test_torchs_old_format(opened, network):
    opened(network.trunk.state_dict(), _use_new_zipfile_serialization=False)


def test_files_saved_on_a_gpu(opened, network, monkeypatch):
    """What a file says of the device it was saved on is all that is different about it."""
    monkeypatch.setattr(torch.serialization, "location_tag", lambda _: "cuda:3")
    opened(network.trunk.state_dict())


def test_what_is_kept_does_not_hang_on_the_file(network, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(network.trunk.state_dict(), path)
    trunk, _ = open_trunk(str(path))
    path.write_bytes(bytes(path.stat().st_size))
    torch.testing.assert_close(trunk(IMAGES), network.trunk(IMAGES), rtol=0, atol=0)


def test_files_from_before_counters_were_kept(opened, network):
    state = {name: each for name, each in network.trunk.state_dict().items() if "num_batches" not in name}
    info = opened(state)
    assert len(info.report.missing) == 12
    assert "12 counters of batch norms missing" in str(info.report)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_brought_to_float32_and_reported(network, tmp_path, dtype):
    state = {
        name: each.to(dtype) if each.is_floating_point() else each
        for name, each in network.trunk.state_dict().items()
    }
    torch.save(state, tmp_path / "half.pth")
    trunk, info = open_trunk(str(tmp_path / "half.pth"))
    assert info.report.cast == {str(dtype).removeprefix("torch."): 60}
    assert {parameter.dtype for parameter in trunk.parameters()} == {torch.float32}
    torch.testing.assert_close(trunk(IMAGES), network.trunk(IMAGES), rtol=0.05, atol=0.05)


class TestHeads:
    """Projection heads and prototypes in the forms that are about."""

    @pytest.fixture
    def opened_network(self, tmp_path):
        def save_and_open(state):
            torch.save(state, tmp_path / "weights.pth")
            return open_network(str(tmp_path / "weights.pth"))

        return save_and_open

    @pytest.fixture
    def bare(self):
        """A network without batch norm in its head."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            section = SECTION.model_copy(update={"head_batch_norm": False})
            return build_network(section, prototypes=6).eval()

    @pytest.mark.parametrize("last", [2, 3])
    def test_without_batch_norm(self, opened_network, bare, last):
        """The last layer is number 3 where the norm's place is kept, 2 where it is not."""
        state = {
            name.replace("projection_head.3", f"projection_head.{last}"): each
            for name, each in as_published(bare).items()
        }
        network, info = opened_network(state)
        assert not info.config.model.head_batch_norm
        torch.testing.assert_close(network([IMAGES]), bare([IMAGES]), rtol=0, atol=0)

    @pytest.mark.parametrize("name", ["projection_head", "projection_head.0"])
    def test_a_single_layer(self, opened_network, network, name):
        trunk = below("module.", network.trunk.state_dict())
        head = {f"module.{name}.weight": torch.ones(8, 64), f"module.{name}.bias": torch.zeros(8)}
        found, info = opened_network({**trunk, **head, "module.prototypes.weight": torch.ones(5, 8)})
        assert (info.config.model.head_hidden, info.config.model.embedding) == (0, 8)
        assert found([IMAGES])[1].shape == (2, 5)

    def test_a_set_of_prototypes_with_a_number(self, opened_network, network):
        state = as_published(network)
        state["module.prototypes.prototypes0.weight"] = state.pop("module.prototypes.weight")
        torch.testing.assert_close(opened_network(state)[0]([IMAGES]), network([IMAGES]), rtol=0, atol=0)

    def test_several_sets_of_prototypes_are_left_over(self, opened, opened_network, network):
        state = as_published(network)
        for number in (0, 1):
            state[f"module.prototypes.prototypes{number}.weight"] = state["module.prototypes.weight"]
        del state["module.prototypes.weight"]
        assert opened(state).report.left_over == {"prototypes": 2}
        with pytest.raises(CheckpointError, match="no projection head with prototypes"):
            opened_network(state)

    def test_a_head_of_another_form_is_left_over(self, opened, network):
        state = as_published(network)
        state["module.projection_head.4.weight"] = torch.ones(8)
        state["module.projection_head.4.running_mean"] = torch.ones(8)
        assert opened(state).report.left_over == {"head": 11, "prototypes": 1}

    def test_a_head_for_other_features_is_left_over(self, opened, network):
        state = as_published(network)
        state["module.projection_head.0.weight"] = torch.ones(16, 65)
        assert opened(state).report.left_over == {"head": 9, "prototypes": 1}

    def test_prototypes_that_are_not_finite_matter_only_to_those_who_use_them(
        self, opened, opened_network, network
    ):
        state = as_published(network)
        state["module.prototypes.weight"] = torch.full((6, 8), torch.nan)
        assert opened(state).report.beside["prototypes"] == 1
        with pytest.raises(CheckpointError, match=r"prototypes\.weight holds 48 values that are NaN"):
            opened_network(state)


class TestLessOrOther:
    """Refusals name the nearest trunk and what differs."""

    @pytest.fixture
    def state(self, network):
        return dict(network.trunk.state_dict())

    def test_missing(self, refused, state):
        for name in ("conv1.weight", "layer2.0.bn1.weight", "layer4.0.conv2.weight"):
            del state[name]
        message = refused(state)
        assert (
            "closest to resnet10 at width 0.125, but 3 of 60 tensors missing, first conv1.weight" in message
        )

    def test_of_two_widths(self, refused, state):
        state["layer4.0.conv2.weight"] = torch.ones(128, 128, 3, 3)
        message = refused(state)
        assert "1 of 60 tensors of another shape, first layer4.0.conv2.weight" in message
        assert "should be [64, 64, 3, 3] and is [128, 128, 3, 3]" in message

    def test_extra_layers(self, refused, state):
        message = refused({**state, "layer4.0.conv3.weight": torch.ones(64, 64, 1, 1)})
        assert "1 too many, first layer4.0.conv3.weight" in message

    def test_another_depth(self, refused):
        state = Trunk(Architecture(Bottleneck, (3, 4, 7, 3)), planes=8, stem="imagenet").state_dict()
        nearest = "closest to resnet50 at width 0.125, but 15 too many, first layer3.6.conv1.weight"
        assert nearest in refused({name: each for name, each in state.items() if "num_batches" not in name})

    def test_norms_without_running_statistics(self, refused, state):
        kept = {name: each for name, each in state.items() if "running" not in name}
        assert "24 of 60 tensors missing, first bn1.running_mean" in refused(kept)

    def test_torchvisions_wide_networks(self, refused):
        with torch.device("meta"):
            made = wide_resnet50_2().state_dict()
        state = {name: torch.zeros(()).expand(each.shape) for name, each in made.items()}
        assert "it is torchvision's wide_resnet50_2: its 3x3 convolutions alone" in refused(state)

    def test_another_family(self, refused):
        transformer = {"cls_token": torch.ones(2), "blocks.0.attn.qkv.weight": torch.ones(2)}
        assert "none of its 2 tensors" in refused(transformer)

    def test_a_part_of_a_trunk_under_detectron2s_names(self, refused, state):
        theirs = to_detectron2(state)
        del theirs["res3.0.conv1.weight"]
        assert "1 of 60 tensors missing, first layer2.0.conv1.weight" in refused({"model": theirs})

    def test_not_finite(self, refused, state):
        state["layer3.0.bn1.weight"] = torch.tensor([float("nan"), float("inf")] * 16)
        assert refused(state).endswith("layer3.0.bn1.weight holds 32 values that are NaN or infinite")

    def test_variances_of_which_there_is_no_root(self, refused, state):
        state["layer3.0.bn1.running_var"] = torch.full((32,), -1e-3)
        assert refused(state).endswith("layer3.0.bn1.running_var holds negative numbers, where variances are")

    @pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.uint8, torch.bool])
    def test_numbers_that_are_no_weights(self, refused, state, dtype):
        state["conv1.weight"] = torch.ones(8, 3, 7, 7).to(dtype)
        kind = str(dtype).removeprefix("torch.")
        assert refused(state).endswith(f"conv1.weight holds {kind}, where weights are floating-point numbers")

    def test_sparse_tensors(self, refused, state):
        state["layer1.0.conv1.weight"] = state["layer1.0.conv1.weight"].to_sparse()
        assert "layer1.0.conv1.weight is a tensor without plain values" in refused(state)


class TestExports:
    """What an export says of itself is heard: the stem's stride, the images, their number."""

    @pytest.fixture
    def strided(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            return build_trunk(tiny_config(stem="strided").model).eval()

    def check(self, path, strided):
        trunk, info = open_trunk(str(path))
        torch.testing.assert_close(trunk(IMAGES), strided(IMAGES), rtol=0, atol=0)
        assert info.images == 3072
        assert (info.config.model.stem, info.config.model.width) == ("strided", 0.13)
        crops = info.config.crops
        assert (crops.sizes, crops.mean, crops.std) == ([28], (0.3, 0.3, 0.3), (0.2, 0.2, 0.2))
        assert info.report.notes == ()

    def test_in_safetensors(self, strided, tmp_path):
        said = {"mean": "0.3 0.3 0.3", "std": "0.2 0.2 0.2", "size": "28", "images": "3072"}
        said |= {"streamswav": "1", "stem": "strided", "width": "0.13"}
        save_file(strided.state_dict(), tmp_path / "model.safetensors", metadata=said)
        self.check(tmp_path / "model.safetensors", strided)

    @pytest.mark.parametrize("name", ["export.json", "weights.json"])
    def test_beside_the_file(self, strided, tmp_path, name):
        torch.save(strided.state_dict(), tmp_path / "weights.pth")
        facts = {
            "streamswav": "1",
            "source": {"images": 3072},
            "model": {"stem": "strided", "width": 0.13},
            "normalisation": {"mean": [0.3] * 3, "std": [0.2] * 3, "crop": 28},
            "files": {"weights.pth": {}},
        }
        (tmp_path / name).write_text(json.dumps(facts))
        self.check(tmp_path / "weights.pth", strided)

    @pytest.mark.parametrize(
        "said", [{"width": "1e400", "images": "9" * 5000}, {"mean": "nan", "std": "0 0 0", "size": "9" * 30}]
    )
    def test_what_makes_no_sense_there_is_left_alone(self, strided, tmp_path, said):
        said = {"streamswav": "1", "mean": "0 0 0", "std": "1 1 1", "size": "28", **said}
        save_file(strided.state_dict(), tmp_path / "model.safetensors", metadata=said)
        _, info = open_trunk(str(tmp_path / "model.safetensors"))
        assert info.config.model.width == 0.125
        assert info.images is None

    @pytest.mark.parametrize("text", ["", "[]", '{"files": 1}', '{"files": {"weights.pth": {}}}'])
    def test_others_files_of_that_name_say_nothing(self, strided, tmp_path, text):
        torch.save(strided.state_dict(), tmp_path / "weights.pth")
        (tmp_path / "export.json").write_text(text)
        _, info = open_trunk(str(tmp_path / "weights.pth"))
        assert info.config.model.stem == "small"
        assert "the stride of the 3x3 stem is not seen" in str(info.report)
