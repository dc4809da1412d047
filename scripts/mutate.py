"""Would a test notice? Changes single places of a module, one at a time, and runs the tests that concern it.

    python scripts/mutate.py                      # image geometry, masks and the parser of answers, 40 mutants each
    python scripts/mutate.py geometry --number 200 --seed 1 --allowed 20

A mutant that no test notices is a survivor: a missing test, dead code, or a change without an effect. The exit code is
1 where more survive than are allowed, a test fails without a change, or none ran.

Everything heavy is imported, and the tests are collected, once; each mutant is a fork of that process, in which the
code of the changed functions is exchanged in place, in the package and in the file generated from it. Needs a system
with `fork`.
"""

import argparse
import ast
import copy
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTICED, SURVIVED, UNFIT = "noticed", "SURVIVED", "unfit"
COSTLY_SECONDS = 2.0  # processor time above which a test is left out
LIMIT_SECONDS = 60  # processor time of one mutant; one that needs more runs in circles, which is noticed


@dataclass(frozen=True)
class Target:
    """A module and the tests that concern it.

    Attributes:
        module: dotted name.
        bundle: the generated module that holds a copy of it.
        tests: paths below `tests`.
        allowed: survivors of the first 40 mutants with seed 12, each of them looked at.
    """

    module: str
    bundle: str
    tests: tuple[str, ...]
    allowed: int

    @property
    def path(self) -> Path:
        return ROOT.joinpath("src", *self.module.split(".")).with_suffix(".py")


TARGETS = {
    "geometry": Target(
        "molmo2.image.geometry",
        "molmo2_remote.image_processing_molmo2",
        ("unit/test_geometry.py", "unit/test_slow_fast.py", "golden/test_golden_tables.py"),
        allowed=3,
    ),
    "mask": Target(
        "molmo2.model.attention.mask",
        "molmo2_remote.modeling_molmo2",
        ("unit/test_masking.py", "unit/test_packing.py", "unit/test_blockwise_attention.py"),
        allowed=5,
    ),
    "parse": Target(
        "molmo2.grounding.parse",
        "molmo2_remote.grounding_molmo2",
        ("golden/test_grounding.py", "unit/test_grounding_format.py", "unit/test_grounding_fuzz.py"),
        allowed=5,
    ),
}


# --- mutants ---------------------------------------------------------------------------------------------------------

OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


@dataclass(frozen=True)
class Mutant:
    """One change.

    Attributes:
        line: where, in the source.
        text: the statement before and after.
        tree: the changed module.
    """

    line: int
    text: str
    tree: ast.Module


