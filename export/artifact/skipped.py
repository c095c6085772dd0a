"""What config.json says that tokens leave out, and what of it is believed.

The thresholds and factors beside a matrix say, by which are there and by their shapes, how neurons are chosen and how many there
are. config.json repeats that, and adds the activation and the modules whose rows and columns go unread; so it can be wrong where
the weights are right, and a reader that believed it would compute another model. What it adds follows from the model: the
activation is the one of its own config, and the modules are the matrices beside the one that chooses, of the shapes that its
neurons ask for. Each reader compares that before anything is computed, and takes no part of it from the text alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import FormatError, ModelError, one_line
from compress.export.artifact.config import declared
from compress.formats.sparsity import SUFFIXES, Sparsity

Shaped = Callable[[str], tuple[int, int] | None]  # a module on disk -> [out, in] of its matrix; None where it is none of a block


@dataclass(frozen=True)
class Skipped:
    """What a token leaves out by one matrix. rows: modules whose rows of silent neurons are not read; columns: those whose
    columns are not."""

    how: Sparsity
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()

    def text(self) -> dict[str, Any]:
        """As it stands in config.json."""
        return {"by": str(self.how), "rows": list(self.rows), "columns": list(self.columns)}


def sparsities(folder: Path) -> dict[str, Skipped]:
    """Module on disk -> what a token leaves out by it, as a native artifact's config.json says; empty where none does."""
    return sparsities_in(declared(folder), folder / "config.json")


def sparsities_in(config: Mapping[str, Any], path: Path = Path("config.json")) -> dict[str, Skipped]:
    """The same from a `quantization_config`; ModelError where it is not as we write it."""
    held, found = config.get("sparsity", {}), dict[str, Skipped]()
    if not isinstance(held, dict):
        raise ModelError(f"{path}: its quantization_config is broken: 'sparsity' is to map modules to what they leave out")
    for module, said in held.items():
        names = [said.get(key) for key in ("rows", "columns")] if isinstance(said, dict) else []
        if len(names) != 2 or not all(isinstance(n, list) and all(isinstance(m, str) for m in n) for n in names):
            raise ModelError(f"{path}: 'sparsity' of '{one_line(module)}' is broken: it is to say by, rows and columns")
        try:
            found[module] = Skipped(Sparsity.parse(str(said.get("by"))), tuple(said["rows"]), tuple(said["columns"]))
        except FormatError as e:
            raise ModelError(f"{path}: '{one_line(module)}': {one_line(str(e))}") from None
    return found


def of_weights(folder: Path, tensors: Iterable[str]) -> dict[str, Skipped]:
    """`sparsities`, of a folder whose weight files hold these tensors; ModelError where thresholds or factors lie there that
    config.json says nothing of."""
    path, skipped = folder / "config.json", sparsities(folder)
    known = {f"{stem}.{suffix}" for stem in skipped for suffix in SUFFIXES}
    stray = next((name for name in tensors if name.rpartition(".")[2] in SUFFIXES and name not in known), None)
    if stray is not None:
        raise ModelError(f"{path}: its 'sparsity' does not account for '{one_line(stray)}'; config and weights do not belong "
                         "together")  # fmt: skip
    return skipped


def check(skipped: Mapping[str, Skipped], shaped: Shaped, activation: str, path: Path) -> None:
    """ModelError where what config.json says of sparsity cannot be what was exported with this model.

    activation: the model's own, a key of `ACTIVATIONS`, or nothing where that is not known. path: of config.json, for messages.
    """
    for stem, said in skipped.items():
        strange = next((name for name in (stem, *said.rows, *said.columns) if shaped(name) is None), None)
        why = contradiction(stem, said, shaped, activation) if strange is None else None
        if strange is not None:
            raise ModelError(f"{path}: leaves out a part of '{one_line(strange)}', which is no matrix of this model's blocks")
        if why:
            raise ModelError(f"{path}: 'sparsity' of '{one_line(stem)}' {why}; it is not what was exported, export again")
    if len({said.how.kind == "teal" for said in skipped.values()}) > 1:
        raise ModelError(f"{path}: 'sparsity' leaves out inputs of some matrices and neurons of others; one kind is exported")


def contradiction(stem: str, said: Skipped, shaped: Shaped, activation: str) -> str | None:
    """What of one matrix cannot be, as words that follow its name; None where all can."""
    shape, how, home = shaped(stem), said.how, stem.rpartition(".")[0]
    assert shape is not None
    if how.kind == "teal":
        return None if said == Skipped(how, (), (stem,)) else "is teal, which leaves out columns of the matrix itself and no more"
    if how.kind == "cats" and how.act != activation:
        return f"chooses by {how.act}, and the model's neurons have {activation or 'another activation'}"
    stray = next((name for name in (*said.rows, *said.columns) if name.rpartition(".")[0] != home), None)
    if stray is not None:
        return f"names '{one_line(stray)}', which is not beside it"
    if (stem in said.rows) != (how.joined or how.kind == "predictor") or len(set(said.rows)) != len(said.rows):
        return f"names rows that do not go with {how}"
    if any(shaped(name) != shape for name in said.rows):
        return f"names rows of a matrix that is not {list(shape)}, as it is"
    neurons = how.neurons(shape)
    if [shaped(name)[1:] for name in said.columns] != [(neurons,)] or set(said.columns) & {stem, *said.rows}:  # type: ignore[index]
        return f"names columns of matrices that are not the one behind its {neurons} neurons"
    return None
