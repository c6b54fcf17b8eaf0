"""Copies of tensors on the CPU that training does not change any more."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Stage:
    """Takes snapshots into buffers that are used again from one to the next.

    One copy of the state is all that it ever holds; the last snapshot is gone once the next is taken. From a
    GPU it copies into page-locked memory, without waiting between the tensors. (Not yet run on a GPU.)
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, state: Any) -> Any:
        """Return plain containers like those given, with every tensor copied to the CPU."""
        devices: set[torch.device] = set()
        taken = self._copy("", state, devices)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        return taken

    def _copy(self, name: str, value: Any, devices: set[torch.device]) -> Any:
        if isinstance(value, Tensor):
            return self._copy_tensor(name, value.detach(), devices)
        if isinstance(value, Mapping):
            taken = copy.copy(value)  # it may carry more, as the versions of modules
            for key, each in value.items():
                taken[key] = self._copy(f"{name}.{key}", each, devices)  # type: ignore[index]  # a dict's copy
            return taken
        if isinstance(value, list | tuple):
            return type(value)(
                self._copy(f"{name}.{index}", each, devices) for index, each in enumerate(value)
            )
        return value

    def _copy_tensor(self, name: str, value: Tensor, devices: set[torch.device]) -> Tensor:
        buffer, on_gpu = self._buffers.get(name), value.device.type == "cuda"
        if buffer is None or (buffer.shape, buffer.dtype) != (value.shape, value.dtype):
            buffer = torch.empty_like(value, device="cpu", pin_memory=on_gpu)
            self._buffers[name] = buffer
        buffer.copy_(value, non_blocking=on_gpu)
        if on_gpu:
            devices.add(value.device)
        return buffer
