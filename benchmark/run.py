"""Make the numbers of the tables: run every command of an experiment that has no result yet, or with --redo every one.

    python benchmark/run.py --list                  # the commands, and which of them are done
    python benchmark/run.py data                    # make the datasets; the other experiments read them
    python benchmark/run.py state random --jobs 2   # run what is missing, two runs at a time
    python benchmark/run.py state --ray auto        # the same on a Ray cluster of which this machine is a node
    python benchmark/run.py state --redo            # run all of them again
    python benchmark/report.py --write              # put the tables into README.md and docs/*.md

Each run's result.json, with the outcome of every single episode and the evaluations on the way (`curve`), becomes
benchmark/results/EXPERIMENT/NAME.json; of a dataset it is the metadata.json. A run that fails is reported at the end,
with a non-zero exit; what is done stays done, so that the same command goes on (with --redo it begins again). Ctrl-C
ends the runs too, and waits for them. A dataset that is not in datasets/ is not done, although its metadata may be
among the results. Every run has one thread. What a run prints goes to a file, which is named if the run fails.

With --ray every run is a Ray task with one CPU (and one GPU if its command has `--device cuda`), and runs in the
worker process itself, so that nothing is left of it when the worker is killed; Ray then runs it again, up to three
times. All nodes need this repository, its datasets and the same Python packages at the same paths, as on a shared file
system. Results return to the process that was started here, which writes them, so that they are the same as without
Ray. If the cluster is lost, the program ends; what is done stays done.

The experiment `search` tries settings on seeds that are in no table. It runs the scripts of the commit SEARCH_COMMIT
with benchmark/search.patch, which adds those settings that did not stay.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from made import made
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
sys.path.insert(0, str(ROOT))
import common  # noqa: E402

METHODS = ("laeo", "oril", "purl", "bc")
STATE_TASKS = [env_id for env_id, task in common.TASKS.items() if task.state_task is None]
SEEDS = {"FetchPush": range(8)}  # of the tables; the other tasks, where the methods are level, have three
FLAGS = {  # the easier tasks need fewer steps; LAEO, which waits for no target network, fewer still
    "FetchPush": "--eval-interval 2500",  # for learning curves
    "laeo-FetchReach": "--gradient-steps 3000",
    "FetchReach": "--gradient-steps 10000",
    "SawyerWindowOpen": "--gradient-steps 5000",
    "SawyerDrawerClose": "--gradient-steps 5000",
}
DATA = {  # beside each task's standard dataset; 31,271 episodes are the paper's 1x
    "FetchReach-hard": "--env-id FetchReach --quality hard",
    "FetchPush-hard": "--env-id FetchPush --quality hard",
    "FetchPush-400": "--env-id FetchPush --num-episodes 400",
    "FetchPush-31271": "--env-id FetchPush --num-episodes 31271",
    "FetchReachImage-hard": "--env-id FetchReachImage --quality hard",
    "FetchPushImage-12000": "--env-id FetchPushImage --num-episodes 12000",
}
LARGE = "--dataset datasets/FetchPush-31271-medium"
SETTINGS = {  # LAEO on FetchPush, 200 examples; to be compared with state/laeo-FetchPush-SEED, sizes/laeo-31271-SEED
    "bc-coef-0.1": "--bc-coef 0.1",
    "bc-coef-0.4": "--bc-coef 0.4",
    "objective-f": "--policy-objective f --bc-coef 0.4",
    "objective-exp-f": "--policy-objective exp_f --bc-coef 0.4",
    "objective-log-exp-f": "--policy-objective log_exp_f --bc-coef 0.4",
    "paper-31271": f"--policy-objective exp_f --bc-coef 0.05 {LARGE}",
    "released-code-31271": f"--policy-objective f --bc-coef 0.5 {LARGE}",
}
OFFLINE = "--env-id FetchPush --dataset datasets/FetchPush-medium --eval-interval 5000"
CONTRASTIVE_RL = {  # goals drawn for each episode and no scripted ones; then offline, the task's goal is commanded
    "online-FetchReach": "--env-id gymnasium_robotics:FetchReach-v4 --train-steps 30000 --eval-interval 2500",
    "offline-nce": f"{OFFLINE} --critic-loss nce",
    "offline-cpc": f"{OFFLINE} --critic-loss cpc",
    "offline-c_learning": f"{OFFLINE} --critic-loss c_learning",
    "offline-nce_c_learning": f"{OFFLINE} --critic-loss nce_c_learning",
    "offline-gcbc": f"{OFFLINE} --gcbc",
}
CONTRASTIVE_RL_SEARCH = {  # of offline-LOSS, on the first search seed; the default is one of these
    f"{loss}-bc{bc_coef}": f"{OFFLINE} --critic-loss {loss} --bc-coef {bc_coef}"
    for loss in ("nce", "cpc", "c_learning", "nce_c_learning")
    for bc_coef in (0.5, 0.2)
}
SEARCH_COMMIT = "618187c"
SEARCH_SEEDS = (100, 101, 102)  # in no table; the evaluation starts of a seed are the same for every setting
SEARCH_FLAGS = "--env-id FetchPush --eval-episodes 300 --eval-interval 0"
CVL = {  # on FetchPush; the oracle is TD3+BC on the true success flag, which no other method sees as a reward
    "marginal": "cvl.py",
    "rff": "cvl.py --estimator rff",
    "released": "cvl.py --estimator released",
    "oracle": "oril.py --reward true",
}
GOAL = (1.35, 0.85, 0.42469975)  # of the experiment goals; the data's policies were commanded to (1.4, 0.9)
TAILO_BASE = (
    "--classifier-steps 1000 --eta 0.3 --safe-quantile 0.5 --penalty-coef 10 --reward-scale 1.25 --discount 0.99"
)
TAILO_SEARCH = {  # what TAILO is given beside these, on the first two search seeds
    "base": "",
    "discount-0.8": "--discount 0.8",
    "discount-0.9": "--discount 0.9",
    "discount-0.95": "--discount 0.95",
    "discount-0.98": "--discount 0.98",
    "discount-0.998": "--discount 0.998",
    "scale-2.5": "--reward-scale 2.5",
    "scale-5": "--reward-scale 5",
    "discount-0.9-scale-2.5": "--discount 0.9 --reward-scale 2.5",
    "quantile-0.3": "--safe-quantile 0.3",
    "quantile-0.8": "--safe-quantile 0.8",
    "eta-0.2": "--eta 0.2",
    "eta-0.5": "--eta 0.5",
    "penalty-1": "--penalty-coef 1",
    "paper": "--eta 0.2 --safe-quantile 0.8 --discount 0.998",
    "oracle": "",  # bc.py --only-solved
}
IMAGES = {  # number of seeds; `_hard` stands for hard data
    "FetchReachImage": 3,
    "FetchReachImage_hard": 3,
    "FetchPushImage": 3,
    "FetchPushImageOccluded": 2,
}
LARGE_IMAGES = "--dataset datasets/FetchPushImage-12000-medium"
# On a GPU: the paper's sizes, dataset and steps, and no random shift. Of these gpu_speed alone has been run.
GPU_SIZES = "--channels 32 --hidden-dim 1024 --batch-size 1024 --learning-rate 3e-4 --random-shift 0 --device cuda"
GPU = f"{GPU_SIZES} --gradient-steps 250000 --eval-interval 50000"  # an evaluation takes half a minute
GPU_EPISODES = 31_271
ON_GPU = "gpu", "gpu_speed"
BASELINE_IMAGES = {  # with the flags below, on the first search seed
    "oril": "oril.py",
    "oril-policy-frequency-1": "oril.py --policy-frequency 1",
    "oril-alpha-3-policy-frequency-1": "oril.py --alpha 3 --policy-frequency 1",
    "oril-alpha-30": "oril.py --alpha 30",
    "oril-reward-learning-rate-0.001": "oril.py --reward-learning-rate 0.001",
    "purl": "purl.py",
    "purl-alpha-3": "purl.py --alpha 3",
    "purl-eta-0.15": "purl.py --eta 0.15",
}
BASELINE_IMAGES_FLAGS = "--env-id FetchPushImage --gradient-steps 14000 --eval-episodes 200 --eval-interval 0"


def flags(method: str, task: str) -> str:
    """Return what a method is given on a task of states."""
    return FLAGS.get(f"{method}-{task}", FLAGS.get(task, ""))


def image_command(method: str, case: str, seed: int) -> str:
    """Return the command of a case of images."""
    task = case.removesuffix("_hard")
    steps = 1_000 if method == "laeo" else 6_000  # ORIL's values need 4,000
    given = {"FetchReachImage": f"--gradient-steps {steps}", "FetchPushImage": "--eval-interval 4000"}  # for curves
    quality = "--quality hard" if case.endswith("_hard") else ""
    return f"{method}.py --env-id {task} --seed {seed} {quality} {given.get(task, '')}"


def seeded(commands: dict[str, str], seeds: Iterable[int] = range(3)) -> dict[str, str]:
    """Return each command with each seed, by NAME-SEED."""
    return {f"{name}-{seed}": f"{command} --seed {seed}" for name, command in commands.items() for seed in seeds}


def tailo_script(name: str) -> str:
    """Return what a setting of TAILO's search is made from: TAILO's first setting, or the oracle beside it."""
    return "bc.py --only-solved" if name == "oracle" else f"tailo.py {TAILO_BASE}"


def experiments() -> dict[str, dict[str, list[str]]]:
    """Return the arguments of python for every run, by experiment and name."""
    data = {task: f"collect_data.py --env-id {task} --overwrite" for task in common.TASKS}
    data |= {name: f"collect_data.py {given} --overwrite" for name, given in DATA.items()}
    state = {
        f"{method}-{task}-{seed}": f"{method}.py --env-id {task} --seed {seed} {flags(method, task)}"
        for task in STATE_TASKS
        for method in METHODS
        for seed in SEEDS.get(task, range(3))
    }
    hard = {
        f"{method}-{task}-{seed}": f"{method}.py --env-id {task} --quality hard --seed {seed} {flags(method, task)}"
        for task in ("FetchReach", "FetchPush")
        for method in METHODS
        for seed in range(3)
    }
    examples = {  # with another seed the examples are other ones too
        f"{method}-{n}-{seed}": f"{method}.py --env-id FetchPush --num-success {n} --seed {seed}"
        for n in (100, 10, 1)
        for method in METHODS[:-1]  # BC sees no examples
        for seed in range(3)
    }
    sizes = {
        f"{method}-{n}-{seed}": f"{method}.py --env-id FetchPush --dataset datasets/FetchPush-{n}-medium --seed {seed}"
        for n in (400, 31271)
        for method in METHODS
        for seed in range(3)
    }
    settings = {
        f"{name}-{seed}": f"laeo.py --env-id FetchPush --seed {seed} {given}"
        for name, given in SETTINGS.items()
        for seed in range(3)
    }
    bandwidth = {
        f"laeo-{n}-{seed}": f"laeo.py {SEARCH_FLAGS} --num-success {n} --seed {seed}"
        for n in (200, 10, 1)
        for seed in (*SEARCH_SEEDS, 103)  # with few examples runs differ more
    }
    tailo = {}  # to be compared with the other methods in `state` and `examples`
    for seed in range(3):
        for task in STATE_TASKS:
            for method, command in (("tailo", "tailo.py"), ("oracle", "bc.py --only-solved")):
                given = f"--env-id {task} --seed {seed} {flags('bc', task)}"
                tailo[f"{method}-{task}-{seed}"] = f"{command} {given}"
        for n in (10, 1):
            tailo[f"tailo-{n}-{seed}"] = f"tailo.py --env-id FetchPush --num-success {n} --seed {seed}"
    tailo_search = {
        f"{name}-{seed}": f"{tailo_script(name)} {SEARCH_FLAGS} --seed {seed} {given}"
        for name, given in TAILO_SEARCH.items()
        for seed in SEARCH_SEEDS[:2]
    }
    tried = json.loads((Path(__file__).parent / "search.json").read_text()).items()
    search = seeded({name: f"search/{setting['command']} {SEARCH_FLAGS}" for name, setting in tried}, SEARCH_SEEDS)
    contrastive_rl = seeded({name: f"contrastive_rl.py {given}" for name, given in CONTRASTIVE_RL.items()})
    given = {name: f"contrastive_rl.py {flags}" for name, flags in CONTRASTIVE_RL_SEARCH.items()}
    contrastive_rl_search = seeded(given, SEARCH_SEEDS[:1])
    cvl = seeded({name: f"{command} --env-id FetchPush" for name, command in CVL.items()})
    goals = seeded({name: f"benchmark/run.py --goal {name} --env-id FetchPush" for name in ("cvl", "bc")})
    random = {task: f"benchmark/run.py --random --env-id {task}" for task in STATE_TASKS}
    behavior = {task: f"benchmark/run.py --behavior --env-id {task}" for task in STATE_TASKS}
    images = {
        f"{method}-{case}-{seed}": image_command(method, case, seed)
        for case, seeds in IMAGES.items()
        for method in (*METHODS, "tailo")
        for seed in range(seeds)
    }
    image_examples = {  # 200 are among images
        f"{method}-{n}-{seed}": f"{method}.py --env-id FetchPushImage --num-success {n} --seed {seed}"
        for n in (10, 1)
        for method in METHODS[:-1]
        for seed in range(3)
    }
    image_objectives = {  # to be compared with image_examples
        f"{name}-{n}": f"laeo.py --env-id FetchPushImage --num-success {n} {flags}"
        for n, name, flags in (
            (10, "nearest", "--policy-objective nearest"),
            (1, "nearest-0.05", "--nearest-share 0.05"),
            (1, "log_exp_f", "--policy-objective log_exp_f"),
        )
    }
    tried = {name: f"{command} {BASELINE_IMAGES_FLAGS}" for name, command in BASELINE_IMAGES.items()}
    baseline_images = seeded(tried, SEARCH_SEEDS[:1])
    reach = "oril.py --env-id FetchReachImage --quality hard --gradient-steps 6000 --eval-interval 2000"
    oril_reach = seeded({"default": reach}, SEARCH_SEEDS[:1])  # how many steps ORIL needs there
    image_sizes = {  # 4,000 episodes are among images
        f"{method}-12000-{seed}": f"{method}.py --env-id FetchPushImage {LARGE_IMAGES} --seed {seed}"
        for method in ("laeo", "bc")
        for seed in range(2)
    }
    gpu = {}
    for task in ("FetchPushImage", "FetchPushImageOccluded"):
        name = f"{task}-{GPU_EPISODES}"
        gpu[name] = f"collect_data.py --env-id {task} --num-episodes {GPU_EPISODES} --overwrite"
        for method in ("laeo", "oril"):
            for n in (200, 10, 1) if task == "FetchPushImage" else (200,):
                command = f"{method}.py --env-id {task} --dataset datasets/{name}-medium --num-success {n} {GPU}"
                gpu[f"{method}-{task}-{n}"] = command
    gpu_speed = {
        method: f"{method}.py --env-id FetchPushImage {GPU_SIZES} --gradient-steps 3000 --eval-episodes 0"
        for method in ("laeo", "oril")
    }
    runs = {"data": data, "state": state, "hard": hard, "examples": examples, "sizes": sizes, "settings": settings}
    runs |= {"bandwidth": bandwidth, "search": search, "random": random, "behavior": behavior}
    runs |= {"tailo": tailo, "tailo_search": tailo_search, "contrastive_rl": contrastive_rl}
    runs |= {"contrastive_rl_search": contrastive_rl_search, "cvl": cvl, "goals": goals}
    runs |= {"images": images, "image_examples": image_examples, "image_sizes": image_sizes}
    runs |= {"gpu": gpu, "gpu_speed": gpu_speed}
    runs |= {"image_objectives": seeded(image_objectives), "baseline_images": baseline_images, "oril_reach": oril_reach}
    return {name: {run: command.split() for run, command in commands.items()} for name, commands in runs.items()}


def write_json(path: Path, content: dict) -> None:
    """Write a file whole or not at all."""
    with common.write_file(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def play(act: Callable, env_id: str, episodes: int, seed: int, method: str, run_dir: Path) -> None:
    """Write a result.json of a function from observations to actions, on the starts of evaluations with this seed."""
    import evaluate  # which takes seconds

    played, _ = evaluate.play(act, env_id, episodes, seed)
    result = common.summarise(played) | {"episodes": played, "method": method, "args": {"env_id": env_id}}
    write_json(run_dir / "result.json", result)


def play_randomly(env_id: str, run_dir: Path) -> None:
    """Write a result.json of uniformly random actions, on the starts of every evaluation with seed 0."""
    env = common.make_env(env_id)
    env.action_space.seed(0)
    play(lambda observation: env.action_space.sample(), env_id, 100, 0, "random", run_dir)
    env.close()


def play_behavior(env_id: str, run_dir: Path) -> None:
    """Write a result.json of the best policy that made the data, without its noise, on 300 starts of seed 100."""
    import torch

    from episodes import load_behavior

    actors, rates = load_behavior(ROOT / "behavior" / f"{env_id}.pt", env_id)
    actor, goal = actors[rates.index(max(rates))], torch.tensor(common.TASKS[env_id].desired_goal)

    @torch.inference_mode()
    def act(observation: np.ndarray) -> np.ndarray:
        return actor.sample(torch.from_numpy(observation), goal, torch.zeros(())).numpy()

    play(act, env_id, 300, SEARCH_SEEDS[0], "behavior", run_dir)


def reach_goal(method: str, env_id: str, seed: int, run_dir: Path) -> None:
    """Write a result.json of GOAL: of CVL's policy for it, whose critic a run for the task's own goal trained, or BC's.

    BC clones the data, whatever the goal is.
    """
    import bc
    import cvl
    import evaluate

    script, first = {"cvl": cvl, "bc": bc}[method], run_dir.with_name(f"{run_dir.name}-first")
    script.train(script.Args(env_id=env_id, seed=seed, eval_episodes=0, run_dir=first))
    if method == "cvl":
        goal = {"critic": str(first), "reward_goal": GOAL}
        cvl.train(cvl.Args(env_id=env_id, seed=seed, eval_interval=0, run_dir=run_dir, **goal))
    else:
        played, _ = evaluate.play(evaluate.load_policy(first)[0], env_id, 100, seed, goal=GOAL)
        trained = json.loads((first / "result.json").read_text())
        write_json(run_dir / "result.json", trained | common.summarise(played) | {"episodes": played})


def archive(source: Path, target: Path) -> None:
    """Copy a result.json or a metadata.json to the results; of paths among its flags only the last part is kept."""
    result, metrics = json.loads(source.read_text()), source.parent / "metrics.jsonl"
    if metrics.exists():
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        kinds = "success_rate", "final_success_rate"
        result["curve"] = [
            {"step": line["step"]} | {kind: line[f"eval/{kind}"] for kind in kinds}
            for line in lines
            if "eval/success_rate" in line
        ]
    for flag in ("dataset", "run_dir", "critic"):
        if path := result.get("args", {}).get(flag):
            result["args"][flag] = Path(path).name
    write_json(target, result | {"made": made(result.get("gpu"))})


def dataset(name: str) -> Path:
    """Return where the experiments look for a dataset; its name is the task's for the standard one."""
    return ROOT / "datasets" / (name if name.endswith("-hard") else f"{name}-medium")


