"""Finished cells: kept whole, of one plan only, and nothing of a run that never finished one."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from moe_interp.errors import ResultError
from moe_interp.results.cells import CellStore
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
    with pytest.raises(ResultError, match=r"another run \(seed: 1 there, 0 here\).*as --no-resume does"):
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
