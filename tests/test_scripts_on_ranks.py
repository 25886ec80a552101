"""train_gpt.py under torchrun (gloo, CPU): the run of one process, whatever the number of ranks.
This file is its own worker: torchrun starts it, and it runs train_gpt.py as a script."""

import os
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from scripts import TEXT, checkpoint, in_step, muon, same, torchrun, wait_for

import common

SCRIPT = Path(common.__file__).with_name("train_gpt.py")
FLAGS = (
    "--data ../text.txt --layers 1 --width 32 --heads 2 --ffn 64 --context 32 --batch-size 16 "
    "--micro-batch 1 --steps 12 --warmup 2 --log-interval 4 --eval-interval 5 "
    "--eval-sequences 8 --checkpoint-interval 6 --tokens 5 --seed 1 "
)
fsdp = pytest.mark.skipif(
    torch.__version__ < "2.7", reason="torch 2.6: FSDP2 does not run on a CPU"
)
pytestmark = pytest.mark.slow


# -------------------------------------------------------------------------------- helpers
def start(folder, ranks, flags="", pause=0):
    """Starts train_gpt.py in a folder, with torchrun if there are ranks; output goes to files.
    pause: after this step each rank waits for the file go."""
    folder.mkdir(exist_ok=True)
    script = [*torchrun(ranks), __file__] if ranks else [SCRIPT]
    paths = os.pathsep.join([str(SCRIPT.parent), str(Path(__file__).parent)])
    with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
        return subprocess.Popen(
            [sys.executable, *script, *shlex.split(FLAGS + flags)],
            cwd=folder,
            stdout=out,
            stderr=err,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "PAUSE": str(pause)},
        )


def trained(folder, ranks, flags=""):
    code = start(folder, ranks, flags).wait(timeout=400)
    assert code == 0, (folder / "err").read_text()[-4000:]
    return folder / "runs/gpt"


def said(folder):
    lines = (folder / "err").read_text().splitlines()
    return [line for line in lines if line.startswith("train_gpt.py: ")]


def log(run, key):
    return {(r["step"], key): r[key] for r in common.read_log(run) if key in r}


def agree(run, alone, rtol=1e-5, keys=("val_loss", "train_loss", "grad_norm")):
    """The run of one process within float error."""
    for key in keys:
        assert log(run, key) == pytest.approx(log(alone, key), rel=rtol), key
    got, expected = checkpoint(run), checkpoint(alone)
    assert (got["step"], got["data"]) == (expected["step"], expected["data"])
    for name, w in expected["model"].items():
        torch.testing.assert_close(got["model"][name], w, rtol=1e-3, atol=2e-5, msg=name)
    states = zip(got["optimizer"]["state"].values(), expected["optimizer"]["state"].values())
    unlike = [(a["flat"] != b["flat"]).sum() for a, b in states]
    assert sum(unlike) <= 4  # ties at the threshold


def worker():
    """The script itself, which may pause."""

    def pause(_):
        Path(f"paused{os.environ['RANK']}").touch()
        while not Path("go").exists():
            time.sleep(0.01)

    sys.argv[0] = str(SCRIPT)
    with in_step(int(os.environ["PAUSE"]), pause):
        runpy.run_path(str(SCRIPT), run_name="__main__")


# -------------------------------------------------------------------------------- the tests
@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("ranks")
    (root / "text.txt").write_bytes(TEXT)
    return root


@pytest.fixture(scope="module")
def alone(root):
    return trained(root / "alone", 0)


@pytest.fixture(scope="module")
def sharded(root):
    return trained(root / "fsdp", 2, "--fsdp")


def test_copies_on_ranks_are_one_process(root, alone):
    agree(trained(root / "ddp", 2), alone)


@fsdp
def test_shards_on_ranks_are_one_process(sharded, alone):
    agree(sharded, alone)
    weights = safetensors.torch.load_file(sharded / "hf/model.safetensors")
    assert same(weights, dict(checkpoint(sharded)["model"]))


def stopped_in_step_7(folder, flags):
    process = start(folder, 2, flags, pause=7)
    wait_for(lambda: all((folder / f"paused{rank}").exists() for rank in (0, 1)), process)
    process.send_signal(signal.SIGTERM)
    time.sleep(2)  # torchrun passes it on
    (folder / "go").touch()
    assert process.wait(timeout=100) != 0
    assert checkpoint(folder / "runs/gpt")["step"] == 7
    assert len(said(folder)) == 1 and "add --resume to the same command" in said(folder)[0]


@fsdp
def test_sigterm_and_resume_at_the_same_and_another_number_of_ranks(root, sharded, alone):
    folder = root / "stopped"
    stopped_in_step_7(folder, "--fsdp")
    for other in ("copies", "plain"):
        shutil.copytree(folder, root / other)
    assert same(checkpoint(trained(folder, 2, "--resume")), checkpoint(sharded))
    # The stop has added a line of training loss. Any sharding may go on:
    agree(trained(root / "copies", 2, "--resume --no-fsdp"), alone, keys=["val_loss"])
    agree(trained(root / "plain", 0, "--resume --no-fsdp"), alone, keys=["val_loss"])


# Half of the pairs of optimizers and ways to share: each kind of IRE and each way is among them.
@pytest.mark.parametrize(
    "optimizer, flags",
    (
        pytest.param("adamw", "--fsdp", marks=fsdp),
        ("admire", ""),
        pytest.param("admire --curvature fisher", "--fsdp", marks=fsdp),
        ("adamw-soft", ""),
        pytest.param("muon-ire", "--fsdp", marks=(muon, fsdp)),
        pytest.param("muon-soft", "", marks=muon),
        pytest.param("muon-soft", "--fsdp", marks=(muon, fsdp)),
    ),
)
def test_resume_on_two_ranks_ends_with_the_same_bits(root, optimizer, flags):
    name = f"{optimizer}{flags}".replace(" ", "")
    flags = f"{flags} --optimizer {optimizer} --schedule constant"
    whole = trained(root / name, 2, flags)
    parts = root / f"{name}-parts"
    trained(parts, 2, f"{flags} --steps 7")
    assert same(checkpoint(trained(parts, 2, "--resume --out runs/gpt")), checkpoint(whole))
    if optimizer == "muon-soft":
        one = trained(root / f"{name}-one", 1, flags.replace("--fsdp", ""))
        expected = log(one, "val_loss")  # Muon's iteration is in bfloat16
        assert log(whole, "val_loss") == pytest.approx(expected, rel=2e-3)


if __name__ == "__main__":
    torch.set_num_threads(1)
    worker()
