"""Both families of kernels, as they are launched on a device, against the reference in fp64.

Run by Triton's interpreter, with `--kernels host` as native code by way of the Ascend toolchain, or a sample of them
with `--kernels simulator` in the simulator of Ascend chips, which also looks for what has no order.
"""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from cases import DTYPES, NAMED, Case, cases
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import check, machine, run
from tolerance import assert_close

from nsa import accelerator
from nsa.kernels import cube, fused, lines, repair, tiles, vector
from nsa.table import RowGroup, RowRun, WindowRun, WindowTable

CPU = torch.device("cpu")
HALF = accelerator.HALF
FAMILIES = [("vector", DTYPES), ("cube", HALF)]
# Every example is a geometry of its own: natively nine kernels to compile, a second each. 25 of them, and
# test_named, meet the ends of block, stride, N and D. Community Triton's interpreter is several times slower.
EXAMPLES = min(25 if tiles.ANY_SIZE else 15, settings.default.max_examples)


@pytest.mark.parametrize(("family", "dtypes"), FAMILIES)
@settings(max_examples=EXAMPLES)
@given(data=st.data(), programs=st.integers(1, 7))
def test_generated(data, programs, guarded, family, dtypes, interpreted):
    check(data.draw(cases(dtypes)), guarded, family, machine(programs, interpreted))


@pytest.mark.parametrize("family", ["vector", "cube"])
# the largest shape takes the interpreter half a minute: tests/ascend/test_many_lengths.py runs it natively
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.long] * ("heads" in name)) for name in NAMED if name != "largest"],
)
def test_named(name, guarded, family, interpreted):
    check(NAMED[name], guarded, family, machine(4, interpreted))


@pytest.mark.every_target
@pytest.mark.parametrize(("family", "dtype"), [("vector", torch.float32), ("cube", torch.bfloat16)])
def test_same_bits_every_run(guarded, family, dtype, interpreted):
    case = Case((100, 200), 32, 16, 3, 32, dtype)
    runs = [run(case, guarded, family, machine(5, interpreted)) for _ in range(2)]
    for first, second, exact, magnitude, terms in zip(*runs, case.exact, case.magnitude, case.terms):
        assert torch.equal(first, second)
        assert_close(first, exact, magnitude, terms)


@pytest.mark.parametrize("family", ["vector", "cube"])
def test_keys_and_values_in_one_call(family, interpreted):
    """As 2N heads: y and dx have the bits of two calls. dweight's sums may be split otherwise."""
    case = Case((100, 200), 32, 16, 6, 32, torch.bfloat16)
    x, weight, dy = case.inputs
    table = WindowTable(case.actual_seq_len, *case.geometry, torch.device("cpu"))
    how = {"machine": machine(5, interpreted), "family": family}

    def results(heads):
        x_, weight_, dy_ = (tensor[:, heads].contiguous() for tensor in (x, weight, dy))
        y = accelerator.forward(x_, weight_, table, **how)
        return torch.cat((y, accelerator.grad_input(dy_, weight_, table, len(x), **how)))

    keys, values = slice(0, 3), slice(3, 6)
    assert torch.equal(results(slice(None)), torch.cat((results(keys), results(values)), 1))


SPREAD = Case((100, 64, 20, 40), 32, 16, 16, 16)  # runs of windows with a tail, rows in no window, short segments


@triton.jit
def read_lines(groups, window_runs, row_runs, out):
    row, n_rows, first, end, tap = lines.load_row_group(groups, 1)
    tl.store(out, row)
    tl.store(out + 1, n_rows)
    tl.store(out + 2, first)
    tl.store(out + 3, end)
    tl.store(out + 4, tap)
    row, n_rows, window, n_windows = lines.load_window_run(window_runs, 1)
    tl.store(out + 5, row)
    tl.store(out + 6, n_rows)
    tl.store(out + 7, window)
    tl.store(out + 8, n_windows)
    row, n_rows, window, first, end, group = lines.load_row_run(row_runs, 1)
    tl.store(out + 9, row)
    tl.store(out + 10, n_rows)
    tl.store(out + 11, window)
    tl.store(out + 12, first)
    tl.store(out + 13, end)
    tl.store(out + 14, group)


def test_kernels_read_the_fields_that_the_table_wrote():
    group = RowGroup(row=1, n_rows=2, first=3, end=4, tap=5)
    windows = WindowRun(row=6, n_rows=7, window=8, n_windows=9)
    rows = RowRun(row=10, n_rows=11, window=12, first=13, end=14, group=15)
    tables = [torch.tensor([[0] * len(line), line]) for line in (group, windows, rows)]
    out = torch.zeros(15, dtype=torch.int64)
    read_lines[(1,)](*tables, out)
    assert out.tolist() == list(range(1, 16))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("family", ["vector", "cube"])
@pytest.mark.parametrize("which", ["x", "weight", "dy"])
def test_not_finite_stays_where_it_is(guarded, interpreted, slow, which, family, value):
    """In every row, tap and window once (where that is slow, in every seventh), each in a head of its own."""
    inputs = dict(zip(("x", "weight", "dy"), SPREAD.inputs))
    rows = range(0, len(inputs[which]), 7 if slow else 1)
    for some in (rows[i : i + SPREAD.n] for i in range(0, len(rows), SPREAD.n)):
        spoilt = {name: tensor.clone() for name, tensor in inputs.items()}
        for n, row in enumerate(some):
            spoilt[which][(row, n) if which == "weight" else (row, n, row % SPREAD.d)] = value
        check(SPREAD.with_inputs(*spoilt.values()), guarded, family, machine(3, interpreted))


