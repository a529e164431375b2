"""Which network and head each checkpoint holds.

Where a run of train/ left params.json beside the file, that says it. Of a bare file the flags say it, or the name of a
file that the authors released; what neither says, and no shape in the file shows, is the original's default. What
contradicts is an error, never overruled. Used by classification.py, embeddings.py, baselines.py and export.py.
"""
import re
from pathlib import Path

from processes import warn

from MRL import NESTING_LIST
from mrl_files import InputError, read_json
from mrl_models import (
    check_image_size,
    default_nesting_list,
    feature_width,
    find_json,
    open_model,
    read_params,
    similar_sizes,
)


def check_checkpoints(args):
    """-> {path: model.spec}, if the weights of all can be read, and all take images of this size: an error in the last
    one shows before hours of work on the first. Weights are read again later: those of all need not fit in memory."""
    return {path: check_checkpoint(path, args) for path in args.path}


def check_checkpoint(path, args):
    """-> model.spec. --rep_size is a fixed-feature model's size; a nested one's embeddings are cut there."""
    model, _ = open_by_flags(path, args)
    largest = model.spec["nesting_list"][-1]
    if args.rep_size and args.rep_size > largest:
        raise InputError(f"{path}: --rep_size {args.rep_size} was asked for, the file holds sizes up to {largest}")
    check_image_size(model, args.crop, "crop")
    warn_of_other_size(path, args.crop)
    return model.spec


def read_trained_resolution(path):
    """-> pixels a side of the images that a run of train/ validated on; None where none says it."""
    noted = read_json(find_json(path)) or {}
    try:
        return int(noted["settings"]["validation"]["resolution"])
    except (KeyError, TypeError, ValueError):
        return None


def warn_of_other_size(path, crop):
    trained = read_trained_resolution(path)
    if trained and not similar_sizes(trained, crop):
        warn(f"{path}: trained for images of {trained} pixels, here they have {crop}: --crop {trained} gives them that")


def open_by_flags(path, args):
    """`open_checkpoint` with the flags that pytorch_inference.py and export.py share."""
    nested = read_params(path).get("head", "").startswith("mrl")      # of such a run --rep_size is where it is cut
    head = name_head(args.mrl or args.efficient, args.efficient, None if nested else args.rep_size)
    return open_checkpoint(path, args.arch, head, args.nesting_list, args.old_ckpt)


def open_checkpoint(path, arch=None, head=None, nesting_list=None, old_ckpt=False):
    """open_model with the defaults of a command -> (the model without its numbers, its state dict)."""
    given = {"arch": arch, "head": head, "nesting_list": nesting_list}
    if not read_params(path):
        given = add_defaults(path, add_name(path, given) if old_ckpt else given)
    return open_model(path, **given, old_ckpt=old_ckpt)


def name_head(nested, efficient, size):
    """-> load_model's word for a head; None where nothing says which."""
    if nested:
        return "mrl_e" if efficient else "mrl"
    return f"ff{size}" if size else None


def is_fixed_feature(head):
    return head.startswith("ff")


def read_released_name(path):
    """What the name of a released file says (r50_mrl1_e0_ff2048.pt), or that of its folder on the hub
    (Imagenet1k_R50_mrl_e_16start, resnet18-ff512), in either of which "16start" is the smallest size."""
    path = Path(path)
    match = (re.search(r"r(\d+)_mrl([01])_e([01])_ff(\d+)", path.stem)
             or re.search(r"(?:_R|^resnet)(\d+)[_-](mrl)?(_e)?(?:ff(\d+))?", path.parent.name))
    if not match or not any(match.groups()[1:]):
        return {}
    depth, nested, efficient, size = match.groups()
    nested, efficient = nested in ("1", "mrl"), efficient in ("1", "_e")
    start = re.search(r"(\d+)start", f"{path.parent.name}/{path.stem}")
    arch, head = f"resnet{depth}", name_head(nested, efficient, size)
    if not nested or not start:
        return {"arch": arch, "head": head, "nesting_list": None}
    largest = int(size or feature_width(arch))
    return {"arch": arch, "head": head, "nesting_list": [d for d in NESTING_LIST if int(start[1]) <= d <= largest]}


def add_name(path, given):
    """The flags, and what the file's name says where they do not."""
    named = read_released_name(path)
    for key, value in named.items():
        if None not in (value, given[key]) and value != given[key]:
            raise InputError(f"{path}: the flags say {key}={given[key]}, the file's name {value}")
    return {key: named.get(key) if value is None else value for key, value in given.items()}


def add_defaults(path, given):
    """The original's, for what does not show in a file. load_model holds the result to the file's shapes."""
    arch, sizes = given["arch"] or "resnet50", given["nesting_list"]
    if given["head"] == "mrl_e" and sizes is None:
        sizes = default_nesting_list(feature_width(arch))
        print(f"{path}: the sizes of an MRL-E file do not show in it, taking {sizes} (--nesting_list changes them)")
    return {**given, "arch": arch, "nesting_list": sizes}
