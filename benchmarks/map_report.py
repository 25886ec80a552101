"""What benchmarks/map.py computes from its runs is shown here: a table and the map itself."""

import numpy as np
from study import number

import train_gpt

MISSING = "not measured yet"
# The panels: forms above, what they are held against below.
PANELS = (
    "hard mask over AdamW",
    "hard mask over Muon",
    "soft factor over Muon",
    "random mask over AdamW",
    "random mask over Muon",
)
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
            f"{row['lr']:g}",
            f"{row['warmup_fraction']:g}",
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


# --------------------------------------------------------------------------- figure
def draw(report, path):
    """A panel for each form: the gain as colour and number over the batch and the length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from toy.common import STYLE

    places = {n: p for n, p in report["places"].items() if p["model"] == "nano"}
    batches = sorted({p["batch"] for p in places.values()})
    lengths = sorted({p["steps"] for p in places.values()})
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 3, figsize=(10.5, 6.4), layout="constrained")
        for form, panel in zip(PANELS, axes.flat, strict=False):
            rows = {row["place"]: row for row in report["gains"] if row["form"] == form}
            cells = {(p["batch"], p["steps"]): rows.get(name) for name, p in places.items()}
            image = draw_panel(panel, form, cells, batches, lengths)
        draw_key(axes[1, 2], image)
        train_gpt.write_atomically(path, lambda f: figure.savefig(f, format="png"))
        plt.close(figure)


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


def draw_key(panel, image):
    panel.axis("off")
    text = (
        "The nano model. Gain: loss of the tuned base\nminus that of the form, in nats a token; "
        "blue is\nbetter than the base. ± is a standard error\nover seeds that took no part in the "
        "tuning.\nThe random masks have the settings of the hard\nmasks above them."
    )
    panel.text(0, 0.95, text, va="top", transform=panel.transAxes)
    bar = panel.inset_axes([0, 0.25, 0.9, 0.08])
    panel.figure.colorbar(image, cax=bar, orientation="horizontal", extend="both", label="gain")
