"""arrays.py: which files are found, what is refused, and when a record fits."""
import os

import numpy as np
import pytest
import retrieval_world
from arrays import (
    embeddings_file,
    embeddings_files,
    fingerprint,
    fits,
    labels_file,
    recorded,
)

from mrl_files import InputError


@pytest.fixture
def folder(tmp_path):
    return retrieval_world.write(tmp_path, retrieval_world.world(50, 10, 16), nesting_list=[8, 16])


def test_files_of_each_model(folder):
    small = retrieval_world.world(50, 10, 8)
    retrieval_world.write(folder, small, model="mrl0_e0")
    retrieval_world.write(folder, retrieval_world.world(50, 10, 16), model="mrl0_e0")
    retrieval_world.write(folder, small, model="mrl1_e1", dataset="my.set")
    assert embeddings_file(folder, "1K", "train", "mrl").name == "1K_train_mrl1_e0_ff16-X.npy"
    assert embeddings_file(folder, "my.set", "val", "mrl_e").name == "my.set_val_mrl1_e1_ff8-X.npy"
    assert {d: p.name for d, p in embeddings_files(folder, "1K", "val", "ff").items()} == {
        8: "1K_val_mrl0_e0_ff8-X.npy", 16: "1K_val_mrl0_e0_ff16-X.npy"}
    assert embeddings_file(folder, "1K", "train", "ff", 8).name == "1K_train_mrl0_e0_ff8-X.npy"
    with pytest.raises(InputError, match=r"sizes \[8, 16\], not 32"):
        embeddings_file(folder, "1K", "train", "ff", 32)


def test_imagenetv2_is_searched_in_1ks_database(folder):
    retrieval_world.write(folder, retrieval_world.world(50, 10, 16), dataset="V2", splits=["val"])
    assert embeddings_file(folder, "V2", "train", "mrl").name == "1K_train_mrl1_e0_ff16-X.npy"
    assert embeddings_file(folder, "V2", "val", "mrl").name == "V2_val_mrl1_e0_ff16-X.npy"


@pytest.mark.parametrize("dataset, model, complaint", [
    ("4K", "mrl", r"4K_train_mrl1_e0_ff<size>-X.npy: no such file"), ("1K", "mlr", "unknown model 'mlr'"),
    ("1K", "mrl_e", "mrl1_e1_ff<size>-X.npy: no such file")])
def test_missing_files_are_named(folder, dataset, model, complaint):
    with pytest.raises(InputError, match=complaint):
        embeddings_file(folder, dataset, "train", model)


def test_two_widths_of_a_nested_model_are_ambiguous(folder):
    retrieval_world.write(folder, retrieval_world.world(50, 10, 8))
    with pytest.raises(InputError, match="several files fit"):
        embeddings_file(folder, "1K", "train", "mrl")


def test_labels_stand_beside_the_embeddings():
    assert str(labels_file("a/1K_val_mrl1_e0_ff8-X.npy")) == "a/1K_val_mrl1_e0_ff8-y.npy"


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
    assert not fits(path, record)
    with recorded(path, record | {"seconds": 1.5}) as temporary:
        temporary.write_text("here")
    assert path.read_text() == "here" and fits(path, record) and fits(path, {"k": 5})
    assert not fits(path, record | {"k": 6}) and not fits(path, record | {"more": 1})
    path.unlink()
    assert not fits(path, record)


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "list.npy"
    with recorded(path, {"k": 1}) as temporary:
        temporary.write_text("old")
    with pytest.raises(KeyboardInterrupt), recorded(path, {"k": 2}):
        raise KeyboardInterrupt
    assert path.read_text() == "old" and fits(path, {"k": 1})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["list.npy", "list.npy.json"]
