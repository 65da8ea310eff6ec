"""The whole way on an emulated NPU: dispatch, autograd, table, launcher, and the kernels on the host driver."""

from unittest import mock

import pytest
import torch
from cases import NAMED, Case, cases
from growth import Engine, Growth, growths, spread
from hypothesis import given, settings
from tolerance import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

import nsa
from nsa import accelerator
from nsa.ascend.emulated import NpuTensor, emulate_npu
from nsa.ascend.host import HostDriver

emulate_npu()
HALF = (torch.float16, torch.bfloat16)


def run(case, x, weight, dy):
    x, weight = x.to("npu:0").requires_grad_(), weight.to("npu:0").requires_grad_()
    y = nsa.nsa_compress(x, weight, *case.geometry, actual_seq_len=case.actual_seq_len)
    y.backward(dy.to("npu:0"))
    for tensor in (y, x.grad, weight.grad):
        assert tensor.device == torch.device("npu:0")
    return y.detach().cpu(), x.grad.cpu(), weight.grad.cpu()


def check(case):
    results = run(case, *case.inputs)
    for computed, exact, magnitude, terms in zip(results, case.exact, case.magnitude, case.terms):
        assert computed.dtype == case.dtype
        assert_close(computed, exact, magnitude, terms)


@settings(max_examples=10)  # of the way through the op: the kernels' numbers are test_kernels.py's
@given(case=cases(HALF))
def test_generated(case):
    check(case)


@pytest.mark.parametrize("name", [name for name in NAMED if NAMED[name].dtype in HALF])
def test_named(name):
    check(NAMED[name])


def test_non_contiguous():
    case = Case((70, 50), 32, 16, 3, 48)
    x, weight, dy = (t.to("npu:0") for t in case.inputs)
    x = torch.stack([x, x], dim=-1).transpose(0, 1)[..., 0].transpose(0, 1)
    assert not x.is_contiguous()
    y = nsa.nsa_compress(x, weight.t().contiguous().t(), *case.geometry, actual_seq_len=case.actual_seq_len)
    assert_close(y.cpu(), case.exact[0], case.magnitude[0], case.terms[0])
    op = torch.ops.nsa.nsa_compress_grad_weight
    dw = op(dy.transpose(0, 2).contiguous().transpose(0, 2), x, *case.geometry, actual_seq_len=case.actual_seq_len)
    assert_close(dw.cpu(), case.exact[2], case.magnitude[2], case.terms[2])


def test_each_kernel_runs_on_its_kind_of_core(monkeypatch):
    """3 cube cores and 5 vector cores: no NPU has such a ratio, so neither can stand for the other."""
    grids = {}
    run_kernel = JITFunction.run

    def spy(kernel, *args, grid, **kwargs):
        grids[kernel.__name__] = grid
        return run_kernel(kernel, *args, grid=grid, **kwargs)

    cores = {"num_aicore": 3, "num_vectorcore": 5, "max_shared_mem": 1}
    monkeypatch.setattr(HostDriver, "get_device_properties", lambda self, device: cores)
    monkeypatch.setattr(JITFunction, "run", spy)
    accelerator.machine_of.cache_clear()
    check(Case((12000,), 128, 16, 3, 16))
    check(Case((4000,), 16, 16, 3, 16))
    accelerator.machine_of.cache_clear()
    assert grids == {
        **{f"{what}_vector_kernel": (5,) for what in ("forward", "grad_input", "grad_weight")},
        **{"forward_fused_kernel": (3,), "grad_input_fused_kernel": (3,)},
        **{"grad_weight_cube_kernel": (3,), "grad_weight_repair_kernel": (5,)},
    }


def test_no_window_launches_nothing():
    x, weight = torch.randn(5, 1, 16).half().to("npu:0"), torch.randn(16, 1).half().to("npu:0")
    with mock.patch.multiple(accelerator, forward=None, grad_input=None, grad_weight=None):
        y = nsa.nsa_compress(x.requires_grad_(), weight.requires_grad_(), 16, 16, actual_seq_len=[5])
        y.sum().backward()
    assert y.shape == (0, 1, 16)
    assert x.grad.cpu().eq(0).all()
    assert weight.grad.cpu().eq(0).all()


def test_an_npu_takes_no_fp32():
    x, weight = torch.randn(32, 1, 16).to("npu:0"), torch.randn(32, 1).to("npu:0")
    with pytest.raises(TypeError, match=r"must be one of torch.float16, torch.bfloat16, got torch.float32"):
        torch.ops.nsa.nsa_compress(x, weight, 32, 16, actual_seq_len=[32])


