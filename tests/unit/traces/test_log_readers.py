"""Logs of ESFT, traces of Megatron-Core and saved router logits: read back as written, refused by file and line."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from moe_interp.errors import ConfigError, DataError
from moe_interp.traces import RoutingTrace

LENGTHS = [5, 3, 40]


def routes(n=48, columns=2, k=3, experts=8, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.random((n, columns, experts)).argsort(axis=2)[..., :k]
    weights = (rng.dirichlet(np.ones(experts), (n, columns))[..., :k]).round(4)
    return ids, weights


def esft_lines(ids, weights, lengths=LENGTHS):
    starts = np.cumsum([0, *lengths])
    for start, end in itertools.pairwise(starts):
        yield "\t".join(map(str, ids[start:end].ravel())) + "\t\t" + "\t".join(map(str, weights[start:end].ravel()))


def write_esft(folder, ids, weights, lengths=LENGTHS, layers=(1, 2)):
    folder.mkdir(parents=True, exist_ok=True)
    for column, layer in enumerate(layers):
        lines = esft_lines(ids[:, column], weights[:, column], lengths)
        (folder / f"expert_weights_{layer}.txt").write_text("".join(line + "\n" for line in lines))
    return folder


def test_esft_logs_are_read_by_layer_and_sequence(tmp_path):
    ids, weights = routes()
    folder = write_esft(tmp_path, ids, weights, layers=(2, 11))
    for options in ({}, {"top_k": 3}):
        trace = RoutingTrace.read(folder, "esft", 8, **options)
        np.testing.assert_array_equal(trace.expert_indices, ids)
        np.testing.assert_array_equal(trace.expert_weights, weights.astype(np.float32))
        assert (trace.layers, trace.sequence_lengths.tolist()) == ((2, 11), LENGTHS)
    assert RoutingTrace.read(folder, "esft", 8, weights=False).expert_weights is None
    one = RoutingTrace.read(folder, "esft", 8, [11], domain=list("abc"))
    np.testing.assert_array_equal(one.expert_indices[:, 0], ids[:, 1])
    assert RoutingTrace.read(folder, "esft", 8, "moe").layers == (0, 1)
    assert RoutingTrace.read(folder, "esft", 8, sequence_lengths=[40, 8]).sequence_lengths.tolist() == [40, 8]
    with pytest.raises(DataError, match=r"layer 3, which was not recorded"):
        RoutingTrace.read(folder, "esft", 8, [3])


def test_ranks_of_esft_hold_different_sequences(tmp_path):
    ids, weights = routes()
    for rank, span in ((0, slice(0, 8)), (2, slice(8, 20)), (10, slice(20, 48))):
        write_esft(tmp_path / f"rank_{rank}", ids[span], weights[span], [span.stop - span.start])
    trace = RoutingTrace.read(tmp_path, "esft", 8)
    np.testing.assert_array_equal(trace.expert_indices, ids)
    assert trace.sequence_lengths.tolist() == [8, 12, 28]
    (tmp_path / "rank_2" / "expert_weights_1.txt").unlink()
    with pytest.raises(DataError, match=r"rank_2 without a log of layer 1"):
        RoutingTrace.read(tmp_path, "esft", 8)


def changed(old, new, line=1):
    def change(lines):
        lines[line] = lines[line].replace(old, new, 1)
        return lines

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [lines[0], lines[1][:40], lines[2]], "line 2: .*which is cut short or of another form"),
        (
            lambda lines: lines[:2],
            r"2 lines of layer 2 against 3 of layer 1.*expert_weights_1.txt, line 3 has no counterpa",
        ),
        (lambda lines: [*lines[:2], lines[0]], r"expert_weights_2.txt, line 3: 15 ids.*120, as .*_1.txt, line 3"),
        (changed("\t\t", "\t\t0.1\t"), "line 2: 9 ids and 10 weights"),
        (changed("\t\t", "\t"), "line 2: .*cut short or of another form"),
        (changed("\t\t0.", "\t\t9."), r"line 2: weights .* of token 0 of the line, sum 9.*pass weights=False"),
        (changed("\t\t0.", "\t\t-0."), "line 2: weights"),
        (
            lambda lines: [*lines[:2], lines[2].split("\t\t")[0] + "\t\t" + "\t".join(["0.0"] * 120)],
            r"line 3: weights of 0 for all 40 tokens.*pass weights=False",
        ),
        (changed("\t\t0.", "\t\tnan"), "line 2: .*another form"),
        (changed("\t\t0.", "\t\t--"), "line 2: weights that are no numbers"),
        (
            lambda lines: ["8" + line[1:] for line in lines],
            "line 1: expert 8 as number 0 of the line. Expected: an id from 0",
        ),
        (lambda lines: [], "expert_weights_2.txt, which is empty"),
    ],
)
def test_a_damaged_log_is_refused_by_file_and_line(tmp_path, change, message):
    ids, weights = routes()
    log = write_esft(tmp_path, ids, weights) / "expert_weights_2.txt"
    log.write_text("\n".join(change(log.read_text().splitlines())))
    with pytest.raises(DataError, match=message):
        RoutingTrace.read(tmp_path, "esft", 8)


def test_the_number_of_slots_is_found_or_asked_for(tmp_path):
    ids, weights = routes(n=4)
    folder = write_esft(tmp_path / "few", ids, weights, [4])
    with pytest.raises(DataError, match=r"slots a token are possible.*num_experts_per_tok"):
        RoutingTrace.read(folder, "esft", 8)
    np.testing.assert_array_equal(RoutingTrace.read(folder, "esft", 8, top_k=3).expert_indices, ids)
    with pytest.raises(DataError, match=r"12 ids. Expected: a multiple of top_k=5"):
        RoutingTrace.read(folder, "esft", 8, top_k=5)
    with pytest.raises(DataError, match=r"line 1: expert \d twice for token \d of the line"):
        RoutingTrace.read(folder, "esft", 8, top_k=6)
    for k in (1, 2, 6):
        ids, weights = routes(n=400, k=k, experts=16, seed=k)
        folder = write_esft(tmp_path / str(k), ids, weights / 10, [100] * 4)
        assert RoutingTrace.read(folder, "esft", 16).n_slots == k


def test_what_is_no_folder_of_logs_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"which is no folder"):
        RoutingTrace.read(tmp_path / "absent", "esft", 8)
    with pytest.raises(DataError, match=r"without expert_weights_\*\.txt"):
        RoutingTrace.read(tmp_path, "esft", 8)
    ids, weights = routes()
    for gates, message in (
        (0 * weights, r"gates.npz, layer 1: weights of 0"),
        (weights * 3, r"layer 1: weights .* sum"),
    ):
        tenths = (gates * 1e4).astype(np.uint16)
        np.savez(tmp_path / "gates.npz", expert_ids=ids, gate_weights=tenths, seq_lens=LENGTHS)
        with pytest.raises(DataError, match=message):
            RoutingTrace.read(tmp_path / "gates.npz", "esft", 8, [1, 2])
        assert RoutingTrace.read(tmp_path / "gates.npz", "esft", 8, [1, 2], weights=False).n_tokens == 48
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(DataError, match=r"arrays expert_ids, gate_weights, seq_lens"):
        RoutingTrace.read(tmp_path / "other.npz", "esft", 8, [1])


# --- Megatron-Core ------------------------------------------------------------------------------------------------


def bfloat16(values):
    return (values.astype(np.float32).view(np.uint32) >> 16).astype("<u2")


def write_megatron(folder, ids, steps, layers=(1, 2), logits=None, inputs=None):
    """One record a step and layer; ``steps`` are their numbers of tokens."""
    records, sides = [], {"logit": b"", "hs": b""}
    starts = np.cumsum([0, *steps])
    for step, (start, end) in enumerate(itertools.pairwise(starts)):
        for column, layer in enumerate(layers):
            rows = ids[start:end, column]
            record = {"step": step, "stage": "pre_dispatch", "block": "decoder", "layer": layer, "rank": 3}
            record |= {"num_tokens": end - start, "topk": rows.shape[1], "top_indices": rows.tolist()}
            for key, values in (("logit", logits), ("hs", inputs)):
                if values is not None:
                    content = bfloat16(values[start:end, column]).tobytes()
                    record |= {f"{key}_offset": len(sides[key]), f"{key}_bytes": len(content)}
                    record[f"{key}_shape"] = [int(end - start), values.shape[2]]
                    sides[key] += content
            records.append(record)
        records.append({"step": step, "block": "mtp", "mtp_idx": 0, "layer": 1, "top_indices": [[0, 1, 2]]})
    path = folder / "router_trace_rank3.jsonl"
    path.write_text("".join(json.dumps(record, default=int) + "\n" for record in records))
    for key, name in (("logit", "logits"), ("hs", "hidden_states")):
        (folder / f"{name}_rank3.bin").write_bytes(sides[key])
    return path


def test_records_and_side_files_of_megatron_make_one_trace(tmp_path):
    ids, _ = routes()
    rng = np.random.default_rng(5)
    logits, inputs = rng.normal(size=(48, 2, 8)), rng.normal(size=(48, 2, 4))
    path = write_megatron(tmp_path, ids, [24, 24], logits=logits, inputs=inputs)
    for source in (path, tmp_path):
        trace = RoutingTrace.read(source, "megatron", 8)
        np.testing.assert_array_equal(trace.expert_indices, ids)
        np.testing.assert_allclose(trace.router_logits, logits, rtol=2**-7)
        np.testing.assert_allclose(trace.router_inputs, inputs, rtol=2**-7)
        assert (trace.layers, trace.sequence_lengths.tolist()) == ((1, 2), [24, 24])
    assert RoutingTrace.read(path, "megatron", 8, "moe").layers == (0, 1)
    # position by position: token t is of sequence t mod batch size
    batch = RoutingTrace.read(path, "megatron", 8, batch_size=2)
    assert batch.sequence_lengths.tolist() == [12] * 4
    np.testing.assert_array_equal(batch.expert_indices[12:24], ids[1:24:2])
    np.testing.assert_allclose(batch.router_logits[12:24], logits[1:24:2], rtol=2**-7)
    (tmp_path / "logits_rank3.bin").unlink()
    with pytest.raises(DataError, match=r"logits_rank3.bin' does not exist.*pass side_files=False"):
        RoutingTrace.read(path, "megatron", 8)
    assert RoutingTrace.read(path, "megatron", 8, side_files=False).router_logits is None
    (tmp_path / "router_trace_rank4.jsonl").write_text("")
    with pytest.raises(DataError, match=r"with 2 files router_trace_rank\*.jsonl. Expected: one, of one rank"):
        RoutingTrace.read(tmp_path, "megatron", 8)


def test_decoding_steps_of_megatron_are_told_from_batches(tmp_path):
    ids, _ = routes(n=9)
    path = write_megatron(tmp_path, ids, [6, 1, 1, 1])
    trace = RoutingTrace.read(path, "megatron", 8, steps="decoding")
    assert trace.sequence_lengths.tolist() == [9]
    assert trace.phase.tolist() == ["prefill"] * 6 + ["generation"] * 3
    np.testing.assert_array_equal(trace.expert_indices, ids)
    assert RoutingTrace.read(path, "megatron", 8, steps="sequences").sequence_lengths.tolist() == [6, 1, 1, 1]
    with pytest.raises(DataError, match=r'steps of \[6, 1, 1, 1\] tokens.*steps="sequences" or steps="decoding"'):
        RoutingTrace.read(path, "megatron", 8)
    with pytest.raises(ConfigError, match=r"steps='all'"):
        RoutingTrace.read(path, "megatron", 8, steps="all")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:6], *lines[9:], *lines[6:9]]))  # a later step before an earlier one
    with pytest.raises(DataError, match=r"line 10: step 2 after a later one.*the steps of one request, in order"):
        RoutingTrace.read(path, "megatron", 8, steps="decoding")
    with pytest.raises(DataError, match=r"line 1: 6 tokens. Expected: a multiple of batch_size=4"):
        RoutingTrace.read(write_megatron(tmp_path, ids, [6]), "megatron", 8, batch_size=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [*lines[:3], lines[3][:30]], "rank3.jsonl, line 4: "),
        (lambda lines: [lines[0], *lines[2:]], r"1 records of layer 2 against 2 of layer 1|step 1"),
        (lambda lines: lines[:4], r"1 records of layer 2 against 2 of layer 1; .*line 4 has no counterpart"),
        (lambda lines: [lines[0].replace('"num_tokens": 24', '"num_tokens": 25'), *lines[1:]], r"line 1: .*\(25, 3\)"),
        (lambda lines: [lines[0].replace("[[", "[[99, "), *lines[1:]], "line 1: ragged top_indices"),
        (lambda lines: [lines[0].replace('"layer": 1', '"layer": "x"'), *lines[1:]], "line 1: layer='x'"),
        (lambda lines: [lines[0].replace("top_indices", "other"), *lines[1:]], "line 1: .*with top_indices"),
        (lambda lines: ["[1]"], r"line 1: '\[1\]'"),
        (lambda lines: [], "without records of the decoder"),
    ],
)
def test_a_damaged_router_trace_is_refused_by_line(tmp_path, change, message):
    path = write_megatron(tmp_path, routes()[0], [24, 24])
    path.write_text("\n".join(change(path.read_text().splitlines())))
    with pytest.raises(DataError, match=message):
        RoutingTrace.read(path, "megatron", 8)


def test_a_router_that_did_not_run_and_experts_out_of_range_are_refused_by_line(tmp_path):
    ids, _ = routes()
    with pytest.raises(
        DataError, match=r"line 1: expert \d at token \d, layer 1, slot \d. Expected: an id from 0 to 5"
    ):
        RoutingTrace.read(write_megatron(tmp_path, ids, [48]), "megatron", 6)
    ids[30] = 0
    with pytest.raises(DataError, match=r"line 1: zeros at token 30, layer 1.*--cuda-graph-impl none"):
        RoutingTrace.read(write_megatron(tmp_path, ids, [48]), "megatron", 8)
    with pytest.raises(DataError, match=r"zeros for all tokens"):
        RoutingTrace.read(write_megatron(tmp_path, np.zeros((4, 2, 1), int), [4]), "megatron", 8)
    single = ids[..., :1].copy()
    single[:, 0] = 0  # one layer whose router has collapsed
    single[30] = 0
    path = write_megatron(tmp_path, single, [24, 24])
    np.testing.assert_array_equal(RoutingTrace.read(path, "megatron", 8).expert_indices, single)
    single[24:] = 0
    with pytest.raises(DataError, match=r"zeros in all layers at token 24, and at 23 more"):
        RoutingTrace.read(write_megatron(tmp_path, single, [24, 24]), "megatron", 8)


def test_layers_of_other_widths_are_refused(tmp_path):
    path = write_megatron(tmp_path, routes(k=2)[0], [48])
    lines = path.read_text().splitlines()
    record = json.loads(lines[1])
    wider = record | {"topk": 3, "top_indices": [[*row, -1] for row in record["top_indices"]]}
    path.write_text(f"{lines[0]}\n{json.dumps(wider)}\n")
    with pytest.raises(DataError, match=r"rows of widths \[2, 3\]"):
        RoutingTrace.read(path, "megatron", 8)


def test_side_data_of_another_shape_is_refused(tmp_path):
    ids, _ = routes()
    path = write_megatron(tmp_path, ids, [48], logits=np.zeros((48, 2, 7)))
    with pytest.raises(DataError, match=r"line 1: logit_shape \[48, 7\] in 672 bytes. Expected: \[48, 8\]"):
        RoutingTrace.read(path, "megatron", 8)
    path = write_megatron(tmp_path, ids, [48], inputs=np.zeros((48, 2, 4)))
    content = (tmp_path / "hidden_states_rank3.bin").read_bytes()
    (tmp_path / "hidden_states_rank3.bin").write_bytes(content[:-1])
    with pytest.raises(
        DataError, match=r"hidden_states_rank3.bin: 383 bytes from 384 on. Expected: 384, as .*line 2 says"
    ):
        RoutingTrace.read(path, "megatron", 8)


# --- router logits ------------------------------------------------------------------------------------------------


def test_saved_router_logits_are_routed_by_the_rule_that_is_named(tmp_path):
    logits = np.random.default_rng(0).normal(size=(12, 6, 8)).astype(np.float32)
    np.savez(tmp_path / "logits.npz", *logits)  # arr_0 to arr_11: by number, not by text
    np.save(tmp_path / "logits.npy", logits)
    for name in ("logits.npz", "logits.npy"):
        trace = RoutingTrace.read(tmp_path / name, "transformers", layers=range(1, 13), rule="softmax", top_k=2)
        for layer in range(12):
            p = np.exp(logits[layer]) / np.exp(logits[layer]).sum(axis=1, keepdims=True)
            order = np.argsort(-p, axis=1)[:, :2]
            np.testing.assert_array_equal(trace.expert_indices[:, layer], order)
            np.testing.assert_allclose(trace.expert_weights[:, layer], np.take_along_axis(p, order, 1), rtol=1e-5)
            np.testing.assert_array_equal(trace.router_logits[:, layer], logits[layer])
    chosen = RoutingTrace.read(tmp_path / name, "transformers", layers="moe", rule="topk_softmax", top_k=2)
    np.testing.assert_allclose(chosen.expert_weights.sum(axis=2), 1, rtol=1e-6)
    np.testing.assert_array_equal(chosen.expert_indices, trace.expert_indices)


@pytest.mark.parametrize(
    ("logits", "options", "error", "message"),
    [
        ([], {}, DataError, "no router logits"),
        ([np.full((3, 4), 0.25)], {}, DataError, "router logits 0 that are probabilities"),
        ([np.full((3, 4), np.nan)], {}, DataError, "non-finite"),
        ([np.zeros((3, 4)), np.zeros((2, 4))], {}, DataError, "of shapes"),
        ([np.zeros(4)], {}, DataError, r"router logits 0 of shape \(4,\)"),
        ([np.zeros((3, 4))], {"top_k": None}, ConfigError, "without top_k"),
        ([np.zeros((3, 4))], {"rule": "top"}, ConfigError, "rule='top'"),
        ([np.zeros((3, 4))], {"n_experts": 5}, DataError, "of 4 experts. Expected: 5"),
        ([np.zeros((3, 4))], {"attention_mask": np.ones((2, 2))}, DataError, r"of shape \(2, 2\) for 3 tokens"),
        ([np.zeros((3, 4))], {"layers": None}, DataError, "1 columns without layer numbers"),
    ],
)
def test_logits_that_tell_no_routes_are_refused(logits, options, error, message):
    with pytest.raises(error, match=message):
        RoutingTrace.from_router_logits(logits, **{"layers": [1], "rule": "softmax", "top_k": 2} | options)


def test_logits_of_dense_layers_are_passed_over():
    logits = np.random.default_rng(0).normal(size=(2, 3, 4))
    trace = RoutingTrace.from_router_logits([None, *logits], layers=[1, 2], rule="softmax", top_k=1)
    assert trace.layers == (1, 2)
    assert trace.sequence_lengths.tolist() == [3]
    batch = RoutingTrace.from_router_logits(
        list(logits.reshape(2, 3, 1, 4)), layers=[1, 2], rule="softmax", top_k=1, domain=list("abc")
    )
    assert batch.sequence_lengths.tolist() == [1, 1, 1]
    np.testing.assert_array_equal(batch.expert_indices, trace.expert_indices)
