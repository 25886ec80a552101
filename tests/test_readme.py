"""The README's code runs as it stands, and its numbers are those of results/."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_code_runs():
    scope = {"model": nn.Linear(2, 2)}  # the first block is about a model of the reader's
    for block in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(block, scope)
    opt = scope["opt"]
    size = sum(p.numel() for p in scope["model"].parameters())
    assert opt.param_groups[0]["ire_step"] == 30
    assert all(mask.dtype == torch.bool for mask in opt.masks.values())
    assert sum(mask.sum() for mask in opt.masks.values()) >= 0.6 * size - 1
    assert [*scope["soft"].masks] == [scope["model"][0].weight]


def load(name):
    return json.loads((ROOT / f"results/{name}.json").read_text())


def times(speedup):
    """A speed-up in steps and in time."""
    cells = []
    for kind in ("steps", "wall"):
        error = speedup[f"{kind}_stderr"] if speedup[kind] else None
        cells.append(f"{speedup[kind]:.3f} ± {error:.3f}" if error else "not measured yet")
    return " | ".join(cells)


def results():
    """The results section, written from the JSON files: what the README must say."""
    tiny, nano, cifar, speed = map(
        load, ("speedup-tiny", "speedup-nano", "cifar-jpeg", "train-cpu")
    )

    def gap(name):
        row = tiny["compared"][name]
        return f"{row['minus_adamw']:+.3f} ± {row['minus_adamw_stderr']:.3f}"

    less = {name: cifar["table"][name]["less_base"]["test_acc"] for name in ("sgd-ire", "sam-ire")}
    points = "; ".join(f"{mean:+.2f} ± {error:.2f}" for mean, error in less.values())
    of_adamw = {name: row["of_adamw"] for name, row in speed["rows"].items()}
    second = of_adamw["AdmIRE, second_moment"]
    probe = of_adamw["AdmIRE, full probe"]
    images = cifar["settings"]
    return f"""\
How many times AdmIRE's steps (and its time) AdamW needs for the loss that AdmIRE reaches with its
probe, both tuned with as many trials and judged on other seeds:

| | in steps | in time |
|---|---|---|
| tiny run, 500 steps, IRE on from step 0 | {times(tiny["from_step_0"])} |
| the same, on from the end of the warm-up, as in the paper | {times(tiny["speedup"])} |
| a smaller model, on from the end of the warm-up | {times(nano["speedup"])} |

Final validation loss minus AdamW's, tiny run, 500 steps:

| | |
|---|---|
| IRE from step 0, mask from the probe; from Adam's second moment | \
{gap("AdmIRE from step 0, tuned so")}; {gap("second moment from step 0, those settings")} |
| control: a random mask at the same settings | {gap("random mask from step 0, tuned so")} |
| control: longer steps along the sharp coordinates; along all of them | \
{gap("inverted mask")}; {gap("all coordinates")} |
| what else helps: Muon; Muon with IRE; AdamW with twice the steps | \
{gap("Muon")}; {gap("Muon with IRE")}; {gap("AdamW, 2 times the steps")} |

So flatness is what makes the longer step bearable, and the gain is small: on models of a million
parameters and less, Muon gains more.

[Where it pays](tutorials/12_where_flatness_pays.ipynb): how much lower the loss is than that of the
form's own tuned base, and the share of the base's steps that this saves (~: beyond the lengths
that were run), on a smaller model (`python benchmarks/study.py results/map.json`):

{where()}
On the larger model of the first table, at 500 steps of 16 sequences: SoftIRE over AdamW
{larger("soft factor over AdamW")}, over Muon {larger("soft factor over Muon")}.

