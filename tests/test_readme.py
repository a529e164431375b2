"""What the documents tell people to type: the code blocks run, and every flag and file they name exists."""
import re

import numpy as np
import pytest
import torch
from conftest import ROOT
from epoch_log import append_log
from image_set import Preparation
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from MRL import NESTING_LIST, truncate
from mrl_models import build_model

DOCUMENTS = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")})
SCRIPTS = {path.name: path for folder in ("train", "inference", "retrieval", "model_analysis", "imagenet-4k", "demo",
                                          "benchmarks") for path in (ROOT / folder).glob("*.py")}


def blocks(text, language=""):
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", text, re.M | re.S)


def python_blocks(document, heading):
    """-> the Python blocks of one section of a document."""
    return blocks((ROOT / document).read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0], "python")


def test_use_it_from_other_code(tmp_path, monkeypatch):
    """The layer in a training loop, a model's embeddings and their vectors for a database, one after the other, on a
    tiny loader and a tiny checkpoint."""
    (loop,) = python_blocks("README.md", "The layer and the loss in your own code")
    load, _ = python_blocks("inference/README.md", "Use a model from other code")
    (cut,) = python_blocks("retrieval/README.md", "Other vector databases")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    x, y = torch.randn(40, 3, 32, 32), torch.arange(40) % 10
    world = {"loader": DataLoader(TensorDataset(x, y), batch_size=8)}
    exec(loop, world)
    with torch.no_grad():
        outputs = world["head"](world["backbone"](x))
    assert [tuple(logits.shape) for logits in outputs] == [(40, 10)] * 4
    before = world["loss"](outputs, y).item()
    exec(loop.split("optimizer = ")[0].split("backbone = ")[0] + "for images, labels in loader:"
         + loop.split("for images, labels in loader:")[1], world)
    with torch.no_grad():
        assert world["loss"](world["head"](world["backbone"](x)), y).item() < before

    model = build_model("resnet18", "mrl", num_classes=4, blurpool=False)
    torch.save(model.state_dict(), "final_weights.pt")
    bare = load.replace('"final_weights.pt")', '"final_weights.pt", arch="resnet18", head="mrl")')
    assert bare != load
    pixels = np.random.default_rng(0).integers(0, 256, (2, 300, 280), np.uint8)
    world["pictures"] = [Image.fromarray(grey) for grey in pixels]
    exec(bare, world)
    as_inference_does = Preparation(256, 224)(world["pictures"][0].convert("RGB"))
    torch.testing.assert_close(world["images"][0], as_inference_does)
    assert world["features"].shape == (2, 512)
    assert torch.equal(world["features"], model.eval().to(torch.float32)._modules["avgpool"](
        torch.nn.Sequential(*list(model.children())[:-2])(world["images"])).flatten(1))
    exec(cut, world)
    assert world["vectors"].shape == (2, 64)
    assert (world["vectors"] ** 2).sum(1) == pytest.approx(1)


def test_losses_of_embeddings():
    """The contrastive and the triplet loss teach a layer to bring the pairs together, at every size."""
    (code,) = python_blocks("train/README.md", "Other losses of embeddings")
    torch.manual_seed(0)
    pictures, layer = torch.randn(40, 64), torch.nn.Linear(64, 64)
    texts, others = pictures @ torch.randn(64, 64) / 8, torch.randn(40, 64)
    optimizer, losses = torch.optim.Adam(layer.parameters(), 0.01), []
    for _ in range(60):
        world = {"image_features": pictures, "text_features": layer(texts), "anchors": pictures,
                 "positives": layer(texts), "negatives": others}
        exec(code, world)
        optimizer.zero_grad()
        world["loss"].backward()
        optimizer.step()
        losses.append(world["loss"].item())
    assert losses[-1] < losses[0] / 4
    for size in (8, 64):
        closest = (truncate(pictures, size) @ truncate(layer(texts), size).T).argmax(1)
        assert (closest == torch.arange(40)).float().mean() > 0.8


