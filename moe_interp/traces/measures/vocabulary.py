"""How far experts are a matter of the token id: the token itself, the next one, or the predicted one."""

from __future__ import annotations

from typing import Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from moe_interp.checks import check_whole
from moe_interp.errors import ConfigError, DataError
from moe_interp.stats import derive_rng
from moe_interp.stats.checks import FloatArray
from moe_interp.traces.counts import RoutingCounts, counted
from moe_interp.traces.expert_use import ratio
from moe_interp.traces.tallies.part import ID_KINDS
from moe_interp.traces.trace import RoutingTrace

Ids = Literal["input", "next", "predicted"]
DRAWS = 40


def vocabulary_specialization(
    source: RoutingTrace | RoutingCounts, ids: Ids = "input", min_count: int = 10
) -> xr.Dataset:
    """How far the top-1 expert is a matter of the token id alone.

    Per token id, the share of its occurrences that go to its most frequent top-1 expert; averaged over ids. The top-1
    expert is the one of largest weight, or the first slot where the trace has no weights; a token without experts is
    skipped.

    Args:
        source: Routes with token ids, or the counts of a corpus.
        ids: ``"input"``, the token itself; ``"next"``, the input id that follows in its sequence (the last token has
            none); ``"predicted"``, the id that the model predicts there.
        min_count: Occurrences that an id needs to count.

    Returns:
        ``specialization[layer]`` from about 1/E to 1; ``chance[layer]``, its mean if every token drew its top-1 expert
        by the layer's use alone, whatever its id (simulated, the same for a permutation of experts);
        ``share[layer, token_id]``; ``expert[layer, token_id]`` the modal one, the smallest of equals, -1 without any;
        ``occurrences[layer, token_id]`` of tokens with an expert.

    Raises:
        DataError: The trace has no such ids, or none occurs ``min_count`` times.
        ConfigError: Other ``ids``, or ``min_count`` below 1.

    Source: OLMoE, whose script averages over all ids, ``min_count=1``; ``chance`` is derived. What it does not show:
    chance by itself. For rare ids the largest share is high even for random routes; compare with ``chance``. Tokens of
    one sequence are alike in more than their id, so that an excess over ``chance`` is not the id's alone.
    """
    min_count = check_whole(min_count, "min_count", 1)
    if ids not in ID_KINDS:
        raise ConfigError(f"ids={ids!r}", "'input', 'next' or 'predicted'", "Choose one of these.")
    found = counted(source, "vocabulary")
    known, by_id = _frequent(found, ids, min_count)
    occurrences = by_id.sum(axis=2)
    share = ratio(by_id.max(axis=2), occurrences)
    # an id must occur often enough among the tokens that have an expert
    kept = occurrences >= min_count
    use = (by_id * kept[:, :, None]).sum(axis=1)  # of the tokens that count
    chance = [_chance(use[layer], occurrences[layer][kept[layer]], ids) for layer in range(len(found.layers))]
    return xr.Dataset(
        {
            "specialization": ("layer", ratio(np.where(kept, share, 0.0).sum(axis=1), kept.sum(axis=1))),
            "chance": ("layer", chance),
            "share": (("layer", "token_id"), share),
            "expert": (("layer", "token_id"), np.where(occurrences > 0, by_id.argmax(axis=2), -1)),
            "occurrences": (("layer", "token_id"), occurrences),
        },
        coords={"layer": list(found.layers), "token_id": known},
    )


def _frequent(found: RoutingCounts, ids: Ids, min_count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The ids that occur often enough at some layer, and their counts ``[layer, id, expert]``."""
    name = f"vocabulary_{ids}"
    codes, counts = found.sparse(name) if found.has(name) else (np.zeros(0, np.int64),) * 2
    n_layers, n_experts = len(found.layers), found.n_experts
    cell, expert = np.divmod(codes, n_experts)
    values, layer = np.divmod(cell, n_layers)
    known, place = np.unique(values, return_inverse=True)
    most = np.zeros(len(known), dtype=np.int64)
    for number in range(n_layers):
        here = layer == number
        total = np.bincount(place[here], weights=counts[here], minlength=len(known)).astype(np.int64)
        most = np.maximum(most, total)
    kept = most >= min_count
    if not kept.any():
        seen = f"at most {most.max()} occurrences of an id" if len(known) else "no such ids"
        raise DataError(
            f"A trace of {found.n_tokens} tokens with {seen}",
            f"{ids} ids, one of them at least {min_count} times",
            "Record ids (token_ids=, predicted_ids=) of more tokens, or lower min_count.",
        )
    place_kept = np.cumsum(kept) - 1
    among = kept[place]
    table = np.zeros((n_layers, int(kept.sum()), n_experts), dtype=np.int64)
    table[layer[among], place_kept[place[among]], expert[among]] = counts[among]
    return known[kept], table


def _chance(use: NDArray[np.int64], occurrences: NDArray[np.int64], ids: Ids) -> float:
    """Mean over ids of the largest share of n independent draws by ``use``, n the id's occurrences."""
    if not len(occurrences) or not use.sum():
        return float("nan")
    share = np.sort(use / use.sum())[::-1]  # so that the names of experts do not matter
    # beyond two digits, n makes no difference to speak of
    scale = 10.0 ** np.maximum(np.floor(np.log10(occurrences)) - 1, 0)
    sizes, times = np.unique((np.rint(occurrences / scale) * scale).astype(np.int64), return_counts=True)
    rng = derive_rng(0, "vocabulary chance", ids)
    draws = rng.multinomial(sizes[:, None], share, size=(len(sizes), DRAWS))
    largest: FloatArray = draws.max(axis=2).mean(axis=1) / sizes
    return float((largest * times).sum() / times.sum())
