"""Does IRE help image classifiers? SGD and SAM, each alone and with IRE, by train_cifar.py.

    python benchmarks/cifar.py quick --data-dir DIR       # results/cifar-quick.json and .png
    python benchmarks/cifar.py quick --data-dir DIR --minutes 3    # some; the next call goes on
    python benchmarks/cifar.py evidence --data-dir DIR    # ResNet-56; results/cifar-jpeg.json
    python benchmarks/cifar.py map --data-dir DIR         # results/cifar-map.json and .png

quick: `--preset quick` on 5,000 training pictures. SGD and SAM get five learning rates each;
SGD-IRE and SAM-IRE five pairs (ire_epoch, kappa) at their base's best one. evidence: ResNet-56 on
2,000, 5 epochs, four trials each. The best trial is that with the highest accuracy on held-out
training pictures, seed 0. It runs with three seeds, and the test set decides. Tr(Hessian) is the
training loss's on 128 training pictures.
map: SAM-IRE at quick and at SAM's best learning rate there, over kappa (0 is SAM) and gamma, with a
decayed and a constant learning rate.
"""

import argparse
import itertools
import statistics
import sys
import time
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import common
import train_cifar
from speed import environment, write_report
from study import mean

QUICK = {"preset": "quick", "limit_train": 5000, "eval_interval": 100}
RESNET56 = {"model": "resnet56", "limit_train": 2000, "epochs": 5, "batch_size": 32}
RESNET56 |= {"ire_epoch": 3, "dtype": "bfloat16", "eval_interval": 100}
RATES = [{"lr": lr} for lr in (0.005, 0.01, 0.02, 0.05)]
PAIRS = [{"kappa": k, "gamma": g} for k, g in ((1.0, 0.9), (2.0, 0.8), (4.0, 0.8), (4.0, 0.9))]
QUICK_RATES = [{"lr": lr} for lr in (0.05, 0.1, 0.2, 0.4, 0.8)]
QUICK_PAIRS = [
    {"ire_epoch": e, "kappa": k} for e, k in ((4, 1.0), (4, 4.0), (2, 2.0), (2, 1.0), (2, 4.0))
]
STUDIES = {  # the file, the settings of all runs, the trials of a base and of IRE on top of it
    "quick": ("cifar-quick", QUICK, QUICK_RATES, QUICK_PAIRS),
    "evidence": ("cifar-jpeg", RESNET56, RATES, PAIRS),
}
BASES = {"sgd": None, "sgd-ire": "sgd", "sam": None, "sam-ire": "sam"}
SEEDS = (0, 1, 2)
QUANTITIES = ("test_acc", "train_loss", "trace", "seconds")
PICTURES = 128
HELD_OUT = 5000
KAPPAS = (0.0, 1.0, 2.0, 4.0, 8.0)
GAMMAS = (0.5, 0.7, 0.8, 0.9)
SCHEDULES = ("cosine", "constant")


# ----------------------------------------------------------------------------------- one run
def config(args, shared, optimizer, own, seed):
    """The settings of a run, which goes on if it was stopped."""
    name = "-".join(map(str, (optimizer, seed, *own.values())))
    out = args.scratch / args.what / name
    begun = (out / "checkpoint.pt").exists()
    return train_cifar.Config(
        **{**shared, **own},
        optimizer=optimizer,
        seed=seed,
        device="cpu",
        holdout=HELD_OUT,
        sharpness=True,
        sharpness_images=PICTURES,
        sharpness_probes=6,
        sharpness_products=2,
        data_dir=str(args.data_dir),
        out=str(out),
        resume=begun,
    )


def train(c):
    """What a file holds of a run. A run that diverges is a result too."""
    about = {"commit": environment("cpu")["commit"]}
    try:
        found = train_cifar.train(c)
    except common.Diverged as e:
        return about | {"diverged": str(e)}
    names = ("val_acc", "test_acc", "train_loss", "trace", "trace_error", "seconds")
    return about | {name: found[name] for name in names}


