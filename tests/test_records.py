"""records.py: what a fingerprint tells apart, and when a record fits."""
import os

import numpy as np
import pytest
import retrieval_world
from records import fingerprint, has_record, replacing_with_record


def test_a_fingerprint_tells_embeddings_apart(tmp_path):
    X = retrieval_world.world(3000, 1, 4)[0]
    path = tmp_path / "X.npy"

    def of(array, time=1):
        np.save(path, array)
        os.utime(path, ns=(time, time))
        return fingerprint(path, np.load(path, mmap_mode="r"))
    first, changed = of(X), X.copy()
    changed[0, 0] += 1
    assert of(X) == first
    assert of(changed) != first                                       # another content at the same time
    assert of(X, time=2) != first                                     # written again
    assert of(X[:-1]) != first and of(X.astype(np.float16)) != first


def test_a_record_fits_only_what_it_describes(tmp_path):
    path, record = tmp_path / "deep" / "list.npy", {"k": 5, "dims": (1, 2)}
    assert not has_record(path, record)
    with replacing_with_record(path, record | {"seconds": 1.5}) as temporary:
        temporary.write_text("here")
    assert path.read_text() == "here" and has_record(path, record) and has_record(path, {"k": 5})
    assert not has_record(path, record | {"k": 6}) and not has_record(path, record | {"more": 1})
    path.unlink()
    assert not has_record(path, record)


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "list.npy"
    with replacing_with_record(path, {"k": 1}) as temporary:
        temporary.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing_with_record(path, {"k": 2}):
        raise KeyboardInterrupt
    assert path.read_text() == "old" and has_record(path, {"k": 1})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["list.npy", "list.npy.json"]
