"""train_gpt.py as a user runs it: tiny models in an empty folder, mostly in this process."""

import contextlib
import dataclasses
import errno
import functools
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

import train_gpt
from ire import IRE

SCRIPT = Path(train_gpt.__file__).resolve()
TEXT = b" ".join(b"%d" % i**2 for i in range(3000))
TINY = (
    "--data text.txt --layers 1 --width 32 --heads 2 --ffn 64 --context 32 --batch-size 4 "
    "--steps 12 --warmup 2 --interval 3 --log-interval 4 --eval-interval 5 --eval-sequences 8 "
    "--checkpoint-interval 6 --tokens 5 "
)
RUN = Path("runs/gpt")


# -------------------------------------------------------------------------------- helpers
@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_bytes(TEXT)
    return tmp_path


def gpt(flags="", tiny=TINY):
    """Runs the command line here: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = train_gpt.main(shlex.split(tiny + flags))
        except SystemExit as e:
            code = e.code
    return code or 0, out.getvalue(), err.getvalue()


def trained(flags="", tiny=TINY):
    """The same for a run that must end well: stdout."""
    code, out, err = gpt(flags, tiny)
    assert (code, err) == (0, "")
    return out


def start(flags, *command, tiny=TINY):
    """The same in a process of its own."""
    return subprocess.Popen(
        [sys.executable, *(command or [SCRIPT]), *shlex.split(tiny + flags)],
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait_for(ready, process):
    deadline = time.monotonic() + 60
    while not ready():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)


def tree(root="."):
    return {p: p.read_bytes() if p.is_file() else None for p in Path(root).rglob("*")}


def refused(flags, *says, tiny=TINY, root="."):
    """Exit code 2, one line that says all of this, and no file was touched."""
    before = tree(root)
    code, out, err = gpt(flags, tiny)
    assert code == 2 and err.count("\n") == 1 and err.endswith("\n") and "Traceback" not in err, err
    for part in says:
        assert re.search(part, err), (part, err)
    assert tree(root) == before
    return err


def checkpoint(folder=RUN):
    """What must not depend on where a run was stopped."""
    saved = torch.load(Path(folder) / "checkpoint.pt", weights_only=True)
    return {k: v for k, v in saved.items() if k not in ("config", "seconds")}


def same(a, b):
    """Equal to the bit, tensors with their dtypes."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a.dtype == b.dtype and torch.equal(a, b) if torch.is_tensor(a) else a == b


def log(folder=RUN, *keys):
    """The lines that have one of these keys, without what a clock decides."""

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    lines = [
        json.loads(line, parse_constant=refuse)
        for line in (Path(folder) / "log.jsonl").read_text().splitlines()
    ]
    return [
        {k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second")}
        for r in lines
        if not keys or set(keys) & set(r)
    ]


def settings(folder=RUN):
    config = json.loads((folder / "config.json").read_text())
    return train_gpt.Config(
        **{f.name: config[f.name] for f in dataclasses.fields(train_gpt.Config)}
    )


@functools.cache
def uninterrupted(flags=""):
    trained(flags + " --out whole")
    return checkpoint("whole"), log("whole")


@contextlib.contextmanager
def in_step(number, act):
    """Calls act(optimizer) inside that optimizer step, counted from 1 in this process."""
    count = itertools.count(1)
    handle = register_optimizer_step_post_hook(
        lambda opt, *_: (
            act(opt) if isinstance(opt, torch.optim.AdamW) and next(count) == number else None
        )
    )
    try:
        yield
    finally:
        handle.remove()


def stopped(flags, step, number=signal.SIGINT):
    with in_step(step, lambda _: signal.raise_signal(number)):
        code, _, err = gpt(flags)
    assert (code, err.count("\n")) == (128 + number, 1) and "--resume" in err


@pytest.fixture(scope="module")
def _finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as m:
        m.chdir(folder)
        Path("text.txt").write_bytes(TEXT)
        return folder, trained()


@pytest.fixture
def finished(_finished, here):
    """A copy of a finished run in runs/gpt; its stdout."""
    shutil.copytree(_finished[0], here, dirs_exist_ok=True)
    return _finished[1]


# -------------------------------------------------------------------------------- model
def test_hugging_face(caplog):
    """Our Llama is LlamaForCausalLM: the folder opens there, with the same logits, gradients."""
    import transformers

    transformers.utils.logging.enable_propagation()
    trained("--layers 2 --heads 4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
            RUN / "hf", output_loading_info=True
        )
        assert not any(info.values()), info
        assert theirs.dtype == torch.float32 and same(
            dict(theirs.state_dict()), dict(checkpoint()["model"])
        )
        transformers.GenerationConfig.from_pretrained(RUN / "hf")
        tokens = theirs.generate(torch.tensor([list(b"12 ")]), max_new_tokens=20, do_sample=False)
    text = trained(f"--sample {RUN} --prompt '12 ' --tokens 20 --temperature 0", tiny="")
    assert text == bytes(tokens[0].tolist()).decode(errors="replace") + "\n"
    assert not caplog.records, caplog.text

    c = settings()
    ours = train_gpt.Llama(c, 256)
    with torch.no_grad():  # far from the start: every weight counts, also the norms'
        for p in ours.parameters():
            p.normal_(p.dim() == 1, 0.2)
    theirs.load_state_dict(ours.state_dict())
    x, y = torch.randint(256, (2, 3, c.context))
    for logits in (a := ours(x), b := theirs(x).logits):
        F.cross_entropy(logits.flatten(0, 1), y.flatten()).backward()
    assert a.std() > 0.5 and (a - b).abs().max() < 1e-4
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        assert p.grad.abs().max() > 1e-3 and (p.grad - gradients.pop(name)).abs().max() < 1e-4, name
    assert not gradients


def test_kappa_0_is_adamw_and_compare_gives_both_the_same_batches():
    out = trained("--compare --kappa 0 --lr 2e-3")
    weights = [checkpoint(RUN / name)["model"] for name in ("adamw", "admire")]
    logs = [
        [{k: v for k, v in r.items() if "flat" not in k} for r in log(RUN / name)]
        for name in ("adamw", "admire")
    ]
    assert same(*weights) and logs[0] == logs[1]
    assert (
        json.loads((RUN / "compare.json").read_text())["reached_at_step"] == 12
        and "in 1.00 of its steps" in out
    )


def test_micro_batches_add_up_to_the_batch():
    trained("--optimizer adamw --out whole")
    trained("--optimizer adamw --out parts --micro-batch 2")
    assert len(log("whole")) == len(log("parts")) == 7
    for a, b in zip(log("whole"), log("parts")):
        assert a == pytest.approx(b, rel=1e-5)


@pytest.mark.parametrize(
    "flags",
    (
        "--optimizer adamw --clip 0.5",
        "--curvature second_moment --beta2 0.9 --weight-decay 1",
        "--micro-batch 1 --probe-batches 2 --kappa-decay --seed 5 --gamma 0.4",
    ),
)
def test_training_is_this_loop(flags):
    trained(flags + " --lr 1e-2")
    c = settings()
    torch.manual_seed(c.seed)
    model, data = train_gpt.Llama(c, 256), train_gpt.Data(c)
    groups = [
        {
            "params": [p for p in model.parameters() if (p.dim() == 1) == norms],
            "weight_decay": decay,
        }
        for norms, decay in ((False, c.weight_decay), (True, 0))
    ]  # no decay of the norms' gains
    opt = torch.optim.AdamW(groups, betas=(c.beta1, c.beta2), eps=c.eps, fused=True)
    if c.optimizer == "admire":
        opt = IRE(
            opt,
            kappa=c.kappa,
            gamma=c.gamma,
            interval=c.interval,
            warmup=c.ire_warmup,
            curvature=c.curvature,
        )
    for step in range(c.steps):
        for group in opt.param_groups:
            group["lr"] = train_gpt.learning_rate(c, step)
            if c.kappa_decay:
                group["kappa"] = c.kappa * group["lr"] / c.lr
        batch, n = data.batch(step), c.micro_batch
        assert [tuple(x.shape) for micro in batch for x in micro] == [(n, 32), (n, 32), (n,)] * (
            4 // n
        )
        if flags.startswith("--micro") and step in (2, 5, 8, 11):
            with opt.probe(model):
                for x, _, keys in batch[:2]:  # a sequence's labels are drawn by its key
                    logits = model(x)
                    labels = drawn(logits.detach(), keys)
                    F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        for x, y, _ in batch:
            assert torch.equal(x[:, 1:], y[:, :-1])
            (F.cross_entropy(model(x).flatten(0, 1), y.flatten()) / len(batch)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), c.clip)
        opt.step()
        opt.zero_grad()
    for name, w in checkpoint()["model"].items():  # the order in which clipping adds up is free
        torch.testing.assert_close(w, model.state_dict()[name], rtol=1e-5, atol=1e-6, msg=name)


def scramble(x):
    """lowbias32 in 64-bit arithmetic."""
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    return x ^ x >> 16


def drawn(logits, keys):
    """The probe's labels, from the definition: log-probability + Gumbel noise of a hash."""
    time, vocab = logits.shape[1:]
    seeds = scramble(
        (
            scramble(keys.numpy().astype(np.uint64))[:, None]
            + scramble(np.uint64(2**32 - 1) - np.arange(time, dtype=np.uint64))
        )
        % 2**32
    )
    bits = (
        scramble((seeds[..., None] + scramble(np.arange(vocab, dtype=np.uint64))) % 2**32) % 2**31
    )
    gumbel = -np.log(-np.log1p(-(bits + 0.5) / 2**31))
    return (logits.double().log_softmax(-1) + torch.from_numpy(gumbel)).argmax(-1)


