"""Adaptive and funnel retrieval by Qdrant, a vector database that spreads over machines: one request a query.

    client = connect(url="http://localhost:6333")                # a server or a cluster; path="folder": on trial
    collection = Collection("1K_mrl", sizes=(8, 16, 32))
    upload(client, collection, xb, record)                       # [n, D]: goes on where an earlier one stopped
    I = query(client, collection.name, xq, 8, [16, 32], [200, 50])           # [q, 50] database rows

A point is a row of the database. Its vectors are named by their sizes, cut and brought to length 1 here, and compared
by inner product, which is then their cosine. So a vector of zeros stays one, and has cosine 0 to all, as it has in
exact search. Only the smallest size has a graph, for the first stage; the others are looked up. All lie on disk; the
smallest may have a copy of 8 bits a number in memory.
stages.py writes what comes out of here to files.
"""
import os
import sys
import time
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from indexes import EF_SEARCH
from neighbors import Zeros, check_size, unit
from tqdm import tqdm

from mrl_files import InputError, describe_error, import_extra

ROWS = 128                # a request: 11 MB of JSON at 8, 16 ... 2,048, of the 32 MB that a server takes
LINKS = 32                # of the graph, as hnsw32 has
KEY = "QDRANT_API_KEY"    # the environment variable with a server's key: a flag would show it to all users


class Collection(NamedTuple):
    """A collection: made where there is none of this name; an existing one must match."""
    name: str
    sizes: tuple                         # of the vectors; the smallest has the graph
    shards: int | None = None            # None: as many as the server makes, or has
    replicas: int | None = None
    quantize: bool = False               # the smallest in 8 bits a number too, kept in memory


# ------------------------------------------------------------------------------------------------ a connection

def connect(url=None, path=None):
    """-> a client of the server at url; else of Qdrant's local mode, which compares all vectors in Python: kept in the
    folder `path`, or in memory."""
    module = import_extra("qdrant_client", "retrieve.py qdrant", "qdrant-client")
    where = {"url": url, "api_key": os.environ.get(KEY), "timeout": 300} if url else {"path": path or None}
    if not url:
        print("note: Qdrant's local mode is for trying things out, and slow; --url names a server", file=sys.stderr)
    try:
        return module.QdrantClient(**where, location=None if url or path else ":memory:", check_compatibility=False)
    except (RuntimeError, ValueError, OSError) as error:      # a folder in use; an address that is none
        raise InputError(f"{url or path}: {describe_error(error)}") from None


@contextmanager
def answers_of(name):
    """InputError for a server that is away, or refuses. name: of the collection."""
    from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse
    try:
        yield
    except ResponseHandlingException as error:
        raise InputError(f"--url: the Qdrant server does not answer ({describe_error(error)}); start it, or correct "
                         "the address; what is uploaded stays, the same command goes on") from None
    except UnexpectedResponse as error:
        answer = " ".join(error.content.decode(errors="replace").split())[:200]
        raise InputError(f"--url: the Qdrant server refuses ({error.status_code}, collection {name}): {answer}; "
                         f"a key goes into {KEY}") from None


# ------------------------------------------------------------------------------------------------ the collection

def upload(client, collection, xb, record):
    """Fill the collection with the rows that it lacks of xb [n, D], in order. record: what tells xb from others."""
    zeros = Zeros(min(collection.sizes))
    for size in collection.sizes:
        check_size(xb, size)
    with answers_of(collection.name):
        ensure_collection(client, collection, record)
        done = client.count(collection.name, exact=True).count
        first = len(xb) if done == len(xb) else done // ROWS * ROWS       # some shards may have taken a part of a batch
        with tqdm(total=len(xb), initial=first, desc="upload", unit="row", delay=2, leave=False) as bar:
            for lo in range(first, len(xb), ROWS):
                rows = xb[lo:lo + ROWS]
                client.upsert(collection.name, batch_rows(rows, collection.sizes, lo, zeros), wait=True)
                bar.update(len(rows))
        zeros.tell()
        check_count(client, collection.name, len(xb))
        wait_for_graph(client, collection.name)


def batch_rows(rows, sizes, lo, zeros):
    from qdrant_client.models import Batch
    vectors = {str(size): unit(rows, size, first=lo, zeros=zeros if size == zeros.dim else None).tolist()
               for size in sizes}
    return Batch(ids=list(range(lo, lo + len(rows))), vectors=vectors)


