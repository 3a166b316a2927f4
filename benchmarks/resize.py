"""How long an image takes to resize, on one thread, in CPU seconds.

Peers: torch's and Pillow's antialiased bilinear, and cv2's INTER_AREA, by which stock FFCV resizes, and INTER_LINEAR.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import cv2
import harness
import numpy as np
import torch
from harness import Bench, Case, Seconds
from PIL import Image

from dp4tl_dist.data.kernel import LANES, resize

PAIRS = ["285x285-160x160", "320x320-224x224", "400x300-192x192", "64x64-32x32", "32x32-64x64", "32x32-224x224"]


def sizes_of(text: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """((height, width), (rows, columns)) of HxW-RxC."""
    height, width, rows, columns = map(int, text.replace("-", "x").split("x"))
    return (height, width), (rows, columns)


def compare(bench: Bench, pair: str, arguments: argparse.Namespace) -> None:
    (height, width), (rows, columns) = sizes_of(pair)
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    memory = np.zeros(image.size + 3 * width + LANES, np.uint8)
    memory[: image.size] = image.reshape(-1)
    output = np.empty((rows, columns, 3), np.uint8)
    tensor, pillows = torch.from_numpy(image).permute(2, 0, 1)[None], Image.fromarray(image)
    interpolate = partial(torch.nn.functional.interpolate, mode="bilinear", antialias=True)
    peers: dict[str, Callable[[], object]] = {
        "dp4tl": lambda: resize(int(memory.ctypes.data), 3 * width, height, width, output, False),
        "torch": lambda: interpolate(tensor, (rows, columns)),
        "Pillow": lambda: pillows.resize((columns, rows), Image.Resampling.BILINEAR),
        "INTER_AREA": lambda: cv2.resize(image, (columns, rows), interpolation=cv2.INTER_AREA),
        "INTER_LINEAR": lambda: cv2.resize(image, (columns, rows), interpolation=cv2.INTER_LINEAR),
    }
    notes = {"INTER_AREA": "repeats pixels when it enlarges", "INTER_LINEAR": "no antialiasing"}

    def timed(run: Callable[[], object]) -> Seconds:
        start = time.process_time()
        for _ in range(arguments.images):
            run()
        return Seconds(time.process_time() - start)

    cases = [
        Case(name, partial(timed, run), arguments.images, notes.get(name, ""))
        for name, run in peers.items()
        if name not in arguments.without
    ]
    bench.compare(f"{pair}, one thread, CPU seconds", cases, unit="images")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", nargs="+", default=PAIRS, metavar="HxW-RxC", help=f"default: {' '.join(PAIRS)}")
    parser.add_argument("--images", type=int, default=500, help="how often each run resizes (default: 500)")
    arguments = harness.parse(parser, runs=9)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    bench = Bench("resize", arguments)
    for pair in arguments.pairs:
        compare(bench, pair, arguments)
    bench.finish()


if __name__ == "__main__":
    main()
