"""The vector family, run by Triton's interpreter, against the reference in fp64."""

import pytest
import torch
import triton.language as tl
from cases import NAMED, Case, cases
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close

from nsa.kernels import vector
from nsa.table import build_table


def run(case, guarded, n_programs):
    x, weight, dy = map(guarded.copy, case.inputs)
    starts, groups = map(torch.from_numpy, build_table(case.actual_seq_len, *case.geometry))
    y = vector.forward(x, weight, starts, n_programs)
    dx = vector.grad_input(dy, weight, groups, len(x), case.stride, n_programs)
    dw = vector.grad_weight(dy, x, starts, case.block, n_programs)
    guarded.check()
    return y, dx, dw


def check(case, guarded, n_programs):
    if case.n_windows == 0:  # the op launches nothing then
        return
    for computed, exact, magnitude, terms in zip(
        run(case, guarded, n_programs), case.exact, case.magnitude, case.terms
    ):
        assert computed.dtype == case.dtype
        assert_close(computed, exact, magnitude, terms)


@settings(max_examples=100)
@given(case=cases(), n_programs=st.integers(1, 7))
def test_generated(case, n_programs, guarded):
    check(case, guarded, n_programs)


@pytest.mark.parametrize("name", NAMED)
def test_named(name, guarded):
    check(NAMED[name], guarded, n_programs=4)


def test_same_bits_every_run(guarded):
    case = Case((100, 200), 32, 16, 3, 32, torch.float32)
    for first, second in zip(run(case, guarded, 5), run(case, guarded, 5)):
        assert torch.equal(first, second)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("row", [0, 20, 63, 64, 127])
def test_nan_and_inf_stay_in_their_windows(guarded, value, row):
    case = Case((64, 64), 32, 16, 2, 16)
    x, weight, dy = map(guarded.copy, case.inputs)
    starts, groups = map(torch.from_numpy, build_table(case.actual_seq_len, *case.geometry))
    held = (starts <= row) & (row < starts + case.block)

    clean = vector.forward(x, weight, starts, 2)
    x[row] = value
    y = vector.forward(x, weight, starts, 2)
    assert not y[held].isfinite().any()
    assert torch.equal(y[~held], clean[~held])

    clean = vector.grad_input(dy, weight, groups, len(x), case.stride, 2)
    dy[held] = value
    dx = vector.grad_input(dy, weight, groups, len(x), case.stride, 2)
    reached = torch.zeros(len(x), dtype=torch.bool)
    for start in starts[held]:
        reached[start : start + case.block] = True
    assert not dx[reached].isfinite().any()
    assert torch.equal(dx[~reached], clean[~reached])


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
    groups = torch.tensor([[n_far - 48 + i, 16, n_far - 1, n_far, i] for i in (0, 16, 32)])
    dx = vector.grad_input(far, weight, groups, n_far, case.stride, 1)
    assert_close(dx[-48:], case.exact[1], case.magnitude[1], case.terms[1])

    # the one program visits the first window and the last
    starts = torch.zeros(n_far, dtype=torch.int64)
    sizes = vector._tile(case.block, case.n, case.d)
    vector.forward_kernel[(1,)](x, weight, starts, far, n_far, n_far - 1, N=case.n, D=case.d, **sizes, ACC=tl.float32)
    assert_close(far[-1:], case.exact[0], case.magnitude[0], case.terms[0])
