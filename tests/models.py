"""Tiny random checkpoints of every family in the zoo, made on the spot."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast

import secateur
from secateur.families.stock import quiet_transformers
from zoo import ALL as ALL
from zoo import COMMON, CONTEXT, VOCABULARY, Tiny
from zoo import FAMILIES as FAMILIES
from zoo import Where as Where

SENTENCES = (
    "the quick brown fox jumps over the lazy dog",
    "pruning removes what a network can do without",
    "a hedge is cut so that it grows where it should",
    "numbers like 3, 14 and 159 stand between the words",
    "every branch that stays has to carry more light",
)


def text(count: int, seed: int = 0) -> str:
    """``count`` seeded sentences."""
    order = torch.randint(len(SENTENCES), (count,), generator=torch.Generator().manual_seed(seed))
    return ". ".join(SENTENCES[int(i)] for i in order)


@cache
def _tokenizer_json() -> str:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer.to_str()


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that puts <s> before every text and knows chats."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json()), bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    return made


def stock(name: str | Tiny, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A stock model with random weights, in which no bias is zero and no norm weight one."""
    tiny = name if isinstance(name, Tiny) else ALL[name]
    config = AutoConfig.for_model(tiny.model_type or str(name), **{**COMMON, **tiny.config, **changes})
    with quiet_transformers():
        return randomised(AutoModelForCausalLM.from_config(config, dtype=dtype).eval(), seed)


def randomised(model: Any, seed: int = 0) -> Any:
    """The same model with random weights, in which no bias is zero and no norm weight one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim == 1:
                value = 0.3 * noise + float(key.endswith("weight"))
            else:
                value = noise / parameter.shape[-1] ** 0.5
            parameter.copy_(value)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for key, buffer in model.state_dict().items():
            if key not in parameters:
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator, dtype=torch.float64))
    return model


Edit = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def save(
    folder: Path,
    name: str | Tiny = "llama",
    dtype: torch.dtype = torch.float32,
    *,
    edit: Edit | None = None,
    shard: str | None = None,
    with_tokenizer: bool = True,
    **changes: Any,
) -> Path:
    """Write a checkpoint folder.

    Args:
        folder: where.
        name: of ``ALL``, or what is made.
        edit: changes the tensors of the file afterwards.
        shard: size of a shard.
        changes: of the configuration.
    """
    with quiet_transformers():
        stock(name, dtype, **changes).save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    if with_tokenizer:
        tokenizer().save_pretrained(folder)
    if edit is not None:
        path = folder / "model.safetensors"
        save_file({key: tensor.clone() for key, tensor in edit(load_file(path)).items()}, path, {"format": "pt"})
    return folder


def without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """GPT-2 as on the hub: no ``transformer.`` prefix, causal masks among the tensors."""
    bare = {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}
    blocks = sorted({key.split(".")[1] for key in bare if key.startswith("h.")})
    mask = torch.ones(CONTEXT, CONTEXT).tril().view(1, 1, CONTEXT, CONTEXT)
    return {**bare, **{f"h.{i}.attn.bias": mask for i in blocks}}


def repeated_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A tied head that the file repeats."""
    return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}


def fused_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts stacked in the file as they are in the module."""
    found = dict(tensors)
    for block in range(3):
        disk, module = f"model.layers.{block}.block_sparse_moe", f"model.layers.{block}.mlp"
        w1, w3, w2 = ([found.pop(f"{disk}.experts.{e}.{w}.weight") for e in range(4)] for w in ("w1", "w3", "w2"))
        found[f"{module}.experts.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(w1, w3, strict=True)])
        found[f"{module}.experts.down_proj"] = torch.stack(w2)
        found[f"{module}.gate.weight"] = found.pop(f"{disk}.gate.weight")
    return found


DISK: dict[str, dict[str, Any]] = {
    "sharded": {"name": "llama", "shard": "60KB"},
    "gpt2-bare": {"name": "gpt2", "edit": without_prefix},
    "tied-repeated": {"name": "llama-tied", "edit": repeated_head},
    "mixtral-sharded": {"name": "mixtral", "shard": "100KB"},
    "mixtral-fused": {"name": "mixtral", "edit": fused_experts},
}
"""The same models, differently on disk."""


def load(folder: Path, **options: Any) -> Any:
    """Plain transformers; every key must be there and none too many, buffers of GPT-2 apart.

    A folder whose layers differ is loaded by ``secateur.load``.
    """
    arguments = {"output_loading_info": True, "local_files_only": True, **options}
    with quiet_transformers():
        if "auto_map" in config(folder):
            model, info = secateur.load(folder, **arguments)
        else:
            headed = config(folder)["architectures"][0].endswith(("CausalLM", "LMHeadModel"))
            model, info = (AutoModelForCausalLM if headed else AutoModel).from_pretrained(folder, **arguments)
    assert not info["missing_keys"], info["missing_keys"]
    assert not info["mismatched_keys"], info["mismatched_keys"]
    unexpected = [key for key in info["unexpected_keys"] if not key.endswith(".attn.bias")]
    assert not unexpected, unexpected
    return model.eval()


def config(folder: Path) -> dict[str, Any]:
    """The content of ``config.json``."""
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def token_ids(rows: int = 2, length: int = 24) -> Tensor:
    """Random token ids."""
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(7))


_ALONE = """
import sys; sys.modules["secateur"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({folder!r}, trust_remote_code=True)
print(model.generate(torch.tensor({ids}), max_new_tokens=8, do_sample=False, pad_token_id=1).tolist())
model.save_pretrained({saved!r})
"""


def generated_alone(folder: Path, ids: Tensor, place: Path) -> list[list[int]]:
    """What transformers generates in a process that cannot import Secateur; it also saves the model to place/saved."""
    script = _ALONE.format(folder=str(folder), ids=ids.tolist(), saved=str(place / "saved"))
    environment = {"HF_MODULES_CACHE": str(place / "modules"), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found: list[list[int]] = json.loads(done.stdout.splitlines()[-1])
    return found
