"""Let the language model of train_lm.py generate text, with keys and values in caches of pages, as serving engines do.

    python examples/generate.py --prompt 'The "assert" statement' --prompt 'Modules are' --length 200

trains the model if runs/generate has none yet, puts the prompts into the caches by chunks, and lets all of them grow by
one byte a step. The compressed branch reads what nsa_compress_append (prompts) and nsa_compress_infer (steps) have
written. At the end that is compared with one nsa_compress over the rows in the caches, and the logits with those of the
full forward; a difference beyond the bound is exit code 1. Without --prompt, prompts are beginnings of held-out topics.
"""

import argparse
import copy
import io
import math
import os
import sys
import time
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
import train_lm as lm

import nsa
from nsa.files import write_aside

PAGE = 32  # rows of a page of keys or values
WINDOWS_PAGE = 4  # windows of a page of compressed ones
CHUNK = 64  # rows of a prompt that go in at once
PROMPTS = (75, 139, 99, 210)  # bytes of held-out topics
TRAINING_SEED = 0


# ---- caches


class Table:
    """Which pages hold the rows of each sequence. They are taken as sequences grow, in a shuffled order: pages of a
    sequence are seldom neighbours in an engine that has run for a while."""

    def __init__(self, sequences, rows, page, generator):
        width = max(1, math.ceil(rows / page))
        self.page = page
        self.free = torch.randperm(sequences * width, generator=generator).tolist()
        self.pages = torch.full((sequences, width), -1)

    def grow(self, before, after):
        """Take the pages for sequences of `before` rows that get `after`."""
        for pages, a, b in zip(self.pages, before, after):
            for i in range(math.ceil(a / self.page), math.ceil(b / self.page)):
                pages[i] = self.free.pop()

    def places(self, sequence, row):
        """Where rows are among the rows of all pages; the first place for those without a page, which nobody sees."""
        return (self.pages[sequence, row // self.page] * self.page + row % self.page).clamp(min=0)


class Caches:
    """Tables, and for each layer's attention pages of keys [0] and values [1]: of the sliding branch, of the rows that
    are compressed, of the windows. Zeros at first, since also what is not seen is read, and must be finite."""

    def __init__(self, model, config, sequences, rows, device, generator):
        self.config, self.lengths = config, [0] * sequences
        self.rows = Table(sequences, rows, PAGE, generator)
        self.windows = Table(sequences, self.count_windows(rows), WINDOWS_PAGE, generator)
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16  # that of `mixed_precision`

        def pages(table):
            shape = (2, table.pages.numel(), table.page, config.heads, config.head_dim)
            return torch.zeros(shape, dtype=dtype, device=device)

        self.of = {b.attention: (pages(self.rows), pages(self.rows), pages(self.windows)) for b in model.blocks}

    def count_windows(self, rows):
        """Those that so many rows finish."""
        return max(0, 1 + (rows - self.config.block) // self.config.stride)


class Step:
    """The next rows of the sequences, in the place of a `Pack`: pieces of prompts of any lengths, or one byte each."""

    def __init__(self, caches, pieces, device, one_each):
        config, before = caches.config, caches.lengths
        self.lengths = caches.lengths = [length + len(piece) for length, piece in zip(before, pieces)]
        n_before, n_after = ([caches.count_windows(n) for n in lengths] for lengths in (before, self.lengths))
        caches.rows.grow(before, self.lengths)
        caches.windows.grow(n_before, n_after)
        sequence = torch.tensor([i for i, piece in enumerate(pieces) for _ in piece])[:, None]  # [R, 1]
        row = torch.cat([torch.arange(a, b) for a, b in zip(before, self.lengths)])[:, None]
        near = row - torch.arange(config.sliding)  # [R, rows]
        window = torch.arange(max(n_after))[None]  # [1, windows]
        sees_window = window * config.stride + config.block <= row + 1  # finished
        sees_window = F.pad(sees_window, (1, 0), value=True)  # and the window of zeros
        newest = enumerate(zip(n_before, n_after))
        slots = [int(caches.windows.places(i, b - 1)) if b > a else -1 for i, (a, b) in newest]  # -1: no new window

        self.caches, self.config, self.one_each = caches, config, one_each
        self.bytes = torch.tensor(list(b"".join(pieces)), device=device)
        self.row = row[:, 0].to(device)
        self.place = caches.rows.places(sequence, row)[:, 0].to(device)
        self.near = caches.rows.places(sequence, near.clamp(min=0)).to(device)
        self.sees_near = (near >= 0)[:, None, None].to(device)  # [R, heads, 1, rows]
        self.windows = caches.windows.places(sequence, window).to(device)
        self.sees_window = sees_window[:, None, None].to(device)
        self.tables = [table.pages.to(device) for table in (caches.rows, caches.windows)]
        self.before, self.after = (torch.tensor(lengths, device=device) for lengths in (before, self.lengths))
        self.slots = torch.tensor(slots, device=device)

    def compress(self, pages, weight, cache):
        """Write the windows that these rows have finished."""
        sizes, (rows, windows) = (self.config.block, self.config.stride, PAGE), self.tables
        if self.one_each:
            options = {"block_table": rows, "actual_seq_len": self.lengths, "cache": cache.flatten(0, 1)}
            nsa.nsa_compress_infer(pages, weight, self.slots, *sizes, **options)
        else:
            options = {"seq_len_before": self.before, "seq_len_after": self.after, "max_new_rows": CHUNK}
            nsa.nsa_compress_append(pages, weight, windows, *sizes, block_table=rows, cache=cache, **options)


class CachedAttention(lm.Attention):
    """Attention of the rows of a `Step`, which are written to the caches first."""

    def sliding(self, q, k, v, step):
        near, _, _ = step.caches.of[self]
        for pages, new in zip(near, (k, v)):
            pages.flatten(0, 1)[step.place] = new.to(pages.dtype)
        k, v = (rows_at(pages, step.near) for pages in near)
        return lm.attend(q[:, None], k, v, step.sees_near)[:, 0]

    def compressed(self, q, k, v, step):
        _, far, windows = step.caches.of[self]
        for pages, new, weight, cache in zip(far, (k, v), (self.weight_k, self.weight_v), windows):
            pages.flatten(0, 1)[step.place] = new.to(pages.dtype)
            step.compress(pages, weight, cache)
        k, v = (rows_at(cache, step.windows) for cache in windows)
        return lm.attend_windows(q[:, None], k, v, step.sees_window)[:, 0]


def rows_at(pages, places):
    return pages.flatten(0, 1)[places]


# ---- generation


@torch.no_grad()
def generate(model, caches, prompts, length, device, choose):
    """The prompts, each with `length` bytes more; logits (R, 256) of all bytes but the last ones; seconds a step."""
    texts, logits = list(prompts), [[] for _ in prompts]

    def advance(pieces, one_each):
        with lm.mixed_precision(device):
            rows = model(Step(caches, pieces, device, one_each))
        for of_sequence, new in zip(logits, rows.split([len(piece) for piece in pieces])):
            of_sequence.extend(new)

    for begin in range(0, max(map(len, prompts)), CHUNK):
        advance([prompt[begin : begin + CHUNK] for prompt in prompts], one_each=False)
    begin = time.monotonic()
    for i in range(length):
        if i:
            advance([text[-1:] for text in texts], one_each=True)
        chosen = choose(torch.stack([rows[-1] for rows in logits]).double().cpu())
        texts = [text + bytes([byte]) for text, byte in zip(texts, chosen.tolist())]
    seconds = (time.monotonic() - begin) / length
    return texts, torch.stack([row for rows in logits for row in rows]), seconds


@torch.no_grad()
def count_wrong_windows(caches):
    """How many compressed keys and values in the caches have other bits than one nsa_compress over the rows in the
    caches gives, and how many there are."""
    config, lengths, wrong, total = caches.config, caches.lengths, 0, 0
    rows = torch.cat([caches.rows.places(i, torch.arange(n)) for i, n in enumerate(lengths)])
    windows = [caches.windows.places(i, torch.arange(caches.count_windows(n))) for i, n in enumerate(lengths)]
    for attention, (_, far, kept) in caches.of.items():
        for pages, weight, cache in zip(far, (attention.weight_k, attention.weight_v), kept):
            x, found = rows_at(pages, rows), rows_at(cache, torch.cat(windows))
            sizes = {"actual_seq_len": list(accumulate(lengths))}
            # the registered op, which takes fp32
            expected = torch.ops.nsa.nsa_compress(x, weight.to(x.dtype), config.block, config.stride, **sizes)
            differs = found.view(torch.uint8) != expected.view(torch.uint8)
            wrong, total = wrong + int(differs.flatten(1).any(1).sum()), total + len(differs)
    return wrong, total


@torch.no_grad()
def compare_logits(logits, model, texts, config, device):
    """The largest difference from the logits of the full forward, and how large it may be.

    The full forward is off by some e from itself in fp64, by rounding alone. Generation adds the same terms in another
    order, and may be off by twice that: so the two differ by at most 3 e. Each text is a pack of its own, with rows
    counted from 0 as in the caches: rotary angles of other rows are rounded otherwise.
    """

    def full(model, device):
        return torch.cat([model(lm.Pack([text], config, device)) for text in texts]).double().cpu()

    with lm.mixed_precision(device):
        found = full(model, device)
    exact = full(copy.deepcopy(model).cpu().double(), torch.device("cpu"))
    return (logits.double().cpu() - found).abs().max().item(), 3 * (found - exact).abs().max().item()


# ---- the command


def trained(config, steps, device, folder):
    """The model, from its file; trained, and kept there, if it has none."""
    file = folder / f"steps-{steps}-seed-{TRAINING_SEED}.pt"
    made_by = {"config": asdict(config), "steps": steps, "seed": TRAINING_SEED}
    if not file.exists():
        model, _ = lm.train_model(config, True, steps, TRAINING_SEED, device, "training")
        content = io.BytesIO()
        torch.save({"made_by": made_by, "model": copy.deepcopy(model).cpu().state_dict()}, content)
        write_aside(file, content.getvalue())
        return model
    kept = torch.load(file, map_location="cpu", weights_only=True)
    if kept["made_by"] != made_by:
        sys.exit(f"{file}: expected a model made by {made_by}, got {kept['made_by']}; remove the file to train one")
    model = lm.Model(config)
    model.load_state_dict(kept["model"])
    return model.to(device)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Generate text with compressed attention read from caches of pages.")
    parser.add_argument("--prompt", type=os.fsencode, action="append", help="to go on from; may be given several times")
    parser.add_argument("--length", type=int, default=240, help="bytes that each prompt gets (default 240)")
    parser.add_argument("--temperature", type=float, default=0.5, help="0: always the likeliest byte (default 0.5)")
    parser.add_argument("--seed", type=int, default=0, help="of bytes drawn and of the order of pages (default 0)")
    parser.add_argument("--steps", type=int, default=600, help="that the model is trained for (default 600)")
    parser.add_argument("--device", choices=["cpu", "cuda", "npu"], default="cpu", help="where to run (default cpu)")
    parser.add_argument("--out", type=Path, default=Path("runs/generate"), help="folder of the trained model")
    args = parser.parse_args(argv)
    for name, least in (("length", 1), ("steps", 1), ("temperature", 0)):
        if not least <= getattr(args, name) < math.inf:
            parser.error(f"--{name}: expected a number from {least} on, got {getattr(args, name)}")
    if args.prompt and not all(args.prompt):
        parser.error("--prompt: expected at least one byte, got none")
    try:
        device = lm.check_device(args.device)
    except ValueError as error:
        parser.error(str(error))

    config = lm.Config()
    model = trained(config, args.steps, device, args.out)
    cached = lm.Model(config, attention=CachedAttention).to(device)
    cached.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(args.seed)

    def choose(logits):
        if args.temperature == 0:
            return logits.argmax(-1)
        return torch.multinomial((logits / args.temperature).softmax(-1), 1, generator=generator)[:, 0]

    prompts = args.prompt or [topic[:size] for topic, size in zip(lm.read_topics()[1][::3], PROMPTS)]
    caches = Caches(cached, config, len(prompts), max(map(len, prompts)) + args.length, device, generator)
    texts, logits, seconds = generate(cached, caches, prompts, args.length, device, choose)
    for prompt, text in zip(prompts, texts):
        shown = (part.decode(errors="backslashreplace") for part in (prompt, text[len(prompt) :]))
        print("[[{}]]{}\n".format(*shown))

    wrong, total = count_wrong_windows(caches)
    difference, allowed = compare_logits(logits, model, texts, config, device)
    print(f"{args.length} bytes for each of {len(prompts)} prompts, {seconds * 1e3:.1f} ms a step of one byte each")
    print(f"compressed keys and values in the caches: {total}, with other bits than nsa_compress gives: {wrong}")
    print(f"logits of {len(logits)} bytes: at most {difference:.2g} from the full forward, {allowed:.2g} allowed")
    if wrong and device.type == "cpu":  # elsewhere sums may go in another order
        sys.exit("the caches hold other compressed keys and values than nsa_compress gives")
    if not difference <= allowed:  # so that NaN is no success
        sys.exit("the logits are not those of the full forward")


if __name__ == "__main__":
    main()
