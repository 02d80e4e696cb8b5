"""Names that other libraries have and a pipeline has not, each with a line that says what does its work here.

Knows names and sentences only.
"""

from __future__ import annotations

from collections.abc import Iterable

from nar.storage.fields import suggestion

_SIZE = "give size=(height, width)"
_FRONTS = "callback_on_front_end(pipe, front, codes) is called after each front"
_ONE_PASS = "a call needs no such setting: nothing here is denoised in steps"
_SEED = "give seed, one number or a list with one for each result"
_MEMORY = "a smaller batch_size, or dtype='bfloat16' in from_pretrained, takes less memory"
_MODEL = "a pipeline has pipe.model, pipe.tokenizer and pipe.text_encoder()"

CALL = {
    "num_inference_steps": "steps follow from the grid, one pass a front: pipe.num_steps",
    "height": _SIZE,
    "width": _SIZE,
    "callback": _FRONTS,
    "callback_on_step_end": _FRONTS,
    "return_dict": "a call returns an Output: out.images, out.videos, out.codes",
    "labels": "classes are class_labels",
    "num_images": "num_images_per_prompt is the number of each",
    "num_videos_per_prompt": "num_images_per_prompt is the number of each",
    "num_return_sequences": "num_images_per_prompt is the number of each",
    "latents": "give known, codes (number of results, *grid), -1 where free",
    "manual_seed": _SEED,
    "seeds": _SEED,
    "eta": _ONE_PASS,
    "timesteps": _ONE_PASS,
    "sigmas": _ONE_PASS,
    "strength": _ONE_PASS,
    "guidance_rescale": "guidance_curve and guidance_interval weaken guidance at some of the fronts",
    "cfg_scale": "the strength of guidance is guidance_scale",
    "do_sample": "temperature=0 takes the most likely token",
    "max_new_tokens": "the number of tokens follows from the grid, of clips from num_frames",
    "prompt_embeds": "give prompt; nar.generate takes features as TextCondition(features, mask)",
    "negative_prompt_embeds": "give negative_prompt; nar.generate takes features as TextCondition(features, mask)",
}
LOAD = {
    "torch_dtype": "give dtype, such as torch.bfloat16",
    "device_map": "give device, such as 'cuda'",
    "local_files_only": "set HF_HUB_OFFLINE=1 in the environment",
    "token": "log in with `hf auth login`, or set HF_TOKEN in the environment",
    "use_auth_token": "log in with `hf auth login`, or set HF_TOKEN in the environment",
    "cache_dir": "set HF_HOME in the environment",
    "use_safetensors": "models are .safetensors; nar convert makes them of other files",
    "variant": "give dtype; a folder holds one set of weights",
    "safety_checker": "there is none",
    "subfolder": "give the path of the folder",
}
ATTRIBUTES = {
    "components": _MODEL,
    "unet": _MODEL,
    "transformer": _MODEL,
    "vae": _MODEL,
    "scheduler": "the generation order is pipe.model.layout.schedule",
    "set_progress_bar_config": "give progress=True in a call",
    "progress_bar": "give progress=True in a call",
    "enable_model_cpu_offload": _MEMORY,
    "enable_sequential_cpu_offload": _MEMORY,
    "enable_attention_slicing": _MEMORY,
    "enable_vae_slicing": "codes are decoded some at a time without asking",
    "enable_vae_tiling": "codes are decoded some at a time without asking",
    "enable_xformers_memory_efficient_attention": "attention is PyTorch's own, and fast without asking",
    "load_lora_weights": "there are no adapters: train with `nar train RECIPE init=MODEL`",
    "generate": "call the pipeline itself, or nar.generate for codes",
    "cuda": "pipe.to('cuda') moves a pipeline",
    "half": "pipe.to(torch.bfloat16) changes its number format",
    "eval": "a pipeline is always for inference",
}


def refuse(unknown: Iterable[str], answers: dict[str, str], known: Iterable[str]) -> None:
    """Raise TypeError for the first of some unknown arguments, with what does its work or the nearest known name."""
    for name in unknown:
        raise TypeError(f"unknown argument {name!r}: {answers[name]}" if name in answers else _guess(name, known))


def _guess(name: str, known: Iterable[str]) -> str:
    listed = sorted(set(known) - {"self", "cls", "others"})
    return f"unknown argument {name!r}{suggestion(name, listed)}; there are {', '.join(listed)}"
