"""Run: everything that fixes a run's result, as nested frozen dataclasses. A recipe returns one; run.yaml holds one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args, get_type_hints

import yaml

from vitnas.budget import QUANTITIES, Budget, split_target
from vitnas.data import DataConfig
from vitnas.errors import UserError, check_word, check_words
from vitnas.exporting.opset import OPSET, check_opset
from vitnas.exporting.precision import Format
from vitnas.layers.selectors import SELECTIONS
from vitnas.measure.target import parse_target
from vitnas.records import Effort
from vitnas.runs import to_json, write_atomic
from vitnas.sample import SAMPLERS, SamplerConfig, UniformConfig
from vitnas.searching import SEARCHERS
from vitnas.searching.passwords import PASSWORD, has_password, shown
from vitnas.slimming import IMPORTANCE
from vitnas.space import SPACES, AutoFormerConfig, SpaceConfig
from vitnas.supernet import Coupled
from vitnas.train import (
    TASKS,
    ClassificationConfig,
    EsViTConfig,
    TaskConfig,
    TeacherConfig,
    TrainConfig,
)

# Fields that may change when a run is resumed: they change how fast or how loud it is, not what comes out.
FREE = {"threads", "workers", "trackers", "device", "log_every", "checkpoint_minutes", "cache"}
# Fields that may become larger in a finished run: the stage then goes on from what it has, and later ones follow.
GROWS = {"search.num_trials": "search"}
BASELINES = ("hand_scaled", "random_search")
OWN = "pretrained"  # as teacher.network: the network that the run starts from, as it was
MUST_LEARN = ("predictor", *(word for word, kind in SELECTIONS.items() if kind.keeps_keys))
Axis: TypeAlias = Literal["heads", "hidden", "embed_dim", "blocks"]


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
class SearchConfig:
    """How to search: `searcher` is a name (`evolution`, `predictor`, `autoformer`, `random`, `tpe`, `nsga2`, ...;
    `sampler` asks what sampler.kind=focus has learned; `halving` needs no supernet: it trains so many random Archs
    briefly, and the better ones on in the finals; of `guided_halving` a predictor proposes half), `num_trials` the
    Archs to score, `objectives` what to improve (`budget`: the quantity that the budget limits, latency first; macs
    where it limits none), `storage` an Optuna URL (None: study.db in the run folder), whose password stands in
    VITNAS_STORAGE_PASSWORD. With weights of the supernet Archs are ordered by their `score`: the `loss` on held-out
    images says more of them than the `accuracy` does; Archs that are trained have their accuracy. Where scores are of
    too few images to tell Archs apart, `prefer` takes by `accuracy` what Archs of such cost promise, by `cost` the
    cheapest, of the last of the finals too, and with `folds` (cross-validation) so many supernets are trained, each
    with another part of train held out: an Arch's score is of all these images, which takes so many times as long.
    Where the supernet orders retrain.rank_archs trained Archs with a Kendall's tau below `least_tau`, the run does not
    rely on it: it goes on as with `guided_halving`, or with finals where its weights are inherited (-1 relies on it in
    any case, 1 only on a perfect order)."""

    searcher: str = "evolution"
    num_trials: int = 200
    objectives: tuple[str, ...] = ("accuracy", "budget")
    score: Literal["loss", "accuracy"] = "loss"
    prefer: Literal["accuracy", "cost"] = "accuracy"
    least_tau: float = 0.6
    folds: int = 1
    storage: str | None = None

    def __post_init__(self) -> None:
        check_word("search.searcher", self.searcher, SEARCHERS)
        if self.storage is not None and has_password(self.storage):
            raise UserError(
                f"search.storage is {shown(self.storage)!r} with a password, and a run writes its fields down. Leave "
                f"it out, and set {PASSWORD}, PGPASSWORD or ~/.pgpass."
            )
        if not -1 <= self.least_tau <= 1:
            raise UserError(
                f"search.least_tau is {self.least_tau:g}; Kendall's tau is between -1 and 1. Use 0.6, or -1 to rely on "
                "the supernet in any case."
            )
        if self.num_trials < 1:
            raise UserError(f"search.num_trials is {self.num_trials}; a search scores at least 1 Arch.")
        if self.folds < 1:
            raise UserError(f"search.folds is {self.folds}; 1 is a single holdout. Use 1, or 3.")
        if not self.objectives or self.objectives[0] != "accuracy":
            raise UserError(
                f"search.objectives is {self.objectives}; the first must be accuracy. Put it first."
            )
        for name in self.objectives:
            quantity, target = split_target(name)
            if quantity not in ("accuracy", "budget", *QUANTITIES) or (quantity == "latency") != bool(target):
                raise UserError(
                    f"search.objectives has {name!r}; known are accuracy, budget, macs, params, memory and "
                    "latency@TARGET, for example latency@onnxruntime,batch=1."
                )

    @property
    def trains(self) -> bool:
        """Archs are scored by training them, without a supernet."""
        return SEARCHERS[self.searcher].trains

    def named(self, budget: Budget) -> tuple[str, ...]:
        """The objectives, each once, with the quantity that `budget` limits by its name and what scores are."""
        names = {"budget": budget.quantity, "accuracy": "accuracy" if self.trains else self.score}
        return tuple(dict.fromkeys(names.get(name, name) for name in self.objectives))


@dataclass(frozen=True, kw_only=True)
class FinalsConfig:
    """How the best Archs of the search are held against each other before one is chosen (successive halving).

    `archs` of them, spread over the front, are trained briefly from `start` weights (`inherited` from the supernet, or
    `scratch`): each for a rung, the better half for another that is as long as all before, and so on, three rungs at
    most; whoever is left has trained for `epochs` (None: a fifth of retrain.train.epochs) and the best of these is
    chosen. With archs=0 the search's scores decide; searcher=halving sends all its Archs, from scratch. The hand-scaled
    baseline is chosen out of three in the same rungs, from scratch.
    """

    archs: int = 0
    start: Literal["scratch", "inherited"] = "inherited"
    epochs: float | None = None

    def __post_init__(self) -> None:
        if self.archs < 0 or self.archs == 1:
            raise UserError(
                f"finals.archs is {self.archs}; it takes two Archs at least to choose between. Use 8, or 0 for none."
            )
        if self.epochs is not None and self.epochs <= 0:
            raise UserError(
                f"finals.epochs is {self.epochs:g}; it must be above 0. Leave it out for a fifth of the training's."
            )


@dataclass(frozen=True, kw_only=True)
class RetrainConfig:
    """How the chosen Arch is trained for use, and what it is compared with.

    `start` is `scratch` (new weights; the comparison is then at equal training) or `inherited` (from the supernet;
    the table says so). `baselines` are trained in the same way: a `hand_scaled` plain ViT at the same budget and the
    best of a `random_search` with as many scored Archs. Before the search `rank_archs` Archs of about equal cost are
    trained for `rank_epochs`, from `start` weights, to see how well the supernet ranks them; 0 leaves that out.
    """

    train: TrainConfig = field(default_factory=lambda: TrainConfig(monitor_every=0))
    start: Literal["scratch", "inherited"] = "scratch"
    baselines: tuple[str, ...] = BASELINES
    rank_archs: int = 6
    rank_epochs: float = 10

    def __post_init__(self) -> None:
        check_words("retrain.baselines", self.baselines, BASELINES)
        if self.rank_archs < 0 or self.rank_epochs <= 0:
            raise UserError(
                f"retrain.rank_archs is {self.rank_archs} and rank_epochs {self.rank_epochs}; the first cannot be "
                "negative and the second must be above 0. Use rank_archs=0 to leave the ranking out."
            )


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What to write and where to measure: `latency` targets as in a budget, beside those that the budget has.

    Files of `onnx` and `torch_export` (.pt2) take pixels of images of any size and give probabilities; those of
    `onnx_float` and `torch_export_float` take what the network takes and give its logits. `onnx_fp16` and `onnx_int8`
    are written where they lose at most half a point on held-out images, the second where it is faster here.
    `executorch` (.pte) takes one image at a time, of bounded sides. `opset` is of ONNX files: 17 for ONNX Runtime
    before 1.17 and many devices.
    """

    formats: tuple[Format, ...] = ("onnx", "torch_export")
    opset: int = OPSET
    latency: tuple[str, ...] = ("onnxruntime,batch=1", "torch,batch=1")

    def __post_init__(self) -> None:
        check_opset("export.opset", self.opset)
        for target in self.latency:
            parse_target(target)


