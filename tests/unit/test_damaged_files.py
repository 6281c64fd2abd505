"""Files that were damaged, or are no files: every reader refuses them in the project's words, quickly, within memory.

Most mutations are found by the checksum. Where a checksum can be made anew, some are given a right one, so that what
comes after it is tried as well; these are read in a process of their own, since libraries in C may hang or abort.
"""

from __future__ import annotations

import base64
import json
import multiprocessing
import os
import random
import resource
import time
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from moe_interp.disk import LARGEST_JSON, parse_json, read_bytes
from moe_interp.errors import DataError, MoEInterpError, ResultError
from moe_interp.experiments.inputs.items import load_items
from moe_interp.experiments.inputs.sequence_texts import load_sequences
from moe_interp.results import Manifest, Result, load_result
from moe_interp.results.cells import CellStore, DamagedCellWarning
from moe_interp.results.npz import npz_arrays, npz_bytes
from moe_interp.results.seals import LENGTH, is_sealed, sealed, sealed_zip
from moe_interp.testbed.config import TestbedConfig
from moe_interp.testbed.demo import load_demo_assets, write_checksums
from moe_interp.testbed.domains.domain import read_items
from moe_interp.testbed.training.run_folder import RunFolder
from moe_interp.testbed.training.trainer import read_state
from moe_interp.traces import RoutingTrace

N = 2000
N_RESEALED = 150
SECONDS = 1.0  # of the reader's thread, for any file
PATIENCE = 120  # of the clock, on which a reader that hangs is found, however busy the machine is
PLAN = {"model": "planted", "n_routes": 3, "batches": [[0, 1], [2]]}
Reader = Callable[[Path], Any]


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Bits flipped, bytes set, spans cut, copied or inserted, the end cut off; one to eight of them."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        kind, at = rng.randrange(7), rng.randrange(max(1, len(data)))
        if not data:
            break
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.choice((0, 255, 127, 128, 34, 91, 123))
        elif kind == 2:
            del data[at : at + rng.randrange(1, 64)]
        elif kind == 3:
            data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 16)))
        elif kind == 4:
            start = rng.randrange(len(data))
            data[at : at + 8] = data[start : start + 8]
        elif kind == 5:
            data[at:at] = rng.choice((b"9" * 400, b"[" * 5000, b"1e999", b"NaN", b"\xff\xfe", b"\\ud800", b"\0" * 64))
        else:
            del data[at:]
    return bytes(data)


def is_too_slow(read: Callable[[], Any]) -> bool:
    """Whether reading takes too long three times in a row: what only happens beside a reading, such as a collection of
    the worker's garbage, does not come back with the same file."""
    for _ in range(3):
        begin = time.thread_time()
        with suppress(MoEInterpError):
            read()
        if time.thread_time() - begin < SECONDS:
            return False
    return True


# --- one small file of each kind, and its reader --------------------------------------------------------------


def a_result(folder: Path) -> Path:
    data = xr.Dataset(
        {"delta": (("item", "layer"), np.arange(6.0).reshape(3, 2)), "n": 3},
        coords={"item": ["a", "b", "ü"], "domain": ("item", ["x", "y", "x"])},
        attrs={"options": {"mass": ["one"]}},
    )
    return Result(data, config={"tau": 0.5}).save(folder / "result.nc")


def a_trace(folder: Path, suffix: str) -> Path:
    indices = np.tile(np.arange(3), (7, 2, 1))
    trace = RoutingTrace.from_arrays(indices, indices / 4, [3, 4], 5, [1, 4], ["math", "§"], np.arange(7))
    return trace.save(folder / f"trace.{suffix}")


IDS = np.random.default_rng(0).random((7, 2, 5)).argsort(axis=2)[..., :3]


def a_vllm_array(folder: Path) -> Path:
    np.save(folder / "rows.npy", IDS.astype(np.uint8))
    return folder / "rows.npy"


def some_responses(folder: Path) -> Path:
    choice = {"routed_experts": base64.b64encode(a_vllm_array(folder).read_bytes()).decode()}
    line = json.dumps({"usage": {"prompt_tokens": 5, "completion_tokens": 3}, "choices": [choice]})
    (folder / "responses.jsonl").write_text(f"{line}\n{line}\n")
    return folder / "responses.jsonl"


