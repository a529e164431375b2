"""The nearest neighbours of queries in a database, on a prefix of the embeddings: exact, or by a graph (HNSW).

    D, I = search(xb, xq, retrieval_dim=16, k=200)                        # arrays in, arrays out
    index = adaptive_index(xb, 16)                                        # shortlist at 16 + re-ranking at D, one call
    D, I = adaptive_search(index, xq, k=10, shortlist=200)

xb [n, D] database and xq [q, D] queries are float32 or float16, not normalised, and may be memory-mapped. Prefixes are
cut to unit length here, so that the squared L2 distance is 2 - 2 cosine. D [q, k] float32 squared distances, nearest
first; I [q, k] int64 database rows. A graph keeps efSearch >= k candidates, so that it fills its lists; where it finds
too few even so (many equal vectors, as at size 1), the rest is -1 at distance inf.
retrieve.py and faiss_nn.ipynb write what comes out of here to files.
"""
import importlib.util
import operator
import os
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch
from arrays import fits, recorded
from tqdm import tqdm

from MRL import InputError

INDEXES = {"exactl2": None, "hnsw32": 32, "hnsw8": 8}      # the graph's links per vector and level; None: no graph
EF_SEARCH = 64                # candidates a graph search keeps, at least; at least k in any case
MEMORY_GB = 4                 # of normalised vectors held at once; above it exact search reads the file in blocks
ROWS = 65536                  # added to an index at a time
PRODUCTS = 2 ** 28            # that torch holds at a time: 1 GiB
AVX2_KERNELS = {"Haswell", "Zen", "Excavator", "SkylakeX", "Cooperlake", "SapphireRapids"}


def load_faiss():
    """Import FAISS with matrix products made for this processor.

    The wheel of faiss-cpu carries an OpenBLAS of 2021, which takes newer processors for one of 2004 and multiplies
    five times slower. Where it does not know an AVX2 or AVX-512 processor, name the kernels to it.
    """
    kernels = {"AVX512": "SkylakeX", "AVX2": "Haswell"}.get(torch.backends.cpu.get_cpu_capability())
    known = openblas_kernels()
    if kernels and known and known not in AVX2_KERNELS and "faiss" not in sys.modules:
        os.environ.setdefault("OPENBLAS_CORETYPE", kernels)
    import faiss
    # FAISS multiplies matrices only from queries * dimensions = 128,000 on, and compares one by one below: five times
    # slower for 2,000 queries at 16 dimensions, and no faster for a single one.
    faiss.cvar.distance_compute_blas_threshold = 0
    return faiss


def openblas_kernels():
    """-> the kernels that FAISS's own OpenBLAS would choose here; None where the wheel does not carry one.

    Asked in a process of its own: the library chooses once, when it is loaded.
    """
    libraries = Path(importlib.util.find_spec("faiss").origin).parents[1] / "faiss_cpu.libs"
    found = sorted(libraries.glob("libopenblas*.so*"))
    if not found:
        return None
    ask = (f"import ctypes; name = ctypes.CDLL({str(found[0])!r}).openblas_get_corename; "
           "name.restype = ctypes.c_char_p; print(name().decode())")
    answer = subprocess.run([sys.executable, "-ISE", "-c", ask], capture_output=True, text=True,
                            env={**os.environ, "LD_LIBRARY_PATH": str(libraries)})
    return answer.stdout.strip() or None


faiss = load_faiss()


# ------------------------------------------------------------------------------------------------ vectors

class NoDirectionError(InputError):
    """A vector is zero, or not finite, on the prefix it should be compared on."""


def unit(x, dim, what="the database", first=0):
    """-> [n, dim] float32: the first dim numbers of each row, at length 1. `first`: the number of x's first row."""
    u = np.array(x[:, :dim], np.float32, order="C")       # a copy: FAISS normalises in place
    squares = np.empty(len(u), np.float32)
    faiss.fvec_norms_L2sqr(faiss.swig_ptr(squares), faiss.swig_ptr(u), dim, len(u))
    bad = ~(np.isfinite(squares) & (squares > 0))
    if bad.any():
        raise NoDirectionError(f"{what}: row {first + bad.argmax()} is zero or not finite in its first {dim} numbers "
                               f"({bad.sum()} such rows); leave it out or use a larger size")
    faiss.normalize_L2(u)
    return u


def check_sizes(xb, dim, index="exactl2"):
    if index not in INDEXES:
        raise InputError(f"unknown index {index!r}: {', '.join(INDEXES)}")
    if not 1 <= dim <= xb.shape[1]:
        raise InputError(f"size {dim} is not between 1 and the {xb.shape[1]} dimensions of the embeddings")
    return operator.index(dim)                # FAISS takes Python's integers only


