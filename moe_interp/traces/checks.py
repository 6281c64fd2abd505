"""What makes a trace valid; every refusal names the token, layer and expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moe_interp.checks import as_whole, check_name, check_whole
from moe_interp.errors import DataError
from moe_interp.slots import NATIVE

PHASES = ("prefill", "generation")


def as_array(values: Any) -> NDArray[Any]:
    """A numpy array of an array-like or a tensor on any device, bfloat16 included.

    Raises:
        DataError: lists of unequal lengths.
    """
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() else values
    try:
        return np.asarray(values)
    except ValueError as error:  # of rows of unequal length
        raise DataError(
            f"lists that are no array ({error})",
            "rows of one length",
            "Fill short routes up with -1, and weights with 0.",
        ) from error


def checked_indices(values: ArrayLike) -> NDArray[np.int32]:
    """``[token, layer, slot]`` int32, at least one of each."""
    indices = as_array(values)
    if indices.ndim != 3 or 0 in indices.shape or indices.dtype.kind not in "iu":
        raise DataError(
            f"expert_indices of shape {indices.shape} and type {indices.dtype}",
            "integers [token, layer, slot], at least one of each",
            "Record at least one token, and flatten batch and position into one token axis without the padding.",
        )
    wide = np.iinfo(np.int32)
    if int(indices.max()) > wide.max or int(indices.min()) < wide.min:
        token, layer, slot = np.argwhere((indices > wide.max) | (indices < wide.min))[0]
        raise DataError(
            f"Expert {indices[token, layer, slot]} at token {token}, column {layer}, slot {slot}",
            "an index of 32 bits",
            "Check how the indices were recorded.",
        )
    return indices.astype(np.int32)


def uncovered(indices: NDArray[np.int32], covered: ArrayLike) -> NDArray[np.int32]:
    """The indices with ``NATIVE`` where a mask ``[token]`` or ``[token, layer]`` is False."""
    mask = as_array(covered)
    if mask.dtype != bool or mask.shape not in {indices.shape[:1], indices.shape[:2]}:
        raise DataError(
            f"covered of shape {mask.shape} and type {mask.dtype}",
            f"a boolean mask [token] or [token, layer], {indices.shape[:1]} or {indices.shape[:2]}",
            "True where the routes were recorded.",
        )
    mask = mask.reshape(*mask.shape, *[1] * (3 - mask.ndim))
    return np.where(mask, indices, np.int32(NATIVE))


def checked_count(n_experts: int | None, indices: NDArray[np.int32]) -> int:
    """The number of experts, which the indices alone do not tell."""
    if (as_whole(n_experts) or 0) < 1:
        raise DataError(
            f"n_experts={n_experts}",
            "the number of experts of a layer",
            f"Pass n_experts; the largest index in the trace is {int(indices.max())}.",
        )
    return check_whole(n_experts, "n_experts", error=DataError)


def checked_layers(layers: Sequence[int] | None, n_layers: int) -> tuple[int, ...]:
    """The model's layer indices, one per layer of the trace, none twice."""
    given = (
        tuple(range(n_layers))
        if layers is None
        else tuple(check_whole(layer, "a layer of the trace", error=DataError) for layer in layers)
    )
    if len(given) != n_layers or len(set(given)) != n_layers:
        raise DataError(
            f"layers={list(given)} for a trace with {n_layers} layers",
            f"{n_layers} different layer indices",
            "Give the model's index of each recorded layer.",
        )
    return given


def refuse_bad_experts(indices: NDArray[np.int32], n_experts: int, layers: tuple[int, ...]) -> None:
    """Refuse experts out of range, experts that fill two slots of one token and layer, and routes covered in part."""
    native = indices == NATIVE
    mixed = native & ~native.all(axis=2, keepdims=True)
    outside = (indices < NATIVE) | (indices >= n_experts) | mixed
    if outside.any():
        token, layer, slot = np.argwhere(outside)[0]
        raise DataError(
            f"Expert {indices[token, layer, slot]} at token {token}, layer {layers[layer]}, slot {slot}",
            f"an index from 0 to {n_experts - 1}, -1 for an empty slot, "
            f"or {NATIVE} in all slots of a token that the trace does not cover",
            "Check n_experts and how the indices were recorded.",
        )
    ordered = np.sort(indices, axis=2)
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    if twice.any():
        token, layer, slot = np.argwhere(twice)[0]
        raise DataError(
            f"Expert {ordered[token, layer, slot]} twice at token {token}, layer {layers[layer]}",
            "each expert at most once in a route",
            "Mark unused slots by -1 instead of repeating an expert.",
        )


def checked_weights(values: ArrayLike, indices: NDArray[np.int32], layers: tuple[int, ...]) -> NDArray[np.float32]:
    """Finite float32 weights in the shape of the indices, 0 at empty slots."""
    return _by_slot("expert_weights", "Weight", values, indices, layers)


def checked_norms(values: ArrayLike, indices: NDArray[np.int32], layers: tuple[int, ...]) -> NDArray[np.float32]:
    """Finite float32 norms in the shape of the indices, none negative, 0 at empty slots."""
    norms = _by_slot("expert_norms", "Norm", values, indices, layers)
    if (norms < 0).any():
        token, layer, slot = np.argwhere(norms < 0)[0]
        raise DataError(
            f"Norm {norms[token, layer, slot]} at token {token}, layer {layers[layer]}, "
            f"expert {indices[token, layer, slot]}",
            "norms of at least 0",
            "Record the L2 norm of each expert's output before its weight is applied.",
        )
    return norms


