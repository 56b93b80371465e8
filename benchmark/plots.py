"""Draw the results, each figure as PNG and as SVG:  python benchmark/plots.py

benchmark/figures/tasks has bars of every method on every task, with the intervals of the tables; curves the success on
FetchPush while it is trained, the mean over seeds and a band from the worst to the best; image_curves that of LAEO and
ORIL on FetchPushImage, every single seed, as the paper's Fig. 4; examples and sizes have the success against the number
of success examples and of episodes, image_examples and image_sizes that on FetchPushImage. A figure whose results are
missing is left out.
"""

import re
import sys
from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # needs no display
import matplotlib.pyplot as plt
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
import report

import common

FIGURES = Path(__file__).parent / "figures"
METHODS = report.METHODS
COLORS = dict(zip(METHODS, ("tab:blue", "tab:orange", "tab:green", "tab:gray", "tab:red")))
LABELS = {"success": "success at any step", "final_success": "success at the last step"}
plt.rcParams["svg.hashsalt"] = "the same results give the same file"


def bars(axes: dict) -> bool:
    """Draw a bar with its interval for each method on each task of states and of images, on medium and hard data."""
    cases = {}
    for experiment, name in (("state", "{}"), ("hard", "{}_hard"), ("images", "{}")):
        cases |= {name.format(case): methods for case, methods in report.groups(experiment)}
    tailo = report.load("tailo")
    for case, methods in cases.items():
        if mine := report.of_task(tailo, "tailo", case):
            methods["tailo"] = mine
    for kind, ax in axes.items():
        for i, (method, name) in enumerate(METHODS.items()):
            found = [(x, methods[method]) for x, methods in enumerate(cases.values()) if method in methods]
            if found:
                rates = [report.rate_interval([report.outcomes(run, kind) for run in runs]) for _, runs in found]
                rate, low, high = np.array(rates).T
                where = np.array([x for x, _ in found]) + 0.16 * (i - (len(METHODS) - 1) / 2)
                errors = np.maximum([rate - low, high - rate], 0)
                ax.bar(where, rate, 0.15, color=COLORS[method], label=name, yerr=errors, ecolor="0.2", capsize=2)
        ax.set_xticks(
            range(len(cases)), [re.sub("(?=Image|Window|Drawer|_)", "\n", case).replace("_", "") for case in cases]
        )
        ax.tick_params("x", labelsize=8)
    return bool(cases)


def curves(axes: dict, experiment: str = "state", task: str = "FetchPush", single: Iterable[str] = ()) -> bool:
    """Draw the evaluations on the way: of each method the mean over seeds and a band, of `single` ones each seed."""
    methods = {
        x: runs for x, runs in dict(report.groups(experiment)).get(task, {}).items() if not single or x in single
    }
    for kind, ax in axes.items():
        for method, runs in methods.items():
            lines = [[(point["step"], point[f"{kind}_rate"]) for point in run.get("curve", [])] for run in runs]
            style = {"color": COLORS[method], "marker": "."}
            if single:
                for i, points in enumerate(lines):
                    ax.plot(*zip(*points), linewidth=0.8, label=METHODS[method] if i == 0 else None, **style)
            elif all(lines):
                steps = sorted(set.intersection(*({step for step, _ in points} for points in lines)))
                rates = np.array([[dict(points)[step] for step in steps] for points in lines])
                ax.plot(steps, rates.mean(0), label=METHODS[method], **style)
                ax.fill_between(steps, rates.min(0), rates.max(0), color=COLORS[method], alpha=0.15, linewidth=0)
        ax.locator_params("x", nbins=5)
        ax.set_xlabel("gradient steps")
    return bool(methods)


def against(experiment: str, axes: dict, xlabel: str) -> bool:
    """Draw the rate of each method with its interval against the case, a number, of an experiment."""
    cases = report.groups(experiment)
    for kind, ax in axes.items():
        for method, name in METHODS.items():
            points = [
                (int(case), *report.rate_interval([report.outcomes(run, kind) for run in methods[method]]))
                for case, methods in sorted(cases, key=lambda case: int(case[0]))
                if method in methods
            ]
            if points:
                x, rate, low, high = zip(*points)
                ax.plot(x, rate, color=COLORS[method], marker=".", label=name)
                ax.fill_between(x, low, high, color=COLORS[method], alpha=0.15, linewidth=0)
        ax.set_xscale("log")
        ax.set_xticks([int(case) for case, _ in cases], [report.written(case) for case, _ in cases])
        ax.set_xticks([], minor=True)
        ax.set_xlabel(xlabel)
    return len(cases) > 1


def main() -> None:
    drawings = {
        "tasks": bars,
        "curves": curves,
        "image_curves": lambda axes: curves(axes, "images", "FetchPushImage", ("laeo", "oril")),
        "examples": lambda axes: against("examples", axes, "success examples"),
        "sizes": lambda axes: against("sizes", axes, "episodes"),
        "image_examples": lambda axes: against("image_examples", axes, "success examples"),
        "image_sizes": lambda axes: against("image_sizes", axes, "episodes"),
    }
    for name, draw in drawings.items():
        rows, columns, size = (2, 1, (9, 5.4)) if draw is bars else (1, 2, (9, 3.4))
        figure, axes = plt.subplots(rows, columns, figsize=size, sharex=draw is bars, sharey=True, layout="constrained")
        drawn = draw(dict(zip(LABELS, axes)))
        for ax, label in zip(axes, LABELS.values()):
            ax.set(ylabel=label, ylim=(0, 1.02))
            ax.grid(alpha=0.3, axis="y" if draw is bars else "both")
            ax.set_axisbelow(True)
        if drawn:
            if draw is bars:
                figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(METHODS))
            else:
                axes[0].legend(fontsize=8)
            for kind in ("png", "svg"):
                with common.write_file(FIGURES / f"{name}.{kind}") as file:
                    figure.savefig(file, format=kind, dpi=110, metadata={"Date": None} if kind == "svg" else None)
                print(FIGURES / f"{name}.{kind}")
        plt.close(figure)


if __name__ == "__main__":
    with common.user_errors():
        main()
