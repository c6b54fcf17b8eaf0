"""When a checkpoint is due, and how the queues of some ranks become those of others."""

import copy
import functools
import json
import threading

import pytest
import torch

from streamswav.config import CheckpointSection, Config, dump_config, parse_config
from streamswav.errors import (
    EXIT_RETRY,
    CheckpointError,
    DeniedError,
    LeaseError,
    StreamswavError,
    UnavailableError,
)
from streamswav.stream.grid import Grid
from streamswav.stream.manifest import list_manifest
from streamswav.stream.outcomes import PassedOver
from streamswav.stream.position import Position
from streamswav.stream.store import Store
from streamswav.swav import FeatureQueue
from streamswav.telemetry.secrecy import without_secrets
from streamswav.training.build import build_learner
from streamswav.training.checkpoint import Checkpoint, CheckpointFolder, read_checkpoint, unpack
from streamswav.training.distributed import Ranks
from streamswav.training.restore import (
    Restored,
    describe_model,
    load_into,
    refuse_other_model,
)
from streamswav.training.saver import Saver
from streamswav.training.swav_learner import _own_queue

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


# Writing in the background.


class Gate(CheckpointFolder):
    """Checkpoints that are written once the test opens the gate, or not at all."""

    def __init__(self, url):
        super().__init__(url, Store())
        self.open, self.entered = threading.Event(), threading.Event()
        self.fail = None

    def save(self, files, **about):
        self.entered.set()
        assert self.open.wait(30)
        if self.fail:
            raise self.fail
        return super().save(files, **about)


class Feed:
    """A stream that is where the test says."""

    def __init__(self, manifest):
        self.manifest, self.position = manifest, Position(manifest.digest, Grid(BATCH, 1, 1, 1), 0)
        self.unwritten = []

    def synchronise(self):
        return self.position


class Heard:
    """What a listener hears, in order."""

    def __init__(self):
        self.events = []

    def staged(self, seconds):
        self.events.append("staged")

    def saved(self, checkpoint, seconds):
        self.events.append(f"saved {checkpoint.step}")

    def save_failed(self, reason):
        self.events.append("failed")

    def save_delayed(self):
        self.events.append("delayed")


class Run:
    """A saver of a tiny learner whose clock and storage belong to the test."""

    def __init__(self, path, manifest, **section):
        self.now, self.path, self.learner = 0.0, path, learner_with_queue(0)
        self.feed, self.heard = Feed(manifest), Heard()
        self.folder = Gate(str(path / "checkpoints"))
        config = Config(
            run={"directory": str(path)}, checkpoint=CheckpointSection(minutes=None, images=8, **section)
        )
        self.saver = Saver(self.folder, Store(), config, Ranks(), listener=self.heard, clock=lambda: self.now)

    def save(self, step, **how):
        self.saver.save(self.learner, self.feed, step=step, loss_first=None, **how)

    def fail(self, error, *, step):
        """One save that fails; return once it has."""
        self.folder.fail = error
        self.folder.open.set()
        self.save(step)
        self.saver._background.wait()

    def listed(self):
        return [
            json.loads(line)
            for path in sorted(self.path.glob("quarantined/*"))
            for line in path.read_text().splitlines()
        ]


@pytest.fixture
def saving(tmp_path, make_shards):
    manifest = list_manifest([str(make_shards(tmp_path / "shards", counts=[4])[0])], Store())
    return functools.partial(Run, tmp_path / "run", manifest)


FULL = UnavailableError("checkpoints/model.pt", "cannot be written (No space left on device)")
DENIED = DeniedError("checkpoints/model.pt", "no permission")


def test_while_one_is_written_none_is_due_and_that_is_told_once(saving):
    run = saving()
    run.save(1)
    assert run.folder.entered.wait(30)
    assert not run.saver.due(8)
    assert not run.saver.due(16)
    run.folder.open.set()
    run.saver.close()
    assert run.saver.due(16)
    assert run.heard.events == ["staged", "delayed", "saved 1"]


