"""train_timm.py and chapter 11's loop with the real timm, where it is and torchvision fits torch:
pip install -r requirements-timm.txt pytest, in an environment of its own."""

import contextlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ire import IRE, SAM, sampled_cross_entropy

try:
    import timm
    import torchvision  # noqa: F401
except (ImportError, RuntimeError) as problem:  # RuntimeError: built for another torch
    pytest.skip(f"needs timm and torchvision: {problem}", allow_module_level=True)

from PIL import Image
from timm.data import Mixup
from timm.models import resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver, NativeScaler, random_seed

import train_timm

CHAPTER = Path(__file__).parents[1] / "tutorials/11_your_trainer.ipynb"
KINDS = {
    "vit": "--model test_vit",
    "second moment": "--model test_vit --curvature second_moment",
    "sgd": "--model test_resnet --opt momentum --lr 0.05",
    "sam": "--model test_resnet --opt momentum --lr 0.05 --rho 0.05",
}
MIXED = "--mixup 0.5 --augment rand-n2-m5-p1-inc1 --clip 1.0 --smoothing 0.1"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three classes of one colour each; the last of them has no picture to test on."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for split, images in (("train", 12), ("val", 3)):
        for i, name in enumerate(("blue", "green", "red")[: 3 if split == "train" else 2]):
            (folder / split / name).mkdir(parents=True)
            for image in range(images):
                pixels = random.normal(100, 40, (40, 50, 3)) + 80 * np.eye(3)[2 - i]
                picture = Image.fromarray(pixels.clip(0, 255).astype("uint8"))
                picture.save(folder / split / name / f"{image}.jpg")
    return folder


@pytest.fixture
def fit(photos, tmp_path):
    torch.set_num_threads(1)

    def run(words, out="run", workers=0):
        common = f"--data {photos} --batch 12 --epochs 3 --interval 2 --workers {workers}"
        return train_timm.train(
            train_timm.parse(f"{common} --out {tmp_path / out} {words}".split())
        )

    return run


