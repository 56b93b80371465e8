"""README.md and docs/ against the code: commands, flags, defaults, metrics, tables, links; and the worked example."""

import ast
import dataclasses
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import faults
import gymnasium as gym
import numpy as np
import pytest
import test_training
import tyro
from gymnasium.utils.env_checker import check_env

import bc
import collect_data
import common
import contrastive_rl
import cvl
import evaluate
import laeo
import oril
import purl
import tailo

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmark"))
import report  # noqa: E402
import run as benchmark  # noqa: E402

README = (ROOT / "README.md").read_text()
DOCS = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
TEXTS = {"README.md": README} | {f"docs/{name}": text for name, text in DOCS.items()}
CURRENT = {name: text for name, text in TEXTS.items() if name != "docs/history.md"}  # which shows old commands
METHODS = {"laeo": laeo, "oril": oril, "purl": purl, "tailo": tailo, "bc": bc, "cvl": cvl}
SCRIPTS = METHODS | {"contrastive_rl": contrastive_rl, "collect_data": collect_data, "evaluate": evaluate}
PAGES = {name: f"{name}.md" for name in [*METHODS, "contrastive_rl"]}
PAGES |= {"collect_data": "data.md", "evaluate": "training.md"}
PARTS = ["Overview", "Usage", "Logged metrics", "Implementation details", "Results"]


def section(text, heading):
    """Return what stands below a heading of the second level."""
    return re.split(r"^## ", text.split(f"\n## {heading}\n")[1], flags=re.MULTILINE)[0]


def blocks(text, language=""):
    """Return the fenced blocks of a language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)  # all, so that none ends another
    return [block for name, block in found if name == language]


def code(text):
    """Return the lines of fenced blocks without a language, and what stands between backquotes in paragraphs."""
    lines = [line for block in blocks(text) for line in block.splitlines()]
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return lines + [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


# ------------------------------------------------------------------------------------------------------------ commands


def commands(lines):
    """Return script and arguments of every command `python SCRIPT ARGUMENTS`; variables and `uv run` may begin it."""
    parts = [part.strip() for line in lines for part in line.split("&&")]
    found = [re.match(r"(?:\w+=\S+ )*(?:python|uv run) (\S+\.py\b.*)", part) for part in parts]
    return [(words[0], words[1:]) for words in (shlex.split(x[1], comments=True) for x in found if x)]


def command_cases():
    for name, text in CURRENT.items():
        yield from ((name, *command) for command in commands(code(text)))
    for name, script in SCRIPTS.items():
        lines = [line.strip() for line in script.__doc__.splitlines()]
        yield from ((f"{name}.py", *command) for command in commands(lines))


def check_command(script, arguments):
    """Parse a command with the script's own flags; raises if they or what they name do not exist."""
    if script.startswith("benchmark/"):
        assert (ROOT / script).exists(), script
        if script == "benchmark/run.py":
            experiments, flags = benchmark.experiments(), {"--list", "--redo", "--jobs", "--only", "--ray", "auto"}
            assert all(word in experiments or word in flags or word.isdigit() for word in arguments), arguments
        if script == "benchmark/failures.py":
            assert any((benchmark.RESULTS / "state").glob(f"{arguments[0]}*.json")), arguments
        return
    if script == "point.py":  # of the README's example, which is run below
        return
    if script == "tests/faults.py":
        tyro.cli(faults.Args, args=arguments)
        return
    args = tyro.cli(SCRIPTS[Path(script).stem].Args, args=arguments)
    own = {"point:Point-v0"} if getattr(args, "eval_episodes", 1) else {"my-robot"}
    own |= (
        {f"gymnasium_robotics:{task}-v4" for task in ("FetchReach", "FetchPush")} if "contrastive" in script else set()
    )
    assert args.env_id is None or args.env_id in {*common.TASKS, *own}, args.env_id


def test_commands_parse_and_name_tasks():
    cases = list(command_cases())
    for name, script, arguments in cases:
        try:
            check_command(script, arguments)
        except (SystemExit, KeyError, AssertionError) as error:
            pytest.fail(f"{name}: python {script} {shlex.join(arguments)}: {error!r}")
    assert {Path(script).stem for _, script, _ in cases} >= set(SCRIPTS) and len(cases) >= 40


@pytest.mark.parametrize(
    "script, arguments",
    [
        ("laeo.py", ["--num-succes", "10"]),
        ("laeo.py", ["--env-id", "FetchPsh"]),
        ("collect_data.py", ["--train"]),
        ("laoe.py", []),
        ("benchmark/run.py", ["stats"]),
        ("benchmark/runs.py", []),
    ],
)
def test_a_command_that_does_not_exist_is_found(script, arguments):
    with pytest.raises((SystemExit, KeyError, AssertionError)):
        check_command(script, arguments)


