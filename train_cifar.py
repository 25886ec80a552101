"""Train an image classifier with SGD, AdamW or SAM, each alone or with IRE over it. The smallest command first:

    python train_cifar.py --data digits                      # ResNet-56 on scikit-learn's digits: minutes on 2 cores
    python train_cifar.py                                    # CIFAR-10, 200 epochs of SGD-IRE: wants a GPU
    python train_cifar.py --model vit_t --data cifar100      # AdmIRE
    python train_cifar.py --optimizer sam-ire --seeds 3 --sharpness     # mean, standard error, Tr(Hessian), lambda_max
    torchrun --standalone --nproc_per_node 2 train_cifar.py  # the same batches over two GPUs
    python train_cifar.py --resume                           # go on after Ctrl-C, to the same bits

Top to bottom: settings, models, data, files, optimizers, sharpness, training, command line.
"""
import argparse, contextlib, dataclasses, hashlib, http.client, importlib, itertools, json, math, os, pickle, platform, shutil
import signal, statistics, subprocess, sys, tarfile, time, urllib.request
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ire import IRE, SAM, frozen_batch_norm, sampled_cross_entropy

# ------------------------------------------------------------------------------------------------ settings
# The WRN paper's for SGD, a ViT's usual ones for AdamW. SGD on digits: 0.1 fails and 0.02 is fine (10 epochs).
TUNED = {"sgd": dict(lr=0.1, weight_decay=5e-4), "adamw": dict(lr=1e-3, weight_decay=0.1)}
COUNT, POSITIVE = (lambda x: x >= 1, "1 or more"), (lambda x: 0 < x < math.inf, "a finite number above 0")
NOT_NEGATIVE, FRACTION = (lambda x: 0 <= x < math.inf, "0 or more"), (lambda x: 0 <= x < 1, "0 or more and below 1")

def setting(default, text, allowed=(lambda x: True, "")):
    if isinstance(allowed, str):
        allowed = allowed.split().__contains__, allowed.replace(" ", ", ")
    return dataclasses.field(default=default, metadata={"help": text, "allowed": allowed})

@dataclasses.dataclass
class Config:
    out: str = setting("runs/cifar", "folder for config, log, checkpoint and figure")
    resume: bool = setting(False, "go on from the checkpoint in --out")
    overwrite: bool = setting(False, "delete the run in --out first")
    seeds: int = setting(1, "runs, with seeds --seed, --seed + 1, ...; prints mean and standard error", COUNT)
    seed: int = setting(0, "of weights, batches and probes", (lambda x: 0 <= x < 2**62, "0 to 2^62 - 1"))
    device: str = setting("auto", "where to train", "auto cpu cuda mps")
    dtype: str = setting(None, "of the forward pass (default float32, on CUDA bfloat16)", "float32 bfloat16 float16")
    compile: bool = setting(None, "torch.compile the model (default on CUDA)")
    deterministic: bool = setting(False, "deterministic CUDA kernels, slower")
    data: str = setting("cifar10", "pictures; digits are scikit-learn's, at 32x32", "cifar10 cifar100 digits")
    data_dir: str = setting("data", "folder with the official archive (fetched if missing) or the unpacked one")
    augment: str = setting(None, "basic: shift, flip; strong: basic, mixup and more (default basic, digits shift, ViT strong)",
                           "none shift basic cutout strong")
    limit_train: int = setting(None, "training pictures, the first so many (default all)", COUNT)
    limit_test: int = setting(None, "test pictures, the first so many (default all)", COUNT)
    holdout: int = setting(0, "test on the last so many training pictures instead, for tuning", NOT_NEGATIVE)
    model: str = setting("resnet56", "network", (lambda x: x in MODELS, "resnet56, wrn28_10, wrn16_8, vit_t, vit_s"))
    epochs: int = setting(None, "passes over the training pictures (default 200, digits 10)", COUNT)
    batch_size: int = setting(None, "pictures in a step, over all GPUs together (default 128, digits 32)", COUNT)
    warmup: int = setting(None, "epochs to the peak learning rate (default 0, a ViT a tenth)", NOT_NEGATIVE)
    label_smoothing: float = setting(0.1, "of the training loss", FRACTION)
    optimizer: str = setting(None, "(default sgd-ire, a ViT admire)", "sgd adamw sam sgd-ire admire sam-ire")
    base: str = setting(None, "what SAM is over (default sgd, a ViT adamw)", "sgd adamw")
    lr: float = setting(None, "peak learning rate (default 0.1, digits 0.02, over adamw 0.001)", POSITIVE)
    momentum: float = setting(0.9, "SGD's", FRACTION)
    weight_decay: float = setting(None, "the base's (default 0.0005, over adamw 0.1)", NOT_NEGATIVE)
    decay_norms: bool = setting(True, "weight decay on biases and norms too")
    rho: float = setting(0.05, "SAM: length of the climb", NOT_NEGATIVE)
    kappa: float = setting(1.0, "IRE: steps along flat coordinates are 1 + kappa times as long", NOT_NEGATIVE)
    gamma: float = setting(0.9, "IRE: flat fraction of the coordinates", (lambda x: 0 < x < 1, "above 0 and below 1"))
    interval: int = setting(10, "IRE: steps from one mask to the next", COUNT)
    ire_epoch: int = setting(None, "IRE: first epoch with it, from 0 (default 0.6 of --epochs)", NOT_NEGATIVE)
    ire_warmup: int = setting(None, "IRE: steps before it switches on (default those before --ire-epoch)", NOT_NEGATIVE)
    curvature: str = setting("fisher", "IRE: the mask's; second_moment is AdamW's", "fisher second_moment")
    probe: str = setting("fixed", "IRE: pictures for fisher, the first ones or the step's own", "fixed fresh")
    kappa_decay: bool = setting(False, "IRE: kappa follows the learning rate down")
    tta: bool = setting(False, "test on each picture and its mirror image: the mean of their logits")
    sharpness: bool = setting(False, "at the end Tr(Hessian) and lambda_max of the training loss")
    sharpness_images: int = setting(1024, "first training pictures, not augmented, that they are taken of", COUNT)
    sharpness_probes: int = setting(16, "random vectors for the trace", (lambda x: x >= 2, "2 or more"))
    log_interval: int = setting(50, "steps between lines of the log", COUNT)
    eval_interval: int = setting(1, "epochs between tests", COUNT)
    checkpoint_interval: int = setting(1, "epochs between checkpoints", COUNT)

