"""Images and class folders, read in one way by train/ (to write .ffcv files), inference/ and model_analysis/.

    classes = label_order(class_folders(folder), folder)       # folder names; a class's label is its place
    files, labels = list_images(folder, classes)               # [N] bytes, [N] int64
    image = read_rgb(image_path(folder, classes[labels[0]], files[0]))
"""
import os
import re
import signal
import sys
import threading
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from mrl_files import InputError, describe_error

# Those that torchvision's ImageFolder reads; importing them from there takes 2 s.
IMG_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def read_rgb(path):
    """-> the image as RGB; grey, palette and CMYK files are converted, grey of 16 bits is scaled to 8.

    Whatever the decoder raises for broken bytes or for a picture of billions of pixels, and ValueError for pixels of 32
    bits, whose range a file does not tell.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")        # of large pictures, odd palettes and EXIF: none of them changes a pixel
        with Image.open(path) as image:
            if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PNG"):      # two names for it
                return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
            if image.mode in ("I", "F"):
                raise ValueError("pixels of 32 bits: save it with 8 or 16 bits a channel")
            return image.convert("RGB")


def class_folders(folder):
    """-> the names of the class folders, sorted; none are hidden ones (.ipynb_checkpoints) and links that lead back up.

    OSError for a folder that may not be read.
    """
    above = with_parents(folder)
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")
                  and os.path.realpath(entry.path) not in above)


def label_order(names, folder):
    """-> the names of class folders in label order: numbers are the labels (as in ImageNetV2), others are sorted.

    InputError for numbers that are not 0, 1, 2 ...: sorted as text, 10 would come before 2.
    """
    if not all(name.isdecimal() for name in names):
        return sorted(names)
    found = {int(name): name for name in names}
    missing = [label for label in range(len(names)) if label not in found]
    if missing:
        raise InputError(f"{folder}: class folders that are numbers are labels, 0 ... {len(names) - 1}; "
                         f"{missing[0]} is missing: rename them, or begin the names with a letter")
    return [found[label] for label in range(len(names))]


def check_same_classes(folder, classes, other_folder, other_classes):
    """InputError, which names the folders, where two parts of one data set have different classes: the labels of all
    classes after the first difference would be wrong."""
    different = sorted(set(classes) ^ set(other_classes))
    if different:
        one = different[0]
        there, missing = (folder, other_folder) if one in classes else (other_folder, folder)
        raise InputError(f"{missing} has no class folder {one}, {there} has one ({len(different)} such difference(s)): "
                         "the parts of a data set need the same classes")


def list_images(folder, classes):
    """-> files [N] bytes, each relative to its class folder, in ImageFolder's order; labels [N] int64.

    classes: folder names in label order, one or more. InputError for a class without images.
    """
    names = [image_names(folder, name) for name in classes]
    empty = [name for name, files in zip(classes, names, strict=True) if not len(files)]
    if empty:
        raise InputError(f"{folder}: {len(empty)} class folder(s) hold no images: {shorten(empty)}")
    return np.concatenate(names), np.repeat(np.arange(len(classes)), [len(files) for files in names])


def image_names(folder, class_name):
    """-> the image files of one class folder, relative to it: bytes [n], for names that are not UTF-8.

    Hidden files and folders are passed over, and each real folder is read once: a link that leads back up would bring
    in the other classes. OSError for a folder that may not be read.
    """
    def stop(error):
        raise error

    top = os.path.join(folder, class_name)
    seen, found = with_parents(top), []
    for base, folders, names in os.walk(top, onerror=stop, followlinks=True):
        folders[:] = [name for name in sorted(folders)
                      if not name.startswith(".") and is_new(os.path.join(base, name), seen)]
        found.append((base, [name for name in sorted(names) if is_image(name)]))
    paths = [os.path.join(base, name) for base, names in sorted(found) for name in names]
    return np.array([os.fsencode(path[len(top) + 1:]) for path in paths], dtype=bytes)


def with_parents(folder):
    """-> the real paths of a folder and of all those that hold it."""
    real = Path(os.path.realpath(folder))
    return {str(path) for path in (real, *real.parents)}


def is_new(path, seen):
    """-> is this folder new? From now on it is among those seen."""
    real = os.path.realpath(path)
    fresh = real not in seen
    seen.add(real)
    return fresh


def is_image(name):
    return name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")


def image_path(folder, class_name, file):
    return Path(folder) / class_name / os.fsdecode(file)


def shorten(names):
    """-> the first few of the names, for a message."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def printable(path):
    """-> the path as text that any terminal and any JSON file takes: bytes that are not UTF-8 as \\xff."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def describe_unreadable(path):
    """-> the path of an image that could not be read, and why."""
    try:
        read_rgb(path)
    except Exception as error:      # whatever a decoder makes of broken bytes
        return f"{printable(path)} ({describe_error(error)})"
    return f"{printable(path)} (readable now)"


# ------------------------------------------------------------------------------------------ DataLoader's processes

def leave_endings_to_the_first(_):
    """Ctrl-C, and a SIGTERM to a whole job, reach every process, but only the main one acts on them and ends the
    workers; a worker would otherwise end before its work is done, or print a traceback, from decoding or from the
    thread that hands over batches on a closed connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):      # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=end_with_the_first, daemon=True).start()
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    report = sys.excepthook
    sys.excepthook = lambda kind, *rest: None if issubclass(kind, (ConnectionError, EOFError)) else report(kind, *rest)


def end_with_the_first():
    """The main process ends its workers with a SIGTERM and waits for them; one from elsewhere means the whole job."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


@contextmanager
def name_dead_workers(fewer):
    """One line for a worker that the system ended; PyTorch says so wherever the first process then is, in a batch or
    between two. fewer: the flags that need less memory."""
    try:
        yield
    except RuntimeError as error:
        if not re.search(r"DataLoader worker \(pid|unable to write to file </torch_", str(error)):
            raise
        raise InputError("a process that reads images was ended, most often because memory ran out "
                         f"({describe_error(error)}): give {fewer}; in a container more shared memory "
                         "(docker: --shm-size)") from None
