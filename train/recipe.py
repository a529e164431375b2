"""Build the model, the loss, the optimiser and what goes with them from the settings.

Used by trainer.py and train_imagenet.py.
"""
import math
import sys

import launch
import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from MRL import Matryoshka_CE_Loss
from mrl_files import InputError, describe_error, numbers, rank
from mrl_models import (
    build_from_spec,
    build_model,
    check_image_size,
    classifier,
    default_nesting_list,
    feature_width,
    load_exactly,
    read_state_dict,
)

ADAMW_LR = 0.05      # from here on it is a rate for SGD
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


def read_numbers(text, kind, flag):
    """'8,16,32' -> [8, 16, 32]; None stays None."""
    try:
        return None if text is None else numbers(kind)(text)
    except ValueError:
        raise InputError(f"--{flag}={text}: expected numbers separated by commas") from None


def model_spec(settings):
    """-> build_model's arguments, checked against each other."""
    m = settings.model
    width = feature_width(m.arch)
    nested = m.mrl or m.efficient
    if nested and m.fixed_feature not in (None, width):
        raise InputError(f"--model.fixed_feature={m.fixed_feature}: a nested model (--model.mrl, --model.efficient) "
                         f"reads all {width} features; leave it out")
    sizes = read_numbers(m.nesting_list, int, "model.nesting_list")
    if sizes and not nested:
        raise InputError("--model.nesting_list: of a nested model; give --model.mrl=1 or --model.efficient=1 too")
    head = "mrl_e" if m.efficient else "mrl" if m.mrl else f"ff{m.fixed_feature or width}"
    if nested and sizes is None:
        sizes = default_nesting_list(width, m.nesting_start)
    with torch.device("meta"):
        spec = build_model(m.arch, head, sizes, m.num_classes, settings.training.use_blurpool).spec
    importance = relative_importance(settings)
    if importance and len(importance) != len(spec["nesting_list"]):
        raise InputError(f"--model.relative_importance: {len(importance)} weights for sizes {spec['nesting_list']}")
    return spec


def check_images(settings, spec):
    """InputError for sizes of images, or of batches, that the network does not take."""
    sizes = {"resolution.min_res": settings.resolution.min_res, "resolution.max_res": settings.resolution.max_res,
             "validation.resolution": settings.validation.resolution}
    with torch.device("meta"):
        model = build_from_spec(spec)
        for flag, pixels in sizes.items():
            check_image_size(model, pixels, flag)
    check_batch_size(model, settings)


def check_batch_size(model, settings):
    """BatchNorm learns nothing from one value: a batch of one image whose last map is one pixel. (A frozen one takes
    it: its running statistics stay.)"""
    if settings.training.batch_size > 1 or settings.training.eval_only:
        return
    pixels = min(settings.resolution.min_res, settings.resolution.max_res)
    freeze(model, settings.model.trainable)
    train_mode(model)
    try:
        model(torch.empty(1, 3, pixels, pixels, device="meta"))
    except ValueError as error:
        raise InputError(f"--training.batch_size=1: is too small for {model.spec['arch']} at {pixels} pixels: "
                         f"{describe_error(error)}") from None


def check_training(training, lr):
    """InputError for an average that never moves; a warning where AdamW is given a rate for SGD."""
    if training.ema == 1:
        raise InputError("--training.ema=1: the average would stay where it began; give less, such as 0.999")
    if training.optimizer == "adamw" and lr.lr >= ADAMW_LR and launch.is_first():
        print(f"warning: --lr.lr={lr.lr} is a rate for SGD; for --training.optimizer=adamw, 0.001 is usual",
              file=sys.stderr)


def relative_importance(settings):
    """-> the weights of the sizes' losses; None where none are given."""
    weights = read_numbers(settings.model.relative_importance, float, "model.relative_importance")
    as_used = torch.tensor(weights or [1.0]).tolist()      # in float32, as by the loss: 1e39 is infinite, 1e-50 is 0
    if not (all(0 <= weight < math.inf for weight in as_used) and any(as_used)):
        raise InputError(f"--model.relative_importance={settings.model.relative_importance}: must be numbers from 0 "
                         "up, not all 0")
    return weights