def a_sglang_text(folder: Path) -> Path:
    (folder / "rows.txt").write_bytes(base64.b64encode(IDS.astype("<i4").tobytes()))
    return folder / "rows.txt"


def an_esft_log(folder: Path) -> Path:
    for layer in (1, 2):
        ids, weights = IDS[:, layer - 1].ravel(), np.full(21, 0.25)
        text = "\t".join(map(str, ids)) + "\t\t" + "\t".join(map(str, weights)) + "\n"
        (folder / f"expert_weights_{layer}.txt").write_text(text * 3)
    return folder / "expert_weights_2.txt"


def a_megatron_trace(folder: Path) -> Path:
    line = {"step": 0, "block": "decoder", "rank": 0, "num_tokens": 7, "topk": 3, "logit_bytes": 70}
    line["logit_shape"] = [7, 5]
    lines = [
        line | {"layer": layer, "top_indices": IDS[:, layer].tolist(), "logit_offset": 70 * layer} for layer in (0, 1)
    ]
    (folder / "router_trace_rank0.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "logits_rank0.bin").write_bytes(bytes(140))
    return folder / "router_trace_rank0.jsonl"


def router_logits(folder: Path) -> Path:
    np.savez(folder / "logits.npz", *np.random.default_rng(0).normal(size=(2, 7, 5)))
    return folder / "logits.npz"


def read_as(format: str, path: Path, **options: Any) -> RoutingTrace:
    return RoutingTrace.read(path, format, 5, **options)


def a_cell(folder: Path) -> Path:
    CellStore(folder, PLAN).save({"scores": np.arange(12.0).reshape(3, 4), "share": np.arange(3)}, 0, 1)
    return folder / "0-1.npz"


def a_plan(folder: Path) -> Path:
    a_cell(folder)
    return folder / "plan.json"


def read_cell(path: Path) -> Any:
    """A damaged cell is to do again, which is said."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", DamagedCellWarning)
        try:
            return CellStore(path.parent, PLAN).load(0, 1)
        except DamagedCellWarning as warning:
            raise ResultError(str(warning), "a whole cell", "It is computed again.") from None


def some_lines(folder: Path, kind: str) -> Path:
    lines = [{"id": f"q{i}", "domain": "d", "prompt": f"What is {i}?", "answer": f"ü {i}", "n": i} for i in range(4)]
    (folder / f"{kind}.jsonl").write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    return folder / f"{kind}.jsonl"


def a_run(folder: Path) -> RunFolder:
    run = RunFolder(folder)
    run.open(TestbedConfig(), [{"step": 1, "loss": 0.5}], {"data": "x", "mixed_precision": "no"})
    run.model.mkdir()
    run.close({"data": "x", "mixed_precision": "no"})
    return run


def a_config(folder: Path) -> Path:
    return a_run(folder).config


def a_description(folder: Path) -> Path:
    return a_run(folder).run


def a_log(folder: Path) -> Path:
    return a_run(folder).log


def read_run(path: Path) -> Any:
    run = RunFolder(path.parent)
    run.check(TestbedConfig(), resume=True, origin={"data": "x", "mixed_precision": "no"})
    return run.finished()


def a_state(folder: Path) -> Path:
    torch.save({"fingerprint": "x", "model": {"w": torch.arange(6.0)}, "step": 3}, folder / "plain.pt")
    (folder / "state.pt").write_bytes(sealed_zip((folder / "plain.pt").read_bytes()))
    return folder / "state.pt"


def demo_assets(folder: Path, name: str) -> Path:
    for part in ("model", "items"):
        (folder / part).mkdir()
    some_lines(folder / "items", "facts")
    (folder / "model" / "config.json").write_text('{"model_type": "olmoe"}')
    (folder / "provenance.json").write_text('{"config": {"steps": 3}}')
    write_checksums(folder)
    return folder / name


def read_demo(path: Path) -> Any:
    folder = path.parent if path.parent.name not in ("model", "items") else path.parents[1]
    return load_demo_assets(folder).provenance


OF_OTHER_TOOLS = ("vLLM array", "vLLM responses", "SGLang text", "ESFT log", "Megatron trace", "router logits")
KINDS: dict[str, tuple[Callable[[Path], Path], Reader]] = {
    "result": (a_result, load_result),
    "npz trace": (partial(a_trace, suffix="npz"), RoutingTrace.read),
    "parquet trace": (partial(a_trace, suffix="parquet"), RoutingTrace.read),
    "vLLM array": (a_vllm_array, partial(read_as, "vllm", layers=[1, 2])),
    "vLLM responses": (some_responses, partial(read_as, "vllm", layers=[1, 2])),
    "SGLang text": (a_sglang_text, partial(read_as, "sglang", layers=[1, 2], top_k=3)),
    "ESFT log": (an_esft_log, lambda path: read_as("esft", path.parent, top_k=3)),
    "Megatron trace": (a_megatron_trace, partial(read_as, "megatron")),
    "router logits": (router_logits, partial(read_as, "transformers", layers=[1, 2], rule="softmax", top_k=2)),
    "cell": (a_cell, read_cell),
    "plan of cells": (a_plan, lambda path: CellStore(path.parent, PLAN)),
    "items": (partial(some_lines, kind="items"), load_items),
    "sequences": (partial(some_lines, kind="sequences"), load_sequences),
    "testbed items": (partial(some_lines, kind="domain"), read_items),
    "testbed configuration": (a_config, read_run),
    "testbed run": (a_description, read_run),
    "testbed log": (a_log, read_run),
    "testbed checkpoint": (a_state, partial(read_state, device="cpu")),
    "demo checksums": (partial(demo_assets, name="checksums.json"), read_demo),
    "demo provenance": (partial(demo_assets, name="provenance.json"), read_demo),
    "demo items": (partial(demo_assets, name="items/facts.jsonl"), read_demo),
    "demo model": (partial(demo_assets, name="model/config.json"), read_demo),
}


@pytest.mark.parametrize("kind", KINDS)
def test_mutations_are_read_or_refused_in_words(tmp_path: Path, kind: str) -> None:
    make, read = KINDS[kind]
    path = make(tmp_path)
    content = path.read_bytes()
    read(path)
    refused: list[MoEInterpError] = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    n = N // 5 if kind in OF_OTHER_TOOLS else N
    for number in range(n):
        path.write_bytes(mutated(content, random.Random(number)))
        begin = time.thread_time()
        try:
            read(path)
        except MoEInterpError as error:
            refused.append(error)
        assert time.thread_time() - begin < SECONDS or not is_too_slow(partial(read, path)), number
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert all(error.given and error.expected and error.remedy for error in refused)
    assert len(refused) > n / 4  # of lines of text, much stays legal
    assert grown < 2**18


def resealed(content: bytes, rng: random.Random) -> bytes:
    """A mutation with a checksum of its own."""
    return sealed(mutated(content[:-LENGTH], rng))


def read_resealed(kind: str, folder: Path, results: Any) -> None:
    make, read = KINDS[kind]
    path = make(folder)
    content = path.read_bytes()
    for number in range(N_RESEALED):
        path.write_bytes(resealed(content, random.Random(number)))
        begin = time.thread_time()
        try:
            read(path)
            found = "read"
        except MoEInterpError:
            found = "refused"
        except BaseException as error:
            found = repr(error)
        if time.thread_time() - begin >= SECONDS and is_too_slow(partial(read, path)):
            found = "too slow"
        results.put((number, found))


# not of parquet: Arrow ends the process on some, so that there the checksum is all the protection
@pytest.mark.parametrize("kind", ["result", "npz trace", "cell", "testbed checkpoint"])
def test_mutations_with_a_right_checksum_are_refused_by_what_they_hold(tmp_path: Path, kind: str) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=read_resealed, args=(kind, tmp_path, results))
    process.start()
    found = {}
    for _ in range(N_RESEALED):
        number, what = results.get(timeout=PATIENCE)
        found[number] = what
        assert what in ("read", "refused"), f"{number}: {what}"
    process.join(timeout=PATIENCE)
    assert process.exitcode == 0
    assert sum(what == "refused" for what in found.values()) > N_RESEALED / 2


# a cell that is to do, a domain without items, and a layer that was not logged
LEGAL = {("cell", "absent"), ("testbed items", "empty"), ("ESFT log", "absent")}


@pytest.mark.parametrize("place", ["absent", "empty", "a folder", "a pipe", "a loop", "a device", "sparse"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path, kind: str, place: str) -> None:
    make, read = KINDS[kind]
    path = make(tmp_path)
    path.unlink()
    if place == "empty":
        path.write_bytes(b"")
    elif place == "a folder":
        path.mkdir()
    elif place == "a pipe":
        os.mkfifo(path)
    elif place == "a loop":
        path.symlink_to(path)
    elif place == "a device":
        path.symlink_to("/dev/zero")
    elif place == "sparse":
        with path.open("wb") as file:
            file.truncate(2**40)
    if (kind, place) in LEGAL:
        read(path)
        return
    with pytest.raises(MoEInterpError):
        read(path)
    assert not is_too_slow(partial(read, path))


def test_json_is_read_within_bounds() -> None:
    assert parse_json('{"a": [1, 2.5, "ü"]}'.encode()) == {"a": [1, 2.5, "ü"]}
    for text in (b"[" * 100_000, b"NaN", b'{"a": -Infinity}', b"9" * 10_000, b"\xff", b"", b"{} {}"):
        with pytest.raises(ValueError):  # noqa: PT011
            parse_json(text)


def test_a_file_larger_than_the_limit_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"12345")
    with pytest.raises(DataError, match="has 5 bytes; at most 4 are read"):
        read_bytes(tmp_path / "large", "a small file", limit=4)
    assert LARGEST_JSON < 2**30


def test_bombs_and_pickles_are_refused_before_they_are_unpacked(tmp_path: Path) -> None:
    zeros = np.zeros(2**20)
    small = npz_bytes({"a": zeros}, compressed=True)
    np.testing.assert_array_equal(npz_arrays(small)["a"], zeros)
    with zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", bytes(2**22))
    # the archive's directory claims 2 GiB, as one of so many zeros would
    bomb = (tmp_path / "bomb").read_bytes().replace((2**22).to_bytes(4, "little"), (2**31).to_bytes(4, "little"))
    with pytest.raises(ValueError, match="1 arrays of 2147483648 bytes in a file of"):
        npz_arrays(bomb)
    with zipfile.ZipFile(tmp_path / "claim", "w") as archive, archive.open("a.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "<f8", "fortran_order": False, "shape": (2**60,)})
    with pytest.raises(ValueError, match="claims"):
        npz_arrays((tmp_path / "claim").read_bytes())
    np.savez(tmp_path / "pickle", a=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="claims"):
        npz_arrays((tmp_path / "pickle.npz").read_bytes())


def test_a_seal_stands_where_other_readers_pass_it_over(tmp_path: Path) -> None:
    arrays = {"a": np.arange(5)}
    (tmp_path / "sealed.npz").write_bytes(npz_bytes(arrays))
    with np.load(tmp_path / "sealed.npz") as found:
        np.testing.assert_array_equal(found["a"], arrays["a"])
    assert is_sealed((tmp_path / "sealed.npz").read_bytes()) is True
    assert is_sealed(b"anything") is None
    assert is_sealed(sealed(b"anything")[:3] + b"?" + sealed(b"anything")[4:]) is False
    assert torch.load(a_state(tmp_path), weights_only=True)["step"] == 3
    frame = pd.read_parquet(a_trace(tmp_path, "parquet"))
    assert frame["expert_1"].tolist() == [1] * 14


def test_a_manifest_of_other_types_is_refused() -> None:
    whole = json.loads(a_manifest())
    for name, value in (("kind", 3), ("config", []), ("versions", None), ("content_checksum", 1.5), ("seeds", "x")):
        with pytest.raises(TypeError, match=f"the manifest's {name}"):
            Manifest.from_json(json.dumps(whole | {name: value}))


def a_manifest() -> str:
    return Result(xr.Dataset({"a": 1})).manifest.to_json()
