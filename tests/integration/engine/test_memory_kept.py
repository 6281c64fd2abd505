"""What passes hold at a time, as torch's allocator counts it, stays within the budget that they are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import moe_interp as mi
from moe_interp.engine.memory import tokens_per_pass
from moe_interp.engine.recorded_pass import record_pass
from moe_interp.errors import ConfigError, DataError
from moe_interp.routes import check_routes, score_from_base, score_routes
from moe_interp.routes.branch_scores import block_outputs
from moe_interp.routes.plan import Plan
from tests import tiny

MIB = 2**20
# plain; sinks, windows and biases; latent attention and shared experts; norms of queries
FAMILIES = ("olmoe", "gpt_oss", "deepseek_v2", "qwen3_moe")
# experts that all run on every token; states of every position; chunks that short sequences do not fill
OTHERS = ("llama4", "jamba", "qwen3_next")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Passes side by side would be counted in the first one's thread alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def attached(family: str) -> mi.MoEHooks:
    return mi.attach(tiny.build_bridge(tiny.build_hf(family), family))


def peak(call: Callable[[], Any]) -> int:
    """The most bytes that were allocated at a time, over what was there before; inside of kernels too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(np.cumsum([0, *sizes]).max())


def test_the_count_counts() -> None:
    def call() -> None:
        first = torch.empty(MIB, dtype=torch.uint8)
        del first
        torch.empty(2 * MIB, dtype=torch.uint8).sort()  # its values and indices, 18 MiB and more

    assert 18 * MIB <= peak(call) < 60 * MIB


@pytest.mark.parametrize("family", FAMILIES)
def test_branches_and_their_experts_outputs(family: str) -> None:
    moe, tokens = attached(family), tiny.random_tokens(2, 64)
    layer, n_routes = int(moe.layers[0]), 24  # type: ignore[arg-type]
    spec, draw = moe.spec(layer), torch.Generator().manual_seed(1)
    routes = torch.rand(2, 64, n_routes, spec.n_experts, generator=draw).topk(spec.top_k).indices
    base = record_pass(moe, tokens, [layer])
    given = {layer: check_routes(base, layer, routes)}
    score_from_base(base, given, [3])  # what is tried once
    peaks = []
    for budget in (4 * MIB, 12 * MIB):
        peaks.append(peak(lambda budget=budget: score_from_base(base, given, None, None, "branch", budget)))  # type: ignore[misc]
        assert peaks[-1] <= budget
        some = torch.arange(min(Plan(base, layer, n_routes, budget).tokens_at_once, tokens.numel()))
        assert peak(lambda some=some: block_outputs(base, layer, given[layer], some)) <= budget // 2  # type: ignore[misc]
    assert peaks[1] > 1.5 * peaks[0]  # more is taken where there is more


def items(width: int, n: int) -> list[dict[str, Any]]:
    ids = np.random.default_rng(0).integers(3, 90, (n, width)).tolist()
    return [{"id": f"i{i}", "domain": "ab"[i % 2], "prompt": row[:-4], "answer": row[-4:]} for i, row in enumerate(ids)]


def least(moe: mi.MoEHooks, width: int, slots: int) -> int:
    """Bytes that one sequence needs, as a refusal of less says."""
    with pytest.raises(ConfigError) as refused:
        tokens_per_pass(moe, width, 1, kept_layers=1, kept_tokens=4 * width, slots=slots)
    return int(float(refused.value.expected.split()[2]) * MIB)


@pytest.mark.parametrize(
    "family, width", [*((family, 48) for family in FAMILIES), *((family, 12) for family in (*OTHERS, "gpt_oss"))]
)
def test_isolation_with_every_baseline(family: str, width: int) -> None:
    """A budget of three sequences with every expert on each token: with one expert, several sets run together."""
    moe = attached(family)
    budget = 3 * least(moe, width, moe.spec(moe.layers[0]).n_experts)
    options: dict[str, Any] = {"layers": [moe.layers[0]], "experts": [0, 1, 2, 3, 4, 5], "random_draws": 1}
    options |= {"mass": ("one",), "memory_budget": budget, "progress": False}
    assert peak(lambda: mi.isolate_experts(moe, items(width, 4), **options)) <= budget


@pytest.mark.parametrize("experiment", ["isolation", "counterfactual"])
def test_a_budget_too_small_for_one_sequence_is_refused_before_anything_runs(
    experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    moe = attached("olmoe")
    ran: list[int] = []
    monkeypatch.setattr(f"moe_interp.experiments.{experiment}.experiment.model_identity", lambda moe: ran.append(1))
    moe.bridge.original_model.register_forward_pre_hook(lambda module, args: ran.append(2))
    run: Any = mi.isolate_experts if experiment == "isolation" else mi.counterfactual_routes
    given = items(12, 4) if experiment == "isolation" else tiny.random_tokens(1, 12).tolist()
    with pytest.raises(ConfigError, match=r"0\.005 MiB.*at least .* MiB for one sequence of 12 tokens.*Raise memory"):
        run(moe, given, memory_budget=5000, progress=False)
    assert not ran


def test_a_budget_that_holds_no_row_of_branches_is_refused_in_words() -> None:
    moe, routes = attached("olmoe"), torch.zeros(1, 12, 1, 2).long()
    routes[..., 1] = 1
    with pytest.raises(DataError, match=r"a memory budget of 5000 bytes.*at least \d+ bytes.*Raise memory_budget"):
        score_routes(moe, tiny.random_tokens(1, 12), 0, routes, memory_budget=5000)


def test_what_is_free_is_named_where_no_budget_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = attached("olmoe")
    monkeypatch.setattr("moe_interp.engine.memory.free_bytes", lambda policy: 5000)
    with pytest.raises(ConfigError, match=r"0\.005 MiB that may be used of what is free on cpu.*End what else"):
        mi.isolate_experts(moe, items(12, 4), progress=False)
