"""Embeddings as fewer numbers without training: what the paper compares prefixes with (Table 2, SVD and JL).

    matrix = fit_svd(xb, 64)               # [D, 64]: the first right singular vectors of the database
    matrix = draw_jl(xb, 64)               # [D, 64]: a Gaussian random projection (Johnson-Lindenstrauss)
    project(study, "svd")                  # arrays beside the embeddings, which all of retrieval reads: --model ff_svd

The first columns of both are the map to fewer numbers (JL's up to scale, which unit length takes away). So one array
serves all sizes, as a nested representation's does.
"""
import re
from functools import cache

import numpy as np
from neighbors import check_size
from records import fingerprint
from serving import check_finite
from study import PROJECTIONS, labels_file
from tqdm import tqdm

from mrl_files import InputError, allocate, json_contains, read_json, replacing, write_json
from mrl_models import default_nesting_list

ROWS = 8192              # at a time


def fit_svd(xb, size):
    """-> [D, size] float32: the right singular vectors of xb [n, D] (not centred) with the largest singular values.

    With all of them it is a rotation, which keeps cosines. The largest number of each vector is positive.
    """
    if size > len(xb):
        raise InputError(f"size {size}: {len(xb)} vectors have no more than {len(xb)} singular values; give --size")
    gram = np.zeros((xb.shape[1],) * 2)
    for lo in tqdm(range(0, len(xb), ROWS), desc="SVD", unit="block", delay=2, leave=False):
        rows = check_finite(xb[lo:lo + ROWS], xb.shape[1], first=lo).astype(np.float64)
        gram += rows.T @ rows
    vectors = np.linalg.eigh(gram)[1][:, ::-1][:, :size]
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], 0)
    return (vectors * np.sign(largest)).astype(np.float32)


def draw_jl(xb, size):
    """-> [D, size] float32: independent normal numbers of variance 1 / size; the same for each database."""
    return (np.random.default_rng(0).standard_normal((size, xb.shape[1])).T / size ** 0.5).astype(np.float32)


FITS = dict(zip(PROJECTIONS, (fit_svd, draw_jl), strict=True))


def project(study, method, size=None):
    """-> the paths of the -X.npy of database and queries, projected by a map that the database gives. -y.npy and .json
    lie beside. Those that fit the embeddings are not made again. size: None is the full width, and so all sizes.
    """
    if study.task.model.endswith(PROJECTIONS):
        raise InputError(f"--model {study.task.model}: is a projection; give the model itself")
    data = study.data(max(study.sizes))
    size, find = check_size(data.xb, size or data.xb.shape[1]), cache(lambda: FITS[method](data.xb, size))
    targets = [path.with_name(re.sub(r"_ff\d+-X", f"_{method}_ff{size}-X", path.name)) for path in data.files]
    check_alone(targets)
    for path, target, X, y in zip(data.files, targets, (data.xb, data.xq), study.labels(data), strict=True):
        source = {"method": method, "database": data.record["database"], "file": fingerprint(path, X)}
        if not (target.exists() and json_contains(target.with_suffix(".json"), {"dim": size, "projection": source})):
            about = (read_json(path.with_suffix(".json")) or {}) | {"projection": source}
            write_projected(target, X, y, find(), about)
    return targets


def check_alone(targets):
    """One projection has one file of each split, whose prefixes are its sizes: of two, --model could not name one."""
    others = [path for target in targets for path in target.parent.glob(re.sub(r"_ff\d+-X", "_ff*-X", target.name))
              if path != target]
    if others:
        raise InputError(f"{' and '.join(map(str, sorted(others)))}: the same projection to another --size: give that "
                         "one, or remove the files")


def write_projected(path, X, y, matrix, about):
    """The JSON goes first and comes last: it never stands beside an array that it does not describe."""
    path.with_suffix(".json").unlink(missing_ok=True)
    shape = len(X), matrix.shape[1]
    with replacing(path) as temporary:
        projected = allocate(temporary, shape, np.float32)
        for lo in tqdm(range(0, len(X), ROWS), desc=path.name, unit="block", delay=2, leave=False):
            projected[lo:lo + ROWS] = check_finite(X[lo:lo + ROWS], X.shape[1], what=path.name, first=lo) @ matrix
        projected.flush()
    with replacing(labels_file(path)) as temporary:
        np.save(temporary, y)
    write_json(path.with_suffix(".json"), about | {
        "n": shape[0], "dim": shape[1], "dtype": "float32", "nesting_list": default_nesting_list(shape[1]),
        "complete": True})
