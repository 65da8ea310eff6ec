"""What `torch.utils.flop_counter.FlopCounterMode` counts for the three ops.

Each multiplies and adds once for every element of every window: 2 * T' * block * N * D, whatever rows windows share.
The formulas are registered by `import nsa`, since a counter knows those alone that were there when it was made.
"""

import warnings
from math import prod

import torch

from . import op as _op  # noqa: F401  registers torch.ops.nsa
from .triton_ascend import check_installation


def compress_flops(input_shape, weight_shape, block, stride, *args, out_shape, **kwargs):
    return 2 * prod(out_shape) * block


def gradient_flops(grad_output_shape, other_shape, block, stride, *args, out_shape, **kwargs):
    return 2 * prod(grad_output_shape) * block


try:
    check_installation()  # before Triton is imported, which two installations in one folder may not survive
    from torch.utils.flop_counter import register_flop_formula
except Exception as error:  # it imports Triton: one that is broken must not take the CPU's op along
    warnings.warn(
        f"FlopCounterMode does not count nsa_compress: torch.utils.flop_counter cannot be imported, {error!r}",
        RuntimeWarning,
        stacklevel=2,
    )
else:
    register_flop_formula(torch.ops.nsa.nsa_compress)(compress_flops)
    gradients = [torch.ops.nsa.nsa_compress_grad_input, torch.ops.nsa.nsa_compress_grad_weight]
    register_flop_formula(gradients)(gradient_flops)
