"""Questions that the paper leaves open, at a size of seconds a run: other architectures, kappa and
the learning rate's schedule, the sharpness of a language model, generalisation.

    python benchmarks/architectures.py results/architectures.json     # makes the missing runs
    python benchmarks/architectures.py results/schedule.json
    python benchmarks/architectures.py results/sharpness-nano.json
    python benchmarks/architectures.py results/schedule.json --summary    # table, figure, no runs

Each file is a study as study.py describes it, with predictions that were written before the runs.
The data: scikit-learn's digits and the bytes of Python's library.
"""

import argparse
import functools
import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import common
import text
import train_gpt
from ire import IRE, SoftIRE, kth_smallest
from report import keep, table
from sharpness import largest_eigenvalue
from study import Study, half_interval, recorded, run_all
from toy.common import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, STYLE

FLAT = 0.6  # the flat share for which the limit of kappa is computed
COLOURS = {"AdamW": BLACK, "AdmIRE": BLUE, "SoftIRE": GREEN, "Muon": ORANGE}
COLOURS |= {"SGD": GREY, "SGD-IRE": RED, "SAM": SKY, "SAM-IRE": PINK}


# ---------------------------------------------------------------------------- the architectures
class Neighbours(nn.Module):
    """The mean over each node's neighbours, as in a graph convolution (Kipf & Welling)."""

    def __init__(self, graph):
        """graph: the weights of the neighbours, sparse, shape (nodes, nodes)."""
        super().__init__()
        self.graph = graph

    def forward(self, x):
        return self.graph @ x


def gcn(graph, width=64):
    near = Neighbours(graph)
    first = near, nn.Linear(64, width), nn.ReLU(), nn.Dropout()
    return nn.Sequential(*first, near, nn.Linear(width, 10))


def mlp(width=128):
    first = nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
    return nn.Sequential(*first, nn.Linear(width, 10))


class LSTM(nn.LSTM):
    def forward(self, x):
        return super().forward(x)[0]


class Selective(nn.Module):
    """A selective state space, as in Mamba-2 (Dao & Gu): the token decides what a head remembers,
    and for how long. Each head has a state h of shape (d, state):

        h_t = exp(-delta_t rate) h_(t-1) + delta_t x_t B_t,    y_t = h_t C_t

    The sum over the past is written out, as a lower triangular matrix of (time, time)."""

    def __init__(self, width, heads=4, state=16):
        super().__init__()
        inner = 2 * width
        self.parts = [inner, inner, state, state, heads]  # x, gate, B, C, delta
        self.norm = nn.RMSNorm(width)
        self.enter = nn.Linear(width, sum(self.parts), bias=False)
        self.near = nn.Conv1d(inner, inner, 4, groups=inner, padding=3)
        self.delta = nn.Parameter(torch.linspace(-5, -1, heads))
        self.rate = nn.Parameter(torch.zeros(heads))
        self.skip = nn.Parameter(torch.ones(heads, 1))
        self.leave = nn.Linear(inner, width, bias=False)

    def forward(self, u):
        batch, time, _ = u.shape
        x, gate, B, C, delta = self.enter(self.norm(u)).split(self.parts, -1)
        x = F.silu(self.near(x.mT)[..., :time]).mT.unflatten(-1, (len(self.rate), -1))
        delta = F.softplus(delta + self.delta)  # (batch, time, heads)
        logs = (-delta * self.rate.exp()).cumsum(1)
        logs = logs[:, :, None] - logs[:, None]  # (batch, time, past, heads)
        future = torch.ones(time, time).triu(1).bool()[..., None]
        kept = logs.masked_fill(future, -torch.inf).exp() * delta[:, None]
        weights = kept * (C @ B.mT)[..., None]
        y = torch.einsum("btsh,bshd->bthd", weights, x) + self.skip * x
        return u + self.leave(y.flatten(-2) * F.silu(gate))


class Reader(nn.Module):
    """From bytes to the logits of the next byte."""

    def __init__(self, width, *layers):
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(width, 256, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.1)

    def forward(self, tokens):
        return self.head(self.layers(self.embedding(tokens)))


