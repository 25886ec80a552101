"""What the training scripts share: settings and their command line, the processes that torchrun
starts, and the folder of a run. Nothing here knows a model, a data set or an optimizer.

Top to bottom: errors, settings, command line, machine, files, the folder of a run, main.
"""

import argparse
import contextlib
import dataclasses
import datetime
import difflib
import functools
import itertools
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import torch
import torch.distributed as dist
from tqdm import tqdm

LAUNCHED = "TORCHELASTIC_RUN_ID" in os.environ  # by torchrun
RANK = int(os.environ["RANK"]) if LAUNCHED else 0
LOCAL_RANK = int(os.environ["LOCAL_RANK"]) if LAUNCHED else 0
RANKS = int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1


# -------------------------------------------------------------------------------------- errors
class Halt(Exception):
    """Ends the script with one line and this exit code."""

    code = 1


class Diverged(Halt):
    """Says that the loss is not finite."""


class BadInput(Halt, ValueError):
    """Says what the user can correct."""

    code = 2


def check(c, name, good, allowed):
    """Raises BadInput unless good. The line names the setting, its value and what is allowed."""
    if not good:
        raise BadInput(f"{flag(name)}: got {repr(getattr(c, name)):.60}, allowed is {allowed}")


@contextlib.contextmanager
def instead(text):
    """Raises BadInput with this text where a library raises an error of any kind."""
    try:
        yield
    except (Halt, ModuleNotFoundError):
        raise
    except Exception as e:
        why = " ".join(f"{type(e).__name__}: {e}".split())
        if isinstance(e, pickle.UnpicklingError):  # torch's own words advise to trust the file
            why = "the file is damaged or holds code"
        raise BadInput(f"{text} ({why:.120})") from None


# ------------------------------------------------------------------------------------ settings
@dataclasses.dataclass(frozen=True)
class Range:
    """Names the numbers that a setting may be."""

    low: float
    high: float
    words: str

    def __contains__(self, x):
        return self.low <= x <= self.high  # false for NaN


COUNT = Range(1, 2**31 - 1, "1 to 2^31 - 1")
STEPS = Range(0, 2**31 - 1, "0 to 2^31 - 1")
POSITIVE = Range(1e-30, 1e9, "above 0, up to 1e9")
NOT_NEGATIVE = Range(0, 1e9, "0 or more, up to 1e9")
DECAY = Range(0, math.nextafter(1, 0), "0 or more and below 1")
DTYPES = ("float32", "bfloat16", "float16")
FRACTION = Range(math.nextafter(0, 1), math.nextafter(1, 0), "above 0 and below 1")


def setting(default, help, allowed=None, *, resume=False, command=False, of=(), alone=None):
    """Makes a field of a class of settings. Default None: the script chooses a value later.

    allowed: a Range, or a tuple of names.
    resume: the setting may change on --resume.
    command: the setting says what to do now, and no later run takes the setting over.
    of: the parts of an optimizer that read the setting, see refuse_unread; () for all.
    alone: the value of a flag that is typed without a value.
    """
    words = allowed.words if isinstance(allowed, Range) else ", ".join(allowed or ())
    about = {"help": help, "allowed": allowed, "words": words, "of": of, "alone": alone}
    about |= {"resume": resume or command, "command": command}
    return dataclasses.field(default=default, metadata=about)


@dataclasses.dataclass
class Settings:
    """Holds the settings of every script, and checks each value when the object is made. The class
    of a script adds `home`, the default folder of its runs."""

    out: str = setting(None, "folder of the run (default: a new one in runs)", command=True)
    resume: bool = setting(False, "go on with the run in --out, or the newest run", command=True)
    overwrite: bool = setting(False, "replace the run in --out", command=True)
    config: str = setting(None, "a JSON file with settings, as a run's config.json", command=True)
    seed: int = setting(0, "of weights, batches and sampled labels", STEPS)
    device: str = setting("auto", "where to train", ("auto", "cpu", "cuda", "mps"), resume=True)
    dtype: str = setting(None, "precision of the passes (default: what is fast here)", DTYPES)
    compile: bool = setting(None, "torch.compile (default: on GPUs that can)", resume=True)
    deterministic: bool = setting(False, "bit for bit the same runs on a GPU; slower")
    log_interval: int = setting(20, "steps between lines of the log", COUNT, resume=True)
    wandb: bool = setting(False, "send the log to Weights & Biases too", resume=True)
    given: list = dataclasses.field(default_factory=list)  # names that the user has set

    def __post_init__(self):
        for f in fields(type(self)):
            value = getattr(self, f.name)
            allowed = f.metadata["allowed"]
            if value is not None:
                right = type(value) is f.type or (f.type is float and type(value) is int)
                check(self, f.name, right, f"a value of type {f.type.__name__}")
                check(self, f.name, value != "" or f.default == "", "a text that is not empty")
                check(self, f.name, not allowed or value in allowed, f.metadata["words"])


