"""Routing captured to disk: whole parts, resumed after an interruption, refused where it is another capture's."""

from __future__ import annotations

import functools
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moe_interp as mi
from moe_interp.errors import ConfigError, DataError, ResultError
from moe_interp.experiments.capture.passes import RoutingPasses
from moe_interp.experiments.capture.sinks import CountsOnly, DamagedPartWarning
from moe_interp.traces import RoutingCounts, read_parts
from moe_interp.traces.part_files import IncompleteCaptureWarning
from tests.tiny import build_bridge, build_hf, random_tokens, tiny_tokenizer

LENGTHS = (4, 6, 3, 5, 6, 2)
# of three layers, two slots, indices and weights: some two sequences a part
PART = 700
FIELDS = ("expert_indices", "expert_weights", "sequence", "token_ids", "predicted_ids", "phase", "domain")


@pytest.fixture(scope="module")
def moe() -> Iterator[mi.MoEHooks]:
    with mi.attach(build_bridge(build_hf("olmoe"), "olmoe", tiny_tokenizer())) as hooks:
        yield hooks


@pytest.fixture
def sequences() -> list[dict[str, Any]]:
    rows = random_tokens(len(LENGTHS), max(LENGTHS), seed=7).tolist()
    return [{"id": f"s{i}", "tokens": row[:n], "domain": "ab"[i % 2]} for i, (row, n) in enumerate(zip(rows, LENGTHS))]


capture: Any = functools.partial(mi.capture_routing, progress=False, part_bytes=PART, batch_size=1)


def interrupting(after: int) -> Any:
    def report(done: int, total: int) -> None:
        if done >= after:
            raise KeyboardInterrupt

    return report


def assert_same(one: mi.RoutingTrace, other: mi.RoutingTrace) -> None:
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(one, field), getattr(other, field), err_msg=field)


@pytest.mark.parametrize("format", ["parquet", "npz"])
def test_parts_are_those_of_the_trace_in_memory(
    moe: mi.MoEHooks, sequences: list[dict[str, Any]], tmp_path: Path, format: str
) -> None:
    whole = capture(moe, sequences)
    recorded = capture(moe, sequences, out=tmp_path / "routes", format=format)
    assert recorded.n_parts == len(list((tmp_path / "routes").glob(f"part-*.{format}"))) >= 3
    assert_same(recorded.read(), whole)
    assert_same(mi.RoutingTrace.read(tmp_path / "routes"), whole)
    parts = list(read_parts(tmp_path / "routes"))
    assert sum(part.n_tokens for part in parts) == recorded.n_tokens == sum(LENGTHS)
    assert_same(mi.RoutingTrace.concatenate(parts), whole)
    assert_same(next(read_parts(parts[0].save(tmp_path / "one.npz"))), parts[0])
    assert recorded.sequence_ids == [one["id"] for one in sequences]
    assert "26 tokens in 6 sequences" in recorded.summary()
    assert "3 MoE layers, 8 experts, top-2" in recorded.summary()


