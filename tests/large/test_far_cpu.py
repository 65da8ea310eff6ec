"""The op on the CPU, and its gradients, past 2^31 elements of x and dx; then of y and dy, for which x has 2^35.

The numbers fit in less memory than a dx of 2^35 elements, which is not made: see the last test.
"""

from types import SimpleNamespace

import pytest
import torch
from cases import Case
from far import FAR, FarPack, far_results, untouched
from tolerance import assert_close

import nsa.op  # noqa: F401  registers the ops
from nsa.cpu import native

NUMBERS = Case((), 32, 16, 10, 96, torch.float16)
ROW = FAR // (NUMBERS.n * NUMBERS.d)  # in whose midst element 2^31 of x is
OVERLAP = NUMBERS, (FAR // 2, FAR)
APART = Case((), 16, 16, 10, 96, torch.float16), (FAR, 16 * FAR)
PACKS = {
    "one segment": ((ROW + 1001,), *OVERLAP),
    "border before 2^31": ((ROW - 7, 0, 1008), *OVERLAP, True),
    "border after 2^31": ((1000, ROW - 999, 1000), *OVERLAP),
    "2^35": ((16 * ROW + 3003,), *APART),
}
ops = torch.ops.nsa


@pytest.fixture(params=PACKS)
def pack(request):
    return FarPack(*PACKS[request.param])


def test_forward(pack):
    with far_results():
        y = ops.nsa_compress(pack.x, pack.weight, *pack.numbers.geometry, actual_seq_len=pack.actual_seq_len)
    pack.check_forward(y)


def test_grad_weight(pack):
    with far_results():
        dw = ops.nsa_compress_grad_weight(pack.dy, pack.x, *pack.numbers.geometry, actual_seq_len=pack.actual_seq_len)
    pack.check_grad_weight(dw)


@pytest.mark.parametrize("name", [name for name in PACKS if name != "2^35"])
def test_grad_input(name):
    pack = FarPack(*PACKS[name])
    with far_results():
        dx = ops.nsa_compress_grad_input(
            pack.dy, pack.weight, *pack.numbers.geometry, actual_seq_len=pack.actual_seq_len
        )
    pack.check_grad_input(dx)


def test_grad_input_of_windows_past_2_31():
    """A stand-in for a table whose only rows have windows around the number of element 2^31 of dy."""
    case = Case((400,), 32, 16, 10, 96, torch.float16)
    x, weight, case_dy = case.inputs
    first = ROW - case.n_windows // 2
    dy = untouched((ROW + case.n_windows, case.n, case.d), case.dtype)
    dy[first : first + case.n_windows] = case_dy
    begins = torch.tensor([[0, len(x)], [first, first + case.n_windows]])
    dx = native.grad_input(dy, weight, SimpleNamespace(begins=begins, block=case.block, stride=case.stride), len(x))
    assert_close(dx, case.exact[1], case.magnitude[1], case.terms[1])
