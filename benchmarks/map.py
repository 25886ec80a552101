"""Where does flatness pay? The gain of longer flat steps over the length of the run and the batch.

    python benchmarks/map.py                # run what is missing, go on where it stopped
    python benchmarks/map.py --summary      # table and figure of the runs that are held
    python benchmarks/map.py --time         # seconds of a step of each form beside its base's

The protocol is that of benchmarks/speedup.py, smaller. At each place of the map every optimizer
gets the same number of trials of learning rate and warm-up in the same search on seed 0, which
starts where the search of the same optimizer ended at a neighbouring place. It is judged on seeds
that took no part, seed by seed, by the validation loss at the end of the schedule. What the forms
add was fixed before the first run: kappa and gamma near those that won in results/speedup-tiny.json
(500 steps at 16 sequences), alpha by a throw-away pilot of 300 steps at 16 sequences. The forms
"tuned again" search kappa and gamma too, in as many more trials. Predictions stand in the plan;
they were written before the runs of their form. All runs are of one commit, which each of them
holds: go on in a work tree of that commit. A run is saved as soon as it is made; SIGTERM ends the
script cleanly.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import forms  # noqa: E402
from map_report import draw, table  # noqa: E402
from speedup_optimizers import MuonAndAdamW, adamw  # noqa: E402
from step import environment  # noqa: E402
from study import NotHeld, Runs, crossing, locked, mean, search  # noqa: E402

import train_gpt  # noqa: E402

RESULTS = ROOT / "results" / "map.json"
MODELS = {
    "nano": {"layers": 2, "width": 64, "heads": 2, "ffn": 168, "context": 128},
    "tiny": {"layers": 4, "width": 128, "heads": 4, "ffn": 336, "context": 128},
}
FIXED = {"beta2": 0.98, "weight_decay": 0.1, "eval_sequences": 512}
RATIO = 2.0  # Muon's lr over that of the AdamW beside it
SEEDS = (1, 2, 3)
GRID = {
    "lr": tuple(float(f"{2e-3 * 2 ** (i / 2):.3g}") for i in range(-8, 13)),
    "warmup_fraction": (0.02, 0.1, 0.25, 0.5, 0.75),
}
START = {"lr": 5.66e-3, "warmup_fraction": 0.25}


# --------------------------------------------------------------------------- the plan
@dataclasses.dataclass(frozen=True)
class Form:
    """An optimizer of the study: what it is, and what was expected of it before the runs. It is
    tuned, where it does not borrow."""

    name: str
    base: str  # adamw or muon
    rule: str | None = None  # of forms.py; None is the base itself
    settings: dict = dataclasses.field(default_factory=dict)
    borrows: str | None = None  # the form whose tuned lr and warm-up it takes
    grid: dict = dataclasses.field(default_factory=dict)  # settings that its search tries too
    differs: str = ""
    expected: str = ""


@dataclasses.dataclass(frozen=True)
class Place:
    """A place of the map; batch in sequences."""

    steps: int
    batch: int
    trials: int = 7  # of every form that is tuned here
    near: str | None = None  # the place at which its searches start
    model: str = "nano"
    data: str = "stdlib"


HARD_ADAMW = {"kappa": 2.0, "gamma": 0.7}
HARD_MUON = {"kappa": 1.0, "gamma": 0.7}
SOFT = {"alpha": 0.3}
HAND = {"qk": (1.0, 2.0, 3.0, 4.0), "vo": (0.35, 0.5, 0.7, 1.0), "ffn": (0.7, 1.0, 1.5)}
STRENGTH = {"kappa": (0.5, 1.0, 2.0, 4.0), "gamma": (0.5, 0.6, 0.7, 0.8, 0.9)}
SOFTNESS = {"alpha": (0.1, 0.15, 0.2, 0.3, 0.45, 0.6), "limit": (2.0, 4.0, 8.0)}
BASES = {"adamw": "AdamW", "muon": "Muon"}
FORMS = {
    form.name: form
    for form in (
        Form(
            "AdamW",
            base="adamw",
            differs="the base",
        ),
        Form(
            "hard mask over AdamW",
            base="adamw",
            rule="hard",
            settings=HARD_ADAMW,
            differs="IRE from step 0, mask from the second moment",
            expected="nothing at 4 sequences; the gain grows with the batch, not with the length",
        ),
        Form(
            "Muon",
            base="muon",
            differs="the base",
        ),
        Form(
            "hard mask over Muon",
            base="muon",
            rule="hard",
            settings=HARD_MUON,
            differs="IRE from step 0, mask from the second moment",
            expected="gains less than over AdamW; the gain grows with the batch",
        ),
        Form(
            "soft factor over Muon",
            base="muon",
            rule="soft",
            settings=SOFT,
            differs="two-sided factor (v / median) ** -0.3 on hidden matrices",
            expected="most at 250 steps; the gain falls with the length, to under 0.015 at 2000",
        ),
        Form(
            "soft factor over AdamW",
            base="adamw",
            rule="soft",
            settings=SOFT,
            differs="the same factor on hidden matrices, over Adam's own division by the root of v",
            expected="within 0.01 of AdamW: v ** -0.8 is past the best power",
        ),
        Form(
            "soft over AdamW, shuffled",
            base="adamw",
            rule="soft",
            settings={**SOFT, "shuffle": True},
            borrows="soft factor over AdamW",
            differs="the same factors at other coordinates",
            expected="worse than AdamW",
        ),
        Form(
            "soft over AdamW, between tensors only",
            base="adamw",
            rule="soft",
            settings={**SOFT, "varies": "between tensors"},
            borrows="soft factor over AdamW",
            differs="one factor a tensor",
            expected="keeps more than half of the gain",
        ),
        Form(
            "soft over AdamW, within tensors only",
            base="adamw",
            rule="soft",
            settings={**SOFT, "varies": "within tensors"},
            borrows="soft factor over AdamW",
            differs="each tensor has mean factor 1",
            expected="keeps less than half of the gain",
        ),
        Form(
            "multipliers by hand over AdamW",
            base="adamw",
            rule="by hand",
            settings={"qk": 2.0, "vo": 0.5, "ffn": 1.0},
            borrows="soft factor over AdamW",
            grid=HAND,
            differs="constants for QK, VO and the feed-forward, searched with as many trials",
            expected="within 0.015 of the soft factor",
        ),
        Form(
            "random mask over AdamW",
            base="adamw",
            rule="hard",
            settings={**HARD_ADAMW, "random": True},
            borrows="hard mask over AdamW",
            differs="as many coordinates, anywhere",
            expected="at least 0.01 worse than the hard mask wherever that gains",
        ),
        Form(
            "random mask over Muon",
            base="muon",
            rule="hard",
            settings={**HARD_MUON, "random": True},
            borrows="hard mask over Muon",
            differs="as many coordinates, anywhere",
            expected="worse than the hard mask and than Muon",
        ),
        Form(
            "soft, shuffled",
            base="muon",
            rule="soft",
            settings={**SOFT, "shuffle": True},
            borrows="soft factor over Muon",
            differs="the same factors at other coordinates",
            expected="worse than Muon",
        ),
        Form(
            "soft, inverted",
            base="muon",
            rule="soft",
            settings={"alpha": -0.3},
            borrows="soft factor over Muon",
            differs="sharp coordinates take the longer steps",
            expected="much worse than Muon, by 0.1 and more",
        ),
        Form(
            "soft, between tensors only",
            base="muon",
            rule="soft",
            settings={**SOFT, "varies": "between tensors"},
            borrows="soft factor over Muon",
            differs="one factor a tensor",
            expected="keeps more than half of the gain",
        ),
        Form(
            "soft, within tensors only",
            base="muon",
            rule="soft",
            settings={**SOFT, "varies": "within tensors"},
            borrows="soft factor over Muon",
            differs="each tensor has mean factor 1",
            expected="keeps less than half of the gain",
        ),
        Form(
            "soft, in the first fifth only",
            base="muon",
            rule="soft",
            settings={**SOFT, "when": "first fifth"},
            borrows="soft factor over Muon",
            differs="Muon after a fifth of the run",
            expected="keeps more than half of the gain: it mends the start",
        ),
        Form(
            "soft, after the first fifth only",
            base="muon",
            rule="soft",
            settings={**SOFT, "when": "after first fifth"},
            borrows="soft factor over Muon",
            differs="Muon in the first fifth of the run",
            expected="keeps less than half of the gain",
        ),
        Form(
            "multipliers by hand",
            base="muon",
            rule="by hand",
            settings={"qk": 3.0, "vo": 0.5, "ffn": 1.0},
            borrows="soft factor over Muon",
            grid=HAND,
            differs="constants for QK, VO and the feed-forward, searched with as many trials",
            expected="within 0.015 of the soft factor: block learning rates that set themselves",
        ),
        Form(
            "NorMuon",
            base="muon",
            rule="normuon",
            settings={"beta": 0.95},
            differs="rows of the update over their running RMS, tuned with as many trials",
            expected="gains a third of what the soft factor gains",
        ),
        Form(
            "LITE's form over Muon",
            base="muon",
            rule="lite",
            settings={"chi": 2.0},
            differs="twice the step outside the momentum's top tenth of directions, tuned too",
            expected="gains nothing at 16 sequences and less, a little at 64 and more",
        ),
        Form(
            "live mask over AdamW",
            base="adamw",
            rule="hard",
            settings={**HARD_ADAMW, "live": True},
            borrows="hard mask over AdamW",
            differs="ranked among coordinates whose curvature is not 0",
            expected="within 0.01 of the hard mask: a twelfth of the coordinates is dead here",
        ),
        Form(
            "live mask over AdamW, embeddings apart",
            base="adamw",
            rule="hard",
            settings={**HARD_ADAMW, "live": True, "ranked": "embeddings apart"},
            borrows="hard mask over AdamW",
            differs="live, and embeddings with the head are ranked apart",
            expected="within 0.01 of the hard mask",
        ),
        Form(
            "live mask over AdamW, by tensor",
            base="adamw",
            rule="hard",
            settings={**HARD_ADAMW, "live": True, "ranked": "by tensor"},
            borrows="hard mask over AdamW",
            differs="live, and each tensor is ranked apart",
            expected="loses half of the gain: it lies between tensors",
        ),
        Form(
            "live mask over Muon",
            base="muon",
            rule="hard",
            settings={**HARD_MUON, "live": True},
            borrows="hard mask over Muon",
            differs="ranked among coordinates whose curvature is not 0",
            expected="within 0.01 of the hard mask",
        ),
        Form(
            "live mask over Muon, embeddings apart",
            base="muon",
            rule="hard",
            settings={**HARD_MUON, "live": True, "ranked": "embeddings apart"},
            borrows="hard mask over Muon",
            differs="live, and embeddings with the head are ranked apart",
            expected="within 0.01 of the hard mask",
        ),
    )
}
# The masks with kappa and gamma searched too, at the learning rate that the hard mask was tuned to.
AGAIN = {
    "hard mask over AdamW": (
        "0.01 better than kappa 2 and gamma 0.7; no gain over AdamW at 16 sequences"
    ),
    "live mask over AdamW": "within 0.01 of the hard mask that is tuned again",
    "live mask over AdamW, embeddings apart": "within 0.01 of the hard mask that is tuned again",
    "live mask over AdamW, by tensor": "worse than the hard mask that is tuned again",
    "hard mask over Muon": "0.01 better than kappa 1 and gamma 0.7",
    "live mask over Muon": "within 0.01 of the hard mask that is tuned again",
    "live mask over Muon, embeddings apart": "within 0.01 of the hard mask that is tuned again",
}
SOFT_AGAIN = {
    "soft factor over AdamW": (
        "within 0.01 of alpha 0.3 and limit 4 at 250 and 500 steps; at 2000 a smaller alpha wins, "
        "by less than 0.01"
    ),
    "soft factor over Muon": (
        "within 0.01 of alpha 0.3 and limit 4 at 250 and 500 steps; at 2000x16 a smaller alpha "
        "gains a little over Muon, less than 0.02"
    ),
}


def tuned_again(name, grid, expected, **settings):
    form = FORMS[name]
    return dataclasses.replace(
        form,
        name=f"{name}, tuned again",
        settings={**form.settings, **settings},
        borrows=form.borrows or name,
        grid=grid,
        differs=f"{form.differs}; {' and '.join(grid)} searched too",
        expected=expected,
    )


AGAIN_FORMS = [tuned_again(name, STRENGTH, expected) for name, expected in AGAIN.items()]
AGAIN_FORMS += [
    tuned_again(name, SOFTNESS, expected, limit=4.0) for name, expected in SOFT_AGAIN.items()
]
FORMS |= {form.name: form for form in AGAIN_FORMS}
PREDICTIONS = (
    "The hard mask's gain over AdamW grows with the batch: under 0.005 at 4, over 0.01 at 64.",
    "The soft factor's gain falls with the length: over 0.03 at 250 steps, under 0.015 at 2000.",
    "The hard mask gains less over Muon than over AdamW.",
    "A random mask of the same size does not gain.",
    "At 8000x16 the soft factor gains less than 0.02 over AdamW (said after the runs of 2000).",
    "On Shakespeare the soft factor gains as on Python: 0.05 to 0.15 over AdamW at 500x16.",
)
PLACES = {
    "250x4": Place(250, 4, trials=12),
    "250x16": Place(250, 16, near="250x4"),
    "500x4": Place(500, 4, near="250x4"),
    "250x64": Place(250, 64, near="250x16"),
    "500x16": Place(500, 16, near="250x16"),
    "2000x4": Place(2000, 4, near="500x4"),
    "500x64": Place(500, 64, near="250x64"),
    "2000x16": Place(2000, 16, near="500x16"),
    "250x256": Place(250, 256, near="250x64"),
    "2000x64": Place(2000, 64, near="500x64"),
    "500x256": Place(500, 256, near="250x256"),
    "8000x16": Place(8000, 16, near="2000x16"),
    "2000x256": Place(2000, 256, near="500x256"),
    "tiny 500x16": Place(500, 16, near="500x16", model="tiny"),
    "shakespeare 500x16": Place(500, 16, near="500x16", data="shakespeare"),
}
MAP = ("AdamW", "hard mask over AdamW", "Muon", "hard mask over Muon", "soft factor over Muon")
RANDOM = ("random mask over AdamW", "random mask over Muon")
SOFT_FORMS = (
    "soft, shuffled",
    "soft, inverted",
    "soft, between tensors only",
    "soft, within tensors only",
    "soft, in the first fifth only",
    "soft, after the first fifth only",
    "multipliers by hand",
    "NorMuon",
)
TUNED_AGAIN = tuple(f"{name}, tuned again" for name in AGAIN)
LIVE = tuple(name for name in AGAIN if name.startswith("live"))
LITE = ("LITE's form over Muon",)
SOFT_TUNED_AGAIN = tuple(f"{name}, tuned again" for name in SOFT_AGAIN)
# Added when the soft factor was seen to gain over AdamW at 250x16, against its prediction.
SOFT_ADAMW = ("soft factor over AdamW",)
SOFT_ADAMW_FORMS = (
    "soft over AdamW, shuffled",
    "soft over AdamW, between tensors only",
    "soft over AdamW, within tensors only",
    "multipliers by hand over AdamW",
)
# Added when the soft factor's gain was seen to last at 2000 steps: what decides what it is worth.
DECIDING = (
    "multipliers by hand",
    "NorMuon",
    "soft, between tensors only",
    "soft, shuffled",
)
# What is run, in an order that can be read after any line: (place, forms). A form comes first at
# the place near by, where its search starts: a search is found again only from the same start.
PLAN = (
    ("250x4", MAP + RANDOM),
    ("250x16", MAP + RANDOM),
    ("500x4", MAP + RANDOM),
    ("250x64", MAP + RANDOM),
    ("250x16", SOFT_FORMS),
    ("500x16", MAP + RANDOM),
    ("250x4", LITE + SOFT_ADAMW),
    ("250x16", LITE + LIVE + TUNED_AGAIN + SOFT_ADAMW + SOFT_ADAMW_FORMS),
    ("2000x4", MAP + RANDOM + DECIDING),
    ("250x64", LITE),
    ("500x64", MAP + RANDOM),
    ("500x16", SOFT_FORMS + LITE + LIVE + TUNED_AGAIN),
    ("2000x16", MAP + RANDOM + DECIDING),
    ("250x256", MAP + RANDOM + LITE),
    ("2000x64", MAP + RANDOM + LITE),
    ("500x4", SOFT_ADAMW),
    ("500x16", SOFT_ADAMW),
    ("2000x4", SOFT_ADAMW + SOFT_ADAMW_FORMS),
    ("250x64", SOFT_ADAMW),
    ("2000x16", SOFT_ADAMW),
    ("tiny 500x16", SOFT_ADAMW),
    ("250x16", SOFT_TUNED_AGAIN),
    ("500x16", SOFT_TUNED_AGAIN),
    ("2000x16", SOFT_TUNED_AGAIN),
    ("tiny 500x16", SOFT_TUNED_AGAIN),
    ("8000x16", ("AdamW", "soft factor over AdamW")),
    (
        "shakespeare 500x16",
        ("AdamW", "soft factor over AdamW", "Muon", "soft factor over Muon"),
    ),
    ("tiny 500x16", MAP + RANDOM + SOFT_FORMS + LITE + LIVE),
    ("500x256", MAP + RANDOM),
    ("8000x16", tuple(name for name in MAP if name != "AdamW") + RANDOM),
    ("2000x256", MAP + RANDOM + LITE),
)


# --------------------------------------------------------------------------- runs
class Results(Runs):
    """The runs of the map. train(settings) makes those that are not held; None: only look up."""

    def __init__(self, path, train=None):
        def run(settings):
            return {"settings": settings, **train(settings)}

        super().__init__(path, settings_of, train and run, self.summary)
        self.times = self.held.get("times", {})

    def summary(self):
        head = {"command": "python benchmarks/map.py", **plan()}
        return head | {"gains": gains(self), "times": self.times}

    def commits(self):
        return {run["commit"] for run in self.runs}


def settings_of(run):
    return run["settings"]


def plan():
    """The plan as it stands in the JSON."""
    return {
        "predictions": list(PREDICTIONS),
        "fixed": {**FIXED, "muon_ratio": RATIO, "judged_on_seeds": list(SEEDS)},
        "places": {name: dataclasses.asdict(place) for name, place in PLACES.items()},
        "forms": {name: dataclasses.asdict(form) for name, form in FORMS.items()},
        "plan": [[place, list(names)] for place, names in PLAN],
    }


def config(settings, out):
    """train_gpt.py's settings of a run. Steps, batch and model are the place's."""
    place = PLACES[settings["place"]]
    given = train_gpt.Config(
        **MODELS[place.model],
        **FIXED,
        data=place.data,
        steps=place.steps,
        batch_size=place.batch,
        warmup=round(settings["warmup_fraction"] * place.steps),
        lr=settings["lr"],
        seed=settings["seed"],
        optimizer="adamw",
        out=str(out),
        overwrite=True,
        log_interval=50,
        eval_interval=place.steps,
        checkpoint_interval=place.steps,
    )
    return train_gpt.complete(given)


def builder(settings):
    """build(model, c) for train_gpt.train: the optimizer of a run."""
    form = FORMS[settings["form"]]

    def build(model, c):
        base = MuonAndAdamW(model, c, RATIO) if form.base == "muon" else adamw(model, c)
        if form.rule is None:
            return base
        own = {**form.settings, **{name: settings[name] for name in form.grid}}
        return forms.stretched(base, model, form.rule, own, beta=c.beta2, steps=c.steps)

    return build


def train(settings):
    """Trains one run; returns what the results hold of it. Seconds are of the processor."""
    out = ROOT / "runs" / "map" / str(os.getpid())
    started = time.process_time()
    c = config(settings, out)
    loss = None
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            loss = train_gpt.train(c, builder(settings))["val_loss"]
    except train_gpt.Diverged:
        pass
    finally:
        shutil.rmtree(out, ignore_errors=True)
    here = environment(c.device)
    result = {
        "val_loss": loss,
        "cpu_seconds": round(time.process_time() - started, 1),
        "data": train_gpt.Data(c).sha256[:12],
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
        **{name: here[name] for name in ("commit", "torch", "device", "threads")},
    }
    print(
        time.strftime("%H:%M:%S"),
        settings,
        result["val_loss"],
        f"{result['cpu_seconds']} s",
        flush=True,
    )
    return result


# --------------------------------------------------------------------------- search and judging
def tuned(results, place, name):
    """The settings of a form at a place after its search, without a seed, and the trials made."""
    form = FORMS[name]
    fixed = {"place": place, "form": name}
    if form.borrows:
        best, _ = tuned(results, place, form.borrows)
        fixed |= {setting: best[setting] for setting in GRID}
        if not form.grid:
            return fixed, 0
        start = {setting: form.settings[setting] for setting in form.grid}
        grid = form.grid
    else:
        start = neighbour(results, place, name)
        grid = GRID
    point, _, made = search(
        start,
        grid,
        lambda p: results.loss({**fixed, **p, "seed": 0}),
        PLACES[place].trials,
    )
    return {**fixed, **point}, made


def neighbour(results, place, name):
    """Where a search starts: where the form's, or else its base's, ended at the place near by."""
    near = PLACES[place].near
    for other in (name, BASES[FORMS[name].base]) if near else ():
        with contextlib.suppress(NotHeld):
            best, _ = tuned(results.only_held(), near, other)
            return {setting: best[setting] for setting in GRID}
    return START


def run_all(results):
    for place, names in PLAN:
        for name in names:
            tuned(results, place, name)
        for name in names:
            settings, _ = tuned(results, place, name)
            results.over(settings, SEEDS)


# --------------------------------------------------------------------------- what came out
def gains(results):
    """A row for each form at each place that is judged on a seed at least, in the plan's order.

    gain: loss of the tuned base minus the form's, seed by seed, so that more is better.
    steps_saved: the share of the base's steps that the form does without, from the base's losses at
    the lengths that were run at this batch; None while there is one length only.
    at_edge: the settings whose best value is the last of the grid, so that a better may lie beyond.
    """
    results = results.only_held()
    rows = []
    for place, names in PLAN:
        for name in names:
            with contextlib.suppress(NotHeld):
                row = gain(results, place, name)
                if row["seeds"]:
                    rows.append(row)
    return rows


def gain(results, place, name):
    settings, trials = tuned(results, place, name)
    base = BASES[FORMS[name].base]
    losses = results.over(settings, SEEDS)
    references = base_losses(results, place, base)
    seeds = [seed for seed in losses if seed in references]
    row = {"place": place, "form": name, "base": base, "trials": trials, "seeds": seeds}
    row |= {setting: settings[setting] for setting in (*GRID, *FORMS[name].grid)}
    row["at_edge"] = [s for s in GRID if settings[s] in (GRID[s][0], GRID[s][-1])]
    if seeds:
        row["losses"] = [losses[seed] for seed in seeds]
        row["loss"], row["loss_stderr"] = mean(losses[seed] for seed in seeds)
        row["gain"], row["gain_stderr"] = mean(references[seed] - losses[seed] for seed in seeds)
        row |= steps_saved(results, place, base, {seed: losses[seed] for seed in seeds})
    return row


def base_losses(results, place, base):
    settings, _ = tuned(results, place, base)
    return results.over(settings, SEEDS)


def steps_saved(results, place, base, losses):
    """1 - steps of the form / steps that the base needs for its loss, seed by seed."""
    here = PLACES[place]
    curves = {}
    for other, there in PLACES.items():
        if (there.batch, there.model, there.data) == (here.batch, here.model, here.data):
            with contextlib.suppress(NotHeld):
                curves[there.steps] = base_losses(results, other, base)
    saved, beyond = [], []
    for seed, loss in losses.items():
        curve = {steps: found[seed] for steps, found in curves.items() if seed in found}
        if len(curve) > 1:
            needed, outside = crossing(curve, loss)
            saved.append(1 - here.steps / needed)
            if outside:
                beyond.append(seed)
    if not saved:
        return {"steps_saved": None, "steps_saved_stderr": None, "extrapolated_on": []}
    share, error = mean(saved)
    return {"steps_saved": share, "steps_saved_stderr": error, "extrapolated_on": beyond}


# --------------------------------------------------------------------------- time
class Timed:
    """A run of a form, to be timed a few steps at a time."""

    def __init__(self, place, name):
        form = FORMS[name]
        settings = {"place": place, "form": name, "seed": 0, **START}
        settings |= {setting: form.settings[setting] for setting in form.grid}
        self.c = config(settings, ROOT / "runs" / "map" / "timed")
        self.data = train_gpt.Data(self.c)
        torch.manual_seed(0)
        self.model = train_gpt.make_model(self.c, self.data.vocab)
        self.optimizer = builder(settings)(self.model, self.c)
        self.scaler = torch.amp.GradScaler(self.c.device, enabled=False)
        self.step = 0

    def seconds(self, steps=10):
        """Of so many steps: as many as the factors stay, so that each time has one refresh."""
        begun = time.perf_counter()
        for _ in range(steps):
            batch = self.data.batch(self.step)
            train_gpt.train_step(self.model, self.optimizer, batch, self.step, self.c, self.scaler)
            self.step += 1
        return time.perf_counter() - begun


def time_forms(place, rounds):
    """{"forms": {form: its time over its base's, with quartiles}, ...}; all take turns."""
    runs = {name: Timed(place, name) for name in FORMS}
    seconds = {name: [] for name in FORMS}
    for i in range(rounds + 1):
        for name, run in runs.items():
            elapsed = run.seconds()
            if i > 0:  # the first warms up
                seconds[name].append(elapsed)
    rows = {}
    for name, form in FORMS.items():
        pairs = zip(seconds[name], seconds[BASES[form.base]], strict=True)
        low, middle, high = statistics.quantiles([a / b for a, b in pairs], n=4)
        rows[name] = {"of_base": middle, "quartiles": [low, high]}
        rows[name]["ms_a_step"] = 100 * statistics.median(seconds[name])
        print(f"{name:45}{rows[name]['ms_a_step']:8.1f} ms{middle:7.3f} ({low:.3f}-{high:.3f})")
    return {"rounds": rounds, "environment": environment("cpu"), "forms": rows}


# --------------------------------------------------------------------------- command line
def check_commit(results):
    """All runs that are compared are of one commit."""
    here = environment("cpu")["commit"]
    others = ", ".join(sorted(results.commits() - {here}))
    if others:
        sys.exit(
            f"map.py: {results.path} holds runs of commit {others}, and this is {here}; go on in a "
            "work tree of that commit (git worktree add), or begin with another file"
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--summary", action="store_true", help="run nothing")
    parser.add_argument("--time", metavar="PLACE", nargs="?", const="500x16", choices=PLACES)
    parser.add_argument("--rounds", type=int, default=20, help="of --time")
    parser.add_argument("--file", type=Path, default=RESULTS, help="default results/map.json")
    args = parser.parse_args()
    results = Results(args.file, train)
    with locked(ROOT / "runs" / "map" / "lock", args.file):
        if args.time:
            results.times[args.time] = time_forms(args.time, args.rounds)
        elif not args.summary:
            check_commit(results)
            run_all(results)
        results.save()
    report = json.loads(args.file.read_text())
    print(table(report))
    draw(report, args.file.with_suffix(".png"))


if __name__ == "__main__":
    try:
        main()
    except (train_gpt.Halt, OSError) as e:
        print(f"map.py: {e}", file=sys.stderr)
        sys.exit(getattr(e, "code", 1))
