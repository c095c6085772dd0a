"""The quickstart text is a pure function of its seed, and what is committed is what the generator gives."""

import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parent.parent / "recipes"
FILES = {"quickstart-text.txt": (1, 230_000), "quickstart-eval.txt": (2, 120_000)}  # as in quickstart_make.py


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch):
    """The module `quickstart_text`, imported from the recipes folder as the script does."""
    monkeypatch.syspath_prepend(str(RECIPES))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    import quickstart_text

    return quickstart_text


def test_one_seed_gives_one_text(generator):
    assert generator.text(7, 5_000) == generator.text(7, 5_000)
    assert generator.text(7, 5_000) != generator.text(8, 5_000)


@pytest.mark.parametrize("name", FILES)
def test_the_committed_file_is_what_its_seed_gives(generator, name):
    assert (RECIPES / name).read_bytes() == generator.text(*FILES[name]).encode()


def test_every_kind_of_document_is_free_of_empty_lines(generator):
    for kind, _ in generator.KINDS:
        for seed in range(50):
            assert "\n\n" not in kind(generator.Dice(seed)), kind.__name__


def test_calibration_and_evaluation_share_few_documents(generator):
    calibration, evaluation = (set(generator.documents(*FILES[name])) for name in FILES)
    assert len(calibration & evaluation) < 0.01 * len(evaluation)


def test_the_model_folder_is_small():
    assert sum(f.stat().st_size for f in (RECIPES / "quickstart-model").iterdir()) <= 4 * 2**20