def needed(command: list[str]) -> Path | None:
    """Return the dataset that a run reads, if it reads one and names it."""
    if "--dataset" in command:
        return ROOT / command[command.index("--dataset") + 1]
    tasks = [task for task in common.TASKS if task in command]
    trains = command[0] not in ("collect_data.py", "benchmark/run.py") or "--goal" in command
    if not trains or not tasks:
        return None
    return dataset(tasks[0] + "-hard" * ("hard" in command))


def extract(commit: str, directory: str | Path, what: str, root: Path = ROOT) -> None:
    """Put the files of a commit into a directory. Raises common.UserError, about `what`, without git or the history."""
    try:
        archived = subprocess.run(["git", "archive", commit], cwd=root, capture_output=True, check=True).stdout
        subprocess.run(["tar", "x", "-C", directory], input=archived, check=True)
    except (OSError, subprocess.CalledProcessError):
        reason = f"{what} needs git and commit {commit}; use a clone with the whole history."
        raise common.UserError(reason) from None


@functools.cache
def search_directory() -> Path:
    """Make a copy of SEARCH_COMMIT with benchmark/search.patch. Raises common.UserError without the history."""
    directory = Path(tempfile.mkdtemp(prefix="benchmark-search-"))
    extract(SEARCH_COMMIT, directory, "the experiment search")
    subprocess.run(["git", "apply", ROOT / "benchmark" / "search.patch"], cwd=directory, check=True)
    return directory


