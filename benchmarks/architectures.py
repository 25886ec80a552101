"""Three questions that the paper leaves open, at a size of seconds a run: other architectures, kappa
and the learning rate's schedule, the sharpness of a language model.

    python benchmarks/architectures.py results/architectures.json     # makes the missing runs
    python benchmarks/architectures.py results/schedule.json
    python benchmarks/architectures.py results/sharpness-nano.json
    python benchmarks/architectures.py results/schedule.json --summary    # table, figure, no runs
    python benchmarks/architectures.py --generalisation    # a figure from the runs on file

Each file is a study as study.py describes it, with predictions that were written before the runs.
The data: scikit-learn's digits and the bytes of Python's library.
"""

import argparse
import contextlib
import functools
import io
import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from report import table
from speed import environment
from study import Study, mean, run_all

import common
import text
import train_gpt
from ire import IRE, SoftIRE, kth_smallest
from sharpness import largest_eigenvalue
from toy.common import BLACK, BLUE, GREEN, GREY, ORANGE, RED, STYLE

# What the pieces of the figures are called, and their colours.
COLOURS = {"AdamW": BLACK, "AdmIRE": BLUE, "SoftIRE": GREEN, "Muon": ORANGE}
COLOURS |= {"SGD": BLACK, "SGD-IRE": BLUE}
FLAT = 0.6  # the flat share for which the limit of kappa is computed


# ---------------------------------------------------------------------------- the architectures
def mlp():
    layers = nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    return nn.Sequential(*layers)


class GCN(nn.Module):
    """Two graph convolutions (Kipf & Welling): a mean over the neighbours, then a matrix."""

    def __init__(self, graph, width=64):
        """graph: the weights of the neighbours, sparse, shape (nodes, nodes)."""
        super().__init__()
        self.graph = graph
        self.first = nn.Linear(64, width)
        self.second = nn.Linear(width, 10)

    def forward(self, x):
        x = F.relu(self.first(self.graph @ x))
        x = F.dropout(x, 0.5, self.training)
        return self.second(self.graph @ x)


class LSTM(nn.Module):
    def __init__(self, vocab, width=128):
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, tokens):
        return self.head(self.lstm(self.embedding(tokens))[0])


