"""Runs side by side: FF models are one line, figures are per cent in print and fractions in the CSV."""
import json

import accuracy_table
import pandas as pd
import pytest


def run(head, sizes, top1, path="runs/a/final_weights.pt"):
    return {"spec": {"head": head}, "nesting_list": sizes, "top1": top1, "top5": [0.9] * len(sizes),
            "loss": [1.5] * len(sizes), "path": path, "checkpoint": "0f", "dataset": "V1", "n": 50, "num_classes": 10,
            "tta": False, "model": "mrl0_e0_ff8"}


RUNS = [run("ff8", [8], [0.25]), run("ff16", [16], [0.5]),
        run("mrl", [8, 16], [0.3, 0.6]), run("mrl_e", [8, 16], [0.2, 0.4])]


def test_several_runs_are_one_table(capsys):
    accuracy_table.show(RUNS)
    header, columns, _, eight, sixteen = capsys.readouterr().out.splitlines()
    assert header == "V1: 50 images, 10 classes, tta False, top-1 %"
    assert columns.split() == ["model", "FF", "MRL", "MRL-E"]
    assert eight.split() == ["8", "25.00", "30.00", "20.00"]
    assert sixteen.split() == ["16", "50.00", "60.00", "40.00"]


def test_one_run_shows_top5_and_loss(capsys):
    accuracy_table.show(RUNS[:1])
    assert capsys.readouterr().out.splitlines()[-1].split() == ["8", "25.00", "90.00", "1.50"]


def test_sizes_that_a_model_lacks_are_dashes(capsys):
    accuracy_table.show([run("ff8", [8], [0.25]), run("mrl", [8, 16], [0.3, 0.6])])
    assert capsys.readouterr().out.splitlines()[-1].split() == ["16", "-", "60.00"]


def test_two_of_a_kind_are_told_apart_by_path():
    others = [run("mrl", [8, 16], [0.1, 0.2], f"runs/b/final_weights{end}.pt") for end in ("", "_ema")]
    table = accuracy_table.tabulate([RUNS[0], RUNS[2], *others])
    assert table.model.unique().tolist() == ["FF", "MRL a", "MRL b", "MRL b/final_weights_ema.pt"]


def test_csv_and_plot(tmp_path):
    text, picture, companion = (tmp_path / f"table{end}" for end in (".csv", ".png", ".json"))
    accuracy_table.save(RUNS, text, picture, companion, {"checkpoints": ["0f"] * 4})
    assert json.loads(companion.read_text()) == {"checkpoints": ["0f"] * 4}
    table = pd.read_csv(text)
    assert table.columns.tolist() == ["model", "size", "top1", "top5", "loss", "path", "checkpoint"]
    assert table.top1.tolist() == [0.25, 0.5, 0.3, 0.6, 0.2, 0.4]
    assert picture.stat().st_size > 10_000


def test_plot_has_a_line_per_model():
    axes = accuracy_table.plot(accuracy_table.tabulate(RUNS), "title").axes[0]
    drawn = {line.get_label(): (line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axes.lines}
    assert drawn["FF"] == ([8, 16], [25, 50]) and list(drawn) == ["FF", "MRL", "MRL-E"]
    assert drawn["MRL"][1] == pytest.approx([30, 60])
