"""Triton kernels and their launchers, one file a family. They know tensors and tables, nothing of the op."""
