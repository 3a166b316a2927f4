"""python loader_shards.py FOLDER OUT: the images FOLDER/<class>/*.jpg as MosaicML streaming's shards."""

import sys
from pathlib import Path

from PIL import Image
from streaming import MDSWriter


def main() -> None:
    folder, out = Path(sys.argv[1]), sys.argv[2]
    with MDSWriter(columns={"image": "jpeg", "label": "int"}, out=out) as writer:
        for label, path in enumerate(sorted(folder.iterdir())):
            for file in sorted(path.glob("*.jpg")):
                with Image.open(file) as image:
                    writer.write({"image": image, "label": label})


if __name__ == "__main__":
    main()
