"""train_cifar.py on a few digits. What all scripts do is tested in test_common.py."""

import hashlib
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from scripts import Script, checkpoint, in_step, poison, same, torchrun

import common
import train_cifar
from ire import IRE, SAM, sampled_cross_entropy

CIFAR = Script(train_cifar)
# 4 steps an epoch, 12 in all
TINY = (
    "--data digits --limit-train 70 --limit-test 20 --epochs 3 --batch-size 16 --lr 0.005 "
    "--log-interval 2 --out run "
)
ON = "--interval 3 --ire-epoch 1 "
RUN = Path("run")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_cifar, "URL", "http://127.0.0.1:9/")  # nothing is fetched
    return tmp_path


@pytest.fixture
def small_vit(monkeypatch):
    def vit(classes):
        return train_cifar.ViT(16, 2, classes, depth=2, patch=8)

    monkeypatch.setitem(train_cifar.MODELS, "vit_t", vit)


def log(key, folder=RUN):
    return common.curve(common.read_log(folder), key)


def settings(**typed):
    return train_cifar.configure(typed)


def data(flags=""):
    typed = common.parse(train_cifar.Config, "", shlex.split(TINY + flags))
    return train_cifar.Data(settings(**typed, device="cpu"))


# ------------------------------------------------------------------------------- networks
COUNTS = {"resnet56": 855_770, "wrn28_10": 36_479_194, "wrn16_8": 10_961_370}
COUNTS |= {"vit_t": 5_362_762, "vit_s": 21_342_346}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    """The published 0.86M, 36.5M, 11.0M, 5.4M and 21.3M."""
    with torch.device("meta"):
        model = train_cifar.MODELS[name](10)
        assert sum(p.numel() for p in model.parameters()) == COUNTS[name]
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 10)
        assert train_cifar.MODELS[name](100)(torch.empty(2, 3, 32, 32)).shape == (2, 100)


def test_initialisation():
    for m in train_cifar.resnet(20, 10).modules():
        if isinstance(m, nn.Conv2d) and m.weight.numel() > 2000:
            he = (2 / m.weight[0].numel()) ** 0.5  # He et al. 2015
            assert m.weight.std().item() == pytest.approx(he, rel=0.1)
    for name, p in train_cifar.ViT(64, 2, 10, depth=2).named_parameters():
        if p.dim() > 1 and p.numel() > 1000:
            assert p.std().item() == pytest.approx(0.02, rel=0.1), name
        elif name.endswith("bias"):
            assert not p.any(), name


# ------------------------------------------------------------------------------- training
def optimizer_by_hand(model, c):
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": c.weight_decay},
        {"params": norms, "weight_decay": c.weight_decay if c.decay_norms else 0.0},
    ]
    if c.base == "adamw":
        opt = torch.optim.AdamW(groups, c.lr, fused=True)
    else:
        opt = torch.optim.SGD(groups, c.lr, momentum=0.9)
    if "sam" in c.optimizer:
        opt = SAM(opt, rho=c.rho, adaptive=c.adaptive, average=c.average)
    if "ire" in c.optimizer:
        opt = IRE(opt, kappa=c.kappa, gamma=c.gamma, interval=3, warmup=4, curvature="fisher")
    return opt


@pytest.mark.parametrize(
    "flags",
    (
        "--optimizer adamw",
        f"{ON} --optimizer sgd-ire --probe fresh --no-decay-norms --augment basic",
        f"{ON} --optimizer sam-ire --base adamw --kappa-decay --warmup 1",
        "--optimizer sam --adaptive",
        "--optimizer sam --average",
    ),
)
def test_training_is_this_loop(flags):
    CIFAR.done(TINY + flags)
    c = CIFAR.settings(RUN)
    torch.manual_seed(c.seed)
    model = train_cifar.resnet(8, 10).to(memory_format=torch.channels_last)
    pictures = train_cifar.Data(c)
    opt = optimizer_by_hand(model, c)

    def buffers():
        return [b.clone() for b in model.buffers()]

    def put_back(values):
        for b, value in zip(model.buffers(), values, strict=True):
            b.copy_(value)

    for step in range(12):
        warmup = 4 * c.warmup
        lr = c.lr * (0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (12 - warmup)))
        if step < warmup:
            lr = c.lr * (step + 1) / 4
        for group in opt.param_groups:
            group["lr"] = lr
            if c.kappa_decay:
                group["kappa"] = c.kappa * lr / c.lr
        torch.manual_seed(hash((c.seed, step, 0)))
        x, y = pictures.batch(step)
        if "ire" in c.optimizer and step in (4, 7, 10):
            before = buffers()
            with opt.probe():
                logits = model(x if c.probe == "fresh" else pictures.normalized(pictures.x[:16]))
                sampled_cross_entropy(logits).backward()
            put_back(before)
        saved = []

        def closure():
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y, label_smoothing=0.1)
            loss.backward()
            saved.append(buffers())
            return loss

        opt.step(closure)
        put_back(saved[0])  # SAM's second pass leaves no trace
    for name, w in checkpoint(RUN)["model"].items():
        torch.testing.assert_close(w, model.state_dict()[name], rtol=1e-4, atol=1e-5, msg=name)


