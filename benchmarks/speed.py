r"""How long things take, each beside what it is compared with, in turn and in one process.

    python benchmarks/speed.py step                     # IRE's own part of a step
    python benchmarks/speed.py train --preset tiny      # tokens a second of train_gpt.py
    python benchmarks/speed.py images --data-dir DIR    # pictures a second of train_cifar.py
    python benchmarks/speed.py train --device cuda --preset 229m --file results/train-229m.json
    MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=17179869184 \
        python benchmarks/speed.py step --file results/step-cpu-kept.json

They write results/step-cpu.json, train-cpu.json and cifar-speed-cpu.json. Each round runs every row
once, in an order drawn anew. Ratios are taken round by round, and their median and quartiles are
printed; those of step are ratios of medians. Flags that are not named below go to the training
script.

step: IRE's step and its new mask beside AdamW's step, for parameters of a Llama, without any model;
the bytes that they take at most; and the textbook way, as in the authors' code, with three copies
of the model that stay. The last command above is for Linux: malloc then keeps freed memory, as
CUDA's allocator does. By default it hands large buffers back to the kernel, and each step that
copies the weights pays for fresh pages.
train: AdamW, AdmIRE and SoftIRE in train_gpt.py, with as many steps in a row as a mask stays; and
the same Llama of the package transformers in a plain loop. images: SGD in train_cifar.py, and in a
plain loop over a DataLoader.
"""

import argparse
import contextlib
import functools
import gc
import itertools
import os
import platform
import random
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common
import llama
import text
import train_cifar
import train_gpt
from ire import IRE, AdmIRE

NEVER = 10**9  # steps


# -------------------------------------------------------------------------------- interleaved
def seconds(run, device):
    """The time of run(), also of what it leaves to the device."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(rows, rounds, device="cpu"):
    """{row: its times in seconds}. In each round every row runs once, in an order drawn anew. The
    first round warms up and does not count."""
    times = {name: [] for name in rows}
    order = list(rows)
    for i in range(rounds + 1):
        random.Random(i).shuffle(order)
        for name in order:
            elapsed = seconds(rows[name], device)
            if i > 0:
                times[name].append(elapsed)
    return times


def of_base(times, base):
    """The median of the ratios round by round, and their quartiles."""
    ratios = [a / b for a, b in zip(times, base, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, [low, high]


class Enough(Exception):
    """All steps that were wanted are made."""


class Steps:
    """Stands for common.Run in a training loop, which it ends after so many steps."""

    seconds = 0.0

    def __init__(self, count, c=None):
        self.left = count
        self.c = c

    def nothing(self, *_, **__):
        return 1.0  # second, where the clock is asked

    start_clock = stop_clock = check_finite = log = save = nothing

    def asked_to_stop(self):
        self.left -= 1
        if self.left == 0:
            raise Enough
        return False


class Training:
    """Steps of train_gpt.py's own loop, without its reports. A call makes as many steps as a mask
    stays."""

    def __init__(self, c):
        c.log_interval = c.eval_interval = c.checkpoint_interval = NEVER
        self.job = train_gpt.set_up(train_gpt.complete(c))

    def __call__(self):
        with contextlib.suppress(Enough):
            train_gpt.loop(Steps(self.job.c.interval), self.job)


# ---------------------------------------------------------------------------------------- step
SIZES = {  # millions of parameters: width, layers, feed-forward, vocabulary of a Llama
    1: (128, 5, 336, 256),
    10: (320, 8, 848, 256),
    60: (384, 16, 1024, 50304),
    229: (768, 16, 3072, 50304),
}
SETTINGS = dict(kappa=2, gamma=0.6, interval=10)


def make_params(millions, device):
    """Parameters and gradients; rows of the embedding that no batch uses have a gradient of 0."""
    width, layers, ffn, vocab = SIZES[millions]
    block = [(width, width)] * 4 + [(ffn, width)] * 2 + [(width, ffn)] + [(width,)] * 2
    torch.manual_seed(0)
    params = []
    for shape in [(vocab, width)] + block * layers + [(width,), (vocab, width)]:
        p = nn.Parameter(0.02 * torch.randn(shape, device=device))
        p.grad = 1e-3 * torch.randn_like(p) * torch.rand_like(p) ** 3
        params.append(p)
    params[0].grad[: vocab // 2] = 0
    return params


class Textbook:
    """IRE as it is usually written."""

    def __init__(self, params):
        self.params = params
        self.base = torch.optim.AdamW(params, 1e-3, foreach=True)
        self.fisher = [torch.zeros_like(p) for p in params]
        self.mask = [torch.zeros_like(p) for p in params]
        self.last = [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def refresh(self):
        for h, p in zip(self.fisher, self.params, strict=True):
            h.copy_(p.grad * p.grad)
        everything = torch.cat([h.flatten() for h in self.fisher])
        threshold = torch.kthvalue(everything, int(SETTINGS["gamma"] * len(everything))).values
        for m, h in zip(self.mask, self.fisher, strict=True):
            m.copy_(h <= threshold)

    @torch.no_grad()
    def step(self):
        for last, p in zip(self.last, self.params, strict=True):
            last.copy_(p)
        self.base.step()
        for last, m, p in zip(self.last, self.mask, self.params, strict=True):
            p.add_(m * (p - last), alpha=SETTINGS["kappa"])


def refresh(opt):
    """A probe whose gradients are there already: what is left is the mask."""
    grads = {p: p.grad for group in opt.param_groups for p in group["params"]}
    with opt.probe():
        for p, grad in grads.items():
            p.grad = grad


def step_with_a_mask(opt):
    """A step for which no mask is due."""
    for group in opt.param_groups:
        group["ire_step"] = 1
    opt.step()


def extra_memory(run, device):
    """The most bytes that run() had beyond what was there before."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
    before = resident("VmRSS")
    run()
    return max(0, resident("VmHWM") - before)


