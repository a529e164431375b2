"""The arrays that retrieval reads, and the records that tell which embeddings an index or a list was made from.

    file = embeddings_file("../inference", "1K", "train", "mrl")      # ../inference/1K_train_mrl1_e0_ff2048-X.npy
    xb = mrl_files.read_embeddings(file)                              # [n, D], memory-mapped
    yb = mrl_files.read_labels(labels_file(file), len(xb))            # [n] int64

inference/ writes these files; stages.py reads them. A record is a JSON file beside an index or a list: fingerprints of
the embeddings, and the settings. What has no record that fits is made again.
"""
import hashlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from mrl_files import InputError, json_says, replacing, write_json

MODELS = {"mrl": "mrl1_e0", "mrl_e": "mrl1_e1", "ff": "mrl0_e0"}


# ------------------------------------------------------------------------------------------------ embeddings

def embeddings_files(folder, dataset, split, model):
    """-> {size: path} of the -X.npy files of one model: one for MRL and MRL-E, one for each size of FF."""
    if model not in MODELS:
        raise InputError(f"unknown model {model!r}: {', '.join(MODELS)}")
    # ImageNetV2 is a query set only; its database is ImageNet-1K's.
    stem = f"{'1K' if (dataset, split) == ('V2', 'train') else dataset}_{split}_{MODELS[model]}_ff"
    files = {}
    for path in Path(folder).glob("*-X.npy"):
        size = path.name.removeprefix(stem).removesuffix("-X.npy")
        if path.name.startswith(stem) and size.isdigit():
            files[int(size)] = path
    if not files:
        raise InputError(f"{Path(folder) / stem}<size>-X.npy: no such file; inference/pytorch_inference.py "
                         "--retrieval writes it")
    return dict(sorted(files.items()))


def embeddings_file(folder, dataset, split, model, size=None):
    """-> the -X.npy file that holds a representation size: the nested model's only file, or FF's file of that size."""
    files = embeddings_files(folder, dataset, split, model)
    if model == "ff" and size not in files:
        raise InputError(f"{folder}: {dataset} {split} has fixed-feature embeddings of the sizes {list(files)}, "
                         f"not {size}")
    if model != "ff" and len(files) > 1:
        raise InputError(f"{folder}: several files fit ({', '.join(p.name for p in files.values())}); keep one there")
    return files[size] if model == "ff" else next(iter(files.values()))


def labels_file(embeddings):
    return Path(f"{str(embeddings).removesuffix('-X.npy')}-y.npy")


def fingerprint(path, X):
    """What tells one embedding file from another, without reading all of it.

    Shape, dtype, the time of writing, and a hash of up to 1,024 rows from first to last.
    """
    rows = np.unique(np.linspace(0, len(X) - 1, 1024).astype(int))
    return {"file": Path(path).name, "shape": list(X.shape), "dtype": str(X.dtype),
            "written_ns": Path(path).stat().st_mtime_ns, "rows": hashlib.sha256(X[rows].tobytes()).hexdigest()}


# ------------------------------------------------------------------------------------------------ records

def record_file(path):
    return Path(f"{path}.json")


def fits(path, wanted):
    """Is `path` there, with a record that says everything in `wanted`?"""
    return Path(path).exists() and json_says(record_file(path), wanted)


@contextmanager
def recorded(path, record):
    """A temporary path to write to; then it becomes `path`, with its record beside it.

    The old record goes just before the old file: a record never stands beside a file that it does not describe.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        yield temporary
        record_file(path).unlink(missing_ok=True)
    write_json(record_file(path), record)
