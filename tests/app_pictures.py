"""The pictures of docs/page.md, taken of the page itself: `python -m tests.app_pictures --model EXPORT`."""

import argparse
import io
import tempfile
from pathlib import Path

from PIL import Image

from app import EXAMPLES
from tests.app_toys import DESKTOP, PHONE, ROOT, chromium, fill, served, set_number, visit, written

ASKED = {name: text for name, text in EXAMPLES.items() if name != "title"}
SEED = 11
COLOURS = 96  # of the picture's palette: text and plain surfaces lose nothing that one sees


def take_pictures(model: str, output: Path) -> list[Path]:
    """phone-light.png, phone-dark.png, desktop-light.png, desktop-dark.png: rooms that `model` wrote."""
    output.mkdir(parents=True, exist_ok=True)
    paths = []

    def look(browser, name, viewport, scheme):
        page = visit(browser, address, viewport=viewport, color_scheme=scheme, device_scale_factor=2)
        fill(page, **ASKED)
        set_number(page, "Seed", SEED)
        page.click("#how button")  # closed again
        page.click("#write")
        written(page)
        page.mouse.move(0, 0)
        page.evaluate("document.activeElement.blur()")
        page.evaluate("scrollTo(0, 0)")
        page.wait_for_timeout(600)  # gradio fades its controls
        picture = Image.open(io.BytesIO(page.screenshot(full_page=name == "phone")))
        paths.append(output / f"{name}-{scheme}.png")
        picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(paths[-1], optimize=True)
        page.context.close()

    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with served(log, "--model", str(Path(model).resolve())) as (address, _), chromium() as see:
            for name, viewport in (("phone", PHONE), ("desktop", DESKTOP)):
                for scheme in ("light", "dark"):
                    see(look, name, viewport, scheme)
    return paths


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="artifacts/runs/dungeons/export")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images")
    arguments = parser.parse_args()
    for path in take_pictures(arguments.model, arguments.output):
        print(path.name, f"{path.stat().st_size:,} bytes")
