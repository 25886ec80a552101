"""Train an image classifier with SGD, AdamW or SAM, each alone or with IRE over it. The smallest command first:

    python train_cifar.py --data digits                      # ResNet-56 on scikit-learn's digits: minutes on 2 cores
    python train_cifar.py                                    # CIFAR-10, 200 epochs of SGD-IRE: wants a GPU
    python train_cifar.py --model vit_t --data cifar100      # AdmIRE
    python train_cifar.py --optimizer sam-ire --seeds 3 --sharpness     # mean, standard error, Tr(Hessian), lambda_max
    torchrun --standalone --nproc_per_node 2 train_cifar.py  # the same batches over two GPUs
    python train_cifar.py --resume                           # go on after Ctrl-C, to the same bits
"""
import argparse, contextlib, dataclasses, functools, hashlib, http.client, json, math, os, pickle, shutil
import statistics, subprocess, sys, tarfile, time, urllib.request
from pathlib import Path
from signal import SIGINT, SIGTERM, signal

import numpy as np, torch, torch.distributed as dist, torch.nn as nn, torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from ire import IRE, SAM, frozen_batch_norm, sampled_cross_entropy

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them

# ------------------------------------------------------------------------------------------------ settings
class Halt(Exception): code = 1  # ends the script with one line and this exit code
class BadInput(Halt, ValueError): code = 2  # what the user can mend

COUNT, POSITIVE = (lambda x: x >= 1, "1 or more"), (lambda x: 0 < x < math.inf, "a finite number above 0")
NOT_NEGATIVE, FRACTION = (lambda x: 0 <= x < math.inf, "0 or more"), (lambda x: 0 <= x < 1, "0 or more and below 1")

def setting(default, text, allowed=(lambda x: True, "")):
    """default: a value, a function of the settings above it, or a dict of these, whose keys are how a device, data, model,
    optimizer or base begins and of which the last that fits counts. allowed: names, or a test and its words."""
    if isinstance(allowed, str): allowed = allowed.split().__contains__, allowed.replace(" ", ", ")
    cases = default if isinstance(default, dict) else {"": default}
    return dataclasses.field(default=None, metadata={"help": text, "allowed": allowed, "cases": cases})

