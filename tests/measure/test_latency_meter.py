"""The clock: order, arithmetic and bookkeeping. Absolute times are not asserted; ratios of very unequal work are."""

import gc
import json
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitnas.errors import UserError
from vitnas.measure import Latency, LatencyMeter, LatencyTarget, measure_latency
from vitnas.measure.convert import convert, input_shape, random_images
from vitnas.measure.runtimes import onnx_session, reference_call
from vitnas.runs import from_json, to_json

QUICK = {"warmup": 1, "runs": 10, "seconds": 0.5, "attempts": 1}


def vit(depth: int = 1, **kwargs: Any) -> VisionTransformer:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "num_classes": 10, **kwargs}
    return VisionTransformer(depth=depth, **sizes)


@pytest.mark.parametrize("target", ["onnxruntime", "torch,batch=2"])
def test_a_deeper_model_is_slower(target: str) -> None:
    found = LatencyMeter(target, **QUICK).compare({"short": vit(1), "long": vit(8)})
    assert found["long"].median_ms > 2 * found["short"].median_ms
    assert found["long"].ratio_to_reference > 2 * found["short"].ratio_to_reference


def test_measuring_leaves_everything_as_it_was() -> None:
    model = vit()
    model.blocks[0].eval()  # a mixed state, as when some blocks are frozen
    modes = [module.training for module in model.modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state, threads = torch.get_rng_state(), torch.get_num_threads()
    level, filters = logging.getLogger("torch.onnx").level, list(warnings.filters)
    for target in ("onnxruntime,threads=2", "torch,threads=2", "torch,dtype=bfloat16"):
        LatencyMeter(target, **QUICK).measure(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.get_num_threads() == threads
    assert gc.isenabled()
    assert logging.getLogger("torch.onnx").level == level
    assert list(warnings.filters) == filters
    torch.testing.assert_close(torch.get_rng_state(), random_state, rtol=0, atol=0)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=0)


def test_a_latency_states_how_it_was_taken_and_reads_back() -> None:
    latency = LatencyMeter("torch", batch=2, **QUICK).measure(vit())
    assert (latency.runtime, latency.batch, latency.threads, latency.dtype) == ("torch", 2, 1, "float32")
    assert (latency.image_size, latency.warmup, latency.runs) == (32, 1, 10)
    assert latency.p05_ms <= latency.p25_ms <= latency.median_ms <= latency.p75_ms <= latency.p95_ms
    assert latency.images_per_s == pytest.approx(2000 / latency.median_ms, abs=1e-2)
    assert latency.environment["torch"] == torch.__version__
    assert from_json(Latency, json.loads(json.dumps(to_json(latency)))) == latency
    assert "on torch, cpu, batch 2, 1 thread, float32" in str(latency)


def test_drift_cancels_in_the_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that becomes three times slower halfway: the times spread, the ratio does not."""
    pace = {"ms": 1.0, "calls": 0, "now": 0.0}
    monkeypatch.setattr("vitnas.measure.latency.time.perf_counter", lambda: pace["now"])

    def work(share: float) -> None:
        pace["calls"] += 1
        if pace["calls"] == 21:  # after 10 of 20 rounds with 2 calls each
            pace["ms"] = 3.0
        pace["now"] += pace["ms"] * share / 1e3

    found = measure_latency(
        {"model": lambda: work(4.0)},
        LatencyTarget(runtime="torch"),
        image_size=32,
        reference=lambda: work(1.0),
        warmup=0,
        runs=20,
    )["model"]
    assert not found.trusted
    assert found.ratio_to_reference == pytest.approx(4.0, rel=0.15)
    assert "not trusted" in str(found)


def test_timing_ends_after_the_time_given_but_not_before_ten_rounds() -> None:
    def slow() -> None:
        time.sleep(0.01)

    target = LatencyTarget(runtime="torch")
    found = measure_latency(
        {"a": slow}, target, image_size=1, reference=slow, warmup=0, runs=500, seconds=0.05
    )
    assert 10 <= found["a"].runs < 30


def test_the_narrowest_of_several_attempts_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    import vitnas.measure.latency as module

    latency = LatencyMeter("torch", **QUICK).measure(vit())
    spreads = iter([0.5, 0.2, 0.3])

    def fake(calls: object, target: object, **kwargs: object) -> dict[str, Latency]:
        high = latency.median_ms * (1 + next(spreads))
        return {
            "model": Latency(
                **{**to_json(latency), "p25_ms": latency.median_ms, "p75_ms": high, "trusted": False}
            )
        }

    monkeypatch.setattr(module, "measure_latency", fake)
    assert LatencyMeter("torch").measure(vit()).relative_iqr == pytest.approx(0.2)


def test_the_cache_is_by_arch_and_target() -> None:
    cache: dict[object, Latency] = {}
    model = vit()
    meter = LatencyMeter("torch", cache=cache, **QUICK)
    assert meter.measure(model) is not meter.measure(model)  # a model without an arch is not kept
    assert not cache

    class WithArch(nn.Module):
        arch = "an arch"
        pretrained_cfg = {"input_size": (3, 8, 8)}  # noqa: RUF012

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)

    assert meter.measure(WithArch()) is meter.measure(WithArch())
    assert list(cache) == [("an arch", "torch,batch=1")]
    LatencyMeter("torch,batch=2", cache=cache, **QUICK).measure(WithArch())
    assert len(cache) == 2


def test_a_model_that_cannot_be_traced_is_measured_through_the_other_exporter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import vitnas.measure.latency as module

    tried = []

    def once(
        model: nn.Module, path: Path, images: torch.Tensor, *, exporter: str, dynamic_batch: bool
    ) -> None:
        tried.append(exporter)
        if exporter == "legacy":
            raise RuntimeError("aten::fft_fft")
        convert(model, path, images, exporter="legacy", dynamic_batch=dynamic_batch)

    monkeypatch.setattr(module, "convert", once)
    assert LatencyMeter(**QUICK).measure(vit()).median_ms > 0
    assert tried == ["legacy", "dynamo"]


def test_an_onnx_file_is_measured_with_its_batch_axis_fixed(tmp_path: Path) -> None:
    model, path = vit(), tmp_path / "model.onnx"
    convert(model, path, random_images((2, *input_shape(model))), exporter="legacy", opset=18)
    meter = LatencyMeter("onnxruntime,batch=4", **QUICK)
    assert onnx_session(path, meter.target).get_inputs()[0].shape == [4, 3, 32, 32]
    latency = meter.measure_onnx(path)
    assert (latency.batch, latency.image_size) == (4, 32)
    with pytest.raises(UserError, match=r"an ONNX file runs in onnxruntime"):
        LatencyMeter("torch").measure_onnx(path)
    with pytest.raises(UserError, match=r"none.onnx does not exist; it should be an ONNX file"):
        meter.measure_onnx(tmp_path / "none.onnx")


def test_the_reference_computes_the_same_in_both_runtimes() -> None:
    torch_logits = reference_call(LatencyTarget(runtime="torch"))()
    onnx_logits = reference_call(LatencyTarget(runtime="onnxruntime"))()
    assert isinstance(onnx_logits, list)
    torch.testing.assert_close(torch.from_numpy(onnx_logits[0]), torch_logits, rtol=1e-3, atol=1e-3)


def test_a_reference_model_can_be_given() -> None:
    model = vit(2)
    found = LatencyMeter("torch", reference=model, warmup=3, runs=30).measure(model)
    assert found.ratio_to_reference == pytest.approx(1.0, abs=0.3)


def test_both_sides_of_the_images_stand_beside_the_time() -> None:
    found = LatencyMeter("torch", **QUICK).measure(vit(img_size=(32, 64)))
    assert found.image_size == (32, 64)
    assert from_json(Latency, json.loads(json.dumps(to_json(found)))) == found


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(UserError, match=r"measuring 0 calls .* at least one call"):
        measure_latency({}, LatencyTarget(), image_size=1)
    with pytest.raises(UserError, match=r"image sizes are .*; Models timed together need one size"):
        LatencyMeter("torch").compare({"a": vit(), "b": vit(img_size=16)})
    with pytest.raises(
        UserError, match=r"image sizes are .*\(32, 64\).*; Models timed together need one size"
    ):
        LatencyMeter("torch").compare({"a": vit(), "b": vit(img_size=(32, 64))})
    with pytest.raises(UserError, match=r"Linear does not say which images it takes"):
        LatencyMeter("torch").measure(nn.Linear(1, 1))
