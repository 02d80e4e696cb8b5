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
_EDIT = "pipe.edit(image, mask=PICTURE) makes a part of a picture anew, pipe.extend(image, size) continues one"
_NUMBER = "num_images_per_prompt is the number of each"
_PROMPT = "all words are in prompt and negative_prompt, for one encoder"
_FEATURES = "give prompt; nar.generate takes features as TextCondition(features, mask)"
_GUIDANCE = "the strength of guidance is guidance_scale"
_TOKENS = "the number of tokens follows from the grid, of clips from num_frames"
_MODEL = "a pipeline has pipe.model, pipe.tokenizer and pipe.text_encoder()"
_WEIGHTS = "weights are pipe.model's and pipe.tokenizer's: pipe.model.parameters(), pipe.model.state_dict()"
_ADAPTERS = "there are no adapters: train with `nar train RECIPE init=MODEL`"
_FORMAT = "give dtype: 'bfloat16', or on a CPU 'float16' or 'int8'"
_PARTS = "a folder holds all its parts; Pipeline(model, tokenizer) takes others"
_ATTENTION = "attention is PyTorch's own, and fast without asking"
_UNFILTERED = "there is none: results are not filtered"

CALL = {
    "num_inference_steps": "steps follow from the grid, one pass a front: pipe.num_steps",
    **dict.fromkeys(("height", "width", "aspect_ratio", "original_size", "target_size"), _SIZE),
    **dict.fromkeys(("callback", "callback_steps", "callback_on_step_end"), _FRONTS),
    "callback_on_step_end_tensor_inputs": _FRONTS,
    "return_dict": "a call returns an Output: out.images, out.videos, out.codes",
    **dict.fromkeys(("labels", "label", "class_label", "classes"), "classes are class_labels"),
    **dict.fromkeys(("n", "num_images", "num_samples", "num_videos_per_prompt", "num_return_sequences"), _NUMBER),
    "latents": "give known, codes (number of results, *grid), -1 where free",
    **dict.fromkeys(("manual_seed", "seeds"), _SEED),
    **dict.fromkeys(("eta", "timesteps", "sigmas"), _ONE_PASS),
    "strength": "what a mask shows is made anew as a whole; mode='replace' of pipe.edit keeps the codes around it",
    **dict.fromkeys(("image", "mask", "mask_image"), _EDIT),
    "guidance_rescale": "guidance_curve and guidance_interval weaken guidance at some of the fronts",
    **dict.fromkeys(("cfg_scale", "true_cfg_scale", "cfg", "guidance"), _GUIDANCE),
    "do_sample": "temperature=0 takes the most likely token",
    **dict.fromkeys(("max_new_tokens", "max_length"), _TOKENS),
    "max_sequence_length": "prompts are cut where the model's text encoder ends: max_length in its config.json",
    **dict.fromkeys(("prompt_2", "negative_prompt_2", "clip_skip"), _PROMPT),
    **dict.fromkeys(("prompt_embeds", "pooled_prompt_embeds"), _FEATURES),
    "negative_prompt_embeds": _FEATURES.replace("prompt;", "negative_prompt;"),
    **dict.fromkeys(("ip_adapter_image", "control_image", "cross_attention_kwargs"), _ADAPTERS),
    "fps": "out.save(FILE, frame_rate=...) plays a clip at another rate",
    "output": "a call returns an Output: out.save(FILE)",
}
LOAD = {
    "torch_dtype": "give dtype, such as torch.bfloat16",
    "device_map": "give device, such as 'cuda'",
    **dict.fromkeys(("low_cpu_mem_usage", "max_memory", "offload_folder"), "weights are read one by one already"),
    **dict.fromkeys(("load_in_8bit", "load_in_4bit", "quantization_config"), _FORMAT),
    "attn_implementation": _ATTENTION,
    "trust_remote_code": "no code of a folder or repository is run or fetched",
    "custom_pipeline": "no code of a folder or repository is run or fetched",
    "local_files_only": "set HF_HUB_OFFLINE=1 in the environment",
    **dict.fromkeys(("token", "use_auth_token"), "log in with `hf auth login`, or set HF_TOKEN in the environment"),
    "cache_dir": "set HF_HOME in the environment",
    "use_safetensors": "models are .safetensors; nar convert makes them of other files",
    "variant": "give dtype; a folder holds one set of weights",
    **dict.fromkeys(("safety_checker", "requires_safety_checker", "feature_extractor"), "there is none"),
    **dict.fromkeys(("scheduler", "unet", "vae", "transformer", "tokenizer"), _PARTS),
    "subfolder": "give the path of the folder",
}
ATTRIBUTES = {
    **dict.fromkeys(("components", "unet", "transformer", "vae", "text_encoder_2"), _MODEL),
    **dict.fromkeys(("safety_checker", "feature_extractor", "watermark"), _UNFILTERED),
    **dict.fromkeys(
        ("image_processor", "decode_latents"), "pipe.pictures(codes) decodes, pipe.tokenizer.encode encodes"
    ),
    "encode_prompt": "pipe.text_encoder().encode(prompts) gives features and a mask",
    "scheduler": "the generation order is pipe.model.layout.schedule",
    "num_timesteps": "passes of a picture are pipe.num_steps",
    "guidance_scale": "the model's own settings are pipe.sampling",
    "frame_rate": "out.save(FILE, frame_rate=...) plays clips at another rate, Pipeline(..., frame_rate=...) has one",
    "name_or_path": "where it was read from is pipe.folder",
    "set_progress_bar_config": "give progress=True in a call",
    "progress_bar": "give progress=True in a call",
    **dict.fromkeys((f"enable_{how}_cpu_offload" for how in ("model", "sequential", "group")), _MEMORY),
    **dict.fromkeys((f"{how}able_attention_slicing" for how in ("en", "dis")), _MEMORY),
    "enable_vae_slicing": "codes are decoded some at a time without asking",
    "enable_vae_tiling": "codes are decoded some at a time without asking",
    **dict.fromkeys((f"{how}able_xformers_memory_efficient_attention" for how in ("en", "dis")), _ATTENTION),
    "fuse_qkv_projections": _ATTENTION,
    "compile": "pipe.model is a PyTorch module; a call uses CUDA graphs without asking, on a CPU packed weights",
    **dict.fromkeys(
        ("load_lora_weights", "unload_lora_weights", "load_ip_adapter", "load_textual_inversion"), _ADAPTERS
    ),
    "generate": "call the pipeline itself, or nar.generate for codes",
    "cuda": "pipe.to('cuda') moves a pipeline",
    "cpu": "pipe.to('cpu') moves a pipeline",
    "half": "pipe.to(torch.bfloat16) changes its number format",
    "float": "pipe.to(torch.float32) changes its number format",
    "eval": "a pipeline is always for inference",
    "train": "a pipeline is always for inference; `nar train RECIPE init=MODEL` goes on with a model",
    **dict.fromkeys(("parameters", "named_parameters", "modules", "state_dict", "requires_grad_"), _WEIGHTS),
}
OUTPUT = {"latent": "codes", "latents": "codes", "numpy": "np", "array": "np", "tensor": "pt", "torch": "pt"}


def refuse(unknown: Iterable[str], answers: dict[str, str], known: Iterable[str]) -> None:
    """Raise TypeError for the first of some unknown arguments, with what does its work or the nearest known name."""
    for name in unknown:
        raise TypeError(f"unknown argument {name!r}: {answers[name]}" if name in answers else _guess(name, known))


def _guess(name: str, known: Iterable[str]) -> str:
    listed = sorted(set(known) - {"self", "cls", "others"})
    return f"unknown argument {name!r}{suggestion(name, listed)}; there are {', '.join(listed)}"
