"""Validation counts every image once for any number of processes; any architecture learns."""
import json
import signal
import sys
from types import SimpleNamespace

import kill_and_resume
import launch
import pytest
import torch
import train_imagenet
from forked import Forked, free_port
from loaders import normalise
from trainer import Trainer, describe_images

import mrl_files
import mrl_models


def test_103_images_on_1_and_on_3_processes(tmp_path, run, run_here):
    """The same counts and the same loss, though 103 divides by neither 3 nor the batch."""
    images = kill_and_resume.make_images(tmp_path, 103)
    torch.manual_seed(0)
    model = mrl_models.build_model("resnet18", "mrl", num_classes=2, blurpool=False)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    records = []
    for processes, start in ((1, run_here), (3, run)):
        words = kill_and_resume.command(images, tmp_path, f"on{processes}", "--training.eval_only=1",
                                        f"--training.path={tmp_path}/weights.pt", "--training.distributed=1",
                                        f"--dist.world_size={processes}", f"--dist.port={free_port()}",
                                        "--validation.batch_size=8")
        start("train", words[1:])
        record = json.loads((tmp_path / f"on{processes}/log").read_text())
        records.append({k: v for k, v in record.items() if k.startswith(("top", "val_loss", "val_images"))})
    assert records[0]["val_images"] == 103 and len({records[0][f"top_1_{d}"] for d in (8, 16, 32, 64, 512)}) > 1
    alone, together = records
    for key, value in alone.items():      # counts are whole numbers over 103: equal to the last bit
        assert together[key] == value if not key.startswith("val_loss") else together[key] == pytest.approx(value)


@pytest.fixture
def make_trainer(monkeypatch, tmp_path):
    def make(*changes):
        monkeypatch.setattr(sys, "argv", kill_and_resume.command("a", tmp_path, "run", *changes)[1:])
        settings = train_imagenet.read_settings(train_imagenet.CONFIG, "")
        return Trainer(torch.device("cpu"), settings, train_imagenet.model_spec(settings), tmp_path)
    return make


@pytest.fixture
def trainer(make_trainer):
    return make_trainer("--model.nesting_list=4,8")


@pytest.mark.parametrize("arch, pixels, width", [
    ("resnet18", 32, 512), ("convnext_tiny", 32, 768), ("efficientnet_b0", 32, 1280), ("timm/test_vit", 48, 64)])
def test_any_classifier_learns(make_trainer, tmp_path, arch, pixels, width):
    """Steps on one batch bring its loss down; what is saved gives the trained model's numbers again."""
    trainer = make_trainer(f"--model.arch={arch}", "--training.label_smoothing=0")
    assert trainer.spec["nesting_list"][-1] == width
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (2, pixels, pixels, 3), dtype=torch.uint8, generator=generator)   # as FFCV gives them
    labels = torch.tensor([[0], [1]])
    trainer.model.eval()      # no dropout, so that the losses can be compared
    losses = [trainer.train_step(images, labels, 0.003).sum().item() for _ in range(3)]
    assert losses[-1] < losses[0]
    torch.save(trainer.model.state_dict(), tmp_path / "weights.pt")
    loaded = mrl_models.load_model(tmp_path / "weights.pt", arch, "mrl", trainer.spec["nesting_list"])
    _, _, mean, std = mrl_models.preparation(loaded.spec)
    torch.testing.assert_close((trainer.mean / 255).tolist(), list(mean))
    torch.testing.assert_close((trainer.std / 255).tolist(), list(std))
    x = normalise(images[:1], trainer.mean, trainer.std)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(x)[-1], trainer.model(x)[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", ["--model.mrl=1", "--model.efficient=1"])
def test_compiled_steps_are_the_same_steps(make_trainer, monkeypatch, head):
    """One whole graph for each resolution (none for a second step), and the losses of the model that is not compiled.

    The compiler's last stage, which writes C++, is left out: it takes minutes here.
    """
    graphs, compile = [], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **given: compile(
        self, backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True, **given))
    torch._dynamo.reset()
    trainers = [make_trainer("--model.mrl=0", head, f"--training.compile={on}") for on in (0, 1)]
    losses = [[], []]
    for pixels in (32, 32, 64):
        images = torch.randint(256, (4, pixels, pixels, 3), dtype=torch.uint8)
        for trainer, kept in zip(trainers, losses, strict=True):
            kept.append(trainer.train_step(images, torch.tensor([[0], [1], [0], [1]]), 0.01))
    torch.testing.assert_close(*map(torch.stack, losses), rtol=1e-4, atol=1e-4)
    assert len(graphs) == 2


