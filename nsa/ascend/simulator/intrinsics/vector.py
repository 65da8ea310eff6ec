"""The vector unit: what it computes in UB.

Operations have an element's type, one rounding each. Where the hardware's way is not documented, it is *assumed*: sums
of a row are made in the order of numpy, casts to integers saturate, and fp16 overflows to infinity.

An instruction takes repeats of 256 bytes. A view whose rows are not contiguous takes at least a repeat a row.
"""

import numpy as np

from ..memory import View
from ..trace import Operation
from . import LIBRARY, demand, intrinsic

BLOCK = 32  # bytes, which addresses are multiples of
REPEAT = 256  # bytes
BINARY = {
    "vadd": np.add,
    "vsub": np.subtract,
    "vmul": np.multiply,
    "vdiv": np.divide,
    "vmax": np.maximum,
    "vmin": np.minimum,
    "vand": np.bitwise_and,
    "vor": np.bitwise_or,
    "vxor": np.bitwise_xor,
    "vshl": np.left_shift,
    "vshr": np.right_shift,
}
UNARY = {
    "vexp": np.exp,
    "vln": np.log,
    "vsqrt": np.sqrt,
    "vrsqrt": lambda x: np.reciprocal(np.sqrt(x)),
    "vrec": np.reciprocal,
    "vabs": np.abs,
    "vrelu": lambda x: np.maximum(x, 0),
    "vnot": np.invert,
}
COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
REDUCE = {"sum": np.add, "max": np.maximum, "min": np.minimum, "prod": np.multiply}
REDUCED_AXIS = {"r": 0, "ar": 1, "ra": 0, "aar": 2, "ra0a1": 0, "ara": 1}
ROUND = {0: np.rint, 1: np.floor, 2: np.ceil, 3: lambda x: np.copysign(np.floor(np.abs(x) + 0.5), x), 4: np.trunc}


