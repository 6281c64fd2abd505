"""The model's own modules in their fastest equal form, for passes that the library itself runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge.generalized_components import NormalizationBridge

from moe_interp.hooks.attach import MoEHooks
from moe_interp.hooks.swap import swapped_forward

LOOP_FROM = 100  # rows an expert: from there on a CPU's loop over experts is faster than its grouped product


class LeanPasses:
    """Norms and experts of an attached model, for :meth:`norms` and :meth:`experts`.

    Args:
        moe: The attached hooks.
    """

    def __init__(self, moe: MoEHooks) -> None:
        specs = [moe.spec(layer) for layer in moe.layers]
        self._norms: list[Any] = [m for m in moe.bridge.modules() if _is_native(m)]
        # at lower precision the loop rounds its sum over slots more often than the grouped product
        dtype = next(moe.bridge.original_model.parameters()).dtype
        configs = [getattr(spec.experts, "config", None) for spec in specs] if dtype == torch.float32 else []
        self._configs: dict[int, Any] = {id(c): c for c in configs if hasattr(c, "_experts_implementation")}
        self._experts_per_slot = min(spec.n_experts / spec.top_k for spec in specs)

    @contextmanager
    def norms(self) -> Iterator[None]:
        """Inside the ``with``, norms that nobody hooks are computed once, with the same bits.

        TransformerLens computes scale and normalized value for its hooks, and then calls the model's own module.
        """
        with ExitStack() as stack:
            for norm in self._norms:
                points = (norm.hook_in, norm.hook_scale, norm.hook_normalized, norm.hook_out)
                if not any(point.has_hooks() for point in points):
                    stack.enter_context(swapped_forward(norm, _own_forward(norm.original_component)))
            yield

    @contextmanager
    def experts(self, tokens: Tensor) -> Iterator[None]:
        """Inside the ``with``, float32 experts run one after the other where that is faster; equal to rounding.

        transformers' grouped product walks through all rows for every step of an expert; its loop keeps an expert's
        rows in the processor's cache. An implementation that somebody chose stays.

        Args:
            tokens: Of the pass, ``[batch, pos]``.
        """
        loops = tokens.device.type == "cpu" and tokens.numel() >= LOOP_FROM * self._experts_per_slot
        chosen = [c for c in self._configs.values() if loops and c._experts_implementation == "grouped_mm"]
        try:
            for config in chosen:
                config._experts_implementation = "eager"
            yield
        finally:
            for config in chosen:
                config._experts_implementation = "grouped_mm"


def _is_native(module: nn.Module) -> bool:
    return isinstance(module, NormalizationBridge) and module.use_native_layernorm_autograd


def _own_forward(native: Any) -> Any:
    def forward(hidden: Tensor, **kwargs: Any) -> Tensor:
        return native(hidden).to(hidden.dtype)

    return forward
