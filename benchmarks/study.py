"""A study is a JSON file that holds its plan and its runs. This script goes on with a study.

    python benchmarks/study.py results/baseline.json             # makes the missing runs
    python benchmarks/study.py results/baseline.json --summary   # tables and figures, no runs
    python benchmarks/study.py results/map.json --replicate 250x16    # eight fresh seeds: minutes
    python benchmarks/study.py results/baseline.json --flat "bpe 250x16"    # what IRE calls flat

What the file holds
- places: a model, a text, a number of steps and a batch in sequences, each under a short name.
  trials: how many the search of a form has there, where the form itself does not say.
  share_of_trials: the share of its trials that each form gets there; all of them if not given.
  borrows: the place whose tuned settings all forms take; then nothing is searched here.
- forms: the optimizers that are compared. A form is a base ("adamw" or "muon"), or a rule of
  optimizers.py on top of a base. It says what was expected of it before the runs.
- fixed: settings that all runs share. grid, start: the values that searches try, and the first.
- plan: which forms are run at which place, in this order, and on which seeds they are judged.
- changed: lines of place, forms, settings, factors, seeds. Each setting of a tuned form is
  multiplied by each factor, to see whether a better value lies near. A sixth element of a line
  holds settings that are changed in all of its runs.
- predictions: written before the runs. recommended: the form that --replicate runs.
- follow_ups: questions that runs have raised, with what was expected before the runs about them.
- finished: no more runs are made. The script at the commit named here could make them.
- gains: what this script computes. runs: each with its settings and its commit.

How a form is judged. A search at the place tries settings on seed 0. It begins at the settings of
the form `starts_at` at that place, and its trials come on top of that form's. Where there is none,
it begins at those of the same form, or of its base, at the place `near`. A form that `borrows`
takes the settings of another form and is not searched. Then other seeds are run. The gain is the
validation loss of the form `against` minus the form's, seed by seed: positive is better.

A run is saved as soon as it is made; a signal ends the script without loss. Each run names its
commit, and the table marks a gain between runs of two commits.
"""

import argparse
import contextlib
import copy
import hashlib
import io
import itertools
import json
import math
import os
import random
import shutil
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import common
import optimizers
import text
import train_gpt
from ire import IRE
from report import draw, keep, number, table, the_flat
from speed import environment

BASES = {"adamw": "AdamW", "muon": "Muon"}
MODELS = {
    "nano": {"layers": 2, "width": 64, "heads": 2, "ffn": 168, "context": 128},
    "tiny": {"layers": 4, "width": 128, "heads": 4, "ffn": 336, "context": 128},
}
TEXTS = {
    "stdlib-bytes": {"data": "stdlib", "tokenizer": "bytes"},
    "stdlib-gpt2": {"data": "stdlib", "tokenizer": "gpt2"},
    "bpe-4096": {"data": str(ROOT / "data" / "bpe-4096")},
}
# What no study says, so that a new default of train_gpt.py changes no study.
DEFAULTS = {"beta1": 0.9, "eps": 1e-8, "clip": 1.0, "schedule": "cosine", "min_lr": 0.05}
DEFAULTS |= {"embedding_lr": 1.0, "head_lr": 1.0, "interval": 10}
# Settings of any form that are train_gpt.py's.
TRAINING = ("lr", "seed", "embedding_lr", "head_lr", "beta2", "eps", "weight_decay", "clip")
FRESH_SEEDS = tuple(range(101, 109))  # neither a search nor a judgement used them


class NotHeld(common.BadInput):
    """The file does not hold the run, and no run is to be made."""


