"""The cube core: memory to L1, L1 to L0, the cube, and L0C to memory."""

import numpy as np

from ..faults import FaultError
from ..memory import View, row_major
from . import LIBRARY, demand, intrinsic

FRACTAL = 16  # rows of a fractal, and its columns of 16 bits; L1 and L0 hold matrices as fractals
L1_BLOCK = 32  # bytes of a row of a fractal
L0_HALF = 32 * 1024  # bytes: L0A and L0B are two buffers each, which take turns
ONE_INSTRUCTION = 65535  # row strides from here on, in elements, take an instruction a row
LEAST_BLOCKS = 10  # of 16 x 16: with fewer, the cube does not wait for its own results
M_TO_MTE1 = (0, 1)  # events of the two halves of L0A and L0B, if the caller has none


def _ceil(size, step):
    return -(-size // step) * step


@intrinsic("nd2nz_{}")
def nd2nz(core, name, source, target):
    """Rows (n, d) in memory to fractals [d1, n1, 16, 16] in L1; the tail of the last column of fractals gets zeros.

    That tails of d get zeros is the vendor's documentation of the instruction; rows from n on stay as they are.
    """
    (n, d), c0 = source.sizes, L1_BLOCK // source.dtype.itemsize
    demand(core, name, f"an address in L1 at a multiple of {L1_BLOCK}", target.address % L1_BLOCK == 0)
    row_stride, column_stride = target.strides[2], target.strides[0]
    d1 = -(-d // c0)
    written = target.part(0, (d1, n, c0), (column_stride, row_stride, 1))
    instructions = 1 if source.strides[0] < ONE_INSTRUCTION else n

    def effect():
        rows = np.zeros((n, d1 * c0), source.dtype)
        rows[:, :d] = source.array()
        written.array()[:] = rows.reshape(n, d1, c0).transpose(1, 0, 2)

    if n and d:
        core.instruction("MTE2", name, (source,), (written,), (("nd2nz", instructions),), effect)


@intrinsic("set_l1_2d_{}")
def set_l1_2d(core, name, value, target):
    demand(core, name, f"an address in L1 at a multiple of {L1_BLOCK}", target.address % L1_BLOCK == 0)
    demand(core, name, "contiguous elements", target.strides == (1,))
    (size,) = target.sizes
    size = _ceil(size * target.dtype.itemsize, L1_BLOCK) // target.dtype.itemsize
    target = target.part(0, (size,))

    def effect():
        target.array()[:] = value

    if size:
        core.instruction("MTE2", name, (), (target,), (("set_l1", size * target.dtype.itemsize),), effect)


@intrinsic("mma_tile_{}_to_{}(_ta)?(_tb)?")
def mma_tile(
    core, name, a, b, init, m, k, n, c, wait_a, wait_b, release_a, release_b, turn, event_0, event_1, unit_flag, *group
):
    """c (+)= a @ b, K in parts that fit into half of L0A and of L0B: loads on MTE1, products on the cube.

    A5's library has no events of its own: it waits for (M, MTE1, 0) or (M, MTE1, 1), which the program has set, and the
    halves take turns over the whole program. Where a part takes all of L0, it waits for 0 alone. It goes by the
    sizes m and n, and c is as compact as they allow; A2's and A3's goes by those of the operands.
    """
    transposed_a, transposed_b = "_ta" in name, name.endswith("_tb")
    demand(core, name, "no unit flag, which is not simulated", unit_flag == 0)
    itemsize = a.dtype.itemsize
    c0 = L1_BLOCK // itemsize

    def flag(kind, setting, waiting, event):
        if event != -1:
            core.synchronise(kind, setting, waiting, event, f"{kind}_flag of {name}")

    is_a5 = core.program.generation == "A5"
    demand(core, name, "elements of 16 bits on A5, as others are not simulated", itemsize == 2 or not is_a5)
    if 0 in (m, k, n):
        demand(core, name, "m, n and k that are not 0 on A5", not is_a5)
        flag("wait", "MTE2", "MTE1", wait_a)
        flag("wait", "MTE2", "MTE1", wait_b)
        flag("set", "MTE1", "MTE2", release_a)
        flag("set", "MTE1", "MTE2", release_b)
        return
    if is_a5:
        m0, n0, m_c = m, n, _ceil(m, FRACTAL)
        sizes = (-(-n // FRACTAL), m_c // FRACTAL, FRACTAL, FRACTAL)
        c, events, own = c.part(0, sizes, row_major(sizes)), M_TO_MTE1, ()
    else:
        # [k1, m1, 16, c0] of a, [m1, k1, c0, 16] of a transposed one; [n1, k1, ...] of b, [k1, n1, ...] transposed
        m0 = a.sizes[0] * a.sizes[3] if transposed_a else a.sizes[1] * a.sizes[2]
        n0 = b.sizes[1] * b.sizes[2] if transposed_b else b.sizes[0] * b.sizes[3]
        m_c = c.sizes[1] * c.sizes[2]
        own = [event for given, event in zip((event_0, event_1), M_TO_MTE1) if given == -1]
        events = [event if given == -1 else given for given, event in zip((event_0, event_1), M_TO_MTE1)]
    step = max(c0, FRACTAL)
    half = L0_HALF // itemsize
    part = half // _ceil(max(m0, n0), step) // step * step
    doubled = part > 0
    if not doubled:
        half = 2 * half
        part = half // _ceil(max(m0, n0), step) // step * step
    if part == 0:
        message = f"{name}, line {core.line}, has operands of which not even {FRACTAL} columns fit into L0"
        raise FaultError("access outside", message)
    for event in own:
        flag("set", "M", "MTE1", event)
    parts = -(-k // part)
    k_ceil = _ceil(k, c0)
    for i in range(parts):
        first, last = i == 0, i == parts - 1
        rows = min(part, k - i * part)
        rows_ceil = k_ceil - i * part if last else part
        if is_a5:
            side = core.next_half() if doubled else 0
        else:
            side = ((turn * parts if turn != -1 else 0) + i) % 2 if doubled else 0
        sides = (side,) if doubled or is_a5 else (0, 1)
        for each in sides:
            flag("wait", "M", "MTE1", events[each])
        if first:
            flag("wait", "MTE2", "MTE1", wait_a)
        a_part = _l1_part(a, m_c, i * part, rows_ceil, transposed_a)
        l0a = _l0(core, "L0A", a.dtype, side * half * itemsize, m_c, rows_ceil)
        _to_l0(core, name, "L1 to L0A", a_part, l0a, transposed_a)
        if last:
            flag("set", "MTE1", "MTE2", release_a)
        if first:
            flag("wait", "MTE2", "MTE1", wait_b)
        b_part = _l1_part(b, n, i * part, rows_ceil, not transposed_b)
        l0b = _l0(core, "L0B", b.dtype, side * half * itemsize, _ceil(n, FRACTAL), rows_ceil)
        _to_l0(core, name, "L1 to L0B", b_part, l0b, not transposed_b)
        if last:
            flag("set", "MTE1", "MTE2", release_b)
        flag("set", "MTE1", "M", LIBRARY)
        flag("wait", "MTE1", "M", LIBRARY)
        _mad(core, name, l0a, l0b, c, m_c, rows, n, init and first)
        blocks = (m // FRACTAL) * (n // FRACTAL) if is_a5 else m_c // FRACTAL * n // FRACTAL
        if blocks < LEAST_BLOCKS:
            core.barrier("M")
        for each in sides:
            flag("set", "M", "MTE1", events[each])
    for event in own:
        flag("wait", "M", "MTE1", event)


def _l1_part(x, outer, k, rows, k_in_the_middle):
    """Of an operand in L1, `outer` of M or N and `rows` of K from k on: K is in dimensions 1 and 2, or else in 0 and 3.

    The library takes the operand's sizes alone, as if it were contiguous, and not its strides: of a block cut out of
    another along dimension 1 it reads other fractals.
    """
    x = x.part(0, x.sizes, row_major(x.sizes))
    k1, outer1, k0, outer0 = (1, 0, 2, 3) if k_in_the_middle else (0, 1, 3, 2)
    sizes = list(x.sizes)
    sizes[k1] = -(-rows // x.sizes[k0])
    sizes[outer1] = min(-(-outer // x.sizes[outer0]), x.sizes[outer1])
    return x.part(k // x.sizes[k0] * x.strides[k1], sizes)


def _l0(core, space, dtype, address, outer, rows):
    """A buffer of L0, [outer, rows]; that fractals have an order of their own inside matters to nobody else."""
    return View(core.memories[space], dtype, address, 0, (outer, rows), (rows, 1))


def _to_l0(core, name, way, source, target, k_in_the_middle):
    """[k1, m1, 16, c0] to [m, k], or [m1, k1, 16, c0] with K in dimensions 1 and 2."""
    demand(core, name, "an address in L1 at a multiple of 32", source.address % L1_BLOCK == 0)
    outer, rows = target.sizes
    axes = (0, 3, 1, 2) if k_in_the_middle else (1, 2, 0, 3)

    def effect():
        x = source.array().transpose(axes)
        x = x.reshape(x.shape[0] * x.shape[1], -1)
        into = target.array()
        into[:] = 0
        into[: min(outer, x.shape[0]), : min(rows, x.shape[1])] = x[:outer, :rows]

    work = ((way, int(np.prod(source.sizes)) * source.dtype.itemsize),)
    core.instruction("MTE1", name, (source,), (target,), work, effect)


def _mad(core, name, a, b, c, m, k, n, init):
    """c[n1, m1, 16, 16] (+)= a[m, k] @ b[n, k]^T, with sums in fp32. Their order is the host's: *assumed*."""
    n1 = -(-n // FRACTAL)
    target = c.part(0, (n1, *c.sizes[1:]))
    a_k, b_k = (x.part(0, (x.sizes[0], k)) for x in (a, b))

    def effect():
        with np.errstate(invalid="ignore", over="ignore"):
            product = a_k.array().astype(np.float32) @ b_k.array().astype(np.float32).T  # [m, n1 * 16]
        product = product.reshape(m // FRACTAL, FRACTAL, n1, FRACTAL).transpose(2, 0, 1, 3)
        into = target.array()
        if init:
            into[:] = product
        else:
            into += product

    blocks = -(-m // FRACTAL) * -(-k // (L1_BLOCK // a.dtype.itemsize)) * n1
    reads = (a_k, b_k) if init else (a_k, b_k, target)
    core.instruction("M", name, reads, (target,), (("mad", 1), ("mad blocks", blocks)), effect)


@intrinsic("fixpipe_nz2nd_{}_to_{}_4d_to_2d(_gm)?")
def fixpipe(core, name, source, target, quantise, *options):
    """[n1, m1, 16, 16] in L0C to rows (m, n) in memory, rounded to the nearest, ties to even (*assumed*)."""
    if core.program.generation == "A5":
        scale, *options = options
        demand(core, name, "a scale of 1, as others are not simulated", scale == 1)
    relu, split, unit_flag, *_ = options
    demand(
        core, name, "no ReLU, split channels or unit flag, which are not simulated", not (relu or split or unit_flag)
    )
    m, n = target.sizes
    m1, n1 = -(-m // FRACTAL), -(-n // FRACTAL)
    demand(
        core, name, f"{m} by {n} elements inside L0C's {source.sizes}", m1 <= source.sizes[1] and n1 <= source.sizes[0]
    )
    rows_left = source.part(0, (n1, m, FRACTAL), (source.strides[0], source.strides[2], source.strides[3]))

    def effect():
        block = rows_left.array().transpose(1, 0, 2).reshape(m, n1 * FRACTAL)[:, :n]
        with np.errstate(over="ignore"):
            target.array()[:] = block.astype(target.dtype)

    if m and n:
        core.instruction("FIX", name, (rows_left,), (target,), (("fixpipe", 1),), effect)
