"""How a window table comes to an accelerator: one transfer for which nobody waits, streams, and captured graphs.

The emulated NPU has no streams and captures nothing: stand-ins here say which stream is current and whether it is
captured, and write down what is asked of them.
"""

import gc
import re
import weakref
from types import SimpleNamespace

import pytest
import torch
from cases import NAMED, Case
from tolerance import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import nsa
from nsa import table, transfer
from nsa.ascend.emulated import NpuTensor, emulate_npu
from nsa.table import WindowTable, window_table

emulate_npu()
NPU = torch.device("npu:0")
CUBE, VECTOR = Case((77, 100), 32, 16, 2, 32), Case((77, 100), 32, 32, 2, 32)


class Copies(TorchDispatchMode):
    """Writes down the copies of int64 from the host to the device, and whether the host would wait for them."""

    def __init__(self):
        super().__init__()
        self.waits = []
        self._pinned = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == "nsa":  # look into its kernel
            with self:
                return function.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1), *args, **kwargs)
        result = function(*args, **kwargs)
        if function._schema.name.endswith("pin_memory"):
            self._pinned.add(result.data_ptr())
        for source in args:
            comes_from_host = isinstance(result, NpuTensor) and type(source) is torch.Tensor
            if comes_from_host and source.dtype == torch.int64:
                self.waits.append(not (kwargs.get("non_blocking") and source.data_ptr() in self._pinned))
        return result


def step(case, actual_seq_len):
    x, weight, dy = (t.to(NPU) for t in case.inputs)
    x.requires_grad_()
    weight.requires_grad_()
    y = nsa.nsa_compress(x, weight, *case.geometry, actual_seq_len=actual_seq_len)
    y.backward(dy)
    return y.detach(), x.grad, weight.grad


@pytest.mark.parametrize("case", [CUBE, VECTOR], ids=["cube", "vector"])
def test_a_step_with_new_lengths_is_one_transfer_and_no_wait(case):
    table._kept_table.cache_clear()
    with Copies() as copies:
        step(case, case.actual_seq_len)
        assert copies.waits == [False]
        step(case, case.actual_seq_len)
        assert copies.waits == [False]
        step(case, [case.lengths[1], sum(case.lengths)])  # the segments change places
        assert copies.waits == [False] * 2


def parts_of(built):
    return [built.begins, built.starts, built.groups, built.window_runs(5), built.row_runs(64), built.window_runs(7)]


@pytest.mark.parametrize("name", ["spec", "no window in the first segments", "many short segments"])
def test_parts_arrive_whole_and_aligned(name):
    """Triton compiles a kernel anew for a pointer that is no multiple of 16 bytes."""
    case = NAMED[name]
    here, there = (WindowTable(case.actual_seq_len, *case.geometry, device) for device in (torch.device("cpu"), NPU))
    there.prepare(("begins",), ("starts",), ("groups",), ("window_runs", 5), ("row_runs", 64), ("window_runs", 7))
    for sent, part in zip(parts_of(there), parts_of(here)):
        assert sent.device == NPU
        assert sent.is_contiguous()
        assert torch.equal(sent.cpu(), part)
        assert sent.storage_offset() * sent.itemsize % 512 == 0


class Stream:
    def __init__(self, name, log):
        self.name, self.log = name, log

    def record_event(self):
        self.log.append(f"{self.name} records")
        return f"event of {self.name}"

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event}")


@pytest.fixture
def device(monkeypatch):
    """The device's current stream, whether it is captured, and what happens to streams and memory."""
    log = []
    streams = {name: Stream(name, log) for name in "abc"}
    state = SimpleNamespace(log=log, **streams, capturing=False)
    state.stream = state.a
    monkeypatch.setattr(torch.npu, "current_stream", lambda device=None: state.stream)
    monkeypatch.setattr(torch.npu, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(NpuTensor, "record_stream", lambda self, stream: log.append(f"memory kept for {stream.name}"))
    monkeypatch.setattr(transfer, "_in_graphs", set())
    return state


def test_another_stream_waits_for_the_copy_and_keeps_the_memory(device):
    built = WindowTable([100], 32, 16, NPU)
    built.prepare(("starts",))
    built.prepare(("starts",))
    assert device.log == ["a records"]
    device.stream = device.b
    built.prepare(("starts",))
    assert device.log == ["a records", "b waits for event of a", "memory kept for b"]
    built.prepare(("starts",), ("groups",))
    device.stream = device.a
    built.prepare(("starts",))
    assert device.log[3:] == ["b records", "a waits for event of b", "memory kept for a"]
    del device.log[:]
    device.stream = device.c
    built.prepare(("starts",), ("groups",))  # two transfers brought them
    assert device.log == [
        "c waits for event of a", "memory kept for c", "c waits for event of b", "memory kept for c",
    ]  # fmt: skip


def test_every_op_asks_for_the_stream_it_runs_on(device):
    """A table that one stream brought is used on another by each of the three ops."""
    for case in (CUBE, VECTOR):
        x, weight, dy = (t.to(NPU) for t in case.inputs)
        ops = torch.ops.nsa
        pairs = {ops.nsa_compress: (x, weight), ops.nsa_compress_grad_input: (dy, weight)}
        for op, pair in (pairs | {ops.nsa_compress_grad_weight: (dy, x)}).items():
            table._kept_table.cache_clear()
            del device.log[:]
            for stream in (device.a, device.b):
                device.stream = stream
                op(*pair, *case.geometry, actual_seq_len=case.actual_seq_len)
            assert device.log == ["a records", "b waits for event of a", "memory kept for b"]


def test_lengths_that_are_new_to_the_device_are_refused_in_a_capture(device):
    table._kept_table.cache_clear()
    device.capturing = True
    message = (
        "expected a window table that is on npu:0 before a graph is captured, got new lengths or sizes: call the op"
    )
    with Copies() as copies, pytest.raises(RuntimeError, match=re.escape(message)):
        step(CUBE, CUBE.actual_seq_len)
    assert copies.waits == []
    device.capturing = False
    step(CUBE, CUBE.actual_seq_len)  # the refusal left nothing behind


def test_capture_after_a_warm_up_on_another_stream(device):
    """In a capture no stream waits for an event from outside, and nothing is copied."""
    table._kept_table.cache_clear()
    step(CUBE, CUBE.actual_seq_len)
    del device.log[:]
    device.stream, device.capturing = device.b, True
    with Copies() as copies:
        results = step(CUBE, CUBE.actual_seq_len)
    assert copies.waits == device.log == []
    for computed, exact, magnitude, terms in zip(results, CUBE.exact, CUBE.magnitude, CUBE.terms):
        assert_close(computed.cpu(), exact, magnitude, terms)


def test_what_a_graph_points_into_stays_when_the_cache_forgets_it(device):
    memory = {}
    for is_captured in (False, True):
        built = window_table((100 + is_captured,), 32, 16, NPU)
        built.prepare(("starts",))
        device.capturing = is_captured
        built.prepare(("starts",))
        device.capturing = False
        memory[is_captured] = weakref.ref(built.starts.host.untyped_storage())
        del built
    for rows in range(200, 300):
        window_table((rows,), 32, 16, NPU)
    gc.collect()
    assert memory[True]() is not None
    assert memory[False]() is None


def test_a_device_without_an_index_is_the_current_one(monkeypatch):
    built = window_table((100,), 32, 16, torch.device("npu"))
    assert built is window_table((100,), 32, 16, NPU)
    assert built.device == NPU
    monkeypatch.setattr(torch.npu, "current_device", lambda: 1)
    assert window_table((100,), 32, 16, torch.device("npu")).device == torch.device("npu:1")
