"""ViTAS's integer code of a net (`net_id` in the authors' configurations), read and written.

Source: Su et al., "ViTAS: Vision Transformer Architecture Search" (arXiv 2106.13700) and its public configurations.
For n slots a code is 1 + n + 2 + 1 + 2 n numbers: the patch size; an operation per slot (a head count, or the
identity); two zeros for the final norm and classifier; the embedding's width; and per slot the width of qkv and of
the MLP. Widths count tenths of the largest, from 0 for one tenth. A slot that holds the identity still has its two
widths, which say nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vitnas.arch import Arch, Block, Stage
from vitnas.errors import UserError
from vitnas.grids import ImageSize

NUM_HEADS = (3, 6, 12, 16)
TENTHS = 10


@dataclass(frozen=True)
class Code:
    """One published space: its slots, largest widths (`inner` is that of q, k and v each) and what is allowed."""

    num_slots: int
    embed_dim: int
    inner_dim: int
    mlp_hidden: int
    patch_sizes: tuple[int, ...]
    identity: bool

    @property
    def length(self) -> int:
        """Numbers in a code."""
        return 3 * self.num_slots + 4

    @property
    def ops(self) -> str:
        """What a slot's number may mean, for a message."""
        return ", ".join(map(str, NUM_HEADS)) + " heads" + (", identity" if self.identity else "")


CODES = (
    Code(16, 384, 480, 1440, (14, 16, 32), identity=True),
    Code(12, 384, 480, 1440, (16,), identity=False),
    Code(13, 768, 960, 2880, (14, 16, 32), identity=False),
)


def tenths(largest: int) -> tuple[int, ...]:
    """The ten widths up to `largest`, rounded as the authors do.

    >>> tenths(384)[:4]
    (38, 77, 115, 154)
    """
    return tuple(round((index + 1) / TENTHS * largest) for index in range(TENTHS))


def arch_of_net_id(
    net_id: str | Sequence[int], *, image_size: ImageSize = 224, in_chans: int = 3, num_classes: int = 1000
) -> Arch:
    """The Arch that a `net_id` stands for; its blocks keep their slots.

    Args:
        net_id: the numbers, or text with spaces or commas between them.

    Raises:
        UserError: a word that is no number, a length that no published space has, a number out of range (its
            position, counted from 0, and what is allowed are given), or identities only.
    """
    numbers = _numbers(net_id)
    code = next((code for code in CODES if code.length == len(numbers)), None)
    if code is None:
        known = ", ".join(f"{code.length} for {code.num_slots} slots" for code in CODES)
        raise UserError(f"the net_id has {len(numbers)} numbers; it must have {known}. Count them again.")
    _check(numbers, code)
    n = code.num_slots
    ops, widths = numbers[1 : n + 1], numbers[n + 4 :]
    kept = [slot for slot, op in enumerate(ops) if op < len(NUM_HEADS)]
    if not kept:
        raise UserError(
            f"the net_id has the identity in all {n} slots; an Arch needs a block. Change one of positions 1 to {n}."
        )
    in_order = kept == list(range(len(kept)))
    blocks = tuple(
        Block(
            num_heads=NUM_HEADS[ops[slot]],
            head_dim=tenths(code.inner_dim)[widths[2 * slot]] // NUM_HEADS[ops[slot]],
            mlp_hidden=tenths(code.mlp_hidden)[widths[2 * slot + 1]],
            slot=None if in_order else slot,
        )
        for slot in kept
    )
    return vitas_arch(
        code.patch_sizes[numbers[0]],
        tenths(code.embed_dim)[numbers[n + 3]],
        blocks,
        image_size=image_size,
        in_chans=in_chans,
        num_classes=num_classes,
    )


def net_id_of(arch: Arch, *, num_slots: int | None = None) -> tuple[int, ...]:
    """The `net_id` of an Arch; widths of slots with the identity are 0.

    Args:
        num_slots: of the published space whose code is wanted (16, 12 or 13); None for the first that can say `arch`.

    Raises:
        UserError: no published space (or not the one asked for) can say `arch`; the reasons are given.
    """
    codes = [code for code in CODES if num_slots in (None, code.num_slots)]
    if not codes:
        known = ", ".join(str(code.num_slots) for code in CODES)
        raise UserError(f"num_slots is {num_slots}; published spaces have {known} slots. Choose one.")
    reasons = {}
    for code in codes:
        reasons[code.num_slots] = _reasons(arch, code)
        if not reasons[code.num_slots]:
            return _encode(arch, code)
    told = "; ".join(f"{slots} slots: {', '.join(found)}" for slots, found in reasons.items())
    raise UserError(f"{arch.id} has no net_id ({told}). Keep it as an arch.json.")


