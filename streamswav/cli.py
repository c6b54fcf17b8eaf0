"""The command line: reads arguments, environment and files, calls a command, maps errors to exit codes."""

from __future__ import annotations

import argparse
import atexit
import importlib
import itertools
import json
import os
import select
import sys
import tempfile
import textwrap
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from streamswav import __version__
from streamswav.arguments import Parser
from streamswav.config import Config, dump_config, load_config
from streamswav.defaults import FINETUNE_BASE, chosen_keys
from streamswav.drain import drain_on_signals
from streamswav.ends import leave_reason, reason_of
from streamswav.errors import EXIT_DONE, ConfigError, StreamswavError
from streamswav.heartbeat import AGENT, FOLDER_VARIABLE, METRICS_VARIABLE, attach
from streamswav.redact import Redactor
from streamswav.telemetry.logs import Log, LogSettings, own_log, set_up_logs, tell_crashes
from streamswav.telemetry.secrecy import without_secrets

_INTERRUPTED = 130
_UNREAD = 141  # as of programs that SIGPIPE ends
_ABOUT = "Self-supervised pretraining of image trunks (SwAV) from tar shards. COMMAND --help says more."
_WITH_METRICS = ("pretrain", "cooldown", "finetune", "lowshot", "launch")
_WITH_RANKS = ("pretrain", "cooldown", "finetune", "embed", "knn", "linear", "svm", "evaluate")

_OF_MODULES = {
    "audit": ("audit", "audit", "account for every sample of a run, trained or not"),
    "verdict": ("verdict", "verdict", "say whether a run learns, why not, and what helps"),
    "knn": ("evaluate", "knn", "measure a trunk by the nearest neighbours of its features"),
    "linear": ("evaluate", "linear", "measure a trunk by linear classifiers on its features"),
    "svm": ("evaluate", "svm", "measure a trunk by linear SVMs on its features"),
    "evaluate": (
        "evaluate",
        "evaluate",
        "measure a trunk by kNN, linear classifiers and SVMs on the same features",
    ),
    "compare": ("compare", "compare", "show results of several measurements side by side"),
    "embed": ("embed", "embed", "write what a network says of every image, as tables"),
    "export": ("export", "export", "write a trunk for torchvision, timm, detectron2, ONNX and others"),
    "wait": ("wait", "wait", "end when a run is done, so that what follows it can begin"),
}
"""Commands with arguments of their own: module below `commands`, X of `add_X_arguments` and `run_X`, help.

`run_X` takes the arguments and the configuration that environment and `--section.key value` give. One
that sets the default `words` gets there what has no flag before it (URLs, a place to write to).
"""

_PRETRAIN_HELP = """\
Keys of the configuration are given as --section.key value; `streamswav keys` lists them all. Later sources
win: the file, then STREAMSWAV_SECTION__KEY from the environment, then the command line.

exit codes: 0 done · 75 stopped by a signal and saved, the same command continues · 78 do not restart before
something was changed (the message says what) · 1 anything else
"""


_COOLDOWN_HELP = """\
The run is named by run.directory, as it was begun; it goes on where it stopped, while its rate falls to the
end, and is done then. A cool-down that was stopped goes on to the same end.
"""

