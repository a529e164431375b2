"""Neighbour lists as files: their names, the original's spelling among them, and how they are read and written.

    file = list_file(".", Recipe("exactl2", 16, 2048), "1K", "mrl")   # neighbors/mrl/exactl2_16dim_2048shortlist_1K.npy
    I = read_list(file, n=1281167, q=50000)                           # [q, k], -1 = none

stages.py writes them with what neighbors.py and rerank.py find, and reads them again to re-rank and to judge.
"""
import os
import re
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from indexes import STORES
from records import has_record, record_file, replacing_with_record
from tqdm import tqdm

from mrl_files import InputError, allocate, read_array, read_json, write_json


class Recipe(NamedTuple):
    """How a list of neighbours is made: search k at retrieval_dim, then re-rank at each size, keeping ever fewer."""
    index: str
    retrieval_dim: int
    k: int
    rerank_dims: tuple = ()
    shortlists: tuple = ()
    storage: str | None = None    # of the serving index that made it, a row of indexes.STORES; None: no such index

    @property
    def method(self):
        return ("single-shot", "adaptive", "funnel")[min(len(self.rerank_dims), 2)]

    @property
    def length(self):
        """Of its lists."""
        return self.shortlists[-1] if self.shortlists else self.k

    @property
    def width(self):
        """The largest size that it compares at."""
        return max((self.retrieval_dim, *self.rerank_dims))


NAMES = (r"(?P<index>[a-z0-9]+(?:_sq8|_pq)?)_(?P<retrieval_dim>\d+)dim_(?P<k>\d+)shortlist_(?P<dataset>.+)",
         r"(?P<retrieval_dim>\d+)dim-reranked(?P<rerank_dims>\d+)_(?P<shortlists>\d+)shortlist"
         rf"(?:_(?P<storage>{'|'.join(STORES)}))?_(?P<dataset>.+?)_(?P<index>[a-z0-9]+(?:_sq8|_pq)?)",
         r"(?P<retrieval_dim>\d+)dim-cascade\[(?P<rerank_dims>[\d, ]+)\]_shortlist\[(?P<shortlists>[\d, ]+)\]"
         r"_(?P<dataset>.+?)_(?P<index>[a-z0-9]+(?:_sq8|_pq)?)")


def list_file(folder, recipe, dataset, model, ending=".npy"):
    """-> the path of a list, under the original's name (without its spaces)."""
    index, dim, k, rerank_dims, shortlists, storage = recipe
    if not rerank_dims:
        name = f"{model}/{index}_{dim}dim_{k}shortlist_{dataset}"
    elif len(rerank_dims) == 1:
        kept = f"{shortlists[0]}shortlist" + (f"_{storage}" if storage else "")
        name = f"reranked/{model}/{dim}dim-reranked{rerank_dims[0]}_{kept}_{dataset}_{index}"
    else:
        dims, lengths = ",".join(map(str, rerank_dims)), ",".join(map(str, shortlists))
        name = f"funnel_retrieval/{model}/{dim}dim-cascade[{dims}]_shortlist[{lengths}]_{dataset}_{index}"
    return Path(folder) / "neighbors" / f"{name}{ending}"


def parse_list_file(path):
    """-> (recipe, dataset) that a list's name tells, in our spelling or the original's; None if it tells none."""
    for pattern in NAMES:
        if match := re.fullmatch(pattern + r"\.(npy|csv)", Path(path).name):
            found = match.groupdict()
            stages = [tuple(int(d) for d in found.get(key, "").replace(",", " ").split())
                      for key in ("rerank_dims", "shortlists")]
            k = int(found.get("k") or stages[1][0])
            recipe = Recipe(found["index"], int(found["retrieval_dim"]), k, *stages, found.get("storage"))
            return recipe, found["dataset"]
    return None


def list_files(folder, dataset, model, wanted=lambda path, recipe: True):
    """-> {path: recipe} of the wanted lists of a data set and model, our names and the original's, .npy before .csv."""
    found = {}
    for kind in ("", "reranked", "funnel_retrieval"):
        for path in sorted((Path(folder) / "neighbors" / kind / model).glob("[!.]*.[nc][ps][yv]"), reverse=True):
            recipe, its_dataset = parse_list_file(path) or (None, None)
            if its_dataset == dataset and recipe not in found.values() and wanted(path, recipe):
                found[path] = recipe
    return dict(sorted(found.items(), key=lambda item: (min(len(item[1].rerank_dims), 2), item[1].storage or "",
                                                        item[1])))


def read_list(path, n, q):
    """-> I [q, k] of database rows (-1 = none) from .npy or the original's header-less CSV."""
    I = read_csv(path) if str(path).endswith(".csv") else read_array(path)
    if I.ndim != 2 or len(I) != q or not I.size or not np.issubdtype(I.dtype, np.integer):
        raise InputError(f"{path}: must hold integers [{q}, k], holds {I.dtype} {list(I.shape)}")
    if I.min() < -1 or I.max() >= n:
        raise InputError(f"{path}: names row {I.max() if I.max() >= n else I.min()} of a database of {n}; "
                         "it was made from other embeddings")
    return I


def read_csv(path):
    try:
        return pd.read_csv(path, header=None, dtype=np.int32).to_numpy()
    except (ValueError, OverflowError) as error:
        raise InputError(f"{path}: not a CSV of integers without a header ({str(error).strip()})") from None


def write_list(path, record, shape, find, chunk, **measured):
    """Make a list in chunks of queries; an interrupted run goes on with the first chunk not yet done.

    find(lo, hi) -> I [hi - lo, k] for those queries. shape: (q, k). path ends in .npy (int32) or .csv.
    The record gets `measured`, and the seconds that find took over all runs.
    """
    partial = path.with_name(f".{path.name}.partial.npy")
    I, state = begin_list(partial, record, shape)
    with tqdm(total=shape[0], initial=state["done"], desc=path.name, unit="query", delay=2, leave=False) as bar:
        for lo in range(state["done"], shape[0], chunk):
            hi, started = min(lo + chunk, shape[0]), time.perf_counter()
            I[lo:hi] = find(lo, hi)
            state = state | {"done": hi, "seconds": state["seconds"] + time.perf_counter() - started}
            if hi < shape[0]:             # rows must be on disk before the state says they are done
                I.flush()
            write_json(record_file(partial), state)
            bar.update(hi - lo)
    with replacing_with_record(path, record | measured | {"seconds": state["seconds"]}) as temporary:
        if path.suffix == ".csv":
            pd.DataFrame(I).to_csv(temporary, header=False, index=False)
        else:
            os.replace(partial, temporary)
    partial.unlink(missing_ok=True)
    record_file(partial).unlink()


def begin_list(partial, record, shape):
    """-> the list to fill, and how far it is: what an interrupted run left, or new ones."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    state = read_json(record_file(partial)) if has_record(partial, record) else record | {"done": 0, "seconds": 0.0}
    if state["done"]:
        return read_array(partial, "r+"), state
    record_file(partial).unlink(missing_ok=True)       # a stale record must not describe the new file
    return allocate(partial, shape, np.int32), state
