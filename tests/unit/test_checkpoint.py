"""Checkpoints are whole or passed over, never written over, and pruned only behind a newer one."""

import json
import pickle
import resource

import pytest
import torch

from streamswav.errors import CheckpointError, DeniedError, UnavailableError
from streamswav.stream.store import Store, join
from streamswav.training.checkpoint import (
    FORMAT_VERSION,
    CheckpointFolder,
    find_checkpoint,
    pack,
    packed,
    read_checkpoint,
    unpack,
)

ABOUT = {"model": {"width": 1.0}}


class Place:
    """A folder of checkpoints, the files behind it, and what was warned of."""

    def __init__(self, url, path, store):
        self.url, self.path, self.store, self.warnings = url, path, store, []
        self.folder = CheckpointFolder(url, store, warn=self.warnings.append)

    def save(self, step, text="state", **files):
        data = {"model.pt": f"{text} {step}".encode(), "position.json": b"{}", **files}
        return self.folder.save(data, step=step, images=16 * step, about=ABOUT)

    def names(self):
        return sorted(each.name for each in self.path.iterdir() if each.is_dir())


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path):
    if request.param == "local":
        return Place(str(tmp_path / "run" / "checkpoints"), tmp_path / "run" / "checkpoints", Store())
    s3 = request.getfixturevalue("s3")
    url, bucket = s3.make_bucket()
    return Place(f"{url}/run/checkpoints", bucket / "run" / "checkpoints", Store(s3.section))


def test_a_run_without_checkpoints_has_no_newest(place):
    assert place.folder.newest() is None
    assert place.folder.names() == []


def test_the_newest_reads_back_as_it_was_saved(place):
    place.save(9)
    saved = place.save(10, extra=bytes(3))
    checkpoint, files = place.folder.newest()
    assert checkpoint == saved
    assert (checkpoint.step, checkpoint.images, checkpoint.about) == (10, 160, ABOUT)
    assert files == {"model.pt": b"state 10", "position.json": b"{}", "extra": bytes(3)}
    assert checkpoint.size == 8 + 2 + 3
    assert (place.path / "latest").read_text() == "step-000000010"
    assert place.warnings == []


