"""A checkpoint becomes a folder to share, and every reader reads it back, equal to the bit."""
import json
import sys
from types import SimpleNamespace

import export
import pytest
import pytorch_inference
import safetensors.torch
import torch
from image_trees import make_run, make_tree
from saved_files import fingerprint

from mrl_files import InputError
from mrl_models import build_model, load_model

SMALL = ["--resize", "8", "--crop", "8", "--workers", "0", "--batch_size", "64", "--device", "cpu"]


@pytest.fixture
def command(monkeypatch, tmp_path):
    """command("--path", ...) -> the folder that export.py wrote in this process."""
    def start(*words, output=tmp_path / "shared"):
        monkeypatch.setattr("sys.argv", ["export.py", *map(str, words), "--output", str(output)])
        export.main()
        return output
    return start


@pytest.fixture
def evaluate(monkeypatch, tmp_path):
    """evaluate(path, "--tta") -> the JSON of its figures on 20 images of 10 classes."""
    make_tree(tmp_path / "data" / "val", [str(i) for i in range(10)], per_class=2)

    def start(path, *words):
        out = tmp_path / f"results{len(list(tmp_path.glob('results*')))}"
        monkeypatch.setattr("sys.argv", ["pytorch_inference.py", *SMALL, "--data_root", str(tmp_path / "data"),
                                         "--output", str(out), "--path", str(path), *words])
        pytorch_inference.main()
        return next(out.glob("*_accuracy_*.json"))
    return start


