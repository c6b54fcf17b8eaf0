"""`streamswav export`: every format comes back to the bit, loads where it should, and says what it is."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors
import timm
import torch
import torchvision
from runs import run
from tiny_run import save_tiny_run, tiny_config

from streamswav import cli
from streamswav.errors import (
    EXIT_CONFIG,
    EXIT_DONE,
    CheckpointError,
    ConfigError,
    DeniedError,
    StreamswavError,
)
from streamswav.training.checkpoint import pack
from streamswav.transfer import load_trunk
from streamswav.transfer.export import files as export_files
from streamswav.transfer.export import graphs as export_graphs
from streamswav.transfer.export.exporting import choose_places, export
from streamswav.transfer.measuring.results import DataUsed, Results, Value
from streamswav.transfer.weights.trunks import open_network, open_trunk

SECRET = "?X-Amz-Signature=secret"
OF_TENSORS = ("torchvision.pth", "timm.pth", "model.safetensors", "reference.pth")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of a trunk that torchvision and timm can build, but not detectron2."""
    folder = tmp_path_factory.mktemp("export") / "run"
    config = tiny_config(trunk="resnet8", width=1, stem="strided")
    config = config.model_copy(update={"crops": config.crops.model_copy(update={"sizes": [24, 8]})})
    save_tiny_run(str(folder), config=config, change_state=stir)
    return str(folder)


@pytest.fixture(scope="module")
def exported(run_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported")
    told = []
    export(run_folder, str(out), formats=["all"], tell=told.append)
    assert [line.partition(":")[0] for line in told] == ["detectron2 is left out"]
    return out


def stir(state):
    """Let batch norms be other than new, so that every tensor counts."""
    generator = torch.Generator().manual_seed(3)
    for name, tensor in state.items():
        if "running" in name or (".bn" in name and tensor.is_floating_point()):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))


def images(count=2, size=24):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def facts_of(folder):
    return json.loads((folder / "export.json").read_text())


@pytest.mark.parametrize("file", OF_TENSORS)
def test_what_is_exported_comes_back_to_the_bit(exported, run_folder, file):
    trunk, info = open_trunk(str(exported / file))
    assert same(trunk.state_dict(), load_trunk(run_folder).state_dict())
    assert info.config.model.stem == "strided"
    assert info.images == 3072


def test_head_and_prototypes_come_back_in_the_authors_layout(exported, run_folder):
    before, after = (
        open_network(str(path))[0].state_dict() for path in (run_folder, exported / "reference.pth")
    )
    assert same(after, before)


