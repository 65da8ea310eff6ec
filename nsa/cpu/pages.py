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
from nsa.table import spread, windows_per_segment


class Segments:
    """What the forward's code reads of a `WindowTable`, where no segment has rows behind its last window. It is made
    for every call, so in few steps."""

    def __init__(self, lengths, counts, block, stride):
        """lengths, counts: of each segment's rows and windows."""
        self.block, self.stride = block, stride
        self._counts = counts
        begins = np.zeros((2, len(lengths) + 1), np.int64)
        lengths.cumsum(out=begins[0, 1:])
        counts.cumsum(out=begins[1, 1:])
        self.begins = torch.from_numpy(begins)

    @property
    def starts(self):
        segment, i_window = spread(self._counts)
        return self.begins[0][segment] + torch.from_numpy(i_window * self.stride)


class Filled(NamedTuple):
    """A segment for each sequence that has windows to write: the rows of these windows.

    Block 32, stride 16, a sequence of 90 rows that had 60: it has windows 2 and 3, where it had 0 and 1. The segment is
    its rows 32 to 79, whose windows 0 and 1 these are.
    """

    table: Segments
    groups: torch.Tensor  # offset in `pages`, in elements, of each 16 rows of the segments
    windows: torch.Tensor  # offset in `cache`, in elements, of the row of each window


def filled(pages, table, before, after, slots, cache, block, stride):
    """The `Filled` windows of `append`'s arguments, None if there are none. RuntimeError for values that are no
    lengths, pages or slots; of the tables, entries that are not used may be anything."""
    # tables may be much larger than what is used of them: so that alone is brought to 64 bits, further down
    table, before, after, slots = (tensor.numpy() for tensor in (table, before, after, slots))
    n_pages, page = pages.shape[:2]
    n_cache_pages, cache_page = cache.shape[:2]
    for name, lengths in (("seq_len_before", before), ("seq_len_after", after)):
        check_lengths(name, lengths, table.shape[1] * page)
    check_growth(before, after)
    newest = slots.ndim == 1
    if newest:
        check_slots(slots, n_cache_pages)

    first, end = (windows_per_segment(lengths, block, stride) for lengths in (before, after))
    due = (end > first).nonzero()[0]
    if not len(due):
        return None
    first, end = first[due].astype(np.int64, copy=False), end[due]
    counts = end - first
    lengths = (counts - 1) * stride + block

    segment, i_group = spread(lengths // GRANULE)
    row = first[segment] * stride + i_group * GRANULE
    column = row // page
    at = due[segment], column
    of_table = table[at].astype(np.int64, copy=False)
    check_entries("block_table", of_table, *at, n_pages)
    groups = of_table * pages.stride(0) + (row - column * page) * pages.stride(1)

    if newest:
        slot, row = slots[due].astype(np.int64, copy=False), 0
        check_due(slot, due)
    else:
        segment, i_window = spread(counts)
        window = first[segment] + i_window
        column = window // cache_page
        at, row = (due[segment], column), window - column * cache_page
        check_columns("cache_table", column, at[0], slots.shape[1])
        slot = slots[at].astype(np.int64, copy=False)
        check_entries("cache_table", slot, *at, n_cache_pages)
        check_targets(slot * cache_page + row)
    windows = slot * cache.stride(0) + row * cache.stride(1)
    return Filled(Segments(lengths, counts, block, stride), torch.from_numpy(groups), torch.from_numpy(windows))