@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
@pytest.mark.parametrize("family", ["vector", "cube"])
def test_results_too_large_for_the_dtype_are_infinite(guarded, interpreted, family):
    """fp16 overflows where fp32 sums do not: not finite, and nothing to repair."""
    case = replace(SPREAD, dtype=torch.float16)
    x, weight, dy = case.inputs
    case = case.with_inputs(300 * x, 300 * weight, 300 * dy)
    assert not case.exact[0].half().isfinite().all()
    for computed, exact in zip(run(case, guarded, family, machine(3, interpreted)), case.exact):
        far = exact.abs() > 1.001 * torch.finfo(torch.float16).max
        assert torch.equal(computed[far].double(), exact[far].sign() * torch.inf)


def test_rule_of_the_families():
    for dtype in DTYPES:
        for block, stride in ((16, 16), (32, 16), (128, 112), (128, 128)):
            expected = "cube" if dtype in HALF and stride < block else "vector"
            assert accelerator.family_of(dtype, block, stride) == expected


@pytest.mark.parametrize(("family", "dtype"), [("cube", torch.float32), ("tensor", torch.float16)])
def test_families_that_are_none_are_an_error(family, dtype, interpreted):
    case = Case((70,), 32, 16, 1, 16, dtype)
    table = WindowTable(case.actual_seq_len, *case.geometry, CPU)
    with pytest.raises(ValueError, match=f"expected family 'vector', or .* got '{family}' for {dtype}"):
        accelerator.forward(*case.inputs[:2], table, machine(1, interpreted), family)


def test_offsets_past_2_31():
    """At the end of tensors of more than 2^31 elements, of which all but the rows used stay untouched memory."""
    case = Case((48,), 48, 16, 8, 256, torch.float16)
    x, weight, dy = case.inputs
    n_far = 2**31 // (case.n * case.d) + 1000
    far = torch.empty((n_far, case.n, case.d), dtype=case.dtype)
    starts = torch.tensor([n_far - 48])

    far[-48:] = x
    y = vector.forward(far, weight, starts, 1)
    assert_close(y, case.exact[0], case.magnitude[0], case.terms[0])
    dw = vector.grad_weight(dy, far, starts, case.block, 1)
    assert_close(dw, case.exact[2], case.magnitude[2], case.terms[2])

    far[-1:] = dy
    groups = torch.tensor([RowGroup(n_far - 48 + i, 16, n_far - 1, n_far, tap=i) for i in (0, 16, 32)])
    dx = vector.grad_input(far, weight, groups, n_far, case.stride, 1)
    assert_close(dx[-48:], case.exact[1], case.magnitude[1], case.terms[1])

    # the one program visits the first window and the last
    starts = torch.zeros(n_far, dtype=torch.int64)
    sizes = tiles.window_block(case.block, case.n, case.d, x.element_size())
    vector.forward_vector_kernel[(1,)](
        x, weight, starts, far, n_far, n_far - 1, N=case.n, D=case.d, **sizes, ACC=tl.float32
    )
    assert_close(far[-1:], case.exact[0], case.magnitude[0], case.terms[0])


def test_offsets_past_2_31_of_the_cube_family(interpreted):
    case = Case((48,), 48, 16, 8, 256, torch.float16)
    x, weight, dy = case.inputs
    n_far = 2**31 // (case.n * case.d) + 1000
    far = torch.empty((n_far, case.n, case.d), dtype=case.dtype)
    plan, sizes = machine(1, interpreted).plan, (*case.geometry, case.n, case.d)
    starts, groups = torch.zeros(n_far, dtype=torch.int64), torch.zeros((1, 5), dtype=torch.int64)

    def forward(x, run, n_windows):
        tile, runs = plan.forward_tile(*sizes), torch.tensor([run])
        if plan.fused:
            return fused.forward(x, weight, starts[:n_windows], runs, tile, case.stride, 1)
        return cube.forward(x, weight, runs, tile, case.stride, n_windows, 1)

    def grad_input(dy, run):
        tile, runs = plan.grad_input_tile(*sizes), torch.tensor([run])
        if plan.fused:
            return fused.grad_input(dy, weight, groups, runs, tile, case.stride, n_far, 1)
        return cube.grad_input(dy, weight, runs, tile, case.stride, n_far, 1)

    def grad_weight(dy, x, run):
        tile, runs = plan.grad_weight_tile(*sizes), torch.tensor([run])
        partial = cube.grad_weight(dy, x, runs, tile, 1)
        return repair.grad_weight(dy, x, starts, runs, partial, tile, *case.geometry, 1)

    far[-48:] = x
    y = forward(far, WindowRun(n_far - 48, 48, 0, 1), 1)
    assert_close(y, case.exact[0], case.magnitude[0], case.terms[0])
    y = forward(x, WindowRun(0, 48, n_far - 1, 1), n_far)
    assert_close(y[-1:], case.exact[0], case.magnitude[0], case.terms[0])
    dw = grad_weight(dy, far, WindowRun(n_far - 48, 48, 0, 1))
    assert_close(dw, case.exact[2], case.magnitude[2], case.terms[2])

    far[-1:] = dy
    dw = grad_weight(far, x, WindowRun(0, 48, n_far - 1, 1))
    assert_close(dw, case.exact[2], case.magnitude[2], case.terms[2])
    slot_0 = n_far - 1 - 2  # the window of the rows is in slot 2
    dx = grad_input(far, RowRun(n_far - 48, 48, slot_0, 2, 3, group=0))
    assert_close(dx[-48:], case.exact[1], case.magnitude[1], case.terms[1])
