"""What may import what, and that DVC knows of all the code that a stage's result depends on."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
STAGES = YAML(typ="safe", pure=True).load(ROOT / "dvc.yaml")["stages"]
PRETRAINING = YAML(typ="safe", pure=True).load(ROOT / "pretrain" / "dvc.yaml")["stages"]
FILES = {name: (f"stages/{name}.py", stage) for name, stage in STAGES.items()}
FILES |= {
    f"pretrain:{name}": (stage["cmd"].split("-m ")[1].replace(".", "/") + ".py", stage) for name, stage in PRETRAINING.items()
}
WITHOUT_INFLUENCE = {"errors", "files", "logs", "params", "__init__"}  # on a result; params.yaml's values are deps of their own


def imports(path):
    """The modules of a file's import statements, those within functions too; `from a import b` gives a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(path.relative_to(ROOT).with_suffix("").parts[: -node.level]) if node.level else ""
            module = ".".join(filter(None, (package, node.module)))
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def modules(names):
    """The files of the package `sentiment` among imported names."""
    files = {ROOT / "sentiment" / f"{name.split('.')[1]}.py" for name in names if name.startswith("sentiment.")}
    return {file for file in files if file.is_file()}


def reached(path):
    """The files of `sentiment` that a module's imports lead to, however far."""
    found, new = set(), modules(imports(path))
    while new:
        found |= new
        new = set().union(*(modules(imports(file)) for file in new)) - found
    return found


def packages(folder):
    """The top-level packages that a folder's modules import."""
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    return {name.split(".")[0] for file in files for name in imports(file)}


def commands(name):
    """The commands that a page tells to type, without their comments."""
    blocks = (ROOT / name).read_text(encoding="utf-8").split("```bash\n")[1:]
    lines = [line for block in blocks for line in block.partition("```")[0].splitlines()]
    return {line.partition(" #")[0].strip() for line in lines} - {""}


def test_the_portuguese_page_tells_the_commands_of_the_readme():
    assert commands("LEIAME.md") - commands("README.md") == set()
    assert len(commands("LEIAME.md")) > 10


def test_stages_use_the_library_and_not_the_server():
    assert "sentiment" in packages("stages")
    assert "serve" not in packages("stages")


def test_the_library_uses_neither_stages_nor_server():
    assert packages("sentiment").isdisjoint({"stages", "serve"})


def test_the_server_uses_the_library_and_not_the_stages():
    assert "sentiment" in packages("serve")
    assert "stages" not in packages("serve")


@pytest.mark.parametrize("module", ["serve.app", "serve.predictor", "serve.prepare"])
def test_what_serves_imports_neither_torch_nor_what_training_needs(module):
    code = f"import sys, {module}; print(*sorted({{'torch', 'transformers', 'dvc', 'pandas', 'sklearn'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert result.stdout.split() == []


def test_every_stage_is_a_module_and_every_module_a_stage():
    assert {path.stem for path in (ROOT / "stages").glob("*.py")} - {"__init__"} == set(STAGES)
    assert all(f"-m stages.{name}" in stage["cmd"] for name, stage in STAGES.items())


@pytest.mark.parametrize("name", FILES)
def test_a_stage_runs_again_when_its_code_changes(name):
    file, stage = FILES[name]
    used = {ROOT / file} | {each for each in reached(ROOT / file) if each.stem not in WITHOUT_INFLUENCE}
    assert {str(each.relative_to(ROOT)) for each in used} - set(stage["deps"]) == set()


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_depends_on_nothing_that_is_not_there(name):
    outs = {out if isinstance(out, str) else next(iter(out)) for stage in STAGES.values() for out in stage_outs(stage)}
    made = {dep for dep in STAGES[name]["deps"] if any(dep == out or dep.startswith(f"{out}/") for out in outs)}
    assert [dep for dep in STAGES[name]["deps"] if dep not in made and not (ROOT / dep).exists()] == []


def stage_outs(stage):
    """All that a stage writes, its metrics among them."""
    return [*stage.get("outs", []), *stage.get("metrics", [])]


@pytest.mark.parametrize("name", ["download", "prepare", "tokenize", "promote"])
def test_a_short_stage_does_not_wait_for_torch(name):
    code = f"import sys, stages.{name}; print(*sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert result.stdout.split() == []
