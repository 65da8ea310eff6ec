"""Command line: report. `python -m nsa.gpu --help`."""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from nsa.contract import check_sizes
from nsa.files import write_aside

from .targets import TARGETS, find_target


def _stop(message):
    print(f"nsa.gpu: {message}", file=sys.stderr)
    sys.exit(2)


try:
    from triton.backends import backends

    if "ascend" in backends:  # it lacks what the rest imports
        _stop(
            "expected community Triton, which compiles for GPUs, got triton-ascend: "
            "install nsa-ascend[cuda] in an environment of its own"
        )
    from triton.runtime.jit import JITFunction

    from nsa.ascend.launches import DTYPES, Shape
    from nsa.kernels import vector

    from .report import SAMPLE, as_json, lines, report
except ModuleNotFoundError as error:
    _stop(f"the module {error.name.partition('.')[0]} is missing: install nsa-ascend[cuda]")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv=None):
    args = _parser().parse_args(argv)
    try:
        return args.command(args)
    except (ValueError, RuntimeError, OSError) as error:  # a bad argument, a file that cannot be written
        print(f"nsa.gpu: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2


def _parser():
    parser = Parser(prog="nsa.gpu", description="What community Triton makes of the kernels for GPUs, with no GPU.")
    commands = parser.add_subparsers(required=True, metavar="report")
    command = commands.add_parser("report", help="compile every kernel, print a table, write the facts as JSON")
    command.add_argument("--targets", nargs="+", default=list(TARGETS), help=f"of {', '.join(TARGETS)}; default: all")
    command.add_argument(
        "--shapes", nargs="+", metavar="BLOCK,STRIDE,N,D,DTYPE", help="such as 32,16,8,128,bf16; default: a sample"
    )
    command.add_argument("--out", type=Path, default=Path("runs/gpu.json"), help="the JSON file (runs/gpu.json)")
    command.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a CPU)")
    command.set_defaults(command=_report)
    return parser


def _report(args):
    targets = [find_target(name) for name in args.targets]
    shapes = [_shape(text) for text in args.shapes] if args.shapes else SAMPLE
    if args.workers < 1:
        raise ValueError(f"expected workers >= 1, got {args.workers}")
    if args.out.is_dir():
        raise ValueError(f"expected a file to write, got the folder '{args.out}'")
    if not isinstance(vector.forward_vector_kernel, JITFunction):
        raise RuntimeError("expected kernels to compile, got interpreted ones: unset TRITON_INTERPRET")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=args.out.parent):  # fails now, not after minutes
        pass
    results = report(shapes, targets, args.workers)
    write_aside(args.out, as_json(results))
    print(*lines(results), "", args.out, sep="\n")
    failed = [kernel for kernel in results["kernels"] if "error" in kernel]
    for kernel in failed:
        reason = kernel["error"].splitlines()[0]
        print(f"{kernel['kernel']} for {kernel['target']}, {kernel['shape']}: {reason}", file=sys.stderr)
    return int(bool(failed))


def _shape(text):
    *sizes, dtype = text.split(",")
    if len(sizes) != 4 or not all(size.isdecimal() for size in sizes) or dtype not in DTYPES:
        raise ValueError(f"expected a shape BLOCK,STRIDE,N,D,DTYPE with a dtype of {', '.join(DTYPES)}, got {text!r}")
    block, stride, heads, dim = map(int, sizes)
    check_sizes(heads, dim, block, stride)
    return Shape(block, stride, heads, dim, dtype)


if __name__ == "__main__":
    sys.exit(main())
