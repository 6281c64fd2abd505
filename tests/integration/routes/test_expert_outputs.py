"""The experts' outputs that branches mix: by grouped products, and by the loop, they give the same scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_interp.arch import grouped_experts, grouped_products
from moe_interp.routes import score_routes
from tests.integration.routes.helpers import (
    DECODERS,
    SERVED_FROM,
    attached,
    largest_difference,
    padded_batch,
    random_routes,
    served_layers,
)


@pytest.mark.parametrize("name", [name for name in DECODERS if SERVED_FROM.get(name, True)])
def test_both_ways_score_alike(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    moe = attached(name)
    tokens, mask = padded_batch()
    layer = served_layers(name, moe)[-1]
    routes = random_routes(moe, layer, tokens)
    assert grouped_products.has_grouped_product(torch.zeros(1))  # tried before calls are counted
    native, rows_of_calls = grouped_products._PRODUCT, []

    def counted(rows: Tensor, weights: Tensor, **kwargs: Any) -> Tensor:
        rows_of_calls.append(len(rows))
        assert native is not None
        return native(rows, weights, **kwargs)

    monkeypatch.setattr(grouped_products, "_PRODUCT", counted)

    def scored(loop_from: int) -> Tensor:
        monkeypatch.setattr(grouped_experts, "LOOP_FROM_ROWS", loop_from)
        return score_routes(moe, tokens, layer, routes, attention_mask=mask, method="branch")

    with torch.no_grad():
        loop = scored(0)
        assert rows_of_calls == []
        grouped = scored(10**9)
    assert len(rows_of_calls) > 2  # in parts: two products each
    assert bool(loop.isfinite().any())
    assert largest_difference(grouped, loop) <= 2e-5
