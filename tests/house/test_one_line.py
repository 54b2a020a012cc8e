"""Adding a mixer, a Space, a Sampler, a Searcher, a Task or a teacher's loss is one new file and one line of a table.

A copy of the package gets exactly that, and then everything must know the new kind: its contract, Archs, counting,
spaces of mixers, Supernets, export, the command line and its help.
"""

from __future__ import annotations

import difflib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]

MIXER = '''
"""Every token becomes the mean of all."""

from torch import Tensor

from vitnas.layers.axes import Axes
from vitnas.mixers.mixer import Convention, Mixer, MixerShape


class Average(Mixer):
    word = "average"

    def __init__(self, dim: int, num_heads: int = 1, *, size: int | None = None, **options: object) -> None:
        super().__init__()
        self.resolve_size(size, 1, 0)

    def axes(self) -> dict[str, Axes]:
        return {}

    def mix(self, x_BND: Tensor) -> Tensor:
        return x_BND.mean(1, keepdim=True).expand_as(x_BND).contiguous()

    @staticmethod
    def macs(shape: MixerShape, convention: Convention = "executed") -> int:
        return 0

    @staticmethod
    def params(shape: MixerShape) -> int:
        return 0

    @staticmethod
    def memory(shape: MixerShape) -> int:
        return (shape.tokens + 1) * shape.dim
'''

SPACE = '''
"""ViTs of two widths whose depth and heads are searched."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from vitnas.grids import ImageSize
from vitnas.space.config import SpaceConfig, from_preset
from vitnas.space.gene import Gene
from vitnas.space.space import Space


@dataclass(frozen=True, kw_only=True)
class DepthSpace(Space):
    kind: ClassVar[str] = "depth"
    rising: ClassVar[tuple[str, ...]] = ("embed_dims", "depths")

    name: str = "depth"
    image_size: ImageSize = 8
    patch_size: int = 4
    embed_dims: tuple[int, ...] = (16, 24)
    depths: tuple[int, ...] = (1, 2, 3)

    def declared(self) -> Iterator[Gene]:
        yield Gene("embed_dim", self.embed_dims, structural=True, scope="stage")
        yield Gene("depth", self.depths, structural=True, scope="stage")
        for slot in range(self.depths[-1]):
            yield Gene(f"num_heads.{slot}", (1, 2), scope="block", slot=slot)

    def fixed_blocks(self) -> Sequence[Sequence[dict[str, Any]]]:
        return [[{"head_dim": 8, "mlp_hidden": 32}] * self.depths[-1]]

    def fixed(self) -> dict[str, Any]:
        return {"patch_size": self.patch_size, "global_pool": "avg"}


SIZES: dict[str, dict[str, Any]] = {"micro": {}, "deep": {"depths": (4, 8)}}


def depth_space(size: str = "micro", **options: Any) -> DepthSpace:
    return DepthSpace(**from_preset(DepthSpace, SIZES, size, options))


@dataclass(frozen=True, kw_only=True)
class DepthConfig(SpaceConfig):
    """ViTs of two widths."""

    kind = DepthSpace.kind
    space = DepthSpace
    sizes = SIZES
    make = staticmethod(depth_space)

    depths: tuple[int, ...] | None = None
'''

SAMPLER = '''
"""The two extremes."""

import random
from dataclasses import dataclass

from vitnas.sample.sampler import Draw, Given, SamplerConfig
from vitnas.space import Space


@dataclass(frozen=True)
class Extremes:
    space: Space
    largest: float

    def draw(self, rng: random.Random) -> list[Draw]:
        return [Draw(arch=self.space.largest() if rng.random() < self.largest else self.space.smallest())]


@dataclass(frozen=True, kw_only=True)
class ExtremesConfig(SamplerConfig):
    """The largest and the smallest Arch in turns by chance."""

    kind = "extremes"

    largest: float = 0.5

    def build(self, space: Space, given: Given) -> Extremes:
        return Extremes(space, self.largest)
'''

SEARCHER = '''
"""The largest Arch that was not tried and meets the Budget, of the corners."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from vitnas.searching.goal import Goal
from vitnas.searching.trial import NamedSearcher, Trial
from vitnas.space import Genes


@dataclass(frozen=True)
class Corners(NamedSearcher):
    word = "corners"

    def propose(
        self, goal: Goal, history: Sequence[Trial], index: int, rng: random.Random
    ) -> Genes | None:
        seen = {trial.genes for trial in history}
        left = (goal.space.encode(arch) for arch in goal.space.corners())
        return next((genes for genes in left if genes not in seen and goal.meets([genes])[0]), None)
'''

