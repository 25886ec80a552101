"""SAM drifts along the minima towards small Tr(H); IRE makes that 1 + kappa times as fast.

    python toy/sam_drift.py               # results/toy-sam_drift.png

Theory: z_{t+1} = z_t - eta_eff grad_M Tr(H) / 2, grad_M along the manifold M of minima; so Tr(H)
changes by -eta_eff |grad_M Tr(H)|^2 / 2 a step, with eta_eff = (1 + kappa) eta rho^2 / p for
average SAM, without 1 / p for SAM. On two problems, L = f^2 / 2: the valley,
f = sqrt(1 + u^2) v at (1, 0), and the two-layer net f = a b - y at (1, y).

The theory is the limit of four small numbers, whose sum `doubt` estimates its relative error:
- eta lambda: the sharp coordinate bounces around M, which adds to the smearing (the factor is
  2 / (2 - eta lambda) for average SAM and its square for SAM),
- kappa lambda_flat / lambda_sharp: coordinates are not exactly tangent and normal to M (zero on the
  valley),
- (1 + kappa) eta rho^2: the drift of one step is no longer short,
- (rho |f''| / |f'|)^2: the climb is no longer short beside the problem's own length; both / p for
  average SAM.
Where doubt < 5% (filled markers) they agree within 5%. With several sharp directions full-batch SAM
is another matter: it follows the largest eigenvalue alone.
"""

import math
import sys
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.func import hessian
from torch.optim import SGD

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ire import SAMIRE
from toy.common import BLACK, BLUE, RED, SKY, STYLE, output_path, save

Y = 0.05  # the two-layer net's target
COPIES = 1000  # of a problem under average SAM, which is random
TRUST = 0.05
# the point that the three scans share
KAPPA = 5
ETA = 0.005
RHO = 0.05
SCANS = {
    "kappa": (0, 1, 2, 5, 12, 30, 100, 300, 1000, 3000, 10000),
    "eta": (2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 3e-2, 0.1, 0.3, 0.9),
    "rho": (5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.3, 1),
}
EXPONENT = {"kappa": 1, "eta": 1, "rho": 2}  # kappa's is that of 1 + kappa


def valley(theta):
    u, v = theta.T
    return (1 + u * u).sqrt() * v


def factors(theta):
    a, b = theta.T
    return a * b - Y


START = {valley: (1.0, 0.0), factors: (1.0, Y)}  # flat coordinate first
SERIES = {  # (problem, average): color, marker, its size, label
    (valley, False): (RED, "D", 8, "SAM, valley"),
    (factors, False): (BLACK, "v", 4, "SAM, two-layer"),
    (valley, True): (SKY, "o", 9, "average SAM, valley"),
    (factors, True): (BLUE, "s", 4, "average SAM, two-layer"),
}


def geometry(f, theta):
    """For each row of theta (rows, 2): grad f, Tr(H) = |grad f|^2 on M, and |grad_M Tr(H)|^2."""
    theta = theta.detach().requires_grad_()
    (normal,) = torch.autograd.grad(f(theta).sum(), theta, create_graph=True)
    trace = (normal**2).sum(1)
    (slope,) = torch.autograd.grad(trace.sum(), theta)
    along = slope - normal * ((slope * normal).sum(1) / trace)[:, None]
    return normal.detach(), trace.detach(), (along**2).sum(1).detach()


def drift(f, average, kappa, eta, rho, start=None):
    """Of each row: the fall of Tr(H) a step, and |grad_M Tr(H)|^2 / 2; their ratio is eta_eff.
    Average SAM gets COPIES of the problem in one loss: p and rho^2 both grow by that factor, which
    leaves rho^2 / p."""
    torch.manual_seed(0)
    copies = COPIES if average else 1
    theta = torch.tensor(start or [START[f]] * copies, dtype=torch.float64)
    normal, trace, _ = geometry(f, theta)
    if not average:
        # SAM needs a gradient to climb along: start at the bounce,
        # +-eta lambda rho / (2 - eta lambda)
        bounce = eta * trace * rho / (2 - eta * trace)
        theta += normal / trace.sqrt()[:, None] * bounce[:, None]
    settings = {"lr": eta, "rho": rho * copies**0.5, "average": average}
    settings |= {"kappa": kappa, "gamma": 0.5, "interval": 10**9, "curvature": "fisher"}
    opt = SAMIRE([theta.requires_grad_()], SGD, **settings)
    with opt.probe():
        f(theta).sum().backward()  # without sampled noise, which a row's two coordinates share

    def closure():
        opt.zero_grad()
        loss = (f(theta) ** 2 / 2).sum()
        loss.backward()
        return loss

    def advance(steps, kappa):
        opt.param_groups[0]["kappa"] = kappa
        for _ in range(steps):
            opt.step(closure)
        return geometry(f, theta)[1:]

    before, slope = advance(100, 0)  # the bounce settles
    # few enough steps for the slope to stay
    steps = round(min(max(0.02 / eta_eff(average, kappa, eta, rho), 10), 200))
    after, slope_after = advance(steps, kappa)
    return (before - after) / steps, (slope + slope_after) / 4


def eta_eff(average, kappa, eta, rho, p=2):
    return (1 + kappa) * eta * rho**2 / (p if average else 1)


