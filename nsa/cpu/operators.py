"""Where no native code can be built: the ops in terms of two of PyTorch's, with no loop over windows.

The unit is a line, a head's row of D elements: row t of head n is line t * N + n of a matrix.

    y, dInput  each line is a weighted sum of picked lines: `embedding_bag`, which reads fp16 and bf16 as they are,
               sums in fp32 (fp64 for fp64) and rounds once (halves of bf16 away from zero)
    dWeight    small matrix products over D, a tile's rows times the windows that hold them, summed in fp32

A product that no window asks for is left out, never multiplied by zero, so that an infinity stays in its windows.
Work goes in chunks that stay in the cache. Neither their size nor any order of summation depends on the threads.
"""

import torch
from torch.nn.functional import embedding_bag, pad

from nsa.contract import GRANULE
from nsa.table import RowRun

PRODUCTS = 1 << 21  # of a chunk of y or dInput
ELEMENTS = 1 << 20  # of x, in a chunk of dWeight


def forward(x, weight, table):
    block, n = weight.shape
    taps = torch.arange(block * n).view(block, n).t().contiguous()  # [N, block], lines
    y = [
        _weighted_sums(x, starts[:, None, None] * n + taps, weight.t())
        for starts in table.starts.split(max(1, PRODUCTS // (n * block)))
    ]
    return torch.cat(y) if len(y) > 1 else y[0]


def grad_input(dy, weight, table, n_rows):
    n, d = dy.shape[1:]
    none = table.n_windows  # a window of zeros
    dy = torch.cat([dy, dy.new_zeros(1, n, d)])
    first_row, tile_rows, windows = _tiles(table, none)
    pad_rows = windows.shape[1] * table.stride - table.block
    weight = pad(weight, (0, 0, 0, pad_rows)).unflatten(0, (-1, table.stride)).flip(0)  # [slots, stride, N]
    weight = weight.permute(1, 2, 0).contiguous()
    inside = pad(torch.ones(table.block, dtype=torch.bool), (0, pad_rows)).view(-1, table.stride).flip(0).t()
    tile_of = torch.repeat_interleave(tile_rows, output_size=n_rows)  # [T]

    def part(begin, end):
        tile = tile_of[begin:end]
        in_tile = torch.arange(begin, end) - first_row[tile]  # [rows]
        window = windows[tile].where(inside[in_tile], none)[:, None]  # [rows, 1, slots]
        lines = window * n + torch.arange(n)[:, None]  # [rows, N, slots]
        return _weighted_sums(dy, lines, weight[in_tile].masked_fill_(window == none, 0))

    step = max(1, PRODUCTS // (n * windows.shape[1]))
    if step >= n_rows:
        return part(0, n_rows)  # without a copy
    dx = dy.new_empty(n_rows, n, d)
    for begin in range(0, n_rows, step):
        end = min(begin + step, n_rows)
        dx[begin:end] = part(begin, end)
    return dx


def grad_weight(dy, x, table):
    n_rows, n, d = x.shape
    acc = torch.promote_types(x.dtype, torch.float32)
    none = table.n_windows
    first_row, _, windows = _tiles(table, none)
    some = (windows < none).any(1)
    first_row, windows = first_row[some], windows[some]
    dots = torch.empty(len(windows), n, table.stride, windows.shape[1], dtype=acc)
    dy = dy.to(acc)
    step = max(1, ELEMENTS // (table.stride * n * d))
    for row, window, b_dots in zip(first_row.split(step), windows.split(step), dots.split(step)):
        # rows past the segment's end meet no window
        rows = (row[:, None] + torch.arange(table.stride)).clamp(max=n_rows - 1)
        b_x = _lines(x, rows).to(acc)  # [tiles * N, stride, D]
        b_dy = _lines(dy, window.clamp(max=none - 1)).transpose(1, 2)  # [tiles * N, D, slots]
        torch.bmm(b_x, b_dy, out=b_dots.flatten(0, 1))
    dw = dots.masked_fill_(windows[:, None, None] == none, 0).sum(0)  # [N, stride, slots]
    return dw.flip(2).permute(2, 1, 0).flatten(0, 1)[: table.block].to(x.dtype).contiguous()


def append(pages, weight, filled, cache):
    """Write to `cache` the windows of a `pages.Filled`, from a copy of their rows."""
    n, d = pages.shape[2:]
    element = torch.arange(n)[:, None] * pages.stride(2) + torch.arange(d)  # [N, D]
    rows = filled.groups[:, None] + torch.arange(GRANULE) * pages.stride(1)  # [groups, 16]
    x = _memory(pages)[rows.view(-1, 1, 1) + element]
    y = forward(x, weight, filled.table)
    element = torch.arange(n)[:, None] * cache.stride(2) + torch.arange(d)
    with torch._C._AutoDispatchBelowADInplaceOrView():  # the op itself says that the cache has changed
        _memory(cache)[filled.windows[:, None, None] + element] = y


def _memory(tensor):
    """All elements from a tensor's first to its last, whether they are its own or not."""
    size = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride()))
    return tensor.as_strided((size,), (1,))


def _weighted_sums(tensor, lines, weight):
    """sum_i weight[..., i] * tensor's line lines[..., i]."""
    terms = lines.shape[-1]
    sums = embedding_bag(
        lines.view(-1, terms),
        tensor.view(-1, tensor.shape[2]),
        mode="sum",
        per_sample_weights=weight.expand_as(lines).reshape(-1, terms),
    )
    return sums.view(-1, *tensor.shape[1:])


def _lines(tensor, rows):
    """Of rows [tiles, k], head by head: [tiles * N, k, D]."""
    n, d = tensor.shape[1:]
    lines = rows[:, None] * n + torch.arange(n)[:, None]  # [tiles, N, k]
    return tensor.view(-1, d).index_select(0, lines.flatten()).view(-1, rows.shape[1], d)


def _tiles(table, none):
    """Of each run of up to `stride` rows of a segment, in the order of the rows: first row, number of rows, and the
    windows [slots] that hold one of them; `none` in the slots that have no window."""
    runs = table.row_runs(table.stride)
    runs = RowRun(*runs[runs[:, 0].argsort()].unbind(1))
    slot = torch.arange(-(-table.block // table.stride))
    exists = (slot >= runs.first[:, None]) & (slot < runs.end[:, None])
    return runs.row, runs.n_rows, (runs.window[:, None] + slot).where(exists, none)
