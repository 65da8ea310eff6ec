"""The CPU: vectorised PyTorch over all windows at once, a step a tap.

Sums are kept in fp32 (fp64 for fp64) and rounded once, as on the other devices.
"""

import torch

from .table import GROUP


def forward(x, weight, table):
    acc = torch.promote_types(x.dtype, torch.float32)
    weight = weight.to(acc)[:, :, None]  # [block, N, 1]
    y = x.new_zeros((len(table.starts), *x.shape[1:]), dtype=acc)  # [T', N, D]
    for j in range(len(weight)):
        y.addcmul_(x.index_select(0, table.starts + j).to(acc), weight[j])
    return y.to(x.dtype)


def grad_input(dy, weight, table, n_rows, stride):
    acc = torch.promote_types(dy.dtype, torch.float32)
    block = len(weight)
    row, rows, first, end, tap = table.groups.unbind(1)
    taps = tap[:, None] + torch.arange(GROUP)  # [n_groups, GROUP], of the first window
    dx = dy.new_zeros((len(row), GROUP, *dy.shape[1:]), dtype=acc)
    for k in range(-(-block // stride)):  # the k-th window that holds the group
        held = (first + k < end).nonzero().squeeze(1)
        b_w = weight[taps[held] - k * stride].to(acc)  # [held, GROUP, N]
        b_dy = dy.index_select(0, first[held] + k).to(acc)  # [held, N, D]
        dx.index_add_(0, held, b_w[..., None] * b_dy[:, None])
    inside = (torch.arange(GROUP) < rows[:, None]).flatten()  # a segment's last group may be short
    return dx.to(dy.dtype).flatten(0, 1)[inside]


def grad_weight(dy, x, table, block):
    acc = torch.promote_types(x.dtype, torch.float32)
    dy = dy.to(acc)
    dw = [torch.einsum("wnd,wnd->n", dy, x.index_select(0, table.starts + j).to(acc)) for j in range(block)]
    return torch.stack(dw).to(x.dtype)
