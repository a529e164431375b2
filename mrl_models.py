"""Networks and their checkpoints: a classifier with a nested head by name, and what a saved file holds.

    model = build_model("resnet50", head="mrl")                # one backbone, nine classifiers on nested prefixes
    model = load_model("runs/<uuid>/final_weights.pt")         # eval mode; model.spec says what it is

Letters used for shapes: N images, D features, C classes, G granularities (nested sizes).
"""
import math
import operator
import pickle
import re
import warnings
from difflib import get_close_matches
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from MRL import FixedFeatureLayer, MRL_Linear_Layer
from mrl_files import SAFETENSORS, InputError, describe_error, file_path, identify_file, import_extra, read_json

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)      # ImageNet's, of pixels in 0 ... 1


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
    """A classifier whose last linear layer is replaced by a nested (or fixed-feature) head.

    arch: a torchvision classifier, or timm/<name>: one of timm's, where that is installed.
    head: "mrl", "mrl_e", or "ff<d>": a classifier on the first d features.
    nesting_list: G sizes; None is 8, 16 ... up to the feature width. An "ff<d>" head has the one size d.
    pretrained: the library's weights for the backbone (the new head is random).
    -> module: images [N, 3, H, W] -> tuple of G [N, C] ("ff<d>": [N, C]). `model.spec` holds these arguments,
    with nesting_list and feature_dim filled in; for timm also with what `preparation` asks. Raises InputError for what
    does not exist or fit.
    """
    model = find_backbone(arch, pretrained)
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
    if arch.startswith("timm/"):
        of = model.pretrained_cfg
        model.spec |= {"mean": list(of["mean"]), "std": list(of["std"]), "crop_pct": float(of["crop_pct"])}
    return model


def find_backbone(arch, pretrained=False):
    return (timm_model if arch.startswith("timm/") else torchvision_model)(arch, pretrained)


def timm_model(arch, pretrained=False):
    """Its transformers are built to take images of all sizes that their patches divide, where timm offers it."""
    with torch.device("cpu"), warnings.catch_warnings():
        warnings.simplefilter("ignore")      # in a notebook, what it imports asks for widgets
        timm = import_extra("timm", f"the architecture {arch}")
    name, known = arch.removeprefix("timm/"), timm.list_models() + timm.list_pretrained()
    if name not in known:
        near = ", ".join(f"timm/{one}" for one in get_close_matches(name, known))
        raise InputError(f"unknown architecture {arch!r}: {f'near it: {near}' if near else 'see timm.list_models()'}")
    if pretrained and not timm.is_model_pretrained(name):
        raise InputError(f"{arch}: timm has no weights of it, to begin with; leave pretrained out")
    create = partial(timm.create_model, name, pretrained=pretrained, num_classes=1)
    try:
        return create(dynamic_img_size=True)
    except TypeError:      # only some have the argument
        return create()


def torchvision_model(arch, pretrained=False):
    with torch.device("cpu"):      # PyTorch 2.6 cannot import it while the default device is "meta"
        from torchvision import models
    if arch not in models.list_models(module=models):
        raise InputError(f"unknown architecture {arch!r}: give the name of a torchvision classification model")
    # The two networks with auxiliary classifiers are built without them: those heads would not be nested.
    extra = {"aux_logits": False, "init_weights": True} if arch in ("googlenet", "inception_v3") else {}
    device = torch.empty(0).device
    with torch.device("cpu" if arch.startswith("regnet") else device):      # RegNets compute their widths with tensors
        model = models.get_model(arch, weights="DEFAULT" if pretrained else None, **({} if pretrained else extra))
    return model.to(device)


def build_from_spec(spec, pretrained=False):
    """A new model like the one whose `spec` it is. What that records of its images stands, whatever timm says now."""
    recorded = {key: spec[key] for key in ("mean", "std", "crop_pct") if key in spec}
    model = build_model(**{key: value for key, value in spec.items() if key not in ("feature_dim", *recorded)},
                        pretrained=pretrained)
    model.spec |= recorded
    return model


