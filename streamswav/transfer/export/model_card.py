"""The card beside exported weights: what they are, where they come from, how to load them.

Everything it says is in `export.json` too; the card is made from that alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import yaml

import streamswav
from streamswav.transfer.export.constructors import (
    detectron2_settings,
    is_known_elsewhere,
    timm_lines,
    torchvision_lines,
)
from streamswav.transfer.export.graphs import sizes_taken
from streamswav.transfer.export.source import Source, without_secrets
from streamswav.transfer.extraction.preprocessing import Preprocessing

FORMAT_VERSION = 1

_LICENCE = "Apache-2.0"
_LEVELS = 255


def describe(
    source: Source, preprocessing: Preprocessing, evaluations: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return all facts but those of the files, as plain data without secrets.

    Args:
        source: what is exported.
        preprocessing: of the images that it takes.
        evaluations: results in the schema of `streamswav.transfer.measuring.results`.
    """
    info, section = source.info, source.info.config.model
    own = source.recipe is not None
    facts = {
        "format_version": FORMAT_VERSION,
        "streamswav": streamswav.__version__,
        "source": {
            "checkpoint": info.url,
            "trained_here": own,
            "layout": info.layout,
            "step": info.step,
            "images": info.images,
        },
        "model": {
            "trunk": section.trunk,
            "width": section.width,
            "stem": section.stem,
            "features": source.trunk.feature_dim,
            "classes": source.classes,
            "parameters": sum(each.numel() for each in source.trunk.parameters()),
            "known_elsewhere": is_known_elsewhere(source.trunk),
            "beside_trunk": sorted(source.beside),
        },
        "normalisation": asdict(preprocessing),
        "detectron2": detectron2_settings(source.trunk, section),
        "data": dict(source.data),
        "recipe": source.recipe,
        "results": list(evaluations),
        "licence": {"code": _LICENCE},
        "files": {},
    }
    return dict(without_secrets(facts))


def in_short(facts: Mapping[str, Any]) -> dict[str, str]:
    """Return what a file of weights tells of itself, where its format has a place for text."""
    model, images = facts["model"], facts["normalisation"]
    short = {
        "streamswav": facts["streamswav"],
        "trunk": model["trunk"],
        "width": f"{model['width']:g}",
        "stem": model["stem"],
        "mean": " ".join(map(str, images["mean"])),
        "std": " ".join(map(str, images["std"])),
        "size": str(images["crop"]),
    }
    seen = facts["source"]["images"]
    return short if seen is None else {**short, "images": str(seen)}


def load_lines(name: str, file: str, source: Source, size: int) -> list[str]:
    """Return Python that loads a file of this format and uses it on images of `size` pixels."""
    trunk, section, classes = source.trunk, source.info.config.model, source.classes
    images = f"images = torch.rand(2, 3, {size}, {size})"
    loaded = f'torch.load("{file}", weights_only=True)'
    match name:
        case "onnx":
            zeros = f'numpy.zeros((2, 3, {size}, {size}), "float32")'
            return [
                "import numpy, onnxruntime",
                f'session = onnxruntime.InferenceSession("{file}")',
                f'features, *scores = session.run(None, {{"images": {zeros}}})',
            ]
        case "torch.export":
            taken = f"  # {sizes_taken(trunk, size)} pixels wide and high"
            lines = ["import torch", f'model = torch.export.load("{file}").module()', images + taken]
            return [*lines, "features, scores = model(images)" if classes else "features = model(images)"]
        case "detectron2":
            return ["import torch", f'weights = {loaded}["model"]']
        case "reference":
            lines = torchvision_lines(trunk, section, classes=0)
            bare = '{name.removeprefix("module."): each for name, each in weights.items()}'
            lines += [f"weights = {loaded}", f"weights = {bare}"]
            beside = '("projection_head", "prototypes")'
            trunk_only = f"{{name: weights[name] for name in weights if not name.startswith({beside})}}"
            return [*lines, f"model.load_state_dict({trunk_only})", images, "features = model.eval()(images)"]
    if name == "safetensors":
        loaded = f'safetensors.torch.load_file("{file}")'
    build = timm_lines if name == "timm" else torchvision_lines
    lines = [*build(trunk, section, classes=classes), f"model.load_state_dict({loaded})", images]
    if name == "safetensors":
        lines[0] += ", safetensors.torch"
    use = "scores = model.fc(model.eval()(images))" if _is_apart(source) else "scores = model.eval()(images)"
    return [*lines, use if classes else "features = model.eval()(images)"]


def write_card(facts: Mapping[str, Any]) -> str:
    """Return the card as Markdown."""
    return (
        "\n".join([*_what(facts), *_files(facts), *_images(facts), *_origin(facts), *_licence(facts)]) + "\n"
    )


