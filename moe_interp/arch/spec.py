"""MoESpec: what one MoE layer is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_interp.arch.expert_functions import ExpertFunctions, Linear, unreadable
from moe_interp.arch.family import Family
from moe_interp.arch.grouped_experts import hidden_of_rows, output_of_rows
from moe_interp.arch.grouped_products import RowGroups
from moe_interp.arch.modules import child, config_value, native_part
from moe_interp.arch.offload import materialized
from moe_interp.arch.rules import RoutingRule
from moe_interp.errors import AttachError, HookError
from moe_interp.types import Layer


@dataclass(frozen=True, eq=False, kw_only=True)
class MoESpec:
    """One MoE layer: its modules in the transformers model, its sizes and its routing rule.

    Only where the layer is, is kept. Modules, sizes and rule are read when asked for, so they are those of the model as
    it is now: with another k, other weights, adapters, or other experts in the place of the old ones.

    Attributes:
        family: The family's row of the table.
        layer: The layer's label.
        container: The transformers module that holds router and experts.
        hf_layer: The transformers layer that holds the container (Gemma 4: the container itself).
        above: The modules that hold the layer, the nearest first: weights may be kept for one of them.
    """

    family: Family
    layer: Layer
    container: nn.Module
    hf_layer: nn.Module
    above: tuple[nn.Module, ...] = ()

    # -- modules ----------------------------------------------------------------------------------------------------
    @property
    def router(self) -> Any:
        """The router as the container calls it, inside of any TransformerLens wrapper; an adapter around it stays."""
        return child(self.container, self.family.router)

    @property
    def experts(self) -> Any:
        """The experts likewise; the container itself where a family keeps their weights there."""
        return child(self.container, self.family.experts_at)

    @property
    def shared(self) -> nn.Module | None:
        """The shared experts as the layer calls them (the wrapper, where there is one), or None."""
        # the outermost module: TransformerLens computes some shared experts itself, without calling the original
        if self.family.shared_on_layer:
            return getattr(self.hf_layer, self.family.shared_on_layer, None)
        return getattr(self.container, self.family.shared, None) if self.family.shared else None

    @property
    def shared_gate(self) -> nn.Module | None:
        """The sigmoid gate of the shared experts, or None."""
        return child(self.container, self.family.shared_gate) if self.family.shared_gate else None

    @property
    def projection(self) -> nn.Module | None:
        """The map from the experts' latent width to d_model; None where experts write d_model."""
        return None if self.family.latent is None else child(self.container, self.family.latent)

    # -- sizes ------------------------------------------------------------------------------------------------------
    @property
    def n_experts(self) -> int:
        return self._n_experts(native_part(self.router))

    def _n_experts(self, router: Any) -> int:
        rows = (p.shape[0] for p in router.parameters() if p.ndim == 2)
        return self.family.sizes(native_part(self.experts))[0] or getattr(router, "num_experts", 0) or next(rows, 0)

    @property
    def top_k(self) -> int:
        """Experts per token."""
        return self.family.top_k(native_part(self.router))

    @property
    def d_model(self) -> int:
        n_experts, router = self.n_experts, native_part(self.router)
        widths = (p.shape[1] for p in router.parameters() if p.ndim == 2 and p.shape[0] == n_experts)
        # packed weights have other shapes
        return next(widths, 0) or int(getattr(router, "hidden_dim", 0) or getattr(self.hf_layer, "hidden_size", 0))

    @property
    def d_expert(self) -> int:
        """Neurons of an expert; 0 where the experts do not say."""
        return self.family.sizes(native_part(self.experts))[1]

    @property
    def n_shared_experts(self) -> int:
        """As the configuration counts: a fused shared expert of several experts' width counts as that many."""
        names = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
        return 0 if self.shared is None else int(config_value(self.container, *names, default=1))

    # -- the rule ---------------------------------------------------------------------------------------------------
    @property
    def rule(self) -> RoutingRule:
        """The layer's routing rule, with its correction biases and scales as they are now."""
        return self.rule_for(self.expert_dtype)

    def rule_for(self, hidden_dtype: torch.dtype) -> RoutingRule:
        """The rule for hidden states of a given number format (some families cast their weights to it).

        Raises:
            AttachError: the router is a stranger, which does not say what its rule is.
        """
        router: Any = native_part(self.router)  # looked for once: this is asked in every hooked pass
        try:
            with self.materialized(router), materialized(self.container, recurse=False, within=self._holders):
                sizes = self._n_experts(router), self.family.top_k(router)
                return self.family.rule(router, self.container, *sizes, hidden_dtype)
        except AttributeError as error:
            raise AttachError(
                f"a router of the class {type(self.router).__name__} at layer {self.layer!r}, of which the rule of "
                f"{self.family.name} cannot be read ({error})",
                "the family's own router, or a wrapper that holds it as a submodule",
                "Merge adapters into the weights, or keep the router in its wrapper.",
            ) from error

    # -- the experts ------------------------------------------------------------------------------------------------
    @property
    def unreadable(self) -> str | None:
        """Why the experts cannot be computed one by one, in words; None where their weights can be read."""
        return unreadable(self.experts, *(child(self.experts, part) for part in self.family.weights_in if part))

    @property
    def expert_functions(self) -> ExpertFunctions:
        """The experts' two linear maps as functions of one expert's rows; call it inside ``reading_experts``.

        Raises:
            HookError: their weights cannot be read.
        """
        return self.expert_functions_by(nn.functional.linear)

    def expert_functions_by(self, linear: Linear) -> ExpertFunctions:
        """:attr:`expert_functions` whose products of one expert's rows are another function's."""
        if reason := self.unreadable:
            raise HookError(
                f"a computation expert by expert at layer {self.layer!r}, but {reason}",
                "experts of the family's own class, with plain weights",
                "Merge adapters into the weights, or load the model unquantised; hooks of the routing work as it is.",
            )
        return self.family.experts(self.experts, linear)

    def experts_in(self, router_in: Tensor) -> Tensor:
        """What the experts read ``[..., d_in]`` where the router reads this ``[..., d_model]``."""
        between = self.family.experts_read
        return router_in if between is None else child(self.container, between)(router_in)

    def outputs_of_rows(self, rows: Tensor, groups: RowGroups) -> Tensor:
        """Experts on rows ``[row, d_in]`` that are sorted by expert: ``[row, d_model]``, before a weight."""
        with self.reading_experts():
            experts, project = self.expert_functions, self.project
            outputs = output_of_rows(experts, hidden_of_rows(experts, rows, groups), groups, rows.shape[-1])
            return outputs if project is None else project(outputs)

    def reading_experts(self) -> AbstractContextManager[Any]:
        """Inside the ``with``, weights of the experts and of their projection that are kept elsewhere are real."""
        return self.materialized(self.experts, self.projection)

    def materialized(self, *modules: nn.Module | None) -> AbstractContextManager[Any]:
        """Inside the ``with``, weights of the layer's modules that are kept elsewhere are real."""
        return materialized(*modules, within=self._holders)

    @property
    def _holders(self) -> tuple[nn.Module, ...]:
        return (self.container, self.hf_layer, *self.above)

    @property
    def expert_dtype(self) -> torch.dtype:
        """The number format of the experts' weights; the router's where theirs is packed."""
        for module in (self.experts, self.router):
            for parameter in module.parameters():
                if parameter.ndim > 1 and parameter.is_floating_point() and parameter.itemsize > 1:
                    return parameter.dtype
        return torch.get_default_dtype()

    @property
    def weight_on_input(self) -> bool:
        """Whether a slot's weight scales the expert's input instead of its output (Llama 4)."""
        return self.family.weight_on_input

    @property
    def project(self) -> Callable[[Tensor], Tensor] | None:
        """The projection to d_model without its bias; call it inside ``reading_experts``."""
        return self.project_by(nn.functional.linear)

    def project_by(self, linear: Linear) -> Callable[[Tensor], Tensor] | None:
        """:attr:`project` by another function's product."""
        weight = getattr(self.projection, "weight", None)
        return None if weight is None else lambda rows: linear(rows, weight, None)

    @property
    def project_bias(self) -> Tensor | None:
        """The bias of that map, added once to the weighted sum."""
        with self.materialized(self.projection):
            return getattr(self.projection, "bias", None)

    @property
    def output_bias(self) -> Tensor | None:
        """The container's bias, added after the weighted sum; None where it has none."""
        with materialized(self.container, recurse=False, within=self._holders):
            return getattr(self.container, self.family.output_bias) if self.family.output_bias else None

    @property
    def block_scale(self) -> float:
        """The factor that the block applies to the weighted sum after the experts (Laguna); 1 elsewhere."""
        name = self.family.block_scale
        return 1.0 if name is None else float(getattr(self.container, name))
