"""Secrets planted wherever a user may have them are nowhere in what real runs say, serve, keep or hand on."""

import os
import re
import signal
import socket
import sys
import time
import urllib.request
import zipfile

import pytest
import yaml
from runs import TINY, arguments, free_port, run, scrape_text, start_ranks

from streamswav.errors import EXIT_CONFIG, EXIT_DONE, EXIT_FAILED, EXIT_RETRY

COUNTS = [24, 24]
BATCH = 16
SECRETS = {
    "AWS_SESSION_TOKEN": "FwoGZXIvYXdzEPLANTED//////////wEaDsessionQ==",
    "WANDB_API_KEY": "0123456789plantedapikey0123456789abcdef0",
    "MY_SERVICE_PASSWORD": "planted-service-password",
    "HF_TOKEN": "hf_plantedHubToken",
}
USER, PASSWORD, SIGNATURE = "planteduser", "plantedpass", "planted0signature1in2url"
NEEDLES = (*SECRETS.values(), USER, PASSWORD, SIGNATURE, "planted")


def with_user(url):
    """The URL with user and password in it."""
    return url.replace("://", f"://{USER}:{PASSWORD}@")


def signed(url):
    """The URL as S3, a CDN and Azure would sign it, all at once."""
    names = ("X-Amz-Signature", "X-Amz-Security-Token", "AWSAccessKeyId", "token", "sig")
    return with_user(f"{url}?{'&'.join(f'{name}={SIGNATURE}' for name in names)}")


def found_in(data, keys=()):
    """Which of what was planted is in some bytes."""
    return sorted({each for each in (*NEEDLES, *keys) if each.encode().lower() in data.lower()})


def leaks(*folders, keys=()):
    """Where in files below folders a secret is, members of zip archives among them."""
    places = {}
    for file in (each for folder in folders for each in folder.rglob("*") if each.is_file()):
        parts = {"": file.read_bytes()}
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                parts |= {name: archive.read(name) for name in archive.namelist()}
        parts |= {"its name": str(file).encode()}
        places |= {f"{file} {part}": found for part, data in parts.items() if (found := found_in(data, keys))}
    return places


