"""Pre-train a Llama with AdamW, Muon, or IRE over either, on a laptop or on eight GPUs:

    python train_gpt.py                              # about 1M parameters on Python's own source
    python train_gpt.py --compare                    # AdamW, then AdmIRE, on the same batches
    python train_gpt.py --data my.txt --steps 2000   # your text: a file or a folder of files
    python train_gpt.py --resume                     # go on after Ctrl-C
    python train_gpt.py --sample runs/gpt --prompt "def "
    python train_gpt.py --init runs/gpt --data my.txt --out runs/mine    # its weights, your text
    python train_gpt.py --preset 119m                # a row of the paper, on one GPU
    torchrun --standalone --nproc_per_node 8 train_gpt.py --preset 229m

A resumed run ends with the same bits on a CPU, and on CUDA with --deterministic.
Top to bottom: settings, model, data, files, optimizers, training, sampling, command line.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds, needs no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import os
import pickle
import random
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

if importlib.util.find_spec("ire") is None:
    sys.exit("train_gpt.py: ire is missing: put ire.py beside this file")
from ire import IRE, SoftIRE

# torchrun sets all of these; some of them alone are left over from something else
LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCHED = all(name in os.environ for name in LAUNCH)
RANK = int(os.environ["RANK"]) if LAUNCHED else 0
LOCAL_RANK = int(os.environ["LOCAL_RANK"]) if LAUNCHED else 0
RANKS = int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1


# ------------------------------------------------------------------------------------ settings
class Halt(Exception):
    """Ends the script with one line and this exit code."""

    code = 1


class Diverged(Halt):
    """The loss is not finite."""


class BadInput(Halt, ValueError):
    """What the user can mend."""

    code = 2


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a setting may be, and the words for them."""

    low: float
    high: float
    words: str

    def __contains__(self, x):
        return self.low <= x <= self.high  # not NaN


COUNT = Range(1, 2**31 - 1, "1 or more, below 2^31")
STEPS = Range(0, 2**31 - 1, "0 or more, below 2^31")
BATCH = Range(1, 2**20, "1 or more, up to 2^20")
SEED = Range(0, 2**63 - 1, "0 to 2^63 - 1")
POSITIVE = Range(1e-30, 1e9, "a number above 0, from 1e-30 to 1e9")
NOT_NEGATIVE = Range(0, 1e9, "0 or more, up to 1e9")
DECAY = Range(0, math.nextafter(1, 0), "0 or more and below 1")
FRACTION = Range(math.nextafter(0, 1), math.nextafter(1, 0), "above 0 and below 1")

# Rows of the paper as Llamas, close to its models (its 60M has width 410 and 10 heads). "tiny" is
# the defaults of Config, tuned alike for both optimizers (results/sweep-tiny.json).
PAPER = dict(tokenizer="gpt2", lr=6e-4, eps=1e-16)
PRESETS = {
    "tiny": {},
    "60m": PAPER
    | dict(data="wikitext-103", steps=50_000, warmup=500, batch_size=240, context=150)
    | dict(layers=16, width=384, heads=6, ffn=1024, kappa=2.0, gamma=0.7)
    | dict(checkpoint_interval=2000),
    "119m": PAPER
    | dict(data="minipile", steps=30_000, warmup=300, batch_size=300, context=512)
    | dict(layers=6, width=768, heads=12, ffn=2048, kappa=4.0, gamma=0.6)
    | dict(checkpoint_interval=1000),
    "229m": PAPER
    | dict(data="openwebtext", steps=50_000, warmup=1000, batch_size=480, context=1024)
    | dict(layers=16, width=768, heads=12, ffn=3072, kappa=4.0, gamma=0.6)
    | dict(checkpoint_interval=1000),
}


def setting(default, help, allowed=None, resume=False, command=False):
    """A field that complete() fills in where it was not given. allowed: names or a Range.
    resume: it may change on --resume. command: what to do now, which no run hands on."""
    words = allowed.words if isinstance(allowed, Range) else ", ".join(allowed or ())
    about = {"default": default, "help": help, "allowed": allowed, "words": words}
    marks = {"resume": resume or command, "command": command}
    return dataclasses.field(default=None, metadata=about | marks)


@dataclasses.dataclass
class Config:
    """Every setting. None is what was not given."""

    # the model and its text
    preset: str = setting("tiny", "a row of the paper, model to IRE", tuple(PRESETS))
    data: str = setting(
        "stdlib",
        "stdlib (Python's own source), shakespeare, wikitext-2, wikitext-103, minipile, "
        "openwebtext, a text file, a folder of them, or one with train.bin, val.bin, meta.json",
        resume=True,  # from another place; the text must be the same
    )
    tokenizer: str = setting("bytes", "what a token is", ("bytes", "gpt2"))
    layers: int = setting(4, "transformer blocks", COUNT)
    width: int = setting(128, "size of the residual stream", COUNT)
    heads: int = setting(4, "attention heads; width / heads is even", COUNT)
    ffn: int = setting(336, "hidden size of the SwiGLU feed-forward", COUNT)
    context: int = setting(128, "tokens in a sequence", COUNT)
    init: str = setting(None, "begin with the weights of this run, or folder hf of one")
    # the schedule
    batch_size: int = setting(16, "sequences in a step, over all ranks", BATCH)
    steps: int = setting(1000, "optimizer steps", COUNT)
    warmup: int = setting(500, "steps to the peak, by default at most half of them", STEPS)
    lr: float = setting(2e-3, "peak learning rate", POSITIVE)
    schedule: str = setting(
        "cosine", "after it; wsd falls in the last fifth", ("cosine", "wsd", "constant")
    )
    min_lr: float = setting(0.05, "last lr as a fraction of the peak", Range(0, 1, "0 to 1"))
    clip: float = setting(1.0, "largest norm of the gradient; 0 is off", NOT_NEGATIVE)
    # the optimizer
    optimizer: str = setting(
        "admire",
        "admire is IRE over AdamW; soft is SoftIRE on the blocks' matrices",
        ("adamw", "admire", "adamw-soft", "muon", "muon-ire", "muon-soft"),
    )
    beta1: float = setting(0.9, "AdamW's decay of the mean", DECAY)
    beta2: float = setting(0.95, "AdamW's decay of the second moment", DECAY)
    eps: float = setting(1e-8, "AdamW's epsilon", POSITIVE)
    weight_decay: float = setting(0.1, "on matrices only", NOT_NEGATIVE)
    # IRE over it
    kappa: float = setting(1.0, "flat steps are 1 + kappa times as long", NOT_NEGATIVE)
    gamma: float = setting(0.7, "flat fraction of the coordinates", FRACTION)
    interval: int = setting(10, "steps from one mask to the next (K)", COUNT)
    alpha: float = setting(0.3, "soft: how much flat steps grow", Range(0, 1, "0 to 1"))
    ire_warmup: int = setting(
        None, "steps before IRE switches on (default --warmup; soft 0)", STEPS
    )
    curvature: str = setting(
        None,
        "where it is read (default fisher; soft squares)",
        ("fisher", "squares", "second_moment"),
    )
    kappa_decay: bool = setting(False, "kappa follows the learning rate down")
    probe_batches: int = setting(
        None, "micro-batches a rank for the probe (default a quarter: its masks do as well)", COUNT
    )
    # how to compute it
    micro_batch: int = setting(None, "sequences in a pass (default up to 32,768 tokens)", COUNT)
    seed: int = setting(0, "of weights, batches and probes", SEED)
    device: str = setting("auto", "where to train", ("auto", "cpu", "cuda", "mps"))
    dtype: str = setting(
        None,
        "of the passes (default: what the device is fast at)",
        ("float32", "bfloat16", "float16"),
    )
    compile: bool = setting(None, "torch.compile (default on CUDA from sm_70)", resume=True)
    deterministic: bool = setting(False, "deterministic CUDA kernels, slower")
    fsdp: bool = setting(False, "shard over torchrun's ranks (FSDP2), not DDP", resume=True)
    # the run's folder and reports
    out: str = setting("runs/gpt", "folder of the run", command=True)
    data_dir: str = setting("data", "folder for prepared data", resume=True)
    stop_at: float = setting(None, "end at a validation loss this low", POSITIVE, resume=True)
    log_interval: int = setting(20, "steps between lines of the log", COUNT, resume=True)
    eval_interval: int = setting(100, "steps between validations", COUNT, resume=True)
    eval_sequences: int = setting(512, "validation: so many, whole batches", COUNT, resume=True)
    checkpoint_interval: int = setting(100, "steps between checkpoints", COUNT, resume=True)
    keep_best: bool = setting(False, "the best checkpoint too, in OUT/best", resume=True)
    wandb: bool = setting(False, "send the log to Weights & Biases too", resume=True)
    # what to do
    config: str = setting(None, "take the settings of a run's config.json", command=True)
    resume: bool = setting(False, "go on from the checkpoint in --out", command=True)
    overwrite: bool = setting(False, "delete the run in --out first", command=True)
    compare: bool = setting(False, "train with adamw, then with admire", command=True)
    eval_only: bool = setting(False, "print the validation loss of --out", command=True)
    sample: str = setting(None, "print text from this run, or folder hf of one", command=True)
    prompt: str = setting("", "how it begins; FILE:name is a file with that", command=True)
    num_samples: int = setting(1, "how many texts", COUNT, command=True)
    tokens: int = setting(300, "how long they are", COUNT, command=True)
    temperature: float = setting(0.8, "0 takes the likeliest token", NOT_NEGATIVE, command=True)
    top_k: int = setting(50, "choose among so many tokens", COUNT, command=True)


