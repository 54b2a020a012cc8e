"""The script that is written beside an ONNX file: all that using it takes, without vitnas or torch."""

from __future__ import annotations

from pathlib import Path

from vitnas.errors import UserError
from vitnas.exporting.front import NUMBERS
from vitnas.model.timm_cfg import SEVERAL
from vitnas.runs import parse_json

SCRIPT = "predict.py"
_TEXT = """# python {script} photo.jpg ...   needs: pip install onnxruntime pillow
import json, pathlib, sys
import numpy, onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession(str(pathlib.Path(__file__).with_name({file!r})))
about = session.get_modelmeta().custom_metadata_map
names = json.loads(about.get("class_names", "[]"))
for path in sys.argv[1:]:
    image = ImageOps.exif_transpose(Image.open(path))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
{prepare}
    answer = session.run(None, {{{input!r}: pixels[None]}})[0][0]
{answer}
"""
_PIXELS = "    pixels = numpy.asarray(image.convert({mode!r})){grey}  # (height, width, {channels}), 0 to 255"
# What a file of prepared images leaves to its user: resize, crop, normalise.
_TENSORS = """    image = image.convert({mode!r})
    if image.size != ({width}, {height}):
        image = ImageOps.crop({resize}(image, {kept}, {filter}), {edges})
    pixels = numpy.asarray(image, dtype="float32").reshape({height}, {width}, {channels}) / 255
    pixels = ((pixels - json.loads(about["mean"])) / json.loads(about["std"])).astype("float32").transpose(2, 0, 1)"""
_CLASSES = """    best = answer.argsort()[::-1][:3]
    print(path, *(f"{names[i] if names else i} {answer[i]:.1%}" for i in best), sep="  ")"""
_OF_LOGITS = {
    False: "    answer = numpy.exp(answer - answer.max())\n    answer /= answer.sum()\n",
    True: "    answer = 1 / (1 + numpy.exp(-answer))  # each class by itself\n",
}
_NUMBERS = """    told = [f"{names[i] if names else i} {value:.5g}" for i, value in enumerate(answer)]
    print(path, *told, sep="  ")"""
_FEATURES = "    print(path, answer.shape, answer[:4])  # features"


def script_of(file: Path, name: str = SCRIPT) -> str:
    """Python that asks an ONNX file, which lies beside it, about images.

    Raises:
        UserError: the file does not say how images are prepared.
    """
    import onnx

    proto = onnx.load(str(file), load_external_data=False)
    about = {item.key: item.value for item in proto.metadata_props}
    taken, given = proto.graph.input[0], proto.graph.output[0]
    channels, height, width = parse_json(about["input_size"])
    mode, grey = ("L", "[:, :, None]") if channels == 1 else ("RGB", "")
    if is_ready := taken.type.tensor_type.elem_type == onnx.TensorProto.UINT8:
        prepare = _PIXELS.format(mode=mode, grey=grey, channels=channels)
    else:
        prepare = _prepare(file, about, mode, channels, height, width)
    has_classes = given.name != "features" and about.get("num_classes") != "0"
    logits = "" if is_ready else _OF_LOGITS[about.get(SEVERAL) == "true"]
    answer = logits + _CLASSES if has_classes else _FEATURES
    if given.name == NUMBERS:
        answer = _NUMBERS
    return _TEXT.format(script=name, file=file.name, prepare=prepare, input=taken.name, answer=answer)


def executorch_code(path: str) -> str:
    """Python that asks a `.pte` file, which takes one image at a time, of pixels."""
    return "\n".join(
        (
            "from executorch.runtime import Runtime",
            f'program = Runtime.get().load_program("{path}")',
            'method = program.load_method("forward")',
            "(answers,) = method.execute([image])  # torch, uint8 (1, height, width, channels)",
        )
    )


def _prepare(file: Path, about: dict[str, str], mode: str, channels: int, height: int, width: int) -> str:
    if not {"mean", "std", "interpolation", "crop_pct"} <= about.keys():
        raise UserError(
            f"{file} does not say how images are prepared, so no script can; export a model that knows, or give "
            "data_config."
        )
    share = float(about["crop_pct"])
    high, wide = int(height / share), int(width / share)
    top, left = round((high - height) / 2), round((wide - width) / 2)
    return _TENSORS.format(
        resize="Image.Image.resize" if about.get("crop_mode") == "squash" else "ImageOps.fit",
        mode=mode,
        kept=(wide, high),
        filter=f"Image.{about['interpolation'].upper()}",
        edges=(left, top, wide - width - left, high - height - top),
        height=height,
        width=width,
        channels=channels,
    )
