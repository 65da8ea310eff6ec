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
import io
import math
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
from nsa.files import write_aside

BITS = 1 / math.log(2)  # a nat
EPS = torch.finfo(torch.float32).eps  # of norms, the same in whatever precision these are computed


@dataclass(frozen=True)
class Config:
    layers: int = 2
    heads: int = 4
    head_dim: int = 32
    sliding: int = 16  # rows that the sliding branch sees, its own included
    block: int = 16
    stride: int = 16
    rows: int = 2048  # of a pack
    segment: int = 1024  # rows, at most
    evaluations: int = 10
    learning_rate: float = 0.01  # of the matrices
    other_learning_rate: float = 3e-3
    warm_up: int = 40  # steps


# ---- text


def read_topics():
    """Training and held-out topics, as bytes. Topics quote each other by the paragraph: those of held-out topics
    are cut from the training topics."""
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


def draw_segments(topics, config, generator):
    """Pieces of random topics that fill a pack; a piece of n + 1 bytes makes n rows."""
    segments, rows = [], config.rows
    while rows:
        topic = generator.choices(topics, list(map(len, topics)))[0]
        size = min(len(topic) - 1, rows, config.segment)
        begin = generator.randrange(len(topic) - size)
        segments.append(topic[begin : begin + size + 1])
        rows -= size
    return segments


def cut_into_packs(topics, config):
    """All of the topics, cut into pieces, packed."""
    packs, free, size = [], 0, config.segment
    for piece in (topic[i : i + size + 1] for topic in topics for i in range(0, len(topic) - 1, size)):
        if len(piece) - 1 > free:
            packs.append([])
            free = config.rows
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
        # the sliding branch goes in chunks of rows: each sees itself and the chunk before
        own = chunks(segment, config.sliding, -1)
        seen = with_chunk_before(own, -2)
        distance = torch.arange(config.sliding)[:, None] + config.sliding - torch.arange(2 * config.sliding)
        near = ((distance >= 0) & (distance < config.sliding)).to(device)
        self.sees_row = near & (own[:, :, None] == seen[:, None])  # [chunks, sliding, 2 * sliding]


def chunks(x, size, value=0.0):
    """[T, ...] to [chunks, size, ...], filled up."""
    padding = [0, 0] * (x.ndim - 1) + [0, -len(x) % size]
    return F.pad(x, padding, value=value).unflatten(0, (-1, size))


def with_chunk_before(x, value=0.0):
    """[chunks, size, ...] to [chunks, 2 * size, ...]."""
    before = F.pad(x, [0, 0] * (x.ndim - 1) + [1, 0], value=value)[:-1]
    return torch.cat([before, x], 1)


# ---- model


class Attention(nn.Module):
    def __init__(self, config, compress):
        super().__init__()
        self.config, self.compress = config, compress
        n, width = config.heads, config.heads * config.head_dim
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.kv_of_windows = nn.Linear(width, 2 * width, bias=False)
        self.weight_k = nn.Parameter(torch.full((config.block, n), 1 / config.block))  # at first, the mean
        self.weight_v = nn.Parameter(torch.full((config.block, n), 1 / config.block))
        self.gate = nn.Linear(width, 2 * n)
        nn.init.zeros_(self.gate.weight)
        self.gate.bias.data = torch.tensor([2.0] * n + [-2.0] * n)  # at first, near rows count more
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x, pack):
        heads = (self.config.heads, self.config.head_dim)
        q, k, v = self.qkv(x).view(len(x), 3, *heads).unbind(1)  # [T, N, D]
        q, k = rotated(normed(q), pack.row), rotated(normed(k), pack.row)
        of_rows, of_windows = self.gate(x).sigmoid().view(len(x), 2, -1, 1).unbind(1)  # [T, N, 1]
        y = of_rows * self.sliding(q, k, v, pack)
        if self.compress:
            k, v = self.kv_of_windows(x).view(len(x), 2, *heads).unbind(1)
            y = y + of_windows * self.compressed(q, rotated(k, pack.row), v, pack)
        return self.out(y.flatten(1))

    def compressed(self, q, k, v, pack):
        k = self.windows(k, self.weight_k, pack)  # [T', N, D]
        return attend_windows(q, k, self.windows(v, self.weight_v, pack), pack.sees_window)

    def windows(self, x, weight, pack):
        block, stride = self.config.block, self.config.stride
        return torch.ops.nsa.nsa_compress(x, weight, block, stride, actual_seq_len=pack.actual_seq_len)

    def sliding(self, q, k, v, pack):
        q, k, v = (chunks(a, self.config.sliding) for a in (q, k, v))
        y = attend(q, with_chunk_before(k), with_chunk_before(v), pack.sees_row[:, None])
        return y.flatten(0, 1)[: len(pack.row)]


def attend(q, k, v, sees, scale=None):
    """q [..., T, N, D], k and v [..., S, N, D], sees [..., T, S] or with heads before T."""
    q, k, v = (a.transpose(-3, -2) for a in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=sees, scale=scale).transpose(-3, -2)


