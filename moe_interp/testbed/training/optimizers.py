"""Optimisers of the testbed: AdamW, and Muon for the matrices (experts included) beside AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """The nearest (semi-)orthogonal matrix of each trailing matrix, by a quintic Newton-Schulz iteration.

    Shapes ``[..., m, n] -> [..., m, n]``. Singular values end within about .7 to 1.2, which Muon is content with.
    Source: Jordan et al., "Muon" (2024). Batched, which ``torch.optim.Muon`` is not: experts are 3-dimensional.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g / (g.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Momentum, then :func:`orthogonalise`, scaled by sqrt(max(1, m / n)). For parameters of 2 or 3 dimensions.

    ``found_inf`` is what a gradient scaler sets on torch's own optimisers: a number on the device, of which 1 makes a
    step leave everything as it is.
    """

    found_inf: Tensor | None = None

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 0.02, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        skips = None if self.found_inf is None else self.found_inf > 0
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None or not p.numel():  # DeepSeek's shared experts, of which there may be none
                    continue
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                gradient = p.grad if skips is None else torch.where(skips, momentum, p.grad)
                momentum.lerp_(gradient, 1 - group["momentum"])
                update = orthogonalise(gradient.lerp(momentum, group["momentum"]))
                if skips is not None:
                    update *= ~skips
                p.add_(update, alpha=-group["lr"] * max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5)


def skip_steps(optimizers: Iterable[torch.optim.Optimizer], flag: Tensor) -> None:
    """Let optimisers leave weights and state as they are where a number on the device is 1."""
    for optimizer in optimizers:
        setattr(optimizer, "found_inf", flag)  # noqa: B010 - torch declares no such attribute


def make_optimizers(
    model: nn.Module, kind: str, lr: float, muon_lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """[AdamW] over everything, or [AdamW, Muon] with Muon for all matrices but embeddings, head and routers."""
    matrices, others, vectors = [], [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p.ndim < 2:
            vectors.append(p)
        elif kind == "muon" and not any(part in name for part in ("embed", "lm_head", ".gate.weight")):
            matrices.append(p)
        else:
            others.append(p)
    groups = [{"params": others, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)]
    return [*optimizers, Muon(matrices, lr=muon_lr)] if kind == "muon" else optimizers
