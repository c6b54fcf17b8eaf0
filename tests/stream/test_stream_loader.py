"""The loader for other training loops: batches of crops, states, ranks."""

import itertools
import json
import subprocess
import sys

import pytest
import torch
from distributed.ranks import run_ranks

from streamswav.config import CropsSection
from streamswav.errors import ConfigError, PositionError
from streamswav.training import StreamLoader

CROPS = CropsSection(sizes=[16, 8], counts=[2, 2], scales=[(0.3, 1.0), (0.1, 0.4)])
COUNTS = [37, 14, 51, 20]
BATCH = 8


@pytest.fixture(scope="module")
def shards(make_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder, counts=COUNTS)
    return folder


def load(folder, **options):
    return StreamLoader(folder, **{"batch": BATCH, "workers": 0, "crops": CROPS, "window": 8, **options})


def identities(batches):
    return [(each.turn, each.shard, each.ordinal) for batch in batches for each in batch.ids]


def through_json(loader):
    return json.loads(json.dumps(loader.state_dict()))


def test_all_passes_are_given_exactly_once_but_for_less_than_a_batch(shards):
    loader = load(shards, passes=2, workers=2)
    seen = identities(loader)
    assert len(seen) == len(set(seen)) == 2 * sum(COUNTS) // BATCH * BATCH
    assert loader.position.finished
    assert identities(loader) == []


def test_a_batch_holds_crops_of_every_resolution_and_the_augmentations_parameters(shards):
    batch = next(iter(load(shards)))
    assert [tuple(each.shape) for each in batch.pixels] == [(2, BATCH, 16, 16, 3), (2, BATCH, 8, 8, 3)]
    assert batch.parameters.shape[:2] == (4, BATCH)
    assert len(batch.keys) == BATCH


@pytest.mark.parametrize("given", [0, 3, 14])
def test_a_state_gives_exactly_the_rest_to_the_bit(shards, given):
    whole = list(load(shards))
    loader = load(shards)
    begun = list(itertools.islice(loader, given))
    again = load(shards)
    again.load_state_dict(through_json(loader))
    rest = list(again)
    assert identities(begun + rest) == identities(whole)
    for one, other in zip(begun + rest, whole, strict=True):
        assert all(map(torch.equal, one.pixels, other.pixels))
        assert torch.equal(one.parameters, other.parameters)


def test_what_was_prefetched_but_not_given_is_given_after_a_resume_on_other_workers(shards):
    whole = identities(load(shards, workers=0))
    loader = load(shards, workers=2)
    begun = identities(itertools.islice(loader, 5))
    again = load(shards, workers=0)
    again.load_state_dict(through_json(loader))
    loader.close()
    rest = identities(again)
    assert len(begun + rest) == len(set(begun + rest)) == len(whole)


def test_a_loop_that_breaks_goes_on_where_it_was(shards):
    loader = load(shards)
    begun = []
    for batch in loader:
        begun.append(batch)
        if len(begun) == 4:
            break
    assert identities(begun + list(loader)) == identities(load(shards))


def test_more_passes_may_be_asked_for_at_the_end(shards):
    loader = load(shards)
    first = identities(loader)
    again = load(shards, passes=2)
    again.load_state_dict(through_json(loader))
    seen = first + identities(again)
    assert len(seen) == len(set(seen)) == 2 * sum(COUNTS) // BATCH * BATCH


SCRIPT = """
import sys
from streamswav.config import CropsSection
from streamswav.training import StreamLoader

crops = CropsSection(sizes=[8], counts=[2], scales=[(0.3, 1.0)])
print(sum(len(batch.ids) for batch in StreamLoader(sys.argv[1], batch=8, workers=1, crops=crops)), __file__)
"""


def test_a_script_without_a_guard_runs_once_and_not_again_in_its_workers(shards, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-W", "error", script, shards], check=False, capture_output=True, text=True
    )
    assert done.stdout == f"{sum(COUNTS) // BATCH * BATCH} {script}\n", done.stderr


def test_exclusions_and_conditions_hold(shards, tmp_path):
    (tmp_path / "keys").write_text("0_0\n")
    loader = load(shards, exclude=[str(tmp_path / "keys")], where=["label != 3", "height > 3"])
    keys = {key for batch in loader for key in batch.keys}
    position = loader.position
    assert "0_0" not in keys
    assert "0_3" not in keys
    assert position.total("excluded").samples == 1
    assert position.total("filtered").samples == sum(number % 10 == 3 for number in range(sum(COUNTS)))


@pytest.mark.parametrize(
    ("options", "reason"), [({"seed": 1}, "seed"), ({"passes": [2, 1]}, "passes"), ({}, "manifest")]
)
def test_a_state_of_another_stream_is_refused(shards, make_shards, tmp_path, options, reason):
    make_shards(tmp_path / "a", counts=[9])
    make_shards(tmp_path / "b", counts=[60])
    folders = [tmp_path / "a", tmp_path / "b"]
    state = load(folders, passes=[1, 2]).state_dict()
    if reason == "manifest":
        folders, options = folders[:1], {"passes": 1}
    with pytest.raises(PositionError, match=reason):
        load(folders, **{"passes": [1, 2], **options}).load_state_dict(state)


def test_several_ranks_without_torch_distributed_are_refused(shards):
    with pytest.raises(ConfigError, match="init_process_group"):
        load(shards, rank=0, world_size=2)


def _of_two(rank, _, shards, state, count):
    loader = load(shards, columns=2)
    if state is not None:
        loader.load_state_dict(state)
    seen = identities(itertools.islice(loader, count))
    return {"seen": seen, "state": json.dumps(loader.state_dict()), "batch": loader.batch}


def test_ranks_share_the_batches_and_one_rank_goes_on_with_their_state(shards, tmp_path):
    first = run_ranks(_Task(shards, None, 6), 2, tmp_path)
    assert first[0]["state"] == first[1]["state"]
    begun = [identity for each in first for identity in each["seen"]]
    whole = load(shards, columns=2)
    assert sorted(begun) == sorted(identities(itertools.islice(whole, 6)))
    alone = load(shards, columns=2)
    alone.load_state_dict(json.loads(first[0]["state"]))
    assert sorted(begun + identities(alone)) == sorted(identities(load(shards, columns=2)))


def test_three_ranks_go_on_where_one_was_with_the_batch_they_can_share(shards, tmp_path):
    alone = load(shards, columns=2)
    begun = identities(itertools.islice(alone, 5))
    ranks = run_ranks(_Task(shards, through_json(alone), None), 3, tmp_path)
    assert {each["batch"] for each in ranks} == {6}
    seen = begun + [identity for each in ranks for identity in each["seen"]]
    assert len(seen) == len(set(seen))
    assert sum(COUNTS) - len(seen) < 6


class _Task:
    """`_of_two` with its arguments, for processes of their own."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __call__(self, rank, group):
        return _of_two(rank, group, *self.arguments)
