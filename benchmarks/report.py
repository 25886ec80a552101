"""Tables and figures of the studies, from their JSON files.

    python benchmarks/report.py results/map.json                   # every table
    python benchmarks/report.py results/map.json "SoftIRE on AdamW"    # that optimizer, or setting
    python benchmarks/report.py book/results.md                    # renews the tables of the page

A row of `gains` is one form at one place, as benchmarks/study.py computes it. A gain is the loss of
the tuned base minus the form's, so that positive is better.
"""

import math
import re
import shlex
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from statistics import mean

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import common

MISSING = "not measured yet"
PANELS = (
    "hard mask over AdamW",
    "hard mask over Muon",
    "soft factor over AdamW",
    "soft factor over Muon",
    "random mask over AdamW",
    "random mask over Muon",
)
TEXTS = {"stdlib": "bytes", "stdlib-bytes": "bytes", "bpe-4096": "4,096 tokens"}
TEXTS |= {"stdlib-gpt2": "50,257 tokens", "shakespeare": "bytes of Shakespeare"}
BASES = {"AdamW": "AdamW", "AdamW, rates": "AdamW with own rates"}
BASES |= {"Muon": "Muon", "Muon, rates": "Muon with own rates"}
FIRST = ("AdamW", "Muon")  # bases with one learning rate for all tensors
KINDS = ("embedding", "q", "k", "v", "o", "feed-forward", "norms", "head")
WIDTH = 5.5  # inches of a figure, whose type is then readable on a phone
COLOURS = 0.1  # the gain at which colours end
# By rule: name and marker in the figure of the gains, and how far below its row the mark stands.
MARKS = {
    None: ("own rates", "s", -0.22),
    "soft": ("SoftIRE", "o", 0.0),
    "hard": ("IRE's mask", "^", 0.22),
}


# --------------------------------------------------------------------------- words
def setting_of(place):
    """A place in words."""
    model = "" if place["model"] == "nano" else f", {place['model']}"
    text = TEXTS.get(place["data"], place["data"])
    return f"{place['steps']:,} steps of {place['batch']}, {text}{model}"


def optimizer_of(row):
    """The optimizer of a row in words."""
    base = BASES.get(row["base"], row["base"])
    if row["form"] == row["base"] or row["form"] in BASES:
        return BASES.get(row["form"], row["form"])
    name = own_name(row).replace("hard mask", "IRE's mask").replace("soft factor", "SoftIRE")
    name = f"IRE's {name}" if name.startswith("mask") else name
    name = f"IRE {name}" if name == "as in the paper" else name
    return f"{name} on {base}"


def own_name(row):
    """Of a form, without its base's."""
    return re.sub(" over (AdamW|Muon)|, on rates| on Muon(, rates)?", "", row["form"])


def number(value, error, sign="", digits=4):
    """1.2345 ± 0.0012; without the error where there is none."""
    text = f"{value:{sign}.{digits}f}"
    return text if error is None else f"{text} ± {error:.{digits}f}"


def error_with_tuning(row):
    """The standard error of a gain with the luck of tuning."""
    return math.hypot(row["pooled_stderr"], row["tuning_stderr"])


def saved(row):
    """Share of the base's steps, in per cent; ~ beyond the lengths that were run."""
    if row["steps_saved"] is None or row["form"] == row["base"]:
        return ""
    return f"{'~' if row['extrapolated_on'] else ''}{100 * row['steps_saved']:.0f}%"


def source(report):
    """How many runs, where, and of which commit."""
    if "runs" not in report:
        return f"commit {report['commit'][:12]}"
    devices, torches, commits = (
        sorted({run[name] for run in report["runs"]}) for name in ("device", "torch", "commit")
    )
    made_by = f"torch {', '.join(torches)}; commit {', '.join(x[:12] for x in commits)}"
    return f"{len(report['runs'])} runs; {', '.join(devices)}; {made_by}"


