"""The best that choosing a representation size per image could do, and how sizes and classes differ (appendix J).

    result = oracle.evaluate(predictions, gt, nesting_list)       # predictions [G, N] and gt [N], from outputs.py

Read by Oracle_Upper_Bound_Performance.ipynb. Letters: G sizes, N images, C classes; accuracies are fractions.
"""
from itertools import groupby

import numpy as np

from mrl_files import InputError

BEHAVIOURS = ["monotone", "improves, then dips", "declines first", "flat", "no clear trend"]


def evaluate(predictions, gt, nesting_list):
    """predictions [G, N], gt [N] -> dict:

    top1 [G]; accuracy, the share of images that some size gets right; histogram [G], counts of images by the smallest
    size that is right; never_correct, the count of the others; expected_size, the mean of that smallest size over the
    images that have one; expected_size_never_at_largest, the original's figure, which takes the largest size for the
    others; majority_vote, the accuracy of the class that most sizes predict.
    """
    correct, sizes = right(predictions, gt), np.asarray(nesting_list)
    if len(sizes) != len(correct):
        raise InputError(f"predictions of {len(correct)} sizes, but nesting_list {list(nesting_list)}")
    first = correct.argmax(0)[correct.any(0)]                    # smallest right size of the images that have one
    histogram = np.bincount(first, minlength=len(sizes))
    never = correct.shape[1] - len(first)
    return {"top1": correct.mean(1), "accuracy": len(first) / correct.shape[1], "histogram": histogram,
            "never_correct": never, "expected_size": histogram @ sizes / max(len(first), 1),
            "expected_size_never_at_largest": (histogram @ sizes + never * sizes[-1]) / correct.shape[1],
            "majority_vote": (majority_vote(predictions) == gt).mean()}


def right(predictions, gt):
    """predictions [G, N], gt [N] -> bool [G, N]"""
    predictions, gt = np.asarray(predictions), np.asarray(gt)
    if predictions.ndim != 2 or gt.shape != predictions.shape[1:] or not gt.size:
        raise InputError(f"predictions {list(predictions.shape)} and gt {list(gt.shape)} must be [G, N] and [N]")
    return predictions == gt


def majority_vote(predictions):
    """predictions [G, N] -> [N], the class predicted by most sizes; of several, the smallest."""
    predictions = np.asarray(predictions)
    votes = (predictions[:, None] == predictions).sum(1)         # [G, N]: how many sizes agree with size g
    return np.where(votes == votes.max(0), predictions, predictions.max() + 1).min(0)


def class_accuracy(predictions, gt):
    """-> accuracy [G, K]: per size, the share of each class's images that are right; classes [K], those that have
    images, ascending: a part of a set may hold some of the model's classes only."""
    classes, place, images = np.unique(gt, return_inverse=True, return_counts=True)
    return np.stack([np.bincount(place, weights=row) for row in right(predictions, gt)]) / images, classes


def behaviour(accuracy):
    """accuracy [G, K] -> [K] names of BEHAVIOURS: how each class fares as the size grows.

    Read off the signs of the changes from size to size, equal neighbours left out: only rises; rises, then falls;
    falls first, then rises or nothing; no change; more turns than one. (The paper counts 244, 177 and 49 classes of
    the first three kinds in its MRL model, and gives no rule to the letter; this is ours.)
    """
    steps = np.sign(np.diff(accuracy, axis=0)).T                 # [K, G-1]
    kinds = {(): "flat", (1,): "monotone", (1, -1): "improves, then dips", (-1,): "declines first",
             (-1, 1): "declines first"}
    turns = [tuple(sign for sign, _ in groupby(row[row != 0])) for row in steps]
    return np.array([kinds.get(turn, "no clear trend") for turn in turns])


def disagreement(predictions):
    """predictions [G, N] -> [G, G], the share of images on which two sizes predict different classes."""
    predictions = np.asarray(predictions)
    return np.stack([(row != predictions).mean(1) for row in predictions])
