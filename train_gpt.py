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
import argparse, contextlib, dataclasses, datetime, hashlib, importlib.util, itertools, json, math, os, random, shutil
import signal, subprocess, sys, sysconfig, time
from pathlib import Path

import numpy as np, torch, torch.distributed as dist, torch.nn as nn, torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from ire import AdmIRE, sampled_cross_entropy

RANK, LOCAL_RANK, RANKS = (int(os.environ.get(*x)) for x in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))  # torchrun's

# ------------------------------------------------------------------------------------------------ settings
class Halt(Exception): code = 1  # ends the script with one line and this exit code
class Diverged(Halt): pass  # the loss is not finite
class BadInput(Halt, ValueError): code = 2  # what the user can mend

PRESETS, OUT = ("tiny", "60m", "119m", "229m"), "runs/gpt"
COUNT, POSITIVE = (lambda x: x >= 1, "1 or more"), (lambda x: 0 < x < math.inf, "a finite number above 0")
NOT_NEGATIVE, FRACTION = (lambda x: 0 <= x < math.inf, "0 or more"), (lambda x: 0 <= x < 1, "0 or more and below 1")

def setting(default, text, allowed=(lambda x: True, "")):
    """default: a value, or a tuple with that of each preset. allowed: names, or a test and its words."""
    if isinstance(allowed, str): allowed = allowed.split().__contains__, allowed.replace(" ", ", ")
    default = default if isinstance(default, tuple) else (default,)
    return dataclasses.field(default=None, metadata={"help": text, "allowed": allowed, "default": default})

@dataclasses.dataclass
class Config:
    """None is what was not given: complete() fills it in. Four defaults are those of the presets: the paper's rows as Llamas,
    close to its models (60M has width 410, 10 heads there); tiny is tuned alike for both optimizers (results/sweep-tiny.json)."""
    preset: str = setting("tiny", "model, data, schedule and IRE of a row of the paper", " ".join(PRESETS))
    data: str = setting(("stdlib", "wikitext-103", "minipile", "openwebtext"), "stdlib (Python's own source), shakespeare, "
                        "wikitext-2, another of these, a text file, a folder of them, or one with train.bin, val.bin, meta.json")
    tokenizer: str = setting(("bytes", "gpt2", "gpt2", "gpt2"), "what a token is", "bytes gpt2")
    layers: int = setting((4, 16, 6, 16), "transformer blocks", COUNT)
    width: int = setting((128, 384, 768, 768), "size of the residual stream", COUNT)
    heads: int = setting((4, 6, 12, 12), "attention heads; width / heads is even", COUNT)
    ffn: int = setting((336, 1024, 2048, 3072), "hidden size of the SwiGLU feed-forward", COUNT)
    context: int = setting((128, 150, 512, 1024), "tokens in a sequence", COUNT)
    batch_size: int = setting((16, 240, 300, 480), "sequences in a step, over all ranks", COUNT)
    steps: int = setting((1000, 50_000, 30_000, 50_000), "optimizer steps", COUNT)
    warmup: int = setting((500, 500, 300, 1000), "steps to the peak learning rate, by default at most half of them", NOT_NEGATIVE)
    lr: float = setting((2e-3, 6e-4, 6e-4, 6e-4), "peak learning rate", POSITIVE)
    eps: float = setting((1e-8, 1e-16, 1e-16, 1e-16), "AdamW's epsilon", POSITIVE)
    kappa: float = setting((1.0, 2.0, 4.0, 4.0), "IRE: steps along flat coordinates are 1 + kappa times as long", NOT_NEGATIVE)
    gamma: float = setting((0.7, 0.7, 0.6, 0.6), "IRE: flat fraction of coordinates", (lambda x: 0 < x < 1, "above 0 and below 1"))
    # as in all of the paper's rows
    interval: int = setting(10, "IRE: steps from one mask to the next (K)", COUNT)
    ire_warmup: int = setting(None, "IRE: steps before it switches on (default: --warmup)", NOT_NEGATIVE)
    optimizer: str = setting("admire", "adamw, or admire, which is IRE over it", "adamw admire")
    beta1: float = setting(0.9, "AdamW's decay of the mean", FRACTION)
    beta2: float = setting(0.95, "AdamW's decay of the second moment", FRACTION)
    weight_decay: float = setting(0.1, "AdamW's, on matrices only", NOT_NEGATIVE)
    min_lr: float = setting(0.05, "last learning rate as a fraction of the peak (cosine)", (lambda x: 0 <= x <= 1, "0 to 1"))
    clip: float = setting(1.0, "largest norm of the gradient", POSITIVE)
    # ours
    curvature: str = setting("fisher", "IRE: source of the mask", "fisher second_moment")
    kappa_decay: bool = setting(False, "IRE: kappa follows the learning rate down")
    probe_batches: int = setting(None, "IRE: micro-batches of the step, on each rank, that feed the probe (default all)", COUNT)
    micro_batch: int = setting(None, "sequences in a forward pass (default: what divides the batch, up to 32,768 tokens)", COUNT)
    seed: int = setting(0, "of weights, batches and probes", (lambda x: 0 <= x < 2**63, "0 to 2^63 - 1"))
    device: str = setting("auto", "where to train", "auto cpu cuda mps")
    dtype: str = setting(None, "of the forward pass (default float32, on CUDA bfloat16)", "float32 bfloat16 float16")
    compile: bool = setting(None, "torch.compile the blocks and the loss (default on CUDA)")
    deterministic: bool = setting(False, "deterministic CUDA kernels, slower")
    fsdp: bool = setting(False, "shard model and optimizer over torchrun's ranks (FSDP2) instead of copying them (DDP)")
    # from here on, what may change on --resume
    out: str = setting(OUT, "folder for config, log, checkpoint, figure and Hugging Face model")
    resume: bool = setting(False, "go on from the checkpoint in --out")
    overwrite: bool = setting(False, "delete the run in --out first")
    compare: bool = setting(False, "train with adamw, then with admire, and draw both")
    eval_only: bool = setting(False, "print the validation loss of the run, or of the Hugging Face folder, in --out")
    data_dir: str = setting("data", "folder for prepared data")
    stop_at: float = setting(None, "end the run at a validation loss this low", POSITIVE)
    log_interval: int = setting(20, "steps between lines of the log", COUNT)
    eval_interval: int = setting(100, "steps between validations", COUNT)
    eval_sequences: int = setting(512, "validation sequences, evenly spaced", COUNT)
    checkpoint_interval: int = setting(100, "steps between checkpoints", COUNT)
    wandb: bool = setting(False, "send the log to Weights & Biases too")
    tensorboard: bool = setting(False, "write the log for TensorBoard too, into --out")
    sample: str = setting(None, "print text from the run, or Hugging Face folder, here instead of training")
    prompt: str = setting("", "how the text begins")
    tokens: int = setting(300, "how long it is", COUNT)
    temperature: float = setting(0.8, "0 takes the likeliest token", NOT_NEGATIVE)
    top_k: int = setting(50, "choose among so many tokens", COUNT)

