"""A ViTAS code on the command line: shown, counted, refused."""

from __future__ import annotations

import pytest

from vitnas.cli import main
from vitnas.model import PUBLISHED
from vitnas.model.net_id import net_id_of

CODE = " ".join(map(str, net_id_of(PUBLISHED["vitas_b"])))


@pytest.mark.parametrize(
    "words", [[f"vitas:{CODE}"], [f"vitas:{CODE.replace(' ', ',')}"], f"vitas:{CODE}".split()]
)
def test_a_code_is_shown_and_counted(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", *words]) == 0
    shown = capsys.readouterr().out
    assert PUBLISHED["vitas_b"].id in shown
    assert f"net_id     {CODE}" in shown.replace("\n", " ")
    assert main(["count", *words]) == 0
    assert "990,6" in capsys.readouterr().out


def test_a_bad_code_is_refused_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", f"vitas:{CODE} 7"]) == 2
    assert "the net_id has 53 numbers; it must have 52 for 16 slots" in " ".join(
        capsys.readouterr().err.split()
    )
    assert main(["show", "vitas:x"]) == 2
    assert "position 0 is 'x'" in capsys.readouterr().err
