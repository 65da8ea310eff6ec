"""How many programs run, one a physical core, each walking over many windows or runs; and on what memory."""

import torch
import triton

MAX_PROGRAMS = 65535  # the Ascend launcher's limit on a grid
PROGRAMS_PER_MULTIPROCESSOR = 8  # a GPU's core hides latency with several programs; assumed, never measured


def program_count(device, core):
    """Programs that fill the device with kernels for its "cube" or "vector" cores, which on a GPU are the same."""
    if device.type == "npu":
        properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
        count = properties[{"cube": "num_aicore", "vector": "num_vectorcore"}[core]]
    elif device.type == "cuda":
        count = torch.cuda.get_device_properties(device).multi_processor_count * PROGRAMS_PER_MULTIPROCESSOR
    else:
        raise RuntimeError(f"expected a device of type npu or cuda to run Triton kernels on, got {device}")
    return min(count, MAX_PROGRAMS)


def aligned(tensor):
    """A contiguous tensor itself, or a copy where it does not start at a multiple of 16 bytes, which parts of a larger
    tensor may do: kernels load 16 bytes at once on a GPU, and are compiled once."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
