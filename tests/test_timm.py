"""train_timm.py and the loop of the chapter "Your trainer" with the real timm, where timm is there
and torchvision fits torch: pip install -r requirements-timm.txt pytest, in its own environment."""

import contextlib
import json
import math
import multiprocessing
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scripts
import torch
import torch.nn.functional as F

import common
import train_timm
from ire import IRE, SAM, sampled_cross_entropy

TIMM = scripts.Script(train_timm)
ROOT = TIMM.path.parent
CHAPTER = ROOT / "tutorials/11_your_trainer.ipynb"
KINDS = {
    "vit": "--model test_vit",
    "squares": "--model test_vit --curvature squares",
    "sgd": "--model test_resnet --opt momentum --lr 0.05",
    "sam": "--model test_resnet --opt momentum --lr 0.05 --rho 0.05",
}
MIXED = "--mixup 0.5 --augment rand-n2-m5-p1-inc1 --clip 1.0 --smoothing 0.1"
SMALL = "--data photos --model test_resnet --batch 12 --epochs 3 --workers 0 --out run "


@pytest.mark.parametrize("flags, code", (("--help", 0), ("--data photos", 2)))
def test_without_timm_it_says_what_to_install(flags, code):
    script = "import sys; sys.modules['timm'] = None; import train_timm; "
    script += "sys.exit(train_timm.main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, *flags.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code and done.stderr.count("\n") == (code == 2)
    assert "pip install -r requirements-timm.txt" in done.stdout + done.stderr


if train_timm.MISSING is None:
    import timm
    from PIL import Image
    from timm.data import Mixup
    from timm.models import resume_checkpoint
    from timm.optim import create_optimizer_v2
    from timm.utils import CheckpointSaver, NativeScaler, random_seed

needs_timm = pytest.mark.skipif(train_timm.MISSING is not None, reason=str(train_timm.MISSING))


