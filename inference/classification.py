"""pytorch_inference.py without --retrieval: the accuracy of each checkpoint per size, and what --save_* asks for.

One path for all heads: logits are [G, N, C], and a fixed-feature model is the case G = 1.
"""
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

import accuracy_table
import eval_sets
import torch
from image_set import ImageSet, Preparation, make_loader, name_unreadable, show_skipped
from processes import warn
from saved_files import (
    accuracy_path,
    check_distinct,
    check_free,
    describe_origin,
    outputs_path,
    save_tensor,
    table_paths,
)
from tqdm import tqdm
from which_model import check_checkpoints, is_fixed_feature

from mrl_files import InputError, write_json
from mrl_models import autocast, classify_in_float32, compute_logits, count, load_model, model_name, preparation

SAVED = ("logits", "softmax", "gt", "predictions")


class Evaluation(NamedTuple):
    """One checkpoint and the images it is evaluated on, checked before the first image is read."""
    path: str
    spec: dict           # model.spec
    images: ImageSet
    about: dict          # what files say of their origin
    files: dict          # {what --save_* asks for: (path, the content of its JSON)}


def classify(args, device):
    """Evaluate and write; several checkpoints also give one table."""
    name, row = eval_sets.find_row(eval_sets.CLASSIFICATION, args.dataset or "V1")
    images_for = cache(lambda num_classes, prepared: eval_sets.open_set(row, num_classes, Preparation(*prepared),
                                                                        args.data_root))
    plans = [plan_evaluation(path, spec, name,
                             images_for(spec["num_classes"], preparation(spec, args.resize, args.crop)), args)
             for path, spec in check_checkpoints(args).items()]
    check_distinct((file for plan in plans for file in plan.files.values()), "--output")
    text, picture, companion = table_paths(args.output, name, args.tta)
    if len(plans) > 1:
        check_free(companion, about_table(plans), args.overwrite, text, picture)
    runs = [classify_one(plan, args, device) for plan in plans]
    accuracy_table.show(runs)
    if len(plans) > 1:
        accuracy_table.save(runs, text, picture, companion, about_table(plans))
    print(f"{', '.join(['figures', *plans[0].files])} written to {args.output}/")


def plan_evaluation(path, spec, name, images, args):
    if not is_fixed_feature(spec["head"]) and args.rep_size not in (None, spec["nesting_list"][-1]):
        warn(f"--rep_size {args.rep_size} does nothing here: {path} is evaluated at all its sizes")
    about = {**describe_origin(path, spec, name, images), "num_classes": len(images.classes), "tta": args.tta,
             "precision": args.precision or "fp32"}
    files = {what: (outputs_path(args.output, spec, name, args.tta, what), describe_output(what, about, images))
             for what in SAVED if getattr(args, f"save_{what}")}
    for file, says in files.values():
        check_free(file.with_suffix(".json"), says, args.overwrite, file)
    check_free(accuracy_path(args.output, spec, name, args.tta, about["checkpoint"]), about, args.overwrite)
    return Evaluation(path, spec, images, about, files)


def classify_one(plan, args, device):
    """Evaluate one checkpoint, write its figures and tensors. -> the figures."""
    Path(args.output).mkdir(parents=True, exist_ok=True)
    spec, images, about = plan.spec, plan.images, plan.about
    sizes, classes = len(about["nesting_list"]), len(images.classes)
    keep = Outputs(sizes, len(images), classes, list(plan.files)) if plan.files else None
    loader = make_loader(images, args.batch_size, args.workers, device.type == "cuda")
    model = load_model(plan.path, spec["arch"], spec["head"], spec["nesting_list"], args.old_ckpt)
    classify_in_float32(model)
    result = evaluate(model, images, loader, device, tta=args.tta, precision=about["precision"],
                      skip_bad_images=args.skip_bad_images, keep=keep)
    show_skipped(result["skipped"])
    run = {"model": model_name(spec), "path": plan.path, **about, **result, "spec": spec,
           "device": args.device, "folder": str(images.folder), "batch_size": args.batch_size,
           "torch": torch.__version__}
    write_json(accuracy_path(args.output, spec, about["dataset"], args.tta, about["checkpoint"]), run)
    for what, tensor in keep.tensors() if keep else ():
        file, says = plan.files[what]
        save_tensor(file, tensor, says | {"n": result["n"], "skipped": result["skipped"]})
    return run


