"""Simulated times of whole calls, tasks included, for many shapes: `python -m nsa.ascend.simulator.calls --help`.

A record is one workload on one chip in one family. Its times are those of the op's kernels by `clock`, and beside them
`rates.task_overhead` for every task, which is a kernel or an operator of the framework. What such an operator computes
takes no time here: those that are left fill or copy less than a megabyte.
"""

import argparse
import io
import json
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from nsa import accelerator
from nsa.ascend import rates
from nsa.ascend.launches import DTYPES
from nsa.ascend.roofline.model import USUAL, documents
from nsa.ascend.targets import find_target
from nsa.files import write_aside
from nsa.table import WindowTable

from . import clock
from .driver import simulator_driver
from .op import OPS, Operators

TARGETS = ("Ascend910B3", "Ascend910_9392")
BASE = USUAL._replace(rows=32 * 1024)
WORKLOADS = (
    *(USUAL._replace(rows=k * 1024) for k in (8, 32, 128)),
    *(BASE._replace(heads=n) for n in (1, 2, 4, 16)),
    *(BASE._replace(dim=d) for d in (64, 256)),
    *(BASE._replace(block=b, stride=s) for b, s in ((16, 16), (64, 16), (64, 32), (128, 16))),
)
SHORT = "short segments"  # of 40 to 200 rows


def short_segments(rows):
    """Ends of segments of 40 to 200 rows; always the same."""
    ends = np.cumsum(np.random.default_rng(0).integers(40, 201, rows // 40))
    return (*ends[ends < rows].tolist(), rows)


def simulate_call(work, ends, target, family):
    """{op: {"kernels": seconds, "tasks": how many, "limit": seconds}}.

    The limit is to read x and write y, and to read dY and x and write dX, as of the roofline: dInput counts the dY that
    dWeight reads once more.
    """
    machine = accelerator.Machine(target.cube_cores, target.vector_cores, accelerator.chip_of(target))
    table = WindowTable(ends, work.block, work.stride, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    x, dy, weight = (
        torch.randn(sizes, generator=generator).to(DTYPES["bf16"])
        for sizes in (
            (work.rows, work.heads, work.dim),
            (table.n_windows, work.heads, work.dim),
            (work.block, work.heads),
        )
    )
    calls = {
        "forward": lambda: accelerator.forward(x, weight, table, machine, family),
        "grad_input": lambda: accelerator.grad_input(dy, weight, table, len(x), machine, family),
        "grad_weight": lambda: accelerator.grad_weight(dy, x, table, machine, family),
    }
    moved = {"forward": x.nbytes + dy.nbytes, "grad_input": dy.nbytes + x.nbytes, "grad_weight": x.nbytes}
    results = {}
    for op, call in calls.items():
        operators = Operators()
        with simulator_driver(target, check=False) as log, operators:
            call()
        results[op] = {
            "kernels": sum(clock.time(launch.run, target).seconds for launch in log),
            "tasks": len(log) + operators.count,
            "limit": moved[op] / target.ddr_read,
        }
    return results


def ratio(record, ops=OPS):
    """How many times the memory limit the ops take together, tasks included."""
    seconds = sum(record[op]["kernels"] + record[op]["tasks"] * record["task"] for op in ops)
    return seconds / sum(record[op]["limit"] for op in ops)


def simulate_calls(path, target_names):
    """The records of all workloads, which the file at `path` keeps as they come."""
    records = json.loads(path.read_text()) if path.exists() else []
    done = {(record["target"], record["workload"], record["family"]) for record in records}
    jobs = []
    for name in target_names:
        for work in WORKLOADS:
            family = accelerator.family_of(torch.bfloat16, work.block, work.stride)
            jobs.append((name, str(work), family, work, documents(work.rows)))
        jobs.append((name, f"{BASE}, {SHORT}", "cube", BASE, short_segments(BASE.rows)))
    for name, label, family, work, ends in tqdm(jobs, unit="call", file=sys.stderr):
        if (name, label, family) in done:
            continue
        target = find_target(name)
        record = {"target": name, "workload": label, "family": family, "task": rates.task_overhead(target)}
        records.append(record | simulate_call(work, ends, target, family))
        write_aside(path, json.dumps(records, indent=1) + "\n")
    return records


def table_of(records):
    """Lines of text."""
    yield f"{'workload':46} {'forward':>8} {'all':>6}  tasks"
    for record in records:
        tasks = "+".join(str(record[op]["tasks"]) for op in OPS)
        yield f"{record['workload']:46} {ratio(record, OPS[:1]):8.2f} {ratio(record):6.2f}  {tasks}, {record['target']}"


def plot(before, after):
    """The bytes of a PNG: a panel for each chip and for the forward and all three ops, before against after."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(record["target"] for record in after))
    panels_of = (("forward", OPS[:1]), ("all three ops", OPS))
    figure, panels = pyplot.subplots(len(names), 2, figsize=(15, 5 * len(names)), sharey=True, squeeze=False)
    for row, name in zip(panels, names):
        for panel, (title, ops) in zip(row, panels_of):
            for records, label, marker in ((before, "before", "x"), (after, "now", "o")):
                mine = [record for record in records if record["target"] == name]
                panel.plot([ratio(r, ops) for r in mine], [r["workload"] for r in mine], marker, label=label)
            panel.axvline(1, color="black", linewidth=1, label="memory limit")
            panel.set_title(f"{name}, {title}")
            panel.set_xlim(left=0.9)
            panel.grid(axis="x", alpha=0.4)
    panels[0, 0].invert_yaxis()
    panels[0, 0].legend()
    figure.suptitle("Times the memory limit, tasks included, bf16: SIMULATED, never measured on an NPU")
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=90)
    return picture.getvalue()


def main():
    parser = argparse.ArgumentParser(prog="nsa.ascend.simulator.calls", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a JSON file; what it holds is not simulated again")
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("--before", type=Path, help="another such file, to draw both")
    parser.add_argument("--plot", type=Path, help="a PNG file")
    args = parser.parse_args()
    records = simulate_calls(args.out, args.targets)
    print(*table_of(records), sep="\n")
    if args.plot:
        write_aside(args.plot, plot(json.loads(args.before.read_text()) if args.before else [], records))


if __name__ == "__main__":
    main()
