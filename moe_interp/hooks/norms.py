"""Norms without what is computed for their hooks alone, where nobody hooks them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor
from transformer_lens.model_bridge.generalized_components import NormalizationBridge

from moe_interp.hooks.attach import MoEHooks
from moe_interp.hooks.swap import swapped_forward


def native_norms(moe: MoEHooks) -> list[NormalizationBridge]:
    """The norms that answer with the model's own module, and compute the scale and the normalized value beside it."""
    return [
        m for m in moe.bridge.modules() if isinstance(m, NormalizationBridge) and m.use_native_layernorm_autograd
    ]


@contextmanager
def bare_norms(norms: Sequence[NormalizationBridge]) -> Iterator[None]:
    """Inside the ``with``, norms that nobody hooks run as the model's own modules: the same bits, computed once.

    Args:
        norms: Of :func:`native_norms`; those with a hook stay as they are.
    """
    with ExitStack() as stack:
        for norm in norms:
            points = (norm.hook_in, norm.hook_scale, norm.hook_normalized, norm.hook_out)
            if not any(point.has_hooks() for point in points):
                stack.enter_context(swapped_forward(norm, _bare(norm.original_component)))
        yield


def _bare(native: Any) -> Any:
    def forward(hidden: Tensor, **kwargs: Any) -> Tensor:
        return native(hidden).to(hidden.dtype)

    return forward