class BadInput(ValueError):
    """What the user can mend: the script prints it in one line and exits with 2."""

def check(c, name, good, allowed):
    if not good:
        raise BadInput(f"--{name.replace('_', '-')}: got {getattr(c, name)}, allowed is {allowed}")

def complete(c: Config) -> Config:
    """Fills in what depends on other settings; raises BadInput on values out of range."""
    for f in dataclasses.fields(c):
        good, allowed = f.metadata["allowed"]
        check(c, f.name, getattr(c, f.name) is None or good(getattr(c, f.name)), allowed)
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = next(d for d in here if here[d]) if c.device == "auto" else c.device
    check(c, "device", here[device], f"what this machine has: {', '.join(d for d in here if here[d])}")
    vit, digits, cuda, half = c.model.startswith("vit"), c.data == "digits", device == "cuda", c.dtype == "float16"
    optimizer, epochs = c.optimizer or ("admire" if vit else "sgd-ire"), c.epochs or (10 if digits else 200)
    own = {"sgd": "sgd", "sgd-ire": "sgd", "adamw": "adamw", "admire": "adamw"}
    base = own.get(optimizer) or c.base or ("adamw" if vit else "sgd")
    defaults = TUNED[base] | ({"lr": 0.02} if digits and base == "sgd" else {}) | dict(
        dtype="bfloat16" if cuda else "float32", compile=cuda, optimizer=optimizer, base=base, epochs=epochs,
        augment="shift" if digits else "strong" if vit else "basic", batch_size=32 if digits else 128,
        warmup=epochs // 10 if vit else 0, ire_epoch=epochs * 6 // 10)
    c = Config(**{**defaults, **{k: v for k, v in dataclasses.asdict(c).items() if v is not None}, "device": device})
    for name, good, allowed in (
            ("base", c.base == base, f"to leave it out with --optimizer {optimizer}"),
            ("curvature", c.curvature == "fisher" or base == "adamw", "fisher over sgd, which has no second moment"),
            ("dtype", not half or device != "cpu", "float32 or bfloat16 on a CPU"),
            ("dtype", not half or "sam" not in optimizer, "float32 or bfloat16 with SAM, as GradScaler takes no closure"),
            ("batch_size", c.batch_size % world() == 0, f"a multiple of the {world()} processes"),
            ("sharpness", not c.sharpness or device != "mps", "on a CPU or CUDA device, which have float64"),
            ("resume", not (c.resume and c.overwrite), "one of --resume and --overwrite"),
            *((name, getattr(c, name) < epochs, f"0 to --epochs - 1, {epochs - 1}") for name in ("warmup", "ire_epoch"))):
        check(c, name, good, allowed)
    return c

# ------------------------------------------------------------------------------------------------ models
def conv(n_in, n_out, size=3, stride=1):
    return nn.Conv2d(n_in, n_out, size, stride, size // 2, bias=False)

class Block(nn.Module):
    """Two convolutions and a shortcut: normalised after them (He et al. 2016), or before where `pre` (WRN)."""
    def __init__(self, n_in, n_out, stride, pre):
        super().__init__()
        self.pre, self.same = pre, n_in == n_out and stride == 1
        self.conv1, self.norm1 = conv(n_in, n_out, stride=stride), nn.BatchNorm2d(n_in if pre else n_out)
        self.conv2, self.norm2 = conv(n_out, n_out), nn.BatchNorm2d(n_out)
        if not self.same:
            self.shortcut = nn.Sequential(conv(n_in, n_out, 1, stride), *([] if pre else [nn.BatchNorm2d(n_out)]))

    def forward(self, x):
        if self.pre:
            y = F.relu(self.norm1(x))
            return (x if self.same else self.shortcut(y)) + self.conv2(F.relu(self.norm2(self.conv1(y))))
        return F.relu((x if self.same else self.shortcut(x)) + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))

def resnet(depth, classes, factor=1, pre=False):
    """CIFAR's ResNet, three stages of (depth - 2) / 6 blocks, projection shortcuts; or WRN-depth-factor where `pre`."""
    widths, normed = (16, 16 * factor, 32 * factor, 64 * factor), lambda width: [nn.BatchNorm2d(width), nn.ReLU()]
    layers, blocks = [conv(3, 16)] + ([] if pre else normed(16)), (depth - (4 if pre else 2)) // 6
    for stage, (n_in, n_out) in enumerate(itertools.pairwise(widths)):
        layers += [Block(n_out if i else n_in, n_out, 1 if i or not stage else 2, pre) for i in range(blocks)]
    layers += (normed(widths[-1]) if pre else []) + [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes)]
    for m in nn.Sequential(*layers).modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(m.weight, nonlinearity="relu")  # He et al. 2015
    nn.init.zeros_(layers[-1].bias)
    return nn.Sequential(*layers)

