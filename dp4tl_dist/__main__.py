"""`python -m dp4tl_dist VERB ...`: the same as the command `dp4tl`, and what torchrun starts on each rank."""

from dp4tl_dist.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