def test_an_interruption_leaves_whole_parts_and_the_same_call_goes_on(
    moe: mi.MoEHooks, sequences: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "routes"
    with pytest.raises(KeyboardInterrupt):
        capture(moe, sequences, out=out, progress=interrupting(4))
    names = sorted(path.name for path in out.iterdir())
    assert not [name for name in names if name.endswith(".part")]
    with pytest.warns(IncompleteCaptureWarning, match="the capture is not finished"):
        found = list(read_parts(out))
    assert 1 <= len(found) < 3
    ran: list[int] = []
    native = RoutingPasses.record

    def counted(self: RoutingPasses, some: Any, on_done: Any) -> Any:
        ran.append(len(some))
        return native(self, some, on_done)

    monkeypatch.setattr(RoutingPasses, "record", counted)
    recorded = capture(moe, iter(sequences), out=out)
    assert sum(ran) == 6 - sum(len(part.sequence_lengths) for part in found)
    assert_same(recorded.read(), capture(moe, sequences))
    ran.clear()
    capture(moe, sequences, out=out)
    assert not ran  # all is there


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": True}, "logits=False there, True here"),
        ({"layers": [1]}, r"layers=\[.*\] there, \[1\] here"),
        ({"generate": 2}, "generate=0 there, 2 here"),
        ({"format": "npz"}, "format='parquet' there, 'npz' here"),
        ({"accumulate": True}, "accumulate=None there, 'all' here"),
    ],
)
def test_another_capture_is_refused_by_what_differs(
    moe: mi.MoEHooks, sequences: list[dict[str, Any]], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    capture(moe, sequences, out=tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ResultError, match=message):
        capture(moe, sequences, out=tmp_path, **changes)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_other_weights_interventions_and_sequences_are_refused(
    moe: mi.MoEHooks, sequences: list[dict[str, Any]], tmp_path: Path
) -> None:
    capture(moe, sequences, out=tmp_path)
    with (
        mi.attach(build_bridge(build_hf("olmoe", seed=1), "olmoe", tiny_tokenizer())) as other,
        pytest.raises(ResultError, match="the model's weights: other content"),
    ):
        capture(other, sequences, out=tmp_path)
    with pytest.raises(ResultError, match="the model's hooks"):
        capture(moe, sequences, out=tmp_path, hooks=mi.uniform_routing(moe))
    swapped = [*sequences[:4], sequences[5], sequences[4]]
    with pytest.raises(ResultError, match=r"part \d is of other sequences than"):
        capture(moe, swapped, out=tmp_path)
    with pytest.raises(ResultError, match=r"is not among them|of other sequences"):
        capture(moe, sequences[:3], out=tmp_path)
    replaced = capture(moe, swapped, out=tmp_path, resume=False)
    assert replaced.sequence_ids == [one["id"] for one in swapped]


def test_a_folder_of_something_else_is_left_alone(
    moe: mi.MoEHooks, sequences: list[dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    for resume in (True, False):
        with pytest.raises(ResultError, match=r"holds something else \(thesis.txt\)"):
            capture(moe, sequences, out=tmp_path, resume=resume)
    with pytest.raises(ResultError, match="is a file"):
        capture(moe, sequences, out=tmp_path / "thesis.txt")
    with pytest.raises(ResultError, match=r"without a manifest.json"):
        list(read_parts(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_run_that_fails_before_its_first_part_leaves_no_folder(
    moe: mi.MoEHooks, sequences: list[dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        capture(moe, sequences, out=tmp_path / "routes", progress=interrupting(1))
    with pytest.raises(ConfigError):
        capture(moe, sequences, out=tmp_path / "routes", memory_budget=10)
    with pytest.raises(DataError):
        capture(moe, [[5, 500]], out=tmp_path / "routes")
    assert not (tmp_path / "routes").exists()


def test_a_capture_is_replaced_when_there_is_something_to_replace_it(
    moe: mi.MoEHooks, sequences: list[dict[str, Any]], tmp_path: Path
) -> None:
    capture(moe, sequences, out=tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    renew = functools.partial(capture, moe, out=tmp_path, resume=False)
    with pytest.raises(ConfigError, match="table 'use'"):
        renew(sequences, accumulate=["use"])
    with pytest.raises(DataError, match="token id 500"):
        renew(iter([[5, 500]]))
    for accumulate in (None, True):
        with pytest.raises(KeyboardInterrupt):
            renew(sequences, accumulate=accumulate, progress=interrupting(1))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    counts = renew(sequences[:2], accumulate=True)
    assert not list(tmp_path.glob("*.parquet"))
    assert RoutingCounts.load(tmp_path / "counts.npz").n_tokens == counts.n_tokens == sum(LENGTHS[:2])
    assert renew(sequences[:2]).sequence_ids == ["s0", "s1"]
    assert not list(tmp_path.glob("counts*"))


def test_damaged_parts_are_named_and_recorded_again(
    moe: mi.MoEHooks, sequences: list[dict[str, Any]], tmp_path: Path
) -> None:
    whole = capture(moe, sequences, out=tmp_path).read()
    part = tmp_path / "part-00001.parquet"
    content = part.read_bytes()
    part.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
    with pytest.raises(ResultError, match=r"part-00001.parquet.*Delete the part's two files"):
        list(read_parts(tmp_path))
    with pytest.raises(ResultError, match=r"part-00001.parquet.*Delete the part's two files"):
        mi.RoutingTrace.read(tmp_path)
    part.unlink()
    with pytest.raises(ResultError, match=r"part-00001.parquet', a part that is missing"):
        read_parts(tmp_path)
    with pytest.warns(DamagedPartWarning, match="part-00001.parquet is missing or was cut short"):
        recorded = capture(moe, sequences, out=tmp_path)
    assert_same(recorded.read(), whole)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["about"]["n_experts"] = 7
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ResultError, match=r"manifest.json', which was changed"):
        read_parts(tmp_path)


def test_counts_on_disk_go_on_where_they_were_interrupted(
    moe: mi.MoEHooks, sequences: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = RoutingCounts.of(capture(moe, sequences))
    out = tmp_path / "counts"
    with pytest.raises(KeyboardInterrupt):
        capture(moe, sequences, out=out, accumulate=True, progress=interrupting(4))
    assert len(list(out.glob("counts-*.npz"))) == 1
    added: list[int] = []
    native = CountsOnly.add

    def noted(self: CountsOnly, number: int, *more: Any) -> None:
        added.append(number)
        native(self, number, *more)

    monkeypatch.setattr(CountsOnly, "add", noted)
    counts = capture(moe, sequences, out=out, accumulate=True)
    assert added
    assert added[0] > 0
    assert not list(out.glob("counts-*.npz"))
    for found in (counts, RoutingCounts.load(out / "counts.npz"), capture(moe, sequences, out=out, accumulate=True)):
        assert found.n_sequences == 6
        for name in [*whole._arrays, *whole._rows]:
            np.testing.assert_array_equal(found.array(name), whole.array(name), err_msg=name)
    with pytest.raises(ResultError, match="which holds counts"):
        read_parts(out)
    (out / "counts.npz").unlink()
    with pytest.warns(DamagedPartWarning, match="counting begins again"):
        again = capture(moe, sequences, out=out, accumulate=True)
    assert again.n_tokens == sum(LENGTHS)


@pytest.mark.parametrize("accumulate", [None, ["co_activation"]])
def test_a_finished_capture_goes_on_with_more_sequences(
    moe: mi.MoEHooks, sequences: list[dict[str, Any]], tmp_path: Path, accumulate: list[str] | None
) -> None:
    options = {"out": tmp_path, "accumulate": accumulate, "part_bytes": 1}  # a sequence a part
    capture(moe, sequences[:3], **options)
    with pytest.raises(KeyboardInterrupt):
        capture(moe, sequences, progress=interrupting(5), **options)
    assert not json.loads((tmp_path / "manifest.json").read_text())["is_complete"]
    for _ in range(2):
        found = capture(moe, sequences, **options)
        totals = json.loads((tmp_path / "manifest.json").read_text())["totals"]
        assert totals == {"sequences": 6, "parts": 6, "tokens": sum(LENGTHS)}
        if accumulate is None:
            assert_same(found.read(), capture(moe, sequences))
            continue
        whole = RoutingCounts.of(capture(moe, sequences), tables=accumulate)
        for counts in (found, RoutingCounts.load(tmp_path / "counts.npz")):
            assert counts.n_tokens == sum(LENGTHS)
            for name in [*whole._arrays, *whole._rows]:
                np.testing.assert_array_equal(counts.array(name), whole.array(name), err_msg=name)


@pytest.mark.parametrize(("accumulate", "is_written"), [(None, False), (["co_activation"], True)])
def test_a_disk_that_is_full_at_any_file_costs_no_finished_part(
    moe: mi.MoEHooks,
    sequences: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    accumulate: list[str] | None,
    is_written: bool,
) -> None:
    native, whole = os.replace, capture(moe, sequences[:2])
    options = {"accumulate": accumulate, "part_bytes": 1}
    for number in range(20):
        out, calls = tmp_path / str(number), itertools.count()

        def replace(source: Any, target: Any, number: int = number, calls: Iterator[int] = calls) -> None:
            is_full = next(calls) == number
            if is_written or not is_full:
                native(source, target)
            if is_full:
                raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            try:
                capture(moe, sequences[:2], out=out, **options)
                break
            except ResultError as error:
                assert "No space left on device" in str(error)  # noqa: PT017
        if out.is_dir():
            (out / ".part-00001.parquet.killed.part").write_bytes(b"cut short")
        found = capture(moe, sequences[:2], out=out, **options)
        assert not [*out.glob(".*"), *out.glob("counts-*")]
        if accumulate is None:
            assert_same(found.read(), whole)
        else:
            assert RoutingCounts.load(out / "counts.npz").n_tokens == whole.n_tokens
    assert number == 6  # manifest, two parts or counts, two notes, manifest


def test_counts_before_a_write_that_was_cut_short_are_gone_on_from(
    moe: mi.MoEHooks, sequences: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"out": tmp_path, "accumulate": ["co_activation"], "part_bytes": 1}
    with pytest.raises(KeyboardInterrupt):
        capture(moe, sequences, progress=interrupting(2), **options)
    kept = (tmp_path / "counts-00001.npz").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        capture(moe, sequences, progress=interrupting(4), **options)
    # as a process leaves it that is killed between the notes of two parts
    (tmp_path / "counts-00001.npz").write_bytes(kept)
    (tmp_path / "part-00002.json").unlink()
    assert RoutingCounts.load(tmp_path / "counts-00003.npz").n_sequences == 3
    added: list[int] = []
    native = CountsOnly.add

    def noted(self: CountsOnly, number: int, *more: Any) -> None:
        added.append(number)
        native(self, number, *more)

    monkeypatch.setattr(CountsOnly, "add", noted)
    counts = capture(moe, sequences, **options)
    assert added == [1, 2, 3, 4, 5]
    np.testing.assert_array_equal(counts.slots, RoutingCounts.of(capture(moe, sequences)).slots)
