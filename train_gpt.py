"""Pre-train a Llama with IRE on top of AdamW, or with AdamW or Muon alone, on a laptop or on eight
GPUs. IRE takes longer steps where the loss is flat, coordinate by coordinate.

    python train_gpt.py                              # about 1M parameters on Python's own source
    python train_gpt.py --compare                    # AdamW, then SoftIRE, on the same batches
    python train_gpt.py --data my.txt --steps 2000   # your text: a file or a folder of files
    python train_gpt.py --resume                     # go on after Ctrl-C
    python train_gpt.py --sample runs/gpt --prompt "def "
    python train_gpt.py --init runs/gpt --data my.txt    # its weights, your text
    python train_gpt.py --preset baby                # about 11M parameters, for one GPU
    lm_eval --model hf --model_args pretrained=runs/gpt/hf,prefix_token_id=10 --tasks lambada_openai
    torchrun --standalone --nproc_per_node 8 train_gpt.py --preset 1b --fsdp

A resumed run ends bit for bit like a run that was not stopped: on a CPU, and on CUDA with
--deterministic. llama.py has the model, text.py the data, hf.py the folder for transformers, and
common.py settings and files of a run.
Top to bottom: settings, optimizers, training, files, comparison, sampling, command line.
"""

import contextlib
import dataclasses
import functools
import math
import os
import shutil

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.fsdp import fully_shard

import common
import hf
import llama
import text
from common import COUNT, DECAY, FRACTION, NOT_NEGATIVE, POSITIVE, STEPS, Range, check, setting
from ire import IRE, SoftIRE, hidden_matrices, sampled_cross_entropy
from sharpness import sharpness

# ------------------------------------------------------------------------------------ settings
# The paper's three Llamas, with IRE as in the paper (the probe). Its 60M has width 410, 10 heads.
# "baby" has about 11M parameters; "1b" wants several GPUs and --fsdp.
PAPER = {"tokenizer": "gpt2", "lr": 6e-4, "eps": 1e-16, "curvature": "fisher"}
PRESETS = {
    "tiny": dict(embedding_lr=4.0, head_lr=4.0),
    "baby": dict(layers=6, width=384, heads=6, ffn=1024, context=256)
    | dict(batch_size=64, steps=5000, lr=1e-3, embedding_lr=4.0, head_lr=4.0),
    "60m": PAPER
    | dict(data="wikitext-103", steps=50_000, warmup=500, ire_warmup=500, batch_size=240)
    | dict(layers=16, width=384, heads=6, ffn=1024, context=150, kappa=2.0, gamma=0.7),
    "119m": PAPER
    | dict(data="minipile", steps=30_000, warmup=300, ire_warmup=300, batch_size=300)
    | dict(layers=6, width=768, heads=12, ffn=2048, context=512, kappa=4.0, gamma=0.6),
    "229m": PAPER
    | dict(data="openwebtext", steps=50_000, warmup=1000, ire_warmup=1000, batch_size=480)
    | dict(layers=16, width=768, heads=12, ffn=3072, context=1024, kappa=4.0, gamma=0.6),
    "1b": dict(data="openwebtext", tokenizer="gpt2", steps=20_000, warmup=1000, batch_size=512)
    | dict(layers=18, width=2048, heads=16, ffn=5632, context=2048, lr=4e-4),
}
OPTIMIZERS = {"adamw": None, "admire": "ire", "adamw-soft": "soft"}  # what makes steps longer
OPTIMIZERS |= {"muon": None, "muon-ire": "ire", "muon-soft": "soft"}
ANY_IRE = ("ire", "soft")
FISHER = ("fisher",)
SHAPE = ("tokenizer", "layers", "width", "heads", "ffn")  # what weights fix
DATA = """stdlib (Python's own source), shakespeare, wikitext-2, wikitext-103, minipile,
openwebtext, a text file, a folder of text files, or a folder with train.bin, val.bin, meta.json"""
FLAT = """the loss is flat where these are small: squared gradients of training, or (the paper's) of
labels sampled from the model"""
METHODS = "admire, muon-ire: IRE on top of AdamW, Muon; -soft: IRE without a threshold"
COMPARED = "adamw,adamw-soft"
COMPARE = f"optimizers to train in turn; the first is the base ({COMPARED} if none is named)"
SCHEDULES = ("cosine", "wsd", "constant")
LOSS = "loss (nats per token)"
ADVICE = "a lower --lr, --kappa or --alpha, or a longer --warmup"
SIZE = Range(1, 2**20, "1 to 2^20")
UNIT = Range(0, 1, "0 to 1")


