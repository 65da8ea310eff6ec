"""The drop-in for torch_npu, with a stand-in for the vendor's module."""

import subprocess
import sys
from types import ModuleType

import pytest
import torch
from cases import Case
from tolerance import assert_close

import nsa
from nsa import dropin

CASE = Case((80, 0, 33, 64), 32, 16, 3, 48)


def vendors_compress():
    raise AssertionError("the vendor's function was called")


def vendors_compress_grad():
    raise AssertionError("the vendor's gradient was called")


@pytest.fixture
def torch_npu(monkeypatch):
    module = ModuleType("torch_npu")
    module.npu_nsa_compress, module.npu_nsa_compress_grad = vendors_compress, vendors_compress_grad
    monkeypatch.setitem(sys.modules, "torch_npu", module)
    return module


def is_ours(module):
    ours = (module.npu_nsa_compress is nsa.nsa_compress, module.npu_nsa_compress_grad is dropin.nsa_compress_grad)
    vendors = (module.npu_nsa_compress is vendors_compress, module.npu_nsa_compress_grad is vendors_compress_grad)
    assert ours in ((True, True), (False, False))  # both or none
    assert vendors == tuple(not one for one in ours)
    return ours[0]


def test_decode_is_replaced_where_there_is_one(torch_npu):
    with dropin.replace_torch_npu():
        assert not hasattr(torch_npu, "npu_nsa_compress_infer")
    torch_npu.npu_nsa_compress_infer = vendors_compress
    with dropin.replace_torch_npu():
        assert torch_npu.npu_nsa_compress_infer is nsa.nsa_compress_infer
    assert torch_npu.npu_nsa_compress_infer is vendors_compress
    assert not is_ours(torch_npu)


def test_gradients_by_the_vendors_signature():
    x, weight, dy = CASE.inputs
    results = dropin.nsa_compress_grad(dy, x, weight, 32, 16, actual_seq_len=CASE.actual_seq_len)
    assert isinstance(results, tuple)
    for computed, exact, magnitude, terms in zip(results, CASE.exact[1:], CASE.magnitude[1:], CASE.terms[1:]):
        assert computed.dtype == x.dtype
        assert_close(computed, exact, magnitude, terms)


@pytest.mark.parametrize(
    ("place", "wrong", "error", "message"),
    [
        (0, [1.0], TypeError, "grad_output must be a torch.Tensor, got list"),
        (1, torch.zeros(177, 3, 48), TypeError, "input and weight must have the same dtype"),
        (0, torch.zeros(9, 3, 48, dtype=torch.bfloat16), RuntimeError, r"grad_output must have T' = \d+ rows"),
        (0, torch.zeros(8, 3, 48), TypeError, "grad_output and input must have the same dtype"),
        (2, None, TypeError, "weight must be a torch.Tensor, got NoneType"),
        (3, 32.0, TypeError, "compress_block_size must be an int, got float"),
    ],
)
def test_gradients_of_wrong_arguments(place, wrong, error, message):
    x, weight, dy = CASE.inputs
    arguments = [dy, x, weight, 32, 16]
    arguments[place] = wrong
    with pytest.raises(error, match=message):
        dropin.nsa_compress_grad(*arguments, actual_seq_len=CASE.actual_seq_len)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_take_the_dtypes_of_the_public_function(dtype):
    x, weight, dy = (tensor.to(dtype) for tensor in CASE.inputs)
    with pytest.raises(TypeError, match=r"must be one of .*bfloat16, got"):
        dropin.nsa_compress_grad(dy, x, weight, 32, 16, actual_seq_len=CASE.actual_seq_len)


def test_code_for_torch_npu_runs_ours(torch_npu):
    x, weight, dy = CASE.inputs
    x.requires_grad_()
    weight.requires_grad_()
    arguments = {"actual_seq_len": CASE.actual_seq_len}
    with dropin.replace_torch_npu():
        y = torch_npu.npu_nsa_compress(x, weight, 32, 16, **arguments)
        grads = torch_npu.npu_nsa_compress_grad(dy, x.detach(), weight.detach(), 32, 16, **arguments)
    assert torch.equal(y, nsa.nsa_compress(x, weight, 32, 16, **arguments))
    assert all(map(torch.equal, grads, torch.autograd.grad(y, (x, weight), dy)))
    assert not is_ours(torch_npu)


def test_restored_after_an_exception(torch_npu):
    with pytest.raises(TypeError, match="got NoneType"), dropin.replace_torch_npu():
        torch_npu.npu_nsa_compress(None, None, 32, 16, actual_seq_len=[32])
    assert not is_ours(torch_npu)


def test_nested(torch_npu):
    with dropin.replace_torch_npu():
        with dropin.replace_torch_npu():
            assert is_ours(torch_npu)
        assert is_ours(torch_npu)
    assert not is_ours(torch_npu)


def test_a_replacement_serves_one_block(torch_npu):
    replacement = dropin.replace_torch_npu()
    with replacement, pytest.raises(RuntimeError, match="not entered or restored before"), replacement:
        pass
    with pytest.raises(RuntimeError, match="not entered or restored before"), replacement:
        pass


def test_what_a_third_has_put_there_meanwhile_stays(torch_npu):
    with dropin.replace_torch_npu():
        torch_npu.npu_nsa_compress = len
    assert torch_npu.npu_nsa_compress is len


def test_as_a_plain_function_restored_in_any_order(torch_npu):
    first, second = dropin.replace_torch_npu(), dropin.replace_torch_npu()
    first.restore()
    first.restore()
    assert is_ours(torch_npu)
    second.restore()
    assert not is_ours(torch_npu)


def test_nothing_happens_at_import():
    """In a process that has not imported the drop-in yet."""
    code = (
        "import sys, types; module = types.ModuleType('torch_npu'); sys.modules['torch_npu'] = module; "
        "module.npu_nsa_compress = module.npu_nsa_compress_grad = None; import nsa, nsa.dropin; "
        "assert module.npu_nsa_compress is module.npu_nsa_compress_grad is None"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_torch_npu(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    with pytest.raises(RuntimeError, match=r"expected the package torch_npu, .* not installed"):
        dropin.replace_torch_npu()


def test_a_torch_npu_that_has_not_both(torch_npu):
    torch_npu.__version__ = "2.1.0"
    del torch_npu.npu_nsa_compress_grad
    with pytest.raises(RuntimeError, match=r"got 2.1.0 without npu_nsa_compress_grad"):
        dropin.replace_torch_npu()
    assert torch_npu.npu_nsa_compress is vendors_compress


def test_a_torch_npu_that_cannot_be_imported(monkeypatch, tmp_path):
    """What its own import raises, for want of CANN say, is not taken for its absence."""
    (tmp_path / "torch_npu.py").write_text("import module_of_cann")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="module_of_cann"):
        dropin.replace_torch_npu()
