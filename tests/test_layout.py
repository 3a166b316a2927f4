"""The architecture's rules, read off the source: arrows point one way, engines have one door, files stay small."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "dp4tl_dist"
MAX_LINES = 250
MAX_LINES_OF_TESTS = 400  # cases side by side read well
TOP_LEVEL = {PACKAGE, "launch", "slurm", "benchmarks", "tests", "docs", ".ci"}

# An arrow points from a later level to an earlier one, or stays within its level. A folder's level is its modules', but
# for those named here: checkpoints are files that hold a model, and pruning reads the surrogate's.
LEVELS = (
    ("errors", "limits", "inputs", "sides", "config_file", "optim_config", "config"),
    ("files", "artifact", "__init__", "machine", "siblings", "nodes", "streams", "version", "revisions", "atomic"),
    ("collectives", "rendezvous", "waiting", "world"),
    ("log", "exact", "models", "recipes", "influence_config", "train.checkpoint"),
    ("data",),
    ("prune",),
    ("schedule", "train"),
    ("transfer",),
    ("influence",),
    ("slurm_config", "arm_name", "run_config", "stage", "arms", "stages", "sweep", "outputs", "contents", "records",
     "plan", "plan_known", "plan_sizes", "plan_words", "plan_content", "marks"),
    ("report",),
    ("children", "launcher", "ranks", "table", "info", "doctor", "pipeline", "advise"),
    ("stage_job", "jobs"),
    ("sweep_table", "sweep_surrogates", "sweep_files"),
    ("arguments", "verbs_data", "verbs_select", "verbs_study", "verbs_train", "cli"),
    ("__main__",),
)  # fmt: skip
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}
LIGHT = {  # module -> what it may import beside the standard library
    "data/order": {"numpy", "dp4tl_dist.errors"},
    "data/beton": {
        "numpy",
        "dp4tl_dist.errors",
        "dp4tl_dist.files",
        "dp4tl_dist.inputs",
        "dp4tl_dist.revisions",
        "dp4tl_dist.data",
    },
    "data/subset": {"numpy", "dp4tl_dist.errors", "dp4tl_dist.files", "dp4tl_dist.data"},
    "prune/select": {"numpy", "dp4tl_dist.errors", "dp4tl_dist.files", "dp4tl_dist.inputs"},
    "prune/ranking": {"numpy", "dp4tl_dist.errors", "dp4tl_dist.prune.select"},
}
DOORS = {"ffcv": ("dp4tl_dist/data/",), "deepspeed": ("dp4tl_dist/train/engine.py",), "submitit": ("launch/submit.py",)}


def modules() -> list[Path]:
    return sorted((ROOT / PACKAGE).rglob("*.py"))


def sources() -> list[Path]:
    folders = (PACKAGE, "launch", "slurm", "benchmarks", "tests", ".ci")
    suffixes = {".py", ".sh", ".toml", ".sbatch", ".md", ".cfg", ""}
    found = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
    found += [path for path in ROOT.iterdir() if path.suffix in {".md", ".cfg", ".toml"}]
    return sorted(path for path in found if path.is_file() and "__pycache__" not in path.parts)


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Each import of a file, wherever it stands in it, as (line, dotted name). `from a import b` counts as a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{short(path)}:{node.lineno} imports relatively"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def level_of(dotted: str) -> int | None:
    """The level of a dotted name: of its longest part that has one. dp4tl_dist.__version__ is of __init__."""
    parts = dotted.split(".")[1:]
    if not parts or not ((ROOT / PACKAGE / parts[0]).is_dir() or (ROOT / PACKAGE / f"{parts[0]}.py").is_file()):
        return LEVEL_OF["__init__"]
    return LEVEL_OF.get(".".join(parts[:2]), LEVEL_OF.get(parts[0]))


def is_within(dotted: str, allowed: str) -> bool:
    return dotted == allowed or dotted.startswith(allowed + ".")


# ---------------------------------------------------------------- arrows


@pytest.mark.parametrize("path", modules(), ids=short)
def test_arrows_point_one_way(path: Path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    own = level_of(name)
    assert own is not None, f"{short(path)} has no place in the order: add it to LEVELS"
    found = [(line, dotted, level_of(dotted)) for line, dotted in imports(path) if is_within(dotted, PACKAGE)]
    wrong = [f"line {line}: {dotted}" for line, dotted, level in found if level is not None and level > own]
    assert not wrong, f"{short(path)} imports what comes after it: {wrong}"


def test_no_circles():
    """Also within a level and a folder, imports at the top of a module never run in a circle."""
    graph = {}
    for path in modules():
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        graph[name] = set(_top_level_imports(path))
    known = set(graph)
    edges = {name: {_resolve(dotted, known) for dotted in found} - {name, None} for name, found in graph.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"circular imports: {' -> '.join((*trail[trail.index(name) :], name))}"
        if name not in done:
            for other in edges[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def _top_level_imports(path: Path) -> Iterator[str]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _resolve(dotted: str, known: set[str]) -> str | None:
    while dotted and dotted not in known:
        dotted = dotted.rpartition(".")[0]
    # A name taken from the package itself (__version__) needs nothing but its __init__, which imports nothing.
    return dotted or None


@pytest.mark.parametrize("name", sorted(LIGHT))
def test_numpy_alone(name: str):
    path = ROOT / PACKAGE / f"{name}.py"
    if not path.exists():
        pytest.skip(f"{name}.py is not there")
    for line, dotted in imports(path):
        top = dotted.partition(".")[0]
        allowed = any(is_within(dotted, item) for item in LIGHT[name]) or top in _stdlib()
        assert allowed, f"{short(path)}:{line} imports {dotted}"


def _stdlib() -> frozenset[str]:
    import sys

    return frozenset(sys.stdlib_module_names)


@pytest.mark.parametrize("name", [*sorted(LIGHT), "config", "errors", "files", "cli", "doctor", "report/html"])
def test_light_modules_load_no_engine(name: str):
    """Asked of a fresh interpreter, so that what a module imports through others counts too."""
    import sys

    if not (ROOT / PACKAGE / f"{name}.py").exists():
        pytest.skip(f"{name}.py is not there")
    dotted = f"{PACKAGE}.{name.replace('/', '.')}"
    code = f"import sys, {dotted}; print([m for m in ('torch', 'ffcv', 'numba', 'deepspeed') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_report_imports_no_torch():
    for path in (ROOT / PACKAGE / "report").rglob("*.py"):
        heavy = [dotted for _, dotted in imports(path) if dotted.partition(".")[0] in {"torch", "torchvision", "ffcv"}]
        assert not heavy, f"{short(path)} imports {heavy}"


@pytest.mark.parametrize("engine", sorted(DOORS))
def test_one_door_for_each_engine(engine: str):
    for path in [*modules(), *(ROOT / "launch").rglob("*.py")]:
        if any(is_within(dotted, engine) for _, dotted in imports(path)):
            assert short(path).startswith(DOORS[engine]), f"{short(path)} imports {engine}: its door is {DOORS[engine]}"


# ---------------------------------------------------------------- files


def test_top_level_is_fixed():
    """Of the folders that git knows, or would take."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    folders = {line.partition("/")[0] for line in listed.stdout.splitlines() if "/" in line}
    assert folders <= TOP_LEVEL


