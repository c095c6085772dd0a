"""Make the quickstart model and its two text files from nothing: text, tokenizer, training, figures.

    python recipes/quickstart_make.py [--steps N] [--out DIR] [--threads N]

The model is a Llama of 1.4 million parameters with grouped-query attention and an untied head.  Every linear layer's
input is a multiple of 64, so that groups of 64 divide it.  It sees each training document once: the generator makes
fresh text for every step, from seeds that the calibration and the evaluation text do not use.

The matrices inside the blocks are trained by Muon, the embedding, the head and the norms by AdamW.  Muon's step is
scaled to AdamW's usual size (`match_rms_adamw`), so that one learning rate and one schedule serve both.

Known limit: the text is a pure function of its seed, the weights are not.  Two runs agree to the bit on one machine
with one version of torch and one number of threads; elsewhere they agree in quality only.
"""

import argparse
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from quickstart_text import documents, text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
CALIBRATION_SEED, CALIBRATION_SIZE = 1, 230_000
EVALUATION_SEED, EVALUATION_SIZE = 2, 120_000
TOKENIZER_SEED, TRAINING_SEED = 3, 1000  # chunk i of the training text has the seed TRAINING_SEED + i
VOCABULARY, CONTEXT, WINDOW = 1024, 1024, 512
BATCH, PEAK_RATE, WARMUP = 4, 5e-3, 60
BOS, EOS = "<s>", "</s>"


# --- tokenizer -----------------------------------------------------------------------------------------------------


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer.  Digits stay alone, so that a sum is a matter of columns and not of vocabulary."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(documents(TOKENIZER_SEED, 2_000_000), trainer)
    bpe.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, model_max_length=CONTEXT, clean_up_tokenization_spaces=False
    )


def encode_text(tokenizer: PreTrainedTokenizerFast, path: Path) -> Tensor:
    return torch.tensor(tokenizer.encode(path.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False))


# --- training ------------------------------------------------------------------------------------------------------


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def training_rows(tokenizer: PreTrainedTokenizerFast) -> Iterator[Tensor]:
    """Rows of CONTEXT tokens, without end.

    Of five documents four stand as in the text files, separated by an empty line; half of those rows begin with BOS.
    The fifth stands between BOS and EOS, so that `generate` knows how to stop.
    """
    newline = tokenizer.encode("\n", add_special_tokens=False)
    frames = [([], newline + newline)] * 4 + [([tokenizer.bos_token_id], [tokenizer.eos_token_id])]
    seed = TRAINING_SEED
    while True:
        docs = tokenizer(documents(seed, 2_000_000), add_special_tokens=False)["input_ids"]
        share = len(docs) // len(frames)
        parts = [docs[i * share : (i + 1) * share] for i in range(len(frames))]
        tokens = [t for part, (front, end) in zip(parts, frames, strict=True) for doc in part for t in front + doc + end]
        rows = torch.tensor(tokens[: len(tokens) // CONTEXT * CONTEXT]).view(-1, CONTEXT)
        rows[::2, 0] = tokenizer.bos_token_id
        yield from rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
        seed += 1


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    inner = [p for p in model.model.layers.parameters() if p.ndim == 2]
    outer = [p for p in model.parameters() if all(p is not q for q in inner)]
    return [
        torch.optim.Muon(inner, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate(step: int, steps: int) -> float:
    """Warm up, then half a cosine down to zero."""
    return PEAK_RATE * min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int) -> None:
    rows, optimizers, start = training_rows(tokenizer), make_optimizers(model), time.monotonic()
    for step in range(steps):
        batch = torch.stack([next(rows) for _ in range(BATCH)])
        if step < 0.8 * steps:  # attention over short rows costs less; the last fifth learns the full context
            batch = batch.view(-1, WINDOW)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch, use_cache=False).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate(step, steps)
            optimizer.step()
            optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}  {time.monotonic() - start:6.0f} s", flush=True)


# --- figures -------------------------------------------------------------------------------------------------------


def windows(tokens: Tensor) -> Tensor:
    return tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)


def unigram_perplexity(train_tokens: Tensor, tokens: Tensor) -> float:
    """Perplexity of a model that knows only how frequent each token is (counts plus one)."""
    counts = torch.bincount(train_tokens, minlength=VOCABULARY) + 1.0
    return math.exp(-(counts / counts.sum()).log()[windows(tokens)[:, 1:]].mean().item())


