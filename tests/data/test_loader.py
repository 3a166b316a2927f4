"""Pixels are a function of the sample and the view alone; errors arrive; nothing is left behind."""

import gc
import io
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from dp4tl_dist.data import augment, decode
from dp4tl_dist.data.beton import RAW, Beton, BetonWriter, open_beton
from dp4tl_dist.data.crops import BadSampleError
from dp4tl_dist.data.loader import BetonLoader, CentreView, TrainView
from dp4tl_dist.errors import UserError

NUM_SAMPLES = 60
VIEWS = [TrainView(32, seed=5, epoch=2), TrainView(16, seed=5, epoch=0, min_scale=0.5), CentreView(24)]


def picture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Smooth colours with a little noise, uint8 (height, width, 3)."""
    waves = rng.uniform(1, 4, (2, 3))
    y, x = np.linspace(0, 1, height)[:, None, None], np.linspace(0, 1, width)[None, :, None]
    return np.clip(127 + 100 * np.sin(waves[0] * y + waves[1] * x * 3) + rng.normal(0, 4, (height, width, 3)), 0, 255
                   ).astype(np.uint8)  # fmt: skip


def jpeg(image: np.ndarray) -> bytes:
    target = io.BytesIO()
    Image.fromarray(image).save(target, "JPEG", quality=90)
    return target.getvalue()


def write(path: Path, payloads: list[tuple[bytes, int, int, int]]) -> Beton:
    """A beton of (payload, height, width, mode), labels 0..4 in turn, identifiers 1000, 1007, 1014, ..."""
    with BetonWriter(path, capacity=len(payloads)) as writer:
        for i, (payload, height, width, mode) in enumerate(payloads):
            writer.add(payload, height=height, width=width, label=i % 5, identifier=1000 + 7 * i, mode=mode)
        writer.finish([str(i) for i in range(5)], {})
    return open_beton(path)


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Beton:
    """JPEG images and every fourth one raw, of 100 to 450 pixels a side; on several pages."""
    rng = np.random.default_rng(0)
    payloads = []
    for i in range(NUM_SAMPLES):
        height, width = rng.integers(100, 451, 2).tolist()
        image = picture(rng, height, width)
        payloads.append((image.tobytes(), height, width, RAW) if i % 4 == 0 else (jpeg(image), height, width, 0))
    opened = write(tmp_path_factory.mktemp("beton") / "mixed.beton", payloads)
    assert len(np.unique(opened.pages)) > 1
    return opened


def pixels(loader: BetonLoader, batches: list[np.ndarray], view: TrainView | CentreView) -> np.ndarray:
    """Images by position, uint8 (samples, resolution, resolution, 3); rows that did not come stay zero."""
    images = np.zeros((loader.beton.num_samples, view.resolution, view.resolution, 3), np.uint8)
    for positions, batch in zip(batches, loader.epoch(batches, view), strict=True):
        images[positions] = batch.images.permute(0, 2, 3, 1).numpy()
    return images


def cut(order: np.ndarray, size: int) -> list[np.ndarray]:
    return [order[i : i + size] for i in range(0, len(order), size)]


def epoch_threads() -> list[threading.Thread]:
    """All threads but the decoding ones, which live as long as their loader and come when they are first needed."""
    return [thread for thread in threading.enumerate() if not thread.name.startswith("decode")]


@pytest.fixture(scope="module")
def reference(beton: Beton) -> list[np.ndarray]:
    loader = BetonLoader(beton)
    return [pixels(loader, cut(np.arange(NUM_SAMPLES), 16), view) for view in VIEWS]


@pytest.mark.parametrize("os_cache", [True, False], ids=["mapped", "pages"])
@pytest.mark.parametrize(("num_workers", "size"), [(1, 60), (4, 7), (4, 60), (3, 1)])
def test_pixels_depend_on_the_sample_and_the_view_alone(
    beton: Beton, reference: list[np.ndarray], os_cache: bool, num_workers: int, size: int
) -> None:
    loader = BetonLoader(beton, num_workers=num_workers, os_cache=os_cache)
    order = np.random.default_rng(size).permutation(NUM_SAMPLES)
    for view, expected in zip(VIEWS, reference, strict=True):
        np.testing.assert_array_equal(pixels(loader, cut(order, size), view), expected)


def test_leaving_and_resuming_gives_the_same_pixels(beton: Beton, reference: list[np.ndarray]) -> None:
    loader, batches = BetonLoader(beton, os_cache=False), cut(np.arange(NUM_SAMPLES)[::-1], 8)
    iterator = loader.epoch(batches, VIEWS[0])
    images = np.zeros_like(reference[0])
    for positions in batches[:3]:
        images[positions] = next(iterator).images.permute(0, 2, 3, 1).numpy()
    iterator.close()
    rest = pixels(loader, batches[3:], VIEWS[0])
    np.testing.assert_array_equal(images + rest, reference[0])


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_batches_on_a_device_come_in_inference_mode(
    beton: Beton, reference: list[np.ndarray], mode: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the stages of a GPU, though the device is the CPU: the ring's buffers are tensors then."""
    real = decode.PipelineSpec

    def with_move(name: str, first: object, rest: list[object]) -> object:
        return real(name, first, [rest[0], decode.ToDevice(torch.device("cpu"), non_blocking=True), *rest[1:]])

    monkeypatch.setattr(decode, "PipelineSpec", with_move)
    with mode():
        found = pixels(BetonLoader(beton), cut(np.arange(NUM_SAMPLES), 8), VIEWS[0])
    np.testing.assert_array_equal(found, reference[0])


