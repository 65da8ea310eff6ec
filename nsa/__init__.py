"""nsa_compress: the compression step of Native Sparse Attention, for Ascend NPUs, in PyTorch.

`import nsa` registers `torch.ops.nsa.nsa_compress`; `nsa.nsa_compress` is the same op behind the
specification's full contract.
"""

from .api import nsa_compress

__all__ = ["nsa_compress"]
