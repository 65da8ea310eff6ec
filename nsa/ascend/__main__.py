"""Command line: compile, report, simulate, sweep, roofline. `python -m nsa.ascend --help`."""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from nsa.accelerator import HALF
from nsa.contract import check_sizes
from nsa.files import write_aside
from nsa.triton_ascend import check_toolchain

try:
    from tqdm import tqdm

    check_toolchain()  # before triton is imported: a broken one may not survive that
    from . import compile as pipeline
    from .hivm import overflow_of
    from .launches import DTYPES, Shape, launches_of
    from .roofline.plot import plot
    from .roofline.report import lines, reports_of, to_json
    from .simulator import timeline
    from .simulator.launch import find_kernel, random_arguments, simulate
    from .simulator.op import OPS, simulate_op, total
    from .sweep import legal_grid, sweep
    from .targets import MODELLED, find_target
except ModuleNotFoundError as error:
    print(
        f"nsa.ascend: the module {error.name.partition('.')[0]} is missing: install nsa-ascend[ascend]", file=sys.stderr
    )
    sys.exit(2)
except ImportError as error:
    print(f"nsa.ascend: {error}", file=sys.stderr)
    sys.exit(2)

STAGES = {"ttir": "ttir.mlir", "linalg": "ttadapter.mlir", "hivm": "hivm.mlir"}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv=None):
    args = _parser().parse_args(argv)
    try:
        return args.command(args)
    except (ValueError, RuntimeError, OSError, ImportError) as error:  # a bad target, size or option; a missing tool
        print(f"nsa.ascend: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2


def _parser():
    parser = Parser(prog="nsa.ascend", description="The Ascend toolchain up to HIVM, with no NPU at hand.")
    commands = parser.add_subparsers(required=True, metavar="compile | report | simulate | sweep | roofline")

    one = argparse.ArgumentParser(add_help=False)
    one.add_argument("--target", required=True, help="a name of nsa.ascend.TARGETS, such as Ascend910B3")
    one.add_argument("--block", type=int, default=32, help="rows of a window (default 32)")
    one.add_argument("--stride", type=int, default=16, help="rows between windows (default 16)")
    one.add_argument("--heads", type=int, default=8, help="N (default 8)")
    one.add_argument("--dim", type=int, default=128, help="D (default 128)")
    one.add_argument("--dtype", choices=DTYPES, default="bf16", help="of input and weight (default bf16)")

    command = commands.add_parser("compile", parents=[one], help="write every stage of every kernel")
    command.add_argument("--out", type=_folder, required=True, help="folder for the stages and report.json")
    command.set_defaults(command=_compile)

    command = commands.add_parser("report", parents=[one], help="print what the compiler made of every kernel")
    command.set_defaults(command=_report)

    command = commands.add_parser(
        "simulate", parents=[one], help="run kernels in the simulator: results, faults, times"
    )
    command.add_argument("--segments", type=_counts, default=[80, 96, 333, 1000], help="their rows (80,96,333,1000)")
    command.add_argument("--family", choices=("both", "cube", "vector"), default="both", help="of the op's kernels")
    command.add_argument("--trace", type=_file, help="a timeline for ui.perfetto.dev, as JSON")
    command.add_argument("--plot", type=_file, help="a picture of the timeline, as PNG")
    command.add_argument("--kernel", help="another kernel than the op's: module:function")
    command.add_argument(
        "--signature", type=_dictionary, default={}, help='of --kernel: \'{"x": "*bf16", "n": "i32"}\''
    )
    command.add_argument(
        "--sizes", type=_dictionary, default={}, help='of its arguments: \'{"x": [64, 128], "n": 64}\''
    )
    command.add_argument("--constants", type=_dictionary, default={}, help="its tl.constexpr: '{\"BLOCK\": 64}'")
    command.add_argument("--grid", type=_counts, default=[1], help="its programs, such as 4 or 4,2 (default 1)")
    command.set_defaults(command=_simulate)

    command = commands.add_parser("sweep", help="compile the whole legal grid; goes on where it stopped")
    command.add_argument("--targets", nargs="+", default=list(MODELLED), help=f"default: {' '.join(MODELLED)}")
    command.add_argument("--out", type=_file, required=True, help="the JSON summary")
    command.add_argument("--workers", type=_count, default=os.cpu_count(), help="processes (default: one a CPU)")
    command.set_defaults(command=_sweep)

    command = commands.add_parser("roofline", help="model how far from the memory limit both families would be")
    command.add_argument("--targets", nargs="+", default=list(MODELLED), help=f"default: {' '.join(MODELLED)}")
    command.add_argument(
        "--out", type=_folder, default=Path("runs"), help="folder for roofline.json and roofline.png (runs)"
    )
    command.set_defaults(command=_roofline)
    return parser


def _count(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def _counts(text):
    """Of "80,96"."""
    return [_count(part) for part in text.split(",")]


def _dictionary(text):
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"expected JSON, got {text!r}: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a dictionary, got {text!r}")
    return value


def _folder(text):
    """A folder that can be written, or made; checked before the work whose results go there."""
    return _writable(text, "a folder", Path(text))


def _file(text):
    if text and Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"expected a file, got the folder {text!r}")
    return _writable(text, "a file", Path(text).parent)


