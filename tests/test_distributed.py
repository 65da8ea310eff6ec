"""Context parallel on gloo: two, three and four processes against one; what travels; errors; torch.compile."""

import os
import random
import re
import sys
import time
import traceback
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import Case
from tolerance import assert_close
from torch._inductor import config as inductor

import nsa
from nsa import reference
from nsa.distributed import collectives, windows_per_rank
from nsa.distributed import context_parallel_nsa_compress as call
from nsa.table import count_windows

TIMEOUT = 60  # seconds for a collective of ranks that do not all take part in it
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Split:
    """A case whose rows are held by several ranks."""

    case: Case
    rows: tuple

    @property
    def ends(self):
        return self.case.actual_seq_len

    def slice(self, rank):
        """The rows of a rank."""
        return slice(sum(self.rows[:rank]), sum(self.rows[: rank + 1]))

    @property
    def windows(self):
        """First row, owner, and whether it is cut, of every window: one by one, and by what the ranks' rows are."""
        holders = [rank for rank, n in enumerate(self.rows) for _ in range(n)]
        block, stride = self.case.geometry
        segments = pairwise((0, *self.ends))
        starts = [start for begin, end in segments for start in range(begin, end - block + 1, stride)]
        return [(start, holders[start], holders[start + block - 1] != holders[start]) for start in starts]

    def windows_of(self, rank):
        mine = [i for i, (_, owner, _) in enumerate(self.windows) if owner == rank]
        return slice(mine[0], mine[-1] + 1) if mine else slice(0, 0)

    def uncut(self, rank):
        """For each row of a rank, whether no cut window holds it."""
        uncut = torch.ones(sum(self.rows), dtype=torch.bool)
        for start, _, is_cut in self.windows:
            if is_cut:
                uncut[start : start + self.case.block] = False
        return uncut[self.slice(rank)]

    @property
    def arguments(self):
        rows = {"rows_per_rank": self.rows} if len(set(self.rows)) > 1 else {}
        return {"actual_seq_len": self.ends, **rows}

    def counts(self):
        return windows_per_rank(self.rows, *self.case.geometry, actual_seq_len=self.ends)


def split(lengths, rows, block, stride, n=2, d=16):
    assert sum(lengths) == sum(rows)
    return Split(Case(lengths, block, stride, n, d), rows)


SPLITS = {
    2: {
        "cut within a window": split((200,), (100, 100), 32, 16),
        "cut at a window's start": split((200,), (96, 104), 32, 16),
        "cut between segments": split((96, 104), (96, 104), 32, 16),
        "last row alone": split((96, 104), (95, 105), 32, 16),
        "segments shorter than a block": split((20, 31, 40, 5, 64), (60, 100), 32, 16),
        "stride does not divide block": split((300, 50), (170, 180), 64, 48),
        "tail longer than the rank": split((200,), (20, 180), 128, 16),
        "no row on the first rank": split((100, 60), (0, 160), 32, 16),
        "no row on the last rank": split((100, 60), (160, 0), 32, 16),
        "no window on the last rank": split((120, 30), (100, 50), 32, 16),
        "no window": split((30, 30), (25, 35), 32, 16),
    },
    3: {
        "segment longer than two ranks": split((310,), (101, 107, 102), 64, 48),
        "halo from two ranks": split((400,), (300, 40, 60), 128, 16),
        "no row between two ranks": split((400,), (150, 0, 250), 128, 16),
        "only the middle rank has rows": split((90, 70), (0, 160, 0), 32, 16),
        "two ranks exchange": split((200, 100), (100, 100, 100), 32, 16),
        "several segments in a rank": split((40, 0, 70, 33, 64, 50, 43), (100, 90, 110), 32, 16),
    },
    4: {
        "ranks shorter than a block": split((200,), (50, 50, 50, 50), 128, 16),
        "halo from three ranks": split((300,), (190, 30, 20, 60), 128, 16),
        "ranks of a row": split((64, 32), (1, 30, 1, 64), 32, 16),
        "even": split((150, 250), (100, 100, 100, 100), 32, 16),
    },
}


def random_splits(world, how_many):
    """What the named ones leave out."""
    chance = random.Random(world)
    for _ in range(how_many):
        block = chance.choice((16, 32, 64, 128))
        lengths = [chance.randint(1, 3 * block) for _ in range(chance.randint(1, 4))]
        t = sum(lengths)
        cuts = sorted(chance.randint(0, t) for _ in range(world - 1))
        rows = tuple(b - a for a, b in zip((0, *cuts), (*cuts, t)))
        yield split(tuple(lengths), rows, block, chance.randrange(16, block + 1, 16))


