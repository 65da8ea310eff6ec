"""What community Triton makes of the kernels for GPUs, with no GPU: compiled, never run. See docs/gpu.md."""
