"""How many programs run: one a physical core, each walking over many tiles."""

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
