"""Finished cells: kept whole, of one plan only, and nothing of a run that never finished one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from moe_interp.errors import ResultError
from moe_interp.results.cells import CellFolder, CellStore, DamagedCellWarning
from moe_interp.results.files import replacing

PLAN = {"model": "planted", "seed": 0, "batches": [[0, 2], [1]]}


def planted(path: Path, **changes: object) -> CellStore:
    return CellStore(path, PLAN | changes)


def test_a_run_without_a_finished_cell_leaves_nothing_behind(tmp_path: Path) -> None:
    store = planted(tmp_path / "cells")
    assert not store.path.exists()
    planted(tmp_path / "cells", seed=1).save({"a": np.arange(3)}, 0, 1)
    assert sorted(os.listdir(store.path)) == ["0-1.npz", "plan.json"]
    assert CellStore.finished(store.path) == 1
    assert CellStore.batches_of(store.path, 3) == PLAN["batches"]
    assert CellStore.batches_of(store.path, 4) is None
    with pytest.raises(ResultError, match=r"another run \(seed=1 there, 0 here\).*as --no-resume does"):
        planted(store.path)
    np.testing.assert_array_equal(planted(store.path, seed=1).load(0, 1)["a"], np.arange(3))


@pytest.mark.parametrize("plan", [None, b"", b"[1]", b"\xff", b'"text"'])
def test_cells_of_no_known_plan_are_refused(tmp_path: Path, plan: bytes | None) -> None:
    planted(tmp_path).save({"a": np.arange(3)}, 0)
    (tmp_path / "plan.json").unlink()
    if plan is not None:
        (tmp_path / "plan.json").write_bytes(plan)
    with pytest.raises(ResultError, match=r"its plan cannot be read|without a plan"):
        planted(tmp_path)
    assert CellStore.batches_of(tmp_path, 3) is None


def test_clearing_takes_away_cells_and_plan_only(tmp_path: Path) -> None:
    planted(tmp_path).save({"a": np.arange(3)}, 0)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "sub.npz").mkdir()
    (tmp_path / ".1.npz.1234.part").write_text("cut off")
    CellStore.clear(tmp_path)
    CellStore.clear(tmp_path / "absent")
    assert sorted(os.listdir(tmp_path)) == ["notes.txt", "sub.npz"]


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (file := tmp_path / "cells").write_text("mine")
    for place in (file, file / "below", file / "far" / "below"):
        for use in (planted, CellStore.clear):
            with pytest.raises(ResultError, match=rf"'{file}' is a file\. Expected: a folder .*Choose another folder"):
                use(place)
    with pytest.raises(ResultError, match=rf"could not be written: '{file}' is a file"), replacing(file / "x"):
        pass
    assert file.read_text() == "mine"


def test_what_could_not_be_written_is_said_also_when_its_remains_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise PermissionError(1, "not permitted")

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(ResultError, match=r"'.*x' could not be written: not permitted"), replacing(tmp_path / "x"):
        pass
    (tmp_path / "0.npz").write_bytes(b"")
    with pytest.raises(ResultError, match="could not be cleared: not permitted"):
        CellStore.clear(tmp_path)


def test_two_runs_that_begin_in_one_folder_are_not_mixed(tmp_path: Path) -> None:
    first, second = planted(tmp_path), planted(tmp_path, seed=1)
    first.save({"a": np.arange(3)}, 0, 1)
    with pytest.raises(ResultError, match="seed=0 there, 1 here"):
        second.save({"a": np.arange(4)}, 0, 2)
    assert sorted(os.listdir(tmp_path)) == ["0-1.npz", "plan.json"]


@pytest.mark.parametrize(
    "damage", ["cut", "changed", "renamed", "another run's", "a folder", "a pipe", "a loop", "old"]
)
def test_a_cell_that_is_damaged_or_of_elsewhere_is_to_do_again_and_that_is_said(tmp_path: Path, damage: str) -> None:
    store = planted(tmp_path / "cells")
    store.save({"a": np.arange(300)}, 0, 1)
    cell = store.path / "0-1.npz"
    content = cell.read_bytes()
    (other := planted(tmp_path / "other", seed=1)).save({"a": np.arange(300)}, 0, 1)
    store.save({"a": np.arange(300) + 1}, 0, 2)
    cell.unlink()
    made = {
        "cut": lambda: cell.write_bytes(content[:400]),
        "changed": lambda: cell.write_bytes(content[:400] + b"?" + content[401:]),
        "renamed": lambda: (store.path / "0-2.npz").rename(cell),
        "another run's": lambda: (other.path / "0-1.npz").rename(cell),
        "a folder": cell.mkdir,
        "a pipe": lambda: os.mkfifo(cell),
        "a loop": lambda: cell.symlink_to(cell),
        "old": lambda: np.savez(cell, a=np.arange(300)),
    }
    made[damage]()
    with pytest.warns(DamagedCellWarning, match=r"The cell 0-1\.npz is computed again: "):
        assert planted(tmp_path / "cells").load(0, 1) is None
    if damage != "a folder":
        store.save({"a": np.arange(300)}, 0, 1)
        np.testing.assert_array_equal(planted(tmp_path / "cells").load(0, 1)["a"], np.arange(300))


def test_other_batches_in_a_plan_do_not_move_cells(tmp_path: Path) -> None:
    """Batches say which things a cell is of: a plan with others would label them wrongly."""
    planted(tmp_path).save({"a": np.arange(3)}, 0, 1)
    plan = tmp_path / "plan.json"
    content = json.loads(plan.read_text())
    content["plan"]["batches"] = [[0, 1], [2]]
    plan.write_text(json.dumps(content))
    assert CellStore.batches_of(tmp_path, 3) is None
    with pytest.raises(ResultError, match="its plan cannot be read"):
        planted(tmp_path)


def test_a_difference_is_named_as_the_option_it_was_given_by(tmp_path: Path) -> None:
    plan = {
        "items": {"count": 240, "checksum": "a"},
        "n_routes": 32,
        "model.weights": {"checksum": "w"},
        "batches": [[0]],
    }
    options = {"--items": ("items", ["x.jsonl"]), "--per-domain": ("items", 60), "--routes": ("n_routes", 32)}
    CellStore(CellFolder(tmp_path, options), plan).save({"a": np.arange(3)}, 0, 1)

    def refusal(options: dict[str, tuple[str, object]], **changes: object) -> str:
        with pytest.raises(ResultError) as caught:
            CellStore(CellFolder(tmp_path, options), plan | changes)
        return str(caught.value).partition("another run (")[2].partition("). Expected")[0]

    fewer = {"items": {"count": 80, "checksum": "b"}}
    assert refusal(options | {"--per-domain": ("items", 20)}, **fewer) == "--per-domain 60 there, 20 here"
    assert refusal(options | {"--per-domain": ("items", None)}, **fewer) == "--per-domain 60 there, not given here"
    assert refusal({}, **fewer) == "items: 240 there, 80 here"
    assert refusal({}, n_routes=16) == "n_routes=32 there, 16 here"
    assert refusal(options | {"--routes": ("n_routes", 16)}, n_routes=16) == "--routes 32 there, 16 here"
    # the file holds others than before, under the same options
    said = refusal(options, items={"count": 240, "checksum": "b"})
    assert said == "items: other content (set by --items, --per-domain)"
    assert refusal({}, **{"model.weights": {"checksum": "v"}}) == "the model's weights: other content"
    assert refusal({}, batches=[[0], [1]]) == "memory_budget: other batches"
    assert refusal({}, **fewer, batches=[[0], [1]]) == "items: 240 there, 80 here"
    assert refusal({}, layers=list(range(99))) == "layers: not known there"
    # options that make no difference to the plan are not named, and what is refused is on nobody's command line
    CellStore(CellFolder(tmp_path, options | {"--items": ("items", ["y.jsonl"])}), plan)
