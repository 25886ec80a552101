"""Training goes to the edge of stability; with IRE it is the amplified Hessian that goes there.

    python toy/edge_of_stability.py       # results/toy-edge_of_stability.png

A small tanh network learns a polynomial by full-batch gradient descent and Adam, each without and with IRE. A step
theta - eta D P^-1 g, with D = 1 + kappa * flat and P = 1 or Adam's sqrt(v), is stable while the sharpness
lambda_max(D^1/2 P^-1/2 H P^-1/2 D^1/2) stays below 2 / eta, or (2 + 2 beta1) / ((1 - beta1) eta) with Adam's
momentum (Cohen et al., 2021 and 2022). Seen: all four hover there, Adam's two about 5% below. As D >= 1, GD-IRE must
do so at a lambda_max(H) below GD's; Tr(H) follows here, but need not with Adam, whose P moves too. The masks are
exact: with those of the sampled probe, which change by chance each time, the edge gets ragged, AdmIRE stays well below
it, and GD-IRE can be thrown out altogether (seed 2).

Towards the paper's open question, why AdmIRE is fast: the last row splits the fall of the loss over the coordinates,
-dL_i = (the mean of g_i along the step) * step_i, and sums the flat and the sharp ones. With IRE the flat ones carry
more of it, in measure(seed) for each seed from 0 to 3.
"""
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.func import hessian, jacrev

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ire import SGDIRE, AdmIRE, sampled_mse
from toy.common import BLACK, BLUE, GREY, ORANGE, STYLE, network, output_path, save

KAPPA, GAMMA, EVERY, BETA1, BETA2 = 2, 0.8, 20, 0.9, 0.95
X = torch.linspace(-1, 1, 24, dtype=torch.float64)[:, None]
TARGET = 8 * X**4 - 8 * X**2 + 1
RUNS = {  # label: (column, kappa, is the mask exact)
    "GD": (0, 0, True), "GD-IRE": (0, KAPPA, True), "GD-IRE, sampled masks": (0, KAPPA, False),
    "Adam": (1, 0, True), "AdmIRE": (1, KAPPA, True), "AdmIRE, sampled masks": (1, KAPPA, False),
}
ETA, STEPS = (0.2, 0.01), (1400, 700)
LIMIT = (2 / ETA[0], (2 + 2 * BETA1) / ((1 - BETA1) * ETA[1]))


def train(column, kappa, exact, seed):
    """Curves over the steps, and by how much the split misses the fall of the loss."""
    torch.manual_seed(seed)
    predict, theta = network(1, 12, 12, 1)
    theta.requires_grad_()
    if column == 0:
        opt = SGDIRE([theta], lr=ETA[0], kappa=kappa, gamma=GAMMA)
    else:
        opt = AdmIRE([theta], lr=ETA[1], kappa=kappa, gamma=GAMMA, betas=(BETA1, BETA2), weight_decay=0)

    def loss(theta):
        return (predict(theta, X) - TARGET).square().mean() / 2

    def gradient(theta):
        theta = theta.detach().requires_grad_()
        return torch.autograd.grad(loss(theta), theta)[0]

    rows, fall, start, theta.grad = [], torch.zeros(2, dtype=torch.float64), loss(theta).item(), gradient(theta)
    for step in range(1, STEPS[column] + 1):
        if opt.probe_due and exact:  # a gradient whose square is the Gauss-Newton diagonal
            diagonal = jacrev(predict)(theta.detach(), X).square().sum((0, 1))
            with opt.probe():
                (diagonal.sqrt() @ theta).backward()
        elif opt.probe_due:
            with opt.probe():
                sampled_mse(predict(theta, X)).backward()
        old, before = theta.detach().clone(), theta.grad
        opt.step()
        new, flat = theta.detach(), opt.state[theta]["flat"]
        theta.grad = gradient(new)
        inside = sum(gradient(old + (1 + side / 5**0.5) / 2 * (new - old)) for side in (-1, 1))  # Gauss-Lobatto
        through = (old - new) * (before + 5 * inside + theta.grad) / 12
        fall = fall + torch.stack([through[flat].sum(), through[~flat].sum()])

        if step % EVERY == 0:
            H, scale = hessian(loss)(new), 1 + kappa * flat
            if column == 1:
                scale = scale / (opt.state[theta]["exp_avg_sq"] / (1 - BETA2**step)).sqrt()
            sharpness = torch.linalg.eigvalsh(scale.sqrt()[:, None] * H * scale.sqrt())[-1]
            rows.append([step, loss(new), sharpness / LIMIT[column], torch.linalg.eigvalsh(H)[-1], H.trace(), *fall])
    names = ("step", "loss", "edge", "lambda_max", "trace", "flat", "sharp")
    curves = dict(zip(names, torch.tensor(rows, dtype=torch.float64).T))
    return curves, (start - curves["loss"][-1] - fall.sum()).item()