def fields(config_class):
    """Returns the settings that have a flag."""
    return [f for f in dataclasses.fields(config_class) if f.metadata]


def flag(name):
    return "--" + name.replace("_", "-")


def collect(config_class, typed):
    """Returns the settings that a user has set. What is typed counts before --config, and --config
    before the run that goes on. A script puts its own defaults below these settings:
    Config(**preset | common.collect(Config, typed)). Raises BadInput where a new value would change
    the run that goes on."""
    asked = with_config(config_class, typed)
    if not typed.get("resume"):
        return asked | {"given": sorted(asked)}
    folder = typed["out"] if "out" in typed else newest_run(f"{config_class.home}*")
    before = read_checkpoint(folder, mmap=True)["config"]
    saved = {"given": sorted({*before.get("given", ()), *asked})}
    for f in fields(config_class):
        value = before.get(f.name, f.default)
        new = asked.get(f.name, value)
        if new != value and not f.metadata["resume"]:
            allowed = "to leave it out" if value is None else value
            raise BadInput(f"{flag(f.name)}: got {new}, allowed is {allowed}, as {folder} began")
        # What a script has chosen for its ranks and its machine is chosen again.
        chosen = f.default is None and f.metadata["resume"] and f.name not in saved["given"]
        if not (chosen or f.metadata["command"]):
            saved[f.name] = value
    return saved | asked | {"out": folder}


def with_config(config_class, typed):
    """Returns what was typed, on top of the settings in the JSON file --config. Where this is a
    run's config.json, takes those that its user had given, since the others followed from them."""
    if "config" not in typed:
        return typed
    path = typed["config"]
    with instead(f"--config: got {path}, allowed is a JSON file with settings"):
        values = dict(read_json(path))
        given = set(values.get("given", values))
    commands = {f.name: f.metadata["command"] for f in fields(config_class)}
    if "given" in values:  # of a run, whose commands, such as --out, were for that run
        given = {name for name in given if not commands.get(name)}
    for name in given:
        if commands.get(name, True):
            allowed = "names of settings; what to do now is typed"
            raise BadInput(f"--config: {path} has {name!r}, allowed are {allowed}")
    return {name: values[name] for name in given if values.get(name) is not None} | typed


def refuse_unread(config_class, typed, parts, by):
    """Raises BadInput for a typed flag that none of these parts of an optimizer reads. A setting in
    a file is not refused: it may be there for another optimizer. by: the optimizer in words."""
    for f in fields(config_class):
        of = f.metadata["of"]
        if f.name in typed and of and not set(of) & set(parts):
            got = f"{flag(f.name)}: got {typed[f.name]}"
            raise BadInput(f"{got}, allowed is to leave it out: {by} does not read this setting")


