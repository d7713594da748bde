"""Every example in a docstring runs, and every public name has one."""

import doctest
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import probae

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(probae.__path__, "probae.")
    if not module.name.endswith("__main__")
)
CONSTANTS = {"LIKELIHOODS"}  # a dict: it has no docstring of its own


def examples() -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = [test for name in MODULES for test in finder.find(importlib.import_module(name), name)]
    return [test for test in found if test.examples]


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.name)
def test_example_runs(
    example: doctest.DocTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # for what an example may write
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    runner.run(example, out=report.append, clear_globs=False)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


@pytest.mark.parametrize("name", sorted(set(probae.__all__) - CONSTANTS))
def test_public_name_is_documented(name: str) -> None:
    public = getattr(probae, name)
    docstring = inspect.getdoc(public) or ""
    summary = docstring.split("\n")[0]
    assert summary, "no docstring"
    assert summary.endswith((".", ":")), summary
    assert "Example:" in docstring, "no example section"
    assert ">>> " in docstring.split("Example:")[1], "no runnable example"


@pytest.mark.parametrize("name", sorted(set(probae.__all__) - CONSTANTS))
def test_public_methods_are_documented(name: str) -> None:
    public = getattr(probae, name)
    if not inspect.isclass(public):
        return
    for attribute, value in vars(public).items():
        if attribute.startswith("_") or not (inspect.isfunction(value) or type(value) is property):
            continue
        assert inspect.getdoc(value), f"{name}.{attribute} has no docstring"


@pytest.mark.parametrize("module", ["probae", *MODULES])
def test_module_is_documented(module: str) -> None:
    assert inspect.getdoc(importlib.import_module(module))


def test_public_names_are_sorted_unique_and_there() -> None:
    assert len(set(probae.__all__)) == len(probae.__all__)
    assert all(hasattr(probae, name) for name in probae.__all__)
    imported = {name for name, value in vars(probae).items() if _is_ours(value)}
    lazily = {"__getattr__", "__dir__"}
    assert imported <= set(probae.__all__) | {"__version__"} | lazily


def _is_ours(value: object) -> bool:
    module = getattr(value, "__module__", "")
    return str(module).startswith("probae") and not inspect.ismodule(value)


@pytest.mark.parametrize("name", sorted(set(probae.__all__) - CONSTANTS))
def test_argument_lists_match_the_docstring(name: str) -> None:
    # a parameter that was renamed leaves its old name in the docstring
    public = getattr(probae, name)
    docstring = inspect.getdoc(public) or ""
    if "Args:" not in docstring:
        return
    section = docstring.split("Args:")[1].split("\n\n")[0]
    indent = min(len(line) - len(line.lstrip()) for line in section.split("\n") if line.strip())
    documented = {
        line.strip().split(":")[0]
        for line in section.split("\n")
        if line.strip() and len(line) - len(line.lstrip()) == indent
    }
    parameters = set(inspect.signature(public).parameters) - {"validate_args"}  # torch's own
    assert documented == parameters
