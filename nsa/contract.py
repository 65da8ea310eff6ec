"""What callers may pass: every rule of the specification, checked in its order, each with its exception."""

import numpy as np
import torch

PUBLIC_DTYPES = (torch.float16, torch.bfloat16)  # the specification's, and all that an NPU takes
WIDE_DTYPES = (*PUBLIC_DTYPES, torch.float32, torch.float64)

GRANULE = 16  # block, stride and D come in multiples of it
MAX_BLOCK = 128
MAX_N = 128
MAX_D = 256

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1

PACKED = "pass .values() of one of layout torch.jagged as input, and its .offsets()[1:].cpu() as actual_seq_len"

LAYOUTS = {"input": "(T, N, D)", "weight": "(compress_block_size, N)", "grad_output": "(T', N, D)"}


def check_compress(input, weight, block, stride, dtypes):
    """Raise what the specification says of (input, weight, block, stride) but for their devices, or return."""
    check_tensors("input", input, "weight", weight, dtypes)
    check_rank("input", input)
    check_rank("weight", weight)
    _, n, d = input.shape
    if weight.shape[0] != block:
        raise RuntimeError(f"weight.shape[0] must equal compress_block_size {block}, got {weight.shape[0]}")
    if weight.shape[1] != n:
        raise RuntimeError(f"weight.shape[1] must equal N = input.shape[1] = {n}, got {weight.shape[1]}")
    check_sizes(n, d, block, stride)


def check_gradient(grad_output, name, other, block, stride, dtypes):
    """As `check_compress`, for an op that maps grad_output (T', N, D) and `other`, which is the compression's "input"
    or "weight", to the gradient of the one that `other` is not."""
    check_tensors("grad_output", grad_output, name, other, dtypes)
    check_rank("grad_output", grad_output)
    check_rank(name, other)
    _, n, d = grad_output.shape
    expected = (block, n) if name == "weight" else (other.shape[0], n, d)
    if _shape(other) != expected:
        raise RuntimeError(f"{name} must have shape {LAYOUTS[name]} = {expected}, got {_shape(other)}")
    check_sizes(n, d, block, stride)


def check_windows(grad_output, n_windows):
    """Raise if grad_output has another number of rows than there are windows."""
    if grad_output.shape[0] != n_windows:
        raise RuntimeError(f"grad_output must have T' = {n_windows} rows, one a window, got {grad_output.shape[0]}")


def check_tensors(name_a, a, name_b, b, dtypes, seen=None):
    """Raise unless both are tensors of one of the dtypes, the same for both. `seen(tensor)` is the dtype in which the
    op will see a tensor, where that may be another than its own."""
    for name, value in ((name_a, a), (name_b, b)):
        check_tensor(name, value)
    dtype_a, dtype_b = (a.dtype, b.dtype) if seen is None else (seen(a), seen(b))
    if dtype_a != dtype_b:
        raise TypeError(f"{name_a} and {name_b} must have the same dtype, got {dtype_a} and {dtype_b}")
    if dtype_a not in dtypes:
        expected = ", ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"dtype of {name_a} and {name_b} must be one of {expected}, got {dtype_a}")


def check_tensor(name, value):
    """Raise unless it is a tensor. PyTorch's dispatcher lets None pass for one."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def check_int(name, value):
    if not is_int(type(value)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")


def is_int(kind):
    """Whether values of a type are taken as ints: numpy integers are, bools and durations are not."""
    return issubclass(kind, (int, np.integer, torch.SymInt)) and not issubclass(kind, (bool, np.timedelta64))


def check_held(name, value):
    """Raise for an int that no int64 holds: PyTorch's dispatcher would not know it for an int."""
    if not INT64_MIN <= value <= INT64_MAX:
        raise RuntimeError(f"{name} must fit in 64 bits, got {value}")


def check_layout(name, tensor, advice=f": {PACKED}"):
    """Raise unless a tensor's elements lie in memory by strides. A nested tensor's `.layout` may say so too; `advice`
    is the end of what is said of one."""
    if tensor.is_nested:
        raise RuntimeError(f"{name} must be a plain tensor, got a nested tensor of layout {tensor.layout}{advice}")
    if tensor.layout is not torch.strided:
        raise RuntimeError(f"{name} must have layout torch.strided, got {tensor.layout}: call .to_dense()")


