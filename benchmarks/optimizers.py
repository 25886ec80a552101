"""The optimizers of the studies: a base of train_gpt.py, its steps stretched by coordinate.

A rule makes a factor for each coordinate from the curvatures of all. The curvature v of a
coordinate is the running mean of its squared (clipped) gradient, so no rule costs a backward pass.
The rule `hard` is IRE's mask, and `soft` is SoftIRE's factor; tests/test_study.py compares both
with ire.py. The other rules and settings are controls: they spoil the mask or the factor in one
way, and so show what the gain is due to.
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


def is_hidden(name):
    return kind_of(name) in HIDDEN


def is_table(name):
    """A matrix with a row for each token."""
    return kind_of(name) in ("embedding", "head")


def flatten(tensors):
    return torch.cat([x.flatten() for x in tensors])


def split_like(flat, tensors):
    """The inverse of `flatten`."""
    parts = flat.split([x.numel() for x in tensors])
    return [part.view_as(x) for part, x in zip(parts, tensors, strict=True)]


def shuffled(tensors, generator):
    """The values of all tensors together, in a random order; shapes stay."""
    flat = flatten(tensors)
    order = torch.randperm(len(flat), generator=generator)
    return split_like(flat[order], tensors)


# --------------------------------------------------------------------------- rules
def flat_masks(curvature, gamma, live):
    """Eq. 5: True where v is among the floor(gamma * n) smallest. live: only v above 0 count."""
    values = flatten(curvature)
    values = values[values > 0] if live else values
    count = math.floor(Fraction(str(gamma)) * len(values))
    threshold = values.kthvalue(count).values if count else -1.0
    return [(v <= threshold) & (v > 0) if live else v <= threshold for v in curvature]


def hard(
    curvature,
    generator,
    *,
    kappa,
    gamma,
    ranked="together",
    live=False,
    random=False,
    only=None,
):
    """IRE: flat coordinates take 1 + kappa times as long steps.

    ranked: "together", "embeddings apart" (with the head) or "by tensor".
    live: coordinates of curvature 0 (rows of unseen tokens) are neither ranked nor stretched.
    random: the same number of coordinates, anywhere in the model.
    only: "embedding and head" or "hidden" (all others): the mask counts there alone.
    """
    group_of = {
        "together": lambda name: "model",
        "embeddings apart": is_table,
        "by tensor": lambda name: name,
    }
    groups = {}
    for name in curvature:
        groups.setdefault(group_of[ranked](name), []).append(name)
    masks = {}
    for names in groups.values():
        found = flat_masks([curvature[name] for name in names], gamma, live)
        masks.update(zip(names, found, strict=True))
    if random:
        masks = dict(zip(masks, shuffled(list(masks.values()), generator), strict=True))
    if only:
        inside = only == "embedding and head"
        masks = {name: mask for name, mask in masks.items() if is_table(name) == inside}
    return {name: 1 + kappa * mask.float() for name, mask in masks.items()}


def rows(curvature, generator, *, kappa, gamma, by, counts):
    """Whole rows of embedding and head take the longer steps: in each as many coordinates as IRE's
    mask has there.

    by: "random", or "rarest": the rows of the tokens that stand least often in the training text.
    counts: how often each token stands there, shape (vocabulary,).
    """
    factors = {}
    for name, factor in hard(curvature, generator, kappa=kappa, gamma=gamma).items():
        if is_table(name):
            count = round(int((factor > 1).sum()) / factor.shape[1])
            noise = torch.rand(len(factor), generator=generator)
            order = (counts + noise if by == "rarest" else noise).argsort()  # noise breaks ties
            factors[name] = torch.ones_like(factor)
            factors[name][order[:count]] = 1 + kappa
    return factors


def soft(curvature, generator, *, alpha, limit=4.0, varies="everywhere", shuffle=False):
    """Hidden matrices: (v / median) ** -alpha, clamped, with mean 1: the lr keeps its meaning.

    varies: "everywhere", "between tensors" (one number a tensor, from its mean v) or "within
    tensors" (each tensor has a median and a mean of its own).
    shuffle: the same factors at other coordinates.
    """
    hidden = {name: v for name, v in curvature.items() if is_hidden(name)}
    if varies == "between tensors":
        hidden = {name: v.mean().expand_as(v) for name, v in hidden.items()}
    groups = [[name] for name in hidden] if varies == "within tensors" else [list(hidden)]
    factors = {}
    for names in groups:
        reference = flatten([hidden[name] for name in names]).median().clamp_min(1e-30)
        raw = [(hidden[n] / reference).pow(-alpha).clamp(1 / limit, limit) for n in names]
        mean = flatten(raw).mean()
        factors.update({name: x / mean for name, x in zip(names, raw, strict=True)})
    if shuffle:
        factors = dict(zip(factors, shuffled(list(factors.values()), generator), strict=True))
    return factors


def by_hand(curvature, generator, **multiples):
    """Constants for qk (queries and keys), vo (values and outputs), ffn, over their mean."""
    factors = {}
    for name, v in curvature.items():
        if is_hidden(name):
            factors[name] = torch.full_like(v, multiples[kind_of(name)])
    mean = flatten(factors.values()).mean()
    return {name: x / mean for name, x in factors.items()}


def constants(curvature, generator, **multiples):
    """The same for any kinds, without the mean: a learning rate of its own for each kind."""
    kinds = {name: kind_of(name) for name in curvature}
    return {name: multiples[kind] for name, kind in kinds.items() if kind in multiples}


# --------------------------------------------------------------------------- optimizers
class Stretched(torch.optim.Optimizer):
    """theta = theta_old + factor * (theta_base - theta_old), coordinate by coordinate.

    rule: (curvature, generator, **settings) -> {name: factor}, one of the above.
    beta: decay of the running mean of squared gradients.
    interval: steps from one set of factors to the next.
    active: the steps in which factors count, a range; None is all.
    """

    def __init__(self, base, model, rule, settings, *, beta, interval=10, active=None):
        super().__init__(base.param_groups, {})  # the groups themselves, not copies
        self.base = base
        self.rule = rule
        self.settings = settings
        self.beta = beta
        self.interval = interval
        self.active = active
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
        if self.t % self.interval == 0:
            self.refresh()
        if self.active is None or self.t in self.active:
            for name, p in self.named.items():
                base_step = p - old[name]
                p += self.stretch(name, base_step, old[name]) - base_step
        self.t += 1

    def refresh(self):
        self.factors = self.rule(self.curvature, self.generator, **self.settings)

    def stretch(self, name, base_step, old):
        return self.factors.get(name, 1.0) * base_step


class Lite(Stretched):
    """LITE's longer steps (arXiv 2602.22681) on top of Muon, without its change of the momentum.

    Hidden matrices: the part of the step outside the top tenth of the momentum's right
    singular directions is `chi` times as long. The rest: the 90% of a tensor's coordinates with
    the smallest curvature take 4 times as long steps.
    """

    def refresh(self):
        rest = {name: v for name, v in self.curvature.items() if not is_hidden(name)}
        self.factors = hard(rest, self.generator, kappa=3.0, gamma=0.9, ranked="by tensor")
        self.top = {}
        for name, p in self.named.items():
            if is_hidden(name):
                right = torch.linalg.svd(self.state[p]["momentum_buffer"], full_matrices=False).Vh
                self.top[name] = right[: math.ceil(len(right) / 10)]  # (directions, columns)

    def stretch(self, name, base_step, old):
        if name not in self.top:
            return super().stretch(name, base_step, old)
        top = self.top[name]
        chi = self.settings["chi"]
        return chi * base_step - (chi - 1) * base_step @ top.T @ top


class NorMuon(Stretched):
    """NorMuon (arXiv 2510.05491): rows of the update over their running RMS, at the same norm."""

    def refresh(self):
        """The factors are made in each step."""

    def stretch(self, name, base_step, old):
        p = self.named[name]
        if not is_hidden(name):
            return base_step
        group = next(g for g in self.param_groups if any(p is q for q in g["params"]))
        decay = -group["lr"] * group["weight_decay"] * old
        update = (base_step - decay) / group["lr"]
        nothing = torch.zeros(len(p), 1)
        squares = self.factors.setdefault(name, nothing)  # running mean of each row's squares
        squares.lerp_(update.square().mean(dim=1, keepdim=True), 1 - self.settings["beta"])
        scaled = update / (squares.sqrt() + 1e-10)
        scaled *= update.norm() / scaled.norm()
        return group["lr"] * scaled + decay


RULES = {"hard": hard, "rows": rows, "soft": soft, "by hand": by_hand, "constants": constants}
CLASSES = {"lite": Lite, "normuon": NorMuon}


def stretched(base, model, rule, settings, *, beta, steps):
    """The optimizer of a rule. Two settings are of any rule: `when`, "first fifth" of the run or
    "after first fifth", and `frozen`, where the first factors stay."""
    settings = dict(settings)
    fifth = steps // 5
    parts = {"first fifth": range(fifth), "after first fifth": range(fifth, steps), None: None}
    active = parts[settings.pop("when", None)]
    interval = steps if settings.pop("frozen", False) else 10
    every = {"beta": beta, "active": active, "interval": interval}
    return CLASSES.get(rule, Stretched)(base, model, RULES.get(rule), settings, **every)