def preparation(spec, resize=None, crop=224):
    """-> resize, crop, mean, std: pixels of an image's shorter side and of its central crop; of pixels in 0 ... 1.

    resize: None is what makes the crop the share that timm gives the network; for others the paper's, 224 of 256.
    """
    resize = resize or (int(crop / spec["crop_pct"]) if "crop_pct" in spec else round(crop * 256 / 224))
    if resize < crop:
        raise InputError(f"--resize {resize} is smaller than --crop {crop}")
    return resize, crop, tuple(spec.get("mean", MEAN)), tuple(spec.get("std", STD))


def feature_width(arch):
    """-> D, how many features an architecture gives its classifier."""
    with torch.device("meta"):      # costs nothing: only the shapes are needed
        return classifier(find_backbone(arch))[1].in_features


def classifier(model):
    """-> (name, module) of the classifier: our head if there is one, else the last linear layer, or the one that timm
    names."""
    kinds, modules = (MRL_Linear_Layer, FixedFeatureLayer), list(model.named_modules())
    linear = [m for m in modules if isinstance(m[1], nn.Linear)]
    if hasattr(model, "pretrained_cfg"):      # timm's
        own = getattr(model, "get_classifier", lambda: None)()
        linear = [m for m in linear if m[1] is own]
    found = [m for m in modules if isinstance(m[1], kinds)] or linear
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


def similar_sizes(pixels, others):
    """Are two sizes of images so near that a network trained for one does well at the other, as at 160, 224 and 256?"""
    return max(pixels, others) <= 1.5 * min(pixels, others)


def check_image_size(model, pixels, flag):
    """InputError, which names the flag, for a size that a model on the meta device does not take: some networks take
    one size only (torchvision's ViTs: 224), others have a least size."""
    try:
        model.eval()(torch.empty(1, 3, pixels, pixels, device="meta"))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise InputError(f"--{flag}={pixels}: {model.spec['arch']} does not take images of this size: "
                         f"{describe_error(error)}") from None


def model_name(spec):
    """The name that files carry: mrl1_e0_ff2048 (MRL), mrl1_e1_ff2048 (MRL-E), mrl0_e0_ff256 (FF-256)."""
    nested, efficient = spec["head"].startswith("mrl"), spec["head"] == "mrl_e"
    return f"mrl{nested:d}_e{efficient:d}_ff{spec['nesting_list'][-1]}"


def check_nesting_list(nesting_list, name="nesting_list"):
    """-> the sizes as a list of ints, if they are positive and increasing. name: of what they were given as."""
    try:
        sizes = [operator.index(d) for d in nesting_list]
    except TypeError:
        sizes = []
    if not sizes or sizes[0] < 1 or any(a >= b for a, b in pairwise(sizes)):
        raise InputError(f"{name} must hold increasing positive integers, got {nesting_list}")
    return sizes


def default_nesting_list(width, start=None):
    """Powers of two from 2**start (None: 8, or less for a width below) up to the feature width, the width itself last
    (2048 -> 8 ... 2048)."""
    start = min(3, width.bit_length() - 1) if start is None else start
    if not 0 <= start <= math.log2(width):
        raise InputError(f"nesting_start={start}: 2**{start} is not between 1 and the feature width {width}")
    return [2 ** i for i in range(start, math.ceil(math.log2(width)))] + [width]


# ------------------------------------------------------------------------------------------------ logits

def classify_in_float32(model):
    """From now on the head computes in float32 when it is in evaluation mode, whatever autocast does around it.

    Logits that are rounded to a half tie, and the tie decides the ranking: 0.3 % of top-1 in fp16 and 1.8 % in bf16, on
    synthetic logits. Once for all, not in a `with` block: torch.compile would compile the model anew for each block.
    """
    head = classifier(model)[1]
    forward = head.forward

    def in_float32(x):
        if head.training:
            return forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return forward(x.float())

    head.forward = in_float32


def stack_logits(output):
    """What a model returns, a tuple of G [N, C] or (fixed features) one [N, C] -> [G, N, C]."""
    return output[None] if torch.is_tensor(output) else torch.stack(output)


