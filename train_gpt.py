"""Pre-train a Llama with AdamW or AdmIRE, on a laptop or on eight GPUs. The smallest command first:

    python train_gpt.py                              # about 1M parameters on Python's own source, minutes on a laptop
    python train_gpt.py --compare                    # AdamW, then AdmIRE, on the same batches
    python train_gpt.py --data my.txt --steps 2000   # your text: a file or a folder of files
    python train_gpt.py --resume                     # go on after Ctrl-C, to the same bits
    python train_gpt.py --sample runs/gpt --prompt "def "
    python train_gpt.py --preset 119m                # a row of the paper, on one GPU
    torchrun --standalone --nproc_per_node 8 train_gpt.py --preset 229m

Top to bottom: settings, model, data, files, training, sampling, command line.
"""
import argparse, contextlib, dataclasses, hashlib, importlib.util, itertools, json, math, os, random, shutil, signal
import subprocess, sys, sysconfig, time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from ire import AdmIRE, sampled_cross_entropy

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))

# ------------------------------------------------------------------------------------------------ settings
# The paper's rows as standard Llamas, which stand for its models and do not equal them (60M has width 410 there, 10 heads).
# tiny: the best of equally many trials of either optimizer, on which they agree (results/sweep-tiny.json).
NAMES = ("tiny", "60m", "119m", "229m")
PRESETS = {
    "data": ("stdlib", "wikitext-103", "minipile", "openwebtext"),
    "tokenizer": ("bytes", "gpt2", "gpt2", "gpt2"),
    "layers": (4, 16, 6, 16),
    "width": (128, 384, 768, 768),
    "heads": (4, 6, 12, 12),
    "ffn": (336, 1024, 2048, 3072),
    "context": (128, 150, 512, 1024),
    "batch_size": (16, 240, 300, 480),
    "steps": (1000, 50_000, 30_000, 50_000),
    "warmup": (500, 500, 300, 1000),
    "lr": (2e-3, 6e-4, 6e-4, 6e-4),
    "eps": (1e-8, 1e-16, 1e-16, 1e-16),
    "kappa": (1.0, 2.0, 4.0, 4.0),
    "gamma": (0.7, 0.7, 0.6, 0.6),
}
COUNT = (lambda x: x >= 1, "1 or more")
POSITIVE = (lambda x: 0 < x < math.inf, "a finite number above 0")
NOT_NEGATIVE = (lambda x: 0 <= x < math.inf, "0 or more")
FRACTION = (lambda x: 0 <= x < 1, "0 or more and below 1")

def one_of(*names):
    return (lambda x: x in names, " or ".join(names))

def setting(default, text, allowed=(lambda x: True, ""), free=False):
    return dataclasses.field(default=default, metadata={"help": text, "allowed": allowed, "free": free})

def free(*args):
    """A setting that may differ on --resume, since it does not change the weights."""
    return setting(*args, free=True)

@dataclasses.dataclass
class Config:
    # run
    preset: str = setting("tiny", "model, data, schedule and IRE of a row of the paper: " + ", ".join(NAMES), one_of(*NAMES))
    out: str = free("runs/gpt", "folder for config, log, checkpoint, figure and Hugging Face model")
    resume: bool = free(False, "go on from the checkpoint in --out")
    overwrite: bool = free(False, "delete the run in --out first")
    compare: bool = free(False, "train with adamw, then with admire, and draw both")
    eval_only: bool = free(False, "print the validation loss of the run, or of the Hugging Face folder, in --out")
    seed: int = setting(0, "of weights, batches and probes", (lambda x: 0 <= x < 2**63, "0 to 2^63 - 1"))
    device: str = setting("auto", "where to train: auto, cpu, cuda or mps", one_of("auto", "cpu", "cuda", "mps"))
    dtype: str = setting(None, "of the forward pass (default float32, on CUDA bfloat16)", one_of("float32", "bfloat16", "float16"))
    compile: bool = setting(None, "torch.compile the blocks and the loss (default on CUDA)")
    deterministic: bool = setting(False, "deterministic CUDA kernels, slower")
    fsdp: bool = setting(False, "shard model and optimizer over torchrun's ranks (FSDP2) instead of copying them (DDP)")
    # data
    data: str = free(None, "stdlib (Python's own source), shakespeare, wikitext-2, wikitext-103, minipile, openwebtext, a text "
                           "file, a folder of text files, or a folder with train.bin, val.bin, meta.json")
    data_dir: str = free("data", "folder for prepared data")
    tokenizer: str = setting(None, "what a token is: bytes or gpt2", one_of("bytes", "gpt2"))
    # model: a standard Llama
    layers: int = setting(None, "transformer blocks", COUNT)
    width: int = setting(None, "size of the residual stream", COUNT)
    heads: int = setting(None, "attention heads; width / heads is even", COUNT)
    ffn: int = setting(None, "hidden size of the SwiGLU feed-forward", COUNT)
    context: int = setting(None, "tokens in a sequence", COUNT)
    # schedule
    steps: int = setting(None, "optimizer steps", COUNT)
    batch_size: int = setting(None, "sequences in a step, over all ranks", COUNT)
    micro_batch: int = setting(None, "sequences in a forward pass (default: a divisor of the batch, up to 32,768 tokens)", COUNT)
    warmup: int = setting(None, "steps to the peak learning rate, at most half of the steps by default", NOT_NEGATIVE)
    min_lr: float = setting(0.05, "last learning rate as a fraction of the peak (cosine)", (lambda x: 0 <= x <= 1, "0 to 1"))
    clip: float = setting(1.0, "largest norm of the gradient", POSITIVE)
    stop_at: float = free(None, "end the run at a validation loss this low", POSITIVE)
    # optimizer
    optimizer: str = setting("admire", "adamw, or admire, which is IRE over it", one_of("adamw", "admire"))
    lr: float = setting(None, "peak learning rate", POSITIVE)
    beta1: float = setting(0.9, "AdamW's decay of the mean", FRACTION)
    beta2: float = setting(0.95, "AdamW's decay of the second moment", FRACTION)
    eps: float = setting(None, "AdamW's epsilon", POSITIVE)
    weight_decay: float = setting(0.1, "AdamW's, on matrices only", NOT_NEGATIVE)
    kappa: float = setting(None, "IRE: steps along flat coordinates are 1 + kappa times as long", NOT_NEGATIVE)
    gamma: float = setting(None, "IRE: flat fraction of the coordinates", (lambda x: 0 < x < 1, "above 0 and below 1"))
    interval: int = setting(10, "IRE: steps from one mask to the next (K)", COUNT)
    ire_warmup: int = setting(None, "IRE: steps before it switches on (default: --warmup)", NOT_NEGATIVE)
    curvature: str = setting("fisher", "IRE: source of the mask: fisher or second_moment", one_of("fisher", "second_moment"))
    kappa_decay: bool = setting(False, "IRE: kappa follows the learning rate down")
    probe_batches: int = setting(None, "IRE: micro-batches of the step, on each rank, that feed the probe (default all)", COUNT)
    # report
    log_interval: int = free(20, "steps between lines of the log", COUNT)
    eval_interval: int = free(100, "steps between validations", COUNT)
    eval_sequences: int = free(512, "validation sequences, evenly spaced", COUNT)
    checkpoint_interval: int = free(100, "steps between checkpoints", COUNT)
    wandb: bool = free(False, "send the log to Weights & Biases too")
    tensorboard: bool = free(False, "write the log for TensorBoard too, into --out")
    # text from a run
    sample: str = free(None, "print text from the run, or Hugging Face folder, here instead of training")
    prompt: str = free("", "how the text begins")
    tokens: int = free(300, "how long it is", COUNT)
    temperature: float = free(0.8, "0 takes the likeliest token", NOT_NEGATIVE)
    top_k: int = free(50, "choose among so many tokens", COUNT)

