"""Small seeded embeddings for the tests of retrieval/: clustered, with the variance in the first numbers."""
import json
from pathlib import Path

import numpy as np


def world(n, q, d, classes=20, seed=0):
    """-> xb [n, d], yb [n], xq [q, d], yq [q]: float32 around class means, rows in class order as an ImageFolder's."""
    rng, place = np.random.default_rng(seed), np.arange(d)
    means = rng.standard_normal((classes, d)) / (1 + place / 10)

    def draw(count):
        y = np.sort(rng.integers(0, classes, count))
        return (means[y] + 0.5 * rng.standard_normal((count, d)) / (1 + place / 5)).astype(np.float32), y
    return (*draw(n), *draw(q))


def golden_world():
    """The arrays that tests/golden/README.md describes for golden_retrieval."""
    r, n, q, d, C, noise = np.random.default_rng(17), 4000, 60, 256, 20, 1.1
    scale = 1 / np.sqrt(1 + np.arange(d))
    mu = r.standard_normal((C, d)) * scale
    yb, yq = r.integers(0, C, n), r.integers(0, C, q)
    xb, xq = (mu[y] + noise * r.standard_normal((len(y), d)) * scale for y in (yb, yq))
    return np.abs(xb.astype(np.float32)), yb, np.abs(xq.astype(np.float32)), yq


def unit(x, dim):
    x = x[:, :dim].astype(np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def distances(xb, xq, dim):
    """-> [q, n] float64 squared L2 distances of unit prefixes, by brute force."""
    return 2 - 2 * unit(xq, dim) @ unit(xb, dim).T


def assert_nearest(xb, xq, dim, I, D=None, among=None, slack=2e-6):
    """I holds nearest neighbours on the prefix, nearest first; equals may stand for each other.

    Compared by true distance: of each place with the sorted distances of all rows (or of the rows `among`).
    """
    truth = distances(xb, xq, dim)
    candidates = truth if among is None else np.take_along_axis(truth, among, 1)
    np.testing.assert_allclose(np.take_along_axis(truth, I, 1), np.sort(candidates, 1)[:, :I.shape[1]], atol=slack)
    assert all(len(set(row)) == len(row) for row in I.tolist())
    if D is not None:
        np.testing.assert_allclose(D, np.take_along_axis(truth, I, 1), atol=slack)


def write(folder, arrays, dataset="1K", model="mrl1_e0", nesting_list=None, splits=("train", "val")):
    """Write a world as inference/ does; -> the folder."""
    xb, yb, xq, yq = arrays
    Path(folder).mkdir(parents=True, exist_ok=True)
    for split, X, y in (("train", xb, yb), ("val", xq, yq)):
        if split in splits:
            stem = f"{folder}/{dataset}_{split}_{model}_ff{X.shape[1]}"
            np.save(f"{stem}-X.npy", X)
            np.save(f"{stem}-y.npy", y)
            if nesting_list:
                Path(f"{stem}-X.json").write_text(json.dumps(
                    {"n": len(X), "dim": X.shape[1], "dtype": str(X.dtype), "nesting_list": nesting_list,
                     "complete": True}))
    return Path(folder)
