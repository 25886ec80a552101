"""Time and memory of IRE's step and of a mask refresh, beside AdamW's step in the same process.

    python benchmarks/step.py                        # 1M, 10M and 60M parameters; writes results/step-cpu.json
    python benchmarks/step.py --device cuda --sizes 60

Every figure is the median of interleaved repetitions: each repetition times every row once. Compared with
  - the textbook way (as in the authors' code): three float32 copies of the model (curvature, mask, last step) that stay
    between steps, the model concatenated and torch.kthvalue for the threshold;
  - the bound by memory traffic: bytes that must move, over the bandwidth of a copy measured in the same run. A fused AdamW
    step moves 28 bytes a parameter, IRE's addition at least 21 (copy 4 + 4, then read 4 + 4 + 1, write 4), a refresh 13
    (two reads of the gradient, one more for the mask of 1).
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

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train_gpt
from ire import IRE, AdmIRE

SETTINGS = dict(kappa=2, gamma=0.6, interval=10)


def llama_shapes(millions):
    """Shapes of a Llama of about so many million parameters (vocabulary 256, or 50304 from 60M on)."""
    width, layers, vocab = {1: (128, 5, 256), 10: (320, 8, 256), 60: (384, 13, 50304)}[millions]
    ffn = width * 8 // 3 // 16 * 16
    block = [(width, width)] * 4 + [(ffn, width)] * 2 + [(width, ffn)] + [(width,)] * 2
    return [(vocab, width)] + block * layers + [(width,), (vocab, width)]


def make_params(shapes, device):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(0.02 * torch.randn(s, device=device)) for s in shapes]
    for p in params:
        p.grad = 1e-3 * torch.randn_like(p) * torch.rand_like(p) ** 3
    return params


class Textbook:
    """IRE as it is usually written."""

    def __init__(self, params):
        self.params = params
        self.base = torch.optim.AdamW(params, 1e-3, foreach=True)
        self.fisher, self.mask, self.last = (
            [torch.zeros_like(p) for p in params] for _ in range(3)
        )

    @torch.no_grad()
    def refresh(self):
        for h, p in zip(self.fisher, self.params):
            h.copy_(p.grad * p.grad)
        everything = torch.cat([h.flatten() for h in self.fisher])
        threshold = torch.kthvalue(everything, int(SETTINGS["gamma"] * len(everything))).values
        for m, h in zip(self.mask, self.fisher):
            m.copy_(h <= threshold)

    @torch.no_grad()
    def step(self):
        for last, p in zip(self.last, self.params):
            last.copy_(p)
        self.base.step()
        for last, m, p in zip(self.last, self.mask, self.params):
            p.add_(m * (p - last), alpha=SETTINGS["kappa"])


def refresh(opt):
    """A probe whose gradients are there already: what is left is the mask."""
    grads = [p.grad for p in opt.param_groups[0]["params"]]
    with opt.probe():
        for p, grad in zip(opt.param_groups[0]["params"], grads):
            p.grad = grad


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def extra_memory(run, device):
    """The most bytes that run() had beyond what was there before."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text(
        "5"
    )  # Linux: the peak of the resident memory starts anew
    status = lambda key: next(
        int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(key)
    )
    before = status("VmRSS")
    run()
    return max(0, status("VmHWM") - before)


def bandwidth(device):
    """Bytes a second of a large copy, read and write counted."""
    a, b = (torch.ones(1 << 26, device=device) for _ in range(2))
    times = []
    for _ in range(8):
        synchronize(device)
        start = time.perf_counter()
        a.copy_(b)
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * 4 * a.numel() / statistics.median(times[1:])


def measure(millions, device, repetitions):
    shapes = llama_shapes(millions)
    n = sum(torch.Size(s).numel() for s in shapes)
    fused, foreach = (
        torch.optim.AdamW(make_params(shapes, device), 1e-3, **{k: True})
        for k in ("fused", "foreach")
    )
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
    refresh(admire), refresh(plain), textbook.refresh()
    times = {name: [] for name in rows}
    for repetition in range(repetitions + 1):
        for name, run in rows.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if repetition:
                times[name].append(time.perf_counter() - start)
            admire.param_groups[0]["ire_step"] = plain.param_groups[0]["ire_step"] = (
                1  # no probe is due while timing
            )
    rate, base = bandwidth(device), statistics.median(times["AdamW fused, step"])
    bounds = {"AdamW fused, step": 28, "AdmIRE (fused), step": 49, "IRE, refresh": 13}
    result = {"parameters": n, "tensors": len(shapes), "bandwidth_gb_s": rate / 1e9, "rows": {}}
    for name, run in rows.items():
        ms = statistics.median(times[name]) * 1e3
        low, high = statistics.quantiles(times[name], n=4)[::2]
        result["rows"][name] = {
            "ms": ms,
            "quartiles_ms": [low * 1e3, high * 1e3],
            "over_fused_adamw": ms / base / 1e3,
            "over_foreach_adamw": ms / statistics.median(times["AdamW foreach, step"]) / 1e3,
            "bound_ms": bounds[name] * n / rate * 1e3 if name in bounds else None,
            "extra_bytes_per_parameter": extra_memory(run, device) / n,
        }
    bools = [s["flat"] for s in admire.state.values()]
    result["kept_bytes_per_parameter"] = {
        "IRE": sum(b.numel() * b.element_size() for b in bools) / n,
        "textbook": 12,
    }
    return result


def environment(device):
    cpu = (
        next(
            (
                line.split(":")[1].strip()
                for line in open("/proc/cpuinfo")
                if line.startswith("model name")
            ),
            "",
        )
        if os.path.exists("/proc/cpuinfo")
        else platform.processor()
    )
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **train_gpt.environment(),
    }


def write_report(report, path):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(report, indent=1))
    print(f"\nwritten to {path}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=[1, 10, 60],
        choices=(1, 10, 60),
        help="million parameters",
    )
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--out", type=Path, help="default results/step-DEVICE.json")
    args = parser.parse_args()
    report = {
        "command": " ".join(["python", "benchmarks/step.py", *sys.argv[1:]]),
        "environment": environment(args.device),
        "repetitions": args.repetitions,
        "sizes": {},
    }
    for millions in args.sizes:
        result = report["sizes"][f"{millions}M"] = measure(millions, args.device, args.repetitions)
        print(
            f"\n{result['parameters']:,} parameters in {result['tensors']} tensors, {result['bandwidth_gb_s']:.0f} GB/s copy\n"
            f"{'':30}{'ms':>9}{'x fused':>9}{'x foreach':>11}{'bound ms':>10}{'extra B/param':>15}"
        )
        for name, row in result["rows"].items():
            bound = f"{row['bound_ms']:.2f}" if row["bound_ms"] else ""
            print(
                f"{name:30}{row['ms']:9.2f}{row['over_fused_adamw']:9.2f}{row['over_foreach_adamw']:11.2f}{bound:>10}"
                f"{row['extra_bytes_per_parameter']:15.1f}"
            )
        print(
            "kept between steps, bytes a parameter: "
            + ", ".join(f"{k} {v:.1f}" for k, v in result["kept_bytes_per_parameter"].items())
        )
    write_report(report, args.out or ROOT / "results" / f"step-{args.device}.json")


if __name__ == "__main__":
    main()
