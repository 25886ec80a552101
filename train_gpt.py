"""Pre-train a small Llama with AdamW or AdmIRE. The smallest command first:

    python train_gpt.py                              # about 1M parameters on Python's own source, minutes on a laptop
    python train_gpt.py --compare                    # AdamW, then AdmIRE, on the same batches
    python train_gpt.py --data my.txt --steps 2000   # your text: a file or a folder of files
    python train_gpt.py --resume                     # go on after Ctrl-C, to the same bits
    python train_gpt.py --sample runs/gpt --prompt "def "

Top to bottom: settings, model, data, files, training, sampling, command line.
"""
import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from ire import AdmIRE, sampled_cross_entropy

# ------------------------------------------------------------------------------------------------ settings
# Each optimizer's own best of equally many trials on the tiny run; see README.
TUNED = {"adamw": dict(lr=2.8e-3, warmup=200), "admire": dict(lr=1.4e-3, warmup=200)}


def setting(default, text, choices=None):
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


@dataclass
class Config:
    # run
    out: str = setting("runs/gpt", "folder for config, log, checkpoint, figure and Hugging Face model")
    resume: bool = setting(False, "go on from the checkpoint in --out")
    overwrite: bool = setting(False, "delete what is in --out first")
    compare: bool = setting(False, "train with adamw, then with admire, and draw both")
    seed: int = setting(0, "of weights, batches and probes")
    device: str = setting("auto", "where to train", ("auto", "cpu", "cuda", "mps"))
    dtype: str = setting(None, "of the forward pass; bfloat16 on CUDA, float32 elsewhere",
                         ("float32", "bfloat16", "float16"))
    compile: bool = setting(None, "torch.compile the model; on with CUDA only")
    deterministic: bool = setting(False, "deterministic CUDA kernels, slower")
    # data
    data: str = setting("stdlib", "stdlib (Python's own source), shakespeare, a text file, a folder of text files, or a "
                                  "folder with train.bin, val.bin, meta.json")
    data_dir: str = setting("data", "folder for prepared data")
    tokenizer: str = setting("bytes", "what a token is", ("bytes",))
    # model: a standard Llama
    layers: int = setting(4, "transformer blocks")
    width: int = setting(128, "size of the residual stream")
    heads: int = setting(4, "attention heads; width / heads is even")
    ffn: int = setting(336, "hidden size of the SwiGLU feed-forward")
    context: int = setting(128, "tokens in a sequence")
    # schedule
    steps: int = setting(1000, "optimizer steps")
    batch_size: int = setting(16, "sequences in a step")
    micro_batch: int = setting(None, "sequences in a forward pass; divides batch-size, default all")
    warmup: int = setting(None, "steps to the peak learning rate; each optimizer's own best")
    min_lr: float = setting(0.05, "last learning rate as a fraction of the peak (cosine)")
    clip: float = setting(1.0, "largest norm of the gradient")
    # optimizer
    optimizer: str = setting("admire", "admire is IRE over AdamW", ("adamw", "admire"))
    lr: float = setting(None, "peak learning rate; each optimizer's own best")
    beta1: float = setting(0.9, "AdamW's decay of the mean")
    beta2: float = setting(0.95, "AdamW's decay of the second moment")
    eps: float = setting(1e-8, "AdamW's epsilon")
    weight_decay: float = setting(0.1, "AdamW's, on matrices only")
    kappa: float = setting(2.0, "IRE: steps along flat coordinates are 1 + kappa times as long")
    gamma: float = setting(0.7, "IRE: flat fraction of the coordinates")
    interval: int = setting(10, "IRE: steps from one mask to the next")
    ire_warmup: int = setting(None, "IRE: steps before it switches on, default --warmup")
    curvature: str = setting("fisher", "IRE: where the mask comes from", ("fisher", "second_moment"))
    kappa_decay: bool = setting(False, "IRE: kappa follows the learning rate down")
    probe_batches: int = setting(None, "IRE: micro-batches of the step that feed the probe, default all")
    # report
    log_interval: int = setting(20, "steps between lines of the log")
    eval_interval: int = setting(100, "steps between validations")
    eval_sequences: int = setting(512, "validation sequences, evenly spaced")
    checkpoint_interval: int = setting(100, "steps between checkpoints")


