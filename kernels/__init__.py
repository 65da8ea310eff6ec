"""Triton kernels and their launchers, one file a family. They know tensors and tables, nothing of the op."""

from nsa.triton_ascend import check_installation

check_installation()  # before the first import of triton, which a broken installation may not survive
