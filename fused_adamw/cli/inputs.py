"""Inputs for one forward pass: from a library model's configuration, or from shapes on the command line.

Only shapes and dtypes matter, so values are zeros.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn

_SPEC = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)@)?(?P<dims>[^:@]*)(?::(?P<dtype>\w+))?")
_BATCH, _TOKENS, _SIDE, _SAMPLES = 2, 8, 32, 16000


def parse_inputs(specs: list[str]) -> Any:
    """Turn the values of `--inputs` into example inputs.

    Args:
        specs: `2,16:int64`, one per tensor; sizes may be labelled (`B=2,T=16:int64`), and `name@` before them
            makes a keyword argument. The dtype is float32 unless given.

    Returns:
        A tuple of positional arguments, or a mapping of keyword arguments.

    Raises:
        ValueError: If a value is malformed, or some have names and others none.
    """
    parsed = [_parse(spec) for spec in specs]
    named = {name: tensor for name, tensor in parsed if name}
    if not named:
        return tuple(tensor for _, tensor in parsed)
    if len(named) < len(parsed):
        raise ValueError(f"--inputs {' '.join(specs)}: expected different names for all tensors, or none")
    return named


def _parse(spec: str) -> tuple[str, Tensor]:
    match = _SPEC.fullmatch(spec)
    sizes = [size.rpartition("=")[2].strip() for size in match["dims"].split(",")] if match else []
    dtype = getattr(torch, (match and match["dtype"]) or "float32", None)
    if match is None or not all(size.isdigit() for size in sizes) or not isinstance(dtype, torch.dtype):
        raise ValueError(
            f"--inputs {spec!r}: expected sizes and a dtype, like B=2,T=16:int64 or input_ids@2,16:int64"
        )
    return match["name"] or "", torch.zeros([int(size) for size in sizes], dtype=dtype)


def inputs_of(source: str, model: nn.Module) -> Any:
    """Make inputs for a library model from its configuration.

    Args:
        source: `timm`, `transformers` or `diffusers`; anything else has none.
        model: The model.

    Returns:
        Example inputs, or None where the configuration does not say.
    """
    make = {"timm": _timm, "transformers": _transformers, "diffusers": _diffusers}.get(source)
    try:
        return None if make is None else make(model)
    except Exception:  # configurations differ, and no inputs are as good as the wrong ones
        return None


def _timm(model: nn.Module) -> Any:
    config = getattr(model, "pretrained_cfg", None) or {}
    size = config.get("input_size")
    return None if size is None else (torch.zeros(_BATCH, *size),)


def _transformers(model: Any) -> Any:
    """Follow the model's `main_input_name`: token ids, an image, a waveform or a spectrogram."""
    config, accepted = model.config, set(inspect.signature(model.forward).parameters)
    text = getattr(config, "text_config", None) or config
    vision = getattr(config, "vision_config", None) or config
    tokens = torch.zeros(_BATCH, _TOKENS, dtype=torch.long)
    side = getattr(vision, "image_size", None) or 224
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    channels = getattr(vision, "num_channels", None) or 3
    image = torch.zeros(_BATCH, channels, height, width)
    mels = getattr(config, "num_mel_bins", None) or 80
    frames = 2 * (getattr(config, "max_source_positions", None) or 500)
    spectrogram = torch.zeros(_BATCH, mels, frames)
    possible: dict[str, Tensor] = {
        "input_ids": tokens,
        "pixel_values": image,
        "input_values": torch.zeros(_BATCH, _SAMPLES),
        "input_features": spectrogram if config.is_encoder_decoder else spectrogram.mT,
    }
    main = model.main_input_name
    if callable(getattr(model, "set_experts_implementation", None)):
        model.set_experts_implementation("batched_mm")  # the one that does not depend on values
    inputs: dict[str, Any] = {main: possible[main]} if main in possible else {}
    if type(config).__name__.lower().startswith(("clip", "siglip")):
        inputs |= {name: value for name, value in possible.items() if name in ("input_ids", "pixel_values")}
    if not inputs:
        return None
    if getattr(text, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = tokens
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return inputs


def _diffusers(model: Any) -> Any:
    """Fill the arguments of `forward` that have no default from the configuration, by their names."""
    config = model.config
    tokens, size = _TOKENS, getattr(config, "sample_size", None)
    side = size if isinstance(size, int) else _SIDE
    width = (
        getattr(config, "joint_attention_dim", None) or getattr(config, "cross_attention_dim", None) or 768
    )
    width = width[0] if isinstance(width, (list, tuple)) else width
    channels = getattr(config, "in_channels", None) or getattr(config, "audio_channels", None) or 4
    packed = "img_ids" in inspect.signature(model.forward).parameters
    image = torch.zeros(_BATCH, tokens, channels) if packed else torch.zeros(_BATCH, channels, side, side)
    pooled = getattr(config, "pooled_projection_dim", None) or 768
    known = {
        "sample": image,
        "hidden_states": image,
        "timestep": torch.zeros(_BATCH),
        "encoder_hidden_states": torch.zeros(_BATCH, tokens, width),
        "pooled_projections": torch.zeros(_BATCH, pooled),
        "img_ids": torch.zeros(tokens, 3),
        "txt_ids": torch.zeros(tokens, 3),
        "guidance": torch.zeros(_BATCH) if getattr(config, "guidance_embeds", False) else None,
    }
    if getattr(config, "audio_channels", None):
        known["sample"] = torch.zeros(_BATCH, channels, _SAMPLES)
    needed = inspect.signature(model.forward).parameters
    return {name: value for name, value in known.items() if name in needed and value is not None}