def prepare(target: Path, command: list[str]) -> tuple[list[str], Path]:
    """Return what is given to python for a run, but for its `--run-dir`, and the directory to run it in."""
    if command[0] == "collect_data.py":
        return [*command, "--output", str(dataset(target.stem).relative_to(ROOT))], ROOT
    if command[0].startswith("search/"):
        own = [command[0].removeprefix("search/"), *command[1:], "--dataset", str(needed(command))]
        return own, search_directory()
    return command, ROOT


def start(command: list[str], directory: Path, run_dir: Path) -> subprocess.Popen:
    """Start a run that writes to `run_dir`, and what it prints to a file of that name and `.log`."""
    output = [] if command[0] == "collect_data.py" else ["--run-dir", str(run_dir)]
    with open(run_dir.with_suffix(".log"), "w") as log:
        streams = {"stdout": log, "stderr": subprocess.STDOUT, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
        return subprocess.Popen([sys.executable, *command, *output], cwd=directory, **streams)


def run_all(todo: list[tuple[Path, list[str]]], jobs: int, ray: str | None = None) -> list[tuple[list[str], Path]]:
    """Run commands, `jobs` at a time, and archive their results; return those that failed, with their messages.

    `ray` is the address of a Ray cluster to run them on. Raises UserError if it is lost.
    """
    if ray:
        try:
            from on_ray import Cluster, Task
        except ImportError:
            raise common.UserError("--ray needs Ray; install it with: pip install ray") from None
        cluster = Cluster(ray)
    todo, running, failed = list(todo), [], []
    progress = tqdm(total=len(todo), unit="run", smoothing=0, disable=None)  # nothing without a terminal
    try:
        while todo or running:
            # A dataset is made with all cores, and the next run may need it: nothing starts beside it.
            while todo and len(running) < jobs and not any(run[2][0] == "collect_data.py" for run in running):
                if running and todo[0][1][0] == "collect_data.py":
                    break
                target, command = todo.pop(0)
                run_dir = Path(tempfile.mkdtemp(prefix="benchmark-")) / target.stem
                progress.write(" ".join(["python", *command]))
                sys.stdout.flush()
                run = (Task if ray else start)(*prepare(target, command), run_dir)
                running.append((run, target, command, run_dir))
            ended = [run for run in running if run[0].poll() is not None]
            if ray:
                cluster.check()  # before what was lost with it counts as failed
            if not ended:
                time.sleep(1 if ray else 0.1)
            for process, target, command, run_dir in ended:
                running.remove((process, target, command, run_dir))
                if process.returncode == 0:
                    is_data = command[0] == "collect_data.py"
                    archive(dataset(target.stem) / "metadata.json" if is_data else run_dir / "result.json", target)
                else:
                    failed.append((command, run_dir.with_suffix(".log")))
                progress.update()
            state = f"{len(running)} {'at Ray' if ray else 'running'}, {len(failed)} failed"
            progress.set_postfix_str(state)
            if ended and progress.disable:
                print(
                    f"{progress.total - len(todo) - len(running)} of {progress.total} runs ended, {state}", flush=True
                )
    except KeyboardInterrupt:  # which reaches the other processes too; they need a moment to leave nothing behind
        progress.close()
        print("\ninterrupted: waiting for the runs to end", file=sys.stderr)
        for process, *_ in () if ray else running:
            process.wait()
        raise
    finally:
        progress.close()
        if ray:
            cluster.stop([run[0] for run in running])
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names, on_gpu = ", ".join(experiments()), " and ".join(ON_GPU)
    parser.add_argument("experiments", nargs="*", help=f"which to run: {names}; all but {on_gpu} if none is named")
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    parser.add_argument("--redo", action="store_true", help="run also those that have a result, and replace it")
    parser.add_argument("--jobs", type=int, help="how many runs at a time: by default one, with --ray all")
    parser.add_argument("--ray", metavar="ADDRESS", help="run on this Ray cluster, HOST:PORT or auto; see above")
    parser.add_argument("--only", default="", help="run only those whose name contains this")
    parser.add_argument("--random", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--behavior", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--goal", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--env-id", help=argparse.SUPPRESS)
    parser.add_argument("--run-dir", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.random:
        return play_randomly(args.env_id, args.run_dir)
    if args.behavior:
        return play_behavior(args.env_id, args.run_dir)
    if args.goal:
        return reach_goal(args.goal, args.env_id, args.seed, args.run_dir)
    if unknown := set(args.experiments) - set(experiments()):
        sys.exit(f"error: there is no experiment {sorted(unknown)[0]}; choose from {names}.")
    if args.jobs is not None and args.jobs < 1:
        sys.exit(f"error: --jobs is {args.jobs}; it must be 1 or more.")
    todo = []
    for experiment in args.experiments or [name for name in experiments() if name not in ON_GPU]:
        for name, command in experiments()[experiment].items():
            target = RESULTS / experiment / f"{name}.json"
            if args.only not in name:
                continue
            done = target.exists() and (command[0] != "collect_data.py" or dataset(name).exists())
            if args.list:
                print("done " if done else "to do", experiment.ljust(14), "python", " ".join(command))
            elif args.redo or not done:
                todo.append((target, command))
    made = {dataset(target.stem) for target, command in todo if command[0] == "collect_data.py"}
    for _, command in todo:  # a method would make a missing dataset itself, and so would the one that runs beside it
        missing = needed(command)
        if missing and missing not in made and not missing.exists():
            where = missing.relative_to(ROOT) if missing.is_relative_to(ROOT) else missing
            sys.exit(f"error: there is no {where}; make it with: python benchmark/run.py data")
    if args.ray and any(command[0].startswith("search/") for _, command in todo):
        sys.exit("error: the experiment search runs an earlier commit, which the cluster lacks; run it without --ray.")
    try:
        failed = run_all(todo, args.jobs or (len(todo) if args.ray else 1), args.ray)
    except KeyboardInterrupt:
        sys.exit("error: interrupted; what is done stays done.")
    for command, log in failed:
        print(f"failed: python {' '.join(command)} (its messages: {log})", file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    with common.user_errors():
        main()