# --------------------------------------------------------------------------- the file
class Study:
    """The plan and the runs of one file. plan: all of the file but its runs.

    train: (study, settings) -> a run. None: runs are only looked up.
    """

    def __init__(self, path, plan, runs=(), train=None):
        self.path = Path(path)
        self.plan = plan
        self.runs = list(runs)
        self.train = train
        self.index = {key(run["settings"]): run for run in self.runs}

    @classmethod
    def read(cls, path, train=None):
        held = json.loads(Path(path).read_text())
        runs = held.pop("runs")
        return cls(path, held, runs, train)

    def only_held(self):
        """The same runs, without making more."""
        other = copy.copy(self)
        other.train = None
        return other

    def loss(self, settings):
        """Validation loss at the end of the run; infinite where it diverged. Raises NotHeld."""
        name = key(settings)
        if name not in self.index:
            if self.train is None:
                raise NotHeld(f"{self.path} lacks the run {name}")
            run = {"settings": settings, **self.train(self, settings)}
            self.index[name] = run
            self.runs.append(run)
            self.save()
        loss = self.index[name]["val_loss"]
        return math.inf if loss is None else loss

    def over(self, settings, seeds):
        """{seed: loss}; where no run is made, of those seeds that are held."""
        losses = {}
        for seed in seeds:
            with contextlib.suppress(NotHeld):
                losses[seed] = self.loss({**settings, "seed": seed})
        return losses

    def save(self):
        """Writes the file whole or not at all, each run on a line of its own."""
        command = f"python benchmarks/study.py results/{self.path.name}"
        computed = {
            "command": self.plan.get("command", command),
            "gains": gains(self),
            "changes": gains_of_changes(self),
        }
        head = json.dumps({**self.plan, **computed, "runs": []}, indent=1)
        runs = ",\n".join("  " + json.dumps(run) for run in self.runs)
        content = head.replace('"runs": []', f'"runs": [\n{runs}\n ]').encode()
        common.write_atomically(self.path, lambda f: f.write(content))

    def commits(self, settings, seeds):
        """Those of the runs with these seeds."""
        return {self.index[key({**settings, "seed": seed})].get("commit") for seed in seeds}

    def place(self, name):
        return self.plan["places"][name]

    def form(self, name):
        """What is not said of a form has a default."""
        form = self.plan["forms"][name]
        own = {"starts_at": None, "against": BASES.get(form["base"])}
        return {**own, **form, "grid": form["grid"] or self.plan["grid"]}

    def lines(self):
        """The plan's lines: place, forms, seeds."""
        for place, names, *seeds in self.plan["plan"]:
            yield place, names, *(seeds or [self.plan["fixed"]["judged_on_seeds"]])


def key(settings):
    return json.dumps(settings, sort_keys=True)


# --------------------------------------------------------------------------- one run
def config(study, settings, out):
    """train_gpt.py's settings of a run. Steps, batch, model and text are the place's."""
    place = study.place(settings["place"])
    if place["data"] == "bpe-4096" and not Path(TEXTS["bpe-4096"]["data"]).exists():
        raise common.BadInput("data/bpe-4096 is missing; python benchmarks/bpe.py makes it")
    form = study.form(settings["form"])
    steps = place["steps"]
    fields = {field.name for field in common.fields(train_gpt.Config)}
    shared = {name: value for name, value in study.plan["fixed"].items() if name in fields}
    own = {name: settings[name] for name in TRAINING if name in settings}
    warmup = round(settings["warmup_fraction"] * steps)
    optimizer = {"optimizer": form["base"]}
    if form["rule"] == "paper":
        optimizer = {"optimizer": "admire", "curvature": "fisher", "ire_warmup": warmup}
        optimizer |= form["settings"]
    return train_gpt.Config(
        **MODELS[place["model"]],
        **TEXTS.get(place["data"], {"data": place["data"]}),
        **{**DEFAULTS, **shared, **own},
        **optimizer,
        steps=steps,
        batch_size=place["batch"],
        warmup=warmup,
        device="cpu",
        out=str(out),
        overwrite=True,
        log_interval=50,
        eval_interval=steps,
        checkpoint_interval=steps,
    )


def builder(study, settings):
    """make_optimizer(model, c) of a run."""
    form = study.form(settings["form"])
    rule = form["rule"]
    own = {name: settings.get(name, value) for name, value in form["settings"].items()}
    if "multiples" in own:
        rule, own = "constants", own["multiples"]
    ratio = settings.get("ratio", study.plan["fixed"].get("muon_ratio"))

    def make_optimizer(model, c):
        base = train_gpt.make_optimizer(model, c)
        if form["base"] == "muon":
            for group in base.param_groups:
                group["lr_scale"] = ratio if group["muon"] else group["lr_scale"]
        if rule in (None, "paper"):
            return base
        if rule == "rows":
            data = text.Data(c)
            counts = np.bincount(data.train, minlength=data.vocab)
            own["counts"] = torch.from_numpy(counts).double()
        return optimizers.Stretched(base, model, rule, own, beta=c.beta2)

    return make_optimizer


