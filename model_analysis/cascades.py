"""Adaptive classification (section 4.2.1): stop at the first representation size whose head is confident enough.

    python cascades.py learn --folder ../inference --dataset V1 --tta --policy policy.json
    python cascades.py apply --folder ../inference --dataset V2 --tta --policy policy.json

A policy has one threshold for each size but the largest. An image is classified at the smallest size; while the largest
softmax probability is not above that size's threshold, the next size is tried, up to the largest size allowed.
Model_Cascades.ipynb draws the paper's figure and table with these functions; softmax and true classes come from
inference by way of outputs.py. Letters: G sizes, N images, C classes; accuracies are fractions.
"""
import argparse

import numpy as np
import outputs

from mrl_files import InputError, bounded, command_line, file_path, read_json, write_json

GRID = np.linspace(0.1, 1.0, 100)          # the thresholds that are tried: the original's
HEADS = ("mrl", "mrl_e")
OF_THE_RUN = ("head", "nesting_list", "checkpoint", "dataset", "images", "tta")      # what a policy keeps of `info`


def confidence(softmax, gt):
    """softmax [G, N, C], gt [N] -> conf [G, N], the largest probability; correct [G, N], whether it is the true class.

    The one pass over the big array: everything below works on what this returns.
    """
    softmax, gt = np.asarray(softmax), np.asarray(gt)
    if softmax.ndim != 3 or gt.shape != softmax.shape[1:2]:
        raise InputError(f"softmax {list(softmax.shape)} and gt {list(gt.shape)} must be [G, N, C] and [N]")
    if len(softmax) < 2:
        raise InputError("a cascade needs two sizes or more: give the softmax of an MRL or MRL-E model")
    conf = softmax.max(-1)
    if not ((conf > 0) & (conf < 1.001)).all():
        raise InputError("softmax holds other numbers than probabilities: was it made from logits, or is it NaN?")
    return conf, softmax.argmax(-1) == gt


# ------------------------------------------------------------------------------------------------ learning

def learn_thresholds(softmax, gt):
    """softmax [G, N, C], gt [N] -> thresholds [G-1]; see `best_thresholds`."""
    return best_thresholds(*confidence(softmax, gt))


def best_thresholds(conf, correct):
    """conf, correct [G, N] -> thresholds [G-1], each pair of neighbouring sizes by itself, as the original.

    For a pair: the smaller size answers where its confidence is above t, else the larger; of the t in GRID with the
    most right answers, the smallest. All t at once: an image leaves the larger size for the smaller one at every t
    below its confidence, so the right answers at t are those of the larger size plus what these images change.
    """
    change = correct[:-1].astype(int) - correct[1:]                           # [G-1, N]: 1 gained, -1 lost
    below = np.searchsorted(GRID, conf[:-1].astype(float))                    # [G-1, N]: how many t are below conf
    gains = np.stack([np.bincount(b, weights=c, minlength=len(GRID) + 1) for b, c in zip(below, change, strict=True)])
    gained = gains[:, ::-1].cumsum(1)[:, ::-1][:, 1:]                         # [G-1, T]: summed over below > index of t
    return GRID[gained.argmax(1)]                                             # argmax: the first, so the smallest t


# ------------------------------------------------------------------------------------------------ evaluating

def evaluate(softmax, gt, thresholds, nesting_list):
    """-> accuracy [G-1], expected size [G-1], by the largest size allowed (nesting_list[1:]); see `outcome`."""
    result = outcome(*confidence(softmax, gt), thresholds, nesting_list)
    return result["accuracy"], result["expected_size"]


def outcome(conf, correct, thresholds, nesting_list):
    """A policy's result on conf, correct [G, N], for each largest size allowed (nesting_list[1:]).

    -> dict of arrays [G-1]: accuracy; expected_size, the mean of the size that answered, as in the paper's Table 3;
    touched_size, the mean of all sizes asked, added up (8, 8+16 ...: appendix D.1). MRL-E's heads share their work, so
    there the size that answered is the whole cost.
    """
    thresholds, sizes = np.asarray(thresholds), np.asarray(nesting_list)
    if len(thresholds) != len(conf) - 1 or len(sizes) != len(conf):
        raise InputError(f"{len(conf)} sizes need {len(conf) - 1} thresholds and {len(conf)} entries of nesting_list, "
                         f"got {len(thresholds)} and {len(sizes)}")
    if conf.shape[1] == 0:
        raise InputError("no image is left to evaluate on: the thresholds were tuned on all of them; "
                         "give a smaller hold-out, or another set")
    confident = conf[:-1].astype(float) > thresholds[:, None]
    answers = np.where(confident.any(0), confident.argmax(0), len(conf) - 1)  # [N]: which size, were all allowed
    answers = np.minimum(answers, np.arange(1, len(conf))[:, None])           # [G-1, N]: with a largest size allowed
    return {"accuracy": np.take_along_axis(correct, answers, 0).mean(1),
            "expected_size": sizes[answers].mean(1),
            "touched_size": sizes.cumsum()[answers].mean(1)}


