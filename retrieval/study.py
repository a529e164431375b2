"""What a command of retrieval works on: its settings, and the embeddings that inference/ wrote, opened once.

    study = Study(Task(embeddings="../inference", dataset="1K", model="mrl"))
    data = study.data(16)                # the embeddings that hold size 16: data.xb [n, D], data.xq [q, D]
    study.labels(data)                   # yb [n], yq [q] int64

The files are {1K|V2|4K|<name>}_{train|val}_{model}_ff<size>-X.npy and -y.npy. train is the database, val the queries.
"""
from copy import copy
from pathlib import Path
from typing import NamedTuple

import numpy as np
from indexes import INDEXES
from neighbors import MEMORY_GB
from records import fingerprint

from mrl_files import InputError, read_embeddings, read_json, read_labels
from mrl_models import default_nesting_list

MODELS = {"mrl": "mrl1_e0", "mrl_e": "mrl1_e1", "ff": "mrl0_e0"}
PROJECTIONS = ("svd", "jl")              # of a model's embeddings, by projection.py: ff_svd, ff_jl ...
MODELS |= {f"{model}_{method}": f"{name}_{method}" for model, name in MODELS.items() for method in PROJECTIONS}


class Task(NamedTuple):
    """What all commands and notebooks set."""
    embeddings: str = "../inference"     # folder of the -X.npy and -y.npy files
    output: str = "."                    # folder for index_files/, neighbors/ and report/
    dataset: str = "1K"
    model: str = "mrl"                   # a key of MODELS
    index: str = "exactl2"               # a row of indexes.INDEXES
    csv: bool = False                    # lists as header-less CSV, the original's format
    memory_gb: float = MEMORY_GB         # of vectors held at once
    device: str = "auto"                 # for exact search: auto, cpu or cuda
    nlist: int | None = None             # clusters of an IVF index; None: indexes.choose_clusters
    nprobe: int | None = None            # of them, those that a search visits; None: indexes.choose_probes

    @property
    def database(self):
        """The data set that is searched: ImageNetV2 is a query set only; its database is ImageNet-1K's."""
        return "1K" if self.dataset == "V2" else self.dataset

    @property
    def cluster_settings(self):
        """What a record says beside the index's name, of those that have clusters."""
        clustered = self.index in INDEXES and INDEXES[self.index].clustered
        return {"nlist": self.nlist, "nprobe": self.nprobe} if clustered else {}


class Data(NamedTuple):
    """The embeddings of one model."""
    xb: np.ndarray                       # [n, D] database, memory-mapped
    xq: np.ndarray                       # [q, D] queries
    record: dict                         # their fingerprints
    files: tuple                         # their paths


class Study:
    """task: the settings. sizes: those to search at; FF: those there are files of; MRL, MRL-E: those that inference
    noted, else 8, 16 ... up to the width. Each file is opened at its first use, and kept open."""

    def __init__(self, task):
        self.task, self.opened, self.read = task, {}, {}
        self.files = {split: find_embeddings(task, split) for split in ("train", "val")}
        self.sizes = list(self.files["train"]) if task.model == "ff" else self.nesting_list()

    def nesting_list(self):
        (path,) = self.files["train"].values()
        noted = read_json(path.with_suffix(".json")) or {}
        return noted.get("nesting_list") or default_nesting_list(read_embeddings(path).shape[1])

    def with_index(self, index):
        """-> the same study with another index of the first stage; it shares what is open."""
        other = copy(self)
        other.task = self.task._replace(index=index)
        return other

    def data(self, size):
        """-> the Data that hold a size: FF's of exactly that size, the nested model's only ones."""
        files = tuple(self.file(split, size) for split in ("train", "val"))
        if files not in self.opened:
            self.opened[files] = open_data(files)
        data = self.opened[files]
        if size > data.xb.shape[1]:
            raise InputError(f"{files[0]}: has {data.xb.shape[1]} dimensions, size {size} is past them")
        return data

    def file(self, split, size):
        files = self.files[split]
        if self.task.model == "ff" and size not in files:
            raise InputError(f"{self.task.embeddings}: {self.task.dataset} {split} has fixed-feature embeddings of the "
                             f"sizes {list(files)}, not {size}")
        return files[size] if self.task.model == "ff" else next(iter(files.values()))

    def labels(self, data):
        """-> yb [n], yq [q] int64."""
        if data.files not in self.read:
            self.read[data.files] = tuple(read_labels(labels_file(path), len(x))
                                          for path, x in zip(data.files, (data.xb, data.xq), strict=True))
        return self.read[data.files]


def find_embeddings(task, split):
    """-> {size: path} of the -X.npy files of a model: one for MRL and MRL-E, one for each size of FF."""
    if task.model not in MODELS:
        raise InputError(f"unknown model {task.model!r}: {', '.join(MODELS)}")
    stem = f"{task.database if split == 'train' else task.dataset}_{split}_{MODELS[task.model]}_ff"
    files = {}
    for path in Path(task.embeddings).glob("*-X.npy"):
        size = path.name.removeprefix(stem).removesuffix("-X.npy")
        if path.name.startswith(stem) and size.isdigit():
            files[int(size)] = path
    if not files:
        raise InputError(f"{Path(task.embeddings) / stem}<size>-X.npy: no such file; inference/pytorch_inference.py "
                         "--retrieval writes it")
    if task.model != "ff" and len(files) > 1:
        raise InputError(f"{task.embeddings}: several files fit ({', '.join(p.name for p in files.values())}); "
                         "keep one there")
    return dict(sorted(files.items()))


def labels_file(embeddings):
    return Path(f"{str(embeddings).removesuffix('-X.npy')}-y.npy")


def open_data(files):
    xb, xq = map(read_embeddings, files)
    if xb.shape[1] != xq.shape[1]:
        raise InputError(f"{files[1]}: {xq.shape[1]} dimensions, the database {files[0].name} has {xb.shape[1]}")
    return Data(xb, xq, {"database": fingerprint(files[0], xb), "queries": fingerprint(files[1], xq)}, files)
