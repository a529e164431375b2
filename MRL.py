"""Matryoshka Representation Learning (arXiv 2205.13147): the method, and how its checkpoints are read.

    model = build_model("resnet50", head="mrl")           # one backbone, nine classifiers on nested prefixes
    loss = Matryoshka_CE_Loss(label_smoothing=0.1)        # sum of the nine cross-entropies
    loss(model(images), labels).backward()

    model = load_model("runs/<uuid>/final_weights.pt")    # eval mode; model.spec says what it is

Parts, in order: heads, loss, accuracy, models, checkpoints, files and commands (what every script shares).
Every folder of the repository imports this file and no other folder.
Letters used for shapes: N images, D features, C classes, G granularities (nested sizes).
"""
import argparse
import errno
import json
import math
import operator
import os
import pickle
import re
import signal
import sys
import time
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock, Timeout
from torch import nn

NESTING_LIST = [8, 16, 32, 64, 128, 256, 512, 1024, 2048]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)      # ImageNet's, of pixels in 0 ... 1


class InputError(ValueError):
    """Invalid user input. The message is one line: what is wrong, where, and what to do."""


class Unsettled(InputError):
    """load_model cannot tell which model a file holds. argument: the load_model argument that would settle it, so that
    commands can name their own flag for it."""

    def __init__(self, problem, argument):
        super().__init__(f"{problem}: give {argument}")
        self.problem, self.argument = problem, argument


# ------------------------------------------------------------------------------------------------ heads

class MRL_Linear_Layer(nn.Module):
    """The nested classifiers (section 3; Algorithm 2): one linear classifier on each prefix of the features.

    nesting_list: G increasing prefix sizes. num_classes: C.
    efficient: False is MRL, G matrices `nesting_classifier_{i}` [C, size_i];
               True is MRL-E, one matrix `nesting_classifier_0` [C, largest] whose columns all sizes share.
    forward: x [N, D >= largest] -> tuple of G tensors [N, C].
    """

    def __init__(self, nesting_list, num_classes=1000, efficient=False, bias=True):
        super().__init__()
        self.nesting_list = check_nesting_list(nesting_list)
        self.num_classes, self.efficient = num_classes, efficient
        for i, size in enumerate(self.nesting_list[-1:] if efficient else self.nesting_list):
            setattr(self, f"nesting_classifier_{i}", nn.Linear(size, num_classes, bias=bias))

    def forward(self, x):
        check_width(x, self.nesting_list[-1])
        return self._shared(x) if self.efficient else self._separate(x)

    def _separate(self, x):
        """Each prefix is cut from the one above it, so that its gradient is padded to that size only, not to D."""
        logits = []
        for i, size in reversed(list(enumerate(self.nesting_list))):
            x = x[:, :size]
            logits.append(getattr(self, f"nesting_classifier_{i}")(x))
        return tuple(logits[::-1])

    def _shared(self, x):
        """Logits of each size = those of the size before + the next slice's product: one layer's multiplications."""
        layer, sizes = self.nesting_classifier_0, self.nesting_list
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return nested_logits(x, layer.weight, layer.bias, sizes)
        return NestedLogits.apply(*in_autocast_type(x, layer.weight, layer.bias), sizes)

    def extra_repr(self):
        return f"nesting_list={self.nesting_list}, num_classes={self.num_classes}, efficient={self.efficient}"


def nested_logits(x, weight, bias, sizes):
    """x [N, D >= largest], weight [C, largest], bias [C] or None -> tuple of G [N, C].

    `addmm`: the product adds to the logits before it as it goes, without a pass of its own. `split`, not slicing: the
    gradient of each slice would be a full-size matrix, added G times.
    """
    widths = [b - a for a, b in pairwise([0, *sizes])]
    slices, weights = x[:, :sizes[-1]].split(widths, dim=1), weight.split(widths, dim=1)
    logits = [F.linear(slices[0], weights[0], bias)]
    for x_slice, w_slice in zip(slices[1:], weights[1:], strict=True):
        logits.append(torch.addmm(logits[-1], x_slice, w_slice.t()))
    return tuple(logits)