def test_epochs_may_run_side_by_side(beton: Beton, reference: list[np.ndarray]) -> None:
    loader, batches = BetonLoader(beton, num_workers=2), cut(np.arange(NUM_SAMPLES), 20)
    pairs = zip(batches, loader.epoch(batches, VIEWS[0]), loader.epoch(batches, VIEWS[2]), strict=True)
    for positions, train, centre in pairs:
        np.testing.assert_array_equal(train.images.permute(0, 2, 3, 1), reference[0][positions])
        np.testing.assert_array_equal(centre.images.permute(0, 2, 3, 1), reference[2][positions])


def test_a_batch_holds_what_the_beton_says(beton: Beton) -> None:
    batches = [np.array([3, 50, 7]), np.array([1]), np.arange(10, 30)]
    for positions, batch in zip(batches, BetonLoader(beton).epoch(batches, CentreView(32)), strict=True):
        assert batch.images.shape == (len(positions), 3, 32, 32) and batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.labels.dtype == batch.identifiers.dtype == torch.int64
        assert batch.labels.tolist() == (positions % 5).tolist()
        assert batch.identifiers.tolist() == (1000 + 7 * positions).tolist()
    assert list(BetonLoader(beton).epoch([], CentreView(32))) == []


def test_whole_images_equal_stock_ffcv(tmp_path: Path) -> None:
    """At their own size nothing is resized: the pixels are those of the decoder alone."""
    from ffcv.fields.rgb_image import CenterCropRGBImageDecoder
    from ffcv.loader import Loader
    from ffcv.pipeline.compiler import Compiler
    from ffcv.transforms import ToTensor

    rng, num_threads = np.random.default_rng(4), torch.get_num_threads()
    images = [picture(rng, 72, 72) for _ in range(12)]
    opened = write(
        tmp_path / "squares.beton",
        [(image.tobytes(), 72, 72, RAW) if i % 3 == 0 else (jpeg(image), 72, 72, 0) for i, image in enumerate(images)],
    )
    Compiler.set_enabled(False)
    try:
        pipelines = {"image": [CenterCropRGBImageDecoder((72, 72), 1.0), ToTensor()], "label": None, "identifier": None}
        (expected,) = next(iter(Loader(str(opened.path), 12, num_workers=1, pipelines=pipelines)))
    finally:
        Compiler.set_enabled(True)
        torch.set_num_threads(num_threads)
    np.testing.assert_array_equal(pixels(BetonLoader(opened), [np.arange(12)], CentreView(72, ratio=1.0)), expected)


def whole(beton: Beton, position: int) -> np.ndarray:
    """The decoded image, uint8 (height, width, 3)."""
    height, width, payload = int(beton.heights[position]), int(beton.widths[position]), beton.payload(position)
    output = np.empty((1, height, width, 3), np.uint8)
    with ThreadPoolExecutor(1) as pool:
        status = decode.decode_batch(
            np.frombuffer(payload, np.uint8), np.array([0]), np.array([len(payload)]), beton.modes[[position]],
            np.array([height]), np.array([width]), np.array([[0, 0, height, width]], np.int32), np.array([False]),
            output, pool=pool, num_workers=1,
        )  # fmt: skip
    assert not status.any()
    return output[0]


