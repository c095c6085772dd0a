"""The examples of the specification are true."""

import doctest

from tests.conftest import ROOT


def test_the_examples_of_the_format_specification_run() -> None:
    outcome = doctest.testfile(str(ROOT / "docs" / "formats.md"), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert outcome.attempted > 10
    assert outcome.failed == 0
