"""Samplers: which Archs train at this step. `SAMPLERS` maps a word to its class."""

from __future__ import annotations

from vitnas.sample.draw import Draw, Fixed, Sampler
from vitnas.sample.focus import BestUp, Focus, FocusConfig
from vitnas.sample.hook import Hook, Moment
from vitnas.sample.identity import Found, Identity, identity_probability
from vitnas.sample.sandwich import Sandwich
from vitnas.sample.several import Several
from vitnas.sample.spread import Spread
from vitnas.sample.uniform import Uniform

SAMPLERS = {
    "uniform": Uniform,
    "sandwich": Sandwich,
    "several": Several,
    "spread": Spread,
    "focus": Focus,
    "best_up": BestUp,
    "identity": Identity,
}

__all__ = [
    "SAMPLERS",
    "BestUp",
    "Draw",
    "Fixed",
    "Focus",
    "FocusConfig",
    "Found",
    "Hook",
    "Identity",
    "Moment",
    "Sampler",
    "Sandwich",
    "Several",
    "Spread",
    "Uniform",
    "identity_probability",
]
