"""Documentation that can be checked: tests that it names, files that it links to, flags that it mentions."""

import ast
import importlib
import json
import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dataset import open_images
from errors import UserError
from experiments.page import differences, spread
from experiments.plan import MAIN_ARMS
from scripts import ROOT
from training.log import Watch

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = (
    *("preprocessing", "train_vae", "train_repae", "train_ldm_only", "cache_latents"),
    *("generate", "evaluate", "save_vae_weights"),
)
ROOMS = ("diffusion", "flags", "loss", "metrics", "models", "storage", "training", "weights")
# flags of launchers, SLURM, docker, argparse, pytest and benchmarks
OTHERS_FLAGS = {
    *("nnodes", "nproc_per_node", "num_machines", "num_processes", "multi_gpu", "standalone", "max-restarts"),
    *("local_addr", "requeue", "help", "device", "shm-size", "ipc", "ulimit", "gpus"),
}
# how many command lines the pages with most of them have at least
COMMAND_LINES = {"README.md": 14, "own-data.md": 10, "many-machines.md": 3, "networks.md": 3, "metrics.md": 2}


def test_every_promise_has_a_test_and_every_test_that_the_reliability_page_names_is_there():
    text = (ROOT / "docs/reliability.md").read_text(encoding="utf8")
    for line in text.splitlines():
        if line.startswith("| ") and not line.endswith("| shown by |"):
            assert re.search(r"\| `test_\w+\.py::test_\w+`[^|]*\|$", line), line
    named = re.findall(r"`(test_\w+)\.py::(test_\w+)`", text)
    assert len(named) > 50
    for file, test in named:
        source = (ROOT / "tests" / f"{file}.py").read_text(encoding="utf8")
        assert re.search(rf"^def {test}\(", source, re.MULTILINE), f"{file}.py has no {test}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target, heading in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", page.read_text(encoding="utf8")):
        if not target.startswith("http"):
            there = page.parent / target if target else page
            assert there.exists(), f"{page.name} links to {target}"
            assert not heading or heading in headings(there), f"{page.name} links to {target}#{heading}"


def headings(page: Path) -> set[str]:
    found = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found}


def test_the_map_of_the_code_has_a_line_for_each_file():
    files = {f"{room}/{file.name}" for room in ROOMS for file in (ROOT / room).glob("*.py")}
    files = {file for file in files if not file.endswith("__init__.py")} | {file.name for file in ROOT.glob("*.py")}
    named = re.findall(r"^\| `([\w/]+\.py)` \|", (ROOT / "docs/code.md").read_text(encoding="utf8"), re.MULTILINE)
    assert sorted(named) == sorted(files)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_flags_that_the_pages_mention_exist(page):
    text, known = page.read_text(encoding="utf8"), set(OTHERS_FLAGS)
    for file in re.findall(r"`([\w/]+\.(?:py|yaml|sbatch))`", text):
        assert (ROOT / file).exists(), f"{page.name} mentions {file}"
    for source in (*ROOT.glob("*.py"), *ROOT.glob("flags/*.py"), ROOT / "experiments/replicate.py"):
        known |= set(re.findall(r'"--([a-z0-9-]+)"', source.read_text(encoding="utf8")))
    for flag in re.findall(r"`--([a-z][a-z0-9_-]+)", text):
        assert flag in known or flag.removeprefix("no-") in known, f"{page.name} mentions --{flag}"


