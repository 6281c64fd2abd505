"""Sampling completions of problems, checking them, and what of it is kept."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr

from moe_interp.checks import check_seed, check_whole
from moe_interp.engine import threads_asleep
from moe_interp.engine.decoding.cached_decoder import CachedDecoder
from moe_interp.engine.eval_mode import in_eval_mode
from moe_interp.engine.memory import Memory, out_of_memory_in_words
from moe_interp.engine.pass_inputs import check_memory
from moe_interp.engine.policy import policy_of
from moe_interp.errors import ConfigError, DataError
from moe_interp.experiments.identity.model import model_identity
from moe_interp.experiments.identity.naming import model_name
from moe_interp.experiments.inputs.repeats import Merged
from moe_interp.experiments.pass_at_k.checkers import Checker, NamedChecker, checker_of
from moe_interp.experiments.pass_at_k.completions import CompletionFile
from moe_interp.experiments.pass_at_k.problems import (
    Problem,
    TokenizedProblem,
    check_problems,
    distinct_problems,
    tokenize_problems,
)
from moe_interp.experiments.pass_at_k.result import PassAtKResult, checked_ks
from moe_interp.experiments.pass_at_k.sampling_run import CompletionRun, Sampling, decoded, end_tokens
from moe_interp.hooks.attach import MoEHooks, check_attached
from moe_interp.progress import Report, reporting
from moe_interp.results import checksum
from moe_interp.stats import pass_at_k
from moe_interp.types import Hooks

DEFAULT_LENGTH = 512
"""New tokens at most, where the context leaves so many and none are asked for."""
MOST_ROWS = 64
"""Rows of a batch on a processor by default; a device with more tokens a pass takes more."""


@out_of_memory_in_words()
@threads_asleep()
@in_eval_mode
def evaluate_pass_at_k(
    moe: MoEHooks,
    problems: Iterable[Any],
    n_samples: int = 160,
    ks: Sequence[int] = (1, 8, 64),
    temperature: float = 0.6,
    top_p: float = 0.95,
    is_correct: str | Checker = "number",
    hooks: Hooks | None = None,
    max_new_tokens: int | None = None,
    stop: str | Sequence[str] = (),
    seed: int = 0,
    batch_size: int | None = None,
    memory_budget: int | None = None,
    store: str | os.PathLike[str] | None = None,
    resume: bool = True,
    progress: bool | Report | None = None,
) -> PassAtKResult:
    """Sample ``n_samples`` completions of every problem, check them, and estimate pass@K.

    Every token of a completion is drawn by a number that depends on ``seed``, the problem's id and the sample's number
    alone. So completions do not depend on the order of problems, on the number of samples or, in float32 on a
    processor, on the batch size; elsewhere rounding depends on the batch, and may now and then draw another token.
    A completion ends with an end-of-sequence token (of the generation config and the tokenizer), a stop string or
    ``max_new_tokens``; rows that have ended leave their batch. Rows of a batch have prompts of one length, so that
    nothing is padded, and samples of a problem share the pass of its prompt.

    Args:
        moe: Attached hooks of a decoder-only model.
        problems: Of :func:`load_problems`, or mappings with prompt (or messages) and answer, and id and domain if they
            have one. Problems of one prompt and answer count once.
        n_samples: n, completions a problem.
        ks: The K, each at most ``n_samples``.
        temperature: Of the softmax; 0 is greedy.
        top_p: Mass of the nucleus, in (0, 1]; 1 is all of the vocabulary.
        is_correct: "number", "choice", "exact", "math" (by math-verify), or a function
            ``(completion, problem) -> bool``. Where it raises, the completion is kept and counts as not right, and the
            result says so.
        hooks: Interventions, in place in prompts' and generated tokens' passes alike, as under ``bridge.generate``.
            They see a prompt once for all of its samples. One that draws gets the sample's own numbers; one that is
            made for the rows of a batch cannot serve here.
        max_new_tokens: By default what the context leaves, 512 at most.
        stop: One or several texts; the completion's text ends before them.
        batch_size: Rows of a pass; by default as many as fit into memory, 64 on a processor at most.
        memory_budget: Bytes; by default what is free.
        store: A file of JSON lines for completions as they come. The same call goes on from it, also with another
            ``n_samples``, ``ks`` or batch size; completions whose check raised are checked again.
        resume: False replaces what ``store`` holds.
        progress: See :func:`moe_interp.progress.reporting`.

    Returns:
        n and c by problem, and what derives from them.

    Raises:
        ConfigError: options out of range (k > n among them), an unknown checker, or "math" without its library.
        DataError: problems without an answer (or without one that the checker can read), messages without a chat
            template, a prompt that leaves no room in the context, or logits that are not finite.
        ResultError: a store of another run, or one that cannot be written.

    Source: Chen et al. (2021) for the estimator; Holtzman et al. (2020) for the nucleus. What it does not show: whether
    a right answer was reached by right steps, or what a larger n would find.
    """
    check_attached(moe)
    n_samples, chosen_ks = _check_counts(n_samples, ks)
    sampling = _check_sampling(temperature, top_p, max_new_tokens, stop, seed)
    batch_size = None if batch_size is None else check_whole(batch_size, "batch_size", 1)
    checker, memory = checker_of(is_correct), check_memory(moe, memory_budget)
    given = [_with_text_answer(moe, problem) for problem in check_problems(problems)]
    for problem in given:
        checker.refuse(problem)
    read, merged = distinct_problems(tokenize_problems(moe.bridge, given))
    lengths = _new_tokens(moe, read, sampling)
    plan = None if store is None else _plan(moe, hooks or [], read, sampling, checker)
    file = CompletionFile(store, plan, resume)
    try:
        run = CompletionRun(moe, CachedDecoder(moe, hooks or []), read, lengths, sampling, checker, file)
        run.check_again()
        rows = batch_size or _rows_that_fit(moe, max(len(p.prompt) + n for p, n in zip(read, lengths)), memory)
        with reporting("sampling completions", progress) as report:
            run.sample(n_samples, rows, memory, report)
    finally:
        file.close()
    run.warn_of_errors()
    return _result(moe, run, n_samples, chosen_ks, merged)


def _with_text_answer(moe: MoEHooks, problem: Problem) -> Problem:
    if isinstance(problem.answer, str):
        return problem
    return replace(problem, answer=decoded(moe.bridge.tokenizer, problem.answer))


def _check_counts(n_samples: int, ks: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    n_samples = check_whole(n_samples, "n_samples", 1)
    checked = tuple(sorted(checked_ks(ks)))
    if checked[-1] > n_samples:
        raise ConfigError(
            f"k={checked[-1]} with n_samples={n_samples}", "n of at least k", "Raise n_samples, or change ks."
        )
    return n_samples, checked


def _check_sampling(temperature: float, top_p: float, max_new_tokens: int | None, stop: Any, seed: int) -> Sampling:
    for name, value, is_right, expected in (
        ("temperature", temperature, lambda x: 0 <= x < math.inf, "a number of at least 0"),
        ("top_p", top_p, lambda x: 0 < x <= 1, "a number above 0, of at most 1"),
    ):
        is_number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
        if not is_number or not is_right(value):
            raise ConfigError(f"{name}={value!r}", expected, f"Change {name}.")
    given = () if stop is None else (stop,) if isinstance(stop, str) or not isinstance(stop, Iterable) else stop
    stops = tuple(given)
    if not all(isinstance(text, str) and text for text in stops):
        raise ConfigError(f"stop={stop!r}", "texts that are not empty", "Leave it out, or correct it.")
    if max_new_tokens is not None:
        max_new_tokens = check_whole(max_new_tokens, "max_new_tokens", 1)
    return Sampling(float(temperature), float(top_p), max_new_tokens, stops, check_seed(seed))


def _new_tokens(moe: MoEHooks, problems: list[TokenizedProblem], sampling: Sampling) -> list[int]:
    """New tokens of each problem's completions, at most.

    Raises:
        DataError: a prompt that leaves less than was asked for.
    """
    context = int(getattr(moe.bridge.cfg, "n_ctx", 0) or 0)
    found = []
    for problem in problems:
        room = context - len(problem.prompt) if context else DEFAULT_LENGTH
        wanted = sampling.max_new_tokens
        if context and room < (wanted or 1):
            raise DataError(
                f"{problem.problem.place}: a prompt of {len(problem.prompt)} tokens"
                + ("" if wanted is None else f" and max_new_tokens={wanted}"),
                f"together at most the model's context of {context}",
                "Shorten the prompt, leave it out, or lower max_new_tokens.",
            )
        found.append(min(room, DEFAULT_LENGTH) if wanted is None else wanted)
    return found


def _rows_that_fit(moe: MoEHooks, width: int, memory: Memory) -> int:
    """Rows of a batch, from an estimate of their keys, values and logits (derived)."""
    cfg: Any = moe.bridge.cfg
    size = next(moe.bridge.original_model.parameters()).element_size()
    heads = int(getattr(cfg, "n_key_value_heads", None) or getattr(cfg, "n_heads", 1) or 1)
    keys = 2 * int(cfg.n_layers) * heads * int(getattr(cfg, "d_head", 0) or 0) * size
    # the keys twice, as they are while rows leave; logits in the forms that sampling makes of them
    a_row = 2 * keys * width + 32 * int(getattr(cfg, "d_vocab", 0) or 0)
    fitting = memory.bytes // max(a_row, 1)
    if fitting < 1 and memory.budget is not None:
        raise ConfigError(
            f"a memory budget of {memory.bytes / 2**20:.3f} MiB",
            f"at least {a_row / 2**20:.3f} MiB for one completion of {width} tokens with its prompt",
            "Raise memory_budget, or lower max_new_tokens.",
        )
    return int(max(1, min(fitting, max(MOST_ROWS, policy_of(moe).most_tokens // 1024))))


def _plan(
    moe: MoEHooks, hooks: Hooks, problems: list[TokenizedProblem], sampling: Sampling, checker: NamedChecker
) -> Mapping[str, Any]:
    """What a stored run is known by; n, K and the batch are not part of it."""
    with moe.bridge.hooks(fwd_hooks=list(hooks)):
        identity = model_identity(moe)
    end = sorted(end_tokens(moe))
    contents = [[p.problem.id, list(p.prompt), p.problem.answer] for p in problems]
    return {
        "problems": {"count": len(problems), "checksum": checksum(contents)},
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_new_tokens": sampling.max_new_tokens,
        "stop": list(sampling.stop),
        "end_tokens": end,
        "seed": sampling.seed,
        "is_correct": checker.name,
        **identity,
    }


def _result(moe: MoEHooks, run: CompletionRun, n_samples: int, ks: tuple[int, ...], merged: Merged) -> PassAtKResult:
    problems, found = [p.problem for p in run.problems], run.file.found
    table = [[found[problem.id, sample] for sample in range(n_samples)] for problem in problems]
    verdicts = np.array([[-1 if one.correct is None else int(one.correct) for one in row] for row in table], np.int8)
    n, c = np.full(len(problems), n_samples, dtype=np.int64), (verdicts == 1).sum(axis=1)
    contents = [checksum([list(p.prompt), p.problem.answer])[:16] for p in run.problems]
    axes = ("problem", "sample")
    data = xr.Dataset(
        {
            "pass_at_k": (("problem", "k"), pass_at_k(n[:, None], c[:, None], np.array(ks))),
            "n": ("problem", n),
            "c": ("problem", c),
            "n_errors": ("problem", (verdicts == -1).sum(axis=1)),
            "correct": (axes, verdicts),
            "n_tokens": (axes, np.array([[len(one.ids) for one in row] for row in table], np.int32)),
            "is_cut": (axes, np.array([[one.finish == "length" for one in row] for row in table], np.int8)),
        },
        coords={
            "problem": [problem.id for problem in problems],
            "k": list(ks),
            "domain": ("problem", [problem.domain for problem in problems]),
            "content": ("problem", contents),
        },
        attrs={"model": model_name(moe)} | ({"merged": merged} if merged else {}),
    )
    sampling = run.sampling
    config = {
        "n_samples": n_samples,
        "ks": list(ks),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_new_tokens": sampling.max_new_tokens,
        "stop": list(sampling.stop),
        "is_correct": run.checker.name,
        "hooks": sorted({str(name) for name, _ in run.decoder.hooks}),
    }
    return PassAtKResult(data, config=config, seeds=sampling.seed, data_checksum=checksum(contents))