def test_it_learns_and_returns_what_it_reached():
    """The seam of the benchmarks. Held-out pictures are the last ones and not trained on."""
    typed = {"data": "digits", "limit_train": 480, "holdout": 957, "optimizer": "sgd"}
    c = settings(**typed, lr=0.05, batch_size=16, epochs=4)
    found = train_cifar.train(c)
    assert found["test_acc"] > 60 and found["val_acc"] > 60 and found["seconds"] > 0
    assert found["train_loss"] == log("train_loss", found["out"])[-1][1] < 1.5
    used = train_cifar.Data(c)
    x = train_cifar.load_digits()[0][0]
    assert np.array_equal(used.x, x[:480]) and np.array_equal(used.tests["val"][0], x[480:])


def test_tta_is_the_mean_over_a_picture_and_its_mirror_image():
    pictures, model = data("--tta --dtype float32"), train_cifar.resnet(8, 10)
    x, y = pictures.tests["test"]
    found = train_cifar.evaluate(pictures.c, pictures, model)
    x = pictures.normalized(x)
    model.eval()
    both = (model(x) + model(x.flip(3))) / 2
    assert found["test_loss"] == pytest.approx(F.cross_entropy(both, y).item(), rel=1e-4)


def test_mixup_by_hand():
    mixed, plain = data("--augment mixup"), data("--augment basic")
    (x, y), (a, b) = mixed.batch(5), plain.batch(5)
    w, b = float(mixed.weights[5 % mixed.steps_per_epoch]), F.one_hot(b, 10).float()
    torch.testing.assert_close(x, w * a + (1 - w) * a.flip(0))
    torch.testing.assert_close(y, w * b + (1 - w) * b.flip(0))


def test_the_folder_and_the_output_of_a_run(monkeypatch):
    drawn = []
    monkeypatch.setattr(common, "draw", lambda *args: drawn.append(args))
    out = CIFAR.done(TINY + ON)
    assert all(len(line) <= 100 for line in out.splitlines())
    for part in ("digits, 70 pictures to train on, 20 for test", "sgd-ire", "on from step 4"):
        assert part in out
    assert [step for step, _ in log("test_acc")] == [4, 8, 12]
    assert [step for step, _ in log("flat")] == [6, 8, 10, 12]
    assert all(0.89 < share < 0.95 for _, share in log("flat"))
    assert log("images_per_second") and len(log("lr")) == 6
    ((path, panels),) = drawn
    assert path == RUN / "loss.png"
    assert any("smoothed" in label for label in panels["loss"])  # why test may lie below
    counts = {len(points) for curves in panels.values() for points in curves.values()}
    assert counts == {0, 3, 4, 6}


def test_seeds_print_mean_and_error():
    """They begin at the seed of --config. After Ctrl-C in its last step no other run begins."""
    Path("c.json").write_text('{"seed": 5}')
    CIFAR.stopped(TINY + "--seeds 2 --config c.json", 12)
    assert not (RUN / "seed-6").exists()
    out = CIFAR.done(TINY + "--seeds 2 --config c.json --resume")
    runs = [log("test_acc", RUN / f"seed-{seed}")[-1][1] for seed in (5, 6)]
    mean, error = np.mean(runs), np.std(runs, ddof=1) / 2**0.5
    line = f"{mean:.4g} +- {error:.2g}, mean and standard error of 2 seeds"
    assert line in out
    (RUN / "seed-6").rename("again")
    assert line in CIFAR.done("--seeds 2 --seed 5 --resume --out run")
    assert same(checkpoint(RUN / "seed-6"), checkpoint("again"))


