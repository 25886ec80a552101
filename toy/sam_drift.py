"""SAM drifts along the minima towards a small Tr(H). With IRE it drifts 1 + kappa times as fast.

    python toy/sam_drift.py               # draws results/toy-sam_drift.png

The paper's theory: a step moves the point z along the minima by -eta_eff grad Tr(H) / 2. So Tr(H)
falls by eta_eff |grad Tr(H)|^2 / 2 per step, where the gradient is taken along the minima. For SAM
eta_eff = (1 + kappa) eta rho^2. Average SAM climbs in a random direction of the p there are, so its
eta_eff is that divided by p.

Two losses f^2 / 2 test this: the valley, f = sqrt(1 + u^2) v, and a network of two weights,
f = a b - y. In the scans below theory and measurement agree within 5%. The theory is for small
steps: it fails where eta lambda_max, (1 + kappa) eta rho^2, rho, or
kappa lambda_flat / lambda_sharp is no longer small.

With several sharp directions full-batch SAM is different: it follows the largest eigenvalue alone.
"""

import sys
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.optim import SGD

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ire import SAMIRE
from toy.common import BLACK, BLUE, RED, SKY, STYLE, output_path, save

Y = 0.01  # the network's target
COPIES = 1000  # of a problem under average SAM, which is random
# the point that the three scans share
KAPPA = 5
ETA = 0.005
RHO = 0.05
SCANS = {
    "kappa": (0, 1, 2, 5, 12, 30, 100),
    "eta": (2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2),
    "rho": (5e-3, 1e-2, 2e-2, 5e-2, 0.1),
}
SYMBOLS = {"kappa": "1 + κ", "eta": "η", "rho": "ρ"}


def valley(theta):
    u, v = theta.T
    return (1 + u * u).sqrt() * v


def factors(theta):
    a, b = theta.T
    return a * b - Y


START = {valley: (1.0, 0.0), factors: (1.0, Y)}  # flat coordinate first
SERIES = {  # (problem, average): label, color, marker, its size
    (valley, False): ("SAM, valley", RED, "D", 8),
    (factors, False): ("SAM, network", BLACK, "v", 4),
    (valley, True): ("average SAM, valley", SKY, "o", 9),
    (factors, True): ("average SAM, network", BLUE, "s", 4),
}


def geometry(f, theta):
    """For each row of theta (rows, 2): grad f, Tr(H), and |grad Tr(H)|^2 along the minima."""
    theta = theta.detach().requires_grad_()
    (normal,) = torch.autograd.grad(f(theta).sum(), theta, create_graph=True)
    trace = (normal**2).sum(1)  # at a minimum H is normal normal^T
    (slope,) = torch.autograd.grad(trace.sum(), theta)
    along = slope - normal * ((slope * normal).sum(1) / trace)[:, None]
    return normal.detach(), trace.detach(), (along**2).sum(1).detach()


def drift(f, average, kappa, eta, rho, start=None):
    """For each row: the fall of Tr(H) per step, and |grad Tr(H)|^2 / 2. Their ratio is eta_eff.
    Average SAM gets COPIES of the problem in one loss. That multiplies p and rho^2 by the same
    number, so rho^2 / p stays."""
    torch.manual_seed(0)
    copies = COPIES if average else 1
    theta = torch.tensor(start or [START[f]] * copies, dtype=torch.float64)
    normal, trace, _ = geometry(f, theta)
    if not average:
        # SAM climbs along a gradient, which is zero at a minimum. So it starts where it ends up
        # jumping to and fro, at +-eta lambda rho / (2 - eta lambda)
        bounce = eta * trace * rho / (2 - eta * trace)
        theta += normal / trace.sqrt()[:, None] * bounce[:, None]
    settings = {"lr": eta, "rho": rho * copies**0.5, "average": average}
    settings |= {"kappa": kappa, "gamma": 0.5, "interval": 10**9, "curvature": "fisher"}
    opt = SAMIRE([theta.requires_grad_()], SGD, **settings)
    with opt.probe():
        f(theta).sum().backward()  # a gradient whose square is the exact curvature

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

    before, slope = advance(100, 0)  # until the jumps are steady
    # few enough steps for the slope to stay
    steps = round(min(max(0.02 / eta_eff(average, kappa, eta, rho), 10), 200))
    after, slope_after = advance(steps, kappa)
    return (before - after) / steps, (slope + slope_after) / 4


def eta_eff(average, kappa, eta, rho):
    return (1 + kappa) * eta * rho**2 / (2 if average else 1)  # p = 2


def scan(f, average, name):
    """Points (x, measured, theory) of eta_eff, as (3, points)."""
    points = []
    for value in SCANS[name]:
        setting = {"kappa": KAPPA, "eta": ETA, "rho": RHO, name: value}
        fall, slope = drift(f, average, **setting)
        x = 1 + value if name == "kappa" else value
        points.append((x, (fall.mean() / slope.mean()).item(), eta_eff(average, **setting)))
    return torch.tensor(points, dtype=torch.float64).T


def two_valleys(average):
    """The drift in each of two valleys with one loss, the second one flatter, over the theory."""
    start = [(1.0, 0.0), (0.5, 0.0)] * (COPIES // 2 if average else 1)
    fall, slope = drift(valley, average, KAPPA, ETA, RHO, start)
    theory = eta_eff(average, KAPPA, ETA, RHO)
    return [(fall[i::2].mean() / slope[i::2].mean()).item() / theory for i in range(2)]


def measure():
    scans = {}
    for (f, average), name in product(SERIES, SCANS):
        scans[f, average, name] = scan(f, average, name)
    return {"scans": scans, "two valleys": {kind: two_valleys(kind) for kind in (False, True)}}


def draw(numbers):
    plt.rcParams.update(STYLE)
    figure, axes = plt.subplots(3, 1, figsize=(5, 9), layout="constrained")
    ax_of = dict(zip(SCANS, axes, strict=True))
    for (f, average, name), (x, measured, theory) in numbers["scans"].items():
        label, color, marker, size = SERIES[f, average]
        ax = ax_of[name]
        ax.plot(x, theory, color=color, linewidth=1)
        ax.plot(x, measured, marker, color=color, markersize=size, label=label)
        ax.set(xscale="log", yscale="log", xlabel=SYMBOLS[name], ylabel="η_eff")
    axes[0].set_title("Measured (points) and theory (lines)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncol=2)
    return figure


def main(argv=None):
    out = output_path(__doc__, "sam_drift", 15, argv)
    numbers = measure()
    print("measured eta_eff / theory, at the start and at the end of each scan")
    for (f, average, name), (_, measured, theory) in numbers["scans"].items():
        of_theory = measured / theory
        label = SERIES[f, average][0]
        print(f"{label:20} {SYMBOLS[name]:5} | {of_theory[0]:.3f} {of_theory[-1]:.3f}")
    print("two valleys in one loss: measured / theory in the sharper and in the flatter valley")
    for average, rates in numbers["two valleys"].items():
        label = "average SAM" if average else "SAM"
        print(f"{label:11} | {rates[0]:.3f} {rates[1]:.3f}")
    save(draw(numbers), out)
    return numbers


if __name__ == "__main__":
    main()
