"""Every flag of the programs, in the order in which `--help` and docs/flags.md show them.

The flags themselves are declared as fields of `Request`, `EngineSettings`, `JobSettings` and
`BenchmarkSettings`, or in others.py. Here is only their order.
"""

from collections.abc import Iterator, Mapping
from functools import cache

from opensora_sp.request.engine_settings import EngineSettings
from opensora_sp.request.flags.benchmark_settings import BenchmarkSettings
from opensora_sp.request.flags.others import OTHERS
from opensora_sp.request.job_settings import JobSettings
from opensora_sp.request.request import Request
from opensora_sp.request.setting import Setting, settings_of

Group = tuple[str, tuple[Setting, ...]]

DATACLASSES = (Request, EngineSettings, JobSettings, BenchmarkSettings)

# Title of each group → the keys of its flags.
_ORDER: dict[str, str] = {
    "What to generate": "prompt prompt_path start_index end_index num_sample seed",
    "Size and length": """
        resolution aspect_ratio image_size num_frames fps save_fps frame_interval
    """,
    "Sampling": "num_sampling_steps step_cache cfg_scale guidance",
    "Prompt scores": "aes flow camera_motion llm_refine prompt_generator",
    "References and loops": """
        reference_path mask_strategy image last_image extend edit edit_strength reference_fps
        allow_remote allow_private align loop condition_frame_length loop_carry
    """,
    "Output": """
        save_dir sample_name prompt_as_path lossless sheet overwrite verbose log_dir
    """,
    "Marks and labels of generated content": """
        watermark watermark_text watermark_size watermark_place watermark_font
        label label_producer label_certificate label_key
    """,
    "Saving and going on (in .opensora-sp/ of the save directory)": """
        save_every resume decode_only keep_state text_cache
    """,
    "Model (none of the four paths: the embedded model)": """
        ckpt_path_dit ckpt_path_t5 ckpt_path_vae2d ckpt_path_vae3d weights_from dtype
        model_max_length
    """,
    "Devices and ranks": """
        device backend launcher cpu_threads sequence_parallel guidance_parallel replicas overlap
        vae_decode timeout heartbeat_timeout deadlines check_finite
    """,
    "Memory and speed": """
        memory device_memory no_plan t5_device t5_weights step_kernels attention fused_kernels
        batch_size micro_batch_size micro_frame_size enable_compile flash_attn layernorm_kernel
        qk_norm
    """,
    "Benchmark (opensora-sp benchmark only)": """
        warmup_count eval_count benchmark_save_path baseline peak_tflops measure_peak profile
        weight_hashes sweep compare count count_ranks markdown
    """,
    "Plan (opensora-sp plan only)": "ranks table flop_rate link_rate",
    "Calibrate (opensora-sp calibrate only)": "out full_runs",
    "This command": "config print_config version help",
}


@cache
def declared_flags() -> Mapping[str, Setting]:
    """Every declared setting that a flag sets, by its key, in no order that matters."""
    fields = [one for cls in DATACLASSES for one in settings_of(cls).values()]
    return {one.key: one for one in (*fields, *OTHERS) if one.name}


def _groups() -> tuple[Group, ...]:
    flags = declared_flags()
    return tuple(
        (title, tuple(flags[key] for key in keys.split())) for title, keys in _ORDER.items()
    )


GROUPS: tuple[Group, ...] = _groups()


def all_flags() -> Iterator[Setting]:
    """Every flag, in the order of the table."""
    for _, flags in GROUPS:
        yield from flags
