"""Records: what an index or a list of neighbours was made from, as a JSON file beside it.

A record holds fingerprints of the embeddings, and the settings. What has no record that fits is made again.
"""
import hashlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from mrl_files import json_contains, replacing, write_json


def fingerprint(path, X):
    """What tells one embedding file from another, without reading all of it.

    Shape, dtype, the time of writing, and a hash of up to 1,024 rows from first to last.
    """
    rows = np.unique(np.linspace(0, len(X) - 1, 1024).astype(int))
    return {"file": Path(path).name, "shape": list(X.shape), "dtype": str(X.dtype),
            "written_ns": Path(path).stat().st_mtime_ns, "rows": hashlib.sha256(X[rows].tobytes()).hexdigest()}


def record_file(path):
    return Path(f"{path}.json")


def has_record(path, record):
    """Is `path` there, with a record that says everything in `record`?"""
    return Path(path).exists() and json_contains(record_file(path), record)


@contextmanager
def replacing_with_record(path, record):
    """A temporary path to write to; then it becomes `path`, with its record beside it.

    The old record goes just before the old file: a record never stands beside a file that it does not describe.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        yield temporary
        record_file(path).unlink(missing_ok=True)
    write_json(record_file(path), record)
