"""What is promised to be exact does not depend on threads, on the alignment of memory, or on how Python was entered."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn

from dp4tl_dist.exact import Parts, one_thread, rows_at_once
from dp4tl_dist.models import build_model, logits_and_features, normalise
from dp4tl_dist.prune.scores import full_grand

PRODUCT = "a = torch.ones(64, 64); a @ a"


def run(source: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    env = {key: value for key, value in os.environ.items() if key != "MKL_CBWR"} | environ
    done = subprocess.run([sys.executable, "-c", source], env=env, capture_output=True, text=True, timeout=200)
    assert not done.returncode, done.stderr
    return done


def products(source: str, **environ: str) -> str:
    """What MKL says of the matrix products of a fresh Python; empty where torch has no MKL."""
    done = run(source, MKL_VERBOSE="1", **environ)
    return "\n".join(line for line in done.stdout.splitlines() if "GEMM" in line)


@pytest.mark.parametrize(
    "imports", (("dp4tl_dist", "torch"), ("torch", "dp4tl_dist"), ("dp4tl_dist.__main__", "torch"))
)
def test_every_way_in_has_mkl_round_alike_for_any_threads(imports: Sequence[str]) -> None:
    told = products(f"import {', '.join(imports)}; {PRODUCT}")
    assert told.count("CNR:AUTO,STRICT") == len(told.splitlines())


def test_a_mode_of_the_users_own_stays() -> None:
    told = products(f"import dp4tl_dist, torch; {PRODUCT}", MKL_CBWR="COMPATIBLE")
    assert told.count("CNR:COMPATIBLE") == len(told.splitlines())


def test_mkl_at_work_before_is_told_once() -> None:
    """A program of the user's own that multiplies first; MKL cannot be told afterwards."""
    use = "import dp4tl_dist.exact as e; m = torch.nn.Linear(2, 2); [e.Parts(m, print, size=1) for _ in range(3)]"
    said = [run(f"import torch; {first} {use}").stderr for first in (f"{PRODUCT};", "")]
    assert said[0].count("MKL_CBWR is off") == bool(products(f"import torch; {PRODUCT}")) and not said[1]


def shifted(values: Tensor, places: int) -> Tensor:
    """The same numbers in the same layout, that many elements away from where an allocation starts."""
    room = torch.empty(places + values.numel(), dtype=values.dtype)[places:]
    return room.as_strided(values.shape, values.stride(), room.storage_offset()).copy_(values)


def passes(model: nn.Module, images: Tensor, labels: Tensor, *, size: int) -> list[Tensor]:
    def forward(own: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return logits_and_features(own, normalise(images))

    def gradients(own: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor]:
        return (full_grand(own, normalise(images), labels),)

    with Parts(model, forward, size=size) as run, Parts(model, gradients, size=7) as each:
        return [*run(images), *each(images, labels)]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("arch", ["resnet_tiny", "resnet18"])
def test_parts_depend_on_neither_threads_nor_addresses(arch: str, threads: Callable[[int], None]) -> None:
    torch.manual_seed(1)
    model = build_model(arch, 10).eval()
    images = torch.randint(0, 256, (19, 3, 40, 40), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(19) % 10
    found = []
    for count, places in ((1, 0), (2, 1), (3, 5)):
        threads(count)
        for value in (*model.parameters(), *model.buffers()):
            value.data = shifted(value.data, places)
        found.append(passes(model, shifted(images, places), labels, size=8))
        assert torch.get_num_threads() == count
    first, *others = found
    assert [len(values) for values in first] == [19] * 3
    for other in others:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(first, other, strict=True))
    with torch.no_grad():
        logits, features = logits_and_features(model, normalise(images))
    torch.testing.assert_close(first[:2], [logits, features], rtol=1e-3, atol=1e-3)


def test_a_part_that_fails_fails_the_batch(threads: Callable[[int], None]) -> None:
    def odd(model: nn.Module, values: Tensor) -> tuple[Tensor]:
        if 5 in values:
            raise ValueError("five")
        return (values,)

    threads(2)
    with Parts(nn.Identity(), odd, size=2) as run:
        assert torch.equal(run(torch.arange(5))[0], torch.arange(5))
        with pytest.raises(ValueError, match="five"):
            run(torch.arange(9))
    assert torch.get_num_threads() == 2


def test_one_thread_ends_with_its_block(threads: Callable[[int], None]) -> None:
    threads(3)
    with pytest.raises(KeyError), one_thread():
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == 3


def test_the_rows_of_a_part() -> None:
    assert [rows_at_once(side) for side in (1, 32, 64, 96, 224, 384, 2000)] == [64, 64, 64, 56, 10, 3, 1]
