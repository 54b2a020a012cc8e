"""Files that take pixels, on real photographs as they are stored: they answer as the training pipeline does."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import vitnas
from vitnas.data.images import upright, with_channels
from vitnas.data.sources import from_pil
from vitnas.exporting.onnx import onnx_runner
from vitnas.measure.convert import quiet


@pytest.mark.slow
@pytest.mark.parametrize("image_size", [40, 24])
def test_at_most_one_of_a_thousand_images_is_of_another_class(
    image_size: int, shared: Path, tmp_path: Path
) -> None:
    pytest.importorskip("datasets")
    folder = shared / "data" / "cifar10-jpeg"
    if not folder.exists():
        pytest.skip(f"NOT CHECKED on photographs: {folder} is missing.")
    torch.set_num_threads(1)
    config = vitnas.DataConfig(
        dataset=f"hfds/{folder}", image_size=image_size, crop_pct=0.875, max_images=5_000
    )
    data = vitnas.open_data(config)
    space = vitnas.spaces.autoformer("micro", image_size=image_size, patch_size=8, num_classes=10)
    model = vitnas.build(space.smallest())
    batches = vitnas.TrainBatches(data.train, data.augment, batch_size=64, seed=0)
    vitnas.fit(model, vitnas.Classification(), vitnas.Fixed(), batches, config=vitnas.TrainConfig(epochs=2))
    test = data.open_test(tmp_path / "reads.json", purpose="agreement of an exported file")
    with torch.no_grad():
        wanted = [model.eval()(images).softmax(1) for images, _ in vitnas.EvalBatches(test, batch_size=250)]
    want_NY = torch.cat(wanted).numpy()
    pictures = (test.store.source.read(test.store.rows[int(place)]) for place in test.places)
    pixels = [from_pil(with_channels(upright(picture), 3)) for picture in pictures]
    images_NHWC = torch.from_numpy(np.stack(pixels))  # as they are stored, all of one size
    assert len(test) == len(images_NHWC) == 5_000
    for name in ("model.onnx", "model.pt2"):
        vitnas.export(model, tmp_path / name, pixels=True)
        run = onnx_runner(tmp_path / name) if name == "model.onnx" else program(tmp_path / name)
        with torch.no_grad():
            got_NY = torch.cat([run(part) for part in images_NHWC.split(250)]).numpy()
        differ, apart = int((got_NY.argmax(1) != want_NY.argmax(1)).sum()), np.abs(got_NY - want_NY).max()
        print(f"{name}: {differ} of {len(test)} differ; probabilities by {apart:.2g} at most")
        assert differ <= 5, name
        assert apart < 0.02, name


def program(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """A `.pt2` file as a function."""
    with quiet():
        return torch.export.load(path).module()
