"""Print the tables of benchmark/results/; with --write, put them into README.md and docs/*.md.

    python benchmark/report.py
    python benchmark/report.py --write

A table stands in a text between `<!-- NAME -->` and `<!-- end -->`. A row whose results are missing is left out.

Intervals are 95 % intervals over training seeds and evaluation episodes, from a two-level bootstrap: 10,000 times, as
many seeds as there are are drawn with replacement, within each drawn seed as many of its distinct episodes, and the
rate is the mean over the drawn seeds of the mean over their episodes; the interval is from the 2.5th to the 97.5th
percentile. The random numbers have a fixed seed, so that the same results give the same table.

- Equal episodes of a run count once, in rates as in intervals: the 100 episodes of FetchReach, which has one start, are
  one. (Results from before runs said which episodes are equal: those of a run of FetchReach are, all others differ.)
- Where all outcomes are the same, resampling shows no width. The interval is then Wilson's, of all distinct episodes:
  it takes them to be independent. Three seeds of FetchReach count three.
- A difference between two methods: the same bootstrap of both, each resampled on its own. (Runs with the same seed have
  the same starts; to pair them would narrow the interval where the same starts are hard for both methods.) If all
  outcomes of one of the methods are the same, their own intervals are combined by Newcombe's formula instead.
- The search compares each setting with the one it was made from, on the same seeds and the same starts. Its intervals
  are of paired differences: seeds are resampled, and within each its pairs of episodes.
- One seed says nothing about other seeds, and its interval speaks of other starts alone. Three seeds say little. In
  simulations with 100 episodes for each seed, and a rate of 0.8 whose standard deviation over seeds is 0.03 / 0.1, the
  interval held the rate in 0.96 / 0.79 of the cases with 3 seeds, 0.97 / 0.88 with 5, and 0.98 / 0.92 with 10.
"""

import functools
import json
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
sys.path.insert(0, str(ROOT))
import common  # noqa: E402

STATE_TASKS = [env_id for env_id, task in common.TASKS.items() if task.state_task is None]
METHODS = {"laeo": "LAEO", "oril": "ORIL", "purl": "PURL", "bc": "BC", "tailo": "TAILO"}
IMAGE_TASKS = ["FetchReachImage", "FetchReachImage_hard", "FetchPushImage", "FetchPushImageOccluded"]  # _hard: the data
STANDARD = {  # runs that are a case of these experiments too: where they are, of what task, the case, which methods
    "examples": ("state", "FetchPush", "200", ("laeo", "oril", "purl")),
    "sizes": ("state", "FetchPush", "4000", ("laeo", "oril", "purl", "bc")),
    "image_examples": ("images", "FetchPushImage", "200", ("laeo", "oril", "purl")),
    "image_sizes": ("images", "FetchPushImage", "4000", ("laeo", "bc")),
}
DIFFERENCES = {  # how the cases of an experiment are called in the tables of differences
    "differences": {
        "state": "{}",
        "hard": "{}, hard data",
        "examples": "FetchPush, success examples: {}",
        "sizes": "FetchPush, episodes: {}",
    },
    "image_differences": {
        "images": "{}",
        "image_examples": "FetchPushImage, success examples: {}",
        "image_sizes": "FetchPushImage, episodes: {}",
    },
}
CRITIC_LOSSES = {"nce": "NCE", "cpc": "CPC", "c_learning": "C-learning", "nce_c_learning": "NCE + C-learning"}
CRITIC_LOSSES |= {"gcbc": "none (cloning)"}
CVL = {
    "marginal": "CVL, `marginal`", "rff": "CVL, `rff`", "released": "CVL, `released`",
    "oracle": "TD3+BC on the true success flag, an oracle",
}  # fmt: skip
GOALS = {"cvl": "CVL, the policy trained again", "bc": "BC"}
KINDS = ("success", "final_success")  # at any step after the first action, and at the last step
RESAMPLES = 10_000
INTERVALS = (
    "Brackets: 95 % intervals from a bootstrap that resamples seeds and, within each, its distinct episodes; Wilson's "
    "interval of all distinct episodes where their outcomes are all the same."
)
MEASURED = "any step | last step | each seed, any / last | steps | minutes"
MINUTES = "Minutes: of training, the median over seeds, with one thread and beside other work."


# ----------------------------------------------------------------------------------------------------------- intervals


