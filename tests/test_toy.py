"""What the toys print is asserted here against theory. Each toy runs once."""

import math
import subprocess
import sys
from functools import partial

import matplotlib
import pytest

matplotlib.use("Agg")
from toy import edge_of_stability, leak, mask, quadratic, sam_drift, valley  # noqa: E402
from toy.common import ROOT, output_path  # noqa: E402

TOYS = {
    "valley": valley,
    "quadratic": quadratic,
    "sam_drift": sam_drift,
    "edge_of_stability": edge_of_stability,
    "mask": mask,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(name): the numbers of a toy, whose main() has drawn its figure into run.folder."""
    folder = tmp_path_factory.mktemp("figures")
    done = {}

    def once(name):
        if name not in done:
            done[name] = TOYS[name].main(["--out", str(folder / f"{name}.png")])
        return done[name]

    once.folder = folder
    return once


# ----------------------------------------------------------------------------------------- all toys
@pytest.mark.parametrize("name", TOYS)
@pytest.mark.slow
def test_draws_a_figure_by_default_into_results(run, name):
    run(name)
    assert (run.folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert output_path("", name, []) == ROOT / "results" / f"toy-{name}.png"


def test_valley_is_animated(run):
    run("valley")
    assert (run.folder / "valley.gif").read_bytes().startswith(b"GIF89a")


@pytest.mark.parametrize("name", [*TOYS, "leak"])
def test_is_a_script_that_works_in_any_directory(name, tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "toy" / f"{name}.py", "--help"],
        cwd=tmp_path,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"toy-{name}.png" in done.stdout and f"python toy/{name}.py" in done.stdout
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------- valley
def test_valley_first_step_is_amplified(run):
    for label, eta, kappa in (
        ("GD, η = 1", 1, 0),
        ("IRE, κ = 90", 1, 90),
        ("IRE, κ = 900", 1, 900),
        ("IRE, κ = 9000", 1, 9000),
    ):
        n = run("valley")[label]
        assert n["first"] == pytest.approx(1 - (1 + kappa) * eta * 0.01**2, rel=1e-9)
        assert n["path"][1, 1].item() == pytest.approx(
            0.01 * (1 - eta * 2), rel=1e-9
        )  # the sharp v moves as before


def test_valley_steps_to_the_flattest_minimum(run):
    numbers = run("valley")
    assert [n["steps"] for n in numbers.values()] == [math.inf, math.inf, math.inf, math.inf, 1]
    assert [n["diverged"] for n in numbers.values()] == [True, False, False, False, False]
    assert 90 < 900 < (1 - valley.NEAR) / 0.01**2 - 1 <= 9000  # from there on one step is enough


def test_valley_stops_where_the_conserved_quantity_says(run):
    for label, kappa in (
        ("GD, η = 1", 0),
        ("IRE, κ = 90", 90),
    ):  # small steps, for which it is derived
        assert run("valley")[label]["last"] == pytest.approx(
            math.exp(-0.01 * math.sqrt((1 + kappa) / 2)), rel=0.01
        )
    gain = 1 - run("valley")["GD, η = 1"]["last"]
    assert gain == pytest.approx(0.01 * math.sqrt(1 / 2), rel=0.02)


# ---------------------------------------------------------------------------------------- quadratic
def test_quadratic_stability_limit_within_1_percent(run):
    limits = run("quadratic")["limits"]
    assert len(limits) == 12
    for eta, gamma, measured, _ in limits:
        sharpest_flat = 10 ** (-5 * (20 - round(gamma * 20)) / 19)
        assert measured == pytest.approx(2 / (eta * sharpest_flat) - 1, rel=0.01)


def test_quadratic_wrong_and_rotated_masks_within_1_percent(run):
    numbers = run("quadratic")
    for measured, theory in [
        *numbers["wrong"]["nearest"],
        *numbers["wrong"]["worst"],
        numbers["rotated"],
    ]:
        assert measured == pytest.approx(theory, rel=0.01)
    right, *wrong = (measured for measured, _ in numbers["wrong"]["worst"])
    assert right > 70 and wrong == pytest.approx(
        [2 / 1.0 - 1] * 5, rel=0.01
    )  # one sharpest coordinate is enough
    assert numbers["rotated"][0] < right / 20


def test_quadratic_ire_speeds_up_the_flat_directions_only_in_aligned_axes(run):
    loss = {label: curve[-1].item() for label, curve in run("quadratic")["loss"].items()}
    assert loss["IRE"] < loss["GD"] / 100
    assert loss["GD"] / 3 < loss["IRE, rotated axes"] < loss["GD"]


# ---------------------------------------------------------------------------------------------- SAM
@pytest.mark.parametrize("name, exponent", [("kappa", 1), ("eta", 1), ("rho", 2)])
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("f", [sam_drift.valley, sam_drift.factors])
def test_sam_drift_within_5_percent_where_theory_holds(run, f, average, name, exponent):
    n = run("sam_drift")[f, average, name]
    setting = {"kappa": sam_drift.KAPPA, "eta": sam_drift.ETA, "rho": sam_drift.RHO}
    for i in n["good"].nonzero()[0]:
        at = {**setting, name: n["x"][i] - (name == "kappa")}
        theory = (1 + at["kappa"]) * at["eta"] * at["rho"] ** 2 / (2 if average else 1)
        assert n["measured"][i] == pytest.approx(theory, rel=0.05)
    assert n["good"].sum() >= 5
    assert n["exponent"] == pytest.approx(exponent, rel=0.05)
    assert n["ends"] <= n["fails"]  # the doubt comes before the failure
    if name != "rho":
        assert n["fails"] < math.inf  # and the failure is seen


def test_full_batch_sam_follows_the_largest_eigenvalue_not_the_trace(run):
    assert run("sam_drift")["two valleys", True] == pytest.approx([1, 1], rel=0.05)
    assert run("sam_drift")["two valleys", False] == pytest.approx([1, 0], rel=0.05, abs=0.01)


# -------------------------------------------------------------------------------- edge of stability
@pytest.mark.parametrize(
    "label, tolerance", [("GD", 0.05), ("GD-IRE", 0.05), ("Adam", 0.1), ("AdmIRE", 0.1)]
)
def test_training_hovers_at_the_edge(run, label, tolerance):
    assert run("edge_of_stability")[label]["edge"] == pytest.approx(1, rel=tolerance)


def test_edge_is_that_of_the_amplified_hessian(run):
    numbers = run("edge_of_stability")
    assert edge_of_stability.LIMIT[0] == 2 / 0.2 and edge_of_stability.LIMIT[1] == pytest.approx(
        38 / 0.01
    )
    assert numbers["GD"]["lambda_max"] == pytest.approx(2 / 0.2, rel=0.05)
    assert numbers["GD-IRE"]["lambda_max"] < 0.9 * 2 / 0.2
    assert numbers["GD-IRE"]["trace"] < numbers["GD"]["trace"]
    assert (
        numbers["AdmIRE, sampled masks"]["edge"] < 0.9
    )  # noise in the masks keeps it off the edge


def test_split_of_the_fall_adds_up_and_moves_to_the_flat_coordinates(run):
    numbers = run("edge_of_stability")
    for label in ("GD", "GD-IRE", "Adam", "AdmIRE"):
        n = numbers[label]
        assert abs(n["missed"]) < 1e-3 * (n["flat"] + n["sharp"])
    share = {label: n["flat"] / (n["flat"] + n["sharp"]) for label, n in numbers.items()}
    assert share["GD-IRE"] > share["GD"] + 0.03
    assert share["AdmIRE"] > share["Adam"] + 0.1


# --------------------------------------------------------------------------------------------- mask
def test_probes_are_as_good_as_chi_squared_noise_allows(run):
    numbers = run("mask")
    for m in mask.DRAWS:
        assert numbers["draws"][mask.SAMPLES, m] == pytest.approx(numbers["theory"][m], abs=0.02)
    found, twice = numbers["probe"]  # ire.py's own
    assert found == pytest.approx(numbers["theory"][1][0], abs=0.02)
    assert twice == pytest.approx(numbers["theory, two probes"], abs=0.02)


def test_more_draws_help_and_larger_batches_hardly(run):
    draws = {key: overlap for key, (overlap, _) in run("mask")["draws"].items()}
    for batch in mask.BATCHES:
        assert sorted(mask.DRAWS, key=lambda m: draws[batch, m]) == list(mask.DRAWS)
    assert draws[16, 1] == pytest.approx(draws[256, 1], abs=0.03)
    assert draws[16, 16] > draws[256, 1] + 0.1  # as many samples


def test_the_exact_mask_changes_slowly(run):
    numbers = run("mask")
    overlaps = list(numbers["lags"].values())
    assert overlaps == sorted(overlaps, reverse=True)
    assert numbers["lags"][10] > 0.98
    assert overlaps[-1] > numbers["probe"][1] + 0.15  # 200 steps change less than another draw


def test_kinds_of_curvature(run):
    with_G = {name: pair[0][0] for name, pair in run("mask")["estimates"].items()}
    assert with_G["Gauss-Newton"] == 1
    assert (
        min(with_G["empirical Fisher"], with_G["Adam's second moment"])
        > with_G["1 probe, batch 256"] + 0.1
    )
    assert run("mask")["estimates"]["Gauss-Newton"][1][0] > 0.95  # the Hessian's flat set


# --------------------------------------------------------------------------------- a norm over time
@pytest.mark.slow
def test_only_a_norm_over_time_sees_the_future_and_learns_coin_flips():
    ends = {}
    for name, (dims, _) in leak.RUNS.items():
        losses, model = leak.train(dims, length=8, steps=200)
        ends[name] = losses[-50:].mean().item()
        assert leak.sees_the_future(model) == (name == "over time and width")
    assert ends["over width"] == pytest.approx(math.log(2), abs=0.005)
    assert ends["over time and width"] < 0.9 * math.log(2)


@pytest.mark.slow
def test_leak_draws_its_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(leak, "measure", partial(leak.measure, steps=30))
    leak.main(["--out", str(tmp_path / "leak.png")])
    assert (tmp_path / "leak.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("sees the future") == 3
