"""Train an image classifier with SGD, AdamW or SAM, each of them alone or with IRE on top:

    python train_cifar.py --data digits                      # scikit-learn's digits, no download
    python train_cifar.py --preset quick                     # CIFAR-10, a small network: minutes
    python train_cifar.py --preset quick --limit-train 5000  # the same on a CPU
    python train_cifar.py                                    # ResNet-56, 200 epochs: wants a GPU
    python train_cifar.py --model vit_t --data cifar100      # AdmIRE
    python train_cifar.py --optimizer sam-ire --seeds 3 --sharpness    # mean, error, Tr(Hessian)
    torchrun --standalone --nproc_per_node 2 train_cifar.py  # on two GPUs
    python train_cifar.py --resume                           # go on after Ctrl-C

A resumed run ends with the same bits on a CPU, and on CUDA with --deterministic.
Top to bottom: settings, networks, data, training, command line.
"""

import codecs
import contextlib
import dataclasses
import functools
import hashlib
import math
import os
import pickle
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import common
from common import COUNT, DECAY, FRACTION, NOT_NEGATIVE, POSITIVE, STEPS, Range, check, setting
from ire import IRE, SAM, frozen_batch_norm, sampled_cross_entropy
from sharpness import sharpness

# ------------------------------------------------------------------------------------ settings
PRESETS = {"paper": {}, "quick": dict(model="resnet8", epochs=8, batch_size=64)}
MODELS = {  # each makes a network for so many classes
    "resnet8": lambda classes: resnet(8, classes),
    "resnet20": lambda classes: resnet(20, classes),
    "resnet56": lambda classes: resnet(56, classes),
    "wrn28_10": lambda classes: wide_resnet(28, 10, classes),
    "wrn16_8": lambda classes: wide_resnet(16, 8, classes),
    "vit_t": lambda classes: ViT(192, 3, classes),
    "vit_s": lambda classes: ViT(384, 6, classes),
}
DATA = ("cifar10", "cifar100", "digits")
AUGMENTATIONS = ("none", "shift", "basic", "cutout", "mixup")  # the last three also flip
OPTIMIZERS = ("sgd", "adamw", "sam", "sgd-ire", "admire", "sam-ire")
FLAT = """the loss is flat where these are small: squared gradients of training, or (the paper's) of
labels sampled from the model"""
AUGMENT = "data augmentation (default basic; digits: shift; vit: mixup)"
BASES = ("sgd", "adamw")
ADVICE = "a lower --lr or --kappa"
PROBE = "pictures for fisher: the first ones, or those of the step"
SOME = Range(2, 10**4, "2 to 10000")


