"""Does a running mean of squared gradients find the flat coordinates of an image classifier as well
as the paper's Fisher probe?

    python benchmarks/images.py --data-dir DIR       # goes on where it stopped
    python benchmarks/images.py --summary

The setting is that of `benchmarks/cifar.py quick`: resnet8, 5,000 CIFAR-10 pictures, 8 epochs. SGD
and SAM run at the learning rate that won there. SGD-IRE and SAM-IRE get five pairs (ire_epoch,
kappa) with either curvature, judged on 2,000 held-out training pictures with seed 0. The best pair
of each runs with seeds 1 to 5, which took no part, and is tested on the test set.

Predictions, written before the runs: the test accuracy with squares is within 0.3 points of that
with fisher, for SGD and for SAM; the training loss is within 0.02. If squares are worse by more
than twice the standard error of the paired difference, SGDIRE and SAMIRE keep "fisher" as default.
"""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import cifar
from step import environment, write_report

import train_cifar

SEEDS = (1, 2, 3, 4, 5)
FORMS = [(base, kind) for base in ("sgd", "sam") for kind in (None, "fisher", "squares")]
FILE = ROOT / "results" / "images.json"
cifar.STUDIES["squares"] = {"settings": cifar.STUDIES["quick"]["settings"]}


def optimizer(base, kind):
    return f"{base}-ire" if kind else base


def trials(base, kind):
    fixed = {"lr": cifar.tuned_at_quick(base)["lr"]}
    if kind is None:
        return [fixed]
    return [fixed | pair | {"curvature": kind} for pair in cifar.QUICK_PAIRS]


def held(runs, base, kind, own, seed, stage):
    name = optimizer(base, kind)
    for r in runs:
        if (r["optimizer"], r["settings"], r["seed"], r["stage"]) == (name, own, seed, stage):
            return r
    return None


def tuned(runs, base, kind):
    """The settings with the highest held-out accuracy; None while trials are missing."""
    own = trials(base, kind)
    if len(own) == 1:
        return own[0]
    found = [held(runs, base, kind, trial, 0, "trial") for trial in own]
    if not all(found):
        return None
    return max(found, key=lambda r: r["acc"])["settings"]


def tasks(runs):
    for base, kind in FORMS:
        if kind:
            yield from ((base, kind, trial, 0, "trial") for trial in trials(base, kind))
    for seed in SEEDS:
        for base, kind in FORMS:
            yield base, kind, tuned(runs, base, kind), seed, "test"


def run(args, base, kind, own, seed, stage):
    more = {"holdout": 5000, "limit_test": 2000} if stage == "trial" else {}
    c = cifar.config(args, optimizer(base, kind), own, seed, **more)
    r = train_cifar.train(c)
    result = {"acc": r["test_acc"], "train_loss": r["train_loss"], "seconds": r["seconds"]}
    label = {"optimizer": optimizer(base, kind), "settings": own, "seed": seed, "stage": stage}
    return label | result | {"commit": environment("cpu")["commit"]}


def summary(runs):
    """Mean and standard error of each form, and of squares minus fisher, seed by seed."""
    table = {}
    for base, kind in FORMS:
        own = tuned(runs, base, kind)
        found = own and [held(runs, base, kind, own, seed, "test") for seed in SEEDS]
        if found and all(found):
            row = {key: train_cifar.mean_and_error([r[key] for r in found]) for key in KEYS}
            table[f"{base} {kind or 'alone'}"] = row | {"settings": own, "runs": found}
    for base in ("sgd", "sam"):
        pair = [table.get(f"{base} {kind}") for kind in ("fisher", "squares")]
        if all(pair):
            table[f"{base} squares - fisher"] = {
                key: train_cifar.mean_and_error(
                    [b[key] - a[key] for a, b in zip(*(row["runs"] for row in pair), strict=True)]
                )
                for key in KEYS
            }
    return {name: {k: v for k, v in row.items() if k != "runs"} for name, row in table.items()}


KEYS = ("acc", "train_loss", "seconds")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data")
    parser.add_argument("--summary", action="store_true")
    typed = parser.parse_args()
    args = SimpleNamespace(
        what="squares", data_dir=typed.data_dir, scratch=ROOT / "runs" / "images", minutes=1e9
    )
    runs = json.loads(FILE.read_text())["runs"] if FILE.exists() else []
    while not typed.summary:
        left = (task for task in tasks(runs) if not held(runs, *task))
        task = next(left, None)
        if task is None:
            break
        runs.append(run(args, *task))
        report = {
            "command": "python benchmarks/images.py --data-dir DIR",
            "environment": environment("cpu"),
            "pictures": "CIFAR-10, each through JPEG once",
            "table": summary(runs),
            "runs": runs,
        }
        write_report(report, FILE)
    print(json.dumps(summary(runs), indent=1))


if __name__ == "__main__":
    main()