FIELDS = {f.name: f for f in dataclasses.fields(Config)}
OUT = Path(FIELDS["out"].metadata["default"])
SAMPLING = ("device", "prompt", "num_samples", "tokens", "temperature", "top_k")
SHAPE = ("tokenizer", "layers", "width", "heads", "ffn")  # what weights fix


def check(c, name, good, allowed):
    if not good:
        flag = "--" + name.replace("_", "-")
        raise BadInput(f"{flag}: got {str(getattr(c, name)):.60}, allowed is {allowed}")


@contextlib.contextmanager
def instead(text, way=""):
    """Ends the script with `text` where a library or the network raises, each in its own way."""
    try:
        yield
    except (Halt, ModuleNotFoundError):
        raise
    except Exception as e:
        trusting = isinstance(e, pickle.UnpicklingError)  # its own words advise to trust the file
        why = "no file of tensors, numbers and texts" if trusting else f"{e!r:.300}"
        raise BadInput(f"{text} ({why}){way}") from None


def note(text):
    """One line beside the output, from one rank."""
    if RANK == 0:
        print(f"train_gpt.py: {text}", file=sys.stderr)


def complete(given: Config) -> Config:
    """Fills in what was not given: from the run that goes on, the weights to begin with, or the
    preset. Raises BadInput on values out of range or that would change the run that goes on."""
    c = dataclasses.replace(given, out=given.out or str(OUT))
    c.device = None if c.device == "auto" else c.device
    known = {}
    if c.resume:
        saved = load_checkpoint(c.out, mmap=True)
        known = handed_on(saved["config"])
        check_unchanged(c, known, c.out, but=("steps",))
        check_steps(c, known, saved["step"])
    elif c.init:
        settings = read_weights(c.init)[1]["config"]
        known = {name: settings[name] for name in SHAPE}
        check_unchanged(c, known, c.init)
    defaults = {name: f.metadata["default"] for name, f in FIELDS.items()}
    preset = PRESETS.get(c.preset or known.get("preset", "tiny"), {})
    for name, value in (defaults | preset | known).items():
        if getattr(c, name) is None:
            setattr(c, name, value)
    check_values(c)
    choose(c, given)
    fit(c, given)
    check_settings(c)
    return c


def handed_on(config):
    """The settings of an earlier run that hold for another start; an older run has not all."""
    kept = {name: f.metadata["default"] for name, f in FIELDS.items() if not f.metadata["command"]}
    return {name: config.get(name, default) for name, default in kept.items()}


def check_unchanged(c, known, source, but=()):
    """Raises BadInput where c was given something else than the run in `source` has."""
    for name, value in known.items():
        given = getattr(c, name)
        free = given is None or FIELDS[name].metadata["resume"] or name in but
        check(c, name, free or given == value, f"{value}, as {source} began")


def check_steps(c, known, done):
    """--steps may change on --resume if the learning rate of the steps that were made does not."""
    before = Config(**known)
    after = dataclasses.replace(before, steps=c.steps or before.steps)
    for settings in (before, after):
        check_values(settings)
    same = after.steps == before.steps or all(
        learning_rate(before, step) == learning_rate(after, step) for step in range(done)
    )
    began = f"{before.steps} on --resume, as {c.out} began: it keeps its {before.schedule} schedule"
    check(c, "steps", same and after.steps >= done, began)


def check_values(c):
    """Each value alone."""
    for name, f in FIELDS.items():
        value = getattr(c, name)
        allowed = f.metadata["allowed"]
        if value is not None:
            right = type(value) is f.type or (f.type is float and type(value) is int)
            check(c, name, right, f"a value of type {f.type.__name__}")
            check(c, name, allowed is None or value in allowed, f.metadata["words"])


def abilities(device):
    """(dtype, compile) that suit it: before sm_80 bfloat16 is slow, before sm_70 Triton fails."""
    if device != "cuda":
        return "float32", False
    capability = torch.cuda.get_device_capability()
    return "bfloat16" if capability >= (8, 0) else "float16", capability >= (7, 0)


@functools.cache
def compiler_error(device):
    """Why torch.compile does not work here (no C++ compiler, no Triton, ...), or an empty text."""
    try:
        torch.compile(torch.sin)(torch.ones(2, device=device))
    except Exception as e:  # it raises many kinds
        return " ".join(str(e).split()[:16])
    return ""


def choose(c, given):
    """Settings that depend on the machine."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    here = [name for name, found in there.items() if found] + ["cpu"]
    c.device = here[0] if c.device == "auto" else c.device
    check(c, "device", c.device in here, f"what this machine has: {', '.join(here)}")
    dtype, compiles = abilities(c.device)
    if c.dtype is None:
        c.dtype = "float32" if c.fsdp and dtype == "float16" else dtype
    c.compile = compiles if c.compile is None else c.compile
    if c.compile and compiler_error(c.device):
        check(c, "compile", not given.compile, f"--no-compile here: {compiler_error(c.device)}")
        note(f"goes on without torch.compile: {compiler_error(c.device)}")
        c.compile = False
    c.fsdp = c.fsdp and (LAUNCHED or bool(given.fsdp))  # one process can go on with it


def fit(c, given):
    """Settings that depend on others."""
    if given.warmup is None and not c.resume:
        c.warmup = min(c.warmup, c.steps // 2)
    if c.ire_warmup is None:
        c.ire_warmup = 0 if is_soft(c) else c.warmup
    if c.curvature is None:
        c.curvature = "squares" if is_soft(c) else "fisher"
    share = c.batch_size // RANKS
    if c.micro_batch is None or (c.resume and share % c.micro_batch):  # perhaps on other ranks
        sizes = range(min(share, max(1, 2**15 // c.context)), 0, -1)
        c.micro_batch = next((n for n in sizes if share % n == 0), 1)


def check_settings(c):
    """What must fit together."""
    near = max(1, round(c.batch_size / RANKS)) * RANKS
    divides = c.batch_size % RANKS == 0
    check(c, "batch_size", divides, f"a multiple of the {RANKS} ranks, such as {near}")
    share = c.batch_size // RANKS
    muon = c.optimizer.startswith("muon")
    divides = share % c.micro_batch == 0
    check(c, "micro_batch", divides, f"a divisor of --batch-size over {RANKS} rank(s), {share}")
    most = share // c.micro_batch
    check(c, "probe_batches", (c.probe_batches or 1) <= most, f"1 to {most}, those of a step")
    check(c, "width", c.width % (2 * c.heads) == 0, f"a multiple of twice --heads, {2 * c.heads}")
    check(c, "warmup", c.warmup < c.steps, f"0 to --steps - 1, {c.steps - 1}")
    never = has_ire(c) and c.ire_warmup >= c.steps
    check(c, "ire_warmup", not never, f"0 to --steps - 1, {c.steps - 1}: later is the base alone")
    fits = c.dtype != "float16" or (c.device != "cpu" and not c.fsdp)
    check(c, "dtype", fits, "float32 or bfloat16 on a CPU or with --fsdp")
    check(c, "fsdp", not c.fsdp or LAUNCHED, "--fsdp under torchrun")
    old = muon and not hasattr(torch.optim, "Muon")
    check(c, "optimizer", not old, f"adamw or admire on torch {torch.__version__}; muon needs 2.9")
    sources = ["squares" if is_soft(c) else "fisher"]
    sources += [] if muon else ["second_moment"]  # which Muon does not keep
    words = f"{' or '.join(sources)} with --optimizer {c.optimizer}"
    check(c, "curvature", c.curvature in sources, words)
    decays = c.kappa_decay and is_soft(c)
    check(c, "kappa_decay", not decays, f"--no-kappa-decay with {c.optimizer}")
    check(c, "resume", not (c.resume and c.overwrite), "one of --resume and --overwrite")
    for name in ("out", "data_dir"):
        check(c, name, not Path(getattr(c, name)).is_file(), "a folder, not a file")
    if c.device == "cpu" and hasattr(os, "sysconf"):  # the weights alone would fill the machine
        have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        need = 4 * c.width * (512 + c.layers * (4 * c.width + 3 * c.ffn)) / 2**30
        sizes = f"with --layers {c.layers} and --ffn {c.ffn} it takes {need:,.0f} GiB"
        check(c, "width", need < have, f"a model that fits into {have:,.0f}; {sizes}")


def keep_runs(c: Config):
    """c, if it does not lose a run unasked."""
    kept = c.resume or c.overwrite or not Path(c.out, "checkpoint.pt").exists()
    ways = "a folder without a run, or --resume to go on with it, or --overwrite to lose it"
    check(c, "out", kept, ways)
    return c


# --------------------------------------------------------------------------------------- model
class Normalise(torch.autograd.Function):
    """RMS norm of x (..., width) without gains, on a CPU in half the passes over x that
    torch's takes, as Rotate does."""

    @staticmethod
    def forward(ctx, x):
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = (size.square() / x.shape[-1] + 1e-6).rsqrt()
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, grad):
        y, scale = ctx.saved_tensors
        along = (grad * y).mean(-1, keepdim=True)
        return torch.addcmul(grad, y, along, value=-1).mul_(scale)


