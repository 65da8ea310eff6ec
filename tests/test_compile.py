"""torch.compile, torch.export, AOTInductor and make_fx: what they make equals eager, for other lengths too."""

import io
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

import nsa

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),  # the compiler's own
    pytest.mark.filterwarnings("ignore:Skipping serialization:UserWarning"),  # likewise, of torch 2.6
]
OPS = [
    getattr(packet, overload)
    for packet in (
        torch.ops.nsa.nsa_compress,
        torch.ops.nsa.nsa_compress_grad_input,
        torch.ops.nsa.nsa_compress_grad_weight,
    )
    for overload in ("default", "offsets")
]


class Pool(torch.nn.Module):
    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(32, 3, dtype=dtype))

    def forward(self, x, seq, n_windows=None):
        return nsa.nsa_compress(2 * x, self.weight, 32, 16, actual_seq_len=seq, n_windows=n_windows).relu()


class PoolCumulative(Pool):
    """Reads the ends from `cu_seqlens`, as training code has it."""

    def forward(self, x, cu_seqlens):
        return super().forward(x, cu_seqlens[1:].tolist())


def rows(t, seed=0):
    return torch.randn(t, 3, 16, generator=torch.Generator().manual_seed(seed)).bfloat16()


def ends(segments, t, seed=0):
    generator = random.Random(seed)
    return [*sorted(generator.randrange(1, t) for _ in range(segments - 1)), t]


def check(module, compiled, *args):
    """Values and both gradients, bit for bit."""
    results = []
    for function in (module, compiled):
        x = args[0].clone().requires_grad_()
        y = function(x, *args[1:])
        results.append((y, *torch.autograd.grad(y.float().square().sum(), (x, module.weight))))
    for eager, other in zip(*results):
        assert torch.equal(eager, other)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_module_equals_eager(dynamic, request):
    module = Pool()
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic)
    for t, seq in ((96, [40, 96]), (96, [50, 96]), (112, [64, 112]), (100, [7, 100])):
        check(module, compiled, rows(t), seq)
    # what ran was compiled in this run: an older cache has code made with the shapes of older fake kernels
    assert any(Path(request.config.inductor_cache).rglob("*.py"))


def test_only_pt2_compliant_ops_are_allowed():
    """A setting of PyTorch, under which an op without the tag breaks the graph."""
    with torch._dynamo.config.patch(only_allow_pt2_compliant_ops=True):
        compiled = torch.compile(Pool(), fullgraph=True, backend="eager")
        assert compiled(rows(96), [40, 96]).shape == (3, 3, 16)
    assert all(torch.Tag.pt2_compliant_tag in op.tags for op in OPS)


def test_new_offsets_run_the_graph_that_is_there():
    counter = CompileCounter()
    compiled = torch.compile(Pool(), fullgraph=True, dynamic=True, backend=counter)
    for end in range(33, 63):
        compiled(rows(96), [end, 96])
    assert counter.frame_count == 1


@pytest.mark.parametrize("segments", [8, 9, 256])  # the most of which T' is an expression, and more
def test_one_graph_for_changed_lengths(segments):
    counter = CompileCounterWithBackend("aot_eager")
    module = Pool()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    begin = time.process_time()
    for seed in range(4):
        t = 24 * segments + seed
        check(module, compiled, rows(t), ends(segments, t, seed))
    assert counter.frame_count == 1
    # 2 s for 256 segments; minutes, if T' were a sum of 256 terms
    assert time.process_time() - begin < 20


@pytest.mark.parametrize("with_n_windows", [False, True])
def test_one_graph_for_any_number_of_segments_in_a_tensor(with_n_windows):
    counter = CompileCounterWithBackend("aot_eager")
    module = Pool()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for segments in range(4, 16):
        seq = ends(segments, 40 * segments, segments)
        known = (nsa.count_windows(seq, 32, 16),) if with_n_windows else ()
        check(module, compiled, rows(40 * segments), torch.tensor(seq), *known)
    assert counter.frame_count == 1


def test_inductor_with_lengths_in_a_tensor():
    module = Pool()
    compiled = torch.compile(module, fullgraph=True)
    for segments in range(4, 8):
        check(module, compiled, rows(40 * segments), torch.tensor(ends(segments, 40 * segments)))


