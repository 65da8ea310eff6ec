"""The CPU: native code, built for each kind of CPU that this one can stand for, and operators of PyTorch."""

import contextlib
from itertools import accumulate

import numpy as np
import pytest
import torch
from cases import DTYPES, NAMED, Case, cases
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_close

from nsa import cpu, reference
from nsa.cpu import native, operators, pages
from nsa.table import WindowTable

GRIDS = [(32, 16), (128, 16), (80, 48), (64, 64)]
CAPABILITIES = ["DEFAULT", "AVX2", "AVX512"]
HERE = torch.backends.cpu.get_cpu_capability()
CAPABILITIES = CAPABILITIES[: CAPABILITIES.index(HERE) + 1] if HERE in CAPABILITIES else [HERE]
compress = torch.ops.nsa.nsa_compress


@pytest.fixture(params=[*CAPABILITIES, "operators"])
def backend(request, monkeypatch):
    """Each way in which the CPU's ops may run."""
    monkeypatch.setattr(cpu, "_backend", lambda: operators if request.param == "operators" else native)
    if request.param != "operators":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: request.param)
        assert native.library(request.param).capability().decode() == request.param


def run(function, case, x, weight, dy):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = function(x, weight, *case.geometry, actual_seq_len=case.actual_seq_len)
    return y.detach(), *torch.autograd.grad(y, (x, weight), dy)


def check(case, guarded):
    """In memory with guards, for both backends."""
    if case.n_windows == 0:  # the op calls nothing then
        return
    x, weight, dy = map(guarded.copy, case.inputs)
    table = WindowTable(case.actual_seq_len, *case.geometry, torch.device("cpu"))
    results = cpu.forward(x, weight, table), cpu.grad_input(dy, weight, table, len(x)), cpu.grad_weight(dy, x, table)
    guarded.check()
    for computed, exact, magnitude, terms in zip(results, case.exact, case.magnitude, case.terms):
        assert computed.dtype == case.dtype
        assert_close(computed, exact, magnitude, terms)


@given(data=st.data())
def test_generated(data, guarded, backend):
    check(data.draw(cases(DTYPES)), guarded)


@pytest.mark.parametrize("name", NAMED)
def test_named(name, guarded, backend):
    check(NAMED[name], guarded)


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def flushed_subnormals(flush):
    torch.set_flush_denormal(flush)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


# each dtype, and each geometry: threads share out rows and heads, whatever the dtype of their elements is
@pytest.mark.parametrize(
    ("dtype", "block", "stride"), [*((dtype, 32, 16) for dtype in DTYPES), *((DTYPES[0], *grid) for grid in GRIDS[1:])]
)
def test_same_bits_with_any_number_of_threads(dtype, block, stride, backend):
    """Items of rows and of heads, 9 and 4, enough of them for every thread."""
    case = Case((6000, 31, 0, 5000, 1333), block, stride, 13, 112, dtype)
    results = []
    for count in (1, 2, 3, 7):
        with threads(count):
            results.append(run(compress, case, *case.inputs))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_more_rows_than_parts_of_dweight(backend):
    """Of ones, every sum is a whole number that fp32 holds."""
    case = Case((40_000, 5, 30_011), 32, 16, 1, 16, torch.float32)
    case = case.with_inputs(*map(torch.ones_like, case.inputs))
    for computed, exact in zip(run(compress, case, *case.inputs), case.exact):
        assert torch.equal(computed.double(), exact)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("dtype", "flush"), [(torch.float16, False), (torch.float16, True), (torch.bfloat16, False)])
