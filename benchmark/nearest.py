"""How well a few success examples of images rank actions:  python benchmark/nearest.py runs/one

The run is a finished one of laeo.py on FetchPushImage. Values are compared at 400 held-out states with at least ten
steps to go, and 32 actions for each of them, half from the policy and half uniform. The reference is the objective
`nearest` with every solved state of 4,096 others as success, which the dataset's flags tell and no training sees. The
numbers are means over states of the correlation, over actions, of a value with the reference: outside the goal / where
the task is solved. Rows are the number of success examples, each with up to eight disjoint sets; columns the objective
log_exp_f, and `nearest` with shares of as many other states as laeo.py keeps.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import values

import common
import laeo

SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
ALL, NUM_SUCCESS, SETS = 200, (200, 10, 1), 8
STATES, POOL, ACTIONS = 400, 4096, 16


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Return the correlation [B] of values [actions, B] over the actions."""
    a, b = a - a.mean(0), b - b.mean(0)
    return (a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0)).clamp(min=1e-9)


@torch.no_grad()
def main(run_dir: Path) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    args, _, data, _, actor, critic = values.load(run_dir, ("FetchPushImage",))
    _, _, _, _, examples = laeo.load_data(replace(args, num_success=ALL), values.CPU)
    solved = np.load(args.dataset / "successes.npy", allow_pickle=False).flatten()
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)

    def features(rows: np.ndarray) -> Tensor:
        return torch.cat([critic.encoder(data.observations[torch.from_numpy(x)]) for x in np.array_split(rows, 8)])

    rows = rng.choice(data.heldout.row[data.heldout.remaining >= 10], STATES, replace=False)
    pool, queue = np.split(rng.choice(data.batches.row, POOL + laeo.QUEUE, replace=False), [POOL])
    states, psi_reference, psi = features(rows), critic.psi(features(pool)), critic.psi(features(queue))
    psi_examples = critic.psi(torch.cat([critic.encoder(x) for x in examples.split(50)]))
    mean, std = actor.distribution(states)
    actions = [torch.tanh(mean + std * torch.randn(mean.shape, generator=generator)) for _ in range(ACTIONS)]
    actions += [2 * torch.rand(mean.shape, generator=generator) - 1 for _ in range(ACTIONS)]
    phi = [critic.phi(states, action) for action in actions]

    def value(of_states: Tensor, log_ratio: Tensor, objective: str) -> Tensor:
        return torch.stack([laeo.policy_value(x, of_states, log_ratio, args.batch_size, objective) for x in phi])

    is_solved = torch.from_numpy(solved[pool])
    reference = value(psi_reference, torch.zeros(POOL).masked_fill(~is_solved, -torch.inf), "nearest")
    inside = torch.from_numpy(solved[rows])
    print("examples  " + f"{'log_exp_f':>16}" + "".join(f"{f'nearest {share:.1%}':>16}" for share in SHARES))
    for n in NUM_SUCCESS:
        cells = []
        for share in (None, *SHARES):
            found = []
            for i in range(min(SETS, len(examples) // n)):
                given, objective = psi_examples[:, n * i : n * (i + 1)], "nearest" if share else "log_exp_f"
                settings = replace(args, policy_objective=objective, nearest_share=share or 1.0)
                of_states = laeo.value_states(given, torch.zeros(n), psi, settings)
                found.append(correlation(value(*of_states, objective), reference))
            found = torch.stack(found).mean(0)
            cells.append(f"{found[~inside].mean():.2f} / {found[inside].mean():+.2f}")
        print(f"{n:>8}  " + "".join(f"{cell:>16}" for cell in cells))


if __name__ == "__main__":
    with common.user_errors():
        if len(sys.argv) != 2:
            sys.exit(__doc__)
        main(Path(sys.argv[1]))