def check(c, name, good, allowed):
    if not good: raise BadInput(f"--{name.replace('_', '-')}: got {getattr(c, name)}, allowed is {allowed}")

def complete(given: Config) -> Config:
    """Fills in what was not given, on resume from the run in c.out; raises BadInput on values out of range, and on those that
    would change the run that goes on."""
    c, fixed = dataclasses.replace(given, out=given.out or OUT), True
    run = load_checkpoint(c.out, mmap=True)["config"] | {"overwrite": False} if c.resume else {}
    for f in dataclasses.fields(c):
        value, row, (good, allowed) = getattr(c, f.name), f.metadata["default"], f.metadata["allowed"]
        check(c, f.name, value is None or good(value), allowed)
        fixed = fixed and f.name != "out"
        if value is None: setattr(c, f.name, run.get(f.name, row[PRESETS.index(c.preset) if len(row) > 1 else 0]))
        elif c.resume and fixed and f.name != "data":
            check(c, f.name, value == run.get(f.name), f"{run.get(f.name)} on --resume, as {c.out} began: it keeps its schedule")
    here = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if c.device == "auto": c.device = here[0]
    if c.dtype is None: c.dtype = "bfloat16" if c.device == "cuda" else "float32"
    if c.compile is None: c.compile = c.device == "cuda"
    if given.warmup is None and not c.resume: c.warmup = min(c.warmup, c.steps // 2)
    if c.ire_warmup is None: c.ire_warmup = c.warmup
    share = c.batch_size // RANKS
    check(c, "batch_size", share * RANKS == c.batch_size, f"a multiple of the {RANKS} ranks")
    if not c.micro_batch or c.resume and share % c.micro_batch:  # the run may go on with other ranks
        c.micro_batch = max(n for n in range(1, share + 1) if share % n == 0 and n * c.context <= 2**15 or n == 1)
    check(c, "micro_batch", share % c.micro_batch == 0, f"a divisor of --batch-size over {RANKS} rank(s), {share}")
    check(c, "probe_batches", (c.probe_batches or 1) * c.micro_batch <= share, f"1 to {share // c.micro_batch}, those of a step")
    check(c, "device", c.device in here, f"what this machine has: {', '.join(here)}")
    check(c, "width", c.width % (2 * c.heads) == 0, f"a multiple of twice --heads, {2 * c.heads}")
    check(c, "warmup", c.warmup < c.steps, f"0 to --steps - 1, {c.steps - 1}")
    check(c, "dtype", c.dtype != "float16" or c.device != "cpu" and not c.fsdp, "float32 or bfloat16 on a CPU or with --fsdp")
    check(c, "fsdp", not c.fsdp or "RANK" in os.environ, "--fsdp under torchrun")
    check(c, "resume", not (c.resume and c.overwrite), "one of --resume and --overwrite")
    for name in ("out", "data_dir"): check(c, name, not Path(getattr(c, name)).is_file(), "a folder, not a file")
    return c

def keep_runs(c: Config):  # c, if it does not lose a run unasked
    check(c, "out", c.resume or c.overwrite or not Path(c.out, "checkpoint.pt").exists(), "a folder without a run, or --resume to "
          "go on with it, or --overwrite to lose it")
    return c

# ------------------------------------------------------------------------------------------------ model
def rotate(x, cos, sin):  # the halves of a head are the pairs, as in Hugging Face's Llama
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        linears = lambda **sizes: nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})
        self.heads, d = c.heads, c.width
        self.input_layernorm = nn.RMSNorm(d, eps=1e-6)
        self.self_attn = linears(q_proj=(d, d), k_proj=(d, d), v_proj=(d, d), o_proj=(d, d))
        self.post_attention_layernorm = nn.RMSNorm(d, eps=1e-6)
        self.mlp = linears(gate_proj=(d, c.ffn), up_proj=(d, c.ffn), down_proj=(c.ffn, d))

    def forward(self, x, rotary, past=None):  # x: (batch, time, width)
        h, attention, mlp, first = self.input_layernorm(x), self.self_attn, self.mlp, not past
        q, k, v = (project(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (batch, heads, time, width / heads)
                   for project in (attention.q_proj, attention.k_proj, attention.v_proj))
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        if past: k, v = (torch.cat(pair, dim=2) for pair in zip(past, (k, v)))
        if past is not None: past[:] = k, v  # of the text first, then of one token at a time, which sees all before it
        x = x + attention.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=first).transpose(1, 2).flatten(-2))
        h = self.post_attention_layernorm(x)
        return x + mlp.down_proj(F.silu(mlp.gate_proj(h)) * mlp.up_proj(h))