def _writable(text, what, folder):
    if not text:
        raise argparse.ArgumentTypeError(f"expected {what}, got ''")
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())  # at least the root
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}, where {there} is a file")
    try:
        tempfile.TemporaryFile(dir=there).close()  # to root, os.access says yes of /proc
    except OSError as error:
        raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}: {there}: {error.strerror}") from error
    return Path(text)


def _launches(args):
    target = find_target(args.target)
    check_sizes(args.heads, args.dim, args.block, args.stride)
    for launch in launches_of(Shape(args.block, args.stride, args.heads, args.dim, args.dtype), target):
        yield launch, target


def _facts(launch, target):
    """(artefacts, their facts) of a launch; (None, the error as data) where it does not compile."""
    try:
        artefacts = pipeline.compile_kernel(launch.kernel, launch.signature, launch.constants, target)
    except pipeline.CompileError as error:
        return None, {"error": str(error), "overflow": overflow_of(str(error))}
    return artefacts, artefacts.facts | {"notes": artefacts.notes, "memory_plan": artefacts.memory}


def _compile(args):
    report = {"target": args.target, "versions": pipeline.versions(), "kernels": {}}
    for launch, target in _launches(args):
        artefacts, report["kernels"][launch.name] = _facts(launch, target)
        if artefacts:
            for stage, suffix in STAGES.items():
                write_aside(args.out / f"{launch.name}.{suffix}", getattr(artefacts, stage))
    write_aside(args.out / "report.json", json.dumps(report, indent=1))
    return _failed(report["kernels"].values())


def _report(args):
    all_facts = []
    for launch, target in _launches(args):
        _, facts = _facts(launch, target)
        all_facts.append(facts)
        print(f"{launch.name} on {target.name}")
        if "error" in facts:
            print(f"  failed        {facts['error']}")
            continue
        print(f"  core          {facts['core']}")
        for memory, used in facts["memory"].items():
            limit = getattr(target, memory.lower())
            print(f"  {memory:<13} {used:,} of {limit:,} bytes ({used / limit:.0%})")
        print(f"  multi-buffer  {'yes' if facts['multi_buffered'] else 'no'}")
        print(f"  scalar        {facts['scalar_accesses']} accesses to single elements on chip")
        for name, count in facts["calls"].items():
            print(f"  calls         {name} x{count}")
        for note in facts["notes"] or ["none"]:
            print(f"  notes         {note}")
    return _failed(all_facts)


def _simulate(args):
    target = find_target(args.target)
    reports, failed = (_simulate_kernel if args.kernel else _simulate_op)(args, target)
    if args.trace and reports:
        write_aside(args.trace, timeline.chrome_trace(reports))
    if args.plot and reports:
        write_aside(args.plot, timeline.plot(reports))
    return int(failed)


def _simulate_kernel(args, target):
    kernel = find_kernel(args.kernel)
    report = simulate(kernel, random_arguments(args.signature, args.sizes) | args.constants, args.grid, target)
    print(*report.lines(), sep="\n")
    return [report], bool(report.launch.faults)


def _simulate_op(args, target):
    check_sizes(args.heads, args.dim, args.block, args.stride)
    shape = Shape(args.block, args.stride, args.heads, args.dim, args.dtype)
    both = ("cube", "vector") if DTYPES[args.dtype] in HALF else ("vector",)
    families = both if args.family == "both" else (args.family,)
    reports, failed = [], False
    with tqdm(total=len(families) * len(OPS), desc="simulate", disable=None) as bar:
        for family in families:
            done = []
            for each in simulate_op(shape, args.segments, target, family, bar.update):
                with bar.external_write_mode():
                    print(*each.lines(), sep="\n")
                done.append(each)
            with bar.external_write_mode():
                print(total(done, target))
            reports += [report for each in done for report in each.reports]
            failed |= any(each.is_wrong for each in done)
    return reports, failed or not reports or any(report.launch.faults for report in reports)


def _sweep(args):
    targets = [find_target(name) for name in args.targets]
    summary = sweep(legal_grid(), targets, args.workers)
    write_aside(args.out, json.dumps(summary, indent=1) + "\n")
    print(
        f"{summary['cases']} cases, {summary['compilations']} compilations, "
        f"{len(summary['failures'])} failures, {len(summary['findings'])} findings: {args.out}"
    )
    return _failed(summary["failures"])


def _roofline(args):
    reports = []
    for target in [find_target(name) for name in args.targets]:
        of_target = reports_of(target)
        print(*lines(of_target), "", sep="\n")
        reports += of_target
    write_aside(args.out / "roofline.json", to_json(reports))
    write_aside(args.out / "roofline.png", plot(reports))
    print(f"{args.out / 'roofline.json'}, {args.out / 'roofline.png'}")
    return 0


def _failed(results):
    """Exit code 1 if one of the kernels did not compile."""
    return int(any("stage" in result or "error" in result for result in results))


if __name__ == "__main__":
    sys.exit(main())
