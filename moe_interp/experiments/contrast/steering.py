"""What steering experts does: to a user's metric and to the loss, against as many random experts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from moe_interp.arch.offload import device_of
from moe_interp.checks import check_seed, check_whole
from moe_interp.engine import threads_asleep
from moe_interp.engine.eval_mode import in_eval_mode
from moe_interp.engine.memory import out_of_memory_in_words, tokens_per_pass
from moe_interp.engine.rerun import PrefixRunner, TargetPredictions
from moe_interp.errors import ConfigError, DataError
from moe_interp.experiments.contrast.prompts import Prompt, SelectionCounts, continued, end_of_text, read_prompts
from moe_interp.experiments.contrast.result import ContrastResult, How, named_experts, steerable, steering_hooks
from moe_interp.experiments.contrast.steering_result import SteeringResult
from moe_interp.experiments.identity.naming import model_name
from moe_interp.experiments.inputs.batches import batches_of_like_length
from moe_interp.experiments.inputs.repeats import Merged, distinct_sequences, merge_repeats
from moe_interp.experiments.inputs.sequences import ScoredSequence, SequenceBatch, read_sequences
from moe_interp.hooks.attach import MoEHooks, check_attached
from moe_interp.progress import Report, reporting
from moe_interp.results import checksum
from moe_interp.stats import derive_rng
from moe_interp.types import Hooks, Layer

Experts = dict[Layer, list[int]]


@dataclass(frozen=True)
class Completion:
    """What a model writes after a prompt: the argument of a metric.

    Attributes:
        prompt: The prompt's id.
        text: What was generated, special tokens left out; empty without a tokenizer.
        tokens: Its ids.
    """

    prompt: str
    text: str
    tokens: tuple[int, ...]


@out_of_memory_in_words()
@threads_asleep()
@in_eval_mode
def steering_effect(
    moe: MoEHooks,
    experts: ContrastResult | Mapping[Layer, Sequence[int]] | Iterable[tuple[Layer, int]],
    prompts: Sequence[Any] | None = None,
    metric: Callable[[Completion], float] | None = None,
    logits_metric: Callable[[Tensor], Any] | None = None,
    held_out: Sequence[Any] | None = None,
    how: How = "suppress",
    random_draws: int = 8,
    max_new_tokens: int = 32,
    memory_budget: int | None = None,
    seed: int = 0,
    progress: bool | Report | None = None,
) -> SteeringResult:
    """Suppress or promote experts at all their layers together, and measure what it does, beside random experts.

    Args:
        moe: Attached hooks of a decoder-only model.
        experts: A contrast, of which those are taken that set a uses more; a mapping from layers to experts; or pairs
            (layer, expert). Of a layer with more of them than the family can use or leave out, the first are taken.
        prompts: What the metrics are measured on: see :func:`moe_interp.contrast_experts`. Use others than the contrast
            did. Those that have the same tokens count once, with a warning.
        metric: From what is generated after a prompt, greedily and under the steering, to a number.
        logits_metric: From the logits ``[vocabulary]`` after the prompt's last token to a number.
        held_out: Sequences for the loss (see :func:`.sequences.read_sequences`; items too), in nats a scored token;
            mappings and items may have a ``domain``.
        how: "suppress" or "promote".
        random_draws: Draws of as many random experts at each layer: of those that are not steered, where there are
            enough. They are as many, not as busy: ``slot_share`` says what share of slots each draw has naturally.
        max_new_tokens: At most so many are generated.
        memory_budget: Bytes a forward pass may use; by default what is free (on a processor half of it).
        seed: Of the draws.
        progress: See :func:`moe_interp.progress.reporting`.

    Raises:
        ConfigError: no experts, nothing to measure, or options out of range.
        DataError: prompts or sequences that cannot be read, or a metric that gives no number.
        HookError, RouteError: layers or experts that are not there.

    Source: derived. Size-matched random experts as the null: SAFEx, GateBreaker. What it does not show: that the
    experts do what the contrast was about; what is suppressed is replaced by the next best, which may do the same.
    """
    check_attached(moe)
    random_draws, seed = check_whole(random_draws, "random_draws", 1), check_seed(seed)
    max_new_tokens = check_whole(max_new_tokens, "max_new_tokens", 1)
    chosen = steerable(moe, _chosen(moe, experts), how)
    steering_hooks(moe, chosen, how)  # refuses now what cannot be steered
    if (metric is None and logits_metric is None and held_out is None) or (
        (metric is not None or logits_metric is not None) != (prompts is not None)
    ):
        raise ConfigError(
            "a metric without prompts, prompts without a metric, or nothing to measure",
            "prompts with metric or logits_metric, or held_out, or both",
            "Name what shall be measured, and on what.",
        )
    variants = {"natural": None, "steered": chosen}
    variants |= {f"random {draw}": _random_like(moe, chosen, seed, draw) for draw in range(random_draws)}
    for name, given in (("metric", metric), ("logits_metric", logits_metric)):
        if given is not None and not callable(given):
            raise ConfigError(f"{name}={str(given)[:60]!r}", "a function", "Pass one that returns a number.")
    asked, repeated = ([], {}) if prompts is None else _distinct_prompts(read_prompts(moe, prompts, "prompts"))
    held_out = list(held_out) if isinstance(held_out, Iterator | np.ndarray | Tensor) else held_out
    read = [] if held_out is None else read_sequences(moe.bridge, held_out)
    sequences, merged = distinct_sequences(read) if read else ([], {})
    domains = _domains(held_out, read, sequences)
    found: dict[str, NDArray[np.float64]] = {}
    run = _Steered(moe, how, memory_budget)
    with reporting("steering experts", progress) as report, torch.no_grad():
        shares = run.slot_shares(asked, sequences, list(chosen))
        rows: dict[str, list[NDArray[np.float64]]] = {"metric": [], "logits_metric": [], "loss": []}
        for number, steered in enumerate(variants.values()):
            report(number, len(variants))
            hooks = [] if steered is None else steering_hooks(moe, steered, how)
            if metric is not None:
                rows["metric"].append(run.on_completions(asked, metric, max_new_tokens, hooks))
            if logits_metric is not None:
                rows["logits_metric"].append(run.on_logits(asked, logits_metric, hooks))
            if sequences:
                rows["loss"].append(run.losses(sequences, hooks))
        report(len(variants), len(variants))
        found = {name: np.stack(values) for name, values in rows.items() if values}
    axes = {"metric": "prompt", "logits_metric": "prompt", "loss": "sequence"}
    natural = {layer: shares[place] for place, layer in enumerate(chosen)}
    data = xr.Dataset(
        {
            **{name: (("variant", axes[name]), values) for name, values in found.items()},
            "slot_share": ("variant", [_share(natural, steered) for steered in variants.values()]),
        },
        coords={"variant": list(variants)}
        | ({"prompt": [prompt.name for prompt in asked]} if asked else {})
        | ({"sequence": [s.id for s in sequences], "domain": ("sequence", domains)} if sequences else {}),
        attrs={
            "model": model_name(moe),
            "how": how,
            "experts": {str(layer): ids for layer, ids in chosen.items()},
            "random_experts": [
                {str(layer): ids for layer, ids in drawn.items()}
                for name, drawn in variants.items()
                if drawn is not None and name != "steered"
            ],
        }
        | ({"merged": merged} if merged else {})
        | ({"merged_prompts": repeated} if repeated else {}),
    )
    config = {"how": how, "experts": data.attrs["experts"], "random_draws": random_draws}
    inputs = [*[p.tokens for p in asked], *[s.tokens for s in sequences]]
    return SteeringResult(data, config=config, seeds=seed, data_checksum=checksum(inputs))


def _chosen(moe: MoEHooks, experts: Any) -> Experts:
    """The experts by layer."""
    if isinstance(experts, ContrastResult):
        if not (chosen := experts.found()):
            raise ConfigError(
                "a contrast in which no expert is used more by set a",
                "experts that were found, or experts by name",
                "Pass experts={layer: [expert, ...]}, such as those of result.top().",
            )
        return chosen
    return named_experts(moe, experts, "steering_effect")


def _distinct_prompts(read: list[Prompt]) -> tuple[list[Prompt], Merged]:
    """Prompts of the same tokens, once.

    Raises:
        DataError: none.
    """
    if not read:
        raise DataError("prompts: none", "at least one prompt", "Pass prompts, or leave them and their metrics out.")
    places, merged = merge_repeats([prompt.tokens for prompt in read], [prompt.name for prompt in read], "prompts")
    return [read[place] for place in places], merged


def _random_like(moe: MoEHooks, chosen: Experts, seed: int, draw: int) -> Experts:
    """As many experts at each layer, drawn from the others where there are enough."""
    drawn: Experts = {}
    for layer, ids in chosen.items():
        every = np.arange(moe.spec(layer).n_experts)
        others = np.setdiff1d(every, ids)
        rng = derive_rng(seed, "random experts", str(layer), draw)
        drawn[layer] = rng.choice(others if len(others) >= len(ids) else every, len(ids), replace=False).tolist()
    return drawn


def _share(shares: Mapping[Layer, NDArray[np.float64]], experts: Experts | None) -> float:
    """The experts' mean share of slots over their layers; NaN for none."""
    return np.nan if experts is None else float(np.mean([shares[layer][ids].sum() for layer, ids in experts.items()]))


