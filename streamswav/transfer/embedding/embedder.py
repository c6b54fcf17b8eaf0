"""What a network says of an image on its own: features, embedding, scores, cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from streamswav.config import StorageSection
from streamswav.errors import ConfigError
from streamswav.models import SwAVNetwork
from streamswav.transfer.weights.trunks import TrunkInfo, open_network, open_trunk

WHAT = ("features", "embeddings", "scores", "clusters", "codes")
"""What can be asked for; all but features need projection head and prototypes."""


@dataclass(frozen=True)
class Wanted:
    """What is computed of an image.

    Attributes:
        what: of `WHAT`.
        top: clusters that are kept of a code.
        float16: round to half precision at the end.
    """

    what: tuple[str, ...] = ("features",)
    top: int = 8
    float16: bool = False

    def check(self) -> None:
        """Refuse what cannot be computed.

        Raises:
            ConfigError: naming the option.
        """
        for each in self.what:
            if each not in WHAT:
                raise ConfigError("--what", f"must be of {', '.join(WHAT)}", value=each)
        if not self.what or len(set(self.what)) != len(self.what):
            raise ConfigError("--what", "name each thing once", value=",".join(self.what))


class Embedder(nn.Module):
    """A network that gives what is wanted of it, in eval mode; an image's outputs are its own.

    Sinkhorn's codes balance a whole batch over the prototypes, so no image has one of its own. What stands
    for it is what the network was trained to predict it with: the softmax of the scores over the run's
    temperature (paper, equation 2). Its largest entry is the cluster.

    Args:
        trunk: images [B, 3, S, S] to features [B, F].
        network: trunk, projection head and prototypes; None where only features are wanted.
        wanted: outputs.
        temperature: of the softmax.
    """

    def __init__(
        self, trunk: nn.Module, network: SwAVNetwork | None, wanted: Wanted, *, temperature: float
    ) -> None:
        super().__init__()
        self.trunk, self._wanted, self._temperature = trunk, wanted, temperature
        self.head = network.projection_head if network else None
        self.prototypes = network.prototypes if network else None
        if self.prototypes is not None:
            self.prototypes.normalise_()  # as the next step of training would
            if "codes" in wanted.what and not 1 <= wanted.top <= len(self.prototypes.weight):
                reason = f"the network has {len(self.prototypes.weight)} prototypes"
                raise ConfigError("--top", f"must be from 1 on; {reason}", value=wanted.top)
        self.eval()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return for normalised images [B, 3, S, S] what is wanted.

        `features` [B, F], `embeddings` [B, D] of unit length, `scores` [B, K] (cosines with the prototypes),
        `clusters` int32 [B] (the best prototype), `codes` [B, top] and `code_clusters` int32 [B, top] (the
        softmax's largest entries, falling, and whose they are).
        """
        features: Tensor = self.trunk(images)
        outputs = {"features": features}
        if self.head is not None and self.prototypes is not None:
            outputs["embeddings"] = embeddings = F.normalize(self.head(features), dim=1)
            outputs["scores"] = scores = self.prototypes(embeddings)
            outputs["clusters"] = scores.argmax(dim=1)
            if "codes" in self._wanted.what:
                best = (scores / self._temperature).softmax(dim=1).topk(self._wanted.top, dim=1)
                outputs["codes"], outputs["code_clusters"] = best.values, best.indices
        return {name: self._store(outputs[name]) for name in output_names(self._wanted.what)}

    def describe(self) -> Mapping[str, object]:
        """Return what decides the outputs, beside the weights."""
        codes = {"temperature": self._temperature, "top": self._wanted.top}
        return {
            "what": list(self._wanted.what),
            "precision": "float16" if self._wanted.float16 else "float32",
            "codes": codes if "codes" in self._wanted.what else None,
        }

    def _store(self, output: Tensor) -> Tensor:
        if not output.is_floating_point():
            return output.int()
        return output.half() if self._wanted.float16 else output.float()


def open_embedder(checkpoint: str, wanted: Wanted, *, storage: StorageSection) -> tuple[Embedder, TrunkInfo]:
    """Return a network that gives what is wanted, on the CPU, and where it comes from.

    Raises:
        CheckpointError: there is no such checkpoint, or none with head and prototypes where they are needed.
        ConfigError: `wanted` asks for what there is not.
        StorageError: a location that cannot be read.
    """
    wanted.check()
    if wanted.what == ("features",):
        trunk, info = open_trunk(checkpoint, storage=storage)
        return Embedder(trunk, None, wanted, temperature=info.config.swav.temperature), info
    network, info = open_network(checkpoint, storage=storage)
    return Embedder(network.trunk, network, wanted, temperature=info.config.swav.temperature), info


def output_names(what: Sequence[str]) -> list[str]:
    """Return the names of the outputs, in their order."""
    return [*what, *(["code_clusters"] if "codes" in what else [])]
