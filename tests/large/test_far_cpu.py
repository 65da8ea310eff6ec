"""The op on the CPU, and its gradients, past 2^31 elements of x and dx; then of y and dy, with 2^35 elements of x.

A dx of 2^35 elements would be written, and take 64 GiB. A stand-in for a table has fewer rows.
"""

from types import SimpleNamespace

import pytest
import torch
from cases import Case
from far import FAR, FarPack, far_results, untouched
from tolerance import assert_close

import nsa.op  # noqa: F401  registers the ops
from nsa.cpu import native

N, D = 10, 96
ROW = FAR // (N * D)  # in whose midst element 2^31 of x is
NUMBERS = Case((), 32, 16, N, D, torch.float16)
ELEMENTS = (FAR // 2, FAR)
PACKS = {
    "one segment": FarPack((ROW + 1001,), NUMBERS, ELEMENTS),
    "border before 2^31": FarPack((ROW - 7, 0, 1008), NUMBERS, ELEMENTS, bad=True),
    "border after 2^31": FarPack((1000, ROW - 999, 1000), NUMBERS, ELEMENTS),
    "2^35": FarPack((16 * ROW + 3003,), Case((), 16, 16, N, D, torch.float16), (FAR, 16 * FAR)),
}
ops = torch.ops.nsa


def packs(*names):
    return pytest.mark.parametrize("pack", [PACKS[name] for name in names], ids=names)


@packs(*PACKS)
def test_forward(pack):
    with far_results():
        y = ops.nsa_compress(pack.x, pack.weight, *pack.numbers.geometry, actual_seq_len=pack.actual_seq_len)
    pack.check_forward(y)


@packs(*PACKS)
def test_grad_weight(pack):
    with far_results():
        dw = ops.nsa_compress_grad_weight(pack.dy, pack.x, *pack.numbers.geometry, actual_seq_len=pack.actual_seq_len)
    pack.check_grad_weight(dw)


@packs("one segment", "border before 2^31", "border after 2^31")
def test_grad_input(pack):
    with far_results():
        dx = ops.nsa_compress_grad_input(
            pack.dy, pack.weight, *pack.numbers.geometry, actual_seq_len=pack.actual_seq_len
        )
    pack.check_grad_input(dx)


def test_grad_input_of_windows_past_2_31():
    """A stand-in for a table whose only rows have windows around the number of element 2^31 of dy."""
    case = Case((400,), 32, 16, N, D, torch.float16)
    x, weight, case_dy = case.inputs
    first = ROW - case.n_windows // 2
    dy = untouched((ROW + case.n_windows, case.n, case.d), case.dtype)
    dy[first : first + case.n_windows] = case_dy
    begins = torch.tensor([[0, len(x)], [first, first + case.n_windows]])
    dx = native.grad_input(dy, weight, SimpleNamespace(begins=begins, block=case.block, stride=case.stride), len(x))
    assert_close(dx, case.exact[1], case.magnitude[1], case.terms[1])
