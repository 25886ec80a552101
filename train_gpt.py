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
import http.client
import json
import math
import os
import platform
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
TUNED = {"adamw": dict(lr=2e-3, warmup=500), "admire": dict(lr=2e-3, warmup=500)}

COUNT = (lambda x: x >= 1, "1 or more")
POSITIVE = (lambda x: 0 < x < math.inf, "a finite number above 0")
NOT_NEGATIVE = (lambda x: 0 <= x < math.inf, "0 or more")
FRACTION = (lambda x: 0 <= x < 1, "0 or more and below 1")


def one_of(*names):
    return (lambda x: x in names, " or ".join(names))


def setting(default, text, allowed=(lambda x: True, "")):
    return dataclasses.field(default=default, metadata={"help": text, "allowed": allowed})


@dataclass
class Config:
    # run
    out: str = setting("runs/gpt", "folder for config, log, checkpoint, figure and Hugging Face model")
    resume: bool = setting(False, "go on from the checkpoint in --out")
    overwrite: bool = setting(False, "delete the run in --out first")
    compare: bool = setting(False, "train with adamw, then with admire, and draw both")
    seed: int = setting(0, "of weights, batches and probes", (lambda x: 0 <= x < 2**63, "0 to 2^63 - 1"))
    device: str = setting("auto", "where to train: auto, cpu, cuda or mps", one_of("auto", "cpu", "cuda", "mps"))
    dtype: str = setting(None, "of the forward pass: float32, bfloat16 (default on CUDA) or float16",
                         one_of("float32", "bfloat16", "float16"))
    compile: bool = setting(None, "torch.compile the model (default on CUDA)")
    deterministic: bool = setting(False, "deterministic CUDA kernels, slower")
    # data
    data: str = setting("stdlib", "stdlib (Python's own source), shakespeare, a text file, a folder of text files, or a "
                                  "folder with train.bin, val.bin, meta.json")
    data_dir: str = setting("data", "folder for prepared data")
    tokenizer: str = setting("bytes", "what a token is: bytes", one_of("bytes"))
    # model: a standard Llama
    layers: int = setting(4, "transformer blocks", COUNT)
    width: int = setting(128, "size of the residual stream", COUNT)
    heads: int = setting(4, "attention heads; width / heads is even", COUNT)
    ffn: int = setting(336, "hidden size of the SwiGLU feed-forward", COUNT)
    context: int = setting(128, "tokens in a sequence", COUNT)
    # schedule
    steps: int = setting(1000, "optimizer steps", COUNT)
    batch_size: int = setting(16, "sequences in a step", COUNT)
    micro_batch: int = setting(None, "sequences in a forward pass; divides batch-size (default all)", COUNT)
    warmup: int = setting(None, "steps to the peak learning rate (default: the optimizer's best)", NOT_NEGATIVE)
    min_lr: float = setting(0.05, "last learning rate as a fraction of the peak (cosine)", (lambda x: 0 <= x <= 1, "0 to 1"))
    clip: float = setting(1.0, "largest norm of the gradient", POSITIVE)
    # optimizer
    optimizer: str = setting("admire", "adamw, or admire, which is IRE over it", one_of("adamw", "admire"))
    lr: float = setting(None, "peak learning rate (default: the optimizer's best)", POSITIVE)
    beta1: float = setting(0.9, "AdamW's decay of the mean", FRACTION)
    beta2: float = setting(0.95, "AdamW's decay of the second moment", FRACTION)
    eps: float = setting(1e-8, "AdamW's epsilon", POSITIVE)
    weight_decay: float = setting(0.1, "AdamW's, on matrices only", NOT_NEGATIVE)
    kappa: float = setting(1.0, "IRE: steps along flat coordinates are 1 + kappa times as long", NOT_NEGATIVE)
    gamma: float = setting(0.7, "IRE: flat fraction of the coordinates", (lambda x: 0 < x < 1, "above 0 and below 1"))
    interval: int = setting(10, "IRE: steps from one mask to the next", COUNT)
    ire_warmup: int = setting(None, "IRE: steps before it switches on (default: --warmup)", NOT_NEGATIVE)
    curvature: str = setting("fisher", "IRE: where the mask comes from: fisher or second_moment",
                             one_of("fisher", "second_moment"))
    kappa_decay: bool = setting(False, "IRE: kappa follows the learning rate down")
    probe_batches: int = setting(None, "IRE: micro-batches of the step that feed the probe (default all)", COUNT)
    # report
    log_interval: int = setting(20, "steps between lines of the log", COUNT)
    eval_interval: int = setting(100, "steps between validations", COUNT)
    eval_sequences: int = setting(512, "validation sequences, evenly spaced", COUNT)
    checkpoint_interval: int = setting(100, "steps between checkpoints", COUNT)


