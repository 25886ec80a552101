"""benchmarks/study.py: optimizers against naive ones, search, plan, judging, replicate, figures."""

import argparse
import copy
import dataclasses
import json
import math
import runpy
import statistics
import sys
from pathlib import Path

import pytest
import torch

import cifar
import common
import llama
import optimizers
import report
import speed
import study
import train_gpt
from ire import IRE, SoftIRE, hidden_matrices

ROOT = Path(__file__).resolve().parents[1]

muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
MAP = ROOT / "results" / "map.json"
SMALL = {"layers": 1, "width": 8, "heads": 2, "ffn": 12, "context": 8, "dtype": "float32"}
Q, K, V, OUT = (f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkvo")
UP = "model.layers.0.mlp.up_proj.weight"
HEAD, NORM = "lm_head.weight", "model.norm.weight"


# --------------------------------------------------------------------------- rules
def small_run(build, steps=7):
    """A small model after some steps of build(model, c), and its optimizer."""
    c = train_gpt.Config(**SMALL, lr=0.01, optimizer="adamw", beta2=0.98)
    torch.manual_seed(0)
    model = llama.Llama(c, 16)
    opt = build(model, c)
    for i in range(steps):
        for group in opt.param_groups:
            group["lr"] = 0.01 / (i + 1) * group["lr_scale"]
        tokens = torch.randint(12, (2, 8), generator=torch.Generator().manual_seed(i))
        model(tokens, tokens.roll(-1, 1)).backward()
        opt.step()
        opt.zero_grad()
    return model, opt


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


adamw = train_gpt.make_optimizer


def muon_base(model, c):
    base = train_gpt.make_optimizer(model, dataclasses.replace(c, optimizer="muon"))
    for group in base.param_groups:
        group["lr_scale"] = 2.0 if group["muon"] else 1.0
    return base


def on_top(base, rule, settings):
    """build: a rule on top of "adamw" or "muon"."""

    def build(model, c):
        inner = (muon_base if base == "muon" else adamw)(model, c)
        return optimizers.Stretched(inner, model, rule, settings, beta=0.98)

    return build


@pytest.fixture
def curvature():
    generator = torch.Generator().manual_seed(0)
    shapes = {Q: (3, 4), K: (3, 4), V: (3, 4), OUT: (4, 3), UP: (5, 4), HEAD: (6, 4), NORM: (4,)}
    v = {name: torch.rand(shape, generator=generator) ** 4 for name, shape in shapes.items()}
    v[HEAD][:2] = 0  # tokens that did not occur
    return v


def check_same(ours, theirs, plain):
    """The first two runs end alike, and the third elsewhere."""
    ours, theirs, plain = (weights(small_run(*run)[0]) for run in (ours, theirs, plain))
    for name, p in ours.items():
        torch.testing.assert_close(p, theirs[name], atol=1e-6, rtol=1e-5)
    assert any((plain[name] - p).abs().max() > 1e-3 for name, p in ours.items())


def test_the_hard_rule_is_ire():
    """On top of AdamW, whose second moment is the running mean that the rule keeps."""

    def ire(model, c):
        return IRE(adamw(model, c), kappa=2.0, gamma=0.7)

    mask = {"kappa": 2.0, "gamma": 0.7}
    ours, plain = (on_top("adamw", "hard", own) for own in (mask, {**mask, "kappa": 0.0}))
    check_same((ours, 25), (ire, 25), (plain, 25))


@muon
def test_the_soft_rule_is_soft_ire():
    def soft_ire(model, c):
        return SoftIRE(muon_base(model, c), params=hidden_matrices(model), beta=c.beta2)

    ours, plain = (on_top("muon", "soft", {"alpha": alpha}) for alpha in (0.3, 0.0))
    check_same((ours, 15), (soft_ire, 15), (plain, 15))  # later a rounding meets Muon's bfloat16


def test_random_masks_have_the_size_and_come_from_the_generator(curvature):
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        factors = optimizers.hard(curvature, generator, kappa=1.0, gamma=0.6, random=True)
        return optimizers.flatten(factors.values())

    flat = optimizers.flatten(optimizers.hard(curvature, None, kappa=1.0, gamma=0.6).values())
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    assert draw(0).sum() == flat.sum() and not torch.equal(draw(0), flat)


@pytest.mark.parametrize("alpha", [0.3, 2.0])
def test_soft_against_a_loop(curvature, alpha):
    factors = optimizers.soft(curvature, None, alpha=alpha)
    assert list(factors) == [Q, K, V, OUT, UP]
    values = [x for name in factors for x in curvature[name].flatten().tolist()]
    median = sorted(values)[(len(values) - 1) // 2]
    raw = [min(max((x / median) ** -alpha, 1 / 4), 4.0) for x in values]
    expected = torch.tensor([x * len(raw) / sum(raw) for x in raw])
    torch.testing.assert_close(optimizers.flatten(factors.values()), expected)


# --------------------------------------------------------------------------- optimizers
def test_a_frozen_mask_is_the_first_one():
    mask = {"kappa": 2.0, "gamma": 0.7}
    runs = ({**mask, "frozen": True}, 25), (mask, 1), (mask, 25)
    found = [small_run(on_top("adamw", "hard", own), steps)[1].factors for own, steps in runs]
    frozen, first, renewed = (optimizers.flatten(x.values()) for x in found)
    assert torch.equal(frozen, first) and not torch.equal(frozen, renewed)


@pytest.mark.parametrize("by", ["random", "rarest", "frequent"])
def test_rows_have_the_size_of_the_mask(curvature, by):
    """The head's mask has 15 or 16 of 24 coordinates: four rows of four; "frequent" takes the two
    rows that are left."""
    counts = torch.tensor([0, 0, 5, 1, 9, 2.0])
    generator = torch.Generator().manual_seed(1)
    settings = {"kappa": 2.0, "gamma": 0.6}
    factors = optimizers.rows(curvature, generator, by=by, counts=counts, **settings)
    assert factors.keys() == {HEAD}
    assert ((factors[HEAD] == 3).all(1) | (factors[HEAD] == 1).all(1)).all()
    longer = (factors[HEAD] == 3).all(1)
    flat = optimizers.hard(curvature, None, **settings)[HEAD] > 1
    assert round(float(flat.sum()) / 4) == 4
    assert longer.sum() == (2 if by == "frequent" else 4)
    if by != "random":
        rarest_first = longer[[0, 1, 3, 5, 2, 4]].tolist()
        assert rarest_first == sorted(rarest_first, reverse=by == "rarest")


@pytest.mark.parametrize("only", ["embedding and head", "hidden"])
def test_a_mask_in_one_part_of_the_model(curvature, only):
    whole = optimizers.hard(curvature, None, kappa=1.0, gamma=0.6)
    part = optimizers.hard(curvature, None, kappa=1.0, gamma=0.6, only=only)
    assert part.keys() == ({HEAD} if only == "embedding and head" else whole.keys() - {HEAD})
    assert all(torch.equal(part[name], whole[name]) for name in part)


def test_constants_are_learning_rates():
    """On the first step AdamW moves each coordinate by its lr, and by its decay."""
    longer = on_top("adamw", "constants", {"head": 4.0, "vo": 2.0})
    runs = ((adamw, 0), (adamw, 1), (longer, 1))
    before, plain, after = (weights(small_run(*run)[0]) for run in runs)
    for name, start in before.items():
        factor = {HEAD: 4, V: 2, OUT: 2}.get(name, 1)
        torch.testing.assert_close(after[name] - start, factor * (plain[name] - start))


# --------------------------------------------------------------------------- search
def test_search_finds_the_best_and_uses_every_trial():
    grid = {"x": tuple(range(-9, 10)), "y": tuple(range(-9, 10))}

    def bowl(p):
        x, y = p["x"] - 4, p["y"] + 3
        return x**2 + y**2 + x * y

    best, value, trials = study.search({"x": 0, "y": 0}, grid, bowl, 40)
    assert (best, value) == ({"x": 4, "y": -3}, 0) and trials <= 40
    assert study.search({"x": 0, "y": 0}, grid, bowl, 7)[2] == 7


def test_search_leaves_a_point_that_is_best_along_each_axis():
    grid = {"x": (0, 1, 2), "y": (0, 1, 2)}
    losses = {(1, 1): 1, (2, 2): 0}
    best, *_ = study.search({"x": 1, "y": 1}, grid, lambda p: losses.get((p["x"], p["y"]), 2), 9)
    assert best == {"x": 2, "y": 2}


@pytest.mark.parametrize("middle, trials", [(1.0, 2), (math.inf, 2)])
def test_search_stays_on_a_plateau_and_survives_divergence(middle, trials):
    losses = [1.0, middle, 0.0]
    found = study.search({"x": 0}, {"x": (0, 1, 2)}, lambda p: losses[p["x"]], 9)
    assert found == ({"x": 0}, 1.0, trials)


@pytest.mark.parametrize(
    "law, lengths",
    [
        (lambda x: 3 - 0.5 * math.log(x), (0.8, 2.0)),
        (lambda x: 3 - 0.5 * math.log(x), (0.8, 1.0, 1.2, 2.0)),
        (lambda x: 1 + 2 * x**-0.7, (0.8, 1.0, 1.2, 2.0)),
    ],
)
def test_crossing_is_exact_on_a_line_over_log_length_and_on_a_power_law(law, lengths):
    curve = {length: law(length) for length in lengths}
    for length in (0.7, 0.81, 1.0, 1.13, 1.99, 2.3):
        found, beyond = study.crossing(curve, law(length))
        assert found == pytest.approx(length, rel=1e-4)
        assert beyond == (length in (0.7, 2.3))


def test_a_loss_that_the_law_never_reaches():
    curve = {length: 1 + length**-1.0 for length in (1, 2, 4)}
    assert study.crossing(curve, 0.9) == (math.inf, True)


# --------------------------------------------------------------------------- the plan of the map
PLAN = {k: v for k, v in json.loads(MAP.read_text()).items() if k not in ("runs", "times")}
GAINS = {"hard mask over AdamW": 0.01, "soft factor over Muon": 0.03}


def synthetic(held, settings):
    """A valley in lr, falling with the logarithm of the steps; some forms gain."""
    place = held.place(settings["place"])
    loss = 2 - 0.2 * math.log(place["steps"] / 500) + 0.01 * settings["seed"]
    loss += 0.01 * math.log(settings["lr"] / 4e-3) ** 2
    loss -= GAINS.get(settings["form"], 0)
    return {"val_loss": loss, "commit": "abc", "device": "", "threads": 1, "torch": ""}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The whole plan on synthetic losses, without a file."""
    path = tmp_path_factory.mktemp("results") / "map.json"
    results = study.Study(path, dict(PLAN), (), synthetic)
    results.save = dict
    study.run_all(results)
    return results


def test_equal_trials_fresh_seeds_and_known_gains(results):
    rows = {(row["place"], row["form"]): row for row in study.gains(results)}
    assert rows.keys() == {(place, name) for place, names in PLAN["plan"] for name in names}
    for (place, name), row in rows.items():
        assert row["seeds"] == [1, 2, 3]
        assert row["trials"] <= PLAN["places"][place]["trials"]
        for key in ("gain", "better_gain"):
            assert row[key] == pytest.approx(GAINS.get(name, 0), abs=1e-9)
        assert row["gain_stderr"] == pytest.approx(0, abs=1e-9)
        if row["steps_saved"] is not None:  # exact on a line over the logarithm of the length
            expected = 1 - math.exp(-GAINS.get(name, 0) / 0.2)
            assert row["steps_saved"] == pytest.approx(expected, abs=1e-4)
    assert rows["250x16", "AdamW"]["trials"] == rows["250x16", "NorMuon"]["trials"]
    assert rows["tiny 500x16", "AdamW"]["steps_saved"] is None
    assert rows["500x64", "AdamW"]["steps_saved"] == pytest.approx(0)


def test_a_search_starts_at_the_neighbouring_place(results):
    first = {}
    for run in results.runs:
        first.setdefault((run["settings"]["place"], run["settings"]["form"]), run["settings"])
    best, _ = study.tuned(results, "250x4", "Muon")
    assert first["250x16", "Muon"]["lr"] == best["lr"] == 4e-3
    assert first["250x4", "Muon"]["lr"] == PLAN["start"]["lr"]


def test_a_place_has_a_share_of_the_trials_or_the_settings_of_another(tmp_path):
    shared = {**PLAN["places"]["500x16"], "share_of_trials": 0.5}
    borrowed = {**PLAN["places"]["250x64"], "borrows": "500x16"}
    places = {**PLAN["places"], "500x16": shared, "250x64": borrowed}
    plan = [["500x16", ["AdamW"]], ["250x64", ["AdamW"]]]
    results = study.Study(tmp_path / "x.json", {**PLAN, "places": places, "plan": plan}, ())
    results.train = synthetic
    study.run_all(results)
    half, none = study.gains(results)
    assert half["trials"] == round(shared["trials"] / 2) < shared["trials"]
    assert none["trials"] == 0 and none["lr"] == half["lr"]
    seeds = [
        run["settings"]["seed"] for run in results.runs if run["settings"]["place"] == "250x64"
    ]
    assert seeds == [1, 2, 3]
    luck = [study.luck(results, place, "AdamW", 0.1) for place in ("250x64", "500x16")]
    assert luck[0] == luck[1] > 0


def test_a_run_is_never_repeated(results):
    made = []

    def counted(held, settings):
        made.append(settings)
        return synthetic(held, settings)

    again = study.Study(results.path, results.plan, results.runs[:-5], counted)
    again.save = dict
    study.run_all(again)
    assert made == [run["settings"] for run in results.runs[-5:]]
    study.run_all(again)
    assert len(made) == 5


SOURCE = {"commit": "abc", "device": "", "threads": 1, "torch": ""}
BASE = {"base": "adamw", "rule": None, "settings": {}, "borrows": None, "grid": None}
SOFT = {**BASE, "rule": "soft", "settings": {"alpha": 0.3}}
PLACE = {"steps": 100, "batch": 1, "near": None, "model": "", "data": "", "trials": 9}
TWO = {  # a base with one learning rate, one with a rate for the head, a form on top of either
    "fixed": {"judged_on_seeds": [1, 2], "decay": 0.1, "beta2": 0.98},
    "start": {"lr": 1.0, "head_lr": 1.0},
    "grid": {"lr": [1.0, 2.0, 4.0, 8.0]},
    "places": {"a": PLACE, "longer": {**PLACE, "steps": 150}},
    "forms": {
        "AdamW": BASE,
        "AdamW, rates": {**BASE, "starts_at": "AdamW", "grid": {"head_lr": [1.0, 4.0, 16.0]}},
        "soft": {**SOFT, "borrows": "AdamW"},
        "soft, on rates": {**SOFT, "borrows": "AdamW, rates", "against": "AdamW, rates"},
    },
    "plan": [
        ["a", ["AdamW", "AdamW, rates", "soft", "soft, on rates"]],
        ["longer", ["AdamW, rates"]],
    ],
    "changed": [["a", ["AdamW"], ["lr", "beta2", "head_lr"], [0.5, 2.0], [1]]],
}


@pytest.fixture
def two(tmp_path):
    """Its runs: `rates` is 0.3 better than AdamW, soft is 0.1 and 0.02 better than either, and 1.5
    times the steps are 0.2 better."""

    def losses(held, settings):
        loss = 3.0 + 0.01 * settings["seed"] + 0.1 * abs(settings["lr"] - 2)
        loss -= 0.15 * math.log(settings.get("head_lr", 1.0), 4)
        loss -= {"soft": 0.1, "soft, on rates": 0.02}.get(settings["form"], 0)
        return {**SOURCE, "val_loss": loss - 0.2 * (settings["place"] == "longer")}

    results = study.Study(tmp_path / "two.json", copy.deepcopy(TWO), (), losses)
    study.run_all(results)
    return results


def test_gains_on_top_of_the_better_base_and_other_lengths(two):
    rows = {row["form"]: row for row in study.gains(two)}
    expected = {"AdamW": (0, -0.3), "AdamW, rates": (0.3, 0), "soft": (0.1, -0.2)}
    for name, values in {**expected, "soft, on rates": (0.02, 0.02)}.items():
        row = rows[name]
        assert (row["gain"], row["better_gain"]) == pytest.approx(values, abs=1e-9)
        assert row["better"] == "AdamW, rates" and row["lr"] == 2.0
    assert rows["soft"]["at_edge"] == [] and rows["soft, on rates"]["at_edge"] == ["head_lr"]
    assert rows["soft"]["steps_saved"] is None
    assert rows["soft, on rates"]["steps_saved"] == pytest.approx(1 - 1.5**-0.1)
    text = report.table(common.read_json(two.path), "a")
    assert "| soft on AdamW | 2.915 ± 0.005 | +0.100 ± 0.000 | ± 0.000 | -0.200 ± 0.000 |" in text
    assert "| AdamW with own rates | 2.715 ± 0.005 | +0.300 ± 0.000 | ± 0.000 | this is the" in text
    assert "| 4% ± 0%" not in text and "| 4% | borrowed | head lr |" in text


def test_the_error_pools_places_and_holds_the_luck_of_tuning(tmp_path):
    rows = [{"seeds": [1, 2, 3], "gain_stderr": 0.01}, {"seeds": [1, 2], "gain_stderr": 0.04}]
    variance = (2 * 3 * 0.01**2 + 1 * 2 * 0.04**2) / 3
    assert study.pooled(rows, "gain", 8) == pytest.approx((variance / 8) ** 0.5)
    runs = []
    for lr, loss in ((1.0, 3.0), (2.0, 3.01)):
        settings = {"place": "a", "form": "AdamW", "seed": 0, "lr": lr}
        runs.append({"settings": settings, "val_loss": loss})
    held = study.Study(tmp_path / "a.json", TWO, runs)
    second = statistics.NormalDist().cdf(-1 / 2**0.5)  # how often the worse trial wins
    expected = 0.01 * (second * (1 - second)) ** 0.5
    for name in ("AdamW", "soft"):
        assert study.luck(held, "a", name, 0.01, 20_000) == pytest.approx(expected, rel=0.03)
    assert study.luck(held, "a", "AdamW", 0.0) == 0


def test_one_setting_of_a_tuned_form_is_changed(two):
    changed = [run["settings"] for run in two.runs if run["settings"]["form"] == "AdamW"][-4:]
    values = [(run["lr"], run.get("beta2"), run["seed"]) for run in changed]
    assert values == [(1.0, None, 1), (4.0, None, 1), (2.0, 0.99, 1), (2.0, 0.96, 1)]
    rows = [row for row in study.gains_of_changes(two) if row["form"] == "AdamW"]
    assert [row["gain"] for row in rows] == pytest.approx([-0.1, -0.2, 0, 0])
    text = report.table(common.read_json(two.path))
    assert "AdamW at a: the best of 4 changes, beta2 0.99, gains +0.0000" in text


def test_a_warm_up_over_all_steps_is_no_change(two):
    two.plan["fixed"]["warmup_fraction"] = 0.5
    two.plan["changed"] = [["a", ["AdamW"], ["warmup_fraction"], [0.5, 2.0], [1]]]
    assert [changed for *_, changed, _ in study.changes(two)] == [{"warmup_fraction": 0.25}]


def test_the_search_goes_on_from_a_changed_setting(two):
    two.plan["changed"] = [["a", ["AdamW"], ["beta2", "lr"], [2.0], [1], {"beta2": 0.96}]]
    changed = [changed for *_, changed, _ in study.changes(two)]
    assert changed == [{"beta2": 0.92}, {"beta2": 0.96, "lr": 4.0}]


# --------------------------------------------------------------------------- replicate
def test_the_interval_is_students_and_welchs():
    """scipy.stats: t.ppf(0.975, 7); degrees of freedom of 0.01 with 8 and 0.02 with 3."""
    for error in (0.01, 0.016):  # floats make 6.999999999999998 degrees of freedom of 0.016
        assert study.half_interval((error, 8)) == pytest.approx(2.365 * error)
    freedom = (0.01**2 + 0.02**2) ** 2 / (0.01**4 / 7 + 0.02**4 / 2)
    assert int(freedom) == 3
    expected = 3.182 * math.hypot(0.01, 0.02)
    assert study.half_interval((0.01, 8), (0.02, 3)) == pytest.approx(expected)


@pytest.mark.parametrize("now, word", [(0.1, "agree"), (0.5, "do NOT agree")])
def test_replicate_runs_fresh_seeds_and_judges(two, tmp_path, monkeypatch, capsys, now, word):
    """The gain was 0.1 on two seeds, and is `now`, give or take 0.01."""
    made = []

    def fresh(held, settings):
        made.append((settings["form"], settings["lr"], settings["seed"]))
        noise = 0.01 * (settings["seed"] % 2)
        return {**SOURCE, "val_loss": 3.0 - (settings["form"] == "soft") * (now + noise)}

    monkeypatch.setattr(study, "ROOT", tmp_path)
    two.plan["recommended"] = "soft"
    two.train = fresh
    for run in two.runs:  # some spread, without which no difference is due to chance
        if run["settings"]["form"] == "soft":
            run["val_loss"] += 0.01 * run["settings"]["seed"]
    before = len(two.runs)
    assert study.replicate(two, "a") == (word == "agree")
    assert f"The two {word}" in capsys.readouterr().out
    assert made == [(name, 2.0, seed) for name in ("AdamW", "soft") for seed in study.FRESH_SEEDS]
    assert len(two.runs) == before and study.replicate(two, "a") == (word == "agree")
    assert len(made) == 16  # the second call has all runs


# --------------------------------------------------------------------------- the file
def test_what_was_made_is_kept_when_a_signal_comes(tmp_path):
    def stop_at_third(held, settings):
        if len(held.runs) == 2:
            raise KeyboardInterrupt
        return synthetic(held, settings)

    results = study.Study(tmp_path / "map.json", dict(PLAN), (), stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        study.run_all(results)
    assert len(json.loads(results.path.read_text())["runs"]) == 2


def call(monkeypatch, path, *more):
    monkeypatch.setattr(sys, "argv", ["study.py", str(path), *more])
    monkeypatch.setattr(study, "ROOT", path.parent)
    return study.main()


def test_runs_of_two_commits_are_marked_and_a_finished_study_makes_none(two, monkeypatch, capsys):
    monkeypatch.setattr(study, "draw", lambda *_: None)
    assert call(monkeypatch, two.path, "--summary") == 0
    assert "(commits differ)" not in capsys.readouterr().out
    for run in two.runs:
        if run["settings"]["form"] == "soft":
            run["commit"] = "def"
    two.runs.pop()
    two.plan["finished"] = "abc"
    two.save()
    assert call(monkeypatch, two.path) == 0
    text = capsys.readouterr().out
    assert text.count("(commits differ)") == 1 and "finished. To go on, take commit abc" in text
    assert len(study.Study.read(two.path).runs) == len(two.runs)


def test_two_processes_do_not_write_one_file(two, monkeypatch):
    with common.locked(two.path.parent / "runs" / "study" / "two"):
        with pytest.raises(common.BadInput, match="no other process uses"):
            call(monkeypatch, two.path, "--summary")


def test_a_place_without_judged_runs_is_refused(two):
    two.plan["recommended"] = "soft"
    two.plan["places"]["b"] = {**TWO["places"]["a"], "borrows": "a"}
    with pytest.raises(common.BadInput, match="--replicate: got b, allowed is a place where soft"):
        study.replicate(two, "b")


def test_an_unknown_place_is_refused(two, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        call(monkeypatch, two.path, "--replicate", "b")
    assert "PLACE: got b, allowed is one of" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        call(monkeypatch, two.path, "--replicate", "a")
    assert "has a recommended form" in capsys.readouterr().err


def test_a_vocabulary_that_is_not_there_is_said(two, monkeypatch, tmp_path):
    monkeypatch.setitem(study.TEXTS, "bpe-4096", {"data": str(tmp_path / "none")})
    two.plan["places"] = {"a": {**TWO["places"]["a"], "data": "bpe-4096"}}
    with pytest.raises(common.BadInput, match="python benchmarks/bpe.py"):
        study.config(two, {"place": "a", "form": "AdamW"}, tmp_path)


def test_a_diverged_run_is_kept_as_such(tmp_path):
    results = study.Study(tmp_path / "a.json", dict(TWO), (), lambda *_: {"val_loss": None})
    results.plan["plan"] = []
    assert results.loss({"place": "a", "form": "AdamW", "lr": 1.0, "seed": 0}) == math.inf
    assert json.loads(results.path.read_text())["runs"][0]["val_loss"] is None


def test_a_judged_run_that_diverged_ends_no_study(two):
    held = two.train

    def diverges_once(_, settings):
        run = held(_, settings)
        lost = settings["form"] == "soft" and settings["seed"] == 2
        return {**run, "val_loss": None if lost else run["val_loss"]}

    again = study.Study(two.path, two.plan, (), diverges_once)
    study.run_all(again)
    rows = {row["form"]: row for row in study.Study.read(two.path).plan["gains"]}
    assert rows["soft"]["gain"] == -math.inf and rows["soft"]["gain_stderr"] is None
    assert rows["soft, on rates"]["gain"] == pytest.approx(0.02)
    assert "-inf" in report.table(common.read_json(two.path), "a")


STUDIES = ("map", "baseline", "architectures", "schedule", "sharpness-nano")


@pytest.mark.parametrize("name", STUDIES)
def test_committed_results_are_what_the_summary_computes(name):
    held = study.Study.read(ROOT / "results" / f"{name}.json")
    computed = {"gains": study.gains(held), "changes": study.gains_of_changes(held)}
    for what, rows in computed.items():
        assert json.loads(json.dumps(rows)) == held.plan[what]


# --------------------------------------------------------------------------- what is shown
def test_tables_and_figures_of_a_part(results, tmp_path):
    """The first two places; the others are said to be missing."""
    few = [run for run in results.runs if run["settings"]["place"] in ("250x4", "500x4")]
    path = tmp_path / "map.json"
    study.Study(path, results.plan, few).save()
    found = common.read_json(path)
    text = report.table(found)
    assert "500x4: 500 steps of 4, bytes" in text and "better base" not in text
    assert "| SoftIRE on Muon |" in text and "| +0.030 ± 0.000 | ± 0.00" in text
    assert "not measured yet at 2000x64: AdamW; hard mask over AdamW" in text
    assert "not measured yet at 500x4" not in text
    mask = report.table(found, "IRE's mask on AdamW")
    assert mask.count("\n") == 3 and "| 250 steps of 4, bytes |" in mask
    assert report.table(found, "2000x64") == report.MISSING
    with pytest.raises(common.BadInput, match="got IRE, allowed is one of: AdamW; IRE's mask on"):
        report.table(found, "IRE")
    report.draw(found, tmp_path / "map.png")
    for name in ("map.png", "map-forms.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_base_with_one_rate_may_be_the_better_one():
    found = json.loads((ROOT / "results/baseline.json").read_text())
    row = next(row for row in found["gains"] if row["form"] == "AdamW") | {"better": "AdamW"}
    column = "gain on the better base"
    assert report.cells(row, found)[column] == "this is the better base"
    assert report.cells(row, {**found, "gains": [row]})[column] == ""  # there is no other


def test_a_curve_of_losses_over_the_learning_rate(two):
    for place in two.plan["places"].values():
        place |= {"model": "nano", "batch": 16}
    figure = report.the_rates({**two.plan, "gains": study.gains(two), "runs": two.runs})
    curve, dots, *_ = figure.axes[0].lines
    assert curve.get_label() == "AdamW" and list(curve.get_xdata()) == [1.0, 2.0, 4.0]
    assert list(curve.get_ydata()) == pytest.approx([3.1, 3.0, 3.2])
    assert list(dots.get_ydata()) == pytest.approx([3.01, 3.02])  # its seeds


def test_the_figure_of_gains_by_place():
    """A row for each place, a dot for each form that was tuned at two places or more."""
    found = json.loads((ROOT / "results/baseline.json").read_text())
    on_adamw, on_rates, *_ = report.the_gains(found).axes
    assert on_adamw.get_title(loc="right") == "on AdamW"
    assert on_rates.get_title(loc="right") == "on AdamW with own rates"
    assert on_adamw.get_yticklabels()[0].get_text() == "250 steps of 16, 4,096 tokens"
    tuned = ("AdamW, rates", "mask", "SoftIRE")
    rows = [row for row in found["gains"] if row["base"] == "AdamW" and row["form"] in tuned]
    dots = [bar[0].get_xdata()[0] for bar in on_adamw.containers]
    assert sorted(dots) == sorted(row["gain"] for row in rows)


def test_the_page_of_results_is_current():
    """Every table between two comments is what the command of the first comment prints."""
    page = (ROOT / "book/results.md").read_text()
    assert page == report.renewed(page), "renew it: python benchmarks/report.py book/results.md"
    assert len(report.MARKED.findall(page)) == page.count("<!-- end -->") > 9


def test_one_seed_has_no_error(results):
    few = [run for run in results.runs if run["settings"]["place"] == "250x4"]
    few = [run for run in few if run["settings"]["seed"] < 2]
    row = study.gains(study.Study(results.path, results.plan, few))[1]
    assert row["gain_stderr"] is None and "one seed" in report.gain_in_words(row)
    assert report.cells(row, PLAN)["with tuning"] == ""  # not ± 0.000


def test_nothing_is_held(tmp_path):
    study.Study(tmp_path / "map.json", dict(PLAN)).save()
    found = common.read_json(tmp_path / "map.json")
    assert found["gains"] == [] and "not measured yet at 250x4: AdamW" in report.table(found)


# --------------------------------------------------------------------------- runs
@pytest.fixture
def small(tmp_path, monkeypatch):
    """The map, whose place 250x4 has five steps and four sequences of a small model."""
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be " * 2000)
    monkeypatch.setitem(study.MODELS, "nano", SMALL)
    monkeypatch.setattr(study, "ROOT", tmp_path)
    plan = json.loads(json.dumps(PLAN))
    plan["places"]["250x4"] |= {"steps": 5, "data": str(text)}
    plan["fixed"] |= {"data_dir": str(tmp_path), "eval_sequences": 8}
    return study.Study(tmp_path / "map.json", plan)


OWN = {  # of a form that results/map.json does not have
    "rates": {"settings": {"multiples": {"vo": 2.0}}, "grid": {"head_lr": [4.0]}},
    "hidden": {"rule": "hard", "settings": {"kappa": 2.0, "gamma": 0.7, "only": "hidden"}},
    "frozen": {"rule": "hard", "settings": {"kappa": 2.0, "gamma": 0.7, "frozen": True}},
    "rare": {"rule": "rows", "settings": {"kappa": 2.0, "gamma": 0.7, "by": "rarest"}},
    "paper": {"rule": "paper", "settings": {"kappa": 2.0, "gamma": 0.7}},
}


@muon
@pytest.mark.parametrize("name", ["AdamW", "hard mask over Muon", *OWN])
def test_trains_a_run_and_records_how(small, tmp_path, name):
    for own, form in OWN.items():
        small.plan["forms"][own] = {**BASE, **form}
    settings = {"place": "250x4", "form": name, "lr": 1e-3, "warmup_fraction": 0.25, "seed": 1}
    settings |= {"head_lr": 4.0} if name == "rates" else {}
    run = study.recorded(study.train, small, settings)
    assert math.isfinite(run["val_loss"])
    base = study.recorded(study.train, small, {**settings, "form": "AdamW"})
    assert (run["val_loss"] == base["val_loss"]) == (name == "AdamW")
    assert {"cpu_seconds", "commit", "torch", "device", "threads", "data"} <= run.keys()
    c = study.config(small, settings, tmp_path)
    assert (c.steps, c.batch_size, c.warmup, c.lr, c.seed) == (5, 4, 1, 1e-3, 1)


def test_a_full_disk_is_said(small, monkeypatch, capsys):
    def full(*_):
        raise common.Halt("checkpoint.pt can't be written: No space left on device")

    monkeypatch.setattr(train_gpt, "train", full)
    small.path = small.path.with_name("full.json")  # no other process has this study
    monkeypatch.setattr(sys, "argv", ["study.py", str(small.path)])
    del small.plan["finished"]
    small.save()
    with pytest.raises(SystemExit, match="1"):
        runpy.run_path(study.__file__, run_name="__main__")
    assert "No space left on device" in capsys.readouterr().err


def test_what_is_flat_along_a_run(small):
    """For both curvatures by tensor, and a figure: the mean over layers of each kind."""
    point = {"lr": 0.00566, "warmup_fraction": 0.25}
    small.plan["grid"] = {name: [value] for name, value in point.items()}
    small.plan["places"]["250x4"] |= {"steps": 21}
    settings = {"place": "250x4", "form": "AdamW", "seed": 0, **point}
    small.index = {study.key(settings): {"val_loss": 1.0}}
    study.record_flat(small, "250x4")
    found = common.read_json(small.path.with_name("flat.json"))
    assert small.path.with_name("flat.png").read_bytes().startswith(b"\x89PNG")
    for name in ("squares", "fisher"):
        assert list(found[name]) == ["0", "10", "20"]
        for shares in found[name].values():
            assert len(shares) == 12 and {0 <= x <= 1 for x in shares.values()} == {True}
    shares = {Q: 0.5, Q.replace("0", "1"): 0.7, K: 0.1, V: 0.2, OUT: 0.3, UP: 0.4, HEAD: 0.9}
    shares |= {NORM: 0.0, "model.embed_tokens.weight": 1.0}
    assert report.by_kind(shares) == pytest.approx([1.0, 0.6, 0.1, 0.2, 0.3, 0.4, 0.0, 0.9])


# --------------------------------------------------------------------------- times and images
def test_times_take_turns_and_the_first_round_does_not_count():
    seen = []
    rows = {name: lambda name=name: seen.append(name) for name in "abc"}
    times = speed.interleaved(rows, 3)
    assert {name: len(x) for name, x in times.items()} == {"a": 3, "b": 3, "c": 3}
    rounds = [seen[i : i + 3] for i in range(0, 12, 3)]
    assert all(sorted(x) == list("abc") for x in rounds) and len(set(map(tuple, rounds))) > 1
    assert speed.of_base([2.0, 4.0, 3.0], [1.0, 1.0, 1.0]) == (3.0, [2.0, 4.0])


def test_a_flag_that_no_one_reads_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["speed.py", "step", "--round", "30"])
    with pytest.raises(SystemExit, match="2"):
        speed.main()
    assert "step has no --round 30" in capsys.readouterr().err


def test_the_loop_that_is_timed_is_the_one_that_trains(small, tmp_path):
    """Two calls of ten steps end with the weights of a run of twenty."""
    small.plan["places"]["250x4"]["steps"] = 20
    settings = {"place": "250x4", "form": "AdamW", "lr": 1e-3, "warmup_fraction": 0.25, "seed": 1}
    c = study.config(small, settings, tmp_path / "run")
    timed = speed.Training(dataclasses.replace(c))
    timed()
    timed()
    train_gpt.train(c)
    trained = common.read_checkpoint(tmp_path / "run")["model"]
    assert timed.job.step == 20
    for name, p in timed.job.model.named_parameters():
        assert torch.equal(p, trained[name]), name


def test_the_heat_map_has_each_cell_once(tmp_path, monkeypatch):
    """A second call finds nothing left to do."""
    names = ("test_acc", "train_loss", "trace")
    monkeypatch.setattr(cifar, "train", lambda c: dict.fromkeys(names, c.kappa))
    file = tmp_path / "map.json"
    args = {"what": "map", "file": file, "minutes": 9, "scratch": tmp_path, "data_dir": tmp_path}
    cifar.heat_map(argparse.Namespace(**args))
    found = common.read_json(file)
    cells = {study.key({**run["settings"], "seed": run["seed"]}) for run in found["runs"]}
    assert len(found["runs"]) == len(cells) == found["planned"] == 2 * 2 * (4 * 4 + 1)
    assert cifar.mean_of(found["runs"], "trace", 4.0, 0.8, "constant") == 4.0
    monkeypatch.setattr(cifar, "train", lambda c: pytest.fail("this run was made before"))
    cifar.heat_map(argparse.Namespace(**args))


def test_images_equal_trials_and_ire_at_its_bases_rate(tmp_path, monkeypatch):
    """The best rate is 0.2; IRE gains 1% with kappa 2, and less with others."""

    def synthetic(c):
        ire = c.optimizer.endswith("ire")
        value = 60 - abs(c.lr - 0.2) + ire * (1 - abs(c.kappa - 2)) + c.seed
        return {name: value for name in ("val_acc", *cifar.QUANTITIES)}

    monkeypatch.setattr(cifar, "train", synthetic)
    file = tmp_path / "quick.json"
    args = {"what": "quick", "file": file, "minutes": 9, "scratch": tmp_path, "data_dir": tmp_path}
    cifar.evidence(argparse.Namespace(**args))
    found = common.read_json(file)
    assert len(found["runs"]) == 4 * 5 + 4 * 2 and file.with_suffix(".png").exists()
    for name in ("sgd-ire", "sam-ire"):
        row = found["table"][name]
        assert row["settings"] == {"lr": 0.2, "ire_epoch": 2, "kappa": 2.0}
        assert row["less_base"]["test_acc"] == pytest.approx([1, 0])