def train(study, settings, out):
    """Trains one run in the folder `out`; returns what it came to."""
    c = config(study, settings, out)
    loss = train_gpt.train(c, builder(study, settings))["val_loss"]
    return {"val_loss": loss, "data": hashlib.sha256(text.Data(c).train).hexdigest()[:12]}


def recorded(train, study, settings):
    """Makes one run; returns what the file holds of it. Seconds are of the processor."""
    out = ROOT / "runs" / "study" / str(os.getpid())
    started = time.process_time()
    found = {"val_loss": None}
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            found = train(study, settings, out)
    except common.Diverged:
        pass
    finally:
        shutil.rmtree(out, ignore_errors=True)
    here = environment("cpu")
    about = {name: here[name] for name in ("commit", "torch", "device", "threads")}
    about["cpu_seconds"] = round(time.process_time() - started, 1)
    about["finished"] = time.strftime("%Y-%m-%d %H:%M:%S")
    print(about["finished"], settings, found["val_loss"], about["cpu_seconds"], "s", flush=True)
    return found | about


# --------------------------------------------------------------------------- search
class Spent(Exception):
    """All trials are used."""


def neighbour(grid, point, moves):
    """The point that lies `moves` {setting: places} further on in the grid; None outside of it."""
    moved = dict(point)
    for name, move in moves.items():
        place = grid[name].index(point[name]) + move
        if not 0 <= place < len(grid[name]):
            return None
        moved[name] = grid[name][place]
    return moved


def search(start, grid, loss, trials):
    """The best point that at most `trials` trials find in the grid {setting: values}, its loss, and
    the number of trials made. The search goes from `start` along one setting after the other. Where
    no such move is better, it goes along two settings at once."""
    tried = {}

    def value(point):
        name = tuple(sorted(point.items()))
        if name not in tried:
            if len(tried) == trials:
                raise Spent
            tried[name] = loss(point)
        return tried[name]

    def descend(here, moves):
        """As far as it gets better in one direction."""
        near = neighbour(grid, here, moves)
        while near and value(near) < value(here):
            here, near = near, neighbour(grid, near, moves)
        return here

    singles = [{name: move} for name in grid for move in (1, -1)]
    pairs = [a | b for a, b in itertools.combinations(singles, 2) if a.keys() != b.keys()]
    with contextlib.suppress(Spent):
        here = start
        before = None
        value(start)
        while here != before:
            before = here
            for moves in singles:
                here = descend(here, moves)
            for moves in pairs:
                if here == before:
                    here = descend(here, moves)
    best = min(tried, key=tried.get)
    return dict(best), tried[best], len(tried)


def lender(study, place, name):
    """(place, form) whose tuned settings a form takes at a place; None where it is searched."""
    form = study.form(name)
    if form["borrows"]:
        return place, form["borrows"]
    if "borrows" in study.place(place):
        return study.place(place)["borrows"], name
    return None


def tuned(study, place, name):
    """The settings of a form at a place after its search, without a seed, and the trials made."""
    form = study.form(name)
    own = {"place": place, "form": name}
    lends = lender(study, place, name)
    if lends:
        best, _ = tuned(study, *lends)
        return {**best, **own}, 0
    grid = form["grid"]
    taken = tuned(study, place, form["starts_at"])[0] if form["starts_at"] else {}
    start = {**study.plan["start"], **from_near(study, place, name), **taken, **form["settings"]}
    fixed = {setting: value for setting, value in taken.items() if setting not in grid} | own
    share = study.place(place).get("share_of_trials", 1)
    trials = round(share * (form.get("trials") or study.place(place)["trials"]))
    best, _, made = search(
        {setting: start[setting] for setting in grid},
        grid,
        lambda point: study.loss({**fixed, **point, "seed": 0}),
        trials,
    )
    return {**fixed, **best}, made