class Halt(Exception):
    """Ends the script with one line and this exit code."""
    code = 1

class Diverged(Halt):
    """The loss is not finite."""

class BadInput(Halt, ValueError):
    """What the user can mend."""
    code = 2

def check(c, name, good, allowed):
    if not good: raise BadInput(f"--{name.replace('_', '-')}: got {getattr(c, name)}, allowed is {allowed}")

def need(package, what):
    if importlib.util.find_spec(package) is None: raise BadInput(f"{what} needs {package}: pip install {package}")

def complete(c: Config) -> Config:
    """Fills in what depends on other settings; raises BadInput on values out of range."""
    for f in dataclasses.fields(c):
        good, allowed = f.metadata["allowed"]
        check(c, f.name, getattr(c, f.name) is None or good(getattr(c, f.name)), allowed)
    here = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    device = next(d for d in ("cuda", "mps", "cpu") if here[d]) if c.device == "auto" else c.device
    check(c, "device", here[device], f"what this machine has: {', '.join(d for d in here if here[d])}")
    given = {k: v for k, v in dataclasses.asdict(c).items() if v is not None}
    preset = {name: row[NAMES.index(c.preset)] for name, row in PRESETS.items()}
    c = Config(**{**preset, "dtype": "bfloat16" if device == "cuda" else "float32", "compile": device == "cuda", **given})
    c.device, c.warmup = device, given.get("warmup", min(c.warmup, c.steps // 2))
    c.ire_warmup = c.warmup if c.ire_warmup is None else c.ire_warmup
    share, rest = divmod(c.batch_size, RANKS)
    check(c, "batch_size", rest == 0, f"a multiple of the {RANKS} ranks")
    c.micro_batch = c.micro_batch or max(n for n in range(1, share + 1) if share % n == 0 and n * c.context <= 2**15 or n == 1)
    check(c, "micro_batch", share % c.micro_batch == 0, f"a divisor of --batch-size over {RANKS} rank(s), {share}")
    each = share // c.micro_batch
    check(c, "probe_batches", (c.probe_batches or 1) <= each, f"1 to {each}, the micro-batches of a step")
    check(c, "width", c.width % (2 * c.heads) == 0, f"a multiple of twice --heads, {2 * c.heads}")
    check(c, "warmup", c.warmup < c.steps, f"0 to --steps - 1, {c.steps - 1}")
    check(c, "dtype", c.dtype != "float16" or device != "cpu" and not c.fsdp, "float32 or bfloat16 on a CPU or with --fsdp")
    check(c, "fsdp", not c.fsdp or "RANK" in os.environ, "--fsdp under torchrun")
    check(c, "resume", not (c.resume and c.overwrite), "one of --resume and --overwrite")
    return c

# ------------------------------------------------------------------------------------------------ model
def linears(**sizes):
    return nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})

def rotate(x, rotary):
    """Rotary embedding; the halves of a head are the pairs, as in Hugging Face's Llama."""
    (cos, sin), (a, b) = rotary, x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, d = c.heads, c.width
        self.input_layernorm = nn.RMSNorm(d, eps=1e-6)
        self.self_attn = linears(q_proj=(d, d), k_proj=(d, d), v_proj=(d, d), o_proj=(d, d))
        self.post_attention_layernorm = nn.RMSNorm(d, eps=1e-6)
        self.mlp = linears(gate_proj=(d, c.ffn), up_proj=(d, c.ffn), down_proj=(c.ffn, d))

    def forward(self, x, rotary, past=None):  # x: (batch, time, width)
        x = x + self.attention(self.input_layernorm(x), rotary, past)
        h, mlp = self.post_attention_layernorm(x), self.mlp
        return x + mlp.down_proj(F.silu(mlp.gate_proj(h)) * mlp.up_proj(h))

    def attention(self, x, rotary, past):
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (batch, heads, time, width / heads)
                   for project in (self.self_attn.q_proj, self.self_attn.k_proj, self.self_attn.v_proj))
        q, k, causal = rotate(q, rotary), rotate(k, rotary), not past
        if past is not None:  # the text first, then one token at a time, which sees all before it
            k, v = (torch.cat(pair, dim=2) for pair in zip(past, (k, v))) if past else (k, v)
            past[:] = k, v
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.self_attn.o_proj(y.transpose(1, 2).flatten(-2))

def true_loss(weight, x, targets):
    return F.cross_entropy(F.linear(x, weight).flatten(0, 1).float(), targets.flatten())

def drawn_loss(weight, x, key):
    """The probe's loss of one sequence. Its labels depend on its key alone: not on its neighbours, its rank or a re-run."""
    return sampled_cross_entropy(F.linear(x, weight).float(), generator=torch.Generator(x.device).manual_seed(int(key)))

