"""study.py: which files are found, opened once, and what is refused."""
import pytest
import retrieval_world
import study
from study import Study, Task, labels_file

from mrl_files import InputError


def find(folder, dataset, model, split, size):
    return Study(Task(str(folder), dataset=dataset, model=model)).file(split, size)


@pytest.fixture
def folder(tmp_path):
    return retrieval_world.write(tmp_path, retrieval_world.world(50, 10, 16), nesting_list=[8, 16])


def test_files_of_each_model(folder):
    small = retrieval_world.world(50, 10, 8)
    retrieval_world.write(folder, small, model="mrl0_e0")
    retrieval_world.write(folder, retrieval_world.world(50, 10, 16), model="mrl0_e0")
    retrieval_world.write(folder, small, model="mrl1_e1", dataset="my.set")
    assert find(folder, "1K", "mrl", "train", 16).name == "1K_train_mrl1_e0_ff16-X.npy"
    assert find(folder, "my.set", "mrl_e", "val", 16).name == "my.set_val_mrl1_e1_ff8-X.npy"
    assert {d: p.name for d, p in Study(Task(str(folder), model="ff")).files["val"].items()} == {
        8: "1K_val_mrl0_e0_ff8-X.npy", 16: "1K_val_mrl0_e0_ff16-X.npy"}
    assert find(folder, "1K", "ff", "train", 8).name == "1K_train_mrl0_e0_ff8-X.npy"
    with pytest.raises(InputError, match=r"sizes \[8, 16\], not 32"):
        find(folder, "1K", "ff", "train", 32)


def test_imagenetv2_is_searched_in_1ks_database(folder):
    retrieval_world.write(folder, retrieval_world.world(50, 10, 16), dataset="V2", splits=["val"])
    assert find(folder, "V2", "mrl", "train", 16).name == "1K_train_mrl1_e0_ff16-X.npy"
    assert find(folder, "V2", "mrl", "val", 16).name == "V2_val_mrl1_e0_ff16-X.npy"


@pytest.mark.parametrize("dataset, model, complaint", [
    ("4K", "mrl", r"4K_train_mrl1_e0_ff<size>-X.npy: no such file"), ("1K", "mlr", "unknown model 'mlr'"),
    ("1K", "mrl_e", "mrl1_e1_ff<size>-X.npy: no such file")])
def test_missing_files_are_named(folder, dataset, model, complaint):
    with pytest.raises(InputError, match=complaint):
        Study(Task(str(folder), dataset=dataset, model=model))


def test_two_widths_of_a_nested_model_are_ambiguous(folder):
    retrieval_world.write(folder, retrieval_world.world(50, 10, 8))
    with pytest.raises(InputError, match="several files fit"):
        find(folder, "1K", "mrl", "train", 16)


def test_labels_stand_beside_the_embeddings():
    assert str(labels_file("a/1K_val_mrl1_e0_ff8-X.npy")) == "a/1K_val_mrl1_e0_ff8-y.npy"


def test_files_are_opened_once(folder, monkeypatch):
    opened, read = [], study.read_embeddings
    monkeypatch.setattr("study.read_embeddings", lambda path: opened.append(path.name) or read(path))
    of_all = Study(Task(str(folder)))
    for each in (of_all, of_all.with_index("hnsw32")):
        for size in each.sizes:
            assert each.data(size) is of_all.data(16) and each.labels(each.data(size)) is of_all.labels(of_all.data(16))
    assert sorted(opened) == ["1K_train_mrl1_e0_ff16-X.npy", "1K_val_mrl1_e0_ff16-X.npy"]
