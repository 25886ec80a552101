"""What the toys print is held to theory. Each toy runs once."""

import functools
import math
import runpy
import sys
from pathlib import Path

import matplotlib
import pytest
import torch

matplotlib.use("Agg")
from toy import edge_of_stability, leak, mask, quadratic, sam_drift, valley
from toy.common import ROOT

TOYS = (edge_of_stability, leak, mask, quadratic, sam_drift, valley)
FAST = [toy for toy in TOYS if toy is not leak]


def name_of(toy):
    return toy.__name__.removeprefix("toy.")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(toy): the numbers of a toy, whose main() has drawn its figure into run.folder."""

    @functools.cache
    def once(toy):
        return toy.main(["--out", str(once.folder / f"{name_of(toy)}.png")])

    once.folder = tmp_path_factory.mktemp("figures")
    return once


# ----------------------------------------------------------------------------------------- all toys
@pytest.mark.parametrize("toy", FAST, ids=name_of)
def test_draws_a_figure(run, toy):
    run(toy)
    assert (run.folder / f"{name_of(toy)}.png").read_bytes().startswith(b"\x89PNG")
    if toy is valley:
        assert (run.folder / "valley.gif").read_bytes().startswith(b"GIF89a")


@pytest.mark.parametrize("toy", TOYS, ids=name_of)
def test_is_a_script_that_works_in_any_directory(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [toy.__file__, "--help"])
    monkeypatch.setattr(sys, "path", [x for x in sys.path if Path(x).resolve() != ROOT])
    for module in [x for x in sys.modules if x.split(".")[0] in ("toy", "ire")]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(SystemExit, match="^0$"):
        runpy.run_path(toy.__file__, run_name="__main__")
    name = name_of(toy)
    shown = capsys.readouterr().out
    assert f"toy-{name}.png" in shown and f"python toy/{name}.py" in shown
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------- valley
@pytest.mark.parametrize("label, kappa", [("GD, η = 1", 0), ("IRE, κ = 900", 900)])
def test_valley_only_the_flat_step_is_longer(run, label, kappa):
    u, v = run(valley)[label]["path"][1].tolist()
    assert u == pytest.approx(1 - (1 + kappa) * 0.01**2, rel=1e-9)
    assert v == pytest.approx(0.01 * (1 - 2), rel=1e-9)


def test_valley_only_the_largest_kappa_reaches_the_flattest_minimum(run):
    numbers = run(valley)
    assert [n["steps"] for n in numbers.values()] == [math.inf, math.inf, math.inf, math.inf, 1]
    assert [n["diverged"] for n in numbers.values()] == [True, False, False, False, False]


def test_valley_kappa_has_a_limit():
    limit = 2 / 0.01**2 - 1
    assert abs(valley.descend(1, 0.99 * limit)[1, 0]) < 1 < -valley.descend(1, 1.01 * limit)[1, 0]


# ---------------------------------------------------------------------------------------- quadratic
def test_quadratic_limit_is_that_of_the_sharpest_flat_coordinate(run):
    limits = run(quadratic)["limits"]
    assert len(limits) == 12
    for eta, gamma, measured, _ in limits:
        sharpest_flat = 10 ** (-5 * (20 - round(gamma * 20)) / 19)
        assert measured == pytest.approx(2 / (eta * sharpest_flat) - 1, rel=0.01)


def test_quadratic_one_sharpest_coordinate_in_the_mask_is_enough(run):
    right, *wrong = (measured for measured, _ in run(quadratic)["wrong"]["worst"])
    assert right > 70 and wrong == pytest.approx([2 / 1.0 - 1] * 5, rel=0.01)


def test_quadratic_a_mask_finds_nothing_flat_in_rotated_axes(run):
    """Its limit is where eta lambda_max(D^1/2 H D^1/2) = 2."""
    torch.manual_seed(0)
    axes = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64)).Q
    H = axes @ torch.logspace(0, -5, 20, dtype=torch.float64).diag() @ axes.T
    flat = H.diagonal() <= H.diagonal().sort().values[13]
    measured, aligned = run(quadratic)["rotated"]
    root = (1 + measured * flat).sqrt()
    assert torch.linalg.eigvalsh(root[:, None] * H * root)[-1].item() == pytest.approx(2, rel=0.01)
    assert measured < aligned / 20


def test_quadratic_ire_is_faster_only_in_aligned_axes(run):
    loss = {label: curve[-1].item() for label, curve in run(quadratic)["loss"].items()}
    assert loss["IRE"] < loss["GD"] / 100
    assert loss["GD"] / 3 < loss["IRE, rotated axes"] < loss["GD"]


# ---------------------------------------------------------------------------------------------- SAM
@pytest.mark.parametrize("name, exponent", [("kappa", 1), ("eta", 1), ("rho", 2)])
def test_sam_drifts_as_in_theory(run, name, exponent):
    for f, average in sam_drift.SERIES:
        x, measured, _ = run(sam_drift)["scans"][f, average, name]
        setting = {"1 + kappa": 6, "eta": 0.005, "rho": 0.05}
        setting["1 + kappa" if name == "kappa" else name] = x
        theory = setting["1 + kappa"] * setting["eta"] * setting["rho"] ** 2 / (1 + average)
        torch.testing.assert_close(measured, theory, rtol=0.05, atol=0)
        slope = (measured[-1] / measured[0]).log() / (x[-1] / x[0]).log()
        assert slope.item() == pytest.approx(exponent, rel=0.02)


def test_full_batch_sam_follows_the_largest_eigenvalue_and_not_the_trace(run):
    rates = run(sam_drift)["two valleys"]
    assert rates[True] == pytest.approx([1, 1], rel=0.05)
    assert rates[False] == pytest.approx([1, 0], rel=0.05, abs=0.01)


# -------------------------------------------------------------------------------- edge of stability
@pytest.mark.parametrize(
    "label, tolerance", [("GD", 0.05), ("GD-IRE", 0.05), ("Adam", 0.1), ("AdmIRE", 0.1)]
)
def test_training_ends_at_the_edge_of_the_amplified_hessian(run, label, tolerance):
    assert run(edge_of_stability)[label]["edge"] == pytest.approx(1, rel=tolerance)


def test_ire_gets_there_at_a_smaller_sharpness_of_the_hessian(run):
    numbers = run(edge_of_stability)
    assert numbers["GD"]["lambda_max"] == pytest.approx(2 / 0.2, rel=0.05)
    assert numbers["GD-IRE"]["lambda_max"] < 0.9 * 2 / 0.2


# --------------------------------------------------------------------------------------------- mask
def test_probes_are_as_good_as_chi_squared_noise_allows(run):
    numbers = run(mask)
    for m in mask.DRAWS:
        assert numbers["draws"][256, m] == pytest.approx(numbers["theory"][m], abs=0.02)
    found, twice = numbers["probe"]  # of ire.py
    assert found == pytest.approx(numbers["theory"][1][0], abs=0.02)
    assert twice == pytest.approx(numbers["theory, two probes"], abs=0.02)


def test_more_draws_help_and_larger_batches_hardly(run):
    draws = {key: overlap for key, (overlap, _) in run(mask)["draws"].items()}
    for batch in mask.BATCHES:
        assert sorted(mask.DRAWS, key=lambda m: draws[batch, m]) == list(mask.DRAWS)
    assert draws[16, 1] == pytest.approx(draws[256, 1], abs=0.03)
    assert draws[16, 16] > draws[256, 1] + 0.1  # the same number of samples


def test_200_steps_change_the_exact_mask_less_than_another_draw_changes_the_probe(run):
    numbers = run(mask)
    overlaps = list(numbers["lags"].values())
    assert overlaps == sorted(overlaps, reverse=True)
    assert numbers["lags"][10] > 0.98
    assert overlaps[-1] > numbers["probe"][1] + 0.15


def test_a_mean_of_squared_gradients_ranks_better_than_one_probe(run):
    overlaps = {name: pair[0][0] for name, pair in run(mask)["estimates"].items()}
    for name in ("empirical Fisher", "Adam's second moment"):
        assert overlaps[name] > overlaps["1 probe, batch 256"] + 0.1


# --------------------------------------------------------------------------------- a norm over time
@pytest.mark.slow
def test_only_a_norm_over_time_sees_the_future_and_learns_coin_flips(tmp_path):
    numbers = leak.main(["--out", str(tmp_path / "leak.png")])
    assert (tmp_path / "leak.png").read_bytes().startswith(b"\x89PNG")
    causal, *leaky = numbers.values()
    assert not causal["sees"] and causal["end"] == pytest.approx(math.log(2), abs=0.005)
    ends = [n["end"] for n in leaky]
    assert all(n["sees"] for n in leaky) and ends == sorted(ends)  # the longer, the less
    assert ends[0] < 0.6 * math.log(2) and ends[-1] < 0.95 * math.log(2)
