"""What the image installs is locked, licensed and let in; its Dockerfile says how it runs."""

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from streamswav.errors import EXIT_CONFIG

sys.path.insert(0, str(Path(__file__).parents[2] / "ops"))

import licences

ROOT = Path(__file__).parents[2]
LOCKS = ROOT / "ops" / "locks"
EXTRAS = ["embed", "evaluate", "export", "tensorboard", "wandb"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
INSTRUCTION = re.compile(r"^([A-Z]+) +(.*)$", re.MULTILINE)


def instructions():
    """Instruction and the rest of its lines, of the whole Dockerfile."""
    text = re.sub(r"(?m)^ *#.*\n", "", (ROOT / "Dockerfile").read_text())
    return INSTRUCTION.findall(re.sub(r"\\\n *", "", text))


def last_stage():
    found = instructions()
    return found[max(at for at, (name, _) in enumerate(found) if name == "FROM") :]


def copied():
    """What is copied from the repository."""
    for name, rest in instructions():
        if name == "COPY" and not rest.startswith("--from="):
            yield from (word for word in rest.split()[:-1])
        elif name == "RUN":
            yield from re.findall(r"--mount=type=bind,source=([^,]+)", rest)


def test_hadolint_has_nothing_to_say_of_the_dockerfile():
    binary = str(Path(sys.executable).with_name("hadolint"))
    done = subprocess.run([binary, "Dockerfile"], cwd=ROOT, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_launcher_is_pid_1_of_a_user_who_is_not_root():
    said = dict(last_stage())
    assert json.loads(said["ENTRYPOINT"]) == ["streamswav", "launch"]
    assert said["USER"] == "65532:65532"
    assert said["STOPSIGNAL"] == "SIGTERM"
    assert [name for name, _ in last_stage()].count("USER") == 1


def test_the_last_stage_takes_nothing_from_the_network_unless_asked_to():
    ran = " && ".join(rest for name, rest in last_stage() if name == "RUN")
    assert 'if [ -n "${PACKAGES}" ]; then apt-get update' in ran
    assert re.findall(r"apt-get|pip|curl|wget|gcc", ran) == ["apt-get", "apt-get"]
    assert ("ARG", 'PACKAGES=""') in last_stage()


def test_no_argument_or_variable_is_a_secret():
    said = " ".join(rest for name, rest in instructions() if name in ("ARG", "ENV"))
    assert not re.search(r"(?i)password|secret|token|_key", said)
    mounts = re.findall(r"--mount=type=secret\S*", " ".join(rest for _, rest in instructions()))
    assert mounts == ["--mount=type=secret,id=pip,target=/etc/pip.conf"]


def test_what_is_copied_exists_and_dockerignore_lets_in_that_and_nothing_else():
    default = dict(each.split("=", 1) for name, each in instructions() if name == "ARG" and "=" in each)
    sources = {default["LOCKS"] if each == "${LOCKS}" else each for each in copied()}
    lines = (ROOT / ".dockerignore").read_text().split()
    assert lines[0] == "*"
    let_in = {line[1:] for line in lines if line.startswith("!")}
    assert all((ROOT / each).exists() for each in sources | let_in)
    below = {each: [one for one in let_in if Path(each).is_relative_to(one)] for each in sources}
    assert all(below.values()), below
    assert {one for found in below.values() for one in found} == let_in


def closure(requirements):
    """Names and versions of requirements and all that they need, as installed here for this machine."""
    found, waiting = {}, [Requirement(each) for each in requirements]
    while waiting:
        wanted = waiting.pop()
        environments = [{"extra": extra} for extra in (wanted.extras or {""})]
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        name = licences.normal(wanted.name)
        if (name, frozenset(wanted.extras)) in found:
            continue
        here = importlib.metadata.distribution(wanted.name)
        found[name, frozenset(wanted.extras)] = here.version
        for text in here.requires or []:
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate(each) for each in environments):
                needed.marker = None
                waiting.append(needed)
    return {name: version for (name, _), version in found.items()}


def locked(name):
    text = (LOCKS / f"{name}.txt").read_text()
    return {licences.normal(each): version for each, version in re.findall(r"(?m)^([\w.-]+)==(\S+)", text)}


def test_the_locks_are_what_pyproject_needs_and_installs_here():
    extras = PROJECT["optional-dependencies"]
    wanted = closure([*PROJECT["dependencies"], *(each for extra in EXTRAS for each in extras[extra])])
    together = {}
    for name in ("run", "compile", *EXTRAS):
        lock = locked(name)
        assert not locked("run").keys() & lock.keys() or name == "run", (
            f"{name} has what run has: bash ops/lock"
        )
        together |= lock
    assert together == wanted, "bash ops/lock"
    assert list(locked("compile")) == ["triton"]


def test_locks_and_constraints_name_the_same_versions():
    text = (ROOT / "ops" / "constraints.txt").read_text()
    constraints = {licences.normal(line.split("==")[0]): line.split("==")[1] for line in text.split()}
    for name in ("run", "compile", *EXTRAS):
        assert locked(name).items() <= constraints.items(), f"{name}: bash ops/lock"
    tools = locked("tools")
    assert {each: tools[each] for each in tools.keys() & constraints.keys()}.items() <= constraints.items()


@pytest.mark.parametrize("path", sorted(LOCKS.glob("*.txt")), ids=lambda path: path.stem)
def test_every_locked_package_has_hashes(path):
    packages = re.split(r"(?m)^(?=[\w.-]+==)", path.read_text())[1:]
    assert packages
    for package in packages:
        assert re.fullmatch(r"\S+==\S+( \\\n    --hash=sha256:[0-9a-f]{64})+\n", package), package[:80]


def test_the_page_of_licences_is_in_step_and_every_licence_is_known():
    assert licences.page() == licences.PAGE.read_text(), "python ops/licences.py"


def test_every_exception_to_the_audit_has_a_reason():
    lines = (ROOT / "ops" / "advisories.txt").read_text().splitlines()
    exceptions = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"(GHSA|PYSEC|CVE)-\S+ \S.{20,}", line) for line in exceptions)


def test_a_licence_that_nobody_looked_at_is_refused():
    package = {"Name": "some", "Version": "1", "License": "MIT AND GPL-3.0-only"}
    with pytest.raises(ValueError, match="some 1 is under MIT AND GPL"):
        licences.kind(package)
    assert licences.kind({**package, "License": "GPL-3.0-only OR MIT"}) == "permissive"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--colour"], "--colour is not understood"),
        (["--base"], "--base needs a value"),
        (["--extras", "embed everything"], "--extras everything: there is no ops/locks/everything.txt"),
        (["--pip-conf", "missing.conf"], "--pip-conf missing.conf: no such file"),
    ],
)
def test_build_image_refuses_what_it_does_not_know(arguments, said):
    command = ["bash", str(ROOT / "ops" / "build-image"), *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == EXIT_CONFIG
    assert said in done.stderr
