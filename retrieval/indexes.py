"""The kinds of index: a row of INDEXES says how one is made and searched. How an index is built, kept and read again.

    index = build(xb, lambda: INDEXES["hnsw32"].new(16, 100), lambda lo, rows: unit(rows, 16))

A new kind is a new row: every command, the report and the serving index take it.
"""
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from faiss_kernels import faiss
from records import has_record, replacing_with_record
from tqdm import tqdm

from mrl_files import InputError

EF_SEARCH = 64                # candidates that a graph search keeps, at least
ROWS = 65536                  # added to an index at a time


class Kind(NamedTuple):
    """How one kind of index of unit vectors is made and searched, by L2 distance."""
    new: Callable             # (dim, candidates): an empty FAISS index, which keeps so many where it is not told others
    exact: bool = False       # all vectors are compared: by matrix products, on a GPU or in blocks if need be


def new_flat(dim, candidates):
    return faiss.IndexFlatL2(dim)


def new_graph(links, dim, candidates):
    """HNSW with so many links per vector and level."""
    index = faiss.IndexHNSWFlat(dim, links)
    index.hnsw.efSearch = max(candidates, EF_SEARCH)
    return index


INDEXES = {"exactl2": Kind(new_flat, exact=True), "hnsw32": Kind(partial(new_graph, 32)),
           "hnsw8": Kind(partial(new_graph, 8))}
# How an index for serving stores the vectors that it re-ranks: a function of their number of dimensions.
STORES = {"float32": faiss.IndexFlatL2,
          "float16": lambda dim: faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_L2)}


def find_parameters(index, candidates):
    """-> FAISS's parameters for a search that keeps so many candidates, as a list's length at least, so that the list
    has no holes; None for an index that compares all."""
    if isinstance(faiss.downcast_index(index), faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(efSearch=max(candidates, EF_SEARCH))
    return None


def find_kind(name):
    if name not in INDEXES:
        raise InputError(f"unknown index {name!r}: {', '.join(INDEXES)}")
    return INDEXES[name]


def build(xb, new, prepare, file=None, record=None):
    """An index of all rows: new(), or what `file` holds if its record fits, with what it lacks of prepare(lo, xb[lo:]).

    It is kept in `file` every minute, so that an interrupted build is completed.
    """
    index, saved = read_index(file) if file and has_record(file, record) else new(), time.monotonic()
    for store in list_stores(index):
        reserve(store, len(xb))
    with tqdm(total=len(xb), initial=index.ntotal, desc="index", unit="row", delay=2, leave=False) as bar:
        for lo in range(index.ntotal, len(xb), ROWS):
            rows = prepare(lo, xb[lo:lo + ROWS])
            index.add(rows)
            bar.update(len(rows))
            if file and (index.ntotal == len(xb) or time.monotonic() - saved > 60):
                write_index(index, file, record)
                saved = time.monotonic()
    return index


def list_stores(index):
    """-> the parts of an index that keep all vectors."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return list_stores(index.index)
    if isinstance(index, faiss.IndexRefine):
        return list_stores(index.base_index) + list_stores(index.refine_index)
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