@dataclasses.dataclass
class Config:
    """None is what was not given: complete() fills it in. Only the settings above `seed` may change on --resume."""
    out: str = setting("runs/cifar", "folder for config, log, checkpoint and figure")
    resume: bool = setting(False, "go on from the checkpoint in --out")
    overwrite: bool = setting(False, "delete the run in --out first")
    seeds: int = setting(1, "runs, with seeds --seed, --seed + 1, ...; prints mean and standard error", COUNT)
    data_dir: str = setting("data", "folder with the official archive (fetched if missing) or the unpacked one")
    limit_test: int = setting(None, "test pictures, the first so many (default all)", COUNT)
    holdout: int = setting(0, "test on the last so many training pictures instead, for tuning", NOT_NEGATIVE)
    tta: bool = setting(False, "test on each picture and its mirror image: the mean of their logits")
    sharpness: bool = setting(False, "at the end Tr(Hessian) and lambda_max of the training loss")
    sharpness_images: int = setting(1024, "first training pictures, not augmented, that they are taken of", COUNT)
    sharpness_probes: int = setting(16, "random vectors for the trace", (lambda x: x >= 2, "2 or more"))
    log_interval: int = setting(50, "steps between lines of the log", COUNT)
    eval_interval: int = setting(1, "epochs between tests and checkpoints", COUNT)
    seed: int = setting(0, "of weights, batches and probes", (lambda x: 0 <= x < 2**62, "0 to 2^62 - 1"))
    device: str = setting("auto", "where to train", "auto cpu cuda mps")
    dtype: str = setting({"": "float32", "cuda": "bfloat16"}, "of the forward pass", "float32 bfloat16 float16")
    compile: bool = setting({"": False, "cuda": True}, "torch.compile the model")
    deterministic: bool = setting(False, "deterministic CUDA kernels, slower")
    data: str = setting("cifar10", "pictures; digits are scikit-learn's, at 32x32", "cifar10 cifar100 digits")
    limit_train: int = setting(None, "training pictures, the first so many (default all)", COUNT)
    model: str = setting("resnet56", "network", (lambda x: x in MODELS, "resnet56, wrn28_10, wrn16_8, vit_t, vit_s"))
    augment: str = setting({"": "basic", "vit": "mixup", "digits": "shift"}, "basic shifts and flips; "
                           "cutout and mixup do that first", "none shift basic cutout mixup")
    epochs: int = setting({"": 200, "digits": 10}, "passes over the training pictures", COUNT)
    batch_size: int = setting({"": 128, "digits": 32}, "pictures in a step, over all GPUs together", COUNT)
    warmup: int = setting({"": 0, "vit": lambda c: c.epochs // 10}, "epochs to the peak (default 0, ViT a tenth)", NOT_NEGATIVE)
    label_smoothing: float = setting(0.1, "of the training loss", FRACTION)
    optimizer: str = setting({"": "sgd-ire", "vit": "admire"}, "admire is adamw-ire", "sgd adamw sam sgd-ire admire sam-ire")
    base: str = setting({"": "sgd", "vit": "adamw", "sgd": "sgd", "ad": "adamw"}, "SAM's (default sgd, ViT adamw)", "sgd adamw")
    lr: float = setting({"": 0.1, "digits": 0.02, "adamw": 0.001}, "peak learning rate", POSITIVE)  # SGD on digits: 0.1 fails
    weight_decay: float = setting({"": 5e-4, "adamw": 0.1}, "the base's", NOT_NEGATIVE)
    decay_norms: bool = setting(True, "weight decay on biases and norms too")
    momentum: float = setting(0.9, "SGD's", FRACTION)
    rho: float = setting(0.05, "SAM: length of the climb", NOT_NEGATIVE)
    kappa: float = setting(1.0, "IRE: steps along flat coordinates are 1 + kappa times as long", NOT_NEGATIVE)
    gamma: float = setting(0.9, "IRE: flat fraction of the coordinates", (lambda x: 0 < x < 1, "above 0 and below 1"))
    interval: int = setting(10, "IRE: steps from one mask to the next", COUNT)
    ire_epoch: int = setting(lambda c: c.epochs * 6 // 10, "IRE: first epoch, from 0 (default 0.6 of --epochs)", NOT_NEGATIVE)
    ire_warmup: int = setting(None, "IRE: steps before it switches on (default those before --ire-epoch)", NOT_NEGATIVE)
    curvature: str = setting("fisher", "IRE: the mask's; second_moment is AdamW's", "fisher second_moment")
    probe: str = setting("fixed", "IRE: pictures for fisher, the first ones or the step's own", "fixed fresh")
    kappa_decay: bool = setting(False, "IRE: kappa follows the learning rate down")

def check(c, name, good, allowed):
    if not good: raise BadInput(f"--{name.replace('_', '-')}: got {getattr(c, name)}, allowed is {allowed}")

def complete(c: Config) -> Config:
    """Fills in what was not given, on resume from the run in c.out; raises BadInput on what is out of range or changes that run."""
    c, fields = dataclasses.replace(c, out=c.out or "runs/cifar"), dataclasses.fields(c)
    saved = load_checkpoint(c.out)["config"] | {"overwrite": False} if c.resume else {}
    here = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    c.device = here[0] if (device := c.device or saved.get("device", "auto")) == "auto" else device
    for f in fields:
        words, (good, allowed) = f" {c.device} {c.data} {c.model} {c.optimizer} {c.base}", f.metadata["allowed"]
        default = [value for case, value in f.metadata["cases"].items() if f" {case}" in words][-1]
        if getattr(c, f.name) is None: setattr(c, f.name, saved.get(f.name, default(c) if callable(default) else default))
        check(c, f.name, getattr(c, f.name) is None or good(getattr(c, f.name)), allowed)
    for f in fields[[f.name for f in fields].index("seed"):] if saved else ():
        check(c, f.name, getattr(c, f.name) == saved[f.name], f"{saved[f.name]} on --resume, as {c.out} began: it keeps its schedule")
    check(c, "resume", not (c.resume and c.overwrite), "one of --resume and --overwrite")
    check(c, "device", c.device in here, f"what this machine has: {', '.join(here)}")
    check(c, "dtype", c.dtype != "float16" or c.device != "cpu" and "sam" not in c.optimizer, "another on a CPU or with SAM")
    check(c, "base", c.optimizer.startswith(("sam", c.base[:2])), f"to leave it out with --optimizer {c.optimizer}")
    check(c, "curvature", c.curvature == "fisher" or c.base == "adamw", "fisher over sgd, which has no second moment")
    check(c, "batch_size", c.batch_size % RANKS == 0, f"a multiple of the {RANKS} processes")
    for name in ("warmup", "ire_epoch"): check(c, name, getattr(c, name) < c.epochs, f"0 to --epochs - 1, {c.epochs - 1}")
    for name in ("out", "data_dir"): check(c, name, not Path(getattr(c, name)).is_file(), "a folder, not a file")
    return c

# ------------------------------------------------------------------------------------------------ models
conv = functools.partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)

class Block(nn.Module):  # two convolutions and a shortcut, normalised after them (He et al. 2016) or before, pre (WRN)
    def __init__(self, n_in, n_out, stride, pre):
        super().__init__()
        self.pre = pre
        self.conv1, self.norm1 = conv(n_in, n_out, stride=stride), nn.BatchNorm2d(n_in if pre else n_out)
        self.conv2, self.norm2 = conv(n_out, n_out), nn.BatchNorm2d(n_out)
        self.shortcut = nn.Sequential()
        if n_in != n_out: self.shortcut.append(nn.Conv2d(n_in, n_out, 1, stride, bias=False))
        if n_in != n_out and not pre: self.shortcut.append(nn.BatchNorm2d(n_out))

    def forward(self, x):
        if not self.pre: return F.relu(self.shortcut(x) + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))
        y = F.relu(self.norm1(x))
        return (self.shortcut(y) if self.shortcut else x) + self.conv2(F.relu(self.norm2(self.conv1(y))))

def resnet(depth, classes, factor=1, pre=False):
    """CIFAR's ResNet, three stages of (depth - 2) / 6 blocks, projection shortcuts; or WRN-depth-factor where `pre`."""
    norm, width, blocks = lambda n: [nn.BatchNorm2d(n), nn.ReLU()], 16, (depth - (4 if pre else 2)) // 6
    layers = [conv(3, 16)] + ([] if pre else norm(16))
    for stage in range(3):
        for stride in [1 if stage == 0 else 2] + [1] * (blocks - 1):
            layers.append(Block(width, width := 16 * factor * 2**stage, stride, pre))
    layers += (norm(width) if pre else []) + [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]
    for m in (model := nn.Sequential(*layers)).modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)): nn.init.kaiming_normal_(m.weight, nonlinearity="relu")  # He et al. 2015
    nn.init.zeros_(model[-1].bias)
    return model