def ensure_collection(client, collection, record):
    """Make it, or check that what there is under its name is what is asked for, made from these embeddings."""
    if not client.collection_exists(collection.name):
        client.create_collection(collection.name, describe_vectors(collection), metadata=record,
                                 shard_number=collection.shards, replication_factor=collection.replicas)
    config = client.get_collection(collection.name).config
    complaint = "was made from other embeddings, or not by this command on Qdrant 1.16 or later;" \
        if (config.metadata or {}) != record else find_difference(config.params, collection)
    if complaint:
        raise InputError(f"collection {collection.name} {complaint} give another --collection, or delete it")


def find_difference(params, collection):
    """-> how an existing collection differs from what is asked for; None if it does not."""
    held, wanted = sorted(map(int, params.vectors)), sorted(collection.sizes)
    if held != wanted:
        return f"holds the sizes {held}, not {wanted}; name them after --sizes,"
    if (params.vectors[str(wanted[0])].quantization_config is not None) != collection.quantize:
        return f"was made with{'out' if collection.quantize else ''} --quantize; leave that as it was,"
    for flag, asked, has in (("--shards", collection.shards, params.shard_number),
                             ("--replicas", collection.replicas, params.replication_factor)):
        if asked not in (None, has):
            return f"has {has} where {flag} is {asked}; leave the flag out,"
    return None


def describe_vectors(collection):
    """All vectors lie on disk. The smallest has the graph and, quantized, a copy in memory: 8 bits a number."""
    from qdrant_client.models import Distance, HnswConfigDiff, VectorParams
    vectors = {str(size): VectorParams(size=size, distance=Distance.DOT, on_disk=True, hnsw_config=HnswConfigDiff(m=0))
               for size in collection.sizes}
    first = vectors[str(min(collection.sizes))]
    first.hnsw_config.m = LINKS
    first.quantization_config = describe_quantization() if collection.quantize else None
    return vectors


def describe_quantization():
    from qdrant_client.models import ScalarQuantization, ScalarQuantizationConfig, ScalarType
    return ScalarQuantization(scalar=ScalarQuantizationConfig(type=ScalarType.INT8, always_ram=True))


def check_count(client, name, n):
    count = client.count(name, exact=True).count
    if count != n:
        raise InputError(f"collection {name}: has {count} points, the database {n}; delete it and run again")


def wait_for_graph(client, name):
    """A server builds the graph after the upload; until then it compares all vectors."""
    from qdrant_client.models import CollectionStatus
    with tqdm(desc="graph", unit="s", delay=2, leave=False) as bar:
        while client.get_collection(name).status == CollectionStatus.YELLOW:
            time.sleep(1)
            bar.update()


# ------------------------------------------------------------------------------------------------ queries

def query(client, name, xq, retrieval_dim, rerank_dims, shortlists, first=0):
    """-> I [q, shortlists[-1]] int64, as rerank.funnel's on a first list of shortlists[0]; -1 where too few were found.

    A request holds one query at all its sizes. first: the number of xq's first row.
    """
    sizes = (retrieval_dim, *rerank_dims)
    vectors = [unit(xq, size, "the queries", first).tolist() for size in sizes]
    requests = [nest(sizes, [v[i] for v in vectors], shortlists) for i in range(len(xq))]
    I = np.full((len(xq), shortlists[-1]), -1)
    with answers_of(name):
        for row, found in zip(I, client.query_batch_points(name, requests), strict=True):
            row[:len(found.points)] = [point.id for point in found.points]
    return I


def nest(sizes, vectors, shortlists):
    """-> the request for one query, its stages nested: the innermost searches, each outer one re-ranks what it kept."""
    from qdrant_client.models import Prefetch, QuantizationSearchParams, QueryRequest, SearchParams
    # rescore: the next stage compares the first one's finds anew; at its own size they would be read from disk for it.
    search = SearchParams(hnsw_ef=max(shortlists[0], EF_SEARCH), quantization=QuantizationSearchParams(rescore=False))
    stage = Prefetch(query=vectors[0], using=str(sizes[0]), limit=shortlists[0], params=search)
    for size, vector, (_, kept) in zip(sizes[1:], vectors[1:], pairwise(shortlists), strict=False):
        stage = Prefetch(query=vector, using=str(size), limit=kept, prefetch=stage)
    return QueryRequest(query=vectors[-1], using=str(sizes[-1]), limit=shortlists[-1], prefetch=stage)
