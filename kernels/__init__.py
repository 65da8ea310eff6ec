"""Triton kernels and their launchers, one file a family. They know tensors and tables, nothing of the op.

Triton compiles a kernel once more for an integer argument that is 1 or a multiple of 16, and for a pointer that is not
a multiple of 16 bytes. Packs change from step to step, and a compilation in each would stall a training. So counts and
tables, of which that may change, are named in `do_not_specialize`. The other tensors always start at a multiple of 16
bytes (`launch.aligned`), and the block and the stride are multiples of 16 by the contract.
"""

from nsa.triton_ascend import check_installation

check_installation()  # before the first import of triton, which a broken installation may not survive