@dataclass(frozen=True, kw_only=True)
class SlimConfig:
    """How a trained network is made smaller.

    `effort` is `fold` (what is removed is made up for in closed form, nothing is trained), `recover` (the chosen one
    then learns from the network) or `search` (a supernet learns from it before the search, too); None takes the largest
    that a forecast lets fit into `time` (`30m`, `90s`, `2h`), which also says how long there is to train. `importance`
    is what sorts units, `images` how many train images activations are taken from (None: 256 to 1536, as many as the
    time leaves room for), `front` how many networks are made, and `axes` what may go. With `tokens` tokens may go too,
    chosen by a selector that needs no training (`attention`, `evit`, `merge`, ...; `none` for none). `resample` lets
    data.image_size differ from the network's own.
    """

    effort: Effort | None = None
    time: str = "30m"
    importance: str = "unexplained"
    images: int | None = None
    front: int = 5
    axes: tuple[Axis, ...] = ("heads", "hidden", "blocks")
    tokens: str = "none"
    resample: bool = False

    def __post_init__(self) -> None:
        check_word("slim.importance", self.importance, IMPORTANCE)
        check_words("slim.axes", self.axes, get_args(Axis))
        check_word("slim.tokens", self.tokens, ("none", *SELECTIONS))
        if self.tokens in MUST_LEARN:
            how = "budget='macs<=55%'" if SELECTIONS[self.tokens].keeps_keys else "keep=0.7"
            raise UserError(
                f"slim.tokens is {self.tokens!r}, which chooses well only when it has been trained or searched; "
                f"slimming does neither. Use `vitnas tokens MODEL dataset=IMAGES selector={self.tokens} {how}`, or "
                "attention, evit or merge here."
            )
        if self.effort is not None:
            check_word("slim.effort", self.effort, get_args(Effort))
        seconds_of("slim.time", self.time)
        if self.images is not None and self.images < 1:
            raise UserError(f"slim.images is {self.images}; it must be at least 1. Use 256.")
        if self.front < 5:
            raise UserError(f"slim.front is {self.front}; a front has at least 5 networks. Use 5.")
        if not self.axes:
            raise UserError(f"slim.axes is empty; something must go. Use {', '.join(get_args(Axis)[:2])}.")

    @property
    def seconds(self) -> float:
        """`time` in seconds."""
        return seconds_of("slim.time", self.time)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """How a network learns from images without labels, by EsViT's self-distillation.

    `model` is what learns: `vit` (the largest Arch of the run's space), `supernet` (the space's Supernet, Archs drawn
    by the run's sampler), a name of timm's (without its weights), or weights to go on from, as NAME@FILE or the folder
    of a saved network. A forecast makes `epochs` of `time` (`30m`, `90s`, `2h`), at most supernet.epochs; epochs=N says
    them. Nearest neighbours are asked `looks` times on the way where the images have labels. With `alarm` a training
    that has collapsed stops. In `esvit`, momentum_teacher is lower, and warm-ups are shorter, where steps are few.
    """

    model: str = "vit"
    time: str = "1h"
    epochs: float | None = None
    looks: int = 10
    alarm: bool = True
    esvit: EsViTConfig = field(default_factory=EsViTConfig)

    def __post_init__(self) -> None:
        seconds_of("pretrain.time", self.time)
        if self.epochs is not None and self.epochs <= 0:
            raise UserError(
                f"pretrain.epochs is {self.epochs:g}; it must be above 0. Leave it out to have as many as fit the time."
            )
        if self.looks < 0:
            raise UserError(f"pretrain.looks is {self.looks}; it must be 0 (none) or more. Use 10.")

    @property
    def seconds(self) -> float:
        """`time` in seconds."""
        return seconds_of("pretrain.time", self.time)


