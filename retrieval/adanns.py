"""The study of AdANNS (arXiv 2305.19435): a database in clusters made at one size of its representation and searched at
another; product quantisers on prefixes; both against exact search.

    table = run(Study(Task(dataset="1K", model="mrl")))       # -> report/1K_mrl_adanns.json, .md, _compute.png ...

Where fixed features lie beside the embeddings (a model for each size: the paper's rigid representations), their rows
stand beside. The paper's names: IVF-MR (`IVF` of MRL), AdANNS-IVF, IVF-RR (`IVF` of FF), MG-IVF-RR (`MG-IVF` of FF).
The JSON keeps the rows of each index as they are made, so that an interrupted study goes on.
"""
import sys
from functools import lru_cache, partial
from itertools import product

import numpy as np
import pandas as pd
from faiss.contrib.ivf_tools import add_preassigned, search_preassigned
from faiss_kernels import faiss
from indexes import Kind, build, choose_clusters, choose_probes, new_index
from matplotlib.figure import Figure
from metrics import compute_metrics, count_mflops
from neighbor_lists import read_list
from neighbors import unit
from report import MODEL_NAMES, choose_sizes, report_file, save, scale_costs, select_paper, widen_y_axis
from stages import SEARCH_QUERIES, ensure_k_neighbors
from study import Study
from tqdm import tqdm

from mrl_files import InputError, json_contains, read_json, replacing, write_json

PROBES, BYTES = (1, 2, 4, 8, 16, 32), (8, 16, 32, 64)
NEAREST, RETRIEVED = 40, 2048          # of 40-recall@2048
COLUMNS = ("model", "method", "d_c", "d_s", "nlist", "nprobe", "bytes", "mflops",
           "top1", "1-recall@1", "40-recall@2048")
# MFLOPs, and top-1 (%) there of IVF-RR and AdANNS-IVF on ImageNet-1K: the authors' adanns/ablations/plots.ipynb.
AUTHORS = (1.285263, 68.74, 70.13)
ROWS = 65536              # that are put into clusters at a time
CLUSTERED = Kind("IVF{nlist},Flat", zero=np.nan)
QUANTISERS = {"PQ": Kind("PQ{m}np"), "OPQ": Kind("OPQ{m},PQ{m}np")}


# ------------------------------------------------------------------------------------------------ on arrays

def make_clusters(xb, dim, nlist):
    """-> a flat index of nlist centroids at size dim; the cluster of each row of xb [n, D]: [n] int64, -1 for zeros."""
    trained, centroids = new_index(xb, dim, CLUSTERED, nlist=nlist), faiss.IndexFlatL2(dim)
    centroids.add(trained.quantizer.reconstruct_n())
    labels = [centroids.search(unit(xb[lo:lo + ROWS], dim, first=lo, zero=np.nan), 1)[1].ravel()
              for lo in range(0, len(xb), ROWS)]
    return centroids, np.concatenate(labels)


def fill_lists(xb, dim, labels, nlist):
    """-> an IVF index of the vectors at size dim, each in the list of its label. Zeros are left out, as label -1 is."""
    lists = faiss.IndexIVFFlat(faiss.IndexFlatL2(dim), dim, nlist)
    lists.is_trained = True                   # what it would learn are the clusters
    for lo in range(0, len(xb), ROWS):
        rows = unit(xb[lo:lo + ROWS], dim, first=lo, zero=np.nan)
        add_preassigned(lists, rows, np.where(np.isnan(rows[:, 0]), -1, labels[lo:lo + ROWS]))
    return lists


def search_lists(centroids, lists, xq_c, xq_s, k, nprobe):
    """-> I [q, k]: the nprobe clusters whose centroids are nearest at one size, searched at another; -1 past their end.

    xq_c, xq_s [q, D]: the queries in the representation of the centroids and in that of the lists.
    """
    chosen = centroids.search(unit(xq_c, centroids.d, "the queries"), nprobe)[1]
    lists.nprobe = nprobe
    return search_preassigned(lists, unit(xq_s, lists.d, "the queries"), k, chosen)[1]