def text_of(node: ast.AST) -> str:
    """The text of an expression of string literals, with … in place of its values."""
    if isinstance(node, ast.Constant):
        return {str: str, bytes: bytes.decode}.get(type(node.value), lambda _: "…")(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return text_of(node.body) if isinstance(node, ast.IfExp) else "…"


def texts(node: ast.AST) -> Iterator[str]:
    """Every text below a node; a formatted one as a whole."""
    if isinstance(node, (ast.Constant, ast.JoinedStr, ast.BinOp)):
        yield text_of(node)
    if not isinstance(node, ast.JoinedStr):
        for child in ast.iter_child_nodes(node):
            yield from texts(child)


def said_by_the_source() -> Iterator[str]:
    """Every text in the source, and the message that the watch over numbers composes."""
    for file in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py")):
        if "tests" not in file.relative_to(ROOT).parts:
            yield from texts(ast.parse(file.read_text(encoding="utf8")))
    yield Watch(scaled=False).reason_to_stop([{"step": 7, "vae_loss": math.nan}])


def as_pattern(message: str) -> re.Pattern:
    """A pattern that finds a message of the page in a text: … stands for anything."""
    return re.compile(".+".join(map(re.escape, message.split("…"))))


def test_every_message_of_the_troubleshooting_page_is_one_that_the_source_has():
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf8").split("## Mistakes in the input")[0]
    quoted = re.findall(r"\*\*`([^`]+)`\*\*", page)
    assert len(quoted) > 25
    said = [text.replace("\n", " ") for text in said_by_the_source()]
    for message in quoted:
        assert any(map(as_pattern(message).search, said)), f"nothing says: {message}"


def test_every_warning_of_the_source_is_on_the_troubleshooting_page():
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf8")
    explained = re.findall(r"\*\*`(warning: [^`]+)`\*\*", page)
    warnings = {text for text in said_by_the_source() if text.startswith("warning: ")}
    assert warnings
    for warning in warnings:
        # a warning without words of its own, "warning: …: …", matches any
        found = any(as_pattern(message).search(warning) or as_pattern(warning).search(message) for message in explained)
        assert found, f"not explained: {warning}"


def command_lines(page: Path) -> Iterator[list[str]]:
    """The words of every command in the fenced blocks of a page."""
    for block in re.findall(r"^```\n(.*?)^```", page.read_text(encoding="utf8"), re.MULTILINE | re.DOTALL):
        text = ""
        for line in block.replace("\\\n", "").splitlines():
            text += line + "\n"
            try:
                words = shlex.split(text, comments=True)
            except ValueError:  # a quotation that continues in the next line
                continue
            text = ""
            if words:
                yield words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_scripts_take_the_command_lines_of_the_pages(page):
    taken = 0
    for words in command_lines(page):
        script = next((word for word in words if word.removesuffix(".py") in SCRIPTS), None)
        if words[0] not in ("python", "accelerate", "torchrun") or script is None or "..." in words:
            continue
        try:
            importlib.import_module(script.removesuffix(".py")).parse_args(words[words.index(script) + 1 :])
        except UserError as error:
            pytest.fail(f"{page.name}: {shlex.join(words)}: {error}")
        taken += 1
    assert taken >= COMMAND_LINES.get(page.name, 0)


def test_the_programs_on_the_page_about_own_data_do_what_it_says(tiny_data, tmp_path, monkeypatch):
    labels, reference = (words[2] for words in command_lines(ROOT / "docs/own-data.md") if words[1] == "-c")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "birds").mkdir()
    (tmp_path / "labels.csv").write_text("a/1.png,3\nb.png,0\n")
    exec(labels, {})
    written = json.loads((tmp_path / "birds/dataset.json").read_text(encoding="utf8"))
    assert written == {"labels": [["a/1.png", 3], ["b.png", 0]]}
    (tmp_path / "data").symlink_to(tiny_data)
    exec(reference, {})
    pixels, images = np.load(tmp_path / "reference.npz")["arr_0"], open_images(tiny_data)
    assert pixels.dtype == np.uint8 and pixels.shape == (18, 32, 32, 3)
    assert np.array_equal(pixels[5], images[5][0].permute(1, 2, 0).numpy())


def test_the_readme_shows_the_results_of_the_study():
    """Means and deviations over the seeds that docs/replication.json holds."""
    results = json.loads((ROOT / "docs/replication.json").read_text(encoding="utf8"))["results"]
    text = PAGES[0].read_text(encoding="utf8")

    def mean(name: str, metric: str) -> float:
        return np.mean([found[metric] for found in results[name].values()])

    joint, tuned = (spread(differences(results, "repa")[arm], "fd_efficientnet_lite0", 1) for arm in ("repae", "tuned"))
    assert f"is {joint} for REPA-E and {tuned} for the last row" in text
    assert f"{len(results['repa'])} seeds (naive end-to-end: {len(results['naive'])})" in " ".join(text.split())
    for name in MAIN_ARMS:
        inside, outside = spread(results[name], "fd_efficientnet_lite0", 1), spread(results[name], "fd_vgg16", 2)
        cells = re.escape(f"{MAIN_ARMS[name].title} | {inside} | {outside}")
        (row,) = re.findall(rf"\| {cells} \| (.*) \|\n", text)
        assert row.endswith(f" | {mean(name, 'minutes'):.1f}"), name
        if "psnr" in results[name]["0"]:
            assert row.startswith(f"{mean(name, 'psnr'):.2f} dB, {mean(name, 'lpips'):.3f} |"), name
