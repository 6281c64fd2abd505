"""Which layer of the model each column of a recorded array is: by number, never by place alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moe_interp.checks import check_whole
from moe_interp.errors import DataError

Layers = Sequence[int] | Literal["all", "moe"] | None

HOW = (
    'Pass layers=[...], the model\'s index of each column; layers="all", a column for every layer of the model, dense '
    'ones included; layers="moe", the MoE layers in order; or moe=, the attached model.'
)


def experts_of(n_experts: int | None, moe: Any) -> int:
    """The number of experts that was given, or the attached model's."""
    of_model = {moe.spec(layer).n_experts for layer in moe.layers} if moe is not None else set()
    if n_experts is None and len(of_model) == 1:
        return int(of_model.pop())
    if n_experts is None:
        raise DataError(
            "no n_experts", "the number of experts of a layer", "Pass n_experts=, or the attached model as moe=."
        )
    count = check_whole(n_experts, "n_experts", 1, error=DataError)
    if of_model and of_model != {count}:
        raise DataError(f"n_experts={count}", f"{sorted(of_model)}, as the attached model", "Leave n_experts out.")
    return count


def checked_layers(layers: Any) -> Layers:
    """Layers as they were asked for: a list, "all", "moe" or None.

    Raises:
        DataError: anything else.
    """
    if layers is None or (isinstance(layers, str) and layers in ("all", "moe")):
        return layers  # type: ignore[return-value]
    if isinstance(layers, str) or not isinstance(layers, Iterable) or getattr(layers, "ndim", 1) == 0:
        raise DataError(f"layers={layers!r}", 'layer indices, "all" or "moe"', HOW)
    return [check_whole(layer, "a layer", 0, 2**31, error=DataError) for layer in layers]


def unlabelled(
    layers: Layers, blank: NDArray[np.bool_], unused: NDArray[np.bool_], moe: Any
) -> tuple[tuple[int, ...], list[int]]:
    """The layers of a trace whose columns carry no numbers, and the columns that they are in.

    Args:
        layers: The model's index of each column; "all": a column for every layer of the model; "moe": the MoE layers in
            order; None: what ``moe`` says.
        blank: ``[column]``, whether nothing was recorded there, as in the column of a dense layer.
        unused: ``[column]``, whether that may be: zeros, which with one slot a token may be expert 0.
        moe: Attached hooks, on all MoE layers, or None.

    Raises:
        DataError: none of these was given, the numbers do not fit, or a column is blank that should not be.
    """
    n, layers = len(blank), checked_layers(layers)
    if layers is None and moe is None:
        raise DataError(f"{n} columns without layer numbers", "the layer of each column", HOW)
    if moe is not None and (layers is None or isinstance(layers, str)):
        labels, columns = _of_model(layers, n, moe)
    elif layers == "moe":
        labels = columns = list(range(n))
    elif layers == "all":
        if unclear := np.flatnonzero(unused & ~blank).tolist():
            raise DataError(
                f"zeros in column {unclear[0]}, a dense layer's or expert 0 of all tokens",
                "columns of which this can be told",
                "Pass layers=[...], the MoE layers' indices, or moe=.",
            )
        labels = columns = np.flatnonzero(~blank).tolist()
    else:
        assert layers is not None
        labels = [int(layer) for layer in layers]
        columns = list(range(n)) if len(labels) == n else labels
        _refuse_misfits(labels, n, moe)
    if blank.all():
        raise never_ran("every column")
    for label, column in zip(labels, columns, strict=True):
        if blank[column]:
            raise never_ran(f"the column of layer {label}")
    if filled := [column for column in range(n) if column not in columns and not unused[column]]:
        raise DataError(
            f"routes in column {filled[0]}, which is none of the layers {_brief(labels)}",
            "nothing recorded at the layers that have no experts",
            HOW,
        )
    return tuple(labels), columns


def labelled(found: Sequence[int], layers: Layers, moe: Any) -> tuple[tuple[int, ...], list[int]]:
    """The layers of a trace whose columns carry numbers, and the columns that they are in.

    Args:
        found: The number of each column.
        layers: The layers to read, by these numbers; all by default. "moe": the columns are the MoE layers in order,
            whatever their numbers.
        moe: Attached hooks, on all MoE layers, or None.

    Raises:
        DataError: a layer that was not recorded, or one that is no MoE layer of the model.
    """
    layers = checked_layers(layers)
    if layers == "all":
        layers = None
    if layers == "moe":
        if moe is None:
            return tuple(range(len(found))), list(range(len(found)))
        return tuple(_of_model("moe", len(found), moe)[0]), list(range(len(found)))
    wanted = list(found) if layers is None else [int(layer) for layer in layers]
    if len(set(wanted)) != len(wanted):
        raise DataError(f"layers={wanted}", "different layers", "Correct them.")
    if missing := [layer for layer in wanted if layer not in found]:
        raise DataError(f"layer {missing[0]}, which was not recorded", f"layers among {_brief(found)}", "Correct it.")
    if moe is not None and (foreign := [layer for layer in wanted if layer not in moe.layers]):
        raise DataError(
            f"a trace of layers {_brief(wanted)}, of which layer {foreign[0]} is no MoE layer of the attached model",
            f"layers among {_brief(moe.layers)}",
            'If its columns are the MoE layers in order, pass layers="moe"; else name the layers to read.',
        )
    return tuple(wanted), [list(found).index(layer) for layer in wanted]


def never_ran(where: str) -> DataError:
    """Zeros where routes should be."""
    return DataError(
        f"zeros for all tokens in {where}",
        "expert ids of a capture that ran",
        "Engines fill their buffer with zeros before the first pass: switch the capture on (vLLM: "
        "enable_return_routed_experts=True; SGLang: --enable-return-routed-experts and return_routed_experts), look "
        "whether the engine's version captures this model, and leave dense layers out of layers.",
    )


def _of_model(layers: Layers, n: int, moe: Any) -> tuple[list[int], list[int]]:
    """By the attached model: its MoE layers in order, or a column for each of its layers."""
    every, n_layers = list(moe.layers), int(moe.bridge.cfg.n_layers)
    if any(not isinstance(layer, int) for layer in every):
        raise DataError(f"layers {_brief(every)}", "a decoder-only model", "Engines record no encoder-decoders.")
    if layers != "all" and n == len(every):
        return every, list(range(n))
    if layers != "moe" and n == n_layers:
        return every, every
    raise DataError(
        f"{n} columns for a model of {len(every)} MoE layers" + (f" among {n_layers}" if layers != "moe" else ""),
        f"{len(every)} columns" if layers == "moe" else f"{len(every)} or {n_layers} columns",
        "Attach to all MoE layers of the model that was recorded, or pass layers=[...].",
    )


def _refuse_misfits(labels: list[int], n: int, moe: Any) -> None:
    if len(labels) != n and (len(labels) > n or not labels or max(labels) >= n):
        raise DataError(
            f"{len(labels)} layers {_brief(labels)} for {n} columns",
            f"the model's index of each of the {n} columns, or indices below {n} where there is a column a layer",
            HOW,
        )
    if len(set(labels)) != len(labels):
        raise DataError(f"layers={labels}", "different layers", "Correct them.")
    if moe is not None and (foreign := [label for label in labels if label not in moe.layers]):
        raise DataError(
            f"layer {foreign[0]}, which is no MoE layer of the attached model",
            f"layers among {_brief(moe.layers)}",
            HOW,
        )


def _brief(layers: Sequence[Any]) -> str:
    return str(list(layers)) if len(layers) <= 8 else f"{layers[0]} to {layers[-1]} ({len(layers)})"
