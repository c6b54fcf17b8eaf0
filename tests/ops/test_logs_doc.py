"""ops/logs.md names every event, and its commands read the log of a real run."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from runs import arguments, run

from streamswav.errors import EXIT_DONE

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "ops" / "logs.md").read_text()
CALL = re.compile(r"\.(?:event|tell|json)\(\s*\"([a-z_]+)\"")


def test_each_event_is_on_the_page():
    named = {name for file in (ROOT / "streamswav").rglob("*.py") for name in CALL.findall(file.read_text())}
    rows = (row.split("|")[1] for row in PAGE.partition("| event |")[2].splitlines() if row.startswith("| `"))
    listed = {name for row in rows for name in re.findall(r"`([a-z_]+)`", row)}
    assert named
    assert named <= listed, named - listed


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
def test_its_commands_read_a_real_log(make_shards, tmp_path):
    make_shards(tmp_path / "shards", counts=[40])
    made = arguments(run={"directory": tmp_path / "first"}, stream={"urls": tmp_path / "shards"})
    outcome = run(made, tmp_path)
    assert outcome.code == EXIT_DONE, outcome.err
    (tmp_path / "run.log").write_text(outcome.err + "streamswav: the last line is text\n")
    commands = [line.strip() for line in PAGE.splitlines() if line.startswith("    jq ")]
    answers = [
        subprocess.run(shlex.split(each), cwd=tmp_path, check=True, capture_output=True, text=True).stdout
        for each in commands
    ]
    assert len(answers[0].splitlines()) == len(outcome.of("progress"))
    assert "swav.epsilon" in answers[2]
