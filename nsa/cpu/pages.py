"""Windows that filled, as a packed sequence whose rows lie in pages: so the forward's code computes them."""

from typing import NamedTuple

import numpy as np
import torch

from nsa.contract import GRANULE
from nsa.paged_contract import (
    check_columns,
    check_due,
    check_entries,
    check_growth,
    check_lengths,
    check_slots,
    check_targets,
)
from nsa.table import WindowTable, spread


class Filled(NamedTuple):
    """A segment for each sequence that has windows to write: the rows of these windows.

    Block 32, stride 16, a sequence of 90 rows that had 60: it has windows 2 and 3, where it had 0 and 1. The segment is
    its rows 32 to 79, whose windows 0 and 1 these are.
    """

    table: WindowTable
    groups: torch.Tensor  # offset in `pages`, in elements, of each 16 rows of the segments
    windows: torch.Tensor  # offset in `cache`, in elements, of the row of each window


def filled(pages, table, before, after, slots, cache, block, stride):
    """The `Filled` windows of `append`'s arguments, None if there are none. RuntimeError for values that are no
    lengths, pages or slots; of the tables, entries that are not used may be anything."""
    table, before, after, slots = (
        tensor.numpy().astype(np.int64, copy=False) for tensor in (table, before, after, slots)
    )
    n_pages, page = pages.shape[:2]
    n_cache_pages, cache_page = cache.shape[:2]
    for name, lengths in (("seq_len_before", before), ("seq_len_after", after)):
        check_lengths(name, lengths, table.shape[1] * page)
    check_growth(before, after)
    newest = slots.ndim == 1
    if newest:
        check_slots(slots, n_cache_pages)

    first, end = (np.maximum(lengths - block + stride, 0) // stride for lengths in (before, after))
    due = np.flatnonzero(end > first)
    if not len(due):
        return None
    first, counts = first[due], (end - first)[due]
    lengths = (counts - 1) * stride + block

    segment, i_group = spread(lengths // GRANULE)
    row = first[segment] * stride + i_group * GRANULE
    at = due[segment], row // page
    check_entries("block_table", table[at], *at, n_pages)
    groups = table[at] * pages.stride(0) + row % page * pages.stride(1)

    segment, i_window = spread(counts)
    window = first[segment] + i_window
    if newest:
        slot, row = slots[due], np.zeros_like(due)
        check_due(slot, due)
    else:
        at, row = (due[segment], window // cache_page), window % cache_page
        check_columns("cache_table", at[1], at[0], slots.shape[1])
        slot = slots[at]
        check_entries("cache_table", slot, *at, n_cache_pages)
        check_targets(slot * cache_page + row)
    windows = slot * cache.stride(0) + row * cache.stride(1)
    table = WindowTable(np.cumsum(lengths), block, stride, torch.device("cpu"))
    return Filled(table, torch.from_numpy(groups), torch.from_numpy(windows))
