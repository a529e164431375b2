"""The model, loss and optimiser that settings ask for; the first steps of training against the original's."""
from types import SimpleNamespace

import numpy as np
import pytest
import schedules
import torch
from conftest import fill
from recipe import (
    check_images,
    freeze,
    load_backbone,
    make_criterion,
    make_optimizer,
    model_spec,
    norm_parameters,
    start_momentum,
    train_mode,
)

from mrl_files import InputError
from mrl_models import build_model


def settings(**model):
    return SimpleNamespace(
        model=SimpleNamespace(**{"arch": "resnet18", "mrl": 0, "efficient": 0, "nesting_start": 3, "nesting_list": None,
                                 "fixed_feature": None, "relative_importance": None, "num_classes": 10, **model}),
        training=SimpleNamespace(use_blurpool=1, label_smoothing=0.1, norms_by_type=0, bn_wd=0.0, weight_decay=1e-4,
                                 momentum=0.9))


@pytest.mark.parametrize("kind, head", [("mrl", "mrl"), ("mrl_e", "mrl_e"), ("ff", "ff64")])
def test_first_steps_equal_the_original(golden, kind, head):
    expected = golden("model")[0][f"trajectory_resnet18_{kind}"]
    model = build_model("resnet18", head, num_classes=10)
    model.load_state_dict(fill(model.state_dict(), 21))
    model = model.to(memory_format=torch.channels_last).train()
    optimizer, criterion = make_optimizer(model, settings().training), make_criterion(settings())
    groups = [len(group["params"]) for group in optimizer.param_groups]
    assert groups == [expected["params_without_decay"], expected["params_with_decay"]]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0, 1e-4]
    lr = SimpleNamespace(lr_schedule_type="cyclic", lr=0.05, lr_peak_epoch=2)
    rates = np.concatenate([schedules.iteration_rates(epoch, 3, lr, 4) for epoch in range(4)])
    np.testing.assert_allclose(rates, expected["lrs"], rtol=1e-15)
    rng = np.random.default_rng(99)
    for step, tolerance in enumerate([1e-6, 1e-6, 3e-4]):      # rounding grows along the run, see golden/README.md
        x = torch.from_numpy(rng.standard_normal((8, 3, 64, 64)).astype(np.float32))
        y = torch.from_numpy(rng.integers(0, 10, 8))
        for group in optimizer.param_groups:
            group["lr"] = rates[step]
        optimizer.zero_grad()
        loss = criterion(model(x.contiguous(memory_format=torch.channels_last)), y)
        loss.backward()
        optimizer.step()
        assert loss.item() == pytest.approx(expected["losses"][step], rel=tolerance)


@pytest.mark.parametrize("model, head, sizes", [
    ({}, "ff512", [512]), ({"fixed_feature": 64}, "ff64", [64]), ({"mrl": 1}, "mrl", [8, 16, 32, 64, 128, 256, 512]),
    ({"efficient": 1}, "mrl_e", [8, 16, 32, 64, 128, 256, 512]),
    ({"mrl": 1, "efficient": 1, "nesting_start": 8}, "mrl_e", [256, 512]),
    ({"mrl": 1, "nesting_list": "8,212,416"}, "mrl", [8, 212, 416]), ({"mrl": 1, "fixed_feature": 512}, "mrl", None)])
def test_flags_choose_the_head(model, head, sizes):
    spec = model_spec(settings(**model))
    assert spec["head"] == head and (sizes is None or spec["nesting_list"] == sizes)


@pytest.mark.parametrize("model, said", [
    ({"mrl": 1, "fixed_feature": 64}, "model.fixed_feature=64"),
    ({"efficient": 1, "fixed_feature": 64}, "fixed_feature"),
    ({"arch": "resnet51"}, "unknown architecture"),
    ({"fixed_feature": 2048}, "more than the 512 features"),
    ({"mrl": 1, "nesting_list": "8,a"}, "model.nesting_list=8,a"),
    ({"mrl": 1, "nesting_list": "16,8"}, "increasing"),
    ({"mrl": 1, "relative_importance": "2,1"}, "2 weights for sizes"),
    ({"mrl": 1, "nesting_start": 12}, "nesting_start")])