def outcomes(run: dict, kind: str) -> np.ndarray:
    """Return the outcomes [episodes] of a run, 0.0 or 1.0, one for each distinct episode."""
    episodes = run["episodes"]
    same = run.get("args", {}).get("env_id", "").startswith("FetchReach")  # matters for results without the key
    number = episodes.get("episode", [0 if same else i for i in range(len(episodes[kind]))])
    once = np.unique(number, return_index=True)[1]
    return np.array(episodes[kind], float)[once]


def resample(seeds: list[np.ndarray], generator: np.random.Generator) -> np.ndarray:
    """Return rates [RESAMPLES] of the two-level bootstrap. `seeds` has the outcomes [episodes], 0 or 1, of each seed.

    How many of n outcomes drawn with replacement are 1 has the binomial distribution of n and their rate.
    """
    n, rates = np.array([len(x) for x in seeds]), np.array([x.mean() for x in seeds])
    drawn = generator.integers(len(seeds), size=(RESAMPLES, len(seeds)))
    return (generator.binomial(n[drawn], rates[drawn]) / n[drawn]).mean(1)


def constant(seeds: list[np.ndarray]) -> bool:
    """Say whether all outcomes of all seeds are the same."""
    return len(np.unique(np.concatenate(seeds))) == 1


def rate_interval(seeds: list[np.ndarray]) -> tuple[float, float, float]:
    """Return the rate, the mean over seeds of their outcomes [episodes], and the ends of its 95 % interval."""
    from scipy.stats import binomtest  # which takes most of a second

    rate = float(np.mean([x.mean() for x in seeds]))
    if constant(seeds):
        pooled = np.concatenate(seeds)
        interval = binomtest(int(pooled.sum()), len(pooled)).proportion_ci(method="wilson")
        return rate, float(interval.low), float(interval.high)
    low, high = np.percentile(resample(seeds, np.random.default_rng(0)), [2.5, 97.5])
    return rate, float(low), float(high)


def difference_interval(first: list[np.ndarray], second: list[np.ndarray]) -> tuple[float, float, float]:
    """Return the rate of the first minus that of the second, and the ends of its 95 % interval."""
    (a, a_low, a_high), (b, b_low, b_high) = rate_interval(first), rate_interval(second)
    if constant(first) or constant(second):  # Newcombe's formula
        low = a - b - np.hypot(a - a_low, b_high - b)
        high = a - b + np.hypot(a_high - a, b - b_low)
    else:
        generator = np.random.default_rng(0)
        low, high = np.percentile(resample(first, generator) - resample(second, generator), [2.5, 97.5])
    return a - b, float(low), float(high)


# -------------------------------------------------------------------------------------------------------------- tables


def load(experiment: str) -> dict[str, dict]:
    """Return the results of an experiment by run name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((RESULTS / experiment).glob("*.json"))}


@functools.cache
def draws(seeds: int, episodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the seeds [RESAMPLES, seeds] of the paired bootstrap, and how often each has each pair [..., episodes]."""
    generator = np.random.default_rng(0)
    counts = generator.multinomial(episodes, np.full(episodes, 1 / episodes), size=(RESAMPLES, seeds))
    return generator.integers(seeds, size=(RESAMPLES, seeds)), counts.astype(float)


def paired_interval(first: list[np.ndarray], second: list[np.ndarray]) -> tuple[float, float, float]:
    """Return the mean of the first minus that of the second, and the ends of its 95 % interval.

    Both hold values [episodes] of the same seeds and the same starts, in the same order.
    """
    differences = np.stack(first) - np.stack(second)
    drawn, counts = draws(*differences.shape)
    means = counts @ differences.T / differences.shape[1]  # [RESAMPLES, seeds, seeds], the last one is drawn from
    means = np.take_along_axis(means, drawn[..., None], -1).mean((1, 2))
    return float(differences.mean()), *(float(x) for x in np.percentile(means, [2.5, 97.5]))


def of_task(runs: dict[str, dict], method: str, env_id: str) -> list[dict]:
    """Return the runs of one method on one task, one for each seed."""
    return [run for name, run in runs.items() if name.rsplit("-", 1)[0] == f"{method}-{env_id}"]


def rate(runs: list[dict], kind: str) -> str:
    """Format the rate of some runs, which differ in their seed alone, with its interval."""
    return "{:.3f} [{:.3f}, {:.3f}]".format(*rate_interval([outcomes(run, kind) for run in runs]))


def seeds(runs: list[dict]) -> str:
    """Format each seed's rates, any step / last step."""
    return ", ".join(" / ".join(f"{outcomes(run, kind).mean():.2f}" for kind in KINDS) for run in runs)


