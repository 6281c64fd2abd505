"""Drawing completions, batch by batch, and checking each as it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_interp.engine.decoding.cached_decoder import CachedDecoder, PromptCache
from moe_interp.engine.memory import Memory
from moe_interp.errors import warn
from moe_interp.experiments.pass_at_k.checkers import NamedChecker
from moe_interp.experiments.pass_at_k.completions import Completion, CompletionFile
from moe_interp.experiments.pass_at_k.problems import Problem, TokenizedProblem
from moe_interp.experiments.pass_at_k.token_sampling import draws, next_tokens, sample_seed
from moe_interp.hooks.attach import MoEHooks
from moe_interp.progress import Report


class CheckerRaisedWarning(UserWarning):
    """A checker raised an exception: its completions are kept, and count as not right."""


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn; what a stored run is known by.

    Attributes:
        temperature: 0 is greedy.
        top_p: Mass of the nucleus.
        max_new_tokens: Tokens of a completion at most; None for what the context leaves, 512 at most.
        stop: Texts that end a completion.
        seed: Of every draw, with the problem's id and the sample's number.
    """

    temperature: float
    top_p: float
    max_new_tokens: int | None
    stop: tuple[str, ...]
    seed: int


class CompletionRun:
    """The completions of some problems.

    Args:
        moe, decoder: The model, and the passes that its prompts and completions go through.
        problems: Their prompts.
        lengths: New tokens of each one's completions, at most.
        sampling, checker: How completions are drawn and checked.
        file: What is there, and what comes is added to.
    """

    def __init__(
        self,
        moe: MoEHooks,
        decoder: CachedDecoder,
        problems: list[TokenizedProblem],
        lengths: list[int],
        sampling: Sampling,
        checker: NamedChecker,
        file: CompletionFile,
    ) -> None:
        self.moe, self.decoder, self.problems, self.lengths = moe, decoder, problems, lengths
        self.sampling, self.checker, self.file = sampling, checker, file
        self.tokenizer = moe.bridge.tokenizer
        self.eos = end_tokens(moe)
        # a token makes at least a byte, but for special ones
        self._tail = 2 * max((len(text.encode()) for text in sampling.stop), default=0) + 8
        self._read: tuple[tuple[int, ...], PromptCache] | None = None

    def sample(self, n_samples: int, n_rows: int, memory: Memory, report: Report) -> None:
        """Draw what is not there yet."""
        total, found = len(self.problems) * n_samples, self.file.found
        wanted = [(p, s) for p in range(len(self.problems)) for s in range(n_samples)]
        wanted = [(p, s) for p, s in wanted if (self.problems[p].problem.id, s) not in found]
        done = total - len(wanted)
        report(done, total)

        def work(batch: list[tuple[int, int]], part: slice) -> None:
            nonlocal done
            left = [(p, s) for p, s in batch[part] if (self.problems[p].problem.id, s) not in found]
            for _ in self._complete(left) if left else ():
                done += 1
                report(done, total)

        with self.decoder.running():
            for batch in _batches(wanted, self.problems, n_rows):
                memory.in_parts(partial(work, batch), len(batch), "completions")
                memory.say()

    def check_again(self) -> None:
        """Those whose check raised, or was interrupted."""
        by_id = {problem.problem.id: problem.problem for problem in self.problems}
        for completion in [one for one in self.file.found.values() if one.correct is None and one.problem in by_id]:
            correct, error = self._check(completion.text, by_id[completion.problem])
            if (correct, error) != (completion.correct, completion.error):
                self.file.add(replace(completion, correct=correct, error=error))

    def warn_of_errors(self) -> None:
        by_id = {problem.problem.id: problem.problem for problem in self.problems}
        raised = [one for one in self.file.found.values() if one.error is not None and one.problem in by_id]
        if raised:
            named = list(dict.fromkeys(by_id[one.problem].place for one in raised))
            more = f" and {len(named) - 3} more" if len(named) > 3 else ""
            warn(
                f"the checker raised on {len(raised)} completions, of {', '.join(named[:3])}{more} "
                f"({raised[0].error}). They are kept, and count as not right.",
                CheckerRaisedWarning,
            )

    def _complete(self, batch: list[tuple[int, int]]) -> Iterator[Completion]:
        """Completions of a batch, as they end."""
        config, device = self.sampling, self.decoder.device
        names = list(dict.fromkeys(p for p, _ in batch))
        seeds = [sample_seed(config.seed, self.problems[p].problem.id, s) for p, s in batch]
        of = torch.tensor([names.index(p) for p, _ in batch], device=device)
        rows = self.decoder.rows(self._prompts(tuple(names)), of, torch.tensor(seeds, device=device))
        open_rows, ids = list(range(len(batch))), [list[int]() for _ in batch]

        def place(row: int) -> str:
            problem, sample = batch[open_rows[row]]
            return f"{self.problems[problem].problem.place}, sample {sample}"

        for step in range(max(self.lengths[p] for p, _ in batch)):
            uniform = draws(rows.keys, step, 1)[:, 0]
            tokens = next_tokens(rows.logits, uniform, config.temperature, config.top_p, place)
            kept = []
            for row, token in enumerate(tokens.tolist()):
                number = open_rows[row]
                ids[number].append(token)
                problem, sample = batch[number]
                if (finish := self._finish(ids[number], self.lengths[problem])) is None:
                    kept.append(row)
                else:
                    yield self._keep(self.problems[problem].problem, sample, seeds[number], ids[number], finish)
            if not kept:
                return
            if len(kept) < len(open_rows):
                open_rows = [open_rows[row] for row in kept]
                chosen = torch.tensor(kept, device=device)
                rows.keep(chosen)
                tokens = tokens[chosen]
            rows.step(tokens)

    def _prompts(self, names: tuple[int, ...]) -> PromptCache:
        """The pass of a batch's prompts; that of the batch before where it had the same."""
        if self._read is None or self._read[0] != names:
            self._read = None  # freed before the next one is made
            device = self.decoder.device
            tokens = torch.tensor([self.problems[p].prompt for p in names], device=device)
            keys = [sample_seed(self.sampling.seed, self.problems[p].problem.id, -1) for p in names]
            self._read = names, self.decoder.prompts(tokens, torch.tensor(keys, device=device))
        return self._read[1]

    def _finish(self, ids: list[int], most: int) -> str | None:
        if ids[-1] in self.eos:
            return "eos"
        if self.sampling.stop:
            tail = self._text(ids[-self._tail :])
            if any(text in tail for text in self.sampling.stop):
                return "stop"
        return "length" if len(ids) >= most else None

    def _keep(self, problem: Problem, sample: int, seed: int, ids: list[int], finish: str) -> Completion:
        text = self._text(ids[:-1] if finish == "eos" else ids)
        if finish == "stop":
            text = text[: min(place for stop in self.sampling.stop if (place := text.find(stop)) >= 0)]
        completion = Completion(problem.id, sample, seed, text, tuple(ids), finish, None, "interrupted")
        try:
            correct, error = self._check(text, problem)
        except BaseException:  # Ctrl-C: what was sampled is not lost, and is checked when the run goes on
            self.file.add(completion)
            raise
        completion = replace(completion, correct=correct, error=error)
        self.file.add(completion)
        return completion

    def _check(self, text: str, problem: Problem) -> tuple[bool | None, str | None]:
        try:
            found = self.checker.function(text, problem)
        except Exception as error:  # a user's function raises what it likes
            return None, f"{type(error).__name__}: {_in_words(error, str)}".splitlines()[0][:500]
        if isinstance(found, bool | np.bool_):
            return bool(found), None
        is_array = isinstance(found, np.ndarray | Tensor) and found.dtype in (np.bool_, torch.bool)
        if is_array and np.prod(found.shape) == 1:
            return bool(found), None
        return None, f"it returned {_in_words(found, repr)[:40]} of type {type(found).__name__}, not True or False"

    def _text(self, ids: list[int]) -> str:
        return decoded(self.tokenizer, ids)


