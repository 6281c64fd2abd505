"""The main job from the command line: the demo, a model and items given by path, an interruption, refusals."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
from typer.testing import CliRunner

import moe_interp as mi
from moe_interp.cli.application import cli
from moe_interp.errors import MoEInterpError, ResultError
from moe_interp.experiments.isolation import experiment
from moe_interp.plots import FIGURES as FIGURES_OF
from moe_interp.testbed.demo import load_demo_assets

runner = CliRunner(env={"COLUMNS": "100", "HF_HUB_OFFLINE": "1"})
FIGURES = ("specialization", "calibration", "dominance", "layer_impact", "sorted_p")
ROUTE_FIGURES = ("confidence", "regret_curve", "layer_regret")
OTHERS = (*FIGURES_OF["atlas"], *FIGURES_OF["geometry"])


def items_file(folder: Path, n: int = 8) -> Path:
    path = folder / "items.jsonl"
    chosen = [item for name in ("facts", "puzzles") for item in load_demo_assets().items[name][:n]]
    path.write_text("".join(item.to_json() + "\n" for item in chosen), encoding="utf-8")
    return path


def test_demo_writes_a_page_that_needs_nothing_else(tmp_path: Path) -> None:
    done = runner.invoke(cli, ["demo", "--first", "8", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    stages = ("loading the model", "recording routes", "measuring the geometry of routing", "isolating experts")
    for stage in (*stages, "replacing the router", "scoring counterfactual routes", "statistics and figures"):
        assert f"{stage}: " in done.output
    assert "The published pattern" in done.output
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "Phi-mini-MoE" in page
    assert page.count("<svg") == len(FIGURES) + 1 + len(ROUTE_FIGURES) + len(OTHERS)
    for title in ("One prompt, token by token", "Atlas of routing", "The geometry of routing", "Counterfactual routes"):
        assert f">{title}</a>" in page  # in the contents
        assert f">{title}</h2>" in page
    assert "expert 2: weight" in page
    assert "Regret in nats" in page
    assert 'src="http' not in page
    for name in (*FIGURES, *ROUTE_FIGURES, *OTHERS):
        assert (tmp_path / "figures" / f"{name}.svg").stat().st_size > 1000
    result = mi.load_result(tmp_path / "isolation.nc")
    assert isinstance(result, mi.IsolationResult)
    assert result.data.sizes["item"] == 32
    assert result.data.attrs["model"] == "demo"
    assert mi.load_result(tmp_path / "atlas.nc").data.attrs["n_sequences"] == 32
    assert mi.load_result(tmp_path / "geometry.nc").data.attrs["model"] == "demo"
    routes = mi.load_result(tmp_path / "counterfactual.nc")
    assert isinstance(routes, mi.CounterfactualResult)
    assert len(set(routes.data["sequence"].values)) == 32
    assert str(tmp_path) not in page


def test_isolate_takes_paths_and_goes_on_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["isolate", "--model", str(load_demo_assets().model_path), "--items", str(items_file(tmp_path))]
    arguments += ["--layers", "0,-1", "--experts", "0,3,2+5", "--out", str(tmp_path / "out")]
    honest = experiment.isolate_experts

    def interrupted(*given: object, **options: object) -> object:
        def stop(done: int, total: int) -> None:
            if done == 1:
                raise KeyboardInterrupt

        return honest(*given, **{**options, "progress": stop})  # type: ignore[arg-type]

    monkeypatch.setattr(experiment, "isolate_experts", interrupted)
    assert runner.invoke(cli, arguments).exit_code != 0
    cells = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out" / "cells").glob("*.npz")}
    assert len(cells) == 1
    monkeypatch.setattr(experiment, "isolate_experts", honest)
    done = runner.invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    kept = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out" / "cells").glob("*.npz")}
    assert len(kept) == 2
    assert cells.items() <= kept.items()  # the finished cell was not computed again
    result = mi.load_result(tmp_path / "out" / "isolation.nc")
    assert list(result.data.expert.values) == ["0", "3", "2+5"]
    assert list(result.data.layer.values) == [0, 3]
    assert "smallest attainable p" in done.output  # said before the run


def refused(tmp_path: Path, *arguments: str, items: Path | None = None) -> MoEInterpError:
    """The error of ``moe-interp isolate`` on the demo model; nothing may have been written."""
    given = ["--items", str(items or items_file(tmp_path)), "--out", str(tmp_path / "out"), *arguments]
    done = runner.invoke(cli, ["isolate", "--model", "demo", "--layers", "3", "--experts", "0,1,2", *given])
    assert isinstance(done.exception, MoEInterpError), done.exception
    assert not (tmp_path / "out").exists()
    return done.exception


def test_errors_name_the_item_and_its_line(tmp_path: Path) -> None:
    path = items_file(tmp_path)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def with_third(**change: object) -> Path:
        changed = [*lines[:2], {**lines[2], **change}, *lines[3:]]
        path.write_text("\n".join(map(json.dumps, changed)), encoding="utf-8")
        return path

    name = lines[2]["id"]
    for change, text in (
        ({"answer": ""}, f"line 3 (item '{name}'): no answer"),
        ({"answer": 7}, f"line 3 (item '{name}'): answer 7 of type int"),
        ({"answer": [5, 10**6]}, f"item '{name}' (items.jsonl, line 3): token id 1000000"),
        ({"prompt": "word " * 600}, f"item '{name}' (items.jsonl, line 3): "),
        ({"id": lines[0]["id"]}, f"item '{lines[0]['id']}' (items.jsonl, line 3)"),
    ):
        assert text in str(refused(tmp_path, items=with_third(**change)))


def test_options_out_of_range_are_refused(tmp_path: Path) -> None:
    for arguments, text in (
        (["--items", "none.jsonl"], "--items none.jsonl, which is not a file"),
        (["--domains", "facts,biology"], "domain 'biology'. Expected: domains among ['facts', 'puzzles']"),
        (["--per-domain", "0"], "--first 0"),
        (["--layers", "9"], "layer 9"),
        (["--experts", "99"], "expert id 99"),
        (["--experts", "a"], "--experts a"),
        (["--mode", "both"], "--mode both"),
        (["--random-draws", "0"], "--random-draws 0"),
        (["--memory", "0.00001"], "a memory budget of 0.010 MiB"),
    ):
        assert text in str(refused(tmp_path, *arguments))


def test_too_few_items_of_one_domain_are_said_so_before_and_after(tmp_path: Path) -> None:
    arguments = ["isolate", "--model", "demo", "--items", str(items_file(tmp_path)), "--layers", "3", "--seed", "1"]
    arguments += ["--experts", "0,1,2", "--per-domain", "4", "--domains", " facts", "--out", str(tmp_path)]
    done = runner.invoke(cli, [*arguments, "--random-draws", "1"])
    assert done.exit_code == 0, (done.output, done.exception)
    said = " ".join(done.output.split())
    assert said.count("Too few items for any test at 0.05, at least 6 are needed: facts.") == 2
    assert "Without the figure sorted_p: no domain with enough items" in said
    assert "the single domain 'facts'" in said
    assert (tmp_path / "index.html").is_file()


def test_a_full_disk_at_the_end_keeps_the_cells_and_the_earlier_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    arguments = ["isolate", "--model", "demo", "--items", str(items_file(tmp_path)), "--out", str(out)]
    arguments += ["--layers", "3", "--experts", "0,1,2", "--random-draws", "1"]
    assert runner.invoke(cli, arguments).exit_code == 0
    earlier = (out / "isolation.nc").read_bytes()
    cells = {file: file.stat().st_mtime_ns for file in (out / "cells").glob("*.npz")}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        done = runner.invoke(cli, arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert isinstance(done.exception, ResultError)
    assert "The earlier file of that name is unchanged" in str(done.exception)
    assert (out / "isolation.nc").read_bytes() == earlier
    assert {file: file.stat().st_mtime_ns for file in (out / "cells").glob("*.npz")} == cells
    assert not list(out.glob(".*"))


def test_results_of_another_version_are_refused_with_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moe, items = mi.load_demo()
    few = [item for name in ("facts", "puzzles") for item in items[name][:2]]
    result = mi.isolate_experts(moe, few, layers=[3], experts=[0, 1], baselines=["natural"], progress=False)
    monkeypatch.setattr(mi.IsolationResult, "version", mi.IsolationResult.version + 1)
    newer = mi.IsolationResult(result.data).save(tmp_path / "newer.nc")
    monkeypatch.undo()
    with pytest.raises(ResultError, match=r"schema 2\.2\. Expected: schema 2\.1 of kind 'isolation'"):
        mi.load_result(newer)


def test_real_items_run_on_a_model_given_by_path(tmp_path: Path, shared_data: Path) -> None:
    files = [shared_data / "eval" / name for name in ("math_svamp.jsonl", "mmlu_general_knowledge.jsonl")]
    short = []
    for file in files:
        items = sorted(mi.load_items(file), key=lambda item: len(item.prompt))[:8]
        short += [{"id": i.id, "domain": i.domain, "prompt": i.prompt, "answer": " " + str(i.answer)} for i in items]
    path = tmp_path / "items.jsonl"
    path.write_text("\n".join(map(json.dumps, short)), encoding="utf-8")
    arguments = ["isolate", "--model", str(load_demo_assets().model_path), "--items", str(path), "--layers", "3"]
    done = runner.invoke(cli, [*arguments, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    result = mi.load_result(tmp_path / "out" / "isolation.nc")
    assert set(result.data.domain.values) == {"math", "general_knowledge"}
