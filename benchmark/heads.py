"""Compare LAEO's objectives of images on a frozen critic:  python benchmark/heads.py runs/push --jobs 2

A run of laeo.py on FetchPushImage takes half an hour, and one seed cannot tell two objectives apart. Here encoder and
critic of a finished run stay as they are. Only the policy's own layers are trained anew, for 4,000 steps on the
features of the encoder, which are computed once, and then played on 50 starts: a minute or two. Every setting below
has the seeds 100 to 103, which are in no other table of results; a seed decides the success examples, the initial
weights, the batches, 2,048 states of the data for the objective `nearest`, and the starts. The encoder is that of the
run, with the run's number of examples, and does not adapt to the policy: compare settings with each other, not with
laeo.py. Results go to benchmark/results/image_heads/NAME-SEED.json.
"""

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from torch import Generator

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
import values  # noqa: E402
from image_search import FIRST_SEED, missing, run_all  # noqa: E402
from made import made  # noqa: E402
from run import write_json  # noqa: E402

import common  # noqa: E402
import laeo  # noqa: E402

SETTINGS = {  # objective, success examples, nearest_share, bc_coef, whether cloning weighs actions by their value
    "log_exp_f-200": ("log_exp_f", 200, 1.0, 0.5, False),
    "log_exp_f-10": ("log_exp_f", 10, 1.0, 0.5, False),
    "log_exp_f-1": ("log_exp_f", 1, 1.0, 0.5, False),
    "nearest-0.2-200": ("nearest", 200, 0.2, 0.5, False),
    "nearest-0.3-200": ("nearest", 200, 0.3, 0.5, False),
    "nearest-0.05-10": ("nearest", 10, 0.05, 0.5, False),
    "nearest-0.2-10": ("nearest", 10, 0.2, 0.5, False),
    "nearest-0.05-1": ("nearest", 1, 0.05, 0.5, False),
    "nearest-0.2-1": ("nearest", 1, 0.2, 0.5, False),
    "nearest-0.3-1": ("nearest", 1, 0.3, 0.5, False),
    "nearest-0.2-1-bc_coef-0.7": ("nearest", 1, 0.2, 0.7, False),
    "nearest-0.2-1-clone_by_value": ("nearest", 1, 0.2, 0.5, True),
}
STEPS, BATCH_SIZE, EPISODES, SHIFTS = 4_000, 128, 50, 3


@dataclass
class Args:
    run_dir: Annotated[Path, tyro.conf.Positional]  # a finished run of laeo.py on FetchPushImage
    only: str = ""  # only settings whose name contains this
    seeds: tuple[int, ...] = tuple(range(FIRST_SEED, FIRST_SEED + 4))  # 100 or more
    jobs: int = 1  # how many policies at a time
    output: Path = Path(__file__).parent / "results" / "image_heads"


@torch.no_grad()
def encode(run_dir: Path, path: Path) -> None:
    """Write the features [SHIFTS, states, dim] of all images of a run's data, each version shifted at random."""
    _, _, data, _, actor, _ = values.load(run_dir, ("FetchPushImage",))
    rng, features = np.random.default_rng(0), []
    for _ in range(SHIFTS):
        for images in data.observations.split(512):
            shift = torch.from_numpy(rng.integers(2 * actor.encoder.pad + 1, size=(len(images), 2)))
            features.append(actor.encoder(images, shift).half())
    with common.write_file(path) as file:
        np.save(file, torch.cat(features).view(SHIFTS, len(data.observations), -1).numpy())


def train(features: np.ndarray, setting: tuple, seed: int, run_dir: Path) -> tuple[laeo.Actor, laeo.Args]:
    """Return a policy with the layers after the encoder trained on features [SHIFTS, states, dim], and its flags."""
    objective, num_success, share, bc_coef, clone_by_value = setting
    args, _, data, _, actor, critic = values.load(run_dir, ("FetchPushImage",))
    flags = {"policy_objective": objective, "nearest_share": share, "bc_coef": bc_coef}
    args = replace(args, **flags, num_success=num_success, batch_size=BATCH_SIZE, gradient_steps=STEPS, seed=seed)
    examples, rng = laeo.load_data(args, values.CPU)[-1], np.random.default_rng(seed)
    critic.requires_grad_(False)
    generator = Generator().manual_seed(seed)
    actor = laeo.Actor(critic.encoder, actor.action_bounds, args.hidden_dim, generator)
    optimizer = torch.optim.Adam(actor.net.parameters(), args.learning_rate, eps=1e-7, fused=True)
    some = torch.from_numpy(features[0, rng.choice(data.batches.row, laeo.QUEUE, replace=False)]).float()
    psi = torch.cat([critic.psi(critic.encoder(x)) for x in examples.split(50)], 1)
    states = laeo.value_states(psi, torch.zeros(num_success), critic.psi(some), args)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - step / STEPS)
        i = rng.integers(len(data.batches.row), size=BATCH_SIZE)
        x = torch.from_numpy(features[rng.integers(SHIFTS), data.batches.row[i]]).float()
        action = torch.from_numpy(data.batches.action[i])
        mean, std = actor.distribution(x)
        noise = torch.from_numpy(rng.standard_normal(action.shape, np.float32))
        value = laeo.policy_value(critic.phi(x, torch.tanh(mean + std * noise)), *states, BATCH_SIZE, objective)
        advantage = torch.zeros_like(value)
        if clone_by_value:
            advantage = laeo.policy_value(critic.phi(x, action), *states, BATCH_SIZE, objective) - value.detach()
        optimizer.zero_grad()
        laeo.policy_loss(value, actor.log_prob(mean, std, action), advantage, bc_coef).backward()
        optimizer.step()
    return actor, args


def run(path: Path, name: str, seed: int, given: Args) -> dict:
    """Train and play one setting on one seed; write the result and return it."""
    started = time.perf_counter()
    torch.set_num_threads(1)
    actor, args = train(np.load(path, mmap_mode="r", allow_pickle=False), SETTINGS[name], seed, given.run_dir)
    seconds = {"training": time.perf_counter() - started}
    result = laeo.evaluate(actor, args.env_id, EPISODES, seed, values.CPU) | {"method": "laeo", "seconds": seconds}
    flags = ("env_id", "seed", "policy_objective", "num_success", "nearest_share", "bc_coef")
    flags = {flag: getattr(args, flag) for flag in flags} | {"clone_by_value": SETTINGS[name][-1]}
    result |= {"args": flags, "made": made()}
    write_json(given.output / f"{name}-{seed}.json", result)
    return result


def main(given: Args) -> None:
    """Run what has no result yet."""
    todo = missing(SETTINGS, given)
    path = given.run_dir / "features.npy"
    if todo and not path.exists():
        encode(given.run_dir, path)
    run_all(run, {label: (path, *job, given) for label, job in todo.items()}, given.jobs)


if __name__ == "__main__":
    with common.user_errors():
        main(tyro.cli(Args, description=__doc__))
