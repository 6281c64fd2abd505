"""The model in training: transformers' own modules with fused attention, and routers that a strategy may edit.

A bridge computes attention and norms step by step, so that each step can be hooked. In training only the router is: so
the strategy's hooks are called where the router is, with what TransformerLens would call them with, and all else runs
as transformers wrote it. Nothing in a pass waits for the device, unless a hook does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformers import PreTrainedModel

from moe_interp.arch.routing_rule import RoutingRule, keep_unchanged
from moe_interp.arch.spec import MoESpec
from moe_interp.errors import HookError
from moe_interp.hooks.attach import MoEHooks
from moe_interp.testbed.strategies.strategy import Hook, Records, RouterRecord
from moe_interp.types import Layer

ROUTER_HOOKS = ("router_logits", "router_probs", "expert_indices", "expert_weights")
GROUPED = (torch.float32, torch.bfloat16, torch.float16)  # what torch has a grouped product of
ROW_BYTES = 16  # of which a grouped product wants a row's length to be a multiple


@dataclass(frozen=True)
class RouterHooks:
    """A strategy's hooks on one layer's router.

    Attributes:
        points: The layer's hook points, by bare name.
        hooks: Functions at each, by bare name, in order.
        dropping: The same of those that come after all others.
    """

    points: Mapping[str, HookPoint]
    hooks: Mapping[str, Sequence[Callable[..., Any]]]
    dropping: Mapping[str, Sequence[Callable[..., Any]]]

    def idle(self) -> RouterHooks:
        """Hooks at the same points that do nothing."""
        return RouterHooks(self.points, *(dict.fromkeys(each, ()) for each in (self.hooks, self.dropping)))

    @property
    def edits_indices(self) -> bool:
        return "expert_indices" in self.hooks or "expert_indices" in self.dropping

    def fire(self, name: str, value: Tensor, *which: Mapping[str, Sequence[Callable[..., Any]]]) -> Tensor:
        """What the functions at a hook point make of an activation; the very tensor where they only read it."""
        for hooks in which or (self.hooks, self.dropping):
            for hook in hooks.get(name, ()):
                version = value._version
                new = hook(value, hook=self.points[name])
                if new is None and value._version != version:
                    raise HookError(
                        f"a strategy's hook at {self.points[name].name} that writes into its activation",
                        "a hook that returns what it changes",
                        "Return a new tensor.",
                    )
                value = value if new is None else new.to(value.dtype)
        return value


def router_hooks(moe: MoEHooks, hooks: Sequence[Hook], dropping: Sequence[Hook]) -> dict[Layer, RouterHooks] | None:
    """A strategy's hooks by layer, of those that have any; None where some are not on a router."""
    places = {moe.hook_name(name, layer): (name, layer) for layer in moe.layers for name in moe.hooks(layer)}
    found: dict[Layer, RouterHooks] = {}
    for after, each in ((False, hooks), (True, dropping)):
        for full, function in each:
            name, layer = places.get(full, ("", None)) if isinstance(full, str) else ("", None)
            if layer is None or name not in ROUTER_HOOKS:
                return None
            points = {bare: moe.bridge.hook_dict[moe.hook_name(bare, layer)] for bare in moe.hooks(layer)}
            kept = found.setdefault(layer, RouterHooks(points, {}, {}))
            store: Any = kept.dropping if after else kept.hooks
            store.setdefault(name, []).append(function)
    return found