class Llama(nn.Module):
    """Names and arithmetic of Hugging Face's LlamaForCausalLM, untied embeddings."""
    LOGITS = 2**26  # how many may exist at once

    def __init__(self, c, vocab):
        super().__init__()
        self.true_loss, half = true_loss, c.width // c.heads // 2
        self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(vocab, c.width), "layers": nn.ModuleList(
            Block(c) for _ in range(c.layers)), "norm": nn.RMSNorm(c.width, eps=1e-6)})
        self.lm_head = nn.Linear(c.width, vocab, bias=False)
        angles = torch.outer(torch.arange(c.context), 10000.0 ** (-torch.arange(half) / half))
        self.register_buffer("cos", angles.cos(), persistent=False)  # (context, head / 2)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:  # the projections that write to the residual stream start smaller (GPT-2)
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * c.layers) if residual else 0.02)

    def forward(self, tokens, targets=None, keys=None, past=None):
        """Logits (batch, time, vocab) of tokens (batch, time); with targets (batch, time) their mean cross entropy; with keys
        (batch) the probe's loss, Eq. 6; with both the pair. past: a list for each block, for what it keeps of earlier tokens."""
        start = past[0][0].shape[2] if past and past[0] else 0
        rotary = [angle[start:start + tokens.shape[1]] for angle in (self.cos, self.sin)]
        x = self.model.embed_tokens(tokens)
        for block, own in zip(self.model.layers, past or itertools.repeat(None)): x = block(x, rotary, own)
        x = self.model.norm(x)
        if targets is None and keys is None: return self.lm_head(x)
        losses = [self.mean(loss, x, y) for loss, y in ((self.true_loss, targets), (drawn_loss, keys)) if y is not None]
        return losses[0] if len(losses) == 1 else losses

    def mean(self, loss, x, y):
        """The mean loss. Where all logits together are too many, those of some sequences at a time, which are dropped and made
        again in the backward: under a tenth more work for a fraction of the memory."""
        a_sequence = x.shape[1] * self.lm_head.out_features
        small, size = len(x) * a_sequence <= self.LOGITS, 1 if loss is drawn_loss else max(1, self.LOGITS // a_sequence)
        run = loss if small else lambda *a: checkpoint(loss, *a, use_reentrant=False, preserve_rng_state=False)
        return sum(run(self.lm_head.weight, h, t) * len(h) for h, t in zip(x.split(size), y.split(size))) / len(x)

# ------------------------------------------------------------------------------------------------ data
SHAKESPEARE = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
               "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")
HUB = {"wikitext-2": ("Salesforce/wikitext", "wikitext-2-raw-v1"), "wikitext-103": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
       "minipile": ("JeanKaddour/minipile", None), "openwebtext": ("Skylion007/openwebtext", None)}

def text_files(c: Config) -> list[Path]:
    """The files behind --data, in a fixed order."""
    path = Path(c.data_dir) / "shakespeare.txt" if c.data == "shakespeare" else Path(c.data)
    if c.data == "stdlib":
        root, skip = Path(sysconfig.get_paths()["stdlib"]), {"test", "tests", "idle_test", "site-packages", "dist-packages"}
        files = [p for p in sorted(root.rglob("*.py")) if not skip & set(p.relative_to(root).parts)]
        if sum(p.stat().st_size for p in files) > 1 << 20: return files
        raise BadInput(f"--data: this Python has no library source under {root}; name a text file with --data FILE")
    if c.data == "shakespeare" and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:  # to a temporary name, checked, renamed
            torch.hub.download_url_to_file(SHAKESPEARE[0], str(path), hash_prefix=SHAKESPEARE[1], progress=False)
        except Exception as e:
            raise BadInput(f"--data: shakespeare can't be fetched ({e!r}); put the text at {path}") from None
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path] * path.exists()
    if files: return files
    raise BadInput(f"--data: nothing at {path}; allowed is stdlib, shakespeare, {', '.join(HUB)}, a text file, a folder of text "
                   "files, or a folder with train.bin, val.bin, meta.json")

def from_files(files):
    """Pieces of text (part, bytes, whether a document begins). Of twenty files or more each twentieth is held out, of fewer
    the last tenth of each."""
    random.Random(0).shuffle(files := list(files))
    for i, path in enumerate(files):
        size = path.stat().st_size
        cut = size * 9 // 10 if len(files) < 20 else size if i % 20 else 0
        with open(path, "rb") as f:
            for part, end in (("train", cut), ("val", size)):
                begins = True
                while text := f.read(min(1 << 20, end - f.tell())):
                    if f.tell() < end and (line := text.rfind(b"\n") + 1):  # gpt2 takes no half words
                        f.seek(line - len(text), os.SEEK_CUR)
                        text = text[:line]
                    yield part, text, begins
                    begins = False

def from_hub(c: Config):
    """The same, streamed from the Hugging Face hub, its cache or a local copy. WikiText's rows are lines of one document."""
    need("datasets", f"--data {c.data}")
    from datasets import load_dataset
    try:
        splits = load_dataset(*HUB[c.data], streaming=True)
        for split in ("train", "validation"):
            for i, row in enumerate(splits.get(split, ())):
                held_out = split != "train" or "validation" not in splits and i % 2000 == 0
                yield "val" if held_out else "train", row["text"].encode(), i == 0 or not c.data.startswith("wikitext")
    except Exception as e:  # the library and its network raise many kinds
        raise BadInput(f"--data: datasets can't read {HUB[c.data][0]} ({type(e).__name__}: {f'{e} '.splitlines()[0].strip()}); name a text "
                       "file or folder instead") from None

def codec(tokenizer):
    """Encoder of a list of texts (bytes), decoder of a list of tokens, size of the vocabulary, token between documents."""
    if tokenizer == "bytes":
        return (lambda texts: [np.frombuffer(t, np.uint8) for t in texts],
                lambda tokens: bytes(tokens).decode(errors="replace"), 256, ord("\n"))
    need("tiktoken", "--tokenizer gpt2")
    import tiktoken
    try:
        gpt2 = tiktoken.get_encoding("gpt2")
    except Exception as e:
        raise BadInput(f"--tokenizer: tiktoken can't fetch gpt2's vocabulary ({type(e).__name__}); use bytes, or set "
                       "TIKTOKEN_CACHE_DIR to a folder that has it") from None
    return (lambda texts: gpt2.encode_ordinary_batch([t.decode(errors="replace") for t in texts], num_threads=os.cpu_count()),
            gpt2.decode, gpt2.n_vocab, gpt2.eot_token)

