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
from pathlib import Path

import accuracy_table
import eval_sets
import features
import torch
import torch.distributed as dist
import which_model
from evaluate import Outputs, device_named, evaluate
from image_set import Preparation, make_loader, some
from saved_files import accuracy_path, arrays_stem, check_free, fingerprint, outputs_path, save_tensor

from MRL import InputError, command_line, model_name, number, write_json

SAVED = ("logits", "softmax", "gt", "predictions")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add, positive, pixels = parser.add_argument, number(int, 1), number(int, 1, 10_000)
    add("--path", nargs="+", action="extend", required=True, help="checkpoint(s); several give one table")
    add("--dataset", help=f"{', '.join(eval_sets.CLASSIFICATION)} (default V1); "
                          f"with --retrieval {', '.join(eval_sets.RETRIEVAL)} (default 1K)")
    add("--data_root", help="folder that holds the sets (default: $IMAGENET_ROOT, ../../IMAGENET/, the repository)")
    add("--output", default=".", help="folder for figures and saved outputs")

    model = parser.add_argument_group("the model, where no params.json lies beside the checkpoint").add_argument
    model("--arch", help="torchvision architecture (default resnet50)")
    model("--mrl", action="store_true", help="nested heads")
    model("--efficient", action="store_true", help="MRL-E: one matrix for all sizes")
    model("--rep_size", type=positive, help="size of a fixed-feature model")
    model("--nesting_list", type=int, nargs="+", help="sizes of an MRL-E model (default 8 16 ... 2048)")
    model("--old_ckpt", action="store_true", help="the authors' released files")

    work = parser.add_argument_group("how it runs").add_argument
    work("--workers", type=number(int, 0, 16 * os.cpu_count()), default=min(12, os.cpu_count()),
         help="processes that read images")
    work("--batch_size", type=positive, default=256)
    work("--resize", type=pixels, default=256, help="pixels of the shorter side before the crop")
    work("--crop", type=pixels, default=224, help="pixels of the central crop")
    work("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    work("--precision", choices=["fp32", "fp16", "bf16"],
         help="of the network (default fp32; with --retrieval on a GPU fp16, as the original)")
    work("--amp", dest="precision", action="store_const", const="fp16", help="the same as --precision fp16")
    work("--skip_bad_images", action="store_true", help="leave unreadable images out instead of stopping")
    work("--overwrite", action="store_true", help="replace files of another checkpoint or other settings")

    classify = parser.add_argument_group("classification").add_argument
    classify("--tta", action="store_true", help="add the logits of the mirrored images")
    for what in SAVED:
        classify(f"--save_{what}", action="store_true", help=f"write {what} for model_analysis/")

    retrieve = parser.add_argument_group("embeddings").add_argument
    retrieve("--retrieval", action="store_true", help="write embeddings instead of classifying")
    retrieve("--retrieval_array_path", default=".", help="folder for the arrays")
    retrieve("--random_sample_dim", type=positive, help="embed only so many random images of the database")
    retrieve("--storage", choices=list(features.DTYPES), default="fp32", help="number format of the arrays")
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------ classification

def classify(args, device):
    """Accuracy of each checkpoint; several give one table."""
    name, row = eval_sets.lookup(eval_sets.CLASSIFICATION, args.dataset or "V1")
    runs = []
    for path in dict.fromkeys(args.path):
        runs.append(classify_one(path, name, row, args, device, taken={run["model"] for run in runs}))
    accuracy_table.show(runs)
    if len(runs) > 1:
        accuracy_table.save(runs, Path(args.output) / f"accuracy_dataset={name}_tta={args.tta}")
    print(f"figures{''.join(f', {what}' for what in wanted(args))} written to {args.output}/")


def classify_one(path, name, row, args, device, taken):
    """Evaluate one checkpoint, write its figures and what --save_* asks for. -> the figures.

    taken: models whose files this command has written, and so does not overwrite.
    """
    model = checkpoint(path, args)
    images = opened_set(row, model, args)
    about = {**origin(path, model, name, images, args), "num_classes": len(images.classes), "tta": args.tta,
             "precision": args.precision or "fp32"}
    files = planned(model.spec, name, about, images, args, args.overwrite and model_name(model.spec) not in taken)
    Path(args.output).mkdir(parents=True, exist_ok=True)
    keep = Outputs(len(about["nesting_list"]), len(images), len(images.classes), list(files)) if files else None
    loader = make_loader(images, args.batch_size, args.workers, device.type == "cuda")
    result = evaluate(model, images, loader, device, args.tta, about["precision"], args.skip_bad_images, keep)
    run = {"model": model_name(model.spec), "path": path, **about, **result, "spec": model.spec, "device": args.device,
           "folder": str(images.folder), "batch_size": args.batch_size, "torch": torch.__version__}
    write_json(accuracy_path(args.output, model.spec, name, args.tta, about["checkpoint"]), run)
    for what, tensor in keep.tensors() if keep else ():
        file, says = files[what]
        save_tensor(file, tensor, says | {"n": result["n"], "skipped": result["skipped"]})
    return run


