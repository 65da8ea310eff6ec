"""Times nsa_compress against what people would use instead, and against the limit, a copy of the input: `clone`, and
`copy` into memory that the process has already.

Each implementation is first compared with the reference, in every direction. What is wrong is not timed. Then all of
them take turns, round by round, so that other work on the machine slows all of them alike.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from dataclasses import asdict, replace
from functools import partial
from itertools import count, repeat
from pathlib import Path

import torch
from grid import grid, parse
from implementations import IMPLEMENTATIONS, LENGTHS_GIVEN, MEAN_ONLY, OURS, NotApplicableError
from measure import header, peak_bytes, quantiles, seconds
from report import write_report
from tqdm import tqdm

import nsa
from nsa import reference
from nsa.files import write_aside
from nsa.table import WindowTable

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from tolerance import assert_close

RESULTS = Path(__file__).parent / "results"
PROOF_ROWS = 1500
ROUNDS = 15  # at most; at least 3, fewer for what takes longer than its budget
BUDGET = 0.7  # seconds for a direction of one implementation in a case
MEMORY = 8 << 30  # bytes; if all windows in fp32 take more, implementations that make them are left out
FAST = {*OURS, "torch_npu"}  # are also timed in cases that are too large for the rest
_draws = count(1)  # of lengths; no two calls share one, or the second would find the first one's window table


def main():
    args = arguments()
    device = torch.device(args.device)
    names = args.impl or list(IMPLEMENTATIONS)
    groups = {"shapes": args.shapes} if args.shapes else grid(args.device, args.quick)
    if args.new_lengths:
        groups = {group: [case for case in cases if case.segments != "one"] for group, cases in groups.items()}
    host = None if args.shapes else host_cost(device)
    results = {"header": header(device), "new_lengths": args.new_lengths, "cases": [], "host": host}
    stem = args.device + ("-quick" if args.quick else "") + ("-new-lengths" if args.new_lengths else "")
    stem = args.out or RESULTS / stem
    path = stem.with_suffix(".json")
    with tqdm(total=sum(map(len, groups.values())), unit="case", dynamic_ncols=True) as bar:
        for group, cases in groups.items():
            for case in cases:
                bar.set_description(f"{group} {case}")
                chosen = [name for name in names if group in ("targets", "shapes") or name in FAST]
                found = measure(case, chosen, args.new_lengths)
                results["cases"].append({"group": group, **asdict(case), "results": found})
                write_aside(path, json.dumps(results, indent=1))
                bar.update()
    print(write_report(path))


def measure(case, names, new_lengths=False):
    """For each implementation its times in each direction, or why there is none. With `new_lengths`, every call has
    segments of other lengths, of which there are as many rows; the number of windows then varies."""
    results, calls = {}, {}
    x, weight, dy = case.inputs()
    if new_lengths:
        dy = replace(case, segments="one").inputs()[2]  # as many windows as any lengths have
    x.requires_grad_()
    weight.requires_grad_()
    for name in names:
        try:
            if new_lengths and name in LENGTHS_GIVEN:
                raise NotApplicableError("is prepared for given lengths")
            directions = proven(name, case)
        except NotApplicableError as reason:
            results[name] = {"none": str(reason)}
            continue
        w = torch.full_like(weight, 1 / case.block) if name in MEAN_ONLY else weight
        factors = (x,) if name in MEAN_ONLY else (x, w)
        make = IMPLEMENTATIONS[name]
        functions = map(make, draws(case)) if new_lengths else repeat(make(case))
        calls |= {(name, direction): call(direction, functions, x, w, factors, dy) for direction in directions}
        results[name] = {}
    there = torch.empty_like(x.detach())
    calls["clone", "forward"] = lambda: x.detach().clone
    calls["copy", "forward"] = lambda: partial(there.copy_, x.detach())
    peaks = {key: peak_bytes(make(), case.device) for key, make in calls.items()}  # and the warm-up
    for (name, direction), times in timed(calls, case.device).items():
        peak = peaks[name, direction]
        results.setdefault(name, {})[direction] = summary(case, direction, times) | {"peak_bytes": peak}
    return results


def draws(case):
    """The case with other lengths, again and again."""
    for draw in _draws:
        drawn = replace(case, draw=draw)
        # computed and kept here, not while the call is timed
        drawn.actual_seq_len  # noqa: B018
        yield drawn


def proven(name, case):
    """The directions in which the implementation is right, on fewer rows of the same shape."""
    windows = case.n_windows * case.block * case.n * case.d * 4
    if name not in FAST and case.segments == "one" and windows > MEMORY:
        raise NotApplicableError(f"its windows would take {windows >> 30} GiB")
    make = IMPLEMENTATIONS[name]
    small = replace(case, t=min(case.t, PROOF_ROWS))
    x, weight, dy = small.inputs()
    if name in MEAN_ONLY:
        weight.fill_(1 / case.block)
    function = make(small)
    y, dx, dw = gradients(function, x, weight, dy)
    exact = gradients(specification(small), *(t.double() for t in (x, weight, dy)))
    magnitude = gradients(specification(small), *(t.double().abs() for t in (x, weight, dy)))
    terms = (case.block, -(-case.block // case.stride), max(1, small.n_windows * case.d))
    right = []
    for result, *expected in zip((y, dx, dw), exact, magnitude, terms):
        try:
            right.append(result is None or assert_close(result.cpu(), *expected) is None)
        except AssertionError as error:
            tqdm.write(f"{name} {small}: {error}")
            right.append(False)
    if not right[0]:
        raise NotApplicableError("wrong result")
    return ["forward", "backward", "both"] if all(right) else ["forward"]


def specification(case):
    return lambda x, weight: reference.nsa_compress(
        x.cpu(), weight.cpu(), case.block, case.stride, actual_seq_len=case.actual_seq_len
    )


def gradients(function, x, weight, dy):
    x, weight = (t.detach().clone().requires_grad_() for t in (x, weight))
    y = function(x, weight)
    return y.detach(), *torch.autograd.grad(y, (x, weight), dy.to(y.device), allow_unused=True)


def call(direction, functions, x, w, factors, dy):
    """Makes what is timed, with the next function. The forward is that of training, which keeps what gradients need."""

    def backward(y):
        return torch.autograd.grad(y, factors, dy[: len(y)])

    def make():
        function = next(functions)
        if direction == "forward":
            return partial(function, x, w)
        if direction == "backward":
            return partial(backward, function(x, w))
        return lambda: backward(function(x, w))

    return make


def timed(calls, device):
    """Seconds of each round, by call. A call that has used up its budget is left out of later rounds."""
    times = defaultdict(list)
    for i_round in range(ROUNDS):
        for key, make in calls.items():
            spent = sum(times[key])
            if spent < BUDGET or (i_round < 3 and spent < 3 * BUDGET):
                times[key].append(seconds(make(), device))
    return times


def summary(case, direction, times):
    found = quantiles(times)
    return found | {"gb_s": case.bytes(direction) / found["p50"] / 1e9}


def host_cost(device):
    """Seconds on the host: a call on tiny tensors with a cached table, an empty op, and a new table."""
    library = torch.library.Library("nsa_benchmark", "DEF")
    library.define("empty(Tensor a, Tensor b, int block, int stride, *, SymInt[] actual_seq_len) -> Tensor")

    def empty(a, b, block, stride, *, actual_seq_len):
        return a.new_empty((1, 1, 16))

    library.impl("empty", empty, {"cpu": "CPU", "cuda": "CUDA", "npu": "PrivateUse1"}[device.type])
    x, weight = torch.ones(32, 1, 16, device=device).bfloat16(), torch.ones(32, 1, device=device).bfloat16()
    ops = {
        "empty registered op": torch.ops.nsa_benchmark.empty.default,
        "torch.ops.nsa.nsa_compress": torch.ops.nsa.nsa_compress.default,
        "nsa.nsa_compress": nsa.nsa_compress,
    }
    calls = {name: (lambda op=op: op(x, weight, 32, 16, actual_seq_len=[32])) for name, op in ops.items()}
    costs = {name: best(function, 200) for name, function in calls.items()}
    lengths = torch.randint(1, 300, (100_000,), generator=torch.Generator().manual_seed(0))
    ends = tuple(lengths.cumsum(0).tolist())
    tables = {
        "begins (CPU)": lambda table: table.begins,
        "starts (vector)": lambda table: table.starts,
        "row groups (vector)": lambda table: table.groups,
        "runs of windows (cube)": lambda table: table.window_runs(24),  # of these sizes on Ascend910B3
        "runs of rows (cube)": lambda table: table.row_runs(64),
    }
    for name, make in tables.items():
        costs[f"table of 100,000 segments: {name}"] = best(lambda make=make: make(WindowTable(ends, 32, 16, device)), 1)
    return costs


def best(function, repeats):
    """Seconds of one call, in the fastest of 10 runs: other work on the machine only ever adds time."""
    runs = []
    for _ in range(10):
        begin = time.perf_counter()
        for _ in range(repeats):
            function()
        runs.append((time.perf_counter() - begin) / repeats)
    return min(runs)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda", "npu"], default="cpu", help="where to run (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="few shapes with few rows: two to three minutes")
    parser.add_argument(
        "--shapes", nargs="+", metavar="T,N,D,block,stride,dtype[,segments]",
        help="these cases and no others; dtype fp16, bf16 or fp32; segments documents, one or short",
    )  # fmt: skip
    parser.add_argument(
        "--new-lengths", action="store_true",
        help="every call has segments of other lengths, as batches of training have, and so makes a new window table",
    )  # fmt: skip
    parser.add_argument("--impl", nargs="+", choices=list(IMPLEMENTATIONS), help="these implementations and no others")
    parser.add_argument("--out", type=Path, help="where results go, without the ending (benchmarks/results/DEVICE)")
    args = parser.parse_args()
    if args.device != "cpu" and not (hasattr(torch, args.device) and getattr(torch, args.device).is_available()):
        parser.error(f"expected a machine with {args.device}, got one without")
    for i, text in enumerate(args.shapes or []):
        try:
            args.shapes[i] = parse(text, args.device)
        except (TypeError, ValueError):
            parser.error(f"expected --shapes as T,N,D,block,stride,dtype[,segments], got {text}")
        if args.new_lengths and args.shapes[i].segments == "one":
            parser.error(f"expected segments documents or short with --new-lengths, got {text}")
    return args


if __name__ == "__main__":
    main()