def prepare(c: Config) -> Path:
    """The folder with train.bin, val.bin (uint16 tokens) and meta.json behind --data; made once, and whole or not."""
    if (Path(c.data) / "train.bin").exists(): return Path(c.data)
    if c.data in HUB:
        name, size, pieces = f"{c.data}-{c.tokenizer}", None, from_hub(c)
    else:
        stats = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in text_files(c)]
        name = f"{Path(c.data).stem}-{c.tokenizer}-{hashlib.sha256(repr(stats).encode()).hexdigest()[:12]}"
        size, pieces = sum(size for _, size, _ in stats), from_files(Path(p) for p, _, _ in stats)
    folder, temporary = Path(c.data_dir) / name, Path(c.data_dir) / f".{name}.{os.getpid()}"
    if (folder / "meta.json").exists(): return folder
    shutil.rmtree(folder, ignore_errors=True)  # half of one
    encode, _, vocab, between = codec(c.tokenizer)
    temporary.mkdir(parents=True, exist_ok=True)
    try:
        count, digest = {"train": 0, "val": 0}, {"train": hashlib.sha256(), "val": hashlib.sha256()}
        with (open(temporary / "train.bin", "wb") as train, open(temporary / "val.bin", "wb") as val,
              tqdm(total=size, desc=f"tokens of {c.data}", unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar):
            while batch := list(itertools.islice(pieces, 64)):
                for (part, text, begins), tokens in zip(batch, encode([text for _, text, _ in batch])):
                    tokens = np.concatenate(([between] if begins and count[part] else [], tokens)).astype("<u2").tobytes()
                    (train if part == "train" else val).write(tokens)
                    digest[part].update(tokens)
                    count[part] += len(tokens) // 2
                    bar.update(len(text))
            for f in (train, val):
                f.flush()
                os.fsync(f.fileno())
        for part, n in count.items():
            if n <= c.context: raise BadInput(f"--data: {c.data} leaves {n} tokens for {part}, fewer than one --context of "
                                              f"{c.context} and the next token")
        write_json(temporary / "meta.json", {
            "tokenizer": c.tokenizer, "vocab_size": vocab, "source": " ".join(filter(None, HUB.get(c.data, [c.data]))),
            **{f"{part}_tokens": n for part, n in count.items()}, "sha256": {part: d.hexdigest() for part, d in digest.items()}})
        with contextlib.suppress(OSError): temporary.rename(folder)  # another run was first
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError): temporary.parent.rmdir()  # where nothing is in it
    return folder

