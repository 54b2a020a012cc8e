"""The model card: a README.md as Hugging Face reads it, with YAML in front, that says what a network is and how to use
it."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm

from vitnas.arch import Arch
from vitnas.errors import UserError
from vitnas.model.timm_cfg import OWN_ARCH, SCALE, SEVERAL
from vitnas.runs import read_json, read_text, write_atomic
from vitnas.version import VERSION

CARD = "README.md"
PLACE = "local-dir:PATH_OF_THIS_FOLDER"  # until it is known where the folder lies
UNKNOWN = "unknown"  # Hugging Face's word for a licence that nobody chose
SHOWN_CLASSES = 100


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What a network reached on a split of a dataset, as a share."""

    dataset: str
    split: str
    accuracy: float
    measure: str = "accuracy"


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a card says.

    Args:
        facts: what is known, by what it is.
        loads: code by what runs it.
        needs: why vitnas is needed to load it, or "".
        loads_with: Hugging Face's word for what loads it.
        task: Hugging Face's word for what it does.
    """

    title: str
    about: str
    facts: tuple[tuple[str, str], ...] = ()
    loads: tuple[tuple[str, str], ...] = ()
    needs: str = ""
    class_names: tuple[str, ...] = ()
    scored: tuple[Scored, ...] = ()
    loads_with: str = "timm"
    task: str = "image-classification"
    licence: str = UNKNOWN
    named: str = "Classes"


def card_of(folder: Path) -> Card:
    """What a folder of a saved model says of itself.

    Raises:
        UserError: its config.json is damaged.
    """
    file = folder / "config.json"
    try:
        return _card_of(read_json(file))
    except UserError:
        raise
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"{file} does not say what was saved; it is damaged. Save the model anew, or delete its folder "
            "and run what made it again."
        ) from error


def _card_of(config: Mapping[str, Any]) -> Card:
    name, classes, names = config["architecture"], config.get("num_classes"), config.get("label_names") or ()
    own = config.get(OWN_ARCH) or config.get("model_args", {}).get("arch")
    arch = Arch.from_json(own) if own else None
    plain = not timm.models.model_entrypoint(name).__module__.startswith("vitnas.")
    return Card(
        title=arch.id if arch else name,
        about=f"A vision transformer: {arch.describe()}." if arch else f"timm's {name}.",
        facts=(("Task", task_text(classes, config)),),
        loads=(("timm", timm_code(plain=plain, scale=config.get(SCALE))),),
        needs=""
        if plain
        else "timm alone has no such network ('Unknown model'); `import vitnas` makes it known.",
        class_names=tuple(map(str, names)),
        named="Numbers" if config.get(SCALE) else "Classes",
        task=hub_task(classes, config),
        licence=UNKNOWN if arch else str(config["pretrained_cfg"].get("license") or UNKNOWN),
    )


def task_text(classes: int | None, config: Mapping[str, Any]) -> str:
    """What a network answers."""
    if not classes:
        return "features of images"
    if config.get(SCALE):
        return f"{classes} number{'s' * (classes > 1)} of an image"
    return f"which of {classes} classes an image is of{' (it may be several)' if config.get(SEVERAL) else ''}"


def hub_task(classes: int | None, config: Mapping[str, Any]) -> str:
    """The same in Hugging Face's words, which has none for numbers."""
    return "image-classification" if classes and not config.get(SCALE) else "image-feature-extraction"


def timm_code(*, plain: bool, scale: Sequence[Sequence[float]] | None = None) -> str:
    """How timm loads the folder that the card lies in.

    Args:
        scale: means and standard deviations of numbers.
    """
    numbers = (
        "" if scale is None else f"numbers = logits * torch.tensor({scale[1]}) + torch.tensor({scale[0]})"
    )
    return "\n".join(
        (
            f"import timm{', torch' if numbers else ''}{'' if plain else ', vitnas'}",
            "",
            f'model = timm.create_model("{PLACE}", pretrained=True).eval()',
            "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
            "logits = model(transform(image)[None])  # a Pillow image",
            *([numbers] if numbers else []),
        )
    )


def text(card: Card) -> str:
    """The card as Markdown behind YAML."""
    rows = "".join(f"| {name} | {value.replace('|', chr(92) + '|')} |\n" for name, value in card.facts)
    loads = "".join(f"### With {name}\n\n```python\n{code}\n```\n\n" for name, code in card.loads)
    names = ", ".join(map(_escaped, card.class_names[:SHOWN_CLASSES]))
    more = len(card.class_names) - SHOWN_CLASSES
    parts = (
        f"---\n{_yaml(card)}\n---\n",
        f"# {card.title}\n",
        f"{card.about}\n",
        f"| What | |\n|---|---|\n{rows}" if rows else "",
        f"## How to load it\n\n{card.needs}{chr(10) * 2 if card.needs else ''}{loads}".rstrip() + "\n",
        f"## {card.named}, in order\n\n{names}{f' and {more} more' if more > 0 else ''}.\n" if names else "",
        "## License\n\n" + _licence_text(card.licence) + "\n",
        f"Saved by vitnas {VERSION}.\n",
    )
    return "\n".join(part for part in parts if part)


def _escaped(name: str) -> str:
    """A name of a class as Markdown shows it, whatever it is."""
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", html.escape(name, quote=False))


def write_card(folder: Path, card: Card) -> None:
    """Put a card into a folder; a licence that is chosen in the one there stays."""
    kept = licence_in(folder / CARD)
    write_atomic(folder / CARD, text(card) if kept == UNKNOWN else with_licence(text(card), kept))


def licence_in(file: Path) -> str:
    """The licence that a card names."""
    written = read_text(file) if file.exists() else ""
    found = re.search(r"^license: *['\"]?([^'\"\n]+)", written, re.MULTILINE)
    return found[1].strip() if found else UNKNOWN


def with_licence(written: str, licence: str) -> str:
    """A card of another licence."""
    changed = re.sub(r"(?m)^license: .*$", f"license: {licence}", written, count=1)
    return changed.replace(_licence_text(UNKNOWN), _licence_text(licence))


def _licence_text(licence: str) -> str:
    if licence == UNKNOWN:
        return "Nobody has chosen one yet: write it behind `license:` above, or `vitnas push ... license=apache-2.0`."
    return f"{licence}."


def _yaml(card: Card) -> str:
    """What machines read of it."""
    from huggingface_hub import EvalResult, ModelCardData

    tags = list(dict.fromkeys([card.task, card.loads_with, "vitnas"]))
    results: list[Any] = [
        EvalResult(
            task_type=card.task,
            dataset_type=each.dataset,
            dataset_name=each.dataset,
            dataset_split=each.split,
            metric_type=each.measure,
            metric_value=round(each.accuracy, 4),
        )
        for each in card.scored
    ]
    more: dict[str, Any] = {"model_name": card.title, "eval_results": results} if results else {}
    data = ModelCardData(
        license=card.licence, library_name=card.loads_with, pipeline_tag=card.task, tags=tags, **more
    )
    return data.to_yaml().strip()
