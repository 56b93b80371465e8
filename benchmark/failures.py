"""Where failed episodes start, of the results, and where they end, of a finished run's policy:

    python benchmark/failures.py laeo-SawyerWindowOpen
    python benchmark/failures.py runs/push

The first prints, for every run in benchmark/results/state whose name begins so, the position of the object (of the
gripper in FetchReach) in the first state of each episode that is not solved at the last step, in metres, and whether it
was solved at any step before. The second plays 100 episodes with starts that are in no table and prints, for each that
is not solved at the last step, the distance of the object from the goal in its last state, in metres, sorted.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import numpy as np
import report

import common
import evaluate


def ends(run_dir: Path, episodes: int = 100) -> None:
    """Play the policy of a finished run. Raises common.UserError where the goal's position is not known."""
    act, result = evaluate.load_policy(run_dir)
    env_id = result["args"]["env_id"]
    if env_id not in common.TASKS:
        raise common.UserError(f"{run_dir} is a run on {env_id}; it must be on one of {', '.join(common.TASKS)}.")
    task, env, distances = common.TASKS[env_id], common.make_env(env_id), []
    for i in range(episodes):
        (observation, info), done = env.reset(seed=common.episode_seed(100, "evaluation", i)), False
        while not done:
            observation, _, terminated, truncated, info = env.step(act(observation))
            done = terminated or truncated
        if not info["success"]:
            distances.append(np.linalg.norm(env.unwrapped.state[task.achieved_goal] - task.desired_goal))
    env.close()
    print(f"{run_dir}: {len(distances)} of {episodes} episodes not solved at the last step, at these distances:")
    print(" ".join(f"{x:.2f}" for x in sorted(distances)))


def main(prefix: str) -> None:
    """Reset an environment to the start of every failed episode."""
    results = {name: result for name, result in report.load("state").items() if name.startswith(prefix)}
    if not results:
        raise common.UserError(f"no result in benchmark/results/state begins with {prefix}.")
    for name, result in results.items():
        env_id, episodes = result["args"]["env_id"], result["episodes"]
        env = common.make_env(env_id)
        failed, never = ([not success for success in episodes[kind]] for kind in ("final_success", "success"))
        print(f"{name}: of {len(failed)} episodes {sum(never)} never solved, {sum(failed)} not at the last step")
        starts = {}  # by state, so that equal episodes are printed once
        for seed, final, any_step in zip(episodes["seed"], failed, never):
            if final:
                env.reset(seed=seed)
                state = env.unwrapped.state
                position = " ".join(f"{x:.3f}" for x in state[common.TASKS[env_id].achieved_goal])
                starts[state.tobytes()] = f"{position} {'never' if any_step else 'before the end'}"
        for start in sorted(starts.values()):
            print(f"    {start}")
        env.close()


if __name__ == "__main__":
    with common.user_errors():
        if len(sys.argv) != 2:
            sys.exit(__doc__)
        ends(Path(sys.argv[1])) if Path(sys.argv[1]).is_dir() else main(sys.argv[1])