class BadInput(ValueError):
    """Something the user can mend; the script prints it in one line and exits with 2."""


def complete(c: Config) -> Config:
    """Fills in what depends on other settings; raises BadInput on values out of range."""
    def check(name, good, allowed):
        if not good:
            raise BadInput(f"--{name.replace('_', '-')}: got {getattr(c, name)}, allowed is {allowed}")

    for f in dataclasses.fields(c):
        if f.metadata["choices"] and getattr(c, f.name) is not None:
            check(f.name, getattr(c, f.name) in f.metadata["choices"], " or ".join(f.metadata["choices"]))
    tuned = TUNED[c.optimizer]
    device = c.device if c.device != "auto" else (
        "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    check("device", device == "cpu" or getattr(torch.backends if device == "mps" else torch, device).is_available(),
          "what this machine has: try cpu")
    c = dataclasses.replace(
        c, device=device, lr=tuned["lr"] if c.lr is None else c.lr,
        warmup=min(tuned["warmup"], c.steps // 2) if c.warmup is None else c.warmup,
        dtype=c.dtype or ("bfloat16" if device == "cuda" else "float32"),
        compile=device == "cuda" if c.compile is None else c.compile,
        micro_batch=c.batch_size if c.micro_batch is None else c.micro_batch)
    c.ire_warmup = c.warmup if c.ire_warmup is None else c.ire_warmup
    for name in ("layers", "width", "heads", "ffn", "context", "steps", "batch_size", "micro_batch", "interval",
                 "log_interval", "eval_interval", "eval_sequences", "checkpoint_interval"):
        check(name, getattr(c, name) >= 1, "1 or more")
    c.probe_batches = c.batch_size // c.micro_batch if c.probe_batches is None else c.probe_batches
    check("micro_batch", c.batch_size % c.micro_batch == 0, f"a divisor of --batch-size {c.batch_size}")
    check("probe_batches", 1 <= c.probe_batches <= c.batch_size // c.micro_batch,
          f"1 to {c.batch_size // c.micro_batch}, the micro-batches of a step")
    check("width", c.width % (2 * c.heads) == 0, f"a multiple of twice --heads, {2 * c.heads}")
    check("warmup", 0 <= c.warmup < c.steps, f"0 to --steps - 1, {c.steps - 1}")
    check("ire_warmup", c.ire_warmup >= 0, "0 or more")
    for name in ("lr", "clip", "eps"):
        check(name, 0 < getattr(c, name) < math.inf, "a finite number above 0")
    for name in ("beta1", "beta2"):
        check(name, 0 <= getattr(c, name) < 1, "0 or more and below 1")
    check("min_lr", 0 <= c.min_lr <= 1, "0 to 1")
    check("weight_decay", 0 <= c.weight_decay < math.inf, "0 or more")
    check("kappa", 0 <= c.kappa < math.inf, "0 or more")
    check("gamma", 0 < c.gamma < 1, "above 0 and below 1")
    check("dtype", not (c.dtype == "float16" and device == "cpu"), "float32 or bfloat16 on a CPU")
    check("resume", not (c.resume and c.overwrite), "one of --resume and --overwrite")
    return c


# ------------------------------------------------------------------------------------------------ model
class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads = c.heads
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(c.width, c.width, bias=False))

    def forward(self, x, rotary):  # x: (batch, time, width)
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (batch, heads, time, width / heads)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(rotate(q, rotary), rotate(k, rotary), v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(-2))


