"""Evaluated checkpoints side by side: printed table, CSV file, and accuracy against size (the paper's Fig. 2).

A run is the dictionary that classification.py writes as JSON: nesting_list, and top1, top5, loss per size.
"""
import os

import pandas as pd
from matplotlib.figure import Figure

from mrl_files import replacing, write_json

KINDS = {"mrl": "MRL", "mrl_e": "MRL-E"}                # all fixed-feature models are one line, as in the paper


def tabulate(runs):
    """-> a data frame with one row per (model, size): model, size, top1, top5, loss, path, checkpoint."""
    rows = [{"model": KINDS.get(run["spec"]["head"], "FF"), "size": size,
             **{key: run[key][g] for key in ("top1", "top5", "loss")},
             "path": run["path"], "checkpoint": run["checkpoint"]}
            for run in runs for g, size in enumerate(run["nesting_list"])]
    table = pd.DataFrame(rows)
    several = table.model.isin(table.model[table.duplicated(["model", "size"])])      # of a kind: told by their path
    table.loc[several, "model"] += " " + table.path.map(shorten_paths(table.path.unique()))
    return table


def shorten_paths(paths):
    """-> {path: what tells it from the others}: without the folders that all share, and without final_weights.pt."""
    top = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    return {path: os.path.relpath(path, top).removesuffix("/final_weights.pt") for path in paths}


def show(runs):
    """Print top-1 per size and model in per cent; for a single checkpoint also top-5 and loss."""
    table = tabulate(runs)
    percent = table.assign(top1=100 * table.top1, top5=100 * table.top5)
    if len(runs) == 1:
        shown = percent.set_index("size")[["top1", "top5", "loss"]].set_axis(["top-1 %", "top-5 %", "loss"], axis=1)
    else:
        shown = percent.pivot(index="size", columns="model", values="top1")[list(percent.model.unique())]
    run = runs[0]
    print(f"{run['dataset']}: {run['n']} images, {run['num_classes']} classes, tta {run['tta']}"
          + (", top-1 %" if len(runs) > 1 else f", {run['model']}"))
    print(shown.to_string(float_format="{:.2f}".format, na_rep="-"))


def save(runs, text, picture, companion, about):
    """Write the table, its picture, and the JSON that says what they were made from."""
    table = tabulate(runs)
    with replacing(text) as new_text, replacing(picture) as new_picture:
        table.to_csv(new_text, index=False)
        plot(table, f"{runs[0]['dataset']}, top-1 accuracy").savefig(new_picture, dpi=150)
        write_json(companion, about)


def plot(table, title):
    """-> a figure: accuracy in per cent against representation size, one line per model."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for model, rows in table.groupby("model", sort=False):
        rows = rows.sort_values("size")
        axes.plot(rows["size"], 100 * rows.top1, marker="o", label=model)
    axes.set_xscale("log", base=2)
    sizes = sorted(table["size"].unique())
    axes.set_xticks(sizes, sizes)
    axes.set(xlabel="representation size", ylabel="top-1 accuracy (%)", title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure
