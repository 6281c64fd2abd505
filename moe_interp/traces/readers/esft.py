"""The expert logs of ESFT (deepseek-ai/ESFT), as its model writes them with ``config.log_expert_weights``.

One text file a layer, ``expert_weights_{layer}.txt`` with the model's index of the layer; one line a forward pass, that
is a sequence: the ids of all tokens and slots, two tabs, then the weights, rounded to 4 digits; tabs between numbers.
Several processes write into ``rank_0``, ``rank_1``, ..., each its own sequences. k is not among it. Source:
scripts/expert/get_expert_scores.py and generate_expert_config.py.
"""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_interp.checks import check_whole
from moe_interp.disk import read_bytes
from moe_interp.errors import DataError
from moe_interp.results.npz import npz_arrays
from moe_interp.traces.readers.columns import Layers, experts_of, labelled, unlabelled

EXPECTED = "logs of ESFT: lines of ids, two tabs, and as many weights"
_NAME = re.compile(r"expert_weights_(\d{1,9})\.txt")
_RANK = re.compile(r"rank_(\d{1,9})")
_IDS = re.compile(rb"\d{1,9}(\t\d{1,9})*")
_WEIGHTS = re.compile(rb"[\d.eE+\-]{1,30}(\t[\d.eE+\-]{1,30})*")
SURE = math.log(1e-6)  # of the chance that routes of fewer slots look as if they had k
ROUNDED = 1e-4  # twice what rounding a weight to 4 digits moves it by

Lines = list[tuple[str, NDArray[np.int32], NDArray[np.float32]]]


