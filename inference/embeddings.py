"""pytorch_inference.py with --retrieval: the embeddings of the queries (val) and of the database (train).

Streamed to disk as <stem>-X.npy [N, D], <stem>-y.npy [N], <stem>-X.json, for retrieval. Memory does not grow with N:
each batch goes straight into a memory-mapped file under a `.partial` name, and a byte per image remembers that its row
is there. So a killed run goes on where it stopped, any number of processes can share the batches, and the result is the
same either way. The JSON with "complete": true is written last. A lock keeps a second command out meanwhile.
"""
import os
import shlex
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import NamedTuple

import eval_sets
import numpy as np
import torch
from image_set import ImageSet, Preparation, make_loader, name_unreadable, show_skipped
from processes import barrier, run_by_first, run_together
from saved_files import arrays_stem, check_distinct, check_free, describe_origin
from tqdm import tqdm
from which_model import check_checkpoints, is_fixed_feature

from mrl_files import (
    InputError,
    allocate,
    json_contains,
    locked,
    rank,
    read_array,
    read_json,
    replacing,
    world,
    write_json,
)
from mrl_images import check_same_classes, printable, shorten
from mrl_models import autocast, classifier, load_model, model_name, preparation

DTYPES = {"fp32": np.float32, "fp16": np.float16}
TODO, DONE, UNREADABLE = 0, 1, 2            # what the byte of an image says
BLOCK = 4096                                # rows copied at a time when rows of unreadable images are left out


class Dump(NamedTuple):
    """One split of one checkpoint, checked before the first image is read."""
    path: str            # of the checkpoint
    spec: dict           # model.spec
    images: ImageSet
    stem: Path           # the beginning of its files' names
    about: dict          # what their JSON says of their origin


def embed(args, device):
    """Write the arrays of each checkpoint; under torchrun the processes share the images."""
    plans = run_together(plan_dumps, args, device)
    for path in dict.fromkeys(plan.path for plan in plans):
        embed_one([plan for plan in plans if plan.path == path], args, device)
    if rank() == 0:
        for head in dict.fromkeys("ff" if is_fixed_feature(plan.spec["head"]) else plan.spec["head"] for plan in plans):
            folder, dataset = os.path.abspath(args.retrieval_array_path or "."), plans[0].about["dataset"]
            print(f"next: cd ../retrieval && python retrieve.py report --dataset {dataset} --model {head} "
                  f"--embeddings {shlex.quote(folder)}")


def plan_dumps(args, device):
    """-> a Dump for each split of each checkpoint."""
    name, splits = eval_sets.find_row(eval_sets.RETRIEVAL, args.dataset or "1K")
    images_for = cache(lambda num_classes, prepared: open_splits(splits, num_classes, Preparation(*prepared), args))
    plans = [plan_dump(path, spec, name, split, images, device, args)
             for path, spec in check_checkpoints(args).items()
             for split, images in images_for(spec["num_classes"],
                                             preparation(spec, args.resize, args.crop)).items()]
    check_distinct(((plan.stem, plan.about) for plan in plans), "--retrieval_array_path")
    return plans


def open_splits(splits, num_classes, transform, args):
    """-> {split: ImageSet}."""
    opened = {split: eval_sets.open_set(row, num_classes, transform, args.data_root, any_classes=True)
              for split, row in splits.items()}
    if "train" in opened:
        train, val = opened["train"], opened["val"]
        check_same_classes(train.folder, train.found, val.folder, val.found)
    if args.random_sample_dim:
        for images in opened.values():
            images.sample(args.random_sample_dim)
    return opened


def plan_dump(path, spec, name, split, images, device, args):
    precision = args.precision or ("fp16" if device.type == "cuda" else "fp32")
    kept = spec
    if args.rep_size and not is_fixed_feature(spec["head"]):      # as if the model ended there
        kept = {**spec, "nesting_list": [d for d in spec["nesting_list"] if d < args.rep_size] + [args.rep_size]}
    about = describe_dump({**describe_origin(path, kept, name, images), "split": split}, precision,
                           args.storage or "fp32")
    stem = arrays_stem(args.retrieval_array_path or ".", name, split, model_name(kept))
    check_dump(Files(stem), about, args.skip_bad_images, args.overwrite)
    return Dump(path, spec, images, stem, about)


def embed_one(plans, args, device):
    path, spec, *_ = plans[0]
    model = load_model(path, spec["arch"], spec["head"], spec["nesting_list"], args.old_ckpt)
    network = remove_head(model).to(device)
    for plan in plans:
        written = dump(network, plan.images, plan.stem, plan.about, device, batch_size=args.batch_size,
                       workers=args.workers, skip_bad_images=args.skip_bad_images, overwrite=args.overwrite)
        if rank() == 0:
            print(f"{plan.stem}-X.npy: {written['n']} x {written['dim']} {written['dtype']}, "
                  f"{len(written['skipped'])} skipped")
            show_skipped(written["skipped"])


# ------------------------------------------------------------------------------------------------ one dump

class Files:
    """The paths of one dump; `rows`, `state` and `begun` exist only until it is complete."""

    def __init__(self, stem):
        self.X, self.y, self.about = (Path(f"{stem}-{end}") for end in ("X.npy", "y.npy", "X.json"))
        self.rows, self.state, self.begun = (Path(f"{stem}{end}") for end in
                                            ("-X.partial.npy", "-state.partial.npy", "-X.partial.json"))


