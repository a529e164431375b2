"""A checkpoint as a folder to share: its weights, what they are, and a model card with the accuracy of every size.

    python export.py --path <run>/final_weights.pt --output shared/mrl --figures results/*_accuracy_*.json
    python export.py ... --push owner/name         also upload it to the Hugging Face hub (pip install huggingface_hub)

Writes model.safetensors, config.json ("model" in it is what mrl_models.build_model takes) and README.md, whose figures
come from the JSON files that pytorch_inference.py wrote of this checkpoint. load_model and every --path read it.
"""
import argparse
import re
from pathlib import Path

from pytorch_inference import add_model_flags
from saved_files import check_free, fingerprint
from which_model import open_by_flags, read_trained_resolution

from mrl_files import (
    InputError,
    command_line,
    describe_error,
    file_path,
    import_extra,
    read_json,
    replacing,
    write_json,
)
from mrl_models import find_weights, preparation

FILES = WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
KINDS = {"mrl": "MRL (a classifier for each size)", "mrl_e": "MRL-E (one classifier, read to each size)"}
TEXT = """---
library_name: pytorch
pipeline_tag: image-classification
tags: [matryoshka]
{license}---
# {title}

{kind} on {arch}, as in Matryoshka Representation Learning ([arXiv 2205.13147](https://arxiv.org/abs/2205.13147)).

Sizes: {sizes}. Classes: {num_classes}.

## Accuracy

{accuracy}

## Use

With the MRL repository installed (`pip install -e .` in it){and_timm}:

```python
{imports}from mrl_models import load_model

model = load_model({place})      # images [N, 3, H, W] -> logits [N, C] of each size
```

Images are RGB, scaled to 0 … 1, then normalised by mean {mean} and standard deviation {std}.

`model.safetensors` names the layers as {library} and `MRL.py` do; `config.json` has the arguments of `build_model`.
"""


def export(args):
    """Write the folder. -> its path. config.json comes last and goes first: it never describes other weights."""
    save, folder = import_extra("safetensors.torch", "export.py").save, Path(args.output)
    model, state = open_by_flags(args.path, args)
    spec, about = model.spec, {"checkpoint": fingerprint(args.path)}
    if args.rep_size not in (None, spec["nesting_list"][-1]):
        raise InputError(f"--rep_size {args.rep_size}: all sizes of {args.path} are exported; leave it out")
    figures = choose_figures(args.figures, about | {"nesting_list": spec["nesting_list"]})
    check_free(folder / CONFIG, about, args.overwrite, *(folder / name for name in FILES))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)
    with replacing(folder / WEIGHTS) as temporary:
        temporary.write_bytes(save({k: v.contiguous() for k, v in state.items()}, {"format": "pt"}))
    with replacing(folder / CARD) as temporary:
        temporary.write_text(write_card(spec, figures, args), encoding="utf-8")
    resolution = read_trained_resolution(args.path)
    write_json(folder / CONFIG, {"model": spec, **about, "settings": {"validation": {"resolution": resolution}}})
    return folder


def choose_figures(paths, about):
    """-> of accuracy JSONs of pytorch_inference.py those that say the same of their checkpoint and sizes; a note counts
    the others, which a folder of several models has."""
    figures = {path: read_figures(path, about) for path in paths}
    chosen = [content for content in figures.values() if {key: content[key] for key in about} == about]
    if figures and not chosen:
        raise InputError(f"--figures {paths[0]}: of another checkpoint or other sizes, as are all given")
    if len(chosen) < len(figures):
        print(f"note: {len(figures) - len(chosen)} of --figures left out: of other checkpoints or sizes")
    return chosen


def read_figures(path, about):
    content = read_json(path)
    if content is None:
        raise InputError(f"--figures {path}: no such file")
    if not {"dataset", "n", "top1", "top5", "tta", "precision", "resize", "crop", *about} <= content.keys():
        raise InputError(f"--figures {path}: not the figures of pytorch_inference.py (..._accuracy_<checkpoint>.json)")
    return content


def write_card(spec, figures, args):
    """-> the text of README.md: a model card as the hub reads it."""
    title, timm = args.push or Path(args.output).resolve().name, spec["arch"].startswith("timm/")
    _, _, mean, std = preparation(spec)
    return TEXT.format(license=f"license: {args.license}\n" if args.license else "", title=title, arch=spec["arch"],
                       kind=KINDS.get(spec["head"], "FF (a classifier on the first features)"),
                       sizes=", ".join(map(str, spec["nesting_list"])), num_classes=spec["num_classes"],
                       mean=mean, std=std, library="timm" if timm else "torchvision",
                       and_timm=" and timm (`pip install timm`)" * timm,
                       accuracy=tabulate(figures) if figures else "Not measured.",
                       imports="from huggingface_hub import snapshot_download\n" if args.push else "",
                       place=f'snapshot_download("{title}")' if args.push else f'"{title}"')


def tabulate(figures):
    """-> a row a size, two columns (top-1 and top-5 in per cent) for each evaluation; then how each was done."""
    names = [f"{run['dataset']}{' tta' * run['tta']}" for run in figures]
    header = ["size", *(f"{name} {top} %" for name in names for top in ("top-1", "top-5"))]
    rows = [[size, *(f"{100 * run[top][g]:.2f}" for run in figures for top in ("top1", "top5"))]
            for g, size in enumerate(figures[0]["nesting_list"])]
    table = [f"| {' | '.join(map(str, row))} |" for row in (header, ["---"] * len(header), *rows)]
    done = [f"- {name}: {run['n']:,} images, the central {run['crop']} pixels of {run['resize']}, {run['precision']}"
            + ", logits of mirrored images added" * run["tta"] for name, run in zip(names, figures, strict=True)]
    return "\n".join([*table, "", *done])


def push(folder, name, hub):
    """Upload the three files. Whatever fails there (no token, no network, no permission) is told in one line."""
    try:
        hub.create_repo(name, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=str(folder), allow_patterns=list(FILES))
    except Exception as error:
        raise InputError(f"--push {name}: {describe_error(error)} (the folder {folder} is complete)") from None


def open_hub(name):
    """-> the hub's client, before any work is done; None where nothing is pushed."""
    if not name:
        return None
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise InputError(f"--push {name}: give owner/name")
    return import_extra("huggingface_hub", "--push").HfApi()


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--path", type=find_weights, required=True, help="the checkpoint, or its folder")
    parser.add_argument("--output", type=file_path, required=True, help="folder to write")
    parser.add_argument("--figures", type=file_path, nargs="+", default=[],
                        help="accuracy JSONs that pytorch_inference.py wrote of this checkpoint, for the card")
    parser.add_argument("--license", help="of the weights, as the hub names it (mit, cc-by-4.0 ...)")
    parser.add_argument("--push", help="owner/name: upload too; made there, public, if it does not exist")
    parser.add_argument("--overwrite", action="store_true", help="replace what was written of another checkpoint")
    add_model_flags(parser.add_argument_group("the model, where no JSON lies beside the checkpoint"))
    return parser.parse_args()


def main():
    args = parse_arguments()
    hub = open_hub(args.push)
    folder = export(args)
    print(f"{folder}: {', '.join(FILES)}")
    if hub:
        push(folder, args.push, hub)
        print(f"pushed to {args.push}")


if __name__ == "__main__":
    command_line(main)
