"""Registration of the three ops: schemas, fake kernels, gradients, and one implementation for each device.

    nsa::nsa_compress             (input, weight)        -> y   (T', N, D)
    nsa::nsa_compress_grad_input  (grad_output, weight)  -> dx  (T, N, D)
    nsa::nsa_compress_grad_weight (grad_output, input)   -> dw  (block, N)

Each takes two tensors and the window geometry, checks them, and returns a contiguous tensor in their dtype:
fp16 and bf16 everywhere, fp32 and fp64 off the NPU. Where no segment has a window, nothing is launched.
"""

from functools import partial
from importlib import import_module

import torch

from . import accelerator, cpu
from .autograd import differentiable
from .contract import (
    PUBLIC_DTYPES,
    WIDE_DTYPES,
    check_compress,
    check_gradient,
    check_windows,
)
from .importing import after_import
from .table import count_windows, window_table

_TENSORS = {
    "nsa_compress": ("input", "weight"),
    "nsa_compress_grad_input": ("grad_output", "weight"),
    "nsa_compress_grad_weight": ("grad_output", "input"),
}
_GEOMETRY = "int compress_block_size, int compress_stride, *, SymInt[] actual_seq_len"


def _dtypes(device):
    return PUBLIC_DTYPES if device.type == "npu" else WIDE_DTYPES


def _compress(backend, input, weight, block, stride, *, actual_seq_len):
    check_compress(input, weight, block, stride, actual_seq_len, _dtypes(input.device))
    table = window_table(tuple(actual_seq_len), block, stride, input.device)
    if not table.n_windows:
        return input.new_empty((0, *input.shape[1:]))
    return backend.forward(input.contiguous(), weight.contiguous(), table)


def _grad_input(backend, grad_output, weight, block, stride, *, actual_seq_len):
    check_gradient(grad_output, "weight", weight, block, stride, actual_seq_len, _dtypes(grad_output.device))
    table = window_table(tuple(actual_seq_len), block, stride, grad_output.device)
    check_windows(grad_output, table.n_windows)
    n_rows = actual_seq_len[-1]
    if not table.n_windows:
        return grad_output.new_zeros((n_rows, *grad_output.shape[1:]))
    return backend.grad_input(grad_output.contiguous(), weight.contiguous(), table, n_rows)


def _grad_weight(backend, grad_output, input, block, stride, *, actual_seq_len):
    check_gradient(grad_output, "input", input, block, stride, actual_seq_len, _dtypes(input.device))
    table = window_table(tuple(actual_seq_len), block, stride, input.device)
    check_windows(grad_output, table.n_windows)
    if not table.n_windows:
        return input.new_zeros((block, input.shape[1]))
    return backend.grad_weight(grad_output.contiguous(), input.contiguous(), table)


def _fake_compress(input, weight, block, stride, *, actual_seq_len):
    check_compress(input, weight, block, stride, actual_seq_len, _dtypes(input.device))
    return input.new_empty((count_windows(actual_seq_len, block, stride), *input.shape[1:]))


def _fake_grad_input(grad_output, weight, block, stride, *, actual_seq_len):
    check_gradient(grad_output, "weight", weight, block, stride, actual_seq_len, _dtypes(grad_output.device))
    check_windows(grad_output, count_windows(actual_seq_len, block, stride))
    return grad_output.new_empty((actual_seq_len[-1], *grad_output.shape[1:]))


def _fake_grad_weight(grad_output, input, block, stride, *, actual_seq_len):
    check_gradient(grad_output, "input", input, block, stride, actual_seq_len, _dtypes(input.device))
    check_windows(grad_output, count_windows(actual_seq_len, block, stride))
    return input.new_empty((block, input.shape[1]))


_BODIES = {
    "nsa_compress": (_compress, _fake_compress),
    "nsa_compress_grad_input": (_grad_input, _fake_grad_input),
    "nsa_compress_grad_weight": (_grad_weight, _fake_grad_weight),
}
_BACKENDS = {"CPU": cpu, "CUDA": accelerator, "PrivateUse1": accelerator}

# Inductor runs the ops between the CUDA graphs that it makes: a graph would be captured anew for all new lengths, and
# window tables must not lie in its memory. PyTorch has the tag from 2.9 on.
_TAGS = [getattr(torch.Tag, name) for name in ("pt2_compliant_tag", "cudagraph_unsafe") if hasattr(torch.Tag, name)]

_library = torch.library.Library("nsa", "DEF")
for _name, (_body, _fake) in _BODIES.items():
    _a, _b = _TENSORS[_name]
    _library.define(f"{_name}(Tensor {_a}, Tensor {_b}, {_GEOMETRY}) -> Tensor", tags=_TAGS)
    for _key, _backend in _BACKENDS.items():
        _library.impl(_name, partial(_body, _backend), _key)
    torch.library.register_fake(f"nsa::{_name}", _fake, lib=_library)
    _library.impl(_name, differentiable(getattr(torch.ops.nsa, _name).default), "Autograd")

after_import("torch.distributed.tensor", lambda: import_module("nsa.dtensor").register())