def resident(key):
    """A row of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(key)), 0)


def time_steps(args, rest):
    report = {"sizes": {}}
    for millions in args.sizes:
        params = functools.partial(make_params, millions, args.device)
        fused = torch.optim.AdamW(params(), 1e-3, fused=True)
        foreach = torch.optim.AdamW(params(), 1e-3, foreach=True)
        admire = AdmIRE(params(), 1e-3, **SETTINGS, curvature="fisher")
        plain = torch.optim.AdamW(params(), 1e-3, foreach=True)
        plain = IRE(plain, **SETTINGS, curvature="fisher")
        textbook = Textbook(params())
        rows = {
            "AdamW fused, step": fused.step,
            "AdamW foreach, step": foreach.step,
            "AdmIRE (fused), step": lambda: step_with_a_mask(admire),
            "IRE over AdamW foreach, step": lambda: step_with_a_mask(plain),
            "textbook, step": textbook.step,
            "IRE, refresh": lambda: refresh(admire),
            "textbook, refresh": textbook.refresh,
        }
        refresh(admire)
        refresh(plain)
        textbook.refresh()
        times = interleaved(rows, args.rounds, args.device)
        n = sum(p.numel() for p in textbook.params)
        report["sizes"][f"{millions}M"] = {"parameters": n, "rows": {}}
        print(f"\n{n:,} parameters{'':21}{'ms':>9}{'x fused':>9}{'extra B/param':>15}")
        for name, run in rows.items():
            low, middle, high = statistics.quantiles(times[name], n=4)
            row = {
                "ms": middle * 1e3,
                "quartiles_ms": [low * 1e3, high * 1e3],
                "over_fused_adamw": middle / statistics.median(times["AdamW fused, step"]),
                "extra_bytes_per_parameter": extra_memory(run, args.device) / n,
            }
            report["sizes"][f"{millions}M"]["rows"][name] = row
            ratio, extra = row["over_fused_adamw"], row["extra_bytes_per_parameter"]
            print(f"{name:35}{row['ms']:9.2f}{ratio:9.2f}{extra:15.1f}")
    return report


# --------------------------------------------------------------------------------------- train
def gpt_settings(typed, **own):
    """Settings of a row, which never ends. IRE is on from the first step."""
    endless = {"steps": 10**6, "warmup": 100, "ire_warmup": 0}
    preset = train_gpt.PRESETS[typed.get("preset", "tiny")]
    c = train_gpt.complete(train_gpt.Config(**{**preset, **typed, **endless, **own}))
    if own.get("curvature") == "fisher" and "probe_batches" not in own:
        c.probe_batches = c.batch_size // c.micro_batch
    return c


def rows_of_training(typed):
    """{name of a row: its settings}"""
    return {
        "AdamW": gpt_settings(typed, optimizer="adamw"),
        "AdmIRE, squares": gpt_settings(typed, optimizer="admire", curvature="squares"),
        "AdmIRE, full probe": gpt_settings(typed, optimizer="admire", curvature="fisher"),
        "SoftIRE on AdamW": gpt_settings(typed, optimizer="adamw-soft"),
        **quarter_rows(typed),
    }


def quarter_rows(typed):
    """The rows in which a quarter of the batch feeds the probe: a step has four micro-batches or
    more, AdamW's too."""
    c = gpt_settings(typed, optimizer="adamw")
    least = max(4, c.batch_size // c.micro_batch)
    n = next(n for n in range(least, c.batch_size + 1) if c.batch_size % n == 0)
    size = {"micro_batch": c.batch_size // n}
    probed = "one" if n < 8 else n // 4
    about = {"optimizer": "admire", "curvature": "fisher", "probe_batches": n // 4}
    return {
        f"AdamW, {n} micro-batches": gpt_settings(typed, optimizer="adamw", **size),
        f"AdmIRE, {n} micro-batches, probe on {probed}": gpt_settings(typed, **about, **size),
    }


def plain_loop(c):
    """What one would write without train_gpt.py: transformers' Llama, the same batches, precision,
    clip and schedule. Returns a function that makes as many steps as a mask stays."""
    from transformers import LlamaConfig, LlamaForCausalLM

    data = text.Data(c)
    about = llama.hugging_face_config(c, data.vocab, None)
    model = LlamaForCausalLM(LlamaConfig(**about, use_cache=False)).to(c.device)
    if c.compile:
        model.compile()
    rates = {"lr": c.lr, "betas": (c.beta1, c.beta2), "eps": c.eps, "weight_decay": c.weight_decay}
    optimizer = torch.optim.AdamW(model.parameters(), **rates, fused=True)
    steps = itertools.count()

    def run():
        for step in itertools.islice(steps, c.interval):
            batch = data.batch(step)
            for group in optimizer.param_groups:
                group["lr"] = train_gpt.learning_rate(c, step)
            for x, y in batch:
                enabled = c.dtype != "float32"
                with torch.autocast(c.device, getattr(torch, c.dtype), enabled=enabled):
                    logits = model(input_ids=x).logits
                    loss = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten()) / len(batch)
                loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), c.clip)
            optimizer.step()
            optimizer.zero_grad()

    return run


