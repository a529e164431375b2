"""The images of class folders as (x, y), and their batches: opened by eval_sets.py, run through a model by
classification.py and embeddings.py.
"""
import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from mrl_files import InputError
from mrl_images import describe_unreadable, image_path, leave_endings_to_the_first, list_images, read_rgb, shorten
from mrl_models import MEAN, STD


class ImageSet(Dataset):
    """Images of class folders: item i is (x [3, crop, crop] float32 normalised, y int).

    An unreadable file is (zeros, -1), so that batches keep their size; the caller decides whether that is an error.
    classes: folder names, label order. found: those that are there (None: all). subset: logits to keep, or None.
    labels: int64 [N].
    File names are kept as one array of bytes: a list of a million strings would be copied into every worker.
    """

    def __init__(self, folder, classes, subset, transform, found=None):
        self.folder, self.classes, self.subset, self.transform = Path(folder), classes, subset, transform
        there = set(classes if found is None else found)
        self.found = [name for name in classes if name in there]
        self.files, places = list_images(folder, self.found)
        self.labels = np.flatnonzero([name in there for name in classes])[places]

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        path, label = self.path(i), int(self.labels[i])
        try:
            image = read_rgb(path)
        except Exception:                      # whatever a decoder makes of broken bytes
            return torch.zeros(3, self.transform.crop, self.transform.crop), -1
        return self.transform(image), label

    def sample(self, n):
        """Keep n random images, the same each time, in their order."""
        if n < len(self):
            kept = np.sort(np.random.default_rng(0).choice(len(self), n, replace=False))
            self.files, self.labels = self.files[kept], self.labels[kept]

    def digest(self):
        """16 hex digits that stand for the list of files and their classes."""
        listed = os.fsencode("/".join(self.classes)), self.files.tobytes(), self.labels.tobytes()
        return hashlib.sha256(b"".join(listed)).hexdigest()[:16]

    def path(self, i):
        return image_path(self.folder, self.classes[self.labels[i]], self.files[i])


def name_unreadable(images, y, start, skip_bad_images):
    """-> the files of a batch (labels y, from image `start` on) that could not be read; InputError if any may not be
    left out."""
    names = [describe_unreadable(images.path(start + i)) for i in (y < 0).nonzero()[:, 0].tolist()]
    if names and not skip_bad_images:
        raise InputError(f"{len(names)} unreadable image(s) in this batch: {', '.join(names[:3])}; "
                         "repair them, or pass --skip_bad_images")
    return names


class Preparation(transforms.Compose):
    """Resize the shorter side, crop the centre, normalise: image -> x [3, crop, crop]."""

    def __init__(self, resize=256, crop=224, mean=MEAN, std=STD):
        super().__init__([transforms.Resize(resize), transforms.CenterCrop(crop), transforms.ToTensor(),
                          transforms.Normalize(mean, std)])
        self.resize, self.crop = resize, crop


def make_loader(images, batch_size, workers, pin_memory=False, batches=None):
    """(x, y) in order, in batches of `batch_size`. batches: only these, by number, in this order."""
    total = len(images)
    numbers = range(-(-total // batch_size)) if batches is None else batches
    rows = [range(b * batch_size, min((b + 1) * batch_size, total)) for b in numbers]
    return DataLoader(images, batch_sampler=rows, num_workers=workers, pin_memory=pin_memory,
                      worker_init_fn=leave_endings_to_the_first)


def show_skipped(names):
    if names:
        print(f"{len(names)} unreadable image(s) left out: {shorten(names)}")