@dataclasses.dataclass
class Config(common.Settings):
    """Adds the settings of this script to those that all scripts have."""

    home = "runs/gpt"

    # the model and its text
    preset: str = setting("tiny", "settings to start from", tuple(PRESETS))
    data: str = setting("stdlib", DATA, resume=True)  # the same text in another place
    data_dir: str = setting("data", "folder for prepared data", resume=True)
    tokenizer: str = setting("bytes", "what a token is", ("bytes", "gpt2"))
    layers: int = setting(4, "transformer blocks", SIZE)
    width: int = setting(128, "size of an embedding", SIZE)
    heads: int = setting(4, "attention heads; width / heads is even", COUNT)
    ffn: int = setting(336, "width inside the feed-forward", SIZE)
    context: int = setting(128, "tokens in a sequence", SIZE)
    init: str = setting(None, "begin with the weights, and so the sizes, of the run in this folder")
    # the schedule
    batch_size: int = setting(16, "sequences in a step, over all GPUs", SIZE)
    steps: int = setting(1000, "optimizer steps", COUNT, resume=True)
    warmup: int = setting(None, "steps up to the peak (default 250, at most --steps / 4)", STEPS)
    lr: float = setting(2e-3, "peak learning rate", POSITIVE)
    embedding_lr: float = setting(1.0, "times --lr for the embedding; 4 in tiny, baby", POSITIVE)
    head_lr: float = setting(1.0, "times --lr for the output layer; 4 in tiny, baby", POSITIVE)
    schedule: str = setting("cosine", "after the peak; wsd falls in the last fifth", SCHEDULES)
    min_lr: float = setting(0.05, "last lr as a fraction of the peak", UNIT)
    clip: float = setting(1.0, "largest norm of the gradient; 0 is off", NOT_NEGATIVE)
    # the optimizer
    optimizer: str = setting("admire", METHODS, tuple(OPTIMIZERS))
    beta1: float = setting(0.9, "AdamW's decay of the mean, also beside Muon", DECAY)
    beta2: float = setting(0.95, "AdamW's decay of the second moment", DECAY)
    eps: float = setting(1e-8, "AdamW's epsilon", POSITIVE)
    weight_decay: float = setting(0.1, "on matrices only", NOT_NEGATIVE)
    # IRE on top of it
    kappa: float = setting(2.0, "flat steps are 1 + kappa times as long", NOT_NEGATIVE, of=("ire",))
    gamma: float = setting(0.7, "flat fraction of the coordinates", FRACTION, of=("ire",))
    alpha: float = setting(0.3, "strength of -soft; 0 is the base alone", UNIT, of=("soft",))
    interval: int = setting(10, "steps until IRE looks again where it is flat", COUNT, of=ANY_IRE)
    ire_warmup: int = setting(0, "steps before IRE switches on", STEPS, of=ANY_IRE)
    curvature: str = setting("squares", FLAT, ("squares", "fisher"), of=ANY_IRE)
    probe_batches: int = setting(
        None, "micro-batches that fisher sees (default: a quarter)", COUNT, of=FISHER, resume=True
    )
    # how to compute it
    micro_batch: int = setting(None, "sequences in a pass (default: what fits)", COUNT, resume=True)
    fsdp: bool = setting(False, "shard over torchrun's GPUs (FSDP2), not DDP", resume=True)
    # reports
    log_interval: int = setting(
        None, "steps between lines of the log (default 20, fewer in short runs)", COUNT, resume=True
    )
    eval_interval: int = setting(
        None, "steps between validations (a tenth of --steps, 10 to 1000)", COUNT, resume=True
    )
    eval_sequences: int = setting(512, "of a validation, in whole batches", COUNT, resume=True)
    checkpoint_interval: int = setting(
        None, "steps between checkpoints (a tenth of --steps, 10 to 1000)", COUNT, resume=True
    )
    keep_best: bool = setting(False, "the best checkpoint too, in OUT/best", resume=True)
    stop_at: float = setting(None, "end at a validation loss this low", POSITIVE, resume=True)
    sharpness: bool = setting(False, "Tr(Hessian), lambda_max at each validation", resume=True)
    # what to do
    compare: str = setting(None, COMPARE, command=True, alone=COMPARED)
    eval_only: bool = setting(False, "print the validation loss of --out", command=True)
    sample: str = setting(None, "print text from the run in this folder", command=True)
    prompt: str = setting("", "how the text begins", command=True)
    num_samples: int = setting(1, "how many texts", COUNT, command=True)
    tokens: int = setting(300, "how many tokens follow the prompt", COUNT, command=True)
    temperature: float = setting(0.8, "0 takes the likeliest token", NOT_NEGATIVE, command=True)
    top_k: int = setting(50, "choose among so many tokens", COUNT, command=True)


