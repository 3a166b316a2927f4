"""`dp4tl write`: from whatever the images come from to one beton."""

import argparse

from dp4tl_dist.data.rows import check_beton_output
from dp4tl_dist.data.write import Progress, WriteOptions, WriteReport, read_folder, write_images, write_samples


def write_origin(args: argparse.Namespace, progress: Progress) -> WriteReport:
    """Write what --images, --torchvision or --synthetic name to --out."""
    options = WriteOptions(
        args.max_side, args.quality, args.seed, args.workers, args.skip_bad, args.force, args.reencode
    )
    # What is called like a beton is no image.
    inputs = [] if args.out.suffix == ".beton" else [args.images]
    check_beton_output(args.out, force=args.force, inputs=inputs)
    root = None
    if args.images is not None:
        found = read_folder(args.images)
        return write_images(
            found, args.out, options=options, origin=str(args.images), root=args.images, progress=progress
        )
    if args.torchvision is not None:
        from dp4tl_dist.data.sources import open_source

        root = args.root
        samples, classes = open_source(args.torchvision, args.split, root, download=args.download)
        origin = f"torchvision {args.torchvision} {args.split} in {args.root}"
    else:
        from dp4tl_dist.data.synthetic import dataset

        kind, _, split = args.synthetic.partition("/")
        samples, classes = dataset(kind, split, seed=args.seed)
        origin = f"synthetic {args.synthetic}"
    return write_samples(samples, classes, args.out, options=options, origin=origin, root=root, progress=progress)
