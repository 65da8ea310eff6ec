"""Which placements of DTensors the three ops take, and what is redistributed to come by them.

Each op makes a result of a (rows, N, D) and b, which is a weight (block, N) or again (rows, N, D). On each dimension of
the mesh it takes:

    replicated  all three
    heads       all three sharded by heads: no head knows of another
    elements    of a head: sharded where they are; a weight is replicated, and the gradient of a weight, which is a sum
                over elements, comes out as partial sums
    partial     sums, or averages, in a or in b, and so in the result, with the other replicated: the ops are bilinear

A shard of heads needs a head on every rank, a shard of elements a multiple of 16 of them. Rows cannot be sharded, as
windows lie across the borders of shards. What does not fit is redistributed, with the least traffic that makes it fit;
which that is depends on placements, N and D alone, never on lengths. Partial sums are rounded before they are added up.

PyTorch's `register_sharding` would not do: DTensor then keeps the shape of a result for all calls with the same shapes
and integers, and looks at no list, while the number of windows depends on `actual_seq_len`.

This module imports torch.distributed.tensor, which takes seconds: it is for programs that have imported that already.
"""

from functools import cache, lru_cache
from itertools import product
from math import inf, prod

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from .contract import GRANULE

WHOLE, HEADS, ELEMENTS = Replicate(), Shard(1), Shard(2)

# placements of a, b and the result on one mesh dimension, by the rank of b; of equally cheap ones the first is taken
TAKEN = {
    2: ((WHOLE, WHOLE, WHOLE), (HEADS, HEADS, HEADS), (ELEMENTS, WHOLE, ELEMENTS)),
    3: ((WHOLE, WHOLE, WHOLE), (HEADS, HEADS, HEADS), (ELEMENTS, ELEMENTS, Partial("sum"))),
}


@cache
def register():
    """Give every overload of the three ops its rule."""
    for name in ("nsa_compress", "nsa_compress_grad_input", "nsa_compress_grad_weight"):
        packet = getattr(torch.ops.nsa, name)
        for overload in packet.overloads():
            torch.library.register_torch_dispatch(getattr(packet, overload), DTensor, _rule)


def _rule(cls, op, types, args, kwargs):
    """`op` of DTensors: redistribute, call it on what lies on this rank, and say where the result lies."""
    a, b, *geometry = args
    if any(isinstance(argument, DTensor) for argument in geometry):
        raise RuntimeError(
            "actual_seq_len must be a list of ints or a plain CPU tensor, got a DTensor: call .to_local()"
        )
    _check(op, a, b)
    mesh = a.device_mesh
    _, n, d = a.shape
    *wanted, placements = choose(b.ndim, a.placements, b.placements, tuple(mesh.shape), int(n), int(d))
    with torch.no_grad():  # gradients are those of the op on DTensors
        a_local, b_local = map(_redistributed, (a, b), wanted)
        if mesh.get_coordinate() is None:  # a rank outside the mesh has no elements, and knows the shape
            whole = (torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for tensor in (a, b))
            local, n_rows = a_local, len(op(*whole, *geometry, **kwargs))
        else:
            local = op(a_local, b_local, *geometry, **kwargs)
            n_rows = local.shape[0]  # the result's first dimension is never sharded
        shape = torch.Size((n_rows, n, d) if b.ndim == 2 else (n_rows, n))
        strides = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
        return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=strides)


def _redistributed(tensor, wanted):
    """What lies on this rank of `tensor` with the placements `wanted`."""
    local, mesh, now = tensor.to_local(), tensor.device_mesh, tensor.placements
    if now == wanted:
        return local
    # on a mesh dimension where it stays partial nothing is to be done, as if it stayed replicated there; PyTorch before
    # 2.10 redistributes to nothing that is partial
    now, wanted = zip(*((WHOLE, WHOLE) if isinstance(then, Partial) else (p, then) for p, then in zip(now, wanted)))
    whole = DTensor.from_local(local, mesh, now, run_check=False, shape=tensor.shape, stride=tensor.stride())
    return whole.redistribute(mesh, wanted).to_local()


