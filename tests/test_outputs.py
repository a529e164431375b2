"""Files of inference's contract, and of the original's, are read; what does not belong together is refused."""
import json

import numpy as np
import outputs
import pytest
import pytorch_inference
import torch

from mrl_files import InputError

G, N, C = 3, 20, 7
MRL_V1 = "mrl=True_efficient=False_ff=32_dataset=V1_tta=True"


def save(folder, stem, array, **about):
    """A file as inference leaves it; about: the .json beside it, none if empty."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{stem}.pth"
    torch.save(torch.from_numpy(np.ascontiguousarray(array)), path)
    if about:
        path.with_suffix(".json").write_text(json.dumps(about))
    return path


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    softmax = rng.dirichlet(np.ones(C), (G, N)).astype(np.float32)
    return softmax, rng.integers(0, C, N)


@pytest.fixture
def folder(tmp_path, arrays):
    """One MRL run on V1, as our inference saves it."""
    softmax, gt = arrays
    about = {"checkpoint": "c0ffee", "nesting_list": [8, 16, 32], "dataset": "V1", "tta": True, "n": N,
             "num_classes": C, "classes": [f"class {i}" for i in range(C)], "images": "1234"}
    save(tmp_path, f"{MRL_V1}_softmax", softmax, **about)
    save(tmp_path, f"{MRL_V1}_predictions", softmax.argmax(-1), **about)
    save(tmp_path, "gt_dataset=V1", gt, dataset="V1", images="1234")
    return tmp_path


def change(path, **about):
    path.write_text(json.dumps(json.loads(path.read_text()) | about))


# ------------------------------------------------------------------------------------------------ reading

def test_softmax_of_a_run_is_mapped_not_copied(folder, arrays):
    softmax, gt, info = outputs.read(folder, "softmax", "mrl", "V1", tta=True)
    assert np.array_equal(softmax, arrays[0]) and softmax.dtype == np.float32
    assert np.array_equal(gt, arrays[1]) and gt.dtype == np.int64
    assert info == {"head": "mrl", "dataset": "V1", "tta": True, "nesting_list": [8, 16, 32], "num_classes": C,
                    "classes": [f"class {i}" for i in range(C)], "checkpoint": "c0ffee", "images": "1234"}
    with open("/proc/self/maps") as maps:
        assert f"{MRL_V1}_softmax.pth" in maps.read()


def test_predictions_and_the_case_of_the_set(folder, arrays):
    predictions, _, info = outputs.read(folder, "predictions", "mrl", "v1", tta=True)
    assert np.array_equal(predictions, arrays[0].argmax(-1)) and predictions.dtype == np.int64
    assert info["num_classes"] == C


@pytest.mark.parametrize("stem, head", [
    ("mrl=True_efficient=False_dataset=V1_tta=True_softmax", "mrl"),
    ("mrl=1_efficient=0_dataset=V1_tta=1_softmax", "mrl"),
    ("mrl=True_efficient=True_dataset=V1_tta=True_softmax", "mrl_e"),
])
def test_the_originals_names(tmp_path, arrays, stem, head):
    """No .json: the sizes double up to the one in the name, 2048 where there is none."""
    save(tmp_path, stem, arrays[0])
    save(tmp_path, "gt_dataset=V1", arrays[1])
    softmax, gt, info = outputs.read(tmp_path, "softmax", head, "V1", tta=True)
    assert softmax.shape == (G, N, C) and gt.shape == (N,)
    assert info["nesting_list"] == [512, 1024, 2048] and info["num_classes"] == C and info["checkpoint"] is None


def test_the_originals_fixed_feature_shapes(tmp_path, arrays):
    """No axis of sizes, no size in the name, labels as floats [N, 1], the set in lower case."""
    stem = "mrl=False_efficient=False_dataset=sketch_tta=False"
    save(tmp_path, f"{stem}_softmax", arrays[0][0])
    save(tmp_path, f"{stem}_predictions", arrays[0][0].argmax(-1))
    save(tmp_path, "gt_dataset=sketch", arrays[1].astype(np.float32)[:, None])
    softmax, gt, info = outputs.read(tmp_path, "softmax", "ff64", "Sketch")
    assert softmax.shape == (1, N, C) and np.array_equal(gt, arrays[1]) and info["nesting_list"] == [64]
    assert outputs.read(tmp_path, "predictions", "ff64", "Sketch")[0].shape == (1, N)


def test_fixed_feature_sizes_are_told_apart(folder, arrays):
    for size in (8, 16):
        save(folder, f"mrl=False_efficient=False_ff={size}_dataset=V1_tta=True_softmax", arrays[0][:1] / size)
    assert np.array_equal(outputs.read(folder, "softmax", "ff16", "V1", True)[0], arrays[0][:1] / 16)


# ------------------------------------------------------------------------------------------------ refusals

def refusal(*args, **options):
    with pytest.raises(InputError) as raised:
        outputs.read(*args, **options)
    message = str(raised.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("head, flags", [("mrl", "--mrl"), ("mrl_e", "--mrl --efficient"), ("ff256", "--rep_size 256")])
def test_a_missing_file_names_the_command_that_makes_it(tmp_path, head, flags):
    command = f"pytorch_inference.py --path <final_weights.pt> {flags} --dataset V2 --tta --save_softmax --save_gt"
    assert command in refusal(tmp_path, "softmax", head, "V2", tta=True)


def test_the_command_it_names_is_accepted(monkeypatch):
    command = outputs.inference_command({"head": "mrl_e", "dataset": "V1", "tta": True, "kind": "softmax"})
    monkeypatch.setattr("sys.argv", command.split()[4:])
    args = pytorch_inference.parse_arguments()
    assert args.mrl and args.efficient and args.tta and args.save_softmax and args.save_gt and args.dataset == "V1"


def test_predictions_without_softmax(folder):
    (folder / f"{MRL_V1}_softmax.pth").unlink()
    message = refusal(folder, "softmax", "mrl", "V1", tta=True)
    assert "no softmax of mrl" in message and f"{MRL_V1}_predictions.pth" in message


def test_other_augmentation_is_not_taken(folder):
    assert "tta=False" in refusal(folder, "softmax", "mrl", "V1", tta=False)


def test_no_true_classes(folder):
    (folder / "gt_dataset=V1.pth").unlink()
    assert "gt_dataset=V1.pth" in refusal(folder, "softmax", "mrl", "V1", tta=True)


def test_no_folder(tmp_path):
    assert "no such folder" in refusal(tmp_path / "nowhere", "softmax")


def test_true_classes_of_a_run_with_other_images(folder, arrays):
    save(folder, "gt_dataset=V1", arrays[1][:-1])
    assert f"has {N} images, the true classes beside it {N - 1}" in refusal(folder, "softmax", "mrl", "V1", True)


def test_as_many_but_other_images(folder):
    change(folder / "gt_dataset=V1.json", images="5678")
    assert "different images" in refusal(folder, "softmax", "mrl", "V1", True)


@pytest.mark.parametrize("about, words", [({"nesting_list": [8, 16]}, "holds 3 sizes"),
                                          ({"num_classes": 8}, "has 7 classes")])
def test_description_that_does_not_fit(folder, about, words):
    change(folder / f"{MRL_V1}_softmax.json", **about)
    assert words in refusal(folder, "softmax", "mrl", "V1", True)


def test_class_beyond_the_models(folder, arrays):
    save(folder, "gt_dataset=V1", np.where(arrays[1] == 3, C, arrays[1]))
    assert f"class {C} is beyond the {C} classes" in refusal(folder, "softmax", "mrl", "V1", True)
    assert f"class {C} is beyond the {C} classes" in refusal(folder, "predictions", "mrl", "V1", True)


def test_labels_that_are_no_classes(folder):
    save(folder, "gt_dataset=V1", np.full(N, 0.5))
    assert "labels must be whole numbers" in refusal(folder, "softmax", "mrl", "V1", True)


@pytest.mark.parametrize("shape", [(N,), (2, 2, N, C), (G, 0, C)])
def test_wrong_shape(folder, shape):
    save(folder, f"{MRL_V1}_softmax", np.ones(shape, np.float32))
    assert "expected [G, N, C]" in refusal(folder, "softmax", "mrl", "V1", True)


@pytest.mark.parametrize("shape", [(N, 2), (0,)])
def test_labels_of_wrong_shape(folder, shape):
    save(folder, "gt_dataset=V1", np.ones(shape, int))
    assert "expected [N] with N > 0" in refusal(folder, "softmax", "mrl", "V1", True)


def test_truncated_or_foreign_file(folder):
    path = folder / f"{MRL_V1}_softmax.pth"
    path.write_bytes(path.read_bytes()[:500])
    assert "truncated" in refusal(folder, "softmax", "mrl", "V1", True)
    torch.save({"softmax": torch.ones(2)}, path)
    assert "not a saved tensor" in refusal(folder, "softmax", "mrl", "V1", True)


def test_broken_description(folder):
    (folder / f"{MRL_V1}_softmax.json").write_text("{")
    assert "not a JSON file" in refusal(folder, "softmax", "mrl", "V1", True)


def test_two_files_that_fit(folder, arrays):
    save(folder, f"{MRL_V1.replace('ff=32', 'ff=64')}_softmax", arrays[0])
    assert "several files fit" in refusal(folder, "softmax", "mrl", "V1", True)


def test_files_of_different_models(folder):
    *_, info = outputs.read(folder, "softmax", "mrl", "V1", True)
    outputs.same_run(info, info | {"dataset": "V2"}, info | {"checkpoint": None})
    with pytest.raises(InputError, match="different checkpoints"):
        outputs.same_run(info, info | {"dataset": "V2", "checkpoint": "badcafe"})
    with pytest.raises(InputError, match="different models"):
        outputs.same_run(info, info | {"dataset": "V2", "nesting_list": [16, 32]})