@pytest.mark.parametrize("world", SPLITS)
def test_windows_per_rank(world):
    for one in (*SPLITS[world].values(), *random_splits(world, 200)):
        counts = one.counts()
        owners = [owner for _, owner, _ in one.windows]
        assert counts == [owners.count(rank) for rank in range(world)]
        assert sum(counts) == count_windows(one.ends, *one.case.geometry)


def test_windows_per_rank_of_the_docstring():
    assert windows_per_rank((48, 48), 32, 16, actual_seq_len=(96,)) == [3, 2]


def test_equals_one_process(tmp_path):
    start(equals_one_process, 4, tmp_path)


def start(worker, world, folder):
    """Run worker(rank, world, folder) in `world` processes. The first to fail ends all; none outlives this."""
    context = mp.spawn(worker, (world, folder), nprocs=world, join=False)
    deadline = time.monotonic() + 4 * TIMEOUT
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, "the ranks do not come to an end"
    finally:
        for process in context.processes:
            process.kill()


@contextmanager
def ranks(rank, world, folder):
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    where = {"init_method": f"file://{folder}/store", "rank": rank, "world_size": world}
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT), **where)
    try:
        yield
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # an ordinary exit would wait for what other ranks have not sent
    dist.barrier()
    sys.stderr.flush()
    os._exit(0)  # nor is it left to threads of PyTorch, one of which was seen to abort a process at its end


def equals_one_process(rank, world, folder):
    with ranks(rank, world, folder):
        # in the second group a process has another rank than in the default one
        members = {2: [0, 1], 3: [1, 2, 3], 4: [0, 1, 2, 3]}
        timeout = timedelta(seconds=TIMEOUT)  # not that of the default group
        groups = {size: dist.new_group(of_size, timeout) for size, of_size in members.items()}
        for size, group in groups.items():
            if rank not in members[size]:
                with pytest.raises(RuntimeError, match="this process must be in the group, got a group without it"):
                    call(torch.ones(16, 1, 16), torch.ones(16, 1), 16, 16, actual_seq_len=[16], group=group)
                continue
            for name, one in (*SPLITS[size].items(), *(("random", one) for one in random_splits(size, 8))):
                for dtype in DTYPES:
                    try:
                        check(replace(one, case=replace(one.case, dtype=dtype)), group)
                    except Exception as error:
                        raise AssertionError(f"{name}, {dtype}, {one}") from error
        if rank in members[2]:
            check_travel(groups[2])
        if rank in members[3]:
            check_travel_from_two_ranks(groups[3])
        check_errors_of_several_ranks(rank)
        check_autocast(rank)
        check_gathered(rank)


