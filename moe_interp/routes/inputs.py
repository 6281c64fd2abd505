"""What scoring is given: tokens, positions, layers and routes, refused where nothing could be scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_interp.errors import ConfigError, DataError, RouteError
from moe_interp.hooks.attach import MoEHooks
from moe_interp.hooks.branches import BasePass
from moe_interp.hooks.layer import check_route
from moe_interp.routes.branch import LayerRoutes, ruled_routes
from moe_interp.types import Layer


def check_tokens(moe: MoEHooks, tokens: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Token ids and their mask as ``[batch, pos]`` on the model's device, refused where the model cannot read them.

    Raises:
        DataError: no integer ids, ids outside of the vocabulary, a mask of another shape, or sequences beyond the
            context.
    """
    expected = "integer ids [batch, pos], and a mask of that shape if any"
    remedy = "Tokenise the text and pad it to one width."
    device = moe.bridge.cfg.device
    try:
        ids = torch.as_tensor(tokens).to(device)
        mask = None if attention_mask is None else torch.as_tensor(attention_mask).to(device)
    except (TypeError, ValueError) as error:
        raise DataError(f"tokens or a mask that make no tensor ({error})", expected, remedy) from error
    ids = ids.unsqueeze(0) if ids.ndim == 1 else ids
    if ids.ndim != 2 or not ids.numel() or not _is_integer(ids) or (mask is not None and mask.shape != ids.shape):
        beside = "" if mask is None else f" with a mask of shape {tuple(mask.shape)}"
        raise DataError(f"tokens of shape {tuple(ids.shape)} and dtype {ids.dtype}{beside}", expected, remedy)
    _check_ids(ids, int(getattr(moe.bridge.cfg, "d_vocab", 0) or 2**31))
    model: Any = moe.bridge.original_model
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and ids.shape[1] > context:
        raise DataError(
            f"sequences of {ids.shape[1]} tokens",
            f"at most {context}, the model's context",
            "Split the sequences.",
        )
    return ids.long(), mask


def _check_ids(ids: Tensor, vocabulary: int) -> None:
    is_out = (ids < 0) | (ids >= vocabulary)
    if bool(is_out.any()):
        sequence, pos = is_out.nonzero()[0].tolist()
        raise DataError(
            f"token id {int(ids[sequence, pos])} of sequence {sequence}, position {pos}",
            f"ids from 0 to {vocabulary - 1}, also at padding",
            "Tokenise the text for this model.",
        )


def scorable(base: BasePass, positions: Sequence[int] | Tensor | None = None) -> Tensor:
    """``[batch, pos]`` bool: real tokens with a real next token, among the positions asked.

    Raises:
        DataError: there is none, or positions that are neither integers nor a mask of the tokens.
    """
    real = base.is_real
    wanted = torch.zeros_like(real)
    wanted[:, :-1] = real[:, :-1] & real[:, 1:]
    if positions is not None:
        asked = torch.as_tensor(positions, device=real.device)
        asked = asked.long() if not asked.numel() else asked
        is_mask = asked.dtype == torch.bool
        if (asked.shape != real.shape) if is_mask else (asked.ndim != 1 or not _is_integer(asked)):
            raise DataError(
                f"positions of shape {tuple(asked.shape)} and dtype {asked.dtype}",
                f"a list of integers, or bool of shape {tuple(real.shape)}",
                "Give the same positions for all sequences, or a mask of the tokens.",
            )
        if is_mask:
            wanted &= asked
        else:
            index, length = real.long().cumsum(dim=1) - 1, real.long().sum(dim=1, keepdim=True)
            asked = torch.where(asked < 0, asked + length, asked.expand(len(real), -1))
            wanted &= (index.unsqueeze(-1) == asked.unsqueeze(1)).any(dim=-1)
    if not bool(wanted.any()):
        raise DataError(
            f"no token to score among {int(real.sum())} real tokens"
            + ("" if positions is None else f" and positions {positions}"),
            "at least one real token followed by a real token",
            "Pass longer sequences, or other positions.",
        )
    return wanted


def check_routes(base: BasePass, layer: int, indices: Tensor, weights: Tensor | None = None) -> LayerRoutes:
    """Routes of one layer, with their weights, refused where no token could take them.

    Raises:
        RouteError: another shape, another number of slots, repeated or out-of-range experts, or weights that
            do not fit.
        DataError: no route.
    """
    spec, (batch, pos) = base.moe.spec(layer), base.tokens.shape
    given = torch.as_tensor(indices).to(base.tokens.device)
    if given.ndim == 4 and given.shape[2] == 0:
        raise DataError("no route to score", "at least one route a token", "Sample routes first.")
    expected = f"integers of shape [{batch}, {pos}, route, {spec.top_k}]"
    if not _is_integer(given) or given.ndim != 4 or given.shape[:2] != (batch, pos) or given.shape[3] != spec.top_k:
        raise RouteError(
            f"routes of shape {tuple(given.shape)} and dtype {given.dtype}",
            f"{expected}: an equal number of experts",
            "Fill routes of fewer experts with -1.",
        )
    given = given.long()
    check_route(given, spec.n_experts, f"layer {layer}")
    fixed = None if weights is None else torch.as_tensor(weights).to(base.tokens.device)
    if fixed is not None and (fixed.shape != given.shape or not bool(fixed.isfinite().all())):
        raise RouteError(
            f"weights of shape {tuple(fixed.shape)}" + ("" if fixed.shape != given.shape else " that are not finite"),
            f"a finite weight for each slot, of shape {tuple(given.shape)}",
            "Leave weights out for the family's own.",
        )
    return ruled_routes(base, layer, given, fixed)


def decoder_layer(moe: MoEHooks, layer: Layer) -> int:
    if isinstance(moe.layers[0], tuple):
        raise ConfigError(
            f"{moe.spec(moe.layers[0]).family.name}, an encoder-decoder",
            "a causal decoder",
            "Counterfactual routes are defined for next-token prediction; use the hooks directly.",
        )
    label = moe.layer_label(layer)
    assert isinstance(label, int)
    return label


def by_label(moe: MoEHooks, given: Mapping[Any, Tensor]) -> dict[int, Tensor]:
    """What is given by layer, with the layers as they are counted.

    Raises:
        RouteError: one layer under two names, such as 3 and -1.
    """
    found = {decoder_layer(moe, layer): value for layer, value in given.items()}
    if len(found) < len(given):
        raise RouteError(
            f"layers {list(given)}", "each layer once", "Name layers by one index, from 0 or from the end."
        )
    return found


def _is_integer(values: Tensor) -> bool:
    return not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)