_EXIT_CODES = """\
exit codes: 0 done · 75 storage is out of reach for now, try again · 78 do not try again before something was
changed (the message says what) · 1 anything else
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    log = _set_up_logs(launcher=argv[:1] == ["launch"])
    if folder := os.environ.get(FOLDER_VARIABLE):
        attach(Path(folder), _local_rank())
    try:
        with _reason_left():
            if argv[:1] == ["launch"]:
                return _launch(argv[1:])
            arguments = _parse(argv)
            code = arguments.run(arguments)
            sys.stdout.flush()
    except StreamswavError as error:
        if not isinstance(error, ConfigError) or _local_rank() == 0:  # all ranks have the same configuration
            log.fail(str(error), error.exit_code)
        return error.exit_code
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        return _UNREAD
    except KeyboardInterrupt:
        log.fail("interrupted; nothing was saved since the last checkpoint", _INTERRUPTED)
        return _INTERRUPTED
    return EXIT_DONE if code is None else int(code)


def _nobody_reads() -> bool:
    """Tell whether whoever read the output is gone, as after `| head`; the rest of it goes nowhere then."""
    watch = select.poll()
    watch.register(1, select.POLLOUT)
    if not any(event & select.POLLERR for _, event in watch.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return True


def _set_up_logs(*, launcher: bool) -> Log:
    rank = None if launcher else int(os.environ.get("RANK", "0"))
    colour = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return set_up_logs(LogSettings(rank=rank, colour=colour, redactor=Redactor.of(os.environ)))


@contextmanager
def _reason_left() -> Iterator[None]:
    """Leave the launcher, as a rank of it, a word of what ends this process."""
    try:
        yield
    except BaseException as error:
        if folder := os.environ.get(FOLDER_VARIABLE):
            leave_reason(Path(folder), _local_rank(), reason_of(error))
        raise


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _build_parser(argv[0] if argv else "")
    arguments, rest = parser.parse_known_args(argv)
    if rest and not arguments.takes_keys:
        parser.error(f"{rest[0]} is not understood by {arguments.command}")
    if hasattr(arguments, "words"):
        arguments.words, rest = _split_urls(rest)
    arguments.keys = rest
    return arguments


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def _build_parser(command: str) -> Parser:
    """Build the parser; only `command` needs its arguments where declaring them imports torch."""
    parser = Parser(prog="streamswav", description=_ABOUT, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"streamswav {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    pretrain = _add_command(commands, "pretrain", _train, "train a trunk on tar shards, in one pass")
    pretrain.formatter_class = argparse.RawDescriptionHelpFormatter
    pretrain.epilog = _PRETRAIN_HELP
    pretrain.add_argument(
        "--init", metavar="PATH", help="--model.init: a run, checkpoint or file that a new run begins with"
    )
    pretrain.add_argument("--print-config", action="store_true", help="show the configuration and end")
    finetune = _add_command(
        commands, "finetune", _train, "train trunk and head on labelled shards, and measure them"
    )
    finetune.formatter_class = argparse.RawDescriptionHelpFormatter
    finetune.epilog = _PRETRAIN_HELP
    finetune.add_argument("--print-config", action="store_true", help="show the configuration and end")
    lowshot = _add_command(
        commands, "lowshot", _lowshot, "finetune on n images a class by several seeds: mean and spread"
    )
    _declare_lowshot(lowshot)
    cooldown = _add_command(
        commands, "cooldown", _cooldown, "end a run of constant rate: bring the rate down"
    )
    cooldown.add_argument(
        "--images", type=int, help="images over which it falls (default: 10%% of those seen)"
    )
    for each in (finetune, lowshot):
        each.add_argument(
            "--init", metavar="PATH", help="--model.init: a run, checkpoint or file, or scratch"
        )
    cooldown.formatter_class = argparse.RawDescriptionHelpFormatter
    cooldown.epilog = f"{_COOLDOWN_HELP}\n{_PRETRAIN_HELP}"
    for each in (pretrain, finetune, lowshot, cooldown):
        each.add_argument("--config", type=Path, metavar="FILE", help="YAML file with sections and keys")
        each.set_defaults(takes_keys=True)
    _add_command(
        commands, "launch", _launch, "start a command on several ranks, as a pod or on a workstation"
    )
    for name, (_, _, text) in _OF_MODULES.items():
        each = _add_command(commands, name, _run_module, text)
        each.epilog = "How storage is reached can be set by --storage.KEY, as for pretrain."
        each.set_defaults(takes_keys=True)
        if name == command:
            _of_module(name, "add_{}_arguments")(each)
    _declare_stream(_add_command(commands, "stream", _stream, "read and crop without training: what limits?"))
    plan = _add_command(commands, "plan", _plan, "say what a run takes, before anyone pays for a GPU")
    plan.add_argument("--config", type=Path, metavar="FILE", help="YAML file with sections and keys")
    plan.set_defaults(takes_keys=True)
    if command == "plan":
        _declare_plan(plan)
    doctor = _add_command(commands, "doctor", _doctor, "look at everything that a run will need, before it")
    doctor.set_defaults(takes_keys=True)
    if command == "doctor":
        _declare_doctor(doctor)
    for each in commands.choices.values():
        if "exit code" not in (each.epilog or "") and each.get_default("run") is not _launch:
            each.formatter_class = argparse.RawDescriptionHelpFormatter
            each.epilog = "\n\n".join(filter(None, (_wrapped(each.epilog), _EXIT_CODES)))
    _add_command(commands, "keys", _keys, "list all keys of the configuration with their defaults")
    _add_command(commands, "schema", _schema, "print the configuration's JSON schema")
    return parser


def _wrapped(text: str | None) -> str:
    return textwrap.fill(text, 110) if text and "\n" not in text else text or ""


def _add_command(commands: argparse._SubParsersAction[Parser], name: str, run: object, text: str) -> Parser:
    parser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.set_defaults(run=run, takes_keys=False)
    return parser


def _declare_lowshot(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Each cell of the grid is a run as of `streamswav finetune`, whose keys are given alike."
    add = parser.add_argument
    add("--per-class", type=int, nargs="+", metavar="N", help="--lowshot.per_class: images of each class")
    add("--seeds", type=int, nargs="+", metavar="SEED", help="--lowshot.seeds: of draw and training")
    add("--baselines", nargs="+", metavar="NAME", help="--lowshot.baselines: scratch")
    add("--list", action="store_true", help="only show the commands of the runs that are not done")


def _declare_stream(parser: argparse.ArgumentParser) -> None:
    parser.usage = "streamswav stream URL... [options] [--section.key value]..."
    parser.epilog = (
        "URLs are prefixes, globs, brace patterns or tars. Keys of stream, storage, loader and crops, and "
        "training.batch, are set as for pretrain. Nothing is written; Ctrl-C prints the report so far."
    )
    add = parser.add_argument
    add("--seconds", type=float, default=30.0, help="how long, from the first batch on (default: 30)")
    add("--samples", type=int, help="end after so many samples")
    add("--workers", type=int, help="loader processes, as --loader.workers; 0: none but this")
    add("--no-crops", action="store_true", help="measure the stream alone: images are not decoded")
    add("--json", action="store_true", help="print JSON")
    add("--config", type=Path, metavar="FILE", help="YAML file with sections and keys")
    parser.set_defaults(takes_keys=True)


def _launch(arguments: Sequence[str]) -> int:
    environment = dict(os.environ)
    # A node that is late is told in one line; torch's C++ would add pages, here but not in the ranks.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    from streamswav.launch import launch  # noqa: PLC0415

    return launch(
        arguments, environment, commands=_WITH_RANKS, check=lambda command: _read_config(_parse(command))
    )


def _read_config(arguments: argparse.Namespace) -> Config:
    file, given = getattr(arguments, "config", None), list(arguments.keys)
    short: list[str] = []
    if getattr(arguments, "init", None) is not None:
        short += ["--model.init", '""' if arguments.init == "scratch" else arguments.init]
    for name in ("per_class", "seeds", "baselines"):
        if getattr(arguments, name, None) and arguments.command == "lowshot":
            short += [f"--lowshot.{name}", json.dumps(getattr(arguments, name))]
    finetuning = arguments.command in ("finetune", "lowshot")
    config = load_config(file, os.environ, short + given, base=FINETUNE_BASE if finetuning else {})
    if arguments.command in ("pretrain", "plan") and config.finetune.model_fields_set:
        reason = f"is for streamswav finetune and lowshot; {arguments.command} has no use for it"
        raise ConfigError(f"finetune.{min(config.finetune.model_fields_set)}", reason)
    own_log().describe(config)
    return config


def _train(arguments: argparse.Namespace) -> None:
    config, command = _read_config(arguments), arguments.command
    if arguments.print_config:
        sys.stdout.write(dump_config(without_secrets(config)))
        return
    with drain_on_signals() as drain:
        # torch takes seconds to import: not before the configuration is known to be right.
        module = importlib.import_module(f"streamswav.commands.{command}")
        summary = getattr(module, command)(config, drain)
    if summary:
        sys.stdout.write(json.dumps(summary, indent=1) + "\n")


def _lowshot(arguments: argparse.Namespace) -> None:
    config = _read_config(arguments)
    words = [] if arguments.config is None else ["--config", str(arguments.config)]
    words += [] if arguments.init is None else ["--init", arguments.init]
    with drain_on_signals() as drain:
        from streamswav.commands.lowshot import lowshot  # noqa: PLC0415

        lowshot(config, drain, listed=[*words, *arguments.keys] if arguments.list else None)


def _stream(arguments: argparse.Namespace) -> None:
    urls, arguments.keys = _split_urls(arguments.keys)
    if urls:
        arguments.keys += ["--stream.urls", json.dumps(urls)]
    if arguments.workers is not None:
        arguments.keys += ["--loader.workers", str(arguments.workers)]
    config = _read_config(arguments)
    with drain_on_signals() as drain:
        from streamswav.commands.stream import stream  # noqa: PLC0415

        stream(
            config,
            drain,
            seconds=arguments.seconds,
            samples=arguments.samples,
            crops=not arguments.no_crops,
            as_json=arguments.json,
        )


def _split_urls(rest: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part URLs from `--section.key value` pairs, in whatever order they came."""
    urls: list[str] = []
    pairs: list[str] = []
    words = iter(rest)
    for word in words:
        if not word.startswith("--"):
            urls.append(word)
            continue
        pairs.append(word)
        if "=" not in word:
            pairs += itertools.islice(words, 1)
    return urls, pairs