def _by_slot(
    name: str, one: str, values: ArrayLike, indices: NDArray[np.int32], layers: tuple[int, ...]
) -> NDArray[np.float32]:
    numbers = as_array(values)
    if numbers.shape != indices.shape or numbers.dtype.kind not in "fiu":
        raise DataError(
            f"{name} of shape {numbers.shape} and type {numbers.dtype}",
            f"numbers in the shape of expert_indices, {indices.shape}",
            f"Record {name} and indices from the same forward pass.",
        )
    numbers = np.where(indices >= 0, numbers, 0).astype(np.float32)
    if not np.isfinite(numbers).all():
        token, layer, slot = np.argwhere(~np.isfinite(numbers))[0]
        raise DataError(
            f"{one} {numbers[token, layer, slot]} at token {token}, layer {layers[layer]}, "
            f"expert {indices[token, layer, slot]}",
            f"finite {name.removeprefix('expert_')}",
            "Look for a non-finite activation in the model, or for padding recorded as tokens.",
        )
    return numbers


def checked_vectors(
    name: str, values: ArrayLike, indices: NDArray[np.int32], layers: tuple[int, ...], width: int | None = None
) -> NDArray[np.float32]:
    """Finite float32 ``[token, layer, width]``; NaN in the rows that the trace does not cover."""
    vectors = as_array(values)
    expected = (*indices.shape[:2], width or (vectors.shape[-1] if vectors.ndim == 3 else 0))
    if vectors.shape != expected or 0 in vectors.shape or vectors.dtype.kind not in "fiu":
        raise DataError(
            f"{name} of shape {vectors.shape} and type {vectors.dtype}",
            f"numbers of shape ({expected[0]}, {expected[1]}, {width or 'd_model'})",
            f"Record {name} and indices from the same forward pass.",
        )
    is_native = (indices == NATIVE).all(axis=2)
    vectors = np.where(is_native[..., None], np.float32(np.nan), vectors.astype(np.float32, copy=False))
    wrong = ~np.isfinite(vectors).all(axis=2) & ~is_native
    if wrong.any():
        token, layer = np.argwhere(wrong)[0]
        raise DataError(
            f"{name} with a non-finite number at token {token}, layer {layers[layer]}",
            "finite numbers",
            "Look for a non-finite activation in the model, or for padding recorded as tokens.",
        )
    return vectors


def checked_phase(values: ArrayLike | None, n_tokens: int) -> NDArray[np.str_] | None:
    """One of the two phases per token, from one for all or one per token."""
    if values is None:
        return None
    phase = np.asarray(values)
    known = phase.dtype.kind in "UO" and all(value in PHASES for value in phase.ravel().tolist())
    if phase.shape not in {(), (n_tokens,)} or not known:
        raise DataError(
            f"phase of shape {phase.shape} with {sorted({str(value)[:20] for value in phase.ravel().tolist()})[:4]}",
            f"{' or '.join(PHASES)}, one for all or one for each of {n_tokens} tokens",
            "Say in which phase each token was the input.",
        )
    return np.broadcast_to(phase.astype(np.str_), (n_tokens,)).copy()


def checked_lengths(values: ArrayLike | None, n_tokens: int) -> NDArray[np.int64]:
    """Positive lengths that add up to the number of tokens."""
    lengths = np.array([n_tokens]) if values is None else as_array(values)
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu" or (lengths < 1).any() or lengths.sum() != n_tokens:
        total = lengths.sum() if lengths.dtype.kind in "iu" else "not defined"
        raise DataError(
            f"sequence_lengths of shape {lengths.shape}, type {lengths.dtype} and sum {total}",
            f"positive integers [sequence] that add up to the {n_tokens} tokens of the trace",
            "Give the number of real tokens of each sequence, in the order of the token axis.",
        )
    return lengths.astype(np.int64)


def checked_ids(name: str, values: ArrayLike | None, n_tokens: int) -> NDArray[np.int64] | None:
    """One integer per token."""
    if values is None:
        return None
    ids = as_array(values)
    if ids.shape != (n_tokens,) or ids.dtype.kind not in "iu":
        raise DataError(
            f"{name} of shape {ids.shape} and type {ids.dtype}",
            f"integers of shape ({n_tokens},)",
            "Give one id per token of the trace, without the padding.",
        )
    return ids.astype(np.int64)


def checked_domain(values: ArrayLike | None, lengths: NDArray[np.int64]) -> NDArray[np.str_] | None:
    """One label per token, from one label for all, one per sequence or one per token."""
    if values is None:
        return None
    # as objects: a fixed-width text of numpy would drop what NUL cuts off
    labels = values if isinstance(values, np.ndarray) else np.asarray(values, dtype=object)
    n_tokens = int(lengths.sum())
    if labels.shape not in {(), (len(lengths),), (n_tokens,)}:
        raise DataError(
            f"domain of shape {labels.shape}",
            f"one label, {len(lengths)} labels (one per sequence) or {n_tokens} (one per token)",
            "Give one label for each sequence, in the order of the trace.",
        )
    names = {label: check_name(label, "domain") for label in set(labels.ravel().tolist())}
    labels = np.array([names[label] for label in labels.ravel().tolist()], dtype=np.str_).reshape(labels.shape)
    if labels.shape == (len(lengths),):
        return np.repeat(labels, lengths)
    return np.broadcast_to(labels, (n_tokens,)).copy()
