"""The op's own kernels as the op launches them: results against the reference, and what the launches cost."""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nsa import accelerator, reference
from nsa.ascend import rates
from nsa.ascend.compile import CompileError
from nsa.ascend.launches import DTYPES
from nsa.table import WindowTable

from .driver import simulator_driver
from .faults import SimulationError
from .report import report_of

OPS = ("forward", "grad_input", "grad_weight")
_U_SUM = torch.finfo(torch.float32).eps / 2


@dataclass
class OpReport:
    """One call of an op. reports: of its launches. others: operators of the framework between them.

    error: the largest |computed - exact| in units of u * sum|w||x|, where u is half the distance from 1 to the next
    number of the dtype: a sum that is exact up to its one rounding has at most 1. None where a fault left no result.
    allowed: what sums in fp32 may add to that, as Higham bounds them. limit: seconds that the memory takes for the op's
    inputs and outputs, each once. left_out: which kernel of the call is not simulated, and why; then there is no error,
    and the reports are of the launches before it. A5's vector code is such.
    """

    op: str
    family: str
    reports: list
    others: int
    error: float | None
    allowed: float
    limit: float
    left_out: str

    @property
    def is_wrong(self):
        return not self.left_out and (self.error is None or self.error > self.allowed)

    def lines(self):
        for report in self.reports:
            yield from report.lines()
        result = f"error {self.error:.2f}, allowed {self.allowed:.2f} roundings" if self.error is not None else "none"
        if self.left_out:
            result = f"none, NOT SIMULATED: {self.left_out}"
        yield f"result of {self.op}, {self.family} family: {result}{': WRONG' if self.is_wrong else ''}"


class Operators(TorchDispatchMode):
    """Counts the operators of the framework that compute something: on an NPU each is a task."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        is_view = any(
            argument.alias_info and not argument.alias_info.is_write for argument in function._schema.arguments
        )
        result = function(*args, **(kwargs or {}))
        if not is_view and "empty" not in function._schema.name and isinstance(result, torch.Tensor):
            self.count += result.dtype.is_floating_point  # the table's integers are made on the host
        return result


def simulate_op(shape, lengths, target, family, progress=lambda step: None):
    """The `OpReport`s of forward, dInput and dWeight. shape: a `launches.Shape`. lengths: of the segments, in rows.
    progress: called after each op."""
    machine = accelerator.Machine(target.cube_cores, target.vector_cores, accelerator.chip_of(target))
    ends = list(accumulate(lengths))
    table = WindowTable(ends, shape.block, shape.stride, torch.device("cpu"))
    x, weight, dy = _inputs(shape, sum(lengths), table.n_windows)
    exact, magnitude = (
        _results(table, ends, *(make(t.double()) for t in (x, weight, dy))) for make in (torch.clone, torch.abs)
    )
    terms = (shape.block, -(-shape.block // shape.stride), table.n_windows * shape.dim)
    calls = (
        lambda: accelerator.forward(x, weight, table, machine, family),
        lambda: accelerator.grad_input(dy, weight, table, len(x), machine, family),
        lambda: accelerator.grad_weight(dy, x, table, machine, family),
    )
    moved = ((x, weight, dy), (dy, weight, x), (dy, x, weight))  # y is as large as dy, dx as x
    for i, op in enumerate(OPS):
        computed, left_out, operators = None, "", Operators()
        with simulator_driver(target) as log:
            try:
                with operators:
                    computed = calls[i]()
            except SimulationError:
                pass  # the launch's report has the faults
            except CompileError as error:
                if error.stage != "simulator":
                    raise
                left_out = error.message
        error = None if computed is None else _roundings(computed, exact[i], magnitude[i])
        u = torch.finfo(x.dtype).eps / 2
        gamma = terms[i] * _U_SUM / (1 - terms[i] * _U_SUM)
        reports = [report_of(launch, target) for launch in log]
        limit = sum(tensor.nbytes for tensor in moved[i]) / target.ddr_read
        yield OpReport(op, family, reports, operators.count, error, 1 + gamma * (1 + 1 / u), limit, left_out)
        progress(1)


def _inputs(shape, n_rows, n_windows):
    generator = torch.Generator().manual_seed(0)
    shapes = (n_rows, shape.heads, shape.dim), (shape.block, shape.heads), (n_windows, shape.heads, shape.dim)
    return [torch.randn(sizes, generator=generator).to(DTYPES[shape.dtype]) for sizes in shapes]


def _results(table, ends, x, weight, dy):
    """y, dx and dw in fp64."""
    x.requires_grad_()
    weight.requires_grad_()
    y = reference.nsa_compress(x, weight, table.block, table.stride, actual_seq_len=ends)
    return y.detach(), *torch.autograd.grad(y, (x, weight), dy)


def _roundings(computed, exact, magnitude):
    error = (computed.double() - exact).abs()
    u = torch.finfo(computed.dtype).eps / 2
    least = torch.finfo(computed.dtype).smallest_normal  # below, numbers are as far apart as there
    return (error / (u * magnitude.clamp(min=least))).nan_to_num(nan=torch.inf).max().item()


def total(op_reports, target):
    """One line for several calls, one after the other."""
    launches = [report for each in op_reports for report in each.reports]
    others = sum(each.others for each in op_reports)
    kernels = sum(report.timing.seconds for report in launches) * 1e6
    task = rates.task_overhead(target) * 1e6
    limit = sum(each.limit for each in op_reports) * 1e6
    n_faults = sum(len(report.launch.faults) for report in launches)
    n_left_out = sum(bool(each.left_out) for each in op_reports)
    left_out = f", {n_left_out} calls NOT SIMULATED to their end" if n_left_out else ""
    return (
        f"{op_reports[0].family} family, total: {kernels:.1f} us in {len(launches)} kernels, "
        f"{(len(launches) + others) * task:.1f} us beside {len(launches)} kernels and {others} operators of the "
        f"framework at {task:.1f} us each, modelled; memory limit {limit:.1f} us; {n_faults} faults, "
        f"{sum(each.is_wrong for each in op_reports)} wrong results{left_out}"
    )
