"""Evidence and speed of train_cifar.py.

    python ../shared/data/unpack_cifar10.py DIR           # CIFAR-10, JPEG copy; or the official archive in DIR
    python benchmarks/cifar.py quick --data-dir DIR       # writes results/cifar-quick.json and .png
    python benchmarks/cifar.py quick --data-dir DIR --minutes 3    # some of it; the next call goes on
    python benchmarks/cifar.py evidence --data-dir DIR    # the same of ResNet-56; results/cifar-jpeg.json
    python benchmarks/cifar.py map --data-dir DIR         # kappa x gamma; results/cifar-map.json and .png
    python benchmarks/cifar.py speed --data-dir DIR       # beside plain loops; results/cifar-speed-cpu.json

quick: `--preset quick` on 5,000 training pictures. SGD and SAM get three learning rates each; SGD-IRE and SAM-IRE three pairs
(ire_epoch, kappa) at their base's best one. evidence: ResNet-56 on 2,000, 5 epochs, four trials each. The best trial is that
with the highest accuracy on 2,000 held-out training pictures, seed 0; it runs with three seeds, and those are tested on the
test set. Tr(Hessian) is the training loss's on 128 training pictures.
map: SAM-IRE at quick over kappa (0 is SAM) and gamma, with a decayed and with a constant learning rate.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import train_cifar
from step import environment, write_report

PAIRS = [dict(kappa=k, gamma=g) for k, g in ((1, 0.9), (2, 0.8), (4, 0.8), (4, 0.9))]
RATES = [dict(lr=lr) for lr in (0.005, 0.01, 0.02, 0.05)]
QUICK_PAIRS = [dict(ire_epoch=e, kappa=k) for e, k in ((4, 1.0), (4, 4.0), (2, 2.0))]
QUICK_RATES = [dict(lr=lr) for lr in (0.05, 0.1, 0.2)]
STUDIES = {
    "evidence": dict(
        file="cifar-jpeg",
        settings=dict(
            data="cifar10",
            model="resnet56",
            limit_train=2000,
            epochs=5,
            batch_size=32,
            ire_epoch=3,
            dtype="bfloat16",
            device="cpu",
            eval_interval=100,
        ),
        trials={"sgd": RATES, "sam": RATES, "sgd-ire": PAIRS, "sam-ire": PAIRS},
    ),
    "quick": dict(
        file="cifar-quick",
        settings=dict(preset="quick", limit_train=5000, device="cpu", eval_interval=100),
        trials={
            "sgd": QUICK_RATES,
            "sgd-ire": QUICK_PAIRS,
            "sam": QUICK_RATES,
            "sam-ire": QUICK_PAIRS,
        },
    ),
}
BASE = {"sgd-ire": "sgd", "sam-ire": "sam"}
SEEDS, PICTURES, PROBES = (0, 1, 2), 128, 6
KAPPAS, GAMMAS, SCHEDULES = (0.0, 1.0, 2.0, 4.0, 8.0), (0.5, 0.7, 0.8, 0.9), ("cosine", "constant")


def trials(study, runs, optimizer):
    """The settings to try, each a dict."""
    base = {"lr": best(study, runs, BASE[optimizer])["lr"]} if optimizer in BASE else {}
    return [base | trial for trial in study["trials"][optimizer]]


def best(study, runs, optimizer):
    """The settings of the trial with the highest held-out accuracy."""
    done = [
        r
        for r in runs
        if r["optimizer"] == optimizer
        and r["seed"] == 0
        and r["settings"] in trials(study, runs, optimizer)
    ]
    return max(done, key=lambda r: r["val_acc"])["settings"]


def trace(c):
    """Tr(Hessian) of a finished run's training loss and its standard error."""
    c = train_cifar.complete(c)
    data, saved = train_cifar.Data(c), train_cifar.load_checkpoint(c.out)
    model = train_cifar.MODELS[c.model](data.classes)
    model.load_state_dict(saved["model"])
    losses = [
        lambda x=data.normalized(x), y=y: cross_entropy(
            model(x), y, label_smoothing=c.label_smoothing
        )
        for x, y in zip(
            data.x[:PICTURES].split(c.batch_size), data.y[:PICTURES].split(c.batch_size)
        )
    ]
    with train_cifar.frozen_batch_norm(model):
        return train_cifar.hessian_trace(losses, list(model.parameters()), PROBES)


