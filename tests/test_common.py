"""common.py by a script of a few lines, small_script.py: each rule of the scripts once."""

import ast
import itertools
import json
import os
import random
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import small_script
import torch
from scripts import Script, torchrun, wait_for

import common

RUN = Path("runs/small")
SMALL = Script(small_script)
small, done, refused, start = SMALL.run, SMALL.done, SMALL.refused, SMALL.start
pytestmark = pytest.mark.usefixtures("here")


def walked(folder=RUN):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["x"]


def log(folder=RUN):
    return [(line["step"], line["loss"]) for line in common.read_log(folder)]


# -------------------------------------------------------------------------------- settings
@pytest.mark.parametrize(
    "flags, says",
    (
        ("--steps 0", ("--steps", "got 0", "1 to 2")),
        ("--steps 1.5", ("argument --steps", "invalid int value: '1.5'")),
        ("--lr nan", ("--lr", "got nan", "above 0")),
        ("--optimizer adamm", ("--optimizer", "got 'adamm'", "sgd, adam")),
        ("--momentumm 0", ("arguments: --momentumm 0", "did you mean --momentum?")),
        ("--lr=1 --opt=sgd", ("arguments: --opt=sgd", "--help")),
        ("--out ''", ("--out", "got ''", "not empty")),
        ("--device cuda", ("--device", "got 'cuda'", "this machine has: .*cpu")),
        ("--dtype float16 --device cpu", ("--dtype", "got 'float16'", "bfloat16")),
        ("--out text.txt", ("got text.txt, allowed is one to write to",)),
        ("--resume --out a", ("a/checkpoint.pt can't be read as the checkpoint of a run",)),
        ("--resume", ("--out: got nothing", "none is at runs/small*")),
        ("--config none.json", ("--config", "none.json", "JSON")),
    ),
)
def test_wrong_flags_and_values(flags, says):
    refused(flags, *says)


def test_help_shows_every_flag_with_its_default():
    code, out, _ = small("--help")
    assert code == 0 and all(common.flag(f.name) in out for f in common.fields(small_script.Config))
    assert "100% for the test; sgd, adam (default sgd)" in out


def test_preset_then_config_then_typed():
    Path("c.json").write_text(json.dumps({"steps": 7, "lr": 0.5, "momentum": 0.1}))
    done("--preset long --config c.json --lr 0.25")
    config = common.read_json(RUN / "config.json")
    values = {name: config[name] for name in ("optimizer", "steps", "momentum", "lr")}
    assert values == {"optimizer": "adam", "steps": 7, "momentum": 0.1, "lr": 0.25}


def test_a_runs_config_gives_what_its_user_gave():
    done("--steps 4 --lr 0.5 --overwrite")  # the short preset followed from the defaults
    done("--config runs/small/config.json --preset long --out b")
    config = common.read_json("b/config.json")
    assert (config["steps"], config["lr"], config["optimizer"]) == (4, 0.5, "adam")
    assert not config["overwrite"]


@pytest.mark.parametrize(
    "content, says",
    (
        ('{"stepz": 3}', "c.json has 'stepz', allowed are names of settings"),
        ('{"out": "a"}', "c.json has 'out', allowed are .* typed"),
        ('{"given": 5}', "got c.json, allowed is a JSON file with settings"),
    ),
)
def test_a_wrong_config(content, says):
    Path("c.json").write_text(content)
    refused("--config c.json", says)


def test_a_typed_flag_that_nothing_reads():
    refused("--optimizer adam --momentum 0.5", "--momentum: got 0.5", "--optimizer adam")
    Path("c.json").write_text(json.dumps({"momentum": 0.5, "optimizer": "adam"}))
    done("--config c.json")


NOTE = "note       training goes on without torch.compile: no C++ compiler\n"


@pytest.mark.parametrize(
    "capability, dtype, says", (((6, 1), "float32", ""), ((8, 0), "bfloat16", NOTE))
)
def test_an_old_gpu_and_one_without_a_compiler(monkeypatch, capsys, capability, dtype, says):
    def fails(function):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch, "compile", fails)
    c = small_script.Config()
    common.choose_device(c, float16=False)
    assert (c.device, c.dtype, c.compile) == ("cuda", dtype, False)
    assert capsys.readouterr().out == says


def test_deterministic_kernels_are_a_setting():
    for flags, wanted in (("--deterministic", True), ("", False)):
        done(flags)
        assert torch.are_deterministic_algorithms_enabled() == wanted


