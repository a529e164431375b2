"""The kinds of index: a row of INDEXES says how one is made and searched. How an index is built, kept and read again.

    index = build(xb, lambda: new_index(xb, 16, INDEXES["hnsw32"]), lambda lo, rows: unit(rows, 16))

A new kind is a new row: every command, the report and the serving index take it.
"""
import time
from mmap import MADV_DONTNEED, mmap
from typing import NamedTuple

import numpy as np
from faiss_kernels import faiss
from records import has_record, record_file, replacing_with_record
from tqdm import tqdm

from mrl_files import InputError, read_json

EF_SEARCH = 64                # candidates that a graph search keeps, at least
FAR = 4                       # from the origin, where a graph has vectors of zeros: 3 or more from all unit vectors
ADDED = 2 ** 24               # bytes of float32 that are added to an index at a time
SAMPLED = 1024                # rows read at a time, far apart: with each the system maps 64 KiB of a file


class Kind(NamedTuple):
    """How one kind of index of unit vectors is made and searched, by L2 distance."""
    factory: str              # FAISS's word for it; {nlist}: clusters, {m}: bytes of a code (np: not in polysemous
                              # order, which takes 3.6 s of CPU a byte to find and changes no neighbour)
    zero: float = -FAR        # what a vector of zeros is put in as: a number in this direction, or NaN: left out
    exact: bool = False       # all vectors are compared: by matrix products, on a GPU or in blocks if need be

    @property
    def clustered(self):
        return "IVF" in self.factory


INDEXES = {"exactl2": Kind("Flat", zero=0, exact=True), "hnsw32": Kind("HNSW32"), "hnsw8": Kind("HNSW8"),
           "ivf_sq8": Kind("IVF{nlist},SQ8", zero=np.nan), "ivf_pq": Kind("OPQ{m},IVF{nlist},PQ{m}np", zero=np.nan)}
# How an index for serving stores the vectors that it re-ranks.
STORES = {"float32": "Flat", "float16": "SQfp16", "sq8": "SQ8"}


def find_kind(name):
    if name not in INDEXES:
        raise InputError(f"unknown index {name!r}: {', '.join(INDEXES)}")
    return INDEXES[name]


