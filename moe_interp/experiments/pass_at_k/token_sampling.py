"""Drawing the next token: temperature, nucleus, and a number for each draw that belongs to the sample alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from moe_interp.errors import DataError
from moe_interp.interventions.random_keys import uniform_keys

LOWEST_TEMPERATURE = 1e-30
WINDOW = 256  # likeliest tokens that are sorted first; more only where the nucleus is larger


def sample_seed(seed: int, problem: str, sample: int) -> int:
    """The seed of one completion, of 63 bits: a hash of the run's seed, the problem's id and the sample's number."""
    digest = hashlib.sha256(repr((seed, problem, sample)).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def draws(seeds: Tensor, start: int, n: int) -> Tensor:
    """``[row, n]`` uniform numbers in (0, 1) for the tokens ``start`` to ``start + n`` of completions with these seeds.

    They depend on seed and token alone: not on the batch, the device or what was drawn before.
    """
    tokens = torch.arange(start, start + n, device=seeds.device).expand(len(seeds), n)
    return uniform_keys(tokens, 1, seeds.unsqueeze(1))[..., 0]


def next_tokens(
    logits: Tensor, uniform: Tensor, temperature: float, top_p: float, place: Callable[[int], str] = "row {}".format
) -> Tensor:
    """The next token of every row: where the distribution function of softmax(logits / temperature) passes ``uniform``.

    The nucleus is the smallest set of the likeliest tokens whose probabilities sum to at least ``top_p``, and whatever
    ties with its last token. Within it, tokens are in the order of their ids, so that near ties do not depend on how
    they are sorted. Temperature 0 takes the likeliest token, of ties the first.

    Args:
        logits: ``[row, vocabulary]``; tokens at -inf are never drawn.
        uniform: ``[row]`` numbers in (0, 1), float64.
        temperature: 0 or more.
        top_p: In (0, 1].
        place: What a row is called in an error.

    Returns:
        ``[row]`` ids.

    Raises:
        DataError: logits with NaN or +inf, or none that is finite.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if temperature == 0:
        best, found = logits.max(dim=-1)
        _check(best, place)  # NaN is the largest of all
        return found
    # shifted first, so that a low temperature does not overflow; and none that float32 would round to 0
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / max(temperature, LOWEST_TEMPERATURE)
    total = scaled.logsumexp(dim=-1, keepdim=True)
    _check(total[:, 0], place)
    if top_p >= 1:
        cumulative = (scaled - total).double().exp().cumsum(dim=-1)
        return _inverse(cumulative, uniform)
    width = min(WINDOW, scaled.shape[-1])
    while True:
        top = scaled.topk(width, dim=-1)
        p = (top.values - total).double().exp()
        # those before which less than top_p has been reached
        is_in = p.cumsum(dim=-1) - p < top_p
        last = top.values.gather(-1, is_in.sum(dim=-1, keepdim=True) - 1)
        if width == scaled.shape[-1] or bool((last > top.values[:, -1:]).all()):
            break
        width = min(16 * width, scaled.shape[-1])
    is_in = top.values >= last
    ids = torch.where(is_in, top.indices, scaled.shape[-1])
    order = ids.argsort(dim=-1)
    cumulative = torch.where(is_in, p, 0.0).gather(-1, order).cumsum(dim=-1)
    return ids.gather(-1, order).gather(-1, _inverse(cumulative, uniform).unsqueeze(-1))[:, 0]


def _inverse(cumulative: Tensor, uniform: Tensor) -> Tensor:
    """``[row]`` the first place whose cumulative probability is above its share of the whole."""
    reached = cumulative[:, -1:] * uniform.to(cumulative.device).unsqueeze(-1)
    # rounding may put the share at the whole, which no place is above
    below = torch.nextafter(cumulative[:, -1:], torch.zeros_like(cumulative[:, -1:]))
    return torch.searchsorted(cumulative, torch.minimum(reached, below), right=True)[:, 0]


def _check(values: Tensor, place: Callable[[int], str]) -> None:
    if not bool(values.isfinite().all()):
        row = int((~values.isfinite()).nonzero()[0, 0])
        raise DataError(
            f"{place(row)}: logits that are not finite",
            "numbers, or -inf at tokens that are never drawn",
            "Check the interventions and the number format (float16 overflows).",
        )
