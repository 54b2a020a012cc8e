"""Every field of a Run is read by what it is for, or refused.

Reads of fields are noted while a tiny run of all stages goes through and while each kind of Space, Sampler and Task is
built and used. A field that nothing reads has no effect: it must go, or stand in `QUIET` with the reason.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image
from pretrain_help import pretrain_words
from slim_help import save, slim_words, trained
from stage_help import words
from torch import nn

from vitnas.cli import commands, main
from vitnas.data import Augment, DataConfig, TrainBatches, open_data
from vitnas.model import build
from vitnas.sample import SAMPLERS, Found, Given, Moment
from vitnas.space import SPACES, autoformer, vitas
from vitnas.stages.run import KINDS, PretrainConfig, Run, SlimConfig
from vitnas.train import TASKS, Batch, ClassificationConfig, EsViTConfig, TaskGiven, TeacherConfig
from vitnas.train.losses import TAUGHT_LOSSES
from vitnas.train.task import read_views
from vitnas.train.teacher import settled_task

PACKAGE = str(Path(commands.__file__).parents[1])
# Functions that go through all fields, and methods of a configuration that only judge its fields.
GENERIC = {"to_json", "asdict", "_asdict_inner"}
JUDGES = {"__post_init__", "check", "__eq__", "__repr__", "__hash__"}

# Fields that nothing in these tests reads, each with what reads it.
QUIET = {
    "data.augment.ratio": "of random crops (`scale`): below",
    "data.train_split": "of folders and timm's data sets: below",
    "data.test_split": "of folders and timm's data sets: below",
    "data.root": "of timm's data sets: tests/data/test_data_hub.py",
    "data.download": "of timm's data sets: tests/data/test_data_hub.py",
    "data.class_folders": "of folders: tests/data/test_data_folders.py",
    "data.follow_links": "of folders: tests/data/test_data_folders.py",
    "data.config_name": "of data sets on the Hub: vitnas/data/hfds.py",
    "data.input_key": "of timm's data sets: tests/data/test_data_hub.py",
    "data.target_key": "of timm's data sets: tests/data/test_data_hub.py",
    "data.split_key": "of tables of labels: tests/data/test_data_labels.py",
    **dict.fromkeys((f"slim.{item.name}" for item in fields(SlimConfig)), "of slimming: below"),
    **dict.fromkeys(
        (f"pretrain.{item.name}" for item in fields(PretrainConfig) if item.name != "esvit"),
        "of pretraining: below",
    ),
    **dict.fromkeys((f"pretrain.esvit.{item.name}" for item in fields(EsViTConfig)), "of pretraining: below"),
}


# And those of a teacher, which the run has not: below.
OF_A_TEACHER = {"losses", "weights", "label_weight", "soft.temperature", "features.blocks", "features.parts"}
OF_A_TEACHER |= {
    "features.cosine",
    "features.smooth_l1",
    "manifold.blocks",
    "manifold.sample",
    "manifold.patch",
}
OF_A_TEACHER |= {"manifold.random", "manifold.num_random", "compare", "cache", "top_k"}
QUIET |= {f"teacher.{name}": "of a teacher: below" for name in OF_A_TEACHER}


class Reads:
    """Notes which fields of known configurations the package reads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: set[str] = set()
        self.known: dict[int, tuple[str, Any]] = {}
        self.patched: set[type[Any]] = set()
        self.monkeypatch = monkeypatch

    def follow(self, value: Any, prefix: str) -> None:
        """Note reads of `value` and of the configurations in it."""
        self.known[id(value)] = (prefix, value)
        for kind in [type(value)] if type(value) not in self.patched else []:
            self.patched.add(kind)
            self.monkeypatch.setattr(kind, "__getattribute__", self._getter(), raising=False)
        for item in fields(value):
            inner = object.__getattribute__(value, item.name)
            if is_dataclass(inner):
                self.follow(inner, f"{prefix}{item.name}.")

    def _getter(self) -> Any:
        known, found = self.known, self.found

        def getter(value: Any, name: str) -> Any:
            frame = sys._getframe(1)
            while frame.f_code.co_name.startswith("<") and frame.f_back:  # comprehensions
                frame = frame.f_back
            caller = frame.f_code
            path, same = known.get(id(value), ("", None))
            judges = caller.co_name in JUDGES and id(frame.f_locals.get("self")) in known
            used = caller.co_name not in GENERIC and not judges
            if same is value and caller.co_filename.startswith(PACKAGE) and used:
                found.add(f"{path}{name}")
            return object.__getattribute__(value, name)

        return getter


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


