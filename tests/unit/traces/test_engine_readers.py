"""Arrays of inference engines: what is a route, what is a fill value, and what never ran."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest

from moe_interp.errors import ConfigError, DataError, ResultError
from moe_interp.traces import RoutingTrace, load


def rows(n=6, columns=3, k=2, experts=8, seed=0):
    return np.random.default_rng(seed).random((n, columns, experts)).argsort(axis=2)[..., :k].astype(np.int16)


def of(array, n_experts=8, layers="moe", **options):
    return RoutingTrace.from_vllm(array, n_experts, layers, **options)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32])
def test_ids_of_any_width_are_the_same_routes(dtype, tmp_path):
    np.save(tmp_path / "r.npy", rows().astype(dtype))
    trace = RoutingTrace.read(tmp_path / "r.npy", "vllm", 8, [3, 5, 7], domain="law", token_ids=np.arange(6))
    np.testing.assert_array_equal(trace.expert_indices, rows())
    assert (trace.layers, trace.domains, trace.token_ids.tolist()) == ((3, 5, 7), ("law",), list(range(6)))


def test_n_tokens_have_n_rows_or_one_fewer(tmp_path):
    np.save(tmp_path / "r.npy", rows())
    read = RoutingTrace.read
    assert read(tmp_path / "r.npy", "vllm", 8, "moe", sequence_lengths=[6]).covered.all()
    fewer = read(tmp_path / "r.npy", "vllm", 8, "moe", sequence_lengths=7, token_ids=np.arange(7))
    assert fewer.covered.all(axis=1).tolist() == [True] * 6 + [False]
    assert load(fewer)["dropped_tokens"].values.tolist() == [0, 0, 0]
    late = read(tmp_path / "r.npy", "vllm", 8, "moe", sequence_lengths=[9], start=2)
    assert late.covered.all(axis=1).tolist() == [False] * 2 + [True] * 6 + [False]
    for wrong in ([5], [8]):
        with pytest.raises(DataError, match=rf"r.npy: 6 rows from token 0 for {wrong[0]} tokens.*last sampled token"):
            read(tmp_path / "r.npy", "vllm", 8, "moe", sequence_lengths=wrong)
    with pytest.raises(DataError, match=r"start=1000000000000\. Expected: .*at most"):
        read(tmp_path / "r.npy", "vllm", 8, "moe", start=10**12)
    with pytest.raises(DataError, match=r"6 rows from token 0 for 1 tokens"):
        read(tmp_path / "r.npy", "vllm", 8, "moe", token_ids=6)
    with pytest.raises(DataError, match=r"2 sequence_lengths. Expected: 1, one a sequence"):
        read(tmp_path / "r.npy", "vllm", 8, "moe", sequence_lengths=[3, 3])


@pytest.mark.parametrize(("dtype", "fill"), [(np.int16, -1), (np.uint8, 255), (np.uint16, 65535), (np.int32, 8)])
def test_rows_of_a_fill_value_are_not_covered(dtype, fill):
    array = rows().astype(dtype)
    array[:2] = fill
    array[4, 1] = fill
    trace = of(array)
    expected = np.ones((6, 3), bool)
    expected[:2], expected[4, 1] = False, False
    np.testing.assert_array_equal(trace.covered, expected)
    np.testing.assert_array_equal(trace.expert_indices[expected], rows()[expected])


def test_a_fill_value_in_some_slots_is_refused_unless_named():
    array = np.concatenate([rows(), np.full((6, 3, 1), 99, np.int16)], axis=2)
    with pytest.raises(
        DataError, match=r"output 0: expert 99 at token 0, column 0, slot 2.*0 to 7.*pass it as sentinel"
    ):
        of(array)
    trace = of(array, sentinel=99)
    assert (trace.expert_indices[..., 2] == -1).all()
    np.testing.assert_array_equal(trace.expert_indices[..., :2], rows())
    # a fill value that is an expert too: only where it fills the row
    array = rows(experts=256).astype(np.uint8)
    array[3] = 255
    assert of(array, 256, sentinel=255).covered.all(axis=1).tolist() == [True] * 3 + [False] + [True] * 2
    with pytest.raises(DataError, match=r"Expert 255 twice at token 3"):
        of(array, 256)
    with pytest.raises(DataError, match=r"sentinel=7 among 8 experts with one slot"):
        of(rows(k=1), sentinel=7)
    for sentinel in ("99", 2.5):
        with pytest.raises(DataError, match=r"sentinel=.*whole number"):
            of(rows(), sentinel=sentinel)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("n", [1, 5])
def test_zeros_throughout_are_a_capture_that_never_ran(k, n):
    for array in (np.zeros((n, 3, k), np.int16), [np.zeros((n, 3, k), np.uint8)] * 2):
        with pytest.raises(DataError, match=r"zeros for all tokens in every row.*enable_return_routed_experts=True"):
            of(array)
    with pytest.raises(DataError, match=r"zeros for all tokens"):
        of(np.full((n, 3, k), -1, np.int16))


@pytest.mark.parametrize(("k", "columns"), [(2, 3), (1, 26)])
def test_a_last_row_of_zeros_is_a_dummy_and_any_other_is_refused(k, columns):
    array = rows(columns=columns, k=k)
    array[5] = 0
    assert of(array).covered.all(axis=1).tolist() == [True] * 5 + [False]
    array[2] = 0
    with pytest.raises(DataError, match=r'output 0: zeros at token 2, layer 0.*uncaptured="native"'):
        of(array)
    trace = of(array, uncaptured="native")
    assert trace.covered.all(axis=1).tolist() == [True, True, False, True, True, False]
    with pytest.raises(ConfigError, match='"refuse" or "native"'):
        of(array, uncaptured="drop")
    sequences = [rows(columns=columns, k=k), np.zeros((3, columns, k), np.int16)]
    with pytest.raises(DataError, match=r"zeros for all tokens in every row of output 1"):
        of(sequences)


def test_one_slot_a_token_may_be_expert_0():
    array = rows(k=1)
    array[2], array[:, 1] = 0, 0
    trace = of(array)
    assert trace.covered.all()
    np.testing.assert_array_equal(trace.expert_indices, array)
    # one layer whose router has collapsed
    array = rows(40, columns=1, k=1)
    array[5:30] = 0
    assert of(array).covered.all()


@pytest.mark.parametrize("columns", [2, 3])
def test_many_rows_of_zeros_one_after_the_other_are_no_routes_also_with_one_slot(columns):
    array = rows(40, columns=columns, k=1, seed=1)
    array[10:30] = 0
    with pytest.raises(DataError, match=rf"zeros at token 10, layer 0, and at {20 * columns - 1} more"):
        of(array)
    covered = np.ones(40, bool)
    covered[10:30] = False
    np.testing.assert_array_equal(of(array, uncaptured="native").covered, covered[:, None].repeat(columns, axis=1))
    with pytest.raises(DataError, match=r"zeros for all tokens in every row of output 1"):
        of([rows(40, columns=columns, k=1), np.zeros((12, columns, 1), np.int16)])


def test_columns_are_told_by_number():
    array = np.insert(rows(), [0, 2], 0, axis=1)  # layers 0 and 3 are dense
    assert of(array, layers="all").layers == (1, 2, 4)
    np.testing.assert_array_equal(of(array, layers="all").expert_indices, rows())
    np.testing.assert_array_equal(of(array, layers=[1, 2, 4]).expert_indices, rows())
    for layers, message in (
        (None, "5 columns without layer numbers"),
        ("moe", "zeros for all tokens in the column of layer 0"),
        ([1, 2], "routes in column 4, which is none of the layers"),
        ([1, 2, 3], "the column of layer 3"),
        ([1, 2, 9], "3 layers .* for 5 columns"),
        ([1, 1, 2, 3, 4], "layers=.*different layers"),
        ("dense", "layers='dense'"),
        (3, "layers=3"),
        (np.int64(3), "layers="),
        ([0.5] * 5, "a layer=0.5"),
    ):
        with pytest.raises(DataError, match=message):
            of(array, layers=layers)
    assert of(rows(), layers=np.array([1, 2, 4])).layers == (1, 2, 4)
    single = np.insert(rows(k=1), [0], 0, axis=1)
    assert of(single, layers=[1, 2, 3]).layers == (1, 2, 3)
    with pytest.raises(DataError, match=r"zeros in column 0, a dense layer's or expert 0"):
        of(single, layers="all")


@pytest.mark.parametrize(
    ("array", "n_experts", "message"),
    [
        (rows().astype(np.uint8), 300, "expert ids of type uint8 for 300 experts.*at most 256"),
        (rows().astype(np.int8), 129, "type int8 for 129 experts.*at most 128"),
        (rows(), 5, r"expert . at token ., column ., slot .\. Expected: an id from 0 to 4"),
        (rows(), None, "no n_experts"),
        (rows().astype(float), 8, r"output 0: an array of shape \(6, 3, 2\) and type float64"),
        (rows()[0], 8, r"output 0: an array of shape \(3, 2\)"),
        (rows()[:0], 8, r"an array of shape \(0, 3, 2\)"),
        ([rows(), rows(k=3)], 8, "rows of shapes"),
        ([], 8, "no sequences"),
        ({"choices": [{"text": "x"}]}, 8, "no routed_experts.*enable_return_routed_experts"),
        ({"choices": []}, 8, "no completions"),
        ({"routed_experts": "????"}, 8, "a text that is not base64"),
        ({"routed_experts": "aGVsbG8="}, 8, "not an npy file"),
        ({"routed_experts": {"data": "AAAA", "shape": [1, 2, 2], "dtype": "int8"}}, 8, "no array"),
        ({"routed_experts": [[[0, 1], [2]]]}, 8, "no array|of shape"),
        ({"routed_experts": rows().tolist(), "prompt_token_ids": 3}, 8, "token ids '3'"),
        ({"routed_experts": rows()[:2], "prompt_routed_experts": rows(k=3)}, 8, "for the prompt"),
    ],
)
def test_what_is_no_array_of_routes_is_refused(array, n_experts, message):
    with pytest.raises(DataError, match=message):
        of(array, n_experts)


def test_a_sequence_for_each_completion():
    first, second = rows(seed=1), rows(seed=2)
    output = {"prompt_routed_experts": rows(), "choices": [{"routed_experts": a} for a in (first, second)]}
    trace = of([output, rows(n=3)])
    assert trace.sequence_lengths.tolist() == [12, 12, 3]
    np.testing.assert_array_equal(trace.expert_indices[12:24], np.concatenate([rows(), second]))


# --- SGLang -------------------------------------------------------------------------------------------------------


def text(array):
    return base64.b64encode(array.astype("<i4").tobytes()).decode()


def test_flat_texts_need_their_shape(tmp_path):
    read = RoutingTrace.from_sglang
    for options in ({"layers": [1, 2, 3]}, {"layers": "moe", "n_columns": 3}):
        trace = read([text(rows())], 8, top_k=2, **options)
        np.testing.assert_array_equal(trace.expert_indices, rows())
    for options, message in (
        ({"layers": "moe", "top_k": 2}, "144 bytes without their shape"),
        ({"layers": [1, 2, 3]}, "Pass top_k="),
        ({"layers": "moe", "top_k": 2, "n_columns": 5}, "no multiple of 5 columns of 2 slots"),
        ({"layers": [1, 5], "top_k": 1}, "may be 2 or 6 columns"),
    ):
        with pytest.raises(DataError, match=message):
            read([text(rows())], 8, **options)
    with pytest.raises(DataError, match=r"no routed_experts.*--enable-return-routed-experts"):
        read({"meta_info": {"prompt_tokens": 3}}, 8, [1, 2, 3], top_k=2)
    (tmp_path / "r.jsonl").write_text('{"meta_info": {"routed_experts": "' + text(rows()) + '"}}\n{"meta')
    with pytest.raises(DataError, match=r"r\.jsonl, line 2"):
        RoutingTrace.read(tmp_path / "r.jsonl", "sglang", 8, [1, 2, 3], top_k=2)
    (tmp_path / "r.json").write_text("[1]")
    with pytest.raises(DataError, match=r"r\.json, response 0: '1'"):
        RoutingTrace.read(tmp_path / "r.json", "sglang", 8, [1, 2, 3], top_k=2)


# --- the call -----------------------------------------------------------------------------------------------------


def test_options_are_those_of_the_format(tmp_path):
    np.save(tmp_path / "r.npy", rows())
    with pytest.raises(ConfigError, match=r"option 'batch_size' for format 'vllm'.*one of domain, moe"):
        RoutingTrace.read(tmp_path / "r.npy", "vllm", 8, "moe", batch_size=2)
    with pytest.raises(ResultError, match=r"Trace format 'csv' .*npz, parquet, esft, vllm, sglang, megatron, transf"):
        RoutingTrace.read(tmp_path / "r.npy", "csv")
    path = of(rows(), layers=[3, 5, 7]).save(tmp_path / "t.npz")
    part = RoutingTrace.read(path, n_experts=8, layers=[7, 3])
    np.testing.assert_array_equal(part.expert_indices, rows()[:, [2, 0]])
    with pytest.raises(DataError, match=r"t\.npz of 8 experts. Expected: 9"):
        RoutingTrace.read(path, n_experts=9)
    with pytest.raises(DataError, match=r"layer 4, which was not recorded"):
        RoutingTrace.read(path, layers=[4])
    with pytest.raises(ConfigError, match=r"option 'start'"):
        RoutingTrace.read(path, start=1)


def test_the_error_of_a_file_names_it_and_the_place(tmp_path):
    array = rows()
    array[3, 1] = 4
    (tmp_path / "r.json").write_text(json.dumps({"choices": [{"routed_experts": array.tolist()}]}))
    with pytest.raises(DataError, match=r"r.json: Expert 4 twice at token 3, layer 5"):
        RoutingTrace.read(tmp_path / "r.json", "vllm", 8, [4, 5, 6])