def changes_of(node: ast.AST) -> Iterator[tuple[str, Callable[[ast.AST], ast.AST]]]:
    """What can be changed about a node itself: a name, and a function that changes a copy of it."""
    for name in ("op", "ops"):
        value = getattr(node, name, None)
        for place, operator in enumerate(value if isinstance(value, list) else [value]):
            if type(operator) in OPERATORS:
                yield "operator", lambda n, name=name, place=place: _with_operator(n, name, place)
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "flip", lambda n: ast.Constant(not n.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield "one more", lambda n: ast.Constant(n.value + 1)
        yield "one less", lambda n: ast.Constant(n.value - 1)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield "unary operator", lambda n: n.operand
    if isinstance(node, (ast.If, ast.IfExp)):
        yield "always", lambda n: _with_test(n, True)
        yield "never", lambda n: _with_test(n, False)
    if isinstance(node, (ast.AugAssign, ast.Raise)) or (
        isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
    ):
        yield "dropped", lambda n: ast.Pass()
    if isinstance(node, ast.Return) and node.value is not None:
        yield "returns nothing", lambda n: ast.Return(ast.Constant(None))


def _with_operator(node: ast.AST, name: str, place: int) -> ast.AST:
    value = getattr(node, name)
    if isinstance(value, list):
        value[place] = OPERATORS[type(value[place])]()
    else:
        setattr(node, name, OPERATORS[type(value)]())
    return node


def _with_test(node: Any, value: bool) -> ast.AST:
    node.test = ast.Constant(value)
    return node


def all_mutants(source: str) -> list[tuple[int, int]]:
    """(number of the node, number of its change) of everything that can be changed inside functions."""
    nodes = list(ast.walk(ast.parse(source)))
    inside: set[int] = set()
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for statement in node.body:
                inside.update(map(id, _changeable(statement)))
    return [
        (number, change)
        for number, node in enumerate(nodes)
        if id(node) in inside
        for change, _ in enumerate(changes_of(node))
    ]


def _changeable(node: ast.AST) -> Iterator[ast.AST]:
    """A node and those below it, without texts of errors, annotations and decorators."""
    yield node
    if isinstance(node, ast.Raise):
        return
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _changeable(child)


def mutant(source: str, number: int, change: int) -> Mutant:
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    node = nodes[number]
    parents = {id(child): parent for parent in nodes for child in ast.iter_child_nodes(parent)}
    statement: ast.AST = node
    while not isinstance(statement, ast.stmt):
        statement = parents[id(statement)]
    before = _first_line(statement)
    name, apply = list(changes_of(node))[change]
    new = ast.copy_location(apply(copy.copy(node) if not hasattr(node, "ops") else copy.deepcopy(node)), node)
    parent = parents[id(node)]
    for field, value in ast.iter_fields(parent):
        if value is node:
            setattr(parent, field, new)
        elif isinstance(value, list) and any(item is node for item in value):
            value[[item is node for item in value].index(True)] = new
    after = _first_line(new if statement is node else statement)
    ast.fix_missing_locations(tree)
    return Mutant(getattr(node, "lineno", 0), f"{name}: {before}  ->  {after}", tree)


def _first_line(node: ast.AST) -> str:
    lines = ast.unparse(node).splitlines()
    return lines[0] if len(lines) == 1 else f"{lines[0]} ..."


# --- exchange in place -----------------------------------------------------------------------------------------------


def exchange(modules: list[ModuleType], target: Target, tree: ast.Module) -> bool:
    """Give all functions of the target the code of a changed tree; false if one does not fit."""
    changed = ModuleType(target.module)
    changed.__file__ = str(target.path)
    sys.modules[f"changed.{target.module}"] = changed
    exec(compile(tree, str(target.path), "exec"), changed.__dict__)
    try:
        for module in modules:
            for name, new in vars(changed).items():
                if getattr(new, "__module__", None) == target.module and hasattr(module, name):
                    _exchange_object(getattr(module, name), new)
    except ValueError:
        return False
    return True


def _exchange_object(old: Any, new: Any) -> None:
    if hasattr(old, "cache_clear"):
        old.cache_clear()
        old, new = old.__wrapped__, new.__wrapped__
    if isinstance(old, type):
        for name, value in vars(new).items():
            if name in vars(old):
                _exchange_attribute(vars(old)[name], value)
    elif isinstance(old, FunctionType):
        old.__code__ = new.__code__


def _exchange_attribute(old: Any, new: Any) -> None:
    if isinstance(old, property):
        old, new = old.fget, new.fget
    elif isinstance(old, (classmethod, staticmethod)):
        old, new = old.__func__, new.__func__
    elif hasattr(old, "func") and hasattr(new, "func"):  # a cached property
        old, new = old.func, new.func
    if isinstance(old, FunctionType) and isinstance(new, FunctionType):
        old.__code__ = new.__code__


# --- running ---------------------------------------------------------------------------------------------------------


class Runner:
    """A plugin for pytest that, in place of running the tests once, runs them for every mutant."""

    def __init__(self, target: Target, number: int, seed: int, verbose: bool):
        self.target, self.number, self.seed, self.verbose = target, number, seed, verbose
        self.failed: list[str] = []  # tests that fail without a change
        self.counts = dict.fromkeys((NOTICED, SURVIVED, UNFIT), 0)
        self.num_tests = 0

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        __import__(self.target.module)
        modules = [sys.modules[self.target.module]]
        modules += [sys.modules[self.target.bundle]] if self.target.bundle in sys.modules else []
        items = self._useful(session)
        self.num_tests = len(items)
        source = self.target.path.read_text(encoding="utf-8")
        places = all_mutants(source)
        random.Random(self.seed).shuffle(places)
        print(
            f"{self.target.module}: {len(items)} tests, {min(self.number, len(places))} of {len(places)} mutants",
            flush=True,
        )
        for number, change in places[: self.number]:
            changed = mutant(source, number, change)
            found, killer = self._try(session, items, lambda tree=changed.tree: exchange(modules, self.target, tree))
            self.counts[found] += 1
            if killer is not None:  # what noticed one mutant may notice the next
                items.insert(0, items.pop(killer))
            line = f"{found:8} line {changed.line}: {changed.text}"
            if found == SURVIVED or self.verbose:
                print(line, flush=True)
        return True

    def _useful(self, session: pytest.Session) -> list[pytest.Item]:
        """The tests that pass without a change, the cheapest first; costly ones are left out."""
        with tempfile.TemporaryFile("w+") as file:
            process = os.fork()
            if process == 0:
                _silence()
                results = [self._run_within_limit(session, item) for item in session.items]
                json.dump(results, file)
                file.flush()
                os._exit(0)
            os.waitpid(process, 0)
            file.seek(0)
            results = json.load(file)
        self.failed = [item.nodeid for item, (outcome, _) in zip(session.items, results) if outcome == "failed"]
        print(f"{len(self.failed)} tests fail without a change", *self.failed[:20], sep="\n  ", flush=True)
        costly = [item.nodeid for item, (_, seconds) in zip(session.items, results) if seconds > COSTLY_SECONDS]
        print(f"{len(costly)} tests are costly and are left out", *costly[:20], sep="\n  ", flush=True)
        print(f"{sum(outcome == 'skipped' for outcome, _ in results)} tests are skipped, or were stopped", flush=True)
        rows = [
            (seconds, place)
            for place, (outcome, seconds) in enumerate(results)
            if outcome == "passed" and seconds <= COSTLY_SECONDS
        ]
        print(f"{sum(seconds for seconds, _ in rows):.1f} s for all others")
        return [session.items[place] for _, place in sorted(rows)]

    def _run_within_limit(self, session: pytest.Session, item: pytest.Item) -> tuple[str, float]:
        signal.signal(signal.SIGPROF, _give_up)
        signal.setitimer(signal.ITIMER_PROF, COSTLY_SECONDS)
        try:
            return self._run(session, item)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    def _run(self, session: pytest.Session, item: pytest.Item) -> tuple[str, float]:
        started = time.process_time()
        outcomes = Outcomes()
        session.config.pluginmanager.register(outcomes)
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
        session.config.pluginmanager.unregister(outcomes)
        return outcomes.worst, time.process_time() - started

    def _try(
        self, session: pytest.Session, items: list[pytest.Item], apply: Callable[[], bool]
    ) -> tuple[str, int | None]:
        """What becomes of one mutant, and the place of the test that noticed it."""
        receiving, sending = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(receiving)
            resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_SECONDS, LIMIT_SECONDS))
            _silence()
            try:
                result = self._first_failure(session, items) if apply() else UNFIT
            except BaseException:
                result = "0"
            os.write(sending, str(result).encode())
            os._exit(0)
        os.close(sending)
        with os.fdopen(receiving) as pipe:
            result = pipe.read()
        os.waitpid(process, 0)
        if result in (SURVIVED, UNFIT):
            return result, None
        return NOTICED, int(result) if result else None

    def _first_failure(self, session: pytest.Session, items: list[pytest.Item]) -> str:
        for place, item in enumerate(items):
            if self._run(session, item)[0] == "failed":
                return str(place)
        return SURVIVED


