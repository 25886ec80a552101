"""Train an image classifier with SGD, AdamW or SAM, each alone or with IRE over it:

    python train_cifar.py --data digits                      # scikit-learn's digits, no download
    python train_cifar.py --preset quick                     # CIFAR-10, a small network: minutes
    python train_cifar.py --preset quick --limit-train 5000  # the same on a CPU
    python train_cifar.py                                    # ResNet-56, 200 epochs: wants a GPU
    python train_cifar.py --model vit_t --data cifar100      # AdmIRE
    python train_cifar.py --optimizer sam-ire --seeds 3 --sharpness    # mean, error, Tr(Hessian)
    torchrun --standalone --nproc_per_node 2 train_cifar.py  # the same batches over two GPUs
    python train_cifar.py --resume                           # go on after Ctrl-C

A resumed run ends with the same bits on a CPU, and on CUDA with --deterministic.
Top to bottom: settings, model, data, files, optimizers, training, sharpness, command line.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds, needs no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import http.client
import importlib.util
import json
import math
import os
import pickle
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
import urllib.request
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

if importlib.util.find_spec("ire") is None:
    sys.exit("train_cifar.py: ire is missing: put ire.py beside this file")
from ire import IRE, SAM, frozen_batch_norm, sampled_cross_entropy

# torchrun sets all of these; some of them alone are left over from something else
LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCHED = all(name in os.environ for name in LAUNCH)
RANK = int(os.environ["RANK"]) if LAUNCHED else 0
LOCAL_RANK = int(os.environ["LOCAL_RANK"]) if LAUNCHED else 0
RANKS = int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1


# ------------------------------------------------------------------------------------ settings
class Halt(Exception):
    """Ends the script with one line and this exit code."""

    code = 1


class BadInput(Halt, ValueError):
    """What the user can mend."""

    code = 2


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a setting may be, and the words for them."""

    low: float
    high: float
    words: str

    def __contains__(self, x):
        return self.low <= x <= self.high  # not NaN


COUNT = Range(1, 2**31 - 1, "1 or more, below 2^31")
EPOCHS = Range(1, 10**6, "1 or more, up to 10^6")
BATCH = Range(1, 2**20, "1 or more, up to 2^20")
STEPS = Range(0, 2**31 - 1, "0 or more, below 2^31")
SEED = Range(0, 2**62 - 1, "0 to 2^62 - 1")
POSITIVE = Range(1e-30, 1e9, "a number above 0, from 1e-30 to 1e9")
NOT_NEGATIVE = Range(0, 1e9, "0 or more, up to 1e9")
DECAY = Range(0, math.nextafter(1, 0), "0 or more and below 1")
FRACTION = Range(math.nextafter(0, 1), math.nextafter(1, 0), "above 0 and below 1")
DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("float32", "bfloat16", "float16")
DATA = ("cifar10", "cifar100", "digits")
NETWORKS = ("resnet56", "resnet20", "resnet8", "wrn28_10", "wrn16_8", "vit_t", "vit_s")
AUGMENTATIONS = ("none", "shift", "basic", "cutout", "mixup")
OPTIMIZERS = ("sgd", "adamw", "sam", "sgd-ire", "admire", "sam-ire")

PRESETS = {
    "paper": {},  # the defaults of Config
    "quick": dict(model="resnet8", epochs=8, batch_size=64, warmup=2),
}
# What a base, data or a model wants instead of the defaults; the first that has a setting counts.
# SGD at the default rate fails on digits.
SUITED = {
    "adamw": dict(lr=1e-3, weight_decay=0.1),
    "digits": dict(augment="shift", epochs=10, batch_size=32, lr=0.02),
    "vit": dict(augment="mixup"),
}


def setting(default, help, allowed=None, resume=False, command=False):
    """A field that complete() fills in where it was not given. allowed: names or a Range.
    resume: it may change on --resume. command: what to do now, which no run hands on."""
    words = allowed.words if isinstance(allowed, Range) else ", ".join(allowed or ())
    about = {"default": default, "help": help, "allowed": allowed, "words": words}
    marks = {"resume": resume or command, "command": command}
    return dataclasses.field(default=None, metadata=about | marks)


