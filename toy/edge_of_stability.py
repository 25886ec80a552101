"""Training goes to the edge of stability; with IRE it is the amplified Hessian that goes there.

    python toy/edge_of_stability.py       # results/toy-edge_of_stability.png

A small tanh network learns a polynomial by full-batch gradient descent and Adam, each without and
with IRE. A step theta - eta D P^-1 g, with D = 1 + kappa * flat and P = 1 or Adam's sqrt(v), is
stable while the sharpness lambda_max(D^1/2 P^-1/2 H P^-1/2 D^1/2) stays below 2 / eta, or
(2 + 2 beta1) / ((1 - beta1) eta) with Adam's momentum (Cohen et al., 2021 and 2022). Seen: all four
hover there, Adam's two about 5% below. As D >= 1, GD-IRE must do so at a lambda_max(H) below GD's;
Tr(H) follows here, but need not with Adam, whose P moves too. The masks are exact: with those of
the sampled probe, which change by chance each time, the edge gets ragged, AdmIRE stays well below
it, and GD-IRE can be thrown out altogether (seed 2).

Towards the paper's open question, why AdmIRE is fast: the last row splits the fall of the loss over
the coordinates, -dL_i = (the mean of g_i along the step) * step_i, and sums the flat and the sharp
ones. With IRE the flat ones carry more of it, in measure(seed) for each seed from 0 to 3.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.func import hessian, jacrev

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ire import SGDIRE, AdmIRE, sampled_mse
from toy.common import BLACK, BLUE, GREY, ORANGE, STYLE, network, output_path, save

KAPPA = 2
GAMMA = 0.8
BETA1 = 0.9
BETA2 = 0.95
EVERY = 20  # steps between two Hessians
X = torch.linspace(-1, 1, 24, dtype=torch.float64)[:, None]  # (samples, 1)
TARGET = 8 * X**4 - 8 * X**2 + 1
RUNS = {  # label: (column, kappa, is the mask exact)
    "GD": (0, 0, True),
    "GD-IRE": (0, KAPPA, True),
    "GD-IRE, sampled masks": (0, KAPPA, False),
    "Adam": (1, 0, True),
    "AdmIRE": (1, KAPPA, True),
    "AdmIRE, sampled masks": (1, KAPPA, False),
}
# by column: gradient descent, Adam
ETA = (0.2, 0.01)
STEPS = (1400, 700)
LIMIT = (2 / ETA[0], (2 + 2 * BETA1) / ((1 - BETA1) * ETA[1]))


class Training:
    """A network, its optimizer, and what its steps are measured by."""

    def __init__(self, column, kappa, seed):
        torch.manual_seed(seed)
        self.predict, theta = network(1, 12, 12, 1)
        self.theta = theta.requires_grad_()  # (parameters,)
        self.column = column
        self.kappa = kappa
        shared = {"lr": ETA[column], "kappa": kappa, "gamma": GAMMA, "curvature": "fisher"}
        if column == 0:
            self.opt = SGDIRE([theta], **shared)
        else:
            self.opt = AdmIRE([theta], betas=(BETA1, BETA2), weight_decay=0, **shared)
        theta.grad = self.gradient(theta)

    def loss(self, theta):
        return (self.predict(theta, X) - TARGET).square().mean() / 2

    def gradient(self, theta):
        theta = theta.detach().requires_grad_()
        return torch.autograd.grad(self.loss(theta), theta)[0]

    def probe(self, exact):
        group = self.opt.param_groups[0]
        group["kappa"] = KAPPA  # a group with kappa 0 gets no mask, and the split below wants one
        with self.opt.probe():
            if exact:  # a gradient whose square is the Gauss-Newton diagonal
                jacobian = jacrev(self.predict)(self.theta.detach(), X)  # (samples, 1, parameters)
                (jacobian.square().sum((0, 1)).sqrt() @ self.theta).backward()
            else:
                sampled_mse(self.predict(self.theta, X)).backward()
        group["kappa"] = self.kappa

    def step(self, exact):
        """One step; the fall of the loss through the flat and through the sharp coordinates."""
        if self.opt.probe_due:
            self.probe(exact)
        theta = self.theta
        old = theta.detach().clone()
        before = theta.grad
        self.opt.step()
        move = theta.detach() - old
        theta.grad = self.gradient(theta)
        # Gauss-Lobatto: the mean gradient along the step, from its ends and two points between
        inside = [self.gradient(old + (1 + side / 5**0.5) / 2 * move) for side in (-1, 1)]
        through = -move * (before + 5 * sum(inside) + theta.grad) / 12
        flat = self.opt.masks[theta]
        return torch.stack([through[flat].sum(), through[~flat].sum()])

    def sharpness(self, step):
        """The sharpness over its limit, lambda_max(H) and Tr(H)."""
        theta = self.theta.detach()
        H = hessian(self.loss)(theta)
        scale = 1 + self.kappa * self.opt.masks[self.theta]
        if self.column == 1:
            second_moment = self.opt.state[self.theta]["exp_avg_sq"] / (1 - BETA2**step)
            scale = scale / second_moment.sqrt()
        amplified = scale.sqrt()[:, None] * H * scale.sqrt()
        edge = torch.linalg.eigvalsh(amplified)[-1] / LIMIT[self.column]
        return edge, torch.linalg.eigvalsh(H)[-1], H.trace()


def train(column, kappa, exact, seed):
    """Curves over the steps, and by how much the split misses the fall of the loss."""
    run = Training(column, kappa, seed)
    start = run.loss(run.theta).item()
    fall = torch.zeros(2, dtype=torch.float64)
    rows = []
    for step in range(1, STEPS[column] + 1):
        fall = fall + run.step(exact)
        if step % EVERY == 0:
            rows.append([step, run.loss(run.theta.detach()), *run.sharpness(step), *fall])
    names = ("step", "loss", "edge", "lambda_max", "trace", "flat", "sharp")
    curves = dict(zip(names, torch.tensor(rows, dtype=torch.float64).T, strict=True))
    return curves, (start - curves["loss"][-1] - fall.sum()).item()


def measure(seed=0):
    """Per run: its curves, and means over the second half, when all have reached the edge."""
    numbers = {}
    for label, (column, kappa, exact) in RUNS.items():
        curves, missed = train(column, kappa, exact, seed)
        late = {name: curve[len(curve) // 2 :].mean().item() for name, curve in curves.items()}
        numbers[label] = {
            "curves": curves,
            "missed": missed,
            "edge": late["edge"],
            "lambda_max": late["lambda_max"],
            "trace": late["trace"],
            "flat": curves["flat"][-1].item(),
            "sharp": curves["sharp"][-1].item(),
        }
    return numbers


def look(kappa, exact):
    """How a run is drawn: its name and its line."""
    if not kappa:
        return "without IRE", {"color": BLACK, "linewidth": 1.8, "zorder": 3}
    if exact:
        return "IRE", {"color": BLUE, "linewidth": 1.8, "zorder": 4}
    return "IRE, sampled masks", {"color": ORANGE, "linewidth": 1, "zorder": 2}


def draw(numbers):
    plt.rcParams.update(STYLE)
    figure, axes = plt.subplots(3, 2, figsize=(7, 7), sharex="col", sharey="row")
    for label, (column, kappa, exact) in RUNS.items():
        curves = numbers[label]["curves"]
        edge, trace, fall = axes[:, column]
        name, line = look(kappa, exact)
        edge.plot(curves["step"], curves["edge"], label=name, **line)
        trace.plot(curves["step"], curves["trace"], **line)
        if exact:
            for part, style in (("flat", "-"), ("sharp", "--")):
                shown = part if kappa else None
                color = line["color"]
                fall.plot(curves["step"], curves[part], style, color=color, label=shown)
    for edge, _, fall in axes.T:
        edge.axhline(1, color=GREY, linestyle=":", label="theory")
        edge.set(ylim=(0, 1.5))
        fall.set(xlabel="step", ylim=(-0.03, 0.2))
    axes[0, 0].set(title="gradient descent, limit 2 / η", ylabel="sharpness / limit")
    axes[0, 1].set(title=f"Adam, limit {LIMIT[1] * ETA[1]:.0f} / η")
    axes[1, 0].set(ylabel="Tr(H)")
    axes[2, 0].set(ylabel="fall of the loss through")
    axes[2, 0].legend(loc="lower right")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncol=4, columnspacing=1.2)
    figure.tight_layout(rect=(0, 0, 1, 0.96))
    return figure


def main(argv=None):
    out = output_path(__doc__, "edge_of_stability", argv)
    numbers = measure()
    print("means of the second half, and by how much the loss fell through flat and sharp")
    print(f"{'':21} | sharpness / limit (theory 1) | lambda_max   Tr(H) | flat, sharp")
    for label, n in numbers.items():
        row = f"{label:21} | {n['edge']:28.3f} | {n['lambda_max']:10.2f} {n['trace']:7.2f} | "
        print(f"{row}{n['flat']:.3f}, {n['sharp']:.3f}")
    save(draw(numbers), out)
    return numbers


if __name__ == "__main__":
    main()
