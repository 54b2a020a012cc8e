"""Texts in which Transformer-LS's authors write a network, that are none or that no Arch can say."""

from __future__ import annotations

import pytest

from vitnas.errors import UserError
from vitnas.model.transformer_ls import transformer_ls


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("l1,x3", "'x3' is no part of a Transformer-LS text"),
        ("l1,h²", "'h²' is no part of a Transformer-LS text"),
        ("l1,,h3", "'' is no part of a Transformer-LS text"),
        ("l1,h0,d12,r2", r"heads \(h\) do not divide the width \(d\)"),
        ("l1,h5,d12,r2", r"heads \(h\) do not divide the width \(d\)"),
        ("l1,g2,r2", r"a stage has more than one class token \(g\)"),
        ("l1,g0,r2_l2,g1,r2", r"a stage has more than one class token \(g\)"),
        ("l1,g1,r2_l2,g0,r2_l3,g1,r2", r"class tokens \(g\) differ between the stages before the last"),
        ("l1,r2_l2,p4,r2", r"patches \(p\) behind the first stage are other than 2"),
        ("l1,a0,r2_l2,a1,r2", r"absolute positions \(a\) differ between stages"),
    ],
)
def test_what_is_no_network_is_refused(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        transformer_ls(text)