def check(one, group, function=call):
    """What this rank gets of a case, against what one process gets of the whole and against fp64."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    case = one.case
    rows, windows = one.slice(rank), one.windows_of(rank)
    x, weight, dy = case.inputs
    whole_y, whole_dx, _ = gradients(whole(case), x, weight, dy)

    y, dx, dw = gradients(parallel(one, group, function), strided(x)[rows], weight, dy[windows])
    assert y.is_contiguous()
    assert y.dtype == case.dtype
    assert torch.equal(y, whole_y[windows])
    uncut = one.uncut(rank)
    assert torch.equal(dx[uncut], whole_dx[rows][uncut])
    for t in (y, dx, dw):
        assert type(t) is torch.Tensor  # and none that still waits for a collective

    y_terms, dx_terms, dw_terms = case.terms
    assert_close(y, case.exact[0][windows], case.magnitude[0][windows], y_terms)
    # inner windows, cut windows, and those of each other rank
    assert_close(dx, case.exact[1][rows], case.magnitude[1][rows], dx_terms, parts=1 + world)
    mine = torch.zeros_like(dy)
    mine[windows] = dy[windows]
    partial = case.with_inputs(x, weight, mine)
    assert_close(dw, partial.exact[2], partial.magnitude[2], dw_terms, parts=2)
    summed = dw.clone()
    dist.all_reduce(summed, group=group)
    assert_close(summed, case.exact[2], case.magnitude[2], dw_terms, parts=2 * world)
    if case.dtype == torch.float64:
        check_higher_orders(one, group)


def check_higher_orders(one, group):
    case, rank = one.case, dist.get_rank(group)
    rows, windows, everything = one.slice(rank), one.windows_of(rank), slice(None)
    generator = torch.Generator().manual_seed(1)
    factors = [torch.randn(t.shape, generator=generator).double() for t in (*case.inputs[:2], *case.inputs)]
    tensors = [*case.inputs, *factors]
    parts = (rows, everything, windows, rows, everything, rows, everything, windows)
    got = higher_orders(parallel(one, group), *(t[part] for t, part in zip(tensors, parts)))
    specification = whole(case, reference.nsa_compress)
    exact, magnitude = higher_orders(specification, *tensors), higher_orders(specification, *(t.abs() for t in tensors))
    _, dx_terms, dw_terms = case.terms
    terms = (dx_terms, dw_terms, 2 * case.block, dx_terms, dw_terms, 2 * case.block, 2 * dx_terms)
    for result, part, *expected in zip(got, (*parts[:3], *parts[:4]), exact, magnitude, terms):
        if part is everything:
            dist.all_reduce(result, group=group)
        assert_close(result, expected[0][part], expected[1][part], expected[2], parts=2 * (1 + len(one.rows)))


def higher_orders(function, x, weight, dy, u, v, a, b, c):
    """Second-order gradients for x, weight and dy, and third-order ones for these and u. In the names of
    nsa/autograd.py: A(dy, v), B(dy, u) and F(u, weight) + F(x, v); A(c, v), B(c, u), F(a, v) + F(u, b) and
    A(dy, b) + A(c, weight)."""
    x, weight, dy, u = (t.detach().clone().requires_grad_() for t in (x, weight, dy, u))
    dx, dw = torch.autograd.grad(function(x, weight), (x, weight), dy, create_graph=True)
    seconds = torch.autograd.grad((dx * u).sum() + (dw * v).sum(), (x, weight, dy), create_graph=True)
    thirds = torch.autograd.grad(sum((s * t).sum() for s, t in zip(seconds, (a, b, c))), (x, weight, dy, u))
    return [t.detach().clone() for t in (*seconds, *thirds)]


def gradients(function, x, weight, dy):
    x, weight = (t.detach().requires_grad_() for t in (x, weight))
    y = function(x, weight)
    return y.detach(), *torch.autograd.grad(y, (x, weight), dy)


def whole(case, function=torch.ops.nsa.nsa_compress):
    return lambda x, weight: function(x, weight, *case.geometry, actual_seq_len=case.actual_seq_len)


def parallel(one, group, function=call):
    return lambda x, weight: function(x, weight, *one.case.geometry, **one.arguments, group=group)


def strided(x):
    """The same numbers, heads before rows in memory, as a projection may give them."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def check_travel(group):
    """The halo's rows travel and nothing else, in one exchange, and back in the backward. Windows start at rows 0, 16,
    32, 48 and 64: of rank 0's, that at 32 lacks rows 48 to 63."""
    rank = dist.get_rank(group)
    exchanges = run_recorded(split((96,), (48, 48), 32, 16), group)
    assert exchanges == [([0, 0], [16, 0])[rank], ([0, 16], [0, 0])[rank]]
    assert run_recorded(split((48, 48), (48, 48), 32, 16), group) == []


def check_travel_from_two_ranks(group):
    """Rank 0's last window has rows 272 to 399, of which it holds those before 300. Rank 1 would have the one that
    starts at row 304 and ends at row 431, but there are only 400 rows."""
    rank = dist.get_rank(group)
    exchanges = run_recorded(SPLITS[3]["halo from two ranks"], group)
    assert exchanges == [([0, 0, 0], [40, 0, 0], [60, 0, 0])[rank], ([0, 40, 60], [0, 0, 0], [0, 0, 0])[rank]]


def run_recorded(one, group):
    """How many rows this rank sends to each rank, in every exchange of a forward and a backward."""
    exchanges = []
    all_to_all = collectives.all_to_all_single

    def recorded(rows, received, sent, group_name):
        assert rows.shape == (sum(sent), one.case.n, one.case.d)
        exchanges.append(list(sent))
        return all_to_all(rows, received, sent, group_name)

    x, weight, dy = one.case.inputs
    rank = dist.get_rank(group)
    with mock.patch.object(collectives, "all_to_all_single", recorded):
        gradients(parallel(one, group), x[one.slice(rank)], weight, dy[one.windows_of(rank)])
    return exchanges


