"""Mutation testing: change one thing at a time in a script, and list the changes that no test notices.

    python benchmark/mutants.py laeo.py                          # all functions but those in LEFT_OUT
    python benchmark/mutants.py laeo.py -k "not learns"          # unknown arguments go to pytest
    python benchmark/mutants.py laeo.py --functions update measure

The tests run once, in a copy of the tree in a temporary directory. For each mutant this process is then forked, and the
child runs the changed source in the script's module and the tests again, until one fails: first those that have noticed
most mutants of the same function, then the fast ones. No file is changed. Mutants that pass all tests are printed as
LINE: FUNCTION: BEFORE -> AFTER; the last line says how many there were.
"""

import argparse
import ast
import collections
import copy
import gc
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = {"load_data", "evaluate", "load_checkpoint", "train"}
TESTS = ["tests/test_laeo.py", "tests/test_bc.py", "tests/test_oril.py"]
SECONDS = 1200  # a mutant that takes longer counts as noticed
NEVER_NEGATIVE = {"generator", "args", "data", "networks", "optimizer", "actor", "critic", "batch", "encoder", "use"}
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult, ast.Mod: ast.FloorDiv,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
MODULES = {"torch", "torch.special", "np", "np.random", "nn", "nn.init", "nn.utils", "F", "common"}
PAIRS = [  # of names and of attributes, which are confused with each other
    ("mean", "std"), ("phi", "psi"), ("upper", "lower"), ("action", "data_action"), ("reward", "next_q"),
    ("observation", "future"), ("observation", "next_observation"), ("shift", "future_shift"), ("shift", "next_shift"),
    ("examples_shift", "shift"), ("actor", "critic"), ("future", "features"), ("amin", "amax"),
    ("mean", "sum"), ("examples", "data"), ("row", "remaining"), ("observation_mean", "observation_std"),
    ("action", "noise"), ("logits", "logits_examples"), ("phi_nets", "psi_nets"), ("ones_like", "zeros_like"),
    ("softplus", "sigmoid"), ("argmax", "argmin"), ("batches", "metrics"), ("log", "log1p"),
]  # fmt: skip


def replacements(node: ast.AST, known: set[str]) -> Iterator[ast.AST]:
    """Yield what may stand in the place of a part of the program; `known` are the names that it may use."""
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        for value in (node.value + 1, node.value - 1 if isinstance(node.value, int) else 2 * node.value):
            yield ast.Constant(value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield ast.Constant(node.value + "x")
    elif isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in OPERATORS:
        yield changed(node, op=OPERATORS[type(node.op)]())
    elif isinstance(node, ast.BoolOp):
        yield changed(node, op=OPERATORS[type(node.op)]())
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
        yield changed(node, ops=[OPERATORS[type(node.ops[0])](), *node.ops[1:]])
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.IfExp):
        yield from (node.body, node.orelse)
    elif isinstance(node, ast.If | ast.While):
        yield changed(node, test=ast.UnaryOp(ast.Not(), node.test))
    elif isinstance(node, ast.Dict):
        for i, value in enumerate(node.values):
            tripled = ast.BinOp(ast.Constant(3), ast.Mult(), value)
            yield changed(node, values=[*node.values[:i], tripled, *node.values[i + 1 :]])
    elif isinstance(node, ast.Call):
        yield from calls(node)
    if isinstance(node, ast.Expr | ast.Assign | ast.AugAssign | ast.With | ast.If | ast.For):
        yield ast.Pass()
    if isinstance(node, ast.With):
        yield ast.If(ast.Constant(True), node.body, [])
    for field in ("id", "attr"):
        for pair in PAIRS if isinstance(getattr(node, "ctx", None), ast.Load) else ():
            if (name := getattr(node, field, None)) in pair and (other := pair[1 - pair.index(name)]) in known:
                yield changed(node, **{field: other})


def calls(node: ast.Call) -> Iterator[ast.AST]:
    """Yield calls with other arguments: two swapped, one negated, a keyword left out; or no call."""
    for i, value in enumerate(node.args):
        if i + 1 < len(node.args):
            swapped = [*node.args[:i], node.args[i + 1], value, *node.args[i + 2 :]]
            yield changed(node, args=swapped)
        objects = isinstance(value, ast.Constant | ast.Starred | ast.GeneratorExp | ast.List | ast.IfExp)
        if not objects and ast.unparse(value) not in NEVER_NEGATIVE and not ast.unparse(value).startswith("nn."):
            yield changed(node, args=[*node.args[:i], ast.UnaryOp(ast.USub(), value), *node.args[i + 1 :]])
    for i in range(len(node.keywords)):
        yield changed(node, keywords=node.keywords[:i] + node.keywords[i + 1 :])
    if isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) not in MODULES:
        yield node.func.value  # x.clamp(...) becomes x
    elif node.args and not isinstance(node.args[0], ast.Starred):
        yield node.args[0]  # f(x, ...) becomes x


