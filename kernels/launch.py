"""The launch plan: how many programs run, and how large a block each holds."""

import torch
import triton
from triton.backends import backends

MAX_PROGRAMS = 65535  # the Ascend launcher's limit on a grid
PROGRAMS_PER_CORE = {"npu": 1, "cuda": 8}  # a streaming multiprocessor hides latency with several programs

ANY_SIZE = "ascend" in backends  # triton-ascend takes blocks of any size, other Tritons powers of two


def padded(size):
    """The least size of a block that holds `size` elements."""
    return size if ANY_SIZE else triton.next_power_of_2(size)


def largest_divisor(size, most):
    """The largest block of at most `most` elements that cuts `size` into equal parts."""
    return max(b for b in range(1, min(size, most) + 1) if size % b == 0 and (ANY_SIZE or b & (b - 1) == 0))


def program_count(device):
    """Programs that fill the device: one a vector core on an NPU, some a multiprocessor on a GPU."""
    if device.type == "npu":
        properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
        cores = properties["num_vectorcore"]
    elif device.type == "cuda":
        cores = torch.cuda.get_device_properties(device).multi_processor_count
    else:
        raise RuntimeError(f"expected a device of type npu or cuda to run Triton kernels on, got {device}")
    return min(cores * PROGRAMS_PER_CORE[device.type], MAX_PROGRAMS)