def time_training(args, rest):
    typed = common.parse(train_gpt.Config, "", rest) | {"device": args.device}
    settings = rows_of_training(typed)
    adamw = settings["AdamW"]
    quarter = [name for name in settings if "micro-batches" in name]
    runs = {name: Training(c) for name, c in settings.items()}
    loops = {**runs, "plain transformers loop, AdamW": plain_loop(adamw)}
    times = interleaved(loops, args.rounds, args.device)
    model = runs["AdamW"].job.model
    count = sum(p.numel() for p in model.parameters())
    tokens = adamw.interval * adamw.batch_size * adamw.context
    print(f"{count:,} parameters, {tokens:,} tokens in a row")
    print(f"{'':45}{'tokens/s':>10}{'of AdamW':>10}{'quartiles':>16}{'TFLOP/s':>10}")
    rows = {}
    for name, values in times.items():
        base = quarter[0] if name in quarter else "AdamW"
        ratio, quartiles = of_base(times[base], values)  # of speeds: the inverse of times
        rate = tokens / statistics.median(values)
        tflops = rate * llama.flops_per_token(model, adamw) / 1e12
        rows[name] = {"tokens_per_second": rate, "of_adamw": ratio, "quartiles": quartiles}
        rows[name]["tflops"] = tflops
        low, high = quartiles
        print(f"{name:45}{rate:10,.0f}{ratio:10.3f}{low:9.3f}-{high:.3f}{tflops:10.4g}")
    return {"parameters": count, "rows": rows}