def test_flags_that_contradict(model, said):
    with pytest.raises(InputError, match=said):
        model_spec(settings(**model))


def test_momentum_begins_with_zeros_where_the_first_step_overflows():
    """What fused SGD does with fp16 on a GPU, done on the CPU."""
    layer = torch.nn.Linear(2, 2, bias=False)
    before = layer.weight.detach().clone()
    optimizer = torch.optim.SGD([layer.weight], lr=1.0, momentum=0.9, fused=True)
    start_momentum(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    for gradient in (torch.inf, 0.1):
        layer.weight.grad = torch.full((2, 2), gradient) * scaler.get_scale()
        scaler.scale(torch.zeros(()))
        scaler.step(optimizer)
        scaler.update()
    torch.testing.assert_close(layer.weight, before - 0.1)


def test_images_and_batches_of_sizes_that_networks_do_not_take():
    def resolutions(train, val, batch=2, last=None, trainable=None, eval_only=0):
        return SimpleNamespace(resolution=SimpleNamespace(min_res=train, max_res=last or train),
                               validation=SimpleNamespace(resolution=val), model=SimpleNamespace(trainable=trainable),
                               training=SimpleNamespace(batch_size=batch, eval_only=eval_only))
    spec = model_spec(settings(arch="vit_b_16", mrl=1))
    check_images(resolutions(224, 224), spec)
    with pytest.raises(InputError, match=r"--resolution.min_res=160: vit_b_16 does not take .*Expected 224"):
        check_images(resolutions(160, 224), spec)
    with pytest.raises(InputError, match=r"--validation.resolution=256: vit_b_16"):
        check_images(resolutions(224, 256), spec)
    check_images(resolutions(160, 256), model_spec(settings(mrl=1)))
    check_images(resolutions(64, 64, batch=1), model_spec(settings(arch="resnet18", mrl=1)))      # 2 x 2 values
    for first, last in ((32, 32), (64, 32)):
        with pytest.raises(InputError, match=r"--training.batch_size=1: is too small for resnet18 at 32 pixels"):
            check_images(resolutions(first, 32, batch=1, last=last), model_spec(settings(arch="resnet18", mrl=1)))
    check_images(resolutions(32, 32, batch=1), model_spec(settings(arch="convnext_tiny", mrl=1)))      # no BatchNorm
    for allowed in ({"trainable": "fc"}, {"eval_only": 1}):      # no running statistics are learned
        check_images(resolutions(32, 32, batch=1, **allowed), model_spec(settings(arch="resnet18", mrl=1)))
    check_images(resolutions(32, 32, batch=2 ** 62), model_spec(settings(arch="resnet18", mrl=1)))


def test_norms_by_type_finds_those_that_the_name_misses():
    model = build_model("resnet18", "mrl", num_classes=3)
    by_name, by_type = norm_parameters(model, False), norm_parameters(model, True)
    assert by_name < by_type
    assert all("downsample.1" in name for name in by_type - by_name) and len(by_type - by_name) == 6


def test_finetuning_takes_the_backbone_and_freezes_the_rest(tmp_path):
    teacher, model = build_model("resnet18", "ff512", num_classes=7), build_model("resnet18", "mrl", num_classes=3)
    torch.save(teacher.state_dict(), tmp_path / "ff.pt")
    load_backbone(model, tmp_path / "ff.pt")
    assert torch.equal(model.conv1.weight, teacher.conv1.weight)
    freeze(model, "fc,layer4.1.conv2")
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {name for name, _ in model.named_parameters() if name.startswith(("fc.", "layer4.1.conv2."))}
    train_mode(model)
    assert model.fc.training and not model.bn1.training      # frozen running statistics stay
    with pytest.raises(InputError, match="layer9 is no part"):
        freeze(model, "layer9")
