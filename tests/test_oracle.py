"""The oracle against the golden numbers and by hand; classes and disagreement on cases that can be counted."""
import numpy as np
import oracle
import pytest
from test_cascades import golden_world

from MRL import NESTING_LIST
from mrl_files import InputError


def test_golden_oracle(golden):
    softmax, gt = golden_world()
    expected, _ = golden("analysis")
    result = oracle.evaluate(softmax.argmax(-1), gt, NESTING_LIST)
    original = expected["oracle"]
    assert result["top1"].tolist() == expected["top1"]
    assert result["accuracy"] == original["accuracy"]
    assert result["never_correct"] == original["never_correct"]
    assert [*result["histogram"][:-1], result["histogram"][-1] + 82] == original["histogram_with_never_in_last"]
    assert result["expected_size_never_at_largest"] == original["expected_size_with_never_at_largest"]
    assert result["majority_vote"] == original["majority_vote_torch_mode"]


def test_four_images_by_hand():
    """Right first at 8, at 16, never, and at 32 (wrong at 16)."""
    gt = np.array([0, 1, 2, 3])
    predictions = np.array([[0, 0, 0, 0], [0, 1, 0, 1], [1, 1, 0, 3]])
    result = oracle.evaluate(predictions, gt, [8, 16, 32])
    assert result["top1"].tolist() == [0.25, 0.5, 0.5] and result["accuracy"] == 0.75
    assert result["histogram"].tolist() == [1, 1, 1] and result["never_correct"] == 1
    assert result["expected_size"] == (8 + 16 + 32) / 3
    assert result["expected_size_never_at_largest"] == (8 + 16 + 32 + 32) / 4
    assert result["majority_vote"] == 0.5                                     # 0, 1, 0 and the tie of 0, 1, 3: 0


def test_no_image_is_ever_right():
    result = oracle.evaluate(np.ones((2, 3), int), np.zeros(3, int), [8, 16])
    assert result["accuracy"] == 0 and result["never_correct"] == 3 and result["expected_size"] == 0


def test_majority_vote_takes_the_smallest_of_a_tie():
    predictions = np.array([[5, 9, 3, 0], [2, 9, 1, 1], [5, 4, 2, 2], [2, 4, 1, 3]])
    assert oracle.majority_vote(predictions).tolist() == [2, 4, 1, 0]


# ------------------------------------------------------------------------------------------------ classes and sizes

def test_class_accuracy_by_hand():
    """Of the model's six classes 1, 4 and 5 have no image: they are left out."""
    gt = np.array([0, 0, 2, 2, 2, 3])
    predictions = np.array([[0, 2, 2, 2, 3, 0], [0, 0, 2, 5, 1, 3]])
    accuracy, classes = oracle.class_accuracy(predictions, gt)
    assert np.allclose(accuracy, [[1 / 2, 2 / 3, 0], [1, 1 / 3, 1]]) and classes.tolist() == [0, 2, 3]
    assert oracle.behaviour(accuracy).tolist() == ["monotone", "declines first", "monotone"]


@pytest.mark.parametrize("accuracy, kind", [
    ([.1, .2, .3, .4], "monotone"), ([.1, .1, .3, .3], "monotone"), ([.5, .5, .5, .5], "flat"),
    ([.1, .3, .3, .2], "improves, then dips"), ([.4, .3, .3, .5], "declines first"),
    ([.4, .4, .3, .2], "declines first"), ([.1, .3, .2, .3], "no clear trend"), ([.3, .2, .3, .2], "no clear trend"),
])
def test_behaviour_of_a_class(accuracy, kind):
    """Beside a class that only rises, to see that classes are told apart."""
    assert oracle.behaviour(np.array([accuracy, [0, .1, .2, .3]]).T).tolist() == [kind, "monotone"]
    assert kind in oracle.BEHAVIOURS


def test_disagreement_by_hand():
    differ = oracle.disagreement(np.array([[0, 1, 2, 3], [0, 1, 2, 0], [1, 1, 2, 0]]))
    assert differ.tolist() == [[0, .25, .5], [.25, 0, .25], [.5, .25, 0]]


# ------------------------------------------------------------------------------------------------ refusals

@pytest.mark.parametrize("call, words", [
    (lambda p, y: oracle.evaluate(p, y[:-1], [8, 16]), r"\[G, N\] and \[N\]"),
    (lambda p, y: oracle.evaluate(p[:, :0], y[:0], [8, 16]), r"\[G, N\] and \[N\]"),
    (lambda p, y: oracle.evaluate(p, y, [8, 16, 32]), "predictions of 2 sizes"),
    (lambda p, y: oracle.class_accuracy(p[:, :1], y), r"\[G, N\] and \[N\]"),
])
def test_refusals(call, words):
    with pytest.raises(InputError, match=words):
        call(np.zeros((2, 3), int), np.array([0, 1, 1]))