class NestedLogits(torch.autograd.Function):
    """nested_logits with a gradient that is written in place: autograd would make that of each slice, then copy them
    all into those of x and weight. A seventh of the time of head and loss on a CPU."""

    @staticmethod
    def forward(ctx, x, weight, bias, sizes):
        ctx.save_for_backward(x, weight)
        ctx.sizes = sizes
        return nested_logits(x, weight, bias, sizes)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        x, weight = ctx.saved_tensors
        dx = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        dweight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        total = torch.zeros_like(grads[-1])                  # d loss / d a product: the sum over all sizes that use it
        for (a, b), grad in zip(reversed([*pairwise([0, *ctx.sizes])]), reversed(grads), strict=True):
            total += grad
            if dx is not None:
                torch.mm(total, weight[:, a:b], out=dx[:, a:b])
            if dweight is not None:
                torch.mm(total.t(), x[:, a:b], out=dweight[:, a:b])
        return dx, dweight, total.sum(0) if ctx.needs_input_grad[2] else None, None


def in_autocast_type(*tensors):
    """The tensors as autocast gives them to a product. (A torch.autograd.Function is not among what it knows.)"""
    device = tensors[0].device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return tensors
    return [None if t is None else t.to(torch.get_autocast_dtype(device)) for t in tensors]


class FixedFeatureLayer(nn.Linear):
    """The FF baseline (section 4): a classifier on the first `in_features` numbers. x [N, D] -> [N, C]."""

    def forward(self, x):
        check_width(x, self.in_features)
        return F.linear(x[:, :self.in_features], self.weight, self.bias)


def check_width(x, needed):
    if x.shape[-1] < needed:
        raise ValueError(f"features have {x.shape[-1]} dimensions, the classifier reads {needed}")


def check_nesting_list(nesting_list):
    """-> the sizes as a list of ints, if they are positive and increasing."""
    try:
        sizes = [operator.index(d) for d in nesting_list]
    except TypeError:
        sizes = []
    if not sizes or sizes[0] < 1 or any(a >= b for a, b in pairwise(sizes)):
        raise InputError(f"nesting_list must hold increasing positive integers, got {nesting_list}")
    return sizes


def default_nesting_list(width, start=3):
    """Powers of two from 2**start up to the feature width, the width itself last (2048, 3 -> 8 ... 2048)."""
    if not 0 <= start <= math.log2(width):
        raise InputError(f"nesting_start={start}: 2**{start} is not between 1 and the feature width {width}")
    return [2 ** i for i in range(start, math.ceil(math.log2(width))) if 2 ** i < width] + [width]


# ------------------------------------------------------------------------------------------------ loss

class Matryoshka_CE_Loss(nn.Module):
    """Sum over the G sizes of c_g * cross-entropy (Eq. 1), as one batched computation.

    relative_importance: the G weights c_g (all 1 when None). The rest as in torch.nn.functional.cross_entropy, with
    reduction mean or sum.
    forward: (logits as `stack_logits` takes them; target [N] int64, or [N, C] probabilities) -> scalar.
    """

    def __init__(self, relative_importance=None, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0):
        super().__init__()
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be mean or sum, got {reduction!r}")
        if relative_importance is not None:
            relative_importance = check_relative_importance(relative_importance)
        self.register_buffer("relative_importance", relative_importance, persistent=False)
        self.register_buffer("weight", weight, persistent=False)
        self.ignore_index, self.reduction, self.label_smoothing = ignore_index, reduction, label_smoothing

    def forward(self, output, target):
        return self.weighted_sum(self.per_size(output, target))

    def weighted_sum(self, losses):
        """[G] losses -> scalar."""
        if self.relative_importance is None:
            return losses.sum()
        if len(self.relative_importance) != len(losses):
            raise ValueError(f"relative_importance has {len(self.relative_importance)} weights, "
                             f"the model {len(losses)} sizes")
        return (self.relative_importance * losses).sum()

    def per_size(self, output, target):
        """-> [G] losses, before weighting."""
        losses = torch.cat([self._summed(logits, target) for logits in self._groups(output)])
        return losses / self._images(target) if self.reduction == "mean" else losses

    def _groups(self, output):
        """Logits [g, N, C] that are computed together: all sizes, for few launches; on a CPU one, to fit its cache."""
        if not torch.is_tensor(output) and output[0].device.type == "cpu":
            return [logits[None] for logits in output]
        return [stack_logits(output)]

    def _summed(self, logits, target):
        """[g, N, C] -> [g] losses, summed over the images."""
        if self.weight is None and not target.is_floating_point():
            return SummedCrossEntropy.apply(logits, target, self.label_smoothing, self.ignore_index)
        losses = F.cross_entropy(logits.flatten(0, 1), target.repeat(len(logits), *[1] * (target.dim() - 1)),
                                 self.weight, ignore_index=self.ignore_index, label_smoothing=self.label_smoothing,
                                 reduction="none")
        return losses.view(len(logits), -1).sum(1)

    def _images(self, target):
        """What F.cross_entropy's mean divides by: images, or their class weights, the ignored left out."""
        if target.is_floating_point():
            return len(target)
        kept = target != self.ignore_index
        return kept.sum() if self.weight is None else self.weight[target[kept]].sum()