class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021; widths and initialisation of DeiT) on patches of 4 x 4 pixels."""
    def __init__(self, width, heads, classes, depth=12, patch=4, size=32):
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, width, patch, patch), nn.Linear(width, classes)
        self.token, self.position = (nn.Parameter(torch.empty(1, n, width)) for n in (1, (size // patch) ** 2 + 1))
        block = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        for name, p in self.named_parameters():
            if p.dim() > 1 or name.endswith("bias"):
                nn.init.trunc_normal_(p, std=0.02) if p.dim() > 1 else nn.init.zeros_(p)

    def forward(self, x):  # (batch, 3, size, size) -> logits (batch, classes)
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.blocks(torch.cat((self.token.expand(len(x), -1, -1), x), 1) + self.position)[:, 0])

MODELS = {"resnet56": lambda classes: resnet(56, classes), "wrn28_10": lambda classes: resnet(28, classes, 10, pre=True),
          "wrn16_8": lambda classes: resnet(16, classes, 8, pre=True), "vit_t": lambda classes: ViT(192, 3, classes),
          "vit_s": lambda classes: ViT(384, 6, classes)}

# ------------------------------------------------------------------------------------------------ data
URL, CIFAR = "https://www.cs.toronto.edu/~kriz/", {  # archive, sha256, folder, files, the last for the test, labels, classes
    "cifar10": ("cifar-10-python.tar.gz", "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
                "cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"], b"labels", 10),
    "cifar100": ("cifar-100-python.tar.gz", "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
                 "cifar-100-python", ["train", "test"], b"fine_labels", 100)}

class Unpickler(pickle.Unpickler):
    """Loads arrays, bytes, lists and dicts; a pickle that names anything else is refused, since that could run code."""
    def find_class(self, module, name):
        known = {"ndarray": np.ndarray, "dtype": np.dtype, "_reconstruct": np.empty(0).__reduce__()[0],
                 "encode": lambda text, _: text.encode("latin1")}  # bytes, as Python 3 pickles them for 2
        if module not in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray", "_codecs") or name not in known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, allowed are arrays, bytes, lists and dicts")
        return known[name]

def download(url, path: Path, digest):
    """Fetches url to path; a connection that breaks is taken up where it broke, now or in a later run."""
    part, error = path.with_name(f".{path.name}.part"), "its checksum is wrong"
    path.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(5):
        have = {"Range": f"bytes={part.stat().st_size}-"} if part.exists() else {}
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers=have), timeout=30) as reply, \
                    open(part, "ab" if reply.status == 206 else "wb") as f, \
                    tqdm.wrapattr(f, "write", total=reply.length, desc=path.name, disable=not sys.stderr.isatty()) as sink:
                shutil.copyfileobj(reply, sink)
        except (OSError, http.client.HTTPException) as e:
            if getattr(e, "code", 0) == 416:  # nothing is missing, yet it is not the archive
                part.unlink()
                break
            error = e
        if part.exists() and hashlib.sha256(part.read_bytes()).hexdigest() == digest:
            return os.replace(part, path)
    raise BadInput(f"--data-dir: {url} can't be fetched ({error}); run again to go on, or put the archive at {path}")

def load_cifar(c):
    """Pictures (n, 32, 32, 3) uint8 and labels (n,) for training, the same for the test, the number of classes."""
    archive, digest, folder, names, key, classes = CIFAR[c.data]
    path, folder, parts = Path(c.data_dir) / archive, Path(c.data_dir) / folder, []
    missing = ", ".join(name for name in names if not (folder / name).is_file())
    if missing and folder.exists():
        raise BadInput(f"--data-dir: {folder} has no {missing}; allowed is the official archive, unpacked whole")
    if missing and not path.exists():
        download(URL + archive, path, digest)
    if missing and hashlib.sha256(path.read_bytes()).hexdigest() != digest:
        raise BadInput(f"--data-dir: {path} is not the official archive, by its checksum; delete it to fetch it again")
    with tarfile.open(path) if missing else contextlib.nullcontext() as tar:
        for name in names:
            try:
                with tar.extractfile(f"{folder.name}/{name}") if missing else open(folder / name, "rb") as f:
                    batch = Unpickler(f, encoding="bytes").load()
                x, y = batch[b"data"], np.array(batch[key], dtype=np.int64)
                if x.dtype != np.uint8 or x.shape != (len(y), 3072) or len(y) == 0 or y.min() < 0 or y.max() >= classes:
                    raise ValueError(f"it needs uint8 data (n, 3072) and n labels from 0 to {classes - 1}")
            except Exception as e:  # a broken pickle raises almost anything
                raise BadInput(f"--data-dir: {folder / name} can't be read: {one_line(e)}") from None
            parts.append((x.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), y))
    return tuple(np.concatenate(v) for v in zip(*parts[:-1])), parts[-1], classes

def load_digits():
    """The same of scikit-learn's 1797 handwritten digits, a random fifth held out for the test."""
    x, y = needs("sklearn.datasets", "scikit-learn", "--data digits").load_digits(return_X_y=True)
    x = F.interpolate(torch.tensor(x).view(-1, 1, 8, 8) * (255 / 16), size=32, mode="bilinear").round().byte()
    x, test = x.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy(), np.random.default_rng(0).permutation(len(x)) % 5 == 0
    return (x[~test], y[~test]), (x[test], y[test]), 10

