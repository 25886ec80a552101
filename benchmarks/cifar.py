"""Evidence and speed of train_cifar.py.

    python ../shared/data/unpack_cifar10.py DIR     # CIFAR-10, JPEG copy; or the official archive
    python benchmarks/cifar.py quick --data-dir DIR           # results/cifar-quick.json and .png
    python benchmarks/cifar.py quick --data-dir DIR --minutes 3    # some; the next call goes on
    python benchmarks/cifar.py evidence --data-dir DIR        # ResNet-56; results/cifar-jpeg.json
    python benchmarks/cifar.py map --data-dir DIR             # results/cifar-map.json and .png
    python benchmarks/cifar.py probe --data-dir DIR           # results/cifar-probe.json
    python benchmarks/cifar.py speed --data-dir DIR           # results/cifar-speed-cpu.json

quick: `--preset quick` on 5,000 training pictures. SGD and SAM get five learning rates each;
SGD-IRE and SAM-IRE five pairs (ire_epoch, kappa) at their base's best one. evidence: ResNet-56 on
2,000, 5 epochs, four trials each. The best trial is that with the highest accuracy on 2,000
held-out training pictures, seed 0; it runs with three seeds, and those are tested on the test set.
Tr(Hessian) is the training loss's on 128 training pictures.
map: SAM-IRE at quick and at SAM's best learning rate there, over kappa (0 is SAM) and gamma, with a
decayed and a constant learning rate. All cells of a seed and a schedule share one run of SAM until
IRE switches on, which is bit by bit what each would have done alone.
probe: SGD-IRE with quick's settings, its mask from other pictures than the first ones as they are.
speed: beside a plain loop over a DataLoader, for SGD and SAM, in turn.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from step import environment, write_report

import train_cifar

PAIRS = [dict(kappa=k, gamma=g) for k, g in ((1, 0.9), (2, 0.8), (4, 0.8), (4, 0.9))]
RATES = [dict(lr=lr) for lr in (0.005, 0.01, 0.02, 0.05)]
QUICK_PAIRS = [
    dict(ire_epoch=e, kappa=k) for e, k in ((4, 1.0), (4, 4.0), (2, 2.0), (2, 1.0), (2, 4.0))
]
QUICK_RATES = [dict(lr=lr) for lr in (0.05, 0.1, 0.2, 0.4, 0.8)]
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
        settings=dict(
            preset="quick", limit_train=5000, device="cpu", dtype="float32", eval_interval=100
        ),
        trials={
            "sgd": QUICK_RATES,
            "sgd-ire": QUICK_PAIRS,
            "sam": QUICK_RATES,
            "sam-ire": QUICK_PAIRS,
        },
    ),
}
STUDIES["map"] = {"settings": STUDIES["quick"]["settings"] | {"log_interval": 5000 // 64}}
BASE = {"sgd-ire": "sgd", "sam-ire": "sam"}
STUDIES["probe"] = {"settings": STUDIES["quick"]["settings"]}
SEEDS = (0, 1, 2)
PICTURES = 128
PROBES = 6
QUANTITIES = ("test_acc", "train_loss", "trace", "seconds")
KAPPAS = (0.0, 1.0, 2.0, 4.0, 8.0)
GAMMAS = (0.5, 0.7, 0.8, 0.9)
SCHEDULES = ("cosine", "constant")


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
    c.sharpness_images = PICTURES
    c.sharpness_probes = PROBES
    c.sharpness_products = 1
    data = train_cifar.Data(c)
    model = train_cifar.make_model(c, data.classes)
    model.load_state_dict(train_cifar.load_checkpoint(c.out)["model"])
    values = train_cifar.sharpness(model, data, c)
    return values["trace"], values["trace_error"]


def plan(study, runs):
    """What to do next: (optimizer, settings, seed), or None when all is done."""
    done = [(r["optimizer"], r["settings"], r["seed"]) for r in runs]
    for optimizer in study["trials"]:
        for trial in trials(study, runs, optimizer):
            if (optimizer, trial, 0) not in done:
                return optimizer, trial, 0
    for seed in SEEDS[1:]:
        for optimizer in study["trials"]:
            own = best(study, runs, optimizer)
            if (optimizer, own, seed) not in done:
                return optimizer, own, seed
    return None


def config(args, optimizer, own, seed, **more):
    """The settings of a run, which goes on if it was stopped."""
    name = "-".join(map(str, (optimizer, seed, *own.values())))
    out = args.scratch / args.what / name
    return train_cifar.Config(
        **STUDIES[args.what]["settings"],
        **own,
        **more,
        optimizer=optimizer,
        seed=seed,
        data_dir=str(args.data_dir),
        out=str(out),
        resume=(out / "checkpoint.pt").exists(),
    )


def evidence(args):
    study = STUDIES[args.what]
    file = args.file or ROOT / f"results/{study['file']}.json"
    runs = json.loads(file.read_text())["runs"] if file.exists() else []
    start = time.monotonic()
    while time.monotonic() - start < 60 * args.minutes:
        task = plan(study, runs)
        table = {}
        rows = []
        if task:
            runs.append(trained(args, *task))
        else:
            rows = [r for r in runs if r["settings"] == best(study, runs, r["optimizer"])]
            untested = [r for r in rows if "test_acc" not in r]
            if untested:
                untested[0].update(tested(args, untested[0]))
            else:
                table = summary(study, runs, rows)
        report = {
            "command": f"python benchmarks/cifar.py {args.what}",
            "environment": environment("cpu"),
            "settings": train_cifar.PRESETS[study["settings"].get("preset", "paper")]
            | study["settings"],
            "pictures": "CIFAR-10, each through JPEG once",
            "trace_pictures": PICTURES,
        }
        report |= {"table": table} if table else {}
        write_report(report | {"runs": runs}, file)
        if table:
            show(table)
            draw(rows, table, file.with_suffix(".png"))
            return
    print(f"{len(runs)} runs, {sum('trace' in r for r in runs)} traces; the same command goes on")


def trained(args, optimizer, own, seed):
    """A run, judged by held-out training pictures."""
    r = train_cifar.train(config(args, optimizer, own, seed, holdout=5000, limit_test=2000))
    result = {"val_acc": r["test_acc"], "train_loss": r["train_loss"], "seconds": r["seconds"]}
    return {"optimizer": optimizer, "settings": own, "seed": seed} | result


def tested(args, r):
    """The same run on the test set."""
    c = config(args, r["optimizer"], r["settings"], r["seed"], holdout=0, limit_test=10_000)
    accuracy = train_cifar.train(c)["test_acc"]
    value, error = trace(c)
    return {"test_acc": accuracy, "trace": value, "trace_error": error}


def summary(study, runs, rows):
    """Mean and standard error by optimizer, and of IRE less its base, seed by seed: they share
    weights and batches until IRE switches on."""
    value = {(r["optimizer"], r["seed"]): r for r in rows}
    table = {}
    for optimizer in study["trials"]:
        table[optimizer] = {"settings": best(study, runs, optimizer)}
        for key in QUANTITIES:
            values = [value[optimizer, seed][key] for seed in SEEDS]
            table[optimizer][key] = train_cifar.mean_and_error(values)
    for optimizer, base in BASE.items():
        table[optimizer]["less_base"] = {}
        for key in QUANTITIES:
            gains = [value[optimizer, seed][key] - value[base, seed][key] for seed in SEEDS]
            table[optimizer]["less_base"][key] = train_cifar.mean_and_error(gains)
    return table


def show(table):
    for optimizer, row in table.items():
        for label, values in ((optimizer, row), ("  less its base", row.get("less_base", {}))):
            texts = [
                f"{key} {values[key][0]:.4g} +- {values[key][1]:.2g}"
                for key in QUANTITIES
                if key in values
            ]
            if texts:
                print(f"{label:16}{'   '.join(texts)}   {values.get('settings', '')}")


def tuned_at_quick(optimizer):
    """The settings that the quick study chose."""
    quick = json.loads((ROOT / "results/cifar-quick.json").read_text())
    return quick["table"][optimizer]["settings"]


def heat_map(args):
    """Runs what is missing of SAM-IRE over kappa and gamma, first all cells with the first seed."""
    rate = tuned_at_quick("sam")["lr"]
    file = args.file or ROOT / "results/cifar-map.json"
    cells = [
        {"lr": rate, "schedule": s, "kappa": k, "gamma": g}
        for s in SCHEDULES
        for k in KAPPAS
        for g in (GAMMAS if k else GAMMAS[-1:])  # without kappa gamma does nothing
    ]
    runs = json.loads(file.read_text())["runs"] if file.exists() else []
    runs = [r for r in runs if r["settings"] in cells]
    start = time.monotonic()
    for seed, own in itertools.product(SEEDS[:2], cells):
        if time.monotonic() - start > 60 * args.minutes:
            break
        if not any((r["settings"], r["seed"]) == (own, seed) for r in runs):
            runs.append({"settings": own, "seed": seed} | cell(args, own, seed))
            report = {
                "command": "python benchmarks/cifar.py map",
                "environment": environment("cpu"),
                "settings": train_cifar.PRESETS["quick"] | STUDIES["map"]["settings"],
                "pictures": "CIFAR-10, each through JPEG once",
                "trace_pictures": PICTURES,
                "planned": 2 * len(cells),
            }
            write_report(report | {"runs": runs}, file)
    draw_map(runs, file.with_suffix(".png"))
    print(f"{len(runs)} of {2 * len(cells)} runs; the same command goes on")


def cell(args, own, seed):
    """One run of the map, from where IRE switches on; a run that diverges is a result too."""
    c = config(args, "sam-ire", own, seed)
    if not c.resume:
        branch(common(args, own, seed), own, c.out)
        c.resume = True
    try:
        r = train_cifar.train(c)
    except train_cifar.Halt as e:
        if e.code != 1:
            raise
        return {"diverged": str(e)}
    value, error = trace(c)
    return {key: r[key] for key in ("test_acc", "train_loss")} | {
        "trace": value,
        "trace_error": error,
    }


def common(args, own, seed):
    """The folder of the run of SAM that the cells of a schedule have in common: before it switches
    on, IRE does nothing."""
    shared = {name: own[name] for name in ("lr", "schedule")}
    c = config(args, "sam-ire", shared, seed)
    if not c.resume:
        c = train_cifar.complete(c)
        run = train_cifar.set_up(c, train_cifar.Data(c))
        while run.step < c.ire_warmup:
            train_cifar.train_step(run)
            run.step += 1
        train_cifar.save(run)
    return c.out


def branch(start, own, out):
    """Writes a checkpoint that goes on from another one with its own kappa and gamma."""
    saved = train_cifar.load_checkpoint(start)
    saved["config"] |= own
    for group in saved["optimizer"]["param_groups"]:
        group |= {name: own[name] for name in ("kappa", "gamma")}
    path = Path(out) / "checkpoint.pt"
    train_cifar.write_atomically(path, lambda f: torch.save(saved, f))


def draw_map(runs, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = {"trace": "Tr(Hessian)", "train_loss": "training loss", "test_acc": "test accuracy, %"}
    figure, axes = plt.subplots(2, 3, figsize=(11, 6), layout="constrained")
    for row, schedule in zip(axes, SCHEDULES, strict=True):
        for ax, (key, label) in zip(row, labels.items(), strict=True):
            values = [[mean_of(runs, key, k, g, schedule) for k in KAPPAS] for g in GAMMAS]
            figure.colorbar(ax.imshow(values, origin="lower", aspect="auto"), ax=ax)
            for y, x in itertools.product(range(len(GAMMAS)), range(len(KAPPAS))):
                text = "" if math.isnan(values[y][x]) else f"{values[y][x]:.4g}"
                box = {"facecolor": "white", "alpha": 0.6, "linewidth": 0, "pad": 1}
                ax.text(x, y, text, ha="center", va="center", fontsize=8, bbox=box)
            ax.set_xticks(range(len(KAPPAS)), [f"{k:g}" for k in KAPPAS])
            ax.set_yticks(range(len(GAMMAS)), GAMMAS)
            ax.set(title=f"{label}, {schedule} lr", xlabel="kappa (0 is SAM)", ylabel="gamma")
    figure.savefig(path, dpi=110)


def mean_of(runs, key, kappa, gamma, schedule):
    """Over the seeds of a cell; NaN is not measured, or diverged."""
    own = {"kappa": kappa, "gamma": gamma if kappa else GAMMAS[-1], "schedule": schedule}
    found = [r[key] for r in runs if key in r and own.items() <= r["settings"].items()]
    return statistics.mean(found) if found else float("nan")


def random_batch(data):
    """The fixed probe's pictures as the authors' code has them: a random batch, augmented once."""
    if not hasattr(data, "probed"):
        data.probed = data.batch(0)[0]
    return data.probed


PROBED = {  # what to compare: the setting, and a probe batch in place of the script's own
    "the first pictures": ("fixed", train_cifar.Data.probe_batch),
    "a random, augmented batch": ("fixed", random_batch),
    "the step's own batch": ("fresh", train_cifar.Data.probe_batch),
}


def probe(args):
    """Does it matter which pictures the mask is from? Seed by seed, less the first pictures'."""
    own = tuned_at_quick("sgd-ire")
    file = args.file or ROOT / "results/cifar-probe.json"
    report = json.loads(file.read_text()) if file.exists() else {"runs": []}
    runs = report["runs"]
    for seed, name in itertools.product(SEEDS, PROBED):
        if any((r["probe"], r["seed"]) == (name, seed) for r in runs):
            continue
        kind, train_cifar.Data.probe_batch = PROBED[name]
        c = config(args, "sgd-ire", own, seed, probe=kind)
        c.out += f"-{name.replace(' ', '-')}"
        c.resume = Path(c.out, "checkpoint.pt").exists()
        r = train_cifar.train(c)
        value, error = trace(dataclasses.replace(c, resume=True))
        result = {key: r[key] for key in ("test_acc", "train_loss")}
        runs.append({"probe": name, "seed": seed} | result | {"trace": value, "trace_error": error})
        report |= {
            "command": "python benchmarks/cifar.py probe",
            "environment": environment("cpu"),
            "settings": train_cifar.PRESETS["quick"] | STUDIES["probe"]["settings"] | own,
            "less_first": less_first(runs),
        }
        write_report(report, file)
    for name, row in report["less_first"].items():
        texts = [f"{key} {mean:+.4g} +- {error:.2g}" for key, (mean, error) in row.items()]
        print(f"{name}: {', '.join(texts)}")


