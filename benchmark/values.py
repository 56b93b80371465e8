"""What a critic of LAEO says where:  python benchmark/values.py runs/push

For a finished run of laeo.py on FetchPush or FetchReach, held-out states with at least ten steps to go are sorted by
the distance of the object (of the gripper in FetchReach) from the mean of all success examples, at rest or moving.
Each row has

- states: how many of the held-out states there are; up to 300 of them are measured;
- policy, data: the mean logarithm of the value (Eq. 7) of the policy's mode, and of the data's action;
- best random: by how much the best of 30 uniformly random actions has a larger log value than the policy's;
- effective: the median effective sample size, (sum w)^2 / sum w^2, of the weights w = e^f that the states which the
  value is an expectation over have: the success examples, or for the objective `weighted` 2,048 states of the data.

Then 300 episodes are played, with the run's evaluation starts and those that follow. Of the states in which the task is
solved, one row has those of episodes that end solved, the other the last five before the task is no longer solved, of
episodes that do not:

- policy, best random: as above;
- no action: by how much doing nothing has a larger log value than the policy's action;
- std: the mean standard deviation of the policy's normal distribution.

Success rates do not show these. A policy leaves the goal where the value inside is no larger than just outside; random
actions beat the policy's where the critic is wrong; an effective sample size of 3 makes the mean of 200 a mean of 3.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import laeo

EDGES = {"FetchPush": (0, 0.03, 0.05, 0.06, 0.08, 0.12, np.inf), "FetchReach": (0, 0.03, 0.05, 0.08, 0.12, np.inf)}
STATES = 300
CPU = torch.device("cpu")


def load(run_dir: Path, tasks: tuple[str, ...] = tuple(EDGES)) -> tuple:
    """Return flags, dataset, data, success examples, actor and critic of a run."""
    if not (run_dir / "checkpoint.pt").exists():
        raise common.UserError(f"{run_dir} is no run directory with a checkpoint.pt; give one that laeo.py made.")
    checkpoint, args = laeo.load_checkpoint(laeo.Args(resume=run_dir))
    if args.env_id not in tasks:
        raise common.UserError(f"{run_dir} is a run on {args.env_id}; values are shown for {' and '.join(tasks)}.")
    dataset, data, mean, std, examples = laeo.load_data(args, CPU)
    generator = torch.Generator().manual_seed(int(common.seed_sequence(args.seed, "weights").generate_state(1)[0]))
    bounds = torch.from_numpy(dataset.action_bounds)
    encoder = laeo.Encoder(mean, std, args, generator)
    actor = laeo.Actor(encoder, bounds, args.hidden_dim, generator)
    critic = laeo.Critic(encoder, bounds.shape[1], args.hidden_dim, args.repr_dim, generator)
    if args.policy_objective == "weighted":
        data = data._replace(log_ratio=laeo.fit_log_ratio(encoder, data, examples, args, generator))
    actor.load_state_dict(checkpoint["actor"])
    critic.load_state_dict(checkpoint["critic"])
    return args, dataset, data, examples, actor, critic


def states_of_value(args: laeo.Args, data: laeo.Data, examples: torch.Tensor, critic: laeo.Critic) -> tuple:
    """Return what laeo.policy_value wants beside phi: psi of the states that the value averages over, and settings."""
    if args.policy_objective == "nearest":
        states = laeo.value_states(critic.psi(critic.encoder(examples)), torch.empty(0), critic.queue, args)
        return *states, args.batch_size, "nearest"
    batch = laeo.sample(data, replace(args, batch_size=2048), 0)
    states = batch.future if args.policy_objective == "weighted" else examples
    objective = args.policy_objective if args.policy_objective == "weighted" else "log_exp_f"
    return critic.psi(critic.encoder(states)), batch.log_ratio, args.batch_size, objective


def best_of_random(features: torch.Tensor, action_dim: int, critic: laeo.Critic, settings: tuple, rng) -> torch.Tensor:
    """Return the largest value [B] of 30 uniformly random actions for the encoder's features [B, dim]."""
    random = torch.from_numpy(rng.uniform(-1, 1, (30, len(features), action_dim)).astype(np.float32))
    return torch.stack([laeo.policy_value(critic.phi(features, a), *settings) for a in random]).amax(0)


