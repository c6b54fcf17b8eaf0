"""Activations that are computed again: the same step, to the bit, in less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from streamswav.config import ModelSection
from streamswav.models import SwAVNetwork, Trunk, build_network
from streamswav.swav import SwAVLoss

BATCH = 8
SMALL = ModelSection(trunk="resnet18", width=0.125, stem="small", head_hidden=16, embedding=8)


def network(*, chunks: int = 1, recompute_blocks: bool = False, norm: bool = True) -> SwAVNetwork:
    torch.manual_seed(0)
    made = build_network(SMALL.model_copy(update={"head_batch_norm": norm}), prototypes=12)
    if not norm:
        for module in list(made.trunk.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.BatchNorm2d):
                    setattr(module, name, nn.GroupNorm(1, child.num_features))
    assert isinstance(made.trunk, Trunk)
    made.trunk.recompute_blocks, made.chunks = recompute_blocks, chunks
    return made


def step(network: SwAVNetwork) -> tuple[Tensor, dict[str, Tensor], int]:
    """Return loss, gradients, and the bytes that the forward pass of the trunk left behind."""
    generator = torch.Generator().manual_seed(1)
    crops = [
        torch.randn(2 * BATCH, 3, 32, 32, generator=generator),
        torch.randn(3 * BATCH, 3, 16, 16, generator=generator),
    ]
    saved = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal saved
        saved += tensor.nbytes
        return tensor

    with saved_tensors_hooks(count, lambda tensor: tensor):
        _, scores = network(crops)
    loss = SwAVLoss()(scores.unflatten(0, (5, BATCH)), network.prototypes.weight).loss
    loss.backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, saved


def buffers(network: SwAVNetwork) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in network.named_buffers()}


def test_activation_checkpointing_changes_nothing_but_the_memory() -> None:
    plain, sparing = network(), network(recompute_blocks=True)
    loss, gradients, saved = step(plain)
    again, same, less = step(sparing)
    assert torch.equal(loss, again)
    assert gradients.keys() == same.keys()
    assert all(torch.equal(gradients[name], same[name]) for name in gradients)
    assert less < saved / 2


def test_running_statistics_are_updated_once_although_activations_are_computed_twice() -> None:
    plain, sparing = network(), network(recompute_blocks=True)
    step(plain)
    step(sparing)
    expected = buffers(plain)
    assert all(torch.equal(value, expected[name]) for name, value in buffers(sparing).items())
    assert int(expected["trunk.bn1.num_batches_tracked"]) == 2  # one a resolution


@pytest.mark.parametrize("chunks", [2, 3, 5])
def test_in_pieces_the_gradient_is_that_of_the_whole_batch(chunks: int) -> None:
    loss, gradients, saved = step(network(norm=False))
    pieces, same, less = step(network(norm=False, chunks=chunks))
    torch.testing.assert_close(pieces, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(same[name], gradient, rtol=2e-4, atol=2e-6)
    assert less < saved / 2


def test_accumulated_gradients_of_small_batches_are_not_that_of_the_whole_batch() -> None:
    _, whole, _ = step(network(norm=False))
    small = network(norm=False)
    generator = torch.Generator().manual_seed(1)
    crops = [
        torch.randn(2 * BATCH, 3, 32, 32, generator=generator),
        torch.randn(3 * BATCH, 3, 16, 16, generator=generator),
    ]
    half = BATCH // 2
    for begin in (0, half):
        share = [each.unflatten(0, (-1, BATCH))[:, begin : begin + half].flatten(0, 1) for each in crops]
        _, scores = small(share)
        loss = SwAVLoss()(scores.unflatten(0, (5, half)), small.prototypes.weight).loss
        (loss / 2).backward()
    weight = small.trunk.get_parameter("conv1.weight")
    assert weight.grad is not None
    expected = whole["trunk.conv1.weight"]
    assert (weight.grad - expected).norm() > 0.05 * expected.norm()


def test_batch_statistics_of_the_trunk_are_those_of_a_piece_and_are_noted_once_each() -> None:
    pieces = network(chunks=4)
    step(pieces)
    assert int(buffers(pieces)["trunk.bn1.num_batches_tracked"]) == 2 * 4
    assert int(buffers(pieces)["projection_head.1.num_batches_tracked"]) == 1


def test_pieces_and_checkpointed_blocks_go_together() -> None:
    loss, gradients, _ = step(network(chunks=2))
    again, same, _ = step(network(chunks=2, recompute_blocks=True))
    assert torch.equal(loss, again)
    assert all(torch.equal(gradients[name], same[name]) for name in gradients)


def test_in_eval_mode_nothing_is_cut_into_pieces() -> None:
    whole, pieces = network().eval(), network(chunks=4, recompute_blocks=True).eval()
    crops: list[Any] = [torch.randn(6, 3, 32, 32)]
    with torch.no_grad():
        assert torch.equal(whole(crops)[1], pieces(crops)[1])
