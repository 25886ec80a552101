"""What benchmarks/speedup.py computes from its runs is shown here: a table and a figure."""

import json
import math

from study import number

import train_gpt


def step_time(path, on):
    """Time of an AdmIRE step over AdamW's in the report of benchmarks/train.py at `path`, IRE being
    on in the share `on` of the steps, and its standard error; None where it is not measured."""
    if not path.exists():
        return None
    report = json.loads(path.read_text())
    measured = report["rows"]["AdmIRE, full probe"]
    ratio, (low, high) = measured["of_adamw"], measured["quartiles"]
    # of a median, from a normal distribution's quartiles
    error = 1.253 * (high - low) / 1.349 / report["rounds"] ** 0.5
    return 1 + on * (1 / ratio - 1), on * error / ratio**2


def in_time(steps, error, cost):
    """A speed-up in steps as one in time, with its standard error."""
    wall = steps / cost[0]
    return wall, wall * math.hypot(error / steps, cost[1] / cost[0])


# --------------------------------------------------------------------------- table
def compared_rows(report):
    yield "| | steps | seeds | validation loss | minus AdamW's, seed by seed | minus AdmIRE's |"
    yield "|" + "---|" * 6
    for label, row in report["compared"].items():
        gaps = ["", ""]
        for i, other in enumerate(("adamw", "admire")):
            if row[f"minus_{other}"]:
                gaps[i] = number(row[f"minus_{other}"], row[f"minus_{other}_stderr"], "+")
        loss = number(row["loss"], row["loss_stderr"])
        yield f"| {label} | {row['steps']} | {len(row['seeds'])} | {loss} | {gaps[0]} | {gaps[1]} |"


def speedup_line(what, found):
    text = f"\nspeed-up {what}: "
    if found["steps"]:
        text += f"{found['steps']:.3f} ± {found['steps_stderr']:.3f} in steps"
        if found["wall"]:
            text += f", {found['wall']:.3f} ± {found['wall_stderr']:.3f} in time"
        text += "; "
    return text + found["note"]


def table(report):
    """Markdown."""
    lines = list(compared_rows(report))
    for name, found in report["best"].items():
        settings = ", ".join(f"{k} {v}" for k, v in found.items())
        lines.append(f"\n{name}, {report['trials'][name]} trials: {settings}")
    for steps, found in report["horizons"].items():
        lines.append(speedup_line(f"at {steps} steps", found))
    lines.append(speedup_line("from step 0", report["from_step_0"]))
    return "\n".join(lines)


# --------------------------------------------------------------------------- figure
def draw(report, path):
    """Above, AdamW's loss over the length of its schedule and AdmIRE's level; below, all others at
    the same steps: in three groups, the best first."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from toy.common import STYLE

    rows = {label: row for label, row in report["compared"].items() if row["horizon"] == 1}
    if "AdmIRE" not in rows:
        return
    steps = rows["AdmIRE"]["steps"]
    others = {
        label: (row["minus_adamw"], row["minus_adamw_stderr"] or 0)
        for label, row in rows.items()
        if row["steps"] == steps and label != "AdamW"
    }
    with plt.rc_context(STYLE):
        heights = 2.8, 0.8 + 0.22 * (len(others) + len(GROUPS))
        figure = plt.figure(figsize=(4.8, sum(heights)), layout="constrained")
        parts = figure.subfigures(2, height_ratios=heights)
        draw_lengths(parts[0].subplots(), rows)
        draw_others(parts[1].subplots(), others)
        train_gpt.write_atomically(path, lambda f: figure.savefig(f, format="png"))
        plt.close(figure)


def draw_lengths(axes, rows):
    from toy.common import BLACK, BLUE

    steps = rows["AdmIRE"]["steps"]
    curve = sorted(
        (row["steps"], row["minus_adamw"], row["minus_adamw_stderr"] or 0)
        for label, row in rows.items()
        if label == "AdamW" or label.endswith("times the steps")
    )
    lengths, gaps, errors = zip(*curve, strict=True)
    style = {"color": BLACK, "marker": "o", "ms": 4}
    axes.errorbar(lengths, gaps, errors, label="AdamW, each schedule to its end", **style)
    level = rows["AdmIRE"]["minus_adamw"]
    error = rows["AdmIRE"]["minus_adamw_stderr"] or 0
    axes.axhline(level, color=BLUE, label=f"AdmIRE, {steps} steps")
    axes.axhspan(level - error, level + error, color=BLUE, alpha=0.2, lw=0)
    if early := rows.get("AdmIRE from step 0, tuned so"):
        label = "on from step 0, tuned so"
        axes.axhline(early["minus_adamw"], color=BLUE, ls="--", label=label)
    axes.set(xlabel="steps", ylabel=f"loss minus AdamW's\nat {steps} steps")
    axes.legend()


GROUPS = "IRE", "controls", "other optimizers, settings"
CONTROLS = "random", "inverted", "all coordinates", "sharpest", "lr jumps"


def group_of(label):
    if label.startswith("AdamW") or "Muon" in label:
        return GROUPS[2]
    return GROUPS[1] if label.startswith(CONTROLS) else GROUPS[0]


def draw_others(axes, others):
    """Gaps to AdamW; those far to the left, Muon's, which would hide the rest, are named."""
    from toy.common import BLACK, BLUE, RED

    near = [0]
    for label, (gap, spread) in others.items():
        if "Muon" not in label:
            near += [gap - spread, gap + spread]
    margin = 0.1 * (max(near) - min(near))
    left, right = min(near) - margin, max(near) + margin
    axes.axvline(0, color=BLACK, lw=1, zorder=1)
    names = []
    best_first = sorted(others, key=lambda label: others[label][0])
    for group, color in zip(GROUPS, (BLUE, RED, BLACK), strict=True):
        labels = [label for label in best_first if group_of(label) == group]
        names += [group] if labels else []
        for label in labels:
            gap, spread = others[label]
            if gap < left:
                text = f" \u2190 {gap:.3f} ± {spread:.3f}"
                background = {"facecolor": "white", "edgecolor": "none", "pad": 0}
                axes.text(left, len(names), text, va="center", bbox=background)
            axes.errorbar(gap, len(names), xerr=spread, color=color, marker="o", ms=4)
            names.append(label)
    axes.set_yticks(range(len(names)), names)
    for tick, name in zip(axes.get_yticklabels(), names, strict=True):
        tick.set_fontweight("normal" if name in others else "bold")
    axes.set(xlabel="loss minus AdamW's", xlim=(left, right), ylim=(len(names) - 0.5, -0.5))