def write(args, file, shared, **results):
    about = {
        "command": f"python benchmarks/cifar.py {args.what}",
        "environment": environment("cpu"),
        "settings": train_cifar.PRESETS[shared.get("preset", "paper")] | shared,
        "pictures": "CIFAR-10, each through JPEG once",
        "trace_pictures": PICTURES,
    }
    write_report(about | results, file)


# ------------------------------------------------------------------------- trials, then seeds
def trials(runs, optimizer, rates, pairs):
    """The settings to try, each a dict."""
    base = BASES[optimizer]
    if base is None:
        return rates
    rate = best(runs, base, rates, pairs)["lr"]
    return [{"lr": rate, **pair} for pair in pairs]


def best(runs, optimizer, rates, pairs):
    """The settings of the trial with the highest held-out accuracy."""
    tried = trials(runs, optimizer, rates, pairs)
    own = [run for run in runs if (run["optimizer"], run["seed"]) == (optimizer, 0)]
    own = [run for run in own if run["settings"] in tried]
    return max(own, key=lambda run: run.get("val_acc", -1))["settings"]


def tasks(runs, rates, pairs):
    """(optimizer, settings, seed) of all runs, in an order that can be read after any."""
    for optimizer in BASES:
        for own in trials(runs, optimizer, rates, pairs):
            yield optimizer, own, 0
    for seed in SEEDS[1:]:
        for optimizer in BASES:
            yield optimizer, best(runs, optimizer, rates, pairs), seed


def go_on(args, file, shared, wanted, runs, **about):
    """Makes those of the wanted runs that are missing. Returns whether the time was enough."""
    begun = time.monotonic()
    done = [(run.get("optimizer", "sam-ire"), run["settings"], run["seed"]) for run in runs]
    for optimizer, own, seed in wanted:
        if (optimizer, own, seed) in done:
            continue
        if time.monotonic() - begun > 60 * args.minutes:
            print(f"{len(runs)} runs; the same command goes on")
            return False
        found = train(config(args, shared, optimizer, own, seed))
        runs.append({"optimizer": optimizer, "settings": own, "seed": seed} | found)
        write(args, file, shared, **about, runs=runs)
    return True


def evidence(args):
    name, shared, rates, pairs = STUDIES[args.what]
    file = args.file or ROOT / f"results/{name}.json"
    runs = common.read_json(file)["runs"] if file.exists() else []
    if go_on(args, file, shared, tasks(runs, rates, pairs), runs):
        rows = [r for r in runs if r["settings"] == best(runs, r["optimizer"], rates, pairs)]
        table = summary(rows)
        write(args, file, shared, table=table, runs=runs)
        show(table)
        draw(rows, table, file.with_suffix(".png"))


def summary(rows):
    """Mean and standard error by optimizer, and of IRE minus its base, seed by seed: they share
    weights and batches until IRE switches on."""
    value = {(row["optimizer"], row["seed"]): row for row in rows}
    table = {}
    for optimizer, base in BASES.items():
        table[optimizer] = {"settings": value[optimizer, 0]["settings"]}
        for key in QUANTITIES:
            table[optimizer][key] = mean(value[optimizer, seed][key] for seed in SEEDS)
        if base:
            less = table[optimizer]["less_base"] = {}
            for key in QUANTITIES:
                pairs = [(value[optimizer, seed], value[base, seed]) for seed in SEEDS]
                less[key] = mean(own[key] - other[key] for own, other in pairs)
    return table


def show(table):
    for optimizer, row in table.items():
        for label, values in ((optimizer, row), ("  minus its base", row.get("less_base", {}))):
            texts = [
                f"{key} {values[key][0]:.4g} +- {values[key][1]:.2g}"
                for key in QUANTITIES
                if key in values
            ]
            if texts:
                print(f"{label:16}{'   '.join(texts)}   {values.get('settings', '')}")


