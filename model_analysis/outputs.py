"""Reads what inference/pytorch_inference.py saved: softmax, logits or predictions, and the true classes.

    softmax, gt, info = outputs.read("../inference", "softmax", head="mrl", dataset="V1", tta=True)

Every notebook of this folder gets its arrays here. A file's name says which model, set and augmentation it is of; the
.json of the same stem says the sizes, the class names and the checkpoint. Files written by the original repository
have no .json and other spellings; they are read too.
"""
import re
from pathlib import Path

import torch

from mrl_files import InputError, check_labels, describe_error, file_path, identify_file, read_json

# The original's script leaves `_ff=` out, and some of its notebooks write 1 for True.
NAME = re.compile(r"mrl=(?P<mrl>\w+?)_efficient=(?P<efficient>\w+?)(_ff=(?P<size>\d+))?_dataset=(?P<dataset>.+)"
                  r"_tta=(?P<tta>\w+?)_(?P<kind>logits|softmax|predictions)")
YES = ("True", "1")


def read(folder, kind, head="mrl", dataset="V1", tta=False):
    """-> (array, gt, info) of one model on one set, as inference saved them.

    kind: "softmax" or "logits", float32 [G, N, C], memory-mapped: pages are read when touched; "predictions", int64
    [G, N]. head: "mrl", "mrl_e" or "ff<d>" (G = 1).
    gt: int64 [N]. info: head, dataset, tta, nesting_list [G], num_classes, classes (names in order), and the
    fingerprints checkpoint and images (of the list of images). For the original's files the last three are None.
    Raises InputError when a file is missing (with the command that makes it), broken, or not of the same run as gt.
    """
    if not re.fullmatch(r"mrl|mrl_e|ff\d+", head):
        raise InputError(f"head={head!r}: give mrl, mrl_e or ff<size>")
    wanted = {"kind": kind, "head": head, "dataset": dataset, "tta": tta}
    path, gt_path = find(folder, wanted), find_gt(folder, wanted)
    array, gt = load(path, dims=2 if kind == "predictions" else 3), load(gt_path, dims=1)
    said, said_of_gt = (read_json(file.with_suffix(".json")) or {} for file in (path, gt_path))
    info = describe_run(path, array, wanted, said)
    check_together(path, array, gt, info, said_of_gt.get("images"))
    return array, gt, info


def same_run(*infos):
    """Raise InputError unless these `info`s are of one model: same checkpoint (where it is known), same sizes."""
    first = infos[0]
    for other in infos[1:]:
        if other["nesting_list"] != first["nesting_list"]:
            raise InputError(f"{first['dataset']} has the sizes {first['nesting_list']}, {other['dataset']} has "
                             f"{other['nesting_list']}: files of different models")
        if None not in (first["checkpoint"], other["checkpoint"]) and other["checkpoint"] != first["checkpoint"]:
            raise InputError(f"{first['dataset']} and {other['dataset']} are of different checkpoints "
                             f"({first['checkpoint']}, {other['checkpoint']}): run inference again with one of them")


# ------------------------------------------------------------------------------------------------ which file

def find(folder, wanted):
    """-> the one file in `folder` that holds what is wanted."""
    named = {path: parse(path.stem) for path in saved_files(folder)}
    fitting = [path for path, name in named.items() if name and matches(name, wanted)]
    if len(fitting) > 1:
        raise InputError(f"{folder}: several files fit: {', '.join(p.name for p in fitting)}; keep one of them there")
    if not fitting:
        there = [path.name for path, name in named.items() if name and same_name(name["dataset"], wanted["dataset"])]
        raise InputError(f"{folder}: no {wanted['kind']} of {wanted['head']} on {wanted['dataset']} with "
                         f"tta={wanted['tta']} (for this set it holds: {', '.join(there) or 'nothing'}); make it: "
                         + inference_command(wanted))
    return fitting[0]


def find_gt(folder, wanted):
    fitting = [path for path in saved_files(folder) if same_name(path.stem, f"gt_dataset={wanted['dataset']}")]
    if len(fitting) != 1:
        raise InputError(f"{folder}: {len(fitting) or 'no'} gt_dataset={wanted['dataset']}.pth (the true classes); "
                         f"make it: {inference_command(wanted)}")
    return fitting[0]


