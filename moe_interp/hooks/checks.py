"""The checks that ``verify`` makes. Each is a generator of findings about a trial.

A figure called relative is the largest difference over the largest entry of what is expected. Where the experts are
computed one by one instead of in the family's batch, they may differ by rounding: ``ROUNDING`` units of the number
format.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_interp.arch.rules import HashTable
from moe_interp.arch.spec import MoESpec
from moe_interp.hooks.theirs import THEIR_HOOKS, as_theirs
from moe_interp.hooks.trial import ROUTER_HOOKS, Edit, Place, Trial, difference
from moe_interp.types import Layer

ROUNDING = 32
_HOLDS = {"<=": operator.le, ">": operator.gt}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the table: ``figure relation bound`` must hold; NaN is an exception, which the note explains."""

    check: str
    layer: Layer
    hook: str
    figure: float
    relation: str = "<="
    bound: float = 0.0
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.figure != self.figure or _HOLDS[self.relation](self.figure, self.bound)


def excepted(check: str, layer: Layer, hook: str, why: str) -> Finding:
    """A check without a meaning here."""
    return Finding(check=check, layer=layer, hook=hook, figure=float("nan"), note=f"excepted: {why}")


# -- pass-through ------------------------------------------------------------------------------------------------------


def passes_through(trial: Trial) -> Iterator[Finding]:
    """Handing a hook's value on changes nothing: the logits where it is exact, the layer's output up to rounding."""
    check = "pass-through changes nothing"
    for hook in _hooks(trial):
        exact = [layer for layer in _having(trial, hook) if _is_exact(trial.specs[layer], hook)]
        together = difference(trial.run({(hook, layer): _same for layer in exact}), trial.natural) if exact else 0.0
        for layer in exact:
            # one run for all layers; only a failure asks which
            alone = (
                together if together <= trial.noise else difference(trial.run({(hook, layer): _same}), trial.natural)
            )
            yield Finding(check=check, layer=layer, hook=hook, figure=alone, bound=trial.noise)
        for layer in set(_having(trial, hook)) - set(exact):
            output, expected = trial.block_output(layer, {(hook, layer): _same}), trial.block_outputs[layer]
            yield _near(check, layer, hook, output, expected, trial)


def _moved(trial: Trial, hook: str, layers: Sequence[Layer]) -> float:
    return difference(trial.run({(hook, layer): _same for layer in layers}), trial.natural) if layers else 0.0


def _is_exact(spec: MoESpec, hook: str) -> bool:
    """Whether the family's own code still computes the block when this hook is used."""
    own = not spec.family.own_block and spec.block_scale == 1.0
    return hook in ROUTER_HOOKS or (own and hook in ("routed_out", "shared_out"))


# -- edits -------------------------------------------------------------------------------------------------------------


def edits_matter(trial: Trial) -> Iterator[Finding]:
    """An edit of a hook changes the logits, by more than the model's own noise and one unit of the number format."""
    check = "an edit changes the logits"
    bound = max(10 * trial.noise, float(torch.finfo(trial.natural.dtype).eps * trial.natural.abs().max()))
    for layer in trial.layers:
        spec = trial.specs[layer]
        for hook in trial.moe.hooks(layer):
            if hook == "expert_indices" and spec.n_experts == spec.top_k:
                yield excepted(check, layer, hook, "every expert runs for every token")
                continue
            moved = difference(trial.run({(hook, layer): _edit_of(hook, spec)}), trial.natural)
            yield Finding(check=check, layer=layer, hook=hook, figure=moved, relation=">", bound=bound)


def _edit_of(hook: str, spec: MoESpec) -> Edit:
    """An edit that stays valid: reversed along the last axis, other experts, unequal weights."""
    if hook == "expert_indices":
        return lambda ids: torch.where(ids < 0, ids, (ids + 1) % spec.n_experts)
    if hook == "expert_weights":
        return lambda w: w * torch.arange(2, w.shape[-1] + 2, device=w.device, dtype=w.dtype)
    return lambda value: value.flip(-1)


# -- routing -----------------------------------------------------------------------------------------------------------


def routes_as_the_rule(trial: Trial) -> Iterator[Finding]:
    """``rule.route`` gives what the untouched router returned, bit for bit, also in its own way of packing it."""
    check = "the rule is the router's"
    for layer in trial.layers:
        spec = trial.specs[layer]
        hidden, native = trial.router_calls[layer]
        rule, layout = spec.rule_for(hidden.dtype), spec.family.layout
        logits = layout.read(spec.router, rule, hidden, native)[0]
        route = rule.route(logits, trial.tokens.reshape(logits.shape[:-1]))
        figure = difference(layout.write(rule, logits, None, route, native), native)
        yield Finding(
            check=check, layer=layer, hook="expert_indices", figure=figure, bound=_scale_rounding(spec, route)
        )


