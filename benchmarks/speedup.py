"""Does AdmIRE beat an AdamW that was tuned as hard? One script that runs, goes on where it stopped, and summarises.

    python benchmarks/speedup.py                   # the tiny model; results/speedup-tiny.json and .png; hours on one core
    python benchmarks/speedup.py --row nano        # a smaller model, four times as fast
    python benchmarks/speedup.py --row 60m         # a row of the paper: on a GPU, for days
    python benchmarks/speedup.py --summary         # the table and the figure from the runs that are held, without running

The protocol
- One model, one order of the data, one batch size, one shape of schedule (linear warm-up, cosine to lr / 20), clip 1.
- Tuning, on seed 0: every optimizer gets the same number of trials (TRIALS) in the same search, coordinate by coordinate:
  learning rate by factors of sqrt 2, length of the warm-up, then AdamW beta2 and weight decay, AdmIRE kappa and gamma,
  Muon its learning rate over AdamW's and weight decay. A better neighbour is moved to, and the search goes on there.
  All start at the same learning rate and warm-up. AdmIRE and Muon take AdamW's best beta2, AdmIRE its weight decay too.
- Judged on seeds that took no part in the tuning (1 to 5; others 1 to 3), by the validation loss at the end of the
  schedule. Differences are taken seed by seed, as the seed sets weights and batches alike; +- is a standard error.
- Speed-up: AdamW with longer schedules, each decayed to its end, at the best lr and the same fraction of warm-up. The
  speed-up is the length at which it reaches AdmIRE's loss, by interpolation over the logarithm of the length, seed by
  seed. In wall-clock it is divided by the time of a step, which benchmarks/train.py measures with both interleaved; IRE
  costs that only from the step on at which it is switched on.
- What would show that flatness is not the cause: the same step on a random mask of the same size or on the sharp
  coordinates, and AdamW whose lr jumps at that step (class RandomMask and below).
- Two horizons, the second four times as long, where the short one's best and its neighbours are tried again.
- IRE from step 0 was first an ablation. As it beat the rest it was tuned as such, with as many trials again ("from_step_0").
  AdamW's search goes on to as many as both of IRE's had; on other seeds its new settings are judged like the old ones.
- A run holds the commit and the machine it was made with. The tiny model's tuning, finalists, falsifiers and Muon are of commit
  fbe25c1, the rest of later ones, whose probe draws its labels in another order. "AdmIRE again" is the finalist with those
  draws: the difference of the two is the probe's noise, and the ablations are to be held against the second. Where one version
  of the script makes all runs, the two are equal.
"""
import argparse
import contextlib
import copy
import dataclasses
import fcntl
import hashlib
import io
import itertools
import json
import math
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import train_gpt
from ire import IRE
from step import environment

# The paper's rows are on one GPU, and their short horizon is a quarter of the paper's steps.
TINY = dict(context=128, batch_size=16, data="stdlib")
ROWS = {
    "nano": dict(steps=500, lr=2e-3, warmup=0.5, model=dict(layers=2, width=64, heads=2, ffn=168, **TINY)),
    "tiny": dict(steps=500, lr=2e-3, warmup=0.5, model=dict(layers=4, width=128, heads=4, ffn=336, **TINY)),
    "60m": dict(steps=12500, lr=6e-4, warmup=0.05, model=dict(preset="60m")),
    "119m": dict(steps=7500, lr=6e-4, warmup=0.05, model=dict(preset="119m")),
    "229m": dict(steps=12500, lr=6e-4, warmup=0.05, model=dict(preset="229m"))}
TRIALS, LONG_TRIALS = 14, 5
FINALISTS, SEEDS = (1, 2, 3, 4, 5), (1, 2, 3)
WARMUPS = (0.01, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8)  # fractions of the schedule
DECAYS, GAMMAS = (0.03, 0.1, 0.3), (0.5, 0.7, 0.9)
GRIDS = {"adamw": {"beta2": (0.95, 0.98, 0.99), "weight_decay": DECAYS}, "admire": {"kappa": (1.0, 2.0, 4.0), "gamma": GAMMAS},
         "muon": {"ratio": (0.5, 1.0, 2.0, 4.0, 8.0), "weight_decay": DECAYS},
         "muon-ire": {"kappa": (0.5, 1.0, 2.0), "gamma": GAMMAS}}