def attend_windows(q, k, v, sees):
    """As `attend`, over keys and values of windows, before which `sees` has the window of zeros."""
    k, v = (F.pad(a, (0, 0, 0, 0, 1, 0)) for a in (normed(k), v))
    return attend(q, k, v, sees, scale=0.5)  # sharp: there are many windows


def normed(x):
    return F.rms_norm(x, x.shape[-1:], eps=EPS)


def rotated(x, row):
    """Rotary positions."""
    half = x.shape[-1] // 2
    angle = (row[:, None] * 1000.0 ** (-torch.arange(half, device=x.device) / half))[:, None]
    cos, sin = angle.cos(), angle.sin()
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Block(nn.Module):
    def __init__(self, config, compress, attention):
        super().__init__()
        width = config.heads * config.head_dim
        self.norms = nn.ModuleList([nn.RMSNorm(width, EPS), nn.RMSNorm(width, EPS)])
        self.attention = attention(config, compress)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, pack):
        x = x + self.attention(self.norms[0](x), pack)
        return x + self.mlp(self.norms[1](x))


class Model(nn.Module):
    """Logits (T, 256) of the next byte of each row of a `Pack`, or of whatever else `attention` reads."""

    def __init__(self, config, compress=True, attention=Attention):
        super().__init__()
        width = config.heads * config.head_dim
        self.embedding = nn.Embedding(256, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList([Block(config, compress, attention) for _ in range(config.layers)])
        self.norm = nn.RMSNorm(width, EPS)

    def forward(self, pack):
        x = self.embedding(pack.bytes)
        for block in self.blocks:
            x = block(x, pack)
        return self.norm(x) @ self.embedding.weight.t()


# ---- training


def train(config, compress, steps, seed, device):
    """One run's name and losses: [(step, training bits a byte, validation bits a byte)]."""
    name = "sliding and compressed" if compress else "sliding only"
    return name, train_model(config, compress, steps, seed, device, name)[1]


def train_model(config, compress, steps, seed, device, name):
    """The model and its losses, as `train` has them."""
    torch.manual_seed(seed)
    generator = random.Random(seed)
    training, held_out = read_topics()
    validation = [Pack(segments, config, device) for segments in cut_into_packs(held_out, config)]
    model = Model(config, compress).to(device)
    optimizers = optimizers_of(model, config)

    def factor(i):
        """Of the learning rates at step i: up, then down along a cosine to a tenth."""
        return min((i + 1) / config.warm_up, 0.55 + 0.45 * math.cos(math.pi * min(1, i / steps)))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    losses, recent = [], []
    bar = tqdm(range(1, steps + 1), desc=name, unit="step")
    for step in bar:
        pack = Pack(draw_segments(training, config, generator), config, device)
        with mixed_precision(device):
            loss = F.cross_entropy(model(pack), pack.targets)
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in (*optimizers, *schedules):
            each.step()
        recent.append(loss.detach() * BITS)
        if step % max(1, steps // config.evaluations) == 0 or step == steps:
            losses.append((step, torch.stack(recent).mean().item(), evaluate(model, validation)))
            recent = []
            bar.set_postfix_str(f"validation {losses[-1][2]:.3f} bits a byte")
    return model, losses


def mixed_precision(device):
    """Parameters are fp32 everywhere. The accelerators' fast kernels are for half precision, which autocast makes."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type != "cpu")


def optimizers_of(model, config):
    """Muon for the matrices of the layers, AdamW for everything else."""
    matrices = [m.weight for name, m in model.blocks.named_modules() if isinstance(m, nn.Linear) and "gate" not in name]
    others = [parameter for parameter in model.parameters() if not any(parameter is m for m in matrices)]
    options = {"lr": config.learning_rate, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    adam = torch.optim.AdamW(others, lr=config.other_learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    return torch.optim.Muon(matrices, **options), adam


@torch.no_grad()
def evaluate(model, packs):
    """Bits a byte over all rows of the packs."""
    with mixed_precision(packs[0].bytes.device):
        total = sum(F.cross_entropy(model(pack), pack.targets, reduction="sum").item() for pack in packs)
    return total * BITS / sum(len(pack.targets) for pack in packs)


def write_results(runs, folder):
    """losses.csv and losses.png; their paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    text, png = io.StringIO(), io.BytesIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "step", "training bits a byte", "validation bits a byte"])
    writer.writerows((name, *line) for name, losses in runs for line in losses)

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name, losses in runs:
        steps, training, validation = zip(*losses)
        (line,) = axes.plot(steps, validation, marker="o", label=f"{name}: held-out topics")
        axes.plot(steps, training, linestyle=":", color=line.get_color(), label=f"{name}: training, mean since last")
    axes.set(xlabel="step", ylabel="loss, bits a byte", title="Language model on Python's language reference")
    axes.grid(alpha=0.4)
    axes.legend()
    figure.tight_layout()
    figure.savefig(png, dpi=90)
    pyplot.close(figure)
    files = folder / "losses.csv", folder / "losses.png"
    for file, content in zip(files, (text.getvalue(), png.getvalue())):
        write_aside(file, content)
    return files


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
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps of a run (default 600)")
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