class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021; widths and initialisation of DeiT) on patches of 4 x 4 pixels."""
    def __init__(self, width, heads, classes, depth=12, patch=4, size=32):
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, width, patch, patch), nn.Linear(width, classes)
        self.token, self.position = (nn.Parameter(torch.empty(1, n, width)) for n in (1, (size // patch) ** 2 + 1))
        block = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        for name, p in self.named_parameters():
            if p.dim() > 1: nn.init.trunc_normal_(p, std=0.02)
            elif name.endswith("bias"): nn.init.zeros_(p)

    def forward(self, x):  # (batch, 3, size, size) -> logits (batch, classes)
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.blocks(torch.cat((self.token.expand(len(x), -1, -1), x), 1) + self.position)[:, 0])

MODELS = {"resnet56": lambda n: resnet(56, n), "wrn28_10": lambda n: resnet(28, n, 10, pre=True),  # n classes
          "wrn16_8": lambda n: resnet(16, n, 8, pre=True), "vit_t": lambda n: ViT(192, 3, n), "vit_s": lambda n: ViT(384, 6, n)}

# ------------------------------------------------------------------------------------------------ data
URL, CIFAR = "https://www.cs.toronto.edu/~kriz/", {  # archive, sha256, folder, files, the last for the test, labels, classes
    "cifar10": ("cifar-10-python.tar.gz", "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
                "cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"], b"labels", 10),
    "cifar100": ("cifar-100-python.tar.gz", "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
                 "cifar-100-python", ["train", "test"], b"fine_labels", 100)}

class Unpickler(pickle.Unpickler):  # a pickle that names more than arrays could run code
    def find_class(self, module, name):
        known = {"ndarray": np.ndarray, "dtype": np.dtype, "_reconstruct": np.empty(0).__reduce__()[0],
                 "encode": lambda text, _: text.encode("latin1")}  # bytes, as Python 3 pickles them for 2
        if name in known: return known[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, allowed are arrays, bytes, lists and dicts")

def sha256(path): return hashlib.sha256(path.read_bytes()).hexdigest()

def download(url, path: Path, digest):  # goes on where a connection broke, now or in a later run
    part, error = path.with_name(f".{path.name}.part"), "its checksum is wrong"
    part.parent.mkdir(parents=True, exist_ok=True)
    part.touch()
    for _ in range(5):
        request = urllib.request.Request(url, headers={"Range": f"bytes={part.stat().st_size}-"})
        try:
            with (urllib.request.urlopen(request, timeout=30) as reply, open(part, "ab" if reply.status == 206 else "wb") as f,
                  tqdm.wrapattr(f, "write", total=reply.length, desc=path.name, disable=not sys.stderr.isatty()) as sink):
                shutil.copyfileobj(reply, sink)
        except (OSError, http.client.HTTPException) as e:
            error = e
            if getattr(e, "code", 0) == 416: part.write_bytes(b"")  # nothing is missing, yet it is not the archive
        if sha256(part) == digest: return os.replace(part, path)
    raise BadInput(f"--data-dir: {url} can't be fetched ({error}); run again to go on, or put the archive at {path}")

def load_cifar(c):  # pictures (n, 32, 32, 3) uint8 and labels (n,) for training, the same for the test, number of classes
    archive, digest, folder, names, key, classes = CIFAR[c.data]
    path, folder, parts = Path(c.data_dir) / archive, Path(c.data_dir) / folder, []
    packed = not folder.exists()
    if packed and not path.exists() and RANK == 0: download(URL + archive, path, digest)
    over_ranks(torch.zeros(1))  # the others wait
    if packed and sha256(path) != digest: raise BadInput(f"--data-dir: {path} has a wrong checksum; delete it to fetch it")
    with tarfile.open(path) if packed else contextlib.nullcontext() as tar:
        for name in names:
            try:
                with tar.extractfile(f"{folder.name}/{name}") if packed else open(folder / name, "rb") as f:
                    batch = Unpickler(f, encoding="bytes").load()
                x, y = batch[b"data"], np.array(batch[key], dtype=np.int64)
                if x.dtype != np.uint8 or x.shape != (len(y), 3072) or not 0 <= y.min() <= y.max() < classes:
                    raise ValueError(f"it needs uint8 data (n, 3072) and n labels from 0 to {classes - 1}")
            except Exception as e:  # a broken pickle raises almost anything
                raise BadInput(f"--data-dir: {folder / name}: {e!r:.200}; allowed is the archive, or it unpacked whole")
            parts.append((x.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), y))
    return tuple(np.concatenate(v) for v in zip(*parts[:-1])), parts[-1], classes

def load_digits():  # the same of scikit-learn's 1797 handwritten digits, a random fifth held out for the test
    from sklearn.datasets import load_digits
    x, y = load_digits(return_X_y=True)
    x = F.interpolate(torch.tensor(x).view(-1, 1, 8, 8) * (255 / 16), size=32, mode="bilinear").round().byte()
    x, test = x.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy(), np.random.default_rng(0).permutation(len(x)) % 5 == 0
    return (x[~test], y[~test]), (x[test], y[test]), 10

def shift_and_flip(x, u, flip):  # x (b, h, w, c) moved by up to 4 pixels over black, with `flip` half of them mirrored
    i, sample = torch.arange(x.shape[1], device=x.device), torch.arange(len(x), device=x.device)[:, None, None]
    rows, columns = (i + (u[:, k, None] * 9).long() for k in (0, 1))  # (b, size), in the padded picture
    columns = torch.where(u[:, 2, None] < 0.5, columns.flip(1), columns) if flip else columns
    return F.pad(x, (0, 0, 4, 4, 4, 4))[sample, rows[:, :, None], columns[:, None, :]]

def cutout(x, u, length):  # x (b, c, h, w) with a square of zeros around a random pixel (DeVries and Taylor 2017)
    i = torch.arange(x.shape[2], device=x.device)
    rows, columns = ((i - (u[:, k, None] * len(i)).long() + 0.5).abs() < length / 2 for k in (0, 1))
    return x.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)

class Data:  # pictures as uint8 on the device; a batch is a function of seed and step, so a resumed run sees the same
    def __init__(self, c):
        (x, y), (test_x, test_y), self.classes = load_digits() if c.data == "digits" else load_cifar(c)
        check(c, "holdout", c.holdout < len(x), f"fewer than the {len(x)} training pictures")
        if c.holdout: x, y, test_x, test_y = x[:-c.holdout], y[:-c.holdout], x[-c.holdout:], y[-c.holdout:]
        x, y = x[:c.limit_train].copy(), y[:c.limit_train]
        check(c, "batch_size", c.batch_size <= len(x), f"1 to {len(x)}, the training pictures")
        self.c, self.sha256, self.steps_per_epoch = c, hashlib.sha256(x).hexdigest(), len(x) // c.batch_size
        self.x, self.y, self.test_x, self.test_y = (
            torch.tensor(v, device=c.device) for v in (x, y, test_x[:c.limit_test], test_y[:c.limit_test]))
        mean, square = x.mean((0, 1, 2)), np.square(x, dtype=np.uint16).mean((0, 1, 2))
        self.mean, self.std = (torch.tensor(v, dtype=torch.float32, device=c.device).view(3, 1, 1)
                               for v in (mean, (square - mean**2 + 1e-6) ** 0.5))

    def normalized(self, x):  # uint8 (b, h, w, 3) to float32 (b, 3, h, w) in channels-last memory
        return (x.permute(0, 3, 1, 2) - self.mean) / self.std

    def batch(self, step):
        """This rank's share of a step: pictures (b, 3, h, w), augmented, and labels (b,), after mixup (b, classes)."""
        (epoch, i), size, kind = divmod(step, self.steps_per_epoch), self.c.batch_size, self.c.augment
        if i == 0 or not hasattr(self, "order"):
            self.order = np.random.default_rng((self.c.seed, 0, epoch)).permutation(len(self.x))
        rng = np.random.default_rng((self.c.seed, 1, step))
        index, u = (torch.from_numpy(v[RANK::RANKS]).to(self.c.device)
                    for v in (self.order[i * size:(i + 1) * size], rng.random((size, 5), np.float32)))
        x, y = self.x[index], self.y[index]
        x = self.normalized(x if kind == "none" else shift_and_flip(x, u[:, :3], flip=kind != "shift"))
        if kind == "mixup":  # of the pictures of a rank (Zhang et al. 2018)
            y, weight = F.one_hot(y, self.classes).float(), rng.beta(0.5, 0.5)
            return weight * x + (1 - weight) * x.flip(0), weight * y + (1 - weight) * y.flip(0)
        return cutout(x, u[:, 3:5], 16 if self.classes == 10 else 8) if kind == "cutout" else x, y