@pytest.fixture
def run_reads(reads: Reads, monkeypatch: pytest.MonkeyPatch) -> Reads:
    """Of the Run that a command makes."""
    make = commands.make_run

    def made(*given: Any) -> Run:
        run = make(*given)
        reads.follow(run, "")
        return run

    monkeypatch.setattr(commands, "make_run", made)
    return reads


def leaves(kind: type[Any] = Run, prefix: str = "") -> Iterator[str]:
    """Every dotted field of a Run that holds no other fields, without those of kinds."""
    hints = get_type_hints(kind)
    for item in fields(kind):
        if kind is Run and item.name in KINDS:
            continue
        nested = [t for t in (hints[item.name], *get_args(hints[item.name])) if is_dataclass(t)]
        for inner in nested:
            yield from leaves(inner, f"{prefix}{item.name}.")  # type: ignore[arg-type]
        if not nested:
            yield f"{prefix}{item.name}"


@pytest.mark.slow
def test_a_run_reads_every_field(run_reads: Reads, tmp_path: Path) -> None:
    assert main(words(tmp_path / "run", finals__archs="2", finals__epochs="0.5")) == 0
    unread = set(leaves()) - run_reads.found
    assert unread <= set(QUIET), f"nothing reads {sorted(unread - set(QUIET))}: fields without an effect"
    assert unread == set(QUIET), f"these are read after all: {sorted(set(QUIET) - unread)}"


@pytest.mark.slow
def test_slimming_reads_its_own(run_reads: Reads, tmp_path: Path) -> None:
    net = save(trained(epochs=0.5), tmp_path / "net")
    assert main(slim_words(net, tmp_path / "run", data__image_size="12", resample="true")) == 0
    assert {name for name in leaves() if name.startswith("slim.")} <= run_reads.found


@pytest.mark.slow
def test_pretraining_reads_its_own(run_reads: Reads, tmp_path: Path) -> None:
    assert main(pretrain_words(tmp_path / "run", epochs="0.5")) == 0
    assert {name for name in leaves() if name.startswith("pretrain.")} <= run_reads.found


