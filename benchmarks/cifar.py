"""Evidence and speed of train_cifar.py.

    python ../shared/data/unpack_cifar10.py DIR                    # CIFAR-10, JPEG copy; or the official archive in DIR
    python benchmarks/cifar.py evidence --data-dir DIR             # writes results/cifar-jpeg.json and .png
    python benchmarks/cifar.py evidence --data-dir DIR --minutes 3 # some of it; the next call goes on
    python benchmarks/cifar.py speed --data-dir DIR                # beside a plain loop; writes results/cifar-speed-cpu.json

Evidence: ResNet-56 on 2,000 training pictures, 5 epochs, bfloat16. SGD and SAM get four learning rates each; SGD-IRE and
SAM-IRE get four pairs (kappa, gamma) at their base's best one. The best trial is that with the highest accuracy on 2,000
held-out training pictures, seed 0; it runs with three seeds, and those are tested on the test set. Tr(Hessian) is the training
loss's on 128 training pictures.
"""
import argparse
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

SETTINGS = dict(data="cifar10", model="resnet56", limit_train=2000, epochs=5, batch_size=32, ire_epoch=3, dtype="bfloat16",
                device="cpu", eval_interval=100)
TRIALS = {"sgd": [dict(lr=lr) for lr in (0.005, 0.01, 0.02, 0.05)], "sam": [dict(lr=lr) for lr in (0.005, 0.01, 0.02, 0.05)],
          "sgd-ire": [dict(kappa=k, gamma=g) for k, g in ((1, 0.9), (2, 0.8), (4, 0.8), (4, 0.9))],
          "sam-ire": [dict(kappa=k, gamma=g) for k, g in ((1, 0.9), (2, 0.8), (4, 0.8), (4, 0.9))]}
BASE = {"sgd-ire": "sgd", "sam-ire": "sam"}
SEEDS, PICTURES, PROBES = (0, 1, 2), 128, 6


def trials(runs, optimizer):
    """The settings to try, each a dict."""
    base = {"lr": best(runs, BASE[optimizer])["lr"]} if optimizer in BASE else {}
    return [base | trial for trial in TRIALS[optimizer]]


def best(runs, optimizer):
    """The settings of the trial with the highest held-out accuracy."""
    done = [r for r in runs if r["optimizer"] == optimizer and r["seed"] == 0 and r["settings"] in trials(runs, optimizer)]
    return max(done, key=lambda r: r["val_acc"])["settings"]


def trace(c):
    """Tr(Hessian) of a finished run's training loss and its standard error."""
    c = train_cifar.complete(c)
    data, saved = train_cifar.Data(c), train_cifar.load_checkpoint(c.out)
    model = train_cifar.MODELS[c.model](data.classes)
    model.load_state_dict(saved["model"])
    losses = [lambda x=data.normalized(x), y=y: cross_entropy(model(x), y, label_smoothing=c.label_smoothing)
              for x, y in zip(data.x[:PICTURES].split(c.batch_size), data.y[:PICTURES].split(c.batch_size))]
    with train_cifar.frozen_batch_norm(model):
        return train_cifar.hessian_trace(losses, list(model.parameters()), PROBES)


def plan(runs):
    """What to do next: (optimizer, settings, seed), or None when all is done."""
    done = [(r["optimizer"], r["settings"], r["seed"]) for r in runs]
    for optimizer in TRIALS:
        for trial in trials(runs, optimizer):
            if (optimizer, trial, 0) not in done:
                return optimizer, trial, 0
    for seed in SEEDS[1:]:
        for optimizer in TRIALS:
            if (optimizer, best(runs, optimizer), seed) not in done:
                return optimizer, best(runs, optimizer), seed


def evidence(args):
    file = args.file or ROOT / "results/cifar-jpeg.json"
    runs = json.loads(file.read_text())["runs"] if file.exists() else []
    start = time.monotonic()

    def save(**more):
        write_report({"command": "python benchmarks/cifar.py evidence", "environment": environment("cpu"), "settings": SETTINGS,
                      "pictures": "CIFAR-10, each through JPEG once", "trace_pictures": PICTURES, **more, "runs": runs}, file)

    while time.monotonic() - start < 60 * args.minutes:
        task = plan(runs)
        if task:
            optimizer, own, seed = task
            out = args.scratch / f"{optimizer}-{seed}-{'-'.join(map(str, own.values()))}"
            c = train_cifar.Config(**SETTINGS, **own, optimizer=optimizer, seed=seed, data_dir=str(args.data_dir), out=str(out),
                                   holdout=5000, limit_test=2000, resume=(out / "checkpoint.pt").exists())
            r = train_cifar.train(c)
            runs.append({"optimizer": optimizer, "settings": own, "seed": seed, "val_acc": r["test_acc"],
                         "train_loss": r["train_loss"], "seconds": r["seconds"]})
            save()
            continue
        rows = [r for r in runs if r["settings"] == best(runs, r["optimizer"])]
        for r in (r for r in rows if "test_acc" not in r):
            out = args.scratch / f"{r['optimizer']}-{r['seed']}-{'-'.join(map(str, r['settings'].values()))}"
            c = train_cifar.Config(**SETTINGS, **r["settings"], optimizer=r["optimizer"], seed=r["seed"], out=str(out),
                                   data_dir=str(args.data_dir), resume=True)
            r["test_acc"] = train_cifar.train(c)["test_acc"]
            r["trace"], r["trace_error"] = trace(c)
            save()
            break
        else:
            table = {o: {key: train_cifar.mean_and_error([r[key] for r in rows if r["optimizer"] == o])
                         for key in ("test_acc", "train_loss", "trace")} | {"settings": best(runs, o)} for o in TRIALS}
            value = {(r["optimizer"], r["seed"]): r for r in rows}
            for o, base in BASE.items():  # the same weights and batches until IRE switches on
                gain = lambda key: train_cifar.mean_and_error([value[o, s][key] - value[base, s][key] for s in SEEDS])
                table[o]["less_base"] = {key: gain(key) for key in ("test_acc", "train_loss", "trace")}
            save(table=table)
            print(f"\n{'':10}{'test accuracy (%)':>20}{'training loss':>20}{'Tr(Hessian)':>18}   (mean +- standard error)")
            for o, row in table.items():
                print(f"{o:10}{row['test_acc'][0]:12.2f} +- {row['test_acc'][1]:4.2f}{row['train_loss'][0]:12.4f} +- "
                      f"{row['train_loss'][1]:.4f}{row['trace'][0]:10.1f} +- {row['trace'][1]:4.1f}   {row['settings']}")
            for o, base in BASE.items():
                gains = [f"{key} {mean:+.4g} +- {error:.2g}" for key, (mean, error) in table[o]["less_base"].items()]
                print(f"{o} less {base}, seed by seed: {', '.join(gains)}")
            return draw(rows, table, file.with_suffix(".png"))
    print(f"{len(runs)} runs, {sum('trace' in r for r in runs)} traces; the same command goes on")


