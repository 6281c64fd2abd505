"""The checks of gradients: at each hook, the gradient that arrives with nothing hooked, not a part or a multiple of it.

With nothing hooked, gradients are taken at the modules' own inputs and outputs; at what lies between these, by the
chain rule through the block computed by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from moe_interp.verification import reference_rules as reference
from moe_interp.verification.block_by_hand import LayerByHand, layer_by_hand
from moe_interp.verification.finding import Finding, excepted, rounding, unit_of
from moe_interp.verification.model_under_test import Edit, ModelUnderTest, Place, first

_ROUTER = ("router_in", "router_logits", "router_probs")
# hooks that are read together: each kind alone too, as the family's own experts run only where those of experts are not
_TOGETHER: tuple[tuple[str, ...], ...] = (
    (*_ROUTER, "expert_weights", "expert_post", "expert_out", "routed_out", "shared_out"),
    ("router_in",),
    ("router_logits",),
    ("router_probs", "expert_weights"),
    ("routed_out", "shared_out"),
)


def gradients_arrive(tested: ModelUnderTest) -> Iterator[Finding]:
    """At every hook with real values, the gradient of a random direction of the logits is that of the plain model."""
    check, bound = "the gradient is the plain model's", _bound(tested)
    expected, floors = _expected(tested)
    worst: dict[Place, float] = {}
    for names in _TOGETHER:
        places = [(hook, layer) for layer in tested.layers for hook in tested.moe.hooks(layer) if hook in names]
        for place, gradient in _hooked(tested, places).items():
            worst[place] = max(
                worst.get(place, 0.0), _missed(gradient, expected[place], floors.get(place, 0.0) / bound)
            )
    for place, figure in worst.items():
        hook, layer = place
        if hook in _ROUTER and not bool(expected[place].any()) and figure == 0.0:
            yield excepted(check, layer, hook, "the rule's weights do not depend on the logits of these tokens")
        else:
            yield Finding(check=check, layer=layer, hook=hook, figure=figure, bound=bound)


def _bound(tested: ModelUnderTest) -> float:
    """Half of a doubled gradient's error at half precision, where sums of differences keep few digits."""
    return 0.4 if max(unit_of(call.args[0]) for call in tested.router_calls.values()) > 1e-4 else 1e-3


def _missed(gradient: Tensor, expected: Tensor, floor: float) -> float:
    """``|gradient - expected| / max(|expected|, floor)``; 0 where both are zero."""
    expected = expected.reshape(gradient.shape).double()
    missed, size = float((gradient.double() - expected).norm()), max(float(expected.norm()), floor)
    return missed / size if size > 0.0 else (0.0 if missed == 0.0 else float("inf"))


def _hooked(tested: ModelUnderTest, places: list[Place]) -> dict[Place, Tensor]:
    """The gradients that arrive at hooks, which add zeros."""
    probes: dict[Place, Tensor] = {}

    def probe(place: Place) -> Edit:
        def add_zero(value: Tensor) -> Tensor:
            probes[place] = torch.zeros_like(value).requires_grad_()
            return value + probes[place]

        return add_zero

    if not places:
        return {}
    with torch.enable_grad():
        logits = tested.run({place: probe(place) for place in places})
        return _gradients(logits, probes)


def _gradients(logits: Tensor, probes: dict[Any, Tensor]) -> dict[Any, Tensor]:
    # a direction of its own for each logit: sums of softmax-normalised values have no gradient
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)
    if not logits.requires_grad:
        return {key: torch.zeros_like(probe) for key, probe in probes.items()}
    found = torch.autograd.grad((logits * direction).sum(), list(probes.values()), allow_unused=True)
    return {key: torch.zeros_like(p) if g is None else g for (key, p), g in zip(probes.items(), found)}


