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

import torch
from classification import SAVED, classify
from embeddings import DTYPES, embed
from eval_sets import CLASSIFICATION, RETRIEVAL
from processes import count_processes, start_device, warn

from mrl_files import InputError, bounded, command_line, file_path, leave_group, numbers
from mrl_images import name_dead_workers
from mrl_models import find_weights

positive = bounded(int, 1)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--path", type=find_weights, nargs="+", action="extend", required=True,
                        help="checkpoint(s), or folders of a run or of export.py; several give a table")
    parser.add_argument("--dataset", help=f"{', '.join(CLASSIFICATION)} (default V1); "
                                          f"with --retrieval {', '.join(RETRIEVAL)} (default 1K)")
    parser.add_argument("--data_root", type=file_path,
                        help="folder that holds the sets (default: $IMAGENET_ROOT, ../../IMAGENET/, the repository)")
    add_model_flags(parser.add_argument_group("the model, where no params.json lies beside the checkpoint"))
    add_run_flags(parser.add_argument_group("how it runs"))
    add_accuracy_flags(parser.add_argument_group("classification"))
    add_embeddings_flags(parser.add_argument_group("embeddings"))
    return parser.parse_args()


def add_model_flags(group):
    group.add_argument("--arch", help="torchvision architecture, or timm/<name> (default resnet50)")
    group.add_argument("--mrl", action="store_true", help="nested heads")
    group.add_argument("--efficient", action="store_true", help="MRL-E: one matrix for all sizes")
    group.add_argument("--rep_size", type=positive, help="size of a fixed-feature model; of a nested model, how many "
                                                              "numbers of each embedding are written")
    group.add_argument("--nesting_list", type=numbers(int), help="sizes of an MRL-E model (default 8,16,...,2048)")
    group.add_argument("--old_ckpt", action="store_true", help="the authors' released files")


def add_run_flags(group):
    either, pixels = group.add_mutually_exclusive_group(), bounded(int, 1, 10_000)
    group.add_argument("--workers", type=bounded(int, 0, 16 * os.cpu_count()), default=min(12, os.cpu_count()),
                       help="processes that read images")
    group.add_argument("--batch_size", type=positive, default=256, help="images at a time (%(default)s)")
    group.add_argument("--resize", type=pixels, help="pixels of the shorter side before the crop (default: 256/224 of "
                                                      "the crop; of a timm network what its crop share says)")
    group.add_argument("--crop", type=pixels, default=224, help="pixels of the central crop")
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                       help="cpu, cuda or cuda:1 (here %(default)s)")
    either.add_argument("--precision", choices=["fp32", "fp16", "bf16"],
                        help="of the network (default fp32; with --retrieval on a GPU fp16, as the original)")
    either.add_argument("--amp", dest="precision", action="store_const", const="fp16",
                        help="the same as --precision fp16")
    group.add_argument("--skip_bad_images", action="store_true", help="leave unreadable images out, do not stop")
    group.add_argument("--overwrite", action="store_true", help="replace files of another checkpoint or other settings")


def add_accuracy_flags(group):
    group.add_argument("--output", type=file_path, help="folder for figures and saved outputs (default: this one)")
    group.add_argument("--tta", action="store_true", help="add the logits of the mirrored images")
    for what in SAVED:
        group.add_argument(f"--save_{what}", action="store_true", help=f"write {what} for model_analysis/")


def add_embeddings_flags(group):
    group.add_argument("--retrieval", action="store_true", help="write embeddings instead of classifying")
    group.add_argument("--retrieval_array_path", type=file_path, help="folder for the arrays (default: this one)")
    group.add_argument("--random_sample_dim", type=positive, help="embed only so many random images of each split")
    group.add_argument("--storage", choices=list(DTYPES), help="number format of the arrays (default fp32)")


def warn_of_idle_flags(args):
    """A line on standard error for each flag that does nothing; the original ran on in silence."""
    idle = (("output", "tta", *(f"save_{what}" for what in SAVED)) if args.retrieval
            else ("retrieval_array_path", "random_sample_dim", "storage"))
    for flag in idle:
        if getattr(args, flag):
            warn(f"--{flag} does nothing {'with' if args.retrieval else 'without'} --retrieval")


def main():
    args = parse_arguments()
    if count_processes() > 1 and not args.retrieval:
        raise InputError("torchrun splits the images for --retrieval only; classification runs in one process")
    try:
        device = start_device(args)
        warn_of_idle_flags(args)
        args.output = args.output or "."
        with name_dead_workers("fewer --workers (or 0), or a smaller --batch_size"):
            (embed if args.retrieval else classify)(args, device)
    finally:
        leave_group()          # after an error too: over gloo nobody waits for the others


if __name__ == "__main__":
    command_line(main)
