"""sharpness.py against the exact Hessian."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import sharpness


def exact(losses, params):
    """H of the mean of the losses, a row for each coordinate, by two derivatives."""
    loss = sum(f() for f in losses) / len(losses)
    slopes = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
    slope = sharpness.flattened(slopes)
    rows = [
        torch.autograd.grad(s, params, retain_graph=True, materialize_grads=True) for s in slope
    ]
    return torch.stack([sharpness.flattened(row) for row in rows])


@pytest.fixture(params=(nn.Identity, nn.BatchNorm1d))
def problem(request):
    """A network of 45 or 57 parameters and its losses on two batches."""
    model = nn.Sequential(nn.Linear(4, 6), request.param(6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(2, 32, 4, dtype=torch.float64), torch.randint(3, (2, 32))
    return model, [lambda i=i: F.cross_entropy(model(x[i]), y[i]) for i in (0, 1)]


def test_trace_and_largest_eigenvalue_are_those_of_the_exact_hessian(problem):
    model, losses = problem
    buffers = [b.clone() for b in model.buffers()]
    found = sharpness.sharpness(model, losses, probes=400)
    assert all(map(torch.equal, model.buffers(), buffers))
    params = list(model.parameters())
    H = exact(losses, params)
    assert abs(found["trace"] - H.trace().item()) < 4 * found["trace_error"]
    one = (2 * (H**2).sum() - 2 * (H.diagonal() ** 2).sum()).item() ** 0.5  # deviation of a v H v
    assert found["trace_error"] == pytest.approx(one / 400**0.5, rel=0.2)
    values = torch.linalg.eigvalsh(H)
    nearest = (values - found["lambda_max"]).abs().min()
    assert nearest <= found["lambda_max_error"] + 1e-9 <= 0.01 * found["lambda_max"]
    largest, _ = sharpness.largest_eigenvalue(losses, params, 100, tolerance=1e-8)
    assert largest == pytest.approx(values[-1].item(), rel=1e-6)


@pytest.mark.parametrize("products", (1, 2, 4))
def test_lanczos_keeps_to_its_products(products):
    A = torch.randn(12, 12, dtype=torch.float64)
    H, x, ticks = A + A.T, torch.zeros(12, dtype=torch.float64, requires_grad=True), []
    largest, residual = sharpness.largest_eigenvalue(
        [lambda: x @ H @ x / 2], [x], products, tick=lambda: ticks.append(1), tolerance=1e-9
    )
    assert len(ticks) == products
    assert (torch.linalg.eigvalsh(H) - largest).abs().min() <= residual < 100


def test_tf32_is_off_while_it_measures_and_attention_has_a_second_derivative():
    seen = []
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x = torch.randn(2, 3, 8)

    def precision():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    def loss():
        seen.append(precision())
        return model(x).square().mean()

    torch.set_float32_matmul_precision("high")
    before = precision()
    assert sharpness.sharpness(model, [loss], probes=2, products=2)["trace_error"] > 0
    assert set(seen) == {("highest", False)} and precision() == before