def test_drawn_labels_are_distributed_as_the_softmax():
    torch.manual_seed(1)
    n, vocab = 200_000, 12
    logits = (2 * torch.randn(vocab)).expand(n, vocab)
    classes = train_gpt.mix(torch.arange(vocab, dtype=torch.int32))
    for seeds in (
        train_gpt.mix(torch.arange(n, dtype=torch.int32)),
        torch.randint(2**31, (n,)).int(),
    ):
        counts = torch.bincount(train_gpt.drawn_labels(logits, seeds, classes), minlength=vocab)
        expected = n * logits[0].softmax(-1)
        chi2 = ((counts - expected) ** 2 / expected).sum() / (vocab - 1)
        assert chi2 < 2.5, chi2  # 1 on average, its standard deviation 0.43


def test_neighbouring_positions_draw_independently():
    """Pairs of labels of neighbouring positions, keys, and of the same position of two keys."""
    vocab, n = 5, 300
    classes = train_gpt.mix(torch.arange(vocab, dtype=torch.int32))
    time, keys = torch.arange(n, dtype=torch.int32), torch.arange(n, dtype=torch.int32)
    seeds = train_gpt.mix(train_gpt.mix(keys)[:, None] + train_gpt.mix(~time))
    labels = train_gpt.drawn_labels(torch.zeros(n * n, vocab), seeds.flatten(), classes).view(n, n)
    for a, b in ((labels[:, 1:], labels[:, :-1]), (labels[1:], labels[:-1]), (labels, labels.T)):
        pairs = (a * vocab + b)[
            a.shape == b.shape and ~torch.eye(n, dtype=torch.bool)[: a.shape[0], : a.shape[1]]
        ]
        counts = torch.bincount(pairs, minlength=vocab**2).double()
        chi2 = ((counts - counts.mean()) ** 2 / counts.mean()).sum() / (vocab**2 - 1)
        assert chi2 < 2, chi2


def test_a_label_depends_on_key_position_and_class_alone(model_and_batch):
    """Not on the neighbours in the batch, their order, or on the length of the text."""
    model, (x, _), keys = model_and_batch
    seen = []

    def watch(logits, seeds, classes):
        seen.append(labels(logits, seeds, classes))
        return seen[-1]

    labels = train_gpt.drawn_labels
    with pytest.MonkeyPatch.context() as m, torch.no_grad():
        m.setattr(train_gpt, "drawn_labels", watch)
        for rows, length in (
            (slice(None), 16),
            (slice(2, 3), 16),
            (torch.tensor([4, 2, 0]), 16),
            (slice(2, 3), 9),
        ):
            model(x[rows, :length], keys=keys[rows])
    whole = seen[0].view(6, 16)
    assert torch.equal(whole, drawn(model(x), keys))
    assert torch.equal(seen[1], whole[2]) and torch.equal(seen[2].view(3, 16), whole[[4, 2, 0]])
    assert torch.equal(seen[3], whole[2, :9])


def test_it_learns():
    trained("--steps 60 --lr 1e-2")
    first, *_, last = log(RUN, "val_loss")
    assert abs(first["val_loss"] - math.log(256)) < 0.1 and last["val_loss"] < 3


# -------------------------------------------------------------------------------- presets
# By hand from the paper's table: layers, width, heads, feed-forward; data, context, sequences a
# step; warm-up, steps, kappa, gamma; millions of parameters, cut to one digit. 60m stands for the
# paper's width 410 with 10 heads.
PAPER = {
    "60m": (16, 384, 6, 1024, "wikitext-103", 150, 240, 500, 50_000, 2, 0.7, 66.9),
    "119m": (6, 768, 12, 2048, "minipile", 512, 300, 300, 30_000, 4, 0.6, 119.7),
    "229m": (16, 768, 12, 3072, "openwebtext", 1024, 480, 1000, 50_000, 4, 0.6, 228.2),
}


@pytest.mark.parametrize("preset", PAPER)
def test_presets_are_the_rows_of_the_paper(preset):
    c = train_gpt.complete(train_gpt.Config(preset=preset))
    with torch.device("meta"):
        model = train_gpt.Llama(c, 50304)
    assert (
        c.layers,
        c.width,
        c.heads,
        c.ffn,
        c.data,
        c.context,
        c.batch_size,
        c.warmup,
        c.steps,
        c.kappa,
        c.gamma,
        sum(p.numel() for p in model.parameters()) // 100_000 / 10,
    ) == PAPER[preset]
    assert (
        c.lr,
        c.eps,
        c.beta1,
        c.beta2,
        c.weight_decay,
        c.clip,
        c.min_lr,
        c.interval,
        c.ire_warmup,
        c.tokenizer,
    ) == (6e-4, 1e-16, 0.9, 0.95, 0.1, 1, 1 / 20, 10, c.warmup, "gpt2")
    (group,) = {
        (g["lr"], g["eps"], g["betas"]) for g in train_gpt.make_optimizer(model, c).param_groups
    }
    assert group == (6e-4, 1e-16, (0.9, 0.95))
    fits = [
        n for n in range(1, c.batch_size + 1) if c.batch_size % n == 0 and n * c.context <= 32_768
    ]
    assert c.micro_batch == max(fits)


def test_what_is_typed_comes_before_the_preset():
    c = train_gpt.complete(
        train_gpt.Config(
            **train_gpt.parse(
                shlex.split("--preset 60m --steps 700 --micro-batch 5 --kappa 3 --gamma 0.6")
            )
        )
    )
    assert (c.steps, c.micro_batch, c.kappa, c.gamma, c.warmup, c.layers) == (
        700,
        5,
        3,
        0.6,
        350,
        16,
    )
    assert train_gpt.complete(train_gpt.Config(preset="60m", steps=700, warmup=500)).warmup == 500


# ------------------------------------------------------------------------------- the loss in pieces
@pytest.fixture
def model_and_batch():
    c = train_gpt.complete(
        train_gpt.Config(
            layers=1, width=32, heads=2, ffn=64, context=16, batch_size=6, device="cpu"
        )
    )
    return train_gpt.Llama(c, 320), torch.randint(320, (2, 6, 16)), torch.arange(6) + 7


def losses_of(model, batch, keys):
    """Both losses and their gradients; the largest logits of the last layer, and what the graph
    keeps of the vocabulary's size."""
    linear, made, kept = F.linear, [], []

    def watch(x, weight, *bias):
        y = linear(x, weight, *bias)
        made.append(y.numel() if weight is model.lm_head.weight else 0)
        return y

    with (
        pytest.MonkeyPatch.context() as m,
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.append(t.numel() if t.shape[-1:] == (320,) else 0) or t, lambda t: t
        ),
    ):
        m.setattr(F, "linear", watch)
        losses, results = [model(*batch), model(batch[0], keys=keys)], []
        for loss in losses:
            model.zero_grad()
            loss.backward()
            results += [loss.detach(), *(p.grad for p in model.parameters())]
    return results, max(made), max(kept)


@pytest.mark.parametrize("sequences", (1, 2, 4))
def test_loss_in_pieces_is_the_loss(model_and_batch, sequences):
    model, batch, keys = model_and_batch
    whole, made, kept = losses_of(model, batch, keys)
    assert made == kept == 6 * 16 * 320
    logits = model(batch[0])
    torch.testing.assert_close(whole[0], F.cross_entropy(logits.flatten(0, 1), batch[1].flatten()))
    model.logits = sequences * 16 * 320
    parts, made, kept = losses_of(model, batch, keys)
    assert made == min(sequences, 3) * 16 * 320 and kept == 0  # the backward makes them again
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_probe_does_not_depend_on_the_micro_batch():
    flats = []
    for n in (4, 2, 1):
        trained(f"--steps 3 --micro-batch {n} --probe-batches {4 // n} --out {n}")
        flats.append(
            torch.cat(
                [s["flat"].flatten() for s in checkpoint(str(n))["optimizer"]["state"].values()]
            )
        )
    for flat in flats[1:]:  # sums in another order may swap neighbours at the threshold
        assert flat.sum() == pytest.approx(0.7 * 26720, abs=2) and (flat != flats[0]).sum() <= 4


@pytest.mark.parametrize("micro_batches, probed", ((4, 1), (5, 2), (2, 1)))
def test_probe_takes_a_quarter_of_the_micro_batches(micro_batches, probed):
    size = f"--steps 3 --batch-size {2 * micro_batches} --micro-batch 2"
    trained(f"{size} --out default")
    for n in (probed, probed + 1):
        trained(f"{size} --probe-batches {n} --out {n}")
    states = [checkpoint(out)["optimizer"] for out in ("default", str(probed), str(probed + 1))]
    assert same(states[0], states[1]) and not same(states[0], states[2])


