"""Train a timm model on any folder of images, photos/train/CLASS/*.jpg and photos/val/CLASS/*.jpg:

    python train_timm.py --data photos               # IRE over timm's AdamW
    python train_timm.py --data photos --base        # timm's AdamW alone, to compare
    python train_timm.py --data photos --resume      # go on after the last whole epoch
    python train_timm.py --data imagenet --row vit-s          # the paper's rows, one GPU: AdmIRE,
    python train_timm.py --data imagenet --row resnet50       # SGD-IRE,
    python train_timm.py --data imagenet --row resnet50 --rho .05  # SAM-IRE; or with --base

It wants timm and torchvision: pip install -r requirements-timm.txt. A resumed run ends with the
same bits on a CPU. The rows stand for the paper's and do not equal them: ViT-S and the test crop
are timm's, norms and biases do not decay. ResNet-50's settings are not published with the
paper's code; these are the usual ones for 90 epochs.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup, create_dataset, create_transform, resolve_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3, random_seed
from torch.utils.data import DataLoader

from ire import IRE, SAM, frozen_batch_norm, sampled_cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

ROWS = {
    "small": {"model": "resnet18", "opt": "adamw", "lr": 1e-3, "weight_decay": 0.05},
    # the paper's RandAugment(2, 15) counts to 30, timm's to 10, with probability 1/2
    "vit-s": {
        "model": "vit_small_patch16_224",
        "opt": "adamw",
        "lr": 3e-3 * 1024 / 4096,
        "weight_decay": 0.1,
        "batch": 1024,
        "epochs": 300,
        "warmup_epochs": 30,
        "clip": 1.0,
        "mixup": 0.5,
        "augment": "rand-n2-m5-p1-inc1",
        "gamma": 0.8,
        "ire_epoch": 100,
    },
    # timm's "sgd" is Nesterov's
    "resnet50": {
        "model": "resnet50",
        "opt": "momentum",
        "lr": 0.4,
        "weight_decay": 1e-4,
        "batch": 1024,
        "epochs": 90,
        "warmup_epochs": 5,
    },
}


def parse(words=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", required=True, help="folder with train/ and val/, in each a folder a class")
    add("--row", choices=ROWS, default="small", help="settings to start from")
    add("--out", default="runs/timm", help="folder of the checkpoint and of log.jsonl")
    add("--resume", action="store_true")
    add("--model", help="a name of timm.list_models()")
    add("--epochs", type=int, default=20)
    add("--stop", type=int, help="end after this epoch, for jobs of limited time; then --resume")
    add("--batch", type=int, default=64, help="images a step; even, for Mixup")
    add("--workers", type=int, default=min(8, os.cpu_count()), help="processes that read images")
    add("--seed", type=int, default=0)
    add("--opt", help="a name of timm.optim.list_optimizers()")
    add("--lr", type=float, help="in proportion to --batch: a row's is for its 1024")
    add("--weight-decay", type=float)
    add("--warmup-epochs", type=int, default=1, help="of the learning rate, from 0 to lr")
    add("--clip", type=float, default=0.0, help="largest norm of the gradient; 0: any")
    add("--mixup", type=float, default=0.0, help="alpha of Mixup; 0: none")
    add("--augment", help="timm's auto_augment, such as rand-n2-m5-p1-inc1")
    add("--smoothing", type=float, default=0.0, help="of the labels")
    add("--ema", type=float, default=0.9999, help="decay of the average of the weights")
    add("--base", action="store_true", help="no IRE")
    add("--kappa", type=float, default=2.0)
    add("--gamma", type=float, default=0.6)
    add("--interval", type=int, default=10, help="steps between masks")
    add("--ire-epoch", type=int, default=0, help="epoch from which on IRE is on")
    add("--curvature", default="fisher", help="or second_moment, over the Adam family")
    add("--rho", type=float, default=0.0, help="of SAM; 0: no SAM")
    parser.set_defaults(**ROWS[parser.parse_known_args(words)[0].row])
    return parser.parse_args(words)


class BadInput(Exception):
    """A setting that cannot be, in a line that names it."""


def load_images(c):
    """A timm model with as many classes as the folder has, and batches to train and to test on."""
    folders = [Path(c.data, name) for name in ("train", "val")]
    for folder in folders:
        if not folder.is_dir():
            raise BadInput(f"--data: got {c.data}, allowed is a folder with train/ and val/ in it")
    if not timm.is_model(c.model):
        raise BadInput(f"--model: got {c.model}, allowed is a name of timm.list_models()")
    images = create_dataset("", root=folders[0])
    names = images.reader.class_to_idx
    tests = create_dataset("", root=folders[1], class_map=names)
    if len(images) < c.batch:
        raise BadInput(f"--batch: got {c.batch}, allowed is up to the {len(images)} images there")
    model = timm.create_model(c.model, num_classes=len(names))
    config = resolve_data_config({}, model=model)  # its size of images, their mean, ...
    images.transform = create_transform(**config, is_training=True, auto_augment=c.augment)
    tests.transform = create_transform(**config)
    options = {"num_workers": c.workers, "pin_memory": DEVICE == "cuda"}
    batches = DataLoader(images, c.batch, shuffle=True, drop_last=True, **options)
    model.to(DEVICE, memory_format=torch.channels_last)
    return model, batches, DataLoader(tests, c.batch, **options)


def make_optimizer(c, model, steps):
    """timm's optimizer, in SAM if rho is not 0, in IRE if not --base. steps: those of an epoch."""
    opt = create_optimizer_v2(model, c.opt, lr=c.lr, weight_decay=c.weight_decay)
    if c.rho:
        opt = SAM(opt, rho=c.rho)
    if not c.base:
        when = {"interval": c.interval, "warmup": c.ire_epoch * steps}
        opt = IRE(opt, kappa=c.kappa, gamma=c.gamma, curvature=c.curvature, **when)
    return opt


