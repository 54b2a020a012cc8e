"""What a pretrained ViT loses where it keeps fewer tokens, by selectors without training, and what time that saves.

    python benchmarks/evidence_tokens_pretrained.py --weights vit_small_patch14.safetensors --dataset hfds/FOLDER
        --out FILE.csv [--keeps 0.9 0.8 0.7 0.6 0.5] [--scored 500]

Network, images and probe are those of `evidence_slim.py`: timm's vit_small_patch14_dinov2 at 98 pixels (49 patches), a
linear probe on the class token of 1,000 labelled images, fitted to the whole network and frozen, scored on `--scored`
images that nothing else uses. r, r^2 and r^3 of the patches go on from blocks 3, 6 and 9. Per selector and keep rate:
MACs, cosine of the class token with the whole network's, accuracy of the probe, and the median milliseconds of the
exported file beside the whole network's in the same rounds (ONNX Runtime, batch 1, one thread). Rows go to `--out` as
they come; a row that is there is not made again.
"""

from __future__ import annotations

import torch
from evidence_slim import Probe, features, given_network, images_for, parser
from evidence_tokens import FULL, Rows
from torch.nn import functional

from vitnas.counting import count
from vitnas.errors import UserError
from vitnas.measure.latency import LatencyMeter
from vitnas.model.selections import with_selections
from vitnas.model.timm_keys import from_timm

SELECTORS = ("attention", "evit", "merge", "fixed", "random", "first")
KEYS, VALUES = ("selector", "keep"), ("macs", "cosine", "accuracy", "n", "ms", "whole_ms")


def main() -> None:
    words = parser(__doc__)
    words.add_argument("--keeps", nargs="+", type=float, default=[0.9, 0.8, 0.7, 0.6, 0.5])
    words.add_argument("--selectors", nargs="+", default=SELECTORS)
    words.add_argument("--scored", type=int, default=500)
    options = words.parse_args()
    torch.set_num_threads(1)
    whole = from_timm(given_network(options.weights)).eval()
    probe = Probe(whole, images_for(options.dataset, scored=options.scored, most=4000 + options.scored))
    best_BD = features(whole, probe.scored)
    meter = LatencyMeter("onnxruntime,batch=1,threads=1", runs=60)
    rows = Rows(options.out, KEYS, VALUES)
    if not rows.has(FULL, 1.0):
        rows.add(FULL, 1.0, count(whole.arch).macs, 1.0, probe.accuracy(whole), len(probe.scored), "", "")
    for keep in options.keeps:
        for word in options.selectors:
            if rows.has(word, keep):
                continue
            try:
                network = with_selections(whole, keep, selector=word).eval()
            except UserError as error:
                print(error)
                continue
            cosine = float(functional.cosine_similarity(features(network, probe.scored), best_BD).mean())
            times = meter.compare({"kept": network, "whole": whole})
            rows.add(
                word,
                keep,
                count(network.arch).macs,
                round(cosine, 4),
                round(probe.accuracy(network), 4),
                len(probe.scored),
                round(times["kept"].median_ms, 3),
                round(times["whole"].median_ms, 3),
            )


if __name__ == "__main__":
    main()
