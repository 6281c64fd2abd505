"""The model's own modules in their fastest equal form, for passes that the library itself runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge.generalized_components import NormalizationBridge

from moe_interp.arch.modules import is_watched
from moe_interp.engine.cpu.expert_loop import LOOP
from moe_interp.engine.cpu.matmul import linear
from moe_interp.engine.cpu.rms_norm import rms_norm
from moe_interp.engine.policy import policy_of
from moe_interp.engine.replaced_forward import swapped_forward
from moe_interp.hooks.attach import MoEHooks


class FastModules:
    """Norms, linear maps and experts of an attached model, for :meth:`modules` and :meth:`experts`.

    Args:
        moe: The attached hooks.
    """

    def __init__(self, moe: MoEHooks) -> None:
        specs = [moe.spec(layer) for layer in moe.layers]
        model: nn.Module = moe.bridge.original_model
        self._norms: list[Any] = [m for m in moe.bridge.modules() if _is_native(m)]
        self._linears = [m for m in model.modules() if type(m) is nn.Linear]
        self._policy = policy_of(moe)
        is_apt = self._policy.shortens_modules
        readable = [spec.experts for spec in specs if spec.unreadable is None]
        stacked = [experts for experts in readable if not getattr(experts, "_is_expert_parallel", False)]
        configs = [getattr(experts, "config", None) for experts in stacked] if is_apt else []
        self._configs: dict[int, Any] = {id(c): c for c in configs if hasattr(c, "_experts_implementation")}
        self._rows_a_token = max(spec.top_k / spec.n_experts for spec in specs)
        self._work_a_row = max(3 * spec.d_model * spec.d_expert for spec in specs)

    @cached_property
    def _short(self) -> dict[int, Callable[[Tensor], Tensor] | None]:
        """By id of a norm's wrapper, its short form: each is tried on a few rows when the first pass asks for it."""
        is_apt = self._policy.shortens_modules
        return {id(m): rms_norm(m.original_component) for m in self._norms} if is_apt else {}

    @contextmanager
    def modules(self) -> Iterator[None]:
        """Inside the ``with``, norms are as :meth:`norms` has them, and linear maps by the faster library: equal to
        rounding.
        """
        with self.norms(), ExitStack() as stack:
            for native in self._linears:
                if "forward" not in native.__dict__:
                    stack.enter_context(swapped_forward(native, partial(_linear, native)))
            yield

    @contextmanager
    def norms(self) -> Iterator[None]:
        """Inside the ``with``, norms that nobody hooks are computed once, in fewer passes: equal to rounding.

        TransformerLens computes a norm's scale and normalized value for its hooks, and then calls the model's own
        module.
        """
        with ExitStack() as stack:
            for norm in self._norms:
                points = (norm.hook_in, norm.hook_scale, norm.hook_normalized, norm.hook_out)
                if not any(point.has_hooks() for point in points):
                    native = norm.original_component
                    short = None if is_watched(native) else self._short.get(id(norm))
                    stack.enter_context(swapped_forward(norm, _own_forward(native, short)))
            yield

    @contextmanager
    def native_norms(self) -> Iterator[None]:
        """Inside the ``with``, the model's own norms too, for passes that go past TransformerLens' components."""
        with ExitStack() as stack:
            for norm in self._norms:
                native = norm.original_component
                if (short := self._short.get(id(norm))) is not None and not is_watched(native):
                    stack.enter_context(swapped_forward(native, _short_or(native.forward, short)))
            yield

    @contextmanager
    def experts(self, n_tokens: int) -> Iterator[None]:
        """Inside the ``with``, float32 experts run one after the other where that is faster; equal to rounding.

        transformers' grouped product walks through all rows for every step of an expert; a loop keeps an expert's
        rows in the processor's cache. An implementation that somebody chose stays.

        Args:
            n_tokens: How many a pass reads.
        """
        rows = n_tokens * self._rows_a_token
        loops = self._policy.loops_experts(rows, self._work_a_row)
        chosen = [c for c in self._configs.values() if loops and c._experts_implementation == "grouped_mm"]
        try:
            for config in chosen:
                config._experts_implementation = LOOP
            yield
        finally:
            for config in chosen:
                config._experts_implementation = "grouped_mm"


def _is_native(module: nn.Module) -> bool:
    return isinstance(module, NormalizationBridge) and module.use_native_layernorm_autograd


def _own_forward(native: Any, short: Callable[[Tensor], Tensor] | None) -> Any:
    def forward(hidden: Tensor, **kwargs: Any) -> Tensor:
        if short is None or hidden.dtype != torch.float32 or torch.is_grad_enabled():
            return native(hidden).to(hidden.dtype)
        return short(hidden)

    return forward


def _short_or(native: Callable[..., Tensor], short: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or hidden.dtype != torch.float32 or torch.is_grad_enabled():
            return native(hidden, *args, **kwargs)
        return short(hidden)

    return forward


def _linear(native: nn.Linear, input: Tensor) -> Tensor:  # the name that nn.Linear gives it
    return linear(input, native.weight, native.bias)
