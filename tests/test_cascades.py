"""Cascades against the golden numbers, plain loops, and cases small enough to follow by hand."""
import json

import cascades
import numpy as np
import pytest
import torch

from MRL import NESTING_LIST
from mrl_files import InputError


def golden_world():
    """-> softmax [9, 3000, 40], gt [3000], as tests/golden/README.md describes."""
    r = np.random.default_rng(31)
    gt = r.integers(0, 40, 3000)
    hard = r.gamma(2.0, 1.0, 3000)
    softmax = np.empty((9, 3000, 40), np.float32)
    for g in range(9):
        z = r.standard_normal((3000, 40))
        z[np.arange(3000), gt] += (1.2 + 1.6 * np.log1p(g)) * 1.6 / (0.5 + hard)
        e = np.exp(1.8 * z)
        softmax[g] = e / e.sum(1, keepdims=True)
    return softmax, gt


@pytest.fixture(scope="module")
def world():
    return golden_world()


# ------------------------------------------------------------------------------------------------ golden

def test_golden_cascade(world, golden):
    softmax, gt = world
    expected, _ = golden("analysis")
    tune = cascades.hold_out(len(gt), 0.2, seed=1)                            # the golden tuning set
    thresholds = cascades.learn_thresholds(softmax[:, tune], gt[tune])
    accuracy, size = cascades.evaluate(softmax[:, ~tune], gt[~tune], thresholds, NESTING_LIST)
    assert thresholds.tolist() == expected["cascade"]["thresholds"]
    assert accuracy.tolist() == expected["cascade"]["accuracy_by_cap"]
    total = 2400 * np.array(expected["cascade"]["expected_size_by_cap"])      # a whole number of dimensions
    assert np.abs(total - total.round()).max() < 1e-6 and np.array_equal(size, total.round() / 2400)


def test_golden_draw_is_the_seeds(golden, world):
    """`repeat` is hold_out + best_thresholds + outcome for each seed; seed 1 is the golden one."""
    conf, correct = cascades.confidence(*world)
    results = cascades.repeat(conf, correct, NESTING_LIST, fraction=0.2, seeds=3)
    expected, _ = golden("analysis")
    assert results["accuracy"].shape == (3, 8)
    assert results["accuracy"][1].tolist() == expected["cascade"]["accuracy_by_cap"]
    assert results["thresholds"][1].tolist() == expected["cascade"]["thresholds"]
    assert not np.array_equal(results["thresholds"][0], results["thresholds"][1])


def test_tensors_are_arrays_too(world):
    softmax, gt = world
    few = slice(0, 300)
    from_tensors = cascades.learn_thresholds(torch.from_numpy(softmax[:, few]), torch.from_numpy(gt[few]))
    assert np.array_equal(from_tensors, cascades.learn_thresholds(softmax[:, few], gt[few]))


# ------------------------------------------------------------------------------------------------ plain loops

@pytest.mark.parametrize("seed", range(5))
def test_thresholds_against_trying_each(seed):
    """Few images, many ties; confidences on the grid itself, where > and >= differ."""
    rng = np.random.default_rng(seed)
    conf = np.where(rng.random((4, 30)) < 0.5, rng.choice(cascades.GRID, (4, 30)), rng.random((4, 30)))
    correct = rng.random((4, 30)) < 0.6
    for pair, threshold in enumerate(cascades.best_thresholds(conf, correct)):
        right = [np.where(conf[pair] > t, correct[pair], correct[pair + 1]).sum() for t in cascades.GRID]
        assert threshold == cascades.GRID[right.index(max(right))]


def test_outcome_against_one_image_at_a_time():
    rng = np.random.default_rng(3)
    conf, correct = rng.random((4, 50)), rng.random((4, 50)) < 0.6
    thresholds, sizes = [0.7, 0.5, 0.3], [2, 4, 8, 100]
    result = cascades.outcome(conf, correct, thresholds, sizes)
    for cap in (1, 2, 3):
        answers = [next((g for g in range(cap) if conf[g, i] > thresholds[g]), cap) for i in range(50)]
        assert result["accuracy"][cap - 1] == np.mean([correct[g, i] for i, g in enumerate(answers)])
        assert result["expected_size"][cap - 1] == np.mean([sizes[g] for g in answers])
        assert result["touched_size"][cap - 1] == np.mean([sum(sizes[:g + 1]) for g in answers])


def test_four_images_by_hand():
    """Sizes 8 and 16. The confidences at 8 are .9, .8, .5, .55, with wrong answers on images 1 and 2; at 16 all but
    image 0 are right. Above 0.5 are all but image 2, which moves on and is right; above 0.85 is image 0 alone."""
    softmax = np.array([[[.9, .1], [.8, .2], [.5, .5], [.45, .55]], [[.4, .6], [.3, .7], [.2, .8], [.1, .9]]])
    gt = np.array([0, 1, 1, 1])
    assert [x.tolist() for x in cascades.evaluate(softmax, gt, [0.5], [8, 16])] == [[0.75], [(3 * 8 + 16) / 4]]
    assert [x.tolist() for x in cascades.evaluate(softmax, gt, [0.85], [8, 16])] == [[1.0], [(8 + 3 * 16) / 4]]
    assert cascades.outcome(*cascades.confidence(softmax, gt), [0.85], [8, 16])["touched_size"] == [(8 + 3 * 24) / 4]
    # Every t from .8 up to .9 is right on all four images; the smallest candidate of these is taken.
    assert cascades.learn_thresholds(softmax, gt) == cascades.GRID[cascades.GRID >= 0.8][:1]


