"""What a call costs besides its work: the way to the kernel, many segments, batches by torch.vmap, and compiling.

On the CPU with one thread. Calls that are compared take turns, round by round, so that other work on the machine slows
all of them alike; each gets the median of its rounds, in wall time and in CPU time of the process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from measure import header
from tqdm import tqdm

import nsa
from nsa.files import write_aside

RESULTS = Path(__file__).parent / "results"
BATCH = 16
DIRECTIONS = ("forward", "forward for gradients", "forward and backward")
# in a process and with a cache of its own, after the compiler was loaded and has compiled something
FIRST_CALL = """
import sys, time
import torch, nsa
torch.compile(lambda x: x + 1, dynamic=True)(torch.ones(8))
form, segments, trained = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "forward and backward"
ends = [64 * (i + 1) for i in range(segments)]
x, weight = torch.ones(ends[-1], 2, 16).bfloat16(), torch.ones(32, 2).bfloat16()
nsa.nsa_compress(x, weight, 32, 16, actual_seq_len=ends)
x.requires_grad_(trained), weight.requires_grad_(trained)
compiled = torch.compile(
    lambda x, weight, ends: nsa.nsa_compress(x, weight, 32, 16, actual_seq_len=ends), dynamic=True, fullgraph=True
)
ends = torch.tensor(ends) if form == "tensor" else ends
wall, cpu = time.perf_counter(), time.process_time()
y = compiled(x, weight, ends)
if trained:
    y.sum().backward()