class Apart(torch.nn.Module):
    """A model that the script can't look into, as in DDP."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *micro):
        return self.model(*micro)


@pytest.mark.parametrize("flags", ("", "--micro-batch 2", "--micro-batch 1 --probe-batches 2"))
@pytest.mark.parametrize("pieces", (1, 2))
def test_one_forward_pass_serves_probe_and_step(monkeypatch, flags, pieces):
    passes = []
    hidden = train_gpt.Llama.hidden

    def counted(model, tokens):
        passes.append(len(tokens))
        return hidden(model, tokens)

    monkeypatch.setattr(train_gpt.Llama, "hidden", counted)
    typed = train_gpt.parse(shlex.split(f"{TINY} --ire-warmup 1 {flags}"))
    c = train_gpt.complete(train_gpt.Config(**typed))
    data = train_gpt.Data(c)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    found = []
    for around in (torch.nn.Module.train, Apart):
        torch.manual_seed(0)
        model = train_gpt.Llama(c, data.vocab)
        model.logits = c.micro_batch * c.context * data.vocab // pieces
        optimizer = train_gpt.make_optimizer(model, c)
        for step in range(2):  # no probe, a probe
            passes.clear()
            batch = data.batch(step)
            train_gpt.train_step(around(model), optimizer, batch, step, c, scaler)
        found.append((sum(passes), model.state_dict(), optimizer.state_dict()))
    (ours, *shared), (theirs, *apart) = found
    assert same(shared, apart)
    assert theirs == c.batch_size + c.micro_batch * (c.probe_batches or 1)
    assert ours == (theirs if c.probe_batches else c.batch_size)


# -------------------------------------------------------------------------------- resume
@pytest.mark.parametrize(
    "flags, step",
    [
        *itertools.product(
            ("--optimizer adamw", "--optimizer admire", "--curvature second_moment"), (1, 6, 7)
        ),
        ("--kappa-decay", 7),
        ("--micro-batch 2 --probe-batches 1 --dtype bfloat16 --seed 3", 7),
    ],
)
def test_resume_ends_with_the_same_bits(flags, step):
    whole, lines = uninterrupted(flags)
    stopped(flags, step)
    assert checkpoint()["step"] == step
    trained(flags + " --resume")
    assert same(checkpoint(), whole)
    masks = [s["flat"] for s in whole["optimizer"]["state"].values() if "flat" in s]
    assert ("adamw" in flags) == (not masks) and all(mask.dtype == torch.bool for mask in masks)
    assert (
        "adamw" in flags or 0.69 < sum(map(torch.sum, masks)) / sum(map(torch.numel, masks)) < 0.8
    )
    assert log(RUN, "val_loss") == [r for r in lines if "val_loss" in r]


def test_resume_needs_no_setting_and_may_change_the_report():
    whole, _ = uninterrupted()
    stopped("", 7)
    code, out, _ = gpt(
        "--resume --log-interval 1 --eval-interval 2 --checkpoint-interval 5", tiny=""
    )
    assert code == 0 and same(checkpoint(), whole)
    assert [r["step"] for r in log(RUN, "train_loss")] == [4, 5, 6, 7, 8, 9, 10, 11, 12]


def test_resume_of_a_finished_run_changes_nothing(finished):
    before, lines = checkpoint(), log()
    trained("--resume")
    assert same(checkpoint(), before) and log() == lines


PAUSED = """
import io, os, sys, time, torch
import train_gpt

original, calls = {where}, 0

