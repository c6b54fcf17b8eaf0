"""Several ranks begin with what rank 0 has read, whatever they drew and whether or not they see the file."""

import functools
from types import SimpleNamespace

import pytest
import torch
from tiny_run import save_tiny_run, tiny_config

from distributed.ranks import run_ranks
from streamswav.commands.initial import Initial
from streamswav.commands.program import Start
from streamswav.errors import CheckpointError
from streamswav.models import build_network
from streamswav.stream.store import Store
from streamswav.telemetry.progress import Reporter
from streamswav.training.distributed import Ranks


def begin(rank, group, run):
    """Begin with a run that only rank 0 finds; return the network's tensors."""
    config = tiny_config(init=run if rank == 0 else "/nowhere")
    ranks = Ranks(rank=rank, world_size=2, group=group, control=group)
    torch.manual_seed(rank)
    network = build_network(config.model, prototypes=9).to(memory_format=torch.channels_last)
    reporter = Reporter(silent=True)
    initial = Initial()
    initial.prepare(config, Start(None, ranks, Store(), reporter))
    initial.give(network, SimpleNamespace(ranks=ranks, reporter=reporter))
    reporter.close()
    return dict(network.state_dict())


def fail(rank, group):
    ranks = Ranks(rank=rank, world_size=2, group=group, control=group)
    with pytest.raises(CheckpointError, match="there is neither a checkpoint nor a file"):
        Initial().prepare(tiny_config(init="/nowhere"), Start(None, ranks, Store(), Reporter(silent=True)))
    return True


def test_all_ranks_begin_with_what_rank_0_has_read(tmp_path):
    theirs, _ = save_tiny_run(str(tmp_path / "run"))
    states = run_ranks(functools.partial(begin, run=str(tmp_path / "run")), 2, tmp_path / "ranks")
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    for name, tensor in theirs.state_dict().items():
        assert name == "prototypes.weight" or torch.equal(states[1][name], tensor)


def test_what_rank_0_is_refused_all_are_refused(tmp_path):
    assert run_ranks(fail, 2, tmp_path / "ranks") == [True, True]
