"""The study's tables as Markdown, the paper's figures beside ours, and a picture; docs/results.md shows both.

    python study_tables.py study_600                           prints them
    python study_tables.py study_600 --page docs/results.md    also puts them under the page's headings of their titles

Reads what study.sh has left in the folder so far; what is not there yet is "not run". Draws study.png in it. The
paper's figures (paper_tables.csv, retrieval/paper_curves.csv) are for ImageNet-1K and a ResNet50 of 2,048 numbers.
"""
import argparse
import re
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from pictures import accuracies

from mrl_files import command_line, file_path, read_json

HERE = Path(__file__).resolve().parent
NOTHING = pd.DataFrame(columns=["expected size", "top-1"], dtype=float)      # of cascades
SEARCHED = {"FF": "ff", "MRL": "mrl", "MRL-E": "mrl_e", "SVD": "ff_svd", "JL": "ff_jl", "Rand. FS": "rand_fs",
            "Slim. Net": "slim"}      # names in retrieval/'s files
NOT_OURS = ("Rand. FS", "Slim. Net")
STYLES = {"FF": "ks", "MRL": "C0o-", "MRL-E": "C1^-", "SVD": "C2v:", "Rand. LP": "C3x:"}


# ------------------------------------------------------------------------------------------------ read

def by_size(paths):
    """-> a series: top-1 in per cent by size, of JSON files of inference/."""
    pairs = [pair for result in map(read_json, paths)
             for pair in zip(result.get("sizes") or result["nesting_list"], result["top1"], strict=True)]
    return 100 * pd.Series(dict(pairs), dtype=float)


def top1(folder, *runs):
    return by_size(path for run in runs for path in folder.glob(f"figures/{run}/*_accuracy_*.json"))


def baseline(folder, command):
    return by_size(folder.glob(f"arrays/{command}_dataset=1K_model=mrl0_e0_ff1024.json"))


def paper(table):
    """-> a data frame: rows = sizes, columns = methods of one of the paper's tables, per cent."""
    rows = pd.read_csv(HERE / "paper_tables.csv", dtype={"table": str})
    return rows[rows.table == table].pivot(index="size", columns="method", values="percent")


def retrieval(folder, model):
    """-> a data frame: a row for each way of retrieving; the paper's where folder is None."""
    path = folder / f"report/1K_{model}_report.csv" if folder else HERE.parent / "retrieval/paper_curves.csv"
    if not path.exists():
        return pd.DataFrame(columns=["retrieval_dim", "rerank_dims", "mflops", "top1", "mAP@10"], dtype=str)
    rows = pd.read_csv(path, dtype={"rerank_dims": str}).fillna({"rerank_dims": ""})
    return rows if folder else rows[(rows.dataset == "1K") & (rows.model == model)]


def single_shot(rows, column):
    return 100 * rows[rows.rerank_dims == ""].set_index("retrieval_dim")[column].astype(float)


# ------------------------------------------------------------------------------------------------ tables

def beside(theirs, ours):
    """{method: series by size}, twice -> a data frame: a column for each method of the paper, and for each of ours."""
    return pd.DataFrame({f"{method}, {whose}": columns[method] for method in {**theirs, **ours}
                         for whose, columns in (("paper", theirs), ("here", ours)) if method in columns}).sort_index()


def accuracy(folder):
    return {"Rand. LP": baseline(folder, "lp"), "SVD": baseline(folder, "svd"),
            "FF": top1(folder, *(f"ff{8 << i}" for i in range(8))), "MRL": top1(folder, "mrl"),
            "MRL-E": top1(folder, "mrl_e")}


def search(folder, column):
    theirs, ours = ({name: single_shot(retrieval(whose, model), column) for name, model in SEARCHED.items()}
                    for whose in (None, folder / "retrieval"))
    return beside({name: rows for name, rows in theirs.items() if len(rows)},
                  {name: rows for name, rows in ours.items() if name not in NOT_OURS})


def adaptive(rows):
    """mAP@10: a row for each size of the search, a column for each size of the re-ranking."""
    rows = rows[rows.rerank_dims.str.fullmatch("[0-9]+")]
    rows = rows.assign(D_r=rows.rerank_dims.astype(int), percent=100 * rows["mAP@10"].astype(float))
    return rows.pivot(index="retrieval_dim", columns="D_r", values="percent")


def funnels(rows):
    """Exact search at the full width, and the funnels."""
    rows = rows[rows.rerank_dims.str.contains(",") | (rows.retrieval_dim == rows.retrieval_dim.max())]
    mflops = rows.mflops.astype(float)
    return pd.DataFrame({"then": rows.rerank_dims.str.replace(",", ", "), "MFLOPs, %": 100 * mflops / mflops.max(),
                         "mAP@10": 100 * rows["mAP@10"].astype(float)}).set_axis(rows.retrieval_dim)


def cascades(folder):
    """The mean over several draws of the images that the thresholds are tuned on."""
    draws = [pd.read_csv(path, sep=r"\s+", skiprows=2, names=["size", "top-1", "expected size", "asked"])
             for path in folder.glob("outputs/cascade*.txt")]
    return beside(paper("3"), pd.concat(draws).groupby("size").mean() if draws else NOTHING)[
        [f"{what}, {whose}" for what in ("expected size", "top-1") for whose in ("paper", "here")]]


