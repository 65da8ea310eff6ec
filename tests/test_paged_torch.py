"""The ops for decode and prefill in PyTorch: opcheck, compilers, no gradients, autocast."""

from unittest import mock

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad

import nsa
from nsa import cpu

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # PyTorch's own, in forward mode and compilers
OPS = [torch.ops.nsa.nsa_compress_infer, torch.ops.nsa.nsa_compress_append]


def arguments(op, dtype=torch.float32):
    """Of a call of one of the OPS that writes two rows."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(s, generator=generator).to(dtype) for s in ((5, 16, 2, 16), (32, 2)))
    table, slots = torch.tensor([[4, 1, 0], [2, 3, 0]], dtype=torch.int32), torch.tensor([2, 0], dtype=torch.int32)
    sizes = (32, 16, 16)
    if op is OPS[0]:
        lengths = {"actual_seq_len": [48, 32]}
        return (x, weight, slots, *sizes), {
            "block_table": table,
            **lengths,
            "cache": torch.zeros(3, 2, 16, dtype=dtype),
        }
    before, after = torch.tensor([40, 0]), torch.tensor([48, 47])
    lengths = {"seq_len_before": before, "seq_len_after": after}
    cache = torch.zeros(3, 2, 2, 16, dtype=dtype)
    return (x, weight, slots[:, None], *sizes), {"block_table": table, **lengths, "cache": cache}


@pytest.fixture(params=OPS, ids=str)
def op(request):
    return request.param


def test_opcheck(op):
    inner = getattr(torch.ops.nsa, op.__name__.replace("nsa_compress", "_compress"))
    for each in (op, inner):
        args, kwargs = arguments(op)
        torch.library.opcheck(each.default, args, kwargs)
        if op is OPS[0]:
            kwargs["actual_seq_len"] = torch.tensor(kwargs["actual_seq_len"])
            torch.library.opcheck(each.lengths, args, kwargs)


def expected(op, dtype=torch.float32):
    args, kwargs = arguments(op, dtype)
    return op(*args, **kwargs)


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_in_place_and_functional(op, dynamic):
    """The caller's cache is written; and a clone, which no one sees, is not lost."""

    def step(args, kwargs):
        own = kwargs["cache"].clone()
        op(*args, **(kwargs | {"cache": own}))
        written = op(*args, **kwargs)
        return own * 2, written + 1

    args, kwargs = arguments(op)
    doubled, more = torch.compile(step, fullgraph=True, dynamic=dynamic)(args, kwargs)
    assert kwargs["cache"].any()
    assert torch.equal(kwargs["cache"], expected(op))
    assert torch.equal(doubled, 2 * expected(op))
    assert torch.equal(more, expected(op) + 1)


def test_compiled_on_parts_of_a_pool():
    """Keys and values in one tensor, as engines have them: a view of it is written, and so the pool is."""

    def step(pool, cache, slots, table):
        for i in (0, 1):
            lengths = {"actual_seq_len": [48, 32], "cache": cache[i].flatten(0, 1)}
            OPS[0](pool[:, i], weight, slots, 32, 16, 16, block_table=table, **lengths)
        return cache + 0

    (x, weight, slots, *_), kwargs = arguments(OPS[0])
    pool, caches = torch.stack([x, 2 * x], 1), [torch.zeros(2, 3, 2, 2, 16) for _ in range(2)]
    copy = torch.compile(step, fullgraph=True)(pool, caches[0], slots, kwargs["block_table"])
    assert torch.equal(copy, step(pool, caches[1], slots, kwargs["block_table"]))
    assert torch.equal(caches[0], caches[1])
    assert caches[0][1].any()


def test_compiled_once_for_all_lengths():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    args, kwargs = arguments(OPS[0])

    @torch.compile(fullgraph=True, backend=backend)
    def step(lengths):
        return nsa.nsa_compress_infer(*args, **(kwargs | {"actual_seq_len": lengths}))

    for lengths in ([48, 32], [33, 40], [34, 41], [35, 42], [47, 48]):
        step(lengths)
    assert len(graphs) == 2  # the second has lengths that change


def test_compiled_once_for_all_batches_with_lengths_in_a_tensor():
    counter = CompileCounter()

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def step(x, slots, table, lengths, cache):
        return nsa.nsa_compress_infer(
            x, weight, slots, 32, 16, 16, block_table=table, actual_seq_len=lengths, cache=cache
        )

    (x, weight, slots, *_), kwargs = arguments(OPS[0])
    table = kwargs["block_table"]
    for copies in (2, 3, 5):  # of sequence 1, whose pages others may share
        more = torch.cat([table, table[1:].expand(copies, 3)])
        lengths = torch.tensor([48, 32] + [33] * copies)
        cache = torch.zeros(3, 2, 16)
        step(x, torch.cat([slots, slots.new_full((copies,), -1)]), more, lengths, cache)
        assert torch.equal(cache, expected(OPS[0]))
    assert counter.frame_count == 1


