"""The stages of retrieval, from files to files: search, re-rank, evaluate, build an index for serving.

    study = Study(Task(dataset="1K", model="mrl"))
    ensure_neighbors(study, retrieval_dim=16, k=200)              # -> neighbors/mrl/exactl2_16dim_200shortlist_1K.npy
    ensure_reranked(study, 16, rerank_dims=[2048], shortlists=[200])      # -> neighbors/reranked/mrl/...
    score(study, file)                                            # -> one row of a table

`ensure`: a list that is there and fits the embeddings is not made again. retrieve.py (the command line), report.py and
the notebooks call these functions.
"""
import sys
from contextlib import ExitStack, closing
from pathlib import Path

import neighbors
import numpy as np
import qdrant
import serving
import shards
from indexes import INDEXES, find_kind
from metrics import KS, compute_metrics, count_mflops, time_one_query
from neighbor_lists import Recipe, list_file, list_files, parse_list_file, read_list, write_list
from records import has_record, record_file
from rerank import check_funnel, funnel

from mrl_files import InputError, locked, read_json, world

SEARCH_QUERIES = 8192             # a chunk of a search: what an interruption can lose
RERANK_CANDIDATES = 2 ** 24       # a chunk of a re-ranking: each chunk goes through the database file once
TIMES = ("seconds", "ms", "ms_low", "ms_high")      # what a record says of how long a list took to make
EVAL_CONFIGS = {"vanilla": "single-shot", "reranking": "adaptive", "funnel": "funnel", "all": ""}    # the original's


# ------------------------------------------------------------------------------------------------ lists

def ensure_neighbors(study, retrieval_dim, k=None):
    """-> the file of the k nearest neighbours at a size. k: 2,048, or all of a smaller database."""
    task, data = study.task, study.data(retrieval_dim)
    find_kind(task.index)
    neighbors.check_size(data.xb, retrieval_dim)
    k = neighbors.check_queries(data.xb, data.xq, min(2048, len(data.xb)) if k is None else k)

    def prepare():
        find = shards.searcher(study, retrieval_dim, *index_file(task, data, retrieval_dim))
        return lambda lo, hi: find(lo, hi, k)[1]

    return ensure_list(task, data, Recipe(task.index, retrieval_dim, k), prepare,
                       count_queries(task, data, retrieval_dim, k))