def less_first(runs):
    """Mean and standard error over seeds of each quantity less that of the first pictures."""
    value = {(r["probe"], r["seed"]): r for r in runs}
    first, *others = PROBED
    if len(value) < len(PROBED) * len(SEEDS):
        return {}
    table = {}
    for name in others:
        table[name] = {}
        for key in ("test_acc", "train_loss", "trace"):
            gains = [value[name, seed][key] - value[first, seed][key] for seed in SEEDS]
            table[name][key] = train_cifar.mean_and_error(gains)
    return table


def draw(rows, table, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(7, 3), layout="constrained")
    labels = {"test_acc": "test accuracy (%)", "trace": "Tr(Hessian) of the training loss"}
    for ax, (key, label) in zip(axes, labels.items(), strict=True):
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
        self.c = c
        self.sam = c.optimizer == "sam"
        self.model = train_cifar.MODELS[c.model](data.classes)
        self.sgd = torch.optim.SGD(
            self.model.parameters(), c.lr, momentum=c.momentum, weight_decay=c.weight_decay
        )
        loader = torch.utils.data.DataLoader(
            Pictures(data), c.batch_size, shuffle=True, drop_last=True
        )
        self.batches = iter(loader)

    def batch(self):
        return next(self.batches)

    def backward(self, x, y):
        cross_entropy(self.model(x), y, label_smoothing=self.c.label_smoothing).backward()

    def step(self):
        x, y = self.batch()
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
        for p, before in zip(params, old, strict=True):
            p.copy_(before)


