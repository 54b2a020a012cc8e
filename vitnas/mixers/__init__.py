"""Token mixers, one file each. `MIXERS` maps an Arch's word to its class."""

from __future__ import annotations

from vitnas.mixers.fourier import Fourier, Fourier2d
from vitnas.mixers.linformer import Linformer, LinformerOneHead, LinformerShared
from vitnas.mixers.long_short import LongShort
from vitnas.mixers.mixer import Convention, HeadMixer, Mixer, MixerShape
from vitnas.mixers.nystrom import Nystrom
from vitnas.mixers.performer import Performer
from vitnas.mixers.softmax import Softmax
from vitnas.mixers.token_mlp import TokenMlp

MIXERS: dict[str, type[Mixer]] = {
    kind.word: kind
    for kind in (
        Softmax,
        Performer,
        Linformer,
        LinformerShared,
        LinformerOneHead,
        Nystrom,
        Fourier,
        Fourier2d,
        TokenMlp,
        LongShort,
    )
}

__all__ = ["MIXERS", "Convention", "HeadMixer", "Mixer", "MixerShape", "Softmax"]
