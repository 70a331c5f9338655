"""The project's own rules: CI runs make's verbs, one version per tool, typed host code."""

import ast
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from neobert_kernels import _runtime

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def tracked_files() -> list[Path]:
    """Everything git has or would take; outside a checkout, everything there is."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = (ROOT / name for name in listed.stdout.splitlines())
    return [path for path in files if path.is_file()]


def text_of(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "replace")


def make_verbs() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):(?!=)", MAKEFILE, re.MULTILINE))


def shell_verbs(text: str) -> set[str]:
    """Every ``make verb`` that starts a command."""
    return set(re.findall(r"^\s*(?:run: )?make ([a-z-]+)", text, re.MULTILINE))


def workflow_commands(path: Path) -> list[str]:
    jobs = yaml.safe_load(text_of(path))["jobs"].values()
    return [step["run"] for job in jobs for step in job["steps"] if "run" in step]


def test_ci_runs_verbs_that_make_has() -> None:
    verbs = shell_verbs(text_of(ROOT / ".ci" / "run"))
    assert verbs
    assert verbs <= make_verbs()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_nothing_but_make(path: Path) -> None:
    commands = workflow_commands(path)
    assert commands
    for command in commands:
        assert command == ".ci/run" or set(re.findall(r"make (\S+)", command)) <= make_verbs()
        assert re.fullmatch(r"\.ci/run|make [a-z-]+", command)


def test_readme_commands_exist() -> None:
    block = README.partition("```sh\n")[2].partition("```")[0]
    assert shell_verbs(block) == {"demo", "test"}
    assert shell_verbs(README) <= make_verbs()


def test_make_test_is_every_check_that_needs_no_gpu() -> None:
    steps = re.search(r"^test: (.+)$", MAKEFILE, re.MULTILINE)
    assert steps is not None
    assert steps[1].split() == ["ready", "test-cpu", "interpret", "aot", "cuda", "compat"]
    assert re.search(r"^ready:.*\n\t@\$\(MAKE\) .* lint ", MAKEFILE, re.MULTILINE)


def test_every_tool_version_stands_in_one_file() -> None:
    files = [path for path in tracked_files() if path.suffix in {".toml", ".yml", ".yaml", ".md"}]
    files += [ROOT / "Makefile", ROOT / ".ci" / "run"]
    pins: dict[str, list[str]] = {}
    for path in files:
        for name in re.findall(r"\b([a-z][a-z0-9-]*)==\d", text_of(path)):
            pins.setdefault(name, []).append(path.name)
    assert {"ruff", "mypy", "torch"} <= pins.keys()
    assert {name: places for name, places in pins.items() if len(places) > 1} == {}


def test_pre_commit_runs_the_installed_tools() -> None:
    config = yaml.safe_load(text_of(ROOT / ".pre-commit-config.yaml"))
    assert [repository["repo"] for repository in config["repos"]] == ["local"]
    entries = [hook["entry"].split()[0] for hook in config["repos"][0]["hooks"]]
    assert {Path(entry).name for entry in entries} == {"ruff", "mypy"}


@pytest.mark.parametrize("package", ["triton", "transformers"])
def test_compat_runs_the_oldest_versions_promised(package: str) -> None:
    oldest = re.search(rf"^OLDEST := .*\b{package}==([\d.]+)", MAKEFILE, re.MULTILINE)
    promised = re.search(rf'^    "{package}>=([\d.]+)', PYPROJECT, re.MULTILINE)
    assert oldest is not None
    assert promised is not None
    assert oldest[1].removesuffix(".0") == promised[1]


def test_no_file_names_a_place_on_one_machine() -> None:
    folders = ("work", "home", "root", "farm", "opt", "mnt", "Users")
    pattern = re.compile(rf"(?<![\w.<>)}}])/(?:{'|'.join(folders)})/")
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in tracked_files()
        for line in text_of(path).splitlines()
        if pattern.search(line)
    ]
    assert found == []


def functions_without_types(path: Path) -> list[str]:
    """Host functions that lack an annotation; kernels (anything under a ``jit``) have none."""
    found = []
    pending: list[ast.AST] = [ast.parse(text_of(path))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
                continue
            spec = node.args
            arguments = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, spec.vararg, spec.kwarg]
            bare = [a.arg for a in arguments if a is not None and a.annotation is None]
            if set(bare) - {"self", "cls", "ctx"} or node.returns is None:
                found.append(f"{path.name}:{node.lineno} {node.name}")
        pending.extend(ast.iter_child_nodes(node))
    return found


@pytest.mark.parametrize("package", ["neobert_kernels", "neobert"])
def test_host_functions_are_typed(package: str) -> None:
    paths = sorted((ROOT / package).rglob("*.py"))
    assert paths
    assert [name for path in paths for name in functions_without_types(path)] == []


def test_changelog_knows_this_version() -> None:
    version = re.search(
        r'^__version__ = "(.+)"', text_of(ROOT / "neobert_kernels/__init__.py"), re.M
    )
    assert version is not None
    assert f"## [{version[1]}]" in text_of(ROOT / "CHANGELOG.md")


def test_readme_says_which_operators_have_a_kernel() -> None:
    pytest.importorskip("triton")
    table = README.partition("<!-- operators -->")[2].partition("<!-- end of operators -->")[0]
    shown = {
        name: "Triton kernel" in line.split("|")[2]
        for line in table.splitlines()
        for name in re.findall(r"`(\w+)`", line)
    }
    assert shown == {name: bool(op.kernels) for name, op in _runtime.load_operators().items()}


def test_readme_layout_names_every_module() -> None:
    tree = README.partition("## The house")[2].partition("Imports go one way")[0]
    modules = [
        path
        for package in ("neobert_kernels", "neobert")
        for path in (ROOT / package).glob("*.py")
        if not path.name.startswith("__")
    ]
    assert [path.name for path in modules if path.name not in tree] == []
