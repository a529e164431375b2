"""The files that inference leaves for analysis and retrieval: their names, their JSON companions, and reading arrays.

    mrl=True_efficient=False_ff=2048_dataset=V1_tta=False_softmax.pth     logits, softmax [G, N, C]; predictions [G, N]
    gt_dataset=V1.pth                                                     [N] int64
    1K_train_mrl1_e0_ff2048-X.npy, -y.npy                                 [N, D] float32, [N] int64
    accuracy_dataset=V1_tta=False.csv, .png                               the figures of several checkpoints

Beside each .pth, -X.npy and .csv lies a .json that says which checkpoint and images it came from, so that files of two
runs are never mixed: what belongs to another run is not overwritten unless that was asked for, nor is what has no .json
(the original writes some of these names).
"""
import hashlib
from pathlib import Path

import torch

from mrl_files import InputError, read_embeddings, read_json, read_labels, replacing, write_json


def outputs_path(folder, spec, dataset, tta, what):
    """what: logits, softmax, predictions or gt."""
    if what == "gt":
        return Path(folder) / f"gt_dataset={dataset}.pth"
    return Path(folder) / f"{run_name(spec, dataset, tta)}_{what}.pth"


def accuracy_path(folder, spec, dataset, tta, checkpoint):
    """The figures of one checkpoint. Its fingerprint is in the name: any number of runs fit in one folder."""
    return Path(folder) / f"{run_name(spec, dataset, tta)}_accuracy_{checkpoint}.json"


def table_paths(folder, dataset, tta):
    """The figures of several checkpoints: .csv, .png, and the .json that says which."""
    return [Path(folder) / f"accuracy_dataset={dataset}_tta={bool(tta)}{end}" for end in (".csv", ".png", ".json")]


def run_name(spec, dataset, tta):
    nested, efficient = spec["head"].startswith("mrl"), spec["head"] == "mrl_e"
    return f"mrl={nested}_efficient={efficient}_ff={spec['nesting_list'][-1]}_dataset={dataset}_tta={bool(tta)}"


def arrays_stem(folder, dataset, split, model):
    """The common beginning of -X.npy, -y.npy and -X.json; model: "mrl1_e0_ff2048"."""
    return Path(folder) / f"{dataset}_{split}_{model}"


def describe_origin(path, spec, dataset, images):
    """-> what files remember of the checkpoint and the images they came from."""
    return {"checkpoint": fingerprint(path), "nesting_list": spec["nesting_list"], "dataset": dataset,
            "images": images.digest(), "resize": images.transform.resize, "crop": images.transform.crop}


def fingerprint(path):
    """The first 16 hex digits of a file's SHA-256: which checkpoint something came from."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


def save_tensor(path, tensor, about):
    """A plain tensor, for torch.load(path, mmap=True, weights_only=True), and its JSON.

    Stopped anywhere, it leaves no tensor beside the JSON of another, and none without: that would count as foreign.
    """
    with replacing(path) as temporary:
        torch.save(tensor, temporary)
        path.unlink(missing_ok=True)
        write_json(path.with_suffix(".json"), about)


def check_free(companion, about, overwrite, *files):
    """Refuse to replace files whose companion says that they came from something else, or that have none."""
    old = read_json(companion)
    if overwrite:
        return
    foreign = next((file for file in files if file.exists()), None)
    if old is None and foreign:
        raise InputError(f"{foreign}: nothing beside it says what it was made from (no {companion.name}): "
                         "choose another folder, or pass --overwrite")
    for key in about if old is not None else ():
        if old.get(key) != about[key]:
            raise InputError(f"{companion} says that the files there have {key}={old.get(key)}, not {about[key]}: "
                             "choose another folder, or pass --overwrite")


def check_distinct(files, flag):
    """files: pairs (path, the content of its JSON) of one command. Refuse two contents for one path."""
    contents = {}
    for file, content in files:
        if contents.setdefault(file, content) != content:
            raise InputError(f"--path: two of them would write {file}; give them an {flag} each")


def read_arrays(folder, dataset, split, model):
    """-> X [N, D] float32 or float16, memory-mapped; y [N] int64; the companion's content ({} where there is none)."""
    stem = str(arrays_stem(folder, dataset, split, model))
    if not Path(f"{stem}-X.npy").exists():
        there = ", ".join(sorted(path.name for path in Path(folder).glob(f"{dataset}_{split}_*-X.npy")))
        raise InputError(f"{stem}-X.npy: no such file; " + (f"--model may name one of {there}" if there else
                                                           "write it with pytorch_inference.py --retrieval"))
    X = read_embeddings(f"{stem}-X.npy")
    return X, read_labels(f"{stem}-y.npy", len(X)), read_json(f"{stem}-X.json") or {}
