"""The command line: what it says of arguments that make no sense."""

import pytest

from streamswav.cli import main
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
