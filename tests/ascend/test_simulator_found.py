"""What the simulator found in kernels as the compiler makes them, each reproduced small, beside what avoids it.

docs/simulator.md says what each did to the project's kernels. If one of these tests fails after the compiler or its
library was changed, the fault may be gone, and what avoids it in the kernels too.
"""

import pytest
import torch
import triton
import triton.language as tl

from nsa.ascend.simulator import simulate
from nsa.triton_ascend import find_extract_slice

A2 = "Ascend910B3"
extract_slice = find_extract_slice()


def numbers(*sizes):
    return torch.randn(sizes, generator=torch.Generator().manual_seed(0)).bfloat16()


@triton.jit
def second_half(a, b, c, ROWS: tl.constexpr):
    """c = a[16:] @ b with a [32, 32] cut by rows, or a[:, 32:] @ b with a [16, 64] cut by columns."""
    o_16, o_32, o_64 = tl.arange(0, 16), tl.arange(0, 32), tl.arange(0, 64)
    b_b = tl.load(b + o_32[:, None] * 32 + o_32[None, :])
    if ROWS:
        b_a = extract_slice(tl.load(a + o_32[:, None] * 32 + o_32[None, :]), [16, 0], [16, 32], [1, 1])
    else:
        b_a = extract_slice(tl.load(a + o_16[:, None] * 64 + o_64[None, :]), [0, 32], [16, 32], [1, 1])
    tl.store(c + o_16[:, None] * 32 + o_32[None, :], tl.dot(b_a, b_b))


@pytest.mark.parametrize("rows", [True, False])
def test_a_left_operand_cut_by_rows_is_read_as_if_it_were_contiguous(rows):
    a, b, c = numbers(32, 32) if rows else numbers(16, 64), numbers(32, 32), torch.empty(16, 32)
    report = simulate(second_half, {"a": a, "b": b, "c": c, "ROWS": rows}, (1,), A2)
    assert not report.launch.faults
    exact = (a[16:] if rows else a[:, 32:]).float() @ b.float()
    assert torch.allclose(c, exact, atol=1e-4) != rows


@triton.jit
def sum_of_products(a, b, c, sizes, n, MASKED: tl.constexpr):
    """c = sum of a[i] @ b[i]^T, of which b[i] has sizes[i] rows that count."""
    o_16, o_32 = tl.arange(0, 16), tl.arange(0, 32)
    b_c = tl.zeros([16, 32], tl.float32)
    for i in range(n):
        size = tl.load(sizes + i).to(tl.int32)
        b_b = tl.load(b + i * 1024 + o_32[:, None] * 32 + o_32[None, :], mask=(o_32 < size)[:, None], other=0)
        b_c = tl.dot(tl.load(a + i * 512 + o_16[:, None] * 32 + o_32[None, :]), tl.trans(b_b), b_c)
    if MASKED:
        longest = tl.load(sizes).to(tl.int32)
        tl.store(c + o_16[:, None] * 32 + o_32[None, :], b_c, mask=(o_32 < longest)[None, :])
    else:
        tl.store(c + o_16[:, None] * 32 + o_32[None, :], b_c)


@pytest.mark.parametrize("masked", [True, False])
def test_sums_of_masked_rows_are_never_written_where_no_row_counts(masked):
    a, b, c = numbers(2, 16, 32), numbers(2, 32, 32), torch.zeros(16, 32)
    arguments = {"a": a, "b": b, "c": c, "sizes": torch.tensor([16, 8]), "n": 2, "MASKED": masked}
    report = simulate(sum_of_products, arguments, (1,), A2)
    assert [fault.check for fault in report.launch.faults] == ([] if masked else ["never written"])


@triton.jit(do_not_specialize=["first"])
def every_second(x, first, y, COLUMN: tl.constexpr):
    o = tl.arange(0, 32)
    if COLUMN:
        b = tl.trans(tl.load(x + first + o[:, None] * 2 + tl.arange(0, 1)[None, :]))
        tl.store(y + tl.arange(0, 1)[:, None] * 32 + o[None, :], b)
    else:
        tl.store(y + o, tl.load(x + first + o * 2))


@pytest.mark.parametrize("column", [True, False])
def test_a_vector_of_stride_2_is_loaded_past_its_end(column):
    x, y = numbers(64), torch.empty(32).bfloat16()
    report = simulate(every_second, {"x": x, "first": 1, "y": y, "COLUMN": column}, (1,), A2)
    assert [fault.check for fault in report.launch.faults] == ([] if column else ["access outside"])
    if column:
        assert torch.equal(y, x[1::2])


@triton.jit
def written_twice(scratch, weight, x, c, TWICE: tl.constexpr):
    """c = a @ x with a [16, 32] in memory: the weights in columns 0 to 15 of each row, zeros in the others."""
    o_16, o_32 = tl.arange(0, 16), tl.arange(0, 32)
    if TWICE:
        tl.store(scratch + o_16[:, None] * 32 + o_32[None, :], tl.zeros([16, 32], tl.bfloat16))
    else:
        tl.store(scratch + o_16[:, None] * 32 + 16 + o_16[None, :], tl.zeros([16, 16], tl.bfloat16))
    b_weight = tl.load(weight + o_16)
    for row in range(16):
        tl.store(scratch + row * 32 + o_16, b_weight)
    b_a = tl.load(scratch + o_16[:, None] * 32 + o_32[None, :])
    tl.store(c + o_16[:, None] * 32 + o_32[None, :], tl.dot(b_a, tl.load(x + o_32[:, None] * 32 + o_32[None, :])))


@pytest.mark.parametrize("twice", [True, False])
def test_two_vector_cores_that_write_one_element_have_no_order(twice):
    weight, x, c = numbers(16), numbers(32, 32), torch.empty(16, 32)
    arguments = {"scratch": torch.empty(512).bfloat16(), "weight": weight, "x": x, "c": c, "TWICE": twice}
    report = simulate(written_twice, arguments, (1,), A2)
    assert {fault.check for fault in report.launch.faults} == ({"race in memory"} if twice else set())


@triton.jit(do_not_specialize=["first"])
def carried_sum(a, c, last, first, n, LITERAL: tl.constexpr):
    """c[i] = the sum of a[j] @ a[j] for j < i, last = the sum of all."""
    o = tl.arange(0, 32)
    p = o[:, None] * 32 + o[None, :]
    b_sum = tl.zeros([32, 32], tl.float32)
    if not LITERAL:
        b_sum += first
    for i in range(n):
        b_a = tl.load(a + i * 1024 + p)
        tl.store(c + i * 1024 + p, b_sum.to(tl.bfloat16))
        b_sum += tl.dot(b_a, b_a)
    tl.store(last + p, b_sum)


@pytest.mark.parametrize("literal", [True, False])
def test_a_sum_of_products_that_begins_with_zeros_is_never_written_where_its_trip_reads_it(literal):
    a, c, last = numbers(3, 32, 32), torch.empty(3, 32, 32).bfloat16(), torch.empty(32, 32)
    arguments = {"a": a, "c": c, "last": last, "first": 0.0, "n": 3, "LITERAL": literal}
    report = simulate(carried_sum, arguments, (1,), A2)
    assert [fault.check for fault in report.launch.faults] == (["never written"] if literal else [])
    sums = (a.float() @ a.float()).cumsum(0)
    torch.testing.assert_close(last, sums[-1], rtol=1e-4, atol=1e-4)
    if not literal:
        torch.testing.assert_close(c, torch.cat([torch.zeros(1, 32, 32), sums[:-1]]).bfloat16())
