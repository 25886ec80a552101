"""Times, in turn."""

import json
import os
import platform
import random
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train_gpt


# ------------------------------------------------------------------------------- what all share
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
    """The median of the ratios round by round, and [lower, upper] quartile."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(times, base, strict=True)], n=4)
    return middle, [low, high]


def processor():
    if os.path.exists("/proc/cpuinfo"):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor()


def environment(device):
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **train_gpt.environment(),
    }


def write_report(report, path):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(report, indent=1))
    print(f"\nwritten to {path}")
