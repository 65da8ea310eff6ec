"""Registration of the three ops: schemas, fake kernels, gradients, and one implementation for each device.

    nsa::nsa_compress             (input, weight)        -> y   (T', N, D)
    nsa::nsa_compress_grad_input  (grad_output, weight)  -> dx  (T, N, D)
    nsa::nsa_compress_grad_weight (grad_output, input)   -> dw  (block, N)

Each takes two tensors and the window geometry, checks them, and returns a contiguous tensor in their dtype:
fp16 and bf16 everywhere, fp32 and fp64 off the NPU. Where no segment has a window, nothing is launched.

Each has two overloads: in the default one `actual_seq_len` is a list of ints, in `.offsets` an integer tensor on the
CPU, so that one compiled graph serves any number of segments. `n_windows` and `n_rows` are T' and T for tracers,
which see no values; where they are known they are compared.
"""

from functools import partial
from importlib import import_module

import torch

from . import accelerator, autocast, batching, cpu
from .autograd import RESULT_ROWS, differentiable
from .contract import (
    PUBLIC_DTYPES,
    WIDE_DTYPES,
    check_compress,
    check_device,
    check_ends,
    check_gradient,
    check_last,
    check_memory,
    check_rows,
    check_size,
    check_tensor,
    check_windows,
)
from .importing import after_import
from .segments import known_ends
from .table import EXPRESSED, count_windows, window_table
from .tracing import any_unbacked, unbacked_size, untraced

_ARGUMENTS = {
    "nsa_compress": "Tensor input, Tensor weight",
    "nsa_compress_grad_input": "Tensor grad_output, Tensor weight",
    "nsa_compress_grad_weight": "Tensor grad_output, Tensor input",
}
# lengths in a tensor also by position, since torch.vmap takes no tensor that goes by keyword alone
_OVERLOADS = {".offsets": ["Tensor actual_seq_len", "*"], "": ["*", "SymInt[] actual_seq_len"]}


def _dtypes(name, tensor):
    """The dtypes that an op takes where this tensor is."""
    check_tensor(name, tensor)
    return PUBLIC_DTYPES if tensor.device.type == "npu" else WIDE_DTYPES


def _compress(backend, input, weight, block, stride, actual_seq_len, n_windows=None):
    check_compress(input, weight, block, stride, _dtypes("input", input))
    check_rows(input.shape[0])
    table = window_table(known_ends(actual_seq_len), block, stride, input.device)
    check_last(table.n_rows, input.shape[0])
    check_size("n_windows", n_windows, "T'", table.n_windows)
    check_device("input", input, "weight", weight)
    if not table.n_windows:
        return input.new_empty((0, *input.shape[1:]))
    return backend.forward(_packed("input", input), _packed("weight", weight), table)


def _grad_input(backend, grad_output, weight, block, stride, actual_seq_len, n_rows=None):
    check_gradient(grad_output, "weight", weight, block, stride, _dtypes("grad_output", grad_output))
    table = window_table(known_ends(actual_seq_len), block, stride, grad_output.device)
    check_size("n_rows", n_rows, "T", table.n_rows)
    check_device("grad_output", grad_output, "weight", weight)
    check_windows(grad_output, table.n_windows)
    if not table.n_windows:
        return grad_output.new_zeros((table.n_rows, *grad_output.shape[1:]))
    return backend.grad_input(_packed("grad_output", grad_output), _packed("weight", weight), table, table.n_rows)


def _grad_weight(backend, grad_output, input, block, stride, actual_seq_len):
    check_gradient(grad_output, "input", input, block, stride, _dtypes("input", input))
    check_rows(input.shape[0])
    table = window_table(known_ends(actual_seq_len), block, stride, input.device)
    check_last(table.n_rows, input.shape[0])
    check_device("grad_output", grad_output, "input", input)
    check_windows(grad_output, table.n_windows)
    if not table.n_windows:
        return input.new_zeros((block, input.shape[1]))
    return backend.grad_weight(_packed("grad_output", grad_output), _packed("input", input), table)


def _packed(name, tensor):
    check_memory(name, tensor)
    return tensor.contiguous()


# Fake kernels check what they see; what only the run shows, the op itself checks then.


def _fake_compress(input, weight, block, stride, actual_seq_len, n_windows=None):
    check_compress(input, weight, block, stride, _dtypes("input", input))
    ends = _visible(actual_seq_len, input.shape[0])
    check_device("input", input, "weight", weight)
    if ends is not None:
        expected = count_windows(ends, block, stride)
        check_size("n_windows", n_windows, "T'", expected)
        n_windows = expected
    elif n_windows is None:
        in_tensor = isinstance(actual_seq_len, torch.Tensor)
        if in_tensor or len(actual_seq_len) > EXPRESSED or any_unbacked(actual_seq_len):
            n_windows = unbacked_size()
        else:
            n_windows = count_windows(actual_seq_len, block, stride)
    return input.new_empty((n_windows, *input.shape[1:]))


def _fake_grad_input(grad_output, weight, block, stride, actual_seq_len, n_rows=None):
    check_gradient(grad_output, "weight", weight, block, stride, _dtypes("grad_output", grad_output))
    ends = _visible(actual_seq_len, n_rows)
    check_device("grad_output", grad_output, "weight", weight)
    if ends is not None:
        check_windows(grad_output, count_windows(ends, block, stride))
        n_rows = int(ends[-1])
    elif n_rows is None:
        n_rows = unbacked_size() if isinstance(actual_seq_len, torch.Tensor) else actual_seq_len[-1]
    return grad_output.new_empty((n_rows, *grad_output.shape[1:]))


def _fake_grad_weight(grad_output, input, block, stride, actual_seq_len):
    check_gradient(grad_output, "input", input, block, stride, _dtypes("input", input))
    ends = _visible(actual_seq_len, input.shape[0])
    check_device("grad_output", grad_output, "input", input)
    if ends is not None:
        check_windows(grad_output, count_windows(ends, block, stride))
    return input.new_empty((block, input.shape[1]))


def _visible(actual_seq_len, t):
    """The ends as an int64 array, checked against t rows if t is known; None where a tracer hides some of them."""
    ends = known_ends(actual_seq_len)
    if ends is not None:
        if type(t) is int:
            check_rows(t)
        check_ends(ends)
    if t is not None and (ends is not None or not isinstance(actual_seq_len, torch.Tensor)):
        check_last(actual_seq_len[-1] if ends is None else int(ends[-1]), t)
    return ends


_BODIES = {
    "nsa_compress": (_compress, _fake_compress),
    "nsa_compress_grad_input": (_grad_input, _fake_grad_input),
    "nsa_compress_grad_weight": (_grad_weight, _fake_grad_weight),
}
_BACKENDS = {"CPU": cpu, "CUDA": accelerator, "PrivateUse1": accelerator}

# Inductor runs the ops between the CUDA graphs that it makes: a graph would be captured anew for all new lengths, and
# window tables must not lie in its memory. PyTorch has the tag from 2.9 on.
TAGS = [getattr(torch.Tag, name) for name in ("pt2_compliant_tag", "cudagraph_unsafe") if hasattr(torch.Tag, name)]

library = torch.library.Library("nsa", "FRAGMENT")  # another library may add ops to the namespace


def _define(name, overload):
    body, fake = _BODIES[name]
    full = name + overload
    arguments = [_ARGUMENTS[name], "int compress_block_size", "int compress_stride", *_OVERLOADS[overload]]
    if name in RESULT_ROWS:
        arguments.append(f"SymInt? {RESULT_ROWS[name]}=None")
    if arguments[-1] == "*":
        arguments.pop()
    library.define(f"{full}({', '.join(arguments)}) -> Tensor", tags=TAGS)
    for key, backend in _BACKENDS.items():
        library.impl(full, untraced(partial(body, backend)), key)
    torch.library.register_fake(f"nsa::{full}", fake, lib=library)
    op = getattr(getattr(torch.ops.nsa, name), overload[1:] or "default")
    for key in autocast.KEYS:
        library.impl(full, untraced(autocast.casting(op)), key, with_keyset=True)
    torch.library.register_vmap(f"nsa::{full}", untraced(batching.rule(name)), lib=library)


for _name in _BODIES:
    for _overload in _OVERLOADS:
        _define(_name, _overload)
    for _overload in _OVERLOADS:
        _kernel = untraced(differentiable(getattr(torch.ops.nsa, _name)))
        library.impl(_name + _overload, _kernel, "Autograd", with_keyset=True)

# those who use these have imported them; to others, importing them would be slow
after_import("torch.distributed.tensor", lambda: import_module("nsa.dtensor").register())
after_import("torch.utils.flop_counter", lambda: import_module("nsa.flops").register())