def planned(spec, dataset, about, images, args, overwrite):
    """-> {what: (file, its companion's content)} of what --save_* asks for, if none is there of another run."""
    files = {what: (outputs_path(args.output, spec, dataset, args.tta, what), companion(what, about, images))
             for what in wanted(args)}
    for file, says in files.values():
        check_free(file.with_suffix(".json"), says, overwrite)
    return files


def wanted(args):
    return [what for what in SAVED if getattr(args, f"save_{what}")]


def companion(what, about, images):
    """The JSON beside a saved tensor. Labels belong to the images alone, whichever checkpoint was evaluated."""
    of_the_model = ("checkpoint", "nesting_list", "tta", "precision", "resize", "crop") if what == "gt" else ()
    return {**about, "classes": images.classes, **dict.fromkeys(of_the_model)}


# ------------------------------------------------------------------------------------------------ embeddings

def retrieve(args, device):
    """Embeddings of the queries (val) and of the database (train)."""
    name, splits = eval_sets.lookup(eval_sets.RETRIEVAL, args.dataset or "1K")
    for path in dict.fromkeys(args.path):
        model = checkpoint(path, args)
        opened = {split: opened_set(row, model, args) for split, row in splits.items()}
        same_classes(opened)
        if args.random_sample_dim and "train" in opened:
            opened["train"].sample(args.random_sample_dim)
        network = features.embedder(model).to(device)
        for split, images in opened.items():
            about = {**origin(path, model, name, images, args), "split": split}
            retrieve_one(network, images, arrays_stem(args.retrieval_array_path, name, split, model.spec), about,
                         device, args)


def retrieve_one(network, images, stem, about, device, args):
    precision = args.precision or ("fp16" if device.type == "cuda" else "fp32")
    written = features.dump(network, images, stem, about, device, args.batch_size, args.workers, precision,
                            args.storage, args.skip_bad_images, args.overwrite)
    if features.rank() == 0:
        print(f"{stem}-X.npy: {written['n']} x {written['dim']} {written['dtype']}, {len(written['skipped'])} skipped")


def same_classes(opened):
    orders = {split: images.classes for split, images in opened.items()}
    if len({tuple(classes) for classes in orders.values()}) > 1:
        different = sorted(set(orders["train"]) ^ set(orders["val"]))
        raise InputError(f"{opened['train'].folder} and {opened['val'].folder} have different class folders: "
                         f"{some(different)}")


# ------------------------------------------------------------------------------------------------ both

def checkpoint(path, args):
    return which_model.load(path, args.arch, args.mrl, args.efficient, args.rep_size, args.nesting_list, args.old_ckpt)


def opened_set(row, model, args):
    if args.resize < args.crop:
        raise InputError(f"--resize {args.resize} is smaller than --crop {args.crop}")
    preparation = Preparation(args.resize, args.crop)
    images = eval_sets.open_set(row, model.spec["num_classes"], preparation, args.data_root, args.retrieval)
    if (note := eval_sets.incomplete(row, images)) and features.rank() == 0:
        print(note)
    return images


def origin(path, model, dataset, images, args):
    """What files remember of the checkpoint and the images they came from."""
    return {"checkpoint": fingerprint(path), "nesting_list": model.spec["nesting_list"], "dataset": dataset,
            "images": images.digest(), "resize": args.resize, "crop": args.crop}


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
    idle = ("tta", *(f"save_{what}" for what in SAVED)) if args.retrieval else ("random_sample_dim",)
    for flag in idle:
        if getattr(args, flag):
            raise InputError(f"--{flag} has no meaning {'with' if args.retrieval else 'without'} --retrieval")


def main():
    args = arguments()
    check_flags(args)
    if processes() > 1 and not args.retrieval:
        raise InputError("torchrun splits the images for --retrieval only; classification runs in one process")
    (retrieve if args.retrieval else classify)(args, start_device(args))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    command_line(main)
