"""The Kubernetes part of the runbook: values that the chart takes, flags that helm and kubectl know."""

import re
import shlex
import subprocess

import pytest
import yaml
from charts import CHART, OPS, RUN, load_make

make = load_make()
PART = (OPS / "runbook.md").read_text().partition("\n## On Kubernetes\n")[2]
CHART_PAGE = (CHART / "README.md").read_text()


def lines(page, fence):
    for block in re.findall(fence, page, re.DOTALL | re.MULTILINE):
        yield from (line.strip() for line in block.replace("\\\n", " ").splitlines() if line.strip())


COMMANDS = sorted({*lines(PART, r"```bash\n(.*?)```")})
OF = {tool: [each for each in COMMANDS if each.startswith(tool)] for tool in ("helm", "kubectl")}


def help_of(program, *words):
    done = subprocess.run([program, *words, "--help"], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def flags(words):
    """What a command is told, up to `--`, after which it is another's."""
    words = words[: words.index("--")] if "--" in words else words
    return [word.partition("=")[0] for word in words if word.startswith("-")]


@pytest.mark.parametrize("command", OF["helm"])
def test_each_helm_command_is_one_that_helm_and_the_chart_take(command, tmp_path):
    _, verb, release, *rest = shlex.split(command)
    known = help_of(make.find_helm(), verb)
    assert all(flag in known for flag in flags(rest)), command
    if verb not in ("install", "upgrade"):
        return
    (tmp_path / "my-run.yaml").write_text(yaml.safe_dump(RUN))
    given = [word.replace("my-run.yaml", str(tmp_path / "my-run.yaml")) for word in rest[1:]]
    given = [word for word in given if word not in ("--create-namespace",)]
    assert rest[0] == "ops/helm/streamswav"
    done = subprocess.run(
        [make.find_helm(), "template", release, str(CHART), *given],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", OF["kubectl"])
def test_each_kubectl_command_is_one_that_kubectl_takes(command):
    words = shlex.split(command)[1:]
    namespace, words = (words[:2], words[2:]) if words[0] == "-n" else ([], words)
    assert namespace in ([], ["-n", "NS"])
    known = help_of(make.beside_python("kubectl"), words[0])
    for flag in flags(words):
        assert re.search(rf"(^|[\s,]){re.escape(flag)}[=,:]", known, re.MULTILINE), f"{flag} of {command}"


def test_every_command_is_looked_at():
    others = [each for each in COMMANDS if each.split()[0] not in OF]
    assert {each.split()[0] for each in others} == {"aws"}
    assert len(OF["helm"]) > 5
    assert len(OF["kubectl"]) > 5


def test_every_value_that_a_page_names_is_one_of_the_chart():
    known = {row.split("`")[1] for row in make.rows(make.own_schema()["properties"], make.defaults())}
    sections = {key.split(".")[0] for key in known} | {"config"}
    named = re.findall(r"`([a-z]+[A-Za-z]*(?:\.[a-zA-Z_]+)+)", PART + CHART_PAGE)
    named = [each for each in named if each.split(".")[0] in sections and not each.startswith("config.")]
    assert len(named) > 20
    assert [each for each in named if each not in known and not each.endswith((".yaml", ".json"))] == []