def count_ivf_mflops(n, d_c, d_s, nlist, nprobe):
    """Multiply-adds in 10^6, as the paper counts them: all centroids, then nprobe clusters of n / nlist vectors."""
    return (d_c * nlist + nprobe * d_s * n / nlist) / 1e6


# ------------------------------------------------------------------------------------------------ one model's rows

def measure(study, sizes, nlist, probes, code_bytes):
    """-> the rows of one model's indexes; those that its JSON has for these embeddings are not made again."""
    jobs, file = list_jobs(study, sizes, nlist, probes, code_bytes), report_file(study.task, "adanns.json")
    record = {"embeddings": [data.record for data in {data.files: data for data in map(study.data, sizes)}.values()]}
    done = read_json(file)["rows"] if json_contains(file, record) else {}
    todo = [name for name in jobs if name not in done]
    for name in (bar := tqdm(todo, desc=MODEL_NAMES[study.task.model], unit="index", delay=2, leave=False)):
        bar.set_postfix_str(name)
        done[name] = jobs[name]()
        write_json(file, record | {"rows": done})
    return [{"model": study.task.model} | row for name in jobs for row in done[name]]


def list_jobs(study, sizes, nlist, probes, code_bytes):
    """-> {name: function -> rows} of all indexes of the study."""
    @lru_cache(1)
    def clusters(d_c):
        return make_clusters(study.data(d_c).xb, d_c, nlist)

    jobs = {f"exact {d}": partial(measure_exact, study, d) for d in sizes}
    jobs |= {f"IVF{nlist} {d_c} {d_s} {list(probes)}": partial(measure_ivf, study, clusters, d_c, d_s, probes)
             for d_c, d_s in product(sizes, sizes)}
    return jobs | {f"{name}{m} {d}": partial(measure_quantiser, study, name, m, d)
                   for name, m, d in product(QUANTISERS, code_bytes, sizes) if d % m == 0}


def measure_exact(study, d):
    data = study.data(d)
    file = ensure_k_neighbors(study.with_index("exactl2"), d, min(RETRIEVED, len(data.xb)))
    I = read_list(file, len(data.xb), len(data.xq))
    return [{"method": "exact", "d_s": d, "mflops": count_mflops(len(data.xb), d)} | measure_accuracy(study, I, d)]


def measure_ivf(study, clusters, d_c, d_s, probes):
    (centroids, labels), coarse, fine = clusters(d_c), study.data(d_c), study.data(d_s)
    n, nlist, k = len(labels), centroids.ntotal, min(RETRIEVED, len(labels))
    lists = fill_lists(fine.xb, d_s, labels, nlist)
    method = "IVF" if d_c == d_s else "MG-IVF" if study.task.model == "ff" else "AdANNS-IVF"
    rows = []
    for nprobe in probes:
        I = in_chunks(lambda part, p=nprobe: search_lists(centroids, lists, coarse.xq[part], fine.xq[part], k, p), fine)
        rows.append({"method": method, "d_c": d_c, "d_s": d_s, "nlist": nlist, "nprobe": nprobe,
                     "mflops": count_ivf_mflops(n, d_c, d_s, nlist, nprobe)} | measure_accuracy(study, I, d_s))
    return rows


def measure_quantiser(study, name, m, d):
    data, kind = study.data(d), QUANTISERS[name]
    index = build(data.xb, lambda: new_index(data.xb, d, kind, code=m),
                  lambda lo, rows: unit(rows, d, first=lo, zero=kind.zero))
    k = min(RETRIEVED, len(data.xb))
    I = in_chunks(lambda part: index.search(unit(data.xq[part], d, "the queries"), k)[1], data)
    return [{"method": name, "d_s": d, "bytes": m} | measure_accuracy(study, I, d)]


def in_chunks(find, data):
    parts = (slice(lo, lo + SEARCH_QUERIES) for lo in range(0, len(data.xq), SEARCH_QUERIES))
    return np.concatenate([find(part).astype(np.int32) for part in parts])