def doubt(f, average, kappa, eta, rho):
    theta = torch.tensor([START[f]], dtype=torch.float64)
    normal, trace, _ = geometry(f, theta)
    flat, sharp = (normal[0] ** 2).tolist()
    curvature = hessian(lambda row: f(row[None])[0])(theta[0])  # of f, (2, 2)
    bend = torch.linalg.matrix_norm(curvature, 2) / trace.sqrt()
    share = 1 / 2 if average else 1  # of rho^2 in a direction
    bounce = eta * trace / 2 if average else eta * trace
    climb = share * (1 + kappa) * eta * rho**2 + share * (rho * bend) ** 2
    return (bounce + kappa * flat / sharp + climb).item()


def scan(f, average, name):
    """One scan of a series: eta_eff measured and in theory, the fitted exponent, where theory
    holds."""
    points = []
    for value in SCANS[name]:
        setting = {"kappa": KAPPA, "eta": ETA, "rho": RHO, name: value}
        fall, slope = drift(f, average, **setting)
        theory = eta_eff(average, **setting)
        x = 1 + value if name == "kappa" else value
        points.append((x, fall.mean() / slope.mean(), theory, doubt(f, average, **setting)))
    x, measured, theory, doubts = np.array(points).T
    good = doubts < TRUST
    error = abs(measured / theory - 1)
    return {
        "x": x,
        "measured": measured,
        "theory": theory,
        "doubt": doubts,
        "good": good,
        "exponent": np.polyfit(np.log(x[good]), np.log(measured[good]), 1)[0],
        "error": error[good].max(),
        "ends": x[~good].min(initial=math.inf),
        "fails": x[error > TRUST].min(initial=math.inf),
    }


def measure():
    numbers = {}
    for (f, average), name in product(SERIES, SCANS):
        numbers[f, average, name] = scan(f, average, name)
    two = [(1.0, 0.0), (0.5, 0.0)]  # two valleys in one loss, the second flatter
    for average in (True, False):
        start = two * (COPIES // 2 if average else 1)
        fall, slope = drift(valley, average, KAPPA, ETA, RHO, start)
        theory = eta_eff(average, KAPPA, ETA, RHO)
        rates = [(fall[i::2].mean() / slope[i::2].mean()).item() / theory for i in range(2)]
        numbers["two valleys", average] = rates
    return numbers


def draw_series(n, rate, ratio, color, marker, size, label):
    """One scan in its column: the rates, and what they are of theory, filled where it holds."""
    of_theory = n["measured"] / n["theory"]
    good = n["good"]
    rate.plot(n["x"], n["theory"], color=color, linewidth=1)
    rate.plot(n["x"], n["measured"], marker, color=color, markersize=size, label=label)
    line = {"color": color, "marker": marker, "markersize": 5}
    ratio.plot(n["x"], of_theory, linewidth=0.8, markerfacecolor="white", **line)
    ratio.plot(n["x"][good], of_theory[good], linestyle="", **line)


def draw(numbers):
    plt.rcParams.update(STYLE)
    layout = {"sharex": "col", "sharey": "row", "height_ratios": [1.5, 1]}
    figure, axes = plt.subplots(2, 3, figsize=(7, 5.4), **layout)
    for (f, average), look in SERIES.items():
        for (rate, ratio), name in zip(axes.T, SCANS, strict=True):
            draw_series(numbers[f, average, name], rate, ratio, *look)
    symbols = {"kappa": "1 + κ", "eta": "η", "rho": "ρ"}
    for (rate, ratio), (name, symbol) in zip(axes.T, symbols.items(), strict=True):
        slopes = [numbers[f, average, name]["exponent"] for f, average in SERIES]
        rate.set_title(f"slope {min(slopes):.2f} to {max(slopes):.2f}\ntheory {EXPONENT[name]}")
        rate.set(xscale="log", yscale="log")
        ratio.axhspan(1 - TRUST, 1 + TRUST, color="#DDDDDD", linewidth=0)
        ratio.set(xlabel=symbol, ylim=(0, 2))
    axes[0, 0].set_ylabel("η_eff, measured")
    axes[1, 0].set_ylabel("measured / theory")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="upper center", ncol=2)
    figure.tight_layout(rect=(0, 0, 1, 0.9))
    return figure


def main(argv=None):
    out = output_path(__doc__, "sam_drift", argv)
    numbers = measure()
    head = "eta_eff against                     | exponent (theory) | largest error"
    print(f"{head}  | from where doubt, error > {TRUST:.0%}")
    for (f, average), name in product(SERIES, SCANS):
        n = numbers[f, average, name]
        axis = "1 + kappa" if name == "kappa" else name
        series = f"{SERIES[f, average][-1]:24} {axis:10}"
        exponent = f"{n['exponent']:11.3f} ({EXPONENT[name]})  "
        error = f"{n['error']:5.2%}, {n['good'].sum():2} pts"
        print(f"{series} | {exponent} | {error} | {n['ends']:g}, {n['fails']:g}")
    print("two valleys in one loss, drift of the sharper and the flatter one, measured / theory:")
    print("    {:.3f}, {:.3f}  average SAM".format(*numbers["two valleys", True]))
    found = "{:.3f}, {:.3f}".format(*numbers["two valleys", False])
    print(f"    {found}  SAM, which follows lambda_max and not the trace")
    save(draw(numbers), out)
    return numbers


if __name__ == "__main__":
    main()
