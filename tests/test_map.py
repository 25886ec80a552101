"""benchmarks/map.py: the forms' optimizers against naive ones, plan, search, judging, figure."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import forms  # noqa: E402
import map as study  # noqa: E402
import map_report  # noqa: E402
from speedup_optimizers import MuonAndAdamW  # noqa: E402

import train_gpt  # noqa: E402
from ire import IRE, SoftIRE  # noqa: E402

muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
SMALL = {"layers": 1, "width": 8, "heads": 2, "ffn": 12, "context": 8, "device": "cpu"}
Q, K, V, OUT = (f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkvo")
UP = "model.layers.0.mlp.up_proj.weight"
HEAD, NORM = "lm_head.weight", "model.norm.weight"


def small_run(build, steps=7):
    """A small model after some steps of build(model, c), and its optimizer."""
    c = train_gpt.complete(train_gpt.Config(**SMALL, lr=0.01, optimizer="adamw", beta2=0.98))
    torch.manual_seed(0)
    model = train_gpt.Llama(c, 16)
    opt = build(model, c)
    for i in range(steps):
        for group in opt.param_groups:
            group["lr"] = 0.01 / (i + 1)
        tokens = torch.randint(12, (2, 8), generator=torch.Generator().manual_seed(i))
        model(tokens, tokens.roll(-1, 1)).backward()
        opt.step()
        opt.zero_grad()
    return model, opt


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def over(base, rule, settings, steps=7):
    """build: a form over "adamw" or "muon"."""

    def build(model, c):
        inner = (
            MuonAndAdamW(model, c, 2.0) if base == "muon" else train_gpt.make_optimizer(model, c)
        )
        return forms.stretched(inner, model, rule, settings, beta=0.98, steps=steps)

    return build


@pytest.fixture
def curvature():
    generator = torch.Generator().manual_seed(0)
    shapes = {Q: (3, 4), K: (3, 4), V: (3, 4), OUT: (4, 3), UP: (5, 4), HEAD: (6, 4), NORM: (4,)}
    v = {name: torch.rand(shape, generator=generator) ** 4 for name, shape in shapes.items()}
    v[HEAD][:2] = 0  # tokens that did not occur
    return v


# --------------------------------------------------------------------------- rules
def test_the_hard_rule_is_ire():
    """Over AdamW, whose second moment is the running mean that the rule keeps."""

    def ire(model, c):
        base = train_gpt.make_optimizer(model, c)
        return IRE(base, kappa=2.0, gamma=0.7, curvature="second_moment", interval=10)

    steps = 25
    ours, _ = small_run(over("adamw", "hard", {"kappa": 2.0, "gamma": 0.7}, steps), steps)
    theirs, _ = small_run(ire, steps)
    plain, _ = small_run(over("adamw", "hard", {"kappa": 0.0, "gamma": 0.7}, steps), steps)
    for name, p in weights(ours).items():
        torch.testing.assert_close(p, weights(theirs)[name], atol=1e-6, rtol=1e-5)
    assert any((weights(plain)[name] - p).abs().max() > 1e-3 for name, p in weights(ours).items())


@muon
def test_the_soft_rule_is_soft_ire():
    def soft_ire(model, c):
        base = MuonAndAdamW(model, c, study.RATIO)
        for group in base.adamw.param_groups:
            group["kappa"] = 0.0
        return SoftIRE(base, alpha=0.3, beta=c.beta2)

    steps = 15  # later a rounding meets Muon's bfloat16
    ours, _ = small_run(over("muon", "soft", {"alpha": 0.3}, steps), steps)
    theirs, _ = small_run(soft_ire, steps)
    plain, _ = small_run(over("muon", "soft", {"alpha": 0.0}, steps), steps)
    for name, p in weights(ours).items():
        torch.testing.assert_close(p, weights(theirs)[name], atol=1e-6, rtol=1e-5)
    assert any((weights(plain)[name] - p).abs().max() > 1e-3 for name, p in weights(ours).items())


def test_a_form_is_run_first_where_its_searches_elsewhere_start():
    """Else the search would start elsewhere when it is looked up than when it was made."""
    lines = [(place, name) for place, names in study.PLAN for name in names]
    for i, (place, name) in enumerate(lines):
        assert (study.PLACES[place].near, name) not in lines[i:]


def naive_flat(values, gamma, live):
    ranked = sorted(x for x in values if x > 0 or not live)
    count = math.floor(round(gamma * len(ranked), 9))
    return [x <= ranked[count - 1] and (x > 0 or not live) for x in values]


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("ranked", ["together", "embeddings apart", "by tensor"])
def test_hard_against_sorting(curvature, ranked, live):
    found = forms.hard(curvature, None, kappa=2.0, gamma=0.6, ranked=ranked, live=live)
    groups = {
        "together": [list(curvature)],
        "embeddings apart": [[n for n in curvature if n != HEAD], [HEAD]],
        "by tensor": [[name] for name in curvature],
    }
    for names in groups[ranked]:
        values = [x for name in names for x in curvature[name].flatten().tolist()]
        factors = [x for name in names for x in found[name].flatten().tolist()]
        assert factors == [3.0 if flat else 1.0 for flat in naive_flat(values, 0.6, live)]
    assert live == bool((found[HEAD][:2] == 1).all())


def test_random_masks_have_the_size_and_come_from_the_generator(curvature):
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        factors = forms.hard(curvature, generator, kappa=1.0, gamma=0.6, random=True)
        return forms.flatten(factors.values())

    flat = forms.flatten(forms.hard(curvature, None, kappa=1.0, gamma=0.6).values())
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    assert draw(0).sum() == flat.sum() and not torch.equal(draw(0), flat)


def naive_soft(values, alpha, limit):
    reference = sorted(values)[(len(values) - 1) // 2]
    raw = [min(max((x / reference) ** -alpha, 1 / limit), limit) for x in values]
    return [x * len(raw) / sum(raw) for x in raw]


@pytest.mark.parametrize("alpha", [0.3, -0.3, 2.0])
def test_soft_against_a_loop(curvature, alpha):
    hidden = [Q, K, V, OUT, UP]
    factors = forms.soft(curvature, None, alpha=alpha)
    assert list(factors) == hidden
    values = [x for name in hidden for x in curvature[name].flatten().tolist()]
    expected = torch.tensor(naive_soft(values, alpha, 4.0))
    torch.testing.assert_close(forms.flatten(factors.values()), expected)
    inner = forms.soft(curvature, None, alpha=alpha, varies="within tensors")
    for name in hidden:
        expected = torch.tensor(naive_soft(curvature[name].flatten().tolist(), alpha, 4.0))
        torch.testing.assert_close(inner[name].flatten(), expected)


def test_soft_between_tensors_is_one_number_a_tensor(curvature):
    factors = forms.soft(curvature, None, alpha=0.3, varies="between tensors")
    means = {name: float(curvature[name].mean()) for name in factors}
    order = sorted(factors, key=means.get)
    numbers = [factors[name].unique() for name in order]
    assert all(len(x) == 1 for x in numbers) and numbers == sorted(numbers, reverse=True)
    ratio = float(factors[Q][0, 0] / factors[UP][0, 0])
    assert ratio == pytest.approx((means[Q] / means[UP]) ** -0.3)
    assert float(forms.flatten(factors.values()).mean()) == pytest.approx(1)


def test_soft_shuffled_has_the_same_factors_elsewhere(curvature):
    generator = torch.Generator().manual_seed(0)
    there = forms.flatten(forms.soft(curvature, generator, alpha=0.3, shuffle=True).values())
    here = forms.flatten(forms.soft(curvature, None, alpha=0.3).values())
    assert torch.equal(there.sort().values, here.sort().values) and not torch.equal(there, here)


def test_multipliers_by_hand(curvature):
    factors = forms.by_hand(curvature, None, qk=3.0, vo=0.5, ffn=1.0)
    assert factors.keys() == {Q, K, V, OUT, UP}
    ratios = {name: float(x[0, 0] / factors[UP][0, 0]) for name, x in factors.items()}
    assert ratios == {Q: 3, K: 3, V: 0.5, OUT: 0.5, UP: 1}
    assert float(forms.flatten(factors.values()).mean()) == pytest.approx(1)


# --------------------------------------------------------------------------- optimizers
def test_a_step_is_the_bases_times_the_factor():
    def build(model, c):
        def rule(curvature, generator):
            return {UP: torch.full_like(curvature[UP], 2.5)}

        base = train_gpt.make_optimizer(model, c)
        return forms.Stretched(base, model, rule, {}, beta=0.98)

    before = weights(small_run(build, 0)[0])
    after = weights(small_run(build, 1)[0])
    base = weights(small_run(train_gpt.make_optimizer, 1)[0])
    for name in before:
        if name == UP:
            expected = before[name] + 2.5 * (base[name] - before[name])
            torch.testing.assert_close(after[name], expected)
        else:
            assert torch.equal(after[name], base[name]), name


@muon
@pytest.mark.parametrize("when", ["first fifth", "after first fifth"])
def test_a_fifth_of_the_run(when):
    """Of 10 steps; outside its part of the run the form is its base, to the bit."""
    form = over("muon", "soft", {"alpha": 0.3, "when": when}, 10)
    always = over("muon", "soft", {"alpha": 0.3}, 10)

    def base(model, c):
        return MuonAndAdamW(model, c, 2.0)

    starts_as = {"first fifth": always, "after first fifth": base}[when]
    for steps in (2, 3):
        a, b = (weights(small_run(build, steps)[0]) for build in (form, starts_as))
        same = all(torch.equal(a[name], b[name]) for name in a)
        assert same == (steps <= 2)


@muon
def test_lite_against_a_decomposition():
    """One step: along the momentum's top tenth of right singular directions, one of 8, it is the
    base's, elsewhere twice that; on the rest 4 times where a tensor's curvature is among its 90%
    smallest."""
    before = weights(small_run(over("muon", "lite", {"chi": 2.0}), 0)[0])
    model, opt = small_run(over("muon", "lite", {"chi": 2.0}), 1)
    base = weights(small_run(lambda model, c: MuonAndAdamW(model, c, 2.0), 1)[0])
    after = weights(model)
    for name, p in model.named_parameters():
        base_step, step = base[name] - before[name], after[name] - before[name]
        if forms.is_hidden(name, p):
            momentum = opt.state[p]["momentum_buffer"]
            _, vectors = torch.linalg.eigh(momentum.T @ momentum)  # ascending
            scale = torch.full((p.shape[1],), 2.0)
            scale[-1] = 1.0
            expected = base_step @ vectors @ scale.diag() @ vectors.T
        else:
            v = opt.curvature[name].flatten().tolist()
            flat = torch.tensor(naive_flat(v, 0.9, False)).view_as(p)
            expected = base_step * (1 + 3 * flat)
        torch.testing.assert_close(step, expected, atol=2e-6, rtol=1e-3)


@muon
def test_normuon_against_rows():
    """Two steps of a matrix; weight decay is as it was."""
    updates, decays = [], []

    class Recorded(MuonAndAdamW):
        def step(self, closure=None):
            old = {p: p.detach().clone() for group in self.param_groups for p in group["params"]}
            super().step()
            group = self.muon.param_groups[0]
            p = next(p for p in group["params"] if p.shape == (12, 8))
            decays.append(-group["lr"] * group["weight_decay"] * old[p])
            updates.append((p.detach() - old[p] - decays[-1]) / group["lr"])

    def build(model, c):
        return forms.stretched(
            Recorded(model, c, 2.0), model, "normuon", {"beta": 0.95}, beta=0.98, steps=2
        )

    name = "model.layers.0.mlp.gate_proj.weight"
    states = [weights(small_run(build, steps)[0])[name] for steps in (0, 1, 2)]
    rows = torch.zeros(12)
    for i in range(2):
        update, decay = updates[-2:][i], decays[-2:][i]
        rows = 0.95 * rows + 0.05 * update.square().mean(1)
        expected = update / rows.sqrt()[:, None]
        expected = expected * update.norm() / expected.norm()
        found = (states[i + 1] - states[i] - decay) / (2 * 0.01 / (i + 1))
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
        assert (expected - update).abs().max() > 0.01


# --------------------------------------------------------------------------- the plan
def test_the_plan_can_be_followed():
    seen = []
    for place, names in study.PLAN:
        near = study.PLACES[place].near
        assert near is None or near in seen
        seen.append(place)
        for name in names:
            form = study.FORMS[name]
            assert form.name == name and form.differs
            assert form.expected or name in study.BASES.values()
            assert form.borrows is None or study.FORMS[form.borrows].borrows is None
    assert set(seen) == study.PLACES.keys()
    assert {name for _, names in study.PLAN for name in names} == study.FORMS.keys()


GAINS = {"hard mask over AdamW": 0.01, "soft factor over Muon": 0.03}


def synthetic(settings):
    """A valley in lr, falling with the logarithm of the steps; some forms gain."""
    place = study.PLACES[settings["place"]]
    loss = 2 - 0.2 * math.log(place.steps / 500) + 0.01 * settings["seed"]
    loss += 0.01 * math.log(settings["lr"] / 4e-3) ** 2
    loss -= GAINS.get(settings["form"], 0)
    return {"val_loss": loss, "commit": "abc"}


@pytest.fixture
def results(tmp_path):
    """The whole plan on synthetic losses, without a file until it is done."""
    results = study.Results(tmp_path / "map.json", synthetic)
    results.save = dict
    study.run_all(results)
    del results.save
    results.save()
    return results


def test_equal_trials_fresh_seeds_and_known_gains(results):
    rows = {(row["place"], row["form"]): row for row in study.gains(results)}
    assert rows.keys() == {(place, name) for place, names in study.PLAN for name in names}
    for (place, name), row in rows.items():
        assert row["seeds"] == list(study.SEEDS) and 0 not in row["seeds"]
        assert row["trials"] <= study.PLACES[place].trials
        assert row["gain"] == pytest.approx(GAINS.get(name, 0), abs=1e-9)
        assert row["gain_stderr"] == pytest.approx(0, abs=1e-9)
        if row["steps_saved"] is not None:  # exact on a line over the logarithm of the length
            expected = 1 - math.exp(-GAINS.get(name, 0) / 0.2)
            assert row["steps_saved"] == pytest.approx(expected)
    assert rows["250x16", "AdamW"]["trials"] == rows["250x16", "NorMuon"]["trials"]
    assert rows["tiny 500x16", "AdamW"]["steps_saved"] is None
    assert rows["500x64", "AdamW"]["steps_saved"] == pytest.approx(0)


def test_a_search_starts_at_the_neighbouring_place(results):
    first = {}
    for run in results.runs:
        first.setdefault((run["settings"]["place"], run["settings"]["form"]), run["settings"])
    best, _ = study.tuned(results, "250x4", "Muon")
    assert first["250x16", "Muon"]["lr"] == best["lr"] == 4e-3
    assert first["250x4", "Muon"]["lr"] == study.START["lr"]


def test_a_run_is_never_repeated(results):
    made = []
    again = study.Results(results.path, lambda s: made.append(s) or synthetic(s))
    again.runs = again.runs[:-5]
    again.index = {again.key(run["settings"]): run for run in again.runs}
    again.save = dict
    study.run_all(again)
    assert made == [run["settings"] for run in results.runs[-5:]]
    study.run_all(again)
    assert len(made) == 5


def test_what_was_made_is_kept_when_a_signal_comes(tmp_path):
    def stop_at_third(settings):
        if len(results.runs) == 2:
            raise train_gpt.Halt("stopped")
        return synthetic(settings)

    results = study.Results(tmp_path / "map.json", stop_at_third)
    with pytest.raises(train_gpt.Halt):
        study.run_all(results)
    assert len(json.loads(results.path.read_text())["runs"]) == 2


def test_runs_of_another_commit_are_not_mixed(results, monkeypatch):
    monkeypatch.setattr(study, "environment", lambda device: {"commit": "def"})
    with pytest.raises(SystemExit, match="holds runs of commit abc, and this is def"):
        study.check_commit(results)
    monkeypatch.setattr(study, "environment", lambda device: {"commit": "abc"})
    study.check_commit(results)


# --------------------------------------------------------------------------- what is shown
def test_table_and_figure_of_a_part(results):
    """The first two places; the others are said to be missing."""
    few = [run for run in results.runs if run["settings"]["place"] in ("250x4", "500x4")]
    results.runs = few
    results.index = {results.key(run["settings"]): run for run in few}
    results.save()
    report = json.loads(results.path.read_text())
    text = map_report.table(report)
    assert "| 500x4 | soft factor over Muon | " in text and "+0.0300 ± 0.0000 | 14% ± 0%" in text
    assert "not measured yet at 2000x64: AdamW; hard mask over AdamW" in text
    assert "not measured yet at 500x4" not in text
    map_report.draw(report, results.path.with_suffix(".png"))
    assert results.path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_one_seed_has_no_error(results):
    place = [run for run in results.runs if run["settings"]["place"] == "250x4"]
    results.runs = [run for run in place if run["settings"]["seed"] < 2]
    results.index = {results.key(run["settings"]): run for run in results.runs}
    row = study.gains(results)[1]
    assert row["gain_stderr"] is None and "one seed" in map_report.gain_in_words(row)


def test_nothing_is_held(tmp_path):
    results = study.Results(tmp_path / "map.json")
    results.save()
    report = json.loads(results.path.read_text())
    assert report["gains"] == [] and "not measured yet at 250x4: AdamW" in map_report.table(report)
    map_report.draw(report, tmp_path / "map.png")
    assert (tmp_path / "map.png").exists() and not (tmp_path / "map-forms.png").exists()


def test_figure_of_the_other_forms_and_the_edge_of_the_grid(results, tmp_path):
    report = results.summary()
    map_report.draw(report, tmp_path / "map.png")
    assert (tmp_path / "map-forms.png").read_bytes().startswith(b"\x89PNG")
    row = {**report["gains"][0], "warmup_fraction": 0.02, "at_edge": ["warmup_fraction"]}
    assert report["gains"][0]["at_edge"] == []
    assert "| 0.004 | 0.02 (edge) |" in map_report.table({**report, "gains": [row]})


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A place of five steps and four sequences of a small model."""
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be " * 2000)
    monkeypatch.setitem(study.MODELS, "nano", SMALL)
    monkeypatch.setitem(study.PLACES, "250x4", study.Place(5, 4, data=str(text)))
    fast = {"data_dir": str(tmp_path), "eval_sequences": 8}
    monkeypatch.setattr(study, "FIXED", {**study.FIXED, **fast})
    monkeypatch.setattr(study, "ROOT", tmp_path)