def true_loss(weight, x, targets):
    return F.cross_entropy(F.linear(x, weight).flatten(0, 1).float(), targets.flatten())

def drawn_loss(weight, x, key):  # the probe's of one sequence; its labels depend on its key, not on neighbours, rank or re-run
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
        for f in (torch.cos, torch.sin): self.register_buffer(f.__name__, f(angles), persistent=False)  # (context, head / 2)
        for name, p in self.named_parameters():  # what writes to the residual stream starts smaller (GPT-2)
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            if p.dim() == 2: nn.init.normal_(p, std=0.02 / math.sqrt(2 * c.layers) if writes else 0.02)

    def forward(self, tokens, targets=None, keys=None, past=None):
        """Logits (batch, time, vocab) of tokens (batch, time); with targets (batch, time) their mean cross entropy; with keys
        (batch) the probe's loss, Eq. 6. past: a list for each block, of what it keeps of earlier tokens."""
        start = past[0][0].shape[2] if past and past[0] else 0
        rotary = [angle[start:start + tokens.shape[1]] for angle in (self.cos, self.sin)]
        x = self.model.embed_tokens(tokens)
        for block, own in zip(self.model.layers, past or itertools.repeat(None)): x = block(x, rotary, own)
        x = self.model.norm(x)
        if targets is not None: return self.mean(self.true_loss, x, targets)
        return self.lm_head(x) if keys is None else self.mean(drawn_loss, x, keys)

    def mean(self, loss, x, y):
        """The mean loss. Where all logits are too many at once, some sequences at a time, made again in the backward."""
        a_sequence = x.shape[1] * self.lm_head.out_features
        small, size = len(x) * a_sequence <= self.LOGITS, 1 if loss is drawn_loss else max(1, self.LOGITS // a_sequence)
        run = loss if small else lambda *a: checkpoint(loss, *a, use_reentrant=False, preserve_rng_state=False)
        return sum(run(self.lm_head.weight, h, t) * len(h) for h, t in zip(x.split(size), y.split(size))) / len(x)

# ------------------------------------------------------------------------------------------------ data
SHAKESPEARE = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
               "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")
HUB = {"wikitext-2": ("Salesforce/wikitext", "wikitext-2-raw-v1"), "wikitext-103": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
       "minipile": ("JeanKaddour/minipile", None), "openwebtext": ("Skylion007/openwebtext", None)}

def text_files(c: Config) -> list[Path]:  # behind --data, in a fixed order
    path = Path({"stdlib": sysconfig.get_paths()["stdlib"], "shakespeare": f"{c.data_dir}/shakespeare.txt"}.get(c.data, c.data))
    if c.data == "shakespeare" and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try: torch.hub.download_url_to_file(SHAKESPEARE[0], str(path), hash_prefix=SHAKESPEARE[1], progress=False)
        except Exception as e: raise BadInput(f"--data: shakespeare can't be fetched ({e!r}); put the text at {path}") from None
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages"} if c.data == "stdlib" else set()
    files = [p for p in sorted(path.rglob("*.py" if skip else "*")) if p.is_file() and not skip & set(p.relative_to(path).parts)]
    check(c, "data", files or path.is_file(), f"an existing file or folder of files, or stdlib, shakespeare, {', '.join(HUB)}")
    return files or [path]

def from_files(files):
    """Pieces of text (part, bytes, whether a document begins). Of twenty files or more each twentieth is held out, of fewer
    the last tenth of each."""
    random.Random(0).shuffle(files := list(files))
    for i, path in enumerate(files):
        size = path.stat().st_size
        cut = size * 9 // 10 if len(files) < 20 else size if i % 20 else 0
        with open(path, "rb") as f:
            for part, end in (("train", cut), ("val", size)):
                begins, piece = True, lambda read: read(min(1 << 19, end - f.tell()))
                while text := piece(f.read):  # and the rest of the line, as gpt2 takes no half words
                    yield part, text + piece(f.readline), begins
                    begins = False

def from_hub(c: Config):  # the same, streamed from the hub, its cache or a local copy; WikiText's rows are lines of one document
    from datasets import load_dataset
    try:
        splits = load_dataset(*HUB[c.data], streaming=True)
        for split in ("train", "validation"):
            for i, row in enumerate(splits.get(split, ())):
                held_out = split != "train" or "validation" not in splits and i % 2000 == 0
                yield "val" if held_out else "train", row["text"].encode(), i == 0 or not c.data.startswith("wikitext")
    except Exception as e:  # the library and its network raise many kinds
        raise BadInput(f"--data: datasets can't read {HUB[c.data][0]} ({e!r:.300}); name a text file or folder") from None