def _cooldown(arguments: argparse.Namespace) -> None:
    config = _read_config(arguments)
    with drain_on_signals() as drain:
        from streamswav.commands.cooldown import cooldown  # noqa: PLC0415

        summary = cooldown(config, drain, images=arguments.images)
    if summary:
        sys.stdout.write(json.dumps(summary, indent=1) + "\n")


def _of_module(command: str, function: str) -> Any:
    module, name, _ = _OF_MODULES[command]
    return getattr(importlib.import_module(f"streamswav.commands.{module}"), function.format(name))


def _run_module(arguments: argparse.Namespace) -> None:
    given = load_config(getattr(arguments, "config", None), os.environ, arguments.keys)
    own_log().describe(given)
    _of_module(arguments.command, "run_{}")(arguments, given=given)


def _declare_plan(parser: argparse.ArgumentParser) -> None:
    from streamswav.commands import plan  # noqa: PLC0415

    plan.add_arguments(parser)


def _plan(arguments: argparse.Namespace) -> None:
    from streamswav.commands.plan import refuse_nonsense, run_plan  # noqa: PLC0415

    refuse_nonsense(arguments)
    files, arguments.keys = _split_urls(arguments.keys)
    if len(files) > 1 or (files and arguments.config):
        raise ConfigError("plan", "takes one configuration", value=" ".join(files))
    arguments.config = Path(files[0]) if files else arguments.config
    if arguments.samples is not None:
        arguments.keys += ["--stream.samples", f"{arguments.samples:.0f}"]
    run_plan(arguments, _read_config(arguments))


