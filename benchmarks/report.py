"""Tables and figures of the studies, from their JSON files alone.

A row of `gains` is one form at one place, as benchmarks/study.py computes it. A gain is the loss of
the tuned base minus the form's, so that positive is better.
"""

import math
from functools import partial
from statistics import mean

import numpy as np

import common

MISSING = "not measured yet"
PANELS = (
    "hard mask over AdamW",
    "soft factor over AdamW",
    "random mask over AdamW",
    "hard mask over Muon",
    "soft factor over Muon",
    "random mask over Muon",
)
SOURCES = ("device", "threads", "torch", "commit")  # of a run
ERRORS = (
    "\n± is the standard error over the seeds. error: from the spread of the form's gains at all "
    "places, with the luck of tuning on one seed. Both leave out other machines and other texts."
)
KINDS = ("embedding", "head", "qk", "vo", "ffn", "norm")
COLOURS = 0.1  # the gain at which colours end


# --------------------------------------------------------------------------- table
def number(value, error, sign=""):
    """1.2345 ± 0.0012; without the error where there is none."""
    text = f"{value:{sign}.4f}"
    return text if error is None else f"{text} ± {error:.4f}"


def saved(row):
    """Share of the base's steps, in per cent."""
    if row["steps_saved"] is None:
        return MISSING
    error = row["steps_saved_stderr"]
    text = f"{100 * row['steps_saved']:.0f}%"
    if error is not None:
        text += f" ± {100 * error:.0f}%"
    return f"{text}, extrapolated" if row["extrapolated_on"] else text


def settings(row, names):
    """The settings that were searched; (edge): a better value may lie beyond the grid."""
    parts = []
    for name in names:
        if name in row:
            edge = " (edge)" if name in row["at_edge"] else ""
            label = name.removesuffix("_fraction").replace("_", " ")
            parts.append(f"{label} {row[name]:g}{edge}")
    return ", ".join(parts)


def on_better(row):
    """The gain on top of the best base at that place, where this is another than the form's own."""
    if row["better"] in (None, row["base"], row["form"]):
        return ""
    return f"{number(row['better_gain'], row['better_gain_stderr'], '+')} on {row['better']}"


def cells(row, names):
    """{column: text} of the table."""
    found = {
        "place": row["place"],
        "form": row["form"],
        "trials": str(row["trials"] or "borrowed"),
        "settings": settings(row, names),
        "seeds": str(len(row["seeds"])),
        "loss": number(row["loss"], row["loss_stderr"]),
        "on top of": "",
        "gain": "",
        "error": "",
        "gain on the better base": on_better(row),
        "steps saved": "",
    }
    if row["form"] != row["base"]:
        found["on top of"] = row["base"]
        found["gain"] = number(row["gain"], row["gain_stderr"], "+")
        found["gain"] += " (commits differ)" if row["commits"] > 1 else ""
        found["steps saved"] = saved(row)
        found["error"] = f"{math.hypot(row['pooled_stderr'], row['tuning_stderr']):.4f}"
    return found


def table(report):
    """Markdown: every form at every place that was judged, then what is missing. A column that is
    empty is left out."""
    grids = [form["grid"] for form in report["forms"].values()] + [report.get("grid")]
    names = list(dict.fromkeys(name for grid in grids for name in grid or ()))
    rows = [cells(row, names) for row in report["gains"]]
    heads = [head for head in (rows[0] if rows else ()) if any(row[head] for row in rows)]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    lines += [f"| {' | '.join(row[head] for head in heads)} |" for row in rows]
    return "\n".join([*lines, ERRORS, *changes(report), *missing(report)])


def changes(report):
    """Is a form tuned as far as it goes? The best of the changes of one setting, a line each."""
    found = {}
    for row in report.get("changes", ()):
        if "length" not in row["changed"]:
            found.setdefault((row["form"], row["place"]), []).append(row)
    for (form, place), rows in found.items():
        best = max(rows, key=lambda row: row["gain"])
        words = ", ".join(f"{name} {value:g}" for name, value in best["changed"].items())
        gain = number(best["gain"], best["gain_stderr"], "+")
        yield f"\n{form} at {place}: the best of {len(rows)} changes, {words}, gains {gain}"


def missing(report):
    """What the plan asks for and has not got, a line for each place."""
    done = {(row["place"], row["form"]) for row in report["gains"]}
    left = {}
    for place, names, *_ in report["plan"]:
        left.setdefault(place, {}).update(dict.fromkeys(n for n in names if (place, n) not in done))
    for place, names in left.items():
        if names:
            yield f"\n{MISSING} at {place}: {'; '.join(names)}"


