"""RMS norms in few passes: equal to every family's own, and nothing else is taken for one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from moe_interp.engine.cpu.rms_norm import rms_norm
from tests import tiny


class Norm(nn.Module):
    """What the families write, with one thing changed."""

    def __init__(self, change: str = "") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(16) + 0.5)
        self.variance_epsilon = 1e-6
        self.change = change
        if change == "a bias":
            self.bias = nn.Parameter(torch.zeros(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        eps = 1e-5 if self.change == "another epsilon" else self.variance_epsilon
        if self.change == "a mean":
            x = x - x.mean(-1, keepdim=True)
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        if self.change == "a limit":
            normed = normed.clamp(-1.5, 1.5)
        return normed if self.change == "no weight" else normed * self.weight


@pytest.mark.parametrize("change", ["another epsilon", "a mean", "a limit", "no weight", "a bias"])
def test_refuses_what_is_not_one(change: str) -> None:
    assert rms_norm(Norm()) is not None
    assert rms_norm(Norm(change)) is None


@pytest.mark.parametrize("module", [nn.LayerNorm(16), nn.Linear(16, 16), nn.Identity(), Norm().double()])
def test_refuses_other_modules(module: nn.Module) -> None:
    assert rms_norm(module) is None


def test_equals_every_family_that_has_one() -> None:
    found = set()
    for name in tiny.FAMILIES:
        for module in tiny.build_hf(name).modules():
            own: Any = (
                rms_norm(module)
                if "RMSNorm" in type(module).__name__ and "Gated" not in type(module).__name__
                else None
            )
            if own is None:
                continue
            found.add(type(module).__name__)
            width = len(module.weight)  # type: ignore[arg-type]
            for size in (1e-4, 1.0, 1e4):
                x = torch.randn(3, 5, width) * size
                with torch.no_grad():
                    torch.testing.assert_close(own(x), module(x), atol=2e-6, rtol=2e-6)
    assert len(found) >= 20


def test_follows_the_weights() -> None:
    module, x = Norm(), torch.randn(4, 16)
    own: Any = rms_norm(module)
    with torch.no_grad():
        module.weight.mul_(3.0)
        torch.testing.assert_close(own(x), module(x), atol=1e-5, rtol=0)
