"""Print the README's tables from benchmark/results/, or put them into README.md with --write.

A row whose results are missing is left out.

An interval is the 95 % Wilson interval of all episodes of all seeds together; the spread over seeds is given beside it.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
sys.path.insert(0, str(ROOT))
import common  # noqa: E402


def load(experiment: str) -> dict[str, dict]:
    """Return the results of an experiment by run name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((RESULTS / experiment).glob("*.json"))}


def rate(runs: list[dict], kind: str) -> str:
    """Format the rate of all episodes of some runs with its interval."""
    values = np.concatenate([run["episodes"][kind] for run in runs])
    low, high = common.wilson_interval(int(values.sum()), len(values))
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"


def seeds(runs: list[dict], kind: str = "success") -> str:
    """Format each seed's rate."""
    return ", ".join(f"{run[f'{kind}_rate']:.2f}" for run in runs)


def minutes(runs: list[dict]) -> str:
    """Format the time of training, the median over the runs."""
    return f"{np.median([run['seconds']['training'] for run in runs]) / 60:.1f}"


STATE_TASKS = [env_id for env_id, task in common.TASKS.items() if task.state_task is None]
METHODS = {"laeo": "LAEO", "oril": "ORIL", "purl": "PURL", "bc": "BC"}


def of_task(runs: dict[str, dict], method: str, env_id: str) -> list[dict]:
    """Return the runs of one method on one task."""
    return [run for name, run in runs.items() if name.rsplit("-", 1)[0] == f"{method}-{env_id}"]


def state_table() -> str:
    """All methods on the state tasks."""
    runs = load("state")
    lines = ["| task | method | any step | each seed | last step | each seed | steps | minutes |", "|---" * 8 + "|"]
    for env_id in STATE_TASKS:
        for method, name in METHODS.items():
            mine = of_task(runs, method, env_id)
            if not mine:
                continue
            lines.append(
                f"| {env_id} | {name} | **{rate(mine, 'success')}** | {seeds(mine)} | {rate(mine, 'final_success')} "
                f"| {seeds(mine, 'final_success')} | {mine[0]['gradient_steps']:,} | {minutes(mine)} |"
            )
    return "\n".join(lines)


def images_table() -> str:
    """The tasks of images, as far as they have been run, with the datasets' own success."""
    runs, datasets = load("images"), load("data")
    lines = [
        "| task | method | any step | each seed | last step | steps | minutes | dataset, any step |",
        "|---" * 8 + "|",
    ]
    for env_id in common.VIEWS:
        for method, name in METHODS.items():
            mine = of_task(runs, method, env_id)
            if mine:
                lines.append(
                    f"| {env_id} | {name} | **{rate(mine, 'success')}** | {seeds(mine)} "
                    f"| {rate(mine, 'final_success')} | {mine[0]['gradient_steps']:,} | {minutes(mine)} "
                    f"| {datasets[env_id]['success_rate']:.3f} |"
                )
    return "\n".join(lines)


def image_search_table() -> str:
    """Evaluations of runs on FetchPushImage, most of them stopped early, and of its state twin."""
    lines = ["| command | commit | episodes | any step, after so many steps |", "|---|---|---|---|"]
    path = RESULTS / "image_search.json"
    for run in json.loads(path.read_text()) if path.exists() else []:
        rates = ", ".join(f"{success:.2f} ({int(step):,})" for step, success in run["success_rate_after_step"].items())
        lines.append(f"| `{run['command']}` | {run['commit']} | {run['episodes']} | {rates} |")
    return "\n".join(lines)


def tasks_table() -> str:
    """What the results are to be seen beside: the datasets' own episodes, random actions, starts that are solved."""
    runs, random, datasets = load("state"), load("random"), load("data")
    lines = [
        "| task | dataset, any / last step | random actions, any step | solved starts |",
        "|---|---|---|---|",
    ]
    for env_id in STATE_TASKS:
        mine, data = of_task(runs, "laeo", env_id), datasets.get(env_id)
        if not mine or data is None or env_id not in random:
            continue
        lines.append(
            f"| {env_id} | {data['success_rate']:.3f} / {data['final_success_rate']:.3f} "
            f"| {random[env_id]['success_rate']:.3f} | {np.mean([run['initial_success_rate'] for run in mine]):.3f} |"
        )
    return "\n".join(lines)


