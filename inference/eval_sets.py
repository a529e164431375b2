"""The evaluation sets as rows of data: where a set lies, which class folders it must have, and where to get it.

`open_set` checks the folders against the row and lists the images, for classification.py and embeddings.py.
"""
import os
from pathlib import Path
from typing import NamedTuple

from image_set import ImageSet

from mrl_files import InputError, file_path, rank
from mrl_images import class_folders, label_order, shorten

HERE = Path(__file__).resolve().parent
SYNSETS, SYNSETS_4K = "imagenet_synsets.txt", "imagenet4k_synsets.txt"


class Row(NamedTuple):
    title: str
    folders: tuple       # under the data root; the first that exists is taken
    classes: str         # file of synsets, labels in sorted order; "integers": the folder's name is the label
    images: int          # in the full set
    source: str          # where to get it
    own: bool = False    # True: a folder without ImageNet's synsets (a user's own images) is taken as it is


IMAGENET = "https://www.image-net.org"
V2_SOURCE = "https://github.com/modestyachts/ImageNetV2"


def v2(title, folder, package):      # package: the name that the package ImageNetV2_pytorch gives it
    return Row(title, (f"{folder}-format-val", folder, package), "integers", 10_000, V2_SOURCE)


V1 = Row("ImageNet-1K val", ("val",), SYNSETS, 50_000, IMAGENET, own=True)
V2 = v2("ImageNetV2 matched-frequency", "imagenetv2-matched-frequency", "ImageNetV2-matched-frequency")

CLASSIFICATION = {
    "V1": V1,
    "V2": V2,
    "V2-threshold-0.7": v2("ImageNetV2 threshold 0.7", "imagenetv2-threshold0.7", "ImageNetV2-threshold-0.7"),
    "V2-top-images": v2("ImageNetV2 top images", "imagenetv2-top-images", "ImageNetV2-top-images"),
    "A": Row("ImageNet-A", ("imagenet-a",), "imagenet_a_synsets.txt", 7_500,
             "https://github.com/hendrycks/natural-adv-examples"),
    "R": Row("ImageNet-R", ("imagenet-r", "imagenet-r_"), "imagenet_r_synsets.txt", 30_000,
             "https://github.com/hendrycks/imagenet-r"),
    "Sketch": Row("ImageNet-Sketch",
                  ("sketch", "imagenet-sketch/sketch", "ImageNet-Sketch/sketch", "imagenet-sketch", "ImageNet-Sketch"),
                  SYNSETS, 50_889, "https://github.com/HaohanWang/ImageNet-Sketch"),
}

# What is embedded for retrieval: the database is the split `train`, the queries `val`. V2 searches 1K's database.
RETRIEVAL = {
    "1K": {"val": V1, "train": Row("ImageNet-1K train", ("train",), SYNSETS, 1_281_167, IMAGENET, own=True)},
    "V2": {"val": V2},
    "4K": {"val": Row("ImageNet-4K val", ("imagenet-4k/val",), SYNSETS_4K, 210_100, "imagenet-4k/README.md"),
           "train": Row("ImageNet-4K train", ("imagenet-4k/train",), SYNSETS_4K, 4_202_000, "imagenet-4k/README.md")},
}


def find_row(table, name):
    """-> (the set's name as the table spells it, its row). Upper and lower case are the same."""
    spelled = {key.lower(): key for key in table}
    if name.lower() not in spelled:
        raise InputError(f"--dataset {name}: unknown here; one of {', '.join(table)}")
    return spelled[name.lower()], table[spelled[name.lower()]]


# ------------------------------------------------------------------------------------------------ finding a set

def open_set(row, num_classes, transform, data_root=None, any_classes=False):
    """The images of a row, after its folders have been checked.

    num_classes: those of the checkpoint. any_classes: for embeddings, where the checkpoint's classes do not matter.
    -> ImageSet; a line says so where images are fewer than the row's. InputError for a set that is missing, incomplete
    or has other classes.
    """
    folder = find_folder(row, data_root)
    found = class_folders(folder)
    classes, subset = choose_classes(row, folder, found, num_classes, any_classes)
    images = ImageSet(folder, classes, subset, transform, found)
    if (note := describe_gap(row, images)) and rank() == 0:
        print(note)
    return images


def describe_gap(row, images):
    """-> a line that says so if the classes are the row's, but not all of them or not all its images are there."""
    if len(images.found) < len(images.classes):
        return f"note: {images.folder} holds {len(images.found)} of {len(images.classes):,} classes"
    the_rows = len(images.classes) == 1000 if row.classes == "integers" else images.classes == read_synsets(row.classes)
    if the_rows and len(images) != row.images:
        return f"note: {row.title} has {row.images} images, {images.folder} holds {len(images)}"


def find_folder(row, data_root):
    root = data_root or os.environ.get("IMAGENET_ROOT")      # else the original's; where its README says
    roots = [Path(file_path(root))] if root else [HERE.parents[1] / "IMAGENET", HERE.parent]
    candidates = [root / folder for root in roots for folder in row.folders]
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise InputError(f"{row.title} is not there: no folder {' or '.join(map(str, candidates))}; "
                     f"get it from {row.source}, or give --data_root")


def read_synsets(file):
    """-> the synsets of a class list in label order, which is sorted order (ImageNet-4K's list is not sorted)."""
    return sorted((HERE / file).read_text(encoding="utf-8").split())


def choose_classes(row, folder, found, num_classes, any_classes):
    """-> (class folders in label order, the checkpoint's logits to keep or None for all). Of the 1,000 synsets a user's
    set may hold some (Imagenette, ImageNet-100): labels and logits are those of the 1,000."""
    if row.classes == "integers":
        integers = [str(i) for i in range(1000 if any_classes else num_classes)]
        check_folders(row, folder, found, integers)
        return integers, None
    if row.own and is_own(found, num_classes, any_classes):
        return check_own_classes(row, folder, found, None if any_classes else num_classes), None
    expected = read_synsets(row.classes)
    if not row.own or set(found) - set(expected):
        check_folders(row, folder, found, expected)
    if any_classes:
        return expected, None
    if num_classes != 1000:
        raise InputError(f"{row.title} is for checkpoints of ImageNet-1K's 1,000 classes; this one has {num_classes}")
    position = {synset: i for i, synset in enumerate(read_synsets(SYNSETS))}
    return expected, None if row.classes == SYNSETS else [position[synset] for synset in expected]


def is_own(found, num_classes, any_classes):
    """True for a user's own classes; False for ImageNet's 1,000, or a part of them."""
    if num_classes == 1000 or (any_classes and num_classes != len(found)):
        return not set(found) & set(read_synsets(SYNSETS))
    return True


def check_own_classes(row, folder, found, num_classes):
    """Any other image folder is taken as it is, classes in their label order; only their number is checked."""
    if not found:
        raise InputError(f"{folder} has no class folders: {row.title} is 1,000 synset folders (n01440764 ...), from "
                         f"{row.source}; images of your own need a folder for each class, or one (val/all)")
    if num_classes not in (None, len(found)):
        raise InputError(f"{folder} has {len(found)} class folders, the checkpoint {num_classes} classes")
    return label_order(found, folder)


def check_folders(row, folder, found, expected):
    missing, extra = (sorted(set(a) - set(b)) for a, b in ((expected, found), (found, expected)))
    if missing or extra:
        parts = [f"{what} {shorten(names)}" for what, names in (("missing", missing), ("not of it", extra)) if names]
        raise InputError(f"{row.title} needs {len(expected)} class folders, found {len(found)} in {folder}; "
                         f"{'; '.join(parts)}; get it from {row.source}")
