"""Adaptive and funnel retrieval (section 4.3.1, appendix F): shortlists re-ranked on longer prefixes.

    I2 = rerank(xb, xq, I, rerank_dim=2048, shortlist=200)                                      # [q, 200]
    I3 = funnel(xb, xq, I, [16, 32, 64, 128, 2048], [800, 400, 200, 50, 10])                    # [q, 10]

xb [n, D] and xq [q, D] as in neighbors.py, which makes the list I [q, k]. Nothing is written to any of them. The
database is visited in row order, each row straight from where it lies, so that a memory-mapped file is read once from
front to back and needs no memory of its own. stages.py writes the new lists to files.
"""
from itertools import pairwise

import numba
import numpy as np
from tqdm import tqdm

from mrl_files import InputError, keep_compiled

TINY = np.finfo(np.float32).tiny      # makes 0 of 0 / 0, the cosine of a vector of zeros
PAIRS = 2 ** 20           # (query, candidate) pairs at a time
COPIED_PAIRS = 2 ** 14    # the same for float16 databases, whose rows are converted: 128 MiB of 2,048-d float32


def rerank(xb, xq, I, rerank_dim, shortlist, first=0):
    """-> [q, shortlist]: the first `shortlist` of each list, sorted by distance on the first rerank_dim numbers.

    Candidates at equal distance keep the order of I; -1 comes last. Raises InputError for a size past the width, a
    shortlist longer than I, row numbers past the database, and for NaN or infinite vectors among the candidates (a
    query's row is counted from `first`). A vector of zeros has cosine 0 to all.
    """
    check_lists(xb, xq, I, rerank_dim, shortlist)
    I = I[:, :shortlist]
    return np.take_along_axis(I, argsort_descending(compute_cosines(xb, xq, I, rerank_dim, first)), 1)


def funnel(xb, xq, I, rerank_dims, shortlists, first=0):
    """-> [q, shortlists[-1]]: `rerank` at each size in turn, each on the survivors of the one before."""
    check_funnel(rerank_dims, shortlists)
    for dim, shortlist in zip(rerank_dims, shortlists, strict=True):
        I = rerank(xb, xq, I, dim, shortlist, first)
    return I


def check_funnel(rerank_dims, shortlists):
    if len(rerank_dims) != len(shortlists) or not len(shortlists):
        raise InputError(f"a funnel needs as many sizes as shortlists, got {list(rerank_dims)} and {list(shortlists)}")
    if any(b > a for a, b in pairwise(shortlists)):
        raise InputError(f"the shortlists of a funnel must not grow: {list(shortlists)}")


def check_lists(xb, xq, I, dim, shortlist):
    if xb.shape[1] != xq.shape[1] or not 1 <= dim <= xb.shape[1]:
        raise InputError(f"size {dim} does not fit a database of {xb.shape[1]} and queries of {xq.shape[1]} dimensions")
    if len(I) != len(xq) or not 1 <= shortlist <= I.shape[1]:
        raise InputError(f"shortlist {shortlist} of {len(xq)} queries does not fit lists {list(I.shape)}")
    if I.min() < -1 or I.max() >= len(xb):
        raise InputError(f"the lists name rows from {I.min()} to {I.max()}, the database has {len(xb)}")


def compute_cosines(xb, xq, I, dim, first):
    """-> [q, s] float32 cosine of each query and candidate on the first dim numbers; -inf where I is -1."""
    candidates, xq = I.ravel().astype(np.int64), view_read_only(np.ascontiguousarray(xq, np.float32))
    squares = np.einsum("qd,qd->q", xq[:, :dim], xq[:, :dim])
    refuse_not_finite(~np.isfinite(squares), first + np.arange(len(xq)), "the queries", dim)
    pairs = sort_by_row(candidates, len(xb))
    rows, queries, found = candidates[pairs], pairs // I.shape[1], np.empty(len(pairs), np.float32)
    step = PAIRS if can_stay(xb) else COPIED_PAIRS
    for lo in tqdm(range(0, len(pairs), step), desc="re-ranking", delay=2, leave=False):
        part = slice(lo, lo + step)
        found[part] = multiply_pairs(*take_float32(xb, rows[part], dim), xq, queries[part], dim)
    refuse_not_finite(~np.isfinite(found), rows, "the database", dim)
    values = np.full(candidates.size, -np.inf, np.float32)
    values[pairs] = found
    return values.reshape(I.shape)


