"""The README's code runs as it stands, and its numbers are those of results/."""
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_code_runs():
    scope = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(block, scope)
    opt = scope["opt"]
    assert opt.param_groups[0]["ire_step"] == 30 and all(s["flat"].dtype == torch.bool for s in opt.state.values())
    assert sum(s["flat"].sum() for s in opt.state.values()) >= 0.6 * sum(p.numel() for p in scope["model"].parameters()) - 1


def results():
    """The results section, written from the JSON files: what the README must say."""
    runs = [json.loads((ROOT / f"results/compare-tiny-{seed}.json").read_text()) for seed in range(3)]
    step, train, sweep, speedup, nano, cifar, images = (json.loads((ROOT / f"results/{name}.json").read_text()) for name in (
        "step-cpu", "train-cpu", "sweep-tiny", "speedup-tiny", "speedup-nano", "cifar-jpeg", "cifar-speed-cpu"))

    def loss(name):
        values = [run[name]["val_loss"] for run in runs]
        return f"{statistics.mean(values):.4f} ± {statistics.stdev(values) / 3**0.5:.4f}"

    differences = [run["adamw"]["val_loss"] - run["admire"]["val_loss"] for run in runs]
    reached = [str(run["reached_at_step"] or "never") for run in runs]
    big, rows = step["sizes"]["60M"]["rows"], train["rows"]
    refresh, textbook = big["IRE, refresh"], big["textbook, refresh"]
    trials = {o: [r for r in sweep["runs"] if r["optimizer"] == o] for o in ("adamw", "admire")}
    best = {(o, w): min(r["val_loss"] for r in trials[o] if r["warmup"] == w) for o in trials for w in (250, 500)}
    settings = ["{optimizer}: lr {lr:g}, warm-up {warmup}".format(**runs[0][o]) for o in ("adamw", "admire")]
    less = {name: cifar["table"][name]["less_base"] for name in ("sgd-ire", "sam-ire")}

    def times(s, trials):
        cells = ["{:.3f} ± {:.3f}".format(s[k], s[f"{k}_stderr"]) if s[k] else "not measured yet" for k in ("steps", "wall")]
        return f"{trials} | {len(s.get('by_seed', ()))} | {' | '.join(cells)}"

    def gap(name, report=speedup):
        row = report["compared"].get(name)
        return "{minus_adamw:+.3f} ± {minus_adamw_stderr:.3f}".format(**row) if row else "not measured yet"

    def gaps(*names, report=speedup):
        return " | ".join(gap(name, report) for name in names)

    tuned = speedup["trials"]
    return f"""\
Switched on where the paper does it, at the end of the learning rate's warm-up, AdmIRE is on this small model about as good as an
AdamW that was tuned as hard. Switched on at step 0 it saves about a tenth of AdamW's steps, at 500 and at 2000 of them, and its probes
cost about as much time as that; Adam's second moment in place of the probe gains as much and costs less. Twice the trials gave AdamW
nothing that lasted on other seeds. The controls support the mechanism: longer steps help along flat coordinates, not along random or sharp ones.
Muon is far ahead of both, and IRE over Muon adds to that. The paper's factor of two is on models a hundred times larger, not measured yet.

How many times AdmIRE's steps AdamW needs for AdmIRE's final loss (`python benchmarks/speedup.py`, for the smaller model `--row nano`;
mean ± standard error over seeds that took no part in the tuning; the protocol stands at the script's top):

| | trials of each | seeds | in steps | in time |
|---|---|---|---|---|
| tiny run, 500 steps | {times(speedup['speedup'], tuned['adamw'])} |
| tiny run, 2000 steps | {times(speedup['horizons']['2000'], f"{tuned['adamw, long']} more")} |
| smaller model, 500 steps | {times(nano['speedup'], nano['trials']['adamw'])} |
| tiny run, 500 steps, IRE on from step 0, not from the end of the warm-up | {times(speedup['from_step_0'], f"{tuned['admire']} + {tuned['admire early']}")} |

Final validation loss minus AdamW's, seed by seed, with the mask from three sources (the same runs and commands):

| | Fisher probe | second moment | random |
|---|---|---|---|
| tiny, 500 steps, on from the end of the warm-up | {gaps('AdmIRE', 'second moment', 'random mask')} |
| tiny, 500 steps, on from step 0 | {gaps('on from step 0', 'second moment from step 0', 'random mask from step 0')} |
| tiny, 500 steps, on from step 0 and tuned so | {gaps('AdmIRE from step 0, tuned so', 'second moment from step 0, those settings', 'random mask from step 0, tuned so')} |
| tiny, 2000 steps, on from the end of the warm-up | {gaps('AdmIRE, long', '', '')} |
| tiny, 2000 steps, on from step 0 | {gaps('AdmIRE from step 0, long', 'second moment from step 0, long', 'random mask from step 0, long')} |
| smaller, 500 steps, on from the end of the warm-up | {gaps('AdmIRE', '', '', report=nano)} |
| smaller, 500 steps, on from step 0 | {gaps('on from step 0', '', 'random mask from step 0', report=nano)} |

| the same difference, tiny run, 500 steps | |
|---|---|
| AdmIRE again, with other draws of the labels in its probes | {gap('AdmIRE again')} |
| longer steps along the sharp coordinates; along all of them | {gap('inverted mask')}; {gap('all coordinates')} |
| AdamW whose learning rate jumps by the mean of IRE's factors where IRE switches on | {gap('lr jumps by the mean')} |
| AdamW with the settings of twice the trials | {gap('AdamW, twice the trials')} |
| AdamW with twice the steps | {gap('AdamW, 2 times the steps')} |
| Muon; Muon with IRE, as many trials each | {gap('Muon')}; {gap('Muon with IRE')} |
| at the latter's settings Muon with a random mask; without a mask | {gap('Muon with a random mask')}; {gap('Muon at those settings, no mask')} |

| measured | result | command |
|---|---|---|
| test accuracy, ResNet-56, {cifar['settings']['limit_train']:,} CIFAR-10 pictures (JPEG copy), {cifar['settings']['epochs']} epochs, 3 seeds: \
SGD-IRE minus SGD; SAM-IRE minus SAM | {less['sgd-ire']['test_acc'][0]:+.2f} ± {less['sgd-ire']['test_acc'][1]:.2f}; \
{less['sam-ire']['test_acc'][0]:+.2f} ± {less['sam-ire']['test_acc'][1]:.2f} points | `{cifar['command']}` |
| images a second, train_cifar.py of a plain torch loop | {images['ours_of_plain']:.2f} | `{images['command']}` |
| validation loss, tiny run, {runs[0]['adamw']['steps']} steps, 3 seeds (mean ± standard error) | AdamW {loss('adamw')}, AdmIRE {loss('admire')} | \
`for s in 0 1 2; do python train_gpt.py --compare --seed $s --out runs/compare-$s; done` |
| AdamW's loss minus AdmIRE's, by seed | {', '.join(f'{x:+.4f}' for x in differences)} | the same |
| step at which AdmIRE was at AdamW's final loss, by seed | {', '.join(reached)} of {runs[0]['adamw']['steps']} | the same |
| tokens a second, tiny run, train_gpt.py's AdamW of a plain loop over transformers' Llama | \
{1 / rows['plain transformers loop, AdamW']['of_adamw']:.2f} | `python benchmarks/train.py` |
| tokens a second, AdmIRE of AdamW: full probe, quarter probe, second moment | {rows['AdmIRE, full probe']['of_adamw']:.3f}, \
{rows['AdmIRE, 4 micro-batches, probe on one']['of_adamw']:.3f}, {rows['AdmIRE, second_moment']['of_adamw']:.3f} | the same |
| mask refresh at 60M parameters against the textbook way: time, extra memory | {refresh['ms'] / textbook['ms']:.2f}, \
{refresh['extra_bytes_per_parameter'] / textbook['extra_bytes_per_parameter']:.2f} | `python benchmarks/step.py` |
| AdmIRE's step at 60M parameters: times AdamW's foreach step, its fused step | {big['AdmIRE (fused), step']['over_foreach_adamw']:.2f}, \
{big['AdmIRE (fused), step']['over_fused_adamw']:.2f} | the same |

Most of what IRE from the end of the warm-up gives, a longer warm-up gives AdamW: with 250 steps of warm-up the best AdamW of the sweep ends at
{best['adamw', 250]:.4f} and the best AdmIRE at {best['admire', 250]:.4f}, with 500 at {best['adamw', 500]:.4f} and {best['admire', 500]:.4f} (one seed).
In the rows of 1000 steps each optimizer runs at the best of its own sweep
([{len(trials['adamw'])} trials of AdamW, {len(trials['admire'])} of AdmIRE](results/sweep-tiny.json)): {settings[0]}; {settings[1]}, kappa \
{runs[0]['admire']['kappa']:g}, gamma {runs[0]['admire']['gamma']:g}.
Hardware: {step['environment']['device']}, {step['environment']['threads']} threads; for the tokens a second \
{train['environment']['device']}, {train['environment']['threads']} threads; torch {runs[0]['torch']}. The runs of the first three tables name their own.
"""


def section():
    return re.search(r"<!-- results:start -->\n(.*?)<!-- results:end -->", README, re.S)


def test_the_numbers_are_those_of_the_results():
    assert section().group(1) == results(), "renew it: python tests/test_readme.py"


def test_the_files_it_names_exist():
    for name in re.findall(r"\]\((?!http)([^)]+)\)", README) + re.findall(r"python ((?:\w+/)?\w+\.py)", README):
        assert (ROOT / name).exists(), name
    help_text = subprocess.run([sys.executable, ROOT / "train_gpt.py", "--help"], capture_output=True, text=True).stdout
    assert all(flag in help_text for flag in re.findall(r"train_gpt\.py.* (--[a-z-]+)", README))


if __name__ == "__main__":
    start, end = section().span(1)
    (ROOT / "README.md").write_text(README[:start] + results() + README[end:])
