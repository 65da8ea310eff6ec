"""The gradients. The op and its two gradient ops are bilinear, and each one's gradients are the other two.

With F(x, w) the compression, A(dy, w) its gradient with respect to x and B(dy, x) with respect to w:

    y  = F(x, w)     dx  = A(dy, w)     dw = B(dy, x)
    dx = A(dy, w)    ddy = F(g, w)      dw = B(dy, g)       where g, like x, comes back for dx
    dw = B(dy, x)    ddy = F(x, g)      dx = A(dy, g)       where g, like w, comes back for dw

The family is closed, so every derivative of any order is one of the three ops.
"""

import torch
from torch.autograd import forward_ad


class Bilinear(torch.autograd.Function):
    """op(a, b) for one of the three ops; keeps only the factor that a wanted gradient needs."""

    @staticmethod
    def forward(ctx, op, a, b, block, stride, actual_seq_len):
        _, a_wanted, b_wanted, *_ = ctx.needs_input_grad
        ctx.save_for_backward(a if b_wanted else None, b if a_wanted else None)
        ctx.op, ctx.geometry = op, (block, stride, actual_seq_len)
        with torch._C._AutoDispatchBelowAutograd():  # what torch.library's own autograd registration does
            return op(a, b, block, stride, actual_seq_len=actual_seq_len)

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        block, stride, actual_seq_len = ctx.geometry
        nsa = torch.ops.nsa
        compress, grad_input, grad_weight = (
            nsa.nsa_compress.default,
            nsa.nsa_compress_grad_input.default,
            nsa.nsa_compress_grad_weight.default,
        )
        # for each op, the op and the factors that make the gradient of a, then of b
        for_a, for_b = {
            compress: ((grad_input, g, b), (grad_weight, g, a)),
            grad_input: ((compress, g, b), (grad_weight, a, g)),
            grad_weight: ((compress, b, g), (grad_input, a, g)),
        }[ctx.op]
        grads = [
            op(*factors, block, stride, actual_seq_len=actual_seq_len) if wanted else None
            for (op, *factors), wanted in zip((for_a, for_b), ctx.needs_input_grad[1:3])
        ]
        return None, *grads, None, None, None


def differentiable(op):
    """The kernel of `op` under the dispatch key Autograd."""

    def kernel(a, b, block, stride, *, actual_seq_len):
        tracked = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
        # under forward-mode AD too: the Function raises that it has no jvp, while the op alone would drop the tangents
        if tracked or forward_ad._current_level >= 0:
            return Bilinear.apply(op, a, b, block, stride, actual_seq_len)
        with torch._C._AutoDispatchBelowAutograd():
            return op(a, b, block, stride, actual_seq_len=actual_seq_len)

    return kernel