def compute_logits(model, images, tta=False):
    """-> logits [G, N, C] float32; tta adds those of the mirrored images."""
    logits = stack_logits(model(images)).float()
    return logits + compute_logits(model, images.flip(-1)) if tta else logits


def count(logits, target):
    """logits [G, N, C], target [N] -> [3, G] float64: sums over the images of top-1 hits, top-5 hits, cross-entropy."""
    sizes, n, classes = logits.shape
    hits = logits.topk(min(5, classes), dim=-1).indices == target[:, None]                # [G, N, 5]
    loss = F.cross_entropy(logits.float().flatten(0, 1), target.repeat(sizes), reduction="none").view(sizes, n)
    return torch.stack([hits[..., 0].sum(1), hits.any(-1).sum(1), loss.double().sum(1)])


def autocast(device, precision):
    """The context in which a network runs in fp32, fp16 or bf16. fp32 is float32 all through: on a GPU, PyTorch's
    default for convolutions is TF32, which has 10 bits of mantissa, not 23."""
    if precision == "fp32":
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
    return torch.autocast(torch.device(device).type, {"fp16": torch.float16}.get(precision, torch.bfloat16),
                          enabled=precision != "fp32")


# ------------------------------------------------------------------------------------------------ checkpoints

def load_model(path, arch=None, head=None, nesting_list=None, old_ckpt=False):
    """A trained model in eval mode, on the CPU. path: a file (.safetensors, else PyTorch's), or a folder: a run of
    train/, or what inference/export.py wrote.

    What each argument leaves None is read from the JSON beside the file (params.json of a run, config.json of an
    export), else from the shapes in the file. If neither says it, or an argument contradicts them, InputError names the
    argument.
    old_ckpt: the layout of the authors' released files (MRL-E keeps its matrix under fc.weight).
    The file must hold exactly the model's keys and shapes, under whatever wrapper or prefix: see read_state_dict.
    """
    return fill_model(*open_model(path, arch, head, nesting_list, old_ckpt))


def fill_model(model, state):
    """What open_model has returned -> the model with its numbers, in eval mode."""
    own = model.state_dict()
    model.load_state_dict({k: v.to(own[k].dtype).contiguous() for k, v in state.items()}, assign=True)
    return model.eval()


def open_model(path, arch=None, head=None, nesting_list=None, old_ckpt=False):
    """-> (load_model's network on the meta device, without numbers; the state dict that fits it). model.spec says what
    a file holds, and no memory is taken for it. Arguments and errors are load_model's."""
    state, known = read_state_dict(path), read_params(path)
    given = {k: v for k, v in {"arch": arch, "head": head, "nesting_list": nesting_list}.items() if v is not None}
    try:
        if old_ckpt:
            state = modern_keys(state, (known | given).get("head"))
        spec = known or read_shapes(state, **given)
        source = f"{find_json(path).name} beside it says" if known else "the file holds"
        for key, value in given.items():
            if key in spec and spec[key] != value:
                raise InputError(f"{key}={value} was asked for, {source} {spec[key]}")
        with torch.device("meta"):
            model = build_from_spec(spec | given)
        if misfit := does_not_fit(model, state):
            raise InputError(misfit if known else f"{misfit}; for another network give arch (--arch)")
        if problem := not_finite(state):
            raise InputError(problem)
        return model, state
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def find_weights(path):
    """-> the file of weights that a path means: the path itself, or, of a folder, what export.py or train/ wrote."""
    path = file_path(path)
    inside = [str(Path(path, name)) for name in ("model.safetensors", "final_weights.pt") if Path(path, name).is_file()]
    return inside[0] if inside else path


def find_json(path):
    """-> the JSON that says what weights are: an export's config.json, else a run's params.json (or where it would be).
    """
    weights = Path(find_weights(path))
    shared = weights.with_name("config.json")
    return shared if weights.suffix == ".safetensors" and shared.exists() else weights.with_name("params.json")