def add_images(folder, images, colour=0, suffix="jpg"):
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(colour)
    for image in range(images):
        pixels = random.normal(100, 40, (40, 50, 3)) + 80 * np.eye(3)[colour]
        picture = Image.fromarray(pixels.clip(0, 255).astype("uint8"))
        picture.save(folder / f"{image}.{suffix}")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Three classes of one colour each; the last of them has no picture to test on."""
    folder = tmp_path_factory.mktemp("drawn")
    for colour, name in enumerate(("blue", "green", "red")):
        add_images(folder / "photos/train" / name, 12, 2 - colour)
        if name != "red":
            add_images(folder / "photos/val" / name, 3, 2 - colour)
    return folder


@pytest.fixture
def photos(drawn, tmp_path, monkeypatch):
    """A copy of them in ./photos."""
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(drawn, tmp_path, dirs_exist_ok=True)
    return tmp_path / "photos"


def fit(flags):
    """Trains with these flags; the model and the average of its weights."""
    typed = common.parse(train_timm.Config, "", shlex.split(SMALL + flags))
    return train_timm.train(train_timm.configure(typed))


def same(models, others):
    """Whether pairs of models are equal bit for bit, with their buffers."""
    pairs = zip(models, others, strict=True)
    return all(scripts.same(dict(a.state_dict()), dict(b.state_dict())) for a, b in pairs)


@needs_timm
@pytest.mark.parametrize("kind", KINDS)
def test_kappa_0_is_the_base_and_a_resumed_run_is_the_whole_one(photos, kind):
    flags = f"{KINDS[kind]} {MIXED}"
    whole = fit(f"{flags} --interval 2")
    base = fit(f"{flags.replace('--curvature squares', '')} --base --out base")
    assert same(base, fit(f"{flags} --kappa 0 --out zero")) and not same(base, whole)
    fit(f"{flags} --interval 2 --stop 1 --out stopped")
    assert same(fit(f"{flags} --interval 2 --resume --out stopped"), whole)


@needs_timm
def test_a_run_is_resumed_with_workers_too_and_after_a_signal(photos):
    def sigterm(_):  # to all processes, as a cluster does
        workers = [str(worker.pid) for worker in multiprocessing.active_children()]
        subprocess.run(["kill", *workers], check=True)  # a signal of their parent is no error
        time.sleep(0.5)
        signal.raise_signal(signal.SIGTERM)

    flags = f"--workers 2 {MIXED}"
    whole = fit(flags)
    with scripts.in_step(5, sigterm):
        code, _, err = TIMM.run(f"{SMALL} {flags} --out stopped")
    assert code == 143 and "--resume" in err, err
    assert scripts.checkpoint("stopped")["step"] == 3
    assert same(fit("--resume --workers 2 --out stopped"), whole)


@needs_timm
def test_the_first_loss_that_is_not_finite_is_named(photos, monkeypatch):
    losses = map(torch.tensor, (1.0, math.nan, math.nan))
    monkeypatch.setattr(train_timm, "train_step", lambda *args: next(losses))
    code, _, err = TIMM.run(SMALL)
    assert code == 1 and "step 2: the loss or its gradient is nan; last checkpoint: none" in err


@needs_timm
def test_it_learns_and_logs(photos):
    code, out, _ = TIMM.run(f"{SMALL} --epochs 8 --log-interval 2")
    assert code == 0 and all(len(line) <= 100 for line in out.splitlines())
    log = common.read_log("run")
    losses = [row["train_loss"] for row in log if "train_loss" in row]
    rates = [row["top1"] for row in log if "top1" in row]
    assert losses[-1] < 0.8 * losses[0] and len(rates) == 8 and rates[-1] == 100
    names = {"checkpoint.pt", "config.json", "log.jsonl", "loss.png"}
    assert {p.name for p in Path("run").iterdir() if p.name[0] != "."} == names


@needs_timm
def test_resume_with_other_settings_or_images(photos):
    fit("--stop 1")
    TIMM.refused("--resume --out run --base", "--base: got True, allowed is False, as run began")
    (photos / "train/red/0.jpg").unlink()
    TIMM.refused("--resume --out run", "--data: got 'photos', allowed is the images that run began")


@needs_timm
@pytest.mark.parametrize(
    "flags, says",
    (
        ("--row vit-s --epochs 90", "--epochs: got 90, allowed is more than --ire-epoch.* 100"),
        ("--warmup-epochs 3", "--warmup-epochs: got 3, allowed is 0 to --epochs - 1, 2"),
        ("--stop 4", "--stop: got 4, allowed is 1 to --epochs, 3"),
        ("--batch 7 --mixup .5", "--batch: got 7, allowed is an even number"),
        ("--batch 64", "--batch: got 64, allowed is up to the 36 images"),
        ("--base --kappa 1", "--kappa: got 1.0, .*--base does not read"),
        ("--opt nosuch", "--opt: got 'nosuch', allowed is"),
        ("--opt mars", "--opt: got mars, allowed is .*a base without a gamma"),
        ("--model resnet1", "--model: got 'resnet1', allowed is"),
        ("--augment junk", "--augment: got junk, allowed is"),
        ("--data nowhere", "--data: got 'nowhere', allowed is a folder with train/ and val/"),
    ),
)
def test_settings_that_cannot_be(photos, flags, says):
    TIMM.refused(SMALL + flags, says)


@needs_timm
@pytest.mark.parametrize(
    "without, folder, images, says",
    (
        ("", "val/Green", 1, "'Green', allowed are in photos/val the classes of photos/train"),
        ("", "train", 1, "photos/train/0.jpg, allowed is photos/train/CLASS/IMAGE"),
        ("", "val", 1, "photos/val/0.jpg, allowed is photos/val/CLASS/IMAGE"),
        ("", "train/red/blue", 1, "photos/train/red/blue/0.jpg, allowed is photos/train/CLASS"),
        ("", "train/.old", 1, "'.old', allowed are classes in photos/train that are not hidden"),
        ("", "train/white", 0, "'white', allowed are folders with images in photos/train"),
        ("train", "train/blue", 1, "'blue', allowed are two classes or more in photos/train"),
        ("val", "val/red", 0, "photos/val, allowed is a folder a class, with its images"),
    ),
)
def test_folders_as_people_have_them(photos, without, folder, images, says):
    if without:
        shutil.rmtree(photos / without)
    add_images(photos / folder, images)
    TIMM.refused(SMALL, f"--data: got {says}")


@needs_timm
def test_images_as_people_have_them(photos):
    """Names that differ in case only are two classes, the same ones in each run."""
    red = photos / "train/red"
    picture = Image.open(red / "0.jpg")
    for mode, suffix in (("L", "png"), ("I;16", "png"), ("CMYK", "jpg"), ("P", "gif")):
        picture.convert("L" if mode == "I;16" else mode).save(red / f"{mode[0]}.{suffix}")
    (red / "1.jpg").write_bytes(b"")
    (red / ".DS_Store").write_bytes(b"x")
    add_images(photos / "train/Red", 3)
    (photos / "train/.cache").mkdir()
    classes = train_timm.find_classes(photos / "train", photos / "val")
    assert classes == {"blue": 0, "green": 1, "Red": 2, "red": 3}
    fit("--epochs 1")


@needs_timm
@pytest.mark.parametrize("row", ("vit-s", "resnet50"))
def test_a_row_of_the_paper(row):
    c = train_timm.configure({"data": "imagenet", "row": row})
    short = train_timm.configure({"row": row, "epochs": 4, "ire_epoch": 1})
    assert (c.warmup_epochs, short.warmup_epochs) == (30 if row == "vit-s" else 5, 1)
    model = timm.create_model(c.model)
    assert sum(p.numel() for p in model.parameters()) > 2e7
    opt = train_timm.make_optimizer(c, model, steps=1251)
    assert opt.warmup == c.ire_epoch * 1251 and opt.curvature == "fisher"
    if row == "vit-s":
        expected = {"lr": 7.5e-4, "weight_decay": 0.1, "kappa": 2, "gamma": 0.8}
        assert {name: opt.param_groups[-1][name] for name in expected} == expected


# ---------------------------------------------------------------------------------- the chapter
@needs_timm
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
def steps(make, scaler=None):
    """Twelve steps of a ResNet with Mixup; the model and its optimizer."""
    images = torch.randn(12, 16, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    random_seed(0)
    model = timm.create_model("test_resnet", num_classes=3)
    opt = make(create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05))
    mixup = Mixup(0.5, label_smoothing=0, num_classes=3)
    for x in images:
        x, y = mixup(x, x.mean((2, 3)).argmax(1))
        if getattr(opt, "probe_due", False):
            with opt.probe(model):
                sampled_cross_entropy(model(x)).backward()
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        if scaler:
            scaler(loss, opt, clip_grad=1.0, parameters=model.parameters())
        else:
            loss.backward()
            opt.step()
    return model, opt


def ire(kappa):
    return lambda base: IRE(base, kappa=kappa, gamma=0.6, interval=3, curvature="fisher")


@needs_timm
def test_native_scaler_steps_ire_but_not_sam():
    base = steps(lambda base: base, NativeScaler("cpu"))[:1]
    assert same(base, steps(ire(0), NativeScaler("cpu"))[:1])
    assert not same(base, steps(ire(2), NativeScaler("cpu"))[:1])
    with pytest.raises(ValueError, match="closure"):
        steps(lambda base: ire(2)(SAM(base)), NativeScaler("cpu"))


@needs_timm
def test_the_checkpoints_of_timm_have_the_masks(tmp_path):
    model, opt = steps(ire(2))
    CheckpointSaver(model, opt, checkpoint_dir=str(tmp_path)).save_checkpoint(0, metric=1.0)
    fresh = timm.create_model("test_resnet", num_classes=3)
    other = ire(2)(create_optimizer_v2(fresh, "adamw", lr=1e-3, weight_decay=0.05))
    with contextlib.redirect_stdout(None):
        resume_checkpoint(fresh, str(tmp_path / "last.pth.tar"), optimizer=other)
    assert same([model], [fresh])
    for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(opt.masks[p], other.masks[q])
    assert other.param_groups[0]["ire_step"] == 12
