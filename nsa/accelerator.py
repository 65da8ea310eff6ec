"""NPU and GPU: the Triton kernels, launched on the tensors' device."""

import torch


def forward(x, weight, table):
    vector, n_programs = _kernels(x.device)
    with torch.get_device_module(x.device).device(x.device):
        return vector.forward(x, weight, table.starts, n_programs)


def grad_input(dy, weight, table, n_rows, stride):
    vector, n_programs = _kernels(dy.device)
    with torch.get_device_module(dy.device).device(dy.device):
        return vector.grad_input(dy, weight, table.groups, n_rows, stride, n_programs)


def grad_weight(dy, x, table, block):
    vector, n_programs = _kernels(x.device)
    with torch.get_device_module(x.device).device(x.device):
        return vector.grad_weight(dy, x, table.starts, block, n_programs)


def _kernels(device):
    try:
        from nsa.kernels import launch, vector
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"nsa_compress on {device} runs Triton kernels, and the module {error.name} is missing: "
            "install nsa-ascend[npu] on an NPU machine, nsa-ascend[cuda] on a GPU machine"
        ) from error
    return vector, launch.program_count(device)
