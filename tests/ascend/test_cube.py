"""What the compiler makes of the cube family, read from HIVM: what the tile plan promises has to be in it."""

import random

import pytest
from xdsl.dialects.builtin import NoneAttr

from nsa import accelerator
from nsa.ascend import compile as pipeline
from nsa.ascend import hivm
from nsa.ascend.launches import Shape, launches_of
from nsa.ascend.simulator.memory import row_major
from nsa.ascend.sweep import legal_grid
from nsa.ascend.targets import MODELLED, TARGETS, one_of_each_class
from nsa.kernels import tiles

CORNERS = [
    Shape(32, 16, 8, 128, "bf16"),  # the shape that matters most
    Shape(128, 16, 8, 256, "bf16"),  # the most bytes a window, the most overlap
    Shape(128, 128, 128, 256, "fp16"),
    Shape(16, 16, 128, 16, "bf16"),  # the shortest rows, many heads at once
    Shape(16, 16, 1, 16, "fp16"),
    Shape(128, 32, 1, 16, "fp16"),  # the largest bands for UB: many windows of short rows,
    Shape(48, 32, 1, 16, "bf16"),  # and zeros after them
    Shape(112, 48, 3, 80, "bf16"),  # a stride that does not divide the block
]
SHAPES = CORNERS + random.Random(1).sample(legal_grid(), 4)  # six kernels a shape, half a second each
# One chip of each compile class stands for all: to the compiler they differ in their names and core counts alone.
A2_AND_A3, A5 = (target for target, _ in one_of_each_class(MODELLED.values()))


def cube_kernels(shape, target):
    """(launch, artefacts) of the kernels that use the cube."""
    for launch in launches_of(shape, target):
        if "cube" in launch.name or "fused" in launch.name:
            yield launch, pipeline.compile_kernel(launch.kernel, launch.signature, launch.constants, target)


def overlap(tile, shape):
    """The share of the input that is loaded a second time: neighbouring runs have block - stride rows in common."""
    return (shape.block - shape.stride) / (tile.windows * shape.stride)


def bytes_by_argument(launch, artefacts):
    """{(argument, loops around the transfer): bytes} of the cube core; A5's sums leave by a vector core."""
    found = {}
    for transfer in hivm.transfers_of(artefacts.module):
        if "fused" in launch.name and not transfer["intrinsic"].startswith(("nd2nz", "fixpipe")):
            continue
        key = (list(launch.signature)[transfer["argument"]], transfer["depth"])
        found[key] = found.get(key, 0) + transfer["bytes"]
    return found


def test_which_chips_stand_for_all():
    assert (A2_AND_A3.generation, A5.generation) == ("A2", "A5")
    assert {target.compile_class for target in TARGETS.values() if target.generation in ("A2", "A3")} == {
        A2_AND_A3.compile_class
    }


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cube_programs(shape):
    target = A2_AND_A3
    for launch, artefacts in cube_kernels(shape, target):
        facts = artefacts.facts
        assert facts["core"] == ("mix" if "fused" in launch.name else "aic")
        assert facts["multi_buffered"]
        assert facts["scalar_accesses"] == 0
        assert not facts["switched_off"]
        assert facts["memory"]["L1"] <= target.l1
        assert facts["memory"]["L0C"] <= target.l0c


