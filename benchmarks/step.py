r"""Time, memory, launches and waits of IRE's step and of a mask refresh, beside AdamW's step.

    python benchmarks/step.py                        # 1M, 10M, 60M; writes results/step-cpu.json
    python benchmarks/step.py --device cuda --sizes 60 119 229
    python benchmarks/step.py --sizes --count 60 119 229    # what a GPU would have to launch
    MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=17179869184 \
        python benchmarks/step.py --out results/step-cpu-kept.json

The last is for Linux: malloc keeps freed memory, as CUDA's allocator does. By default it hands
large buffers back to the kernel, and each step that copies the weights pays for fresh pages.

Every time is the median of interleaved repetitions: each repetition times every row once. Compared
with
  - the textbook way (as in the authors' code): three float32 copies of the model (curvature, mask,
    last step) that stay between steps, the model concatenated and torch.kthvalue for the threshold;
  - the bound by memory traffic: bytes that must move, over the bandwidth of a copy measured in the
    same run. A fused AdamW step moves 28 bytes a parameter, IRE's addition at least 21 (copy 4 + 4,
    then read 4 + 4 + 1, write 4), a refresh 13 (two reads of the gradient, one more for the mask
    of 1).
Launches and waits are counted as torch dispatches them, on the path that ire.py takes on a GPU.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import ire
import train_gpt
from ire import IRE, AdmIRE

SETTINGS = dict(kappa=2, gamma=0.6, interval=10)

# Millions of parameters: width, layers, feed-forward, vocabulary of a Llama. The last three are the
# presets of train_gpt.py.
SIZES = {
    1: (128, 5, 336, 256),
    10: (320, 8, 848, 256),
    60: (384, 16, 1024, 50304),
    119: (768, 6, 2048, 50304),
    229: (768, 16, 3072, 50304),
}


def llama_shapes(millions):
    width, layers, ffn, vocab = SIZES[millions]
    block = [(width, width)] * 4 + [(ffn, width)] * 2 + [(width, ffn)] + [(width,)] * 2
    return [(vocab, width)] + block * layers + [(width,), (vocab, width)]


def make_params(shapes, device):
    """Parameters and gradients; rows of the embedding that no batch uses have a gradient of 0."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(0.02 * torch.randn(s, device=device)) for s in shapes]
    for p in params:
        p.grad = 1e-3 * torch.randn_like(p) * torch.rand_like(p) ** 3
    params[0].grad[: len(params[0]) // 2] = 0
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
        k = int(SETTINGS["gamma"] * len(everything))
        threshold = torch.kthvalue(everything, k).values
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
    params = opt.param_groups[0]["params"]
    grads = [p.grad for p in params]
    with opt.probe():
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad


def no_probe_due(opt):
    for group in opt.param_groups:
        group["ire_step"] = 1


# ------------------------------------------------------------------------------------ launches
class Counter(TorchDispatchMode):
    """Counts operations that make a result, as launches, and those that the host must wait for."""

    WAITS = {"_local_scalar_dense": 1, "nonzero": 1, "bincount": 2, "equal": 1}

    def __init__(self):
        super().__init__()
        self.launches = 0
        self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.waits += self.WAITS.get(name, 0)
        if name == "index":  # by a mask, whose length must be known
            self.waits += any(x is not None and x.dtype == torch.bool for x in args[1])
        if not func.is_view and name not in (
            "_local_scalar_dense",
            "detach",
            "empty_like",
            "empty",
        ):
            self.launches += 1
        return func(*args, **(kwargs or {}))


def count(run):
    """(launches, waits) of run() on the path of a GPU: pieces of its size, no torch.bincount."""
    with (
        mock.patch.object(torch.Tensor, "is_cuda", True),
        mock.patch.object(ire, "_BATCH", {}),
        Counter() as counter,
    ):
        run()
    return counter.launches, counter.waits


def count_launches(millions):
    params = make_params(llama_shapes(millions), "cpu")
    opt = IRE(torch.optim.SGD(params, 1e-3, foreach=True), **SETTINGS)
    refresh(opt)
    no_probe_due(opt)
    base = count(opt.base.step)
    step = count(opt.step)
    masks = count(lambda: refresh(opt))
    return {
        "tensors": len(params),
        "step_launches": step[0] - base[0],
        "step_waits": step[1] - base[1],
        "refresh_launches": masks[0],
        "refresh_waits": masks[1],
    }


# ------------------------------------------------------------------------------------ time, memory
def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(run, device):
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def resident(key):
    """A row of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) << 10
    return 0


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


def bandwidth(device):
    """Bytes a second of a large copy, read and write counted."""
    a = torch.ones(1 << 26, device=device)
    b = torch.ones(1 << 26, device=device)
    times = [seconds(lambda: a.copy_(b), device) for _ in range(8)]
    return 2 * 4 * a.numel() / statistics.median(times[1:])


def interleaved(rows, optimizers, device, repetitions):
    """{row: its times in seconds}; the first repetition warms up."""
    times = {name: [] for name in rows}
    for repetition in range(repetitions + 1):
        for name, run in rows.items():
            elapsed = seconds(run, device)
            if repetition > 0:
                times[name].append(elapsed)
            for opt in optimizers:
                no_probe_due(opt)
    return times


def measure(millions, device, repetitions):
    shapes = llama_shapes(millions)
    fused = torch.optim.AdamW(make_params(shapes, device), 1e-3, fused=True)
    foreach = torch.optim.AdamW(make_params(shapes, device), 1e-3, foreach=True)
    admire = AdmIRE(make_params(shapes, device), 1e-3, **SETTINGS)
    plain = IRE(torch.optim.AdamW(make_params(shapes, device), 1e-3, foreach=True), **SETTINGS)
    textbook = Textbook(make_params(shapes, device))
    rows = {
        "AdamW fused, step": fused.step,
        "AdamW foreach, step": foreach.step,
        "AdmIRE (fused), step": admire.step,
        "IRE over AdamW foreach, step": plain.step,
        "textbook, step": textbook.step,
        "IRE, refresh": lambda: refresh(admire),
        "textbook, refresh": textbook.refresh,
    }
    refresh(admire)
    refresh(plain)
    textbook.refresh()
    times = interleaved(rows, [admire, plain], device, repetitions)
    n = sum(torch.Size(s).numel() for s in shapes)
    result = {"parameters": n, "tensors": len(shapes), "bandwidth_gb_s": bandwidth(device) / 1e9}
    result["rows"] = summarize(rows, times, result, device)
    kept = sum(mask.nbytes for mask in admire.masks.values()) / n
    result["kept_bytes_per_parameter"] = {"IRE": kept, "textbook": 12}
    return result


def summarize(rows, times, result, device):
    medians = {name: statistics.median(times[name]) for name in rows}
    bytes_moved = {"AdamW fused, step": 28, "AdmIRE (fused), step": 49, "IRE, refresh": 13}
    n = result["parameters"]
    rate = result["bandwidth_gb_s"] * 1e9
    summary = {}
    for name, run in rows.items():
        low, _, high = statistics.quantiles(times[name], n=4)
        bound = bytes_moved[name] * n / rate * 1e3 if name in bytes_moved else None
        summary[name] = {
            "ms": medians[name] * 1e3,
            "quartiles_ms": [low * 1e3, high * 1e3],
            "over_fused_adamw": medians[name] / medians["AdamW fused, step"],
            "over_foreach_adamw": medians[name] / medians["AdamW foreach, step"],
            "bound_ms": bound,
            "extra_bytes_per_parameter": extra_memory(run, device) / n,
        }
    return summary


# ------------------------------------------------------------------------------------ report
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


def print_times(result):
    print(
        f"\n{result['parameters']:,} parameters in {result['tensors']} tensors, "
        f"{result['bandwidth_gb_s']:.0f} GB/s copy\n"
        f"{'':30}{'ms':>9}{'x fused':>9}{'x foreach':>11}{'bound ms':>10}{'extra B/param':>15}"
    )
    for name, row in result["rows"].items():
        bound = f"{row['bound_ms']:.2f}" if row["bound_ms"] else ""
        print(
            f"{name:30}{row['ms']:9.2f}{row['over_fused_adamw']:9.2f}"
            f"{row['over_foreach_adamw']:11.2f}{bound:>10}{row['extra_bytes_per_parameter']:15.1f}"
        )
    kept = result["kept_bytes_per_parameter"]
    print(f"kept, bytes a parameter: IRE {kept['IRE']:.1f}, textbook {kept['textbook']:.1f}")


def print_launches(launches):
    names = ["tensors", "step_launches", "step_waits", "refresh_launches", "refresh_waits"]
    print("\n" + f"{'beyond the base':18}" + "".join(f"{name:>18}" for name in names))
    for size, row in launches.items():
        print(f"{size:18}" + "".join(f"{row[name]:18}" for name in names))


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    sizes = dict(type=int, nargs="*", choices=list(SIZES))
    parser.add_argument("--sizes", default=[1, 10, 60], help="millions to time", **sizes)
    parser.add_argument("--count", default=[60, 119, 229], help="millions to count", **sizes)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--out", type=Path, help="default results/step-DEVICE.json")
    args = parser.parse_args()
    malloc = [f"{name}={x}" for name, x in os.environ.items() if name.startswith("MALLOC_")]
    report = {
        "command": " ".join([*malloc, "python", "benchmarks/step.py", *sys.argv[1:]]),
        "environment": environment(args.device),
        "repetitions": args.repetitions,
        "sizes": {},
        "launches": {},
    }
    for millions in args.sizes:
        result = measure(millions, args.device, args.repetitions)
        report["sizes"][f"{millions}M"] = result
        print_times(result)
    for millions in args.count:
        report["launches"][f"{millions}M"] = count_launches(millions)
    print_launches(report["launches"])
    write_report(report, args.out or ROOT / "results" / f"step-{args.device}.json")


if __name__ == "__main__":
    main()
