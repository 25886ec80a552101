"""How good is the diagonal-Fisher mask? Compared with exact curvature on a network small enough to have it.

    python toy/mask.py                    # results/toy-mask.png

A probe (Eq. 6) squares one gradient g of a batch with sampled labels. Over the labels g_i has mean 0 and variance
G_i / B, G being the diagonal of the Gauss-Newton matrix; in large batches it is normal, so that B g_i^2 follows
G_i chi^2_1: right on average, but with relative noise sqrt(2) at any batch size. Averaging m probes gives
G_i chi^2_m / m. Seen: the overlap of the probes' flat sets with the exact one is what this predicts; more draws
sharpen it, larger batches do not; and the exact mask changes far more slowly than sampling makes the probe's jump.
"""
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch.func import grad, hessian, jacrev, vmap

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ire import SGDIRE, AdmIRE, sampled_cross_entropy
from toy.common import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, RED, STYLE, network, output_path, save

GAMMA, SAMPLES, CLASSES, STEPS, EVERY, REPEATS = 0.6, 256, 4, 600, 5, 16
BATCHES, DRAWS, LAGS = (1, 16, SAMPLES), (1, 4, 16, 64), (5, 10, 20, 50, 100, 200)


def flat_set(h):
    """ire.py's mask where the curvature is h."""
    theta = torch.zeros_like(h, requires_grad=True)
    opt = SGDIRE([theta], lr=0, kappa=0, gamma=GAMMA)
    with opt.probe():
        (h.abs().sqrt() @ theta).backward()  # a gradient whose square is h
    return opt.state[theta]["flat"]


def overlap(flat, true):
    """The part of the true flat set that is found; GAMMA by chance."""
    return ((flat & true).sum() / true.sum()).item()


def quality(h, exact):
    """Overlap of the flat sets and Spearman's rank correlation."""
    ranks = torch.stack([x.abs().argsort().argsort() for x in (h, exact)]).double()
    return overlap(flat_set(h), flat_set(exact)), torch.corrcoef(ranks)[0, 1].item()


def average(pairs):
    return tuple(torch.tensor(list(pairs)).mean(0).tolist())


def gauss_newton(predict, theta, x):
    """The diagonal of J^T (diag(p) - p p^T) J, mean over x: also that of the Fisher matrix."""
    J, p = jacrev(predict)(theta, x), predict(theta, x).softmax(-1)[..., None]  # (samples, classes, parameters)
    return ((p * J**2).sum(1) - (p * J).sum(1) ** 2).mean(0)


def train():
    """The network, halfway through its training by AdmIRE, and the exact flat set each EVERY steps on the way."""
    teacher, weights = network(8, 16, CLASSES)
    x = torch.randn(SAMPLES, 8, dtype=torch.float64) * torch.logspace(0, -1, 8)
    y = (teacher(3 * weights, x) + 0.3 * torch.randn(SAMPLES, CLASSES)).argmax(-1)
    predict, theta = network(8, 12, 12, CLASSES)
    opt = AdmIRE([theta.requires_grad_()], 3e-3, kappa=2, gamma=GAMMA, weight_decay=0)
    history = []
    for step in range(STEPS):
        batch = torch.randint(SAMPLES, (32,))
        if opt.probe_due:
            with opt.probe():
                sampled_cross_entropy(predict(theta, x[batch])).backward()
        opt.zero_grad()
        F.cross_entropy(predict(theta, x[batch]), y[batch]).backward()
        opt.step()
        if step % EVERY == 0:
            history.append(flat_set(gauss_newton(predict, theta.detach(), x)))
    return x, y, predict, theta, opt.state[theta]["exp_avg_sq"], history


