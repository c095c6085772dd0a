"""One peer, one budget, allocated and quantized: run by allocate_vs_peers.py in the peer's own environment.

    python allocate_child.py JOB.json

Leaves in the job's folder ``weights.safetensors``, the weights of the blocks' linear layers as the peer's own code dequantizes
them, and ``result.json``: what every layer got, the average bits that takes, seconds and peak memory. The meter runs from before
the model is loaded until its weights are quantized. A model whose hidden states are rotated has other embeddings and norms than
the original, and perhaps hooks: that one is scored here, as the peer leaves it, by the same judge.

Bits count a scale of 16 bits for every group, and a zero point as wide as the weights where the grid has one. Each peer counts
otherwise, and gets its target in its own count, so that what it may spend is the same to the bit:

    AutoRound   adds a zero point to every group, of symmetric grids as well
    ModelOpt    leaves scales out unless a format says what it takes, and counts the output head, which stays dense
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantize_child import Measured, Meter, Weights, register_windows

GROUP = 64
WIDTHS = (2, 3, 4, 8)
SCALE_BITS = 16
DENSE_BITS = 16


@dataclass(frozen=True)
class Job:
    """What to allocate: average `bits` with scales, for the linear layers of the blocks; `tokens` and `judged` are .pt files,
    int64 [n, t]."""

    tool: str
    model: str
    tokens: str
    judged: str
    bits: float
    options: dict[str, Any]
    out: str

    @property
    def ids(self) -> Any:
        """The calibration tokens."""
        import torch

        return torch.load(self.tokens)


@dataclass(frozen=True)
class Layer:
    """What one linear layer of `numel` weights got; 16 bits mean that it stayed dense. `extra`: further bits it has to store."""

    bits: int
    numel: int
    symmetric: bool = True
    extra: int = 0

    @property
    def stored(self) -> int:
        """Bits that it takes, scales and zero points counted."""
        if self.bits >= DENSE_BITS:
            return self.numel * DENSE_BITS
        grid = SCALE_BITS + (0 if self.symmetric else self.bits)
        return self.numel * self.bits + self.numel // GROUP * grid + self.extra


Result = tuple[Measured, Weights, dict[str, Layer], dict[str, Any]]  # the last: what else the peer has to say of what it made


def linears(model: Any) -> dict[str, Any]:
    """The linear layers inside the blocks, whatever the peer has made of their classes."""
    import torch

    return {n: m for n, m in model.named_modules() if ".layers." in n and isinstance(m, torch.nn.Linear)}


def stored_bytes(folder: Path, stems: Iterable[str]) -> int:
    """Bytes of the tensors, in a folder's safetensors files, that belong to the modules of these paths."""
    owners, total = tuple(f"{stem}." for stem in stems), 0
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        header.pop("__metadata__", None)
        total += sum(e["data_offsets"][1] - e["data_offsets"][0] for name, e in header.items() if name.startswith(owners))
    return total


