"""Both families of kernels past 2^31 elements of x and dx, as native code by way of the Ascend toolchain.

Past 2^31 elements of y and dy, with stand-ins for tables: tests/test_kernels.py and tests/ascend/test_offsets.py.
"""

import pytest
import torch
from cases import Case
from far import FAR, FarPack, far_results
from machines import A2

from nsa import accelerator
from nsa.accelerator import Machine
from nsa.table import WindowTable

N, D = 10, 96
ROW = FAR // (N * D)  # in whose midst element 2^31 of x is
ELEMENTS = (FAR // 2, FAR)
# programs free their buffers when they end: the more there are, the less memory the host driver needs
MACHINE = Machine(cube_programs=20, vector_programs=40, plan=A2)
ONE_SEGMENT, BORDER = (ROW + 1001,), (ROW - 7, 0, 1008)
PACKS = {
    "cube, one segment": FarPack(ONE_SEGMENT, Case((), 32, 16, N, D, torch.float16), ELEMENTS),
    "cube and repair, border": FarPack(BORDER, Case((), 48, 32, N, D, torch.bfloat16), ELEMENTS, bad=True),
    "vector, one segment": FarPack(ONE_SEGMENT, Case((), 16, 16, N, D, torch.float16), ELEMENTS),
    "vector, border": FarPack(BORDER, Case((), 32, 32, N, D, torch.bfloat16), ELEMENTS, bad=True),
}


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    """So that as much memory is needed on machines of more cores."""
    monkeypatch.setattr("os.cpu_count", lambda: 2)


@pytest.fixture(params=PACKS)
def pack(request):
    pack = PACKS[request.param]
    family = accelerator.family_of(pack.numbers.dtype, *pack.numbers.geometry)
    assert request.param.startswith(family)
    return pack


@pytest.fixture
def table(pack):
    return WindowTable(pack.actual_seq_len, *pack.numbers.geometry, torch.device("cpu"))


def test_forward(pack, table):
    with far_results():
        y = accelerator.forward(pack.x, pack.weight, table, MACHINE)
    pack.check_forward(y)


def test_grad_input(pack, table):
    with far_results():
        dx = accelerator.grad_input(pack.dy, pack.weight, table, pack.actual_seq_len[-1], MACHINE)
    pack.check_grad_input(dx)


def test_grad_weight(pack, table):
    with far_results():
        dw = accelerator.grad_weight(pack.dy, pack.x, table, MACHINE)
    pack.check_grad_weight(dw)