def test_commands_are_found_wherever_they_stand():
    text = "a `python bc.py\n--seed 1` b\n```\npip x && A=b uv run laeo.py --resume runs/a  # note\npython -c 1\n```\n"
    expected = [("laeo.py", ["--resume", "runs/a"]), ("bc.py", ["--seed", "1"])]
    assert commands(code(text)) == expected


def test_flags_in_the_text_exist():
    fields = {field.name for script in SCRIPTS.values() for field in dataclasses.fields(script.Args)}
    known = {f"--{name.replace('_', '-')}" for name in fields} | {"--help", "--logdir", "--torch-backend"}
    known |= {"--list", "--redo", "--jobs", "--only", "--write", "--train"}  # of benchmark/, and of an earlier commit
    known |= {"--ray", "--head", "--address"}  # of benchmark/run.py, and of Ray's own command
    known |= {word for command in benchmark.experiments()["search"].values() for word in command if word[:2] == "--"}
    for name, text in CURRENT.items():
        for span in code(text):
            flags = {word.split("=")[0] for word in span.split() if re.match(r"--\w", word)}
            assert flags <= known, f"{name}: {span}"


def test_install_commands_are_in_one_block():
    block = next(block for block in blocks(README) if "python3 -m venv" in block).splitlines()
    assert block[0] == "apt install python3-venv libegl1 libgl1 libosmesa6"
    assert "pip install -r requirements.txt && python laeo.py --env-id FetchReach --gradient-steps 3000" in block[1]
    assert "-r requirements.txt -r requirements-optional.txt && pytest" in block[2]
    assert [line for line in README.splitlines() if line.endswith("&& pytest")] == [block[2]]  # .ci/run runs it


# --------------------------------------------------------------------------------------------------------------- flags


def flag_tables(text):
    """Return {heading: {flag: (default, meaning)}} of the tables of flags."""
    tables = {}
    for heading, rows in re.findall(
        r"^\| (flag\b[^|]*) \| default \| meaning \|\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.M
    ):
        cells = [[cell.strip() for cell in row.split("|")[1:4]] for row in rows.splitlines()]
        tables[heading] = {flag.strip("`"): (default, meaning) for flag, default, meaning in cells}
    return tables


def written(default):
    """Return how a default is written in a table; a tuple holds that of states and that of images."""
    if isinstance(default, tuple):
        return f"{written(default[0])}; images {written(default[1])}"
    if default is None or default is False:
        return ""
    return default.name if isinstance(default, Path) else f"{default:,g}" if isinstance(default, float) else (
        f"{default:,}" if isinstance(default, int) else default
    )  # fmt: skip


def documented(name):
    """Return {flag: (default, meaning)} of a script, from the tables of its page and of those that the page names."""
    pages = {name: [name, "training"] for name in ("laeo", "oril", "tailo", "bc", "cvl")}
    pages |= {"purl": ["purl", "oril", "training"], "collect_data": ["data"], "evaluate": ["training"]}
    heading = "flag of `evaluate.py`" if name == "evaluate" else "flag"
    tables = [flag_tables(DOCS[f"{page}.md"])[heading] for page in pages.get(name, [name])]
    assert all(f"({page}.md" in DOCS[PAGES[name]] for page in pages.get(name, [])[1:])
    flags = [flag for table in tables for flag in table]
    assert len(flags) == len(set(flags)), f"{name}: a flag is in two tables"
    return tables, {flag: row for table in tables for flag, row in table.items()}


