"""Files that are no weights, or not whole: one clear line each, and nothing in them is executed."""

import argparse
import builtins
import json
import os
import pickle
import warnings
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from tiny_run import tiny_config
from torch import nn

from streamswav.errors import EXIT_CONFIG, CheckpointError
from streamswav.models import build_trunk
from streamswav.stream.store import Store
from streamswav.transfer import load_trunk
from streamswav.transfer.weights.trunks import open_trunk

SECTION = tiny_config(stem="imagenet").model


@pytest.fixture
def state():
    return build_trunk(SECTION).state_dict()


@pytest.fixture
def refused(tmp_path):
    """Try to load what was written to a file; returns the message without the file's name."""

    def load(path):
        with pytest.raises(CheckpointError) as caught:
            load_trunk(path)
        message = str(caught.value)
        assert caught.value.exit_code == EXIT_CONFIG
        assert message.startswith(f"{path}: ")
        assert "\n" not in message
        assert len(message) < 700
        return message.removeprefix(f"{path}: ")

    def write_and_load(data):
        path = tmp_path / "weights.pth"
        path.write_bytes(data)
        return load(path)

    write_and_load.path = load
    return write_and_load


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html>\n<html><body>404", "a web page"),
        (b"  <html lang='de'>\xc3\xa4</html>", "a web page"),
        (b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
        (b"epoch,loss\n1,8.0\n", "text, not weights"),
        ("Gewichte für später\n".encode(), "text, not weights"),
        (pickle.dumps({"conv1.weight": 1}), "a plain pickle"),
        (b"\x89HDF\r\n\x1a\n" + bytes(600), "neither written by torch.save nor in safetensors"),
        (bytes(600), "neither written by torch.save nor in safetensors"),
        (b"\x1f\x8b\x08" + bytes(range(256)), "neither written by torch.save nor in safetensors"),
    ],
)
def test_what_is_no_file_of_weights_is_called_what_it_is(refused, data, words):
    assert words in refused(data)


def test_truncated_archives(refused, state, tmp_path):
    torch.save(state, tmp_path / "whole.pth")
    data = (tmp_path / "whole.pth").read_bytes()
    for stop in (len(data) // 3, len(data) - 1):
        assert "it is cut off or damaged" in refused(data[:stop])


def test_archives_with_a_hole(refused, state, tmp_path):
    """Whole at both ends, as after a download in pieces of which one was lost."""
    torch.save(state, tmp_path / "whole.pth")
    data = bytearray((tmp_path / "whole.pth").read_bytes())
    begin = data.index(b"data.pkl") + 8
    data[begin : begin + 400] = bytes(400)
    assert "it is damaged" in refused(bytes(data))


def test_archives_of_which_a_single_bit_has_changed(refused, state, tmp_path):
    torch.save(state, tmp_path / "whole.pth")
    data = bytearray((tmp_path / "whole.pth").read_bytes())
    data[data.index(state["layer4.0.conv1.weight"].numpy().tobytes()) + 50] ^= 1
    assert "it is damaged: 1 of " in refused(bytes(data))


def test_archives_without_checksums_are_read(state, tmp_path):
    """As torch.save writes them when it is told to be quick."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "quick.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(tmp_path / "quick.pth") as archive:
        assert {entry.CRC for entry in archive.infolist()} == {0}
    torch.testing.assert_close(load_trunk(tmp_path / "quick.pth").state_dict(), state, rtol=0, atol=0)


def test_no_byte_of_an_archives_list_makes_it_more_than_a_damaged_file(refused, tmp_path):
    """Every byte that tells where entries are: zipfile and torch stumble over each in another way."""
    torch.save({"conv1.weight": torch.ones(1)}, tmp_path / "whole.pth")
    data = (tmp_path / "whole.pth").read_bytes()
    for place in range(data.index(b"PK\x01\x02"), len(data)):
        for value in (0, 0xFF):
            changed = bytearray(data)
            changed[place] = value
            refused(bytes(changed))


def test_the_old_format_truncated(refused, state, tmp_path):
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    data = (tmp_path / "old.pth").read_bytes()
    for stop in (40, 2000, len(data) - 5):
        assert "it is damaged" in refused(data[:stop])


def test_safetensors_half_written(refused, state, tmp_path):
    save_file(state, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    for stop in (12, 500, len(data) - 1):
        assert "a safetensors file that is cut off or damaged" in refused(data[:stop])


def test_safetensors_whose_header_lies(refused):
    header = json.dumps({"conv1.weight": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}})
    assert "cut off or damaged" in refused(len(header).to_bytes(8, "little") + header.encode())


def test_one_value_that_stands_for_many_is_not_spread_out(refused, state, tmp_path):
    """A small file of a trunk as wide as can be would take hundreds of gigabytes."""
    state["layer1.0.conv1.weight"] = torch.ones(1).expand(state["layer1.0.conv1.weight"].shape)
    torch.save(state, tmp_path / "weights.pth")
    assert refused.path(tmp_path / "weights.pth").startswith("layer1.0.conv1.weight claims ")


@pytest.mark.parametrize("name", ["notes.txt", "archive/code.txt"])
def test_zip_archives_of_something_else(refused, tmp_path, name):
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as archive:
        archive.writestr(name, "text")
    assert refused((tmp_path / "some.zip").read_bytes()) == "a zip archive that torch.save did not write"


def rewritten(source, target, change):
    """Copy an archive of torch.save entry by entry."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            change(new, entry.filename, old.read(entry))


def test_archives_that_unfold_are_not_unfolded(refused, state, tmp_path):
    torch.save(state, tmp_path / "whole.pth")

    def squeeze(new, name, data):
        new.writestr(name, data, compress_type=zipfile.ZIP_DEFLATED)

    rewritten(tmp_path / "whole.pth", tmp_path / "small.pth", squeeze)
    assert refused.path(tmp_path / "small.pth") == "a zip archive that torch.save did not write"


def test_a_pickle_of_unreasonable_size_is_not_read(refused, state, tmp_path):
    torch.save(state, tmp_path / "whole.pth")

    def swell(new, name, data):
        new.writestr(name, data + bytes(65 << 20) if name.endswith("data.pkl") else data)

    rewritten(tmp_path / "whole.pth", tmp_path / "large.pth", swell)
    assert "at most 67,108,864 are read" in refused.path(tmp_path / "large.pth")


def test_containers_within_containers_do_not_grow(refused, tmp_path):
    """Each holds the one before ten times: 10^40 names, were every path followed. And one holds itself."""
    inner = {"a": torch.ones(1)}
    for _ in range(40):
        inner = {str(number): inner for number in range(10)}
    inner["self"] = inner
    torch.save(inner, tmp_path / "weights.pth")
    assert "none of its 1 tensors" in refused.path(tmp_path / "weights.pth")


@pytest.mark.parametrize(
    "key",
    ["a\nb\x1b[31m", "a" * 100_000, 10**5000, (1, "x"), torch.zeros(500)],
    ids=["escape", "long", "number", "tuple", "tensor"],
)
def test_names_that_would_spoil_a_message_do_not(refused, tmp_path, key):
    torch.save({key: torch.ones(2), "layer1.0.conv1.weight\n": torch.ones(3)}, tmp_path / "weights.pth")
    assert "\x1b" not in refused.path(tmp_path / "weights.pth")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "there are no tensors in it, only a dictionary of nothing"),
        ({"epoch": 3, "best": 0.5}, "only a dictionary of epoch, best"),
        ([1, 2], "only a list"),
        (7, "only a int"),
    ],
)
def test_files_without_tensors(refused, tmp_path, content, words):
    torch.save(content, tmp_path / "weights.pth")
    assert words in refused.path(tmp_path / "weights.pth")