def measure_accuracy(study, I, d):
    """-> accuracy (fractions). Recall: of the exact neighbours at the full width; of FF, at the size."""
    truth_dim = d if study.task.model == "ff" else study.data(max(study.sizes)).xb.shape[1]
    data = study.data(truth_dim)
    n, q = len(data.xb), len(data.xq)
    truth = read_list(ensure_k_neighbors(study.with_index("exactl2"), truth_dim, min(NEAREST, n)), n, q)
    truth, I = (np.array(lists, np.int64, order="C") for lists in (truth[:, :NEAREST], I))
    return {"top1": compute_metrics(*study.labels(study.data(d)), I, [1])[1]["topk"],
            "1-recall@1": (I[:, 0] == truth[:, 0]).mean(),
            "40-recall@2048": faiss.eval_intersection(truth, I) / truth.size}


# ------------------------------------------------------------------------------------------------ the study

def run(study, sizes=None, nlist=None, probes=None, code_bytes=BYTES):
    """-> a table of all rows; also written as Markdown, with two pictures, to <output>/report/.

    sizes: None is all. nlist: clusters; None: indexes.choose_clusters. probes: None is PROBES, as far as there are
    clusters. code_bytes: of the product quantisers, at the sizes that they divide.
    """
    sizes = choose_sizes(study, sizes)
    n = len(study.data(sizes[-1]).xb)
    nlist = choose_clusters(n, nlist)
    probes = sorted({choose_probes(nlist, p) for p in probes or [p for p in PROBES if p <= nlist]})
    if n < 256 and code_bytes:
        raise InputError(f"product quantisers need 256 vectors, the database has {n}; --bytes with nothing after it "
                         "leaves them out")
    parts = [(study, sizes), *find_rigid(study, sizes)]
    check_same_images(study, [each.data(d) for each, its_sizes in parts for d in its_sizes])
    rows = [row for each, its_sizes in parts for row in measure(each, its_sizes, nlist, probes, code_bytes)]
    table = add_paper(pd.DataFrame(rows, columns=COLUMNS), study)
    with replacing(report_file(study.task, "adanns.md")) as temporary:
        temporary.write_text(format_study(table, study), encoding="utf-8")
    save(draw_compute(table, study), report_file(study.task, "adanns_compute.png"))
    save(draw_recall(table, study), report_file(study.task, "adanns_recall.png"))
    return table


def find_rigid(study, sizes):
    """-> [(the same study on fixed features, those of the sizes that it has)], where there are any beside others."""
    if study.task.model == "ff":
        return []
    try:
        rigid = Study(study.task._replace(model="ff"))
        if common := [d for d in rigid.sizes if d in sizes]:
            return [(rigid, common)]
        print(f"note: the rigid representations have the sizes {rigid.sizes}, none of {sizes}", file=sys.stderr)
    except InputError as error:
        print(f"note: no rigid representations to compare with: {error}", file=sys.stderr)
    return []


def check_same_images(study, datas):
    """Clusters of one file are searched in another: FF's sizes are files of their own."""
    first, *others = datas
    for other in others:
        for mine, its in zip(study.labels(first), study.labels(other), strict=True):
            if not np.array_equal(mine, its):
                raise InputError(f"{other.files[0]}: other images than those of {first.files[0].name}")


def add_paper(table, study):
    """-> the table with the MRL paper's exact 1-NN accuracy (Table 2) beside ours, where the labels are ImageNet's."""
    theirs = pd.concat(select_paper(Study(study.task._replace(model=model))) for model in table.model.unique())
    theirs = theirs[theirs.rerank_dims == ""].rename(columns={"retrieval_dim": "d_s", "top1": "paper_top1"})
    return table.merge(theirs[["model", "d_s", "paper_top1"]].assign(method="exact"), "left")


def choose_best(table):
    """-> the rows of exact search and of clusters that are better than all cheaper ones of their model and method."""
    rows = table.dropna(subset="mflops").sort_values(["mflops", "top1"], ascending=[True, False])
    before = rows.groupby(["model", "method"]).top1.transform(lambda top1: top1.cummax().shift(fill_value=-1))
    return rows[rows.top1 > before].sort_values(["model", "method"], kind="stable")


