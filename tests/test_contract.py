"""The specification's error table: every rule, its exception, its message, and the order of the checks."""

from itertools import combinations

import numpy as np
import pytest
import torch

import nsa


def build(**broken):
    """Arguments of a legal call, with some of its parts replaced."""
    p = {"t": 96, "n": 4, "d": 32, "block": 32, "stride": 16, "seq": [48, 96], "dtype": torch.float16, **broken}
    x = torch.zeros((p["t"], p["n"], p["d"]), dtype=p["dtype"], device=p.get("device", "cpu"))
    weight = torch.zeros(
        (p.get("weight_rows", p["block"] if type(p["block"]) is int else 32), p.get("weight_n", p["n"])),
        dtype=p.get("weight_dtype", p["dtype"]),
    )
    x = x.flatten(1) if p.get("flat_input") else x
    weight = weight.flatten() if p.get("flat_weight") else weight
    return (p.get("input", x), p.get("weight", weight), p["block"], p["stride"]), {"actual_seq_len": p["seq"]}


# in the specification's order: what breaks the rule, the exception, what its message says
RULES = [
    ({"input": [1, 2]}, TypeError, "input must be a torch.Tensor, got list"),
    ({"weight": np.zeros((32, 4))}, TypeError, "weight must be a torch.Tensor, got ndarray"),
    ({"weight_dtype": torch.bfloat16}, TypeError, "same dtype, got torch.* and torch.bfloat16"),
    ({"dtype": torch.int32}, TypeError, "must be one of torch.float16, torch.bfloat16.*, got torch.int32"),
    ({"block": 32.0}, TypeError, "compress_block_size must be an int, got float"),
    ({"stride": "16"}, TypeError, "compress_stride must be an int, got str"),
    (
        {"seq": torch.tensor([48.0, 96])},
        TypeError,
        "actual_seq_len must be a tuple or .*, got a tensor of torch.float32",
    ),
    ({"flat_input": True}, RuntimeError, "input must have rank 3, .*, got rank 2"),
    ({"flat_weight": True}, RuntimeError, "weight must have rank 2, .*, got rank 1"),
    ({"weight_rows": 16}, RuntimeError, r"weight.shape\[0\] must equal compress_block_size \d+, got 16"),
    ({"weight_n": 5}, RuntimeError, r"weight.shape\[1\] must equal N = input.shape\[1\] = \d+, got 5"),
    ({"d": 24}, RuntimeError, "D must be a positive multiple of 16, got 24"),
    ({"d": 272}, RuntimeError, "D must be at most 256, got 272"),
    ({"n": 0}, RuntimeError, "N must be at least 1, got 0"),
    ({"n": 129}, RuntimeError, "N must be at most 128, got 129"),
    ({"block": 40}, RuntimeError, "compress_block_size must be a multiple of 16, got 40"),
    ({"block": 144}, RuntimeError, r"compress_block_size must be in \[16, 128\], got 144"),
    ({"stride": 24}, RuntimeError, "compress_stride must be a multiple of 16, got 24"),
    ({"stride": 160}, RuntimeError, r"compress_stride must be in \[16, compress_block_size = \d+\], got 160"),
    ({"seq": []}, RuntimeError, "actual_seq_len must hold at least one prefix sum, got an empty sequence"),
    ({"seq": [48, 40, 96]}, RuntimeError, "actual_seq_len must be non-decreasing, got 48 then 40 at index 1"),
    ({"seq": [-16, 96]}, RuntimeError, "actual_seq_len must be positive, got -16"),
    ({"seq": [48, 95]}, RuntimeError, r"last element of actual_seq_len must equal T = .* = 96, got 95"),
    ({"device": "meta"}, RuntimeError, "same device, got meta and cpu"),
]