def same(runs, others):
    """Models and their averages, buffers too."""
    states = zip(runs, others, strict=True)
    return all(
        torch.equal(x, b.state_dict()[name])
        for a, b in states
        for name, x in a.state_dict().items()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_kappa_0_is_the_base_and_a_resumed_run_is_the_whole_one(fit, kind):
    words = f"{KINDS[kind]} {MIXED}"
    whole = fit(words)
    assert same(fit(f"{words} --base"), fit(f"{words} --kappa 0"))
    assert not same(fit(f"{words} --base"), whole)
    fit(f"{words} --stop 1", "stopped")
    assert same(fit(f"{words} --resume", "stopped"), whole)


def test_a_run_is_resumed_with_workers_too(fit):
    words = f"{KINDS['vit']} {MIXED}"
    whole = fit(words, workers=2)
    fit(f"{words} --stop 2", "stopped", workers=2)
    assert same(fit(f"{words} --resume", "stopped", workers=2), whole)


def test_it_learns_and_logs(fit, tmp_path, capsys):
    fit("--model test_resnet --epochs 8")
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [*range(1, 9)]
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"] and rows[-1]["top1"] == 100
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 8 and f"loss {rows[-1]['loss']:.4g}  top1 100" in printed[-1]


def test_it_says_what_is_missing(fit, tmp_path):
    with pytest.raises(train_timm.BadInput, match="--data: got .*nowhere, allowed is a folder"):
        train_timm.train(train_timm.parse(["--data", str(tmp_path / "nowhere")]))
    with pytest.raises(train_timm.BadInput, match="--batch: got 64, .* 36 images"):
        fit("--batch 64")
    with pytest.raises(train_timm.BadInput, match="--model: got resnet1, allowed is"):
        fit("--model resnet1")
    with pytest.raises(train_timm.BadInput, match="--resume: got --out .*fresh, allowed is"):
        fit("--resume", "fresh")


@pytest.mark.parametrize("row", ["vit-s", "resnet50"])
def test_a_row_of_the_paper(row):
    c = train_timm.parse(["--data", "imagenet", "--row", row])
    model = timm.create_model(c.model)
    assert sum(p.numel() for p in model.parameters()) > 2e7
    opt = train_timm.make_optimizer(c, model, steps=1251)
    assert opt.warmup == c.ire_epoch * 1251 and opt.curvature == "fisher"
    if row == "vit-s":
        typed = {"lr": 7.5e-4, "weight_decay": 0.1, "kappa": 2, "gamma": 0.8}
        assert {name: opt.param_groups[-1][name] for name in typed} == typed


# ---------------------------------------------------------------------------------- the chapter
def test_the_loop_of_the_chapter_runs():
    cells = json.loads(CHAPTER.read_text())["cells"]
    (text,) = [t for t in ("".join(c["source"]) for c in cells) if "## timm" in t]
    (loop,) = [b for b in re.findall(r"```python\n(.*?)```", text, re.S) if "opt.probe" in b]
    torch.manual_seed(0)
    x = torch.randn(2, 8, 3, 32, 32)
    batches = list(zip(x, x.mean((2, 3, 4)).argsort(), strict=True))
    scope = {"batches": batches, "epochs": 3, "classes": 8, "F": F}
    scope["model"] = timm.create_model("test_resnet", num_classes=8)
    exec(loop, scope)
    assert scope["opt"].param_groups[0]["ire_step"] == 6


# ------------------------------------------------------------------------------------ its traps
def steps(make, probe=None, scaler=None):
    """Twelve steps of a ResNet with Mixup; the model, its optimizer and the masks on the way."""
    images = torch.randn(12, 16, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    random_seed(0)
    model = timm.create_model("test_resnet", num_classes=3)
    opt = make(create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05))
    mixup = Mixup(0.5, label_smoothing=0, num_classes=3)
    masks = []
    for x in images:
        x, y = mixup(x, x.mean((2, 3)).argmax(1))
        if probe and opt.probe_due:
            with opt.probe(model):
                probe(model, x, y, mixup).backward()
            masks.append(torch.cat([opt.masks[p].flatten() for p in model.parameters()]))
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        if scaler:
            scaler(loss, opt, clip_grad=1.0, parameters=model.parameters())
        else:
            loss.backward()
            opt.step()
    return model, opt, masks


def ire(kappa):
    return lambda base: IRE(base, kappa=kappa, gamma=0.6, interval=3)


def sampled(model, x, y, mixup):
    return sampled_cross_entropy(model(x))


def test_a_mixup_inside_the_probe_moves_the_run_even_at_kappa_0():
    def again(model, x, y, mixup):
        return sampled_cross_entropy(model(mixup(x.clone(), y.argmax(1))[0]))

    base = steps(lambda base: base)[:1]
    assert same(base, steps(ire(0), sampled)[:1])
    assert not same(base, steps(ire(0), again)[:1])


def test_soft_targets_in_the_probe_make_another_mask():
    def soft(model, x, y, mixup):
        return F.cross_entropy(model(x), y)

    pairs = zip(steps(ire(2), sampled)[2], steps(ire(2), soft)[2], strict=True)
    assert [(a != b).float().mean() > 0.05 for a, b in pairs][1:] == [True] * 3


def test_native_scaler_steps_ire_but_not_sam():
    base = steps(lambda base: base, scaler=NativeScaler("cpu"))[:1]
    assert same(base, steps(ire(0), sampled, NativeScaler("cpu"))[:1])
    assert not same(base, steps(ire(2), sampled, NativeScaler("cpu"))[:1])
    with pytest.raises(ValueError, match="closure"):
        steps(lambda base: ire(2)(SAM(base)), sampled, NativeScaler("cpu"))


def test_the_checkpoints_of_timm_have_the_masks(tmp_path):
    model, opt, _ = steps(ire(2), sampled)
    CheckpointSaver(model, opt, checkpoint_dir=str(tmp_path)).save_checkpoint(0, metric=1.0)
    fresh = timm.create_model("test_resnet", num_classes=3)
    other = ire(2)(create_optimizer_v2(fresh, "adamw", lr=1e-3, weight_decay=0.05))
    with contextlib.redirect_stdout(None):
        resume_checkpoint(fresh, str(tmp_path / "last.pth.tar"), optimizer=other)
    assert same([model], [fresh])
    for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(opt.masks[p], other.masks[q])
    assert other.param_groups[0]["ire_step"] == 12
