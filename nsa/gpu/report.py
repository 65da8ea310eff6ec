"""Facts of many shapes and targets as one JSON text, and as a table to read."""

import datetime
import json
from itertools import product

from tqdm import tqdm

from nsa.ascend.compile import map_processes
from nsa.ascend.launches import Shape

from .compile import N_ROWS, facts_of, versions

_USUAL = ((16, 16), (32, 16), (64, 16), (64, 32), (128, 16))  # block, stride
# of the legal grid: usual models; few, many and odd heads; short, long and odd D; the ends of block and stride
SAMPLE = (
    *(Shape(*geometry, 8, 128, dtype) for geometry in _USUAL for dtype in ("bf16", "fp32")),
    Shape(32, 16, 8, 128, "fp16"),
    *(Shape(32, 16, heads, 128, "bf16") for heads in (1, 4, 16, 127)),
    *(Shape(32, 16, 8, dim, "bf16") for dim in (16, 64, 80, 256)),
    Shape(128, 16, 8, 256, "bf16"),
    Shape(128, 128, 128, 256, "fp16"),
    Shape(80, 48, 3, 112, "bf16"),
    Shape(16, 16, 1, 16, "fp64"),
    Shape(128, 16, 2, 256, "fp64"),
)
_TENSOR_CORES = ("mma", "wgmma", "tcgen05", "mfma")


def report(shapes, targets, workers):
    """Compile every kernel of the shapes for the targets in `workers` processes; the facts as plain data."""
    jobs = list(product(shapes, targets))
    with tqdm(map_processes(_job, jobs, workers), total=len(jobs), unit="shape", desc="compile", leave=False) as bar:
        facts = {job: future.result() for job, future in bar}
    return {
        "what": "compiled, never run",
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
        "rows": N_ROWS,
        "targets": {target.name: target._asdict() for target in targets},
        "kernels": [kernel for job in jobs for kernel in facts[job]],
    }


def _job(job):
    return facts_of(*job)


def as_json(results):
    """The report as JSON, a kernel a line."""
    *head, _ = json.dumps({**results, "kernels": []}, indent=1).splitlines()
    kernels = ",\n".join(f"  {json.dumps(kernel)}" for kernel in results["kernels"])
    return "\n".join(head).replace('"kernels": []', f'"kernels": [\n{kernels}\n ]') + "\n}\n"


def lines(results):
    """A Markdown table with a line for each target and kernel; where shapes differ, least and most."""
    header = ("target", "kernel", "shapes", "warps", "registers", "stack, bytes", "shared, bytes")
    header += ("a load of x, bytes", "of dy", "cp.async", "tensor cores")
    rows = [header, ["---"] * len(header)]
    groups = {}
    for kernel in sorted(results["kernels"], key=lambda kernel: list(results["targets"]).index(kernel["target"])):
        groups.setdefault((kernel["target"], kernel["kernel"].removesuffix("_kernel")), []).append(kernel)
    for (target, name), kernels in groups.items():
        compiled = [kernel for kernel in kernels if "error" not in kernel]
        failed = f", {len(kernels) - len(compiled)} failed" if len(compiled) < len(kernels) else ""
        row = [target, name, f"{len(compiled)}{failed}"]
        row += [_span(kernel[fact] for kernel in compiled) for fact in ("warps", "registers", "stack", "shared")]
        row += [_widths(compiled, pointer) for pointer in ("x", "dy")]
        row += [_span(kernel["cp_async"] for kernel in compiled if "cp_async" in kernel)]
        spans = {unit: _span(kernel[unit] for kernel in compiled if kernel.get(unit)) for unit in _TENSOR_CORES}
        row += [", ".join(f"{unit} {span}" for unit, span in spans.items() if span)]
        rows.append(row)
    return [f"| {' | '.join(row)} |" for row in rows]


def _span(values):
    values = sorted(set(values))
    if len(values) < 2:
        return "".join(map(str, values))
    return f"{values[0]} to {values[-1]}"


def _widths(kernels, pointer):
    """Of the loads through a pointer, or where the assembly names none, of all."""
    loads = [kernel["loads"] for kernel in kernels]
    return ", ".join(map(str, sorted({width for load in loads for width in load.get(pointer, load.get("all", ()))})))
