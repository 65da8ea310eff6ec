"""nsa_compress: the compression step of Native Sparse Attention, for Ascend NPUs, in PyTorch.

`import nsa` registers `torch.ops.nsa.nsa_compress`; `nsa.nsa_compress` is the same op behind the
specification's full contract.
"""

from .api import count_windows, nsa_compress, nsa_compress_append, nsa_compress_infer

__version__ = "0.1.0"  # setup.py reads it, and with it the package

__all__ = ["__version__", "count_windows", "nsa_compress", "nsa_compress_append", "nsa_compress_infer"]
