"""Isolation results with a known truth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from moe_interp.experiments.isolation.result import IsolationResult

DOMAINS = {"code": 20, "facts": 30, "math": 26}
ROUTERS = ("aligned", "permuted", "reversed")


def planted_isolation(
    *,
    n_items: Mapping[str, int] = DOMAINS,
    n_layers: int = 4,
    n_experts: int = 16,
    router: str = "aligned",
    noise: float = 0.3,
    quality_sd: float = 0.3,
    domain_sd: float | None = None,
    cells: Mapping[tuple[str, int, int], float] | None = None,
    fragility: float = 1.0,
    baselines: tuple[str, ...] = ("natural", "uniform", "random"),
    masses: tuple[str, ...] = ("one", "natural"),
    mode: str = "force",
    seed: int = 0,
    attrs: Mapping[str, Any] | None = None,
) -> IsolationResult:
    """A run whose truth is known.

    Expert e of layer l has a quality, N(0, ``quality_sd``^2) in common and N(0, ``domain_sd``^2) for each
    domain, or what ``cells[domain, layer, expert]`` says; forced, it shifts an item's score by that plus noise.
    ``fragility`` makes some domains lose more than others whatever the expert. The router's logits are that
    quality (``"aligned"``), its negative (``"reversed"``), or it with the experts' names permuted
    (``"permuted"``).
    """
    rng = np.random.default_rng(seed)
    names = sorted(n_items)
    domain = np.repeat(names, [n_items[name] for name in names])
    code = np.searchsorted(names, domain)
    n = len(domain)
    shared = rng.normal(0, quality_sd, (1, n_layers, n_experts))
    own = quality_sd / 2 if domain_sd is None else domain_sd
    quality = shared + rng.normal(0, 1, (len(names), n_layers, n_experts)) * own
    order = rng.permuted(np.tile(np.arange(n_experts), (n_layers, 1)), axis=-1)
    seen = {
        "aligned": quality,
        "reversed": -quality,
        "permuted": np.take_along_axis(quality, order[None], axis=-1),
    }[router]
    for (name, layer, expert), shift in (cells or {}).items():
        quality[names.index(name), layer, expert] = shift

    logits = 2 * seen[code] + rng.normal(0, 0.3, (3, n, n_layers, n_experts))
    routing = np.exp(logits)
    routing /= routing.sum(-1, keepdims=True)
    share = routing**2 / (routing**2).sum(-1, keepdims=True)

    score = rng.normal(-1.5, 0.3, n)
    way = -1 if mode == "ablate" else 1
    effect = way * quality[code] + rng.normal(0, noise, (n, n_layers, n_experts))
    forced = np.stack([score[:, None, None] + scale * effect for scale in np.linspace(1, 0.5, len(masses))])
    levels = {"natural": 0.0, "uniform": -0.2, "random": -0.6}
    fragile = 1 + fragility * code[:, None] / 10
    base = np.stack([score[:, None] + fragile * levels[b] * np.ones((n, n_layers)) for b in baselines])
    base = np.broadcast_to(base, (len(masses), *base.shape)).copy()
    delta = forced[:, None] - base[..., None]
    cell = ("mass", "baseline", "item", "layer", "expert")
    by_domain = np.stack([routing[0][code == c].mean(0) for c in range(len(names))])
    share_by_domain = np.stack([share[0][code == c].mean(0) for c in range(len(names))])
    data = xr.Dataset(
        {
            "delta": (cell, delta),
            "delta_first": (cell, delta + rng.normal(0, noise, delta.shape[2:])),
            "score": ("item", score),
            "score_first": ("item", score + 0.1),
            "baseline_score": (cell[:4], base),
            "baseline_score_first": (cell[:4], base + 0.1),
            "random_sd": (("mass", "item", "layer"), np.full((len(masses), n, n_layers), 0.1)),
            "routing_item": (("positions", "item", "layer", "routed_expert"), routing),
            "share_item": (("positions", "item", "layer", "routed_expert"), share),
            "routing_prob": (("domain", "layer", "routed_expert"), by_domain),
            "slot_share": (("domain", "layer", "routed_expert"), share_by_domain),
            "margin_min": 1e-3,
        },
        coords={
            "mass": list(masses),
            "baseline": list(baselines),
            "item": [f"{name}-{index}" for index, name in enumerate(domain)],
            "layer": np.arange(n_layers),
            "expert": np.arange(n_experts),
            "routed_expert": np.arange(n_experts),
            "positions": ["all", "prompt", "answer"],
            "domain": ("item", domain),
            "domain_name": ("domain", names),
            "n_answer_tokens": ("item", rng.integers(1, 6, n)),
            "n_prompt_tokens": ("item", rng.integers(5, 40, n)),
        },
        attrs={
            "mode": mode,
            "model": "planted",
            "n_experts": n_experts,
            "top_k": 2,
            "random_draws": 8,
            "null_difference": 0.0,
        }
        | dict(attrs or {}),
    )
    return IsolationResult(data)


def routing_apart(data: xr.Dataset) -> xr.Dataset:
    """Natural routing on an axis of its own, so that some of the experts can be selected, or put together to sets."""
    names = ("routing_item", "share_item", "routing_prob", "slot_share")
    return data.assign({name: data[name].rename(expert="routed_expert") for name in names})