class Rotate(torch.autograd.Function):
    """Rotary position embedding of x (batch, time, heads, size); as in Hugging Face's Llama the
    halves of a head are the pairs. cos: (time, 1, size), sin: the same, negative in the first half.
    """

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return turn(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return turn(grad, cos, -sin), None, None


def turn(x, cos, sin):
    halves_swapped = x.float().roll(x.shape[-1] // 2, dims=-1)
    return halves_swapped.mul_(sin).addcmul_(x.float(), cos).to(x.dtype)  # in place: one buffer


def project(x, norm, *layers):
    """Several linear layers as one, with a norm's gains, which are put into the weights: those are
    fewer than the numbers of x."""
    return F.linear(x, torch.cat([layer.weight for layer in layers]) * norm.weight)


def linears(**sizes):
    return nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads = c.heads
        d = c.width
        self.input_layernorm = nn.RMSNorm(d, eps=1e-6)
        self.self_attn = linears(q_proj=(d, d), k_proj=(d, d), v_proj=(d, d), o_proj=(d, d))
        self.post_attention_layernorm = nn.RMSNorm(d, eps=1e-6)
        self.mlp = linears(gate_proj=(d, c.ffn), up_proj=(d, c.ffn), down_proj=(c.ffn, d))

    def forward(self, x, cos, sin):  # x: (batch, time, width)
        x = x + self.attend(Normalise.apply(x), cos, sin)
        h = Normalise.apply(x)
        norm = self.post_attention_layernorm
        mlp = self.mlp
        gate, up = project(h, norm, mlp.gate_proj), project(h, norm, mlp.up_proj)
        return x + mlp.down_proj(F.silu(gate) * up)

    def attend(self, h, cos, sin):
        layer = self.self_attn
        norm = self.input_layernorm
        qk = project(h, norm, layer.q_proj, layer.k_proj).unflatten(-1, (2 * self.heads, -1))
        q, k = Rotate.apply(qk, cos, sin).transpose(1, 2).chunk(2, dim=1)  # (b, heads, t, size)
        v = project(h, norm, layer.v_proj).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return layer.o_proj(mixed.transpose(1, 2).flatten(-2))


def head_loss(weight, x, labels, classes=None):
    """Mean cross entropy of labels (batch, time). weight: (vocab, width), x: (batch, time, width).
    With classes it is the probe's (Eq. 6): labels are seeds, by which others are drawn from the
    softmax."""
    logits = F.linear(x, weight).flatten(0, 1).float()
    labels = labels.flatten()
    if classes is not None:
        with torch.no_grad():
            labels = drawn_labels(logits, labels, classes)
    return F.cross_entropy(logits, labels)


def drawn_labels(logits, seeds, classes):
    """The arg max of logits (n, vocab) + Gumbel noise, whose bits are a hash of seeds (n,), which
    are one of key and position, and classes (vocab,): a label does not depend on its neighbours in
    the batch, the rank, or how often it is drawn."""
    bits = mix(seeds[:, None] + classes) & 0x7FFFFFFF
    uniform = (bits.float() + 0.5) * 2.0**-31
    return (logits - (-torch.log1p(-uniform)).log()).argmax(-1)


def mix(x):
    """Scrambles int32 numbers one to one (Wellons' lowbias32); products wrap around."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -0x7B935975
    return x ^ ((x >> 16) & 0xFFFF)


class Llama(nn.Module):
    """Names and arithmetic of Hugging Face's LlamaForCausalLM, untied embeddings."""

    def __init__(self, c, vocab):
        super().__init__()
        self.dtype = getattr(torch, c.dtype)
        self.logits = 2**26  # how many may exist at once, see loss()
        self.head_loss = head_loss
        blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        embed = nn.Embedding(vocab, c.width)
        norm = nn.RMSNorm(c.width, eps=1e-6)
        self.model = nn.ModuleDict({"embed_tokens": embed, "layers": blocks, "norm": norm})
        self.lm_head = nn.Linear(c.width, vocab, bias=False)
        half = c.width // c.heads // 2
        angles = torch.outer(torch.arange(c.context), 10000.0 ** (-torch.arange(half) / half))
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        self.register_buffer("cos", torch.cat((cos, cos), dim=-1), persistent=False)
        self.register_buffer("sin", torch.cat((-sin, sin), dim=-1), persistent=False)
        classes = mix(torch.arange(vocab, dtype=torch.int32))
        self.register_buffer("classes", classes, persistent=False)
        for name, p in self.named_parameters():  # what writes to the residual stream starts smaller
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * c.layers) if writes else 0.02)

    def forward(self, tokens, targets=None, keys=None):
        """Logits (batch, time, vocab) of tokens (batch, time); with targets (batch, time) their
        mean cross entropy; with keys (batch) the probe's loss, whose labels depend on them; with
        both, both."""
        enabled = self.dtype != torch.float32
        with torch.autocast(tokens.device.type, self.dtype, enabled=enabled):
            x = self.hidden(tokens)
            if keys is None:
                return self.lm_head(x) if targets is None else self.loss(x, targets)
            time = torch.arange(tokens.shape[1], dtype=torch.int32, device=x.device)
            seeds = mix(mix(keys.int())[:, None] + mix(~time))  # ~: positions are not classes
            probe = self.loss(x, seeds, self.classes)
            return probe if targets is None else (self.loss(x, targets), probe)

    def hidden(self, tokens):
        """(batch, time, width), what the head reads."""
        x = self.model.embed_tokens(tokens)
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        for block in self.model.layers:
            x = block(x, cos, sin)
        return Normalise.apply(x) * self.model.norm.weight

    def loss(self, x, labels, classes=None):
        """head_loss; where all logits are too many at once, of pieces of as many sequences each,
        whose logits the backward makes again."""
        most = max(1, self.logits // (x.shape[1] * self.lm_head.out_features))
        pieces = next(n for n in range(1, len(x) + 1) if len(x) % n == 0 and len(x) // n <= most)
        loss = functools.partial(self.head_loss, self.lm_head.weight, classes=classes)
        if pieces == 1:
            return loss(x, labels)
        again = {"use_reentrant": False, "preserve_rng_state": False}
        parts = zip(x.chunk(pieces), labels.chunk(pieces), strict=True)
        return torch.stack([checkpoint(loss, *part, **again) for part in parts]).mean()


def make_model(c: Config, vocab):
    """A model compiled, and sharded over the ranks, as the settings say."""
    model = Llama(c, vocab).to(c.device)
    if c.device == "cuda" and c.compile:  # fused, a logit takes its own bytes and its gradient's
        model.logits = min(2**31 - 1, torch.cuda.get_device_properties().total_memory // 32)
    if c.compile:  # block by block, which are alike: one compilation serves all of them
        model.head_loss = torch.compile(head_loss, dynamic=False)
        for block in model.model.layers:
            block.compile(dynamic=False)
    if c.fsdp:
        from torch.distributed.fsdp import fully_shard

        mesh = dist.init_device_mesh(c.device, (RANKS,))
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=mesh)
    return model


def flops_per_token(c: Config, model):
    """Of one training step, forward and backward (PaLM, appendix B)."""
    embedding = model.model.embed_tokens.weight.numel()
    matrices = sum(p.numel() for p in model.parameters()) - embedding
    return 6 * matrices + 12 * c.layers * c.width * c.context


# ---------------------------------------------------------------------------------------- data
SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)
HUB = {  # Hugging Face: name and configuration
    "wikitext-2": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "wikitext-103": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
    "minipile": ("JeanKaddour/minipile", None),
    "openwebtext": ("Skylion007/openwebtext", None),
}
NO_SOURCE = {"test", "tests", "idle_test", "site-packages", "dist-packages"}  # in Python's library


def text_files(c: Config) -> list[Path]:
    """The text files behind --data, in a fixed order."""
    path = Path(c.data)
    pattern = "*"
    skip = set()
    if c.data == "stdlib":
        path = Path(sysconfig.get_paths()["stdlib"])
        pattern = "*.py"
        skip = NO_SOURCE
    elif c.data == "shakespeare":
        path = fetch_shakespeare(Path(c.data_dir) / "shakespeare.txt")
    for name in ("out", "data_dir"):  # would become the run's text
        folder = Path(getattr(c, name)).resolve()
        inside = path.is_dir() and path.resolve() in (folder, *folder.parents)
        check(c, "data", not inside, f"a folder that does not hold --{name.replace('_', '-')}")
    found = [path] if path.is_file() else sorted(p for p in path.rglob(pattern) if p.is_file())
    found = [p for p in found if not skip & set(p.relative_to(path).parts)]
    names = ", ".join(HUB)
    check(c, "data", found, f"an existing file or folder of files, or stdlib, shakespeare, {names}")
    texts = [p for p in found if is_text(p)]
    check(c, "data", texts, f"text, in UTF-8 or the like; {found[0]} is none")
    if len(texts) < len(found):
        other = min(set(found) - set(texts))
        note(f"--data: {len(found) - len(texts)} of {len(found)} files are no text, as {other}")
    return texts


def is_text(path):
    """Not UTF-16, an archive, a picture or a program: by its zeros and control characters."""
    with open(path, "rb") as f:
        start = f.read(1 << 16)
    control = sum(start.count(code) for code in (*range(9), *range(14, 27), *range(28, 32)))
    utf16 = start.startswith((b"\xff\xfe", b"\xfe\xff"))
    return 0 not in start and control <= len(start) // 100 and not utf16


def fetch_shakespeare(path):
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        url, sha256 = SHAKESPEARE
        with instead("--data: shakespeare can't be fetched", f"; put the text at {path}"):
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=False)
    return path


