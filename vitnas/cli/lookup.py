"""list, show, count: looking things up without a run folder."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, get_args

import torch
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vitnas.arch import Arch
from vitnas.budget import format_quantity
from vitnas.counting import count, parts
from vitnas.errors import UserError
from vitnas.exporting.networks import load_network, untrained
from vitnas.mixers import MIXERS, Convention
from vitnas.model.named import NET_ID, find_arch
from vitnas.model.net_id import net_id_of
from vitnas.model.published import PUBLISHED
from vitnas.model.timm_keys import arch_in
from vitnas.model.trained import find_trained
from vitnas.recipes import RECIPES
from vitnas.sample import SAMPLERS
from vitnas.searching import SEARCHERS
from vitnas.space import SPACES
from vitnas.stages.run import plain
from vitnas.train import TASKS
from vitnas.train.losses import TAUGHT_LOSSES


def list_command(words: list[str], console: Console) -> None:
    """Everything that has a name."""
    if words:
        raise UserError(
            f"`vitnas list` takes nothing, but {words[0]!r} was given. "
            + ("Leave it out." if words[0].startswith("-") else f"`vitnas show {words[0]}` looks it up.")
        )
    table = Table("recipe", "what it does", show_edge=False)
    for name, recipe in RECIPES.items():
        table.add_row(name, (recipe.__doc__ or "").splitlines()[0])
    console.print(table)
    spaces = ", ".join(f"{name} ({', '.join(kind.sizes)})" for name, kind in SPACES.items())
    console.out(f"\nspaces     {spaces}")
    console.out(f"samplers   {', '.join(SAMPLERS)}")
    console.out(f"tasks      {', '.join(TASKS)}")
    console.out(f"losses     {', '.join(TAUGHT_LOSSES)} (of a teacher)")
    console.out(f"searchers  {', '.join(SEARCHERS)}")
    console.out(f"mixers     {', '.join(MIXERS)}")
    console.out(f"models     {', '.join(PUBLISHED)} (timm.create_model after `import vitnas`)")


def show_command(words: list[str], console: Console) -> None:
    """A recipe's fields, or an Arch block by block."""
    name = one_name(words, "show")
    if name in RECIPES:
        console.print(escape(yaml.safe_dump(plain(RECIPES[name]()), sort_keys=False)), end="")
        return
    arch = arch_named(name)
    console.out(f"{arch.id}: {arch.describe()}")
    table = Table("part", "heads x dim", "MLP", "MACs", "params", show_edge=False)
    for part in parts(arch):
        block = arch.blocks[int(part.name.split(".")[1])] if part.name.startswith("blocks.") else None
        heads = f"{block.num_heads} x {block.head_dim}" if block and part.name.endswith("attn") else ""
        hidden = str(block.mlp_hidden) if block and part.name.endswith("mlp") else ""
        macs, params = format_quantity(part.macs, "macs"), format_quantity(part.params, "params")
        table.add_row(part.name, heads, hidden, macs, params)
    console.print(table)
    if arch.attn_scale == "embed_dim":  # only ViTAS nets have it, and most of these a code
        with suppress(UserError):
            console.out(f"net_id     {' '.join(map(str, net_id_of(arch)))}")


def count_command(words: list[str], console: Console) -> None:
    """Cost of an Arch by every convention (see vitnas/counting.py)."""
    arch = arch_named(one_name(words, "count"))
    cost = count(arch)
    console.out(f"{arch.id}: {arch.describe()}")
    for convention in get_args(Convention):
        macs = count(arch, convention=convention).macs
        console.out(f"  MACs ({convention}){'':<{16 - len(convention)}} {macs:>16,}")
    console.out(f"  {'params':<23} {cost.params:>16,}")
    console.out(f"  {'peak activations, bytes':<23} {cost.memory_bytes:>16,}")


def arch_named(name: str) -> Arch:
    """The Arch by a word that `find_arch` takes, or of a trained network by what `load_network` takes.

    Raises:
        UserError: neither, or a network that no Arch can say.
    """
    try:
        return find_arch(name, RECIPES).arch
    except UserError:
        try:
            given = find_trained(name, what="the model")
        except UserError:
            given = None
        if given is None:
            raise
    if given.file:
        network: Any = load_network(name, what="the model")
    else:
        with torch.device("meta"):
            network = untrained(given, name, what="the model")
    return arch_in(network)


def one_name(words: list[str], command: str) -> str:
    if words and words[0].startswith(NET_ID):  # a code with its spaces, quoted or not
        words = [" ".join(words)]
    if len(words) != 1 or not words[0] or words[0].startswith("--"):
        raise UserError(f"`vitnas {command}` takes one name; `vitnas list` shows them.")
    return words[0]
