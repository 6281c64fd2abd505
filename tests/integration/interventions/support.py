"""Running attached tiny models under interventions, and the routes that came of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_interp.types import Hooks
from tests import tiny
from tests.integration.hooks.support import Opened, opened

__all__ = ["LEFT", "RIGHT", "TOKENS", "Opened", "opened", "plain", "run", "same", "see"]

TOKENS = tiny.random_tokens(2, 6)
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
RIGHT = LEFT.flip(-1)

Seen = dict[str, Tensor]


@torch.no_grad()
def see(
    model: Opened, hooks: Hooks, layer: tiny.Label, *names: str, tokens: Tensor = TOKENS, **inputs: Any
) -> tuple[Tensor, Seen]:
    """Logits, and the layer's activations (its route, by default) after all interventions."""
    seen: Seen = {}

    def recorder(name: str) -> Any:
        return lambda value, hook: seen.__setitem__(name, value.clone())

    names = names or ("expert_indices", "expert_weights")
    recorders = [(model.moe.hook_name(name, layer), recorder(name)) for name in names]
    inputs = {**tiny.model_inputs(model.name, tokens), **inputs}
    return model.bridge.run_with_hooks(tokens, fwd_hooks=[*hooks, *recorders], **inputs), seen


def run(model: Opened, hooks: Hooks, tokens: Tensor = TOKENS, **inputs: Any) -> Tensor:
    with torch.no_grad():
        inputs = {**tiny.model_inputs(model.name, tokens), **inputs}
        return model.bridge.run_with_hooks(tokens, fwd_hooks=hooks, **inputs)


def plain(model: Opened, tokens: Tensor = TOKENS, **inputs: Any) -> Tensor:
    """Logits with nothing hooked."""
    return run(model, [], tokens, **inputs)


def same(left: Seen, right: Seen, tokens: Tensor) -> bool:
    """Whether two layers' routes agree bit for bit at these tokens ``[batch, pos]``, however wide they are."""
    for name, fill in (("expert_indices", -1), ("expert_weights", 0.0)):
        a, b = left[name][tokens], right[name][tokens]
        width = max(a.shape[-1], b.shape[-1])
        a, b = (torch.nn.functional.pad(v, (0, width - v.shape[-1]), value=fill) for v in (a, b))
        if not torch.equal(a, b):
            return False
    return True


def routes_in_generation(model: Opened, hooks: Hooks, layer: tiny.Label, steps: int, **options: Any) -> list[Tensor]:
    """``expert_indices`` of each step of greedy generation from TOKENS."""
    found: list[Tensor] = []
    record = (model.moe.hook_name("expert_indices", layer), lambda value, hook: found.append(value.clone()))
    with torch.no_grad(), model.bridge.hooks(fwd_hooks=[*hooks, record]):
        model.bridge.generate(
            TOKENS, max_new_tokens=steps, do_sample=False, stop_at_eos=False, verbose=False, **options
        )
    return found
