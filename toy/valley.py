"""The paper's Figure 1: IRE runs along the valley floor, where gradient descent stands still.

    python toy/valley.py       # results/toy-valley.png and toy-valley.gif, the same in motion

L(u, v) = (1 + u^2) v^2 / 2. Every point of the floor v = 0 is a minimum; there Tr(H) = 1 + u^2, so
(0, 0) is the flattest. At (1, 0.01) the sharp v caps the learning rate: with eta = 2 gradient
descent diverges. IRE keeps eta = 1 and makes the step along the flat u longer:
u1 = u0 (1 - (1 + kappa) eta v0^2).

What u can win is bounded, since v dies out meanwhile: with s = -log u and eta = 1 small steps
follow ds/dt = (1 + kappa) v^2 and d(v^2)/dt = -4 s v^2. They conserve v^2 + 2 s^2 / (1 + kappa), so
that u stops at exp(-v0 sqrt((1 + kappa) / 2)): only a kappa of the order of 1 / v0^2 comes near 0.
The step may overshoot too: from kappa = 2 / (eta v0^2) - 1 on, |u| grows in the first one.
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
RUNS = {  # label: (eta, kappa, color, line)
    "GD, η = 2": (2, 0, GREY, {"linestyle": "--", "linewidth": 1.5}),
    "GD, η = 1": (1, 0, BLACK, {"linewidth": 4}),
    "IRE, κ = 90": (1, 90, BLUE, {}),
    "IRE, κ = 900": (1, 900, ORANGE, {}),
    "IRE, κ = 9000": (1, 9000, RED, {}),
}


def valley(theta):
    u, v = theta
    return torch.stack([(1 + u * u).sqrt() * v])


def quadratic(theta):
    return theta * torch.tensor([0.04, 2.0], dtype=torch.float64).sqrt()  # curvatures 0.04 and 2


def curved(theta):
    u, v = theta
    return torch.stack([v - u * u / 2])


# losses |residuals|^2 / 2; book/_static/valley.js has the same, to be dragged
LOSSES = {"valley": valley, "quadratic": quadratic, "curved": curved}


def descend(eta, kappa, start=START, residuals=valley, steps=STEPS):
    """The path (steps + 1, 2) of theta = (u, v), cut where it has diverged."""
    theta = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    # gamma: one of the two coordinates is flat
    opt = SGDIRE([theta], lr=eta, kappa=kappa, gamma=0.5, curvature="fisher")
    path = [theta.detach().clone()]
    while len(path) <= steps and path[-1].abs().max() < 1e3:
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
    torch.manual_seed(0)
    u0, v0 = START
    numbers = {}
    for label, (eta, kappa, *_) in RUNS.items():
        path = descend(eta, kappa)
        near = (path[:, 0].abs() < NEAR).nonzero().flatten().tolist()
        numbers[label] = {
            "path": path,
            "diverged": len(path) <= STEPS,
            "steps": near[0] if near else math.inf,
            "first": path[1, 0].item(),
            "first_theory": u0 * (1 - (1 + kappa) * eta * v0**2),
            "last": path[-1, 0].item(),
            "last_theory": math.exp(-v0 * math.sqrt((1 + kappa) / 2)),
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
    ax.text(-0.1, 0.004, "flattest\nminimum")
    ax.plot(*START, "o", color=BLACK, markersize=7, zorder=5)
    ax.text(0.97, 0.0125, "start", ha="right")
    ax.set(xlim=(-0.22, 1.12), xlabel="u  (flat)", xticks=[0, 0.5, 1])
    ax.set(ylim=(-0.032, 0.032), ylabel="v  (sharp)", yticks=[-0.03, -0.01, 0, 0.01, 0.03])
    ax.set_title("L = (1 + u²) v² / 2")
    ax.grid(False)


def draw(numbers):
    plt.rcParams.update(STYLE)
    layout = [["map", "u"], ["map", "trace"]]
    figure, axes = plt.subplot_mosaic(layout, figsize=(7, 4.6), width_ratios=[1.15, 1])
    draw_map(axes["map"])
    for label, (_, _, color, style) in RUNS.items():
        u, v = numbers[label]["path"].T
        axes["map"].plot(u, v, color=color, marker=".", **{**style, "linewidth": 1.2})
        axes["u"].plot(u.abs(), color=color, **style)
        axes["trace"].plot(1 + u * u, color=color, label=label, **style)
    for name in ("u", "trace"):
        axes[name].set_xscale("symlog", linthresh=1)
        axes[name].set(xlim=(0, STEPS), xticks=[0, 1, 10, 100], xticklabels=["0", "1", "10", "100"])
    axes["u"].axhline(NEAR, color=GREY, linestyle=":", linewidth=1.2)
    axes["u"].set(yscale="log", ylim=(0.004, 2.5), ylabel="|u|")
    axes["trace"].set(ylim=(0.9, 2.3), xlabel="step", ylabel="Tr(H) = 1 + u²")
    handles, labels = axes["trace"].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncol=5, columnspacing=1)
    figure.tight_layout(rect=(0, 0, 1, 0.94), h_pad=0.8)
    return figure


def animate(figure):
    """The figure of `draw`, each run up to a step: single ones first, then faster and faster."""
    lines = [line for ax in figure.axes for line in ax.lines if len(line.get_xdata()) > 2]
    runs = [(line, *line.get_data()) for line in lines]

    def show(step):
        for line, x, y in runs:
            line.set_data(x[: step + 1], y[: step + 1])

    faster = [round(10 * 1.3**i) for i in range(13)]
    frames = [*range(10), *faster, STEPS, STEPS, STEPS]
    return FuncAnimation(figure, show, frames, interval=500)


def main(argv=None):
    out = output_path(__doc__, "valley", argv)
    numbers = measure()
    print(f"{'':13} | steps to |u| < {NEAR} | u after one step (theory)  | u at the end (theory)")
    for label, n in numbers.items():
        first = f"{n['first']:.6f} ({n['first_theory']:.6f})"
        if n["diverged"]:
            print(f"{label:13} | {'diverges':>18} | {first:26} |")
            continue
        steps = "never" if n["steps"] == math.inf else n["steps"]
        last = f"{n['last']:.4f} ({n['last_theory']:.4f})"
        print(f"{label:13} | {steps:>18} | {first:26} | {last}")
    u0, v0 = START
    print(f"theory: one step is enough from kappa = {(u0 - NEAR) / v0**2 - 1:.0f}")
    figure = draw(numbers)
    save(figure, out)
    save(animate(figure), out.with_suffix(".gif"))
    return numbers


if __name__ == "__main__":
    main()