def pause(*arguments, **keywords):
    global calls
    calls += {where!r} != "os.replace" or "checkpoint" in str(arguments[1])
    if calls == {call}:
        if {where!r} == "torch.save":  # half a checkpoint
            content = io.BytesIO()
            original(arguments[0], content)
            arguments[1].write(content.getvalue()[:len(content.getvalue()) // 2])
            arguments[1].flush()
        open("paused", "w").close()
        while not os.path.exists("go"):
            time.sleep(0.01)
    return original(*arguments, **keywords)

{where} = pause
sys.exit(train_gpt.main())
"""


def paused(flags, where, call):
    """A process that stands still in this call of a function."""
    process = start(flags, "-c", PAUSED.format(where=where, call=call))
    wait_for(Path("paused").exists, process)
    return process


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
@pytest.mark.slow
def test_signals_to_a_real_process(number):
    process = paused("", "train_gpt.Data.batch", 8)
    process.send_signal(number)
    Path("go").touch()
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.count("\n")) == (128 + number, 1) and "--resume" in err
    assert checkpoint()["step"] == 8
    trained("--resume")
    whole, lines = uninterrupted()
    assert same(checkpoint(), whole) and log(RUN, "val_loss") == [
        r for r in lines if "val_loss" in r
    ]


@pytest.mark.parametrize("where", ("torch.save", "os.replace"))
@pytest.mark.slow
def test_killed_while_it_writes_a_checkpoint(where):
    flags = "--checkpoint-interval 4 "
    process = paused(flags, where, 2)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert any(
        p.stat().st_size > 50_000 for p in RUN.iterdir() if p.name != "checkpoint.pt"
    )  # it was in the middle
    assert checkpoint()["step"] == 4 and log()[-1]["step"] == 8
    trained(flags + "--resume")
    whole, lines = uninterrupted(flags)
    assert same(checkpoint(), whole) and log() == lines


FORKS = """
import os, shlex, sys, matplotlib.pyplot, torch._inductor, train_gpt
for line in sys.stdin:
    if not (pid := os.fork()):
        os.dup2(2, 1)
        os._exit(train_gpt.main(shlex.split(line)))
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


@pytest.mark.slow
def test_killed_at_ten_random_moments():
    flags = "--steps 200 --log-interval 1 --eval-interval 90 --checkpoint-interval 5 "
    whole, lines = uninterrupted(flags)
    moments, lost, saved = random.Random(0), [], 0
    with subprocess.Popen(
        [sys.executable, "-c", FORKS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent)},
    ) as forks:
        for _ in range(10):
            target = f'"step": {saved + moments.randint(1, 16)},'
            print(
                TINY + flags + "--resume" * (RUN / "checkpoint.pt").exists(),
                file=forks.stdin,
                flush=True,
            )
            pid = int(forks.stdout.readline())
            wait_for(
                lambda: (RUN / "log.jsonl").exists() and target in (RUN / "log.jsonl").read_text(),
                forks,
            )
            time.sleep(moments.uniform(0, 0.01))
            os.kill(pid, signal.SIGKILL)
            assert int(forks.stdout.readline()) == signal.SIGKILL
            before, saved = saved, checkpoint()["step"] if (RUN / "checkpoint.pt").exists() else 0
            lost.append(train_gpt.read_log(RUN)[-1]["step"] - saved)
            assert (
                before <= saved and lost[-1] <= 5
            )  # no checkpoint goes back, and at most one interval is lost
    assert 0 < saved < 200 and len(set(lost)) > 1
    trained(flags + "--resume")
    assert same(checkpoint(), whole) and log(RUN, "val_loss") == [
        r for r in lines if "val_loss" in r
    ]


def is_whole_after_a_full_disk(code, err):
    assert code == 1 and err.count("\n") == 1 and "No space left" in err, err
    assert checkpoint()["step"] == 6 and not list(RUN.glob(".*"))


def test_full_disk_while_it_writes_a_checkpoint(small_disk):
    small_disk(600)  # for one checkpoint of 350 KB, not for two
    code, _, err = gpt()
    is_whole_after_a_full_disk(code, err)
    subprocess.run(["mount", "-o", "remount,size=9m", "runs"], check=True)
    trained("--resume")
    assert same(checkpoint(), uninterrupted()[0])


def test_full_disk_that_only_fsync_sees(monkeypatch):
    fsync = os.fsync

    def full(f):
        if (RUN / "checkpoint.pt").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(f)

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = gpt("--steps 24 --eval-interval 100")  # no figure at step 12
    is_whole_after_a_full_disk(code, err)


def test_resume_after_a_torn_line_of_the_log():
    whole, _ = uninterrupted()
    stopped("", 7)
    with open(RUN / "log.jsonl", "a") as f:
        f.write('{"step": 8, "train_lo')
    trained("--resume")
    assert same(checkpoint(), whole) and log()[-1]["step"] == 12


# -------------------------------------------------------------------------------- errors: settings
@pytest.mark.parametrize(
    "flags, says",
    [
        ("--no-such-flag 1", "--no-such-flag.*--help"),
        ("--step 5", "--step"),
        ("5", "5"),
        ("--steps many", "--steps.*int.*many"),
        ("--steps 1e3", "--steps.*int.*1e3"),
        ("--lr high", "--lr.*float.*high"),
        ("--steps", "--steps"),
        ("--compile=yes", "--compile"),
        ("--optimizer sgd", "--optimizer.*sgd.*adamw.*admire"),
        ("--device tpu", "--device.*tpu.*cpu"),
        ("--curvature hessian", "--curvature.*hessian.*fisher.*second_moment"),
        ("--dtype int8", "--dtype.*int8.*bfloat16"),
        ("--tokenizer words", "--tokenizer.*words.*bytes"),
        *[
            (f"--{name} {value}", f"--{name}.*{value}.*1 or more")
            for value in (0, -3)
            for name in (
                "layers",
                "width",
                "heads",
                "ffn",
                "context",
                "steps",
                "batch-size",
                "micro-batch",
                "interval",
                "log-interval",
                "eval-interval",
                "eval-sequences",
                "checkpoint-interval",
                "tokens",
                "top-k",
            )
        ],
        ("--width 33", "--width.*33.*--heads"),
        ("--heads 3", "--width.*32.*--heads.*6"),
        ("--heads 32", "--width.*32.*64"),
        ("--micro-batch 3", "--micro-batch.*3.*--batch-size.*4"),
        ("--micro-batch 8", "--micro-batch.*8.*--batch-size.*4"),
        ("--probe-batches 0", "--probe-batches.*0.*1"),
        ("--probe-batches 2", "--probe-batches.*2.*1"),
        ("--probe-batches 5 --micro-batch 1", "--probe-batches.*5.*1 to 4"),
        ("--warmup -1", "--warmup.*-1.*0"),
        ("--warmup 12", "--warmup.*12.*11"),
        ("--ire-warmup -1", "--ire-warmup.*-1.*0"),
        ("--ire-warmup 12", "--ire-warmup.*12.*0 to --steps - 1, 11"),
        *[
            (f"--{name} {value}", f"--{name}.*{value}.*above 0")
            for name in ("lr", "eps")
            for value in ("0", "-1", "nan", "inf")
        ],
        *[
            (f"--{name} {value}", f"--{name}.*{value}.*below 1")
            for name in ("beta1", "beta2")
            for value in ("-0.1", "1", "nan")
        ],
        *[
            (f"--gamma {value}", f"--gamma.*{value}.*above 0 and below 1")
            for value in ("0", "1", "-0.5", "nan")
        ],
        *[(f"--min-lr {value}", f"--min-lr.*{value}.*0 .*1") for value in ("-0.1", "1.5", "nan")],
        *[
            (f"--{name} {value}", f"--{name}.*{value}.*0 or more")
            for name in ("weight-decay", "kappa", "clip")
            for value in ("-1", "nan", "inf")
        ],
        *[
            (f"--temperature {value}", f"--temperature.*{value}.*0 or more")
            for value in ("-1", "nan", "inf")
        ],
        ("--seed -1", "--seed.*-1"),
        (f"--seed {2**64}", f"--seed.*{2**64}"),
        ("--dtype float16 --device cpu", "--dtype.*float16.*float32"),
        *[
            pytest.param(
                f"--device {name}",
                f"--device.*{name}.*cpu",
                marks=pytest.mark.skipif(there(), reason="it has one"),
            )
            for name, there in (
                ("cuda", torch.cuda.is_available),
                ("mps", torch.backends.mps.is_available),
            )
        ],
        ("--resume", "checkpoint.pt.*--out"),
        ("--sample nowhere", "nowhere can't be read as a run"),
        ("--out text.txt", "--out.*text.txt"),
        ("--data-dir text.txt", "--data-dir.*text.txt"),
        ("--compare --kappa -1", "--kappa.*-1"),
        ("--compare --data nowhere", "--data.*nowhere"),
    ],
)
def test_wrong_flags_and_values(flags, says):
    refused(flags, says)


def test_wrong_value_in_a_real_process():
    before = tree()
    process = start("--gamma 1.5")
    out, err = process.communicate()
    assert (process.returncode, out) == (2, "") and tree() == before
    assert re.fullmatch("train_gpt.py: .*--gamma.*1.5.*above 0 and below 1\n", err)


@pytest.mark.parametrize(
    "flags, says",
    [
        ("", "--out.*runs/gpt.*--resume.*--overwrite"),
        ("--compare --out runs", None),  # runs/gpt is no part of a comparison
        ("--overwrite --data nowhere", "--data.*nowhere"),
        ("--overwrite --lr 0", "--lr"),
        ("--resume --overwrite", "--resume.*--overwrite"),
    ],
)
def test_a_finished_run_is_safe(finished, flags, says):
    if says is None:
        before = tree(RUN)
        trained(flags)
        assert tree(RUN) == before
    else:
        refused(flags, says)


def test_compare_refuses_a_folder_that_holds_one_of_its_runs(finished):
    Path("runs/gpt").rename("runs/admire")
    refused("--compare --out runs", "--out.*runs/admire.*--resume.*--overwrite")


def test_overwrite(finished):
    (RUN / "notes.txt").write_text("mine")
    trained("--overwrite --steps 6")
    assert checkpoint()["step"] == 6 and log()[-1]["step"] == 6 and (RUN / "notes.txt").exists()


@pytest.mark.parametrize(
    "change, says",
    [
        ("--steps 24", "24.*12.*schedule"),
        ("--steps 6", "6.*12.*schedule"),
        ("--steps 2", "2.*12.*schedule"),
        ("--layers 2", "2.*1"),
        ("--width 64", "64.*32"),
        ("--heads 4", "4.*2"),
        ("--heads 3", "3.*2"),
        ("--ffn 32", "32.*64"),
        ("--context 16", "16.*32"),
        ("--batch-size 8", "8.*4"),
        ("--batch-size 6", "6.*4"),
        ("--micro-batch 2", "2.*4"),
        ("--warmup 3", "3.*2"),
        ("--min-lr 0", "0.*0.05"),
        ("--lr 0.1", "0.1.*0.0"),
        ("--clip 2", "2.*1.0"),
        ("--beta1 0.8", "0.8.*0.9"),
        ("--weight-decay 0", "0.*0.1"),
        ("--optimizer adamw", "adamw.*admire"),
        ("--kappa 2", "2.*1"),
        ("--gamma 0.5", "0.5.*0.7"),
        ("--interval 4", "4.*3"),
        ("--ire-warmup 5", "5.*2"),
        ("--curvature second_moment", "second_moment.*fisher"),
        ("--kappa-decay", "True.*False"),
        ("--seed 1", "1.*0"),
        ("--dtype bfloat16", "bfloat16.*float32"),
    ],
)
def test_resume_refuses_a_changed_setting(finished, change, says):
    err = refused("--resume " + change, says, tiny="")
    assert re.search("--[a-z0-9-]+", err).group() == change.split()[0]


@pytest.mark.parametrize("broken", ("half", "empty", "text", "other", "code"))
def test_corrupt_checkpoint(finished, broken):
    path = RUN / "checkpoint.pt"
    if broken in ("other", "code"):  # code: a pickle that would run something
        torch.save(
            {
                "other": {"weights": torch.zeros(3)},
                "code": torch.load(path, weights_only=True) | {"seconds": functools.partial(print)},
            }[broken],
            path,
        )
    else:
        path.write_bytes(
            {"half": path.read_bytes()[: path.stat().st_size // 2], "empty": b"", "text": TEXT}[
                broken
            ]
        )
    refused("--resume", "runs/gpt/checkpoint.pt")


# -------------------------------------------------------------------------------- errors: numbers
def poison(opt):
    with torch.no_grad():
        opt.param_groups[0]["params"][0].fill_(math.nan)


@pytest.mark.parametrize("step, saved", ((1, None), (8, 6)))
def test_a_loss_that_is_not_finite_stops_the_run(step, saved):
    with in_step(step, poison):
        code, _, err = gpt()
    assert code == 1 and err.count("\n") == 1
    assert re.search(rf"step {step + 1}\b.*nan.*checkpoint.*--lr.*--kappa", err), err
    assert all(math.isfinite(r.get("train_loss", 0)) for r in log())
    if saved:
        assert f"step {saved}" in err and checkpoint()["step"] == saved
        trained("--resume")  # the number was bad luck here
        assert same(checkpoint(), uninterrupted()[0])
    else:
        assert "None" not in err and not (RUN / "checkpoint.pt").exists()


def test_a_learning_rate_far_too_high():
    code, _, err = gpt("--lr 1e6 --steps 40")
    assert code == 1 and re.search(r"step \d+\b.*(nan|inf).*checkpoint.*--lr", err), err


def test_a_validation_loss_that_is_not_finite_stops_the_run():
    with in_step(12, poison):
        code, _, err = gpt()
    assert code == 1 and re.search(r"step 12\b.*nan.*step 6\b.*--lr", err), err
    assert log() and checkpoint()["step"] == 6


def test_no_checkpoint_of_weights_that_are_not_finite(monkeypatch):
    """The gradient overflows in the very step that writes a checkpoint; its loss was finite."""
    clip, calls = torch.nn.utils.clip_grad_norm_, itertools.count(1)

    def overflow(parameters, *arguments, **keywords):
        parameters = list(parameters)
        if next(calls) == 6:
            parameters[0].grad.fill_(math.inf)
        return clip(parameters, *arguments, **keywords)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", overflow)
    code, _, err = gpt("--checkpoint-interval 3")
    assert code == 1 and re.search(r"step 3\b", err), err
    assert checkpoint()["step"] == 3 and all(
        w.isfinite().all() for w in checkpoint()["model"].values()
    )


# -------------------------------------------------------------------------------- outputs
def test_outputs(finished):
    config = json.loads((RUN / "config.json").read_text())
    assert set(config) >= {f.name for f in dataclasses.fields(train_gpt.Config)}
    assert config["torch"] == torch.__version__ and config["device"] in ("cpu", "cuda", "mps")
    assert re.fullmatch("([0-9a-f]{40})?", config["commit"])  # empty where there is none
    assert {k for k, v in config.items() if v is None} == {
        "stop_at",
        "probe_batches",
        "sample",
        "init",
        "config",
    }  # none, all, no
    assert config["steps"] == 12 and config["kappa"] == 1.0
    lines = [json.loads(line) for line in (RUN / "log.jsonl").read_text().splitlines()]
    assert all(
        {"step", "seconds"} <= set(r) and ("train_loss" in r) == (r["step"] > 0) for r in lines
    )
    assert all({"lr", "tokens_per_second"} <= set(r) for r in lines if "train_loss" in r)
    assert {r["step"] for r in lines if "train_loss" in r} >= {4, 8, 12}
    assert [r["step"] for r in lines if "val_loss" in r] == [0, 5, 10, 12]
    assert [r["seconds"] for r in lines] == sorted(r["seconds"] for r in lines)
    assert (RUN / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert {p.name for p in (RUN / "hf").iterdir()} == {
        "model.safetensors",
        "config.json",
        "generation_config.json",
    }
    assert {p.name for p in RUN.iterdir()} == {
        "checkpoint.pt",
        "config.json",
        "hf",
        "log.jsonl",
        "loss.png",
    }
    assert torch.load(RUN / "checkpoint.pt", weights_only=True)["step"] == 12
    loss = f"{lines[-1]['val_loss']:.4f}"
    for part in ("26,720 parameters", "text.txt", config["device"], "admire", loss, "loss.png"):
        assert part in finished, part


def test_learning_rate_is_a_warm_up_and_a_cosine():
    trained("--steps 11 --warmup 2 --lr 1e-3 --min-lr 0.2 --log-interval 1")
    cosine = [0.2 + 0.8 * (1 + math.cos(math.pi * i / 8)) / 2 for i in range(9)]
    assert [r["lr"] for r in log(RUN, "train_loss")] == pytest.approx(
        [1e-3 * x for x in (0.5, 1, *cosine)]
    )


def test_help_shows_every_default(monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    code, text, err = gpt("--help", tiny="")
    assert (code, err) == (0, "")
    for f in dataclasses.fields(train_gpt.Config):
        line = re.search(rf"^  --{f.name.replace('_', '-')}\b.*(\n    .*)*", text, re.M).group()
        default = f.metadata["default"]
        for preset, row in train_gpt.PRESETS.items():
            assert f.name not in row or f"{preset} {row[f.name]}" in " ".join(line.split()), line
        assert f"(default {default}" in " ".join(line.split()) or default in (None, ""), line


def test_compare():
    out = trained("--compare --steps 24 --lr 5e-3")
    summary = json.loads((RUN / "compare.json").read_text())
    for name in ("adamw", "admire"):
        assert json.loads((RUN / name / "config.json").read_text())["optimizer"] == name
        assert (
            checkpoint(RUN / name)["step"] == 24 and (RUN / name / "hf/model.safetensors").exists()
        )
        assert summary[name]["val_loss"] == log(RUN / name)[-1]["val_loss"]
        assert f"{summary[name]['val_loss']:.4f}" in out.split("\n\n")[-1]
    assert summary["adamw"]["val_loss"] != summary["admire"]["val_loss"]
    reached = [
        r["step"]
        for r in log(RUN / "admire", "val_loss")
        if r["val_loss"] <= summary["adamw"]["val_loss"]
    ]
    assert summary["reached_at_step"] == (reached[0] if reached else None)
    assert (f"in {reached[0] / 24:.2f} of its steps" if reached else "did not reach") in out
    assert (RUN / "loss.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("step", (7, 12 + 7))
def test_compare_goes_on_without_its_settings(step):
    """Ctrl-C in either run, then only `--compare --resume`: as if never stopped."""
    trained("--compare --out whole")
    stopped("--compare", step)
    # Only a wrong run comes that far: loading an optimizer's state makes a step of zeros a run.
    with in_step(2 * 12 + 3 - step, lambda _: signal.raise_signal(signal.SIGINT)):
        code, _, err = gpt("--compare --resume", tiny="")
    assert (code, err) == (0, "")
    for name in ("adamw", "admire"):
        assert same(checkpoint(RUN / name), checkpoint(f"whole/{name}"))


def test_sample(finished):
    def text(flags):  # the run itself was for 5 tokens
        return trained(f"--sample {RUN} --prompt '49 é ' --tokens 300 {flags}", tiny="")

    assert (
        text("") == text("")
        and text("").startswith("49 é ")
        and text("") != text("--temperature 0.1")
    )
    assert len(text("--tokens 9")) <= len("49 é \n") + 9 < len(text(""))
    assert (
        text("--temperature 0")
        == text("--top-k 1")
        != text("--top-k 256")
        == text("--top-k 1000000")
    )


@pytest.mark.slow
def test_sample_in_a_real_process(finished):
    process = start(f"--sample {RUN} --prompt 'def ' --tokens 300", tiny="")
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "") and out.startswith("def ") and len(out) > 150


@pytest.mark.parametrize("prompt", (3, 8, 20))
def test_text_is_the_argmax_of_each_step(prompt):
    """The model sees the last context of them."""
    c = train_gpt.complete(
        train_gpt.Config(
            layers=2, width=32, heads=2, ffn=64, context=8, tokens=30, temperature=0.0, device="cpu"
        )
    )
    model = train_gpt.Llama(c, 320)
    torch.nn.init.normal_(model.lm_head.weight)
    tokens = torch.randint(300, (prompt,)).tolist()
    expected = list(tokens)
    for _ in range(30):
        expected.append(int(model(torch.tensor([expected[-8:]]))[0, -1, :300].argmax()))
    got = train_gpt.generate(model, c, tokens, 300, torch.Generator())
    assert got == expected and len(set(expected[prompt:])) > 5


def test_hugging_face_folder_samples_and_evaluates_like_the_run(finished):
    before = tree(RUN)
    for flags in ("", "--temperature 0", "--seed 3"):
        run, folder = (
            trained(f"--sample {path} --prompt 12 --tokens 60 {flags}", tiny="")
            for path in (RUN, RUN / "hf")
        )
        assert run == folder and len(run) > 40
    last = f"validation loss {log()[-1]['val_loss']:.4f}\n"
    assert trained("--eval-only", tiny="") == last
    assert (
        trained(f"--eval-only --out {RUN / 'hf'} --data text.txt --eval-sequences 8", tiny="")
        == last
    )
    assert tree(RUN) == before


def test_evaluation_refuses_what_it_cannot_read(finished):
    refused("--eval-only --out nowhere", "nowhere", tiny="")
    refused("--eval-only --data nowhere", "--data.*nowhere", tiny="")
    (RUN / "hf/config.json").write_text("{}")
    refused(f"--eval-only --out {RUN / 'hf'} --data text.txt", "runs/gpt/hf", tiny="")
    (RUN / "hf/model.safetensors").write_bytes(TEXT)
    refused(f"--sample {RUN / 'hf'}", "runs/gpt/hf", tiny="")


def test_stop_at(finished):
    losses = {r["step"]: r["val_loss"] for r in log(RUN, "val_loss")}
    assert losses[5] > losses[10] > losses[12]
    out = trained(f"--stop-at {losses[10]} --out early")  # the first evaluation at or under it
    assert (
        checkpoint("early")["step"] == log("early")[-1]["step"] == 10
        and log("early")[-1]["val_loss"] == losses[10]
    )
    assert (
        "after 10 steps" in out
        and (Path("early") / "loss.png").exists()
        and (Path("early") / "hf/model.safetensors").exists()
    )
    trained("--stop-at 9 --out first")  # the untrained model's loss ends no run
    assert checkpoint("first")["step"] == 5
    before = checkpoint("early")
    trained("--resume --out early", tiny="")  # it has ended
    assert same(checkpoint("early"), before)


def test_gradient_norm_and_flat_fraction_are_in_the_log():
    trained("--steps 6 --log-interval 1 --optimizer admire --gamma 0.6 --clip 0.5")
    lines = log(RUN, "train_loss")
    assert [r["flat"] for r in lines] == [0, 0] + [pytest.approx(0.6, abs=1e-4)] * 4
    c = settings()
    torch.manual_seed(c.seed)
    data, model = train_gpt.Data(c), train_gpt.make_model(c, 256)
    optimizer, scaler = (
        train_gpt.make_optimizer(model, c),
        torch.amp.GradScaler("cpu", enabled=False),
    )
    for step, line in enumerate(lines):
        batch = data.batch(step)
        ((x, y, _),) = batch
        again = train_gpt.Llama(c, 256)
        again.load_state_dict(model.state_dict())
        again(x, y).backward()
        norm = sum(p.grad.square().sum() for p in again.parameters()).sqrt()
        assert line["grad_norm"] == pytest.approx(float(norm), rel=1e-4)  # before it is clipped
        train_gpt.train_step(model, optimizer, batch, step, c, scaler)


@pytest.mark.parametrize(
    "error",
    (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ),
    ids=repr,
)
def test_out_of_memory_names_what_to_lower(monkeypatch, error):
    def forward(*_):
        raise error

    monkeypatch.setattr(train_gpt.Block, "forward", forward)
    code, _, err = gpt()
    assert (
        code == 1
        and err.count("\n") == 1
        and re.search("out of memory.*--micro-batch.*--context.*--width", err)
    )


def test_other_errors_keep_their_traceback(monkeypatch):
    def forward(*_):
        raise RuntimeError("a fault of the program")

    monkeypatch.setattr(train_gpt.Block, "forward", forward)
    with pytest.raises(RuntimeError, match="a fault of the program"):
        gpt()


STUB = """
import json
runs, active = [], False

class Run:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        finish()

def init(project, name, dir, config):
    global active
    assert not active, "the run before was not finished"  # wandb would go on with it
    active = True
    runs.append({"name": name, "lr": config["lr"], "log": []})
    return Run()

def log(values, step):
    runs[-1]["log"].append({"step": step, **values})

def finish():
    global active
    active = False
    json.dump(runs, open("wandb.json", "w"))
"""


def test_wandb(monkeypatch, here):
    Path("stub").mkdir()
    Path("stub/wandb.py").write_text(STUB)
    monkeypatch.syspath_prepend(here / "stub")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    trained("--compare --wandb --lr 0.003")
    runs = json.loads(Path("wandb.json").read_text())
    assert [(run["name"], run["lr"]) for run in runs] == [("adamw", 0.003), ("admire", 0.003)]
    for run in runs:
        lines = [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in run["log"]]
        assert lines == log(RUN / run["name"])
    sys.modules.pop("wandb")


def test_heavy_packages_are_imported_where_they_are_used():
    code = """
import sys
import train_gpt
try:
    train_gpt.main(["--help"])
finally:
    heavy = {"matplotlib", "datasets", "tiktoken", "safetensors", "wandb"}
    print(*heavy & set(sys.modules), file=sys.stderr)
"""
    process = start("", "-c", code, tiny="")
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "\n") and "--micro-batch" in out


@pytest.mark.parametrize(
    "flags",
    (
        "--deterministic",
        "--dtype bfloat16",
        "--curvature second_moment --ire-warmup 0",
        "--device cpu --no-compile",
    ),
)
def test_other_settings_run(flags):
    trained(flags)
    assert log()[-1]["val_loss"] < log()[0]["val_loss"]


@pytest.mark.parametrize(
    "package, flags",
    [
        ("matplotlib", ""),
        ("safetensors", ""),
        ("tiktoken", "--tokenizer gpt2"),
        ("datasets", "--data wikitext-2"),
        ("wandb", "--wandb"),
    ],
)
def test_a_missing_package_is_named_before_anything_is_done(monkeypatch, package, flags):
    monkeypatch.setitem(sys.modules, package, None)
    refused(flags, f"pip install {package}\n")


# ---------------------------------------------------------------------- faults of the first edition
def edit(change, path=RUN / "checkpoint.pt"):
    saved = torch.load(path, weights_only=True)
    change(saved)
    torch.save(saved, path)


def drop_masks(saved):
    for state in saved["optimizer"]["state"].values():
        del state["flat"]


NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda s: s["model"].pop(NAME), NAME),
        (lambda s: s["model"].update(extra=torch.zeros(2)), "extra"),
        (lambda s: s["model"].update({NAME: torch.zeros(2, 3)}), rf"{NAME}.*\(2, 3\).*\(64, 32\)"),
        (lambda s: s["model"].update({NAME: "text"}), NAME),
        (drop_masks, "flat"),
        (lambda s: s["optimizer"]["state"][NAME].pop("exp_avg"), "exp_avg"),
        (lambda s: s["optimizer"]["state"][NAME].update(exp_avg_sq=torch.zeros(3)), "exp_avg_sq"),
        (lambda s: s["optimizer"]["state"].pop(NAME), NAME),
        (lambda s: s["optimizer"].pop("state"), "weight"),
        (lambda s: s["optimizer"]["param_groups"][0].pop("ire_step"), "ire_step"),
        (lambda s: s["optimizer"].pop("param_groups"), "lr|params|ire_step"),
        (lambda s: s.update(step="many"), "many"),
        (lambda s: s.pop("scaler"), "scaler"),
        (lambda s: s["config"].update(layers="many"), "--layers.*many"),
        (lambda s: s["config"].update(heads=0), "--heads.*0"),
        (lambda s: s.update(config=3), "checkpoint.pt"),
    ],
    ids=range(16),
)
def test_a_checkpoint_that_lacks_something_is_refused(finished, change, says):
    edit(change)
    refused("--resume", says, tiny="")


