"""Reading what is recorded off a running pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from moe_interp.errors import HookError
from moe_interp.experiments.capture.options import HOOKS, CaptureOptions
from moe_interp.hooks.attach import MoEHooks
from moe_interp.slots import EMPTY
from moe_interp.types import Hooks, Layer

BY_SLOT = ("expert_indices", "expert_weights", "expert_norms")


def widened(name: str, parts: Sequence[Tensor]) -> list[Tensor]:
    """Parts of one width: an intervention may have widened the routes of some layers or passes."""
    if name not in BY_SLOT:
        return list(parts)
    width = max(part.shape[-1] for part in parts)
    fill = EMPTY if name == "expert_indices" else 0
    return [pad(part, (0, width - part.shape[-1]), value=fill) for part in parts]


class PassRecorder:
    """Hooks that only read, and what they have read of a pass.

    What they read stays where it was computed until :meth:`take`: the host waits for a device once a pass and field.

    Args:
        moe: Attached hooks.
        options: What is recorded of which layers.
    """

    def __init__(self, moe: MoEHooks, options: CaptureOptions) -> None:
        self.layers = options.layers
        self.fields = options.fields
        self.hooks: Hooks = [
            (moe.hook_name(HOOKS[field], layer), self._reader(field, layer))
            for layer in self.layers
            for field in self.fields
        ]
        self._found: dict[str, dict[Layer, Tensor]] = {field: {} for field in self.fields}

    def take(self) -> dict[str, Tensor]:
        """What was read since the last call, ``[batch, pos, layer, ...]`` of each field, on the host.

        Raises:
            HookError: a layer did not run.
        """
        found = {field: self._stacked(field) for field in self.fields}
        self.drop()
        return found

    def drop(self) -> None:
        """Forget what was read, such as that of a pass that failed."""
        self._found = {field: {} for field in self.fields}

    def _stacked(self, field: str) -> Tensor:
        by_layer = self._found[field]
        if missing := [layer for layer in self.layers if layer not in by_layer]:
            raise HookError(
                f"hook {HOOKS[field]} at layer {missing[0]!r}, which did not fire",
                "a pass that runs through every recorded layer",
                "Check what replaces or skips the layer.",
            )
        values = [by_layer[layer] for layer in self.layers]
        values = widened(field, values)
        if len({value.device for value in values}) > 1:
            values = [value.cpu() for value in values]
        return torch.stack(values, dim=2).cpu()

    def _reader(self, field: str, layer: Layer) -> Any:
        def read(value: Tensor, *, hook: Any) -> None:
            value = value.detach()
            if field == "expert_norms":
                value = torch.linalg.vector_norm(value if value.dtype == torch.float64 else value.float(), dim=-1)
            self._found[field][layer] = value.int() if field == "expert_indices" else value.clone()

        return read
