"""What is measured: shapes, and how rows are packed into segments."""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch

from nsa.table import count_windows

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
BLOCKS = [(16, 16), (32, 16), (64, 16), (64, 32), (128, 16)]  # block, stride
SEGMENTS = ("documents", "one", "short")
SHORT = (40, 200)  # rows of a short segment
K = 1024


@dataclass(frozen=True)
class Case:
    t: int
    n: int
    d: int
    block: int
    stride: int
    dtype_name: str
    segments: str = "documents"  # or "one", "short"
    device_name: str = "cpu"
    draw: int = 0  # of the lengths: other numbers, other lengths

    def __str__(self):
        return f"{self.t},{self.n},{self.d},{self.block},{self.stride},{self.dtype_name},{self.segments}"

    @property
    def device(self):
        return torch.device(self.device_name)

    @property
    def dtype(self):
        return DTYPES[self.dtype_name]

    @cached_property
    def lengths(self):
        """Of the segments, in rows; the last one is cut so that they add up to T."""
        random = np.random.default_rng(self.draw)
        if self.segments == "one":
            return [self.t]
        if self.segments == "short":
            drawn = random.integers(*SHORT, self.t // SHORT[0] + 1, endpoint=True)
        else:  # documents: log-normal, half of them under 600 rows, one in a hundred over 10,000; an assumption
            drawn = random.lognormal(np.log(600), 1.2, self.t // 100 + 100).clip(16).astype(int)
        ends = np.cumsum(drawn)
        count = int(np.searchsorted(ends, self.t)) + 1
        lengths = drawn[:count].tolist()
        lengths[-1] -= int(ends[count - 1]) - self.t
        return lengths

    @cached_property
    def actual_seq_len(self):
        return list(accumulate(self.lengths))

    @cached_property
    def n_windows(self):
        return count_windows(self.actual_seq_len, self.block, self.stride)

    def inputs(self):
        """x, weight and dy."""
        generator = torch.Generator().manual_seed(0)
        shapes = ((self.t, self.n, self.d), (self.block, self.n), (self.n_windows, self.n, self.d))
        return [torch.randn(s, generator=generator).to(self.device, self.dtype) for s in shapes]

    def bytes(self, direction):
        """The least that has to move: inputs read once, results written once."""
        rows, windows, weight = self.t * self.n * self.d, self.n_windows * self.n * self.d, self.block * self.n
        forward = rows + weight + windows
        backward = rows + weight + windows + rows + weight
        elements = {"forward": forward, "backward": backward, "both": forward + backward}
        return elements[direction] * self.dtype.itemsize


def parse(text, device_name):
    """A case from T,N,D,block,stride,dtype[,segments]."""
    *numbers, rest = text.split(",", 5)
    dtype_name, _, segments = rest.partition(",")
    case = Case(*map(int, numbers), dtype_name, segments or "documents", device_name)
    if len(numbers) != 5 or dtype_name not in DTYPES or case.segments not in SEGMENTS:
        raise ValueError(text)
    return case


def grid(device_name, quick):
    """Groups of cases: `shapes` and `targets` for every implementation, `scaling` and `short` for the fast ones."""
    t = 4 * K if quick else 32 * K
    blocks = [(32, 16), (128, 16)] if quick else BLOCKS
    dtypes = ["bf16", "fp32"] if quick else DTYPES
    shapes = [(t, 8, 128, *geometry, dtype) for dtype in dtypes for geometry in blocks]
    targets = [(t, 8, 128, *geometry, dtype) for dtype in dtypes for geometry in ((32, 16), (128, 16))]
    if not quick:
        shapes += [(rows * K, 8, 128, 32, 16, "bf16") for rows in (4, 16, 64, 128)]
        shapes += [(t, n, 128, 32, 16, "bf16") for n in (1, 4, 16)]
        shapes += [(t, 8, d, 32, 16, "bf16") for d in (64, 256)]
    scaling = [((1 << power) * K, 2, 128, 32, 16, "bf16") for power in range(0, 5 if quick else 11)]
    short = [(60_000 if quick else 1_200_000, 4, 64, 32, 16, "bf16", segments) for segments in ("short", "one")]
    groups = {
        "targets": [(*case, "one") for case in targets],
        "shapes": shapes,
        "scaling": scaling,
        "short": short,
    }
    return {
        name: [Case(*case, device_name=device_name) for case in cases if device_name != "npu" or case[5] != "fp32"]
        for name, cases in groups.items()
    }