@torch.no_grad()
def measure(args: laeo.Args, dataset: common.Dataset, data: laeo.Data, examples, actor, critic) -> list[dict]:
    """Return one row for each range of distances, at rest and moving, that has held-out states."""
    where = common.TASKS[args.env_id].achieved_goal
    goal = dataset.success_examples[:, where].mean(0)
    position = data.observations.numpy()[:, where]
    heldout = common.Transitions(*(x[data.heldout.remaining >= 10] for x in data.heldout))
    distance = np.linalg.norm(position[heldout.row] - goal, axis=-1)
    moving = np.linalg.norm(position[heldout.row + 1] - position[heldout.row], axis=-1) > 1e-3  # a millimetre in a step

    settings = states_of_value(args, data, examples, critic)
    rng, rows, edges = np.random.default_rng(0), [], EDGES[args.env_id]
    for rest in (True, False):
        for low, high in zip(edges[:-1], edges[1:]):
            found = np.flatnonzero((low <= distance) & (distance < high) & (moving != rest))
            chosen = rng.permutation(found)[:STATES]
            if not len(chosen):
                continue
            features = critic.encoder(data.observations[torch.from_numpy(heldout.row[chosen])])
            action = actor.mode(features)
            phi = critic.phi(features, action)
            values = [
                laeo.policy_value(x, *settings)
                for x in (phi, critic.phi(features, torch.from_numpy(heldout.action[chosen])))
            ]
            best = best_of_random(features, action.shape[1], critic, settings, rng)
            weights = (phi @ settings[0].mT).amin(0).softmax(-1)
            rows.append({
                "low": low, "high": high, "rest": rest, "states": len(found),
                "policy": values[0].mean().item(), "data": values[1].mean().item(),
                "best_random": (best - values[0]).mean().item(),
                "effective": (1 / weights.square().sum(-1)).median().item(),
            })  # fmt: skip
    return rows


@torch.no_grad()
def measure_solved(args: laeo.Args, dataset, data: laeo.Data, examples, actor, critic, episodes: int = 300) -> list:
    """Return the row of solved states of episodes that end solved, and of those that do not, of which there are any."""
    settings, rng, rows = states_of_value(args, data, examples, critic), np.random.default_rng(0), []
    env, states = common.make_env(args.env_id), {True: [], False: []}
    for i in range(episodes):
        observation, info = env.reset(seed=common.episode_seed(args.seed, "evaluation", i))
        played, infos, done = [], [info], False
        while not done:
            played.append(np.asarray(observation, np.float32))
            action = actor(torch.from_numpy(played[-1][None]))[0].numpy()
            observation, _, terminated, truncated, info = env.step(action)
            infos.append(info)
            done = terminated or truncated
        *solved, end = (bool(info.get("success", info.get("is_success"))) for info in infos)
        lost = [t for t, after in enumerate([*solved[1:], end]) if solved[t] and not after]
        states[end] += [x for t, x in enumerate(played) if solved[t] and (end or any(0 <= u - t < 5 for u in lost))]
    env.close()
    for end, found in states.items():
        if found:
            features = critic.encoder(torch.from_numpy(np.array(found)))
            action = actor.mode(features)
            value, nothing = (laeo.policy_value(critic.phi(features, a), *settings) for a in (action, 0 * action))
            best = best_of_random(features, action.shape[1], critic, settings, rng)
            rows.append({
                "end": end, "states": len(found), "policy": value.mean().item(),
                "nothing": (nothing - value).mean().item(), "best_random": (best - value).mean().item(),
                "std": actor.distribution(features)[1].mean().item(),
            })  # fmt: skip
    return rows


def main(run_dir: Path) -> None:
    """Print the rows as two tables."""
    print(f"{'distance, cm':>12} {'':>6} {'states':>7} {'policy':>7} {'data':>7} {'best random':>12} {'effective':>10}")
    loaded = load(run_dir)
    for row in measure(*loaded):
        name = f"{100 * row['low']:.0f} to {100 * row['high']:.0f}"
        print(
            f"{name:>12} {'rest' if row['rest'] else 'moving':>6} {row['states']:7,} {row['policy']:7.2f} "
            f"{row['data']:7.2f} {row['best_random']:+12.2f} {row['effective']:10.1f}"
        )
    print(f"\n{'in the goal':>26} {'states':>7} {'policy':>7} {'no action':>10} {'best random':>12} {'std':>6}")
    for row in measure_solved(*loaded):
        name = "to the end" if row["end"] else "last 5 before leaving it"
        print(
            f"{name:>26} {row['states']:7,} {row['policy']:7.2f} {row['nothing']:+10.2f} {row['best_random']:+12.2f} "
            f"{row['std']:6.2f}"
        )


if __name__ == "__main__":
    with common.user_errors():
        if len(sys.argv) != 2:
            sys.exit(__doc__)
        main(Path(sys.argv[1]))