PROBED = dict(gamma=0.7, interval=10, curvature="fisher")
STARTS = {"adamw": dict(beta2=0.95, weight_decay=0.1), "admire": dict(kappa=2.0, **PROBED),
          "muon": dict(ratio=2.0, weight_decay=0.1), "muon-ire": dict(kappa=1.0, **PROBED)}
INHERITED = {"admire": ("adamw", "beta2", "weight_decay"), "muon": ("adamw", "beta2"),
             "muon-ire": ("muon", "beta2", "weight_decay", "ratio")}
NO_IRE = dict.fromkeys(("ablation", "kappa", "gamma", "interval", "curvature"))
FALSIFIERS = {
    "random mask": dict(ablation="random"), "inverted mask": dict(ablation="inverted"),
    "all coordinates": dict(ablation="all"), "lr jumps by the mean": dict(ablation="jump"),
    "second moment": dict(curvature="second_moment"), "switched on smoothly": dict(ablation="smooth")}
ABLATIONS = {
    "sharpest, same size": dict(ablation="sharpest"), "random in each tensor": dict(ablation="shuffled"),
    "on from step 0": dict(ablation="early"), "decay not amplified": dict(ablation="decay"), "K = 100": dict(interval=100),
    "probe on a quarter": dict(ablation="quarter"), "random mask from step 0": dict(ablation="early random"),
    "K = 1": dict(interval=1)}
# (stage, label, horizon, optimizer, what differs from its best, seeds), in an order that can be read after any of them
PLAN = [("tuning", "", 1, "adamw", {}, ()), ("tuning", "", 1, "admire", {}, ()),
        ("finalists", "AdamW", 1, "adamw", {}, FINALISTS), ("finalists", "AdmIRE", 1, "admire", {}, FINALISTS),
        ("schedule", "AdamW, 1.2 times the steps", 1, "adamw", dict(length=1.2), FINALISTS),
        *[("falsifiers", name, 1, "admire", changes, SEEDS) for name, changes in FALSIFIERS.items()],
        ("muon", "Muon", 1, "muon", {}, SEEDS),
        *[("schedules", f"AdamW, {n:g} times the steps", 1, "adamw", dict(length=n), seeds)
          for n, seeds in ((0.8, FINALISTS), (1.4, SEEDS), (1.7, SEEDS), (2, SEEDS))],
        ("ablations", "AdmIRE again", 1, "admire", dict(ablation="again"), FINALISTS),
        *[("ablations", name, 1, "admire", changes, SEEDS) for name, changes in ABLATIONS.items()],
        ("long", "AdamW, long", 4, "adamw", {}, SEEDS), ("long", "AdmIRE, long", 4, "admire", {}, SEEDS),
        *[("long", f"AdamW, long, {n:g} times the steps", 4, "adamw", dict(length=n), SEEDS) for n in (1.2, 0.8)],
        ("muon-ire", "Muon with IRE", 1, "muon-ire", {}, SEEDS),
        ("muon-ire", "Muon with a random mask", 1, "muon-ire", dict(ablation="random"), SEEDS),
        ("muon-ire", "Muon at those settings, no mask", 1, "muon-ire", dict(NO_IRE, optimizer="muon"), SEEDS),
        ("start", "second moment from step 0", 1, "admire", dict(ablation="early", curvature="second_moment"), SEEDS),
        ("start", "AdmIRE from step 0, long", 4, "admire", dict(ablation="early"), SEEDS),
        ("start", "random mask from step 0, long", 4, "admire", dict(ablation="early random"), SEEDS),
        ("early", "AdamW, twice the trials", 1, "adamw more", {}, FINALISTS),
        ("early", "AdmIRE from step 0, tuned so", 1, "admire early", {}, FINALISTS),
        ("early", "random mask from step 0, tuned so", 1, "admire early", dict(ablation="early random"), SEEDS),
        ("early", "second moment from step 0, those settings", 1, "admire early", dict(curvature="second_moment"), SEEDS),
        ("early", "AdamW at those settings", 1, "admire early", dict(NO_IRE, optimizer="adamw"), SEEDS),
        ("early", "second moment from step 0, long", 4, "admire", dict(ablation="early", curvature="second_moment"), SEEDS)]
STAGES = list(dict.fromkeys(entry[0] for entry in PLAN))
SETTINGS = ("optimizer", "ablation", "lr", "warmup_fraction", "beta2", "weight_decay", "ratio", "kappa", "gamma", "interval",
            "curvature", "seed", "steps")
