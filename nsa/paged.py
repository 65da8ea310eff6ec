"""Registration of the ops for decode and prefill, which write windows of sequences in pages to a cache:

    nsa::nsa_compress_infer   the newest window of each sequence, where it has just filled; lengths on the host, as a
                              list of ints or, in the overload `.lengths`, as an integer tensor on the CPU
    nsa::nsa_compress_append  every window that filled while sequences grew; lengths on the device

Both return the cache. PyTorch makes ops functional, as compilers want them, only if these return nothing that they
were given: so each calls one that returns nothing, `_compress_infer` or `_compress_append`, which has the
implementations. The public functions call those.
"""

from functools import partial

import torch

from . import accelerator, autocast, cpu
from .autograd import below
from .contract import PUBLIC_DTYPES, WIDE_DTYPES, check_device, check_layout, check_tensor
from .op import TAGS, library
from .paged_contract import (
    check_cache,
    check_index,
    check_lengths,
    check_no_gradient,
    check_own_memory,
    check_pages,
)
from .segments import check_ends_tensor, known_ends
from .tracing import untraced
from .transfer import Transfer

_SIZES = "int compress_block_size, int compress_stride, int page_block_size"
_INFER = f"Tensor input, Tensor weight, Tensor slot_mapping, {_SIZES}, *, Tensor? block_table=None, "
_SIGNATURES = {
    "infer": _INFER + "SymInt[]? actual_seq_len=None, Tensor(a!) cache",
    "infer.lengths": _INFER + "Tensor actual_seq_len, Tensor(a!) cache",
    "append": f"Tensor input, Tensor weight, Tensor cache_table, {_SIZES}, *, Tensor block_table, "
    "Tensor seq_len_before, Tensor seq_len_after, Tensor(a!) cache, SymInt? max_new_rows=None",
}


# The checks are the fake kernels too: there is nothing to return.


def _check_infer(input, weight, slot_mapping, block, stride, page, *, block_table=None, actual_seq_len=None, cache):
    _check_pages(input, weight, cache, block, stride, page)
    check_cache(cache, input, "(slots, N, D)")
    if actual_seq_len is None:
        raise TypeError("actual_seq_len must be a tuple or list of ints, the length of each sequence, got None")
    if isinstance(actual_seq_len, torch.Tensor):
        if actual_seq_len.device.type != "cpu":
            raise RuntimeError(
                f"actual_seq_len must be on the CPU, got a tensor on {actual_seq_len.device}: nsa_compress_append "
                "takes lengths on the device"
            )
        check_ends_tensor(actual_seq_len)
        batch = actual_seq_len.shape[0]  # len() would tie a compiled graph to it
    else:
        batch = len(actual_seq_len)
    check_index("slot_mapping", slot_mapping, "(batch,)", batch, input)
    if block_table is not None:
        check_index("block_table", block_table, "(batch, pages of a sequence)", batch, input)
    elif batch and input.shape[0] % batch:
        raise RuntimeError(
            f"block_table may be left out where each of the {batch} sequences has equally many pages, one behind the "
            f"other, got {input.shape[0]} pages"
        )


def _infer(backend, input, weight, slot_mapping, block, stride, page, *, block_table=None, actual_seq_len=None, cache):
    given = {"block_table": block_table, "actual_seq_len": actual_seq_len, "cache": cache}
    _check_infer(input, weight, slot_mapping, block, stride, page, **given)
    batch = len(actual_seq_len)
    if not batch:
        return
    check_own_memory(input=input, weight=weight, cache=cache, slot_mapping=slot_mapping)
    if block_table is None:
        width = input.shape[0] // batch
        block_table = torch.arange(input.shape[0], device=input.device, dtype=torch.int32).view(batch, width)
    check_own_memory(block_table=block_table)
    after = known_ends(actual_seq_len)
    check_lengths("actual_seq_len", after, block_table.shape[1] * page)
    is_due = (after >= block) & ((after - block) % stride == 0)
    if backend is accelerator:
        if torch.get_device_module(input.device).is_current_stream_capturing():
            raise RuntimeError(
                "nsa_compress_infer has lengths on the host, which a captured graph would repeat: capture "
                "nsa_compress_append, whose lengths are tensors on the device"
            )
        if not is_due.any():
            return
    before, after = _on_device([after - is_due, after], input.device)
    tables = (block_table.contiguous(), before, after, slot_mapping.contiguous())
    backend.append(input, weight.contiguous(), *tables, cache.unsqueeze(1), stride, most_windows=1)