def source(report):
    """The command, and where and of which commit the runs are."""
    found = {name: sorted({str(run[name]) for run in report["runs"]}) for name in SOURCES}
    where = "; ".join(f"{name} {', '.join(values)}" for name, values in found.items())
    return f"`{report['command']}`, {len(report['runs'])} runs<br>{where}\n"


# --------------------------------------------------------------------------- figures
def draw(report, path):
    """The map at `path`; beside it the other forms, the losses over the learning rate, and what is
    flat. A study that has nothing for a figure has no such file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figures = {"": the_map, "-forms": the_forms, "-rates": the_rates, "-flat": the_flat}
    for name, figure in figures.items():
        drawn = figure(report)
        if drawn:
            out = path.with_stem(f"{path.stem}{name}")
            common.write_atomically(out, partial(drawn.savefig, format="png"))
            plt.close(drawn)


def the_rates(report):
    """Loss over the learning rate at every place: a curve through the trials of each form with the
    best warm-up at each rate, on seed 0, and a dot for each seed on which it was judged."""
    import matplotlib.pyplot as plt

    from toy.common import STYLE

    curves = {}  # {place: {form: {lr: loss}}}
    for run in report["runs"]:
        at = run["settings"]
        if at["seed"] == 0 and run["val_loss"] and "length" not in at:
            curve = curves.setdefault(at["place"], {}).setdefault(at["form"], {})
            curve[at["lr"]] = min(run["val_loss"], curve.get(at["lr"], run["val_loss"]))
    for place in curves:
        curves[place] = {form: curve for form, curve in curves[place].items() if len(curve) > 2}
    panels = [place for place in report["places"] if curves.get(place)]
    if not panels:
        return None
    forms = [form for form in report["forms"] if any(form in curves[place] for place in panels)]
    colors = {form: f"C{i % 10}" for i, form in enumerate(forms)}
    rows = -(-len(panels) // 3)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, 3, figsize=(10.5, 2.7 * rows + 0.6), squeeze=False)
        figure.set_layout_engine("constrained")
        for place, panel in zip(panels, axes.flat, strict=False):
            judged = {row["form"]: row for row in report["gains"] if row["place"] == place}
            for form, curve in curves[place].items():
                draw_curve(panel, curve, judged.get(form), colors[form])
            panel.set(xscale="log", xlabel="learning rate", ylabel="loss", title=place)
            rates = sorted({lr for curve in curves[place].values() for lr in curve})[::2]
            panel.set_xticks(rates, [f"{lr:.1g}" for lr in rates])
            panel.set_xticks([], minor=True)
        for panel in axes.flat[len(panels) :]:
            panel.remove()
        lines = [plt.Line2D([], [], color=colors[form], label=form) for form in forms]
        figure.legend(handles=lines, loc="outside lower center", ncols=4, fontsize=7)
    return figure


def draw_curve(panel, curve, row, color):
    rates = sorted(curve)
    panel.plot(rates, [curve[lr] for lr in rates], marker=".", lw=1, color=color)
    if row:
        rates = [row["lr"]] * len(row["losses"])
        panel.plot(rates, row["losses"], "o", ms=3, alpha=0.5, color=color)


def the_flat(report):
    """What IRE calls flat: the share of each kind of tensor over the steps, as the runs recorded
    it, mean over seeds; a panel for each form whose mask is IRE's own."""
    import matplotlib.pyplot as plt

    from toy.common import STYLE

    panels = {}  # {(place, form): [{step: {kind: share}}]}
    for run in report["runs"]:
        at = run["settings"]
        form = report["forms"][at["form"]]
        if (
            "flat" in run
            and form["rule"] == "hard"
            and form["settings"].keys() == {"kappa", "gamma"}
        ):
            panels.setdefault((at["place"], at["form"]), []).append(run["flat"])
    if not panels:
        return None
    with plt.rc_context(STYLE):
        size = (3.6 * len(panels), 2.8)
        figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False)
        figure.set_layout_engine("constrained")
        for ((place, form), found), panel in zip(panels.items(), axes.flat, strict=True):
            steps = sorted(found[0], key=int)
            shares = [[mean(run[t][kind] for run in found) for t in steps] for kind in KINDS]
            image = panel.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
            for (i, j), share in np.ndenumerate(shares):
                color = "white" if share > 0.6 else "black"
                panel.text(j, i, f"{share:.2f}", ha="center", va="center", fontsize=6, color=color)
            panel.set_xticks(range(len(steps)), steps)
            panel.set_yticks(range(len(KINDS)), KINDS)
            panel.grid(False)
            panel.set(xlabel="step", title=f"{place}: {form}")
        figure.colorbar(image, ax=axes, label="flat share")
    return figure


