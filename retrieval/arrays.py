"""The arrays that retrieval reads, and the records that tell which embeddings an index or a list was made from.

    xb = read_embeddings(embeddings_file("../inference", "1K", "train", "mrl"))      # [n, D], memory-mapped
    yb = read_labels("../inference/1K_train_mrl1_e0_ff2048-y.npy", len(xb))          # [n] int64

inference/ writes these files; stages.py reads them. A record is a JSON file beside an index or a list: fingerprints of
the embeddings, and the settings. What has no record that fits is made again.
"""
import hashlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from MRL import InputError, exact_labels, json_says, read_array, read_json, replacing, write_json

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


def read_embeddings(path):
    """-> [n, D] float32 or float16, memory-mapped, if the file and the companion beside it are complete."""
    X = read_array(path)
    if X.ndim != 2 or 0 in X.shape or X.dtype not in (np.float32, np.float16):
        raise InputError(f"{path}: must be float32 or float16 [N, D], is {X.dtype} {list(X.shape)}")
    side = companion(path)
    if not side.get("complete", True):
        raise InputError(f"{path}: unfinished; run the same inference command again to complete it")
    if (side.get("n", X.shape[0]), side.get("dim", X.shape[1])) != X.shape:
        raise InputError(f"{path}: is {list(X.shape)}, but {companion_file(path).name} says "
                         f"[{side.get('n')}, {side.get('dim')}]; write both again")
    return X


def companion(path):
    """What inference noted beside an -X.npy file: nesting_list, n, dim, complete, ...; empty where it noted nothing."""
    return read_json(companion_file(path)) or {}


def companion_file(path):
    return Path(path).with_suffix(".json")


def read_labels(path, n):
    """-> [n] int64. The original's float16 [n, 1] files are read where float16 is exact."""
    y = read_array(path)
    if y.shape not in ((n,), (n, 1)):
        raise InputError(f"{path}: {list(y.shape)} labels do not fit {n} embeddings; write both again")
    return exact_labels(y, path).reshape(-1)


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