def count_queries(task, data, retrieval_dim, k):
    """-> the queries of a chunk: as many as half of memory_gb holds, with their lists, where each chunk reads the whole
    database again."""
    part = -(-len(data.xb) // world())
    streamed = INDEXES[task.index].exact and part > neighbors.rows_in_memory(retrieval_dim, task.memory_gb)
    held = int(task.memory_gb / 2 * 1e9) // (4 * retrieval_dim + 32 * k)      # the lists so far and a block's, merged
    return max(SEARCH_QUERIES, held) if streamed else SEARCH_QUERIES


def ensure_k_neighbors(study, retrieval_dim, k):
    """-> the shortest list there is of k neighbours or more; where there is none, one of k is made."""
    task, record = study.task, study.data(retrieval_dim).record | describe_search(study.task)
    there = list_files(task.output, task.dataset, task.model, lambda file, recipe: (
        recipe[:2] == (task.index, retrieval_dim) and not recipe.rerank_dims and recipe.k >= k
        and is_current(file, record)))
    return min(there, key=lambda file: there[file].k) if there else ensure_neighbors(study, retrieval_dim, k)


def ensure_reranked(study, retrieval_dim, rerank_dims, shortlists, k=None):
    """-> the file of the list at retrieval_dim re-ranked at each of rerank_dims, keeping ever fewer.

    k: the length of the list to begin with; None takes what is there, if it is long enough.
    """
    rerank_dims, shortlists = tuple(rerank_dims), tuple(shortlists)
    check_stages(study.task, rerank_dims, shortlists, k)
    data = study.data(max((retrieval_dim, *rerank_dims)))
    if shortlists[0] > len(data.xb):
        raise InputError(f"a shortlist of {shortlists[0]} is longer than the database, {len(data.xb)} vectors")
    source = (ensure_neighbors(study, retrieval_dim, k) if k
              else ensure_k_neighbors(study, retrieval_dim, shortlists[0]))
    I = read_list(source, len(data.xb), len(data.xq))

    def prepare():
        return lambda lo, hi: funnel(data.xb, data.xq[lo:hi], I[lo:hi], rerank_dims, shortlists, lo)

    return ensure_list(study.task, data, Recipe(study.task.index, retrieval_dim, I.shape[1], rerank_dims, shortlists),
                       prepare, max(1, RERANK_CANDIDATES // shortlists[0]), source)


def ensure_served(study, retrieval_dim, rerank_dim, shortlist, storage):
    """-> the file of the list that one FAISS index gives, with what it re-ranks stored as `storage`: see serving.py."""
    check_stages(study.task, (rerank_dim,), (shortlist,))
    data = study.data(max(retrieval_dim, rerank_dim))

    def prepare():
        _, index = ensure_serving_index(study, retrieval_dim, rerank_dim, shortlist, storage)
        find = serving.adaptive_searcher(index, shortlist, shortlist)
        return lambda lo, hi: find(data.xq[lo:hi])[1]

    recipe = Recipe(study.task.index, retrieval_dim, shortlist, (rerank_dim,), (shortlist,), storage)
    return ensure_list(study.task, data, recipe, prepare, SEARCH_QUERIES)


def ensure_qdrant(study, retrieval_dim, rerank_dims, shortlists, url=None, path=None, name=None, sizes=None, **made):
    """-> the file of the list that Qdrant finds, with the embeddings uploaded first: see qdrant.py. A server's lists
    have the index `qdrant` (quantized: `qdrant_sq8`); those of local mode, which compares all vectors, `qdrantlocal`.

    name: of the collection. sizes: those that it holds (those of this list). made: shards, replicas, quantize, which
    only a server has.
    """
    needed, rerank_dims, shortlists = (retrieval_dim, *rerank_dims), tuple(rerank_dims), tuple(shortlists)
    check_stages(study.task, rerank_dims, shortlists)
    sizes = tuple(sorted({*(sizes or needed)}))
    check_held(sizes, needed)
    if not url and any(made.values()):
        raise InputError("--shards, --replicas, --quantize: Qdrant's local mode knows none of them; --url names a "
                         "server")
    task, data = study.task, study.data(sizes[-1])
    neighbors.check_queries(data.xb, data.xq, shortlists[0])
    collection = qdrant.Collection(name or f"{task.database}_{task.model}", sizes, **made)
    index = f"qdrant{'_sq8' if collection.quantize else ''}" if url else "qdrantlocal"
    with ExitStack() as stack:
        def prepare():
            client = stack.enter_context(closing(qdrant.connect(url, path)))
            qdrant.upload(client, collection, data.xb, {"database": data.record["database"]})
            return lambda lo, hi: qdrant.query(client, collection.name, data.xq[lo:hi], retrieval_dim, rerank_dims,
                                               shortlists, lo)
        recipe = Recipe(index, retrieval_dim, shortlists[0], rerank_dims, shortlists)
        return ensure_list(task, data, recipe, prepare, qdrant.ROWS)


def check_held(sizes, needed):
    if not {*needed} <= {*sizes}:
        raise InputError(f"--sizes {list(sizes)}: the query compares at {list(needed)}; name them all")
    if needed[0] != sizes[0]:
        raise InputError(f"--retrieval_dim {needed[0]}: must be the smallest of {list(sizes)}, which has the graph")


def check_stages(task, rerank_dims, shortlists, k=None):
    """InputError for what would only fail after the search."""
    if task.model == "ff":
        raise InputError("fixed features of two sizes come from two models: re-ranking needs mrl or mrl_e")
    check_funnel(rerank_dims, shortlists)
    if k and k < shortlists[0]:
        raise InputError(f"k={k}: the list to begin with is shorter than the shortlist, {shortlists[0]}")


def ensure_list(task, data, recipe, prepare, chunk, source=None):
    """-> the file of a list. What there is not is made in three steps: prepare, time one query, answer all of them.

    prepare() -> find(lo, hi) -> I [hi - lo, k] of those queries, `chunk` of them at a time. source: the list that is
    re-ranked.
    """
    record = data.record | recipe._asdict() | describe_search(task)
    if source:
        record["source"] = {"file": source.name, "written_ns": source.stat().st_mtime_ns}
    if there := find_list(task, recipe, record):
        return there
    file = list_file(task.output, recipe, task.dataset, task.model, ".csv" if task.csv else ".npy")
    with locked(file):
        if not is_current(file, record):          # another process may have made it
            find = prepare()
            times = time_one_query(lambda i: find(i, i + 1), len(data.xq)) | {"before": read_times(source)}
            write_list(file, record, (len(data.xq), recipe.length), find, chunk, processes=world(), **times)
    return file


def describe_search(task):
    """-> what a list's record says of its index: its clusters; and of how many parts it is, where an approximate one is
    split over processes, which gives other lists. None: one process, or exact search."""
    parts = world() if world() > 1 and not INDEXES[task.index].exact else None
    return task.cluster_settings | {"parts": parts}


def find_list(task, recipe, record):
    """-> the file of a list that fits its record; None if there is none."""
    for ending in (".csv",) if task.csv else (".npy", ".csv"):
        file = list_file(task.output, recipe, task.dataset, task.model, ending)
        for spelling in (file, file.with_name(file.name.replace(",", ", "))):      # ours; the original's, with spaces
            if is_current(spelling, record):
                return spelling
    return None


def is_current(file, record):
    """Does a list fit the embeddings? One without a record (the original's) must be younger than they are."""
    if not file.exists():
        return False
    if record_file(file).exists():
        return has_record(file, record)
    return file.stat().st_mtime_ns >= max(record[of]["written_ns"] for of in ("database", "queries"))


def read_times(file):
    """-> what it took to make a list: seconds for all queries; ms for one, the median and its quartiles. NaN where no
    record says it; None for no list."""
    if file is None:
        return None
    record = read_json(record_file(file)) or {}
    return {key: record.get(key, np.nan) for key in TIMES}


# ------------------------------------------------------------------------------------------------ indexes

def index_file(task, data, dim, suffix=""):
    """-> (path of a built index, under the original's name; what it must have been made from)."""
    return (Path(task.output) / "index_files" / task.model / f"{task.database}_{dim}dim_{task.index}{suffix}.index",
            {"database": data.record["database"], "index": task.index, "retrieval_dim": dim}
            | {key: value for key, value in task.cluster_settings.items() if key != "nprobe"})      # a search's


def serving_suffix(rerank_dim, shortlist, storage):
    return f"-reranked{rerank_dim}_{shortlist}shortlist_{storage}"


def ensure_serving_index(study, retrieval_dim, rerank_dim=None, shortlist=200, storage="float32"):
    """-> (file, index): adaptive retrieval as one FAISS index."""
    task = study.task
    if rerank_dim not in (None, retrieval_dim):
        check_stages(task, [rerank_dim], [shortlist])
    data = study.data(rerank_dim or retrieval_dim)
    rerank_dim = rerank_dim or data.xb.shape[1]
    stages = {"rerank_dim": rerank_dim, "shortlist": shortlist, "storage": storage} | task.cluster_settings
    file, record = index_file(task, data, retrieval_dim, serving_suffix(rerank_dim, shortlist, storage))
    return file, serving.adaptive_index(data.xb, retrieval_dim, rerank_dim, task.index, shortlist, storage,
                                        file, record | stages, task.nlist, task.nprobe)


# ------------------------------------------------------------------------------------------------ scores

def score_all(study, ks=KS, eval_config="all"):
    """-> one row (see `score`) for each list there is. Lists of other embeddings are left out, and named.

    eval_config: vanilla, reranking, funnel or all, the original's words for which lists.
    """
    if eval_config not in EVAL_CONFIGS:
        raise InputError(f"unknown eval_config {eval_config!r}: {', '.join(EVAL_CONFIGS)}")
    task = study.task
    files = list_files(task.output, task.dataset, task.model, lambda file, recipe: (
        EVAL_CONFIGS[eval_config] in ("", recipe.method) and not leave_out(study, file, recipe)))
    if not files:
        raise InputError(f"{Path(task.output) / 'neighbors'}: no lists of {task.dataset}, {task.model} "
                         f"({eval_config}) that fit the embeddings; retrieve.py search makes them")
    truth = find_exact_neighbors(study)
    return [score(study, file, ks, truth) for file in files]


def leave_out(study, file, recipe):
    """Was a list made from other embeddings? Says so."""
    try:
        fit = is_current(file, study.data(recipe.width).record)
    except InputError:                        # a size that these embeddings do not have
        fit = False
    if not fit:
        print(f"{file} left out: made from other embeddings than those in {study.task.embeddings}", file=sys.stderr)
    return not fit


def find_exact_neighbors(study):
    """-> [q, 10] the exact neighbours at the full width, if there is a list of them; None if not."""
    task = study.task
    if task.model == "ff":                    # each size is another model: the largest is no truth of the others
        return None
    data = study.data(study.sizes[-1])
    files = list_files(task.output, task.dataset, task.model, lambda file, recipe: (
        recipe.index == "exactl2" and not recipe.rerank_dims and recipe.retrieval_dim == data.xb.shape[1]
        and recipe.k >= 10 and is_current(file, data.record)))
    return read_list(next(iter(files)), len(data.xb), len(data.xq))[:, :10] if files else None


def score(study, file, ks=KS, truth=None):
    """-> one row of a table: what a list is, its accuracy (fractions), its cost. ks past its end are left out.

    truth: [q, 10] the exact neighbours at the full width; `neighbors@10` is the share of them that a list's first 10
    hold.
    """
    file, recipe = Path(file), check_list_file(study.task, Path(file))
    data = study.data(recipe.width)
    if not is_current(file, data.record):
        raise InputError(f"{file}: made from other embeddings than those in {study.task.embeddings}; make it again")
    I = read_list(file, len(data.xb), len(data.xq))
    ks = [k for k in ks if k <= I.shape[1]]
    found = compute_metrics(*study.labels(data), I, [1, *ks])
    accuracy = {f"{name}@{k}": value for k in ks for name, value in found[k].items()}
    if truth is not None:
        accuracy["neighbors@10"] = (I[:, :10, None] == truth[:, None]).any(2).sum(1).mean() / 10
    return (describe(recipe, len(data.xb)) | {"top1": found[1]["topk"]} | accuracy
            | describe_memory(study.task, data, recipe, file) | describe_times(file, len(I)))


def check_list_file(task, file):
    """-> the recipe of a list, if it is one of this data set."""
    recipe, dataset = parse_list_file(file) or (None, None)
    if recipe is None:
        raise InputError(f"{file}: the name of a neighbour list says how it was made; this one does not")
    if dataset != task.dataset:
        raise InputError(f"{file}: a list of {dataset}, not of {task.dataset}; give --dataset {dataset}")
    if not file.is_file():
        raise InputError(f"{file}: no such file; retrieve.py search makes it")
    return recipe


def describe(recipe, n):
    return {"method": " ".join(filter(None, (recipe.method, recipe.storage))),
            "index": recipe.index, "retrieval_dim": recipe.retrieval_dim,
            "rerank_dims": ",".join(map(str, recipe.rerank_dims)), "shortlists": ",".join(map(str, recipe.shortlists)),
            "k": recipe.length,
            "mflops": count_mflops(n, recipe.retrieval_dim, recipe.rerank_dims, recipe.shortlists)}


def describe_memory(task, data, recipe, file):
    """-> bytes a vector of the first stage's index (of a search that streams: its prefixes) and of what is re-ranked,
    as it lies in the embeddings' file (a serving index has both in its file); seconds that building the index took, NaN
    where none is kept."""
    served = recipe.storage and serving_suffix(recipe.rerank_dims[0], recipe.shortlists[0], recipe.storage)
    whole, _ = index_file(task._replace(index=recipe.index), data, recipe.retrieval_dim, served or "")
    parts = 1 if served else (read_json(record_file(file)) or {}).get("parts") or 1
    files = [shards.part_file(whole, part, parts) for part in range(parts)]
    there = all(part.exists() for part in files)
    first = sum(part.stat().st_size for part in files) / len(data.xb) if there else 4 * recipe.retrieval_dim
    store = 0 if served else max(recipe.rerank_dims, default=0) * data.xb.itemsize
    seconds = max((read_json(record_file(part)) or {}).get("seconds", np.nan) for part in files)
    return {"bytes_per_vector": first + store, "build_s": seconds}


def describe_times(file, queries):
    """-> queries/s in batch and milliseconds for one query (median, quartiles), searching and re-ranking together."""
    before = (read_json(record_file(file)) or {}).get("before") or dict.fromkeys(TIMES, 0)
    seconds, ms, low, high = (value + before.get(key, np.nan) for key, value in read_times(file).items())
    return {"queries_per_s": queries / seconds, "ms_per_query": ms, "ms_low": low, "ms_high": high}