def reroutes_as_the_rule(trial: Trial) -> Iterator[Finding]:
    """Reversed router logits give the rule's experts and weights, and those experts are what runs."""
    for layer in trial.layers:
        spec, logits = trial.specs[layer], trial.seen["router_logits", layer].flip(-1)
        rule = spec.rule_for(trial.router_calls[layer][0].dtype)
        ids, weights = rule.route(logits, trial.tokens)
        edit: dict[Place, Edit] = {("router_logits", layer): lambda value: value.flip(-1)}
        _, seen = trial.see(edit, [("expert_indices", layer), ("expert_weights", layer)])
        got = seen["expert_indices", layer], seen["expert_weights", layer]
        note = "the token id chooses the experts, logits only weigh them" if isinstance(rule, HashTable) else ""
        yield Finding(
            check="edited logits re-route by the rule",
            layer=layer,
            hook="router_logits",
            figure=max(difference(got[0], ids), difference(got[1], weights.to(got[1].dtype))),
            bound=_scale_rounding(spec, (ids, weights)),
            note=note,
        )
        if "expert_out" not in trial.moe.hooks(layer):
            continue
        # the family's own code on the rewritten route, against the experts one by one on the same route written
        native = trial.block_output(layer, edit)
        written: dict[Place, Edit] = {
            ("expert_indices", layer): _constant(ids),
            ("expert_weights", layer): _constant(weights),
            ("expert_out", layer): _same,
        }
        by_hand = trial.block_output(layer, written)
        yield _near("the rule's experts run", layer, "router_logits", native, by_hand, trial)


def _scale_rounding(spec: MoESpec, route: tuple[Tensor, Tensor]) -> float:
    """A block's scale is divided out and applied again; elsewhere routes agree bit for bit."""
    return 0.0 if spec.block_scale == 1.0 else 4 * _eps(route[1]) * float(route[1].abs().max())


# -- sums --------------------------------------------------------------------------------------------------------------


def slots_sum(trial: Trial) -> Iterator[Finding]:
    """The experts' outputs, weighted and summed over the slots, are ``routed_out``."""
    for layer in trial.layers:
        if "expert_out" not in trial.moe.hooks(layer):
            continue
        spec = trial.specs[layer]
        out = trial.see(read=[("expert_out", layer)])[1]["expert_out", layer]
        weights = trial.seen["expert_weights", layer]
        total = (out if spec.weight_on_input else out * weights.unsqueeze(-1)).sum(dim=-2)
        total = total if spec.project_bias is None else total + spec.project_bias
        expected = trial.seen["routed_out", layer]
        yield _near("slots sum to routed_out", layer, "expert_out", total, expected, trial)


def parts_sum(trial: Trial) -> Iterator[Finding]:
    """``routed_out + shared_out`` is what the block returns, where nothing comes after the sum."""
    check = "parts sum to the block's output"
    for layer in trial.layers:
        family, block = trial.specs[layer].family, trial.block_outputs[layer]
        if family.normed_after:
            yield excepted(check, layer, "routed_out", "a norm follows the sum")
            continue
        total = trial.seen["routed_out", layer]
        if family.beside is None and ("shared_out", layer) in trial.seen:
            total = total + trial.seen["shared_out", layer]
        if family.output_bias is not None:
            total = total + getattr(trial.specs[layer].container, family.output_bias)
        yield _near(check, layer, "routed_out", total.reshape(block.shape), block, trial)


# -- TransformerLens' own hooks ----------------------------------------------------------------------------------------


def agrees_with_theirs(trial: Trial) -> Iterator[Finding]:
    """TransformerLens' own router hooks show the same values as ours, batch and position folded."""
    check = "TransformerLens' hook agrees"
    theirs: dict[str, object] = {}

    def read(value: object, hook: object) -> None:
        theirs[getattr(hook, "name", "")] = value

    bridge = trial.moe.bridge
    places = [
        (layer, trial.moe.hook_name("router_logits", layer).removesuffix("hook_router_logits") + hook.path, hook)
        for layer in trial.layers
        for hook in THEIR_HOOKS.get(trial.specs[layer].family.name, ())
    ]
    with bridge.hooks(fwd_hooks=[(name, read) for _, name, _ in places]):
        trial.run()
    for layer, name, hook in places:
        shown = theirs.get(name)
        if not isinstance(shown, Tensor):
            yield excepted(check, layer, hook.path, f"it is handed {hook.shows}")
            continue
        ours = {other: value for (other, at), value in trial.seen.items() if at == layer}
        expected = as_theirs(hook.shows, ours, trial.specs[layer].rule).reshape(shown.shape)
        figure = difference(shown, expected)
        yield Finding(check=check, layer=layer, hook=hook.path, figure=figure, note=f"shows {hook.shows}")