def test_a_checkpoint_of_an_older_or_newer_version_goes_on():
    """Settings that it does not know yet have their defaults; others are ignored."""
    whole, _ = uninterrupted()
    stopped("", 7)

    def change(saved):
        del saved["best"]
        for name in ("schedule", "init", "keep_best", "num_samples"):
            del saved["config"][name]
        saved["config"]["tensorboard"] = True

    edit(change)
    trained("--resume", tiny="")
    assert same(checkpoint()["model"], whole["model"]) and same(
        checkpoint()["optimizer"], whole["optimizer"]
    )


@pytest.mark.parametrize(
    "variables",
    (
        {"WORLD_SIZE": "2"},
        {"RANK": "1", "LOCAL_RANK": "1"},
        *(
            pytest.param(x, marks=pytest.mark.slow)
            for x in (
                {"WORLD_SIZE": "8", "RANK": "3"},
                {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "node7"},
            )
        ),
    ),
)
@pytest.mark.slow
def test_variables_left_over_from_a_cluster(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    process = start("--steps 3 --warmup 1")
    out, err = process.communicate()
    assert process.returncode == 0 and "1 x cpu" in out
    assert (
        ("WORLD_SIZE" in err and err.count("\n") == 1) if "WORLD_SIZE" in variables else err == ""
    )
    for name in variables:
        monkeypatch.delenv(name)
    before = checkpoint()
    trained("--steps 3 --warmup 1 --overwrite")
    assert same(checkpoint(), before)


@pytest.mark.parametrize(
    "flags",
    (
        "--data .",
        "--data texts --out texts/run",
        "--data texts --data-dir texts/prepared",
        "--data texts --out texts",
        "--data link --out texts/run",
    ),
)
def test_data_that_would_hold_the_runs_own_files(flags):
    Path("texts").mkdir()
    Path("texts/a.txt").write_bytes(TEXT)
    Path("link").symlink_to("texts")
    refused(flags, "--data.*(--out|--data-dir)")


@pytest.mark.parametrize("typed", (True, False))
def test_compile_without_a_compiler(monkeypatch, typed):
    """Typed: said so. By default: one line, and it goes on without."""
    monkeypatch.setattr(train_gpt, "compiler_error", lambda device: "no C++ compiler found")
    if typed:
        refused("--compile", "--compile.*--no-compile.*no C.. compiler found")
    else:
        monkeypatch.setattr(train_gpt, "abilities", lambda device: ("float32", True))
        code, out, err = gpt()
        assert (
            code == 0
            and err.count("\n") == 1
            and "no C++ compiler found" in err
            and ", compiled" not in out
        )


def test_a_compiler_that_fails_is_found_out(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("CalledProcessError:\n  g++ not found")

    monkeypatch.setattr(torch, "compile", fail)
    train_gpt.compiler_error.cache_clear()
    refused("--compile", "--compile.*g.. not found")
    train_gpt.compiler_error.cache_clear()


@pytest.mark.parametrize(
    "capability, dtype, compiles",
    [
        ((9, 0), "bfloat16", True),
        ((8, 0), "bfloat16", True),
        ((7, 5), "float16", True),
        ((7, 0), "float16", True),
        ((6, 1), "float16", False),
        ((5, 2), "float16", False),
    ],
)
def test_dtype_and_compile_follow_the_device(monkeypatch, capability, dtype, compiles):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(train_gpt, "compiler_error", lambda device: "")
    c = train_gpt.complete(train_gpt.Config())
    assert (c.device, c.dtype, c.compile) == ("cuda", dtype, compiles)
    c = train_gpt.complete(train_gpt.Config(dtype="float32", compile=not compiles))
    assert (c.dtype, c.compile) == ("float32", not compiles)  # what is typed
    assert train_gpt.complete(train_gpt.Config(device="cpu")).dtype == "float32"
    monkeypatch.setattr(train_gpt, "LAUNCHED", True)
    c = train_gpt.complete(train_gpt.Config(fsdp=True))
    assert c.dtype == ("bfloat16" if dtype == "bfloat16" else "float32")  # no scaler for shards


@pytest.mark.parametrize(
    "line",
    ("not JSON", "[1, 2]", '{"train_loss": 3}', '{"step": null}', '"text"', "\u00e9\ud7ff", "17"),
)
def test_a_log_with_a_line_that_is_none(line):
    whole, lines = uninterrupted()
    stopped("", 7)
    path = RUN / "log.jsonl"
    kept = path.read_text().splitlines()
    path.write_text("\n".join([kept[0], line, *kept[1:], line]) + "\n", encoding="utf-8")
    trained("--resume", tiny="")
    assert same(checkpoint(), whole) and log(RUN, "val_loss") == [
        r for r in lines if "val_loss" in r
    ]


def test_a_checkpoint_without_its_log_goes_on():
    whole, _ = uninterrupted()
    stopped("", 7)
    (RUN / "log.jsonl").unlink()
    (RUN / "config.json").unlink()
    trained("--resume", tiny="")
    assert same(checkpoint(), whole) and [r["step"] for r in log()] == [8, 10, 12]


@pytest.mark.slow
def test_a_second_run_in_the_folder_is_told_who_runs_there():
    process = paused("", "train_gpt.Data.batch", 8)
    before = tree(RUN)
    for flags in ("", "--overwrite", "--resume"):
        code, _, err = gpt(flags)
        assert code == 2 and err.count("\n") == 1 and "--out" in err
        assert not flags or f"process {process.pid}" in err, err
        assert tree(RUN) == before
    Path("go").touch()
    assert process.wait(60) == 0 and same(checkpoint(), uninterrupted()[0])


@pytest.mark.parametrize(
    "flags, says",
    [
        *(
            (f"--{name} {10**n}", f"--{name}.*{'1' + '0' * min(n, 50)}")
            for name in ("steps", "batch-size", "layers", "context", "warmup")
            for n in (12, 400)
        ),
        ("--ffn 1000000000000", "--ffn"),
        ("--ffn 1000000000", "--width.*--ffn.*GiB"),
        ("--layers 2000000000", "--width.*--layers.*GiB"),
        ("--width 2000000000", "--width.*GiB"),
        ("--lr 1e308", "--lr.*1e.308"),
        ("--lr 1e-320", "--lr"),
        ("--eps 1e-320", "--eps"),
        ("--kappa 1e300", "--kappa"),
        ("--weight-decay 1e300", "--weight-decay"),
        ("--clip 1e300", "--clip"),
        ("--temperature 1e300", "--temperature"),
        ("--tokens 99999999999", "--tokens"),
        ("--stop-at 1e300", "--stop-at"),
    ],
)
def test_values_that_would_fail_or_hang_later(flags, says):
    refused(flags, says)


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--layers 2", "--layers.*2.*1"),
        ("--width 64", "--width"),
        ("--context 64", "--context"),
        ("--optimizer muon", "--optimizer"),
        ("--tokenizer gpt2", "--tokenizer"),
        ("--preset 60m", "--preset"),
    ],
)
def test_sampling_refuses_another_model(finished, flags, says):
    refused(f"--sample {RUN} {flags}", says, tiny="")
    refused(f"--eval-only {flags}", says, tiny="")