def repeats(view):
    """Of one instruction, or of those that go over its rows."""
    rows, length, itemsize = 1, 1, view.dtype.itemsize
    for size, stride in zip(reversed(view.sizes), reversed(view.strides)):
        if size == 1:
            continue
        if rows == 1 and stride == length:
            length *= size
        else:
            rows *= size
    return rows * -(-length * itemsize // REPEAT)


def bits_of(view):
    """The bytes of a mask: its elements, offsets and strides are bits."""
    (size,) = view.sizes
    return View(view.memory, np.dtype(np.uint8), view.base + view.offset // 8, 0, (-(-size // 8),), (1,))


def _run(core, name, instruction, reads, writes, wide, effect, n_repeats=None):
    reads, writes = (tuple(view for view in views if 0 not in view.sizes) for views in (reads, writes))
    for view in (*reads, *writes):
        demand(core, name, "addresses in UB at multiples of 32", view.address % BLOCK == 0)

    def quietly():
        with np.errstate(all="ignore"):
            effect()

    work = ((instruction, repeats(wide) if n_repeats is None else n_repeats),)
    core.instruction("V", name, reads, writes, work, quietly)


def _bitwise(array):
    """Bits of floats, for operations on bits."""
    return array if array.dtype.kind in "iub" else array.view(f"i{array.dtype.itemsize}")


@intrinsic("(vadd|vsub|vmul|vdiv|vmax|vmin|vand|vor|vxor)_[123]d_{}")
def binary(core, name, a, b, out, *temporary):
    """Two views, of which one may have size 1 where the other has more."""
    instruction = name.split("_")[0]

    def effect():
        x, y, z = (view.array() for view in (a, b, out))
        if instruction in ("vand", "vor", "vxor"):
            x, y, z = map(_bitwise, (x, y, z))
        z[...] = BINARY[instruction](x, y)

    last = a.sizes[-1] != b.sizes[-1]  # the library broadcasts in its temporary buffer
    _run(core, name, instruction, (a, b), (out, *temporary) if last else (out,), out, effect)


@intrinsic("(vadds?|vsubs?|vmuls?|vdivs?|vmaxs?|vmins?|vshls|vshrs)_vs_[123]d_{}")
def with_scalar(core, name, a, scalar, out, *temporary):
    instruction = name.split("_")[0]
    operation = BINARY[instruction.removesuffix("s") if instruction not in BINARY else instruction]

    def effect():
        out.array()[...] = operation(a.array(), a.dtype.type(scalar))

    _run(core, name, instruction, (a,), (out,), out, effect)


@intrinsic("(vsubs?|vdivs?)_sv_[123]d_{}")
def scalar_first(core, name, scalar, a, out, *temporary):
    operation = BINARY[name.split("_")[0].removesuffix("s")]

    def effect():
        out.array()[...] = operation(a.dtype.type(scalar), a.array())

    _run(core, name, name.split("_")[0], (a,), (out, *temporary), out, effect)


@intrinsic(f"({'|'.join(UNARY)})_[123]d_{{}}")
def unary(core, name, a, out, *temporary):
    instruction = name.split("_")[0]

    def effect():
        x, z = a.array(), out.array()
        if instruction == "vnot":
            x, z = map(_bitwise, (x, z))
        z[...] = UNARY[instruction](x)

    _run(core, name, instruction, (a,), (out,), out, effect)


@intrinsic("vcast_{}_to_{}_[12]d_with_mode")
def cast(core, name, source, target, mode):
    """Rounded to the nearest, ties to even, in mode 0."""

    def effect():
        x = source.array()
        if x.dtype.kind in "iu" or target.dtype.kind in "iu":
            x = x.astype(np.float64) if x.dtype.kind not in "iu" else x
            if target.dtype.kind in "iu" and x.dtype.kind == "f":
                limits = np.iinfo(target.dtype)
                x = np.clip(ROUND[mode](np.nan_to_num(x, posinf=np.inf, neginf=-np.inf)), limits.min, limits.max)
        target.array()[...] = x.astype(target.dtype)

    narrows = source.dtype.kind == "V" or target.dtype.itemsize < source.dtype.itemsize
    demand(
        core,
        name,
        "rounding to the nearest, the one that is simulated",
        mode == 0 or not narrows or target.dtype.kind in "iu",
    )
    wide = source if source.dtype.itemsize > target.dtype.itemsize else target
    _run(core, name, "vconv", (source,), (target,), wide, effect)


@intrinsic("vcmps?_(eq|ne|lt|le|gt|ge)_1d_{}")
def compare(core, name, a, b, mask, *temporary):
    """A bit an element, whole repeats of 64 bits."""
    operation = COMPARE[name.split("_")[1]]
    written = bits_of(mask.part(0, (-(-mask.sizes[0] // 64) * 64,)))

    def effect():
        is_true = operation(a.array(), b.array() if hasattr(b, "array") else a.dtype.type(b))
        packed = np.packbits(is_true, bitorder="little")
        written.array()[: len(packed)] = packed
        written.array()[len(packed) :] = 0

    _run(core, name, "vcmp", (a, b) if hasattr(b, "array") else (a,), (written,), a, effect)


@intrinsic("vsel_(ss|vv|vs|sv)_1d_(bool_)?{}")
def select(core, name, mask, a, b, out, *temporary):
    """The scalar unit puts the mask's address into the temporary buffer first, between two waits for the vector unit."""
    bits = bits_of(mask)
    size = out.sizes[0]

    def effect():
        chosen = np.unpackbits(bits.array(), bitorder="little")[:size].astype(bool)
        x, y = (v.array() if hasattr(v, "array") else out.dtype.type(v) for v in (a, b))
        out.array()[:] = np.where(chosen, x, y)

    reads = (bits, *(v for v in (a, b) if hasattr(v, "array")))
    if temporary:
        (address,) = (t._replace(dtype=np.dtype(np.int64), offset=0, base=t.address, sizes=(1,)) for t in temporary)
        core.synchronise("set", "V", "S", LIBRARY, f"set_flag of {name}")
        core.synchronise("wait", "V", "S", LIBRARY, f"wait_flag of {name}")
        core.issue(Operation("run", "S", name, core.line, writes=(address,), work=(("scalar store", 1),)))
        address.array()[:] = bits.address
        core.synchronise("set", "S", "V", LIBRARY, f"set_flag of {name}")
        core.synchronise("wait", "S", "V", LIBRARY, f"wait_flag of {name}")
        reads = (*reads, address)
        core.barrier("V")
    _run(core, name, "vsel", reads, (out,), out, effect)


@intrinsic("broadcast_scalar_{}_to_[123]d")
def broadcast(core, name, value, out):
    def effect():
        out.array()[...] = value

    _run(core, name, "vector_dup", (), (out,), out, effect)


@intrinsic("(enablevcg?_)?reduce_(sum|max|min|prod)_(r|ar|ra|aar|ra0a1|ara)_{}")
def reduce(core, name, source, out, temporary, initial):
    """Along the axis of the r in the name. Along the last one, whole repeats are summed; along others, halves are
    added to each other, as the library does, the rest after the first halves."""
    kind, axes = name.removeprefix("enablevcg_").removeprefix("enablevc_").split("_")[1:3]
    operation, axis = REDUCE[kind], REDUCED_AXIS[axes]
    last = axis == len(source.sizes) - 1

    def effect():
        x = source.array()
        out.array()[...] = operation.reduce(x, axis, keepdims=True) if last else _by_halves(operation, x, axis)

    n = repeats(source)
    work = (
        ("vcadd" if kind == "sum" else "vcmax", n + -(-n // 64))
        if last
        else (f"v{'add' if kind == 'sum' else kind}", n)
    )
    _run(core, name, work[0], (source,), (out, temporary), source, effect, work[1])


def _by_halves(operation, x, axis):
    x = np.moveaxis(x, axis, 0)
    main = 1 << (len(x).bit_length() - 1)
    tail = x[main:]
    if main == 1:
        return np.moveaxis(x[:1], 0, axis)
    half = main // 2
    sums = operation(x[:half], x[half:main])
    for start in range(0, len(tail), half):
        part = tail[start : start + half]
        sums[: len(part)] = operation(part, sums[: len(part)])
    while len(sums) > 1:
        half = len(sums) // 2
        sums = operation(sums[:half], sums[half:])
    return np.moveaxis(sums, 0, axis)


@intrinsic("deinterleave_channel_([01]_from_2|0_from_n)_channels_[12]d_{}")
def channel(core, name, source, out):
    """Every second element from the first or the second on; from n channels, elements of a stride in the source."""
    first, step = int(name.split("_")[2]), 2 if "from_2" in name else 1

    def effect():
        out.array()[...] = source.array()[..., first::step]

    _run(core, name, "vreducev2", (source,), (out,), source, effect)


@intrinsic("broadcast_(first|middle|last)_axis_(align|unalign|unknown_align)_[123]d_{}")
def broadcast_axis(core, name, source, out, *temporary):
    """The axis has size 1 in the source."""

    def effect():
        out.array()[...] = source.array()

    _run(core, name, "vbrcb" if "_last_" in name else "ub copy", (source,), (out, *temporary), out, effect)


@intrinsic("transpose_2d_with_last_axis_{}")
def transpose(core, name, source, out, *temporary):
    """In squares of 32 bytes by as many elements. What the last ones hold beyond the result is *assumed* to be zero."""
    unit = BLOCK // source.dtype.itemsize
    rows, columns = out.sizes
    squares = out.part(0, (-(-rows // unit) * unit, -(-columns // unit) * unit))

    def effect():
        into = squares.array()
        into[...] = 0
        into[:rows, :columns] = source.array().T

    n = int(np.prod(squares.sizes)) // unit**2
    _run(core, name, "vnchwconv", (source,), (squares, *temporary), out, effect, n)
