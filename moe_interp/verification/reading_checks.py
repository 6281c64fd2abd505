"""The checks of reading and routing, and of what comes back after detaching. Each is a generator of findings."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moe_interp.arch.rules import HashTable
from moe_interp.arch.spec import MoESpec
from moe_interp.hooks.transformer_lens_hooks import TRANSFORMER_LENS_HOOKS, shown_by_transformer_lens
from moe_interp.types import Layer
from moe_interp.verification.finding import Finding, excepted, near, rounding, unit_of
from moe_interp.verification.model_under_test import ROUTER_HOOKS, Edit, ModelUnderTest, Place, difference

# -- pass-through ------------------------------------------------------------------------------------------------------


def passes_through(tested: ModelUnderTest) -> Iterator[Finding]:
    """Handing a hook's value on changes nothing: the logits where it is exact, the layer's output up to rounding."""
    check = "pass-through changes nothing"
    for hook in _hooks(tested):
        exact = [layer for layer in _having(tested, hook) if _is_exact(tested.specs[layer], hook)]
        together = difference(tested.run({(hook, layer): _same for layer in exact}), tested.natural) if exact else 0.0
        for layer in exact:
            # one run for all layers; only a failure asks which
            alone = (
                together if together <= tested.noise else difference(tested.run({(hook, layer): _same}), tested.natural)
            )
            yield Finding(check=check, layer=layer, hook=hook, figure=alone, bound=tested.noise)
        for layer in set(_having(tested, hook)) - set(exact):
            output, expected = tested.block_output(layer, {(hook, layer): _same}), tested.block_outputs[layer]
            yield near(check, layer, hook, output, expected, tested)


def _is_exact(spec: MoESpec, hook: str) -> bool:
    """Whether the family's own code still computes the block when this hook is used."""
    own = not spec.family.routes_at_router and spec.block_scale == 1.0
    return hook in ROUTER_HOOKS or (own and hook in ("routed_out", "shared_out"))


# -- routing -----------------------------------------------------------------------------------------------------------


def reroutes_as_the_rule(tested: ModelUnderTest) -> Iterator[Finding]:
    """Reversed router logits give the rule's experts and weights, bit for bit."""
    for layer in tested.layers:
        spec, logits = tested.specs[layer], tested.seen["router_logits", layer].flip(-1)
        rule = spec.rule_for(tested.router_calls[layer].args[0].dtype)
        ids, weights = rule.route(logits, tested.tokens)
        edit: dict[Place, Edit] = {("router_logits", layer): lambda value: value.flip(-1)}
        _, seen = tested.see(edit, [("expert_indices", layer), ("expert_weights", layer)])
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


def _scale_rounding(spec: MoESpec, route: tuple[Tensor, Tensor]) -> float:
    """A block's scale is divided out and applied again; elsewhere routes agree bit for bit."""
    return 0.0 if spec.block_scale == 1.0 else 4 * unit_of(route[1]) * float(route[1].abs().max())


# -- sums --------------------------------------------------------------------------------------------------------------


def parts_sum(tested: ModelUnderTest) -> Iterator[Finding]:
    """``routed_out + shared_out`` is what the block returns, where nothing comes after the sum."""
    check = "parts sum to the block's output"
    for layer in tested.layers:
        spec, block = tested.specs[layer], tested.block_outputs[layer]
        family, bias = spec.family, spec.output_bias
        total = tested.seen["routed_out", layer]
        if family.shared_on_layer is None and ("shared_out", layer) in tested.seen:
            total = total + tested.seen["shared_out", layer]
        total = total if bias is None else total + bias
        yield near(check, layer, "routed_out", total.reshape(block.shape), block, tested)


# -- TransformerLens' own hooks ----------------------------------------------------------------------------------------


def agrees_with_transformer_lens(tested: ModelUnderTest) -> Iterator[Finding]:
    """TransformerLens' own router hooks show the same values as ours, batch and position folded."""
    check = "TransformerLens' hook agrees"
    values: dict[str, object] = {}

    def read(value: object, hook: object) -> None:
        values[getattr(hook, "name", "")] = value

    bridge = tested.moe.bridge
    places = [
        (layer, tested.moe.hook_name("router_logits", layer).removesuffix("hook_router_logits") + hook.path, hook)
        for layer in tested.layers
        for hook in TRANSFORMER_LENS_HOOKS.get(tested.specs[layer].family.name, ())
    ]
    with bridge.hooks(fwd_hooks=[(name, read) for _, name, _ in places]):
        tested.run()
    for layer, name, hook in places:
        shown = values.get(name)
        if not isinstance(shown, Tensor):
            yield excepted(check, layer, hook.path, f"it is handed {hook.shows}")
            continue
        ours = {other: value for (other, at), value in tested.seen.items() if at == layer}
        expected = shown_by_transformer_lens(hook.shows, ours, tested.specs[layer].rule).reshape(shown.shape)
        figure = difference(shown, expected)
        # of a float64 model, some routers' own step in single precision lies between the two
        bound = rounding(tested, layer) * float(expected.abs().max()) if expected.dtype == torch.float64 else 0.0
        yield Finding(check=check, layer=layer, hook=hook.path, figure=figure, bound=bound, note=f"shows {hook.shows}")


# -- detaching ---------------------------------------------------------------------------------------------------------


def detaching_restores(tested: ModelUnderTest) -> Iterator[Finding]:
    """Without the hook points the model gives the same logits and has none of their names; they come back."""
    check, layer, bridge, names = (
        "detached, the model is as it was",
        tested.layers[0],
        tested.moe.bridge,
        tested.moe.hook_names(),
    )
    before = list(bridge.hook_dict)
    with tested.moe.suspended():
        left = set(names) & set(bridge.hook_dict)
        figure = difference(tested.run(), tested.natural)
    note = f"still there: {sorted(left)[0]}" if left else ""
    note = note if list(bridge.hook_dict) == before else "the hook points did not come back in order"
    figure = float("inf") if note else figure
    yield Finding(check=check, layer=layer, hook="all", figure=figure, bound=tested.noise, note=note)
    again = difference(tested.run(), tested.natural)
    yield Finding(check="attached again, it is the same", layer=layer, hook="all", figure=again, bound=tested.noise)


def _hooks(tested: ModelUnderTest) -> list[str]:
    return list(dict.fromkeys(hook for layer in tested.layers for hook in tested.moe.hooks(layer)))


def _having(tested: ModelUnderTest, hook: str) -> list[Layer]:
    return [layer for layer in tested.layers if hook in tested.moe.hooks(layer)]


def _same(value: Tensor) -> Tensor:
    return value


# -- what is absent ----------------------------------------------------------------------------------------------------


def unreadable_experts(tested: ModelUnderTest) -> Iterator[Finding]:
    """The hooks of the experts that a layer lacks because the weights cannot be read, and why."""
    for layer in tested.layers:
        if (reason := tested.specs[layer].unreadable) is not None:
            for hook in [hook for hook, why in tested.moe.absent(layer).items() if why == reason]:
                note = f"absent: {reason}"
                yield Finding(check="the hook is served", layer=layer, hook=hook, figure=float("nan"), note=note)