SCRIPT = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]  # for runs that are older than this file's commit

# ------------------------------------------------------------------------------------------------ optimizers
def shuffled(mask, step):
    """The mask's values in another order, drawn from the run's seed and the step."""
    generator = torch.Generator().manual_seed(hash((torch.initial_seed(), step, mask.numel())) % 2**63)
    return mask.flatten()[torch.randperm(mask.numel(), generator=generator).to(mask.device)].view_as(mask)

class RandomMask(IRE):
    """As many flat coordinates as the curvature gives, anywhere in the model, drawn anew at each refresh."""

    def _update_masks(self, curvature):
        super()._update_masks(curvature)
        masks = [self.state[p]["flat"] for p in curvature]
        everywhere = shuffled(torch.cat([m.flatten() for m in masks]), self._t)
        for m, part in zip(masks, everywhere.split([m.numel() for m in masks])):
            m.copy_(part.view_as(m))

class ShuffledMask(IRE):
    """As RandomMask, but every tensor keeps its own number of flat coordinates."""

    def _update_masks(self, curvature):
        super()._update_masks(curvature)
        for p in curvature:
            self.state[p]["flat"] = shuffled(self.state[p]["flat"], self._t)

class InvertedMask(IRE):
    """The sharp coordinates take the longer steps, the flat ones the base's."""

    def _update_masks(self, curvature):
        super()._update_masks(curvature)
        for p in curvature:
            self.state[p]["flat"].logical_not_()

class SharpestMask(IRE):
    """As many coordinates as in the flat mask take the longer steps, but the sharpest."""

    def _update_masks(self, curvature):
        super()._update_masks({p: 1 / h.abs().clamp_min(1e-30) for p, h in curvature.items()})

class Smooth(IRE):
    """kappa rises from 0 in a straight line over the `rise` steps after warmup."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["kappa"] = self.top * min(1, max(0, self._t - self.warmup + 1) / self.rise)
        return super().step(closure)

class DecayOnce(IRE):
    """The flat coordinates' step is 1 + kappa times as long without the weight decay's part of it."""

    @torch.no_grad()
    def step(self, closure=None):
        old = {p: p.clone() for group in self.param_groups for p in group["params"]}
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p += group["kappa"] * group["lr"] * group["weight_decay"] * self.state[p]["flat"] * old[p]
        return loss

class Jump(torch.optim.AdamW):
    """AdamW whose lr is `factor` times the schedule's from step `start` on. The caller sets lr anew before each step."""

    def __init__(self, groups, factor, start):
        super().__init__(groups)
        self.factor, self.start, self.steps = factor, start, 0

    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"] *= self.factor if self.steps >= self.start else 1
        self.steps += 1
        return super().step(closure)

class MuonAndAdamW(torch.optim.Optimizer):
    """Muon on the hidden matrices with `ratio` times the lr, AdamW on the rest. The caller sets lr anew before each step."""

    def __init__(self, model, c, ratio):
        hidden = [p for name, p in model.named_parameters() if p.dim() == 2 and "layers" in name]
        self.muon = torch.optim.Muon(hidden, c.lr, c.weight_decay, adjust_lr_fn="match_rms_adamw")
        self.adamw, self.ratio = train_gpt.make_optimizer(model, dataclasses.replace(c, optimizer="adamw")), ratio
        for group in self.adamw.param_groups:
            group["params"] = [p for p in group["params"] if all(p is not h for h in hidden)]
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})  # the groups themselves, not copies
        self.muon.state = self.adamw.state = self.state

    def step(self, closure=None):
        for group in self.muon.param_groups:
            group["lr"] *= self.ratio
        self.muon.step()
        self.adamw.step()

