"""What tests share: a tiny random model of every family, its tokenizer, a text, and the shipped assets where they are."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.nursery import Nursery

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for what tests start; tiny models only wait for a second thread
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # kernels of every shape that ever was, a gigabyte
    os.environ.setdefault(cache, "32")  # in the end, whose page tables every fork copies
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 272,
         "max_position_embeddings": 256}  # fmt: skip
SLIDING = {"head_dim": 16, "sliding_window": 16}
GROUPED = {"num_key_value_heads": 2}
IDS = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}

FAMILIES: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**SMALL, **GROUPED, **IDS),
    "mistral": lambda: transformers.MistralConfig(**SMALL, **GROUPED, **IDS, **SLIDING),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL, **GROUPED, **IDS, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, **GROUPED, **IDS, head_dim=16),
    "gemma2": lambda: transformers.Gemma2Config(**SMALL, **GROUPED, **IDS, **SLIDING, query_pre_attn_scalar=16),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SMALL, **GROUPED, **IDS, **SLIDING, query_pre_attn_scalar=16),
    "phi3": lambda: transformers.Phi3Config(**SMALL, **GROUPED, **IDS),
    "opt": lambda: transformers.OPTConfig(hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=272,
                                          max_position_embeddings=256, word_embed_proj_dim=64, **IDS),
    "gpt2": lambda: transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=272, n_positions=256, **IDS),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SMALL, **IDS),
    "mixtral": lambda: transformers.MixtralConfig(**SMALL, **GROUPED, **IDS, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**SMALL, **GROUPED, **IDS, head_dim=16, num_experts=4, num_experts_per_tok=2,
                                                     moe_intermediate_size=64),
    "roberta": lambda: transformers.RobertaConfig(**{**SMALL, "max_position_embeddings": 520}, **IDS),  # counted from the pad
}  # fmt: skip


LIGHT = ("compressed_tensors", "native", "gguf", "gptq")  # exporters that take no seconds, as tracing for onnx does


# One of each kind of architecture: grouped heads, norms of heads and around sublayers, transposed matrices, joined ones, biases,
# experts, an encoder.
KINDS_OF_FAMILIES = ("llama", "gemma3", "gpt2", "phi3", "opt", "mixtral", "roberta")


def covered(values: Iterable[Any], *chosen: Any) -> list[Any]:
    """Values for a test: the chosen ones in every run, and the others, which tell of the same kind, in the slow one."""
    known = list(values)
    assert set(chosen) <= set(known)
    return [value if value in chosen else rare(value) for value in known]


def rare(*values: Any) -> Any:
    """The values of one case of a test, for the slow run alone."""
    return pytest.param(*values, marks=pytest.mark.slow)


def make_model(folder: Path, config: Any, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **save: Any) -> Path:
    """A random model of a config, with wide enough weights that its logits differ from token to token, and a tokenizer."""
    torch.manual_seed(seed)
    kind = transformers.AutoModelForMaskedLM if config.model_type == "roberta" else transformers.AutoModelForCausalLM
    model = kind.from_config(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim >= 2:
                p.copy_(torch.randn_like(p) * (0.6 if "embed" in name or "wte" in name else 1.5 * p.shape[-1] ** -0.5))
    model.to(dtype).save_pretrained(folder, **save)
    make_tokenizer(folder)
    return folder


def saved(folder: Path, model: Any) -> Path:
    """A model with random matrices as a folder, in bf16, with a tokenizer; seed before it is made."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn_like(p) * 1.5 * p.shape[-1] ** -0.5)
    model.to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def make_tokenizer(folder: Path) -> None:
    """One token a byte; 256 begins, 257 ends, 258 pads."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"})
    fast.save_pretrained(folder)


def write_text(path: Path, tokens: int = 6_000) -> Path:
    """Bytes of words drawn at random: enough for any test."""
    generator = torch.Generator().manual_seed(1)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "red", "birds", "fly", "over", "seven", "hills", "."]
    picks = torch.randint(len(words), (tokens // 3,), generator=generator).tolist()
    path.write_text(" ".join(words[i] for i in picks))
    return path


NURSERY = pytest.StashKey[Nursery]()


def pytest_configure(config: pytest.Config) -> None:
    """Before tests are collected, so that no child of the nursery has anything of `compress`."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return  # deals tests out to others, and runs none
    import transformers.quantizers.auto  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401  a second of imports, which pytest needs itself

    config.stash[NURSERY] = Nursery()


