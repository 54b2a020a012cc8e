"""What a pretrained ViT loses where it keeps fewer tokens, before and behind a short fine-tuning, and the time saved.

    python benchmarks/evidence_tokens_pretrained.py --weights vit_small_patch14.safetensors --dataset hfds/FOLDER
        --out FILE.csv [--keeps 0.9 0.8 0.7 0.6 0.5] [--selectors ...] [--scored 1000] [--tune-images 0] [--seeds 3]

Network, images and probe are those of `evidence_slim.py`: timm's vit_small_patch14_dinov2 at 98 pixels (49 patches), a
linear probe on the class token of 1,000 labelled images, fitted to the whole network and frozen, scored on `--scored`
images that nothing else uses. r, r^2 and r^3 of the patches go on from blocks 3, 6 and 9. Per selector and keep rate:
MACs, cosine of the class token with the whole network's, accuracy of the probe, and the median milliseconds of the
exported file beside the whole network's in the same rounds (ONNX Runtime, batch 1, one thread). With `--tune-images`
the same behind one pass over so many images that it learns from, of the whole network, without labels, once per seed.
Rows go to `--out` as they come; a row that is there is not made again.
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from evidence_slim import HELD, PROBED, Probe, features, given_network, images_for, parser
from evidence_tokens import FULL, Rows
from torch import Tensor
from torch.nn import functional

from vitnas.counting import count
from vitnas.data import Augment, Data, TrainBatches
from vitnas.errors import UserError
from vitnas.measure.latency import LatencyMeter
from vitnas.model import Model
from vitnas.model.selections import with_selections
from vitnas.model.timm_keys import from_timm
from vitnas.train import Engine
from vitnas.train.fewer_tokens import fewer_tokens_config, learn_from_whole

SELECTORS = ("predictor", "attention", "evit", "merge", "fixed", "random", "first")
UNTAUGHT = "predictor"  # which drops at random before it has learned
KEYS, VALUES = (
    ("selector", "keep", "images", "seed"),
    ("macs", "cosine", "accuracy", "n", "cpu_s", "ms", "whole_ms"),
)


def tuned(
    network: Model, whole: Model, data: Data, images: int, seed: int, batch: int, lr: float | None
) -> float:
    """Fine-tune in place on so many images, once each; returns the CPU seconds."""
    order = torch.randperm(len(data.train) - PROBED - HELD, generator=torch.Generator().manual_seed(seed))
    mine = data.train.subset((order[:images] + PROBED + HELD).tolist())
    loader = TrainBatches(mine, Augment(shift=0.125, hflip=0.5), batch_size=batch, seed=seed)
    config = replace(fewer_tokens_config(network.arch.selector or "", 1.0, lr), precision="bf16")
    # The predictor learns by its mask; the others as they are evaluated.
    network.masks_tokens = None if network.arch.selector == UNTAUGHT else False
    start = time.process_time()
    learn_from_whole(
        network,
        whole,
        loader,
        config=config,
        labels=False,
        seed=seed,
        engine=Engine(precision="bf16", cpu=True),
    )
    network.masks_tokens = None
    network.eval()
    return time.process_time() - start


def main() -> None:
    words = parser(__doc__)
    words.add_argument("--keeps", nargs="+", type=float, default=[0.9, 0.8, 0.7, 0.6, 0.5])
    words.add_argument("--selectors", nargs="+", default=SELECTORS)
    words.add_argument("--scored", type=int, default=1000)
    words.add_argument("--tune-images", type=int, default=0)
    words.add_argument("--batch", type=int, default=32)
    words.add_argument("--lr", type=float)
    words.add_argument("--seeds", type=int, default=3)
    options = words.parse_args()
    torch.set_num_threads(1)
    whole = from_timm(given_network(options.weights)).eval()
    data = images_for(options.dataset, scored=options.scored, most=None)
    probe = Probe(whole, data)
    best_BD = features(whole, probe.scored)
    meter = LatencyMeter("onnxruntime,batch=1,threads=1", runs=60)
    rows = Rows(options.out, KEYS, VALUES)

    def said(network: Model) -> tuple[float, float, int]:
        found_BD: Tensor = features(network, probe.scored)
        with torch.no_grad():
            right_B = probe.logits(found_BD).argmax(1) == probe.scored.targets
        cosine = float(functional.cosine_similarity(found_BD, best_BD).mean())
        return round(cosine, 4), round(float(right_B.double().mean()), 4), len(right_B)

    if not rows.has(FULL, 1.0, 0, 0):
        rows.add(FULL, 1.0, 0, 0, count(whole.arch).macs, *said(whole), 0, "", "")
    images = options.tune_images
    for keep in options.keeps:
        for seed in range(options.seeds if images else 1):
            for word in options.selectors:
                if rows.has(word, keep, images, seed) or (word == UNTAUGHT and not images):
                    continue
                try:
                    generator = torch.Generator().manual_seed(seed)
                    network = with_selections(whole, keep, selector=word, generator=generator).eval()
                except UserError as error:
                    print(error)
                    continue
                macs = count(network.arch).macs
                if images:
                    took = tuned(network, whole, data, images, seed, options.batch, options.lr)
                    rows.add(word, keep, images, seed, macs, *said(network), round(took, 1), "", "")
                    continue
                times = meter.compare({"kept": network, "whole": whole})
                ms = [round(times[name].median_ms, 3) for name in ("kept", "whole")]
                rows.add(word, keep, 0, 0, macs, *said(network), 0, *ms)


if __name__ == "__main__":
    main()