@dataclasses.dataclass
class Config:
    """Every setting. None is what was not given."""

    # the model and its pictures
    preset: str = setting("paper", "quick is small: minutes", tuple(PRESETS))
    data: str = setting("cifar10", "pictures; digits are scikit-learn's, at 32x32", DATA)
    limit_train: int = setting(None, "training pictures, the first so many (default all)", COUNT)
    model: str = setting("resnet56", "network", NETWORKS)
    augment: str = setting("basic", "shifts and flips; cutout and mixup add to it", AUGMENTATIONS)
    # the schedule
    epochs: int = setting(200, "passes over the training pictures", EPOCHS)
    batch_size: int = setting(128, "pictures in a step, over all ranks", BATCH)
    warmup: int = setting(None, "epochs to the peak (default 0, vit a tenth, quick 2)", STEPS)
    lr: float = setting(0.1, "peak learning rate", POSITIVE)
    schedule: str = setting("cosine", "of the rate after the warm-up", ("cosine", "constant"))
    label_smoothing: float = setting(
        0.1, "of the training loss (0.1111 leaves 0.9 to the right one of 10 classes)", DECAY
    )
    # the optimizer
    optimizer: str = setting(None, "admire is over AdamW (default sgd-ire, vit admire)", OPTIMIZERS)
    base: str = setting(None, "SAM's (default sgd, vit adamw)", ("sgd", "adamw"))
    weight_decay: float = setting(5e-4, "the base's", NOT_NEGATIVE)
    decay_norms: bool = setting(True, "weight decay on biases and norms too")
    momentum: float = setting(0.9, "SGD's", DECAY)
    rho: float = setting(0.05, "SAM: length of the climb", NOT_NEGATIVE)
    adaptive: bool = setting(False, "SAM: climb along weight * gradient (ASAM)")
    average: bool = setting(False, "SAM: climb along a random direction (Average SAM)")
    # IRE over it
    kappa: float = setting(1.0, "flat steps are 1 + kappa times as long", NOT_NEGATIVE)
    gamma: float = setting(0.9, "flat fraction of the coordinates", FRACTION)
    interval: int = setting(10, "steps from one mask to the next (K)", COUNT)
    ire_epoch: int = setting(None, "first epoch with IRE, from 0 (default 0.6 of --epochs)", STEPS)
    ire_warmup: int = setting(None, "steps before IRE (default those before --ire-epoch)", STEPS)
    curvature: str = setting(
        "fisher", "source of the mask", ("fisher", "squares")
    )
    probe: str = setting(
        "fixed", "pictures for fisher: the first ones or the step's own", ("fixed", "fresh")
    )
    kappa_decay: bool = setting(False, "kappa follows the learning rate down")
    # how to compute it
    seed: int = setting(0, "of weights, batches and probes", SEED)
    device: str = setting("auto", "where to train", DEVICES)
    dtype: str = setting(None, "of the passes (default: what the device is fast at)", DTYPES)
    compile: bool = setting(None, "torch.compile (default on CUDA from sm_70)", resume=True)
    deterministic: bool = setting(False, "deterministic CUDA kernels, slower")
    # the run's folder and reports
    out: str = setting("runs/cifar", "folder of the run", command=True)
    data_dir: str = setting("data", "folder of the archive, fetched if missing", resume=True)
    limit_test: int = setting(
        None, "test pictures, the first so many (default all)", COUNT, resume=True
    )
    holdout: int = setting(
        0, "test on the last so many training pictures instead, for tuning", STEPS, resume=True
    )
    tta: bool = setting(False, "test on each picture and its mirror image", resume=True)
    log_interval: int = setting(50, "steps between lines of the log", COUNT, resume=True)
    eval_interval: int = setting(1, "epochs between tests", COUNT, resume=True)
    checkpoint_interval: int = setting(
        None, "epochs between checkpoints (default a twentieth of --epochs)", COUNT, resume=True
    )
    sharpness: bool = setting(False, "at the end Tr(Hessian) and lambda_max", resume=True)
    sharpness_images: int = setting(
        None, "first training pictures, for it (default 1024, on a CPU 128)", COUNT, resume=True
    )
    sharpness_probes: int = setting(
        None,
        "random vectors for the trace (default 16, on a CPU 8)",
        Range(2, 10**4, "2 to 10000"),
        resume=True,
    )
    sharpness_products: int = setting(
        None,
        "products with the Hessian for lambda_max, at most (default 60, on a CPU 20)",
        Range(2, 10**4, "2 to 10000"),
        resume=True,
    )
    # what to do
    resume: bool = setting(False, "go on from the checkpoint in --out", command=True)
    overwrite: bool = setting(False, "delete the run in --out first", command=True)
    seeds: int = setting(
        1, "runs with --seed, --seed + 1, ...; mean and error", COUNT, command=True
    )


FIELDS = {f.name: f for f in dataclasses.fields(Config)}
DEFAULTS = {name: f.metadata["default"] for name, f in FIELDS.items()}


def check(c, name, good, allowed):
    if not good:
        flag = "--" + name.replace("_", "-")
        raise BadInput(f"{flag}: got {str(getattr(c, name)):.60}, allowed is {allowed}")


def note(text):
    """One line beside the output, from one rank."""
    if RANK == 0:
        print(f"train_cifar.py: {text}", file=sys.stderr)


def complete(given: Config) -> Config:
    """Fills in what was not given: from the run that goes on, or from what suits the preset, model,
    data and base. Raises BadInput on values out of range or that would change that run."""
    c = dataclasses.replace(given, out=given.out or DEFAULTS["out"])
    c.device = None if c.device == "auto" else c.device
    if c.resume:
        known = handed_on(load_checkpoint(c.out)["config"])
        check_unchanged(c, known)
        fill_in(c, known)
    check_values(c)
    fill_in_defaults(c)
    check_values(c)
    choose(c, given)
    check_settings(c)
    return c


def fill_in(c, values):
    for name, value in values.items():
        if getattr(c, name) is None:
            setattr(c, name, value)


