"""How the tests of the training scripts run them: as a user does, mostly in this process."""

import contextlib
import io
import itertools
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import common

TEXT = b" ".join(b"%d" % i**2 for i in range(3000))
muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 has Muon")


class Script:
    """A script, with flags that every run has."""

    def __init__(self, module, always=""):
        self.module = module
        self.path = Path(module.__file__).resolve()
        self.always = always

    def run(self, flags=""):
        """Exit code, stdout, stderr."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = self.module.main(shlex.split(f"{self.always} {flags}"))
            except SystemExit as e:
                code = e.code
        return code or 0, out.getvalue(), err.getvalue()

    def done(self, flags=""):
        """The same for a run that must end well: stdout."""
        code, out, err = self.run(flags)
        assert (code, err) == (0, ""), err
        return out

    def refused(self, flags, *says):
        """Exit code 2, one line that says all of this, and no file was touched."""
        before = files()
        code, _, err = self.run(flags)
        assert code == 2 and err.count("\n") == 1 and err.endswith("\n"), err
        for part in says:
            assert re.search(part, err), (part, err)
        assert files() == before

    def stopped(self, flags, step):
        """Ctrl-C in this step of a run."""
        with in_step(step, lambda _: signal.raise_signal(signal.SIGINT)):
            code, _, err = self.run(flags)
        assert (code, err.count("\n")) == (130, 1) and "--resume" in err, err

    def settings(self, folder):
        """Those of a run."""
        saved = common.read_json(Path(folder) / "config.json")
        names = [f.name for f in common.fields(self.module.Config)]
        return self.module.Config(**{name: saved[name] for name in names})

    def start(self, flags="", options=()):
        """The same in a process of its own; options of Python stand before the script."""
        paths = os.pathsep.join([str(self.path.parent), str(Path(__file__).parents[1])])
        return subprocess.Popen(
            [sys.executable, *options, self.path, *shlex.split(f"{self.always} {flags}")],
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )


@contextlib.contextmanager
def in_step(number, act):
    """Calls act(optimizer) in this step of the base optimizer, counted from 1 in this process."""
    count = itertools.count(1)

    def hook(optimizer, *_):
        if type(optimizer) in (torch.optim.SGD, torch.optim.AdamW) and next(count) == number:
            act(optimizer)

    handle = register_optimizer_step_post_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def poison(optimizer):
    with torch.no_grad():
        optimizer.param_groups[0]["params"][0].fill_(math.nan)


def torchrun(ranks):
    """Options that start a script in so many processes."""
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]


def wait_for(ready, process):
    deadline = time.monotonic() + 600
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"not ready: {process.communicate()}")
        time.sleep(0.002)


def files(root="."):
    return {p: p.read_bytes() for p in Path(root).rglob("*") if p.is_file()}


def same(a, b):
    """Equal bit for bit, tensors with their dtypes."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if torch.is_tensor(a):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b


def checkpoint(folder):
    """What must not depend on where a run was stopped."""
    saved = torch.load(Path(folder) / "checkpoint.pt", weights_only=True)
    return {k: x for k, x in saved.items() if k not in ("config", "seconds", "log_bytes")}
