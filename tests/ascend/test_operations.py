"""Triton's operations on the host driver: each agrees with numpy, or is one CompileError that names it.

Our own kernels use few of them; kernels of others use them all, and an operation that nobody tried may end the process
or give wrong numbers. That is why the tables are so large. They stay cheap because all rows of a table are lines of
one kernel, which is compiled once: row k computes its expression of the blocks b_x and b_y, 64 elements at o, and
stores it at out + 64 * k.
"""

import importlib.util
from math import erf, gamma, lgamma

import numpy as np
import pytest
import torch

from nsa.ascend.compile import CompileError

N = 64
HEAD = """
import triton
import triton.language as tl
from triton.language.extra.ascend import libdevice

@triton.jit
def larger(a, b):
    return tl.maximum(a, b)
"""
LOADS = """
    o = tl.arange(0, 64)
    b_x, b_y = tl.load(x + o), tl.load(y + o)
    g_x, g_y = tl.reshape(b_x, (8, 8)), tl.reshape(b_y, (8, 8))
    i_x = (b_x * 8).to(tl.int32)
"""


@pytest.fixture(scope="module")
def kernel_of(tmp_path_factory):
    """A kernel (x, y, out) from the lines of its body; Triton reads the source of a kernel from a file."""

    def make(name, lines):
        path = tmp_path_factory.mktemp("kernels") / f"{name}.py"
        body = "".join(f"    {line}\n" for line in lines)
        path.write_text(f"{HEAD}\n@triton.jit\ndef {name}(x, y, out):{LOADS}{body}")
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, name)

    return make


def vector(function):
    return np.vectorize(function, otypes=[np.float64])


def along(function, axis):
    return lambda a: function(a.reshape(8, 8), axis=axis).ravel()


def reverse(function):
    return lambda a: function(a[::-1])[::-1]


def spread(values):
    return np.broadcast_to(values, N)


