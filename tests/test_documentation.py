"""Documentation that can be checked: tests that it names, files that it links to, flags that it mentions."""

import importlib
import re
from pathlib import Path

import pytest

from scripts import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = (
    *("preprocessing", "train_vae", "train_repae", "train_ldm_only", "cache_latents", "cache_tokens"),
    *("generate", "evaluate"),
)
OTHERS_FLAGS = {"nnodes", "nproc_per_node", "num_machines", "num_processes", "multi_gpu", "standalone", "max-restarts"}


def test_every_test_that_the_reliability_page_names_is_there():
    named = re.findall(r"`(test_\w+)\.py::(test_\w+)`", (ROOT / "docs/reliability.md").read_text(encoding="utf8"))
    assert len(named) > 50
    for file, test in named:
        source = (ROOT / "tests" / f"{file}.py").read_text(encoding="utf8")
        assert re.search(rf"^def {test}\(", source, re.MULTILINE), f"{file}.py has no {test}"


def test_every_promise_has_a_test():
    for line in (ROOT / "docs/reliability.md").read_text(encoding="utf8").splitlines():
        if line.startswith("| ") and not line.endswith("| shown by |"):
            assert re.search(r"\| `test_\w+\.py::test_\w+`[^|]*\|$", line), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_flags_that_the_reliability_page_mentions_exist():
    known = set()
    for script in SCRIPTS:
        source = Path(importlib.import_module(script).__file__).read_text(encoding="utf8")
        known |= set(re.findall(r'"--([a-z0-9-]+)"', source))
    known |= set(re.findall(r'"--([a-z0-9-]+)"', (ROOT / "training/cli.py").read_text(encoding="utf8")))
    for page in ("reliability.md", "many-machines.md"):
        for flag in re.findall(r"`--([a-z][a-z0-9_-]+)", (ROOT / "docs" / page).read_text(encoding="utf8")):
            assert flag in known | OTHERS_FLAGS | {"verify", "requeue", "local_addr"}, f"{page} mentions --{flag}"