def from_files(files):
    """Pieces of text (part, bytes, whether a document begins). Of twenty files or more each
    twentieth is held out, of fewer the last tenth of each."""
    files = list(files)
    random.Random(0).shuffle(files)
    for i, path in enumerate(files):
        size = path.stat().st_size
        cut = size if i % 20 else 0
        cut = size * 9 // 10 if len(files) < 20 else cut
        with open(path, "rb") as f:
            for part, end in (("train", cut), ("val", size)):
                begins = True
                while text := f.read(min(1 << 19, end - f.tell())):
                    rest = f.readline(min(1 << 19, end - f.tell()))  # as gpt2 takes no half words
                    yield part, text + rest, begins
                    begins = False


def from_hub(c: Config):
    """The same, streamed from the hub, its cache or a local copy."""
    from datasets import load_dataset

    lines = c.data.startswith("wikitext")  # whose rows are lines of one document
    text = f"--data: datasets can't read {HUB[c.data][0]}"
    with instead(text, "; name a text file or folder"):
        splits = load_dataset(*HUB[c.data], streaming=True)
        for split in ("train", "validation"):
            for i, row in enumerate(splits.get(split, ())):
                held_out = split != "train" or ("validation" not in splits and i % 2000 == 0)
                yield "val" if held_out else "train", row["text"].encode(), i == 0 or not lines


class Codec:
    """Texts to tokens and back. What the tokens of a prepared folder mean is not known here."""

    def __init__(self, kind, vocab=256):
        self.kind = kind
        self.vocab = vocab
        self.between = 0  # the token between documents
        if kind == "bytes":
            self.vocab = 256
            self.between = ord("\n")
        if kind == "gpt2":
            import tiktoken

            way = "; use bytes or set TIKTOKEN_CACHE_DIR to a folder that has it"
            with instead("--tokenizer: tiktoken can't fetch gpt2's vocabulary", way):
                self.bpe = tiktoken.get_encoding("gpt2")
            self.vocab = self.bpe.n_vocab
            self.between = self.bpe.eot_token

    def encode(self, texts):
        if self.kind == "gpt2":
            texts = [text.decode(errors="replace") for text in texts]
            return self.bpe.encode_ordinary_batch(texts, num_threads=os.cpu_count())
        if self.kind != "bytes" and any(texts):
            raise BadInput("--prompt: allowed is none for tokens that are neither bytes nor gpt2's")
        return [np.frombuffer(text, np.uint8) for text in texts]

    def decode(self, tokens):
        if self.kind == "gpt2":
            return self.bpe.decode(tokens)
        if self.kind == "bytes":
            return bytes(tokens).decode(errors="replace")
        return " ".join(map(str, tokens))


def prepare(c: Config) -> Path:
    """The folder with train.bin, val.bin (uint16 tokens) and meta.json behind --data; made once,
    and whole or not."""
    if (Path(c.data) / "train.bin").exists():
        return Path(c.data)
    files = [] if c.data in HUB else text_files(c)
    name = f"{Path(c.data).stem}-{c.tokenizer}"
    if files:
        known = repr([(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files])
        name += f"-{hashlib.sha256(known.encode()).hexdigest()[:12]}"
    folder = Path(c.data_dir) / name
    if (folder / "meta.json").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)  # without meta.json it is half of one
    half = folder.with_name(f".{name}.{os.getpid()}")
    half.mkdir(parents=True, exist_ok=True)
    try:
        write_tokens(c, half, from_files(files) if files else from_hub(c))
        with contextlib.suppress(OSError):  # another run was first
            half.rename(folder)
    finally:
        shutil.rmtree(half, ignore_errors=True)
        with contextlib.suppress(OSError):  # where something is in it
            half.parent.rmdir()
    return folder


def write_tokens(c, folder, pieces):
    kind = Codec(c.tokenizer)
    source = " ".join(filter(None, HUB.get(c.data, [c.data])))
    meta = {"tokenizer": c.tokenizer, "vocab_size": kind.vocab, "source": source, "sha256": {}}
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
        bins = {"train": train, "val": val}
        batches = iter(lambda: list(itertools.islice(pieces, 64)), [])
        quiet = not sys.stderr.isatty()
        for batch in tqdm(batches, f"tokens of {c.data}", unit=" batches", disable=quiet):
            encoded = kind.encode([text for _, text, _ in batch])
            for (part, _, begins), tokens in zip(batch, encoded, strict=True):
                separator = [kind.between] if begins and bins[part].tell() else []
                bins[part].write(np.concatenate((separator, tokens)).astype("<u2").tobytes())
        for part, f in bins.items():
            f.flush()
            os.fsync(f.fileno())
            n = f.tell() // 2
            more = f"more text: {part} has {n} tokens, no more than one --context of {c.context}"
            check(c, "data", n > c.context, more)
            meta[f"{part}_tokens"] = n
            meta["sha256"][part] = hashlib.sha256(np.memmap(f.name, "u1", "r")).hexdigest()
    write_json(folder / "meta.json", meta)


