"""Train a small byte-level language model with NSA-like attention on real text: Python's language reference.

    python examples/train_lm.py --compare

trains it twice, with and without the compressed branch, and writes both losses as a plot and as a CSV. The text
comes with CPython (`pydoc_data.topics`). Needs the extra [dev], for matplotlib and tqdm.

Attention has two branches, mixed by a learnt gate. The sliding branch sees the last few rows. The compressed
branch sees all finished windows of the segment, each as one key and one value: the weighted sums over its rows
that nsa_compress takes, with learnt weights. NSA's third branch, the selection of blocks, is left out.
"""

import argparse
import csv
import math
import os
import random
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import nsa  # noqa: F401  registers torch.ops.nsa

BITS = 1 / math.log(2)  # a nat


@dataclass(frozen=True)
class Config:
    layers: int = 2
    heads: int = 8
    head_dim: int = 16
    sliding: int = 4  # rows that the sliding branch sees, its own included
    block: int = 16
    stride: int = 16
    rows: int = 1024  # of a pack
    evaluations: int = 10
    learning_rate: float = 3e-3
    warm_up: int = 40  # steps


# ---- text


def read_topics():
    """Training and held-out topics, as bytes. What a held-out topic repeats of a training topic is cut from
    the latter: the topics quote each other by the paragraph."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    held_out = names[::8]
    seen = {paragraph.strip() for name in held_out for paragraph in topics[name].split("\n\n")}
    training = [
        "\n\n".join(paragraph for paragraph in topics[name].split("\n\n") if paragraph.strip() not in seen)
        for name in names
        if name not in held_out
    ]
    return [text.encode() for text in training], [topics[name].encode() for name in held_out]


def draw_segments(topics, rows, generator):
    """Pieces of random topics that fill a pack; a piece of n + 1 bytes makes n rows."""
    segments = []
    while rows:
        topic = generator.choices(topics, list(map(len, topics)))[0]
        size = min(len(topic) - 1, rows)
        begin = generator.randrange(len(topic) - size)
        segments.append(topic[begin : begin + size + 1])
        rows -= size
    return segments


def cut_into_packs(topics, rows):
    """All of the topics, each cut into pieces of at most `rows` rows, packed."""
    packs, free = [], 0
    for piece in (topic[i : i + rows + 1] for topic in topics for i in range(0, len(topic) - 1, rows)):
        if len(piece) - 1 > free:
            packs.append([])
            free = rows
        packs[-1].append(piece)
        free -= len(piece) - 1
    return packs


class Pack:
    """Packed segments, and which rows and windows each row may see. Row t holds a byte, its target is the next."""

    def __init__(self, segments, config, device):
        self.bytes = torch.tensor(list(b"".join(s[:-1] for s in segments)), device=device)
        self.targets = torch.tensor(list(b"".join(s[1:] for s in segments)), device=device)
        ends = [0]
        for s in segments:
            ends.append(ends[-1] + len(s) - 1)
        self.actual_seq_len = ends[1:]
        self.row = torch.arange(ends[-1], device=device)
        segment = torch.bucketize(self.row, torch.tensor(self.actual_seq_len, device=device), right=True)
        # last row of each window, in the order of nsa_compress
        last = [row for a, b in pairwise(ends) for row in range(a + config.block - 1, b, config.stride)]
        self.last = torch.tensor(last, dtype=torch.long, device=device)
        sees = (self.last <= self.row[:, None]) & (segment[self.last] == segment[:, None])  # finished, own segment
        self.sees_window = F.pad(sees, (1, 0), value=True)  # and a window of zeros, for rows that see no other
        distance = self.row[:, None] - self.row
        self.sees_row = (distance >= 0) & (distance < config.sliding) & (segment == segment[:, None])


# ---- model


class Attention(nn.Module):
    def __init__(self, config, compress):
        super().__init__()
        self.config, self.compress = config, compress
        n, width = config.heads, config.heads * config.head_dim
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.gate = nn.Linear(width, 2 * n)
        self.out = nn.Linear(width, width, bias=False)
        # at first, each head takes the mean of its own part of a window: together they keep some of its order
        part = config.block // n
        self.weight_k = nn.Parameter(torch.eye(n).repeat_interleave(part, 0) / part)  # [block, N]
        self.weight_v = nn.Parameter(self.weight_k.detach().clone())

    def forward(self, x, pack):
        q, k, v = self.qkv(x).view(len(x), 3, self.config.heads, -1).unbind(1)  # [T, N, D]
        q, k = normed(q), normed(k)
        of_rows, of_windows = self.gate(x).sigmoid().view(len(x), 2, -1, 1).unbind(1)  # [T, N, 1]
        y = of_rows * attend(rotated(q, pack.row), rotated(k, pack.row), v, pack.sees_row)
        if self.compress:
            k, v = (self.compressed(a, w, pack) for a, w in ((k, self.weight_k), (v, self.weight_v)))
            k = rotated(normed(k), pack.last)
            k, v = (F.pad(a, (0, 0, 0, 0, 1, 0)) for a in (k, v))  # the window of zeros
            y = y + of_windows * attend(rotated(q, pack.row), k, v, pack.sees_window)
        return self.out(y.flatten(1))

    def compressed(self, x, weight, pack):
        """[T', N, D]. The CPU's op takes fp32; the accelerators' fast kernels are for half precision."""
        dtype = x.dtype if x.device.type == "cpu" else torch.bfloat16
        block, stride = self.config.block, self.config.stride
        y = torch.ops.nsa.nsa_compress(x.to(dtype), weight.to(dtype), block, stride, actual_seq_len=pack.actual_seq_len)
        return y.to(x.dtype)


def attend(q, k, v, sees):
    """q [T, N, D], k and v [S, N, D], sees [T, S]."""
    q, k, v = (a.transpose(0, 1)[None] for a in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=sees)[0].transpose(0, 1)


def normed(x):
    return F.rms_norm(x, x.shape[-1:])


def rotated(x, row):
    """Rotary positions."""
    half = x.shape[-1] // 2
    angle = (row[:, None] * 1000.0 ** (-torch.arange(half, device=x.device) / half))[:, None]
    cos, sin = angle.cos(), angle.sin()
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Block(nn.Module):
    def __init__(self, config, compress):
        super().__init__()
        width = config.heads * config.head_dim
        self.norms = nn.ModuleList([nn.RMSNorm(width), nn.RMSNorm(width)])
        self.attention = Attention(config, compress)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, pack):
        x = x + self.attention(self.norms[0](x), pack)
        return x + self.mlp(self.norms[1](x))