def assert_equal_to_the_bit(model, other):
    assert model.spec == other.spec and not other.training
    torch.testing.assert_close(dict(model.state_dict()), dict(other.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("head, arch", [("mrl", "resnet18"), ("mrl_e", "resnet18"), ("ff16", "mobilenet_v3_small")])
def test_the_round_trip_is_equal_to_the_bit(tmp_path, command, head, arch):
    path = make_run(tmp_path / "run", head, arch=arch)
    folder = command("--path", path)
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    trained = load_model(path)
    for place in (folder, str(folder), folder / "model.safetensors", path.parent):
        assert_equal_to_the_bit(trained, load_model(place))
    again = command("--path", folder, output=tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_released_files_are_exported_in_todays_layout(tmp_path, command):
    model = build_model("resnet18", "mrl_e", nesting_list=[16, 32, 64, 128, 256, 512])
    released = tmp_path / "Imagenet1k_R18_mrl_e_16start"
    released.mkdir()
    torch.save({f"module.{k.replace('nesting_classifier_0.', '')}": v for k, v in model.state_dict().items()},
               released / "final_weights.pt")
    assert_equal_to_the_bit(model.eval(), load_model(command("--path", released, "--old_ckpt")))


def test_figures_of_folder_and_checkpoint_are_equal(tmp_path, command, evaluate):
    path = make_run(tmp_path / "run")
    before = json.loads(evaluate(path).read_text())
    after = json.loads(evaluate(command("--path", path)).read_text())
    assert after["path"].endswith("shared/model.safetensors") and after["spec"] == before["spec"]
    for key in ("n", "top1", "top5", "loss"):
        assert after[key] == before[key]


def test_the_cards_table_has_the_measured_figures(tmp_path, command, evaluate, capsys):
    path = make_run(tmp_path / "run", nesting_list=[8, 512])
    figures = [evaluate(path), evaluate(path, "--tta")]
    runs = [json.loads(file.read_text()) for file in figures]
    figures.append(tmp_path / "of another.json")
    figures[-1].write_text(json.dumps(runs[0] | {"checkpoint": "0" * 16}))
    card = (command("--path", path, "--license", "mit", "--figures", *figures) / "README.md").read_text()
    row = " | ".join(f"{100 * run[top][1]:.2f}" for run in runs for top in ("top1", "top5"))
    assert "| size | V1 top-1 % | V1 top-5 % | V1 tta top-1 % | V1 tta top-5 % |\n| --- |" in card
    assert f"\n| 512 | {row} |\n" in card and "license: mit\n---\n# shared\n" in card
    assert "- V1: 20 images, the central 8 pixels of 8, fp32\n" in card and str(tmp_path) not in card
    assert "note: 1 of --figures left out" in capsys.readouterr().out
    without = (command("--path", path) / "README.md").read_text()
    assert "Not measured." in without and "license" not in without


def test_what_the_card_says_to_type_loads_the_model(tmp_path, command, monkeypatch):
    path = make_run(tmp_path / "run")
    card = (command("--path", path) / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    world = {}
    exec(card.split("```python\n")[1].split("```")[0], world)
    assert_equal_to_the_bit(load_model(path), world["model"])


class Hub:
    """Keeps what it is asked for; "owner/denied" is refused, as by a network or a missing token."""

    def __init__(self):
        self.asked = []

    def create_repo(self, name, exist_ok):
        self.asked.append((name, exist_ok))

    def upload_folder(self, repo_id, folder_path, allow_patterns):
        if repo_id == "owner/denied":
            raise ConnectionError("401 Unauthorized\nwith more lines")
        self.asked.append((repo_id, folder_path, allow_patterns))


def test_push_uploads_the_three_files(tmp_path, command, monkeypatch, capsys):
    hub, path = Hub(), make_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(HfApi=lambda: hub))
    folder = command("--path", path, "--push", "owner/mrl-r18")
    assert hub.asked == [("owner/mrl-r18", True), ("owner/mrl-r18", str(folder), list(export.FILES))]
    assert "pushed to owner/mrl-r18" in capsys.readouterr().out
    assert 'load_model(snapshot_download("owner/mrl-r18"))' in (folder / "README.md").read_text()
    with pytest.raises(InputError, match=r"^--push owner/denied: 401 Unauthorized \(the folder .* is complete\)$"):
        command("--path", path, "--push", "owner/denied")


def test_missing_packages_are_named_before_any_work(tmp_path, command, monkeypatch):
    path = make_run(tmp_path / "run")
    folder = command("--path", path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"^--push needs a package: pip install huggingface_hub$"):
        command("--path", path, "--push", "owner/name", output=tmp_path / "other")
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"^export.py needs a package: pip install safetensors$"):
        command("--path", path, output=tmp_path / "other")
    with pytest.raises(InputError, match=r"shared/model.safetensors: reading it needs a package: pip install safetens"):
        load_model(folder)
    assert not (tmp_path / "other").exists()


def test_the_size_of_the_runs_images_goes_along(tmp_path, command, evaluate, capsys):
    path = make_run(tmp_path / "run")
    about = path.with_name("params.json")
    about.write_text(json.dumps(json.loads(about.read_text()) | {"settings": {"validation": {"resolution": 32}}}))
    evaluate(command("--path", path))
    assert "trained for images of 32 pixels, here they have 8" in capsys.readouterr().err


def test_rep_size_is_not_of_an_export(tmp_path, command):
    path = make_run(tmp_path / "run")
    with pytest.raises(InputError, match="--rep_size 16: all sizes of"):
        command("--path", path, "--rep_size", "16")


def test_what_is_there_is_replaced_only_when_asked(tmp_path, command):
    path, other = make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=1)
    folder = command("--path", path)
    command("--path", path)                                   # the same checkpoint: the card may have new figures
    with pytest.raises(InputError, match=r"config.json says .* --overwrite"):
        command("--path", other)
    assert_equal_to_the_bit(load_model(path), load_model(folder))
    assert_equal_to_the_bit(load_model(other), load_model(command("--path", other, "--overwrite")))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("notes")
    with pytest.raises(InputError, match=r"mine/README.md: nothing beside it"):
        command("--path", path, output=tmp_path / "mine")


@pytest.mark.parametrize("change, message", [
    (lambda run: run | {"checkpoint": "0" * 16}, "of another checkpoint or other sizes"),
    (lambda run: run | {"nesting_list": [8]}, "of another checkpoint or other sizes"),
    (lambda run: {"sizes": [8]}, "not the figures of pytorch_inference.py"),
    (lambda run: None, "no such file"),
])
def test_figures_that_do_not_belong(tmp_path, command, change, message):
    path = make_run(tmp_path / "run")
    run = {"checkpoint": fingerprint(path), "nesting_list": load_model(path).spec["nesting_list"], "dataset": "V1",
           "n": 1, "top1": [], "top5": [], "tta": False, "precision": "fp32", "resize": 8, "crop": 8}
    if content := change(run):
        (tmp_path / "figures.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"^--figures .*figures.json: {message}"):
        command("--path", path, "--figures", tmp_path / "figures.json")


def test_other_bad_input(tmp_path, command):
    path = make_run(tmp_path / "run")
    with pytest.raises(InputError, match=r"^--push name: give owner/name$"):
        command("--path", path, "--push", "name")
    with pytest.raises(InputError, match=r"this folder has no model.safetensors and no final_weights.pt"):
        command("--path", tmp_path)
    folder = command("--path", path)
    whole = (folder / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match=r"head=ff8 was asked for, config.json beside it says mrl"):
        load_model(folder, head="ff8")
    (folder / "model.safetensors").rename(folder / "weights.pt")
    with pytest.raises(InputError, match=r"weights.pt: is a safetensors file: give it a name that ends in"):
        load_model(folder / "weights.pt", arch="resnet18")
    for content, message in ((whole[:-1000], r"not a complete safetensors file"), (b"<!DOCTYPE html>", "a web page")):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(InputError, match=rf"model.safetensors: .*{message}"):
            load_model(folder)


@pytest.mark.parametrize("arch, head", [("resnet18", "mrl"), ("mobilenet_v3_small", "ff16")])
def test_safetensors_of_others_load_by_flags_and_shapes(tmp_path, arch, head):
    """Without a JSON, wrapped as DDP does, in half precision. Such files do not keep the order of the tensors."""
    model = build_model(arch, head, num_classes=4)
    state = {f"module.{k}": v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "weights.safetensors")
    loaded = load_model(tmp_path / "weights.safetensors", arch=arch)
    assert loaded.spec == model.spec
    half = {k: v.half().float() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    torch.testing.assert_close(dict(loaded.state_dict()), half, rtol=0, atol=0)