# ------------------------------------------------------------------------------- resume
@pytest.mark.parametrize(
    "flags, step",
    (
        (f"{ON} --optimizer sgd-ire --augment cutout", 6),
        (f"{ON} --optimizer sam-ire --probe fresh", 5),
        (f"{ON} --optimizer sgd-ire --curvature squares", 8),
        (f"{ON} --optimizer admire --kappa-decay", 7),
        ("--optimizer adamw --model vit_t --augment mixup", 4),
        ("--optimizer sam", 1),
        (f"{ON} --optimizer sam-ire --average", 6),
        ("--optimizer sgd --dtype bfloat16 --augment basic", 9),
    ),
)
def test_resume_ends_with_the_same_bits(flags, step, small_vit):
    CIFAR.done(f"{TINY} {flags} --out whole")
    CIFAR.stopped(TINY + flags, step)
    assert checkpoint(RUN)["step"] == step
    out = CIFAR.done("--resume --out run --log-interval 1 --tta")  # reports may change
    assert f"goes on from step {step}" in out
    whole = checkpoint("whole")
    assert same(checkpoint(RUN), whole)
    masks = [m for state in whole["optimizer"]["state"].values() for m in state.values()]
    masks = [m for m in masks if torch.is_tensor(m) and m.dtype == torch.bool]
    assert ("ire" in flags) == bool(masks)


def test_a_run_at_its_end_may_be_tested_and_measured_again():
    CIFAR.done(TINY)
    tests = log("test_acc")
    CIFAR.done("--resume --out run --sharpness --sharpness-images 16 --sharpness-probes 2")
    assert log("test_acc") == tests + [tests[-1]] and log("trace")[-1][0] == 12


def test_resume_with_other_pictures_or_labels(monkeypatch):
    CIFAR.done(TINY)
    train, test, classes = train_cifar.load_digits()
    monkeypatch.setattr(train_cifar, "load_digits", lambda: (train, test, classes))
    for part in (*train, *test):
        part[-1] ^= 1
        CIFAR.refused("--resume --out run", "--data: got 'digits', .* pictures that run began with")
        part[-1] ^= 1
    CIFAR.done("--resume --out run")


@pytest.mark.parametrize("last, found, saved", ((6, 7, 4), (12, 12, 8)))
def test_a_loss_that_is_not_finite_stops_the_run(last, found, saved):
    """Found by the loss of the next step, or by the last test."""
    with in_step(last, poison):
        code, _, err = CIFAR.run(TINY + "--optimizer sgd")
    assert code == 1 and err.count("\n") == 1 and checkpoint(RUN)["step"] == saved
    text = f"step {found}: .* is nan; last checkpoint: step {saved}; .*--lr.*--kappa"
    assert re.search(text, err), err


# ------------------------------------------------------------------------------- settings
@pytest.mark.parametrize(
    "flags, says",
    (
        ("--warmup 3", "--warmup.*3.*0 to --epochs - 1, 2"),
        ("--ire-epoch 3", "--ire-epoch.*3.*2"),
        ("--ire-warmup 999", "--ire-warmup.*999.*0 to the last step, 11"),
        ("--ire-epoch 1 --ire-warmup 5", "--ire-warmup: got 5.*one of --ire-epoch"),
        ("--optimizer sam --average --adaptive", "--average.*--adaptive"),
        ("--optimizer sam --dtype float16", "--dtype.*float16"),
        ("--batch-size 71", "--batch-size.*71.*70"),
        ("--holdout 1437", "--holdout.*1437"),
        ("--optimizer sgd --kappa 3", "--kappa.*--optimizer sgd does not read"),
        ("--optimizer adamw --momentum 0.5", "--momentum.*adamw does not read"),
        ("--optimizer sgd-ire --rho 0.3", "--rho.*sgd-ire does not read"),
        ("--optimizer sgd --base adamw", "--base.*--optimizer sgd"),
        ("--curvature squares --probe fresh", "--probe.*does not read"),
    ),
)
def test_wrong_settings(flags, says):
    CIFAR.refused(TINY + flags, says)


def test_presets_and_what_suits():
    assert settings(data="digits").model == "resnet8"
    c = settings(preset="quick")
    assert (c.model, c.epochs, c.ire_epoch, c.batch_size, c.lr) == ("resnet8", 8, 4, 64, 0.1)
    assert settings(preset="quick", model="vit_t").optimizer == "admire"
    warmups = [settings(preset="quick", epochs=n).warmup for n in (1, 4, 8, 80)]
    assert warmups == [0, 1, 2, 2] and settings(preset="quick", epochs=4, warmup=3).warmup == 3
    vit, digits = settings(model="vit_t", epochs=30), settings(data="digits", model="vit_t")
    assert (vit.augment, vit.lr, vit.base, vit.warmup) == ("mixup", 1e-3, "adamw", 3)
    assert (digits.augment, digits.lr, digits.epochs) == ("shift", 1e-3, 10)
    assert settings(epochs=200).checkpoint_interval == 10


