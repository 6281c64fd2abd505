"""The axis vocabulary and the tensor aliases used in signatures.

Axes, always in this order: ``batch pos layer expert slot d_model d_expert domain item route``. A *slot* is a place in a
token's route, in the router's own order; an empty slot holds expert -1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from jaxtyping import Float, Int
from torch import Tensor

from moe_interp.slots import EMPTY as EMPTY

Logits = Float[Tensor, "*token expert"]
Indices = Int[Tensor, "*token slot"]
Weights = Float[Tensor, "*token slot"]

Stack = Literal["encoder", "decoder"]
Layer = int | tuple[Stack, int]
"""A layer label: its index, or ``("encoder", index)`` / ``("decoder", index)`` in an encoder-decoder."""

HookFunction = Callable[..., Any]
Hooks = list[tuple[str, HookFunction]]
"""What ``run_with_hooks(fwd_hooks=...)`` and ``hooks(fwd_hooks=...)`` take."""