def test_the_graph_of_onnx_computes_the_same_for_any_batch_and_size(exported, run_folder):
    model = onnx.load(exported / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [(each.domain, each.version) for each in model.opset_import] == [("", export_graphs.OPSET)]
    assert {each.key: each.value for each in model.metadata_props}["stem"] == "strided"
    session = onnxruntime.InferenceSession(exported / "model.onnx", providers=["CPUExecutionProvider"])
    trunk = load_trunk(run_folder)
    for batch in (images(1), images(5), images(3, size=41)):
        (features,) = session.run(None, {"images": batch.numpy()})
        np.testing.assert_allclose(features, trunk(batch).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_the_program_of_torch_export_computes_the_same_for_any_batch_and_size(exported, run_folder):
    extra = {"export.json": ""}
    program = torch.export.load(exported / "model.pt2", extra_files=extra).module()
    assert json.loads(extra["export.json"])["trunk"] == "resnet8"
    trunk = load_trunk(run_folder)
    for batch in (images(1), images(5), images(3, size=41)):
        torch.testing.assert_close(program(batch), trunk(batch), rtol=1e-5, atol=1e-5)


def snippets(card):
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def test_every_snippet_of_the_card_runs_and_gives_the_features(exported, run_folder, monkeypatch):
    monkeypatch.chdir(exported)
    trunk = load_trunk(run_folder)
    blocks = snippets((exported / "README.md").read_text())
    assert len(blocks) == len(facts_of(exported)["files"]) + 1
    for block in blocks[:-1]:
        named = {}
        exec(block, named)
        asked = torch.as_tensor(named["images"]) if "images" in named else torch.zeros(2, 3, 24, 24)
        torch.testing.assert_close(torch.as_tensor(named["features"]), trunk(asked), rtol=1e-4, atol=1e-5)
    named = {}
    exec(blocks[-1], named)
    prepared = named["prepare"](torchvision.transforms.functional.to_pil_image(images(1, size=40)[0]))
    assert prepared.shape == (3, 24, 24)


def test_a_resnet50_is_loaded_by_torchvision_and_timm_and_gives_the_same_features(tmp_path):
    config = tiny_config(trunk="resnet50", width=1, stem="imagenet")
    network, _ = save_tiny_run(str(tmp_path / "run"), config=config, change_state=stir)
    export(str(tmp_path / "run"), str(tmp_path / "out"), formats=["torchvision", "timm", "detectron2"])
    state = torch.load(tmp_path / "out" / "torchvision.pth", weights_only=True)
    plain = torchvision.models.resnet50()
    keys = plain.load_state_dict(state, strict=False)
    assert (keys.missing_keys, keys.unexpected_keys) == (["fc.weight", "fc.bias"], [])
    plain.fc = torch.nn.Identity()
    path = str(tmp_path / "out" / "timm.pth")
    other = timm.create_model("resnet50", num_classes=0, checkpoint_path=path)
    features = network.trunk(images(2, 64))
    for model in (plain, other):
        torch.testing.assert_close(model.eval()(images(2, 64)), features, rtol=1e-5, atol=1e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "PIXEL_MEAN: [123.675, 116.28, 103.53]" in card
    assert "FORMAT: RGB" in card
    assert same(load_trunk(tmp_path / "out" / "detectron2.pth").state_dict(), state)
    packed = torch.load(tmp_path / "out" / "detectron2.pth", weights_only=True)
    assert packed["matching_heuristics"] is True
    assert torch.equal(packed["model"]["res5.0.shortcut.norm.bias"], state["layer4.0.downsample.1.bias"])


def test_a_foreign_file_goes_from_one_layout_to_another(tmp_path):
    torch.manual_seed(0)
    foreign = torchvision.models.resnet18(num_classes=7).eval()
    (tmp_path / "resnet18.pth").write_bytes(pack({"epoch": 3, "state_dict": foreign.state_dict()}))
    written = export(str(tmp_path / "resnet18.pth"), str(tmp_path / "out"), formats=["timm", "reference"])
    assert [Path(url).name for url in written] == ["timm.pth", "reference.pth", "README.md", "export.json"]
    model = timm.create_model("resnet18", num_classes=0, checkpoint_path=written[0])
    foreign.fc = torch.nn.Identity()
    torch.testing.assert_close(model.eval()(images(2, 64)), foreign(images(2, 64)), rtol=1e-5, atol=1e-5)
    facts = facts_of(tmp_path / "out")
    assert facts["recipe"] is None
    assert facts["source"]["images"] is None
    assert "recipe and data are not known" in (tmp_path / "out" / "README.md").read_text()


def finetune(heads):
    def change(state):
        for name in [name for name in state if not name.startswith("trunk.")]:
            state.pop(name)
        for head in range(heads):
            state[f"head.heads.{head}.weight"] = torch.full((5, 512), 0.1 * head)
            state[f"head.heads.{head}.bias"] = torch.arange(5.0)

    return change


def save_finetuned(tmp_path, heads):
    config = tiny_config(trunk="resnet10", width=1)
    save_tiny_run(str(tmp_path / "run"), config=config, change_state=finetune(heads))
    return str(tmp_path / "run")


def test_the_classifier_of_a_finetuned_run_is_fc_and_a_second_output(tmp_path, monkeypatch):
    run_folder = save_finetuned(tmp_path, 1)
    formats = ["torchvision", "timm", "reference", "torch.export"]
    export(run_folder, str(tmp_path / "out"), formats=formats)
    facts = facts_of(tmp_path / "out")
    assert facts["model"]["classes"] == 5
    assert "finetune" in facts["recipe"]
    assert "swav" not in facts["recipe"]
    monkeypatch.chdir(tmp_path / "out")
    for block in snippets((tmp_path / "out" / "README.md").read_text())[:4]:
        named = {}
        exec(block, named)
        if "reference" in block:
            assert named["features"].shape == (2, 512)
        else:
            torch.testing.assert_close(named["scores"], torch.arange(5.0).expand(2, 5))


def test_of_several_classifiers_the_one_that_is_named_is_exported(tmp_path):
    run_folder, told = save_finetuned(tmp_path, 3), []
    (url, *_) = export(run_folder, str(tmp_path / "two"), formats=["torchvision"], head=2)
    assert torch.load(url)["fc.weight"].unique().item() == pytest.approx(0.2)
    (url, *_) = export(run_folder, str(tmp_path / "none"), formats=["torchvision"], tell=told.append)
    assert "fc.weight" not in torch.load(url)
    assert told == ["3 classifiers were trained side by side, none is exported; --head 0 takes the first"]
    with pytest.raises(ConfigError, match="--head = 3: its classifiers are 0 to 2"):
        export(run_folder, str(tmp_path / "three"), head=3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_halves_the_file_and_loads_everywhere(run_folder, exported, tmp_path, dtype):
    export(run_folder, str(tmp_path), formats=["torchvision", "safetensors"], dtype=dtype)
    read = torch.load(tmp_path / "torchvision.pth", weights_only=True)
    assert {each.dtype for each in read.values() if each.is_floating_point()} == {getattr(torch, dtype)}
    assert (tmp_path / "model.safetensors").stat().st_size < 0.6 * (
        exported / "model.safetensors"
    ).stat().st_size
    trunk = load_trunk(run_folder).state_dict()
    for file in ("torchvision.pth", "model.safetensors"):
        again = load_trunk(tmp_path / file).state_dict()
        assert same(again, {name: each.to(read[name].dtype).to(each.dtype) for name, each in trunk.items()})


def test_weights_too_large_for_one_onnx_file_lie_beside_it(tmp_path, monkeypatch):
    save_tiny_run(str(tmp_path / "run"))
    monkeypatch.setattr(export_graphs, "_MOST_BYTES", 1000)
    export(str(tmp_path / "run"), str(tmp_path / "out" / "swav.onnx"))
    assert set(facts_of_file(tmp_path / "out" / "swav.json")) == {"swav.onnx", "swav.onnx.data"}
    session = onnxruntime.InferenceSession(tmp_path / "out" / "swav.onnx", providers=["CPUExecutionProvider"])
    (features,) = session.run(None, {"images": images().numpy()})
    expected = load_trunk(tmp_path / "run")(images()).detach().numpy()
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)


def facts_of_file(path):
    return json.loads(path.read_text())["files"]


def results_with_secret():
    used = DataUsed([f"https://host/test.tar{SECRET}"], 20, 4)
    value = Value("kNN, k = 5", {"k": 5}, "checkpoint", {"top1": 0.625})
    return Results({"trunk": "resnet10"}, {"test": used}, {}, {}, [value]).to_json()


def test_the_card_tells_data_recipe_results_and_sums_and_no_secret(tmp_path):
    stream = {"urls": [f"https://user:password@host/shards.tar{SECRET}"]}
    config = tiny_config()
    config = config.model_copy(update={"stream": config.stream.model_copy(update=stream)})
    position = {"position.json": json.dumps({"manifest": "f00d"}).encode()}
    save_tiny_run(str(tmp_path / "run"), config=config, change=lambda files: files.update(position))
    (tmp_path / "run" / "results.json").write_text(results_with_secret())
    manifest = {"digest": "f00d", "shards": [["a.tar", "s3://b/a.tar", 1000, "v", 0]]}
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    export(str(tmp_path / "run"), str(tmp_path / "out"))
    facts, card = facts_of(tmp_path / "out"), (tmp_path / "out" / "README.md").read_text()
    assert facts["data"] == {
        "urls": ["https://host/shards.tar"],
        "manifest_digest": "f00d",
        "shards": 1,
        "bytes": 1000,
    }
    assert facts["source"]["images"] == 3072
    assert facts["recipe"]["model"]["embedding"] == 8
    assert facts["results"][0]["values"][0]["scores"] == {"top1": 0.625}
    for file in ("torchvision.pth", "model.safetensors"):
        sum_ = hashlib.sha256((tmp_path / "out" / file).read_bytes()).hexdigest()
        assert facts["files"][file]["sha256"] == sum_
        assert sum_ in card
    for text in ("f00d", "3,072 images seen in 12 steps", "top1 0.625", "Apache-2.0", "embedding: 8"):
        assert text in card
    everything = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    assert not any(secret in everything for secret in (b"X-Amz", b"password"))


def test_safetensors_say_what_they_are(exported):
    with safetensors.safe_open(exported / "model.safetensors", "pt") as file:
        about = file.metadata()
    assert about["format"] == "pt"
    assert (about["trunk"], about["stem"], about["images"]) == ("resnet8", "strided", "3072")


def test_a_bucket_is_exported_into_a_bucket(s3):
    bucket, folder = s3.make_bucket()
    network, _ = save_tiny_run(f"{bucket}/run", storage=s3.section)
    export(f"{bucket}/run", f"{bucket}/exports/swav.safetensors", storage=s3.section)
    assert {path.name for path in (folder / "exports").iterdir()} == {
        "swav.safetensors",
        "swav.md",
        "swav.json",
    }
    again = load_trunk(f"{bucket}/exports/swav.safetensors", storage=s3.section)
    assert same(again.state_dict(), network.trunk.state_dict())


def test_files_that_are_there_stay_unless_asked(tmp_path):
    save_tiny_run(str(tmp_path / "run"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("mine")
    with pytest.raises(DeniedError, match=r"README\.md: is there already"):
        export(str(tmp_path / "run"), str(tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["README.md"]
    export(str(tmp_path / "run"), str(tmp_path / "out"), overwrite=True)
    assert (tmp_path / "out" / "README.md").read_text() != "mine"


def test_nothing_is_there_where_one_file_could_not_be_made(tmp_path, monkeypatch):
    save_tiny_run(str(tmp_path / "run"))

    def fail(job, path):
        raise OSError(28, "No space left on device")

    broken = export_files.Format("timm.pth", fail)
    monkeypatch.setitem(export_files.FORMATS, "timm", broken)
    with pytest.raises(CheckpointError, match=r"timm could not be made in .*No space left"):
        export(str(tmp_path / "run"), str(tmp_path / "out"), formats=["torchvision", "timm"])
    assert not (tmp_path / "out").exists()


def test_what_is_not_read_back_as_it_was_is_no_export(tmp_path, monkeypatch):
    save_tiny_run(str(tmp_path / "run"))
    empty = pack({})
    monkeypatch.setattr(torch, "save", lambda state, path: path.write_bytes(empty))
    with pytest.raises(CheckpointError, match="not what is read back"):
        export(str(tmp_path / "run"), str(tmp_path / "out"), formats=["torchvision"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("out", "formats", "expected"),
    [
        ("out", [], {"torchvision": "torchvision.pth", "safetensors": "model.safetensors"}),
        ("out/", ["onnx", "timm"], {"timm": "timm.pth", "onnx": "model.onnx"}),
        ("a/swav.safetensors", [], {"safetensors": "swav.safetensors"}),
        ("swav.pth.tar", ["reference"], {"reference": "swav.pth.tar"}),
        ("s3://bucket/swav.pt2", [], {"torch.export": "swav.pt2"}),
        ("swav.pt", [], {"torchvision": "swav.pt"}),
    ],
)
def test_the_place_says_what_is_written(out, formats, expected):
    places = choose_places(out, formats)
    assert places.files == expected
    assert places.facts == ("export.json" if out.startswith("out") else "swav.json")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"formats": ["torchvison"]}, "did you mean torchvision"),
        (
            {"formats": ["detectron2"]},
            "there is no resnet10 of width 0.125 with the small stem in detectron2",
        ),
        ({"formats": ["onnx"], "dtype": "float16"}, "onnx is written in float32 only"),
        ({"dtype": "int8"}, "there are float32, float16, bfloat16"),
        ({"results": ["run/results.json"]}, "no such file"),
        ({"checkpoint": "nowhere"}, "nowhere"),
        ({"out": "https://host/out?key=secret"}, "https://host/out: web servers are only read"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path, monkeypatch, change, reason):
    monkeypatch.chdir(tmp_path)
    save_tiny_run("run")
    with pytest.raises(StreamswavError) as caught:
        export(**({"checkpoint": "run", "out": "out"} | change))
    assert caught.value.exit_code == EXIT_CONFIG
    assert reason.lower() in str(caught.value).lower()
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("out", "formats", "reason"),
    [
        ("swav.onnx", ["onnx", "timm"], "one file holds one format, not timm, onnx"),
        ("swav.pth", ["onnx"], "a file of onnx has a name that ends with .onnx"),
    ],
)
def test_a_file_that_cannot_hold_what_is_asked_is_refused(out, formats, reason):
    with pytest.raises(ConfigError, match=reason):
        choose_places(out, formats)


def test_onnx_without_its_packages_is_one_line_that_installs_them(tmp_path, monkeypatch):
    save_tiny_run(str(tmp_path / "run"))
    monkeypatch.setattr(export_graphs, "_PACKAGES", ("onnx", "onnxscript_missing"))
    with pytest.raises(ConfigError, match="onnxscript_missing not installed: pip install onnx onnxscript"):
        export(str(tmp_path / "run"), str(tmp_path / "out"), formats=["onnx"])


def test_the_command_is_one_process_and_says_what_it_wrote(run_folder, tmp_path):
    arguments = ["export", "--checkpoint", run_folder, "--to", "timm", "torchvision", str(tmp_path / "out")]
    done = run(arguments, tmp_path / "log")
    assert (done.code, done.err) == (EXIT_DONE, "")
    names = ["torchvision.pth", "timm.pth", "README.md", "export.json"]
    assert done.out.splitlines() == [str(tmp_path / "out" / name) for name in names]


def test_the_command_takes_formats_place_and_keys_in_any_order(tmp_path, s3, capsys):
    bucket, _ = s3.make_bucket()
    save_tiny_run(f"{bucket}/run", storage=s3.section)
    key = ("--storage.endpoint_url", s3.endpoint)
    orders = [
        ["--checkpoint", f"{bucket}/run", "--to", "timm", "torchvision", str(tmp_path / "a"), *key],
        [str(tmp_path / "b"), *key, "--to", "timm,torchvision", "--checkpoint", f"{bucket}/run"],
        [*key, "--to", "timm", "--to", "torchvision", "--checkpoint", f"{bucket}/run", str(tmp_path / "c")],
    ]
    for arguments in orders:
        assert cli.main(["export", *arguments]) == EXIT_DONE
        lines = capsys.readouterr().out.splitlines()
        assert [Path(line).name for line in lines][:2] == ["torchvision.pth", "timm.pth"]
    assert len({(tmp_path / name / "torchvision.pth").read_bytes() for name in "abc"}) == 1
    assert cli.main(["export", *orders[0]]) == EXIT_CONFIG
    assert cli.main(["export", "--checkpoint", f"{bucket}/run", *key, "--to", "timm"]) == EXIT_CONFIG
    there, nowhere = capsys.readouterr().err.splitlines()
    assert "torchvision.pth: is there already" in there
    assert "one place for the files is needed" in nowhere
