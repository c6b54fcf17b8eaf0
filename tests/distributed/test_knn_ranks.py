"""Nearest neighbours on several ranks are to the bit those of one process, however the images are dealt."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distributed.ranks import run_ranks
from streamswav.training.distributed import Ranks
from streamswav.transfer.measuring import knn
from streamswav.transfer.measuring.exchange import all_rows
from streamswav.transfer.measuring.knn import KnnSettings, measure_knn

CLASSES, IMAGES, ASKED = 6, 230, 90
SETTINGS = KnnSettings((1, 20, 100, 230), (0.05, 1.0))


def sets(*, multi: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Many images are the same as others, but of other classes: ties decide."""
    generator = torch.Generator().manual_seed(4)
    different = torch.randn(40, 24, generator=generator)
    every = different[torch.randint(0, 40, (IMAGES + ASKED,), generator=generator)]
    labels = torch.randint(0, CLASSES, (len(every),), generator=generator)
    if multi:
        labels = torch.randint(-1, 2, (len(every), CLASSES), generator=generator)
    return every[:IMAGES], labels[:IMAGES], every[IMAGES:], labels[IMAGES:]


def deal(images: int, world_size: int, *, empty: bool) -> list[Tensor]:
    """Uneven shares in no order of the whole; of one rank none where that is wanted."""
    dealt = torch.randint(0, world_size - empty, (images,), generator=torch.Generator().manual_seed(images))
    return [(dealt == rank).nonzero().squeeze(1) for rank in range(world_size)]


def measure(rank: int, group: dist.ProcessGroup, *, multi: bool, empty: bool) -> Any:
    size = dist.get_world_size(group)
    train, train_labels, test, test_labels = sets(multi=multi)
    own, asked = deal(IMAGES, size, empty=empty)[rank], deal(ASKED, size, empty=empty)[rank]
    knn._ROUND = 40  # several rounds
    found = measure_knn(
        train[own],
        train_labels[own],
        test[asked],
        test_labels[asked],
        classes=CLASSES,
        settings=SETTINGS,
        ranks=Ranks(rank, size, group=group, control=group),
        places=(own * 3 + 5, asked),
    )
    return as_numbers(found)


def as_numbers(found: Any) -> dict[str, dict[str, float]]:
    return {
        f"{vote.k} {vote.temperature}": {
            **each.scores,
            **{
                f"{name} {end}": getattr(ends, end)
                for name, ends in each.intervals.items()
                for end in ("low", "high")
            },
        }
        for vote, each in found.items()
    }


@pytest.mark.parametrize(
    ("multi", "empty", "world_size"), [(False, False, 2), (False, True, 3), (True, True, 3)]
)
def test_several_ranks_find_what_one_does(tmp_path: Path, multi: bool, empty: bool, world_size: int) -> None:
    alone = measure_knn(*sets(multi=multi), classes=CLASSES, settings=SETTINGS)
    found = run_ranks(partial(measure, multi=multi, empty=empty), world_size, tmp_path / "ranks")
    assert found == [as_numbers(alone)] * world_size
    assert len({str(each) for each in found[0].values()}) > 4


def exchange(rank: int, group: dist.ProcessGroup) -> Any:
    ranks = Ranks(rank, dist.get_world_size(group), group=group, control=group)
    own = torch.arange(2 * rank, dtype=torch.float16).reshape(rank, 2) + 10 * rank
    return all_rows(own, ranks)


def test_rows_of_uneven_number_arrive_whole(tmp_path: Path) -> None:
    for found in run_ranks(exchange, 3, tmp_path / "ranks"):
        assert [each.tolist() for each in found] == [[], [[10, 11]], [[20, 21], [22, 23]]]