def plan(study, runs):
    """What to do next: (optimizer, settings, seed), or None when all is done."""
    done = [(r["optimizer"], r["settings"], r["seed"]) for r in runs]
    for optimizer in study["trials"]:
        for trial in trials(study, runs, optimizer):
            if (optimizer, trial, 0) not in done:
                return optimizer, trial, 0
    for seed in SEEDS[1:]:
        for optimizer in study["trials"]:
            if (optimizer, best(study, runs, optimizer), seed) not in done:
                return optimizer, best(study, runs, optimizer), seed


def evidence(args):
    study = STUDIES[args.what]
    settings = study["settings"]
    file = args.file or ROOT / f"results/{study['file']}.json"
    runs = json.loads(file.read_text())["runs"] if file.exists() else []
    start = time.monotonic()

    def save(**more):
        write_report(
            {
                "command": f"python benchmarks/cifar.py {args.what}",
                "environment": environment("cpu"),
                "settings": settings,
                "pictures": "CIFAR-10, each through JPEG once",
                "trace_pictures": PICTURES,
                **more,
                "runs": runs,
            },
            file,
        )

    while time.monotonic() - start < 60 * args.minutes:
        task = plan(study, runs)
        if task:
            optimizer, own, seed = task
            out = (
                args.scratch / args.what / f"{optimizer}-{seed}-{'-'.join(map(str, own.values()))}"
            )
            c = train_cifar.Config(
                **settings,
                **own,
                optimizer=optimizer,
                seed=seed,
                data_dir=str(args.data_dir),
                out=str(out),
                holdout=5000,
                limit_test=2000,
                resume=(out / "checkpoint.pt").exists(),
            )
            r = train_cifar.train(c)
            runs.append(
                {
                    "optimizer": optimizer,
                    "settings": own,
                    "seed": seed,
                    "val_acc": r["test_acc"],
                    "train_loss": r["train_loss"],
                    "seconds": r["seconds"],
                }
            )
            save()
            continue
        rows = [r for r in runs if r["settings"] == best(study, runs, r["optimizer"])]
        for r in (r for r in rows if "test_acc" not in r):
            out = (
                args.scratch
                / args.what
                / f"{r['optimizer']}-{r['seed']}-{'-'.join(map(str, r['settings'].values()))}"
            )
            c = train_cifar.Config(
                **settings,
                **r["settings"],
                optimizer=r["optimizer"],
                seed=r["seed"],
                out=str(out),
                data_dir=str(args.data_dir),
                resume=True,
            )
            r["test_acc"] = train_cifar.train(c)["test_acc"]
            r["trace"], r["trace_error"] = trace(c)
            save()
            break
        else:
            table = {
                o: {
                    key: train_cifar.mean_and_error([r[key] for r in rows if r["optimizer"] == o])
                    for key in ("test_acc", "train_loss", "trace")
                }
                | {"settings": best(study, runs, o)}
                for o in study["trials"]
            }
            value = {(r["optimizer"], r["seed"]): r for r in rows}
            for o, base in BASE.items():  # the same weights and batches until IRE switches on
                gain = lambda key: train_cifar.mean_and_error(
                    [value[o, s][key] - value[base, s][key] for s in SEEDS]
                )
                table[o]["less_base"] = {
                    key: gain(key) for key in ("test_acc", "train_loss", "trace")
                }
            save(table=table)
            print(
                f"\n{'':10}{'test accuracy (%)':>20}{'training loss':>20}{'Tr(Hessian)':>18}   (mean +- standard error)"
            )
            for o, row in table.items():
                print(
                    f"{o:10}{row['test_acc'][0]:12.2f} +- {row['test_acc'][1]:4.2f}{row['train_loss'][0]:12.4f} +- "
                    f"{row['train_loss'][1]:.4f}{row['trace'][0]:10.1f} +- {row['trace'][1]:4.1f}   {row['settings']}"
                )
            for o, base in BASE.items():
                gains = [
                    f"{key} {mean:+.4g} +- {error:.2g}"
                    for key, (mean, error) in table[o]["less_base"].items()
                ]
                print(f"{o} less {base}, seed by seed: {', '.join(gains)}")
            return draw(rows, table, file.with_suffix(".png"))
    print(f"{len(runs)} runs, {sum('trace' in r for r in runs)} traces; the same command goes on")


