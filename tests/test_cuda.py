"""What only a GPU can show: masks are the CPU's, no step waits for the device, float16,
deterministic kernels, memory.

    python -m pytest tests/test_cuda.py               # on a GPU that is not hidden; else skipped
    DEVICE=cpu python -m pytest tests/test_cuda.py    # checks the tests themselves
"""

import contextlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import muon

import common
import train_cifar
import train_gpt
from ire import AdmIRE, kth_smallest, sampled_cross_entropy
from speed import Enough, Steps

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
DEVICE = os.environ.get("DEVICE", "cuda")
CPU = DEVICE == "cpu"
ROOT = Path(__file__).parents[1]
TINY = dict(layers=2, width=64, heads=2, ffn=128, context=32, batch_size=8, micro_batch=4)
if not CPU:  # above 3,072 tokens the embedding's backward sorts them
    TINY |= dict(context=128, batch_size=64, micro_batch=32)
if not CPU and not torch.cuda.is_available():
    pytest.skip("no GPU, or a hidden one; DEVICE=cpu checks these tests", allow_module_level=True)

only_cuda = pytest.mark.skipif(CPU, reason="of the GPU alone")
muon_ire, muon_soft = (pytest.param(name, marks=muon) for name in ("muon-ire", "muon-soft"))
eager_and_compiled = pytest.mark.parametrize(
    "compiled", (False, pytest.param(True, marks=only_cuda)), ids=("eager", "compiled")
)


@contextlib.contextmanager
def waits(mode):
    """Waits for the device raise ("error") or warn ("warn")."""
    if not CPU:
        torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        if not CPU:
            torch.cuda.set_sync_debug_mode("default")


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Embedding(5000, 64),
        torch.nn.Flatten(),
        torch.nn.Dropout(0.1),
        torch.nn.Linear(64 * 8, 256),
        torch.nn.GELU(),
        torch.nn.Linear(256, 50),
    )


def tokens():
    return torch.randint(5000, (16, 8), device=DEVICE)


def language_model(tmp_path, **settings):
    """What the loop of train_gpt.py works with."""
    given = TINY | dict(device=DEVICE, compile=False, data_dir=str(tmp_path), warmup=0) | settings
    return train_gpt.set_up(train_gpt.complete(train_gpt.Config(**given)))


def train(job, steps):
    job.c.log_interval = job.c.eval_interval = job.c.checkpoint_interval = 10**6
    with contextlib.suppress(Enough):
        train_gpt.loop(Steps(steps), job)


