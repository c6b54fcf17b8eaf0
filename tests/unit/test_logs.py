"""Lines of the log: JSON that says who speaks, text that fits a terminal, and no secret in either."""

import fcntl
import io
import json
import logging
import os
import pty
import socket
import struct
import termios
import threading
import urllib.error
import urllib.request
import warnings
from dataclasses import replace

import pytest
from tqdm.utils import disp_len

from streamswav.config import parse_config
from streamswav.redact import HIDDEN, Redactor, redact
from streamswav.telemetry import logs
from streamswav.telemetry.exporter import Source, serve
from streamswav.telemetry.logs import Log, LogSettings, own_log, set_up_logs
from streamswav.telemetry.metrics import Metrics
from streamswav.telemetry.progress import Progress, Reporter

PROGRESS = Progress(
    step=1234,
    images=315_904,
    fraction=0.42,
    loss=3.21,
    rate=0.3,
    images_per_second=1366.4,
    data_wait_ratio=0.03,
    readings={"ln_prototypes": 4.852, "prototype_usage_ratio": 0.87},
    quarantined=2,
    seconds_left=151.0,
    verdict="prototype_collapse",
)


class Screen(io.StringIO):
    """A terminal of so many columns."""

    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.fixture
def screen(monkeypatch):
    def build(columns, *, colour=False):
        monkeypatch.setattr(Log, "width", property(lambda _: columns))
        found = Screen()
        return found, Log(LogSettings(colour=colour), found)

    return build


@pytest.fixture
def machine():
    found = io.StringIO()
    return found, Log(LogSettings(run="first", rank=1, worker=2), found)


def lines(stream):
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_json_line_says_when_what_and_who(machine):
    stream, log = machine
    log.tell("checkpoint", "saved", step=3, speed=float("nan"))
    (line,) = lines(stream)
    assert line.pop("time")[10:11] == "T"
    assert line == {
        "event": "checkpoint",
        "level": "info",
        "run": "first",
        "rank": 1,
        "worker": 2,
        "message": "saved",
        "step": 3,
        "speed": "nan",
    }


def test_run_and_format_come_from_the_configuration(machine):
    stream, log = machine
    log.describe(parse_config({"run": {"directory": "s3://bucket/runs/second/"}}))
    log.tell("x", "y")
    assert lines(stream)[0]["run"] == "second"
    log.describe(parse_config({"telemetry": {"log_format": "human"}}))
    log.tell("x", "for people")
    assert stream.getvalue().splitlines()[1] == "rank 1: for people"


def test_what_python_logs_and_warns_is_a_line_of_the_log(capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    with warnings.catch_warnings():
        monkeypatch.setattr(logging, "_warnings_showwarning", None)
        set_up_logs(LogSettings(run="first", rank=3))
        warnings.simplefilter("always")
        warnings.warn("old", DeprecationWarning, stacklevel=1)
        logging.getLogger("a.b").warning("slow: %s", "https://h/x?sig=abc")
        logging.getLogger("a.b").error("broken", exc_info=ValueError("password=hunter2"))
        found = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
        logging.captureWarnings(False)
    assert [line["event"] for line in found] == ["warning", "warning", "error"]
    assert {(line["run"], line["rank"]) for line in found} == {("first", 3)}
    assert "DeprecationWarning: old" in found[0]["message"]
    assert (found[1]["message"], found[1]["logger"]) == ("slow: https://h/x", "a.b")
    assert found[2]["traceback"].endswith(f"ValueError: password={HIDDEN}")


def test_an_uncaught_exception_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(logs.sys, "excepthook", None)
    monkeypatch.setattr(threading, "excepthook", None)
    set_up_logs(LogSettings(redactor=Redactor(("the-secret-value",))))
    logging.captureWarnings(False)
    logs.tell_crashes()
    error = RuntimeError("no the-secret-value here")
    logs.sys.excepthook(RuntimeError, error, None)
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["message"] == f"RuntimeError: no {HIDDEN} here"


def test_the_error_of_a_command_is_text_and_of_a_run_json_as_well(machine):
    stream, log = machine
    log.fail("swav.epsilon: too small", 78)
    event, text = stream.getvalue().splitlines()
    assert json.loads(event)["exit_code"] == 78
    assert text == "streamswav: swav.epsilon: too small"


@pytest.mark.parametrize("columns", [40, 60, 80, 100, 120, 200])
def test_the_live_line_fits_the_terminal_and_keeps_what_matters(screen, columns):
    stream, log = screen(columns, colour=True)
    Reporter(log).progress(PROGRESS)
    line = stream.getvalue().removeprefix("\r\x1b[K")
    assert disp_len(line) <= columns - 1
    assert line.startswith(" 42%") or line.startswith("\x1b")
    if columns >= 80:
        for part in ("█", "2:31 left", "loss 3.210 (ln K 4.852)", "\x1b[31mprototype collapse\x1b[0m"):
            assert part in line, part
    assert ("315,904 images" in line) == (columns == 200)


def test_the_bar_stands_behind_the_share_and_a_stream_without_end_has_none(screen):
    stream, log = screen(80)
    Reporter(log).progress(replace(PROGRESS, fraction=0.06))
    assert stream.getvalue().startswith("\r\x1b[K  6% █")
    Reporter(log).progress(replace(PROGRESS, fraction=None, seconds_left=None))
    assert (
        stream.getvalue().rpartition("\r\x1b[K")[2].startswith("loss 3.210 (ln K 4.852)  prototype collapse")
    )


def test_the_last_verdict_stands_in_every_line_and_a_bad_one_is_a_warning(machine):
    stream, log = machine
    reporter = Reporter(log)
    quiet = replace(PROGRESS, verdict=None)
    reporter.progress(quiet)
    for name in ("healthy", "stuck"):
        reporter.event("verdict", f"{name}: since", verdict=name)
        reporter.progress(quiet)
    found = [(line["event"], line["level"], line.get("verdict")) for line in lines(stream)]
    assert found == [
        ("progress", "info", None),
        ("verdict", "info", "healthy"),
        ("progress", "info", "healthy"),
        ("verdict", "warning", "stuck"),
        ("progress", "info", "stuck"),
    ]


def test_an_event_goes_above_the_live_line(screen):
    stream, log = screen(100)
    log.show("live")
    log.tell("checkpoint", "saved")
    log.show("later")
    log.close()
    log.text("other")
    shown = ["\r\x1b[Klive", "\r\x1b[Ksaved\nlive", "\r\x1b[Klater", "\r\x1b[Klater\n", "\r\x1b[Kother\n"]
    assert stream.getvalue() == "".join(shown)


def test_no_colours_where_nobody_wants_them(screen):
    stream, log = screen(150)
    Reporter(log).progress(PROGRESS)
    assert "\x1b[3" not in stream.getvalue()


def test_the_width_is_the_terminals():
    parent, child = pty.openpty()
    with os.fdopen(parent, "rb"), os.fdopen(child, "w") as stream:
        fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 57, 0, 0))
        assert Log(stream=stream).width == 57
        assert Log(stream=stream).human