def test_every_resolution_is_compiled(make_trainer, monkeypatch):
    """PyTorch gives up after eight graphs; a ramp of resolutions and validation's batches make more."""
    graphs, compile = [], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **given: compile(
        self, backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True, **given))
    torch._dynamo.reset()
    model = make_trainer("--training.compile=1", "--model.arch=alexnet").model.eval()
    with torch.inference_mode():
        for pixels in range(64, 73):
            model(torch.rand(1, 3, pixels, pixels))
    assert len(graphs) == 9


def test_a_run_that_diverged_ends_before_it_is_saved(trainer):
    trainer.check_weights()
    trainer.model.fc.nesting_classifier_1.weight.data[0, 0] = float("inf")
    for save_and_end in (trainer.check_weights, lambda: trainer.save_and_stop(signal.SIGTERM)):
        with pytest.raises(mrl_files.InputError, match=r"epoch 1: weights are NaN or infinite.* lower --lr.lr"):
            save_and_end()
    assert not list(trainer.folder.iterdir())


def use_fp16(patch, scale=2.0 ** 16):
    """Real fp16, with its loss scale, on the CPU."""
    patch.setattr("trainer.autocast", lambda *_: torch.autocast("cpu", torch.float16))
    real = torch.amp.GradScaler
    patch.setattr(torch.amp, "GradScaler", lambda device, enabled: real(device, scale))


def batch():
    return torch.randint(256, (4, 32, 32, 3), dtype=torch.uint8), torch.tensor([[0], [1], [0], [1]])


def accumulate(trainer):
    """Two batches to a step: the processes have gradients of their own until its last, and the same weights after."""
    weight = trainer.model.fc.nesting_classifier_0.weight
    trainer.train_step(*batch(), 0.01, 2, False)
    gradients = mrl_files.gather(weight.grad[0].sum().item())
    trainer.train_step(*batch(), 0.01, 2, True)
    weights = mrl_files.gather(weight[0].sum().item())
    assert gradients[0] != gradients[1] and weights[0] == weights[1]


def test_a_run_that_diverged_in_fp16_ends_too(make_trainer, monkeypatch):
    """GradScaler skips each step: the weights stay finite for ever. With BatchNorm its statistics show it, without the
    scale does."""
    use_fp16(monkeypatch)
    images, labels = batch()
    for arch, said in (("resnet18", "running statistics are NaN"), ("timm/test_vit", "the gradients of the last 26")):
        trainer = make_trainer(f"--model.arch={arch}", "--model.mrl=1")
        trainer.train_step(images, labels, 0.01)
        trainer.check_weights()
        (trainer.model.conv1 if arch == "resnet18" else trainer.model.patch_embed.proj).weight.data *= 1e6
        trainer.scaler.update(2.0 ** -9)      # as after 25 skipped steps
        for _ in range(2):
            trainer.train_step(images, labels, 0.01)
        assert all(p.isfinite().all() for p in trainer.model.parameters())
        with pytest.raises(mrl_files.InputError, match=f"epoch 1: {said}.*precision=bf16"):
            trainer.check_weights()


def test_what_diverged_in_one_of_two_processes_ends_both(tmp_path):
    """Validation is with the first one's running statistics alone; a second that ended by itself would leave it
    waiting. One line says why."""
    words = kill_and_resume.command("a", tmp_path, "run", "--training.distributed=1", "--dist.world_size=2",
                                    f"--dist.port={free_port()}")
    process = Forked(diverge, words[1:], tmp_path)
    _, said = process.communicate()
    assert process.returncode == 1 and (tmp_path / "finite").read_text() == "True", said
    assert said.count("error: epoch 1: running statistics are NaN or infinite") == 1 and "Traceback" not in said


def diverge(words, folder):
    sys.argv = words
    launch.spawn(diverge_in_the_second, train_imagenet.read_settings(train_imagenet.CONFIG, ""), folder)


def diverge_in_the_second(device, settings, folder):
    with pytest.MonkeyPatch.context() as patch:
        use_fp16(patch)
        trainer = Trainer(device, settings, train_imagenet.model_spec(settings), folder)
        accumulate(trainer)
        trainer.check_weights()
        if mrl_files.rank():
            trainer.model.conv1.weight.data *= 1e6
        for _ in range(2):
            trainer.train_step(*batch(), 0.01)
        if not mrl_files.rank():
            (folder / "finite").write_text(str(trainer.diverged() is None))
        trainer.check_weights()