def _is_apart(source: Source) -> bool:
    """Tell whether the classifier is no part of the forward pass: our own trunks give features."""
    return bool(source.classes) and not is_known_elsewhere(source.trunk)


def _what(facts: Mapping[str, Any]) -> Iterator[str]:
    model = facts["model"]
    wide = "" if model["width"] == 1 else f", width {model['width']:g}"
    stem = "" if model["stem"] == "imagenet" else f", {model['stem']} stem"
    yield f"# {model['trunk']}{wide}{stem}"
    yield ""
    gives = f"Images [B, 3, S, S] to {model['features']:,} features; {model['parameters']:,} parameters."
    yield gives + (f" With a linear classifier of {model['classes']:,} classes." if model["classes"] else "")
    if not model["known_elsewhere"]:
        yield ""
        yield (
            "torchvision and timm have no constructor for this width (`width_per_group` and "
            "`wide_resnet50_2` are other networks): the tensors have their names, the network is built by "
            "`streamswav.models`, and ONNX and torch.export files need nobody to build it."
        )


def _files(facts: Mapping[str, Any]) -> Iterator[str]:
    yield from ("", "## Files", "", "| file | format | bytes | SHA-256 |", "|---|---|---|---|")
    for name, file in facts["files"].items():
        yield f"| `{name}` | {file['format']}, {file['dtype']} | {file['bytes']:,} | `{file['sha256']}` |"
    for name, file in facts["files"].items():
        if not file["load"]:
            continue
        yield from ("", f"### `{name}`", "", "```python", *file["load"], "```")
        if file["format"] == "detectron2":
            yield from ("", *_detectron2(facts, name))


def _detectron2(facts: Mapping[str, Any], file: str) -> Iterator[str]:
    """The settings that go with the weights: detectron2 counts from 0 to 255, and in BGR unless told."""
    images = facts["normalisation"]
    settings = {
        "MODEL": {
            "WEIGHTS": file,
            "PIXEL_MEAN": [round(_LEVELS * each, 3) for each in images["mean"]],
            "PIXEL_STD": [round(_LEVELS * each, 3) for each in images["std"]],
            "RESNETS": facts["detectron2"],
        },
        "INPUT": {"FORMAT": "RGB"},
    }
    yield from ("```yaml", yaml.safe_dump(settings, sort_keys=False, default_flow_style=None).rstrip(), "```")


def _images(facts: Mapping[str, Any]) -> Iterator[str]:
    images = facts["normalisation"]
    mean, std = (tuple(images[name]) for name in ("mean", "std"))
    yield from ("", "## Images", "", "RGB, from 0 to 1, channels first:", "", "```python")
    yield "from torchvision import transforms"
    yield f"resize, crop = transforms.Resize({images['resize']}), transforms.CenterCrop({images['crop']})"
    yield f"normalise = transforms.Normalize({mean}, {std})"
    yield "prepare = transforms.Compose([resize, crop, transforms.ToTensor(), normalise])"
    yield "```"


def _origin(facts: Mapping[str, Any]) -> Iterator[str]:
    source, data = facts["source"], facts["data"]
    yield from ("", "## Training", "", f"From `{source['checkpoint']}`.")
    if not source["trained_here"]:
        yield from ("", f"Read in the layout of {source['layout']}; recipe and data are not known.")
    else:
        yield ""
        yield f"{source['images']:,} images seen in {source['step']:,} steps."
        yield from ("", "```yaml", yaml.safe_dump(facts["recipe"], sort_keys=False).rstrip(), "```")
        yield from ("", "## Data", "")
        yield from (f"- {name.replace('_', ' ')}: {_show(value)}" for name, value in data.items())
    yield from ("", "## Results", "")
    yield from _results(facts["results"]) if facts["results"] else ["None are known."]


def _results(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield from ("| protocol | of | scores | data |", "|---|---|---|---|")
    for each in results:
        used = "; ".join(f"{role}: {' '.join(data['urls'])}" for role, data in each.get("data", {}).items())
        for value in each["values"]:
            scores = ", ".join(f"{name} {_show(score)}" for name, score in value.get("scores", {}).items())
            yield f"| {value.get('protocol', '')} | {value.get('column', '')} | {scores} | {used} |"


def _licence(facts: Mapping[str, Any]) -> Iterator[str]:
    yield from ("", "## Licence", "")
    yield (
        f"The code that wrote these files, streamswav {facts['streamswav']}, is under "
        f"{facts['licence']['code']}. What may be done with the weights depends on the images that they were "
        "trained on."
    )
    if not facts["source"]["trained_here"]:
        yield "Weights that others have published stay under their licence (those of SwAV: CC BY-NC 4.0)."


def _show(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return (
        f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
    )
