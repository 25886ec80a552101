"""A norm over time lets a causal model see the future: a Llama that predicts coin flips.

    python toy/leak.py                    # draws results/toy-leak.png

The coins are fair and independent. So a model that sees only the past cannot predict them with a
loss below ln 2 = 0.693 nats. A small Llama stays there if its RMS norm is a mean over the width, as
it should be. With a norm over time and width the loss falls far below ln 2: the scale at every
position is a mean over all positions, also over the later ones. The layers learn to write the coins
to come into this scale. In a longer context more tokens share one scale, so the layers learn less
from it in the same number of steps.

The chapter "What is known, what is open" says why this matters: the published code has such a
norm.
"""

import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from toy.common import BLACK, BLUE, GREY, ORANGE, RED, STYLE, output_path, save

WIDTH = 64
HEADS = 4
LAYERS = 2
BATCH = 64
STEPS = 400
LR = 2e-3
LENGTHS = (8, 16, 32)  # tokens that the model sees
RUNS = {"over width": ((-1,), LENGTHS[:1]), "over time and width": ((-2, -1), LENGTHS)}
COLORS = {"over width": (BLACK,), "over time and width": (RED, ORANGE, BLUE)}


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2), where the mean is over `dims` of x (batch, time, width)."""

    def __init__(self, dims):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.dims = dims

    def forward(self, x):
        return x * (x.square().mean(self.dims, keepdim=True) + 1e-6).rsqrt() * self.weight


def rotate(x):
    """Rotary embedding of x (batch, heads, time, head width)."""
    *_, time, width = x.shape
    frequency = 100.0 ** -(torch.arange(0, width, 2) / width)
    angle = torch.arange(time)[:, None] * frequency  # (time, width / 2)
    a, b = x.chunk(2, -1)
    turned = a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()
    return torch.cat(turned, -1)


class Block(nn.Module):
    def __init__(self, dims):
        super().__init__()
        self.norms = nn.ModuleList([RMSNorm(dims), RMSNorm(dims)])
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x):
        batch, time, _ = x.shape
        qkv = self.qkv(self.norms[0](x)).view(batch, time, 3, HEADS, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, time, head width)
        heads = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + self.out(heads.transpose(1, 2).flatten(2))
        h = self.norms[1](x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    """A Llama with two tokens, whose norms are over `dims`. From (batch, time) to logits
    (batch, time, 2)."""

    def __init__(self, dims):
        super().__init__()
        self.embedding = nn.Embedding(2, WIDTH)
        self.blocks = nn.Sequential(*[Block(dims) for _ in range(LAYERS)])
        self.norm = RMSNorm(dims)
        self.head = nn.Linear(WIDTH, 2, bias=False)

    def forward(self, tokens):
        return self.head(self.norm(self.blocks(self.embedding(tokens))))


def sees_the_future(model, length=8):
    """Does the first position's output change with the last token?"""
    tokens = torch.zeros(1, length, dtype=torch.long)
    changed = tokens.clone()
    changed[0, -1] = 1
    with torch.no_grad():
        return not torch.equal(model(tokens)[0, 0], model(changed)[0, 0])


def train(dims, length, steps=STEPS):
    """The losses on fresh coins at each step, and the model. No batch comes twice, so there is
    nothing to memorise."""
    torch.manual_seed(0)
    model = Llama(dims)
    opt = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, LR, total_steps=steps, pct_start=0.1)
    losses = []
    for _ in range(steps):
        coins = torch.randint(2, (BATCH, length + 1))
        logits = model(coins[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), coins[:, 1:].flatten())
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
        losses.append(loss.item())
    return torch.tensor(losses), model


def measure():
    """For each run, (what the norm is over, tokens): the losses, their mean at the end, and whether
    the trained model sees the future."""
    numbers = {}
    for name, (dims, lengths) in RUNS.items():
        for length in lengths:
            losses, model = train(dims, length)
            numbers[name, length] = {
                "losses": losses,
                "end": losses[-50:].mean().item(),
                "sees": sees_the_future(model),
            }
    return numbers


def draw(numbers):
    plt.rcParams.update(STYLE)
    figure, ax = plt.subplots(figsize=(5, 4.8), layout="constrained")
    for (name, length), n in numbers.items():
        smooth = n["losses"].unfold(0, 25, 1).mean(1)
        color = COLORS[name][LENGTHS.index(length)]
        ax.plot(smooth, color=color, label=f"{name}, {length} tokens")
    ax.axhline(math.log(2), color=GREY, linestyle=":", label="ln 2, the limit without the future")
    ax.set(xlabel="step", ylabel="loss on coin flips (nats)", ylim=(0, 0.8))
    figure.legend(title="RMS norm", loc="outside upper center")
    return figure


def main(argv=None):
    out = output_path(__doc__, "leak", 40, argv)
    numbers = measure()
    print(f"loss on fresh coins at the end (ln 2 is {math.log(2):.3f})")
    for (name, length), n in numbers.items():
        sees = "sees the future" if n["sees"] else "causal"
        print(f"norm {name:19} | {length:2} tokens | {n['end']:.3f}, {sees}")
    save(draw(numbers), out)
    return numbers


if __name__ == "__main__":
    main()