TASK = '''
"""Labels by the squared distance to them."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from vitnas.train.task import Batch, Outputs, Task, TaskConfig, TaskGiven


@dataclass(frozen=True)
class Brier(Task):
    num_classes: int

    def __call__(self, outputs: Outputs, batch: Batch, taught: Outputs) -> dict[str, Tensor]:
        wanted_BY = functional.one_hot(batch.targets, self.num_classes)
        return {"loss": (outputs["logits"].softmax(-1) - wanted_BY).square().mean()}


@dataclass(frozen=True, kw_only=True)
class BrierConfig(TaskConfig):
    """Squared distance to the labels."""

    kind = "brier"

    def build(self, given: TaskGiven) -> Brier:
        return Brier(given.num_classes)
'''

TAUGHT = '''
"""The teacher's logits by the squared distance to them."""

from dataclasses import dataclass

from torch import Tensor

from vitnas.train.losses.distillation import TaughtLoss
from vitnas.train.task import Batch, Outputs


@dataclass(frozen=True, kw_only=True)
class Near(TaughtLoss):
    word = "near"
    compares_classes = True
    wants_taught = ("logits",)

    def __call__(self, outputs: Outputs, batch: Batch, taught: Outputs) -> dict[str, Tensor]:
        return {"loss": (outputs["logits"] - taught["logits"]).square().mean()}
'''

# What a new kind is: its file, what is in it, the table's file, the line of the table.
NEW = [
    (
        "mixers/average.py",
        MIXER,
        "mixers/__init__.py",
        "from vitnas.mixers.average import Average as Average",
    ),
    (
        "space/depth.py",
        SPACE,
        "space/__init__.py",
        "from vitnas.space.depth import DepthConfig as DepthConfig",
    ),
    (
        "sample/extremes.py",
        SAMPLER,
        "sample/__init__.py",
        "from vitnas.sample.extremes import ExtremesConfig as ExtremesConfig",
    ),
    (
        "searching/corners.py",
        SEARCHER,
        "searching/searchers.py",
        "from vitnas.searching.corners import Corners as Corners",
    ),
    (
        "train/losses/brier.py",
        TASK,
        "train/losses/__init__.py",
        "from vitnas.train.losses.brier import BrierConfig as BrierConfig",
    ),
    (
        "train/losses/near.py",
        TAUGHT,
        "train/losses/__init__.py",
        "from vitnas.train.losses.near import Near as Near",
    ),
]