def test_what_is_written_is_of_its_step_though_the_weights_move_on(saving):
    run = saving()
    before = copy.deepcopy(run.learner.state_dict()["network"])
    run.save(1)
    with torch.no_grad():
        for parameter in run.learner.module.parameters():
            parameter.add_(1)
    run.folder.open.set()
    run.save(2, wait=True)
    saved = unpack(read_checkpoint(run.folder.url + "/step-000000001", Store())[1]["model.pt"])["network"]
    assert all(torch.equal(saved[name], value) for name, value in before.items())
    moved = unpack(read_checkpoint(run.folder.url + "/step-000000002", Store())[1]["model.pt"])["network"]
    assert not torch.equal(moved["prototypes.weight"], before["prototypes.weight"])


def test_one_that_failed_is_tried_again_soon_and_later_each_time(saving):
    run = saving()
    pauses = []
    for step in range(1, 12):
        run.fail(FULL, step=step)
        assert not run.saver.due(8 * step)
        pauses.append(run.saver._retry_at - run.now)
        run.now = run.saver._retry_at
        assert run.saver.due(0)
    assert pauses[:8] == [1, 2, 4, 8, 16, 32, 64, 120]
    run.folder.fail = None
    run.save(12)
    run.saver.close()
    assert run.heard.events[-1] == "saved 12"
    assert not run.saver.due(0)
    run.fail(FULL, step=13)
    assert run.saver._retry_at - run.now == 1


def test_after_the_deadline_the_run_ends_with_what_was_tried(saving):
    run = saving(deadline_seconds=100)
    step = 0
    while run.now < 100:
        step += 1
        run.fail(FULL, step=step)
        run.now = run.saver._retry_at
    assert run.now == 100
    run.fail(FULL, step=step + 1)
    assert run.saver.due(0)
    with pytest.raises(UnavailableError, match=r"for 100 s .*, 8 tries; the last time: .*No space") as error:
        run.save(step + 2)
    assert error.value.exit_code == EXIT_RETRY


def test_who_may_not_write_from_the_start_is_told_at_once_later_it_is_tried_again(saving):
    run = saving()
    run.fail(DENIED, step=1)
    assert run.saver.due(0)
    with pytest.raises(DeniedError):
        run.save(2)


def test_a_refusal_after_one_was_written_is_tried_again(saving):
    run = saving()
    run.fail(None, step=1)
    run.fail(DENIED, step=2)
    assert not run.saver.due(100)
    run.now = run.saver._retry_at
    run.fail(None, step=3)
    assert run.heard.events == ["staged", "saved 1", "staged", "failed", "staged", "saved 3"]


def test_a_failure_that_is_waited_for_is_an_error(saving):
    run = saving()
    run.folder.fail = FULL
    run.folder.open.set()
    with pytest.raises(UnavailableError, match="No space"):
        run.save(1, wait=True)
    run.folder.fail = None
    run.save(1, wait=True)
    run.save(1, wait=True)
    assert run.heard.events == ["staged", "failed", "staged", "saved 1"]


def test_in_a_hurry_what_is_still_being_written_is_not_waited_for(saving):
    run = saving()
    run.save(1)
    with pytest.raises(UnavailableError, match="still being written"):
        run.save(2, wait=True, seconds=0.1)
    run.folder.open.set()
    run.saver.close()
    assert run.heard.events == ["staged", "saved 1"]


def test_what_another_process_took_over_is_left_at_once(saving):
    run = saving()
    run.fail(None, step=1)
    run.fail(LeaseError("taken over"), step=2)
    with pytest.raises(LeaseError):
        run.save(3)


def test_what_nobody_expected_ends_the_run_as_well(saving):
    run = saving()
    run.fail(RuntimeError("odd"), step=1)
    with pytest.raises(StreamswavError, match=r"cannot be written \(RuntimeError: odd\)"):
        run.save(2)


def test_what_was_passed_over_is_listed_once_whichever_checkpoint_fails(saving):
    run = saving()
    for step, error in enumerate((FULL, None, FULL, FULL, None), 1):
        run.feed.unwritten += [PassedOver(0, 0, "truncated", step, step + 1, ordinal=step)]
        run.fail(error, step=step)
        assert run.feed.unwritten == []
    assert [each["ordinal"] for each in run.listed()] == [1, 2, 3, 4, 5]