class Data:
    """Memory-mapped tokens. A batch is a function of seed and step, so a resumed run sees what it
    would have."""

    def __init__(self, c: Config):
        folder = prepare(c) if LOCAL_RANK == 0 else None
        over_ranks([0])  # the others find the data made
        self.c = c
        folder = folder or prepare(c)
        with instead(f"--data: {folder / 'meta.json'} needs tokenizer and vocab_size"):
            meta = json.loads((folder / "meta.json").read_text())
            self.tokens = {"tokenizer": str(meta["tokenizer"]), "vocab": int(meta["vocab_size"])}
        fits = 2 <= self.tokens["vocab"] <= 2**16
        check(c, "data", fits, f"a vocab_size of 2 to 65,536 in {folder / 'meta.json'}")
        self.vocab = -(-self.tokens["vocab"] // 64) * 64  # 50257 to 50304: GPUs multiply it faster
        self.train, self.val = (self.read(folder, meta, part) for part in ("train", "val"))
        known = meta.get("sha256", {}).get("train")
        self.sha256 = known or hashlib.sha256(self.train).hexdigest()

    def read(self, folder, meta, part):
        c = self.c
        path = folder / f"{part}.bin"
        vocab = self.tokens["vocab"]
        check(c, "data", path.exists(), f"a folder that has {path}")
        size = path.stat().st_size
        whole = 2 * meta.get(f"{part}_tokens", size // 2)
        text = f"{path} of 2 bytes for each token of meta.json, {whole} bytes, and more than one"
        text = f"{text} --context of {c.context} tokens; it has {size} bytes"
        check(c, "data", size == whole > 2 * c.context, text)
        tokens = np.memmap(path, "<u2", "r")
        top = 0 if "sha256" in meta else int(tokens.max())  # what prepare() made is in range
        text = f"{path} of tokens below vocab_size, {vocab}; it has {top}"
        check(c, "data", top < vocab, text)
        return tokens

    def to_device(self, x):
        x = x.pin_memory() if self.c.device == "cuda" else x
        return x.to(self.c.device, non_blocking=True)

    def windows(self, tokens, starts):
        """Inputs and targets, (sequences, context) each."""
        rows = tokens[starts[:, None] + np.arange(self.c.context + 1)].astype(np.int64)
        rows = self.to_device(torch.from_numpy(rows))
        return rows[:, :-1], rows[:, 1:]

    def batch(self, step):
        """This rank's micro-batches of a step: inputs, targets, keys of the probe's labels. Which
        sequences form one does not depend on the number of ranks."""
        c = self.c
        rng = np.random.default_rng((self.c.seed, step))
        starts = rng.integers(len(self.train) - c.context, size=c.batch_size)
        keys = torch.from_numpy(rng.integers(2**31, size=c.batch_size))
        firsts = range(RANK * c.micro_batch, c.batch_size, RANKS * c.micro_batch)
        own = [slice(first, first + c.micro_batch) for first in firsts]
        return [(*self.windows(self.train, starts[s]), self.to_device(keys[s])) for s in own]

    def validation(self):
        """This rank's micro-batches of sequences that do not depend on the number of ranks, in the
        shapes of training, for which the model is compiled."""
        c = self.c
        count = min(c.eval_sequences, (len(self.val) - 1) // c.context)
        count = max(1, count // c.batch_size) * c.batch_size
        starts = np.linspace(0, len(self.val) - c.context - 1, count).astype(np.int64)
        for first in range(RANK * c.micro_batch, count, RANKS * c.micro_batch):
            yield self.windows(self.val, starts[first : first + c.micro_batch])


# --------------------------------------------------------------------------------------- files
def write_atomically(path: Path, write):
    """Whole or not at all, also when the power goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        part.replace(path)
    except (OSError, RuntimeError) as e:
        disk = e if isinstance(e, OSError) else e.__context__  # torch.save hides the disk's
        if not isinstance(disk, OSError):
            raise
        raise OSError(disk.errno, disk.strerror, str(path)) from None
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value):
    write_atomically(path, lambda f: f.write(json.dumps(value, indent=1).encode()))


def load_checkpoint(folder, mmap=False):
    """The checkpoint in a run's folder; mmap where its tensors are not read."""
    path = Path(folder) / "checkpoint.pt"
    with instead(f"{path} can't be read as a checkpoint", which_run(folder)):
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        for key in ("data", "seconds", "val_loss", "model", "optimizer", "scaler"):
            saved[key]
        return saved | {"step": int(saved["step"]), "config": dict(saved["config"])}


def which_run(folder):
    runs = [str(p.parent) for p in sorted(Path(folder).glob("ad*/checkpoint.pt"))]
    if runs:
        return f"; {folder} is of --compare: name {' or '.join(runs)}, or add --compare"
    return f"; is {folder} the --out of a run?"


def lock(folder: Path, stack):
    """Keeps a second run out of the folder until the stack ends."""
    folder.mkdir(parents=True, exist_ok=True)
    if os.name != "posix":
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    stack.callback(os.close, handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        config = folder / "config.json"
        pid = json.loads(config.read_text())["pid"] if config.exists() else "?"
        text = f"--out: got {folder}, allowed is a folder where no run goes on"
        raise BadInput(f"{text}; process {pid} trains there") from None
    except OSError:  # a network folder without locks
        pass


def save(run, folder: Path):
    """checkpoint.pt, whole also where it is sharded, so that any number of ranks can go on with it;
    and hf, which transformers opens with AutoModelForCausalLM.from_pretrained."""
    from safetensors.torch import save
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    c = run.c
    data = run.data
    hf = folder / "hf"
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, state = get_state_dict(run.model, run.optimizer, options=options)
    if RANK:
        return
    config = dataclasses.asdict(c)
    saved = {"config": config, "data": data.sha256, "model": weights, "optimizer": state}
    saved |= {"scaler": run.scaler.state_dict()} | {name: getattr(run, name) for name in REACHED}
    write_atomically(folder / "checkpoint.pt", lambda f: torch.save(saved, f))
    if folder == Path(c.out):
        run.kept = f"step {run.step}"
    weights = {name: w.contiguous() for name, w in weights.items()}
    write_atomically(hf / "model.safetensors", lambda f: f.write(save(weights, {"format": "pt"})))
    nothing = {"bos_token_id": None, "eos_token_id": None}
    write_json(hf / "generation_config.json", nothing)
    about = {  # the rest (rope_theta 10000, rms_norm_eps 1e-6, untied) is LlamaConfig's default
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float32",
        "vocab_size": data.vocab,
        "hidden_size": c.width,
        "intermediate_size": c.ffn,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "max_position_embeddings": c.context,
        "train_gpt": {"config": config, "tokens": data.tokens},
    }
    write_json(hf / "config.json", about | nothing)


def read_weights(folder):
    """Weights of a run, or of the folder hf that it wrote, and {"config": ..., "tokens": ...}."""
    from safetensors.torch import load_file

    path = Path(folder) / "hf" if (Path(folder) / "hf").exists() else Path(folder)
    with instead(f"{folder} can't be read as a run, or as a folder hf of one", which_run(folder)):
        saved = json.loads((path / "config.json").read_text())["train_gpt"]
        saved["config"] = handed_on(saved["config"])
        return load_file(path / "model.safetensors"), saved


def shapes(state, name=""):
    """{name: shape} of what nested dicts hold."""
    if isinstance(state, dict):
        parts = [shapes(value, f"{name}{key} ") for key, value in state.items()]
        return {key: shape for part in parts for key, shape in part.items()}
    return {name: tuple(state.shape) if torch.is_tensor(state) else type(state).__name__}


def same_entries(expected, found, source):
    """Raises BadInput unless two states have the same names and shapes."""
    expected, found = shapes(expected), shapes(found)
    for name in sorted(expected | found):
        has, wants = found.get(name, "nothing"), expected.get(name, "nothing")
        if has != wants:
            raise BadInput(f"{source} does not fit: {name}is {has} there, {wants} in the model")


def read_log(folder):
    """The whole lines of a run's log: a kill may leave half of one."""
    path = Path(folder) / "log.jsonl"
    text = path.read_text(errors="replace") if path.exists() else ""
    lines = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            entry = json.loads(line)
            int(entry["step"])
            lines.append(entry)
    return lines


def draw(path, *runs):
    """A figure of loss over steps of each run."""
    from matplotlib.figure import Figure  # without pyplot, whose backend may be a notebook's

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    for c in runs:
        color = "#0072B2" if has_ire(c) else "#000000"  # as in the book's figures
        log = read_log(c.out)
        if has_ire(c):
            axes.axvline(c.ire_warmup, color=color, ls=":", label="IRE switches on")
        if len(runs) == 1:
            training = [(r["step"], r["train_loss"]) for r in log if "train_loss" in r]
            axes.plot(*zip(*training, strict=True), color=color, alpha=0.35, label="training")
        losses = [(r["step"], r["val_loss"]) for r in log if "val_loss" in r]
        label = f"{c.optimizer}, lr {c.lr:g}, validation"
        axes.plot(*zip(*losses, strict=True), color=color, marker="o", ms=3, label=label)
        if len(losses) > 1:  # the first fall would hide the rest
            axes.set_ylim(0.95 * min(loss for _, loss in losses), 1.02 * losses[1][1])
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomically(path, lambda f: figure.savefig(f, format="png", dpi=150))


def environment():
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--verify", "-q", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True) if shutil.which("git") else None
    cuda = torch.cuda.is_available()
    hardware = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    about = {"torch": torch.__version__, "hardware": hardware, "ranks": RANKS}
    return about | {"commit": commit.stdout.strip() if commit else ""}


# ---------------------------------------------------------------------------------- optimizers
class MuonAndAdamW(torch.optim.Optimizer):
    """One optimizer of two: Muon for the groups that say so, AdamW for the others."""

    def __init__(self, groups, **adamw):
        muon, others = ([g for g in groups if g["muon"] == kind] for kind in (True, False))
        self.muon = torch.optim.Muon(muon, lr=adamw["lr"], adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(others, **adamw)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part in (self.muon, self.adamw):  # a loaded state dict has made new groups and state
            part.state = self.state
            part.param_groups = [g for g in self.param_groups if g["muon"] == (part is self.muon)]
            part.step()
        return loss


def make_optimizer(model, c: Config):
    """What --optimizer names. Muon is for the matrices of the blocks; norms have no decay."""
    hidden, others, norms = [], [], []
    for name, p in model.named_parameters():
        matrices = hidden if ".layers." in name else others
        (matrices if p.dim() >= 2 else norms).append(p)
    adamw = {"lr": c.lr, "betas": (c.beta1, c.beta2), "eps": c.eps, "fused": c.device != "mps"}
    groups = [
        {"params": hidden, "weight_decay": c.weight_decay, "muon": True},
        {"params": others, "weight_decay": c.weight_decay, "muon": False},
        {"params": norms, "weight_decay": 0.0, "muon": False},
    ]
    muon = c.optimizer.startswith("muon")
    base = MuonAndAdamW(groups, **adamw) if muon else torch.optim.AdamW(groups, **adamw)
    if not has_ire(c):
        return base
    every = {"interval": c.interval, "warmup": c.ire_warmup, "curvature": c.curvature}
    if is_soft(c):
        for group in base.param_groups:
            group["kappa"] = float(group["muon"])
        return SoftIRE(base, alpha=c.alpha, **every)
    return IRE(base, kappa=c.kappa, gamma=c.gamma, **every)


def has_ire(c: Config):
    return c.optimizer not in ("adamw", "muon")


def is_soft(c: Config):
    return c.optimizer in ("adamw-soft", "muon-soft")


def learning_rate(c: Config, step):
    """A linear warm-up, then the schedule, down to min_lr * lr."""
    first = c.warmup
    last = c.steps - 1
    share = 1.0
    if step < c.warmup:
        return c.lr * (step + 1) / c.warmup
    if c.schedule == "cosine":
        share = 0.5 * (1 + math.cos(math.pi * (step - first) / max(1, last - first)))
    if c.schedule == "wsd":  # warm-up, stable, decay
        first = max(first, last - c.steps // 5)
        share = 1 - max(0, step - first) / max(1, last - first)
    return c.lr * (c.min_lr + (1 - c.min_lr) * share)


# ------------------------------------------------------------------------------------ training
REACHED = ("step", "seconds", "val_loss", "best")  # what a checkpoint holds of a Run


@dataclasses.dataclass
class Run:
    """What the loop works with, and what it has reached."""

    c: Config
    data: Data
    model: nn.Module
    forward: nn.Module  # the model, or DDP around it
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    seconds: float = 0.0  # of training, without validation and checkpoints
    idle: float = 0.0  # of those, in this process
    val_loss: float = math.inf
    best: float = math.inf
    kept: str = "none"  # the last checkpoint
    bar: tqdm = None

    def due(self, interval):
        return self.step % interval == 0 or self.step == self.c.steps

    def done(self):
        return self.step == self.c.steps or self.val_loss <= (self.c.stop_at or -math.inf)


def over_ranks(values, op=dist.ReduceOp.SUM):
    """Sums of numbers over all ranks; waits for them."""
    values = torch.as_tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(values, op)
    return values.tolist()


def backward(forward, batch, c, scaler, retain_graph=False):
    """Gradients of the mean loss over micro-batches, which the ranks share in the last one's;
    returns that loss. A micro-batch is what `forward` takes, or its loss."""
    total = 0.0
    for i, micro in enumerate(batch, 1):
        last = i == len(batch)
        if c.fsdp:
            forward.set_requires_gradient_sync(last)
        alone = hasattr(forward, "no_sync") and not last
        with forward.no_sync() if alone else contextlib.nullcontext():
            loss = (micro if torch.is_tensor(micro) else forward(*micro)) / len(batch)
            scaler.scale(loss).backward(retain_graph=retain_graph)
        total = total + loss.detach()
    return total


def train_step(forward, optimizer, batch, step, c, scaler):
    """Returns loss and norm of the gradient, as one tensor."""
    lr = learning_rate(c, step)
    for group in optimizer.param_groups:
        group["lr"] = lr
        if c.kappa_decay:
            group["kappa"] = c.kappa * lr / c.lr
    micros = [(x, y) for x, y, _ in batch]
    if getattr(optimizer, "probe_due", False):
        count = c.probe_batches or math.ceil(len(batch) / 4)
        probe = [(x, None, keys) for x, _, keys in batch[:count]]
        shared = count == 1 and isinstance(forward, Llama) and not (c.compile or c.fsdp)
        if shared:  # one forward pass serves both losses
            micros[0], probe[0] = forward(*batch[0])
        with optimizer.probe(forward):
            backward(forward, probe, c, scaler, retain_graph=shared)
    loss = backward(forward, micros, c, scaler)
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(forward.parameters(), c.clip or math.inf)
    if c.fsdp:  # each rank has a part of it
        norm = norm.full_tensor()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return torch.stack((loss, norm))


@torch.no_grad()
def validate(forward, data):
    """The mean loss of the validation sequences, over all ranks."""
    losses = [float(forward(x, y)) for x, y in data.validation()]
    total, count = over_ranks([sum(losses), len(losses)])
    return total / count


def train(c: Config, build=None):
    """Trains one model; returns its settings with val_loss, steps that it made, seconds and
    tokens_per_second. build(model, c): another optimizer. Raises BadInput, Diverged, or Halt when
    a signal came, the checkpoint written."""
    c = keep_runs(complete(c))
    for package, needed in {"matplotlib": True, "safetensors": True, "wandb": c.wandb}.items():
        if needed and importlib.util.find_spec(package) is None:  # not after the training
            raise ModuleNotFoundError(name=package)
    run = set_up(c, Data(c), build)
    if c.resume:
        restore(run)
    if c.compile:  # before the clock starts: both losses, forward and backward
        x, y, keys = run.data.batch(run.step)[0]
        for micro in ((x, y), (x, None, keys)):
            backward(run.forward, [micro], c, run.scaler)
            run.optimizer.zero_grad()
    caught = []  # signals: the step that they come in is finished first
    with contextlib.ExitStack() as stack:
        if RANK == 0:
            lock(Path(c.out), stack)
            open_folder(run)
            banner(run)
        if RANK == 0 and c.wandb:
            import wandb

            about = {"name": Path(c.out).name, "dir": c.out, "config": dataclasses.asdict(c)}
            stack.enter_context(wandb.init(project="ire", **about))
        quiet = RANK > 0 or not sys.stderr.isatty()
        run.bar = tqdm(total=c.steps, initial=run.step, unit="step", disable=quiet)
        stack.enter_context(run.bar)
        stack.enter_context(on_signals(caught.append))
        loop(run, caught)
    rate = run.step * c.batch_size * c.context / run.seconds
    reached = {"steps": run.step, "val_loss": run.val_loss, "seconds": run.seconds}
    return dataclasses.asdict(c) | reached | {"tokens_per_second": rate}


def set_up(c, data, build):
    """Model and optimizer at the start of a run."""
    torch.manual_seed(c.seed)
    torch.set_float32_matmul_precision("high")
    if c.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(c.deterministic)
    model = forward = make_model(c, data.vocab)
    if c.init and not c.resume:
        weights, saved = read_weights(c.init)
        words = f"a model of the data's tokens, {data.tokens}; its are {saved['tokens']}"
        check(c, "init", data.tokens == saved["tokens"], words)
        set_state(model, weights, c.init)
    if dist.is_initialized() and not c.fsdp:
        forward = nn.parallel.DistributedDataParallel(model)
    optimizer = (build or make_optimizer)(model, c)
    scaler = torch.amp.GradScaler(c.device, enabled=c.dtype == "float16")
    return Run(c, data, model, forward, optimizer, scaler)


def set_state(model, weights, source, optimizer=None, state=None):
    """Loads whole weights, and an optimizer's whole state, into a model that may be sharded."""
    from torch.distributed.checkpoint import state_dict as dcp

    options = dcp.StateDictOptions(full_state_dict=True)
    same_entries(model.state_dict(), weights, source)
    dcp.set_model_state_dict(model, weights, options=options)
    if optimizer is not None:
        fresh = dcp.get_optimizer_state_dict(model, optimizer)
        same_entries(fresh["state"], state.get("state", {}), source)
        for group in state.get("param_groups", [{}]):
            kept = {"params", "lr", "ire_step"} & fresh["param_groups"][0].keys()
            same_entries(dict.fromkeys(kept), {key: None for key in kept & group.keys()}, source)
        dcp.set_optimizer_state_dict(model, optimizer, state, options=options)


def restore(run):
    """Goes on from the checkpoint."""
    c = run.c
    path = Path(run.c.out) / "checkpoint.pt"
    saved = load_checkpoint(c.out)
    words = f"the text that {c.out} began with; this one's sha256 differs"
    check(c, "data", saved["data"] == run.data.sha256, words)
    set_state(run.model, saved["model"], path, run.optimizer, saved["optimizer"])
    same_entries(run.scaler.state_dict(), saved["scaler"], path)
    run.scaler.load_state_dict(saved["scaler"])
    for name in REACHED:
        setattr(run, name, saved.get(name, math.inf))  # older runs have no best
    run.kept = f"step {run.step}"


def open_folder(run):
    """The files of the run, as they are at its step."""
    c = run.c
    out = Path(run.c.out)
    lines = []
    if c.resume:
        lines = [json.dumps(r) + "\n" for r in read_log(out) if r["step"] <= run.step]
    else:
        for folder in (out, out / "best"):
            (folder / "checkpoint.pt").unlink(missing_ok=True)
            (folder / "hf/config.json").unlink(missing_ok=True)
    write_atomically(out / "log.jsonl", lambda f: f.write("".join(lines).encode()))
    write_json(out / "config.json", dataclasses.asdict(c) | environment() | {"pid": os.getpid()})


def banner(run):
    c = run.c
    data = run.data
    count = sum(p.numel() for p in run.model.parameters())
    sizes = f"{len(data.train):,} training and {len(data.val):,} validation tokens"
    place = f"{RANKS} x {c.device}, {c.dtype}"
    place += ", FSDP" if c.fsdp else ""
    place += ", compiled" if c.compile else ""
    method = f"{c.optimizer}, lr {c.lr:g} after {c.warmup} steps, {c.schedule}"
    if has_ire(c):
        kind = f"alpha {c.alpha:g}" if is_soft(c) else f"kappa {c.kappa:g}, gamma {c.gamma:g}"
        method += f"; {kind}, K {c.interval}, on from step {c.ire_warmup}, {c.curvature}"
    epochs = c.steps * c.batch_size * c.context / len(data.train)
    start = c.init or f"a loss near ln {data.vocab} = {math.log(data.vocab):.2f}"
    print(f"model      Llama, {count:,} parameters: {c.layers} layers of width {c.width}")
    print(f"data       {c.data}: {sizes}")
    print(f"device     {place}")
    print(f"optimizer  {method}")
    print(
        f"run        {c.steps} steps, {epochs:.2f} epochs, into {c.out}, from {start}", flush=True
    )


@contextlib.contextmanager
def on_signals(handler):
    """Calls handler(number) at Ctrl-C and SIGTERM."""
    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, lambda number, _: handler(number))
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def record(run, **values):
    """A line of log.jsonl, of the terminal, and of W&B."""
    if RANK:
        return
    c = run.c
    values = {k: x for k, x in values.items() if x is not None and math.isfinite(x)}  # as JSON has
    with open(Path(c.out) / "log.jsonl", "a") as f:
        f.write(json.dumps({"step": run.step, **values, "seconds": round(run.seconds, 3)}) + "\n")
    texts = [f"{k} {x:,}" if type(x) is int else f"{k} {x:.4g}" for k, x in values.items()]
    texts.append(f"{run.seconds:.0f} s + {run.idle:.0f} s of saving and validation")
    run.bar.update(run.step - run.bar.n)
    run.bar.write(f"step {run.step:5}/{c.steps}  {'  '.join(texts)}")
    if c.wandb:
        import wandb

        wandb.log(values, step=run.step)


def loop(run, caught):
    """Steps, and between them log, validation and checkpoint where they are due."""
    c = run.c
    if run.step == 0:
        record(run, val_loss=validate(run.forward, run.data))
    pending = []
    clock = time.perf_counter()
    while not run.done():
        batch = run.data.batch(run.step)
        pending.append(train_step(run.forward, run.optimizer, batch, run.step, c, run.scaler))
        run.step += 1
        number = int(over_ranks([caught[0] if caught else 0], dist.ReduceOp.MAX)[0])
        log_due = run.due(c.log_interval)
        eval_due = run.due(c.eval_interval)
        save_due = run.due(c.checkpoint_interval)
        if not (log_due or eval_due or save_due or number):
            continue
        table = np.array(over_ranks(torch.stack(pending).tolist())) / RANKS  # waits for the device
        elapsed = time.perf_counter() - clock
        run.seconds += elapsed
        if eval_due:
            run.val_loss = validate(run.forward, run.data)
        check_finite(run, table, eval_due)
        record(run, **values_of(run, table, elapsed), val_loss=run.val_loss if eval_due else None)
        keep(run, save_due or number or run.done())
        if number and not run.done():
            halt = Halt("stopped; the checkpoint is written, go on with --resume")
            halt.code = 128 + number
            raise halt
        run.idle += time.perf_counter() - clock - elapsed
        pending = []
        clock = time.perf_counter()


def values_of(run, table, elapsed):
    """What the log says of the last steps. table: their (loss, norm of the gradient)."""
    c = run.c
    flat = run.optimizer.flat_share() if isinstance(run.optimizer, IRE) else {}
    rate = len(table) * c.batch_size * c.context / elapsed
    loss, norm = table.mean(0)
    values = {"train_loss": loss, "lr": learning_rate(c, run.step - 1), "grad_norm": norm}
    values |= flat | {"tokens_per_second": round(rate)}
    if c.device == "cuda":
        values["tflops"] = rate * flops_per_token(c, run.model) / 1e12
    return values


def check_finite(run, table, eval_due):
    """Raises Diverged for the first loss, or norm of a gradient, that is not finite."""
    table = table[:, :1] if run.scaler.is_enabled() else table  # a scaler's norms may overflow
    sums = table.sum(1)
    sums[-1] += run.val_loss if eval_due else 0
    for step, x in enumerate(sums, run.step - len(sums) + 1):
        if not math.isfinite(x):
            text = f"step {step}: the loss or its gradient is {x}; last checkpoint: {run.kept}"
            strength = "--alpha" if is_soft(run.c) else "--kappa"
            raise Diverged(f"{text}; try a lower --lr, a lower {strength} or a longer --warmup")


def keep(run, save_due):
    """Writes checkpoint and figure where they are due."""
    c = run.c
    out = Path(run.c.out)
    better = run.val_loss < run.best
    run.best = min(run.best, run.val_loss)
    try:
        if better and c.keep_best:
            save(run, out / "best")
        if save_due:
            save(run, out)
        if save_due and RANK == 0:
            draw(out / "loss.png", c)
    except OSError as e:
        raise Halt(f"{e}; last good checkpoint: {run.kept}") from None


def compare(typed):
    """AdamW, then AdmIRE: the same seed, batches and settings."""
    if "optimizer" in typed:
        text = f"--optimizer: got {typed['optimizer']}, allowed with --compare is to leave it out"
        raise BadInput(text)
    out = Path(typed.get("out", OUT))
    runs = [keep_runs(one_of_two(typed, out, name)) for name in ("adamw", "admire")]
    adamw, admire = (train(c) for c in runs)
    if RANK:
        return
    draw(out / "loss.png", *runs)
    loss = adamw["val_loss"]
    steps = adamw["steps"]
    losses = {r["step"]: r["val_loss"] for r in read_log(runs[1].out) if r.get("val_loss")}
    reached = min((step for step, x in losses.items() if step and x <= loss), default=None)
    command = " ".join(["python", "train_gpt.py", *sys.argv[1:]])
    results = {"adamw": adamw, "admire": admire, "reached_at_step": reached}
    write_json(out / "compare.json", {"command": command} | environment() | results)
    how = "did not reach AdamW's final loss"
    if reached:
        how = f"reached AdamW's final loss by step {reached}, in {reached / steps:.2f} of its steps"
    share = admire["tokens_per_second"] / adamw["tokens_per_second"]
    print(f"\nAdamW {loss:.4f}, AdmIRE {admire['val_loss']:.4f} after {steps} steps")
    print(f"AdmIRE {how}; it saw {share:.2f} of AdamW's tokens a second")
    print(f"figure     {out / 'loss.png'}")


def one_of_two(typed, out, name):
    """The settings of one run of a comparison, which may not have begun on --resume."""
    own = typed | {"optimizer": name, "out": str(out / name)}
    if typed.get("resume") and not (out / name / "checkpoint.pt").exists():
        own["resume"] = False
        own = handed_on(load_checkpoint(out / "adamw", mmap=True)["config"]) | own
    return complete(Config(**own))


# ------------------------------------------------------------------------------------ sampling
@torch.no_grad()
def generate(model, c, tokens, vocab, generator):
    """c.tokens more after the list of tokens; the model sees the last --context of them."""
    for _ in range(c.tokens):
        window = torch.tensor([tokens[-c.context :]], device=c.device)
        logits = model.lm_head(model.hidden(window)[0, -1])[:vocab].cpu().double()
        likely = logits.topk(min(c.top_k if c.temperature else 1, vocab))
        chances = ((likely.values - likely.values[0]) / (c.temperature or 1)).softmax(-1)
        choice = torch.multinomial(chances, 1, generator=generator)
        tokens = tokens + likely.indices[choice].tolist()
    return tokens


def sample(folder, **typed):
    """Text from the run, or its folder hf, in `folder`."""
    model, c, kind = load_model(folder, typed | {"dtype": "float32"})
    prompt = os.fsencode(c.prompt)
    if c.prompt.startswith("FILE:"):
        path = Path(c.prompt.removeprefix("FILE:"))
        check(c, "prompt", path.is_file(), "FILE: and the name of a file")
        prompt = path.read_bytes()
    known = Codec(kind["tokenizer"], kind["vocab"])
    generator = torch.Generator().manual_seed(c.seed)
    tokens = [int(t) for t in known.encode([prompt])[0]] or [known.between]
    texts = (generate(model, c, tokens, known.vocab, generator) for _ in range(c.num_samples))
    return "\n---------------\n".join(known.decode(text) for text in texts)


def load_model(folder, typed):
    """Model, settings and kind of tokens of a run, or of the Hugging Face folder that it wrote."""
    weights, saved = read_weights(folder)
    free = ("seed", "device", "dtype", "micro_batch", "deterministic")
    check_unchanged(Config(**typed), saved["config"], folder, but=free)
    anew = dict.fromkeys(("device", "dtype", "micro_batch", "probe_batches", "curvature", "init"))
    anew |= {"compile": False, "fsdp": False}
    c = complete(Config(**saved["config"] | anew | typed | {"resume": False}))
    model = make_model(c, -(-saved["tokens"]["vocab"] // 64) * 64)
    set_state(model, weights, folder)
    return model, c, saved["tokens"]


def evaluate(folder, typed):
    """Validation loss of the run, or the Hugging Face folder, in `folder`."""
    model, c, kind = load_model(folder, typed)
    data = Data(c)
    words = f"data of the model's tokens, {kind}; these are {data.tokens}"
    check(c, "data", data.tokens == kind, words)
    return validate(model, data)


# -------------------------------------------------------------------------------- command line
class Parser(argparse.ArgumentParser):
    def error(self, message):
        text = f"{self.prog}: {message:.300}; --help shows what is allowed\n"
        self.exit(2, text if LOCAL_RANK == 0 else "")


def parse(arguments):
    """What was typed, and what --config holds beside it, as {name: value}."""
    plain = argparse.RawDescriptionHelpFormatter
    cli = Parser(description=__doc__, formatter_class=plain, allow_abbrev=False)
    for name, f in FIELDS.items():
        about = f.metadata
        text = about["help"] + (f"; {about['words']}" if about["words"] else "")
        if about["default"] not in (None, ""):
            rows = [f"{preset} {row[name]}" for preset, row in PRESETS.items() if name in row]
            text += f" (default {', '.join([str(about['default']), *rows])})"
        kind = {"type": f.type, "metavar": f.type.__name__.upper()}
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        flag = "--" + name.replace("_", "-")
        cli.add_argument(flag, help=text, default=argparse.SUPPRESS, **kind)
    typed = vars(cli.parse_args(arguments))
    config = read_config(typed["config"]) if "config" in typed else {}
    return without_unread(config, typed) | typed


def without_unread(config, typed):
    """config without what another optimizer wants or does not read. Raises BadInput where such a
    setting was typed."""
    before = Config(optimizer=config.get("optimizer", FIELDS["optimizer"].metadata["default"]))
    c = Config(**typed)
    c.optimizer = c.optimizer or before.optimizer
    unread = {"alpha"} if has_ire(c) else set()
    if is_soft(c):
        unread = {"kappa", "gamma", "probe_batches"}
    goes_on = c.resume or c.sample or c.eval_only  # by the optimizer of the run that is there
    for name in sorted(unread & typed.keys()):
        check(c, name, goes_on, f"nothing with --optimizer {c.optimizer}, which does not read it")
    if is_soft(c) != is_soft(before):  # these were meant for the other kind
        unread |= {"curvature", "ire_warmup", "kappa_decay"}
    return {name: value for name, value in config.items() if name not in unread}


def read_config(path):
    """The settings in a run's config.json."""
    with instead(f"--config: {path} can't be read as a run's config.json"):
        values = json.loads(Path(path).read_text())
        unknown = values.keys() - FIELDS.keys() - environment().keys() - {"pid", "tensorboard"}
    if unknown:
        raise BadInput(f"--config: {path} has {min(unknown)}, which is no setting; see --help")
    return {name: x for name, x in handed_on(values).items() if values.get(name) is not None}


def start_ranks():
    """Joins torchrun's other processes; gloo carries what is on the CPU."""
    if not LAUNCHED and os.environ.get("WORLD_SIZE", "1") != "1":
        note("WORLD_SIZE is set, but not by torchrun: this process trains alone")
    if not LAUNCHED or dist.is_initialized():
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(LOCAL_RANK)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(days=1))


def run_command(typed):
    start_ranks()
    out = Path(typed.get("out", OUT))
    if "sample" in typed:
        print(sample(typed.pop("sample"), **typed))
    elif typed.get("eval_only"):
        print(f"validation loss {evaluate(out, typed):.4f}")
    elif typed.get("compare"):
        compare(typed)
    else:
        summary = train(Config(**typed))
        if RANK == 0:
            print(f"\n{sample(out, **{name: summary[name] for name in SAMPLING})}\n")
            loss = summary["val_loss"]
            seconds = summary["seconds"]
            print(f"validation loss {loss:.4f} after {summary['steps']} steps, {seconds:.0f} s")
            print(f"figure     {out / 'loss.png'}\nmodel      {out / 'hf'}")


def stop(number):
    """Ends the script at a signal where there is no step to finish."""
    note("stopped")
    sys.exit(128 + number)


def main(arguments=None):
    """Runs the command line; returns the exit code."""
    if hasattr(sys.stdout, "reconfigure"):  # a sample may hold what the terminal has no letter for
        sys.stdout.reconfigure(errors="replace")
    code = 1
    text = ""
    try:
        with on_signals(stop):
            run_command(parse(arguments))
        return 0
    except Halt as e:
        code = e.code
        text = e if LOCAL_RANK == 0 else ""
    except OSError as e:
        text = e
    except ModuleNotFoundError as e:
        code = 2
        text = f"{e.name} is missing: pip install {e.name}"
    except (MemoryError, RuntimeError) as e:
        known = isinstance(e, (MemoryError, torch.OutOfMemoryError))
        if not known and "allocate memory" not in str(e):
            raise
        text = "out of memory: lower --micro-batch (the step stays the same), then --context or "
        text += "--width; --fsdp shards the model over more GPUs"
    if text:
        print(f"train_gpt.py: {text}", file=sys.stderr)
    return code


if __name__ == "__main__":
    status = main()
    if not dist.is_initialized():
        sys.exit(status)
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(status)  # gloo's threads may abort the interpreter's own exit
