"""The stock transformers classes: configurations and models without weights."""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from secateur.errors import refuse

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


GENERATION = "generation_config.json"
PER_LAYER_KEYS = ("per_layer_config", "allow_global_per_layer_attribute_access")
"""What a configuration says of layers that differ."""


def base_class(model_type: str) -> str:
    """Name of transformers' class without a head; empty where it has none."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    found = MODEL_MAPPING_NAMES.get(model_type, "")
    return found if isinstance(found, str) else found[0]


def is_headless(raw: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` of this content names the class without a head, which ``AutoModel`` loads."""
    return base_class(str(raw.get("model_type"))) in (raw.get("architectures") or ())


def _auto_class(headless: bool) -> Any:
    from transformers import AutoModel, AutoModelForCausalLM

    return AutoModel if headless else AutoModelForCausalLM


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' notices out of our output for the duration."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def stock_config(raw: Mapping[str, Any]) -> Any:
    """The stock configuration object of a ``config.json``'s content, without differences between layers.

    Raises:
        RequestError: the stock class does not accept it.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[str(raw["model_type"])]
    try:
        with quiet_transformers():
            return kind.from_dict(
                {key: value for key, value in raw.items() if key not in (*PER_LAYER_KEYS, "auto_map")}
            )
    except Exception as error:  # the classes validate with many exception types
        message = " ".join(str(error).split())
        refuse("bad-config", f"configuration for {kind.__name__}", message or type(error).__name__)


def accepts(raw: Mapping[str, Any]) -> bool:
    """Whether transformers reads a ``config.json`` of this content, differences between layers included."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        with quiet_transformers():
            CONFIG_MAPPING[str(raw["model_type"])].from_dict(dict(raw))
    except Exception:  # the classes validate with many exception types
        return False
    return True


def example_config(model_type: str, headless: bool = False) -> dict[str, Any]:
    """The content of a ``config.json`` as the stock class fills it in by default.

    Args:
        headless: whether it names the class without a head.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    with quiet_transformers():
        found: dict[str, Any] = CONFIG_MAPPING[model_type]().to_dict()
    return {**found, "architectures": [base_class(model_type)]} if headless else found


def meta_model(config: Any) -> Any:
    """The stock model of ``config`` on the meta device."""
    return _build(config, lambda: torch.device("meta"))


class _EmptyOnMeta(TorchFunctionMode):
    """Allocates what ``torch.empty`` makes (parameters) on meta; computed buffers stay real."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def skeleton_model(config: Any, dtype: torch.dtype, resize: dict[str, Any] | None = None) -> Any:
    """The stock model with its matrices on meta and its computed buffers (rotary tables) real.

    Args:
        resize: how its layers differ from the configuration (``layer_record``).
    """
    quiet = copy.deepcopy(config)
    for extra in ("output_router_logits", "output_hidden_states", "output_attentions"):
        if getattr(quiet, extra, False):  # outputs of the whole model, which blocks run one by one do not feed
            setattr(quiet, extra, False)
    model = _build(quiet, _EmptyOnMeta, dtype)
    if resize is not None:
        from secateur.families.modeling_secateur import resize as apply

        apply(model, resize)
    return model


def typed(dtype: torch.dtype) -> dict[str, Any]:
    """Arguments that make a stock class compute in ``dtype``: the fused products of experts know no float64."""
    return {"dtype": dtype, **({"experts_implementation": "eager"} if dtype == torch.float64 else {})}


def load_pretrained(folder: Path, per_layer: bool, headless: bool = False, **options: Any) -> Any:
    """The model in a folder as transformers loads it, with the bundled modelling file where layers differ.

    Args:
        headless: whether its class is the one without a head.
        options: of ``from_pretrained``; with a ``state_dict``, no weights are read from the folder.
    """
    from transformers import AutoConfig, GenerationConfig

    from secateur.families.modeling_secateur import SecateurForCausalLM, SecateurModel

    stock, ours = _auto_class(headless), SecateurModel if headless else SecateurForCausalLM
    with quiet_transformers():
        if "state_dict" not in options:
            return (ours if per_layer else stock).from_pretrained(folder, **options)
        config = options.pop("config", None) or AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if per_layer:
            made = ours.from_pretrained(folder, config=config, **options)
        else:
            made = stock._model_mapping[type(config)].from_pretrained(None, config=config, **options)
        model = made[0] if isinstance(made, tuple) else made  # with what was found wrong, where that was asked for
        model.name_or_path = str(folder)
        if (folder / GENERATION).is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return made


_MOST_PARAMETERS = 50_000
"""Tensors of a model. Stock classes stack their experts, so that large models have some thousands."""


@contextlib.contextmanager
def _few_parameters() -> Iterator[None]:
    """Stop a class that a configuration makes build more modules than any model has."""
    left = itertools.count(_MOST_PARAMETERS, -1)

    def registered(module: Any, name: str, parameter: Any) -> None:
        del module, name, parameter
        if next(left) <= 0:
            raise ValueError(f"it asks for more than {_MOST_PARAMETERS:,} tensors")

    handle = register_module_parameter_registration_hook(registered)
    try:
        yield
    finally:
        handle.remove()


def _build(config: Any, context: Callable[[], Any], dtype: torch.dtype = torch.float32) -> Any:
    stock = _auto_class(is_headless({"model_type": config.model_type, "architectures": config.architectures}))
    try:
        with quiet_transformers(), context(), _few_parameters():
            model = stock.from_config(config, **typed(dtype))
    except Exception as error:
        message = " ".join(str(error).split())
        refuse("bad-config", f"model of {type(config).__name__}", message or type(error).__name__)
    return model.eval().requires_grad_(False)
