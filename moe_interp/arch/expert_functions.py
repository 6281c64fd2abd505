"""The experts of a layer as two functions, whatever way the family stores them.

``hidden(rows, e)``: ``[row, d_in] -> [row, d_expert]``, the neurons after the activation.
``output(hidden, e)``: ``[row, d_expert] -> [row, d_out]``, before the slot's weight.
``hidden_of_groups``, ``output_of_groups``: the same for rows of all experts at once, where their weights are stacks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.integrations import moe as transformers_moe

from moe_interp.arch.grouped_products import RowGroups, grouped_linear
from moe_interp.arch.modules import config_value, is_native, is_watched, native_part, own_class

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""``(rows, weight, bias)`` to rows, as ``torch.nn.functional.linear``."""

# what transformers gives an experts class that has no gate of its own: act(gate) * up
_PLAIN_GATE = getattr(transformers_moe, "_default_apply_gate", object())


class ExpertFunctions(Protocol):
    """What a layer's experts compute, one expert at a time."""

    n_experts: int
    d_expert: int

    def hidden(self, rows: Tensor, expert: int) -> Tensor: ...

    def output(self, hidden: Tensor, expert: int) -> Tensor: ...


class StackedFunctions(ABC):
    """Experts whose weights are stacks: the same functions of rows of all experts at once, by grouped products."""

    n_experts: int

    stacks: tuple[Tensor, Tensor]
    """The weights ``[expert, ...]`` of both maps."""

    called: tuple[Any, ...]
    """What is called in between, with the rows of one expert or of all."""

    linear: Linear
    """The product of one expert's rows."""

    @property
    def is_watched(self) -> bool:
        """Whether somebody looks at the calls in between, which a loop makes for one expert at a time."""
        return any(isinstance(part, nn.Module) and is_watched(part) for part in self.called)

    def _linear(self, rows: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
        if not transposed:
            return self.linear(rows, weight, bias)
        out = self.linear(rows, weight.t(), None)
        return out if bias is None else out + bias  # rounded in two steps, as those families do

    @abstractmethod
    def hidden_of_groups(self, rows: Tensor, groups: RowGroups) -> Tensor:
        """``[row, d_expert]``, the neurons of rows sorted by expert."""

    @abstractmethod
    def output_of_groups(self, hidden: Tensor, groups: RowGroups) -> Tensor:
        """``[row, d_out]``, their outputs before a weight."""


def unreadable(experts: nn.Module, *parts: nn.Module) -> str | None:
    """Why experts cannot be computed from their weights, in words; None where they can.

    Args:
        experts: The module that the block calls.
        parts: The modules that hold the weights, where it is not that one.
    """
    for module in parts or (experts,):
        name, inner = own_class(module).__name__, native_part(module)
        if not is_native(module):
            if inner is module:
                return f"the experts are of the class {name}, whose weights it cannot read"
            return f"an adapter or a wrapper of the class {name} is around the experts"
        if any(p.ndim > 1 and _is_packed(p) for p in module.parameters(recurse=False)):
            return f"the weights of {name} are packed"
    return None


def sizes(module: Any) -> tuple[int, int]:
    """Number of experts and neurons an expert, from what any experts module says of itself; 0 where it says nothing."""
    down = module._parameters.get("down_proj")
    if is_native(module) and down is not None and down.ndim == 3 and not _is_packed(down):
        return down.shape[0], down.shape[1 if getattr(module, "is_transposed", False) else 2]
    n_experts, d_expert = (
        next((n for name in names if type(n := getattr(module, name, None)) is int), 0) for names in _SIZES
    )
    return n_experts, d_expert or int(config_value(module, *_SIZES[1], default=0))


_SIZES = (
    ("num_experts", "n_experts", "num_local_experts"),
    ("intermediate_dim", "intermediate_size", "expert_dim", "moe_intermediate_size"),
)


def _is_packed(weight: Tensor) -> bool:
    return not weight.is_floating_point() or weight.element_size() < 2


class StackedExperts(StackedFunctions):
    """transformers' stacked experts: 3-D weights, with or without gate, bias and transposition."""

    def __init__(self, module: Any, linear: Linear = nn.functional.linear) -> None:
        self.module, self.linear = module, linear
        self.up = module.gate_up_proj if module.has_gate else module.up_proj
        self.up_bias = (
            (module.gate_up_proj_bias if module.has_gate else module.up_proj_bias) if module.has_bias else None
        )
        # once each: a parametrized weight is computed anew whenever it is asked for
        self.down, self.down_bias = module.down_proj, getattr(module, "down_proj_bias", None)
        self.stacks = self.up, self.down
        self.called = getattr(module, "act_fn", None), getattr(module, "post_expert_norm", None)
        self.n_experts = self.up.shape[0]
        self.d_expert = self.down.shape[1 if module.is_transposed else 2]
        self.d_out = self.down.shape[2 if module.is_transposed else 1]
        self.gates_plainly = getattr(type(module), "_apply_gate", None) is _PLAIN_GATE

    def hidden(self, rows: Tensor, expert: int) -> Tensor:
        bias = None if self.up_bias is None else self.up_bias[expert]
        return self._activated(self._linear(rows, self.up[expert], bias, self.module.is_transposed))

    def hidden_of_groups(self, rows: Tensor, groups: RowGroups) -> Tensor:
        return self._activated(grouped_linear(rows, groups, self.up, self.up_bias, self.module.is_transposed))

    def _activated(self, projected: Tensor) -> Tensor:
        if not self.module.has_gate:
            return self.module.act_fn(projected)
        if self.gates_plainly and not torch.is_grad_enabled():
            gate, up = projected.chunk(2, dim=-1)
            activated = self.module.act_fn(gate)
            # the same bits in place, unless somebody may have kept them
            return activated * up if getattr(self.module.act_fn, "_forward_hooks", None) else activated.mul_(up)
        return self.module._apply_gate(projected)

    def output(self, hidden: Tensor, expert: int) -> Tensor:
        bias = None if self.down_bias is None else self.down_bias[expert]
        return self._normed(self._linear(hidden, self.down[expert], bias, self.module.is_transposed))

    def output_of_groups(self, hidden: Tensor, groups: RowGroups) -> Tensor:
        return self._normed(grouped_linear(hidden, groups, self.down, self.down_bias, self.module.is_transposed))

    def _normed(self, out: Tensor) -> Tensor:
        return self.module.post_expert_norm(out) if getattr(self.module, "has_post_expert_norm", False) else out


class GatedStacks(StackedFunctions):
    """Two stacks of maps without a bias, the first for gate and neurons side by side.

    Args:
        up: ``[expert, 2 * d_expert, d_in]``; ``transposed`` ``[expert, d_in, 2 * d_expert]``.
        down: ``[expert, d_out, d_expert]``; ``transposed`` ``[expert, d_expert, d_out]``.
        activation: Of the gate.
        transposed: Which of the two the stacks are.
        linear: The product of one expert's rows.
    """

    def __init__(self, up: Tensor, down: Tensor, activation: Any, *, transposed: bool, linear: Linear) -> None:
        self.linear = linear
        self.up, self.down, self.activation, self.transposed = up, down, activation, transposed
        self.stacks, self.called = (up, down), (activation,)
        self.n_experts, self.d_expert = down.shape[0], down.shape[1 if transposed else 2]

    def hidden(self, rows: Tensor, expert: int) -> Tensor:
        return self._activated(self._linear(rows, self.up[expert], None, self.transposed))

    def output(self, hidden: Tensor, expert: int) -> Tensor:
        return self._linear(hidden, self.down[expert], None, self.transposed)

    def hidden_of_groups(self, rows: Tensor, groups: RowGroups) -> Tensor:
        return self._activated(grouped_linear(rows, groups, self.up, None, self.transposed))

    def output_of_groups(self, hidden: Tensor, groups: RowGroups) -> Tensor:
        return grouped_linear(hidden, groups, self.down, None, self.transposed)

    def _activated(self, projected: Tensor) -> Tensor:
        gate, up = projected.chunk(2, dim=-1)
        return self.activation(gate) * up


def llama4_experts(module: Any, linear: Linear = nn.functional.linear) -> GatedStacks:
    """Llama 4: transposed stacks; the block scales the input of an expert, not its output."""
    return GatedStacks(module.gate_up_proj, module.down_proj, module.act_fn, transposed=True, linear=linear)


def llama4_sizes(module: Any) -> tuple[int, int]:
    down = module._parameters.get("down_proj")
    if down is None or not is_native(module) or _is_packed(down):
        return sizes(module)
    return down.shape[0], down.shape[1]


def jetmoe_experts(block: Any, linear: Linear = nn.functional.linear) -> GatedStacks:
    """JetMoE: the stacks belong to two linear maps of the block."""
    stacks = block.input_linear.weight, block.output_linear.weight
    return GatedStacks(*stacks, block.activation, transposed=False, linear=linear)


def jetmoe_sizes(block: Any) -> tuple[int, int]:
    out: Any = native_part(block.output_linear)
    return out.num_experts, out.input_size


class SwitchExperts:
    """Switch Transformers: one ungated feed-forward module an expert, which multiplies by itself."""

    def __init__(self, module: nn.ModuleDict, linear: Linear = nn.functional.linear) -> None:
        self.module = module
        self.n_experts, self.d_expert = switch_sizes(module)

    def hidden(self, rows: Tensor, expert: int) -> Tensor:
        layer: Any = self.module[f"expert_{expert}"]
        return layer.act(layer.wi(rows))

    def output(self, hidden: Tensor, expert: int) -> Tensor:
        layer: Any = self.module[f"expert_{expert}"]
        hidden = layer.dropout(hidden)
        if hidden.dtype != layer.wo.weight.dtype and layer.wo.weight.dtype != torch.int8:
            hidden = hidden.to(layer.wo.weight.dtype)
        return layer.wo(hidden)


def switch_sizes(module: Any) -> tuple[int, int]:
    first = getattr(module, "expert_0", None)
    return sizes(module) if first is None else (len(module), first.wi.out_features)
