"""FlopCounterMode counts the ops: 2 * T' * block * N * D each."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import nsa

compress = torch.ops.nsa.nsa_compress
grad_input, grad_weight = torch.ops.nsa.nsa_compress_grad_input, torch.ops.nsa.nsa_compress_grad_weight

# segments of 80, 0, 20 and 100 rows, block 32, stride 16: 4, 0, 0 and 5 windows of 32 rows, 2 heads of 16 elements
ENDS = [80, 80, 100, 200]
FLOPS = 18432  # 2 * 9 * 32 * 2 * 16


def leaves(dtype=torch.float32):
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((200, 2, 16), (32, 2))]


def counted(counter, scope="Global"):
    return dict(counter.get_flop_counts()[scope])


@pytest.mark.parametrize("ends", [ENDS, torch.tensor(ENDS)], ids=["default", "offsets"])
def test_forward_and_backward(ends):
    x, weight = leaves()
    with FlopCounterMode(display=False) as forward:
        y = compress(x, weight, 32, 16, actual_seq_len=ends)
    assert counted(forward) == {compress: FLOPS}
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert counted(backward) == {grad_input: FLOPS, grad_weight: FLOPS}


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context):
    x, weight = leaves()
    with context(), FlopCounterMode(display=False) as counter:
        compress(x, weight, 32, 16, actual_seq_len=ENDS)
    assert counted(counter) == {compress: FLOPS}


def test_only_what_is_computed():
    x, weight = leaves()
    y = compress(x.detach(), weight, 32, 16, actual_seq_len=ENDS)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counted(counter) == {grad_weight: FLOPS}


def test_no_window():
    x, weight = leaves()
    with FlopCounterMode(display=False) as counter:
        compress(x[:20], weight, 32, 16, actual_seq_len=[20]).sum().backward()
    assert counter.get_total_flops() == 0


class Pool(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(32, 2, dtype=torch.bfloat16))

    def forward(self, x):
        return nsa.nsa_compress(x, self.weight, 32, 16, actual_seq_len=ENDS)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.keys, self.values = Pool(), Pool()

    def forward(self, x):
        # of a tensor that both take, PyTorch cannot tell whose gradient it has
        return self.keys(2 * x) + self.values(3 * x)


def test_in_a_hierarchy_of_modules():
    x, _ = leaves(torch.bfloat16)
    with FlopCounterMode(display=False) as counter:
        Layer()(x).sum().backward()
    once = {compress: FLOPS, grad_input: FLOPS, grad_weight: FLOPS}
    for pool in ("Layer.keys", "Layer.values"):
        assert counted(counter, pool) == once
    assert counted(counter) == counted(counter, "Layer") == {op: 2 * flops for op, flops in once.items()}


@pytest.mark.parametrize("first", ["import nsa", "import torch.utils.flop_counter"])
def test_whichever_is_imported_first(first):
    """PyTorch's module imports Triton, which is slow and may be broken: `import nsa` alone does not."""
    code = f"""
import sys, torch
{first}
assert "flop" in {first!r} or "torch.utils.flop_counter" not in sys.modules
import nsa
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    torch.ops.nsa.nsa_compress(torch.ones(16, 1, 16), torch.ones(16, 1), 16, 16, actual_seq_len=[16])
assert counter.get_total_flops() == 2 * 16 * 16
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_module_of_ours_that_is_loaded_again():
    code = """
import importlib, torch, nsa
from nsa.importing import after_import
after_import("torch.utils.flop_counter", lambda: importlib.import_module("nsa.flops").register())  # as a reload would
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    torch.ops.nsa.nsa_compress(torch.ones(16, 1, 16), torch.ones(16, 1), 16, 16, actual_seq_len=[16])
assert counter.get_total_flops() == 2 * 16 * 16
"""
    subprocess.run([sys.executable, "-c", code], check=True)