def hold_out(n, fraction, seed):
    """-> bool [n], True for the images to tune on: a seeded draw without replacement (10,000 of 50,000 is 0.2)."""
    images = round(fraction * n)
    if not 0 < images <= n:
        raise InputError(f"a hold-out of {fraction} of {n} images is {images} images; give a fraction above 0, up to 1")
    tune = np.zeros(n, bool)
    tune[np.random.default_rng(seed).choice(n, images, replace=False)] = True
    return tune


def repeat(conf, correct, nesting_list, fraction=0.2, seeds=30):
    """Tune on a hold-out, evaluate on the rest, once for each seed in range(seeds).

    -> dict of arrays [seeds, G-1]: thresholds, and what `outcome` returns.
    """
    rows = []
    for seed in range(seeds):
        tune = hold_out(conf.shape[1], fraction, seed)
        thresholds = best_thresholds(conf[:, tune], correct[:, tune])
        rows.append({"thresholds": thresholds, **outcome(conf[:, ~tune], correct[:, ~tune], thresholds, nesting_list)})
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


# ------------------------------------------------------------------------------------------------ command line

def learn(args):
    """Tune on a hold-out of one set and save the policy with where it came from."""
    softmax, gt, info = outputs.read(args.folder, "softmax", args.head, args.dataset, args.tta)
    conf, correct = confidence(softmax, gt)
    tune = hold_out(len(gt), args.fraction, args.seed)
    thresholds = best_thresholds(conf[:, tune], correct[:, tune])
    policy = {"thresholds": thresholds.tolist(), "n": len(gt), "fraction": args.fraction, "seed": args.seed,
              **{key: info[key] for key in OF_THE_RUN}}
    write_json(args.policy, policy)
    print(f"thresholds {' '.join(f'{t:.3f}' for t in thresholds)}, tuned on {tune.sum()} images of {args.dataset}; "
          f"saved to {args.policy}")


def apply(args):
    """A saved policy on a set; on the set it was tuned on, without the images it was tuned on."""
    policy = read_policy(args.policy)
    softmax, gt, info = outputs.read(args.folder, "softmax", policy["head"], args.dataset, args.tta)
    outputs.same_run(policy, info)
    seen = tuned_on(policy, info, len(gt))
    conf, correct = confidence(softmax, gt)
    result = outcome(conf[:, ~seen], correct[:, ~seen], policy["thresholds"], info["nesting_list"])
    print(f"{policy['head']} on {(~seen).sum()} images of {info['dataset']} (tta={info['tta']}); thresholds of "
          f"{policy['dataset']} (tta={policy['tta']}), {args.policy}")
    print("largest size   top-1 (%)   expected size   all heads asked")
    for size, *row in zip(info["nesting_list"][1:], *result.values(), strict=True):
        print(f"{size:12d}{100 * row[0]:12.2f}{row[1]:16.2f}{row[2]:18.2f}")


def read_policy(path):
    """What `learn` wrote, or someone by hand: InputError where a value is missing or of another kind."""
    policy = read_json(path) or {}
    try:
        known = {key: policy[key] for key in ("n", "fraction", "seed", *OF_THE_RUN)}
        known["thresholds"] = [float(t) for t in policy["thresholds"]]
        if np.isfinite(known["thresholds"]).all() and known["head"] in HEADS and known["seed"] >= 0 \
                and 0 < known["fraction"] <= 1 and known["n"] > 0:
            return known
    except (ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{path}: not a policy; make one with: python cascades.py learn --policy {path}")


def tuned_on(policy, info, n):
    """-> bool [n]: which images of the set the policy was tuned on."""
    key = "dataset" if None in (policy["images"], info["images"]) else "images"
    if not outputs.same_name(policy[key], info[key]):
        return np.zeros(n, bool)
    if policy["n"] != n:
        raise InputError(f"the policy was tuned on {policy['dataset']} with {policy['n']} images, here it has {n}")
    return hold_out(n, policy["fraction"], policy["seed"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for function in (learn, apply):
        command = commands.add_parser(function.__name__, help=function.__doc__, description=function.__doc__)
        command.set_defaults(run=function)
        command.add_argument("--policy", type=file_path, required=True, help="JSON file")
        command.add_argument("--folder", type=file_path, default="../inference",
                             help="where pytorch_inference.py saved its files (%(default)s)")
        command.add_argument("--dataset", default="V1", help="(%(default)s)")
        command.add_argument("--tta", action="store_true", help="files made with --tta, as the paper's cascades")
    command = commands.choices["learn"]
    command.add_argument("--head", default="mrl", choices=HEADS, help="(%(default)s)")
    command.add_argument("--fraction", type=bounded(float, 0, 1), default=0.2,
                         help="of the images, to tune on; 1: all (%(default)s)")
    command.add_argument("--seed", type=bounded(int, 0), default=0, help="of the choice of these images (%(default)s)")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    command_line(main)