def describe_output(what, about, images):
    """The JSON beside a saved tensor. Labels belong to the images alone, whichever checkpoint was evaluated."""
    of_the_model = ("checkpoint", "nesting_list", "tta", "precision", "resize", "crop") if what == "gt" else ()
    return {**about, "classes": images.classes, **dict.fromkeys(of_the_model)}


def about_table(plans):
    """The JSON beside a table: the checkpoints, and what they have in common."""
    common = {key: value for key, value in plans[0].about.items() if key not in ("checkpoint", "nesting_list")
              and all(plan.about[key] == value for plan in plans)}
    return {"checkpoints": [plan.about["checkpoint"] for plan in plans], **common}


# ------------------------------------------------------------------------------------------------ one evaluation

@torch.inference_mode()
def evaluate(model, images, loader, device, *, tta=False, precision="fp32", skip_bad_images=False, keep=None):
    """Run the images through the model, counting on the device.

    keep: called with (logits [G, n, C], y [n]) of each batch of readable images; see `Outputs`.
    -> {"n", "top1" [G], "top5" [G], "loss" [G], "skipped", "seconds"}; accuracies are fractions.
    """
    model.to(device)
    subset = None if images.subset is None else torch.tensor(images.subset, device=device)
    sums, n, bad, start_time = 0, 0, [], time.perf_counter()
    for x, y in tqdm(loader, desc="evaluate", unit="batch", dynamic_ncols=True):
        unreadable = name_unreadable(images, y, n + len(bad), skip_bad_images)
        bad += unreadable
        with autocast(device, precision):
            logits = compute_logits(model, x.to(device, non_blocking=True), tta)
        y = y.to(device, non_blocking=True)
        if subset is not None:
            logits = logits.index_select(-1, subset)
        if unreadable:
            logits, y = logits[:, y >= 0], y[y >= 0]
        sums = sums + count(logits / 2 if tta else logits, y)      # the loss of the mean, as in training's log
        if keep is not None:
            keep(logits, y)
        n += len(y)
    return summarise(sums, n, bad, time.perf_counter() - start_time)


def summarise(sums, n, bad, seconds):
    if n == 0:
        raise InputError(f"none of the {len(bad)} images can be read")
    top1, top5, loss = (sums / n).tolist()
    if not torch.isfinite(sums).all():
        raise InputError("the model's logits are not finite; try --precision fp32")
    return {"n": n, "top1": top1, "top5": top5, "loss": loss, "skipped": bad, "seconds": seconds}


class Outputs:
    """Collects what `wanted` names (gt, predictions, logits, softmax) on the CPU while `evaluate` runs.

    n: images so far. gt [N], predictions [G, N], int64. logits [G, N, C] float32, or None where neither they nor their
    softmax is wanted; they are held once (1.8 GB for ImageNet), their softmax takes their place.
    """

    def __init__(self, sizes, n, classes, wanted):
        self.wanted, self.n = wanted, 0
        self.gt = torch.empty(n, dtype=torch.int64)
        self.predictions = torch.empty(sizes, n, dtype=torch.int64)
        self.logits = torch.empty(sizes, n, classes) if {"logits", "softmax"} & set(wanted) else None

    def __call__(self, logits, y):
        rows = slice(self.n, self.n + len(y))
        self.n = rows.stop
        self.gt[rows], self.predictions[:, rows] = y.cpu(), logits.argmax(-1).cpu()
        if self.logits is not None:
            self.logits[:, rows] = logits.cpu()

    def tensors(self):
        """Yields (name, tensor) for each that is wanted."""
        logits = None if self.logits is None else self.logits[:, :self.n].contiguous()    # a copy if any was skipped
        made = {"gt": self.gt[:self.n].clone(), "predictions": self.predictions[:, :self.n].clone(), "logits": logits}
        yield from ((what, tensor) for what, tensor in made.items() if what in self.wanted)
        if "softmax" in self.wanted:
            for one_size in logits:
                torch.softmax(one_size, -1, out=one_size)
            yield "softmax", logits