def test_a_picture_of_a_run(tmp_path, monkeypatch):
    """Its lines are the sizes, its points the epochs that were validated."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "trainlogs/<uuid>"
    run.mkdir(parents=True)
    for epoch in range(3):
        validated = {"top_1_8": 0.1 * epoch, "top_1_16": 0.2 * epoch, "top_5_8": 1.0} if epoch != 1 else {}
        append_log(run, {"epoch": epoch, "train_loss": 1.0, **validated})
    world = {}
    exec(python_blocks("train/README.md", "Train")[0], world)
    lines = {line.get_label(): line for line in world["axes"].lines}
    assert list(lines) == ["top_1_8", "top_1_16"]
    assert lines["top_1_16"].get_xdata().tolist() == [1, 3] and lines["top_1_16"].get_marker() == "."
    assert lines["top_1_16"].get_ydata() == pytest.approx([0, 40])
    with Image.open("accuracy.png") as picture:
        assert picture.size == (640, 480)


def test_released_weights_load_as_the_documents_say(tmp_path, monkeypatch):
    """Files with the names and the layout of the authors'."""
    monkeypatch.chdir(tmp_path)
    for head, name in (("mrl", "r50_mrl1_e0_ff2048"), ("mrl_e", "r50_mrl1_e1_ff2048"), ("ff256", "r50_mrl0_e0_ff256")):
        state = build_model("resnet50", head).state_dict()
        old = {k.replace(".nesting_classifier_0", "") if head == "mrl_e" else k: v for k, v in state.items()}
        torch.save({f"module.{k}": v for k, v in old.items()}, f"{name}.pt")
    world = {}
    exec(python_blocks("inference/README.md", "Use a model from other code")[1], world)
    assert [world[name].spec["head"] for name in ("mrl", "mrl_e", "ff256")] == ["mrl", "mrl_e", "ff256"]
    assert world["mrl"].spec["nesting_list"] == world["mrl_e"].spec["nesting_list"] == NESTING_LIST


def commands():
    """(document, script, flags) of each command in a code block or in `code`."""
    for document in DOCUMENTS:
        text = with_variables(document.read_text())
        for code in [*blocks(text, r"\w*"), *re.findall(r"`([^`\n]+)`", text)]:
            for line in re.sub(r"\\\n", " ", code).splitlines():
                for name, rest in re.findall(r"(?:python|torchrun)\b.*?([\w/]+\.py)(.*)", line):
                    yield document, name.split("/")[-1], set(re.findall(r"--([a-z_][\w.-]*)", rest))


def with_variables(text):
    """A document whose commands have what its COMMON="..." holds in place of $COMMON."""
    for name, value in re.findall(r'^ *(?:export )?([A-Z]+)="([^"]*)"', text, re.M):
        text = text.replace(f"${name}", value)
    return text


def test_every_command_of_the_documents_has_a_script_and_its_flags(run_here):
    wanted = {}
    for document, name, flags in commands():
        assert name in SCRIPTS or (ROOT / "tests" / name).exists(), f"{document.name} names {name}"
        wanted.setdefault(name, set()).update(flags)
    assert {"train_imagenet.py", "pytorch_inference.py", "retrieve.py", "baselines.py"} <= wanted.keys()
    for name, flags in wanted.items():
        path = SCRIPTS.get(name, ROOT / "tests" / name)
        text = "" if any("." in flag for flag in flags) else path.read_text()
        for flag in flags - {"config-file", "help"}:
            written = rf"(--|\s){re.escape(flag)}\b" if "." in flag else rf"--{flag}\b"
            if not re.search(written, text):      # a setting of fastargs, or made up of parts in the source
                text += run_here(path.parent.relative_to(ROOT), f"{name} --help").stdout
            assert re.search(written, text), f"{name} has no --{flag}"


def test_links_lead_somewhere():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", document.read_text()):
            target, _, anchor = (target[0] or target[1]).partition("#")
            if not target.startswith("http"):
                page = document.parent / target if target else document
                assert page.exists(), f"{document.name}: {target}"
                assert not anchor or anchor in anchors(page.read_text()), f"{document.name}: {target}#{anchor}"


def anchors(text):
    """-> the names that GitHub gives to a document's headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 220
