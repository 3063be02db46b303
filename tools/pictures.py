"""Draw the pictures of the docs that are of no run: the architecture, and the page of `capsnet demo`.

python -m tools.pictures architecture    docs/architecture.svg, from a network as `capsnet.create` builds it
python -m tools.pictures demo            docs/demo.png, a 7 drawn on the page in a browser (the extra e2e, chromium)
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from urllib.request import urlopen

from torch import nn

from capsnet import CapsNet, create
from capsnet.files import write_atomically

__all__ = ["architecture", "main"]

DOCS = Path(__file__).resolve().parents[1] / "docs"
STYLE = """
  text { font: 13px sans-serif; fill: #24292f; text-anchor: middle }
  .note { font-size: 12px; fill: #57606a }
  rect, path { fill: none; stroke: #57606a }
  .face { fill: #eef1fb; stroke: #3f51b5 }
  .chosen { fill: #3f51b5; stroke: #3f51b5 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .note { fill: #9da7b3 } rect, path { stroke: #9da7b3 }
    .face { fill: #20264a; stroke: #8c9eff } .chosen { fill: #8c9eff; stroke: #8c9eff }
  }"""
MIDDLE, TOP, BOTTOM = 115, 24, 225
"""Rows of the picture in pixels: centre of the shapes, names, and notes."""
SEVEN = ((0.25, 0.25), (0.75, 0.22), (0.62, 0.5), (0.45, 0.82))
"""A stroke, as shares of the canvas."""


def _maps(x: float, side: float, layers: int) -> Iterator[str]:
    """A stack of square feature maps around `x`, the first one in front."""
    for k in reversed(range(layers)):
        left, top = x - side / 2 + 4 * k, MIDDLE - side / 2 - 4 * k
        yield f'<rect class="face" x="{left:g}" y="{top:g}" width="{side:g}" height="{side:g}"/>'


def _column(x: float, width: float, height: float, rows: int, chosen: int) -> Iterator[str]:
    """Rows one above the other around `x`, one of them filled; `chosen` -1 for none."""
    step = height / rows
    for k in range(rows):
        kind, top = "chosen" if k == chosen else "face", MIDDLE - height / 2 + k * step
        yield f'<rect class="{kind}" x="{x - width / 2:g}" y="{top:g}" width="{width:g}" height="{step - 2:g}"/>'


def architecture(network: CapsNet) -> str:
    """The network as SVG, from the image to its reconstruction, with the sizes that it has; light and dark."""
    decoder, primary, digits = network.decoder, network.primary, network.class_capsules
    assert decoder is not None
    rows, columns = primary.conv.out_size
    kernel = network.conv.kernel_size
    _, in_dim, classes, out_dim = digits.weight.shape
    image = " x ".join(map(str, network.image_shape))
    hidden = [layer.out_features for layer in decoder.layers if isinstance(layer, nn.Linear)][:-1]
    first = " x ".join(map(str, (network.conv.weight.shape[-1], *network.conv.out_size)))
    parts = [
        (60, "image", image, "", _maps(60, 84, 1)),
        (205, "convolution, ReLU", first, f"{kernel} x {kernel}", _maps(195, 66, 6)),
        (
            360,
            "primary capsules",
            f"{primary.types} x {rows} x {columns} = {primary.capsules:,} of {in_dim}-D",
            f"{primary.conv.kernel_size} x {primary.conv.kernel_size}, stride {primary.conv.stride}",
            _maps(350, 48, 6),
        ),
        (
            540,
            "class capsules",
            f"{classes} of {out_dim}-D; length: presence",
            f"votes, routing, r = {digits.iterations}",
            _column(540, 96, 120, classes, classes // 2),
        ),
        (
            720,
            "decoder",
            ", ".join(f"{each:,}" for each in hidden),
            "of one capsule",
            (line for k, each in enumerate(hidden) for line in _column(705 + 30 * k, 12, each / 9, 1, -1)),
        ),
        (850, "reconstruction", image, "sigmoid", _maps(850, 84, 1)),
    ]
    lines, before = list[str](), 0
    for x, name, note, arrow, shapes in parts:
        lines += [f'<text x="{x}" y="{TOP}">{name}</text>', *shapes]
        lines.append(f'<text class="note" x="{x}" y="{BOTTOM}">{note}</text>')
        if arrow:
            start, end = before + 58, x - 60
            lines.append(f'<path d="M{start} {MIDDLE}H{end}m-6 -4l6 4l-6 4"/>')
            lines.append(f'<text class="note" x="{(start + end) / 2:g}" y="{BOTTOM - 20}">{arrow}</text>')
        before = x
    body = "\n".join(f"  {line}" for line in lines)
    title = f"<title>{network.config['name']}: {image} to {classes} classes</title>"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 910 240" role="img">\n  {title}\n'
        f"  <style>{STYLE}\n  </style>\n{body}\n</svg>\n"
    )


def _demo(path: Path, port: int = 8765) -> None:
    from playwright.sync_api import sync_playwright

    command = [sys.executable, "-m", "capsnet", "demo", "capsnet-mnist", "--port", str(port), "--no-browser"]
    address, server = f"http://127.0.0.1:{port}", subprocess.Popen(command)
    try:
        for _ in range(120):
            try:
                urlopen(address).close()
                break
            except OSError:
                time.sleep(0.5)
        with sync_playwright() as playwright:
            flags = ["--headless", "--no-sandbox", "--disable-gpu"]
            browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=flags)
            page = browser.new_page(viewport={"width": 1100, "height": 760})
            page.goto(address)
            page.wait_for_selector(".slider")
            box = page.locator("#drawing").bounding_box()
            points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in SEVEN]
            page.mouse.move(*points[0])
            page.mouse.down()
            for point in points[1:]:
                page.mouse.move(*point, steps=8)
            page.mouse.up()
            page.wait_for_function("() => document.getElementById('winner').textContent === '7'")
            page.wait_for_load_state("networkidle")
            write_atomically(path, lambda place: place.write_bytes(page.screenshot()))
            browser.close()
    finally:
        server.terminate()


def main(arguments: Sequence[str]) -> int:
    """Draw one picture; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.pictures", description=str(__doc__).splitlines()[0])
    parser.add_argument("name", choices=("architecture", "demo"))
    if parser.parse_args(arguments).name == "demo":
        path = DOCS / "demo.png"
        _demo(path)
    else:
        path, network = DOCS / "architecture.svg", create("capsnet")
        assert isinstance(network, CapsNet)
        write_atomically(path, partial(Path.write_text, data=architecture(network), encoding="utf-8"))
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