class SummedCrossEntropy(torch.autograd.Function):
    """F.cross_entropy with class indices and label smoothing s: logits [g, N, C], target [N] -> [g] sums, fp32.

    The gradient is softmax(logits) - s / C, less 1 - s at the target; 0 where the target is ignore_index. Autograd
    would make a full matrix for each of those three and add them: on a CPU, half as long again, G times per step.
    """

    @staticmethod
    def forward(ctx, logits, target, smoothing, ignore_index):
        log_p = logits.log_softmax(2, dtype=torch.promote_types(logits.dtype, torch.float32))
        ignored = target == ignore_index
        index = target.masked_fill(ignored, 0).expand(len(logits), -1)[..., None]
        ctx.save_for_backward(log_p, index, ignored)
        ctx.smoothing, ctx.dtype = smoothing, logits.dtype
        losses = (smoothing - 1) * log_p.gather(2, index)[..., 0] - smoothing / log_p.shape[2] * log_p.sum(2)
        return losses.masked_fill(ignored, 0).sum(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        log_p, index, ignored = ctx.saved_tensors
        result = log_p.exp().sub_(ctx.smoothing / log_p.shape[2])
        result.scatter_add_(2, index, result.new_full((), ctx.smoothing - 1).expand(index.shape))
        return result.mul_((grad[:, None] * ~ignored)[..., None]).to(ctx.dtype), None, None, None


def stack_logits(output):
    """What a model returns, a tuple of G [N, C] or (fixed features) one [N, C] -> [G, N, C]; [G, N, C] stays."""
    if not torch.is_tensor(output):
        return torch.stack(tuple(output))
    return output if output.dim() == 3 else output[None]


def check_relative_importance(weights):
    weights = torch.as_tensor(weights, dtype=torch.float32)
    if weights.dim() != 1 or not weights.isfinite().all() or (weights < 0).any() or not weights.any():
        raise InputError(f"relative_importance must be a list of non-negative numbers, not all 0; "
                         f"got {weights.tolist()}")
    return weights


# ------------------------------------------------------------------------------------------------ accuracy

def count(logits, target):
    """logits [G, N, C], target [N] -> [3, G] float64: sums over the images of top-1 hits, top-5 hits, cross-entropy."""
    sizes, n, classes = logits.shape
    hits = logits.topk(min(5, classes), dim=-1).indices == target[:, None]                # [G, N, 5]
    loss = F.cross_entropy(logits.float().flatten(0, 1), target.repeat(sizes), reduction="none").view(sizes, n)
    return torch.stack([hits[..., 0].sum(1), hits.any(-1).sum(1), loss.double().sum(1)])


def autocast(device, precision):
    """The context in which a network runs in fp32, fp16 or bf16."""
    return torch.autocast(torch.device(device).type, {"fp16": torch.float16}.get(precision, torch.bfloat16),
                          enabled=precision != "fp32")


# ------------------------------------------------------------------------------------------------ models

class BlurPool(nn.Module):
    """A 3x3 binomial blur before a strided convolution (arXiv 1904.11486), as in FFCV's ResNets."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv
        taps = torch.tensor([[1., 2., 1.], [2., 4., 2.], [1., 2., 1.]]) / 16
        self.register_buffer("blur_filter", taps.repeat(conv.in_channels, 1, 1, 1))

    def forward(self, x):
        return self.conv(F.conv2d(x, self.blur_filter, padding=1, groups=self.conv.in_channels))


def add_blurpool(model):
    """Blur before every convolution with a stride above 1 and at least 16 input channels."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Conv2d) and max(child.stride) > 1 and child.in_channels >= 16:
                setattr(module, name, BlurPool(child))


def build_model(arch="resnet50", head="mrl", nesting_list=None, num_classes=1000, blurpool=True, pretrained=False):
    """A torchvision classifier whose last linear layer is replaced by a nested (or fixed-feature) head.

    head: "mrl", "mrl_e", or "ff<d>": a classifier on the first d features.
    nesting_list: G sizes; None is 8, 16 ... up to the feature width. An "ff<d>" head has the one size d.
    pretrained: torchvision's weights for the backbone (the new head is random).
    -> module: images [N, 3, H, W] -> tuple of G [N, C] ("ff<d>": [N, C]). `model.spec` holds these arguments,
    with nesting_list and feature_dim filled in. Raises InputError for what does not exist or fit.
    """
    model = torchvision_model(arch, pretrained)
    if blurpool:
        add_blurpool(model)
    name, linear = classifier(model)
    sizes = head_sizes(head, nesting_list, linear.in_features)
    if head.startswith("ff"):
        layer = FixedFeatureLayer(sizes[0], num_classes)
    else:
        layer = MRL_Linear_Layer(sizes, num_classes, efficient=head == "mrl_e")
    model.set_submodule(name, layer)
    model.spec = {"arch": arch, "head": head, "nesting_list": sizes, "num_classes": num_classes,
                  "blurpool": bool(blurpool), "feature_dim": linear.in_features}
    return model


def torchvision_model(arch, pretrained=False):
    with torch.device("cpu"):      # PyTorch 2.6 cannot import it while the default device is "meta"
        from torchvision import models
    if arch not in models.list_models(module=models):
        raise InputError(f"unknown architecture {arch!r}: give the name of a torchvision classification model")
    # The two networks with auxiliary classifiers are built without them: those heads would not be nested.
    extra = {"aux_logits": False, "init_weights": True} if arch in ("googlenet", "inception_v3") else {}
    return models.get_model(arch, weights="DEFAULT" if pretrained else None, **({} if pretrained else extra))


def build_from_spec(spec, pretrained=False):
    """A new model like the one whose `spec` it is."""
    return build_model(**{key: value for key, value in spec.items() if key != "feature_dim"}, pretrained=pretrained)


def feature_width(arch):
    """-> D, how many features an architecture gives its classifier."""
    with torch.device("meta"):      # costs nothing: only the shapes are needed
        return classifier(torchvision_model(arch))[1].in_features


def classifier(model):
    """-> (name, module) of the classifier: our head if there is one, else the last linear layer."""
    kinds = (MRL_Linear_Layer, FixedFeatureLayer)
    modules = list(model.named_modules())
    found = ([m for m in modules if isinstance(m[1], kinds)] or [m for m in modules if isinstance(m[1], nn.Linear)])
    if not found:
        raise InputError(f"{type(model).__name__} does not end in a linear classifier")
    return found[-1]


def head_sizes(head, nesting_list, width):
    """-> the G representation sizes of a head on `width` features."""
    if head in ("mrl", "mrl_e"):
        sizes = check_nesting_list(default_nesting_list(width) if nesting_list is None else nesting_list)
    elif match := re.fullmatch(r"ff([1-9]\d*)", head):
        sizes = [int(match[1])]
        if nesting_list not in (None, sizes):
            raise InputError(f"head {head} has the one size {sizes[0]}, not nesting_list={list(nesting_list)}")
    else:
        raise InputError(f"unknown head {head!r}: mrl, mrl_e or ff<size>")
    if sizes[-1] > width:
        raise InputError(f"size {sizes[-1]} is more than the {width} features of the architecture")
    return sizes


def model_name(spec):
    """The name that files carry: mrl1_e0_ff2048 (MRL), mrl1_e1_ff2048 (MRL-E), mrl0_e0_ff256 (FF-256)."""
    nested, efficient = spec["head"].startswith("mrl"), spec["head"] == "mrl_e"
    return f"mrl{nested:d}_e{efficient:d}_ff{spec['nesting_list'][-1]}"


# ------------------------------------------------------------------------------------------------ checkpoints

def load_model(path, arch=None, head=None, nesting_list=None, old_ckpt=False):
    """A trained model in eval mode, on the CPU.

    What each argument leaves None is read from `params.json` beside the file, else from the shapes in the file;
    what neither settles is an InputError that names the argument, and so is an argument that contradicts the file.
    old_ckpt: the layout of the authors' released files (MRL-E keeps its matrix under fc.weight).
    The file must hold exactly the model's keys and shapes; prefixes of DDP and torch.compile are removed.
    """
    state, known = read_state_dict(path), read_params(path)
    given = {k: v for k, v in {"arch": arch, "head": head, "nesting_list": nesting_list}.items() if v is not None}
    for key, value in given.items():
        if key in known and known[key] != value:
            raise InputError(f"{path}: {key}={value} was asked for, params.json beside it says {known[key]}")
    if old_ckpt:
        state = modern_keys(path, state, (known | given).get("head"))
    spec = (known or shown_by_shapes(path, state, **given)) | given
    with torch.device("meta"):      # before memory is taken for a model of any size
        misfit = does_not_fit(blank_model(path, spec), state)
    if misfit:
        raise InputError(f"{path}: {misfit}") if known else Unsettled(f"{path}: {misfit}; for another network", "arch")
    model = build_from_spec(spec)
    load_exactly(model, state, path)
    return model.eval()


def blank_model(path, spec):
    """build_from_spec for what a file and arguments say; an error names the file."""
    try:
        return build_from_spec(spec)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def read_params(path):
    """-> build_model's arguments as the params.json beside a checkpoint has them; {} where there is none."""
    params = Path(path).parent / "params.json"
    content = read_json(params)
    if content is None:
        return {}
    spec, kinds = content.get("model"), {"arch": str, "head": str, "nesting_list": list, "num_classes": int,
                                         "blurpool": bool, "feature_dim": int}
    if not isinstance(spec, dict) or not all(isinstance(v, kinds.get(k, ())) for k, v in spec.items()):
        raise InputError(f"{params}: its \"model\" is not what build_model takes; "
                         "repair it, or move the checkpoint elsewhere and give flags")
    return spec


def read_state_dict(path):
    """-> the plain state dict in a file: unwrapped, without the prefixes of DDP and torch.compile."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except pickle.UnpicklingError:
        raise InputError(f"{path}: holds more than tensors (pickled code or modules are refused); "
                         "save model.state_dict() instead") from None
    except Exception as error:
        raise InputError(f"{path}: not a PyTorch checkpoint, or truncated "
                         f"({reason(error)})") from None
    for wrapper in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not state or not all(isinstance(k, str) and dense(v) for k, v in state.items()):
        raise InputError(f"{path}: holds no state dict")
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value for key, value in state.items()}


def dense(value):
    """Is it a dense tensor that holds its numbers?"""
    return torch.is_tensor(value) and value.layout == torch.strided and not value.is_meta


def modern_keys(path, state, head):
    """The released MRL-E files name their one matrix as a plain classifier: rename it. The rest is unchanged."""
    if head is None and "fc.weight" in state:
        raise Unsettled(f"{path}: a released file with one matrix, MRL-E (mrl_e) or fixed features (ff<d>)", "head")
    if head != "mrl_e":
        return state
    return {re.sub(r"^fc\.(weight|bias)$", r"fc.nesting_classifier_0.\1", key): v for key, v in state.items()}


def shown_by_shapes(path, state, arch=None, head=None, nesting_list=None):
    """build_model's arguments as far as keys and shapes show them; InputError where they do not."""
    if arch is None:
        raise Unsettled(f"{path}: no params.json beside it, and the architecture does not show in a file", "arch")
    last = [v for v in state.values() if v.dim() == 2][-1:]
    if not last:
        raise InputError(f"{path}: holds no linear classifier")
    nested = [v.shape[1] for k, v in state.items() if re.search(r"\.nesting_classifier_\d+\.weight$", k)]
    of_one_size = head == "mrl" and nesting_list is not None and list(nesting_list) == nested
    head_shown = "mrl" if len(nested) > 1 or of_one_size else "mrl_e" if nested else f"ff{last[0].shape[1]}"
    if head is not None and head != head_shown:
        problem = f"{path}: head={head} was asked for, the file holds {head_shown}"
        if head == "mrl_e" and not nested:
            raise Unsettled(f"{problem}; if it is a released MRL-E file", "old_ckpt")
        raise InputError(problem)
    if head_shown == "mrl":
        if nesting_list is not None and list(nesting_list) != nested:
            raise InputError(f"{path}: nesting_list={list(nesting_list)} was asked for, the file holds {nested}")
        nesting_list = nested
    elif head_shown == "mrl_e" and nesting_list is None:
        raise Unsettled(f"{path}: the sizes of an MRL-E model do not show in a file", "nesting_list")
    return {"arch": arch, "head": head_shown, "nesting_list": nesting_list, "num_classes": last[0].shape[0],
            "blurpool": any(k.endswith("blur_filter") for k in state)}


def does_not_fit(model, state):
    """-> what is wrong, unless a state dict holds the model's keys and shapes, no more and no less; else None."""
    expected = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    found = {k: tuple(v.shape) for k, v in state.items()}
    different = [f"{k}: {found.get(k, 'missing')} instead of {expected.get(k, 'nothing')}"
                 for k in expected | found if found.get(k) != expected.get(k)]
    if different:
        more = f" and {len(different) - 1} more" if len(different) > 1 else ""
        return f"does not fit {model.spec['arch']} with head {model.spec['head']} ({different[0]}{more})"
    return None


def load_exactly(model, state, path):
    """Load a state dict that must fit, and hold only finite numbers."""
    if misfit := does_not_fit(model, state):
        raise InputError(f"{path}: {misfit}")
    broken = [k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all()]
    if broken:
        raise InputError(f"{path}: {broken[0]} holds NaN or infinite numbers ({len(broken)} such tensors)")
    model.load_state_dict(state)


# ------------------------------------------------------------------------------------------------ files and commands

@contextmanager
def replacing(path):
    """A temporary path beside `path`, renamed to it if the block succeeds: a half-written file is never visible."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")   # the suffix stays: savers look at it
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"{path} could not be written: "
                         + ("it is a folder" if path.is_dir() else f"there is no folder {path.parent}"))
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.filename not in (None, str(temporary)):                     # a file that was read
            raise
        raise InputError(f"{path} could not be written: {error.strerror or error}") from None
    except RuntimeError as error:
        if not re.search("inline_container|write error", str(error)):        # what PyTorch's and FAISS's writers raise
            raise
        raise InputError(f"{path} could not be written: is the disk full?") from None
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(path, busy=None):
    """Hold an exclusive lock on `path` in the block. busy: error message for a second process; None: it waits."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if busy:
            raise InputError(busy) from None
        print(f"{path.name}: waiting for the process that makes it", file=sys.stderr)
        lock.acquire()
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):      # some network file systems
            raise
        print(f"{path}: no locks on this file system; start one command at a time", file=sys.stderr)
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)     # one who waits for it makes a new one
        lock.release()


