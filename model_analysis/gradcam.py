"""Where a model looks, for each representation size of one checkpoint (Grad-CAM, arXiv 1610.02391; the paper's Fig. 9).

    model = load_model("<run>/final_weights.pt")                     # any head; mrl_models.load_model
    maps, logits = gradcam.explain(model, gradcam.image_paths("<val>/n01744401"))

All sizes share one forward pass; each has a backward pass of its own, from its head to the last layer with maps.
Read by GradCAM.ipynb. Letters: N images, C classes, G sizes, K channels of h x w maps.
"""
import math
import os
from functools import partial
from pathlib import Path

import matplotlib
import superclass
import torch
import torch.nn.functional as F
from torchvision import transforms
from tqdm import tqdm

from mrl_files import InputError, describe_error
from mrl_images import class_folders, image_names, label_order, printable, read_rgb
from mrl_models import preparation, stack_logits

BATCH = 16


# ------------------------------------------------------------------------------------------------ the method

def grad_cam(model, x, target=None, layer=None):
    """x [N, 3, H, W], normalised -> maps [G, N, h, w] >= 0, logits [G, N, C].

    target: class indices [N]; None is the class that each size predicts. layer: the name of the module whose maps are
    weighed; None is the last stage. Freezes the model's parameters: gradients are taken of the maps alone.
    """
    model.requires_grad_(False).eval()
    kept = []
    with find_layer(model, layer).register_forward_hook(partial(keep_output, kept)):
        logits = stack_logits(model(x))
    activation = kept[-1]
    classes = logits.argmax(-1) if target is None else target.expand(len(logits), -1)
    scores = logits.gather(-1, classes[..., None]).sum((1, 2))                # [G]; images do not meet in eval mode
    maps = [weigh_maps(activation, score, getattr(model, "num_prefix_tokens", 1)) for score in scores]
    return torch.stack(maps), logits.detach()


def weigh_maps(activation, score, prefix):
    """Maps summed with their mean gradients as weights, negative parts cut: a layer's output -> [N, h, w]"""
    gradient, = torch.autograd.grad(score, activation, retain_graph=True)
    weights = as_maps(gradient, prefix).mean((2, 3), keepdim=True)
    return F.relu((weights * as_maps(activation.detach(), prefix)).sum(1))


def as_maps(output, prefix):
    """-> [N, K, h, w] of what a layer gives: that, or a Swin's [N, h, w, K] (told apart by h = w), or a transformer's
    tokens [N, T, K]: a square of patches, after `prefix` others."""
    if output.dim() == 4:
        return output.movedim(-1, 1) if output.shape[1] == output.shape[2] != output.shape[3] else output
    side = math.isqrt(max(0, output.shape[1] - prefix))
    if side ** 2 + prefix != output.shape[1]:
        raise InputError(f"{output.shape[1]} tokens are not {prefix} and a square of patches: name another layer")
    return output[:, prefix:].mT.unflatten(-1, (side, side))


def keep_output(kept, module, args, output):
    """A hook: a module's output is the leaf from which gradients start; what follows works on a copy."""
    if not torch.is_tensor(output) or output.dim() not in (3, 4):
        raise InputError(f"{type(module).__name__} gives neither maps nor tokens: name another layer")
    kept.append(output.requires_grad_())
    return output.clone()                                  # in-place operations are common there, and fail on a leaf


def find_layer(model, name):
    """-> the module of that name; None: the last of `layer4` (ResNet) or `features` (most other networks), else of what
    timm lists. Of its transformers it is the last block's norm: of the block's end often only the class token counts.
    """
    if name is not None:
        try:
            return model.get_submodule(name)
        except AttributeError:
            there = ", ".join(child for child, _ in model.named_children())
            raise InputError(f"the model has no module {name!r}; it has {there}") from None
    stages = [getattr(model, stage) for stage in ("layer4", "features") if hasattr(model, stage)]
    if not stages and getattr(model, "feature_info", None):
        last = model.get_submodule(model.feature_info[-1]["module"])
        return getattr(last, "norm1", last)
    if not stages:
        raise InputError(f"{type(model).__name__} has neither layer4 nor features: give the name of a layer with maps")
    return stages[0][-1]


