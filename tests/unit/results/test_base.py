"""A result round-trips whole, refuses what is not its own, and never loses an earlier file."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import xarray as xr

import moe_interp
from moe_interp.errors import ResultError
from moe_interp.results import Result, checksum, load_result
from moe_interp.results import base as base_module
from moe_interp.results.content import content_checksum


class PlantedResult(Result, kind="planted"):
    main = "delta"


def planted_data(seed: int = 0) -> xr.Dataset:
    rng = np.random.default_rng(seed)
    delta = rng.normal(size=(3, 2, 4))
    delta[0, 0, 0] = np.nan
    return xr.Dataset(
        {
            "delta": (("item", "layer", "expert"), delta, {"units": "seconds"}),
            "slot_share": (("layer", "expert"), rng.random((2, 4), dtype=np.float32)),
            "correct": (("item",), np.array([True, False, True])),
            "total": 3,
        },
        coords={"item": ["a", "b", "ü"], "layer": [1, 5], "domain": ("item", ["math", "law", "math"])},
        attrs={"options": {"mass": ["one", "natural"]}, "memory_budget": None, "paired": True},
    )


def planted(seed: int = 0) -> PlantedResult:
    return PlantedResult(planted_data(seed), config={"tau": np.float32(0.5)}, seeds=7, data_checksum=checksum(["a"]))


def test_a_saved_result_comes_back_with_values_labels_class_and_manifest(tmp_path):
    result = planted()
    path = result.save(tmp_path / "new" / "run.nc")
    loaded = load_result(path)
    assert type(loaded) is PlantedResult
    xr.testing.assert_identical(loaded.data.drop_encoding(), result.data)
    assert loaded.data["correct"].dtype == bool
    assert loaded.manifest.seeds == {"seed": 7}
    assert loaded.manifest.config == {"tau": 0.5} == result.manifest.config
    assert loaded.manifest.data_checksum == checksum(["a"])
    assert loaded.manifest.versions["numpy"] == np.__version__
    assert loaded.manifest.moe_interp == moe_interp.__version__
    loaded.save(path)  # nothing still holds the file open, and a loaded result keeps its origin
    assert load_result(path).manifest == loaded.manifest


def test_the_manifest_is_readable_without_this_package(tmp_path):
    path = planted().save(tmp_path / "run.nc")
    with xr.open_dataset(path, engine="h5netcdf", decode_timedelta=False) as opened:
        manifest = json.loads(opened.attrs["moe_interp_manifest"])
    assert {"kind", "moe_interp", "versions", "git_hash", "config", "seeds", "data_checksum"} <= set(manifest)


def test_the_git_hash_is_that_of_the_checkout():
    root = Path(moe_interp.__file__).parents[1]
    if not (root / ".git").exists():
        pytest.skip("the package does not run from a checkout")
    head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert planted().manifest.git_hash.removesuffix("-dirty") == head.stdout.strip()


def test_a_folder_gets_one_named_file_and_is_enough_to_load_it(tmp_path):
    assert planted().save(tmp_path) == tmp_path / "planted.nc"
    assert load_result(tmp_path).kind == "planted"
    planted().save(tmp_path / "second.nc")
    with pytest.raises(ResultError, match=r"planted\.nc, second\.nc"):
        load_result(tmp_path)


def test_the_frame_holds_the_main_variable_and_what_lies_on_its_axes():
    result = planted()
    frame = result.to_dataframe()
    assert len(frame) == 24
    assert {"item", "layer", "expert", "domain", "delta", "slot_share", "correct"} <= set(frame)
    row = frame[(frame["item"] == "b") & (frame["layer"] == 5) & (frame["expert"] == 3)].iloc[0]
    assert row["delta"] == result.data["delta"].sel(item="b", layer=5).values[3]
    assert row["domain"] == "law"
    assert len(result.to_dataframe("slot_share")) == 8
    assert result.to_dataframe("total")["total"].tolist() == [3]
    with pytest.raises(ResultError, match=r"Variable 'rho'\. Expected: delta, slot_share"):
        result.to_dataframe("rho")


def test_routes_are_text_in_the_frame(monkeypatch):
    route = np.array([[[3, 0], [1, 2]], [[0, 1], [-1, -1]]])[:, None]
    data = xr.Dataset(
        {
            "route": (("token", "layer", "route", "slot"), route),
            "logp": (("token", "layer", "route"), np.arange(4.0).reshape(2, 1, 2)),
            "standard_route": (("token", "layer", "slot"), np.array([[[7, 5]], [[6, -1]]])),
            "entropy": ("token", [0.5, 0.25]),
        },
        coords={"layer": [9], "sequence": ("token", ["a", "b"])},
    )
    result = Result(data)
    frame = result.to_dataframe("route")
    assert frame["experts"].tolist() == ["3 0", "1 2", "0 1", ""]
    assert frame["route"].tolist() == [0, 1, 0, 1]
    assert frame["sequence"].tolist() == ["a", "a", "b", "b"]
    assert result.to_dataframe("standard_route")["standard_route"].tolist() == ["7 5", "6"]
    monkeypatch.setattr(Result, "main", "logp")
    whole = result.to_dataframe()
    assert whole["logp"].tolist() == [0, 1, 2, 3]
    assert whole["experts"].tolist() == frame["experts"].tolist()
    assert whole["standard_route"].tolist() == ["7 5", "7 5", "6", "6"]
    with pytest.raises(ResultError, match="route"):
        result.to_dataframe("experts")


@pytest.mark.parametrize("name", ["run.csv", "run.json", "run.nc.gz"])
def test_a_name_of_another_format_is_refused(tmp_path, name):
    with pytest.raises(ResultError, match=r"a name that ends in \.nc.*to_dataframe\(\)\.to_csv"):
        planted().save(tmp_path / name)
    assert not list(tmp_path.iterdir())
    assert load_result(planted().save(tmp_path / "run")).kind == "planted"


def test_the_summary_names_kind_axes_and_version():
    text = planted().summary()
    assert "planted" in text
    assert "3 item, 2 layer, 4 expert" in text
    assert moe_interp.__version__ in text


def test_a_file_of_another_schema_is_refused_with_both_versions(tmp_path, monkeypatch):
    monkeypatch.setattr(moe_interp, "__version__", "9.9.0")
    monkeypatch.setattr(PlantedResult, "version", 2)
    path = planted().save(tmp_path / "run.nc")
    monkeypatch.undo()
    with pytest.raises(ResultError, match=r"written by moe_interp 9\.9\.0 with schema 2\.2\. Expected: schema 2\.1.*"):
        load_result(path)


def test_another_or_an_unknown_kind_is_refused(tmp_path, monkeypatch):
    path = Result(planted_data()).save(tmp_path / "plain.nc")
    assert type(load_result(path)) is Result
    with pytest.raises(ResultError, match=r"kind 'dataset'\. Expected: kind 'planted'"):
        PlantedResult.load(path)
    path = planted().save(tmp_path / "run.nc")
    monkeypatch.delitem(Result.registry, "planted")
    with pytest.raises(ResultError, match="Import the module that defines this kind"):
        load_result(path)


def test_a_kind_that_is_not_imported_yet_is_found_by_its_home(tmp_path, monkeypatch):
    (tmp_path / "planted_home.py").write_text(
        "from moe_interp.results import Result\nclass Far(Result, kind='far'): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(moe_interp.RESULT_KINDS, "far", "planted_home")
    result = Result(planted_data())
    monkeypatch.setattr(Result, "kind", "far")
    path = Result(result.data).save(tmp_path / "far.nc")
    monkeypatch.setattr(Result, "kind", "dataset")
    assert type(load_result(path)).__name__ == "Far"
    monkeypatch.delitem(Result.registry, "far")


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "text", "other netCDF"])
def test_what_is_not_a_whole_result_file_is_refused(tmp_path, damage):
    path = planted().save(tmp_path / "run.nc")
    content = path.read_bytes()
    path.unlink()
    if damage == "other netCDF":
        xr.Dataset({"a": 1}).to_netcdf(path, engine="h5netcdf")
    elif damage != "missing":
        path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "text": b"[1, 2]"}[damage])
    with pytest.raises(ResultError, match="does not exist" if damage == "missing" else "cannot be read as a result"):
        load_result(path)


CHANGES = {
    "a value": lambda data: data["delta"].values.__setitem__((1, 1, 1), 0.5),
    "an attribute": lambda data: data.attrs.update(paired=False),
    "a nested attribute": lambda data: data.attrs["options"]["mass"].append("two"),
    "an attribute taken away": lambda data: data.attrs.pop("memory_budget"),
    "a variable's attribute": lambda data: data["delta"].attrs.update(units="hours"),
    "a label": lambda data: data.assign_coords(layer=[1, 6]),
    "a label beside an axis": lambda data: data.assign_coords(domain=("item", ["math", "law", "law"])),
    "a name": lambda data: data.rename(slot_share="share"),
    "an axis' name": lambda data: data.rename(expert="specialist"),
    "the order of axes": lambda data: data.transpose("layer", "item", "expert"),
    "the number format": lambda data: data.assign(slot_share=data["slot_share"].astype("float64")),
    "a variable's role": lambda data: data.set_coords("total"),
    "a variable more": lambda data: data.assign(more=1),
    "a variable less": lambda data: data.drop_vars("total"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_numbers_labels_or_attributes_is_noticed_even_with_a_right_checksum_of_the_file(
    tmp_path, monkeypatch, change
):
    path = planted().save(tmp_path / "run.nc")
    assert load_result(path).manifest.content_checksum == content_checksum(planted_data())
    kept = content_checksum(planted_data())
    changed = planted_data()
    made = CHANGES[change](changed)
    changed = made if isinstance(made, xr.Dataset) else changed
    monkeypatch.setattr(base_module, "content_checksum", lambda data: kept)
    PlantedResult(changed).save(path)
    monkeypatch.undo()
    with pytest.raises(ResultError, match="does not hold the numbers, labels and attributes that were saved"):
        load_result(path)


def test_a_file_that_another_program_changed_is_refused(tmp_path):
    path = planted().save(tmp_path / "run.nc")
    with xr.open_dataset(path, engine="h5netcdf", decode_timedelta=False) as opened:
        changed = opened.load()
    changed.attrs["note"] = "mine"
    changed.to_netcdf(path, engine="h5netcdf")
    with pytest.raises(ResultError, match=r"no checksum where one belongs.*Restore it from a copy, or run"):
        load_result(path)


def test_other_programs_read_the_file_as_before(tmp_path):
    path = planted().save(tmp_path / "run.nc")
    with xr.open_dataset(path, engine="h5netcdf", decode_timedelta=False) as opened:
        np.testing.assert_array_equal(opened["delta"].values, planted_data()["delta"].values)
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["delta"][:], planted_data()["delta"].values)


@pytest.mark.parametrize("text", ["a\0b", "half \ud800"])
def test_a_text_that_netcdf_cannot_hold_is_refused_before_anything_is_written(tmp_path, text):
    path = planted().save(tmp_path / "run.nc")
    with pytest.raises(ResultError, match=r"the text '.*' in 'domain'.*Rename it"):
        PlantedResult(planted_data().assign_coords(domain=("item", np.array(["a", "b", text])))).save(path)
    assert load_result(path).data["item"].values.tolist() == ["a", "b", "ü"]


def test_numpy_seeds_are_seeds():
    assert Result(planted_data(), seeds=np.int64(3)).manifest.seeds == {"seed": 3}


def test_a_full_disk_leaves_the_earlier_file_and_no_remains(tmp_path):
    path = planted(seed=0).save(tmp_path / "run.nc")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(ResultError, match=r"could not be written: .*The earlier file of that name is unchanged"):
            planted(seed=1).save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    xr.testing.assert_equal(load_result(path).data, planted_data(0))
    assert os.listdir(tmp_path) == ["run.nc"]


def test_an_interruption_leaves_the_earlier_file_and_no_remains(tmp_path, monkeypatch):
    path = planted(seed=0).save(tmp_path / "run.nc")

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        planted(seed=1).save(path)
    monkeypatch.undo()
    xr.testing.assert_equal(load_result(path).data, planted_data(0))
    assert os.listdir(tmp_path) == ["run.nc"]


def test_an_option_without_a_json_form_is_refused():
    with pytest.raises(ResultError, match="A value of type object in a manifest"):
        Result(planted_data(), config={"sampler": object()})


def test_the_checksum_depends_on_records_and_their_order_only():
    assert checksum([{"a": 1, "b": [2]}]) == checksum([{"b": [2], "a": 1}])
    assert checksum(["a", "b"]) != checksum(["b", "a"])
    assert checksum(["ab", "c"]) != checksum(["a", "bc"])
    assert checksum([np.array([1, 2])]) == checksum([[1, 2]])


def test_importing_the_package_does_not_import_xarray():
    code = "import sys, moe_interp; assert 'xarray' not in sys.modules and 'moe_interp.results' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