# ------------------------------------------------------------------------------------- the data
@functools.cache
def digits():
    """1,797 pictures (64 pixels, mean 0) and their classes, and the graph of the ten nearest
    neighbours: symmetric, with loops, D^-1/2 A D^-1/2."""
    from sklearn.datasets import load_digits
    from sklearn.neighbors import kneighbors_graph

    x, y = load_digits(return_X_y=True)
    near = torch.from_numpy(kneighbors_graph(x, 10).toarray()).float()
    near = torch.maximum(near, near.T) + torch.eye(len(x))
    root = near.sum(1).rsqrt()
    graph = (root[:, None] * near * root).to_sparse()
    x = torch.from_numpy(x).float() / 16
    return x - x.mean(0), torch.from_numpy(y), graph


class Digits:
    """The seed chooses what is for training: 1,200 pictures, or with a graph ten of each class."""

    def __init__(self, c, with_graph):
        self.c = c
        self.x, self.y, graph = digits()
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(c.seed))
        labelled = [order[self.y[order] == label][:10] for label in range(10)]
        self.train = torch.cat(labelled) if with_graph else order[:1200]
        self.held_out = order[~torch.isin(order, self.train)]
        self.whole = with_graph  # a step sees all pictures that have labels
        self.model = gcn(graph) if with_graph else mlp()

    def loss(self, rows):
        logits = self.model(self.x)[rows] if self.whole else self.model(self.x[rows])
        self.accuracy = 100 * float((logits.argmax(1) == self.y[rows]).float().mean())
        return F.cross_entropy(logits, self.y[rows])

    def batch(self, step):
        some = torch.randint(len(self.train), (self.c.batch_size,))
        return self.train if self.whole else self.train[some]

    def results(self):
        train_loss, val_loss = float(self.loss(self.train)), float(self.loss(self.held_out))
        return {"train_loss": train_loss, "val_loss": val_loss, "accuracy": self.accuracy}


class Bytes:
    def __init__(self, c, *shape):
        self.data = text.Data(c)
        self.model = Reader(*shape)
        self.batch = self.data.batch

    def loss(self, batches):
        losses = [F.cross_entropy(self.model(x).mT, y) for x, y in batches]
        return sum(losses) / len(losses)

    def results(self):
        seen = [pair for step in range(16) for pair in self.batch(step)]
        validation = list(self.data.validation())
        return {"train_loss": float(self.loss(seen)), "val_loss": float(self.loss(validation))}


TASKS = {
    "mlp": lambda c: Digits(c, with_graph=False),
    "gcn": lambda c: Digits(c, with_graph=True),
    "lstm": lambda c: Bytes(c, 128, LSTM(128, 128, batch_first=True)),
    "ssm": lambda c: Bytes(c, 64, Selective(64), Selective(64), nn.RMSNorm(64)),
}


# -------------------------------------------------------------------------------------- one run
def settings_of(study, settings, out):
    """All settings of a run, and those of them that train_gpt.py knows as its Config."""
    place, form = study.place(settings["place"]), study.form(settings["form"])
    every = {**study.plan["fixed"], **place["settings"], **form, **form["settings"], **settings}
    fields = {field.name for field in common.fields(train_gpt.Config)}
    own = {"micro_batch": place["batch"], "eval_interval": place["steps"]}
    own |= {name: value for name, value in every.items() if name in fields}
    steps = place["steps"]
    c = train_gpt.Config(
        **own,
        steps=steps,
        batch_size=place["batch"],
        warmup=round(every["warmup_fraction"] * steps),
        device="cpu",
        out=str(out),
        overwrite=True,
        log_interval=25,
        checkpoint_interval=steps,
    )
    return c, every


def make_optimizer(model, c, every):
    """AdamW or SGD, and what lengthens its steps. Weight decay is on matrices alone, and SoftIRE on
    the hidden matrices."""
    tables = {"embedding.weight": c.embedding_lr, "head.weight": c.head_lr}
    groups = []
    for name, p in model.named_parameters():
        decay = c.weight_decay if p.dim() > 1 else 0.0
        own = {"lr_scale": tables.get(name, 1.0), "weight_decay": decay}
        groups.append({"params": [p], **own})
    if every["base"] == "sgd":
        base = torch.optim.SGD(groups, lr=c.lr, momentum=every["momentum"])
    else:
        base = torch.optim.AdamW(groups, lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps)
    if every["rule"] == "ire":
        return IRE(base, kappa=c.kappa, gamma=c.gamma)
    if every["rule"] == "soft":
        named = model.named_parameters()
        hidden = [p for name, p in named if p.dim() == 2 and name not in tables]
        return SoftIRE(base, params=hidden, alpha=c.alpha)
    return base


