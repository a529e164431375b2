"""The training step and validation on tensors that say they are on cuda:0 and hold no numbers (FakeTensorMode).

PyTorch computes each operation's device, dtype and layout as for a GPU. A mix-up of devices raises; so does whatever
asks for a number, as item() does, for there is none. Copies between GPU and host, which wait too, raise here as well.
"""
import sys

import kill_and_resume
import pytest
import torch
import train_imagenet
from loaders import normalise
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trainer import Trainer

from mrl_models import compute_logits, count


def move(module, device, memory_format=None):
    """nn.Module.to puts new numbers into the old parameters; of another kind of tensor it cannot."""
    for part in module.modules():
        for name, value in {**part._parameters, **part._buffers}.items():
            if value is not None:
                formatted = {"memory_format": memory_format} if memory_format and value.dim() == 4 else {}
                moved = value.detach().to(device, **formatted)
                learns = isinstance(value, nn.Parameter)
                setattr(part, name, nn.Parameter(moved, value.requires_grad) if learns else moved)
    return module


def fused_sgd(parameters, gradients, momenta, **_):
    """What the kernel of a GPU demands of its lists. (PyTorch has compared the devices before.)"""
    for parameter, gradient, momentum in zip(parameters, gradients, momenta, strict=True):
        assert parameter.stride() == gradient.stride() == momentum.stride() and parameter.dtype == gradient.dtype


LIBRARY = torch.library.Library("aten", "IMPL", "Meta")      # gone with this object
LIBRARY.impl("_fused_sgd_", fused_sgd)
LIBRARY.impl("_fused_adamw_", lambda parameters, gradients, means, squares, *_, **__: fused_sgd(
    parameters, gradients, means) or fused_sgd(parameters, gradients, squares))


@pytest.fixture
def make_trainer(monkeypatch, tmp_path):
    monkeypatch.setattr(nn.Module, "to", move)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda weights, **_: weights)      # looks at numbers; ConvNeXt's

    def backward(loss):
        """The engine asks for a real GPU; each parameter gets a gradient of its own form."""
        assert loss.dtype == torch.float32 and loss.device == torch.device("cuda:0")
        for parameter in made[0].model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)

    made = []
    monkeypatch.setattr(torch.Tensor, "backward", backward)

    def make(*changes):
        words = kill_and_resume.command("a", tmp_path, "run", "--training.device=cuda", *changes)
        monkeypatch.setattr(sys, "argv", words[1:])
        settings = train_imagenet.read_settings(train_imagenet.CONFIG, "")
        spec = train_imagenet.model_spec(settings)
        made.append(Trainer(torch.device("cuda:0"), settings, spec, tmp_path))
        return made[0]
    return make


def batch(n, pixels):
    return (torch.randint(256, (n, pixels, pixels, 3), dtype=torch.uint8, device="cuda:0"),
            torch.zeros(n, 1, dtype=torch.int64, device="cuda:0"))


class WithoutCopies(TorchDispatchMode):
    """Raises where an operation has tensors of two devices: it would wait for the GPU."""

    def __torch_dispatch__(self, operation, types, args=(), given=None):
        made = operation(*args, **(given or {}))
        devices = {value.device for value in tree_leaves((args, given, made)) if torch.is_tensor(value)}
        assert len(devices) < 2, f"{operation} copies between {devices}"
        return made


HEADS = {"mrl": [], "mrl_e": ["--model.mrl=0", "--model.efficient=1"],
         "ff": ["--model.mrl=0", "--model.fixed_feature=16"]}
PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
OTHERS = {"convnext": ["--model.arch=convnext_tiny"], "frozen": ["--training.use_blurpool=1", "--model.trainable=fc"],
          "adamw": ["--training.optimizer=adamw", "--training.clip_grad_norm=1"]}


@pytest.mark.parametrize(("words", "precision"), [
    *(pytest.param(HEADS[head], precision, id=f"{head}-{precision}") for head in HEADS for precision in PRECISIONS),
    *(pytest.param(words, "fp16", id=network) for network, words in OTHERS.items())])
def test_a_step_and_a_validation_stay_on_the_gpu(make_trainer, words, precision):
    with FakeTensorMode(allow_non_fake_inputs=False):
        trainer, layouts = make_trainer(*words, f"--training.precision={precision}"), []
        for module in trainer.model.modules():
            if isinstance(module, nn.Conv2d):
                assert module.weight.is_contiguous(memory_format=torch.channels_last)
                module.register_forward_hook(lambda module, given, made: layouts.append(
                    (made.dtype, given[0].is_contiguous(memory_format=torch.channels_last))))
        with WithoutCopies():
            trainer.losses += trainer.train_step(*batch(8, 64), 0.1)
        assert {dtype for dtype, _ in layouts} == {PRECISIONS[precision]}
        first = layouts[:1] if precision == "bf16" else layouts      # without a GPU's cuDNN, PyTorch says no more
        assert all(channels_last for _, channels_last in first)
        assert all(group["fused"] for group in trainer.optimizer.param_groups)
        trainer.model.eval()
        with WithoutCopies(), torch.no_grad(), trainer.autocast:
            images, labels = batch(5, 64)
            logits = compute_logits(trainer.model, normalise(images, trainer.mean, trainer.std))
            sums = count(logits, labels.flatten())
    assert logits.dtype == torch.float32
    assert trainer.losses.device == logits.device == sums.device == torch.device("cuda:0")


def test_waiting_for_the_device_is_seen():
    with FakeTensorMode():
        number = torch.zeros(1, device="cuda:0")
        with pytest.raises(DataDependentOutputException):
            number.item()
        with pytest.raises(AssertionError, match="copies between"), WithoutCopies():
            number.cpu()
