"""The paper's retrieval study on one data set: all sizes, the adaptive grid, the funnels -> a CSV and three pictures.

    table = report(Study(Task(dataset="1K", model="mrl")))      # -> report/1K_mrl_report.csv, _size.png ...

Reads embeddings through stages.py, which keeps every list it makes, so that an interrupted report goes on. Beside
ImageNet-1K and -4K results stand the paper's own (paper_curves.csv: tables 2, 8, 10-14 and figure 8).
"""
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from metrics import KS
from serving import check_shortlist
from stages import ensure_k_neighbors, ensure_neighbors, ensure_reranked, ensure_served, find_exact_neighbors, score
from study import PROJECTIONS

from mrl_files import InputError, replacing

PAPER = Path(__file__).with_name("paper_curves.csv")
IMAGENET_CLASSES = {"1K": 1000, "4K": 4202}
STYLES = [{"linestyle": "-", "marker": "o"}, {"linestyle": "--", "marker": "o", "fillstyle": "none"},
          {"linestyle": ":", "marker": "o", "fillstyle": "right"}, {"linestyle": "-.", "marker": "s"},
          {"linestyle": (0, (5, 1)), "marker": "s", "fillstyle": "none"}]                # one for each index
METHODS = {"single-shot": ("C0", "o", 6), "adaptive": ("C1", "D", 4), "adaptive float32": ("C3", "D", 4),
           "adaptive float16": ("C4", "D", 4), "adaptive sq8": ("C5", "D", 4), "funnel": ("C2", "*", 11)}
DRAWN = 10                  # the k of the pictures' mAP
MODEL_NAMES = {"mrl": "MRL", "mrl_e": "MRL-E", "ff": "FF"}
MODEL_NAMES |= {f"{model}_{method}": f"{method.upper()} of {name}" for model, name in MODEL_NAMES.items()
                for method in PROJECTIONS}
LONG, SHORT = (800, 400, 200, 50, 10), (200, 100, 50, 25, 10)
# The place of the first size among all sizes, and the lengths of the lists (tables 13 and 14).
FUNNELS = {"4K": [(2, LONG), (3, LONG)], "others": [(0, LONG), (1, SHORT), (2, SHORT)]}


def report(study, indexes=("exactl2",), sizes=None, shortlist=200, ks=KS, storages=()):
    """-> a table, one row for each way of retrieving; also written, with its pictures, to <output>/report/.

    sizes: None is all that inference noted. shortlist: of the adaptive grid. ks: of the metrics; 10 is always there.
    storages: the grid once more, by serving indexes that store so what they re-rank (rows of indexes.STORES).
    """
    ks, sizes = sorted({DRAWN, *ks}), choose_sizes(study, sizes)
    n = len(study.data(sizes[0]).xb)
    if n < DRAWN:
        raise InputError(f"the database has {n} vectors; a report judges the first {DRAWN} neighbours")
    shortlist = min(shortlist, n)
    if storages:
        check_shortlist(shortlist, n)
    k = max(shortlist, *(min(k, n) for k in ks))
    truth = ensure_exact_neighbors(study, k if "exactl2" in indexes else DRAWN)
    rows = [score(of_index, file, ks, truth) for of_index in map(study.with_index, indexes)
            for file in ensure_lists(of_index, sizes, k, shortlist, storages)]
    table, paper, task = pd.DataFrame(rows), select_paper(study), study.task
    write_table(table, report_file(task, "report.csv"))
    save(draw_sizes(table, paper, task), report_file(task, "size.png"))
    save(draw_costs(table, paper, study), report_file(task, "cost.png"))
    save(draw_memory(table, study), report_file(task, "memory.png"))
    return table


def report_file(task, ending):
    path = Path(task.output) / "report" / f"{task.dataset}_{task.model}_{ending}"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write_table(table, path):
    with replacing(path) as temporary:
        table.to_csv(temporary, index=False)


def ensure_exact_neighbors(study, k):
    """-> [q, 10] the exact neighbours at the full width, of a list of k or more; None for FF, whose sizes are different
    models."""
    if study.task.model != "ff":
        ensure_k_neighbors(study.with_index("exactl2"), study.data(max(study.sizes)).xb.shape[1], k)
    return find_exact_neighbors(study)


def ensure_lists(study, sizes, k, shortlist, storages):
    """Yield the files of all lists of the study. Those of a search are all of one length: times of others, which may
    be there, would not compare."""
    n = len(study.data(sizes[0]).xb)
    for size in sizes:
        yield ensure_neighbors(study, size, k)
    if study.task.model != "ff":
        for stages in list_stages(sizes, study.task.dataset, shortlist, n):
            yield ensure_reranked(study, *stages)
        for storage, (small, large) in product(storages, combinations(sizes, 2)):
            yield ensure_served(study, small, large, shortlist, storage)


def choose_sizes(study, sizes=None):
    """-> the sizes asked for, or all, the smallest first. One past the width is refused before any is searched."""
    sizes = sorted(set(sizes or study.sizes))
    study.data(sizes[-1])
    return sizes


def list_stages(sizes, dataset, shortlist, n):
    """-> (retrieval_dim, rerank_dims, shortlists) of the adaptive grid (tables 11, 12) and the funnels (13, 14)."""
    grid = [(small, (large,), (shortlist,)) for small, large in combinations(sizes, 2)]
    funnels = []
    for place, lengths in FUNNELS.get(dataset, FUNNELS["others"]):
        dims = tuple(dict.fromkeys([*sizes[place + 1:place + 5], sizes[-1]]))
        if len(dims) > 1 and place + 1 < len(sizes):
            funnels.append((sizes[place], dims, tuple(min(k, n) for k in lengths[-len(dims):])))
    return grid + funnels