# ------------------------------------------------------------------------------------------------ images

def explain(model, paths, target=None, layer=None, resize=None, crop=224):
    """`grad_cam` of image files, in batches on the model's device -> maps [G, N, h, w], logits [G, N, C] on the CPU.
    resize: as `mrl_models.preparation` takes it."""
    resize, crop, mean, std = preparation(model.spec, resize, crop)
    device, maps, logits = next(model.parameters()).device, [], []
    for start in tqdm(range(0, len(paths), BATCH), desc="Grad-CAM", unit="batch", disable=None):
        batch = slice(start, start + BATCH)
        pictures = torch.stack([picture(path, resize, crop) for path in paths[batch]])
        x = transforms.functional.normalize(pictures, mean, std).to(device)
        classes = None if target is None else target[batch].to(device)
        for kept, new in zip((maps, logits), grad_cam(model, x, classes, layer), strict=True):
            kept.append(new.cpu())
    return torch.cat(maps, 1), torch.cat(logits, 1)


def image_paths(path):
    """One image, or a folder with images at any depth -> sorted paths."""
    path = Path(path)
    names = image_names(path, ".") if path.is_dir() else []
    found = [path] if path.is_file() else sorted(path / os.fsdecode(name) for name in names)
    if not found:
        raise InputError(f"{path}: no such image, or a folder without images")
    return found


def spread(items, n):
    """-> at most n of the items, evenly spread, in their order."""
    n = min(n, len(items))
    return [items[i * len(items) // n] for i in range(n)]


def picture(path, resize=256, crop=224):
    """The part of an image that the network sees -> [3, crop, crop] in 0 ... 1."""
    see = transforms.Compose([transforms.Resize(resize), transforms.CenterCrop(crop), transforms.ToTensor()])
    try:
        return see(read_rgb(path))
    except Exception as error:                 # whatever a decoder makes of broken bytes
        raise InputError(f"{printable(path)}: not a readable image ({describe_error(error)})") from None


def overlay(image, heat):
    """image [3, H, W] in 0 ... 1, heat [h, w] >= 0 -> [H, W, 3]: the mean of image and map, scaled to its maximum."""
    heat = F.interpolate(heat[None, None], size=image.shape[1:], mode="bilinear", align_corners=False)[0, 0]
    colours = matplotlib.colormaps["inferno"]((heat / heat.max().clamp(min=1e-12)).numpy())[..., :3]
    return (colours + image.permute(1, 2, 0).numpy()) / 2


# ------------------------------------------------------------------------------------------------ classes

def class_ids(num_classes, folder=None):
    """-> class folder names in class order: those in `folder` (a validation set); None: ImageNet's 1,000 synsets."""
    if folder is None:
        ids = superclass.classes()
    elif Path(folder).is_dir():
        ids = label_order(class_folders(folder), folder)
    else:
        raise InputError(f"{folder}: no such folder; `classes` must be a set with one folder for each class")
    if len(ids) != num_classes:
        raise InputError(f"the model has {num_classes} classes, {folder or 'ImageNet'} has {len(ids)}: give `classes`, "
                         "a folder with one folder for each class")
    return ids


def true_classes(paths, ids):
    """-> [N] class indices by the folder in which each image lies, one of ids or ImageNetV2's integers.

    None where no image lies in such a folder; InputError where only some do.
    """
    index = {one: i for i, one in enumerate(ids)}
    if ids == superclass.classes():
        index |= {str(i): i for i in range(len(ids))}
    unknown = [path for path in paths if path.parent.name not in index]
    if len(unknown) == len(paths):
        return None
    if unknown:
        raise InputError(f"{unknown[0]}: its folder is none of the {len(ids)} classes, those of other images are")
    return torch.tensor([index[path.parent.name] for path in paths])


def choose_target(target, truth):
    """-> the class to explain for each image, as `explain` takes it. target: "predicted", or "true" (= truth)."""
    if target not in ("predicted", "true"):
        raise InputError(f'target={target!r}: give "predicted" or "true"')
    if target == "true" and truth is None:
        raise InputError('target="true": the folders of these images are no classes of the model, so their true class '
                         'is not known; give "predicted"')
    return truth if target == "true" else None
