"""torch.vmap where parts have weights of their own: small ones share calls of the op, large ones are not copied."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from nsa import batching, cpu

ROWS, HEADS, D = 64, 3, 16
PART = ROWS * HEADS * D * 8  # bytes, fp64
OPS = {
    "forward": (torch.ops.nsa.nsa_compress, 0, 1),
    "grad_input": (torch.ops.nsa.nsa_compress_grad_input, 2, 1),
    "grad_weight": (torch.ops.nsa.nsa_compress_grad_weight, 2, 0),
}


@pytest.mark.parametrize(
    ("copied", "calls"),
    [
        (1, {"forward": 5, "grad_weight": 5, "grad_input": 1}),
        (2 * PART, {"forward": 3, "grad_weight": 3, "grad_input": 1}),
        (5 * PART, {"forward": 1, "grad_weight": 1, "grad_input": 1}),
    ],
)
@pytest.mark.parametrize("name", OPS)
def test_no_call_copies_more_rows_than_pay(name, copied, calls, monkeypatch):
    op, *chosen = OPS[name]
    seen = []
    backend = getattr(cpu, name)
    monkeypatch.setattr(cpu, name, lambda *args: seen.append(args[0].shape) or backend(*args))
    monkeypatch.setattr(batching, "COPIED", copied)
    shapes = ((5, ROWS, HEADS, D), (5, 32, HEADS), (5, 3, HEADS, D))
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    a, b = (tensors[i] for i in chosen)

    def call(a, b):
        return op(a, b, 32, 16, actual_seq_len=[ROWS])

    batched = torch.vmap(call)(a, b)
    assert len(seen) == calls[name]
    torch.testing.assert_close(batched, torch.stack([call(*part) for part in zip(a, b)]), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # the compiler's own
def test_compiled_with_an_open_number_of_rows():
    torch._dynamo.reset()

    def call(x, weight):
        return torch.ops.nsa.nsa_compress(x, weight, 32, 16, actual_seq_len=[x.shape[0]])

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(torch.vmap(call), dynamic=True, fullgraph=True, backend=counter)
    for rows in (64, 96, 16384):  # of the last, a part is more than is copied
        x, weight = torch.randn(5, rows, 2, 16), torch.randn(5, 32, 2)
        torch.testing.assert_close(compiled(x, weight), torch.vmap(call)(x, weight))
    assert counter.frame_count == 1