def rotate(x, rotary):
    """Rotary embedding; the halves of a head are the pairs, as in Hugging Face's Llama."""
    cos, sin = rotary
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.width, c.ffn, bias=False)
        self.up_proj = nn.Linear(c.width, c.ffn, bias=False)
        self.down_proj = nn.Linear(c.ffn, c.width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.width, eps=1e-6)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c.width, eps=1e-6)
        self.mlp = MLP(c)

    def forward(self, x, rotary):
        x = x + self.self_attn(self.input_layernorm(x), rotary)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Names and arithmetic of Hugging Face's LlamaForCausalLM, untied embeddings."""

    def __init__(self, c, vocab):
        super().__init__()
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(vocab, c.width),
            "layers": nn.ModuleList(Block(c) for _ in range(c.layers)),
            "norm": nn.RMSNorm(c.width, eps=1e-6)})
        self.lm_head = nn.Linear(c.width, vocab, bias=False)
        half = c.width // c.heads // 2
        angles = torch.outer(torch.arange(c.context), 10000.0 ** (-torch.arange(half) / half))
        self.register_buffer("cos", angles.cos(), persistent=False)  # (context, head / 2)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:  # the projections that write to the residual stream start smaller (GPT-2)
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * c.layers) if residual else 0.02)

    def forward(self, tokens):  # (batch, time) -> logits (batch, time, vocab)
        x, rotary = self.model.embed_tokens(tokens), (self.cos[:tokens.shape[1]], self.sin[:tokens.shape[1]])
        for block in self.model.layers:
            x = block(x, rotary)
        return self.lm_head(self.model.norm(x))


# ------------------------------------------------------------------------------------------------ data
SHAKESPEARE = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
               "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")


def text_files(c: Config) -> list[Path]:
    """The text behind --data, in a fixed order."""
    if c.data == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
        files = [p for p in sorted(root.rglob("*.py")) if not skip & set(p.relative_to(root).parts)]
        if sum(p.stat().st_size for p in files) < 1 << 20:
            raise BadInput(f"--data: this Python has no library source under {root}; name a text file with --data FILE")
        return files
    if c.data == "shakespeare":
        path = Path(c.data_dir) / "shakespeare.txt"
        if not path.exists():
            try:
                with urllib.request.urlopen(SHAKESPEARE[0], timeout=30) as reply:
                    text = reply.read()
            except OSError as e:
                raise BadInput(f"--data: shakespeare can't be fetched ({e}); put the text at {path}") from None
            if hashlib.sha256(text).hexdigest() != SHAKESPEARE[1]:
                raise BadInput(f"--data: {SHAKESPEARE[0]} is not the text it was; put the right one at {path}")
            write_atomically(path, lambda f: f.write(text))
        return [path]
    path = Path(c.data)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    if not path.exists() or not files:
        raise BadInput(f"--data: nothing at {path}; allowed is stdlib, shakespeare, a text file, a folder of text "
                       "files, or a folder with train.bin, val.bin, meta.json")
    return files