print(time.perf_counter() - wall, time.process_time() - cpu)
"""


def main():
    args = arguments()
    torch.set_num_threads(1)
    results = {"header": header(torch.device("cpu"))}
    path = args.out or RESULTS / ("overhead-quick.json" if args.quick else "overhead.json")
    for part in (call_overhead, many_segments, batches, first_compiled_call):
        results[part.__name__] = part(args.quick)
        write_aside(path, json.dumps(results, indent=1))
    print(table(results))


def call_overhead(quick):
    """One segment of one window, whose table is there."""
    library = torch.library.Library("nsa_overhead", "DEF")
    library.define("empty(Tensor a, Tensor b, int block, int stride, *, SymInt[] actual_seq_len) -> Tensor")
    library.impl("empty", lambda a, *_, actual_seq_len: a.new_empty((1, 1, 16)), "CPU")
    op, tensor = torch.ops.nsa.nsa_compress, torch.tensor([16])
    functions = {
        "empty op": lambda x, w: torch.ops.nsa_overhead.empty.default(x, w, 16, 16, actual_seq_len=[16]),
        "op, list": lambda x, w: op.default(x, w, 16, 16, actual_seq_len=[16]),
        "op, tensor": lambda x, w: op.offsets(x, w, 16, 16, actual_seq_len=tensor),
        "nsa.nsa_compress, list": lambda x, w: nsa.nsa_compress(x, w, 16, 16, actual_seq_len=[16]),
        "nsa.nsa_compress, tensor": lambda x, w: nsa.nsa_compress(x, w, 16, 16, actual_seq_len=tensor),
        "avg_pool1d": lambda x, w: torch.nn.functional.avg_pool1d(x.view(1, 16, 16), 16),
    }
    calls = {}
    for direction in DIRECTIONS:
        x, w = torch.ones(16, 1, 16).half(), torch.ones(16, 1).half()
        for name, function in functions.items():
            if name != "empty op" or direction == "forward":
                calls[f"{name}: {direction}"] = call(direction, function, x, w)
    return measured(calls, *((3, 10) if quick else (40, 200)))


def many_segments(quick):
    """Rows of one head, in so many segments that each has the same length."""
    rows = 16_000 if quick else 160_000
    x, w = torch.randn(rows, 1, 64).half(), torch.randn(16, 1).half()
    calls = {}
    for direction in (DIRECTIONS[0], DIRECTIONS[2]):
        for form in ("tensor", "list"):
            for segments in (1, 1000, 10_000) if not quick else (1, 1000):
                ends = torch.arange(1, segments + 1) * (rows // segments)
                ends = ends if form == "tensor" else ends.tolist()
                function = lambda x, w, ends=ends: nsa.nsa_compress(x, w, 16, 16, actual_seq_len=ends)  # noqa: E731
                calls[f"{segments} segments, {form}: {direction}"] = call(direction, function, x, w)
    return measured(calls, *((3, 1) if quick else (40, 3)))


def batches(quick):
    """A batch by torch.vmap, and the same work by hand."""
    results = {}
    for rows, heads in (
        ((64, 1), (1024, 1)) if quick else ((64, 1), (1024, 1), (8192, 1), (64, 8), (1024, 8), (8192, 8))
    ):
        calls = {f"{rows} rows, {heads} heads, {name}": of for name, of in batch(rows, heads).items()}
        results |= measured(calls, *((3, 1) if quick else (25, max(1, 2000 // (rows * heads)))))
    return results


def batch(rows, heads):
    xs, ws = torch.randn(BATCH, rows, heads, 64).bfloat16(), torch.randn(BATCH, 32, heads).bfloat16()
    ends = [rows // 2, rows]
    packed = [i * rows + end for i in range(BATCH) for end in ends]

    def compress(x, w, ends=ends):
        return nsa.nsa_compress(x, w, 32, 16, actual_seq_len=ends)

    def loss(w, x):
        return compress(x, w).square().mean(dtype=torch.float32)

    gradient = torch.func.grad(loss)
    pairs = {
        "inputs": (
            lambda: torch.vmap(compress, (0, None))(xs, ws[0]),
            lambda: compress(xs.flatten(0, 1), ws[0], packed).unflatten(0, (BATCH, -1)),
        ),
        "weights": (
            lambda: torch.vmap(compress, (None, 0))(xs[0], ws),
            lambda: torch.stack([compress(xs[0], w) for w in ws]),
        ),
        "inputs and weights": (
            lambda: torch.vmap(compress)(xs, ws),
            lambda: torch.stack([compress(x, w) for x, w in zip(xs, ws)]),
        ),
        "gradients of samples": (
            lambda: torch.vmap(gradient, (None, 0))(ws[0], xs),
            lambda: torch.stack([gradient(ws[0], x) for x in xs]),
        ),
    }
    calls = {}
    for name, (by_vmap, by_hand) in pairs.items():
        torch.testing.assert_close(by_vmap(), by_hand(), rtol=0.02, atol=0.02)
        calls |= {f"{name}: vmap": by_vmap, f"{name}: by hand": by_hand}
    return calls


def first_compiled_call(quick):
    """By torch.compile with dynamic=True: only what a graph with nothing but the op costs."""
    results = {}
    cases = [(form, n) for form in ("list", "tensor") for n in (64, 128, 256)] if not quick else [("list", 2)]
    for form, segments in tqdm(cases, desc="compiling", dynamic_ncols=True):
        for direction in DIRECTIONS[2:] if quick else (DIRECTIONS[0], DIRECTIONS[2]):
            with tempfile.TemporaryDirectory() as folder:
                environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}
                command = [sys.executable, "-W", "ignore", "-c", FIRST_CALL, form, str(segments), direction]
                run = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            wall, cpu = map(float, run.stdout.split())
            results[f"{segments} segments, {form}: {direction}"] = {"wall": wall, "cpu": cpu}
    return results


def call(direction, function, x, w):
    if direction == "forward":
        return lambda: function(x, w)
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    if direction == "forward for gradients":
        return lambda: function(x, w)
    y = function(x, w)
    dy, factors = torch.ones_like(y), [x, w] if "Nsa" in type(y.grad_fn).__name__ else [x]
    return lambda: torch.autograd.grad(function(x, w), factors, dy)


def measured(calls, rounds, repeats):
    """Seconds of each call, in wall time and in CPU time: medians over the rounds."""
    times = {name: [] for name in calls}
    for function in calls.values():
        function()
    for _ in range(rounds):
        for name, function in calls.items():
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(repeats):
                function()
            times[name].append(((time.perf_counter() - wall) / repeats, (time.process_time() - cpu) / repeats))
    return {name: dict(zip(("wall", "cpu"), map(median, zip(*of_call)))) for name, of_call in times.items()}


def base(part, name, found):
    """The call that another one of its part is compared with, or None."""
    what, _, how = name.partition(": ")
    other = {
        "call_overhead": "empty op: forward",
        "many_segments": f"1 segments, {what.rpartition(', ')[2]}: {how}",
        "batches": f"{what}: by hand",
    }.get(part)
    return found.get(other)


def table(results):
    lines = []
    for part, found in results.items():
        if part == "header":
            continue
        unit, scale, digits = ("s", 1, 2) if part == "first_compiled_call" else ("us", 1e6, 1)
        lines += [
            "",
            f"| {part}, {unit} | wall | CPU | over its base, CPU | times its base, wall | CPU |",
            "|---" * 6 + "|",
        ]
        for name, times in found.items():
            cells = [f"{times[clock] * scale:,.{digits}f}" for clock in ("wall", "cpu")]
            other = base(part, name, found)
            if other:
                cells.append(f"{(times['cpu'] - other['cpu']) * scale:,.{digits}f}")
                cells += [f"{times[clock] / other[clock]:.2f}" for clock in ("wall", "cpu")]
            lines.append(f"| {name} | {' | '.join(cells + [''] * (5 - len(cells)))} |")
    return "\n".join(lines[1:])


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds, few rows: half a minute")
    parser.add_argument("--out", type=Path, help="the JSON file (benchmarks/results/overhead.json)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
