"""How often a file that prepares images by itself answers otherwise than the training pipeline.

    python benchmarks/evidence_pixels.py DATASET [--size 40] [--crop 0.875] [--epochs 1]

A small ViT learns from the train split at that size; its `.onnx` and `.pt2` that take pixels are asked about the images
of the test split as they are stored, and the Model about the same as training prepares them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import vitnas
from vitnas.data import Images
from vitnas.data.images import upright, with_channels
from vitnas.data.sources import from_pil
from vitnas.exporting.onnx import onnx_session


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("dataset")
    parser.add_argument("--size", type=int, default=40)
    parser.add_argument("--crop", type=float, default=0.875)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--train", type=int, default=10_000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    config = vitnas.DataConfig(
        dataset=given.dataset, image_size=given.size, crop_pct=given.crop, max_images=given.train
    )
    data = vitnas.open_data(config)
    space = vitnas.spaces.autoformer(
        "micro", image_size=given.size, patch_size=4, in_chans=data.in_chans, num_classes=data.num_classes
    )
    model = vitnas.build(space.smallest())
    batches = vitnas.TrainBatches(data.train, data.augment, batch_size=128, seed=0)
    vitnas.fit(
        model,
        vitnas.Classification(),
        vitnas.Fixed(),
        batches,
        config=vitnas.TrainConfig(epochs=given.epochs),
    )
    model = model.cpu().eval()
    with tempfile.TemporaryDirectory() as folder:
        test = data.open_test(Path(folder) / "reads.json", purpose="agreement of an exported file")
        onnx, program = Path(folder) / "model.onnx", Path(folder) / "model.pt2"
        for path in (onnx, program):
            vitnas.export(model, path, pixels=True)
        ask(model, test, onnx, program)


def ask(model: vitnas.Model, test: Images, onnx: Path, program: Path) -> None:
    """Print how often the files' classes differ from the Model's, and by how much probabilities do."""
    session, run = onnx_session(onnx), torch.export.load(program).module()
    wanted, targets = [], []
    with torch.no_grad():
        for images_BCHW, targets_B in vitnas.EvalBatches(test, batch_size=250):
            wanted.append(model(images_BCHW).softmax(1))
            targets.append(targets_B)
    want_NY, target_N = torch.cat(wanted).numpy(), torch.cat(targets).numpy()
    got: dict[str, list[np.ndarray]] = {"onnx": [], "pt2": []}
    start = time.perf_counter()
    for place in range(len(test)):
        row = test.store.rows[int(test.places[place])]
        pixels = from_pil(with_channels(upright(test.store.source.read(row)), test.form.in_chans))
        got["onnx"].append(session.run(None, {"images": pixels[None]})[0][0])
        got["pt2"].append(run(torch.from_numpy(pixels)[None])[0].numpy())
    seconds = time.perf_counter() - start
    print(f"{len(test)} images of {pixels.shape} to {test.form.input_size}, crop {test.form.crop_pct}")
    print(f"accuracy of the Model {np.mean(want_NY.argmax(1) == target_N):.2%}")
    for name, rows in got.items():
        answer_NY = np.stack(rows)
        differ = int((answer_NY.argmax(1) != want_NY.argmax(1)).sum())
        apart = np.abs(answer_NY - want_NY).max()
        print(f"{name}: top-1 differs on {differ} of {len(test)} ({differ / len(test):.3%}), {apart=:.2g}")
    print(f"{1e3 * seconds / len(test):.2f} ms per image for both files")


if __name__ == "__main__":
    main()
