"""Several ranks finetune the trunk that rank 0 has read, which nobody else reads."""

import functools

import pytest
import torch
from tiny_run import save_tiny_run, tiny_config

from distributed.ranks import run_ranks
from streamswav.errors import CheckpointError
from streamswav.training.distributed import Ranks
from streamswav.transfer.finetuning.finetune import build_finetuning, open_for_all


def ranks_of(rank, group):
    return Ranks(rank=rank, world_size=2, group=group, control=group)


def begin(rank, group, run):
    """Finetune a run that only rank 0 finds; return the network's tensors."""
    config, ranks = tiny_config(init=run if rank == 0 else "/nowhere"), ranks_of(rank, group)
    changed = {
        "labels": {"classes": 4},
        "training": {"batch": 8, "precision": "float32"},
        "optimizer": {"rate": 0.1},
        "finetune": {"mode": "frozen", "rates": [0.1], "weight_decays": [0.0]},
    }
    sections = {name: getattr(config, name).model_copy(update=keys) for name, keys in changed.items()}
    config = config.model_copy(update=sections)
    torch.manual_seed(rank)
    trunk, info = open_for_all(config, ranks)
    assert (trunk is None, info.images) == (rank == 1, 3072)
    task = build_finetuning(config, trunk, ranks, multi=False)
    return {name: tensor.clone() for name, tensor in task.subject.state_dict().items()}


def fail(rank, group):
    with pytest.raises(CheckpointError, match="there is neither a checkpoint nor a file"):
        open_for_all(tiny_config(init="/nowhere"), ranks_of(rank, group))
    return True


def test_all_ranks_finetune_what_rank_0_has_read(tmp_path):
    theirs, _ = save_tiny_run(str(tmp_path / "run"))
    states = run_ranks(functools.partial(begin, run=str(tmp_path / "run")), 2, tmp_path / "ranks")
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    for name, tensor in theirs.trunk.state_dict().items():
        assert torch.equal(states[1][f"trunk.{name}"], tensor)


def test_what_rank_0_is_refused_all_are_refused(tmp_path):
    assert run_ranks(fail, 2, tmp_path / "ranks") == [True, True]
