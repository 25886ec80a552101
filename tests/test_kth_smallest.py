"""kth_smallest against numpy's sort."""

import math

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ire import kth_smallest


def by_sorting(tensors, k):
    """NaN sorts last in numpy; float64 holds all the other types exactly."""
    return np.sort(np.concatenate([t.detach().double().numpy().ravel() for t in tensors]))[k - 1]


def same(got, expected):
    return math.isnan(got) and math.isnan(expected) or float(got) == float(expected)


@st.composite
def lists_of_tensors(draw):
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
    values = st.one_of(
        st.floats(0), st.sampled_from([0.0, 1.0, 5e-324, 1e-45, 1e-40, math.inf, math.nan])
    )
    shape = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)
    with np.errstate(over="ignore"):
        tensors = [
            torch.tensor(draw(hnp.arrays(np.float64, draw(shape), elements=values))).to(
                draw(dtypes)
            )
            for _ in range(draw(st.integers(1, 4)))
        ]
    return tensors


@given(lists_of_tensors(), st.data())
@settings(max_examples=100, deadline=None)
def test_any_tensors(tensors, data):
    n = sum(t.numel() for t in tensors)
    if n == 0:
        with pytest.raises(ValueError, match="k: got 1, allowed is 1 to"):
            kth_smallest(tensors, 1)
        return
    k = data.draw(st.integers(1, n))
    assert same(kth_smallest(tensors, k), by_sorting(tensors, k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_every_rank(dtype):
    """Ties, zeros, denormals, huge ranges: each k."""
    special = torch.tensor([math.inf, math.nan, 3e38])
    values = torch.cat([torch.zeros(5), torch.rand(40) ** 20, torch.ones(7), special])
    values = (values.double() ** 3 if dtype == torch.float64 else values).to(dtype)
    for k in range(1, len(values) + 1):
        assert same(kth_smallest([values[:20], values[20:]], k), by_sorting([values], k))


def test_float64_is_not_rounded():
    x = torch.tensor([1.0, 1.0 + 2**-40, 1.0 + 2**-50], dtype=torch.float64)
    assert kth_smallest([x], 2).dtype == torch.float64 and kth_smallest([x], 2) == x[2]
    assert kth_smallest([torch.ones(3), x], 5) == x[2]  # float32 beside float64: no rounding either


def test_layouts():
    x = torch.rand(4, 6, 5, 5)
    last = x.to(memory_format=torch.channels_last)
    for y in (last, x.permute(3, 1, 0, 2), x[:, ::2], x[:1].expand(4, 6, 5, 5)):
        assert kth_smallest([y], 100) == by_sorting([y], 100)


def test_more_elements_than_float32_counts():
    """2^24 + 3 in one bin, which a float32 counter (or torch.quantile) would lose."""
    ones = torch.ones(1).expand(2**24 + 3)
    tensors = [ones, torch.zeros(2), torch.full((1,), 2.0)]
    assert [float(kth_smallest(tensors, 2**24 + k)) for k in (5, 6)] == [1, 2]


def test_signs_are_ignored_and_input_stays():
    x = torch.tensor([-0.0, -3.0, 2.0])
    assert [float(kth_smallest([x], k)) for k in (1, 2, 3)] == [0, 2, 3]
    assert torch.equal(x, torch.tensor([-0.0, -3.0, 2.0]))


@pytest.mark.parametrize("k", [0, 4, -1])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match=r"k: got .*, allowed is 1 to .*3"):
        kth_smallest([torch.ones(3)], k)