class Selective(nn.Module):
    """A selective state space, as in Mamba-2 (Dao & Gu): the token decides what a head remembers and
    for how long. Each head has a state h of shape (d, state):

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


class SSM(nn.Module):
    def __init__(self, vocab, width=64, layers=2):
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.layers = nn.Sequential(*(Selective(width) for _ in range(layers)))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens):
        return self.head(self.norm(self.layers(self.embedding(tokens))))


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
        self.model = GCN(graph) if with_graph else mlp()

    def logits(self, rows):
        return self.model(self.x)[rows] if self.whole else self.model(self.x[rows])

    def loss(self, step):
        rows = self.train
        if not self.whole:
            rows = rows[torch.randint(len(rows), (self.c.batch_size,))]
        return F.cross_entropy(self.logits(rows), self.y[rows])

    def results(self):
        logits, labels = self.logits(self.held_out), self.y[self.held_out]
        return {
            "val_loss": float(F.cross_entropy(logits, labels)),
            "train_loss": float(F.cross_entropy(self.logits(self.train), self.y[self.train])),
            "accuracy": 100 * float((logits.argmax(1) == labels).float().mean()),
        }


class Bytes:
    def __init__(self, c, architecture):
        self.c = c
        self.data = text.Data(c)
        self.model = architecture(self.data.vocab)

    def mean_loss(self, batches):
        losses = [F.cross_entropy(self.model(x).mT, y) for x, y in batches]
        return sum(losses) / len(losses)

    def loss(self, step):
        return self.mean_loss(self.data.batch(step))

    def results(self):
        seen = [pair for step in range(16) for pair in self.data.batch(step)]
        validation = float(self.mean_loss(list(self.data.validation())))
        return {"val_loss": validation, "train_loss": float(self.mean_loss(seen))}


TASKS = {
    "mlp": lambda c: Digits(c, with_graph=False),
    "gcn": lambda c: Digits(c, with_graph=True),
    "lstm": lambda c: Bytes(c, LSTM),
    "ssm": lambda c: Bytes(c, SSM),
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
    groups = [
        {"params": [p], "lr_scale": tables.get(name, 1.0), "weight_decay": c.weight_decay}
        | ({"weight_decay": 0.0} if p.dim() == 1 else {})
        for name, p in model.named_parameters()
    ]
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
        task.loss(step).backward()
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
    if not all(map(torch.isfinite, map(torch.tensor, found.values()))):
        raise common.Diverged("a loss is not finite")
    share = zeros / c.steps / sum(p.numel() for p in params)
    return found | {"zero_share": share, "spread": float(torch.stack(matrices).std())}


def train_nano(study, settings, out):
    """A run of train_gpt.py, with the mean of its last training losses. `follows`: kappa is in
    proportion to the learning rate. `edges`: see `edges`, at each validation."""
    c, every = settings_of(study, settings, out)
    edge = {}

    def make(model, c):
        optimizer = train_gpt.make_optimizer(model, c)
        if every.get("follows"):
            optimizer.register_step_pre_hook(lambda *_: follow(optimizer, c))
        if every.get("edges"):
            batch = text.Data(c).batch(0)[0]
            steps = iter(range(1, c.steps + 1))

            def look(*_):
                step = next(steps)
                if step % c.eval_interval == 0:
                    edge[step] = edges(model, optimizer, c, batch)

            optimizer.register_step_post_hook(look)
        return optimizer

    with contextlib.redirect_stdout(io.StringIO()):
        loss = train_gpt.train(c, make)["val_loss"]
    log = common.read_log(c.out)
    losses = [row["train_loss"] for row in log if "train_loss" in row]
    found = {"val_loss": loss, "train_loss": losses[-1]}
    if c.sharpness:
        names = ("step", "val_loss", "trace", "lambda_max")
        curve = [{name: row[name] for name in names} for row in log if "trace" in row]
        found["curve"] = [row | edge.get(row["step"], {}) for row in curve]
    return found


def follow(optimizer, c):
    """kappa in proportion to the learning rate, c.kappa at the peak."""
    for group in optimizer.param_groups:
        group["kappa"] = c.kappa * group["lr"] / (c.lr * group["lr_scale"])


def edges(model, optimizer, c, batch):
    """How near Adam is to its edge of stability; 1 is on the edge (Cohen et al., 2207.14484).

    Adam's steps are diverging where lambda_max(S H S) > 2 (1 + beta1) / (1 - beta1), H being the
    Hessian and S^2 the length of each coordinate's step, lr * factor / sqrt(v).
    edge: with the optimizer's own factors. flat_edge: for the flat coordinates of AdamW alone. A
    kappa up to 1 / flat_edge - 1 is stable, which is the law of toy/quadratic.py.
    """
    v, plain, own = {}, {}, {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state[p]
            v[p] = state["exp_avg_sq"] / (1 - c.beta2 ** float(state["step"]))
            factor = 1 + group.get("kappa", 0) * getattr(optimizer, "masks", {}).get(p, 0.0)
            plain[p] = group["lr"] / (v[p].sqrt() + c.eps)
            own[p] = factor * plain[p]
    threshold = kth_smallest(v.values(), int(FLAT * sum(p.numel() for p in v)))
    flat = {p: plain[p] * (v[p] <= threshold) for p in v}
    return {"edge": edge(model, own, c, batch), "flat_edge": edge(model, flat, c, batch)}


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


def made(study, settings):
    """Makes one run; returns what the file holds of it. Seconds are of the processor."""
    out = ROOT / "runs" / "architectures" / str(os.getpid())
    started = time.process_time()
    train = train_small if settings["place"] in TASKS else train_nano
    found = {"val_loss": None}
    try:
        found = train(study, settings, out)
    except common.Diverged:
        pass
    finally:
        shutil.rmtree(out, ignore_errors=True)
    about = {"cpu_seconds": round(time.process_time() - started, 1)}
    about["finished"] = time.strftime("%Y-%m-%d %H:%M:%S")
    here = environment("cpu")
    about |= {name: here[name] for name in ("commit", "torch", "device", "threads")}
    print(about["finished"], settings, found["val_loss"], about["cpu_seconds"], flush=True)
    return found | about


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="the study, such as results/schedule.json")
    parser.add_argument("--summary", action="store_true", help="table and figure; run nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the models are small
    study = Study.read(args.file, made)
    if not args.summary:
        with common.locked(ROOT / "runs" / "architectures" / args.file.stem):
            run_all(study)
    study.save()
    print(table(json.loads(args.file.read_text())))


if __name__ == "__main__":
    main()
