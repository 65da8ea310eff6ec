"""One of several processes that compute on DTensors what one process computes alone: python ranks.py RANK RANKS STORE.

Placements are words, one for each dimension of the mesh: R is replicated, S0, S1 and S2 are sharded by rows, heads and
elements, sum, avg and max are partial. A rank that fails ends, and with that the others, which wait for it.
"""

import sys
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

if sys.argv[1] == "0":  # on the other ranks the package comes first
    import torch.distributed.tensor

from cases import Case
from tolerance import assert_close

import nsa

# isort: split
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

compress = torch.ops.nsa.nsa_compress
PARTIAL = ("sum", "avg", "max")
WORDS = {"R": Replicate()} | {f"S{i}": Shard(i) for i in range(3)} | {word: Partial(word) for word in PARTIAL}

# N, D, the placements of x, weight and dy, and those of y, dx and dw
LINE = [  # on any number of ranks
    (4, 64, "R, R, R", "R, R, R"),
    (4, 64, "S1, S1, S1", "S1, S1, S1"),
    (7, 64, "S1, S1, S1", "S1, S1, S1"),  # 2, 2, 2 and 1 heads, or 4 and 3
    (4, 64, "S1, R, S1", "S1, S1, S1"),
    (4, 64, "R, S1, R", "S1, S1, R"),
    (4, 64, "S2, R, S2", "S2, S2, sum"),
    (4, 64, "S2, S1, S2", "S2, S2, sum"),  # the weight is the smaller of two that do not go together
    (4, 64, "S2, R, S1", "S2, S1, S1"),
    (4, 64, "S0, R, S0", "S1, S1, S1"),
    (4, 64, "S0, S0, S0", "S1, S1, S1"),
    (1, 64, "S0, R, S0", "S2, S2, sum"),  # no rank may go without a head,
    (1, 64, "S1, S1, S1", "S2, S2, sum"),
    (1, 16, "S1, S1, S1", "R, R, R"),  # nor have other than a multiple of 16 elements of it
    (4, 48, "S2, R, S2", "S1, S1, S1"),
    (1, 48, "S2, R, S2", "R, R, R"),
    (4, 64, "sum, R, R", "sum, R, sum"),
    (4, 64, "R, sum, R", "sum, sum, R"),
    (4, 64, "R, R, sum", "R, sum, sum"),
    (4, 64, "sum, sum, R", "sum, sum, sum"),  # linear in one at a time: the weight is added up
    (4, 64, "sum, R, sum", "sum, sum, S1"),
    (4, 64, "sum, S1, S1", "sum, S1, S1"),
    (4, 64, "avg, R, R", "avg, R, avg"),
    (4, 64, "max, R, R", "R, R, R"),  # not linear
]
FOUR = [  # on four ranks
    (2, 64, "S1, S1, S1", "S2, S2, sum"),
    (5, 64, "S1, S1, S1", "S2, S2, sum"),  # 2, 2, 1 and 0 heads
    (5, 32, "S1, S1, S1", "R, R, R"),
]
SQUARE = [  # on two by two
    (3, 32, "S1 S2, S1 R, S1 S2", "S1 S2, S1 S2, S1 sum"),
    (5, 32, "S1 S1, S1 S1, S1 S1", "S1 S1, S1 S1, S1 S1"),  # 3 heads are 2 and 1, 2 are 1 and 1
    (3, 32, "S1 S1, S1 S1, S1 S1", "S1 S2, S1 S2, S1 sum"),  # 1 head is 1 and 0
    (4, 64, "S2 S2, R R, S2 S2", "S2 S2, S2 S2, sum sum"),
    (4, 32, "S2 S2, R R, S2 S2", "S1 S2, S1 S2, S1 sum"),
    (4, 32, "S0 S1, R S1, S0 S1", "S1 S1, S1 S1, S1 S1"),
    (4, 32, "sum S1, R S1, R S1", "sum S1, R S1, sum S1"),
    (4, 32, "R sum, sum R, R R", "sum sum, sum R, R sum"),
]