def _declare_doctor(parser: Parser) -> None:
    from streamswav.doctor import command  # noqa: PLC0415

    command.add_arguments(parser, commands=(*_WITH_RANKS, "lowshot"))


def _doctor(arguments: argparse.Namespace) -> int:
    asked = argparse.Namespace(**{**vars(arguments), "command": arguments.for_command})
    with drain_on_signals():
        from streamswav.doctor.command import run_doctor  # noqa: PLC0415

        return run_doctor(arguments, dict(os.environ), lambda: _read_config(asked))


def _keys(_: argparse.Namespace) -> None:
    chosen = chosen_keys()
    for section, field in Config.model_fields.items():
        model = field.default
        sys.stdout.write(f"\n{section}: {(type(model).__doc__ or '').strip()}\n")
        for name, entry in type(model).model_fields.items():
            default = "(none)" if entry.default is None else json.dumps(entry.default, default=str)
            if entry.default in (None, "auto") and f"{section}.{name}" in chosen:
                default = "(chosen at start)"
            sys.stdout.write(f"  {section}.{name} = {default}\n      {entry.description}\n")


def _schema(_: argparse.Namespace) -> None:
    sys.stdout.write(json.dumps(Config.model_json_schema(), indent=1) + "\n")


def enter(argv: Sequence[str] | None = None) -> int:
    """Run one command as a process of its own: what the installed script does.

    A rank leaves without taking torch down: gloo's threads live on after the process group is destroyed, and
    may abort the process while C++ clears up, long after all is saved. A launcher whose agent waits for other
    nodes, in C, would meet an interpreter that is half gone.
    """
    tell_crashes()
    argv = sys.argv[1:] if argv is None else list(argv)
    with _metrics_shared(argv):
        code = main(argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or any(
        each.name == AGENT for each in threading.enumerate()
    ):
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


@contextmanager
def _metrics_shared(argv: Sequence[str]) -> Iterator[None]:
    """Give the processes of a run a folder for their metrics, unless the launcher or the user has.

    Of a user's folder what processes of this program left behind is removed; whose process lives stays.
    """
    given = os.environ.get(METRICS_VARIABLE)
    if "".join(argv[:1]) not in _WITH_METRICS or (given and os.environ.get(FOLDER_VARIABLE)):
        yield
        return
    from streamswav.telemetry.multiprocess import forget_dead  # noqa: PLC0415

    if given:
        Path(given).mkdir(parents=True, exist_ok=True)
        if _local_rank() == 0:
            forget_dead(Path(given), counts=True)
        yield
        return
    with tempfile.TemporaryDirectory(prefix="streamswav-metrics-", ignore_cleanup_errors=True) as folder:
        os.environ[METRICS_VARIABLE] = folder
        yield


if __name__ == "__main__":
    sys.exit(enter())