def builder(run):
    """build(model, c) for train_gpt.train: the optimizer of a run."""
    name = (run["ablation"] or "").removeprefix("early ")
    kinds = {"random": RandomMask, "shuffled": ShuffledMask, "inverted": InvertedMask, "sharpest": SharpestMask,
             "smooth": Smooth, "decay": DecayOnce}

    def build(model, c):
        base = (MuonAndAdamW(model, c, run["ratio"]) if "muon" in run["optimizer"] else
                train_gpt.make_optimizer(model, dataclasses.replace(c, optimizer="adamw")))
        if run["optimizer"] in ("adamw", "muon"):
            return base
        if name in ("jump", "all"):
            return Jump(base.param_groups, 1 + c.kappa * (c.gamma if name == "jump" else 1), c.ire_warmup)
        opt = kinds.get(name, IRE)(base, kappa=c.kappa, gamma=c.gamma, interval=c.interval, warmup=c.ire_warmup,
                                   curvature=c.curvature)
        opt.top, opt.rise = c.kappa, max(1, c.steps // 5)
        return opt

    return build

# ------------------------------------------------------------------------------------------------ runs
class NotHeld(Exception):
    """The run is not in the results, and nothing is to be run."""

class Results:
    """The runs of one row, in one JSON file. `train(run, model)` makes those that are not held; None: only look up."""

    def __init__(self, row, path, train=None, **model):
        self.row, self.path, self.train, self.stage = row, path, train, None
        self.model = ROWS[row]["model"] | model
        held = json.loads(path.read_text()) if path.exists() else {}
        self.runs, self.environment = held.get("runs", []), held.get("environment")
        self.index = {self.key(r): r for r in self.runs}

    @staticmethod
    def key(run):
        return tuple(run.get(k) for k in SETTINGS)

    def loss(self, settings):
        """Validation loss at the end of the run; infinite where it diverged. Raises NotHeld."""
        key = self.key(settings)
        if key not in self.index:
            if self.train is None:
                raise NotHeld(key)
            run = dict(zip(SETTINGS, key))
            self.index[key] = {**run, "stage": self.stage, **self.train(run, self.model)}
            self.runs.append(self.index[key])
            self.save()
        return math.inf if self.index[key]["diverged"] else self.index[key]["val_loss"]

    def over(self, settings, seeds=FINALISTS):
        """{seed: loss}, where nothing is trained of those seeds that are held."""
        losses = {}
        for seed in seeds:
            with contextlib.suppress(NotHeld):
                losses[seed] = self.loss({**settings, "seed": seed})
        return losses

    def save(self):
        head = json.dumps({**summarise(self), "environment": self.environment, "runs": []}, indent=1)
        runs = ",\n".join("  " + json.dumps(r) for r in self.runs)  # a run a line
        text = head.replace('"runs": []', f'"runs": [\n{runs}\n ]')
        train_gpt.write_atomically(self.path, lambda f: f.write(text.encode()))

def train(run, model):
    """Trains one run; returns what the results hold of it beside its settings."""
    out, warmup = ROOT / "runs" / "speedup" / str(os.getpid()), round(run["warmup_fraction"] * run["steps"])
    own = {k: run[k] for k in ("lr", "beta2", "weight_decay", "kappa", "gamma", "interval", "curvature", "seed", "steps")}
    c = train_gpt.complete(train_gpt.Config(
        **model, **{k: v for k, v in own.items() if v is not None}, warmup=warmup, out=str(out), overwrite=True,
        optimizer="adamw" if run["optimizer"] in ("adamw", "muon") else "admire", log_interval=50,
        eval_interval=run["steps"], checkpoint_interval=run["steps"], eval_sequences=1024))
    if "early" in (run["ablation"] or ""):
        c.ire_warmup = 0
    if run["ablation"] == "quarter":
        c.micro_batch = math.gcd(c.micro_batch, c.batch_size // 4)
        c.probe_batches = c.batch_size // 4 // c.micro_batch
    started = time.time()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            summary = train_gpt.train(c, builder(run))
        result = {"val_loss": summary["val_loss"], "diverged": False, "seconds": round(summary["seconds"], 1)}
    except train_gpt.Diverged:
        result = {"val_loss": None, "diverged": True, "seconds": round(time.time() - started, 1)}
    finally:
        shutil.rmtree(out, ignore_errors=True)
    print(", ".join(f"{k} {v}" for k, v in {**run, **result}.items() if v is not None), flush=True)
    data, here = train_gpt.Data(c), environment(c.device)
    return {**result, "warmup": warmup, "epochs": round(c.steps * c.batch_size * c.context / len(data.train), 3),
            "data": data.sha256[:12], "commit": here["commit"], "script": SCRIPT, "torch": here["torch"],
            "hardware": here["device"], "threads": here["threads"], "finished": time.strftime("%Y-%m-%d %H:%M:%S")}

# ------------------------------------------------------------------------------------------------ the plan
class Spent(Exception):
    """All trials are used."""

def search(start, grid, loss, trials):
    """The best of `trials` points of the grid {setting: values}: along one setting after the other from `start`, then,
    when nothing along one setting is better, along pairs. Returns it with its loss and the number of trials."""
    tried = {}

    def value(point):
        key = tuple(sorted(point.items()))
        if key not in tried:
            if len(tried) == trials:
                raise Spent
            tried[key] = loss(point)
        return tried[key]

    def step(point, moves):
        places = {name: grid[name].index(point[name]) + move for name, move in moves.items()}
        if all(0 <= i < len(grid[name]) for name, i in places.items()):
            return {**point, **{name: grid[name][i] for name, i in places.items()}}

    here, singles = start, [{name: move} for name in grid for move in (1, -1)]
    pairs = [a | b for a, b in itertools.combinations(singles, 2) if a.keys() != b.keys()]
    try:
        value(here)
        moved = True
        while moved:
            moved = False
            for moves in singles + pairs:
                if moves in pairs and moved:
                    break
                while (near := step(here, moves)) and value(near) < value(here):
                    here, moved = near, True
    except Spent:
        pass
    key = min(tried, key=tried.get)
    return dict(key), tried[key], len(tried)

def tuned(results, optimizer, horizon=1):
    """The settings of an optimizer at the end of its search, and the number of trials. "admire early" is AdmIRE from step 0,
    tuned as such, "adamw more" AdamW's search with twice the trials."""
    row, name = ROWS[results.row], optimizer.split()[0]
    trials = LONG_TRIALS if horizon > 1 else 2 * TRIALS if "more" in optimizer else TRIALS
    fixed = {"optimizer": name, "ablation": "early" if "early" in optimizer else None, "seed": 0, "steps": horizon * row["steps"]}
    if name in INHERITED:
        source, *names = INHERITED[name]
        fixed |= {setting: best(results, source)[setting] for setting in names}
    start = {"lr": row["lr"], "warmup_fraction": row["warmup"], **STARTS[name]}
    grid = {"lr": tuple(float(f"{row['lr'] * 2 ** (i / 2):.3g}") for i in range(-10, 11)), "warmup_fraction": WARMUPS}
    if horizon > 1:  # from the short horizon's best, its neighbours
        start = {setting: best(results, optimizer)[setting] for setting in start}
    else:
        grid |= GRIDS[name]
    point, _, made = search(start, grid, lambda p: results.loss({**fixed, **p}), trials)
    return {**fixed, **point}, made

def best(results, optimizer, horizon=1):
    return tuned(results, optimizer, horizon)[0]

def settings(results, horizon, optimizer, changes):
    found = {**best(results, optimizer, horizon), **changes}
    return {**found, "steps": round(found.pop("length", 1) * found["steps"])}

# ------------------------------------------------------------------------------------------------ the summary
def mean(values):
    """Mean and its standard error (None for a single value)."""
    values = list(values)
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None

def crossing(curve, target):
    """The length at which AdamW's losses {length: loss} come down to `target`, along straight lines over log(length), and
    whether it lies beyond the lengths that were run, on the line through the two nearest."""
    lengths = sorted(curve)
    pairs = list(zip(lengths, lengths[1:]))
    nearest = pairs[0] if target > curve[lengths[0]] else pairs[-1]
    a, b = next((pair for pair in pairs if curve[pair[0]] >= target >= curve[pair[1]]), nearest)
    share = (curve[a] - target) / (curve[a] - curve[b])
    return math.exp(math.log(a) + share * math.log(b / a)), not 0 <= share <= 1

def step_time(row, on):
    """Time of an AdmIRE step over AdamW's, IRE being on in the share `on` of the steps, and its standard error."""
    path = ROOT / "results" / ("train-cpu.json" if row == "tiny" else f"train-{row}.json")
    if not path.exists():
        return None
    report = json.loads(path.read_text())
    ratio, (low, high) = (report["rows"]["AdmIRE, full probe"][k] for k in ("of_adamw", "quartiles"))
    error = 1.253 * (high - low) / 1.349 / report["rounds"] ** 0.5  # of a median, from a normal distribution's quartiles
    return 1 + on * (1 / ratio - 1), on * error / ratio**2

def speedup(results, horizon=1, optimizer="admire"):
    """How many times AdmIRE's steps, and time, AdamW needs for AdmIRE's loss; null with a word why while unknown."""
    nothing = dict.fromkeys(("steps", "steps_stderr", "wall", "wall_stderr"))
    try:
        adamw, admire = (best(results, o, horizon) for o in ("adamw", optimizer))
    except NotHeld:
        return nothing | {"note": "not measured yet: the tuning is not finished"}
    lengths = {1.0} | {changes["length"] for *_, changes, _ in PLAN if "length" in changes}
    curves = {n: results.over({**adamw, "steps": round(n * adamw["steps"])}) for n in lengths}
    found = {}
    for seed, target in results.over(admire).items():
        curve = {n: losses[seed] for n, losses in curves.items() if seed in losses}
        if len(curve) > 1:
            found[seed] = crossing(curve, target)
    if len(found) < 2:
        return nothing | {"note": "not measured yet: AdamW's other schedules are missing"}
    steps, error = mean(n for n, _ in found.values())
    beyond = [seed for seed, (_, outside) in found.items() if outside]
    note = f"extrapolated beyond the schedules that were run on seeds {beyond}" if beyond else "interpolated on every seed"
    result = nothing | {"steps": steps, "steps_stderr": error, "by_seed": {str(seed): n for seed, (n, _) in found.items()}}
    on = 1 if admire["ablation"] == "early" else 1 - admire["warmup_fraction"]
    if (cost := step_time(results.row, on)) is None:
        return result | {"note": f"{note}; time not measured yet: benchmarks/train.py --file results/train-{results.row}.json"}
    wall = steps / cost[0]
    wall_error = wall * math.hypot(error / steps, cost[1] / cost[0])
    return result | {"wall": wall, "wall_stderr": wall_error, "step_time": cost[0], "note": note}

def compared(results):
    """{label: steps, seeds, mean loss, mean differences to AdamW and AdmIRE at the same horizon} of all on fresh seeds."""
    rows = {}
    for _, label, horizon, optimizer, changes, _ in PLAN:
        with contextlib.suppress(NotHeld):
            run = settings(results, horizon, optimizer, changes)
            losses, adamw = results.over(run), results.over(best(results, "adamw", horizon))
            if not label or not losses.keys() & adamw.keys():
                continue
            rows[label] = {"horizon": horizon, "steps": run["steps"], "seeds": list(losses)}
            rows[label]["loss"], rows[label]["loss_stderr"] = mean(losses.values())
            for name in ("adamw", "admire"):  # on the seeds that both have, so the two columns may speak of different seeds
                other = results.over(best(results, name, horizon))
                gaps = [losses[seed] - other[seed] for seed in losses if seed in other]
                rows[label][f"minus_{name}"], rows[label][f"minus_{name}_stderr"] = mean(gaps) if gaps else (None, None)
    return rows

def summarise(results):
    """What is computed from the runs, and stands before them in the JSON."""
    results = copy.copy(results)
    results.train = None
    steps, found, trials = ROWS[results.row]["steps"], {}, {}
    for optimizer, horizon in dict.fromkeys((entry[3], entry[2]) for entry in PLAN):
        with contextlib.suppress(NotHeld):
            name = optimizer + ", long" * (horizon > 1)
            run, trials[name] = tuned(results, optimizer, horizon)
            found[name] = {k: v for k, v in run.items() if k not in ("optimizer", "ablation", "steps", "seed")}
    horizons = {str(n * steps): speedup(results, n) for n in (1, 4)}
    return {"command": "python benchmarks/speedup.py" + f" --row {results.row}" * (results.row != "tiny"), "row": results.row,
            "model": results.model, "trials": trials, "best": found, "speedup": horizons[str(steps)], "horizons": horizons,
            "from_step_0": speedup(results, 1, "admire early"), "compared": compared(results)}

def table(report):
    """Markdown."""
    number = lambda value, error, sign="": f"{value:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")
    lines = ["| | steps | seeds | validation loss | minus AdamW's, seed by seed | minus AdmIRE's |", "|" + "---|" * 6]
    for label, r in report["compared"].items():
        gaps = [number(r[f"minus_{o}"], r[f"minus_{o}_stderr"], "+") if r[f"minus_{o}"] else "" for o in ("adamw", "admire")]
        cells = [label, str(r["steps"]), str(len(r["seeds"])), number(r["loss"], r["loss_stderr"]), *gaps]
        lines.append(f"| {' | '.join(cells)} |")
    for name, found in report["best"].items():
        lines.append(f"\n{name}, {report['trials'][name]} trials: " + ", ".join(f"{k} {v}" for k, v in found.items()))
    for what, s in (*((f"at {n} steps", s) for n, s in report["horizons"].items()), ("from step 0", report["from_step_0"])):
        wall = f", {s['wall']:.3f} ± {s['wall_stderr']:.3f} in time" if s["wall"] else ""
        times = f"{s['steps']:.3f} ± {s['steps_stderr']:.3f} in steps{wall}; " if s["steps"] else ""
        lines.append(f"\nspeed-up {what}: {times}{s['note']}")
    return "\n".join(lines)

def draw(report, path):
    """Above, AdamW's loss over the length of its schedule and AdmIRE's level; below, the others at the same steps."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from toy.common import BLACK, BLUE, RED, STYLE

    rows = {label: r for label, r in report["compared"].items() if r["horizon"] == 1}
    if "AdmIRE" not in rows: return
    steps, level, error = (rows["AdmIRE"][k] or 0 for k in ("steps", "minus_adamw", "minus_adamw_stderr"))
    curve = sorted((r["steps"], r["minus_adamw"], r["minus_adamw_stderr"] or 0) for label, r in rows.items()
                   if label == "AdamW" or label.endswith("times the steps"))
    others = {label: (r["minus_adamw"], r["minus_adamw_stderr"] or 0) for label, r in rows.items()
              if r["steps"] == steps and label != "AdamW"}
    near = [gap for label, (gap, _) in others.items() if "Muon" not in label] + [0]  # whose gap would hide the others'
    left, right = min(near) - 0.2 * (max(near) - min(near)), max(near) + 0.2 * (max(near) - min(near))
    with plt.rc_context(STYLE):
        heights = 2.8, 0.8 + 0.26 * len(others)
        figure = plt.figure(figsize=(4.8, sum(heights)), layout="constrained")
        above, below = (part.subplots() for part in figure.subfigures(2, height_ratios=heights))
        above.errorbar(*zip(*curve), color=BLUE, marker="o", ms=4, label="AdamW, each schedule to its end")
        above.axhline(level, color=RED, label=f"AdmIRE, {steps} steps")
        above.axhspan(level - error, level + error, color=RED, alpha=0.2, lw=0)
        if early := rows.get("AdmIRE from step 0, tuned so"):
            above.axhline(early["minus_adamw"], color=RED, ls="--", label="on from step 0, tuned so")
        above.set(xlabel="steps", ylabel=f"loss minus AdamW's\nat {steps} steps")
        above.legend()
        below.axvline(0, color=BLUE)
        below.axvspan(level - error, level + error, color=RED, alpha=0.2, lw=0)
        for i, (gap, spread) in enumerate(others.values()):
            if gap < left:
                below.text(left, i, f"\u2190 {gap:.3f}", va="center")
            below.errorbar(gap, i, xerr=spread, color=BLACK, marker="o", ms=4)
        below.set_yticks(range(len(others)), others)
        below.set(xlabel="loss minus AdamW's", xlim=(left, right), ylim=(len(others) - 0.5, -0.5))
        train_gpt.write_atomically(path, lambda f: figure.savefig(f, format="png"))
        plt.close(figure)

# ------------------------------------------------------------------------------------------------ command line
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=ROWS, default="tiny")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="default: all, in this order")
    parser.add_argument("--summary", action="store_true", help="run nothing")
    parser.add_argument("--data", help="as of train_gpt.py")
    parser.add_argument("--device", help="as of train_gpt.py")
    args = parser.parse_args()
    path, lock = ROOT / "results" / f"speedup-{args.row}.json", ROOT / "runs" / "speedup" / f"{args.row}.lock"
    results = Results(args.row, path, train, **{k: v for k, v in (("data", args.data), ("device", args.device)) if v})
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            sys.exit(f"speedup.py: another process works on {path}")
        if not args.summary:
            results.environment = environment(args.device or "cpu")
            for results.stage, label, horizon, optimizer, changes, seeds in PLAN:
                if "muon" in optimizer and not hasattr(torch.optim, "Muon"):
                    print(f"skipped, as torch {torch.__version__} has no Muon: {label}")
                elif results.stage in args.stages:
                    results.over(settings(results, horizon, optimizer, changes), seeds)
        results.save()
    report = summarise(results)
    print(table(report))
    draw(report, path.with_suffix(".png"))

if __name__ == "__main__":
    try:
        main()
    except (train_gpt.Halt, OSError) as e:
        print(f"speedup.py: {e}", file=sys.stderr)
        sys.exit(getattr(e, "code", 1))
