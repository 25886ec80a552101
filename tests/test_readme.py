"""The README's code runs as it stands, and its numbers and those of book/claims.md are those of
results/. As a script this file writes the README's numbers anew."""

import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from report import error_with_tuning
from study import mean

README = (ROOT / "README.md").read_text()
CLAIMS = (ROOT / "book/claims.md").read_text()
START, END = "<!-- evidence:start -->\n", "<!-- evidence:end -->"


def blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.S)


# ------------------------------------------------------------------------------------- the code
def test_the_code_runs_as_pasted():
    use, paper = blocks(README)
    scope = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(use, scope)
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", printed.getvalue())]
    assert losses[0] > 4 and losses[-1] < 0.1  # as the text above it says
    opt, model = scope["opt"], scope["model"]
    hidden = scope["hidden_matrices"](model)
    assert isinstance(opt, scope["SoftIRE"]) and set(opt.masks) == set(hidden)
    rates = {p: group["lr"] for group in opt.param_groups for p in group["params"]}
    assert rates.keys() == set(model.parameters())
    tables = {model.embedding.weight, model.head.weight}
    assert {rates[p] for p in tables} == {4 * rates[p] for p in hidden}

    exec(paper, scope)
    assert type(scope["opt"]) is scope["IRE"]
    (landing,) = blocks((ROOT / "book/intro.md").read_text())
    exec(landing, scope)  # for a model that has these three parts
    assert isinstance(scope["opt"], scope["SoftIRE"]) and scope["opt"].base is scope["adamw"]


def test_what_it_names_is_there():
    names = re.findall(r"\]\((?!http)([^)]+)\)", README)
    for name in names + re.findall(r"python ((?:\w+/)?\w+\.py)", README):
        assert (ROOT / name).exists(), name
    for script in ("train_gpt.py", "train_cifar.py"):
        command = [sys.executable, ROOT / script, "--help"]
        help_text = subprocess.run(command, capture_output=True, text=True).stdout
        lines = re.findall(rf"{script} (.*?)[#`\n]", README)
        flags = {flag for line in lines for flag in re.findall(r"--[a-z-]+", line)}
        assert flags and not [flag for flag in flags if flag not in help_text]
    assert len(README.split()) <= 1000


# ---------------------------------------------------------------------------------- the numbers
SETTINGS = {  # of the README's table: the place in results/baseline.json
    "500 steps, vocabulary 4,096": "bpe 500x16",
    "500 steps, bytes": "bytes 500x16",
    "2,000 steps, vocabulary 4,096": "bpe 2000x16",
    "2,000 steps, bytes": "bytes 2000x16",
}
FORMS = {  # the row of the table, and the form
    "one rate | own rates": "AdamW, rates",
    "one rate | `SoftIRE`": "SoftIRE",
    "one rate | IRE's mask": "mask",
    "own rates | `SoftIRE`": "SoftIRE, on rates",
    "own rates | IRE's mask": "mask, on rates",
}


def load(name):
    return json.loads((ROOT / f"results/{name}.json").read_text())


def number(gain, error, digits=3):
    return f"{gain:+.{digits}f} ± {error:.{digits}f}"


def judged(study, form):
    """{place: the row of the gain} for a form on its judging seeds."""
    rows = [row for row in load(study)["gains"] if row["form"] == form and len(row["seeds"]) > 2]
    return {row["place"]: row for row in rows}


def gain_of(form, place):
    row = judged("baseline", form)[place]
    return number(row["gain"], row["gain_stderr"])


def line_of(form):
    """Cells of the README's table."""
    return " | ".join(gain_of(form, place) for place in SETTINGS.values())


def speed(name):
    return f"{load('train-cpu')['rows'][name]['of_adamw']:.2f}"


def accuracy(study, name):
    return number(*load(study)["table"][name]["less_base"]["test_acc"], digits=2)


def on_images(base, curvature):
    """The gain in points of test accuracy of IRE on top of `base`, on five seeds."""
    accuracies = {}
    for run in load("images")["runs"]:
        if run["stage"] == "test" and run["optimizer"] in (base, f"{base}-ire"):
            of_seed = accuracies.setdefault(run["seed"], {})
            of_seed[run["settings"].get("curvature")] = run["acc"]
    gain, error = mean([own[curvature] - own[None] for own in accuracies.values()])
    return number(gain, error, digits=2)


