"""Is one line enough on top of any optimizer? IRE with its default curvature over every optimizer
of the package pytorch_optimizer.

    pip install pytorch_optimizer
    python benchmarks/bases.py         # prints a table, writes results/bases.json

Each optimizer trains a small network for 30 steps, alone and wrapped. It counts only if
  - the wrapped run ends elsewhere than the base, so IRE does something;
  - gamma of the coordinates are flat, within 0.01;
  - all weights equal those of a plain reference, which multiplies the base's step by hand;
  - a run that is saved and loaded half way ends with the same bits, if the base alone does.
Those that do not count are named with the reason.
"""

import argparse
import collections
import importlib.metadata
import io
import math
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common
from ire import IRE

STEPS = 30
KAPPA, GAMMA, INTERVAL, BETA = 1.0, 0.6, 3, 0.98
# Settings without which an optimizer does not start.
SETTINGS = {"ranger21": {"num_iterations": STEPS}, "bsam": {"num_data": 16}}
MUONS = {"adago", "adamuon", "distributedmuon", "muon", "muonclip", "normuon"}  # want groups
CLOSURES = {"alig", "bsam", "lbfgs"}


def make_model():
    """356 parameters, all of which get gradients."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 4))


def make_base(name, cls, model):
    params = list(model.parameters())
    if name in MUONS:
        matrices = [p for p in params if p.dim() == 2]
        vectors = [p for p in params if p.dim() == 1]
        params = [{"params": matrices, "use_muon": True}, {"params": vectors, "use_muon": False}]
    return cls(params, **SETTINGS.get(name, {}))


def wrapped(base):
    return IRE(base, kappa=KAPPA, gamma=GAMMA, interval=INTERVAL, beta=BETA)


def train(name, model, opt, steps):
    for step in steps:
        torch.manual_seed(1000 + step)  # for optimizers that draw
        np.random.seed(1000 + step)
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        y = torch.randint(4, (16,), generator=torch.Generator().manual_seed(step))

        def closure():
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward(create_graph="hessian" in name)
            return loss

        if name in CLOSURES:
            opt.step(closure)
        else:
            closure()
            opt.step()
    return [p.detach().clone() for p in model.parameters()]


class Reference(torch.optim.Optimizer):
    """The definition of IRE: all squares from the base's exp_avg_sq, or all from the gradients.
    All parameters begin together, so the correction of the start cancels."""

    def __init__(self, base):
        super().__init__(base.param_groups, {})
        self.base = base
        self.params = [p for group in base.param_groups for p in group["params"]]
        self.squares = [torch.zeros_like(p) for p in self.params]
        self.flat = None
        self.t = 0

    def step(self, closure=None):
        old = [p.detach().clone() for p in self.params]
        gradients = [None if p.grad is None else p.grad.detach().clone() for p in self.params]
        self.base.step() if closure is None else self.base.step(closure)
        if closure is not None:
            gradients = [p.grad.detach() for p in self.params]
        self.squares = [
            BETA * v + (1 - BETA) * g**2 for v, g in zip(self.squares, gradients, strict=True)
        ]
        if self.t % INTERVAL == 0:
            h = self.squares
            entries = [self.base.state.get(p, {}) for p in self.params]
            if all(is_adams(entry, p) for entry, p in zip(entries, self.params, strict=True)):
                h = [entry["exp_avg_sq"] for entry in entries]
            values = torch.cat([v.flatten() for v in h])
            threshold = values.sort().values[math.floor(GAMMA * len(values)) - 1]
            self.flat = [v <= threshold for v in h]
        for p, before, flat in zip(self.params, old, self.flat, strict=True):
            p.data += KAPPA * flat * (p.data - before)
        self.t += 1


def is_adams(entry, p):
    v = entry.get("exp_avg_sq")
    return torch.is_tensor(v) and v.shape == p.shape and "Q" not in entry  # Q: SOAP's basis


def resumed(name, cls, wrap):
    """The weights of a run that is saved and loaded half way."""
    model, other = make_model(), make_model()
    opt = wrap(make_base(name, cls, model))
    train(name, model, opt, range(STEPS // 2))
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    other.load_state_dict(model.state_dict())
    again = wrap(make_base(name, cls, other))
    again.load_state_dict(torch.load(file, weights_only=False))
    return train(name, other, again, range(STEPS // 2, STEPS))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def distance(a, b):
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def first_line(error):
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]


def verdict(name, cls):
    try:
        model = make_model()
        alone = train(name, model, make_base(name, cls, model), range(STEPS))
    except Exception as error:  # whatever a foreign optimizer raises is its verdict
        return "does not run alone", first_line(error)
    if not all(p.isfinite().all() for p in alone):
        return "does not run alone", "its weights are not finite"
    try:
        return judge(name, cls, alone)
    except Exception as error:
        return "refused" if isinstance(error, ValueError) else "fails", first_line(error)


def judge(name, cls, alone):
    model, plain = make_model(), make_model()
    opt = wrapped(make_base(name, cls, model))
    whole = train(name, model, opt, range(STEPS))
    share = opt.flat_share().get("flat", 0.0)
    by_hand = train(name, plain, Reference(make_base(name, cls, plain)), range(STEPS))
    if same(alone, whole):
        return "does nothing", ""
    if abs(share - GAMMA) > 0.01:
        return "another share is flat", f"{share:.3f}"
    if distance(whole, by_hand) > 1e-5 * max(1.0, distance(alone, by_hand)):
        return "not the reference", f"by {distance(whole, by_hand):.2g} at most"
    if not same(whole, resumed(name, cls, wrapped)):
        if same(alone, resumed(name, cls, lambda base: base)):
            return "resumes elsewhere", ""
        return "counts", "the base alone does not resume exactly"
    return "counts", ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "bases.json")
    args = parser.parse_args()
    import pytorch_optimizer

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the bases' own
    rows = {}
    for name in pytorch_optimizer.get_supported_optimizers():
        cls = pytorch_optimizer.load_optimizer(name)
        rows[name] = verdict(name, cls)
        if rows[name] != ("counts", ""):
            print(f"{name:20} {rows[name][0]:20} {rows[name][1]}")
    counts = dict(collections.Counter(kind for kind, _ in rows.values()))
    print(f"\n{len(rows)} optimizers: " + ", ".join(f"{n} {kind}" for kind, n in counts.items()))
    report = {"command": "python benchmarks/bases.py", **common.environment()}
    report["pytorch_optimizer"] = importlib.metadata.version("pytorch_optimizer")
    report["counts"] = counts
    report["optimizers"] = {name: " ".join(row).strip() for name, row in rows.items()}
    common.write_json(args.out, report)


if __name__ == "__main__":
    main()