def heat_map(args):
    """SAM-IRE over kappa and gamma; without a mask to speak of, kappa 0 needs one gamma only."""
    file = args.file or ROOT / "results/cifar-map.json"
    runs = json.loads(file.read_text())["runs"] if file.exists() else []
    start = time.monotonic()
    cells = [
        dict(schedule=schedule, seed=seed, kappa=kappa, gamma=gamma)
        for seed in SEEDS[:2]
        for schedule in SCHEDULES
        for kappa in KAPPAS
        for gamma in (GAMMAS if kappa else GAMMAS[:1])
    ]
    settings = STUDIES["quick"]["settings"] | dict(optimizer="sam-ire", limit_test=2000)
    for cell in cells:
        if time.monotonic() - start > 60 * args.minutes:
            break
        if any(r["cell"] == cell for r in runs):
            continue
        out = args.scratch / "map" / "-".join(map(str, cell.values()))
        resume = (out / "checkpoint.pt").exists()
        c = train_cifar.Config(
            **settings, **cell, data_dir=str(args.data_dir), out=str(out), resume=resume
        )
        try:
            r = train_cifar.train(c)
            row = {
                "test_acc": r["test_acc"],
                "train_loss": r["train_loss"],
                "seconds": r["seconds"],
            }
            row["trace"], row["trace_error"] = trace(dataclasses.replace(c, resume=True))
        except train_cifar.Halt as e:
            if e.code != 1:
                raise
            row = {"diverged": str(e)}
        runs.append({"cell": cell, **row})
        write_report(
            {
                "command": "python benchmarks/cifar.py map",
                "environment": environment("cpu"),
                "settings": settings,
                "pictures": "CIFAR-10, each through JPEG once",
                "cells": len(cells),
                "runs": runs,
            },
            file,
        )
    draw_map(runs, file.with_suffix(".png"))
    print(f"{len(runs)} of {len(cells)} runs; the same command goes on")