@pytest.mark.parametrize("name", SCRIPTS)
def test_flag_tables_are_the_flags(name):
    tables, rows = documented(name)
    fields = [field for field in dataclasses.fields(SCRIPTS[name].Args) if field.default is not dataclasses.MISSING]
    own = getattr(METHODS.get(name), "DEFAULTS", {})  # for states and images
    defaults = {f"--{x.name.replace('_', '-')}": written(own.get(x.name, x.default)) for x in fields}
    of_images = {"--channels", "--random-shift"} if name == "cvl" else set()  # which takes none
    assert of_images <= set(rows) and of_images.isdisjoint(defaults)
    assert {flag: default for flag, (default, _) in rows.items() if flag not in of_images} == defaults
    assert all(meaning for _, meaning in rows.values())
    for table in tables:  # in the order of the script
        assert [flag for flag in table if flag not in of_images] == [flag for flag in defaults if flag in table]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_has_a_text_for_every_flag(name, monkeypatch, capsys):
    """The texts are read from the comments, or the docstrings, behind the fields."""
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit, match="^0$"):
        tyro.cli(SCRIPTS[name].Args, args=["--help"])
    lines = [line.strip("│ \n") for line in capsys.readouterr().out.splitlines()]
    entries = re.split(r"\n(?=--|[A-Z]{2})", "\n" + "\n".join(lines))
    for field in dataclasses.fields(SCRIPTS[name].Args):
        flag = f"--{field.name.replace('_', '-')}"
        entry = [x for x in entries if re.match(rf"{flag}\b(?!-)", x)]
        if field.default is dataclasses.MISSING:  # a positional argument
            entry = [x for x in entries if x.startswith(("RUN-DIR", "PATH"))]
        text = re.sub(r"\((default:.*|required)\)", "", entry[0], flags=re.DOTALL)
        text = re.sub(r"^(--[\w-]+(, --no-[\w-]+)?( \{[^}]*\}\S*| [A-Z]+)?|[A-Z-]+)\s", "", text)  # the flag itself
        assert len(re.findall(r"\b[a-z]{2,}\b", text)) >= 2, entry


# -------------------------------------------------------------------------------------------------- metrics and pages


