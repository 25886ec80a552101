"""What the training scripts share: settings and their command line, the processes that torchrun
starts, and the folder of a run. Nothing here knows a model, a data set or an optimizer.

    @dataclasses.dataclass
    class Config(common.Settings):
        lr: float = common.setting(1e-3, "peak learning rate", common.POSITIVE)

    with common.Run(c, steps) as run:  # locked; Ctrl-C waits for the end of a step
        step = run.load()["step"] if c.resume else 0
        while step < steps:
            ...
            run.log(step, train_loss=loss)
            run.save(step=step, model=model.state_dict())

Top to bottom: errors, settings, command line, processes, machine, files, the folder of a run, main.
"""

import argparse
import contextlib
import dataclasses
import datetime
import difflib
import functools
import importlib.util
import itertools
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

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
    """The loss is not finite."""


class BadInput(Halt, ValueError):
    """The user can correct what is wrong."""

    code = 2


def check(c, name, good, allowed):
    """Raises BadInput, which names the setting, its value and what is allowed, unless good."""
    if not good:
        raise BadInput(f"{flag(name)}: got {repr(getattr(c, name)):.60}, allowed is {allowed}")


@contextlib.contextmanager
def instead(text):
    """Ends the script with `text` where a library raises an error of any kind."""
    try:
        yield
    except (Halt, ModuleNotFoundError):
        raise
    except Exception as e:
        # Torch's own words about an untrusted pickle advise to trust the file.
        unsafe = isinstance(e, pickle.UnpicklingError)
        why = "the file is damaged or holds code" if unsafe else " ".join(repr(e).split())
        raise BadInput(f"{text} ({why:.120})") from None


