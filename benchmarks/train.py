"""Tokens a second of train_gpt.py, and of two plain loops beside it; kernels and traffic on a GPU.

    python benchmarks/train.py                # the tiny run; writes results/train-cpu.json
    python benchmarks/train.py --device cuda --preset 229m --file results/train-229m.json
    python benchmarks/train.py --count        # 60m, 119m, 229m, on fake tensors; adds to the file

The loops train a GPT-2 of as many parameters (nanoGPT's block) and transformers' LlamaForCausalLM,
both with torch's fused AdamW. Each round gives every row one interval of K = 10 steps in turn (one
probe among them), in an order drawn anew, in one process; the ratio to train_gpt.py's AdamW is
taken round by round, and its median and quartiles are printed. Other settings go to train_gpt.py.

--count runs the forward and backward passes of one probe and of one step, without and with the
changes since commit 3f5953a, and adds up operations that are no views, as kernels, and the bytes
of their inputs and outputs. Nothing is compiled here: on a GPU torch.compile merges the elementwise
ones, of the blocks before and after, of the probe's loss only after.
"""

import argparse
import contextlib
import importlib.util
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from step import environment, synchronize, write_report  # noqa: E402

import train_gpt  # noqa: E402

VARIANTS = {
    "AdamW": {"optimizer": "adamw"},
    "AdmIRE, full probe": {"optimizer": "admire"},
    "AdmIRE, second_moment": {"optimizer": "admire", "curvature": "second_moment"},
}
BEFORE = "3f5953a"


def settings(typed, **own):
    """Settings of one row, that never ends, has its warm-up behind it and probes on all it sees."""
    endless = {"steps": 10**6, "warmup": 100, "ire_warmup": 0, "probe_batches": None}
    c = train_gpt.complete(train_gpt.Config(**{**typed, **endless, **own}))
    c.probe_batches = c.probe_batches or c.batch_size // c.micro_batch
    return c