def from_near(study, place, name):
    """The settings of the form, or else of its base, at the place near by, as far as held."""
    near = study.place(place)["near"]
    for other in (name, BASES[study.form(name)["base"]]) if near else ():
        with contextlib.suppress(NotHeld):
            return tuned(study.only_held(), near, other)[0]
    return {}


def run_all(study):
    for place, names, seeds in study.lines():
        for name in names:
            tuned(study, place, name)
        for name in names:
            judged(study, place, name, seeds)
    for place, name, changed, seeds in changes(study):
        judged(study, place, name, seeds, **changed)


def changes(study):
    """(place, form, {setting: value}, seeds) of the runs that change one setting of a tuned form by
    a factor; beta2 in its distance from 1. `others` are changed in all runs of a line."""
    for place, names, settings, factors, seeds, *others in study.plan.get("changed", ()):
        others = others[0] if others else {}
        for name in names:
            best = dict(study.plan["fixed"])
            with contextlib.suppress(NotHeld):
                best |= tuned(study, place, name)[0]
            best |= others
            for setting, factor in itertools.product(settings, factors):
                if setting in best:
                    value = best[setting] * factor
                    if setting == "beta2":
                        value = 1 - (1 - best[setting]) * factor
                    if setting != "warmup_fraction" or value < 1:
                        yield place, name, {**others, setting: float(f"{value:.6g}")}, seeds


# --------------------------------------------------------------------------- what came out
def mean(values):
    """Mean and its standard error: None for a single value, and where a run diverged."""
    values = list(values)
    several = len(values) > 1 and all(map(math.isfinite, values))
    error = statistics.stdev(values) / len(values) ** 0.5 if several else None
    return statistics.mean(values), error


def judged(study, place, name, seeds, **changes):
    """{seed: loss} of the tuned form, with changes of its settings."""
    settings, _ = tuned(study, place, name)
    return study.over({**settings, **changes}, seeds)


def gains(study):
    """A row for each form at each place that was judged on at least one seed, in the plan's order.

    gain: loss of the form `base`, which the form is compared with, minus the form's, seed by seed.
    pooled_stderr: its standard error from the spread of the form's gains at all places.
    tuning_stderr: how much the gain owes to the luck of tuning both on one seed.
    better_gain: the same on top of `better`, the best of all bases of its kind at that place.
    steps_saved: the share of the base's steps that the form does without, from the base's losses at
    the lengths that were run at this batch; None while there is one length only. extrapolated_on:
    the seeds on which the base would need more steps, or fewer, than any of its runs has.
    at_edge: the settings whose best value is the last of the grid, so that a better may lie beyond.
    commits: how many made the runs that are compared.
    """
    study = study.only_held()
    rows = {}
    for place, names, seeds in study.lines():
        for name in names:
            with contextlib.suppress(NotHeld):
                rows[place, name] = gain(study, place, name, seeds) or rows.get((place, name))
    rows = [row for row in rows.values() if row]
    several = [row for row in rows if row["gain_stderr"] is not None]
    noise = pooled(several, "loss", 1)
    for row in rows:
        place, names = row["place"], {row["form"], row["base"]}
        alike = [other for other in several if other["form"] == row["form"]]
        row["pooled_stderr"] = pooled(alike, "gain", len(row["seeds"]))
        both = [luck(study, place, name, noise) for name in names]
        row["tuning_stderr"] = math.hypot(*both) if len(both) > 1 else 0.0
    return rows


def gains_of_changes(study):
    """The gain of each changed setting on top of the tuned form itself, seed by seed. Where two
    lines of the plan make the same change, the seeds of the later line count."""
    study = study.only_held()
    rows = {}
    for place, name, changed, seeds in changes(study):
        with contextlib.suppress(NotHeld):
            losses = judged(study, place, name, seeds, **changed)
            reference = judged(study, place, name, losses)
            if losses and len(losses) == len(reference):
                row = {"place": place, "form": name, "changed": changed, "seeds": list(losses)}
                row["gain"], row["gain_stderr"] = mean(
                    reference[seed] - loss for seed, loss in losses.items()
                )
                rows[place, name, key(changed)] = row
    return list(rows.values())


