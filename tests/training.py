"""A small model, its training and some optimizers, for the tests of ire.py."""

import io

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim import SGD, AdamW

from ire import IRE, SAM, SoftIRE, sampled_cross_entropy

# Mask at steps 2, 5, 8, ...
SETTINGS = dict(kappa=2, gamma=0.6, interval=3, warmup=2)
CURVATURES = ("squares", "fisher")


def make_model(*extra, seed=0, dtype=torch.float32):
    """67 parameters, and those of the modules `extra` between the layers."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), *extra, nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def batch(step, dtype=torch.float32):
    g = torch.Generator().manual_seed(step)
    return torch.randn(16, 4, generator=g).to(dtype), torch.randint(3, (16,), generator=g)


def backward(model, step=0):
    x, y = batch(step, next(model.parameters()).dtype)
    loss = F.cross_entropy(model(x).float(), y)
    loss.backward()
    return loss


def probe(model, opt, step=0):
    x, _ = batch(step, next(model.parameters()).dtype)
    with opt.probe(model):
        sampled_cross_entropy(model(x)).backward()


def make_step(opt, closure):
    """Only SAM, alone or inside IRE, takes the closure."""
    if SAM in (type(opt), type(getattr(opt, "base", None))):
        opt.step(closure)
    else:
        closure()
        opt.step()


def train(model, opt, steps):
    """Probes where one is due, and steps; the weights at the end."""
    for step in steps:

        def closure():
            opt.zero_grad()
            return backward(model, step)

        if getattr(opt, "probe_due", False):
            probe(model, opt, step)
        make_step(opt, closure)
    return values(model)


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def masks(opt):
    return [opt.masks[p] for group in opt.param_groups for p in group["params"]]


def flat_counts(opt):
    return [int(mask.sum()) for mask in masks(opt)]


def equal(a, b):
    a, b = list(a), list(b)
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def reload(state):
    """Through a file, as a checkpoint is."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def by_curvature(opt, curvature):
    """Masks from a given curvature: {p: tensor}."""
    with opt.probe():
        for p, h in curvature.items():
            p.grad = h


class Lion(torch.optim.Optimizer):
    """A user's optimizer: makes its state when it finds none, looks at nothing else."""

    def __init__(self, params, lr=1e-3, decay=0.9):
        super().__init__(params, dict(lr=lr, decay=decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if len(state) == 0:
                        state["mean"] = torch.zeros_like(p)
                    state["mean"].lerp_(p.grad, 1 - group["decay"])
                    p.sub_(state["mean"].sign(), alpha=group["lr"])


BASES = {
    "sgd": lambda p: SGD(p, 0.1),
    "momentum": lambda p: SGD(p, 0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    "adamw plain": lambda p: AdamW(p, 0.01, eps=1e-5, foreach=False),
    "adamw foreach": lambda p: AdamW(p, 0.01, eps=1e-5, foreach=True),
    "adamw fused": lambda p: AdamW(p, 0.01, fused=True),
    "adamw amsgrad": lambda p: AdamW(p, 0.01, eps=1e-5, amsgrad=True),
    "lion": lambda p: Lion(p),
    "sam": lambda p: SAM(AdamW(p, 0.01, eps=1e-5), rho=0.1),
    "adaptive sam": lambda p: SAM(SGD(p, 0.1, momentum=0.9), rho=0.1, adaptive=True),
}
WRAPPERS = {
    "IRE": lambda base, **settings: IRE(base, **{"kappa": 1, "gamma": 0.5, **settings}),
    "SoftIRE": SoftIRE,
}
each_wrapper = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