def tuning_table() -> str:
    """What was searched for the methods that LAEO is compared with: FetchPush, a seed of its own, as of 715b0c3."""
    flags = ["alpha", "eta", "learning_rate", "reward_learning_rate", "gradient_steps"]
    lines = [f"| method | {' | '.join(flags)} | any step | last step |", "|---" * (len(flags) + 3) + "|"]
    for run in sorted(
        load("tuning").values(), key=lambda run: (list(METHODS).index(run["method"]), -run["success_rate"])
    ):
        values = " | ".join(f"{run['args'][flag]:,}" if flag in run["args"] else "" for flag in flags)
        lines.append(
            f"| {METHODS[run['method']]} | {values} | {rate([run], 'success')} | {rate([run], 'final_success')} |"
        )
    return "\n".join(lines)


def examples_table() -> str:
    """FetchPush with fewer success examples."""
    few, many = load("examples"), load("state")
    lines = ["| success examples | steps | any step | each seed | last step |", "|---|---|---|---|---|"]
    for n in (200, 10, 1):
        name = "laeo-FetchPush-" if n == 200 else f"FetchPush-{n}-"
        mine = [run for run_name, run in {**many, **few}.items() if re.fullmatch(name + r"\d", run_name)]
        if not mine:
            continue
        steps = f"{mine[0]['gradient_steps']:,}"
        lines.append(f"| {n} | {steps} | {rate(mine, 'success')} | {seeds(mine)} | {rate(mine, 'final_success')} |")
    return "\n".join(lines)


def settings_table() -> str:
    """Other settings than the default: FetchPush, 200 examples, one seed, as many gradient steps."""
    flags = ["policy_objective", "bc_coef", "learning_rate", "batch_size", "hidden_dim"]
    lines = [
        f"| | {' | '.join(flags)} | any step | last step | minutes |",
        "|---" * (len(flags) + 4) + "|",
    ]
    names = {"objective-paper": "the paper's objective", "objective-released-code": "the released code's objective"}
    defaults = [("default", run) for name, run in load("state").items() if name == "laeo-FetchPush-0"]
    for name, run in [*defaults, *load("settings").items()]:
        note = "**default**" if name == "default" else names.get(name, "")
        values = " | ".join(str(run["args"][flag]) for flag in flags)
        lines.append(
            f"| {note} | {values} | {rate([run], 'success')} | {rate([run], 'final_success')} | {minutes([run])} |"
        )
    return "\n".join(lines)


def data_table() -> str:
    """The datasets of the experiments."""
    lines = ["| dataset | episodes | any step | last step | solved starts |", "|---|---|---|---|---|"]
    for data in load("data").values():
        low, high = data["success_interval"]
        lines.append(
            f"| {data['env_id']}-{data['quality']} | {data['num_episodes']:,} | {data['success_rate']:.3f} "
            f"[{low:.3f}, {high:.3f}] | {data['final_success_rate']:.3f} | {data['initial_success_rate']:.3f} |"
        )
    return "\n".join(lines)


def behavior_table() -> str:
    """The policies in behavior/, from untrained to the end of training."""
    lines = [
        "| task | environment steps | training, minutes | any-step success of the checkpoints |",
        "|---|---|---|---|",
    ]
    for env_id in STATE_TASKS:
        behavior = common.load_weights(ROOT / "behavior" / f"{env_id}.pt")
        rates = ", ".join(f"{checkpoint['success_rate']:.2f}" for checkpoint in behavior["checkpoints"])
        lines.append(
            f"| {env_id} | {behavior['args']['train_steps']:,} | {behavior['train_seconds'] / 60:.0f} | {rates} |"
        )
    return "\n".join(lines)


TABLES = {
    "state": state_table, "images": images_table, "image_search": image_search_table, "tasks": tasks_table,
    "tuning": tuning_table, "examples": examples_table, "settings": settings_table, "data": data_table,
    "behavior": behavior_table,
}  # fmt: skip


def fill(readme: str) -> str:
    """Return the README with every table between `<!-- NAME -->` and `<!-- end -->` made new."""
    return re.sub(
        r"<!-- (\w+) -->\n.*?<!-- end -->",
        lambda match: f"<!-- {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->",
        readme,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        with common.write_file(ROOT / "README.md") as temporary:
            temporary.write_text(fill((ROOT / "README.md").read_text()))
    else:
        for name, table in TABLES.items():
            print(f"{name}\n\n{table()}\n")