def read_json(path):
    """-> the dictionary in a JSON file; None where there is no file."""
    try:
        content = json.loads(Path(path).read_text())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a JSON file as this repository writes them; repair or remove it")
    return content


def json_says(path, wanted):
    """Is there a JSON file that says everything in `wanted`?"""
    content = read_json(path)
    return content is not None and {key: content.get(key) for key in wanted} == json.loads(json.dumps(wanted))


def write_json(path, content):
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def read_array(path, mode="r"):
    """-> the array of an .npy file, memory-mapped. Pickled objects are refused."""
    try:
        array = np.lib.format.open_memmap(path, "r")          # "r+" would lengthen a file that was cut off
        return array if mode == "r" else np.lib.format.open_memmap(path, mode)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (ValueError, EOFError) as error:
        raise InputError(f"{path}: not a complete .npy file of numbers ({reason(error)})") from None


def allocate(path, shape, dtype):
    """-> a zeroed .npy file, memory-mapped to be written, whose blocks are reserved: a full disk is seen here, and not
    as a crash of a mapped write."""
    try:
        array = np.lib.format.open_memmap(path, "w+", dtype, shape)
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, array.offset + array.nbytes)
        return array
    except OSError as error:
        Path(path).unlink(missing_ok=True)
        needed = math.prod(shape) * np.dtype(dtype).itemsize / 1e9
        raise InputError(f"{path}: {needed:.2f} GB are needed: {error.strerror}") from None


