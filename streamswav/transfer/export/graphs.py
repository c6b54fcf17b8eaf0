"""A trunk as a graph of operators, for programs without this package: ONNX and torch.export.

Both take any number of images, in float32. ONNX takes them in any size. torch.export looks at memory formats
while it traces, which are others for maps of one pixel: so the size must be such that the last map has more
pixels than one, as it has at the run's crops; or one, where it has one there.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from streamswav.errors import ConfigError
from streamswav.models import Trunk

OPSET = 18
INPUT = "images"

_PACKAGES = ("onnx", "onnxscript")
_MOST_BYTES = 1 << 30  # protocol buffers end at 2 GiB
_AXES = {0: "batch", 2: "height", 3: "width"}
_EXTRA_FILE = "export.json"


class Classified(nn.Module):
    """A finetuned trunk with its linear classifier.

    Args:
        trunk: images [B, 3, S, S] to features [B, F].
        classifier: its weights: `weight` [C, F] and `bias` [C].
    """

    def __init__(self, trunk: nn.Module, classifier: Mapping[str, Tensor]) -> None:
        super().__init__()
        classes, features = classifier["weight"].shape
        self.trunk = trunk
        self.fc = nn.Linear(features, classes)
        self.fc.load_state_dict(dict(classifier))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features [B, F] and class scores [B, C]."""
        features = self.trunk(images)
        return features, self.fc(features)


def check_onnx() -> None:
    """Look for what ONNX needs.

    Raises:
        ConfigError: it is not installed.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        reason = f"{' and '.join(missing)} not installed: pip install {' '.join(_PACKAGES)}"
        raise ConfigError("--to", reason, value="onnx")


def write_onnx(module: nn.Module, path: Path, *, size: int, about: Mapping[str, str]) -> None:
    """Write and check an ONNX model whose input is `images` and whose outputs are `outputs(module)`.

    Weights of more than 1 GiB go to a file of their own beside it, `<name>.data`.

    Args:
        module: in eval mode, on the CPU.
        path: of the file.
        size: S of the images that it is traced with.
        about: becomes the model's metadata.
    """
    import onnx  # noqa: PLC0415 an optional dependency

    axes = {axis: torch.export.Dim(name) for axis, name in _AXES.items()}
    program = torch.onnx.export(
        module,
        (_example(size),),
        dynamo=True,
        input_names=[INPUT],
        output_names=list(outputs(module)),
        dynamic_shapes={INPUT: axes},
        opset_version=OPSET,
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props.update(about)
    program.save(path, external_data=_bytes_of(module) > _MOST_BYTES)
    onnx.checker.check_model(str(path), full_check=True)


def write_program(module: nn.Module, path: Path, *, size: int, about: str) -> None:
    """Write a program that `torch.export.load(path).module()` gives back; arguments as `write_onnx`.

    Args:
        module: in eval mode, on the CPU.
        path: of the file.
        size: S of the images that it is traced with.
        about: text that lies in the archive as `export.json`.
    """
    axes = dict.fromkeys(_AXES, torch.export.Dim.AUTO)
    program = torch.export.export(module, (_example(size),), dynamic_shapes={INPUT: axes})
    torch.export.save(program, path, extra_files={_EXTRA_FILE: about})
    read = torch.export.load(path).module()
    images = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(read(images), module(images))


def sizes_taken(trunk: Trunk, size: int) -> str:
    """Say in words which images a program takes that was traced with those of `size` pixels."""
    stages = (trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4)
    halved = sum(not isinstance(each, nn.Identity) for each in (trunk.maxpool, *stages[1:]))
    stride = int(trunk.conv1.stride[0]) << halved
    return f"more than {stride}" if size > stride else f"at most {stride}"


def outputs(module: nn.Module) -> tuple[str, ...]:
    """Return the names of what a graph gives."""
    return ("features", "scores") if isinstance(module, Classified) else ("features",)


def _example(size: int) -> Tensor:
    return torch.zeros(2, 3, size, size)


def _bytes_of(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
