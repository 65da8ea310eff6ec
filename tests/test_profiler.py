"""What `torch.profiler` shows: one line for each call of an op, and nodes of autograd that bear its name."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import nsa

FORWARD, GRAD_INPUT, GRAD_WEIGHT = "nsa::nsa_compress", "nsa::nsa_compress_grad_input", "nsa::nsa_compress_grad_weight"


def leaves(dtype=torch.bfloat16, requires_grad=True):
    shapes = ((70, 2, 16), (32, 2), (2, 2, 16))
    return [torch.randn(shape, dtype=dtype, requires_grad=requires_grad) for shape in shapes]


def profiled(function):
    """What the function returns, the project's ops in the order in which they ran, and autograd's nodes."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        result = function()
    names = [event.name for event in sorted(found.events(), key=lambda event: event.time_range.start)]
    nodes = [name for name in names if name.startswith("Nsa") and name.endswith("Backward")]
    return result, [name for name in names if name.startswith("nsa::")], nodes


@pytest.mark.parametrize("seq", [[20, 70], torch.tensor([20, 70])], ids=["list", "tensor"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_each_op_once(seq, autocast, requires_grad):
    x, weight, _ = leaves(requires_grad=requires_grad)
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        y, ops, nodes = profiled(lambda: nsa.nsa_compress(x, weight, 32, 16, actual_seq_len=seq))
    assert (ops, nodes) == ([FORWARD], [])
    assert y.dtype == (torch.float16 if autocast else torch.bfloat16)
    if requires_grad:
        assert type(y.grad_fn).__name__ == "NsaCompressBackward"
        _, ops, nodes = profiled(y.sum().backward)
        assert (ops, nodes) == ([GRAD_INPUT, GRAD_WEIGHT], ["NsaCompressBackward"])


@pytest.mark.parametrize(
    ("op", "node", "of_gradients"),
    [
        (torch.ops.nsa.nsa_compress_grad_input, "NsaCompressGradInputBackward", [FORWARD, GRAD_WEIGHT]),
        (torch.ops.nsa.nsa_compress_grad_weight, "NsaCompressGradWeightBackward", [FORWARD, GRAD_INPUT]),
    ],
)
@pytest.mark.parametrize("overload", ["default", "offsets"])
def test_each_gradient_op_once(op, node, of_gradients, overload):
    x, weight, dy = leaves()
    other = weight if "input" in str(op) else x
    seq = [20, 70] if overload == "default" else torch.tensor([20, 70])
    result, ops, _ = profiled(lambda: getattr(op, overload)(dy, other, 32, 16, actual_seq_len=seq))
    assert ops == [str(op).replace(".", "::")]
    assert type(result.grad_fn).__name__ == node
    _, ops, nodes = profiled(result.sum().backward)
    assert (ops, nodes) == (of_gradients, [node])
