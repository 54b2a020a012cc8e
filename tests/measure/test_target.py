"""The text of a latency target: what it means, that it reads back, and each refusal."""

import pytest

from vitnas.budget import DEFAULT_LATENCY_TARGET
from vitnas.errors import UserError
from vitnas.measure import LatencyMeter, LatencyTarget, parse_target


def test_text_gives_fields_and_the_rest_is_default() -> None:
    assert parse_target(" torch , batch = 8,threads=2 ") == LatencyTarget(runtime="torch", batch=8, threads=2)
    assert parse_target("onnxruntime") == LatencyTarget()


@pytest.mark.parametrize(
    "text",
    [
        DEFAULT_LATENCY_TARGET,
        "torch,batch=8,threads=2",
        "torch,batch=1,device=cuda:1,dtype=bfloat16",
        "onnxruntime,batch=4,dtype=float16",
    ],
)
def test_text_reads_back(text: str) -> None:
    assert str(parse_target(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "onnxruntme",
            r"is 'onnxruntme'; it must be one of onnxruntime, torch, torch_compile, openvino\. Nearest: 'onnxruntime'",
        ),
        ("", r"runtime is ''"),
        ("torch,8", r"has the part '8'; after the runtime, each part is field=value. Write for example"),
        ("torch,batch=", r"has the part 'batch='"),
        ("torch,bach=8", r"has no field 'bach'; it has batch, threads, device, dtype. Nearest: 'batch'"),
        ("torch,batch=8,batch=9", r"gives batch twice; leave one out"),
        ("torch,batch=0", r"batch is 0; it must be a whole number of at least 1"),
        ("torch,threads=two", r"threads is 'two'; it must be a whole number"),
        ("torch,threads=-1", r"threads is '-1'; it must be a whole number"),
        ("torch,device=tpu", r"device is 'tpu'; it must be cpu, cuda or cuda:N"),
        ("torch,device=cuda:x", r"device is 'cuda:x'"),
        ("onnxruntime,dtype=bfloat16", r"dtype is 'bfloat16'; onnxruntime takes float32, float16"),
    ],
)
def test_bad_text_is_refused_in_a_sentence(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_target(text)


def test_a_device_that_is_missing_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match=r"no CUDA device. Use device=cpu"):
        LatencyMeter("torch,device=cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UserError, match=r"onnxruntime has no CUDA support"):
        LatencyMeter("onnxruntime,device=cuda")