def _check(op, a, b):
    """Raise what the op on local tensors would not, or would on some ranks only while the others wait for them."""
    names = [argument.name for argument in op._schema.arguments[:2]]
    both = " and ".join(names)
    for name, tensor in zip(names, (a, b)):
        if not isinstance(tensor, DTensor):
            raise RuntimeError(
                f"{both} must both be DTensors or both be none, got a {type(tensor).__name__} for {name}: "
                "torch.distributed.tensor.distribute_tensor makes a DTensor of it"
            )
    if a.device_mesh != b.device_mesh:
        raise RuntimeError(f"{both} must be on the same DeviceMesh, got {a.device_mesh} and {b.device_mesh}")
    rank, layout = (2, "(block, N)") if names[1] == "weight" else (3, "(rows, N, D)")
    if (a.ndim, b.ndim) != (3, rank) or a.shape[1:rank] != b.shape[1:]:
        raise RuntimeError(
            f"{both} must have shapes (rows, N, D) and {layout}, with the same N and D, "
            f"got {tuple(a.shape)} and {tuple(b.shape)}"
        )


@lru_cache(1024)
def choose(rank_b, placements_a, placements_b, mesh_sizes, n, d):
    """The cheapest placements of a, b and the result for tensors with those placements, each as a tuple.

    Args:
        rank_b: 2 where b is a weight, 3 where it has rows.
        placements_a, placements_b: a placement for each dimension of the mesh.
        mesh_sizes: ranks along each dimension of the mesh.
        n, d: heads, and elements of a head.
    """
    present = list(zip(placements_a, placements_b))
    size_b = 0.001 if rank_b == 2 else 1  # where a has 1; the number of rows must not make a difference

    def traffic(choice):
        return sum(
            _traffic(now_a, to_a) + size_b * _traffic(now_b, to_b)
            for (now_a, now_b), (to_a, to_b, _) in zip(present, choice)
        )

    options = [(*TAKEN[rank_b], *_linear(*now)) for now in present]
    legal = [choice for choice in product(*options) if _is_legal(choice, mesh_sizes, n, d)]
    return tuple(zip(*min(legal, key=traffic)))


def _linear(placement_a, placement_b):
    """What the ops take besides because they are linear in a and in b."""
    if _is_linear(placement_a):
        yield placement_a, WHOLE, placement_a
    if _is_linear(placement_b):
        yield WHOLE, placement_b, placement_b


def _is_linear(placement):
    return type(placement) is Partial and placement.reduce_op in ("sum", "avg")


def _is_legal(choice, mesh_sizes, n, d):
    """Whether every rank gets a head, and as many elements of it as the ops take."""
    heads, elements = (
        [size for size, (placement_a, *_) in zip(mesh_sizes, choice) if placement_a == kind]
        for kind in (HEADS, ELEMENTS)
    )
    return (not heads or 0 not in _shard_sizes(n, heads)) and (not elements or d % (GRANULE * prod(elements)) == 0)


def _shard_sizes(size, counts):
    """The sizes of the shards when `size` is cut along mesh dimensions of counts[0], counts[1], ... ranks.

    All shards of one cut are as large as the first, until nothing is left: 5 heads on 4 ranks are 2, 2, 1 and 0.
    """
    sizes = {size}
    for count in counts:
        sizes = {
            max(0, min(full, whole - i * full))
            for whole in sizes
            for full in (-(-whole // count),)
            for i in range(count)
        }
    return sizes


def _traffic(now, then):
    """Roughly what a redistribution moves, in halves of the tensor; it is only compared."""
    if type(now) is Replicate or (type(now) is type(then) and now == then):
        return 0
    if then == WHOLE:
        return 2 if type(now) is Shard else 4
    if type(now) is Partial and now.reduce_op == "sum":
        return 2
    # anything else only as a whole: with gloo, PyTorch 2.7 scatters sums of what is to be averaged or compared
    return 1 if type(now) is Shard else inf
