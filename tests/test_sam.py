"""SAM, ASAM and Average SAM as optimizers; their arithmetic is in test_oracle.py."""

import math
import warnings

import pytest
import torch
import torch.nn as nn
from torch.optim import SGD, AdamW
from training import backward, equal, make_model, values

from ire import SAM


def test_it_comes_back_to_the_exact_weights_also_when_the_closure_raises():
    model = make_model()
    opt = SAM(SGD(model.parameters(), 0.0), rho=10.0)
    before = values(model)
    losses = []

    def closure():
        opt.zero_grad()
        loss = backward(model)
        losses.append(loss.item())
        if len(losses) == 4:
            raise KeyError
        return loss

    with torch.no_grad():
        assert opt.step(closure) == losses[0] and losses[1] > losses[0]
    with pytest.raises(KeyError):
        opt.step(closure)
    assert equal(before, model.parameters())


def test_rho_by_group_and_changed_later():
    p, q = (nn.Parameter(torch.ones(1)) for _ in "pq")
    opt = SAM(SGD([{"params": [p]}, {"params": [q], "rho": 0.0}], 0.0), rho=2**0.5)
    seen = []

    def closure():
        seen.append((p.item(), q.item()))
        p.grad = torch.ones(1)
        q.grad = torch.ones(1)
        return torch.zeros(())

    opt.step(closure)
    opt.param_groups[0]["rho"] = 2 * 2**0.5
    opt.step(closure)
    assert seen[1] == pytest.approx((2, 1)) and seen[3] == pytest.approx((3, 1))
    opt.param_groups[0]["rho"] = math.nan
    with pytest.raises(ValueError, match="rho: got nan, allowed is a finite number >= 0"):
        opt.step(closure)


def test_average_sam_draws_xi_of_unit_mean_square_length():
    p = nn.Parameter(torch.zeros(20000))
    frozen = nn.Parameter(torch.zeros(20000), requires_grad=False)
    opt = SAM(SGD([p, frozen], 0.0), rho=0.5, average=True)
    seen = []

    def closure():
        opt.zero_grad()
        p.sum().backward()
        seen.append(p.detach().clone())
        assert not frozen.any()
        return torch.tensor(7.0)

    assert opt.step(closure) == 7 and opt.step(closure) == 7
    assert len(seen) == 2 and not torch.equal(*seen) and torch.equal(p.detach(), torch.zeros(20000))
    for x in seen:
        assert x.norm().item() == pytest.approx(0.5, rel=0.02) and abs(x.mean().item()) < 1e-4


@pytest.mark.parametrize(
    "gradient", [[math.nan, 1.0, 0.0], [math.inf, 1.0, 0.0], [0.0] * 3, [1e-24] * 3]
)
def test_bad_gradients(gradient):
    """What is not finite skips the step with a warning. 0, also by underflow, does not climb."""
    p = nn.Parameter(torch.ones(3))
    opt = SAM(AdamW([p], 0.1))

    def closure():
        assert p.tolist() == [1, 1, 1]
        p.grad = torch.tensor(gradient)
        return torch.tensor(1.0)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt.step(closure)
    bad = not all(map(math.isfinite, gradient))
    assert len(caught) == bad and p.isfinite().all() and bool(opt.state) != bad
    assert not bad or "SAM: skipped" in str(caught[0].message)


@pytest.mark.parametrize(
    "weight, gradient, adaptive",
    [(1, 300.0, False), (1, 1e-7, False), (0.01, 1e-4, True), (300, 300.0, True)],
)
def test_float16_neither_overflows_nor_underflows(weight, gradient, adaptive):
    """Of n = 1000 equal numbers n * g^2, rho / length, T * T * g and T * g are beyond float16."""
    p = nn.Parameter(torch.full((1000,), weight, dtype=torch.float16))
    opt = SAM(SGD([p], 0.0), rho=1.0, adaptive=adaptive)
    seen = []

    def closure():
        seen.append(p.detach().float())
        p.grad = torch.full_like(p, gradient)
        return torch.zeros(())

    opt.step(closure)
    assert torch.equal(p.detach(), torch.full_like(p, weight))
    climb = weight if adaptive else 1
    assert (seen[1] - seen[0]).norm().item() == pytest.approx(climb, rel=0.02)


def test_a_step_in_a_compiled_function_is_the_same_to_the_bit():
    ends = []
    for compiled in (False, True):
        model = make_model()
        opt = SAM(AdamW(model.parameters(), 0.01))

        def closure():
            opt.zero_grad()
            return backward(model)

        def step():
            opt.step(closure)

        run = torch.compile(step, backend="aot_eager") if compiled else step
        for _ in range(3):
            run()
        ends.append(values(model))
    assert equal(*ends)


def test_wrong_arguments():
    params = list(make_model().parameters())
    with pytest.raises(ValueError, match="adaptive: got True, allowed is False where average"):
        SAM(SGD(params, 0.1), adaptive=True, average=True)
    with pytest.raises(ValueError, match="closure: got None, allowed is a function"):
        SAM(SGD(params, 0.1)).step()
