"""Does routing follow the domains, and does it use all experts? Measured on a trace with domain labels.

Notation, per layer: U[d,e] = share of domain d's slots at expert e, pi_d = share of all slots that are domain d's,
q_e = share of all slots at expert e. Empty slots are skipped. Each reference block R_d is a set of experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linear_sum_assignment
from scipy.special import rel_entr

from moe_interp.errors import DataError
from moe_interp.stats.checks import FloatArray
from moe_interp.traces.expert_use import entropy, load, ratio
from moe_interp.traces.trace import RoutingTrace


@dataclass(frozen=True)
class Agreement:
    """How far one layer's routing agrees with a reference router; see :func:`agreement`."""

    agreement: float
    independent: float
    specialization: float


def routing_metrics(
    trace: RoutingTrace, blocks: Mapping[str, int] | None = None, cross_fit: bool = True
) -> pd.DataFrame:
    """All metrics of a trace, one row a layer.

    Args:
        trace: Routes with domain labels, of at least two domains.
        blocks: Number of experts in each domain's reference block; as equal as possible without it, the first domains
            in alphabetical order taking one more where they do not divide.
        cross_fit: Match experts to domains on one half of the trace and measure on the other, both ways averaged.

    Returns:
        ``layer``; ``agreement, agreement_independent, specialization`` (:func:`agreement`); ``mutual_information``
        (:func:`normalized_mutual_information`); ``jsd`` (:func:`mean_pairwise_jsd`, bits); and those of
        :func:`use_metrics`.

    Raises:
        DataError: No labels, one domain, fewer experts than domains, blocks of other domains or too many experts, or a
            domain with fewer than two tokens under ``cross_fit``.

    What it does not show: whether the experts of a domain are any good at it. Put the validation loss per domain
    (:func:`domain_losses`) beside it.
    """
    sizes = block_sizes(trace, blocks)
    counts = trace.counts(trace.domain_codes, len(trace.domains))
    halves = half_counts(trace) if cross_fit else None
    rows = []
    for number, layer in enumerate(trace.layers):
        slots = counts[:, number]
        pairs = (
            [(slots, slots)] if halves is None else [(halves[i][:, number], halves[1 - i][:, number]) for i in (0, 1)]
        )
        found = [agreement(match_on, measure_on, sizes) for match_on, measure_on in pairs]
        rows.append(
            {
                "layer": layer,
                "agreement": float(np.mean([a.agreement for a in found])),
                "agreement_independent": float(np.mean([a.independent for a in found])),
                "specialization": float(np.mean([a.specialization for a in found])),
                "mutual_information": normalized_mutual_information(slots),
                "jsd": mean_pairwise_jsd(slots),
            }
        )
    return pd.DataFrame(rows).merge(use_metrics(trace), on="layer", validate="one_to_one")


def metrics_over_training(
    traces: Mapping[int, RoutingTrace], blocks: Mapping[str, int] | None = None, cross_fit: bool = True
) -> pd.DataFrame:
    """:func:`routing_metrics` of the same tokens at several training steps: its columns after a column ``step``."""
    frames = [routing_metrics(trace, blocks, cross_fit).assign(step=step) for step, trace in sorted(traces.items())]
    joined = pd.concat(frames, ignore_index=True)
    return joined[["step", *joined.columns.drop("step")]]


def agreement(match_on: ArrayLike, measure_on: ArrayLike, sizes: Sequence[int] | NDArray[np.int64]) -> Agreement:
    """Share of slots inside their domain's block, and its place between an independent and the reference router.

    ``A = sum_d pi_d sum_{e in R_d} U[d,e]``, blocks matched to experts so that A is largest on ``match_on`` (Hungarian
    method), A itself taken on ``measure_on``. ``A_ind = max over matchings of sum_d pi_d sum_{e in R_d} q_e`` is the
    most that a router which ignores the domain, with the same use of experts, can reach there.
    ``specialization = (A - A_ind) / (1 - A_ind)``: 1 for the reference router by construction; 0, up to sampling, for
    uniform and for collapsed routing, whatever the domains' shares; below 0 where a matching does not carry over.

    Args:
        match_on: ``[domain, expert]`` slot counts.
        measure_on: ``[domain, expert]`` slot counts; NaN results where there are none.
        sizes: ``[domain]`` experts per block.

    Source: derived. What it does not show: specialization finer or coarser than the given blocks.
    """
    seats = np.repeat(np.arange(len(sizes)), sizes)
    slots = np.asarray(measure_on, dtype=float)
    total = slots.sum()
    if total == 0:
        return Agreement(np.nan, np.nan, np.nan)
    joint = slots / total
    reached = float(joint[matched(np.asarray(match_on, dtype=float), seats)].sum())
    without = np.outer(joint.sum(axis=1), joint.sum(axis=0))
    independent = float(without[matched(without, seats)].sum())
    # a block that can hold every slot of the only domain in use leaves nothing to measure
    room = 1 - independent
    return Agreement(reached, independent, (reached - independent) / room if room > 1e-12 else np.nan)


