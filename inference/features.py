"""Embeddings of an image set, streamed to disk: <stem>-X.npy [N, D], <stem>-y.npy [N], <stem>-X.json, for retrieval.

Memory does not grow with N: each batch goes straight into a memory-mapped file under a `.partial` name, and a byte per
image remembers that its row is there. So a killed run goes on where it stopped, any number of processes can share the
batches, and the result is the same either way. The JSON with "complete": true is written last.
"""
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from evaluate import readable_rows
from image_set import make_loader
from saved_files import check_free
from tqdm import tqdm

from MRL import InputError, allocate, autocast, classifier, read_array, read_json, replacing, write_json

DTYPES = {"fp32": np.float32, "fp16": np.float16}
TODO, DONE, UNREADABLE = 0, 1, 2            # what the byte of an image says
BLOCK = 4096                                # rows copied at a time when rows of unreadable images are left out


class Files:
    """The paths of one dump; `rows`, `state` and `plan` exist only until it is complete."""

    def __init__(self, stem):
        self.X, self.y, self.about = (Path(f"{stem}-{end}") for end in ("X.npy", "y.npy", "X.json"))
        self.rows, self.state, self.plan = (Path(f"{stem}{end}") for end in
                                            ("-X.partial.npy", "-state.partial.npy", "-X.partial.json"))


def embedder(model):
    """-> the model without its head: images -> what the head reads, [N, feature_dim]. The model is changed."""
    model.set_submodule(classifier(model)[0], torch.nn.Identity())
    return model


def dump(model, images, stem, about, device, batch_size, workers, precision="fp32", storage="fp32",
         skip_bad_images=False, overwrite=False):
    """Write the embeddings of `images`, cut to the model's largest size, under `stem`.

    model: an `embedder`, on the device. about: what the JSON says of their origin (checkpoint, nesting_list, dataset,
    split ...); files that say otherwise are not overwritten. storage: fp32 or fp16.
    Under torchrun the processes share the batches (and need one disk). -> the JSON's content.
    """
    files = Files(stem)
    about = {**about, "dim": about["nesting_list"][-1], "dtype": np.dtype(DTYPES[storage]).name, "precision": precision}
    if rank() == 0:
        begin(files, about, len(images), overwrite)
    barrier()
    if files.plan.exists():
        fill(model, images, files, device, batch_size, workers, precision, skip_bad_images)
        barrier()
        if rank() == 0:
            finish(files, about, images)
        barrier()
    return read_json(files.about)


def begin(files, about, n, overwrite):
    """Make the files to fill, unless they are there from a run that was stopped, or the dump is complete."""
    for companion in (files.about, files.plan):
        check_free(companion, about, overwrite)
    if files.plan.exists() and not files.rows.exists() and files.X.exists():      # stopped in `finish`: back to before
        os.replace(files.X, files.rows)
    for companion, data, says in ((files.about, files.X, "complete already"),
                                  (files.plan, files.rows, "going on where it stopped")):
        known = read_json(companion) or {}
        if data.exists() and {key: known.get(key) for key in about} == about:
            print(f"{files.X}: {says}")
            return
    files.plan.unlink(missing_ok=True)
    files.rows.parent.mkdir(parents=True, exist_ok=True)
    allocate(files.rows, (n, about["dim"]), about["dtype"])
    allocate(files.state, (n,), np.uint8)
    files.about.unlink(missing_ok=True)                # what it describes is kept until there is room for the new
    write_json(files.plan, about)


@torch.inference_mode()
def fill(model, images, files, device, batch_size, workers, precision, skip_bad_images):
    """This process's share of the batches that are still to do."""
    X, state = (read_array(path, "r+") for path in (files.rows, files.state))
    todo = np.unique(np.flatnonzero(state == TODO) // batch_size)[rank()::world()].tolist()
    barrier()                                          # all have read the state before any writes to it
    loader = make_loader(images, batch_size, workers, device.type == "cuda", todo)
    for batch, (x, y) in zip(todo, tqdm(loader, desc=files.X.name, unit="batch", disable=rank() > 0), strict=True):
        rows = slice(batch * batch_size, batch * batch_size + len(y))
        readable_rows(images, y, rows.start, [], skip_bad_images)
        with autocast(device, precision):
            embeddings = model(x.to(device, non_blocking=True))
        X[rows] = embeddings[:, :X.shape[1]].to(getattr(torch, X.dtype.name)).cpu().numpy()
        if not np.isfinite(X[rows]).all():
            raise InputError(f"{files.X}: embeddings are NaN or infinite; try --precision fp32 and --storage fp32")
        state[rows] = np.where(y.numpy() >= 0, DONE, UNREADABLE)      # after the row is written


def finish(files, about, images):
    """The partial files become the final ones; the companion, last, says that all is there."""
    state = np.load(files.state)
    if (state == TODO).any():
        raise InputError(f"{files.X}: {(state == TODO).sum()} rows are missing; run the same command again")
    kept = np.flatnonzero(state == DONE)
    if len(kept) == 0:
        raise InputError(f"{images.folder}: no image could be read")
    with replacing(files.y) as temporary:
        np.save(temporary, images.labels[kept])
    if len(kept) == len(state):
        os.replace(files.rows, files.X)
    else:
        copy_rows(files.rows, files.X, kept)
    skipped = [str(images.path(i)) for i in np.flatnonzero(state == UNREADABLE)]
    write_json(files.about, {**about, "n": len(kept), "skipped": skipped, "complete": True})
    for path in (files.plan, files.state, files.rows):
        path.unlink(missing_ok=True)


def copy_rows(source, target, kept):
    """A .npy file of only the rows `kept` of another one, a block at a time."""
    X = np.load(source, mmap_mode="r")
    with replacing(target) as temporary:
        out = allocate(temporary, (len(kept), X.shape[1]), X.dtype)
        for start in range(0, len(kept), BLOCK):
            out[start:start + BLOCK] = X[kept[start:start + BLOCK]]


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    if dist.is_initialized():
        dist.barrier()
