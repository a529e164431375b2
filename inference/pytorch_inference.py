"""Evaluate checkpoints on ImageNet and its robustness sets, and dump embeddings for retrieval.

    python pytorch_inference.py --path <run>/final_weights.pt --dataset V2
    python pytorch_inference.py --path ff8.pt ff16.pt mrl.pt --dataset V1                 one table and a plot (Fig. 2)
    python pytorch_inference.py --path <run>/final_weights.pt --tta --save_softmax --save_gt --save_predictions
    python pytorch_inference.py --path <run>/final_weights.pt --retrieval --dataset 1K --retrieval_array_path arrays/
    torchrun --nproc_per_node 8 pytorch_inference.py --retrieval ...                       images split over the GPUs

A run of train/ needs only --path (params.json lies beside the weights). A bare file is a ResNet50 unless --arch says
otherwise; --mrl, --efficient and --rep_size say which head it has, as far as its shapes do not show it.
The files written, and who reads them: saved_files.py.
"""
import argparse
import os
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import NamedTuple

import accuracy_table
import eval_sets
import features
import torch
import torch.distributed as dist
import which_model
from evaluate import Outputs, device_named, evaluate
from image_set import Preparation, make_loader, some
from saved_files import accuracy_path, arrays_stem, check_free, fingerprint, outputs_path, save_tensor, table_stem

from MRL import InputError, check_nesting_list, command_line, load_model, model_name, number, write_json

SAVED = ("logits", "softmax", "gt", "predictions")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add, positive, pixels = parser.add_argument, number(int, 1), number(int, 1, 10_000)
    add("--path", nargs="+", action="extend", required=True, help="checkpoint(s); several give one table")
    add("--dataset", help=f"{', '.join(eval_sets.CLASSIFICATION)} (default V1); "
                          f"with --retrieval {', '.join(eval_sets.RETRIEVAL)} (default 1K)")
    add("--data_root", help="folder that holds the sets (default: $IMAGENET_ROOT, ../../IMAGENET/, the repository)")
    add("--output", help="folder for figures and saved outputs (default: this one)")

    model = parser.add_argument_group("the model, where no params.json lies beside the checkpoint").add_argument
    model("--arch", help="torchvision architecture (default resnet50)")
    model("--mrl", action="store_true", help="nested heads")
    model("--efficient", action="store_true", help="MRL-E: one matrix for all sizes")
    model("--rep_size", type=positive, help="size of a fixed-feature model")
    model("--nesting_list", type=sizes, nargs="+", help="sizes of an MRL-E model (default 8 16 ... 2048)")
    model("--old_ckpt", action="store_true", help="the authors' released files")

    group = parser.add_argument_group("how it runs")
    work, either = group.add_argument, group.add_mutually_exclusive_group().add_argument
    work("--workers", type=number(int, 0, 16 * os.cpu_count()), default=min(12, os.cpu_count()),
         help="processes that read images")
    work("--batch_size", type=positive, default=256)
    work("--resize", type=pixels, default=256, help="pixels of the shorter side before the crop")
    work("--crop", type=pixels, default=224, help="pixels of the central crop")
    work("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    either("--precision", choices=["fp32", "fp16", "bf16"],
           help="of the network (default fp32; with --retrieval on a GPU fp16, as the original)")
    either("--amp", dest="precision", action="store_const", const="fp16", help="the same as --precision fp16")
    work("--skip_bad_images", action="store_true", help="leave unreadable images out instead of stopping")
    work("--overwrite", action="store_true", help="replace files of another checkpoint or other settings")

    classify = parser.add_argument_group("classification").add_argument
    classify("--tta", action="store_true", help="add the logits of the mirrored images")
    for what in SAVED:
        classify(f"--save_{what}", action="store_true", help=f"write {what} for model_analysis/")

    retrieve = parser.add_argument_group("embeddings").add_argument
    retrieve("--retrieval", action="store_true", help="write embeddings instead of classifying")
    retrieve("--retrieval_array_path", help="folder for the arrays (default: this one)")
    retrieve("--random_sample_dim", type=positive, help="embed only so many random images of the database")
    retrieve("--storage", choices=list(features.DTYPES), help="number format of the arrays (default fp32)")
    args = parser.parse_args()
    if args.nesting_list:
        args.nesting_list = check_nesting_list([size for word in args.nesting_list for size in word])
    return args


