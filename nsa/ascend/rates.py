"""How fast the parts of one core are: the one place for rates that hold for every chip of this package.

Clocks, core counts and the memory's rate differ from chip to chip and stand in `targets.py`. The rates here are
those of A2 in the vendor's platform files; for A3 and A5 they are *assumed* to be the same. None was measured.
"""

# Bytes a cycle. "A core" is a cube core with its two vector cores, which share one way to memory.
L2_READ = 110  # from L2 into a core
FIX_WRITE = 86  # from L0C to memory, which is the rate of writing to L2
UB_WRITE = 64  # from one vector core's UB to memory
L1_TO_L0A = 512
L1_TO_L0B = 256

LANES = 64  # fp32 elements that one vector operation takes in a cycle
# In a cycle the cube multiplies 16 x 16 by 16 x 16 elements of 16 bits: nsa.kernels.tiles.CUBE
