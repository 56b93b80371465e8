"""The README against the code: flags, defaults, commands, metrics and tables; and mistakes on the command line."""

import ast
import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import test_training
import tyro

import bc
import collect_data
import common
import laeo
import oril
import purl

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SCRIPTS = {"laeo.py": laeo, "oril.py": oril, "purl.py": purl, "bc.py": bc, "collect_data.py": collect_data}


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


SHARED = {field.name for field in dataclasses.fields(common.RunArgs)}


def own_fields(script):
    """The fields of a script's flags that are not those of every method; purl's that are not oril's."""
    fields = dataclasses.fields(SCRIPTS[script].Args)
    known = set() if script == "collect_data.py" else SHARED
    if script == "purl.py":
        known = known | {field.name for field in dataclasses.fields(oril.Args)}
        assert [f.default for f in fields if f.name in known] == [f.default for f in dataclasses.fields(oril.Args)]
    return [field for field in fields if field.name not in known]


@pytest.mark.parametrize("heading", [*(f"`{script}`" for script in SCRIPTS), "every method"])
def test_flag_tables_are_the_flags(heading):
    table = flag_table(f"flag of {heading}")
    fields = dataclasses.fields(common.RunArgs) if heading == "every method" else own_fields(heading.strip("`"))
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
    found = commands(README) + [command for script in SCRIPTS.values() for command in commands(script.__doc__)]
    assert len(found) >= 25 and {script for script, _ in found} == set(SCRIPTS)
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


@pytest.mark.parametrize("script", test_training.SCRIPTS)
def test_metrics_are_explained(script):
    """In the method's own section; PURL's refers to ORIL's."""
    section = README.split(f"`{'oril' if script == 'purl' else script}.py`\n\n**Overview.**")[1].split("\n## ")[0]
    labelled = {name.split("/")[1] for name in test_training.LABELLED} if script in ("oril", "purl") else set()
    for name in test_training.METRICS[script] | labelled:
        assert re.search(rf"^\|[^|]*`{name}`", section, re.MULTILINE), name


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