def test_a_folder_and_crops_read_theirs(reads: Reads, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, size=(12, 8, 8, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        path = tmp_path / "train" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    config = DataConfig(
        dataset=str(tmp_path), image_size=8, holdout=2, batch_size=4, augment=Augment(scale=(0.5, 1.0))
    )
    reads.follow(config, "data.")
    data = open_data(config)
    assert isinstance(config.augment, Augment)
    next(TrainBatches(data.train, config.augment, batch_size=4, seed=0).from_step(0))
    assert {"data.augment.ratio", "data.train_split", "data.test_split"} <= reads.found


# A Space of each kind in small, and for every field another value that makes it another Space.
SMALL: dict[str, dict[str, Any]] = {
    "around": {"network": "test_vit"},
    "autoformer": {},
    "mixers": {"mixers": ("softmax",)},
    "unified": {"mixers": ("softmax",), "depths": (2, 4), "num_stages": (2,)},
    "vit_resnas": {"depths": (2, 3)},
    "vitas": {"patch_sizes": (4,), "num_slots": 3},
}
KEEP = {"keep": (1.0, 0.5), "keep_places": (1,), "selector": "attention"}
CHANGES: dict[str, dict[str, Any]] = {
    "around": {"size": "quarter", "network": "test_vit2", "heads": (1.0,), "hidden": (1.0,), "embed_dim": (0.5, 1.0),
               "head_dim": (0.5, 1.0),
               "blocks": (), "multiple": 64},
    "autoformer": {"size": "tiny", "patch_size": 8, "embed_dims": (16, 32), "depths": (1, 2), "num_heads": (1, 2),
                   "mlp_ratios": (1.0, 2.0), "head_dim": 8, "relative_position": 3},
    "mixers": {"size": "small", "patch_size": 8, "stems": ("linear",), "positions": ("none",),
               "mixers": ("performer", "softmax"),
               "embed_dims": (16, 32), "depths": (1, 2), "num_heads": (1, 2), "mlp_ratios": (1.0, 2.0), "head_dim": 8,
               },
    "unified": {"size": "px32", "stems": ("conv",), "patch_sizes": (4, 8), "scales": (0.5, 1.0), "positions": ("none",),
                "reductions": ("patch",), "num_stages": (1, 2), "depths": (3, 4), "embed_dims": ((16, 24), (64, 80)),
                "mixers": ("performer", "softmax")},
    "vit_resnas": {"size": "sr_tiny_mh", "patch_size": 4, "embed_dims": (16, 32), "depths": (1, 1), "num_heads": (1, 2),
                   "mlp_ratios": (1.0, 2.0), "head_dim": 8, "skip": 0.25, "keep_places": (2,)},
    "vitas": {"size": "mini", "patch_size": 8, "patch_sizes": (8,), "widest": (48, 48, 96), "ratios": (0.5, 1.0),
              "embed_dims": (24, 48), "num_heads": (2,), "inner_dims": (24, 48), "mlp_hiddens": (24, 48),
              "num_slots": 2, "identity": False, "shifted": False},
}  # fmt: skip


def seen(config: Any) -> tuple[Any, ...]:
    """What a Space allows: its genes, with their chances, the Archs at its ends, and those that show every part."""
    space = config.build(image_size=32, in_chans=3, num_classes=5)
    return space.genes, space.largest(), space.smallest(), space.middle(), *space.representatives()


@pytest.mark.parametrize("kind", SPACES)
def test_every_field_of_a_space_makes_another_space(kind: str) -> None:
    config = SPACES[kind]
    changes = {**KEEP, **CHANGES[kind]}  # which may have another place
    assert set(changes) == {item.name for item in fields(config)}, "give another value for every field"
    for name, value in changes.items():
        given = {**SMALL[kind], **({"keep": (1.0, 0.5)} if name in KEEP and name != "keep" else {})}
        if name in ("patch_size", "size"):
            given.pop("patch_sizes", None)
        if name == "size" and kind == "vit_resnas":
            given = {"patch_size": 2}
        assert seen(config(**given)) != seen(config(**{**given, name: value})), name


class Lookable(nn.Module):
    """A network whose loss differs between Archs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images: torch.Tensor, arch: Any, **options: Any) -> torch.Tensor:
        return torch.zeros(len(images), 10) + arch.depth * self.weight


@pytest.mark.parametrize("kind", SAMPLERS)
def test_every_field_of_a_sampler_is_read(kind: str, reads: Reads) -> None:
    config = SAMPLERS[kind]()
    reads.follow(config, "")
    space = vitas("micro", image_size=8) if kind == "identity" else autoformer("micro", image_size=8)
    images = [(torch.zeros(64, 1, 8, 8), torch.zeros(64, dtype=torch.long))] * 2
    sampler: Any = config.build(space, Given(images=images, settled=Found(0.5, {})))
    network = Lookable()
    for step in range(40):
        if hasattr(sampler, "before"):
            optimizer = torch.optim.SGD(network.parameters())
            sampler.before(Moment(step, 40, step / 4, 0, network, optimizer, lambda tensor: None))
        sampler.draw(random.Random(step))
    assert config.rewire_epochs == 0
    assert {item.name for item in fields(config)} <= reads.found


GIVEN = TaskGiven(augment=Augment(), num_classes=3, grid=(2, 2))


@pytest.mark.parametrize("kind", TASKS)
def test_every_field_of_a_task_is_read(kind: str, reads: Reads) -> None:
    config = TASKS[kind]()
    reads.follow(config, "")
    config.build(GIVEN)
    assert {item.name for item in fields(config)} <= reads.found


def test_every_field_of_a_teacher_is_read(reads: Reads, tmp_path: Path) -> None:
    parts = [item.name for item in fields(TeacherConfig) if item.name in TAUGHT_LOSSES]
    config = TeacherConfig(network="x", losses=tuple(parts), weights=(1.0,) * len(parts))
    reads.follow(config, "teacher.")
    network = build(autoformer("micro", image_size=8).smallest())
    task, taught_by = config.task(ClassificationConfig().build(GIVEN)), config.build(network, tmp_path)
    size = network.arch.input_size
    task = settled_task(task, network, taught_by, None, lambda: size)
    images, targets = torch.zeros(2, *size), torch.zeros(2, dtype=torch.long)
    outputs = read_views(network, [images], task.wants)
    task(outputs, Batch((images,), targets), taught_by.answer([images], task.wants_taught))
    assert not config.rivals()
    assert {f"teacher.{name}" for name in OF_A_TEACHER} <= reads.found
