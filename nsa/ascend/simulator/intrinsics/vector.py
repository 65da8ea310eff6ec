"""The vector unit: what it computes in UB.

Operations have an element's type, one rounding each. Where the hardware's way is not documented, it is *assumed*: sums
of a row are made in the order of numpy, casts to integers saturate, and fp16 overflows to infinity.

An instruction takes repeats of 256 bytes. A view whose rows are not contiguous takes at least a repeat a row.
"""

from functools import partial

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
ROUND = {  # by CastMode of the template library: R, A, F, C, Z
    0: np.rint,
    1: lambda x: np.trunc(x + np.copysign(0.5, x)),  # to the nearest, ties away from zero
    2: np.floor,
    3: np.ceil,
    4: np.trunc,
}
OVERFLOW = 6  # a CastMode too: integers keep their low bits, where others saturate


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
    """The bytes of a mask: its elements, offsets and strides are bits, those of the last axis contiguous."""
    *outer, size = view.sizes
    strides = (*(stride // 8 for stride in view.strides[:-1]), 1)
    return View(view.memory, np.dtype(np.uint8), view.base + view.offset // 8, 0, (*outer, -(-size // 8)), strides)


def _run(core, name, instruction, reads, writes, wide, effect, n_repeats=None):
    reads, writes = (tuple(view for view in views if 0 not in view.sizes) for views in (reads, writes))
    for view in (*reads, *writes):
        demand(core, name, "elements of whole bytes: as a mask of bits it is not simulated", view.dtype != np.bool_)
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
    if name.endswith("_bool"):
        a, b, out = map(bits_of, (a, b, out))

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
    if name.endswith("_bool"):
        a, out = map(bits_of, (a, out))

    def effect():
        x, z = a.array(), out.array()
        if instruction == "vnot":
            x, z = map(_bitwise, (x, z))
        z[...] = UNARY[instruction](x)

    _run(core, name, instruction, (a,), (out,), out, effect)


@intrinsic("vcast_{}_to_{}_[12]d_with_(mode|overflow)")
def cast(core, name, source, target, *rest):
    """To floats rounded to the nearest, ties to even, in mode 0; to the same type it is rounded to whole numbers.

    With overflow the library takes the low bytes by way of a temporary buffer, which has no size where one
    instruction does it.
    """
    *temporary, mode = rest
    real, whole = source.dtype.kind not in "iu", target.dtype.kind in "iu"
    rounds = real and (whole or source.dtype == target.dtype)
    narrows = not rounds and not whole and target.dtype.itemsize <= source.dtype.itemsize
    demand(core, name, "a rounding that is simulated", mode in ROUND if rounds else mode == 0 or not narrows)
    wraps = name.endswith("overflow") or mode == OVERFLOW

    def effect():
        x = source.array()
        if rounds:
            x = ROUND[mode](x.astype(np.float64))
        target.array()[...] = _saturated(x, target.dtype) if whole and not wraps else x.astype(target.dtype)

    wide = source if source.dtype.itemsize > target.dtype.itemsize else target
    _run(core, name, "vconv", (source,), (target, *temporary), wide, effect)


def _saturated(x, dtype):
    """NaN becomes 0."""
    limits = np.iinfo(dtype)
    inside = (x > limits.min) & (x < limits.max)
    return np.where(
        inside, np.where(inside, x, 0).astype(dtype), np.where(x >= limits.max, limits.max, (x == x) * limits.min)
    )


@intrinsic("vcast_bool_to_{}_1d_with_temp")
def cast_bits(core, name, mask, target, temporary, mode):
    """A select between a block of ones and a block whose one zero is the scalar unit's, both in the buffer."""
    block = BLOCK // target.dtype.itemsize
    ones, zero = temporary.part(0, (block,)), temporary.part(block, (1,))
    bits, size = bits_of(mask), target.sizes[0]

    def effect():
        target.array()[:] = np.unpackbits(bits.array(), bitorder="little")[:size]

    _run(core, name, "vector_dup", (), (), ones, partial(_fill, ones, 1))  # as in `select`
    _by_scalar_unit(core, name, (), (zero,), 1, partial(_fill, zero, 0))
    core.barrier("V")
    _run(core, name, "vsel", (bits, zero), (target,), target, effect)


def _by_scalar_unit(core, name, reads, writes, n, effect):
    """n elements by the scalar unit, between two waits for the vector unit."""
    core.synchronise("set", "V", "S", LIBRARY, f"set_flag of {name}")
    core.synchronise("wait", "V", "S", LIBRARY, f"wait_flag of {name}")
    core.issue(Operation("run", "S", name, core.line, tuple(reads), tuple(writes), (("scalar store", n),)))
    effect()
    core.synchronise("set", "S", "V", LIBRARY, f"set_flag of {name}")
    core.synchronise("wait", "S", "V", LIBRARY, f"wait_flag of {name}")


@intrinsic("arange_1d_{}")
def arange(core, name, out, offset, step):
    """A block by the scalar unit, which the vector unit doubles until the view is full. int64 is the scalar unit's."""
    size, block = out.sizes[0], BLOCK // out.dtype.itemsize
    by_vector = out.strides[0] == 1 and out.dtype.itemsize < 8
    done = min(block, size) if by_vector else size
    first = out.part(0, (done,))

    def fill():
        first.array()[:] = offset + step * np.arange(done)

    _by_scalar_unit(core, name, (), (first,), done, fill)
    while done < size:
        n = min(done, size - done)
        source, target = out.part(0, (n,)), out.part(done, (n,))

        def more(source=source, target=target, scalar=done * step):
            target.array()[:] = source.array() + target.dtype.type(scalar)

        _run(core, name, "vadds", (source,), (target,), target, more)
        done += n
        if done < size:
            core.barrier("V")


@intrinsic("vcmps?_(eq|ne|lt|le|gt|ge)_1d_{}")
def compare(core, name, a, b, mask, *temporary):
    """A bit an element, of whole repeats. What the last one holds beyond the elements is *assumed* to be zero."""
    operation = COMPARE[name.split("_")[1]]
    written = bits_of(mask.part(0, (repeats(a) * (REPEAT // a.dtype.itemsize),)))

    def effect():
        is_true = operation(a.array(), b.array() if hasattr(b, "array") else a.dtype.type(b))
        packed = np.packbits(is_true, bitorder="little")
        written.array()[: len(packed)] = packed
        written.array()[len(packed) :] = 0

    _run(core, name, "vcmp", (a, b) if hasattr(b, "array") else (a,), (written,), a, effect)


@intrinsic("vsel_(ss|vv|vs|sv)_1d_(bool_|int8_t_)?{}")
def select(core, name, mask, a, b, out, *temporary):
    """The mask has a bit an element, or a byte where the name says so.

    Into the temporary buffer go a block of each scalar operand, from the second block on, and then the mask's address,
    by the scalar unit. The library has no barrier before the next call fills the blocks again, in a loop with the same
    values, so they are not among the accesses that `checks` sees.
    """
    bits, size = bits_of(mask) if mask.dtype == np.bool_ else mask, out.sizes[0]
    vectors, scalars = ([v for v in (a, b) if hasattr(v, "array") == is_vector] for is_vector in (True, False))

    def effect():
        chosen = bits.array()
        chosen = np.unpackbits(chosen, bitorder="little")[:size] if mask.dtype == np.bool_ else chosen
        x, y = (v.array() if hasattr(v, "array") else out.dtype.type(v) for v in (a, b))
        out.array()[:] = np.where(chosen != 0, x, y)

    reads = [bits, *vectors]
    if temporary:
        (buffer,) = temporary
        block = BLOCK // buffer.dtype.itemsize
        for i, scalar in enumerate(scalars, 1):
            filled = buffer.part(i * block, (block,))
            _run(core, name, "vector_dup", (), (), filled, partial(_fill, filled, scalar))
        address = View(buffer.memory, np.dtype(np.int64), buffer.address, 0, (1,), (1,))
        _by_scalar_unit(core, name, (), (address,), 1, partial(_fill, address, bits.address))
        reads.append(address)
        core.barrier("V")
    _run(core, name, "vsel", reads, (out,), out, effect)


def _fill(view, value):
    view.array()[:] = value


@intrinsic("broadcast_scalar_{}_to_[123]d")
def broadcast(core, name, value, out):
    if name.startswith("broadcast_scalar_bool"):
        value, out = 255 * bool(value), bits_of(out)

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
