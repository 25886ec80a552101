"""train_gpt.py as a user runs it: tiny models in an empty folder."""

import contextlib
import dataclasses
import functools
import itertools
import math
import re
import shutil
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scripts import TEXT, Script, checkpoint, files, in_step, muon, poison, same

import common
import llama
import text
import train_gpt
from ire import IRE, SoftIRE, hidden_matrices, sampled_cross_entropy

TINY = (
    "--data text.txt --layers 1 --width 32 --heads 2 --ffn 64 --context 32 --batch-size 4 "
    "--steps 12 --warmup 2 --interval 3 --log-interval 4 --eval-interval 5 --eval-sequences 8 "
    "--checkpoint-interval 6 --tokens 5 "
)
SMALL = {"layers": 1, "width": 32, "heads": 2, "ffn": 64, "context": 32, "batch_size": 4}
RUN = Path("runs/gpt")
GPT = Script(train_gpt)
pytestmark = pytest.mark.usefixtures("here")
DRAW = common.draw


# -------------------------------------------------------------------------------- helpers
@pytest.fixture(autouse=True)
def _no_figures(monkeypatch):
    """They take as long as these runs. That of `finished`, which is older, is drawn."""
    monkeypatch.setattr(common, "draw", lambda path, panels: None)


def trained(flags="", optimizer="admire"):
    """A run in runs/gpt, or in another --out, which must end well: stdout."""
    return GPT.done(command(flags, optimizer))


def command(flags, optimizer):
    """Only IRE reads --interval."""
    bare = optimizer in ("adamw", "muon")
    tiny = TINY.replace("--interval 3", "") if bare else TINY
    out = "" if "--out" in flags else f"--out {RUN} "
    return f"{tiny}{out}--optimizer {optimizer} {flags}"


def log(folder=RUN, *keys):
    """The lines that have one of these keys, without what a clock decides."""
    lines = common.read_log(folder)
    timed = ("seconds", "tokens_per_second")
    lines = [{k: x for k, x in r.items() if k not in timed} for r in lines]
    return [r for r in lines if not keys or set(keys) & set(r)]


