"""Where the failed episodes of the results started:  python benchmark/failures.py laeo-SawyerWindowOpen

Prints, for every run in benchmark/results/state whose name begins so, the position of the object (of the gripper in
FetchReach) in the first state of each episode that is not solved at the last step, in metres, and whether it was solved
at any step before.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import report

import common


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
        main(sys.argv[1])
