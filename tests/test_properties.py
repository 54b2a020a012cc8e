"""Properties that hold for anything: budgets, Archs, genes and JSON, as hypothesis makes them up."""

from __future__ import annotations

import json
import string
from dataclasses import dataclass
from typing import Any

import pytest

pytest.importorskip("hypothesis", reason="NOT CHECKED by properties: hypothesis is missing (extra `test`)")

from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from vitnas.arch import Arch
from vitnas.budget import Budget
from vitnas.errors import UserError
from vitnas.runs import from_json, to_json
from vitnas.space import Space, autoformer, vit_resnas, vitas

pytestmark = pytest.mark.slow
MANY = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))

SPACES: dict[str, Space] = {
    "autoformer": autoformer("tiny", image_size=32, patch_size=4, num_classes=10),
    "vitas": vitas("micro", image_size=32, num_classes=10),
    "resnas": vit_resnas(num_classes=10),
}
NUMBERS = st.decimals(min_value="0.001", max_value="9999", places=3).map(str)
LIMITS = st.one_of(
    st.builds(
        "{}<={}{}".format, st.sampled_from(["macs", "params"]), NUMBERS, st.sampled_from(["", "K", "M", "G"])
    ),
    st.builds("memory<={}{}".format, NUMBERS, st.sampled_from(["B", "KB", "MB", "MiB", "GiB"])),
    st.builds(
        "latency<={}{}@{}".format,
        NUMBERS,
        st.sampled_from(["us", "ms", "s"]),
        st.sampled_from(["onnxruntime,batch=1", "torch,batch=4"]),
    ),
)


@given(st.lists(LIMITS, min_size=1, max_size=4), st.sampled_from([" and ", ", ", "; ", " & ", "\n"]))
@MANY
def test_a_budget_is_what_its_text_says(limits: list[str], joint: str) -> None:
    """Parsed, written and parsed again it is the same; a limit twice, or one that rounds away, is refused."""
    try:
        budget = Budget.parse(joint.join(limits))
    except UserError:
        reject()
    again = Budget.parse(budget.text)
    assert again.text == budget.text
    assert again == budget


@given(st.text(alphabet=string.printable + "≤≥²１", max_size=60))
@MANY
def test_any_text_is_a_budget_or_a_sentence(text: str) -> None:
    try:
        budget = Budget.parse(text)
    except UserError:
        return
    assert Budget.parse(budget.text) == budget


@pytest.mark.parametrize("name", SPACES)
@given(data=st.data())
@MANY
def test_genes_and_archs_are_one_to_one(name: str, data: st.DataObject) -> None:
    space = SPACES[name]
    drawn = tuple(data.draw(st.integers(0, len(gene.options) - 1)) for gene in space.genes)
    genes = space.canonical(drawn)
    assert space.canonical(genes) == genes, "settled once is settled"
    arch = space.decode(genes)
    assert space.encode(arch) == genes
    assert Arch.from_json(json.loads(json.dumps(to_json(arch)))) == arch
    assert Arch.from_json(to_json(arch)).id == arch.id


JSON: Any = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


@given(JSON)
@MANY
def test_any_json_is_an_arch_or_refused(value: Any) -> None:
    try:
        Arch.from_json(value)
    except ValueError:
        return


@given(st.data())
@MANY
def test_an_arch_with_one_field_changed_is_an_arch_or_refused(data: st.DataObject) -> None:
    value: Any = to_json(SPACES["autoformer"].smallest())
    value[data.draw(st.sampled_from(sorted(value)))] = data.draw(JSON)
    try:
        arch = Arch.from_json(value)
    except ValueError:
        return
    assert Arch.from_json(to_json(arch)) == arch


@dataclass(frozen=True)
class Inner:
    number: int
    text: str | None = None


@dataclass(frozen=True)
class Outer:
    inner: tuple[Inner, ...]
    share: float
    named: dict[str, Inner]


INNER = st.builds(Inner)
OUTER = st.builds(
    Outer, st.lists(INNER).map(tuple), st.floats(allow_nan=False), st.dictionaries(st.text(), INNER)
)


@given(OUTER)
@MANY
def test_a_dataclass_comes_back_from_json(value: Outer) -> None:
    assert from_json(Outer, json.loads(json.dumps(to_json(value)))) == value


@given(JSON)
@MANY
def test_any_json_is_a_dataclass_or_refused(value: Any) -> None:
    try:
        from_json(Outer, value)
    except ValueError:
        return
