"""train_cifar.py as a user runs it: tiny models on a few digits, most of them in this process."""

import argparse
import contextlib
import dataclasses
import hashlib
import http.server
import io
import itertools
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call
from torch.optim.optimizer import register_optimizer_step_post_hook

import train_cifar
from ire import SAM

SCRIPT = Path(train_cifar.__file__).resolve()
OPTIMIZERS = ("sgd", "adamw", "sam", "sgd-ire", "admire", "sam-ire")
TINY = (
    "--data digits --model tiny --limit-train 70 --limit-test 20 --epochs 3 --batch-size 16 "
    "--interval 3 --ire-epoch 1 --lr 0.005 --log-interval 2 "
)  # 12 steps, 4 an epoch
RUN = Path("runs/cifar")
train_cifar.MODELS.update(
    {
        "tiny": lambda classes: train_cifar.resnet(8, classes),
        "vit_tiny": lambda classes: train_cifar.ViT(16, 2, classes, depth=2, patch=8),
    }
)


# ------------------------------------------------------------------------------- helpers
@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        train_cifar, "URL", "http://127.0.0.1:9/"
    )  # nothing is fetched from elsewhere
    float32_by_default(monkeypatch)
    return tmp_path


def float32_by_default(monkeypatch):
    """As on a CPU without AMX."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)


def cifar(flags="", tiny=TINY):
    """Runs the command line here: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = train_cifar.main(shlex.split(tiny + flags))
        except SystemExit as e:
            code = e.code
    return code or 0, out.getvalue(), err.getvalue()


def trained(flags="", tiny=TINY):
    code, out, err = cifar(flags, tiny)
    assert (code, err) == (0, "")
    return out


def tree():
    return {p: p.read_bytes() if p.is_file() else None for p in Path().rglob("*")}


def refused(flags, *says, tiny=TINY):
    """Exit code 2, one line that says all of this, and no file was touched."""
    before = tree()
    code, _, err = cifar(flags, tiny)
    assert code == 2 and err.count("\n") == 1 and err.endswith("\n") and "Traceback" not in err, err
    for part in says:
        assert re.search(part, err), (part, err)
    assert tree() == before


def checkpoint(folder=RUN):
    """What must not depend on where a run was stopped."""
    saved = torch.load(Path(folder) / "checkpoint.pt", weights_only=True)
    return {k: v for k, v in saved.items() if k not in ("config", "seconds", "best_acc")}


