"""What an Arch costs (`Cost`), what it may cost (`Budget`), and the text a person types for the latter.

    macs<=1.3G
    0.9G<=macs<=1.0G and params<=6M
    macs in 0.9G..1.0G; memory<=200MB
    latency<=8ms@onnxruntime,batch=1
    macs<=50% and latency<=0.5x@onnxruntime,batch=1

Limits are joined by `and`, `&`, `;`, a new line, or a comma in front of another limit. Counts take K, M, G,
T; memory takes B, KB, MB, GB (powers of 1000) or KiB, MiB, GiB; latency takes us, ms, s. `<` is read as `<=`.
Any of them takes a share, `50%` or `0.5x`, of what a given network costs, which `Budget.resolved` is told.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal, InvalidOperation
from typing import Any, TypeAlias

import numpy as np

from vitnas.errors import UserError, nearest

QUANTITIES = ("macs", "params", "memory", "latency")
DEFAULT_LATENCY_TARGET = "onnxruntime,batch=1"

# A number is an upper bound; a pair is (low, high), where None leaves that side open.
Bounds: TypeAlias = float | tuple[float | None, float | None]

_COUNT_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS: dict[str, dict[str, Decimal]] = {
    "macs": {unit: Decimal(factor) for unit, factor in _COUNT_UNITS.items()},
    "params": {unit: Decimal(factor) for unit, factor in _COUNT_UNITS.items()},
    "memory": {
        **{unit: Decimal(1000) ** power for power, unit in enumerate(("B", "KB", "MB", "GB", "TB"))},
        **{unit: Decimal(1024) ** power for power, unit in enumerate(("KiB", "MiB", "GiB"), start=1)},
    },
    "latency": {"us": Decimal("0.001"), "ms": Decimal(1), "s": Decimal(1000)},
}
_SHARES = {"%": Decimal("0.01"), "x": Decimal(1)}
# Units that text is written with; the others are only read.
_WRITTEN = {
    "macs": ("T", "G", "M", "K"),
    "params": ("G", "M", "K"),
    "memory": ("GB", "MB", "KB"),
    "latency": (),
}
_PLAIN = {"macs": "", "params": "", "memory": "B", "latency": "ms"}


@dataclass(frozen=True)
class Cost:
    """What one Arch costs.

    Args:
        macs: multiply-accumulates of one image's forward pass.
        params: number of parameters.
        memory_bytes: peak activation memory of one image in float32.
        latency_ms: measured milliseconds per latency target, e.g. {"onnxruntime,batch=1": 7.9}.
    """

    macs: int
    params: int
    memory_bytes: int
    latency_ms: Mapping[str, float] = field(default_factory=dict, hash=False)

    def value(self, quantity: str, target: str = "") -> float:
        """The cost of one quantity: macs, params, memory (bytes) or latency (ms on `target`).

        Raises:
            UserError: unknown quantity, or a latency that was not measured.
        """
        if quantity == "latency":
            target = target or DEFAULT_LATENCY_TARGET
            if target not in self.latency_ms:
                measured = ", ".join(self.latency_ms) or "none"
                raise UserError(
                    f"latency on {target} was not measured (measured: {measured}); "
                    "a limit on it needs a meter. Pass a latency meter, or leave the limit out."
                )
            return float(self.latency_ms[target])
        _check_quantity(quantity)
        return float({"macs": self.macs, "params": self.params, "memory": self.memory_bytes}[quantity])


@dataclass(frozen=True)
class Limit:
    """Bounds on one quantity. `low`, `high` are in MACs, parameters, bytes or milliseconds; None is open.

    With `is_share` they are shares, above 0 and up to 1, of what a given network costs; such a Limit judges nothing
    before it is `resolved`.
    """

    quantity: str
    low: float | None
    high: float | None
    target: str = ""
    is_share: bool = False

    def __post_init__(self) -> None:
        _check_quantity(self.quantity)
        for bound in (self.low, self.high):
            if bound is not None and self.is_share and not 0 < bound <= 1:
                raise UserError(
                    f"a share of {self.quantity} is {_share_text(bound)}; it must be above 0% and at most 100% of what "
                    "the network costs. Write 50% or 0.5x, or a number with its unit."
                )
            if bound is not None and not (math.isfinite(bound) and bound > 0):
                raise UserError(
                    f"a bound on {self.quantity} is {bound}; it must be a positive number. Mend it."
                )
        if self.low is None and self.high is None:
            raise UserError(f"the limit on {self.quantity} has no bound; give at least one of low and high.")
        if self.low is not None and self.high is not None and self.low > self.high:
            low, high = self._text(self.low), self._text(self.high)
            raise UserError(
                f"the limit on {self.quantity} is at least {low} and at most {high}; nothing meets both. "
                "Swap or change the bounds."
            )
        if self.target and self.quantity != "latency":
            raise UserError(
                f"{self.quantity} has the target @{self.target}; only latency has one. Remove it."
            )

    @property
    def name(self) -> str:
        """The quantity as a person says it: `macs`, or `latency on onnxruntime,batch=1`."""
        return f"latency on {self.target}" if self.quantity == "latency" else self.quantity

    def resolved(self, full: float) -> Limit:
        """This in the units of `full`, which it is a share of. What is counted is rounded to what still meets it."""
        if not self.is_share:
            return self
        exact = [None if b is None else Decimal(repr(b)) * Decimal(repr(full)) for b in (self.low, self.high)]
        if self.quantity != "latency":
            exact = [
                None if b is None else max(Decimal(1), b.to_integral_value(way))
                for b, way in zip(exact, (ROUND_CEILING, ROUND_FLOOR), strict=True)
            ]
        low, high = (None if b is None else float(b) for b in exact)
        return Limit(self.quantity, low, high, self.target)

    def check_resolved(self) -> None:
        """Raise UserError where this is a share still."""
        if self.is_share:
            raise UserError(
                f"the limit {self} is a share of what a network costs, and which network is not said. Write a number "
                "with its unit, or give budget.resolved(cost of the network)."
            )

    def misses(self, value: float) -> list[str]:
        """Why `value` is outside; empty when it is inside."""
        self.check_resolved()
        verb = "are" if self.quantity in ("macs", "params") else "is"
        for bound, outside, word in (
            (self.high, self.high is not None and value > self.high, "at most"),
            (self.low, self.low is not None and value < self.low, "at least"),
        ):
            if outside and bound is not None:
                got, limit = _distinct(value, bound, self.quantity)
                return [f"{self.name} {verb} {got}; the budget allows {word} {limit}"]
        return []

    def violation(self, value: float) -> float:
        """By how much `value` is outside, as a share of the bound it misses; 0 when inside."""
        self.check_resolved()
        if self.high is not None and value > self.high:
            return value / self.high - 1
        if self.low is not None and value < self.low:
            return 1 - value / self.low
        return 0.0

    def __str__(self) -> str:
        at = f"@{self.target}" if self.target else ""
        low, high = (None if bound is None else self._text(bound) for bound in (self.low, self.high))
        if low is None:
            return f"{self.quantity}<={high}{at}"
        if high is None:
            return f"{self.quantity}>={low}{at}"
        return f"{low}<={self.quantity}<={high}{at}"

    def _text(self, bound: float) -> str:
        return _share_text(bound) if self.is_share else exact_quantity(bound, self.quantity)


@dataclass(frozen=True, init=False)
class Budget:
    """What an Arch may cost: limits on MACs, parameters, memory and latency, all of which must be met.

    A number is an upper bound, a pair is (low, high) with None for an open side. `latency_ms` is one bound
    for the default target, or a mapping from target to bounds.

    >>> str(Budget(macs=(0.9e9, 1.0e9), params=6e6))
    '900M<=macs<=1G and params<=6M'
    >>> Budget.parse("macs<=1.3G").misses(Cost(macs=1_410_000_000, params=6, memory_bytes=1))
    ['macs are 1.41G; the budget allows at most 1.30G']
    """

    limits: tuple[Limit, ...]

    def __init__(
        self,
        *,
        macs: Bounds | None = None,
        params: Bounds | None = None,
        memory_bytes: Bounds | None = None,
        latency_ms: Bounds | Mapping[str, Bounds] | None = None,
    ) -> None:
        limits: list[Limit] = []
        for quantity, bounds in (("macs", macs), ("params", params), ("memory", memory_bytes)):
            if bounds is not None:
                limits.append(_limit(quantity, bounds))
        if latency_ms is not None:
            targets = latency_ms if isinstance(latency_ms, Mapping) else {DEFAULT_LATENCY_TARGET: latency_ms}
            cleaned = {_clean_target(name): bounds for name, bounds in targets.items()}
            limits += [_limit("latency", cleaned[name], name) for name in sorted(cleaned)]
        object.__setattr__(self, "limits", tuple(limits))

    @classmethod
    def of(cls, limits: tuple[Limit, ...]) -> Budget:
        """A Budget of these limits, in the order of `QUANTITIES`; bounds on the same quantity are joined."""
        joined: dict[tuple[str, str], Limit] = {}
        for limit in limits:
            key = (limit.quantity, limit.target)
            joined[key] = _join(joined[key], limit) if key in joined else limit
        budget = cls()
        order = sorted(joined.values(), key=lambda limit: (QUANTITIES.index(limit.quantity), limit.target))
        object.__setattr__(budget, "limits", tuple(order))
        return budget

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read the text a person types; empty text is a Budget without limits.

        Raises:
            UserError: what cannot be read, with the rule and the nearest name; contradictory bounds.
        """
        limits = tuple(_parse_limit(clause) for clause in _clauses(text))
        if text.strip() and not limits:
            raise UserError(
                f"budget is {text!r}, which says no limit. Write for example 'macs<=1.3G', or leave it out."
            )
        return cls.of(limits)

    @property
    def text(self) -> str:
        """The text that `parse` reads back to an equal Budget."""
        return str(self)

    @property
    def quantity(self) -> str:
        """What is limited from above, latency first, as objectives are named (`latency@onnxruntime`); else `macs`."""
        upper = [limit for limit in self.limits if limit.high is not None]
        upper.sort(key=lambda limit: limit.quantity != "latency")
        return next((f"{each.quantity}@{each.target}".rstrip("@") for each in upper), "macs")

    @property
    def latency_targets(self) -> tuple[str, ...]:
        """The targets that a meter has to measure."""
        return tuple(limit.target for limit in self.limits if limit.quantity == "latency")

    @property
    def has_shares(self) -> bool:
        """Whether it says shares of what a network costs, which must be `resolved` before anything is judged."""
        return any(limit.is_share for limit in self.limits)

    def resolved(self, cost: Cost) -> Budget:
        """This Budget with shares as numbers, by what the network costs that they are shares of.

        Raises:
            UserError: a share of a latency that `cost` does not hold.

        >>> str(Budget.parse("macs<=50%").resolved(Cost(macs=1001, params=6, memory_bytes=1)))
        'macs<=500'
        """
        return Budget.of(
            tuple(
                limit.resolved(cost.value(limit.quantity, limit.target)) if limit.is_share else limit
                for limit in self.limits
            )
        )

    @property
    def counted(self) -> Budget:
        """The limits that counting alone decides: all but latency."""
        return Budget.of(tuple(limit for limit in self.limits if limit.quantity != "latency"))

    def misses(self, cost: Cost) -> list[str]:
        """Why `cost` is outside the Budget, one reason per limit; empty when it is inside.

        Raises:
            UserError: the Budget limits a latency that `cost` does not hold.
        """
        return [
            reason
            for limit in self.limits
            for reason in limit.misses(cost.value(limit.quantity, limit.target))
        ]

    def violation(self, cost: Cost) -> float:
        """Sum over the limits of the share by which each is missed; 0 when the Budget is met."""
        return sum(self.violations(cost).values())

    def violations(self, cost: Cost) -> dict[str, float]:
        """The share by which each limit is missed, by the limit's text; 0 when it is met."""
        return {
            str(limit): limit.violation(cost.value(limit.quantity, limit.target)) for limit in self.limits
        }

    def mask(self, costs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Which Archs meet the counted limits.

        Args:
            costs: arrays of one length under 'macs', 'params', 'memory' (bytes), as a cost table gives.

        Returns:
            bool array of that length. Latency is not looked at: it has no table.
        """
        length = len(next(iter(costs.values())))
        inside = np.ones(length, dtype=bool)
        for limit in self.counted.limits:
            limit.check_resolved()
            values = costs[limit.quantity]
            if limit.low is not None:
                inside &= values >= limit.low
            if limit.high is not None:
                inside &= values <= limit.high
        return inside

    def __bool__(self) -> bool:
        return bool(self.limits)

    def __str__(self) -> str:
        return " and ".join(str(limit) for limit in self.limits)


def format_quantity(value: float, quantity: str, digits: int = 2) -> str:
    """A number for people: 1280000000 MACs are `1.28G`, 7.9 ms are `7.90ms`, 2e8 bytes are `200.00MB`."""
    _check_quantity(quantity)
    for unit in _WRITTEN[quantity]:
        factor = float(_UNITS[quantity][unit])
        # A value that would round up to 1000 of a unit is written as 1 of the next.
        if abs(value) >= factor * (1 - 0.5 * 10 ** -(digits + 3)):
            return f"{value / factor:.{digits}f}{unit}"
    return f"{value:.{digits}f}ms" if quantity == "latency" else f"{value:.0f}{_PLAIN[quantity]}"


def exact_quantity(value: float, quantity: str) -> str:
    """The shortest text that reads back to exactly `value`, e.g. `1.3G`."""
    exact = Decimal(repr(float(value)))
    unit = next((u for u in _WRITTEN[quantity] if exact >= _UNITS[quantity][u]), _PLAIN[quantity])
    number = (exact / _UNITS[quantity][unit]).normalize()
    return f"{number:f}{unit}"


def _share_text(share: float) -> str:
    """The shortest text that reads back to exactly `share`, e.g. `50%`."""
    return f"{(Decimal(repr(float(share))) * 100).normalize():f}%"


def _distinct(value: float, bound: float, quantity: str) -> tuple[str, str]:
    """Both numbers with as many digits as it takes to tell them apart (1.3002G against 1.3000G)."""
    for digits in range(2, 13):
        texts = (format_quantity(value, quantity, digits), format_quantity(bound, quantity, digits))
        if texts[0] != texts[1]:
            break
    return texts


def _check_quantity(quantity: str) -> None:
    if quantity.lower() in ("flops", "flop", "gflops", "mflops"):
        raise UserError(
            f"{quantity} is ambiguous; a budget counts MACs, and 1 MAC = 2 FLOPs. "
            "Write macs with half the FLOPs (many papers say FLOPs and mean MACs: then keep the number)."
        )
    if quantity not in QUANTITIES:
        raise UserError(
            f"quantity is {quantity!r}; a budget limits {', '.join(QUANTITIES)}."
            f"{nearest(quantity, QUANTITIES)}"
        )


def _limit(quantity: str, bounds: Bounds, target: str = "") -> Limit:
    if isinstance(bounds, tuple):
        if len(bounds) != 2:
            raise UserError(
                f"{quantity} is {bounds}; it takes one upper bound or a pair (low, high). Mend it."
            )
        low, high = (None if bound is None else float(bound) for bound in bounds)
        return Limit(quantity, low, high, target)
    return Limit(quantity, None, float(bounds), target)


def _join(a: Limit, b: Limit) -> Limit:
    for side, first, second in (("lower", a.low, b.low), ("upper", a.high, b.high)):
        if first is not None and second is not None:
            raise UserError(f"{a.name} has two {side} bounds ({a} and {b}); give one.")
    if a.is_share != b.is_share:
        raise UserError(f"{a.name} has a share and a number ({a} and {b}); give both bounds in one way.")
    low = a.low if a.low is not None else b.low
    high = a.high if a.high is not None else b.high
    return Limit(a.quantity, low, high, a.target, a.is_share)


def _clauses(text: str) -> Iterator[str]:
    """Split the text into limits. A comma splits only before another limit: targets hold commas too."""
    text = re.sub(r"(\s*(\band)?\s*[;\n])+\s*(and\b)?", ";", text).strip("; ")
    for part in re.split(r"[&;]|\band\b", text) if text else ():
        pieces: list[str] = []
        for piece in part.split(","):
            if pieces and not re.search(r"[<>≤≥]|\bin\b", piece):
                pieces[-1] += "," + piece
            else:
                pieces.append(piece)
        yield from (piece.strip() for piece in pieces if piece.strip() or len(pieces) == 1)


_NUMBER = r"(?P<{0}>[+-]?[\d_.]+(?:[eE][+-]?\d+)?)\s*(?P<{0}_unit>[A-Za-zµ]*|%)"
_WORD = r"(?P<quantity>[A-Za-z_]+)"
_FORMS = tuple(
    re.compile(form)
    for form in (
        rf"{_WORD}\s*(?P<sign><|>)=?\s*{_NUMBER.format('a')}",
        rf"{_NUMBER.format('a')}\s*(?P<mirrored><|>)=?\s*{_WORD}",
        rf"{_NUMBER.format('a')}\s*<=?\s*{_WORD}\s*<=?\s*{_NUMBER.format('b')}",
        rf"{_NUMBER.format('b')}\s*>=?\s*{_WORD}\s*>=?\s*{_NUMBER.format('a')}",
        rf"{_WORD}\s+in\s+{_NUMBER.format('a')}\s*\.\.\s*{_NUMBER.format('b')}",
    )
)


def _parse_limit(clause: str) -> Limit:
    written = clause.replace("≤", "<=").replace("≥", ">=")
    body, at, target = (piece.strip() for piece in written.partition("@"))
    # `0.9G..1.0G`: keep the two dots apart from the numbers' own.
    match = next((m for m in (form.fullmatch(body.replace("..", " .. ")) for form in _FORMS) if m), None)
    if match is None:
        raise UserError(
            f"budget part {clause!r} cannot be read; write quantity<=number, quantity>=number or "
            "low<=quantity<=high and join several with ' and '. "
            "Example: 'macs<=1.3G and latency<=8ms@onnxruntime,batch=1'."
        )
    groups: dict[str, Any] = match.groupdict()
    quantity = groups["quantity"].lower()
    _check_quantity(quantity)
    a = _parse_number(groups["a"], groups["a_unit"], quantity, clause)
    is_share = _is_share(groups["a_unit"])
    if at and not target:
        raise UserError(f"budget part {clause!r} has nothing after '@'; name what runs the Model there.")
    target = _clean_target(target) if target else (DEFAULT_LATENCY_TARGET if quantity == "latency" else "")
    if groups.get("b"):
        b = _parse_number(groups["b"], groups["b_unit"], quantity, clause)
        if _is_share(groups["b_unit"]) != is_share:
            raise UserError(f"budget part {clause!r} has a share and a number; give both bounds in one way.")
        return Limit(quantity, a, b, target, is_share)
    is_upper = groups.get("sign") == "<" or groups.get("mirrored") == ">"
    return Limit(quantity, None if is_upper else a, a if is_upper else None, target, is_share)


def _is_share(unit: str) -> bool:
    return unit.lower() in _SHARES


def _parse_number(number: str, unit: str, quantity: str, clause: str) -> float:
    units = {**_UNITS[quantity], **_SHARES}
    known = {name.lower(): factor for name, factor in units.items()}
    folded = unit.replace("µ", "u").lower()
    if folded not in known:
        allowed = ", ".join(name for name in _UNITS[quantity] if name) + ", or a share as 50% or 0.5x"
        problem = f"unit {unit!r}" if unit else "no unit"
        raise UserError(
            f"budget part {clause!r} has {problem}; {quantity} takes {allowed}."
            f"{nearest(unit, units) if unit else ''}"
        )
    try:
        if re.search(r"__|^_|_$", number.strip("+-")):
            raise InvalidOperation
        return float(Decimal(number.replace("_", "")) * known[folded])
    except InvalidOperation as error:
        raise UserError(
            f"budget part {clause!r} has the number {number!r}; write it like 1.3. Mend it."
        ) from error


def split_target(text: str) -> tuple[str, str]:
    """A quantity and what its latency is measured on, "" where nothing is said.

    >>> split_target("latency@onnxruntime, batch=1")
    ('latency', 'onnxruntime,batch=1')
    """
    quantity, _, target = text.partition("@")
    return quantity.strip(), _clean_target(target)


def _clean_target(target: str) -> str:
    """One spelling per target: no spaces around its commas and equals signs."""
    return re.sub(r"\s*([,=])\s*", r"\1", target.strip())