# --------------------------------------------------------------------------- tables
def cells(row, report):
    """{column: text} of a table."""
    found = {
        "setting": setting_of(report["places"][row["place"]]),
        "optimizer": optimizer_of(row),
        "loss": number(row["loss"], row["loss_stderr"], digits=3),
        "gain on its base": "",
        "with tuning": "",
        "gain on the better base": "",
        "seeds": str(len(row["seeds"])),
        "steps saved": saved(row),
        "trials": str(row["trials"] or "borrowed"),
        "edge of its grid": ", ".join(row["at_edge"]).replace("_fraction", "").replace("_", " "),
    }
    if row["form"] != row["base"]:
        found["gain on its base"] = number(row["gain"], row["gain_stderr"], "+", 3)
        found["gain on its base"] += " (commits differ)" if row["commits"] > 1 else ""
        if row["gain_stderr"] is not None or row["pooled_stderr"]:  # else one seed, everywhere
            found["with tuning"] = f"± {error_with_tuning(row):.3f}"
    better = row["better"]
    here = {other["form"] for other in report["gains"] if other["place"] == row["place"]}
    if better in FIRST and f"{better}, rates" not in here:
        better = None  # there is one base only
    if better and row["form"] == better:
        found["gain on the better base"] = "this is the better base"
    elif better:
        value, error = row["better_gain"], row["better_gain_stderr"]
        found["gain on the better base"] = number(value, error, "+", 3)
    return found


def markdown(report, rows, without):
    """Markdown. Left out: the column `without`, and each that is empty."""
    lines = [cells(row, report) for row in rows]
    heads = [head for head in lines[0] if head != without and any(x[head] for x in lines)]
    text = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    return "\n".join(text + [f"| {' | '.join(x[head] for head in heads)} |" for x in lines])


def table(report, wanted=None):
    """A table for each setting, and what is missing; or only the rows of the wanted optimizer or
    the wanted setting."""
    columns = {"optimizer": optimizer_of, "place": lambda row: row["place"]}
    for name, value in columns.items():
        rows = [row for row in report["gains"] if value(row) == wanted]
        if rows:
            return markdown(report, rows, "setting" if name == "place" else name)
    if wanted in report["places"]:
        return MISSING
    if wanted:
        known = {value(row): None for value in columns.values() for row in report["gains"]}
        raise common.BadInput(f"got {wanted}, allowed is one of: {'; '.join(known)}")
    parts = []
    for place in report["places"]:
        rows = [row for row in report["gains"] if row["place"] == place]
        if rows:
            title = f"{place}: {setting_of(report['places'][place])}"
            parts.append(f"{title}\n\n{markdown(report, rows, 'setting')}\n")
    return "\n".join([*parts, *changes(report), *missing(report)])


def changes(report):
    """Is a form tuned as far as it goes? The best of the changes of one setting, a line each."""
    found = {}
    for row in report.get("changes", ()):
        found.setdefault((row["form"], row["place"]), []).append(row)
    for (form, place), rows in found.items():
        best = max(rows, key=lambda row: row["gain"])
        words = ", ".join(f"{name} {value:g}" for name, value in best["changed"].items())
        gain = number(best["gain"], best["gain_stderr"], "+")
        yield f"{form} at {place}: the best of {len(rows)} changes, {words}, gains {gain}"


def missing(report):
    """What the plan asks for and has not got, a line for each place."""
    done = {(row["place"], row["form"]) for row in report["gains"]}
    left = {}
    for place, names, *_ in report["plan"]:
        left.setdefault(place, {}).update(dict.fromkeys(n for n in names if (place, n) not in done))
    for place, names in left.items():
        if names:
            yield f"{MISSING} at {place}: {'; '.join(names)}"


# --------------------------------------------------------------------------- the page of results
MARKED = re.compile(r"(<!-- (python benchmarks/report\.py .+?) -->\n).*?(<!-- end -->)", re.S)


def renewed(page):
    """The text of the page with the table of each command between its two comments."""

    def said(found):
        words = shlex.split(found[2])[2:]
        report = common.read_json(ROOT / words[0])
        shown = shown_of(report, *words[1:])
        return f"{found[1]}\n{shown}\n\n`{found[2]}`: {source(report)}\n\n{found[3]}"

    return MARKED.sub(said, page)


def shown_of(report, *wanted):
    """A study's tables, or how often each answer of results/bases.json was given."""
    if "counts" not in report:
        return table(report, *wanted)
    lines = [f"| {what} | {count} |" for what, count in report["counts"].items()]
    return "\n".join(["| what happened | optimizers |", "|---|---|", *lines])


# --------------------------------------------------------------------------- figures
def draw(report, path):
    """The map, or the gains by place, at `path`. Beside it the gains of the other forms, and the
    losses over the learning rate. A study that has nothing for a figure has no such file."""
    first = the_map if has_map(report) else the_gains
    for name, figure in {"": first, "-forms": the_forms, "-rates": the_rates}.items():
        keep(figure(report), path.with_stem(f"{path.stem}{name}"))


def keep(figure, path):
    import matplotlib.pyplot as plt

    if figure:
        common.write_atomically(path, partial(figure.savefig, format="png"))
        plt.close(figure)