def choose_clusters(n, nlist=None):
    """-> how many clusters an IVF index of n vectors has: a power of two near 2 sqrt(n), of 39 vectors or more each."""
    if nlist is not None and not 1 <= nlist <= n:
        raise InputError(f"nlist={nlist} is not between 1 and the {n} vectors of the database")
    return nlist or max(1, min(2 ** round(np.log2(2 * n ** 0.5)), n // 39))


def choose_probes(nlist, nprobe=None):
    """-> how many clusters a search visits: a 32nd of them, 16 at least."""
    if nprobe is not None and not 1 <= nprobe <= nlist:
        raise InputError(f"nprobe={nprobe} is not between 1 and the {nlist} clusters of the index")
    return nprobe or min(nlist, max(16, nlist // 32))


def check_probes(kind, n, nlist, nprobe):
    """InputError for what would only be seen when the index is built."""
    if kind.clustered:
        choose_probes(choose_clusters(n, nlist), nprobe)


def choose_code(dim):
    """-> the bytes of a product quantiser's code: a quarter of the dimensions, or what divides them."""
    return max(m for m in range(1, max(1, dim // 4) + 1) if dim % m == 0)


def new_index(xb, dim, kind, candidates=0, nlist=None, nprobe=None, code=None):
    """-> an empty index for the first dim numbers of xb's rows, trained on them where it has to be. candidates, nprobe:
    the index's defaults for a search (HNSW: candidates kept; IVF: clusters visited). code: a product quantiser's
    bytes."""
    nlist = choose_clusters(len(xb), nlist) if kind.clustered else 0
    index = faiss.index_factory(dim, kind.factory.format(nlist=nlist, m=code or choose_code(dim)))
    if nlist:
        faiss.extract_index_ivf(index).nprobe = choose_probes(nlist, nprobe)
    elif "HNSW" in kind.factory:
        index.hnsw.efSearch = max(candidates, EF_SEARCH)
    if not index.is_trained:
        if "PQ" in kind.factory and len(xb) < 256:
            raise InputError(f"product quantisers need 256 vectors, the database has {len(xb)}; use ivf_sq8 or exactl2")
        train(index, take_sample(xb, dim, max(64 * nlist, 2 ** 14)))
    return index


def train(index, sample):
    rotation_pq = shorten_rotation(index) if isinstance(index, faiss.IndexPreTransform) else None
    allow_small_clusters(faiss.downcast_index(index.index if rotation_pq else index), rotation_pq)
    index.train(sample)


def allow_small_clusters(index, rotation_pq):
    """FAISS would warn of clusters of fewer than 39 vectors, which a small database has."""
    for part in (index, getattr(index, "pq", None), rotation_pq):
        if hasattr(part, "cp"):
            part.cp.min_points_per_centroid = 1


def shorten_rotation(index):
    """Rounds of the search for OPQ's rotation: 10 for FAISS's 50, in a quarter of its time (0.930 for 0.939 of the
    nearest 50 found, at size 64). -> its product quantiser, to be kept while it is trained."""
    rotation = faiss.downcast_VectorTransform(index.chain.at(0))
    rotation.niter, rotation.niter_pq = 10, 2
    rotation.pq = pq = faiss.ProductQuantizer(rotation.d_out, rotation.M, 8)
    return pq


def take_sample(xb, dim, rows):
    """-> [<= rows, dim] float32 of length 1, evenly spaced over the database; without zeros and what is not finite."""
    places = np.unique(np.linspace(0, len(xb) - 1, rows).astype(int))
    sample = np.empty((len(places), dim), np.float32)
    for lo in range(0, len(places), SAMPLED):
        sample[lo:lo + SAMPLED] = xb[places[lo:lo + SAMPLED], :dim]
        release_pages(xb)
    sample = sample[np.isfinite(sample).all(1) & sample.any(1)]
    faiss.normalize_L2(sample)
    return sample


def find_parameters(index, n, candidates, nprobe=None):
    """-> FAISS's parameters for a search that keeps so many candidates, as a list's length at least, so that the list
    has no holes; None for an index that compares all. nprobe: just so many clusters."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return faiss.SearchParametersPreTransform(index_params=find_parameters(index.index, n, candidates, nprobe))
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(efSearch=max(candidates, EF_SEARCH))
    if isinstance(index, faiss.IndexIVF):
        filling = min(index.nlist, -(-2 * candidates * index.nlist // n))
        return faiss.SearchParametersIVF(nprobe=choose_probes(index.nlist, nprobe) if nprobe
                                         else max(index.nprobe, filling))
    return None


def build(xb, new, prepare, file=None, record=None):
    """An index of all rows: new(), or what `file` holds if its record fits, with what it lacks of prepare(lo, xb[lo:]).

    It is kept in `file` every minute, so that an interrupted build is completed.
    """
    started, step = time.monotonic(), max(1, ADDED // (4 * xb.shape[1]))
    saved = started
    going_on = file and has_record(file, record)
    index, before = (read_index(file), read_json(record_file(file)).get("seconds", 0)) if going_on else (new(), 0)
    for store in list_stores(index):
        reserve(store, len(xb))
    with tqdm(total=len(xb), initial=index.ntotal, desc="index", unit="row", delay=2, leave=False) as bar:
        for lo in range(index.ntotal, len(xb), step):
            index.add(prepare(lo, xb[lo:lo + step]))      # unnamed: none is kept while the next is prepared
            release_pages(xb)
            bar.update(index.ntotal - lo)
            if file and (index.ntotal == len(xb) or time.monotonic() - saved > 60):
                saved = time.monotonic()
                write_index(index, file, record | {"seconds": before + saved - started})
    return index


def release_pages(x):
    """Of a memory-mapped array: what was read of it no longer counts as this process's memory (it may stay in the
    system's cache). Where processes are held to a limit, their mapped pages often count."""
    while isinstance(x, np.ndarray):
        x = x.base
    if isinstance(x, mmap):
        x.madvise(MADV_DONTNEED)


def list_stores(index):
    """-> the parts of an index that keep all vectors."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return list_stores(index.index)
    if isinstance(index, faiss.IndexRefine):
        return list_stores(index.base_index) + list_stores(index.refine_index)
    if isinstance(index, faiss.IndexIVF):      # a store for each cluster
        return []
    return list_stores(index.storage) if isinstance(index, faiss.IndexHNSW) else [index]


def reserve(store, n):
    """Memory for n vectors at once. As FAISS adds them it would double it again and again, and hold old and new."""
    filled = store.codes.size()
    store.codes.resize(n * store.code_size)
    store.codes.resize(filled)


def view_vectors(flat):
    """-> [n, dim] the vectors of a flat index, not copied."""
    return faiss.rev_swig_ptr(flat.get_xb(), flat.ntotal * flat.d).reshape(flat.ntotal, flat.d)


def write_index(index, file, record):
    with replacing_with_record(file, record) as temporary:
        faiss.write_index(index, str(temporary))


def read_index(file, flags=0):
    try:
        return faiss.read_index(str(file), flags)
    except RuntimeError:
        raise InputError(f"{file}: not a complete FAISS index; delete it and run again") from None
