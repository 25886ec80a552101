"""How good is the mask of a probe? Compared with the exact curvature of a network that allows it.

    python toy/mask.py                    # draws results/toy-mask.png

A probe (Eq. 6) squares one gradient g of a batch of B samples with labels drawn from the model. On
average B g_i^2 is G_i, the diagonal of the Gauss-Newton matrix. In a large batch g_i is normal, so
B g_i^2 is G_i times a chi^2_1 variable: its relative noise is sqrt(2) at any batch size. The mean
of m probes is G_i chi^2_m / m.

The flat sets of the probes overlap with the exact flat set as much as this predicts. More draws
make them better, and larger batches do not. The exact flat set changes slowly during training:
another draw changes the flat set of a probe far more than 200 steps of training change the exact
one.
"""

import sys
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch.func import grad, hessian, jacrev, vmap

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ire import SGDIRE, AdmIRE, sampled_cross_entropy
from toy.common import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, STYLE, network, output_path, save

GAMMA = 0.6
SAMPLES = 256
CLASSES = 4
STEPS = 600  # of the training, halfway to its end
EVERY = 5  # steps between two exact flat sets
REPEATS = 16  # draws that a mean is over
# what is scanned: batch sizes, averaged probes, steps between two masks
BATCHES = (1, 16, SAMPLES)
DRAWS = (1, 4, 16, 64)
LAGS = (5, 10, 20, 50, 100, 200)


def flat_set(h):
    """ire.py's mask where the curvature is h."""
    theta = torch.zeros_like(h, requires_grad=True)
    opt = SGDIRE([theta], lr=0, kappa=1, gamma=GAMMA, curvature="fisher")
    with opt.probe():
        (h.abs().sqrt() @ theta).backward()  # a gradient whose square is h
    return opt.masks[theta]


def overlap(flat, true):
    """The part of the true flat set that is found. By chance it is GAMMA."""
    return ((flat & true).sum() / true.sum()).item()


def quality(h, exact):
    """Overlap of the flat sets and Spearman's rank correlation."""
    ranks = torch.stack([x.abs().argsort().argsort() for x in (h, exact)]).double()
    return overlap(flat_set(h), flat_set(exact)), torch.corrcoef(ranks)[0, 1].item()


def average(rows):
    return torch.tensor(list(rows)).mean(0).tolist()


def mean_quality(draw, exact):
    """The mean of `quality` over REPEATS calls of draw()."""
    return tuple(average(quality(draw(), exact) for _ in range(REPEATS)))


def gauss_newton(predict, theta, x):
    """The diagonal of J^T (diag(p) - p p^T) J, mean over x. The Fisher matrix has the same one."""
    J = jacrev(predict)(theta, x)  # (samples, classes, parameters)
    p = predict(theta, x).softmax(-1)[..., None]  # (samples, classes, 1)
    return ((p * J**2).sum(1) - (p * J).sum(1) ** 2).mean(0)


def train():
    """A network halfway through its training by AdmIRE: x, y, predict, theta, Adam's second moment,
    and the exact flat set at every EVERY-th step so far."""
    teacher, weights = network(8, 16, CLASSES)
    x = torch.randn(SAMPLES, 8, dtype=torch.float64) * torch.logspace(0, -1, 8)
    y = (teacher(3 * weights, x) + 0.3 * torch.randn(SAMPLES, CLASSES)).argmax(-1)
    predict, theta = network(8, 12, 12, CLASSES)
    settings = {"kappa": 2, "gamma": GAMMA, "curvature": "fisher", "weight_decay": 0}
    opt = AdmIRE([theta.requires_grad_()], 3e-3, **settings)
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


def draws(predict, theta, x, batch, m):
    """h of Eq. 6: the mean over m batches."""

    def sampled_loss(theta, x):
        return sampled_cross_entropy(predict(theta, x))

    rows = torch.stack([torch.randperm(SAMPLES)[:batch] for _ in range(m)])  # (m, batch)
    gradients = vmap(grad(sampled_loss), (None, 0), randomness="different")(theta, x[rows])
    return batch * gradients.square().mean(0)


def chi2(G, m):
    """The mean of m probes in theory."""
    return G * torch.randn(m, len(G)).square().mean(0)


def probed(predict, theta, x, seed):
    """The mask of one probe of ire.py."""
    torch.manual_seed(seed)
    opt = SGDIRE([theta], lr=0, kappa=1, gamma=GAMMA, curvature="fisher")
    with opt.probe():
        sampled_cross_entropy(predict(theta, x)).backward()
    return opt.masks[theta]