@torch.no_grad()
def log_probabilities(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    rows = windows(tokens)
    return torch.cat([model(part).logits[:, :-1].float().log_softmax(-1) for part in rows.split(8)])


def round_to_nearest(weight: Tensor, bits: int, group: int = 64) -> Tensor:
    """The weight on 2^bits even levels between the minimum and the maximum of each group (asymmetric rounding)."""
    w = weight.view(-1, group)
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    scale = (high - low).clamp_min(1e-8) / (2**bits - 1)
    return (((w - low) / scale).round() * scale + low).view_as(weight)


def rounded_model(load: Callable[[], LlamaForCausalLM], bits: int) -> LlamaForCausalLM:
    model = load()
    for layer in model.model.layers.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = round_to_nearest(layer.weight.data, bits)
    return model


def figures(folder: Path, calibration: Tensor, tokens: Tensor) -> dict[str, str]:
    """Measured on the saved folder with float32 arithmetic: perplexity, and what rounding does to it."""

    def load() -> LlamaForCausalLM:
        return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def perplexity(logp: Tensor) -> float:
        return math.exp(nn.functional.nll_loss(logp.flatten(0, 1), windows(tokens)[:, 1:].flatten()).item())

    base = log_probabilities(load(), tokens)
    out = {"unigram": f"| unigram baseline | {unigram_perplexity(calibration, tokens):.1f} | | |"}
    out["base"] = f"| the model (bf16 weights) | {perplexity(base):.3f} | 0 | 100 % |"
    for bits in (4, 3, 2):
        logp = log_probabilities(rounded_model(load, bits), tokens)
        kl = (base.exp() * (base - logp)).sum(-1).mean().item()
        agree = (base.argmax(-1) == logp.argmax(-1)).float().mean().item()
        out[str(bits)] = f"| rounded to {bits} bits, group 64 | {perplexity(logp):.3f} | {kl:.4f} | {agree:.1%} |"
    return out


# --- the folder ----------------------------------------------------------------------------------------------------

README = """# quickstart-model

A tiny Llama ({parameters:,} parameters, 6 layers, hidden size 128, 4 query and 2 key-value heads, vocabulary 1024) that
ships with the repository, so that every recipe can be tried in seconds, offline, on any machine. It tells small stories
with questions and answers, works sums in columns, and reads lists and tables back. It knows nothing else.

Made wholly by this project: the words, the text generator, the tokenizer and the training. No outside text or weights.

    python recipes/quickstart_make.py --steps {steps} --threads {threads}

That took {minutes:.0f} core-minutes on a CPU ({steps} steps of {tokens} tokens, all fresh text).
The text files `quickstart-text.txt` (calibration, {calibration:,} tokens) and `quickstart-eval.txt` (held out,
{evaluation:,} tokens) come from the same command and other seeds.

Measured on `quickstart-eval.txt` in windows of 512 tokens. "Rounded" means every linear layer inside the blocks, to the
nearest of 2^bits even levels between minimum and maximum of each group; embedding and head stay bf16. KL is in nats per
token, from the model itself; agreement is the share of places with the same most likely token.

| | perplexity | KL | agreement |
|---|---|---|---|
{table}

The text is the same on every machine. The weights are the same on the same machine with the same version of torch and
number of threads; elsewhere they come out different and about as good.

Licence: Apache-2.0, as the repository.
"""


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, max_new_tokens=200
    ).save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)


def replace_folder(new: Path, out: Path) -> None:
    old = out.with_name(out.name + ".old")
    if out.exists():
        out.rename(old)
    new.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--out", type=Path, default=HERE / "quickstart-model")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    for name, seed, size in (("text", CALIBRATION_SEED, CALIBRATION_SIZE), ("eval", EVALUATION_SEED, EVALUATION_SIZE)):
        (HERE / f"quickstart-{name}.txt").write_text(text(seed, size), encoding="utf-8", newline="\n")
    tokenizer = make_tokenizer()
    calibration, evaluation = (encode_text(tokenizer, HERE / f"quickstart-{name}.txt") for name in ("text", "eval"))
    model, start = make_model(tokenizer), time.process_time()
    train(model, tokenizer, args.steps)
    minutes = (time.process_time() - start) / 60

    partial = args.out.with_name(args.out.name + ".partial")
    save(model, tokenizer, partial)
    table = "\n".join(figures(partial, calibration, evaluation).values())
    readme = README.format(
        parameters=model.num_parameters(),
        steps=args.steps,
        tokens=BATCH * CONTEXT,
        threads=args.threads,
        minutes=minutes,
        calibration=len(calibration),
        evaluation=len(evaluation),
        table=table,
    )
    (partial / "README.md").write_text(readme, encoding="utf-8")
    replace_folder(partial, args.out)
    print(table)


if __name__ == "__main__":
    main()
