"""Which of several models to take, and why, from their figures and how sure these are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

CLOSE = 0.01  # of 0 to 1: who loses no more than this against the best may win by speed
NOISY = 0.05  # an interval wider than this is a reason to label more pictures


@dataclass(frozen=True)
class Contender:
    """A model's main figure, in 0 to 1, higher is better, with its 95 % interval.

    behind: how far it is behind the best, with the interval of that difference over the same resampled pictures. speed:
    pictures per second, with the least and the most of the rounds; None where it was not measured.
    """

    name: str
    value: float
    interval: tuple[float, float] | None = None
    behind: float = 0.0
    behind_interval: tuple[float, float] | None = None
    speed: float | None = None
    speed_range: tuple[float, float] | None = None

    @property
    def equal(self) -> bool:
        """Whether chance alone may have put it behind the best."""
        return self.behind_interval is not None and self.behind_interval[0] <= 0

    def faster_than(self, other: "Contender") -> bool:
        """Whether it is, by more than the rounds differ."""
        if not (self.speed_range and other.speed_range):
            return False
        return self.speed_range[0] > other.speed_range[1]


def recommend(contenders: Sequence[Contender], measure: str, pictures: int) -> dict[str, Any]:
    """{model, sentence, reasons}: the fastest of the models that are as good as the best, which is the first of them by
    value, within noise or within CLOSE. measure: the main figure's name. pictures: of the labelled set."""
    if not contenders:
        return {"model": None, "sentence": "No model could be measured; see their errors.", "reasons": []}
    best = max(contenders, key=lambda one: one.value)
    good = [one for one in contenders if one is best or one.equal or one.behind <= CLOSE]
    fastest = max(good, key=lambda one: one.speed or 0.0)
    chosen = max((one for one in good if not fastest.faster_than(one)), key=lambda one: one.value)
    reasons = [f"{best.name} has the highest {measure}: {points(best.value)}{_between(best.interval)}."]
    if chosen is not best:
        reasons.append(f"{chosen.name} has {points(chosen.value)}{_between(chosen.interval)}: {_behind(chosen)}.")
    reasons += _speed_reasons(chosen, best, contenders)
    reasons += _noise_reasons(contenders, best, pictures)
    return {"model": chosen.name, "sentence": _sentence(chosen, best, contenders, measure), "reasons": reasons}


def front(contenders: Sequence[Contender]) -> list[str]:
    """The names of those than which no other is both as fast and as good, and better in one of the two."""

    def beaten(one: Contender, other: Contender) -> bool:
        assert one.speed is not None and other.speed is not None
        as_good = other.value >= one.value and other.speed >= one.speed
        return as_good and (other.value > one.value or other.speed > one.speed)

    timed = [one for one in contenders if one.speed is not None]
    return [one.name for one in timed if not any(beaten(one, other) for other in timed)]


def points(share: float) -> str:
    """0.373 as 37.3: the field's percent."""
    return f"{100 * share:.1f}"


def _sentence(chosen: Contender, best: Contender, contenders: Sequence[Contender], measure: str) -> str:
    if chosen is not best:
        assert chosen.speed and best.speed
        noise = ", which is less than the noise," if chosen.equal else ""
        gap = f"within {_gap(chosen.behind)} points of the best{noise}"
        return f"{chosen.name}: {gap} at {chosen.speed / best.speed:.1f} times its speed."
    speed = f" at {best.speed:.1f} pictures per second" if best.speed else ""
    if len(contenders) == 1:
        return f"{best.name}: {measure} {points(best.value)}{speed}; no other model was compared."
    second = min((one for one in contenders if one is not best), key=lambda one: one.behind)
    if second.equal:
        return f"{best.name}{speed}: {second.name} is as good within noise, and not faster."
    return f"{best.name}{speed}: the best, by {_gap(second.behind)} points over {second.name}."


def _gap(behind: float) -> str:
    """Rounded up, so that `within` is true."""
    return points(behind + 0.0004999) if behind > 0 else "0.0"


def _behind(one: Contender) -> str:
    gap = f"{points(one.behind)} points less"
    if one.behind_interval is None:
        return gap
    low, high = one.behind_interval
    inside = f"95 % interval {points(low)} to {points(high)}"
    return f"{gap}, which is less than the noise ({inside})" if one.equal else f"{gap} ({inside})"


def _speed_reasons(chosen: Contender, best: Contender, contenders: Sequence[Contender]) -> list[str]:
    if chosen.speed is None:
        return ["Speed was not measured, so that accuracy alone decides."]
    reasons = []
    if chosen is not best and best.speed:
        reasons.append(
            f"{chosen.name} computes {chosen.speed:.1f} pictures per second, {best.name} {best.speed:.1f}, "
            "each alone on this machine, on pictures that are decoded already."
        )
    for one in contenders:
        if one is not chosen and one.faster_than(chosen):
            reasons.append(
                f"{one.name} is {one.speed / chosen.speed:.1f} times as fast, but {points(one.behind)} points "  # type: ignore[operator]
                "behind the best."
            )
    return reasons


def _noise_reasons(contenders: Sequence[Contender], best: Contender, pictures: int) -> list[str]:
    same = [one.name for one in contenders if one is not best and one.equal]
    reasons = [f"Not told apart from {best.name} by {pictures:,} pictures: {', '.join(same)}."] if same else []
    widths = [one.interval[1] - one.interval[0] for one in contenders if one.interval]
    if widths and max(widths) > NOISY:
        reasons.append(
            f"With {pictures:,} pictures, figures are known to {points(max(widths) / 2)} points either way: label more "
            "to tell closer models apart."
        )
    return reasons


def _between(interval: tuple[float, float] | None) -> str:
    return f" (95 % interval {points(interval[0])} to {points(interval[1])})" if interval else ""