def measure():
    torch.manual_seed(0)
    x, y, predict, theta, second_moment, history = train()
    here = theta.detach()
    G = gauss_newton(predict, here, x)

    def loss(theta, x, y):
        return F.cross_entropy(predict(theta, x), y)

    def draws(batch, m):
        """h of Eq. 6, averaged over m batches."""
        def gradient(x):
            return grad(lambda theta: sampled_cross_entropy(predict(theta, x)))(here)

        batches = torch.stack([torch.randperm(SAMPLES)[:batch] for _ in range(m)])
        return batch * vmap(gradient, randomness="different")(x[batches]).square().mean(0)

    def chi2(m):
        return G * torch.randn(m, len(G)).square().mean(0)

    def probe(seed):
        torch.manual_seed(seed)
        opt = SGDIRE([theta], lr=0, kappa=0, gamma=GAMMA)
        with opt.probe():
            sampled_cross_entropy(predict(theta, x)).backward()
        return opt.state[theta]["flat"]

    H = hessian(loss)(here, x, y).diagonal()
    per_sample = vmap(grad(loss), (None, 0, 0))(here, x[:, None], y[:, None]).square().mean(0)
    estimates = {
        f"1 probe, batch {SAMPLES}": lambda: draws(SAMPLES, 1), "16 probes, batch 16": lambda: draws(16, 16),
        "squared full gradient": lambda: grad(loss)(here, x, y).square(), "empirical Fisher": lambda: per_sample,
        "Adam's second moment": lambda: second_moment, "Gauss-Newton": lambda: G,
    }
    masks = [probe(seed) for seed in range(REPEATS)]
    return {
        "draws": {(batch, m): average(quality(draws(batch, m), G) for _ in range(REPEATS))
                  for batch in BATCHES for m in DRAWS},
        "theory": {m: average(quality(chi2(m), G) for _ in range(REPEATS)) for m in DRAWS},
        "estimates": {name: [average(quality(h(), exact) for _ in range(REPEATS)) for exact in (G, H)]
                      for name, h in estimates.items()},
        "probe": average((overlap(a, flat_set(G)), overlap(a, b)) for a, b in zip(masks, masks[1:])),
        "theory, two probes": average((overlap(flat_set(chi2(1)), flat_set(chi2(1))),) for _ in range(REPEATS))[0],
        "lags": {lag: average((overlap(a, b),) for a, b in zip(history, history[lag // EVERY:]))[0] for lag in LAGS},
    }


def draw(numbers):
    plt.rcParams.update(STYLE)
    figure = plt.figure(figsize=(7, 6.4), layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    axes = {**top.subplot_mosaic([["draws", "lags"]], sharey=True), "kinds": bottom.subplots()}
    for batch, color, marker in zip(BATCHES, (ORANGE, GREEN, BLUE), "v^o"):
        axes["draws"].plot(DRAWS, [numbers["draws"][batch, m][0] for m in DRAWS], marker, linestyle="-", color=color,
                           linewidth=1, label=f"batch {batch}")
    axes["draws"].plot(DRAWS, [numbers["theory"][m][0] for m in DRAWS], ":", color=BLACK, label="theory, χ²")
    axes["draws"].set(xscale="log", xlabel="averaged probes", ylabel="overlap of two flat sets",
                      title="Sampling: with the exact set")
    axes["draws"].legend(loc="lower right", bbox_to_anchor=(1, 0.07))

    axes["lags"].plot(LAGS, list(numbers["lags"].values()), "s-", color=PINK, label="exact, K steps later")
    axes["lags"].axhline(numbers["probe"][1], color=BLUE, label="two probes, same step")
    axes["lags"].axhline(numbers["theory, two probes"], color=BLACK, linestyle=":", label="theory, χ²")
    axes["lags"].set(xscale="log", xlabel="K", title="Time: with itself")
    axes["lags"].legend(loc="center right", bbox_to_anchor=(1, 0.6))
    for name in ("draws", "lags"):
        axes[name].axhline(GAMMA, color=GREY, linestyle="--", linewidth=1)
        axes[name].set_ylim(0.57, 1.02)
        axes[name].text(1 if name == "draws" else 5, GAMMA + 0.008, "chance", color=GREY)

    names = list(numbers["estimates"])[::-1]
    with_G, with_H = zip(*(numbers["estimates"][name] for name in names))
    axes["kinds"].plot([o for o, _ in with_G], names, "o", color=BLUE, markersize=9, label="overlap, Gauss-Newton")
    axes["kinds"].plot([o for o, _ in with_H], names, "D", color=RED, markersize=5, label="overlap, Hessian")
    axes["kinds"].plot([r for _, r in with_G], names, "|", color=BLACK, markersize=13, markeredgewidth=2,
                       label="rank correlation, Gauss-Newton")
    axes["kinds"].set(xlim=(0.55, 1.02), xlabel="agreement with the exact diagonal", title="Kinds of curvature")
    axes["kinds"].legend(loc="lower left", labelspacing=0.3)
    return figure


def main(argv=None):
    out = output_path(__doc__, "mask", argv)
    numbers = measure()
    print("overlap with the exact flat set, rank correlation")
    for m in DRAWS:
        columns = {f"batch {batch}": numbers["draws"][batch, m] for batch in BATCHES} | {"theory": numbers["theory"][m]}
        print(f"{m:4} probes: " + "   ".join("{} {:.3f} {:.3f}".format(name, *pair) for name, pair in columns.items()))
    for name, (with_G, with_H) in numbers["estimates"].items():
        print("{:22} with Gauss-Newton {:.3f} {:.3f}   with the Hessian {:.3f} {:.3f}".format(name, *with_G, *with_H))
    print("the exact flat set, K steps later: " + ", ".join(f"{lag}: {o:.3f}" for lag, o in numbers["lags"].items()))
    print(f"two of ire.py's probes, same step: {numbers['probe'][1]:.3f} (theory {numbers['theory, two probes']:.3f})")
    print(f"one of ire.py's probes, exact set: {numbers['probe'][0]:.3f} (theory {numbers['theory'][1][0]:.3f})")
    save(draw(numbers), out)
    return numbers


if __name__ == "__main__":
    main()