def panels_of(heights, columns=1):
    """A figure and its axes, stacked in rows of these heights."""
    import matplotlib.pyplot as plt

    from toy.common import STYLE

    plt.rcParams.update(STYLE)
    figure = plt.figure(figsize=(WIDTH, sum(heights) + 0.4), layout="constrained")
    axes = figure.subplots(len(heights), columns, squeeze=False, height_ratios=heights)
    return figure, list(axes.flat)


def the_rates(report):
    """Loss over the learning rate, for the tuned forms of the smaller model with 16 sequences per
    step. A curve goes through the best trial at each rate, on seed 0. Each dot is a seed on which
    the form was judged."""
    rows = {(row["place"], row["form"]): row for row in report["gains"]}
    curves = best_at_each_rate(report, rows)
    if not curves:
        return None
    figure, axes = panels_of([3.2] * len(curves))
    shown = {}  # {form: its line}
    for (place, held), panel in zip(curves.items(), axes, strict=True):
        for form, curve in held.items():
            row = rows[place, form]
            style = style_of(report, form)
            rates = sorted(curve)
            name = optimizer_of(row)
            (shown[form],) = panel.plot(rates, [curve[x] for x in rates], label=name, **style)
            dots = {"ls": "", "marker": "o", "ms": 5, "alpha": 0.6, "color": style["color"]}
            panel.plot([row["lr"]] * len(row["losses"]), row["losses"], **dots)
        best = [min(curve.values()) for curve in held.values()]
        best += [loss for form in held for loss in rows[place, form]["losses"]]
        span = max(best) - min(best)
        title = setting_of(report["places"][place])
        panel.set(xscale="log", xlabel="learning rate", ylabel="loss", title=title)
        panel.set_ylim(min(best) - 0.1 * span, max(best) + 0.2 * span)
        rates = sorted({lr for curve in held.values() for lr in curve})[::2]
        panel.set_xticks(rates, [f"{lr:.2g}" for lr in rates])
        panel.set_xticks([], minor=True)
    lines = [shown[form] for form in report["forms"] if form in shown]
    figure.legend(handles=lines, loc="outside lower center", ncols=1)
    return figure


def best_at_each_rate(report, rows):
    """{place: {form: {lr: the lowest loss of the trials on seed 0}}}, of what is judged in rows."""
    curves = {}
    for run in report["runs"]:
        at = run["settings"]
        trial = at["seed"] == 0 and run["val_loss"]
        if trial and (at["place"], at["form"]) in rows and has_curve(report, at):
            curve = curves.setdefault(at["place"], {}).setdefault(at["form"], {})
            curve[at["lr"]] = min(run["val_loss"], curve.get(at["lr"], run["val_loss"]))
    return curves


def has_curve(report, at):
    """Whether a run belongs to a form and a place that the_rates shows."""
    form, place = report["forms"][at["form"]], report["places"][at["place"]]
    tuned = form["settings"].keys() <= {"kappa", "gamma", "alpha"} and not form["borrows"]
    small = (place["model"], place["batch"]) == ("nano", 16)
    return tuned and small and "again" not in at["form"]


def style_of(report, form):
    """The colour of the rule; dashed with own rates or Muon."""
    about = report["forms"][form]
    dashed = form.endswith("rates") or about["base"] == "muon"
    return {"color": color_of(about["rule"]), "ls": "--" if dashed else "-"}


def color_of(rule):
    """A base is black, IRE's mask orange, IRE as in the paper green, SoftIRE blue."""
    from toy.common import BLACK, BLUE, GREEN, ORANGE

    return {None: BLACK, "hard": ORANGE, "paper": GREEN, "soft": BLUE}[rule]


def the_flat(found):
    """What IRE calls flat: the share of each kind of tensor over the steps, squares above the
    Fisher probe. found: results/flat.json."""
    figure, axes = panels_of([3.2] * 2)
    titles = {"squares": "% flat by the mean of squared gradients", "fisher": "% flat by the probe"}
    for (name, title), panel in zip(titles.items(), axes, strict=True):
        steps = list(found[name])
        shares = np.array([by_kind(found[name][step]) for step in steps]).T
        panel.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for (i, j), share in np.ndenumerate(shares):
            color = "white" if share > 0.6 else "black"
            panel.text(j, i, f"{100 * share:.0f}", ha="center", va="center", color=color)
        panel.set_xticks(range(len(steps)), steps)
        panel.set_yticks(range(len(KINDS)), KINDS)
        panel.grid(False)
        panel.set(xlabel="step", title=title)
    return figure


