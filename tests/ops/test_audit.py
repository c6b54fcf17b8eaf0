"""`streamswav audit`: real runs balance to the byte, however they ended; what is doctored is named."""

import hashlib
import json
import os
import shutil
import signal
import tarfile
from collections import defaultdict

import pytest
from conftest import encode_image
from runs import Outcome, arguments, newest, run, start

from shards.cli import main as shards_main
from streamswav import cli
from streamswav.errors import EXIT_CONFIG, EXIT_DONE, EXIT_FAILED

JPEG = encode_image(0, (40, 32))
NO_IMAGE, EXCLUDED = "0_5", ["0_3", "2_9"]


def make_damaged(make_shards, folder):
    """Four shards of 20: an odd image, a cut within sample 13, a bad header at sample 7, a whole one."""
    paths = make_shards(
        folder, counts=[20] * 4, labels=False, image=lambda number: b"junk" * 99 if number == 5 else JPEG
    )
    with tarfile.open(paths[1]) as archive:
        cut = archive.getmember("1_13.jpg").offset_data + 100
    with paths[1].open("r+b") as file:
        file.truncate(cut)
    with tarfile.open(paths[2]) as archive:
        header = archive.getmember("2_7.jpg").offset
    with paths[2].open("r+b") as file:
        file.seek(header + 148)
        file.write(b"777777")


def command(shards, directory, exclude, **sections):
    stream = {"urls": shards, "passes": 2, "skip_ratio": 0.5, "exclude": f'["{exclude}"]'}
    return arguments(
        run={"directory": directory},
        **{
            "stream": stream | sections.pop("stream", {}),
            "training": {"batch": 8},
            "checkpoint": {"images": 8, "keep": 99} | sections.pop("checkpoint", {}),
            **sections,
        },
    )