# ------------------------------------------------------------------------------------------------ files
def write_atomically(path: Path, write):  # whole or not at all, also when the power goes
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        part.replace(path)
    except RuntimeError as e: raise e.__context__ or e  # torch.save's own, over the disk's
    finally: part.unlink(missing_ok=True)

def load_checkpoint(folder):
    try:
        return torch.load(Path(folder) / "checkpoint.pt", map_location="cpu", weights_only=True)
    except Exception as e:  # torch.load raises many kinds
        raise BadInput(f"--resume: {folder}/checkpoint.pt can't be read: {e!r:.200}; is {folder} the --out of a run?") from None

def read_log(folder):  # whole lines: a kill may leave half of one
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().split("\n")[:-1]]

def draw(c):  # DIR/loss.png: loss, test accuracy, learning rate and, with IRE, the flat fraction over steps
    from matplotlib.figure import Figure  # without pyplot, whose backend may be a notebook's
    panels = [("loss", "train_loss", "test_loss"), ("test accuracy (%)", "test_acc"), ("learning rate", "lr")]
    if "ire" in c.optimizer: panels += [("flat fraction", "flat")]
    figure, log = Figure(figsize=(3.2 * len(panels), 3), layout="constrained"), read_log(c.out)
    for ax, (title, *keys) in zip(figure.subplots(1, len(panels)), panels):
        for key in keys: ax.plot(*np.array([(r["step"], r[key]) for r in log if key in r]).T, "o-", ms=3, label=key)
        if "ire" in c.optimizer: ax.axvline(c.ire_warmup, color="grey", linestyle=":", label="IRE switches on")
        if len(keys) > 1: ax.legend()
        ax.set(xlabel="step", title=title)
    write_atomically(Path(c.out) / "loss.png", lambda f: figure.savefig(f, format="png", dpi=150))