def _in_words(value: Any, how: Callable[[Any], str]) -> str:
    try:
        return how(value)
    except Exception:  # a user's object may not be able to say what it is
        return "(it cannot be shown)"


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of ids; without a tokenizer the ids themselves."""
    if tokenizer is None:
        return " ".join(map(str, ids))
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def _batches(
    wanted: list[tuple[int, int]], problems: list[TokenizedProblem], n_rows: int
) -> Iterator[list[tuple[int, int]]]:
    """Batches of ``(problem, sample)`` whose prompts have one length, the longest first."""
    by_length: dict[int, list[tuple[int, int]]] = {}
    for problem, sample in wanted:
        by_length.setdefault(len(problems[problem].prompt), []).append((problem, sample))
    for length in sorted(by_length, reverse=True):
        rows = by_length[length]
        yield from (rows[start : start + n_rows] for start in range(0, len(rows), n_rows))


def end_tokens(moe: MoEHooks) -> frozenset[int]:
    """Ids that end a completion."""
    model: Any = moe.bridge.original_model
    found: set[int] = set()
    for owner in (getattr(model, "generation_config", None), moe.bridge.tokenizer):
        value = getattr(owner, "eos_token_id", None)
        found |= {value} if isinstance(value, int) else set(value or ())
    return frozenset(found)