@muon
def test_times_take_turns_and_stay_in_the_file(small, tmp_path):
    results = study.Results(tmp_path / "map.json")
    results.times["250x4"] = study.time_forms("250x4", rounds=2)
    results.save()
    forms = study.Results(tmp_path / "map.json").times["250x4"]["forms"]
    assert forms.keys() == study.FORMS.keys()
    assert forms["AdamW"]["of_base"] == forms["Muon"]["of_base"] == 1
    assert all(row["ms_a_step"] > 0 for row in forms.values())


@muon
@pytest.mark.parametrize("name", ["AdamW", "hard mask over Muon", "multipliers by hand"])
def test_trains_a_run_and_records_how(small, tmp_path, name):
    settings = {"place": "250x4", "form": name, "lr": 1e-3, "warmup_fraction": 0.25, "seed": 1}
    settings |= {setting: study.FORMS[name].settings[setting] for setting in study.FORMS[name].grid}
    run = study.train(settings)
    assert math.isfinite(run["val_loss"])
    assert {"cpu_seconds", "commit", "torch", "device", "threads", "data"} <= run.keys()
    c = study.config(settings, tmp_path)
    assert (c.steps, c.batch_size, c.warmup, c.lr, c.seed) == (5, 4, 1, 1e-3, 1)


def test_a_diverged_run_is_kept_as_such(tmp_path):
    results = study.Results(tmp_path / "map.json", lambda _: {"val_loss": None, "commit": "abc"})
    assert results.loss({"place": "250x4", "form": "AdamW", "lr": 1.0, "seed": 0}) == math.inf
    assert json.loads(results.path.read_text())["runs"][0]["val_loss"] is None


@pytest.mark.skipif(not study.RESULTS.exists(), reason="no results yet")
def test_committed_results_are_of_one_commit_and_what_the_summary_computes():
    kept = json.loads(study.RESULTS.read_text())
    results = study.Results(study.RESULTS)
    assert len(results.commits()) == 1
    report = json.loads(json.dumps(results.summary()))
    assert {name: kept[name] for name in report} == report