@pytest.mark.parametrize("target", [A2_AND_A3, A5], ids=lambda target: target.name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_moved_is_what_the_tile_plan_says(shape, target):
    """The matrix once an item, outside the loop over tiles; each byte of x at most 1 + overlap times."""
    chip = accelerator.chip_of(target)
    sizes = (shape.block, shape.stride, shape.heads, shape.dim)
    (forward, grad_input, grad_weight) = (bytes_by_argument(*made) for made in cube_kernels(shape, target))
    row = 2 * shape.dim  # bytes

    tile = chip.forward_tile(*sizes)
    new_rows = tile.windows * shape.stride * tile.heads  # that no other tile loads
    if chip.fused:
        assert forward.pop(("poisons", 1)) == 4 * tile.m * tile.heads * tile.bd  # m - 1 rows of them masked
    assert set(forward) == {("bands" if chip.fused else "band", 1), ("x", 2), ("y", 2)}
    assert forward.get(("bands", 1), forward.get(("band", 1))) == 2 * tile.heads * tile.m * tile.k
    assert forward["x", 2] <= (1 + overlap(tile, shape)) * new_rows * row
    assert forward["y", 2] == tile.m * tile.heads * row  # m - windows of them masked

    tile = chip.grad_input_tile(*sizes)
    if chip.fused:
        assert grad_input.pop(("poisons", 1)) == 4 * tiles.CUBE * tile.heads * tile.bd  # all but one masked
        assert grad_input["bands", 1] == 2 * tile.heads * tile.v * tile.k
        stored = [grad_input.pop((name, 2), 0) for name in ("dx", "dx_again")]
        assert stored[1] == stored[0] * (tile.heads // 2) / (-(-tile.heads // 2))  # heads take turns
        assert set(grad_input) == {("bands", 1), ("dy", 2)}
    else:
        assert grad_input["band", 1] == 2 * tile.v * tile.r
        stored = [grad_input.pop(("dx", 2))]
        assert set(grad_input) == {("band", 1), ("dy", 2)}
    assert grad_input["dy", 2] == 2 * tile.v * tile.heads * tile.bd  # v - slots of them masked
    assert sum(stored) == 2 * tile.rows * tile.heads * tile.bd

    tile = chip.grad_weight_tile(*sizes)
    # A5 tools hand over sums of two items at a time, in a loop more, and each of two vector cores stores half of them
    inner, stores = (3, 2) if target is A5 else (2, 1)
    assert set(grad_weight) == {("x", inner), ("dy", inner), ("partial", inner - 1)}
    new_rows = tile.windows * shape.stride * tile.heads
    assert grad_weight["x", inner] <= (1 + overlap(tile, shape)) * new_rows * row
    assert grad_weight["partial", inner - 1] * stores == 4 * tile.heads * tile.k * tile.m  # once an item


@pytest.mark.parametrize("target", [A2_AND_A3, A5], ids=lambda target: target.name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_operands_of_products_are_contiguous(shape, target):
    """The library multiplies them as if they were: tests/ascend/test_simulator_found.py."""
    for _, artefacts in cube_kernels(shape, target):
        calls = [op for op in artefacts.module.op.walk() if hivm.name_of(op) == "func.call"]
        products = [call for call in calls if "mma_tile" in str(call.properties["callee"])]
        assert products
        for operand in (operand for call in products for operand in call.operands[:2]):
            type_ = operand.owner.operands[0].type  # before a cast that hides sizes and strides
            sizes = [size.data for size in type_.shape]
            strides = row_major(sizes) if isinstance(type_.layout, NoneAttr) else [s.data for s in type_.layout.strides]
            assert [s for s, size in zip(strides, sizes) if size > 1] == [
                s for s, size in zip(row_major(sizes), sizes) if size > 1
            ]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a5_stores_the_sums_of_dweight_through_the_vector_core(shape):
    """Forward and dInput are cube programs; of dWeight, all but its last step is."""
    for launch, artefacts in cube_kernels(shape, A5):
        facts = artefacts.facts
        assert facts["core"] == ("mix" if launch.name == "grad_weight_cube_kernel" else "aic")
        assert facts["multi_buffered"]
        assert facts["scalar_accesses"] == 0
        assert not facts["switched_off"]
        assert set(facts["memory"]) - {"UB"} == {"L1", "L0C"}


@pytest.mark.parametrize("name", ["Ascend910B3", "Ascend950PR_9589"])
def test_every_legal_shape_has_a_tile(name):
    chip = accelerator.chip_of(TARGETS[name])
    for shape in legal_grid():
        sizes = (shape.block, shape.stride, shape.heads, shape.dim)
        for tile in (chip.forward_tile(*sizes), chip.grad_weight_tile(*sizes)):
            assert shape.heads % tile.heads == 0
            assert tile.k == (tile.windows - 1) * shape.stride + shape.block
            assert tile.windows <= tile.m
            assert overlap(tile, shape) < 0.5
        tile = chip.grad_input_tile(*sizes)
        assert shape.heads % tile.heads == shape.dim % tile.bd == tile.rows % shape.stride == 0
        assert tile.slots <= tile.v
        # D is whole if 128 rows of it fit in half of L0C; if not, a cut D leaves 128 rows, but for part of a stride
        assert (tile.bd == shape.dim) == (128 * shape.dim * 4 <= chip.l0c // 2)
        assert tile.bd == shape.dim or tile.rows > 128 - shape.stride


def test_what_fits_nowhere_is_an_error():
    tiny = tiles.Chip(l1=1024, l0c=1024, fused=True, sums=1)
    for plan in (tiny.forward_tile, tiny.grad_input_tile, tiny.grad_weight_tile):
        with pytest.raises(ValueError, match=r"no tile of block 128, stride 16, D 256 fits in Chip\(l1=1024"):
            plan(128, 16, 8, 256)
