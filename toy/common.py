"""What the toys share: the command line, the look of figures, and a network of one vector."""

import argparse
from pathlib import Path

import torch
from matplotlib.animation import Animation, PillowWriter

ROOT = Path(__file__).resolve().parents[1]
ENDINGS = (".png", ".pdf", ".svg")  # of figures
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
    goes. A path that cannot be written ends the toy here, before it computes."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = ROOT / "results" / f"toy-{name}.png"
    parser.add_argument("--out", default=str(default), help="default: %(default)s")
    out = parser.parse_args(argv).out
    problem = why_not(Path(out))
    if problem:
        parser.exit(2, f"{parser.prog}: --out {out!r}: {problem}\n")
    print(f"This takes about {seconds} seconds on one core.", flush=True)
    torch.set_num_threads(1)  # the tensors are tiny
    return Path(out)


def why_not(path):
    """Why no figure can be written to this path, or None. Makes the folder that the path names."""
    if path.suffix.lower() not in ENDINGS:
        return f"the name must end in {' or '.join(ENDINGS)}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        path.open("ab").close()
    except OSError as error:
        return f"cannot be written: {error}"
    if is_new:
        path.unlink()  # a toy that is interrupted leaves no empty file
    return None


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