def test_hold_out_is_seeded_and_of_the_size_asked():
    a, b, c = (cascades.hold_out(50_000, 0.2, seed) for seed in (0, 0, 1))
    assert a.sum() == c.sum() == 10_000 and np.array_equal(a, b) and not np.array_equal(a, c)
    assert cascades.hold_out(7, 1, 0).all()


# ------------------------------------------------------------------------------------------------ refusals

@pytest.mark.parametrize("call, words", [
    (lambda s, y: cascades.learn_thresholds(s[:1], y), "two sizes or more"),
    (lambda s, y: cascades.learn_thresholds(s, y[:-1]), r"\[G, N, C\] and \[N\]"),
    (lambda s, y: cascades.learn_thresholds(np.log(s), y), "other numbers than probabilities"),
    (lambda s, y: cascades.learn_thresholds(s * np.nan, y), "other numbers than probabilities"),
    (lambda s, y: cascades.evaluate(s, y, [0.5], [8, 16, 32]), "2 thresholds"),
    (lambda s, y: cascades.evaluate(s, y, [0.5, 0.5], [8, 16]), "3 entries of nesting_list"),
    (lambda s, y: cascades.repeat(*cascades.confidence(s, y), [8, 16, 32], fraction=1), "no image is left"),
    (lambda s, y: cascades.hold_out(10, 0, 0), "is 0 images"),
    (lambda s, y: cascades.hold_out(10, 1.5, 0), "is 15 images"),
])
def test_refusals(call, words):
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match=words):
        call(rng.dirichlet(np.ones(5), (3, 12)), rng.integers(0, 5, 12))


# ------------------------------------------------------------------------------------------------ command line

@pytest.fixture
def saved(tmp_path, world):
    """Softmax of the golden world as V1, and of its first 1,000 images as V2, of one checkpoint."""
    softmax, gt = world
    for dataset, n in (("V1", 3000), ("V2", 1000)):
        stem = tmp_path / f"mrl=True_efficient=False_ff=2048_dataset={dataset}_tta=True_softmax"
        torch.save(torch.from_numpy(softmax[:, :n].copy()), f"{stem}.pth")
        about = {"checkpoint": "c0ffee", "nesting_list": NESTING_LIST, "dataset": dataset, "tta": True, "n": n,
                 "num_classes": 40, "classes": [str(i) for i in range(40)], "images": dataset}
        (tmp_path / f"{stem.name}.json").write_text(json.dumps(about))
        torch.save(torch.from_numpy(gt[:n].copy()), tmp_path / f"gt_dataset={dataset}.pth")
    return tmp_path


def test_learn_then_apply(saved, run_here, golden, world, monkeypatch, capsys):
    """On the set it was tuned on, a policy is evaluated on the other images: the golden accuracies."""
    policy = saved / "policy.json"
    run_here("model_analysis", f"cascades.py learn --folder {saved} --tta --seed 1 --policy {policy}")
    expected = golden("analysis")[0]["cascade"]
    assert json.loads(policy.read_text())["thresholds"] == expected["thresholds"]

    shown = run_here("model_analysis", f"cascades.py apply --folder {saved} --tta --policy {policy}").stdout
    lines = shown.splitlines()
    assert "on 2400 images of V1" in lines[0]
    shown = [[float(word) for word in line.split()] for line in lines[2:]]
    assert [row[0] for row in shown] == NESTING_LIST[1:]
    assert [row[1] for row in shown] == [round(100 * a, 2) for a in expected["accuracy_by_cap"]]
    assert [row[2] for row in shown] == [round(e, 2) for e in expected["expected_size_by_cap"]]

    monkeypatch.setattr("sys.argv", f"cascades.py apply --folder {saved} --dataset v2 --tta --policy {policy}".split())
    cascades.main()
    on_v2 = capsys.readouterr().out
    accuracy, _ = cascades.evaluate(world[0][:, :1000], world[1][:1000], expected["thresholds"], NESTING_LIST)
    assert "on 1000 images of v2" in on_v2 and f"{100 * accuracy[-1]:.2f}" in on_v2.splitlines()[-1]


@pytest.fixture
def refusal(monkeypatch):
    """refusal("apply", "--tta", ...) -> the message of the InputError that cascades.py ends with."""
    def start(*words):
        monkeypatch.setattr("sys.argv", ["cascades.py", *map(str, words)])
        with pytest.raises(InputError) as raised:
            cascades.main()
        return str(raised.value)
    return start


def test_policies_that_do_not_fit(saved, refusal):
    policy = saved / "policy.json"
    apply = ["apply", "--folder", saved, "--dataset", "V2", "--tta", "--policy", policy]
    known = {"thresholds": [0.5] * 8, "n": 3000, "fraction": 1, "seed": 0, "head": "mrl", "checkpoint": "c0ffee",
             "nesting_list": NESTING_LIST, "dataset": "V1", "images": "V1", "tta": True}
    for wrong, words in [({"images": "V2"}, "with 3000 images, here it has 1000"),
                         ({"images": "V2", "n": 1000}, "no image is left"),
                         ({"images": None, "dataset": "v2", "n": 1000}, "no image is left"),
                         ({"checkpoint": "badcafe"}, "different checkpoints"),
                         ({"thresholds": ["high"] * 8}, "not a policy"), ({"thresholds": [0.5]}, "8 thresholds")]:
        policy.write_text(json.dumps(known | wrong))
        assert words in refusal(*apply)
    for text, words in {"{": "not a JSON file", "[]": "not a JSON file", "{}": "not a policy"}.items():
        policy.write_text(text)
        assert words in refusal(*apply)


def test_missing_files_are_named(tmp_path, refused):
    line = refused("model_analysis", f"cascades.py learn --folder {tmp_path} --policy {tmp_path / 'p.json'}")
    assert "pytorch_inference.py" in line and not (tmp_path / "p.json").exists()
