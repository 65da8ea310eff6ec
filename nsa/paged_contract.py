"""What callers of the ops for decode and prefill may pass, each rule with its exception, and the values that tables may
hold where the host can look at them."""

import numpy as np
import torch
from torch.autograd import forward_ad

from .contract import GRANULE, check_memory, check_rank, check_sizes, check_tensor, check_tensors

INDEX_DTYPES = (torch.int32, torch.int64)
NONE = -1  # in slot_mapping: no slot


def check_pages(input, weight, cache, block, stride, page_block_size, dtypes):
    """Raise unless the tensors fit each other: input (pages, page_block_size, N, D), weight (compress_block_size, N),
    cache (slots, N, D) or (pages, rows of a page, N, D)."""
    check_tensors("input", input, "weight", weight, dtypes)
    check_tensors("input", input, "cache", cache, dtypes)
    check_rank("input", input, "(pages, page_block_size, N, D)")
    check_rank("weight", weight, "(compress_block_size, N)")
    n, d = input.shape[2:]
    _check_shape("weight", weight, (block, n), "(compress_block_size, N)")
    check_sizes(n, d, block, stride)
    if page_block_size < 1 or page_block_size % GRANULE:
        raise RuntimeError(f"page_block_size must be a positive multiple of {GRANULE}, got {page_block_size}")
    if input.shape[1] != page_block_size:
        raise RuntimeError(f"input.shape[1] must equal page_block_size = {page_block_size}, got {input.shape[1]}")
    if input.shape[0] < 1:
        raise RuntimeError("input must have at least one page, got none")
    for name, tensor in (("input", input), ("cache", cache)):
        if tensor.stride(-1) != 1:
            raise RuntimeError(
                f"the elements of a head of {name} must lie one behind the other, got a distance of "
                f"{tensor.stride(-1)}: other dimensions may have any strides, and it is not copied"
            )


def check_cache(cache, input, layout):
    """Raise unless `cache` has that layout, and memory of its own for every element."""
    n, d = input.shape[2:]
    check_rank("cache", cache, layout)
    if (cache.shape[-2], cache.shape[-1]) != (n, d):
        raise RuntimeError(f"cache must have shape {layout} with N = {n}, D = {d}, got {tuple(cache.shape)}")
    if not all(size > 0 for size in cache.shape[:-2]):
        raise RuntimeError(f"cache must have at least one row, got shape {tuple(cache.shape)}")
    if any(step == 0 and size > 1 for step, size in zip(cache.stride(), cache.shape)):
        raise RuntimeError("cache must have memory of its own for each row and head, got an expanded tensor")


def check_index(name, tensor, layout, batch, input):
    """Raise unless it is an integer tensor of that layout for so many sequences, where `input` is."""
    check_tensor(name, tensor)
    if tensor.dtype not in INDEX_DTYPES:
        raise TypeError(f"{name} must be of torch.int32 or torch.int64, got {tensor.dtype}")
    check_rank(name, tensor, layout)
    if batch is not None and tensor.shape[0] != batch:
        raise RuntimeError(f"{name} must have {batch} rows, one a sequence, got shape {tuple(tensor.shape)}")
    if tensor.ndim == 2 and tensor.shape[0] and tensor.shape[1] < 1:
        raise RuntimeError(f"{name} must have at least one column, got shape {tuple(tensor.shape)}")
    if tensor.device != input.device:
        raise RuntimeError(f"{name} must be on the device of input, {input.device}, got {tensor.device}")


def check_no_gradient(tensors):
    """Raise if autograd would record a call, in reverse or in forward mode."""
    for name, tensor in tensors.items():
        if (tensor.requires_grad and torch.is_grad_enabled()) or _has_tangent(tensor):
            raise RuntimeError(
                f"{name} must not need a gradient, since what is written to a cache has none: call under "
                "torch.no_grad(), or pass detached tensors; nsa_compress has gradients"
            )


def _has_tangent(tensor):
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def check_own_memory(**tensors):
    for name, tensor in tensors.items():
        check_memory(name, tensor)


def check_lengths(name, lengths, n_rows):
    """Raise unless an int64 array holds lengths of sequences whose tables have pages for so many rows."""
    wrong = (lengths < 0) | (lengths > n_rows)
    if wrong.any():
        i = int(wrong.argmax())
        if lengths[i] < 0:
            raise RuntimeError(f"{name} must not be negative, got {lengths[i]} at index {i}")
        raise RuntimeError(
            f"{name} must be at most {n_rows}, as many rows as block_table has pages for, got {lengths[i]} at index {i}"
        )


def check_growth(before, after):
    wrong = after < before
    if wrong.any():
        i = int(wrong.argmax())
        raise RuntimeError(
            f"seq_len_after must not be less than seq_len_before, got {after[i]} after {before[i]} at index {i}"
        )


def check_slots(slots, n_slots):
    """Raise unless all of slot_mapping, an int64 array, are different rows of cache, or NONE."""
    wrong = (slots < NONE) | (slots >= n_slots)
    if wrong.any():
        i = int(wrong.argmax())
        raise RuntimeError(
            f"slot_mapping must be in [0, {n_slots}), the rows of cache, or {NONE} where no window is due, got "
            f"{slots[i]} at index {i}"
        )
    _check_unique("slot_mapping", slots[slots != NONE])


def check_due(slots, sequences):
    """Raise if a sequence whose window is due has no slot."""
    none = slots == NONE
    if none.any():
        i = sequences[int(none.argmax())]
        raise RuntimeError(f"slot_mapping must have a row of cache where a window is due, got {NONE} at index {i}")


def check_entries(name, entries, sequences, columns, n_pages):
    """Raise unless the entries of a table that are used, here with their places in it, are pages."""
    wrong = (entries < 0) | (entries >= n_pages)
    if wrong.any():
        i = int(wrong.argmax())
        raise RuntimeError(
            f"{name} must hold pages in [0, {n_pages}), got {entries[i]} at index ({sequences[i]}, {columns[i]})"
        )


def check_columns(name, columns, sequences, width):
    """Raise if a table has too few columns for what is used of it."""
    wrong = columns >= width
    if wrong.any():
        i = int(wrong.argmax())
        raise RuntimeError(
            f"{name} must have a page for every window that is written: sequence {sequences[i]} needs "
            f"{columns[wrong].max() + 1} columns, got {width}"
        )


def check_targets(rows):
    """Raise if two windows go to one row of the cache."""
    _check_unique("cache_table", rows, "two windows go to row {} of cache")


def _check_unique(name, values, what="got {} twice"):
    if len(values) > 1:
        values = np.sort(values)
        twice = values[1:][values[1:] == values[:-1]]
        if len(twice):
            raise RuntimeError(f"{name} must not name a row of cache twice: {what.format(twice[0])}")


def _check_shape(name, tensor, expected, layout):
    if tuple(tensor.shape) != expected:
        raise RuntimeError(f"{name} must have shape {layout} = {expected}, got {tuple(tensor.shape)}")