def codec(tokenizer):  # encoder of texts (bytes), decoder of a list of tokens, size of the vocabulary, token between documents
    if tokenizer == "bytes":
        return (lambda texts: [np.frombuffer(t, np.uint8) for t in texts],
                lambda tokens: bytes(tokens).decode(errors="replace"), 256, ord("\n"))
    import tiktoken
    try: gpt2 = tiktoken.get_encoding("gpt2")
    except Exception as e: raise BadInput(f"--tokenizer: tiktoken can't fetch gpt2's vocabulary ({type(e).__name__}); use bytes or "
                                          "set TIKTOKEN_CACHE_DIR to a folder that has it") from None
    return (lambda texts: gpt2.encode_ordinary_batch([t.decode(errors="replace") for t in texts], num_threads=os.cpu_count()),
            gpt2.decode, gpt2.n_vocab, gpt2.eot_token)

def prepare(c: Config) -> Path:
    """The folder with train.bin, val.bin (uint16 tokens) and meta.json behind --data; made once, and whole or not."""
    if (Path(c.data) / "train.bin").exists(): return Path(c.data)
    files = [] if c.data in HUB else text_files(c)
    version = hashlib.sha256(repr([(str(p), (s := p.stat()).st_size, s.st_mtime_ns) for p in files]).encode()).hexdigest()[:12]
    name = f"{Path(c.data).stem}-{c.tokenizer}" + f"-{version}" * bool(files)
    folder, half = Path(c.data_dir) / name, Path(c.data_dir) / f".{name}.{os.getpid()}"
    if (folder / "meta.json").exists(): return folder
    shutil.rmtree(folder, ignore_errors=True)  # without meta.json it is half of one
    (encode, _, vocab, between), pieces = codec(c.tokenizer), from_files(files) if files else from_hub(c)
    source = " ".join(filter(None, HUB.get(c.data, [c.data])))
    meta = {"tokenizer": c.tokenizer, "vocab_size": vocab, "source": source, "sha256": {}}
    half.mkdir(parents=True, exist_ok=True)
    try:
        with open(half / "train.bin", "wb") as train, open(half / "val.bin", "wb") as val:
            bins, batches = {"train": train, "val": val}, iter(lambda: list(itertools.islice(pieces, 64)), [])
            for batch in tqdm(batches, f"tokens of {c.data}", unit=" batches", disable=not sys.stderr.isatty()):
                for (part, _, begins), tokens in zip(batch, encode([text for _, text, _ in batch])):
                    separator = [between] if begins and bins[part].tell() else []
                    bins[part].write(np.concatenate((separator, tokens)).astype("<u2").tobytes())
            for part, f in bins.items():
                f.flush()
                os.fsync(f.fileno())
                meta[f"{part}_tokens"] = n = f.tell() // 2
                check(c, "data", n > c.context, f"more text: {part} has {n} tokens, no more than one --context of {c.context}")
                meta["sha256"][part] = hashlib.sha256(np.memmap(f.name, "u1", "r")).hexdigest()
        write_json(half / "meta.json", meta)
        with contextlib.suppress(OSError): half.rename(folder)  # another run was first
    finally:
        shutil.rmtree(half, ignore_errors=True)
        with contextlib.suppress(OSError): half.parent.rmdir()  # where nothing is in it
    return folder

