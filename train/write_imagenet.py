"""An ImageFolder tree (or CIFAR-10) -> one .ffcv file, which train_imagenet.py reads.

    python write_imagenet.py --cfg.dataset=imagenet --cfg.split=train --cfg.data_dir=$IMAGENET_DIR/train \\
        --cfg.write_path=$WRITE_DIR/train_500_0.50_90.ffcv --cfg.max_resolution=500 --cfg.write_mode=proportion \\
        --cfg.compress_probability=0.50 --cfg.jpeg_quality=90

write_imagenet.sh writes both splits. Labels are the classes' places in sorted folder order (folders that are numbers:
the numbers). Beside the file, a .json keeps the classes' names: training compares those of its two files.
"""
import multiprocessing
import os
import sys
from pathlib import Path

import numpy as np
from fastargs import Config, Param, Section
from fastargs.validation import And, InRange, OneOf
from folder_loader import ClassFolders
from loaders import companion, import_ffcv
from PIL import Image
from settings import PATH, read_settings
from torch.utils.data import Dataset

from mrl_files import InputError, command_line, describe_error, replacing, write_json
from mrl_images import check_same_classes, class_folders, printable

CONFIG = Config()
Section("cfg", "what to write", CONFIG).params(
    dataset=Param(And(str, OneOf(["cifar", "imagenet"])), "data set", default="imagenet"),
    split=Param(And(str, OneOf(["train", "val"])), "train or val", required=True),
    data_dir=Param(PATH, "folder of the images: one folder per class", required=True),
    write_path=Param(PATH, "the .ffcv file to write", required=True),
    write_mode=Param(And(str, OneOf(["raw", "smart", "jpg", "proportion"])), "how pixels are stored", default="smart"),
    max_resolution=Param(And(int, InRange(min=1, max=20000)), "longest side; larger images are shrunk", required=True),
    num_workers=Param(And(int, InRange(min=1, max=16 * os.cpu_count())), "processes",
                      default=min(16, os.cpu_count())),
    chunk_size=Param(And(int, InRange(min=1)), "images a process takes at a time", default=100),
    jpeg_quality=Param(And(int, InRange(min=1, max=100)), "quality of JPEGs", default=90),
    subset=Param(int, "write only the first so many images; -1 is all", default=-1),
    compress_probability=Param(And(float, InRange(min=0, max=1)), "mode proportion: share of images stored as JPEG"),
)


def open_dataset(cfg):
    """-> a data set of (RGB image, label) with the names of its classes."""
    try:
        if cfg.dataset == "cifar":
            from torchvision.datasets import CIFAR10  # which takes 2 s
            return CIFAR10(cfg.data_dir, train=cfg.split == "train")
        dataset = ClassFolders(cfg.data_dir)
    except (RuntimeError, FileNotFoundError, InputError) as error:
        raise InputError(f"--cfg.data_dir={cfg.data_dir}: {describe_error(error)}") from None
    check_other_split(Path(cfg.data_dir).absolute(), dataset.classes)
    return dataset


def check_other_split(folder, classes):
    """The folders train/ and val/ that lie beside each other are one data set; one that is not filled yet is none."""
    other = folder.parent / {"train": "val", "val": "train"}.get(folder.name, folder.name)
    if other != folder and other.is_dir() and (others := class_folders(other)):
        check_same_classes(folder, classes, other, others)


class Readable(Dataset):
    """The first n items; an image that cannot be used is named and counted, for FFCV waits for ever on an exception."""

    def __init__(self, dataset, n, max_resolution):
        self.dataset, self.n, self.max_resolution = dataset, n, max_resolution
        self.unreadable = multiprocessing.Value("q", 0)

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        np.random.seed(index)      # noqa: NPY002  FFCV draws from it which images become JPEGs: the same in every writing
        try:
            image, label = self.dataset[index]
            shrunk = min(1, self.max_resolution / max(image.size))
            if int(shrunk * min(image.size)) < 1:
                raise ValueError(f"{image.size[0]} x {image.size[1]} pixels are too thin to be shrunk")
            return image, label
        except Exception as error:      # whatever a decoder makes of broken bytes
            with self.unreadable.get_lock():
                self.unreadable.value += 1
            print(f"unreadable: {printable(self.dataset.path(index))} ({describe_error(error)})", file=sys.stderr)
            return Image.new("RGB", (1, 1)), 0


def write(cfg):
    write_file = import_ffcv("ffcv_writer", cfg.write_path).write_file
    dataset = open_dataset(cfg)
    images = Readable(dataset, len(dataset) if cfg.subset < 0 else min(cfg.subset, len(dataset)), cfg.max_resolution)
    if not len(images):
        raise InputError("--cfg.subset=0: no image to write")
    with replacing(cfg.write_path) as path:
        write_file(path, images, cfg)
        if images.unreadable.value:
            raise InputError(f"--cfg.data_dir={cfg.data_dir}: {images.unreadable.value} of {len(images)} images "
                             "cannot be read (named above); nothing written")
        companion(cfg.write_path).unlink(missing_ok=True)      # it never describes another file
    write_json(companion(cfg.write_path), {"classes": dataset.classes, "n": len(images), "split": cfg.split,
                                           "folder": str(Path(cfg.data_dir).absolute())})
    print(f"wrote {cfg.write_path}: {len(images)} images, {os.path.getsize(cfg.write_path) / 1e6:.1f} MB")


def main():
    write(read_settings(CONFIG, __doc__).cfg)


if __name__ == "__main__":
    command_line(main)
