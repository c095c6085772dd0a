"""docs/support.md is what trying gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compress.export.table import EXPORTERS
from tests import support
from tests.conftest import FAMILIES, ROOT

PAGE = ROOT / "docs" / "support.md"


def told() -> dict[tuple[str, str], str]:
    """(format or family, exporter) -> the cell, of both tables."""
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    return {(row[0].strip("`"), name): c for row in lines for name, c in zip(EXPORTERS, row[1:], strict=True)}


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_what_is_refused_is_a_dash(family: Any, exporter: str) -> None:
    cells = told()
    for form in support.FORMATS:
        refused = support.refusal(exporter, family("llama"), form) is not None
        assert refused == (cells[form, exporter] == support.REFUSED), form
    for name in FAMILIES:
        refused = support.refusal(exporter, family(name), support.COMMON) is not None
        assert refused == (cells[name, exporter] == support.REFUSED), name


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_a_refusal_is_one_line(family: Any, exporter: str) -> None:
    for form in support.FORMATS:
        assert "\n" not in (support.refusal(exporter, family("llama"), form) or "")


@pytest.mark.slow
def test_the_page_is_what_trying_gives(tmp_path: Path) -> None:
    assert support.page(tmp_path) == PAGE.read_text()
