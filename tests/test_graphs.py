"""What Inductor is told of the ops, for the CUDA graphs that it makes with mode="reduce-overhead"."""

import pytest
import torch
from torch._inductor.utils import get_first_incompatible_cudagraph_node

import nsa  # noqa: F401

OPS = [torch.ops.nsa.nsa_compress, torch.ops.nsa.nsa_compress_grad_input, torch.ops.nsa.nsa_compress_grad_weight]
OPS += [torch.ops.nsa._compress_infer]


def kept_out(op):
    graph = torch.fx.Graph()
    call = graph.call_function(op.default, tuple(graph.placeholder(name) for name in "ab"))
    graph.output(call)
    node = get_first_incompatible_cudagraph_node(torch.fx.GraphModule(torch.nn.Module(), graph))
    assert node in (None, call)
    return node is call


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.default._schema.name)
def test_inductor_keeps_the_ops_out_of_its_graphs(op):
    assert kept_out(op) == hasattr(torch.Tag, "cudagraph_unsafe")  # before 2.9 it cannot be told
    assert torch.Tag.pt2_compliant_tag in op.default.tags


def test_what_has_its_lengths_on_the_device_may_be_in_a_graph():
    for op in (torch.ops.nsa.nsa_compress_append, torch.ops.nsa._compress_append):
        assert not kept_out(op)
        assert torch.Tag.pt2_compliant_tag in op.default.tags