def shift_and_flip(x, u, flip):
    """x (b, h, w, c) moved by up to 4 pixels, black where nothing was; with `flip` half of them mirrored."""
    i, sample = torch.arange(x.shape[1], device=x.device), torch.arange(len(x), device=x.device)[:, None, None]
    rows, columns = (i + (u[:, k, None] * 9).long() for k in (0, 1))  # (b, size), in the padded picture
    columns = torch.where(u[:, 2, None] < 0.5, columns.flip(1), columns) if flip else columns
    return F.pad(x, (0, 0, 4, 4, 4, 4))[sample, rows[:, :, None], columns[:, None, :]]

def cutout(x, u, length):
    """x (b, c, h, w) with a square of zeros around a random pixel (DeVries and Taylor 2017)."""
    i = torch.arange(x.shape[2], device=x.device)
    rows, columns = ((i - (u[:, k, None] * len(i)).long() + 0.5).abs() < length / 2 for k in (0, 1))
    return x.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)

def rand_augment(x, u):
    """Two of eight changes to each picture of x (b, 3, h, w) in [0, 1], like RandAugment(2, 15): at half their range."""
    for choice, sign in u.view(-1, 2, 2).permute(1, 2, 0):
        amount = torch.where(sign < 0.5, -0.5, 0.5) * F.one_hot((choice * 8).long(), 8).T  # (8, b)
        turn, shear_x, shear_y, move_x, move_y = amount[:5] * x.new_tensor((math.pi / 6, 0.3, 0.3, 0.9, 0.9))[:, None]
        matrix = torch.stack((turn.cos(), shear_x - turn.sin(), move_x, turn.sin() + shear_y, turn.cos(), move_y), 1)
        x = F.grid_sample(x, F.affine_grid(matrix.view(-1, 2, 3), x.shape, align_corners=False), align_corners=False)
        grey = (x * x.new_tensor((0.299, 0.587, 0.114)).view(3, 1, 1)).sum(1, keepdim=True)
        for blend, other in zip(amount[5:], (0 * grey, grey.mean((2, 3), keepdim=True), grey)):  # brightness, contrast, colour
            x = (other + (x - other) * (1 + 0.9 * blend.view(-1, 1, 1, 1))).clamp(0, 1)
    return x

class Data:
    """Pictures as uint8 on the device. A batch is a function of seed and step, so a resumed run sees what it would have."""
    def __init__(self, c):
        (x, y), test, self.classes = load_digits() if c.data == "digits" else load_cifar(c)
        check(c, "holdout", c.holdout < len(x), f"fewer than the {len(x)} training pictures")
        cut, self.c = len(x) - c.holdout, c
        (x, y), test = (x[:cut], y[:cut]), (x[cut:], y[cut:]) if c.holdout else test
        x, y = np.ascontiguousarray(x[:c.limit_train]), y[:c.limit_train]
        check(c, "batch_size", c.batch_size <= len(x), f"1 to {len(x)}, the training pictures")
        self.steps_per_epoch, self.sha256 = len(x) // c.batch_size, hashlib.sha256(x).hexdigest()  # no smaller last batch
        self.x, self.y, self.test_x, self.test_y = (
            torch.tensor(v, device=c.device) for v in (x, y, *(v[:c.limit_test] for v in test)))
        share = np.stack([np.bincount(x[..., k].ravel(), minlength=256) for k in range(3)]) / x[..., 0].size
        mean, square = (share @ np.arange(256.0) ** power for power in (1, 2))
        self.mean, self.std = (torch.tensor(v, dtype=torch.float32, device=c.device).view(3, 1, 1)
                               for v in (mean, (square - mean**2 + 1e-6) ** 0.5))

    def normalized(self, x):
        """uint8 (b, h, w, 3) to float32 (b, 3, h, w) in channels-last memory."""
        return (x.permute(0, 3, 1, 2) - self.mean) / self.std

    def batch(self, step):
        """This rank's share of a step: pictures (b, 3, h, w), augmented, and labels (b,), after mixup (b, classes)."""
        (epoch, i), size, kind = divmod(step, self.steps_per_epoch), self.c.batch_size, self.c.augment
        if i == 0 or not hasattr(self, "order"):
            self.order = np.random.default_rng((self.c.seed, 0, epoch)).permutation(len(self.x))
        rng = np.random.default_rng((self.c.seed, 1, step))
        index, u = (torch.from_numpy(v[rank()::world()]).to(self.c.device)
                    for v in (self.order[i * size:(i + 1) * size], rng.random((size, 9), np.float32)))
        x, y = self.x[index], self.y[index]
        x = x if kind == "none" else shift_and_flip(x, u[:, :3], flip=kind != "shift")
        if kind == "strong":  # mixup (Zhang et al. 2018) within a rank
            x = (rand_augment(x.permute(0, 3, 1, 2) / 255, u[:, 5:]) * 255 - self.mean) / self.std
            y, weight = F.one_hot(y, self.classes).float(), rng.beta(0.5, 0.5)
            return weight * x + (1 - weight) * x.flip(0), weight * y + (1 - weight) * y.flip(0)
        x = self.normalized(x)
        return cutout(x, u[:, 3:5], 16 if self.classes == 10 else 8) if kind == "cutout" else x, y

