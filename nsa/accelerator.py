"""NPU and GPU: which Triton kernels run, how large their tiles are, and their launch on the tensors' device.

The keyword `family` overrides the rule in `family_of`, for tests and benchmarks; `machine` likewise says what is
otherwise read off the device.
"""

from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch

HALF = (torch.float16, torch.bfloat16)


class Machine(NamedTuple):
    """What launches depend on."""

    cube_programs: int
    vector_programs: int
    plan: object  # of the cube family's tiles: a kernels.tiles.Chip, or the kernels.tiles.Gpu


class Tiles(NamedTuple):
    """Of the cube family's kernels: a `WindowTile`, a `RowTile` and a `WindowTile` of kernels.tiles."""

    forward: object
    grad_input: object
    grad_weight: object


def forward(x, weight, table, machine=None, family=None):
    with _launching(x, machine) as (kernels, machine):
        x, weight = map(kernels.launch.aligned, (x, weight))
        tiles = _prepare(x, table, machine, family)
        if tiles is None:
            return kernels.vector.forward(x, weight, table.starts, machine.vector_programs)
        tile = tiles.forward
        runs = table.window_runs(tile.windows)
        if machine.plan.fused:
            return kernels.fused.forward(x, weight, table.starts, runs, tile, table.stride, machine.cube_programs)
        y = kernels.cube.forward(x, weight, runs, tile, table.stride, table.n_windows, machine.cube_programs)
        kernels.repair.forward(x, weight, table.starts, y, machine.vector_programs)
        return y


def grad_input(dy, weight, table, n_rows, machine=None, family=None):
    with _launching(dy, machine) as (kernels, machine):
        dy, weight = map(kernels.launch.aligned, (dy, weight))
        tiles = _prepare(dy, table, machine, family)
        if tiles is None:
            programs = machine.vector_programs
            return kernels.vector.grad_input(dy, weight, table.groups, n_rows, table.stride, programs)
        tile = tiles.grad_input
        runs = table.row_runs(tile.rows)
        if machine.plan.fused:
            programs = machine.cube_programs
            return kernels.fused.grad_input(dy, weight, table.groups, runs, tile, table.stride, n_rows, programs)
        dx = kernels.cube.grad_input(dy, weight, runs, tile, table.stride, n_rows, machine.cube_programs)
        kernels.repair.grad_input(dy, weight, table.groups, runs, table.stride, dx, machine.vector_programs)
        return dx


def grad_weight(dy, x, table, machine=None, family=None):
    with _launching(x, machine) as (kernels, machine):
        dy, x = map(kernels.launch.aligned, (dy, x))
        tiles = _prepare(x, table, machine, family)
        if tiles is None:
            return kernels.vector.grad_weight(dy, x, table.starts, table.block, machine.vector_programs)
        tile = tiles.grad_weight
        runs = table.window_runs(tile.windows)
        partial = kernels.cube.grad_weight(dy, x, runs, tile, machine.cube_programs)
        sizes = (tile, table.block, table.stride)
        return kernels.repair.grad_weight(dy, x, table.starts, runs, partial, *sizes, machine.vector_programs)


def append(pages, weight, table, before, after, slots, cache, stride, most_windows, machine=None):
    with _launching(pages, machine) as (kernels, machine):
        weight = kernels.launch.aligned(weight)
        kernels.append.append(
            pages, weight, table, before, after, slots, cache, stride, most_windows, machine.vector_programs
        )


def _prepare(tensor, table, machine, family):
    """The `Tiles` of a call, or None where it takes the vector family. The table has on the device what the op and its
    gradients read, all of it from the first call on, so that a step with new lengths makes one transfer."""
    if _chosen(tensor, table, family) == "vector":
        table.prepare(("starts",), ("groups",))
        return None
    tiles = _tiles(machine.plan, table.block, table.stride, *tensor.shape[1:])
    table.prepare(
        ("starts",),
        ("groups",),
        ("window_runs", tiles.forward.windows),
        ("row_runs", tiles.grad_input.rows),
        ("window_runs", tiles.grad_weight.windows),
    )
    return tiles


@cache
def _tiles(plan, block, stride, n, d):
    geometry = (block, stride, n, d)
    return Tiles(plan.forward_tile(*geometry), plan.grad_input_tile(*geometry), plan.grad_weight_tile(*geometry))


def family_of(dtype, block, stride):
    """The rule: the family that runs on a device of any kind, at any N and D.

    "cube" for fp16 and bf16, which are what the cube unit multiplies, where windows overlap. Where they do not
    (stride = block), each element is needed once and the vector family reads it once, with nothing to check
    afterwards, whose kernels the model finds 3 to 20 % faster. "vector" for fp32 and fp64.
    """
    return "cube" if dtype in HALF and stride < block else "vector"


def _chosen(tensor, table, family):
    if family is None:
        return family_of(tensor.dtype, table.block, table.stride)
    if family == "vector" or (family == "cube" and tensor.dtype in HALF):
        return family
    raise ValueError(f"expected family 'vector', or for fp16 and bf16 'cube', got {family!r} for {tensor.dtype}")


@contextmanager
def _launching(tensor, machine):
    """The kernels' package and the machine, with the tensor's device current."""
    try:
        import nsa.kernels.append
        import nsa.kernels.cube
        import nsa.kernels.fused
        import nsa.kernels.launch
        import nsa.kernels.repair
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"nsa_compress on {tensor.device} runs Triton kernels, and the module {error.name.partition('.')[0]} is "
            "missing: install nsa-ascend[npu] on an NPU machine, nsa-ascend[cuda] on a GPU machine"
        ) from error
    if machine is not None:
        yield nsa.kernels, machine
        return
    with torch.get_device_module(tensor.device).device(tensor.device):
        yield nsa.kernels, machine_of(tensor.device)


@cache
def machine_of(device):
    """The `Machine` that a device is; RuntimeError if it has no kernels, or an A5 chip would get those of another."""
    from nsa.kernels.launch import program_count

    cube, vector = (program_count(device, core) for core in ("cube", "vector"))
    if device.type == "cuda":
        from nsa.kernels.tiles import Gpu

        return Machine(cube, vector, Gpu())
    from triton.runtime import driver

    from .ascend.targets import target_of_device
    from .triton_ascend import check_a5

    device_target = driver.active.get_current_target()
    target = target_of_device(device_target.arch)
    if target.generation == "A5":
        check_a5(device_target)
    return Machine(cube, vector, chip_of(target))


def chip_of(target):
    """The plan for a `nsa.ascend.targets.Target`."""
    from nsa.kernels.tiles import Chip

    # the A5 compiler takes a cut block through the vector core's memory, and doubles sums that a loop carries; so may
    # that of a generation nobody knows
    a2_or_a3 = target.generation in ("A2", "A3")
    return Chip(target.l1, target.l0c, fused=a2_or_a3, sums=1 if a2_or_a3 else 2)
