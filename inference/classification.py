"""pytorch_inference.py without --retrieval: the accuracy of each checkpoint per size, and what --save_* asks for."""
from functools import cache
from pathlib import Path

import accuracy_table
import eval_sets
import torch
from evaluate import Outputs, evaluate
from image_set import make_loader
from plans import Plan, is_nested, model_of, opened_set, origin, planned, show_skipped, warn
from saved_files import accuracy_path, check_free, outputs_path, save_tensor, table_stem

from mrl_files import write_json
from mrl_models import classify_in_float32, model_name

SAVED = ("logits", "softmax", "gt", "predictions")


def classify(args, device):
    """Evaluate and write; several checkpoints also give one table."""
    name, row = eval_sets.lookup(eval_sets.CLASSIFICATION, args.dataset or "V1")
    images_for = cache(lambda num_classes: opened_set(row, num_classes, args))
    plans = planned(args, lambda path, spec: [plan(path, spec, name, images_for(spec["num_classes"]), args)])
    stem = table_stem(args.output, name, args.tta)
    if len(plans) > 1:
        check_free(Path(f"{stem}.json"), about_table(plans), args.overwrite, *accuracy_table.files(stem))
    runs = [classify_one(plan, args, device) for plan in plans]
    accuracy_table.show(runs)
    if len(plans) > 1:
        accuracy_table.save(runs, stem, about_table(plans))
    print(f"figures{''.join(f', {what}' for what in wanted(args))} written to {args.output}/")


def plan(path, spec, name, images, args):
    if is_nested(spec) and args.rep_size not in (None, spec["nesting_list"][-1]):
        warn(f"--rep_size {args.rep_size} does nothing here: {path} is evaluated at all its sizes")
    about = {**origin(path, spec, name, images, args), "num_classes": len(images.classes), "tta": args.tta,
             "precision": args.precision or "fp32"}
    files = {what: (outputs_path(args.output, spec, name, args.tta, what), companion(what, about, images))
             for what in wanted(args)}
    for file, says in files.values():
        check_free(file.with_suffix(".json"), says, args.overwrite, file)
    check_free(accuracy_path(args.output, spec, name, args.tta, about["checkpoint"]), about, args.overwrite)
    return Plan(path, spec, images, about, files)


def classify_one(plan, args, device):
    """Evaluate one checkpoint, write its figures and tensors. -> the figures."""
    Path(args.output).mkdir(parents=True, exist_ok=True)
    images, about = plan.images, plan.about
    sizes, classes = len(about["nesting_list"]), len(images.classes)
    keep = Outputs(sizes, len(images), classes, list(plan.files)) if plan.files else None
    loader = make_loader(images, args.batch_size, args.workers, device.type == "cuda")
    model = model_of(plan, args)
    classify_in_float32(model)
    result = evaluate(model, images, loader, device, tta=args.tta, precision=about["precision"],
                      skip_bad_images=args.skip_bad_images, keep=keep)
    show_skipped(result["skipped"])
    run = {"model": model_name(plan.spec), "path": plan.path, **about, **result, "spec": plan.spec,
           "device": args.device, "folder": str(images.folder), "batch_size": args.batch_size,
           "torch": torch.__version__}
    write_json(accuracy_path(args.output, plan.spec, about["dataset"], args.tta, about["checkpoint"]), run)
    for what, tensor in keep.tensors() if keep else ():
        file, says = plan.files[what]
        save_tensor(file, tensor, says | {"n": result["n"], "skipped": result["skipped"]})
    return run


def wanted(args):
    return [what for what in SAVED if getattr(args, f"save_{what}")]


def companion(what, about, images):
    """The JSON beside a saved tensor. Labels belong to the images alone, whichever checkpoint was evaluated."""
    of_the_model = ("checkpoint", "nesting_list", "tta", "precision", "resize", "crop") if what == "gt" else ()
    return {**about, "classes": images.classes, **dict.fromkeys(of_the_model)}


def about_table(plans):
    """The JSON beside a table: the checkpoints, and what they have in common."""
    common = {key: value for key, value in plans[0].about.items() if key not in ("checkpoint", "nesting_list")}
    return {"checkpoints": [plan.about["checkpoint"] for plan in plans], **common}
