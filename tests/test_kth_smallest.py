"""kth_smallest against numpy's sort."""

import math

import numpy as np
import pytest
import torch

from ire import kth_smallest


def by_sorting(tensors, k):
    """NaN sorts last in numpy; float64 holds all the other types exactly."""
    return np.sort(np.concatenate([t.double().numpy().ravel() for t in tensors]))[k - 1]


def check_every_rank(tensors):
    for k in range(1, sum(t.numel() for t in tensors) + 1):
        np.testing.assert_equal(float(kth_smallest(tensors, k)), by_sorting(tensors, k))


SPECIAL = torch.tensor([5e-324, 1e-45, 1e-40, 3e38, math.inf, math.nan], dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_every_rank(dtype):
    """Ties, zeros, denormals, huge ranges, a scalar and tensors without elements."""
    values = torch.cat([torch.zeros(5), torch.rand(40).double() ** 60, torch.ones(7), SPECIAL])
    values = values.to(dtype)
    check_every_rank([values[:20].view(4, 5), torch.empty(0, 3, dtype=dtype), values[20:]])
    check_every_rank([values[-1], values[:3]])


def test_every_rank_of_mixed_dtypes():
    half, single = torch.rand(9).half() ** 3, torch.rand(9) ** 20
    check_every_rank([half, single, half.bfloat16(), SPECIAL.float()])
    check_every_rank([half, single, SPECIAL, single.double() ** 3])


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


@pytest.mark.parametrize("k", [0, 4])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match=f"k: got {k}, allowed is 1 to n = 3"):
        kth_smallest([torch.ones(3)], k)
