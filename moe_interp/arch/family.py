"""``Family``: one row of the table of families, and what each of its columns means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from moe_interp.arch.expert_functions import ExpertFunctions, Linear, StackedExperts, sizes
from moe_interp.arch.modules import config_value
from moe_interp.arch.router_outputs import RouterLayout, Triple
from moe_interp.arch.rules import RoutingRule, SoftmaxTopK, SparseMixer, SwitchTop1

_TRIPLE = Triple()
RuleBuilder = Callable[[Any, Any, int, int, torch.dtype], RoutingRule]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row: what to call, where to look, and what is odd.

    Attributes:
        name: The family's name.
        containers: Class names of the module that holds router and experts.
        architectures: TransformerLens' architecture strings.
        rule_text: The routing rule in words.
        rule: Builds the rule from ``(router, container, n_experts, top_k, hidden dtype)``.
        rule_type: The rule's class.
        layout: How the router packs its return value.
        router, experts_at, shared, shared_gate: Submodules of the container; an empty ``experts_at`` is the container.
        shared_on_layer: Shared experts that are a submodule of the layer, not of the container.
        experts: The adapter that makes functions of the experts, with the product they multiply one expert's rows by.
        sizes: From an experts module, their number and their neurons each; 0 where it does not say.
        weights_in: The submodules of ``experts_at`` that hold the weights.
        routes_at_router: Indices and weights are taken at the router, since the container calls its experts in a way of
            its own.
        weight_on_input: A slot's weight scales the expert's input.
        experts_read: The container's module between what its router reads and what its experts read.
        latent: The container's projection from the experts' latent width back to d_model.
        block_scale: The container's factor on the weighted sum after the experts.
        output_bias: The container's bias, added after the weighted sum.
        normed_after: The weighted sum passes a norm before it is added, so its scale does not matter.
        note: What a user must know.
    """

    name: str
    containers: tuple[str, ...]
    architectures: tuple[str, ...]
    rule_text: str
    rule: RuleBuilder
    rule_type: type[RoutingRule] = SoftmaxTopK
    layout: RouterLayout = _TRIPLE
    router: str = "gate"
    experts_at: str = "experts"
    shared: str | None = None
    shared_gate: str | None = None
    shared_on_layer: str | None = None
    experts: Callable[[Any, Linear], ExpertFunctions] = StackedExperts
    sizes: Callable[[Any], tuple[int, int]] = sizes
    weights_in: tuple[str, ...] = ("",)
    routes_at_router: bool = False
    weight_on_input: bool = False
    experts_read: str | None = None
    latent: str | None = None
    block_scale: str | None = None
    output_bias: str | None = None
    normed_after: bool = False
    note: str = ""

    @property
    def has_scores(self) -> bool:
        """Whether its rule has full-width scores before selection, hence a ``router_probs`` hook."""
        return self.rule_type.scores is not RoutingRule.scores

    @property
    def has_shared(self) -> bool:
        return self.shared is not None or self.shared_on_layer is not None

    def top_k(self, router: Any) -> int:
        """Experts a token, from where the family's own code reads it."""
        fixed = {SwitchTop1: 1, SparseMixer: 2}.get(self.rule_type)
        if fixed is not None:
            return fixed
        if hasattr(router, "tid2eid"):  # a table of experts by token
            return int(router.tid2eid.shape[-1])
        return int(
            getattr(router, "top_k", 0) or config_value(router, "top_k_experts", "num_experts_per_tok", default=0)
        )