def read_embeddings(path):
    """-> X [N, D] float32 or float16, memory-mapped, of an -X.npy file that inference/ wrote, or the original.

    InputError unless it is whole, and what the JSON beside it says of it is true.
    """
    X, noted = read_array(path), Path(path).with_suffix(".json")
    if X.ndim != 2 or 0 in X.shape or X.dtype not in (np.float32, np.float16):
        raise InputError(f"{path}: must be float32 or float16 [N, D], is {X.dtype} {list(X.shape)}")
    said = read_json(noted) or {}
    if not said.get("complete", True):
        raise InputError(f"{path}: unfinished; run the same inference command again to complete it")
    if (said.get("n", X.shape[0]), said.get("dim", X.shape[1])) != X.shape:
        raise InputError(f"{path}: is {list(X.shape)}, but {noted.name} says [{said.get('n')}, {said.get('dim')}]; "
                         "write both again")
    return X


def read_labels(path, n):
    """-> y [n] int64. The original's float16 [n, 1] files are read where float16 is exact."""
    y = read_array(path)
    if y.shape not in ((n,), (n, 1)):
        raise InputError(f"{path}: {list(y.shape)} labels do not fit {n} embeddings; write both again")
    return exact_labels(y, path).reshape(-1)


def exact_labels(y, path):
    """-> the labels of a file as int64 of the same shape, if they are class numbers.

    float16 (the original's) holds every integer up to 2048 and only every second one above: 2049 was stored as 2048.
    """
    y = np.asarray(y)
    if y.dtype.kind not in "iuf" or not np.isfinite(y).all() or (y != np.floor(y)).any() or (y < 0).any():
        raise InputError(f"{path}: labels must be whole numbers from 0 up")
    if y.dtype == np.float16 and y.max(initial=0) >= 2048:
        raise InputError(f"{path}: float16 labels up to {y.max():.0f}, where float16 has merged classes; "
                         "dump the embeddings again")
    return y.astype(np.int64)


