"""The optimizers of benchmarks/map.py: a base whose steps are stretched by coordinate.

Every form is a rule that makes factors from curvatures. The curvature v of a coordinate is the
running mean of the square of its (clipped) gradient, which AdamW keeps anyway, so a form costs no
extra backward. The mask of IRE is the rule `hard`; tests/test_map.py holds it against ire.IRE.
"""

import math
from fractions import Fraction

import torch


def is_hidden(name, p):
    """The matrices of the blocks, which Muon takes; embeddings, the head and gains are the rest."""
    return p.dim() == 2 and "layers" in name


def flatten(tensors):
    return torch.cat([x.flatten() for x in tensors])


def split_like(flat, tensors):
    """The inverse of `flatten`."""
    parts = flat.split([x.numel() for x in tensors])
    return [part.view_as(x) for part, x in zip(parts, tensors, strict=True)]


def shuffled(tensors, generator):
    """The values of all tensors together, in a random order."""
    flat = flatten(tensors)
    order = torch.randperm(len(flat), generator=generator)
    return split_like(flat[order], tensors)


# --------------------------------------------------------------------------- rules
def flat_masks(curvature, gamma, live):
    """Eq. 5: True where v is among the floor(gamma * n) smallest; live: of those above 0."""
    values = flatten(curvature)
    values = values[values > 0] if live else values
    count = math.floor(Fraction(str(gamma)) * len(values))
    threshold = values.kthvalue(count).values if count else -1.0
    return [(v <= threshold) & (v > 0) if live else v <= threshold for v in curvature]


def hard(curvature, generator, *, kappa, gamma, ranked="together", live=False, random=False):
    """IRE: flat coordinates take 1 + kappa times as long steps.

    ranked: "together", "embeddings apart" (with the head) or "by tensor".
    live: coordinates of curvature 0 (rows of unseen tokens) are neither ranked nor stretched.
    random: the same number of coordinates, anywhere in the model.
    """
    places = {
        "together": lambda name: "model",
        "embeddings apart": lambda name: "embed_tokens" in name or "lm_head" in name,
        "by tensor": lambda name: name,
    }
    groups = {}
    for name in curvature:
        groups.setdefault(places[ranked](name), []).append(name)
    masks = {}
    for names in groups.values():
        masks.update(
            zip(names, flat_masks([curvature[n] for n in names], gamma, live), strict=True)
        )
    if random:
        masks = dict(zip(masks, shuffled(list(masks.values()), generator), strict=True))
    return {name: 1 + kappa * mask.float() for name, mask in masks.items()}


def soft(curvature, generator, *, alpha, limit=4.0, varies="everywhere", shuffle=False):
    """Hidden matrices: (v / median) ** -alpha, clamped, with mean 1: the lr keeps its meaning.

    varies: "everywhere", "between tensors" (one number a tensor, from its mean v) or "within
    tensors" (each tensor has a median and a mean of its own).
    shuffle: the same factors at other coordinates.
    """
    hidden = {name: v for name, v in curvature.items() if is_hidden(name, v)}
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


def by_hand(curvature, generator, *, qk, vo, ffn):
    """Constants for queries and keys, values and outputs, feed-forward, over their mean."""
    kinds = {"q_proj": qk, "k_proj": qk, "v_proj": vo, "o_proj": vo}
    factors = {}
    for name, v in curvature.items():
        if is_hidden(name, v):
            kind = name.split(".")[-2]
            factors[name] = torch.full_like(v, kinds.get(kind, ffn))
    mean = flatten(factors.values()).mean()
    return {name: x / mean for name, x in factors.items()}


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
    """LITE's longer steps (arXiv 2602.22681) over Muon, without its change of the momentum.

    Hidden matrices: the part of the step outside the top tenth of the momentum's right
    singular directions is `chi` times as long. The rest: the 90% of a tensor's coordinates with
    the smallest curvature take 4 times as long steps.
    """

    def refresh(self):
        rest = {name: v for name, v in self.curvature.items() if not is_hidden(name, v)}
        self.factors = hard(rest, self.generator, kappa=3.0, gamma=0.9, ranked="by tensor")
        self.top = {}
        for name, p in self.named.items():
            if is_hidden(name, p):
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
        """Its factors are made in each step."""

    def stretch(self, name, base_step, old):
        p = self.named[name]
        if not is_hidden(name, p):
            return base_step
        group = next(g for g in self.param_groups if any(p is q for q in g["params"]))
        decay = -group["lr"] * group["weight_decay"] * old
        update = (base_step - decay) / group["lr"]
        rows = self.factors.setdefault(
            name, torch.zeros(len(p), 1)
        )  # running mean of a row's squares
        rows.lerp_(update.square().mean(dim=1, keepdim=True), 1 - self.settings["beta"])
        scaled = update / (rows.sqrt() + 1e-10)
        scaled *= update.norm() / scaled.norm()
        return group["lr"] * scaled + decay


RULES = {"hard": hard, "soft": soft, "by hand": by_hand}
CLASSES = {"lite": Lite, "normuon": NorMuon}


def stretched(base, model, rule, settings, *, beta, steps):
    """The optimizer of a form; `when` among its settings: "first fifth", "after first fifth"."""
    settings = dict(settings)
    fifth = steps // 5
    active = {"first fifth": range(fifth), "after first fifth": range(fifth, steps), None: None}
    chosen = active[settings.pop("when", None)]
    kind = CLASSES.get(rule, Stretched)
    return kind(base, model, RULES.get(rule), settings, beta=beta, active=chosen)