def test_an_answer_of_the_endpoint_that_fails_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])

    def fail():
        raise RuntimeError("no status, and password=hunter2")

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with serve(Source(Metrics(), status=fail), port=port, bind="127.0.0.1"):
        with pytest.raises(urllib.error.HTTPError, match="500") as caught:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/status", timeout=10)
        caught.value.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["traceback"].endswith(f"RuntimeError: no status, and password={HIDDEN}")


def test_there_is_always_a_log(monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    assert own_log().settings == LogSettings()


ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "someaccesskey",
    "AWS_SECRET_ACCESS_KEY": "wJalr/XUtnFEMI+K7MDENG",
    "AWS_WEB_IDENTITY_TOKEN_FILE": "/var/run/token-file",
    "HOME": "/home/somebody-here",
    "MY_TOKEN": "short",
    "STREAMSWAV_LABELS__KEY": "filename-of-labels",
}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://u:p@host/x?X-Amz-Signature=abc: not there", "s3://host/x: not there"),
        ("['https://h/a.tar?sv=1&sig=ab%2F']", "['https://h/a.tar']"),
        ("http://user:p@ss@host:90/x", "http://host:90/x"),
        ("GET /x?X-Amz-Signature=abc&X-Amz-Date=1", f"GET /x?X-Amz-Signature={HIDDEN}&X-Amz-Date=1"),
        ("AWSAccessKeyId=AKIAIOSFODNN7EXAMPLE", f"AWSAccessKeyId={HIDDEN}"),
        ("key AKIAIOSFODNN7EXAMPLE was refused", f"key {HIDDEN} was refused"),
        ("storage.secret_key = 'hunter 2': no such key", f"storage.secret_key = '{HIDDEN}': no such key"),
        ("token: 'hunter 2", f"token: '{HIDDEN}'"),
        ("password=hunter2: refused", f"password={HIDDEN}: refused"),
        ('{"aws_session_token": "abc/+="}', f'{{"aws_session_token": "{HIDDEN}"}}'),
        ("Authorization: Bearer abc.def-ghi", f"Authorization: Bearer {HIDDEN}"),
        ("signed with wJalr/XUtnFEMI+K7MDENG!", f"signed with {HIDDEN}!"),
        ("x=wJalr%2FXUtnFEMI%2BK7MDENG", f"x={HIDDEN}"),
        ("someaccesskey", HIDDEN),
        ("someaccesskeyring in /var/run/token-file short", None),
        ("filename-of-labels below /home/somebody-here", None),
        ("labels.key = key: there is no such key (did you mean labels.file?)", None),
        ("s3://bucket/shards/{000..127}.tar: quarantined", None),
        ("rank 0 hangs: 3 s in step (watchdog.step_seconds = 2.6)", None),
    ],
)
def test_secrets_are_taken_out_and_nothing_else(text, shown):
    redactor = Redactor.of(ENVIRONMENT)
    assert redactor.text(text) == (text if shown is None else shown)
    assert redactor.text(redactor.text(text)) == redactor.text(text)


def test_trees_lose_secrets_at_any_depth():
    tree = {"a": ["https://u:p@h/x?t=1", 3], "b": {"api_token": "abc", "step": 1}}
    assert Redactor().tree(tree) == {"a": ["https://h/x", 3], "b": {"api_token": HIDDEN, "step": 1}}


def test_a_url_alone_is_redacted_where_it_is_one():
    assert redact("@https://u:p@h/list.txt?t=1") == "@https://h/list.txt"
    assert redact("/a?b/c#d") == "/a?b/c#d"
