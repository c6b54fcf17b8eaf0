"""What became of the tensors of a file: never silently."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Report:
    """What was taken of a file, and what was not.

    Attributes:
        layout: whose way to lay down weights it is.
        prefix: what stands before the trunk's names there.
        trunk: what it is, as `resnet50 at width 2`.
        loaded: tensors of the trunk that were there, counters of batch norms among them.
        beside: tensors of projection head, prototypes and classifier that a network can take, by group.
        left_over: tensors that nobody takes, by group: optimizer, queue, fc, other networks by their prefix.
        missing: counters of batch norms that were not there, and begin at 0; nothing else may be missing.
        cast: tensors of the trunk of another type than float32, by type.
        notes: what else is worth a word.
    """

    layout: str
    prefix: str
    trunk: str
    loaded: int
    beside: Mapping[str, int] = field(default_factory=dict)
    left_over: Mapping[str, int] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    cast: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = f"{self.layout} (below {self.prefix.rstrip('.')})" if self.prefix else self.layout
        parts = [f"{self.trunk}, all {self.loaded} tensors, laid down as by {where}"]
        if self.missing:
            parts.append(f"{len(self.missing)} counters of batch norms missing, which begin at 0")
        if self.cast:
            parts.append(f"brought to float32: {_list(self.cast)}")
        if self.beside:
            parts.append(f"beside the trunk: {_list(self.beside)}")
        if self.left_over:
            parts.append(f"left over: {_list(self.left_over)}")
        return "; ".join([*parts, *self.notes])


def _list(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())
