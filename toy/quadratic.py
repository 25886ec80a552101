"""How large may kappa be? On a quadratic: up to the sharpest coordinate that is called flat.

    python toy/quadratic.py               # results/toy-quadratic.png

The eigenvalues of H span five decades. Gradient descent with IRE makes the step
theta - eta D H theta with D = 1 + kappa * flat, which contracts exactly when
eta * lambda_max(D^1/2 H D^1/2) < 2. Where the axes are H's eigenvectors and kappa > 0, that is
kappa < kappa_max = 2 / (eta * lambda_flat_max) - 1. Seen here: that limit, measured by bisection;
what one wrong coordinate costs; and that in rotated axes a diagonal mask finds nothing flat.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ire import SGDIRE
from toy.common import BLACK, BLUE, GREEN, GREY, ORANGE, RED, STYLE, output_path, save

N = 20
STEPS = 2000
ETA = 1.0
GAMMA = 0.7
# what is scanned: learning rates, flat fractions, how many coordinates of the mask are wrong
ETAS = (0.3, 1.0, 1.8)
GAMMAS = (0.3, 0.5, 0.7, 0.9)
WRONG = range(6)
# sharpest first, so that the last floor(gamma * N) axes are flat
LAMBDA = torch.logspace(0, -5, N, dtype=torch.float64)


def descend(hessian, theta, eta, kappa, gamma, flat=None, steps=STEPS):
    """The path (steps + 1, N) of gradient descent with IRE, its mask from the exact diagonal of
    `hessian` (N, N) unless `flat` is given."""
    theta = theta.clone().requires_grad_()
    settings = {"kappa": kappa, "gamma": gamma, "interval": steps, "curvature": "fisher"}
    opt = SGDIRE([theta], lr=eta, **settings)
    with opt.probe():
        # a gradient that is the curvature: ranked without sampling noise
        (hessian.diagonal() @ theta).backward()
    if flat is not None:
        opt.masks[theta] = flat
    path = [theta.detach().clone()]
    for _ in range(steps):
        theta.grad = hessian @ theta.detach()
        opt.step()
        path.append(theta.detach().clone())
    return torch.stack(path)


def largest(stable, low=0.1, high=1e5):
    """Bisection: the largest kappa that is stable, to 0.2%."""
    while high / low > 1.002:
        middle = (low * high) ** 0.5
        if stable(middle):
            low = middle
        else:
            high = middle
    return low


def measured_limit(hessian, theta, eta, gamma, flat=None):
    def stable(kappa):
        path = descend(hessian, theta, eta, kappa, gamma, flat, steps=200)
        return path[-1].abs().max() < path[0].abs().max()

    return largest(stable)


def exact_limit(hessian, eta, flat):
    """Where eta * lambda_max(D^1/2 H D^1/2) = 2, for any axes."""

    def stable(kappa):
        root = (1 + kappa * flat).sqrt()
        return eta * torch.linalg.eigvalsh(root[:, None] * hessian * root)[-1] < 2

    return largest(stable)


def law(eta, flat):
    """kappa_max, where the axes are the eigenvectors."""
    return (2 / (eta * LAMBDA[flat].max()) - 1).item()


def flattest(curvature, gamma, wrong=0, worst=False):
    """The mask of Eq. 5, or one in which `wrong` flat and sharp coordinates have changed places:
    those nearest to the threshold, or the sharpest and the flattest of all."""
    order = curvature.argsort()
    k = round(gamma * N)
    flat = torch.zeros(N, dtype=torch.bool)
    flat[order[:k]] = True
    if wrong and worst:
        flat[order[:wrong]] = False
        flat[order[-wrong:]] = True
    elif wrong:
        flat[order[k - wrong : k]] = False
        flat[order[k : k + wrong]] = True
    return flat


def wrong_masks(aligned, start):
    """The limit of kappa, measured and in theory, for each number of wrong coordinates."""
    limits = {"nearest": [], "worst": []}
    for kind, pairs in limits.items():
        for m in WRONG:
            flat = flattest(LAMBDA, GAMMA, m, kind == "worst")
            pairs.append((measured_limit(aligned, start, ETA, GAMMA, flat), law(ETA, flat)))
    return limits


def measure():
    torch.manual_seed(0)
    axes = torch.linalg.qr(torch.randn(N, N, dtype=torch.float64)).Q
    aligned = LAMBDA.diag()
    rotated = axes @ LAMBDA.diag() @ axes.T
    ones = torch.ones(N, dtype=torch.float64)  # the start, in every eigendirection
    limits = []
    for eta in ETAS:
        for gamma in GAMMAS:
            theory = law(eta, flattest(LAMBDA, gamma))
            limits.append((eta, gamma, measured_limit(aligned, ones, eta, gamma), theory))
    found = measured_limit(rotated, axes @ ones, ETA, GAMMA)
    exact = exact_limit(rotated, ETA, flattest(rotated.diagonal(), GAMMA))
    kappa = 0.9 * law(ETA, flattest(LAMBDA, GAMMA))
    turned = descend(rotated, axes @ ones, ETA, 0.9 * exact, GAMMA)
    paths = {  # of the coordinates along the eigenvectors, (STEPS + 1, N)
        "GD": descend(aligned, ones, ETA, 0, GAMMA),
        "IRE": descend(aligned, ones, ETA, kappa, GAMMA),
        "IRE, rotated axes": turned @ axes,
    }
    return {
        "limits": limits,
        "wrong": wrong_masks(aligned, ones),
        "rotated": (found, exact),
        "paths": paths,
        "loss": {label: (LAMBDA * path**2).sum(1) / 2 for label, path in paths.items()},
        "error": max(abs(measured / theory - 1) for *_, measured, theory in limits),
    }


def draw_paths(numbers, loss, progress):
    lines = {"GD": (BLACK, "-"), "IRE": (BLUE, "-"), "IRE, rotated axes": (ORANGE, "--")}
    for label, (color, line) in lines.items():
        curve = numbers["loss"][label]
        covered = 1 - numbers["paths"][label][-1].abs()
        loss.plot(range(1, STEPS + 2), curve, line, color=color, label=label)
        progress.plot(LAMBDA, covered, line, color=color, marker="o", markersize=4)
    loss.set(xscale="log", yscale="log", xlabel="step + 1", ylabel="loss", title="The loss")
    loss.legend(loc="lower left", borderaxespad=0.2)
    progress.set(xscale="log", xlabel="eigenvalue λ", ylabel="distance covered")
    progress.set_title(f"Each eigendirection, {STEPS} steps")


def draw_limits(numbers, ax):
    diagonal = [1, 1e5]
    ax.plot(diagonal, diagonal, color=GREY, linewidth=1, label="theory")
    for eta, color, marker in zip(ETAS, (GREEN, BLUE, RED), "osD", strict=True):
        rows = [row for row in numbers["limits"] if row[0] == eta]
        theory = [row[3] for row in rows]
        found = [row[2] for row in rows]
        ax.plot(theory, found, marker, color=color, markersize=6, label=f"η = {eta:g}")
    ax.set(xscale="log", xlabel="κ_max = 2 / (η λ_flat_max) − 1")
    ax.set(yscale="log", ylabel="measured limit of κ")
    ax.set_title(f"The limit, γ = {GAMMAS[0]} … {GAMMAS[-1]}")
    ax.legend(loc="upper left", borderaxespad=0.2)


def draw_wrong(numbers, ax):
    ax.axhline(numbers["rotated"][0], color=ORANGE, linestyle="--", label="rotated axes")
    kinds = (("nearest", BLUE, "o", "nearest to threshold"), ("worst", RED, "D", "the sharpest"))
    for kind, color, marker, label in kinds:
        found, theory = zip(*numbers["wrong"][kind], strict=True)
        ax.plot(WRONG, theory, color=color, linewidth=1)
        ax.plot(WRONG, found, marker, color=color, markersize=6, label=label)
    ax.set(xlabel=f"wrong coordinates of {round(GAMMA * N)}")
    ax.set(yscale="log", ylim=(0.7, 900), ylabel="measured limit of κ")
    ax.set_title(f"A wrong mask, η = {ETA:g}")
    ax.legend(loc="upper right", borderaxespad=0.2)


def draw(numbers):
    plt.rcParams.update(STYLE)
    figure, ((loss, progress), (limits, wrong)) = plt.subplots(2, 2, figsize=(7, 6.2))
    draw_paths(numbers, loss, progress)
    draw_limits(numbers, limits)
    draw_wrong(numbers, wrong)
    figure.tight_layout(h_pad=1.2)
    return figure


def main(argv=None):
    out = output_path(__doc__, "quadratic", argv)
    numbers = measure()
    print("eta  gamma | largest stable kappa: measured, theory")
    for eta, gamma, found, theory in numbers["limits"]:
        print(f"{eta:<4} {gamma:<5} | {found:10.4g} {theory:10.4g}")
    for kind, pairs in numbers["wrong"].items():
        cells = [f"{m}: {a:.3g} ({b:.3g})" for m, (a, b) in zip(WRONG, pairs, strict=True)]
        print(f"{kind} wrong: {', '.join(cells)}")
    print("rotated axes: {:.4g} ({:.4g})".format(*numbers["rotated"]))
    ends = [f"{label} {curve[-1]:.2g}" for label, curve in numbers["loss"].items()]
    print(f"loss after {STEPS} steps: {', '.join(ends)}")
    print(f"kappa_max: measured and theory differ by at most {numbers['error']:.2%}")
    save(draw(numbers), out)
    return numbers


if __name__ == "__main__":
    main()