# ------------------------------------------------------------------------------------------------ optimizers
def make_optimizer(model, c):
    groups = [{"params": [p for p in model.parameters() if (p.dim() > 1) == matrices],
               "weight_decay": c.weight_decay * (matrices or c.decay_norms)} for matrices in (True, False)]
    optimizer = (torch.optim.SGD(groups, c.lr, momentum=c.momentum) if c.base == "sgd" else
                 torch.optim.AdamW(groups, c.lr, fused=c.device != "mps"))
    if "sam" in c.optimizer: optimizer = SAM(optimizer, rho=c.rho)
    if "ire" not in c.optimizer: return optimizer
    return IRE(optimizer, kappa=c.kappa, gamma=c.gamma, interval=c.interval, warmup=c.ire_warmup, curvature=c.curvature)

def train_step(model, forward, optimizer, batch, fixed, c, scaler, autocast):  # with a probe if due; the loss before the step
    (x, y), passes = batch, iter((contextlib.nullcontext(), frozen_batch_norm(model)))
    if getattr(optimizer, "probe_due", False):
        with optimizer.probe(), frozen_batch_norm(model):
            with autocast: logits = forward(fixed if c.probe == "fixed" else x)
            scaler.scale(sampled_cross_entropy(logits.float())).backward()
    def closure():
        optimizer.zero_grad()
        with next(passes), autocast: logits = forward(x)
        loss = F.cross_entropy(logits.float(), y, label_smoothing=c.label_smoothing)
        scaler.scale(loss).backward()
        return loss.detach()
    if "sam" in c.optimizer: return optimizer.step(closure)
    loss = closure()
    scaler.step(optimizer)
    scaler.update()
    return loss