def pooled(rows, quantity, seeds):
    """The standard error of a mean over so many seeds, from the variances of this quantity in all
    rows; 0 where there are none."""
    squares = freedom = 0
    for row in rows:
        n = len(row["seeds"])
        squares += row[f"{quantity}_stderr"] ** 2 * n * (n - 1)
        freedom += n - 1
    return (squares / freedom / seeds) ** 0.5 if freedom else 0.0


def luck(study, place, name, noise, draws=200):
    """How far chance decides a search: each loss on seed 0 gets this noise, again and again. The
    spread of the loss, without noise, of the trial that then wins."""
    lends = lender(study, place, name)
    if lends:
        return luck(study, *lends, noise, draws)
    losses = []
    for run in study.runs:
        at = run["settings"]
        trial = (at["place"], at["form"], at["seed"]) == (place, name, 0)
        if trial and run["val_loss"] is not None:
            losses.append(run["val_loss"])
    rng = random.Random(0)
    won = [min(losses, key=lambda loss: loss + rng.gauss(0, noise)) for _ in range(draws)]
    return statistics.pstdev(won)


def gain(study, place, name, seeds):
    """A row of `gains`; None where no seed is judged."""
    form = study.form(name)
    settings, trials = tuned(study, place, name)
    base, _ = tuned(study, place, form["against"])
    losses, reference = study.over(settings, seeds), study.over(base, seeds)
    seeds = [seed for seed in losses if seed in reference]
    if not seeds:
        return None
    row = {"place": place, "form": name, "base": form["against"], "trials": trials, "seeds": seeds}
    row["commits"] = len(study.commits(settings, seeds) | study.commits(base, seeds))
    row |= {setting: x for setting, x in settings.items() if setting not in ("place", "form")}
    row["at_edge"] = at_edge(study, name, settings)
    losses = {seed: losses[seed] for seed in seeds}
    row["losses"] = list(losses.values())
    row["loss"], row["loss_stderr"] = mean(losses.values())
    row["gain"], row["gain_stderr"] = mean(reference[seed] - losses[seed] for seed in seeds)
    row |= on_top_of_better(study, place, form["base"], losses)
    return row | steps_saved(study, place, form["against"], losses)


def at_edge(study, name, settings):
    """Of the form's own settings and of those that it took from another form."""
    form = study.form(name)
    source = form["borrows"] or form["starts_at"]
    names = at_edge(study, source, settings) if source else []
    grid = {} if form["borrows"] else form["grid"]
    names = [other for other in names if other not in grid]
    return names + [x for x, values in grid.items() if settings[x] in (values[0], values[-1])]


def on_top_of_better(study, place, kind, losses):
    """The gain on top of the best form without a rule, among those of the base `kind`."""
    best = {}
    names = [n for at, forms, _ in study.lines() if at == place for n in forms]
    for name in dict.fromkeys(names):
        form = study.form(name)
        if form["base"] == kind and form["rule"] is None:
            with contextlib.suppress(NotHeld):
                found = judged(study, place, name, losses)
                if len(found) == len(losses):
                    best[name] = found
    if not best:
        return {"better": None, "better_gain": None, "better_gain_stderr": None}
    better = min(best, key=lambda name: sum(best[name].values()))
    value, error = mean(best[better][seed] - loss for seed, loss in losses.items())
    return {"better": better, "better_gain": value, "better_gain_stderr": error}


def steps_saved(study, place, base, losses):
    """1 - steps of the form / steps that the base needs for its loss, seed by seed."""
    here = study.place(place)
    curves = {}  # {steps: {seed: loss}}
    for other, there in study.plan["places"].items():
        if all(there[name] == here[name] for name in ("batch", "model", "data")):
            with contextlib.suppress(NotHeld):
                curves[there["steps"]] = judged(study, other, base, losses)
    saved, beyond = [], []
    for seed, loss in losses.items():
        curve = {steps: found[seed] for steps, found in curves.items() if seed in found}
        if len(curve) > 1 and math.isfinite(loss):
            needed, outside = crossing(curve, loss)
            saved.append(1 - here["steps"] / needed)  # 1 where the law never comes down so far
            if outside:
                beyond.append(seed)
    if not saved:
        return {"steps_saved": None, "steps_saved_stderr": None, "extrapolated_on": []}
    share, error = mean(saved)
    return {"steps_saved": share, "steps_saved_stderr": error, "extrapolated_on": beyond}