@pytest.mark.parametrize("path", [path for path in sources() if path.suffix == ".py"], ids=short)
def test_files_stay_small(path: Path):
    count = len(path.read_text(encoding="utf-8").splitlines())
    limit = MAX_LINES_OF_TESTS if path.is_relative_to(ROOT / "tests") else MAX_LINES
    assert count <= limit, f"{short(path)} has {count} lines: it is probably two concepts"


# Written so that this file does not contain what it looks for.
UNFINISHED = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X|NotImplemented" r"Error)\b|except[^:\n]*:\s*pa" r"ss\b")
MACHINE = re.compile(r"(?<![\w./-])/(work|tm" r"p|ro" r"ot|ho" r"me|mn" r"t|opt)/\w")


@pytest.mark.parametrize("path", sources(), ids=short)
def test_nothing_unfinished_and_no_machine_paths(path: Path):
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        assert not UNFINISHED.search(line), f"{short(path)}:{number} is unfinished: {line.strip()}"
        assert not MACHINE.search(line), f"{short(path)}:{number} names a place of one machine: {line.strip()}"


@pytest.mark.parametrize("path", [path for path in sources() if path.suffix == ".md"], ids=short)
def test_links_lead_somewhere(path: Path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target) or target.startswith("#"):
            continue
        assert (path.parent / target.partition("#")[0]).exists(), f"{short(path)} links to {target}, which is not there"


@pytest.mark.parametrize("name", ["setup.sh", "demo.sh", "test.sh", "torchrun.sh", "bundle.sh"])
def test_scripts_are_strict_and_executable(name: str):
    path = ROOT / "launch" / name
    assert path.stat().st_mode & 0o111
    assert path.read_text().splitlines()[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in path.read_text()
    assert subprocess.run(["bash", "-n", path]).returncode == 0


def test_lock_pins_everything_exactly():
    """Every pin with the hashes of its files, and nowhere the name of the server that has them."""
    text = (ROOT / "launch" / "requirements.txt").read_text()
    entries = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace(" \\\n    ", " ").splitlines()
    pin = re.compile(r"[a-z0-9.-]+==[^ ;,*]+( ; .+?)?( --hash=sha256:[0-9a-f]{64})+")
    assert [entry for entry in entries if not pin.fullmatch(entry)] == []
    names = {entry.partition("==")[0] for entry in entries}
    wanted = re.findall(r"^    ([a-z_]+)[><=]", (ROOT / "setup.cfg").read_text(), flags=re.MULTILINE)
    assert {name.replace("_", "-") for name in wanted} - {"timm", "python-requires"} <= names
