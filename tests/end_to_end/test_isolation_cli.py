"""The main job from the command line: the demo, a model and items given by path, an interruption, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import moe_interp as mi
from moe_interp.cli import isolate as isolate_command
from moe_interp.cli.main import cli
from moe_interp.errors import DataError, MoEInterpError
from moe_interp.testbed.demo import load_demo_assets

runner = CliRunner(env={"COLUMNS": "100", "HF_HUB_OFFLINE": "1"})
FIGURES = ("specialization", "calibration", "dominance", "layer_impact", "sorted_p")


def items_file(folder: Path, n: int = 8) -> Path:
    path = folder / "items.jsonl"
    chosen = [item for name in ("facts", "puzzles") for item in load_demo_assets().items[name][:n]]
    path.write_text("".join(item.to_json() + "\n" for item in chosen), encoding="utf-8")
    return path


def test_demo_writes_a_page_that_needs_nothing_else(tmp_path: Path) -> None:
    done = runner.invoke(cli, ["demo", "--per-domain", "8", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    for stage in ("loading the model", "isolating experts", "replacing the router", "statistics and figures"):
        assert f"{stage}: " in done.output
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "Phi-mini-MoE" in page
    assert "<svg" in page
    assert 'src="http' not in page
    for name in FIGURES:
        assert (tmp_path / "figures" / f"{name}.svg").stat().st_size > 1000
    result = mi.load_result(tmp_path / "isolation.nc")
    assert isinstance(result, mi.IsolationResult)
    assert result.data.sizes["item"] == 32
    assert result.data.attrs["model"] == "demo"
    assert str(tmp_path) not in page


def test_isolate_takes_paths_and_goes_on_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["isolate", "--model", str(load_demo_assets().model_path), "--items", str(items_file(tmp_path))]
    arguments += ["--layers", "0,-1", "--experts", "0,3,2+5", "--out", str(tmp_path / "out")]
    honest = isolate_command.isolate_experts

    def interrupted(*given: object, **options: object) -> object:
        def stop(done: int, total: int) -> None:
            if done == 1:
                raise KeyboardInterrupt

        return honest(*given, **{**options, "progress": stop})  # type: ignore[arg-type]

    monkeypatch.setattr(isolate_command, "isolate_experts", interrupted)
    assert runner.invoke(cli, arguments).exit_code != 0
    cells = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out" / "cells").glob("*.npz")}
    assert len(cells) == 1
    monkeypatch.setattr(isolate_command, "isolate_experts", honest)
    done = runner.invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    kept = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out" / "cells").glob("*.npz")}
    assert len(kept) == 2
    assert cells.items() <= kept.items()  # the finished cell was not computed again
    result = mi.load_result(tmp_path / "out" / "isolation.nc")
    assert list(result.data.expert.values) == ["0", "3", "2+5"]
    assert list(result.data.layer.values) == [0, 3]
    assert "smallest attainable p" in done.output  # said before the run


def test_errors_name_the_item_and_its_line(tmp_path: Path) -> None:
    path = items_file(tmp_path)
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[2] = json.dumps({**json.loads(lines[2]), "answer": ""})
    path.write_text("\n".join(lines), encoding="utf-8")
    done = runner.invoke(cli, ["isolate", "--model", "demo", "--items", str(path), "--out", str(tmp_path / "out")])
    assert isinstance(done.exception, DataError)
    assert "line 3" in str(done.exception)
    missing = runner.invoke(cli, ["isolate", "--model", "demo", "--items", "none.jsonl", "--out", str(tmp_path)])
    assert isinstance(missing.exception, MoEInterpError)
    assert "none.jsonl" in str(missing.exception)


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
