"""The paper's Figure 1: IRE runs along the floor of a valley, where gradient descent stands still.

    python toy/valley.py       # draws results/toy-valley.png, and toy-valley.gif with motion

The loss is L(u, v) = (1 + u^2) v^2 / 2. Every point of the floor v = 0 is a minimum. There
Tr(H) = 1 + u^2, so (0, 0) is the flattest minimum. All runs start at (1, 0.01).

The sharp v limits the learning rate: with eta = 2 gradient descent diverges. IRE keeps eta = 1 and
makes only the steps along the flat u longer. The first step leads to
u1 = u0 (1 - (1 + kappa) eta v0^2), so a kappa of the order of 1 / v0^2 reaches the flattest
minimum. A kappa above 2 / (eta v0^2) - 1 is too large: the first step overshoots and |u| grows.
"""

import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.animation import FuncAnimation
from torch.func import jacrev

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ire import SGDIRE
from toy.common import BLACK, BLUE, GREY, ORANGE, RED, STYLE, output_path, save

START = (1.0, 0.01)
STEPS = 300
NEAR = 0.1
RUNS = {  # label: (eta, kappa, color)
    "GD, η = 2": (2, 0, GREY),
    "GD, η = 1": (1, 0, BLACK),
    "IRE, κ = 90": (1, 90, BLUE),
    "IRE, κ = 900": (1, 900, ORANGE),
    "IRE, κ = 9000": (1, 9000, RED),
}


def valley(theta):
    u, v = theta
    return torch.stack([(1 + u * u).sqrt() * v])


def quadratic(theta):
    return theta * torch.tensor([0.04, 2.0], dtype=torch.float64).sqrt()  # curvatures 0.04 and 2


def curved(theta):
    u, v = theta
    return torch.stack([v - u * u / 2])


# The loss is the sum of the squared residuals, divided by 2. book/_static/valley.js has the same.
LOSSES = {"valley": valley, "quadratic": quadratic, "curved": curved}


def descend(eta, kappa, start=START, residuals=valley):
    """The path (STEPS + 1, 2) of theta = (u, v). A path that diverges ends early."""
    theta = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    # gamma: one of the two coordinates is flat
    opt = SGDIRE([theta], lr=eta, kappa=kappa, gamma=0.5, curvature="fisher")
    path = [theta.detach().clone()]
    while len(path) <= STEPS and path[-1].abs().max() < 1e3:
        if opt.probe_due:
            jacobian = jacrev(residuals)(theta.detach())  # (residuals, 2)
            with opt.probe():  # a gradient whose square is the Gauss-Newton diagonal
                (jacobian.square().sum(0).sqrt() @ theta).backward()
        opt.zero_grad()
        (residuals(theta).square().sum() / 2).backward()
        opt.step()
        path.append(theta.detach().clone())
    return torch.stack(path)


def measure():
    numbers = {}
    for label, (eta, kappa, _) in RUNS.items():
        path = descend(eta, kappa)
        near = (path[:, 0].abs() < NEAR).nonzero().flatten().tolist()
        numbers[label] = {
            "path": path,
            "diverged": len(path) <= STEPS,
            "steps": near[0] if near else math.inf,
            "last": path[-1, 0].item(),
        }
    return numbers


def draw_map(ax):
    """The valley from above, without the runs."""
    width = torch.linspace(-0.22, 1.12, 200)
    height = torch.linspace(-0.032, 0.032, 200)
    u, v = torch.meshgrid(width, height, indexing="xy")
    loss = torch.log10((1 + u * u) * v * v / 2 + 1e-6)
    ax.contourf(u, v, loss, 12, cmap="Greys", alpha=0.3)
    ax.plot(0, 0, "*", color=BLACK, markersize=15, zorder=5)
    ax.text(-0.1, 0.005, "flattest minimum")
    ax.plot(*START, "o", color=BLACK, markersize=7, zorder=5)
    ax.text(0.92, 0.013, "start", ha="right")
    ax.set(xlim=(-0.22, 1.12), xlabel="u  (flat)", xticks=[0, 0.5, 1])
    ax.set(ylim=(-0.032, 0.032), ylabel="v  (sharp)", yticks=[-0.03, -0.01, 0, 0.01, 0.03])
    ax.set_title("L = (1 + u²) v² / 2")
    ax.grid(False)


def draw(numbers):
    plt.rcParams.update(STYLE)
    figure, (above, trace) = plt.subplots(2, 1, figsize=(5, 5.6), layout="constrained")
    draw_map(above)
    for label, (_, _, color) in RUNS.items():
        u, v = numbers[label]["path"].T
        above.plot(u, v, ".-", color=color, linewidth=1.2)
        trace.plot(1 + u * u, color=color, label=label)
    trace.set_xscale("symlog", linthresh=1)
    trace.set(xlim=(0, STEPS), xticks=[0, 1, 10, 100], xticklabels=["0", "1", "10", "100"])
    trace.set(ylim=(0.9, 2.3), xlabel="step", ylabel="Tr(H) = 1 + u²")
    figure.legend(loc="outside lower center", ncol=2)
    return figure


def animate(figure):
    """The figure with each run up to a step: ten single steps, then faster and faster."""
    lines = [line for ax in figure.axes for line in ax.lines if len(line.get_xdata()) > 2]
    runs = [(line, *line.get_data()) for line in lines]

    def show(step):
        for line, x, y in runs:
            line.set_data(x[: step + 1], y[: step + 1])

    faster = [round(10 * 1.3**i) for i in range(13)]
    frames = [*range(10), *faster, STEPS, STEPS, STEPS]
    return FuncAnimation(figure, show, frames, interval=500)


def main(argv=None):
    out = output_path(__doc__, "valley", 10, argv)
    numbers = measure()
    print(f"run           | first step with |u| < {NEAR} | u after {STEPS} steps")
    for label, n in numbers.items():
        steps = "never" if n["steps"] == math.inf else n["steps"]
        last = "diverges" if n["diverged"] else f"{n['last']:.4f}"
        print(f"{label:13} | {steps:>24} | {last:>17}")
    figure = draw(numbers)
    save(figure, out)
    save(animate(figure), out.with_suffix(".gif"))
    return numbers


if __name__ == "__main__":
    main()
