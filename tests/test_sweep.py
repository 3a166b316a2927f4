"""A sweep: what it unfolds to, what it shares, how it continues, and the arithmetic of its tables."""

import csv
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_factory import make_beton
from PIL import Image
from test_advise import cast

from dp4tl_dist import pipeline
from dp4tl_dist.cli import main
from dp4tl_dist.data.beton import open_beton
from dp4tl_dist.data.subset import load_subset
from dp4tl_dist.errors import EXIT_BAD_INPUT, EXIT_STOPPED, Stopped, UserError
from dp4tl_dist.files import make_meta
from dp4tl_dist.prune.influence import Influence, save_influence
from dp4tl_dist.stages import Graph
from dp4tl_dist.sweep import read_run, read_sweep
from dp4tl_dist.sweep_surrogates import study_agreement
from dp4tl_dist.sweep_table import EVERYWHERE, peer, summarise

STAGE = """
min_scale = 0.5
model.arch = "resnet_tiny"
train = {{epochs = {epochs}, peak_epoch = 1, batch_size = 8, resolution = 32, val_resolution = 32, lr = 0.05}}
"""
CONFIG = """
methods = ["lm", "random"]
keeps = [0.5, "auto"]
budgets = ["epochs", "steps"]
[source]
train = "{root}/source"
[targets.one]
train = "{root}/one-train"
test = "{root}/one-test"
[surrogates.short]
{short}
[surrogates.long]
{long}
[pretrain]
{long}
[transfer]
cached = true
lp = {{epochs = 2, batch_size = 4, resolution = 32, val_resolution = 32}}
[engine]
device = "cpu"
[log]
tensorboard = false
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sweep")
    for name, num_classes, count in (("source", 4, 8), ("one-train", 2, 8), ("one-test", 2, 4)):
        for label in range(num_classes):
            folder = root / name / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                noise = np.random.default_rng([label, i, count]).integers(0, 60, (36, 36, 3))
                Image.fromarray((noise + 40 * label).astype(np.uint8)).save(folder / f"{i}.png")
    stages = {name: STAGE.format(epochs=epochs) for name, epochs in (("short", 1), ("long", 2))}
    (root / "sweep.toml").write_text(CONFIG.format(root=root, **stages))
    return root


def sweep(root: Path, out: Path, *more: str) -> int:
    return main(["sweep", "--config", str(root / "sweep.toml"), "--out", str(out), *more])


ARMS = [
    "dense",
    "lm@0.5+short", "lm@0.5+long", "random@0.5",
    "lm@0.5+short+steps", "lm@0.5+long+steps", "random@0.5+steps",
    "lm@auto+short", "lm@auto+long", "random@auto+short", "random@auto+long",
    "lm@auto+short+steps", "lm@auto+long+steps", "random@auto+short+steps", "random@auto+long+steps",
]  # fmt: skip


def test_arms_are_all_combinations_and_share_what_they_can(root: Path) -> None:
    config = read_sweep(str(root / "sweep.toml"), [])
    assert read_run(str(root / "sweep.toml"), []) == config
    (root / "resolved.json").write_text(config.model_dump_json())
    assert read_run(str(root / "resolved.json"), []) == config
    assert list(config.arms) == ARMS
    names = list(Graph(config, Path("out")).stages)
    count = {
        word: sum(name.split("-")[0] == word for name in names) for word in ("write", "surrogate", "vote", "prune")
    }
    assert count == {"write": 3, "surrogate": 2, "vote": 2, "prune": 7}, "steps are no choice of their own"
    assert sum(name.startswith("pretrain-dense") for name in names) == 1
    assert read_sweep(str(root / "sweep.toml"), ["dense=false", "keeps=[1.0, 0.25]"]).arms[:2] == (
        "lm@1+short", "lm@1+long",
    )  # fmt: skip


def test_only_what_asks_a_surrogate_is_done_with_each(root: Path) -> None:
    override = ['methods=["grand", "influence", "lm+random:0.5", "random-samples"]', "keeps=[0.5]", "dense=false"]
    arms = read_sweep(str(root / "sweep.toml"), [*override, "budgets=['epochs']"]).arms
    assert arms == ("grand@0.5+short", "grand@0.5+long", "influence@0.5", "lm+random:0.5@0.5+short",
                    "lm+random:0.5@0.5+long", "random-samples@0.5")  # fmt: skip


def test_a_run_without_surrogates_of_its_own(root: Path, tmp_path: Path) -> None:
    text = (root / "sweep.toml").read_text().replace("[surrogates.short]", "[surrogate]")
    (tmp_path / "s.toml").write_text(text.replace("[surrogates.long]", "[surrogates.big]"))
    arms = read_sweep(str(tmp_path / "s.toml"), ["budgets=['epochs']", "keeps=[0.5]"]).arms
    assert arms == ("dense", "lm@0.5", "lm@0.5+big", "random@0.5")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("arms=['dense']", "leave `arms` out"), ("keeps=[]", "keeps"), ("keeps=[0.5, 0.5]", "twice"),
        ("keeps=[1.5]", "keeps"), ("methods=['best']", "METHOD@KEEP"), ("budgets=['hours']", "budgets"),
        ("methods=['random']", "at auto"), ("sizes=[1]", "unknown key 'sizes'"),
    ],
)  # fmt: skip
def test_refused(root: Path, override: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        read_sweep(str(root / "sweep.toml"), [override])
    assert says in str(caught.value)


class InProcess:
    """Takes the place of `StageProcess`: the same command line, without the seconds that a process takes to start."""

    names: list[str]
    stop_at = ""

    def __init__(self, argv: tuple[str, ...], *, nproc: int, log: Path, label: str) -> None:
        self.argv, self.name = argv, log.stem

    def run(self) -> None:
        if self.name == InProcess.stop_at:
            raise Stopped("stopped")
        InProcess.names.append(self.name)
        assert main(list(self.argv)) == 0


def test_from_images_to_tables_and_again(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "StageProcess", InProcess)
    monkeypatch.setattr(InProcess, "names", [], raising=False)
    small = ("--set", 'keeps=["auto"]', "--set", 'budgets=["epochs"]', "--set", "seeds=[0, 1]")
    out = tmp_path / "out"
    assert sweep(root, out, "--tables", *small) == EXIT_BAD_INPUT  # nothing is there yet
    with monkeypatch.context() as patch:
        patch.setattr(InProcess, "stop_at", "transfer-lp-dense-one-s1")
        assert sweep(root, out, *small) == EXIT_STOPPED
    before = InProcess.names.copy()
    assert sweep(root, out, "--tables", *small) == 0  # of what is there
    assert len((out / "sweep.jsonl").read_text().splitlines()) == 5
    assert sweep(root, out, *small) == 0
    assert len(set(InProcess.names)) == len(InProcess.names) > len(before), "each stage ran once"
    rows = [json.loads(line) for line in (out / "sweep.jsonl").read_text().splitlines()]
    table = list(csv.DictReader((out / "sweep.csv").open()))
    assert len(rows) == len(table) == 5 * 2 and list(table[0]) == list(rows[0])
    by_arm = {(row["arm"], row["seed"]): row for row in rows}
    for seed in (0, 1):
        for name in ("short", "long"):
            lm, random = by_arm[f"lm@auto+{name}", seed], by_arm[f"random@auto+{name}", seed]
            subset = load_subset(out / "subsets" / f"lm@auto+{name}-one.npz", beton=None)
            assert lm["classes"] == random["classes"] == len(subset.groups) and lm["samples"] == len(subset.indices)
            result = json.loads((out / "transfer" / f"lp-lm@auto+{name}-one-s{seed}.json").read_text())
            assert lm["top1"] == result["top1"] and lm["total_s"] == lm["pretrain_s"] + lm["selection_s"]
    found = json.loads((out / "sweep.json").read_text())
    assert [row["arm"] for row in found["summary"]] == [arm for arm in ARMS if arm == "dense" or "auto" in arm][:5]
    assert all(row["n"] == 2 for row in found["summary"])
    surrogates = {row["surrogate"]: row for row in found["surrogates"]}
    assert surrogates["long"]["overlap"] == 1 and surrogates["long"]["reference"] == "long"
    mine, theirs = (set(load_subset(out / "subsets" / f"lm@auto+{name}-one.npz", beton=None).groups.tolist())
                    for name in ("short", "long"))  # fmt: skip
    assert surrogates["short"]["overlap"] == len(mine & theirs) / max(len(mine), len(theirs))
    assert surrogates["short"]["epochs"] == 1 and surrogates["long"]["epochs"] == 2
    assert surrogates["short"]["seconds"] > 0
    text = (out / "sweep.txt").read_text()
    assert "lm@auto+short" in text and "overlap" in text
    page = (out / "report.html").read_text()
    assert 'data-name="sweep"' in page and 'data-name="sweep-surrogates"' in page


# ---------------------------------------------------------------- arithmetic


def row(arm: str, target: str, seed: int, top1: float, **more: Any) -> dict[str, Any]:
    method, _, keep = arm.partition("@")
    plain = {
        "arm": arm, "method": method, "keep": keep.split("+")[0] or "1", "surrogate": "",
        "budget": "steps" if arm.endswith("+steps") else "epochs", "target": target, "seed": seed, "mode": "lp",
        "top1": top1, "classes": 5, "samples": 50, "pretrain_s": 10.0, "selection_s": 2.0, "total_s": 12.0,
    }  # fmt: skip
    return {**plain, **more}


def test_means_and_pairs() -> None:
    rng = np.random.default_rng(0)
    top1 = {(arm, target, seed): float(rng.random()) for arm in ("dense", "lm@0.5", "random@0.5")
            for target in ("a", "b") for seed in (0, 1, 2)}  # fmt: skip
    del top1["random@0.5", "b", 2]  # not done yet
    rows = [row(*key, value, total_s=24.0 if key[0] == "dense" else 12.0) for key, value in top1.items()]
    found = {(item["arm"], item["target"]): item for item in summarise(rows)}
    lm = found["lm@0.5", "a"]
    values = [100 * top1["lm@0.5", "a", seed] for seed in range(3)]
    apart = [100 * (top1["lm@0.5", "a", seed] - top1["random@0.5", "a", seed]) for seed in range(3)]
    assert (lm["n"], lm["pairs"], lm["speed_up"]) == (3, 3, 2.0)
    assert lm["mean"] == pytest.approx(statistics.fmean(values)) and lm["std"] == pytest.approx(
        statistics.stdev(values)
    )
    assert lm["to_random"] == pytest.approx(statistics.fmean(apart))
    assert lm["to_random_se"] == pytest.approx(statistics.stdev(apart) / 3**0.5)
    assert found["lm@0.5", "b"]["n"] == 3 and found["lm@0.5", "b"]["pairs"] == 2
    # Over the targets: a seed counts where all of its targets are there.
    whole = found["lm@0.5", EVERYWHERE]
    each = [statistics.fmean(100 * top1["lm@0.5", target, seed] for target in "ab") for seed in range(3)]
    both = [
        statistics.fmean(100 * (top1["lm@0.5", target, seed] - top1["random@0.5", target, seed]) for target in "ab")
        for seed in range(2)
    ]
    assert whole["n"] == 3 and whole["std"] == pytest.approx(statistics.stdev(each))
    assert whole["pairs"] == 2 and whole["to_random"] == pytest.approx(statistics.fmean(both))
    assert whole["to_random_std"] == pytest.approx(statistics.stdev(both))
    assert found["dense", "a"]["to_random"] is None and found["random@0.5", "a"]["pairs"] == 0
    assert found["dense", "a"]["speed_up"] == 1


def test_who_is_held_against_whom() -> None:
    mine = row("lm@auto", "a", 0, 0.5)
    assert peer(mine, [row("random@auto", "a", 0, 0.4, classes=6)]) is None, "another size"
    assert peer(mine, [row("random@auto", "b", 0, 0.4), row("random@0.5", "a", 1, 0.4)]) is None
    assert peer(mine, [row("random@0.5+steps", "a", 0, 0.4)]) is None, "another budget"
    same = row("random@0.5", "a", 0, 0.4)
    assert peer(mine, [row("random-samples@0.5", "a", 0, 0.3, classes=None), same]) is same
    chosen = row("el2n@0.5", "a", 0, 0.5, classes=None, samples=48)
    samples = row("random-samples@0.5", "a", 0, 0.3, classes=None, samples=48)
    assert peer(chosen, [same, samples]) is samples
    assert peer(chosen, [same]) is same, "of the same share, where no samples were drawn"


def test_bad_config_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.toml").write_text("keeps = 3\n")
    assert main(["sweep", "--config", str(tmp_path / "x.toml"), "--out", str(tmp_path / "out")]) == EXIT_BAD_INPUT
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_agreement_with_brute_force(root: Path, tmp_path: Path) -> None:
    source = open_beton(make_beton(tmp_path / "source.beton", num_classes=6, per_class=2))
    graph = Graph(read_sweep(str(root / "sweep.toml"), []), tmp_path / "out")
    assert study_agreement(graph) == []
    meta = make_meta("influence", inputs={"source": source.fingerprint})
    value = np.array([0.5, 0.4, 0.3, 0.2, 0.1, 0.0])
    (tmp_path / "out" / "influence").mkdir(parents=True)
    found = Influence(value, np.full(6, 0.1), np.ones((4, 6), bool), np.zeros(4), meta)
    save_influence(tmp_path / "out" / "influence" / "influence-one.npz", found)
    (tmp_path / "out" / "votes").mkdir()
    cast(tmp_path / "out" / "votes" / "vote-lm+short-one.npz", source, [6, 5, 4, 3, 2, 1])
    cast(tmp_path / "out" / "votes" / "vote-lm+long-one.npz", source, [0, 1, 2, 3, 4, 9])
    rows = {row["votes"]: row for row in study_agreement(graph)}
    assert rows["vote-lm+short-one"]["spearman"] == 1 and rows["vote-lm+long-one"]["spearman"] == -1
    assert {item["k"]: item["overlap"] for item in rows["vote-lm+long-one"]["top"]} == {1: 0.0, 3: 0.0}
    assert {item["overlap"] for item in rows["vote-lm+short-one"]["top"]} == {1.0}
