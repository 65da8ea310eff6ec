"""How fast the parts of a core are: the one place for constants of `simulator.clock` and of the roofline model.

Clocks, core counts, L2 sizes and the memory's rate differ from chip to chip and stand in `targets.py`. None of the
rates was measured here. The sources:

- *platform*: the vendor's platform files of A2.
- *practices*: the times in the vendor's best practices (asc-devkit, examples, 2026), measured on a 910B1 and a 950: see
  `simulator.vendor`. "Fitted" is a constant that was chosen to give one of these times.
- *triton-ascend*: its cost model's `ascend_910b.json`.
- *pto-isa*: fits of its cost model to instructions on a 910B3; *asc-devkit*: the performance appendix of its manual.

What a source says of A2 is *assumed* of A3, and of A5 where it has no line of its own.
"""

from typing import NamedTuple


class Generation(NamedTuple):
    """What differs between generations. Cycles, but for what says otherwise."""

    dma: float  # an instruction of MTE2, MTE3 or FIX, beside its bursts and bytes
    burst: float  # of a burst between memory and UB, at least
    nd2nz_row: float  # of a row on its way to L1, at least
    line: int  # bytes: a row that crosses a multiple of it, and does not start at one, moves in whole lines
    l2_total: float  # bytes a second out of L2 on a chip of `l2_cores` cube cores at `l2_clock`
    l2_cores: int
    l2_clock: float
    mte1: float  # of an instruction of MTE1, beside its bytes
    l1_to_l0b: float  # bytes
    fix: float  # bytes that FIX writes
    task: float  # seconds of a task beside its kernel


A2 = Generation(
    dma=12.6,  # fitted: GM to UB, single bursts of 128 B take 20.6 cycles an instruction
    burst=8,  # fitted: GM to UB, 64 bursts of 128 B take 532 cycles
    nd2nz_row=5.13,  # fitted: 64 rows of 128 B take 341 cycles
    line=512,  # fitted: rows of 512 B that start anywhere take twice the time; asc-devkit recommends this alignment
    l2_total=5.2e12,  # practices: "about 5.2 TB/s at most"
    l2_cores=24,
    l2_clock=1850e6,
    mte1=55,  # fitted: MTE1's time in the product of 8192 x 8192 x 8192, 430 cycles for 128 x 64 and 64 x 256
    l1_to_l0b=128,  # asc-devkit, and 220.5 GB/s of triton-ascend; the platform files say 256
    fix=66,  # fitted: 46 us of FIX in that product with no unit flag; platform 86, triton-ascend 38
    task=15.4e-6,  # practices: the mean of task duration less MTE2 time of seven copies, of 12.8 to 17.2 us
)
A5 = Generation(
    dma=31.4,  # fitted: 39.4 cycles
    burst=8,  # *assumed* to be that of A2
    nd2nz_row=4.92,  # fitted: 346 cycles
    line=32,  # fitted: such rows take 8 % longer; asc-devkit recommends 128 B
    l2_total=5.2e12,  # practices
    l2_cores=32,
    l2_clock=1650e6,
    mte1=39,  # fitted: the same, 333 cycles for 256 x 64 and 64 x 256
    l1_to_l0b=256,  # asc-devkit
    fix=78,  # fitted: the same, 34 us
    task=3.1e-6,  # practices: of seven, 2.7 to 3.6 us
)
GENERATIONS = {"A2": A2, "A3": A2, "A5": A5, None: A2}  # by the name of `Target.generation`

# Memory. Bytes a second of one core that moves alone; how all cores share is the chip's.
VECTOR_FROM_MEMORY = 100.9e9  # triton-ascend
CUBE_FROM_MEMORY = 135e9  # triton-ascend
# bytes a cycle
VECTOR_FROM_L2 = 64  # *assumed*, as UB to memory
CUBE_FROM_L2 = 110  # platform; the practices confirm it
VECTOR_WRITE = 64  # from one vector core's UB; platform
L2_LINE = 128  # bytes; practices: the caches' counters count 302 MB as 2.36 million misses
SECTOR = 32  # bytes: what the DMA counts in

# Cycles until the result of a pipe's instruction is there for others, while the pipe goes on with the next one
MEMORY_LATENCY = 200  # triton-ascend
L2_LATENCY = 50  # triton-ascend
STARTUP = {"MTE2": 50, "MTE3": 40, "FIX": 30, "M": 20, "MTE1": 20}  # triton-ascend; MTE1 *assumed*

MAD = 6  # cycles of a mad beside a cycle for each 16 x 16 x 16; pto-isa
L1_TO_L0A = 256  # bytes a cycle; asc-devkit, and 441 GB/s of triton-ascend; the platform files say 512
L1_FILL = 128  # bytes a cycle of set_l1; *assumed*

# Vector instructions: cycles a repeat of 256 bytes, and until the last result is there
VECTOR = {
    "vadd": (2.11, 24),  # pto-isa; the practices' additions say 2.0 and 22, and 1.0 where no banks of UB conflict
    "vmul": (2.3, 25),  # pto-isa
    "vconv": (0.9, 27),  # pto-isa
    "vcadd": (7, 24),  # asc-devkit: whole repeats are summed at 64/7 elements a cycle; the rest *assumed*
    "vcmax": (7, 24),  # *assumed* as vcadd
    "vdiv": (4, 30),  # *assumed*, as all that follow
    "vexp": (4, 30),
    "vln": (4, 30),
    "vsqrt": (4, 30),
    "vrsqrt": (4, 30),
    "vrec": (4, 30),
    "vector_dup": (1, 24),
    "vcmp": (1, 24),
    "vreducev2": (2, 24),
}
OTHER_VECTOR = (2.11, 24)  # *assumed* to be vadd: all element-wise instructions with no fit of their own
UB_COPY = 8, 24  # blocks of 32 bytes a cycle, and until the last is there; *assumed*

START = 10  # cycles between the starts of two cores, which are told to start one after the other; *assumed*

# The scalar unit; all *assumed*
ISSUE = 4  # cycles to put an instruction's operands together and hand it to its pipe
SYNCHRONISE = 10  # cycles from a flag's set to the start of what waited
TEAM_SYNCHRONISE = 200  # the same between cores, whose flags go through memory
SCALAR_LINE = 64  # bytes of the data cache's lines; each is fetched once
SCALAR_MISS = MEMORY_LATENCY
SCALAR_HIT = 4
SCALAR_UB = 10  # an access to UB; the practices' addition by the scalar unit takes 34 cycles for three and the sum


def l2_total(target):
    """Bytes a second out of L2 for all cores together, which grow with the number of cores and their clock."""
    generation = GENERATIONS[target.generation]
    scale = target.cube_cores * target.clock / (generation.l2_cores * generation.l2_clock)
    return generation.l2_total * scale


def task_overhead(target):
    """Seconds that a task takes beside its kernel; that a task before it hides nothing of them is *assumed*."""
    return GENERATIONS[target.generation].task