def check_queries(xb, xq, k):
    if xq.shape[1] != xb.shape[1]:
        raise InputError(f"the queries have {xq.shape[1]} dimensions, the database {xb.shape[1]}")
    if not 1 <= k <= len(xb):
        raise InputError(f"k={k} is not between 1 and the {len(xb)} vectors of the database")
    return operator.index(k)


# ------------------------------------------------------------------------------------------------ search

def search(xb, xq, retrieval_dim, k, index="exactl2", **options):
    """-> D [q, k], I [q, k] on the first retrieval_dim numbers. options: those of `searcher`.

    Equal distances come in any order. Raises InputError for sizes or k that do not fit, and for zero or NaN vectors.
    """
    return searcher(xb, retrieval_dim, index, **options)(xq, k)


def searcher(xb, retrieval_dim, index="exactl2", file=None, record=None, device="auto", memory_gb=MEMORY_GB):
    """Prepare a database once -> find(xq, k) -> D, I.

    index: exactl2, hnsw32 or hnsw8. file, record: where to keep the built index, and what it must have been made from
    to be used again. device: auto, cpu or cuda, for exact search (a graph is searched on the CPU). Exact search of more
    than memory_gb of prefixes keeps nothing: each call reads xb in blocks of that size.
    """
    retrieval_dim = check_sizes(xb, retrieval_dim, index)
    device = choose_device(device)
    if not 0 < memory_gb < np.inf:
        raise InputError(f"memory_gb={memory_gb}: must be more than 0")
    block = max(1, int(memory_gb * 1e9) // (4 * retrieval_dim))
    streamed = index == "exactl2" and len(xb) > block
    built = None if streamed else built_index(xb, retrieval_dim, index, file, record)

    def find(xq, k):
        k = check_queries(xb, xq, k)
        q = unit(xq, retrieval_dim, "the queries")
        if index != "exactl2":
            D, I = built.search(q, k, params=faiss.SearchParametersHNSW(efSearch=max(k, EF_SEARCH)))
            return np.where(I < 0, np.inf, D), I
        return exact(unit_blocks(xb, retrieval_dim, block) if streamed else [(0, vectors(built))], q, k, device)

    return find


def unit_blocks(xb, dim, block):
    """Yield (number of the first row, [<= block, dim] unit vectors) over the database."""
    for lo in tqdm(range(0, len(xb), block), desc="blocks", delay=2, leave=False):
        yield lo, unit(xb[lo:lo + block], dim, first=lo)


def exact(blocks, q, k, device):
    """The k nearest of q over all blocks: each block's best, merged. Equal to one pass over the whole.

    Inner products of unit vectors give the order of their L2 distances and cost less.
    """
    heap = faiss.ResultHeap(len(q), k, keep_max=True)
    for lo, block in blocks:
        S, I = products(q, block, min(k, len(block)), device)
        heap.add_result(S, I + lo)
    heap.finalize()
    return np.maximum(2 - 2 * heap.D, 0), heap.I


def products(q, block, k, device):
    """-> the k largest inner products [q, k] and their rows, largest first."""
    if device == "cpu":
        return faiss.knn(q, block, k, metric=faiss.METRIC_INNER_PRODUCT)
    if gpu_faiss() and k <= 2048:
        return faiss.knn_gpu(gpu_faiss(), q, block, k, metric=faiss.METRIC_INNER_PRODUCT)
    return torch_products(q, block, k, device)


def torch_products(q, block, k, device):
    """`products` on any torch device, in full float32: with TF32 it would not be exact search."""
    torch.set_float32_matmul_precision("highest")
    block_t = torch.from_numpy(block).to(device).T
    rows = max(1, PRODUCTS // len(block))                 # queries at a time
    best = [(torch.from_numpy(q[lo:lo + rows]).to(device) @ block_t).topk(k) for lo in range(0, len(q), rows)]
    return tuple(torch.cat([b[part] for b in best]).cpu().numpy() for part in (0, 1))


@cache
def gpu_faiss():
    """-> the GPU memory of a FAISS that was built for GPUs, where there is one; else None."""
    return faiss.StandardGpuResources() if faiss.get_num_gpus() > 0 else None


def choose_device(device):
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"unknown device {device!r}: auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda was asked for, and there is none; use cpu")
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


# ------------------------------------------------------------------------------------------------ indexes

def new_index(dim, kind):
    links = INDEXES[kind]
    return faiss.IndexFlatL2(dim) if links is None else faiss.IndexHNSWFlat(dim, links)


def vectors(flat):
    """-> [n, dim] the vectors of a flat index, not copied."""
    return faiss.rev_swig_ptr(flat.get_xb(), flat.ntotal * flat.d).reshape(flat.ntotal, flat.d)


def built_index(xb, dim, kind, file=None, record=None):
    """The index of all prefixes: from `file` if its record fits, else built, and kept there every minute.

    A file that holds only the first rows (an interrupted run's) is completed.
    """
    index = read_index(file) if file and fits(file, record) else new_index(dim, kind)
    fill(index, xb, lambda lo, rows: unit(rows, dim, first=lo), file, record)
    return index


def fill(index, xb, prepare, file=None, record=None):
    saved = time.monotonic()
    with tqdm(total=len(xb), initial=index.ntotal, desc="index", unit="row", delay=2, leave=False) as bar:
        for lo in range(index.ntotal, len(xb), ROWS):
            rows = prepare(lo, xb[lo:lo + ROWS])
            index.add(rows)
            bar.update(len(rows))
            if file and (index.ntotal == len(xb) or time.monotonic() - saved > 60):
                write_index(index, file, record)
                saved = time.monotonic()


def write_index(index, file, record):
    with recorded(file, record) as temporary:
        faiss.write_index(index, str(temporary))


def read_index(file, flags=0):
    try:
        return faiss.read_index(str(file), flags)
    except RuntimeError:
        raise InputError(f"{file}: not a complete FAISS index; delete it and run again") from None


# ------------------------------------------------------------------------------------------------ adaptive index

def adaptive_index(xb, retrieval_dim, rerank_dim=None, index="hnsw32", shortlist=200, storage="float32",
                   file=None, record=None):
    """Adaptive retrieval (section 4.3.1) as one FAISS index: shortlist at retrieval_dim, re-ranked at rerank_dim.

    It takes raw full-width vectors, cuts and normalises them itself, and can be written and served by FAISS alone:
    `faiss.read_index(file).search(xq, 10)` re-ranks `shortlist` candidates. rerank_dim: the full width when None.
    storage: float32 or float16, of the vectors that the second stage keeps (n * rerank_dim numbers in memory).
    file, record: as for `searcher`.
    """
    retrieval_dim = check_sizes(xb, retrieval_dim, index)
    rerank_dim = check_sizes(xb, rerank_dim or xb.shape[1])
    if not 1 <= shortlist <= len(xb):
        raise InputError(f"shortlist={shortlist} is not between 1 and the {len(xb)} vectors of the database")
    built = (read_index(file) if file and fits(file, record) else
             new_adaptive_index(xb.shape[1], retrieval_dim, rerank_dim, index, shortlist, storage))
    fill(built, xb, lambda lo, rows: checked(rows, retrieval_dim, rerank_dim, first=lo), file, record)
    return built


def new_adaptive_index(width, retrieval_dim, rerank_dim, kind, shortlist, storage):
    first = new_index(retrieval_dim, kind)
    if kind != "exactl2":
        first.hnsw.efSearch = max(shortlist, EF_SEARCH)
    if storage == "float32":
        second = faiss.IndexFlatL2(rerank_dim)
    elif storage == "float16":
        second = faiss.IndexScalarQuantizer(rerank_dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_L2)
    else:
        raise InputError(f"unknown storage {storage!r}: float32 or float16")
    refine = faiss.IndexRefine(of_prefix(rerank_dim, first), second)
    refine.k_factor = shortlist / 10
    # Through bytes: the copy owns its parts, of which Python would free some too early.
    return faiss.deserialize_index(faiss.serialize_index(of_prefix(width, refine)))


def of_prefix(width, index):
    """An index on `width` numbers that cuts and normalises them for `index`."""
    whole = faiss.IndexPreTransform(faiss.NormalizationTransform(index.d), index)
    whole.prepend_transform(faiss.RemapDimensionsTransform(width, index.d, False))
    return whole


def checked(x, *dims, what="the database", first=0):
    """-> x as float32, if each row has a direction on each prefix."""
    for dim in dims:
        unit(x, dim, what, first)
    return np.ascontiguousarray(x, np.float32)


def read_adaptive_index(file):
    """-> the index in a file, memory-mapped: processes that serve it share its memory."""
    return read_index(file, faiss.IO_FLAG_MMAP_IFC)


def adaptive_search(index, xq, k, shortlist=200):
    """-> D [q, k], I [q, k] from one call; any shortlist >= k."""
    if not 1 <= k <= shortlist <= index.ntotal:
        raise InputError(f"k={k}, shortlist={shortlist}: must be 1 <= k <= shortlist <= {index.ntotal} vectors")
    if xq.shape[1] != index.d:
        raise InputError(f"the queries have {xq.shape[1]} dimensions, the index {index.d}")
    second = faiss.downcast_index(index.index)
    first = faiss.downcast_index(second.base_index)
    queries = checked(xq, first.index.d, second.d, what="the queries")
    graph = faiss.SearchParametersHNSW(efSearch=max(shortlist, EF_SEARCH))
    # FAISS cuts k * k_factor to an integer: the half keeps it from falling below the shortlist.
    refine = faiss.IndexRefineSearchParameters(
        k_factor=(shortlist + 0.5) / k, base_index_params=faiss.SearchParametersPreTransform(index_params=graph))
    return index.search(queries, k, params=faiss.SearchParametersPreTransform(index_params=refine))
