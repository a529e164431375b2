"""The nearest neighbours of queries in a database, on a prefix of the embeddings: exact, by a graph (HNSW), or in
clusters (IVF).

    D, I = search(xb, xq, retrieval_dim=16, k=200)                        # arrays in, arrays out

xb [n, D] database and xq [q, D] queries are float32 or float16, not normalised, and may be memory-mapped. Prefixes are
cut to unit length here, so that the squared L2 distance is 2 - 2 cosine. D [q, k] float32 squared distances, nearest
first; I [q, k] int64 database rows. Exact search tells squared distances apart that differ by 5e-6 or more, as float32
products do (2.9e-6 was the most that was seen): closer ones (copies of an image; much of a large database at sizes 1
and 2) come in any order. A graph keeps efSearch >= k candidates, so that it fills its lists; where it finds too few
even so (many equal vectors, as at size 1), the rest is -1 at distance inf.
stages.py writes what comes out of here to files.
"""
import operator
import sys

import numpy as np
import torch
from faiss_kernels import faiss
from indexes import build, check_probes, find_kind, find_parameters, new_index, view_vectors
from tqdm import tqdm

from mrl_files import InputError

MEMORY_GB = 4                 # of normalised vectors held at once; above it exact search reads the file in blocks
PRODUCTS = 2 ** 28            # that torch holds at a time: 1 GiB


# ------------------------------------------------------------------------------------------------ vectors

class Zeros:
    """Counts the database vectors that are zero in their first `dim` numbers, and says so once."""

    def __init__(self, dim, kind=None):
        self.dim, self.count, self.rows, self.told = dim, 0, 0, False
        self.end = "left out of the index" if kind and np.isnan(kind.zero) else "cosine 0 to all, found last"

    def add(self, count, rows):
        self.count, self.rows = self.count + int(count), self.rows + rows

    def tell(self):
        if self.count and not self.told:
            print(f"note: {self.count} of {self.rows} vectors of the database are zero in their first {self.dim} "
                  f"numbers: {self.end}", file=sys.stderr)
        self.told = True


def unit(x, dim, what="the database", first=0, zeros=None, zero=0):
    """-> [n, dim] float32: the first dim numbers of each row, at length 1; a row of zeros stays one: cosine 0 to all.

    first: the number of x's first row. zeros: a Zeros that counts them. zero: the length at which they are put instead,
    for indexes, whose L2 distance has zeros nearer to a query than what lies at right angles.
    """
    u = np.array(x[:, :dim], np.float32, order="C")       # a copy: FAISS normalises in place
    squares = np.empty(len(u), np.float32)
    faiss.fvec_norms_L2sqr(faiss.swig_ptr(squares), faiss.swig_ptr(u), dim, len(u))
    if not np.isfinite(squares).all():
        bad = ~np.isfinite(squares)
        raise InputError(f"{what}: row {first + bad.argmax()} is not finite in its first {dim} numbers "
                         f"({bad.sum()} such rows); write the embeddings again in fp32")
    faiss.normalize_L2(u)
    if zero:
        u[squares == 0] = zero * dim ** -0.5
    if zeros is not None:
        zeros.add((squares == 0).sum(), len(u))
    return u