def draw_map(runs, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    quantities = {
        "trace": "Tr(Hessian)",
        "train_loss": "training loss",
        "test_acc": "test accuracy (%)",
    }
    figure, axes = plt.subplots(
        len(SCHEDULES), len(quantities), figsize=(10, 6), layout="constrained"
    )
    for row, schedule in zip(axes, SCHEDULES):
        for ax, (key, label) in zip(row, quantities.items()):

            def mean(kappa, gamma):
                gamma = gamma if kappa else GAMMAS[0]
                found = [
                    r[key]
                    for r in runs
                    if key in r
                    and r["cell"]["schedule"] == schedule
                    and (r["cell"]["kappa"], r["cell"]["gamma"]) == (kappa, gamma)
                ]
                return statistics.mean(found) if found else float("nan")

            values = [[mean(kappa, gamma) for kappa in KAPPAS] for gamma in GAMMAS]
            figure.colorbar(ax.imshow(values, origin="lower", aspect="auto"), ax=ax)
            ax.set_xticks(range(len(KAPPAS)), KAPPAS)
            ax.set_yticks(range(len(GAMMAS)), GAMMAS)
            ax.set(title=f"{label}, {schedule} lr", xlabel="kappa (0 is SAM)", ylabel="gamma")
    figure.savefig(path, dpi=110)


def draw(rows, table, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(7, 3), layout="constrained")
    for ax, key, label in zip(
        axes, ("test_acc", "trace"), ("test accuracy (%)", "Tr(Hessian) of the training loss")
    ):
        for i, (optimizer, row) in enumerate(table.items()):
            color = "#D55E00" if "ire" in optimizer else "#0072B2"
            ax.plot(
                [i] * len(SEEDS),
                [r[key] for r in rows if r["optimizer"] == optimizer],
                "o",
                color=color,
                alpha=0.4,
                ms=5,
            )
            ax.errorbar(i + 0.15, *row[key], fmt="s", color=color, capsize=4)
        ax.set_xticks(range(len(table)), table)
        ax.set(ylabel=label)
        ax.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    print(f"drawn: {path}")


class Pictures(torch.utils.data.Dataset):
    """What a plain loop does: each picture cropped, mirrored and normalised by itself."""

    def __init__(self, data):
        self.x, self.y = data.x.permute(0, 3, 1, 2).contiguous(), data.y
        self.mean, self.std = data.mean, data.std

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        x = torch.nn.functional.pad(self.x[i], (4, 4, 4, 4))
        top, left = torch.randint(9, (2,)).tolist()
        x = x[:, top : top + 32, left : left + 32]
        x = x.flip(2) if torch.rand(()) < 0.5 else x
        return (x - self.mean) / self.std, self.y[i]


class PlainLoop:
    """SGD, or SAM as davda54/sam has it, over a DataLoader: the loop that one writes first."""

    def __init__(self, c, data):
        self.c, self.sam = c, c.optimizer == "sam"
        self.model = train_cifar.MODELS[c.model](data.classes)
        self.sgd = torch.optim.SGD(
            self.model.parameters(), c.lr, momentum=c.momentum, weight_decay=c.weight_decay
        )
        loader = torch.utils.data.DataLoader(
            Pictures(data), c.batch_size, shuffle=True, drop_last=True
        )
        self.batches = iter(loader)

    def backward(self, x, y):
        cross_entropy(self.model(x), y, label_smoothing=self.c.label_smoothing).backward()

    def step(self):
        x, y = next(self.batches)
        self.sgd.zero_grad()
        self.backward(x, y)
        if self.sam:
            self.second_pass(x, y)
        self.sgd.step()

    @torch.no_grad()
    def second_pass(self, x, y):
        params = list(self.model.parameters())
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        old = [p.clone() for p in params]
        for p in params:
            p.add_(p.grad * (self.c.rho / (norm + 1e-12)))
        self.sgd.zero_grad()
        with torch.enable_grad(), train_cifar.frozen_batch_norm(self.model):
            self.backward(x, y)
        for p, before in zip(params, old):
            p.copy_(before)


def seconds(step, count):
    start = time.perf_counter()
    for _ in range(count):
        step()
    return time.perf_counter() - start


def speed(args):
    """Rounds of a few steps, the two loops in turn; float32, one process."""
    report = {
        "command": " ".join(["python", "benchmarks/cifar.py", *sys.argv[1:]]),
        "environment": environment("cpu"),
        "rounds": args.rounds,
        "model": args.model,
        "rows": {},
    }
    for optimizer in ("sgd", "sam"):
        c = train_cifar.Config(
            data_dir=str(args.data_dir), optimizer=optimizer, model=args.model, device="cpu"
        )
        c = train_cifar.complete(c)
        data = train_cifar.Data(c)
        run, plain, times = (
            train_cifar.set_up(c, data),
            PlainLoop(c, data),
            {"plain": [], "ours": []},
        )

        def our_step():
            train_cifar.train_step(run)
            run.step += 1

        for _ in range(args.rounds + 1):  # the first warms up
            times["plain"].append(seconds(plain.step, args.steps))
            times["ours"].append(seconds(our_step, args.steps))
        ratios = [a / b for a, b in zip(times["plain"][1:], times["ours"][1:])]
        low, ratio, high = statistics.quantiles(ratios, n=4)
        rates = {
            f"{name}_images_per_second": args.steps * c.batch_size / statistics.median(values[1:])
            for name, values in times.items()
        }
        report["rows"][optimizer] = rates | {"ours_of_plain": ratio, "quartiles": [low, high]}
        print(f"{optimizer}: ours / plain {ratio:.3f}, quartiles {low:.3f} to {high:.3f}")
    report |= {key: report["rows"]["sgd"][key] for key in ("ours_of_plain", "quartiles")}
    write_report(report, args.file or ROOT / "results/cifar-speed-cpu.json")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("quick", "evidence", "map", "speed"))
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data")
    parser.add_argument(
        "--scratch", type=Path, default=Path("runs/evidence-cifar"), help="evidence: checkpoints"
    )
    parser.add_argument(
        "--minutes", type=float, default=1e9, help="evidence: begin nothing new after so long"
    )
    parser.add_argument("--rounds", type=int, default=7, help="speed: rounds")
    parser.add_argument("--steps", type=int, default=4, help="speed: steps in a round")
    parser.add_argument("--model", default="resnet56", help="speed: network")
    parser.add_argument("--file", type=Path)
    parser.add_argument("--mark", help="ignored: a word to find the process by")
    args = parser.parse_args()
    {"evidence": evidence, "quick": evidence, "map": heat_map, "speed": speed}[args.what](args)


if __name__ == "__main__":
    main()