class OurLoop:
    def __init__(self, c, data):
        self.run = train_cifar.set_up(c, data)

    def step(self):
        train_cifar.train_step(self.run)
        self.run.step += 1


def seconds(step, count):
    start = time.perf_counter()
    for _ in range(count):
        step()
    return time.perf_counter() - start


def interleaved(loops, args):
    """Times of rounds of a few steps of the loops in turn, without the first round."""
    times = {name: [] for name in loops}
    for _ in range(args.rounds + 1):
        for name, loop in loops.items():
            times[name].append(seconds(loop.step, args.steps))
    return {name: values[1:] for name, values in times.items()}


def speed(args):
    """SGD and SAM, one process: the plain loop and ours in float32, and ours in what the script
    chooses on this machine if that is another."""
    report = {
        "command": " ".join(["python", "benchmarks/cifar.py", *sys.argv[1:]]),
        "environment": environment("cpu"),
        "rounds": args.rounds,
        "steps": args.steps,
        "rows": {},
    }
    for optimizer in ("sgd", "sam"):
        typed = {"data_dir": str(args.data_dir), "optimizer": optimizer, "device": "cpu"}
        c = train_cifar.complete(train_cifar.Config(**typed, dtype="float32"))
        chosen = train_cifar.complete(train_cifar.Config(**typed))
        data = train_cifar.Data(c)
        loops = {"plain, float32": PlainLoop(c, data), "ours, float32": OurLoop(c, data)}
        if chosen.dtype != "float32":
            loops[f"ours, {chosen.dtype}, the default here"] = OurLoop(chosen, data)
        times = interleaved(loops, args)
        for name, values in times.items():
            ratios = [a / b for a, b in zip(times["plain, float32"], values, strict=True)]
            low, ratio, high = statistics.quantiles(ratios, n=4)
            batch = loops[name].batch if "plain" in name else functools.partial(data.batch, 0)
            time_a_step = statistics.median(values) / args.steps
            report["rows"][f"{optimizer.upper()}, {name}"] = {
                "images_per_second": c.batch_size / time_a_step,
                "of_plain": ratio,
                "quartiles": [low, high],
                "loader_share": seconds(batch, args.steps) / args.steps / time_a_step,
            }
            print(f"{optimizer}, {name}: {ratio:.3f} of plain, quartiles {low:.3f} to {high:.3f}")
    write_report(report, args.file or ROOT / "results/cifar-speed-cpu.json")


COMMANDS = {
    "quick": evidence,
    "evidence": evidence,
    "map": heat_map,
    "probe": probe,
    "speed": speed,
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data")
    parser.add_argument(
        "--scratch", type=Path, default=Path("runs/evidence-cifar"), help="evidence: checkpoints"
    )
    parser.add_argument(
        "--minutes", type=float, default=1e9, help="evidence: begin nothing new after so long"
    )
    parser.add_argument("--rounds", type=int, default=7, help="speed: rounds")
    parser.add_argument("--steps", type=int, default=4, help="speed: steps in a round")
    parser.add_argument("--file", type=Path)
    parser.add_argument("--mark", help="ignored: a word to find the process by")
    args = parser.parse_args()
    COMMANDS[args.what](args)


if __name__ == "__main__":
    main()