def load_model(job: Job) -> Any:
    """The original in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)


# --- AutoRound ----------------------------------------------------------------------------------------------------------


def run_autoround(job: Job) -> Result:
    """AutoScheme's search, then AutoRound; `iters` 0 is its rounding to nearest, `symmetric` the kind of grid.

    Budgets of one label share what the search has scored, as ours do. AutoRound 0.16.1 rotates in torch's inference mode, and its
    AWQ then stops at tensors that may not be changed in place; without that mode the two go together.
    """
    import torch

    torch.inference_mode = torch.no_grad
    os.environ["AR_DISABLE_DATASET_SUBPROCESS"] = "1"
    os.environ["AR_AUTO_SCHEME_CACHE"] = f"{job.out.removesuffix(f'-{job.bits}')}-scores"
    import auto_round
    from auto_round import AutoRound, AutoScheme
    from auto_round.schemes import QuantizationScheme
    from transformers import AutoTokenizer

    register_windows(job.ids)
    symmetric = job.options["symmetric"]
    meter = Meter()
    model, ids = load_model(job), job.ids
    options = [QuantizationScheme(bits=b, group_size=GROUP, sym=symmetric, data_type="int", act_bits=16) for b in WIDTHS]
    data = {"dataset": "windows", "nsamples": len(ids), "seqlen": ids.shape[1]}
    rounder = AutoRound(
        model,
        tokenizer=AutoTokenizer.from_pretrained(job.model),
        scheme=AutoScheme(avg_bits=autoround_target(job.bits, symmetric), options=options, **data),
        iters=job.options["iters"],
        alg_configs=job.options.get("algorithm"),
        device_map="cpu",
        amp=False,
        enable_torch_compile=False,
        **data,
    )
    quantized, schemes = rounder.quantize()
    measured = meter.stop(auto_round.__version__)
    modules = linears(quantized)
    layers = {n: Layer(schemes[n]["bits"], m.weight.numel(), schemes[n]["sym"]) for n, m in modules.items()}
    weights = {f"{n}.weight": m.weight.detach().clone() for n, m in modules.items()}
    more: dict[str, Any] = {"score": judged(job, quantized)} if "hadamard" in job.options.get("algorithm", "") else {}
    saved = Path(job.out) / "saved"
    rounder.save_quantized(str(saved), format="auto_round")
    return (
        measured,
        weights,
        layers,
        {**more, "bytes": stored_bytes(next(f.parent for f in saved.rglob("*.safetensors")), layers)},
    )


def judged(job: Job, model: Any) -> dict[str, float]:
    """The score of a whole model that is not the original with other matrices."""
    import torch
    from scoring import Judge

    return asdict(Judge(Path(job.model), torch.load(job.judged)).whole(model))


def autoround_target(bits: float, symmetric: bool) -> float:
    """Average bits as AutoScheme counts them, which gives every group a zero point, for `bits` as they are stored."""
    scale = SCALE_BITS / GROUP
    return (bits - scale) * (1 + 1 / GROUP) + scale if symmetric else bits


# --- ModelOpt -----------------------------------------------------------------------------------------------------------


def run_modelopt(job: Job) -> Result:
    """AutoQuantize by gradients over weight-only formats of all widths, calibrated by the `algorithm` of the options.

    The search takes no GPTQ, and GPTQ run on the plan that it finds takes each group's largest weight for its range, which at 2
    bits is far worse than `mse`.
    """
    import modelopt
    import modelopt.torch.quantization as mtq

    meter = Meter()
    model = load_model(job).eval()
    batches = [{"input_ids": rows, "labels": rows} for rows in job.ids.split(4)]
    model, _ = mtq.auto_quantize(
        model,
        constraints={"effective_bits": modelopt_target(model, job.bits)},
        quantization_formats=[modelopt_format(b, job.options["algorithm"]) for b in WIDTHS],
        data_loader=batches,
        forward_step=lambda whole, batch: whole(**batch),
        loss_func=lambda output, _: output.loss,
        disabled_layers=["*lm_head*"],
        num_calib_steps=len(batches),
        num_score_steps=len(batches),
    )
    measured = meter.stop(modelopt.__version__)
    modules = linears(model)
    weights = {f"{n}.weight": modelopt_weight(m) for n, m in modules.items()}
    return measured, weights, {n: modelopt_layer(m) for n, m in modules.items()}, {}


def modelopt_format(bits: int, algorithm: Any) -> dict[str, Any]:
    """Weights alone, in groups; the bits told to the search have the scales in them."""
    weight = {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": bits, "block_sizes": {-1: GROUP}}}
    inputs = {"quantizer_name": "*input_quantizer", "enable": False}
    return {"quant_cfg": [weight, inputs], "algorithm": algorithm, "effective_bits": bits + SCALE_BITS / GROUP}


def modelopt_target(model: Any, bits: float) -> float:
    """Average bits over the blocks' linear layers and the dense head, which it counts in any case."""
    inside = sum(m.weight.numel() for m in linears(model).values())
    head = model.get_output_embeddings().weight.numel()
    return (bits * inside + DENSE_BITS * head) / (inside + head)


def modelopt_weight(module: Any) -> Any:
    """The weight as the layer uses it, a scale of its inputs (AWQ) taken into it."""
    weight = module.weight.detach()
    if module.weight_quantizer.is_enabled:
        weight = module.weight_quantizer(weight).detach()
    before = getattr(module.input_quantizer, "pre_quant_scale", None)
    return weight if before is None else weight * before.detach()


def modelopt_layer(module: Any) -> Layer:
    """What the search chose for a layer; scales of inputs are counted, since nothing here folds them away."""
    quantizer, before = module.weight_quantizer, getattr(module.input_quantizer, "pre_quant_scale", None)
    extra = 0 if before is None else before.numel() * SCALE_BITS
    return Layer(quantizer.num_bits if quantizer.is_enabled else DENSE_BITS, module.weight.numel(), extra=extra)


TOOLS: dict[str, Callable[[Job], Result]] = {"autoround": run_autoround, "modelopt": run_modelopt}
# Each peer as its defaults are and at its best: tool -> label -> options.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "autoround": {
        "iters0": {"iters": 0, "symmetric": True},
        "iters50": {"iters": 50, "symmetric": True},
        "iters50-asym": {"iters": 50, "symmetric": False},
        "hadamard,awq,signround": {"iters": 50, "symmetric": True, "algorithm": "hadamard,awq,signround"},
        "hadamard,awq,signround-asym": {"iters": 50, "symmetric": False, "algorithm": "hadamard,awq,signround"},
    },
    "modelopt": {
        "max": {"algorithm": {"method": "max"}},
        "mse": {"algorithm": {"method": "mse"}},
        "awq-clip": {"algorithm": {"method": "awq_clip"}},
    },
}


def main(job_file: str) -> None:
    """Runs the job and leaves its result in the job's folder."""
    job = Job(**json.loads(Path(job_file).read_text("utf-8")))
    measured, weights, layers, more = TOOLS[job.tool](job)
    from safetensors.torch import save_file

    out = Path(job.out)
    save_file({name: w.float().contiguous() for name, w in weights.items()}, out / "weights.safetensors")
    result = {
        "bits": sum(layer.stored for layer in layers.values()) / sum(layer.numel for layer in layers.values()),
        "layers": {name: asdict(layer) for name, layer in layers.items()},
        "bytes": None,
        "score": None,
        **more,
        **asdict(measured),
    }
    (out / "result.json").write_text(json.dumps(result, indent=1), "utf-8")
    sys.stdout.flush()
    os._exit(0)  # some tools leave threads that keep the process alive


if __name__ == "__main__":
    main(sys.argv[1])
