"""What slimming without training leaves of a pretrained ViT: compensation, order and allocation, each against less.

    python benchmarks/evidence_slim.py --weights vit_small_patch14.safetensors --dataset hfds/FOLDER --out FILE.jsonl
        [--seeds 3] [--images 384] [--settings fold uniform ...] [--torch-pruning FOLDER] [--device cpu] [--threads 1]

The network is timm's vit_small_patch14_dinov2 at 98 pixels, without a head. Half of the MACs of its MLPs and heads go.
Per seed, unlabelled images for calibration are drawn from train. A linear probe is fitted on the class token of 1,000
labelled images as the given network sees them, and frozen; it is scored on 2,000 images of train that nothing else
used. Cosines are of all final tokens with the given network's, on 256 further images. Each setting leaves one thing
out:

    fold        order `unexplained`, allocation by sensitivity, ridge
    activation  that order instead of `--importance`, in the Arch of `fold`
    uniform     every block is left half of its hidden units and heads half as wide
    mean, none  constants alone make up for what goes; nothing does
    magnitude, random   orders, in the Arch of `fold`
    nested      the Arch of `fold`, cut out of what was folded for three quarters of the MACs
    shares      `fold` at five budgets from one order and one sensitivity
    pruning     Torch-Pruning (its folder is given): heads, hidden units, channels at one ratio by magnitude
    timing      latency in ONNX Runtime, batch 1, one thread, beside the given network

Rows go to `--out` as they come; a row that is there is not made again.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from vitnas.arch import Arch
from vitnas.counting import count
from vitnas.data import Data, DataConfig, EvalBatches, Images, open_data
from vitnas.extraction import extract
from vitnas.measure.convert import input_shape
from vitnas.measure.latency import LatencyMeter
from vitnas.model import Model
from vitnas.model.timm_keys import from_timm
from vitnas.runs import append_jsonl, read_jsonl
from vitnas.slimming import IMPORTANCE, PredictedDamage, agreement, allocate, fold, ordered, sensitivity
from vitnas.space import around
from vitnas.supernet import Supernet

PROBED, SCORED, HELD = 1000, 2000, 256
SHARES = (0.8, 0.65, 0.5, 0.4, 0.3)
"""Of the MACs of MLPs and heads."""
STEPS = tuple(step / 16 for step in range(1, 17))
HEADS = tuple(range(1, 7))
BATCH = 32
ORDERED, MEASURED = 128, 96  # images for the order, and for sensitivities


def parser(doc: str | None) -> argparse.ArgumentParser:
    """What every script on this network is told."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--weights", type=Path, required=True)
    made.add_argument("--dataset", required=True)
    made.add_argument("--out", type=Path, required=True)
    return made


def given_network(weights: Path) -> Any:
    """timm's ViT-S/14 at 98 pixels, without a head."""
    given: Any = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=518)
    given.load_state_dict(load_file(weights))
    given.set_input_size(img_size=98)
    return given.eval()


def images_for(dataset: str, *, scored: int, most: int | None) -> Data:
    """Images as that network takes them; `scored` of at most `most` of train are the probe's."""
    form: dict[str, Any] = {"image_size": 98, "crop_pct": 1.0, "augment": "none"}
    return open_data(DataConfig(dataset=dataset, holdout=scored, max_images=most, **form))


class Probe:
    """A linear classifier on the class token, fitted once, and the images that score it."""

    def __init__(self, network: nn.Module, data: Data) -> None:
        self.fitted = data.train.subset(range(PROBED))
        self.scored = data.holdout
        self.held = batches(data.train.subset(range(PROBED, PROBED + HELD)))
        features_BD = features(network, self.fitted)
        self.mean_D, self.std_D = features_BD.mean(0), features_BD.std(0) + 1e-6
        self.weight = torch.zeros(10, features_BD.shape[1], dtype=torch.float64, requires_grad=True)
        self.bias = torch.zeros(10, dtype=torch.float64, requires_grad=True)
        descent = torch.optim.LBFGS([self.weight, self.bias], max_iter=500)
        targets_B = self.fitted.targets

        def step() -> Tensor:
            descent.zero_grad()
            loss = functional.cross_entropy(self.logits(features_BD), targets_B)
            loss = loss + 0.005 * (self.weight**2).sum()
            loss.backward()
            return loss

        descent.step(step)

    def logits(self, features_BD: Tensor) -> Tensor:
        normed_BD = ((features_BD - self.mean_D) / self.std_D).double()
        return functional.linear(normed_BD, self.weight, self.bias)

    def accuracy(self, network: nn.Module) -> float | None:
        """None of a network of another width, which the probe cannot read."""
        features_BD = features(network, self.scored)
        if features_BD.shape[1] != len(self.mean_D):
            return None
        with torch.no_grad():
            found_B = self.logits(features_BD).argmax(1)
        return float((found_B == self.scored.targets).double().mean())

    def row(self, network: nn.Module, given: nn.Module) -> dict[str, Any]:
        """What a network costs and what it still says of what `given` did."""
        found = agreement(network, given, self.held)
        return {
            "macs": macs_of(copy.deepcopy(network).cpu()), "tokens": found.tokens, "pooled": found.pooled,
            "accuracy": self.accuracy(network), "n": len(self.scored),
        }  # fmt: skip


