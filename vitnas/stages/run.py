"""Run: everything that fixes a run's result, as nested frozen dataclasses. A recipe returns one; run.yaml holds one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from vitnas.budget import QUANTITIES, Budget
from vitnas.data import DataConfig
from vitnas.errors import UserError, nearest
from vitnas.measure.target import parse_target
from vitnas.runs import write_atomic
from vitnas.sample import FocusConfig
from vitnas.searching import SEARCHERS
from vitnas.space import SPACES
from vitnas.supernet import Coupled
from vitnas.train import TrainConfig

# Fields that may change when a run is resumed: they change how fast or how loud it is, not what comes out.
FREE = {"threads", "workers", "trackers", "device", "log_every", "checkpoint_minutes"}
BASELINES = ("hand_scaled", "random_search")


@dataclass(frozen=True, kw_only=True)
class SpaceConfig:
    """Which Space. Image size, channels and classes come from the data.

    `size` is a preset of the Space; options left at None are the preset's. `mixers`, `stems` and `positions`
    belong to the kind `mixers` alone; `patch_sizes` (instead of `patch_size`), `inner_dims` (of q, k and v each),
    `mlp_hiddens` and `num_slots` to `vitas`.
    """

    kind: str = "autoformer"
    size: str = "micro"
    patch_size: int = 2
    embed_dims: tuple[int, ...] | None = None
    depths: tuple[int, ...] | None = None
    num_heads: tuple[int, ...] | None = None
    mlp_ratios: tuple[float, ...] | None = None
    head_dim: int | None = None
    relative_position: int | None = None
    mixers: tuple[str, ...] | None = None
    stems: tuple[str, ...] | None = None
    positions: tuple[str, ...] | None = None
    patch_sizes: tuple[int, ...] | None = None
    inner_dims: tuple[int, ...] | None = None
    mlp_hiddens: tuple[int, ...] | None = None
    num_slots: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in SPACES:
            raise UserError(f"space.kind is {self.kind!r}; it must be one of {', '.join(SPACES)}.")


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """Which Archs train at a step: `uniform` (one), `sandwich` (largest, random, smallest), `several` (on slices),
    `spread` (on slices, their values dealt out), `focus` (learns which are best for each budget; see focus.*),
    `best_up` (of many near a budget the best guess) or `identity` (one; slots hold the identity with `identity_prob`).

    Without `identity_prob` it is searched for before training, so that the mean cost meets the budget (identity.json).

    `warmup_epochs` of `spread` open the options one by one, the largest first; with `rewire` heads and hidden units are
    sorted at the start of these epochs.
    """

    kind: Literal["uniform", "sandwich", "several", "spread", "focus", "best_up", "identity"] = "uniform"
    num_random: int = 2
    num_archs: int = 2
    distill: bool = True
    warmup_epochs: float = 0
    rewire: bool = False
    identity_prob: float | None = None
    focus: FocusConfig = field(default_factory=FocusConfig)

    def __post_init__(self) -> None:
        if self.num_random < 0 or self.num_archs < 1:
            raise UserError(
                f"sampler.num_random is {self.num_random} and num_archs {self.num_archs}; they must be at least 0 and "
                "1."
            )
        quantity, _, target = self.focus.quantity.partition("@")
        if quantity not in QUANTITIES or (quantity == "latency") != bool(target):
            raise UserError(
                f"sampler.focus.quantity is {self.focus.quantity!r}; known are macs, params, memory and "
                f"latency@TARGET, for example latency@onnxruntime,batch=1.{nearest(quantity, QUANTITIES)}"
            )
        if target:
            parse_target(target)
        if self.identity_prob is not None and not 0 <= self.identity_prob < 1:
            raise UserError(
                f"sampler.identity_prob is {self.identity_prob}; it must be from 0 to below 1. Use 0.5, or leave it "
                "out."
            )
        if self.identity_prob is not None and self.kind != "identity":
            raise UserError(
                f"sampler.identity_prob is {self.identity_prob} with sampler.kind {self.kind!r}, which does not draw "
                "identities by it. Use sampler.kind=identity, or leave it out."
            )


@dataclass(frozen=True, kw_only=True)
class SharingConfig:
    """How Archs share the supernet's weights: `coupling` says which entries a width uses, the first (`prefix`), those
    from either end in one step (`bilateral`) or a run on a circle (`cyclic`).

    `private_tokens`: patch embedding, class token and positions per patch size; `private_heads`: q and k per head
    count. Private tensors and `cyclic` need space.kind vitas.
    """

    coupling: Coupled = "prefix"
    private_tokens: bool = False
    private_heads: bool = False


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What is learned: `classification`, `token_mixup` (labels per patch, with a patch head weighted `patch_weight`) or
    `hard_distillation` (labels and the choices of `teacher`, a folder of a trained model or a timm name, weighted
    `teacher_weight`)."""

    kind: Literal["classification", "token_mixup", "hard_distillation"] = "classification"
    patch_weight: float = 1.0
    teacher: str = ""
    teacher_weight: float = 0.5

    def __post_init__(self) -> None:
        if self.kind == "hard_distillation" and not self.teacher:
            raise UserError(
                "task.teacher is empty; hard_distillation learns from one. Name a folder of a trained model, or a timm "
                "model."
            )
        if self.patch_weight < 0 or not 0 <= self.teacher_weight <= 1:
            raise UserError(
                f"task.patch_weight is {self.patch_weight} and teacher_weight {self.teacher_weight}; the first is not "
                "negative, the second a share from 0 to 1. Use 1 and 0.5."
            )

    @property
    def heads(self) -> dict[str, bool]:
        """Fields of the Archs that learn this."""
        named = {"token_mixup": "patch_head", "hard_distillation": "distill_token"}
        return {named[self.kind]: True} if self.kind in named else {}


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How to search: `searcher` is a name (`evolution`, `autoformer`, `random`, `tpe`, `nsga2`, ...; `sampler`
    asks what sampler.kind=focus has learned), `num_trials` the Archs to score, `objectives` what to improve,
    `storage` an Optuna URL (None: study.db in the run folder)."""

    searcher: str = "evolution"
    num_trials: int = 200
    objectives: tuple[str, ...] = ("accuracy", "macs")
    storage: str | None = None

    def __post_init__(self) -> None:
        if self.searcher not in (*SEARCHERS, "sampler"):
            raise UserError(
                f"search.searcher is {self.searcher!r}; searchers are {', '.join(SEARCHERS)} and sampler."
            )
        if self.num_trials < 1:
            raise UserError(f"search.num_trials is {self.num_trials}; a search scores at least 1 Arch.")
        if not self.objectives or self.objectives[0] != "accuracy":
            raise UserError(
                f"search.objectives is {self.objectives}; the first must be accuracy. Put it first."
            )
        for name in self.objectives:
            quantity, _, target = name.partition("@")
            if quantity not in ("accuracy", *QUANTITIES) or (quantity == "latency") != bool(target):
                raise UserError(
                    f"search.objectives has {name!r}; known are accuracy, macs, params, memory and latency@TARGET, "
                    "for example latency@onnxruntime,batch=1."
                )


@dataclass(frozen=True, kw_only=True)
class RetrainConfig:
    """How the chosen Arch is trained for use, and what it is compared with.

    `start` is `scratch` (new weights; the comparison is then at equal training) or `inherited` (from the supernet;
    the table says so). `baselines` are trained in the same way: a `hand_scaled` plain ViT at the same budget and the
    best of a `random_search` with as many scored Archs. `rank_archs` Archs are trained from scratch for `rank_epochs`
    to see how well the supernet ranks them; 0 leaves that out.
    """

    train: TrainConfig = field(default_factory=lambda: TrainConfig(monitor_every=0))
    start: Literal["scratch", "inherited"] = "scratch"
    baselines: tuple[str, ...] = BASELINES
    rank_archs: int = 6
    rank_epochs: float = 10

    def __post_init__(self) -> None:
        for name in self.baselines:
            if name not in BASELINES:
                raise UserError(f"retrain.baselines has {name!r}; known are {', '.join(BASELINES)}.")
        if self.rank_archs < 0 or self.rank_epochs <= 0:
            raise UserError(
                f"retrain.rank_archs is {self.rank_archs} and rank_epochs {self.rank_epochs}; the first cannot be "
                "negative and the second must be above 0. Use rank_archs=0 to leave the ranking out."
            )


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What to write and where to measure: `onnx`, `torch_export` (.pt2); latency targets as in a budget."""

    formats: tuple[Literal["onnx", "torch_export"], ...] = ("onnx", "torch_export")
    latency: tuple[str, ...] = ("onnxruntime,batch=1", "torch,batch=1")

    def __post_init__(self) -> None:
        for target in self.latency:
            parse_target(target)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A complete run. `budget` is text (`macs<=1.3G and params<=6M`); empty means no limit.

    `pretrained` names a timm ViT that the supernet starts from. `threads` are CPU threads (None: torch's choice).
    """

    recipe: str = "tour"
    budget: str = ""
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    space: SpaceConfig = field(default_factory=SpaceConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    sharing: SharingConfig = field(default_factory=SharingConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    supernet: TrainConfig = field(default_factory=TrainConfig)
    pretrained: str | None = None
    search: SearchConfig = field(default_factory=SearchConfig)
    retrain: RetrainConfig = field(default_factory=RetrainConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    device: Literal["auto", "cpu"] = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.budget:
            Budget.parse(self.budget)
        if self.search.searcher == "sampler" and self.sampler.kind != "focus":
            raise UserError(
                f"search.searcher is 'sampler' but sampler.kind is {self.sampler.kind!r}, which learns nothing "
                "that could "
                "answer. Use sampler.kind=focus, or another searcher."
            )
        if self.retrain.train.precision != self.supernet.precision:
            raise UserError(
                f"retrain.train.precision is {self.retrain.train.precision!r} and supernet.precision is "
                f"{self.supernet.precision!r}; one precision serves the whole run. Set both alike."
            )
        self._check_sampler()
        if self.threads is not None and self.threads < 1:
            raise UserError(f"threads is {self.threads}; it must be at least 1. Leave it out for all cores.")

    def _check_sampler(self) -> None:
        sampler, size = self.sampler, self.data.batch_size
        if sampler.kind in ("several", "spread") and size % sampler.num_archs:
            low = size // sampler.num_archs * sampler.num_archs
            raise UserError(
                f"data.batch_size is {size}; sampler.num_archs {sampler.num_archs} must divide it. Nearest: "
                f"{', '.join(str(n) for n in (low, low + sampler.num_archs) if n)}."
            )
        if sampler.rewire and self.supernet.ema is not None:
            raise UserError(
                "sampler.rewire is on and supernet.ema too; sorting units would mix up the average. Set supernet.ema "
                "to null."
            )
        coupling = self.sharing.coupling
        if coupling != "prefix" and (sampler.rewire or self.pretrained):
            raise UserError(
                f"sharing.coupling is {coupling!r} with {'sampler.rewire' if sampler.rewire else 'pretrained'}, which "
                "puts the most useful entries first; that serves a prefix only. Use prefix, or leave it out."
            )
        if sampler.rewire and not sampler.warmup_epochs:
            raise UserError(
                "sampler.rewire is on and sampler.warmup_epochs is 0; units are sorted while the warm-up lasts. Set "
                "warmup_epochs, for example 30."
            )
        if sampler.warmup_epochs and sampler.kind != "spread":
            raise UserError(
                f"sampler.warmup_epochs is {sampler.warmup_epochs} with sampler.kind {sampler.kind!r}; options open "
                "with 'spread' only. Use that, or 0."
            )
        if self.task.kind != "classification" and sampler.kind == "sandwich" and sampler.distill:
            raise UserError(
                f"sampler.distill is on and task.kind is {self.task.kind!r}, which does not learn from other Archs. "
                "Set sampler.distill to false."
            )


def field_names(kind: type[Any] = Run, prefix: str = "") -> Iterator[str]:
    """Every field of a Run that can be set, dotted: `supernet.epochs`, `data.dataset`, ..."""
    from typing import get_type_hints

    hints = get_type_hints(kind)
    for item in fields(kind):
        name = f"{prefix}{item.name}"
        yield name
        nested = [
            t for t in (hints[item.name], *getattr(hints[item.name], "__args__", ())) if is_dataclass(t)
        ]
        for inner in nested:
            yield from field_names(inner, f"{name}.")  # type: ignore[arg-type]


def save_run(run: Run, path: Path) -> None:
    """Write run.yaml."""
    write_atomic(
        path,
        "# The resolved run: every field, defaults included.\n" + yaml.safe_dump(plain(run), sort_keys=False),
    )


def plain(value: Any) -> Any:
    """A dataclass as plain YAML values (tuples become lists)."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def lasting(value: Any) -> Any:
    """A plain run without the fields that may change when it is resumed."""
    if not isinstance(value, dict):
        return value
    return {key: lasting(item) for key, item in value.items() if key not in FREE}


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """What changed between two plain runs: `supernet.epochs: 30 then, 40 now`."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            text
            for key in dict.fromkeys((*old, *new))
            for text in differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
        ]
    return [] if old == new or prefix.split(".")[-1] in FREE else [f"{prefix}: {old!r} then, {new!r} now"]