def torchvisions(box: np.ndarray, resolution: int) -> np.ndarray:
    tensor = torch.from_numpy(np.ascontiguousarray(box)).permute(2, 0, 1)
    return functional.resize(tensor, [resolution, resolution], antialias=True).permute(1, 2, 0).numpy().astype(int)


@pytest.mark.parametrize("resolution", [200, 400], ids=["shrinking", "enlarging"])
def test_the_centre_view_is_torchvisions(beton: Beton, resolution: int) -> None:
    """Within one grey level, from the decoder's pixels: no image is so large that it is decoded at a fraction."""
    shown = pixels(BetonLoader(beton), [np.arange(NUM_SAMPLES)], CentreView(resolution))
    for i in range(NUM_SAMPLES):
        image = whole(beton, i)
        if beton.modes[i] == RAW:
            assert image.tobytes() == beton.payload(i)
        else:  # another decoder, with another approximation of the cosine transform
            pillows = np.asarray(Image.open(io.BytesIO(beton.payload(i)))).astype(int)
            assert np.abs(image - pillows).max() <= 8 and np.abs(image - pillows).mean() < 1.5
        ((top, left, side, _),) = augment.centre_boxes(beton.heights[[i]], beton.widths[[i]], ratio=224 / 256)
        expected = torchvisions(image[top : top + side, left : left + side], resolution)
        assert np.abs(shown[i] - expected).max() <= 1


@pytest.mark.parametrize("mode", [0, RAW], ids=["jpeg", "raw"])
@pytest.mark.parametrize("scale", [2, 3, 4, 8, 16])
def test_large_crops_are_averaged(tmp_path: Path, mode: int, scale: int) -> None:
    """JPEG is decoded at 1/2, 1/4 and 1/8 for scales 4, 8 and 16, where twice the output's size is left to resize."""
    image = picture(np.random.default_rng(scale), 16 * scale, 48 * scale)
    payload = image.tobytes() if mode == RAW else jpeg(image)
    opened = write(tmp_path / "one.beton", [(payload, *image.shape[:2], mode)])
    shown = pixels(BetonLoader(opened), [np.array([0])], CentreView(16, ratio=1.0))[0].astype(float)
    square = whole(opened, 0)[:, 16 * scale : 32 * scale]
    assert np.abs(shown - torchvisions(square, 16)).max() <= (1 if mode == RAW or scale < 4 else 6)


def test_flips_mirror_the_crop(beton: Beton) -> None:
    loader, batches = BetonLoader(beton), [np.arange(NUM_SAMPLES)]
    plain = pixels(loader, batches, TrainView(32, seed=1, epoch=1, flip=False))
    flipped = pixels(loader, batches, TrainView(32, seed=1, epoch=1))
    mirror = augment.train_flips(beton.identifiers, seed=1, epoch=1)
    assert 0 < mirror.sum() < NUM_SAMPLES
    np.testing.assert_array_equal(flipped, np.where(mirror[:, None, None, None], plain[:, :, ::-1], plain))


# ---------------------------------------------------------------- errors