def metrics_table(text):
    """Return the names in the tables of metrics."""
    rows = re.findall(r"^\| metric \| meaning \|\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.M)
    return {
        name for table in rows for row in table.splitlines() for name in re.findall(r"`([^`]+)`", row.split("|")[1])
    }


@pytest.mark.parametrize("name", METHODS)
def test_metrics_are_explained(name):
    """Every metric, and no other, on the method's page; PURL's refers to ORIL's."""
    page = "oril" if name == "purl" else name
    labelled = {metric.split("/")[1] for metric in test_training.LABELLED} if page == "oril" else set()
    assert metrics_table(section(DOCS[f"{page}.md"], "Logged metrics")) == test_training.METRICS[name] | labelled
    purl_table = metrics_table(section(DOCS["purl.md"], "Logged metrics"))
    assert purl_table <= test_training.METRICS["purl"] and "(oril.md#logged-metrics)" in DOCS["purl.md"]


def test_metrics_of_contrastive_rl_are_explained():
    from test_contrastive_rl import METRICS

    assert metrics_table(section(DOCS["contrastive_rl.md"], "Logged metrics")) == METRICS


def test_metrics_of_the_evaluation_are_explained():
    expected = {f"eval/{name}" for name in test_training.EVALUATED}
    assert metrics_table(DOCS["training.md"]) == expected


@pytest.mark.parametrize("name", [*METHODS, "contrastive_rl"])
def test_page_of_a_method_has_five_parts(name):
    assert re.findall(r"^## (.*)$", DOCS[f"{name}.md"], re.M) == PARTS


@pytest.mark.parametrize("name", PAGES)
def test_docstring_names_the_page(name):
    assert f"docs/{PAGES[name]}" in SCRIPTS[name].__doc__, f"{name}.py: its docstring does not name its page"
    assert PAGES[name] in DOCS


@pytest.mark.parametrize("name", [*METHODS, "contrastive_rl"])
def test_differences_have_the_numbers_of_the_docstring(name):
    numbers = [int(n) for n in re.findall(r"^ ?(\d+)\. ", SCRIPTS[name].__doc__, re.M)]
    details = [int(n) for n in re.findall(r"^(\d+)\. ", section(DOCS[f"{name}.md"], "Implementation details"), re.M)]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= 3
    assert details == list(range(1, len(details) + 1)) and len(details) >= len(numbers)


# ----------------------------------------------------------------------------------------------------- links and tables


def anchors(text):
    """Return the anchors that GitHub gives to the headings of a text."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[name]):
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists(), f"{name}: {target}"
        assert not anchor or anchor in anchors(path.read_text()), f"{name}: {target}"


def test_every_page_is_linked_from_the_readme():
    assert {f"docs/{name}" for name in DOCS} <= set(re.findall(r"\]\((docs/[\w.]+)", README))


def test_pictures_exist():
    found = [(name, path) for name, text in TEXTS.items() for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)]
    assert ("README.md", "benchmark/figures/push.gif") in found
    for name, path in found:
        assert ((ROOT / name).parent / path).stat().st_size > 1000


def test_files_in_the_map_exist():
    table = section(README, "Files")
    names = [
        name
        for row in table.splitlines()
        if row.startswith("| `")
        for name in re.findall(r"`([^`]+)`", row.split("|")[1])
    ]
    assert all((ROOT / name).exists() for name in names)
    assert {path.name for path in ROOT.glob("*.py")} <= set(re.findall(r"`(\w+\.py)`", table))


@pytest.mark.parametrize("name", TEXTS)
def test_tables_are_those_of_the_results(name):
    assert report.fill(TEXTS[name]) == TEXTS[name], "python benchmark/report.py --write makes the tables"
    if name == "docs/history.md":
        assert "<!--" not in TEXTS[name]  # its results cannot be made again


def test_every_table_is_shown():
    shown = {name for text in TEXTS.values() for name in re.findall(r"<!-- (\w+) -->", text)}
    assert shown == set(report.TABLES) | {"end"}


@pytest.mark.parametrize("name", TEXTS)
def test_lines_are_short(name):
    lines = [line for line in TEXTS[name].splitlines() if not line.startswith(("|", "python3 -m venv"))]
    assert max(map(len, lines)) <= 120
    assert name != "README.md" or len(TEXTS[name].splitlines()) <= 250


def test_tasks_in_the_table_are_the_tasks():
    rows = [
        [cell.strip() for cell in row.split("|")[1:-1]]
        for row in section(DOCS["data.md"], "Tasks").split("\n### ")[0].splitlines()
    ]
    found = {row[0]: row[2:4] for row in rows if row and row[0] in common.TASKS}
    assert found == {k: [f"{t.max_episode_steps}", f"{t.num_episodes:,}"] for k, t in common.TASKS.items()}
    assert all(f"`{task}`" in README for task in common.TASKS)


def test_requirements_pin_the_simulators_exactly():
    requirements = (ROOT / "requirements.txt").read_text()
    for package, version in common.versions("mujoco", "metaworld", "gymnasium-robotics").items():
        assert re.search(rf"^{package}=={re.escape(version)}\s", requirements, re.M)


# --------------------------------------------------------------------------------------------------------- the example


def test_worked_example_runs(tmp_path):
    """The README's files and commands in an empty directory, with fewer steps."""
    text = section(README, "Your own environment and data")
    (program, load), (shell,) = blocks(text, "python"), blocks(text)
    (tmp_path / "point.py").write_text(program)
    for name in ("laeo.py", "common.py"):
        shutil.copy(ROOT / name, tmp_path)
    for line in shell.splitlines():
        script, arguments = commands([line])[0]
        fewer = [re.sub("^1000$", "20", word) for word in arguments]
        fewer += ["--eval-episodes", "2", "--eval-interval", "0"] if script == "laeo.py" else []
        process = subprocess.run(
            [sys.executable, script, *fewer], cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert process.returncode == 0, process.stderr
    assert "success_rate" in process.stdout
    successes = len(np.load(tmp_path / "points" / "success_examples.npy"))
    assert f"\n{successes} of the 500 episodes succeed" in text
    assert len(load.strip().splitlines()) <= 4
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "runs", elsewhere / "runs")
    show = "\nprint(actions.shape, actions.dtype, bool((abs(actions) <= 2).all()))"
    process = subprocess.run(  # -I: without the directories that hold this project
        [sys.executable, "-I", "-c", load + show], cwd=elsewhere, capture_output=True, text=True, timeout=300
    )
    assert process.stdout == "torch.Size([7, 2]) torch.float32 True\n", process.stderr


@pytest.mark.filterwarnings("ignore::UserWarning")  # it recommends actions in [-1, 1]
def test_worked_examples_environment_is_a_valid_one(tmp_path, monkeypatch):
    program = blocks(section(README, "Your own environment and data"), "python")[0]
    (tmp_path / "point.py").write_text(program)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        env = common.make_env("point:Point-v0")
        check_env(env.unwrapped, skip_render_check=True)
    finally:
        gym.registry.pop("Point-v0", None)
        sys.modules.pop("point", None)


def test_python_blocks_are_valid():
    for name, text in CURRENT.items():
        for block in blocks(text, "python"):
            ast.parse(block, name)


def test_missing_dataset_is_made_by_the_printed_command(tmp_path, monkeypatch, capsys):
    """With a stand-in for the collection, which takes minutes; the README's first command runs it."""
    made = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(collect_data, "collect", made.append)
    assert common.find_dataset("FetchPush", "hard") == tmp_path / "datasets" / "FetchPush-hard"
    (command,) = commands(re.findall(r"python .*", capsys.readouterr().out))
    assert command[0] == "collect_data.py"
    assert made == [tyro.cli(collect_data.Args, args=command[1])]
