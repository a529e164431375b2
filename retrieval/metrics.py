"""Retrieval metrics: accuracy from labels and neighbour lists, and cost in MFLOPs and measured time.

    scores = compute_metrics(yb, yq, I, ks=[1, 10, 100])     # scores[1]["topk"] is the 1-NN accuracy (Table 2)
    count_mflops(1281167, 16, [2048], [200])               # 20.908272

yb [n] labels of the database, yq [q] of the queries, I [q, k] database rows, nearest first, -1 = none.
stages.py makes rows of a table of them. Accuracies are fractions.
"""
import time

import numpy as np
import pandas as pd

from mrl_files import InputError

KS = (10, 25, 50, 100)      # the original's
QUERIES = 4096      # at a time: bounds the memory whatever the number of queries


def compute_metrics(yb, yq, I, ks):
    """-> {k: {"mAP", "precision", "recall", "topk"}}, means over the queries; r_j = 1 where neighbour j has the label.

    mAP: (1/k) sum_{j<=k} r_j (1/j) sum_{l<=j} r_l, the paper's, divided by k and so 1 only if all k are right.
    precision: sum_{j<=k} r_j / k. recall: sum_{j<=k} r_j / database images of the query's class (0 if there are none).
    topk: 1 if any of the k is right; k = 1 is 1-NN accuracy. A -1 is a miss.
    Neighbours at equal distance count in the order in which the list has them.
    """
    yb, yq, I, ks = np.asarray(yb), np.asarray(yq), np.asarray(I), sorted(set(ks))
    check_lists(yb, yq, I, ks)
    sums, total = {k: np.zeros(4) for k in ks}, count_classmates(yb, yq)
    for lo in range(0, len(I), QUERIES):
        part = slice(lo, lo + QUERIES)
        r = judge(yb, yq[part], I[part, :ks[-1]])
        hits = r.cumsum(1)                                                                  # [q, k]
        precisions = (r * hits / np.arange(1, ks[-1] + 1)).cumsum(1)
        for k in ks:
            h = hits[:, k - 1]
            sums[k] += [(precisions[:, k - 1] / k).sum(), (h / k).sum(), (h / total[part]).sum(), (h > 0).sum()]
    return {k: dict(zip(("mAP", "precision", "recall", "topk"), (sums[k] / len(I)).tolist(), strict=True)) for k in ks}


def check_lists(yb, yq, I, ks):
    if len(I) != len(yq) or not len(I):
        raise InputError(f"{len(I)} neighbour lists do not fit {len(yq)} query labels")
    if not ks or ks[0] < 1 or ks[-1] > I.shape[1]:
        raise InputError(f"k={ks}: each must lie between 1 and the list's length, {I.shape[1]}")
    if I.min() < -1 or I.max() >= len(yb):
        raise InputError(f"the lists name rows up to {I.max()}, the database has {len(yb)} labels")


def judge(yb, yq, I):
    """-> [q, k] bool: has the neighbour the query's label?"""
    return (yb[I] == yq[:, None]) & (I >= 0)


def count_classmates(yb, yq):
    """-> [q] database images of each query's class; 1 where there are none, so that recall is 0 and not 0/0."""
    return pd.Series(yb).value_counts(sort=False).reindex(yq, fill_value=1).to_numpy()


def count_mflops(n, retrieval_dim, rerank_dims=(), shortlists=()):
    """Multiply-adds in 10^6, as the paper counts them: n distances at retrieval_dim, then each list at its size.

    It is the cost of exact search; a graph (HNSW) visits only a part of the n. Re-ranking at a size that is not
    above the one before is counted too: the work is done.
    """
    stages = zip(shortlists, rerank_dims, strict=True)
    return (n * retrieval_dim + sum(k * dim for k, dim in stages)) / 1e6


def time_one_query(answer, queries, seconds=3):
    """Time answer(i) for one query at a time, i = 0, 1, ... -> {"ms": median, "ms_low", "ms_high": quartiles}.

    30 queries, or as many as `seconds` allow: of few, one that the machine interrupts would be the median.
    """
    answer(0)                                             # the first call compiles, loads and warms up
    times, started = [], time.perf_counter()
    while not times or (len(times) < 30 and time.perf_counter() - started < seconds):
        begun = time.perf_counter()
        answer(len(times) % queries)
        times.append(time.perf_counter() - begun)
    low, median, high = np.percentile(times, [25, 50, 75])
    return {"ms": 1e3 * median, "ms_low": 1e3 * low, "ms_high": 1e3 * high}