# -- gradients ---------------------------------------------------------------------------------------------------------


def gradients_arrive(trial: Trial) -> Iterator[Finding]:
    """The gradient of the logits at every float hook is finite and not zero everywhere."""
    check = "a gradient arrives"
    probes: dict[Place, Tensor] = {}

    def probe(place: Place) -> Edit:
        def add_zero(value: Tensor) -> Tensor:
            probes[place] = torch.zeros_like(value).requires_grad_()
            return value + probes[place]

        return add_zero

    places = [(hook, layer) for layer in trial.layers for hook in trial.moe.hooks(layer) if hook != "expert_indices"]
    with torch.enable_grad():
        logits = trial.run({place: probe(place) for place in places})
        # a direction of its own for each logit: sums of softmax-normalised values have no gradient
        direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)
        gradients = torch.autograd.grad((logits * direction).sum(), list(probes.values()), allow_unused=True)
    for place, gradient in zip(probes, gradients):
        figure = 0.0 if gradient is None else float(gradient.abs().max())
        if gradient is not None and not bool(torch.isfinite(gradient).all()):
            yield Finding(check=check, layer=place[1], hook=place[0], figure=0.0, relation=">", note="not finite")
        elif figure == 0.0 and place[0] in ROUTER_HOOKS[:3] and not _weights_move(trial, place[1]):
            yield excepted(check, place[1], place[0], "the rule's weights do not depend on the logits of these tokens")
        else:
            yield Finding(check=check, layer=place[1], hook=place[0], figure=figure, relation=">")


def _weights_move(trial: Trial, layer: Layer) -> bool:
    """Whether the rule's weights have a gradient: one normalised slot has none, nor far-apart experts (Phi-MoE)."""
    rule = trial.specs[layer].rule_for(trial.router_calls[layer][0].dtype)
    with torch.enable_grad():
        logits = trial.seen["router_logits", layer].clone().requires_grad_()
        weights = rule.weights(logits, trial.seen["expert_indices", layer])
        if not weights.requires_grad:
            return False
        direction = torch.arange(1.0, weights.shape[-1] + 1, device=weights.device)
        (gradient,) = torch.autograd.grad((weights * direction).sum(), logits, allow_unused=True)
    return gradient is not None and bool(gradient.any())


# -- detaching ---------------------------------------------------------------------------------------------------------


def detaching_restores(trial: Trial) -> Iterator[Finding]:
    """Without the hook points the model gives the same logits and has none of their names; they come back."""
    check, layer, bridge, names = (
        "detached, the model is as it was",
        trial.layers[0],
        trial.moe.bridge,
        trial.moe.hook_names(),
    )
    before = list(bridge.hook_dict)
    with trial.moe.suspended():
        left = set(names) & set(bridge.hook_dict)
        figure = difference(trial.run(), trial.natural)
    note = f"still there: {sorted(left)[0]}" if left else ""
    note = note if list(bridge.hook_dict) == before else "the hook points did not come back in order"
    figure = float("inf") if note else figure
    yield Finding(check=check, layer=layer, hook="all", figure=figure, bound=trial.noise, note=note)
    again = difference(trial.run(), trial.natural)
    yield Finding(check="attached again, it is the same", layer=layer, hook="all", figure=again, bound=trial.noise)


Check = Callable[[Trial], Iterator[Finding]]

CHECKS: tuple[Check, ...] = (
    passes_through,
    edits_matter,
    routes_as_the_rule,
    reroutes_as_the_rule,
    slots_sum,
    parts_sum,
    agrees_with_theirs,
    gradients_arrive,
    detaching_restores,
)


def _near(check: str, layer: Layer, hook: str, value: Tensor, expected: Tensor, trial: Trial) -> Finding:
    """A relative difference, bounded by rounding."""
    scale = float(expected.abs().max()) or 1.0
    # a model that returns a coarser format than its blocks computes in it inside, too
    bound = ROUNDING * max(_eps(expected), _eps(trial.natural)) + trial.noise / scale
    return Finding(check=check, layer=layer, hook=hook, figure=difference(value, expected) / scale, bound=bound)


def _eps(value: Tensor) -> float:
    """A unit of the number format, as matrix products compute in it."""
    tf32 = value.is_cuda and value.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return 2.0**-10 if tf32 else torch.finfo(value.dtype).eps


def _hooks(trial: Trial) -> list[str]:
    return list(dict.fromkeys(hook for layer in trial.layers for hook in trial.moe.hooks(layer)))


def _having(trial: Trial, hook: str) -> list[Layer]:
    return [layer for layer in trial.layers if hook in trial.moe.hooks(layer)]


def _same(value: Tensor) -> Tensor:
    return value


def _constant(new: Tensor) -> Edit:
    return lambda value: new.to(value.dtype)