def check_errors_of_several_ranks(rank):
    x, weight = torch.ones(4, 1, 16), torch.ones(16, 1)
    with pytest.raises(RuntimeError, match="must be a multiple of the 4 ranks of the group, got T = 18"):
        call(x, weight, 16, 16, actual_seq_len=[18])
    if rank == 2:  # before it communicates: the others need not be there
        with pytest.raises(RuntimeError, match="input must have the 5 rows of rank 2 of 4, got 4"):
            call(x, weight, 16, 16, actual_seq_len=[20])


def check_autocast(rank):
    one = SPLITS[4]["ranks shorter than a block"]
    case = replace(one.case, dtype=torch.float32)
    x, weight, dy = case.inputs
    local = x[one.slice(rank)].requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = parallel(one, None)(*local)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, whole(case)(x.bfloat16(), weight.bfloat16())[one.windows_of(rank)])
    grads = torch.autograd.grad(y, local, dy[one.windows_of(rank)].bfloat16())
    assert [g.dtype for g in grads] == [torch.float32] * 2


def check_gathered(rank):
    """As docs/context_parallel.md does it. Here each rank's loss has all windows, so that their gradients add up."""
    one = SPLITS[4]["ranks shorter than a block"]
    case = replace(one.case, dtype=torch.float64)
    x, weight, dy = case.inputs
    y = parallel(one, None)(x[one.slice(rank)].requires_grad_(), weight)
    counts = one.counts()
    padded = torch.nn.functional.pad(y, (0, 0, 0, 0, 0, max(counts) - len(y)))
    name = "all_gather_single_autograd"  # in torch 2.13, which warns of the older name
    all_gather = getattr(collectives, name, None) or collectives.all_gather_tensor_autograd
    parts = all_gather(padded, 0, dist.group.WORLD).split(max(counts))
    gathered = torch.cat([part[:n] for part, n in zip(parts, counts)])
    assert torch.equal(gathered, whole(case)(x, weight))
    (dy_of_all,) = torch.autograd.grad(gathered, y, dy)
    assert torch.equal(dy_of_all, len(one.rows) * dy[one.windows_of(rank)])


def test_compiled(tmp_path):
    start(compiled, 3, tmp_path)


def compiled(rank, world, folder):
    with ranks(rank, world, folder):
        warnings.simplefilter("default")  # Inductor's own
        inductor.compile_threads = 1  # no pool of processes for one small graph
        for name, backend in (
            ("no row between two ranks", "aot_eager"),
            ("two ranks exchange", "inductor"),  # and the third has nothing to send, and must not leave it out
        ):
            one = SPLITS[world][name]
            torch._dynamo.reset()
            function = torch.compile(call, fullgraph=True, backend=backend)
            check(replace(one, case=replace(one.case, dtype=torch.float32)), None, function)


