"""Accuracy of a checkpoint per representation size, and the outputs that model_analysis reads.

One path for all heads: logits are [G, N, C], and a fixed-feature model is the case G = 1. Used by classification.py.
"""
import time

import torch
from tqdm import tqdm

from mrl_files import InputError
from mrl_models import autocast, count, stack_logits


def all_sizes(model, x, tta=False):
    """-> logits [G, N, C] float32; tta adds those of the mirrored images."""
    logits = stack_logits(model(x)).float()
    return logits + all_sizes(model, x.flip(-1)) if tta else logits


@torch.inference_mode()
def evaluate(model, images, loader, device, *, tta=False, precision="fp32", skip_bad_images=False, keep=None):
    """Run the images through the model, counting on the device.

    keep: called with (start, logits [G, n, C], y [n]) for each batch of readable images; see `Outputs`.
    -> {"n", "top1" [G], "top5" [G], "loss" [G], "skipped", "seconds"}; accuracies are fractions.
    """
    model.to(device)
    subset = None if images.subset is None else torch.tensor(images.subset, device=device)
    sums, n, seen, bad, start_time = 0, 0, 0, [], time.perf_counter()
    for x, y in tqdm(loader, desc="evaluate", unit="batch", dynamic_ncols=True):
        readable = readable_rows(images, y, seen, bad, skip_bad_images)
        seen += len(y)
        with autocast(device, precision):
            logits = all_sizes(model, x.to(device, non_blocking=True), tta)
        y = y.to(device, non_blocking=True)
        if subset is not None:
            logits = logits.index_select(-1, subset)
        if readable is not None:
            logits, y = logits[:, readable], y[readable]
        sums = sums + count(logits / 2 if tta else logits, y)      # the loss of the mean, as in training's log
        if keep is not None:
            keep(n, logits, y)
        n += len(y)
    return figures(sums, n, bad, time.perf_counter() - start_time)


def readable_rows(images, y, start, bad, skip_bad_images):
    """Rows of a batch whose files could be read: None for all. The others are added to `bad`, or stop the run."""
    if (y >= 0).all():
        return None
    names = [images.why_unreadable(start + i) for i in (y < 0).nonzero()[:, 0].tolist()]
    if not skip_bad_images:
        raise InputError(f"{len(names)} unreadable image(s) in this batch: {', '.join(names[:3])}; "
                         "repair them, or pass --skip_bad_images")
    bad.extend(names)
    return y >= 0


def figures(sums, n, bad, seconds):
    if n == 0:
        raise InputError(f"none of the {len(bad)} images can be read")
    top1, top5, loss = (sums / n).tolist()
    if not torch.isfinite(sums).all():
        raise InputError("the model's logits are not finite; try --precision fp32")
    return {"n": n, "top1": top1, "top5": top5, "loss": loss, "skipped": bad, "seconds": seconds}


class Outputs:
    """Collects what `wanted` names (gt, predictions, logits, softmax) on the CPU while `evaluate` runs.

    Logits [G, N, C] are held once (1.8 GB for ImageNet); their softmax takes their place.
    """

    def __init__(self, sizes, n, classes, wanted):
        self.wanted, self.n = wanted, 0
        self.gt = torch.empty(n, dtype=torch.int64)
        self.predictions = torch.empty(sizes, n, dtype=torch.int64)
        self.logits = torch.empty(sizes, n, classes) if {"logits", "softmax"} & set(wanted) else None

    def __call__(self, start, logits, y):
        self.n = start + len(y)
        rows = slice(start, self.n)
        self.gt[rows], self.predictions[:, rows] = y.cpu(), logits.argmax(-1).cpu()
        if self.logits is not None:
            self.logits[:, rows] = logits.cpu()

    def tensors(self):
        """Yields (name, tensor) for each that is wanted."""
        if "gt" in self.wanted:
            yield "gt", self.gt[:self.n].clone()
        if "predictions" in self.wanted:
            yield "predictions", self.predictions[:, :self.n].clone()
        if self.logits is not None:
            yield from self.probabilities(self.logits[:, :self.n].contiguous())     # a copy only if images were skipped

    def probabilities(self, logits):
        if "logits" in self.wanted:
            yield "logits", logits
        if "softmax" in self.wanted:
            for one_size in logits:
                torch.softmax(one_size, -1, out=one_size)
            yield "softmax", logits
