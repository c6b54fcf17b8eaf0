from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor

from streamswav.errors import ConfigError
from streamswav.swav import FeatureQueue, usable_length


def ones(value: float, batch: int = 4) -> Tensor:
    return torch.full((2, batch, 3), value)


def test_the_newest_embeddings_are_in_front() -> None:
    queue = FeatureQueue(length=8, dim=3, crops=2)
    for value in (1.0, 2.0, 3.0):
        queue.push(ones(value))
    assert torch.equal(queue.features, torch.cat([ones(3.0), ones(2.0)], dim=1))


def test_each_assigned_crop_has_its_own_queue() -> None:
    queue = FeatureQueue(length=4, dim=3, crops=2)
    embeddings = torch.arange(24.0).view(2, 4, 3)
    queue.push(embeddings)
    assert torch.equal(queue.features, embeddings)


def test_the_queue_is_full_once_its_last_slot_is_filled() -> None:
    queue = FeatureQueue(length=8, dim=3, crops=2)
    seen = []
    for _ in range(3):
        seen.append(queue.full)
        queue.push(ones(1.0))
    assert [*seen, queue.full] == [False, False, True, True]


def test_a_length_that_the_batch_does_not_divide_is_filled_to_the_end() -> None:
    queue = FeatureQueue(length=6, dim=3, crops=2)
    queue.push(ones(1.0))
    assert not queue.full
    queue.push(ones(2.0))
    assert queue.full
    assert torch.equal(queue.features, torch.cat([ones(2.0), ones(1.0, batch=2)], dim=1))


def test_what_is_stored_carries_no_gradient() -> None:
    queue = FeatureQueue(length=4, dim=3, crops=2)
    queue.push(ones(1.0).requires_grad_())
    assert not queue.features.requires_grad


@pytest.mark.parametrize("pushes", [0, 1, 2, 3])
def test_a_saved_queue_continues_where_it_was(pushes: int) -> None:
    queue = FeatureQueue(length=12, dim=3, crops=2)
    for push in range(pushes):
        queue.push(ones(push + 1.0))
    file = io.BytesIO()
    torch.save(queue.state_dict(), file)
    file.seek(0)
    restored = FeatureQueue(length=12, dim=3, crops=2)
    restored.load_state_dict(torch.load(file, weights_only=True))
    for both in (queue, restored):
        both.push(ones(9.0))
    assert torch.equal(restored.features, queue.features)
    assert restored.full == queue.full == (pushes >= 2)


def test_a_length_is_cut_down_to_a_multiple_of_the_global_batch() -> None:
    assert [usable_length(length, 256) for length in (0, 256, 3840, 4000)] == [0, 256, 3840, 3840]


def test_a_queue_shorter_than_the_batch_is_refused_by_its_key() -> None:
    with pytest.raises(ConfigError, match="256") as error:
        usable_length(255, 256)
    assert (error.value.key, error.value.value) == ("swav.queue_length", 255)
