"""Files that take pixels, on real photographs as they are stored: they answer as the training pipeline does."""

from pathlib import Path

import numpy as np
import pytest
import torch

import vitnas
from vitnas.data.images import upright, with_channels
from vitnas.data.sources import from_pil
from vitnas.exporting.onnx import onnx_session


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
    vitnas.export(model, tmp_path / "model.onnx", pixels=True)
    session, rows = onnx_session(tmp_path / "model.onnx"), []
    for place in range(len(test)):
        picture = test.store.source.read(test.store.rows[int(test.places[place])])
        pixels = from_pil(with_channels(upright(picture), 3))
        rows.append(session.run(None, {"images": pixels[None]})[0][0])
    got_NY = np.stack(rows)
    differ = int((got_NY.argmax(1) != want_NY.argmax(1)).sum())
    print(f"{differ} of {len(test)} differ; probabilities by {np.abs(got_NY - want_NY).max():.2g} at most")
    assert len(test) == 5_000
    assert differ <= 5
    assert np.abs(got_NY - want_NY).max() < 0.02