def test_native_code_reads_and_rounds_every_number_as_pytorch_does(dtype, flush, capability, monkeypatch):
    """fp16 also where fp32 subnormals count as 0: neither its subnormals nor their products here are such."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
    x = torch.ones(len(numbers), 1, 16, dtype=dtype)  # 16 rows a window, in the first the numbers
    x[::16] = numbers.view(-1, 1, 16)
    for factor in (1.0, -1.0, 1 / 3, 3e-3, 1e-4, 77.7, 1e4):
        weight = torch.zeros(16, 1, dtype=dtype)
        weight[0] = factor
        with threads(1), flushed_subnormals(flush):  # the setting is the thread's
            y = compress(x, weight, 16, 16, actual_seq_len=[len(x)]).flatten()
        expected = (numbers.float() * weight[0].float()).to(dtype)  # in fp32 the product is exact, or rounded alike
        assert torch.equal(kinds(y), kinds(expected))
        assert torch.equal(y[~y.isnan()], expected[~y.isnan()])


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_that_start_anywhere(dtype, backend):
    case = Case((70, 50), 32, 16, 3, 48, dtype)
    moved = [torch.cat([t.new_ones(1), t.flatten()])[1:].view(t.shape) for t in case.inputs]
    assert all(t.data_ptr() % 16 == dtype.itemsize for t in moved)
    table = WindowTable(case.actual_seq_len, 32, 16, torch.device("cpu"))
    for x, weight, dy in (case.inputs, moved):
        y, dx, dw = cpu.forward(x, weight, table), cpu.grad_input(dy, weight, table, 120), cpu.grad_weight(dy, x, table)
        for computed, exact, magnitude, terms in zip((y, dx, dw), case.exact, case.magnitude, case.terms):
            assert_close(computed, exact, magnitude, terms)


@pytest.mark.parametrize(("block", "stride"), GRIDS)
@pytest.mark.parametrize("chunk", [1, 5000])
def test_chunks_of_the_operators_do_not_show(monkeypatch, chunk, block, stride):
    monkeypatch.setattr(cpu, "_backend", lambda: operators)
    case = Case((200, 31, 0, 150), block, stride, 3, 48, torch.float32)
    whole = run(compress, case, *case.inputs)
    monkeypatch.setattr(operators, "PRODUCTS", chunk)
    monkeypatch.setattr(operators, "ELEMENTS", chunk)
    *lines, dw = run(compress, case, *case.inputs)
    assert all(map(torch.equal, lines, whole))
    assert_close(dw, case.exact[2], case.magnitude[2], case.terms[2])


def kinds(tensor):
    """0 where finite; each infinity and NaN a number of its own."""
    return tensor.isposinf() + 2 * tensor.isneginf() + 3 * tensor.isnan()


@pytest.mark.parametrize(("block", "stride"), GRIDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("i_input", range(3))
def test_what_is_not_finite_stays_where_the_reference_has_it(i_input, value, dtype, block, stride, backend):
    lengths = (block + 2 * stride, block - 1, 16, 3 * block, block + 7, block)
    case = Case(lengths, block, stride, 2, 16, dtype)
    ends = list(accumulate(lengths))
    rows = {
        0: [0, ends[0] - 1, ends[0], ends[2] - 1, ends[3] - 1, ends[4] - 1],  # at the ends of segments
        1: [0, stride - 1, block - 1],
        2: [0, case.n_windows // 2, case.n_windows - 1],
    }[i_input]
    clean = run(compress, case, *case.inputs)
    for row in rows:
        inputs = [t.clone() for t in case.inputs]
        inputs[i_input].select(0, row)[0] = value  # one head: the other stays clean
        computed, expected = run(compress, case, *inputs), run(reference.nsa_compress, case, *inputs)
        for result, like, before in zip(computed, expected, clean):
            assert torch.equal(kinds(result), kinds(like))
            assert torch.equal(result[like.isfinite()], before[like.isfinite()])


def test_segments_are_a_window_table_of_whole_windows():
    """What `pages.filled` makes in fewer steps than a table."""
    for block, stride in ((16, 16), (32, 16), (128, 48)):
        counts = np.random.default_rng(0).integers(1, 9, 20)
        lengths = (counts - 1) * stride + block
        made = pages.Segments(lengths, counts, block, stride)
        table = WindowTable(lengths.cumsum(), block, stride, torch.device("cpu"))
        assert torch.equal(made.begins, table.begins)
        assert torch.equal(made.starts, table.starts)
        assert (made.block, made.stride) == (block, stride)
