"""The model's numbers as plain data, as a JSON text and as lines to print."""

import json
from itertools import product

from .. import rates
from ..targets import find_target
from .model import FAMILIES, OPS, PIPES, WORKLOADS, Workload, limit, model

GROUPS = {"forward": OPS[:1], "backward": OPS[1:], "both": OPS}


def reports_of(target):
    """The reports of all `WORKLOADS` and both families on a target with rates, a list."""
    return [report(work, target, family) for work, family in product(WORKLOADS, FAMILIES)]


def report(work, target, family):
    """One workload's numbers as a dict that JSON can hold.

    `bytes`, `multiply_adds` and `cycles` (of each pipe's busiest core) are sums over the kernels of all three ops;
    `seconds` has each op's time in its kernels, and `tasks` how many tasks it is, each of which takes `task` seconds
    beside; `x_limit` says how many times the memory limit `GROUPS` of ops take in kernels, and `x_limit_with_tasks` in
    all; `kernels` has each task's own numbers, in the order in which they run.
    """
    kernels = model(work, target, family)
    seconds = {op: sum(kernel.seconds(target) for kernel in kernels[op]) for op in OPS}
    tasks = {op: len(kernels[op]) for op in OPS}
    task = rates.task_overhead(target)
    limits = {op: limit(work, op) / target.ddr_read for op in OPS}
    everything = [kernel for op in OPS for kernel in kernels[op]]
    return {
        "target": target.name,
        **work._asdict(),
        "family": family,
        "bytes": sum(kernel.bytes for kernel in everything),
        "multiply_adds": sum(kernel.macs for kernel in everything),
        "cycles": {pipe: sum(kernel.cycles.get(pipe, 0) for kernel in everything) for pipe in PIPES},
        "seconds": seconds,
        "tasks": tasks,
        "task": task,
        "x_limit": _ratios(seconds, limits),
        "x_limit_with_tasks": _ratios({op: seconds[op] + tasks[op] * task for op in OPS}, limits),
        "kernels": [kernel._asdict() | {"seconds": kernel.seconds(target)} for kernel in everything],
    }


def _ratios(seconds, limits):
    return {name: sum(seconds[op] for op in ops) / sum(limits[op] for op in ops) for name, ops in GROUPS.items()}


def to_json(reports):
    """The text of roofline.json, one report a line."""
    one_a_line = ",\n".join(map(json.dumps, reports))
    return f'{{"what": "modelled, not measured", "reports": [\n{one_a_line}\n]}}\n'


def lines(reports):
    """The reports of one target as lines of text, one after the other."""
    target = find_target(reports[0]["target"])
    yield f"{target.name}: modelled, not measured; forward and both gradients together; Mcycles of each pipe"
    if target.assumed_as:
        yield f"clock, L2 and DDR rate assumed to be those of {target.assumed_as}"
    yield (
        f"{'':46}{'':8}{'MB':>7}{'GMAC':>7}"
        + "".join(f"{pipe:>7}" for pipe in PIPES)
        + "   times the memory limit, with tasks"
    )
    for r in reports:
        work = Workload(*(r[field] for field in Workload._fields))
        cycles = "".join(f"{r['cycles'][pipe] / 1e6:7.3f}" for pipe in PIPES)
        x = ", ".join(f"{name} {r['x_limit'][name]:.2f} {r['x_limit_with_tasks'][name]:.2f}" for name in GROUPS)
        yield f"{work!s:46}{r['family']:8}{r['bytes'] / 1e6:7.0f}{r['multiply_adds'] / 1e9:7.2f}{cycles}   {x}"
