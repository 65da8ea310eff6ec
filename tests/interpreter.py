"""Triton's interpreter, with bf16 treated as compilers and chips do.

The interpreter of Triton 3.2 to 3.6 keeps bf16 as 16 bits in integers. It cuts the low bits off when it casts fp32
to bf16, so that a kernel's rounding could not be tested, and multiplies the integers in a dot product. `repair`
mends both, in the test process alone.
"""

import os

import numpy as np
import torch


def repair():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a @triton.jit is met
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def as_fp32(handle):
        if handle.dtype.scalar == tl.bfloat16:
            return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        if handle.dtype.scalar == tl.float16:  # exact too, and numpy multiplies fp32 far faster
            return TensorHandle(handle.data.astype(np.float32), tl.float32)
        return handle

    def cast_impl(self, src, dst_type):
        kinds = (src.dtype.scalar, dst_type.scalar)
        if kinds == (tl.bfloat16, tl.float32):
            return as_fp32(src)
        if kinds != (tl.float32, tl.bfloat16):
            return cast(self, src, dst_type)
        bits = torch.from_numpy(np.array(src.data)).bfloat16().view(torch.int16)  # to nearest even
        return TensorHandle(bits.numpy().view(np.uint16), tl.bfloat16)

    def create_dot(self, a, b, *rest):
        return dot(self, as_fp32(a), as_fp32(b), *rest)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot
