"""Under `torch.autocast` the ops run in its dtype, as `torch.nn.functional.linear` does; fp64 stays.

Outside autocast nothing is converted: mixed dtypes are the contract's TypeError.
"""

from functools import reduce
from operator import or_

import torch

KEYS = ("AutocastCPU", "AutocastCUDA", "AutocastPrivateUse1")
ALL = reduce(or_, (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)) for key in KEYS))


def seen_dtype(tensor):
    """The dtype that an op sees of a tensor: under autocast not always the tensor's own."""
    dtype, device = tensor.dtype, tensor.device.type
    if device == "meta" or dtype == torch.float64 or not dtype.is_floating_point:
        return dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype


def casting(op):
    """The kernel of `op` under a dispatch key of autocast."""

    def kernel(keyset, a, b, *sizes, **kwargs):
        a, b = (None if tensor is None else tensor.to(seen_dtype(tensor)) for tensor in (a, b))
        with no_autocast():
            return op.redispatch(keyset - ALL, a, b, *sizes, **kwargs)

    return kernel


def no_autocast():
    """A context in which the ops see tensors as they are, for gradients: they run in the dtype of their forward."""
    return torch._C._ExcludeDispatchKeyGuard(ALL)