def saved_files(folder):
    folder = file_path(folder)
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: no such folder; it must be the one where pytorch_inference.py saved its files")
    return sorted(Path(folder).glob("*.pth"))


def parse(stem):
    """A file name without its ending -> kind, head, dataset, tta, or None for another file."""
    if not (found := NAME.fullmatch(stem)):
        return None
    name = found.groupdict()
    head = "mrl_e" if name["efficient"] in YES else "mrl" if name["mrl"] in YES else f"ff{name['size'] or ''}"
    return {"kind": name["kind"], "head": head, "dataset": name["dataset"], "tta": name["tta"] in YES}


def matches(name, wanted):
    """The size of a fixed-feature model, which the original's names leave out, may be any."""
    head = name["head"] == wanted["head"] or (name["head"] == "ff" and wanted["head"].startswith("ff"))
    return (head and name["kind"] == wanted["kind"] and name["tta"] == wanted["tta"]
            and same_name(name["dataset"], wanted["dataset"]))


def same_name(a, b):
    """Upper and lower case are the same: the original's script says sketch, its README Sketch."""
    return str(a).casefold() == str(b).casefold()


def inference_command(wanted):
    head = {"mrl": "--mrl", "mrl_e": "--mrl --efficient"}.get(wanted["head"], f"--rep_size {wanted['head'][2:]}")
    return (f"cd inference && python pytorch_inference.py --path <final_weights.pt> {head} "
            f"--dataset {wanted['dataset']}{' --tta' * wanted['tta']} --save_{wanted['kind']} --save_gt")


# ------------------------------------------------------------------------------------------------ what it holds

def load(path, dims):
    """-> the file's array: float32 [G, N, C] for dims=3, int64 [G, N] for 2, int64 [N] for 1."""
    try:
        array = torch.load(path, map_location="cpu", mmap=True, weights_only=True).numpy()
    except Exception as error:
        raise InputError(f"{path}: not a saved tensor, or truncated "
                         f"({identify_file(path) or describe_error(error)})") from None
    if dims > 1 and array.ndim == dims - 1:                 # the original's fixed-feature files have no axis for sizes
        array = array[None]
    if dims == 1 and array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]                                 # and some of its labels are [N, 1]
    if array.ndim != dims or not array.size:
        raise InputError(f"{path}: has shape {list(array.shape)}, expected "
                         f"{['[N]', '[G, N]', '[G, N, C]'][dims - 1]} with N > 0")
    return array if dims == 3 else check_labels(array, path)


def describe_run(path, array, wanted, said):
    """-> info, from what the .json beside the file said, or as far as the name and the shape show it."""
    shown = {"nesting_list": sizes_by_name(path, array, wanted["head"]), "classes": None, "checkpoint": None,
             "images": None, "num_classes": array.shape[2] if array.ndim == 3 else None}
    return {**{key: wanted[key] for key in ("head", "dataset", "tta")},
            **{key: said.get(key, value) for key, value in shown.items()}}


def sizes_by_name(path, array, head):
    """The sizes of a file without .json: G of them, doubling up to the one in its name (2048 where it has none)."""
    if head.startswith("ff"):
        return [int(head[2:])]
    named = re.search(r"ff=(\d+)", path.stem)
    return [int(named[1] if named else 2048) >> i for i in reversed(range(len(array)))]


def check_together(path, array, gt, info, images_of_gt):
    """InputError unless the array, its description and the true classes belong together."""
    if len(info["nesting_list"]) != len(array):
        raise InputError(f"{path}: holds {len(array)} sizes, its description {info['nesting_list']}")
    if array.shape[1] != len(gt):
        raise InputError(f"{path}: has {array.shape[1]} images, the true classes beside it {len(gt)}; they are of "
                         "different runs: save both in one run of inference")
    if array.ndim == 3 and array.shape[2] != info["num_classes"]:
        raise InputError(f"{path}: has {array.shape[2]} classes, its description {info['num_classes']}")
    largest = max(gt.max(), array.max() if array.ndim == 2 else 0)
    if info["num_classes"] is not None and largest >= info["num_classes"]:
        raise InputError(f"{path}: class {largest} is beyond the {info['num_classes']} classes of the model")
    if None not in (info["images"], images_of_gt) and info["images"] != images_of_gt:
        raise InputError(f"{path}: of different images than the true classes; save both in one run of inference")