TESTS = """
import random
from pathlib import Path

import pytest
import torch

import vitnas
from vitnas.arch import Arch, Block, Stage
from vitnas.cli import main
from vitnas.cli.commands import field_text
from vitnas.counting import count
from vitnas.exporting import export_onnx
from vitnas.extraction import extract
from vitnas.model import build
from vitnas.searching import Study, search
from vitnas.space import Space, mixer_space
from vitnas.space.depth import depth_space
from vitnas.supernet import Supernet
from vitnas.testing import MixerContract, SpaceContract
from vitnas.testing.flops import counted_macs
from vitnas.train import Batch, Classification, TeacherConfig


class TestAverage(MixerContract):
    word = "average"

    def equations(self, mixer, x_BND):
        return torch.stack([sum(x_BND[:, i] for i in range(x_BND.shape[1])) / x_BND.shape[1]] * x_BND.shape[1], 1)


class TestDepth(SpaceContract):
    @pytest.fixture
    def space(self) -> Space:
        return depth_space()


def test_this_is_the_copy() -> None:
    assert Path(vitnas.__file__).parents[1] == Path(__file__).parent


def test_archs_and_counting_know_the_mixer(tmp_path: Path) -> None:
    blocks = tuple(Block(num_heads=2, head_dim=8, mlp_hidden=32, mixer=word) for word in ("average", "softmax"))
    fields = {"image_size": 8, "patch_size": 2, "num_classes": 4, "position": "rotary"}
    arch = Arch(stages=(Stage(embed_dim=16, blocks=blocks),), **fields)
    assert Arch.from_json(arch.to_json()) == arch
    model = build(arch, generator=torch.Generator().manual_seed(0)).eval()
    assert counted_macs(model, (1, 3, 8, 8)) == count(arch).macs
    assert sum(p.numel() for p in model.parameters()) == count(arch).params
    assert export_onnx(model, tmp_path / "model.onnx")["max_abs_diff"] < 1e-4


@pytest.mark.parametrize("space", [mixer_space("micro", image_size=8, mixers=("average", "softmax")), depth_space()])
def test_supernets_and_searches_know_the_kinds(space: Space) -> None:
    supernet = Supernet(space).eval()
    images = torch.randn(2, 3, 8, 8)
    for seed in range(5):
        arch = space.sample(random.Random(seed))
        with torch.no_grad():
            assert torch.equal(supernet(images, arch), extract(supernet, arch).eval()(images))
    study = search(Study.open(space), lambda arch: {"accuracy": arch.depth / 10}, searcher="corners", num_trials=2)
    assert study.best().arch in space.corners()


def test_the_command_line_knows_them(capsys) -> None:
    assert main(["list"]) == 0
    told = capsys.readouterr().out
    assert all(word in told for word in ("average", "depth (micro, deep)", "extremes", "corners", "brier", "near"))
    assert "[bold]sampler.kind=extremes[/bold]: The largest and the smallest" in " ".join(field_text().split())
    assert main(["run", "tour", "sampler.largest=0.3"]) == 2
    assert "sampler.largest belongs to sampler.kind extremes" in " ".join(capsys.readouterr().err.split())


def test_a_run_may_learn_by_the_loss() -> None:
    config = TeacherConfig(network="x", losses=("near", "soft"), weights=(3.0, 1.0))
    logits = {"logits": torch.zeros(2, 3)}, {"logits": torch.ones(2, 3)}
    found = config.task(Classification())(logits[0], Batch((), torch.zeros(2, dtype=torch.long)), logits[1])
    assert found["near"] == 1
    torch.testing.assert_close(found["loss"], found["labels"] + 3)


DEPTH = ["space.kind=depth", "space.depths=1,2"]
MIXERS = ["space.kind=mixers", "space.patch_size=4", "space.mixers=average,softmax"]


@pytest.mark.parametrize("space", [DEPTH, MIXERS])
def test_a_run_with_all_of_them(space: list[str], tmp_path: Path) -> None:
    own = ["sampler.kind=extremes", "sampler.largest=0.3", "search.searcher=corners", "task.kind=brier"]
    small = ["budget=", "data.max_images=200", "supernet.epochs=1", "supernet.warmup_epochs=0", "search.num_trials=2"]
    rest = ["retrain.train.epochs=1", "retrain.train.warmup_epochs=0", "retrain.rank_archs=0", "retrain.baselines=[]"]
    quick = ["export.formats=[]", "export.latency=[]", "device=cpu", "threads=1"]
    assert main(["run", "tour", *space, *own, *small, *rest, *quick, f"folder={tmp_path / 'run'}"]) == 0
    assert (tmp_path / "run" / "results.json").exists()
"""


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with the new files and lines, and tests of it."""
    root = tmp_path_factory.mktemp("copied")
    shutil.copytree(REPO / "vitnas", root / "vitnas", ignore=shutil.ignore_patterns("__pycache__"))
    for file, text, table, line in NEW:
        assert not (root / "vitnas" / file).exists()
        (root / "vitnas" / file).write_text(text.lstrip("\n"))
        path = root / "vitnas" / table
        lines = path.read_text().splitlines()
        last = max(i for i, one in enumerate(lines) if one.startswith("from vitnas."))
        lines.insert(last + 1, line)
        path.write_text("\n".join(lines) + "\n")
    (root / "test_new.py").write_text(TESTS)
    (root / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    return root


def test_one_file_and_one_line_each(copied: Path) -> None:
    """What the copy has beyond the package is that, and nothing is gone."""
    before = {path.relative_to(REPO / "vitnas") for path in (REPO / "vitnas").rglob("*.py")}
    after = {path.relative_to(copied / "vitnas") for path in (copied / "vitnas").rglob("*.py")}
    assert after - before == {Path(file) for file, *_ in NEW}
    assert not before - after
    changed = []
    for path in sorted(before):
        old, new = ((root / "vitnas" / path).read_text().splitlines() for root in (REPO, copied))
        changed += [one for one in difflib.ndiff(old, new) if one[0] in "+-"]
    assert sorted(changed) == sorted(f"+ {line}" for *_, line in NEW)


@pytest.mark.slow
def test_everything_knows_the_new_kinds(copied: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "test_new.py"],
        cwd=copied,
        env={**os.environ, "PYTHONPATH": str(copied)},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