def _expected(tested: ModelUnderTest) -> tuple[dict[Place, Tensor], dict[Place, float]]:
    """By hook, the gradient of the model with nothing hooked, and the rounding of the terms that it is the sum of.

    Terms cancel where weights are normalised: of a single slot, all of them, and what is left is rounding.
    """
    plain = _plain(tested)
    found: dict[Place, Tensor] = {}
    floors: dict[Place, float] = {}
    for layer in tested.layers:
        hand, spec = layer_by_hand(tested, layer), tested.specs[layer]
        of_block = plain["block", layer].flatten(0, -2)
        # what the block returns is divided by its scale before it is multiplied with it
        of_routed = of_block
        found |= {("router_in", layer): plain["router", layer], ("routed_out", layer): of_routed}
        if spec.shared is not None:
            found["shared_out", layer] = of_block if spec.family.shared_on_layer is None else plain["shared", layer]
        inside = _inside(hand, of_routed)
        found |= {(hook, layer): value for hook, value in inside.items()}
        terms = (inside["expert_weights"] * hand.weights).double()
        floors["router_logits", layer] = rounding(tested, layer) * float(terms.norm())
        scores = reference.scores(hand.rule, hand.logits)
        if scores is not None:
            chosen = scores.gather(-1, hand.indices.clamp(min=0)).clamp_min(1e-30)
            floors["router_probs", layer] = rounding(tested, layer) * float((terms / chosen).norm())
    return found, floors


def _inside(hand: LayerByHand, of_routed: Tensor) -> dict[str, Tensor]:
    """By the chain rule, from the gradient at the weighted sum back to the logits; the choice stays."""
    with torch.enable_grad():
        logits = hand.logits.detach().double().requires_grad_()
        scores = reference.scores(hand.rule, logits.detach())
        scores = None if scores is None else scores.requires_grad_()
        weights = hand.weights.detach().clone().requires_grad_()
        wanted = {"expert_weights": weights}
        if hand.spec.unreadable is None:
            neurons = hand.neurons(hand.indices, weights)
            neurons = neurons if neurons.requires_grad else neurons.requires_grad_()
            outputs = hand.outputs(neurons, hand.indices)
            outputs = outputs if outputs.requires_grad else outputs.requires_grad_()
            wanted |= {"expert_post": neurons, "expert_out": outputs}
            routed = hand.routed(outputs, weights)
        else:
            routed = hand.routed_of(hand.indices, weights)
        found = dict(zip(wanted, torch.autograd.grad(routed, list(wanted.values()), of_routed.to(routed.dtype))))
        leaves = {"router_logits": (logits, None)} | ({} if scores is None else {"router_probs": (scores, scores)})
        for hook, (leaf, given) in leaves.items():
            ruled = reference.weights(hand.rule, logits, hand.indices, given)
            (found[hook],) = torch.autograd.grad(ruled, [leaf], found["expert_weights"].double())
    return found


def _plain(tested: ModelUnderTest) -> dict[Place, Tensor]:
    """Gradients at the routers' inputs and the blocks' outputs, by hooks of the modules themselves."""
    probes: dict[Place, Tensor] = {}

    def zeros(key: Place, value: Tensor) -> Tensor:
        probes[key] = torch.zeros_like(value).requires_grad_()
        return value + probes[key]

    def at_output(key: Place) -> Callable[..., Any]:
        def hook(module: Any, args: Any, output: Any) -> Any:
            new = zeros(key, first(output))
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return hook

    def at_input(key: Place) -> Callable[..., Any]:
        return lambda module, args: (zeros(key, args[0]), *args[1:])

    with torch.enable_grad(), ExitStack() as stack:
        for layer, spec in tested.specs.items():
            stack.callback(spec.router.register_forward_pre_hook(at_input(("router", layer))).remove)
            stack.callback(tested.observed(layer).register_forward_hook(at_output(("block", layer))).remove)
            if spec.shared is not None and spec.family.shared_on_layer is not None:
                stack.callback(spec.shared.register_forward_hook(at_output(("shared", layer))).remove)
        return _gradients(tested.run(), probes)
