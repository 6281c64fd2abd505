"""One line of the table that ``verify`` makes, and what it is measured by."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_interp.types import Layer
from moe_interp.verification.model_under_test import ModelUnderTest

_HOLDS = {"<=": operator.le, ">": operator.gt}
# units of the number format that two orders of the same steps may differ by: (coarsest unit, units)
_ROUNDING = ((1e-3, 4), (1e-4, 16), (0.0, 128))


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the table: ``figure relation bound`` must hold; NaN is an exception, which the note explains."""

    check: str
    layer: Layer
    hook: str
    figure: float
    relation: str = "<="
    bound: float = 0.0
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.figure != self.figure or _HOLDS[self.relation](self.figure, self.bound)


Check = Callable[[ModelUnderTest], Iterator[Finding]]


def excepted(check: str, layer: Layer, hook: str, why: str) -> Finding:
    """A check without a meaning here."""
    return Finding(check=check, layer=layer, hook=hook, figure=float("nan"), note=f"excepted: {why}")


def near(
    check: str, layer: Layer, hook: str, value: Tensor, expected: Tensor, tested: ModelUnderTest, note: str = ""
) -> Finding:
    """The relative difference of the worst token, bounded by rounding."""
    bound = rounding(tested, layer) + tested.noise / max(float(expected.abs().max()), 1e-30)
    figure = relative(value, expected)
    return Finding(check=check, layer=layer, hook=hook, figure=figure, bound=bound, note=note)


def relative(value: Tensor, expected: Tensor) -> float:
    """``max_t |value_t - expected_t| / max(|expected_t|, rms_t |expected_t|)``, in Euclidean norms of tokens.

    Of one expert's or one token's mistake it shows the whole, where a maximum over entries is mostly rounding.
    """
    if value.numel() != expected.numel():
        return float("inf")
    expected = expected.reshape(len(expected.flatten(0, -2)), -1).double()
    missed = (value.reshape(expected.shape).double() - expected).norm(dim=-1)
    sizes = expected.norm(dim=-1)
    figure = (missed / sizes.clamp_min(max(float(sizes.square().mean().sqrt()), 1e-30))).max()
    return float(figure.nan_to_num(float("inf"), float("inf")))


def rounding(tested: ModelUnderTest, layer: Layer) -> float:
    """What two orders of the same steps may differ by, relative to the result.

    4 units of the number format in bfloat16, 16 in float16 and TF32, 128 in float32; float64 is bounded as float32, in
    which many families compute their weights whatever the model's format.
    """
    formats = (tested.block_outputs[layer], tested.natural, tested.router_calls[layer].args[0])
    unit = max(1.2e-7, *(unit_of(value) for value in formats))
    return next(units for least, units in _ROUNDING if unit > least) * unit


def unit_of(value: Tensor) -> float:
    """A unit of the number format, as matrix products compute in it."""
    tf32 = value.is_cuda and value.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return 2.0**-10 if tf32 else float(torch.finfo(value.dtype).eps)
