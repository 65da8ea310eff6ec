"""Memories of bytes, and views into them: what a memref of HIVM is.

A view is a base address in bytes, and sizes and strides in elements, as a memref has them. Buffers of the memory plan
are views into one array of bytes for each memory of a core, so that buffers that overlap really do.
"""

from typing import NamedTuple

import ml_dtypes
import numpy as np

SPACES = {"gm": "GM", "ub": "UB", "cbuf": "L1", "ca": "L0A", "cb": "L0B", "cc": "L0C"}
DTYPES = {
    "i1": np.dtype(np.bool_),
    "i8": np.dtype(np.int8),
    "i16": np.dtype(np.int16),
    "i32": np.dtype(np.int32),
    "i64": np.dtype(np.int64),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
}


class Memory:
    """`bytes` of one memory of a core, or of one tensor in global memory (space "GM", with the argument's name)."""

    def __init__(self, space, data, name=None):
        self.space, self.bytes, self.name = space, data, name or space

    def __repr__(self):
        return f"{self.name}: {len(self.bytes)} bytes of {self.space}"


class View(NamedTuple):
    memory: Memory
    dtype: np.dtype
    base: int  # bytes
    offset: int  # elements, as are sizes and strides
    sizes: tuple
    strides: tuple

    @property
    def address(self):
        """Of the first element, in bytes."""
        return self.base + self.offset * self.dtype.itemsize

    def span(self):
        """The first byte, and the one after the last, of what the view reaches."""
        low = high = 0
        for size, stride in zip(self.sizes, self.strides):
            if size == 0:
                return self.address, self.address
            if stride < 0:
                low += (size - 1) * stride
            else:
                high += (size - 1) * stride
        address, itemsize = self.address, self.dtype.itemsize
        return address + low * itemsize, address + (high + 1) * itemsize

    def fits(self):
        low, high = self.span()
        return low >= 0 and high <= len(self.memory.bytes)

    def array(self):
        """The elements, as a numpy array on the memory itself."""
        steps = tuple(stride * self.dtype.itemsize for stride in self.strides)
        return np.ndarray(self.sizes, self.dtype, self.memory.bytes, self.address, steps)

    def bits(self):
        """The array with integers of the same size, which are equal where all bits are."""
        return self._replace(dtype=np.dtype(f"i{self.dtype.itemsize}")).array()

    def part(self, offset=0, sizes=None, strides=None):
        """A view into the same buffer, `offset` elements further on."""
        return self._replace(
            offset=self.offset + offset,
            sizes=self.sizes if sizes is None else tuple(sizes),
            strides=self.strides if strides is None else tuple(strides),
        )

    def __str__(self):
        low, high = self.span()
        return f"bytes {low} to {high - 1} of {self.memory.name}" if high > low else f"nothing of {self.memory.name}"


def row_major(sizes):
    strides, step = [], 1
    for size in reversed(sizes):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))
