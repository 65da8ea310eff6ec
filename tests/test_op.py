"""The registered ops on the CPU: numbers, gradients, fake kernels, torch.compile, and what is not done."""

import subprocess
import sys
from unittest import mock

import pytest
import torch
from cases import NAMED, Case, cases
from hypothesis import given, settings
from tolerance import assert_close

import nsa
from nsa import cpu

PACKETS = [
    torch.ops.nsa.nsa_compress,
    torch.ops.nsa.nsa_compress_grad_input,
    torch.ops.nsa.nsa_compress_grad_weight,
]
compress = torch.ops.nsa.nsa_compress


def run(case, x, weight, dy):
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = compress(x, weight, *case.geometry, actual_seq_len=case.actual_seq_len)
    return y.detach(), *torch.autograd.grad(y, (x, weight), dy)


def check(case, *inputs):
    for computed, like, exact, magnitude, terms in zip(
        run(case, *inputs), (inputs[2], inputs[0], inputs[1]), case.exact, case.magnitude, case.terms
    ):
        assert computed.dtype == case.dtype
        assert computed.is_contiguous()
        assert computed.shape == like.shape
        assert_close(computed, exact, magnitude, terms)


@settings(max_examples=50)  # of the way through the op: what each backend computes is test_cpu.py's
@given(case=cases())
def test_generated(case):
    check(case, *case.inputs)


@pytest.mark.parametrize("name", NAMED)
def test_named(name):
    check(NAMED[name], *NAMED[name].inputs)


def test_non_contiguous():
    case = Case((70, 50), 32, 16, 3, 48)
    x, weight, dy = case.inputs
    wide = torch.zeros(case.n, sum(case.lengths), 2 * case.d, dtype=case.dtype)
    wide[..., ::2] = x.transpose(0, 1)
    strided = wide[..., ::2].transpose(0, 1)
    assert not strided.is_contiguous()
    check(case, strided, weight.t().contiguous().t(), dy.transpose(0, 2).contiguous().transpose(0, 2))


def test_expanded_gradient():
    """sum() sends back one element, expanded over the whole shape."""
    case = Case((70, 50), 32, 16, 3, 48, torch.float64)
    x, weight, dy = case.inputs
    expanded = run(case, x, weight, torch.ones(()).double().expand_as(dy))
    for a, b in zip(expanded, run(case, x, weight, torch.ones_like(dy))):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_public_function_is_the_op(dtype):
    case = Case((70, 50), 32, 16, 3, 48, dtype)
    x, weight, _ = case.inputs
    arguments = (x, weight, *case.geometry)
    y = nsa.nsa_compress(*arguments, actual_seq_len=case.actual_seq_len)
    assert torch.equal(y, compress(*arguments, actual_seq_len=case.actual_seq_len))


def test_no_window_launches_nothing():
    x = torch.randn(40, 2, 16, requires_grad=True)
    weight = torch.randn(32, 2, requires_grad=True)
    with mock.patch.multiple(cpu, forward=None, grad_input=None, grad_weight=None):  # a call would fail
        y = compress(x, weight, 32, 16, actual_seq_len=[20, 40])
        y.sum().backward()
    assert y.shape == (0, 2, 16)
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True), (False, False)])
def test_each_gradient_only_if_needed(wanted):
    x = torch.randn(64, 2, 16, requires_grad=wanted[0])
    weight = torch.randn(32, 2, requires_grad=wanted[1])
    unwanted = {
        name: mock.Mock(side_effect=AssertionError(name))
        for name, is_wanted in zip(("grad_input", "grad_weight"), wanted)
        if not is_wanted
    }
    with mock.patch.multiple(cpu, forward=cpu.forward, **unwanted):
        y = compress(x, weight, 32, 16, actual_seq_len=[64])
        assert y.requires_grad == any(wanted)
        if any(wanted):
            y.sum().backward()
    assert (x.grad is not None, weight.grad is not None) == wanted


def test_saves_only_what_a_gradient_needs():
    saved = []
    x, weight = torch.randn(64, 2, 16, requires_grad=True), torch.randn(32, 2)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        compress(x, weight, 32, 16, actual_seq_len=[64])
    assert saved == [weight.shape]


def test_gradcheck_and_gradgradcheck():
    x = torch.randn(70, 2, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(32, 2, dtype=torch.float64, requires_grad=True)
    for block, stride in ((32, 16), (32, 32)):
        call = lambda x, w, g=(block, stride): compress(x, w, *g, actual_seq_len=[20, 70])  # noqa: E731
        assert torch.autograd.gradcheck(call, (x, weight), fast_mode=True)
        assert torch.autograd.gradgradcheck(call, (x, weight), fast_mode=True)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # opcheck's own, from torch 2.14 on
@pytest.mark.parametrize("i_op", range(3))
@pytest.mark.parametrize(
    ("seq", "dtype"), [([20, 70], torch.bfloat16), ([5, 10], torch.float32)]
)  # the second: no window
def test_opcheck(i_op, seq, dtype):
    n_windows = len(compress(torch.zeros(seq[-1], 3, 16), torch.zeros(32, 3), 32, 16, actual_seq_len=seq))
    x, weight, dy = (
        torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((seq[-1], 3, 16), (32, 3), (n_windows, 3, 16))
    )
    pair = ((x, weight), (dy, weight), (dy, x))[i_op]
    packet = PACKETS[i_op]
    torch.library.opcheck(packet.default, (*pair, 32, 16), {"actual_seq_len": seq})
    torch.library.opcheck(packet.offsets, (*pair, 32, 16, torch.tensor(seq)), {})


def test_meta_tensors_have_the_shape():
    y = compress(torch.zeros(70, 3, 16, device="meta"), torch.zeros(32, 3, device="meta"), 32, 16, actual_seq_len=[70])
    assert y.shape == (3, 3, 16)
    assert y.device.type == "meta"


def test_package_works_where_triton_is_missing():
    code = """
import sys
sys.modules["triton"] = None
import torch, nsa
y = nsa.nsa_compress(torch.ones(32, 1, 16).half(), torch.ones(32, 1).half(), 32, 16, actual_seq_len=[32])
assert (y == 32).all()
from nsa import accelerator
try:
    accelerator.forward(torch.ones(32, 1, 16).half(), None, None)
except RuntimeError as error:
    assert "triton is missing" in str(error) and "nsa-ascend[cuda]" in str(error), error
else:
    raise SystemExit("no error")
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_other_libraries_may_add_to_the_namespace():
    code = """
import torch
before = torch.library.Library("nsa", "FRAGMENT")
before.define("defined_before(Tensor x) -> Tensor")
import nsa
after = torch.library.Library("nsa", "DEF")  # of which a namespace can have one
after.define("defined_after(Tensor x) -> Tensor")
for library, name in ((before, "defined_before"), (after, "defined_after")):
    library.impl(name, lambda x: x + 1, "CompositeImplicitAutograd")
    assert getattr(torch.ops.nsa, name)(torch.ones(1)) == 2
y = torch.ops.nsa.nsa_compress(torch.ones(32, 1, 16), torch.ones(32, 1), 32, 16, actual_seq_len=[32])
assert (y == 32).all()
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