def _check_append(
    input, weight, cache_table, block, stride, page,
    *, block_table, seq_len_before, seq_len_after, cache, max_new_rows=None,
):  # fmt: skip
    _check_pages(input, weight, cache, block, stride, page)
    check_cache(cache, input, "(pages, rows of a page, N, D)")
    check_index("block_table", block_table, "(batch, pages of a sequence)", None, input)
    batch = block_table.shape[0]
    check_index("cache_table", cache_table, "(batch, pages of a sequence in cache)", batch, input)
    check_index("seq_len_before", seq_len_before, "(batch,)", batch, input)
    check_index("seq_len_after", seq_len_after, "(batch,)", batch, input)
    if max_new_rows is not None and max_new_rows < 0:
        raise RuntimeError(f"max_new_rows must not be negative, got {max_new_rows}")


def _append(
    backend, input, weight, cache_table, block, stride, page,
    *, block_table, seq_len_before, seq_len_after, cache, max_new_rows=None,
):  # fmt: skip
    given = {"block_table": block_table, "seq_len_before": seq_len_before, "seq_len_after": seq_len_after}
    _check_append(input, weight, cache_table, block, stride, page, **given, cache=cache, max_new_rows=max_new_rows)
    if not len(block_table):
        return
    check_own_memory(input=input, weight=weight, cache_table=cache_table, **given, cache=cache)
    rows = block_table.shape[1] * page
    most_rows = rows if max_new_rows is None else min(max_new_rows, rows)
    tables = (tensor.contiguous() for tensor in (*given.values(), cache_table))
    # so many multiples of the stride lie among so many lengths
    backend.append(input, weight.contiguous(), *tables, cache, stride, most_windows=max(-(-most_rows // stride), 1))


def _check_pages(input, weight, cache, block, stride, page):
    check_tensor("input", input)
    dtypes = PUBLIC_DTYPES if input.device.type == "npu" else WIDE_DTYPES
    check_pages(input, weight, cache, block, stride, page, dtypes)
    check_device("input", input, "weight", weight)
    check_device("input", input, "cache", cache)


def _on_device(arrays, device):
    if device.type == "cpu":
        return map(torch.from_numpy, arrays)
    transfer = Transfer(arrays, device)
    transfer.use()
    return transfer.tensors


def _without_gradient(op, names):
    """The kernel of an op under the dispatch key Autograd."""

    def kernel(keyset, *args, **kwargs):
        given = dict(zip(names, args)) | kwargs
        tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
        for name, tensor in tensors.items():
            check_layout(name, tensor, advice="")
        check_no_gradient(tensors)
        below(keyset, op, *args, **kwargs)
        torch.autograd.graph.increment_version(kwargs["cache"])  # for who kept the old contents for a gradient

    return kernel


def _casting(op):
    """The kernel of an op under a dispatch key of autocast: fp32 parameters meet pages in half precision, which stay as
    they are."""

    def kernel(keyset, input, weight, *args, **kwargs):
        if isinstance(input, torch.Tensor) and isinstance(weight, torch.Tensor) and weight.is_floating_point():
            weight = weight.to(input.dtype)
        with autocast.no_autocast():
            return op.redispatch(keyset - autocast.ALL, input, weight, *args, **kwargs)

    return kernel


_BODIES = {
    "infer": (_infer, _check_infer),
    "infer.lengths": (_infer, _check_infer),
    "append": (_append, _check_append),
}
_BACKENDS = {"CPU": cpu, "CUDA": accelerator, "PrivateUse1": accelerator}


def _define(name):
    body, fake = _BODIES[name]
    inner, outer = f"_compress_{name}", f"nsa_compress_{name}"
    # lengths on the host change from step to step, which no captured graph can follow
    tags = [torch.Tag.pt2_compliant_tag] if name == "append" else TAGS
    library.define(f"{inner}({_SIGNATURES[name]}) -> ()", tags=tags)
    library.define(f"{outer}({_SIGNATURES[name]}) -> Tensor(a!)", tags=tags)
    packet, _, overload = inner.partition(".")
    op = getattr(getattr(torch.ops.nsa, packet), overload or "default")
    for key, backend in _BACKENDS.items():
        library.impl(inner, untraced(partial(body, backend)), key)
    torch.library.register_fake(f"nsa::{inner}", fake, lib=library)
    for key in autocast.KEYS:
        library.impl(inner, untraced(_casting(op)), key, with_keyset=True)
    names = [argument.name for argument in op._schema.arguments]
    library.impl(inner, untraced(_without_gradient(op, names)), "Autograd", with_keyset=True)

    def returning(*args, cache, **kwargs):
        op(*args, cache=cache, **kwargs)
        return cache

    library.impl(outer, returning, "CompositeImplicitAutograd")


for _name in _BODIES:
    _define(_name)
