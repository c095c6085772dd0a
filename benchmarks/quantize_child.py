"""One tool, one quantization, measured from inside: run by quantize_vs_peers.py and real_models.py in the tool's environment.

    python quantize_child.py JOB.json

The job names the tool, the model's folder, the tokens, the format, and a folder for the result. The meter runs from before the
model is loaded until its weights are quantized; imports come before it, and the dense copy of the weights that the judge needs is
written after it. Peak memory is VmHWM, which starts at zero with this process; ru_maxrss would start at the parent's peak.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()
Weights = dict[str, Any]  # parameter name -> tensor; torch is imported by the tool, not here


@dataclass(frozen=True)
class Job:
    """What to quantize and how; paths as text, since this travels as JSON between environments."""

    tool: str
    model: str
    tokens: str
    text: str
    sequences: int
    length: int
    bits: int
    group: int
    symmetric: bool
    options: dict[str, Any]
    out: str
    bos: bool = False  # a begin-of-text token in front of every window

    @property
    def format(self) -> str:
        """The format in our own spelling: ``int4:g64`` or ``int4:g64:asym``."""
        return f"int{self.bits}:g{self.group}" + ("" if self.symmetric else ":asym")


@dataclass(frozen=True)
class Measured:
    """Seconds and megabytes of the quantization phase; `imports_*` of what came before it."""

    wall_s: float
    cpu_s: float
    peak_mb: float
    imports_wall_s: float
    imports_cpu_s: float
    imports_mb: float
    version: str


class Meter:
    """Wall time, CPU time (user and system, of this process and its children) and peak memory since its creation."""

    def __init__(self) -> None:
        self.imports_mb = peak_mb()
        self.imports_cpu = cpu_seconds()
        self.imports_wall = time.perf_counter() - STARTED
        self.begin = time.perf_counter()

    def stop(self, version: str) -> Measured:
        """The figures up to now."""
        return Measured(
            wall_s=time.perf_counter() - self.begin,
            cpu_s=cpu_seconds() - self.imports_cpu,
            peak_mb=max(peak_mb(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024),
            imports_wall_s=self.imports_wall,
            imports_cpu_s=self.imports_cpu,
            imports_mb=self.imports_mb,
            version=version,
        )


def cpu_seconds() -> float:
    """User and system seconds of this process and of the children it has waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def peak_mb() -> float:
    """The most memory this process has held, in MB."""
    try:
        lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))


def run_llmcompressor(job: Job) -> tuple[Measured, Weights]:
    """GPTQModifier through `oneshot`, one sequence a batch (its default); returns the weights it rounded in place."""
    import llmcompressor
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM

    meter = Meter()
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    args = QuantizationArgs(
        num_bits=job.bits, type="int", symmetric=job.symmetric, strategy="group", group_size=job.group, **job.options
    )
    modifier = GPTQModifier(config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=args)}, ignore=["lm_head"])
    rows = [{"input_ids": row, "attention_mask": [1] * job.length} for row in tokens(job).tolist()]
    oneshot(
        model=model,
        dataset=Dataset.from_list(rows),
        recipe=modifier,
        max_seq_length=job.length,
        num_calibration_samples=job.sequences,
        shuffle_calibration_samples=False,
    )
    measured = meter.stop(llmcompressor.__version__)
    return measured, {n: p.detach() for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n}


def run_gptqmodel(job: Job) -> tuple[Measured, Weights]:
    """GPTQModel.quantize on the CPU with its defaults; returns the layers of its saved checkpoint, dequantized in fp32."""
    import gptqmodel
    import torch
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    meter = Meter()
    config = QuantizeConfig(bits=job.bits, group_size=job.group, sym=job.symmetric, device="cpu", **job.options)
    model = GPTQModel.load(job.model, config, dtype=torch.float32)
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in tokens(job)]
    model.quantize(rows, batch_size=1)
    measured = meter.stop(gptqmodel.__version__)
    saved = str(Path(job.out) / "gptq")
    model.save(saved)
    loaded = GPTQModel.load(saved, device="cpu", backend=BACKEND.TORCH)
    packed = {n: m for n, m in loaded.model.named_modules() if hasattr(m, "qweight")}
    return measured, {f"{name}.weight": gptq_weight(module) for name, module in packed.items()}


def gptq_weight(module: Any) -> Any:
    """(out, in) fp32 weight of one packed GPTQModel layer; scales widened first, so nothing is lost in fp16 products."""
    module.scales = module.scales.float()
    return module.dequantize_weight().T.float()


