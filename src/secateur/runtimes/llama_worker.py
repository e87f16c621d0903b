"""Runs a GGUF file in llama.cpp and saves what it computed. Imports neither torch nor transformers.

python -m secateur.runtimes.llama_worker RESULT.npz < request.json
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

import numpy as np


def _decode(api: Any, context: Any, ids: list[int], start: int) -> np.ndarray:
    """Feed tokens, take the logits of all of them."""
    batch = api.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, start + i, 1, 1
        batch.seq_id[i][0] = 0
    if api.llama_decode(context, batch):
        raise SystemExit("error: llama_decode failed")
    vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(api.llama_get_model(context)))
    rows = [np.ctypeslib.as_array(api.llama_get_logits_ith(context, i), (vocabulary,)).copy() for i in range(len(ids))]
    api.llama_batch_free(batch)
    return np.stack(rows)


def _tokens(api: Any, vocabulary: Any, text: str) -> list[int]:
    data = text.encode()
    room = (ctypes.c_int32 * (len(data) + 8))()
    count = api.llama_tokenize(vocabulary, data, len(data), room, len(room), True, False)
    if count < 0:
        raise SystemExit("error: llama_tokenize failed")
    return list(room[:count])


def _main(result: str) -> None:
    import llama_cpp as api

    request = json.load(sys.stdin)
    prompt: list[int] = request["prompt"]
    api.llama_backend_init()
    model = api.llama_model_load_from_file(request["file"].encode(), api.llama_model_default_params())
    if not model:
        raise SystemExit("error: llama.cpp does not load the file")
    settings = api.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = len(prompt) + request["steps"]
    settings.n_threads = settings.n_threads_batch = request["threads"]
    settings.type_k = settings.type_v = api.GGML_TYPE_F32
    settings.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = api.llama_init_from_model(model, settings)
    if not context:
        raise SystemExit("error: llama.cpp makes no context")
    logits = _decode(api, context, prompt, 0)
    generated: list[int] = []
    last = logits[-1]
    for step in range(request["steps"]):
        generated.append(int(last.argmax()))
        last = _decode(api, context, generated[-1:], len(prompt) + step)[-1]
    vocabulary = api.llama_model_get_vocab(model)
    texts = [_tokens(api, vocabulary, text) for text in request["texts"]]
    np.savez(
        result,
        logits=logits,
        generated=np.asarray(generated),
        texts=json.dumps(texts),
        version=f"llama-cpp-python {api.__version__}",
    )


if __name__ == "__main__":
    _main(sys.argv[1])
