"""The checks of reading and routing, and of what comes back after detaching. Each is a generator of findings."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moe_interp.arch.rules import HashTable
from moe_interp.arch.spec import MoESpec
from moe_interp.hooks.transformer_lens_hooks import THEIR_HOOKS, as_theirs
from moe_interp.types import Layer
from moe_interp.verification.finding import Finding, excepted, near, rounding, unit_of
from moe_interp.verification.model_under_test import ROUTER_HOOKS, Edit, Place, Trial, difference

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
            yield near(check, layer, hook, output, expected, trial)


def _is_exact(spec: MoESpec, hook: str) -> bool:
    """Whether the family's own code still computes the block when this hook is used."""
    own = not spec.family.own_block and spec.block_scale == 1.0
    return hook in ROUTER_HOOKS or (own and hook in ("routed_out", "shared_out"))


# -- routing -----------------------------------------------------------------------------------------------------------


def reroutes_as_the_rule(trial: Trial) -> Iterator[Finding]:
    """Reversed router logits give the rule's experts and weights, bit for bit."""
    for layer in trial.layers:
        spec, logits = trial.specs[layer], trial.seen["router_logits", layer].flip(-1)
        rule = spec.rule_for(trial.router_calls[layer].args[0].dtype)
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


def _scale_rounding(spec: MoESpec, route: tuple[Tensor, Tensor]) -> float:
    """A block's scale is divided out and applied again; elsewhere routes agree bit for bit."""
    return 0.0 if spec.block_scale == 1.0 else 4 * unit_of(route[1]) * float(route[1].abs().max())


# -- sums --------------------------------------------------------------------------------------------------------------


def parts_sum(trial: Trial) -> Iterator[Finding]:
    """``routed_out + shared_out`` is what the block returns, where nothing comes after the sum."""
    check = "parts sum to the block's output"
    for layer in trial.layers:
        spec, block = trial.specs[layer], trial.block_outputs[layer]
        family, bias = spec.family, spec.output_bias
        total = trial.seen["routed_out", layer]
        if family.beside is None and ("shared_out", layer) in trial.seen:
            total = total + trial.seen["shared_out", layer]
        total = total if bias is None else total + bias
        yield near(check, layer, "routed_out", total.reshape(block.shape), block, trial)


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
        # of a float64 model, some routers' own step in single precision lies between the two
        bound = rounding(trial, layer) * float(expected.abs().max()) if expected.dtype == torch.float64 else 0.0
        yield Finding(check=check, layer=layer, hook=hook.path, figure=figure, bound=bound, note=f"shows {hook.shows}")


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


def _hooks(trial: Trial) -> list[str]:
    return list(dict.fromkeys(hook for layer in trial.layers for hook in trial.moe.hooks(layer)))


def _having(trial: Trial, hook: str) -> list[Layer]:
    return [layer for layer in trial.layers if hook in trial.moe.hooks(layer)]


def _same(value: Tensor) -> Tensor:
    return value


# -- what is absent ----------------------------------------------------------------------------------------------------


def unreadable_experts(trial: Trial) -> Iterator[Finding]:
    """The hooks of the experts that a layer lacks because the weights cannot be read, and why."""
    for layer in trial.layers:
        if (reason := trial.specs[layer].unreadable) is not None:
            for hook in [hook for hook, why in trial.moe.absent(layer).items() if why == reason]:
                note = f"absent: {reason}"
                yield Finding(check="the hook is served", layer=layer, hook=hook, figure=float("nan"), note=note)
