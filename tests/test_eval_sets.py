"""Sets are found, checked and labelled as their rows say: a wrong rule makes ColourReader wrong."""
import hashlib
import re

import numpy as np
import pytest
import torch
from classification import evaluate
from eval_sets import CLASSIFICATION, HERE, RETRIEVAL, describe_gap, find_row, open_set, read_synsets
from image_set import Preparation, make_loader
from image_trees import SIZE, ColourReader, make_tree

from mrl_files import InputError

IMAGENET = read_synsets("imagenet_synsets.txt")
A, R = read_synsets("imagenet_a_synsets.txt"), read_synsets("imagenet_r_synsets.txt")
PREPARATION = Preparation(SIZE, SIZE)


@pytest.mark.parametrize("file, n, sha256, positions", [
    ("imagenet", 1000, "70002b0ff5de60a3a17a82dbfcff291931f96225ddf941ad2e182fc39e183d15", [0, 1, 2, 3]),
    ("imagenet_a", 200, "9826a24166e74ce62fb87b27889874ca26917542c745712309d6e25855d63bc2", [6, 11, 13, 15]),
    ("imagenet_r", 200, "a6a0729f7a99230280639cab6e51e01485a3b41a676ea35621a501c9d6e83ca4", [1, 2, 4, 6]),
    ("imagenet4k", 4202, "8d12a5f5f5af8cbc62d5e0da6fba72b854ba12125a60e0f869376e5680d7dc5c", None),
])
def test_class_lists(file, n, sha256, positions):
    """To the byte as they were compared with their sources; the first positions are those the authors' code lists."""
    path, listed = HERE / f"{file}_synsets.txt", read_synsets(f"{file}_synsets.txt")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256
    assert len(set(listed)) == n and all(re.fullmatch(r"n\d{8}", synset) for synset in listed)
    assert positions is None or [IMAGENET.index(synset) for synset in listed[:4]] == positions


def opened(name, root, num_classes=1000, table=CLASSIFICATION, split=None):
    row = find_row(table, name)[1]
    return open_set(row[split] if split else row, num_classes, PREPARATION, root, any_classes=split is not None)


def accuracy(images):
    loader = make_loader(images, batch_size=300, workers=0)
    return evaluate(ColourReader(1000), images, loader, torch.device("cpu"))["top1"]


@pytest.mark.parametrize("name, folder, classes", [
    ("V1", "val", IMAGENET),
    ("v2", "imagenetv2-matched-frequency-format-val", [str(i) for i in range(1000)]),
    ("V2-threshold-0.7", "imagenetv2-threshold0.7", [str(i) for i in range(1000)]),
    ("V2-top-images", "imagenetv2-top-images-format-val", [str(i) for i in range(1000)]),
    ("V2", "ImageNetV2-matched-frequency", [str(i) for i in range(1000)]),
    ("sketch", "imagenet-sketch/sketch", IMAGENET),
    ("Sketch", "ImageNet-Sketch/sketch", IMAGENET),
    ("Sketch", "imagenet-sketch", IMAGENET),
    ("A", "imagenet-a", {wnid: IMAGENET.index(wnid) for wnid in A}),
    ("R", "imagenet-r_", {wnid: IMAGENET.index(wnid) for wnid in R}),
])
def test_true_folder_names_give_true_labels(tmp_path, name, folder, classes):
    make_tree(tmp_path / folder, classes)
    (tmp_path / folder / "README.txt").write_text("ImageNet-A and -R come with one")
    images = opened(name, tmp_path)
    assert len(images) == len(classes)
    right, next_class = accuracy(images)
    assert right == 1 and next_class <= 0.005


def test_v2_folder_10_is_class_10_not_class_2(tmp_path):
    make_tree(tmp_path / "imagenetv2-matched-frequency", [str(i) for i in range(12)])
    images = opened("V2", tmp_path, num_classes=12)
    labels = {images.path(i).parent.name: images[i][1] for i in range(12)}
    assert labels == {str(i): i for i in range(12)}


def test_subset_keeps_200_logits_in_synset_order(tmp_path):
    make_tree(tmp_path / "imagenet-a", A)
    images = opened("A", tmp_path)
    assert [IMAGENET[i] for i in images.subset] == images.classes == A
    with pytest.raises(InputError, match="is for checkpoints of ImageNet-1K's 1,000 classes; this one has 10"):
        opened("A", tmp_path, num_classes=10)


def test_4k_labels_are_positions_in_sorted_folders(tmp_path):
    wnids = read_synsets("imagenet4k_synsets.txt")
    assert len(wnids) == 4202 and wnids == sorted(wnids)
    for split in ("train", "val"):
        make_tree(tmp_path / "imagenet-4k" / split, wnids)
        images = opened("4K", tmp_path, table=RETRIEVAL, split=split)
        assert images.labels.tolist() == list(range(4202)) and images.labels.dtype == np.int64
        assert [images.path(i).parent.name for i in (0, 4201)] == [wnids[0], wnids[-1]]


# ------------------------------------------------------------------------------------------------ refusals

def test_incomplete_set_says_what_is_missing_and_where_to_get_it(tmp_path):
    make_tree(tmp_path / "imagenet-a", [w for w in A if w != "n01498041"])
    with pytest.raises(InputError, match=r"needs 200 class folders, found 199 .*missing n01498041; .*github"):
        opened("A", tmp_path)


