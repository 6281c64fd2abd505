"""The passes whose routing is recorded: of whole sequences, and of what is generated after them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_interp.arch.offload import device_of
from moe_interp.engine.decoding.batch_invariant import batch_invariant
from moe_interp.engine.decoding.cached_decoder import CachedDecoder
from moe_interp.engine.memory import Memory, tokens_per_pass
from moe_interp.experiments.capture.options import CaptureOptions
from moe_interp.experiments.capture.recorder import PassRecorder, widened
from moe_interp.experiments.capture.sequences import CapturedSequence
from moe_interp.experiments.inputs.batches import batches_of_like_length
from moe_interp.experiments.pass_at_k.sampling_run import end_tokens
from moe_interp.experiments.pass_at_k.token_sampling import draws, next_tokens, sample_seed
from moe_interp.hooks.attach import MoEHooks
from moe_interp.hooks.passes import decoder_start_token
from moe_interp.types import Hooks

Arrays = dict[str, Tensor]


@dataclass
class Recorded:
    """What was recorded of one sequence: ``[token, layer, ...]`` of each field, from the first token to the last.

    Attributes:
        token_ids: Those that the model was given, generated ones too.
        n_prefill: How many of them were given, rather than generated.
        fields: By name.
    """

    token_ids: list[int]
    n_prefill: int
    fields: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, arrays: Arrays, row: int, columns: Any) -> None:
        """The tokens of a pass in some columns of a row."""
        for name, values in arrays.items():
            self.fields.setdefault(name, []).append(values[row, columns])

    def joined(self) -> Arrays:
        return {name: torch.cat(widened(name, parts)) for name, parts in self.fields.items()}


class RoutingPasses:
    """Runs a model on sequences and reads its routing.

    Args:
        moe: Attached hooks.
        options: What is recorded, and how the model is run.
        hooks: Interventions, in place during all passes.
        memory: Of the run.
    """

    def __init__(self, moe: MoEHooks, options: CaptureOptions, hooks: Hooks, memory: Memory) -> None:
        self.moe, self.options, self.memory = moe, options, memory
        self.recorder = PassRecorder(moe, options)
        self.hooks: Hooks = [*hooks, *self.recorder.hooks]
        self.device = device_of(moe.bridge.original_model)
        self._decoder: CachedDecoder | None = None
        self._ends = end_tokens(moe) if options.generate else frozenset()

    @contextmanager
    def running(self) -> Iterator[None]:
        """With the hooks in place, without gradients."""
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if self.options.batch_invariant:
                stack.enter_context(batch_invariant(self.moe))
            if self.options.generate:
                self._decoder = CachedDecoder(self.moe, self.hooks, plain=True)
                stack.enter_context(self._decoder.running())
            else:
                stack.enter_context(self.moe.bridge.hooks(fwd_hooks=self.hooks))
            yield

    def record(self, sequences: Sequence[CapturedSequence], on_done: Callable[[int], None]) -> list[Recorded]:
        """What is recorded of each sequence, in their order."""
        found: dict[int, Recorded] = {}
        for batch in self._batches(sequences):
            self.recorder.drop()

            def work(part: slice, batch: list[int] = batch) -> None:
                self.recorder.drop()
                some = [sequences[i] for i in batch[part]]
                made = self._generated(some) if self.options.generate else self._prefilled(some)
                found.update(zip(batch[part], made, strict=True))
                on_done(len(some))

            self.memory.in_parts(work, len(batch), "sequences")
            self.memory.say()
        return [found[i] for i in range(len(sequences))]

    def _batches(self, sequences: Sequence[CapturedSequence]) -> Iterator[list[int]]:
        """Numbers of sequences that run together: the longest first, those of one length in their order."""
        widths = [len(one.row or one.tokens) + self.options.generate for one in sequences]
        fitting = tokens_per_pass(
            self.moe,
            max(widths),
            self.memory.budget,
            kept_layers=len(self.options.layers) if self.options.inputs else 0,
            predictions_per_token=1.0,
        )
        most = self.options.batch_size or len(sequences)
        if self.options.pad and self.options.stack != "decoder":
            groups = batches_of_like_length([range(width) for width in widths], fitting)
        else:
            by_length: dict[Any, list[int]] = {}
            for number, one in enumerate(sequences):
                by_length.setdefault((widths[number], bool(one.row), len(one.answer)), []).append(number)
            groups = [by_length[key] for key in sorted(by_length, reverse=True)]
        for group in groups:
            n = max(1, min(most, fitting // max(widths[i] for i in group)))
            yield from (group[start : start + n] for start in range(0, len(group), n))

    def _prefilled(self, sequences: list[CapturedSequence]) -> list[Recorded]:
        """One pass of whole sequences."""
        tokens, mask = _padded(sequences)
        more: dict[str, Any] = {} if mask is None else {"attention_mask": mask.to(self.device)}
        ids = [list(one.tokens) for one in sequences]
        if self.options.stack:
            start = decoder_start_token(self.moe.bridge.original_model)
            answers = [[start, *(one.answer if self.options.stack == "decoder" else ())] for one in sequences]
            more["decoder_input_ids"] = torch.tensor(answers, device=self.device)
            ids = answers if self.options.stack == "decoder" else ids
        logits = self.moe.bridge(tokens.to(self.device), return_type="logits", **more)
        arrays = self.recorder.take()
        if self.options.predictions and self.options.stack != "encoder":
            arrays["predicted_ids"] = logits.argmax(dim=-1).cpu()
        found = []
        for row, one in enumerate(sequences):
            recorded = Recorded(ids[row], len(ids[row]))
            has_own_columns = bool(one.columns) and self.options.stack != "decoder"
            recorded.add(arrays, row, list(one.columns) if has_own_columns else slice(0, len(ids[row])))
            found.append(recorded)
        return found

    def _generated(self, sequences: list[CapturedSequence]) -> list[Recorded]:
        """The passes of prompts of one length, and of what is generated after them, every token of it included."""
        options, decoder = self.options, self._decoder
        assert decoder is not None
        tokens = torch.tensor([one.tokens for one in sequences], device=self.device)
        seeds = [sample_seed(options.seed, one.id, 0) for one in sequences]
        keys = torch.tensor(seeds, device=self.device)
        prompts = decoder.prompts(tokens, keys)
        found = [Recorded(list(one.tokens), len(one)) for one in sequences]
        self._note(found, list(range(len(found))), prompts.predicted)
        rows = decoder.rows(prompts, torch.arange(len(found), device=self.device), keys)
        del prompts
        open_rows = list(range(len(found)))
        for step in range(options.generate):
            uniform = draws(rows.keys, step, 1)[:, 0]
            place = lambda row, now=tuple(open_rows): sequences[now[row]].place  # noqa: E731
            new = next_tokens(rows.logits, uniform, options.temperature, options.top_p, place)
            rows.step(new)
            ids = new.tolist()
            for row, token in zip(open_rows, ids, strict=True):
                found[row].token_ids.append(token)
            self._note(found, open_rows, rows.predicted)
            kept = [n for n, token in enumerate(ids) if token not in self._ends]
            if not kept:
                break
            if len(kept) < len(ids):
                open_rows = [open_rows[n] for n in kept]
                rows.keep(torch.tensor(kept, device=self.device))
        return found

    def _note(self, found: list[Recorded], rows: list[int], predicted: Tensor | None) -> None:
        """What the hooks have read of a pass of some rows: its new tokens, where the model kept no cache the last."""
        arrays = self.recorder.take()
        if self.options.predictions and predicted is not None:
            arrays["predicted_ids"] = predicted.cpu()
        for n, row in enumerate(rows):
            have = sum(len(part) for part in found[row].fields.get("expert_indices", ()))
            found[row].add(arrays, n, slice(have - len(found[row].token_ids), None))


def _padded(sequences: list[CapturedSequence]) -> tuple[Tensor, Tensor | None]:
    """``[row, pos]`` ids and their mask, None without padding; rows that came with padding keep it."""
    rows = [one.row or one.tokens for one in sequences]
    width = max(map(len, rows))
    # the padding id is never attended to; the row's own last token is always a legal id
    tokens = torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row in rows])
    mask = torch.zeros_like(tokens)
    for number, (one, row) in enumerate(zip(sequences, rows)):
        mask[number, list(one.columns) if one.row else slice(0, len(row))] = 1
    return tokens, None if bool(mask.all()) else mask
