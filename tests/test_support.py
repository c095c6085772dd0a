"""docs/support.md is what trying gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compress.export.table import EXPORTERS
from tests import support
from tests.conftest import FAMILIES, ROOT, covered

PAGE = ROOT / "docs" / "support.md"


def told() -> dict[tuple[str, str], str]:
    """(format or family, exporter) -> the cell, of both tables."""
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    return {(row[0].strip("`"), name): c for row in lines for name, c in zip(EXPORTERS, row[1:], strict=True)}


@pytest.mark.parametrize("exporter", covered(EXPORTERS, "gguf", "gptq"))
def test_what_is_refused_is_a_dash_and_one_line(family: Any, exporter: str) -> None:
    rows = [(form, "llama", form, False) for form in support.FORMATS] + [(name, name, support.COMMON, False) for name in FAMILIES]
    rows += [(support.shaped(name), name, support.COMMON, True) for name in support.SHAPED]
    cells = told()
    for row, name, form, free in rows:
        refusal = support.refusal(exporter, family(name), form, free)
        assert (refusal is not None) == (cells[row, exporter] == support.REFUSED), row
        assert "\n" not in (refusal or ""), row


@pytest.mark.slow
def test_the_page_is_what_trying_gives(tmp_path: Path) -> None:
    assert support.page(tmp_path) == PAGE.read_text()