DAMAGES = {
    "flipped": (lambda folder: (folder / "model.pt").write_bytes(b"State 2"), "model.pt is damaged"),
    "shorter": (lambda folder: (folder / "model.pt").write_bytes(b"state"), "model.pt is damaged"),
    "file lost": (lambda folder: (folder / "position.json").unlink(), "position.json is missing"),
    "cut off": (lambda folder: (folder / "checkpoint.json").unlink(), "cut off"),
    "list cut": (lambda folder: (folder / "checkpoint.json").write_text('{"step": 2'), "checkpoint.json is"),
    "list odd": (lambda folder: (folder / "checkpoint.json").write_text("[]"), "checkpoint.json is damaged"),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_one_is_passed_over_with_a_warning(place, damage, reason):
    place.save(1)
    place.save(2)
    damage(place.path / "step-000000002")
    checkpoint, files = place.folder.newest()
    assert (checkpoint.step, files["model.pt"]) == (1, b"state 1")
    (warning,) = place.warnings
    assert "step-000000002" in warning
    assert reason in warning
    (place.path / "step-000000001" / "model.pt").unlink()
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints is whole"):
        place.folder.newest()


def test_another_format_is_not_guessed_at(place):
    saved = place.save(1)
    file = place.path / "step-000000001" / "checkpoint.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 7}))
    with pytest.raises(CheckpointError, match="format 7, this version reads 1"):
        read_checkpoint(saved.url, place.store)


def test_the_format_before_is_read(place):
    """It had no writer."""
    place.save(1)
    file = place.path / "step-000000001" / "checkpoint.json"
    listing = json.loads(file.read_text())
    del listing["writer"]
    file.write_text(json.dumps(listing | {"format_version": FORMAT_VERSION - 1}))
    assert place.folder.newest()[0].step == 1
    assert place.folder.last_writer() == 0


def test_ten_of_one_step_are_in_order(place):
    names = [place.save(5, f"number {number}").url.rpartition("/")[2] for number in range(11)]
    assert place.folder.names() == names
    assert place.folder.newest()[1]["model.pt"] == b"number 10 5"


def test_a_failed_save_leaves_nothing_behind(place):
    def fails(file):
        file.write(bytes(1000))
        raise UnavailableError("model.pt", "gone")

    with pytest.raises(UnavailableError):
        place.folder.save({"a": b"a", "model.pt": fails}, step=3, images=0, about={})
    assert not place.store.exists(join(place.url, "step-000000003"))


def test_an_error_of_the_disk_is_told_as_such_though_torch_hides_it(tmp_path):
    """A full disk fails some of the writes of one tensor file, not all."""
    place = Place(str(tmp_path), tmp_path, Store())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, hard))
    try:
        with pytest.raises(UnavailableError, match=r"model\.pt: cannot be written \(File too large\)"):
            place.folder.save(
                {"model.pt": packed([torch.zeros(9999) for _ in range(9)])}, step=1, images=0, about={}
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert place.names() == []


def test_a_copy_is_verified_on_its_way(place, tmp_path):
    saved = place.save(1)
    copies = CheckpointFolder(str(tmp_path / "copies"), Store())
    assert copies.adopt(saved, through=place.store).files == saved.files
    assert copies.newest()[1]["model.pt"] == b"state 1"
    (place.path / "step-000000001" / "model.pt").write_bytes(b"stale 1")
    with pytest.raises(CheckpointError, match=r"model\.pt is damaged"):
        copies.adopt(saved, through=place.store)
    assert copies.newest()[0].step == 1
    assert copies.names()[-1] == "step-000000001"


def test_a_whole_one_is_never_written_over(place):
    first = place.save(5, "first")
    second = place.save(5, "second")
    assert first.url != second.url
    assert read_checkpoint(first.url, place.store)[1]["model.pt"] == b"first 5"
    checkpoint, files = place.folder.newest()
    assert (checkpoint.step, files["model.pt"]) == (5, b"second 5")
    assert place.save(6).url > second.url


def test_one_that_was_cut_off_is_not_written_into(place):
    """Whoever began it may still be writing."""
    place.save(5, "first")
    (place.path / "step-000000005" / "checkpoint.json").unlink()
    second = place.save(5, "second")
    assert second.url.endswith("step-000000005.2")
    assert (place.path / "step-000000005" / "model.pt").read_bytes() == b"first 5"
    assert place.folder.newest()[1]["model.pt"] == b"second 5"
    place.folder.prune(second, keep=1)
    assert place.names() == ["step-000000005.2"]


def test_a_run_whose_first_was_cut_off_begins_again(place):
    place.save(5)
    (place.path / "step-000000005" / "checkpoint.json").unlink()
    with pytest.raises(CheckpointError, match="none of the 1"):
        place.folder.newest()
    (place.path / "latest").unlink()
    assert place.folder.newest() is None
    assert all("cut off" in warning for warning in place.warnings)


def test_pruning_keeps_the_newest_and_those_that_stay_for_good(place):
    for step in (1, 2, 3, 4):
        saved = place.save(step)
        if step == 2:
            place.folder.keep_for_good(saved)
    place.folder.prune(saved, keep=2)
    assert place.names() == ["step-000000002", "step-000000003", "step-000000004"]
    assert place.folder.newest()[0] == saved


def test_pruning_does_not_count_what_is_damaged_or_was_passed_over(place):
    for step in (1, 2, 9):
        place.save(step)
    (place.path / "step-000000009" / "model.pt").write_bytes(b"")
    (place.path / "step-000000002" / "checkpoint.json").unlink()
    assert place.folder.newest()[0].step == 1
    place.folder.prune(place.save(3), keep=2)
    assert place.names() == ["step-000000001", "step-000000003", "step-000000009"]
    assert place.folder.newest()[0].step == 3


def test_a_save_that_fails_leaves_the_older_one(tmp_path):
    place = Place(str(tmp_path), tmp_path, Store())
    place.save(1)
    (tmp_path / "step-000000002").write_text("in the way")
    with pytest.raises(DeniedError, match="step-000000002"):
        place.save(2)
    assert place.folder.newest()[0].step == 1
    assert (tmp_path / "latest").read_text() == "step-000000001"


def test_a_checkpoint_is_found_by_its_own_folder_its_runs_and_all_of_them(place):
    place.save(1)
    place.save(2)
    run = place.url.removesuffix("/checkpoints")
    for url, step in (
        (run, 2),
        (run + "/", 2),
        (place.url, 2),
        (join(place.url, "step-000000001"), 1),
        (join(place.url, "step-000000001/"), 1),
    ):
        assert find_checkpoint(url, place.store)[0].step == step
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        find_checkpoint(join(run, "elsewhere"), place.store)


def test_state_reads_back_to_the_bit_and_executes_nothing():
    state = {
        "weights": torch.randn(3, 4),
        "none": None,
        "list": [1, 2.5, "x"],
        "bytes": torch.get_rng_state(),
    }
    loaded = unpack(pack(state))
    assert torch.equal(loaded["weights"], state["weights"])
    assert torch.equal(loaded["bytes"], state["bytes"])
    assert (loaded["none"], loaded["list"]) == (None, [1, 2.5, "x"])
    with pytest.raises(pickle.UnpicklingError):
        unpack(pack({"call": print}))


class Racing(Store):
    """Another process saves and prunes between the reader's listing and its reading."""

    def __init__(self, section, meanwhile):
        super().__init__(section)
        self._meanwhile = [meanwhile]

    def read(self, url, *given):
        if self._meanwhile:
            self._meanwhile.pop()()
        return super().read(url, *given)


def test_a_checkpoint_that_was_pruned_while_it_was_chosen_gives_way_to_the_next(place):
    place.save(1)

    def meanwhile():
        place.folder.prune(place.save(2), keep=1)

    reader = CheckpointFolder(place.url, Racing(place.store.section, meanwhile))
    checkpoint, _ = reader.newest()
    assert checkpoint.step == 2
