"""Forward passes whose activations are computed again for the backward pass, to save memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def recompute(part: nn.Module, images: Tensor) -> Tensor:
    """Return `part(images)`, of which only the input is kept; the rest is computed again when it is needed.

    Batch statistics are those of the same images both times, so the result is the same to the bit. The
    running statistics of batch norms are updated once, by the first pass.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _resting_statistics(part)

    if not torch.is_grad_enabled():
        result: Tensor = part(images)
        return result
    # Nothing here draws random numbers, so their state need not be kept.
    kept: Callable[..., Tensor] = checkpoint
    return kept(part, images, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def features_in_chunks(trunk: nn.Module, images: Tensor, chunks: int) -> Tensor:
    """Return `trunk(images)`, [B, F]; in several chunks, of which the backward pass computes each anew."""
    if chunks == 1:
        features: Tensor = trunk(images)
        return features
    return torch.cat([recompute(trunk, chunk) for chunk in images.chunk(chunks)])


@contextmanager
def _resting_statistics(part: nn.Module) -> Iterator[None]:
    """Normalise by the statistics of the batch and take note of them in copies, which are thrown away.

    Without running statistics a batch norm would save fewer tensors than before, and `checkpoint` refuse it.
    """
    norms = [each for each in part.modules() if isinstance(each, _BatchNorm)]
    kept = [dict(each._buffers) for each in norms]
    for each, buffers in zip(norms, kept, strict=True):
        each._buffers.update({name: held.clone() for name, held in buffers.items() if held is not None})
    try:
        yield
    finally:
        for each, buffers in zip(norms, kept, strict=True):
            each._buffers.update(buffers)