def kinds_of_curvature(x, y, predict, here, second_moment, G):
    """For each kind, the quality of its flat set: against the diagonal of the Gauss-Newton matrix,
    and against that of the Hessian."""

    def loss(theta, x, y):
        return F.cross_entropy(predict(theta, x), y)

    H = hessian(loss)(here, x, y).diagonal()
    per_sample = vmap(grad(loss), (None, 0, 0))(here, x[:, None], y[:, None])
    one_probe = f"1 probe, batch {SAMPLES}"
    kinds = {
        one_probe: lambda: draws(predict, here, x, SAMPLES, 1),
        "16 probes, batch 16": lambda: draws(predict, here, x, 16, 16),
        "squared full gradient": lambda: grad(loss)(here, x, y).square(),
        "empirical Fisher": lambda: per_sample.square().mean(0),
        "Adam's second moment": lambda: second_moment,
        "Gauss-Newton": lambda: G,
    }
    return {name: [mean_quality(h, exact) for exact in (G, H)] for name, h in kinds.items()}


def measure():
    torch.manual_seed(0)
    x, y, predict, theta, second_moment, history = train()
    here = theta.detach()
    G = gauss_newton(predict, here, x)
    exact = flat_set(G)
    masks = [probed(predict, theta, x, seed) for seed in range(REPEATS)]
    by_draws = {}
    for batch in BATCHES:
        for m in DRAWS:
            by_draws[batch, m] = mean_quality(partial(draws, predict, here, x, batch, m), G)
    theory = {m: mean_quality(partial(chi2, G, m), G) for m in DRAWS}
    estimates = kinds_of_curvature(x, y, predict, here, second_moment, G)
    twice = [(overlap(flat_set(chi2(G, 1)), flat_set(chi2(G, 1))),) for _ in range(REPEATS)]
    lags = {}
    for lag in LAGS:
        pairs = zip(history, history[lag // EVERY :], strict=False)
        lags[lag] = average((overlap(a, b),) for a, b in pairs)[0]
    pairs = zip(masks, masks[1:], strict=False)
    return {
        "draws": by_draws,
        "theory": theory,
        "estimates": estimates,
        "probe": average((overlap(a, exact), overlap(a, b)) for a, b in pairs),
        "theory, two probes": average(twice)[0],
        "lags": lags,
    }


def draw(numbers):
    plt.rcParams.update(STYLE)
    figure, (sampling, ageing) = plt.subplots(2, 1, figsize=(5, 6.5), layout="constrained")
    for batch, color, marker in zip(BATCHES, (ORANGE, GREEN, BLUE), "v^o", strict=True):
        found = [numbers["draws"][batch, m][0] for m in DRAWS]
        sampling.plot(DRAWS, found, f"{marker}-", color=color, linewidth=1, label=f"batch {batch}")
    theory = [numbers["theory"][m][0] for m in DRAWS]
    sampling.plot(DRAWS, theory, ":", color=BLACK, label="theory, χ²")
    sampling.set(xlabel="averaged probes", title="Sampling: probes and the exact flat set")
    aged = list(numbers["lags"].values())
    ageing.plot(LAGS, aged, "s-", color=PINK, label="exact, K steps later")
    ageing.axhline(numbers["probe"][1], color=BLUE, label="two probes at one step")
    ageing.set(xlabel="K", title="Time: two flat sets")
    for ax, ticks in ((sampling, DRAWS), (ageing, LAGS)):
        ax.axhline(GAMMA, color=GREY, linestyle="--", linewidth=1, label="chance")
        ax.set(xscale="log", xticks=ticks, xticklabels=ticks, ylim=(0.57, 1.02), ylabel="overlap")
        ax.minorticks_off()
    sampling.legend(loc="lower right", bbox_to_anchor=(1, 0.07))
    ageing.legend(loc="center right")
    return figure


def main(argv=None):
    out = output_path(__doc__, "mask", 10, argv)
    numbers = measure()
    print("overlap with the exact flat set, and rank correlation with the exact curvature")
    for m in DRAWS:
        columns = {f"batch {batch}": numbers["draws"][batch, m] for batch in BATCHES}
        columns["theory"] = numbers["theory"][m]
        cells = [f"{name} {found:.3f} {rank:.3f}" for name, (found, rank) in columns.items()]
        print(f"{m:2} probes: {'   '.join(cells)}")
    row = "{:21} Gauss-Newton {:.3f} {:.3f}   Hessian {:.3f} {:.3f}"
    for name, (with_G, with_H) in numbers["estimates"].items():
        print(row.format(name, *with_G, *with_H))
    aged = [f"{lag}: {same:.3f}" for lag, same in numbers["lags"].items()]
    print(f"overlap of the exact flat set with itself K steps later: {', '.join(aged)}")
    found, twice = numbers["probe"]
    both = numbers["theory, two probes"]
    print(f"two probes of ire.py at one step: {twice:.3f} (theory {both:.3f})")
    print(f"one probe of ire.py and the exact flat set: {found:.3f}")
    save(draw(numbers), out)
    return numbers


if __name__ == "__main__":
    main()
