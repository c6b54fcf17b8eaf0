"""What a piece of torch code allocates, saves for backward and computes: counted, not run.

Used on fake tensors (shapes and types without memory) it costs no memory and no arithmetic; on real ones it
counts the same, which is how it is checked.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry

FORWARD, OBJECTIVE, BACKWARD, OPTIMIZER = "forward", "objective", "backward", "optimizer"

WEIGHTS, GRADIENTS, STATE, QUEUE, CROPS = "weights", "gradients", "optimizer", "queue", "crops"
ACTIVATIONS, CODES, TEMPORARIES = "activations", "codes", "temporaries"
PARTS = (WEIGHTS, GRADIENTS, STATE, ACTIVATIONS, CODES, QUEUE, CROPS, TEMPORARIES)
"""What bytes are held for; `codes` is all that Sinkhorn and the loss allocate."""


@dataclass(frozen=True)
class Work:
    """One operation: in which phase, floating point operations (a multiply-add is two), bytes it touches."""

    phase: str
    flops: int
    moved: int


@dataclass
class Ledger:
    """Bytes by part, now and at the peak, and the operations that were run.

    Attributes:
        held: bytes by part, now.
        peak: bytes by part at the moment when most was held.
        peak_phase: the phase of that moment.
        saved: bytes that network and objective saved for backward, parameters and crops left out.
        most: bytes that each part held at most, each at its own time.
        work: every operation.
        standing_gradients: bytes of gradients that stay allocated through the step (buckets of DDP); the peak
            is taken with these in place of those that exist.
    """

    held: Counter[str] = field(default_factory=Counter)
    peak: Counter[str] = field(default_factory=Counter)
    peak_phase: str = FORWARD
    saved: int = 0
    most: Counter[str] = field(default_factory=Counter)
    work: list[Work] = field(default_factory=list)
    standing_gradients: int = 0
    phase: str = FORWARD
    _parts: dict[int, str] = field(default_factory=dict)
    _sizes: dict[int, int] = field(default_factory=dict)
    _alive: dict[int, Any] = field(default_factory=dict)

    @property
    def peak_bytes(self) -> int:
        """The most that was held at once."""
        return self.peak.total()

    def flops(self, *phases: str) -> int:
        """Floating point operations of these phases."""
        return sum(each.flops for each in self.work if each.phase in phases)

    def hold(self, tensors: Iterable[Tensor | None], part: str) -> None:
        """Say what tensors are for, counting those that were not seen yet."""
        for tensor in tensors:
            if tensor is not None:
                self.see(tensor)
                self._move(tensor.untyped_storage()._cdata, part)

    def see(self, tensor: Tensor) -> None:
        """Count the storage of a tensor, once, until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._parts:
            return
        part = CODES if self.phase == OBJECTIVE else TEMPORARIES
        size = storage.nbytes()
        self._parts[key], self._sizes[key] = part, size
        self._alive[key] = weakref.ref(storage, lambda _: self._free(key))
        self.held[part] += size
        self._look()

    def save(self, tensor: Tensor) -> None:
        """Note that backward needs a tensor."""
        self.see(tensor)
        key = tensor.untyped_storage()._cdata
        if self._parts[key] == TEMPORARIES and self.phase == FORWARD:
            self.saved += self._sizes[key]
            self._move(key, ACTIVATIONS)
        elif self._parts[key] == CODES:
            self.saved += self._sizes[key]

    def keep(self, results: Iterable[Tensor]) -> None:
        """At the end of the forward pass: what is still there, but its results, waits for the backward pass.

        That is what is computed anew from, which no hook is told of.
        """
        given = {each.untyped_storage()._cdata for each in results}
        for key, part in self._parts.items():
            if part == TEMPORARIES and key not in given:
                self._move(key, ACTIVATIONS)

    def _move(self, key: int, part: str) -> None:
        self.held[self._parts[key]] -= self._sizes[key]
        self.held[part] += self._sizes[key]
        self._parts[key] = part

    def _free(self, key: int) -> None:
        self.held[self._parts.pop(key)] -= self._sizes.pop(key)
        del self._alive[key]

    def _look(self) -> None:
        for part, size in self.held.items():
            self.most[part] = max(self.most[part], size)
        now = self.held.total() + max(0, self.standing_gradients - self.held[GRADIENTS])
        if now > self.peak.total():
            self.peak, self.peak_phase = Counter(self.held), self.phase
            self.peak[GRADIENTS] = max(self.held[GRADIENTS], self.standing_gradients)


@contextmanager
def watch(ledger: Ledger, network: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Count what is done with a network while this is entered.

    The phases follow from hooks: the network's call is the forward pass, what comes after it the objective,
    until a saved tensor is asked for or a gradient is there.
    """

    def enter(phase: str) -> Callable[..., None]:
        def set_phase(*_: Any) -> None:
            ledger.phase = phase

        return set_phase

    def leave(_module: nn.Module, _given: Any, results: Any) -> None:
        ledger.keep(each for each in tree_leaves(results) if isinstance(each, Tensor))
        ledger.phase = OBJECTIVE

    def gradient(parameter: Tensor) -> None:
        ledger.phase = BACKWARD
        ledger.hold([parameter.grad], GRADIENTS)

    def unpack(tensor: Tensor) -> Tensor:
        ledger.phase = BACKWARD
        return tensor

    def pack(tensor: Tensor) -> Tensor:
        ledger.save(tensor)
        return tensor

    handles = [
        network.register_forward_pre_hook(enter(FORWARD)),
        network.register_forward_hook(leave),
        optimizer.register_step_pre_hook(enter(OPTIMIZER)),
        *(
            each.register_post_accumulate_grad_hook(gradient)  # type: ignore[no-untyped-call]  # torch's
            for each in network.parameters()
        ),
    ]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack), _Operations(ledger):
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Notes every operation and what it allocates."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._ledger = ledger

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        made = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        for tensor in made:
            self._ledger.see(tensor)
        if not _is_view(func, given, made):
            moved = sum(each.numel() * each.element_size() for each in (*given, *made))
            flops = count_flops(func, args, kwargs, result)
            self._ledger.work.append(Work(self._ledger.phase, flops, moved))
        return result


def count_flops(func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> int:
    """Floating point operations of one call, by torch's own counts.

    But for the backward of grouped convolutions: there torch's leave the groups out of the weight's gradient.
    """
    packet = getattr(func, "overloadpacket", None)
    if packet is torch.ops.aten.convolution_backward:
        return _convolution_backward(*args, **kwargs)
    count = flop_registry.get(packet)
    return int(count(*args, **kwargs, out_val=result)) if count else 0


def _convolution_backward(
    grad_out: Tensor,
    images: Tensor,
    weight: Tensor,
    _bias: Any,
    _stride: Any,
    _padding: Any,
    _dilation: Any,
    transposed: bool,
    _output_padding: Any,
    _groups: int,
    output_mask: Sequence[bool],
) -> int:
    """Each of the two gradients costs what the forward pass cost."""
    once = conv_flop_count(list(images.shape), list(weight.shape), list(grad_out.shape), transposed)
    return int(once) * (bool(output_mask[0]) + bool(output_mask[1]))


def _is_view(func: Any, given: Sequence[Tensor], made: Sequence[Tensor]) -> bool:
    """Whether nothing was touched: the results are other shapes of what was given."""
    if func._schema.is_mutable or not made:
        return not made
    storages = {each.untyped_storage()._cdata for each in given}
    return all(each.untyped_storage()._cdata in storages for each in made)
