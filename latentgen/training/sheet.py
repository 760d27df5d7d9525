"""Contact sheets: pictures side by side, with a line below each."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


def from_unit(picture: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> an RGB picture."""
    values = picture.detach().float().clamp(-1, 1).add(1).mul(127.5).round().byte()
    return Image.fromarray(np.ascontiguousarray(values.permute(1, 2, 0).cpu().numpy()))


def contact_sheet(pictures: Sequence[Image.Image], columns: int, labels: Sequence[str] = ()) -> Image.Image:
    """The pictures in rows of `columns`, on grey, each above its label if there are labels."""
    width, height = pictures[0].size
    gap, line = 4, 14 if labels else 0
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap + line) + gap), "#d0d0d0")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=10)
    for index, picture in enumerate(pictures):
        x = gap + index % columns * (width + gap)
        y = gap + index // columns * (height + gap + line)
        sheet.paste(picture, (x, y))
        if labels:
            pen.text((x, y + height), _fitting(labels[index], font, width), fill="black", font=font)
    return sheet


def _fitting(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    """As much of the text as fits, an ellipsis for the rest."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
