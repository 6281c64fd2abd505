"""Running the tiny models with hooks: attached bridges, kept for all tests, and the values their hooks see."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from moe_interp.hooks import blocks, experts
from moe_interp.hooks.attach import MoEHooks, attach
from moe_interp.hooks.layer import LayerPass, OpenLayer
from tests import tiny

TOKENS = tiny.random_tokens(2, 6)
ONE_TOKEN = tiny.random_tokens(1, 1, seed=3)
TOLERANCE = 5e-6

Seen = dict[tuple[str, tiny.Label], Tensor]
Edits = Iterable[tuple[str, tiny.Label, Callable[[Tensor], Tensor | None]]]


class Opened:
    """A tiny model three times: untouched, as a bridge, and as an attached bridge."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name, self.dtype = name, dtype
        self.hf: transformers.PreTrainedModel = tiny.build_hf(name, dtype=dtype)
        if dtype == torch.float64:
            tiny.set_experts_implementation(self.hf, "eager")
        self.plain: TransformerBridge = tiny.build_bridge(self.hf, name)
        self.bridge: TransformerBridge = tiny.build_bridge(self.hf, name)
        self.moe: MoEHooks = attach(self.bridge)
        self.native = tiny.native_layers(self.hf)

    @property
    def labels(self) -> tuple[tiny.Label, ...]:
        return self.moe.layers

    @property
    def last(self) -> tiny.Label:
        return self.moe.layers[-1]

    def precision(self) -> AbstractContextManager[None]:
        """Lifts the families' own casts to float32 in a float64 model."""
        return tiny.float64_casts() if self.dtype == torch.float64 else nullcontext()

    def native_logits(self, tokens: Tensor = TOKENS) -> Tensor:
        with self.precision():
            return tiny.native_logits(self.hf, self.name, tokens)

    def plain_logits(self, tokens: Tensor = TOKENS) -> Tensor:
        with torch.no_grad(), self.precision():
            return self.plain(tokens, **tiny.model_inputs(self.name, tokens))

    def run(self, edits: Edits = (), tokens: Tensor = TOKENS, grad: bool = False) -> Tensor:
        """Logits under edits ``(hook, layer, function of the activation)``."""
        hooks = [(self.moe.hook_name(hook, label), _as_hook(edit)) for hook, label, edit in edits]
        inputs = tiny.model_inputs(self.name, tokens)
        with torch.set_grad_enabled(grad), self.precision(), self.bridge.hooks(fwd_hooks=hooks):
            return self.bridge(tokens, **inputs)

    def see(
        self,
        edits: Edits = (),
        tokens: Tensor = TOKENS,
        *,
        only: Iterable[str] | None = None,
        labels: Iterable[tiny.Label] | None = None,
    ) -> tuple[Tensor, Seen]:
        """Logits, and what every hook point (or ``only`` some) hands on after the edits, in the order they fired."""
        seen: Seen = {}

        def recorder(hook: str, label: tiny.Label) -> Callable[[Tensor], None]:
            return lambda value: seen.__setitem__((hook, label), value.detach().clone())

        recorders = [
            (hook, label, recorder(hook, label))
            for label in (self.labels if labels is None else labels)
            for hook in self.moe.hooks(label)
            if only is None or hook in only
        ]
        return self.run([*edits, *recorders], tokens), seen


def _as_hook(edit: Callable[[Tensor], Tensor | None]) -> Callable[..., Tensor | None]:
    return lambda value, hook: edit(value)


@cache
def opened(name: str, dtype: torch.dtype = torch.float32) -> Opened:
    """One attached tiny model a family, shared by all tests: they leave no hook behind."""
    return Opened(name, dtype)


def is_hash_routed(model: Opened, label: tiny.Label) -> bool:
    return hasattr(model.native[label].router, "tid2eid")


def biggest_difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE, where: Any = "") -> None:
    assert actual.shape == expected.shape, where
    difference = biggest_difference(actual, expected)
    assert difference <= tolerance, f"{where}: {difference:.2e} > {tolerance:.0e}"


def assert_moved(actual: Tensor, reference: Tensor, at_least: float = 1e-3, where: Any = "") -> None:
    assert biggest_difference(actual, reference) >= at_least, where


def patch_mix(monkeypatch: pytest.MonkeyPatch, before: Callable[[LayerPass], None]) -> None:
    """Calls ``before`` with the running pass where the experts' weighted sum begins."""
    native = experts.sum_of_experts

    def sum_of_experts(layer: OpenLayer, run: LayerPass, hidden: Tensor) -> Tensor:
        before(run)
        return native(layer, run, hidden)

    for module in (experts, blocks):
        monkeypatch.setattr(module, "sum_of_experts", sum_of_experts)
