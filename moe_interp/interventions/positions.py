"""Which tokens an intervention touches, and how two routes are merged token by token."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from moe_interp.errors import ConfigError, HookError, RouteError
from moe_interp.hooks.attach import MoEHooks
from moe_interp.hooks.layer import pack_left
from moe_interp.hooks.passes import PassContext, StateBetweenPasses
from moe_interp.interventions.random_keys import uniform_keys
from moe_interp.types import EMPTY, Layer

Positions = Sequence[int] | Tensor | Literal["all", "new"] | None


class TokenSelection:
    """The tokens of a running pass through a layer that an intervention is meant for.

    A *column* is a place in the sequence with its padding, a *position* one in the sequence without: 0 is the first
    real token. Both count from the beginning of the sequence, also in a pass that continues a cached prefix, where
    ``value[:, 0]`` is column ``n_past``.

    Args:
        moe: The attached hooks; they know what is cached, and which prompt ``generate`` runs on.
        layer: The layer that the tokens pass through.
        positions: None: every token of the prompt. "new": the generated ones. "all": both.
            Integers: absolute positions, on into what is generated; negative ones count from the end of the prompt.
        attention_mask: 1 at real tokens, ``[batch, pos]``: of the whole prompt; in a pass that continues a cached
            prefix, it may cover that pass alone. A mask with fewer rows serves several samples a prompt. By default
            the pass's own 2-D mask, else every token is real. Padding is never touched.

    What belongs to the prompt:

    - Under ``generate`` (of transformers or TransformerLens, ``generate_stream``): the prompt it was called with, in
      one pass or in chunks, with or without a cache, and also where the cache held a part of it before.
    - In any other pass: every token, also of a pass that continues a cache, even by one token. A loop of forward passes
      that decodes by hand says so with ``attention_mask``, whose width is the prompt's: what comes after it is new.
      "all" and explicit positions need no mask.

    Negative positions in a prompt that is run in several passes by hand need the whole prompt's mask.

    Raises:
        ConfigError: positions of another kind, or a mask that is not 2-D.
    """

    def __init__(
        self, moe: MoEHooks, layer: Layer, positions: Positions = None, attention_mask: Tensor | None = None
    ) -> None:
        self.moe, self.layer = moe, layer
        if isinstance(positions, str) and positions not in ("all", "new"):
            raise _bad_positions(positions)
        self.named = positions if positions is None or isinstance(positions, str) else "listed"
        self.listed = _as_positions(positions) if self.named == "listed" else torch.empty(0)
        self.attention_mask = None if attention_mask is None else as_mask(attention_mask, "an attention mask")
        self._between_passes = StateBetweenPasses()

    def tokens(self, value: Tensor) -> Tensor:
        """``[batch, pos]`` bool for a hooked tensor ``[batch, pos, ...]``.

        Raises:
            HookError: the tensor came without its batch axis.
            ConfigError: the mask is not of this batch, or the end of the prompt is needed and not known.
        """
        context, columns = self._context(value), self._columns(value)
        real = columns.real[:, context.n_past :]
        if self.named == "all":
            return real
        if self.named == "listed":
            return real & (self.listed_at(value) >= 0)
        if self.named == "new" and context.prompt is None and self.attention_mask is None and context.n_past:
            _warn_of_nothing_new(self.layer)
        is_prompt = torch.arange(context.n_past, real.shape[1] + context.n_past, device=value.device) < columns.prompt
        return real & (is_prompt if self.named is None else ~is_prompt)

    def index(self, value: Tensor) -> Tensor:
        """``[batch, pos]`` position of each token in its unpadded sequence; of padding, any number."""
        return self._columns(value).index(self._context(value).n_past)

    def listed_at(self, value: Tensor) -> Tensor:
        """``[batch, pos]``: which of the listed positions each token is at, the first of equal ones; -1 at none."""
        context, columns = self._context(value), self._columns(value)
        listed = self.listed.to(value.device)
        if bool((listed < 0).any()):
            listed = torch.where(listed < 0, listed + self._prompt_lengths(context, columns), listed)  # [batch, n]
        is_at = columns.index(context.n_past).unsqueeze(-1) == listed.unsqueeze(-2)
        if not len(self.listed):
            return is_at.new_full(is_at.shape[:2], -1, dtype=torch.int64)
        return is_at.int().argmax(dim=-1).masked_fill(~is_at.any(dim=-1), -1)

    def given_rows(self, value: Tensor, n: int) -> Tensor:
        """``[batch]``: which of ``n`` rows given for prompts each row of the pass is for: its own number, and under
        ``generate`` that of its prompt, of which there may be several beams or samples."""
        batch = value.shape[0]
        copies = batch // n if self._context(value).prompt is not None and batch % n == 0 else 1
        return torch.arange(batch, device=value.device) // copies

    def is_real(self, value: Tensor) -> Tensor:
        """``[batch, pos]``: not padding. What is generated is real."""
        return self._columns(value).real[:, self._context(value).n_past :]

    def is_prompt(self, value: Tensor) -> Tensor:
        """``[pos]``: the columns of the running pass that belong to the prompt."""
        context = self._context(value)
        columns = torch.arange(context.n_past, context.n_past + value.shape[1], device=value.device)
        return columns < self._columns(value).prompt

    def is_piece(self, value: Tensor) -> bool:
        """Whether the running pass is known to be one of several that a prompt runs in."""
        context = self._context(value)
        if context.n_past + value.shape[1] < self._columns(value).prompt:
            return True
        return self._continues(context) if context.prompt is None else context.n_past > context.prompt_cached

    def keys(self, value: Tensor, n: int, *labels: int) -> Tensor:
        """``[batch, pos, n]`` uniform numbers, fixed by labels, row and position in the unpadded sequence."""
        row = self._context(value).row_keys
        row = torch.arange(value.shape[0], device=value.device) if row is None else row.to(value.device)
        return uniform_keys(self.index(value), n, *labels, row.unsqueeze(1))

    def rows(self, given: Tensor, value: Tensor) -> Tensor:
        """The running pass's part ``[..., pos, slot]`` of something given for each column, ``[..., column, slot]``.

        What has as many columns as the pass is the pass's own, also where that continues a cached prefix; but not under
        ``generate``, and not if the pass before this one took it already.

        Raises:
            RouteError: it does not reach to the last token that is meant.
        """
        context, (batch, pos), width = self._context(value), value.shape[:2], given.shape[-2]
        is_piece = context.n_past > 0 or context.fills_cache or context.prompt is not None
        if width == 1:
            return given
        own = width == pos and context.prompt is None and not self._continues(context)
        part = given[..., 0 if own else context.n_past :, :][..., :pos, :]
        missing = pos - part.shape[-2]
        if (width > pos and not is_piece) or (missing and bool(self.tokens(value)[:, pos - missing :].any())):
            raise RouteError(
                f"routes of shape {tuple(given.shape)} for a pass of {batch} x {pos} tokens"
                + (f" after {context.n_past} in the cache" if context.n_past else ""),
                f"a shape that broadcasts to [{batch}, {pos}, slot], or one route for each position of the prompt",
                "Give one route, one a position, or one a token; the model was left as it was.",
            )
        return pad(part, (0, 0, 0, missing))

    def _context(self, value: Tensor) -> PassContext:
        """Where the running pass lies; keeps in mind whether it continues the pass that was seen before."""
        if value.ndim < 3:
            raise HookError(
                f"an activation of shape {tuple(value.shape)}, without its batch axis",
                "[batch, pos, ...]",
                "Run without remove_batch_dim.",
            )
        context = self.moe.pass_context(self.layer)
        seen = self._between_passes.before(context)
        if seen.get("context") is not context:
            seen["continues"] = context.n_past > 0 and context.n_past == seen.get("end")
            seen["context"], seen["end"] = context, context.n_past + value.shape[1]
        return context

    def _continues(self, context: PassContext) -> bool:
        """Whether the running pass goes on where the one seen before it ended."""
        return bool(self._between_passes.before(context)["continues"])

    def _columns(self, value: Tensor) -> _Columns:
        context, (batch, pos) = self._context(value), value.shape[:2]
        end = context.n_past + pos
        if self.attention_mask is None:
            prompt, mask = end if context.prompt is None else context.prompt, _own_mask(context, batch, end)
        else:
            prompt, mask = self._given_mask(context, batch, pos)
        if mask is None:
            mask = torch.ones(batch, end, dtype=torch.bool, device=value.device)
        mask = mask.to(value.device).repeat_interleave(batch // len(mask), dim=0)
        whole = pad(mask, (0, max(0, end - mask.shape[1], prompt - mask.shape[1])), value=True)
        return _Columns(whole, end, prompt)

    def _given_mask(self, context: PassContext, batch: int, pos: int) -> tuple[int, Tensor]:
        """Columns of the prompt, and the mask ``[row, column]`` of at least these or the running pass's."""
        assert self.attention_mask is not None
        mask, end = self.attention_mask, context.n_past + pos
        (rows, width), fits = mask.shape, False
        if batch % rows == 0 and context.prompt is not None:
            if width == context.prompt:
                return width, mask
            fits, start = width == context.prompt - context.prompt_cached, context.prompt_cached
        elif batch % rows == 0:
            if width >= end and (width == pos or context.n_past or context.fills_cache):
                return width, mask  # of the whole prompt, of which this may be a piece
            if width < end and (width != pos or self._continues(context)):
                return width, mask  # of the prompt, after which this pass runs
            fits, start = width == pos, context.n_past
        if not fits:
            raise ConfigError(
                f"an attention mask of {rows} x {width} for a pass of {batch} x {pos} tokens"
                + (f" after {context.n_past} in the cache" if context.n_past else ""),
                "the mask of the prompt that runs: its positions, and its rows or a divisor (several samples a prompt)",
                "Build the intervention with this batch's own mask; run a piece of a prompt with use_cache=True.",
            )
        # of what is not cached: the columns before it are as the model's own mask has them
        own, mask = _own_mask(context, batch, end), mask.repeat_interleave(batch // rows, dim=0)
        if own is None:
            return start + width, pad(mask, (start, 0), value=True)
        own = own.to(mask.device).repeat_interleave(batch // len(own), dim=0)
        prompts, piece = pad(mask, (0, start), value=True), torch.cat([own[:, :start], mask], dim=1)
        is_prompts = context.prompt is None and torch.equal(prompts, own) and not torch.equal(piece, own)
        return (width, prompts) if is_prompts else (start + width, piece)

    def _prompt_lengths(self, context: PassContext, columns: _Columns) -> Tensor:
        """``[batch, 1]`` real tokens of the prompt."""
        if context.prompt is None and self._continues(context) and self.attention_mask is None:
            raise ConfigError(
                f"positions={self.listed.tolist()} in a prompt that is run in several passes",
                "the mask of the whole prompt, which tells where it ends",
                "Pass attention_mask, or count from the beginning.",
            )
        return columns.whole[:, : columns.prompt].sum(dim=-1, keepdim=True)


@dataclass(frozen=True, eq=False)
class _Columns:
    """The sequences up to the running pass's end, or to the prompt's where that is later.

    Attributes:
        whole: ``[batch, column]``, whether a real token.
        end: Columns up to the pass's end.
        prompt: Columns of the prompt.
    """

    whole: Tensor
    end: int
    prompt: int

    @property
    def real(self) -> Tensor:
        return self.whole[:, : self.end]

    def index(self, n_past: int) -> Tensor:
        """``[batch, pos]`` positions of the pass's tokens."""
        return (self.real.cumsum(dim=-1) - 1)[:, n_past:]


def _own_mask(context: PassContext, batch: int, end: int) -> Tensor | None:
    """The mask that the model itself runs with, if it is of this batch: ``[row, column]`` bool."""
    for mask, columns in ((context.prompt_mask, context.prompt), (context.attention_mask, end)):
        if mask is not None and mask.shape[1] == columns and batch % len(mask) == 0:
            return mask.bool()
    return None


def _warn_of_nothing_new(layer: Layer) -> None:
    warnings.warn(
        f"positions='new' touches nothing at layer {layer!r} in a pass that continues a cache outside generate: such a "
        "pass belongs to the prompt. In a loop that decodes by hand, pass the prompt's attention_mask, explicit "
        "positions, or positions='all'.",
        stacklevel=2,
    )


def as_mask(mask: Any, what: str) -> Tensor:
    """``[row, pos]`` bool.

    Raises:
        ConfigError: no numbers, or not 2-D.
    """
    try:
        given = torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(f"{what} {str(mask)[:60]!r}", "[batch, pos]", "Pass the prompt's 2-D mask.") from None
    if given.ndim != 2:
        raise ConfigError(f"{what} of shape {tuple(given.shape)}", "[batch, pos]", "Pass the prompt's 2-D mask.")
    return given.bool()


def _as_positions(positions: Any) -> Tensor:
    try:
        listed = torch.as_tensor(positions)
    except (TypeError, ValueError, RuntimeError):
        raise _bad_positions(positions) from None
    if listed.ndim > 1 or (listed.numel() and (listed.is_floating_point() or listed.dtype == torch.bool)):
        raise _bad_positions(positions)
    return listed.reshape(-1).long()


def _bad_positions(positions: Any) -> ConfigError:
    return ConfigError(f"positions={positions!r}", 'a list of integers, None, "all" or "new"', "Name the positions.")


def pack_routes(routes: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Empty slots to the end, and the weights ``[..., slot]`` along with their experts."""
    order = (routes == EMPTY).to(torch.int8).sort(dim=-1, stable=True).indices
    return routes.gather(-1, order), None if weights is None else weights.gather(-1, order)


def merge_slots(tokens: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Expert ids: ``new`` where ``tokens``, ``old`` elsewhere, as wide as the widest route that results."""
    slots = max(new.shape[-1], old.shape[-1])
    merged = torch.where(tokens.unsqueeze(-1), _fit(new, slots, EMPTY).to(old.dtype), _fit(old, slots, EMPTY))
    return pack_left(merged)


def merge_weights(tokens: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Weights: ``new`` where ``tokens``, ``old`` elsewhere, as wide as the routes that run (``old``)."""
    return torch.where(tokens.unsqueeze(-1), _fit(new, old.shape[-1], 0.0).to(old.dtype), old)


def _fit(values: Tensor, slots: int, fill: float) -> Tensor:
    return pad(values, (0, max(slots - values.shape[-1], 0)), value=fill)[..., :slots]