def prepare(c: Config) -> Path:
    """The folder with train.bin, val.bin (uint16 tokens) and meta.json behind --data; made once, and whole or not."""
    if (Path(c.data) / "train.bin").exists():
        return Path(c.data)
    files, digest = text_files(c), hashlib.sha256()
    for p in files:
        digest.update(p.read_bytes())
    name = c.data if c.data in ("stdlib", "shakespeare") else Path(c.data).stem
    folder = Path(c.data_dir) / f"{name}-{c.tokenizer}-{digest.hexdigest()[:12]}"
    if folder.exists():
        return folder
    random.Random(0).shuffle(files)
    texts = [p.read_bytes() for p in files]
    if len(texts) >= 20:  # whole files held out, every twentieth
        split = {"val": texts[::20], "train": [t for i, t in enumerate(texts) if i % 20]}
    else:  # the end of the text held out
        text = b"\n".join(texts)
        cut = len(text) - max(len(text) // 20, min(len(text) // 2, c.context + 1))
        split = {"train": [text[:cut]], "val": [text[cut:]]}
    tokens = {part: np.frombuffer(b"\n".join(texts), np.uint8).astype("<u2") for part, texts in split.items()}
    for part in tokens:
        if len(tokens[part]) <= c.context:
            raise BadInput(f"--data: {c.data} leaves {len(tokens[part])} tokens for {part}, fewer than one --context "
                           f"of {c.context} and the next token")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    for part, values in tokens.items():
        write_atomically(temporary / f"{part}.bin", values.tofile)
    meta = {"tokenizer": c.tokenizer, "vocab_size": 256, "source": c.data, "sha256": digest.hexdigest(),
            **{f"{part}_tokens": len(values) for part, values in tokens.items()}}
    write_atomically(temporary / "meta.json", lambda f: f.write(json.dumps(meta, indent=1).encode()))
    try:
        temporary.rename(folder)
    except OSError:  # another run was first
        shutil.rmtree(temporary)
    return folder


class Data:
    """Memory-mapped tokens. A batch is a function of the step alone, so a resumed run sees what it would have."""

    def __init__(self, c: Config):
        self.c, folder = c, prepare(c)
        try:
            self.meta = json.loads((folder / "meta.json").read_text())
            vocab, self.name = self.meta["vocab_size"], self.meta["tokenizer"]
        except (OSError, ValueError, KeyError) as e:
            raise BadInput(f"--data: {folder / 'meta.json'} is not readable ({e!r}); it needs tokenizer, vocab_size") from None
        for part in ("train", "val"):
            path = folder / f"{part}.bin"
            size = path.stat().st_size if path.exists() else 0
            expected = 2 * self.meta.get(f"{part}_tokens", size // 2)
            if size != expected or size % 2 or size // 2 <= c.context:
                raise BadInput(f"--data: {path} has {size} bytes, allowed is {expected if size != expected else 'an even number'}"
                               f", with more than one --context of {c.context} tokens (2 bytes each)")
            tokens = np.memmap(path, "<u2", "r")
            if (largest := int(tokens.max())) >= vocab:
                raise BadInput(f"--data: {path} holds token {largest}, allowed is 0 to {vocab - 1} (vocab_size in meta.json)")
            setattr(self, part, tokens)
        self.vocab = vocab

    def windows(self, tokens, starts):
        rows = torch.from_numpy(tokens[starts[:, None] + np.arange(self.c.context + 1)].astype(np.int64))
        if self.c.device == "cuda":
            rows = rows.pin_memory()
        rows = rows.to(self.c.device, non_blocking=True)
        return rows[:, :-1], rows[:, 1:]  # inputs, targets: (sequences, context)

    def batch(self, step):
        """The micro-batches of a step."""
        rng = np.random.default_rng((self.c.seed, step))
        starts = rng.integers(len(self.train) - self.c.context, size=self.c.batch_size)
        return [self.windows(self.train, s) for s in np.split(starts, self.c.batch_size // self.c.micro_batch)]

    def validation(self):
        count = min(self.c.eval_sequences, (len(self.val) - 1) // self.c.context)
        starts = np.linspace(0, len(self.val) - self.c.context - 1, count).astype(np.int64)
        return (self.windows(self.val, s) for s in np.array_split(starts, math.ceil(count / self.c.micro_batch)))


# ------------------------------------------------------------------------------------------------ files
def write_atomically(path: Path, write):
    """Whole or not at all, also when the power goes: a temporary name, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(folder):
    path = Path(folder) / "checkpoint.pt"
    if not path.exists():
        raise BadInput(f"{path} does not exist; is {folder} the --out of a run?")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        raise BadInput(f"{path} can't be read as a checkpoint: {str(e).splitlines()[0]}") from None


def export(model, c: Config, vocab):
    """DIR/hf, which transformers opens with AutoModelForCausalLM.from_pretrained."""
    try:
        from safetensors.torch import save
    except ImportError:
        raise BadInput("the Hugging Face folder needs safetensors: pip install safetensors") from None
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": vocab,
              "hidden_size": c.width, "intermediate_size": c.ffn, "num_hidden_layers": c.layers,
              "num_attention_heads": c.heads, "num_key_value_heads": c.heads, "head_dim": c.width // c.heads,
              "max_position_embeddings": c.context, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "attention_bias": False,
              "mlp_bias": False, "tie_word_embeddings": False, "torch_dtype": "float32", "bos_token_id": None,
              "eos_token_id": None}
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    for name, content in (("model.safetensors", save(state, {"format": "pt"})), ("config.json", config),
                          ("generation_config.json", {"bos_token_id": None, "eos_token_id": None})):
        content = content if isinstance(content, bytes) else json.dumps(content, indent=1).encode()
        write_atomically(Path(c.out) / "hf" / name, lambda f: f.write(content))


def read_log(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def draw(path, runs):
    """Validation loss over steps of each run {label: folder}."""
    try:
        import matplotlib
    except ImportError:
        raise BadInput("the figure needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for (label, folder), color in zip(runs.items(), ("#0072B2", "#D55E00")):
        log = read_log(folder)
        if len(runs) == 1:
            axes.plot(*zip(*[(r["step"], r["train_loss"]) for r in log if "train_loss" in r]), color=color, alpha=0.35,
                      label="training")
        axes.plot(*zip(*[(r["step"], r["val_loss"]) for r in log if "val_loss" in r]), color=color, marker="o", ms=3,
                  label=f"{label}, validation")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomically(Path(path), lambda f: figure.savefig(f, format="png", dpi=150))
    plt.close(figure)


# ------------------------------------------------------------------------------------------------ training
class Diverged(RuntimeError):
    """The loss is not finite."""


class Stopped(Exception):
    """SIGINT or SIGTERM came; the checkpoint is written."""


@contextlib.contextmanager
def signals():
    """A list that receives SIGINT and SIGTERM, so that the step they come in is finished."""
    caught, before = [], {}
    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, lambda number, frame: caught.append(number))
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def make_optimizer(model, c: Config):
    groups = [{"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": c.weight_decay},
              {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    adamw = dict(lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps)
    if c.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=c.device != "mps", **adamw)
    return AdmIRE(groups, kappa=c.kappa, gamma=c.gamma, interval=c.interval, warmup=c.ire_warmup, curvature=c.curvature,
                  **adamw)


def learning_rate(c: Config, step):
    """Linear warm-up, then a cosine to min_lr * lr."""
    if step < c.warmup:
        return c.lr * (step + 1) / c.warmup
    progress = (step - c.warmup) / max(1, c.steps - 1 - c.warmup)
    return c.lr * (c.min_lr + (1 - c.min_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


def describe(c: Config, data, model):
    ire = (f", kappa {c.kappa:g}, gamma {c.gamma:g}, K {c.interval}, on from step {c.ire_warmup}, {c.curvature}"
           if c.optimizer == "admire" else "")
    tokens = c.steps * c.batch_size * c.context
    print(f"model      Llama, {sum(p.numel() for p in model.parameters()):,} parameters: {c.layers} layers of width {c.width}\n"
          f"data       {c.data}: {len(data.train):,} training and {len(data.val):,} validation tokens ({data.name})\n"
          f"device     {c.device}, {c.dtype}" + (f", {torch.get_num_threads()} threads" if c.device == "cpu" else "")
          + (", compiled" if c.compile else "") + "\n"
          f"optimizer  {c.optimizer}, lr {c.lr:g} after {c.warmup} steps{ire}\n"
          f"run        {c.steps} steps of {c.batch_size * c.context:,} tokens, {tokens / len(data.train):.2f} epochs, into {c.out}; "
          f"the loss starts near ln {data.vocab} = {math.log(data.vocab):.2f}", flush=True)


# What may differ on --resume: it does not change the weights.
FREE = {"out", "resume", "overwrite", "compare", "data", "data_dir", "log_interval", "eval_interval", "eval_sequences",
        "checkpoint_interval"}


def restore(c: Config, sha256, model, optimizer, scaler):
    """Loads the checkpoint in c.out; returns its step and training seconds."""
    saved = load_checkpoint(c.out)
    for name, value in saved["config"].items():
        if name not in FREE and getattr(c, name) != value:
            why = "; the cosine is cut to the steps, so a longer run starts anew" if name == "steps" else ""
            raise BadInput(f"--{name.replace('_', '-')}: got {getattr(c, name)}, allowed on --resume is what {c.out} began "
                           f"with, {value}{why}")
    if saved["data"] != sha256:
        raise BadInput(f"--data: the text is not the one that {c.out} began with (sha256 {saved['data'][:12]}, now {sha256[:12]})")
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    scaler.load_state_dict(saved["scaler"])
    torch.set_rng_state(saved["rng"])
    if c.device == "cuda":
        torch.cuda.set_rng_state(saved["cuda_rng"])
    log = [line for line in read_log(c.out) if line["step"] <= saved["step"]]
    write_atomically(Path(c.out) / "log.jsonl", lambda f: f.write("".join(json.dumps(r) + "\n" for r in log).encode()))
    return saved["step"], saved["seconds"]


OUTPUTS = ("checkpoint.pt", "config.json", "log.jsonl", "loss.png", "hf")


def open_folder(c: Config):
    """Refuses a folder that holds a run, or empties it with --overwrite."""
    out = Path(c.out)
    if (out / "checkpoint.pt").exists() and not (c.resume or c.overwrite):
        raise BadInput(f"--out: {out} holds a run; add --resume to go on with it or --overwrite to lose it")
    if c.overwrite:
        for name in OUTPUTS:
            shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink(missing_ok=True)


def train(c: Config):
    """Trains one model; returns its summary, a dict with val_loss, steps and seconds."""
    c = complete(c)
    open_folder(c)
    out, data = Path(c.out), Data(c)
    torch.manual_seed(c.seed)
    torch.set_float32_matmul_precision("high")
    if c.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(c.deterministic)
    model = Llama(c, data.vocab).to(c.device)
    forward = torch.compile(model) if c.compile else model
    optimizer = make_optimizer(model, c)
    scaler = torch.amp.GradScaler(c.device, enabled=c.dtype == "float16")
    autocast = torch.autocast(c.device, getattr(torch, c.dtype), enabled=c.dtype != "float32")
    sha256 = data.meta.get("sha256", "")
    step, seconds = restore(c, sha256, model, optimizer, scaler) if c.resume else (0, 0.0)
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True).stdout
    except OSError:
        commit = ""
    write_atomically(out / "config.json", lambda f: f.write(json.dumps(
        dataclasses.asdict(c) | {"torch": torch.__version__, "commit": commit.strip()}, indent=1).encode()))
    describe(c, data, model)
    log = open(out / "log.jsonl", "a" if c.resume else "w")
    bar = tqdm(total=c.steps, initial=step, unit="step", disable=not sys.stderr.isatty())
    saved_at = step if c.resume else None

    def record(line, **values):
        log.write(json.dumps({"step": step, **values, "seconds": round(seconds, 3)}) + "\n")
        log.flush()
        bar.write(f"step {step:5}/{c.steps}  {line}")

    def loss_of(x, y):
        with autocast:
            return F.cross_entropy(forward(x).float().flatten(0, 1), y.flatten())

    @torch.no_grad()
    def validate():
        losses = [(loss_of(x, y).double() * len(x), len(x)) for x, y in data.validation()]
        loss = float(sum(total for total, _ in losses)) / sum(n for _, n in losses)
        record(f"validation loss {loss:.4f}", val_loss=loss)
        return loss

    def save():
        state = {"config": dataclasses.asdict(c), "data": sha256, "step": step, "seconds": seconds,
                 "model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                 "rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state() if c.device == "cuda" else None}
        write_atomically(out / "checkpoint.pt", lambda f: torch.save(state, f))
        return step

    with signals() as caught, contextlib.closing(log), contextlib.closing(bar):
        val_loss = validate() if step in (0, c.steps) else None
        losses, clock = [], time.perf_counter()
        while step < c.steps:
            lr = learning_rate(c, step)
            for group in optimizer.param_groups:
                group["lr"] = lr
                if c.kappa_decay:
                    group["kappa"] = c.kappa * lr / c.lr
            batch = data.batch(step)
            if c.optimizer == "admire" and optimizer.probe_due:
                with optimizer.probe():
                    for x, _ in batch[:c.probe_batches]:
                        with autocast:
                            loss = sampled_cross_entropy(forward(x).float())
                        scaler.scale(loss).backward()
            total = 0.0
            for x, y in batch:
                loss = loss_of(x, y) / len(batch)
                scaler.scale(loss).backward()
                total = total + loss.detach()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), c.clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(total)
            step += 1
            bar.update()
            log_due, eval_due, save_due = (step % every == 0 or step == c.steps for every in (
                c.log_interval, c.eval_interval, c.checkpoint_interval))
            if not (log_due or eval_due or save_due or caught):
                continue
            losses = torch.stack(losses).tolist()  # the one place that waits for the device
            for i, loss in enumerate(losses, step - len(losses) + 1):
                if not math.isfinite(loss):
                    raise Diverged(f"the loss of step {i} is {loss}; the last checkpoint is of step {saved_at}; try a lower "
                                   "--lr, a lower --kappa or a longer --warmup")
            elapsed = time.perf_counter() - clock
            seconds += elapsed
            rate = len(losses) * c.batch_size * c.context / elapsed
            record(f"loss {sum(losses) / len(losses):.4f}  lr {lr:.2e}  {rate:,.0f} tokens/s  "
                   f"{seconds / step * (c.steps - step):.0f} s left", train_loss=sum(losses) / len(losses), lr=lr,
                   tokens_per_second=round(rate))
            if eval_due:
                val_loss = validate()
            if save_due or caught:
                saved_at = save()
            if caught and step < c.steps:
                raise Stopped(caught[0])
            losses, clock = [], time.perf_counter()
    export(model, c, data.vocab)
    draw(out / "loss.png", {c.optimizer: out})
    return {"optimizer": c.optimizer, "lr": c.lr, "warmup": c.warmup, "val_loss": val_loss, "steps": step,
            "seconds": seconds, "tokens_per_second": step * c.batch_size * c.context / seconds}


def compare(typed):
    """AdamW, then AdmIRE: the same seed and batches, each with its own settings (or those typed)."""
    out = Path(typed.get("out", Config.out))
    runs = {}
    for optimizer in ("adamw", "admire"):
        own = typed | {"optimizer": optimizer, "out": str(out / optimizer)}
        own["resume"] = typed.get("resume", False) and (out / optimizer / "checkpoint.pt").exists()
        runs[optimizer] = configure(own)
        open_folder(dataclasses.replace(runs[optimizer], overwrite=False, resume=own["resume"] or runs[optimizer].overwrite))
    adamw, admire = (train(c) for c in runs.values())
    draw(out / "loss.png", {f"{c.optimizer}, lr {c.lr:g}": c.out for c in runs.values()})
    reached = next((r["step"] for r in read_log(runs["admire"].out) if r.get("val_loss", math.inf) <= adamw["val_loss"]), None)
    summary = {"adamw": adamw, "admire": admire, "reached_at_step": reached}
    write_atomically(out / "compare.json", lambda f: f.write(json.dumps(summary, indent=1).encode()))
    print(f"\nAdamW {adamw['val_loss']:.4f}, AdmIRE {admire['val_loss']:.4f} after {adamw['steps']} steps; AdmIRE "
          + (f"was at AdamW's final loss by step {reached}, {adamw['steps'] / reached:.2f}x sooner" if reached else
             "did not reach AdamW's final loss")
          + f"; {admire['tokens_per_second'] / adamw['tokens_per_second']:.2f} of its tokens a second\n"
          f"figure     {out / 'loss.png'}")


# ------------------------------------------------------------------------------------------------ sampling
@torch.no_grad()
def generate(model, c, prompt: bytes, tokens, temperature, top_k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    text = torch.tensor([list(prompt or b"\n")])
    for _ in range(tokens):
        logits = model(text[:, -c.context:].to(c.device))[0, -1].float().cpu()
        if temperature == 0:
            token = logits.argmax()
        else:
            logits[logits < logits.topk(min(top_k, len(logits))).values[-1]] = -math.inf
            token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        text = torch.cat((text, token.view(1, 1)), dim=1)
    return bytes(text[0].tolist()).decode(errors="replace")


def sample(folder, prompt, tokens, temperature, top_k, device="auto"):
    saved = load_checkpoint(folder)
    c = complete(Config(**{**saved["config"], "device": device, "dtype": "float32", "compile": False, "resume": False}))
    model = Llama(c, len(saved["model"]["lm_head.weight"])).to(c.device)
    model.load_state_dict(saved["model"])
    return generate(model, c, prompt.encode(), tokens, temperature, top_k)


# ------------------------------------------------------------------------------------------------ command line
class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, without the usage
        self.exit(2, f"{self.prog}: {message}\n")


def parse(arguments):
    """What was typed, as {name: value}; the other settings have their defaults."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                    argument_default=argparse.SUPPRESS)
    for f in dataclasses.fields(Config):
        flag, kind = "--" + f.name.replace("_", "-"), {"str": str, "int": int, "float": float, "bool": bool}[f.type.__name__]
        text = f.metadata["help"] + ("" if f.default is None else f" (default {f.default})").replace("%", "%%")
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            parser.add_argument(flag, type=kind, choices=f.metadata["choices"], help=text, metavar=kind.__name__.upper()
                                if not f.metadata["choices"] else None)
    group = parser.add_argument_group("text from a run")
    group.add_argument("--sample", metavar="DIR", help="print text from the run in DIR instead of training")
    group.add_argument("--prompt", default="", help="how it begins")
    group.add_argument("--tokens", type=int, default=300, help="how long it is (default 300)")
    group.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default 0.8)")
    group.add_argument("--top-k", type=int, default=50, help="choose among so many tokens (default 50)")
    return vars(parser.parse_args(arguments))


def configure(typed):
    """The typed settings over the defaults, on --resume over those of the run."""
    saved = load_checkpoint(typed.get("out", Config.out))["config"] if typed.get("resume") else {}
    return complete(Config(**{**saved, **typed, "overwrite": typed.get("overwrite", False)}))


def main(arguments=None):
    typed = parse(arguments)
    folder, text = typed.pop("sample", None), {k: typed.pop(k) for k in ("prompt", "tokens", "temperature", "top_k")}
    try:
        for name, least in (("tokens", 1), ("temperature", 0), ("top_k", 1)):
            if not text[name] >= least:
                raise BadInput(f"--{name.replace('_', '-')}: got {text[name]}, allowed is {least} or more")
        if folder is not None:
            print(sample(folder, **text, device=typed.get("device", "auto")))
        elif typed.get("compare"):
            compare(typed)
        else:
            c = configure(typed)
            summary = train(c)
            print(f"\n{sample(c.out, **text, device=c.device)}\n\nvalidation loss {summary['val_loss']:.4f} after {summary['steps']} "
                  f"steps, {summary['seconds']:.0f} s\nfigure     {Path(c.out) / 'loss.png'}\nmodel      {Path(c.out) / 'hf'}")
    except BadInput as e:
        print(f"train_gpt.py: {e}", file=sys.stderr)
        return 2
    except Diverged as e:
        print(f"train_gpt.py: {e}", file=sys.stderr)
        return 1
    except Stopped as e:
        print("train_gpt.py: stopped; the checkpoint is written, go on with --resume", file=sys.stderr)
        return 128 + e.args[0]


if __name__ == "__main__":
    sys.exit(main())
