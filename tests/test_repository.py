"""What a reader of the repository relies on: a short top level, short files, a README that is true of both."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import shlex
import subprocess
from pathlib import Path

import torch

from fp8train import explain
from fp8train.arguments import take_arguments
from fp8train.backends.selection import BACKENDS
from fp8train.cli import COMMANDS
from fp8train.config import load_config
from fp8train.models import ModelConfig, build_model, save_hf
from tests.convertible_model import Bigrams
from tests.source_tree import ROOT, files, imports, python_files, syntax

TOP_LEVEL = {"pyproject.toml", "README.md", "LICENSE", "fp8train", "configs", "kernels", "recipes", "tests", "launch"}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
TEXT = {".py", ".md", ".toml", ".yaml", ".txt", ".sh", ".sbatch", ".cpp", ""}
# written in two halves, so that this file does not hold what it looks for
PACKAGE_HOSTS = ("py" + "pi.org", "python" + "hosted.org", "download.py" + "torch.org", "conda" + ".anaconda.org")


def test_top_level_holds_only_what_the_layout_names() -> None:
    found = {path.parts[0] for path in files()}
    assert {name for name in found if not name.startswith(".")} <= TOP_LEVEL
    assert found >= TOP_LEVEL


def test_files_and_functions_are_short() -> None:
    long = []
    for path in python_files("fp8train", "kernels"):
        spans = {str(path): len((ROOT / path).read_text().splitlines()) - MAX_FILE_LINES}
        for node in ast.walk(syntax(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                spans[f"{path}:{node.lineno} {node.name}"] = lines - MAX_FUNCTION_LINES
        long += [f"{name} is {excess} lines too long" for name, excess in spans.items() if excess > 0]
    assert not long


def test_text_is_ascii_and_names_no_package_index() -> None:
    for path in files():
        if path.suffix in TEXT:
            text = (ROOT / path).read_bytes()
            assert text.isascii(), f"{path} holds bytes that are not ASCII"
            assert not [host for host in PACKAGE_HOSTS if host.encode() in text], f"{path} names a package index"


def test_environment_is_read_only_for_the_rendezvous() -> None:
    readers = {"os.environ", "os.getenv", "os.environb"}
    for path in python_files("fp8train", "kernels"):
        used = {ast.unparse(node) for node in ast.walk(syntax(path)) if isinstance(node, ast.Attribute)} | imports(path)
        assert not used & readers or path.parts[1] == "distributed", f"{path} reads the environment"


def test_no_module_is_named_for_nothing_in_particular() -> None:
    vague = re.compile(r"(utils?|helpers?|common|misc|.*_(legacy|v\d+))\.py")
    assert not [path for path in python_files("fp8train", "kernels", "tests") if vague.fullmatch(path.name)]


def readme_tree() -> dict[str, set[str]]:
    """Folder -> names, from README's file tree: `folder/  what: name, name`, on one or more lines a folder."""
    text = (ROOT / "README.md").read_text()
    section = re.search(r"^## File tree\n+```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert section, "README.md has no '## File tree' with a code block"
    tree: dict[str, set[str]] = {}
    line = ""
    for raw in [*section[1].splitlines(), "end/"]:
        if raw.startswith(" "):
            line += raw
            continue
        if line:
            folder, _, rest = line.partition("/ ")
            names = {name.strip() for name in rest.partition(":")[2].split(",") if name.strip()}
            tree[folder] = tree.get(folder, set()) | names
        line = raw
    return tree


def source_folders() -> dict[str, set[str]]:
    """Folder -> names of its modules and documents, for the folders whose files README lists."""
    found: dict[str, set[str]] = {}
    for path in files():
        if path.parts[0] in TOP_LEVEL - {"tests"} and len(path.parts) > 1:
            names = found.setdefault(str(path.parent), set())
            if path.name not in {"__init__.py", "py.typed", "README.md"}:
                names.add(path.stem if path.suffix in {".py", ".yaml"} else path.name)
    return found


def test_readme_file_tree_equals_the_files() -> None:
    tree = readme_tree()
    assert "tests" in tree
    want = source_folders()
    got = {folder: names for folder, names in tree.items() if folder != "tests"}
    assert got.keys() == want.keys(), f"folders: missing {want.keys() - got.keys()}, extra {got.keys() - want.keys()}"
    for folder, names in want.items():
        assert got[folder] == names, f"{folder}/: missing {names - got[folder]}, extra {got[folder] - names}"


def pages() -> list[Path]:
    return [ROOT / path for path in files() if path.suffix == ".md" and not path.parts[0].startswith(".")]


def anchors(page: Path) -> set[str]:
    """The names that links give to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_links_and_scripts_of_every_page_lead_somewhere() -> None:
    assert {page.parent.name for page in pages()} >= {ROOT.name, "kernels", "launch", "nn", "recipes", "report"}
    lost = []
    for page in pages():
        text = page.read_text()
        for target, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", text):
            where = page.parent / target if target else page
            if not where.exists() or (anchor and anchor not in anchors(where)):
                lost.append(f"{page.relative_to(ROOT)}: {target}#{anchor}")
        lost += [script for script in re.findall(r"\./(launch/\w+\.\w+)", text) if not (ROOT / script).exists()]
    assert not lost


def test_every_page_is_finished() -> None:
    assert not [page for page in pages() if re.search(r"TO BE FILLED|TODO|FIXME|XXX", page.read_text())]


def test_readme_example_converts_and_trains_a_model() -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    torch.manual_seed(0)
    model = Bigrams()
    tokens = torch.randint(64, (2, 32))
    before = model.layers[0].weight.detach().clone()
    names = {"model": model, "tokens": tokens, "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-2)}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "README.md", "exec"), names)
    assert "fp8" in printed.getvalue()
    assert not torch.equal(model.layers[0].weight, before)


def test_readme_commands_exist_and_their_settings_are_accepted(tmp_path: Path) -> None:
    config = ModelConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1, num_kv_heads=1, max_seq_len=512
    )
    save_hf(build_model(config).state_dict(), config, tmp_path / "hf")
    text = "".join(page.read_text() for page in pages())
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [shlex.split(line, comments=True) for line in "".join(blocks).splitlines()]
    used = [words[1:] for words in lines if words and words[0] == "fp8train"]
    used += [["train", *words[4:]] for words in lines if "fp8train.train" in words]
    used += [["train", *words[1:]] for words in lines if words and words[0] == "./launch/torchrun.sh"]
    assert {name for name, *_ in used} == set(COMMANDS)
    for name, *overrides in used:
        if name == "explain":
            overrides = take_arguments(overrides, explain.ExplainArguments)[1]
        if name in ("train", "compare", "explain"):
            load_config([text.replace("=DIR", f"={tmp_path / 'hf'}") for text in overrides], name).check()


def test_readme_lists_every_recipe() -> None:
    text = (ROOT / "README.md").read_text()
    recipes = {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    section = text[text.index("\n## Recipes\n") : text.index("\n## Results\n")]
    assert recipes == set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE))


def test_readme_lists_every_backend() -> None:
    text = (ROOT / "README.md").read_text()
    section = text[text.index("\n## Your own model\n") : text.index("\n## Recipes\n")]
    named = [name for row in re.findall(r"^\| (`[^|]*`) \|", section, re.MULTILINE) for name in re.findall(r"\w+", row)]
    assert sorted(named) == sorted([*BACKENDS, "hopper"])


def test_shell_scripts_parse() -> None:
    """A shell reads its script as it goes: what no test reaches, such as the start of a run on GPUs, it never read."""
    for path in [*(ROOT / "launch").glob("*.s*"), ROOT / ".ci/run"]:
        done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_ci_runs_the_test_script_and_nothing_else() -> None:
    lines = (ROOT / ".ci/run").read_text().splitlines()
    commands = [line for line in lines if line and not line.startswith(("#", "set -"))]
    assert commands == ['exec "$(dirname "${BASH_SOURCE[0]}")/../launch/test.sh"']
