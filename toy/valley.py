"""The paper's Figure 1: IRE runs along the valley floor to the flattest minimum, where gradient descent stands still.

    python toy/valley.py                  # results/toy-valley.png and toy-valley.gif, the same in motion

L(u, v) = (1 + u^2) v^2 / 2. Every point of the floor v = 0 is a minimum; there Tr(H) = 1 + u^2, so (0, 0) is the
flattest. At (1, 0.01) the sharp v caps the learning rate: with eta = 2 gradient descent diverges. IRE keeps eta = 1
and makes the step along the flat u longer: u1 = u0 (1 - (1 + kappa) eta v0^2).

What u can win is bounded, since v dies out meanwhile: with s = -log u and eta = 1 small steps follow
ds/dt = (1 + kappa) v^2 and d(v^2)/dt = -4 s v^2. They conserve v^2 + 2 s^2 / (1 + kappa), so that u stops at
exp(-v0 sqrt((1 + kappa) / 2)): only a kappa of the order of 1 / v0^2 comes near 0.
"""
import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.animation import FuncAnimation

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ire import SGDIRE, sampled_mse
from toy.common import BLACK, BLUE, GREY, ORANGE, RED, STYLE, output_path, save

U0, V0, STEPS, NEAR = 1.0, 0.01, 300, 0.1
RUNS = {  # label: (eta, kappa, color, line)
    "GD, η = 2": (2, 0, GREY, {"linestyle": "--", "linewidth": 1.5}),
    "GD, η = 1": (1, 0, BLACK, {"linewidth": 4}),
    "IRE, κ = 90": (1, 90, BLUE, {}),
    "IRE, κ = 900": (1, 900, ORANGE, {}),
    "IRE, κ = 9000": (1, 9000, RED, {}),
}


def root(theta):
    u, v = theta.unbind()
    return (1 + u * u).sqrt() * v  # L = root^2 / 2 is least squares, whose probe is sampled_mse


def descend(eta, kappa):
    """The path (steps + 1, 2) of theta = (u, v), cut where it has diverged."""
    theta = torch.tensor([U0, V0], dtype=torch.float64, requires_grad=True)
    opt = SGDIRE([theta], lr=eta, kappa=kappa, gamma=0.5)  # one of two coordinates is flat
    path = [theta.detach().clone()]
    while len(path) <= STEPS and path[-1].abs().max() < 1e3:
        if opt.probe_due:
            with opt.probe():
                sampled_mse(root(theta)).backward()
        opt.zero_grad()
        (root(theta) ** 2 / 2).backward()
        opt.step()
        path.append(theta.detach().clone())
    return torch.stack(path)


def measure():
    torch.manual_seed(0)
    numbers = {}
    for label, (eta, kappa, *_) in RUNS.items():
        path = descend(eta, kappa)
        near = (path[:, 0].abs() < NEAR).nonzero().flatten().tolist()
        numbers[label] = {
            "path": path, "diverged": len(path) <= STEPS, "steps": near[0] if near else math.inf,
            "first": path[1, 0].item(), "first_theory": U0 * (1 - (1 + kappa) * eta * V0**2),
            "last": path[-1, 0].item(), "last_theory": math.exp(-V0 * math.sqrt((1 + kappa) / 2)),
        }
    return numbers


def draw(numbers):
    plt.rcParams.update(STYLE)
    figure, axes = plt.subplot_mosaic([["map", "u"], ["map", "trace"]], figsize=(7, 4.6), width_ratios=[1.15, 1])
    u, v = torch.meshgrid(torch.linspace(-0.22, 1.12, 200), torch.linspace(-0.032, 0.032, 200), indexing="xy")
    axes["map"].contourf(u, v, torch.log10((1 + u * u) * v * v / 2 + 1e-6), 12, cmap="Greys", alpha=0.3)
    axes["map"].plot(0, 0, "*", color=BLACK, markersize=15, zorder=5)
    axes["map"].text(-0.1, 0.004, "flattest\nminimum")
    axes["map"].plot(U0, V0, "o", color=BLACK, markersize=7, zorder=5)
    axes["map"].text(0.97, 0.0125, "start", ha="right")
    for label, (_, _, color, style) in RUNS.items():
        u, v = numbers[label]["path"].T
        axes["map"].plot(u, v, color=color, marker=".", **{**style, "linewidth": 1.2})
        axes["u"].plot(u.abs(), color=color, **style)
        axes["trace"].plot(1 + u * u, color=color, label=label, **style)
    axes["map"].set(xlim=(-0.22, 1.12), ylim=(-0.032, 0.032), xlabel="u  (flat)", ylabel="v  (sharp)",
                    title="L = (1 + u²) v² / 2", xticks=[0, 0.5, 1], yticks=[-0.03, -0.01, 0, 0.01, 0.03])
    axes["map"].grid(False)
    for name in ("u", "trace"):
        axes[name].set_xscale("symlog", linthresh=1)
        axes[name].set(xlim=(0, STEPS), xticks=[0, 1, 10, 100], xticklabels=["0", "1", "10", "100"])
    axes["u"].axhline(NEAR, color=GREY, linestyle=":", linewidth=1.2)
    axes["u"].set(yscale="log", ylim=(0.004, 2.5), ylabel="|u|")
    axes["trace"].set(ylim=(0.9, 2.3), xlabel="step", ylabel="Tr(H) = 1 + u²")
    figure.legend(*axes["trace"].get_legend_handles_labels(), loc="upper center", ncol=5, columnspacing=1)
    figure.tight_layout(rect=(0, 0, 1, 0.94), h_pad=0.8)
    return figure


def animate(figure):
    """The figure of `draw`, each run up to a step: single ones first, then faster and faster."""
    runs = [(line, *line.get_data()) for ax in figure.axes for line in ax.lines if len(line.get_xdata()) > 2]

    def show(step):
        for line, x, y in runs:
            line.set_data(x[:step + 1], y[:step + 1])

    frames = [*range(10), *(round(10 * 1.3**i) for i in range(13)), STEPS, STEPS, STEPS]
    return FuncAnimation(figure, show, frames, interval=500)


def main(argv=None):
    out = output_path(__doc__, "valley", argv)
    numbers = measure()
    print(f"{'':13} | steps to |u| < {NEAR} | u after one step (theory)  | u at the end (small-step law)")
    for label, n in numbers.items():
        steps = "diverges" if n["diverged"] else "never" if n["steps"] == math.inf else n["steps"]
        last = "" if n["diverged"] else f"{n['last']:.4f} ({n['last_theory']:.4f})"
        print(f"{label:13} | {steps:>18} | {n['first']:.6f} ({n['first_theory']:.6f})        | {last}")
    print(f"theory: one step is enough from kappa = {(U0 - NEAR) / V0**2 - 1:.0f}")
    figure = draw(numbers)
    save(figure, out)
    save(animate(figure), out.with_suffix(".gif"))
    return numbers


if __name__ == "__main__":
    main()
