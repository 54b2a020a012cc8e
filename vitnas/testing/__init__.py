"""For tests, ours and those of whoever adds a part: contracts to subclass, and `randomize_`.

class TestMySpace(SpaceContract):
    @pytest.fixture
    def space(self) -> Space:
        return my_space()
"""

from vitnas.testing.mixer import MixerContract
from vitnas.testing.model import ModelContract
from vitnas.testing.random import randomize_
from vitnas.testing.space import SpaceContract
from vitnas.testing.supernet import SupernetContract

__all__ = ["MixerContract", "ModelContract", "SpaceContract", "SupernetContract", "randomize_"]
