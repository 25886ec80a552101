"""What the book computes while Sphinx builds it: ire.py's docstrings as reStructuredText, results/*.json as tables."""
import json
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
MISSING = "Not measured yet.\n"


def rst(docstring):
    """ire.py's docstrings are plain text: `code`, `name: what it is` with indented lines, indented examples."""
    lines, example = [], False
    for line in docstring:
        indented = line.startswith("    ")
        if indented and lines and not lines[-1]:
            lines += [".. code-block:: python", ""]
            example = True
        example = example and (indented or not line)
        if not example:
            line = re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", line)
            term = re.match(r"([a-z_]+(?:, [a-z_]+)*): (.*)", line)
            if line.startswith("Raises "):
                lines.append("")
            lines += ["``" + term[1].replace(", ", "``, ``") + "``", "    " + term[2]] if term else [line]
        else:
            lines.append(line)
    return lines


def load(name, folder=None):
    path = (folder or ROOT / "results") / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def cell(value):
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e3 else f"{value:,.0f}"
    if isinstance(value, list):
        return " to ".join(map(cell, value))
    return "" if value is None else str(value)


def table(rows):
    """Markdown of flat dicts; nested values are left out."""
    names = list(dict.fromkeys(n for row in rows for n, value in row.items() if not isinstance(value, dict)))
    text = [names, ["---"] * len(names), *([cell(row.get(n)) for n in names] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in text)


def source(report):
    """The command and where it ran."""
    where = report.get("environment") or {k: report[k] for k in ("hardware", "torch", "commit") if k in report}
    where = ", ".join(f"{name} {value}" for name, value in where.items())
    where = re.sub(r"\b([0-9a-f]{12})[0-9a-f]{28}\b", r"\1", where)
    return f"`{report['command']}`<br>{where}\n" if "command" in report else ""


def folded(title, text):
    return f"````{{dropdown}} {title}\n{text}````\n"


def compare(folder):
    runs = [report for seed in range(100) if (report := load(f"compare-tiny-{seed}", folder))]
    if not runs:
        return MISSING
    rows = [{"seed": run["adamw"]["seed"], "AdamW": f"{run['adamw']['val_loss']:.4f}",
             "AdmIRE": f"{run['admire']['val_loss']:.4f}",
             "difference": f"{run['admire']['val_loss'] - run['adamw']['val_loss']:+.4f}",
             "step at which AdmIRE was at AdamW's final loss": f"{run['reached_at_step'] or 'never'}"} for run in runs]
    settings = [{k: v for k, v in runs[0][name].items() if k not in ("val_loss", "seconds", "tokens_per_second", "seed")}
                for name in ("adamw", "admire")]
    if len(runs) > 1:
        gaps = [run["admire"]["val_loss"] - run["adamw"]["val_loss"] for run in runs]
        error = statistics.stdev(gaps) / len(gaps) ** 0.5
        rows.append({"seed": "mean", "difference": f"{statistics.mean(gaps):+.4f} ± {error:.4f}"})
    return f"{table(rows)}\n{table(settings)}\n" + "\n".join(map(source, runs))


def sweep(folder):
    report = load("sweep-tiny", folder)
    if not report:
        return MISSING
    runs = sorted(report["runs"], key=lambda run: run["val_loss"])
    best = {}
    for run in runs:
        best.setdefault((run["optimizer"], run["warmup"]), run)
    rows = [best[key] for key in sorted(best)]
    rows = [{**row, "val_loss": f"{row['val_loss']:.4f}"} for row in rows]
    every = table([{**run, "val_loss": f"{run['val_loss']:.4f}"} for run in runs])
    return f"{table(rows)}\n{source(report)}\n{folded(f'All {len(runs)} trials', every)}"


def step(folder):
    report = load("step-cpu", folder)
    if not report:
        return MISSING
    text = source(report)
    for size, measured in report["sizes"].items():
        rows = [{"": name, "ms": row["ms"], "quartiles": row["quartiles_ms"], "times fused AdamW": row["over_fused_adamw"],
                 "extra bytes a parameter": row["extra_bytes_per_parameter"]} for name, row in measured["rows"].items()]
        text += "\n" + (table(rows) if size == [*report["sizes"]][-1] else folded(f"{size} parameters", table(rows)))
    return text


def train(folder):
    report = load("train-cpu", folder)
    if not report:
        return MISSING
    rows = [{"": name, "tokens a second": row["tokens_per_second"], "of AdamW": row["of_adamw"], "quartiles": row["quartiles"]}
            for name, row in report["rows"].items()]
    return f"{table(rows)}\n{source(report)}"


def figure(name, folder, what):
    return f"![{what}](../results/{name}.png)\n\n" if ((folder or ROOT / "results") / f"{name}.png").exists() else ""


def speedup(folder, row="tiny"):
    report = load(f"speedup-{row}", folder)
    if not report:
        return MISSING
    from speedup import table as summary
    names = ("optimizer", "ablation", "lr", "warmup_fraction", "beta2", "weight_decay", "ratio", "kappa", "gamma", "interval",
             "curvature", "seed", "steps")
    runs = [{**{n: run[n] for n in names}, "val_loss": f"{run['val_loss']:.4f}"} for run in report["runs"]]
    return (figure(f"speedup-{row}", folder, "Loss against the length of the schedule, and the ablations")
            + f"{summary(report)}\n\n{source(report)}\n{folded(f'All {len(runs)} runs', table(runs))}")


def speedup_nano(folder):
    return speedup(folder, "nano")


def cifar(folder):
    report = load("cifar-jpeg", folder)
    if not report:
        return MISSING
    def row(name, settings, values, sign=""):
        digits = {"test_acc": 2, "train_loss": 4, "trace": 1}
        return {"": name, "settings": ", ".join(f"{k} {v:g}" for k, v in settings.items())} | {
            what: f"{values[key][0]:{sign}.{digits[key]}f} ± {values[key][1]:.{digits[key]}f}" for key, what in
            {"test_acc": "test accuracy, %", "train_loss": "training loss", "trace": "Tr(H)"}.items()}
    rows = [row(name, r["settings"], r) for name, r in report["table"].items()]
    rows += [row(f"{name} less {name.removesuffix('-ire')}, seed by seed", {}, r["less_base"], "+")
             for name, r in report["table"].items() if "less_base" in r]
    names = ("optimizer", "settings", "seed", "val_acc", "test_acc", "train_loss", "trace")
    runs = [{n: run.get(n) for n in names} | {"settings": ", ".join(f"{k} {v:g}" for k, v in run["settings"].items())}
            for run in report["runs"]]
    what = ", ".join(f"{k} {v}" for k, v in report["settings"].items())
    return (figure("cifar-jpeg", folder, "Test accuracy and Tr(H) of SGD, SAM and both with IRE")
            + f"{table(rows)}\n{report['pictures']}; {what}; mean ± standard error.\n\n{source(report)}\n"
            + folded(f"All {len(runs)} runs", table(runs)))


def cifar_speed(folder):
    report = load("cifar-speed-cpu", folder)
    if not report:
        return MISSING
    rows = [{"": name, "images a second": row["images_per_second"], "share of the loader": row["loader_share"]}
            for name, row in report["rows"].items()]
    low, high = report["quartiles"]
    return f"{table(rows)}\nRatio {report['ours_of_plain']:.3f}, quartiles {low:.3f} to {high:.3f}.\n\n{source(report)}"


def results(text, folder=None):
    """The page with each `{{ name }}` replaced by what the function `name` says."""
    text = re.sub(r"{{ (\w+) }}", lambda found: globals()[found[1]](folder), text)
    return text.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")


def setup(app):
    def on_docstring(app, what, name, obj, options, lines):
        lines[:] = rst(lines)

    def on_read(app, docname, text):
        if docname == "book/results":
            text[0] = results(text[0])

    def on_page(app, name, template, context, doctree):
        """Thebe, which no button of this book starts, defines its constants twice: an error on each page."""
        context["script_files"] = [x for x in context["script_files"] if "thebe" not in f"{x} {vars(x)}".lower()]

    app.connect("html-page-context", on_page)
    app.connect("autodoc-process-docstring", on_docstring)
    app.connect("source-read", on_read)
    app.connect("env-before-read-docs", lambda app, env, names: names.append("book/results")
                if "book/results" not in names else None)
    return {"parallel_read_safe": True}
