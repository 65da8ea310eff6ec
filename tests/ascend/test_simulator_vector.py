"""The vector unit's intrinsics in the simulator: alone against numbers worked out by hand, and whole Triton kernels."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from nsa.ascend.simulator import intrinsics, simulate
from nsa.ascend.simulator.faults import FaultError
from nsa.ascend.simulator.memory import DTYPES, Memory, View, row_major

A2 = "Ascend910B3"


class Core:
    """Does what it is told at once, and keeps what each operation read and wrote."""

    line = 0

    def __init__(self):
        self.ub = Memory("UB", np.full(1 << 16, 0xA5, np.uint8))
        self.top, self.order = 0, []

    def view(self, type_, values=None, sizes=None, strides=None):
        """A new buffer: of `sizes`, or of the shape of `values`, which it then holds."""
        values = None if values is None else np.asarray(values)
        sizes = tuple(values.shape if sizes is None else sizes)
        strides = row_major(sizes) if strides is None else strides
        view = View(self.ub, DTYPES[type_], self.top, 0, sizes, strides)
        self.top = -(-(view.span()[1]) // 256) * 256
        if values is not None:
            view.array()[...] = values.astype(view.dtype)
        return view

    def mask(self, n):
        view = View(self.ub, DTYPES["i1"], self.top, 0, (n,), (1,))
        self.top += 256
        return view

    def call(self, name, *operands):
        intrinsics.call(name, self, operands)

    def instruction(self, pipe, name, reads, writes, work, effect):
        self.order.append((pipe, work))
        effect()

    def issue(self, operation):
        self.order.append((operation.pipe, operation.work))

    def synchronise(self, kind, setting, waiting, event, name=None):
        self.order.append((kind, setting, waiting))

    def barrier(self, pipe):
        self.order.append(("barrier", pipe))


@pytest.mark.parametrize(
    ("mode", "rounded"),
    [
        (0, [-2, -2, 0, 0, 2, 2]),  # to even
        (1, [-3, -2, -1, 1, 2, 3]),  # ties away from zero
        (2, [-3, -2, -1, 0, 1, 2]),  # down
        (3, [-2, -1, 0, 1, 2, 3]),  # up
        (4, [-2, -1, 0, 0, 1, 2]),  # towards zero
    ],
)
@pytest.mark.parametrize(("name", "type_"), [("int32_t", "i32"), ("float", "f32")])
def test_rounding_modes_are_numbered_as_in_the_library(mode, rounded, name, type_):
    core = Core()
    source, target = core.view("f32", [-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]), core.view(type_, sizes=(6,))
    core.call(f"vcast_float_to_{name}_1d_with_mode", source, target, mode)
    assert target.array().tolist() == rounded


def test_casts_to_integers_saturate_and_with_overflow_keep_the_low_bits():
    core = Core()
    source, target = core.view("f32", [np.nan, np.inf, -np.inf, 3e9]), core.view("i32", sizes=(4,))
    core.call("vcast_float_to_int32_t_1d_with_mode", source, target, 4)
    assert target.array().tolist() == [0, 2**31 - 1, -(2**31), 2**31 - 1]
    wide = core.view("i64", sizes=(4,))
    core.call("vcast_float_to_int64_t_1d_with_mode", core.view("f32", [np.nan, 1e20, -1e20, 7]), wide, 4)
    assert wide.array().tolist() == [0, 2**63 - 1, -(2**63), 7]
    low = core.view("i8", sizes=(3,))
    core.call(
        "vcast_int32_t_to_int8_t_1d_with_overflow",
        core.view("i32", [300, -129, 5]),
        low,
        core.view("i32", sizes=(96,)),
        6,
    )
    assert low.array().tolist() == [44, 127, 5]


def test_bf16_rounds_to_even():
    core = Core()
    source, target = core.view("f32", [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20]), core.view("bf16", sizes=(3,))
    core.call("vcast_float_to_bfloat16_t_1d_with_mode", source, target, 0)
    assert target.array().astype(float).tolist() == [1, 1 + 2**-6, 1 + 2**-7]


def test_masks_are_bits_of_whole_repeats():
    core = Core()
    a, b = core.view("f16", [1, np.nan, np.inf, -0.0, 5]), core.view("f16", [1, np.nan, np.inf, 0, 4])
    equal, greater, both, inverse = (core.mask(5) for _ in range(4))
    core.call("vcmp_eq_1d_half", a, b, equal)
    core.call("vcmp_gt_1d_half", a, b, greater)
    core.call("vor_1d_bool", equal, greater, both)
    core.call("vnot_1d_bool", both, inverse)
    bytes_ = [int(core.ub.bytes[mask.base]) & 31 for mask in (equal, greater, both, inverse)]
    assert bytes_ == [0b01101, 0b10000, 0b11101, 0b00010]
    assert core.ub.bytes[equal.base : equal.base + 17].tolist() == [0b01101, *[0] * 15, 0xA5]  # 128 fp16 a repeat


def test_other_operations_on_bits_are_refused():
    core = Core()
    true = core.mask(20)
    core.call("broadcast_scalar_bool_to_1d", 1, true)
    assert core.ub.bytes[true.base : true.base + 4].tolist() == [255, 255, 255, 0xA5]
    for name in ("copy_ubuf_to_ubuf_1d_bool", "broadcast_first_axis_align_2d_bool"):
        with pytest.raises(FaultError, match="mask of bits"):
            core.call(name, true, core.mask(20))


def test_selects_by_bits_and_by_bytes():
    core = Core()
    mask, out, temporary = core.mask(10), core.view("f32", sizes=(10,)), core.view("f32", sizes=(24,))
    core.ub.bytes[mask.base : mask.base + 2] = 0b10000011, 0b10
    core.call("vsel_vs_1d_float", mask, core.view("f32", range(10)), -1.0, out, temporary)
    assert out.array().tolist() == [0, 1, -1, -1, -1, -1, -1, 7, -1, 9]
    assert temporary.array()[8:16].tolist() == [-1] * 8
    assert ("set", "V", "S") in core.order
    assert ("wait", "S", "V") in core.order
    wide = core.view("i64", sizes=(3,))
    core.call(
        "vsel_vv_1d_int8_t_int64_t",
        core.view("i8", [0, 1, 2]),
        core.view("i64", [1, 2, 3]),
        core.view("i64", [7, 8, 9]),
        wide,
    )
    assert wide.array().tolist() == [7, 2, 3]
    cast = core.view("f16", sizes=(10,))
    core.call("vcast_bool_to_half_1d_with_temp", mask, cast, core.view("f16", sizes=(48,)), 0)
    assert cast.array().tolist() == [1, 1, 0, 0, 0, 0, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ("type_", "name", "steps"), [("i32", "int32_t", 2), ("f32", "float", 2), ("i64", "int64_t", 0)]
)
def test_arange_begins_on_the_scalar_unit_and_doubles(type_, name, steps):
    core = Core()
    out = core.view(type_, sizes=(21,))
    core.call(f"arange_1d_{name}", out, 5, 3)
    assert out.array().tolist() == list(range(5, 68, 3))
    assert [entry[0] for entry in core.order].count("V") == steps


@pytest.mark.parametrize(
    ("axes", "sizes", "axis"),
    [("r", (21,), 0), ("ar", (3, 21), 1), ("ra", (5, 8), 0), ("aar", (2, 3, 9), 2), ("ara", (3, 5, 8), 1)],
)
def test_reductions_go_along_the_axis_of_their_name(axes, sizes, axis):
    values = np.random.default_rng(0).integers(-9, 9, sizes).astype(np.float32)
    for kind, reduced in (("sum", values.sum), ("max", values.max), ("min", values.min)):
        core = Core()
        wanted = reduced(axis, keepdims=True)
        out = core.view("f32", sizes=wanted.shape)
        core.call(f"reduce_{kind}_{axes}_float", core.view("f32", values), out, core.view("f32", sizes=(512,)), 0.0)
        assert np.array_equal(out.array(), wanted)


def test_rows_with_a_pitch_and_one_column_for_all():
    core = Core()
    a, out = (
        core.view("f32", np.arange(6).reshape(2, 3), strides=(8, 1)),
        core.view("f32", sizes=(2, 3), strides=(8, 1)),
    )
    core.call("vsub_2d_float", a, core.view("f32", [[1], [3]], strides=(8, 1)), out, core.view("f32", sizes=(64,)))
    assert out.array().tolist() == [[-1, 0, 1], [0, 1, 2]]
    assert (core.ub.bytes[out.base + 12 : out.base + 32] == 0xA5).all()


@triton.jit
def layernorm(x, y, n, ROWS: tl.constexpr, SIZE: tl.constexpr):
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, SIZE)
    mask = (columns < n)[None, :]
    b = tl.load(x + rows[:, None] * n + columns[None, :], mask=mask, other=0).to(tl.float32)
    b = tl.where(mask, b - (tl.sum(b, 1) / n)[:, None], 0)
    tl.store(y + rows[:, None] * n + columns[None, :], b * tl.rsqrt(tl.sum(b * b, 1) / n + 1e-5)[:, None], mask=mask)


@triton.jit
def softmax(x, y, n, ROWS: tl.constexpr, SIZE: tl.constexpr):
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, SIZE)
    mask = (columns < n)[None, :]
    b = tl.load(x + rows[:, None] * n + columns[None, :], mask=mask, other=-float("inf")).to(tl.float32)
    b = tl.exp(b - tl.max(b, 1)[:, None])
    tl.store(y + rows[:, None] * n + columns[None, :], b / tl.sum(b, 1)[:, None], mask=mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_normalised(dtype):
    x = torch.randn(8, 100, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = {layernorm: torch.nn.functional.layer_norm(x.double(), (100,)), softmax: x.double().softmax(1)}
    for kernel, wanted in exact.items():
        y = torch.empty_like(x)
        report = simulate(kernel, {"x": x, "y": y, "n": 100, "ROWS": 4, "SIZE": 128}, (2,), A2)
        assert not report.launch.faults
        torch.testing.assert_close(y, wanted.to(dtype))


@triton.jit
def branches(x, y, z, n, SIZE: tl.constexpr):
    o = tl.arange(0, SIZE)
    b = tl.load(x + o, mask=o < n, other=0)
    tl.store(y + o, tl.where((b > 0) & (b < 2), tl.floor(b), tl.abs(b)), mask=o < n)
    tl.store(z + o, (tl.cumsum(b.to(tl.int32), 0) * 3 + o).to(tl.int16), mask=o < n)


def test_branches_and_integers():
    x = torch.randn(100, generator=torch.Generator().manual_seed(0)) * 2
    y, z = torch.empty(100), torch.empty(100, dtype=torch.int16)
    report = simulate(branches, {"x": x, "y": y, "z": z, "n": 100, "SIZE": 128}, (1,), A2)
    assert not report.launch.faults
    assert torch.equal(y, torch.where((x > 0) & (x < 2), x.floor(), x.abs()))
    assert torch.equal(z, (x.int().cumsum(0) * 3 + torch.arange(100)).short())