def test_batches_that_share_a_step_are_one_batch(make_trainer):
    """Of a network without BatchNorm: the weights after two steps, the second step's batches being cut in three."""
    whole, shared = (make_trainer("--model.arch=convnext_tiny", "--training.momentum=0") for _ in range(2))
    images, labels = (part.repeat(3, *[1] * (part.dim() - 1))[:6] for part in batch())
    for trainer in (whole, shared):
        trainer.model.eval()      # no stochastic depth
        trainer.train_step(images, labels, 0.01)
    loss = whole.train_step(images, labels, 0.01)
    losses = [shared.train_step(images[i:i + 2], labels[i:i + 2], 0.01, 3, i == 4) for i in (0, 2, 4)]
    torch.testing.assert_close(torch.stack(losses).mean(0), loss)
    for one, other in zip(whole.model.parameters(), shared.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("half", [False, True])
def test_a_clipped_gradient_has_that_norm(make_trainer, monkeypatch, half):
    """In fp16 too, where the loss is scaled, and over both batches of a step."""
    if half:
        use_fp16(monkeypatch, 256.0)
    trainer = make_trainer("--training.clip_grad_norm=0.5", "--training.weight_decay=0")
    before = [p.detach().clone() for p in trainer.model.parameters()]
    for last in (False, True):
        trainer.train_step(*batch(), 0.1, 2, last)
    moved = [p.detach() - b for p, b in zip(trainer.model.parameters(), before, strict=True)]
    assert torch.cat([m.flatten() for m in moved]).norm().item() == pytest.approx(0.1 * 0.5, rel=1e-3)
    assert all(p.grad is None for p in trainer.model.parameters())


def test_an_overflow_in_one_of_a_steps_batches_skips_the_step(make_trainer, monkeypatch):
    use_fp16(monkeypatch, 256.0)
    trainer = make_trainer("--training.clip_grad_norm=0.5", "--training.ema=0.5", "--training.optimizer=adamw")
    before = trainer.model.fc.nesting_classifier_0.weight.detach().clone()
    trainer.train_step(*batch(), 0.1, 2, False)
    next(trainer.model.parameters()).grad[0] = torch.inf
    trainer.train_step(*batch(), 0.1, 2, True)
    assert torch.equal(trainer.model.fc.nesting_classifier_0.weight, before)
    assert trainer.scaler.get_scale() == 128 and trainer.parts["ema"].n_averaged == 0
    for last in (False, True):
        trainer.train_step(*batch(), 0.1, 2, last)
    assert trainer.parts["ema"].n_averaged == 1 and all(p.isfinite().all() for p in trainer.model.parameters())


def test_the_averages_head_is_its_own(make_trainer):
    """Both compute in float32 (classify_in_float32), each with its own weights."""
    trainer = make_trainer("--training.ema=0.5")
    trainer.model.fc.nesting_classifier_0.weight.data.zero_()
    logits = [mrl_models.compute_logits(model.eval(), torch.rand(2, 3, 32, 32))[0] for model in trainer.models.values()]
    bias = trainer.model.fc.nesting_classifier_0.bias.expand(2, 2)
    assert torch.equal(logits[0], bias) and not torch.allclose(logits[1], bias)


def test_tta_averages_the_mirrored_image(trainer):
    """The loss is that of the mean of both logits."""
    trainer.settings.validation.lr_tta = 1
    (images, labels), model = batch(), trainer.model.eval()
    x = normalise(images, trainer.mean, trainer.std)
    with torch.no_grad():
        mean = (model(x)[0] + model(x.flip(-1))[0]) / 2
    said = trainer.validate([(images, labels)])
    assert said["val_loss_4"] == pytest.approx(torch.nn.functional.cross_entropy(mean, labels.flatten()).item(), 1e-5)


def test_the_next_command_finds_a_folder_of_ones_own_and_images_of_its_size(tmp_path):
    def describe(val, pixels=256):
        return describe_images(SimpleNamespace(data=SimpleNamespace(val_dataset=val),
                                               validation=SimpleNamespace(resolution=pixels)))
    (tmp_path / "my pictures/val").mkdir(parents=True)
    assert describe(tmp_path / "my pictures/val") == f" --data_root '{tmp_path}/my pictures'"
    assert describe(tmp_path / "my pictures") == describe(tmp_path / "val.ffcv") == ""
    assert describe(tmp_path / "val.ffcv", 32) == " --crop 32"
    mrl_files.write_json(tmp_path / "val.ffcv.json", {"n": 1, "folder": str(tmp_path / "my pictures/val")})
    assert describe(tmp_path / "val.ffcv", 32) == f" --data_root '{tmp_path}/my pictures' --crop 32"
