"""Train the embedded demonstration model: a 5.8 M-parameter Llama on the documentation text of Python itself.

    python examples/train_embedded.py --out src/secateur/embedded --steps 1600

Byte-level BPE of 2048 tokens and the model are trained on the ``train`` split of :mod:`secateur.data.pydocs`; the
checkpoint with the best loss on ``valid`` is kept, written in bfloat16, and its perplexity on ``test`` recorded in
``training.json``. Takes about 40 minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from secateur.data.pydocs import documents

VOCABULARY, WINDOW, BATCH = 2048, 256, 12


def train_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents("train"), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", model_max_length=512
    )


def encode(tokenizer: PreTrainedTokenizerFast, split: str) -> Tensor:
    """All documents of a split as one stream of token ids, an end-of-text token before each."""
    end = tokenizer.eos_token_id
    return torch.tensor([t for text in documents(split) for t in [end, *tokenizer(text)["input_ids"]]])


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, ids: Tensor) -> float:
    """Mean negative log-likelihood per predicted token over non-overlapping windows."""
    model.eval()
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    losses = [model(input_ids=w, labels=w).loss.item() * len(w) for w in windows.split(BATCH)]
    model.train()
    return sum(losses) / len(windows)


def optimizers(model: LlamaForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for everything else."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "layers" not in n]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.95), weight_decay=0.05),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--rate", type=float, default=3e-3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_flush_denormal(True)  # moments of rare tokens decay into denormals, which are slow
    arguments.out.mkdir(parents=True, exist_ok=True)

    tokenizer = train_tokenizer()
    train, valid, test = (encode(tokenizer, split) for split in ("train", "valid", "test"))
    print(f"tokens: train {len(train)}, valid {len(valid)}, test {len(test)}", flush=True)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"parameters: {parameters}", flush=True)

    steppers = optimizers(model, arguments.rate)
    warmup, best, started = 60, math.inf, time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    for step in range(1, arguments.steps + 1):
        # trapezoid: linear warm-up, constant, linear decay over the last half
        scale = min(1.0, step / warmup, 2 * (arguments.steps - step + 1) / arguments.steps)
        for stepper in steppers:
            for group in stepper.param_groups:
                group["lr"] = arguments.rate * scale
        starts = torch.randint(len(train) - WINDOW, (BATCH,), generator=generator)
        batch = torch.stack([train[s : s + WINDOW] for s in starts.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        if step % 20 == 0:
            print(f"step {step} loss {loss.item():.4f} {time.perf_counter() - started:.0f} s", flush=True)
        if step % 100 == 0 or step == arguments.steps:
            held_out = mean_loss(model, valid)
            print(f"step {step} valid {held_out:.4f} ({math.exp(held_out):.2f})", flush=True)
            if held_out < best:
                best = held_out
                weights = {n: p.detach().to(torch.bfloat16).clone() for n, p in model.state_dict().items()}

    final = LlamaForCausalLM(config).to(torch.bfloat16)
    final.load_state_dict(weights)
    final.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    perplexity = math.exp(mean_loss(LlamaForCausalLM.from_pretrained(arguments.out, dtype=torch.float32), test))
    record = {
        "parameters": parameters,
        "training_tokens": len(train),
        "steps": arguments.steps,
        "batch": [BATCH, WINDOW],
        "python": platform.python_version(),
        "valid_perplexity": round(math.exp(best), 3),
        "test_perplexity": round(perplexity, 3),
        "seconds": round(time.perf_counter() - started),
    }
    (arguments.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(record)


if __name__ == "__main__":
    main()