# -------------------------------------------------------------------------------- command line
class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, and what may be meant."""

    def error(self, message):
        if "unrecognized" in message:
            wrong = message.split(": ", 1)[1].split("=")[0]
            near = difflib.get_close_matches(wrong, self._option_string_actions, 1)
            message += f"; did you mean {near[0]}?" if near else ""
        raise BadInput(f"{message:.300}; --help shows all flags")


def parse(config_class, description, arguments=None):
    """Returns what was typed, as {name: value}."""
    parser = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [--flag value ...]",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for f in fields(config_class):
        about = f.metadata
        text = "; ".join(filter(None, (about["help"], about["words"])))
        if f.default is not None and f.default is not False and f.default != "":
            text += f" (default {f.default})"
        kind = {"type": f.type, "metavar": f.type.__name__.upper()}
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        if about["alone"] is not None:
            kind |= {"nargs": "?", "const": about["alone"]}
        parser.add_argument(flag(f.name), help=text.replace("%", "%%"), **kind)
    return vars(parser.parse_args(arguments))


# ------------------------------------------------------------------------------------- machine
def start_ranks():
    """Joins the other processes of torchrun. Gloo carries what is on the CPU."""
    if LAUNCHED:
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(LOCAL_RANK)
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=datetime.timedelta(days=1))


def over_ranks(values, op=dist.ReduceOp.SUM):
    """Returns the sums of some numbers over all ranks, or what `op` makes of the numbers. Each rank
    waits for the others."""
    values = torch.as_tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(values, op)
    return values.tolist()


def say(**lines):
    """Prints lines with a word in front of each, on one rank."""
    if RANK == 0:
        for name, text in lines.items():
            print(f"{name:11}{text}", flush=True)


def choose_device(c, float16=True):
    """Fills in c.device, c.dtype and c.compile by what this machine can do. bfloat16 is slow before
    sm_80, and torch.compile fails before sm_70. float16: whether the script can scale losses."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    here = [name for name in found if found[name]] + ["cpu"]
    c.device = here[0] if c.device == "auto" else c.device
    check(c, "device", c.device in here, f"what this machine has: {', '.join(here)}")
    capability = torch.cuda.get_device_capability() if c.device == "cuda" else (0, 0)
    half = ["float16"] if c.device == "cuda" and float16 else []
    dtypes = [*half, "float32", "bfloat16"]
    c.dtype = c.dtype or ("bfloat16" if capability >= (8, 0) else dtypes[0])
    check(c, "dtype", c.dtype in dtypes, f"{', '.join(dtypes)} here")
    if c.compile is None:
        c.compile = capability >= (7, 0) and not compiler_error(c.device)


def compiler_error(device):
    """Says why torch.compile does not work here, or returns an empty text where it works."""
    try:
        torch.compile(torch.sin)(torch.ones(2, device=device))
    except Exception as e:  # errors of many kinds
        why = " ".join(str(e).split()[:16])
        say(note=f"training goes on without torch.compile: {why}")
        return why
    return ""


def set_up_torch(c):
    """Sets the seed, the precision and, if wanted, deterministic kernels."""
    torch.manual_seed(c.seed)
    torch.set_float32_matmul_precision("high")
    if c.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(c.deterministic)


@functools.cache
def environment():
    """Returns what a result depends on besides the settings. The commit is that of the first call,
    as Python does not read the code again."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--verify", "-q", "HEAD"]
    commit = ""
    with contextlib.suppress(OSError):  # git may be missing
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    cuda = torch.cuda.is_available()
    hardware = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    return {"torch": torch.__version__, "hardware": hardware, "ranks": RANKS, "commit": commit}


# --------------------------------------------------------------------------------------- files
def write_atomically(path, write):
    """Replaces a file by what write(file) writes. If anything fails, the old file stays."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)  # where the disk is full


def write_json(path, value):
    write_atomically(path, lambda f: f.write(json.dumps(value, indent=1).encode()))


def read_json(path):
    return json.loads(Path(path).read_text())


def download(url, path, sha256, otherwise):
    """Fetches a file if it is missing, and checks it. otherwise: what the user can do."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with instead(f"{otherwise}; {url} can't be fetched"):
        torch.hub.download_url_to_file(url, str(path), sha256, progress=sys.stderr.isatty())


def read_checkpoint(folder, mmap=False):
    """Returns the checkpoint of a run. mmap: tensors are read when they are used."""
    path = Path(folder) / "checkpoint.pt"
    with instead(f"{path} can't be read as the checkpoint of a run"):
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        return saved | {"config": dict(saved["config"])}


def read_log(folder):
    """Returns the lines of a run's log, without the half line that a kill may leave."""
    lines = (Path(folder) / "log.jsonl").read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def curve(log, key):
    """Returns [(step, value), ...] of the lines of a log that have this key."""
    return [(line["step"], line[key]) for line in log if key in line]


def draw(path, panels):
    """Draws curves over steps. panels: {title: {label: [(step, value), ...]}}. Empty curves and
    panels are left out."""
    from matplotlib.figure import Figure  # not pyplot, whose backend may be a notebook's

    panels = {title: curves for title, curves in panels.items() if any(curves.values())}
    figure = Figure(figsize=(max(6.4, 3.4 * len(panels)), 4), layout="constrained")
    for i, (title, curves) in enumerate(panels.items(), 1):
        ax = figure.add_subplot(1, len(panels), i)
        for label, points in curves.items():
            ax.plot(*zip(*points, strict=True), label=label, marker="o", ms=2, lw=1)
        scale = "log" if "loss" in title else "linear"
        ax.set(xlabel="step", title=title, yscale=scale)
        ax.grid(alpha=0.3, which="both")
        ax.legend()
    write_atomically(path, lambda f: figure.savefig(f, format="png", dpi=150))