def train_step(c, model, opt, x, y):
    """One step on images x and labels y, which Mixup may have made soft. Returns the loss."""
    autocast = torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda")
    if getattr(opt, "probe_due", False):
        with opt.probe(model):
            with autocast:
                loss = sampled_cross_entropy(model(x))  # labels of the model's, not Mixup's
            loss.backward()
    passes = 0

    def closure():
        nonlocal passes
        passes += 1  # SAM makes two
        opt.zero_grad()
        with frozen_batch_norm(model) if passes == 2 else contextlib.nullcontext(), autocast:
            loss = F.cross_entropy(model(x), y, label_smoothing=c.smoothing)
        loss.backward()
        if c.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), c.clip)
        return loss

    return opt.step(closure).detach()


@torch.no_grad()
def accuracy(model, batches):
    """Top-1 and top-5 in percent."""
    model.eval()
    hits = torch.zeros(2, device=DEVICE)
    for x, y in batches:
        best = model(x.to(DEVICE)).topk(min(5, model.num_classes)).indices
        right = best == y.to(DEVICE)[:, None]
        hits += torch.stack((right[:, 0].sum(), right.sum()))
    return (100 * hits / len(batches.dataset)).tolist()


def train(c):
    """Returns the model and the average of its weights."""
    torch.manual_seed(c.seed)
    model, batches, tests = load_images(c)
    steps = len(batches)
    opt = make_optimizer(c, model, steps)
    warmup = min(c.warmup_epochs, c.epochs - 1) * steps
    schedule = CosineLRScheduler(
        opt,
        c.epochs * steps - warmup,
        warmup_t=warmup,
        warmup_lr_init=c.lr / max(warmup, 1),
        warmup_prefix=True,
        t_in_epochs=False,
    )
    mixup = Mixup(c.mixup, label_smoothing=0, num_classes=model.num_classes) if c.mixup else None
    ema = ModelEmaV3(model, c.ema, use_warmup=True)
    parts = {"model": model, "ema": ema.module, "opt": opt}
    out = Path(c.out)
    out.mkdir(parents=True, exist_ok=True)
    for epoch in range(load(out, parts) if c.resume else 0, c.stop or c.epochs):
        # of torch, numpy and random: then an epoch's order, crops and mixtures need no other's past
        random_seed(10_000 * c.seed + epoch)
        start = time.perf_counter()
        total = 0
        model.train()
        for step, (x, y) in enumerate(batches, epoch * steps):
            x = x.to(DEVICE, memory_format=torch.channels_last, non_blocking=True)
            y = y.to(DEVICE, non_blocking=True)
            x, y = mixup(x, y) if mixup else (x, y)
            schedule.step_update(step)
            total += train_step(c, model, opt, x, y)
            ema.update(model, step + 1)
        total = float(total)  # waits for the device
        seconds = time.perf_counter() - start
        top1, top5 = accuracy(model, tests)
        row = {"epoch": epoch + 1, "loss": total / steps, "top1": top1, "top5": top5}
        row["ema_top1"], row["ema_top5"] = accuracy(ema.module, tests)
        row["images_per_second"] = steps * c.batch / seconds
        print(*(f"{name} {value:.4g}" for name, value in row.items()), sep="  ", flush=True)
        save(out, parts, epoch + 1, row)
    return model, ema.module


def save(out, parts, epochs, row):
    with (out / "log.jsonl").open("a") as log:
        log.write(json.dumps(row) + "\n")
    saved = {name: part.state_dict() for name, part in parts.items()}
    with (out / "next.pt").open("wb") as file:
        torch.save(saved | {"epochs": epochs}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(out / "next.pt", out / "last.pt")  # never half a checkpoint


def load(out, parts):
    """Returns how many epochs are done."""
    if not (out / "last.pt").exists():
        raise BadInput(f"--resume: got --out {out}, allowed is the folder of a run")
    saved = torch.load(out / "last.pt", map_location=DEVICE, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    return saved["epochs"]


if __name__ == "__main__":
    try:
        train(parse())
    except BadInput as e:
        print(f"train_timm.py: {e}", file=sys.stderr)
        sys.exit(2)