class BadInput(ValueError):
    """What the user can mend: the script prints it in one line and exits with 2."""


def check(c, name, good, allowed):
    if not good:
        raise BadInput(f"--{name.replace('_', '-')}: got {getattr(c, name)}, allowed is {allowed}")


def complete(c: Config) -> Config:
    """Fills in what depends on other settings; raises BadInput on values out of range."""
    for f in dataclasses.fields(c):
        good, allowed = f.metadata["allowed"]
        check(c, f.name, getattr(c, f.name) is None or good(getattr(c, f.name)), allowed)
    here = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    device = next(d for d in ("cuda", "mps", "cpu") if here[d]) if c.device == "auto" else c.device
    check(c, "device", here[device], f"what this machine has: {', '.join(d for d in here if here[d])}")
    tuned = TUNED[c.optimizer]
    given = {k: v for k, v in dataclasses.asdict(c).items() if v is not None}
    c = Config(**{**tuned, "warmup": min(tuned["warmup"], c.steps // 2), "micro_batch": c.batch_size,
                  "dtype": "bfloat16" if device == "cuda" else "float32", "compile": device == "cuda", **given, "device": device})
    check(c, "micro_batch", c.batch_size % c.micro_batch == 0, f"a divisor of --batch-size {c.batch_size}")
    c.ire_warmup = c.warmup if c.ire_warmup is None else c.ire_warmup
    c.probe_batches = c.batch_size // c.micro_batch if c.probe_batches is None else c.probe_batches
    check(c, "probe_batches", c.probe_batches <= c.batch_size // c.micro_batch,
          f"1 to {c.batch_size // c.micro_batch}, the micro-batches of a step")
    check(c, "width", c.width % (2 * c.heads) == 0, f"a multiple of twice --heads, {2 * c.heads}")
    check(c, "warmup", c.warmup < c.steps, f"0 to --steps - 1, {c.steps - 1}")
    check(c, "dtype", not (c.dtype == "float16" and device == "cpu"), "float32 or bfloat16 on a CPU")
    check(c, "resume", not (c.resume and c.overwrite), "one of --resume and --overwrite")
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
            except (OSError, http.client.HTTPException) as e:
                raise BadInput(f"--data: shakespeare can't be fetched ({e!r}); put the text at {path}") from None
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
    texts, digest = [p.read_bytes() for p in text_files(c)], hashlib.sha256()
    for text in texts:
        digest.update(text)
    name = c.data if c.data in ("stdlib", "shakespeare") else Path(c.data).stem
    folder = Path(c.data_dir) / f"{name}-{c.tokenizer}-{digest.hexdigest()[:12]}"
    if folder.exists():
        return folder
    random.Random(0).shuffle(texts)
    if len(texts) >= 20:  # every twentieth file is held out
        split = {"val": texts[::20], "train": [t for i, t in enumerate(texts) if i % 20]}
    else:  # the last tenth of the text is
        text = b"\n".join(texts)
        split = {"train": [text[:len(text) * 9 // 10]], "val": [text[len(text) * 9 // 10:]]}
    tokens = {part: np.frombuffer(b"\n".join(texts), np.uint8).astype("<u2") for part, texts in split.items()}
    for part in tokens:
        if len(tokens[part]) <= c.context:
            raise BadInput(f"--data: {c.data} leaves {len(tokens[part])} tokens for {part}, fewer than one --context "
                           f"of {c.context} and the next token")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for part, values in tokens.items():
        write_atomically(temporary / f"{part}.bin", values.tofile)
    write_json(temporary / "meta.json", {
        "tokenizer": c.tokenizer, "vocab_size": 256, "source": c.data, "sha256": digest.hexdigest(),
        **{f"{part}_tokens": len(values) for part, values in tokens.items()}})
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
            self.vocab, self.tokenizer = int(self.meta["vocab_size"]), str(self.meta["tokenizer"])
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise BadInput(f"--data: {folder / 'meta.json'} needs tokenizer and vocab_size: {e!r}") from None
        for part in ("train", "val"):
            path = folder / f"{part}.bin"
            size = path.stat().st_size if path.exists() else 0
            whole = 2 * self.meta.get(f"{part}_tokens", size // 2)
            if size != whole or size // 2 <= c.context:
                raise BadInput(f"--data: {path} has {size} bytes, allowed is 2 for each token of meta.json ({whole} bytes) and "
                               f"more than one --context of {c.context} tokens")
            tokens = np.memmap(path, "<u2", "r")
            if (largest := int(tokens.max())) >= self.vocab:
                raise BadInput(f"--data: {path} holds token {largest}, allowed is 0 to vocab_size - 1, {self.vocab - 1}")
            setattr(self, part, tokens)
        self.sha256 = self.meta.get("sha256") or hashlib.sha256(self.train).hexdigest()

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
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value):
    write_atomically(path, lambda f: f.write(json.dumps(value, indent=1).encode()))


def load_checkpoint(folder):
    path = Path(folder) / "checkpoint.pt"
    if not path.exists():
        raise BadInput(f"{path} does not exist; is {folder} the --out of a run?")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if not {"config", "data", "step", "model", "optimizer"} <= saved.keys():
            raise ValueError("it is none of train_gpt.py")
        return saved
    except Exception as e:  # torch.load raises many kinds
        raise BadInput(f"{path} can't be read as a checkpoint: {f'{e} '.splitlines()[0] or type(e).__name__}") from None


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
    write_atomically(Path(c.out) / "hf/model.safetensors", lambda f: f.write(save(state, {"format": "pt"})))
    write_json(Path(c.out) / "hf/config.json", config)
    write_json(Path(c.out) / "hf/generation_config.json", {"bos_token_id": None, "eos_token_id": None})


def read_log(folder):
    lines = (Path(folder) / "log.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]  # a kill may leave half a line


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
        log, settings = read_log(folder), json.loads((Path(folder) / "config.json").read_text())
        losses = [r["val_loss"] for r in log if "val_loss" in r]
        axes.set_ylim(0.95 * min(losses), 1.02 * losses[min(2, len(losses) - 1)])  # the first fall would hide the rest
        if settings["optimizer"] == "admire":
            axes.axvline(settings["ire_warmup"], color=color, linestyle=":", label="IRE switches on")
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


def train_step(forward, optimizer, batch, c: Config, scaler, autocast):
    """Probe where one is due, forward and backward of each micro-batch, clip, step; returns loss and gradient norm."""
    probing = getattr(optimizer, "probe_due", False)
    share = c.probe_batches == 1 and not c.compile  # one forward serves both; compiled graphs can't be run back twice
    if probing and not share:
        with optimizer.probe():
            for x, _ in batch[:c.probe_batches]:
                with autocast:
                    logits = forward(x).float()
                scaler.scale(sampled_cross_entropy(logits)).backward()
    total = 0.0
    for i, (x, y) in enumerate(batch):
        with autocast:
            logits = forward(x).float()
            loss = F.cross_entropy(logits.flatten(0, 1), y.flatten()) / len(batch)
        if probing and share and i == 0:
            with optimizer.probe():
                scaler.scale(sampled_cross_entropy(logits)).backward(retain_graph=True)
        scaler.scale(loss).backward()
        total = total + loss.detach()
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], c.clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return torch.stack((total, norm))


def environment():
    try:
        commit = subprocess.run(["git", "rev-parse", "--verify", "-q", "HEAD"], cwd=Path(__file__).parent, capture_output=True,
                                text=True).stdout.strip()
    except OSError:
        commit = ""
    return {"torch": torch.__version__, "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else
            f"{platform.machine()} CPU, {torch.get_num_threads()} threads", "commit": commit}


def describe(c: Config, data, model):
    ire = (f", kappa {c.kappa:g}, gamma {c.gamma:g}, K {c.interval}, on from step {c.ire_warmup}, {c.curvature}"
           if c.optimizer == "admire" else "")
    tokens = c.steps * c.batch_size * c.context
    print(f"model      Llama, {sum(p.numel() for p in model.parameters()):,} parameters: {c.layers} layers of width {c.width}\n"
          f"data       {c.data}: {len(data.train):,} training and {len(data.val):,} validation tokens ({data.tokenizer})\n"
          f"device     {c.device}, {c.dtype}" + (f", {torch.get_num_threads()} threads" if c.device == "cpu" else "")
          + (", compiled" if c.compile else "") + "\n"
          f"optimizer  {c.optimizer}, lr {c.lr:g} after {c.warmup} steps{ire}\n"
          f"run        {c.steps} steps of {c.batch_size * c.context:,} tokens, {tokens / len(data.train):.2f} epochs, into {c.out}; "
          f"the loss starts near ln {data.vocab} = {math.log(data.vocab):.2f}", flush=True)


# What may differ on --resume: it does not change the weights.
FREE = {"out", "resume", "overwrite", "compare", "data", "data_dir", "log_interval", "eval_interval", "eval_sequences",
        "checkpoint_interval"}


def refuse_changes(settings, saved, out):
    for name, value in settings.items():
        if name not in FREE and value != saved[name]:
            why = "; the cosine is cut to the steps, so a longer run starts anew" if name == "steps" else ""
            raise BadInput(f"--{name.replace('_', '-')}: got {value}, allowed on --resume is what {out} began with, "
                           f"{saved[name]}{why}")


def restore(c: Config, data, model, optimizer, scaler):
    """Loads the checkpoint in c.out; returns its step and training seconds."""
    saved = load_checkpoint(c.out)
    refuse_changes(dataclasses.asdict(c), saved["config"], c.out)
    if saved["data"] != data.sha256:
        raise BadInput(f"--data: the text is not the one that {c.out} began with (sha256 {saved['data'][:12]}, now "
                       f"{data.sha256[:12]})")
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    scaler.load_state_dict(saved["scaler"])
    torch.set_rng_state(saved["rng"])
    if c.device == "cuda":
        torch.cuda.set_rng_state(saved["cuda_rng"])
    log = "".join(json.dumps(line) + "\n" for line in read_log(c.out) if line["step"] <= saved["step"])
    write_atomically(Path(c.out) / "log.jsonl", lambda f: f.write(log.encode()))
    return saved["step"], saved["seconds"]


def check_folder(c: Config):
    """Refuses an --out that holds a run, unless --resume or --overwrite says what to do with it."""
    for name in ("out", "data_dir"):
        check(c, name, Path(getattr(c, name)).is_dir() or not Path(getattr(c, name)).exists(), "a folder, not a file")
    if (Path(c.out) / "checkpoint.pt").exists() and not (c.resume or c.overwrite):
        raise BadInput(f"--out: {c.out} holds a run; add --resume to go on with it or --overwrite to lose it")


def train(c: Config, build=None):
    """Trains one model; returns its summary, a dict with val_loss, steps, seconds, tokens_per_second and settings.
    `build(model, c)` makes the optimizer, where it is not to be the one of the settings (benchmarks/speedup.py)."""
    c = complete(c)
    check_folder(c)
    out, data = Path(c.out), Data(c)
    if c.overwrite:
        for name in ("checkpoint.pt", "config.json", "log.jsonl", "loss.png", "hf"):
            shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink(missing_ok=True)
    torch.manual_seed(c.seed)
    torch.set_float32_matmul_precision("high")
    if c.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(c.deterministic)
    model = Llama(c, data.vocab).to(c.device)
    forward = torch.compile(model) if c.compile else model
    optimizer = (build or make_optimizer)(model, c)
    scaler = torch.amp.GradScaler(c.device, enabled=c.dtype == "float16")
    autocast = torch.autocast(c.device, getattr(torch, c.dtype), enabled=c.dtype != "float32")
    step, seconds = restore(c, data, model, optimizer, scaler) if c.resume else (0, 0.0)
    saved_at = f"the last checkpoint is of step {step}" if c.resume else "no checkpoint was written"
    write_json(out / "config.json", dataclasses.asdict(c) | environment())
    describe(c, data, model)

    def record(line, **values):
        log.write(json.dumps({"step": step, **values, "seconds": round(seconds, 3)}) + "\n")
        log.flush()
        bar.write(f"step {step:5}/{c.steps}  {line}")

    def diverged(what, at):
        return Diverged(f"step {at}: {what}; {saved_at}; try a lower --lr, a lower --kappa or a longer --warmup")

    @torch.no_grad()
    def validate():
        total = count = 0
        for x, y in data.validation():
            with autocast:
                total += F.cross_entropy(forward(x).float().flatten(0, 1), y.flatten(), reduction="sum").double()
            count += y.numel()
        loss = float(total) / count
        if not math.isfinite(loss):
            raise diverged(f"the validation loss is {loss}", step)
        record(f"validation loss {loss:.4f}", val_loss=loss)

    def save():
        state = {"config": dataclasses.asdict(c), "data": data.sha256, "step": step, "seconds": seconds,
                 "model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                 "rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state() if c.device == "cuda" else None}
        write_atomically(out / "checkpoint.pt", lambda f: torch.save(state, f))

    with (signals() as caught, open(out / "log.jsonl", "a" if c.resume else "w") as log,
          tqdm(total=c.steps, initial=step, unit="step", disable=not sys.stderr.isatty()) as bar):
        if step == 0:
            validate()
        pending, clock = [], time.perf_counter()
        while step < c.steps:
            lr = learning_rate(c, step)
            for group in optimizer.param_groups:
                group["lr"] = lr
                if c.kappa_decay:
                    group["kappa"] = c.kappa * lr / c.lr
            pending.append(train_step(forward, optimizer, data.batch(step), c, scaler, autocast))
            step += 1
            bar.update()
            log_due, eval_due, save_due = (step % every == 0 or step == c.steps for every in (
                c.log_interval, c.eval_interval, c.checkpoint_interval))
            if not (log_due or eval_due or save_due or caught):
                continue
            losses, norms = torch.stack(pending).T.tolist()  # the one place that waits for the device
            for i, (loss, norm) in enumerate(zip(losses, norms), step - len(losses) + 1):
                if not math.isfinite(loss) or not (math.isfinite(norm) or scaler.is_enabled()):
                    raise diverged(f"the loss is {loss}, the gradient's norm {norm}", i)
            loss, norm, elapsed = sum(losses) / len(losses), sum(norms) / len(norms), time.perf_counter() - clock
            seconds += elapsed
            rate = len(losses) * c.batch_size * c.context / elapsed
            record(f"loss {loss:.4f}  lr {lr:.2e}  {rate:,.0f} tokens/s  {seconds / step * (c.steps - step):.0f} s left",
                   train_loss=loss, lr=lr, grad_norm=norm, tokens_per_second=round(rate))
            if eval_due:
                validate()
            if save_due or caught:
                save()
                saved_at = f"the last checkpoint is of step {step}"
            if caught and step < c.steps:
                raise Stopped(caught[0])
            pending, clock = [], time.perf_counter()
    export(model, c, data.vocab)
    draw(out / "loss.png", {c.optimizer: out})
    ire = dict(kappa=c.kappa, gamma=c.gamma, interval=c.interval, curvature=c.curvature) if c.optimizer == "admire" else {}
    return {"optimizer": c.optimizer, "lr": c.lr, "warmup": c.warmup, **ire, "seed": c.seed, "steps": step,
            "val_loss": [r["val_loss"] for r in read_log(out) if "val_loss" in r][-1], "seconds": seconds,
            "tokens_per_second": step * c.batch_size * c.context / seconds}


def compare(typed):
    """AdamW, then AdmIRE: the same seed and batches, each with its own settings (or those typed)."""
    out, runs = Path(typed.get("out", Config.out)), {}
    if "optimizer" in typed:
        raise BadInput(f"--optimizer: got {typed['optimizer']}, allowed with --compare is to leave it out")
    if typed.get("resume") and (out / "compare.json").exists():
        typed = json.loads((out / "compare.json").read_text())["typed"] | typed
    for optimizer in ("adamw", "admire"):
        own = typed | {"optimizer": optimizer, "out": str(out / optimizer)}
        own["resume"] = typed.get("resume", False) and (out / optimizer / "checkpoint.pt").exists()
        runs[optimizer] = configure(own)
        check_folder(runs[optimizer])
    Data(runs["adamw"])
    summary = {"command": " ".join(["python", "train_gpt.py", *sys.argv[1:]]), **environment(),
               "typed": {k: v for k, v in typed.items() if k not in ("resume", "overwrite", "compare")}}
    write_json(out / "compare.json", summary)
    adamw, admire = (train(c) for c in runs.values())
    draw(out / "loss.png", {f"{c.optimizer}, lr {c.lr:g}": c.out for c in runs.values()})
    reached = next((r["step"] for r in read_log(runs["admire"].out)
                    if r["step"] and r.get("val_loss", math.inf) <= adamw["val_loss"]), None)
    write_json(out / "compare.json", summary | {"adamw": adamw, "admire": admire, "reached_at_step": reached})
    print(f"\nAdamW {adamw['val_loss']:.4f}, AdmIRE {admire['val_loss']:.4f} after {adamw['steps']} steps; AdmIRE "
          + (f"was at AdamW's final loss by step {reached}, in {reached / adamw['steps']:.2f} of its steps" if reached else
             "did not reach AdamW's final loss")
          + f"; {admire['tokens_per_second'] / adamw['tokens_per_second']:.2f} of its tokens a second\n"
          f"figure     {out / 'loss.png'}")


# ------------------------------------------------------------------------------------------------ sampling
@torch.no_grad()
def generate(model, c, tokens, count, temperature, top_k, seed=0):
    """`count` more tokens after the list `tokens`."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        logits = model(torch.tensor([tokens[-c.context:]], device=c.device))[0, -1].float().cpu()
        if temperature == 0:
            tokens = tokens + [int(logits.argmax())]
        else:
            logits[logits < logits.topk(min(top_k, len(logits))).values[-1]] = -math.inf
            tokens = tokens + [int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))]
    return tokens


def sample(folder, prompt, tokens, temperature, top_k, device="auto"):
    """Text from the run in `folder`; token numbers where its tokens are not bytes."""
    saved = load_checkpoint(folder)
    c = complete(Config(**{**saved["config"], "device": device, "dtype": "float32", "compile": False, "resume": False}))
    vocab = len(saved["model"]["lm_head.weight"])
    model = Llama(c, vocab).to(c.device)
    model.load_state_dict(saved["model"])
    if vocab == 256:
        text = generate(model, c, list(os.fsencode(prompt) or b"\n"), tokens, temperature, top_k)
        return bytes(text).decode(errors="replace")
    if prompt:
        raise BadInput(f"--prompt: got {prompt!r}, allowed for tokens that are not bytes is none")
    return " ".join(map(str, generate(model, c, [0], tokens, temperature, top_k)))


# ------------------------------------------------------------------------------------------------ command line
class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, without the usage
        self.exit(2, f"{self.prog}: {message}; --help shows what is allowed\n")


def parse(arguments):
    """What was typed, as {name: value}; the other settings have their defaults."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                    argument_default=argparse.SUPPRESS)
    for f in dataclasses.fields(Config):
        flag, kind = "--" + f.name.replace("_", "-"), f.type
        text = f.metadata["help"] + ("" if f.default is None else f" (default {f.default})")
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            parser.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=text)
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
    if saved:
        refuse_changes(typed, saved, typed.get("out", Config.out))
    return complete(Config(**{**saved, **typed, "overwrite": typed.get("overwrite", False)}))


def main(arguments=None):
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a sample may hold what the terminal has no letter for
    typed = parse(arguments)
    folder, text = typed.pop("sample", None), {k: typed.pop(k) for k in ("prompt", "tokens", "temperature", "top_k")}
    try:
        for name, least in (("tokens", 1), ("temperature", 0), ("top_k", 1)):
            if not least <= text[name] < math.inf:
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
    except (Diverged, OSError) as e:
        print(f"train_gpt.py: {e}", file=sys.stderr)
        return 1
    except Stopped as e:
        print("train_gpt.py: stopped; the checkpoint is written, go on with --resume", file=sys.stderr)
        return 128 + e.args[0]


if __name__ == "__main__":
    sys.exit(main())