def by_kind(shares):
    """The shares {tensor: share} as the mean of each of KINDS, over layers."""
    kinds = {kind: [] for kind in KINDS}
    for name, share in shares.items():
        kinds[kind_of(name)].append(share)
    return [mean(values) for values in kinds.values()]


def kind_of(name):
    parts = {"embed_tokens": "embedding", "lm_head": "head", "norm": "norms"}
    parts |= {f"{x}_proj": x for x in "qkvo"} | {"mlp": "feed-forward"}
    return next(kind for part, kind in parts.items() if part in name)


def has_map(report):
    return report["forms"].keys() >= set(PANELS)


def in_first_figure(report):
    """The forms that the map, or the figure of the gains by place, shows."""
    if has_map(report):
        return set(PANELS)
    tuned = [form for form, about in report["forms"].items() if not about["borrows"]]
    places = Counter(row["form"] for row in report["gains"])
    return {form for form in tuned if places[form] >= 2 and form not in FIRST}


def the_gains(report):
    """The gains of the tuned forms that were judged at two places or more: a panel for each base,
    a row for each place. A bar is twice the error with the luck of tuning; a mark is filled if its
    bar does not cross zero."""
    forms = in_first_figure(report)
    rows = [row for row in report["gains"] if row["form"] in forms]
    if not rows:
        return None
    panels = {}
    for row in rows:
        panels.setdefault(row["base"], {}).setdefault(row["place"], []).append(row)
    figure, axes = panels_of([0.6 + 0.36 * len(held) for held in panels.values()])
    for (base, held), panel in zip(panels.items(), axes, strict=True):
        places = [place for place in report["places"] if place in held]
        for i, place in enumerate(places):
            for row in held[place]:
                rule = report["forms"][row["form"]]["rule"]
                _, marker, down = MARKS[rule]
                bar = 2 * error_with_tuning(row)
                filling = color_of(rule) if abs(row["gain"]) > bar else "white"
                style = {"color": color_of(rule), "mfc": filling, "fmt": marker, "ms": 5, "lw": 1}
                panel.errorbar(row["gain"], i + down, xerr=bar, **style)
        panel.axvline(0, color="black", lw=0.8)
        names = [setting_of(report["places"][place]) for place in places]
        panel.set_yticks(range(len(places)), names)
        panel.set_ylim(len(places) - 0.5, -0.5)
        panel.set_title(f"on {BASES[base]}", loc="right")
        panel.sharex(axes[0])
    axes[-1].set_xlabel("gain in nats per token (right is better)")
    for rule, (name, marker, _) in MARKS.items():
        axes[0].plot([], [], marker, color=color_of(rule), label=name)
    figure.legend(loc="outside lower center", ncols=len(MARKS))
    return figure


def the_map(report):
    """A panel for each form: the gain as colour and number over the batch and the length, where
    they were judged."""
    alike = {"model": "nano", "data": "stdlib"}
    places = {n: p for n, p in report["places"].items() if p.items() >= alike.items()}
    judged = [places[row["place"]] for row in report["gains"] if row["place"] in places]
    batches = sorted({p["batch"] for p in judged})
    lengths = sorted({p["steps"] for p in judged})
    figure, axes = panels_of([2.4] * 3, columns=2)
    for form, panel in zip(PANELS, axes, strict=True):
        rows = [row for row in report["gains"] if row["form"] == form and row["place"] in places]
        values = np.full((len(lengths), len(batches)), np.nan)
        for row in rows:
            place = places[row["place"]]
            i, j = lengths.index(place["steps"]), batches.index(place["batch"])
            values[i, j] = row["gain"]
            color = "white" if abs(row["gain"]) > 0.6 * COLOURS else "black"
            panel.text(j, i, gain_in_words(row), ha="center", va="center", color=color)
        image = panel.imshow(values, cmap="RdBu", vmin=-COLOURS, vmax=COLOURS, aspect="auto")
        panel.set_facecolor("0.93")
        panel.set_xticks(range(len(batches)), batches)
        panel.set_yticks(range(len(lengths)), lengths)
        panel.grid(False)
        title = form.replace("hard", "IRE's").replace("soft factor", "SoftIRE")
        panel.set(title=title.replace("over", "on"), xlabel="sequences per step", ylabel="steps")
        panel.invert_yaxis()
    words = "gain in nats per token; blue is better, grey was not run"
    bar = figure.colorbar(image, ax=axes, extend="both", label=words, location="bottom", aspect=30)
    bar.set_ticks([-COLOURS, -COLOURS / 2, 0, COLOURS / 2, COLOURS])
    return figure


