"""Draw the results:  python benchmark/plots.py

benchmark/figures/curves.png has the success of every single seed on FetchPush while it is trained, image_curves.png
that of LAEO and ORIL on FetchPushImage, as the paper's Fig. 4; examples.png and sizes.png have the success against the
number of success examples and of episodes, with the intervals of the tables. A figure whose results are missing is left
out.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # needs no display
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
import report

import common

FIGURES = Path(__file__).parent / "figures"
COLORS = dict(zip(report.METHODS, ("tab:blue", "tab:orange", "tab:green", "tab:gray")))
LABELS = {"success": "success at any step", "final_success": "success at the last step"}


def curves(axes: dict, experiment: str = "state", task: str = "FetchPush", shown: Iterable[str] = COLORS) -> bool:
    """Draw a thin line for each seed on a task, from the evaluations while it was trained to the final one."""
    found = dict(report.groups(experiment)).get(task, {})
    methods = {method: runs for method, runs in found.items() if method in shown}
    for kind, ax in axes.items():
        for method, runs in methods.items():
            for i, run in enumerate(runs):
                points = [(point["step"], point[f"{kind}_rate"]) for point in run.get("curve", [])]
                label = report.METHODS[method] if i == 0 else None
                ax.plot(*zip(*points), color=COLORS[method], linewidth=0.8, marker=".", label=label)
        ax.locator_params("x", nbins=5)
        ax.set_xlabel("gradient steps")
    return bool(methods)


def against(experiment: str, axes: dict, xlabel: str) -> bool:
    """Draw the rate of each method with its interval against the case, a number, of an experiment."""
    cases = report.groups(experiment)
    for kind, ax in axes.items():
        for method, name in report.METHODS.items():
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
        "curves": curves,
        "image_curves": lambda axes: curves(axes, "images", "FetchPushImage", ("laeo", "oril")),
        "examples": lambda axes: against("examples", axes, "success examples"),
        "sizes": lambda axes: against("sizes", axes, "episodes"),
    }
    for name, draw in drawings.items():
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
        drawn = draw(dict(zip(LABELS, axes)))
        for ax, label in zip(axes, LABELS.values()):
            ax.set(ylabel=label, ylim=(0, 1.02))
            ax.grid(alpha=0.3)
        if drawn:
            axes[0].legend()
            with common.write_file(FIGURES / f"{name}.png") as file:
                figure.savefig(file, format="png", dpi=110)
            print(FIGURES / f"{name}.png")
        plt.close(figure)


if __name__ == "__main__":
    with common.user_errors():
        main()