# ------------------------------------------------------------------------------------ settings
@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a setting may be, and the words for them."""

    low: float
    high: float
    words: str

    def __contains__(self, x):
        return self.low <= x <= self.high  # false for NaN


COUNT = Range(1, 2**31 - 1, "1 or more, below 2^31")
STEPS = Range(0, 2**31 - 1, "0 or more, below 2^31")
SEED = Range(0, 2**62 - 1, "0 to 2^62 - 1")
POSITIVE = Range(1e-30, 1e9, "above 0, up to 1e9")
NOT_NEGATIVE = Range(0, 1e9, "0 or more, up to 1e9")
UNIT = Range(0, 1, "0 to 1")
DECAY = Range(0, math.nextafter(1, 0), "0 or more and below 1")
FRACTION = Range(math.nextafter(0, 1), math.nextafter(1, 0), "above 0 and below 1")


def setting(default, help, allowed=None, *, resume=False, command=False, of=(), alone=None):
    """A field of a class of settings. Default None: the script chooses a value later.

    allowed: a Range, or a tuple of names.
    resume: the setting may change on --resume.
    command: the setting says what to do now, and no later run takes the setting over.
    of: the parts of an optimizer that read the setting, see refuse_unread; () for all.
    alone: the value of a flag that is typed without a value.
    """
    about = {"help": help, "allowed": allowed, "of": of, "alone": alone}
    about |= {"resume": resume or command, "command": command}
    return dataclasses.field(default=default, metadata=about)


@dataclasses.dataclass
class Settings:
    """The settings of every script. Values are checked one by one when the object is made."""

    home: ClassVar[str] = "runs/run"  # the default folder of a script's runs

    out: str = setting(None, "folder of the run (default: a free name in runs)", command=True)
    resume: bool = setting(
        False, "go on with the run in --out, or with the only unfinished run", command=True
    )
    overwrite: bool = setting(False, "replace the run in --out", command=True)
    config: str = setting(None, "a JSON file with settings, as config.json of a run", command=True)
    seed: int = setting(0, "of weights, batches and sampled labels", SEED)
    device: str = setting("auto", "where to train", ("auto", "cpu", "cuda", "mps"))
    dtype: str = setting(
        None,
        "of the forward and backward passes (default: what the device is fast at)",
        ("float32", "bfloat16", "float16"),
    )
    compile: bool = setting(None, "torch.compile (default: on GPUs that can)", resume=True)
    deterministic: bool = setting(False, "bit for bit the same runs on a GPU; slower")
    log_interval: int = setting(20, "steps between lines of the log", COUNT, resume=True)
    wandb: bool = setting(False, "send the log to Weights & Biases too", resume=True)
    given: list = dataclasses.field(default_factory=list)  # names that the user has set

    def __post_init__(self):
        for f in fields(type(self)):
            value = getattr(self, f.name)
            if value is None:
                continue
            right = type(value) is f.type or (f.type is float and type(value) is int)
            check(self, f.name, right, f"a value of type {f.type.__name__}")
            check(self, f.name, value != "" or f.default == "", "a text that is not empty")
            allowed = f.metadata["allowed"]
            check(self, f.name, allowed is None or value in allowed, words(allowed))


def fields(config_class):
    """The settings that have a flag."""
    return [f for f in dataclasses.fields(config_class) if f.metadata]


def flag(name):
    return "--" + name.replace("_", "-")


def words(allowed):
    """What is allowed, as a text."""
    return allowed.words if isinstance(allowed, Range) else ", ".join(allowed or ())


def collect(config_class, typed):
    """The settings that a run takes from its user: saved run (--resume) < --config < typed. The
    script puts its own defaults below them: Config(**preset | common.collect(Config, typed)).
    Raises BadInput where a setting would change the run that goes on."""
    asked = read_config(config_class, typed["config"]) if "config" in typed else {}
    asked |= typed
    if not asked.get("resume"):
        return asked | {"given": sorted(asked)}
    if "out" not in asked:
        asked["out"] = find_run(config_class.home, unfinished=True)
    return take_over(config_class, asked["out"], asked)


def take_over(config_class, folder, asked, free=()):
    """The settings of the run in a folder, under those that are asked for now. Raises BadInput
    where a setting differs that must not, that is, one without resume=True that is not in `free`.
    """
    before = read_checkpoint(folder, mmap=True)["config"]
    saved = {}
    for f in fields(config_class):
        name = f.name
        if f.metadata["command"] or name not in before:
            continue
        saved[name] = before[name]
        if asked.get(name) == "auto":
            asked = {k: x for k, x in asked.items() if k != name}
        may_differ = f.metadata["resume"] or name in free
        if not may_differ and asked.get(name, saved[name]) != saved[name]:
            began = f"{saved[name]}, as {folder} began"
            raise BadInput(f"{flag(name)}: got {asked[name]}, allowed is {began}")
    return saved | asked | {"given": sorted({*before.get("given", ()), *asked})}


def read_config(config_class, path):
    """The settings in a JSON file. A run's config.json says which ones its user had given: the
    others are left out, since they followed from these."""
    with instead(f"--config: got {path}, allowed is a JSON file with settings"):
        values = dict(json.loads(Path(path).read_text()))
    known = {f.name: f for f in fields(config_class)}
    values = {name: values[name] for name in values.pop("given", values)}
    for name in values.keys() - known.keys():
        raise BadInput(f"--config: {path} has {name!r}, which is no setting{alike(name, known)}")
    return {k: x for k, x in values.items() if x is not None and not known[k].metadata["command"]}


def refuse_unread(config_class, typed, parts, by):
    """Raises BadInput where a typed flag is read by none of these parts of an optimizer. A setting
    from a file may be there for another optimizer."""
    for f in fields(config_class):
        of = f.metadata["of"]
        if f.name in typed and of and not set(of) & set(parts):
            got = f"{flag(f.name)}: got {typed[f.name]}"
            raise BadInput(f"{got}, allowed is to leave it out: {by} does not read this setting")


# -------------------------------------------------------------------------------- command line
class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, from one process on each machine."""

    def error(self, message):
        text = f"{message:.300}; --help shows all flags"
        if "unrecognized" in message:
            wrong = message.split(": ", 1)[1]
            text = f"no flag {wrong:.200}{alike(wrong, self._option_string_actions)}; see --help"
        self.exit(2, f"{self.prog}: {text}\n" if LOCAL_RANK == 0 else "")