class Data:
    """Memory-mapped tokens. A batch is a function of seed and step, so a resumed run sees what it would have."""

    def __init__(self, c: Config):
        self.c, folder = c, prepare(c)
        try:
            meta = json.loads((folder / "meta.json").read_text())
            self.tokens = {"tokenizer": str(meta["tokenizer"]), "vocab": (vocab := int(meta["vocab_size"]))}
            self.sha256 = meta["sha256"]["train"] if "sha256" in meta else None
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise BadInput(f"--data: {folder / 'meta.json'} needs tokenizer and vocab_size: {e!r}") from None
        self.vocab = -(-vocab // 64) * 64  # padded, 50257 to 50304, which GPUs multiply faster
        for part in ("train", "val"):
            size = path.stat().st_size if (path := folder / f"{part}.bin").exists() else 0
            whole = 2 * meta.get(f"{part}_tokens", size // 2)
            if size != whole or size // 2 <= c.context:
                raise BadInput(f"--data: {path} has {size} bytes, allowed is 2 for each token of meta.json ({whole} bytes) and "
                               f"more than one --context of {c.context} tokens")
            setattr(self, part, tokens := np.memmap(path, "<u2", "r"))
            if not self.sha256 and (largest := int(tokens.max())) >= vocab:  # not made by prepare()
                raise BadInput(f"--data: {path} holds token {largest}, allowed is 0 to vocab_size - 1, {vocab - 1}")
        self.sha256 = self.sha256 or hashlib.sha256(self.train).hexdigest()

    def windows(self, tokens, starts):
        rows = torch.from_numpy(tokens[starts[:, None] + np.arange(self.c.context + 1)].astype(np.int64))
        rows = (rows.pin_memory() if self.c.device == "cuda" else rows).to(self.c.device, non_blocking=True)
        return rows[:, :-1], rows[:, 1:]  # inputs, targets: (sequences, context)

    def batch(self, step):
        """This rank's micro-batches of a step: inputs, targets, keys. Which sequences form one does not depend on RANKS."""
        c, rng = self.c, np.random.default_rng((self.c.seed, step))
        starts = rng.integers(len(self.train) - c.context, size=c.batch_size)
        keys = torch.from_numpy(rng.integers(2**31, size=c.batch_size))
        own = [slice(i, i + c.micro_batch) for i in range(RANK * c.micro_batch, c.batch_size, RANKS * c.micro_batch)]
        return [(*self.windows(self.train, starts[s]), keys[s]) for s in own]

    def validation(self):
        """As many micro-batches on each rank, since ranks that share a model go through it together."""
        count = max(RANKS, min(self.c.eval_sequences, (len(self.val) - 1) // self.c.context))
        starts = np.linspace(0, len(self.val) - self.c.context - 1, count).astype(np.int64)
        parts = np.array_split(starts, RANKS * math.ceil(count / RANKS / self.c.micro_batch))
        return (self.windows(self.val, s) for s in parts[RANK::RANKS])

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
    if not path.exists(): raise BadInput(f"{path} does not exist; is {folder} the --out of a run?")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if not {"config", "data", "step", "model", "optimizer"} <= saved.keys(): raise ValueError("it is none of train_gpt.py")
        return saved
    except Exception as e:  # torch.load raises many kinds
        raise BadInput(f"{path} can't be read as a checkpoint: {f'{e} '.splitlines()[0] or type(e).__name__}") from None

HF_NAMES = {"width": "hidden_size", "ffn": "intermediate_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
            "context": "max_position_embeddings"}  # the rest (rope_theta 10000, rms_norm_eps 1e-6, untied) is LlamaConfig's default

def export(weights, c: Config, tokens):
    """DIR/hf, which transformers opens with AutoModelForCausalLM.from_pretrained."""
    from safetensors.torch import save
    weights, nothing = {name: w.detach().cpu().contiguous() for name, w in weights.items()}, dict.fromkeys(
        ("bos_token_id", "eos_token_id"))
    write_atomically(Path(c.out) / "hf/model.safetensors", lambda f: f.write(save(weights, {"format": "pt"})))
    write_json(Path(c.out) / "hf/generation_config.json", nothing)
    write_json(Path(c.out) / "hf/config.json", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32", **nothing, "tokens": tokens,
        "vocab_size": len(weights["lm_head.weight"]), **{theirs: getattr(c, ours) for ours, theirs in HF_NAMES.items()}})

def load_model(folder, typed):
    """Model, settings and kind of tokens of a run, or of the Hugging Face folder that it wrote."""
    if (Path(folder) / "model.safetensors").exists():
        need("safetensors", folder)
        from safetensors.torch import load_file
        try:
            theirs, weights = json.loads((Path(folder) / "config.json").read_text()), load_file(Path(folder) / "model.safetensors")
            own, tokens = {ours: theirs[name] for ours, name in HF_NAMES.items()}, theirs["tokens"]
            own |= {"tokenizer": tokens["tokenizer"]} if tokens["tokenizer"] in ("bytes", "gpt2") else {}
        except Exception as e:  # safetensors has errors of its own
            raise BadInput(f"{folder} can't be read as a folder that train_gpt.py wrote: {e!r}") from None
    else:
        saved = load_checkpoint(folder)
        own, weights, tokens = saved["config"] | dict.fromkeys(("micro_batch", "probe_batches", "dtype")), saved["model"], saved["tokens"]
    c = complete(Config(**{**own, "device": "auto", "compile": False, "fsdp": False, "resume": False, **typed}))
    model = Llama(c, len(weights["lm_head.weight"]))
    model.load_state_dict(weights)
    return model.to(c.device), c, tokens

def read_log(folder):
    lines = (Path(folder) / "log.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]  # a kill may leave half a line

def draw(path, runs):
    """Loss over steps of each run {label: folder}."""
    from matplotlib.figure import Figure  # without pyplot, whose backend may be a notebook's
    axes = (figure := Figure(figsize=(6.4, 4), layout="constrained")).subplots()
    for (label, folder), color in zip(runs.items(), ("#0072B2", "#D55E00")):
        log, settings = read_log(folder), json.loads((Path(folder) / "config.json").read_text())
        (at, losses), (steps, training) = ([[r[k] for r in log if key in r] for k in ("step", key)] for key in ("val_loss", "train_loss"))
        axes.set_ylim(0.95 * min(losses), 1.02 * losses[min(2, len(losses) - 1)])  # the first fall would hide the rest
        if settings["optimizer"] == "admire": axes.axvline(settings["ire_warmup"], color=color, ls=":", label="IRE switches on")
        if len(runs) == 1: axes.plot(steps, training, color=color, alpha=0.35, label="training")
        axes.plot(at, losses, color=color, marker="o", ms=3, label=f"{label}, validation")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomically(Path(path), lambda f: figure.savefig(f, format="png", dpi=150))

def environment():
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--verify", "-q", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {"torch": torch.__version__, "hardware": hardware, "ranks": RANKS, "commit": commit}

# ------------------------------------------------------------------------------------------------ training
@contextlib.contextmanager
def signals():
    """A list that receives SIGINT and SIGTERM, so that the step they come in is finished."""
    caught = []
    before = {n: signal.signal(n, lambda number, _: caught.append(number)) for n in (signal.SIGINT, signal.SIGTERM)}
    try: yield caught
    finally:
        for number, handler in before.items(): signal.signal(number, handler)

def over_ranks(values, op=dist.ReduceOp.SUM):
    """Sums of numbers over all ranks; waits for them."""
    values = torch.as_tensor(values, dtype=torch.float64)
    if dist.is_initialized(): dist.all_reduce(values, op)
    return values.tolist()

def make_optimizer(model, c: Config):
    groups = [{"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": c.weight_decay},
              {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    adamw = dict(lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps)
    if c.optimizer == "adamw": return torch.optim.AdamW(groups, fused=c.device != "mps", **adamw)
    return AdmIRE(groups, kappa=c.kappa, gamma=c.gamma, interval=c.interval, warmup=c.ire_warmup, curvature=c.curvature, **adamw)

def learning_rate(c: Config, step):
    """Linear warm-up, then a cosine to min_lr * lr."""
    if step < c.warmup: return c.lr * (step + 1) / c.warmup
    progress = (step - c.warmup) / max(1, c.steps - 1 - c.warmup)
    return c.lr * (c.min_lr + (1 - c.min_lr) * 0.5 * (1 + math.cos(math.pi * progress)))

class Trainer:
    """Data, model and optimizer of a run, and its steps. build(model, c) makes an optimizer that is not that of the settings."""

    def __init__(self, c: Config, build=None):
        self.c, self.step, self.seconds = c, 0, 0.0
        if "RANK" in os.environ and not dist.is_initialized():  # gloo carries what is on the CPU
            if c.device == "cuda": torch.cuda.set_device(LOCAL_RANK)
            dist.init_process_group("cpu:gloo,cuda:nccl" if c.device == "cuda" else "gloo", timeout=timedelta(days=1))
        if LOCAL_RANK == 0: prepare(c)
        over_ranks([0])  # the others find the data made
        self.data = Data(c)
        torch.manual_seed(c.seed)
        torch.set_float32_matmul_precision("high")
        if c.deterministic: os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(c.deterministic)
        self.model = self.forward = Llama(c, self.data.vocab).to(c.device)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        if c.compile:  # block by block, which are alike: one compilation serves all of them, and the probe
            self.model.true_loss = torch.compile(true_loss)
            for block in self.model.model.layers: block.compile()
        if c.fsdp:
            from torch.distributed.fsdp import fully_shard
            mesh = dist.init_device_mesh(c.device, (RANKS,))
            for module in (*self.model.model.layers, self.model): fully_shard(module, mesh=mesh)
        elif dist.is_initialized():
            self.forward = nn.parallel.DistributedDataParallel(self.model)
        self.optimizer = (build or make_optimizer)(self.model, c)
        self.scaler = torch.amp.GradScaler(c.device, enabled=c.dtype == "float16")
        self.autocast = torch.autocast(c.device, getattr(torch, c.dtype), enabled=c.dtype != "float32")

    def loss(self, *args, **kwargs):
        with self.autocast: return self.forward(*args, **kwargs)

    def backward(self, batch, loss_of):
        """Gradients of the mean loss over micro-batches, which the ranks share in the last one's; returns that loss."""
        total = 0.0
        for left, one in zip(range(len(batch) - 1, -1, -1), batch):
            if self.c.fsdp: self.model.set_requires_gradient_sync(left == 0)
            with self.forward.no_sync() if left and self.forward is not self.model else contextlib.nullcontext():
                loss = loss_of(*one) / len(batch)
                self.scaler.scale(loss).backward()
            total = total + loss.detach()
        return total

    def train_step(self):
        """Probe where one is due, forward and backward of each micro-batch, clip, step; returns loss and gradient norm."""
        c, optimizer, batch, lr = self.c, self.optimizer, self.data.batch(self.step), learning_rate(self.c, self.step)
        for group in optimizer.param_groups: group.update({"lr": lr, **({"kappa": c.kappa * lr / c.lr} if c.kappa_decay else {})})
        probe = batch[:c.probe_batches] if getattr(optimizer, "probe_due", False) else []
        share = len(probe) == 1 and not c.compile and not dist.is_initialized()  # those can't go back twice through one forward
        if probe and not share:
            with optimizer.probe(): self.backward(probe, lambda x, y, keys: self.loss(x, keys=keys))

        def loss_of(x, y, keys):
            if not (share and optimizer.probe_due): return self.loss(x, y)
            loss, probe_loss = self.loss(x, y, keys)
            with optimizer.probe(): self.scaler.scale(probe_loss).backward(retain_graph=True)
            return loss

        loss = self.backward(batch, loss_of)
        self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), c.clip)
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad()
        self.step += 1
        return torch.stack((loss, norm.full_tensor() if c.fsdp else norm))

    @torch.no_grad()
    def validate(self):
        total, count = over_ranks(np.sum([(float(self.loss(x, y)) * len(x), len(x)) for x, y in self.data.validation()], 0))
        return total / count

    def flat(self):
        """The flat fraction of all coordinates."""
        masks = [state["flat"] for state in self.optimizer.state.values() if "flat" in state]
        counts = [m.sum() for m in masks]
        return sum(float(n.full_tensor() if self.c.fsdp else n) for n in counts) / max(1, sum(m.numel() for m in masks))

    def state(self):
        """Model and optimizer; whole on rank 0 where they are sharded, so that any number of ranks can go on with them."""
        if not self.c.fsdp: return self.model.state_dict(), self.optimizer.state_dict()
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
        return get_state_dict(self.model, self.optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def save(self):
        model, optimizer = self.state()
        saved = {"config": dataclasses.asdict(self.c), "ranks": RANKS, "data": self.data.sha256, "tokens": self.data.tokens,
                 "step": self.step, "seconds": self.seconds, "model": model, "optimizer": optimizer,
                 "scaler": self.scaler.state_dict()}
        if RANK == 0: write_atomically(Path(self.c.out) / "checkpoint.pt", lambda f: torch.save(saved, f))

    def restore(self):
        saved = load_checkpoint(self.c.out)
        refuse_changes(dataclasses.asdict(self.c), saved)
        if saved["data"] != self.data.sha256:
            raise BadInput(f"--data: the text is not the one that {self.c.out} began with (sha256 {saved['data'][:12]}, now "
                           f"{self.data.sha256[:12]})")
        if self.c.fsdp:
            from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict
            set_state_dict(self.model, self.optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"],
                           options=StateDictOptions(full_state_dict=True))
        else:
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        self.step, self.seconds = saved["step"], saved["seconds"]

    def describe(self):
        c, data, tokens = self.c, self.data, self.c.batch_size * self.c.context
        ire = f", kappa {c.kappa:g}, gamma {c.gamma:g}, K {c.interval}, on from step {c.ire_warmup}, {c.curvature}"
        device = [c.device, c.dtype] + [f"{torch.get_num_threads()} threads"] * (c.device == "cpu") + ["FSDP"] * c.fsdp
        device += [f"{RANKS} ranks"] * dist.is_initialized() + ["compiled: the first steps wait for it"] * c.compile
        print(f"model      Llama, {self.parameters:,} parameters: {c.layers} layers of width {c.width}\n"
              f"data       {c.data}: {len(data.train):,} training and {len(data.val):,} validation tokens "
              f"({data.tokens['tokenizer']})\ndevice     {', '.join(device)}\n"
              f"optimizer  {c.optimizer}, lr {c.lr:g} after {c.warmup} steps{ire if c.optimizer == 'admire' else ''}\n"
              f"run        {c.steps} steps of {tokens:,} tokens, {c.steps * tokens / len(data.train):.2f} epochs, into {c.out}; "
              f"the loss starts near ln {data.vocab} = {math.log(data.vocab):.2f}", flush=True)

    def utilisation(self, tokens_per_second):
        """Model FLOP utilisation (PaLM, appendix B) on GPUs whose dense bf16 peak is known; else None."""
        peak = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
        name, c = torch.cuda.get_device_name() if self.c.device == "cuda" else "", self.c
        flops = 6 * (self.parameters - self.data.vocab * c.width) + 12 * c.layers * c.width * c.context
        return next((tokens_per_second * flops / peak[gpu] / RANKS for gpu in peak if gpu in name), None)

def refuse_changes(settings, saved):
    own, fields = saved["config"], Config.__dataclass_fields__
    for name, value in settings.items():
        may = fields[name].metadata["free"] or name == "micro_batch" and saved["ranks"] != RANKS
        if not may and value != own[name]:
            why = "; the cosine is cut to the steps, so a longer run starts anew" if name == "steps" else ""
            raise BadInput(f"--{name.replace('_', '-')}: got {value}, allowed on --resume is what {own['out']} began with, {own[name]}{why}")

def check_folder(c: Config):
    """Refuses an --out that holds a run, unless --resume or --overwrite says what to do with it, and what would fail later."""
    for name in ("out", "data_dir"):
        check(c, name, Path(getattr(c, name)).is_dir() or not Path(getattr(c, name)).exists(), "a folder, not a file")
    if (Path(c.out) / "checkpoint.pt").exists() and not (c.resume or c.overwrite):
        raise BadInput(f"--out: {c.out} holds a run; add --resume to go on with it or --overwrite to lose it")
    for package, what in (("matplotlib", "the figure"), ("safetensors", "the Hugging Face folder"), ("wandb", "--wandb"),
                          ("tensorboard", "--tensorboard")):
        if getattr(c, package, True): need(package, what)

def train(c: Config, build=None):
    """Trains one model; returns its summary, a dict with val_loss, steps, seconds, tokens_per_second and settings. Raises
    BadInput, Diverged, Halt (stopped by a signal, the checkpoint is written). build(model, c): another optimizer."""
    check_folder(c := complete(c))
    run, out = Trainer(c, build), Path(c.out)
    if c.resume: run.restore()
    saved_at = f"the last checkpoint is of step {run.step}" if c.resume else "no checkpoint was written"
    past = [r for r in (read_log(out) if c.resume else ()) if r["step"] <= run.step]
    val_loss = next((r["val_loss"] for r in reversed(past) if r["step"] and "val_loss" in r), math.inf)
    if RANK == 0:
        if not c.resume: (out / "checkpoint.pt").unlink(missing_ok=True)
        write_atomically(out / "log.jsonl", lambda f: f.write("".join(json.dumps(r) + "\n" for r in past).encode()))
        write_json(out / "config.json", dataclasses.asdict(c) | environment())
        run.describe()
    if use_wandb := c.wandb and RANK == 0:
        import wandb
    if use_tensorboard := c.tensorboard and RANK == 0:
        from torch.utils.tensorboard import SummaryWriter

    def record(line, **values):
        if RANK: return
        values = {name: x for name, x in values.items() if x is not None}
        log.write(json.dumps({"step": run.step, **values, "seconds": round(run.seconds, 3)}) + "\n")
        log.flush()
        bar.write(f"step {run.step:5}/{c.steps}  {line}")
        if use_wandb: wandb.log(values, step=run.step)
        for name, x in values.items() if use_tensorboard else (): board.add_scalar(name, x, run.step)

    def need_finite(what, value, at):
        if not math.isfinite(value):
            raise Diverged(f"step {at}: {what} is {value}; {saved_at}; try a lower --lr, a lower --kappa or a longer --warmup")

    def validate():
        need_finite("the validation loss", loss := run.validate(), run.step)
        record(f"validation loss {loss:.4f}", val_loss=loss)
        if run.step and RANK == 0: draw(out / "loss.png", {c.optimizer: out})
        return loss

    def done():
        return run.step == c.steps or val_loss <= (c.stop_at or -math.inf)

    with (signals() as caught, open(out / "log.jsonl" if RANK == 0 else os.devnull, "a") as log,
          tqdm(total=c.steps, initial=run.step, unit="step", disable=RANK > 0 or not sys.stderr.isatty()) as bar,
          wandb.init(project="ire", name=out.name, dir=c.out, config=dataclasses.asdict(c)) if use_wandb else contextlib.nullcontext(),
          SummaryWriter(c.out) if use_tensorboard else contextlib.nullcontext() as board):
        if run.step == 0: validate()
        pending, clock = [], time.perf_counter()
        while not done():
            pending.append(run.train_step())
            bar.update()
            stop = int(over_ranks([caught[0] if caught else 0], dist.ReduceOp.MAX)[0])
            log_due, eval_due, save_due = (run.step % every == 0 or run.step == c.steps for every in (
                c.log_interval, c.eval_interval, c.checkpoint_interval))
            if not (log_due or eval_due or save_due or stop): continue
            table = np.array(over_ranks(torch.stack(pending).tolist())) / RANKS  # the one place that waits for the device
            for at, (loss, norm) in enumerate(table.tolist(), run.step - len(table) + 1):
                need_finite("the loss", loss, at)
                if not run.scaler.is_enabled(): need_finite("the gradient's norm", norm, at)
            (loss, norm), elapsed = table.mean(0).tolist(), time.perf_counter() - clock
            run.seconds += elapsed
            rate, lr = len(table) * c.batch_size * c.context / elapsed, learning_rate(c, run.step - 1)
            record(f"loss {loss:.4f}  lr {lr:.2e}  {1000 * elapsed / len(table):.0f} ms/step  {rate:,.0f} tokens/s  "
                   + (f"{mfu:.1%} MFU  " if (mfu := run.utilisation(rate)) else "")
                   + f"{run.seconds / run.step * (c.steps - run.step):.0f} s left", train_loss=loss, lr=lr, grad_norm=norm,
                   flat=run.flat() if c.optimizer == "admire" else None, tokens_per_second=round(rate), mfu=mfu)
            if eval_due: val_loss = validate()
            if save_due or stop or done():
                run.save()
                saved_at = f"the last checkpoint is of step {run.step}"
            if stop and not done():
                (halt := Halt("stopped; the checkpoint is written, go on with --resume")).code = 128 + stop
                raise halt
            pending, clock = [], time.perf_counter()
    weights, _ = run.state()
    if RANK == 0: export(weights, c, run.data.tokens)
    ire = dict(kappa=c.kappa, gamma=c.gamma, interval=c.interval, curvature=c.curvature) if c.optimizer == "admire" else {}
    return {"optimizer": c.optimizer, "lr": c.lr, "warmup": c.warmup, **ire, "seed": c.seed, "steps": run.step,
            "val_loss": val_loss, "seconds": run.seconds, "tokens_per_second": run.step * c.batch_size * c.context / run.seconds}

def compare(typed):
    """AdamW, then AdmIRE: the same seed, batches and settings."""
    if "optimizer" in typed:
        raise BadInput(f"--optimizer: got {typed['optimizer']}, allowed with --compare is to leave it out")
    out, runs = Path(typed.get("out", Config.out)), []
    for optimizer in ("adamw", "admire"):
        own = typed | {"optimizer": optimizer, "out": str(out / optimizer)}
        own["resume"] = typed.get("resume", False) and (out / optimizer / "checkpoint.pt").exists()
        if typed.get("resume") and not own["resume"]: own = load_checkpoint(out / "adamw")["config"] | own  # it had not begun
        check_folder(c := configure(own))
        runs.append(c)
    Data(runs[0])
    adamw, admire = (train(c) for c in runs)
    if RANK: return
    draw(out / "loss.png", {f"{c.optimizer}, lr {c.lr:g}": c.out for c in runs})
    reached = next((r["step"] for r in read_log(runs[1].out) if r["step"] and r.get("val_loss", math.inf) <= adamw["val_loss"]), None)
    write_json(out / "compare.json", {"command": " ".join(["python", "train_gpt.py", *sys.argv[1:]]), **environment(),
                                      "adamw": adamw, "admire": admire, "reached_at_step": reached})
    print(f"\nAdamW {adamw['val_loss']:.4f}, AdmIRE {admire['val_loss']:.4f} after {adamw['steps']} steps; AdmIRE "
          + (f"was at AdamW's final loss by step {reached}, in {reached / adamw['steps']:.2f} of its steps" if reached else
             "did not reach AdamW's final loss")
          + f"; {admire['tokens_per_second'] / adamw['tokens_per_second']:.2f} of its tokens a second\nfigure     {out / 'loss.png'}")

# ------------------------------------------------------------------------------------------------ sampling
@torch.no_grad()
def generate(model, c, tokens, vocab, seed=0):
    """c.tokens more after the list of tokens. A full context goes on with its second half."""
    generator, past, feed = torch.Generator().manual_seed(seed), [[] for _ in range(c.layers)], tokens[-c.context:]
    for _ in range(c.tokens):
        logits = model(torch.tensor([feed], device=c.device), past=past)[0, -1, :vocab].float().cpu()
        if c.temperature > 0:
            logits[logits < logits.topk(min(c.top_k, vocab)).values[-1]] = -math.inf
            feed = torch.multinomial((logits / c.temperature).softmax(-1), 1, generator=generator).tolist()
        else:
            feed = [int(logits.argmax())]
        tokens = tokens + feed
        if past[0][0].shape[2] == c.context: past, feed = [[] for _ in range(c.layers)], tokens[-(c.context // 2 or 1):]
    return tokens

def sample(folder, **typed):
    """Text from the run in `folder`; token numbers where its tokens are neither bytes nor gpt2's."""
    model, c, kind = load_model(folder, typed | {"dtype": "float32"})
    if kind["tokenizer"] in ("bytes", "gpt2"):
        encode, decode, vocab, between = codec(kind["tokenizer"])
        return decode(generate(model, c, [int(t) for t in encode([os.fsencode(c.prompt)])[0]] or [between], vocab))
    if c.prompt: raise BadInput(f"--prompt: got {c.prompt!r}, allowed for tokens that are neither bytes nor gpt2's is none")
    return " ".join(map(str, generate(model, c, [0], kind["vocab"])))

def evaluate(folder, typed):
    """Validation loss of the run, or the Hugging Face folder, in `folder`."""
    model, c, kind = load_model(folder, typed)
    run = Trainer(c)
    if run.data.tokens != kind: raise BadInput(f"--data: its tokens are {run.data.tokens}, allowed are the model's, {kind}")
    run.model.load_state_dict(model.state_dict())
    return run.validate()

# ------------------------------------------------------------------------------------------------ command line
class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, without the usage
        self.exit(2, f"{self.prog}: {message}; --help shows what is allowed\n" if LOCAL_RANK == 0 else None)

def parse(arguments):
    """What was typed, as {name: value}; the other settings have their defaults."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                    argument_default=argparse.SUPPRESS)
    for f in dataclasses.fields(Config):
        default = PRESETS.get(f.name, "" if f.default in (None, "") else (f.default,))
        text = f.metadata["help"] + (f" (default {', '.join(map(str, default))})" if default else "")
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=f.type, metavar=f.type.__name__.upper())
        parser.add_argument("--" + f.name.replace("_", "-"), help=text, **kind)
    return vars(parser.parse_args(arguments))

def configure(typed):
    """The typed settings over the defaults, on --resume over those of the run."""
    if not typed.get("resume"): return complete(Config(**typed))
    refuse_changes(typed, saved := load_checkpoint(typed.get("out", Config.out)))
    return complete(Config(**{**saved["config"], "overwrite": False, **({"micro_batch": None} if saved["ranks"] != RANKS else {}), **typed}))

def main(arguments=None):
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a sample may hold what the terminal has no letter for
    typed = parse(arguments)
    try:
        if "sample" in typed:
            print(sample(typed.pop("sample"), **typed))
        elif typed.get("eval_only"):
            print(f"validation loss {evaluate(typed.get('out', Config.out), typed):.4f}")
        elif typed.get("compare"):
            compare(typed)
        else:
            summary = train(c := configure(typed))
            if RANK == 0:
                text = {name: getattr(c, name) for name in ("device", "prompt", "tokens", "temperature", "top_k")}
                print(f"\n{sample(c.out, **text)}\n\nvalidation loss {summary['val_loss']:.4f} after {summary['steps']} steps, "
                      f"{summary['seconds']:.0f} s\nfigure     {Path(c.out) / 'loss.png'}\nmodel      {Path(c.out) / 'hf'}")
        return 0
    except (Halt, OSError) as e:
        if LOCAL_RANK == 0 or not isinstance(e, Halt): print(f"train_gpt.py: {e}", file=sys.stderr)
        return getattr(e, "code", 1)
    except (MemoryError, RuntimeError) as e:
        if not isinstance(e, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(e): raise
        print("train_gpt.py: out of memory: lower --micro-batch (the step stays the same), then --context or --width; --fsdp shards "
              "the model over more GPUs", file=sys.stderr)
        return 1

if __name__ == "__main__":
    status = main()
    if dist.is_initialized():  # gloo's threads may abort the interpreter's own exit
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
