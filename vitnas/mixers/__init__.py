"""Token mixers, one file each. `MIXERS` maps an Arch's word to its class.

The imports of mixers below are the table: a new mixer is one file and one line.
"""

from __future__ import annotations

from vitnas.kinds import members
from vitnas.mixers.fourier import Fourier as Fourier
from vitnas.mixers.fourier import Fourier2d as Fourier2d
from vitnas.mixers.linformer import Linformer as Linformer
from vitnas.mixers.linformer import LinformerOneHead as LinformerOneHead
from vitnas.mixers.linformer import LinformerShared as LinformerShared
from vitnas.mixers.long_short import LongShort as LongShort
from vitnas.mixers.mixer import Convention as Convention
from vitnas.mixers.mixer import HeadMixer as HeadMixer
from vitnas.mixers.mixer import Mixer as Mixer
from vitnas.mixers.mixer import MixerShape as MixerShape
from vitnas.mixers.mixer import QkvBias as QkvBias
from vitnas.mixers.nystrom import Nystrom as Nystrom
from vitnas.mixers.performer import Performer as Performer
from vitnas.mixers.softmax import Softmax as Softmax
from vitnas.mixers.token_mlp import TokenMlp as TokenMlp

MIXERS: dict[str, type[Mixer]] = members(Mixer, globals())
