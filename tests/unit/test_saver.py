"""When a checkpoint is due, and how the queues of some ranks become those of others."""

import pytest
import torch

from streamswav.config import CheckpointSection, Config, dump_config, parse_config
from streamswav.errors import CheckpointError
from streamswav.stream.grid import Grid
from streamswav.stream.position import Position
from streamswav.stream.store import Store
from streamswav.swav import FeatureQueue
from streamswav.training.build import build_learner
from streamswav.training.checkpoint import Checkpoint, CheckpointFolder
from streamswav.training.distributed import Ranks
from streamswav.training.saver import (
    Restored,
    Saver,
    describe_model,
    load_into,
    refuse_other_model,
    without_secrets,
)

BATCH, DIM, CROPS = 8, 4, 2


def make_saver(tmp_path, clock, **section):
    config = Config(checkpoint=CheckpointSection(**section))
    return Saver(CheckpointFolder(str(tmp_path), Store()), Store(), config, Ranks(), clock=clock)


def test_a_checkpoint_is_due_after_minutes_or_images_whichever_comes_first(tmp_path):
    now = [0.0]
    saver = make_saver(tmp_path, lambda: now[0], minutes=10, images=1000)
    assert not saver.due(999)
    assert saver.due(1000)
    now[0] = 599
    assert not saver.due(0)
    now[0] = 600
    assert saver.due(0)


def test_without_minutes_only_images_count(tmp_path):
    saver = make_saver(tmp_path, lambda: 1e9, minutes=None, images=5)
    assert not saver.due(4)
    assert saver.due(5)


def learner_with_queue(length):
    """A tiny learner of one rank whose queue has so many embeddings an assigned crop."""
    config = parse_config(
        {
            "model": {"trunk": "resnet8", "width": 0.125, "head_hidden": 0, "embedding": DIM},
            "crops": {"sizes": [8], "counts": [2], "scales": [[0.5, 1.0]]},
            "swav": {"prototypes": 4, "epsilon": 0.05, "iterations": 3, "queue_length": length},
            "optimizer": {"rate": 0.1},
            "training": {"batch": BATCH, "precision": "float32"},
        }
    )
    return build_learner(config, Ranks())


def whole_queue(batches):
    """[A, batches * G, D]: the newest batch first, each image with its own number."""
    numbers = torch.arange(CROPS * batches * BATCH * DIM, dtype=torch.float32) + 1
    return numbers.view(CROPS, batches * BATCH, DIM)


def shares(queue, world_size):
    """What each rank holds of it: its part of every batch."""
    by_batch = queue.view(CROPS, -1, BATCH, DIM)
    return [part.flatten(1, 2) for part in by_batch.chunk(world_size, dim=2)]


@pytest.mark.parametrize("saved_by", [1, 2, 4, 8])
@pytest.mark.parametrize("restored_on", [1, 2, 4])
def test_the_queue_is_dealt_to_another_number_of_ranks_batch_by_batch(saved_by, restored_on):
    queue = whole_queue(batches=3)
    learner = learner_with_queue(3 * BATCH)
    learner.queue = FeatureQueue(length=3 * BATCH // restored_on, dim=DIM, crops=CROPS)
    shared = {name: value for name, value in learner.state_dict().items() if name != "queue"}
    random = torch.get_rng_state()
    restored = Restored(
        Checkpoint("", 3, 24, {}, {}),
        step=3,
        loss_first=None,
        position=Position("m", Grid(BATCH, 1, 1, 1), 0),
        shared=shared,
        by_rank=[{"queue": {"features": part.clone()}, "random": random} for part in shares(queue, saved_by)],
    )
    for rank, expected in enumerate(shares(queue, restored_on)):
        load_into(learner, restored, Ranks(rank=rank, world_size=restored_on), batch=BATCH)
        assert torch.equal(learner.queue.features, expected)
        assert learner.queue.full


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"model": {"width": 2.0}}, r"model\.width = 1\.0, now it is 2\.0"),
        ({"swav": {"prototypes": 9}}, r"swav\.prototypes = None, now it is 9"),
        ({"optimizer": {"name": "adamw"}}, r"optimizer\.name = 'lars', now it is 'adamw'"),
        ({"stream": {"seed": 1}}, r"stream\.seed = 0, now it is 1"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_name(changed, key):
    checkpoint = Checkpoint("run/checkpoints/step-000000001", 1, 16, {}, describe_model(Config()))
    refuse_other_model(checkpoint, describe_model(Config()))
    with pytest.raises(CheckpointError, match=key):
        refuse_other_model(checkpoint, describe_model(parse_config(changed)))


def test_what_is_stored_has_no_query_of_a_signed_url():
    url = "https://host/a.tar?X-Amz-Signature=planted"
    stored = dump_config(without_secrets(parse_config({"stream": {"urls": [url]}})))
    assert "https://host/a.tar" in stored
    assert "planted" not in stored