def format_study(table, study):
    """-> Markdown: what is best at each cost, and the product quantisers by size and bytes. Accuracies in per cent."""
    table = table.assign(model=table.model.map(MODEL_NAMES))
    best = choose_best(table)
    percent = best.filter(regex="top1|recall").map("{:.2%}".format, na_action="ignore")
    text = (f"# {study.task.dataset}: AdANNS\n\n## What is better than all that is cheaper, of its model and method\n\n"
            f"{to_markdown(best.assign(**percent))}")
    if table.bytes.isna().all():
        return text
    codes = table.pivot_table("top1", ["model", "method", "bytes"], "d_s").map("{:.2%}".format, na_action="ignore")
    return f"{text}\n## Top-1 of product quantisers by representation size\n\n{to_markdown(codes.reset_index())}"


def to_markdown(table):
    """Columns without a number are left out."""
    table = table.dropna(axis=1, how="all")
    cells = [[("" if pd.isna(c) else f"{c:.4g}") if isinstance(c, float) else str(c) for c in row]
             for row in table.itertuples(index=False)]
    lines = [[str(c) for c in table.columns], ["---"] * table.shape[1], *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# ------------------------------------------------------------------------------------------------ pictures

def draw_compute(table, study):
    """Top-1 against MFLOPs of clusters (section 4.1), and against the size that product quantisers read (4.2)."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    colors, best = {"exact": "black", "IVF": "C1", "AdANNS-IVF": "C0", "MG-IVF": "C2"}, choose_best(table)
    for (model, method), rows in table[table.mflops.notna()].groupby(["model", "method"], sort=False):
        left.plot(rows.mflops, 100 * rows.top1, ".", color=colors[method], alpha=0.2)
        rows = best[(best.model == model) & (best.method == method)]
        draw_line(left, rows.mflops, rows.top1, model, method, colors[method])
    draw_paper(left, table, study.task)
    scale_costs(left)
    left.set(xlabel="MFLOPs per query", ylabel="top-1 (%)")
    codes = table[table.bytes.notna()].astype({"bytes": int})
    order = sorted(codes.bytes.unique())
    for (model, method, m), rows in codes.groupby(["model", "method", "bytes"], sort=False):
        draw_line(right, rows.d_s, rows.top1, model, f"{method}, {m} bytes", f"C{order.index(m)}",
                  marker="o" if method == "OPQ" else "s")
    scale_sizes(right, codes.d_s if len(codes) else table.d_s)
    right.set(xlabel="representation size that a product quantiser reads", ylabel="top-1 (%)")
    for axes in (left, right) if len(codes) else (left,):
        axes.legend(loc="lower right", fontsize=7)
    widen_y_axis(left)
    figure.suptitle(f"{study.task.dataset}: lines are the best at each cost, dots are all")
    return figure


def draw_paper(axes, table, task):
    theirs = table.dropna(subset="paper_top1")
    if len(theirs):
        axes.plot(theirs.mflops, 100 * theirs.paper_top1, "x", color="gray", label="exact, the MRL paper's")
    if len(theirs) and task.dataset == "1K":
        axes.plot([AUTHORS[0]] * 2, AUTHORS[1:], "*", color="gray", label="IVF-RR and AdANNS-IVF, its authors'")


def draw_recall(table, study):
    """Recall of the exact neighbours against probes, with clusters and search at one size (section H.1)."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    sizes, rows = sorted(table.d_s.unique()), table[table.method == "IVF"]
    for axes, column in zip(figure.subplots(1, 2), ("1-recall@1", "40-recall@2048"), strict=True):
        for (model, d), line in rows.groupby(["model", "d_s"], sort=False):
            draw_line(axes, line.nprobe, line[column], model, d, f"C{sizes.index(d)}")
        scale_sizes(axes, rows.nprobe)
        axes.set(xlabel="clusters visited", ylabel=f"{column} (%)")
    axes.legend(loc="lower right", fontsize=7)
    figure.suptitle(f"{study.task.dataset}: recall of the exact neighbours; clusters and search at one size")
    return figure


def draw_line(axes, x, fractions, model, label, color, marker="o"):
    """Dotted and hollow for fixed features."""
    rigid = model == "ff"
    axes.plot(x, 100 * fractions, marker=marker, markersize=4, color=color, linestyle=":" if rigid else "-",
              fillstyle="none" if rigid else "full", label=f"{MODEL_NAMES[model]}, {label}")


def scale_sizes(axes, values):
    values = sorted({int(value) for value in values})
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, map(str, values))
    axes.grid(alpha=0.3)