def train_small(study, settings, out):
    """A run of one of the architectures, and what the answer may depend on:

    zero_share: the share of coordinates whose gradient is zero, mean over the steps.
    spread: of the curvature between tensors: the standard deviation over the matrices of
    log10(mean squared gradient), a running mean at the end."""
    c, every = settings_of(study, settings, out)
    torch.manual_seed(c.seed)
    task = TASKS[settings["place"]](c)
    optimizer = make_optimizer(task.model, c, every)
    params = list(task.model.parameters())
    squares = [torch.zeros_like(p) for p in params]
    zeros = 0.0
    for step in range(c.steps):
        for group in optimizer.param_groups:
            group["lr"] = train_gpt.learning_rate(c, step) * group["lr_scale"]
        task.loss(task.batch(step)).backward()
        nn.utils.clip_grad_norm_(params, c.clip)
        zeros += sum(int((p.grad == 0).sum()) for p in params)
        for square, p in zip(squares, params, strict=True):
            square.lerp_(p.grad * p.grad, 0.02)
        optimizer.step()
        optimizer.zero_grad()
    matrices = [square.mean().clamp_min(1e-30).log10() for square in squares if square.dim() == 2]
    task.model.eval()
    with torch.no_grad():
        found = task.results()
    if not math.isfinite(found["val_loss"]):
        raise common.Diverged("the loss is not finite")
    share = zeros / c.steps / sum(p.numel() for p in params)
    return found | {"zero_share": share, "spread": float(torch.stack(matrices).std())}


def train_nano(study, settings, out):
    """A run of train_gpt.py. `follows`: kappa is in proportion to the learning rate. With
    `sharpness`, what train_gpt.py measures at each validation, and for AdamW how near it is to its
    edge of stability."""
    c, every = settings_of(study, settings, out)
    found = {}

    def make(model, c):
        optimizer = train_gpt.make_optimizer(model, c)
        if every.get("follows"):
            optimizer.register_step_pre_hook(lambda *_: follow(optimizer, c))
        if c.sharpness and every["base"] == "adamw":
            batch = text.Data(c).batch(0)[0]
            look = functools.partial(edges, model, optimizer, c, batch, found)
            optimizer.register_step_post_hook(lambda *_: look())
        return optimizer

    loss = train_gpt.train(c, make)["val_loss"]
    log = common.read_log(c.out)
    run = {"val_loss": loss, "train_loss": [r["train_loss"] for r in log if "train_loss" in r][-1]}
    if c.sharpness:
        names = ("step", "val_loss", "trace", "lambda_max")
        curve = [{name: row[name] for name in names} for row in log if "trace" in row]
        run["curve"] = [row | found.get(row["step"], {}) for row in curve]
    return run


def follow(optimizer, c):
    """kappa in proportion to the learning rate, c.kappa at the peak."""
    for group in optimizer.param_groups:
        group["kappa"] = c.kappa * group["lr"] / (c.lr * group["lr_scale"])