def measured(runs: list[dict]) -> list[str]:
    """Return the cells of runs of one setting: rates, those of each seed, gradient steps and minutes of training."""
    steps = runs[0].get("gradient_steps", runs[0]["args"]["gradient_steps"])  # an online agent's are not a flag
    on_cpu = [run for run in runs if "gpu" not in run]
    minutes = np.median([run["seconds"]["training"] for run in on_cpu or runs]) / 60
    rates = f"**{rate(runs, 'success')}**", rate(runs, "final_success")
    return [*rates, seeds(runs), f"{steps:,}", f"{minutes:.1f}" + ("" if on_cpu else " on a GPU")]


def table(caption: str, columns: str, rows: list[list[str]]) -> str:
    """Return a Markdown table below its caption; `columns` has the headings, with a bar between two."""
    heading = f"| {columns} |"
    lines = [heading, "|---" * (heading.count("|") - 1) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join([textwrap.fill(caption, 120), "", *lines])


def by_setting(experiment: str) -> dict[str, list[dict]]:
    """Return an experiment's runs by their names without the seeds."""
    found = {}
    for name, run in load(experiment).items():
        found.setdefault(name.rsplit("-", 1)[0], []).append(run)
    return found


def groups(experiment: str) -> list[tuple[str, dict[str, list[dict]]]]:
    """Return the cases of an experiment in order, each with its runs by method; a run's name is METHOD-CASE-SEED."""
    runs, found = load(experiment), {}
    for method in METHODS:
        for name, run in runs.items():
            if name.startswith(f"{method}-"):
                found.setdefault(name.split("-")[1], {}).setdefault(method, []).append(run)
    if experiment in STANDARD:
        where, task, case, methods = STANDARD[experiment]
        standard = load(where)
        found[case] = {method: mine for method in methods if (mine := of_task(standard, method, task))}
    if all(case.isdigit() for case in found):
        return sorted(found.items(), key=lambda case: -int(case[0]))
    return [(task, found[task]) for task in (*STATE_TASKS, *IMAGE_TASKS) if task in found]


def written(case: str) -> str:
    """Return how a case of an experiment is written: a number with commas, a task as it is, and its data if hard."""
    return f"{int(case):,}" if case.isdigit() else case.replace("_hard", ", hard data")


def methods_table(experiment: str, first_column: str, prefix: str = "") -> str:
    """Return the table of all methods in every case of an experiment whose name begins with `prefix`."""
    rows = []
    for case, methods in groups(experiment):
        for method, mine in methods.items() if case.startswith(prefix) else ():
            rows.append([written(case), METHODS[method], *measured(mine)])
    return table(f"{INTERVALS} {MINUTES}", f"{first_column} | method | {MEASURED}", rows)


def differences_table(names: dict[str, str]) -> str:
    """Return the table of LAEO's rates minus those of the other methods, in every case of the named experiments."""
    rows = []
    for experiment, name in names.items():
        for case, methods in groups(experiment):
            if experiment in STANDARD and case == STANDARD[experiment][2]:
                continue  # which are in the table already
            for method, other in methods.items():
                if method != "laeo" and "laeo" in methods:
                    pairs = [[[outcomes(run, kind) for run in x] for x in (methods["laeo"], other)] for kind in KINDS]
                    cells = ["{:+.3f} [{:+.3f}, {:+.3f}]".format(*difference_interval(*pair)) for pair in pairs]
                    rows.append([name.format(written(case)), f"LAEO - {METHODS[method]}", *cells])
    caption = (
        "Brackets: 95 % intervals from a bootstrap that resamples, for each of the two methods on its own, seeds and, "
        "within each, its distinct episodes; where all outcomes of one of the methods are the same, the methods' own "
        "intervals, combined by Newcombe's formula."
    )
    return table(caption, "case | difference | any step | last step", rows)


def settings_table() -> str:
    """Return the table of LAEO's own settings on FetchPush, with the defaults in the first rows."""
    cases, rows = {"default": of_task(load("state"), "laeo", "FetchPush")}, []
    cases |= {"default-31271": of_task(load("sizes"), "laeo", "31271")} | by_setting("settings")
    for name, mine in cases.items():
        if mine:
            args = mine[0]["args"]
            rows.append([name, args["dataset"], args["policy_objective"], f"{args['bc_coef']:g}"])
            rows[-1] += [*(rate(mine, kind) for kind in KINDS), seeds(mine)]
    columns = "setting | dataset | objective | bc_coef | any step | last step | each seed, any / last"
    return table(INTERVALS, columns, rows)


def objective_label(args: dict) -> str:
    """Format LAEO's objective of a run with these flags."""
    objective = args["policy_objective"]
    return f"`{objective}`, {args['nearest_share']:.0%}" if objective == "nearest" else f"`{objective}`"


def image_objectives_table() -> str:
    """Return the table of LAEO's objectives with few success examples of images."""
    rows, found, examples = [], by_setting("image_objectives"), dict(groups("image_examples"))
    for n in ("10", "1"):
        cases: dict[str, list[dict]] = {}
        others = [run for name, mine in found.items() if name.endswith(f"-{n}") for run in mine]
        for run in [*examples.get(n, {}).get("laeo", []), *others]:  # the default, and others
            cases.setdefault(objective_label(run["args"]), []).append(run)
        rows += [[n, label, *measured(mine)] for label, mine in sorted(cases.items())]
    return table(f"{INTERVALS} {MINUTES}", f"success examples | objective | {MEASURED}", rows)


def baseline_images_table() -> str:
    """Return the table of the settings that ORIL and PURL were tried with on FetchPushImage."""
    from run import BASELINE_IMAGES, BASELINE_IMAGES_FLAGS

    found, rows = by_setting("baseline_images"), []
    for name, command in BASELINE_IMAGES.items():
        if mine := found.get(name):
            each = ", ".join(str(run["args"]["seed"]) for run in mine)
            rows.append([name, f"`{command}`", *(rate(mine, kind) for kind in KINDS), each, seeds(mine)])
    caption = f"All with `{BASELINE_IMAGES_FLAGS}`. {INTERVALS} Of one seed they cover other starts alone."
    return table(caption, "setting | command | any step | last step | seeds | each seed, any / last", rows)


def cvl_table(experiment: str, names: dict[str, str]) -> str:
    """Return the table of an experiment, with a row for each of these settings."""
    found = by_setting(experiment)
    rows = [[text, *measured(found[name])] for name, text in names.items() if name in found]
    return table(f"{INTERVALS} {MINUTES}", f"method | {MEASURED}", rows)


def search_table() -> str:
    """Return the table of all settings that were tried, each minus the one that it was made from."""
    settings = json.loads((Path(__file__).parent / "search.json").read_text())
    kinds, rows, runs = (*KINDS, "discounted_return"), [], by_setting("search")
    found = {name: {run["args"]["seed"]: run for run in mine} for name, mine in runs.items()}
    for name, setting in settings.items():
        mine, other = found.get(name, {}), found.get(setting["minus"], {})
        if not mine:
            continue
        values = {kind: {seed: np.array(mine[seed]["episodes"][kind], float) for seed in mine} for kind in kinds}
        row = [name, f"`{setting['command']}`", str(len(mine))]
        row += [f"{np.mean([x.mean() for x in values[kind].values()]):.3f}" for kind in kinds]
        shared = sorted(mine.keys() & other.keys())
        row += [setting["minus"] if shared else ""]
        for kind in kinds:
            first = [values[kind][seed] for seed in shared]
            second = [np.array(other[seed]["episodes"][kind], float) for seed in shared]
            row.append("{:+.3f} [{:+.3f}, {:+.3f}]".format(*paired_interval(first, second)) if shared else "")
        rows.append(row)
    caption = (
        "Each setting on the same search seeds, 300 episodes each, and its difference from the setting that it was "
        "made from, on the same seeds and starts. Brackets: 95 % intervals from a bootstrap that resamples seeds and, "
        "within each, its pairs of episodes."
    )
    columns = "setting | command | seeds | any step | last step | discounted return"
    return table(caption, f"{columns} | minus | any step | last step | discounted return", rows)


def tailo_table() -> str:
    """Return the table of TAILO and of oracle cloning, beside the methods' runs of other experiments."""
    own, others, rows = load("tailo"), {"state": load("state"), "examples": load("examples")}, []
    methods = {"tailo": METHODS["tailo"]} | METHODS | {"oracle": "oracle: BC of solved episodes"}
    for case in (*STATE_TASKS, "10", "1"):
        for method, name in methods.items():
            runs = own if method in ("tailo", "oracle") else others["examples" if case.isdigit() else "state"]
            if mine := of_task(runs, method, case):
                rows.append([f"FetchPush, examples: {case}" if case.isdigit() else case, name, *measured(mine)])
    caption = (
        f"{INTERVALS} {MINUTES} Those of TAILO include its classifiers. Oracle: cloning of the episodes that end "
        "solved, which no method may know."
    )
    return table(caption, f"task | method | {MEASURED}", rows)


def tailo_search_table() -> str:
    """Return the table of the settings of TAILO that were tried."""
    from run import TAILO_BASE, TAILO_SEARCH

    found, rows = by_setting("tailo_search"), []
    for name in TAILO_SEARCH:
        if mine := found.get(name):
            cells = [rate(mine, kind) for kind in KINDS]
            cells.append(f"{np.mean([run['discounted_return'] for run in mine]):.2f}")
            given = "bc.py --only-solved" if name == "oracle" else TAILO_SEARCH[name] or TAILO_BASE
            rows.append([name, f"`{given}`", str(len(mine)), *cells, seeds(mine)])
    caption = (
        f"Settings on the search seeds 100 and 101, 300 episodes each. {INTERVALS} Two seeds say little of others: "
        "runs of one setting differ by 0.03 to 0.08."
    )
    columns = "setting | flags | seeds | any step | last step | discounted return | each seed, any / last"
    return table(caption, columns, rows)


def tasks_table() -> str:
    """Return what the results are to be compared with: the data, their best policy, random actions, solved starts."""
    runs, random, behavior, datasets, rows = load("state"), load("random"), load("behavior"), load("data"), []
    for env_id in STATE_TASKS:
        mine, data = of_task(runs, "laeo", env_id), datasets.get(env_id)
        if mine and data and env_id in random:
            rates = f"{data['success_rate']:.3f} / {data['final_success_rate']:.3f}"
            played = " / ".join(rate([random[env_id]], kind) for kind in KINDS)
            best = [behavior[env_id]] if env_id in behavior else []
            best = " / ".join(rate(best, kind) for kind in KINDS) if best else ""
            solved = f"{np.mean([run['initial_success_rate'] for run in mine]):.3f}"
            rows.append([env_id, rates, best, played, solved])
    caption = (
        "Any step / last step of the dataset, of the best of the policies that made it, played without noise on 300 "
        f"starts, and of random actions; the share of the evaluations' starts that are solved already. {INTERVALS}"
    )
    columns = "task | dataset, any / last | its best policy, any / last | random actions, any / last | solved starts"
    return table(caption, columns, rows)


def data_table() -> str:
    """Return the table of the experiments' datasets."""
    rows = []
    for data in sorted(load("data").values(), key=lambda data: (data["env_id"], data["quality"], data["num_episodes"])):
        cells = ["{:.3f} [{:.3f}, {:.3f}]".format(data[f"{kind}_rate"], *data[f"{kind}_interval"]) for kind in KINDS]
        name = f"{data['env_id']}-{data['quality']}"
        rows.append([name, f"{data['num_episodes']:,}", *cells, f"{data['initial_success_rate']:.3f}"])
    caption = "Brackets: 95 % Wilson intervals of the episodes."
    return table(caption, "dataset | episodes | any step | last step | solved starts", rows)


def behavior_table() -> str:
    """Return the table of the policies in behavior/, from untrained to the end of training."""
    import torch

    rows = []
    for env_id in STATE_TASKS:
        behavior = torch.load(ROOT / "behavior" / f"{env_id}.pt", weights_only=True, map_location="cpu")
        rates = [", ".join(f"{x[f'{kind}_rate']:.2f}" for x in behavior["checkpoints"]) for kind in KINDS]
        steps, minutes = behavior["args"]["train_steps"], behavior["train_seconds"] / 60
        rows.append([env_id, f"{steps:,}", f"{minutes:.0f}", *rates])
    caption = "Success rates of the checkpoints, from first to last, over `--calibration-episodes` episodes each."
    return table(caption, "task | environment steps | training, minutes | any step | last step", rows)


def contrastive_rl_table() -> str:
    """Return the table of contrastive RL: online with drawn goals, and offline with every loss."""
    cases, rows = by_setting("contrastive_rl"), []
    for name in ("online-FetchReach", *(f"offline-{loss}" for loss in CRITIC_LOSSES)):
        if mine := cases.get(name):
            mode, case = name.split("-")
            loss, task = ("nce", "FetchReach, drawn goals") if mode == "online" else (case, "FetchPush")
            rows.append([f"{mode}, {task}", CRITIC_LOSSES[loss], *measured(mine)])
    return table(f"{INTERVALS} {MINUTES}", f"setting | critic's loss | {MEASURED}", rows)


def contrastive_rl_search_table() -> str:
    """Return the table of the weights of cloning that contrastive RL was tried with, offline."""
    rows = []
    for runs in by_setting("contrastive_rl_search").values():
        args = runs[0]["args"]
        cells = [rate(runs, kind) for kind in KINDS]
        rows.append([CRITIC_LOSSES[args["critic_loss"]], f"{args['bc_coef']:g}", *cells, f"{args['seed']}"])
    caption = (
        f"Offline on FetchPush, 100 episodes. {INTERVALS} Of one seed they cover other starts alone, and not "
        "other seeds."
    )
    return table(caption, "critic's loss | weight of cloning | any step | last step | seed", rows)


def threads_table() -> str:
    """Return what benchmark/threads.py measured."""
    path, rows, caption = RESULTS / "threads.json", [], "Not measured yet: `python benchmark/threads.py`."
    if path.exists():
        result = json.loads(path.read_text())
        machine = "on {cores} cores of {cpu} with PyTorch {torch}".format(**result["machine"])
        rounds = "the median of {rounds} rounds of {seconds:g} s, and the smallest and the largest".format(**result)
        caption = f"Gradient steps of LAEO in a second, {machine}: {rounds}."
        for row in result["rows"]:
            cells = [row[side] for side in ("alone", "beside")]
            cells = [f"{np.median(x):.1f} ({min(x):.1f} to {max(x):.1f})" for x in cells]
            data = ", random numbers as data" if row["data"] == "random" else ""
            name = f"{row['env_id']}, batch {row['batch_size']}{data}"
            rows.append([name, str(row["threads"]), row["wait_policy"] or "not set", *cells])
    columns = "task | PyTorch threads | OMP_WAIT_POLICY | alone | beside one busy process"
    return table(caption, columns, rows)


def image_step_table() -> str:
    """Return what benchmark/image_step.py measured."""
    path, rows, caption = RESULTS / "image_step.json", [], "Not measured yet: `python benchmark/image_step.py`."
    if path.exists():
        result = json.loads(path.read_text())
        matrix = np.median([x for row in result["rows"] for x in row["matrix"]])
        machine = "on one thread of {cpu} ({cores} cores) with PyTorch {torch}".format(**result["machine"])
        rounds = "medians of {rounds} rounds of {seconds:g} s, and the smallest and the largest".format(**result)
        caption = (
            f"A training step of LAEO on images {machine}: {rounds}. `before` is commit {result['before']}. Share: the "
            f"step's operations in a CPU second against those of large matrix products, {matrix:.1f} GFLOP/s."
        )
        first = np.median(result["rows"][0]["cpu"])
        for row in result["rows"]:
            times = [1e3 * np.array(row[kind]) for kind in ("cpu", "wall")]
            cells = [f"{np.median(x):.1f} ({x.min():.1f} to {x.max():.1f})" for x in times]
            settings = [str(row[name]) for name in ("code", "objective", "batch_size", "random_shift")]
            cpu = np.median(row["cpu"])
            share = row["gflop"] / cpu / matrix
            rows.append([*settings, f"{row['gflop']:.2f}", *cells, f"{first / cpu:.2f}", f"{share:.2f}"])
    columns = "code | objective | batch | shift | GFLOP | CPU, ms | wall, ms | times as fast (CPU) | share"
    return table(caption, columns, rows)


def image_search_table() -> str:
    """Return the table of the settings that benchmark/image_search.py tried, each in the order of its list."""
    names = list(json.loads((Path(__file__).parent / "image_search.json").read_text()))
    found, rows = {}, []
    for run in load("image_search").values():
        found.setdefault((run["name"], run["device"], run["schedule"] == "steps"), []).append(run)
    for key in sorted(found, key=lambda key: (names.index(key[0]) if key[0] in names else len(names), *key)):
        name, device, _ = key
        mine = sorted(found[key], key=lambda run: run["args"]["seed"])
        differs = ", ".join(x if y is True else f"{x} {y}" for x, y in mine[0]["differs"].items())
        taken, asked = sorted({run["steps"] for run in mine}), mine[0]["settings"]["steps"]
        steps = " to ".join(f"{x:,}" for x in dict.fromkeys((taken[0], taken[-1])))
        steps += "" if taken == [asked] else f" of {asked:,}"
        each = ", ".join(str(run["args"]["seed"]) for run in mine)
        rows.append([name, differs, steps, device, *(rate(mine, kind) for kind in KINDS), each, seeds(mine)])
    caption = (
        f"Settings on FetchPushImage, on search seeds, 200 episodes each. {INTERVALS} Of one seed they cover other "
        "starts alone. Where fewer steps were taken than asked for, the learning rate fell to zero over the time of "
        "the run."
    )
    columns = "setting | what differs | steps | device | any step | last step | seeds | each seed, any / last"
    return table(caption, columns, rows)


def image_heads_table() -> str:
    """Return the table of the objectives that benchmark/heads.py compared on a frozen critic."""
    rows, found = [], by_setting("image_heads")
    for mine in sorted(found.values(), key=lambda mine: -mine[0]["args"]["num_success"]):
        args = mine[0]["args"]
        cells = [str(args["num_success"]), objective_label(args), f"{args['bc_coef']:g}"]
        cells.append("by value" if args["clone_by_value"] else "all alike")
        rows.append([*cells, *(rate(mine, kind) for kind in KINDS), seeds(mine)])
    columns = "success examples | objective | bc_coef | cloning | any step | last step | each seed, any / last"
    return table(f"Policies on a frozen critic, seeds 100 to 103, 50 episodes each. {INTERVALS}", columns, rows)


def gpu_speed_table() -> str:
    """Return speed and memory of training at the paper's sizes on a GPU."""
    rows = []
    for name, run in load("gpu_speed").items():
        steps = run["args"]["gradient_steps"]
        speed = steps / run["seconds"]["training"]
        cells = f"{steps:,}", f"{speed:.0f}", f"{run['peak_gpu_bytes'] / 1e9:.2f}", f"{250_000 / speed / 60:.0f}"
        rows.append([METHODS[name], run["gpu"], *cells])
    columns = "method | GPU | steps taken | steps in a second | peak memory, GB | minutes of 250,000 steps"
    caption = "The paper's sizes, without evaluations. 4,000 episodes of FetchPushImage are 2.5 GB of the memory."
    return table(caption, columns, rows)


def ratio_table() -> str:
    """Return what benchmark/ratio.py measured: means over seeds, with the smallest and the largest seed."""
    path = RESULTS / "ratio.json"
    result, rows = json.loads(path.read_text()) if path.exists() else {"noise": [], "rows": []}, []
    for n in dict.fromkeys(row["num_success"] for row in result["rows"]):
        mine = [row for row in result["rows"] if row["num_success"] == n]
        mean, inside = (np.array([row[name] for row in mine]) for name in ("mean", "in_solved"))  # [seeds, noises]
        cells = [f"{x.mean():.2f} ({x.min():.2f} to {x.max():.2f}) / {y.mean():.2f}" for x, y in zip(mean.T, inside.T)]
        rows.append([str(n), *cells])
    caption = (
        "Mean of p*/p over the states of the dataset, of ratios above 10 as 10 (in brackets the smallest and the "
        "largest of three seeds) / share of it that is in solved states."
    )
    return table(caption, " | ".join(["success examples", *(f"noise {noise:g}" for noise in result["noise"])]), rows)


def camera_table() -> str:
    """Return what each measure of the camera is worth, by results/camera.json: ratios of steps / of pictures."""
    path, rows = RESULTS / "camera.json", []
    result = (
        json.loads(path.read_text())
        if path.exists()
        else {"ratios": {}, "removed": {}, "what": "Not measured", "how": ""}
    )
    tasks = [env_id for env_id, task in common.TASKS.items() if task.state_task]
    removed = {f"{name} (removed)": ratios for name, ratios in result["removed"].items() if name != "how"}
    for name, ratios in {**result["ratios"], **removed}.items():
        cells = [ratios.get(task) for task in tasks]
        rows.append([name, *(f"{cell['steps']:.2f} / {cell['pictures']:.2f}" if cell else "" for cell in cells)])
    caption = f"{result['what'][0].upper()}{result['what'][1:]}: {result['how']}."
    return table(caption, " | ".join(["measure", *tasks]), rows)


SOURCES = {  # of each table: the command, and what it wrote to results/; other tables have an experiment of their name
    **{name: (f"run.py {' '.join(places)}", " ".join(places)) for name, places in DIFFERENCES.items()},
    "settings": ("run.py settings state sizes", "settings"),
    "tasks": ("run.py data random behavior state", "data random behavior"),
    "image_search": ("image_search.py", "image_search"),
    "image_heads": ("heads.py RUN_DIR", "image_heads"),
    "image_step": ("image_step.py", "image_step.json"),
    "threads": ("threads.py", "threads.json"),
    "ratio": ("ratio.py", "ratio.json"),
    "camera": ("camera.py", "camera.json"),
}


def made_table() -> str:
    """Return for every table the command that makes its results, their number, and where and when they were made."""
    rows = []
    for name in TABLES:
        if name in ("made", "behavior", "images_of_push"):  # docs/contrastive_rl.md says it, and the table `images`
            continue
        command, places = SOURCES.get(name, (f"run.py {name}", name))
        paths = [path for place in places.split() for path in (RESULTS / place, *sorted((RESULTS / place).glob("*")))]
        runs = [json.loads(path.read_text())["made"] for path in paths if path.is_file()]
        if runs:
            runs.sort(key=lambda run: run["date"])
            cells = [list(dict.fromkeys(run[key] for run in runs)) for key in ("commit", "date", "machine")]
            commits, dates, machines = cells
            dates = " to ".join(dict.fromkeys((dates[0], dates[-1])))
            command = f"`python benchmark/{command}`"
            rows.append([name, command, str(len(runs)), ", ".join(commits), dates, "; ".join(machines)])
    caption = (
        "Commit: the one whose code made a result; of results before 2026-11-27 the one that brought them, whose code "
        "made them or differs by what its message says."
    )
    return table(caption, "table | command | results | commits | dates | machines", rows)


TABLES: dict[str, Callable[[], str]] = {
    "state": lambda: methods_table("state", "task"), "hard": lambda: methods_table("hard", "task"),
    "examples": lambda: methods_table("examples", "success examples"),
    "sizes": lambda: methods_table("sizes", "episodes"), "settings": settings_table, "search": search_table,
    "cvl": lambda: cvl_table("cvl", CVL), "goals": lambda: cvl_table("goals", GOALS),
    "bandwidth": lambda: methods_table("bandwidth", "success examples"),
    "images": lambda: methods_table("images", "task"),
    "images_of_push": lambda: methods_table("images", "task", "FetchPush"),
    "image_examples": lambda: methods_table("image_examples", "success examples"),
    "image_sizes": lambda: methods_table("image_sizes", "episodes"), "image_search": image_search_table,
    "image_objectives": image_objectives_table, "image_heads": image_heads_table,
    "baseline_images": baseline_images_table,
    "differences": lambda: differences_table(DIFFERENCES["differences"]),
    "image_differences": lambda: differences_table(DIFFERENCES["image_differences"]),
    "tasks": tasks_table, "data": data_table, "behavior": behavior_table, "threads": threads_table,
    "contrastive_rl": contrastive_rl_table, "contrastive_rl_search": contrastive_rl_search_table,
    "image_step": image_step_table, "gpu_speed": gpu_speed_table, "ratio": ratio_table, "camera": camera_table,
    "tailo": tailo_table, "tailo_search": tailo_search_table, "made": made_table,
}  # fmt: skip


def fill(text: str, made: dict[str, str] | None = None) -> str:
    """Return a text in which every table between `<!-- NAME -->` and `<!-- end -->` is made, or taken from `made`.

    A caption that an earlier table of the text has is not repeated.
    """
    made, captions = {} if made is None else made, set()

    def new(match: re.Match) -> str:
        name = match[1]
        if name not in TABLES:
            raise common.UserError(f"there is no table '{name}'; the tables are {', '.join(TABLES)}.")
        if name not in made:
            made[name] = TABLES[name]()
        caption, _, rows = made[name].partition("\n\n")
        content = rows if rows and caption in captions else made[name]
        captions.add(caption)
        return f"<!-- {name} -->\n{content}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", new, text, flags=re.DOTALL)


def write() -> None:
    """Put the tables into README.md and docs/*.md: into all of them, or none if one has a table that there is not."""
    paths, made = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], {}
    for path in paths:
        try:
            fill(path.read_text(), made)
        except common.UserError as error:
            raise common.UserError(f"{path.relative_to(ROOT)}: {error}") from None
    for path in paths:  # read again: the tables took seconds, and an edit of the text meanwhile must not be lost
        text = path.read_text()
        if (filled := fill(text, made)) != text:
            with common.write_file(path) as file:
                file.write(filled.encode())


if __name__ == "__main__":
    with common.user_errors():
        if sys.argv[1:] not in ([], ["--write"]):
            raise common.UserError("the only flag is --write.")
        if sys.argv[1:]:
            write()
        else:
            for name, make in TABLES.items():
                print(f"{name}\n\n{make()}\n")
