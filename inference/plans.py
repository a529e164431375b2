"""What a command will do with each checkpoint, settled and checked before the first image is read.

classification.py and embeddings.py begin with it.
"""
from typing import NamedTuple

import eval_sets
import which_model
from image_set import ImageSet, Preparation, shorten
from processes import rank, warn
from saved_files import fingerprint

from mrl_files import InputError
from mrl_models import check_image_size, load_model


class Plan(NamedTuple):
    """One checkpoint and the images it is run on."""
    path: str
    spec: dict           # model.spec
    images: ImageSet
    about: dict          # what files say of their origin
    files: dict          # {what: (path, the content of its JSON)}: what will be written, but for figures


def plan_all(args, plans_of):
    """-> all Plans: those of plans_of(path, spec) for each checkpoint, so that an error in the last one shows before
    hours of work on the first. Weights are not kept but read again later: those of all need not fit in memory."""
    plans = [plan for path in dict.fromkeys(args.path) for plan in plans_of(path, check_checkpoint(path, args))]
    if args.nesting_list and not any(is_nested(plan.spec) for plan in plans):
        warn("--nesting_list does nothing here: a fixed-feature model has one size")
    says_of = {}
    for file, says in (pair for plan in plans for pair in plan.files.values()):
        if says_of.setdefault(file, says) != says:
            flag = "--retrieval_array_path" if args.retrieval else "--output"
            raise InputError(f"--path: two of them would write {file}; give them an {flag} each")
    return plans


def check_checkpoint(path, args):
    """-> the spec of a checkpoint whose weights can be read, and which takes images of this size."""
    model = which_model.open_checkpoint(path, args.arch, args.mrl, args.efficient, args.rep_size, args.nesting_list,
                                        args.old_ckpt)
    check_image_size(model, args.crop, "crop")
    return model.spec


def is_nested(spec):
    return spec["head"].startswith("mrl")


def model_of(plan, args):
    """-> the model in eval mode, on the CPU."""
    return load_model(plan.path, *(plan.spec[key] for key in ("arch", "head", "nesting_list")), args.old_ckpt)


def open_images(row, num_classes, args):
    """-> the ImageSet of a row of eval_sets.py, for a model of so many classes."""
    if args.resize < args.crop:
        raise InputError(f"--resize {args.resize} is smaller than --crop {args.crop}")
    preparation = Preparation(args.resize, args.crop)
    images = eval_sets.open_set(row, num_classes, preparation, args.data_root, args.retrieval)
    if (note := eval_sets.incomplete(row, images)) and rank() == 0:
        print(note)
    return images


def describe_origin(path, spec, dataset, images, args):
    """-> what files remember of the checkpoint and the images they came from."""
    return {"checkpoint": fingerprint(path), "nesting_list": spec["nesting_list"], "dataset": dataset,
            "images": images.digest(), "resize": args.resize, "crop": args.crop}


def show_skipped(images):
    if images:
        print(f"{len(images)} unreadable image(s) left out: {shorten(images)}")