def matched(value: FloatArray, seats: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Domains and experts of the matching with the largest total value; seat s belongs to domain ``seats[s]``."""
    seat, expert = linear_sum_assignment(value[seats], maximize=True)
    return seats[seat], expert


def normalized_mutual_information(slots: ArrayLike) -> float:
    """``I(D;E) / H(D)`` over slots: the share of the uncertainty about the domain that the expert removes.

    Args:
        slots: ``[domain, expert]`` counts.

    Returns:
        0 (independent) to 1 (the expert tells the domain); NaN where one domain holds all slots. The plug-in estimate:
        it is above 0 for independent routing by about ``(D-1)(E-1) / (2 n H(D))`` for n independent slots.
    """
    counts = np.asarray(slots, dtype=float)
    joint = ratio(counts, counts.sum())
    domain, expert = joint.sum(axis=1), joint.sum(axis=0)
    uncertainty = entropy(domain)
    if not uncertainty > 0:
        return np.nan
    return float(rel_entr(joint, np.outer(domain, expert)).sum() / uncertainty)


def mean_pairwise_jsd(slots: ArrayLike) -> float:
    """Mean Jensen-Shannon divergence, in bits, between the rows of U over all pairs of domains that have slots.

    ``JSD(p, r) = H((p + r) / 2) - (H(p) + H(r)) / 2``: 0 for equal use of experts, 1 for no expert in common. Each pair
    counts the same, however many slots its domains have. NaN where fewer than two domains have any.
    """
    rows = [row / row.sum() for row in np.asarray(slots, dtype=float) if row.sum() > 0]
    pairs = [entropy((p + r) / 2) - (entropy(p) + entropy(r)) / 2 for p, r in combinations(rows, 2)]
    return float(np.mean(pairs) / np.log(2)) if pairs else np.nan


def use_metrics(trace: RoutingTrace) -> pd.DataFrame:
    """How evenly a trace uses its experts, one row a layer: the numbers of :func:`moe_interp.traces.load`."""
    names = ["effective_experts", "max_violation", "dead_experts", "dropped_tokens", "dropped_slots"]
    return load(trace)[names].to_dataframe().reset_index()


def domain_losses(loss: ArrayLike, domain: ArrayLike) -> pd.DataFrame:
    """Mean loss per domain, in the unit of ``loss`` (nats per token).

    Args:
        loss: ``[token]`` losses; NaN where a token predicts nothing (the last of a sequence), which is skipped.
        domain: ``[token]`` labels.

    Returns:
        ``domain, n, loss, standard_error``, the error as if tokens were independent, which they are not within a
        sequence: read it as a lower bound.

    Raises:
        DataError: Different lengths.
    """
    losses, labels = np.asarray(loss, dtype=float), np.asarray(domain)
    if losses.shape != labels.shape or losses.ndim != 1:
        raise DataError(
            f"Losses of shape {losses.shape} and labels of shape {labels.shape}",
            "one loss and one label per token",
            "Flatten both in the same order.",
        )
    grouped = pd.DataFrame({"domain": labels, "loss": losses}).groupby("domain")["loss"]
    return grouped.agg(n="count", loss="mean", standard_error="sem").reset_index()


def block_sizes(trace: RoutingTrace, blocks: Mapping[str, int] | None) -> NDArray[np.int64]:
    """``[domain]`` experts per reference block, in the order of ``trace.domains``."""
    codes = trace.domain_codes  # refuses a trace without labels
    names, n_experts = trace.domains, trace.n_experts
    if len(names) < 2:
        raise DataError(
            f"A trace of {len(codes)} tokens in one domain, {names[0]!r}",
            "at least two domains",
            "Add tokens of another domain; use_metrics needs no domains.",
        )
    if blocks is None:
        if n_experts < len(names):
            raise DataError(
                f"{n_experts} experts for {len(names)} domains",
                "at least one expert per domain",
                "Join domains with trace.with_domain(...).",
            )
        quotient, rest = divmod(n_experts, len(names))
        return np.array([quotient + (number < rest) for number in range(len(names))])
    if set(blocks) != set(names) or min(blocks.values()) < 1 or sum(blocks.values()) > n_experts:
        raise DataError(
            f"blocks={dict(blocks)} for domains {', '.join(names)} and {n_experts} experts",
            f"a size of at least 1 for each domain, together at most {n_experts}",
            "Give the block sizes of the reference router.",
        )
    return np.array([blocks[name] for name in names])


def half_counts(trace: RoutingTrace) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """``[domain, layer, expert]`` slot counts of two halves of the trace; see :func:`halves_by_sequence`."""
    second = halves_by_sequence(trace)
    n_domains = len(trace.domains)
    counts = trace.counts(trace.domain_codes + n_domains * second, 2 * n_domains)
    return counts[:n_domains], counts[n_domains:]


def halves_by_sequence(trace: RoutingTrace) -> NDArray[np.bool_]:
    """``[token]`` whether a token is in the second half: within each domain every other sequence is.

    Whole sequences, because tokens of one sequence share their topic. A domain that is in one sequence only is cut in
    the middle of its tokens.
    """
    second = np.zeros(trace.n_tokens, dtype=bool)
    for code, name in enumerate(trace.domains):
        tokens = np.flatnonzero(trace.domain_codes == code)
        if len(tokens) < 2:
            raise DataError(
                f"Domain {name!r} with {len(tokens)} token",
                "at least two tokens per domain, to match experts on one half and measure on the other",
                "Add tokens, or pass cross_fit=False.",
            )
        rank = np.unique(trace.sequence[tokens], return_inverse=True)[1]
        second[tokens] = rank % 2 == 1 if rank.max() > 0 else np.arange(len(tokens)) >= len(tokens) // 2
    return second