# -------------------------------------------------------------------------------------- images
class Pictures(torch.utils.data.Dataset):
    """What a plain loop does: each picture is cropped, mirrored and normalised by itself."""

    def __init__(self, data):
        self.x, self.y = data.x.permute(0, 3, 1, 2).contiguous(), data.y
        self.mean, self.std = data.mean, data.std

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        x = F.pad(self.x[i], (4, 4, 4, 4))
        top, left = torch.randint(9, (2,)).tolist()
        x = x[:, top : top + 32, left : left + 32]
        x = x.flip(2) if torch.rand(()) < 0.5 else x
        return (x - self.mean) / self.std, self.y[i]


def plain_images(c, data, count):
    """SGD over a DataLoader: the loop that one writes first. Returns a function that makes so many
    steps."""
    model = train_cifar.MODELS[c.model](data.classes)
    about = {"momentum": c.momentum, "weight_decay": c.weight_decay}
    optimizer = torch.optim.SGD(model.parameters(), c.lr, **about)
    loader = torch.utils.data.DataLoader(Pictures(data), c.batch_size, True, drop_last=True)
    batches = (batch for _ in itertools.count() for batch in loader)

    def run():
        for x, y in itertools.islice(batches, count):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y, label_smoothing=c.label_smoothing)
            loss.backward()
            optimizer.step()

    return run


def own_images(c, data, count):
    """The same of train_cifar.py's own loop, without its reports."""
    net, parts = train_cifar.set_up(c, data)
    starts = itertools.count(0, count)

    def run():
        with contextlib.suppress(Enough):
            train_cifar.loop(Steps(count, c), data, net, parts, next(starts))

    return run


def time_images(args, rest):
    typed = common.parse(train_cifar.Config, "", rest)
    typed |= {"optimizer": "sgd", "log_interval": NEVER, "checkpoint_interval": 10**6}
    rows = {}
    data = None
    for dtype in ("float32", "bfloat16"):
        c = train_cifar.configure({**typed, "dtype": dtype, "device": "cpu"})
        common.choose_device(c)
        data = data or train_cifar.Data(c)
        rows[f"SGD, ours, {dtype}"] = own_images(c, data, args.steps)
    rows["SGD, plain, float32"] = plain_images(c, data, args.steps)
    times = interleaved(rows, args.rounds)
    report = {}
    for name, values in times.items():
        ratio, quartiles = of_base(times["SGD, plain, float32"], values)
        rate = args.steps * c.batch_size / statistics.median(values)
        report[name] = {"images_per_second": rate, "of_plain": ratio, "quartiles": quartiles}
        print(f"{name}: {ratio:.3f} of plain, quartiles {quartiles[0]:.3f} to {quartiles[1]:.3f}")
    return {"steps": args.steps, "rows": report}


# ---------------------------------------------------------------------------------- the report
def environment(device):
    """What a time or a loss depends on beside the settings."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **common.environment(),
    }


def processor():
    if os.path.exists("/proc/cpuinfo"):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor()


def write_report(report, path):
    common.write_json(path, report)
    print(f"\nwritten to {path}")


WHAT = {"step": time_steps, "train": time_training, "images": time_images}
FILES = {"step": "step", "train": "train", "images": "cifar-speed"}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("what", choices=WHAT)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=15, help="2 or more (default 15)")
    parser.add_argument(
        "--sizes", type=int, nargs="*", choices=SIZES, default=[1, 10, 60], help="of step: millions"
    )
    parser.add_argument("--steps", type=int, default=4, help="of images: steps in a row")
    parser.add_argument("--file", type=Path, help="default results/WHAT-DEVICE.json")
    args, rest = parser.parse_known_args()
    if args.what == "step" and rest:
        parser.error(f"step has no {' '.join(rest)}")
    if args.what == "images" and args.device != "cpu":
        parser.error("--device: allowed is cpu with images")
    malloc = [f"{name}={x}" for name, x in os.environ.items() if name.startswith("MALLOC_")]
    command = " ".join([*malloc, "python", "benchmarks/speed.py", *sys.argv[1:]])
    about = {"command": command, "environment": environment(args.device), "rounds": args.rounds}
    path = args.file or ROOT / "results" / f"{FILES[args.what]}-{args.device}.json"
    write_report(about | WHAT[args.what](args, rest), path)


if __name__ == "__main__":
    main()
