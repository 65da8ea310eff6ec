"""Many and long packs through a few kernels, and the largest shape: what only native code is fast enough for."""

import pytest
import torch
from cases import NAMED, Case
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import check, machine

SIZES = [(32, 16, 3, 32, torch.bfloat16), (128, 16, 2, 64, torch.float16), (80, 48, 1, 16, torch.bfloat16)]
LENGTHS = st.lists(st.integers(0, 100) | st.integers(0, 3000), min_size=1, max_size=40).filter(lambda some: some[0] > 0)


@pytest.mark.parametrize("family", ["vector", "cube"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@settings(max_examples=15)
@given(lengths=LENGTHS, programs=st.integers(1, 50), seed=st.integers(0, 99))
def test_many_lengths(lengths, programs, seed, guarded, family, sizes):
    check(Case(tuple(lengths), *sizes, seed), guarded, family, machine(programs, interpreted=False))


@pytest.mark.parametrize("family", ["vector", "cube"])
def test_largest(guarded, family):
    check(NAMED["largest"], guarded, family, machine(4, interpreted=False))
