"""A folder of class folders, or an .ffcv file -> batches of (images uint8 [B, R, R, 3], labels int64 [B, 1]).

Folders are read by folder_loader.py with PyTorch's DataLoader, the files of write_imagenet.py by ffcv_loader.py, for
which alone FFCV is imported. Both cut images as augmentation.py draws it. Used by train_imagenet.py and trainer.py.
"""
import importlib
import os
import sys
from functools import cache
from pathlib import Path

import folder_loader
import launch
import numba
import torch

from mrl_files import InputError, describe_error
from mrl_images import check_same_classes


def companion(path):
    """-> the JSON beside an .ffcv file: the names of its classes, the folder that it was made from."""
    return Path(f"{path}.json")


def find_reader(path):
    """-> the module that reads a data set: train_loader, val_loader and inspect."""
    if os.path.isdir(path):
        return folder_loader
    if not os.path.exists(path):
        raise InputError(f"{path}: no such file; give a folder of class folders, or an .ffcv file of write_imagenet.sh")
    return import_ffcv("ffcv_loader", path)


def import_ffcv(module, path):
    """-> a module of ours that imports FFCV; InputError where FFCV is not installed, or does not start."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{path}: .ffcv files need FFCV ({describe_error(error)}): ./setup.sh installs it, or says "
                         "what it lacks. Training also reads the folder of images itself") from None


def train_loader(path, batch_size, num_workers, *args, **how):
    """Shuffled random crops, the last incomplete batch dropped. Iterate with `loader.epoch(e)`."""
    return find_reader(path).train_loader(path, batch_size, count_workers(num_workers), *args, **how)


def val_loader(path, batch_size, num_workers, *args, **how):
    """Centre crops; process `rank` reads images rank, rank + world_size, ...: each image exactly once. ratio: the
    crop's share of the shorter side."""
    return find_reader(path).val_loader(path, batch_size, count_workers(num_workers), *args, **how)


def check_data(train, val, num_classes):
    """-> number of training images, if both data sets are complete, with labels below num_classes, and made from the
    same classes; InputError otherwise. A note where there are fewer classes than num_classes."""
    (images, classes), (_, others) = (find_reader(path).inspect(path, num_classes) for path in (train, val))
    if classes and others:
        check_same_classes(train, classes, val, others)
    if classes and len(classes) < num_classes and launch.is_first():
        print(f"note: {train} has {len(classes)} classes, the head {num_classes}: --model.num_classes={len(classes)} "
              "makes one that fits", file=sys.stderr)
    return images


@cache
def count_workers(asked):
    """-> threads (of FFCV) or processes (of DataLoader) for decoding: 0 is one for each core, and there are no more.
    What it says, it says once, for the loaders of training and of validation."""
    available = numba.config.NUMBA_NUM_THREADS
    if asked > available and int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(f"data.num_workers={asked}: this machine has {available} cores, using {available}")
    return min(asked, available) if asked > 0 else available


def pixel_statistics(device, mean, std):
    """-> mean, std [3] of pixels in 0..255, for `normalise`; of those given, of pixels in 0..1."""
    return [torch.tensor([255 * value for value in values], device=device) for values in (mean, std)]


def normalise(images, mean, std):
    """uint8 [B, R, R, 3] -> float32 [B, 3, R, R], channels last; mean, std: [3] in 0..255, on the device."""
    return (images.permute(0, 3, 1, 2).float() - mean.view(3, 1, 1)) / std.view(3, 1, 1)