@functools.cache
def uninterrupted(flags, optimizer):
    trained(f"{flags} --out whole", optimizer)
    return checkpoint("whole"), log("whole")


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
    """The folder opens without a warning, with our logits and gradients and our tokenizer."""
    import transformers

    transformers.utils.logging.enable_propagation()
    trained("--layers 2 --heads 4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
            RUN / "hf", output_loading_info=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(RUN / "hf")
    assert not any(info.values()), info
    assert theirs.dtype == torch.float32
    assert same(dict(theirs.state_dict()), dict(checkpoint(RUN)["model"]))
    inputs = tokenizer("12 ", return_tensors="pt")
    assert inputs["input_ids"].tolist() == [list(b"12 ")]
    tokens = theirs.generate(inputs["input_ids"], max_new_tokens=20, do_sample=False)
    printed = GPT.done(f"--sample {RUN} --prompt '12 ' --tokens 20 --temperature 0")
    assert printed == bytes(tokens[0].tolist()).decode(errors="replace") + "\n"
    assert tokenizer.decode(tokens[0]) == printed.removesuffix("\n")
    assert not caplog.records, caplog.text

    c = GPT.settings(RUN)
    ours = llama.Llama(c, 256)
    with torch.no_grad():  # far from the start: every weight counts, also those of the norms
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


def test_second_derivatives_are_right():
    x = torch.randn(2, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    model = llama.Llama(train_gpt.Config(**SMALL | {"width": 16}, dtype="float32"), 64)
    cos, sin = model.cos[:3].double(), model.sin[:3].double()
    check = functools.partial(torch.autograd.gradgradcheck, check_undefined_grad=False)
    assert check(llama.normalise, x)
    # Rotate computes in float32, and this is a polynomial, so large differences are exact.
    assert check(lambda x: llama.Rotate.apply(x, cos, sin) * x, x, eps=0.1, atol=1e-4)


def test_sharpness_is_in_the_log():
    trained("--sharpness --steps 4")
    lines = log(RUN, "val_loss")
    assert all(math.isfinite(r["trace"]) and r["lambda_max"] > 0 for r in lines) and len(lines) == 2


@pytest.mark.parametrize(
    "flags, optimizer",
    (
        ("--clip 0.5 --embedding-lr 3 --head-lr 0.5", "adamw"),
        ("--beta2 0.9 --weight-decay 1 --ire-warmup 4", "admire"),
        ("--micro-batch 1 --probe-batches 2 --curvature fisher --seed 5 --gamma 0.4", "admire"),
        ("--alpha 0.5", "adamw-soft"),
        pytest.param("--clip 0 --embedding-lr 3 --head-lr 0.5", "muon", marks=muon),
    ),
)
def test_training_is_this_loop(flags, optimizer):
    trained(f"{flags} --lr 1e-2 --log-interval 1", optimizer)
    norms = []
    c = GPT.settings(RUN)
    torch.manual_seed(c.seed)
    model = llama.Llama(c, 256)
    data = text.Data(c)
    torch.manual_seed(c.seed)
    decay = {"weight_decay": c.weight_decay}
    adamw = {"betas": (c.beta1, c.beta2), "eps": c.eps, "fused": True}
    hidden = {"params": hidden_matrices(model), "times": 1} | decay
    others = [
        {"params": [model.model.embed_tokens.weight], "times": c.embedding_lr} | decay,
        {"params": [model.lm_head.weight], "times": c.head_lr} | decay,
        {"params": [p for p in model.parameters() if p.dim() == 1], "times": 1, "weight_decay": 0},
    ]
    about = {"interval": c.interval, "warmup": c.ire_warmup, "curvature": c.curvature}
    if optimizer == "muon":
        optimizers = [
            torch.optim.Muon([hidden], adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, **adamw),
        ]
    else:
        optimizers = [torch.optim.AdamW([hidden, *others], **adamw)]
    if optimizer == "admire":
        optimizers = [IRE(*optimizers, kappa=c.kappa, gamma=c.gamma, **about)]
    if optimizer == "adamw-soft":
        optimizers = [SoftIRE(*optimizers, params=hidden["params"], alpha=0.5, **about)]
    for step in range(c.steps):
        for group in [group for opt in optimizers for group in opt.param_groups]:
            group["lr"] = train_gpt.learning_rate(c, step) * group["times"]
        batch = data.batch(step)
        assert [tuple(x.shape) for pair in batch for x in pair] == [(c.micro_batch, 32)] * (
            8 // c.micro_batch
        )
        if getattr(optimizers[0], "probe_due", False):
            with optimizers[0].probe(model):
                for x, _ in batch[:2]:
                    (sampled_cross_entropy(model(x)) / 2).backward()
        for x, y in batch:
            assert torch.equal(x[:, 1:], y[:, :-1])
            (F.cross_entropy(model(x).flatten(0, 1), y.flatten()) / len(batch)).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), c.clip or math.inf).item())
        for opt in optimizers:
            opt.step()
            opt.zero_grad()
    logged = [line["grad_norm"] for line in log(RUN, "grad_norm")]  # before clipping
    assert logged == pytest.approx(norms, rel=1e-4)
    for name, w in checkpoint(RUN)["model"].items():  # the order in which clipping adds up is free
        torch.testing.assert_close(w, model.state_dict()[name], rtol=1e-5, atol=1e-6, msg=name)


def test_it_learns():
    trained("--steps 100 --lr 1e-2 --eval-interval 100")
    first, *_, last = log(RUN, "val_loss")
    assert abs(first["val_loss"] - math.log(256)) < 0.1 and last["val_loss"] < 3


# -------------------------------------------------------------------------------- settings
# By hand from the paper's table: layers, width, heads, feed-forward; data, context, sequences a
# step; warm-up, steps, kappa, gamma; millions of parameters, cut to one digit.
PAPER = {
    "60m": (16, 384, 6, 1024, "wikitext-103", 150, 240, 500, 50_000, 2, 0.7, 66.9),
    "119m": (6, 768, 12, 2048, "minipile", 512, 300, 300, 30_000, 4, 0.6, 119.7),
    "229m": (16, 768, 12, 3072, "openwebtext", 1024, 480, 1000, 50_000, 4, 0.6, 228.2),
}


def millions(c, vocab):
    with torch.device("meta"):
        model = llama.Llama(c, vocab)
    return sum(p.numel() for p in model.parameters()) // 100_000 / 10, model