def quarter_rows(typed):
    """The rows in which a quarter of the batch feeds the probe: a step has four micro-batches or
    more, AdamW's too."""
    c = settings(typed, optimizer="adamw")
    least = max(4, c.batch_size // c.micro_batch)
    n = next(n for n in range(least, c.batch_size + 1) if c.batch_size % n == 0)
    size = {"micro_batch": c.batch_size // n}
    probed = "one" if n < 8 else n // 4
    admire = settings(typed, optimizer="admire", probe_batches=n // 4, **size)
    return {
        f"AdamW, {n} micro-batches": settings(typed, optimizer="adamw", **size),
        f"AdmIRE, {n} micro-batches, probe on {probed}": admire,
    }


class Ours:
    """train_gpt.py's own step."""

    def __init__(self, c):
        self.c = c
        self.data = train_gpt.Data(c)
        self.step = 0
        torch.manual_seed(c.seed)
        self.model = train_gpt.make_model(c, self.data.vocab)
        self.optimizer = train_gpt.make_optimizer(self.model, c)
        self.scaler = torch.amp.GradScaler(c.device, enabled=c.dtype == "float16")

    def train_step(self):
        batch = self.data.batch(self.step)
        train_gpt.train_step(self.model, self.optimizer, batch, self.step, self.c, self.scaler)
        self.step += 1


class GPT2Block(nn.Module):
    """Layer norms without bias, one matrix for q, k and v, GELU."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        parts = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT2(nn.Module):
    def __init__(self, c, vocab):
        super().__init__()
        self.tokens = nn.Embedding(vocab, c.width)
        self.places = nn.Embedding(c.context, c.width)
        self.blocks = nn.ModuleList(GPT2Block(c.width, c.heads) for _ in range(c.layers))
        self.norm = nn.LayerNorm(c.width, bias=False)
        self.head = nn.Linear(c.width, vocab, bias=False)

    def forward(self, x):
        h = self.tokens(x) + self.places(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


class TransformersLlama(nn.Module):
    def __init__(self, c, vocab):
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        self.llama = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab,
                hidden_size=c.width,
                intermediate_size=c.ffn,
                num_hidden_layers=c.layers,
                num_attention_heads=c.heads,
                max_position_embeddings=c.context,
                use_cache=False,
            )
        )

    def forward(self, x):
        return self.llama(input_ids=x).logits


class Plain:
    """What one would write without train_gpt.py: the same batches, precision, clip, schedule."""

    def __init__(self, c, make_model):
        self.c = c
        self.data = train_gpt.Data(c)
        self.step = 0
        torch.manual_seed(c.seed)
        self.model = make_model(c, self.data.vocab).to(c.device)
        if c.compile:
            self.model.compile()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=c.lr,
            betas=(c.beta1, c.beta2),
            eps=c.eps,
            weight_decay=c.weight_decay,
            fused=True,
        )
        self.autocast = contextlib.nullcontext()
        if c.dtype != "float32":
            self.autocast = torch.autocast(c.device, getattr(torch, c.dtype))

    def train_step(self):
        batch = self.data.batch(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = train_gpt.learning_rate(self.c, self.step)
        for x, y, _ in batch:
            with self.autocast:
                logits = self.model(x)
                loss = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten()) / len(batch)
            loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.c.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1


# ------------------------------------------------------------------------------------ the times
def interval(run):
    """Tokens a second over K steps."""
    c = run.c
    synchronize(c.device)
    start = time.perf_counter()
    for _ in range(c.interval):
        run.train_step()
    synchronize(c.device)
    return c.interval * c.batch_size * c.context / (time.perf_counter() - start)


def time_rows(typed, rounds):
    """The report: tokens a second of every row, and its ratio to train_gpt.py's AdamW."""
    adamw = settings(typed, optimizer="adamw")
    quarter = quarter_rows(typed)
    cut = next(iter(quarter))  # AdamW of as many micro-batches
    runs = {
        "plain GPT-2 loop, AdamW": Plain(adamw, GPT2),
        "plain transformers loop, AdamW": Plain(adamw, TransformersLlama),
        **{name: Ours(settings(typed, **own)) for name, own in VARIANTS.items()},
        **{name: Ours(c) for name, c in quarter.items()},
    }
    for run in runs.values():
        interval(run)  # warm-up, compilation
    speeds = {name: [] for name in runs}
    order = list(runs)
    for i in range(rounds):
        random.Random(i).shuffle(order)
        for name in order:
            speeds[name].append(interval(runs[name]))
    model = runs["AdamW"].model
    c = runs["AdamW"].c
    count = sum(p.numel() for p in model.parameters())
    print(f"{count:,} parameters, {c.batch_size} x {c.context} tokens a step, K = {c.interval}")
    print(f"{'':40}{'tokens/s':>10}{'of AdamW':>10}{'quartiles':>16}{'TFLOP/s':>10}")
    rows = {}
    for name, values in speeds.items():
        base = speeds[cut if name in quarter else "AdamW"]
        ratios = [a / b for a, b in zip(values, base, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rate = statistics.median(values)
        tflops = rate * train_gpt.flops_per_token(c, model) / 1e12
        rows[name] = {"tokens_per_second": rate, "of_adamw": middle, "quartiles": [low, high]}
        rows[name] |= {
            "tflops": tflops,
            "parameters": sum(p.numel() for p in runs[name].model.parameters()),
        }
        print(f"{name:40}{rate:10,.0f}{middle:10.3f}{low:9.3f}-{high:.3f}{tflops:10.4g}")
    return {"rounds": rounds, "parameters": count, "rows": rows}


# ----------------------------------------------------------------------------------- the counts
class Counter(TorchDispatchMode):
    """Counts operations that are no views, and the bytes of what they read and write."""

    def __init__(self):
        super().__init__()
        self.kernels = 0
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not (
            func.is_view or name in ("detach", "_unsafe_view", "empty", "empty_like", "lift_fresh")
        ):
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
            self.kernels += 1
            self.bytes += sum(x.numel() * x.element_size() for x in tensors)
        return out


class Keys(list):
    """Keys of sequences for the script before, which reads them as numbers."""

    def split(self, size):
        return [Keys(self[i : i + size]) for i in range(0, len(self), size)]

    def __int__(self):
        return self[0]


def script_of(commit):
    """train_gpt.py, with its ire.py, of a commit, as a module."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("ire.py", "train_gpt.py"):
            git = ["git", "-C", str(ROOT), "show", f"{commit}:{name}"]
            Path(folder, name).write_bytes(
                subprocess.run(git, capture_output=True, check=True).stdout
            )
        here = sys.modules.pop("ire")
        sys.path.insert(0, folder)
        try:
            spec = importlib.util.spec_from_file_location(
                "train_gpt_before", f"{folder}/train_gpt.py"
            )
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(folder)
            sys.modules["ire"] = here
    return module


def count(script, preset):
    """{"probe": (kernels, gigabytes), "step": ...} of forward and backward at full size."""
    typed = {"preset": preset, "device": "cpu", "dtype": "bfloat16", "compile": False}
    c = script.complete(script.Config(**typed))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    result = {}
    with contextlib.ExitStack() as stack:  # what fake tensors can't do, none of it a kernel
        stack.enter_context(mock.patch.object(nn.Module, "to", lambda self, *_: self))
        draw = torch.Tensor.exponential_
        stack.enter_context(mock.patch.object(torch.Tensor, "exponential_", lambda x, **_: draw(x)))
        stack.enter_context(FakeTensorMode())
        model = script.make_model(c, 50304)
        if script is train_gpt:
            model.logits = 2**31 - 1  # as on CUDA
        x = torch.zeros(c.micro_batch, c.context, dtype=torch.int64)
        keys = Keys(range(c.micro_batch)) if script is not train_gpt else x[:, 0]
        parts = c.batch_size // c.micro_batch
        for name, micro in (("probe", (x, None, keys)), ("step", (x, x))):
            with Counter() as counter:
                script.backward(model, [micro] * parts, c, scaler)
            model.zero_grad()
            result[name] = (counter.kernels, counter.bytes / 1e9)
    return result


def count_rows():
    before = script_of(BEFORE)
    rows = {}
    print(f"{'':18}{'kernels before':>16}{'after':>10}{'GB before':>12}{'after':>10}")
    for preset in ("60m", "119m", "229m"):
        old, new = count(before, preset), count(train_gpt, preset)
        for name in ("probe", "step"):
            rows[f"{preset}, {name}"] = {
                "kernels": [old[name][0], new[name][0]],
                "gigabytes": [round(old[name][1], 1), round(new[name][1], 1)],
            }
            (k, gb), (k2, gb2) = old[name], new[name]
            print(f"{preset + ', ' + name:18}{k:16,}{k2:10,}{gb:12,.0f}{gb2:10,.0f}")
    return {"before": BEFORE, "rows": rows}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--count", action="store_true", help="kernels and traffic, no times")
    parser.add_argument("--file", type=Path, help="default results/train-DEVICE.json")
    args, rest = parser.parse_known_args()
    typed = train_gpt.parse(rest)
    device = train_gpt.complete(train_gpt.Config(**typed)).device
    path = args.file or ROOT / "results" / f"train-{device}.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    command = " ".join(["python", "benchmarks/train.py", *sys.argv[1:]])
    if args.count:
        report["counts"] = {"command": command} | count_rows()
    else:
        about = {"command": command, "environment": environment(device)}
        report |= about | time_rows(typed, args.rounds)
    write_report(report, path)


if __name__ == "__main__":
    main()
