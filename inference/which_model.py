"""From a checkpoint and flags to a model: which network and head a file holds.

A run of train/ says it in params.json beside the file. For a bare file the flags say it, the name of a file released by
the authors, the file's shapes, and last the original's defaults. What contradicts is an error, never overruled. Used by
pytorch_inference.py and baselines.py.
"""
import re
from pathlib import Path

from MRL import NESTING_LIST
from mrl_files import InputError
from mrl_models import (
    Unsettled,
    default_nesting_list,
    feature_width,
    load_model,
    open_model,
    read_params,
    read_state_dict,
)

FLAGS = {"arch": "--arch", "head": "--mrl, --efficient or --rep_size", "nesting_list": "--nesting_list",
         "old_ckpt": "--old_ckpt"}      # what sets load_model's arguments


def load(path, *flags, old_ckpt=False, **named):
    """-> the model in eval mode, by the flags of `open_checkpoint`."""
    spec = open_checkpoint(path, *flags, old_ckpt=old_ckpt, **named).spec
    return load_model(path, spec["arch"], spec["head"], spec["nesting_list"], old_ckpt)


def open_checkpoint(path, arch=None, mrl=False, efficient=False, rep_size=None, nesting_list=None, old_ckpt=False):
    """-> the model without its numbers, on the meta device; model.spec tells what the file holds. The arguments are the
    flags of pytorch_inference.py.

    nesting_list is of the nested models among those of a command: a fixed-feature model has one size, and shows it.
    rep_size: of a fixed-feature model its size; of a nested one no more than its largest (embeddings are cut there).
    """
    given = {"arch": arch, "head": head_of_flags(mrl, efficient, rep_size), "nesting_list": nesting_list}
    bare = not read_params(path)
    if bare:
        given = fill_from_name(path, given, read_released_name(path) if old_ckpt else {})
    if nesting_list and is_fixed_feature(path, given["head"]):
        given["nesting_list"] = None
    try:
        model, _ = open_model(path, **(fill_defaults(path, given) if bare else given), old_ckpt=old_ckpt)
    except Unsettled as error:
        raise InputError(f"{error.problem}: give {FLAGS[error.argument]}") from None
    largest = model.spec["nesting_list"][-1]
    if rep_size and rep_size > largest:
        raise InputError(f"{path}: --rep_size {rep_size} was asked for, the file holds sizes up to {largest}")
    return model


def head_of_flags(mrl, efficient, rep_size):
    if mrl or efficient:
        return "mrl_e" if efficient else "mrl"
    return f"ff{rep_size}" if rep_size else None


def read_released_name(path):
    """What a released file's name says: r50_mrl1_e0_ff2048.pt; "16start" in it or in its folder's name."""
    path = Path(path)
    match = re.search(r"r(\d+)_mrl([01])_e([01])_ff(\d+)", path.stem)
    if not match:
        return {}
    depth, nested, efficient, size = match.groups()
    start = re.search(r"(\d+)start", f"{path.parent.name}/{path.stem}")
    sizes = [d for d in NESTING_LIST if int(start[1]) <= d <= int(size)] if start else None
    return {"arch": f"resnet{depth}", "head": head_of_flags(nested == "1", efficient == "1", size),
            "nesting_list": sizes if nested == "1" else None}


def fill_from_name(path, given, named):
    """The flags, filled up from the name."""
    for key, value in named.items():
        if None not in (value, given[key]) and value != given[key]:
            raise InputError(f"{path}: the flags say {key}={given[key]}, the file's name {value}")
    return {key: named.get(key) if value is None else value for key, value in given.items()}


def is_fixed_feature(path, head):
    """head: as far as flags and the file's name say it; else params.json or the file's keys do."""
    head = head or read_params(path).get("head")
    return head.startswith("ff") if head else not any("nesting_classifier" in key for key in read_state_dict(path))


def fill_defaults(path, given):
    """The original's defaults for what does not show in a file. load_model holds the result to the file's shapes."""
    arch, sizes = given["arch"] or "resnet50", given["nesting_list"]
    if given["head"] == "mrl_e" and sizes is None:
        sizes = default_nesting_list(feature_width(arch))
        print(f"{path}: the sizes of an MRL-E file do not show in it, taking {sizes} (--nesting_list changes them)")
    return {**given, "arch": arch, "nesting_list": sizes}
