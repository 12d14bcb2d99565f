"""Where training stands, as a checkpoint keeps it: a dataclass, and the JSON that it is written as."""

import math
from dataclasses import dataclass, field, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints


@dataclass
class Evaluation:
    """What a validation found, by name, what that measures (see Validator.measure), and of how many rows it is: 0
    where an earlier version has not counted them."""

    values: dict[str, float]
    measure: dict[str, Any] = field(default_factory=dict)
    rows: int = 0

    @property
    def figure(self) -> float | None:
        """What the best checkpoint is chosen by, lower is better; None where it is no finite number."""
        value = self.values.get(self.measure.get("figure", ""))
        return value if value is not None and math.isfinite(value) else None

    def is_comparable(self, other: "Evaluation") -> bool:
        """Whether both figures measure the same, as far as both say what they do."""
        told = self.measure.keys() & other.measure.keys()
        return all(self.measure[name] == other.measure[name] for name in told)


@dataclass
class TrainerState:
    """Where training stands: optimizer steps done, the evaluations by their steps, what the meter has summed since the
    last line of metrics, the rows that came until then and those of them that were skipped, where the data stand, how
    float16's gradients are scaled, how many steps were bad, and how many of them up to the last one."""

    step: int = 0
    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    metered: list[float] = field(default_factory=list)
    rows: int = 0
    skipped: int = 0
    streams: dict = field(default_factory=dict)
    scaler: dict = field(default_factory=dict)
    bad_steps: int = 0
    bad_in_a_row: int = 0

    def best_steps(self) -> list[int]:
        """The evaluated steps, the best first: those whose figures measure what that of the last one does. Where rows
        could not be read at one of them, its figure is of others, and it is left out."""
        if not self.evaluations:
            return []
        last = self.evaluations[max(self.evaluations)]
        alike = {step: each for step, each in self.evaluations.items() if each.is_comparable(last)}
        most = max(each.rows for each in alike.values())
        ranked = [(each.figure, step) for step, each in alike.items() if each.rows in (0, most)]
        return [step for _, step in sorted((figure, step) for figure, step in ranked if figure is not None)]


@dataclass
class StoredState:
    """The state file of a checkpoint. checksums are of the other files, and of the rest of this one; saves counts the
    checkpoints of an output folder, whatever their steps are."""

    state: TrainerState
    scheduler: dict[str, int]
    checksums: dict[str, int]
    saves: int = 0

    @classmethod
    def from_json(cls, found) -> "StoredState":
        """What a state file holds, also one of an older version. Raises ValueError for anything else."""
        try:
            if "figures" in found["state"]:
                found = {**found, "state": _of_older(found["state"])}
            return _as(cls, found)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"no state of a training ({error})") from error


def _of_older(state: dict) -> dict:
    """The state of a version that kept one figure of each evaluation, and all values of the last one."""
    figures, last = state["figures"], state["evaluation"]
    figure = "eval/wer" if "eval/wer" in last else "eval/loss"
    end = "/" + figure.removeprefix("eval/")
    sets = [name.removeprefix("eval/").removesuffix(end) for name in last if name.endswith(end) and name != figure]
    measure = {"figure": figure, "sets": sets}
    evaluations = {step: {"values": {figure: value}, "measure": measure} for step, value in figures.items()}
    if figures:
        evaluations[max(figures, key=int)]["values"] = last
    rest = {name: value for name, value in state.items() if name not in ("figures", "evaluation")}
    return {**rest, "evaluations": evaluations}


def _as(kind, value):
    """A value of JSON as a type: numbers, texts, lists, dicts and dataclasses. Raises TypeError for another one's."""
    origin = get_origin(kind) or kind
    if is_dataclass(kind):
        types = get_type_hints(kind)
        return kind(**{name: _as(types[name], each) for name, each in _as(dict, value).items()})
    if kind is float and type(value) is int:
        return float(value)
    if kind is not Any and type(value) is not origin:
        raise TypeError(f"{value!r:.40} is no {origin.__name__}")
    if origin is list and get_args(kind):
        (item,) = get_args(kind)
        return [_as(item, each) for each in value]
    if origin is dict and get_args(kind):
        key, item = get_args(kind)  # JSON has texts as keys
        return {key(name): _as(item, each) for name, each in value.items()}
    return value
