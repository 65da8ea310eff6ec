"""Simulated times of decode and prefill over paged caches: `python -m nsa.ascend.simulator.decode --help`.

A record is one call on one chip: the time of its kernel by `clock`, and `rates.task_overhead` for each of its tasks.
The limit is a call of one task whose kernel takes no time. There are three forms of a call:

    infer            nsa_compress_infer. The host knows the lengths. Where no window is due nothing is launched. Else
                     the copy that sends the lengths is a second task, whose own time is not simulated.
    append           nsa_compress_append with the right max_new_rows: always one kernel.
    append, unknown  nsa_compress_append without max_new_rows: one kernel, whose programs share the windows of each
                     sequence, since there may be many.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from nsa import accelerator
from nsa.ascend import rates
from nsa.ascend.targets import find_target
from nsa.files import write_aside

from . import clock
from .driver import simulator_driver

TARGETS = ("Ascend910B3", "Ascend910_9392")
BLOCK, STRIDE, PAGE, HEADS, DIM = 32, 16, 128, 8, 128
BEFORE = 8192  # rows that each sequence has at least
ROWS = 16 * 1024  # that a table has pages for
FORMS = ("infer", "append", "append, unknown")


class Work(NamedTuple):
    """new_rows: of each sequence. due: of so many sequences the new rows fill windows."""

    form: str
    batch: int
    new_rows: int
    due: int

    @property
    def most_windows(self):
        """As the op counts them, by which the kernel shares out its work."""
        if self.form == "infer":
            return 1
        return -(-(self.new_rows if self.form == "append" else ROWS) // STRIDE)


WORKLOADS = (
    *(
        Work(form, batch, 1, due)
        for form in FORMS
        for batch in (1, 4, 16, 64, 256)
        for due in dict.fromkeys((0, batch // 16, batch))
    ),
    *(Work(form, 1, rows, 1) for form in FORMS[1:] for rows in (512, 2048, 8192)),
)


def simulate_step(work, target):
    """{"kernel": seconds, "tasks": how many, "memory_limit": seconds}.

    The memory limit is to read the rows of due windows and to write their results, each byte once.
    """
    generator = torch.Generator().manual_seed(0)
    due = torch.randperm(work.batch, generator=generator)[: work.due]
    before = torch.full((work.batch,), BEFORE)
    if work.new_rows == 1:
        before[due] += STRIDE - 1
    after = before + work.new_rows
    windows = sum((after - BLOCK) // STRIDE - (before - BLOCK) // STRIDE).item()
    rows = windows * STRIDE + work.due * (BLOCK - STRIDE)
    limit = (rows + windows) * HEADS * DIM * torch.bfloat16.itemsize / target.ddr_read
    if work.form == "infer" and not work.due:
        return {"kernel": 0.0, "tasks": 0, "memory_limit": limit}
    table = own_pages(work.batch, ROWS // PAGE, 2 if work.new_rows == 1 else ROWS // PAGE)
    pages = torch.randn((int(table.max()) + 1, PAGE, HEADS, DIM), generator=generator).bfloat16()
    weight = torch.randn((BLOCK, HEADS), generator=generator).bfloat16()
    if work.form == "infer":
        lengths = before, after  # int64, as the op sends them
        slots, cache_page = torch.arange(work.batch, dtype=torch.int32), 1
    else:
        lengths = before.int(), after.int()
        slots, cache_page = own_pages(work.batch, ROWS // STRIDE // PAGE, ROWS // STRIDE // PAGE), PAGE
    cache = torch.zeros((int(slots.max()) + 1, cache_page, HEADS, DIM), dtype=torch.bfloat16)
    machine = accelerator.Machine(target.cube_cores, target.vector_cores, accelerator.chip_of(target))
    with simulator_driver(target, check=False) as log:
        accelerator.append(pages, weight, table, *lengths, slots, cache, STRIDE, work.most_windows, machine)
    kernel = sum(clock.time(launch.run, target).seconds for launch in log)
    return {"kernel": kernel, "tasks": len(log) + (work.form == "infer"), "memory_limit": limit}


def own_pages(batch, width, pages):
    """A table in which each sequence has so many pages of its own, in turns: so what one sequence reads is not in L2
    because another has read it, and the pages of 256 sequences fit the memory of a host."""
    return (torch.arange(batch)[:, None] * pages + torch.arange(width) % pages).int()


def seconds(record):
    """Of the call: its kernel and its tasks."""
    return record["kernel"] + record["tasks"] * record["task"]


def simulate_steps(path, target_names):
    """The records of all workloads, which the file at `path` keeps as they come."""
    records = json.loads(path.read_text()) if path.exists() else []
    done = {(record["target"], *(record[field] for field in Work._fields)) for record in records}
    jobs = [(name, work) for name in target_names for work in WORKLOADS]
    for name, work in tqdm(jobs, unit="call", file=sys.stderr):
        if (name, *work) in done:
            continue
        target = find_target(name)
        record = {"target": name, **work._asdict(), "task": rates.task_overhead(target)}
        records.append(record | simulate_step(work, target))
        write_aside(path, json.dumps(records, indent=1) + "\n")
    return records


def table_of(records):
    """Lines of text; times in microseconds."""
    yield f"{'form':16} {'batch':>5} {'rows':>5} {'due':>4} {'kernel':>7} {'tasks':>5} {'all':>6} {'to limit':>8}"
    for record in records:
        form, batch, rows, due = (record[field] for field in Work._fields)
        kernel, call = 1e6 * record["kernel"], 1e6 * seconds(record)
        ratio = seconds(record) / record["task"]
        counts = f"{form:16} {batch:5} {rows:5} {due:4}"
        yield f"{counts} {kernel:7.2f} {record['tasks']:5} {call:6.1f} {ratio:8.2f}  {record['target']}"


def main():
    parser = argparse.ArgumentParser(prog="nsa.ascend.simulator.decode", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a JSON file; what it holds is not simulated again")
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    args = parser.parse_args()
    print(*table_of(simulate_steps(args.out, args.targets)), sep="\n")


if __name__ == "__main__":
    main()