def fill_in_defaults(c):
    """One setting decides over others: the preset over the model, that over the optimizer, ..."""
    plain = DEFAULTS | PRESETS[c.preset or "paper"]
    fill_in(c, {name: plain[name] for name in ("preset", "data", "model")})
    vit = c.model.startswith("vit")
    fill_in(c, {"optimizer": "admire" if vit else "sgd-ire"})
    sam = c.optimizer.startswith("sam")
    adamw = vit if sam else c.optimizer.startswith("ad")
    fill_in(c, {"base": "adamw" if adamw else "sgd"})
    for name, values in SUITED.items():
        if name in (c.base, c.data) or c.model.startswith(name):
            fill_in(c, values)
    fill_in(c, plain)
    fill_in(c, {"warmup": c.epochs // 10 if vit else 0})
    fill_in(c, {"ire_epoch": c.epochs * 6 // 10})
    fill_in(c, {"checkpoint_interval": max(1, c.epochs // 20)})


def handed_on(config):
    """The settings of an earlier run that hold when it goes on; an older run has not all."""
    kept = {name: value for name, value in DEFAULTS.items() if not FIELDS[name].metadata["command"]}
    return {name: config.get(name, default) for name, default in kept.items()}


def check_unchanged(c, known):
    """Raises BadInput where c was given something else than the run that goes on has."""
    for name, value in known.items():
        given = getattr(c, name)
        free = given is None or FIELDS[name].metadata["resume"]
        began = f"{value} on --resume, as {c.out} began: it keeps its schedule"
        check(c, name, free or given == value, began)


def check_values(c):
    """Each value alone."""
    for name, f in FIELDS.items():
        value = getattr(c, name)
        allowed = f.metadata["allowed"]
        if name == "model":
            allowed = MODELS  # a test may have added one
        if value is not None:
            right = type(value) is f.type or (f.type is float and type(value) is int)
            check(c, name, right, f"a value of type {f.type.__name__}")
            check(c, name, allowed is None or value in allowed, f.metadata["words"])


def abilities(device):
    """(dtype, compile) that suit it: bfloat16 is slow on a CPU without AMX and before sm_80, and
    Triton fails before sm_70."""
    if device == "cuda":
        capability = torch.cuda.get_device_capability()
        return "bfloat16" if capability >= (8, 0) else "float16", capability >= (7, 0)
    known = device == "cpu" and hasattr(torch.cpu, "get_capabilities")
    amx = known and torch.cpu.get_capabilities().get("amx_bf16", False)
    return "bfloat16" if amx else "float32", False


@functools.cache
def compiler_error(device):
    """Why torch.compile does not work here (no C++ compiler, no Triton, ...), or an empty text."""
    try:
        torch.compile(torch.sin)(torch.ones(2, device=device))
    except Exception as e:  # it raises many kinds
        return " ".join(str(e).split()[:16])
    return ""


def choose(c, given):
    """Settings that depend on the machine."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    here = [name for name, found in there.items() if found] + ["cpu"]
    c.device = here[0] if c.device == "auto" else c.device
    check(c, "device", c.device in here, f"what this machine has: {', '.join(here)}")
    dtype, compiles = abilities(c.device)
    if c.dtype is None:  # GradScaler takes no closure, and without it float16 underflows
        c.dtype = "float32" if has_sam(c) and dtype == "float16" else dtype
    c.compile = compiles if c.compile is None else c.compile
    if c.compile and compiler_error(c.device):
        check(c, "compile", not given.compile, f"--no-compile here: {compiler_error(c.device)}")
        note(f"goes on without torch.compile: {compiler_error(c.device)}")
        c.compile = False
    small = c.device == "cpu"  # there a product takes seconds
    fill_in(c, {"sharpness_images": 128 if small else 1024})
    fill_in(c, {"sharpness_probes": 8 if small else 16, "sharpness_products": 20 if small else 60})


def check_settings(c):
    """What must fit together."""
    near = max(1, round(c.batch_size / RANKS)) * RANKS
    divides = c.batch_size % RANKS == 0
    check(c, "batch_size", divides, f"a multiple of the {RANKS} ranks, such as {near}")
    check(c, "resume", not (c.resume and c.overwrite), "one of --resume and --overwrite")
    fits = c.dtype != "float16" or (c.device != "cpu" and not has_sam(c))
    check(c, "dtype", fits, "float32 or bfloat16 on a CPU or with SAM")
    fits = has_sam(c) or c.base[:2] == c.optimizer[:2]
    check(c, "base", fits, f"to leave it out with --optimizer {c.optimizer}")
    for name in ("adaptive", "average"):
        check(c, name, has_sam(c) or not getattr(c, name), f"--no-{name} without SAM")
    check(c, "average", not (c.average and c.adaptive), "one of --adaptive and --average")
    for name in ("warmup", "ire_epoch"):
        check(c, name, getattr(c, name) < c.epochs, f"0 to --epochs - 1, {c.epochs - 1}")
    for name in ("out", "data_dir"):
        check(c, name, not Path(getattr(c, name)).is_file(), "a folder, not a file")


def has_sam(c: Config):
    return c.optimizer.startswith("sam")


def has_ire(c: Config):
    return c.optimizer.endswith("ire")


# --------------------------------------------------------------------------------------- model
def conv(n_in, n_out, stride=1):
    return nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)


class Block(nn.Module):
    """Two convolutions and a shortcut, normalised after them (He et al. 2016)."""

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
    """The same, normalised before them (Zagoruyko and Komodakis 2016)."""

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
    """Three stages, each with half the height and width and twice the channels of the last."""
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


MODELS = {  # each takes the number of classes
    "resnet56": functools.partial(resnet, 56),
    "resnet20": functools.partial(resnet, 20),
    "resnet8": functools.partial(resnet, 8),
    "wrn28_10": functools.partial(wide_resnet, 28, 10),
    "wrn16_8": functools.partial(wide_resnet, 16, 8),
    "vit_t": functools.partial(ViT, 192, 3),
    "vit_s": functools.partial(ViT, 384, 6),
}


def make_model(c: Config, classes):
    return MODELS[c.model](classes).to(c.device, memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------- data
# torchvision's reader unpickles without a check of what the file names, takes MD5, begins a broken
# download anew, and its wheel has to match torch's to the release. So ours stays.
URL = "https://www.cs.toronto.edu/~kriz/"


@dataclasses.dataclass(frozen=True)
class Archive:
    """An official archive: of its files the last is the test's."""

    name: str
    sha256: str
    folder: str
    files: tuple
    labels: bytes  # their key
    classes: int


CIFAR = {
    "cifar10": Archive(
        "cifar-10-python.tar.gz",
        "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        "cifar-10-batches-py",
        (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"),
        b"labels",
        10,
    ),
    "cifar100": Archive(
        "cifar-100-python.tar.gz",
        "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
        "cifar-100-python",
        ("train", "test"),
        b"fine_labels",
        100,
    ),
}


def latin1(text, _):
    """Python 3 writes bytes so for Python 2."""
    return text.encode("latin1")


class Unpickler(pickle.Unpickler):
    """A pickle that names more than arrays could run code."""

    KNOWN = {
        "ndarray": np.ndarray,
        "dtype": np.dtype,
        "_reconstruct": np.empty(0).__reduce__()[0],
        "encode": latin1,
    }

    def find_class(self, module, name):
        if name in self.KNOWN:
            return self.KNOWN[name]
        text = f"it asks for {module}.{name}, allowed are arrays, bytes, lists and dicts"
        raise pickle.UnpicklingError(text)


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def download(url, path: Path, digest):
    """Goes on where a connection broke, now or in a later run; of two processes one fetches it."""
    with lock(path.parent, wait=True):
        if not path.exists():
            fetch(url, path, digest)


def fetch(url, path, digest):
    part = path.with_name(f".{path.name}.part")
    part.touch()
    error = "its checksum is wrong"
    for _ in range(5):
        try:
            fetch_rest(url, part, path.name)
        except (OSError, http.client.HTTPException) as e:
            error = e
            if getattr(e, "code", 0) == 416 and sha256(part) != digest:
                part.write_bytes(b"")  # nothing is missing, yet it is not the archive
        if sha256(part) == digest:
            os.replace(part, path)
            return
    text = f"--data-dir: {url} can't be fetched ({error})"
    raise BadInput(f"{text}; run again to go on, or put the archive at {path}")


def fetch_rest(url, part, name):
    """Adds to the file what is missing of it."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={part.stat().st_size}-"})
    with urllib.request.urlopen(request, timeout=30) as reply:
        mode = "ab" if reply.status == 206 else "wb"  # 200: all of it comes
        quiet = not sys.stderr.isatty()
        with open(part, mode) as f:
            bar = tqdm.wrapattr(f, "write", total=reply.length, desc=name, disable=quiet)
            with bar as sink:
                shutil.copyfileobj(reply, sink)


def load_cifar(c):
    """((x, y), (test_x, test_y), classes): pictures (n, 32, 32, 3) uint8 and labels (n,)."""
    archive = CIFAR[c.data]
    path = Path(c.data_dir) / archive.name
    folder = Path(c.data_dir) / archive.folder
    packed = not folder.exists()
    if packed and not path.exists() and RANK == 0:
        download(URL + archive.name, path, archive.sha256)
    over_ranks([0])  # the others wait
    if packed and sha256(path) != archive.sha256:
        text = f"--data-dir: {path} has a wrong checksum; delete it to fetch it"
        raise BadInput(text)
    with tarfile.open(path) if packed else contextlib.nullcontext() as tar:
        parts = [read_pictures(archive, folder / name, tar) for name in archive.files]
    train = tuple(np.concatenate(v) for v in zip(*parts[:-1], strict=True))
    return train, parts[-1], archive.classes


def read_pictures(archive, path, tar):
    """Pictures and labels of one file, in the archive or unpacked."""
    try:
        with tar.extractfile(f"{archive.folder}/{path.name}") if tar else open(path, "rb") as f:
            batch = Unpickler(f, encoding="bytes").load()
        x, y = batch[b"data"], np.array(batch[archive.labels])
        right = x.dtype == np.uint8 and x.shape == (len(y), 3072) and y.dtype.kind == "i"
        if not right or not 0 <= y.min() <= y.max() < archive.classes:
            labels = f"n whole labels from 0 to {archive.classes - 1}"
            raise ValueError(f"it needs uint8 data (n, 3072) and {labels}")
    except Exception as e:  # a broken pickle raises almost anything
        text = f"--data-dir: {path}: {e!r:.200}; allowed is the archive, or it unpacked whole"
        raise BadInput(text) from None
    return x.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), y.astype(np.int64)


def load_digits():
    """The same of scikit-learn's 1797 handwritten digits, a random fifth held out for the test."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = torch.tensor(x).view(-1, 1, 8, 8) * (255 / 16)
    x = F.interpolate(x, size=32, mode="bilinear").round().byte()
    x = x.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
    test = np.random.default_rng(0).permutation(len(x)) % 5 == 0
    return (x[~test], y[~test]), (x[test], y[test]), 10


def shift_and_flip(x, u, flip):
    """x (b, h, w, c) moved by up to 4 pixels over black, with `flip` half of them mirrored.
    u (b, 3): uniform numbers."""
    i = torch.arange(x.shape[1], device=x.device)
    sample = torch.arange(len(x), device=x.device)[:, None, None]
    rows = i + (u[:, 0, None] * 9).long()  # (b, h), in the padded picture
    columns = i + (u[:, 1, None] * 9).long()
    if flip:
        columns = torch.where(u[:, 2, None] < 0.5, columns.flip(1), columns)
    return F.pad(x, (0, 0, 4, 4, 4, 4))[sample, rows[:, :, None], columns[:, None, :]]


def cutout(x, u, length):
    """x (b, c, h, w) with a square of zeros around a random pixel (DeVries and Taylor 2017)."""
    i = torch.arange(x.shape[2], device=x.device)
    row, column = ((u[:, :2] * len(i)).long() - 0.5).unbind(1)
    rows = (i - row[:, None]).abs() < length / 2  # (b, h)
    columns = (i - column[:, None]).abs() < length / 2
    return x.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)


class Data:
    """Pictures as uint8 on the device; a batch is a function of seed and step, so a resumed run
    sees the same."""

    def __init__(self, c):
        train, test, self.classes = load_digits() if c.data == "digits" else load_cifar(c)
        (x, y), (test_x, test_y) = train, test
        check(c, "holdout", c.holdout < len(x), f"fewer than the {len(x)} training pictures")
        if c.holdout:
            test_x, test_y = x[-c.holdout :], y[-c.holdout :]
            x, y = x[: -c.holdout], y[: -c.holdout]
        x, y = x[: c.limit_train].copy(), y[: c.limit_train]
        test_x, test_y = test_x[: c.limit_test], test_y[: c.limit_test]
        check(c, "batch_size", c.batch_size <= len(x), f"1 to {len(x)}, the training pictures")
        self.c = c
        self.sha256 = hashlib.sha256(x).hexdigest()
        self.epoch = None
        self.steps_per_epoch = len(x) // c.batch_size
        mean, square = x.mean((0, 1, 2)), np.square(x, dtype=np.uint16).mean((0, 1, 2))
        std = (square - mean**2 + 1e-6) ** 0.5
        self.x, self.y = self.put(x), self.put(y)
        self.test_x, self.test_y = self.put(test_x), self.put(test_y)
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
        self.order = self.put(order[:, RANK::RANKS])  # (steps, b)
        self.uniform = self.put(uniform[:, RANK::RANKS])  # (steps, b, 5)
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

    def probe_batch(self):
        """The pictures of a fixed probe, this rank's share: the first ones, as they are."""
        return self.normalized(self.x[RANK : self.c.batch_size : RANKS])


# --------------------------------------------------------------------------------------- files
def write_atomically(path: Path, write):
    """Whole or not at all, also when the power goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        part.replace(path)
    except (OSError, RuntimeError) as e:
        disk = e if isinstance(e, OSError) else e.__context__  # torch.save hides the disk's
        if not isinstance(disk, OSError):
            raise
        raise OSError(disk.errno, disk.strerror, str(path)) from None
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value):
    write_atomically(path, lambda f: f.write(json.dumps(value, indent=1).encode()))


@contextlib.contextmanager
def lock(folder: Path, wait=False):
    """Keeps other processes out of the folder while this one works there."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if os.name == "posix":
            import fcntl

            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                found = (folder / "config.json").exists()
                pid = (
                    json.loads((folder / "config.json").read_text()).get("pid", "?")
                    if found
                    else "?"
                )
                text = f"--out: got {folder}, allowed is a folder where no run goes on"
                raise BadInput(f"{text}; process {pid} trains there") from None
            except OSError:  # a network folder without locks
                pass
        yield


def load_checkpoint(folder):
    """The checkpoint in a run's folder."""
    path = Path(folder) / "checkpoint.pt"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        for key in ("data", "seconds", "model", "optimizer", "scaler"):
            saved[key]
        return saved | {"step": int(saved["step"]), "config": dict(saved["config"])}
    except pickle.UnpicklingError:  # whose own words advise to trust it
        why = "it is no file of tensors, numbers and texts"
    except Exception as e:  # torch.load raises many kinds
        why = f"{e!r:.300}"
    raise BadInput(f"--resume: {path} can't be read as a checkpoint: {why}; {which_run(folder)}")


def which_run(folder):
    runs = [str(p.parent) for p in sorted(Path(folder).glob("seed-*/checkpoint.pt"))]
    if runs:
        return f"{folder} is of --seeds: add --seeds {len(runs)}, or name {' or '.join(runs)}"
    return f"is {folder} the --out of a run?"


def save(run):
    c = run.c
    parts = {"model": run.model, "optimizer": run.optimizer, "scaler": run.scaler}
    saved = {"config": dataclasses.asdict(c), "data": run.data.sha256, "random": random_states(c)}
    saved |= {name: part.state_dict() for name, part in parts.items()}
    saved |= {name: getattr(run, name) for name in REACHED}
    try:
        if RANK == 0:
            path = Path(c.out) / "checkpoint.pt"
            write_atomically(path, lambda f: torch.save(saved, f))
    except OSError as e:
        raise Halt(f"{e}; last good checkpoint: {run.kept}") from None
    run.kept = f"step {run.step}"


def random_states(c):
    """Average SAM draws from them."""
    states = {"cpu": torch.get_rng_state()}
    if c.device != "cpu":
        states[c.device] = getattr(torch, c.device).get_rng_state()
    return states


def set_random_states(states):
    for device, state in states.items():
        module = torch if device == "cpu" else getattr(torch, device)
        module.set_rng_state(state)


def read_log(folder):
    """The whole lines of a run's log: a kill may leave half of one."""
    path = Path(folder) / "log.jsonl"
    text = path.read_text(errors="replace") if path.exists() else ""
    lines = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            entry = json.loads(line)
            int(entry["step"])
            lines.append(entry)
    return lines


def draw(c: Config):
    """OUT/loss.png: loss, test accuracy, learning rate and, with IRE, the flat share over steps."""
    from matplotlib.figure import Figure  # without pyplot, whose backend may be a notebook's

    panels = {
        "loss": ("train_loss", "test_loss"),
        "test accuracy (%)": ("test_acc",),
        "learning rate": ("lr",),
    }
    if has_ire(c):
        panels["flat share of the coordinates"] = ("flat",)
    figure = Figure(figsize=(3.2 * len(panels), 3), layout="constrained")
    log = read_log(c.out)
    for ax, (title, keys) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for key in keys:
            points = np.array([(r["step"], r[key]) for r in log if key in r]).reshape(-1, 2)
            ax.plot(*points.T, "o-", ms=3, label=key)
        if has_ire(c):
            ax.axvline(c.ire_warmup, color="grey", linestyle=":", label="IRE switches on")
        if len(keys) > 1:
            ax.legend()
        ax.set(xlabel="step", title=title)
    path = Path(c.out) / "loss.png"
    write_atomically(path, lambda f: figure.savefig(f, format="png", dpi=150))


def environment():
    """What a result depends on beside the settings."""
    commit = ""
    with contextlib.suppress(OSError):  # no git here
        command = ["git", "log", "-1", "--format=%H"]
        here = Path(__file__).parent
        done = subprocess.run(command, cwd=here, capture_output=True, text=True)
        commit = done.stdout.strip()
    return {"torch": torch.__version__, "commit": commit}


# ---------------------------------------------------------------------------------- optimizers
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


# ------------------------------------------------------------------------------------ training
REACHED = ("step", "seconds", "best_acc")  # what a checkpoint holds of a Run


@dataclasses.dataclass
class Run:
    """What the loop works with, and what it has reached."""

    c: Config
    data: Data
    model: nn.Module
    compiled: nn.Module  # the same weights, where --compile is on
    forward: nn.Module  # compiled, or DDP around it
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    seconds: float = 0.0  # of training, without tests and checkpoints
    best_acc: float = 0.0
    kept: str = "none"  # the last checkpoint

    @property
    def steps(self):
        return self.c.epochs * self.data.steps_per_epoch


def over_ranks(values, op=dist.ReduceOp.SUM):
    """Sums of numbers over all ranks, so that all decide alike; waits for them."""
    values = torch.as_tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(values, op)
    return values.tolist()


def autocast(c):
    return torch.autocast(c.device, getattr(torch, c.dtype), enabled=c.dtype != "float32")


def train_step(run):
    """One step, with a probe where it is due; returns the loss before it (Average SAM: there)."""
    c = run.c
    optimizer = run.optimizer
    scaler = run.scaler
    x, y = run.data.batch(run.step)
    lr = learning_rate(c, run.step, run.data.steps_per_epoch)
    for group in optimizer.param_groups:
        group["lr"] = lr
        if c.kappa_decay and has_ire(c):
            group["kappa"] = c.kappa * lr / c.lr
    if getattr(optimizer, "probe_due", False):
        probed = x if c.probe == "fresh" else run.data.probe_batch()
        with optimizer.probe(run.forward):
            with autocast(c):
                logits = run.forward(probed)
            scaler.scale(sampled_cross_entropy(logits.float())).backward()

    def backward():
        optimizer.zero_grad()
        with autocast(c):
            logits = run.forward(x)
        loss = F.cross_entropy(logits.float(), y, label_smoothing=c.label_smoothing)
        scaler.scale(loss).backward()
        return loss.detach()

    if has_sam(c):
        return sam_step(run, backward)
    loss = backward()
    scaler.step(optimizer)
    scaler.update()
    return loss


def sam_step(run, backward):
    """SAM makes two passes, at the weights and then up the hill. The second, which is of other
    weights, leaves batch norm's running statistics alone. Average SAM makes one."""
    passes = 0

    def closure():
        nonlocal passes
        passes += 1
        second = passes == 2
        with frozen_batch_norm(run.model) if second else contextlib.nullcontext():
            return backward()

    return run.optimizer.step(closure)


@torch.no_grad()
def evaluate(model, data, c):
    """Accuracy in percent and loss, without label smoothing, on the test pictures."""
    if dist.is_initialized():
        for buffer in model.buffers():  # batch norm's statistics, each rank's own
            dist.broadcast(buffer, 0)
    model.eval()
    sums = []
    x, y = data.test_x[RANK::RANKS], data.test_y[RANK::RANKS]
    for pictures, labels in zip(x.split(500), y.split(500), strict=True):
        pictures = data.normalized(pictures)
        with autocast(c):
            logits = model(pictures).float()
            if c.tta:
                logits = (logits + model(pictures.flip(3)).float()) / 2
        right = (logits.argmax(1) == labels).sum()
        sums.append(torch.stack((F.cross_entropy(logits, labels, reduction="sum"), right)))
    model.train()
    total = torch.stack(sums).cpu().double().sum(0) if sums else torch.zeros(2)
    loss, correct = over_ranks(total)
    return {"test_acc": 100 * correct / len(data.test_x), "test_loss": loss / len(data.test_x)}


def train(c: Config):
    """Trains one model; returns its settings and the last of each value in its log, such as
    test_acc and best_acc in percent. Raises BadInput, or Halt when the loss is not finite or a
    signal came, the checkpoint written."""
    c = complete(c)
    kept = c.resume or c.overwrite or not Path(c.out, "checkpoint.pt").exists()
    ways = "a folder without a run, or --resume to go on with it, or --overwrite to lose it"
    check(c, "out", kept, ways)
    if importlib.util.find_spec("matplotlib") is None:  # said now, not after the training
        raise ModuleNotFoundError(name="matplotlib")
    run = set_up(c, Data(c))
    if c.resume:
        restore(run)
    with contextlib.ExitStack() as stack:
        if RANK == 0:
            stack.enter_context(lock(Path(c.out)))
            open_folder(run)
            banner(run)
        caught = []  # signals: the step that they come in is finished first
        stack.enter_context(on_signals(caught.append))
        record = stack.enter_context(report(run))
        loop(run, record, caught)
        if c.sharpness:
            record(**measure(run, caught))
    if RANK == 0:
        draw(c)
    summary = {name: value for row in read_log(c.out) for name, value in row.items()}
    return summary | dataclasses.asdict(c)


def set_up(c, data):
    """Model and optimizer at the start of a run."""
    if c.ire_warmup is None:
        c.ire_warmup = c.ire_epoch * data.steps_per_epoch
    last = c.epochs * data.steps_per_epoch - 1
    check(c, "ire_warmup", not has_ire(c) or c.ire_warmup <= last, f"0 to the last step, {last}")
    # DDP spreads rank 0's weights; each rank draws its own labels in the probe
    torch.manual_seed(c.seed + (RANK << 40))
    torch.set_float32_matmul_precision("high")
    if c.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(c.deterministic)
    torch.backends.cudnn.benchmark = not c.deterministic
    model = make_model(c, data.classes)
    compiled = torch.compile(model) if c.compile else model
    forward = compiled
    if dist.is_initialized():
        forward = nn.parallel.DistributedDataParallel(compiled)
    scaler = torch.amp.GradScaler(c.device, enabled=c.dtype == "float16")
    return Run(c, data, model, compiled, forward, make_optimizer(model, c), scaler)


def restore(run):
    """Goes on from the checkpoint."""
    c = run.c
    saved = load_checkpoint(run.c.out)
    words = f"the pictures that {c.out} began with; these differ, by their sha256"
    check(c, "data", saved["data"] == run.data.sha256, words)
    try:
        for name in ("model", "optimizer", "scaler"):
            getattr(run, name).load_state_dict(saved[name])
    except Exception as e:  # each raises its own kinds
        why = " ".join(str(e).split())
        text = f"--resume: {name} of {c.out}/checkpoint.pt does not fit: {why:.300}"
        raise BadInput(text) from None
    for name in REACHED:
        setattr(run, name, saved.get(name, 0.0))  # older runs have no best_acc
    if RANK == 0:
        set_random_states(saved.get("random", {}))
    run.kept = f"step {run.step}"


def open_folder(run):
    """The files of the run, as they are at its step."""
    c = run.c
    out = Path(run.c.out)
    log = read_log(out) if c.resume else []
    if not c.resume:
        (out / "checkpoint.pt").unlink(missing_ok=True)
    lines = [json.dumps(r) + "\n" for r in log if r["step"] <= run.step]
    write_json(out / "config.json", dataclasses.asdict(c) | environment() | {"pid": os.getpid()})
    write_atomically(out / "log.jsonl", lambda f: f.write("".join(lines).encode()))


def banner(run):
    c = run.c
    data = run.data
    parameters = sum(p.numel() for p in run.model.parameters())
    place = f"{RANKS} x {c.device}, {c.dtype}"
    place += ", compiled" if c.compile else ""
    pictures = f"{len(data.x):,} training and {len(data.test_x):,} test pictures"
    method = c.optimizer
    if has_sam(c):
        kind = "adaptive, " if c.adaptive else ""
        kind += "average, " if c.average else ""
        method += f" ({kind}over {c.base}, rho {c.rho:g})"
    method += f", lr {c.lr:g}, {c.schedule}, weight decay {c.weight_decay:g}"
    if has_ire(c):
        method += f"; kappa {c.kappa:g}, gamma {c.gamma:g}, K {c.interval}"
        method += f", on from step {c.ire_warmup}, {c.curvature}"
    start = f"the accuracy starts near {100 / data.classes:g}%"
    print(f"model      {c.model}, {parameters:,} parameters")
    print(f"data       {c.data}: {pictures}, augment {c.augment}")
    print(f"device     {place}\noptimizer  {method}")
    print(f"run        {run.steps} steps, {c.epochs} epochs, into {c.out}; {start}", flush=True)


@contextlib.contextmanager
def on_signals(handler):
    """Calls handler(number) at Ctrl-C and SIGTERM."""
    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, lambda number, _: handler(number))
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def stopped(number, text):
    halt = Halt(f"stopped; {text}")
    halt.code = 128 + number
    return halt


@contextlib.contextmanager
def report(run):
    """Yields record(**values): a line of log.jsonl and of the terminal."""
    path = os.devnull if RANK else Path(run.c.out) / "log.jsonl"
    quiet = RANK > 0 or not sys.stderr.isatty()
    with (
        open(path, "a") as log,
        tqdm(total=run.steps, initial=run.step, unit="step", disable=quiet) as bar,
    ):

        def record(**values):
            if RANK:
                return
            line = {"step": run.step, **values, "seconds": round(run.seconds, 3)}
            log.write(json.dumps(line) + "\n")
            log.flush()
            texts = [f"{name} {value:.4g}" for name, value in values.items()]
            bar.update(run.step - bar.n)
            bar.write("  ".join([f"step {run.step:5}/{run.steps}", *texts, f"{run.seconds:.0f} s"]))

        yield record


def loop(run, record, caught):
    """Steps, and between them log, test and checkpoint where they are due."""
    c = run.c
    per_epoch = run.data.steps_per_epoch
    if run.step == run.steps:
        record(**test(run))
    pending = []
    clock = time.perf_counter()
    while run.step < run.steps:
        pending.append(train_step(run))
        run.step += 1
        number = int(over_ranks([caught[0] if caught else 0], dist.ReduceOp.MAX)[0])
        test_due = due(run, c.eval_interval * per_epoch)
        save_due = due(run, c.checkpoint_interval * per_epoch)
        if not (due(run, c.log_interval) or test_due or save_due or number):
            continue
        losses = over_ranks(torch.stack(pending).cpu())  # only here it waits for the device
        losses = [loss / RANKS for loss in losses]
        elapsed = time.perf_counter() - clock
        run.seconds += elapsed
        check_finite(run, losses)
        record(**values_of(run, losses, elapsed), **(test(run) if test_due else {}))
        if save_due or number:
            save(run)
        if number and run.step < run.steps:
            raise stopped(number, "the checkpoint is written, go on with --resume")
        pending = []
        clock = time.perf_counter()


def due(run, interval):
    return run.step % interval == 0 or run.step == run.steps


def test(run):
    values = evaluate(run.compiled, run.data, run.c)
    check_finite(run, [values["test_loss"]])
    run.best_acc = max(run.best_acc, values["test_acc"])
    return values | {"best_acc": run.best_acc}


def values_of(run, losses, elapsed):
    """What the log says of the last steps."""
    c = run.c
    step = run.step - 1
    flat = run.optimizer.flat_share() if has_ire(c) and run.step > c.ire_warmup else {}
    values = {"train_loss": statistics.mean(losses)}
    values["lr"] = learning_rate(c, step, run.data.steps_per_epoch)
    return values | flat | {"images_per_second": round(len(losses) * c.batch_size / elapsed, 1)}


def check_finite(run, losses):
    """Raises Halt for the first of the last losses that is not finite."""
    for step, loss in enumerate(losses, run.step - len(losses) + 1):
        if not math.isfinite(loss):
            text = f"step {step}: the loss is {loss}; last checkpoint: {run.kept}"
            raise Halt(f"{text}; try a lower --lr or --kappa")


def train_seeds(c: Config):
    """As many runs as --seeds says, in OUT/seed-N."""
    c = dataclasses.replace(c, out=c.out or DEFAULTS["out"])
    out = c.out
    start = c.seed
    begun = []
    if c.resume:
        paths = Path(out).glob("seed-*/checkpoint.pt")
        begun = sorted(int(path.parent.name.removeprefix("seed-")) for path in paths)
        check(c, "out", begun, "a folder with runs in seed-0, seed-1, ... to go on with")
        start = begun[0] if start is None else start
        first = dataclasses.replace(c, seed=None, out=f"{out}/seed-{begun[0]}")
        c = complete(first)  # the other seeds are like it
    start = start or 0
    runs = []
    for seed in range(start, start + c.seeds):
        own = {"seed": seed, "out": f"{out}/seed-{seed}", "resume": seed in begun}
        runs.append(train(dataclasses.replace(c, **own)))
    if RANK == 0:
        print_means(runs)


def print_means(runs):
    for key in ("test_acc", "best_acc", "test_loss", "trace", "lambda_max"):
        if key in runs[0]:
            mean, error = mean_and_error([r[key] for r in runs])
            text = f"{mean:.4g} +- {error:.2g}, mean and standard error of {len(runs)} seeds"
            print(f"{key:11}{text}")


def mean_and_error(values):
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5


# ----------------------------------------------------------------------------------- sharpness
def flattened(parts):
    return torch.cat([x.flatten() for x in parts])


def hessian_products(losses, params, vectors, tick=None):
    """H v in float64 for each row v; H is of the mean of the functions `losses`. tick() is called
    after each product with the H of one of them."""
    total = 0
    for loss in losses:
        grads = torch.autograd.grad(loss(), params, create_graph=True, materialize_grads=True)
        slope = flattened(grads)
        products = []
        for v in vectors:
            v = v.to(slope)
            parts = torch.autograd.grad(slope, params, v, retain_graph=True, materialize_grads=True)
            products.append(flattened(parts).cpu().double())
            if tick:
                tick()
        total = total + torch.stack(products) / len(losses)
    return total


def hessian_trace(losses, params, probes=16, seed=0, tick=None):
    """Tr(H) and its standard error, by Hutchinson: the mean of v H v over random signs v."""
    size = (probes, sum(p.numel() for p in params))
    v = torch.randint(2, size, generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
    return mean_and_error((v * hessian_products(losses, params, v, tick)).sum(1).tolist())


def largest_eigenvalue(losses, params, tolerance=0.01, products=100, seed=0, tick=None):
    """(lambda_max(H), the residual |H v - lambda v|, within which an eigenvalue lies), by Lanczos'
    iteration until the residual is tolerance * lambda, or so many products are made. It keeps two
    vectors: without others to be orthogonal to, eigenvalues that were found come back as copies,
    which does not bear on the largest (Paige 1980)."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(sum(p.numel() for p in params), generator=generator, dtype=torch.float64)
    v = v / v.norm()
    before = 0.0
    beta = 0.0
    T = torch.zeros(products + 1, products + 1, dtype=torch.float64)  # H in the basis of the v
    for k in range(products):
        w = hessian_products(losses, params, v[None], tick)[0] - beta * before
        T[k, k] = w.dot(v)
        w -= T[k, k] * v
        beta = w.norm()
        values, vectors = torch.linalg.eigh(T[: k + 1, : k + 1])
        largest = values[-1].item()
        residual = (beta * vectors[-1, -1].abs()).item()
        if residual <= tolerance * abs(largest):
            break
        T[k, k + 1] = T[k + 1, k] = beta
        before, v = v, w / beta
    return largest, residual


@contextlib.contextmanager
def true_float32():
    """No TF32, whose errors a second derivative shows."""
    precision = torch.get_float32_matmul_precision()
    convolutions = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = convolutions


def sharpness(model, data, c, tick=None):
    """Trace and largest eigenvalue of the Hessian of the training loss, in float32, of pictures
    that are not augmented; batch norm takes each batch's statistics. The model is not a compiled
    one, which has no second derivative."""
    images = min(c.sharpness_images, len(data.x))
    size = min(c.batch_size, images)
    images -= images % size  # whole batches

    def loss(x, y):
        logits = model(data.normalized(x))
        return F.cross_entropy(logits, y, label_smoothing=c.label_smoothing)

    batches = zip(data.x[:images].split(size), data.y[:images].split(size), strict=True)
    losses = [functools.partial(loss, x, y) for x, y in batches]
    params = list(model.parameters())
    # MATH is the one attention with a second derivative
    with frozen_batch_norm(model), sdpa_kernel(SDPBackend.MATH), true_float32():
        trace, error = hessian_trace(losses, params, c.sharpness_probes, c.seed, tick)
        largest, residual = largest_eigenvalue(
            losses, params, products=c.sharpness_products, seed=c.seed, tick=tick
        )
    return {
        "trace": trace,
        "trace_error": error,
        "lambda_max": largest,
        "lambda_max_error": residual,
        "sharpness_images": images,
    }


def measure(run, caught):
    """The sharpness at the end of a run, with a bar that a signal ends."""
    c = run.c
    batches = max(1, min(c.sharpness_images, len(run.data.x)) // c.batch_size)
    most = batches * (c.sharpness_probes + c.sharpness_products)
    quiet = RANK > 0 or not sys.stderr.isatty()
    with tqdm(total=most, unit="product", desc="sharpness", disable=quiet) as bar:

        def tick():
            bar.update()
            if caught:
                raise stopped(caught[0], "the run is whole, --resume --sharpness measures it")

        values = sharpness(run.model, run.data, c, tick)
    if values["lambda_max_error"] > 0.01 * abs(values["lambda_max"]):
        note("lambda_max is not within 1%; --sharpness-products sets how many it may take")
    return values


# -------------------------------------------------------------------------------- command line
def parse(arguments):
    """What was typed, as a Config."""
    cli = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )

    def error(message):
        text = f"{cli.prog}: {message:.300}; --help shows what is allowed\n"
        cli.exit(2, text if LOCAL_RANK == 0 else "")

    cli.error = error
    for name, f in FIELDS.items():
        about = f.metadata
        text = about["help"] + (f"; {about['words']}" if about["words"] else "")
        if about["default"] is not None:
            cases = (SUITED | PRESETS).items()
            rows = [f"{case} {values[name]}" for case, values in cases if name in values]
            text += f" (default {', '.join([str(about['default']), *rows])})"
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        else:
            kind = {"type": f.type, "metavar": f.type.__name__.upper()}
        cli.add_argument("--" + name.replace("_", "-"), help=text, **kind)
    return Config(**vars(cli.parse_args(arguments)))


def start_ranks():
    """Joins torchrun's other processes; gloo carries what is on the CPU."""
    if not LAUNCHED and os.environ.get("WORLD_SIZE", "1") != "1":
        note("WORLD_SIZE is set, but not by torchrun: this process trains alone")
    if not LAUNCHED or dist.is_initialized():
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(LOCAL_RANK)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")


def run_command(c):
    start_ranks()
    if (c.seeds or 1) > 1:
        train_seeds(c)
        return
    summary = train(c)
    if RANK == 0:
        accuracy = f"{summary['test_acc']:.2f}%, the best {summary['best_acc']:.2f}%"
        print(
            f"test accuracy {accuracy}, after {summary['step']} steps, {summary['seconds']:.0f} s"
        )
        print(f"figure     {Path(summary['out']) / 'loss.png'}")


def stop(number):
    """Ends the script at a signal where there is no step to finish."""
    note("stopped")
    sys.exit(128 + number)


def main(arguments=None):
    """Runs the command line; returns the exit code."""
    code = 1
    try:
        with on_signals(stop):
            run_command(parse(arguments))
        return 0
    except Halt as e:
        code = e.code
        text = e
    except OSError as e:
        text = e
    except ModuleNotFoundError as e:
        package = {"sklearn": "scikit-learn"}.get(e.name.split(".")[0], e.name)
        code = 2
        text = f"{e.name} is missing: pip install {package}"
    except (MemoryError, RuntimeError) as e:
        known = isinstance(e, (MemoryError, torch.OutOfMemoryError))
        if not known and "allocate memory" not in str(e):
            raise
        text = "out of memory: lower --batch-size, and --lr with it, or take a smaller --model"
    rank = f"rank {RANK}: " if RANK else ""
    print(f"train_cifar.py: {rank}{text}", file=sys.stderr)
    return code


if __name__ == "__main__":
    status = main()
    if not dist.is_initialized():
        sys.exit(status)
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(status)  # gloo's threads may abort the interpreter's own exit