@pytest.fixture(scope="module")
def shards(make_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("web")
    make_shards(folder / "train", counts=COUNTS)
    return folder


@pytest.fixture
def source(web, shards):
    """Signed URLs of the shards on a web server."""
    (web.folder / "train").symlink_to(shards / "train")
    return [signed(f"{web.url}/train/shard-{number:06}.tar") for number in range(len(COUNTS))]


@pytest.fixture
def out(tmp_path):
    """Where everything goes that is looked through."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def command(given, folder, *, file, **sections):
    """Arguments of a tiny run whose URLs lie in a configuration file outside the folder."""
    file.write_text(yaml.safe_dump({"stream": {"urls": given}}))
    made = arguments(run={"directory": folder / "run"}, **sections)
    return [made[0], "--config", str(file), *made[1:]]


def served(port):
    """What all pages of a run's endpoint say."""
    texts = [scrape_text(port)]
    for page in ("status", "healthz", "readyz"):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/{page}", timeout=10) as reply:
                texts.append(reply.read().decode())
        except OSError:
            continue
    return "\n".join(texts)


def test_a_run_that_succeeds_keeps_no_secret_anywhere(source, out, tmp_path):
    port, pages = free_port(), []
    made = command(
        source,
        out,
        file=tmp_path / "config.yaml",
        stream={"passes": 8, "samples": sum(COUNTS)},
        loader={"workers": 1},
        checkpoint={"images": 5 * BATCH, "copy_to": out / "copy"},
        evaluation={"every": 8 * BATCH, "train": source[0], "test": source[1], "linear_epochs": 1},
        telemetry={"port": port, "bind": "127.0.0.1", "sinks": "[tensorboard, wandb]"},
    )
    environment = {**SECRETS, "WANDB_MODE": "offline", "WANDB_CACHE_DIR": str(out / "cache")}
    with start_ranks(1, made, out, launcher=[], environment=environment) as running:
        while not running.ended:
            pages.append(served(port))
            time.sleep(0.05)
        outcome = running.wait()
    assert outcome.code == EXIT_DONE, outcome.err[-3000:]
    assert "streamswav_loss" in "".join(pages)
    assert '"last_checkpoint"' in "".join(pages)
    assert outcome.of("probe")
    assert list(out.glob("run/wandb/*/*.wandb"))
    assert list(out.glob("run/tensorboard/*"))
    assert list(out.glob("copy/checkpoints/*/model.pt"))
    kept = yaml.safe_load((out / "run" / "config.yaml").read_text())
    assert re.fullmatch(r"http://127.0.0.1:\d+/train/shard-000000.tar", kept["stream"]["urls"][0])
    assert found_in("".join(pages).encode()) == []
    assert leaks(out) == {}
    measured = ["knn", "--checkpoint", str(out / "run"), "--train", source[0], "--test", source[1]]
    measured += ["--k", "3"]
    results = run([*measured, "--json", str(out / "results.json")], out / "knn", environment=SECRETS)
    assert results.code == EXIT_DONE, results.err
    exported = run(["export", "--checkpoint", str(out / "run"), str(out / "exports")], out / "export")
    assert exported.code == EXIT_DONE, exported.err
    assert leaks(out) == {}


def test_a_key_that_is_refused_and_a_server_that_is_away_are_told_without_secrets(s3, out, tmp_path):
    url, _ = s3.make_bucket()
    environment = {
        **SECRETS,
        "AWS_SECRET_ACCESS_KEY": "planted/Secret+Key0123456789",
        "AWS_SESSION_TOKEN": "",
    }
    for name, endpoint in (("refused", s3.endpoint), ("user", with_user(s3.endpoint))):
        refused = command(
            [f"{url}/train/"],
            out / name,
            file=tmp_path / "refused.yaml",
            storage={"endpoint_url": endpoint},
        )
        ended = run(refused, out / name, environment=environment)
        assert ended.code == EXIT_CONFIG, ended.err
    assert "storage.endpoint_url" in ended.said[-1]
    with socket.socket() as held:  # bound, and nobody listens
        held.bind(("127.0.0.1", 0))
        away = f"http://127.0.0.1:{held.getsockname()[1]}"
        gone = command(
            [signed(f"{away}/train/shard-000000.tar")],
            out / "away",
            file=tmp_path / "away.yaml",
            storage={"deadline_seconds": 1},
        )
        ended = run(gone, out / "away", environment=SECRETS)
    assert ended.code == EXIT_RETRY, ended.err
    assert "shard-000000.tar" in ended.said[-1]
    assert leaks(out) == {}


@pytest.mark.parametrize(
    "text",
    [
        "storage: {secret_access_key: plantedpass}",
        "storage:\n  session_token: 'plantedpass\n  region: x",
        "storage: {endpoint_url: 'ftp://planteduser:plantedpass@host/x?token=planted'}",
        "stream: {urls: ['pipe:curl https://planteduser:plantedpass@host/x?sig=planted']}",
        "stream: {urls: ['https://planteduser:plantedpass@host/{0..3.tar?sig=planted']}",
        "training: {device: 'https://planteduser:plantedpass@host/x?sig=planted'}",
    ],
)
def test_a_mistake_in_the_configuration_shows_the_key_and_no_secret(text, tmp_path, capfd):
    from streamswav import cli  # noqa: PLC0415

    file = tmp_path / "config.yaml"
    file.write_text(text)
    given = [part for key, value in TINY.items() for part in (f"--{key}", value)]
    urls = [] if "urls" in text else ["--stream.urls", "s3://bucket/x/"]
    code = cli.main(
        ["pretrain", "--config", str(file), *given, *urls, "--run.directory", str(tmp_path / "run")]
    )
    said = capfd.readouterr()
    assert code == EXIT_CONFIG
    assert said.err.startswith("{") or said.err.startswith("streamswav: ")
    assert found_in((said.out + said.err).encode()) == []


def test_the_configuration_that_is_shown_is_the_one_that_is_kept(capsys):
    from streamswav import cli  # noqa: PLC0415

    url = signed("https://host/a.tar")
    assert cli.main(["pretrain", "--print-config", "--stream.urls", url]) == EXIT_DONE
    said = capsys.readouterr()
    assert "https://host/a.tar" in said.out
    assert found_in((said.out + said.err).encode()) == []


def test_a_hung_gang_is_ended_without_a_secret_in_its_stacks(source, out, tmp_path):
    made = command(
        source,
        out,
        file=tmp_path / "config.yaml",
        stream={"passes": 500, "samples": sum(COUNTS)},
        watchdog={"step_seconds": 2},
        loader={"workers": 1},
    )
    with start_ranks(1, made, out, launcher=[], environment=SECRETS) as running:
        running.wait_until(lambda so_far: so_far.of("progress"))
        os.kill(running.ranks()[0], signal.SIGSTOP)
        outcome = running.wait(60)
    assert outcome.code == EXIT_RETRY, outcome.err[-3000:]
    assert any("trainer.py" in event.get("stacks", "") for event in outcome.of("launcher"))
    assert leaks(out) == {}


@pytest.mark.parametrize(
    ("kind", "workers", "code"),
    [
        pytest.param("RuntimeError", 1, EXIT_CONFIG, marks=pytest.mark.all),
        ("BaseException", 0, EXIT_FAILED),
    ],
)
def test_what_a_function_of_the_users_own_raises_is_told_without_secrets(
    kind, workers, code, shards, out, tmp_path
):
    """It shows the environment: in a loader process as a mistake of the user's, else as a crash."""
    (tmp_path / "theirs.py").write_text(
        "import os\n"
        "def keep(sample):\n"
        f"    raise {kind}(' '.join(os.environ[name] for name in {tuple(SECRETS)!r}))\n"
    )
    made = arguments(
        run={"directory": out / "run"},
        stream={"urls": shards / "train", "where": "['theirs:keep']"},
        loader={"workers": workers},
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    outcome = run(made, out, script=True, environment={**SECRETS, "PYTHONPATH": path})
    assert outcome.code == code, outcome.err
    told = outcome.of("crash" if code == EXIT_FAILED else "error")
    assert [f"{kind}: {' '.join(['***'] * len(SECRETS))}" in event["message"] for event in told] == [True]
    assert all("theirs.py" in event["traceback"] for event in outcome.of("crash"))
    assert len(outcome.said) == (code == EXIT_CONFIG)
    assert {event["run"] for event in outcome.events} == {"run"}
    assert leaks(out) == {}
