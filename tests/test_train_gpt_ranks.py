"""train_gpt.py under torchrun (gloo, CPU): the run of one process, whatever the number of ranks.
The file is its own worker: torchrun starts it with TASK in the environment, and it runs
train_gpt.py as a script."""

import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "train_gpt.py"
TEXT = b" ".join(b"%d" % i**2 for i in range(3000))
FLAGS = (
    "--data ../text.txt --layers 1 --width 32 --heads 2 --ffn 64 --context 32 --batch-size 16 "
    "--micro-batch 1 --steps 12 --warmup 2 --interval 3 --log-interval 4 --eval-interval 5 "
    "--eval-sequences 8 --checkpoint-interval 6 --tokens 5 --seed 1 "
)
fsdp = pytest.mark.skipif(
    torch.__version__ < "2.7", reason="torch 2.6: FSDP2 does not run on a CPU"
)


# -------------------------------------------------------------------------------- helpers
def torchrun(folder, ranks, flags="", task=""):
    """Starts train_gpt.py in a folder; output goes to files there."""
    folder.mkdir(exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(ranks),
        __file__,
    ]
    with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
        return subprocess.Popen(
            [*command, *shlex.split(FLAGS + flags)],
            cwd=folder,
            stdout=out,
            stderr=err,
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent), "TASK": task},
        )


def trained(folder, ranks, flags=""):
    code = torchrun(folder, ranks, flags).wait(timeout=240)
    assert code == 0, (folder / "err").read_text()[-4000:]
    return folder


def checkpoint(folder):
    saved = torch.load(folder / "runs/gpt/checkpoint.pt", weights_only=True)
    return {k: v for k, v in saved.items() if k not in ("config", "seconds")}


def flatten(value, name=""):
    """{path: leaf}; the optimizer's state by its parameter's place, however it is named."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, (list, tuple))
        else None
    )
    return (
        {name: value}
        if items is None
        else {k: v for key, x in items for k, v in flatten(x, f"{name}/{key}").items()}
    )


def same(a, b):
    a, b = flatten(a), flatten(b)
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k])
        if torch.is_tensor(a[k])
        else a[k] == b[k]
        for k in a
    )


def log(folder, key):
    lines = map(json.loads, (folder / "runs/gpt/log.jsonl").read_text().splitlines())
    return [(r["step"], r[key]) for r in lines if key in r]


def agree(folder, alone, rtol=1e-5, keys=("val_loss", "train_loss", "grad_norm")):
    """The run of one process within float error."""
    for key in keys:
        (steps, got), (expected_steps, expected) = zip(*log(folder, key)), zip(*log(alone, key))
        assert steps == expected_steps and got == pytest.approx(expected, rel=rtol), key
    got, expected = checkpoint(folder), checkpoint(alone)
    assert (got["step"], got["data"]) == (expected["step"], expected["data"])
    for name, w in expected["model"].items():
        torch.testing.assert_close(got["model"][name], w, rtol=1e-3, atol=2e-5, msg=name)
    (flat, n), (other, m) = map(masks, (got, expected))
    assert n == m == len(flat) and (flat != other).sum() <= 4  # float ties at the threshold


def masks(saved):
    state = [s for s in saved["optimizer"]["state"].values() if "flat" in s]
    assert all(s["flat"].dtype == torch.bool for s in state)
    return torch.cat([s["flat"].flatten() for s in state]), sum(s["exp_avg"].numel() for s in state)


# -------------------------------------------------------------------------------- the worker
def worker(task):
    """The script itself, with a hook after each optimizer step: step 3 fails on rank 1, or step 7
    waits for a file."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    rank, steps = int(os.environ["RANK"]), 0

    def hook(optimizer, *_):
        nonlocal steps
        steps += isinstance(optimizer, torch.optim.AdamW)
        if task == "fail" and steps == 3 and rank == 1:
            raise RuntimeError("rank 1 has lost its mind")
        if task == "pause" and steps == 7:
            Path(f"paused{rank}").touch()
            while not Path("go").exists():
                time.sleep(0.01)

    if task:
        register_optimizer_step_post_hook(hook)
    sys.argv[0] = str(SCRIPT)
    runpy.run_path(str(SCRIPT), run_name="__main__")


