"""The rules of `torch.vmap`: a batch is a call of the same op, not a call for each of its parts.

Parts that share a weight follow each other as segments. Parts that have a weight of their own, or give the gradient of
one, lie side by side as heads: as many as an op takes, in as many calls as that needs. They are copied for that, which
pays while they are small.
"""

import torch

from .contract import (
    MAX_N,
    WIDE_DTYPES,
    check_compress,
    check_ends,
    check_gradient,
    check_last,
    check_size,
    check_windows,
)
from .segments import known_ends, overload_for
from .table import EXPRESSED, count_windows

COPIED = 1 << 20  # bytes of rows for a call: measured, copies of more take longer than the calls that they save


def rule(name):
    """For an op, how `torch.library.register_vmap` wants it."""

    def batched(info, in_dims, a, b, block, stride, actual_seq_len, **size):
        op = overload_for(getattr(torch.ops.nsa, name), actual_seq_len)
        if len(in_dims) > 4 and in_dims[4] is not None:
            raise RuntimeError(
                "actual_seq_len must be the same for all of a batch of torch.vmap, got a batched tensor: "
                "pack the batch into one call, with the segments of all its parts"
            )
        if not info.batch_size:
            raise RuntimeError("a batch of torch.vmap must have at least one part, got none")
        # [B, ...], or without a batch
        a, b = (t if dim is None else t.movedim(dim, 0) for t, dim in zip((a, b), in_dims))
        a_in_batch, b_in_batch, *_ = (dim is not None for dim in in_dims)
        part = a[0] if a_in_batch else a, b[0] if b_in_batch else b
        size = _checked_part(name, *part, block, stride, actual_seq_len, size)
        if b_in_batch or name == "nsa_compress_grad_weight":
            a = a if a_in_batch else a.expand(info.batch_size, *a.shape)
            b = b if b_in_batch else b.expand(info.batch_size, *b.shape)
            return _as_heads(op, a, b, block, stride, actual_seq_len=actual_seq_len, **size), 0
        parts = info.batch_size
        size = {key: None if rows is None else rows * parts for key, rows in size.items()}
        ends = _repeated(actual_seq_len, parts)
        result = op(a.flatten(0, 1), b, block, stride, actual_seq_len=ends, **size)
        return result.view(parts, result.shape[0] // parts, *result.shape[1:]), 0

    return batched


def _as_heads(op, a, b, block, stride, **lengths):
    n = b.shape[2]
    at_once = min(MAX_N // n, _copied_at_once(op._opname, a, b))
    results = []
    for some_a, some_b in zip(a.split(at_once), b.split(at_once)):
        result = op(_side_by_side(some_a), _side_by_side(some_b), block, stride, **lengths)
        results.append(result.unflatten(1, (len(some_a), n)).movedim(1, 0))
    return results[0] if len(results) == 1 else torch.cat(results)


def _copied_at_once(name, a, b):
    """How many parts have the rows that one call may copy. A part alone is not copied."""
    rows = {"nsa_compress": a, "nsa_compress_grad_weight": b}.get(name)  # the windows, which dInput is made of, are few
    size = 0 if rows is None else rows[0].numel() * rows.element_size()
    return max(1, COPIED // size) if type(size) is int and size else MAX_N  # a tracer may leave a size open


def _side_by_side(parts):
    """[B, rows, N, ...] to [rows, B * N, ...]."""
    return parts.movedim(0, 1).flatten(1, 2)


def _repeated(ends, times):
    """The prefix sums of `times` packs that follow each other."""
    if isinstance(ends, torch.Tensor):
        ends = ends.to(torch.int64)
        return (ends[-1] * torch.arange(times, device="cpu")[:, None] + ends).flatten()
    return [i * ends[-1] + end for i in range(times) for end in ends]


def _checked_part(name, a, b, block, stride, ends, size):
    """What is known of the size of one part's result. Raises what the op would say of the part: of the whole batch it
    would name sizes that nobody gave."""
    if name == "nsa_compress":
        check_compress(a, b, block, stride, WIDE_DTYPES)
    else:
        check_gradient(a, "weight" if name == "nsa_compress_grad_input" else "input", b, block, stride, WIDE_DTYPES)
    hidden = isinstance(ends, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(ends)
    with torch._C._DisableFuncTorch():  # else levels of torch.func around this one would wrap what is read
        known = None if hidden else known_ends(ends)
    if known is not None:
        check_ends(known)
        n_windows = count_windows(known, block, stride)
    elif isinstance(ends, list) and len(ends) <= EXPRESSED:
        n_windows = count_windows(ends, block, stride)  # of the batch it would be an expression of all its segments
    else:
        return size
    if name != "nsa_compress":
        check_windows(a, n_windows)
        return size
    if known is not None:
        check_last(int(known[-1]), a.shape[0])
    check_size("n_windows", size.get("n_windows"), "T'", n_windows)
    return {"n_windows": n_windows}
