"""Between memory and a vector core's UB, and within UB.

The DMA moves bursts, which are rows. In UB each burst starts at a multiple of 32 bytes from the one before, and what it
leaves of its last 32 bytes is filled on loads. The library counts the gap between bursts in units of 32 bytes; a
stride in UB that is not a multiple of 32 bytes is rounded up in that way, and the simulator goes where the DMA goes.
"""

import numpy as np

from ..trace import Operation
from . import LIBRARY, demand, intrinsic

BLOCK = 32  # bytes
VALUE = 2  # the padding mode with a value of the caller's


@intrinsic("load_gm_to_ubuf_[123]d_{}")
def load(core, name, source, target, padding, value, left, *rest):
    """Rows of memory to UB, with `left` elements of padding before each."""
    demand(core, name, "no atomic operation, which is not simulated", not any(rest))
    if 0 in source.sizes:
        return
    if target.strides[-1] == 1 and source.strides[-1] != 1 and source.sizes[-1] != 1:
        demand(core, name, "no padding of what is loaded element by element, which is not simulated", left == 0)
        _by_scalar_unit(core, name, "MTE2", source, target)
        return
    rows, into = _rows(source, target)
    itemsize = source.dtype.itemsize
    length = rows.sizes[-1]
    first = into.part(-left)
    demand(core, name, "an address in UB at a multiple of 32", first.address % BLOCK == 0)
    wide = -(-(left + length) * itemsize // BLOCK) * BLOCK // itemsize  # elements that a burst fills
    written = _on_blocks(first, left + length, wide, itemsize)
    fill = value if padding == VALUE else 0  # *assumed*, where the library leaves it to the hardware

    def effect():
        block = np.full((*rows.sizes[:-1], wide), fill, source.dtype)
        block[..., left : left + length] = rows.array()
        written.array()[:] = block

    work = (("load", int(np.prod(rows.sizes[:-2]))),)
    core.instruction("MTE2", name, (rows,), (written,), work, effect)


@intrinsic("store_ubuf_to_gm_[123]d_{}")
def store(core, name, source, target, atomic, *rest):
    demand(core, name, "no atomic operation or padding, which are not simulated", atomic == 0 and not any(rest))
    if 0 in source.sizes:
        return
    rows, into = _rows(source, target)
    demand(core, name, "an address in UB at a multiple of 32", source.address % BLOCK == 0)
    length = rows.sizes[-1]
    read = _on_blocks(rows, length, length, source.dtype.itemsize)

    def effect():
        into.array()[:] = read.array()

    work = (("store", int(np.prod(rows.sizes[:-2]))),)
    core.instruction("MTE3", name, (read,), (into,), work, effect)


@intrinsic("copy_ubuf_to_ubuf_[123]d_{}")
def copy(core, name, source, target, *rest):
    """On the vector unit."""
    demand(core, name, "no padding, which is not simulated", not any(rest))
    demand(core, name, "elements of whole bytes: as a mask of bits it is not simulated", source.dtype != np.bool_)
    if 0 in source.sizes:
        return
    aligned = (source.address - target.address) % BLOCK == 0 and source.strides[-1] == target.strides[-1] == 1
    demand(core, name, "rows at the same place in 32 bytes: others are copied by the scalar unit", aligned)

    def effect():
        target.array()[:] = source.array()

    bytes_ = int(np.prod(source.sizes)) * source.dtype.itemsize
    core.instruction("V", name, (source,), (target,), (("ub copy", -(-bytes_ // BLOCK)),), effect)


def _rows(source, target):
    """Both views as rows of contiguous elements, with at least two dimensions: rows of one element where the last
    dimension has a stride on either side."""
    if source.sizes[-1] != 1 and (source.strides[-1], target.strides[-1]) != (1, 1):
        source, target = (view.part(0, (*view.sizes, 1), (*view.strides, 1)) for view in (source, target))
    if len(source.sizes) == 1:
        source, target = (view.part(0, (1, *view.sizes), (view.sizes[0], *view.strides)) for view in (source, target))
    return [view.part(0, view.sizes, (*view.strides[:-1], 1)) for view in (source, target)]


def _on_blocks(view, length, wide, itemsize):
    """Where the DMA finds the bursts of a view in UB: `wide` elements each, of which the view's are `length`."""
    unit = BLOCK // itemsize
    *outer, pitch = view.strides[:-1]
    gap = -(-pitch // unit) - -(-length // unit)
    pitch = (-(-length // unit) + gap) * unit if view.sizes[-2] > 1 else pitch
    return view.part(0, (*view.sizes[:-1], wide), (*outer, pitch, 1))


def _by_scalar_unit(core, name, pipe, source, target):
    """Element by element, between two waits of the scalar unit for the DMA."""
    core.synchronise("set", pipe, "S", LIBRARY, f"set_flag of {name}")
    core.synchronise("wait", pipe, "S", LIBRARY, f"wait_flag of {name}")
    work = (("scalar element", int(np.prod(source.sizes))),)
    core.issue(Operation("run", "S", name, core.line, reads=(source,), writes=(target,), work=work))
    target.array()[:] = source.array()
    core.synchronise("set", "S", pipe, LIBRARY, f"set_flag of {name}")
    core.synchronise("wait", "S", pipe, LIBRARY, f"wait_flag of {name}")
