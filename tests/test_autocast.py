"""Under autocast: a module with fp32 parameters, as `torch.nn.functional.linear` behaves in it."""

import pytest
import torch
from torch.nn.functional import linear

import nsa

HALF = [torch.float16, torch.bfloat16]
compress = torch.ops.nsa.nsa_compress
SEQ = [50, 96]


class Attention(torch.nn.Module):
    """The ordinary loop: a Linear makes the input, the weight is a parameter in fp32."""

    def __init__(self, call):
        super().__init__()
        torch.manual_seed(0)
        self.call, self.proj = call, torch.nn.Linear(48, 48)
        self.weight = torch.nn.Parameter(torch.randn(32, 3))

    def forward(self, x):
        return self.call(self.proj(x).unflatten(1, (3, 16)), self.weight, 32, 16, actual_seq_len=SEQ)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("call", [nsa.nsa_compress, compress, compress.default], ids=["function", "op", "overload"])
def test_linear_and_compression_in_the_autocast_dtype(call, dtype):
    module, x = Attention(call), torch.randn(96, 48)
    with torch.autocast("cpu", dtype=dtype):
        h = module.proj(x)
        assert h.dtype == dtype
        y = module(x)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    assert module.weight.grad.dtype == torch.float32
    # by hand
    weight = module.weight.detach().to(dtype).requires_grad_()
    expected = compress(h.unflatten(1, (3, 16)), weight, 32, 16, actual_seq_len=SEQ)
    expected.float().square().sum().backward()
    assert torch.equal(y, expected)
    assert torch.equal(module.weight.grad, weight.grad.float())


@pytest.mark.parametrize("a", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("b", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_mixed_dtypes_do_what_linear_does(a, b):
    x, weight = torch.randn(96, 3, 16, dtype=a), torch.randn(32, 3, dtype=b)
    calls = [compress, lambda *args, **kwargs: compress.offsets(*args, torch.tensor(kwargs["actual_seq_len"]))]
    if torch.float64 not in (a, b):  # which the specification does not take
        calls.append(nsa.nsa_compress)
    for call in calls:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            try:
                expected = linear(torch.zeros(4, 8, dtype=a), torch.zeros(2, 8, dtype=b)).dtype
            except RuntimeError:  # fp64 stays, and meets another dtype
                with pytest.raises(TypeError, match="same dtype"):
                    call(x, weight, 32, 16, actual_seq_len=SEQ)
            else:
                assert call(x, weight, 32, 16, actual_seq_len=SEQ).dtype == expected


@pytest.mark.parametrize("call", [nsa.nsa_compress, compress])
def test_outside_autocast_mixed_dtypes_are_refused(call):
    x, weight = torch.randn(96, 3, 16).bfloat16(), torch.randn(32, 3)
    with pytest.raises(TypeError, match=r"same dtype, got torch.bfloat16 and torch.float32"):
        call(x, weight, 32, 16, actual_seq_len=SEQ)
    inner = torch.autocast("cpu", enabled=False)
    with torch.autocast("cpu", dtype=torch.bfloat16), inner, pytest.raises(TypeError, match="same dtype"):
        call(x, weight, 32, 16, actual_seq_len=SEQ)


def test_gradient_ops():
    dy, weight = torch.randn(3, 3, 16).bfloat16(), torch.randn(32, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dx = torch.ops.nsa.nsa_compress_grad_input(dy, weight, 32, 16, actual_seq_len=SEQ)
        dw = torch.ops.nsa.nsa_compress_grad_weight(dy, dx.float(), 32, 16, actual_seq_len=SEQ)
    assert dx.dtype == dw.dtype == torch.bfloat16


def test_backward_inside_autocast_is_in_the_dtype_of_the_forward():
    """Many training loops call backward() before they leave autocast."""
    x, weight = torch.randn(96, 3, 16, requires_grad=True), torch.randn(32, 3, requires_grad=True)
    y = compress(x, weight, 32, 16, actual_seq_len=SEQ)
    grads = torch.autograd.grad(y.square().sum(), (x, weight), retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for a, b in zip(grads, torch.autograd.grad(y.square().sum(), (x, weight))):
            assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("call", [nsa.nsa_compress, compress])
def test_compiled(call):
    torch._dynamo.reset()
    module, x = Attention(call), torch.randn(96, 48)
    results = []
    for function in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        module.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = function(x)
        y.float().square().sum().backward()
        results.append((y, module.weight.grad, module.proj.weight.grad))
    for eager, compiled in zip(*results):
        assert eager.dtype == compiled.dtype
        assert torch.equal(eager, compiled)


@pytest.mark.parametrize("key", ["AutocastCPU", "AutocastCUDA", "AutocastPrivateUse1"])  # the last is the NPU's
def test_every_device(key):
    for name in ("nsa_compress", "nsa_compress_grad_input", "nsa_compress_grad_weight"):
        for overload in ("", ".offsets"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"nsa::{name}{overload}", key)
