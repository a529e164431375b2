"""Images and class folders, read in one way by train/ (to write .ffcv files), inference/ and model_analysis/."""
import os

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS


def read_rgb(path):
    """-> the image as RGB; grey, palette and CMYK files are converted."""
    with Image.open(path) as image:
        if image.mode.startswith("I"):            # grey of 16 bits, which convert() cuts off at 255
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        return image.convert("RGB")


def image_names(folder, class_name):
    """-> the image files of one class folder, relative to it, in ImageFolder's order: bytes [n].

    OSError for a folder that may not be read; torchvision's make_dataset would pass over its images.
    """
    def stop(error):
        raise error

    top = os.path.join(folder, class_name)
    found = [os.path.join(base, name) for base, _, names in sorted(os.walk(top, onerror=stop, followlinks=True))
             for name in sorted(names) if name.lower().endswith(IMG_EXTENSIONS)]
    return np.array([os.fsencode(path[len(top) + 1:]) for path in found], dtype=bytes)