def alike(name, known):
    """A suggestion for a typing error."""
    near = difflib.get_close_matches(name.split()[0].split("=")[0], known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def parse(config_class, description, arguments=None):
    """What was typed, as {name: value}."""
    parser = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [--flag value ...]",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for f in fields(config_class):
        about = f.metadata
        text = about["help"] + (f"; {words(about['allowed'])}" if about["allowed"] else "")
        if f.default is not None and f.default is not False and f.default != "":
            text += f" (default {f.default})"
        kind = {"type": f.type, "metavar": f.type.__name__.upper()}
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        if about["alone"] is not None:
            kind |= {"nargs": "?", "const": about["alone"]}
        parser.add_argument(flag(f.name), help=text.replace("%", "%%"), **kind)
    return vars(parser.parse_args(arguments))


# ----------------------------------------------------------------------------------- processes
def start_ranks():
    """Joins torchrun's other processes. Gloo carries what is on the CPU."""
    if not LAUNCHED or dist.is_initialized():
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(LOCAL_RANK)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(days=1))


def over_ranks(values, op=dist.ReduceOp.SUM):
    """Sums of a list of numbers over all ranks; waits for them."""
    values = torch.as_tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(values, op)
    return values.tolist()


def from_first_rank(value):
    """The value that rank 0 has, on every rank."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def note(text):
    """One line beside the output, from one rank."""
    if RANK == 0:
        print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr)


def say(**lines):
    """Lines of output with a word in front, from one rank."""
    if RANK == 0:
        for name, text in lines.items():
            print(f"{name:11}{text}", flush=True)


# ------------------------------------------------------------------------------------- machine
def choose_device(c, float16=True):
    """Fills in c.device, c.dtype and c.compile by what this machine can do: bfloat16 is slow
    before sm_80, torch.compile fails before sm_70. float16: whether the script can scale losses."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    here = [name for name in found if found[name]] + ["cpu"]
    c.device = here[0] if c.device == "auto" else c.device
    check(c, "device", c.device in here, f"what this machine has: {', '.join(here)}")
    cuda = c.device == "cuda"
    capability = torch.cuda.get_device_capability() if cuda else (0, 0)
    fast = "bfloat16" if capability >= (8, 0) else "float16"
    if c.dtype is None:
        c.dtype = fast if cuda and (float16 or fast == "bfloat16") else "float32"
    fits = c.dtype != "float16" or (float16 and c.device != "cpu")
    check(c, "dtype", fits, "float32 or bfloat16 here, since losses are not scaled")
    typed = bool(c.compile)
    c.compile = capability >= (7, 0) if c.compile is None else c.compile
    why = compiler_error(c.device) if c.compile else ""
    if why:
        check(c, "compile", not typed, f"--no-compile here: {why}")
        note(f"goes on without torch.compile: {why}")
        c.compile = False


@functools.cache
def compiler_error(device):
    """Why torch.compile does not work here (no C++ compiler, no Triton, ...), or an empty text."""
    try:
        torch.compile(torch.sin)(torch.ones(2, device=device))
    except Exception as e:  # errors of many kinds
        return " ".join(str(e).split()[:16])
    return ""


def set_up_torch(c):
    """Seed and precision, and deterministic kernels if wanted."""
    torch.manual_seed(c.seed)
    torch.set_float32_matmul_precision("high")
    if c.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(c.deterministic)