def seeds(folder):
    """Least, mean and largest of the seeds that were run."""
    tables = {name: pd.DataFrame([top1(folder, run + seed) for seed in ("", "_seed1", "_seed2")]).dropna()
              for name, run in (("FF", "ff8"), ("MRL", "mrl"))}
    return pd.DataFrame({f"{name}, {what} of {len(rows)}": getattr(rows, what)()
                         for name, rows in tables.items() for what in ("min", "mean", "max")})


def variants(folder, table, **runs):
    """Runs of ours, run="name", beside a table of the paper; plain MRL first."""
    return beside({"MRL": paper("1")["MRL"], **paper(table)},
                  {"MRL": top1(folder, "mrl"), **{name: top1(folder, run) for run, name in runs.items()}})


def robustness(folder):
    path = folder / "figures_odd"
    return 100 * accuracies(path) if path.exists() else pd.DataFrame()


def oracle(folder):
    """The largest size alone, and the share of images that some size gets right."""
    here = None
    for path in folder.glob("outputs/mrl=True*_predictions.pth"):
        right = torch.load(path) == torch.load(folder / "outputs/gt_dataset=V1.pth")      # [G, N]
        here = [100 * of.double().mean().item() for of in (right[-1], right.any(0))]
    return pd.DataFrame({"paper": [76.80, 81.54], "here": here}, index=["the largest size", "the oracle"])


def few_shot(folder):
    """A column for each number of shots, of FF (a model for each size) and of MRL."""
    columns = {}
    for name, model in (("FF", "mrl0_e0_ff*"), ("MRL", "mrl1_e0_ff*")):
        for result in map(read_json, folder.glob(f"arrays/ncm_dataset=1K_model={model}.json")):
            for shots, top1 in zip(result["shots"], result["top1"], strict=True):
                columns.setdefault(f"{name}, {shots}-shot", {}).update(zip(result["sizes"], top1, strict=True))
    return 100 * pd.DataFrame(columns, dtype=float).sort_index()


# ------------------------------------------------------------------------------------------------ show

def list_tables(folder):
    """-> {title: data frame}"""
    ours = retrieval(folder / "retrieval", "mrl")
    theirs = retrieval(None, "mrl")
    return {
        "Top-1 (Table 1)": beside(paper("1"), accuracy(folder)),
        "Seeds": seeds(folder),
        "1-NN (Table 2)": search(folder, "top1"),
        "mAP@10 of exact search (Table 8)": search(folder, "mAP@10"),
        "1-NN at sizes never trained on (Fig. 5)": beside(
            paper("Fig. 5"), {"MRL": single_shot(retrieval(folder / "between", "mrl"), "top1")}),
        "Adaptive retrieval, paper (Table 11)": adaptive(theirs), "Adaptive retrieval, here": adaptive(ours),
        "Funnels, paper (Table 13)": funnels(theirs), "Funnels, here": funnels(ours),
        "Cascades (Table 3)": cascades(folder),
        "Fine-tuning FF into MRL (Table 26)": variants(
            folder, "26", tune_fc="fc", tune_conv5="fc, half of the last block", tune_stage4="fc, the last block"),
        "Loss weights (Table 27)": variants(folder, "27", boost8="MRL-8boost", boost8_16="MRL-8+16boost"),
        "Nesting from 4 (Table 28)": variants(folder, "28", start4="from 4"),
        "Few-shot, nearest class mean (Table 15)": few_shot(folder),
        "Odd typefaces": robustness(folder),
        "Oracle": oracle(folder)}


def markdown(table):
    """A column without a number is "not run"."""
    if table.empty:
        return "not run"
    shown = table.astype(object).map(lambda x: x if isinstance(x, str) else "–" if pd.isna(x) else f"{x:.2f}")
    shown.loc[:, table.isna().all()] = "not run"
    rows = [["d", *shown.columns], ["---"] * (1 + len(shown.columns)), *shown.reset_index().to_numpy()]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def fill(page, tables):
    """-> the page, the table under each heading that is a title replaced."""
    for title, table in tables.items():
        page = re.sub(rf"(?<=# {re.escape(title)}\n\n)(not run\n|(\|.*\n)+)", markdown(table) + "\n", page)
    return page


def plot(theirs, ours):
    """Top-1 against size: the paper's figure 2, and ours."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, columns, title in zip(figure.subplots(1, 2), (theirs, ours), (
            "the paper: ImageNet-1K, ResNet50", "here: printed characters, a small ShuffleNet"), strict=True):
        for name, style in STYLES.items():
            column = columns[name].dropna()
            if len(column):
                axes.plot(column.index, column, style, label=name, fillstyle="none",
                          markersize=8 if name == "FF" else 5)
        axes.set_xscale("log", base=2)
        axes.set_xticks(columns["MRL"].dropna().index, columns["MRL"].dropna().index)
        axes.set(xlabel="representation size", ylabel="top-1 (%)", ylim=(0, 100), title=title)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(loc="lower right", fontsize=8)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=file_path, help="what study.sh makes")
    parser.add_argument("--page", type=file_path, help="a Markdown page that holds the tables")
    args = parser.parse_args()
    folder = Path(args.folder)
    tables = list_tables(folder)
    for title, table in tables.items():
        print(f"## {title}\n\n{markdown(table)}\n")
    plot(paper("1"), accuracy(folder)).savefig(folder / "study.png", dpi=130)
    if args.page:
        page = Path(args.page)
        page.write_text(fill(page.read_text(encoding="utf-8"), tables), encoding="utf-8")


if __name__ == "__main__":
    command_line(main)
