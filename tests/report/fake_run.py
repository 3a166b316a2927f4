"""A run folder with everything that a run leaves behind, made in a second: real files, invented numbers."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dp4tl_dist.cli import main
from dp4tl_dist.data.beton import JPEG, RAW, BetonWriter, open_beton
from dp4tl_dist.files import make_meta, write_json
from dp4tl_dist.prune.influence import Influence, save_influence
from dp4tl_dist.prune.votes_file import Votes, save_votes
from dp4tl_dist.records import output_digest
from dp4tl_dist.run_config import RunConfig
from dp4tl_dist.stages import Graph, Stage

ARMS = ("dense", "lm@0.5", "random@0.5", "lm@0.25", "random@0.25", "lm-reverse@0.25")
TOP1 = {"dense": 0.80, "lm": 0.79, "fm": 0.77, "random": 0.60, "influence": 0.70, "lm-reverse": 0.40}
HOSTILE = (
    "<script>document.title = 'owned'</script>",
    '"><img src=x onerror="document.title=\'owned\'">',
    "</title></svg></style><b>bold</b>",
    '=HYPERLINK("javascript:alert(1)")',
    'a, "quoted"\nname',
    "{{ 7 * 7 }} {% raw %} $\\frac{1}{2}$ &amp; #0072b2",
    "שלום \N{RIGHT-TO-LEFT OVERRIDE} עולם",
    "\N{FOX FACE} fuchs \udcff " + "long" * 60,
)


def make_run(
    out: Path,
    *,
    classes: tuple[str, ...] = HOSTILE,
    stop_at: str = "",
    modes: tuple[str, ...] = ("lp",),
    arms: tuple[str, ...] = ARMS,
    targets: tuple[str, ...] = ("pets",),
    robust: bool = False,
    results: dict[str, Any] | None = None,
) -> Graph:
    """Two seeds of every arm on every target; `stop_at` names the stage that is still going on. results: what each
    transfer says beside its accuracy.
    """
    paths = {"train": "synthetic:target/train", "test": "synthetic:target/test"}
    config = RunConfig.model_validate({
        "source": {"train": "synthetic:source/train"}, "arms": arms, "seeds": (0, 1),
        "transfer": {"modes": modes, "robust": robust}, "targets": dict.fromkeys(targets, paths),
    })  # fmt: skip
    graph = Graph(config, out)
    write_json(out / "config.json", config.model_dump(mode="json"))
    for folder in ("data", "votes", "subsets", "transfer", "stages", "logs"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    makers = {"write": _write, "train": _train, "vote": _vote, "prune": _prune, "transfer": _transfer,
              "influence": _influence}  # fmt: skip
    for number, stage in enumerate(graph.stages.values()):
        going_on = stage.name == stop_at
        makers[stage.argv[0]](graph, stage, classes, going_on)
        if stage.argv[0] == "transfer" and results and not going_on:
            write_json(stage.output, {**json.loads(stage.output.read_text()), **results})
        record = {"name": stage.name, "argv": list(stage.argv), "seconds": 0.0 if going_on else 10.0 + number,
                  "status": "running" if going_on else "done", "nproc": 2, "output": output_digest(stage)}  # fmt: skip
        write_json(out / "stages" / f"{stage.name}.json", record)
        (out / "logs" / f"{stage.name}.log").write_text(f"$ python\nwarning: of {stage.name}\n")
        if going_on:
            break
    return graph


def _write(graph: Graph, stage: Stage, classes: tuple[str, ...], going_on: bool) -> None:
    names = classes if "source" in stage.name else classes[:3]
    rng = np.random.default_rng(len(stage.name))
    with BetonWriter(stage.output, capacity=6 * len(names)) as writer:
        for i in range(6 * len(names)):
            # Small JPEGs, large JPEGs and raw pixels: each goes its own way to the page.
            side, raw = (300 if i % 3 == 1 else 32), i % 3 == 2
            pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "JPEG")
            payload = pixels.tobytes() if raw else file.getvalue()
            writer.add(payload, height=side, width=side, label=i % len(names), identifier=i, mode=RAW if raw else JPEG)
        skipped = {"skipped": [["<b>bad</b>.jpg", "not an image"]]} if "source" in stage.name else {}
        writer.finish(list(names), make_meta("dataset") | skipped)


def _metrics(folder: Path, *, epochs: int, torn: bool) -> None:
    folder.mkdir(parents=True)
    lines: list[dict[str, Any]] = []
    for step in range(1, 10 * epochs + 1):
        loss, epoch = 3 / step, (step - 1) // 10
        rates = {"lr": 0.1 / step, "resolution": 32 + epoch, "images_per_s": 100.0 + step, "data_wait": 0.5}
        lines.append({"kind": "step", "step": step, "epoch": epoch, "loss": loss, **rates, "num_ranks": 2})
        if step % 10 == 0:
            val = {"val_top1": step / 100, "val_top5": 1.0, "val_loss": loss}
            lines.append({"kind": "epoch", "step": step, "epoch": epoch, "loss": loss, "seconds": 1.0 * step, **val})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + ('{"kind": "st' if torn else ""))


def _train(graph: Graph, stage: Stage, classes: tuple[str, ...], going_on: bool) -> None:
    _metrics(stage.output, epochs=3, torn=going_on)
    if not going_on:
        meta = make_meta("checkpoint", config=stage.config, seed=0, inputs={"train": "f00"})
        restarts = int(stage.name == "surrogate")
        more = {"restarts": restarts, "num_samples": 6 * len(classes), "seconds": 9.0, "step": 30, "complete": True}
        write_json(stage.output / "checkpoints" / "step_000000030" / "meta.json", meta | more)


def _vote(graph: Graph, stage: Stage, classes: tuple[str, ...], going_on: bool) -> None:
    _, method, name = stage.name.split("-")
    source, target = open_beton(graph.source), open_beton(graph.targets[name][0])
    predictions = (target.labels * 2 + np.arange(target.num_samples) % 2) % len(classes)
    votes = np.bincount(predictions, minlength=len(classes))
    meta = make_meta("votes", inputs={"source": source.fingerprint})
    sizes = np.array([len(predictions)])
    save_votes(stage.output, Votes(votes[None], votes[None] / 2.0, predictions, sizes, method, source.classes, meta))


def _influence(graph: Graph, stage: Stage, classes: tuple[str, ...], going_on: bool) -> None:
    value = np.linspace(-0.02, 0.05, len(classes))  # the last class helps most
    meta = make_meta("influence", inputs={"source": open_beton(graph.source).fingerprint})
    stage.output.parent.mkdir(exist_ok=True)
    masks = np.ones((6, len(classes)), bool)
    save_influence(stage.output, Influence(value, np.full(len(classes), 0.01), masks, np.full(6, 0.5), meta))


def _prune(graph: Graph, stage: Stage, classes: tuple[str, ...], going_on: bool) -> None:
    assert main(list(stage.argv)) == 0


def _transfer(graph: Graph, stage: Stage, classes: tuple[str, ...], going_on: bool) -> None:
    _metrics(stage.output.with_name(stage.output.name + ".run"), epochs=2, torn=going_on)
    arm = stage.output.name.split("-", 1)[1].partition("@")[0]
    top1 = TOP1["dense" if arm.startswith("dense") else arm] + (0.01 if "-s1" in stage.name else 0.0)
    found = {"top1": top1, "mode": "lp"} | ({"robust_top1": top1 / 2} if graph.config.transfer.robust else {})
    if not going_on:
        write_json(stage.output, make_meta("transfer", config={}, inputs={"test": "f00"}) | found)
