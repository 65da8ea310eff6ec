"""Ours and what people would use instead: each a function of (x, weight) for one case, differentiable in both."""

import importlib.util

import torch
import torch.nn.functional as F

from nsa import accelerator, cpu
from nsa.table import window_table


class NotApplicableError(Exception):
    """Why an implementation has no time in a case."""


def native(case):
    """The registered op, as it runs on a CPU."""
    _needs_cpu(case)
    try:
        cpu.native.library(torch.backends.cpu.get_cpu_capability())
    except cpu.native.BuildError as reason:
        raise NotApplicableError(str(reason)) from reason
    geometry = (case.block, case.stride)
    return lambda x, weight: torch.ops.nsa.nsa_compress(x, weight, *geometry, actual_seq_len=case.actual_seq_len)


def operators(case):
    """The operators of PyTorch that the op runs on where the native code cannot be built."""
    _needs_cpu(case)
    return _differentiable(case, cpu.operators)


def cube(case):
    if case.dtype not in accelerator.HALF:
        raise NotApplicableError("multiplies fp16 and bf16")
    return _family(case, "cube")


def vector(case):
    return _family(case, "vector")


def eager(case):
    """unfold and einsum, segment by segment, in fp32."""
    return _by_segment(case, _segment)


def compiled(case):
    """What `eager` does to a segment, compiled for any length."""
    torch._dynamo.config.recompile_limit = 1000  # past this number, PyTorch would run the function uncompiled
    return _by_segment(case, torch.compile(_segment, dynamic=True))


def fused(case):
    """All windows of all segments gathered, multiplied and summed in fp32, compiled into one loop for the shape."""
    rows = window_table(case.actual_seq_len, case.block, case.stride, case.device).starts[:, None]
    rows = rows + torch.arange(case.block, device=case.device)

    def function(x, weight):
        return (x.float()[rows] * weight.float()[..., None]).sum(1).to(x.dtype)

    return torch.compile(function, dynamic=False)


def taps(case):
    """A multiplication and an addition of all windows for each tap, segment by segment, in fp32."""

    def segment(x, weight, block, stride):
        y = 0
        for w, rows in zip(weight[..., None], x.unfold(0, block, stride).unbind(-1)):
            y = y + w * rows
        return y

    return _by_segment(case, segment)


def conv1d(case):
    """A convolution grouped by heads, D the batch, segment by segment, in fp32."""

    def segment(x, weight, block, stride):
        y = F.conv1d(x.permute(2, 1, 0), weight.t()[:, None], stride=stride, groups=x.shape[1])
        return y.permute(2, 1, 0)

    return _by_segment(case, segment)


def fla(case):
    """Mean pooling of packed segments in fla-core: ours if every weight is 1 / block."""
    if case.stride != case.block:
        raise NotApplicableError("pools without overlap")
    if case.device.type != "cuda":
        raise NotApplicableError("its Triton kernels need a GPU")
    if importlib.util.find_spec("fla") is None:
        raise NotApplicableError("fla-core is not installed")
    from fla.ops.utils.pooling import mean_pooling

    ends = torch.tensor([0, *case.actual_seq_len], device=case.device)
    # it keeps each segment's incomplete window, with a divisor of its own
    chunks = [(length // case.block, -(-length // case.block)) for length in case.lengths]
    whole = torch.tensor([i < full for full, count in chunks for i in range(count)], device=case.device)
    return lambda x, weight: mean_pooling(x[None], case.block, cu_seqlens=ends)[0][whole]


def vendor(case):
    """torch_npu's op, in Ascend C."""
    if case.device.type != "npu":
        raise NotApplicableError("runs on an NPU")
    import torch_npu

    geometry = (case.block, case.stride)
    return lambda x, weight: torch_npu.npu_nsa_compress(x, weight, *geometry, actual_seq_len=case.actual_seq_len)


OURS = {"native": native, "operators": operators, "cube": cube, "vector": vector}
IMPLEMENTATIONS = OURS | {
    "eager": eager,
    "taps": taps,
    "conv1d": conv1d,
    "compiled": compiled,
    "fused": fused,
    "fla": fla,
    "torch_npu": vendor,
}
MEAN_ONLY = {"fla"}  # weights are 1 / block, and have no gradient
LENGTHS_GIVEN = {"fused", "fla"}  # index tensors, or a compilation, are made for the lengths before the call


def _segment(x, weight, block, stride):
    return torch.einsum("jn,wndj->wnd", weight, x.unfold(0, block, stride))


def _by_segment(case, segment):
    block, stride = case.block, case.stride

    def function(x, weight):
        weight = weight.float()  # once, so that gradients add up in fp32
        parts = [s for s in x.float().split(case.lengths) if len(s) >= block]
        return torch.cat([segment(s, weight, block, stride) for s in parts]).to(x.dtype)

    return function


def _needs_cpu(case):
    if case.device.type != "cpu":
        raise NotApplicableError("runs on the CPU")


def _family(case, name):
    if case.device.type == "cpu":
        raise NotApplicableError("Triton kernels need a GPU or an NPU")
    return _differentiable(case, accelerator, family=name)


def _differentiable(case, backend, **how):
    """The three functions of a backend, without the registered op around them."""

    def table():
        return window_table(case.actual_seq_len, case.block, case.stride, case.device)

    class Compress(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return backend.forward(x, weight, table(), **how)

        @staticmethod
        def backward(ctx, dy):
            x, weight = ctx.saved_tensors
            dx = backend.grad_input(dy, weight, table(), len(x), **how)
            return dx, backend.grad_weight(dy, x, table(), **how)

    return Compress.apply
