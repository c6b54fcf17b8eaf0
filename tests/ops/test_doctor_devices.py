"""`streamswav doctor` on GPUs, network and speed: what is broken on purpose fails the right check."""

import socket

import pytest
from doctor_cases import (
    ROWS,
    case,
    config,
    look,
    of_two,
    shown,
)

from streamswav.cli import main
from streamswav.doctor import Machine
from streamswav.errors import EXIT_CONFIG
from streamswav.launch_options import LaunchOptions
from streamswav.planning import GPUS, find_gpu, recognise


@pytest.fixture(scope="module")
def shards(make_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder, counts=[40, 24])
    return folder


# --- GPUs and network


def test_cuda_without_a_gpu():
    shown("training.device cuda without a GPU", case(config(training__device="cuda")))
    assert look(case(config(training__device="auto")), "gpus").status == "skip"


def test_a_driver_whose_devices_are_not_there(tmp_path):
    (tmp_path / "driver" / "nvidia").mkdir(parents=True)
    text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n"
    (tmp_path / "driver" / "nvidia" / "version").write_text(text)
    assert Machine(proc=tmp_path).driver() == "535.104.05"
    asked = case(config(training__device="auto"), machine=Machine(proc=tmp_path))
    shown("a driver without a device that torch can use", asked)


def test_a_step_that_does_not_fit(shards):
    crops = {"crops__sizes": "[512, 96]"}
    large = config(stream__urls=shards, training__batch=256, model__width=1, **crops)
    shown("a batch that does not fit the GPU", case(large, gpu_type=find_gpu("T4")))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("Tesla V100-SXM2-16GB", "V100-16GB"),
        ("Tesla T4", "T4"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("NVIDIA GeForce RTX 3090", "RTX-3090"),
    ],
)
def test_a_gpu_is_known_by_the_name_that_its_driver_gives(name, expected):
    assert recognise(name, GPUS[expected].memory).name == expected
    assert recognise("Voodoo 2", 1) is None


def test_an_interface_that_is_not_there():
    shown("NCCL_SOCKET_IFNAME of no interface", case(environment={"NCCL_SOCKET_IFNAME": "eth99"}))
    assert look(case(environment={"NCCL_SOCKET_IFNAME": "^eth99"}), "collectives").status == "skip"
    assert look(case(environment={"GLOO_SOCKET_IFNAME": "lo"}), "collectives").status == "skip"
    asked = case(environment={"NCCL_SOCKET_IFNAME": "lo"}, launch=LaunchOptions(ranks="2"))
    assert look(asked, "collectives").text == "gloo, for 2 ranks on CPUs"


def test_a_master_that_has_no_name():
    shown("a master whose name is not known", case(launch=of_two(address="node-0.invalid", node=1)))


def test_a_port_of_the_master_that_is_taken():
    assert look(case(launch=of_two()), "meeting").status == "pass"
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        shown("a taken port on node 0", case(launch=of_two(port=port)))
        assert "and answers" in look(case(launch=of_two(port=port, node=1)), "meeting").text
    assert "nobody listens there yet" in look(case(launch=of_two(port=port, node=1)), "meeting").text


def test_node_0_under_another_machines_name():
    shown("node 0 that is not the master", case(launch=of_two(address="192.0.2.1")))


def test_launch_variables_that_cannot_be_understood(monkeypatch, capsys):
    monkeypatch.setenv("PET_NNODES", "two")
    assert main(["doctor", "--only", "configuration"]) == EXIT_CONFIG
    line = capsys.readouterr().out
    _, status, _, says, _, _ = ROWS["PET_NNODES that is no number"]
    assert line.startswith(status)
    assert says.strip('"') in line


def test_a_metrics_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        keys = {"telemetry__port": taken.getsockname()[1], "telemetry__bind": "127.0.0.1"}
        shown("a metrics port that is taken", case(config(**keys)))


# --- speed


def test_a_loader_slower_than_the_gpu(shards):
    keys = {"stream__urls": shards, "loader__workers": 0, "model__trunk": "resnet10"}
    asked = case(config(**keys), gpu_type=find_gpu("H100"), seconds=0.2)
    found = shown("a loader slower than the GPUs", asked, "listing")
    assert "images take" in found.text
    alone = look(case(config(**keys), seconds=0.2), "rate")
    assert alone.status == "pass"
    assert look(case(config(**keys), seconds=0), "rate").status == "skip"