def draw(rows, table, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(7, 3), layout="constrained")
    for ax, key, label in zip(axes, ("test_acc", "trace"), ("test accuracy (%)", "Tr(Hessian) of the training loss")):
        for i, (optimizer, row) in enumerate(table.items()):
            color = "#D55E00" if "ire" in optimizer else "#0072B2"
            ax.plot([i] * len(SEEDS), [r[key] for r in rows if r["optimizer"] == optimizer], "o", color=color, alpha=0.4, ms=5)
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
        x = x[:, top:top + 32, left:left + 32]
        x = x.flip(2) if torch.rand(()) < 0.5 else x
        return (x - self.mean) / self.std, self.y[i]


def speed(args):
    """Rounds of a few steps, the two loops in turn; SGD, float32, one process."""
    c = train_cifar.complete(train_cifar.Config(data="cifar10", data_dir=str(args.data_dir), optimizer="sgd", device="cpu"))
    data = train_cifar.Data(c)
    report = {"command": " ".join(["python", "benchmarks/cifar.py", *sys.argv[1:]]), "environment": environment("cpu"),
              "rounds": args.rounds, "rows": {}}
    plain = train_cifar.MODELS[c.model](data.classes)
    ours = train_cifar.MODELS[c.model](data.classes).to(memory_format=torch.channels_last)
    plain_sgd = torch.optim.SGD(plain.parameters(), c.lr, momentum=c.momentum, weight_decay=c.weight_decay)
    our_sgd = train_cifar.make_optimizer(ours, c)
    scaler, autocast = torch.amp.GradScaler("cpu", enabled=False), torch.autocast("cpu", enabled=False)
    batches = iter(torch.utils.data.DataLoader(Pictures(data), c.batch_size, shuffle=True, drop_last=True))
    times, loader, step = {"plain": [], "ours": []}, {"plain": [], "ours": []}, 0
    for _ in range(args.rounds + 1):
        for name in times:
            start, waited = time.perf_counter(), 0.0
            for k in range(args.steps):
                before = time.perf_counter()
                batch = next(batches) if name == "plain" else data.batch(step + k)
                waited += time.perf_counter() - before
                if name == "plain":
                    plain_sgd.zero_grad()
                    cross_entropy(plain(batch[0]), batch[1], label_smoothing=c.label_smoothing).backward()
                    plain_sgd.step()
                else:
                    train_cifar.train_step(ours, ours, our_sgd, batch, None, c, scaler, autocast)
            times[name].append(time.perf_counter() - start)
            loader[name].append(waited / times[name][-1])
        step += args.steps
    ratios = [a / b for a, b in zip(times["plain"][1:], times["ours"][1:])]
    for name in times:
        report["rows"][name] = {"images_per_second": args.steps * c.batch_size / statistics.median(times[name][1:]),
                                "loader_share": statistics.median(loader[name][1:])}
        print("{:6}{images_per_second:8.1f} images/s, {loader_share:.1%} for batches".format(name, **report["rows"][name]))
    low, report["ours_of_plain"], high = statistics.quantiles(ratios, n=4)
    report["quartiles"] = [low, high]
    print(f"ours / plain: {report['ours_of_plain']:.3f}, quartiles {low:.3f} to {high:.3f}")
    write_report(report, args.file or ROOT / "results/cifar-speed-cpu.json")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("evidence", "speed"))
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data")
    parser.add_argument("--scratch", type=Path, default=Path("runs/evidence-cifar"), help="evidence: checkpoints")
    parser.add_argument("--minutes", type=float, default=1e9, help="evidence: begin nothing new after so long")
    parser.add_argument("--rounds", type=int, default=7, help="speed: rounds")
    parser.add_argument("--steps", type=int, default=4, help="speed: steps in a round")
    parser.add_argument("--file", type=Path)
    args = parser.parse_args()
    {"evidence": evidence, "speed": speed}[args.what](args)


if __name__ == "__main__":
    main()
