"""The demo's table and pictures, from the files that inference/ and retrieval/ left.

    python pictures.py demo_out

Reads figures/accuracy_dataset=V1_tta=False.csv, 1K_mrl_report.csv, arrays/1K_*-X.npy and images/; writes table.csv,
accuracy.png and neighbours.png.
"""
import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from PIL import Image

from mrl_files import command_line, file_path

MODEL = "mrl1_e0_ff512"
SHOWN = (2, 4, 8, 64)      # sizes in the picture of neighbours
QUERIES, NEIGHBOURS = 8, 4
GAP = 0.3                  # before the neighbours of a size, in images


def accuracies(folder):
    """-> a data frame: rows = sizes, columns = top-1 of FF, MRL, MRL-E, and of MRL's nearest neighbour; fractions."""
    top1 = pd.read_csv(folder / "figures/accuracy_dataset=V1_tta=False.csv")
    table = top1.pivot(index="size", columns="model", values="top1")[["FF", "MRL", "MRL-E"]]
    report = pd.read_csv(folder / "1K_mrl_report.csv").query("method == 'single-shot'")
    return table.join(report.set_index("retrieval_dim").top1.rename("MRL 1-NN"))


def plot(table):
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, style in zip(table, ("ks", "o-", "^-", "v--"), strict=True):
        ring = {"markersize": 12, "fillstyle": "none", "zorder": 3} if name == "FF" else {}      # the others lie inside
        axes.plot(table[name].dropna() * 100, style, label=name, **ring)
    axes.set_xscale("log", base=2)
    axes.set_xticks(table.index)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set(xlabel="representation size", ylabel="accuracy (%)", title="1,000 digits, never seen in training")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def neighbours(folder):
    """Some queries, and under each size their nearest database images; a red frame where the digit differs."""
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
    """Queries that the smallest size gets wrong and the largest right, one of each digit first."""
    small, large = (yb[nearest(xb, xq, size)[:, 0]] == yq for size in (SHOWN[0], SHOWN[-1]))
    candidates = np.flatnonzero(~small & large)
    _, first = np.unique(yq[candidates], return_index=True)
    order = np.concatenate([candidates[first], np.delete(candidates, first), np.arange(len(yq))])
    return order[:QUERIES]


def nearest(xb, xq, size):
    """-> [q, n] database rows by distance on unit-normalised prefixes; a prefix of zeros stays zero."""
    xb, xq = (x[:, :size] / np.maximum(np.linalg.norm(x[:, :size], axis=1, keepdims=True), 1e-12) for x in (xb, xq))
    return np.argsort(-xq @ xb.T, axis=1)


def draw(axes, path, colour):
    axes.imshow(Image.open(path))
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=2)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=file_path, help="what demo.sh made")
    folder = Path(parser.parse_args().folder)
    table = accuracies(folder)
    table.to_csv(folder / "table.csv", float_format="%.4f")
    plot(table).savefig(folder / "accuracy.png", dpi=150)
    neighbours(folder).savefig(folder / "neighbours.png", dpi=150)
    print("accuracy in per cent; FF is one model per size, MRL and MRL-E are one model each")
    print((100 * table).to_string(float_format="{:.1f}".format, na_rep="-"))
    print(f"\nwritten to {folder}: table.csv, accuracy.png, neighbours.png")


if __name__ == "__main__":
    command_line(main)