def placements(words):
    return tuple(WORDS[word] for word in words.split())


def whole_numbers(*shape, seed, dtype=torch.float32):
    """So small that no sum of products is rounded, in whatever order it is made."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def distribute(tensor, mesh, words):
    """A DTensor of `tensor`, which all ranks have; where it is partial, each rank has another part."""
    wanted = placements(words)
    for dim, place in enumerate(wanted):
        if isinstance(place, Partial):
            parts = [whole_numbers(*tensor.shape, seed=seed) for seed in range(mesh.size(dim) - 1)]
            if place.reduce_op == "sum":
                parts = [*parts, tensor - sum(parts)]
            elif place.reduce_op == "avg":
                parts = [*(tensor + part for part in parts), tensor - sum(parts)]
            else:
                parts = [*(tensor - part.abs() for part in parts), tensor]
            tensor = parts[mesh.get_local_rank(dim)]
    shards = [Replicate() if isinstance(place, Partial) else place for place in wanted]
    local = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False).redistribute(mesh, shards)
    return DTensor.from_local(
        local.to_local(), mesh, wanted, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def whole(tensor):
    """The full tensor, also of averages, which gloo does not make in PyTorch 2.7."""
    mesh, average = tensor.device_mesh, WORDS["avg"]
    sums = [WORDS["sum"] if place == average else place for place in tensor.placements]
    n_ranks = torch.Size(size for size, place in zip(mesh.shape, tensor.placements) if place == average).numel()
    shape = {"shape": tensor.shape, "stride": tensor.stride()}
    return DTensor.from_local(tensor.to_local(), mesh, sums, run_check=False, **shape).full_tensor() / n_ranks


def results(x, weight, dy, case, form=list):
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = compress(x, weight, *case.geometry, actual_seq_len=form(case.actual_seq_len))
    return y.detach(), *torch.autograd.grad(y, (x, weight), dy)


def check(mesh, n, d, inputs, expected):
    partial = any(word in inputs for word in PARTIAL)
    case = Case((70, 3, 50), 32, 16, n, d, torch.float32 if partial else torch.bfloat16)
    if partial:
        case = case.with_inputs(*(whole_numbers(*t.shape, seed=9 + i) for i, t in enumerate(case.inputs)))
    distributed = [distribute(t, mesh, words) for t, words in zip(case.inputs, inputs.split(", "))]
    alone = results(*case.inputs, case)
    for what, result, single, words in zip(("y", "dx", "dw"), results(*distributed, case), alone, expected.split(", ")):
        assert result.placements == placements(words), f"{what} is {result.placements}, expected {words}"
        assert (result.shape, result.stride()) == (single.shape, single.stride())
        if "sum" in words and not partial:  # dw of shards of elements
            n_parts = torch.Size(size for size, word in zip(mesh.shape, words.split()) if word == "sum").numel()
            terms = case.n_windows * case.d // n_parts
            assert_close(whole(result), case.exact[2], case.magnitude[2], terms, parts=n_parts)
        else:
            assert torch.equal(whole(result), single), what


def check_nothing_is_sent(mesh, inputs):
    case = Case((70, 50), 32, 16, 4, 64, torch.float32)
    x, weight, dy = (distribute(t, mesh, words) for t, words in zip(case.inputs, inputs.split(", ")))
    with CommDebugMode() as sent:
        results(x, weight, dy, case)
    assert sent.get_total_counts() == 0


def check_lengths(mesh):
    """With the same shapes, other lengths make other results, of other shapes; the last ones make none."""
    for lengths in ((96,), (48, 48), (10, 10, 76), (30, 30, 30, 6), (96,)):
        case = Case(lengths, 32, 16, 4, 32)
        distributed = [distribute(t, mesh, "S1") for t in case.inputs]
        for form in (list, torch.tensor):
            for result, single in zip(results(*distributed, case, form), results(*case.inputs, case)):
                assert result.shape == single.shape
                assert torch.equal(result.full_tensor(), single)
        with torch.inference_mode():
            y = nsa.nsa_compress(*distributed[:2], *case.geometry, actual_seq_len=case.actual_seq_len)
            assert y.shape == (case.n_windows, 4, 32)
            assert y.placements == placements("S1")


def check_second_gradients(mesh, inputs):
    case = Case((70, 50), 32, 16, 4, 64, torch.float32)
    whole = [whole_numbers(*t.shape, seed=i) for i, t in enumerate(case.inputs)]

    def second(x, weight, dy, gx, gw):
        wanted = [t.detach().requires_grad_() for t in (x, weight, dy)]
        y = compress(*wanted[:2], *case.geometry, actual_seq_len=case.actual_seq_len)
        first = torch.autograd.grad(y, wanted[:2], wanted[2], create_graph=True)
        return torch.autograd.grad(first, wanted, (gx, gw))

    alone = second(*whole, *whole[:2])
    x, weight, dy = (distribute(t, mesh, words) for t, words in zip(whole, inputs.split(", ")))
    for result, single in zip(second(x, weight, dy, x, weight), alone):
        assert torch.equal(result.full_tensor(), single)


def check_errors(mesh):
    x, weight = torch.zeros(64, 4, 32), torch.zeros(32, 4)
    other_mesh = init_device_mesh("cpu", (1, mesh.size()))
    sharded = [distribute(t, mesh, "S1") for t in (x, weight)]
    for a, b, message in (
        (sharded[0], weight, "input and weight must both be DTensors or both be none, got a Tensor for weight"),
        (x, sharded[1], "got a Tensor for input"),
        (sharded[0], distribute(weight, other_mesh, "R S1"), "must be on the same DeviceMesh, got .* and "),
        (sharded[0], distribute(torch.zeros(32, 3), mesh, "S1"), r"same N and D, got \(64, 4, 32\) and \(32, 3\)"),
        (sharded[0], sharded[0], r"\(rows, N, D\) and \(block, N\), .* got \(64, 4, 32\) and \(64, 4, 32\)"),
        (sharded[1], sharded[1], r"got \(32, 4\) and \(32, 4\)"),
        (distribute(x[..., :24], mesh, "S2"), sharded[1], "D must be a positive multiple of 16, got 24"),
    ):
        with pytest.raises(RuntimeError, match=message):
            compress(a, b, 32, 16, actual_seq_len=[64])
    with pytest.raises(
        RuntimeError, match="actual_seq_len must be a list of ints or a plain CPU tensor, got a DTensor"
    ):
        compress(*sharded, 32, 16, actual_seq_len=distribute(torch.tensor([64]), mesh, "R"))
    dy = distribute(torch.zeros(3, 4, 16), mesh, "S1")
    with pytest.raises(RuntimeError, match=r"grad_output and input must have .* got \(3, 4, 16\) and \(64, 4, 32\)"):
        torch.ops.nsa.nsa_compress_grad_weight(dy, sharded[0], 32, 16, actual_seq_len=[64])


def check_ranks_outside_the_mesh():
    mesh = DeviceMesh("cpu", [1, 3])
    case = Case((70, 50), 32, 16, 3, 32)
    x, weight, dy = (distribute_tensor(t, mesh, [place]) for t, place in zip(case.inputs, placements("S0 R S1")))
    for result, single in zip(results(x, weight, dy, case), results(*case.inputs, case)):
        assert result.shape == single.shape
        if mesh.get_coordinate() is None:
            assert result.to_local().numel() == 0
        else:
            assert torch.equal(result.full_tensor(), single)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.expand = torch.nn.Linear(6, 4 * 16, bias=False, dtype=torch.float64)
        self.weight = torch.nn.Parameter(torch.empty(32, 4, dtype=torch.float64))
        self.project = torch.nn.Linear(4 * 16, 6, bias=False, dtype=torch.float64)
        with torch.no_grad():
            for seed, parameter in enumerate(self.parameters()):
                parameter.copy_(whole_numbers(*parameter.shape, seed=seed))

    def forward(self, rows, ends):
        heads = self.expand(rows).unflatten(1, (4, 16))
        return self.project(compress(heads, self.weight, 32, 16, actual_seq_len=ends).flatten(1)).square()


def step(model, data):
    """Of SGD; the losses, and the parameters after it. Nothing is rounded: numbers are whole, or have ten more bits."""
    losses = [model(whole_numbers(120, 6, seed=seed, dtype=torch.float64), [50, 120]).sum() for seed in data]
    (sum(losses) / len(losses)).backward()
    torch.optim.SGD(model.parameters(), lr=2**-10).step()
    parameters = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
    return [loss.item() for loss in losses], parameters


def tensor_parallel(model, mesh, weight):
    plan = {"expand": ColwiseParallel(use_local_output=False), "project": RowwiseParallel()}
    parallelize_module(model, mesh, plan)
    model.weight = torch.nn.Parameter(distribute_tensor(model.weight, mesh, placements(weight)))
    return model


def check_step(model, mesh):
    """Of a model that shares out its data among the ranks of `mesh`, or has the same on all where there is no mesh."""
    rank, n_ranks = (mesh.get_local_rank(), mesh.size()) if mesh else (0, 1)
    (loss,), parameters = step(model, [rank])
    losses, expected = step(Model(), range(n_ranks))
    before = dict(Model().named_parameters())
    assert loss == losses[rank]
    for name, parameter in parameters.items():
        assert torch.equal(parameter, expected[name]), name
        assert not torch.equal(parameter, before[name]), f"{name} has not changed"


def check_compiled(mesh):
    def function(x, weight, ends):
        return compress(2 * x, weight, 32, 16, actual_seq_len=ends).relu()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for words, ends in (("S1, S1", [40, 96]), ("S1, S1", [50, 96]), ("S1, S1", [30, 60]), ("S0, R", [40, 96])):
        x, weight = whole_numbers(ends[-1], 4, 32, seed=0), whole_numbers(32, 4, seed=1)
        inputs = [distribute(t, mesh, w).requires_grad_() for t, w in zip((x, weight), words.split(", "))]
        y, expected = compiled(*inputs, ends), function(*inputs, ends)
        assert y.placements == expected.placements
        assert torch.equal(y.full_tensor(), expected.full_tensor())
        for a, b in zip(*(torch.autograd.grad(out.sum(), inputs) for out in (y, expected))):
            assert torch.equal(a.full_tensor(), b.full_tensor())


def main(rank, n_ranks, store):
    # an exchange that a failed rank does not take part in ends after this time at the latest
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=n_ranks, timeout=timedelta(seconds=20)
    )
    line = init_device_mesh("cpu", (n_ranks,))
    checks = [(check, line, *row) for row in (LINE if n_ranks == 2 else LINE + FOUR)]
    checks += [(check_second_gradients, line, inputs) for inputs in ("S1, S1, S1", "S2, R, S2", "S0, sum, R")]
    checks += [(check_nothing_is_sent, line, i) for i in ("S1, S1, S1", "S1, R, S1", "S2, R, S2", "sum, R, R")]
    checks += [(check_lengths, line), (check_errors, line)]
    checks += [(check_step, tensor_parallel(Model(), line, weight), None) for weight in ("S1", "R")]
    checks += [(check_step, fully_shard(Model(), mesh=line), line)]
    if n_ranks == 2:
        checks.append((check_compiled, line))
    else:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "heads"))
        checks += [(check, square, *row) for row in SQUARE]
        checks += [(check_second_gradients, square, "S1 S2, S1 R, S1 S2"), (check_ranks_outside_the_mesh,)]
        both = fully_shard(tensor_parallel(Model(), square["heads"], "S1"), mesh=square["data"])
        checks += [(check_step, both, square["data"])]
    for function, *arguments in checks:
        try:
            function(*arguments)
        except BaseException:
            traceback.print_exc()
            sys.exit(f"rank {rank} of {n_ranks}: {function.__name__}{tuple(arguments)}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]), sys.argv[3])