def test_lists_that_cannot_be_written_are_written_with_a_later_checkpoint(saving):
    run = saving()
    run.path.mkdir()
    (run.path / "quarantined").write_text("in the way")
    run.feed.unwritten += [PassedOver(0, 0, "truncated", 0, 1, ordinal=0)]
    run.fail(None, step=1)
    assert run.heard.events == ["staged", "failed"]
    assert run.folder.newest() is None
    (run.path / "quarantined").unlink()
    run.saver._fatal = None
    run.feed.unwritten += [PassedOver(0, 0, "truncated", 1, 2, ordinal=1)]
    run.fail(None, step=2)
    assert [each["ordinal"] for each in run.listed()] == [0, 1]
    assert run.folder.newest()[0].step == 2


def test_older_ones_that_cannot_be_removed_are_a_warning(saving, monkeypatch):
    run = saving(keep=1)
    warnings = []
    run.folder.warn = warnings.append
    run.fail(None, step=1)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "delete", lambda *_: (_ for _ in ()).throw(DENIED))
        run.fail(None, step=2)
    assert run.heard.events[-1] == "saved 2"
    assert "older checkpoints stay for now" in warnings[0]
    run.fail(None, step=3)
    assert [path.name for path in run.path.glob("checkpoints/step-*")] == ["step-000000003"]


def test_none_is_removed_before_a_newer_one_is_committed(saving):
    run = saving(keep=1)
    run.fail(None, step=1)
    run.folder.open.clear()
    run.folder.entered.clear()
    run.save(2)
    assert run.folder.entered.wait(30)
    assert run.folder.newest()[0].step == 1
    run.folder.open.set()
    run.saver.close()
    assert [path.name for path in run.path.glob("checkpoints/step-*")] == ["step-000000002"]


@pytest.mark.parametrize("minutes_first", [True, False])
def test_of_minutes_and_images_each_alone_makes_one_due_and_both_count_anew(tmp_path, minutes_first):
    now = [0.0]
    saver = make_saver(tmp_path, lambda: now[0], minutes=1, images=100)
    saver._staged_at, saver._staged_images = 30.0, 50
    now[0], images = (90.0, 51) if minutes_first else (31.0, 150)
    assert saver.due(images)
    saver._staged_at, saver._staged_images = now[0], images
    assert not saver.due(images + 99)
    now[0] += 59
    assert not saver.due(images + 99)


def test_queues_go_from_four_ranks_to_two_to_one_to_three_without_a_loss():
    """With a batch of twelve, which all of them share; each number is one embedding's."""
    batch, ranks = 12, (4, 2, 1, 3)
    whole = torch.arange(CROPS * 3 * batch * DIM, dtype=torch.float32).view(CROPS, 3 * batch, DIM)
    by_batch = whole.view(CROPS, 3, batch, DIM)
    parts = [part.flatten(1, 2) for part in by_batch.chunk(4, dim=2)]
    for world_size in ranks[1:]:
        length = 3 * batch // world_size
        parts = [
            _own_queue(
                parts, Ranks(rank=rank, world_size=world_size), saved=batch, batch=batch, length=length
            )
            for rank in range(world_size)
        ]
        expected = [part.flatten(1, 2) for part in by_batch.chunk(world_size, dim=2)]
        assert all(torch.equal(one, other) for one, other in zip(parts, expected, strict=True))


@pytest.mark.parametrize(("batch", "batches"), [(12, 2), (8, 4), (16, 1), (20, 1)])
def test_a_queue_that_meets_another_batch_keeps_the_newest_and_whole_batches(batch, batches):
    """Saved: two ranks, batches of eight, four of them; a place without an embedding is empty."""
    whole = torch.arange(1, CROPS * 32 * DIM + 1, dtype=torch.float32).view(CROPS, 32, DIM)
    parts = shares(whole, 2)
    one = _own_queue(parts, Ranks(), saved=BATCH, batch=batch, length=batches * batch)
    assert one.shape == (CROPS, batches * batch, DIM)
    kept = min(32, batches * batch)
    assert torch.equal(one[:, :kept], whole[:, :kept])
    assert not one[:, kept:].any()