def make_model(settings, spec, device):
    try:
        model = build_from_spec(spec, pretrained=bool(settings.model.pretrained))
    except OSError as error:      # no internet, as on many a cluster's nodes
        raise InputError(f"--model.pretrained=1: the weights could not be downloaded ({describe_error(error)}); where "
                         f"there is internet, torchvision keeps them in {torch.hub.get_dir()}: copy that") from None
    if settings.model.init_from:
        load_backbone(model, settings.model.init_from)
    if settings.training.path:
        load_exactly(model, read_state_dict(settings.training.path), settings.training.path)
    freeze(model, settings.model.trainable)
    return model.to(device, memory_format=torch.channels_last)


def load_backbone(model, path):
    """All but the head of a checkpoint of the same architecture."""
    head = classifier(model)[0] + "."
    own = {k: v for k, v in model.state_dict().items() if k.startswith(head)}
    load_exactly(model, {k: v for k, v in read_state_dict(path).items() if not k.startswith(head)} | own, path)


def freeze(model, trainable):
    """Only the named parts learn (Table 26 fine-tunes fc and growing shares of layer4.2)."""
    if trainable is None:
        return
    model.requires_grad_(False)
    parameters = dict(model.named_parameters())
    for part in map(str.strip, trainable.split(",")):
        learning = [p for name, p in parameters.items() if name == part or name.startswith(part + ".")]
        if not learning:
            raise InputError(f"--model.trainable: {part} is no part of the model (parts look like {[*parameters][-1]})")
        for parameter in learning:
            parameter.requires_grad = True


def train_mode(model):
    """Training mode where something learns; frozen parts keep their running statistics."""
    for module in model.modules():
        own = list(module.parameters())
        module.training = not own or any(p.requires_grad for p in own)


def make_optimizer(model, training, fused=False):
    """SGD or AdamW in two groups: norm parameters, and in AdamW biases, have their own weight decay (0).

    fused: one kernel, for a GPU.
    """
    adamw = training.optimizer == "adamw"
    norms = vectors(model) if adamw else norm_parameters(model, training.norms_by_type)
    learning = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for name, p in learning if name in norms], "weight_decay": training.bn_wd},
              {"params": [p for name, p in learning if name not in norms], "weight_decay": training.weight_decay}]
    if adamw:
        return torch.optim.AdamW(groups, lr=1.0, fused=fused)
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=training.momentum, fused=fused)
    start_momentum(optimizer)
    return optimizer


def start_momentum(optimizer):
    """Start momentum at zero, which changes no step. Otherwise, if fp16 overflows in the first step (as it often does),
    fused SGD continues from uninitialised memory."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def norm_parameters(model, by_type):
    """-> names. By name, as the original: 'bn' in it; this leaves ResNet's downsample.1 norms decayed."""
    if not by_type:
        return {name for name, _ in model.named_parameters() if "bn" in name}
    return {f"{module}.{name}" for module, norm in model.named_modules() if isinstance(norm, NORMS)
            for name, _ in norm.named_parameters()}


def vectors(model):
    """-> names of the parameters that are vectors, whatever their shape: of norms, biases, scales and class tokens."""
    return {name for name, p in model.named_parameters() if p.numel() == max(p.shape, default=1)}


def make_ema(model, optimizer, decay):
    """The exponential moving average of the weights and running statistics, brought up to date by each optimiser step.

    On a GPU, torch's AveragedModel waits for the device once a step: it copies its counter there.
    """
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    optimizer.register_step_post_hook(lambda *_: ema.update_parameters(model))
    return ema


def make_mixing(training, classes):
    """-> mix(images [N, 3, R, R], labels [N], epoch, batch): mixup, cutmix, or either by chance; labels become [N, C].

    Without them the batch stays as it is. What is drawn follows from the seed, the epoch, the batch's number and the
    process, so that a run that goes on mixes as before.
    """
    if not (training.mixup or training.cutmix):
        return lambda images, labels, *_: (images, labels)
    from torchvision.transforms import v2
    kinds = {v2.MixUp: training.mixup, v2.CutMix: training.cutmix}
    either = v2.RandomChoice([kind(alpha=alpha, num_classes=classes) for kind, alpha in kinds.items() if alpha])

    def mix(images, labels, epoch, batch):
        seed = np.random.SeedSequence((training.seed, epoch, batch, rank())).generate_state(1).item()
        with torch.random.fork_rng(devices=[]):      # the CPU's generator alone: a GPU's goes on with its dropout
            torch.default_generator.manual_seed(seed)
            images, labels = either(images, labels)
        return images.contiguous(memory_format=torch.channels_last), labels
    return mix


def make_criterion(settings):
    return Matryoshka_CE_Loss(relative_importance(settings), label_smoothing=settings.training.label_smoothing)
