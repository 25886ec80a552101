"""How large may kappa be? On a quadratic IRE is stable up to the curvature of the sharpest coordinate called flat.

    python toy/quadratic.py               # results/toy-quadratic.png

The eigenvalues of H span five decades. Gradient descent with IRE makes the step theta - eta D H theta with
D = 1 + kappa * flat, which contracts exactly when eta * lambda_max(D^1/2 H D^1/2) < 2. Where the axes are H's
eigenvectors and kappa > 0, that is kappa < kappa_max = 2 / (eta * lambda_flat_max) - 1. Seen here: that limit,
measured by bisection; what one wrong coordinate costs; and that in rotated axes a diagonal mask finds nothing flat.
"""
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ire import SGDIRE
from toy.common import BLACK, BLUE, GREEN, GREY, ORANGE, RED, STYLE, output_path, save

N, STEPS, ETA, GAMMA = 20, 2000, 1.0, 0.7
ETAS, GAMMAS, WRONG = (0.3, 1.0, 1.8), (0.3, 0.5, 0.7, 0.9), range(6)
LAMBDA = torch.logspace(0, -5, N, dtype=torch.float64)  # sharpest first, so the last floor(gamma * N) axes are flat


def descend(hessian, theta, eta, kappa, gamma, flat=None, steps=STEPS):
    """The path (steps + 1, N) of gradient descent with IRE, its mask from the exact diagonal unless `flat` is given."""
    theta = theta.clone().requires_grad_()
    opt = SGDIRE([theta], lr=eta, kappa=kappa, gamma=gamma, interval=steps)
    with opt.probe():
        (hessian.diagonal() @ theta).backward()  # a gradient that is the curvature: ranked without sampling noise
    if flat is not None:
        opt.state[theta]["flat"] = flat
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
        low, high = (middle, high) if stable(middle) else (low, middle)
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


def flattest(curvature, gamma, wrong=0, worst=False):
    """The mask of Eq. 5, or one in which `wrong` flat and sharp coordinates have changed places: those nearest to the
    threshold, or the sharpest and the flattest of all."""
    order, k = curvature.argsort(), round(gamma * N)
    flat = torch.zeros(N, dtype=torch.bool)
    flat[order[:k]] = True
    if wrong:
        flat[order[:wrong] if worst else order[k - wrong:k]] = False
        flat[order[-wrong:] if worst else order[k:k + wrong]] = True
    return flat


def measure():
    torch.manual_seed(0)
    axes = torch.linalg.qr(torch.randn(N, N, dtype=torch.float64)).Q
    aligned, rotated = LAMBDA.diag(), axes @ LAMBDA.diag() @ axes.T
    ones = torch.ones(N, dtype=torch.float64)  # the start, in every eigendirection

    def law(eta, flat):
        return (2 / (eta * LAMBDA[flat].max()) - 1).item()

    limits = [(eta, gamma, measured_limit(aligned, ones, eta, gamma), law(eta, flattest(LAMBDA, gamma)))
              for eta in ETAS for gamma in GAMMAS]
    wrong = {kind: [(measured_limit(aligned, ones, ETA, GAMMA, flat), law(ETA, flat))
                    for flat in (flattest(LAMBDA, GAMMA, m, kind == "worst") for m in WRONG)]
             for kind in ("nearest", "worst")}
    turned = (measured_limit(rotated, axes @ ones, ETA, GAMMA),
              exact_limit(rotated, ETA, flattest(rotated.diagonal(), GAMMA)))
    paths = {  # of the coordinates along the eigenvectors
        "GD": descend(aligned, ones, ETA, 0, GAMMA),
        "IRE": descend(aligned, ones, ETA, 0.9 * law(ETA, flattest(LAMBDA, GAMMA)), GAMMA),
        "IRE, rotated axes": descend(rotated, axes @ ones, ETA, 0.9 * turned[1], GAMMA) @ axes,
    }
    return {"limits": limits, "wrong": wrong, "rotated": turned, "paths": paths,
            "loss": {label: (LAMBDA * path**2).sum(1) / 2 for label, path in paths.items()},
            "error": max(abs(measured / theory - 1) for *_, measured, theory in limits)}


def draw(numbers):
    plt.rcParams.update(STYLE)
    figure, ((loss, progress), (limits, wrong)) = plt.subplots(2, 2, figsize=(7, 6.2))
    lines = {"GD": (BLACK, "-"), "IRE": (BLUE, "-"), "IRE, rotated axes": (ORANGE, "--")}
    for label, (color, line) in lines.items():
        loss.plot(range(1, STEPS + 2), numbers["loss"][label], color=color, linestyle=line, label=label)
        progress.plot(LAMBDA, 1 - numbers["paths"][label][-1].abs(), color=color, linestyle=line, marker="o",
                      markersize=4)
    loss.set(xscale="log", yscale="log", xlabel="step + 1", ylabel="loss", title="The loss")
    loss.legend(loc="lower left", borderaxespad=0.2)
    progress.set(xscale="log", xlabel="eigenvalue λ", ylabel="distance covered",
                 title=f"Each eigendirection, {STEPS} steps")

    diagonal = [1, 1e5]
    limits.plot(diagonal, diagonal, color=GREY, linewidth=1, label="theory")
    for eta, color, marker in zip(ETAS, (GREEN, BLUE, RED), "osD"):
        points = [(theory, found) for e, _, found, theory in numbers["limits"] if e == eta]
        limits.plot(*zip(*points), marker, color=color, markersize=6, label=f"η = {eta:g}")
    limits.set(xscale="log", yscale="log", xlabel="κ_max = 2 / (η λ_flat_max) − 1", ylabel="measured limit of κ",
               title=f"The limit, γ = {GAMMAS[0]} … {GAMMAS[-1]}")
    limits.legend(loc="upper left", borderaxespad=0.2)

    wrong.axhline(numbers["rotated"][0], color=ORANGE, linestyle="--", label="rotated axes")
    kinds = (("nearest", BLUE, "o", "nearest to threshold"), ("worst", RED, "D", "the sharpest"))
    for kind, color, marker, label in kinds:
        found, theory = zip(*numbers["wrong"][kind])
        wrong.plot(WRONG, theory, color=color, linewidth=1)
        wrong.plot(WRONG, found, marker, color=color, markersize=6, label=label)
    wrong.set(yscale="log", ylim=(0.7, 900), xlabel=f"wrong coordinates of {round(GAMMA * N)}",
              ylabel="measured limit of κ", title=f"A wrong mask, η = {ETA:g}")
    wrong.legend(loc="upper right", borderaxespad=0.2)
    figure.tight_layout(h_pad=1.2)
    return figure


def main(argv=None):
    out = output_path(__doc__, "quadratic", argv)
    numbers = measure()
    print("eta  gamma | largest stable kappa: measured, theory")
    for eta, gamma, found, theory in numbers["limits"]:
        print(f"{eta:<4} {gamma:<5} | {found:10.4g} {theory:10.4g}")
    for kind in numbers["wrong"]:
        print(f"{kind} wrong: " + ", ".join(f"{m}: {found:.3g} ({theory:.3g})"
                                            for m, (found, theory) in zip(WRONG, numbers["wrong"][kind])))
    print("rotated axes: {:.4g} ({:.4g})".format(*numbers["rotated"]))
    print("loss after {} steps: ".format(STEPS) + ", ".join(f"{k} {x[-1]:.2g}" for k, x in numbers["loss"].items()))
    print(f"kappa_max: measured and theory differ by at most {numbers['error']:.2%}")
    save(draw(numbers), out)
    return numbers


if __name__ == "__main__":
    main()