def _domains(given: Any, read: Sequence[ScoredSequence], kept: Sequence[ScoredSequence]) -> list[str]:
    """Each kept sequence's domain; "all" where it has none."""
    by_id: dict[str, str] = {}
    for entry, sequence in zip(given or (), read):
        fields = getattr(entry, "fields", {})
        domain = entry.get("domain") if isinstance(entry, Mapping) else getattr(entry, "domain", fields.get("domain"))
        by_id[sequence.id] = "all" if domain is None else str(domain)
    return [by_id[sequence.id] for sequence in kept]


class _Steered:
    """Measures under hooks, batch by batch."""

    def __init__(self, moe: MoEHooks, how: How, budget: int | None) -> None:
        self.moe, self.how, self.budget = moe, how, budget
        self.runner, self.device = PrefixRunner(moe), device_of(moe.bridge.original_model)

    def losses(self, sequences: Sequence[ScoredSequence], hooks: Hooks) -> NDArray[np.float64]:
        """``[sequence]``: nats a scored token."""
        losses = np.empty(len(sequences))
        tokens = tokens_per_pass(self.moe, max(map(len, sequences)), self.budget, predictions_per_token=1.0)
        for index in batches_of_like_length(sequences, tokens):
            batch = SequenceBatch.build([sequences[i] for i in index], self.device)
            row, column = batch.wanted.nonzero(as_tuple=True)
            targets = TargetPredictions(row, column, batch.tokens[row, column + 1])
            logp = self.runner.base(batch.tokens, targets, [], hooks)[0].double().cpu()
            sums = torch.zeros(len(index), dtype=torch.float64).index_add_(0, row.cpu(), logp)
            losses[index] = -(sums / batch.wanted.sum(dim=1).cpu()).numpy()
        return losses

    def on_completions(
        self, prompts: Sequence[Prompt], metric: Callable[[Completion], float], n: int, hooks: Hooks
    ) -> NDArray[np.float64]:
        """``[prompt]``: the metric of what each prompt is continued with."""
        tokenizer, end = self.moe.bridge.tokenizer, end_of_text(self.moe)
        values = []
        for prompt in continued(self.moe, prompts, n, self.budget, hooks):
            kept = prompt.continuation[: len(prompt.continuation) - (prompt.continuation[-1:] == (end,))]
            text = "" if tokenizer is None else str(tokenizer.decode(kept, skip_special_tokens=True))
            values.append(_number(metric(Completion(prompt.name, text, kept)), f"metric on prompt {prompt.name!r}"))
        return np.array(values)

    def on_logits(
        self, prompts: Sequence[Prompt], metric: Callable[[Tensor], Any], hooks: Hooks
    ) -> NDArray[np.float64]:
        """``[prompt]``: the metric of the logits after each prompt."""
        values = np.empty(len(prompts))
        by_length: dict[int, list[int]] = {}
        for number, prompt in enumerate(prompts):
            by_length.setdefault(len(prompt.tokens), []).append(number)
        for length, numbers in by_length.items():
            rows = max(1, tokens_per_pass(self.moe, length, self.budget, predictions_per_token=1.0) // length)
            for start in range(0, len(numbers), rows):
                chunk = numbers[start : start + rows]
                tokens = torch.tensor([prompts[i].tokens for i in chunk], device=self.device)
                logits: Any = self.moe.bridge.run_with_hooks(tokens, fwd_hooks=list(hooks))
                for i, last in zip(chunk, logits[:, -1]):
                    values[i] = _number(metric(last), f"logits_metric on prompt {prompts[i].name!r}")
        return values

    def slot_shares(
        self, prompts: Sequence[Prompt], sequences: Sequence[ScoredSequence], layers: Sequence[Layer]
    ) -> NDArray[np.float64]:
        """``[layer, expert]``: each expert's natural share of its layer's slots, over all prompts and sequences."""
        rows = [*[p.tokens for p in prompts], *[s.tokens for s in sequences]]
        total = [np.zeros(self.moe.spec(layer).n_experts) for layer in layers]
        for index in batches_of_like_length(rows, tokens_per_pass(self.moe, max(map(len, rows)), self.budget)):
            width = max(len(rows[i]) for i in index)
            tokens = torch.tensor([[*rows[i], *[rows[i][-1]] * (width - len(rows[i]))] for i in index])
            real = torch.arange(width) < torch.tensor([len(rows[i]) for i in index]).unsqueeze(1)
            counts = SelectionCounts(self.moe, layers, real.to(self.device))
            first = torch.zeros(1, dtype=torch.int64, device=self.device)
            self.runner.base(tokens.to(self.device), TargetPredictions(first, first, first), [], counts.hooks)
            for place, layer in enumerate(layers):
                total[place] += counts.found[layer].sum(dim=0).cpu().numpy()
        return np.array([sums / sums.sum() for sums in total], dtype=object if len({*map(len, total)}) > 1 else None)


def _number(value: Any, what: str) -> float:
    """A metric's value as a number.

    Raises:
        DataError: a vector, a text, or a number that is not finite.
    """
    shape = tuple(getattr(value, "shape", ()))
    try:
        number = float(value) if int(np.prod(shape)) == 1 else np.nan
    except (TypeError, ValueError):
        number = np.nan
    if not np.isfinite(number):
        given = f"a value of shape {shape}" if shape else f"{value!r}"
        raise DataError(f"{what} gave {given}", "one finite number", "Return a scalar.")
    return number