def measure(seed=0):
    """Per run: its curves, and means over the second half, when all have reached the edge."""
    numbers = {}
    for label, (column, kappa, exact) in RUNS.items():
        curves, missed = train(column, kappa, exact, seed)
        late = {name: curve[len(curve) // 2:].mean().item() for name, curve in curves.items()}
        numbers[label] = {
            "curves": curves, "missed": missed, "edge": late["edge"], "lambda_max": late["lambda_max"],
            "trace": late["trace"],
            "flat": curves["flat"][-1].item(), "sharp": curves["sharp"][-1].item(),
        }
    return numbers


def draw(numbers):
    plt.rcParams.update(STYLE)
    figure, axes = plt.subplots(3, 2, figsize=(7, 7), sharex="col", sharey="row")
    for label, (column, kappa, exact) in RUNS.items():
        curves, (edge, trace, fall) = numbers[label]["curves"], axes[:, column]
        name, color, width, order = (("without IRE", BLACK, 1.8, 3) if not kappa else ("IRE", BLUE, 1.8, 4) if exact
                                     else ("IRE, sampled masks", ORANGE, 1, 2))
        edge.plot(curves["step"], curves["edge"], color=color, linewidth=width, zorder=order, label=name)
        trace.plot(curves["step"], curves["trace"], color=color, linewidth=width, zorder=order)
        if exact:
            fall.plot(curves["step"], curves["flat"], color=color, label="flat" if kappa else None)
            fall.plot(curves["step"], curves["sharp"], color=color, linestyle="--", label="sharp" if kappa else None)
    for edge, _, fall in axes.T:
        edge.axhline(1, color=GREY, linestyle=":", label="theory")
        edge.set(ylim=(0, 1.5))
        fall.set(xlabel="step", ylim=(-0.03, 0.2))
    axes[0, 0].set(title="gradient descent, limit 2 / η", ylabel="sharpness / limit")
    axes[0, 1].set(title=f"Adam, limit {LIMIT[1] * ETA[1]:.0f} / η")
    axes[1, 0].set(ylabel="Tr(H)")
    axes[2, 0].set(ylabel="fall of the loss through")
    axes[2, 0].legend(loc="lower right")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="upper center", ncol=4, columnspacing=1.2)
    figure.tight_layout(rect=(0, 0, 1, 0.96))
    return figure


def main(argv=None):
    out = output_path(__doc__, "edge_of_stability", argv)
    numbers = measure()
    print("means of the second half | sharpness / limit (theory 1) | lambda_max   Tr(H) | loss fell by flat, sharp")
    for label, n in numbers.items():
        print(f"{label:24} | {n['edge']:28.3f} | {n['lambda_max']:10.2f} {n['trace']:7.2f} | "
              f"{n['flat']:.3f}, {n['sharp']:.3f}")
    save(draw(numbers), out)
    return numbers


if __name__ == "__main__":
    main()
