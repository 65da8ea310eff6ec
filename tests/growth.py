"""Sequences that grow in pages: what an engine holds, call by call, and what the cache has to hold in the end."""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from cases import DTYPES, SIXTEENS, Case
from hypothesis import strategies as st

FREE = 2  # pages that no sequence has


@dataclass(frozen=True)
class Growth:
    steps: tuple  # of lengths in rows, one for each sequence; a sequence never gets shorter from step to step
    block: int
    stride: int
    n: int
    d: int
    page: int  # rows
    cache_page: int
    dtype: torch.dtype = torch.bfloat16
    index: torch.dtype = torch.int32  # of tables and lengths
    seed: int = field(default=0, repr=False)

    @property
    def geometry(self):
        return (self.block, self.stride)

    @cached_property
    def case(self):
        """The whole sequences, packed."""
        return Case(self.steps[-1], self.block, self.stride, self.n, self.d, self.dtype, self.seed)

    @cached_property
    def x(self):
        """Of each sequence, all of its rows."""
        return self.case.inputs[0].split(self.case.lengths)

    @property
    def weight(self):
        return self.case.inputs[1]

    def counts(self, lengths):
        return [max(0, 1 + (length - self.block) // self.stride) for length in lengths]


class Engine:
    """Pages in shuffled order. Rows that are not there yet, in pages and in the cache, are NaN."""

    def __init__(self, growth, new=torch.empty):
        self.growth = growth
        generator = torch.Generator().manual_seed(growth.seed)

        def paged(rows, page):
            width = max(1, -(-max(rows) // page))
            order = torch.randperm(len(rows) * width + FREE, generator=generator)
            tensor = new((len(order), page, growth.n, growth.d), dtype=growth.dtype).fill_(torch.nan)
            return tensor, order[: len(rows) * width].view(len(rows), width).to(growth.index)

        lengths = growth.steps[-1]
        self.pages, self.table = paged(lengths, growth.page)
        self.cache, self.cache_table = paged(growth.counts(lengths), growth.cache_page)
        self.lengths = [0] * len(lengths)

    def grow(self, lengths, x=None):
        """Put rows into pages; (before, after) as tensors."""
        for b, (begin, end) in enumerate(zip(self.lengths, lengths)):
            for row in range(begin, end):
                page = self.table[b, row // self.growth.page]
                self.pages[page, row % self.growth.page] = (x or self.growth.x)[b][row]
        before, self.lengths = self.lengths, list(lengths)
        return (torch.tensor(some, dtype=self.growth.index) for some in (before, lengths))

    def slot(self, b, window):
        """Page and row in the cache."""
        page = self.growth.cache_page
        return int(self.cache_table[b, window // page]), window % page

    def slot_mapping(self):
        """Of an engine that gives a slot, a row of all pages of the cache, only where a window is due."""
        slots = []
        for b, length in enumerate(self.lengths):
            window, rest = divmod(length - self.growth.block, self.growth.stride)
            page, row = (0, -1) if window < 0 or rest else self.slot(b, window)
            slots.append(page * self.growth.cache_page + row)
        return slots

    def rows(self):
        """All windows of all sequences, in the order of the forward, (T', N, D); and whether all other rows of the
        cache are still NaN."""
        counts = self.growth.counts(self.lengths)
        slots = [self.slot(b, w) for b, count in enumerate(counts) for w in range(count)]
        others = torch.ones(self.cache.shape[:2], dtype=torch.bool)
        for slot in slots:
            others[slot] = False
        rows = torch.stack([self.cache[slot] for slot in slots]) if slots else self.cache.new_empty(0)
        return rows, bool(self.cache[others].isnan().all())


def spread(tensor):
    """The same, every second element of a larger tensor of other numbers."""
    wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), 77)
    wide[..., ::2] = tensor
    return wide[..., ::2]


@st.composite
def growths(draw, dtypes=DTYPES, most=300):
    """Every legal block and stride; pages of 16 to 128 rows; few or many rows a step, one sequence to four."""
    block = draw(SIXTEENS)
    stride = draw(SIXTEENS.filter(lambda stride: stride <= block))
    n, d = draw(st.sampled_from([(1, 16), (2, 64), (3, 48), (5, 16), (8, 128), (1, 256), (16, 32)]))
    batch = draw(st.integers(1, 4))
    few = st.sampled_from([0, 1, 1, 2, stride, stride + 1])
    new = st.one_of(few, st.integers(0, block + 3 * stride))
    steps, lengths = [], [0] * batch
    for _ in range(draw(st.integers(1, 5))):
        lengths = [min(length + draw(new), most) for length in lengths]
        steps.append(tuple(lengths))
    return Growth(
        tuple(steps),
        block,
        stride,
        n,
        d,
        page=16 * draw(st.integers(1, 8)),
        cache_page=draw(st.sampled_from([1, 2, 3, 16])),
        dtype=draw(st.sampled_from(dtypes)),
        index=draw(st.sampled_from([torch.int32, torch.int64])),
        seed=draw(st.integers(0, 99)),
    )
