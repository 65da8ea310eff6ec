"""The example: what its model may see, that the compression learns, and what the command writes."""

import csv
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parent.parent / "examples" / "train_lm.py"
spec = importlib.util.spec_from_file_location("train_lm", PATH)
train_lm = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train_lm)

CONFIG = train_lm.Config(layers=1)
LENGTHS = (70, 3, 60)  # rows of the segments; one has no window
CPU = torch.device("cpu")


def pack_of(text):
    segments, begin = [], 0
    for length in LENGTHS:
        segments.append(bytes(text[begin : begin + length + 1]))
        begin += length + 1
    return train_lm.Pack(segments, CONFIG, CPU)


@pytest.fixture
def text():
    return torch.randint(256, (sum(LENGTHS) + len(LENGTHS),), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return train_lm.Model(CONFIG)


def test_windows_are_those_of_the_op(text):
    pack = pack_of(text)
    assert pack.last.tolist() == [15, 31, 47, 63, 73 + 15, 73 + 31, 73 + 47]
    assert pack.sees_window[14].tolist() == [True] + 7 * [False]
    assert pack.sees_window[15].tolist() == [True, True] + 6 * [False]
    assert pack.sees_window[132].tolist() == [True] + 4 * [False] + 3 * [True]
    # row 75 is in chunk 4, rows 64 to 79, after chunk 3; its segment begins at row 73
    assert (48 + pack.sees_row[4, 11].nonzero().flatten()).tolist() == [73, 74, 75]
    assert (32 + pack.sees_row[3, 15].nonzero().flatten()).tolist() == list(range(48, 64))


def test_a_row_sees_neither_later_rows_nor_other_segments(text, model):
    before = model(pack_of(text))
    for row, changed in ((20, range(20, 70)), (71, range(71, 73)), (100, range(100, 133))):
        spoilt = list(text)
        at = row + (row >= 70) + (row >= 73)  # a segment of n rows has n + 1 bytes
        spoilt[at] = (text[at] + 1) % 256
        differs = (model(pack_of(spoilt)) != before).any(1).nonzero().flatten().tolist()
        assert differs[0] == row
        assert set(differs) <= set(changed)


def test_the_compressed_branch_reaches_far(text):
    """Further than the sliding branch, and by the weights of the compression."""
    for compress in (True, False):
        torch.manual_seed(0)
        model = train_lm.Model(CONFIG, compress)
        spoilt = [text[0] ^ 1, *text[1:]]
        differs = (model(pack_of(spoilt)) != model(pack_of(text))).any(1)
        assert differs[60] == compress
        model(pack_of(text)).square().mean().backward()
        for weight in (model.blocks[0].attention.weight_k, model.blocks[0].attention.weight_v):
            assert (weight.grad is not None) == compress
            assert not compress or weight.grad.abs().max() > 0


def test_rows_that_see_no_window_stay_finite(text, model):
    model(pack_of(text)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_trains_under_autocast_as_on_an_accelerator(monkeypatch):
    """There activations are bf16, parameters and their gradients fp32; here on the CPU, whose loop has no autocast."""
    assert not train_lm.mixed_precision(CPU)._enabled
    monkeypatch.setattr(train_lm, "mixed_precision", lambda device: torch.autocast("cpu", dtype=torch.bfloat16))
    seen = []
    real = train_lm.Attention.windows
    monkeypatch.setattr(
        train_lm.Attention, "windows", lambda self, x, *rest: seen.append(x.dtype) or real(self, x, *rest)
    )
    topics = [bytes(range(32, 127)) * 3] * 2
    monkeypatch.setattr(train_lm, "read_topics", lambda: (topics, topics[:1]))
    _, losses = train_lm.train(CONFIG, True, 12, 0, CPU)
    assert losses[-1][1] < losses[0][1] - 1  # bits a byte
    assert torch.bfloat16 in seen


def test_topics_are_held_out():
    training, held_out = train_lm.read_topics()
    assert min(map(len, (training, held_out))) > 5
    paragraphs = {p.strip() for topic in held_out for p in topic.split(b"\n\n")}
    assert not paragraphs & {p.strip() for topic in training for p in topic.split(b"\n\n")} - {b""}
    packs = train_lm.cut_into_packs(held_out, CONFIG)
    assert sum(len(piece) - 1 for pack in packs for piece in pack) == sum(len(topic) - 1 for topic in held_out)
    assert max(sum(len(piece) - 1 for piece in pack) for pack in packs) <= CONFIG.rows


def test_compare_writes_plot_and_table(monkeypatch, tmp_path, capsys):
    topics = [bytes(range(32, 127)) * 3] * 2
    monkeypatch.setattr(train_lm, "read_topics", lambda: (topics, topics[:1]))
    train_lm.main(["--compare", "--steps", "3", "--out", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["losses.csv", "losses.png"]
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    lines = list(csv.reader((tmp_path / "losses.csv").read_text().splitlines()))
    assert [line[:2] for line in lines[1:]] == [
        [n, s] for n in ("sliding and compressed", "sliding only") for s in "123"
    ]
    printed = capsys.readouterr().out
    assert f"sliding only            {float(lines[-1][3]):.3f} bits a byte" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda"], "--device cuda: PyTorch finds no such device here"),
        (["--device", "npu"], "--device npu: torch_npu is missing"),
        (["--steps", "0"], "--steps: expected at least 1, got 0"),
    ],
)
def test_what_cannot_run_is_an_error(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    with pytest.raises(SystemExit, match="2"):
        train_lm.main(arguments)
    assert message in capsys.readouterr().err