def read_params(path):
    """-> build_model's arguments as the JSON beside a checkpoint has them; {} where there is none. The original's
    params.json, which the authors released with their files, holds settings under dotted names: it is passed over."""
    params = find_json(path)
    content = read_json(params)
    if content is None or (content and all("." in key for key in content)):
        return {}
    spec, kinds = content.get("model"), {"arch": str, "head": str, "nesting_list": list, "num_classes": int,
                                         "blurpool": bool, "feature_dim": int, "mean": list, "std": list,
                                         "crop_pct": float}
    if not isinstance(spec, dict) or not all(isinstance(v, kinds.get(k, ())) for k, v in spec.items()):
        raise InputError(f"{params}: its \"model\" is not what build_model takes; "
                         "repair it, or move the checkpoint elsewhere and give flags")
    return spec


WRAPPERS = ("model", "state_dict", "model_state_dict", "net", "network", "module", "ema", "model_ema", "state_dict_ema")


def read_state_dict(path):
    """-> the plain state dict in a file: unwrapped, without the prefixes of what the network stood in."""
    path = find_weights(path)
    if Path(path).is_dir():
        raise InputError(f"{path}: this folder has no model.safetensors and no final_weights.pt")
    try:
        content = read_weights(path)
    except InputError:      # safetensors is not installed
        raise
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except Exception as error:
        raise InputError(f"{path}: {why_unread(path, error)}") from None
    state = state_within(content)
    if state is None:
        raise InputError(f"{path}: holds no state dict, or none that can be told from others "
                         f"({describe_content(content)}); save model.state_dict() alone")
    return without_prefixes(state)


def read_weights(path):
    """-> what a file of weights holds, not mapped: the file may be replaced while it is used."""
    if path.endswith(".safetensors"):
        return import_extra("safetensors.torch", f"{path}: reading it").load(Path(path).read_bytes())
    return torch.load(path, map_location="cpu", weights_only=True, mmap=False)


def why_unread(path, error):
    """-> why a file could not be read."""
    what = identify_file(path)
    if what == SAFETENSORS and path.endswith(".safetensors"):
        return f"not a complete safetensors file ({describe_error(error)})"
    if what:
        return f"is {what}"
    if not isinstance(error, pickle.UnpicklingError) or "truncated" in str(error):
        return f"not a PyTorch checkpoint, or truncated ({describe_error(error)})"
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    return (f"holds more than tensors{f' ({named[1]})' if named else ''}: pickled code or modules are refused; "
            "save model.state_dict() instead")


def state_within(content):
    """-> the state dict in what a file holds: itself, or under a name that is known, or the only one among the
    entries; None where there is none or more."""
    if not isinstance(content, dict) or is_state_dict(content):
        return content if is_state_dict(content) else None
    named = [state_within(content[name]) for name in WRAPPERS if name in content]
    found = [state for state in named if state] or [value for value in content.values() if is_state_dict(value)]
    return found[0] if any(named) or len(found) == 1 else None


def is_state_dict(value):
    return isinstance(value, dict) and bool(value) and all(isinstance(k, str) and is_dense(v) for k, v in value.items())


def describe_content(content):
    """-> what a file holds, in a few words: for a dictionary, the keys of what is no tensor."""
    if not isinstance(content, dict) or not content:
        return f"a {type(content).__name__}" + " without entries" * (content == {})
    entries = [str(key) for key, value in content.items() if not is_dense(value)]
    return f"what it holds beside tensors: {', '.join(entries[:8])}{' ...' * (len(entries) > 8)}"


def without_prefixes(state):
    """-> the same tensors under the network's own names: without what torch.compile, FSDP and checkpointing put
    anywhere into a name, the counter of averaged weights (torch.optim.swa_utils), and what all names begin with, as
    DDP's module. and Lightning's model. (no network that ends in a classifier has all its parameters in one part)."""
    within = r"(?<![^.])_(orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\."
    state = {re.sub(within, "", key): value for key, value in state.items() if key != "n_averaged"}
    while len({key.partition(".")[0] for key in state}) == 1 and all("." in key for key in state):
        state = {key.partition(".")[2]: value for key, value in state.items()}
    return state