@pytest.mark.parametrize("n", (1, 70_000, (1 << (18 if CPU else 25)) + 12_345))
def test_the_kth_smallest_is_exact(n):
    x = torch.randn(n, device=DEVICE) ** 5
    x[: n // 3] = 0  # as embedding rows that no batch uses
    ordered = x.abs().sort().values.cpu()
    for k in {1, n // 2 + 1, n}:
        assert kth_smallest([x], k).cpu() == ordered[k - 1]


@pytest.mark.parametrize("fused", (True, False))
def test_masks_are_the_cpus_and_steps_close_to_them(fused):
    models = network(), network().to(DEVICE)
    settings = dict(lr=1e-3, weight_decay=0.1, kappa=2, gamma=0.6, interval=2, fused=fused)
    settings |= {"curvature": "fisher"}
    optimizers = [AdmIRE(model.parameters(), **settings) for model in models]
    for _ in range(6):
        shapes = [p.shape for p in models[0].parameters()]
        curvature = [torch.randn(s) * torch.rand(s) ** 3 for s in shapes]
        for model, opt in zip(models, optimizers):
            if opt.probe_due:
                with opt.probe(model):
                    for p, g in zip(model.parameters(), curvature):
                        p.grad = g.to(p.device)
            for p, g in zip(model.parameters(), curvature):
                p.grad = g.to(p.device) / 2
            opt.step()
        for p, q in zip(*(model.parameters() for model in models)):
            assert torch.equal(optimizers[0].masks[p], optimizers[1].masks[q].cpu())
            torch.testing.assert_close(q.cpu(), p, rtol=1e-5, atol=1e-7)


@eager_and_compiled
@pytest.mark.parametrize("optimizer", ("adamw", "admire", muon_ire, muon_soft))
def test_a_training_step_never_waits(tmp_path, optimizer, compiled):
    job = language_model(tmp_path, optimizer=optimizer, compile=compiled)
    for mode in ("default", "error", "error"):  # the first makes masks
        with waits(mode):
            train(job, 1)
    assert job.step == 3 and all(p.isfinite().all() for p in job.model.parameters())


@eager_and_compiled
@pytest.mark.parametrize("optimizer", ("sgd", "sgd-ire", "admire"))
def test_a_training_step_on_pictures_never_waits(monkeypatch, optimizer, compiled):
    rng = np.random.default_rng(0)
    x = rng.integers(256, size=(64, 32, 32, 3), dtype=np.uint8)
    y = rng.integers(10, size=64)
    monkeypatch.setattr(train_cifar, "load_cifar", lambda *_: ((x, y), (x, y), 10))
    settings = dict(model="resnet8", batch_size=16, epochs=1, device=DEVICE, ire_warmup=0)
    c = train_cifar.Config(optimizer=optimizer, compile=compiled, **settings)
    common.choose_device(c)
    data = train_cifar.Data(c)
    forward, parts = train_cifar.set_up(c, data)
    modes = ("default", "error", "error", "error")  # the first step probes and draws the epoch
    for step, mode in enumerate(modes):
        with waits(mode), contextlib.suppress(Enough):
            train_cifar.loop(Steps(1, c), data, forward, parts, step)
    assert all(p.isfinite().all() for p in parts["model"].parameters())


def test_a_refresh_waits_a_few_times(record_property):
    model = network().to(DEVICE)
    opt = AdmIRE(model.parameters(), lr=1e-3, kappa=2, gamma=0.6, curvature="fisher")
    loss = sampled_cross_entropy(model(tokens()))
    with warnings.catch_warnings(record=True) as caught, waits("warn"):
        warnings.simplefilter("always")
        with opt.probe(model):
            loss.backward()
    count = sum("synchroniz" in str(w.message) for w in caught)
    record_property("waits", count)
    assert count <= 32 and (CPU or count > 0)  # 0 there: the count does not work


def test_a_probe_leaves_the_random_streams_and_can_be_repeated():
    model = network().to(DEVICE)
    opt = AdmIRE(model.parameters(), lr=1e-3, kappa=2, gamma=0.6, curvature="fisher")
    x = tokens()
    masks = []
    for _ in range(2):
        torch.rand(3, device=DEVICE)
        before = streams()
        with opt.probe(model):
            sampled_cross_entropy(model(x)).backward()
        assert all(map(torch.equal, before, streams()))
        masks.append([opt.masks[p].clone() for p in model.parameters()])
    assert all(map(torch.equal, *masks))


def streams():
    return [torch.get_rng_state()] + ([] if CPU else torch.cuda.get_rng_state_all())


def test_float16_skips_a_step_that_overflows_as_adamw_does():
    """On a CPU in bfloat16, scaled all the same."""
    dtype = torch.bfloat16 if CPU else torch.float16
    models = network().to(DEVICE), network().to(DEVICE)
    optimizers = (
        torch.optim.AdamW(models[0].parameters(), 1e-3, fused=True),
        AdmIRE(models[1].parameters(), lr=1e-3, kappa=0, gamma=0.6, warmup=10**6),
    )
    for model, opt in zip(models, optimizers):
        scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10, growth_interval=2)
        torch.manual_seed(1)
        for t in range(8):
            with torch.autocast(DEVICE, dtype):
                loss = model(tokens()).float().square().mean()
            opt.zero_grad()
            scaler.scale(loss * (float("inf") if t == 4 else 1)).backward()
            scaler.step(opt)
            scaler.update()
    assert all(map(torch.equal, *(model.parameters() for model in models)))
    assert optimizers[1].param_groups[0]["ire_step"] == 7


@pytest.mark.parametrize("optimizer", ("admire", muon_ire, muon_soft))
def test_deterministic_kernels_are_all_there_and_repeat(tmp_path, optimizer):
    weights = []
    for _ in range(2):
        job = language_model(tmp_path, optimizer=optimizer, interval=2, deterministic=True)
        train(job, 4)
        torch.use_deterministic_algorithms(False)
        weights.append([p.detach().clone() for p in job.model.parameters()])
    assert all(map(torch.equal, *weights))


TRAIN = """
import json, sys, train_gpt
for typed in json.loads(sys.argv[1]):
    train_gpt.train(train_gpt.configure(typed))
"""


def test_a_run_resumed_with_deterministic_ends_with_the_same_bits(tmp_path):
    """The constant schedule lets a run of 12 steps go on to 24, in a process of its own."""
    settings = TINY | dict(device=DEVICE, data_dir=str(tmp_path), deterministic=True)
    settings |= dict(schedule="constant", warmup=5, eval_sequences=8)
    whole = settings | dict(out=str(tmp_path / "whole"), steps=24)
    cut = settings | dict(out=str(tmp_path / "cut"), steps=12)
    for runs in ([whole, cut], [cut | dict(steps=24, resume=True)]):
        command = [sys.executable, "-c", TRAIN, json.dumps(runs)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    names = (tmp_path / name / "hf/model.safetensors" for name in ("whole", "cut"))
    whole, resumed = (name.read_bytes() for name in names)
    assert whole == resumed


@only_cuda
def test_compiled_training_is_close_to_eager(tmp_path, record_property):
    losses = []
    for compiled in (False, True):
        job = language_model(tmp_path, compile=compiled, dtype="float32")
        train(job, 8)
        losses.append(train_gpt.validation_loss(job.forward, job.data))
    difference = abs(losses[0] - losses[1])
    record_property("largest difference of the loss", difference)
    assert difference < 2e-2  # TF32


@only_cuda
def test_a_refresh_takes_little_memory(record_property):
    p = torch.nn.Parameter(torch.randn(60_000_000, device=DEVICE))
    opt = AdmIRE([p], lr=1e-3, kappa=2, gamma=0.6, curvature="fisher")
    curvature = torch.randn_like(p)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with opt.probe():
        p.grad = curvature
    extra = torch.cuda.max_memory_allocated() - before
    record_property("bytes a parameter", extra / p.numel())
    assert extra < p.numel() + 2**30  # the mask, and a batch of coordinates
