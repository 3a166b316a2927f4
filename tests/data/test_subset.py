import numpy as np
import pytest

from dp4tl_dist.data.beton import BetonWriter, open_beton
from dp4tl_dist.data.subset import Subset, load_subset, samples_of_groups, save_subset
from dp4tl_dist.errors import UserError
from dp4tl_dist.files import make_meta, save_npz


@pytest.fixture
def beton(tmp_path):
    path = tmp_path / "source.beton"
    with BetonWriter(path, capacity=6) as writer:
        for i in range(6):
            writer.add(bytes([i] * 12), height=2, width=2, label=i % 3, identifier=i, mode=1)
        writer.finish(["a", "b", "c"], {})
    return open_beton(path)


def subset_of(fingerprint, indices=(0, 2, 3), groups=(0, 2), **change):
    parts = {
        "indices": np.array(indices, np.int64),
        "groups": np.array(groups, np.int64),
        "ratio": 1 / 3,
        "method": "lm",
        "meta": make_meta("subset", seed=1, inputs={"source": fingerprint}),
    }
    return Subset(**parts | change)


def test_round_trip_and_same_bytes(tmp_path, beton):
    first, second = tmp_path / "a.npz", tmp_path / "b.npz"
    subset = subset_of(beton.fingerprint)
    save_subset(first, subset)
    save_subset(second, subset)
    assert first.read_bytes() == second.read_bytes()
    for given in (beton, None):
        loaded = load_subset(first, beton=given)
        assert np.array_equal(loaded.indices, subset.indices) and np.array_equal(loaded.groups, subset.groups)
        assert (loaded.ratio, loaded.method, loaded.meta) == (subset.ratio, subset.method, subset.meta)


def test_subset_of_another_beton_is_refused_naming_both(tmp_path, beton):
    path = tmp_path / "x.npz"
    save_subset(path, subset_of("0" * 32))
    with pytest.raises(UserError) as caught:
        load_subset(path, beton=beton)
    assert str(path) in str(caught.value) and str(beton.path) in str(caught.value)
    save_subset(path, subset_of("", meta={"kind": "subset", "inputs": ["source"]}))
    with pytest.raises(UserError, match="another source"):
        load_subset(path, beton=beton)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"indices": (0, 6)}, "do not fit 6"),
        ({"indices": (-1, 2)}, "from -1"),
        ({"indices": ()}, "empty"),
        ({"indices": (3, 2)}, "unsorted"),
        ({"indices": (2, 2)}, "repeated"),
        ({"groups": (1, 1)}, "repeats"),
        ({"ratio": float("nan")}, "ratio nan"),
        ({"ratio": 1.5}, "ratio 1.5"),
        ({"ratio": "half"}, "ratio 'half'"),
        ({"method": 3}, "method 3"),
    ],
)
def test_wrong_content_is_refused(tmp_path, beton, change, words):
    path = tmp_path / "x.npz"
    save_subset(path, subset_of(beton.fingerprint, **change))
    with pytest.raises(UserError, match=words) as caught:
        load_subset(path, beton=beton)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_foreign_files_are_refused(tmp_path, beton):
    path = tmp_path / "x.npz"
    for content in (b"", b"PK\x03\x04 no", b"{}"):
        path.write_bytes(content)
        with pytest.raises(UserError):
            load_subset(path, beton=beton)
    save_npz(path, {"indices": np.arange(3), "groups": np.arange(1)}, make_meta("votes"))
    with pytest.raises(UserError, match="'votes' file"):
        load_subset(path, beton=beton)
    save_npz(path, {"indices": np.arange(3.0), "groups": np.arange(1)}, make_meta("subset"))
    with pytest.raises(UserError, match="'indices' is float64"):
        load_subset(path, beton=beton)
    with pytest.raises(UserError, match="is not there"):
        load_subset(tmp_path / "none.npz", beton=beton)


def test_samples_of_groups():
    groups = np.array([2, 0, 1, 2, 5])
    assert samples_of_groups(groups, np.array([2, 5])).tolist() == [0, 3, 4]
    assert samples_of_groups(groups, np.array([9])).tolist() == []