@torch.no_grad()
def features(network: Any, images: Images) -> Tensor:
    """Class tokens."""
    device = next(network.parameters()).device
    return torch.cat(
        [network.forward_features(x.to(device))[:, 0].cpu() for x, _ in EvalBatches(images, batch_size=64)]
    )


def batches(images: Images) -> list[Tensor]:
    return [x for x, _ in EvalBatches(images, batch_size=BATCH)]


class Calibrated:
    """One seed: its images, order, sensitivity and Archs, each made when first asked for."""

    def __init__(self, given: nn.Module, data: Data, seed: int, options: argparse.Namespace) -> None:
        self.given, self.seed, self.options = given, seed, options
        self.model = from_timm(given).to(options.device)
        depth = self.model.arch.depth
        self.space = around(self.model, heads=HEADS, hidden=STEPS, head_dim=STEPS[3::2], blocks=range(depth))
        generator = torch.Generator().manual_seed(seed)
        rest = torch.randperm(len(data.train) - PROBED - HELD, generator=generator) + PROBED + HELD
        self.images = batches(data.train.subset(rest[: options.images].tolist()))
        self.took: dict[str, float] = {}

    def supernet(self, importance: str) -> Supernet:
        images = self.images[: ORDERED // BATCH]
        scores = IMPORTANCE[importance](self.model, images, torch.Generator().manual_seed(self.seed))
        return ordered(self.model, self.space, scores)

    @cached_property
    def ordered(self) -> Supernet:
        return self.timed("order", lambda: self.supernet(self.options.importance))

    @cached_property
    def damage(self) -> PredictedDamage:
        images = self.images[: MEASURED // BATCH]
        return PredictedDamage(
            self.space, self.timed("sensitivity", lambda: sensitivity(self.ordered, images))
        )

    def arch(self, share: float) -> Arch:
        whole = count(self.space.largest()).macs
        apart = patches_macs(self.space.largest())
        limit = int(apart + share * (whole - apart))
        return self.timed("allocation", lambda: allocate(self.damage, f"macs<={limit}"))[0].arch

    @cached_property
    def half(self) -> Arch:
        return self.arch(0.5)

    @property
    def uniform(self) -> Arch:
        largest = self.space.largest()
        return largest.with_blocks(
            replace(block, head_dim=block.head_dim // 2, mlp_hidden=block.mlp_hidden // 2)
            for block in largest.blocks
        )

    def timed(self, name: str, make: Callable[[], Any]) -> Any:
        start = time.process_time()
        made = make()
        self.took[f"{name}_cpu_s"] = round(time.process_time() - start, 1)
        return made

    def fold(self, arch: Arch, supernet: Supernet | None = None, how: Any = "ridge") -> Model:
        given = supernet or self.ordered
        answers = self.options.answers
        return self.timed("fold", lambda: fold(given, arch, self.images, compensation=how, answers=answers))


def patches_macs(arch: Arch) -> int:
    """MACs of the patch embedding, which slimming leaves alone at one width."""
    (rows, columns), side = arch.grids[0], arch.patch_size
    return rows * columns * side * side * arch.in_chans * arch.embed_dim


def fold_setting(made: Calibrated) -> Iterator[tuple[str, nn.Module]]:
    yield "", made.fold(made.half)


def other_order(word: str) -> Callable[[Calibrated], Iterator[tuple[str, nn.Module]]]:
    def setting(made: Calibrated) -> Iterator[tuple[str, nn.Module]]:
        yield "", made.fold(made.half, made.timed("order", lambda: made.supernet(word)))

    return setting


def less(how: str) -> Callable[[Calibrated], Iterator[tuple[str, nn.Module]]]:
    def setting(made: Calibrated) -> Iterator[tuple[str, nn.Module]]:
        yield "", made.fold(made.half, how=how)

    return setting


def uniform(made: Calibrated) -> Iterator[tuple[str, nn.Module]]:
    yield "", made.fold(made.uniform)


def nested(made: Calibrated) -> Iterator[tuple[str, nn.Module]]:
    """What of compensation serves a smaller Arch: the weights folded for more MACs, put back and cut again."""
    larger = made.fold(
        made.space.largest().with_blocks(replace(b, mlp_hidden=1152) for b in made.space.largest().blocks)
    )
    inner = around(larger, heads=HEADS, hidden=(384, 768, 1152), blocks=())
    scores = IMPORTANCE["activation"](larger, made.images[:1], torch.Generator())
    kept = replace(
        scores,
        **{
            name: tuple(
                torch.arange(len(found), 0, -1, dtype=torch.float64) for found in getattr(scores, name)
            )
            for name in ("heads", "hidden")
        },
    )
    again = ordered(larger, inner, kept)
    arch = inner.largest().with_blocks(replace(b, mlp_hidden=768) for b in inner.largest().blocks)
    yield (
        "alone",
        made.fold(
            made.space.largest().with_blocks(replace(b, mlp_hidden=768) for b in made.space.largest().blocks)
        ),
    )
    yield "cut", extract(again, arch).eval()
    yield "folded again", made.fold(arch, again)


def shares(made: Calibrated) -> Iterator[tuple[str, nn.Module]]:
    for share in SHARES:
        yield f"{share:g}", made.fold(made.arch(share))


def pruning(made: Calibrated) -> Iterator[tuple[str, nn.Module]]:
    """Torch-Pruning by magnitude, at one ratio, to half of the MACs of MLPs and heads."""
    limit = count(made.arch(0.5)).macs
    for name, keeps_width in (("heads and hidden", True), ("all", False)):
        yield name, pruned_to(made.options.torch_pruning, made.given, limit, keeps_width)


def pruned_to(folder: Path, given: nn.Module, limit: int, keeps_width: bool) -> nn.Module:
    """timm's ViT, pruned by Torch-Pruning, whose folder is given, to at most so many MACs; on the CPU."""
    sys.path.insert(0, str(folder))
    import torch_pruning as tp

    low, high, best = 0.0, 1.0, None
    for _ in range(8):
        ratio = (low + high) / 2
        network = pruned(tp, given, ratio, keeps_width)
        if macs_of(network) > limit:
            low = ratio
        else:
            high, best = ratio, network
    assert best is not None
    return best


def timing(made: Calibrated) -> Iterator[tuple[str, nn.Module]]:
    """Milliseconds at batch 1 in the same rounds, as exported files; the row's network is that of `fold`, bare."""
    slim = fold(made.ordered, made.half, made.images[:1], compensation="none")
    nets: dict[str, nn.Module] = {
        "given": made.model,
        "fold": slim,
        "uniform": fold(made.ordered, made.uniform, made.images[:1], compensation="none"),
    }
    for name, latency in (
        LatencyMeter("onnxruntime,batch=1,threads=1", runs=60)
        .compare({name: copy.deepcopy(net).cpu() for name, net in nets.items()})
        .items()
    ):
        made.took[f"{name}_ms"] = latency.median_ms
    yield "", slim


def pruned(tp: Any, given: nn.Module, ratio: float, keeps_width: bool) -> nn.Module:
    network: Any = copy.deepcopy(given).cpu()
    heads = {}
    for block in network.blocks:
        block.attn.fused_attn = False
        heads[block.attn.qkv] = block.attn.num_heads
    writers = [linear for block in network.blocks for linear in (block.attn.proj, block.mlp.fc2)]
    ignored = [network.patch_embed, *writers] if keeps_width else []
    ignored += [network.head] if isinstance(network.head, nn.Linear) else []
    pruner = tp.pruner.MetaPruner(
        network,
        torch.zeros(1, *input_shape(network)),
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=ratio,
        ignored_layers=ignored,
        num_heads=heads,
        prune_num_heads=True,
        head_pruning_ratio=ratio,
        round_to=2,
    )
    pruner.step()
    for block in network.blocks:
        block.attn.num_heads = pruner.num_heads[block.attn.qkv]
        block.attn.head_dim = block.attn.qkv.out_features // (3 * block.attn.num_heads)
        block.attn.attn_dim = block.attn.num_heads * block.attn.head_dim
    network.embed_dim = network.num_features = network.head_hidden_size = (
        network.patch_embed.proj.out_channels
    )
    return network


def macs_of(network: Any) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, *input_shape(network)))
    return counter.get_total_flops() // 2


SETTINGS: dict[str, Callable[[Calibrated], Iterator[tuple[str, nn.Module]]]] = {
    "fold": fold_setting,
    "activation": other_order("activation"),
    "uniform": uniform,
    "mean": less("mean"),
    "none": less("none"),
    "magnitude": other_order("magnitude"),
    "random": other_order("random"),
    "nested": nested,
    "shares": shares,
    "pruning": pruning,
    "timing": timing,
}


def main() -> None:
    words = parser(__doc__)
    words.add_argument("--seeds", type=int, default=3)
    words.add_argument("--images", type=int, default=384)
    words.add_argument("--answers", type=float, default=0.25, help="share of the class token in all fits")
    words.add_argument("--importance", default="unexplained", choices=list(IMPORTANCE))
    words.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    words.add_argument("--torch-pruning", type=Path, default=None)
    words.add_argument("--device", default="cpu")
    words.add_argument("--threads", type=int, default=1)
    words.add_argument("--tiny", action="store_true", help="few images, to rehearse")
    options = words.parse_args()
    most = 12_000
    if options.tiny:
        global PROBED, SCORED, HELD, ORDERED, MEASURED, BATCH
        PROBED, SCORED, HELD, ORDERED, MEASURED, BATCH = 48, 48, 8, 16, 16, 8
        options.images, options.importance, most = 24, "activation", 200
    torch.set_num_threads(options.threads)
    given = given_network(options.weights).to(options.device)
    data = images_for(options.dataset, scored=SCORED, most=most)
    probe = Probe(given, data)
    known = list(read_jsonl(options.out))
    whole = probe.accuracy(given)
    print(f"the given network: {whole:.2%} of {len(probe.scored)}", flush=True)
    for seed in range(options.seeds):
        made = Calibrated(given, data, seed, options)
        for setting in options.settings:
            if setting in ("pruning", "timing") and (
                seed or (setting == "pruning" and not options.torch_pruning)
            ):
                continue  # they look at no images
            asked = {name: getattr(options, name) for name in ("images", "answers", "importance")}
            key = {"setting": setting, "seed": seed, **asked}
            if any(key.items() <= row.items() for row in known):
                continue
            for variant, network in SETTINGS[setting](made):
                network = network.to(options.device)
                row = {
                    **key, "variant": variant, **probe.row(network, given), "given": whole, **made.took,
                    "arch": [(b.slot, b.num_heads, b.head_dim, b.mlp_hidden) for b in network.arch.blocks]
                    if isinstance(network, Model) else None,
                }  # fmt: skip
                append_jsonl(options.out, row)
                known.append(row)
                print({name: value for name, value in row.items() if name != "arch"}, flush=True)
    table(known)


def table(rows: list[dict[str, Any]]) -> None:
    print(f"\n{'setting':<28} {'MACs':>8} {'tokens':>7} {'points lost':>12}   seeds")
    for key in dict.fromkeys((row["setting"], row["variant"]) for row in rows):
        mine = [row for row in rows if (row["setting"], row["variant"]) == key]
        lost = [100 * (row["given"] - row["accuracy"]) for row in mine if row["accuracy"] is not None]
        spread = statistics.stdev(lost) if len(lost) > 1 else 0.0
        mean = statistics.mean(lost) if lost else float("nan")
        tokens = statistics.mean(row["tokens"] or 0.0 for row in mine)
        macs = statistics.mean(row["macs"] for row in mine) / 1e6
        print(f"{' '.join(key):<28} {macs:7.0f}M {tokens:7.4f} {mean:6.2f} ({spread:.2f})   {len(mine)}")


if __name__ == "__main__":
    main()
