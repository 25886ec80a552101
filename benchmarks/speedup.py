"""Does AdmIRE beat an AdamW that was tuned as hard? Runs, goes on where it stopped, summarises.

    python benchmarks/speedup.py              # the tiny model; hours on one core
    python benchmarks/speedup.py --row nano   # a smaller model, four times as fast
    python benchmarks/speedup.py --row 60m    # a row of the paper: on a GPU, for days
    python benchmarks/speedup.py --summary    # table and figure of the runs that are held

They are kept in results/speedup-ROW.json, with the figure beside it. The protocol
- One model, one order of the data, one batch size, one shape of schedule (linear warm-up, cosine to
  lr / 20), clip 1.
- Tuning, on seed 0: every optimizer gets the same number of trials (TRIALS) in the same search,
  coordinate by coordinate: learning rate by factors of sqrt 2, length of the warm-up, then AdamW
  beta2 and weight decay, AdmIRE kappa and gamma, Muon its learning rate over AdamW's and weight
  decay. A better neighbour is moved to, and the search goes on there. All start at the same
  learning rate and warm-up. AdmIRE and Muon take AdamW's best beta2, AdmIRE its weight decay too.
- Judged on seeds that took no part in the tuning (1 to 5; others 1 to 3), by the validation loss at
  the end of the schedule. Differences are taken seed by seed, as the seed sets weights and batches
  alike; +- is a standard error.
- Speed-up: AdamW with longer schedules, each decayed to its end, at the best lr and the same
  fraction of warm-up. The speed-up is the length at which it reaches AdmIRE's loss, by
  interpolation over the logarithm of the length, seed by seed. In wall-clock it is divided by the
  time of a step, which benchmarks/train.py measures with both interleaved; IRE costs that only from
  the step on at which it is switched on.
- What would show that flatness is not the cause: the same step on a random mask of the same size or
  on the sharp coordinates, and AdamW whose lr jumps at that step (speedup_optimizers.py).
- Two horizons, the second four times as long, where the short one's best and its neighbours are
  tried again.
- IRE from step 0 was first an ablation. As it beat the rest it was tuned as such, with as many
  trials again ("from_step_0"). AdamW's search goes on to as many as both of IRE's had; on other
  seeds its new settings are judged like the old ones.
- A run holds the commit and the machine it was made with. The tiny model's tuning, finalists,
  falsifiers and Muon are of commit fbe25c1, the rest of later ones, whose probe draws its labels in
  another order. "AdmIRE again" is the finalist with those draws: the difference of the two is the
  probe's noise, and the ablations are to be held against the second. Where one version of the
  script makes all runs, the two are equal.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from speedup_optimizers import builder  # noqa: E402
from speedup_report import draw, in_time, step_time, table  # noqa: E402
from step import environment  # noqa: E402
from study import NotHeld, Runs, crossing, locked, mean, search  # noqa: E402

import train_gpt  # noqa: E402

# --------------------------------------------------------------------------- models and searches
# The paper's rows are on one GPU, and their short horizon is a quarter of the paper's steps.
TINY = {"context": 128, "batch_size": 16, "data": "stdlib"}
SHORT = {"steps": 500, "lr": 2e-3, "warmup": 0.5}
ROWS = {
    "nano": {**SHORT, "model": {"layers": 2, "width": 64, "heads": 2, "ffn": 168, **TINY}},
    "tiny": {**SHORT, "model": {"layers": 4, "width": 128, "heads": 4, "ffn": 336, **TINY}},
    "60m": {"steps": 12500, "lr": 6e-4, "warmup": 0.05, "model": {"preset": "60m"}},
    "119m": {"steps": 7500, "lr": 6e-4, "warmup": 0.05, "model": {"preset": "119m"}},
    "229m": {"steps": 12500, "lr": 6e-4, "warmup": 0.05, "model": {"preset": "229m"}},
}
TRIALS = 14
LONG_TRIALS = 5
WARMUPS = (0.01, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8)  # fractions of the schedule
DECAYS = (0.03, 0.1, 0.3)
GAMMAS = (0.5, 0.7, 0.9)
PROBED = {"gamma": 0.7, "interval": 10, "curvature": "fisher"}


@dataclasses.dataclass(frozen=True)
class Search:
    """How an optimizer is tuned, beside its learning rate and warm-up."""

    optimizer: str
    start: dict
    grid: dict  # {setting: values}
    source: str | None = None  # the search whose best gives it the settings `inherited`
    inherited: tuple = ()
    ablation: str | None = None
    trials: int = TRIALS


ADAMW = Search(
    "adamw",
    start={"beta2": 0.95, "weight_decay": 0.1},
    grid={"beta2": (0.95, 0.98, 0.99), "weight_decay": DECAYS},
)
ADMIRE = Search(
    "admire",
    start={"kappa": 2.0, **PROBED},
    grid={"kappa": (1.0, 2.0, 4.0), "gamma": GAMMAS},
    source="adamw",
    inherited=("beta2", "weight_decay"),
)
MUON = Search(
    "muon",
    start={"ratio": 2.0, "weight_decay": 0.1},
    grid={"ratio": (0.5, 1.0, 2.0, 4.0, 8.0), "weight_decay": DECAYS},
    source="adamw",
    inherited=("beta2",),
)
MUON_IRE = Search(
    "muon-ire",
    start={"kappa": 1.0, **PROBED},
    grid={"kappa": (0.5, 1.0, 2.0), "gamma": GAMMAS},
    source="muon",
    inherited=("beta2", "weight_decay", "ratio"),
)
SEARCHES = {
    "adamw": ADAMW,
    "admire": ADMIRE,
    "muon": MUON,
    "muon-ire": MUON_IRE,
    "adamw more": dataclasses.replace(ADAMW, trials=2 * TRIALS),
    "admire early": dataclasses.replace(ADMIRE, ablation="early"),
}


# --------------------------------------------------------------------------- the plan
@dataclasses.dataclass(frozen=True)
class Entry:
    """Runs that the plan asks for: the best of a search, changed, on some seeds."""

    stage: str
    label: str  # in the table; "" for the tuning itself
    search: str  # of SEARCHES
    changes: dict = dataclasses.field(default_factory=dict)
    seeds: tuple = (1, 2, 3)
    horizon: int = 1  # times the row's steps
    decides: str = ""  # what it is for

    def of(self, results):
        """The settings of its runs, without a seed. Raises NotHeld."""
        found = {**best(results, self.search, self.horizon), **self.changes}
        return {**found, "steps": round(found.pop("length", 1) * found["steps"])}


FINALISTS = (1, 2, 3, 4, 5)
NO_IRE = dict.fromkeys(("ablation", "kappa", "gamma", "interval", "curvature"))
MOMENT = "second_moment"


def schedule(length, seeds=(1, 2, 3), stage="schedules"):
    label = f"AdamW, {length:g} times the steps"
    decides = "at which length AdamW reaches AdmIRE's loss"
    changes = {"length": length}
    return Entry(stage, label, search="adamw", changes=changes, seeds=seeds, decides=decides)


def long_schedule(length):
    label = f"AdamW, long, {length:g} times the steps"
    decides = "at which length AdamW reaches AdmIRE's loss"
    changes = {"length": length}
    return Entry("long", label, search="adamw", changes=changes, horizon=4, decides=decides)


def falsifier(label, decides, **changes):
    return Entry("falsifiers", label, search="admire", changes=changes, decides=decides)


def ablation(label, decides, seeds=(1, 2, 3), **changes):
    return Entry("ablations", label, search="admire", changes=changes, seeds=seeds, decides=decides)


def early(label, search, decides, seeds=(1, 2, 3), **changes):
    return Entry("early", label, search=search, changes=changes, seeds=seeds, decides=decides)


# In an order that can be read after any entry.
PLAN = (
    Entry("tuning", "", search="adamw", seeds=()),
    Entry("tuning", "", search="admire", seeds=()),
    Entry("finalists", "AdamW", search="adamw", seeds=FINALISTS, decides="the baseline"),
    Entry(
        "finalists", "AdmIRE", search="admire", seeds=FINALISTS, decides="is it better than AdamW?"
    ),
    schedule(1.2, FINALISTS, stage="schedule"),
    # If flatness is the cause, none of the first four comes near AdmIRE.
    falsifier("random mask", "does any mask of that size do?", ablation="random"),
    falsifier("inverted mask", "do sharp coordinates do?", ablation="inverted"),
    falsifier("all coordinates", "does a larger lr do?", ablation="all"),
    falsifier("lr jumps by the mean", "does the mean step do?", ablation="jump"),
    falsifier("second moment", "is the probe needed?", curvature=MOMENT),
    falsifier("switched on smoothly", "is it the jump in the step?", ablation="smooth"),
    Entry("muon", "Muon", search="muon", decides="what a better base gains"),
    schedule(0.8, FINALISTS),
    schedule(1.4),
    schedule(1.7),
    schedule(2),
    ablation("AdmIRE again", "the probe's noise", FINALISTS, ablation="again"),
    ablation("sharpest, same size", "do sharp coordinates do?", ablation="sharpest"),
    ablation("random in each tensor", "is it the share of a tensor?", ablation="shuffled"),
    ablation("on from step 0", "does it need the warm-up?", ablation="early"),
    ablation("decay not amplified", "is it the weight decay?", ablation="decay"),
    ablation("K = 100", "how old may a mask be?", interval=100),
    ablation("probe on a quarter", "how small may the probe be?", ablation="quarter"),
    ablation("random mask from step 0", "does any mask do from step 0?", ablation="early random"),
    ablation("K = 1", "is a fresh mask better?", interval=1),
    Entry("long", "AdamW, long", search="adamw", horizon=4, decides="the baseline"),
    Entry("long", "AdmIRE, long", search="admire", horizon=4, decides="does the gain last?"),
    long_schedule(1.2),
    long_schedule(0.8),
    Entry("muon-ire", "Muon with IRE", search="muon-ire", decides="does it add to a better base?"),
    Entry(
        "muon-ire",
        "Muon with a random mask",
        search="muon-ire",
        changes={"ablation": "random"},
        decides="does any mask of that size do?",
    ),
    Entry(
        "muon-ire",
        "Muon at those settings, no mask",
        search="muon-ire",
        changes={**NO_IRE, "optimizer": "muon"},
        decides="is it the lr and warm-up that were found?",
    ),
    Entry(
        "start",
        "second moment from step 0",
        search="admire",
        changes={"ablation": "early", "curvature": MOMENT},
        decides="is the probe needed from step 0?",
    ),
    Entry(
        "start",
        "AdmIRE from step 0, long",
        search="admire",
        changes={"ablation": "early"},
        horizon=4,
        decides="does the gain last?",
    ),
    Entry(
        "start",
        "random mask from step 0, long",
        search="admire",
        changes={"ablation": "early random"},
        horizon=4,
        decides="does any mask do?",
    ),
    early("AdamW, twice the trials", "adamw more", "as many trials as both of IRE's", FINALISTS),
    early("AdmIRE from step 0, tuned so", "admire early", "is it better than AdamW?", FINALISTS),
    early(
        "random mask from step 0, tuned so",
        "admire early",
        "does any mask do?",
        ablation="early random",
    ),
    early(
        "second moment from step 0, those settings",
        "admire early",
        "is the probe needed?",
        curvature=MOMENT,
    ),
    early(
        "AdamW at those settings",
        "admire early",
        "is it the lr and warm-up that were found?",
        **{**NO_IRE, "optimizer": "adamw"},
    ),
    Entry(
        "early",
        "second moment from step 0, long",
        search="admire",
        changes={"ablation": "early", "curvature": MOMENT},
        horizon=4,
        decides="does the free mask last?",
    ),
)
STAGES = list(dict.fromkeys(entry.stage for entry in PLAN))

# --------------------------------------------------------------------------- runs
OPTIMIZER = ("optimizer", "ablation")
TRAINING = ("lr", "warmup_fraction", "beta2", "weight_decay", "ratio")
SETTINGS = OPTIMIZER + TRAINING + ("kappa", "gamma", "interval", "curvature", "seed", "steps")
# For runs that are older than this file's commit.
SCRIPT = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]


def settings_of(run):
    return {name: run.get(name) for name in SETTINGS}


class Results(Runs):
    """The runs of one row. train(run, model) makes those that are not held; None: only look up."""

    def __init__(self, row, path, train=None, **model):
        self.row = row
        self.model = ROWS[row]["model"] | model
        self.stage = None
        self.environment = None
        if path.exists():
            self.environment = json.loads(path.read_text()).get("environment")

        def run(settings):
            return {**settings, "stage": self.stage, **train(settings, self.model)}

        super().__init__(path, settings_of, train and run, self.summary)

    def summary(self):
        return {**summarise(self), "environment": self.environment}

    def loss(self, settings):
        return super().loss(settings_of(settings))


def config(run, model, out):
    """train_gpt.py's settings of a run."""
    own = (
        "lr",
        "beta2",
        "weight_decay",
        "kappa",
        "gamma",
        "interval",
        "curvature",
        "seed",
        "steps",
    )
    c = train_gpt.Config(
        **model,
        **{name: run[name] for name in own if run[name] is not None},
        warmup=round(run["warmup_fraction"] * run["steps"]),
        out=str(out),
        overwrite=True,
        optimizer="adamw" if run["optimizer"] in ("adamw", "muon") else "admire",
        log_interval=50,
        eval_interval=run["steps"],
        checkpoint_interval=run["steps"],
        eval_sequences=1024,
    )
    c = train_gpt.complete(c)
    if "early" in (run["ablation"] or ""):
        c.ire_warmup = 0
    if run["ablation"] == "quarter":
        c.micro_batch = math.gcd(c.micro_batch, c.batch_size // 4)
        c.probe_batches = c.batch_size // 4 // c.micro_batch
    return c


def train(run, model):
    """Trains one run; returns what the results hold of it beside its settings."""
    out = ROOT / "runs" / "speedup" / str(os.getpid())
    c = config(run, model, out)
    started = time.time()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            summary = train_gpt.train(c, builder(run))
        loss = summary["val_loss"]
        seconds = summary["seconds"]
    except train_gpt.Diverged:
        loss = None
        seconds = time.time() - started
    finally:
        shutil.rmtree(out, ignore_errors=True)
    result = {"val_loss": loss, "diverged": loss is None, "seconds": round(seconds, 1)}
    shown = {**run, **result}.items()
    print(", ".join(f"{name} {value}" for name, value in shown if value is not None), flush=True)
    data = train_gpt.Data(c)
    here = environment(c.device)
    tokens = c.steps * c.batch_size * c.context
    return {
        **result,
        "warmup": c.warmup,
        "epochs": round(tokens / len(data.train), 3),
        "data": data.sha256[:12],
        "commit": here["commit"],
        "script": SCRIPT,
        "torch": here["torch"],
        "hardware": here["device"],
        "threads": here["threads"],
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


# --------------------------------------------------------------------------- tuning
def tuned(results, name, horizon=1):
    """The settings at the end of the search `name`, on seed 0, and the number of trials."""
    row = ROWS[results.row]
    plan = SEARCHES[name]
    fixed = {"optimizer": plan.optimizer, "ablation": plan.ablation, "seed": 0}
    fixed["steps"] = horizon * row["steps"]
    for setting in plan.inherited:
        fixed[setting] = best(results, plan.source)[setting]
    start = {"lr": row["lr"], "warmup_fraction": row["warmup"], **plan.start}
    rates = (row["lr"] * 2 ** (i / 2) for i in range(-10, 11))
    grid = {"lr": tuple(float(f"{lr:.3g}") for lr in rates), "warmup_fraction": WARMUPS}
    if horizon > 1:  # from the short horizon's best, its neighbours
        found = best(results, name)
        start = {setting: found[setting] for setting in start}
        trials = LONG_TRIALS
    else:
        grid |= plan.grid
        trials = plan.trials
    point, _, made = search(start, grid, lambda p: results.loss({**fixed, **p}), trials)
    return {**fixed, **point}, made


def best(results, name, horizon=1):
    return tuned(results, name, horizon)[0]


# --------------------------------------------------------------------------- the summary
NOTHING = dict.fromkeys(("steps", "steps_stderr", "wall", "wall_stderr"))
UNMEASURED = "not measured yet: "


def lengths_for(results, admire, horizon):
    """{seed: (length at which AdamW reaches AdmIRE's loss, whether beyond what was run)}."""
    adamw = best(results, "adamw", horizon)
    lengths = {1.0} | {entry.changes["length"] for entry in PLAN if "length" in entry.changes}
    curves = {}
    for n in lengths:
        longer = {**adamw, "steps": round(n * adamw["steps"])}
        curves[n] = results.over(longer, FINALISTS)
    found = {}
    for seed, target in results.over(admire, FINALISTS).items():
        curve = {n: losses[seed] for n, losses in curves.items() if seed in losses}
        if len(curve) > 1:
            found[seed] = crossing(curve, target)
    return found


def speedup(results, horizon=1, name="admire"):
    """How many times AdmIRE's steps, and time, AdamW needs for AdmIRE's loss; null with a word why
    while unknown."""
    try:
        admire = best(results, name, horizon)
        found = lengths_for(results, admire, horizon)
    except NotHeld:
        return NOTHING | {"note": UNMEASURED + "the tuning is not finished"}
    if len(found) < 2:
        return NOTHING | {"note": UNMEASURED + "AdamW's other schedules are missing"}
    steps, error = mean(n for n, _ in found.values())
    beyond = [seed for seed, (_, outside) in found.items() if outside]
    note = "interpolated on every seed"
    if beyond:
        note = f"extrapolated beyond the schedules that were run on seeds {beyond}"
    result = NOTHING | {"steps": steps, "steps_stderr": error}
    result["by_seed"] = {str(seed): n for seed, (n, _) in found.items()}
    on = 1 if admire["ablation"] == "early" else 1 - admire["warmup_fraction"]
    name = "train-cpu" if results.row == "tiny" else f"train-{results.row}"
    cost = step_time(ROOT / "results" / f"{name}.json", on)
    if cost is None:
        missing = f"benchmarks/train.py --file results/{name}.json"
        return result | {"note": f"{note}; time not measured yet: {missing}"}
    wall, wall_error = in_time(steps, error, cost)
    times = {"wall": wall, "wall_stderr": wall_error, "step_time": cost[0]}
    return result | times | {"note": note}


def compared(results):
    """{label: steps, seeds, mean loss, mean differences to AdamW and AdmIRE at the same horizon} of
    all on fresh seeds. The two differences are on the seeds that both have."""
    rows = {}
    for entry in PLAN:
        with contextlib.suppress(NotHeld):
            run = entry.of(results)
            losses = results.over(run, FINALISTS)
            adamw = results.over(best(results, "adamw", entry.horizon), FINALISTS)
            if not entry.label or not losses.keys() & adamw.keys():
                continue
            row = {"horizon": entry.horizon, "steps": run["steps"], "seeds": list(losses)}
            row["loss"], row["loss_stderr"] = mean(losses.values())
            rows[entry.label] = row
            for name in ("adamw", "admire"):
                other = results.over(best(results, name, entry.horizon), FINALISTS)
                gaps = [losses[seed] - other[seed] for seed in losses if seed in other]
                gap = mean(gaps) if gaps else (None, None)
                row[f"minus_{name}"], row[f"minus_{name}_stderr"] = gap
    return rows


def summarise(results):
    """What is computed from the runs, and stands before them in the JSON."""
    results = results.only_held()
    steps = ROWS[results.row]["steps"]
    found = {}
    trials = {}
    for optimizer, horizon in dict.fromkeys((entry.search, entry.horizon) for entry in PLAN):
        with contextlib.suppress(NotHeld):
            name = optimizer if horizon == 1 else f"{optimizer}, long"
            run, trials[name] = tuned(results, optimizer, horizon)
            for setting in ("optimizer", "ablation", "steps", "seed"):
                del run[setting]
            found[name] = run
    horizons = {str(n * steps): speedup(results, n) for n in (1, 4)}
    command = "python benchmarks/speedup.py"
    return {
        "command": command if results.row == "tiny" else f"{command} --row {results.row}",
        "row": results.row,
        "model": results.model,
        "trials": trials,
        "best": found,
        "speedup": horizons[str(steps)],
        "horizons": horizons,
        "from_step_0": speedup(results, 1, "admire early"),
        "compared": compared(results),
    }


# --------------------------------------------------------------------------- command line
def run_plan(results, stages):
    for entry in PLAN:
        results.stage = entry.stage
        if "muon" in entry.search and not hasattr(torch.optim, "Muon"):
            print(f"skipped, as torch {torch.__version__} has no Muon: {entry.label}")
        elif entry.stage in stages:
            results.over(entry.of(results), entry.seeds)


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--row", choices=ROWS, default="tiny")
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=STAGES, help="default: all, in this order"
    )
    parser.add_argument("--summary", action="store_true", help="run nothing")
    parser.add_argument("--data", help="as of train_gpt.py")
    parser.add_argument("--device", help="as of train_gpt.py")
    return parser.parse_args()


def main():
    args = parse()
    path = ROOT / "results" / f"speedup-{args.row}.json"
    given = {"data": args.data, "device": args.device}
    model = {name: value for name, value in given.items() if value}
    results = Results(args.row, path, train, **model)
    with locked(ROOT / "runs" / "speedup" / f"{args.row}.lock", path):
        if not args.summary:
            results.environment = environment(args.device or "cpu")
            run_plan(results, args.stages)
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