def the_map(report):
    """A panel for each form: the gain as colour and number over the batch and the length; None for
    a study without these forms."""
    import matplotlib.pyplot as plt

    from toy.common import STYLE

    if not report["forms"].keys() >= set(PANELS):
        return None
    alike = {"model": "nano", "data": "stdlib"}
    places = {n: p for n, p in report["places"].items() if p.items() >= alike.items()}
    batches = sorted({p["batch"] for p in places.values()})
    lengths = sorted({p["steps"] for p in places.values()})
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 3, figsize=(10.5, 6.8), layout="constrained")
        for form, panel in zip(PANELS, axes.flat, strict=True):
            rows = {row["place"]: row for row in report["gains"] if row["form"] == form}
            cells = {(p["batch"], p["steps"]): rows.get(name) for name, p in places.items()}
            image = draw_panel(panel, form, cells, batches, lengths)
        words = "gain: loss of the tuned base minus the form's, nats a token; blue is better"
        place = {"location": "bottom", "shrink": 0.5, "aspect": 40}
        figure.colorbar(image, ax=axes, extend="both", label=words, **place)
    return figure


def draw_panel(panel, form, cells, batches, lengths):
    """cells: {(batch, steps): its row, or None while it is not judged}."""
    values = np.full((len(lengths), len(batches)), np.nan)
    for i, steps in enumerate(lengths):
        for j, batch in enumerate(batches):
            row = cells.get((batch, steps))
            style = {"color": "0.5", "fontsize": 6}
            text = "not\nmeasured yet" if (batch, steps) in cells else "not planned"
            if row:
                values[i, j] = row["gain"]
                dark = abs(row["gain"]) > 0.6 * COLOURS
                style = {"color": "white" if dark else "black", "fontsize": 9}
                text = gain_in_words(row)
            panel.text(j, i, text, ha="center", va="center", **style)
    image = panel.imshow(values, cmap="RdBu", vmin=-COLOURS, vmax=COLOURS, aspect="auto")
    panel.set_facecolor("0.95")
    panel.set_xticks(range(len(batches)), batches)
    panel.set_yticks(range(len(lengths)), lengths)
    panel.grid(False)
    panel.set(title=form, xlabel="sequences a step", ylabel="steps")
    panel.invert_yaxis()
    return image


def gain_in_words(row):
    if row["gain_stderr"] is None:
        return f"{row['gain']:+.3f}\none seed"
    return f"{row['gain']:+.3f}\n± {row['gain_stderr']:.3f}"


def the_forms(report):
    """The other forms beside those of the map, a panel for each base and place at which they were
    judged, the best first; None while there are none."""
    import matplotlib.pyplot as plt

    from toy.common import STYLE

    panels = {}
    for place in report["places"]:
        for base in dict.fromkeys(row["base"] for row in report["gains"]):
            rows = [r for r in report["gains"] if (r["place"], r["base"]) == (place, base)]
            rows = [row for row in rows if row["form"] != base]
            if {row["form"] for row in rows} - set(PANELS):
                panels[place, base] = sorted(rows, key=lambda row: -row["gain"])
    if not panels:
        return None
    heights = [0.9 + 0.24 * len(rows) for rows in panels.values()]
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(7, sum(heights)), layout="constrained")
        axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
        for ((place, base), rows), panel in zip(panels.items(), axes.flat, strict=True):
            draw_forms_at(panel, f"{place}, on top of {base}", rows)
    return figure


def draw_forms_at(panel, title, rows):
    """Gains with their errors; a form that loses more than any gains is named at the left."""
    from toy.common import BLACK, BLUE

    right = 1.3 * max(0.01, *(row["gain"] for row in rows))
    panel.axvline(0, color=BLUE)
    for i, row in enumerate(rows):
        if row["gain"] < -right:
            panel.text(-right, i, f" \u2190 {row['gain']:.3f}", va="center")
        panel.errorbar(row["gain"], i, xerr=row["gain_stderr"] or 0, color=BLACK, marker="o", ms=4)
    panel.set_yticks(range(len(rows)), [own_name(row) for row in rows])
    panel.locator_params(axis="x", nbins=6)
    panel.set(title=title, xlabel="gain over the tuned base, nats a token")
    panel.set(xlim=(-right, right), ylim=(len(rows) - 0.5, -0.5))


def own_name(row):
    """Of a form, without its base's."""
    return row["form"].replace(f" over {row['base']}", "")


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