def crossing(curve, target):
    """The length at which the losses {length: loss} come down to `target`, and whether it lies
    beyond the lengths that were run. Between two of these lengths and beyond them the loss follows
    the law E + A * length ** -b through the two nearest and the one farthest from them. With two
    lengths, and where no such law has b > 0, it follows a straight line over log(length)."""
    lengths = sorted(curve)
    pairs = list(itertools.pairwise(lengths))
    nearest = pairs[0] if target > curve[lengths[0]] else pairs[-1]
    around = (pair for pair in pairs if curve[pair[0]] >= target >= curve[pair[1]])
    a, b = next(around, nearest)
    third = max(lengths, key=lambda x: abs(math.log(x * x / (a * b))))
    power = exponent({x: curve[x] for x in {a, b, third}})
    share = (curve[a] - target) / (curve[a] - curve[b])
    if power == 0:
        return a * (b / a) ** share, not 0 <= share <= 1
    rest = 1 - share * (1 - (b / a) ** -power)  # (length / a) ** -power
    return (a * rest ** (-1 / power) if rest > 0 else math.inf), not 0 <= share <= 1


def exponent(curve):
    """b of the law E + A * length ** -b through three points {length: loss}; 0 where no law with
    b > 0 goes through them."""
    if len(curve) < 3:
        return 0.0
    (x, y, z), (first, middle, last) = zip(*sorted(curve.items()), strict=True)
    if not first > middle > last:
        return 0.0

    def excess(b):
        """The ratio of the first fall to the second: the law's minus that of the points."""
        law = (x**-b - y**-b) / (y**-b - z**-b)
        return law - (first - middle) / (middle - last)

    low, high = 1e-6, 8.0
    if excess(low) >= 0:
        return 0.0
    for _ in range(60):
        half = (low + high) / 2
        low, high = (half, high) if excess(half) < 0 else (low, half)
    return low


# --------------------------------------------------------------------------- replicate
# The 97.5% quantiles of Student's t for 1, 2, ... degrees of freedom.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160)


def half_interval(*errors):
    """Half of the 95% interval of a sum of independent means, each (standard error, values):
    Student's t with the degrees of freedom of Welch and Satterthwaite, rounded down."""
    variance = sum(error**2 for error, _ in errors)
    freedom = variance**2 / sum(error**4 / (n - 1) for error, n in errors)
    row = min(int(freedom + 1e-9), len(T))  # so that 6.999999999999998 is 7
    return T[row - 1] * variance**0.5


def replicate(study, place, seeds=FRESH_SEEDS):
    """The recommended form and its base, as tuned in the file, on fresh seeds: prints the gain
    beside the file's and says whether they agree. The runs are kept in runs/, so that a second call
    goes on. Returns whether they agree."""
    name = study.plan["recommended"]
    base = study.form(name)["against"]
    rows = {(row["place"], row["form"]): row for row in gains(study)}
    row = rows.get((place, name))
    if row is None or row["gain_stderr"] is None:
        allowed = f"a place where {name} is judged on two seeds or more"
        raise common.BadInput(f"--replicate: got {place}, allowed is {allowed}")
    kept = ROOT / "runs" / "replicate" / f"{study.path.stem}-{environment('cpu')['commit']}.json"
    runs = common.read_json(kept)["runs"] if kept.exists() else ()
    fresh = Study(kept, study.plan, runs, study.train)
    losses = {}
    for form in (base, name):
        settings, _ = tuned(study.only_held(), place, form)
        losses[form] = fresh.over(settings, seeds)
    value, error = mean(losses[base][seed] - losses[name][seed] for seed in seeds)
    new, old = (error, len(seeds)), (row["gain_stderr"], len(row["seeds"]))
    apart = abs(value - row["gain"])
    by_chance = half_interval(new, old)
    agrees = apart <= by_chance
    texts = {run.get("data") for run in study.runs if run["settings"]["place"] == place}
    if not {run.get("data") for run in fresh.runs if run["settings"]["place"] == place} <= texts:
        print("The text is another one than the file's: losses differ, gains may be compared.")
    for form, found in losses.items():
        print(f"{form}: loss {number(*mean(found.values()))} on seeds {seeds[0]} to {seeds[-1]}")
    print(f"{name} on top of {base} at {place}: gain, positive is better, and its 95% interval")
    print(f"  now          {value:+.4f} ± {half_interval(new):.4f}, {len(seeds)} pairs")
    print(
        f"  in the file  {row['gain']:+.4f} ± {half_interval(old):.4f}, {len(row['seeds'])} pairs"
    )
    word = "agree" if agrees else "do NOT agree"
    print(f"The two {word}: they differ by {apart:.4f}, and chance allows {by_chance:.4f} (Welch).")
    return agrees


