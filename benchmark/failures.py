"""Where the failed episodes of the results started:  python benchmark/failures.py laeo-SawyerWindowOpen

Prints, for every run in benchmark/results/state whose name begins so, the position of the object (of the gripper in
FetchReach) in the first observation of each failed episode, in metres.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import common


def main(prefix: str) -> None:
    """Reset an environment to the start of every failed episode."""
    paths = sorted((Path(__file__).parent / "results" / "state").glob(f"{prefix}*.json"))
    if not paths:
        sys.exit(f"error: no result in benchmark/results/state begins with {prefix}.")
    for path in paths:
        result = json.loads(path.read_text())
        env_id, episodes = result["args"]["env_id"], result["episodes"]
        env = common.make_env(env_id)
        failed = [seed for seed, success in zip(episodes["seed"], episodes["success"]) if not success]
        print(f"{path.stem}: {len(failed)} of {len(episodes['seed'])} failed")
        starts = [env.reset(seed=seed)[0][common.TASKS[env_id].achieved_goal].tolist() for seed in failed]
        for start in sorted(starts):
            print("   ", *(f"{x:.3f}" for x in start))
        env.close()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
