"""Print the README's tables from benchmark/results/, or put them into README.md with --write.

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
    """Format the rate of all episodes of some runs, with its interval and, for several seeds, each seed's rate."""
    values = np.concatenate([run["episodes"][kind] for run in runs])
    low, high = common.wilson_interval(int(values.sum()), len(values))
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"


def seeds(runs: list[dict]) -> str:
    """Format each seed's any-step success rate."""
    return ", ".join(f"{run['success_rate']:.2f}" for run in runs)


def minutes(runs: list[dict]) -> str:
    """Format the time of training, the median over the runs."""
    return f"{np.median([run['seconds']['training'] for run in runs]) / 60:.1f}"


def state_table() -> str:
    """LAEO on the state tasks, beside random actions and the dataset's own episodes."""
    runs, random = load("state"), load("random")
    datasets = json.loads((RESULTS / "datasets.json").read_text())
    lines = [
        "| task | LAEO, any step | each seed | LAEO, last step | dataset, any / last step | random actions "
        "| solved starts | steps | training, minutes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for env_id in common.TASKS:
        mine = [run for name, run in runs.items() if name.rsplit("-", 1)[0] == env_id]
        data = datasets[f"{env_id}-medium"]
        lines.append(
            f"| {env_id} | **{rate(mine, 'success')}** | {seeds(mine)} | {rate(mine, 'final_success')} "
            f"| {data['success_rate']:.3f} / {data['final_success_rate']:.3f} | {random[env_id]['success_rate']:.3f} "
            f"| {np.mean([run['initial_success_rate'] for run in mine]):.3f} | {mine[0]['gradient_steps']:,} "
            f"| {minutes(mine)} |"
        )
    return "\n".join(lines)


def examples_table() -> str:
    """FetchPush with fewer success examples."""
    few, many = load("examples"), load("state")
    lines = ["| success examples | any step | each seed | last step |", "|---|---|---|---|"]
    for n in (200, 10, 1):
        mine = [many[f"FetchPush-{s}"] for s in range(3)] if n == 200 else [few[f"FetchPush-{n}-{s}"] for s in range(3)]
        lines.append(f"| {n} | {rate(mine, 'success')} | {seeds(mine)} | {rate(mine, 'final_success')} |")
    return "\n".join(lines)


def settings_table() -> str:
    """What the defaults were chosen from: FetchPush, 200 examples, one seed."""
    lines = ["| objective | bc_coef | | any step | last step | minutes |", "|---|---|---|---|---|---|"]
    runs = {"default": load("state")["FetchPush-0"], **load("settings")}
    for name, run in runs.items():
        note = {"default": "default", "f-0.5-released-code": "released code", "exp_f-0.05-paper": "paper"}.get(name, "")
        lines.append(
            f"| {run['args']['policy_objective']} | {run['args']['bc_coef']} | {note} | {rate([run], 'success')} "
            f"| {rate([run], 'final_success')} | {minutes([run])} |"
        )
    return "\n".join(lines)


def data_table() -> str:
    """The datasets that the commands in the README make."""
    lines = ["| dataset | episodes | any step | last step | solved starts |", "|---|---|---|---|---|"]
    for name, data in json.loads((RESULTS / "datasets.json").read_text()).items():
        low, high = data["success_interval"]
        lines.append(
            f"| {name} | {data['num_episodes']:,} | {data['success_rate']:.3f} [{low:.3f}, {high:.3f}] "
            f"| {data['final_success_rate']:.3f} | {data['initial_success_rate']:.3f} |"
        )
    return "\n".join(lines)


def behavior_table() -> str:
    """The policies in behavior/, from untrained to the end of training."""
    lines = [
        "| task | environment steps | training, minutes | any-step success of the checkpoints |",
        "|---|---|---|---|",
    ]
    for env_id in common.TASKS:
        behavior = common.load_weights(ROOT / "behavior" / f"{env_id}.pt")
        rates = ", ".join(f"{checkpoint['success_rate']:.2f}" for checkpoint in behavior["checkpoints"])
        lines.append(
            f"| {env_id} | {behavior['args']['train_steps']:,} | {behavior['train_seconds'] / 60:.0f} | {rates} |"
        )
    return "\n".join(lines)


TABLES = {
    "state": state_table, "examples": examples_table, "settings": settings_table, "data": data_table,
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
