"""The four notebooks of model_analysis/, from the first cell to the last, on files made by our own inference.

The models are random and each image has one colour: two tiny trees, one of ten classes of our own (as the demo's), one
with the folder names of ImageNet and ImageNet-A.
"""
import nbformat
import pytest
import superclass
import torch
from conftest import ROOT
from eval_sets import read_synsets
from image_trees import make_run, make_tree
from nbclient.exceptions import CellExecutionError

FOLDER = ROOT / "model_analysis"
NOTEBOOKS = ["Model_Cascades", "Oracle_Upper_Bound_Performance", "Custom_SuperClass_Performance", "GradCAM"]
PREPARED = "--resize 32 --crop 32 --workers 0"


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Ten classes of our own: -> (folder of images and run, the checkpoint)."""
    folder = tmp_path_factory.mktemp("own")
    make_tree(folder / "val", [f"class_{i:02}" for i in range(10)], per_class=6)
    return folder, make_run(folder / "run")


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """ImageNet's 1,000 classes and ImageNet-A's 200, an image each: -> (folder of images and run, the checkpoint)."""
    folder = tmp_path_factory.mktemp("imagenet")
    make_tree(folder / "val", superclass.classes())
    make_tree(folder / "imagenet-a", read_synsets("imagenet_a_synsets.txt"))
    return folder, make_run(folder / "run", num_classes=1000, arch="shufflenet_v2_x0_5")


@pytest.fixture
def execute(notebook, tmp_path):
    """execute("Model_Cascades", tta=False) -> all text that the notebook shows; its figures go to tmp_path."""
    def start(name, **settings):
        shown = notebook(f"model_analysis/{name}", **settings, figures=str(tmp_path))
        assert not [output for output in shown if "Warning" in output.get("text", "")]
        return "\n".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in shown)
    return start


def settings_of(notebook):
    return next(cell for cell in notebook.cells if cell.cell_type == "code")


# ------------------------------------------------------------------------------------------------ as they lie there

@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_short_and_clean(name):
    """Settings first, no functions, nothing stored, no path of one machine."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", 4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert settings_of(notebook).metadata.tags == ["parameters"]
    assert [cell for cell in code if cell.outputs or cell.execution_count] == []
    source = "\n".join(cell.source for cell in code)
    assert "def " not in source and "/home/" not in source and "import *" not in source
    assert max(len(cell.source.splitlines()) for cell in code) <= 25


# ------------------------------------------------------------------------------------------------ executed

def test_cascades_on_own_classes(own, run_here, execute, tmp_path):
    folder, checkpoint = own
    run_here("inference", f"pytorch_inference.py --path {checkpoint} --data_root {folder} --output {tmp_path} "
                          f"--save_softmax --save_gt {PREPARED}")
    shown = execute("Model_Cascades", folder=str(tmp_path), tta=False, seeds=3, fraction=0.5)
    assert "60 images, 10 classes, sizes [8, 16, 32, 64, 128, 256, 512]" in shown and "paper" not in shown
    assert (tmp_path / "cascades.png").stat().st_size > 10_000


def leave_out(classes, folder):
    """Of the files that inference saved on V1, keep the images of the other classes."""
    gt_path = folder / "gt_dataset=V1.pth"
    gt = torch.load(gt_path)
    kept = ~torch.isin(gt, torch.as_tensor(classes))
    torch.save(gt[kept], gt_path)
    for path in [*folder.glob("*=V1_*softmax.pth"), *folder.glob("*=V1_*predictions.pth")]:
        torch.save(torch.load(path)[:, kept].contiguous(), path)


def test_imagenets_classes(imagenet, run_here, execute, tmp_path):
    """Superclasses on V1, the oracle on V1 and A, a cascade that is tuned on another set than it is evaluated on.

    V1 is a part of ImageNet here, without snakes: they are left out and counted.
    """
    folder, checkpoint = imagenet
    for dataset in ("V1", "A"):
        run_here("inference", f"pytorch_inference.py --path {checkpoint} --data_root {folder} --output {tmp_path} "
                              f"--dataset {dataset} --tta --save_softmax --save_predictions --save_gt {PREPARED}")
    leave_out(superclass.members("n01726692"), tmp_path)
    shown = execute("Custom_SuperClass_Performance", folder=str(tmp_path))
    assert "1 of 30 superclasses have no image" in shown and "snake (" not in shown and "nan" not in shown.lower()
    assert "30 superclasses cover 467 classes" in shown and "n02159955" in shown
    assert (tmp_path / "superclass.png").exists() and (tmp_path / "superclass_confusion.png").exists()

    shown = execute("Oracle_Upper_Bound_Performance", folder=str(tmp_path), datasets=["V1", "A"])
    assert "17 of 1000 classes have no image and are left out" in shown
    assert "top-1 at 1024 (%)" in shown and "no clear trend" in shown and "All sizes agree on" in shown
    assert (tmp_path / "oracle.png").stat().st_size > 10_000 and (tmp_path / "classes.png").exists()

    shown = execute("Model_Cascades", folder=str(tmp_path), tune_dataset="A")
    assert "983 images, 1000 classes" in shown and "76.56" in shown         # the paper's table beside ours


def test_gradcam(own, execute, tmp_path):
    folder, checkpoint = own
    shown = execute("GradCAM", checkpoint=str(checkpoint), images=str(folder / "val"), target="true", rows=2,
                    classes=str(folder / "val"), limit=10, columns=[8, 512], resize=32, crop=32, layer="layer2")
    assert "mrl resnet18, sizes [8, 16, 32, 64, 128, 256, 512]; 10 images, maps of 4 x 4" in shown
    assert "top-1 (%)" in shown and "class_0" in shown
    assert (tmp_path / "gradcam.png").stat().st_size > 10_000


def test_without_files_it_says_what_to_run(execute, tmp_path):
    with pytest.raises(CellExecutionError, match=r"pytorch_inference.py .*--save_softmax --save_gt"):
        execute("Model_Cascades", folder=str(tmp_path))