def vitas_arch(
    patch_size: int,
    embed_dim: int,
    blocks: tuple[Block, ...],
    *,
    image_size: ImageSize = 224,
    in_chans: int = 3,
    num_classes: int = 1000,
) -> Arch:
    """An Arch with what all published ViTAS nets share (class token, epsilons, scale by the embedding's width)."""
    return Arch(
        image_size=image_size,
        patch_size=patch_size,
        in_chans=in_chans,
        num_classes=num_classes,
        stages=(Stage(embed_dim=embed_dim, blocks=blocks),),
        norm_eps=1e-6,
        head_norm_eps=1e-5,
        attn_scale="embed_dim",
    )


def _numbers(net_id: str | Sequence[int]) -> list[int]:
    words = net_id.replace(",", " ").split() if isinstance(net_id, str) else [*map(str, net_id)]
    for position, word in enumerate(words):
        if not word.isdecimal():
            raise UserError(
                f"the net_id's position {position} is {word!r}; it must be a whole number. "
                "Write numbers with spaces between."
            )
    return [int(word) for word in words]


def _check(numbers: list[int], code: Code) -> None:
    """Refuse the first number that is out of range."""
    n = code.num_slots
    tenth = "tenths of the largest width, 0 for one tenth"
    for position, number in enumerate(numbers):
        if position == 0:
            what, allowed = "patch size", ", ".join(map(str, code.patch_sizes))
            most = len(code.patch_sizes) - 1
        elif position <= n:
            what, allowed, most = f"slot {position - 1}", code.ops, len(NUM_HEADS) - 1 + code.identity
        elif position <= n + 2:
            what, allowed, most = ("final norm" if position == n + 1 else "classifier"), "the only choice", 0
        elif position == n + 3:
            what, allowed, most = "embedding width", tenth, TENTHS - 1
        else:
            slot, mlp = divmod(position - n - 4, 2)
            what, allowed, most = f"{'MLP' if mlp else 'qkv'} width of slot {slot}", tenth, TENTHS - 1
        if not 0 <= number <= most:
            span = "must be 0" if most == 0 else f"counts from 0 to {most}"
            raise UserError(
                f"the net_id's position {position} ({what}) is {number}; it {span} ({allowed}). Mend that number."
            )


def _reasons(arch: Arch, code: Code) -> list[str]:
    """Why the code cannot say `arch`."""
    like = vitas_arch(
        arch.patch_size,
        arch.embed_dim,
        arch.blocks,
        image_size=arch.image_size,
        in_chans=arch.in_chans,
        num_classes=arch.num_classes,
    )
    reasons = [] if like == arch else ["it differs from a ViTAS net in more than widths and heads"]
    slots = like.stages[0].slots
    if arch.patch_size not in code.patch_sizes:
        reasons.append(f"patch_size {arch.patch_size} is not one of {', '.join(map(str, code.patch_sizes))}")
    if arch.embed_dim not in tenths(code.embed_dim):
        reasons.append(f"embed_dim {arch.embed_dim} is not in tenths of {code.embed_dim}")
    if slots[-1] >= code.num_slots or (not code.identity and len(slots) != code.num_slots):
        reasons.append(f"its {len(slots)} blocks do not fit {code.num_slots} slots")
    for index, block in enumerate(arch.blocks):
        inner = block.num_heads * block.head_dim
        for what, value, options in (
            ("num_heads", block.num_heads, NUM_HEADS),
            ("inner width", inner, tenths(code.inner_dim)),
            ("mlp_hidden", block.mlp_hidden, tenths(code.mlp_hidden)),
        ):
            if value not in options:
                reasons.append(f"block {index}: {what} is {value}")
        if block.mixer != "softmax":
            reasons.append(f"block {index}: mixer is {block.mixer!r}")
    return reasons


def _encode(arch: Arch, code: Code) -> tuple[int, ...]:
    ops, widths = [len(NUM_HEADS)] * code.num_slots, [0] * (2 * code.num_slots)
    for slot, block in zip(arch.stages[0].slots, arch.blocks, strict=True):
        ops[slot] = NUM_HEADS.index(block.num_heads)
        widths[2 * slot] = tenths(code.inner_dim).index(block.num_heads * block.head_dim)
        widths[2 * slot + 1] = tenths(code.mlp_hidden).index(block.mlp_hidden)
    patch, dim = code.patch_sizes.index(arch.patch_size), tenths(code.embed_dim).index(arch.embed_dim)
    return (patch, *ops, 0, 0, dim, *widths)
