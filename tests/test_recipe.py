"""The model, loss and optimiser that settings ask for; the first steps of training against the original's."""
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import schedules
import torch
from conftest import fill
from recipe import (
    check_images,
    check_training,
    freeze,
    load_backbone,
    make_criterion,
    make_ema,
    make_mixing,
    make_model,
    make_optimizer,
    model_spec,
    norm_parameters,
    start_momentum,
    train_mode,
    vectors,
)

from mrl_files import InputError
from mrl_models import build_model


def settings(**model):
    return SimpleNamespace(
        model=SimpleNamespace(**{"arch": "resnet18", "mrl": 0, "efficient": 0, "nesting_start": 3, "nesting_list": None,
                                 "fixed_feature": None, "relative_importance": None, "num_classes": 10, **model}),
        training=SimpleNamespace(use_blurpool=1, label_smoothing=0.1, norms_by_type=0, bn_wd=0.0, weight_decay=1e-4,
                                 optimizer="sgd", momentum=0.9))


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
    *(({"mrl": 1, "relative_importance": weights}, f"relative_importance={weights}: must be numbers from 0 up,")
      for weights in ("-1,1", "0,0", "nan,1", "1,inf", "1,1e39", "1e-50,0")),
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


def test_adamw_decays_matrices_alone():
    with torch.device("meta"):
        model, convnext = (build_model(arch, "mrl", num_classes=3) for arch in ("vit_b_32", "convnext_tiny"))
    training = SimpleNamespace(optimizer="adamw", bn_wd=0.0, weight_decay=0.05)
    apart, decayed = make_optimizer(model, training).param_groups
    assert (apart["weight_decay"], decayed["weight_decay"], apart["betas"]) == (0, 0.05, (0.9, 0.999))
    assert len(apart["params"]) == len(vectors(model)) and all(p.dim() > 1 for p in decayed["params"])
    kept = {"class_token", "encoder.ln.weight", "encoder.ln.bias", "heads.head.nesting_classifier_0.bias"}
    assert kept <= vectors(model) and not {"encoder.pos_embedding", "conv_proj.weight"} & vectors(model)
    assert "features.1.0.layer_scale" in vectors(convnext)      # [C, 1, 1]


def test_an_average_follows_each_step():
    """By hand, with decay 3/4: the weights after the first step, then 3/4 of the average + 1/4 of the weights."""
    model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.BatchNorm1d(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ema = make_ema(model, optimizer, 0.75)
    for weight, mean in ((1.0, 2.0), (5.0, 6.0), (1.0, 0.0)):
        model[0].weight.data.fill_(weight)
        model[1].running_mean.fill_(mean)
        model[1].num_batches_tracked += 4
        optimizer.step()      # of no gradients: the weights stay
    assert ema.module[0].weight.item() == 0.75 * (0.75 * 1 + 0.25 * 5) + 0.25 * 1
    assert ema.module[1].running_mean.item() == 0.75 * (0.75 * 2 + 0.25 * 6)
    assert ema.module[1].num_batches_tracked.dtype == torch.int64


def mixing(**alphas):
    return SimpleNamespace(seed=3, **{"mixup": None, "cutmix": None, **alphas})


def batch():
    return torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 4, 0])


def test_mixup_mixes_neighbours_and_their_labels():
    images, labels = batch()
    mixed, soft = make_mixing(mixing(mixup=1.0), 5)(images, labels, 2, 7)
    share = soft[1, 1].item()
    assert 0 < share < 1 and soft.shape == (6, 5)
    torch.testing.assert_close(soft.sum(1), torch.ones(6))
    torch.testing.assert_close(mixed, share * images + (1 - share) * images.roll(1, 0))
    torch.testing.assert_close(soft[5], torch.tensor([share, 0, 0, 0, 1 - share]))
    assert mixed.is_contiguous(memory_format=torch.channels_last)


def test_cutmix_gives_each_label_its_share_of_the_pixels():
    images, labels = batch()
    mixed, soft = make_mixing(mixing(cutmix=1.0), 5)(images, labels, 0, 1)
    own = (mixed == images).all(1)      # [N, R, R]
    assert ((mixed == images.roll(1, 0)).all(1) | own).all()
    torch.testing.assert_close(own.float().mean((1, 2)), soft[1, 1].expand(6))
    assert 0 < own.float().mean() < 1


def test_mixing_is_drawn_from_seed_epoch_batch_and_process(monkeypatch):
    either = make_mixing(mixing(mixup=0.5, cutmix=1.0), 5)
    before = torch.get_rng_state()
    drawn = [either(*batch(), *place)[1] for place in ((2, 7), (2, 7), (2, 8), (3, 7))]
    monkeypatch.setattr("recipe.rank", lambda: 1)
    drawn.append(either(*batch(), 2, 7)[1])
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn[0], drawn[1])
    assert all(not torch.equal(drawn[0], soft) for soft in drawn[2:])
    unmixed = make_mixing(mixing(), 5)(*batch(), 0, 0)
    assert all(map(torch.equal, unmixed, batch()))


def test_an_average_that_stands_still_and_a_rate_for_sgd(capsys):
    def said(rate=0.425, **training):
        training = {"ema": None, "optimizer": "sgd", **training}
        check_training(SimpleNamespace(**training), SimpleNamespace(lr=rate))
        return capsys.readouterr().err
    assert said() == said(ema=0.999) == said(1e-3, optimizer="adamw") == ""
    assert said(1.7, optimizer="adamw").startswith("warning: --lr.lr=1.7 is a rate for SGD")
    with pytest.raises(InputError, match=r"--training.ema=1: .* give less"):
        said(ema=1.0)


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


def test_weights_that_cannot_be_downloaded(monkeypatch):
    def build(*_, **__):
        raise URLError("no network")
    monkeypatch.setattr("recipe.build_from_spec", build)
    with pytest.raises(InputError, match=r"^--model.pretrained=1: the weights could not .*no network.*/hub: copy"):
        make_model(SimpleNamespace(model=SimpleNamespace(pretrained=1)), {}, "cpu")
