"""From sequences to the tokens of a run, in one plain pass over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_interp.arch.offload import device_of
from moe_interp.engine.memory import Memory, tokens_per_pass
from moe_interp.engine.recorded_pass import RecordedPass, record_pass
from moe_interp.errors import DataError
from moe_interp.experiments.inputs.batches import batches_of_like_length
from moe_interp.experiments.inputs.sequences import ScoredSequence, SequenceBatch
from moe_interp.experiments.router_tuning.routers import TunedRouter, check_logits, router_inputs
from moe_interp.experiments.router_tuning.token_sources.last_layer import (
    ExpertOutputs,
    FileOrMemory,
    LastLayerTokens,
    Tail,
    cached_parts,
    differs,
    nll,
    refusal,
)
from moe_interp.experiments.router_tuning.token_sources.passes import PassTokens
from moe_interp.experiments.router_tuning.token_sources.tokens import TokenSource, TokenTable
from moe_interp.hooks.attach import MoEHooks

KEPT_SHARE = 4  # of the memory that is free, one part for what is read, and one for expert outputs


@dataclass
class _Cache:
    """What is kept of the plain pass for the last layer; ``why_not`` where it cannot be."""

    storage: FileOrMemory
    n: int
    kept: dict[str, Tensor] = field(default_factory=dict)
    filled: int = 0
    why_not: str | None = None

    def add(self, **values: Tensor) -> None:
        """Further rows."""
        rows = len(next(iter(values.values())))
        for name, value in values.items():
            if name not in self.kept:
                self.kept[name] = self.storage.empty((self.n, *value.shape[1:]), value.dtype)
            self.kept[name][self.filled : self.filled + rows] = value.cpu()
        self.filled += rows

    def __getitem__(self, name: str) -> Tensor:
        return self.kept[name][: self.filled]


@dataclass(frozen=True, eq=False)
class Sources:
    """Makes token sources of one model, layers and memory.

    Attributes:
        moe: The attached hooks.
        routers: What is tuned.
        memory: The run's memory.
        folder: Where a cache that does not fit into memory is put.
    """

    moe: MoEHooks
    routers: tuple[TunedRouter, ...]
    memory: Memory
    folder: Path | None = None

    @torch.no_grad()
    def of(
        self,
        sequences: list[ScoredSequence],
        is_selected: Callable[[Tensor], Tensor],
        *,
        from_cache: bool = True,
    ) -> tuple[TokenSource, str | None]:
        """The selected tokens of some sequences; why they are not read from a cache, in words, where they are not.

        Raises:
            DataError: no token is selected, or a cross-entropy that is not finite.
            ConfigError: a router that is not linear.
        """
        n_scored = sum(int(sequence.is_scored.sum()) for sequence in sequences)
        cache = _Cache(FileOrMemory(self.memory.bytes // KEPT_SHARE, self.folder), n_scored)
        cache.why_not = (
            None if from_cache and len(self.routers) == 1 else "several layers are tuned, or it was not asked"
        )
        parts: list[tuple[np.ndarray, np.ndarray, Tensor]] = []
        for batch_ids in batches_of_like_length(sequences, self._tokens_per_batch(sequences)):
            rows = [sequences[i] for i in batch_ids]
            batch = SequenceBatch.build(rows, device_of(self.moe.bridge.original_model))
            base, inputs, hidden = self._pass(batch)
            row, pos = batch.wanted.nonzero().unbind(-1)
            ce = nll(base.logits[row, pos], batch.tokens[row, pos + 1]).double().cpu()
            _refuse_non_finite(ce, batch, row, pos)
            chosen = is_selected(ce)
            if not parts:
                for router in self.routers:
                    check_logits(router, inputs[router.layer], base.router_logits[router.layer])
                cache.why_not = cache.why_not or refusal(self.moe, base, self.routers[0].layer)
            wanted = torch.zeros_like(batch.wanted)
            wanted[row[chosen.to(row.device)], pos[chosen.to(row.device)]] = True
            parts.append((np.array(batch_ids)[row.cpu()[chosen].numpy()], pos.cpu()[chosen].numpy(), ce[chosen]))
            if cache.why_not is None and bool(wanted.any()):
                self._keep(cache, base, wanted, inputs, hidden, parts, sequences)
        table = TokenTable(
            sequences,
            np.concatenate([sequence for sequence, _, _ in parts]).astype(np.int64),
            np.concatenate([pos for _, pos, _ in parts]).astype(np.int64),
            torch.cat([ce for _, _, ce in parts]),
        )
        if not len(table):
            raise DataError(
                f"no token selected among {n_scored} in {len(sequences)} sequences",
                "at least one token to train on",
                "Lower select, or pass None for all tokens.",
            )
        if cache.why_not is None:
            return self._cached(cache, table), None
        return PassTokens(self.moe, self.routers, table, self.memory), cache.why_not

    def _pass(self, batch: SequenceBatch) -> tuple[RecordedPass, dict[int, Tensor], Tensor]:
        """A plain pass, what the routers read, and the residual stream after the last layer."""
        last: list[Any] = []
        final = getattr(self.moe.bridge, "ln_final", None)
        keep = lambda module, args, kwargs: last.append(args[0] if args else next(iter(kwargs.values())))  # noqa: E731
        handle = final.register_forward_pre_hook(keep, with_kwargs=True) if isinstance(final, nn.Module) else None
        try:
            with router_inputs(self.routers) as inputs:
                layers = [router.layer for router in self.routers]
                base = record_pass(self.moe, batch.tokens, layers, batch.mask)
        finally:
            if handle is not None:
                handle.remove()
        return base, inputs, last[-1] if last else base.logits

    def _keep(
        self,
        cache: _Cache,
        base: RecordedPass,
        wanted: Tensor,
        inputs: dict[int, Tensor],
        hidden: Tensor,
        parts: list[tuple[np.ndarray, np.ndarray, Tensor]],
        sequences: list[ScoredSequence],
    ) -> None:
        """Put the wanted tokens of a pass into the cache; the first time, see whether it gives what the model gives."""
        router = self.routers[0]
        if hidden.shape[:2] != wanted.shape:
            cache.why_not = "the final norm is not called on the residual stream"
            return
        is_first = not cache.filled
        rest = cached_parts(base, router, hidden)
        flat = inputs[router.layer].view(*wanted.shape, -1)
        cache.add(inputs=flat[wanted], rest=rest[wanted], experts_in=base.experts_in[router.layer][wanted])
        if is_first:
            sequence, pos, ce = parts[-1]
            source = self._cached(cache, TokenTable(sequences, sequence, pos, ce), keeps_outputs=False)
            cache.why_not = differs(base, source, wanted, self.memory)

    def _cached(self, cache: _Cache, table: TokenTable, *, keeps_outputs: bool = True) -> LastLayerTokens:
        router = self.routers[0]
        budget = self.memory.bytes // KEPT_SHARE if keeps_outputs else 0
        device = router.parameter.device
        outputs = ExpertOutputs(self.moe, router.layer, cache["experts_in"], budget, device)
        source = LastLayerTokens(table, router, cache["inputs"], cache["rest"], outputs, Tail.of(self.moe), device)
        source.storage = cache.storage  # its files live as long as it does
        return source

    def _tokens_per_batch(self, sequences: Sequence[ScoredSequence]) -> int:
        longest = max(map(len, sequences))
        budget = self.memory.bytes // 2
        kept = {"kept_layers": len(self.routers), "kept_tokens": sum(map(len, sequences))}
        tokens = tokens_per_pass(self.moe, longest, budget, **kept)
        vocabulary = int(getattr(self.moe.bridge.cfg, "d_vocab", 0) or 1)
        return max(longest, min(tokens, budget // (12 * vocabulary)))


def _refuse_non_finite(ce: Tensor, batch: SequenceBatch, row: Tensor, pos: Tensor) -> None:
    bad = (~ce.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise DataError(
            f"cross-entropy {float(ce[bad[0]])} of sequence {batch.names[int(row[bad[0]])]!r}, position "
            f"{int(pos[bad[0]])} under the untuned model",
            "finite cross-entropies",
            "Look for overflow in the model at this number format, or leave the sequence out.",
        )