@pytest.mark.parametrize(
    "form",
    [
        np.array,
        lambda seq: np.array(seq, dtype=np.int32),
        lambda seq: [np.int64(end) for end in seq],
        lambda seq: (np.int32(seq[0]), *seq[1:]),
        lambda seq: torch.tensor(seq, dtype=torch.int32),
        lambda seq: torch.tensor(seq, dtype=torch.int16),
        tuple,
    ],
    ids=["array", "int32 array", "numpy integers", "mixed integers", "int32 tensor", "int16 tensor", "tuple"],
)
def test_every_form_of_lengths(form):
    module = Pool()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for seq in ([40, 96], [50, 96], [50, 70, 96]):
        check(module, compiled, rows(96), form(seq))


@pytest.mark.parametrize("seq", [[np.float64(40), np.int64(96)], [True, 96], np.array([40.0, 96]), "40"])
def test_other_forms_stay_errors(seq):
    compiled = torch.compile(Pool(), backend="eager")
    with pytest.raises(TypeError, match="actual_seq_len must be a tuple or list of ints"):
        compiled(rows(96), seq)


def test_lengths_by_tolist():
    module = PoolCumulative()
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
        for seq in ([40, 96], [50, 96], [7, 100]):
            check(module, compiled, rows(seq[-1]), torch.tensor([0, *seq]))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("seq", "message"),
    [
        ([60, 40, 96], "must be non-decreasing, got 60 then 40 at index 1"),
        ([0, 40, 96], "got 0 at index 0. If it is the leading 0"),
        ([30, 40, 95], r"the last element of actual_seq_len must equal T = .*, got (95|s\d+)"),
    ],
)
@pytest.mark.parametrize("form", [torch.tensor, list])
def test_wrong_values_are_found_in_the_run(form, seq, message):
    """A graph made with right lengths gets wrong ones."""
    compiled = torch.compile(Pool(), fullgraph=True, dynamic=True, backend="aot_eager")
    compiled(rows(96), form([30, 40, 96]))
    with pytest.raises(RuntimeError, match=message):
        compiled(rows(96), form(seq))


def test_wrong_number_of_windows_is_found_in_the_run():
    compiled = torch.compile(Pool(), fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="n_windows must be T' = 3, got 4"):
        compiled(rows(96), torch.tensor([40, 96]), 4)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo's own
@pytest.mark.parametrize("capture", [False, True])
def test_op_that_runs_eagerly_under_a_compiled_caller(capture):
    """Dynamo looks into every Python function below what it compiles, the op's own too unless it is told not to."""
    weight = Pool().weight

    @torch.compiler.disable(recursive=False)
    def eager(x, cu_seqlens):
        return torch.ops.nsa.nsa_compress(x, weight, 32, 16, actual_seq_len=cu_seqlens[1:].tolist())

    def step(x, cu_seqlens):
        return eager(x + 1, cu_seqlens) * 2

    with torch._dynamo.config.patch(capture_scalar_outputs=capture):
        torch._dynamo.utils.clear_compilation_metrics()
        compiled = torch.compile(step, backend="eager", dynamic=True)
        for seq in ([40, 96], [50, 96], [7, 100]):
            args = rows(seq[-1]), torch.tensor([0, *seq])
            y = compiled(*args)
            assert torch.equal(y, step(*args))
            y.float().sum().backward()
    traced = [Path(metric.co_filename).parent for metric in torch._dynamo.utils.get_compilation_metrics()]
    assert Path(__file__).parent in traced
    assert Path(nsa.__file__).parent not in traced


EXPORTED = {
    "list": (Pool, lambda seq: seq, [Dim.AUTO, Dim.AUTO]),
    "tensor": (Pool, torch.tensor, {0: Dim.AUTO}),
    "tolist": (PoolCumulative, lambda seq: torch.tensor([0, *seq]), None),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("form", EXPORTED)
def test_exported_saved_and_loaded(form, strict):
    kind, make, shape = EXPORTED[form]
    module = kind()
    program = torch.export.export(
        module, (rows(96), make([40, 96])), dynamic_shapes=({0: Dim.AUTO}, shape), strict=strict
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    lengths = [[50, 96], [77, 200]] + ([[20, 50, 96], [200]] if form == "tensor" else [])
    for seq in lengths:
        x = rows(seq[-1])
        assert torch.equal(loaded(x, make(seq)), module(x, make(seq)))


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning")  # its own
@pytest.mark.parametrize("form", ["tensor", "tolist"])  # a package of AOTInductor takes tensors alone
def test_aot_inductor(form, tmp_path):
    kind, make, shape = EXPORTED[form]
    module = kind().eval()
    program = torch.export.export(module, (rows(96), make([40, 96])), dynamic_shapes=({0: Dim.AUTO}, shape))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "pool.pt2"))
    loaded = torch._inductor.aoti_load_package(path)
    for seq in ([50, 96], [77, 200]):
        assert torch.equal(loaded(rows(seq[-1]), make(seq)), module(rows(seq[-1]), make(seq)))


