"""Triton's interpreter, with bf16 rounded as compilers and chips do.

The interpreter of Triton 3.2 to 3.6 cuts the low bits off when it casts fp32 to bf16, so a kernel's rounding
could not be tested with it. `repair` puts round-to-nearest-even in its place, in the test process alone.
"""

import os

import numpy as np
import torch


def repair():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a @triton.jit is met
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def cast_impl(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, src, dst_type)
        bits = torch.from_numpy(np.array(src.data)).bfloat16().view(torch.int16)
        return TensorHandle(bits.numpy().view(np.uint16), tl.bfloat16)

    InterpreterBuilder.cast_impl = cast_impl