# --------------------------------------------------------------------------- what is flat
def flat_shares(study, place, curvature):
    """{step: {tensor: flat share}} along a run of AdamW as tuned there, on seed 0: masks are made,
    and the steps stay AdamW's to nine digits, so that all curvatures see the same weights."""
    settings = {**tuned(study.only_held(), place, "AdamW")[0], "seed": 0}
    c = config(study, settings, ROOT / "runs" / "study" / "flat")
    shares = {}

    def make_optimizer(model, c):
        base = train_gpt.make_optimizer(model, c)
        opt = IRE(base, kappa=1e-9, gamma=0.7, curvature=curvature)  # kappa 0 would make no mask
        names = {p: name for name, p in model.named_parameters()}

        def record(opt, args, kwargs):
            step = opt.param_groups[0]["ire_step"] - 1
            if step % max(10, c.steps // 10) == 0:
                shares[step] = {names[p]: x.double().mean().item() for p, x in opt.masks.items()}

        opt.register_step_post_hook(record)
        return opt

    with contextlib.redirect_stdout(io.StringIO()):
        train_gpt.train(c, make_optimizer)
    return shares


def record_flat(study, place):
    """Writes results/flat.json, and the figure of it."""
    command = f'python benchmarks/study.py results/{study.path.name} --flat "{place}"'
    shares = {name: flat_shares(study, place, name) for name in ("squares", "fisher")}
    found = {"command": command, "place": place, "environment": environment("cpu"), **shares}
    path = study.path.with_name("flat.json")
    common.write_json(path, found)
    keep(the_flat(common.read_json(path)), path.with_suffix(".png"))


# --------------------------------------------------------------------------- command line
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="the study, such as results/map.json")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--summary", action="store_true", help="tables and figures; run nothing")
    what.add_argument("--replicate", metavar="PLACE", help="fresh seeds of the recommended form")
    what.add_argument("--flat", metavar="PLACE", help="what IRE calls flat along a run of AdamW")
    args = parser.parse_args()
    study = Study.read(args.file, partial(recorded, train))
    places = study.plan["places"]
    place = args.flat or args.replicate
    if place and place not in places:
        parser.error(f"PLACE: got {place}, allowed is one of {args.file}: {', '.join(places)}")
    if args.replicate and "recommended" not in study.plan:
        parser.error(
            f"--replicate: allowed is a study that has a recommended form; {args.file} has none"
        )
    with common.locked(ROOT / "runs" / "study" / args.file.stem):
        return go_on(study, args)


def go_on(study, args):
    """Does what the command line asks for; returns the exit code."""
    if args.replicate:
        return 0 if replicate(study, args.replicate) else 1
    if args.flat:
        record_flat(study, args.flat)
        return 0
    if "finished" in study.plan:
        print(f"This study is finished. To go on, take commit {study.plan['finished']}.\n")
    elif not args.summary:
        run_all(study)
    study.save()
    report = common.read_json(args.file)
    print(table(report))
    draw(report, args.file.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (common.Halt, OSError) as e:
        code = getattr(e, "code", 1)
        text = "stopped; the same command goes on" if code > 128 else e  # above 128: a signal
        print(f"study.py: {text}", file=sys.stderr)
        sys.exit(code)
