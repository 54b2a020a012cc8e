"""with_selections: a trained vision transformer that keeps fewer patches from some of its blocks on."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice, pairwise
from math import prod

import torch
from torch import Tensor, nn

from vitnas.arch import Arch
from vitnas.errors import UserError
from vitnas.model.blocks import make_selections
from vitnas.model.build import initialize
from vitnas.model.timm_keys import arch_of_timm, from_timm
from vitnas.model.vit import Model


def with_selections(
    network: nn.Module,
    keep: float | Sequence[float] | Mapping[int, int] = 0.7,
    places: Sequence[int] | None = None,
    *,
    selector: str = "predictor",
    generator: torch.Generator | None = None,
) -> Model:
    """A copy of `network` with selections in front of some blocks; all weights that it had are the same.

    Selections that it has already go, but where one of this kind stands at the same block its weights stay.

    Args:
        network: a Model, or a timm ViT that an Arch can say. It is left as it is.
        keep, places: see `keeps_of`.
        selector: a word of `SELECTIONS`.
        generator: source of the selections' own weights; torch's global one when None.

    Raises:
        UserError: a network that no Arch can say, or selections that cannot be (see `keeps_of`, `Arch`).

    >>> import timm
    >>> with_selections(timm.create_model("vit_tiny_patch16_224"), keep=0.7).arch.num_final_tokens
    68
    """
    made = copy.deepcopy(network) if isinstance(network, Model) else from_timm(network)
    arch, old = selecting(made.arch, keeps_of(made.arch, keep, places), selector), made.selections
    made.selections = make_selections(arch)
    initialize(made.selections, generator)
    made.selections.to(made.head_like).train(made.training)
    if made.arch.selector == selector:
        for index in made.selections.keys() & old.keys():
            made.selections[index].load_state_dict(old[index].state_dict())
    made.record_arch(arch)
    return made


@torch.no_grad()
def with_places(network: nn.Module, places: Sequence[Tensor | None]) -> Model:
    """A copy of `network` whose blocks give these patches alone in all images, as in Patch Slimming.

    Args:
        network: a Model that keeps all patches, or a timm ViT that an Arch can say.
        places: per block the numbers on the grid of the patches that it gives, each set within the one before; None for
            as many as come.

    Raises:
        UserError: sets that do not lie within each other, or a network that cannot keep fewer.
    """
    arch = network.arch if isinstance(network, Model) else arch_of_timm(network)
    left = torch.ones(prod(arch.grids[-1]), dtype=torch.bool)
    worth, keeps = torch.zeros(len(left)), dict[int, int]()
    for index, found in enumerate(places):
        if found is None:
            continue
        here = torch.zeros_like(left).index_fill(0, found.cpu(), True)
        if bool((here & ~left).any()):
            raise UserError(
                f"block {index} gives patches that the block before does not; each block's lie within those of the "
                "one before. Leave the others out."
            )
        if here.sum() < left.sum():
            keeps[index] = int(here.sum())
        worth, left = worth + here, here
    model = with_selections(network, keeps, selector="patch_slimming")
    for name, buffer in model.selections.named_buffers():
        if name.endswith(".worth"):  # what lives longest is worth most: one ranking for all
            buffer.copy_(worth)
    return model


def keeps_of(
    arch: Arch, keep: float | Sequence[float] | Mapping[int, int], places: Sequence[int] | None = None
) -> dict[int, int]:
    """How many patches go on at which block of `arch`.

    Args:
        keep: the share of the patches that come to a place which go on there, rounded down as in DynamicViT's code
            (0.7 at three places keeps 137, 96 and 67 of 196); or per place the share of all patches, falling; or
            the numbers themselves by block.
        places: numbers of the blocks in front of which patches leave; by default `default_places`.

    Raises:
        UserError: a share that is not between 0 and 1 or leaves no patch, places that do not rise or do not exist,
            another number of shares than of places.
    """
    if isinstance(keep, Mapping):
        if places is not None:
            raise UserError(
                f"places is {[*places]} and keep names blocks too; one says where. Leave places out."
            )
        _check_places([*keep], arch.depth)
        return dict(keep)
    places, patches = default_places(arch) if places is None else list(places), prod(arch.grids[-1])
    _check_places(places, arch.depth)
    if not places:
        raise UserError(
            f"places is empty; patches leave in front of some block behind the first one of the last stage, which has "
            f"{len(arch.stages[-1].blocks)}. Name one, for example places=[{arch.depth // 2}]."
        )
    shares = [keep ** (n + 1) for n in range(len(places))] if isinstance(keep, int | float) else list(keep)
    if len(shares) != len(places):
        raise UserError(
            f"keep has {len(shares)} shares and there are {len(places)} places, {places}; each place has one. Give as "
            "many, or one number for all."
        )
    found: dict[int, int] = {}
    for place, share in zip(places, shares, strict=True):
        found[place] = left = int(patches * share + 1e-9) if 0 < share < 1 else 0
        if not left:
            raise UserError(
                f"keep is {keep}, which leaves {patches if share >= 1 else 0} of {patches} patches at block {place}; a "
                "share lies between 0 and 1 and leaves at least 1 patch. Use "
                f"{'fewer' if share >= 1 else 'more'}, for example keep=0.7."
            )
    return found


def default_places(arch: Arch) -> list[int]:
    """A quarter, half and three quarters through the last stage, as in DynamicViT (blocks 3, 6 and 9 of 12)."""
    last = len(arch.stages[-1].blocks)
    first = arch.depth - last
    return sorted({first + last * quarter // 4 for quarter in (1, 2, 3)} - {first})


def selecting(arch: Arch, keeps: Mapping[int, int], selector: str) -> Arch:
    """`arch` with `keeps` patches in front of these blocks, chosen by `selector`, and nowhere else.

    Raises:
        UserError: selections that cannot be, with the block.
    """
    _check_places([*keeps], arch.depth)
    given = (replace(block, keep=keeps.get(index)) for index, block in enumerate(arch.blocks))
    stages = [replace(stage, blocks=tuple(islice(given, len(stage.blocks)))) for stage in arch.stages]
    return replace(arch, stages=tuple(stages), selector=selector if keeps else None)


def _check_places(places: Sequence[int], depth: int) -> None:
    if wrong := [place for place in places if place not in range(depth)]:
        raise UserError(
            f"places has {wrong[0]!r}; the network has blocks 0 to {depth - 1}. Choose some of these."
        )
    if any(b <= a for a, b in pairwise(places)):
        raise UserError(
            f"places are {[*places]}; they are numbers of blocks that rise. Sort them, each once."
        )
