"""benchmarks/gpu.py on a machine without a GPU: the same code at tiny sizes, its tables, its limit, its answers."""

from __future__ import annotations

import contextlib
import gc
import itertools
import re
import sys
import time
import weakref
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers

from moe_interp.engine import policy

ROOT = Path(__file__).parents[2]
MODULES = ("gpu", "gpu_shapes", "gpu_timing", "gpu_model", "gpu_table", "gpu_parts", "gpu_runs", "gpu_session")
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def benchmark() -> dict[str, ModuleType]:
    """The benchmark's files, by name, importable as when it is run as a script."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        found = {name: __import__(name) for name in MODULES}
        yield found
    for name in MODULES:
        sys.modules.pop(name, None)


def tables_of(text: str) -> list[dict[str, list[str]]]:
    """Row -> cells of each Markdown table in a text, the first row too."""
    tables: list[dict[str, list[str]]] = []
    is_inside = False
    for line in text.splitlines():
        if line.startswith("| "):
            first, *cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            if not is_inside:
                tables.append({})
            tables[-1][first] = cells
        is_inside = line.startswith("|")
    return tables


def number(cell: str) -> float:
    found = re.match(r"[\d,.]+(e[+-]\d+)?", cell)
    assert found, cell
    return float(found.group().replace(",", ""))


def test_it_fills_every_row_at_tiny_sizes_within_its_limit(
    benchmark, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built: list[weakref.ref[torch.nn.Module]] = []
    build = benchmark["gpu_session"].build

    def watched(*args: object, **options: object) -> object:
        gc.collect()
        assert [model() for model in built] == [None] * len(built)  # one model at a time, freed after
        bridge = build(*args, **options)
        built.append(weakref.ref(bridge.original_model))
        return bridge

    monkeypatch.setattr(benchmark["gpu_session"], "build", watched)
    status = benchmark["gpu"].main(["--models", "tiny", "--seconds", "300"])
    said = capsys.readouterr().out
    assert status == 0, [line for line in said.splitlines() if "FAILED" in line or "EXCEEDED" in line]
    assert "FAILED" not in said
    assert "skipped" not in said
    assert not [line for line in said.splitlines()[-1:] if not line.startswith("|")]  # the table comes last
    assert len(built) == 4
    once, models = tables_of(said)
    sizes, shapes = benchmark["gpu_shapes"].TINY_SIZES, benchmark["gpu_shapes"].SHAPES
    rows = benchmark["gpu_table"]
    assert list(once)[1:] == list(rows.run_rows(sizes).values())
    assert list(models)[1:] == list(rows.model_rows(sizes).values())
    assert next(iter(models.values())) == [f"{shape.name}, tiny" for shape in shapes.values()]
    measured = {key: models[label] for key, label in rows.model_rows(sizes).items()}
    assert measured.pop("memory") == ["not measured"] * len(shapes)  # there is no device of its own memory
    assert all(cell != "not measured" for cells in [*measured.values(), *list(once.values())[1:]] for cell in cells)
    layouts = ("compact", "grid", "grid_compiled")
    for key in ("forward", "naive", "last", "middle", "early", "default", *layouts, "isolation", "read"):
        assert all(number(cell) > 0 for cell in measured[key]), key
    for cell in measured["shares"]:
        assert all(0 < float(part) < 1.5 for part in cell.split(" / "))
    assert all(number(cell) > 0 for cell in measured["isolation_ratio"])
    assert not policy.GRID_SHARES.keys() - {"cuda"}  # as it was
    branches, hooks = list(once.values())[1:3]
    assert number(branches[0]) <= 2e-5
    assert number(hooks[0]) == 0
    assert "largest items of a reading pass" in said
    assert "largest items of branches" in said
    assert f"torch {torch.__version__}" in said
    assert f"transformers {transformers.__version__}" in said


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # an alarm inside a destructor is lost
def test_the_limit_is_kept_and_the_tables_are_whole(benchmark, capsys: pytest.CaptureFixture[str]) -> None:
    start, wall = time.process_time(), time.perf_counter()
    benchmark["gpu"].main(["--models", "olmoe,gpt_oss_20b", "--seconds", "5", "--device", "cpu"])
    # processor time is this program's alone; the wall has room for a machine that others keep busy
    assert time.process_time() - start < 5 * torch.get_num_threads()
    assert time.perf_counter() - wall < 15
    said = capsys.readouterr().out
    once, models = tables_of(said)
    sizes = benchmark["gpu_shapes"].TINY_SIZES
    assert len(once) == 1 + len(benchmark["gpu_table"].run_rows(sizes))
    assert len(models) == 1 + len(benchmark["gpu_table"].model_rows(sizes))
    assert "not measured" in said
    assert re.search(r"skipped: about .* left|stopped at the limit", said)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_runs_at_the_limit_is_stopped(benchmark) -> None:
    timing = benchmark["gpu_timing"]

    def endless() -> None:
        with timing.Limit(0.1).kept():
            for _ in range(1000):
                with contextlib.suppress(Exception):  # as a model's own code may
                    time.sleep(0.01)

    with pytest.raises(timing.LimitReached):
        endless()


def test_times_are_planned_by_a_clock(benchmark) -> None:
    timing = benchmark["gpu_timing"]
    now = itertools.count(step=2.0)
    limit = timing.Limit(20.0, lambda: next(now))  # at 0
    assert limit.left() == 18.0
    assert limit.share(0.5).end == 6.0 + 0.5 * 16.0
    calls: list[int] = []
    assert len(timing.repeated(lambda: calls.append(1), CPU, 60.0, at_most=3)) == 3
    assert len(calls) == 4  # and a warm-up
    assert len(timing.repeated(lambda: calls.append(1), CPU, 0.0)) == 1
    assert len(calls) == 5


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--models", "olmo"], "unknown model olmo: choose among olmoe, qwen3_30b, gpt_oss_20b, dsv2_lite, or tiny"),
        (["--models", "olmoe,tiny"], "unknown model tiny"),
        (["--models", "olmoe,olmoe"], "each once"),
        (["--models", ","], "at least one model"),
        (["--seconds", "0"], "--seconds 0: give at least 1"),
        (["--seconds", "-3"], "give at least 1"),
        (["--seconds", "nan"], "give at least 1"),
        (["--seconds", "soon"], "invalid float value"),
        (["--device", "tpu"], "invalid choice"),
    ],
)
def test_mistakes_are_answered(benchmark, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        benchmark["gpu"].main(arguments)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(benchmark, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark["gpu"].main(["--device", "cuda"]) == 2
    assert "torch finds no GPU here" in capsys.readouterr().err


def test_a_part_that_fails_costs_its_own_rows_and_the_exit_status(
    benchmark, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    session, parts = benchmark["gpu_session"], benchmark["gpu_parts"]

    def fail(bench: object) -> None:
        raise RuntimeError("no such kernel")

    first = parts.PARTS[0]
    broken = parts.Part("naive routes", ("naive",), lambda bench: 0.0, fail)
    slow = parts.Part("isolation", ("isolation",), lambda bench: 1e6, fail)
    monkeypatch.setattr(session, "PARTS", (broken, first, broken, slow))
    monkeypatch.setattr(session, "measure_paper", lambda *args, **options: fail(None))
    run = session.Session(["qwen3_30b"], 120.0, CPU, tiny=True)
    run.run()
    said, (_, models) = capsys.readouterr().out, tables_of(run.tables())
    assert run.failed
    assert run.cells["paper"] == run.cells["paper_compiled"] == "failed (RuntimeError)"
    assert "naive routes skipped, as no plain pass was measured" in said
    assert "naive routes FAILED: RuntimeError: no such kernel" in said
    assert "isolation skipped: about 1000000.0 s needed" in said
    cells = {row: cell[0] for row, cell in models.items()}
    assert cells["naive, routes a second (batches of 2 or 4)"] == "failed (RuntimeError)"
    assert cells["plain bridge forward, 2 x 32"].endswith(" ms")
    assert cells["over one `run_with_hooks` of the 3 items together"] == "not measured"


def test_shapes_are_the_published_ones(benchmark) -> None:
    """As many parameters as the models are known to have; nothing is allocated."""
    for shape in benchmark["gpu_shapes"].SHAPES.values():
        config = getattr(transformers, shape.config_class)(**shape.published)
        with torch.device("meta"):
            model = getattr(transformers, shape.architecture)(config)
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(1e9 * shape.billions, rel=0.005), shape.name


def test_arithmetic_by_hand_on_a_tiny_model(benchmark) -> None:
    """OLMoE's tiny shape: 4 layers of width 64, 4 heads of 16, 8 experts of 32, two a token, 503 words."""
    bridge = benchmark["gpu_model"].build(benchmark["gpu_shapes"].SHAPES["olmoe"], CPU, torch.float32, tiny=True)
    with benchmark["gpu_parts"].attach(bridge) as moe:
        count = benchmark["gpu_model"].BranchArithmetic(moe)
        routes = torch.tensor([[[0, 1], [1, 2]], [[5, 6], [5, 7]], [[0, 1], [2, 3]]])  # [pos, route, slot]
        expert, unembedding = 2 * 3 * 64 * 32, 2 * 64 * 503
        layer = 2 * 4 * 64 * 64 + 2 * 64 * 8 + 2 * expert
        at_the_last = 2 * 3 * expert + 2 * 2 * unembedding  # three experts for each of two tokens, four branches
        assert count.of(3, [0, 1], routes) == at_the_last
        keys = 2 * (1 + 2) * 2 * 4 * (16 + 16)  # two routes of a token that reads one key, and of one that reads two
        assert count.of(1, [0, 1], routes) == at_the_last + 2 * (4 * layer + keys)
        assert count.of(3, [2], routes) == 4 * expert + 2 * unembedding