def argsort_descending(values):
    """np.argsort(-values, axis=1, kind="stable") for float32 [q, s], in 2 ms for its 10, of the 60 that re-ranking
    2,000 lists of 200 at 2,048 takes. Each value and its position are packed into one int64, and those are sorted."""
    bits = (values + np.float32(0)).view(np.int32)                  # + 0 makes 0 of -0
    keys = np.empty((*values.shape, 2), np.int32)
    keys[..., 0] = np.arange(values.shape[1])
    keys[..., 1] = ~(bits ^ ((bits >> 31) & 0x7fffffff))            # ordered as the values are, the other way round
    return np.sort(keys.view(np.int64)[..., 0]) & 0xffffffff


def refuse_not_finite(bad, rows, what, dim):
    if bad.any():
        raise InputError(f"{what}: row {rows[bad.argmax()]} is not finite in its first {dim} numbers; "
                         "write the embeddings again in fp32")


def sort_by_row(candidates, n):
    """-> the positions of all candidates but -1, by database row to within n / 65,536 rows.

    65,536 because numpy sorts 16-bit keys several times faster than others.
    """
    buckets = (candidates // -(-n // 65536)).astype(np.uint16)
    order = np.argsort(buckets, kind="stable")
    return order[candidates[order] >= 0] if candidates.min() < 0 else order


def take_float32(xb, rows, dim):
    """-> (float32 array, row numbers in it): xb itself where it can stay, else a copy of the rows needed."""
    if can_stay(xb):
        return view_read_only(xb), rows
    distinct, places = np.unique(rows, return_inverse=True)
    return view_read_only(np.ascontiguousarray(xb[distinct, :dim], np.float32)), places


def can_stay(xb):
    return xb.dtype == np.float32 and xb.flags.c_contiguous


def view_read_only(x):
    """A view that numba takes for the same type whatever the caller holds, so that it compiles once."""
    view = np.asarray(x).view()
    view.flags.writeable = False
    return view


compile_loop = keep_compiled(parallel=True, fastmath={"reassoc", "contract"})


@compile_loop
def multiply_pairs(xb, rows, xq, queries, dim):
    """-> [pairs] products of xb[rows] and xq[queries] on the first dim numbers, by the length of xb's: cosines up to
    the query's length, which does not change a query's order. Four pairs at a time hide the wait for memory."""
    cosine = np.empty(len(rows), np.float32)
    last = len(rows) - 1
    for group in numba.prange((len(rows) + 3) // 4):
        p0 = 4 * group
        p1, p2, p3 = min(p0 + 1, last), min(p0 + 2, last), min(p0 + 3, last)
        x0, x1, x2, x3 = xb[rows[p0]], xb[rows[p1]], xb[rows[p2]], xb[rows[p3]]
        q0, q1, q2, q3 = xq[queries[p0]], xq[queries[p1]], xq[queries[p2]], xq[queries[p3]]
        s0 = s1 = s2 = s3 = n0 = n1 = n2 = n3 = np.float32(0)
        for j in range(dim):
            s0 += x0[j] * q0[j]
            s1 += x1[j] * q1[j]
            s2 += x2[j] * q2[j]
            s3 += x3[j] * q3[j]
            n0 += x0[j] * x0[j]
            n1 += x1[j] * x1[j]
            n2 += x2[j] * x2[j]
            n3 += x3[j] * x3[j]
        cosine[p0], cosine[p1] = s0 / np.sqrt(n0 + TINY), s1 / np.sqrt(n1 + TINY)
        cosine[p2], cosine[p3] = s2 / np.sqrt(n2 + TINY), s3 / np.sqrt(n3 + TINY)
    return cosine