@pytest.mark.parametrize("preset", PAPER)
def test_presets_are_the_rows_of_the_paper(preset):
    c = train_gpt.complete(train_gpt.configure({"preset": preset}))
    row = (c.layers, c.width, c.heads, c.ffn, c.data, c.context, c.batch_size, c.warmup, c.steps)
    assert (*row, c.kappa, c.gamma, millions(c, 50304)[0]) == PAPER[preset]
    rest = (c.lr, c.eps, c.beta1, c.beta2, c.weight_decay, c.clip, c.min_lr, c.interval)
    assert rest == (6e-4, 1e-16, 0.9, 0.95, 0.1, 1, 1 / 20, 10)
    assert (c.ire_warmup, c.curvature, c.tokenizer) == (c.warmup, "fisher", "gpt2")
    assert c.batch_size % c.micro_batch == 0
    assert c.micro_batch == 1 or c.micro_batch * c.context * 50304 <= 2**26
    short = {"preset": preset, "steps": 400}
    c = train_gpt.configure(short)
    assert (c.warmup, c.ire_warmup) == (100, 100) and train_gpt.complete(c)
    assert train_gpt.configure(short | {"warmup": 250}).warmup == 250


def test_presets_baby_and_1b():
    c = train_gpt.complete(train_gpt.configure({"preset": "baby"}))
    size, model = millions(c, 256)
    assert 10 < size < 11 and (c.context, c.curvature) == (256, "squares")
    # 6 for each weight of a matrix, and 12 * layers * width * context for attention
    assert llama.flops_per_token(model, c) == 6 * 10_720_128 + 12 * 6 * 384 * 256
    c = train_gpt.complete(train_gpt.configure({"preset": "1b"}))
    assert 1100 < millions(c, 50304)[0] < 1200


def test_intervals_fit_the_length_of_a_run():
    c = train_gpt.complete(train_gpt.Config(steps=120))
    assert (c.log_interval, c.eval_interval, c.checkpoint_interval, c.warmup) == (6, 12, 12, 30)
    c = train_gpt.complete(train_gpt.Config(steps=50_000))
    assert (c.log_interval, c.eval_interval, c.checkpoint_interval) == (20, 1000, 1000)


@pytest.mark.parametrize(
    "flags, says",
    (
        ("--width 30", ("--width: got 30", "a multiple of twice --heads, 8")),
        ("--layers 2000000000", ("--layers: got 2000000000", "1 to 2.20")),
        ("--warmup 1000", ("--warmup: got 1000", "0 to --steps - 1, 999")),
        ("--ire-warmup 1000", ("--ire-warmup: got 1000", "the base alone")),
        ("--micro-batch 3", ("--micro-batch: got 3", "a divisor of 16")),
        ("--curvature fisher --probe-batches 2", ("--probe-batches: got 2", "1 to 1")),
        ("--fsdp", ("--fsdp: got True", "without torchrun")),
        ("--data nowhere", ("--data: got 'nowhere'", "a text file or a folder")),
        ("--optimizer adamw --kappa 3", ("--kappa: got 3.0", "adamw")),
        ("--optimizer muon --interval 3", ("--interval",)),
        ("--optimizer adamw-soft --kappa 3", ("--kappa",)),
        ("--alpha 0.5", ("--alpha: got 0.5", "admire")),
        ("--probe-batches 1", ("--probe-batches", "admire with --curvature squares")),
        ("--compare adamw,muon --kappa 3", ("--kappa", "adamw or muon")),
        ("--compare adamw,nosuch", ("--compare: got 'adamw,nosuch'", "admire")),
        ("--compare adamw,admire,adamw", ("--compare: got", "once")),
        ("--compare --optimizer adamw", ("--optimizer: got 'adamw'", "leave it out")),
        ("--compare --resume", ("--out: got nothing", "none is at runs/compare")),
        ("--sample nowhere --compare", ("got --sample and --compare, allowed is one",)),
        ("--sample nowhere", ("nowhere.checkpoint.pt can't be read",)),
        ("--eval-only", ("--out: got nothing", "none is at runs/gpt")),
    ),
)
def test_wrong_settings(flags, says):
    GPT.refused(flags, *says)