@dataclasses.dataclass
class Config(common.Settings):
    """Adds the settings of this script. None stands for what was not given, see fill_in."""

    home = "runs/cifar"

    # the network and its pictures
    preset: str = setting("paper", "quick trains a small network in minutes", tuple(PRESETS))
    data: str = setting("cifar10", "pictures; digits come with scikit-learn", DATA)
    limit_train: int = setting(None, "train on the first N pictures (default all)", COUNT)
    holdout: int = setting(0, "keep the last N training pictures for val_acc", STEPS)
    model: str = setting(None, "network (default resnet56; quick, digits: resnet8)", tuple(MODELS))
    augment: str = setting(None, AUGMENT, AUGMENTATIONS)
    # the schedule
    epochs: int = setting(None, "passes over the data (default 200; quick: 8; digits: 10)", COUNT)
    batch_size: int = setting(
        None, "pictures in a step, over all ranks (default 128; quick: 64; digits: 32)", COUNT
    )
    warmup: int = setting(
        None, "epochs until the peak (default 0; quick: 2; vit: a tenth of --epochs)", STEPS
    )
    lr: float = setting(None, "peak (default 0.1; adamw: 0.001)", POSITIVE)
    schedule: str = setting("cosine", "the rate after the warm-up", ("cosine", "constant"))
    label_smoothing: float = setting(0.1, "share of a label that all classes get alike", DECAY)
    # the optimizer
    optimizer: str = setting(
        None, "admire is IRE on top of AdamW (default sgd-ire; vit: admire)", OPTIMIZERS
    )
    base: str = setting(None, "optimizer under SAM (default sgd; vit: adamw)", BASES, of=("sam",))
    weight_decay: float = setting(None, "strength (default 0.0005; adamw: 0.1)", NOT_NEGATIVE)
    decay_norms: bool = setting(True, "weight decay on biases and norms too")
    momentum: float = setting(0.9, "momentum of SGD", DECAY, of=("sgd",))
    rho: float = setting(0.05, "radius of SAM's perturbation", NOT_NEGATIVE, of=("sam",))
    adaptive: bool = setting(False, "ASAM: large weights are perturbed more", of=("sam",))
    average: bool = setting(False, "Average SAM: perturb in a random direction", of=("sam",))
    # IRE on top of the optimizer
    kappa: float = setting(1.0, "flat steps are 1 + kappa times as long", NOT_NEGATIVE, of=("ire",))
    gamma: float = setting(0.9, "flat fraction of the coordinates", FRACTION, of=("ire",))
    interval: int = setting(10, "steps until IRE looks again where it is flat", COUNT, of=("ire",))
    ire_epoch: int = setting(
        None, "first epoch with IRE, from 0 (default 0.6 of --epochs)", STEPS, of=("ire",)
    )
    ire_warmup: int = setting(None, "steps before IRE, instead of --ire-epoch", STEPS, of=("ire",))
    curvature: str = setting("fisher", FLAT, ("squares", "fisher"), of=("ire",))
    probe: str = setting("fixed", PROBE, ("fixed", "fresh"), of=("fisher",))
    kappa_decay: bool = setting(False, "kappa follows the learning rate down", of=("ire",))
    # files and reports
    data_dir: str = setting("data", "folder of the pictures, downloaded if missing", resume=True)
    limit_test: int = setting(None, "test on the first N (default all)", COUNT, resume=True)
    tta: bool = setting(False, "test on each picture and its mirror image", resume=True)
    eval_interval: int = setting(1, "epochs between tests", COUNT, resume=True)
    checkpoint_interval: int = setting(
        None, "epochs between checkpoints (default a twentieth of --epochs)", COUNT, resume=True
    )
    sharpness: bool = setting(False, "at the end: Tr(Hessian) and lambda_max", resume=True)
    sharpness_images: int = setting(
        None, "training pictures for this (default 1024; on a CPU: 128)", COUNT, resume=True
    )
    sharpness_probes: int = setting(16, "random vectors for the trace", SOME, resume=True)
    sharpness_products: int = setting(60, "Hessian products for lambda_max", SOME, resume=True)
    seeds: int = setting(1, "runs with --seed, --seed + 1, ...", COUNT, command=True)

    def __post_init__(self):
        super().__post_init__()
        self.fill_in()
        divides = self.batch_size % common.RANKS == 0
        check(self, "batch_size", divides, f"a multiple of the {common.RANKS} ranks")
        one = not (self.average and self.adaptive)
        check(self, "average", one, "one of --adaptive and --average")
        last = f"0 to --epochs - 1, {self.epochs - 1}"
        check(self, "warmup", self.warmup < self.epochs, last)
        check(self, "ire_epoch", not has_ire(self) or self.ire_epoch < self.epochs, last)

    def fill_in(self):
        """Chooses what was not given. Where two lines have a setting, the first one counts."""
        self.defaults(**PRESETS[self.preset])
        if self.data == "digits":
            self.defaults(model="resnet8", augment="shift", epochs=10, batch_size=32)
        self.defaults(model="resnet56", epochs=200, batch_size=128)
        vit = self.model.startswith("vit")
        self.defaults(optimizer="admire" if vit else "sgd-ire")
        if not has_sam(self):
            self.base = "adamw" if self.optimizer.startswith("ad") else "sgd"
        self.defaults(base="adamw" if vit else "sgd")
        if self.base == "adamw":
            self.defaults(lr=1e-3, weight_decay=0.1)
        self.defaults(lr=0.1, weight_decay=5e-4)
        if self.preset == "quick":
            self.defaults(warmup=min(2, self.epochs // 4))
        self.defaults(augment="mixup" if vit else "basic", warmup=self.epochs // 10 if vit else 0)
        self.defaults(ire_epoch=self.epochs * 6 // 10)
        self.defaults(checkpoint_interval=max(1, self.epochs // 20))

    def defaults(self, **values):
        for name, value in values.items():
            if getattr(self, name) is None:
                setattr(self, name, value)


def configure(typed):
    """Returns the settings of a run: of the run that goes on < --config < typed."""
    c = Config(**common.collect(Config, typed))
    parts = {c.base, "sam" if has_sam(c) else "", "ire" if has_ire(c) else ""}
    parts |= {"fisher"} if has_ire(c) and c.curvature == "fisher" else set()
    common.refuse_unread(Config, typed, parts, f"--optimizer {c.optimizer}")
    both = {"ire_epoch", "ire_warmup"} <= set(c.given)
    check(c, "ire_warmup", not both, "one of --ire-epoch and --ire-warmup")
    return c


def has_sam(c):
    return c.optimizer.startswith("sam")


def has_ire(c):
    return c.optimizer.endswith("ire")


# ------------------------------------------------------------------------------------ networks
def conv(n_in, n_out, stride=1):
    return nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)


class Block(nn.Module):
    """Two convolutions, each normalised afterwards, and a shortcut (He et al. 2016)."""

    def __init__(self, n_in, n_out, stride):
        super().__init__()
        self.conv1 = conv(n_in, n_out, stride)
        self.norm1 = nn.BatchNorm2d(n_out)
        self.conv2 = conv(n_out, n_out)
        self.norm2 = nn.BatchNorm2d(n_out)
        self.shortcut = nn.Sequential()
        if n_in != n_out:
            self.shortcut.append(nn.Conv2d(n_in, n_out, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(n_out))

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.shortcut(x) + self.norm2(self.conv2(y)), inplace=True)


class WideBlock(nn.Module):
    """Two convolutions, each normalised first, and a shortcut (Zagoruyko and Komodakis 2016)."""

    def __init__(self, n_in, n_out, stride):
        super().__init__()
        self.conv1 = conv(n_in, n_out, stride)
        self.norm1 = nn.BatchNorm2d(n_in)
        self.conv2 = conv(n_out, n_out)
        self.norm2 = nn.BatchNorm2d(n_out)
        self.shortcut = nn.Sequential()
        if n_in != n_out:
            self.shortcut.append(nn.Conv2d(n_in, n_out, 1, stride, bias=False))

    def forward(self, x):
        y = F.relu(self.norm1(x), inplace=True)
        shortcut = self.shortcut(y) if self.shortcut else x
        y = F.relu(self.norm2(self.conv1(y)), inplace=True)
        return shortcut + self.conv2(y)


def stages(block, width, blocks):
    """Three stages. Each has half the height and width of the one before, twice the channels."""
    layers = []
    n_in = 16
    for stage in range(3):
        n_out = width * 2**stage
        for i in range(blocks):
            stride = 2 if stage > 0 and i == 0 else 1
            layers.append(block(n_in, n_out, stride))
            n_in = n_out
    return layers


def head(width, classes):
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]


def initialised(model):
    """He et al. 2015."""
    for m in model.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
    nn.init.zeros_(model[-1].bias)
    return model


def resnet(depth, classes):
    """CIFAR's ResNet with projection shortcuts."""
    layers = [conv(3, 16), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
    layers += stages(Block, 16, (depth - 2) // 6)
    return initialised(nn.Sequential(*layers, *head(64, classes)))


def wide_resnet(depth, factor, classes):
    """WRN-depth-factor."""
    width = 64 * factor
    layers = [conv(3, 16), *stages(WideBlock, 16 * factor, (depth - 4) // 6)]
    layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    return initialised(nn.Sequential(*layers, *head(width, classes)))


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021; widths and initialisation of DeiT)."""

    def __init__(self, width, heads, classes, depth=12, patch=4, size=32):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.head = nn.Linear(width, classes)
        self.token = nn.Parameter(torch.empty(1, 1, width))
        self.position = nn.Parameter(torch.empty(1, (size // patch) ** 2 + 1, width))
        block = nn.TransformerEncoderLayer(
            width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        norm = nn.LayerNorm(width)
        self.blocks = nn.TransformerEncoder(block, depth, norm, enable_nested_tensor=False)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                nn.init.trunc_normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, x):
        """(batch, 3, size, size) to logits (batch, classes)."""
        x = self.patches(x).flatten(2).transpose(1, 2)  # (batch, patches, width)
        x = torch.cat((self.token.expand(len(x), -1, -1), x), 1) + self.position
        return self.head(self.blocks(x)[:, 0])


# ---------------------------------------------------------------------------------------- data
URL = "https://www.cs.toronto.edu/~kriz/"
SHARE = slice(common.RANK, None, common.RANKS)  # this rank takes these of the pictures
CIFAR = {  # the official archives; the last file has the test pictures
    "cifar10": dict(
        archive="cifar-10-python.tar.gz",
        sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        folder="cifar-10-batches-py",
        files=[*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"],
        labels=b"labels",
        classes=10,
    ),
    "cifar100": dict(
        archive="cifar-100-python.tar.gz",
        sha256="85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
        folder="cifar-100-python",
        files=["train", "test"],
        labels=b"fine_labels",
        classes=100,
    ),
}


class ArraysOnly(pickle.Unpickler):
    """Reads arrays, bytes, lists and dicts. A pickle that names anything else could run code, and
    torchvision's reader would run that code."""

    KNOWN = {
        "ndarray": np.ndarray,
        "dtype": np.dtype,
        "_reconstruct": np.empty(0).__reduce__()[0],
        "encode": codecs.encode,  # Python 3 writes bytes for Python 2 in this way
    }

    def find_class(self, module, name):
        if name in self.KNOWN:
            return self.KNOWN[name]
        text = f"it asks for {module}.{name}, allowed are arrays, bytes, lists and dicts"
        raise pickle.UnpicklingError(text)


def load_cifar(name, data_dir):
    """((x, y), (test_x, test_y), classes): pictures (n, 32, 32, 3) uint8 and labels (n,)."""
    about = CIFAR[name]
    folder = Path(data_dir, about["folder"])
    if common.RANK == 0 and not folder.exists():
        archive = Path(data_dir, about["archive"])
        otherwise = f"--data-dir: put {archive.name}, or the same unpacked, into {data_dir}"
        common.download(URL + archive.name, archive, about["sha256"], otherwise)
        with common.instead(otherwise), tempfile.TemporaryDirectory(dir=data_dir) as half:
            shutil.unpack_archive(archive, half, filter="data")
            os.replace(Path(half, folder.name), folder)
    common.over_ranks([0])  # the other ranks wait
    parts = [read_pictures(folder / file, about) for file in about["files"]]
    train = tuple(np.concatenate(v) for v in zip(*parts[:-1], strict=True))
    return train, parts[-1], about["classes"]


def read_pictures(path, about):
    """Pictures and labels of one file of the unpacked archive."""
    classes = about["classes"]
    with common.instead(f"--data-dir: got {path}, allowed is a file of the unpacked archive"):
        with open(path, "rb") as f:
            batch = ArraysOnly(f, encoding="bytes").load()
        x, y = batch[b"data"], np.array(batch[about["labels"]])
        if x.dtype != np.uint8 or x.shape != (len(y), 3072):
            raise ValueError("data must be uint8 of shape (n, 3072), with n labels")
        if y.ndim != 1 or y.dtype.kind not in "iu" or not 0 <= y.min() <= y.max() < classes:
            raise ValueError(f"labels must be n whole numbers, 0 to {classes - 1}")
    x = x.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(x), y.astype(np.int64)


def load_digits():
    """What load_cifar returns, of scikit-learn's 1797 digits. A random fifth is the test."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise common.BadInput("--data: digits want pip install scikit-learn") from None

    x, y = load_digits(return_X_y=True)
    x = torch.tensor(x).view(-1, 1, 8, 8) * (255 / 16)
    x = F.interpolate(x, size=32, mode="bilinear").round().byte()
    x = x.permute(0, 2, 3, 1).repeat(1, 1, 1, 3).numpy()
    test = np.random.default_rng(0).permutation(len(x)) % 5 == 0
    return (x[~test], y[~test]), (x[test], y[test]), 10


def shift_and_flip(x, u, flip):
    """Moves pictures x (b, h, w, c) by up to 4 pixels; black moves in. With `flip`, half of the
    pictures are mirrored. u (b, 3) are uniform numbers."""
    i = torch.arange(x.shape[1], device=x.device)
    sample = torch.arange(len(x), device=x.device)[:, None, None]
    rows = i + (u[:, 0, None] * 9).long()  # (b, h), in the padded picture
    columns = i + (u[:, 1, None] * 9).long()
    if flip:
        columns = torch.where(u[:, 2, None] < 0.5, columns.flip(1), columns)
    return F.pad(x, (0, 0, 4, 4, 4, 4))[sample, rows[:, :, None], columns[:, None, :]]


def cutout(x, u, length):
    """Puts a square of zeros around a random pixel of each picture x (b, c, h, w) (DeVries and
    Taylor 2017)."""
    i = torch.arange(x.shape[2], device=x.device)
    row, column = ((u[:, :2] * len(i)).long() - 0.5).unbind(1)
    rows = (i - row[:, None]).abs() < length / 2  # (b, h)
    columns = (i - column[:, None]).abs() < length / 2
    return x.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)


class Data:
    """Holds all pictures as uint8 on the device. A batch is a function of the seed and the step, so
    a resumed run sees the same batches."""

    def __init__(self, c):
        digits = c.data == "digits"
        train, test, self.classes = load_digits() if digits else load_cifar(c.data, c.data_dir)
        self.c = c
        self.epoch = None  # to which self.order and self.uniform belong
        digest = hashlib.sha256()
        for part in (*train, *test):
            digest.update(part)
        self.sha256 = digest.hexdigest()
        (x, y), (test_x, test_y) = train, test
        left = len(x) - c.holdout
        check(c, "holdout", left > 0, f"fewer than the {len(x)} training pictures")
        self.tests = {"test": (self.put(test_x[: c.limit_test]), self.put(test_y[: c.limit_test]))}
        if c.holdout:
            self.tests["val"] = self.put(x[left:]), self.put(y[left:])
        x, y = x[:left][: c.limit_train], y[:left][: c.limit_train]
        check(c, "batch_size", c.batch_size <= len(x), f"1 to {len(x)}, the training pictures")
        self.steps_per_epoch = len(x) // c.batch_size
        self.steps = c.epochs * self.steps_per_epoch
        mean, square = x.mean((0, 1, 2)), np.square(x, dtype=np.uint16).mean((0, 1, 2))
        std = (square - mean**2 + 1e-6) ** 0.5
        self.x, self.y = self.put(x), self.put(y)
        self.mean = self.put(mean.astype(np.float32)).view(3, 1, 1)
        self.std = self.put(std.astype(np.float32)).view(3, 1, 1)

    def put(self, x):
        return torch.tensor(x, device=self.c.device)

    def normalized(self, x):
        """uint8 (b, h, w, 3) to float32 (b, 3, h, w) in channels-last memory."""
        return (x.permute(0, 3, 1, 2) - self.mean) / self.std

    def draw_epoch(self, epoch):
        """All random numbers of an epoch go to the device at once, so no step waits for a copy."""
        c = self.c
        steps = self.steps_per_epoch
        order = np.random.default_rng((c.seed, 0, epoch)).permutation(len(self.x))
        order = order[: steps * c.batch_size].reshape(steps, -1)
        rng = np.random.default_rng((c.seed, 1, epoch))
        uniform = rng.random((steps, c.batch_size, 5), np.float32)
        self.order = self.put(order[:, SHARE])  # (steps, b)
        self.uniform = self.put(uniform[:, SHARE])  # (steps, b, 5)
        self.weights = rng.beta(0.5, 0.5, steps)
        self.epoch = epoch

    def batch(self, step):
        """This rank's share of a step: pictures (b, 3, h, w), augmented, and labels (b,), after
        mixup (b, classes)."""
        epoch, i = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            self.draw_epoch(epoch)
        kind = self.c.augment
        index = self.order[i]
        u = self.uniform[i]
        x, y = self.x[index], self.y[index]
        if kind != "none":
            x = shift_and_flip(x, u[:, :3], flip=kind != "shift")
        x = self.normalized(x)
        if kind == "cutout":
            x = cutout(x, u[:, 3:], 16 if self.classes == 10 else 8)
        if kind == "mixup":  # of the pictures of a rank (Zhang et al. 2018)
            y = F.one_hot(y, self.classes).float()
            weight = float(self.weights[i])
            x = weight * x + (1 - weight) * x.flip(0)
            y = weight * y + (1 - weight) * y.flip(0)
        return x, y

    def first_batch(self):
        """The pictures of a fixed probe, this rank's share: the first ones, as they are."""
        return self.normalized(self.x[: self.c.batch_size][SHARE])


# ------------------------------------------------------------------------------------ training
def make_optimizer(model, c: Config):
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": c.weight_decay},
        {"params": others, "weight_decay": c.weight_decay if c.decay_norms else 0.0},
    ]
    if c.base == "sgd":
        optimizer = torch.optim.SGD(groups, c.lr, momentum=c.momentum)
    else:
        optimizer = torch.optim.AdamW(groups, c.lr, fused=c.device != "mps")
    if has_sam(c):
        optimizer = SAM(optimizer, rho=c.rho, adaptive=c.adaptive, average=c.average)
    if has_ire(c):
        about = {"interval": c.interval, "warmup": c.ire_warmup, "curvature": c.curvature}
        optimizer = IRE(optimizer, kappa=c.kappa, gamma=c.gamma, **about)
    return optimizer


def learning_rate(c: Config, step, per_epoch):
    warmup, steps = c.warmup * per_epoch, c.epochs * per_epoch
    if step < warmup:
        return c.lr * (step + 1) / warmup
    if c.schedule == "constant":
        return c.lr
    return c.lr * (0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (steps - warmup)))


def set_up(c: Config, data):
    """Returns the network as training calls it, and the parts of a checkpoint."""
    common.set_up_torch(c)
    torch.backends.cudnn.benchmark = not c.deterministic
    model = MODELS[c.model](data.classes).to(c.device, memory_format=torch.channels_last)
    if c.ire_warmup is None:
        c.ire_warmup = c.ire_epoch * data.steps_per_epoch
    in_time = c.ire_warmup < data.steps or not has_ire(c)
    check(c, "ire_warmup", in_time, f"0 to the last step, {data.steps - 1}")
    scaler = torch.amp.GradScaler(c.device, enabled=c.dtype == "float16")
    parts = {"model": model, "optimizer": make_optimizer(model, c), "scaler": scaler}
    forward = torch.compile(model) if c.compile else model
    if dist.is_initialized():
        forward = nn.parallel.DistributedDataParallel(forward)
    return forward, parts


def train(c: Config):
    """Trains one network. Returns its settings and the last of each value in its log, such as
    train_loss and test_acc in percent."""
    common.choose_device(c, float16=not has_sam(c))  # SAM wants a closure, GradScaler takes none
    common.choose_folder(c)
    data = Data(c)
    forward, parts = set_up(c, data)
    if c.resume:
        same = common.read_checkpoint(c.out, mmap=True)["data"] == data.sha256
        check(c, "data", same, f"the pictures that {c.out} began with; these differ")
    with common.Run(c, data.steps) as run:
        step = run.load(**parts)["step"] if c.resume else 0
        banner(c, data, parts["model"], step)
        if step == data.steps:  # a run at its end is tested again: --tta may be new
            run.log(step, **evaluate(c, data, parts["model"]))
        loop(run, data, forward, parts, step)
        if c.sharpness:
            run.log(data.steps, **measure(run, data, parts["model"]))
        # The other ranks wait here until the first one has written its log.
        if run.asked_to_stop():  # during the last step: no other run begins
            raise run.stopped()
    log = common.read_log(c.out)
    if common.RANK == 0:
        draw(c, log)
    last = {name: value for row in log for name, value in row.items()}
    return dataclasses.asdict(c) | last


def loop(run, data, forward, parts, step):
    """Makes all steps from this one on. Logs, tests and saves between them."""
    c = run.c
    model, optimizer, scaler = parts.values()
    losses = []

    def closure():
        """Computes the loss of a batch and its gradients. SAM calls it twice, at the weights and up
        the hill. The second pass leaves the running statistics of batch norm alone."""
        nonlocal passes
        passes += 1
        optimizer.zero_grad()
        with frozen_batch_norm(model) if passes == 2 else contextlib.nullcontext(), autocast(c):
            logits = forward(x)
        loss = F.cross_entropy(logits.float(), y, label_smoothing=c.label_smoothing)
        scaler.scale(loss).backward()
        return loss.detach()

    run.start_clock()
    while step < data.steps:
        lr = learning_rate(c, step, data.steps_per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr
            if c.kappa_decay:
                group["kappa"] = c.kappa * lr / c.lr
        torch.manual_seed(hash((c.seed, step, common.RANK)))  # for drawn labels and Average SAM
        x, y = data.batch(step)

        if getattr(optimizer, "probe_due", False):
            with optimizer.probe(forward):
                with autocast(c):
                    logits = forward(x if c.probe == "fresh" else data.first_batch())
                scaler.scale(sampled_cross_entropy(logits.float())).backward()

        passes = 0
        if has_sam(c):
            losses.append(optimizer.step(closure))
        else:
            losses.append(closure())
            scaler.step(optimizer)
            scaler.update()
        step += 1
        losses = report(run, data, parts, step, losses)


def report(run, data, parts, step, losses):
    """Logs, tests and saves where this is due. Returns the losses that are not yet logged."""
    c = run.c
    model, optimizer, _ = parts.values()

    def due(interval):
        return step % interval == 0 or step == data.steps

    stop = run.asked_to_stop()
    test_due = due(c.eval_interval * data.steps_per_epoch)
    save_due = due(c.checkpoint_interval * data.steps_per_epoch) or stop
    if not (due(c.log_interval) or test_due or save_due):
        return losses
    means = common.over_ranks(torch.stack(losses).cpu() / common.RANKS)  # waits for the device
    passed = run.stop_clock()
    run.check_finite(step, means, ADVICE)
    flat = optimizer.flat_share() if has_ire(c) and step > c.ire_warmup else {}
    speed = round(len(means) * c.batch_size / passed, 1)
    lr = optimizer.param_groups[0]["lr"]
    run.log(step, train_loss=statistics.mean(means), lr=lr, **flat, images_per_second=speed)
    if test_due:
        tested = evaluate(c, data, model)
        run.check_finite(step, [tested["test_loss"]], ADVICE)
        run.log(step, **tested)
    if save_due:
        run.save(step, data=data.sha256, **parts)
    if stop and step < data.steps:
        raise run.stopped()
    run.start_clock()
    return []


def autocast(c):
    return torch.autocast(c.device, getattr(torch, c.dtype), enabled=c.dtype != "float32")


@torch.no_grad()
def evaluate(c, data, model):
    """Returns accuracy in percent and loss, without label smoothing, of each set of pictures."""
    if dist.is_initialized():
        for buffer in model.buffers():  # the statistics of batch norm, each rank's own
            dist.broadcast(buffer, 0)
    model.eval()
    found = {}
    for name, (x, y) in data.tests.items():
        sums = torch.zeros(2, device=c.device)
        for pictures, labels in zip(x[SHARE].split(500), y[SHARE].split(500), strict=True):
            pictures = data.normalized(pictures)
            with autocast(c):
                logits = model(pictures).float()
                if c.tta:
                    logits = (logits + model(pictures.flip(3)).float()) / 2
            right = (logits.argmax(1) == labels).sum()
            sums += torch.stack((F.cross_entropy(logits, labels, reduction="sum"), right))
        loss, right = common.over_ranks(sums.cpu())
        found |= {f"{name}_acc": 100 * right / len(x), f"{name}_loss": loss / len(x)}
    model.train()
    return found


def measure(run, data, model):
    """Measures the sharpness of the training loss, in float32, on pictures as they are."""
    c = run.c
    images = min(c.sharpness_images or (128 if c.device == "cpu" else 1024), len(data.x))
    size = min(c.batch_size, images)
    batches = images // size

    def loss(i):
        x = data.normalized(data.x[i * size : (i + 1) * size])
        y = data.y[i * size : (i + 1) * size]
        return F.cross_entropy(model(x), y, label_smoothing=c.label_smoothing)

    losses = [functools.partial(loss, i) for i in range(batches)]
    most = batches * (c.sharpness_probes + c.sharpness_products)
    quiet = common.RANK > 0 or not sys.stderr.isatty()
    with tqdm(total=most, unit="product", desc="sharpness", disable=quiet) as bar:

        def tick():
            bar.update()
            if run.signal:
                raise run.stopped()

        sizes = c.sharpness_probes, c.sharpness_products
        found = sharpness(model, losses, *sizes, seed=c.seed, tick=tick)
    if found["lambda_max_error"] > 0.01 * abs(found["lambda_max"]):
        common.say(note="lambda_max is not within 1%; allow more --sharpness-products")
    return found | {"images": batches * size}


def banner(c, data, model, step):
    """Prints what will be trained, and how."""
    parameters = sum(p.numel() for p in model.parameters())
    tests = "".join(f", {len(x):,} for {name}" for name, (x, _) in data.tests.items())
    method = f"{c.optimizer}, lr {c.lr:g}, {c.schedule}, weight decay {c.weight_decay:g}"
    if has_sam(c):
        kind = "ASAM" if c.adaptive else "Average SAM" if c.average else "SAM"
        method += f"; {kind} on top of {c.base}, rho {c.rho:g}"
    start = f"goes on from step {step}"
    if step == 0:
        start = f"the accuracy starts near {100 / data.classes:g}%"
    common.say(
        model=f"{c.model}, {parameters:,} parameters",
        data=f"{c.data}, {len(data.x):,} pictures to train on{tests}; augment {c.augment}",
        device=f"{common.RANKS} x {c.device}, {c.dtype}" + (", compiled" if c.compile else ""),
        optimizer=method,
    )
    if has_ire(c):
        way = f"kappa {c.kappa:g}, gamma {c.gamma:g}, a mask every {c.interval} steps"
        common.say(IRE=f"{way}, {c.curvature}; on from step {c.ire_warmup}")
    common.say(run=f"{data.steps} steps, {c.epochs} epochs, into {c.out}; {start}")


def draw(c, log):
    """Draws OUT/loss.png: losses, accuracies, the learning rate and, with IRE, the flat share."""
    hard = f"training: labels smoothed\nby {c.label_smoothing:g}, augment {c.augment}"
    labels = {
        "loss": {"train_loss": hard, "test_loss": "test: neither"},
        "accuracy (%)": {"test_acc": "test", "val_acc": "held out"},
        "learning rate": {"lr": "lr"},
        "flat share of the coordinates": {"flat": "flat"},
    }
    panels = {}
    for title, keys in labels.items():
        panels[title] = {label: common.curve(log, key) for key, label in keys.items()}
    common.draw(Path(c.out) / "loss.png", panels)


# -------------------------------------------------------------------------------- command line
def command(typed):
    if typed.get("seeds", 1) > 1:
        return train_seeds(typed)
    found = train(configure(typed))
    result = f"{found['test_acc']:.2f}% after {found['step']} steps, {found['seconds']:.0f} s"
    common.say(accuracy=result)
    common.say(figure=Path(found["out"]) / "loss.png")


def train_seeds(typed):
    """Trains as many runs as --seeds says, in OUT/seed-N, and prints the means."""
    first = configure(typed | {"resume": False}).seed  # typed, or of --config
    seeds = range(first, first + typed["seeds"])
    changes = {f"seed-{seed}": {"seed": seed} for seed in seeds}
    home = f"{Config.home}-seeds"
    _, settings = common.settings_of_runs(home, typed, changes, configure)
    runs = [train(c) for c in settings]
    for key in ("test_acc", "val_acc", "test_loss", "trace", "lambda_max"):
        values = [found[key] for found in runs if key in found]
        if values:
            error = statistics.stdev(values) / len(values) ** 0.5
            text = f"{statistics.mean(values):.4g} +- {error:.2g}"
            common.say(**{key: f"{text}, mean and standard error of {len(values)} seeds"})


def main(arguments=None):
    memory = "lower --batch-size, and --lr with it, or take a smaller --model"
    return common.main(Config, __doc__, command, arguments, memory)


if __name__ == "__main__":
    common.leave(main())
