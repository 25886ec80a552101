"""What the toys share: the command line, the look of figures, and a network of one vector."""

import argparse
from pathlib import Path

import torch
from matplotlib.animation import Animation, PillowWriter

ROOT = Path(__file__).resolve().parents[1]
# Okabe and Ito's palette: people who are colour-blind can tell these colours apart
BLACK = "#000000"
ORANGE = "#E69F00"
SKY = "#56B4E9"
GREEN = "#009E73"
BLUE = "#0072B2"
RED = "#D55E00"
PINK = "#CC79A7"
GREY = "#8A8A8A"
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "savefig.dpi": 200,
}


def output_path(doc, name, seconds, argv=None):
    """Reads the command line of a toy and says how long the toy takes. Returns where its figure
    goes."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = ROOT / "results" / f"toy-{name}.png"
    parser.add_argument("--out", type=Path, default=default, help="default: %(default)s")
    out = parser.parse_args(argv).out
    print(f"This takes about {seconds} seconds on one core.", flush=True)
    torch.set_num_threads(1)  # the tensors are tiny
    return out


def save(drawing, path):
    """Writes a figure, or an animation of a figure."""
    if isinstance(drawing, Animation):
        drawing.save(path, PillowWriter(fps=2), dpi=100)
    else:
        drawing.savefig(path)
    print(f"drawn: {path}")


def network(*widths):
    """A tanh network whose parameters are one vector. So torch.func.hessian gives a matrix, and a
    mask is a vector. Returns predict(theta, x) and an initial theta in float64."""
    layers = list(zip(widths, widths[1:], strict=False))

    def predict(theta, x):
        for i, (n_in, n_out) in enumerate(layers):
            rest = len(theta) - (n_in + 1) * n_out
            weight, bias, theta = theta.split([n_in * n_out, n_out, rest])
            if i:
                x = x.tanh()
            x = x @ weight.view(n_in, n_out) + bias
        return x

    parts = []
    for n_in, n_out in layers:
        parts += [torch.randn(n_in * n_out) / n_in**0.5, torch.zeros(n_out)]
    return predict, torch.cat(parts).double()
