"""The gradients. The op and its two gradient ops are bilinear, and each one's gradients are the other two.

With F(x, w) the compression, A(dy, w) its gradient with respect to x and B(dy, x) with respect to w:

    y  = F(x, w)     dx  = A(dy, w)     dw = B(dy, x)
    dx = A(dy, w)    ddy = F(g, w)      dw = B(dy, g)       where g, like x, comes back for dx
    dw = B(dy, x)    ddy = F(x, g)      dx = A(dy, g)       where g, like w, comes back for dw

The family is closed, so every derivative of any order is one of the three ops. In forward mode an op's tangent is the
op once for each factor: op(a', b) + op(a, b').
"""

import sys
from contextlib import contextmanager, nullcontext

import torch
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from .autocast import no_autocast
from .segments import is_plain, overload_for, suited_to
from .tracing import untraced


class Bilinear(_SingleLevelFunction):
    """op(a, b) for one of the three ops; keeps only the factor that a wanted gradient needs.

    `torch.autograd.Function` would handle the levels of torch.func by itself, and refuse most of them. A function of a
    single level is called at each by the dispatcher, as those of PyTorch's own ops are.
    """

    # by which compiled autograd tells graphs apart
    _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)

    @staticmethod
    def forward(ctx, keyset, op, a, b, block, stride, ends, size, has_tangent):
        with _outer_levels() if _in_transform() else nullcontext():
            result = below(keyset, op, a, b, block, stride, actual_seq_len=ends, **size)
        a_wanted, b_wanted = ctx.needs_input_grad[2:4]
        tensor, ctx.ends = (ends, None) if isinstance(ends, torch.Tensor) else (None, ends)
        if tensor is not None and tensor.is_inference():
            tensor = tensor.clone()  # PyTorch does not save such tensors; the op takes them
        ctx.save_for_backward(a if b_wanted else None, b if a_wanted else None, tensor)
        if has_tangent:
            ctx.save_for_forward(a, b, tensor)
            ctx.set_materialize_grads(False)  # else a factor without a tangent gets one of zeros
        ctx.op, ctx.geometry = op, (block, stride)
        ctx.rows = a.shape[0], b.shape[0], result.shape[0]
        return result

    @staticmethod
    @untraced
    def backward(ctx, g):
        if g is None:
            return (None,) * 9
        a, b, ends = _unpacked(ctx)
        rows_a, rows_b, _ = ctx.rows
        # for each op, what makes the gradient of a, then of b; and how many rows that has, for tracers
        for_a, for_b = {
            "nsa_compress": (("nsa_compress_grad_input", g, b, rows_a), ("nsa_compress_grad_weight", g, a, rows_b)),
            "nsa_compress_grad_input": (("nsa_compress", g, b, rows_a), ("nsa_compress_grad_weight", a, g, rows_b)),
            "nsa_compress_grad_weight": (("nsa_compress", b, g, rows_a), ("nsa_compress_grad_input", a, g, rows_b)),
        }[ctx.op._opname]
        with no_autocast():
            grads = [
                _call(*gradient, *ctx.geometry, ends) if wanted else None
                for gradient, wanted in zip((for_a, for_b), ctx.needs_input_grad[2:4])
            ]
        return None, None, *grads, None, None, None, None, None

    @staticmethod
    @untraced
    def jvp(ctx, _keyset, _op, a_tangent, b_tangent, *_):
        a, b, ends = _unpacked(ctx)
        *_, rows = ctx.rows
        with no_autocast():
            terms = [
                _call(ctx.op._opname, *factors, rows, *ctx.geometry, ends)
                for factors, tangent in (((a_tangent, b), a_tangent), ((a, b_tangent), b_tangent))
                if tangent is not None
            ]
        return terms[0] if len(terms) == 1 else terms[0] + terms[1]


# the names under which profilers and the graph of autograd show them, with "Backward" behind
_FUNCTIONS = {
    "nsa_compress": type("NsaCompress", (Bilinear,), {}),
    "nsa_compress_grad_input": type("NsaCompressGradInput", (Bilinear,), {}),
    "nsa_compress_grad_weight": type("NsaCompressGradWeight", (Bilinear,), {}),
}
RESULT_ROWS = {"nsa_compress": "n_windows", "nsa_compress_grad_input": "n_rows"}  # arguments that say how many


def differentiable(packet):
    """The kernel of both overloads of an op under the dispatch key Autograd."""
    function = _FUNCTIONS[packet._qualified_op_name.partition("::")[2]]
    names = [argument.name for argument in packet.default._schema.arguments[:2]]

    def kernel(keyset, a, b, block, stride, actual_seq_len, **size):
        ends = suited_to(names, a, b, actual_seq_len)
        op = overload_for(packet, ends)
        tracked = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
        has_tangent = _has_tangent(a, b)
        if tracked or has_tangent:
            with enable_single_level_autograd_function() if _in_transform() else nullcontext():
                return function.apply(keyset, op, a, b, block, stride, ends, size, has_tangent)
        return below(keyset, op, a, b, block, stride, actual_seq_len=ends, **size)

    return kernel


def below(keyset, op, *args, **kwargs):
    """The same call of the op, on its way from the key Autograd to the next; it counts as one call."""
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)


def _call(name, a, b, rows, block, stride, ends):
    op = overload_for(getattr(torch.ops.nsa, name), ends)
    return op(a, b, block, stride, actual_seq_len=ends, **({RESULT_ROWS[name]: rows} if name in RESULT_ROWS else {}))


def _unpacked(ctx):
    a, b, ends = ctx.saved_tensors
    return a, b, ctx.ends if ends is None else ends


def _in_transform():
    """Whether torch.func is at work."""
    return torch._C._are_functorch_transforms_active()


@contextmanager
def _outer_levels():
    """Differentiation as it was before a Function switched it off for its own level, for those around that level."""
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        yield


def _has_tangent(*tensors):
    """Whether one may have a tangent. A graph that Dynamo made enters forward mode without the level that it has
    in Python elsewhere: where there may be one, the tensors are asked, which takes some microseconds."""
    if forward_ad._current_level >= 0:
        return True
    if "torch._dynamo" not in sys.modules:
        return False
    dense = [t for t in tensors if is_plain(t) and t.layout is torch.strided and not t.is_nested]
    return any(torch._VF._unpack_dual(t, level=0)[1] is not None for t in dense)