def environment():
    """What a result depends on beside the settings."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--verify", "-q", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True) if shutil.which("git") else None
    cuda = torch.cuda.is_available()
    hardware = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    about = {"torch": torch.__version__, "hardware": hardware, "ranks": RANKS}
    return about | {"commit": commit.stdout.strip() if commit else ""}


def require(*packages):
    """Raises ModuleNotFoundError now, and not at the end of the training."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(name=package)


# --------------------------------------------------------------------------------------- files
def write_atomically(path, write):
    """Writes a whole file or leaves the old one, also when the power goes. write(file) writes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        part.replace(path)
    except (OSError, RuntimeError) as e:
        disk = e if isinstance(e, OSError) else e.__context__  # torch.save hides the disk's error
        if not isinstance(disk, OSError):
            raise
        raise OSError(disk.errno, disk.strerror, str(path)) from None
    finally:
        part.unlink(missing_ok=True)


def write_json(path, value):
    write_atomically(path, lambda f: f.write(json.dumps(value, indent=1).encode()))


def read_json(path):
    return json.loads(Path(path).read_text())


def download(url, path, sha256, otherwise):
    """Fetches a file once, whole and with this checksum. otherwise: what the user can do."""
    path = Path(path)
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with instead(f"{otherwise}; {url} can't be fetched"):
        torch.hub.download_url_to_file(url, str(path), sha256, progress=sys.stderr.isatty())


def read_checkpoint(folder, mmap=False):
    """The checkpoint in a run's folder. mmap: its tensors are read only when they are used."""
    path = Path(folder) / "checkpoint.pt"
    if not path.exists():
        raise BadInput(f"{folder} is not the folder of a run: {path} is missing")
    with instead(f"{path} can't be read as the checkpoint of a run"):
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        return saved | {"config": dict(saved["config"])}