def remove_head(model):
    """-> the model without its head: images -> what the head reads, [N, feature_dim]. The model is changed."""
    model.set_submodule(classifier(model)[0], torch.nn.Identity())
    return model


def dump(model, images, stem, about, device, *, batch_size, workers, skip_bad_images=False, overwrite=False):
    """Write the embeddings of `images`, cut to the largest size that `about` names, under `stem`.

    model: without its head, on the device. about: what the JSON says of their origin and kind, by `describe_dump`;
    files that say otherwise are not overwritten. Under torchrun the processes share the batches (and need one disk).
    -> the JSON's content.
    """
    files = Files(stem)
    with ExitStack() as stack:      # the first process holds the lock for all of its command; a second one is refused
        run_by_first(stack.enter_context, locked(files.X, f"{files.X}: another process writes it; wait for its end"))
        run_by_first(begin, files, about, len(images), skip_bad_images, overwrite)
        if files.begun.exists():
            fill(model, images, files, device, batch_size, workers, about["precision"], skip_bad_images)
            barrier()
            run_by_first(finish, files, about, images)
    return read_json(files.about)


def describe_dump(about, precision="fp32", storage="fp32"):
    """-> what the JSON says of an array: its origin (`about`: checkpoint, nesting_list, dataset, split ...) and its
    kind. storage: fp32 or fp16."""
    return {**about, "dim": about["nesting_list"][-1], "dtype": np.dtype(DTYPES[storage]).name, "precision": precision}


def check_dump(files, about, skip_bad_images, overwrite):
    """Refuse a dump that would replace another one, or one that left out unreadable images, unless it may again."""
    check_free(files.begun, about, overwrite)
    check_free(files.about, about, overwrite, *([] if files.begun.exists() else [files.X, files.y]))
    skipped = (read_json(files.about) or {}).get("skipped")
    if skipped and not (skip_bad_images or overwrite or files.begun.exists()):
        raise InputError(f"{files.X}: made without {len(skipped)} unreadable image(s), {shorten(skipped)}: pass "
                         "--skip_bad_images to leave it so, or --overwrite to make it again")


def begin(files, about, n, skip_bad_images, overwrite):
    """Make the files to fill, unless they are there from a run that was stopped, or the dump is complete."""
    check_dump(files, about, skip_bad_images, overwrite)
    if files.begun.exists() and not files.rows.exists() and files.X.exists():      # stopped in `finish`: take it back
        os.replace(files.X, files.rows)
    if files.rows.exists() and json_contains(files.begun, about):
        state = read_array(files.state, "r+")
        state[state == UNREADABLE] = TODO              # they may have been repaired since
        state.flush()
        print(f"{files.X}: going on where it stopped")
    elif (files.X.exists() and json_contains(files.about, about)
          and not (overwrite and read_json(files.about)["skipped"])):
        print(f"{files.X}: complete already")
        remove_partial(files)
    else:
        files.begun.unlink(missing_ok=True)
        allocate(files.rows, (n, about["dim"]), about["dtype"])
        allocate(files.state, (n,), np.uint8)
        write_json(files.begun, about)
        files.about.unlink(missing_ok=True)            # what it describes is kept until there is room for the new


@torch.inference_mode()
def fill(model, images, files, device, batch_size, workers, precision, skip_bad_images):
    """This process's share of the batches that are still to do."""
    X, state = (read_array(path, "r+") for path in (files.rows, files.state))
    todo = np.unique(np.flatnonzero(state == TODO) // batch_size)[rank()::world()].tolist()
    loader = make_loader(images, batch_size, workers, device.type == "cuda", todo)
    # together: all have read the state before any writes to it
    for batch, (x, y) in zip(todo, tqdm(begin_together(loader), desc=files.X.name, total=len(todo), unit="batch",
                                        disable=rank() > 0), strict=True):
        rows = slice(batch * batch_size, batch * batch_size + len(y))
        name_unreadable(images, y, rows.start, skip_bad_images)      # an error unless they may be left out
        with autocast(device, precision):
            embeddings = model(x.to(device, non_blocking=True))
        X[rows] = embeddings[:, :X.shape[1]].to(getattr(torch, X.dtype.name)).cpu().numpy()
        if not np.isfinite(X[rows]).all():
            raise InputError(f"{files.X}: embeddings are NaN or infinite; try --precision fp32 and --storage fp32")
        state[rows] = np.where(y.numpy() >= 0, DONE, UNREADABLE)      # after the row is written


def begin_together(loader):
    """-> an iterator whose workers are forked before a barrier: right after one, Python before 3.10.15 and 3.11.10 can
    hang in a fork (CPython 112275). No variable may hold it: after an error it would keep its workers."""
    batches = iter(loader)
    barrier()
    return batches


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
    skipped = [printable(images.path(i)) for i in np.flatnonzero(state == UNREADABLE)]
    write_json(files.about, {**about, "n": len(kept), "skipped": skipped, "complete": True})
    remove_partial(files)


def remove_partial(files):
    for path in (files.begun, files.state, files.rows):      # `begun` first: without it the others count for nothing
        path.unlink(missing_ok=True)


def copy_rows(source, target, kept):
    """A .npy file of only the rows `kept` of another one, a block at a time."""
    X = np.load(source, mmap_mode="r")
    with replacing(target) as temporary:
        out = allocate(temporary, (len(kept), X.shape[1]), X.dtype)
        for start in range(0, len(kept), BLOCK):
            out[start:start + BLOCK] = X[kept[start:start + BLOCK]]