def gain_in_words(row):
    if row["gain_stderr"] is None:
        return f"{row['gain']:+.3f}\none seed"
    return f"{row['gain']:+.3f}\n± {row['gain_stderr']:.3f}"


def the_forms(report, usual=None):
    """The gains of all forms on top of their bases, the best first. A base has a panel for each
    place at which forms were judged that are not `usual`, by default those of the first figure. All
    panels have one axis. None while there are no such forms."""
    usual = in_first_figure(report) if usual is None else usual
    panels = {}
    rows = [row for row in report["gains"] if not re.search("again|live", row["form"])]
    for place in report["places"]:
        for base in dict.fromkeys(row["base"] for row in rows):
            held = [row for row in rows if (row["place"], row["base"]) == (place, base)]
            held = [row for row in held if row["form"] != base]
            if {row["form"] for row in held}.difference(usual):
                panels[place, base] = sorted(held, key=lambda row: -row["gain"])
    if not panels:
        return None
    gained = [row["gain"] for held in panels.values() for row in held]
    right = 1.15 * max(0.01, *gained)
    limits = (max(1.5 * min(-0.01, *gained), -0.7 * right), right)
    figure, axes = panels_of([0.6 + 0.24 * len(held) for held in panels.values()])
    for ((place, base), held), panel in zip(panels.items(), axes, strict=True):
        draw_forms_at(panel, held, limits)
        title = f"{setting_of(report['places'][place])}, on {BASES.get(base, base)}"
        panel.set_title(title, loc="right")
    axes[-1].set_xlabel("gain in nats per token (right is better)", loc="right")
    return figure


def draw_forms_at(panel, rows, limits):
    """Gains with their errors; a loss beyond the left end of the axis is written there."""
    from toy.common import BLACK, BLUE

    panel.axvline(0, color=BLUE, lw=1)
    for i, row in enumerate(rows):
        if row["gain"] < limits[0]:
            panel.text(limits[0], i, f" \u2190 {row['gain']:.2f}", va="center")
        else:
            error = row["gain_stderr"] or 0
            panel.errorbar(row["gain"], i, xerr=error, color=BLACK, marker="o", ms=4)
    panel.set_yticks(range(len(rows)), [optimizer_of(row).rsplit(" on ", 1)[0] for row in rows])
    panel.locator_params(axis="x", nbins=6)
    panel.set(xlim=limits, ylim=(len(rows) - 0.5, -0.5))


# --------------------------------------------------------------------------- the speed-up study
# results/speedup-tiny.json and speedup-nano.json are frozen. benchmarks/speedup.py made them; git
# has it at b366efc. Their differences are losses minus the base's, so that negative is better.
def speedup_table(report):
    """Markdown."""
    heads = "steps", "seeds", "validation loss", "minus AdamW's, seed by seed", "minus AdmIRE's"
    lines = [f"| | {' | '.join(heads)} |", "|" + "---|" * 6]
    for label, row in report["compared"].items():
        gaps = []
        for name in ("minus_adamw", "minus_admire"):
            gaps.append(number(row[name], row[f"{name}_stderr"], "+") if row[name] else "")
        loss = number(row["loss"], row["loss_stderr"])
        cells = (label, row["steps"], len(row["seeds"]), loss, *gaps)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    for name, found in report["best"].items():
        words = ", ".join(f"{setting} {value}" for setting, value in found.items())
        lines.append(f"\n{name}, {report['trials'][name]} trials: {words}")
    for steps, found in report["horizons"].items():
        lines.append(speedup_line(f"at {steps} steps", found))
    return "\n".join([*lines, speedup_line("from step 0", report["from_step_0"])])


def speedup_line(what, found):
    text = f"\nspeed-up {what}: "
    if found["steps"]:
        text += f"{found['steps']:.3f} ± {found['steps_stderr']:.3f} in steps"
        if found["wall"]:
            text += f", {found['wall']:.3f} ± {found['wall_stderr']:.3f} in time"
        text += "; "
    return text + found["note"]


def main(words):
    if len(words) not in (1, 2) or not Path(words[0]).is_file():
        sys.exit(f"report.py: got {words}, allowed is a file, and an optimizer or a setting of it")
    path = Path(words[0])
    try:
        if path.suffix != ".md":
            print(shown_of(common.read_json(path), *words[1:]))
            return
        page = renewed(path.read_text())
    except common.BadInput as e:
        sys.exit(f"report.py: {e}")
    common.write_atomically(path, lambda f: f.write(page.encode()))


if __name__ == "__main__":
    main(sys.argv[1:])