def test_sampling_at_extreme_temperatures(finished):
    cold = trained(f"--sample {RUN} --prompt 12 --tokens 20 --temperature 1e-300", tiny="")
    assert cold == trained(f"--sample {RUN} --prompt 12 --tokens 20 --temperature 0", tiny="")
    trained(f"--sample {RUN} --prompt 12 --tokens 20 --temperature 1e9", tiny="")


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
@pytest.mark.slow
def test_signals_outside_of_training(number, finished):
    """While data is prepared, and while text is drawn: no traceback, nothing left behind."""
    for where, flags, tiny in (
        ("train_gpt.write_tokens", "--data-dir new --out new/run", TINY),
        ("train_gpt.generate", f"--sample {RUN}", ""),
    ):
        for name in ("paused", "go"):
            Path(name).unlink(missing_ok=True)
        process = start(flags, "-c", PAUSED.format(where=where, call=1), tiny=tiny)
        wait_for(Path("paused").exists, process)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert (
            process.returncode == 128 + number
            and err == "train_gpt.py: stopped\n"
            and not Path("new").exists()
        )


def test_ctrl_c_during_the_imports():
    process = start("")
    time.sleep(0.4)  # torch takes longer
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, 128 + signal.SIGINT) and "Traceback" not in err


def test_a_full_disk_names_file_and_last_checkpoint(monkeypatch):
    fsync = os.fsync

    def full(f):
        if (RUN / "checkpoint.pt").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(f)

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = gpt()
    assert code == 1 and re.search(
        "No space left on device.*runs/gpt/.*last good checkpoint: step 6", err
    ), err


