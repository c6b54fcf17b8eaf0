"""How gradients move the weights of a network, whatever it learns: backward pass, update, state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm
from torch.optim.optimizer import Optimizer

from streamswav.errors import CheckpointError, ConfigError
from streamswav.training.distributed import Ranks
from streamswav.training.masking import Undo
from streamswav.training.phases import PhaseClock


@dataclass(frozen=True)
class StepResult:
    """What a step leaves for logs and health, all detached and on the device; reading it waits.

    Attributes:
        loss: scalar, of this rank's batch.
        grad_norm: norm of all gradients together.
        skipped: boolean scalar, the same on all ranks: loss or gradient was not finite on one of them, and
            weights, momenta, running statistics and whatever else a step changes are as before it.
        look: all ranks read after this step which steps counted, whoever logs or saves.
    """

    loss: Tensor
    grad_norm: Tensor
    skipped: Tensor
    look: bool = False


class Learner:
    """A network and its optimizer, and how a step moves the one by the other.

    Args:
        network: wrapped in DistributedDataParallel where there are several ranks.
        optimizer: over the network's parameters. A group's rate is the step's, times its `rate_scale`.
        scaler: loss scaling, for float16.
        autocast: type of the forward pass; None: the parameters'.
        undo: tensors beside the running statistics that a forward pass changes.

    Attributes:
        clock: is told where a step is; whoever wants to know gives it its own.
    """

    own_state: ClassVar[tuple[str, ...]] = ()
    """Names of what of `state_dict` is each rank's own."""

    def __init__(
        self,
        network: nn.Module,
        optimizer: Optimizer,
        *,
        scaler: torch.amp.GradScaler | None = None,
        autocast: torch.dtype | None = None,
        undo: Iterable[Tensor] = (),
    ) -> None:
        self.network = network
        self.optimizer = optimizer
        self._device_type = next(network.parameters()).device.type
        self._scaler = scaler or torch.amp.GradScaler(self._device_type, enabled=False)
        self._autocast = autocast
        self._undo = Undo([*running_statistics(self.module), *undo])
        self.clock = PhaseClock()
        if isinstance(network, DistributedDataParallel):
            # The gradient of what comes first in the network is there last: what then is still exchanged is
            # waited for. A hook of the exchange itself would see more, but also change how it is computed.
            first = next(each for each in network.parameters() if each.requires_grad)
            first.register_post_accumulate_grad_hook(self._await_others)  # type: ignore[no-untyped-call]

    @property
    def module(self) -> nn.Module:
        """The network without its wrapper."""
        wrapped = isinstance(self.network, DistributedDataParallel)
        return cast("nn.Module", self.network.module if wrapped else self.network)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain containers, fit for `weights_only` loading."""
        return {
            "network": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            CheckpointError: the state is that of another network or optimizer.
        """
        try:
            self.module.load_state_dict(state["network"])
            self._load_optimizer(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise of_another_model(error) from None
        if state["scaler"]:
            self._scaler.load_state_dict(state["scaler"])

    def own_part(
        self, by_rank: Sequence[Mapping[str, Any]], ranks: Ranks, *, saved: int, batch: int
    ) -> dict[str, Any]:
        """Return this rank's own part of the state, of those that all ranks saved.

        Args:
            by_rank: what each of them saved under `own_state`.
            ranks: that there are now.
            saved: the global batch of then.
            batch: the global batch of now.
        """
        raise NotImplementedError

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        """Take over the momenta; weight decay and the like are what is configured now."""
        configured = [dict(group) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state)
        for group, settings in zip(self.optimizer.param_groups, configured, strict=True):
            group.update(settings)

    @contextmanager
    def _forward_pass(self) -> Iterator[None]:
        """Compute in the configured precision."""
        enabled = self._autocast is not None
        with torch.autocast(self._device_type, dtype=self._autocast, enabled=enabled), _naming_too_few():
            yield

    def _backward(self, loss: Tensor) -> None:
        """Compute the gradient. Where the loss is not finite all of it is made NaN.

        So every rank sees it in the gradient that they share, and none needs to be told.
        """
        self.optimizer.zero_grad()
        slope = torch.where(loss.detach().isfinite(), 1.0, torch.nan)
        self._scaler.scale(loss).backward(slope)  # type: ignore[no-untyped-call]  # torch leaves backward untyped

    def _await_others(self, _: Tensor) -> None:
        """Note that this rank's gradient is complete."""
        self.clock.enter("allreduce")

    def _update(self, rate: float) -> tuple[Tensor, Tensor]:
        """Move the parameters unless the norm of their unscaled gradients is not finite.

        Returns:
            The norm, and whether the step was skipped.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("rate_scale", 1.0)
        self._scaler.unscale_(self.optimizer)
        norm = get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])
        skipped = norm.isfinite().logical_not()
        # What a GradScaler hands over; ours is asked only for the scale, since it knows overflow alone.
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]  # torch sets these two on all of them
        self.optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self._scaler.update()
        return norm, skipped

    @contextmanager
    def _buffers_kept(self) -> Iterator[None]:
        """Leave the network's buffers as they were."""
        kept = [(buffer, buffer.clone()) for buffer in self.module.buffers()]
        yield
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)


@contextmanager
def _naming_too_few() -> Iterator[None]:
    """Make a mistake of the user's of what a batch norm says that has one value to take statistics of."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        reason = "too few images at once for batch statistics: a larger batch a rank, or fewer micro_batches"
        raise ConfigError("training.batch", reason) from None


def of_another_model(error: Exception) -> CheckpointError:
    """Make what users are told of what torch says of a state that does not fit."""
    reason = " ".join(str(error).split())
    return CheckpointError(f"the checkpoint is of another model: {reason}")


def running_statistics(network: torch.nn.Module) -> list[Tensor]:
    """Return the buffers of a network's batch norms."""
    norms = (each for each in network.modules() if isinstance(each, _BatchNorm))
    return [buffer for each in norms for buffer in each.buffers()]