class Operators(TorchDispatchMode):
    """Writes down which operators run, those within this project's kernels too."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        if function.namespace == "nsa":
            with self:
                return function.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1), *args, **kwargs)
        return function(*args, **(kwargs or {}))


def on_npu(engine):
    """The engine's pages, tables and cache, there."""
    for name in ("pages", "table", "cache", "cache_table"):
        setattr(engine, name, getattr(engine, name).to("npu:0"))
    return engine.growth.weight.to("npu:0")


@settings(max_examples=10)
@given(growth=growths(HALF, most=200))
def test_prefill_and_decode(growth):
    """All steps but the last in chunks with lengths on the device, then token by token with lengths on the host."""
    engine = Engine(growth)
    pages, table = engine.pages, engine.table
    first = torch.tensor(growth.steps[0], dtype=growth.index)
    engine.grow(growth.steps[0])
    weight = on_npu(engine)
    sizes = (*growth.geometry, growth.page)
    result = nsa.nsa_compress_append(
        engine.pages, weight, engine.cache_table, *sizes, block_table=engine.table,
        seq_len_before=torch.zeros_like(first).to("npu:0"), seq_len_after=first.to("npu:0"), cache=engine.cache,
    )  # fmt: skip
    assert result is engine.cache
    engine.pages, engine.table, lengths = pages, table, list(growth.steps[0])
    while lengths != list(growth.steps[-1]):
        lengths = [min(length + 1, last) for length, last in zip(lengths, growth.steps[-1])]
        engine.grow(lengths)
        slots = engine.slot_mapping()
        cache = engine.cache.flatten(0, 1)
        nsa.nsa_compress_infer(
            pages.to("npu:0"), weight, torch.tensor(slots).to("npu:0"), *sizes, block_table=table.to("npu:0"),
            actual_seq_len=lengths, cache=cache,
        )  # fmt: skip
    engine.cache = engine.cache.cpu()
    rows, others_untouched = engine.rows()
    assert others_untouched
    if len(rows):
        assert_close(rows, growth.case.exact[0], growth.case.magnitude[0], growth.case.terms[0])


def test_a_step_where_nothing_is_due_launches_nothing():
    growth = Growth(((33, 47),), 32, 16, 2, 16, 16, 1, torch.float16)
    engine = Engine(growth)
    engine.grow(growth.steps[-1])
    weight = on_npu(engine)
    with mock.patch.multiple(accelerator, append=None):
        nsa.nsa_compress_infer(
            engine.pages, weight, torch.tensor([-1, -1]).to("npu:0"), *growth.geometry, growth.page,
            block_table=engine.table, actual_seq_len=growth.steps[-1], cache=engine.cache.flatten(0, 1),
        )  # fmt: skip
    assert engine.cache.cpu().isnan().all()


@pytest.mark.parametrize("tables", ["slot_mapping", "block_table"])
def test_tables_are_not_read_by_the_host(tables):
    """What is no slot or page there is no error, and nothing is written for it; lengths on the host are checked."""
    growth = Growth(((48, 32),), 32, 16, 2, 16, 16, 1, torch.float16)
    engine = Engine(growth)
    engine.grow(growth.steps[-1])
    if tables == "block_table":
        engine.table[0, 1] = 1000
    weight = on_npu(engine)
    slots = [1000 if tables == "slot_mapping" else 1, 0]
    call = {"block_table": engine.table, "cache": engine.cache.flatten(0, 1)}
    arguments = (engine.pages, weight, torch.tensor(slots).to("npu:0"), *growth.geometry, growth.page)
    nsa.nsa_compress_infer(*arguments, **call, actual_seq_len=(48, 32))
    assert (~engine.cache.cpu().isnan().any(-1).any(-1).flatten()).nonzero().tolist() == [[0]]
    for lengths, message in (((49, 32), "must be at most 48"), ((48, -1), "must not be negative")):
        with pytest.raises(RuntimeError, match=message):
            nsa.nsa_compress_infer(*arguments, **call, actual_seq_len=lengths)


