"""Where does the gain come from? IRE on top of a base with one learning rate for all tensors, and
on top of one whose embedding and head have learning rates of their own.

    python benchmarks/bpe.py                # the vocabulary of 4,096 tokens, once
    python benchmarks/baseline.py           # run what is missing, go on where it stopped
    python benchmarks/baseline.py --status  # what is there
    python benchmarks/baseline.py --places "bytes 500x16"    # only these

The protocol is that of benchmarks/map.py: every form is tuned on seed 0 and judged on seeds that
took no part. What differs: a form says where its search starts and how many trials it gets; the
base gets as many trials as base and IRE together; the multiples of the learning rate that the
embedding and the head take join the search. The hypothesis, the predictions and what would refute
them stand in this file and in the results; they were written before the runs of their form.
Runs are kept in results/baseline.json.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import forms  # noqa: E402
from map import FIXED, MODELS  # noqa: E402
from step import environment  # noqa: E402
from study import NotHeld, Runs, locked, mean, search  # noqa: E402

import train_gpt  # noqa: E402
from ire import IRE  # noqa: E402

RESULTS = ROOT / "results" / "baseline.json"
LR = tuple(float(f"{2e-3 * 2 ** (i / 2):.3g}") for i in range(-8, 13))
WARMUP = (0.02, 0.1, 0.25, 0.5, 0.75, 0.9)
MULTIPLES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
ONE = {"lr": LR, "warmup_fraction": WARMUP}
RATES = {**ONE, "embedding_lr": MULTIPLES, "head_lr": MULTIPLES}
RATIO = {**RATES, "ratio": (0.5, 1.0, 2.0, 4.0, 8.0)}

HYPOTHESIS = (
    "IRE speeds up the training of language models because most flat coordinates are rows of rare "
    "tokens in the embedding and the head, which starve at one learning rate. So the gain is that "
    "of a larger learning rate for these rows."
)
PREDICTIONS = (
    "With 4,096 tokens IRE's mask gains 0.02 or more on top of AdamW with one learning rate, at "
    "250 and at 500 steps; the random mask gains nothing.",
    "AdamW with rates of its own for embedding and head gains more than 0.1 over AdamW with one "
    "rate at 250 steps with 4,096 tokens, more than 0.05 at 500, more than 0.02 at 2000.",
    "On top of that base neither IRE's mask nor SoftIRE gains more than 0.011 with 4,096 tokens.",
    "On bytes SoftIRE gains 0.02 to 0.03 at 2000 steps on top of that base; the mask nothing.",
    "At 500 steps with 4,096 tokens, one rate: the mask on embedding and head alone keeps 80% of "
    "the mask's gain, the mask on hidden matrices alone less than 20%.",
    "The rows of the rarest tokens, without any curvature, gain at least 80% of what the mask "
    "gains; random rows less than half.",
    "A mask that is frozen after its first refresh keeps 80% of the gain.",
    "With GPT-2's 50,257 tokens all of this is stronger.",
)
REFUTED_IF = (
    "The mask on hidden matrices alone keeps more than half of the mask's gain.",
    "The rarest rows gain less than half of what the mask gains.",
    "The mask gains more than 0.02 on top of the base with rates, with 4,096 tokens or more.",
)


# --------------------------------------------------------------------------- the plan
@dataclasses.dataclass(frozen=True)
class Place:
    steps: int
    batch: int  # sequences
    data: str  # stdlib-bytes, bpe-4096 or stdlib-gpt2
    near: str | None = None  # the place at which the searches of this one start
    model: str = "nano"


@dataclasses.dataclass(frozen=True)
class Form:
    """An optimizer of the study. It is tuned where it does not borrow."""

    name: str
    rule: str | None = None  # None is the base itself
    base: str = "adamw"
    settings: dict = dataclasses.field(default_factory=dict)
    grid: dict = dataclasses.field(default_factory=lambda: ONE)
    trials: int = 7
    starts_at: str | None = None  # the form where its search starts, at the same place
    start: dict = dataclasses.field(default_factory=dict)  # where that form has no such setting
    borrows: str | None = None  # the form whose tuned settings it takes, all of them
    against: str = "AdamW"  # the form that its gain is counted from
    expected: str = ""


PLACES = {
    "bpe 250x16": Place(250, 16, "bpe-4096"),
    "bpe 500x16": Place(500, 16, "bpe-4096", near="bpe 250x16"),
    "bpe 2000x16": Place(2000, 16, "bpe-4096", near="bpe 500x16"),
    "gpt2 250x16": Place(250, 16, "stdlib-gpt2", near="bpe 250x16"),
    "bytes 500x16": Place(500, 16, "stdlib-bytes"),
    "bytes 2000x16": Place(2000, 16, "stdlib-bytes", near="bytes 500x16"),
    "bytes 2000x4": Place(2000, 4, "stdlib-bytes", near="bytes 500x16"),
    "bytes 8000x4": Place(8000, 4, "stdlib-bytes", near="bytes 2000x4"),
    "bytes 8000x16": Place(8000, 16, "stdlib-bytes", near="bytes 2000x16"),
    "bpe 2000x16, tiny": Place(2000, 16, "bpe-4096", near="bpe 2000x16", model="tiny"),
}
START = {"lr": 5.66e-3, "warmup_fraction": 0.5, "embedding_lr": 4.0, "head_lr": 4.0, "ratio": 2.0}
MASK = {"kappa": 2.0, "gamma": 0.7}
SOFT = {"alpha": 0.3}
BLOCKWISE = {"norm": 1.0, "vo": 4.0, "ffn": 6.0, "qk": 8.0, "embedding": 10.0, "head": 10.0}


def on_both(name, rule, settings, expected, on_rates):
    """The form on top of AdamW with one rate and of AdamW with rates of its own, both tuned."""
    one = Form(name, rule, settings=settings, starts_at="AdamW", against="AdamW", expected=expected)
    rates = dataclasses.replace(
        one,
        name=f"{name}, on rates",
        grid=RATES,
        starts_at="AdamW, rates",
        against="AdamW, rates",
        expected=on_rates,
    )
    return one, rates


def control(name, rule, of, settings, expected, on_rates):
    """The same at the settings of the tuned form `of`, so that these are the only change."""
    one = Form(name, rule, settings=settings, borrows=of, against="AdamW", expected=expected)
    rates = dataclasses.replace(
        one,
        name=f"{name}, on rates",
        borrows=f"{of}, on rates",
        against="AdamW, rates",
        expected=on_rates,
    )
    return one, rates


FORMS = {
    form.name: form
    for form in (
        Form("AdamW", trials=14, expected="the base with one learning rate"),
        Form(
            "AdamW, rates",
            grid=RATES,
            trials=21,
            starts_at="AdamW",
            expected="more than 0.1 over AdamW at bpe 250x16, 0.05 at 500, 0.02 at 2000",
        ),
        *on_both(
            "mask",
            "hard",
            MASK,
            "0.02 or more at 250 and 500 steps with 4,096 tokens",
            "no more than 0.011",
        ),
        *on_both(
            "SoftIRE",
            "soft",
            SOFT,
            "0.05 or more at 250 and 500 steps with 4,096 tokens",
            "no more than 0.011 with 4,096 tokens; 0.02 to 0.03 on bytes at 2000 steps",
        ),
        *control(
            "random mask", "hard", "mask", {**MASK, "random": True}, "worse than AdamW", "worse"
        ),
        *control(
            "mask on embedding and head only",
            "hard",
            "mask",
            {**MASK, "only": "embedding and head"},
            "keeps 80% of the mask's gain",
            "nothing",
        ),
        *control(
            "mask on hidden matrices only",
            "hard",
            "mask",
            {**MASK, "only": "hidden"},
            "keeps less than 20% of the mask's gain",
            "nothing",
        ),
        *control(
            "mask frozen after the first refresh",
            "hard",
            "mask",
            {**MASK, "frozen": True},
            "keeps 80% of the mask's gain",
            "nothing",
        ),
        *control(
            "random rows",
            "rows",
            "mask",
            {**MASK, "by": "random"},
            "less than half of the mask's gain",
            "nothing",
        ),
        *control(
            "rows of the rarest tokens",
            "rows",
            "mask",
            {**MASK, "by": "rarest"},
            "at least 80% of the mask's gain",
            "nothing",
        ),
        *on_both(
            "as in the paper",
            "paper",
            MASK,
            "less than the mask from step 0, since it begins late",
            "no more than 0.011",
        ),
        Form(
            "Blockwise LR",
            settings={"multiples": BLOCKWISE},
            starts_at="AdamW",
            expected="between AdamW and AdamW with rates",
        ),
        Form("Muon", base="muon", grid={**ONE, "ratio": RATIO["ratio"]}, trials=14),
        Form(
            "Muon, rates",
            base="muon",
            grid=RATIO,
            trials=21,
            starts_at="Muon",
            against="Muon",
            expected="0.02 or more over Muon",
        ),
        Form(
            "mask on Muon, rates",
            "hard",
            base="muon",
            settings={"kappa": 1.0, "gamma": 0.7},
            grid=RATIO,
            starts_at="Muon, rates",
            against="Muon, rates",
            expected="no more than 0.011",
        ),
        Form(
            "SoftIRE on Muon, rates",
            "soft",
            base="muon",
            settings=SOFT,
            grid=RATIO,
            starts_at="Muon, rates",
            against="Muon, rates",
            expected="0.02 or more on bytes at 500 steps, nothing at 2000x16",
        ),
    )
}
BASES = ("AdamW", "AdamW, rates")
MAIN = (*BASES, "mask", "mask, on rates", "SoftIRE", "SoftIRE, on rates")
WHY = tuple(
    f"{name}{on}"
    for name in (
        "mask on embedding and head only",
        "mask on hidden matrices only",
        "rows of the rarest tokens",
        "random rows",
        "mask frozen after the first refresh",
        "random mask",
    )
    for on in ("", ", on rates")
)
PAPER = ("as in the paper", "as in the paper, on rates")
MUON = ("Muon", "Muon, rates", "mask on Muon, rates", "SoftIRE on Muon, rates")
THREE = (1, 2, 3)
EIGHT = (1, 2, 3, 4, 5, 6, 7, 8)
# What is run, in an order that can be read after any line: (place, forms, seeds).
PLAN = (
    ("bpe 250x16", MAIN, THREE),
    ("bpe 250x16", ("random mask", "random mask, on rates"), THREE),
    ("bpe 500x16", MAIN, THREE),
    ("bpe 500x16", WHY, THREE),
    ("bytes 500x16", MAIN, THREE),
    ("bpe 500x16", (*PAPER, "Blockwise LR"), THREE),
    ("bpe 2000x16", MAIN, THREE),
    ("bpe 250x16", MAIN, EIGHT),
    ("bpe 500x16", (*MAIN, *WHY), EIGHT),
    ("bytes 2000x4", MAIN, THREE),
    ("gpt2 250x16", ("AdamW", "mask", "AdamW, rates", "mask, on rates"), (1,)),
    ("bytes 2000x16", MAIN, THREE),
    ("bytes 500x16", MUON, THREE),
    ("bytes 2000x4", MAIN, EIGHT),
    ("bytes 500x16", MAIN, EIGHT),
    ("bpe 2000x16", MAIN, EIGHT),
    ("bytes 2000x16", MAIN, EIGHT),
    ("bpe 500x16", MUON, THREE),
    ("bytes 2000x4", MUON, THREE),
    ("bytes 2000x16", MUON, THREE),
    ("bpe 2000x16", MUON, THREE),
    ("bytes 8000x4", ("AdamW", "AdamW, rates", "SoftIRE, on rates"), EIGHT),
    ("bpe 2000x16, tiny", MAIN, THREE),
    ("bytes 8000x16", ("AdamW", "AdamW, rates", "SoftIRE, on rates"), THREE),
)
# Is it a tuned base? Each setting of a tuned base is doubled and halved on seeds 1 and 2; none may
# gain more than 0.01. beta2 is doubled and halved in its distance from 1.
AROUND = (
    "lr",
    "warmup_fraction",
    "beta2",
    "eps",
    "weight_decay",
    "clip",
    "embedding_lr",
    "head_lr",
)
CHECKED = ("bpe 500x16", "bytes 500x16", "bpe 2000x16", "bytes 2000x4")
# Steps saved: the better base at longer schedules.
LONGER = (1.2, 1.35, 1.5)
DEFAULTS = {
    "beta2": FIXED["beta2"],
    "eps": 1e-8,
    "weight_decay": FIXED["weight_decay"],
    "clip": 1.0,
}


# --------------------------------------------------------------------------- optimizers
def kind_of(name):
    """embedding, head, qk, vo, ffn or norm."""
    kinds = {"embed_tokens": "embedding", "lm_head": "head", "norm": "norm"}
    for layer, kind in (*kinds.items(), ("q_proj", "qk"), ("k_proj", "qk")):
        if layer in name:
            return kind
    return "vo" if "v_proj" in name or "o_proj" in name else "ffn"


class Scaled(torch.optim.Optimizer):
    """AdamW, or Muon on the hidden matrices beside it, whose groups take multiples of the learning
    rate. The caller sets lr anew before each step."""

    def __init__(self, model, c, multiples, ratio=None):
        groups = {}
        for name, p in model.named_parameters():
            groups.setdefault(kind_of(name), []).append(p)
        kinds = {"params": [], "multiple": 1.0}
        listed = []
        for kind, params in groups.items():
            decay = 0.0 if kind == "norm" else c.weight_decay
            own = {"params": params, "weight_decay": decay, "multiple": multiples.get(kind, 1.0)}
            listed.append(
                {**kinds, **own, "muon": kind in ("qk", "vo", "ffn") and ratio is not None}
            )
        adam = [group for group in listed if not group["muon"]]
        self.parts = [torch.optim.AdamW(adam, c.lr, (c.beta1, c.beta2), c.eps, fused=True)]
        if ratio is not None:
            hidden = [group for group in listed if group["muon"]]
            for group in hidden:
                group["multiple"] = ratio
            self.parts.append(torch.optim.Muon(hidden, c.lr, adjust_lr_fn="match_rms_adamw"))
        super().__init__([g for part in self.parts for g in part.param_groups], {})
        self.param_groups = [g for part in self.parts for g in part.param_groups]
        for part in self.parts:
            part.state = self.state

    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"] *= group["multiple"]
        for part in self.parts:
            part.step()


class Masked(forms.Stretched):
    """A mask that is cut, frozen or replaced, and what is recorded of the flat coordinates.

    only: "embedding and head" or "hidden": the mask counts there alone.
    frozen: the first mask stays.
    by: rows of embedding and head in place of the mask, as many as the mask takes of either:
        "random" or "rarest" tokens of the training text.
    counts: how often each token stands in the training text, shape (vocab,).
    """

    def __init__(self, base, model, settings, counts, *, beta, record_at):
        self.counts = counts
        self.record_at = record_at
        self.recorded = {}
        self.options = {k: settings[k] for k in ("only", "frozen", "by") if k in settings}
        rest = {k: v for k, v in settings.items() if k not in self.options}
        super().__init__(base, model, forms.hard, rest, beta=beta)

    def refresh(self):
        if self.options.get("frozen") and self.factors:
            return
        super().refresh()
        if self.t in self.record_at:
            self.recorded[self.t] = self.described()
        tables = [n for n in self.factors if kind_of(n) in ("embedding", "head")]
        if "by" in self.options:
            self.factors = {n: self.rows(self.factors[n]) for n in tables}
        if "only" in self.options:
            inside = self.options["only"] == "embedding and head"
            self.factors = {n: f for n, f in self.factors.items() if (n in tables) == inside}

    def rows(self, factor):
        """Whole rows, as many coordinates as `factor` lengthens, shape (vocab, width)."""
        longer = factor.max()
        count = round(int((factor > 1).sum()) / factor.shape[1])
        noise = torch.rand(len(factor), generator=self.generator)
        rare = self.options["by"] == "rarest"
        order = (self.counts + noise if rare else noise).argsort()  # noise breaks ties
        chosen = torch.ones_like(factor)
        chosen[order[:count]] = longer
        return chosen

    def described(self):
        """The flat share of each kind of tensor, and the rank correlation of a token's count with
        the flat share of its row."""
        shares = {}
        for name, factor in self.factors.items():
            kind = kind_of(name)
            flat = factor > 1
            shares.setdefault(kind, []).append(flat.float().mean().item())
            if kind in ("embedding", "head"):
                seen = self.counts > 0
                row = flat.float().mean(1)[seen]
                shares[f"{kind}, correlation with count"] = [spearman(row, self.counts[seen])]
                shares[f"{kind}, tokens never seen"] = [(~seen).float().mean().item()]
        return {kind: round(sum(x) / len(x), 4) for kind, x in shares.items()}


def spearman(x, y):
    """Rank correlation; ties share their mean rank."""
    ranks = []
    for values in (x, y):
        _, inverse, n = values.unique(return_inverse=True, return_counts=True)
        last = n.cumsum(0).double()
        ranks.append((last - (n - 1) / 2)[inverse])
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def multiples_of(form, settings):
    own = form.settings.get("multiples", {})
    rates = {"embedding": "embedding_lr", "head": "head_lr"}
    return own | {kind: settings[name] for kind, name in rates.items() if name in settings}


def builder(settings, data, kept):
    """build(model, c) for train_gpt.train: the optimizer of a run. kept: gets the optimizer."""
    form = FORMS[settings["form"]]
    steps = PLACES[settings["place"]].steps
    counts = torch.from_numpy(np.bincount(data.train, minlength=data.vocab)).double()

    def build(model, c):
        base = Scaled(model, c, multiples_of(form, settings), settings.get("ratio"))
        if form.rule is None:
            return base
        if form.rule == "paper":
            return IRE(base, **form.settings, warmup=c.warmup)
        if form.rule == "soft":
            return forms.stretched(base, model, "soft", form.settings, beta=c.beta2, steps=steps)
        at = {0, 10, *range(0, steps, steps // 10)} if settings["seed"] > 0 else set()
        kept.append(Masked(base, model, form.settings, counts, beta=c.beta2, record_at=at))
        return kept[-1]

    return build


# --------------------------------------------------------------------------- runs
def config(settings, out):
    place = PLACES[settings["place"]]
    steps = round(place.steps * settings.get("length", 1))
    own = {name: settings.get(name, value) for name, value in DEFAULTS.items()}
    sources = {"bpe-4096": {"data": str(ROOT / "data" / "bpe-4096")}}
    text = sources.get(place.data, {"data": "stdlib", "tokenizer": place.data.split("-")[-1]})
    given = train_gpt.Config(
        **MODELS[place.model],
        **own,
        **text,
        eval_sequences=FIXED["eval_sequences"],
        steps=steps,
        batch_size=place.batch,
        warmup=round(settings["warmup_fraction"] * steps),
        lr=settings["lr"],
        seed=settings["seed"],
        optimizer="admire" if FORMS[settings["form"]].rule == "paper" else "adamw",
        out=str(out),
        overwrite=True,
        log_interval=50,
        eval_interval=steps,
        checkpoint_interval=steps,
    )
    return train_gpt.complete(given)


def train(settings):
    """Trains one run; returns what the results hold of it. Seconds are of the processor."""
    out = ROOT / "runs" / "baseline" / str(os.getpid())
    started = time.process_time()
    c = config(settings, out)
    data = train_gpt.Data(c)
    loss = None
    kept = []
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            loss = train_gpt.train(c, builder(settings, data, kept))["val_loss"]
    except train_gpt.Diverged:
        pass
    finally:
        shutil.rmtree(out, ignore_errors=True)
    here = environment(c.device)
    result = {
        "val_loss": loss,
        "cpu_seconds": round(time.process_time() - started, 1),
        "data": data.sha256[:12],
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
        **{name: here[name] for name in ("commit", "torch", "device", "threads")},
    }
    if kept and kept[0].recorded:
        result["flat"] = kept[0].recorded
    print(time.strftime("%H:%M:%S"), settings, loss, f"{result['cpu_seconds']} s", flush=True)
    return result


class Results(Runs):
    def __init__(self, path, train=None):
        def run(settings):
            return {"settings": settings, **train(settings)}

        super().__init__(path, lambda run: run["settings"], train and run, self.summary)

    def summary(self):
        return {"command": "python benchmarks/baseline.py", **plan(), "gains": gains(self)}


def plan():
    return {
        "hypothesis": HYPOTHESIS,
        "predictions": list(PREDICTIONS),
        "refuted_if": list(REFUTED_IF),
        "fixed": {**FIXED, **DEFAULTS, "kappa, gamma and alpha": "not tuned here"},
        "start": START,
        "places": {name: dataclasses.asdict(place) for name, place in PLACES.items()},
        "forms": {name: dataclasses.asdict(form) for name, form in FORMS.items()},
        "plan": [[place, list(names), list(seeds)] for place, names, seeds in PLAN],
        "around": {"settings": list(AROUND), "places": list(CHECKED), "seeds": [1, 2]},
        "longer": list(LONGER),
    }


# --------------------------------------------------------------------------- search and judging
def tuned(results, place, name):
    """The settings of a form at a place after its search, without a seed, and the trials made."""
    form = FORMS[name]
    fixed = {"place": place, "form": name}
    if form.borrows:
        best, _ = tuned(results, place, form.borrows)
        return {**best, **fixed}, 0
    begin = {setting: start_of(results, place, form)[setting] for setting in form.grid}
    point, _, made = search(
        begin, form.grid, lambda p: results.loss({**fixed, **p, "seed": 0}), form.trials
    )
    return {**fixed, **point}, made


def start_of(results, place, form):
    """Where a search starts: at the same form at the place near by; else at the form that it says;
    a setting that neither has starts where START says."""
    start = dict(START)
    near = PLACES[place].near
    held = results.only_held()
    if form.starts_at:
        start |= tuned(results, place, form.starts_at)[0]
    if near and form.name in ("AdamW", "Muon"):
        with contextlib.suppress(NotHeld):
            start |= tuned(held, near, form.name)[0]
    if near and form.starts_at in ("AdamW", "Muon") and form.grid is not ONE:
        with contextlib.suppress(NotHeld):  # the multiples, from the shorter run's
            found = tuned(held, near, form.name)[0]
            start |= {s: found[s] for s in ("embedding_lr", "head_lr") if s in found}
    return start


def run_all(results, places):
    for place, names, seeds in PLAN:
        if places and place not in places:
            continue
        for name in names:
            tuned(results, place, name)
        for name in names:
            settings, _ = tuned(results, place, name)
            results.over(settings, seeds)
    for place in CHECKED:
        if not places or place in places:
            for name in BASES:
                for settings in around(tuned(results, place, name)[0]):
                    results.over(settings, (1, 2))
    for place in ("bpe 500x16", "bytes 500x16", "bpe 250x16", "bytes 2000x4", "bpe 2000x16"):
        if not places or place in places:
            for length in LONGER:
                settings, _ = tuned(results, place, "AdamW, rates")
                results.over({**settings, "length": length}, EIGHT)


def around(settings):
    """The tuned settings with one of them doubled or halved."""
    for name in AROUND:
        for factor in (0.5, 2.0):
            if name in ("embedding_lr", "head_lr") and name not in settings:
                continue
            value = settings.get(name, DEFAULTS.get(name))
            changed = 1 - (1 - value) * factor if name == "beta2" else value * factor
            if name != "warmup_fraction" or changed <= 1:
                yield {**settings, name: float(f"{changed:.6g}")}


def gains(results):
    """A row for each form at each place that is judged on a seed at least: the loss of the form
    that it is counted from minus its own, seed by seed, so that more is better."""
    results = results.only_held()
    rows = {}
    for place, names, seeds in PLAN:
        for name in names:
            with contextlib.suppress(NotHeld):
                rows[place, name] = gain(results, place, name, seeds) or rows.get((place, name))
    return [row for row in rows.values() if row]


def gain(results, place, name, seeds):
    form = FORMS[name]
    settings, trials = tuned(results, place, name)
    losses = results.over(settings, seeds)
    row = {"place": place, "form": name, "trials": trials}
    row |= {setting: settings[setting] for setting in RATIO if setting in settings}
    row["at_edge"] = [s for s in form.grid if settings[s] in (form.grid[s][0], form.grid[s][-1])]
    for label, other in (("gain", form.against), ("gain_on_one_rate", "AdamW")):
        reference = results.over(tuned(results, place, other)[0], seeds)
        shared = [seed for seed in losses if seed in reference]
        if not shared:
            return None
        row[label], row[f"{label}_stderr"] = mean(reference[s] - losses[s] for s in shared)
    row |= {"against": form.against, "seeds": list(losses)}
    row["loss"], row["loss_stderr"] = mean(losses.values())
    return row


def table(results):
    for row in gains(results):
        error = row["gain_stderr"]
        print(
            f"{row['place']:14}{row['form']:46}{row['loss']:8.4f}{row['gain']:+9.4f}"
            f" ± {error if error is None else round(error, 4)} over {row['against']}"
            f" ({len(row['seeds'])} seeds, {row['trials']} trials, edge {row['at_edge']})"
        )


# --------------------------------------------------------------------------- command line
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--status", action="store_true", help="run nothing")
    parser.add_argument("--places", nargs="+", choices=PLACES)
    parser.add_argument("--file", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.status:
        table(Results(args.file))
        return
    results = Results(args.file, train)
    here = environment("cpu")["commit"]
    others = {run["commit"] for run in results.runs} - {here}
    if others:
        sys.exit(f"baseline.py: {args.file} holds runs of commit {others}, and this is {here}")
    with locked(ROOT / "runs" / "baseline" / f"{args.file.stem}.lock", args.file):
        run_all(results, args.places)
        results.save()
    table(results)


if __name__ == "__main__":
    assert math.isfinite(START["lr"])
    try:
        main()
    except (train_gpt.Halt, OSError) as e:
        print(f"baseline.py: {e}", file=sys.stderr)
        sys.exit(getattr(e, "code", 1))
    except KeyboardInterrupt:
        print(json.dumps({"stopped": time.strftime("%H:%M:%S")}))
