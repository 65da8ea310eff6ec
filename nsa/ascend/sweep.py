"""Compile the whole legal grid of kernels, and say in one JSON summary what came of it."""

import datetime
import json
from collections import Counter, defaultdict
from itertools import product

from tqdm import tqdm

from . import compile as pipeline
from .hivm import overflow_of
from .launches import Shape, launches_of
from .targets import find_target, one_of_each_class

SIXTEENS = range(16, 129, 16)
HEADS = (1, 3, 8, 128)
DIMS = range(16, 257, 16)
DTYPES = ("fp16", "bf16")


def legal_grid():
    """Every legal block, stride and D, with four values of N and both dtypes of the specification."""
    return [
        Shape(block, stride, heads, dim, dtype)
        for block, stride, heads, dim, dtype in product(SIXTEENS, SIXTEENS, HEADS, DIMS, DTYPES)
        if stride <= block
    ]


def sweep(shapes, targets, workers, progress=True):
    """Compile all kernels of all shapes for all targets; the summary as plain data.

    Kernels whose constants are equal, and targets of one compile class, are compiled once. What was
    compiled before comes from the disk, so a sweep that was broken off goes on where it stopped.
    """
    classes = one_of_each_class(targets)
    cases = defaultdict(list)  # {compilation: [(shape, which of its launches), ...]}: all that need this one
    for shape, (target, _) in tqdm(list(product(shapes, classes)), desc="plan", disable=not progress):
        for i, launch in enumerate(launches_of(shape, target)):
            key = pipeline.content_key(launch.kernel, launch.signature, launch.constants, target)
            cases[key, target.name, launch.name].append((shape, i))
    jobs = {job: members[0] for job, members in cases.items()}

    members_of = {target.name: names for target, names in classes}
    findings, failures, notes = defaultdict(list), [], []
    results = pipeline.map_processes(_compile_job, [(*jobs[job], job[1], job) for job in jobs], workers)
    for (shape, _, _, job), future in tqdm(results, total=len(jobs), desc="compile", disable=not progress):
        _, target, name = job
        case = {"kernel": name, "targets": members_of[target], "shapes": len(cases[job]), "first": str(shape)}
        try:
            facts = future.result()
        except pipeline.CompileError as error:
            failures.append(
                case | {"stage": error.stage, "message": error.message, "overflow": overflow_of(str(error))}
            )
            continue
        findings[target, name].append(facts)
        if facts["switched_off"] or facts["scalar_accesses"] or not facts["multi_buffered"]:
            notes.append(case | {k: facts[k] for k in ("switched_off", "scalar_accesses", "multi_buffered")})
    return {
        "date": datetime.date.today().isoformat(),
        "versions": pipeline.versions(),
        "compile_classes": [names for _, names in classes],
        "shapes": len(shapes),
        "cases": sum(len(members) for members in cases.values()),
        "compilations": len(jobs),
        "failures": sorted(failures, key=json.dumps),
        "findings": sorted(notes, key=json.dumps),
        "kernels": [_kernel_summary(target, name, facts) for (target, name), facts in sorted(findings.items())],
    }


def _compile_job(job):
    shape, i, name, _ = job
    target = find_target(name)
    launch = launches_of(shape, target)[i]
    return pipeline.compile_kernel(launch.kernel, launch.signature, launch.constants, target).facts


def _kernel_summary(target, name, facts):
    memories = sorted({memory for f in facts for memory in f["memory"]})
    return {
        "target": target,
        "kernel": name,
        "compiled": len(facts),
        "core": dict(Counter(f["core"] for f in facts)),
        "multi_buffered": sum(f["multi_buffered"] for f in facts),
        "most_memory": {m: max(f["memory"].get(m, 0) for f in facts) for m in memories},
    }
