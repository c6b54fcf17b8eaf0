"""TensorBoard and Weights & Biases: what they hold of real runs, and that they cannot hurt one."""

import json
import struct
import threading
import time

import pytest
from runs import arguments, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from streamswav.config import TelemetrySection
from streamswav.errors import EXIT_CONFIG, EXIT_DONE, ConfigError
from streamswav.telemetry import sinks
from streamswav.telemetry.sinks import BackgroundSink, TensorBoardSink, refuse_missing

COUNTS = [40, 40]
BATCH = 16


@pytest.fixture(scope="module")
def story(make_shards, tmp_path_factory):
    """A run with both sinks, stopped by its end and gone on with for another pass."""
    folder = tmp_path_factory.mktemp("sinks")
    make_shards(folder / "shards", counts=COUNTS)

    def go(passes):
        made = arguments(
            run={"directory": folder / "run"},
            stream={"urls": folder / "shards", "passes": passes, "samples": sum(COUNTS)},
            telemetry={"sinks": "[tensorboard, wandb]", "wandb_project": "proof"},
        )
        environment = {"WANDB_MODE": "offline", "WANDB_CACHE_DIR": str(folder / "cache")}
        outcome = run(made, folder / f"out-{passes}", environment=environment)
        assert outcome.code == EXIT_DONE, outcome.err
        return outcome

    return folder / "run", [go(1), go(2)]


def logged(data):
    """The entries of a log as LevelDB writes it, behind a header of 7 bytes; the package has no reader."""
    place, entry = 7, b""
    while place + 7 <= len(data):
        if (left := -place % (1 << 15)) < 7 and left:  # a block ends with zeros where no header fits
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        entry += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield entry
            entry = b""


def records(folder):
    """Configuration, rows and summary of each file that Weights & Biases would sync, by the run's id."""
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        rows, config, about, summary = [], {}, None, {}
        for data in logged(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                about = record.run
                config |= {each.key: json.loads(each.value_json) for each in record.run.config.update}
            rows += [_values(record.history.item)] if record.HasField("history") else []
            summary |= _values(record.summary.update) if record.HasField("summary") else {}
        yield about, config, rows, summary


def _values(items):
    return {"/".join(each.nested_key) or each.key: json.loads(each.value_json) for each in items}


def test_tensorboard_holds_every_reading_by_images(story):
    folder, outcomes = story
    read = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    lines = [line for outcome in outcomes for line in outcome.of("progress")]
    for name in ("loss", "rate", "images_per_second", "prototype_usage_ratio", "ln_prototypes", "step"):
        found = {event.step: event.value for event in read.Scalars(name)}
        assert found == {line["images"]: pytest.approx(line[name], rel=1e-4) for line in lines}
    assert "trunk: resnet10" in read.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "event/checkpoint/text_summary" in read.Tags()["tensors"]


def test_weights_and_biases_holds_every_reading_and_a_restart_goes_on_with_the_same_run(story):
    folder, outcomes = story
    (one, config, first, _), (other, _, second, summary) = records(folder)
    assert one.run_id == other.run_id == json.loads((folder / "wandb.json").read_text())["id"]
    assert (one.project, one.display_name) == ("proof", "run")
    assert config["model"]["trunk"] == "resnet10"
    assert config["telemetry"]["sinks"] == ["tensorboard", "wandb"]
    for outcome, rows in zip(outcomes, (first, second), strict=True):
        losses = {row["images"]: row["loss"] for row in rows if "loss" in row}
        assert losses == {
            line["images"]: pytest.approx(line["loss"], rel=1e-4) for line in outcome.of("progress")
        }
        steps = {row["images"]: row["step"] for row in rows if "step" in row}
        assert all(images == BATCH * step for images, step in steps.items())
    assert summary["event/resumed"].startswith("going on from")


def test_nothing_of_them_is_said_on_standard_error(story):
    for outcome in story[1]:
        assert outcome.said == []
        assert outcome.of("warning") == []


def test_steps_that_a_crash_lost_are_not_shown_twice(tmp_path):
    before = TensorBoardSink(str(tmp_path), "a: 1", images=0)
    for images in (10, 20, 30):
        before.write(images // 10, images, {"loss": 1.0})
    before.close()
    time.sleep(1.1)  # a file is named by its second
    after = TensorBoardSink(str(tmp_path), "a: 1", images=10)
    after.write(2, 20, {"loss": 2.0})
    after.close()
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [(10, 1.0), (20, 2.0)]


class Broken:
    """A sink that fails at the second row."""

    rows = 0

    def write(self, *_):
        self.rows += 1
        if self.rows == 2:
            raise OSError("No space left on device")

    event = write

    def close(self):
        raise AssertionError("it was left out")


def test_a_sink_that_fails_is_told_of_once_and_left_out():
    warned, broken = [], Broken()
    sink = BackgroundSink("tensorboard", lambda: broken, warned.append)
    for images in range(10):
        sink.write(images, images, {})
    sink.close()
    assert broken.rows == 2
    assert warned == ["tensorboard is left out from here on: No space left on device"]


def test_a_sink_that_cannot_be_opened_is_told_of(make_shards, tmp_path):
    """No server, and no patience: the run is what it is without."""
    make_shards(tmp_path / "shards", counts=COUNTS)
    made = arguments(
        run={"directory": tmp_path / "run"},
        stream={"urls": tmp_path / "shards", "samples": sum(COUNTS)},
        telemetry={"sinks": "wandb"},
    )
    environment = {
        "WANDB_MODE": "online",
        "HOME": str(tmp_path),
        "WANDB_API_KEY": "",
        "WANDB_DIR": str(tmp_path),
    }
    outcome = run(made, tmp_path / "out", environment=environment)
    assert outcome.code == EXIT_DONE, outcome.err
    (line,) = outcome.of("warning")
    assert line["message"].startswith("wandb is left out from here on: No API key configured")
    assert outcome.said == []


def test_a_sink_that_hangs_holds_nothing_up(monkeypatch):
    monkeypatch.setattr(sinks, "_WAITING", 3)
    warned, gate = [], threading.Event()
    sink = BackgroundSink("wandb", gate.wait, warned.append)
    for images in range(10):
        sink.write(images, images, {})
    sink.close(seconds=0.1)
    gate.set()
    assert warned == [
        "wandb falls behind: some readings do not get there",
        "wandb is left out from here on: it is not done 0.1 s after the end",
    ]


def test_a_package_that_is_missing_is_a_line_with_the_command(monkeypatch):
    monkeypatch.setattr(sinks, "PACKAGES", {"wandb": "no_such_package"})
    with pytest.raises(ConfigError, match=r"pip install 'streamswav\[wandb\]'") as caught:
        refuse_missing(TelemetrySection(sinks=["wandb"]), "runs/first")
    assert caught.value.exit_code == EXIT_CONFIG


@pytest.mark.parametrize(
    ("given", "directory", "says"),
    [
        ({"sinks": ["tensorboard"]}, "s3://bucket/run", "need a folder of this machine"),
        ({"sinks": ["tensorboard"], "sink_folder": "s3://bucket/x"}, "runs/first", "must be a folder"),
        ({"sinks": ["tensorboard"], "sink_folder": "local"}, "s3://bucket/run", None),
        ({"sinks": ["wandb"]}, "s3://bucket/run", None),
    ],
)
def test_sinks_need_a_folder_of_this_machine(given, directory, says):
    if says is None:
        refuse_missing(TelemetrySection(**given), directory)
        return
    with pytest.raises(ConfigError, match=says):
        refuse_missing(TelemetrySection(**given), directory)