def sizes(text):
    """"8" or, as train/ spells it, "8,16" -> a list."""
    return [int(size) for size in text.split(",") if size]


# ------------------------------------------------------------------------------------------------ classification

class Plan(NamedTuple):
    """One checkpoint of a command: all that is known of it before the first image is read."""
    path: str
    spec: dict
    images: object       # ImageSet; for embeddings {split: ImageSet}
    about: dict          # what files say of their origin; for embeddings {split: ...}
    files: dict          # {what: (path, its companion's content)}


def classify(args, device):
    """Accuracy of each checkpoint; several give one table."""
    name, row = eval_sets.lookup(eval_sets.CLASSIFICATION, args.dataset or "V1")
    images_for = cache(lambda num_classes: opened_set(row, num_classes, args))
    plans = planned(args, lambda path, spec: plan_figures(path, spec, name, images_for(spec["num_classes"]), args))
    stem = table_stem(args.output, name, args.tta)
    if len(plans) > 1:
        check_free(Path(f"{stem}.json"), about_table(plans), args.overwrite, *accuracy_table.files(stem))
    runs = [classify_one(plan, args, device) for plan in plans]
    accuracy_table.show(runs)
    if len(plans) > 1:
        accuracy_table.save(runs, stem, about_table(plans))
    print(f"figures{''.join(f', {what}' for what in wanted(args))} written to {args.output}/")


def plan_figures(path, spec, name, images, args):
    about = {**origin(path, spec, name, images, args), "num_classes": len(images.classes), "tta": args.tta,
             "precision": args.precision or "fp32"}
    files = {what: (outputs_path(args.output, spec, name, args.tta, what), companion(what, about, images))
             for what in wanted(args)}
    for file, says in files.values():
        check_free(file.with_suffix(".json"), says, args.overwrite, file)
    check_free(accuracy_path(args.output, spec, name, args.tta, about["checkpoint"]), about, args.overwrite)
    return Plan(path, spec, images, about, files)


def classify_one(plan, args, device):
    """Evaluate one checkpoint, write its figures and what --save_* asks for. -> the figures."""
    images, about, name = plan.images, plan.about, model_name(plan.spec)
    Path(args.output).mkdir(parents=True, exist_ok=True)
    sizes, classes = len(about["nesting_list"]), len(images.classes)
    keep = Outputs(sizes, len(images), classes, list(plan.files)) if plan.files else None
    loader = make_loader(images, args.batch_size, args.workers, device.type == "cuda")
    result = evaluate(model_of(plan, args), images, loader, device, args.tta, about["precision"], args.skip_bad_images,
                      keep)
    left_out(result["skipped"])
    run = {"model": name, "path": plan.path, **about, **result, "spec": plan.spec, "device": args.device,
           "folder": str(images.folder), "batch_size": args.batch_size, "torch": torch.__version__}
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
    """What the JSON beside a table says: the checkpoints, and what they have in common."""
    common = {key: value for key, value in plans[0].about.items() if key not in ("checkpoint", "nesting_list")}
    return {"checkpoints": [plan.about["checkpoint"] for plan in plans], **common}


# ------------------------------------------------------------------------------------------------ embeddings

def retrieve(args, device):
    """Embeddings of the queries (val) and of the database (train)."""
    name, splits = eval_sets.lookup(eval_sets.RETRIEVAL, args.dataset or "1K")
    if args.random_sample_dim and "train" not in splits:
        raise InputError(f"--random_sample_dim: --dataset {name} has queries only, it searches 1K's database")
    images_for = cache(lambda num_classes: opened_splits(splits, num_classes, args))
    plans = features.together(planned, args, lambda path, spec: plan_embeddings(
        path, spec, name, images_for(spec["num_classes"]), device, args))
    for plan in plans:
        network = features.embedder(model_of(plan, args)).to(device)
        for split in splits:
            retrieve_one(network, plan, split, device, args)


def opened_splits(splits, num_classes, args):
    opened = {split: opened_set(row, num_classes, args) for split, row in splits.items()}
    same_classes(opened)
    if args.random_sample_dim:
        opened["train"].sample(args.random_sample_dim)
    return opened


def plan_embeddings(path, spec, name, opened, device, args):
    precision = args.precision or ("fp16" if device.type == "cuda" else "fp32")
    about = {split: {**origin(path, spec, name, images, args), "split": split} for split, images in opened.items()}
    files = {split: (arrays_stem(args.retrieval_array_path or ".", name, split, spec),
                     features.noted(about[split], precision, args.storage or "fp32")) for split in opened}
    for stem, says in files.values():
        features.check_dump(features.Files(stem), says, args.skip_bad_images, args.overwrite)
    return Plan(path, spec, opened, about, files)


