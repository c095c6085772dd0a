"""The examples of the documentation are true."""

from __future__ import annotations

import doctest
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.model.model import open_model
from tests.conftest import ROOT
from tests.pass_laws import attempt, check_pass, lively


def test_the_examples_of_the_format_specification_run() -> None:
    outcome = doctest.testfile(str(ROOT / "docs" / "formats.md"), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert outcome.attempted > 10
    assert outcome.failed == 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_the_pass_of_the_page_on_passes_keeps_the_laws(family: Any, tmp_path: Path, name: str) -> None:
    """Its code as it stands on the page, joined; and it changes something in every family."""
    page = (ROOT / "docs" / "writing-a-pass.md").read_text(encoding="utf-8")
    blocks = [b for b in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "PASSES" not in b]
    code = "\n".join(textwrap.indent(b, "    ") if b.startswith("def ") else b for b in blocks)
    space: dict[str, Any] = {"__name__": "temper"}
    exec(compile(code, "writing-a-pass.md", "exec"), space)
    temper, model = space["Temper"](share=0.5), open_model(str(lively(family(name), tmp_path / "model")))
    after = attempt(temper, model, tmp_path / "run")
    assert sum(not torch.equal(after.dense.read(n), model.checkpoint.read(n)) for n in after.dense.written) >= 4
    if name == "llama":
        check_pass(temper, family(name), tmp_path / "laws")
