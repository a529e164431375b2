"""The stages of retrieval, from files to files: search, re-rank, evaluate, build an index for serving.

    task = Task(dataset="1K", model="mrl")
    searched(task, retrieval_dim=16, k=200)                       # -> neighbors/mrl/exactl2_16dim_200shortlist_1K.npy
    reranked(task, 16, rerank_dims=[2048], shortlists=[200])      # -> neighbors/reranked/mrl/...
    score(task, file)                                             # -> one row of a table

A list that is there and fits the embeddings is not made again. retrieve.py (the command line), report.py and the
notebooks call these functions.
"""
import sys
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import neighbors
import numpy as np
import serving
from arrays import (
    embeddings_file,
    embeddings_files,
    fingerprint,
    fits,
    labels_file,
    record_file,
)
from metrics import KS, mflops_per_query, milliseconds, retrieval_metrics
from neighbor_lists import Recipe, list_file, list_files, parse_list_file, read_list, write_list
from rerank import check_funnel, funnel

from mrl_files import InputError, locked, read_embeddings, read_json, read_labels
from mrl_models import default_nesting_list

SEARCH_QUERIES = 8192             # a chunk of a search: what an interruption can lose
RERANK_CANDIDATES = 2 ** 24       # a chunk of a re-ranking: each chunk goes through the database file once
TIMES = ("seconds", "ms", "ms_low", "ms_high")      # what a record says of how long a list took to make
EVAL_CONFIGS = {"vanilla": "single-shot", "reranking": "adaptive", "funnel": "funnel", "all": ""}    # the original's


class Task(NamedTuple):
    """What all commands and notebooks set."""
    embeddings: str = "../inference"     # folder of the -X.npy and -y.npy files
    output: str = "."                    # folder for index_files/, neighbors/ and report/
    dataset: str = "1K"
    model: str = "mrl"                   # mrl, mrl_e or ff
    index: str = "exactl2"               # exactl2, hnsw32 or hnsw8
    csv: bool = False                    # lists as header-less CSV, the original's format
    memory_gb: float = neighbors.MEMORY_GB
    device: str = "auto"


class Data(NamedTuple):
    """The embeddings that hold one representation size."""
    xb: np.ndarray                       # [n, D] database, memory-mapped
    xq: np.ndarray                       # [q, D] queries
    record: dict                         # their fingerprints
    files: tuple                         # their paths


def open_data(task, size):
    files = tuple(embeddings_file(task.embeddings, task.dataset, split, task.model, size) for split in ("train", "val"))
    data = mapped(files, tuple((at.st_ino, at.st_size, at.st_mtime_ns) for at in map(Path.stat, files)))
    if size > data.xb.shape[1]:
        raise InputError(f"{files[0]}: has {data.xb.shape[1]} dimensions, size {size} is past them")
    return data


@lru_cache(maxsize=1)
def mapped(files, _):
    """Open the files as Data. Cached while they are unchanged (`_`: inode, size, mtime), so that a re-ranking finds the
    pages that the search has already mapped."""
    xb, xq = map(read_embeddings, files)
    if xb.shape[1] != xq.shape[1]:
        raise InputError(f"{files[1]}: {xq.shape[1]} dimensions, the database {files[0].name} has {xb.shape[1]}")
    return Data(xb, xq, {"database": fingerprint(files[0], xb), "queries": fingerprint(files[1], xq)}, files)


def open_labels(data):
    """-> yb [n], yq [q]."""
    return tuple(read_labels(labels_file(path), len(x)) for path, x in zip(data.files, (data.xb, data.xq), strict=True))


def all_sizes(task):
    """-> FF: the sizes there are files of. MRL, MRL-E: those inference noted, else 8, 16 ... up to the width."""
    files = embeddings_files(task.embeddings, task.dataset, "train", task.model)
    if task.model == "ff":
        return list(files)
    path = embeddings_file(task.embeddings, task.dataset, "train", task.model)
    noted = read_json(path.with_suffix(".json")) or {}
    return noted.get("nesting_list") or default_nesting_list(read_embeddings(path).shape[1])


# ------------------------------------------------------------------------------------------------ lists

def searched(task, retrieval_dim, k=None):
    """-> the file of the k nearest neighbours at a size, made if it is not there. k: 2,048, or all of a smaller set."""
    data = open_data(task, retrieval_dim)
    neighbors.check_sizes(data.xb, retrieval_dim, task.index)
    k = min(2048, len(data.xb)) if k is None else k
    neighbors.check_queries(data.xb, data.xq, k)

    def prepare():
        find = neighbors.searcher(data.xb, retrieval_dim, task.index, *index_file(task, data, retrieval_dim),
                                  task.device, task.memory_gb)
        return lambda lo, hi: find(data.xq[lo:hi], k, lo)[1]

    return there_or_made(task, data, Recipe(task.index, retrieval_dim, k), (len(data.xq), k), prepare,
                         queries_at_a_time(task, data, retrieval_dim, k))


