"""The reference against the definition, written once more as plain loops, and against finite differences."""

import torch

from nsa.reference import nsa_compress


def test_by_hand():
    # two segments of 3 and 5 rows, block 2, stride 1: sizes the op would refuse, easy to follow
    x = torch.tensor([1.0, 2, 3, 10, 20, 30, 40, 50])[:, None, None]
    weight = torch.tensor([[1.0], [100]])
    y = nsa_compress(x, weight, 2, 1, actual_seq_len=(3, 8))
    assert y.flatten().tolist() == [201, 302, 2010, 3020, 4030, 5040]


def test_is_the_formula():
    x, weight = torch.randn(9, 2, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    y = nsa_compress(x, weight, 4, 2, actual_seq_len=[9])
    for w in range(3):
        for n in range(2):
            for d in range(3):
                expected = sum(weight[j, n] * x[2 * w + j, n, d] for j in range(4))
                torch.testing.assert_close(y[w, n, d], expected)
    assert len(y) == 3


def test_specification_example():
    x, weight = torch.randn(256, 8, 128).half(), torch.randn(64, 8).half()
    y = nsa_compress(x, weight, 64, 16, actual_seq_len=(80, 176, 256))
    assert y.shape == (7, 8, 128)
    assert y.dtype == torch.float16


def test_no_window():
    x, weight = torch.randn(5, 1, 16, requires_grad=True), torch.randn(16, 1, requires_grad=True)
    y = nsa_compress(x, weight, 16, 16, actual_seq_len=[5])
    assert y.shape == (0, 1, 16)


def test_gradcheck():
    x = torch.randn(9, 2, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: nsa_compress(x, w, 4, 2, actual_seq_len=[3, 9]), (x, weight))