@pytest.fixture(scope="module")
def finished(make_shards, tmp_path_factory):
    """Shards with damages, and a run over them that is at its end: their folder, with `data` and `run`."""
    folder = tmp_path_factory.mktemp("finished")
    make_damaged(make_shards, folder / "data")
    (folder / "exclude").write_text("\n".join(EXCLUDED))
    outcome = run(command(folder / "data", folder / "run", folder / "exclude"), folder)
    assert outcome.code == EXIT_DONE, outcome.err
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of all that, which may be doctored."""
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    place = folder / "run" / "manifest.json"
    place.write_text(place.read_text().replace(str(finished), str(folder)))
    return folder


@pytest.fixture
def audit(capsys):
    """Call `streamswav audit` in this process: exit code, what it printed, and its last word."""

    def call(*given, workers=1):
        given = [str(each) for each in given]
        code = cli.main(["audit", *given, *(["--workers", str(workers)] if workers else [])])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def report(audit, *given, code=EXIT_DONE):
    """The JSON of an audit, checks by name."""
    found, out, err = audit(*given, "--json")
    assert found == code, out + err
    values = json.loads(out)
    assert values["balanced"] == (code == EXIT_DONE)
    return values | {"checks": {check["name"]: check for check in values["checks"]}}


def failed(values):
    return {name for name, check in values["checks"].items() if check["verdict"] == "failed"}


def row(values, outcome, source=""):
    (found,) = (each for each in values["rows"] if (each["outcome"], each["source"]) == (outcome, source))
    return found


def test_a_finished_run_balances_by_its_books(finished, audit):
    code, out, err = audit(finished / "run")
    assert (code, err) == (EXIT_DONE, "")
    assert "FAILED" not in out
    assert out.rstrip().endswith("--recount counts the shards as well.")
    values = report(audit, finished / "run")
    assert (row(values, "excluded")["samples"], row(values, "quarantined")["samples"]) == (4, 2)
    left = (finished / "run" / "left.jsonl").read_text().splitlines()
    assert row(values, "left")["samples"] == len(left)
    assert values["reasons"] == {"list": 4, "not_an_image": 2}


def test_the_lists_of_a_streams_end_stay_beside_those_of_its_last_step(make_shards, audit, tmp_path):
    make_shards(tmp_path / "data", counts=[20] * 4)
    (tmp_path / "exclude").write_text("".join(f"{shard}_{n}\n" for shard in range(4) for n in range(15)))
    sections = {"stream": {"passes": 1}, "checkpoint": {"images": 16}}  # after the last step, and at the end
    made = command(tmp_path / "data", tmp_path / "run", tmp_path / "exclude", **sections)
    assert run(made, tmp_path).code == EXIT_DONE
    names = {path.name for path in (tmp_path / "run" / "excluded").iterdir()}
    assert {"step-000000002.jsonl", "step-000000002.2.jsonl"} <= names
    values = report(audit, tmp_path / "run")
    assert row(values, "excluded")["samples"] == 60


def test_a_recount_gives_every_byte_of_every_pass_one_outcome(finished, audit, tmp_path):
    values = report(audit, finished / "run", "--recount", "--ranges", tmp_path / "ranges")
    assert row(values, "trained + left")["samples"] == 2 * (20 + 13 + 19 + 20) - 6
    parts, by_outcome = defaultdict(list), defaultdict(int)
    for line in (tmp_path / "ranges").read_text().splitlines():
        each = json.loads(line)
        parts[each["shard"], each["turn"]].append(each)
        by_outcome[each["outcome"]] += each["stop"] - each["start"]
    sizes = {path.name: path.stat().st_size for path in (finished / "data").iterdir()}
    assert {*parts} == {(name, turn) for name in sizes for turn in (0, 1)}
    for (name, _), ranges in parts.items():
        assert [0, *(each["stop"] for each in ranges)] == [*(each["start"] for each in ranges), sizes[name]]
    names = ("trained", "left", "excluded", "quarantined", "damaged")
    assert by_outcome == {
        **{name: row(values, name)["bytes"] for name in names},
        "archive_end": row(values, "archive ends")["bytes"],
    }
    junk = next(each for each in parts["shard-000000.tar", 1] if each["outcome"] == "quarantined")
    assert junk["reason"] == "not_an_image"


def test_every_checkpoint_that_was_kept_balances(finished, audit):
    names = sorted(path.name for path in (finished / "run" / "checkpoints").glob("step-*"))
    log = (finished / "stderr").read_text()
    said = [f"step-{event['step']:09d}" for event in Outcome(0, "", log).of("checkpoint")]
    assert sorted(name.partition(".")[0] for name in names) == sorted(said)
    assert len(names) > 2  # of 17 steps those whose save found none under way
    for name in names[::3]:
        values = report(audit, finished / "run", "--checkpoint", name, "--recount")
        assert values["checkpoint"].endswith(name)
        if not values["finished"] and values["step"] < 16:
            assert row(values, "left")["samples"] > 8


def test_a_run_that_is_killed_balances_then_and_once_it_went_on_elsewhere(finished, audit, tmp_path):
    made = command(finished / "data", tmp_path / "run", finished / "exclude")
    with start(made, tmp_path / "first") as running:
        running.wait_until(lambda outcome: len(outcome.of("checkpoint")) >= 2)
        running.signal(signal.SIGKILL)
        running.wait()
    values = report(audit, tmp_path / "run", "--recount")
    assert not values["finished"]
    assert row(values, "left")["samples"] > 8
    assert report(audit, tmp_path / "run")["checks"]["known counts"]["verdict"] == "unknown"
    assert run([*made, "--loader.workers", "3"], tmp_path / "second").code == EXIT_DONE
    values = report(audit, tmp_path / "run", "--recount")
    undisturbed = report(audit, finished / "run", "--recount")
    assert row(values, "trained + left") == row(undisturbed, "trained + left")
    assert row(values, "excluded") == row(undisturbed, "excluded")


def test_a_run_on_s3_is_recounted_there_by_several_processes(s3, make_shards, audit, tmp_path):
    bucket, folder = s3.make_bucket()
    make_damaged(make_shards, folder / "data")
    (folder / "exclude").write_text("\n".join(EXCLUDED))
    place = {"endpoint_url": s3.endpoint}
    made = command(f"{bucket}/data/", f"{bucket}/run", f"{bucket}/exclude", storage=place)
    outcome = run(made, tmp_path)
    assert outcome.code == EXIT_DONE, outcome.err
    given = (f"{bucket}/run", "--recount", "--storage.endpoint_url", s3.endpoint)
    code, out, err = audit(*given, "--ranges", f"{bucket}/ranges.jsonl", workers=2)
    assert (code, err) == (EXIT_DONE, ""), out
    assert "4 shards gone through" in out
    assert len((folder / "ranges.jsonl").read_text().splitlines()) > 16


def resign(folder, **about):
    """Make a checkpoint whole again whose position was doctored."""
    place = folder / "checkpoint.json"
    listing = json.loads(place.read_text()) | about
    data = (folder / "position.json").read_bytes()
    listing["files"]["position.json"] = [len(data), hashlib.sha256(data).hexdigest()]
    place.write_text(json.dumps(listing))


def doctor(folder, change, **about):
    place = newest(folder / "run") / "position.json"
    position = json.loads(place.read_text())
    change(position)
    place.write_text(json.dumps(position))
    resign(place.parent, **about)


def one_less(position):
    position["tallies"]["trained"][0][0] -= 1


def flip_a_bit(position, outcome="trained"):
    tally = position["tallies"][outcome][0]
    tally[2] = f"{int(tally[2], 16) ^ 1:016x}"


def test_one_sample_less_that_the_checkpoint_does_not_know_of_is_found_by_the_books(copy, audit):
    doctor(copy, one_less)
    values = report(audit, copy / "run", code=EXIT_FAILED)
    assert failed(values) == {"images of the checkpoint"}


@pytest.mark.parametrize("change", [one_less, flip_a_bit])
def test_a_position_that_is_wrong_by_one_is_found_by_the_recount(copy, audit, change):
    images = json.loads((newest(copy / "run") / "checkpoint.json").read_text())["images"]
    doctor(copy, change, images=images - (change is one_less))
    assert report(audit, copy / "run")["balanced"]
    code, out, err = audit(copy / "run", "--recount")
    assert code == EXIT_FAILED
    (line,) = [line for line in out.splitlines() if line.startswith("FAILED")]
    assert "trained, recounted: the position has" in line
    assert "does not balance: trained, recounted" in err
    assert err.count("\n") == 1


def list_with(folder, key):
    """The side list that names this key."""
    (found,) = (
        path
        for path in (folder / "run").glob("*ed/*.jsonl")
        if any(
            (json.loads(line)["key"], json.loads(line)["turn"]) == (key, 0)
            for line in path.read_text().splitlines()
        )
    )
    return found


@pytest.mark.parametrize(("key", "outcome"), [(NO_IMAGE, "quarantined"), (EXCLUDED[0], "excluded")])
def test_a_line_that_is_gone_from_a_list_is_found_by_the_books(copy, audit, key, outcome):
    path = list_with(copy, key)
    path.write_text("".join(line for line in path.read_text().splitlines(True) if f'"{key}"' not in line))
    values = report(audit, copy / "run", code=EXIT_FAILED)
    assert failed(values) == {outcome, "reasons"}
    assert "the lists have" in values["checks"][outcome]["detail"]
    values = report(audit, copy / "run", "--recount", code=EXIT_FAILED)
    assert failed(values) == {outcome, "reasons", "trained, recounted"}


def test_a_line_that_was_changed_is_found_by_its_digest_and_by_its_bytes(copy, audit):
    path = list_with(copy, NO_IMAGE)
    entry = next(each for each in map(json.loads, path.read_text().splitlines()) if each["key"] == NO_IMAGE)
    changed = json.dumps(entry | {"start": entry["start"] + 512, "stop": entry["stop"] + 512})
    path.write_text(path.read_text().replace(json.dumps(entry), changed))
    assert failed(report(audit, copy / "run", code=EXIT_FAILED)) == {"quarantined"}
    values = report(audit, copy / "run", "--recount", code=EXIT_FAILED)
    assert failed(values) == {"quarantined", "ranges"}
    assert "shard-000000.tar, pass 1: sample 5 is listed at bytes" in values["checks"]["ranges"]["detail"]


def test_a_list_that_is_gone_and_a_line_that_is_torn_are_found(copy, audit):
    path = list_with(copy, EXCLUDED[1])
    text = path.read_text()
    path.write_text(text + text[:20])
    values = report(audit, copy / "run", code=EXIT_FAILED)
    assert failed(values) == {"side lists"}
    assert f"excluded/{path.name}, line" in values["checks"]["side lists"]["detail"]
    path.unlink()
    assert failed(report(audit, copy / "run", code=EXIT_FAILED)) == {"excluded", "reasons"}


def test_a_damage_that_is_not_listed_is_found(copy, audit):
    for path in (copy / "run" / "quarantined").iterdir():
        lines = path.read_text().splitlines(True)
        path.write_text("".join(line for line in lines if '"bad_header"' not in line))
    values = report(audit, copy / "run", code=EXIT_FAILED)
    assert failed(values) == {"damages"}
    assert "shard-000002.tar[" in values["checks"]["damages"]["detail"]


def test_a_shard_that_was_changed_or_removed_afterwards_is_named(copy, audit):
    assert report(audit, copy / "run", "--recount")["balanced"]
    changed, gone = copy / "data" / "shard-000000.tar", copy / "data" / "shard-000003.tar"
    changed.write_bytes(changed.read_bytes())
    gone.unlink()
    assert report(audit, copy / "run")["balanced"]
    values = report(audit, copy / "run", "--recount", code=EXIT_FAILED)
    assert failed(values) == {"shards"}
    detail = values["checks"]["shards"]["detail"]
    assert "shard-000000.tar was changed; shard-000003.tar is gone; " in detail


def test_other_bytes_under_the_same_name_and_version_are_found(copy, audit):
    path = copy / "data" / "shard-000003.tar"
    with tarfile.open(path) as archive:
        header = archive.getmember("3_4.jpg").offset
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(header + 148)
        file.write(b"777777")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    values = report(audit, copy / "run", "--recount", code=EXIT_FAILED)
    assert failed(values) == {"ranges", "trained, recounted"}
    assert "shard-000003.tar, pass 1: bytes" in values["checks"]["ranges"]["detail"]


def test_shards_that_have_moved_are_recounted_where_they_are(copy, audit, tmp_path):
    (copy / "data").rename(tmp_path / "moved")
    assert failed(report(audit, copy / "run", "--recount", code=EXIT_FAILED)) == {"shards"}
    assert report(audit, copy / "run", "--recount", "--stream.urls", tmp_path / "moved")["balanced"]


def test_redacted_samples_keep_the_outcome_they_had(copy, audit, capsys):
    given = ["redact", str(copy / "data" / "shard-000003.tar"), "--key", "3_8", "--key", "3_9"]
    assert shards_main(given) == EXIT_DONE
    capsys.readouterr()
    assert report(audit, copy / "run", "--recount")["balanced"]
    code, out, _ = audit(copy / "run", "--contains", "shard-000003.tar:3_8")
    assert code == EXIT_DONE
    assert out.startswith("3_8 in shard-000003.tar (sample 8, bytes ")
    last = out.splitlines()[-1]
    assert "pass 1: trained" in last or "pass 1: left" in last


def test_a_shard_that_the_run_lost_is_a_row_of_its_own(make_shards, audit, tmp_path):
    make_shards(tmp_path / "data", counts=[20] * 4)
    made = command(
        tmp_path / "data",
        tmp_path / "run",
        tmp_path / "exclude",
        stream={"passes": 1, "shard_ratio": 0.5, "columns": 1, "rows": 1},
    )
    (tmp_path / "exclude").write_text("none")
    assert run([*made, "--training.images", "24"], tmp_path / "first").code == EXIT_DONE
    # The second shard that the only lane reads: it was begun.
    position = json.loads((newest(tmp_path / "run") / "position.json").read_text())
    assert next(iter(position["cursors"].values()))[0] == 1
    values = report(audit, tmp_path / "run", "--recount", "--ranges", tmp_path / "ranges")
    begun = [json.loads(line) for line in (tmp_path / "ranges").read_text().splitlines()]
    (key,) = {each["shard"] for each in begun if each["outcome"] == "trained"} & {
        each["shard"] for each in begun if each["outcome"] == "left"
    }
    assert values["balanced"]
    (tmp_path / "data" / key).unlink()
    assert run(made, tmp_path / "second").code == EXIT_DONE
    values = report(audit, tmp_path / "run", "--recount")
    assert values["not_recounted"] == [f"{key} in pass 1 (missing_shard)"]
    assert row(values, "trained, of lost shards")["samples"] == 4
    assert row(values, "lost with their shards")["bytes"] > 0
    code, out, _ = audit(tmp_path / "run", "--recount")
    assert code == EXIT_DONE
    assert f"not recounted, since the run lost it: {key} in pass 1 (missing_shard)" in out


def test_sources_are_accounted_for_one_by_one(make_shards, audit, tmp_path):
    for name, counts in (("a", [11, 12]), ("b", [20, 9])):
        paths = make_shards(tmp_path / name, counts=counts)
        stats = {path.name: {"samples": count} for path, count in zip(paths, counts, strict=True)}
        (tmp_path / name / "_stats.json").write_text(json.dumps({"shards": stats}))
    (tmp_path / "exclude").write_text("0_3")
    urls = [str(tmp_path / name) for name in "ab"]
    made = command(json.dumps(urls), tmp_path / "run", tmp_path / "exclude", stream={"passes": "[1, 3]"})
    outcome = run(made, tmp_path)
    assert outcome.code == EXIT_DONE, outcome.err
    values = report(audit, tmp_path / "run", "--recount")
    assert values["checks"]["known counts"]["detail"] == "110 samples met, 110 known from _stats.json"
    for source, excluded in zip(urls, (1, 3), strict=True):
        assert row(values, "excluded", source)["samples"] == excluded
        assert values["checks"][f"trained, recounted of {source}"]["verdict"] == "ok"
    manifest = tmp_path / "run" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"counts": [23, 29]', '"counts": [23, 28]'))
    values = report(audit, tmp_path / "run", code=EXIT_FAILED)
    assert failed(values) == {"known counts"}
    assert "no damage explains the difference of -3" in values["checks"]["known counts"]["detail"]


def test_what_is_left_is_listed_by_shard_and_key(finished, audit):
    code, out, _ = audit(finished / "run", "--left")
    entries = list(map(json.loads, (finished / "run" / "left.jsonl").read_text().splitlines()))
    assert code == EXIT_DONE
    assert 0 < len(entries) < 8
    assert out.splitlines() == [f"{each['shard']}:{each['key']}" for each in entries]
    code, out, _ = audit(finished / "run", "--left", "--json")
    assert list(map(json.loads, out.splitlines())) == entries


def test_a_list_of_the_left_over_that_says_otherwise_is_found(copy, audit):
    path = copy / "run" / "left.jsonl"
    path.write_text("".join(path.read_text().splitlines(True)[1:]))
    assert failed(report(audit, copy / "run", code=EXIT_FAILED)) == {"left.jsonl"}


def test_each_checkpoint_tells_whether_it_has_seen_a_sample(finished, audit):
    code, out, _ = audit(finished / "run", "--contains", NO_IMAGE, "--json")
    assert code == EXIT_DONE
    (sample,) = json.loads(out)["samples"]
    assert (sample["shard"], sample["ordinal"]) == ("shard-000000.tar", 5)
    seen = [[each["outcome"] for each in kept["passes"]] for kept in sample["checkpoints"]]
    bad = "quarantined (not_an_image)"
    assert seen[0] != seen[-1] == [bad, bad]
    assert {tuple(each) for each in seen} <= {("not yet", "not yet"), (bad, "not yet"), (bad, bad)}
    assert [each[0] for each in seen] == sorted(each[0] for each in seen)
    code, out, _ = audit(finished / "run", "--contains", "shard-000003.tar:3_1")
    assert code == EXIT_DONE
    assert out.splitlines()[-1].split("pass 1: ")[1].startswith(("trained", "left"))


@pytest.mark.parametrize("key", ["9_9", "shard-000003.tar:0_5"])
def test_a_key_that_is_in_no_shard_is_said_so(finished, audit, key):
    code, out, err = audit(finished / "run", "--contains", key)
    assert (code, out) == (EXIT_FAILED, "")
    name, shards = ("9_9", 4) if key == "9_9" else ("0_5", 1)
    assert err == f"streamswav: {name}: in none of {shards} shards\n"


@pytest.mark.parametrize("given", [[], ["--recount"], ["--left"], ["--contains", "x"]])
def test_a_folder_that_is_no_run_is_refused_in_one_line(audit, tmp_path, given):
    code, out, err = audit(tmp_path / "nothing", *given)
    assert (code, out, err.count("\n")) == (EXIT_CONFIG, "", 1)
    assert "there is no checkpoint" in err


def test_a_run_that_has_saved_nothing_yet_is_told_from_no_run(copy, audit):
    shutil.rmtree(copy / "run" / "checkpoints")
    code, out, err = audit(copy / "run")
    assert (code, out) == (EXIT_CONFIG, "")
    assert err.endswith("the run has saved no checkpoint yet, there is nothing to audit\n")


def test_ranges_are_only_known_to_a_recount(finished, audit, tmp_path):
    code, _, err = audit(finished / "run", "--ranges", tmp_path / "ranges")
    assert (code, "--recount" in err) == (EXIT_CONFIG, True)
