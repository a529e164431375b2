"""The baselines on small arrays: against scikit-learn, against plain products, and through the command."""
import json

import baselines
import numpy as np
import pytest
import torch
from image_trees import make_run
from saved_files import fingerprint
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid

from mrl_files import InputError
from mrl_models import load_model


def clusters(n, seed, spread=1.2):
    """Five noisy class centres of 16 numbers, whose first coordinates separate less than all of them."""
    centres = np.random.default_rng(1).standard_normal((5, 16))
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 5, n)
    return (centres[y] + spread * rng.standard_normal((n, 16))).astype(np.float32), y


def test_linear_probe_is_as_good_as_scikit_learns():
    (X, y), (xq, yq) = clusters(3000, 2), clusters(2000, 3)
    head = baselines.linear_probe(X, y, [2, 16], epochs=30, lr=1e-2, batch_size=256)
    got = baselines.measure_top1(head, xq, yq)
    for size, accuracy in zip([2, 16], got, strict=True):
        expected = LogisticRegression().fit(X[:, :size], y).score(xq[:, :size], yq)
        assert accuracy == pytest.approx(expected, abs=0.01)
    assert got[1] > got[0] + 0.1


def test_truncated_classifier():
    rng = np.random.default_rng(0)
    weight, bias = torch.tensor(rng.standard_normal((6, 9))), torch.tensor(rng.standard_normal(6))
    x = torch.tensor(rng.standard_normal((4, 9)))
    one, two, full = baselines.truncate_classifier(weight, bias, [1, 2, 9])(x)
    torch.testing.assert_close(full, x @ weight.T + bias)
    U, S, Vh = np.linalg.svd(weight.numpy(), full_matrices=False)
    for rank, logits in ((1, one), (2, two)):
        cut = sum(S[i] * np.outer(U[:, i], Vh[i]) for i in range(rank))
        np.testing.assert_allclose(logits, x.numpy() @ cut.T + bias.numpy())


def test_class_mean_is_nearest_centroid():
    X, y = clusters(400, 4, spread=0.6)
    got = baselines.measure_class_means(X, y, [16], shots=3, seed=7)[0]
    # The same shots, found again: 3 random rows of each class, from one permutation.
    order = np.random.default_rng(7).permutation(400)
    support = np.concatenate([order[y[order] == label][:3] for label in range(5)])
    test = np.setdiff1d(np.arange(400), support)
    unit = X / np.linalg.norm(X, axis=1, keepdims=True)
    expected = NearestCentroid().fit(unit[support], y[support]).score(unit[test], y[test])
    assert got == pytest.approx(expected)


def test_class_mean_needs_an_image_to_test():
    with pytest.raises(InputError, match=r"--shots 2: needs more than 2 images of each class, class 1 has 2"):
        baselines.measure_class_means(np.ones((5, 2), np.float32), np.array([0, 0, 0, 1, 1]), [2], 2)


# ------------------------------------------------------------------------------------------------ command

def write_arrays(folder, model="mrl1_e0_ff16", nesting_list=(4, 16)):
    for split, (X, y) in {"train": clusters(600, 2), "val": clusters(200, 3)}.items():
        for dataset in ("1K", "V2") if split == "val" else ("1K",):
            stem = f"{folder}/{dataset}_{split}_{model}"
            np.save(f"{stem}-X.npy", X)
            np.save(f"{stem}-y.npy", y)
            about = {"checkpoint": "0f", "nesting_list": list(nesting_list)}
            with open(f"{stem}-X.json", "w") as file:
                json.dump(about, file)


def command(monkeypatch, words):
    monkeypatch.setattr("sys.argv", ["baselines.py", *map(str, words)])
    baselines.main()


def test_v2_queries_are_classified_by_the_database_of_1k(tmp_path, monkeypatch):
    write_arrays(tmp_path)
    flags = ["lp", "--arrays", tmp_path, "--model", "mrl1_e0_ff16", "--epochs", 1]
    for dataset in ("1K", "V2"):
        command(monkeypatch, [*flags, "--dataset", dataset])
    one, two = (json.loads((tmp_path / f"lp_dataset={name}_model=mrl1_e0_ff16.json").read_text())
                for name in ("1K", "V2"))
    assert one["top1"] == two["top1"]                                     # the queries are the same here
    assert one["sizes"] == [4, 16] and one["checkpoint"] == "0f"          # those of a nested model


