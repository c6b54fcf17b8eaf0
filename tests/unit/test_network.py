from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from streamswav.config import ModelSection
from streamswav.models import ProjectionHead, Prototypes, SwAVNetwork, build_network

SMALL = ModelSection(trunk="resnet10", width=0.125, stem="small", head_hidden=16, embedding=12)


def network() -> SwAVNetwork:
    torch.manual_seed(0)
    return build_network(SMALL, prototypes=20)


def five_crops(batch: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, 3, size, size, generator=generator) for size in (16, 16, 8, 8, 8)]


def test_outputs_are_unit_embeddings_and_their_scores() -> None:
    model = network()
    embeddings, scores = model(five_crops())
    assert (embeddings.shape, scores.shape) == ((20, 12), (20, 20))
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(20))
    torch.testing.assert_close(scores, embeddings @ model.prototypes.weight.T)


def test_one_pass_through_the_trunk_a_resolution_and_one_through_the_head() -> None:
    model, sizes = network(), []
    model.trunk.register_forward_hook(lambda _, given, __: sizes.append(tuple(given[0].shape)))
    model.projection_head.register_forward_hook(lambda _, given, __: sizes.append(tuple(given[0].shape)))
    model(five_crops())
    assert sizes == [(8, 3, 16, 16), (12, 3, 8, 8), (20, 64)]


def test_crops_may_come_joined_by_resolution() -> None:
    crops = five_crops()
    apart = network()(crops)
    joined = network()([torch.cat(crops[:2]), torch.cat(crops[2:])])
    assert all(torch.equal(a, b) for a, b in zip(apart, joined, strict=True))


def test_equal_sizes_that_are_not_neighbours_stay_apart() -> None:
    model, sizes = network(), []
    model.trunk.register_forward_hook(lambda _, given, __: sizes.append(given[0].shape[-1]))
    crops = five_crops()
    model([crops[0], crops[2], crops[1]])
    assert sizes == [16, 8, 16]


def test_lengths_and_scores_are_float32_under_autocast() -> None:
    model = network()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings, scores = model(five_crops())
    assert (embeddings.dtype, scores.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(20))
    assert torch.equal(scores, model.prototypes(embeddings))


def test_the_head_is_linear_norm_relu_linear() -> None:
    head = ProjectionHead(8, 16, 12)
    assert [type(layer) for layer in head] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]


def test_a_head_without_norm_keeps_the_layers_numbers() -> None:
    head = ProjectionHead(8, 16, 12, batch_norm=False)
    assert list(head.state_dict()) == ["0.weight", "0.bias", "3.weight", "3.bias"]


def test_a_head_without_hidden_layer_is_one_linear_layer() -> None:
    features = torch.randn(4, 8)
    head = ProjectionHead(8, 0, 12)
    assert list(head.state_dict()) == ["0.weight", "0.bias"]
    torch.testing.assert_close(head(features), features @ head[0].weight.T + head[0].bias)


def test_prototypes_have_no_bias_and_are_normalised_in_place() -> None:
    prototypes = Prototypes(12, 20)
    weight, before = prototypes.weight, prototypes.weight.detach().clone()
    prototypes.normalise_()
    assert prototypes.bias is None
    assert prototypes.weight is weight
    assert weight.requires_grad
    torch.testing.assert_close(weight.detach(), before / before.norm(dim=1, keepdim=True))


@pytest.mark.parametrize(("keys", "layers"), [({"head_hidden": 0}, 1), ({"head_batch_norm": False}, 4)])
def test_the_configuration_reaches_the_head(keys: dict[str, object], layers: int) -> None:
    model = build_network(SMALL.model_copy(update=keys), prototypes=20)
    assert isinstance(model.projection_head, ProjectionHead)
    assert len(model.projection_head) == layers
    assert not any(isinstance(layer, nn.BatchNorm1d) for layer in model.projection_head)


def test_batch_norms_can_be_synchronised() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    assert not any(type(part) in (nn.BatchNorm1d, nn.BatchNorm2d) for part in model.modules())
    assert list(model.state_dict()) == list(network().state_dict())
