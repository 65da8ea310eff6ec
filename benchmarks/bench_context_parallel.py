"""What context parallel sends, against what a rank holds, and how long it takes on gloo, against one process.

Bytes are counted: from the split sizes of the all-to-all that each rank really calls. Times are measured, of processes
with one thread each on shared cores: ranks wait for each other and, where there are fewer cores than ranks, for cores.
They say what the exchange costs on such a machine, and nothing of a network or of an accelerator.
"""

import argparse
import os
import tempfile
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from grid import parse
from measure import header, seconds
from report import row

import nsa
from nsa.distributed import collectives, context_parallel_nsa_compress, windows_per_rank
from nsa.files import write_aside

BLOCKS = ((32, 16), (64, 32), (128, 16))  # block, stride
SEGMENTS = ("one", "documents")
ROUNDS = 9
CPU = torch.device("cpu")
COLUMNS = (
    "ranks", "block/stride", "segments", "a rank holds, KiB", "sends forward, KiB", "sends backward, KiB",
    "sent of held", "one process, ms", "ranks, ms",
)  # fmt: skip


# The ranks' processes keep their memory: or else they would be timed at getting it, a rank with fewer rows not at all.
KEPT_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}


def main():
    args = arguments()
    os.environ.update(KEPT_MEMORY)
    lines = [preamble(args), "", row(COLUMNS), row(["---"] * len(COLUMNS))]
    for world in args.ranks:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(rank_main, (world, args.rows, folder), nprocs=world)
            lines += Path(folder, "lines").read_text().splitlines()
    write_aside(args.out, "\n".join(lines) + "\n")
    print("\n".join(lines))


def rank_main(rank, world, t, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    lines = [
        measure(rank, world, parse(f"{t},8,128,{block},{stride},bf16,{segments}", "cpu"))
        for block, stride in BLOCKS
        for segments in SEGMENTS
    ]
    if rank == 0:
        Path(folder, "lines").write_text("\n".join(lines))
    dist.destroy_process_group()


def measure(rank, world, case):
    """A line of the table; bytes of the rank that sends most, times of the slowest rank."""
    x, weight, dy = case.inputs()
    geometry = case.block, case.stride
    lengths = {"actual_seq_len": case.actual_seq_len}
    rows = case.t // world
    windows = windows_per_rank([rows] * world, *geometry, **lengths)
    mine = x[rank * rows : (rank + 1) * rows].clone().requires_grad_(), weight.clone().requires_grad_()
    my_dy = dy[sum(windows[:rank]) : sum(windows[: rank + 1])].clone()

    def parallel():
        y = context_parallel_nsa_compress(*mine, *geometry, **lengths)
        return y, *torch.autograd.grad(y, mine, my_dy)

    def alone():
        y = nsa.nsa_compress(*whole, *geometry, **lengths)
        return y, *torch.autograd.grad(y, whole, dy)

    sent = [*sent_bytes(parallel), 0, 0][:2]  # forward, backward; nothing where no window is cut
    whole = x.requires_grad_(), weight.requires_grad_()
    alone_times, parallel_times = [], []
    for _ in range(ROUNDS):
        if rank == 0:
            alone_times.append(seconds(alone, CPU))
        dist.barrier()
        parallel_times.append(seconds(parallel, CPU))
        dist.barrier()
    worst = torch.tensor([*sent, torch.tensor(parallel_times).median()], dtype=torch.float64)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    forward, backward, taken = worst.tolist()
    held = mine[0].nbytes
    return row(
        [
            world, f"{case.block}/{case.stride}", case.segments, f"{held / 1024:,.0f}", f"{forward / 1024:,.0f}",
            f"{backward / 1024:,.0f}", f"{forward / held:.2%}",
            f"{torch.tensor(alone_times).median() * 1e3:.1f}" if rank == 0 else "", f"{taken * 1e3:.1f}",
        ]
    )  # fmt: skip


def sent_bytes(function):
    """Bytes that this rank sends to others in each exchange of a call."""
    sent_bytes = []
    all_to_all = collectives.all_to_all_single

    def counted(tensor, received, sent, group_name):
        assert sent[dist.get_rank()] == 0
        sent_bytes.append(sum(sent) * tensor[0:1].nbytes if len(tensor) else 0)
        return all_to_all(tensor, received, sent, group_name)

    with mock.patch.object(collectives, "all_to_all_single", counted):
        function()
    return sent_bytes


def preamble(args):
    head = header(CPU)
    return (
        f"Measured on {head['date']}, commit {head['commit']}: {head['machine']}, shared with other work (load "
        f"{head['load']} at the start), torch {head['versions']['torch']}, gloo, one thread a rank. T {args.rows:,}, "
        "N 8, D 128, bf16, the same number of rows on each rank. Bytes: counted, of the rank that sends most. Times: "
        f"forward and backward, medians of {ROUNDS} rounds, of the slowest rank, with memory that the process has "
        "already; one process has one thread and all rows."
    )


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32768, help="of all ranks together (%(default)s)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="numbers of processes (2 4)")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "context-parallel.md",
        help="where the table goes (benchmarks/results/context-parallel.md)",
    )  # fmt: skip
    args = parser.parse_args()
    for world in args.ranks:
        if args.rows % world:
            parser.error(f"expected --rows to be a multiple of each of --ranks, got {args.rows} and {world}")
    return args


if __name__ == "__main__":
    main()
