"""How large may kappa be? On a quadratic: up to the limit of the sharpest coordinate that counts as
flat.

    python toy/quadratic.py               # draws results/toy-quadratic.png

The eigenvalues of H span five decades. Gradient descent with IRE makes the step
theta - eta D H theta with D = 1 + kappa * flat. If the axes are H's eigenvectors, the steps shrink
theta while kappa < kappa_max = 2 / (eta * lambda_flat_max) - 1. Here this limit is measured by
bisection: for the right mask, for masks with wrong coordinates, and in rotated axes, where a mask
of coordinates finds nothing flat.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ire import SGDIRE
from toy.common import BLUE, GREEN, GREY, ORANGE, RED, STYLE, output_path, save

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
    """The path (steps + 1, N) of gradient descent with IRE. Its mask is from the exact diagonal of
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


def measured_limit(hessian, theta, eta, gamma, flat=None):
    """The largest kappa that is stable for 200 steps, to 0.2%, by bisection."""
    low = 0.1
    high = 1e5
    while high / low > 1.002:
        middle = (low * high) ** 0.5
        path = descend(hessian, theta, eta, middle, gamma, flat, steps=200)
        if path[-1].abs().max() < path[0].abs().max():
            low = middle
        else:
            high = middle
    return low


def law(eta, flat):
    """kappa_max, where the axes are the eigenvectors."""
    return (2 / (eta * LAMBDA[flat].max()) - 1).item()


def flattest(curvature, gamma, wrong=0, worst=False):
    """The mask of Eq. 5. With `wrong` = m, m flat and m sharp coordinates change places: those
    nearest to the threshold or, if `worst`, the sharpest and the flattest of all."""
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


def measure():
    torch.manual_seed(0)
    axes = torch.linalg.qr(torch.randn(N, N, dtype=torch.float64)).Q
    aligned = LAMBDA.diag()
    rotated = axes @ LAMBDA.diag() @ axes.T
    start = torch.ones(N, dtype=torch.float64)  # in every eigendirection
    limits = []
    for eta in ETAS:
        for gamma in GAMMAS:
            theory = law(eta, flattest(LAMBDA, gamma))
            limits.append((eta, gamma, measured_limit(aligned, start, eta, gamma), theory))
    wrong = {"nearest": [], "worst": []}
    for kind, pairs in wrong.items():
        for m in WRONG:
            flat = flattest(LAMBDA, GAMMA, m, kind == "worst")
            pairs.append((measured_limit(aligned, start, ETA, GAMMA, flat), law(ETA, flat)))
    turned = measured_limit(rotated, axes @ start, ETA, GAMMA)
    # the same flat fraction; kappa at nine tenths of each limit
    runs = {
        "GD": descend(aligned, start, ETA, 0, GAMMA),
        "IRE": descend(aligned, start, ETA, 0.9 * wrong["nearest"][0][1], GAMMA),
        "IRE, rotated axes": descend(rotated, axes @ start, ETA, 0.9 * turned, GAMMA) @ axes,
    }
    return {
        "limits": limits,  # (eta, gamma, measured, theory)
        "wrong": wrong,  # pairs of measured, theory
        "rotated": (turned, law(ETA, flattest(LAMBDA, GAMMA))),  # measured, in the eigenvectors
        "loss": {label: (LAMBDA * path**2).sum(1) / 2 for label, path in runs.items()},
    }


def draw(numbers):
    plt.rcParams.update(STYLE)
    figure, (limits, wrong) = plt.subplots(2, 1, figsize=(5, 7.5), layout="constrained")
    limits.plot([1, 1e5], [1, 1e5], color=GREY, linewidth=1, label="theory")
    for eta, color, marker in zip(ETAS, (GREEN, BLUE, RED), "osD", strict=True):
        rows = [row for row in numbers["limits"] if row[0] == eta]
        theory = [row[3] for row in rows]
        found = [row[2] for row in rows]
        limits.plot(theory, found, marker, color=color, label=f"η = {eta:g}")
    limits.set(xscale="log", xlabel="κ_max = 2 / (η λ_flat_max) − 1")
    limits.set(yscale="log", ylabel="measured limit of κ")
    limits.set_title(f"The right mask, γ = {GAMMAS[0]} … {GAMMAS[-1]}")
    limits.legend(loc="upper left")
    wrong.axhline(numbers["rotated"][0], color=ORANGE, linestyle="--", label="rotated axes")
    for kind, color, label in (
        ("nearest", BLUE, "those nearest to the threshold"),
        ("worst", RED, "the sharpest"),
    ):
        found, theory = zip(*numbers["wrong"][kind], strict=True)
        wrong.plot(WRONG, theory, color=color, linewidth=1)
        wrong.plot(WRONG, found, "o", color=color, label=label)
    wrong.set(xlabel=f"wrong coordinates, of {round(GAMMA * N)} flat ones")
    wrong.set(yscale="log", ylim=(0.7, 900), ylabel="measured limit of κ")
    wrong.set_title(f"A wrong mask, η = {ETA:g}, γ = {GAMMA}. Lines: theory")
    wrong.legend(loc="upper right")
    return figure


def main(argv=None):
    out = output_path(__doc__, "quadratic", 10, argv)
    numbers = measure()
    print("The largest stable kappa, measured (theory)")
    for eta, gamma, found, theory in numbers["limits"]:
        print(f"eta {eta:<3}, gamma {gamma:<3}: {found:.4g} ({theory:.4g})")
    for kind, pairs in numbers["wrong"].items():
        cells = [f"{found:.3g} ({theory:.3g})" for found, theory in pairs]
        print(f"{kind} coordinates wrong, 0 to {WRONG[-1]} of them: {', '.join(cells)}")
    print("rotated axes: {:.3g} instead of {:.3g}".format(*numbers["rotated"]))
    for label, curve in numbers["loss"].items():
        print(f"loss after {STEPS} steps, {label}: {curve[-1]:.2g}")
    save(draw(numbers), out)
    return numbers


if __name__ == "__main__":
    main()
