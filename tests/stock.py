"""Stock FFCV, as anybody uses it."""

from pathlib import Path
from typing import Any


def stock_loader(path: Path, os_cache: bool, fields: list[str]) -> list[list[Any]]:
    """Batches of stock FFCV's own loader. Its compiler is off: compiling takes seconds, and reads the same bytes."""
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline.compiler import Compiler
    from ffcv.transforms import ToTensor

    enabled = Compiler.is_enabled
    Compiler.set_enabled(False)
    try:
        pipelines = {name: [IntDecoder(), ToTensor()] for name in fields}
        pipelines[fields[0]] = [SimpleRGBImageDecoder(), ToTensor()]
        loader = Loader(
            str(path), batch_size=4, num_workers=1, os_cache=os_cache, order=OrderOption.SEQUENTIAL,
            drop_last=False, pipelines=pipelines,
        )  # fmt: skip
        return [[part.numpy().copy() for part in batch] for batch in loader]
    finally:
        Compiler.set_enabled(enabled)
