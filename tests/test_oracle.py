"""ire.py against numpy: its own network, gradients, optimizers, mask and IRE step, in float64."""

import numpy as np
import pytest
import torch
from training import make_step

from ire import IRE, SAM

STEPS, WARMUP, INTERVAL, KAPPA, GAMMA, RHO, BETA = 25, 4, 3, 1.7, 0.6, 0.07, 0.8


def problem():
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=s) * 0.5 for s in ((6, 5), (5,), (5, 3), (3,))]
    batches = [
        (rng.normal(size=(12, 6)), rng.integers(3, size=12), rng.integers(3, size=12))
        for _ in range(STEPS)
    ]
    return weights, batches  # inputs, training labels, probe labels


def gradients(weights, x, y):
    """Of the mean cross entropy of softmax(tanh(x W1 + b1) W2 + b2), by hand."""
    w1, b1, w2, b2 = weights
    hidden = np.tanh(x @ w1 + b1)
    logits = hidden @ w2 + b2
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(y)), y] -= 1
    p /= len(y)
    back = (p @ w2.T) * (1 - hidden**2)
    return [x.T @ back, back.sum(0), hidden.T @ p, p.sum(0)]


def sgd(weights, grads, memory, t, lr=0.2, momentum=0.9, decay=0.01):
    grads = [g + decay * w for g, w in zip(grads, weights)]
    memory["m"] = [momentum * m + g for m, g in zip(memory["m"], grads)] if "m" in memory else grads
    return [w - lr * m for w, m in zip(weights, memory["m"])]


def adamw(weights, grads, memory, t, lr=0.02, b1=0.9, b2=0.95, eps=1e-8, decay=0.1):
    zeros = [0 * w for w in weights]
    memory["m"] = [b1 * m + (1 - b1) * g for m, g in zip(memory.get("m", zeros), grads)]
    memory["v"] = [b2 * v + (1 - b2) * g * g for v, g in zip(memory.get("v", zeros), grads)]
    return [
        w * (1 - lr * decay) - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        for w, m, v in zip(weights, memory["m"], memory["v"])
    ]


def oracle(base, sam, curvature):
    weights, batches = problem()
    memory = {}
    flat = [0 * w for w in weights]
    own = [0 * w for w in weights]
    for t, (x, y, sampled) in enumerate(batches):
        due = t >= WARMUP and (t - WARMUP) % INTERVAL == 0
        if due and curvature == "fisher":
            h = [g * g * len(x) for g in gradients(weights, x, sampled)]
        grads = gradients(weights, x, y)
        if sam:
            scale = [np.abs(w) if sam == "adaptive" else np.ones_like(w) for w in weights]
            norm = np.sqrt(sum(np.sum((s * g) ** 2) for s, g in zip(scale, grads)))
            there = [w + RHO * s * s * g / norm for w, s, g in zip(weights, scale, grads)]
            grads = gradients(there, x, y)
        new = base(weights, grads, memory, t + 1)
        own = [BETA * v + (1 - BETA) * g * g for v, g in zip(own, grads)]
        if curvature == "squares":
            h = memory.get("v", own)
        if due:
            every = np.sort(np.concatenate([a.ravel() for a in h]))
            flat = [a <= every[int(GAMMA * len(every)) - 1] for a in h]
        weights = [w + (1 + KAPPA * f) * (n - w) for w, n, f in zip(weights, new, flat)]
    return weights


def ours(base, sam, curvature):
    weights, batches = problem()
    w1, b1, w2, b2 = params = [torch.nn.Parameter(torch.tensor(w)) for w in weights]
    inner = BASES[base](params)
    if sam:
        inner = SAM(inner, rho=RHO, adaptive=sam == "adaptive")
    settings = dict(gamma=GAMMA, interval=INTERVAL, warmup=WARMUP, beta=BETA)
    opt = IRE(inner, kappa=KAPPA, curvature=curvature, **settings)

    def backward(x, y):
        opt.zero_grad()
        logits = torch.tanh(torch.tensor(x) @ w1 + b1) @ w2 + b2
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(y))
        loss.backward()
        return loss

    for x, y, sampled in batches:
        if opt.probe_due:
            with opt.probe():
                backward(x, sampled)
        make_step(opt, lambda: backward(x, y))
    return [p.detach().numpy() for p in params]


BASES = {
    sgd: lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9, weight_decay=0.01),
    adamw: lambda p: torch.optim.AdamW(p, lr=0.02, betas=(0.9, 0.95), weight_decay=0.1),
}


@pytest.mark.parametrize("curvature", ["squares", "fisher"])
@pytest.mark.parametrize("sam", [None, "plain", "adaptive"])
@pytest.mark.parametrize("base", BASES, ids=["sgd", "adamw"])
def test_25_steps_agree(base, sam, curvature):
    expected = oracle(base, sam, curvature)
    got = ours(base, sam, curvature)
    error = max(np.abs(g - e).max() / np.abs(e).max() for g, e in zip(got, expected))
    assert error < 1e-8
