"""`actual_seq_len` in every form, at the public function and at the op."""

import numpy as np
import pytest
import torch

import nsa
from nsa import segments

compress = torch.ops.nsa.nsa_compress
SEQ = [40, 40, 70, 96]
FORMS = {
    "list": list,
    "tuple": tuple,
    "numpy integers": lambda seq: [np.int16(end) for end in seq],
    **{f"{kind} array": lambda seq, kind=kind: np.array(seq, dtype=kind) for kind in ("i1", "u2", "i4", ">i8", "u8")},
    "every other element": lambda seq: np.repeat(seq, 2)[::2],
    "backwards": lambda seq: np.array(seq[::-1])[::-1],
    **{str(kind): lambda seq, kind=kind: torch.tensor(seq, dtype=kind) for kind in (torch.uint8, torch.int32)},
    "int64 tensor": torch.tensor,
    "cu_seqlens": lambda seq: torch.tensor([0, *seq])[1:],
    "view": lambda seq: torch.tensor(seq).repeat_interleave(3)[::3],
}


def inputs(dtype=torch.float16):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in ((96, 3, 16), (32, 3)))


def results(call, seq, **kwargs):
    x, weight = inputs()
    y = call(x, weight, 32, 16, actual_seq_len=seq, **kwargs)
    return y, *torch.autograd.grad(y.float().square().sum(), (x, weight))


@pytest.mark.parametrize("form", FORMS)
def test_every_form(form):
    expected = results(compress, SEQ)
    assert all(map(torch.equal, results(nsa.nsa_compress, FORMS[form](SEQ)), expected))
    assert nsa.count_windows(FORMS[form](SEQ), 32, 16) == len(expected[0])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_tensors_at_the_op(dtype):
    for a, b in zip(results(compress, torch.tensor(SEQ, dtype=dtype)), results(compress, SEQ)):
        assert torch.equal(a, b)


def test_many_segments():
    """More than are copied from step to step as a list."""
    seq = list(range(1, 97))
    assert len(seq) > segments.FEW
    for a, b in zip(results(compress, seq), results(compress, torch.tensor(seq))):
        assert torch.equal(a, b)
    for form in (list, tuple, np.array, lambda seq: list(map(np.int32, seq))):
        assert all(map(torch.equal, results(nsa.nsa_compress, form(seq)), results(compress, seq)))


def test_a_changed_array_changes_nothing():
    x, weight = inputs()
    seq = np.array([40, 96])
    y = nsa.nsa_compress(x, weight, 32, 16, actual_seq_len=seq)
    seq[0] = 60
    assert all(map(torch.equal, torch.autograd.grad(y.sum(), (x, weight)), gradients_of([40, 96])))


def gradients_of(seq):
    x, weight = inputs()
    return torch.autograd.grad(compress(x, weight, 32, 16, actual_seq_len=seq).sum(), (x, weight))


def test_a_changed_tensor_is_an_error_in_backward():
    """As for each tensor that a gradient needs."""
    x, weight = inputs()
    seq = torch.tensor([40, 96])
    y = compress(x, weight, 32, 16, actual_seq_len=seq)
    seq[0] = 60
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("seq", "error", "message"),
    [
        (np.array([40.0, 96]), TypeError, "or a 1-D integer CPU tensor, got an array of float64"),
        (np.array([True, False]), TypeError, "got an array of bool"),
        (np.array([40, 96], dtype=object), TypeError, "got an array of object"),
        (np.array([[40, 96]]), RuntimeError, r"must have rank 1, got rank 2, shape \(1, 2\)"),
        (np.array(96), RuntimeError, "must have rank 1, got rank 0"),
        (torch.tensor([40.0, 96]), TypeError, "got a tensor of torch.float32"),
        (torch.tensor([True, False]), TypeError, "got a tensor of torch.bool"),
        (torch.tensor([[40, 96]]), RuntimeError, "must have rank 1, got rank 2"),
        (torch.tensor([40, 96], device="meta"), RuntimeError, "must be on the CPU, got a tensor on meta: .* .cpu()"),
        (torch.tensor([]).long(), RuntimeError, "at least one prefix sum"),
        (torch.tensor([0, 40, 96]), RuntimeError, "got 0 at index 0"),
        (torch.tensor([60, 40, 96]), RuntimeError, "non-decreasing, got 60 then 40 at index 1"),
        (torch.tensor([40, 95]), RuntimeError, "must equal T = .* = 96, got 95"),
        ([40, 2**63], RuntimeError, "must fit in 64 bits, got 9223372036854775808"),
        ([40, 2**63 - 1], RuntimeError, "must equal T = .* = 96, got 9223372036854775807"),
        ([-(2**63), 2**63 - 1], RuntimeError, "must be positive, got -9223372036854775808"),
        ([np.array(40), 96], TypeError, "got an element of type ndarray"),
        ({40, 96}, TypeError, "must be a tuple or list of ints, .*, got set"),
        (range(40, 97, 56), TypeError, "got range"),
        (None, TypeError, "got NoneType"),
    ],
)
def test_what_is_refused(seq, error, message):
    x, weight = inputs()
    with pytest.raises(error, match=message) as caught:
        nsa.nsa_compress(x, weight, 32, 16, actual_seq_len=seq)
    assert type(caught.value) is error


def test_n_windows():
    x, weight = inputs()
    for seq in (SEQ, torch.tensor(SEQ)):
        for call in (nsa.nsa_compress, compress):
            assert len(call(x, weight, 32, 16, actual_seq_len=seq, n_windows=1)) == 1
            with pytest.raises(RuntimeError, match="n_windows must be T' = 1, got 3"):
                call(x, weight, 32, 16, actual_seq_len=seq, n_windows=3)
    for wrong in (2.0, True, "2"):
        with pytest.raises(TypeError, match="n_windows must be an int, got"):
            nsa.nsa_compress(x, weight, 32, 16, actual_seq_len=SEQ, n_windows=wrong)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_n_rows(device):
    dy, weight = torch.zeros(1, 3, 16, device=device), torch.zeros(32, 3, device=device)
    for seq in (SEQ, torch.tensor(SEQ)):
        for known in ({}, {"n_rows": 96}):
            dx = torch.ops.nsa.nsa_compress_grad_input(dy, weight, 32, 16, actual_seq_len=seq, **known)
            assert dx.shape == (96, 3, 16)
        with pytest.raises(RuntimeError, match=r"T = (96|.* = 95), got 9[56]"):
            torch.ops.nsa.nsa_compress_grad_input(dy, weight, 32, 16, actual_seq_len=seq, n_rows=95)


def test_count_windows():
    assert nsa.count_windows([80, 176, 256], 64, 16) == 2 + 3 + 2
    assert nsa.count_windows([20], 32, 16) == 0
    for arguments, error, message in (
        (([96], 40, 16), RuntimeError, "compress_block_size must be a multiple of 16, got 40"),
        (([96], 32, 48), RuntimeError, "compress_stride must be in"),
        (([96], 32.0, 16), TypeError, "compress_block_size must be an int"),
        (([0, 96], 32, 16), RuntimeError, "got 0 at index 0"),
        (([96, 40], 32, 16), RuntimeError, "non-decreasing"),
        (([96.0], 32, 16), TypeError, "got an element of type float"),
    ):
        with pytest.raises(error, match=message):
            nsa.count_windows(*arguments)
