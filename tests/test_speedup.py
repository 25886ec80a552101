"""benchmarks/speedup.py: search, plan and trials, the ablations' optimizers, summary, file."""

import dataclasses
import fcntl
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import speedup  # noqa: E402
from speedup_optimizers import shuffled  # noqa: E402
from speedup_report import table  # noqa: E402
from study import crossing, search  # noqa: E402

import train_gpt  # noqa: E402
from ire import IRE  # noqa: E402

IRE_GAIN = 0.03


def synthetic(run, model):
    """A valley in the logarithm of each setting, falling with the steps; IRE is IRE_GAIN better."""
    ire = run["optimizer"] == "admire" and run["ablation"] is None
    loss = 2 - 0.2 * math.log(run["steps"] / 500) + 0.01 * run["seed"] - IRE_GAIN * ire
    for name, best in dict(
        lr=4e-3, warmup_fraction=0.35, beta2=0.98, kappa=1, gamma=0.5, ratio=4
    ).items():
        loss += 0.01 * math.log(run[name] / best) ** 2 if run[name] else 0
    return {"val_loss": loss, "diverged": False, "seconds": 1.0}


class Count:
    """Runs stages on synthetic losses in a folder; count.runs is what was trained, in order."""

    def __init__(self, folder, finished=None):
        self.path, self.runs = folder / "results" / "speedup-tiny.json", []
        shutil.copytree(
            finished.path.parent, self.path.parent
        ) if finished else self.path.parent.mkdir()
        shutil.copy(ROOT / "results" / "train-cpu.json", self.path.parent)

    def run(self, settings, model):
        self.runs.append(settings)
        return synthetic(settings, model)

    def finish(self, *stages):
        with pytest.MonkeyPatch.context() as m:
            m.setattr(speedup, "ROOT", self.path.parents[1])
            m.setattr(speedup, "train", self.run)
            m.setattr(sys, "argv", ["speedup.py", "--stages", *(stages or speedup.STAGES)])
            speedup.main()
        return speedup.Results("tiny", self.path, self.run)


