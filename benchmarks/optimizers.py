"""The optimizers of the studies: a base of train_gpt.py, its steps stretched by coordinate.

A rule makes a factor for each coordinate from the curvatures of all. The curvature v of a
coordinate is the running mean of its squared (clipped) gradient, so no rule costs a backward pass.
The rule `hard` is IRE's mask, and `soft` is SoftIRE's factor; tests/test_study.py compares both
with ire.py. The other rules and settings are controls: they spoil the mask or the factor in one
way, and so show what the gain is due to. The controls that results/map.json has and this file has
not are in git, at the commit that the study names as finished.
"""

import math
from fractions import Fraction

import torch

HIDDEN = ("qk", "vo", "ffn")


def kind_of(name):
    """The kind of a parameter: embedding, head, norm, or of HIDDEN, the matrices of the blocks."""
    kinds = {"embed_tokens": "embedding", "lm_head": "head", "norm": "norm"}
    kinds |= {"q_proj": "qk", "k_proj": "qk", "v_proj": "vo", "o_proj": "vo"}
    return next((kind for part, kind in kinds.items() if part in name), "ffn")


def is_table(name):
    """A matrix with a row for each token."""
    return kind_of(name) in ("embedding", "head")


def flatten(tensors):
    return torch.cat([x.flatten() for x in tensors])


def shuffled(tensors, generator):
    """{name: tensor}: the values of all tensors together, in a random order; shapes stay."""
    flat = flatten(tensors.values())
    order = torch.randperm(len(flat), generator=generator)
    parts = flat[order].split([x.numel() for x in tensors.values()])
    return {name: part.view_as(x) for part, (name, x) in zip(parts, tensors.items(), strict=True)}


# --------------------------------------------------------------------------- rules
def hard(curvature, generator, *, kappa, gamma, random=False, only=None):
    """IRE (Eq. 5): the floor(gamma * n) coordinates of smallest v, and ties with the last of them,
    take 1 + kappa times as long steps.

    random: the same number of coordinates, anywhere in the model.
    only: "embedding and head" or "hidden" (all others): the mask counts there alone.
    """
    values = flatten(curvature.values())
    count = math.floor(Fraction(str(gamma)) * len(values))
    threshold = values.kthvalue(count).values if count else -1.0
    masks = {name: v <= threshold for name, v in curvature.items()}
    if random:
        masks = shuffled(masks, generator)
    if only:
        inside = only == "embedding and head"
        masks = {name: mask for name, mask in masks.items() if is_table(name) == inside}
    return {name: 1 + kappa * mask.float() for name, mask in masks.items()}


def rows(curvature, generator, *, kappa, gamma, by, counts):
    """Whole rows of embedding and head take the longer steps.

    by: "rarest": the rows of the tokens that stand least often in the training text. In each of
        the two there are so many that they have about as many coordinates as IRE's mask there.
        "random": as many rows, drawn anew with each set of factors. "frequent": all that "rarest"
        leaves out.
    counts: how often each token stands there, shape (vocabulary,).
    """
    factors = {}
    for name, factor in hard(curvature, generator, kappa=kappa, gamma=gamma).items():
        if is_table(name):
            count = round(int((factor > 1).sum()) / factor.shape[1])
            noise = torch.rand(len(factor), generator=generator)
            order = (noise if by == "random" else counts + noise).argsort()  # noise breaks ties
            chosen = order[count:] if by == "frequent" else order[:count]
            factors[name] = torch.ones_like(factor)
            factors[name][chosen] = 1 + kappa
    return factors


def soft(curvature, generator, *, alpha, limit=4.0):
    """Hidden matrices: (v / median) ** -alpha, clamped, with mean 1."""
    hidden = {name: v for name, v in curvature.items() if kind_of(name) in HIDDEN}
    median = flatten(hidden.values()).median().clamp_min(1e-30)
    raw = {name: (v / median).pow(-alpha).clamp(1 / limit, limit) for name, v in hidden.items()}
    mean = flatten(raw.values()).mean()
    return {name: x / mean for name, x in raw.items()}


def constants(curvature, generator, **multiples):
    """A learning rate of its own for each kind of parameter, as a multiple of the base's."""
    kinds = {name: kind_of(name) for name in curvature}
    return {name: multiples[kind] for name, kind in kinds.items() if kind in multiples}


RULES = {"hard": hard, "rows": rows, "soft": soft, "constants": constants}


# --------------------------------------------------------------------------- optimizers
class Stretched(torch.optim.Optimizer):
    """theta = theta_old + factor * (theta_base - theta_old), coordinate by coordinate.

    rule, settings: the name of one of the above and its keywords. `frozen` is a setting of any
    rule: the first factors stay. Otherwise new ones are made every ten steps.
    beta: decay of the running mean of squared gradients.
    """

    def __init__(self, base, model, rule, settings, *, beta):
        super().__init__(base.param_groups, {})  # the groups themselves, not copies
        self.base = base
        self.rule = RULES[rule]
        self.settings = dict(settings)
        self.frozen = self.settings.pop("frozen", False)
        self.beta = beta
        self.state = base.state
        self.named = dict(model.named_parameters())
        self.curvature = {name: torch.zeros_like(p) for name, p in self.named.items()}
        self.factors = {}
        self.t = 0
        self.generator = torch.Generator().manual_seed(torch.initial_seed())

    @torch.no_grad()
    def step(self, closure=None):
        for name, p in self.named.items():
            self.curvature[name].lerp_(p.grad * p.grad, 1 - self.beta)
        old = {name: p.clone() for name, p in self.named.items()}
        self.base.step()
        if self.t == 0 or (self.t % 10 == 0 and not self.frozen):
            self.factors = self.rule(self.curvature, self.generator, **self.settings)
        for name, factor in self.factors.items():
            base_step = self.named[name] - old[name]
            self.named[name] += factor * base_step - base_step
        self.t += 1
