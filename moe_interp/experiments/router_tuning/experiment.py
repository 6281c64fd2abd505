"""Router-only tuning: can the router of a frozen model be taught to take better routes?"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from accelerate import Accelerator

from moe_interp.checks import check_whole
from moe_interp.engine import threads_asleep
from moe_interp.engine.eval_mode import in_eval_mode
from moe_interp.engine.memory import out_of_memory_in_words
from moe_interp.engine.pass_inputs import check_memory
from moe_interp.errors import ConfigError, DataError, ResultError, TrainingError, warn
from moe_interp.experiments.identity.model import model_identity
from moe_interp.experiments.identity.naming import model_name
from moe_interp.experiments.inputs.repeats import distinct_sequences
from moe_interp.experiments.inputs.sequences import ScoredSequence, read_sequences
from moe_interp.experiments.router_tuning.data import HELD_OUT, tuning_dataset
from moe_interp.experiments.router_tuning.delta import everything
from moe_interp.experiments.router_tuning.evaluation import HeldOut
from moe_interp.experiments.router_tuning.objectives import Objective
from moe_interp.experiments.router_tuning.options import PUBLISHED, TuningOptions
from moe_interp.experiments.router_tuning.result import RouterTuningResult
from moe_interp.experiments.router_tuning.routers import TunedRouter, frozen
from moe_interp.experiments.router_tuning.token_sources.sources import Sources
from moe_interp.experiments.router_tuning.training import Tuning
from moe_interp.hooks.attach import MoEHooks
from moe_interp.processes import accelerator, gathered
from moe_interp.progress import Report, reporting
from moe_interp.results import checksum
from moe_interp.results.files import check_folder
from moe_interp.routes import GumbelTopK, RouteSampler
from moe_interp.routes.inputs import decoder_layers
from moe_interp.stats import derive_rng
from moe_interp.types import Layer

HELD_OUT_SHARE = 5  # one sequence in so many is held out, where none is given
STATE, CACHE = "state.pt", "cache"


class SlowTuningWarning(UserWarning):
    """Steps at the last layer run the model, because a cache would not be exact here."""


@out_of_memory_in_words()
@threads_asleep()
@in_eval_mode
def tune_router(
    moe: MoEHooks,
    sequences: Sequence[Any],
    layer: Layer | Sequence[Layer] = -1,
    objective: Objective = "epo",
    *,
    held_out: Sequence[Any] | None = None,
    other_domains: Mapping[str, Sequence[Any]] | None = None,
    select: float | str | None = 0.1,
    sampler: RouteSampler | None = None,
    n_routes: int = 32,
    beta: float = 0.1,
    temperature: float = 1.0,
    reference: str | None = "start",
    lr: float = 3e-4,
    schedule: str = "constant",
    warmup: int = 0,
    batch_size: int = 16,
    epochs: int = 1,
    max_steps: int | None = None,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
    evaluate_every: int | None = None,
    seed: int = 0,
    memory_budget: int | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    checkpoint_every: int | None = None,
    stop_at: int | None = None,
    progress: bool | Report | None = None,
) -> RouterTuningResult:
    """Train the weights of chosen layers' routers, and nothing else, towards better routes of the same tokens.

    The model is left as it was: ``result.apply(moe)`` puts the tuned router in. With r- the router's own route of a
    token, G drawn routes, r+ the one of least cross-entropy CE (in nats) where it improves on r-, and
    ``log pi(r) = sum of log pi(e)`` over its experts:

    - "epo": ``-Delta log sigmoid(beta ([log pi / pi_ref](r+) - [log pi / pi_ref](r-)))``, ``Delta = CE(r-) - CE(r+)``;
      tokens without a better route give no gradient. Source: "When Are Experts Misrouted?".
    - "cross_entropy": CE(r-), differentiated through the weights of the experts that run. Other routes get no gradient.
    - "listwise": ``KL(softmax(-CE / temperature) || softmax(log pi))`` over the token's distinct routes (derived).
    - "distill": ``-mean over e in r+ of log pi(e)`` (derived).

    Losses are averaged over the tokens of a batch, and summed over layers. At the last layer a step reads what router
    and experts read from a cache (of one plain pass; on the disk where it does not fit) and runs no forward pass of the
    model. At other layers it runs one pass a step, and scores routes as branches of it
    (:func:`moe_interp.score_routes`).

    Several processes or GPUs (``accelerate launch``) share the tokens of each step and of each evaluation. All of them
    call this with the same arguments, each with the model on its own device. The numbers are those of one process to
    rounding; the first writes the checkpoint.

    Args:
        moe: Attached hooks of a causal decoder.
        sequences: As for :func:`moe_interp.counterfactual_routes`; a sequence's ``mask`` or ``score_from`` says which
            of its tokens count.
        layer: An MoE layer, or several; the last one by default.
        objective: See above.
        held_out: Sequences to evaluate on; by default a fifth of ``sequences``, drawn by the seed and not trained on.
        other_domains: Further sequences to evaluate on, by name of their domain.
        select: Train on tokens whose cross-entropy exceeds so many nats under the untuned model; "fragile" (p < .5),
            "middle" or "confident" (p >= .9); or None for all.
        sampler: Where routes come from: ``GumbelTopK(tau=0.1, pool=32)`` by default, as published. Of GumbelTopK a step
            takes ``n_routes`` independent draws, which repeat (derived); of other samplers distinct routes.
        n_routes: G, a token.
        beta: Of "epo".
        temperature: Of "listwise", in nats.
        reference: "start": pi_ref is the untuned router; None: pi_ref is 1.
        lr, schedule, warmup: AdamW's learning rate; "constant", "linear" or "cosine" down to 0, after so many steps of
            linear warm-up.
        batch_size, epochs, max_steps: Tokens a step, passes over the tokens, and a limit on the steps.
        weight_decay, clip: Of AdamW; the largest norm of a gradient (None: no limit).
        evaluate_every: Steps between evaluations; a quarter of the run by default.
        seed: Of the held-out split, the order of tokens, and the draws.
        memory_budget: Bytes, as for :func:`moe_interp.counterfactual_routes`.
        out: Folder for the checkpoint ``state.pt`` and a cache that does not fit into memory; None keeps no checkpoint.
        resume: Go on from the checkpoint in ``out``; the run then equals one without an interruption.
        checkpoint_every: Steps between checkpoints; those of evaluations by default.
        stop_at: Stop after so many steps of the schedule, with a checkpoint.
        progress: See :func:`moe_interp.progress.reporting`.

    Returns:
        The history, held-out measures with intervals over sequences, and the weights' change.

    Raises:
        ConfigError: options out of range, a hash layer, a router that is not one matrix, a layer whose routes take
            every expert, or, with ``out``, hooks on the model that hold something of unknown content.
        DataError: nothing selected, sequences that cannot be scored, or held-out ones that are trained on.
        TrainingError: a loss or gradient that is not finite (step and learning rate are named, the last good checkpoint
            is kept), or another parameter that changed.
        ResultError: ``out`` holds another run's checkpoint, or one and ``resume`` is False.

    What it does not show: that a preferred route is also taken (see adoption in the result's tables), that gains on
    next tokens carry over to sampled answers (see pass@K), or what tuning other layers would give.
    """
    layers = decoder_layers(moe, layer)
    options = TuningOptions(
        objective, select, sampler or PUBLISHED, n_routes, beta, temperature, reference, lr, schedule, warmup,
        batch_size, epochs, max_steps, weight_decay, clip, evaluate_every, checkpoint_every, seed,
    )  # fmt: skip
    if stop_at is not None:
        check_whole(stop_at, "stop_at", 1)
    processes = accelerator()
    memory = check_memory(moe, memory_budget)
    routers = tuple(TunedRouter.of(moe, one) for one in layers)
    _check_routes(routers, options)
    folder = None if out is None else check_folder(out, "a folder for the checkpoint")
    state = None if folder is None else folder / STATE
    if state is not None and state.exists() and not resume:
        raise ResultError(f"{state} already holds a run", "an empty folder, or resume", "Resume, or change out.")
    train, held, domains = _split(moe, sequences, held_out, other_domains, options.seed)
    names = {router.name for router in routers}
    rest, before = everything(moe, names)
    identity = None if state is None else model_identity(moe)
    started = {router.name: router.parameter.detach().clone() for router in routers}
    sources = Sources(moe, routers, memory, None if folder is None else folder / CACHE)
    with frozen(moe, routers):
        source, why_not = sources.of(train, options.is_selected)
        measured, _ = sources.of(held, torch.isfinite, from_cache=why_not is None)
        if why_not is not None and layers == (max(moe.layers),):
            warn(f"Steps at layer {layers[0]} run the model: {why_not}.", SlowTuningWarning)
        draws = int(derive_rng(options.seed, "held-out routes").integers(2**62))
        start = {router.layer: router.start() for router in routers}
        plan = json.dumps(
            {
                "options": {
                    name: repr(getattr(options, name)) for name in asdict(options) if name != "checkpoint_every"
                },
                "layers": layers,
                "model": [rest, checksum([tensor.float() for tensor in started.values()]), identity],
                "sequences": [checksum([[s.id, s.tokens, s.is_scored] for s in some]) for some in (train, held)],
                "from_cache": why_not is None,
            }
        )
        _check_same(processes, plan)
        held_out_tokens = HeldOut(measured, routers, start, options, draws, processes)
        tuning = Tuning(source, routers, held_out_tokens, options, plan, state, processes)
        if state is not None and state.exists():
            tuning.load()
        with reporting("tuning the router", progress if processes.is_main_process else False) as report:
            tuning.run(report, stop_at)
        processes.wait_for_everyone()
    _check_frozen(moe, before, started)
    tuned = {layer: weight.detach() for layer, weight in tuning.weights.items()}
    data = tuning_dataset(tuning.history, measured.table, domains, routers, start, tuned)
    data.attrs = {
        "model": model_name(moe),
        "objective": options.objective,
        "parameters": [router.name for router in routers],
        "dtype": str(routers[0].parameter.dtype).removeprefix("torch."),
        "fingerprint": rest,
        "n_tokens": len(source.table),
        "n_steps": tuning.n_steps,
        "from_cache": why_not is None,
        "why_not_from_cache": why_not or "",
        "held_out_sequences": [s.id for s, domain in zip(held, domains) if domain == HELD_OUT],
    }
    config = {**asdict(options), "sampler": repr(options.sampler), "layers": layers}
    return RouterTuningResult(
        data, config=config, seeds=int(options.seed), data_checksum=checksum([[s.id, s.tokens] for s in train])
    )


def _split(
    moe: MoEHooks,
    sequences: Sequence[Any],
    held_out: Sequence[Any] | None,
    other_domains: Mapping[str, Sequence[Any]] | None,
    seed: int,
) -> tuple[list[ScoredSequence], list[ScoredSequence], list[str]]:
    """Sequences to train on, to evaluate on, and the domains of the latter."""
    train, _ = distinct_sequences(read_sequences(moe.bridge, sequences))
    if held_out is None:
        if len(train) < 2:
            raise DataError("one sequence, and none held out", "two at least", "Pass more, or held_out.")
        chosen = derive_rng(seed, "held-out sequences").permutation(len(train))[: max(1, len(train) // HELD_OUT_SHARE)]
        held = [train[i] for i in sorted(chosen.tolist())]
        train = [one for i, one in enumerate(train) if i not in set(chosen.tolist())]
    else:
        held, _ = distinct_sequences(read_sequences(moe.bridge, held_out))
    domains = [HELD_OUT] * len(held)
    if not isinstance(other_domains or {}, Mapping):
        expected = "a mapping from names of domains to their sequences"
        raise ConfigError(f"other_domains of type {type(other_domains).__name__}", expected, "Name each domain.")
    for name, given in (other_domains or {}).items():
        if name == HELD_OUT:
            raise ConfigError(f"a domain called {name!r}", "another name", "Rename it.")
        further, _ = distinct_sequences(read_sequences(moe.bridge, given))
        held, domains = held + further, domains + [str(name)] * len(further)
    trained = {one.tokens: one.id for one in train}
    for one in held:
        if one.tokens in trained:
            raise DataError(
                f"the held-out sequence {one.id!r}, which has the tokens of the sequence {trained[one.tokens]!r}",
                "held-out sequences that are not trained on",
                "Leave it out of one of the two.",
            )
    return train, _with_own_names(held, domains), domains


def _with_own_names(held: list[ScoredSequence], domains: list[str]) -> list[ScoredSequence]:
    """Held-out sequences of several domains, whose ids are each one's own."""
    ids = [one.id for one in held]
    if len({*ids}) == len(ids):
        return held
    return [
        ScoredSequence(f"{domain}/{one.id}", one.tokens, one.is_scored, one.place) for one, domain in zip(held, domains)
    ]


def _check_routes(routers: tuple[TunedRouter, ...], options: TuningOptions) -> None:
    """Refuse a layer with one route only, and a pool that holds no other."""
    for router in routers:
        top_k, n_experts = router.rule.top_k, router.rule.n_experts
        if options.objective != "cross_entropy" and top_k >= n_experts:
            raise ConfigError(
                f"layer {router.layer}, whose routes take all {n_experts} experts",
                "a layer that leaves some out",
                'Use objective="cross_entropy", which tunes their weights.',
            )
        if isinstance(options.sampler, GumbelTopK) and (pool := options.sampler.pool) is not None and pool <= top_k:
            given, expected = f"pool={pool} at layer {router.layer}, which takes {top_k} experts", f"more than {top_k}"
            raise ConfigError(given, expected, "Widen the pool, or leave it out.")


def _check_same(processes: Accelerator, plan: str) -> None:
    """See that all processes are of one run.

    Raises:
        ConfigError: they have other sequences, options or models.
    """
    if len({*gathered(processes, [plan])}) > 1:
        raise ConfigError(
            f"{processes.num_processes} processes with other sequences, options or models than one another",
            "one run, which all processes share",
            "Pass the same to all of them, or start each run outside of accelerate launch.",
        )


def _check_frozen(moe: MoEHooks, before: Mapping[str, str], started: Mapping[str, Any]) -> None:
    """See that every parameter and buffer is what it was, bit for bit.

    Raises:
        TrainingError: one is not.
    """
    _, after = everything(moe, started)
    changed = [name for name, digest in before.items() if after.get(name) != digest]
    if changed:
        raise TrainingError(
            f"{changed[0]!r} and {len(changed) - 1} other parameters or buffers changed while the router was tuned",
            "a frozen model",
            "Remove hooks that write to the model, and load it again.",
        )