def test_arithmetic_of_sliding_windows_and_of_compressed_keys(benchmark) -> None:
    """GPT-OSS: a window of 8 in the even layers; DeepSeek-V2: the first layer is dense, queries have 16 + 8 numbers."""
    build, shapes = benchmark["gpu_model"].build, benchmark["gpu_shapes"].SHAPES
    per_key = {"gpt_oss_20b": 2 * 4 * (16 + 16), "dsv2_lite": 2 * 4 * (16 + 8 + 16)}
    more_keys = {"gpt_oss_20b": 20 - 8, "dsv2_lite": 2 * (20 - 8)}  # two layers above, of which one has a window
    for name, each in per_key.items():
        bridge = build(shapes[name], CPU, torch.float32, tiny=True)
        with benchmark["gpu_parts"].attach(bridge) as moe:
            count = benchmark["gpu_model"].BranchArithmetic(moe)
            routes = torch.tensor([[[0, 1]]]).repeat(32, 1, 1)
            assert count.of(1, [19], routes) - count.of(1, [7], routes) == each * more_keys[name], name


def test_models_are_drawn_alike_and_leave_the_global_state_alone(benchmark) -> None:
    build, shapes = benchmark["gpu_model"].build, benchmark["gpu_shapes"].SHAPES
    state = torch.random.get_rng_state()
    first, second = (build(shapes["olmoe"], CPU, torch.bfloat16, tiny=True) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32
    weights = [next(bridge.original_model.parameters()) for bridge in (first, second)]
    assert weights[0].dtype == torch.bfloat16
    assert torch.equal(*weights)