def test_functional_within_the_compiler(op):
    """The op that has no results is made functional; the graph writes the caller's cache in the end."""
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph)

    def step(args, kwargs):
        return op(*args, **kwargs)

    args, kwargs = arguments(op)
    result = torch.compile(step, fullgraph=True, backend=aot_autograd(fw_compiler=keep))(args, kwargs)
    assert torch.equal(kwargs["cache"], expected(op))
    assert torch.equal(result, expected(op))
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert called[0].startswith("auto_functionalized")
    assert not any(name.startswith("nsa.") for name in called)


def test_exported(op):
    class Step(torch.nn.Module):
        def forward(self, args, kwargs):
            return op(*args, **kwargs) + 0

    args, kwargs = arguments(op)
    with torch.no_grad():
        program = torch.export.export(Step(), (args, kwargs))
    args, kwargs = arguments(op)
    assert torch.equal(program.module()(args, kwargs), expected(op))
    assert torch.equal(kwargs["cache"], expected(op))


@pytest.mark.parametrize("name", ["input", "weight", "cache"])
def test_what_needs_a_gradient_is_an_error(op, name):
    args, kwargs = arguments(op)
    tensors = {"input": args[0], "weight": args[1], "cache": kwargs["cache"]}
    tensors[name].requires_grad_()
    with pytest.raises(RuntimeError, match=f"{name} must not need a gradient.*torch.no_grad"):
        op(*args, **kwargs)
    assert not kwargs["cache"].any()
    with torch.no_grad():
        assert torch.equal(op(*args, **kwargs), expected(op))


@pytest.fixture(params=["native", "operators"])
def backend(request):
    with mock.patch.object(cpu, "_backend", return_value=getattr(cpu, request.param)):
        yield


@pytest.mark.parametrize("name", ["input", "weight", "cache"])
def test_what_has_a_tangent_is_an_error(op, name):
    args, kwargs = arguments(op)
    places = {"input": (args := list(args), 0), "weight": (args, 1), "cache": (kwargs, "cache")}
    holder, key = places[name]
    with forward_ad.dual_level():
        op(*args, **kwargs)  # nothing has one
        kwargs["cache"].zero_()
        holder[key] = forward_ad.make_dual(holder[key], torch.ones_like(holder[key]))
        with pytest.raises(RuntimeError, match=f"{name} must not need a gradient"):
            op(*args, **kwargs)
        assert not kwargs["cache"].any()


def test_torch_func_is_an_error(op):
    args, kwargs = arguments(op)

    def total(weight):
        return op(args[0], weight, *args[2:], **(kwargs | {"cache": torch.zeros_like(kwargs["cache"])})).sum()

    for transform in (torch.func.grad, torch.func.jacfwd, torch.func.jacrev):
        with pytest.raises(RuntimeError, match="weight must not need a gradient"):
            transform(total)(args[1])


@pytest.mark.usefixtures("backend")
def test_inference_mode(op):
    with torch.inference_mode():
        args, kwargs = arguments(op)
        assert torch.equal(op(*args, **kwargs), expected(op))
        kwargs["cache"].zero_()
    assert torch.equal(op(*args, **kwargs), expected(op))  # tensors that were made there, outside


@pytest.mark.usefixtures("backend")
def test_a_call_that_fails_changes_nothing(op):
    args, kwargs = arguments(op)
    with pytest.raises(RuntimeError, match="block_table must hold pages"):
        op(*args, **(kwargs | {"block_table": kwargs["block_table"] + 7}))
    assert kwargs["cache"]._version == 0
    op(*args, **kwargs)
    assert kwargs["cache"]._version == 1


def test_a_gradient_that_needs_the_old_cache_notices(op):
    args, kwargs = arguments(op)
    scale = torch.ones_like(kwargs["cache"], requires_grad=True)
    loss = (kwargs["cache"] * scale).sum()
    op(*args, **kwargs)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autocast_casts_the_weight_alone(op):
    args, kwargs = arguments(op, torch.bfloat16)
    wide = args[1].float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        op(args[0], wide, *args[2:], **kwargs)
    assert torch.equal(kwargs["cache"], expected(op, torch.bfloat16))
    with pytest.raises(TypeError, match="same dtype"):
        op(args[0], wide, *args[2:], **kwargs)


def test_meta_tensors(op):
    args, kwargs = arguments(op)
    args = [arg.to("meta") if isinstance(arg, torch.Tensor) else arg for arg in args]
    kwargs = {name: arg.to("meta") if isinstance(arg, torch.Tensor) else arg for name, arg in kwargs.items()}
    assert op(*args, **kwargs) is kwargs["cache"]