# ------------------------------------------------------------------------------------------------ sharpness
def hessian_products(losses, params, vectors):  # H v in float64 for each row v; H is of the mean of the functions `losses`
    flat, total = lambda parts: torch.cat([x.flatten() for x in parts]), 0
    grad = functools.partial(torch.autograd.grad, inputs=params, materialize_grads=True)
    for loss in losses:
        slope = flat(grad(loss(), create_graph=True))
        products = [flat(grad(slope, grad_outputs=v.to(slope), retain_graph=True)) for v in vectors]
        total = total + torch.stack(products).cpu().double() / len(losses)
    return total

def hessian_trace(losses, params, probes=16, seed=0):  # and its standard error; Hutchinson: mean v H v over random signs v
    v = torch.randint(2, (probes, sum(map(torch.numel, params))), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
    return mean_and_error((v * hessian_products(losses, params, v)).sum(1).tolist())

def largest_eigenvalue(losses, params, tolerance=0.01, seed=0):
    """lambda_max(H) by ARPACK's Lanczos, to a residual |H v - lambda v| of tolerance * lambda, and that residual."""
    from scipy.sparse.linalg import LinearOperator, eigsh
    product = lambda v: hessian_products(losses, params, torch.from_numpy(v)[None])[0].numpy()
    start = np.random.default_rng(seed).standard_normal(sum(map(torch.numel, params)))
    H = LinearOperator((len(start), len(start)), product, dtype=float)
    (value,), vectors = eigsh(H, 1, which="LA", tol=tolerance, v0=start, ncv=10)
    return float(value), float(np.linalg.norm(H @ (v := vectors[:, 0]) - value * v))

def sharpness(model, data, c):  # of the training loss in float32, not augmented, batch norm with each batch's statistics
    count, params = max(min(c.sharpness_images, len(data.x)) // c.batch_size, 1) * c.batch_size, list(model.parameters())
    losses = [lambda x=data.normalized(x), y=y: F.cross_entropy(model(x), y, label_smoothing=c.label_smoothing)
              for x, y in zip(data.x[:count].split(c.batch_size), data.y[:count].split(c.batch_size))]
    with frozen_batch_norm(model), sdpa_kernel(SDPBackend.MATH):  # the one attention with a second derivative
        trace, error = hessian_trace(losses, params, c.sharpness_probes, c.seed)
        largest, residual = largest_eigenvalue(losses, params, seed=c.seed)
    return dict(trace=trace, trace_error=error, lambda_max=largest, lambda_max_error=residual, sharpness_images=count)

def mean_and_error(values): return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5

# ------------------------------------------------------------------------------------------------ training
def over_ranks(x, op=dist.ReduceOp.SUM):  # a tensor on the CPU, reduced so that all ranks decide alike
    if RANKS > 1: dist.all_reduce(x, op)
    return x

@torch.no_grad()
def evaluate(model, data, c, autocast):  # accuracy in percent and loss, without label smoothing, on the test pictures
    for buffer in model.buffers() if RANKS > 1 else (): dist.broadcast(buffer, 0)  # batch norm's statistics, each rank's own
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64)
    for x, y in zip(data.test_x[RANK::RANKS].split(500), data.test_y[RANK::RANKS].split(500)):
        with autocast:
            logits = model(x := data.normalized(x)).float()
            if c.tta: logits = (logits + model(x.flip(3)).float()) / 2
        sums += torch.tensor([F.cross_entropy(logits, y, reduction="sum"), (logits.argmax(1) == y).sum()])
    model.train()
    loss, correct = over_ranks(sums).tolist()
    return dict(test_acc=100 * correct / len(data.test_x), test_loss=loss / len(data.test_x))

def train(c: Config):
    """Trains one model; returns, on rank 0, its settings and the last of each value in its log, such as test_acc in percent."""
    import matplotlib.figure  # if it is missing, that is said here and not after the training
    c = complete(c)
    out = Path(c.out)
    check(c, "out", c.resume or c.overwrite or not (out / "checkpoint.pt").exists(), "one without a run, or --resume or --overwrite")
    data = Data(c)
    per_epoch, steps, warmup = (n * data.steps_per_epoch for n in (1, c.epochs, c.warmup))
    if c.ire_warmup is None: c.ire_warmup = c.ire_epoch * per_epoch
    torch.manual_seed(c.seed + (RANK << 40))  # DDP spreads rank 0's weights; each rank draws its own labels in the probe
    torch.set_float32_matmul_precision("high")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(c.deterministic)
    torch.backends.cudnn.benchmark = not c.deterministic
    model = MODELS[c.model](data.classes).to(c.device, memory_format=torch.channels_last)
    optimizer, scaler = make_optimizer(model, c), torch.amp.GradScaler(c.device, enabled=c.dtype == "float16")
    autocast = torch.autocast(c.device, getattr(torch, c.dtype), enabled=c.dtype != "float32")
    parts, step, seconds, kept = {"model": model, "optimizer": optimizer, "scaler": scaler}, 0, 0.0, "no checkpoint was written"
    if c.resume:
        saved = load_checkpoint(c.out)
        check(c, "data", saved["data"] == data.sha256, f"the pictures that {c.out} began with; these differ, by their sha256")
        for name, part in parts.items(): part.load_state_dict(saved[name])
        step, seconds, kept = saved["step"], saved["seconds"], f"the last checkpoint is of step {saved['step']}"
    forward = nn.parallel.DistributedDataParallel(model) if RANKS > 1 else model
    if c.compile: forward = torch.compile(forward)
    fixed = data.normalized(data.x[RANK:c.batch_size:RANKS])
    if RANK == 0:
        git = subprocess.run("git log -1 --format=%H", shell=True, cwd=Path(__file__).parent, capture_output=True, text=True)
        config = json.dumps(dataclasses.asdict(c) | {"torch": torch.__version__, "commit": git.stdout.strip()}, indent=1)
        write_atomically(out / "config.json", lambda f: f.write(config.encode()))
        lines = [json.dumps(r) + "\n" for r in (read_log(out) if c.resume else ()) if r["step"] <= step]
        write_atomically(out / "log.jsonl", lambda f: f.write("".join(lines).encode()))
        if not c.resume: (out / "checkpoint.pt").unlink(missing_ok=True)
        sam = f" over {c.base}, rho {c.rho}" * ("sam" in c.optimizer)
        ire = f", kappa {c.kappa}, gamma {c.gamma}, K {c.interval}, on from step {c.ire_warmup}" * ("ire" in c.optimizer)
        print(f"model      {c.model}, {sum(map(torch.numel, model.parameters())):,} parameters, on {RANKS} x {c.device}\n"
              f"data       {c.data}: {len(data.x):,} training and {len(data.test_x):,} test pictures, augment {c.augment}\n"
              f"optimizer  {c.optimizer}{sam}, lr {c.lr}, weight decay {c.weight_decay}{ire}\n"
              f"run        {steps} steps in {c.dtype}, into {out}; the accuracy starts near {100 / data.classes:g}%")
    def record(**values):
        values = {"step": step, **values, "seconds": round(seconds, 3)}
        log.write(json.dumps(values) + "\n")
        log.flush()
        if RANK == 0: bar.write("  ".join(f"{name} {value:.4g}" for name, value in values.items()))
    with (contextlib.ExitStack() as stack, open(out / "log.jsonl" if RANK == 0 else os.devnull, "a") as log,
          tqdm(total=steps, initial=step, unit="step", disable=RANK > 0 or not sys.stderr.isatty()) as bar):
        caught = []  # signals; the step is finished first
        for number in (SIGINT, SIGTERM): stack.callback(signal, number, signal(number, lambda n, _: caught.append(n)))
        if step == steps: record(**evaluate(model, data, c, autocast))
        pending, clock = [], time.perf_counter()
        while step < steps:
            cosine = 0.5 + 0.5 * math.cos(math.pi * max(0, step - warmup) / (steps - warmup))
            lr = c.lr * min((step + 1) / max(1, warmup), cosine)
            for group in optimizer.param_groups:
                group["lr"] = lr
                if c.kappa_decay and "ire" in c.optimizer: group["kappa"] = c.kappa * lr / c.lr
            pending.append(train_step(model, forward, optimizer, data.batch(step), fixed, c, scaler, autocast))
            step += 1
            bar.update()
            stop = int(over_ranks(torch.tensor(caught[0] if caught else 0), dist.ReduceOp.MAX))
            test_due = step == steps or step % (c.eval_interval * per_epoch) == 0
            if not (step % c.log_interval == 0 or test_due or stop): continue
            losses = (over_ranks(torch.stack(pending).cpu().double()) / RANKS).tolist()  # only here it waits for the device
            elapsed = time.perf_counter() - clock
            seconds, rate = seconds + elapsed, round(len(losses) * c.batch_size / elapsed, 1)
            values = dict(train_loss=statistics.mean(losses), lr=lr, images_per_second=rate)
            masks = list(getattr(optimizer, "masks", {}).values()) if step > c.ire_warmup else []
            if masks: values["flat"] = sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)
            if test_due: values |= evaluate(model, data, c, autocast)
            for at, loss in (*enumerate(losses, step - len(losses) + 1), (step, values.get("test_loss", 0))):
                if not math.isfinite(loss): raise Halt(f"step {at}: the loss is {loss}; {kept}; try a lower --lr or --kappa")
            record(**values)
            if test_due or stop:  # the weights alone draw from torch's random stream, so it is not saved
                state = dict(config=dataclasses.asdict(c), data=data.sha256, step=step, seconds=seconds)
                state |= {name: part.state_dict() for name, part in parts.items()}
                if RANK == 0: write_atomically(out / "checkpoint.pt", lambda f: torch.save(state, f))
                kept = f"the last checkpoint is of step {step}"
            if stop and step < steps:
                (halt := Halt("stopped; the checkpoint is written, go on with --resume")).code = 128 + stop
                raise halt
            pending, clock = [], time.perf_counter()
        if c.sharpness: record(**sharpness(model, data, c))
    if RANK == 0:
        draw(c)
        summary = {name: value for row in read_log(out) for name, value in row.items()} | dataclasses.asdict(c)
        print(f"test accuracy {summary['test_acc']:.2f}% after {steps} steps, {seconds:.0f} s\nfigure     {out / 'loss.png'}")
        return summary

