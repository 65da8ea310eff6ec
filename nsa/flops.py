"""What `torch.utils.flop_counter.FlopCounterMode` counts for the three ops.

Each multiplies and adds once for every element of every window: 2 * T' * block * N * D, whatever rows windows share.
A counter knows those formulas alone that were there when it was made; PyTorch's module is slow to import, since it
imports Triton. So they are registered right after it is imported.
"""

from math import prod

import torch


def register():
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(torch.ops.nsa.nsa_compress)(compress_flops)
    gradients = [torch.ops.nsa.nsa_compress_grad_input, torch.ops.nsa.nsa_compress_grad_weight]
    register_flop_formula(gradients)(gradient_flops)


def compress_flops(input_shape, weight_shape, block, stride, *args, out_shape, **kwargs):
    return 2 * prod(out_shape) * block


def gradient_flops(grad_output_shape, other_shape, block, stride, *args, out_shape, **kwargs):
    return 2 * prod(grad_output_shape) * block