# ------------------------------------------------------------------------------------------------ files
def needs(module, package, what):
    with contextlib.suppress(ImportError):
        return importlib.import_module(module)
    raise BadInput(f"{what} needs {package}: pip install {package}")

def write_atomically(path: Path, write):
    """Whole or not at all, also when the power goes: a temporary name, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    with open(temporary, "wb") as f:
        write(f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)

def write_json(path: Path, value):
    write_atomically(path, lambda f: f.write(json.dumps(value, indent=1).encode()))

def one_line(e):
    return f"{type(e).__name__} {e}".splitlines()[0]

def load_checkpoint(folder):
    path, keys = Path(folder) / "checkpoint.pt", ("config", "data", "step", "seconds", "model", "optimizer", "scaler")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return {key: saved[key] for key in keys}
    except Exception as e:  # torch.load raises many kinds
        raise BadInput(f"{path} can't be read as a checkpoint: {one_line(e)}; is {folder} the --out of a run?") from None

def read_log(folder):
    lines = (Path(folder) / "log.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]  # a kill may leave half a line

def environment():
    commit, git = "", ["git", "rev-parse", "--verify", "-q", "HEAD"]
    with contextlib.suppress(OSError):
        commit = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    return {"torch": torch.__version__, "hardware": hardware, "commit": commit}

def draw(c):
    """DIR/loss.png: loss, test accuracy, learning rate and, with IRE, the flat fraction over steps."""
    needs("matplotlib", "matplotlib", "the figure")
    from matplotlib.figure import Figure  # without pyplot, whose backend may be a notebook's
    log = read_log(c.out)
    panels = {"loss": ["train_loss", "test_loss"], "test accuracy (%)": ["test_acc"], "learning rate": ["lr"]}
    panels |= {"flat fraction": ["flat"]} if any("flat" in r for r in log) else {}
    figure = Figure(figsize=(3.2 * len(panels), 3), layout="constrained")
    axes = figure.subplots(1, len(panels))
    for ax, (title, keys) in zip(axes, panels.items()):
        for key, color in zip(keys, ("#0072B2", "#D55E00")):
            ax.plot(*zip(*[(r["step"], r[key]) for r in log if key in r]), "o-", color=color, label=key, ms=3)
        if "ire" in c.optimizer:
            ax.axvline(c.ire_warmup, color="grey", linestyle=":", label="IRE switches on")
        ax.set(xlabel="step", title=title)
        ax.grid(alpha=0.3)
    axes[0].legend()
    write_atomically(Path(c.out) / "loss.png", lambda f: figure.savefig(f, format="png", dpi=150))

# ------------------------------------------------------------------------------------------------ optimizers
def make_optimizer(model, c):
    groups = [{"params": [p for p in model.parameters() if (p.dim() > 1) == matrices],
               "weight_decay": c.weight_decay * (matrices or c.decay_norms)} for matrices in (True, False)]
    optimizer = (torch.optim.SGD(groups, c.lr, momentum=c.momentum) if c.base == "sgd" else
                 torch.optim.AdamW(groups, c.lr, fused=c.device != "mps"))
    optimizer = SAM(optimizer, rho=c.rho) if "sam" in c.optimizer else optimizer
    return (IRE(optimizer, kappa=c.kappa, gamma=c.gamma, interval=c.interval, warmup=c.ire_warmup, curvature=c.curvature)
            if "ire" in c.optimizer else optimizer)  # sgd-ire, sam-ire, admire

def learning_rate(c, step, steps_per_epoch):
    """Linear warm-up, then a cosine to 0."""
    warmup, steps = c.warmup * steps_per_epoch, c.epochs * steps_per_epoch
    return c.lr * min((step + 1) / max(1, warmup), 0.5 + 0.5 * math.cos(math.pi * max(0, step - warmup) / (steps - warmup)))

def train_step(model, forward, optimizer, batch, fixed, c, scaler, autocast):
    """Probe where one is due, forward and backward (twice with SAM), step; returns the loss before the step."""
    (x, y), passes = batch, itertools.count()
    if getattr(optimizer, "probe_due", False):
        with optimizer.probe(), frozen_batch_norm(model):
            with autocast:
                logits = forward(fixed if c.probe == "fixed" else x)
            scaler.scale(sampled_cross_entropy(logits.float())).backward()

    def closure():
        optimizer.zero_grad()
        with frozen_batch_norm(model) if next(passes) else contextlib.nullcontext(), autocast:  # SAM's second pass
            logits = forward(x)
        loss = F.cross_entropy(logits.float(), y, label_smoothing=c.label_smoothing)
        scaler.scale(loss).backward()
        return loss.detach()

    if "sam" in c.optimizer:
        return optimizer.step(closure)
    loss = closure()
    scaler.step(optimizer)
    scaler.update()
    return loss

# ------------------------------------------------------------------------------------------------ sharpness
def hessian_products(losses, params, vectors):
    """H v in float64 for each v of vectors, lists of tensors as params is; H is the Hessian of the mean of losses, functions
    without arguments."""
    products = [[torch.zeros_like(p, dtype=torch.float64) for p in params] for _ in vectors]
    for loss in losses:
        slopes = torch.autograd.grad(loss(), params, create_graph=True, materialize_grads=True)
        for v, product in zip(vectors, products):
            along = sum((g * u).sum() for g, u in zip(slopes, v))
            for entry, h in zip(product, torch.autograd.grad(along, params, retain_graph=True, materialize_grads=True)):
                entry += h.double() / len(losses)
    return products

def hessian_trace(losses, params, probes=16, seed=0):
    """Tr(H) and its standard error by Hutchinson: the mean of v H v over random signs v."""
    draws = torch.Generator().manual_seed(seed)
    vectors = [[(torch.randint(2, p.shape, generator=draws) * 2.0 - 1).to(p) for p in params] for _ in range(probes)]
    products = hessian_products(losses, params, vectors)
    return mean_and_error([float(sum((u.double() * h).sum() for u, h in zip(v, Hv))) for v, Hv in zip(vectors, products)])

def largest_eigenvalue(losses, params, tolerance=0.01, steps=100, seed=0):
    """lambda_max(H) by Lanczos, and the residual |H v - lambda v|, which bounds the distance to an eigenvalue; it stops at
    tolerance * lambda. The basis is not kept: the largest eigenvalue needs no orthogonalisation (Paige 1980)."""
    draws, T = torch.Generator().manual_seed(seed), torch.zeros(0, 0, dtype=torch.float64)
    flatten = lambda parts: torch.cat([x.flatten().double() for x in parts])
    w, q = flatten([torch.randn(p.shape, generator=draws).to(p) for p in params]), 0
    for k in range(steps):
        last, beta, q = q, w.norm() * (k > 0), w / w.norm()
        v = [x.view(p.shape).to(p) for x, p in zip(q.split([p.numel() for p in params]), params)]
        w = flatten(hessian_products(losses, params, [v])[0]) - beta * last
        T = F.pad(T, (0, 1, 0, 1))
        T[k, k], T[k, k - 1:k], T[k - 1:k, k] = w @ q, beta, beta
        w = w - (w @ q) * q
        values, vectors = torch.linalg.eigh(T)
        residual = float(w.norm()) * abs(float(vectors[-1, -1]))
        if residual <= tolerance * abs(float(values[-1])):
            break
    return float(values[-1]), residual

def sharpness(model, data, c):
    """Of the training loss (label smoothing, no weight decay) in float32 on the first training pictures, not augmented, in
    batches as in training, each normalised by its own statistics."""
    count, params = max(min(c.sharpness_images, len(data.x)) // c.batch_size, 1) * c.batch_size, list(model.parameters())
    losses = [lambda x=data.normalized(x), y=y: F.cross_entropy(model(x), y, label_smoothing=c.label_smoothing)
              for x, y in zip(data.x[:count].split(c.batch_size), data.y[:count].split(c.batch_size))]
    with frozen_batch_norm(model), sdpa_kernel(SDPBackend.MATH):  # the one attention with a second derivative
        trace, error = hessian_trace(losses, params, c.sharpness_probes, c.seed)
        largest, residual = largest_eigenvalue(losses, params, seed=c.seed)
    return dict(trace=trace, trace_error=error, lambda_max=largest, lambda_max_error=residual, sharpness_images=count)

def mean_and_error(values):
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5

# ------------------------------------------------------------------------------------------------ training
class Diverged(RuntimeError):
    """The loss is not finite."""

class Stopped(Exception):
    """SIGINT or SIGTERM came; the checkpoint is written."""

def rank():
    return dist.get_rank() if dist.is_initialized() else 0

def world():
    return dist.get_world_size() if dist.is_initialized() else 1

def total(x):
    """The sum over ranks of a tensor on the CPU, so that all of them decide alike."""
    if world() > 1:
        dist.all_reduce(x)
    return x

def describe(c, data, model):
    sam = f" over {c.base}, rho {c.rho:g}" * ("sam" in c.optimizer)
    ire = f", kappa {c.kappa:g}, gamma {c.gamma:g}, K {c.interval}, on from step {c.ire_warmup}" * ("ire" in c.optimizer)
    print(f"model      {c.model}, {sum(p.numel() for p in model.parameters()):,} parameters\n"
          f"data       {c.data}: {len(data.x):,} training and {len(data.test_x):,} test pictures, augment {c.augment}\n"
          f"device     {world()} x {c.device}, {c.dtype}, {torch.get_num_threads()} threads" + ", compiled" * c.compile + "\n"
          f"optimizer  {c.optimizer}{sam}, lr {c.lr:g}, weight decay {c.weight_decay:g}{ire}\n"
          f"run        {c.epochs} epochs of {data.steps_per_epoch} steps of {c.batch_size} pictures, into {c.out}; "
          f"the accuracy starts near {100 / data.classes:g}%", flush=True)

# What may differ on --resume: it does not change the weights.
FREE = ("out resume overwrite seeds data_dir limit_test holdout tta sharpness sharpness_images sharpness_probes log_interval "
        "eval_interval checkpoint_interval").split()

def refuse_changes(settings, saved, out):
    for name, value in settings.items():
        if name not in FREE and value != saved[name]:
            why = "; the cosine is cut to the epochs, so a longer run starts anew" * (name == "epochs")
            name, value = name.replace("_", "-"), f"{value}, allowed on --resume is {saved[name]}, with which {out} began"
            raise BadInput(f"--{name}: got {value}{why}")

def restore(c, data, **parts):
    """Loads model, optimizer and scaler from the checkpoint in c.out; returns its step, training seconds, last results."""
    saved = load_checkpoint(c.out)
    refuse_changes(dataclasses.asdict(c), saved["config"], c.out)
    if saved["data"] != data.sha256:
        raise BadInput(f"--data: the training pictures are not those that {c.out} began with, by their sha256")
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    end = saved["step"] == c.epochs * data.steps_per_epoch  # a finished run is tested anew, perhaps in another way
    log = [r for r in read_log(c.out) if r["step"] < saved["step"] + ("lr" in r or not end)]
    if rank() == 0:
        write_atomically(Path(c.out) / "log.jsonl", lambda f: f.write("".join(json.dumps(r) + "\n" for r in log).encode()))
    return saved["step"], saved["seconds"], {k: v for r in log for k, v in r.items() if k not in ("step", "seconds")}

def check_folder(c):
    """Refuses an --out that holds a run, unless --resume or --overwrite says what to do with it."""
    for name in ("out", "data_dir"):
        check(c, name, Path(getattr(c, name)).is_dir() or not Path(getattr(c, name)).exists(), "a folder, not a file")
    if (Path(c.out) / "checkpoint.pt").exists() and not (c.resume or c.overwrite):
        raise BadInput(f"--out: {c.out} holds a run; add --resume to go on with it or --overwrite to lose it")

@torch.no_grad()
def evaluate(model, data, c, autocast):
    """Test loss (without label smoothing) and accuracy in percent."""
    for buffer in model.buffers() if world() > 1 else ():  # batch norm's statistics, which each rank has its own of
        dist.broadcast(buffer, 0)
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    for x, y in zip(data.test_x[rank()::world()].split(500), data.test_y[rank()::world()].split(500)):
        with autocast:
            logits = model(x := data.normalized(x)).float()
            logits = (logits + model(x.flip(3)).float()) / 2 if c.tta else logits
        loss, correct = F.cross_entropy(logits, y, reduction="sum"), (logits.argmax(1) == y).sum()
        sums += torch.tensor([loss, correct, len(y)])
    model.train()
    loss, correct, count = total(sums).tolist()
    return loss / count, 100 * correct / count

def train(c: Config):
    """Trains one model; returns its settings with test_acc in percent, test_loss, train_loss, steps, seconds,
    images_per_second and, where asked for, trace and lambda_max of the Hessian with their errors."""
    c = complete(c)
    check_folder(c)
    if rank() > 0:
        total(torch.zeros(1))  # waits for rank 0, which fetches what is missing
    data = Data(c)
    if rank() == 0:
        total(torch.zeros(1))
    out, steps = Path(c.out), c.epochs * data.steps_per_epoch
    c.ire_warmup = c.ire_epoch * data.steps_per_epoch if c.ire_warmup is None else c.ire_warmup
    for name in ("checkpoint.pt", "config.json", "log.jsonl", "loss.png") if c.overwrite and rank() == 0 else ():
        (out / name).unlink(missing_ok=True)
    torch.manual_seed(c.seed + (rank() << 40))  # DDP spreads rank 0's weights; each rank draws its own labels in the probe
    torch.set_float32_matmul_precision("high")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(c.deterministic)
    if c.device == "cuda":
        torch.backends.cudnn.benchmark = not c.deterministic
    model = MODELS[c.model](data.classes).to(c.device, memory_format=torch.channels_last)
    optimizer, scaler = make_optimizer(model, c), torch.amp.GradScaler(c.device, enabled=c.dtype == "float16")
    autocast = torch.autocast(c.device, getattr(torch, c.dtype), enabled=c.dtype != "float32")
    step, seconds, result = restore(c, data, model=model, optimizer=optimizer, scaler=scaler) if c.resume else (0, 0.0, {})
    forward = DistributedDataParallel(model) if world() > 1 else model
    forward = torch.compile(forward) if c.compile else forward
    fixed = data.normalized(data.x[rank():c.batch_size:world()])
    saved_at = f"the last checkpoint is of step {step}" if c.resume else "no checkpoint was written"
    if rank() == 0:
        write_json(out / "config.json", dataclasses.asdict(c) | environment())
        describe(c, data, model)

    def record(line, **values):
        log.write(json.dumps({"step": step, **values, "seconds": round(seconds, 3)}) + "\n")
        log.flush()
        result.update(values)
        if rank() == 0:
            bar.write(f"step {step:5}/{steps}  {line}")

    def finite(loss, what, at):
        if not math.isfinite(loss):
            raise Diverged(f"step {at}: the {what} is {loss}; {saved_at}; try a lower --lr or --kappa, or a longer --warmup")

    def test():
        loss, accuracy = evaluate(model, data, c, autocast)
        finite(loss, "test loss", step)
        record(f"test accuracy {accuracy:.2f}%, loss {loss:.4f}", test_acc=accuracy, test_loss=loss)

    def save():
        state = dict(config=dataclasses.asdict(c), data=data.sha256, step=step, seconds=seconds, model=model.state_dict(),
                     optimizer=optimizer.state_dict(), scaler=scaler.state_dict())  # the weights alone draw from torch's stream
        if rank() == 0:
            write_atomically(out / "checkpoint.pt", lambda f: torch.save(state, f))
        return f"the last checkpoint is of step {step}"

    log_file, caught = out / "log.jsonl" if rank() == 0 else os.devnull, []
    with (contextlib.ExitStack() as stack, open(log_file, "a" if c.resume else "w") as log,
          tqdm(total=steps, initial=step, unit="step", disable=rank() > 0 or not sys.stderr.isatty()) as bar):
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.signal(number, lambda n, _: caught.append(n)))  # the step is finished
        if step == steps:
            test()
        losses, clock = [], time.perf_counter()
        while step < steps:
            lr = learning_rate(c, step, data.steps_per_epoch)
            for group in optimizer.param_groups:
                group.update({"lr": lr} | ({"kappa": c.kappa * lr / c.lr} if c.kappa_decay and "ire" in c.optimizer else {}))
            losses.append(train_step(model, forward, optimizer, data.batch(step), fixed, c, scaler, autocast))
            step += 1
            bar.update()
            stop = [number for number in (signal.SIGTERM, signal.SIGINT) if total(torch.tensor(caught.count(number)))]
            epoch, rest = divmod(step, data.steps_per_epoch)
            test_due, save_due = (step == steps or rest == 0 and epoch % every == 0
                                  for every in (c.eval_interval, c.checkpoint_interval))
            if not (step % c.log_interval == 0 or test_due or save_due or stop):
                continue
            losses = (total(torch.stack(losses).cpu().double()) / world()).tolist()  # the one place that waits for the device
            for at, loss in enumerate(losses, step - len(losses) + 1):
                finite(loss, "loss", at)
            loss, elapsed = statistics.mean(losses), time.perf_counter() - clock
            seconds, rate = seconds + elapsed, len(losses) * c.batch_size / elapsed
            masks = [s["flat"] for s in optimizer.state.values() if "flat" in s and step > c.ire_warmup]
            flat = {"flat": sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)} if masks else {}
            record(f"loss {loss:.4f}  lr {lr:.2e}  {rate:,.0f} images/s  {seconds / step * (steps - step):.0f} s left",
                   train_loss=loss, lr=lr, images_per_second=round(rate, 1), **flat)
            if test_due:
                test()
            if save_due or stop:
                saved_at = save()
            if stop and step < steps:
                raise Stopped(stop[0])
            losses, clock = [], time.perf_counter()
        if c.sharpness:
            measured = sharpness(model, data, c)
            record("Tr(Hessian) {trace:.4g} +- {trace_error:.2g}, lambda_max {lambda_max:.4g} +- {lambda_max_error:.2g}, on "
                   "{sharpness_images} pictures".format(**measured), **measured)
    if rank() == 0:
        draw(c)
    return result | dataclasses.asdict(c) | dict(steps=steps, seconds=seconds, images_per_second=steps * c.batch_size / seconds)

def run_seeds(typed):
    """As many runs as --seeds says, in DIR/seed-N; DIR/seeds.json holds their summaries."""
    out, runs = Path(typed.get("out", Config.out)), []
    if typed.get("resume") and (out / "seeds.json").exists():
        typed = json.loads((out / "seeds.json").read_text())["typed"] | typed
    for seed in range(first := typed.get("seed", 0), first + typed["seeds"]):
        own = out / f"seed-{seed}"
        resume = typed.get("resume", False) and (own / "checkpoint.pt").exists()
        runs.append(configure(typed | {"seed": seed, "out": str(own), "resume": resume}))
        check_folder(runs[-1])
    summary = {"command": " ".join(["python", "train_cifar.py", *sys.argv[1:]]), **environment(), "runs": [],
               "typed": {k: v for k, v in typed.items() if k not in ("resume", "overwrite")}}
    for c in [None, *runs]:
        summary["runs"] += [train(c)] if c else []
        if rank() == 0:
            write_json(out / "seeds.json", summary)
    for key in ("test_acc", "test_loss", "trace", "lambda_max"):
        if rank() == 0 and key in summary["runs"][0]:
            mean, error = mean_and_error([r[key] for r in summary["runs"]])
            print(f"{key:11}{mean:.4g} +- {error:.2g}, mean and standard error of {len(runs)} seeds")

# ------------------------------------------------------------------------------------------------ command line
def parse(arguments):
    """What was typed, as {name: value}; the other settings have their defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}; --help shows what is allowed\n")  # one line
    for f in dataclasses.fields(Config):
        text, default = (f.metadata["help"], f.metadata["allowed"][1]), f" (default {f.default})" * (f.default is not None)
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type, "metavar": f.type.__name__}
        parser.add_argument("--" + f.name.replace("_", "-"), help="; ".join(filter(None, text)) + default, **kind)
    return vars(parser.parse_args(arguments))

