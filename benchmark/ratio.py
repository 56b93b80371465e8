"""Measure the ratio p*/p that LAEO learns from success examples, by bandwidth:  python benchmark/ratio.py

For 200, 100, 10 and 1 success examples of FetchPush, three seeds, and noise of 0.3, 0.7, 1 and 2 deviations of the
examples, benchmark/results/ratio.json gets two means over all states of the dataset, after ratios above 10 are cut
to 10, as in the policy's value: `mean`, which is 1 for the true ratio; and `in_solved`, the share of it that is in
states in which the task is solved, which the data's success flags tell and no training sees.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from made import made

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import laeo  # noqa: E402

NUM_SUCCESS, NOISES, SEEDS = (200, 100, 10, 1), (0.3, 0.7, 1.0, 2.0), (0, 1, 2)
OUTPUT = Path(__file__).parent / "results" / "ratio.json"


def measure(args: laeo.Args) -> dict:
    """Return the row of one set of examples."""
    dataset, data, mean, std, examples = laeo.load_data(args, torch.device("cpu"))
    solved = np.load(args.dataset / "successes.npy", allow_pickle=False).flatten()
    row = {"num_success": args.num_success, "seed": args.seed, "mean": [], "in_solved": []}
    for noise in NOISES:
        generator = torch.Generator().manual_seed(int(common.seed_sequence(args.seed, "weights").generate_state(1)[0]))
        encoder = laeo.Encoder(mean, std, args, generator)
        log_ratio = laeo.fit_log_ratio(encoder, data, examples, replace(args, classifier_noise=noise), generator)
        ratio = np.exp(np.minimum(log_ratio, np.log(10)).astype(float))
        row["mean"].append(ratio.mean())
        row["in_solved"].append(ratio[solved].sum() / ratio.sum())
    return row


def main(dataset: Path, output: Path = OUTPUT) -> None:
    """Write all rows."""
    settings = [
        laeo.Args("FetchPush", dataset=dataset, num_success=n, seed=seed) for n in NUM_SUCCESS for seed in SEEDS
    ]
    with common.write_file(output) as file:
        content = {"made": made(), "noise": NOISES, "rows": [measure(x) for x in settings]}
        file.write((json.dumps(content, indent=2) + "\n").encode())


if __name__ == "__main__":
    with common.user_errors():
        torch.set_num_threads(1)
        main(common.find_dataset("FetchPush", "medium", None))
