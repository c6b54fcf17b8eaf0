"""A snapshot is of its moment, whatever training does to the tensors afterwards."""

import io

import torch
from torch import nn

from streamswav.training.checkpoint import packed, unpack
from streamswav.training.snapshot import Stage


def trained_network():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    step(network, optimizer)
    return network, optimizer


def step(network, optimizer):
    optimizer.zero_grad()
    network(torch.randn(2, 3, 8, 8)).square().sum().backward()
    optimizer.step()


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for each in inner for tensor in tensors(each)]


def test_training_on_in_place_changes_nothing_that_was_taken():
    network, optimizer = trained_network()
    state = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
    before = [each.clone() for each in tensors(state)]
    taken = Stage().take(state)
    step(network, optimizer)
    assert any(not torch.equal(old, new) for old, new in zip(before, tensors(state), strict=True))
    assert all(torch.equal(old, kept) for old, kept in zip(before, tensors(taken), strict=True))


def test_the_buffers_of_one_snapshot_hold_the_next():
    network, optimizer = trained_network()
    stage = Stage()
    places = [each.data_ptr() for each in tensors(stage.take(network.state_dict()))]
    step(network, optimizer)
    again = stage.take(network.state_dict())
    assert [each.data_ptr() for each in tensors(again)] == places
    assert all(torch.equal(a, b) for a, b in zip(tensors(again), network.state_dict().values(), strict=True))


def test_a_snapshot_is_written_as_the_state_itself():
    network, optimizer = trained_network()
    state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "none": None, "list": [1]}
    file = io.BytesIO()
    packed(Stage().take(state))(file)
    loaded = unpack(file.getvalue())
    assert list(loaded["network"]) == list(state["network"])
    assert loaded["network"]._metadata == state["network"]._metadata
    assert loaded["network"]["0.weight"].stride() == network[0].weight.stride()
    assert (loaded["none"], loaded["list"]) == (None, [1])
    assert all(torch.equal(a, b) for a, b in zip(tensors(loaded), tensors(state), strict=True))


def test_a_tensor_of_another_shape_gets_another_buffer():
    stage = Stage()
    first = stage.take({"a": torch.zeros(2)})["a"]
    assert stage.take({"a": torch.ones(3)})["a"].tolist() == [1, 1, 1]
    assert first.tolist() == [0, 0]
