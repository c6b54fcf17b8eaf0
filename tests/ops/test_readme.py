"""What the README shows is true: its Python runs, its commands exist, its files are there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from shards.cli import main as shards_main
from streamswav.cli import main
from streamswav.config import keys

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
TINY = """
crops: {sizes: [16, 8], counts: [2, 2], scales: [[0.3, 1.0], [0.1, 0.4]]}
model: {trunk: resnet8, width: 0.125, stem: strided, head_hidden: 16, embedding: 8}
swav: {prototypes: 10, queue_length: 0}
training: {batch: 8}
telemetry: {port: 0}
"""


def test_the_python_examples_run_one_after_the_other(tmp_path, make_shards):
    make_shards(tmp_path / "shards", counts=[8, 12])
    (tmp_path / "tiny.yaml").write_text(TINY)
    run = ["pretrain", "--config", "tiny.yaml", "--stream.urls", "shards/", "--run.directory", "runs/first"]
    subprocess.run([sys.executable, "-m", "streamswav", *run], cwd=tmp_path, check=True, capture_output=True)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 8
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(blocks)],
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def commands():
    text = re.sub(r"\\\n\s*", "", README)
    for line in text.splitlines():
        found = re.match(r"\s+(?:\.venv/bin/)?(streamswav(?:-shards)? .*)", line.split("  #")[0])
        if found and not line.startswith("    streamswav:"):
            yield found[1]


@pytest.mark.parametrize("command", [each for each in commands() if "swav.epsilom" not in each])
def test_every_command_is_understood(command, capsys):
    program, name, *rest = shlex.split(command)
    with pytest.raises(SystemExit) as ended:
        (shards_main if program == "streamswav-shards" else main)([name, "--help"])
    assert ended.value.code == 0
    known = capsys.readouterr().out
    for option in (each for each in rest if each.startswith("--")):
        assert option in known or option.removeprefix("--") in keys(), option


def test_the_example_of_a_mistake_is_what_one_gets(capsys):
    shown = re.search(r"\n    (streamswav: swav\.epsilom.*)\n", README)
    assert main(["pretrain", "--swav.epsilom", "0.03"]) == 78
    assert capsys.readouterr().err.strip() == shown[1]


def test_every_file_that_the_readme_names_is_there():
    for name in re.findall(r"`((?:ops|commands|training|stream|crops|swav)/[\w./-]*)`", README):
        assert (ROOT / name).exists() or (ROOT / "streamswav" / name).exists(), name
