"""Router logits as transformers returns them (``output_router_logits=True``), and the routes that follow from them.

``output.router_logits`` is a tuple, one tensor a MoE layer, ``[batch * pos, expert]``, padding included. It holds no
choice: which experts run is the family's routing rule, with correction bias, groups and scales. The largest logits are
the wrong experts in families that have those (deepseek_v3, glm4_moe, ernie4_5_moe and others).

What it holds in transformers 5.23: the router's logits in most families; gemma4's are probabilities; laguna's are taken
after its soft-cap; deepseek_v4's hash layers are missing; jetmoe's attention routers are among it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moe_interp.checks import check_whole
from moe_interp.disk import read_bytes
from moe_interp.errors import ConfigError, DataError
from moe_interp.results.npz import npz_arrays
from moe_interp.traces.checks import as_array
from moe_interp.traces.readers.columns import Layers, experts_of, unlabelled
from moe_interp.traces.readers.vllm import decoded_npy

EXPECTED = "router logits: an npz file with an array [token, expert] a layer, or npy [layer, token, expert]"
Rule = Literal["softmax", "topk_softmax"] | Callable[[Any], Any]
_NUMBER = re.compile(r"\d{1,9}")


def read_router_logits(
    path: str | Path,
    n_experts: int | None = None,
    layers: Layers = None,
    *,
    moe: Any = None,
    rule: Rule | None = None,
    top_k: int | None = None,
    attention_mask: Any = None,
    sequence_lengths: Any = None,
) -> dict[str, Any]:
    """The arguments of a trace from a file: ``numpy.savez(path, *router_logits)``, or npy ``[layer, token, expert]``.

    Args:
        path: The file.
        n_experts, layers, moe, rule, top_k, attention_mask: see ``RoutingTrace.from_router_logits``.
        sequence_lengths: Tokens of each sequence, where there is no padding.
    """
    source = Path(path)
    content = read_bytes(source, EXPECTED)
    if source.suffix == ".npy":
        whole = decoded_npy(content, str(source))
        values = list(whole) if whole.ndim >= 3 else [whole]
    else:
        try:
            arrays = npz_arrays(content)
        except Exception as error:  # zipfile and numpy raise errors of any class
            raise DataError(f"{str(source)!r} cannot be read ({error})", EXPECTED, "Save it again.") from error
        numbers = {name: [int(number) for number in _NUMBER.findall(name)] for name in arrays}
        values = [arrays[name] for name in sorted(arrays, key=lambda name: (numbers[name], name))]
    return router_logit_arguments(values, n_experts, layers, moe, rule, top_k, attention_mask, sequence_lengths)


def router_logit_arguments(
    router_logits: Sequence[Any],
    n_experts: int | None,
    layers: Layers,
    moe: Any,
    rule: Rule | None,
    top_k: int | None,
    attention_mask: Any,
    sequence_lengths: Any = None,
) -> dict[str, Any]:
    """The arguments of a trace; see ``RoutingTrace.from_router_logits``."""
    given = [value for value in router_logits if value is not None]
    if not given:
        raise DataError("no router logits", "one tensor a layer", "Run with output_router_logits=True.")
    arrays = [_flat(value, number) for number, value in enumerate(given)]
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        raise DataError(f"router logits of shapes {sorted(shapes)}", "one shape", "Pass one forward pass.")
    count = arrays[0].shape[1] if n_experts is None and moe is None else experts_of(n_experts, moe)
    if arrays[0].shape[1] != count:
        raise DataError(f"router logits of {arrays[0].shape[1]} experts", f"{count}", "Pass this model's logits.")
    none = np.zeros(len(arrays), bool)
    if layers == "all" or (moe is not None and layers is None):
        layers = "moe" if moe is not None else None
    labels, columns = unlabelled(layers, none, none, moe)
    mask, shape = _mask(attention_mask, len(arrays[0]), given[0])
    chosen = [_routes(given[column], arrays[column], label, moe, rule, top_k) for column, label in zip(columns, labels)]
    lengths = sequence_lengths
    if lengths is None:
        lengths = mask.reshape(shape).sum(axis=1) if shape is not None else [int(mask.sum())]
    return {
        "expert_indices": np.stack([indices for indices, _ in chosen], axis=1)[mask],
        "expert_weights": np.stack([weights for _, weights in chosen], axis=1)[mask],
        "sequence_lengths": lengths,
        "n_experts": count,
        "layers": labels,
        "router_logits": np.stack([arrays[column] for column in columns], axis=1)[mask],
    }


def _flat(value: Any, number: int) -> NDArray[np.float32]:
    array = as_array(value)
    if array.ndim not in (2, 3) or 0 in array.shape or array.dtype.kind != "f":
        raise DataError(
            f"router logits {number} of shape {array.shape} and type {array.dtype}",
            "[batch * pos, expert] or [batch, pos, expert]",
            "Run with output_router_logits=True.",
        )
    # shape: (batch, pos, expert) -> (batch pos, expert)
    flat = array.reshape(-1, array.shape[-1]).astype(np.float32)
    if not np.isfinite(flat).all():
        raise DataError(f"router logits {number} with a non-finite number", "finite numbers", "Look at the model.")
    if flat.shape[1] > 1 and (flat >= 0).all() and np.allclose(flat.sum(axis=1), 1, atol=1e-3):
        raise DataError(
            f"router logits {number} that are probabilities: none below 0, and a sum of 1 a token",
            "logits, before any softmax",
            "This family returns its probabilities (gemma4) or they were converted. Record the hooks instead: "
            'run_with_cache(names_filter=moe.filter("router_logits", "expert_indices", "expert_weights")); or pass '
            "their logarithm.",
        )
    return flat


def _mask(mask: Any, n: int, first: Any) -> tuple[NDArray[np.bool_], tuple[int, int] | None]:
    """``[batch * pos]`` real tokens, and ``(batch, pos)`` where that is known."""
    if mask is None:
        shape = tuple(first.shape)
        return np.ones(n, bool), (shape[0], shape[1]) if len(shape) == 3 else None
    real = as_array(mask)
    if real.ndim != 2 or real.size != n or not real.any(axis=1).all():
        raise DataError(
            f"an attention mask of shape {real.shape} for {n} tokens",
            "[batch, pos], 1 at real tokens",
            "Pass the run's.",
        )
    return real.astype(bool).ravel(), (real.shape[0], real.shape[1])


def _routes(
    value: Any, logits: NDArray[np.float32], layer: int, moe: Any, rule: Rule | None, top_k: int | None
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Experts and weights ``[token, slot]``."""
    if moe is not None and rule is None:
        family = moe.spec(layer).rule
        if getattr(family, "softcap", None) is not None or family.has_capacity:
            raise DataError(
                f"router logits of layer {layer}, which this family's router returns after its soft-cap, or whose "
                "routes depend on capacity",
                "logits that the routing rule starts from",
                'Record the hooks: run_with_cache(names_filter=moe.filter("router_logits", "expert_indices")).',
            )
        indices, weights = family.route(_tensor(value, logits))
    elif callable(rule):
        indices, weights = rule(value)
    elif rule in ("softmax", "topk_softmax"):
        if top_k is None:
            raise ConfigError(f"rule={rule!r} without top_k", "the number of experts a token", "Pass top_k=.")
        k = check_whole(top_k, "top_k", 1, logits.shape[1])
        return _softmax_routes(logits, k, over_all=rule == "softmax")
    else:
        raise ConfigError(
            f"rule={rule!r} and no attached model",
            'moe=, the attached model; or rule="softmax", "topk_softmax" or a function, with top_k',
            "Logits do not tell which experts ran: pass the model, or say how its family chooses.",
        )
    width = logits.shape[0]
    return as_array(indices).reshape(width, -1), as_array(weights).reshape(width, -1)


def _tensor(value: Any, logits: NDArray[np.float32]) -> Any:
    import torch

    flat = value if hasattr(value, "detach") else torch.from_numpy(logits)
    return flat.detach().reshape(logits.shape)


def _softmax_routes(
    logits: NDArray[np.float32], k: int, over_all: bool
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    chosen = np.take_along_axis(logits, order, axis=1).astype(float)
    over = logits.astype(float) if over_all else chosen
    top = logits.max(axis=1, keepdims=True)
    weights = np.exp(chosen - top) / np.exp(over - top).sum(axis=1, keepdims=True)
    return order.astype(np.int32), weights.astype(np.float32)