def copy_sharing_tensors(model: PreTrainedModel) -> PreTrainedModel:
    """The same model in other modules: parameters and buffers are the very same tensors."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})


class TrainingModel(nn.Module):
    """A transformers model of the testbed's families, run layer by layer.

    Args:
        model: A model, of which this takes possession.
        moe: Hooks on a bridge of its :func:`copy_sharing_tensors`, for the layers' rules and names.
    """

    def __init__(self, model: PreTrainedModel, moe: MoEHooks) -> None:
        super().__init__()
        self.model: Any = model
        model.config._attn_implementation = "sdpa"
        layers: Any = self.model.model.layers
        self.routers: dict[Layer, TrainingRouter] = {}
        self._experts: dict[Layer, TrainingExperts] = {}
        for layer in moe.layers:
            block = layers[layer].mlp
            block.gate = self.routers[layer] = TrainingRouter(block.gate, moe.spec(layer))
            block.experts = self._experts[layer] = TrainingExperts(block.experts, moe.spec(layer).top_k)
        self._compiled: list[Callable[..., Any]] | None = None

    @property
    def is_compiled(self) -> bool:
        return self._compiled is not None

    def compile_layers(self, backend: str) -> None:
        """Run the layers through ``torch.compile``: one after the other, since they are all alike to it."""
        layers = self.model.model.layers
        self._compiled = [torch.compile(layer, backend=backend, dynamic=False) for layer in layers]

    def run_eagerly(self) -> None:
        """Inverse of :meth:`compile_layers`."""
        self._compiled = None

    def forward(
        self,
        tokens: Tensor,
        hooks: Mapping[Layer, RouterHooks],
        logits_to_keep: int = 0,
        compiled: bool = True,
        router_inputs: bool = False,
    ) -> Tensor:
        """Logits ``[batch, pos, vocab]`` of the last ``logits_to_keep`` positions (0: of all).

        With ``router_inputs`` the records of this pass have what the routers read.
        """
        base = self.model.model
        self._prepare(tokens, hooks, router_inputs)
        hidden = base.embed_tokens(tokens)
        positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        rotary = base.rotary_emb(hidden, position_ids=positions)
        # transformers' own loop looks for packed sequences in the positions, for which it waits for the device
        for layer in (compiled and self._compiled) or base.layers:
            options = {"position_ids": positions, "position_embeddings": rotary, "use_cache": False}
            hidden = layer(hidden, attention_mask=None, **options)
        return self.model.lm_head(base.norm(hidden[:, -logits_to_keep:]))

    def records(self, shape: torch.Size) -> Records:
        """What each router did in the last pass, over tokens of this shape; they are forgotten here."""
        return {layer: router.record(shape) for layer, router in self.routers.items()}

    def forget(self) -> None:
        """Let go of what the routers did in the last pass."""
        for router in self.routers.values():
            router.seen = router.inputs = None

    def _prepare(self, tokens: Tensor, hooks: Mapping[Layer, RouterHooks], router_inputs: bool) -> None:
        for layer, router in self.routers.items():
            router.hooks, router.shape, router.keeps_inputs = hooks.get(layer), tokens.shape, router_inputs
            self._experts[layer].set_empty_slots(router.hooks is not None and router.hooks.edits_indices)
        dtypes = {experts.product_dtype() for experts in self._experts.values()}
        fits = all(experts.fits_grouped() for experts in self._experts.values())
        self.model.config._experts_implementation = "grouped_mm" if fits and dtypes <= {*GROUPED} else "eager"


class TrainingRouter(nn.Module):
    """The family's own router, and after it a strategy's hooks, with the effect that they have on a bridge.

    What a hook returns is taken as edited, whatever its values: nobody looks at them.
    """

    def __init__(self, gate: nn.Module, spec: MoESpec) -> None:
        super().__init__()
        self.gate = gate
        self.spec = spec
        self.hooks: RouterHooks | None = None
        self.shape = torch.Size()
        self.seen: tuple[Tensor, Tensor, Tensor] | None = None
        self.keeps_inputs = False
        self.inputs: Tensor | None = None

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, indices = self.gate(hidden)
        if self.keeps_inputs:
            self.inputs = hidden
        if self.hooks is None:
            self.seen = (logits, indices, indices)
            return logits, weights, indices
        return self._hooked(hidden.dtype, logits, weights, indices)

    def weight(self) -> Tensor:
        """``[expert, d_model]``, of the linear map from inputs to logits."""
        weight = self.gate.weight
        assert isinstance(weight, Tensor)
        return weight

    def record(self, shape: torch.Size) -> RouterRecord:
        """Of the last pass, which is forgotten."""
        assert self.seen is not None
        seen, self.seen = self.seen, None
        inputs, self.inputs = self.inputs, None
        logits, chosen, indices = (each.reshape(*shape, -1) for each in seen)
        return RouterRecord(logits, chosen, indices, None if inputs is None else inputs.reshape(*shape, -1))

    @torch.compiler.disable
    def _hooked(
        self, hidden_dtype: torch.dtype, logits: Tensor, weights: Tensor, indices: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The strategy's functions are Python's: they stay outside of compiled graphs."""
        assert self.hooks is not None
        hooks, rule, shape = self.hooks, self.spec.rule_for(hidden_dtype), self.shape
        # shape: (token, width) -> (batch, pos, width)
        native, weights, indices = (each.reshape(*shape, -1) for each in (logits, weights, indices))
        edited = hooks.fire("router_logits", native)
        if edited is not native:
            indices, weights = rule.route(edited)
        scores = None
        if "router_probs" in hooks.hooks or "router_probs" in hooks.dropping:
            own = rule.scores(edited)
            assert own is not None
            scored = hooks.fire("router_probs", own)
            if scored is not own:
                scores = scored
                indices, weights = rule.route_scores(scored)
        chosen = hooks.fire("expert_indices", indices, hooks.hooks)
        final = hooks.fire("expert_indices", chosen, hooks.dropping)
        if final is not indices:
            weights = _reweighed(rule, edited, scores, indices, weights, final)
        applied = hooks.fire("expert_weights", weights)
        if applied is not weights:
            applied = applied.masked_fill(final < 0, 0.0)
        self.seen = (logits, chosen, final)
        return logits, applied.flatten(0, 1), final.flatten(0, 1)


