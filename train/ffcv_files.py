"""Is a .ffcv file complete, and do its labels fit the model? Asked by train_imagenet.py before it starts."""
from pathlib import Path

import ffcv_repairs  # noqa: F401
import numpy as np
from ffcv.fields import IntField, RGBImageField
from ffcv.fields.rgb_image import IMAGE_MODES
from ffcv.reader import Reader
from ffcv.types import ALLOC_TABLE_TYPE, CURRENT_VERSION, HeaderType

from mrl_files import InputError, read_json
from mrl_images import check_same_classes


def check_files(train, val, num_classes):
    """-> number of training images, if both files are complete, with labels below num_classes, and made from the same
    classes; InputError otherwise."""
    images = check_file(train, num_classes)
    train_classes, val_classes = read_classes(train, images), read_classes(val, check_file(val, num_classes))
    if train_classes and val_classes:
        check_same_classes(train, train_classes, val, val_classes)
    return images


def companion(path):
    """-> where the names of a file's classes are kept."""
    return Path(f"{path}.json")


def read_classes(path, images):
    """-> the names of the classes of a file of so many images; None where none are kept, as beside the original's."""
    said = read_json(companion(path)) or {"n": images}
    if said.get("n") != images:
        raise InputError(f"{path}: has {images} images, but {companion(path).name} beside it says {said.get('n')}; "
                         "remove the .json of another file, or run write_imagenet.sh again")
    return said.get("classes")


def check_file(path, num_classes):
    """-> number of images of a complete .ffcv file with labels below num_classes; InputError otherwise."""
    check_complete(Path(path))
    reader = opened(path)
    if not pixels_are_there(reader.metadata["f0"], reader.alloc_table, Path(path).stat().st_size):
        raise InputError(f"{path}: damaged (images lie outside the file); run write_imagenet.sh again")
    labels = reader.metadata["f1"]
    if labels.min() < 0 or labels.max() >= num_classes:
        raise InputError(f"{path}: labels run from {labels.min()} to {labels.max()}, model.num_classes={num_classes}")
    return reader.num_samples


def check_complete(path):
    """FFCV writes the table of stored images last, one row for each: a file that lacks some of it was cut off."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; write_imagenet.sh makes it")
    header = np.fromfile(path, HeaderType, count=1)
    if not len(header) or header["version"][0] != CURRENT_VERSION:
        raise InputError(f"{path}: not an .ffcv file; write_imagenet.sh makes one")
    table, images = (int(header[field][0]) for field in ("alloc_table_ptr", "num_samples"))
    if table == 0 or path.stat().st_size - table < images * ALLOC_TABLE_TYPE.itemsize:
        raise InputError(f"{path}: truncated or not finished writing; run write_imagenet.sh again")


def opened(path):
    """-> FFCV's reader of a file of images and labels."""
    try:
        reader = Reader(str(path))
        fields = {name: type(handler) for name, handler in reader.handlers.items()}
    except Exception:                      # whatever FFCV makes of other bytes
        raise InputError(f"{path}: damaged; run write_imagenet.sh again") from None
    if fields != {"image": RGBImageField, "label": IntField} or not reader.num_samples:
        raise InputError(f"{path}: has fields {list(fields)} and {reader.num_samples} images, "
                         "expected an image and a label")
    return reader


def pixels_are_there(images, table, size):
    """Does each image begin where the table says that one is stored, of its size if raw, and within the file?"""
    table = table[np.argsort(table["ptr"])]
    stored = table[np.searchsorted(table["ptr"], images["data_ptr"]).clip(max=len(table) - 1)]
    pixels = 3 * images["height"].astype(np.uint64) * images["width"]
    return ((stored["ptr"] == images["data_ptr"]) & (stored["ptr"] + stored["size"] <= size) & (pixels > 0)
            & ((images["mode"] == IMAGE_MODES["jpg"]) | (stored["size"] == pixels))).all()