@pytest.mark.parametrize("max_new_rows", [None, 0, 64])
def test_tables_and_weight_of_any_strides(max_new_rows):
    growth = Growth(((64, 40, 48),), 32, 16, 2, 16, 16, 1, torch.float16)
    engine = Engine(growth)
    before, after = (spread(lengths).to("npu:0") for lengths in engine.grow(growth.steps[-1]))
    engine.table, engine.cache_table = spread(engine.table), spread(engine.cache_table)
    weight, sizes = on_npu(engine), (*growth.geometry, growth.page)
    slots = torch.tensor([engine.slot(b, n - 1)[0] for b, n in enumerate((3, 1, 2))])
    results = []
    for w in (weight, weight.t().contiguous().t()):
        engine.cache, newest = (torch.full_like(engine.cache.cpu(), torch.nan).to("npu:0") for _ in range(2))
        nsa.nsa_compress_append(
            engine.pages, w, engine.cache_table, *sizes, block_table=engine.table, seq_len_before=before,
            seq_len_after=after, cache=engine.cache, max_new_rows=max_new_rows,
        )  # fmt: skip
        nsa.nsa_compress_infer(
            engine.pages, w, spread(slots).to("npu:0"), *sizes, block_table=engine.table, actual_seq_len=(64, 33, 48),
            cache=newest.flatten(0, 1),
        )  # fmt: skip
        engine.cache = engine.cache.cpu()
        results.append(engine.rows()[0])
        for slot in slots[::2]:  # of the sequences whose newest window is due
            assert torch.equal(newest.cpu()[slot], engine.cache[slot])
    assert_close(results[0], growth.case.exact[0], growth.case.magnitude[0], growth.case.terms[0])
    assert torch.equal(*results)


def test_a_graph_is_captured_of_appending_alone(monkeypatch):
    """Appending copies nothing to the device and makes no memory there; new lengths come in the old tensors."""
    growth = Growth(((40,), (64,)), 32, 16, 2, 16, 16, 1, torch.float16)
    engine = Engine(growth)
    engine.grow(growth.steps[-1])
    weight = on_npu(engine)
    before, after = (torch.tensor([length]).to("npu:0") for length in (0, 40))
    monkeypatch.setattr(type(torch.npu), "is_current_stream_capturing", lambda self: True)
    sizes = (*growth.geometry, growth.page)

    def step():
        with Operators() as operators:
            nsa.nsa_compress_append(
                engine.pages, weight, engine.cache_table, *sizes, block_table=engine.table, seq_len_before=before,
                seq_len_after=after, cache=engine.cache,
            )  # fmt: skip
        assert operators.names == ["nsa::_compress_append"]

    step()
    before.fill_(40)
    after.fill_(64)
    step()
    slots = torch.tensor([-1]).to("npu:0")
    for length in (33, 48):  # also where nothing is due
        with pytest.raises(RuntimeError, match="which a captured graph would repeat: capture nsa_compress_append"):
            nsa.nsa_compress_infer(
                engine.pages, weight, slots, *sizes, block_table=engine.table, actual_seq_len=[length],
                cache=engine.cache.flatten(0, 1),
            )  # fmt: skip
    engine.cache = engine.cache.cpu()
    assert_close(engine.rows()[0], growth.case.exact[0], growth.case.magnitude[0], growth.case.terms[0])


def test_an_npu_takes_no_fp32_pages():
    x, weight = torch.randn(1, 32, 1, 16).to("npu:0"), torch.randn(32, 1).to("npu:0")
    slots, cache = torch.zeros(1).int().to("npu:0"), torch.zeros(1, 1, 16).to("npu:0")
    with pytest.raises(TypeError, match=r"must be one of torch.float16, torch.bfloat16, got torch.float32"):
        nsa.nsa_compress_infer(x, weight, slots, 32, 16, 32, actual_seq_len=[32], cache=cache)


def test_tables_on_another_device_are_refused():
    x, weight = torch.randn(1, 32, 1, 16).half().to("npu:0"), torch.randn(32, 1).half().to("npu:0")
    cache = torch.zeros(1, 1, 16).half().to("npu:0")
    with pytest.raises(RuntimeError, match="slot_mapping must be on the device of input, npu:0, got cpu"):
        nsa.nsa_compress_infer(x, weight, torch.zeros(1).int(), 32, 16, 32, actual_seq_len=[32], cache=cache)


def test_two_devices_are_refused():
    x, weight = torch.randn(32, 1, 16).half(), torch.randn(32, 1).half()
    for pair in ((x.to("npu:0"), weight), (x, weight.to("npu:0"))):
        with pytest.raises(RuntimeError, match="same device, got"):
            nsa.nsa_compress(*pair, 32, 16, actual_seq_len=[32])


def test_emulated_tensors_are_what_they_say():
    x = torch.randn(4, 6).to("npu")
    assert isinstance(x, NpuTensor)
    assert isinstance(x.t()[1:], NpuTensor)
    assert x.t()[1:].stride() == (1, 6)
    x.t()[1:].zero_()  # a view shares its memory
    assert x.cpu()[:, 1:].eq(0).all()
    assert torch.ones(3, device="npu:0").sum().item() == 3