def train_seeds(c: Config):  # as many runs as --seeds says, in DIR/seed-N
    out = Path(c.out or "runs/cifar")
    begun = sorted(int(path.parent.name[5:]) for path in out.glob("seed-*/checkpoint.pt")) if c.resume else []
    first = begun[0] if begun and c.seed is None else c.seed or 0
    if begun: c = complete(dataclasses.replace(c, seed=None, out=f"{out}/seed-{begun[0]}"))  # so the others are alike
    runs = [train(dataclasses.replace(c, seed=seed, out=f"{out}/seed-{seed}", resume=seed in begun))
            for seed in range(first, first + c.seeds)]
    for key in [key for key in ("test_acc", "test_loss", "trace", "lambda_max") if RANK == 0 and key in runs[0]]:
        print(f"{key:11}%.4g +- %.2g, mean and standard error of {c.seeds} seeds" % mean_and_error([r[key] for r in runs]))

# ------------------------------------------------------------------------------------------------ command line
def parse(arguments):  # what was typed, as a Config
    cli = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.error = lambda message: cli.exit(2, f"{cli.prog}: {message}; --help shows what is allowed\n")  # one line
    for f in dataclasses.fields(Config):
        text, (_, allowed), cases = f.metadata["help"], f.metadata["allowed"], f.metadata["cases"]
        if allowed: text += f"; {allowed}"
        if "(default" not in text: text += f" (default {', '.join(f'{case} {value}'.strip() for case, value in cases.items())})"
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type, "metavar": f.type.__name__}
        cli.add_argument("--" + f.name.replace("_", "-"), help=text, **kind)
    return Config(**vars(cli.parse_args(arguments)))

def main(arguments=None):
    c, cuda = parse(arguments), torch.cuda.is_available()
    if RANKS > 1 and cuda: torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if RANKS > 1: dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        train_seeds(c) if (c.seeds or 1) > 1 else train(c)
        return 0
    except (Halt, OSError, ImportError) as e:
        install = "; pip install scikit-learn matplotlib" * isinstance(e, ImportError)
        if RANK == 0: print(f"train_cifar.py: {e}{install}", file=sys.stderr)
        return 2 if install else getattr(e, "code", 1)
    finally:
        if RANKS > 1: dist.destroy_process_group()

if __name__ == "__main__": sys.exit(main())