MORE = [
    ({"weight": None}, TypeError, "weight must be a torch.Tensor, got NoneType"),
    ({"dtype": torch.float32}, TypeError, "must be one of torch.float16, torch.bfloat16, got torch.float32"),
    ({"dtype": torch.float64}, TypeError, "must be one of torch.float16, torch.bfloat16, got torch.float64"),
    ({"block": True}, TypeError, "compress_block_size must be an int, got bool"),
    ({"stride": np.bool_(True)}, TypeError, "compress_stride must be an int, got bool"),
    ({"stride": None}, TypeError, "compress_stride must be an int, got NoneType"),
    ({"seq": np.array([48.0, 96])}, TypeError, "actual_seq_len must be a tuple or .*, got an array of float64"),
    ({"seq": 96}, TypeError, "actual_seq_len must be a tuple or list of ints, .*, got int"),
    ({"seq": [48.0, 96]}, TypeError, "actual_seq_len .* got an element of type float"),
    ({"seq": [True, 96]}, TypeError, "actual_seq_len .* got an element of type bool"),
    (
        {"seq": [0, 48, 96]},
        RuntimeError,
        r"got 0 at index 0. If it is the leading 0 of cu_seqlens, pass cu_seqlens\[1:\]",
    ),
    ({"seq": [0, 0, 48, 96]}, RuntimeError, "if it ends an empty first segment, leave it out"),
    ({"seq": [0, 0]}, RuntimeError, "must be positive, got only zeros; its last element is T"),
    ({"d": 0}, RuntimeError, "D must be a positive multiple of 16, got 0"),
    ({"block": 0}, RuntimeError, r"compress_block_size must be in \[16, 128\], got 0"),
    ({"block": -16, "weight_rows": 32}, RuntimeError, r"weight.shape\[0\] must equal compress_block_size -16, got 32"),
    ({"stride": 0}, RuntimeError, r"compress_stride must be in \[16, .*\], got 0"),
    ({"stride": 48}, RuntimeError, r"compress_stride must be in \[16, compress_block_size = 32\], got 48"),
    ({"t": 0, "seq": [0]}, RuntimeError, "input must have at least one row, got T = 0"),
    ({"t": 0, "seq": []}, RuntimeError, "input must have at least one row, got T = 0"),
    ({"t": 0, "seq": [48, 96]}, RuntimeError, "input must have at least one row, got T = 0"),
]


# the specification's table, line by line: 24 rules, and the values at the edge of each
@pytest.mark.parametrize(("broken", "error", "message"), RULES + MORE)
def test_public_function(broken, error, message):
    args, kwargs = build(**broken)
    with pytest.raises(error, match=message) as caught:
        nsa.nsa_compress(*args, **kwargs)
    assert type(caught.value) is error


def test_order():
    """Whatever else is broken, the rule that comes first in the specification is the one reported."""
    for (broken, error, message), (broken_too, *_) in combinations(RULES, 2):
        if broken.keys() & broken_too.keys():  # one part of a call cannot be broken in two ways
            continue
        args, kwargs = build(**broken, **broken_too)
        with pytest.raises(error, match=message):
            nsa.nsa_compress(*args, **kwargs)


@pytest.mark.parametrize("device", ["cpu", "meta"])  # on meta the fake kernels check
def test_registered_op_raises_the_same(device):
    for broken, error, message in RULES + MORE:
        if error is not RuntimeError:  # the dispatcher's to raise
            continue
        (x, weight, *geometry), kwargs = build(**broken)
        if "device" not in broken:
            x, weight = x.to(device), weight.to(device)
        with pytest.raises(error, match=message):
            torch.ops.nsa.nsa_compress(x, weight, *geometry, **kwargs)