def damaged_payload(kind: str) -> bytes:
    good = jpeg(picture(np.random.default_rng(1), 48, 64))
    return {
        "truncated": good[: len(good) // 2],
        "not a JPEG": b"\x00" * 500,
        "another size": jpeg(picture(np.random.default_rng(1), 40, 64)),
        "a header alone": good[:30],
        "fill bytes": b"\xff" * 500,
    }[kind]


@pytest.mark.parametrize("os_cache", [True, False], ids=["mapped", "pages"])
@pytest.mark.parametrize("kind", ["truncated", "not a JPEG", "another size", "a header alone", "fill bytes"])
def test_a_damaged_sample_ends_the_epoch_and_is_named(tmp_path: Path, kind: str, os_cache: bool) -> None:
    good = jpeg(picture(np.random.default_rng(1), 48, 64))
    opened = write(tmp_path / "bad.beton", [(damaged_payload(kind) if i == 9 else good, 48, 64, 0) for i in range(12)])
    loader, batches, threads = BetonLoader(opened, os_cache=os_cache), cut(np.arange(12), 4), epoch_threads()
    iterator = loader.epoch(batches, CentreView(16))
    next(iterator), next(iterator)
    with pytest.raises(BadSampleError, match=rf"{opened.path}: the sample at position 9 \(identifier 1063\)"):
        next(iterator)
    assert epoch_threads() == threads


def test_an_error_in_the_thread_reaches_the_caller(beton: Beton) -> None:
    class Broken(CentreView):
        def draw(self, beton: Beton, batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            if 30 in batch:
                raise ZeroDivisionError("at thirty")
            return super().draw(beton, batch)

    came = 0
    with pytest.raises(ZeroDivisionError, match="at thirty"):
        for _ in BetonLoader(beton).epoch(cut(np.arange(NUM_SAMPLES), 10), Broken(16)):
            came += 1
    assert came == 3


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_file_that_vanishes_ends_the_epoch(tmp_path: Path) -> None:
    good = jpeg(picture(np.random.default_rng(1), 48, 64))
    loader = BetonLoader(write(tmp_path / "gone.beton", [(good, 48, 64, 0)] * 4), os_cache=False)
    loader.beton.path.unlink()
    before = epoch_threads()
    with pytest.raises(RuntimeError, match=r"gone\.beton has died"):
        next(loader.epoch([np.arange(4)], CentreView(16)))
    assert epoch_threads() == before


@pytest.mark.parametrize("positions", [[0, NUM_SAMPLES], [-1, 3], [2, 2], [0.5, 1.0]])
def test_positions_are_checked_before_anything_is_read(beton: Beton, positions: list[float]) -> None:
    with pytest.raises(UserError, match=r"mixed\.beton"):
        BetonLoader(beton).epoch([np.arange(4, 8), np.array(positions)], CentreView(16))


# ---------------------------------------------------------------- what is left behind


@pytest.mark.parametrize("os_cache", [True, False], ids=["mapped", "pages"])
def test_leaving_early_leaks_nothing(beton: Beton, os_cache: bool) -> None:
    loader, batches = BetonLoader(beton, num_workers=2, os_cache=os_cache), cut(np.arange(NUM_SAMPLES), 4)

    def leave_early() -> tuple[int, int]:
        for _ in loader.epoch(batches, VIEWS[0]):
            break
        return len(epoch_threads()), len(list(Path("/proc/self/fd").iterdir()))

    threads, files = leave_early()  # at most: what an earlier test left may end meanwhile
    assert all(now[0] <= threads and now[1] <= files for now in (leave_early() for _ in range(20)))
    assert list(loader.epoch(batches, VIEWS[0]))  # and it still works


def test_a_dropped_loader_ends_its_decoding_threads(beton: Beton) -> None:
    before = set(threading.enumerate())
    loader = BetonLoader(beton, num_workers=3)
    next(loader.epoch(cut(np.arange(NUM_SAMPLES), 30), VIEWS[0]))
    threads = set(threading.enumerate()) - before
    assert 1 <= len(threads) <= 3
    del loader
    gc.collect()  # FFCV's generated stages refer to themselves
    for thread in threads:
        thread.join(timeout=5)
        assert not thread.is_alive()


def test_other_users_of_torch_and_ffcv_are_undisturbed(beton: Beton) -> None:
    before = torch.get_num_threads(), decode.Compiler.is_enabled
    for _ in BetonLoader(beton, num_workers=7).epoch([np.arange(20)], CentreView(16)):
        assert (torch.get_num_threads(), decode.Compiler.is_enabled) == before
    assert (torch.get_num_threads(), decode.Compiler.is_enabled) == before


def test_the_compiled_kernel_is_kept_for_the_next_process(beton: Beton) -> None:
    list(BetonLoader(beton).epoch([np.arange(4)], CentreView(16)))  # fills the cache
    program = f"""if True:
        import torch
        before = torch.get_num_threads()
        from pathlib import Path
        import numpy as np
        from dp4tl_dist.data import decode
        from dp4tl_dist.data.beton import open_beton
        from dp4tl_dist.data.loader import BetonLoader, CentreView
        assert torch.get_num_threads() == before
        list(BetonLoader(open_beton(Path({str(beton.path)!r}))).epoch([np.arange(4)], CentreView(16)))
        stats = decode.decode_range.stats
        print(sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "0"], done.stderr
