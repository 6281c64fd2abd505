"""A layer's experts as functions of rows, by the fastest product that the engine has for them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from moe_interp.arch.expert_functions import ExpertFunctions
from moe_interp.arch.spec import MoESpec
from moe_interp.engine.cpu.matmul import linear


def fast_experts(spec: MoESpec) -> tuple[ExpertFunctions, Callable[[Tensor], Tensor] | None]:
    """The layer's ``expert_functions`` and ``project``, equal to rounding; call it inside ``reading_experts``.

    Raises:
        HookError: their weights cannot be read.
    """
    return spec.expert_functions_by(linear), spec.project_by(linear)
