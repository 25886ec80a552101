"""What benchmarks/map.py computes from its runs is shown here: a table and the map itself."""

from functools import partial

import numpy as np
from study import number

import train_gpt

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
COLOURS = 0.1  # the gain at which colours end


# --------------------------------------------------------------------------- table
def saved(row):
    """Share of the base's steps, in per cent."""
    if row["steps_saved"] is None:
        return MISSING
    error = row["steps_saved_stderr"]
    text = f"{100 * row['steps_saved']:.0f}%"
    if error is not None:
        text += f" ± {100 * error:.0f}%"
    return f"{text}, extrapolated" if row["extrapolated_on"] else text


def setting(row, name):
    edge = " (edge)" if name in row["at_edge"] else ""
    return f"{row[name]:g}{edge}"


def table(report):
    """Markdown: every form at every place that was judged, then what is missing."""
    heads = ("place", "form", "trials", "lr", "warm-up", "seeds", "loss", "gain", "steps saved")
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in report["gains"]:
        base = row["form"] == row["base"]
        cells = (
            row["place"],
            row["form"],
            row["trials"] or "borrowed",
            setting(row, "lr"),
            setting(row, "warmup_fraction"),
            len(row["seeds"]),
            number(row["loss"], row["loss_stderr"]),
            "" if base else number(row["gain"], row["gain_stderr"], "+"),
            "" if base else saved(row),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines + list(missing(report)))


def missing(report):
    """What the plan asks for and has not got, a line for each place."""
    judged = {(row["place"], row["form"]) for row in report["gains"]}
    left = {}
    for place, names in report["plan"]:
        left.setdefault(place, []).extend(name for name in names if (place, name) not in judged)
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
    """The map at `path`, the other forms beside it, where any was judged."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figures = {path: the_map(report), path.with_stem(f"{path.stem}-forms"): the_forms(report)}
    for name, figure in figures.items():
        if figure:
            train_gpt.write_atomically(name, partial(figure.savefig, format="png"))
            plt.close(figure)


def the_map(report):
    """A panel for each form: the gain as colour and number over the batch and the length."""
    import matplotlib.pyplot as plt

    from toy.common import STYLE

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
        for base in ("AdamW", "Muon"):
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
            draw_forms_at(panel, f"{place} over {base}", rows)
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