def _reweighed(
    rule: RoutingRule, logits: Tensor, scores: Tensor | None, old: Tensor, weights: Tensor, new: Tensor
) -> Tensor:
    """The rule's weights for edited routes; routes that are as they were keep theirs bit for bit."""
    if scores is None:
        ruled = rule.weights(logits, new, are_valid=True)
    else:
        ruled = rule.weights_from_scores(scores, new, are_valid=True)
    return keep_unchanged(ruled, weights, old, new)


class TrainingExperts(nn.Module):
    """The family's own experts, in autocast's format: torch's grouped products are not among what autocast casts."""

    def __init__(self, experts: nn.Module, top_k: int) -> None:
        super().__init__()
        self.experts: Any = experts
        self.top_k = top_k
        self._empty_slots = False

    def set_empty_slots(self, possible: bool) -> None:
        """Whether routes may have empty slots, which transformers passes over where it shares experts out."""
        self._empty_slots = self.experts._is_expert_parallel = possible

    def product_dtype(self) -> torch.dtype:
        """The format that the experts are multiplied in."""
        weight = next(self.experts.parameters())
        kind = weight.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype

    def fits_grouped(self) -> bool:
        """Whether rows are as long as torch's grouped product wants them."""
        size = self.product_dtype().itemsize
        lengths = [length for weight in self.experts.parameters() for length in weight.shape[1:]]
        return all(length * size % ROW_BYTES == 0 for length in lengths)

    def forward(self, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        if self._empty_slots:
            indices = indices.masked_fill(indices < 0, self.experts.num_experts)
            if hidden.device.type == "cpu" and indices.shape[-1] > self.top_k:
                return self._one_by_one(hidden, indices, weights)
        if not torch.is_autocast_enabled(hidden.device.type):
            return self.experts(hidden, indices, weights)
        dtype = torch.get_autocast_dtype(hidden.device.type)
        cast = {name: weight.to(dtype) for name, weight in self.experts.named_parameters()}
        return torch.func.functional_call(self.experts, cast, (hidden.to(dtype), indices, weights))

    @torch.compiler.disable
    def _one_by_one(self, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Wide routes are mostly empty: a processor's grouped product would walk through their empty slots as well."""
        config = self.experts.config
        before, config._experts_implementation = config._experts_implementation, "eager"
        try:
            return self.experts(hidden, indices, weights)
        finally:
            config._experts_implementation = before