def configure(typed, names=()):
    """Returns the settings of a command: preset < --init < saved run (--resume) < --config < typed.
    names: the optimizers of a comparison. At least one of them must read what was typed."""
    given = common.collect(Config, typed)
    preset = dict(PRESETS.get(given.get("preset", "tiny"), {}))
    if "steps" in given:  # as where no preset says it, a warm-up takes at most a quarter of them
        for name in {"warmup", "ire_warmup"} & preset.keys():
            preset[name] = min(preset[name], given["steps"] // 4)
    shape = {}
    if given.get("init") and not given.get("resume"):
        source = common.read_checkpoint(given["init"], mmap=True)["config"]
        shape = {name: source[name] for name in SHAPE}
    c = Config(**preset | shape | given)
    names = names or [c.optimizer]
    read = {OPTIMIZERS.get(name) for name in names} - {None}
    if read:
        read.add(c.curvature)
    by = f"{' or '.join(names)} with --curvature {c.curvature}"
    common.refuse_unread(Config, typed, read, by)
    if c.resume:
        check_steps(c)
    return c


def complete(c):
    """Fills in what follows from other settings, and checks what must fit together."""
    c = dataclasses.replace(c)
    common.choose_device(c, float16=not c.fsdp)
    common.choose_folder(c)
    c.warmup = min(250, c.steps // 4) if c.warmup is None else c.warmup
    c.log_interval = c.log_interval or min(20, math.ceil(c.steps / 20))
    tenth = min(1000, max(10, math.ceil(c.steps / 10)))
    c.eval_interval = c.eval_interval or tenth
    c.checkpoint_interval = c.checkpoint_interval or tenth
    share, rest = divmod(c.batch_size, common.RANKS)
    check(c, "batch_size", not rest, f"a multiple of the {common.RANKS} ranks")
    c.micro_batch = c.micro_batch or largest_micro_batch(c, share)
    divides = share % c.micro_batch == 0
    check(c, "micro_batch", divides, f"a divisor of {share}, a rank's share of --batch-size")
    most = share // c.micro_batch
    check(c, "probe_batches", (c.probe_batches or 1) <= most, f"1 to {most}, those of a step")
    check_settings(c)
    return c


def largest_micro_batch(c, share):
    """Returns the largest divisor of a rank's share of the batch that fits: up to 32,768 tokens and
    2^26 logits, or 2^28 logits on a GPU."""
    logits = 2**26 if c.device == "cpu" else 2**28
    most = min(share, max(1, min(2**15, logits // text.vocabulary(c)) // c.context))
    return max(n for n in range(1, most + 1) if share % n == 0)


def check_settings(c):
    check(c, "width", c.width % (2 * c.heads) == 0, f"a multiple of twice --heads, {2 * c.heads}")
    check(c, "warmup", c.warmup < c.steps, f"0 to --steps - 1, {c.steps - 1}")
    never = OPTIMIZERS[c.optimizer] and c.ire_warmup >= c.steps
    check(c, "ire_warmup", not never, f"0 to --steps - 1, {c.steps - 1}: later is the base alone")
    check(c, "fsdp", not c.fsdp or common.LAUNCHED, "--no-fsdp without torchrun")
    old = c.optimizer.startswith("muon") and not hasattr(torch.optim, "Muon")
    check(c, "optimizer", not old, f"adamw or admire on torch {torch.__version__}; muon needs 2.9")
    check(c, "sharpness", not (c.sharpness and c.fsdp), "--no-sharpness with --fsdp")


def check_steps(c):
    """Lets --steps change on --resume where the learning rates of the steps so far stay."""
    saved = common.read_checkpoint(c.out, mmap=True)
    before = dataclasses.replace(c, steps=saved["config"]["steps"])
    made = saved["step"]
    check(c, "steps", c.steps >= made, f"{made} or more, as {c.out} has made {made} steps")
    same = all(learning_rate(before, step) == learning_rate(c, step) for step in range(made))
    other = f"with another number, its {c.schedule} schedule would have begun differently"
    check(c, "steps", same, f"{before.steps}, as {c.out} began: {other}")


# ---------------------------------------------------------------------------------- optimizers
class MuonAndAdamW(torch.optim.Optimizer):
    """Makes one optimizer of two: Muon for the groups that say so, AdamW for the others."""

    def __init__(self, groups, **adamw):
        muon, others = ([g for g in groups if g["muon"] == kind] for kind in (True, False))
        self.muon = torch.optim.Muon(muon, lr=adamw["lr"], adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(others, **adamw)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})

    def step(self, closure=None):  # always None, in our loop and where torch loads a state dict
        for part in (self.muon, self.adamw):  # a loaded state dict has made new groups and state
            part.state = self.state
            part.param_groups = [g for g in self.param_groups if g["muon"] == (part is self.muon)]
            part.step()


def make_optimizer(model, c):
    """Makes what --optimizer names. Muon and SoftIRE take the matrices of the blocks. Norms have no
    decay. lr_scale: the learning rate of a group as a multiple of --lr."""
    hidden = hidden_matrices(model)
    norms = [p for p in model.parameters() if p.dim() == 1]
    decayed = {"weight_decay": c.weight_decay, "muon": False}
    groups = [
        decayed | {"params": hidden, "lr_scale": 1.0, "muon": True},
        decayed | {"params": [model.model.embed_tokens.weight], "lr_scale": c.embedding_lr},
        decayed | {"params": [model.lm_head.weight], "lr_scale": c.head_lr},
        {"params": norms, "lr_scale": 1.0, "weight_decay": 0.0, "muon": False},
    ]
    adamw = {"lr": c.lr, "betas": (c.beta1, c.beta2), "eps": c.eps, "fused": c.device != "mps"}
    muon = c.optimizer.startswith("muon")
    base = MuonAndAdamW(groups, **adamw) if muon else torch.optim.AdamW(groups, **adamw)
    about = {"interval": c.interval, "warmup": c.ire_warmup, "curvature": c.curvature}
    if OPTIMIZERS[c.optimizer] == "ire":
        return IRE(base, kappa=c.kappa, gamma=c.gamma, **about)
    if OPTIMIZERS[c.optimizer] == "soft":
        return SoftIRE(base, params=hidden, alpha=c.alpha, **about)
    return base


def learning_rate(c, step):
    """Returns the rate of a step: a linear warm-up, then the schedule, down to min_lr * lr."""
    if step < c.warmup:
        return c.lr * (step + 1) / c.warmup
    last = c.steps - 1
    share = 1.0
    if c.schedule == "cosine":
        share = 0.5 * (1 + math.cos(math.pi * (step - c.warmup) / max(1, last - c.warmup)))
    if c.schedule == "wsd":  # warm-up, stable, decay
        first = max(c.warmup, last - c.steps // 5)
        share = 1 - max(0, step - first) / max(1, last - first)
    return c.lr * (c.min_lr + (1 - c.min_lr) * share)


# ------------------------------------------------------------------------------------ training
def train(c, make_optimizer=make_optimizer):
    """Trains one model. Returns its settings with val_loss, steps that were made, seconds and
    tokens_per_second. Raises BadInput, Diverged, or Halt after a signal, with the checkpoint
    written."""
    c = complete(c)
    job = set_up(c, make_optimizer)
    with common.Run(c, c.steps) as run:
        if c.overwrite and common.RANK == 0:
            for name in ("best", "hf"):
                shutil.rmtree(run.out / name, ignore_errors=True)
        if c.resume:
            restore(run, job)
        banner(run, job)
        if job.step == 0:
            run.log(0, val_loss=validation_loss(job.forward, job.data), **sharp(job))
        if c.compile:  # before the clock starts
            job.forward(*job.data.batch(job.step)[0]).backward()
            job.optimizer.zero_grad()
        loop(run, job)
        export(job, run.out / "hf")
        if run.asked_to_stop():  # during or after the last step: no other run begins
            raise run.stopped()
    reached = {"steps": job.step, "val_loss": job.val_loss, "seconds": run.seconds}
    rate = job.step * c.batch_size * c.context / run.seconds
    return dataclasses.asdict(c) | reached | {"tokens_per_second": rate}


@dataclasses.dataclass
class Job:
    """Holds what the loop works with, and what the loop has reached."""

    c: Config
    data: text.Data
    model: nn.Module
    forward: nn.Module  # the model, or DDP around it
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    val_loss: float = math.inf
    best: float = math.inf

    def done(self):
        return self.step == self.c.steps or self.val_loss <= (self.c.stop_at or -math.inf)

    def due(self, *intervals):
        return self.done() or any(self.step % n == 0 for n in intervals)


def set_up(c, make_optimizer=make_optimizer):
    """Makes data, model and optimizer for the start of a run."""
    data = text.Data(c)
    data.codec.encode(os.fsencode(c.prompt))  # refused now, and not after the training
    if c.resume:
        same = common.read_checkpoint(c.out, mmap=True)["data"] == data.sha256
        check(c, "data", same, f"the text that {c.out} began with; this one differs")
    common.set_up_torch(c)
    model, forward = make_model(c, data)
    scaler = torch.amp.GradScaler(c.device, enabled=c.dtype == "float16")
    return Job(c, data, model, forward, make_optimizer(model, c), scaler)


def make_model(c, data):
    """Returns the model, and what computes its loss: the model itself, or DDP around the model."""
    model = llama.Llama(c, data.vocab)
    if c.init and not c.resume:
        load_weights(model, c.init, data.tokens)
    model.to(c.device)
    if c.compile:
        llama.compile_blocks(model)
    if c.fsdp:
        mesh = dist.init_device_mesh(c.device, (common.RANKS,))
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=mesh)
    torch.manual_seed(c.seed + (common.RANK << 40))  # each rank draws labels of its own
    alone = c.fsdp or not dist.is_initialized()
    return model, model if alone else nn.parallel.DistributedDataParallel(model)


def loop(run, job):
    """Makes the steps. Logs, validates and saves between them where this is due."""
    c = job.c
    data, forward, optimizer, scaler = job.data, job.forward, job.optimizer, job.scaler
    pending = []  # loss and norm of the gradient of each step since the last line of the log
    run.start_clock()
    while not job.done():
        lr = learning_rate(c, job.step)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        batch = data.batch(job.step)

        if getattr(optimizer, "probe_due", False):  # only with --curvature fisher
            probe(job, batch)

        total = 0.0
        for i, (x, y) in enumerate(batch, 1):
            with gradients_shared(forward, now=i == len(batch)):
                loss = forward(x, y) / len(batch)
                scaler.scale(loss).backward()
            total += loss.detach()

        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(forward.parameters(), c.clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        job.step += 1

        pending.append(torch.stack((total, norm.full_tensor() if c.fsdp else norm)))
        stopping = run.asked_to_stop()
        if not (stopping or job.due(c.log_interval, c.eval_interval, c.checkpoint_interval)):
            continue
        log(run, job, pending, lr)
        if job.due(c.eval_interval):
            validate(run, job)
        if stopping or job.due(c.checkpoint_interval):
            save(run, job)
        if stopping and not job.done():
            raise run.stopped()
        pending = []
        run.start_clock()


def probe(job, batch):
    """Shows IRE's probe the first micro-batches, by default a quarter of them."""
    count = job.c.probe_batches or math.ceil(len(batch) / 4)
    with job.optimizer.probe(job.forward):
        for x, _ in batch[:count]:
            loss = sampled_cross_entropy(job.forward(x)) / count
            job.scaler.scale(loss).backward()


def gradients_shared(forward, now):
    """Decides whether the ranks add up their gradients in the backward pass inside."""
    if hasattr(forward, "set_requires_gradient_sync"):  # FSDP
        forward.set_requires_gradient_sync(now)
    wait = hasattr(forward, "no_sync") and not now  # DDP
    return forward.no_sync() if wait else contextlib.nullcontext()


def log(run, job, pending, lr):
    """Writes a line about the last steps. Raises Diverged."""
    c = job.c
    pending = torch.stack(pending).cpu().double()  # waits for the device
    losses, norms = zip(*common.over_ranks(pending / common.RANKS), strict=True)
    seconds = run.stop_clock()
    run.check_finite(job.step, losses, ADVICE)
    if not job.scaler.is_enabled():  # its first steps may overflow, and are left out
        run.check_finite(job.step, norms, ADVICE)
    values = {"train_loss": sum(losses) / len(losses), "lr": lr}
    values["grad_norm"] = sum(norms) / len(norms)
    if type(job.optimizer) is IRE and job.step > c.ire_warmup:
        values |= job.optimizer.flat_share()
    rate = len(losses) * c.batch_size * c.context / seconds
    run.log(job.step, **values, tokens_per_second=round(rate))


def validate(run, job):
    """Writes a line with the validation loss, and keeps the best checkpoint. Raises Diverged."""
    job.val_loss = validation_loss(job.forward, job.data)
    run.check_finite(job.step, [job.val_loss], ADVICE)
    run.log(job.step, val_loss=job.val_loss, **sharp(job))
    if job.c.keep_best and job.val_loss < job.best:
        save(run, job, "best/checkpoint.pt")
    job.best = min(job.best, job.val_loss)


@torch.no_grad()
def validation_loss(forward, data):
    """Returns the mean loss of the validation sequences, over all ranks."""
    total = count = 0
    for x, y in data.validation():
        total += float(forward(x, y)) * len(x)  # the last micro-batch may be smaller
        count += len(x)
    total, count = common.over_ranks([total, count])
    return total / count


def sharp(job):
    """Measures the Hessian of the loss of the first micro-batch."""
    if not job.c.sharpness or common.RANK:
        return {}
    x, y = job.data.batch(0)[0]
    job.model.dtype = torch.float32
    with torch.compiler.set_stance("force_eager"):  # a compiled model has no second derivative
        found = sharpness(job.model, [lambda: job.model(x, y)], probes=8, products=20)
    job.model.dtype = getattr(torch, job.c.dtype)
    return {"trace": found["trace"], "lambda_max": found["lambda_max"]}


def banner(run, job):
    """Prints what will be trained, with what, and what to expect."""
    c, data = job.c, job.data
    count = sum(p.numel() for p in job.model.parameters())
    tokens = c.batch_size * c.context
    share = c.steps * tokens / len(data.train)
    room = llama.memory(job.model, c, common.RANKS if c.fsdp else 1) / 2**30
    place = [f"{common.RANKS} x {c.device}", c.dtype, "FSDP" if c.fsdp else ""]
    place += ["compiled" if c.compile else "", f"wants about {room:.0f} GB" if room > 1 else ""]
    strength = {"ire": f", kappa {c.kappa:g}, gamma {c.gamma:g}", "soft": f", alpha {c.alpha:g}"}
    start = f"guessing among {data.vocab} tokens has the loss {math.log(data.vocab):.2f}"
    start = f"the weights of {c.init}" if c.init else start
    common.say(
        model=f"Llama, {count:,} parameters: {c.layers} layers of width {c.width}",
        data=f"{c.data}: {len(data.train):,} tokens to train on, {len(data.val):,} held out",
        device=", ".join(filter(None, place)),
        optimizer=c.optimizer + strength.get(OPTIMIZERS[c.optimizer], ""),
        lr=f"up to {c.lr:g}; embedding {c.embedding_lr:g} and head {c.head_lr:g} times as much",
        run=f"{c.steps} steps of {tokens:,} tokens, {share:.0%} of the data, into {run.out}",
        start=f"step {job.step} of {c.steps}" if job.step else start,
    )


# --------------------------------------------------------------------------------------- files
WHOLE = states.StateDictOptions(full_state_dict=True, cpu_offload=True)  # of all shards


def save(run, job, name="checkpoint.pt"):
    """Writes a checkpoint and the figure. The checkpoint is whole also where the model is sharded,
    so that any number of ranks can go on."""
    model, optimizer = states.get_state_dict(job.model, job.optimizer, options=WHOLE)
    parts = {"model": model, "optimizer": optimizer, "scaler": job.scaler}
    about = {"data": job.data.sha256, "tokens": job.data.tokens}
    run.save(job.step, name, **parts, **about, val_loss=job.val_loss, best=job.best)
    if common.RANK == 0:
        log = common.read_log(run.out)
        curves = {key: common.curve(log, key) for key in ("train_loss", "val_loss")}
        common.draw(run.out / "loss.png", {LOSS: curves})


def restore(run, job):
    """Goes on from the checkpoint of the run."""
    saved = run.load(scaler=job.scaler)
    parts = {"model_state_dict": saved["model"], "optim_state_dict": saved["optimizer"]}
    states.set_state_dict(job.model, job.optimizer, options=WHOLE, **parts)
    for name in ("step", "val_loss", "best"):
        setattr(job, name, saved[name])


def load_weights(model, folder, tokens):
    """Loads the weights of the run in a folder. Its tokens must mean the same."""
    saved = common.read_checkpoint(folder, mmap=True)
    if saved["tokens"] != tokens:
        raise common.BadInput(f"--data: got {tokens}, allowed is {saved['tokens']}, as {folder}")
    with common.instead(f"the sizes given do not fit the weights of {folder}"):
        model.load_state_dict(saved["model"])


def export(job, folder):
    """Writes the folder hf, for transformers."""
    weights = states.get_model_state_dict(job.model, options=WHOLE)
    if common.RANK == 0:
        hf.write(folder, weights, job.c, job.data.vocab, job.data.codec)


# ---------------------------------------------------------------------------------- comparison
def compare(typed):
    """Trains with several optimizers on the same seed, batches and settings, in OUT/NAME each."""
    names = typed["compare"].split(",")
    if "optimizer" in typed:
        got = f"--optimizer: got {typed['optimizer']!r}"
        raise common.BadInput(f"{got}, allowed with --compare is to leave it out")
    for name in names:
        if name not in OPTIMIZERS or names.count(name) > 1:
            allowed = f"each of {', '.join(OPTIMIZERS)} once, with a comma between two"
            raise common.BadInput(f"--compare: got {typed['compare']!r}, allowed is {allowed}")
    changes = {name: {"optimizer": name} for name in names}
    make = functools.partial(configure, names=names)
    out, settings = common.settings_of_runs("runs/compare", typed, changes, make)
    report(out, [train(c) for c in settings])


def report(out, runs):
    """Prints the table of a comparison, and draws the figure."""
    if common.RANK:
        return
    base = runs[0]
    curves = {}
    print(f"\n{'optimizer':12}{'loss':>9}{'gain':>9}{'steps saved':>13}{'tokens/s':>12}")
    for run in runs:
        name = run["optimizer"]
        curves[name] = common.curve(common.read_log(run["out"]), "val_loss")
        reached = [step for step, x in curves[name] if step and x <= base["val_loss"]]
        saved = base["steps"] - reached[0] if reached else "none"
        gain = base["val_loss"] - run["val_loss"]
        rate = f"{run['tokens_per_second']:,.0f}"
        print(f"{name:12}{run['val_loss']:9.4f}{gain:9.4f}{saved:>13}{rate:>12}")
    often = f"one seed, a validation every {base['eval_interval']} steps"
    print(f"\nGain and steps saved are against {base['optimizer']}: {often}.")
    common.draw(out / "compare.png", {LOSS: curves})
    common.say(figure=out / "compare.png")


# ------------------------------------------------------------------------------------ sampling
def load_run(folder, typed):
    """Returns model, settings and kind of tokens of the run in a folder."""
    saved = common.read_checkpoint(folder, mmap=True)
    now = {"device": "auto", "dtype": "float32", "compile": False, "fsdp": False}
    asked = common.with_config(Config, typed)
    c = Config(**saved["config"] | now | asked | {"given": sorted(asked)})
    common.choose_device(c)
    model = llama.Llama(c, text.padded(saved["tokens"]["vocab"]))
    load_weights(model, folder, saved["tokens"])
    return model.to(c.device), c, saved["tokens"]


def sample(folder, typed):
    """Returns text from the run in a folder."""
    model, c, kind = load_run(folder, typed)
    codec = text.Codec(**kind)
    generator = torch.Generator().manual_seed(c.seed)
    tokens = [int(t) for t in codec.encode(os.fsencode(c.prompt))] or [codec.between or 0]
    texts = [llama.generate(model, c, tokens, codec.vocab, generator) for _ in range(c.num_samples)]
    return "\n---------------\n".join(codec.decode(tokens) for tokens in texts)


def evaluate(folder, typed):
    """Returns the validation loss of the run in a folder."""
    model, c, kind = load_run(folder, typed)
    data = text.Data(c)
    check(c, "data", data.tokens == kind, f"text in the tokens of {folder}, {kind}")
    return validation_loss(model, data)


# -------------------------------------------------------------------------------- command line
def run_command(typed):
    commands = [name for name in ("sample", "eval_only", "compare") if typed.get(name)]
    if len(commands) > 1:
        got = " and ".join(map(common.flag, commands))
        raise common.BadInput(f"got {got}, allowed is one of them")
    if "sample" in typed:
        found = sample(typed["sample"], typed)
        if common.RANK == 0:
            print(found)
    elif typed.get("eval_only"):
        folder = typed.get("out") or common.newest_run(f"{Config.home}*")
        common.say(loss=f"{evaluate(folder, typed):.4f} on the held-out text, {folder}")
    elif "compare" in typed:
        compare(typed)
    else:
        done = train(configure(typed))
        if common.RANK == 0:
            names = ("device", "prompt", "num_samples", "tokens", "temperature", "top_k")
            print(f"\n{sample(done['out'], {name: done[name] for name in names})}\n")
        loss = f"{done['val_loss']:.4f} on held-out text"
        common.say(
            loss=f"{loss} after {done['steps']} steps, {done['seconds']:.0f} s of training",
            figure=f"{done['out']}/loss.png",
            model=f"{done['out']}/hf, for transformers",
        )


def main(arguments=None):
    advice = "lower --micro-batch (the step stays the same), then --context or --width"
    advice += "; --fsdp shards the model over more GPUs"
    return common.main(Config, __doc__, run_command, arguments, advice)


if __name__ == "__main__":
    common.leave(main())