def run_autoround(job: Job) -> tuple[Measured, Weights]:
    """AutoRound on the CPU; the option `iters` says how long each block's rounding is learned. Returns what it put in place."""
    os.environ["AR_DISABLE_DATASET_SUBPROCESS"] = "1"
    import auto_round
    import torch
    from auto_round import AutoRound
    from auto_round.schemes import QuantizationScheme
    from transformers import AutoModelForCausalLM, AutoTokenizer

    register_windows(tokens(job))
    meter = Meter()
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    rounder = AutoRound(
        model,
        tokenizer=AutoTokenizer.from_pretrained(job.model),
        scheme=QuantizationScheme(bits=job.bits, group_size=job.group, sym=job.symmetric, data_type="int", act_bits=16),
        dataset="windows",
        nsamples=job.sequences,
        seqlen=job.length,
        device_map="cpu",
        amp=False,
        enable_torch_compile=False,
        **job.options,
    )
    quantized, _ = rounder.quantize()
    measured = meter.stop(auto_round.__version__)
    linears = {n: m for n, m in quantized.named_modules() if ".layers." in n and isinstance(m, torch.nn.Linear)}
    return measured, {f"{name}.weight": module.weight.detach() for name, module in linears.items()}


def register_windows(ids: Any) -> None:
    """Makes our calibration tokens known to AutoRound as the data set ``windows``; its search takes nothing but a name."""
    import torch
    from auto_round.calib_dataset import CALIB_DATASETS
    from datasets import Dataset

    def windows(*_: Any, **__: Any) -> Dataset:
        return Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})

    CALIB_DATASETS["windows"] = windows


def tokens(job: Job) -> Any:
    """(sequences, length) int64 tokens, the same for every tool."""
    from safetensors.torch import load_file

    return load_file(job.tokens)["tokens"]


def run_ours(job: Job) -> tuple[Measured, Weights]:
    """`compress run` with one pass, in this process; returns what its compressed-tensors folder holds, dequantized.

    What is timed includes committing every block to disk, which the peers do not do. Writing the artifact and comparing its
    logits come after it, as a second run that finds the step finished; the peers' saving is not timed either.
    """
    import compress
    from compress import pipeline

    out = Path(job.out) / "run"
    meter = Meter()
    pipeline.run(write_recipe(job, out, exports=[]))
    measured = meter.stop(getattr(compress, "__version__", "of this clone"))
    pipeline.run(write_recipe(job, out, exports=[{"compressed_tensors": {}}]))
    return measured, unpack_compressed_tensors(out / "compressed_tensors")


def write_recipe(job: Job, out: Path, exports: list[dict[str, Any]]) -> Path:
    """The recipe file for the job: every matrix of the blocks in `job.format`, the head as it is."""
    recipe = {
        "model": job.model,
        "out": str(out),
        "seed": 0,
        "data": {"calibration": {"text": job.text, "sequences": job.sequences, "length": job.length, "bos": job.bos}},
        "passes": [{"quantize": {"method": "gptq", "format": job.format, **job.options}}],
        "export": exports,
    }
    path = Path(job.out) / "recipe.yaml"
    path.write_text(json.dumps(recipe, indent=1), "utf-8")  # JSON is YAML
    return path


def unpack_compressed_tensors(folder: Path) -> Weights:
    """Weights of a pack-quantized folder, decoded by the compressed-tensors package and not by our own code."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from safetensors.torch import load_file

    stored: Weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored |= load_file(file)
    weights: Weights = {}
    for name in (key.removesuffix("_packed") for key in stored if key.endswith(".weight_packed")):
        packed, scale = stored[f"{name}_packed"], stored[f"{name}_scale"].float()
        shape = stored[f"{name}_shape"]
        bits = packed.shape[1] * 32 // int(shape[1])
        codes = unpack_from_int32(packed, bits, shape).float()
        if (zero := stored.get(f"{name}_zero_point")) is not None:
            zeros = unpack_from_int32(zero, bits, (shape[0], scale.shape[1]), packed_dim=0).float()
        else:
            zeros = scale.new_zeros(scale.shape)
        groups = codes.view(*scale.shape, -1)
        weights[name] = ((groups - zeros[..., None]) * scale[..., None]).view(codes.shape)
    return weights


TOOLS: dict[str, Callable[[Job], tuple[Measured, Weights]]] = {
    "ours": run_ours,
    "llmcompressor": run_llmcompressor,
    "gptqmodel": run_gptqmodel,
    "autoround": run_autoround,
}


def main(job_file: str) -> None:
    """Runs the job and leaves ``measured.json`` and ``weights.safetensors`` in its folder."""
    job = Job(**json.loads(Path(job_file).read_text("utf-8")))
    measured, weights = TOOLS[job.tool](job)
    from safetensors.torch import save_file

    out = Path(job.out)
    save_file({name: w.float().contiguous() for name, w in weights.items()}, out / "weights.safetensors")
    (out / "measured.json").write_text(json.dumps(asdict(measured), indent=1), "utf-8")
    sys.stdout.flush()
    os._exit(0)  # some tools leave threads that keep the process alive


if __name__ == "__main__":
    main(sys.argv[1])
