"""Runs that leave samples out: excluded, filtered, redacted; counted and listed, and outside the budgets."""

import json
import shutil

import pytest
import webdataset
from conftest import encode_image
from runs import arguments, free_port, newest, run, scrape_text, start, values_of

from shards import cli
from streamswav.errors import EXIT_CONFIG, EXIT_DONE
from streamswav.stream.position import Position

SHARDS, EACH = 4, 30
SAMPLES = SHARDS * EACH


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Samples with a sidecar: a width of 100 for those of even number, 500 else; every tenth has none."""
    folder = tmp_path_factory.mktemp("selected")
    for shard in range(SHARDS):
        with (folder / f"part-{shard}.tar").open("wb") as file, webdataset.TarWriter(file, mtime=0) as writer:
            for number in range(EACH):
                sample = {"__key__": f"s{shard}_{number}", "jpg": encode_image(number)}
                if number % 10:
                    sample["json"] = {"width": 500 if number % 2 else 100}
                writer.write(sample)
    stats = {"shards": {f"part-{shard}.tar": {"samples": EACH} for shard in range(SHARDS)}}
    (folder / "_stats.json").write_text(json.dumps(stats))
    return folder


def command(shards, directory, **stream):
    return arguments(
        run={"directory": directory},
        stream={"urls": shards, "window": 8, **stream},
        checkpoint={"images": 32},
    )


def listed(directory, outcome):
    files = (directory / outcome).glob("*.jsonl")
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_excluded_and_filtered_samples_are_counted_listed_and_not_trained(shards, tmp_path):
    (tmp_path / "keys.txt").write_text("# opt-outs\n" + "".join(f"s0_{n}\n" for n in range(1, 30, 2)))
    given = command(shards, tmp_path / "run", exclude=tmp_path / "keys.txt", where="json.width >= 256")
    outcome = run(given, tmp_path)
    assert outcome.code == EXIT_DONE, outcome.err
    stream = json.loads(outcome.out)["stream"]
    wide = SHARDS * EACH // 2
    assert stream["excluded"] == 15
    assert stream["filtered"] == SAMPLES - wide
    assert stream["trained"] + stream["left"] == wide - 15
    assert stream["missing"] == 0
    assert stream["left"] < 16
    left = [json.loads(line) for line in (tmp_path / "run" / "left.jsonl").read_text().splitlines()]
    assert len({each["key"] for each in left}) == stream["left"] > 0
    excluded, filtered = (listed(tmp_path / "run", name) for name in ("excluded", "filtered"))
    assert {each["key"] for each in excluded} == {f"s0_{n}" for n in range(1, 30, 2)}
    assert len(filtered) == len({(each["shard"], each["ordinal"]) for each in filtered}) == SAMPLES - wide
    assert {each["reason"] for each in filtered} == {"json.width >= 256", "missing json.width"}
    position = Position.from_json(json.loads((newest(tmp_path / "run") / "position.json").read_text()))
    assert position.total("filtered").samples == SAMPLES - wide
    assert position.total("quarantined").samples == 0
    (told,) = outcome.of("selection")
    assert told["message"] == "15 keys are excluded, 1 conditions hold"


def test_the_lists_may_be_edited_between_restarts(shards, tmp_path):
    keys = tmp_path / "keys.txt"
    keys.write_text("s0_1\n")
    given = command(shards, tmp_path / "run", exclude=keys)
    assert run([*given, "--training.images", "32"], tmp_path / "first").code == EXIT_DONE
    keys.write_text("".join(f"s{shard}_{number}\n" for shard in range(SHARDS) for number in range(EACH)))
    outcome = run(given, tmp_path / "second")
    assert outcome.code == EXIT_DONE, outcome.err
    stream = json.loads(outcome.out)["stream"]
    assert stream["trained"] == 32
    assert stream["excluded"] == SAMPLES - 32


def test_a_list_that_no_checkpoint_followed_is_written_anew(shards, tmp_path):
    """As after a kill between the two writes of a save."""
    keys = tmp_path / "keys.txt"
    keys.write_text(
        "".join(f"s{shard}_{number}\n" for shard in range(SHARDS) for number in range(0, EACH, 3))
    )
    given = command(shards, tmp_path / "run", exclude=keys)
    assert run([*given, "--training.images", "32"], tmp_path / "first").code == EXIT_DONE
    stale = {"shard": "part-0.tar", "turn": 0, "reason": "list", "start": 0, "stop": 512, "key": "s0_0"}
    lists = tmp_path / "run" / "excluded"
    (lists / "step-000000003.jsonl").write_text(json.dumps({**stale, "ordinal": 0, "outcome": "excluded"}))
    keys.write_text("")
    assert run(given, tmp_path / "second").code == EXIT_DONE
    assert "step-000000003.jsonl" not in {path.name for path in lists.iterdir()}
    outcome = run_audit(tmp_path / "run", tmp_path / "audit")
    assert outcome.code == EXIT_DONE, outcome.out


def run_audit(directory, folder):
    return run(["audit", str(directory), "--recount"], folder)


def test_redacted_samples_are_passed_over_as_excluded(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "shards")
    assert cli.main(["redact", str(tmp_path / "shards"), "--key", "s1_7", "--key", "s3_0"]) == 0
    outcome = run(command(tmp_path / "shards", tmp_path / "run"), tmp_path / "out")
    assert outcome.code == EXIT_DONE, outcome.err
    stream = json.loads(outcome.out)["stream"]
    assert (stream["excluded"], stream["quarantined"], stream["damages"]) == (2, 0, 0)
    assert {each["reason"] for each in listed(tmp_path / "run", "excluded")} == {"redacted"}


def test_a_condition_that_nothing_meets_ends_the_run_with_the_reason(shards, tmp_path):
    outcome = run(command(shards, tmp_path / "run", where="json.widht >= 256"), tmp_path)
    assert outcome.code == EXIT_CONFIG
    assert f"0 usable samples, {SAMPLES} more were excluded or filtered" in outcome.said[-1]


def test_a_function_of_the_user_decides_and_its_mistakes_are_one_line(shards, tmp_path):
    (tmp_path / "rules.py").write_text(
        "def odd(sample):\n    return int(sample.key.split('_')[1]) % 2\n"
        "def broken(sample):\n    return sample.nothing\n"
    )
    environment = {"PYTHONPATH": str(tmp_path)}
    given = command(shards, tmp_path / "run", where="rules:odd")
    outcome = run(given, tmp_path / "good", script=True, environment=environment)
    assert outcome.code == EXIT_DONE, outcome.err
    assert json.loads(outcome.out)["stream"]["filtered"] == SAMPLES // 2
    given = command(shards, tmp_path / "other", where="rules:broken")
    outcome = run(given, tmp_path / "bad", script=True, environment=environment)
    assert outcome.code == EXIT_CONFIG
    (line,) = outcome.said
    assert "rules:broken" in line
    assert "AttributeError" in line


def test_each_url_has_its_passes_and_its_own_account(make_shards, tmp_path):
    make_shards(tmp_path / "a", counts=[20, 24])
    make_shards(tmp_path / "b", counts=[13])
    urls = [str(tmp_path / "a"), str(tmp_path / "b")]
    given = arguments(run={"directory": tmp_path / "run"}, stream={"urls": urls, "passes": [1, 3]})
    outcome = run(given, tmp_path)
    assert outcome.code == EXIT_DONE, outcome.err
    stream = json.loads(outcome.out)["stream"]
    by_source = {url: stream["sources"][url]["trained"] for url in urls}
    assert sum(by_source.values()) == stream["trained"]
    assert stream["trained"] + stream["left"] == 44 + 3 * 13
    assert by_source[urls[0]] > 44 - 16
    assert by_source[urls[1]] > 3 * 13 - 16
    assert stream["passes"] == [1, 3]
    audited = run_audit(tmp_path / "run", tmp_path / "audit")
    assert audited.code == EXIT_DONE, audited.out


def test_metrics_tell_what_was_left_out(shards, tmp_path):
    port = free_port()
    given = command(shards, tmp_path / "run", where="json.width >= 256", follow="true", follow_seconds=0.1)
    with start([*given, "--telemetry.port", str(port)], tmp_path / "out") as running:
        running.wait_until(lambda _: 'run_state{state="waiting"} 1.0' in scrape_text(port))
        metrics = values_of(scrape_text(port))
    assert metrics['streamswav_samples_total{outcome="filtered"}'] == SAMPLES // 2
    assert metrics['streamswav_samples_total{outcome="excluded"}'] == 0