# ---------------------------------------------------------------------------------- resume
def test_resume_refuses_a_changed_setting_by_name():
    done()
    refused("--resume --out runs/small --lr 0.2", "--lr: got 0.2", "0.1, as runs/small began")
    Path("c.json").write_text(json.dumps({"momentum": 0.5}))
    refused("--resume --out runs/small --config c.json", "--momentum: got 0.5", "0.9, as")
    done("--resume --out runs/small --lr 0.1 --device auto --save-interval 5")


def test_default_folders():
    done()
    done("--steps 7")
    assert sorted(map(str, Path("runs").iterdir())) == ["runs/small", "runs/small-2"]
    assert "7 steps" in done("--resume")  # the newest
    refused("--out runs/small", "--out: got 'runs/small'", "--resume", "--overwrite")
    done("--overwrite --out runs/small --steps 3")
    assert len(log()) == 3


def test_several_runs_in_one_folder():
    def settings(typed, names):
        changes = {name: {"optimizer": name} for name in names}
        return common.settings_of_runs("runs/both", typed, changes, small_script.configure)

    out, (sgd,) = settings({"lr": 0.5}, ["sgd"])
    small_script.walk({"lr": 0.5, "out": sgd.out})
    assert settings({}, ["adam"])[0] == Path("runs/both-2")
    out, (sgd, adam) = settings({"resume": True}, ["sgd", "adam"])
    assert (sgd.resume, sgd.lr, sgd.out) == (True, 0.5, "runs/both/sgd")
    assert (adam.resume, adam.lr, adam.out) == (False, 0.5, "runs/both/adam")
    assert (adam.optimizer, out) == ("adam", Path("runs/both"))
    with pytest.raises(common.BadInput, match="--out: got 'runs/both/sgd'"):
        settings({"out": "runs/both"}, ["adam", "sgd"])


def test_a_pickle_is_refused():
    done()
    torch.save({"config": {}, "code": os.system}, RUN / "checkpoint.pt")
    refused("--resume --out runs/small", "can't be read", "damaged or holds code")
    torch.save({"model": {}}, RUN / "checkpoint.pt")
    refused("--resume --out runs/small", "can't be read", "KeyError: 'config'")


# --------------------------------------------------------------- what stops a run half-way
@pytest.mark.parametrize("number, code", ((signal.SIGINT, 130), (signal.SIGTERM, 143)))
def test_a_signal_ends_a_run_that_no_other_process_may_enter(number, code):
    process = start("--steps 100000000 --save-interval 1000000")
    wait_for(lambda: (RUN / "log.jsonl").exists() and len(log()) > 5, process)
    other, _, refusal = small("--out runs/small")
    process.send_signal(number)
    _, err = process.communicate()
    assert other == 2 and "got runs/small, allowed is one to write to that no other" in refusal
    assert process.returncode == code and err.count("\n") == 1 and "--resume" in err, err
    saved = torch.load(RUN / "checkpoint.pt", weights_only=True)
    assert saved["step"] == log()[-1][0]


def test_a_signal_while_the_ranks_wait_for_each_other(monkeypatch):
    run = common.Run(common.Settings(out="runs/none"), 1)
    over_ranks = common.over_ranks

    def late(values, op):
        found = over_ranks(values, op)
        run.on_signal(signal.SIGTERM, None)
        return found

    monkeypatch.setattr(common, "over_ranks", late)
    assert [run.asked_to_stop(), run.asked_to_stop()] == [False, True]
    assert "--resume" not in str(run.stopped())  # without a checkpoint


@pytest.mark.slow
def test_killed_at_ten_moments():
    done("--steps 2000 --out whole")
    flags = "--steps 2000 --save-interval 1 --out cut"
    for i in range(10):
        resume = " --resume" if Path("cut/checkpoint.pt").exists() else ""
        process = start(flags + resume)
        path = Path("cut/log.jsonl")
        logged = path.stat().st_size if i else 0
        wait_for(lambda: path.exists() and path.stat().st_size > logged + 300, process)
        time.sleep(random.Random(i).random() * 0.1)
        process.kill()
        process.communicate()
    done("--out cut --resume")
    assert torch.equal(walked(Path("whole")), walked(Path("cut"))) and log("whole") == log("cut")


