"""A folder of class folders -> batches as ffcv_loader.py gives them, by PyTorch's DataLoader.

The boxes, the flips and, with several processes, the order are those of an .ffcv file that was written from the folder;
Pillow's decoder and its bilinear resizing give pixels that differ a little from FFCV's. Used through loaders.py;
write_imagenet.py writes the same `ClassFolders`.
"""
from functools import partial

import numpy as np
import torch
from augmentation import SCALE, VALIDATION_RATIO, augment, centre_crop, image_keys, random_crop
from PIL import Image
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from mrl_files import InputError
from mrl_images import (
    class_folders,
    describe_unreadable,
    image_path,
    label_order,
    leave_endings_to_the_first,
    list_images,
    read_rgb,
)


class ClassFolders(Dataset):
    """The images of class folders as (RGB image, label). classes: their names, in label order."""

    def __init__(self, folder):
        self.folder = folder
        self.classes = label_order(class_folders(folder), folder)
        if not self.classes:
            raise InputError(f"{folder}: holds no class folders")
        self.files, self.labels = list_images(folder, self.classes)

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        return read_rgb(self.path(index)), int(self.labels[index])

    def path(self, index):
        return image_path(self.folder, self.classes[self.labels[index]], self.files[index])


def inspect(path, num_classes):
    """-> number of images of a folder, names of its classes; InputError for more of them than num_classes."""
    images = ClassFolders(path)
    if len(images.classes) > num_classes:
        raise InputError(f"{path}: has {len(images.classes)} class folders, model.num_classes={num_classes}")
    return len(images), images.classes


def train_loader(path, batch_size, num_workers, in_memory, resolution, seed, device, *, distributed=False, scale=SCALE,
                 flip=True):
    """in_memory: as the system keeps files, so nothing here."""
    images = ClassFolders(path)
    order = Order(len(images), batch_size, seed, resolution, distributed)
    crop = partial(train_crop, scale=float(scale), flip_below=0.5 if flip else 0.0)
    crop(Image.new("RGB", (1, 1)), np.uint64(0), 1)      # compiled here once, for the processes to inherit
    return TrainLoader(images, crop, order, num_workers, device)


def val_loader(path, batch_size, num_workers, resolution, device, rank=0, world_size=1, ratio=VALIDATION_RATIO):
    images = ClassFolders(path)
    mine = [(index, None, resolution) for index in range(rank, len(images), world_size)]
    batches = [mine[first:first + batch_size] for first in range(0, len(mine), batch_size)]
    return FolderLoader(images, partial(val_crop, ratio=ratio), batches, num_workers, device)


def train_crop(image, key, resolution, scale, flip_below):
    pixels = cut(image, random_crop(key, image.height, image.width, scale), resolution)
    augment(pixels, key, flip_below)
    return pixels


def val_crop(image, _, resolution, ratio):
    return cut(image, centre_crop(image.height, image.width, None, ratio), resolution)


def cut(image, box, resolution):
    """-> the part of an image in the box (top, left, height, width), uint8 [R, R, 3]."""
    top, left, height, width = box
    part = image.crop((left, top, left + width, top + height))
    return np.array(part.resize((resolution, resolution), Image.Resampling.BILINEAR))


class Crops(Dataset):
    """Item (index, key, R) is (uint8 [R, R, 3], label int64 [1]). It says all that is done to an image: the processes
    that make items live through all epochs, and keep no state.

    The label of an image that cannot be read is -1 - index: an exception would come out of its process as a traceback.
    """

    def __init__(self, images, crop):
        self.images, self.crop = images, crop

    def __getitem__(self, item):
        index, key, resolution = item
        try:
            image, label = self.images[index]
            pixels = self.crop(image, key, resolution)
        except Exception:                      # whatever a decoder makes of broken bytes
            pixels, label = np.zeros((resolution, resolution, 3), np.uint8), -1 - index
        return torch.from_numpy(pixels), torch.tensor([label])


class Order:
    """The batches of an epoch from `first_batch` on, as items of `Crops`; shuffled as FFCV does it."""

    def __init__(self, n, batch_size, seed, resolution, distributed):
        self.n, self.batch_size, self.seed, self.resolution = n, batch_size, seed, resolution
        self.sampler = DistributedSampler(range(n), shuffle=True, seed=seed) if distributed else None
        self.epoch, self.first_batch = 0, 0

    def shuffled(self):
        if self.sampler is None:
            return np.random.default_rng(self.seed + self.epoch).permutation(self.n)
        self.sampler.set_epoch(self.epoch)
        return np.array(list(self.sampler))

    def __len__(self):
        return (self.n if self.sampler is None else len(self.sampler)) // self.batch_size

    def __iter__(self):
        keys, order = image_keys(self.seed, self.epoch, self.n), self.shuffled()
        for batch in range(self.first_batch, len(self)):
            rows = order[batch * self.batch_size:(batch + 1) * self.batch_size]
            yield [(int(index), keys[index], self.resolution) for index in rows]


class FolderLoader:
    """The batches of a DataLoader whose processes live on from epoch to epoch, on the device."""

    def __init__(self, images, crop, batches, num_workers, device):
        self.images, self.device = images, torch.device(device)
        # its own generator: DataLoader draws from one, and training's may not depend on that
        self.batches = DataLoader(Crops(images, crop), batch_sampler=batches, num_workers=num_workers,
                                  pin_memory=self.device.type == "cuda", persistent_workers=True,
                                  multiprocessing_context="fork", generator=torch.Generator(),
                                  worker_init_fn=leave_endings_to_the_first)

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for images, labels in self.batches:
            for label in labels[labels < 0].tolist():
                raise InputError(f"{describe_unreadable(self.images.path(-1 - label))} cannot be read; repair it, or "
                                 "put another picture in its place")
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


class TrainLoader(FolderLoader):
    def __init__(self, images, crop, order, num_workers, device):
        super().__init__(images, crop, order, num_workers, device)
        self.order, self.batch_size = order, order.batch_size

    @property
    def resolution(self):
        return self.order.resolution

    def set_resolution(self, resolution):
        self.order.resolution = resolution

    def epoch(self, epoch, first_batch=0):
        """Iterator over the batches of an epoch, from `first_batch` on (where an interrupted run continues)."""
        self.order.epoch, self.order.first_batch = epoch, first_batch
        return iter(self)