MATH = {  # fp16, bf16 and fp32; x and y in (0.1, 2.1)
    "tl.exp(b_x)": lambda x, y: np.exp(x),
    "tl.exp2(b_x)": lambda x, y: np.exp2(x),
    "tl.log(b_x)": lambda x, y: np.log(x),
    "tl.log2(b_x)": lambda x, y: np.log2(x),
    "tl.cos(b_x)": lambda x, y: np.cos(x),
    "tl.sin(b_x)": lambda x, y: np.sin(x),
    "tl.sqrt(b_x)": lambda x, y: np.sqrt(x),
    "tl.rsqrt(b_x)": lambda x, y: 1 / np.sqrt(x),
    "tl.abs(-b_x)": lambda x, y: x,
    "tl.floor(b_x)": lambda x, y: np.floor(x),
    "tl.ceil(b_x)": lambda x, y: np.ceil(x),
    "tl.erf(b_x)": lambda x, y: vector(erf)(x),
    "tl.sigmoid(b_x)": lambda x, y: 1 / (1 + np.exp(-x)),
    "tl.softmax(b_x)": lambda x, y: np.exp(x) / np.exp(x).sum(),
    "tl.fma(b_x, b_y, b_x)": lambda x, y: x * y + x,
    "tl.clamp(b_x, 0.5, 1.0)": lambda x, y: x.clip(0.5, 1),
    "tl.maximum(b_x, b_y)": lambda x, y: np.maximum(x, y),
    "tl.minimum(b_x, b_y)": lambda x, y: np.minimum(x, y),
    "b_x % b_y": lambda x, y: np.fmod(x, y),
    "b_x / b_y": lambda x, y: x / y,
    "tl.where(b_x > b_y, b_x, 0.0)": lambda x, y: np.where(x > y, x, 0),
    "(b_x > 1) and (b_y > 1)": lambda x, y: (x > 1) & (y > 1),
}
LIBDEVICE = {  # fp32; the first ones are calls into the vendor's library, the others triton-ascend's own formulas
    "libdevice.reciprocal(b_x)": lambda x, y: 1 / x,
    "libdevice.log1p(b_x)": lambda x, y: np.log1p(x),
    "libdevice.relu(b_x - 1)": lambda x, y: np.maximum(x - 1, 0),
    "libdevice.tan(b_x / 2)": lambda x, y: np.tan(x / 2),
    "libdevice.atan(b_x)": lambda x, y: np.arctan(x),
    "libdevice.tanh(b_x)": lambda x, y: np.tanh(x),
    "libdevice.round(b_x)": lambda x, y: np.floor(x + 0.5),
    "libdevice.pow(b_x, b_y)": lambda x, y: x**y,
    "libdevice.ldexp(b_x, o.to(tl.float32))": lambda x, y: x * 2.0 ** np.arange(N),
    "libdevice.isnan(tl.where(b_x > 1, float('nan'), b_x))": lambda x, y: x > 1,
    "libdevice.isinf(tl.where(b_x > 1, float('-inf'), b_x))": lambda x, y: x > 1,
    "libdevice.acos(b_x / 3)": lambda x, y: np.arccos(x / 3),
    "libdevice.asin(b_x / 3)": lambda x, y: np.arcsin(x / 3),
    "libdevice.sinh(b_x)": lambda x, y: np.sinh(x),
    "libdevice.cosh(b_x)": lambda x, y: np.cosh(x),
    "libdevice.acosh(b_x + 1)": lambda x, y: np.arccosh(x + 1),
    "libdevice.asinh(b_x)": lambda x, y: np.arcsinh(x),
    "libdevice.atanh(b_x / 3)": lambda x, y: np.arctanh(x / 3),
    "libdevice.log10(b_x)": lambda x, y: np.log10(x),
    "libdevice.expm1(b_x)": lambda x, y: np.expm1(x),
    "libdevice.gamma(b_x)": lambda x, y: vector(gamma)(x),
    "libdevice.lgamma(b_x + 2)": lambda x, y: vector(lgamma)(x + 2),
    "libdevice.hypot(b_x, b_y)": lambda x, y: np.hypot(x, y),
    "libdevice.copysign(b_x, b_y - 1)": lambda x, y: np.copysign(x, y - 1),
    "libdevice.trunc(b_x)": lambda x, y: np.trunc(x),
    "libdevice.nearbyint(b_x)": lambda x, y: np.rint(x),
    "libdevice.signbit(b_x - 1)": lambda x, y: x < 1,
    "tl.sqrt_rn(b_x)": lambda x, y: np.sqrt(x),
    "tl.fdiv(b_x, b_y)": lambda x, y: x / y,
    "tl.div_rn(b_x, b_y)": lambda x, y: x / y,
}
SCANS = {
    "tl.flip(b_x)": lambda x, y: x[::-1],
    "tl.reshape(tl.flip(g_x, 1), (64,))": lambda x, y: along(np.flip, 1)(x),
    "tl.reshape(tl.flip(g_x, 0), (64,))": lambda x, y: along(np.flip, 0)(x),
    "tl.cumsum(b_x, 0)": lambda x, y: np.cumsum(x),
    "tl.cumsum(b_x, 0, reverse=True)": lambda x, y: reverse(np.cumsum)(x),
    "tl.reshape(tl.cumsum(g_x, 0), (64,))": lambda x, y: along(np.cumsum, 0)(x),
    "tl.reshape(tl.cumsum(g_x, 1), (64,))": lambda x, y: along(np.cumsum, 1)(x),
    "tl.cumsum(o, 0)": lambda x, y: np.cumsum(np.arange(N)),
    "tl.cumprod(b_x, 0)": lambda x, y: np.cumprod(x),
    "tl.reshape(tl.cumprod(g_x, 1), (64,))": lambda x, y: along(np.cumprod, 1)(x),
    "tl.associative_scan(b_x, 0, larger)": lambda x, y: np.maximum.accumulate(x),
    "tl.gather(b_x, 63 - o, 0)": lambda x, y: x[::-1],
    "tl.reshape(tl.gather(g_x, tl.reshape(o // 8, (8, 8)), 1), (64,))": lambda x, y: np.repeat(x.reshape(8, 8), 8)[
        np.arange(N) // 8 * 64 + np.arange(N) // 8 * 8
    ],
    "tl.sort(b_x)": lambda x, y: np.sort(x),
    "tl.sort(b_x, descending=True)": lambda x, y: np.sort(x)[::-1],
    "tl.reshape(tl.sort(g_x), (64,))": lambda x, y: along(np.sort, 1)(x),
    "tl.histogram(i_x, 64)": lambda x, y: np.bincount((x * 8).astype(int), minlength=N),
}
REDUCTIONS = {
    "tl.sum(b_x, 0)": lambda x, y: spread(x.sum()),
    "tl.max(b_x, 0)": lambda x, y: spread(x.max()),
    "tl.min(b_x, 0)": lambda x, y: spread(x.min()),
    "tl.argmax(b_x, 0)": lambda x, y: spread(x.argmax()),
    "tl.argmin(b_x, 0)": lambda x, y: spread(x.argmin()),
    "tl.max(b_x, 0, return_indices=True)[1]": lambda x, y: spread(x.argmax()),
    "tl.reduce(b_x, 0, larger)": lambda x, y: spread(x.max()),
    "tl.xor_sum(i_x, 0)": lambda x, y: spread(np.bitwise_xor.reduce((x * 8).astype(int))),
    "tl.reshape(g_x + tl.sum(g_y, 1, keep_dims=True), (64,))": lambda x, y: x + np.repeat(y.reshape(8, 8).sum(1), 8),
    "tl.reshape(g_x + tl.sum(g_y, 0)[None, :], (64,))": lambda x, y: x + np.tile(y.reshape(8, 8).sum(0), 8),
}
BLOCKS = {
    "tl.reshape(tl.trans(g_x), (64,))": lambda x, y: x.reshape(8, 8).T.ravel(),
    "tl.ravel(tl.permute(g_x, (1, 0)))": lambda x, y: x.reshape(8, 8).T.ravel(),
    "tl.sum(tl.join(b_x, 2 * b_y), 1)": lambda x, y: x + 2 * y,
    "tl.sum(tl.reshape(tl.interleave(b_x, 3 * b_y), (64, 2)), 1)": lambda x, y: x + 3 * y,
    "tl.split(tl.join(b_x, b_y))[1]": lambda x, y: y,
    "tl.sum(tl.reshape(tl.cat(b_x, b_y, can_reorder=True), (2, 64)), 0)": lambda x, y: x + y,
    "tl.reshape(tl.broadcast_to(tl.expand_dims(b_x, 0), (1, 64)), (64,))": lambda x, y: x,
    "tl.full((64,), 3, tl.float32) + tl.zeros_like(b_x)": lambda x, y: spread(3),
    "tl.max_contiguous(tl.multiple_of(o, 64), 64)": lambda x, y: np.arange(N),
    "o % 7 + (o // 7) * 100": lambda x, y: np.arange(N) % 7 + np.arange(N) // 7 * 100,
    "(-o) // 7": lambda x, y: -(np.arange(N) // 7),  # toward zero, as in C
    "((o << 3) >> 1) ^ 5": lambda x, y: (np.arange(N) * 4) ^ 5,
    "(~o) & 0xFF | 256": lambda x, y: ~np.arange(N) & 0xFF | 256,
    "o.to(tl.uint32) // 7": lambda x, y: np.arange(N) // 7,
    "tl.cdiv(o, 3)": lambda x, y: -(-np.arange(N) // 3),
    "tl.umulhi(o * 30000000, o * 100)": lambda x, y: np.arange(N) ** 2 * 3 * 10**9 >> 32,
    "(b_x * 8).to(tl.int8)": lambda x, y: (x * 8).astype(int),
    "b_x.to(tl.float64)": lambda x, y: x,
    "b_x.to(tl.int32, bitcast=True).to(tl.float32, bitcast=True)": lambda x, y: x,
    "tl.randint(7, o)": lambda x, y: philox(7),
    "tl.rand(7, o)": lambda x, y: uniform(philox(7)),
    "tl.swizzle2d(o // 8, o % 8, 8, 8, 2)[0]": lambda x, y: swizzled(),
}
TABLES = {"math": MATH, "libdevice_calls": LIBDEVICE, "scans": SCANS, "reductions": REDUCTIONS, "blocks": BLOCKS}


def philox(seed):
    """First word of Philox 4x32 for the counters 0 to N - 1, as triton-ascend 3.2.0 lowers it.

    It takes the high half of a product of unsigned numbers as if they were signed, in tl.umulhi too: these are other
    numbers than Triton's definition gives, and the Ascend compiler is fed the same text.
    """

    def high(a, b):
        return (a.view(np.int32).astype(np.int64) * np.int64(np.uint32(b).view(np.int32)) >> 32).astype(np.uint32)

    a, b = np.uint32(0xD2511F53), np.uint32(0xCD9E8D57)
    c, k = [np.arange(N, dtype=np.uint32)] + [np.zeros(N, dtype=np.uint32)] * 3, [seed, 0]
    for _ in range(10):
        k_0, k_1 = map(np.uint32, k)
        c = [high(c[2], b) ^ c[1] ^ k_0, c[2] * b, high(c[0], a) ^ c[3] ^ k_1, c[0] * a]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c[0]


def uniform(bits):
    bits = bits.view(np.int32).astype(np.int64)
    return np.where(bits < 0, -bits - 1, bits) * 4.6566127342e-10


def swizzled():
    """Rows of an 8 by 8 grid when it is walked in groups of two rows, column by column."""
    index = np.arange(N)
    return index // 16 * 2 + index % 2


ROUGH = ("acos", "asin", "gamma", "cumprod")  # triton-ascend's own series; products of 64 factors
CASES = [*((name, torch.float32) for name in TABLES), ("math", torch.float16), ("math", torch.bfloat16)]


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_agrees_with_numpy(name, dtype, kernel_of):
    table = TABLES[name]
    generator = torch.Generator().manual_seed(0)
    x, y = ((0.1 + 2 * torch.rand(N, generator=generator)).to(dtype) for _ in range(2))
    out = torch.full((len(table), N), torch.nan, dtype=dtype)
    kernel_of(name, [f"tl.store(out + {k * N} + o, {row})" for k, row in enumerate(table)])[(1,)](x, y, out)
    for row, computed in zip(table, out.double().numpy()):
        expected = table[row](x.double().numpy(), y.double().numpy())
        error = 1e-3 if any(word in row for word in ROUGH) else 32 * torch.finfo(dtype).eps
        np.testing.assert_allclose(computed, expected, rtol=error, atol=error, err_msg=row)


ATOMICS = {  # on out, which holds 0 to 63; the values are i_x
    "add": lambda old, new: old + new,
    "max": np.maximum,
    "min": np.minimum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "xchg": lambda old, new: new,
}


def test_atomics(kernel_of):
    """A block of each, and its old values; then one number: added to, exchanged, and its old values."""
    lines = []
    for k, name in enumerate(ATOMICS):
        changed, kept = 2 * k * N, (2 * k + 1) * N
        lines += [f"tl.store(out + {kept} + o, tl.atomic_{name}(out + {changed} + o, i_x))"]
    last = 2 * len(ATOMICS) * N
    lines += [f"tl.store(out + {last + 1}, tl.atomic_add(out + {last}, 7))"]
    lines += [f"tl.store(out + {last + 2}, tl.atomic_xchg(out + {last}, 9))"]
    x = 0.1 + 2 * torch.rand(N, generator=torch.Generator().manual_seed(0))
    out = torch.arange(N, dtype=torch.int32).repeat(2 * len(ATOMICS) + 1, 1)
    out[1:-1:2] = -1
    kernel_of("atomics", lines)[(1,)](x, x, out)
    old, new = np.arange(N), (x * 8).int().numpy()
    for name, changed, kept in zip(ATOMICS, out[:-1:2].numpy(), out[1:-1:2].numpy()):
        np.testing.assert_array_equal(changed, ATOMICS[name](old, new), err_msg=name)
        np.testing.assert_array_equal(kept, old, err_msg=f"old value of {name}")
    assert out[-1, :4].tolist() == [9, 0, 7, 3]


DOTS = ("float16", "bfloat16", "float32", "int8")  # of the operands; products are summed in fp32, of int8 in int32


def test_dots(kernel_of):
    lines = ["o_r, o_c = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]"]
    lines += ["m_x, m_y = tl.load(x + o_r * 16 + o_c), tl.load(y + o_r * 16 + o_c)"]
    for k, type_ in enumerate(DOTS):
        product = f"tl.dot((m_x * 4).to(tl.{type_}), (m_y * 4).to(tl.{type_}))"
        lines.append(f"tl.store(out + {k * 256} + o_r * 16 + o_c, {product})")
    lines.append(f"tl.store(out + {len(DOTS) * 256} + o_r * 16 + o_c, tl.dot(m_x, m_y, m_x, input_precision='ieee'))")
    generator = torch.Generator().manual_seed(0)
    x, y = (0.1 + 2 * torch.rand(16, 16, generator=generator) for _ in range(2))
    out = torch.full((len(DOTS) + 1, 16, 16), torch.nan)
    kernel_of("dots", lines)[(1,)](x, y, out)
    for name, computed in zip(DOTS, out.double()):
        operands = [(4 * m).to(getattr(torch, name)).double() for m in (x, y)]
        torch.testing.assert_close(computed, operands[0] @ operands[1], rtol=2e-6, atol=0)
    torch.testing.assert_close(out[-1].double(), x.double() @ y.double() + x, rtol=2e-6, atol=0)


REFUSED = {  # lines of a kernel, and what the error says
    "print of a block": ('tl.device_print("x", b_x)', "host: tl.device_print: no native code"),
    "print of a number": ('tl.device_print("i", tl.program_id(0))', "host: tl.device_print: no native code"),
    "assembly": (
        'tl.store(out + o, tl.inline_asm_elementwise("mov $0, $1;", "=r,r", [o], tl.int32, True, 1))',
        "host: tl.inline_asm_elementwise",
    ),
    "vendor's function": ("tl.store(out + o, libdevice.ilogb(b_x))", "host: __hmf_ilogbf: no native code"),
    "cast toward zero": (
        "tl.store(out + o, tl.cast(b_x, tl.float16, fp_downcast_rounding='rtz'))",
        "host: tl.cast with fp_downcast_rounding: no native code",
    ),
    "compare and swap of a number": (
        "tl.store(out, tl.atomic_cas(out.to(tl.pointer_type(tl.int32)), 0, 1))",
        "host: tl.atomic_cas: no native code",
    ),
    "compare and swap of a block": (
        "tl.atomic_cas(out.to(tl.pointer_type(tl.int32)) + o, o, i_x)",
        "host: tl.atomic_cas: no native code",
    ),
    "fp8": ("tl.store(out + o, b_x.to(tl.float8e5).to(tl.float32))", r"ttir: (?s:.*)b_x.to\(tl.float8e5"),
    "tf32": ("tl.dot(g_x, g_y, input_precision='tf32')", "ttir: (?s:.*)tl.dot"),
    "dot of int32": ("tl.dot(tl.reshape(i_x, (8, 8)), tl.reshape(i_x, (8, 8)))", "ttir: (?s:.*)tl.dot"),
    "scaled dot": ("tl.dot_scaled(g_x, None, 'e5m2', g_y, None, 'e5m2')", "ttir: (?s:.*)tl.dot_scaled"),
    "descriptor": ("tl._experimental_descriptor_load(x, [0], [64], tl.float32)", "ttir: (?s:.*)descriptor_load"),
    "static assertion": ("tl.static_assert(1 == 2, 'one is not two')", "ttir: (?s:.*)one is not two"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_rest_is_one_error_that_names_the_operation(name, kernel_of, capfd):
    line, message = REFUSED[name]
    x = torch.ones(256)
    with pytest.raises(CompileError, match=message):
        kernel_of("refused", [line])[(1,)](x, x, x)
    assert capfd.readouterr() == ("", "")


def test_what_changes_nothing_here(kernel_of):
    lines = ["tl.debug_barrier()", "tl.assume(tl.program_id(0) >= 0)", "tl.device_assert(b_x > 0, 'positive')"]
    x, out = torch.rand(N), torch.empty(N)
    kernel_of("hints", [*lines, "tl.store(out + o, b_x, cache_modifier='.wb', eviction_policy='evict_first')"])[(1,)](
        x, x, out
    )
    assert torch.equal(out, x)