def changed(node: ast.AST, **fields: object) -> ast.AST:
    node = copy.copy(node)
    for name, value in fields.items():
        setattr(node, name, value)
    return node


def mutants(source: str, functions: set[str] | None) -> Iterator[tuple[int, str, str, str]]:
    """Yield line, function, change and new source of each mutant."""
    tree, found = ast.parse(source), set()
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for scope in [x for top in tree.body for x in (top.body if isinstance(top, ast.ClassDef) else [top])]:
        if not isinstance(scope, ast.FunctionDef) or (
            scope.name in LEFT_OUT if functions is None else scope.name not in functions
        ):
            continue
        names = {x.id for x in ast.walk(scope) if isinstance(x, ast.Name)} | {x.arg for x in scope.args.args}
        for parent in [scope] + [node for statement in scope.body for node in ast.walk(statement)]:
            for field, old in ast.iter_fields(parent):
                if parent is scope and field != "body" or field == "annotation":
                    continue
                for i, node in enumerate(old if isinstance(old, list) else [old]):
                    if any(isinstance(x, ast.Expr) and isinstance(x.value, ast.Constant) for x in (node, parent)):
                        continue  # a docstring
                    known = attributes if isinstance(node, ast.Attribute) else names
                    for new in replacements(node, known) if isinstance(node, ast.AST) else ():
                        before, after = difference(ast.unparse(node), ast.unparse(ast.fix_missing_locations(new)))
                        setattr(parent, field, [*old[:i], new, *old[i + 1 :]] if isinstance(old, list) else new)
                        try:
                            text = ast.unparse(ast.fix_missing_locations(tree))
                        finally:
                            setattr(parent, field, old)
                        if before != after and text not in found:
                            found.add(text)
                            yield node.lineno, scope.name, f"{before} -> {after}", text


def difference(before: str, after: str) -> tuple[str, str]:
    """Return both without what they have in common, but for some of it on both sides."""
    before, after = " ".join(before.split()), " ".join(after.split())
    start, end = len(os.path.commonprefix([before, after])), len(os.path.commonprefix([before[::-1], after[::-1]]))
    start = max(0, start - 50)
    return tuple(text[start : max(len(text) - max(0, end - 30), start)][:160] for text in (before, after))


class Order:
    """A pytest plugin: the tests that are most likely to fail come first; the one that fails is remembered."""

    def __init__(self):
        self.seconds, self.noticed, self.failed = {}, collections.Counter(), ""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: (-self.noticed[item.nodeid], self.seconds.get(item.nodeid, 0)))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0) + report.duration
        self.failed = report.nodeid if report.failed else self.failed


def run_tests(order: Order, directory: Path, arguments: list[str]) -> bool:
    options = ["-x", "-q", "-s", "-p", "no:cacheprovider", f"--basetemp={directory / 'files'}"]
    options += ["-o", "addopts="]  # in this process
    return pytest.main([*options, *TESTS, *arguments], plugins=[order]) == 0


def failing_test(text: str, name: str, order: Order, directory: Path, arguments: list[str]) -> str | None:
    """Return the test that fails with this source of a module, or None, from a forked process."""
    report = directory / "report"
    report.write_text("no test, but an error or too many seconds")
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        signal.alarm(SECONDS)
        try:
            exec(compile(text, sys.modules[name].__file__, "exec"), sys.modules[name].__dict__)
            passed = run_tests(order, directory, arguments)
            report.write_text("" if passed else order.failed or "no test, but an error")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    return report.read_text() or None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script")
    parser.add_argument("--functions", nargs="*")
    args, arguments = parser.parse_known_args()
    name, functions = Path(args.script).stem, args.functions and set(args.functions)
    with tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        ignored = shutil.ignore_patterns(".git", "datasets", "runs", "benchmark", "docs", "__pycache__", ".*_cache")
        shutil.copytree(ROOT, directory / "tree", ignore=ignored)
        os.chdir(directory / "tree")
        baseline, orders, script = Order(), {}, Path(f"{name}.py")
        source = ast.unparse(ast.parse(script.read_text()))
        if not run_tests(baseline, directory, arguments) or failing_test(source, name, baseline, directory, arguments):
            sys.exit("the tests fail without any change")
        gc.collect(), gc.freeze()
        count = survivors = 0
        for line, function, change, text in mutants(script.read_text(), functions):
            order, count = orders.setdefault(function, Order()), count + 1
            order.seconds = baseline.seconds
            if (test := failing_test(text, name, order, directory, arguments)) is None:
                survivors += 1
                print(f"{script}:{line}: {function}: {change}", flush=True)
            else:
                order.noticed[test] += 1
        print(f"{script}: {count} mutants, {count - survivors} noticed, {survivors} survive", flush=True)


if __name__ == "__main__":
    main()
