"""The example that generates text: what it reads from its caches is what the full forward computes."""

import sys
from pathlib import Path

import pytest
import torch

import nsa

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import generate
import train_lm as lm

CPU = torch.device("cpu")
PROMPTS = (3, 150, 64, 20)  # bytes; one has no window at first, one goes in by three chunks
LENGTH = 60


def compare(block, stride):
    """(compressed rows with other bits, all of them), (difference of logits, allowed); the order of the pages."""
    config = lm.Config(heads=2, head_dim=16, block=block, stride=stride)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model, cached = lm.Model(config), lm.Model(config, attention=generate.CachedAttention)
    for parameter in model.parameters():  # unlike at the start of training, branches and rows of a window all matter
        torch.nn.init.normal_(parameter, std=0.2)
    cached.load_state_dict(model.state_dict())
    prompts = [bytes(torch.randint(256, (size,), generator=generator).tolist()) for size in PROMPTS]
    caches = generate.Caches(cached, config, len(prompts), max(PROMPTS) + LENGTH, CPU, generator)
    texts, logits, _ = generate.generate(cached, caches, prompts, LENGTH, CPU, lambda logits: logits.argmax(-1))
    assert [len(text) for text in texts] == [size + LENGTH for size in PROMPTS]
    assert all(text.startswith(prompt) for text, prompt in zip(texts, prompts))
    assert len(logits) == sum(PROMPTS) + len(PROMPTS) * (LENGTH - 1)
    windows = generate.count_wrong_windows(caches)
    return windows, generate.compare_logits(logits, model, texts, config, CPU), caches.rows.pages


@pytest.mark.parametrize(("block", "stride"), [(16, 16), (48, 16), (128, 32)])
def test_caches_and_logits_are_those_of_the_full_forward(block, stride):
    (wrong, total), (difference, allowed), pages = compare(block, stride)
    rows = [size + LENGTH - 1 for size in PROMPTS]  # the last byte goes nowhere
    assert total == 2 * 2 * sum(max(0, 1 + (n - block) // stride) for n in rows)  # keys and values, two layers
    assert wrong == 0
    assert difference <= allowed < 1e-4
    used = pages[pages >= 0]
    assert len(used.unique()) == len(used) == sum(-(-n // generate.PAGE) for n in rows)
    assert (pages.diff(dim=1) != 1).any()  # they do not lie one behind the other


def left_out(*args, cache, **kwargs):
    return cache


def into_the_next_row(pages, weight, rows, *sizes, cache, op, **kwargs):
    """In decode the slots are shifted, in prefill what is written."""
    if rows.ndim == 1:
        rows = torch.where(rows < 0, rows, (rows + 1) % len(cache))
        return op(pages, weight, rows, *sizes, cache=cache, **kwargs)
    op(pages, weight, rows, *sizes, cache=cache, **kwargs)
    return cache.copy_(cache.flatten(0, 1).roll(1, 0).view_as(cache))


@pytest.mark.parametrize("name", ["nsa_compress_infer", "nsa_compress_append"])
@pytest.mark.parametrize("broken", [left_out, into_the_next_row])
def test_a_window_in_no_place_or_another_is_found(name, broken, monkeypatch):
    op = getattr(nsa, name)
    options = {} if broken is left_out else {"op": op}
    monkeypatch.setattr(generate.nsa, name, lambda *args, **kwargs: broken(*args, **kwargs, **options))
    (wrong, _), (difference, allowed), _ = compare(16, 16)
    assert wrong
    assert difference > 100 * allowed


def test_a_row_in_another_place_is_found(monkeypatch):
    """The caches agree with each other then, and not with the model."""
    real = generate.Step.__init__

    def shifted(self, *args):
        real(self, *args)
        self.near = (self.near + 1) % generate.PAGE

    monkeypatch.setattr(generate.Step, "__init__", shifted)
    (wrong, _), (difference, allowed), _ = compare(16, 16)
    assert not wrong
    assert difference > 100 * allowed


@pytest.fixture
def short_topics(monkeypatch):
    topics = [bytes(range(32, 127)) * 3] * 4
    monkeypatch.setattr(lm, "read_topics", lambda: (topics, topics))


def test_trains_once_and_generates_the_same_text_again(short_topics, monkeypatch, tmp_path, capsys):
    arguments = ["--steps", "1", "--length", "40", "--out", str(tmp_path)]
    generate.main(arguments)
    first = capsys.readouterr().out
    prompts = [bytes(range(32, 127)) * 3] * 2
    for prompt, size in zip(prompts, generate.PROMPTS):
        assert f"[[{prompt[:size].decode()}]]" in first
    # 40 bytes after prompts of 75 and 139, but for the last one: 7 and 11 windows
    assert "compressed keys and values in the caches: 72, with other bits than nsa_compress gives: 0\n" in first
    assert "logits of 292 bytes: at most " in first
    assert [path.name for path in tmp_path.iterdir()] == ["steps-1-seed-0.pt"]
    monkeypatch.setattr(lm, "train_model", None)
    generate.main(arguments)
    again = capsys.readouterr().out
    assert [line for line in again.splitlines() if " ms a step" not in line] == [
        line for line in first.splitlines() if " ms a step" not in line
    ]
    generate.main([*arguments, "--prompt", "é", "--prompt", "ab", "--temperature", "0"])
    printed = capsys.readouterr().out
    assert printed.index("[[é]]") < printed.index("[[ab]]")


def test_a_difference_is_exit_code_1(short_topics, monkeypatch, tmp_path, capsys):
    arguments = ["--steps", "1", "--length", "20", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(generate.nsa, "nsa_compress_infer", left_out)
        with pytest.raises(SystemExit, match="the caches hold other compressed keys and values"):
            generate.main(arguments)
    monkeypatch.setattr(generate, "compare_logits", lambda *args: (float("nan"), 1e-5))
    with pytest.raises(SystemExit, match="the logits are not those of the full forward"):
        generate.main(arguments)
    assert "at most nan from the full forward, 1e-05 allowed" in capsys.readouterr().out


def test_a_model_of_another_training_is_refused(short_topics, tmp_path):
    generate.trained(lm.Config(heads=1, layers=1), 1, CPU, tmp_path)
    with pytest.raises(SystemExit, match=r"expected a model made by .*'heads': 4.*, got .*'heads': 1"):
        generate.main(["--steps", "1", "--out", str(tmp_path)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length", "0"], "--length: expected a number from 1 on, got 0"),
        (["--steps", "0"], "--steps: expected a number from 1 on, got 0"),
        (["--temperature", "-1"], "--temperature: expected a number from 0 on, got -1.0"),
        (["--temperature", "nan"], "--temperature: expected a number from 0 on, got nan"),
        (["--prompt", "a", "--prompt", ""], "--prompt: expected at least one byte, got none"),
        (["--device", "cuda"], "--device cuda: PyTorch finds no such device here"),
    ],
)
def test_what_cannot_run_is_an_error(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        generate.main(arguments)
    assert message in capsys.readouterr().err
