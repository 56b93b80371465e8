"""The README against the code: flags, defaults, commands, metrics and tables; and mistakes on the command line."""

import ast
import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

import collect_data
import common
import laeo

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SCRIPTS = {"laeo.py": laeo, "collect_data.py": collect_data}


def flag_table(heading):
    """Return {flag: default} of the table whose first heading is `heading`."""
    lines = README.split(f"| {heading} | default | meaning |\n")[1].splitlines()[1:]
    table = {}
    for line in lines:
        if not line.startswith("|"):
            return table
        name, default = [cell.strip() for cell in line.split("|")[1:3]]
        table[name.strip("`")] = default
    return table


@pytest.mark.parametrize("heading, script", [("flag", "laeo.py"), ("flag of `collect_data.py`", "collect_data.py")])
def test_flag_tables_are_the_flags(heading, script):
    table, fields = flag_table(heading), dataclasses.fields(SCRIPTS[script].Args)
    assert list(table) == [f"--{field.name.replace('_', '-')}" for field in fields]
    for field in fields:
        default = table[f"--{field.name.replace('_', '-')}"]
        if field.default is None or field.default is False:
            assert default == "", field.name
        elif field.name == "behavior_dir":
            assert default == field.default.name
        elif isinstance(field.default, (int, float)):
            assert float(default.replace(",", "")) == field.default, field.name
        else:
            assert default == field.default, field.name


def test_every_flag_has_its_help():
    for name in SCRIPTS:
        tree = ast.parse((ROOT / name).read_text())
        args = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")
        for field, text in zip(args.body[::2], args.body[1::2]):
            assert isinstance(field, ast.AnnAssign) and isinstance(text.value, ast.Constant), ast.unparse(field)


def commands(text):
    """All commands `python SCRIPT.py FLAGS` in a text."""
    found = re.findall(r"python (\w+\.py)((?: --[\w-]+(?: [\w./][\w./-]*)?)*)", text)
    return [(script, shlex.split(flags)) for script, flags in found]


def test_commands_of_readme_and_docstrings_parse():
    found = commands(README) + commands(laeo.__doc__) + commands(collect_data.__doc__)
    assert len(found) >= 15 and {script for script, _ in found} == set(SCRIPTS)
    for script, flags in found:
        if "--help" not in flags:
            args = tyro.cli(SCRIPTS[script].Args, args=flags)
            common.find_task(args.env_id)


def test_first_command_is_the_one_that_was_measured():
    lines = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert len(lines) == 1 and "pip install -r requirements.txt && python laeo.py --env-id FetchReach" in lines[0]
    assert len([line for line in README.splitlines() if line.endswith("&& pytest")]) == 1


def test_tables_are_those_of_the_results():
    sys.path.insert(0, str(ROOT / "benchmark"))
    import report

    assert report.fill(README) == README
    assert set(re.findall(r"<!-- (\w+) -->", README)) == set(report.TABLES) | {"end"}


def test_metrics_are_explained():
    source = ast.parse((ROOT / "laeo.py").read_text())
    measure = next(node for node in source.body if isinstance(node, ast.FunctionDef) and node.name == "measure")
    names = {key.value for node in ast.walk(measure) if isinstance(node, ast.Dict) for key in node.keys}
    assert len(names) == 8
    for name in names:
        assert f"`{name}`" in README, name


def test_requirements_pin_the_simulators_exactly():
    requirements = (ROOT / "requirements.txt").read_text()
    for package, version in common.versions("mujoco", "metaworld", "gymnasium-robotics").items():
        assert f"{package}=={version}" in requirements


def test_picture_in_the_readme_exists():
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).stat().st_size > 1000


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_works_on_the_command_line(script):
    process = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0 and "--env-id" in process.stdout


def test_mistake_on_the_command_line_is_one_sentence_and_a_failure(tmp_path):
    command = [sys.executable, ROOT / "laeo.py", "--env-id", "FetchPsh"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert process.returncode == 1
    assert (
        process.stderr.strip().splitlines()[-1].startswith("error: there is no task 'FetchPsh'; did you mean FetchPush")
    )
    assert "Traceback" not in process.stderr and list(tmp_path.iterdir()) == []


def test_missing_dataset_is_made_by_the_printed_command(tmp_path, monkeypatch, capsys):
    """With a stand-in for the process that is started: the real one takes minutes, and the first command runs it."""
    started = []

    class Process:
        def __init__(self, command):
            started.append(command)

        def wait(self):
            return len(started) - 1  # the second one fails

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", Process)
    assert common.find_dataset("FetchPush", "hard") == Path("datasets/FetchPush-hard")
    assert "python collect_data.py --env-id FetchPush --quality hard" in capsys.readouterr().out
    assert started == [[sys.executable, str(ROOT / "collect_data.py"), "--env-id", "FetchPush", "--quality", "hard"]]
    with pytest.raises(common.UserError, match="was not made"):
        common.find_dataset("FetchPush", "hard")
