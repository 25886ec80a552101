"""Is IRE at kappa 0 the base to the bit, over every optimizer of the package pytorch_optimizer?

    pip install pytorch_optimizer
    python benchmarks/bases.py         # prints a table, writes results/bases.json

Each optimizer trains a small network for 12 steps, alone and wrapped, with probes between; the
wrapped run is saved and loaded half way. Those that do not run alone are named, and so are those
that ire.py refuses.
"""

import argparse
import collections
import copy
import importlib.metadata
import json
import sys
import warnings
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train_gpt
from ire import IRE, sampled_cross_entropy

STEPS = 12
# Settings without which an optimizer does not start.
SETTINGS = {"ranger21": {"num_iterations": STEPS}, "bsam": {"num_data": 16}}


MUONS = {"adago", "adamuon", "distributedmuon", "muon", "muonclip", "normuon"}  # want groups
CLOSURES = {"alig", "bsam", "lbfgs"}


def make_params(name, model):
    if name not in MUONS:
        return list(model.parameters())
    return [
        {"params": [p for p in model.parameters() if p.dim() == 2], "use_muon": True},
        {"params": [p for p in model.parameters() if p.dim() == 1], "use_muon": False},
    ]


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def run(name, cls, wrapped):
    """The weights after STEPS steps, from the same random streams."""
    model = make_model()
    opt = cls(make_params(name, model), **SETTINGS.get(name, {}))
    if wrapped:
        opt = IRE(opt, kappa=0, gamma=0.5, interval=3)
    torch.manual_seed(1)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 6, generator=generator)
        y = torch.randint(4, (16,), generator=generator)
        if getattr(opt, "probe_due", False):
            with opt.probe(model):
                sampled_cross_entropy(model(x)).backward()

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
        if wrapped and step == STEPS // 2:
            opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    return [p.detach() for p in model.parameters()]


def first_line(error):
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]


def verdict(name, cls):
    try:
        alone = run(name, cls, wrapped=False)
    except Exception as error:  # whatever a foreign optimizer raises is its verdict
        return "does not run alone", first_line(error)
    try:
        wrapped = run(name, cls, wrapped=True)
    except Exception as error:
        return "refused" if isinstance(error, ValueError) else "fails", first_line(error)
    if all(torch.equal(a, b) for a, b in zip(alone, wrapped, strict=True)):
        return "same bits", ""
    distance = max(float((a - b).abs().max()) for a, b in zip(alone, wrapped, strict=True))
    return "differs", f"by {distance:.2g} at most"


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
        if rows[name][0] != "same bits":
            print(f"{name:20} {rows[name][0]:20} {rows[name][1]}")
    counts = dict(collections.Counter(kind for kind, _ in rows.values()))
    print(f"\n{len(rows)} optimizers: " + ", ".join(f"{n} {kind}" for kind, n in counts.items()))
    report = {"command": "python benchmarks/bases.py", **train_gpt.environment()}
    report["pytorch_optimizer"] = importlib.metadata.version("pytorch_optimizer")
    report["counts"] = counts
    report["optimizers"] = {name: " ".join(row).strip() for name, row in rows.items()}
    args.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
