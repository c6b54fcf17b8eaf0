"""`streamswav wait`: ends when a run is done and not before, through outages; a signal is for another try."""

import signal

from runs import arguments, run, start

from streamswav.commands.summary import SUMMARY_FILE
from streamswav.errors import EXIT_DONE, EXIT_RETRY

COUNTS = [25, 14]


def test_it_ends_when_the_run_is_done(make_shards, s3, tmp_path):
    url, bucket = s3.make_bucket()
    make_shards(bucket / "shards", counts=COUNTS)
    directory = f"{url}/runs/first"
    (tmp_path / "config.yaml").write_text(f"storage: {{endpoint_url: '{s3.endpoint}'}}\n")
    waiting = ["wait", directory, "--every", "0.2", "--config", str(tmp_path / "config.yaml")]
    with start(waiting, tmp_path / "wait") as wait:
        given = arguments(
            run={"directory": directory},
            stream={"urls": f"{url}/shards/"},
            storage={"endpoint_url": s3.endpoint},
        )
        part = run([*given, "--checkpoint.images", "16"], tmp_path / "part")
        assert part.code == EXIT_DONE, part.err
        done = wait.wait(30)
    assert (done.code, done.out) == (EXIT_DONE, f"{directory}: this run is done\n")


def test_a_checkpoint_is_no_end_and_a_signal_asks_for_another_try(tmp_path):
    (tmp_path / "run" / "checkpoints" / "step-000000001").mkdir(parents=True)
    with start(["wait", str(tmp_path / "run"), "--every", "0.1"], tmp_path / "wait") as wait:
        wait.wait_until(lambda so_far: so_far.of("waiting"))
        wait.signal(signal.SIGTERM)
        stopped = wait.wait(30)
    assert stopped.code == EXIT_RETRY
    assert "the same command waits again" in stopped.said[-1]


def test_an_outage_is_waited_for(s3, tmp_path):
    url, bucket = s3.make_bucket()
    away = "http://127.0.0.1:9"  # nobody listens
    options = ["--every", "0.1", "--storage.endpoint_url", away, "--storage.deadline_seconds", "0.2"]
    with start(["wait", f"{url}/run", *options], tmp_path / "wait") as wait:
        wait.wait_until(lambda so_far: len(so_far.of("warning")) > 1)
        wait.signal(signal.SIGTERM)
        assert wait.wait(30).code == EXIT_RETRY
    (bucket / "run").mkdir()
    (bucket / "run" / SUMMARY_FILE).write_text("{}")
    options[-3] = s3.endpoint
    assert run(["wait", f"{url}/run", *options], tmp_path / "there").code == EXIT_DONE
