"""The demo's tables and pictures, from the files that inference/ and retrieval/ left.

    python pictures.py demo_out

Reads figures/ and figures_odd/accuracy_dataset=V1_tta=False.csv, 1K_mrl_report.csv, arrays/1K_*-X.npy and images/;
writes table.csv, table_odd.csv, accuracy.png and neighbours.png.
"""
import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from mrl_files import command_line, file_path

MODEL = "mrl1_e0_ff256"
SHOWN = (4, 8, 16, 64)      # sizes in the picture of neighbours
QUERIES, NEIGHBOURS = 8, 4
GAP = 0.3                   # before the neighbours of a size, in images
STYLES = {"FF": "ks", "MRL": "C0o-", "MRL-E": "C1^-", "MRL 1-NN": "C2v--"}


def accuracies(folder):
    """-> a data frame: rows = sizes, columns = top-1 of FF, MRL and MRL-E; fractions."""
    top1 = pd.read_csv(folder / "accuracy_dataset=V1_tta=False.csv")
    return top1.pivot(index="size", columns="model", values="top1")[["FF", "MRL", "MRL-E"]]


def nearest_neighbour(folder):
    """-> top-1 by size of the nearest neighbour on MRL's embeddings; fractions."""
    report = pd.read_csv(folder / "1K_mrl_report.csv")
    return report[report.method == "single-shot"].set_index("retrieval_dim").top1.rename("MRL 1-NN")


def plot(ordinary, odd):
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, column in ordinary.items():
        ring = {"markersize": 10, "fillstyle": "none", "zorder": 3} if name == "FF" else {}      # the others lie inside
        axes.plot(column.dropna() * 100, STYLES[name], label=name, **ring)
    axes.plot(odd["MRL"] * 100, "C0o:", fillstyle="none", label="MRL, brush, pixel and display typefaces")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ordinary.index, ordinary.index)
    axes.set(xlabel="representation size", ylabel="accuracy (%)", ylim=(0, 100),
             title="printed characters in typefaces never seen in training")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=9)
    return figure


def neighbours(folder):
    """Some queries, and under each size their nearest database images; a red frame where the character differs."""
    (xb, yb), (xq, yq) = (read(folder, split) for split in ("train", "val"))
    database, query_images = (images(folder, split) for split in ("train", "val"))
    queries = hardest(xb, xq, yb, yq)
    widths = [1] + [GAP, *[1] * NEIGHBOURS] * len(SHOWN)
    figure = Figure(figsize=(sum(widths) * 0.58, QUERIES * 0.62))
    first, *others = figure.subplots(QUERIES, len(widths), width_ratios=widths).T         # columns of axes
    for axes, query in zip(first, queries, strict=True):
        draw(axes, query_images[query], "black")
    first[0].set_title("query", fontsize=9)
    for s, size in enumerate(SHOWN):
        gap, *columns = others[s * (1 + NEIGHBOURS):(s + 1) * (1 + NEIGHBOURS)]
        for axes in gap:
            axes.set_axis_off()
        columns[0][0].set_title(f"size {size}", fontsize=9, loc="left")
        for column, found in zip(columns, nearest(xb, xq[queries], size)[:, :NEIGHBOURS].T, strict=True):
            for axes, row, query in zip(column, found, queries, strict=True):
                draw(axes, database[row], "green" if yb[row] == yq[query] else "red")
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.94, 0.08, 0.08)
    return figure


def read(folder, split):
    stem = f"{folder}/arrays/1K_{split}_{MODEL}"
    return np.load(f"{stem}-X.npy", mmap_mode="r"), np.load(f"{stem}-y.npy")


def images(folder, split):
    """Paths in the order of the arrays: that of torchvision's ImageFolder."""
    return sorted((folder / "images" / split).glob("*/*.png"))


def hardest(xb, xq, yb, yq):
    """Queries of different characters that the smallest size gets wrong and the largest right, evenly spread."""
    small, large = (yb[nearest(xb, xq, size)[:, 0]] == yq for size in (SHOWN[0], SHOWN[-1]))
    candidates = np.flatnonzero(~small & large)
    _, first = np.unique(yq[candidates], return_index=True)
    return candidates[first[np.linspace(0, len(first) - 1, QUERIES).round().astype(int)]]


def nearest(xb, xq, size):
    """-> [q, n] database rows by distance on unit-normalised prefixes; a prefix of zeros stays zero."""
    xb, xq = (x[:, :size] / np.maximum(np.linalg.norm(x[:, :size], axis=1, keepdims=True), 1e-12) for x in (xb, xq))
    return np.argsort(-xq @ xb.T, axis=1)


def draw(axes, path, colour):
    axes.imshow(Image.open(path), cmap="gray", vmin=0, vmax=255)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=2)


def show(title, table):
    print(f"{title}\n{(100 * table).to_string(float_format='{:.1f}'.format, na_rep='-')}\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=file_path, help="what demo.sh made")
    folder = Path(parser.parse_args().folder)
    ordinary, odd = accuracies(folder / "figures"), accuracies(folder / "figures_odd")
    ordinary = ordinary.join(nearest_neighbour(folder))
    ordinary.to_csv(folder / "table.csv", float_format="%.4f")
    odd.to_csv(folder / "table_odd.csv", float_format="%.4f")
    plot(ordinary, odd).savefig(folder / "accuracy.png", dpi=150)
    neighbours(folder).savefig(folder / "neighbours.png", dpi=150)
    print("accuracy in per cent; FF is one model per size, MRL and MRL-E are one model each\n")
    show("typefaces never seen in training", ordinary)
    show("brush, pixel, display and handwritten typefaces", odd)


if __name__ == "__main__":
    command_line(main)