def check_memory(name, tensor):
    """Raise if the storage of a tensor was resized to less than it needs: what lies behind would be read."""
    if tensor.is_contiguous():  # so are all that have no elements
        reach = tensor.numel()
    else:
        reach = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride()))
    needed = (tensor.storage_offset() + reach) * tensor.element_size()
    held = tensor.untyped_storage().nbytes()
    if needed > held:
        raise RuntimeError(f"{name} of shape {_shape(tensor)} must have {needed} bytes of memory, got {held}")


def check_rank(name, tensor, layout=None):
    """Raise unless a tensor has as many dimensions as its layout, such as "(T, N, D)" or "(batch,)"; by default that of
    LAYOUTS."""
    layout = layout or LAYOUTS[name]
    rank = layout.removesuffix(",)").count(",") + 1
    if tensor.ndim != rank:
        raise RuntimeError(f"{name} must have rank {rank}, {layout}, got rank {tensor.ndim}, shape {_shape(tensor)}")


def check_sizes(n, d, block, stride):
    """Raise unless N, D, block and stride are legal: all that a compiled kernel depends on but the dtype."""
    if d % GRANULE or d < 1:
        raise RuntimeError(f"D must be a positive multiple of {GRANULE}, got {d}")
    if d > MAX_D:
        raise RuntimeError(f"D must be at most {MAX_D}, got {d}")
    if n < 1:
        raise RuntimeError(f"N must be at least 1, got {n}")
    if n > MAX_N:
        raise RuntimeError(f"N must be at most {MAX_N}, got {n}")
    check_geometry(block, stride)


def check_geometry(block, stride):
    """Raise unless the size of a window and the distance of two are legal."""
    if block % GRANULE:
        raise RuntimeError(f"compress_block_size must be a multiple of {GRANULE}, got {block}")
    if not GRANULE <= block <= MAX_BLOCK:
        raise RuntimeError(f"compress_block_size must be in [{GRANULE}, {MAX_BLOCK}], got {block}")
    if stride % GRANULE:
        raise RuntimeError(f"compress_stride must be a multiple of {GRANULE}, got {stride}")
    if not GRANULE <= stride <= block:
        raise RuntimeError(f"compress_stride must be in [{GRANULE}, compress_block_size = {block}], got {stride}")


def check_rows(t):
    if t == 0:
        raise RuntimeError("input must have at least one row, got T = 0: prefix sums are positive and end in T")


def check_ends(ends):
    """Raise unless `ends`, an int64 array, holds prefix sums."""
    if not len(ends):
        raise RuntimeError("actual_seq_len must hold at least one prefix sum, got an empty sequence")
    decreases = ends[1:] < ends[:-1]
    if decreases.any():
        i = int(decreases.argmax()) + 1
        raise RuntimeError(f"actual_seq_len must be non-decreasing, got {ends[i - 1]} then {ends[i]} at index {i}")
    first = ends[0]  # the smallest, as the sequence does not decrease
    if first == 0 and ends[-1] == 0:
        raise RuntimeError("actual_seq_len must be positive, got only zeros; its last element is T, the number of rows")
    if first == 0:  # no telling which of the two
        raise RuntimeError(
            "actual_seq_len must be positive, got 0 at index 0. If it is the leading 0 of cu_seqlens, pass "
            "cu_seqlens[1:].tolist(); if it ends an empty first segment, leave it out: that segment has no window"
        )
    if first < 0:
        raise RuntimeError(f"actual_seq_len must be positive, got {first} at index 0")


def check_last(last, t):
    _check_equal(last, t, lambda: f"the last element of actual_seq_len must equal T = input.shape[0] = {t}, got {last}")


def check_size(name, given, symbol, expected):
    """Raise if a size that a caller may leave out is given and wrong."""
    if given is not None:
        _check_equal(given, expected, lambda: f"{name} must be {symbol} = {expected}, got {given}")


def _check_equal(a, b, message):
    if isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt):
        torch._check(a == b, message)  # where only the run will show, a tracer notes it
    elif a != b:
        raise RuntimeError(message())


def check_device(name_a, a, name_b, b):
    if a.device != b.device:
        raise RuntimeError(f"{name_a} and {name_b} must be on the same device, got {a.device} and {b.device}")


def _shape(tensor):
    return tuple(tensor.shape)