class Data:
    """Memory-mapped tokens. A batch is a function of seed and step, so a resumed run sees what it would have."""

    def __init__(self, c: Config):
        folder = prepare(c) if LOCAL_RANK == 0 else None
        over_ranks([0])  # the others find the data made
        self.c, folder = c, folder or prepare(c)
        try:
            meta = json.loads((folder / "meta.json").read_text())
            self.tokens = {"tokenizer": str(meta["tokenizer"]), "vocab": int(meta["vocab_size"])}
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise BadInput(f"--data: {folder / 'meta.json'} needs tokenizer and vocab_size: {e!r}") from None
        self.vocab = -(-self.tokens["vocab"] // 64) * 64  # padded, 50257 to 50304, which GPUs multiply faster
        for part in ("train", "val"):
            size = path.stat().st_size if (path := folder / f"{part}.bin").exists() else 0
            whole = 2 * meta.get(f"{part}_tokens", size // 2)
            check(c, "data", size == whole > 2 * c.context, f"{path} of 2 bytes for each token of meta.json, {whole} bytes, and "
                  f"more than one --context of {c.context} tokens; it has {size} bytes")
            setattr(self, part, np.memmap(path, "<u2", "r"))
            top = 0 if "sha256" in meta else int(getattr(self, part).max())  # what prepare() made is in range
            check(c, "data", top < self.tokens["vocab"], f"{path} of tokens below vocab_size, {self.tokens['vocab']}; it has {top}")
        self.sha256 = meta["sha256"]["train"] if "sha256" in meta else hashlib.sha256(self.train).hexdigest()

    def windows(self, tokens, starts):  # inputs, targets: (sequences, context)
        rows = torch.from_numpy(tokens[starts[:, None] + np.arange(self.c.context + 1)].astype(np.int64))
        rows = (rows.pin_memory() if self.c.device == "cuda" else rows).to(self.c.device, non_blocking=True)
        return rows[:, :-1], rows[:, 1:]

    def batch(self, step):
        """This rank's micro-batches of a step: inputs, targets, keys. Which sequences form one does not depend on RANKS."""
        c, rng = self.c, np.random.default_rng((self.c.seed, step))
        starts = rng.integers(len(self.train) - c.context, size=c.batch_size)
        keys = torch.from_numpy(rng.integers(2**31, size=c.batch_size))
        own = [slice(i, i + c.micro_batch) for i in range(RANK * c.micro_batch, c.batch_size, RANKS * c.micro_batch)]
        return [(*self.windows(self.train, starts[s]), keys[s]) for s in own]

    def validation(self):  # as many micro-batches on each rank, since ranks that share a model go through it together
        count = max(RANKS, min(self.c.eval_sequences, (len(self.val) - 1) // self.c.context))
        starts = np.linspace(0, len(self.val) - self.c.context - 1, count).astype(np.int64)
        parts = np.array_split(starts, RANKS * math.ceil(count / RANKS / self.c.micro_batch))
        return (self.windows(self.val, s) for s in parts[RANK::RANKS])

# ------------------------------------------------------------------------------------------------ files
def write_atomically(path: Path, write):  # whole or not at all, also when the power goes
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        part.replace(path)
    except RuntimeError as e: raise e.__context__ or e  # torch.save's own, over the disk's
    finally: part.unlink(missing_ok=True)

def write_json(path: Path, value): write_atomically(path, lambda f: f.write(json.dumps(value, indent=1).encode()))

def load_checkpoint(folder, mmap=False):  # mmap: where its tensors are not read
    try:
        saved = torch.load(path := Path(folder) / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=mmap)
        return {key: saved[key] for key in ("config", "data", "step", "seconds", "val_loss", "model", "optimizer", "scaler")}
    except Exception as e:  # torch.load raises many kinds
        raise BadInput(f"{path} can't be read as a checkpoint: {e!r:.300}; is {folder} the --out of a run?") from None

def save(model, optimizer, c: Config, data, **progress):
    """DIR/checkpoint.pt, whole also where it is sharded, so that any number of ranks can go on with it; and DIR/hf, which
    transformers opens with AutoModelForCausalLM.from_pretrained."""
    from safetensors.torch import save
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
    weights, state = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if RANK: return
    saved = dict(config=dataclasses.asdict(c), data=data.sha256, model=weights, optimizer=state, **progress)
    write_atomically(Path(c.out) / "checkpoint.pt", lambda f: torch.save(saved, f))
    hf, nothing = Path(c.out) / "hf", dict.fromkeys(("bos_token_id", "eos_token_id"))
    weights = {name: w.contiguous() for name, w in weights.items()}
    write_atomically(hf / "model.safetensors", lambda f: f.write(save(weights, {"format": "pt"})))
    write_json(hf / "generation_config.json", nothing)
    write_json(hf / "config.json", {  # the rest (rope_theta 10000, rms_norm_eps 1e-6, untied) is LlamaConfig's default
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32", **nothing, "vocab_size": data.vocab,
        "hidden_size": c.width, "intermediate_size": c.ffn, "num_hidden_layers": c.layers, "num_attention_heads": c.heads,
        "max_position_embeddings": c.context, "train_gpt": {"config": saved["config"], "tokens": data.tokens}})

def load_model(folder, typed):
    """Model, settings and kind of tokens of a run, or of the Hugging Face folder that it wrote."""
    from safetensors.torch import load_file
    path = hf if (hf := Path(folder) / "hf").exists() else Path(folder)
    try: saved, weights = json.loads((path / "config.json").read_text())["train_gpt"], load_file(path / "model.safetensors")
    except Exception as e:  # safetensors has errors of its own
        raise BadInput(f"{folder} can't be read as a run, or as a folder hf of one: {e!r:.300}") from None
    anew = dict(device="auto", dtype=None, micro_batch=None, probe_batches=None, compile=False, fsdp=False)
    c = complete(Config(**saved["config"] | anew | {"resume": False} | typed))
    model = make_model(c, len(weights["lm_head.weight"]))
    model.load_state_dict(weights)
    return model, c, saved["tokens"]

def read_log(folder):  # whole lines: a kill may leave half of one
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().split("\n")[:-1]]

def draw(path, *runs):  # loss over steps of each run
    from matplotlib.figure import Figure  # without pyplot, whose backend may be a notebook's
    axes = (figure := Figure(figsize=(6.4, 4), layout="constrained")).subplots()
    for c, color in zip(runs, ("#0072B2", "#D55E00")):
        log = read_log(c.out)
        training, validation = (np.array([(r["step"], r[key]) for r in log if key in r]).T for key in ("train_loss", "val_loss"))
        axes.set_ylim(0.95 * min(validation[1]), 1.02 * validation[1][:2][-1])  # the first fall would hide the rest
        if c.optimizer == "admire": axes.axvline(c.ire_warmup, color=color, ls=":", label="IRE switches on")
        if len(runs) == 1: axes.plot(*training, color=color, alpha=0.35, label="training")
        axes.plot(*validation, color=color, marker="o", ms=3, label=f"{c.optimizer}, lr {c.lr:g}, validation")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomically(path, lambda f: figure.savefig(f, format="png", dpi=150))

def environment():
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--verify", "-q", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {"torch": torch.__version__, "hardware": hardware, "ranks": RANKS, "commit": commit}

# ------------------------------------------------------------------------------------------------ training
def over_ranks(values, op=dist.ReduceOp.SUM):  # sums of numbers over all ranks; waits for them
    values = torch.as_tensor(values, dtype=torch.float64)
    if dist.is_initialized(): dist.all_reduce(values, op)
    return values.tolist()

def whole(x): return x.full_tensor() if hasattr(x, "full_tensor") else x  # of FSDP's shards

def make_optimizer(model, c: Config):
    groups = [{"params": [p for p in model.parameters() if (p.dim() >= 2) == matrices], "weight_decay": c.weight_decay * matrices}
              for matrices in (True, False)]
    adamw = dict(lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps)
    if c.optimizer == "adamw": return torch.optim.AdamW(groups, fused=c.device != "mps", **adamw)
    return AdmIRE(groups, kappa=c.kappa, gamma=c.gamma, interval=c.interval, warmup=c.ire_warmup, curvature=c.curvature, **adamw)

def learning_rate(c: Config, step):  # linear warm-up, then a cosine to min_lr * lr
    if step < c.warmup: return c.lr * (step + 1) / c.warmup
    progress = (step - c.warmup) / max(1, c.steps - 1 - c.warmup)
    return c.lr * (c.min_lr + (1 - c.min_lr) * 0.5 * (1 + math.cos(math.pi * progress)))

def make_model(c: Config, vocab):
    """A model that runs under autocast, compiled, sharded over the ranks, as the settings say."""
    model = Llama(c, vocab).to(c.device)
    model.forward = torch.autocast(c.device, getattr(torch, c.dtype), enabled=c.dtype != "float32")(model.forward)
    if c.compile:  # block by block, which are alike: one compilation serves all of them, and the probe
        model.true_loss = torch.compile(true_loss)
        for block in model.model.layers: block.compile()
    if c.fsdp:
        from torch.distributed.fsdp import fully_shard
        mesh = dist.init_device_mesh(c.device, (RANKS,))
        for module in (*model.model.layers, model): fully_shard(module, mesh=mesh)
    return model

def backward(forward, batch, c, scaler):
    """Gradients of the mean loss over micro-batches, which the ranks share in the last one's; returns that loss."""
    total = 0.0
    for i, one in enumerate(batch, 1):
        if c.fsdp: forward.set_requires_gradient_sync(i == len(batch))
        with forward.no_sync() if i < len(batch) and hasattr(forward, "no_sync") else contextlib.nullcontext():
            scaler.scale(loss := forward(*one) / len(batch)).backward()
        total = total + loss.detach()
    return total

def train_step(forward, optimizer, batch, step, c, scaler):
    """Probe where one is due, forward and backward of each micro-batch, clip, step; returns loss and gradient norm."""
    lr = learning_rate(c, step)
    for group in optimizer.param_groups: group.update({"lr": lr} | ({"kappa": c.kappa * lr / c.lr} if c.kappa_decay else {}))
    if getattr(optimizer, "probe_due", False):
        with optimizer.probe(): backward(forward, [(x, None, keys) for x, _, keys in batch[:c.probe_batches]], c, scaler)
    loss = backward(forward, [(x, y) for x, y, _ in batch], c, scaler)
    scaler.unscale_(optimizer)
    norm = whole(nn.utils.clip_grad_norm_(forward.parameters(), c.clip))
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return torch.stack((loss, norm))

@torch.no_grad()
def validate(forward, data):  # the mean loss of the validation sequences, over all ranks
    total, count = over_ranks(np.sum([(float(forward(x, y)) * len(x), len(x)) for x, y in data.validation()], 0))
    return total / count

def utilisation(c: Config, model, tokens_per_second):
    """Model FLOP utilisation (PaLM, appendix B) on GPUs whose dense bf16 peak is known; else None."""
    peak = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
    flops = 6 * sum(p.numel() for p in model.parameters() if p is not model.model.embed_tokens.weight)
    flops, name = flops + 12 * c.layers * c.width * c.context, torch.cuda.get_device_name() if c.device == "cuda" else ""
    return next((tokens_per_second * flops / peak[gpu] / RANKS for gpu in peak if gpu in name), None)

def train(c: Config, build=None):
    """Trains one model; returns its settings with val_loss, steps that it made, seconds and tokens_per_second. Raises
    BadInput, Diverged, Halt (stopped by a signal, the checkpoint is written). build(model, c): another optimizer."""
    c = keep_runs(complete(c))
    for package in ["matplotlib", "safetensors"] + ["wandb"] * c.wandb + ["tensorboard"] * c.tensorboard:
        if importlib.util.find_spec(package) is None: raise ModuleNotFoundError(name=package)  # said now, not after the training
    data, out, sinks, caught = Data(c), Path(c.out), [], []
    torch.manual_seed(c.seed)
    torch.set_float32_matmul_precision("high")
    if c.deterministic: os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(c.deterministic)
    model = forward = make_model(c, data.vocab)
    if dist.is_initialized() and not c.fsdp: forward = nn.parallel.DistributedDataParallel(model)
    optimizer, scaler = (build or make_optimizer)(model, c), torch.amp.GradScaler(c.device, enabled=c.dtype == "float16")
    step, seconds, val_loss, kept = 0, 0.0, math.inf, "none"
    if c.resume:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict
        saved = load_checkpoint(c.out)
        check(c, "data", saved["data"] == data.sha256, f"the text that {c.out} began with; this one's sha256 differs")
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"],
                       options=StateDictOptions(full_state_dict=True))
        scaler.load_state_dict(saved["scaler"])
        step, seconds, val_loss, kept = saved["step"], saved["seconds"], saved["val_loss"], f"step {saved['step']}"
    if RANK == 0:
        for old in () if c.resume else (out / "checkpoint.pt", out / "hf/config.json"): old.unlink(missing_ok=True)
        past = [json.dumps(r) + "\n" for r in (read_log(out) if c.resume else ()) if r["step"] <= step]
        write_atomically(out / "log.jsonl", lambda f: f.write("".join(past).encode()))
        write_json(out / "config.json", dataclasses.asdict(c) | environment())
        ire = f", kappa {c.kappa:g}, gamma {c.gamma:g}, K {c.interval}, on from step {c.ire_warmup}, {c.curvature}"
        where = f"{RANKS} x {c.device}{' FSDP' * c.fsdp}, {c.dtype}{', compiled: the first steps wait for it' * c.compile}"
        print(f"model      Llama, {sum(map(torch.numel, model.parameters())):,} parameters: {c.layers} layers of width {c.width}\n"
              f"data       {c.data}: {len(data.train):,} training and {len(data.val):,} validation tokens\n"
              f"device     {where}\noptimizer  {c.optimizer}, lr {c.lr:g} after {c.warmup} steps{ire * (c.optimizer == 'admire')}\n"
              f"run        {c.steps} steps, {c.steps * c.batch_size * c.context / len(data.train):.2f} epochs, into {out}; "
              f"the loss starts near ln {data.vocab} = {math.log(data.vocab):.2f}", flush=True)

    def record(**values):
        if RANK: return
        values = {name: x for name, x in values.items() if x is not None and math.isfinite(x)}  # JSON has no infinity
        log.write(json.dumps({"step": step, **values, "seconds": round(seconds, 3)}) + "\n")
        log.flush()
        text = "  ".join(f"{name} {x:,}" if isinstance(x, int) else f"{name} {x:.4g}" for name, x in values.items())
        bar.write(f"step {step:5}/{c.steps}  {text}  {seconds:.0f} s")
        for sink in sinks: sink(values)

    with contextlib.ExitStack() as stack:
        for n in (signal.SIGINT, signal.SIGTERM):  # the step that they come in is finished first
            stack.callback(signal.signal, n, signal.signal(n, lambda number, _: caught.append(number)))
        log = stack.enter_context(open(out / "log.jsonl" if RANK == 0 else os.devnull, "a"))
        bar = stack.enter_context(tqdm(total=c.steps, initial=step, unit="step", disable=RANK > 0 or not sys.stderr.isatty()))
        if c.wandb and RANK == 0:
            import wandb
            stack.enter_context(wandb.init(project="ire", name=out.name, dir=c.out, config=dataclasses.asdict(c)))
            sinks.append(lambda values: wandb.log(values, step=step))
        if c.tensorboard and RANK == 0:
            from torch.utils.tensorboard import SummaryWriter
            board = stack.enter_context(SummaryWriter(c.out))
            sinks.append(lambda values: [board.add_scalar(name, x, step) for name, x in values.items()])
        done = lambda: step == c.steps or val_loss <= (c.stop_at or -math.inf)
        if step == 0: record(val_loss=validate(forward, data))
        pending, clock = [], time.perf_counter()
        while not done():
            pending.append(train_step(forward, optimizer, data.batch(step), step, c, scaler))
            step += 1
            bar.update()
            stop = int(over_ranks([caught[0] if caught else 0], dist.ReduceOp.MAX)[0])
            log_due, eval_due, save_due = (step % every == 0 or step == c.steps for every in (
                c.log_interval, c.eval_interval, c.checkpoint_interval))
            if not (log_due or eval_due or save_due or stop): continue
            table = np.array(over_ranks(torch.stack(pending).tolist())) / RANKS  # the one place that waits for the device
            (loss, norm), elapsed = table.mean(0).tolist(), time.perf_counter() - clock
            seconds, rate = seconds + elapsed, len(table) * c.batch_size * c.context / elapsed
            if eval_due: val_loss = validate(forward, data)
            sums = table[:, :1 if scaler.is_enabled() else 2].sum(1)  # a scaler's norms may overflow
            for at, x in (*enumerate(sums, step - len(table) + 1), (step, val_loss if eval_due else 0)):
                if not math.isfinite(x): raise Diverged(f"step {at}: the loss or its gradient is {x}; last checkpoint: {kept}; "
                                                        "try a lower --lr, a lower --kappa or a longer --warmup")
            masks = list(getattr(optimizer, "masks", {}).values())
            flat = sum(float(whole(m.sum())) for m in masks) / sum(m.numel() for m in masks) if masks else None
            record(train_loss=loss, val_loss=val_loss if eval_due else None, lr=learning_rate(c, step - 1), grad_norm=norm,
                   flat=flat, tokens_per_second=round(rate), mfu=utilisation(c, model, rate))
            if eval_due and RANK == 0: draw(out / "loss.png", c)
            if save_due or stop or done():
                save(model, optimizer, c, data, step=step, seconds=seconds, val_loss=val_loss, scaler=scaler.state_dict())
                kept = f"step {step}"
            if stop and not done():
                (halt := Halt("stopped; the checkpoint is written, go on with --resume")).code = 128 + stop
                raise halt
            pending, clock = [], time.perf_counter()
    return {**dataclasses.asdict(c), "steps": step, "val_loss": val_loss, "seconds": seconds,
            "tokens_per_second": step * c.batch_size * c.context / seconds}

def compare(typed):
    """AdamW, then AdmIRE: the same seed, batches and settings."""
    if "optimizer" in typed: raise BadInput(f"--optimizer: got {typed['optimizer']}, allowed with --compare is to leave it out")
    out, runs = Path(typed.get("out", OUT)), []
    for optimizer in ("adamw", "admire"):
        own = typed | {"optimizer": optimizer, "out": str(out / optimizer)}
        own["resume"] = typed.get("resume", False) and (out / optimizer / "checkpoint.pt").exists()
        if typed.get("resume") and not own["resume"]: own = load_checkpoint(out / "adamw", mmap=True)["config"] | own  # not begun
        runs.append(keep_runs(complete(Config(**own))))
    adamw, admire = (train(c) for c in runs)
    if RANK: return
    draw(out / "loss.png", *runs)
    loss, steps = adamw["val_loss"], adamw["steps"]
    reached = next((r["step"] for r in read_log(runs[1].out) if r["step"] and r.get("val_loss", math.inf) <= loss), None)
    write_json(out / "compare.json", {"command": " ".join(["python", "train_gpt.py", *sys.argv[1:]]), **environment(),
                                      "adamw": adamw, "admire": admire, "reached_at_step": reached})
    how = f"by step {reached}, in {reached / steps:.2f} of its steps" if reached else "never"
    print(f"\nAdamW {loss:.4f}, AdmIRE {admire['val_loss']:.4f} after {steps} steps; AdmIRE was at AdamW's final loss {how}; "
          f"{admire['tokens_per_second'] / adamw['tokens_per_second']:.2f} of its tokens a second\nfigure     {out / 'loss.png'}")

# ------------------------------------------------------------------------------------------------ sampling
@torch.no_grad()
def generate(model, c, tokens, vocab):  # c.tokens more after the list of tokens
    generator, past, feed = torch.Generator().manual_seed(c.seed), [[] for _ in range(c.layers)], tokens[-c.context:]
    for _ in range(c.tokens):
        logits = model(torch.tensor([feed], device=c.device), past=past)[0, -1, :vocab].cpu()
        likely = logits.topk(min(c.top_k if c.temperature else 1, vocab))
        choice = torch.multinomial((likely.values / (c.temperature or 1)).softmax(-1), 1, generator=generator)
        feed = likely.indices[choice].tolist()
        tokens = tokens + feed
        if past[0][0].shape[2] == c.context:  # full: go on with its second half
            past, feed = [[] for _ in range(c.layers)], tokens[-(c.context // 2 or 1):]
    return tokens

def sample(folder, **typed):
    """Text from the run in `folder`; token numbers where its tokens are neither bytes nor gpt2's."""
    model, c, kind = load_model(folder, typed | {"dtype": "float32"})
    if kind["tokenizer"] in ("bytes", "gpt2"):
        encode, decode, vocab, between = codec(kind["tokenizer"])
        return decode(generate(model, c, [int(t) for t in encode([os.fsencode(c.prompt)])[0]] or [between], vocab))
    check(c, "prompt", not c.prompt, "none for tokens that are neither bytes nor gpt2's")
    return " ".join(map(str, generate(model, c, [0], kind["vocab"])))

def evaluate(folder, typed):
    """Validation loss of the run, or the Hugging Face folder, in `folder`."""
    model, c, kind = load_model(folder, typed)
    data = Data(c)
    check(c, "data", data.tokens == kind, f"data of the model's tokens, {kind}; these are {data.tokens}")
    return validate(model, data)

# ------------------------------------------------------------------------------------------------ command line
def parse(arguments):
    """What was typed, as {name: value}."""
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                                  argument_default=argparse.SUPPRESS)
    cli.error = lambda message: cli.exit(2, f"{cli.prog}: {message}; --help shows what is allowed\n" * (LOCAL_RANK == 0))
    for f in dataclasses.fields(Config):
        text, default, (_, allowed) = (f.metadata[key] for key in ("help", "default", "allowed"))
        text += f"; {allowed}" * bool(allowed) + f" (default {', '.join(map(str, default))})" * (default[0] not in (None, ""))
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=f.type, metavar=f.type.__name__.upper())
        cli.add_argument("--" + f.name.replace("_", "-"), help=text, **kind)
    return vars(cli.parse_args(arguments))

def main(arguments=None):
    getattr(sys.stdout, "reconfigure", dict)(errors="replace")  # a sample may hold what the terminal has no letter for
    typed, cuda = parse(arguments), torch.cuda.is_available()
    if "RANK" in os.environ and not dist.is_initialized():  # gloo carries what is on the CPU
        if cuda: torch.cuda.set_device(LOCAL_RANK)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=datetime.timedelta(days=1))
    try:
        if "sample" in typed: print(sample(typed.pop("sample"), **typed))
        elif typed.get("eval_only"): print(f"validation loss {evaluate(typed.get('out', OUT), typed):.4f}")
        elif typed.get("compare"): compare(typed)
        else:
            summary, out = train(Config(**typed)), Path(typed.get("out", OUT))
            if RANK == 0: print(f"\n{sample(out, device=typed.get('device', 'auto'))}\n\nvalidation loss {summary['val_loss']:.4f} "
                                f"after {summary['steps']} steps, {summary['seconds']:.0f} s\n"
                                f"figure     {out / 'loss.png'}\nmodel      {out / 'hf'}")
        return 0
    except (Halt, OSError) as e:
        if LOCAL_RANK == 0 or not isinstance(e, Halt): print(f"train_gpt.py: {e}", file=sys.stderr)
        return getattr(e, "code", 1)
    except ModuleNotFoundError as e:
        print(f"train_gpt.py: {e.name} is missing: pip install {e.name}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as e:
        if not isinstance(e, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(e): raise
        print("train_gpt.py: out of memory: lower --micro-batch (the step stays the same), then --context or --width; "
              "--fsdp shards the model over more GPUs", file=sys.stderr)
        return 1

if __name__ == "__main__":
    status = main()
    if not dist.is_initialized(): sys.exit(status)
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(status)  # gloo's threads may abort the interpreter's own exit