@pytest.fixture
def count(tmp_path):
    return Count(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """All stages, and their summary."""
    finished = Count(tmp_path_factory.mktemp("finished"))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(speedup.Results, "save", lambda results: None)
        m.setattr(speedup, "draw", lambda *_: None)
        done = finished.finish()
    done.runs = [{**r, "stage": "", **synthetic(r, {})} for r in finished.runs]
    done.index = {done.key(speedup.settings_of(r)): r for r in done.runs}
    done.save()
    finished.report = json.loads(finished.path.read_text())
    return finished


# --------------------------------------------------------------------------- search and plan
def test_search_finds_the_best_and_uses_every_trial():
    grid = {"x": tuple(range(-9, 10)), "y": tuple(range(-9, 10))}

    def bowl(p):
        x, y = p["x"] - 4, p["y"] + 3
        return x**2 + y**2 + x * y

    best, value, trials = search({"x": 0, "y": 0}, grid, bowl, 40)
    assert (best, value) == ({"x": 4, "y": -3}, 0) and trials <= 40
    assert search({"x": 0, "y": 0}, grid, bowl, 7)[2] == 7


def test_search_leaves_a_point_that_is_best_along_each_axis():
    grid = {"x": (0, 1, 2), "y": (0, 1, 2)}
    best, *_ = search(
        {"x": 1, "y": 1}, grid, lambda p: {(1, 1): 1, (2, 2): 0}.get((p["x"], p["y"]), 2), 9
    )
    assert best == {"x": 2, "y": 2}


def test_search_does_not_wander_over_a_plateau():
    assert search({"x": 0}, {"x": (0, 1, 2)}, lambda p: 1.0, 9) == ({"x": 0}, 1.0, 2)


def test_search_survives_divergence():
    best, value, _ = search(
        {"x": 0}, {"x": (0, 1, 2)}, lambda p: math.inf if p["x"] == 1 else 1.0, 3
    )
    assert best == {"x": 0} and value == 1


def test_plan_is_deterministic_and_skips_what_is_held(finished, tmp_path):
    assert len({json.dumps(r) for r in finished.runs}) == len(finished.runs)
    again = Count(tmp_path, finished)
    again.path.write_text(json.dumps({**finished.report, "runs": finished.report["runs"][:-9]}))
    again.finish()
    assert again.runs == finished.runs[-9:]
    again.finish()
    assert len(again.runs) == 9


def test_as_many_trials_for_each_and_the_best_is_inside(finished):
    trials = finished.report["trials"]
    assert {trials[o] for o in speedup.SEARCHES.keys() - {"adamw more"}} == {speedup.TRIALS}
    assert speedup.TRIALS < trials["adamw more"] <= 2 * speedup.TRIALS
    assert trials["adamw, long"] == trials["admire, long"] == speedup.LONG_TRIALS
    for optimizer in ("adamw", "admire"):
        tried = {
            r["lr"]
            for r in finished.runs
            if r["optimizer"] == optimizer and r["seed"] == 0 and r["steps"] == 500
        }
        assert min(tried) < finished.report["best"][optimizer]["lr"] < max(tried)


def test_the_judging_seeds_took_no_part_in_the_tuning(finished):
    compared = finished.report["compared"]
    assert compared.keys() == {entry.label for entry in speedup.PLAN if entry.label}
    assert all(0 not in row["seeds"] and len(row["seeds"]) >= 3 for row in compared.values())
    assert compared["AdamW"]["seeds"] == compared["AdmIRE"]["seeds"] == [1, 2, 3, 4, 5]


# --------------------------------------------------------------------------- speed-up
def test_crossing_is_exact_on_a_line_over_log_length():
    curve = {length: 3 - 0.5 * math.log(length) for length in (0.8, 1.0, 1.2, 1.4, 2.0)}
    for length in (0.81, 1.0, 1.13, 1.99):
        assert crossing(curve, 3 - 0.5 * math.log(length)) == (pytest.approx(length), False)
    for length in (0.7, 2.3):
        assert crossing(curve, 3 - 0.5 * math.log(length)) == (pytest.approx(length), True)


def test_a_known_speed_up_comes_back(finished):
    report = finished.report
    settings = {k: v for k, v in report["best"]["adamw"].items() if k in speedup.SETTINGS}
    admire = {k: v for k, v in report["best"]["admire"].items() if k in speedup.SETTINGS}
    gap = (
        synthetic(blank(settings), {})["val_loss"]
        - synthetic(blank({**admire, "optimizer": "admire"}), {})["val_loss"]
    )
    assert report["speedup"]["steps"] == pytest.approx(math.exp(gap / 0.2), rel=1e-3)
    assert report["speedup"]["steps_stderr"] == pytest.approx(0, abs=1e-9)
    assert 1 < report["speedup"]["wall"] < report["speedup"]["steps"]
    assert (
        report["compared"]["random mask"]["minus_adamw"]
        > report["compared"]["AdmIRE"]["minus_adamw"]
    )


def blank(settings):
    return {
        **dict.fromkeys(speedup.SETTINGS),
        "optimizer": "adamw",
        "seed": 1,
        "steps": 500,
        **settings,
    }


@pytest.mark.parametrize("stages", [(), ("tuning",), ("tuning", "finalists")])
def test_what_is_not_measured_yet_is_null_and_says_so(count, stages):
    report = speedup.summarise(
        count.finish(*stages) if stages else speedup.Results("tiny", count.path)
    )
    assert report["speedup"]["steps"] is None and "not measured yet" in report["speedup"]["note"]
    assert "not measured yet" in table(report)


def test_figure_is_drawn(count):
    count.finish("tuning", "finalists", "schedule")
    assert count.path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


# --------------------------------------------------------------------------- the optimizers
SMALL = {"layers": 1, "width": 16, "heads": 2, "ffn": 16, "context": 8, "device": "cpu"}


def one_step(build, c):
    """The optimizer that build(model, c) gives a small model, after one probe and one step; the
    weights before and after, and the mask, flat."""
    torch.manual_seed(0)
    model = train_gpt.Llama(c, 32)
    opt = build(model, c)
    tokens = torch.randint(32, (4, 8))
    before = flat(model.parameters())
    if getattr(opt, "probe_due", False):
        with opt.probe(model):
            model(tokens).square().sum().backward()
    model(tokens).logsumexp(-1).sum().backward()
    opt.step()
    nothing = torch.tensor(False)
    masks = getattr(opt, "masks", {})
    mask = flat(masks.get(p, nothing.expand_as(p)) for p in model.parameters())
    return opt, before, flat(model.parameters()), mask


def flat(tensors):
    return torch.cat([x.detach().flatten() for x in tensors])


@pytest.fixture
def make():
    """make(ablation, **settings): its optimizer over a small model after one probe and one step,
    the weights before, those after, those after AdamW's step, its mask and the one of AdmIRE."""

    def once(name, optimizer="admire", **changes):
        settings = {
            "batch_size": 4,
            "steps": 10,
            "warmup": 0,
            "kappa": 2.0,
            "gamma": 0.6,
            "lr": 0.01,
        }
        c = train_gpt.complete(train_gpt.Config(**SMALL, **settings))
        c = dataclasses.replace(c, **changes)
        run = {**dict.fromkeys(speedup.SETTINGS), "ratio": 2.0, "optimizer": optimizer}
        run["ablation"] = name
        opt, before, after, mask = one_step(speedup.builder(run), c)
        _, _, adamw, _ = one_step(speedup.builder({**run, "optimizer": "adamw"}), c)
        smooth = {**run, "optimizer": "admire", "ablation": "smooth"}
        _, _, _, fisher = one_step(speedup.builder(smooth), c)
        return opt, before, after, adamw, mask, fisher

    return once


@pytest.mark.parametrize("name", ["random", "shuffled", "inverted", "sharpest"])
def test_masks_of_the_ablations(make, name):
    opt, before, after, adamw, mask, fisher = make(name)
    assert isinstance(opt, IRE) and 0 < fisher.sum() < len(fisher) and (mask != fisher).any()
    if name == "inverted":
        assert torch.equal(mask, ~fisher)
    else:
        ties = len(fisher) // 10 if name == "sharpest" else 0  # those at 0 are all flat
        assert abs(int(mask.sum()) - int(fisher.sum())) <= ties
    torch.testing.assert_close(after, adamw + 2 * mask * (adamw - before), atol=1e-6, rtol=1e-5)


def test_shuffled_keeps_each_tensors_share_and_random_does_not(make):
    counts = {}
    for name in ("shuffled", "random", "smooth"):
        opt, *_ = make(name)
        counts[name] = [
            int(opt.masks[p].sum()) for group in opt.param_groups for p in group["params"]
        ]
    assert counts["shuffled"] == counts["smooth"] != counts["random"]


def test_random_mask_depends_on_seed_and_step_alone():
    mask = torch.arange(1000) < 600

    def draw(seed, step):
        torch.manual_seed(seed)
        return shuffled(mask, step)

    assert torch.equal(draw(0, 10), draw(0, 10)) and draw(0, 10).sum() == 600
    assert not torch.equal(draw(0, 10), draw(0, 20)) and not torch.equal(draw(0, 10), draw(1, 10))


@pytest.mark.parametrize("name, factor", [("jump", 1 + 2 * 0.6), ("all", 3)])
def test_jump_is_adamw_before_and_a_larger_lr_from_then_on(make, name, factor):
    _, before, after, adamw, *_ = make(name, ire_warmup=1)
    assert torch.equal(after, adamw)
    _, before, after, adamw, *_ = make(name, ire_warmup=0)
    torch.testing.assert_close(after - before, factor * (adamw - before), atol=1e-6, rtol=1e-4)


def test_smooth_rises_to_kappa(make):
    opt, *_ = make("smooth", steps=20)
    seen = []
    for group in opt.param_groups:
        group["ire_step"] = 0
    for _ in range(6):
        opt.step()
        seen.append(opt.param_groups[0]["kappa"])
    assert seen == [0.5, 1, 1.5, 2, 2, 2]


def test_decay_is_not_amplified(make):
    """On flat coordinates: kappa times the step less its decay, on top of AdamW's."""
    _, before, after, adamw, mask, _ = make("decay", weight_decay=0.5)
    _, _, with_decay, _, same, _ = make("smooth", weight_decay=0.5, steps=5)
    assert torch.equal(mask, same)
    difference = after - with_decay
    model = train_gpt.Llama(train_gpt.complete(train_gpt.Config(**SMALL)), 32)
    decayed = flat(torch.full_like(p, float(p.dim() >= 2)) for p in model.parameters())
    torch.testing.assert_close(
        difference, 2 * 0.01 * 0.5 * mask * decayed * before, atol=1e-6, rtol=1e-4
    )


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_moves_hidden_matrices_and_adamw_the_rest(make):
    opt, before, after, adamw, *_ = make(None, "muon")
    same = after == adamw
    sizes = [p.numel() for p in opt.muon.param_groups[0]["params"]]
    assert sum(sizes) == 4 * 16 * 16 + 3 * 16 * 16 and same.sum() == len(same) - sum(sizes)
    assert opt.state_dict()["state"] and {g["lr"] for g in opt.param_groups} == {0.01, 0.02}
    wrapped, *_ = make(None, "muon-ire")
    assert wrapped.base.muon.state is wrapped.state


# --------------------------------------------------------------------------- the file
def test_an_interrupted_write_leaves_the_old_file(count, monkeypatch):
    results, files = count.finish("tuning"), set(count.path.parent.iterdir())
    old = count.path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        results.loss({**results.runs[0], "seed": 99})
    assert count.path.read_bytes() == old and set(count.path.parent.iterdir()) == files


def test_two_processes_do_not_write_one_file(count):
    count.finish("tuning")
    with open(count.path.parents[1] / "runs" / "speedup" / "tiny.lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match="another process"):
            count.finish("finalists")


def test_a_diverged_run_is_kept_as_such(tmp_path, monkeypatch):
    monkeypatch.setattr(
        train_gpt, "train", lambda *_: (_ for _ in ()).throw(train_gpt.Diverged("inf"))
    )
    (tmp_path / "text.txt").write_text("to be or not to be " * 2000)
    results = speedup.Results(
        "tiny",
        tmp_path / "a.json",
        speedup.train,
        data=str(tmp_path / "text.txt"),
        data_dir=str(tmp_path),
    )
    assert (
        results.loss(blank(dict(lr=1.0, warmup_fraction=0.5, beta2=0.95, weight_decay=0.1)))
        == math.inf
    )
    run = json.loads((tmp_path / "a.json").read_text())["runs"][0]
    assert run["val_loss"] is None and run["diverged"] and run["warmup"] == 250


def test_trains_a_run_and_records_how(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be " * 2000)
    model = dict(
        layers=1,
        width=16,
        heads=2,
        ffn=16,
        context=16,
        batch_size=4,
        data=str(text),
        data_dir=str(tmp_path),
        device="cpu",
    )
    settings = dict(
        lr=1e-3,
        warmup_fraction=0.34,
        beta2=0.95,
        weight_decay=0.1,
        steps=3,
        kappa=2.0,
        gamma=0.6,
        interval=1,
        curvature="fisher",
    )
    losses = {}
    for name in (None, "random", "jump", "quarter"):
        run = speedup.train(blank({**settings, "optimizer": "admire", "ablation": name}), model)
        assert math.isfinite(run["val_loss"]) and run["warmup"] == 1
        assert {
            "commit",
            "script",
            "torch",
            "hardware",
            "threads",
            "epochs",
            "data",
            "seconds",
        } <= run.keys()
        losses[name] = run["val_loss"]
    assert len(set(losses.values())) == 4


@pytest.mark.parametrize("row", speedup.ROWS)
def test_rows_are_what_train_gpt_accepts(row):
    model = {k: v for k, v in speedup.ROWS[row]["model"].items() if k not in ("data", "tokenizer")}
    c = train_gpt.complete(train_gpt.Config(**model, device="cpu"))
    assert c.batch_size % 4 == 0 and c.batch_size % c.micro_batch == 0


@pytest.mark.parametrize(
    "path", sorted((ROOT / "results").glob("speedup-*.json")), ids=lambda p: p.stem
)
def test_committed_results_are_what_the_summary_computes(path):
    kept = json.loads(path.read_text())
    report = json.loads(
        json.dumps(speedup.summarise(speedup.Results(path.stem.removeprefix("speedup-"), path)))
    )
    kept_summary = {k: kept[k] for k in report}
    assert json.dumps(kept_summary, sort_keys=True) == json.dumps(report, sort_keys=True)
    assert all({"commit", "script", "hardware", "epochs"} <= r.keys() for r in kept["runs"])