def test_a_run_that_a_full_disk_stops_goes_on_to_the_same_bits(monkeypatch):
    """A limit on the size of files stands for the disk, whose own words torch.save hides."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    done("--out whole")
    calls = itertools.count(1)

    def fsync(handle):
        if next(calls) == 2:  # of a checkpoint, after config.json
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 10, before[1]))

    with monkeypatch.context() as m:
        m.setattr(os, "fsync", fsync)
        try:
            code, _, err = small("--save-interval 4")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    says = "checkpoint.pt can't be written: .*File too large.*; last checkpoint: step 4"
    assert code == 1 and err.count("\n") == 1 and re.search(says, err), err
    assert torch.load(RUN / "checkpoint.pt", weights_only=True)["step"] == 4
    assert not list(RUN.glob("*.part"))
    with open(RUN / "log.jsonl", "a") as f:
        f.write('{"step": 9, "lo')  # a kill in the middle of a line
    assert len(log()) == 8
    done("--resume")
    assert torch.equal(walked(), walked(Path("whole"))) and log() == log("whole")


def test_a_loss_that_is_not_finite():
    code, _, err = small("--lr 1e9")
    assert code == 1 and err.count("\n") == 1
    assert re.search("step 1: the loss .* is nan; .*checkpoint: none; try a lower --lr", err), err


FULL = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")  # torch's words


@pytest.mark.parametrize(
    "error, code, says",
    (
        (MemoryError(), 1, "out of memory: take fewer numbers"),
        (torch.OutOfMemoryError(), 1, "out of memory: take fewer numbers"),
        (FULL, 1, "out of memory: take fewer numbers"),
        (ModuleNotFoundError(name="wandb"), 2, "wandb is missing: pip install wandb"),
        (OSError("no such disk"), 1, "no such disk"),
        (KeyboardInterrupt(), 130, "stopped"),
    ),
)
def test_errors_of_one_line(monkeypatch, error, code, says):
    monkeypatch.setattr(common, "choose_device", lambda c: (_ for _ in ()).throw(error))
    found, _, err = small()
    assert found == code and err.count("\n") == 1 and err.endswith(f": {says}\n"), err


@pytest.mark.parametrize("error", (IndexError(), RuntimeError("of another kind")))
def test_other_errors_keep_their_traceback(monkeypatch, error):
    monkeypatch.setattr(common, "choose_device", lambda c: (_ for _ in ()).throw(error))
    with pytest.raises(type(error)):
        small()


def test_a_download_that_fails_says_first_what_to_do(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"text")
    common.download(source.as_uri(), Path("data/copy"), None, "")
    assert Path("data/copy").read_bytes() == b"text"
    with pytest.raises(common.BadInput, match=r"^put it at .*; file:.*can't be fetched"):
        common.download(source.as_uri(), Path("data/other"), "0123456789", "put it at data/other")
    assert [p.name for p in Path("data").iterdir()] == ["copy"]


# ----------------------------------------------------------------------------------- output
def test_lines_of_the_log():
    out = done()
    last = common.read_log(RUN)[-1]
    assert last.keys() == {"step", "loss", "numbers_per_second", "seconds"}  # JSON has no inf
    lines = out.splitlines()
    assert all(len(line) <= 100 for line in lines)
    assert re.match(r"step     2/10  loss \S+  100 numbers/s  \d+ min left$", lines[1]), lines[1]


# ------------------------------------------------------------------------------------ ranks
def two_ranks(flags):
    """Exit code, stdout and what the script itself says on stderr."""
    process = start(flags, torchrun(2))
    out, err = process.communicate()
    said = [line for line in err.splitlines() if "small_script.py:" in line]
    return process.returncode, out, said


@pytest.mark.slow
def test_two_ranks_and_one_that_fails():
    code, out, _ = two_ranks("--steps 4")
    assert code == 0 and out.count("walked") == 1 and out.count("step ") == 4
    done("--out one --steps 4")
    assert torch.equal(walked(), walked(Path("one")))
    code, _, said = two_ranks("--steps 0")
    assert code != 0 and len(said) == 1, said
    code, _, said = two_ranks("--label fails")
    assert code != 0 and len(said) == 1 and "rank 1: " in said[0], said


# ------------------------------------------------------------------------------------ imports
ALONE = {"torch", *sys.stdlib_module_names}
HEAVY = {"matplotlib", "datasets", "sklearn", "tiktoken", "timm", "transformers", "wandb"}


def imported(nodes):
    """The modules that these nodes of a syntax tree import, with their packages."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names | {name.split(".")[0] for name in names}


def test_imports_lead_down_and_heavy_packages_come_late():
    """ire.py and common.py stand alone, no script imports another, and ire.py needs torch alone."""
    floor = {"ire": 0, "common": 0, "llama": 0, "text": 1, "sharpness": 1, "hf": 1}
    floor |= {"train_gpt": 2, "train_cifar": 2, "train_timm": 2}
    root = Path(common.__file__).parent
    for name in floor:
        tree = ast.parse((root / f"{name}.py").read_text())
        found = imported(ast.walk(tree))
        assert name != "ire" or {x.split(".")[0] for x in found} <= ALONE
        assert not HEAVY & imported(tree.body), f"{name} needs them at once"
        for other in floor.keys() & found:
            assert floor[other] < floor[name], f"{name} imports {other}"