def test_help_shows_every_default(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    code, text, _ = CIFAR.run("--help")
    assert code == 0
    text = re.sub(r"\n {20,}", " ", text)
    chosen = [settings(**typed) for typed in ({}, {"preset": "quick"}, {"data": "digits"})]
    for f in common.fields(train_cifar.Config):
        shared = f.name in dir(common.Settings)
        if f.default is not None or shared or f.name == "ire_warmup":
            continue
        default = re.search(rf"^  {common.flag(f.name)} .*default (.*)\)", text, re.M).group(1)
        for c in chosen if "of --epochs" not in default else []:
            value = getattr(c, f.name)
            shown = f"{value:g}" if isinstance(value, float) else str(value)
            assert re.search(rf"\b{shown}\b", default) or value is None, (f.name, default)


# ------------------------------------------------------------------------------- data
def batch(n, classes, seed, key):
    rng = np.random.default_rng(seed)
    pictures = rng.integers(0, 256, (n, 3072), dtype=np.uint8)
    return {b"data": pictures, key: [i % classes for i in range(n)]}


def unpacked(name="cifar10", n=20):
    about = train_cifar.CIFAR[name]
    folder = Path("data", about["folder"])
    folder.mkdir(parents=True)
    for i, file in enumerate(about["files"]):
        content = batch(n, about["classes"], i, about["labels"])
        (folder / file).write_bytes(pickle.dumps(content, protocol=2))
    return folder


def pack(folder, archive):
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    shutil.rmtree(folder)


@pytest.mark.parametrize("name, classes", (("cifar10", 10), ("cifar100", 100)))
def test_the_archive_is_fetched_once_checked_and_unpacked(name, classes, monkeypatch):
    folder = unpacked(name)
    about = train_cifar.CIFAR[name]
    first = pickle.loads((folder / about["files"][0]).read_bytes())[b"data"]
    Path("there").mkdir()
    archive = Path("there", about["archive"])
    pack(folder, archive)
    monkeypatch.setattr(train_cifar, "URL", Path("there").resolve().as_uri() + "/")
    with pytest.raises(common.BadInput, match=f"--data-dir: put {about['archive']}.* into data"):
        train_cifar.load_cifar(name, "data")  # not the official archive
    assert not list(Path("data").iterdir())
    made = hashlib.sha256(archive.read_bytes()).hexdigest()
    monkeypatch.setitem(train_cifar.CIFAR, name, about | {"sha256": made})
    (x, y), (test_x, _), found = train_cifar.load_cifar(name, "data")
    assert found == classes and len(x) == 20 * (len(about["files"]) - 1) and len(test_x) == 20
    assert x.dtype == np.uint8 and x.shape[1:] == (32, 32, 3) and y[3] == 3
    assert np.array_equal(x[3], first[3].reshape(3, 32, 32).transpose(1, 2, 0))
    archive.unlink()
    shutil.rmtree("there")
    assert np.array_equal(train_cifar.load_cifar(name, "data")[0][0], x)
    assert {p.name for p in Path("data").iterdir()} == {about["archive"], folder.name}


def test_half_an_archive():
    archive = Path("data", train_cifar.CIFAR["cifar10"]["archive"])
    pack(unpacked(), archive)
    archive.write_bytes(archive.read_bytes()[:10_000])
    CIFAR.refused("--data cifar10", f"--data-dir: put {archive.name}, .* into data .EOFError")


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


GOOD = batch(20, 10, 3, b"labels")
DAMAGE = {
    "cut": (pickle.dumps(GOOD, protocol=2)[:1000], ""),
    "shape": (GOOD | {b"data": GOOD[b"data"][:, :100]}, "3072"),
    "label": (GOOD | {b"labels": [10] * 20}, "0 to 9"),
    "evil": (Evil(), "holds code"),
    "evil array": (np.array([Evil()], dtype=object), "holds code"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_wrong_file_of_pictures(damage):
    path = unpacked() / "data_batch_3"
    content, says = DAMAGE[damage]
    plain = isinstance(content, bytes)
    path.write_bytes(content if plain else pickle.dumps(content, protocol=2))
    CIFAR.refused("--data cifar10", f"--data-dir: got data/.*data_batch_3, allowed is .*{says}")
    assert not Path("evil").exists()


def test_digits():
    (_, y), (_, test_y), classes = train_cifar.load_digits()
    counts = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert classes == 10 and np.bincount(np.concatenate((y, test_y))).tolist() == counts
    assert len(test_y) == 360 and np.bincount(test_y).min() > 25
    pictures = data("--limit-train 1437")
    x = pictures.normalized(pictures.x)
    assert x.mean((0, 2, 3)).abs().max() < 1e-4 and (x.std((0, 2, 3)) - 1).abs().max() < 1e-3


@pytest.mark.parametrize("kind", ("none", "shift", "basic", "cutout", "mixup"))
def test_a_batch_is_a_function_of_seed_and_step(kind):
    a, b = data(f"--augment {kind}"), data(f"--augment {kind}")
    other = data(f"--augment {kind} --seed 1")
    batches = [a.batch(step) for step in range(9)]
    assert all(map(torch.equal, batches[6], b.batch(6)))
    assert not torch.equal(batches[6][0], other.batch(6)[0])
    assert not any(torch.equal(batches[6][0], batches[i][0]) for i in (2, 5))  # 2: an epoch before
    assert all(x.shape == (16, 3, 32, 32) for x, _ in batches)
    if kind == "none":  # an epoch shows each picture at most once
        shown = torch.cat([x for x, _ in batches[:4]]).flatten(1)
        assert len(shown.unique(dim=0)) == 64


def test_shift_and_flip_by_hand():
    x = torch.randint(1, 256, (3, 32, 32, 3), dtype=torch.uint8)
    u = torch.tensor([[4.5 / 9, 4.5 / 9, 0.9], [0.0, 4.5 / 9, 0.9], [8.5 / 9, 4.5 / 9, 0.1]])
    moved = train_cifar.shift_and_flip(x, u, True)
    assert torch.equal(moved[0], x[0])
    assert torch.equal(moved[1, 4:], x[1, :-4]) and not moved[1, :4].any()
    assert torch.equal(moved[2, :-4].flip(1), x[2, 4:]) and not moved[2, -4:].any()
    cut = train_cifar.cutout(torch.ones(50, 3, 32, 32), torch.rand(50, 2), 16)
    holes = (cut == 0).sum((1, 2, 3))
    assert holes.max() == 3 * 256 and holes.min() >= 3 * 64


# ------------------------------------------------------------------------------- sharpness, ranks
@pytest.mark.parametrize("model", ("resnet8", "vit_t"))
def test_sharpness_of_a_run(model, small_vit):
    flags = f"{TINY} --model {model} --epochs 2 --augment basic --optimizer sgd "
    out = CIFAR.done(flags + "--sharpness --sharpness-images 16 --sharpness-probes 2")
    last = common.read_log(RUN)[-1]
    assert last["images"] == 16 and last["trace_error"] > 0
    assert all(len(line) <= 100 for line in out.splitlines())
    assert last["lambda_max_error"] <= 0.01 * abs(last["lambda_max"])
    assert f"trace {last['trace']:.4g}" in out
    CIFAR.done(flags + "--out without")
    assert same(checkpoint(RUN), checkpoint("without"))  # neither weights nor statistics change


def test_a_signal_while_it_measures(monkeypatch):
    def interrupted(*args, tick, **about):
        signal.raise_signal(signal.SIGTERM)
        tick()

    monkeypatch.setattr(train_cifar, "sharpness", interrupted)
    code, _, err = CIFAR.run(TINY + "--sharpness")
    assert (code, err.count("\n")) == (143, 1) and checkpoint(RUN)["step"] == 12


def test_all_ranks_wait_for_the_log_that_the_first_one_writes(monkeypatch):
    calls = []

    def noted(function):
        def call(*args, **named):
            calls.append(function.__name__)
            return function(*args, **named)

        return call

    for owner, name in ((common.Run, "log"), (common, "over_ranks"), (common, "read_log")):
        monkeypatch.setattr(owner, name, noted(getattr(owner, name)))
    CIFAR.done(TINY + "--epochs 1")
    assert calls[-3:] == ["log", "over_ranks", "read_log"]


@pytest.mark.slow
def test_two_ranks():
    """The same batches, so the same weights within float error. The labels of a probe are each
    rank's own, so kappa is 0."""
    flags = (
        "--data digits --model vit_t --limit-train 9 --limit-test 9 --epochs 2 --batch-size 4 "
        "--optimizer sam-ire --base sgd --lr 0.01 --kappa 0 --ire-epoch 1 --augment basic "
    )
    process = CIFAR.start(flags + "--out two", torchrun(2))
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert out.count("test_acc") == 2 and "2 x cpu" in out
    CIFAR.done(flags + "--out one")
    for name, w in checkpoint("one")["model"].items():
        other = checkpoint("two")["model"][name]
        torch.testing.assert_close(other, w, rtol=1e-3, atol=1e-5, msg=name)
    for key in ("train_loss", "test_acc", "test_loss", "flat"):
        pairs = zip(log(key, "one"), log(key, "two"), strict=True)
        assert all(a == pytest.approx(b, rel=1e-2) for a, b in pairs)
