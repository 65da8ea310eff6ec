"""Arrays to an accelerator: one copy for which nobody waits, safe on every stream and in captured graphs.

A copy from ordinary memory makes the host wait until the device has done all that it was given before. From pinned
memory it does not: the copy takes its turn in the current stream. Then three things need care, and `Transfer` sees to
them:

    the pinned memory      must stay until the copy is done: PyTorch's and torch_npu's allocators of pinned memory
                           note the copy, and do not hand the memory out again before
    another stream         must wait for the copy, and the memory on the device must outlive its kernels
    a captured graph       keeps pointers into the memory, and nobody learns when the graph is no longer replayed
"""

import torch

LINE = 64  # elements: tensors start at multiples of 512 bytes, as those that PyTorch allocates do

_in_graphs = set()  # transfers that a captured graph points into; never freed


class Transfer:
    """int64 arrays on an accelerator. `tensors` has them in the order given, as views of one piece of memory.

    RuntimeError where the current stream is captured: the graph would copy anew at each replay, from host memory that
    holds something else by then.
    """

    def __init__(self, arrays, device):
        self._device = device
        self._module = torch.get_device_module(device)
        if self._module.is_current_stream_capturing():
            raise RuntimeError(
                f"expected a window table that is on {device} before a graph is captured, got new lengths or sizes: "
                "call the op, and its gradients, once with this actual_seq_len and these shapes before the capture"
            )
        # each view starts at a LINE, wherever the lengths of those before end: Triton compiles a kernel again for
        # pointers that are not multiples of 16 bytes
        sizes = [-(-array.size // LINE) * LINE for array in arrays]
        host = torch.zeros(sum(sizes), dtype=torch.int64, device="cpu")
        for part, array in zip(host.split(sizes), arrays):
            part.numpy()[: array.size] = array.ravel()
        self._memory = host.pin_memory().to(device, non_blocking=True)
        parts = self._memory.split(sizes)
        self.tensors = [part[: array.size].view(array.shape) for part, array in zip(parts, arrays)]
        stream = self._module.current_stream(device)
        self._copied = stream.record_event()
        self._streams = {stream}

    def use(self):
        """Call it before the current stream reads the tensors."""
        if self._module.is_current_stream_capturing():
            # no stream may wait for an event from outside its capture; whoever captures waits for the device before,
            # as torch.cuda.graph and torch.npu.graph do
            _in_graphs.add(self)
            return
        stream = self._module.current_stream(self._device)
        if stream not in self._streams:
            stream.wait_event(self._copied)
            self._memory.record_stream(stream)
            self._streams.add(stream)