Tokens a second of AdamW's: {second:.2f} with the second
moment, {probe:.2f} with the probe. Images (ResNet-56, {images["limit_train"]:,} CIFAR-10 pictures,
{images["epochs"]} epochs): test accuracy {points} points for SGD-IRE over SGD; SAM-IRE over SAM.
Mean ± standard error over 3 to 5 seeds, on CPUs. The first two tables are of an older script, which
the files name; `python benchmarks/speed.py train` measures the tokens a second,
`{cifar["command"]}` the images. All runs, controls, commands and
machines are on the book's [results page](book/results.md), and
[chapter 10](tutorials/10_known_and_open.ipynb) says what they mean.
"""


def where():
    """The gains of the study results/map.json at the places that were judged."""
    report = load("map")
    gains = {(row["place"], row["form"]): row for row in report["gains"]}
    forms = {
        "IRE over AdamW": "hard mask over AdamW",
        "SoftIRE over AdamW": "soft factor over AdamW",
        "IRE over Muon": "hard mask over Muon",
        "SoftIRE over Muon": "soft factor over Muon",
    }
    lines = [f"| steps x sequences | {' | '.join(forms)} |", "|---|" + "---|" * len(forms)]
    for place, at in report["places"].items():
        soft = [(place, form) for form in forms.values() if form.startswith("soft")]
        if at["model"] == "nano" and gains.keys() & set(soft):
            cells = [gained(gains.get((place, form))) for form in forms.values()]
            lines.append(f"| {place} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def larger(form):
    rows = [r for r in load("map")["gains"] if (r["place"], r["form"]) == ("tiny 500x16", form)]
    return gained(rows[0] if rows else None)


def gained(row):
    if row is None:
        return "not measured yet"
    saved = row["steps_saved"]
    about = "~" if row["extrapolated_on"] else ""
    steps = "" if saved is None else f" ({about}{round(100 * saved)}%)"
    return f"{row['gain']:+.3f} ± {row['gain_stderr']:.3f}{steps}"


def gpu():
    """The GPU's rows; results/train-229m-h100.json is DIR/train-229m.json of benchmarks/gpu.py."""
    lines = [
        "| H100, `python benchmarks/gpu.py 2` and `3` | 60m | 119m | 229m |",
        "|---|---|---|---|",
    ]
    files = [ROOT / f"results/train-{preset}-h100.json" for preset in ("60m", "119m", "229m")]
    rows = [json.loads(f.read_text())["rows"] if f.exists() else {} for f in files]
    for label, mark, key in (
        ("tokens a second, AdamW", "AdamW", "tokens_per_second"),
        ("TFLOP/s, AdamW", "AdamW", "tflops"),
        ("AdmIRE of AdamW, squares", "AdmIRE, squares", "of_adamw"),
        ("AdmIRE of AdamW, probe on a quarter", "probe on", "of_adamw"),
        ("AdmIRE of AdamW, full probe", "AdmIRE, full probe", "of_adamw"),
    ):
        cells = [gpu_cell(found, mark, key) for found in rows]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def gpu_cell(rows, mark, key):
    for name, row in rows.items():
        if name == mark or (mark == "probe on" and mark in name):
            return f"{row[key]:,.0f}" if key == "tokens_per_second" else f"{row[key]:.3g}"
    return "not measured yet"


def quick():
    """The quick setting's table."""
    report = load("cifar-quick")
    c = report["settings"]
    what = f"{c['model']}, {c['limit_train']:,} CIFAR-10 pictures, {c['epochs']} epochs"
    lines = [
        f"| {what} | test accuracy, % | training loss | Tr(Hessian) | seconds on a core |",
        "|---|---|---|---|---|",
    ]
    for name, row in report["table"].items():
        cells = []
        for key, digits in (("test_acc", 2), ("train_loss", 3), ("trace", 1), ("seconds", 0)):
            mean, error = row[key]
            cells.append(f"{mean:.{digits}f} ± {error:.{digits}f}")
        own = ", ".join(f"{key} {value:g}" for key, value in row["settings"].items())
        lines.append(f"| `--optimizer {name}`: {own} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


SECTIONS = {"results": results, "quick": quick, "gpu": gpu}


def section(name):
    return re.search(rf"<!-- {name}:start -->\n(.*?)<!-- {name}:end -->", README, re.S)


@pytest.mark.parametrize("name", SECTIONS)
def test_the_numbers_are_those_of_the_results(name):
    assert section(name).group(1) == SECTIONS[name](), "renew it: python tests/test_readme.py"


def test_a_measured_row_of_the_gpu_is_quoted():
    rows = {"AdmIRE, 8 micro-batches, probe on 2": {"of_adamw": 0.9712, "tokens_per_second": 1e6}}
    assert gpu_cell(rows, "probe on", "of_adamw") == "0.971"
    assert gpu_cell(rows, "AdamW", "tflops") == "not measured yet"


@pytest.mark.parametrize("page", ("README.md", "book/intro.md"))
def test_the_first_lines_say_what_the_soft_factor_saved(page):
    rows = [row for row in load("map")["gains"] if row["form"] == "soft factor over AdamW"]
    saved = [100 * row["steps_saved"] for row in rows if row["steps_saved"] is not None]
    text = " ".join((ROOT / page).read_text().split())
    assert f"{min(saved):.0f} to {max(saved):.0f}%" in text


def test_the_files_it_names_exist():
    names = re.findall(r"\]\((?!http)([^)]+)\)", README)
    for name in names + re.findall(r"python ((?:\w+/)?\w+\.py)", README):
        assert (ROOT / name).exists(), name
    command = [sys.executable, ROOT / "train_gpt.py", "--help"]
    help_text = subprocess.run(command, capture_output=True, text=True).stdout
    flags = re.findall(r"train_gpt\.py.* (--[a-z-]+)", README)
    assert flags and all(flag in help_text for flag in flags)


if __name__ == "__main__":
    text = README
    for name, write in SECTIONS.items():
        start, end = f"<!-- {name}:start -->\n", f"<!-- {name}:end -->"
        before, rest = text.split(start)
        text = before + start + write() + end + rest.split(end)[1]
    (ROOT / "README.md").write_text(text)