# --------------------------------------------------------------------------- folder of a run
def free_folder(home):
    """Returns the first of home, home-2, home-3, ... that does not exist."""
    names = (home if n == 1 else f"{home}-{n}" for n in itertools.count(1))
    return next(name for name in names if not Path(name).exists())


def newest_run(pattern):
    """Returns the folder with the newest checkpoint among the folders of this pattern."""
    found = sorted(Path().glob(f"{pattern}/checkpoint.pt"), key=os.path.getmtime)
    if not found:
        raise BadInput(f"--out: got nothing, allowed is the folder of a run; none is at {pattern}")
    return str(found[-1].parent)


@contextlib.contextmanager
def locked(folder):
    """Makes a folder if it is missing, and keeps other processes out of it."""
    allowed = "one to write to that no other process uses"
    with instead(f"the folder of a run: got {folder}, allowed is {allowed}"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(Path(folder, ".lock")).acquire(blocking=False)
    with lock:
        yield


def choose_folder(c):
    """Fills in c.out. Raises BadInput where the run would replace another run unasked."""
    c.out = c.out or free_folder(c.home)
    check(c, "resume", not (c.resume and c.overwrite), "one of --resume and --overwrite")
    kept = c.resume or c.overwrite or not Path(c.out, "checkpoint.pt").exists()
    ways = "a folder without a run, or --resume to go on, or --overwrite to replace the run"
    check(c, "out", kept, ways)


def settings_of_runs(home, typed, changes, configure):
    """Returns OUT and the settings of several runs, each in OUT/NAME. On --resume all of them take
    the settings of the first, and go on or begin. changes: {NAME: what this run has of its own}."""
    out = typed.get("out")
    if out is None and typed.get("resume"):
        out = Path(newest_run(f"{home}*/*")).parent
    out = Path(out or free_folder(home))
    first = next(iter(changes))
    c = configure(typed | changes[first] | {"out": str(out / first)})
    settings = []
    for name, own in changes.items():
        begun = c.resume and (out / name / "checkpoint.pt").exists()
        settings.append(dataclasses.replace(c, **own, out=str(out / name), resume=begun))
        choose_folder(settings[-1])  # before the first run begins
    return out, settings


class Run(contextlib.ExitStack):
    """Holds the folder of a run while the run goes on: `with Run(c, steps) as run`. No other
    process gets into the folder. Ctrl-C and SIGTERM wait until the script calls asked_to_stop().

    seconds: of training so far, between start_clock() and stop_clock().
    kept: the last checkpoint in words, such as "step 100".
    """

    def __init__(self, c, steps):
        super().__init__()
        self.c = c
        self.out = Path(c.out)
        self.steps = steps
        self.seconds = 0.0
        self.kept = "none"
        self.signal = 0
        self.wandb = None

    def __enter__(self):
        if RANK == 0:
            self.enter_context(locked(self.out))
            choose_folder(self.c)  # again, now that no other process can change it
            settings = dataclasses.asdict(self.c)
            if self.c.wandb:
                import wandb

                run = wandb.init(project="ire", name=self.out.name, config=settings)
                self.wandb = self.enter_context(run)
            if not self.c.resume:
                (self.out / "checkpoint.pt").unlink(missing_ok=True)
                (self.out / "log.jsonl").unlink(missing_ok=True)
            write_json(self.out / "config.json", settings | environment())
        hidden = True if RANK else None  # None: shown on a terminal
        self.bar = self.enter_context(tqdm(total=self.steps, unit="step", disable=hidden))
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.signal(number, self.on_signal)
            self.callback(signal.signal, number, before)
        return self

    def load(self, **parts):
        """Returns the checkpoint, and loads its states into the parts of the same names, such as
        model=model. The log loses the lines that were written after the checkpoint."""
        saved = read_checkpoint(self.out)
        path = self.out / "log.jsonl"
        if RANK == 0 and path.exists() and path.stat().st_size > saved["log_bytes"]:
            os.truncate(path, saved["log_bytes"])
        self.seconds = saved["seconds"]
        self.kept = f"step {saved['step']}"
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        return saved

    def save(self, step, name="checkpoint.pt", **state):
        """Writes settings, step and state to OUT/name on rank 0. A part of the state that has a
        state_dict() is written as its state_dict()."""
        if RANK:
            return
        path = self.out / "log.jsonl"
        size = path.stat().st_size if path.exists() else 0
        state = {k: x.state_dict() if hasattr(x, "state_dict") else x for k, x in state.items()}
        reached = {"step": step, "seconds": self.seconds, "log_bytes": size}
        saved = {"config": dataclasses.asdict(self.c)} | reached | state
        try:
            write_atomically(self.out / name, lambda f: torch.save(saved, f))
        except (OSError, RuntimeError) as e:  # torch.save hides the disk's error in another
            why = f"{e.__context__ or e}; last checkpoint: {self.kept}"
            raise Halt(f"{self.out / name} can't be written: {why}") from None
        if name == "checkpoint.pt":
            self.kept = f"step {step}"

    def log(self, step, **values):
        """Writes a line to log.jsonl, to the terminal and to W&B. Numbers that are not finite are
        left out, since JSON has none."""
        if RANK:
            return
        values = {k: x for k, x in values.items() if math.isfinite(x)}
        line = {"step": step} | values | {"seconds": round(self.seconds, 3)}
        with open(self.out / "log.jsonl", "a") as f:
            f.write(json.dumps(line) + "\n")
        texts = [f"step {step:5}/{self.steps}"]
        for name, x in values.items():
            unit = name.removesuffix("_per_second")
            texts.append(f"{name} {x:.4g}" if unit == name else f"{x:,.0f} {unit}/s")
        if 0 < step < self.steps:
            texts.append(f"{self.seconds / step * (self.steps - step) / 60:.0f} min left")
        self.bar.update(step - self.bar.n)
        self.bar.write("  ".join(texts))
        if self.wandb:
            self.wandb.log(values, step=step)

    def check_finite(self, step, values, advice):
        """Raises Diverged where a value is not finite. values: one for each of the last steps, up
        to this step. advice: what to try."""
        for i, x in enumerate(values, step - len(values) + 1):
            if not math.isfinite(x):
                what = f"step {i}: the loss or its gradient is {x}; last checkpoint: {self.kept}"
                raise Diverged(f"{what}; try {advice}")

    def start_clock(self):
        self.clock = time.perf_counter()

    def stop_clock(self):
        """Returns the seconds since start_clock()."""
        passed = time.perf_counter() - self.clock
        self.seconds += passed
        return passed

    def on_signal(self, number, frame):
        self.signal = number

    def asked_to_stop(self):
        """Returns whether a signal came to any rank."""
        number = int(over_ranks([self.signal], dist.ReduceOp.MAX)[0])
        if number:  # a signal that comes during the line above stays for the next step
            self.signal = number
        return number > 0

    def stopped(self):
        """Returns what a script raises after a signal."""
        text = f"stopped; last checkpoint: {self.kept}"
        if self.kept != "none":
            text += "; to go on, add --resume to the same command"
        halt = Halt(text)
        halt.code = 128 + self.signal
        return halt


# ---------------------------------------------------------------------------------------- main
def main(config_class, description, command, arguments=None, memory="lower --batch-size"):
    """Runs command(typed) and returns the exit code. An error that a user can correct is one line.
    memory: what to do when the memory is full."""
    try:
        typed = parse(config_class, description, arguments)
        start_ranks()
        command(typed)
        return 0
    except KeyboardInterrupt:  # where there is no step to finish
        code = 128 + signal.SIGINT
        text = "stopped"
    except (Halt, OSError) as e:
        code = getattr(e, "code", 1)
        text = str(e)
    except ModuleNotFoundError as e:
        code = 2
        text = f"{e.name} is missing: pip install {e.name}"
    except (MemoryError, RuntimeError) as e:
        full = isinstance(e, (MemoryError, torch.OutOfMemoryError))
        if not full and "DefaultCPUAllocator" not in str(e):  # torch has no other sign on a CPU
            raise
        code = 1
        text = f"out of memory: {memory}"
    if LOCAL_RANK > 0 and code > 128:  # a signal, and the first rank says so
        return code
    if LOCAL_RANK > 0:
        time.sleep(5)  # where all ranks fail alike, the first one speaks and torchrun ends the rest
        text = f"rank {RANK}: {text}"
    print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr)
    return code


def leave(status):
    """Ends the process. With several ranks, gloo's threads may abort Python's own exit."""
    if not dist.is_initialized():
        sys.exit(status)
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(status)