def retrieve_one(network, plan, split, device, args):
    stem, says = plan.files[split]
    written = features.dump(network, plan.images[split], stem, plan.about[split], device, args.batch_size, args.workers,
                            says["precision"], args.storage or "fp32", args.skip_bad_images, args.overwrite)
    if features.rank() == 0:
        print(f"{stem}-X.npy: {written['n']} x {written['dim']} {written['dtype']}, {len(written['skipped'])} skipped")
        left_out(written["skipped"])


def same_classes(opened):
    orders = {split: images.classes for split, images in opened.items()}
    if len({tuple(classes) for classes in orders.values()}) > 1:
        different = sorted(set(orders["train"]) ^ set(orders["val"]))
        raise InputError(f"{opened['train'].folder} and {opened['val'].folder} have different class folders: "
                         f"{some(different)}")


# ------------------------------------------------------------------------------------------------ both

def planned(args, plan):
    """-> one Plan per checkpoint, from plan(path, spec), so that an error in the last shows before hours of work on the
    first. Weights are not kept but read again later, so that all checkpoints need not fit in memory at once."""
    plans = [plan(path, checkpoint(path, args).spec) for path in dict.fromkeys(args.path)]
    if args.nesting_list and not any(plan.spec["head"].startswith("mrl") for plan in plans):
        raise InputError("--nesting_list has no meaning here: a fixed-feature model has one size")
    says_of = {}
    for file, says in (pair for plan in plans for pair in plan.files.values()):
        if says_of.setdefault(file, says) != says:
            raise InputError(f"--path: two of them would write {file}; give them an {folder_flag(args)} each")
    return plans


def folder_flag(args):
    return "--retrieval_array_path" if args.retrieval else "--output"


def checkpoint(path, args):
    return which_model.load(path, args.arch, args.mrl, args.efficient, args.rep_size, args.nesting_list, args.old_ckpt)


def model_of(plan, args):
    return load_model(plan.path, *(plan.spec[key] for key in ("arch", "head", "nesting_list")), args.old_ckpt)


def opened_set(row, num_classes, args):
    if args.resize < args.crop:
        raise InputError(f"--resize {args.resize} is smaller than --crop {args.crop}")
    preparation = Preparation(args.resize, args.crop)
    images = eval_sets.open_set(row, num_classes, preparation, args.data_root, args.retrieval)
    if (note := eval_sets.incomplete(row, images)) and features.rank() == 0:
        print(note)
    return images


def origin(path, spec, dataset, images, args):
    """What files remember of the checkpoint and the images they came from."""
    return {"checkpoint": fingerprint(path), "nesting_list": spec["nesting_list"], "dataset": dataset,
            "images": images.digest(), "resize": args.resize, "crop": args.crop}


def left_out(bad):
    if bad:
        print(f"{len(bad)} unreadable image(s) left out: {some(bad)}")


def start_device(args):
    """-> the device; under torchrun this process's own, after joining the group (gloo: only barriers are needed)."""
    if processes() == 1:
        return device_named(args.device)
    gpus = torch.cuda.device_count() if args.device.startswith("cuda") else 0
    device = device_named(f"cuda:{int(os.environ['LOCAL_RANK']) % gpus}" if gpus else args.device)
    dist.init_process_group("gloo", timeout=timedelta(days=7))
    return device


def processes():
    """How many torchrun has started."""
    return int(os.environ["WORLD_SIZE"]) if "LOCAL_RANK" in os.environ else 1


def check_flags(args):
    """InputError for a flag that would do nothing."""
    idle = (("output", "tta", *(f"save_{what}" for what in SAVED)) if args.retrieval
            else ("retrieval_array_path", "random_sample_dim", "storage"))
    for flag in idle:
        if getattr(args, flag):
            raise InputError(f"--{flag} has no meaning {'with' if args.retrieval else 'without'} --retrieval")


def main():
    args = arguments()
    check_flags(args)
    args.output = args.output or "."
    if processes() > 1 and not args.retrieval:
        raise InputError("torchrun splits the images for --retrieval only; classification runs in one process")
    (retrieve if args.retrieval else classify)(args, start_device(args))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    command_line(main)
