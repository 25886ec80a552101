"""How sharp is the loss at the weights of a model? The trace of the Hessian H, estimated by
Hutchinson's method, and its largest eigenvalue lambda_max, by Lanczos' method:

    losses = [lambda x=x, y=y: F.cross_entropy(model(x), y) for x, y in batches]
    found = sharpness(model, losses)      # {"trace": ..., "lambda_max": ..., and their errors}

H is the Hessian of the mean of the functions in the list `losses`, by the n trainable parameters.
Each function computes the loss of one batch, so that only the graph of one batch is in memory.
Gradient descent is stable up to a learning rate of 2 / lambda_max.
"""

import contextlib
import statistics

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ire import frozen_batch_norm


def sharpness(model, losses, probes=16, products=60, seed=0, tick=lambda: None):
    """Trace and largest eigenvalue of the Hessian, in the precision of `losses`. The error of the
    trace is a standard error, and that of lambda_max is the residual |H v - lambda_max v|.

    probes: random vectors for the trace, two or more; they take n bytes each.
    products: products with H for lambda_max, at most.
    tick() is called after each product of one batch; an exception that it raises ends the work.
    Give the plain model, since a compiled model has no second derivative. Batch norm in training
    mode takes the statistics of each batch, and its running statistics stay as they are.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    # of torch's kernels for attention, only MATH has a second derivative
    with frozen_batch_norm(model), sdpa_kernel(SDPBackend.MATH), true_float32():
        trace, trace_error = hessian_trace(losses, params, probes, seed, tick)
        largest, residual = largest_eigenvalue(losses, params, products, seed, tick)
    return {
        "trace": trace,
        "trace_error": trace_error,
        "lambda_max": largest,
        "lambda_max_error": residual,
    }


def hessian_products(loss, params, vectors):
    """Yields H v (n,) for each v (n,) in `vectors`, as float64 on the CPU. H is that of loss()."""
    slopes = torch.autograd.grad(loss(), params, create_graph=True, materialize_grads=True)
    slope = flattened(slopes)
    for v in vectors:
        v = v.to(slope.device, slope.dtype)
        parts = torch.autograd.grad(slope, params, v, retain_graph=True, materialize_grads=True)
        yield flattened(parts).cpu().double()


def hessian_trace(losses, params, probes=16, seed=0, tick=lambda: None):
    """Tr(H) and its standard error. The estimate is the mean of v H v over `probes` vectors v of
    random signs."""
    generator = torch.Generator().manual_seed(seed)
    size = (probes, sum(p.numel() for p in params))
    signs = torch.randint(2, size, generator=generator, dtype=torch.int8) * 2 - 1
    samples = torch.zeros(probes, dtype=torch.float64)
    for loss in losses:
        for i, product in enumerate(hessian_products(loss, params, signs)):
            samples[i] += product.dot(signs[i].double()) / len(losses)
            tick()
    samples = samples.tolist()
    return statistics.mean(samples), statistics.stdev(samples) / probes**0.5


def largest_eigenvalue(losses, params, products=60, seed=0, tick=lambda: None, tolerance=0.01):
    """lambda_max and the residual |H v - lambda_max v|, |v| = 1. Some eigenvalue of H differs from
    lambda_max by no more than the residual.

    The iteration ends when the residual is at most tolerance * |lambda_max|, or after `products`
    products. Only two vectors are kept. So eigenvalues that were found come back as copies, which
    does not change the largest (Paige 1980).
    """
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(sum(p.numel() for p in params), generator=generator, dtype=torch.float64)
    v = v / v.norm()
    before = torch.zeros_like(v)
    beta = 0.0
    T = torch.zeros(products + 1, products + 1, dtype=torch.float64)  # H in the basis of the v
    for k in range(products):
        w = -beta * before
        for loss in losses:
            for product in hessian_products(loss, params, [v]):
                w += product / len(losses)
            tick()
        T[k, k] = w.dot(v)
        w -= T[k, k] * v
        beta = w.norm()
        values, vectors = torch.linalg.eigh(T[: k + 1, : k + 1])
        largest = values[-1].item()
        residual = (beta * vectors[-1, -1].abs()).item()
        if residual <= tolerance * abs(largest):
            break
        T[k, k + 1] = T[k + 1, k] = beta
        before, v = v, w / beta
    return largest, residual


@contextlib.contextmanager
def true_float32():
    """Turns TF32 off inside, as its errors show in a second derivative."""
    precision = torch.get_float32_matmul_precision()
    convolutions = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = convolutions


def flattened(tensors):
    return torch.cat([x.flatten() for x in tensors])
