"""Tokens a second of train_gpt.py with AdamW and with AdmIRE, whole training steps, interleaved in one process.

    python benchmarks/train.py                                  # the tiny run; writes results/train-cpu.json
    python benchmarks/train.py --device cuda --width 768 --layers 12 --heads 12 --ffn 2048 --context 512 --batch-size 64

Each round gives every variant one interval of K = 10 steps in turn (one probe among them), in an order drawn anew; the
ratio to AdamW is taken round by round, its median and quartiles are printed. Other settings go to train_gpt.py.
"""
import argparse
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
            "AdamW, 4 micro-batches": dict(optimizer="adamw", micro=4),
            "AdmIRE, 4 micro-batches, probe on one": dict(optimizer="admire", micro=4, probe_batches=1)}


class Run:
    def __init__(self, settings, micro=1, **own):
        self.c = c = train_gpt.complete(train_gpt.Config(**{**settings, **own, "steps": 10**6, "warmup": 100, "ire_warmup": 0}))
        if micro > 1:
            self.c = c = train_gpt.complete(train_gpt.Config(**{**vars(c), "micro_batch": c.batch_size // micro,
                                                                "probe_batches": own.get("probe_batches")}))
        torch.manual_seed(0)
        self.data = train_gpt.Data(c)
        self.model = train_gpt.Llama(c, self.data.vocab).to(c.device)
        self.forward = torch.compile(self.model) if c.compile else self.model
        self.optimizer = train_gpt.make_optimizer(self.model, c)
        self.scaler = torch.amp.GradScaler(c.device, enabled=c.dtype == "float16")
        self.autocast = torch.autocast(c.device, getattr(torch, c.dtype), enabled=c.dtype != "float32")
        self.step = 0

    def interval(self):
        """Tokens a second over K steps."""
        synchronize(self.c.device)
        start = time.perf_counter()
        for self.step in range(self.step, self.step + self.c.interval):
            train_gpt.train_step(self.forward, self.optimizer, self.data.batch(self.step), self.c, self.scaler, self.autocast)
        synchronize(self.c.device)
        self.step += 1
        return self.c.interval * self.c.batch_size * self.c.context / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--file", type=Path, help="default results/train-DEVICE.json")
    args, rest = parser.parse_known_args()
    settings = {k: v for k, v in train_gpt.parse(rest).items() if k in train_gpt.Config.__dataclass_fields__}
    runs = {name: Run(settings, **own) for name, own in VARIANTS.items()}
    for run in runs.values():
        run.interval()  # warm-up, compilation
    speeds, order = {name: [] for name in runs}, list(runs)
    for _ in range(args.rounds):
        random.Random(len(speeds["AdamW"])).shuffle(order)
        for name in order:
            speeds[name].append(runs[name].interval())
    c = runs["AdamW"].c
    report = {"command": " ".join(["python", "benchmarks/train.py", *sys.argv[1:]]), "environment": environment(c.device),
              "rounds": args.rounds, "parameters": sum(p.numel() for p in runs["AdamW"].model.parameters()), "rows": {}}
    print(f"{report['parameters']:,} parameters, {c.batch_size} x {c.context} tokens a step, K = {c.interval}\n"
          f"{'':40}{'tokens/s':>10}{'of AdamW':>10}{'quartiles':>16}")
    for name, values in speeds.items():
        base = speeds["AdamW, 4 micro-batches" if "micro" in name else "AdamW"]
        ratios = [a / b for a, b in zip(values, base)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        report["rows"][name] = {"tokens_per_second": statistics.median(values), "of_adamw": middle, "quartiles": [low, high]}
        print(f"{name:40}{statistics.median(values):10,.0f}{middle:10.3f}{low:9.3f}-{high:.3f}")
    write_report(report, args.file or ROOT / "results" / f"train-{c.device}.json")


if __name__ == "__main__":
    main()
