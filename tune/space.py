"""What a sweep searches: hyperparameters and their ranges, from YAML."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from shardsight.errors import UsageError
from shardsight.settings import read_yaml

_FORMS = "`uniform LOW HIGH`, `loguniform LOW HIGH`, `int LOW HIGH` or `choice A B ...`"


@dataclass(frozen=True)
class Range:
    """Values of one hyperparameter. kind: uniform, loguniform, int (with both ends), or choice.

    values: (low, high), or the choices.
    """

    kind: str
    values: tuple[Any, ...]

    def domain(self) -> Any:
        """As Ray Tune samples it."""
        from ray import tune

        if self.kind == "choice":
            return tune.choice(list(self.values))
        low, high = self.values
        if self.kind == "int":
            return tune.randint(low, high + 1)
        return tune.uniform(low, high) if self.kind == "uniform" else tune.loguniform(low, high)

    def distribution(self) -> Any:
        """As Optuna has it."""
        from optuna import distributions

        if self.kind == "choice":
            return distributions.CategoricalDistribution(self.values)
        if self.kind == "int":
            return distributions.IntDistribution(*self.values)
        return distributions.FloatDistribution(self.values[0], self.values[1], log=self.kind == "loguniform")

    def holds(self, value: Any) -> bool:
        """Whether the value is one of these."""
        if self.kind == "choice":
            return value in self.values
        return isinstance(value, (int, float)) and self.clip(value) == value

    def clip(self, value: Any) -> Any:
        """The nearest value within the range; choices as they are."""
        return value if self.kind == "choice" else min(max(value, self.values[0]), self.values[1])


@dataclass(frozen=True)
class Space:
    """ranges: of what is searched; fixed: values of what is the same in every trial."""

    ranges: dict[str, Range]
    fixed: dict[str, Any]


def load_space(path: str) -> dict[str, Any]:
    """What a YAML file says of hyperparameters, one a line. Raises UsageError."""
    empty = f"holds no hyperparameters: write NAME: {_FORMS}, one a line"
    content = read_yaml("--space", path, empty, ", or write `none` to search nothing")
    return {str(name): value for name, value in content.items()}


def parse_space(content: Mapping[str, Any], known: Iterable[str]) -> Space:
    """The space of {name: text or value}. known: the names that may be there. Raises UsageError."""
    ranges: dict[str, Range] = {}
    fixed: dict[str, Any] = {}
    for name, said in content.items():
        check_name(name, known)
        kind, *rest = said.split() if isinstance(said, str) and said.strip() else [""]
        if kind in ("uniform", "loguniform", "int", "choice"):
            ranges[name] = _range(name, kind, [yaml_value(text) for text in rest])
        elif rest:
            raise UsageError(f"{name}: {said!r} is no range: write {_FORMS}, or one value")
        else:
            fixed[name] = yaml_value(said) if isinstance(said, str) else said
    return Space(ranges, fixed)


def check_name(name: str, known: Iterable[str]) -> None:
    """Raises UsageError for a hyperparameter that is not known."""
    names = sorted(known)
    if name not in names:
        close = difflib.get_close_matches(name, names, 2)
        hint = f"did you mean {' or '.join(sorted(close))}?" if close else "see --train in --help"
        raise UsageError(f"there is no hyperparameter {name}: {hint}")


def yaml_value(text: str) -> Any:
    """A value as YAML has it; also numbers such as 1e-5, which YAML takes for text."""
    value = yaml.safe_load(text)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    return value


def _range(name: str, kind: str, values: list[Any]) -> Range:
    if kind == "choice":
        if not values or len(set(map(str, values))) < len(values):
            raise UsageError(f"{name}: expected different choices after `choice`, found {values}")
        return Range(kind, tuple(values))
    numbers = int if kind == "int" else (int, float)
    if len(values) != 2 or any(isinstance(one, bool) or not isinstance(one, numbers) for one in values):
        raise UsageError(f"{name}: expected two {'whole ' if kind == 'int' else ''}numbers after `{kind}`")
    if not values[0] < values[1]:
        raise UsageError(
            f"{name}: {kind} goes from the lower to the higher number, not from {values[0]} to {values[1]}"
        )
    if kind == "loguniform" and values[0] <= 0:
        raise UsageError(f"{name}: loguniform needs numbers above 0, not {values[0]}: use uniform")
    return Range(kind, tuple(values) if kind == "int" else tuple(map(float, values)))