def test_lp_and_ncm_commands(tmp_path, monkeypatch, capsys):
    write_arrays(tmp_path, "mrl0_e0_ff16", nesting_list=[16])
    flags = ["--arrays", tmp_path, "--model", "mrl0_e0_ff16"]
    command(monkeypatch, ["lp", *flags, "--epochs", 2])
    command(monkeypatch, ["ncm", *flags, "--dataset", "V2", "--shots", 1, 5, "--output", tmp_path / "figures"])
    lp = json.loads((tmp_path / "lp_dataset=1K_model=mrl0_e0_ff16.json").read_text())
    ncm = json.loads((tmp_path / "figures" / "ncm_dataset=V2_model=mrl0_e0_ff16.json").read_text())
    assert lp["sizes"] == ncm["sizes"] == [8, 16]                         # FF: powers of two up to its width
    assert np.shape(ncm["top1"]) == np.shape(ncm["std"]) == (2, 2)
    assert min(ncm["top1"][1]) > max(0.2, min(ncm["top1"][0]))            # more shots are better than one, and chance
    assert "5-shot" in capsys.readouterr().out


def test_svd_command(tmp_path, monkeypatch):
    path = make_run(tmp_path / "run", "ff512", num_classes=5)
    head, rng = load_model(path).fc, np.random.default_rng(0)
    X = rng.standard_normal((50, 512)).astype(np.float32)
    y = (X @ head.weight.detach().numpy().T + head.bias.detach().numpy()).argmax(1)
    stem = f"{tmp_path}/1K_val_mrl0_e0_ff512"
    np.save(f"{stem}-X.npy", X)
    np.save(f"{stem}-y.npy", y)
    flags = ["svd", "--arrays", tmp_path, "--model", "mrl0_e0_ff512"]
    command(monkeypatch, [*flags, "--path", path, "--sizes", 1, 5])
    result = json.loads((tmp_path / "svd_dataset=1K_model=mrl0_e0_ff512.json").read_text())
    assert result["top1"][1] == 1.0 > result["top1"][0]                   # rank 5 is the whole 5-class matrix

    (tmp_path / "run" / "params.json").unlink()
    with pytest.raises(InputError, match=r"does not fit resnet50 .* give arch \(--arch\)"):
        command(monkeypatch, [*flags, "--path", path])
    command(monkeypatch, [*flags, "--path", path, "--arch", "resnet18", "--sizes", 5])
    assert json.loads((tmp_path / "svd_dataset=1K_model=mrl0_e0_ff512.json").read_text())["top1"] == [1.0]

    with pytest.raises(InputError, match="svd needs --path"):
        command(monkeypatch, flags)
    with pytest.raises(InputError, match="svd is for a fixed-feature model"):
        command(monkeypatch, [*flags, "--path", make_run(tmp_path / "mrl", "mrl")])
    with open(f"{stem}-X.json", "w") as file:
        json.dump({"checkpoint": "of another"}, file)
    assert fingerprint(path) != "of another"
    with pytest.raises(InputError, match="come from another checkpoint"):
        command(monkeypatch, [*flags, "--path", path, "--arch", "resnet18"])


def test_arrays_of_two_checkpoints_and_too_large_sizes_are_refused(tmp_path, monkeypatch):
    write_arrays(tmp_path)
    flags = ["lp", "--arrays", tmp_path, "--model", "mrl1_e0_ff16"]
    with pytest.raises(InputError, match="32 is more than the 16 dimensions"):
        command(monkeypatch, [*flags, "--sizes", 4, 32])
    (tmp_path / "1K_val_mrl1_e0_ff16-X.json").write_text('{"checkpoint": "1e"}')
    with pytest.raises(InputError, match="come from different checkpoints"):
        command(monkeypatch, flags)