@pytest.fixture
def alone():
    """This process is the only rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


LEGAL = {
    "input": torch.ones(48, 2, 16),
    "weight": torch.ones(32, 2),
    "compress_block_size": 32,
    "compress_stride": 16,
    "actual_seq_len": [48],
}
OF_THE_CONTRACT = {
    "input is no tensor": {"input": [1.0]},
    "dtypes differ": {"weight": torch.ones(32, 2).half()},
    "integers": {"input": torch.ones(48, 2, 16, dtype=torch.int32), "weight": torch.ones(32, 2, dtype=torch.int32)},
    "rank of input": {"input": torch.ones(48, 32)},
    "rank of weight": {"weight": torch.ones(32)},
    "block is no int": {"compress_block_size": 32.0},
    "block is not the weight's": {"compress_block_size": 48},
    "N": {"input": torch.ones(48, 3, 16)},
    "D": {"input": torch.ones(48, 2, 24)},
    "stride": {"compress_stride": 48},
    "no sequence": {"actual_seq_len": 48},
    "rank of lengths": {"actual_seq_len": torch.tensor([[48]])},
    "lengths without a rank": {"actual_seq_len": torch.tensor(48)},
    "lengths on a device": {"actual_seq_len": torch.tensor([48], device="meta")},
    "empty": {"actual_seq_len": []},
    "element is no int": {"actual_seq_len": [48.0]},
    "bool": {"actual_seq_len": [True]},
    "decreasing": {"actual_seq_len": [32, 16, 48]},
    "leading zero": {"actual_seq_len": [0, 48]},
    "only zeros": {"actual_seq_len": [0]},
    "negative": {"actual_seq_len": [-48]},
    "devices": {"weight": torch.ones(32, 2, device="meta")},
}


@pytest.mark.parametrize("name", OF_THE_CONTRACT)
def test_errors_of_the_contract(alone, name):
    """The same exception and the same words as from the op; from the public function where the dispatcher checks."""
    arguments = LEGAL | OF_THE_CONTRACT[name]
    lengths = arguments["actual_seq_len"]
    function = getattr(torch.ops.nsa.nsa_compress, "offsets" if torch.is_tensor(lengths) else "default")
    if name in ("input is no tensor", "block is no int", "no sequence", "element is no int", "bool"):
        function = nsa.nsa_compress
        arguments = {key: value.half() if torch.is_tensor(value) else value for key, value in arguments.items()}
    with pytest.raises((TypeError, RuntimeError)) as expected:
        function(**arguments)
    with pytest.raises(expected.type) as got:
        call(**arguments)
    assert str(got.value) == str(expected.value)


ERRORS = {
    "rows_per_rank is no sequence": ({"rows_per_rank": 48}, TypeError, "tuple or list of ints, got int"),
    "rows_per_rank has a float": ({"rows_per_rank": [48.0]}, TypeError, "got an element of type float"),
    "rows_per_rank has a bool": ({"rows_per_rank": [True]}, TypeError, "got an element of type bool"),
    "rows_per_rank is negative": ({"rows_per_rank": [-1, 49]}, RuntimeError, "must not be negative, got -1"),
    "rows do not add up": ({"rows_per_rank": [40]}, RuntimeError, "add up to T = actual_seq_len[-1] = 48, got 40"),
    "another number of ranks": ({"rows_per_rank": [40, 8]}, RuntimeError, "each of the 1 ranks, got 2"),
    "another T": ({"actual_seq_len": [40]}, RuntimeError, "input must have the 40 rows of rank 0 of 1, got 48"),
    "no group": ({"group": "cp"}, TypeError, "group must be a ProcessGroup or None, got str"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(alone, name):
    arguments, kind, message = ERRORS[name]
    with pytest.raises(kind, match=re.escape(message)):
        call(**LEGAL | arguments)


def test_not_initialised():
    with pytest.raises(RuntimeError, match=r"torch\.distributed must be initialised"):
        call(**LEGAL)


@pytest.mark.parametrize("ends", [[np.int64(48)], np.array([48]), torch.tensor([48])])
def test_numpy_integers_arrays_and_tensors(alone, ends):
    arguments = {"actual_seq_len": ends, "rows_per_rank": [np.int64(48)]}
    sizes = {"compress_block_size": np.int64(32), "compress_stride": np.int64(16)}
    assert torch.equal(call(**LEGAL | sizes | arguments), call(**LEGAL))
    assert windows_per_rank(**sizes, **arguments) == [2]


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (([48], "32", 16, [48]), TypeError, "compress_block_size must be an int, got str"),
        (([48], 40, 16, [48]), RuntimeError, "compress_block_size must be a multiple of 16, got 40"),
        (([48], 32, 16, [48, 40]), RuntimeError, "actual_seq_len must be non-decreasing"),
        (([48], 32, 16, [50]), RuntimeError, "rows_per_rank must add up to T = actual_seq_len[-1] = 50, got 48"),
    ],
)
def test_errors_of_windows_per_rank(arguments, kind, message):
    *positional, ends = arguments
    with pytest.raises(kind, match=re.escape(message)):
        windows_per_rank(*positional, actual_seq_len=ends)


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True), (False, False)])
def test_each_gradient_only_if_needed(alone, wanted):
    tensors = [LEGAL[name].clone().requires_grad_(is_wanted) for name, is_wanted in zip(("input", "weight"), wanted)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        y = call(*tensors, 32, 16, actual_seq_len=[48])
    assert y.requires_grad == any(wanted)
    if any(wanted):
        y.sum().backward()
    assert tuple(t.grad is not None for t in tensors) == wanted
    assert (LEGAL["input"].shape in saved, LEGAL["weight"].shape in saved) == (wanted[1], wanted[0])
