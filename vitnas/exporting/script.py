"""The script that is written beside an ONNX file: all that using it takes, without vitnas or torch."""

from __future__ import annotations

SCRIPT = "predict.py"
_TEXT = """# python predict.py photo.jpg ...   needs: pip install onnxruntime pillow
import json, pathlib, sys
import numpy, onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession(str(pathlib.Path(__file__).with_name({file!r})))
names = json.loads(session.get_modelmeta().custom_metadata_map.get("class_names", "[]"))
for path in sys.argv[1:]:
    image = ImageOps.exif_transpose(Image.open(path))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    pixels = numpy.asarray(image.convert({mode!r})){grey}  # (height, width, {channels}), 0 to 255
    answer = session.run(None, {{"images": pixels[None]}})[0][0]
    best = answer.argsort()[::-1][:3]
    print(path, *(f"{{names[i] if names else i}} {{answer[i]:.1%}}" for i in best), sep="  ")
"""


def script(file: str, in_chans: int) -> str:
    """Python that asks `file`, which takes pixels and lies beside it, about images.

    Args:
        in_chans: 1 for a network of grey images, else 3.
    """
    mode, grey = ("L", "[:, :, None]") if in_chans == 1 else ("RGB", "")
    return _TEXT.format(file=file, mode=mode, grey=grey, channels=in_chans)