def test_a_pickle_is_refused_without_advice_to_trust_it(finished):
    torch.save(
        torch.load(RUN / "checkpoint.pt", weights_only=True)
        | {"seconds": functools.partial(print)},
        RUN / "checkpoint.pt",
    )
    assert "weights_only" not in refused("--resume", "checkpoint.pt", tiny="")


def test_auto_is_the_runs_own_device():
    whole, _ = uninterrupted()
    stopped("", 7)
    trained("--resume --device auto", tiny="")
    assert same(checkpoint(), whole)


def test_the_folder_of_a_comparison_names_its_runs():
    trained("--compare")
    for flags in ("--resume", "--sample runs/gpt", "--eval-only"):
        refused(flags, "runs/gpt/adamw.*runs/gpt/admire", tiny="")


def test_a_missing_bin_is_said_to_be_missing():
    trained()
    shutil.move(next(Path("data").iterdir()), "ready")
    Path("ready/val.bin").unlink()
    assert "0 bytes" not in refused("--overwrite --data ready", "--data.*val.bin")


def test_a_batch_that_the_ranks_do_not_divide_names_the_nearest(monkeypatch):
    monkeypatch.setattr(train_gpt, "RANKS", 6)
    for batch, near in ((16, 18), (13, 12), (1, 6)):
        refused(f"--batch-size {batch}", rf"--batch-size.*{batch}.*6 ranks.*\b{near}\b")


def test_copied_without_ire(here):
    shutil.copy(SCRIPT, here / "train_gpt.py")
    process = subprocess.run([sys.executable, "-I", "train_gpt.py"], capture_output=True, text=True)
    assert (
        process.returncode != 0 and process.stderr.count("\n") == 1 and "ire.py" in process.stderr
    )


@pytest.mark.parametrize("where", ("every", "first"))
def test_a_probe_that_is_not_finite_is_said(monkeypatch, where):
    calls = itertools.count()

    def broken(weight, x, labels, classes=None):
        loss = head_loss(weight, x, labels, classes)
        spoilt = classes is not None and (where == "every" or next(calls) == 0)
        return loss * math.nan if spoilt else loss

    head_loss = train_gpt.head_loss
    monkeypatch.setattr(train_gpt, "head_loss", broken)
    with pytest.warns(UserWarning, match="curvature is not finite"):
        trained("--log-interval 3")
    assert (log()[-1]["flat_live"] == 0) == (where == "every")


BINARY = {
    "utf-16": TEXT.decode().encode("utf-16"),
    "utf-16-le": TEXT.decode().encode("utf-16-le"),
    "zeros": bytes(9000),
    "utf-32": TEXT.decode().encode("utf-32"),
    "noise": random.Random(0).randbytes(9000),
}


@pytest.mark.parametrize("kind", BINARY)
def test_files_that_are_no_text(kind):
    Path("text.txt").write_bytes(BINARY[kind])
    refused("", "--data.*text.*text.txt")
    Path("text.txt").unlink()
    Path("text.txt").mkdir()
    Path("text.txt/picture.png").write_bytes(BINARY[kind])
    refused("", "--data.*picture.png")
    Path("text.txt/a.txt").write_bytes(TEXT)
    code, _, err = gpt()
    assert code == 0 and err.count("\n") == 1 and re.search("1 of 2 files.*picture.png", err)
    (folder,) = Path("data").iterdir()
    assert json.loads((folder / "meta.json").read_text())["train_tokens"] < len(TEXT)


def test_text_of_other_languages_is_text():
    for i, text in enumerate(("né à 世界 🙂\n", "\x1b[31mred\x1b[0m\t\r\n")):
        Path("text.txt").write_bytes((text * 900).encode())
        trained(f"--out {i}")
    Path("text.txt").write_bytes("été\n".encode("latin-1") * 900)
    trained("--out latin")


# ------------------------------------------------------------------------------- what was asked for
def test_a_config_starts_another_run(finished):
    trained(f"--config {RUN / 'config.json'} --out again", tiny="")
    assert same(checkpoint("again"), checkpoint()) and log("again") == log()
    trained(f"--config {RUN / 'config.json'} --out other --seed 1 --steps 6", tiny="")
    assert checkpoint("other")["step"] == 6 and settings(Path("other")).seed == 1


@pytest.mark.parametrize(
    "content, says",
    [
        (None, "--config.*mine.json"),
        (b"", "--config"),
        (b"[]", "--config"),
        (b"\xff", "--config"),
        (b'{"lear": 1}', "--config.*lear"),
        (b'{"steps": "many"}', "--steps.*many.*int"),
        (b'{"steps": 2.5}', "--steps.*2.5.*int"),
        (b'{"lr": "high"}', "--lr.*high.*float"),
        (b'{"compile": 1}', "--compile.*1.*bool"),
        (b'{"steps": true}', "--steps.*True.*int"),
        (b'{"gamma": 1.5}', "--gamma.*1.5"),
    ],
)
def test_a_config_that_is_none(content, says):
    if content is not None:
        Path("mine.json").write_bytes(content)
    refused("--config mine.json", says, tiny="--data text.txt ")


def test_clip_0_is_off():
    trained("--clip 0 --out off")
    trained("--clip 1000000 --out far")
    assert same(checkpoint("off")["model"], checkpoint("far")["model"])
    trained("--clip 0.01 --out near")
    assert not same(checkpoint("off")["model"], checkpoint("near")["model"])
    assert [r["grad_norm"] for r in log("off", "grad_norm")] == [
        r["grad_norm"] for r in log("far", "grad_norm")
    ]


def test_schedules():
    trained(
        "--steps 12 --warmup 2 --lr 1e-3 --min-lr 0.2 --log-interval 1 --schedule constant --out a"
    )
    assert [r["lr"] for r in log("a", "train_loss")] == pytest.approx([5e-4] + [1e-3] * 11)
    c = train_gpt.complete(
        train_gpt.Config(steps=101, warmup=10, lr=1.0, min_lr=0.1, schedule="wsd")
    )
    lr = [train_gpt.learning_rate(c, step) for step in range(101)]
    assert lr[9:81] == [1.0] * 72 and lr[-1] == pytest.approx(0.1)
    assert np.diff(lr[80:]) == pytest.approx([-0.9 / 20] * 20)


@pytest.mark.parametrize(
    "schedule, stop, steps, fits",
    [
        ("constant", 7, 18, True),
        ("constant", 7, 9, True),
        ("constant", 7, 6, False),
        ("wsd", 7, 24, True),
        ("wsd", 11, 24, False),
        ("cosine", 7, 24, False),
    ],
)
def test_steps_may_change_where_the_schedule_so_far_does_not(schedule, stop, steps, fits):
    flags = f"--schedule {schedule} --checkpoint-interval 100 "
    stopped(flags, stop)
    if not fits:
        refused(f"--resume --steps {steps}", f"--steps.*{steps}.*12.*schedule", tiny="")
        return
    trained(f"--resume --steps {steps}", tiny="")
    trained(f"{flags} --steps {steps} --out whole")
    assert same(checkpoint(), checkpoint("whole"))


def test_init_goes_on_from_weights_on_other_data(finished):
    Path("other.txt").write_bytes(TEXT[::-1])
    weights = checkpoint()["model"]
    for source in (RUN, RUN / "hf"):
        trained(
            f"--init {source} --data other.txt --out other --overwrite --lr 1e-9 "
            "--optimizer adamw --context 16 --steps 4 "
            "--warmup 1 --batch-size 4 --eval-sequences 8",
            tiny="",
        )
        assert settings(Path("other")).width == 32
        for name, w in checkpoint("other")["model"].items():
            torch.testing.assert_close(w, weights[name], rtol=0, atol=1e-7)
    shutil.rmtree(RUN)  # the run itself needs it no more
    stopped("--init other --out more", 7)
    trained("--resume --out more", tiny="")
    assert settings(Path("more")).init == "other"


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--init nowhere", "nowhere"),
        ("--init runs/gpt --layers 2", "--layers.*2.*1"),
        ("--init runs/gpt --heads 4", "--heads"),
        ("--init runs/gpt --tokenizer gpt2", "--tokenizer"),
        ("--init runs/gpt --data ready", "--init.*300.*256"),
    ],
)
def test_init_refuses_another_model(finished, flags, says):
    Path("ready").mkdir()
    for part in ("train", "val"):
        np.arange(300, dtype="<u2").repeat(9).tofile(f"ready/{part}.bin")
    Path("ready/meta.json").write_text('{"tokenizer": "mine", "vocab_size": 300}')
    refused(flags + " --out other", says, tiny="--data text.txt " if "ready" not in flags else "")