class Outcomes:
    """Collects how one test went."""

    def __init__(self):
        self.worst = "passed"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.outcome != "passed" and self.worst != "failed":
            self.worst = report.outcome


def _give_up(*_: Any) -> None:
    pytest.skip("needs too much time")


def _silence() -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nothing, stream)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def problems(code: int, runner: Runner, allowed: int) -> list[str]:
    """What is wrong with a run, whose exit code pytest gave."""
    survived = runner.counts[SURVIVED]
    found = {
        f"pytest ended with {code}": code != 0,
        "no test ran": runner.num_tests == 0,
        f"{len(runner.failed)} tests fail without a change": bool(runner.failed),
        f"{survived} mutants survived, {allowed} are allowed": survived > allowed,
    }
    return [problem for problem, is_so in found.items() if is_so]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("targets", nargs="*", default=list(TARGETS), help=f"of {', '.join(TARGETS)}; all by default")
    parser.add_argument("--number", type=int, default=40, help="mutants of each module")
    parser.add_argument("--seed", type=int, default=12, help="which ones")
    parser.add_argument("--allowed", type=int, help="survivors of each module that are no failure")
    parser.add_argument("--verbose", action="store_true", help="name those that are noticed, too")
    options = parser.parse_args()
    if len(options.targets) > 1:  # a process each, as all of pytest is for one run
        rest = ["--number", str(options.number), "--seed", str(options.seed)] + ["--verbose"] * options.verbose
        rest += [] if options.allowed is None else ["--allowed", str(options.allowed)]
        codes = [subprocess.call([sys.executable, __file__, name, *rest]) for name in options.targets]
        return int(any(codes))
    os.environ.pop("MOLMO2_STRICT", None)  # costly tests are skipped on purpose
    target = TARGETS[options.targets[0]]
    runner = Runner(target, options.number, options.seed, options.verbose)
    tests = [str(ROOT / "tests" / name) for name in target.tests]
    code = pytest.main(
        ["-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow", "--no-summary", *tests],
        plugins=[runner],
    )
    print(f"{target.module}: {runner.counts} with {runner.num_tests} tests", flush=True)
    found = problems(code, runner, target.allowed if options.allowed is None else options.allowed)
    if found:
        print(f"{target.module}: {'; '.join(found)}", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