def same(a, b):
    """Equal to the bit, tensors with their dtypes."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a.dtype == b.dtype and torch.equal(a, b) if torch.is_tensor(a) else a == b


def accuracies(folder=RUN):
    return [
        (r["step"], r["test_acc"], r["test_loss"], r["best_acc"]) for r in log(folder, "test_acc")
    ]


def log(folder=RUN, key=None):
    lines = map(json.loads, (Path(folder) / "log.jsonl").read_text().splitlines())
    return [
        {k: v for k, v in r.items() if k not in ("seconds", "images_per_second")}
        for r in lines
        if key is None or key in r
    ]


@contextlib.contextmanager
def in_step(number, act):
    """Calls act(optimizer) inside that step of the base optimizer, counted from 1."""
    count = itertools.count(1)
    handle = register_optimizer_step_post_hook(
        lambda opt, *_: (
            act(opt)
            if type(opt) in (torch.optim.SGD, torch.optim.AdamW) and next(count) == number
            else None
        )
    )
    try:
        yield
    finally:
        handle.remove()


def stopped(flags, step, number=signal.SIGINT):
    with in_step(step, lambda _: signal.raise_signal(number)):
        code, _, err = cifar(flags)
    assert (code, err.count("\n")) == (128 + number, 1) and "--resume" in err
    assert checkpoint()["step"] == step


def data(flags=""):
    return train_cifar.Data(train_cifar.complete(train_cifar.parse(shlex.split(TINY + flags))))


# -------------------------------------------------------------------------------- models
@pytest.mark.parametrize(
    "name, count",
    {
        "resnet56": 855_770,
        "wrn28_10": 36_479_194,
        "wrn16_8": 10_961_370,
        "vit_t": 5_362_762,
        "vit_s": 21_342_346,
    }.items(),
)
def test_parameter_counts(name, count):
    """The published 0.86M, 36.5M, 11.0M, 5.4M and 21.3M."""
    with torch.device("meta"):
        model = train_cifar.MODELS[name](10)
        assert sum(p.numel() for p in model.parameters()) == count
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 10)
        assert train_cifar.MODELS[name](100)(torch.empty(2, 3, 32, 32)).shape == (2, 100)


def test_initialisation():
    model = train_cifar.resnet(20, 10)
    for m in model.modules():
        if isinstance(m, nn.Conv2d) and m.weight.numel() > 2000:
            fan_in = m.weight[0].numel()
            assert m.weight.std().item() == pytest.approx(
                (2 / fan_in) ** 0.5, rel=0.1
            )  # He et al. 2015
    for name, p in train_cifar.ViT(64, 2, 10, depth=2).named_parameters():
        if p.dim() > 1 and p.numel() > 1000:
            assert p.std().item() == pytest.approx(0.02, rel=0.1), name
        elif name.endswith("bias"):
            assert not p.any(), name


# ------------------------------------------------------------------------------ training
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_epoch_falls(optimizer):
    trained(
        f"--optimizer {optimizer} --limit-train 480 --epochs 1 --ire-epoch 0 "
        f"--lr {0.003 if 'ad' in optimizer else 0.05} "
        f"--log-interval 1"
    )
    losses = [r["train_loss"] for r in log(key="train_loss")]
    assert len(losses) == 30 and sum(losses[-8:]) < 0.9 * sum(losses[:8]), losses
    flat = [r["flat"] for r in log(key="flat")]
    assert ("ire" in optimizer) == bool(flat) and all(0.89 < share < 0.95 for share in flat)


@pytest.mark.parametrize(
    "flags",
    (
        "--optimizer sgd",
        "--optimizer sgd-ire --probe fresh --no-decay-norms --augment basic",
        "--optimizer sam-ire --base adamw --kappa-decay --warmup 1",
        "--optimizer sam --adaptive",
        "--optimizer sam --average",
    ),
)
def test_training_is_this_loop(flags):
    trained(flags)
    c = train_cifar.Config(
        **json.loads(
            (RUN / "config.json").read_text(),
            object_hook=lambda d: {
                k: v
                for k, v in d.items()
                if k in {f.name for f in dataclasses.fields(train_cifar.Config)}
            },
        )
    )
    torch.manual_seed(c.seed)
    model, pictures = (
        train_cifar.MODELS["tiny"](10).to(memory_format=torch.channels_last),
        train_cifar.Data(c),
    )
    norms = {id(p) for p in model.parameters() if p.dim() == 1}
    groups = [
        {
            "params": [p for p in model.parameters() if (id(p) in norms) == b],
            "weight_decay": 0.0 if b and not c.decay_norms else c.weight_decay,
        }
        for b in (False, True)
    ]
    base = (
        torch.optim.AdamW(groups, c.lr, fused=True)
        if c.base == "adamw"
        else torch.optim.SGD(groups, c.lr, momentum=0.9)
    )
    opt = (
        SAM(base, rho=c.rho, adaptive=c.adaptive, average=c.average)
        if "sam" in c.optimizer
        else base
    )
    opt = (
        train_cifar.IRE(opt, kappa=c.kappa, gamma=c.gamma, interval=3, warmup=4)
        if "ire" in c.optimizer
        else opt
    )

    def buffers():
        return [b.clone() for b in model.buffers()]

    for step in range(12):
        warmup = 4 * c.warmup
        lr = c.lr * (
            (step + 1) / 4
            if step < warmup
            else 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (12 - warmup))
        )
        for group in opt.param_groups:
            group["lr"] = lr
            if c.kappa_decay:
                group["kappa"] = c.kappa * lr / c.lr
        x, y = pictures.batch(step)
        if "ire" in c.optimizer and step in (4, 7, 10):
            before = buffers()
            with opt.probe():
                logits = model(x if c.probe == "fresh" else pictures.normalized(pictures.x[:16]))
                train_cifar.sampled_cross_entropy(logits).backward()
            for b, old in zip(model.buffers(), before):
                b.copy_(old)
        saved = []

        def closure():
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y, label_smoothing=0.1)
            loss.backward()
            saved.append(buffers())
            return loss

        opt.step(closure)
        for b, first in zip(model.buffers(), saved[0]):  # SAM's second pass left no trace
            b.copy_(first)
    for name, w in checkpoint()["model"].items():
        torch.testing.assert_close(w, model.state_dict()[name], rtol=1e-4, atol=1e-5, msg=name)


def test_kappa_0_is_sgd_to_the_bit():
    trained("--optimizer sgd --out sgd")
    trained("--optimizer sgd-ire --kappa 0 --out ire")
    trained("--optimizer sgd-ire --kappa 1 --out moved")
    assert same(checkpoint("sgd")["model"], checkpoint("ire")["model"])
    assert not same(checkpoint("sgd")["model"], checkpoint("moved")["model"])


def test_it_learns():
    out = trained("--optimizer sgd --limit-train 480 --limit-test 100 --epochs 4 --lr 0.05")
    accuracy = log(key="test_acc")[-1]["test_acc"]
    assert accuracy > 60 and f"{accuracy:.2f}%" in out.splitlines()[-2]


@pytest.mark.parametrize(
    "flags", ("--dtype bfloat16", "--deterministic", "--augment cutout", "--augment none --tta")
)
def test_other_settings_run(flags):
    trained(flags)
    assert log(key="train_loss")[-1]["train_loss"] < log(key="train_loss")[0]["train_loss"] + 0.2
    train_cifar.torch.use_deterministic_algorithms(False)


def test_outputs():
    out = trained()
    config = json.loads((RUN / "config.json").read_text())
    assert (
        config["torch"] == torch.__version__
        and config["device"] in ("cpu", "cuda", "mps")
        and None not in {v for k, v in config.items() if k not in ("compile",)}
    )
    lines = [json.loads(line) for line in (RUN / "log.jsonl").read_text().splitlines()]
    assert all({"step", "seconds"} <= set(r) for r in lines)
    assert all({"lr", "images_per_second"} <= set(r) for r in lines if "train_loss" in r)
    assert [r["step"] for r in lines if "test_acc" in r] == [4, 8, 12]
    assert [r["step"] for r in lines if "flat" in r] == [6, 8, 10, 12]
    assert {p.name for p in RUN.iterdir()} == {
        "checkpoint.pt",
        "config.json",
        "log.jsonl",
        "loss.png",
    }
    assert (RUN / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for part in ("parameters", "digits: 70 training and 20 test", "sgd-ire", "loss.png"):
        assert part in out


@pytest.mark.slow
def test_seeds_print_mean_and_error():
    out = trained("--seeds 3 --seed 5 --overwrite")
    runs = [log(RUN / f"seed-{seed}", "test_acc")[-1]["test_acc"] for seed in (5, 6, 7)]
    mean, error = np.mean(runs), np.std(runs, ddof=1) / 3**0.5
    line = next(line for line in out.splitlines() if line.startswith("test_acc"))
    assert f"{mean:.4g} +- {error:.2g}" in line and "3 seeds" in line
    assert [
        json.loads((RUN / f"seed-{seed}/config.json").read_text())["seed"] for seed in (5, 6, 7)
    ] == [5, 6, 7]
    (RUN / "seed-7").rename("again")
    assert (
        next(
            line
            for line in trained("--seeds 3 --resume", tiny="").splitlines()
            if line.startswith("test_acc")
        )
        == line
    )
    assert same(checkpoint(RUN / "seed-7"), checkpoint("again"))


# -------------------------------------------------------------------------------- resume
@pytest.mark.parametrize(
    "flags, step",
    (
        ("--optimizer sgd-ire --augment cutout", 6),
        ("--optimizer sam-ire --probe fresh", 5),
        ("--optimizer admire --curvature second_moment --kappa-decay", 7),
        ("--optimizer adamw --model vit_tiny --augment mixup", 4),
        ("--optimizer sam", 1),
        ("--optimizer sam-ire --average", 6),
        ("--optimizer sgd --dtype bfloat16 --augment basic", 9),
    ),
)
def test_resume_ends_with_the_same_bits(flags, step):
    trained(flags + " --out whole")
    stopped(flags, step)
    trained(flags + " --resume")
    whole = checkpoint("whole")
    assert same(checkpoint(), whole) and accuracies() == accuracies("whole")
    masks = [s["flat"] for s in whole["optimizer"]["state"].values() if "flat" in s]
    assert ("ire" in flags) == bool(masks) and all(mask.dtype == torch.bool for mask in masks)


def test_resume_needs_no_setting_and_may_change_the_report():
    trained("--out whole")
    stopped("", 7)
    trained("--resume --log-interval 1 --eval-interval 2 --tta", tiny="")
    assert same(checkpoint(), checkpoint("whole"))
    lines = len(log())
    trained("--resume", tiny="")  # finished: tested anew
    assert (
        same(checkpoint(), checkpoint("whole"))
        and len(log()) == lines + 1
        and accuracies()[-1] == accuracies()[-2]
    )


@pytest.mark.parametrize("size", (800, 920))
def test_full_disk_while_it_writes_a_checkpoint(size, small_disk):
    small_disk(
        size
    )  # for one checkpoint of 650 KB, not for two; torch.save then ends with an error of its own
    code, _, err = cifar()
    assert code == 1 and err.count("\n") == 1 and "No space left" in err, err
    assert re.search("runs/cifar/checkpoint.pt.*last good checkpoint: step 4", err), err
    assert checkpoint()["step"] == 4 and not list(RUN.glob(".*"))


@pytest.mark.slow
def test_sigterm_to_a_real_process():
    flags = (
        "--data digits --limit-train 9 --limit-test 9 --epochs 200 --batch-size 2 --log-interval 10"
    )
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *shlex.split(flags)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 60
    while not ((RUN / "log.jsonl").exists() and b'"step": 20' in (RUN / "log.jsonl").read_bytes()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.count("\n")) == (143, 1) and "--resume" in err
    assert 20 <= checkpoint()["step"] < 800


@pytest.mark.slow
def test_a_second_run_in_the_folder_is_told_who_runs_there():
    """The first run waits in its 9th step, after two checkpoints, for a file."""
    code = (
        "import pathlib, sys, time; sys.path.insert(0, {!r}); import train_cifar\n"
        "step = train_cifar.train_step\n"
        "def waiting(run):\n"
        "    while run.step == 8 and not pathlib.Path('go').exists():\n"
        "        pathlib.Path('waits').touch()\n"
        "        time.sleep(0.01)\n"
        "    return step(run)\n"
        "train_cifar.train_step = waiting\n"
        "train_cifar.MODELS['tiny'] = lambda classes: train_cifar.resnet(8, classes)\n"
        "sys.exit(train_cifar.main(sys.argv[1:]))"
    ).format(str(SCRIPT.parent))
    process = subprocess.Popen([sys.executable, "-c", code, *shlex.split(TINY)])
    deadline = time.monotonic() + 60
    while not Path("waits").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    for flags in ("", "--overwrite", "--resume"):
        says = f"process {process.pid}" if flags else "--resume to go on"
        refused(flags, "--out.*runs/cifar", says)
    Path("go").touch()
    assert process.wait(60) == 0 and checkpoint()["step"] == 12


@pytest.mark.parametrize(
    "flag",
    (
        "--lr 0.1",
        "--epochs 4",
        "--optimizer sam",
        "--model vit_tiny",
        "--seed 1",
        "--batch-size 8",
        "--kappa 3",
        "--augment none",
        "--limit-train 60",
        "--ire-epoch 2",
        "--weight-decay 0",
    ),
)
def test_changes_are_refused_by_name(flag, finished):
    refused(f"--resume {flag}", flag.split()[0], "on --resume", tiny="")


@pytest.fixture(scope="module")
def _finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as m:
        m.chdir(folder)
        float32_by_default(m)
        trained()
    return folder


@pytest.fixture
def finished(_finished, here):
    """A copy of a finished run in runs/cifar."""
    shutil.copytree(_finished, here, dirs_exist_ok=True)


def test_a_folder_with_a_run(finished):
    refused("", "--out.*runs/cifar.*--resume.*--overwrite")
    refused("--resume --overwrite", "--resume")
    trained("--overwrite --epochs 2")
    assert checkpoint()["step"] == 8


def test_resume_of_other_pictures(finished, monkeypatch):
    pictures = train_cifar.load_digits()
    changed = ((255 - pictures[0][0], pictures[0][1]), *pictures[1:])
    monkeypatch.setattr(train_cifar, "load_digits", lambda: changed)
    refused("--resume", "--data.*runs/cifar")


@pytest.mark.parametrize("content", (b"", b"PK\x03\x04 half", None))
def test_broken_checkpoint(content):
    RUN.mkdir(parents=True)
    if content is not None:
        (RUN / "checkpoint.pt").write_bytes(content)
    refused("--resume", "checkpoint.pt")


def poison(opt):
    with torch.no_grad():
        opt.param_groups[0]["params"][0].fill_(math.nan)


@pytest.mark.parametrize(
    "step, says", ((1, "last checkpoint: none"), (6, "last checkpoint: step 4"))
)
def test_a_loss_that_is_not_finite_stops_the_run(step, says):
    with in_step(step, poison):
        code, _, err = cifar("--optimizer sgd")
    assert code == 1 and err.count("\n") == 1
    assert re.search(rf"step {step + 1}\b.*nan.*{says}.*--lr.*--kappa", err), err


# ---------------------------------------------------------------------- errors: settings
@pytest.mark.parametrize(
    "flags, says",
    (
        ("--no-such-flag 1", "--no-such-flag.*--help"),
        ("--epochs many", "--epochs.*int.*many"),
        ("--epoch 3", "--epoch"),
        ("--model resnet18", "--model.*resnet18.*resnet56.*vit_s"),
        ("--optimizer lion", "--optimizer.*lion.*sgd-ire"),
        ("--data mnist", "--data.*mnist.*cifar10.*digits"),
        ("--device tpu", "--device.*tpu.*cpu"),
        ("--dtype int8", "--dtype"),
        *(
            (f"--{name} 0", f"--{name}.*0.*1 or more")
            for name in ("epochs", "batch-size", "interval", "seeds", "limit-train")
        ),
        ("--gamma 1", "--gamma.*below 1"),
        ("--kappa -1", "--kappa.*0 or more"),
        ("--rho nan", "--rho.*nan"),
        ("--lr inf", "--lr.*inf"),
        ("--label-smoothing 1", "--label-smoothing"),
        ("--warmup 3", "--warmup.*3.*0 to --epochs - 1, 2"),
        ("--seed -1", "--seed"),
        ("--ire-epoch 3", "--ire-epoch.*3.*2"),
        ("--optimizer sgd-ire --ire-warmup 999", "--ire-warmup.*999.*0 to the last step"),
        ("--optimizer sgd --base adamw", "--base.*adamw.*--optimizer sgd"),
        ("--curvature second_moment", "--curvature.*fisher.*sgd"),
        ("--dtype float16", "--dtype.*float16.*CPU"),
        ("--batch-size 71", "--batch-size.*71.*70"),
        ("--holdout 1437", "--holdout.*1437"),
        ("--sharpness-probes 1", "--sharpness-probes"),
    ),
)
def test_wrong_settings(flags, says):
    refused(flags, says)


def test_help_shows_every_default(monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    code, text, err = cifar("--help", tiny="")
    assert (code, err) == (0, "")
    cases = (train_cifar.SUITED | train_cifar.PRESETS).values()
    for name, default in train_cifar.DEFAULTS.items():
        line = re.search(rf"^  --{name.replace('_', '-')}[ ,].*(\n    .*)*", text, re.M).group()
        shown = line.rpartition("(default ")[2].split(")")[0]
        values = [default] if default is not None else []
        values += [row[name] for row in cases if name in row]
        assert shown and all(str(value) in shown for value in values), line


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    refused("", "pip install scikit-learn")


# ---------------------------------------------------------------------------------- data
def batch(n, classes, seed, key):
    rng = np.random.default_rng(seed)
    return {
        b"data": rng.integers(0, 256, (n, 3072), dtype=np.uint8),
        key: [i % classes for i in range(n)],
    }


def unpacked(name="cifar10", n=20):
    archive = train_cifar.CIFAR[name]
    folder = Path("data") / archive.folder
    folder.mkdir(parents=True)
    for i, file in enumerate(archive.files):
        content = batch(n, archive.classes, i, archive.labels)
        (folder / file).write_bytes(pickle.dumps(content, protocol=2))
    return folder


def official(monkeypatch, name="cifar10"):
    """An archive of the official layout; its bytes. The script takes it for the official one."""
    folder, archive = unpacked(name), train_cifar.CIFAR[name]
    with tarfile.open("made.tar.gz", "w:gz") as tar:
        tar.add(folder, folder.name)
    content = Path("made.tar.gz").read_bytes()
    shutil.rmtree(folder)
    made = dataclasses.replace(archive, sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(train_cifar.CIFAR, name, made)
    return content


def load(name="cifar10"):
    return train_cifar.load_cifar(train_cifar.complete(train_cifar.Config(data=name)))


@pytest.mark.parametrize("name, classes", (("cifar10", 10), ("cifar100", 100)))
def test_folder_and_archive_hold_the_same(name, classes, monkeypatch):
    content = official(monkeypatch, name)
    (Path("data") / train_cifar.CIFAR[name].name).write_bytes(content)
    packed = load(name)
    folder = unpacked(name)
    files = train_cifar.CIFAR[name].files
    assert packed[2] == classes
    for a, b in zip(itertools.chain(*packed[:2]), itertools.chain(*load(name)[:2])):
        assert np.array_equal(a, b)
    (x, y), (test_x, _), _ = packed
    assert (
        x.shape == (20 * (len(files) - 1), 32, 32, 3) and x.dtype == np.uint8 and len(test_x) == 20
    )
    raw = pickle.loads((folder / files[0]).read_bytes())[b"data"][3]
    assert np.array_equal(x[3], raw.reshape(3, 32, 32).transpose(1, 2, 0)) and y[3] == 3


COUNTS = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # of the ten digits


def test_class_counts():
    (_, y), (_, test_y), classes = train_cifar.load_digits()
    assert classes == 10 and len(y) + len(test_y) == 1797
    assert np.bincount(np.concatenate((y, test_y))).tolist() == COUNTS
    assert len(test_y) == 360 and np.bincount(test_y).min() > 25
    pictures = data("--limit-train 1437")
    x = pictures.normalized(pictures.x)
    assert x.mean((0, 2, 3)).abs().max() < 1e-4 and (x.std((0, 2, 3)) - 1).abs().max() < 1e-3


@pytest.mark.parametrize(
    "damage, says",
    (
        ("missing", "3.*unpacked whole"),
        ("cut", "3"),
        ("empty", "3"),
        ("shape", "3.*3072"),
        ("labels", "3.*0 to 9"),
        ("float", "3.*whole labels"),
    ),
)
def test_wrong_folder(damage, says):
    path = unpacked() / "data_batch_3"
    good = batch(20, 10, 3, b"labels")
    bad = {
        "cut": path.read_bytes()[:1000],
        "empty": b"",
        "float": pickle.dumps(good | {b"labels": [1.5] * 20}, protocol=2),
        "labels": pickle.dumps(good | {b"labels": [10] * 20}, protocol=2),
        "shape": pickle.dumps(good | {b"data": good[b"data"][:, :100]}, protocol=2),
    }
    path.unlink() if damage == "missing" else path.write_bytes(bad[damage])
    refused("--data cifar10", f"--data-dir.*data_batch_{says}")


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


@pytest.mark.parametrize(
    "value",
    (Evil(), {b"data": Evil()}, np.array([Evil()], dtype=object)),
    ids=("bare", "in", "array"),
)
def test_a_pickle_that_runs_code_is_refused(value):
    (unpacked() / "data_batch_2").write_bytes(pickle.dumps(value, protocol=2))
    refused("--data cifar10", "--data-dir.*data_batch_2.*system.*arrays")
    assert not Path("evil").exists()


def test_corrupt_archive(monkeypatch):
    content = official(monkeypatch)
    (Path("data") / "cifar-10-python.tar.gz").write_bytes(content[:-100])
    refused("--data cifar10", "--data-dir.*cifar-10-python.tar.gz.*checksum")


@contextlib.contextmanager
def server(content, drops, ranges=True):
    """Serves content, breaking the first `drops` connections half-way; the Range headers it saw."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.headers["Range"])
            start = int(seen[-1].removeprefix("bytes=").rstrip("-")) if seen[-1] and ranges else 0
            if start >= len(content):
                return self.send_error(416)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            rest = content[start:]
            self.wfile.write(rest[: len(rest) // 2] if len(seen) <= drops else rest)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}/", seen
        httpd.shutdown()


@pytest.mark.parametrize("ranges", (True, False))
def test_interrupted_download_goes_on(monkeypatch, ranges):
    content = official(monkeypatch)
    with server(content, 2, ranges) as (url, seen):
        monkeypatch.setattr(train_cifar, "URL", url)
        load()
        load()  # there now
    assert len(seen) == 3 and seen[0] == "bytes=0-" and "bytes=0-" not in seen[1:]
    assert [p.name for p in Path("data").iterdir()] == ["cifar-10-python.tar.gz"]


def test_download_goes_on_in_a_later_run(monkeypatch):
    content = official(monkeypatch)
    with server(content, 5) as (url, seen):
        monkeypatch.setattr(train_cifar, "URL", url)
        code, _, err = cifar("--data cifar10")
        assert (
            code == 2
            and err.count("\n") == 1
            and "run again" in err
            and not Path("data/cifar-10-python.tar.gz").exists()
        )
        load()
    assert len(seen) == 6 and int(seen[-1][6:-1]) > 0.9 * len(content)


def test_two_downloads_at_once(monkeypatch):
    content = official(monkeypatch)
    with server(content, 1) as (url, seen):
        monkeypatch.setattr(train_cifar, "URL", url)
        threads = [threading.Thread(target=load) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(seen) == 2 and seen[0] == "bytes=0-" != seen[1]  # as one alone
    assert [p.name for p in Path("data").iterdir()] == ["cifar-10-python.tar.gz"]


def test_download_of_something_else(monkeypatch):
    official(monkeypatch)
    with server(b"not the archive", 0) as (url, _):
        monkeypatch.setattr(train_cifar, "URL", url)
        code, _, err = cifar("--data cifar10")
    assert code == 2 and err.count("\n") == 1 and not Path("data/cifar-10-python.tar.gz").exists()


def test_no_network():
    code, _, err = cifar("--data cifar10")
    assert (
        code == 2 and err.count("\n") == 1 and re.search("--data-dir.*cifar-10-python.tar.gz", err)
    )


# -------------------------------------------------------------------------- augmentation
@pytest.mark.parametrize("kind", ("none", "shift", "basic", "cutout", "mixup"))
def test_a_batch_is_a_function_of_seed_and_step(kind):
    a, b, other = (
        data(f"--augment {kind}"),
        data(f"--augment {kind}"),
        data(f"--augment {kind} --seed 1"),
    )
    batches = [a.batch(step) for step in range(9)]
    assert all(map(torch.equal, batches[6], b.batch(6))) and not torch.equal(
        batches[6][0], other.batch(6)[0]
    )
    assert not torch.equal(batches[6][0], batches[5][0]) and all(
        x.shape == (16, 3, 32, 32) for x, _ in batches
    )
    if kind == "none":  # an epoch shows each picture at most once
        shown = torch.cat([x for x, _ in batches[:4]]).flatten(1)
        assert len(shown.unique(dim=0)) == 64


def test_each_picture_is_augmented_by_itself():
    x = torch.randint(256, (8, 32, 32, 3), dtype=torch.uint8)
    u = torch.rand(8, 4)
    floats = x.permute(0, 3, 1, 2) / 255
    for name, result in (
        ("shift", lambda s: train_cifar.shift_and_flip(x[s], u[s], True)),
        ("cutout", lambda s: train_cifar.cutout(floats[s], u[s], 16)),
    ):
        whole = result(slice(None))
        for i in range(8):
            torch.testing.assert_close(whole[i : i + 1], result(slice(i, i + 1)), msg=name)
        assert not any(
            torch.equal(whole[i], (x if name == "shift" else floats)[i]) for i in range(8)
        ), name


def test_shift_and_flip_by_hand():
    x = torch.randint(1, 256, (3, 32, 32, 3), dtype=torch.uint8)
    u = torch.tensor([[4.5 / 9, 4.5 / 9, 0.9], [0.0, 4.5 / 9, 0.9], [8.5 / 9, 4.5 / 9, 0.1]])
    moved = train_cifar.shift_and_flip(x, u, True)
    assert torch.equal(moved[0], x[0])
    assert torch.equal(moved[1, 4:], x[1, :-4]) and not moved[1, :4].any()
    assert torch.equal(moved[2, :-4].flip(1), x[2, 4:]) and not moved[2, -4:].any()
    holes = (train_cifar.cutout(torch.ones(50, 3, 32, 32), torch.rand(50, 2), 16) == 0).sum(
        (1, 2, 3)
    )
    assert holes.max() == 3 * 256 and holes.min() >= 3 * 64


# ----------------------------------------------------------------------------- sharpness
@pytest.mark.parametrize(
    "norm, hessian",
    ((nn.Identity, torch.func.hessian), (nn.BatchNorm1d, torch.autograd.functional.hessian)),
)
def test_sharpness_against_the_exact_hessian(norm, hessian):
    """Of a batch norm in training torch.func's Hessian is wrong (not even symmetric; torch 2.13),
    torch.autograd's is right."""
    model = nn.Sequential(nn.Linear(4, 6), norm(6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(2, 32, 4, dtype=torch.float64), torch.randint(3, (2, 32))
    params = dict(model.named_parameters())
    losses = [lambda i=i: F.cross_entropy(model(x[i]), y[i], label_smoothing=0.1) for i in (0, 1)]

    def whole(theta):
        parts = dict(zip(params, theta.split([p.numel() for p in params.values()])))
        parts = {k: v.view_as(params[k]) for k, v in parts.items()}
        return (
            sum(
                F.cross_entropy(functional_call(model, parts, (x[i],)), y[i], label_smoothing=0.1)
                for i in (0, 1)
            )
            / 2
        )

    with train_cifar.frozen_batch_norm(model):
        theta = torch.cat([p.detach().flatten() for p in params.values()])
        H = hessian(whole)(theta) if norm is nn.Identity else hessian(whole, theta)
        values = torch.linalg.eigvalsh(H)
        for tolerance in (0.1, 1e-8):
            largest, residual = train_cifar.largest_eigenvalue(
                losses, list(params.values()), tolerance
            )
            assert (
                residual <= tolerance * largest
                and (values - largest).abs().min() <= residual + 1e-9
            )
        assert largest == pytest.approx(values[-1].item(), rel=1e-6)
        trace, error = train_cifar.hessian_trace(losses, list(params.values()), 400)
        assert abs(trace - H.trace().item()) < 4 * error
        spread = (2 * (H**2).sum() - 2 * (H.diagonal() ** 2).sum()).item() ** 0.5  # of one v H v
        assert error == pytest.approx(spread / 400**0.5, rel=0.2) and error < 0.2 * trace


@pytest.mark.parametrize("model", ("tiny", "vit_tiny"))
def test_sharpness_of_a_run(model):
    flags = f"--model {model} --sharpness --sharpness-images 16 --sharpness-probes 2 --epochs 2 "
    flags += "--augment basic"
    out = trained(flags)
    last = log()[-1]
    assert last["trace_error"] > 0 and last["sharpness_images"] == 16
    assert last["lambda_max_error"] <= 0.01 * abs(last["lambda_max"])
    assert (
        f"trace {last['trace']:.4g}  trace_error {last['trace_error']:.4g}  "
        f"lambda_max {last['lambda_max']:.4g}" in out
    )
    trained(
        flags.replace(" --sharpness ", " ") + " --out without"
    )  # it changes nothing, neither weights nor statistics
    assert same(checkpoint(), checkpoint("without"))


# --------------------------------------------------------------------------------- ranks
@pytest.mark.slow
def test_two_ranks():
    """The same batches, so the same weights within float error. The labels of the probe are each
    rank's own: kappa is 0."""
    flags = (
        "--data digits --model vit_t --limit-train 9 --limit-test 9 --epochs 2 --batch-size 4 "
        "--optimizer sam-ire --dtype float32 "
        "--base sgd --lr 0.01 --kappa 0 --ire-epoch 1 --augment basic "
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        SCRIPT,
    ]
    done = subprocess.run(
        [*command, *shlex.split(flags + "--out two")],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test_acc") == 2 and "2 x cpu" in done.stdout and log("two", "flat")
    trained(flags + "--out one", tiny="")
    one, two = checkpoint("one"), checkpoint("two")
    for name, w in one["model"].items():
        torch.testing.assert_close(two["model"][name], w, rtol=1e-3, atol=1e-5, msg=name)
    for a, b in zip(log("one"), log("two"), strict=True):
        assert a == pytest.approx(b, rel=1e-2)


# -------------------------------------------------------------------------------- second edition
def settings(**typed):
    return train_cifar.complete(train_cifar.Config(**typed))


@pytest.mark.parametrize(
    "capability, dtype, compiles",
    (((6, 1), "float16", False), ((7, 5), "float16", True), ((8, 0), "bfloat16", True)),
)
def test_dtype_and_compile_by_capability(capability, dtype, compiles, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(train_cifar, "compiler_error", lambda device: "")
    for optimizer in OPTIMIZERS:
        c = settings(optimizer=optimizer)
        sam_without_scaler = optimizer.startswith("sam") and dtype == "float16"
        assert (c.device, c.compile) == ("cuda", compiles)
        assert c.dtype == ("float32" if sam_without_scaler else dtype)
        assert (c.sharpness_images, c.sharpness_probes, c.sharpness_products) == (1024, 16, 60)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_bfloat16_on_a_cpu_with_amx(optimizer, monkeypatch):
    for amx, dtype in ((True, "bfloat16"), (False, "float32")):
        capabilities = {"amx_bf16": amx, "avx512_bf16": True}
        monkeypatch.setattr(torch.cpu, "get_capabilities", capabilities.copy, raising=False)
        assert settings(optimizer=optimizer, device="cpu").dtype == dtype
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as an older torch
    assert settings(optimizer=optimizer, device="cpu").dtype == "float32"


def test_no_compiler(monkeypatch, capsys):
    monkeypatch.setattr(train_cifar, "compiler_error", lambda device: "no C++ compiler")
    refused("--compile", "--compile.*no C.. compiler")
    monkeypatch.setattr(train_cifar, "abilities", lambda device: ("float32", True))
    assert not settings().compile
    assert capsys.readouterr().err.count("no C++ compiler") == 1


def test_presets_and_what_suits():
    c = settings(preset="quick")
    assert (c.model, c.epochs, c.ire_epoch, c.batch_size, c.lr) == ("resnet8", 8, 4, 64, 0.1)
    assert settings(preset="quick", model="vit_t").optimizer == "admire"
    vit, digits = settings(model="vit_t", epochs=30), settings(data="digits", model="vit_t")
    assert (vit.augment, vit.lr, vit.base, vit.warmup) == ("mixup", 1e-3, "adamw", 3)
    assert (digits.augment, digits.lr, digits.epochs) == ("shift", 1e-3, 10)


@pytest.mark.parametrize(
    "flags, says",
    (
        ("--optimizer sgd --adaptive", "--adaptive"),
        ("--average", "--average"),
        ("--optimizer sam --average --adaptive", "--average.*--adaptive"),
        ("--batch-size 1000000000000", "--batch-size.*2.20"),
        ("--lr 1e308", "--lr.*1e9"),
        ("--epochs " + "9" * 400, "--epochs"),
        ("--seeds 2 --resume --out nowhere", "--out.*nowhere.*seed-0"),
    ),
)
def test_more_wrong_settings(flags, says):
    refused(flags, says)


def test_constant_rate_and_best_accuracy():
    trained("--schedule constant --warmup 1")
    assert {r["lr"] for r in log(key="lr") if r["step"] >= 4} == {0.005}
    tests = log(key="test_acc")
    for i, r in enumerate(tests, 1):
        assert r["best_acc"] == max(t["test_acc"] for t in tests[:i])


def test_checkpoints_are_not_of_every_epoch():
    trained("--checkpoint-interval 2 --out some")
    assert checkpoint("some")["step"] == 12 and settings(epochs=200).checkpoint_interval == 10
    with in_step(11, poison):
        _, _, err = cifar("--checkpoint-interval 2")
    assert "last checkpoint: step 8" in err


@pytest.mark.parametrize(
    "error", (torch.OutOfMemoryError("CUDA"), RuntimeError("can't allocate memory"), MemoryError())
)
def test_out_of_memory(error, monkeypatch):
    def fail(run):
        raise error

    monkeypatch.setattr(train_cifar, "train_step", fail)
    code, _, err = cifar()
    assert code == 1 and err.count("\n") == 1 and "out of memory: lower --batch-size" in err


@pytest.mark.parametrize("content", (b'{"step": 4}\nno json\n\xff\n{"st', None))
def test_a_broken_log_does_not_stop_a_resume(content):
    stopped("", 7)
    (RUN / "log.jsonl").unlink()
    if content:
        (RUN / "log.jsonl").write_bytes(content)
    trained("--resume --device auto", tiny="")
    assert [r["step"] for r in log()] == [4, 8, 10, 12][0 if content else 1 :]


def test_signals_outside_of_steps(monkeypatch):
    trace = train_cifar.hessian_trace

    def interrupted(*args):
        signal.raise_signal(signal.SIGTERM)
        return trace(*args)

    monkeypatch.setattr(train_cifar, "hessian_trace", interrupted)
    code, _, err = cifar("--sharpness --sharpness-images 16")
    assert (code, err.count("\n")) == (143, 1) and "--resume --sharpness" in err
    monkeypatch.setattr(train_cifar, "load_digits", lambda: signal.raise_signal(signal.SIGINT))
    code, _, err = cifar("--out other")
    assert (code, err) == (130, "train_cifar.py: stopped\n")


def test_messages(monkeypatch, tmp_path):
    trained("--seeds 2 --epochs 2")
    refused("--resume", "runs/cifar is of --seeds: add --seeds 2.*seed-0", tiny="")
    code, _, err = cifar("--resume --out runs/cifar/seed-0 --lr nan", tiny="")
    assert code == 2
    path = RUN / "seed-0/checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    saved["model"].popitem()
    torch.save(saved, path)
    refused("--resume --out runs/cifar/seed-0", "--resume: model.*does not fit", tiny="")
    torch.save({"model": Evil()}, path)
    refused("--resume --out runs/cifar/seed-0", "no file of tensors", tiny="")
    _, _, err = cifar("--resume --out runs/cifar/seed-0", tiny="")
    assert "weights_only" not in err and not Path("evil").exists()
    monkeypatch.setattr(train_cifar, "RANK", 1)
    _, _, err = cifar("--resume --out nowhere", tiny="")
    assert err.startswith("train_cifar.py: rank 1: --resume: nowhere/checkpoint.pt")
    copy = shutil.copy(SCRIPT, tmp_path)
    done = subprocess.run([sys.executable, "-I", copy], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "ire.py" in done.stderr


@pytest.mark.parametrize("products", (1, 2, 4))
def test_lanczos_keeps_to_its_products(products):
    A = torch.randn(12, 12, dtype=torch.float64)
    H, x, ticks = A + A.T, torch.zeros(12, dtype=torch.float64, requires_grad=True), []
    largest, residual = train_cifar.largest_eigenvalue(
        [lambda: x @ H @ x / 2], [x], 1e-9, products, tick=lambda: ticks.append(1)
    )
    assert len(ticks) == products
    assert (torch.linalg.eigvalsh(H) - largest).abs().min() <= residual < 100


def test_sharpness_is_of_true_float32(monkeypatch):
    seen = []

    def look(*args):
        precision = torch.get_float32_matmul_precision()
        seen.append((precision, torch.backends.cudnn.allow_tf32))
        return 0.0, 0.0

    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    monkeypatch.setattr(train_cifar, "hessian_trace", look)
    c = settings(data="digits", model="tiny", limit_train=70, sharpness_images=16, batch_size=16)
    pictures = train_cifar.Data(c)
    train_cifar.sharpness(train_cifar.make_model(c, 10), pictures, c)
    assert seen == [("highest", False)]
    assert before == (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)


# ------------------------------------------------------------------------------- benchmarks
@pytest.mark.slow
@pytest.mark.parametrize("kappa", (0.0, 4.0))
def test_a_cell_of_the_heat_map_is_a_run_of_its_own(kappa, here, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent / "benchmarks")
    import cifar as bench

    small = dict(data="digits", model="tiny", limit_train=70, limit_test=20, epochs=3)
    small |= dict(batch_size=16, interval=3, warmup=1, device="cpu")
    monkeypatch.setitem(bench.STUDIES, "map", {"settings": small})
    args = argparse.Namespace(what="map", scratch=here, data_dir=here)
    own = {"lr": 0.02, "schedule": "constant", "kappa": kappa, "gamma": 0.5}
    found = bench.cell(args, own, 1)
    c = train_cifar.Config(**small, **own, optimizer="sam-ire", seed=1, out="alone")
    alone = train_cifar.train(c)
    assert {key: alone[key] for key in ("test_acc", "train_loss")}.items() <= found.items()
    assert found["trace_error"] > 0
    folder = bench.config(args, "sam-ire", own, 1).out
    assert same(checkpoint(folder), checkpoint("alone"))
