"""pytorch_inference.py with --retrieval: the embeddings of the queries (val) and of the database (train)."""
from functools import cache
from itertools import groupby
from operator import attrgetter

import eval_sets
import features
from plans import Plan, is_nested, model_of, opened_set, origin, planned, show_skipped
from saved_files import arrays_stem

from mrl_images import check_same_classes


def embed(args, device):
    """Write the arrays of each checkpoint; under torchrun the processes share the images."""
    name, splits = eval_sets.lookup(eval_sets.RETRIEVAL, args.dataset or "1K")
    images_for = cache(lambda num_classes: opened_splits(splits, num_classes, args))
    plans = features.together(planned, args, lambda path, spec: [
        plan(path, spec, name, split, images, device, args)
        for split, images in images_for(spec["num_classes"]).items()])
    for _, of_one_checkpoint in groupby(plans, attrgetter("path")):
        embed_one(list(of_one_checkpoint), args, device)


def opened_splits(splits, num_classes, args):
    """-> {split: ImageSet}."""
    opened = {split: opened_set(row, num_classes, args) for split, row in splits.items()}
    if "train" in opened:
        train, val = opened["train"], opened["val"]
        check_same_classes(train.folder, train.found, val.folder, val.found)
    if args.random_sample_dim:
        for images in opened.values():
            images.sample(args.random_sample_dim)
    return opened


def plan(path, spec, name, split, images, device, args):
    precision = args.precision or ("fp16" if device.type == "cuda" else "fp32")
    kept = cut(spec, args.rep_size) if is_nested(spec) and args.rep_size else spec
    about = features.noted({**origin(path, kept, name, images, args), "split": split}, precision,
                           args.storage or "fp32")
    stem = arrays_stem(args.retrieval_array_path or ".", name, split, kept)
    features.check_dump(features.Files(stem), about, args.skip_bad_images, args.overwrite)
    return Plan(path, spec, images, about, {"arrays": (stem, about)})


def cut(spec, size):
    """-> a nested model's spec as if it ended at `size`: the first numbers of an embedding are one."""
    return {**spec, "nesting_list": [d for d in spec["nesting_list"] if d < size] + [size]}


def embed_one(plans, args, device):
    """The splits of one checkpoint."""
    network = features.embedder(model_of(plans[0], args)).to(device)
    for plan in plans:
        stem, about = plan.files["arrays"]
        written = features.dump(network, plan.images, stem, about, device, batch_size=args.batch_size,
                                workers=args.workers, skip_bad_images=args.skip_bad_images, overwrite=args.overwrite)
        if features.rank() == 0:
            print(f"{stem}-X.npy: {written['n']} x {written['dim']} {written['dtype']}, "
                  f"{len(written['skipped'])} skipped")
            show_skipped(written["skipped"])