class Model(nn.Module):
    """Logits (T, 256) of the next byte of each row of a `Pack`."""

    def __init__(self, config, compress=True):
        super().__init__()
        width = config.heads * config.head_dim
        self.embedding = nn.Embedding(256, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList([Block(config, compress) for _ in range(config.layers)])
        self.norm = nn.RMSNorm(width)

    def forward(self, pack):
        x = self.embedding(pack.bytes)
        for block in self.blocks:
            x = block(x, pack)
        return self.norm(x) @ self.embedding.weight.t()


# ---- training


def train(config, compress, steps, seed, device):
    """One run's name and losses: [(step, training bits a byte, validation bits a byte)]."""
    name = "sliding and compressed" if compress else "sliding only"
    torch.manual_seed(seed)
    generator = random.Random(seed)
    training, held_out = read_topics()
    validation = [Pack(segments, config, device) for segments in cut_into_packs(held_out, config.rows)]
    model = Model(config, compress).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / config.warm_up, 0.55 + 0.45 * math.cos(math.pi * min(1, i / steps)))
    )
    losses, recent = [], []
    bar = tqdm(range(1, steps + 1), desc=name, unit="step")
    for step in bar:
        pack = Pack(draw_segments(training, config.rows, generator), config, device)
        loss = F.cross_entropy(model(pack), pack.targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent.append(loss.detach() * BITS)
        if step % max(1, steps // config.evaluations) == 0 or step == steps:
            losses.append((step, torch.stack(recent).mean().item(), evaluate(model, validation)))
            recent = []
            bar.set_postfix_str(f"validation {losses[-1][2]:.3f} bits a byte")
    return name, losses


@torch.no_grad()
def evaluate(model, packs):
    """Bits a byte over all rows of the packs."""
    total = sum(F.cross_entropy(model(pack), pack.targets, reduction="sum").item() for pack in packs)
    return total * BITS / sum(len(pack.targets) for pack in packs)


def write_results(runs, folder):
    """losses.csv and losses.png; each is written aside and renamed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / ".losses.csv"
    with aside.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "step", "training bits a byte", "validation bits a byte"])
        writer.writerows((name, *line) for name, losses in runs for line in losses)
    os.replace(aside, folder / "losses.csv")

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name, losses in runs:
        steps, training, validation = zip(*losses)
        (line,) = axes.plot(steps, validation, marker="o", label=f"{name}: held-out topics")
        axes.plot(steps, training, linestyle=":", color=line.get_color(), label=f"{name}: training, mean since last")
    axes.set(xlabel="step", ylabel="loss, bits a byte", title="Language model on Python's language reference")
    axes.grid(alpha=0.4)
    axes.legend()
    figure.tight_layout()
    figure.savefig(folder / ".losses.png", dpi=90)
    pyplot.close(figure)
    os.replace(folder / ".losses.png", folder / "losses.png")
    return folder / "losses.csv", folder / "losses.png"


def check_device(name):
    """The device, or ValueError that says what is missing."""
    if name == "npu":
        try:
            import torch_npu  # noqa: F401  makes torch.npu
        except ImportError as error:
            raise ValueError("--device npu: torch_npu is missing: install nsa-ascend[npu] on an NPU machine") from error
    if name != "cpu" and not getattr(torch, name).is_available():
        raise ValueError(f"--device {name}: PyTorch finds no such device here")
    return torch.device(name)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Train a small language model with compressed attention on real text.")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--compare", action="store_true", help="train with and without the compressed branch")
    which.add_argument("--no-compress", action="store_true", help="train without the compressed branch")
    parser.add_argument("--steps", type=int, default=1200, help="optimizer steps of a run (default 1200)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the order of the text (default 0)")
    parser.add_argument("--device", choices=["cpu", "cuda", "npu"], default="cpu", help="where to train (default cpu)")
    parser.add_argument("--out", type=Path, default=Path("runs/train_lm"), help="folder of the plot and the CSV")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps: expected at least 1, got {args.steps}")
    try:
        device = check_device(args.device)
    except ValueError as error:
        parser.error(str(error))

    begin = time.monotonic()
    variants = [True, False] if args.compare else [not args.no_compress]
    runs = [train(Config(), compress, args.steps, args.seed, device) for compress in variants]
    files = write_results(runs, args.out)
    print(f"\nvalidation loss after {args.steps} steps, seed {args.seed}, on held-out topics:")
    for name, losses in runs:
        print(f"  {name:24}{losses[-1][2]:.3f} bits a byte (after {losses[0][0]} steps: {losses[0][2]:.3f})")
    print(f"{time.monotonic() - begin:.0f} s; {files[0]}, {files[1]}")


if __name__ == "__main__":
    main()
