"""The command line: what it says of arguments that make no sense."""

import re
import subprocess
import sys

import pytest

from streamswav.cli import main
from streamswav.config import keys
from streamswav.errors import EXIT_CONFIG


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["COMMAND", "required", "`streamswav --help`"]),
        (["pretrian"], ["COMMAND", "'pretrian'", "pretrain", "`streamswav --help`"]),
        (["pretrain", "--config"], ["--config", "expected one argument", "`streamswav pretrain --help`"]),
        (["cooldown", "--images", "many"], ["--images", "'many'", "`streamswav cooldown --help`"]),
        (["knn", "--train", "x"], ["--checkpoint, --test", "required", "`streamswav knn --help`"]),
        (["knn", "--k", "0"], ["--k", "0 is too few", "`streamswav knn --help`"]),
        (["keys", "--stray"], ["--stray", "keys", "--help`"]),
    ],
)
def test_a_wrong_argument_is_named_in_one_line_with_exit_code_78(arguments, parts, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    out, error = capsys.readouterr()
    assert caught.value.code == EXIT_CONFIG
    assert (out, error.count("\n")) == ("", 1)
    assert error.startswith("streamswav: ")
    assert all(part in error for part in parts), error


def test_every_commands_help_tells_its_exit_codes(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = re.findall(r"^    ([a-z]+) ", capsys.readouterr().out, re.MULTILINE)
    assert len(commands) > 15
    for command in commands:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert ("exit codes: 0 " in capsys.readouterr().out) == (command not in ("keys", "schema")), command


def test_the_list_of_keys_says_which_are_chosen_and_which_stay_open(capsys):
    main(["keys"])
    shown = re.findall(r"^  (\S+) = (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert [key for key, _ in shown] == keys()
    said = dict(shown)
    assert said["swav.epsilon"] == said["training.precision"] == "(chosen at start)"
    assert said["storage.endpoint_url"] == said["training.images"] == "(none)"
    assert (said["stream.follow"], said["stream.passes"]) == ("false", "1")


def test_output_that_nobody_reads_any_more_is_no_crash():
    command = [sys.executable, "-m", "streamswav", "keys"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        running.stdout.close()
        assert (running.wait(60), running.stderr.read()) == (141, b"")