def pytest_collection_finish() -> None:
    """What was imported stays: a million objects that the garbage collector need not look through again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000)


def pytest_unconfigure(config: pytest.Config) -> None:
    if NURSERY in config.stash:
        config.stash[NURSERY].close()


@pytest.fixture(scope="session")
def nursery(request: pytest.FixtureRequest) -> Nursery:
    """Where children come from that need torch and transformers."""
    return request.config.stash[NURSERY]


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """family(name, dtype=bf16, blocks=2) -> folder of a tiny random model, made once a session."""
    made: dict[tuple[str, torch.dtype, int], Path] = {}

    def get(name: str, dtype: torch.dtype = torch.bfloat16, blocks: int = 2) -> Path:
        if (name, dtype, blocks) not in made:
            config = FAMILIES[name]()
            if blocks != config.num_hidden_layers:
                config.num_hidden_layers = blocks
                if getattr(config, "layer_types", None):
                    config.layer_types = config.layer_types[:blocks]
            made[name, dtype, blocks] = make_model(tmp_path_factory.mktemp(name), config, dtype)
        return made[name, dtype, blocks]

    return get


@pytest.fixture(scope="session")
def baked(family: Any, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """baked(family, exporter, {pass: options}, **the exporter's options) -> the outcome, made once a session: only to read."""
    made: dict[str, Any] = {}

    def get(name: str, exporter: str, step: dict[str, Any], **options: Any) -> Any:
        from tests.cooking import bake

        key = json.dumps([name, exporter, step, options])
        if key not in made:
            made[key] = bake(tmp_path_factory.mktemp(f"{name}-{exporter}"), family(name), text, exporter, step, **options)
        return made[key]

    return get


@pytest.fixture(scope="session")
def mixed(family: Any, baked: Any) -> Any:
    """mixed(family) -> native, with formats of every kind among its matrices: others for each family, and from `more` on."""

    def get(name: str, more: int = 0, **pins: str) -> Any:
        from tests.cooking import medley

        return baked(name, "native", medley(family(name), 7 * list(FAMILIES).index(name) + more, **pins))

    return get


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real models and texts, beside the repository or where COMPRESS_ASSETS says; skips where it is absent."""
    folder = Path(os.environ.get("COMPRESS_ASSETS", ROOT.parent / "shared" / "assets"))
    if not folder.is_dir():
        pytest.skip(f"needs real models and texts; none at {folder} (set COMPRESS_ASSETS)")
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Matrix libraries split sums by threads: for what is compared to the last bit, or nearly."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _quiet_transformers() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="session", autouse=True)
def _every_machine_computes_alike() -> Iterator[None]:
    """Here a model is computed in its own dtype, whatever the machine is fast at; test_speed.py lets it choose."""
    from compress.model import speed

    measured = speed.matrix_speed
    speed.matrix_speed = lambda dtype: 1e11  # type: ignore[assignment]
    yield
    speed.matrix_speed = measured


@pytest.fixture(scope="session", autouse=True)
def _texts_are_tokenized_once() -> Iterator[None]:
    """Windows are a function of text, tokenizer and options; most tests ask for the same ones, each time in a child process."""
    from compress.prepare import Prepared

    read, known = Prepared._tokens, {}

    def remembered(self: Prepared, which: str) -> Any:
        windows = getattr(self.recipe.document.data, which)
        if windows is None or not all(source.text for source in windows.sources or [windows]):
            return read(self, which)
        texts = [self.recipe.base / source.text for source in windows.sources or [windows]]
        files = [*texts, *(self.model.folder / name for name in ("tokenizer.json", "tokenizer_config.json", "config.json"))]
        if not all(file.is_file() and not file.is_symlink() and file.stat().st_size < 1 << 20 for file in files):
            return read(self, which)
        key = repr(windows), self.foreseen.vocabulary, *(hashlib.sha256(file.read_bytes()).digest() for file in files)
        if key not in known:
            known[key] = read(self, which)
        return known[key]

    Prepared._tokens = remembered  # type: ignore[method-assign]
    yield
    Prepared._tokens = read  # type: ignore[method-assign]


@pytest.fixture(scope="session", autouse=True)
def _graphs_are_traced_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    from tests.tracing import shared

    place = tmp_path_factory.getbasetemp()
    folder = (place.parent if "PYTEST_XDIST_WORKER" in os.environ else place) / "graphs"  # of all processes of a run
    folder.mkdir(exist_ok=True)
    with shared(folder):
        yield


@pytest.fixture
def cpu(compiled: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Launches of kernels run here, on tensors of the CPU; `compiled` is a fixture of the file, see `emulator.once`."""
    found = compiled(request.node.get_closest_marker("slow") is not None)
    yield found.install(monkeypatch)
    found.seed = 0


# --- the command line on a folder of its own --------------------------------------------------------------------------

RECIPE = """\
model: ./model
out: ./out
seed: 0
data:
  calibration: {text: words.txt, sequences: 8, length: 32}
  evaluation: {text: words.txt, sequences: 4, length: 32}
passes:
  - quantize:
      format: "int4:g32"
      pins: {"lm_head": "int8:g32"}
export:
  - compressed_tensors: {}
"""


@dataclass(frozen=True)
class Result:
    """What one command gave: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line in which a command told the user's mistake, without the program's name."""
        assert self.code == 2, (self.code, self.err)
        assert self.err.startswith("compress: "), self.err
        assert self.err.count("\n") == 1, self.err
        return self.err.removeprefix("compress: ").strip()


class Project:
    """A folder with a tiny model, a text and a recipe; calling it runs the command line in this process."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]):
        self.folder, self._capsys = folder, capsys
        self.model, self.text, self.recipe = folder / "model", folder / "words.txt", folder / "recipe.yaml"
        self.out = folder / "out"
        self.artifact = self.out / "compressed_tensors"

    @staticmethod
    def make(folder: Path, model: Path, text: Path) -> Path:
        """Fill a folder; returns the recipe."""
        shutil.copytree(model, folder / "model")
        shutil.copyfile(text, folder / "words.txt")
        (folder / "recipe.yaml").write_text(RECIPE)
        return folder / "recipe.yaml"

    def __call__(self, *arguments: str | Path) -> Result:
        from compress.cli import main

        self._capsys.readouterr()
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as e:
            code = int(e.code or 0)
        return Result(code, *self._capsys.readouterr())

    def run(self, *sets: str, out: Path | None = None) -> Result:
        """`compress run` with overrides."""
        options = [x for s in sets for x in ("--set", s)] + (["--out", str(out)] if out else [])
        return self("run", self.recipe, *options)

    def plan(self, *sets: str) -> Result:
        return self("plan", self.recipe, *(x for s in sets for x in ("--set", s)))

    def refused(self, step: str) -> str:
        """The line, pointing into the recipe, in which `plan` refuses a step in front of the recipe's own."""
        self.edit("passes:\n", f"passes:\n  - {step}\n")
        line = self.plan().line
        assert line.startswith(str(self.recipe))
        return line

    def edit(self, old: str, new: str) -> None:
        """Replace a text in the recipe, where it stands exactly once."""
        text = self.recipe.read_text()
        assert text.count(old) == 1, old
        self.recipe.write_text(text.replace(old, new))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def project(
    tmp_path: Path, family: Any, text: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> Project:
    """A llama with its recipe: of one block, or as many as the LAYERS of the test's file."""
    Project.make(tmp_path, family("llama", blocks=getattr(request.module, "LAYERS", 1)), text)
    return Project(tmp_path, capsys)