def number(kind, least, most=math.inf):
    """A type for argparse: an int or a float from `least` to `most`; NaN and infinity are neither."""
    def read(text):
        value = kind(text)
        if not least <= value <= most or value == math.inf:
            limits = f"{least} or more" if most == math.inf else f"between {least} and {most}"
            raise argparse.ArgumentTypeError(f"{text} is not {limits}")
        return value

    read.__name__ = kind.__name__          # argparse names it where `kind` cannot read the text
    return read


def device_named(name, flag="--device"):
    """-> torch.device, if it can compute here (a GPU may be too old for the kernels in PyTorch's wheels)."""
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"{flag} {name}: {reason(error)}") from None
    return torch.device(name)


def leave_group(together=True):
    """Leave the process group, if there is one. together: its end waits for the other processes, so not after an error,
    when they may wait for this one.

    First gloo's threads get the time to let go of their last tensors, for which they need Python's lock: PyTorch 2.6
    waits for them holding that lock, and at Python's exit they die in asking for it, and the process aborts.
    """
    if dist.is_initialized():
        time.sleep(0.1)
        if together:
            dist.destroy_process_group()


def command_line(main):
    """Run a script's main. Bad input ends with one line and exit status 1, Ctrl-C with 130, SIGTERM with 143."""
    signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))  # so that temporary files are removed
    complaint = what_stops(main)           # printed here, when the exception is gone and progress bars have ended
    if complaint == "interrupted":
        print(complaint, file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    if complaint is not None:
        sys.exit("error: " + " ".join(complaint.split()))


def what_stops(main):
    """Run main -> None, or why it ended."""
    try:
        main()
        flush_output()
    except InputError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "allocate" not in str(error):    # PyTorch's MemoryError
            raise
        return f"not enough memory; smaller batches or images, or fewer classes, need less ({reason(error)})"
    except KeyboardInterrupt:
        return "interrupted"


def flush_output():
    """Flush now: a failure at interpreter exit would print Python's own message and give status 120."""
    try:
        sys.stdout.flush()
    except OSError as error:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())       # at its exit Python writes what is left once more
        raise InputError(f"standard output: {error.strerror}") from None


def reason(error):
    """-> what an exception says, in one line."""
    return str(error).strip().split("\n")[0] or type(error).__name__
