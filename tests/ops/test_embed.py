"""`streamswav embed`: every image once, the same files however often it is ended, its account balances."""

import builtins
import json
import re
import shlex
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import encode_image
from gate import CONDITION, at_gate, closed_at
from runs import run, start, start_ranks
from shard_parts import END, JPEG, Shards, damage, sample, samples
from tiny_run import PROTOTYPES, save_tiny_run
from torch.nn import functional as F

from streamswav import cli
from streamswav.config import StorageSection
from streamswav.crops import centre_crop, normalise
from streamswav.errors import EXIT_CONFIG, EXIT_DONE, EXIT_RETRY, ConfigError, DataError
from streamswav.transfer.embedding.embeddings import read_embeddings, read_parts
from streamswav.transfer.weights.trunks import open_network

COUNTS = [13, 2, 30]
SIZE = (20, 18)
EVERYTHING = "features,embeddings,scores,clusters,codes"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_tiny_run(str(folder / "run"))
    return folder / "run"


@pytest.fixture(scope="module")
def data(make_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_shards(folder, counts=COUNTS, image=SIZE, kind="PNG")
    return folder


def command(model, data, to, *more, what="features", workers=0):
    given = ["--checkpoint", str(model), "--to", str(to), "--what", what, "--workers", str(workers)]
    tiny = ["--part", "4", "--batch", "3", "--training.threads", "1"]
    return ["embed", *given, *tiny, *map(str, more), str(data)]


def content(folder):
    """The files of a folder, but for those that a kill left half written."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith(".partial")}


@pytest.fixture(scope="module")
def whole(model, data, tmp_path_factory):
    """What comes of an embedding that nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert cli.main(command(model, data, folder, "--stream.where", CONDITION)) == EXIT_DONE
    return folder


# What is written.


@pytest.fixture(scope="module")
def expected(model):
    """What the network says of the images, one by one."""
    network, info = open_network(str(model))
    crops, outputs = info.config.crops, {}
    for number in range(sum(COUNTS)):
        pixels = centre_crop(encode_image(number, SIZE, "PNG"), resize=16, crop=16, max_pixels=10**6)
        images = normalise(torch.from_numpy(pixels)[None], mean=crops.mean, std=crops.std)
        with torch.no_grad():
            features = network.trunk(images)
            embeddings = F.normalize(network.projection_head(features), dim=1)
            scores = embeddings @ F.normalize(network.prototypes.weight, dim=1).T
        codes, clusters = (scores / info.config.swav.temperature).softmax(dim=1).topk(3)
        of_one = {"features": features, "embeddings": embeddings, "scores": scores, "codes": codes}
        of_one |= {"clusters": scores.argmax(dim=1), "code_clusters": clusters}
        for name, value in of_one.items():
            outputs.setdefault(name, []).append(value[0].numpy())
    return {name: np.stack(values) for name, values in outputs.items()}


@pytest.mark.parametrize("layout", ["npy", "parquet"])
def test_what_is_written_is_what_the_network_says(model, data, tmp_path, expected, layout):
    out = tmp_path / "out"
    given = command(model, data, out, "--layout", layout, "--top", 3, what=EVERYTHING)
    assert cli.main(given) == EXIT_DONE
    parts = list(read_parts(str(out)))
    keys = [(part.shard, key) for part in parts for key in part.keys]
    places = [(shard, number) for shard, count in enumerate(COUNTS) for number in range(count)]
    assert keys == [(f"shard-{shard:06d}.tar", f"{shard}_{number}") for shard, number in places]
    assert [ordinal for part in parts for ordinal in part.ordinals] == [number for _, number in places]
    assert [label for part in parts for label in part.labels] == [n % 10 for n in range(sum(COUNTS))]
    for name, values in expected.items():
        array, names = read_embeddings(str(out), name)
        assert names == [key for _, key in keys]
        if values.dtype == np.int64:
            assert array.dtype == np.int32
            assert (array == values).all()
        else:
            assert array.dtype == np.float32
            np.testing.assert_allclose(array, values, rtol=1e-4, atol=1e-5)
    embeddings, _ = read_embeddings(str(out), "embeddings")
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("layout", ["npy", "parquet"])
def test_half_precision_is_the_same_rounded(model, data, tmp_path, layout):
    for name, more in (("full", []), ("half", ["--float16"])):
        given = command(model, data, tmp_path / name, "--layout", layout, *more, what="embeddings,clusters")
        assert cli.main(given) == EXIT_DONE
    full, half = (read_embeddings(str(tmp_path / name))[0] for name in ("full", "half"))
    assert half.dtype == np.float16
    assert (half == full.astype(np.float16)).all()


def test_other_tools_read_the_tables(model, data, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    assert cli.main(command(model, data, tmp_path / "p", "--layout", "parquet")) == EXIT_DONE
    table = parquet.read_table(sorted((tmp_path / "p").glob("*.parquet")))
    assert table.column_names == ["key", "shard", "ordinal", "label", "features"]
    assert table.num_rows == sum(COUNTS)
    assert cli.main(command(model, data, tmp_path / "n")) == EXIT_DONE
    rows = [
        json.loads(line)
        for path in sorted((tmp_path / "n").glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    arrays = np.concatenate([np.load(path) for path in sorted((tmp_path / "n").glob("*.features.npy"))])
    assert [row["key"] for row in rows] == table["key"].to_pylist()
    assert (np.array(table["features"].to_pylist(), np.float32) == arrays).all()


def test_images_without_labels_are_embedded_all_the_same(model, make_shards, tmp_path):
    make_shards(tmp_path / "data", counts=[5], labels=False)
    for layout in ("npy", "parquet"):
        out = tmp_path / layout
        assert cli.main(command(model, tmp_path / "data", out, "--layout", layout)) == EXIT_DONE
        assert [part.labels for part in read_parts(str(out))] == [(None,) * 4, (None,)]


def test_labels_of_a_table_are_written(model, data, tmp_path):
    (tmp_path / "labels.csv").write_text("key,label\n0_0,5;7\n2_29,3\n")
    table = ["--labels.file", tmp_path / "labels.csv", "--labels.separator", ";"]
    for layout in ("npy", "parquet"):
        out = tmp_path / layout
        assert cli.main(command(model, data, out, "--layout", layout, *table)) == EXIT_DONE
        found = [pair for part in read_parts(str(out)) for pair in zip(part.keys, part.labels, strict=True)]
        labels = {key: label for key, label in found if label is not None}
        assert labels == {"0_0": (5, 7), "2_29": (3,)}


# Every sample once.


def test_every_sample_of_broken_shards_has_one_outcome(model, tmp_path, capfd):
    shards = Shards(tmp_path / "shards")
    shards.write("a.tar", [*samples(*range(9), prefix="a"), END])
    torn = sample("b/001", "truncated", jpg=JPEG[:300], cls=b"1")
    blind = sample("b/003", "no_image", txt=b"nothing")
    gap = damage("bad_header", b"\x55" * 512)
    shards.write("b.tar", [sample("b/000"), torn, sample("b/002"), blind, gap, *samples(4, 5, 6, 7, 8), END])
    shards.write("c.tar", [*samples(0, 1, prefix="c"), damage("no_end_of_archive")])
    (tmp_path / "keys.txt").write_text("a/004\nc/001\n")
    out = tmp_path / "out"
    more = ["--stream.exclude", tmp_path / "keys.txt", "--stream.where", "bytes >= 1"]
    assert cli.main(command(model, shards.folder, out, *more)) == EXIT_DONE
    summary = json.loads(capfd.readouterr().out)

    embedded = [(part.shard, ordinal) for part in read_parts(str(out)) for ordinal in part.ordinals]
    assert len(embedded) == len(set(embedded))
    wanted, bad, ordinals = [], [], 0
    for name in sorted(shards.parts):
        number = 0
        for part, begin, end in shards.places(name):
            if part.reason:
                ordinal = number if part.key else None
                entry = {"shard": name, "reason": part.reason, "start": begin, "stop": end}
                bad.append({**entry, "key": part.key, "ordinal": ordinal})
            elif part.key and part.key not in ("a/004", "c/001"):
                wanted.append((name, number))
            number += bool(part.key)
        ordinals += number
    assert embedded == wanted
    listed = [json.loads(line) for line in (out / "quarantined.jsonl").read_text().splitlines()]
    assert listed == bad
    assert summary["samples"] == ordinals
    assert summary["images"] == len(wanted)
    assert summary["quarantined"] == {"no_image": 1, "truncated": 1}
    assert summary["excluded"] == {"list": 2}
    assert summary["damages"] == {"bad_header": 1, "no_end_of_archive": 1}
    assert json.loads((out / "embed.json").read_text())["totals"]["images"] == len(wanted)


def test_what_meets_no_condition_is_counted(model, data, tmp_path, capfd):
    given = command(model, data, tmp_path / "out", "--stream.where", "label < 4")
    assert cli.main(given) == EXIT_DONE
    summary = json.loads(capfd.readouterr().out)
    assert summary["images"] + sum(summary["filtered"].values()) == sum(COUNTS)
    assert {label for part in read_parts(str(tmp_path / "out")) for label in part.labels} == {0, 1, 2, 3}


def test_a_spent_budget_ends_it_with_evidence_and_a_larger_one_goes_on(model, tmp_path, capfd):
    shards = Shards(tmp_path / "shards")
    blind = [sample(f"a/{number:03d}", "no_image", txt=b"nothing") for number in range(3)]
    shards.write("a.tar", [*blind, *samples(*range(3, 9), prefix="a"), END])
    given = command(model, shards.folder, tmp_path / "out", "--stream.skip_probation", "4")
    assert cli.main([*given, "--stream.skip_ratio", "0.1"]) == EXIT_CONFIG
    said = capfd.readouterr().err
    found = re.search(
        r"streamswav: 3 of \d samples could not be used, more than stream.skip_ratio = 0.1", said
    )
    assert found
    assert re.search(r"a\.tar\[\d+:\d+\] a/002: no_image", said)
    assert cli.main([*given, "--stream.skip_ratio", "0.9"]) == EXIT_DONE
    assert json.loads(capfd.readouterr().out)["images"] == 6


def test_shards_without_one_image_are_refused(model, tmp_path, capfd):
    shards = Shards(tmp_path / "shards")
    shards.write("a.tar", [sample("a/000", "no_image", txt=b"nothing"), END])
    assert cli.main(command(model, shards.folder, tmp_path / "out")) == EXIT_CONFIG
    assert "not one image could be embedded: 0 embedded + 1 quarantined" in capfd.readouterr().err


# Ended and begun again.


def test_ended_with_sigkill_twice_it_ends_with_the_same_bytes(model, data, whole, tmp_path):
    out, flag = tmp_path / "out", tmp_path / "flag"

    def records():
        return len(list(out.glob("part-*-*.json")))

    for key, least in (("0_11", 2), ("2_27", 5)):
        given = command(model, data, out, "--stream.where", CONDITION)
        with start(given, tmp_path / key, environment=closed_at(key, flag)) as running:
            at_gate(running, flag, and_then=lambda: records() >= least)  # noqa: B023 - called in this turn
            running.kill()
        flag.unlink()
    assert 5 <= records() < 13
    assert cli.main(command(model, data, out, "--stream.where", CONDITION)) == EXIT_DONE
    assert content(out) == content(whole)


def test_on_two_ranks_it_goes_on_and_ends_with_the_same_bytes(model, data, whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for file in out.glob("part-000002-0000[1-6].*"):
        file.unlink()
    given = command(model, data, out, "--stream.where", CONDITION, "--device", "cpu")
    with start_ranks(2, given, tmp_path / "ranks", launcher=[]) as running:
        ended = running.wait()
    assert ended.code == EXIT_DONE, ended.err
    summary = json.loads(ended.out)
    assert (summary["images"], summary["computed_now"]) == (sum(COUNTS), 24)
    assert content(out) == content(whole)


def test_a_signal_ends_it_with_75_and_the_same_command_goes_on(model, data, whole, tmp_path):
    out, flag = tmp_path / "out", tmp_path / "flag"
    given = command(model, data, out, "--stream.where", CONDITION)
    with start(given, tmp_path / "first", environment=closed_at("2_9", flag)) as running:
        at_gate(running, flag)
        running.signal(signal.SIGTERM)
        ended = running.wait()
    assert ended.code == EXIT_RETRY
    assert ended.said == ["streamswav: stopped by a signal: the same command goes on"]
    assert 0 < len(list(out.glob("part-*-*.json"))) < 13
    with pytest.raises(ConfigError, match="is not finished"):
        read_embeddings(str(out))
    assert run(given, tmp_path / "second").code == EXIT_DONE
    assert content(out) == content(whole)


@pytest.mark.all
def test_a_signal_to_the_launcher_drains_all_ranks(model, data, whole, tmp_path):
    out, flag = tmp_path / "out", tmp_path / "flag"
    given = command(model, data, out, "--stream.where", CONDITION, "--device", "cpu")
    environment = closed_at("2_9", flag)
    with start_ranks(2, given, tmp_path / "first", launcher=[], environment=environment) as running:
        at_gate(running, flag)
        running.signal(signal.SIGTERM)
        ended = running.wait()
        assert running.left_behind() == []
    assert ended.code == EXIT_RETRY, ended.err
    assert run(given, tmp_path / "second").code == EXIT_DONE
    assert content(out) == content(whole)


def test_a_second_time_nothing_is_computed_and_nothing_changes(model, data, tmp_path, capfd):
    given = command(model, data, tmp_path / "out", what=EVERYTHING, workers=1)
    assert cli.main(given) == EXIT_DONE
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    capfd.readouterr()
    assert cli.main(given) == EXIT_DONE
    summary = json.loads(capfd.readouterr().out)
    assert (summary["images"], summary["computed_now"]) == (sum(COUNTS), 0)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_in_a_bucket_a_damaged_part_is_found_and_written_again(model, data, tmp_path, s3, capfd):
    bucket, path = s3.make_bucket()
    shutil.copytree(data, path / "shards")
    given = command(model, f"{bucket}/shards", f"{bucket}/out", "--layout", "parquet")
    given += ["--storage.endpoint_url", s3.endpoint]
    assert cli.main(given) == EXIT_DONE
    before = content(path / "out")
    victim = path / "out" / "part-000002-00003.parquet"
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    with pytest.raises(DataError, match="part-000002-00003 is damaged"):
        read_embeddings(f"{bucket}/out", storage=s3.section)
    capfd.readouterr()
    assert cli.main(given) == EXIT_DONE
    assert json.loads(capfd.readouterr().out)["computed_now"] == 4
    assert content(path / "out") == before
    array, keys = read_embeddings(f"{bucket}/out", storage=s3.section)
    assert len(array) == len(keys) == sum(COUNTS)


# Refused in one line.


def refusal(given, capfd):
    code = cli.main(given)
    said = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("{")]
    assert code == EXIT_CONFIG
    assert len(said) == 1, said
    return said[0]


def test_a_folder_of_another_network_or_of_other_outputs_is_refused(model, data, tmp_path, capfd):
    out = tmp_path / "out"
    assert cli.main(command(model, data, out)) == EXIT_DONE
    before = content(out)
    save_tiny_run(str(tmp_path / "other"), seed=7)
    cases = {
        "network": command(tmp_path / "other", data, out),
        "what": command(model, data, out, what="features,clusters"),
        "precision": command(model, data, out, "--float16"),
        "layout": command(model, data, out, "--layout", "parquet"),
        "preprocessing": command(model, data, out, "--crop", "12"),
        "selection": command(model, data, out, "--stream.where", "label < 3"),
    }
    for name, given in cases.items():
        line = refusal(given, capfd)
        assert f"of another {name} (" in line
        assert "choose another folder" in line
    assert content(out) == before


@pytest.mark.parametrize(
    ("more", "what", "reason"),
    [
        ([], "fetures", "--what = 'fetures': must be of features, embeddings"),
        ([], "features,features", "--what = 'features,features': name each thing once"),
        ([], ",", "--what"),
        (["--top", "9"], "codes", f"--top = 9: must be from 1 on; the network has {PROTOTYPES} prototypes"),
        (["--layout", "csv"], "features", "--layout = 'csv': must be one of npy, parquet"),
        (["--crop", "16", "--resize", "8"], "features", "--resize = 8: smaller than the crop"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_written(
    model, data, tmp_path, capfd, more, what, reason
):
    assert reason in refusal(command(model, data, tmp_path / "out", *more, what=what), capfd)
    assert not (tmp_path / "out").exists()


def test_a_web_address_is_no_place_to_write_to(model, data, capfd):
    assert "can only be read" in refusal(command(model, data, "http://127.0.0.1:1/out"), capfd)


def test_without_shards_it_says_how_to_name_them(model, tmp_path, capfd):
    given = ["embed", "--checkpoint", str(model), "--to", str(tmp_path / "out")]
    assert "say where the shards are" in refusal(given, capfd)


def test_a_trunk_alone_has_features_and_no_clusters(model, data, tmp_path, capfd):
    network, _ = open_network(str(model))
    torch.save(network.trunk.state_dict(), tmp_path / "trunk.pth")
    line = refusal(command(tmp_path / "trunk.pth", data, tmp_path / "out", what="clusters"), capfd)
    assert "trunk.pth" in line


def test_parquet_without_pyarrow_is_told_how_to_install_it(model, data, tmp_path, capfd, monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **named):
        if name.partition(".")[0] == "pyarrow":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    line = refusal(command(model, data, tmp_path / "out", "--layout", "parquet"), capfd)
    assert "pip install 'streamswav[embed]'" in line


# What ops/transfer.md says of it.

PAGE = Path(__file__).parents[2] / "ops" / "transfer.md"


@pytest.fixture(scope="module")
def section():
    return PAGE.read_text().partition("## Features for other uses: `embed`\n")[2].partition("\n## ")[0]


def test_the_commands_of_the_page_run(model, data, tmp_path, section, monkeypatch):
    commands = re.findall(r"^    (streamswav (?:.*\\\n)*.*)$", section, re.MULTILINE)
    assert len(commands) == 3
    monkeypatch.chdir(tmp_path)
    (tmp_path / "takedown.txt").write_text("0_1\n")
    for number, text in enumerate(commands):
        line = text.replace("\\\n", " ").replace("s3://bucket/shards/", str(data))
        line = line.replace("runs/first", str(model)).replace("s3://bucket/embedded", f"out{number}")
        words = shlex.split(line.replace("width >= 64", "width >= 4"))
        given = [*words[words.index("embed") :], "--workers", "0"]
        assert cli.main(given) == EXIT_DONE
        if words[1] == "launch":
            cli._read_config(cli._parse(given))  # what the launcher does before it starts the ranks


def test_the_examples_of_the_page_find_what_is_alike(
    model, make_shards, tmp_path, section, monkeypatch, capfd
):
    def twin(number):
        return encode_image(0 if number == 17 else number, SIZE, "PNG")

    make_shards(tmp_path / "data", counts=[10, 10], image=twin, kind="PNG")
    monkeypatch.chdir(tmp_path)
    assert cli.main(command(model, tmp_path / "data", "embedded")) == EXIT_DONE
    capfd.readouterr()
    examples = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(examples) == 2
    names = {}
    for example in examples:
        exec(example, names)
    best, pairs = capfd.readouterr().out.splitlines()
    assert best.startswith("['1_7'")
    assert "('0_0', '1_7')" in pairs


def test_words_and_keys_may_come_in_any_order(model, data, tmp_path):
    given = ["embed", str(data), "--training.threads", "1", "--to", str(tmp_path / "out")]
    given += ["--stream.where", "label < 4", "--checkpoint", str(model), "--workers", "0"]
    assert cli.main(given) == EXIT_DONE
    assert len(read_embeddings(str(tmp_path / "out"), storage=StorageSection())[1]) > 0