def test_make_fx_keeps_symbolic_lengths():
    weight = Pool().weight.detach()

    def function(x, weight, end):
        return nsa.nsa_compress(x, weight, 32, 16, actual_seq_len=[end, x.shape[0]])

    graph = make_fx(function, tracing_mode="symbolic")(rows(96), weight, 40)
    for seq in ([50, 96], [77, 200]):
        x = rows(seq[-1])
        assert torch.equal(graph(x, weight, seq[0]), function(x, weight, seq[0]))


def test_tracers_see_plain_ints():
    """Of any number: a tensor would hide them, and with them T'."""
    weight, seq = Pool().weight.detach(), list(range(40, 4001, 40))
    function = lambda x, weight: nsa.nsa_compress(x, weight, 32, 16, actual_seq_len=seq)  # noqa: E731
    graph = make_fx(function, tracing_mode="symbolic")(rows(4000), weight)
    assert torch.equal(graph(rows(4000), weight), function(rows(4000), weight))
    with torch._subclasses.FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in (rows(4000), weight)]
        assert function(*fake).shape == (100, 3, 16)
    assert function(*fake).shape == (100, 3, 16)  # out of the mode


def test_two_calls_with_the_same_lengths_fit_together():
    """Keys and values: their numbers of windows are the same, though a tracer sees neither."""
    weight = Pool().weight.detach().float()

    def attend(q, k, v, seq):
        k, v = (torch.ops.nsa.nsa_compress(t, weight, 32, 16, actual_seq_len=seq) for t in (k, v))
        return (torch.einsum("tnd,wnd->ntw", q, k).softmax(-1) @ v.transpose(0, 1)).transpose(0, 1)

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for segments in (4, 12):
        t = 40 * segments
        q, k, v = (rows(t, seed).float() for seed in range(3))
        seq = ends(segments, t)
        for form in (seq, torch.tensor(seq)):
            torch.testing.assert_close(compiled(q, k, v, form), attend(q, k, v, form))


@pytest.mark.parametrize("segments", [3, 12])
@pytest.mark.parametrize("form", [list, torch.tensor])
def test_attention_over_windows_by_inductor(form, segments):
    """Inductor wants to know whether sizes that are multiplied are 1: `n_windows` says so where it sees no lengths."""
    weight = Pool().weight.detach().double()

    def attend(x, weight, seq, n_windows):
        kv = torch.ops.nsa.nsa_compress(x, weight, 32, 16, actual_seq_len=seq, n_windows=n_windows)
        q, kv = x.transpose(0, 1), kv.transpose(0, 1)
        return torch.nn.functional.scaled_dot_product_attention(q, kv, kv)

    compiled = torch.compile(attend, fullgraph=True)
    for seed in range(3):
        t = 40 * segments + seed
        seq = ends(segments, t, seed)
        results = []
        for function in (attend, compiled):
            x, w = rows(t).double().requires_grad_(), weight.clone().requires_grad_()
            y = function(x, w, form(seq), nsa.count_windows(seq, 32, 16))
            results.append((y, *torch.autograd.grad(y.square().sum(), (x, w))))
        for eager, other in zip(*results):
            torch.testing.assert_close(other, eager)


def test_windows_counted_in_the_graph():
    weight = Pool().weight.detach()

    def function(x, seq):
        n_windows = nsa.count_windows(seq, 32, 16)
        return nsa.nsa_compress(x, weight, 32, 16, actual_seq_len=seq, n_windows=n_windows)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for seq in ([40, 96], [50, 96]):
        assert torch.equal(compiled(rows(96), seq), function(rows(96), seq))


def test_a_changed_array_changes_no_gradient():
    module = Pool()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    grads = []
    for function in (module, compiled):
        seq, x = np.array([40, 96]), rows(96).requires_grad_()
        y = function(x, seq).float().sum()
        seq[0] = 60
        grads.append(torch.autograd.grad(y, x)[0])
    assert torch.equal(*grads)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # its own
@pytest.mark.parametrize("form", [list, torch.tensor])
def test_compiled_autograd(form):
    x, weight = rows(96).requires_grad_(), Pool().weight
    grads = []
    for compiled in (False, True):
        y = nsa.nsa_compress(x, weight, 32, 16, actual_seq_len=form([40, 96])).float().square().sum()
        x.grad = weight.grad = None
        if compiled:
            with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
                y.backward()
        else:
            y.backward()
        grads.append((x.grad, weight.grad))
    assert all(map(torch.equal, *grads))
