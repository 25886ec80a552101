"""Tokens a second of train_gpt.py with AdamW and AdmIRE, and of a plain loop over transformers' LlamaForCausalLM of the same
size with torch's AdamW: whole training steps, interleaved in one process.

    python benchmarks/train.py                                  # the tiny run; writes results/train-cpu.json
    python benchmarks/train.py --device cuda --preset 229m --data FOLDER --file results/train-229m.json

Each round gives every variant one interval of K = 10 steps in turn (one probe among them), in an order drawn anew; the
ratio to AdamW is taken round by round, its median and quartiles are printed. Other settings go to train_gpt.py.
"""
import argparse
import contextlib
import random
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import train_gpt
from step import environment, synchronize, write_report

# With four micro-batches a quarter of the batch feeds the probe; AdamW has the same four.
VARIANTS = {"AdamW": dict(optimizer="adamw"),
            "AdmIRE, full probe": dict(optimizer="admire"),
            "AdmIRE, second_moment": dict(optimizer="admire", curvature="second_moment"),
            "AdamW, 4 micro-batches": dict(optimizer="adamw", parts=4),
            "AdmIRE, 4 micro-batches, probe on one": dict(optimizer="admire", parts=4, probe_batches=1)}


def settings(typed, parts=1, **own):
    """Settings of one variant that never ends, has its warm-up behind it and cuts a micro-batch into `parts`."""
    endless = {**typed, **own, "steps": 10**6, "warmup": 100, "ire_warmup": 0}
    c = train_gpt.complete(train_gpt.Config(**{**endless, "probe_batches": None}))
    return train_gpt.complete(train_gpt.Config(**{**endless, "micro_batch": c.micro_batch // parts}))


class Ours:
    """train_gpt.py's own step."""

    def __init__(self, c):
        self.c, self.data, self.step = c, train_gpt.Data(c), 0
        torch.manual_seed(c.seed)
        self.model = train_gpt.make_model(c, self.data.vocab)
        self.optimizer = train_gpt.make_optimizer(self.model, c)
        self.scaler = torch.amp.GradScaler(c.device, enabled=c.dtype == "float16")

    def train_step(self):
        train_gpt.train_step(self.model, self.optimizer, self.data.batch(self.step), self.step, self.c, self.scaler)
        self.step += 1


class Plain:
    """What one would write with transformers: the same shapes, batches, precision, clip and schedule."""

    def __init__(self, c):
        from transformers import LlamaConfig, LlamaForCausalLM
        self.c, self.data, self.step = c, train_gpt.Data(c), 0
        torch.manual_seed(c.seed)
        self.model = LlamaForCausalLM(LlamaConfig(
            vocab_size=self.data.vocab, hidden_size=c.width, intermediate_size=c.ffn, num_hidden_layers=c.layers,
            num_attention_heads=c.heads, max_position_embeddings=c.context, use_cache=False))
        self.model.to(c.device)
        if c.compile:
            self.model.compile()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps,
                                           weight_decay=c.weight_decay, fused=True)
        self.autocast = (torch.autocast(c.device, getattr(torch, c.dtype)) if c.dtype != "float32" else contextlib.nullcontext())

    def train_step(self):
        batch = self.data.batch(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = train_gpt.learning_rate(self.c, self.step)
        for x, y, _ in batch:
            with self.autocast:
                logits = self.model(input_ids=x).logits
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), y.flatten()) / len(batch)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.c.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1


def interval(run):
    """Tokens a second over K steps."""
    c = run.c
    synchronize(c.device)
    start = time.perf_counter()
    for _ in range(c.interval):
        run.train_step()
    synchronize(c.device)
    return c.interval * c.batch_size * c.context / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--file", type=Path, help="default results/train-DEVICE.json")
    args, rest = parser.parse_known_args()
    typed = train_gpt.parse(rest)
    runs = {"plain transformers loop, AdamW": Plain(settings(typed, optimizer="adamw")),
            **{name: Ours(settings(typed, **own)) for name, own in VARIANTS.items()}}
    for run in runs.values():
        interval(run)  # warm-up, compilation
    speeds, order = {name: [] for name in runs}, list(runs)
    for _ in range(args.rounds):
        random.Random(len(speeds["AdamW"])).shuffle(order)
        for name in order:
            speeds[name].append(interval(runs[name]))
    c, model = runs["AdamW"].c, runs["AdamW"].model
    report = {"command": " ".join(["python", "benchmarks/train.py", *sys.argv[1:]]), "environment": environment(c.device),
              "rounds": args.rounds, "parameters": sum(p.numel() for p in model.parameters()), "rows": {}}
    print(f"{report['parameters']:,} parameters, {c.batch_size} x {c.context} tokens a step, K = {c.interval}\n"
          f"{'':40}{'tokens/s':>10}{'of AdamW':>10}{'quartiles':>16}{'MFU':>8}")
    for name, values in speeds.items():
        base = speeds["AdamW, 4 micro-batches" if "micro" in name else "AdamW"]
        ratios, rate = [a / b for a, b in zip(values, base)], statistics.median(values)
        low, middle, high = statistics.quantiles(ratios, n=4)
        mfu = train_gpt.utilisation(c, model, rate)
        report["rows"][name] = {"tokens_per_second": rate, "of_adamw": middle, "quartiles": [low, high], "mfu": mfu}
        print(f"{name:40}{rate:10,.0f}{middle:10.3f}{low:9.3f}-{high:.3f}" + (f"{mfu:8.1%}" if mfu else ""))
    write_report(report, args.file or ROOT / "results" / f"train-{c.device}.json")


if __name__ == "__main__":
    main()