def test_muon_is_refused_where_it_cannot_be(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    GPT.refused("--optimizer muon", "--optimizer.*muon.*2.9")


def test_schedules():
    c = train_gpt.Config(steps=11, warmup=2, lr=1.0, min_lr=0.2)
    cosine = [0.2 + 0.8 * (1 + math.cos(math.pi * i / 8)) / 2 for i in range(9)]
    rates = [train_gpt.learning_rate(c, step) for step in range(11)]
    assert rates == pytest.approx([0.5, 1, *cosine])
    c = train_gpt.Config(steps=101, warmup=10, lr=1.0, min_lr=0.1, schedule="wsd")
    rates = [train_gpt.learning_rate(c, step) for step in range(101)]
    assert rates[9:81] == [1.0] * 72 and rates[-1] == pytest.approx(0.1)
    assert np.diff(rates[80:]) == pytest.approx([-0.9 / 20] * 20)
    c = dataclasses.replace(c, schedule="constant")
    assert [train_gpt.learning_rate(c, step) for step in (10, 100)] == [1, 1]


# -------------------------------------------------------------------------------- resume
@pytest.mark.parametrize(
    "flags, optimizer, step",
    (
        ("", "adamw", 7),
        ("", "admire", 1),
        ("", "admire", 6),
        ("", "admire", 7),
        ("--curvature fisher --micro-batch 2 --dtype bfloat16 --seed 3", "admire", 7),
        ("--curvature fisher", "adamw-soft", 7),
        ("", "adamw-soft", 7),
        pytest.param("", "muon", 7, marks=muon),
        pytest.param("", "muon-ire", 7, marks=muon),
        pytest.param("", "muon-soft", 7, marks=muon),
    ),
)
def test_resume_ends_with_the_same_bits(flags, optimizer, step):
    whole, lines = uninterrupted(flags, optimizer)
    GPT.stopped(command(flags, optimizer), step)
    assert checkpoint(RUN)["step"] == step
    GPT.done("--resume")
    assert same(checkpoint(RUN), whole)
    assert log(RUN, "val_loss") == [r for r in lines if "val_loss" in r]
    state = whole["optimizer"]["state"]
    masks = [entry["flat"] for entry in state.values() if "flat" in entry]
    assert ("ire" in optimizer) == bool(masks) and all(mask.dtype == torch.bool for mask in masks)
    soft = {name: entry["soft_factor"] for name, entry in state.items() if "soft_factor" in entry}
    hidden = {name for name in state if ".layers." in name and "norm" not in name}
    assert soft.keys() == (hidden if "soft" in optimizer else set())
    assert not soft or max(factor.std() for factor in soft.values()) > 0.1


def test_the_probe_sees_a_quarter_of_any_number_of_micro_batches(monkeypatch):
    seen = []

    def counted(logits):
        seen.append(len(logits))
        return sampled_cross_entropy(logits)

    monkeypatch.setattr(train_gpt, "sampled_cross_entropy", counted)
    GPT.stopped(command("--curvature fisher --batch-size 8 --micro-batch 1", "admire"), 7)
    GPT.done("--resume --micro-batch 8")
    assert seen == [1] * 6 + [8]  # two of eight at steps 0, 3, 6; the one of step 9
    assert GPT.settings(RUN).probe_batches is None


@pytest.mark.parametrize(
    "schedule, stop, steps, allowed",
    (
        ("constant", 7, 18, ""),
        ("constant", 7, 6, "7 or more, as runs/gpt has made 7 steps"),
        ("wsd", 7, 24, ""),
        ("wsd", 11, 24, "12, as runs/gpt began: .* its wsd schedule"),
        ("cosine", 7, 24, "12, as runs/gpt began: .* its cosine schedule"),
    ),
)
def test_steps_may_change_where_the_schedule_so_far_does_not(schedule, stop, steps, allowed):
    flags = f"{TINY} --schedule {schedule} --checkpoint-interval 100"
    GPT.stopped(flags, stop)
    if allowed:
        GPT.refused(f"--resume --steps {steps}", f"--steps: got {steps}, allowed is {allowed}")
        return
    GPT.done(f"--resume --steps {steps}")
    GPT.done(f"{flags} --steps {steps} --out whole")
    assert same(checkpoint(RUN), checkpoint("whole"))


@pytest.mark.parametrize("given, micro_batch", (({}, 2), ({"micro_batch": 1}, 1)))
def test_resume_on_more_ranks_chooses_the_micro_batch_again(monkeypatch, given, micro_batch):
    c = train_gpt.complete(train_gpt.Config(**SMALL, **given, given=list(given), out="a"))
    Path("a").mkdir()
    torch.save({"config": dataclasses.asdict(c), "step": 1}, "a/checkpoint.pt")
    monkeypatch.setattr(common, "RANKS", 2)
    c = train_gpt.complete(train_gpt.configure({"resume": True, "out": "a"}))
    assert c.micro_batch == micro_batch


# ------------------------------------------------------------------- losses that are not finite
@pytest.mark.parametrize("last, found", ((8, 9), (12, 12)))
def test_a_loss_that_is_not_finite_stops_the_run(last, found):
    """Found by the loss of the next step, or by the last validation."""
    with in_step(last, poison):
        code, _, err = GPT.run(TINY)
    assert code == 1 and err.count("\n") == 1
    text = rf"step {found}\b.*nan.*checkpoint: step 6\b.*--lr.*--kappa"
    assert re.search(text, err) and checkpoint(RUN)["step"] == 6, err
    GPT.done("--resume")  # the number was bad luck here
    assert same(checkpoint(RUN), uninterrupted("", "admire")[0])


def test_no_checkpoint_after_a_gradient_that_is_not_finite(monkeypatch):
    """The gradient overflows in the very step that writes a checkpoint; its loss was finite."""
    clip, calls = torch.nn.utils.clip_grad_norm_, itertools.count(1)

    def overflow(parameters, *arguments):
        parameters = list(parameters)
        if next(calls) == 6:
            parameters[0].grad.fill_(math.inf)
        return clip(parameters, *arguments)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", overflow)
    code, _, err = GPT.run(f"{TINY} --checkpoint-interval 3")
    assert code == 1 and "last checkpoint: step 3" in err, err
    assert all(w.isfinite().all() for w in checkpoint(RUN)["model"].values())


# -------------------------------------------------------------------------------- outputs
def test_outputs(finished):
    names = {p.name for p in RUN.iterdir()} - {".lock"}
    assert names == {"checkpoint.pt", "config.json", "hf", "log.jsonl", "loss.png"}
    lines = common.read_log(RUN)
    trained_on = [r for r in lines if "train_loss" in r]
    assert {r["step"] for r in trained_on} >= {4, 8, 12}
    assert all({"lr", "grad_norm", "flat", "tokens_per_second"} <= set(r) for r in trained_on)
    assert [r["step"] for r in lines if "val_loss" in r] == [0, 5, 10, 12]
    assert [r["seconds"] for r in lines] == sorted(r["seconds"] for r in lines)
    assert trained_on[-1]["flat"] == pytest.approx(0.7, abs=1e-3)
    loss = f"{lines[-1]['val_loss']:.4f} on held-out text"
    for part in ("26,720 parameters", "text.txt", "cpu", "admire", loss, "runs/gpt/loss.png"):
        assert part in finished, part
    lines = finished.split("\n\n")[0].splitlines()
    assert all(len(line) <= 110 for line in lines)  # on a GPU the speed has more digits


def test_stop_at(finished):
    losses = {r["step"]: r["val_loss"] for r in log(RUN, "val_loss")}
    assert losses[5] > losses[10] > losses[12]
    out = trained(f"--stop-at {losses[10]} --out early")
    assert checkpoint("early")["step"] == log("early")[-1]["step"] == 10
    assert "after 10 steps" in out and Path("early/hf/model.safetensors").exists()
    before = checkpoint("early")
    assert "step 10 of 12" in GPT.done("--resume --out early --log-interval 1")  # it has ended
    assert same(checkpoint("early"), before)
    says = "--optimizer: got adamw, allowed is admire"
    GPT.refused("--resume --out early --optimizer adamw", says)
    GPT.refused("--resume --out early --init early", "--init: .* to leave it out, as early began")


def test_keep_best():
    """The loss rises after step 5, and the run is stopped in between."""

    def spoil(optimizer):
        with torch.no_grad():
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.add_(torch.randn_like(p))

    with in_step(6, spoil):
        GPT.stopped(command("--keep-best", "admire"), 7)
    GPT.done("--resume")
    losses = {r["step"]: r["val_loss"] for r in log(RUN, "val_loss") if r["step"]}
    assert min(losses, key=losses.get) == checkpoint(RUN / "best")["step"] == 5
    assert checkpoint(RUN)["step"] == 12
    assert f"{losses[5]:.4f}" in GPT.done("--eval-only --out runs/gpt/best")


def test_compare(monkeypatch):
    monkeypatch.setattr(common, "draw", DRAW)
    out = GPT.done(f"{TINY} --compare adamw,admire --steps 24 --lr 5e-3")
    folder = Path("runs/compare")
    rows = dict(re.findall(r"^(adamw|admire) +(.*)$", out, re.M))
    curves = {name: common.curve(log(folder / name), "val_loss") for name in rows}
    base = curves["adamw"][-1][1]
    for name, row in rows.items():
        assert GPT.settings(folder / name).optimizer == name
        loss, gain, saved, _ = row.split()
        reached = [str(24 - step) for step, x in curves[name] if step and x <= base]
        assert loss == f"{curves[name][-1][1]:.4f}" and saved == [*reached, "none"][0]
        assert gain == f"{base - curves[name][-1][1]:.4f}"
    assert rows["admire"].split()[1] != "0.0000" and "a validation every 5 steps" in out
    assert (folder / "compare.png").read_bytes()[:4] == b"\x89PNG"


def test_compare_goes_on_without_its_settings():
    """After Ctrl-C in the first run, in its last step and in the second run."""
    GPT.done(f"{TINY} --compare --out whole")
    GPT.stopped(f"{TINY} --compare", 7)
    GPT.stopped("--compare --resume", 5)  # the last of 12
    GPT.stopped("--compare --resume", 7)
    GPT.done("--compare --resume")
    for name in ("adamw", "adamw-soft"):
        assert same(checkpoint(f"runs/compare/{name}"), checkpoint(f"whole/{name}"))


def test_sample(finished):
    def sampled(flags):  # the run itself was for 5 tokens
        return GPT.done(f"--sample {RUN} --prompt '49 é ' --tokens 300 {flags}")

    assert sampled("") == sampled("") != sampled("--seed 3")
    assert sampled("").startswith("49 é ") and sampled("") != sampled("--temperature 2")
    assert sampled("--top-k 1") == sampled("--temperature 0") != sampled("")
    texts = sampled("--num-samples 2").split("\n---------------\n")
    assert len(set(texts)) == 2
    GPT.refused(f"--sample {RUN} --layers 3", "do not fit the weights of runs/gpt")


@pytest.mark.parametrize("prompt", (3, 8, 20))
def test_text_is_the_argmax_of_each_step(prompt):
    """The model sees the last context of them."""
    typed = SMALL | {"layers": 2, "context": 8, "tokens": 30, "temperature": 0.0}
    c = train_gpt.complete(train_gpt.Config(**typed))
    model = llama.Llama(c, 320)
    torch.nn.init.normal_(model.lm_head.weight)
    tokens = torch.randint(300, (prompt,)).tolist()
    expected = list(tokens)
    for _ in range(30):
        expected.append(int(model(torch.tensor([expected[-8:]]))[0, -1, :300].argmax()))
    got = llama.generate(model, c, tokens, 300, torch.Generator())
    assert got == expected and len(set(expected[prompt:])) > 5


def test_eval_only(finished):
    loss = f"loss       {log()[-1]['val_loss']:.4f} on the held-out text, runs/gpt\n"
    assert GPT.done("--eval-only") == loss
    before = files()
    assert GPT.done("--eval-only --micro-batch 3") == loss and files() == before
    Path("other.txt").write_bytes(TEXT[::-1])
    other = GPT.done("--eval-only --data other.txt")
    Path("c.json").write_text('{"data": "other.txt"}')
    assert GPT.done("--eval-only --config c.json") == other != loss
    assert GPT.done("--eval-only --config c.json --data text.txt") == loss


def test_init_goes_on_from_weights_on_other_data(finished):
    Path("other.txt").write_bytes(TEXT[::-1])
    GPT.done(
        f"--init {RUN} --data other.txt --out other --lr 1e-9 --optimizer adamw --context 16 "
        "--steps 4 --batch-size 4 --eval-sequences 8 --tokens 5"
    )
    assert GPT.settings("other").width == 32
    for name, w in checkpoint("other")["model"].items():
        torch.testing.assert_close(w, checkpoint(RUN)["model"][name], rtol=0, atol=1e-7)
    GPT.refused(f"--init {RUN} --layers 2 --data other.txt", "do not fit the weights of runs/gpt")


def test_wandb(monkeypatch):
    logged = []
    started = []

    class Board(contextlib.ExitStack):
        def log(self, values, step):
            logged.append({"step": step} | values)

    def init(project, name, config):
        started.append((name, config["lr"]))
        return Board()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    trained("--wandb --lr 0.003")
    assert started == [("gpt", 0.003)]
    logged = [{k: x for k, x in r.items() if k != "tokens_per_second"} for r in logged]
    assert logged == log()


@pytest.mark.slow
def test_a_compiled_run():
    if common.compiler_error("cpu"):
        pytest.skip("no compiler")
    trained("--compile --out a")
    trained("--out b")
    for a, b in zip(log("a", "val_loss"), log("b", "val_loss"), strict=True):
        assert a == pytest.approx(b, rel=1e-3)