def draw(rows, table, path):
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots(1, 2)
    labels = {"test_acc": "test accuracy (%)", "trace": "Tr(Hessian) of the training loss"}
    for ax, (key, label) in zip(axes, labels.items(), strict=True):
        for i, (optimizer, row) in enumerate(table.items()):
            color = "#D55E00" if "ire" in optimizer else "#0072B2"
            values = [r[key] for r in rows if r["optimizer"] == optimizer]
            ax.plot([i] * len(values), values, "o", color=color, alpha=0.4, ms=5)
            ax.errorbar(i + 0.15, *row[key], fmt="s", color=color, capsize=4)
        ax.set_xticks(range(len(table)), table)
        ax.set(ylabel=label)
        ax.grid(alpha=0.3)
    common.write_atomically(path, partial(figure.savefig, format="png", dpi=150))


# ------------------------------------------------------------------------------- the heat map
def heat_map(args):
    """SAM-IRE over kappa and gamma, first all cells with the first seed."""
    shared = QUICK | {"log_interval": 5000 // 64}
    quick = common.read_json(ROOT / "results/cifar-quick.json")
    rate = quick["table"]["sam"]["settings"]["lr"]
    file = args.file or ROOT / "results/cifar-map.json"
    cells = [
        {"lr": rate, "schedule": s, "kappa": k, "gamma": g}
        for s in SCHEDULES
        for k in KAPPAS
        for g in (GAMMAS if k else GAMMAS[-1:])  # without kappa gamma does nothing
    ]
    wanted = [("sam-ire", own, seed) for seed in SEEDS[:2] for own in cells]
    runs = common.read_json(file)["runs"] if file.exists() else []
    go_on(args, file, shared, wanted, runs, planned=len(wanted))
    draw_map(runs, file.with_suffix(".png"))


def draw_map(runs, path):
    labels = {"trace": "Tr(Hessian)", "train_loss": "training loss", "test_acc": "test accuracy, %"}
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots(2, 3)
    for row, schedule in zip(axes, SCHEDULES, strict=True):
        for ax, (key, label) in zip(row, labels.items(), strict=True):
            values = [[mean_of(runs, key, k, g, schedule) for k in KAPPAS] for g in GAMMAS]
            figure.colorbar(ax.imshow(values, origin="lower", aspect="auto"), ax=ax)
            for y, x in itertools.product(range(len(GAMMAS)), range(len(KAPPAS))):
                text = "" if values[y][x] != values[y][x] else f"{values[y][x]:.4g}"
                box = {"facecolor": "white", "alpha": 0.6, "linewidth": 0, "pad": 1}
                ax.text(x, y, text, ha="center", va="center", fontsize=8, bbox=box)
            ax.set_xticks(range(len(KAPPAS)), [f"{k:g}" for k in KAPPAS])
            ax.set_yticks(range(len(GAMMAS)), GAMMAS)
            ax.set(title=f"{label}, {schedule} lr", xlabel="kappa (0 is SAM)", ylabel="gamma")
    common.write_atomically(path, partial(figure.savefig, format="png", dpi=110))


def mean_of(runs, key, kappa, gamma, schedule):
    """Over the seeds of a cell; NaN is not measured, or diverged."""
    own = {"kappa": kappa, "gamma": gamma if kappa else GAMMAS[-1], "schedule": schedule}
    found = [r[key] for r in runs if key in r and own.items() <= r["settings"].items()]
    return statistics.mean(found) if found else float("nan")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=(*STUDIES, "map"))
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data")
    parser.add_argument(
        "--scratch", type=Path, default=ROOT / "runs/cifar-studies", help="checkpoints"
    )
    parser.add_argument(
        "--minutes", type=float, default=1e9, help="begin no run after so long (default: all)"
    )
    parser.add_argument("--file", type=Path)
    args = parser.parse_args()
    command = heat_map if args.what == "map" else evidence
    command(args)


if __name__ == "__main__":
    main()