def queries_at_a_time(task, data, retrieval_dim, k):
    """As many as half of memory_gb holds, with their lists, where each chunk reads the whole database again."""
    streamed, _ = neighbors.in_blocks(data.xb, retrieval_dim, task.index, task.memory_gb)
    held = int(task.memory_gb / 2 * 1e9) // (4 * retrieval_dim + 32 * k)      # the lists so far and a block's, merged
    return max(SEARCH_QUERIES, held) if streamed else SEARCH_QUERIES


def searched_at_least(task, retrieval_dim, k):
    """-> the shortest list there is of k neighbours or more; where there is none, one of k is made."""
    data = open_data(task, retrieval_dim)
    there = list_files(task.output, task.dataset, task.model, lambda file, recipe: (
        recipe[:2] == (task.index, retrieval_dim) and not recipe.rerank_dims and recipe.k >= k
        and usable(file, data.record)))
    return min(there, key=lambda file: there[file].k) if there else searched(task, retrieval_dim, k)


def reranked(task, retrieval_dim, rerank_dims, shortlists, k=None):
    """-> the file of the list at retrieval_dim re-ranked at each of rerank_dims, keeping ever fewer.

    k: the length of the list to begin with; None takes what is there, if it is long enough.
    """
    rerank_dims, shortlists = tuple(rerank_dims), tuple(shortlists)
    check_stages(task, rerank_dims, shortlists, k)
    data = open_data(task, max((retrieval_dim, *rerank_dims)))
    source = searched(task, retrieval_dim, k) if k else searched_at_least(task, retrieval_dim, shortlists[0])
    I = read_list(source, len(data.xb), len(data.xq))

    def prepare():
        return lambda lo, hi: funnel(data.xb, data.xq[lo:hi], I[lo:hi], rerank_dims, shortlists, lo)

    recipe = Recipe(task.index, retrieval_dim, I.shape[1], rerank_dims, shortlists)
    return there_or_made(task, data, recipe, (len(data.xq), shortlists[-1]), prepare,
                         max(1, RERANK_CANDIDATES // shortlists[0]), source)


def check_stages(task, rerank_dims, shortlists, k=None):
    """InputError for what would only fail after the search."""
    if task.model == "ff":
        raise InputError("fixed features of two sizes come from two models: re-ranking needs mrl or mrl_e")
    check_funnel(rerank_dims, shortlists)
    if k and k < shortlists[0]:
        raise InputError(f"k={k}: the list to begin with is shorter than the shortlist, {shortlists[0]}")


def there_or_made(task, data, recipe, shape, prepare, chunk, source=None):
    """The file of a list: there and fitting, else made, with its measured time and that of its source list."""
    record = data.record | recipe._asdict()
    if source:
        record["source"] = {"file": source.name, "written_ns": source.stat().st_mtime_ns}
    if there := list_there(task, recipe, record):
        return there
    file = list_file(task.output, recipe, task.dataset, task.model, ".csv" if task.csv else ".npy")
    with locked(file):
        if not usable(file, record):
            find = prepare()
            write_list(file, record, shape, find, chunk, **milliseconds(lambda i: find(i, i + 1), shape[0]),
                       before=time_of(source) if source else None)
    return file


def list_there(task, recipe, record):
    """-> the file of a list that fits its record; None if there is none."""
    for ending in (".csv",) if task.csv else (".npy", ".csv"):
        for file in spellings(list_file(task.output, recipe, task.dataset, task.model, ending)):
            if usable(file, record):
                return file
    return None


def time_of(file):
    """-> what it took to make a list: seconds for all queries; ms for one, the median and its quartiles. NaN where no
    record says it."""
    record = read_json(record_file(file)) or {}
    return {key: record.get(key, np.nan) for key in TIMES}


def spellings(file):
    """Our name and the original's, which has spaces in its lists."""
    return file, file.with_name(file.name.replace(",", ", "))


def usable(file, record):
    """Does a list fit the embeddings? One without a record (the original's) must be younger than they are."""
    if not file.exists():
        return False
    if record_file(file).exists():
        return fits(file, record)
    return file.stat().st_mtime_ns >= max(record[of]["written_ns"] for of in ("database", "queries"))


def index_file(task, data, dim, suffix=""):
    """-> (path of a built index, under the original's name; what it must have been made from)."""
    database = "1K" if task.dataset == "V2" else task.dataset
    return (Path(task.output) / "index_files" / task.model / f"{database}_{dim}dim_{task.index}{suffix}.index",
            {"database": data.record["database"], "index": task.index, "retrieval_dim": dim})


def serving_index(task, retrieval_dim, rerank_dim=None, shortlist=200, storage="float32"):
    """-> (file, index): adaptive retrieval as one FAISS index, built if it is not there."""
    if rerank_dim not in (None, retrieval_dim):
        check_stages(task, [rerank_dim], [shortlist])
    data = open_data(task, rerank_dim or retrieval_dim)
    rerank_dim = rerank_dim or data.xb.shape[1]
    stages = {"rerank_dim": rerank_dim, "shortlist": shortlist, "storage": storage}
    file, record = index_file(task, data, retrieval_dim, f"-reranked{rerank_dim}_{shortlist}shortlist_{storage}")
    return file, serving.adaptive_index(data.xb, retrieval_dim, rerank_dim, task.index, shortlist, storage,
                                        file, record | stages)


# ------------------------------------------------------------------------------------------------ scores

def scores(task, ks=KS, eval_config="all"):
    """-> one row (see `score`) for each list there is. Lists of other embeddings are left out, and named.

    eval_config: vanilla, reranking, funnel or all, the original's words for which lists.
    """
    if eval_config not in EVAL_CONFIGS:
        raise InputError(f"unknown eval_config {eval_config!r}: {', '.join(EVAL_CONFIGS)}")
    all_sizes(task)                           # where there are no embeddings at all, no list is to blame
    files = list_files(task.output, task.dataset, task.model, lambda file, recipe: (
        EVAL_CONFIGS[eval_config] in ("", method(recipe)) and not left_out(task, file, recipe)))
    if not files:
        raise InputError(f"{Path(task.output) / 'neighbors'}: no lists of {task.dataset}, {task.model} "
                         f"({eval_config}) that fit the embeddings; retrieve.py search makes them")
    return [score(task, file, ks) for file in files]


def left_out(task, file, recipe):
    """Was a list made from other embeddings? Says so."""
    try:
        fit = usable(file, open_data(task, largest(recipe)).record)
    except InputError:                        # a size that these embeddings do not have
        fit = False
    if not fit:
        print(f"{file} left out: made from other embeddings than those in {task.embeddings}", file=sys.stderr)
    return not fit


def largest(recipe):
    return max((recipe.retrieval_dim, *recipe.rerank_dims))


def score(task, file, ks=KS):
    """-> one row of a table: what a list is, its accuracy (fractions), its cost. ks past its end are left out."""
    file, (recipe, dataset) = Path(file), parse_list_file(file) or (None, None)
    if recipe is None:
        raise InputError(f"{file}: the name of a neighbour list says how it was made; this one does not")
    if dataset != task.dataset:
        raise InputError(f"{file}: a list of {dataset}, not of {task.dataset}; give --dataset {dataset}")
    if not file.is_file():
        raise InputError(f"{file}: no such file; retrieve.py search makes it")
    data = open_data(task, largest(recipe))
    if not usable(file, data.record):
        raise InputError(f"{file}: made from other embeddings than those in {task.embeddings}; make it again")
    I = read_list(file, len(data.xb), len(data.xq))
    ks = [k for k in ks if k <= I.shape[1]]
    found = retrieval_metrics(*open_labels(data), I, [1, *ks])
    accuracy = {f"{name}@{k}": value for k in ks for name, value in found[k].items()}
    return describe(recipe, len(data.xb)) | {"top1": found[1]["topk"]} | accuracy | measured(file, len(I))


def method(recipe):
    return ("single-shot", "adaptive", "funnel")[min(len(recipe.rerank_dims), 2)]


def describe(recipe, n):
    return {"method": method(recipe), "index": recipe.index, "retrieval_dim": recipe.retrieval_dim,
            "rerank_dims": ",".join(map(str, recipe.rerank_dims)), "shortlists": ",".join(map(str, recipe.shortlists)),
            "mflops": mflops_per_query(n, recipe.retrieval_dim, recipe.rerank_dims, recipe.shortlists)}


def measured(file, queries):
    """-> queries/s in batch and milliseconds for one query (median, quartiles), searching and re-ranking together."""
    before = (read_json(record_file(file)) or {}).get("before") or dict.fromkeys(TIMES, 0)
    seconds, ms, low, high = (value + before.get(key, np.nan) for key, value in time_of(file).items())
    return {"queries_per_s": queries / seconds, "ms_per_query": ms, "ms_low": low, "ms_high": high}
