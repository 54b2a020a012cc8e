"""`vitnas probe MODEL data.dataset=IMAGES`: what a network's features say about the images' classes."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from vitnas.cli.options import of_data, options, parsed, split
from vitnas.data import DataConfig, open_data
from vitnas.errors import UserError
from vitnas.exporting.networks import load_network
from vitnas.grids import size_text
from vitnas.probing import Judged, Probed, images_seen, probe
from vitnas.reporting.tables import Table, interval, percent, to_rich
from vitnas.runs import to_json
from vitnas.train import ConsoleProgress

USAGE = (
    "`vitnas probe` takes a network and data.dataset=IMAGES, as in `vitnas probe NAME data.dataset=images`; blocks, "
    "folder, --json and other fields of data may follow."
)
DATA = DataConfig(dataset="", holdout=0.2, augment="none")


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """A trained network; how many last blocks its features are of (0: what its classifier gets); where to."""

    model: str
    blocks: int = 0
    folder: Path | None = None
    json: bool = False


def probe_command(words: list[str], console: Console) -> None:
    """Nearest neighbours and a linear classifier on a network's features."""
    words = ["json=true" if word == "--json" else word for word in words]
    own, texts = split(ProbeOptions, words)
    asked = options(ProbeOptions, own, USAGE)
    config = _data(texts)
    if not config.dataset:
        raise UserError(USAGE)
    folder = asked.folder or Path(f"runs/probe_{Path(asked.model.partition('@')[0]).name}")
    network = load_network(asked.model, what="MODEL")
    data = open_data(images_seen(config, network))
    with nullcontext() if asked.json else ConsoleProgress(console) as progress:
        found = probe(
            network,
            data,
            name=asked.model,
            blocks=asked.blocks,
            log=folder / "test_reads.json",
            progress=progress,
        )
    found.write(folder)
    if asked.json:
        console.print(json.dumps(to_json(found)), markup=False)
    else:
        _tell(found, folder, console)


def _data(texts: dict[str, str]) -> DataConfig:
    """Which images, by `data.` fields."""
    texts = of_data(texts)
    words = (f"{name}={text}" for name, text in texts.items())
    given: DataConfig = parsed({"data": DataConfig}, words)["data"]
    changed = {name.partition(".")[2] for name in texts}
    return replace(DATA, **{name: value for name, value in vars(given).items() if name in changed})


def _tell(found: Probed, folder: Path, console: Console) -> None:
    """What was found, and by what."""
    lines = (
        f"features: {found.features}, {found.width} numbers per image of {size_text(found.image_size)} pixels; they "
        f"fill {found.effective_rank:.1f} directions (effective rank, of {found.num_ranked} images)",
        f"{found.num_classes} classes; numbers chosen on {found.num_held_out} of the "
        f"{found.num_train + found.num_held_out} train images, all of which are then known",
        *found.notes,
    )
    for line in lines:
        console.out(f"  {line}")
    rows = tuple(_row(name, row) for name, row in (("nearest", found.knn), ("linear", found.linear)))
    table = Table(("classifier", "accuracy", "95 % CI", "n", "held out", "chosen of"), rows, (1, 2, 3, 4))
    again = f", read {found.test_readings} times by now" if found.test_readings > 1 else ""
    console.print(to_rich(table, f"On {found.num_test} test images{again}"))
    console.out(f"  {folder / Probed.FILE}")


def _row(name: str, judged: Judged) -> tuple[str, ...]:
    chosen = ", ".join(f"{key} {value:g}" for key, value in judged.chosen.items())
    return (
        name,
        percent(judged.accuracy),
        interval(judged.accuracy, judged.n),
        str(judged.n),
        percent(judged.held_out),
        f"{judged.tried}: {chosen}",
    )
