"""Train a timm model on any folder of images, photos/train/CLASS/*.jpg and photos/val/CLASS/*.jpg:

    python train_timm.py --data photos               # IRE on top of timm's AdamW
    python train_timm.py --data photos --base        # timm's AdamW alone, to compare
    python train_timm.py --resume                    # go on after the last whole epoch
    python train_timm.py --data imagenet --row vit-s          # the paper's rows, one GPU: AdmIRE,
    python train_timm.py --data imagenet --row resnet50       # SGD-IRE,
    python train_timm.py --data imagenet --row resnet50 --rho .05  # SAM-IRE; or with --base

It wants timm and torchvision: pip install -r requirements-timm.txt. A resumed run ends with the
same bits on a CPU. The rows are like the paper's, but not the same: ViT-S and the test crop are
timm's, and norms and biases do not decay. ResNet-50's settings are not published with the
paper's code; these are the usual ones for 90 epochs.
"""

import contextlib
import dataclasses
import hashlib
import os
import signal
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import common
from common import COUNT, DECAY, FRACTION, NOT_NEGATIVE, POSITIVE, STEPS, check, setting
from ire import IRE, SAM, frozen_batch_norm, sampled_cross_entropy

try:
    import timm
    from timm.data import ImageDataset, Mixup, create_transform, resolve_data_config
    from timm.optim import create_optimizer_v2, list_optimizers
    from timm.scheduler import CosineLRScheduler
    from timm.utils import ModelEmaV3, random_seed
    from timm.utils.misc import natural_key

    MISSING = None
except (ImportError, RuntimeError) as e:  # RuntimeError: a torchvision that is for another torch
    MISSING = f"timm can't be imported ({e}): pip install -r requirements-timm.txt"

# ------------------------------------------------------------------------------------ settings
ROWS = {
    "small": {},
    # RandAugment(2, 15) of the paper: 15 of 30 is 5 of timm's 10. p1: timm's default is p0.5.
    "vit-s": dict(model="vit_small_patch16_224", epochs=300, warmup_epochs=30, batch=1024)
    | dict(lr=3e-3 * 1024 / 4096, weight_decay=0.1, clip=1.0, gamma=0.8, ire_epoch=100)
    | dict(mixup=0.5, augment="rand-n2-m5-p1-inc1"),
    # timm's "sgd" is Nesterov's
    "resnet50": dict(model="resnet50", epochs=90, warmup_epochs=5, batch=1024)
    | dict(opt="momentum", lr=0.4, weight_decay=1e-4),
}
FLAT = """the loss is flat where these are small: squared gradients of training, or (the paper's) of
labels sampled from the model"""


@dataclasses.dataclass
class Config(common.Settings):
    """Adds the settings of this script. A row changes the defaults."""

    home = "runs/timm"

    data: str = setting(None, "folder with train/ and val/, in each of them a folder a class")
    row: str = setting("small", "settings to start from", tuple(ROWS))
    model: str = setting("resnet18", "a name of timm.list_models()")
    epochs: int = setting(20, "passes over the images", COUNT)
    stop: int = setting(None, "end after this epoch, then --resume", COUNT, command=True)
    batch: int = setting(64, "images in a step", COUNT)
    workers: int = setting(None, "processes that read images (default up to 8)", STEPS, resume=True)
    opt: str = setting("adamw", "a name of timm.optim.list_optimizers()")
    lr: float = setting(1e-3, "peak learning rate; a row's is for its batch", POSITIVE)
    weight_decay: float = setting(0.05, "strength of the decay", NOT_NEGATIVE)
    warmup_epochs: int = setting(None, "epochs until the peak (default 1, of 1 epoch 0)", STEPS)
    clip: float = setting(0.0, "largest norm of the gradient; 0: any", NOT_NEGATIVE)
    mixup: float = setting(0.0, "alpha of Mixup; 0: none", NOT_NEGATIVE)
    augment: str = setting(None, "timm's auto_augment, such as rand-n2-m5-p1-inc1")
    smoothing: float = setting(0.0, "share of the other classes in a label", DECAY)
    ema: float = setting(0.9999, "decay of the average of the weights", DECAY)
    rho: float = setting(0.0, "length of SAM's climb; 0: no SAM", NOT_NEGATIVE)
    base: bool = setting(False, "no IRE")
    kappa: float = setting(2.0, "flat steps are 1 + kappa times as long", NOT_NEGATIVE, of=("ire",))
    gamma: float = setting(0.6, "flat fraction of the coordinates", FRACTION, of=("ire",))
    interval: int = setting(10, "steps from one mask to the next", COUNT, of=("ire",))
    ire_epoch: int = setting(0, "first epoch with IRE, from 0", STEPS, of=("ire",))
    curvature: str = setting("fisher", FLAT, ("squares", "fisher"), of=("ire",))


