"""One distillation through `compress` and through TRL's GKDTrainer, side by side: KL on held-out text, peak memory, CPU seconds.

python benchmarks/distill_vs_trl.py --model MODEL --calibration TEXT --evaluation TEXT --trl-python VENV/bin/python \\
    [--steps 40] [--batch 8] [--rates 1e-3 3e-3] [--trl-rates 1e-4 3e-4] [--lora 16 --format int3:g64] [--save DIR]

Half of every MLP's neurons go, by magnitude and without compensation, so that there is much to win back. Both students start at
those weights and learn from the same windows, as many a step, in as many steps, by forward KL at temperature 1 (TRL: lmbda 0,
beta 0), with AdamW without decay, a cosine after a warm-up, blocks run again for the way back, and weights in fp32 that are
stored as the model's are. Our rate is a share of each tensor's size, TRL's is absolute and one for all: several of both are
tried. Peaks are of anonymous memory in the process that trains, beyond what its imports take; asking the teacher is part of ours,
writing the result of neither. Linux.

With `--lora` the matrices of the blocks are rounded to a format instead, stay as they are, and only low-rank factors beside them
learn: ours beside the packed matrices, PEFT's (every linear layer, alpha equal to the rank) beside the same matrices, dense.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from meter import Meter, asked

HERE = Path(__file__).resolve().parent
DAMAGE = {"prune": {"mlp": 0.5, "method": "magnitude", "compensate": False}}


# --- the processes that are measured ---------------------------------------------------------------------------------


def trl_child(job: dict[str, Any]) -> None:
    """Train a folder's model; runs in TRL's environment."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    ids = torch.load(job["ids"])
    meter = Meter()
    student = AutoModelForCausalLM.from_pretrained(job["student"], dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(job["teacher"], dtype="auto")
    config = GKDConfig(
        output_dir=job["out"], max_steps=job["steps"], per_device_train_batch_size=job["batch"], learning_rate=job["rate"],
        lr_scheduler_type="cosine", warmup_steps=job["warmup"], adam_beta2=0.95, weight_decay=0.0, max_grad_norm=0.0,
        gradient_checkpointing=True, bf16=False, lmbda=0.0, beta=0.0, temperature=1.0, use_cpu=True, report_to=[],
        save_strategy="no", logging_steps=1000, disable_tqdm=True, seed=0, max_length=None,
    )  # fmt: skip

    def collate(rows: list[Any]) -> dict[str, Any]:
        some = torch.tensor([row["input_ids"] for row in rows])
        return {"input_ids": some, "attention_mask": torch.ones_like(some), "labels": some.clone(),
                "prompts": some[:, :1], "prompt_attention_mask": torch.ones_like(some[:, :1])}  # fmt: skip

    factors = LoraConfig(r=job["lora"], lora_alpha=job["lora"], target_modules="all-linear") if job["lora"] else None
    trainer = GKDTrainer(student, teacher_model=teacher, args=config, data_collator=collate, peft_config=factors,
                         train_dataset=Dataset.from_dict({"input_ids": ids.tolist()}),
                         processing_class=AutoTokenizer.from_pretrained(job["student"]))  # fmt: skip
    trainer.train()
    said = meter.said()
    if factors:
        student = trainer.model.merge_and_unload()
    student.to(getattr(torch, job["dtype"])).save_pretrained(job["out"])
    print(json.dumps(said))


def our_child(job: dict[str, Any]) -> None:
    """Run the recipe, whose first step was made before."""
    import compress.pipeline

    meter = Meter()
    compress.run_recipe(Path(job["recipe"]))
    print(json.dumps(meter.said()))


# --- the page --------------------------------------------------------------------------------------------------------


def measured(python: str, kind: str, job: dict[str, Any]) -> dict[str, float]:
    """What a child says of itself."""
    return asked([python, __file__, "--child", kind], job, {**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1"})


class Side:
    """The two texts and the source, and a folder to work in."""

    def __init__(self, options: argparse.Namespace, folder: Path):
        from variants import texts

        from compress.model.model import open_model

        self.options, self.folder, self.source = options, folder, open_model(str(options.model))
        self.training = texts(options, self.source, options.calibration, options.training)
        self.judged = texts(options, self.source, options.evaluation, options.judged)
        self.first: list[dict[str, Any]] = []  # the passes that both start behind

    def kl(self, student: Any) -> float:
        """Of a state's model on the other text."""
        from compress.evaluate import compare

        kl = compare(self.source.state, student, self.judged)[1].kl
        assert kl is not None
        return kl

    def damaged(self, student: Path) -> Any:
        """The state that both start at, and a plain folder of it, dense."""
        import compress

        damage = {"quantize": {"format": self.options.format, "method": "rtn"}} if self.options.lora else DAMAGE
        self.first.append(damage)
        state = compress.run_recipe(self.recipe(self.first, export=not self.options.lora)).state
        if self.options.lora:
            self._dense(state, student)
        else:
            (self.folder / "run" / "compressed_tensors").rename(student)
        return state

    def _dense(self, state: Any, student: Path) -> None:
        """The source's folder, rounded matrices in place of its own."""
        from safetensors.torch import save_file

        student.mkdir()
        for file in self.options.model.glob("*.json"):
            (student / file.name).write_bytes(file.read_bytes())
        rounded = {site.weight: state.weight(site) for site in state.graph.linear}
        checkpoint = self.source.checkpoint
        tensors = {name: rounded.get(name, checkpoint.read(name)).contiguous() for name in checkpoint.specs}
        save_file(tensors, student / "model.safetensors", {"format": "pt"})

    def recipe(self, passes: list[dict[str, Any]], export: bool = False) -> Path:
        import yaml
        from variants import recipe_of

        content = {**recipe_of(self.options, passes, self.folder), "export": [{"compressed_tensors": {}}] if export else []}
        del content["data"]["evaluation"]
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return path

    def ours(self, teacher: str, rate: float) -> tuple[float, dict[str, float]]:
        import compress

        tokens = self.options.steps * self.options.batch * self.options.length
        factors = {"train": "lora", "rank": self.options.lora} if self.options.lora else {}
        step = {"distill": {"batch": self.options.batch, "tokens": tokens, "teacher": teacher, "rate": rate, **factors}}
        path = self.recipe([*self.first, step])
        said = measured(sys.executable, "ours", {"recipe": str(path)})
        return self.kl(compress.run_recipe(path).state), said  # finds its steps finished

    def theirs(self, student: Path, rate: float) -> tuple[float, dict[str, float]]:
        import torch

        from compress.model.model import open_model
        from compress.training.windows import halves

        ids, out = self.folder / "ids.pt", self.folder / f"trl-{rate}"
        torch.save(self.training.ids[halves(*self.training.ids.shape)[0]], ids)
        said = measured(self.options.trl_python, "trl", {
            "ids": str(ids), "student": str(student), "teacher": str(self.options.model.resolve()), "out": str(out),
            "steps": self.options.steps, "batch": self.options.batch, "rate": rate,
            "warmup": round(0.05 * self.options.steps), "dtype": str(self.source.state.dtype)[6:], "lora": self.options.lora,
        })  # fmt: skip
        return self.kl(open_model(str(out)).state), said


def rows(options: argparse.Namespace) -> list[str]:
    """A Markdown table, a row for each student."""
    from report import line

    found = [line(["tool", "rate", "held-out KL", "peak, MiB", "CPU s"]), line(["---"] * 5)]
    theirs = "TRL GKDTrainer" + (", PEFT" if options.lora else "")

    def add(tool: str, rate: str, kl: float, said: dict[str, float] | None = None) -> None:
        cells = [f"{said['peak'] / 2**20:,.0f}", f"{said['cpu']:.0f}"] if said else ["", ""]
        found.append(line([tool, rate, f"{kl:.5f}", *cells]))
        print(found[-1], flush=True)

    with tempfile.TemporaryDirectory() as place:
        side = Side(options, Path(place))
        student = Path(place) / "student"
        add(f"{options.format}, rounded" if options.lora else "pruned", "", side.kl(side.damaged(student)))
        for teacher, rate in [*(("cached", rate) for rate in options.rates), ("live", options.rates[0])]:
            add(f"compress, teacher: {teacher}", f"{rate:g}", *side.ours(teacher, rate))
        for rate in options.trl_rates:
            add(theirs, f"{rate:g}", *side.theirs(student, rate))
    return found


def main() -> None:
    if "--child" in sys.argv:
        job = json.load(sys.stdin)
        return trl_child(job) if sys.argv[-1] == "trl" else our_child(job)
    from variants import parser, publish

    options = parser(__doc__)
    options.add_argument("--trl-python", required=True, help="the interpreter of an environment that has trl")
    options.add_argument("--training", type=int, default=512, help="windows to learn from, a twentieth of them held out")
    options.add_argument("--steps", type=int, default=40)
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2], help="ours, shares of a tensor's size")
    options.add_argument("--trl-rates", type=float, nargs="+", default=[3e-5, 1e-4, 3e-4, 1e-3])
    options.add_argument("--lora", type=int, metavar="RANK", help="only factors of this rank learn, beside rounded matrices")
    options.add_argument("--format", default="int3:g64", help="with --lora: what matrices are rounded to")
    asked = options.parse_args()
    name, title = (
        ("lora-vs-peft", "Factors that learn, two tools") if asked.lora else ("distill-vs-trl", "One distillation, two tools")
    )
    return publish(name, title, asked, rows)


if __name__ == "__main__":
    main()