def check_size(xb, dim):
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

    Equal distances come in any order. A vector of zeros has cosine 0 to all: it is found last (by exact search, among
    features that are not negative, as a ReLU's; by a graph, always).
    Raises InputError for sizes or k that do not fit, and for NaN or infinite vectors.
    """
    return searcher(xb, retrieval_dim, index, **options)(xq, k)


def searcher(xb, retrieval_dim, index="exactl2", file=None, record=None, device="auto", memory_gb=MEMORY_GB,
             nlist=None, nprobe=None, row=0):
    """Prepare a database once -> find(xq, k) -> D, I.

    index: a row of indexes.INDEXES. file, record: where to keep the built index, and what it must have been made from
    to be used again. device: auto, cpu or cuda, for exact search (the others are searched on the CPU). Exact search of
    more than memory_gb of prefixes keeps nothing: each call reads xb in blocks of that size. nlist: clusters of an IVF
    index; nprobe: those that a search visits (see indexes.choose_clusters, choose_probes). row: the number that errors
    give to xb's first.
    """
    kind, dim, device = find_kind(index), check_size(xb, retrieval_dim), choose_device(device)
    zeros, block = Zeros(dim, kind), rows_in_memory(dim, memory_gb)
    streamed = kind.exact and len(xb) > block
    if not streamed:
        check_probes(kind, len(xb), nlist, nprobe)
        built = build(xb, lambda: new_index(xb, dim, kind, nlist=nlist),
                      lambda lo, rows: unit(rows, dim, first=row + lo, zeros=zeros, zero=kind.zero), file, record)
        zeros.tell()
        whole = [(0, put_vectors(built, device))] if kind.exact else None      # find keeps built, whose memory it is

    def find(xq, k, first=0):
        k, q = check_queries(xb, xq, k), unit(xq, dim, "the queries", first)
        if not kind.exact:
            return search_index(built, q, k, nprobe)
        return search_exactly(unit_blocks(xb, dim, block, zeros, row) if streamed else whole, q, k, device)

    return find


def rows_in_memory(dim, memory_gb):
    """-> how many prefixes memory_gb holds: a larger database is read in blocks of so many, for each search anew."""
    if not 0 < memory_gb < np.inf:
        raise InputError(f"memory_gb={memory_gb}: must be more than 0")
    return max(1, int(memory_gb * 1e9) // (4 * dim))


def search_index(built, q, k, nprobe):
    D, I = built.search(q, k, params=find_parameters(built, built.ntotal, k, nprobe))
    D[(D > 5) | ~q.any(1, keepdims=True)] = 2          # one of the two is zero: cosine 0
    return np.where(I < 0, np.inf, D), I


def put_vectors(built, device):
    """-> a flat index's vectors where they are searched. A GPU gets them once, not for each search."""
    vectors = view_vectors(built)
    return vectors if device == "cpu" else torch.as_tensor(vectors, device=device)


def unit_blocks(xb, dim, block, zeros, row=0):
    """Yield (number of the first row, [<= block, dim] unit vectors) over the database."""
    for lo in tqdm(range(0, len(xb), block), desc="blocks", delay=2, leave=False):
        yield lo, unit(xb[lo:lo + block], dim, first=row + lo, zeros=zeros)
    zeros.tell()


def search_exactly(blocks, q, k, device):
    """The k nearest of q over all blocks: each block's best, merged. Equal to one pass over the whole.

    Inner products of unit vectors give the order of their L2 distances and cost less.
    """
    heap = faiss.ResultHeap(len(q), k, keep_max=True)
    for lo, block in blocks:
        S, I = multiply(q, block, min(k, len(block)), device)
        heap.add_result(S, I + lo)
        del block                             # before the next one is made: one at a time in memory
    heap.finalize()
    return np.maximum(2 - 2 * heap.D, 0), heap.I


def multiply(q, block, k, device):
    """-> the k largest inner products [q, k] and their rows, largest first."""
    if device == "cpu":
        return faiss.knn(q, block, k, metric=faiss.METRIC_INNER_PRODUCT)
    return multiply_with_torch(q, block, k, device)


def multiply_with_torch(q, block, k, device):
    """`multiply` on any torch device, in full float32: with TF32 it would not be exact search."""
    torch.set_float32_matmul_precision("highest")
    block_t = torch.as_tensor(block, device=device).T
    rows = max(1, PRODUCTS // len(block))                 # queries at a time
    best = [(torch.from_numpy(q[lo:lo + rows]).to(device) @ block_t).topk(k) for lo in range(0, len(q), rows)]
    return tuple(torch.cat([b[part] for b in best]).cpu().numpy() for part in (0, 1))


def choose_device(device):
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"unknown device {device!r}: auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda was asked for, and there is none; use cpu")
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
