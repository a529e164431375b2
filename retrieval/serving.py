"""Adaptive retrieval as one FAISS index: built, kept in a file, served from it.

    index = adaptive_index(xb, 16)                          # shortlist at 16 + re-ranking at the full width, one call
    D, I = adaptive_search(index, xq, k=10, shortlist=200)

xb [n, D], xq [q, D], D and I [q, k] as in neighbors.py. stages.py (retrieve.py index) builds the file; any program with
FAISS can serve it.
"""
import operator

import numpy as np
from faiss_kernels import faiss
from indexes import STORES, build, find_kind, find_parameters, new_index, read_index, take_sample
from neighbors import Zeros, check_size, unit

from mrl_files import InputError

K = 10      # FAISS stores a shortlist as a factor of k: it is as long as told for 10 neighbours, twice as long for 20


def adaptive_index(xb, retrieval_dim, rerank_dim=None, index="hnsw32", shortlist=200, storage="float32",
                   file=None, record=None, nlist=None, nprobe=None):
    """Adaptive retrieval (section 4.3.1) as one FAISS index: shortlist at retrieval_dim, re-ranked at rerank_dim.

    It takes raw full-width vectors, cuts and normalises them itself, and can be written and served by FAISS alone:
    `faiss.read_index(file).search(xq, 10)` re-ranks `shortlist` candidates. rerank_dim: the full width when None.
    storage: float32, float16 or sq8 (8 bits), of the numbers that the second stage keeps (n * rerank_dim in memory).
    file, record, nlist, nprobe: as for neighbors.searcher.
    """
    retrieval_dim = check_size(xb, retrieval_dim)
    rerank_dim = check_size(xb, rerank_dim or xb.shape[1])
    check_shortlist(shortlist, len(xb))
    if storage not in STORES:
        raise InputError(f"unknown storage {storage!r}: {', '.join(STORES)}")
    kind = find_kind(index)
    zeros = Zeros(retrieval_dim, kind)

    def new():
        first, store = new_index(xb, retrieval_dim, kind, shortlist, nlist, nprobe), new_store(xb, rerank_dim, storage)
        return combine(xb.shape[1], first, store, shortlist)

    def prepare(lo, rows):
        checked = check_finite(rows, retrieval_dim, rerank_dim, first=lo, zeros=zeros)
        return replace_zeros(checked, retrieval_dim, kind.zero)

    built = build(xb, new, prepare, file, record)
    zeros.tell()
    return built


def check_shortlist(shortlist, n):
    if not K <= shortlist <= min(n, 1000 * K):      # FAISS keeps it as a factor of k, from 1 to 1,000
        raise InputError(f"--shortlist={shortlist} is not between {K} and {min(n, 1000 * K)} "
                         f"(the database has {n} vectors)")


def new_store(xb, dim, storage):
    store = faiss.index_factory(dim, STORES[storage])
    if not store.is_trained:
        store.train(take_sample(xb, dim, 2 ** 14))
    return store


def combine(width, first, store, shortlist):
    """-> an index on `width` numbers: `first` finds candidates, which are re-ranked by what `store` keeps."""
    refine = faiss.IndexRefine(prepend_cut(store.d, first), store)
    refine.k_factor = shortlist / K
    # Through bytes: the copy owns its parts, of which Python would free some too early.
    return faiss.deserialize_index(faiss.serialize_index(prepend_cut(width, refine)))


def prepend_cut(width, index):
    """An index on `width` numbers that cuts and normalises them for `index`."""
    whole = faiss.IndexPreTransform(faiss.NormalizationTransform(index.d), index)
    whole.prepend_transform(faiss.RemapDimensionsTransform(width, index.d, False))
    return whole


def check_finite(x, *dims, what="the database", first=0, zeros=None):
    """-> x as float32, if each row is finite on each prefix. zeros: counts those that are zero on the first."""
    for dim in dims:
        unit(x, dim, what, first, zeros if dim == dims[0] else None)
    return np.array(x, np.float32, order="C")


def replace_zeros(x, dim, zero):
    """Make a prefix of zeros ever so slightly negative. FAISS normalises it: it is opposite to all features that are
    not negative, as a ReLU's, and found last. zero: NaN where the index is to leave it out."""
    x[~x[:, :dim].any(1), :dim] = zero if np.isnan(zero) else -1e-15
    return x


def read_adaptive_index(file):
    """-> the index in a file, memory-mapped: processes that serve it share its memory."""
    return read_index(file, faiss.IO_FLAG_MMAP_IFC)


def adaptive_search(index, xq, k, shortlist=200, nprobe=None):
    """-> D [q, k], I [q, k] from one call; any shortlist >= k. nprobe: the clusters that an IVF index visits."""
    return adaptive_searcher(index, k, shortlist, nprobe)(xq)


def adaptive_searcher(index, k, shortlist=200, nprobe=None):
    """-> function xq [q, D] -> D [q, k], I [q, k]. It builds FAISS's search parameters once, which saves a third of the
    time of single queries."""
    k, shortlist = operator.index(k), operator.index(shortlist)      # FAISS takes Python's integers only
    if not 1 <= k <= shortlist <= index.ntotal:
        raise InputError(f"k={k}, shortlist={shortlist}: must be 1 <= k <= shortlist <= {index.ntotal} vectors")
    if shortlist > 1000 * k:
        raise InputError(f"k={k}, shortlist={shortlist}: FAISS re-ranks at most 1,000 k candidates")
    second = faiss.downcast_index(index.index)
    first = faiss.downcast_index(second.base_index)
    parameters = find_parameters(first.index, index.ntotal, shortlist, nprobe)
    # FAISS cuts k * k_factor to an integer: the half keeps it from falling below the shortlist.
    refine = faiss.IndexRefineSearchParameters(
        k_factor=(shortlist + 0.5) / k, base_index_params=faiss.SearchParametersPreTransform(index_params=parameters))
    params, width = faiss.SearchParametersPreTransform(index_params=refine), max(first.index.d, second.d)

    def find(xq):
        if xq.ndim != 2 or xq.shape[1] != index.d:
            raise InputError(f"the queries have the shape {list(xq.shape)}, not [q, {index.d}] (one query: xq[None])")
        D, I = index.search(check_finite(xq, width, what="the queries"), k, params=params)
        return np.where(I < 0, np.inf, D), I
    return find
