"""An emulated device: tensors that say `device='npu:0'` and live in the host's memory.

With it, and `host_driver()` below, a call goes the way it goes on an NPU: registration under PrivateUse1,
autograd, window table on the device, launcher, kernel. Everything but the project's own ops is done by PyTorch on
the CPU. For tests; it rests on PyTorch's private support for backends written in Python.
"""

from contextlib import contextmanager

import torch
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_library = None


def emulate_npu() -> None:
    """Make 'npu' an emulated device for the rest of this process. Calling it again changes nothing."""
    global _library
    if _library is not None:
        return
    _setup_privateuseone_for_python_backend(rename="npu", backend_module=_NpuModule())
    _library = torch.library.Library("aten", "IMPL")
    _library.impl("empty.memory_format", _on_host(torch.ops.aten.empty.memory_format), "PrivateUse1")
    _library.impl("empty_strided", _on_host(torch.ops.aten.empty_strided.default), "PrivateUse1")
    _library.impl("_pin_memory", lambda tensor, device=None: tensor.clone(), "CPU")


class NpuTensor(torch.Tensor):
    """A tensor on npu:0 whose elements are those of the CPU tensor `host`."""

    @staticmethod
    def __new__(cls, host):
        return torch.Tensor._make_wrapper_subclass(
            cls, host.size(), host.stride(), host.storage_offset(), dtype=host.dtype, device="npu:0"
        )

    def __init__(self, host):
        self.host = host

    def data_ptr(self):
        return self.host.data_ptr()

    def record_stream(self, stream):
        """There is nothing to keep: what a stream is given is done at once."""

    def __repr__(self):
        return f"NpuTensor({self.host})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == "nsa":  # on to the kernel that is registered for the tensors' device
            key = torch._C._parse_dispatch_key(torch._C._dispatch_key_for_device(args[0].device.type))
            return function.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs)
        target = kwargs.get("device")
        result = _host_call(function, args, kwargs)
        if function._schema.name.endswith("_"):  # in place: the tensor that came
            return args[0]
        leaves_the_device = target is not None and torch.device(target).type == "cpu"
        return result if leaves_the_device else tree_map_only(torch.Tensor, NpuTensor, result)


class Stream:
    """What it is given is done at once, so nobody ever waits."""

    def record_event(self):
        return object()

    def wait_event(self, event):
        pass


class _NpuModule:
    """What torch.get_device_module('npu') gives."""

    def __init__(self):
        self._stream = Stream()

    def current_stream(self, device=None):
        return self._stream

    def is_current_stream_capturing(self):
        return False

    def is_available(self):
        return True

    def device_count(self):
        return 1

    def current_device(self):
        return 0

    def _is_in_bad_fork(self):
        return False

    def manual_seed_all(self, seed):
        """Random numbers come from the CPU's generator."""

    @contextmanager
    def device(self, device):
        yield


def _host_call(function, args, kwargs):
    args, kwargs = tree_map_only(NpuTensor, lambda tensor: tensor.host, (args, kwargs))
    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": "cpu"}
    return function(*args, **kwargs)


def _on_host(function):
    def call(*args, **kwargs):
        return NpuTensor(_host_call(function, args, kwargs))

    return call