def read_esft(
    path: str | Path,
    n_experts: int | None = None,
    layers: Layers = None,
    *,
    moe: Any = None,
    top_k: int | None = None,
    sequence_lengths: Any = None,
    weights: bool = True,
) -> dict[str, Any]:
    """The arguments of a trace from a folder of logs.

    Args:
        path: The folder with the logs or with ``rank_*`` folders of them; or an npz file of ``expert_ids`` ``[token,
            column, slot]``, ``gate_weights`` (uint16: 10^4 times the weight) and ``seq_lens``.
        n_experts, layers, moe: see ``RoutingTrace.read``; the logs name their layers, an npz file does not.
        top_k: Slots a token. Without it, the largest number for which no token uses an expert twice, if all smaller
            ones are then unlikely.
        sequence_lengths: Tokens of each sequence, where lines are not sequences.
        weights: Whether to read the weights; ESFT's are shares of a softmax, whose sum over slots is at most 1.
    """
    folder = Path(path)
    if folder.suffix == ".npz":
        return _of_npz(folder, experts_of(n_experts, moe), layers, moe, sequence_lengths, weights)
    count = experts_of(n_experts, moe)
    folders = _folders(folder)
    names = {place: _logs(place) for place in folders}
    found = sorted(names[folders[0]])
    labels, columns = labelled(found, layers, moe)
    of_layer: list[Lines] = []
    for layer in (found[column] for column in columns):
        lines: Lines = []
        for place in folders:
            if layer not in names[place]:
                raise DataError(
                    f"{place} without a log of layer {layer}", "the same layers of all ranks", "Restore it."
                )
            lines += _lines(names[place][layer], count)
        of_layer.append(lines)
    _refuse_uneven(of_layer, [found[column] for column in columns])
    k = _slots([ids for lines in of_layer for _, ids, _ in lines], count) if top_k is None else top_k
    k = check_whole(k, "top_k", 1, count, error=DataError)
    for lines in of_layer:
        for where, ids, shares in lines:
            _check_line(where, ids, shares, k, weights)
    stacked = [np.concatenate([ids.reshape(-1, k) for _, ids, _ in lines]) for lines in of_layer]
    of_slots = [np.concatenate([w.reshape(-1, k) for _, _, w in lines]) for lines in of_layer]
    lengths = [len(ids) // k for _, ids, _ in of_layer[0]]
    return {
        "expert_indices": np.stack(stacked, axis=1),
        "expert_weights": np.stack(of_slots, axis=1) if weights else None,
        "sequence_lengths": lengths if sequence_lengths is None else sequence_lengths,
        "n_experts": count,
        "layers": labels,
    }


def _of_npz(path: Path, count: int, layers: Layers, moe: Any, lengths: Any, weights: bool) -> dict[str, Any]:
    try:
        arrays = npz_arrays(read_bytes(path, EXPECTED))
        ids = arrays["expert_ids"]
        n_columns = ids.shape[1]
        gates = arrays.get("gate_weights") if weights else None
        stored = arrays.get("seq_lens")
    except DataError:
        raise
    except Exception as error:  # zipfile and numpy raise errors of any class
        raise DataError(
            f"{str(path)!r} cannot be read ({type(error).__name__}: {error})",
            "arrays expert_ids, gate_weights, seq_lens",
            "Save it again.",
        ) from error
    none = np.zeros(n_columns, bool)
    labels, columns = unlabelled(layers, none, none, moe)
    if gates is not None and gates.shape == ids.shape:
        gates = (gates / 1e4 if gates.dtype.kind in "iu" else gates)[:, columns]
        for column, layer in enumerate(labels if gates.dtype.kind == "f" else ()):
            _check_shares(f"{path}, layer {layer}", gates[:, column].astype(float))
    return {
        "expert_indices": ids[:, columns],
        "expert_weights": gates,
        "sequence_lengths": stored if lengths is None else lengths,
        "n_experts": count,
        "layers": labels,
    }


def _folders(folder: Path) -> list[Path]:
    """The folder itself, or its folders of ranks in order."""
    if not folder.is_dir():
        raise DataError(f"{str(folder)!r}, which is no folder", EXPECTED, "Pass the folder that holds the logs.")
    ranks = {int(m[1]): place for place in folder.iterdir() if (m := _RANK.fullmatch(place.name)) and place.is_dir()}
    return [ranks[rank] for rank in sorted(ranks)] or [folder]


def _logs(folder: Path) -> dict[int, Path]:
    logs = {int(m[1]): place for place in folder.iterdir() if (m := _NAME.fullmatch(place.name))}
    if not logs:
        raise DataError(f"{str(folder)!r} without expert_weights_*.txt", EXPECTED, "Pass the folder of the logs.")
    return logs


def _lines(path: Path, n_experts: int) -> Lines:
    """``(where, ids, weights)`` of each line."""
    content = read_bytes(path, EXPECTED)
    lines: Lines = []
    for number, line in enumerate(content.split(b"\n"), 1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        halves = line.rstrip(b"\r").split(b"\t\t")
        if len(halves) != 2 or not _IDS.fullmatch(halves[0]) or not _WEIGHTS.fullmatch(halves[1]):
            raise DataError(
                f"{where}: {line[:30].decode(errors='replace')!r}, which is cut short or of another form",
                EXPECTED,
                "Log again, or remove the line from the logs of all layers.",
            )
        ids = np.fromstring(halves[0], dtype=np.int64, sep="\t")
        shares = _numbers(halves[1], where)
        if len(ids) != len(shares):
            raise DataError(f"{where}: {len(ids)} ids and {len(shares)} weights", "as many of each", "Log again.")
        if (outside := np.flatnonzero(ids >= n_experts)).size:
            raise DataError(
                f"{where}: expert {ids[outside[0]]} as number {outside[0]} of the line",
                f"an id from 0 to {n_experts - 1}",
                "Check n_experts.",
            )
        lines.append((where, ids.astype(np.int32), shares.astype(np.float32)))
    if not lines:
        raise DataError(f"{path}, which is empty", EXPECTED, "Log again.")
    return lines


def _numbers(text: bytes, where: str) -> NDArray[np.float64]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of what is no number
            return np.fromstring(text, dtype=np.float64, sep="\t")
    except (ValueError, Warning) as error:
        raise DataError(f"{where}: weights that are no numbers", EXPECTED, "Log again, or remove the line.") from error


def _refuse_uneven(of_layer: list[Lines], layers: list[int]) -> None:
    """Refuse logs of which one has more lines or longer ones than another."""
    first = of_layer[0]
    for layer, lines in zip(layers, of_layer, strict=True):
        for (where, ids, _), (other, expected, _) in zip(lines, first, strict=False):
            if len(ids) != len(expected):
                raise DataError(f"{where}: {len(ids)} ids", f"{len(expected)}, as {other}", "Log again: it is ragged.")
        if len(lines) != len(first):
            longer = max(lines, first, key=len)
            raise DataError(
                f"{len(lines)} lines of layer {layer} against {len(first)} of layer {layers[0]}; "
                f"{longer[min(len(lines), len(first))][0]} has no counterpart",
                "as many lines of every layer",
                "A log was cut short: remove the last sequences from the longer ones.",
            )


def _check_line(where: str, ids: NDArray[np.int32], shares: NDArray[np.float32], k: int, weights: bool) -> None:
    if len(ids) % k:
        raise DataError(f"{where}: {len(ids)} ids", f"a multiple of top_k={k}", "Correct top_k, or log again.")
    ordered = np.sort(ids.reshape(-1, k), axis=1)
    if (twice := np.argwhere(ordered[:, 1:] == ordered[:, :-1])).size:
        token, slot = twice[0]
        raise DataError(
            f"{where}: expert {ordered[token, slot]} twice for token {token} of the line",
            f"{k} different experts a token",
            "Correct top_k, or log again.",
        )
    if weights:
        _check_shares(where, shares.reshape(-1, k).astype(float), " of the line")


def _check_shares(where: str, shares: NDArray[np.float64], of: str = "") -> None:
    """Refuse weights ``[token, slot]`` that cannot be shares of a softmax, rounded to 4 digits."""
    sums = shares.sum(axis=1)
    fits = (sums <= 1 + shares.shape[1] * ROUNDED) & (shares >= 0).all(axis=1)  # NaN does not fit either
    if not shares.any():
        raise DataError(
            f"{where}: weights of 0 for all {len(shares)} tokens",
            "shares of a softmax",
            "Weights were not recorded: pass weights=False.",
        )
    if not fits.all():
        token = int(np.argmin(fits))
        raise DataError(
            f"{where}: weights {shares[token].round(6).tolist()} of token {token}{of}, sum {sums[token]:g}",
            "shares of a softmax, of a sum up to 1",
            "They do not belong to these experts, or the router is of another kind: pass weights=False.",
        )


def _slots(ids: list[NDArray[np.int32]], n_experts: int) -> int:
    """The largest number of slots with which no token uses an expert twice, where smaller ones are unlikely."""
    together = math.gcd(*(len(line) for line in ids))
    divisors = [k for k in range(min(together, n_experts), 0, -1) if together % k == 0]
    k = next(k for k in divisors if not any(_repeats(line, k) for line in ids))
    n = sum(len(line) for line in ids) // k
    for smaller in (d for d in divisors if d < k and k % d == 0):
        # the chance that k / smaller independent even routes have no expert in common, for every k ids
        chance = sum(
            math.log(max(math.comb(n_experts - i * smaller, smaller), 1e-300) / math.comb(n_experts, smaller))
            for i in range(1, k // smaller)
        )
        if n * chance > SURE:
            raise DataError(
                f"logs of {n} routes, in which {k} and {smaller} slots a token are possible",
                "the number of experts a token",
                "Pass top_k=, num_experts_per_tok of the model's configuration.",
            )
    return k


def _repeats(line: NDArray[np.int32], k: int) -> bool:
    ordered = np.sort(line.reshape(-1, k), axis=1)
    return bool((ordered[:, 1:] == ordered[:, :-1]).any())