def test_keep_best():
    """The loss rises after step 5: the best stays, and can be sampled, evaluated, begun with."""

    def spoil(opt):
        with torch.no_grad():
            for p in opt.param_groups[0]["params"] + opt.param_groups[1]["params"]:
                p.add_(torch.randn_like(p))

    with in_step(6, spoil):
        trained("--keep-best")
    losses = {r["step"]: r["val_loss"] for r in log(RUN, "val_loss") if r["step"]}
    best = min(losses, key=losses.get)
    assert best == 5 and checkpoint(RUN / "best")["step"] == 5 and checkpoint()["step"] == 12
    assert (
        trained("--eval-only --out runs/gpt/best", tiny="") == f"validation loss {losses[5]:.4f}\n"
    )
    trained("--sample runs/gpt/best --tokens 3", tiny="")
    stopped("--keep-best --out two", 7)
    best = checkpoint("two/best")
    with in_step(1 + 1, spoil):  # the first is that of loading
        trained("--resume --out two", tiny="")
    assert same(checkpoint("two/best"), best)


def test_samples_and_prompts_from_a_file(finished):
    Path("prompt.txt").write_text("1 4 9\n16 é")
    out = trained(f"--sample {RUN} --prompt FILE:prompt.txt --num-samples 3 --tokens 30", tiny="")
    texts = out.removesuffix("\n").split("\n---------------\n")
    assert len(set(texts)) == 3 and all(text.startswith("1 4 9\n16 é") for text in texts)
    assert (
        trained(f"--sample {RUN} --prompt FILE:prompt.txt --tokens 30", tiny="") == texts[0] + "\n"
    )
    refused(f"--sample {RUN} --prompt FILE:nothing.txt", "--prompt.*nothing.txt", tiny="")


muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 has Muon")


@muon
def test_muon_is_torchs_on_the_hidden_matrices():
    trained("--optimizer muon --steps 5 --clip 0")
    c = settings()
    torch.manual_seed(c.seed)
    model, data = train_gpt.Llama(c, 256), train_gpt.Data(c)
    hidden = [p for p in model.model.layers.parameters() if p.dim() == 2]
    others, norms = (
        [model.model.embed_tokens.weight, model.lm_head.weight],
        [p for p in model.parameters() if p.dim() == 1],
    )
    both = (
        torch.optim.Muon(hidden, weight_decay=c.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [
                {"params": others, "weight_decay": c.weight_decay},
                {"params": norms, "weight_decay": 0},
            ],
            betas=(c.beta1, c.beta2),
            eps=c.eps,
            fused=True,
        ),
    )
    for step in range(c.steps):
        ((x, y, _),) = data.batch(step)
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        for opt in both:
            for group in opt.param_groups:
                group["lr"] = train_gpt.learning_rate(c, step)
            opt.step()
            opt.zero_grad()
    for name, w in checkpoint()["model"].items():
        torch.testing.assert_close(w, model.state_dict()[name], rtol=1e-4, atol=1e-5, msg=name)


@muon
@pytest.mark.parametrize("optimizer", ("muon", "muon-ire", "muon-soft"))
def test_muon_resumes_with_the_same_bits(optimizer):
    flags = f"--optimizer {optimizer} "
    whole, _ = uninterrupted(flags)
    stopped(flags, 7)
    trained("--resume", tiny="")
    assert same(checkpoint(), whole)
    state = whole["optimizer"]["state"]
    assert "momentum_buffer" in state[NAME] and "exp_avg" in state["lm_head.weight"]
    assert all(("flat" in entry) == (optimizer == "muon-ire") for entry in state.values())
    for entry in state.values():
        assert ("soft_factor" in entry) == (optimizer == "muon-soft" and "momentum_buffer" in entry)


@muon
@pytest.mark.parametrize("nothing", ("muon-ire --kappa 0", "muon-soft --alpha 0"))
def test_ire_that_does_nothing_is_muon(nothing):
    trained("--optimizer muon --out a")
    trained(f"--optimizer {nothing} --out b")
    assert same(checkpoint("a")["model"], checkpoint("b")["model"])


@pytest.mark.parametrize("optimizer", ("adamw-soft", pytest.param("muon-soft", marks=muon)))
def test_soft_is_soft_ire_on_the_hidden_matrices(optimizer):
    out = trained(f"--optimizer {optimizer} --alpha 0.5 --interval 3")
    assert "alpha 0.5, K 3, on from step 0, squares" in out
    c = settings()
    opt = train_gpt.make_optimizer(train_gpt.Llama(c, 256), c)
    assert (opt.alpha, opt.beta, opt.interval, opt.warmup) == (0.5, 0.98, 3, 0)
    assert [group["kappa"] for group in opt.param_groups] == [1, 0, 0]
    refused(f"--optimizer {optimizer} --kappa-decay", f"--kappa-decay.*{optimizer}")
    refused(f"--optimizer {optimizer} --alpha 2", "--alpha.*2.*0 to 1")
    for flag in ("--kappa 0", "--gamma 0.5", "--probe-batches 1"):
        refused(f"--optimizer {optimizer} {flag}", f"{flag.split()[0]}.*nothing.*{optimizer}")
    refused(f"--optimizer {optimizer} --curvature fisher", f"--curvature.*squares.*{optimizer}")
    assert "validation loss" in trained("--eval-only") and trained(f"--sample {RUN}")
    trained("--resume --steps 12")


@pytest.mark.parametrize("flags", ("--optimizer admire", "--optimizer muon-ire", "--compare"))
def test_alpha_is_refused_where_nothing_reads_it(flags):
    refused(f"{flags} --alpha 0.2", "--alpha.*0.2.*nothing")


def test_soft_reads_adams_second_moment_where_it_is_told_to():
    trained("--optimizer adamw-soft")
    weights = checkpoint()["model"]
    assert "second_moment" in trained(
        "--optimizer adamw-soft --curvature second_moment --overwrite"
    )
    saved = checkpoint()
    entries = [set(entry) for entry in saved["optimizer"]["state"].values()]
    assert any("soft_factor" in names for names in entries)
    assert not any("soft_square" in names for names in entries)
    assert not same(weights, saved["model"])


def test_a_config_keeps_what_the_other_optimizer_reads():
    trained("--optimizer admire --kappa 3 --interval 4 --out hard")
    trained("--config hard/config.json --optimizer adamw-soft --out soft", tiny="")
    c = settings(Path("soft"))
    assert (c.ire_warmup, c.curvature, c.interval, c.steps) == (0, "squares", 4, 12)
    assert c.kappa == 1  # nothing reads it
    trained("--config soft/config.json --optimizer admire --out again", tiny="")
    c = settings(Path("again"))
    assert (c.ire_warmup, c.curvature, c.interval, c.alpha) == (2, "fisher", 4, 0.3)
    trained("--config hard/config.json --optimizer adamw --out plain", tiny="")
    assert settings(Path("plain")).kappa == 3


def test_muon_is_refused_where_it_cannot_be(monkeypatch):
    if hasattr(torch.optim, "Muon"):
        refused(
            "--optimizer muon-ire --curvature second_moment", "--curvature.*second_moment.*fisher"
        )
        refused(
            "--optimizer muon-soft --curvature second_moment", "--curvature.*second_moment.*squares"
        )
        monkeypatch.delattr(torch.optim, "Muon")
    refused("--optimizer muon", "--optimizer.*muon.*2.9")


@pytest.mark.slow
def test_a_compiled_run_warms_up_before_its_clock(monkeypatch):
    """--compare: neither run pays for the compilation; validation has the shapes of training."""
    if train_gpt.compiler_error("cpu"):
        pytest.skip("no compiler")
    torch._dynamo.reset()
    trained("--compare --compile --steps 6 --eval-sequences 9")
    first = log(RUN / "adamw")
    frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert first[-1]["val_loss"] < first[0]["val_loss"] and 0 < frames
    seconds = [
        json.loads((RUN / "compare.json").read_text())[name]["seconds"]
        for name in ("adamw", "admire")
    ]
    assert max(seconds) < 5  # compiling takes more; this is no timing


def test_validation_has_whole_batches_of_the_same_sequences(monkeypatch):
    c = train_gpt.complete(
        train_gpt.Config(
            data="text.txt", context=32, batch_size=12, eval_sequences=40, device="cpu"
        )
    )
    data = train_gpt.Data(c)
    whole = torch.cat([x for x, _ in data.validation()])
    assert len(whole) == 36 and all(len(x) == c.micro_batch for x, _ in data.validation())
    parts = []
    monkeypatch.setattr(train_gpt, "RANKS", 3)
    c.micro_batch = 2
    for rank in range(3):
        monkeypatch.setattr(train_gpt, "RANK", rank)
        parts.append([x for x, _ in data.validation()])
    assert torch.equal(torch.cat([x for group in zip(*parts, strict=True) for x in group]), whole)
    c.eval_sequences = 5  # fewer than a batch: one batch
    assert sum(len(x) for x, _ in data.validation()) * 3 == 12