def test_wrong_folder_is_named(tmp_path):
    make_tree(tmp_path / "sketch", ["n99999999" if w == IMAGENET[5] else w for w in IMAGENET])
    with pytest.raises(InputError, match=f"missing {IMAGENET[5]}; not of it n99999999"):
        opened("Sketch", tmp_path)


@pytest.mark.parametrize("table, name, split", [(CLASSIFICATION, "V1", None), (RETRIEVAL, "1K", "val")])
def test_some_of_imagenets_classes_keep_their_labels(tmp_path, table, name, split):
    """Imagenette, ImageNet-100: for a checkpoint of all 1,000 classes, over all its logits, and with a note."""
    make_tree(tmp_path / "val", {wnid: IMAGENET.index(wnid) for wnid in IMAGENET[3:900:100]})
    images = opened(name, tmp_path, table=table, split=split)
    assert images.labels.tolist() == list(range(3, 900, 100)) and images.subset is None
    assert accuracy(images) == [1, 0]
    assert images.path(1).parent.name == IMAGENET[103]
    assert describe_gap(CLASSIFICATION["V1"], images) == f"note: {tmp_path}/val holds 9 of 1,000 classes"
    (tmp_path / "val/junk").mkdir()
    with pytest.raises(InputError, match=r"needs 1000 class folders, found 10 .*not of it junk"):
        opened(name, tmp_path, table=table, split=split)


def test_for_a_checkpoint_of_as_many_classes_they_are_its_own(tmp_path):
    make_tree(tmp_path / "val", IMAGENET[3:900:100])
    images = opened("V1", tmp_path, num_classes=9)
    assert images.labels.tolist() == list(range(9)) and describe_gap(CLASSIFICATION["V1"], images) is None


def test_v2_is_embedded_by_a_checkpoint_of_any_classes(tmp_path):
    make_tree(tmp_path / "imagenetv2-matched-frequency", [str(i) for i in range(1000)])
    assert opened("V2", tmp_path, num_classes=10, table=RETRIEVAL, split="val").labels.tolist() == list(range(1000))
    (tmp_path / "imagenetv2-matched-frequency" / "999").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"needs 1000 class folders, found 999 .*missing 999"):
        opened("V2", tmp_path, num_classes=10, table=RETRIEVAL, split="val")


@pytest.mark.parametrize("table, name, split", [(CLASSIFICATION, "V1", None), (RETRIEVAL, "1K", "val")])
def test_images_without_class_folders(tmp_path, table, name, split):
    """ImageNet's own tar file of the validation set unpacks so."""
    make_tree(tmp_path, ["val"])
    with pytest.raises(InputError, match=r"val has no class folders: ImageNet-1K val is 1,000 synset folders "
                                         r"\(n01440764 ...\), from https://www.image-net.org"):
        opened(name, tmp_path, table=table, split=split)


def test_missing_set(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"ImageNet-R is not there: .*imagenet-r or .*imagenet-r_; get it from https"):
        opened("R", tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("IMAGENET_ROOT", "~/elsewhere")
    with pytest.raises(InputError, match=f"{tmp_path}/elsewhere/val"):
        opened("V1", None)


def test_unknown_name_lists_the_known():
    with pytest.raises(InputError, match=r"--dataset sketchy: unknown here; one of V1, V2, .*Sketch"):
        find_row(CLASSIFICATION, "sketchy")
    assert find_row(CLASSIFICATION, "SKETCH")[0] == "Sketch"


def test_a_set_that_lacks_images_is_noted(tmp_path):
    make_tree(tmp_path / "imagenet-a", A)
    make_tree(tmp_path / "val", ["a", "b"])
    assert describe_gap(CLASSIFICATION["A"], opened("A", tmp_path)) == \
        f"note: ImageNet-A has 7500 images, {tmp_path}/imagenet-a holds 200"
    assert describe_gap(CLASSIFICATION["A"]._replace(images=200), opened("A", tmp_path)) is None
    assert describe_gap(CLASSIFICATION["V1"], opened("V1", tmp_path, num_classes=2)) is None


def test_own_classes_are_taken_as_they_are_but_counted(tmp_path):
    make_tree(tmp_path / "val", [str(i) for i in range(12)])
    images = opened("V1", tmp_path, num_classes=12)
    assert images.classes == [str(i) for i in range(12)]           # sorted as text, "10" would stand before "2"
    assert accuracy(images) == [1, 0]
    with pytest.raises(InputError, match="has 12 class folders, the checkpoint 10 classes"):
        opened("V1", tmp_path, num_classes=10)
    assert len(opened("1K", tmp_path, num_classes=10, table=RETRIEVAL, split="val")) == 12


def test_empty_class_folders_are_named(tmp_path):
    make_tree(tmp_path / "val", ["a", "c"])
    (tmp_path / "val" / "b").mkdir()
    (tmp_path / "val" / "b" / "notes.txt").write_text("no image")
    with pytest.raises(InputError, match=r"1 class folder\(s\) hold no images: b"):
        opened("V1", tmp_path, num_classes=3)