def configure(typed):
    """The typed settings over the defaults, on --resume over those of the run."""
    saved = load_checkpoint(typed.get("out", Config.out))["config"] if typed.get("resume") else {}
    refuse_changes(typed if saved else {}, saved, typed.get("out", Config.out))
    return complete(Config(**{**saved, **typed, "overwrite": typed.get("overwrite", False)}))

def main(arguments=None):
    typed, cuda = parse(arguments), torch.cuda.is_available()
    if "RANK" in os.environ:  # torchrun
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"])) if cuda else None
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        if typed.get("seeds", 1) > 1:
            run_seeds(typed)
        else:
            summary, report = train(configure(typed)), "test accuracy {test_acc:.2f}% after {steps} steps, {seconds:.0f} s"
            if rank() == 0:
                print((report + "\nfigure     {out}/loss.png").format(**summary))
        return 0
    except (BadInput, Diverged, OSError) as e:
        error, code = e, 2 if isinstance(e, BadInput) else 1
    except Stopped as e:
        error, code = "stopped; the checkpoint is written, go on with --resume", 128 + e.args[0]
    if rank() == 0:
        print(f"train_cifar.py: {error}", file=sys.stderr)
    return code

if __name__ == "__main__":
    status = main()
    if dist.is_initialized():  # gloo's threads may abort the interpreter's exit
        dist.destroy_process_group() if status == 0 else None
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
