"""Training goes to the edge of stability. With IRE it is the amplified Hessian that goes there.

    python toy/edge_of_stability.py       # draws results/toy-edge_of_stability.png

A small tanh network learns a polynomial by full-batch gradient descent and by Adam, each with and
without IRE. The step is theta - eta D P^-1 g, with D = 1 + kappa * flat, and P = 1 or Adam's
sqrt(v). It is stable while the sharpness lambda_max(D^1/2 P^-1/2 H P^-1/2 D^1/2) is below 2 / eta,
or below (2 + 2 beta1) / ((1 - beta1) eta) with Adam's momentum (Cohen et al., 2021 and 2022).

All four runs end near this limit, those with Adam about 5% below it. As D >= 1, gradient descent
with IRE gets there at a lambda_max(H) below that of gradient descent. The masks are from
the exact curvature, without the noise of a sampled probe.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.func import hessian, jacrev

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ire import SGDIRE, AdmIRE
from toy.common import BLACK, BLUE, GREY, STYLE, network, output_path, save

KAPPA = 2
GAMMA = 0.8
BETA1 = 0.9
BETA2 = 0.95
EVERY = 20  # steps between two Hessians
X = torch.linspace(-1, 1, 24, dtype=torch.float64)[:, None]  # (samples, 1)
TARGET = 8 * X**4 - 8 * X**2 + 1
RUNS = {  # label: (Adam, kappa)
    "GD": (False, 0),
    "GD-IRE": (False, KAPPA),
    "Adam": (True, 0),
    "AdmIRE": (True, KAPPA),
}
# by "Adam": the learning rate, the number of steps, the limit of the sharpness
ETA = {False: 0.2, True: 0.01}
STEPS = {False: 1400, True: 700}
LIMIT = {False: 2 / ETA[False], True: (2 + 2 * BETA1) / ((1 - BETA1) * ETA[True])}


def train(adam, kappa):
    """By name a list of numbers, each EVERY steps: the step, the sharpness over its limit, and
    lambda_max(H)."""
    torch.manual_seed(0)
    predict, theta = network(1, 12, 12, 1)
    theta.requires_grad_()  # (parameters,)
    settings = {"lr": ETA[adam], "kappa": kappa, "gamma": GAMMA, "curvature": "fisher"}
    if adam:
        opt = AdmIRE([theta], betas=(BETA1, BETA2), weight_decay=0, **settings)
    else:
        opt = SGDIRE([theta], **settings)

    def loss(theta):
        return (predict(theta, X) - TARGET).square().mean() / 2

    curves = {"step": [], "edge": [], "lambda_max": []}
    for step in range(1, STEPS[adam] + 1):
        if kappa and opt.probe_due:
            jacobian = jacrev(predict)(theta.detach(), X)  # (samples, 1, parameters)
            with opt.probe():  # a gradient whose square is the Gauss-Newton diagonal
                (jacobian.square().sum((0, 1)).sqrt() @ theta).backward()
        opt.zero_grad()
        loss(theta).backward()
        opt.step()
        if step % EVERY == 0:
            scale = torch.ones_like(theta.detach())
            if kappa:
                scale = scale + kappa * opt.masks[theta]
            if adam:
                second_moment = opt.state[theta]["exp_avg_sq"] / (1 - BETA2**step)
                scale = scale / second_moment.sqrt()
            H = hessian(loss)(theta.detach())
            amplified = scale.sqrt()[:, None] * H * scale.sqrt()
            sharpness = torch.linalg.eigvalsh(amplified)[-1].item()
            curves["step"].append(step)
            curves["edge"].append(sharpness / LIMIT[adam])
            curves["lambda_max"].append(torch.linalg.eigvalsh(H)[-1].item())
    return curves


def second_half(curve):
    """The mean of the second half of a run, when all runs have reached the edge."""
    late = curve[len(curve) // 2 :]
    return sum(late) / len(late)


def measure():
    numbers = {}
    for label, (adam, kappa) in RUNS.items():
        curves = train(adam, kappa)
        numbers[label] = {
            "curves": curves,
            "edge": second_half(curves["edge"]),
            "lambda_max": second_half(curves["lambda_max"]),
        }
    return numbers


def draw(numbers):
    plt.rcParams.update(STYLE)
    figure, axes = plt.subplots(2, 1, figsize=(5, 5.5), layout="constrained")
    for label, (adam, kappa) in RUNS.items():
        curves = numbers[label]["curves"]
        ax = axes[int(adam)]
        ax.plot(curves["step"], curves["edge"], color=BLUE if kappa else BLACK, label=label)
    titles = ("gradient descent, limit 2 / η", f"Adam, limit {LIMIT[True] * ETA[True]:.0f} / η")
    for ax, title in zip(axes, titles, strict=True):
        ax.axhline(1, color=GREY, linestyle=":", label="the limit")
        ax.set(ylim=(0, 1.5), ylabel="sharpness / limit", title=title)
        ax.legend(loc="lower right")
    axes[1].set_xlabel("step")
    return figure


def main(argv=None):
    out = output_path(__doc__, "edge_of_stability", 10, argv)
    numbers = measure()
    print("means of the second half of each run")
    for label, n in numbers.items():
        print(f"{label:6} | sharpness / limit {n['edge']:.3f} | lambda_max {n['lambda_max']:.2f}")
    save(draw(numbers), out)
    return numbers


if __name__ == "__main__":
    main()