def configure(typed):
    """Returns the settings of a run."""
    if MISSING or common.RANKS > 1:
        raise common.BadInput(MISSING or f"got {common.RANKS} ranks, allowed is one process")
    given = common.collect(Config, typed)
    row = dict(ROWS.get(given.get("row"), {}))
    if "warmup_epochs" in row and "epochs" in given:  # in fewer epochs at most a quarter warms up
        row["warmup_epochs"] = min(row["warmup_epochs"], given["epochs"] // 4)
    c = Config(**row | given)
    common.refuse_unread(Config, typed, [] if c.base else ["ire"], "--base")
    if c.workers is None:
        c.workers = min(8, os.cpu_count())
    if c.warmup_epochs is None:
        c.warmup_epochs = min(1, c.epochs - 1)
    on = c.base or c.epochs > c.ire_epoch
    check(c, "epochs", on, f"more than --ire-epoch, which is {c.ire_epoch}")
    last = c.epochs - 1
    check(c, "warmup_epochs", c.warmup_epochs <= last, f"0 to --epochs - 1, {last}")
    check(c, "stop", not c.stop or c.stop <= c.epochs, f"1 to --epochs, {c.epochs}")
    check(c, "batch", not (c.mixup and c.batch % 2), "an even number with --mixup")
    return c


# ------------------------------------------------------------------------------------ images
def read_folder(path, classes=""):
    """Returns the images of train/ or val/."""
    with common.instead(f"--data: got {path}, allowed is a folder a class, with its images"):
        images = ImageDataset(str(path), class_map=classes)
    for name in images.filenames():
        if name.count(os.sep) != 1:  # timm would take any folder's name for a class
            raise common.BadInput(f"--data: got {path}/{name}, allowed is {path}/CLASS/IMAGE")
    return images


def find_classes(train, val):
    """Returns {class: its number}. Raises BadInput where timm's classes are not the folders that a
    user sees, or where timm would leave out a class in silence."""
    names = set(read_folder(train).reader.class_to_idx)
    tested = set(read_folder(val).reader.class_to_idx)
    folders = {p.name for p in train.iterdir() if p.is_dir() and not p.name.startswith(".")}
    faults = {
        f"folders with images in {train}": folders - names,
        f"classes in {train} that are not hidden": names - folders,
        f"two classes or more in {train}": names if len(names) < 2 else (),
        f"in {val} the classes of {train}": tested - names,
    }
    for allowed, wrong in faults.items():
        if wrong:
            got = ", ".join(map(repr, sorted(wrong)))
            raise common.BadInput(f"--data: got {got:.100}, allowed are {allowed}")
    ordered = sorted(sorted(names), key=natural_key)  # as timm does, but Cat always before cat
    return {name: i for i, name in enumerate(ordered)}


def load_images(c):
    """Returns a timm model with as many classes as the folder has, batches to train and to test on,
    and a checksum of the images' names."""
    train, val = Path(c.data or "", "train"), Path(c.data or "", "val")
    there = c.data and train.is_dir() and val.is_dir()
    check(c, "data", there, "a folder with train/ and val/ in it")
    check(c, "model", timm.is_model(c.model), "a name of timm.list_models()")
    check(c, "opt", c.opt in list_optimizers(), "a name of timm.optim.list_optimizers()")
    classes = find_classes(train, val)
    images, tests = read_folder(train, classes), read_folder(val, classes)
    check(c, "batch", c.batch <= len(images), f"up to the {len(images)} images there")
    model = timm.create_model(c.model, num_classes=len(classes))
    config = resolve_data_config({}, model=model)  # its size of images, their mean, ...
    with common.instead(f"--augment: got {c.augment}, allowed is a text that timm knows"):
        images.transform = create_transform(**config, is_training=True, auto_augment=c.augment)
    tests.transform = create_transform(**config)
    options = {"num_workers": c.workers, "pin_memory": c.device == "cuda"}
    options["worker_init_fn"] = ignore_signals
    batches = DataLoader(images, c.batch, shuffle=True, drop_last=True, **options)
    model.to(c.device, memory_format=torch.channels_last)
    names = hashlib.sha256(repr([images.filenames(), tests.filenames()]).encode()).hexdigest()
    if c.resume:
        same = common.read_checkpoint(c.out, mmap=True)["names"] == names
        check(c, "data", same, f"the images that {c.out} began with; their names differ")
    return model, batches, DataLoader(tests, c.batch, **options), names


def ignore_signals(worker):
    """Lets a worker live when Ctrl-C or a cluster's SIGTERM comes to all processes of a run. The
    main process makes the step first and then ends its workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


# ------------------------------------------------------------------------------------ training
def make_optimizer(c, model, steps):
    """Makes timm's optimizer, in SAM if rho is not 0, in IRE if not --base. steps: of an epoch."""
    opt = create_optimizer_v2(model, c.opt, lr=c.lr, weight_decay=c.weight_decay)
    if c.rho:
        opt = SAM(opt, rho=c.rho)
    if not c.base:
        when = {"interval": c.interval, "warmup": c.ire_epoch * steps}
        opt = IRE(opt, kappa=c.kappa, gamma=c.gamma, curvature=c.curvature, **when)
    return opt


def train_step(c, model, opt, x, y):
    """Makes a step on images x and labels y, which Mixup may have made soft. Returns the loss."""
    autocast = torch.autocast(c.device, getattr(torch, c.dtype), enabled=c.dtype != "float32")
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
def accuracy(c, model, batches, kind=""):
    """Returns top-1 and top-5 in percent, by name."""
    model.eval()
    hits = torch.zeros(2, device=c.device)
    for x, y in batches:
        best = model(x.to(c.device)).topk(min(5, model.num_classes)).indices
        right = best == y.to(c.device)[:, None]
        hits += torch.stack((right[:, 0].sum(), right.sum()))
    top1, top5 = (100 * hits / len(batches.dataset)).tolist()
    return {f"{kind}top1": top1, f"{kind}top5": top5}


def make_schedule(c, opt, steps):
    """Makes a schedule from almost 0 up to --lr, then a cosine down to 0."""
    warmup = c.warmup_epochs * steps
    return CosineLRScheduler(
        opt,
        c.epochs * steps - warmup,
        warmup_t=warmup,
        warmup_lr_init=c.lr / max(warmup, 1),
        warmup_prefix=True,
        t_in_epochs=False,
    )


def train(c):
    """Trains, and returns the model and the average of its weights."""
    common.choose_device(c, float16=False)
    common.choose_folder(c)
    common.set_up_torch(c)
    model, batches, tests, names = load_images(c)
    net = torch.compile(model) if c.compile else model
    steps = len(batches)
    with common.instead(f"--opt: got {c.opt}, allowed is what torch and IRE can use"):
        opt = make_optimizer(c, model, steps)
    schedule = make_schedule(c, opt, steps)
    mixup = Mixup(c.mixup, label_smoothing=0, num_classes=model.num_classes) if c.mixup else None
    ema = ModelEmaV3(model, c.ema, use_warmup=True)
    parts = {"model": model, "ema": ema.module, "opt": opt}
    cuda = c.device == "cuda"  # on a Mac a copy that does not block can be wrong
    with common.Run(c, c.epochs * steps) as run:
        done = run.load(**parts)["step"] // steps if c.resume else 0
        banner(c, model, batches, done)
        for epoch in range(done, c.stop or c.epochs):
            # a seed for each epoch: its order, crops and mixtures do not depend on the past
            random_seed((10_000 * c.seed + epoch) % 2**32)
            model.train()
            losses = []
            run.start_clock()
            for step, (x, y) in enumerate(batches, epoch * steps + 1):
                x = x.to(c.device, memory_format=torch.channels_last, non_blocking=cuda)
                y = y.to(c.device, non_blocking=cuda)
                x, y = mixup(x, y) if mixup else (x, y)
                schedule.step_update(step - 1)
                losses.append(train_step(c, net, opt, x, y))
                ema.update(model, step)
                if run.asked_to_stop():
                    raise run.stopped()
                if step % c.log_interval == 0 or step % steps == 0:
                    report(run, step, losses, opt)
                    losses = []
            rates = accuracy(c, model, tests) | accuracy(c, ema.module, tests, "ema_")
            run.log(step, epoch=epoch + 1, **rates)
            run.save(step, names=names, **parts)
        draw(c)
    return model, ema.module


def banner(c, model, batches, done):
    """Prints what will be trained, and where."""
    method = f"{c.opt}, lr {c.lr:g}" + (f"; SAM, rho {c.rho:g}" if c.rho else "")
    if not c.base:
        method += f"; IRE, kappa {c.kappa:g}, gamma {c.gamma:g}, on from epoch {c.ire_epoch}"
    epochs = f"epochs {done + 1} to {c.stop or c.epochs}, {len(batches)} steps each"
    common.say(
        model=f"{c.model}, {sum(p.numel() for p in model.parameters()):,} parameters",
        data=f"{len(batches.dataset):,} images of {model.num_classes} classes in {c.data}",
        device=f"{c.device}, {c.dtype}" + (", compiled" if c.compile else ""),
        optimizer=method,
        run=f"{epochs}, into {c.out}",
    )


def draw(c):
    """Draws OUT/loss.png."""
    log = common.read_log(c.out)
    panels = {
        "loss": {"training": common.curve(log, "train_loss")},
        "accuracy (%)": {"top1": common.curve(log, "top1")},
    }
    common.draw(Path(c.out, "loss.png"), panels)


def report(run, step, losses, opt):
    """Writes a line of the log about the last steps."""
    losses = torch.stack(losses).tolist()  # waits for the device
    run.check_finite(step, losses, "a lower --lr or --kappa")
    speed = len(losses) * run.c.batch / run.stop_clock()
    lr = opt.param_groups[0]["lr"]
    loss = statistics.mean(losses)
    run.log(step, train_loss=loss, lr=lr, images_per_second=round(speed, 1))
    run.start_clock()


def command(typed):
    c = configure(typed)
    train(c)
    common.say(figure=Path(c.out, "loss.png"))


def main(arguments=None):
    return common.main(Config, __doc__, command, arguments, "lower --batch, and --lr with it")


if __name__ == "__main__":
    common.leave(main())