class RunsCode:
    def __reduce__(self):
        return builtins.exec, ("import builtins; builtins.was_run = True",)


class RunsAShell:
    def __reduce__(self):
        return os.system, ("touch was-run",)


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize(("trap", "name"), [(RunsCode(), "exec"), (RunsAShell(), "posix.system")])
def test_a_file_with_code_is_refused_and_not_executed(refused, state, tmp_path, monkeypatch, new, trap, name):
    monkeypatch.chdir(tmp_path)
    torch.save({**state, "trap": trap}, "weights.pth", _use_new_zipfile_serialization=new)
    assert refused.path(tmp_path / "weights.pth") == (
        f"it holds {name}, which would have to be executed; nothing was. "
        "Where the file is trusted, save the state_dict of its model alone"
    )
    assert not hasattr(builtins, "was_run")
    assert not (tmp_path / "was-run").exists()


def test_a_plain_pickle_with_code_is_not_executed(refused):
    assert "a plain pickle" in refused(pickle.dumps(RunsCode()))
    assert not hasattr(builtins, "was_run")


def test_code_behind_types_that_are_allowed_is_not_executed(refused, state, tmp_path):
    """What may be built beside tensors must not be a way to anything else."""
    content = {**state, "args": argparse.Namespace(trap=RunsCode())}
    torch.save(content, tmp_path / "weights.pth")
    assert "it holds exec, which" in refused.path(tmp_path / "weights.pth")
    assert not hasattr(builtins, "was_run")


def test_a_whole_module_is_refused_by_its_class(refused, tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "weights.pth")
    assert "it holds torch.nn.modules.linear.Linear, which" in refused.path(tmp_path / "weights.pth")


def test_torchscript_is_refused(refused, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "weights.pt")
    assert refused.path(tmp_path / "weights.pt").startswith("a TorchScript archive")


def test_weights_come_out_of_a_bucket(s3, state, tmp_path):
    bucket, _ = s3.make_bucket()
    torch.save(state, tmp_path / "weights.pth")
    images = torch.rand(2, 3, 32, 32)
    store = Store(s3.section)
    store.upload(tmp_path / "weights.pth", f"{bucket}/some/weights.pth")
    trunk, info = open_trunk(f"{bucket}/some/weights.pth", storage=s3.section)
    torch.testing.assert_close(trunk(images), load_trunk(tmp_path / "weights.pth")(images), rtol=0, atol=0)
    assert info.url == f"{bucket}/some/weights.pth"
    store.write(f"{bucket}/some/half.pth", (tmp_path / "weights.pth").read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"some/half\.pth: it is cut off"):
        open_trunk(f"{bucket}/some/half.pth", storage=s3.section)
    with pytest.raises(CheckpointError, match=r"some/none\.pth: there is neither"):
        open_trunk(f"{bucket}/some/none.pth", storage=s3.section)


def test_weights_come_from_a_web_server_and_its_secrets_stay_out_of_messages(web, state, tmp_path):
    torch.save(state, web.folder / "weights.pth")
    (web.folder / "page.pth").write_text("<html>")
    trunk, info = open_trunk(f"{web.url}/weights.pth?X-Amz-Signature=secret")
    torch.testing.assert_close(trunk.state_dict(), state, rtol=0, atol=0)
    assert info.url == f"{web.url}/weights.pth"
    for name, words in (("page.pth", "a web page"), ("none.pth", "there is neither")):
        with pytest.raises(CheckpointError, match=words) as caught:
            open_trunk(f"{web.url}/{name}?X-Amz-Signature=secret")
        assert "secret" not in str(caught.value)