def evidence():
    """The table of the README, and what it stands on."""
    lines = [
        "- **Language model, AdamW:** first give the embedding and the head learning rates of "
        "their own (*own rates*). 4 times the rate of the blocks is a good start. IRE's mask "
        "lost, or added nothing clear. With bytes as tokens, or with one rate for all parameters, "
        "try `SoftIRE` on the matrices inside the blocks. It is our variant of IRE "
        "without a mask: the flatter a coordinate, the longer its step.",
        "- **Language model, Muon:** in short runs try own rates with vocabulary 4,096 "
        f"({gain_of('Muon, rates', 'bpe 500x16')} in 500 steps), and `SoftIRE` with bytes "
        f"({gain_of('SoftIRE on Muon', 'bytes 500x16')}). In 2,000 steps neither gained.",
        "- **Images, SGD:** try `SGDIRE`, IRE with the *probe* (below). It gained "
        f"{on_images('sgd', 'fisher')} points of accuracy (5,000 pictures, 5 seeds, five more "
        "trials than SGD: `results/images.json`).",
        "",
        f"| AdamW with | gain of | {' | '.join(SETTINGS)} |",
        "| --- | --- | --- | --- | --- | --- |",
        *(f"| {row} | {line_of(form)} |" for row, form in FORMS.items()),
        "",
        "Eight seeds; kappa 2. Own rates had more trials "
        '(`python benchmarks/report.py results/baseline.json "bpe 500x16"`).',
        "",
        "**Cost** on top of AdamW: IRE takes 1 byte per parameter, `SoftIRE` 4. During a step, "
        "both take 4 more for a copy of the weights.",
        "There is no extra backward pass, except with the *probe*, the paper's way to find flat "
        f"coordinates. With IRE, training ran at {speed('AdmIRE, squares')} of AdamW's speed, with "
        f"`SoftIRE` at {speed('SoftIRE on AdamW')} (`python benchmarks/speed.py train`).",
    ]
    return "\n".join(lines) + "\n"


def test_the_table_says_what_the_results_say():
    written = README.split(START)[1].split(END)[0]
    assert written == evidence(), "renew it: python tests/test_readme.py"


@pytest.mark.parametrize("form", FORMS.values())
def test_the_recommendation_follows_from_the_results(form):
    """A gain above 0.03 is more than twice its error with the luck of tuning. Only own rates and
    SoftIRE on top of one rate have such gains."""
    rows = [judged("baseline", form)[place] for place in SETTINGS.values()]
    large = [row for row in rows if row["gain"] > 0.03]
    assert bool(large) == (form in ("AdamW, rates", "SoftIRE"))
    for row in large:
        assert row["gain"] > 2 * error_with_tuning(row), row


def facts():
    """The measured numbers that book/claims.md may quote."""
    tiny = load("speedup-tiny")
    speedups = tiny["speedup"], tiny["from_step_0"], load("speedup-nano")["speedup"]
    shown = {f"{times['steps']:.2f} ± {times['steps_stderr']:.2f}" for times in speedups}
    long = tiny["horizons"]["2000"]
    shown.add(f"{long['steps']:.3f} ± {long['steps_stderr']:.3f}")
    for row in tiny["compared"].values():
        shown.add(number(-row["minus_adamw"], row["minus_adamw_stderr"]))
    for study in ("baseline", "map", "architectures"):
        for row in load(study)["gains"]:
            if row["gain_stderr"] is not None:
                shown.add(number(row["gain"], row["gain_stderr"]))
    for study in ("cifar-quick", "cifar-jpeg"):
        shown |= {accuracy(study, name) for name in ("sgd-ire", "sam-ire")}
    shown |= {on_images(base, c) for base in ("sgd", "sam") for c in ("fisher", "squares")}
    return shown


def test_the_claims_quote_measured_numbers_only():
    quoted = set(re.findall(r"[+-]?\d\.\d+ ± \d\.\d+", CLAIMS))
    assert quoted and quoted <= facts()


if __name__ == "__main__":
    before, rest = README.split(START)
    (ROOT / "README.md").write_text(before + START + evidence() + END + rest.split(END)[1])