def is_dense(value):
    """Is it a dense tensor that holds its numbers?"""
    return torch.is_tensor(value) and value.layout == torch.strided and not value.is_meta


def modern_keys(state, head):
    """The released MRL-E files name their one matrix as a plain classifier: rename it. The rest is unchanged."""
    if head is None and "fc.weight" in state:
        raise InputError("a released file with one matrix, MRL-E (mrl_e) or fixed features (ff<d>): give head "
                         "(--mrl, --efficient or --rep_size)")
    if head != "mrl_e":
        return state
    return {re.sub(r"^fc\.(weight|bias)$", r"fc.nesting_classifier_0.\1", key): v for key, v in state.items()}


def read_shapes(state, arch=None, head=None, nesting_list=None):
    """build_model's arguments as far as keys and shapes show them; InputError where they do not."""
    if arch is None:
        raise InputError("no params.json beside it, and the architecture does not show in a file: give arch (--arch)")
    nested = find_nested_weights(state)
    sizes, weight = [v.shape[1] for v in nested], nested[-1] if nested else find_plain_weight(state, arch)
    shown = {"arch": arch, "num_classes": weight.shape[0], "blurpool": any(k.endswith("blur_filter") for k in state)}
    if len(nested) > 1 or (head == "mrl" and nesting_list == sizes):
        return {**shown, "head": "mrl", "nesting_list": sizes}
    if not nested and head == "mrl_e":
        raise InputError(f"head=mrl_e was asked for, the file holds ff{weight.shape[1]}; if it is a released MRL-E "
                         "file: give old_ckpt (--old_ckpt)")
    if nested and nesting_list is None and head in (None, "mrl_e"):
        raise InputError("an MRL-E model, whose sizes do not show in a file: give nesting_list (--efficient alone for "
                         "8, 16 ..., --nesting_list for others)")
    return {**shown, "head": "mrl_e" if nested else f"ff{weight.shape[1]}"}


def find_nested_weights(state):
    """-> the nested classifiers' matrices, by their numbers: safetensors files do not keep the order."""
    found = {int(m[1]): v for k, v in state.items() if (m := re.search(r"\.nesting_classifier_(\d+)\.weight$", k))}
    return [found[i] for i in sorted(found)]


def find_plain_weight(state, arch):
    """-> the classifier's matrix, under the architecture's name for it, else the last one."""
    with torch.device("meta"):
        name = classifier(find_backbone(arch))[0]
    matrices = {key: value for key, value in state.items() if value.dim() == 2}
    if not matrices:
        raise InputError("holds no linear classifier")
    return matrices.get(f"{name}.weight", [*matrices.values()][-1])


def does_not_fit(model, state):
    """-> what is wrong, unless a state dict holds the model's keys and shapes, no more and no less; else None."""
    expected = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    found = {k: tuple(v.shape) for k, v in state.items()}
    different = [f"{k}: {found.get(k, 'missing')} instead of {expected.get(k, 'nothing')}"
                 for k in expected | found if found.get(k) != expected.get(k)]
    if not different:
        return None
    if not expected.keys() & found.keys():
        return f"{', '.join(list(found)[:2])} ... are no names of {model.spec['arch']}: it has {next(iter(expected))}"
    more = f" and {len(different) - 1} more" if len(different) > 1 else ""
    return f"does not fit {model.spec['arch']} with head {model.spec['head']} ({different[0]}{more})"


def not_finite(state):
    """-> the first tensor with NaN or infinite numbers, in words; None if all are finite."""
    broken = [k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all()]
    return f"{broken[0]} holds NaN or infinite numbers ({len(broken)} such tensors)" if broken else None


def load_exactly(model, state, path):
    """Load a state dict that must fit, and hold only finite numbers."""
    if problem := does_not_fit(model, state) or not_finite(state):
        raise InputError(f"{path}: {problem}")
    model.load_state_dict(state)