def format_table(table):
    """-> the table as people read it: accuracies in per cent; other ks, and the spread of times, left to the CSV."""
    shown = [c for c in table.columns if c not in ("ms_low", "ms_high", "build_s")
             and ("@" not in c or c in ("mAP@10", "recall@10", "neighbors@10"))]
    fractions = {c: 100 * table[c] for c in shown if c == "top1" or "@" in c}
    formats = dict.fromkeys(fractions, "{:.2f}".format) | {
        "mflops": "{:.4g}".format, "bytes_per_vector": "{:.0f}".format, "queries_per_s": "{:,.0f}".format,
        "ms_per_query": "{:.3f}".format}
    return table.assign(**fractions)[shown].to_string(index=False, na_rep="", formatters=formats)


# ------------------------------------------------------------------------------------------------ pictures

def select_paper(study):
    """-> the paper's rows for this data set and model; none where the labels are not ImageNet-1K's or -4K's classes."""
    paper = pd.read_csv(PAPER, dtype={"rerank_dims": str}, keep_default_na=False, na_values={"top1": "", "mAP@10": ""})
    task, (yb, _) = study.task, study.labels(study.data(min(study.sizes)))
    its_own = len(np.unique(yb)) == IMAGENET_CLASSES.get(task.dataset)
    return paper[(paper.dataset == task.dataset) & (paper.model == task.model) & its_own]


def draw_sizes(table, paper, task):
    """mAP@10 against representation size (figure 7)."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for (index, rows), style in zip(table[table.method == "single-shot"].groupby("index"), STYLES, strict=False):
        axes.plot(rows.retrieval_dim, 100 * rows["mAP@10"], label=f"{MODEL_NAMES[task.model]}, {index}", **style)
    theirs = paper[paper.rerank_dims == ""]
    if len(theirs):
        axes.plot(theirs.retrieval_dim, 100 * theirs["mAP@10"], "x:", color="black", label="the paper's")
    sizes = sorted({*table.retrieval_dim, *theirs.retrieval_dim})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set(xlabel="representation size", ylabel="mAP@10 (%)", title=f"{task.dataset}: single-shot retrieval")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure


def draw_costs(table, paper, study):
    """mAP@10 against MFLOPs and against measured milliseconds for one query (figure 8)."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    both = figure.subplots(1, 2, sharey=True)
    for axes, cost in zip(both, ("mflops", "ms_per_query"), strict=True):
        for (index, rows), style in zip(table.groupby("index"), STYLES, strict=False):
            draw_methods(axes, rows, cost, index, style)
        scale_costs(axes)
    if len(paper):
        both[0].plot(paper.mflops, 100 * paper["mAP@10"], "x", color="black", label="the paper's")
    both[0].set(xlabel="MFLOPs per query, if all vectors are compared", ylabel="mAP@10 (%)")
    both[1].set(xlabel="milliseconds for one query, measured")
    both[0].legend(loc="lower right")
    widen_y_axis(both[0])
    task, n = study.task, len(study.data(min(study.sizes)).xb)
    figure.suptitle(f"{task.dataset}, {MODEL_NAMES[task.model]}, {n:,} database vectors: "
                    "single-shot (with its sizes), adaptive, funnel")
    return figure


def draw_memory(table, study):
    """mAP@10, and the share of the exact neighbours, against bytes a vector."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    both = figure.subplots(1, 2)
    columns = [column for column in ("mAP@10", "neighbors@10") if column in table]
    for axes, column in zip(both, columns, strict=False):
        for (index, rows), style in zip(table.groupby("index"), STYLES, strict=False):
            draw_methods(axes, rows, "bytes_per_vector", index, style, column)
        scale_costs(axes)
        axes.set(xlabel="bytes a vector: the index, and the numbers that are re-ranked", ylabel=f"{column} (%)")
    both[0].legend(loc="lower right")
    widen_y_axis(both[0])
    figure.suptitle(f"{study.task.dataset}, {MODEL_NAMES[study.task.model]}: memory; "
                    "neighbors@10: of the 10 nearest at the full width, those found")
    return figure


def scale_costs(axes):
    """Logarithmic, with plain numbers at 1, 2, 5, 10 ..., or, over a thousandfold and more, at 1, 10 ..."""
    axes.set_xscale("log")
    low, high = axes.dataLim.intervalx
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.08)
    axes.grid(alpha=0.3)


def widen_y_axis(axes, points=5):
    """Widen the y axis to at least `points` percentage points, so that small differences do not look large."""
    low, high = axes.get_ylim()
    more = max(0, points - (high - low)) / 2
    axes.set_ylim(low - more, high + more)


def draw_methods(axes, table, cost, index, style, column="mAP@10"):
    for method, (color, marker, size) in METHODS.items():
        rows = table[table.method == method]
        line = style["linestyle"] if method == "single-shot" else "none"
        axes.plot(rows[cost], 100 * rows[column], color=color, label=f"{method}, {index}" if len(rows) else None,
                  **style | {"linestyle": line, "marker": marker, "markersize": size})
    for row in table[table.method == "single-shot"].itertuples():
        axes.annotate(row.retrieval_dim, (getattr(row, cost), 100 * table.loc[row.Index, column]), fontsize=7,
                      xytext=(4, -9), textcoords="offset points")


def save(figure, path):
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130)
