"""Modelled times of both families of kernels against the memory limit. Nothing here is measured: docs/roofline.md."""