# -------------------------------------------------------------------------------- the tests
@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("ranks")
    (root / "text.txt").write_bytes(TEXT)
    return root


@pytest.fixture(scope="module")
def alone(root):
    (folder := root / "alone").mkdir()
    done = subprocess.run(
        [sys.executable, SCRIPT, *shlex.split(FLAGS)],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    return folder


@pytest.fixture(scope="module")
def sharded(root):
    return trained(root / "fsdp", 2, "--fsdp")


@pytest.mark.parametrize("ranks", (2, pytest.param(4, marks=pytest.mark.slow)))
@pytest.mark.slow
def test_copies_on_ranks_are_one_process(root, alone, ranks):
    agree(trained(root / f"ddp{ranks}", ranks), alone)


@fsdp
@pytest.mark.slow
def test_shards_on_ranks_are_one_process(sharded, alone):
    agree(sharded, alone)


@fsdp
def test_hugging_face_folder_of_shards(sharded):
    transformers = pytest.importorskip("transformers")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        sharded / "runs/gpt/hf", output_loading_info=True
    )
    assert not any(info.values()), info
    assert same(dict(model.state_dict()), dict(checkpoint(sharded)["model"]))


@fsdp
@pytest.mark.slow
def test_sigterm_to_torchrun_and_resume_at_the_same_and_another_number_of_ranks(
    root, sharded, alone
):
    folder = root / "stopped"
    process = torchrun(folder, 2, "--fsdp", "pause")
    deadline = time.monotonic() + 120
    while not all((folder / f"paused{rank}").exists() for rank in (0, 1)):
        assert process.poll() is None and time.monotonic() < deadline, (folder / "err").read_text()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    time.sleep(2)  # torchrun passes it on
    (folder / "go").touch()
    assert process.wait(timeout=60) != 0
    assert checkpoint(folder)["step"] == 7
    assert (
        len(
            re.findall(
                "the checkpoint is written, go on with --resume", (folder / "err").read_text()
            )
        )
        == 1
    )
    for other in ("other", "copies", "plain"):
        shutil.copytree(folder, root / other)
    trained(folder, 2, "--fsdp --resume")
    assert same(checkpoint(folder), checkpoint(sharded))
    trained(root / "other", 1, "--resume")
    trained(root / "copies", 2, "--resume --no-fsdp")
    done = subprocess.run(
        [sys.executable, SCRIPT, *shlex.split(FLAGS), "--resume"],
        cwd=root / "plain",
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode, done.stderr) == (0, "") and "FSDP" not in done.stdout
    for other in ("other", "copies", "plain"):  # whatever it was sharded over
        agree(root / other, alone, keys=["val_loss"])  # the stop added a line of training loss


@fsdp
@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 has Muon")
@pytest.mark.parametrize("flags", (pytest.param("", marks=pytest.mark.slow), "--fsdp"))
@pytest.mark.parametrize("optimizer", ("muon-ire", "muon-soft"))
@pytest.mark.slow
def test_muon_with_ire_on_ranks_is_one_process(root, flags, optimizer):
    one, two = root / f"{optimizer}1{flags}", root / f"{optimizer}2{flags}"
    trained(one, 1, f"--optimizer {optimizer} --steps 6")
    trained(two, 2, f"--optimizer {optimizer} --steps 6 {flags}")
    for key in ("val_loss", "train_loss"):
        (steps, got), (expected_steps, expected) = zip(*log(two, key)), zip(*log(one, key))
        assert steps == expected_steps and got == pytest.approx(expected, rel=2e-3), (
            key
        )  # its iteration is in bfloat16


@pytest.mark.slow
def test_an_error_on_one_rank_ends_all(root):
    process = torchrun(root / "broken", 2, "", "fail")
    assert process.wait(timeout=60) != 0
    assert "RuntimeError: rank 1 has lost its mind" in (root / "broken/err").read_text()


@pytest.mark.slow
def test_a_wrong_flag_says_so_once(root):
    process = torchrun(root / "wrong", 2, "--gamma 1.5")
    assert process.wait(timeout=60) != 0
    lines = [
        line for line in (root / "wrong/err").read_text().splitlines() if "train_gpt.py: " in line
    ]
    assert lines == ["train_gpt.py: --gamma: got 1.5, allowed is above 0 and below 1"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    worker(os.environ["TASK"])