def edges(model, optimizer, c, batch, found):
    """How near Adam is to its edge of stability, into found[step]; 1 is on the edge.

    Adam diverges where lambda_max(S H S) > 2 (1 + beta1) / (1 - beta1) (Cohen et al., 2207.14484).
    H is the Hessian, and S^2 the length of each coordinate's step, lr * factor / sqrt(v).
    edge: with the optimizer's own factors. flat_edge: of the flat coordinates of AdamW alone. A
    kappa up to 1 / flat_edge - 1 is stable, which is the law of toy/quadratic.py.
    """
    v, plain, own = {}, {}, {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state[p]
            step = int(state["step"])
            v[p] = state["exp_avg_sq"] / (1 - c.beta2**step)
            factor = 1 + group.get("kappa", 0) * getattr(optimizer, "masks", {}).get(p, 0.0)
            plain[p] = group["lr"] / (v[p].sqrt() + c.eps)
            own[p] = factor * plain[p]
    if step % c.eval_interval == 0:
        threshold = kth_smallest(v.values(), int(FLAT * sum(p.numel() for p in v)))
        flat = {p: plain[p] * (v[p] <= threshold) for p in v}
        lengths = {"edge": own, "flat_edge": flat}
        found[step] = {name: edge(model, each, c, batch) for name, each in lengths.items()}


def edge(model, lengths, c, batch):
    """lambda_max(S H S) / limit: the Hessian of the loss at theta + S z as a function of z."""
    z = [torch.zeros_like(p).requires_grad_() for p in model.parameters()]

    def loss():
        moved = {}
        for (name, p), x in zip(model.named_parameters(), z, strict=True):
            moved[name] = p.detach() + lengths[p].sqrt() * x
        return torch.func.functional_call(model, moved, batch)

    with sdpa_kernel(SDPBackend.MATH):
        largest, _ = largest_eigenvalue([loss], z, products=15, tolerance=0.05)
    return largest / (2 * (1 + c.beta1) / (1 - c.beta1))


def train(study, settings, out):
    each = train_small if settings["place"] in TASKS else train_nano
    return each(study, settings, out)


# ---------------------------------------------------------------------------------- the figures
def of_architectures(report):
    """The gain of each rule on top of the base with all its trials, and its 95% interval."""
    panels = {}
    for row in report["gains"]:
        if report["forms"][row["form"]]["rule"] and len(row["seeds"]) > 1:
            panels.setdefault(report["places"][row["place"]]["data"].split(",")[0], []).append(row)
    figure, axes = panels_of(panels, 2.7)
    for title, ax in axes.items():
        for y, row in enumerate(panels[title]):
            error = half_interval((row["gain_stderr"], len(row["seeds"])))
            ax.errorbar(row["gain"], y, xerr=error, color=BLUE, marker="o", capsize=3)
        names = [f"{row['form']}, {row['place'].upper()}" for row in panels[title]]
        ax.set_yticks(range(len(names)), names)
        ax.axvline(0, color=BLACK, linewidth=1)
        ax.set(xlabel="gain in nats (positive is better)", ylim=(len(names) - 0.5, -0.5))
    return figure


def panels_of(titles, height):
    """A figure of stacked panels, and {title: panel}."""
    size = (7, height * len(titles))
    figure, axes = plt.subplots(len(titles), figsize=size, layout="constrained", squeeze=False)
    axes = dict(zip(titles, axes.flat, strict=True))
    for title, ax in axes.items():
        ax.set_title(title)
    return figure, axes


def of_schedule(report):
    """The gain over kappa for each schedule, with standard errors, and the law's limit of kappa
    for AdamW's run in sharpness-nano.json."""
    curves = {}
    for row in report["gains"]:
        own = report["forms"][row["form"]]["settings"]
        if "kappa" in own:
            curve = curves.setdefault((own["schedule"], "follows" in own), [])
            curve.append((own["kappa"], row["gain"], row["gain_stderr"] or 0))
    figure, axes = panels_of(dict.fromkeys(schedule for schedule, _ in curves), 2.6)
    for (schedule, follows), points in curves.items():
        color, label = (ORANGE, "κ follows the rate") if follows else (BLUE, "κ stays")
        kappas, gains, errors = zip(*sorted(points), strict=True)
        ax = axes[schedule]
        ax.errorbar(kappas, gains, errors, color=color, marker="o", capsize=3, label=label)
    runs = common.read_json(ROOT / "results" / "sharpness-nano.json")["runs"]
    for schedule, ax in axes.items():
        form = "AdamW" if schedule == "cosine" else f"AdamW, {schedule}"
        curve = [row for run in runs if run["settings"]["form"] == form for row in run["curve"]]
        if curve:
            limit = 1 / max(row.get("flat_edge", 0) for row in curve) - 1
            ax.axvline(limit, color=RED, linestyle="--", label=f"the law's κ_max, {limit:.1f}")
        ax.axhline(0, color=BLACK, linewidth=1)
        ax.set(xscale="log", xlabel="κ", ylabel="gain (nats)")
        ax.set_xticks([1, 2, 4, 8, 16, 32, 64], [1, 2, 4, 8, 16, 32, 64])
        ax.set_xticks([], minor=True)
        ax.legend()
    return figure


def of_sharpness(report):
    """Sharpness over the steps and over the loss, and Adam's edge; a line for each seed."""
    panels = {
        "Tr(H)": ("step", "trace"),
        "Tr(H) at equal loss": ("val_loss", "trace"),
        "λ_max at equal loss": ("val_loss", "lambda_max"),
        "how near to the edge of stability (1 is unstable)": ("step", "edge"),
    }
    four = "AdamW", "AdmIRE", "SoftIRE", "Muon"
    figure, axes = panels_of(panels, 2.4)
    for title, ax in axes.items():
        x, y = panels[title]
        for run in report["runs"]:
            form = run["settings"]["form"]
            points = [(row[x], row[y]) for row in run["curve"] if row["step"] and y in row]
            if form in four and points:
                ax.plot(*zip(*points, strict=True), color=COLOURS[form], linewidth=1)
        ax.set(xlabel=x.replace("val_loss", "validation loss"), ylim=(0, None))
    held = {run["settings"]["form"] for run in report["runs"]}
    for form in four:
        if form in held:
            axes["Tr(H)"].plot([], color=COLOURS[form], label=form)
    axes["Tr(H)"].legend()
    return figure


def of_generalisation(report):
    """What is reached on held-out data over the training loss, for all settings that were tried on
    seed 0. Above the line through the runs of its base, IRE generalises better at the same training
    loss."""
    quick = common.read_json(ROOT / "results" / "cifar-quick.json")
    points = {}  # {(panel, optimizer): [(training loss, held out)]}
    for run in quick["runs"]:
        if run["seed"] == 0:
            own = points.setdefault(("CIFAR-10, ResNet-8", run["optimizer"].upper()), [])
            own.append((run["train_loss"], run["val_acc"]))
    for run in report["runs"]:
        at = run["settings"]
        if at["place"] == "mlp" and at["seed"] == 0 and "SGD" not in at["form"]:
            own = points.setdefault(("digits, MLP", at["form"].removesuffix(", on")), [])
            own.append((math.log10(run["train_loss"]), -run["val_loss"]))
    figure, axes = panels_of(dict.fromkeys(panel for panel, _ in points), 3.5)
    bases = {"SGD-IRE": "SGD", "SAM-IRE": "SAM", "AdmIRE": "AdamW", "SoftIRE": "AdamW"}
    for (panel, form), own in points.items():
        label = form
        if form in bases:
            value, error = above(points[panel, bases[form]], own)
            label += f": {value:+.3f} ± {error:.3f}"
        axes[panel].scatter(*zip(*own, strict=True), s=14, color=COLOURS[form], label=label)
    for ax in axes.values():
        ax.legend(ncols=2, loc="lower left")
    axes["CIFAR-10, ResNet-8"].set(xlabel="training loss", ylabel="validation accuracy (%)")
    axes["digits, MLP"].set(xlabel="log10 of the training loss", ylabel="minus the held-out loss")
    return figure


def above(base, own):
    """The mean distance of the points above the line through those of the base, with its error."""
    line = np.poly1d(np.polyfit(*zip(*base, strict=True), 1))
    parts = [[y - line(x) for x, y in points] for points in (own, base)]
    error = sum(np.var(part, ddof=1) / len(part) for part in parts) ** 0.5
    return np.mean(parts[0]), error


DRAWN = {"architectures": of_architectures, "schedule": of_schedule, "sharpness-nano": of_sharpness}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", choices=[f"results/{name}.json" for name in DRAWN])
    parser.add_argument("--summary", action="store_true", help="table and figure; run nothing")
    args = parser.parse_args()
    file = Path(args.file)
    torch.set_num_threads(1)  # the models are small
    with common.locked(ROOT / "runs" / "architectures" / file.stem):
        study = Study.read(file, functools.partial(recorded, train))
        if not args.summary:
            run_all(study)
        study.save()
    report = common.read_json(file)
    print(table(report))
    plt.rcParams.update(STYLE)
    keep(DRAWN[file.stem](report), file.with_suffix(".png"))
    if file.stem == "architectures":
        keep(of_generalisation(report), file.with_name("generalisation.png"))


if __name__ == "__main__":
    main()