@pytest.mark.parametrize("broken", [{"weight_dtype": torch.bfloat16}, {"dtype": torch.int32}])
def test_registered_op_raises_type_errors_of_tensors(broken):
    args, kwargs = build(**broken)
    with pytest.raises(TypeError, match="dtype"):
        torch.ops.nsa.nsa_compress(*args, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_registered_op_takes_wide_dtypes(dtype):
    args, kwargs = build(dtype=dtype)
    assert torch.ops.nsa.nsa_compress(*args, **kwargs).dtype == dtype


def test_numpy_integers_and_tuples_are_taken():
    args, _ = build(block=32)
    x, weight, block, stride = args
    y = nsa.nsa_compress(x, weight, np.int32(block), np.int64(stride), actual_seq_len=(np.int64(48), 96))
    assert y.shape == (4, 4, 32)


def build_gradient(which, **broken):
    """The op of one gradient and arguments of a legal call of it, with some parts replaced."""
    p = {"grad_output": (4, 4, 32), "input": (96, 4, 32), "weight": (32, 4), "block": 32, "stride": 16, **broken}
    grad_output = torch.zeros(p["grad_output"], dtype=p.get("grad_dtype", torch.float16), device=p.get("device", "cpu"))
    other = torch.zeros(p[which], dtype=p.get("dtype", torch.float16))
    op = {"weight": torch.ops.nsa.nsa_compress_grad_input, "input": torch.ops.nsa.nsa_compress_grad_weight}[which]
    return op, [grad_output, other], (p["block"], p["stride"]), {"actual_seq_len": p.get("seq", [48, 96])}


# what the gradient op takes besides grad_output, what breaks the rule, the exception, its message
GRADIENT_RULES = [
    (
        "both",
        {"grad_dtype": torch.bfloat16},
        TypeError,
        "must have the same dtype, got torch.bfloat16 and torch.float16",
    ),
    ("both", {"grad_dtype": torch.int32, "dtype": torch.int32}, TypeError, "must be one of .*, got torch.int32"),
    ("both", {"grad_output": (4, 4)}, RuntimeError, r"grad_output must have rank 3, \(T', N, D\), got rank 2"),
    ("weight", {"weight": (128,)}, RuntimeError, r"weight must have rank 2, \(compress_block_size, N\), got rank 1"),
    ("input", {"input": (96, 128)}, RuntimeError, r"input must have rank 3, \(T, N, D\), got rank 2"),
    ("weight", {"weight": (32, 5)}, RuntimeError, r"weight must have shape .* = \(32, 4\), got \(32, 5\)"),
    ("weight", {"weight": (16, 4)}, RuntimeError, r"weight must have shape .* = \(32, 4\), got \(16, 4\)"),
    ("input", {"input": (96, 5, 32)}, RuntimeError, r"input must have shape .* = \(96, 4, 32\), got \(96, 5, 32\)"),
    ("input", {"input": (96, 4, 16)}, RuntimeError, r"input must have shape .* = \(96, 4, 32\), got \(96, 4, 16\)"),
    ("both", {"grad_output": (4, 4, 24), "input": (96, 4, 24)}, RuntimeError, "D must be a positive multiple of 16"),
    ("both", {"stride": 24}, RuntimeError, "compress_stride must be a multiple of 16, got 24"),
    ("both", {"seq": []}, RuntimeError, "must hold at least one prefix sum"),
    ("both", {"seq": [64, 48, 96]}, RuntimeError, "must be non-decreasing, got 64 then 48 at index 1"),
    ("both", {"seq": [0, 96]}, RuntimeError, "must be positive, got 0 at index 0"),
    ("input", {"input": (95, 4, 32)}, RuntimeError, "must equal T = .* = 95, got 96"),
    ("input", {"input": (0, 4, 32), "seq": [0]}, RuntimeError, "input must have at least one row, got T = 0"),
    ("both", {"grad_output": (3, 4, 32)}, RuntimeError, "grad_output must have T' = 4 rows, one a window, got 3"),
    ("both", {"device": "meta"}, RuntimeError, "grad_output and .* must be on the same device, got meta and cpu"),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])  # on meta the fake kernels check
@pytest.mark.parametrize("which", ["input", "weight"])
def test_gradient_ops(which, device):
    for whose, broken, error, message in GRADIENT_RULES:
        if whose not in ("both", which):
            continue
        op, tensors, geometry, kwargs = build_gradient(which, **broken)
        if "device" not in broken:
            tensors = [tensor.to(device) for tensor in tensors]
        with pytest.raises(error, match=message):
            op(*tensors, *geometry, **kwargs)


def test_the_legal_calls_that_the_rules_break_are_legal():
    args, kwargs = build()
    assert nsa.nsa_compress(*args, **kwargs).shape == (4, 4, 32)
    for which in ("input", "weight"):
        op, tensors, geometry, kwargs = build_gradient(which)
        assert op(*tensors, *geometry, **kwargs).ndim
