"""MoESpec: what one MoE layer is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from moe_interp.arch.experts import ExpertFunctions
from moe_interp.arch.modules import child
from moe_interp.arch.products import linear
from moe_interp.arch.rules import RoutingRule
from moe_interp.types import Layer

if TYPE_CHECKING:
    from moe_interp.arch.families import Family


@dataclass(frozen=True, eq=False, kw_only=True)
class MoESpec:
    """One MoE layer: its modules in the transformers model, its sizes and its routing rule.

    Attributes:
        family: The family's row of the table.
        layer: The layer's label.
        container: The transformers module that holds router and experts.
        router, experts: The modules themselves, inside of any TransformerLens wrapper (``experts`` is the container
            itself where a family keeps its expert weights there).
        shared: The shared experts as the layer calls them (the wrapper, where there is one), or None.
        shared_gate: Their sigmoid gate, or None.
        n_experts, top_k, d_model, d_expert, n_shared_experts: Sizes; ``n_shared_experts`` counts as the configuration
            does (a fused shared expert of several experts' width counts as that many).
    """

    family: Family
    layer: Layer
    container: nn.Module
    router: nn.Module
    experts: nn.Module
    shared: nn.Module | None
    shared_gate: nn.Module | None
    n_experts: int
    top_k: int
    d_model: int
    d_expert: int
    n_shared_experts: int

    @property
    def rule(self) -> RoutingRule:
        """The layer's routing rule, with its correction biases and scales as they are now."""
        return self.rule_for(self.expert_dtype)

    def rule_for(self, hidden_dtype: torch.dtype) -> RoutingRule:
        """The rule for hidden states of a given number format (some families cast their weights to it)."""
        return self.family.rule(self.router, self.container, self.n_experts, self.top_k, hidden_dtype)

    @property
    def expert_functions(self) -> ExpertFunctions:
        """The experts' two linear maps as functions of one expert's rows."""
        return self.family.experts(self.experts)

    @property
    def expert_dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.experts.parameters() if p.ndim > 1)

    @property
    def weight_on_input(self) -> bool:
        """Whether a slot's weight scales the expert's input instead of its output (Llama 4)."""
        return self.family.weight_on_input

    @property
    def project(self) -> Callable[[Tensor], Tensor] | None:
        """The map from the experts' latent width to d_model, without its bias; None where experts write d_model."""
        weight = getattr(self._projection, "weight", None)
        return None if weight is None else partial(linear, weight=weight)

    @property
    def project_bias(self) -> Tensor | None:
        """The bias of that map, added once to the weighted sum."""
        return getattr(self._projection, "bias", None)

    @property
    def _projection(self) -> nn.Module | None:
        return None if self.family.latent is None else child(self.container, self.family.latent)

    def materialized(self) -> AbstractContextManager[Any]:
        """Parameters that accelerate has offloaded are real inside; free where nothing is offloaded."""
        modules = [m for m in self.experts.modules() if hasattr(m, "_hf_hook")]
        stack = ExitStack()
        for module in modules:
            stack.enter_context(align_module_device(module))
        return stack

    @property
    def block_scale(self) -> float:
        """The factor that the block applies to the weighted sum after the experts (Laguna); 1 elsewhere."""
        name = self.family.block_scale
        return 1.0 if name is None else float(getattr(self.container, name))