def read_log(folder):
    """The lines of a run's log, without the half line that a kill may leave."""
    path = Path(folder) / "log.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def draw(path, panels, marks=None):
    """A figure of curves over steps. panels: {title: {label: [(step, value), ...]}}. marks: words
    for single steps, {word: step}."""
    from matplotlib.figure import Figure  # not pyplot, whose backend may be a notebook's

    figure = Figure(figsize=(max(6.4, 3.4 * len(panels)), 4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (title, curves) in zip(axes, panels.items(), strict=True):
        high = []
        for label, points in curves.items():
            ax.plot(*zip(*points, strict=True), label=label, marker="o", ms=2, lw=1)
            high += [y for x, y in points if x >= 0.1 * points[-1][0]]
        low = min((y for points in curves.values() for _, y in points), default=0)
        if "loss" in title and high and max(high) > low:  # the first fall would hide the rest
            ax.set_ylim(low - 0.05 * (max(high) - low), max(high))
        for word, step in (marks or {}).items():
            ax.axvline(step, color="grey", ls=":", label=word)
        ax.set(xlabel="step", title=title)
        ax.grid(alpha=0.3)
        ax.legend()
    write_atomically(path, lambda f: figure.savefig(f, format="png", dpi=150))


# --------------------------------------------------------------------------- folder of a run
def free_folder(home):
    """home, home-2, home-3, ...: the first one without a run, chosen by rank 0."""
    names = (home if n == 1 else f"{home}-{n}" for n in itertools.count(1))
    return from_first_rank(next(name for name in names if not Path(name, "config.json").exists()))


def find_run(home, unfinished=False, file="checkpoint.pt"):
    """The one run in home, home-2, ..., or the one of them that has not come to its end. file: what
    a folder must have."""
    runs = sorted(str(path.parent) for path in Path().glob(f"{home}*/{file}"))
    begun = [path for path in runs if not read_json(Path(path, "config.json")).get("finished")]
    wanted = begun if unfinished else runs
    if len(wanted) != 1:
        kind = "an unfinished run" if unfinished else "a run"
        found = ", ".join(wanted or runs) or "none"
        raise BadInput(f"--out: got nothing, allowed is the folder of {kind}; here are {found}")
    return wanted[0]


@contextlib.contextmanager
def locked(folder):
    """Keeps other processes out of a folder, which is made if missing."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        config = folder / "config.json"
        pid = read_json(config)["pid"] if config.exists() else "?"
        text = f"--out: got {folder}, allowed is a folder that no other process uses"
        raise BadInput(f"{text}; process {pid} trains there") from None
    try:
        yield
    finally:
        lock.release()


def choose_folder(c):
    """Fills in c.out. Raises BadInput where the run would replace another one unasked."""
    c.out = c.out or free_folder(c.home)
    check(c, "resume", not (c.resume and c.overwrite), "one of --resume and --overwrite")
    check(c, "out", not Path(c.out).is_file(), "a folder, not a file")
    kept = c.resume or c.overwrite or not Path(c.out, "checkpoint.pt").exists()
    ways = "a folder without a run, or --resume to go on, or --overwrite to replace the run"
    check(c, "out", kept, ways)


class Run:
    """The folder of a run while the run goes on: `with Run(c, steps) as run`. No other process
    gets into the folder. Ctrl-C and SIGTERM wait until the script calls asked_to_stop().

    seconds: of training so far, between start_clock() and stop_clock().
    kept: where the last checkpoint was written.
    """

    def __init__(self, c, steps):
        self.c = c
        self.out = Path(c.out)
        self.steps = steps
        self.seconds = 0.0
        self.kept = "none"
        self.signal = 0
        self.first = None  # (step, seconds) of the first line of the log

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            if RANK == 0:
                stack.enter_context(locked(self.out))
                choose_folder(self.c)  # again, now that no other process can change it
                if not self.c.resume:
                    for name in ("checkpoint.pt", "log.jsonl"):
                        (self.out / name).unlink(missing_ok=True)
                self.write_config(finished=False)
            if RANK == 0 and self.c.wandb:
                import wandb

                about = {"dir": self.c.out, "config": dataclasses.asdict(self.c)}
                stack.enter_context(wandb.init(project="ire", name=self.out.name, **about))
            quiet = RANK > 0 or not sys.stderr.isatty()
            self.bar = stack.enter_context(tqdm(total=self.steps, unit="step", disable=quiet))
            stack.enter_context(on_signals(lambda number: setattr(self, "signal", number)))
            self.stack = stack.pop_all()
        self.start_clock()
        return self

    def __exit__(self, kind, error, traceback):
        with self.stack:
            if kind is None and RANK == 0:
                self.write_config(finished=True)

    def write_config(self, finished):
        about = environment() | {"pid": os.getpid(), "finished": finished}
        write_json(self.out / "config.json", dataclasses.asdict(self.c) | about)

    def load(self, **parts):
        """The checkpoint. Its states go to the parts of the same names, such as model=model. The
        log loses the lines that were written after it."""
        saved = read_checkpoint(self.out)
        path = self.out / "log.jsonl"
        if RANK == 0 and path.exists() and path.stat().st_size > saved["log_bytes"]:
            os.truncate(path, saved["log_bytes"])
        self.seconds = saved["seconds"]
        self.kept = f"step {saved['step']}"
        for name, part in parts.items():
            with instead(f"--resume: {name} in {self.out}/checkpoint.pt does not fit"):
                part.load_state_dict(saved[name])
        return saved

    def save(self, step, name="checkpoint.pt", **state):
        """Writes OUT/name with settings, step and state; every rank calls it, rank 0 writes. What
        has a state_dict() is written as that."""
        if RANK:
            return
        path = self.out / "log.jsonl"
        size = path.stat().st_size if path.exists() else 0
        state = {k: x.state_dict() if hasattr(x, "state_dict") else x for k, x in state.items()}
        reached = {"step": step, "seconds": self.seconds, "log_bytes": size}
        saved = {"config": dataclasses.asdict(self.c)} | reached | state
        try:
            write_atomically(self.out / name, lambda f: torch.save(saved, f))
        except OSError as e:
            raise Halt(f"{e}; last good checkpoint: {self.kept}") from None
        if name == "checkpoint.pt":
            self.kept = f"step {step}"

    def log(self, step, **values):
        """A line of log.jsonl, of the terminal, and of W&B. None is left out, as is a number that
        is not finite, since JSON has none."""
        if RANK:
            return
        values = {k: x for k, x in values.items() if x is not None and math.isfinite(x)}
        line = {"step": step} | values | {"seconds": round(self.seconds, 3)}
        with open(self.out / "log.jsonl", "a") as f:
            f.write(json.dumps(line) + "\n")
        texts = [f"step {step:5}/{self.steps}"]
        for name, x in values.items():
            unit = name.removesuffix("_per_second")
            texts.append(f"{name} {x:.4g}" if unit == name else f"{x:,.0f} {unit}/s")
        self.bar.update(step - self.bar.n)
        self.bar.write("  ".join(texts) + self.left(step))
        if self.c.wandb:
            import wandb

            wandb.log(values, step=step)

    def left(self, step):
        """How long the rest will take, after the first lines."""
        self.first = self.first or (step, self.seconds)
        done = step - self.first[0]
        if done == 0 or step == self.steps:
            return ""
        seconds = (self.seconds - self.first[1]) / done * (self.steps - step)
        return f"  {seconds:.0f} s left" if seconds < 100 else f"  {seconds / 60:.0f} min left"

    def start_clock(self):
        self.clock = time.perf_counter()

    def stop_clock(self):
        """Returns the seconds since start_clock()."""
        passed = time.perf_counter() - self.clock
        self.seconds += passed
        return passed

    def asked_to_stop(self):
        """Whether a signal came, to any rank."""
        self.signal = int(over_ranks([self.signal], dist.ReduceOp.MAX)[0])
        return self.signal > 0

    def stopped(self, saved="the checkpoint is written"):
        """What a script raises after a signal."""
        halt = Halt(f"stopped; {saved}, go on with --resume")
        halt.code = 128 + self.signal
        return halt


# ---------------------------------------------------------------------------------------- main
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


def stop(number):
    """Ends the script at a signal where there is no step to finish."""
    note("stopped")
    sys.exit(128 + number)


def main(config_class, description, command, arguments=None, memory="lower --batch-size"):
    """Runs command(typed) and returns the exit code. An error that a user can correct is one line.
    memory: what to do when the memory is full."""
    if hasattr(sys.stdout, "reconfigure"):  # a terminal may not have every letter
        sys.stdout.reconfigure(errors="replace")
    code = 1
    try:
        with on_signals(stop):
            typed = parse(config_class, description, arguments)
            start_ranks()
            command(typed)
        return 0
    except Halt as e:
        code = e.code
        text = str(e)
    except OSError as e:
        text = str(e)
    except ModuleNotFoundError as e:
        code = 2
        text = f"{e.name} is missing: pip install {PACKAGES.get(e.name, e.name)}"
    except (MemoryError, RuntimeError) as e:
        known = isinstance(e, (MemoryError, torch.OutOfMemoryError))
        if not known and "allocate memory" not in str(e):
            raise
        text = f"out of memory: {memory}"
    if LOCAL_RANK > 0 and code > 128:  # a signal, and the first rank says so
        return code
    if LOCAL_RANK > 0:
        time.sleep(5)  # where all ranks fail alike, the first one speaks and torchrun ends the rest
        text = f"rank {RANK}: {text}"
    print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr)
    return code


PACKAGES = {"sklearn": "scikit-learn"}  # where pip's name is another


def leave(status):
    """Ends the process. With several ranks gloo's threads may abort Python's own way out."""
    if not dist.is_initialized():
        sys.exit(status)
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(status)