def seconds_of(name: str, text: str) -> float:
    """Seconds of a duration such as `90s`, `30m` or `2h`.

    Raises:
        UserError: it is none; `name` is the field that it stands in.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if found is None or not float(found[1]):
        raise UserError(f"{name} is {text!r}; it is a number and s, m or h. Write 90s, 30m or 2h.")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A complete run. `budget` is text (`macs<=1.3G and params<=6M`, in a space around a network also `macs<=50%` of
    it); empty means no limit.

    `pretrained` is the ViT that the supernet starts from: a timm name, a name and a file of weights (`NAME@FILE`), or a
    folder of a saved model; with `slim` it is the one to make smaller. A run with `pretrain` is a pretraining.
    `time` (`30m`, `2h`) shortens trainings and search of a search's run to what fits it here, by a forecast;
    None does all of them. `threads` are CPU threads (None: torch's).
    """

    recipe: str = "tour"
    budget: str = ""
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    space: SpaceConfig = field(default_factory=AutoFormerConfig)
    sampler: SamplerConfig = field(default_factory=UniformConfig)
    sharing: SharingConfig = field(default_factory=SharingConfig)
    task: TaskConfig = field(default_factory=ClassificationConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    supernet: TrainConfig = field(default_factory=TrainConfig)
    time: str | None = None
    pretrained: str | None = None
    slim: SlimConfig | None = None
    pretrain: PretrainConfig | None = None
    search: SearchConfig = field(default_factory=SearchConfig)
    finals: FinalsConfig = field(default_factory=FinalsConfig)
    retrain: RetrainConfig = field(default_factory=RetrainConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    device: Literal["auto", "cpu"] = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        check_shares(Budget.parse(self.budget), self.space)
        if SEARCHERS[self.search.searcher].asks_sampler and not self.sampler.answers:
            able = [word for word, kind in SAMPLERS.items() if kind.answers]
            raise UserError(
                f"search.searcher is {self.search.searcher!r} but sampler.kind is {self.sampler.kind!r}, which learns "
                f"nothing that could answer. Use sampler.kind={' or '.join(able)}, or another searcher."
            )
        if self.search.trains:
            self._check_without_supernet()
        if self.search.folds > 1 and (self.search.trains or self.sampler.answers):
            why = "this search trains no supernet" if self.search.trains else "a sampler learns from one"
            raise UserError(f"search.folds is {self.search.folds}, and {why}. Leave it out.")
        if self.retrain.train.precision != self.supernet.precision:
            raise UserError(
                f"retrain.train.precision is {self.retrain.train.precision!r} and supernet.precision is "
                f"{self.supernet.precision!r}; one precision serves the whole run. Set both alike."
            )
        if self.sampler.latency_target:
            parse_target(self.sampler.latency_target)
        if self.sharing.coupling != "prefix" and self.pretrained:
            raise UserError(
                f"sharing.coupling is {self.sharing.coupling!r} with pretrained, whose most useful entries come first; "
                "that serves a prefix only. Use prefix, or leave it out."
            )
        self.sampler.check(self)
        if self.task.needs_selections and not self.space.keep:
            raise UserError(
                f"task.kind is {self.task.kind!r} and space.keep is not given; it learns how many patches are kept. "
                "Set space.keep=[1.0,0.7,0.5], or another task.kind."
            )
        if self.teacher.network == OWN and not self.pretrained:
            raise UserError(
                f"teacher.network is {OWN!r} and there is none; it is the network that the run starts from. Set "
                "pretrained=NAME, or name a teacher."
            )
        if self.slim is not None and self.teacher.network:
            raise UserError(
                f"teacher.network is {self.teacher.network!r}; what is slimmed learns from the network that it was cut "
                "out of, and from no other. Leave teacher out, or use `vitnas run images teacher=...`."
            )
        if self.time is not None:
            seconds_of("time", self.time)
            if self.slim or self.pretrain:
                part = "slim" if self.slim else "pretrain"
                raise UserError(f"time is {self.time!r}; a run of {part} has {part}.time. Set that.")
        if self.slim is None and self.pretrain is None:
            self.space.starting_from(self.pretrained)  # refuses a network that is missing
        if not 0 <= self.seed < 1 << 32:
            raise UserError(f"seed is {self.seed}; it must be from 0 to {(1 << 32) - 1}. Use 0.")
        if self.threads is not None and self.threads < 1:
            raise UserError(f"threads is {self.threads}; it must be at least 1. Leave it out for all cores.")

    @property
    def seconds(self) -> float:
        """`time` in seconds; without end where it is not given."""
        return float("inf") if self.time is None else seconds_of("time", self.time)

    def _check_without_supernet(self) -> None:
        given = {
            "retrain.start": (self.retrain.start, "scratch"),
            "pretrained": (self.pretrained, None),
            "sampler.kind": (self.sampler.kind if self.sampler.answers else None, None),
        }
        for name, (value, only) in given.items():
            if value != only:
                raise UserError(
                    f"{name} is {value!r} and search.searcher is {self.search.searcher!r}, which trains no supernet "
                    "and sends every Arch to the finals, from new weights. Leave it out, or use searcher=evolution."
                )

    @property
    def ranks(self) -> bool:
        """The supernet is held against a few Archs that are trained, before the search."""
        return bool(self.retrain.rank_archs) and not (self.search.trains or self.slim or self.pretrain)

    @property
    def entrants(self) -> int:
        """Archs that the search sends to the finals; 0: its scores choose."""
        return self.search.num_trials if self.search.trains else self.finals.archs

    @property
    def anew(self) -> TrainConfig:
        """How a network with new weights is trained: by `retrain.train`, which in a slimming is for one that has
        learned already, and too slow; there by what it is by default."""
        if self.slim is None:
            return self.retrain.train
        return replace(RetrainConfig().train, precision=self.retrain.train.precision)


def check_shares(budget: Budget, space: SpaceConfig) -> None:
    """Raise UserError where a Budget says shares and the Space stands around no network that they could be of."""
    if budget.has_shares and not space.stands_around:
        able = [word for word, kind in SPACES.items() if kind.stands_around]
        raise UserError(
            f"budget is {budget.text!r} and space.kind is {space.kind!r}; a share is of what a network costs, and "
            f"there is none. Write numbers, or use space.kind={' or '.join(able)} with pretrained=NAME."
        )


# The fields of a Run that are one kind of several: their configurations, by the word that `.kind` holds.
KINDS: Mapping[str, Mapping[str, type[Any]]] = {
    "space": SPACES,
    "sampler": SAMPLERS,
    "task": TASKS,
}

# The parts that only runs of one recipe have, and what they are there.
OPTIONAL: Mapping[str, type[Any]] = {"slim": SlimConfig, "pretrain": PretrainConfig}

RESOLVED = "# The resolved run: every field, defaults included.\n"

# A word that stands for a field: `teacher=NAME` sets `teacher.network`.
SHORT = {"teacher": "teacher.network"}


def field_groups(kind: type[Any] = Run, prefix: str = "") -> Iterator[tuple[str, str, type[Any]]]:
    """The dataclasses of a Run: what their fields' names begin with (`supernet.`), the word of one kind of several
    (else ""), and the class."""
    yield prefix, "", kind
    for name, hint in get_type_hints(kind).items():
        if kind is Run and name in KINDS:
            yield from ((f"{name}.", word, member) for word, member in KINDS[name].items())
            continue
        for nested in filter(is_dataclass, (hint, *get_args(hint))):
            yield from field_groups(nested, f"{prefix}{name}.")  # type: ignore[arg-type]


def field_names() -> dict[str, set[str]]:
    """Every field of a Run that can be set, dotted (`supernet.epochs`), and the kinds it belongs to where it depends
    on one (`sampler.num_archs`: several and spread)."""
    found: dict[str, set[str]] = {f"{group}.kind": set() for group in KINDS}
    for prefix, word, kind in field_groups():
        for item in fields(kind):
            found.setdefault(f"{prefix}{item.name}", set()).update({word} - {""})
    return found


def save_run(run: Run, path: Path) -> None:
    """Write run.yaml."""
    write_atomic(path, RESOLVED + yaml.safe_dump(plain(run), sort_keys=False))


def plain(run: Run) -> dict[str, Any]:
    """A Run as plain YAML values; one of several kinds says which."""
    values: dict[str, Any] = to_json(run)
    return values | {group: {"kind": getattr(run, group).kind, **values[group]} for group in KINDS}


def lasting(value: Any, prefix: str = "") -> Any:
    """A plain run without the fields that may change when it is resumed, or grow when it is finished."""
    if not isinstance(value, dict):
        return value
    return {
        key: lasting(item, f"{prefix}{key}.")
        for key, item in value.items()
        if key not in FREE and f"{prefix}{key}" not in GROWS
    }


def changes(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """What differs between two plain runs, by dotted name, but for what is free to change."""
    if isinstance(old, dict) and isinstance(new, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in dict.fromkeys((*old, *new)):
            found |= changes(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
        return found
    return {} if old == new or prefix.rpartition(".")[2] in FREE else {prefix: (old, new)}


def in_words(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """`supernet.epochs: 30 then, 40 now; ...`: some of them, or the recipe alone, from which all else follows."""
    told = ["recipe"] if "recipe" in changed else [*changed][:6]
    more = f"; and {len(changed) - 6} more" if len(changed) > 6 and len(told) == 6 else ""
    return "; ".join(f"{name}: {changed[name][0]!r} then, {changed[name][1]!r} now" for name in told) + more
