"""Seconds and peak memory of UVR against the unguarded pipeline: FLUX's real width and random weights, in real pipelines.

    python benchmarks/uvr_overhead.py --steps 4 --repeats 3 --json uvr_overhead.json     # CPU: 1 double and 2 single blocks
    python benchmarks/uvr_overhead.py --full --device cuda --json uvr_overhead.json      # GPU: 19 double and 38 single blocks

Benign: what the probe sees never reaches the threshold. Unsafe: it always does, in a round mask. Guarded and unguarded generations
alternate, and their order too; a ratio compares neighbours. With few blocks what UVR does once a step weighs more than it would in
a whole FLUX. On a CPU, memory is measured in processes of their own, over two steps, weights included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel
from uvr_attention import disc, facts, peak, reset_peak, timed

from safelight.anchors import Anchors
from safelight.attach import Guard, guard
from safelight.method import Method
from safelight.methods.uvr import UVR
from safelight.record import Action
from safelight.site import Site
from safelight.testbed.tokenizer import EOS, PAD, build

HEADS, HEAD_WIDTH, TEXT, CLIP_LENGTH = 24, 128, 512, 77
TASKS = ("generation", "editing")
SETTINGS = ("defaults", "near published")
CASES = ("benign", "unsafe")
TARGETS = {("generation", "benign"): 1.02, ("editing", "benign"): 1.02, ("generation", "unsafe"): 1.05, ("editing", "unsafe"): 1.10}
MEMORY_TARGET = 1.02
NEVER = 1e9
"""A threshold that no token reaches."""


# The pipelines


def pipelines(arguments: argparse.Namespace) -> dict[str, Any]:
    """One pipeline per task; they share their parts."""
    torch.manual_seed(0)
    with made_on(torch.device(arguments.device), getattr(torch, arguments.dtype)):
        parts = {
            "transformer": FluxTransformer2DModel(
                in_channels=64, num_layers=arguments.layers, num_single_layers=arguments.single, attention_head_dim=HEAD_WIDTH,
                num_attention_heads=HEADS, joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True,
            ),
            "vae": autoencoder(),
            "text_encoder": clip(),
            "text_encoder_2": t5(),
        }  # fmt: skip
    for part in parts.values():
        part.eval().requires_grad_(False)
    parts |= {"tokenizer": tokenizer("clip", CLIP_LENGTH), "tokenizer_2": tokenizer("t5", TEXT)}
    made = {}
    for task, kind in zip(TASKS, (FluxPipeline, FluxKontextPipeline), strict=True):
        made[task] = kind(scheduler=scheduler(), **parts)
        made[task].set_progress_bar_config(disable=True)
    return made


@contextmanager
def made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """New modules come into being on a device, in a type: a whole FLUX has no room for a copy."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def autoencoder() -> AutoencoderKL:
    """Reduces by 8 to 16 channels as FLUX's does, with next to no work."""
    return AutoencoderKL(
        block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16, norm_num_groups=4, mid_block_add_attention=False, shift_factor=0.1159, scaling_factor=0.3611,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def clip() -> CLIPTextModel:
    """One layer of CLIP's width."""
    config = CLIPTextConfig(
        vocab_size=1024, hidden_size=768, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH, pad_token_id=PAD, bos_token_id=2, eos_token_id=EOS,
    )  # fmt: skip
    return CLIPTextModel(config)


def t5() -> T5EncoderModel:
    """One layer of T5's width."""
    config = T5Config(
        vocab_size=1024, d_model=4096, d_kv=16, num_heads=2, d_ff=32, num_layers=1, dropout_rate=0.0, pad_token_id=PAD,
        eos_token_id=EOS, decoder_start_token_id=PAD,
    )  # fmt: skip
    return T5EncoderModel(config)


def tokenizer(kind: Any, length: int) -> PreTrainedTokenizerFast:
    """The testbed's words, but padded to the full length."""
    return PreTrainedTokenizerFast(
        tokenizer_object=build(kind).backend_tokenizer, model_max_length=length, pad_token="<pad>", eos_token="</s>",
        bos_token="<s>", unk_token="<unk>",
    )  # fmt: skip


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """FLUX.1-dev's."""
    return FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096
    )


def generate(pipe: Any, size: int, steps: int) -> None:
    """One image, always the same."""
    settings: dict[str, Any] = {"height": size, "width": size, "num_inference_steps": steps, "max_sequence_length": TEXT}
    if isinstance(pipe, FluxKontextPipeline):
        picture = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(7))
        settings |= {"image": picture, "max_area": size * size, "_auto_resize": False}
    pipe(prompt="a red car and a dog", generator=torch.Generator().manual_seed(0), output_type="pt", **settings)


# The anchors


@dataclass(eq=False)
class Recorder(Method):
    """Keeps what a probe sees at each step."""

    site: str
    seen: list[Tensor]

    def sites(self, backbone: Any) -> Sequence[str]:
        return (self.site,)

    def edit(self, site: Site, tokens: Tensor) -> Tensor:
        self.seen.append(tokens[0].cpu())
        return tokens


def anchors(pipe: Any, arguments: argparse.Namespace) -> Anchors:
    """Random weights know no concepts: directions that tell a round blob from its surroundings, by ridge regression at each step."""
    count = len(pipe.transformer.single_transformer_blocks)
    site, seen = f"single.{10 * count // 38}.attention:image", []  # FLUX's tenth of 38
    with guard(pipe, Recorder(site, seen)):
        generate(pipe, arguments.size, arguments.steps)
    blob = disc(arguments.size // 16, arguments.share).flatten().double() * 2 - 1
    fits = [ridge(tokens.double(), blob) for tokens in seen]
    return Anchors(
        weights=torch.stack([weights for weights, _ in fits])[:, None, None].to(arguments.device),
        bias=torch.stack([bias for _, bias in fits])[:, None, None].to(arguments.device),
        moments=tuple(step / len(fits) for step in range(len(fits))), concepts=("blob",), thresholds=(0.0,), levels=(0.0,), site=site,
        heads=HEADS,
    )  # fmt: skip


def ridge(tokens: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [width] and bias such that `tokens @ weights + bias` is about what is wanted of each token."""
    mean = tokens.mean(0)
    gram = (tokens - mean) @ (tokens - mean).T
    gram.diagonal().add_(1e-2 * gram.diagonal().mean())
    weights = (tokens - mean).T @ torch.linalg.solve(gram, wanted - wanted.mean())
    return weights.float(), (wanted.mean() - mean @ weights).float()


def method(task: str, setting: str, case: str, known: Anchors) -> UVR:
    """UVR as one arm has it."""
    made = UVR(anchors=known) if setting == "defaults" else UVR.near_published(known, editing=task == "editing")
    return made if case == "unsafe" else replace(made, threshold=NEVER)


# The measurements


def measure(pipe: Any, guarding: UVR, arguments: argparse.Namespace) -> dict[str, Any]:
    """The median ratio of guarded to unguarded time, attaching included, and what the guard did."""
    device, ratios, plain, action = torch.device(arguments.device), [], [], Action("uvr")
    warming = int(device.type == "cuda")

    def run(guarded: bool) -> None:
        nonlocal action
        with guard(pipe, guarding) if guarded else nullcontext() as attached:
            generate(pipe, arguments.size, arguments.steps)
            action = attached.records[0].actions[0] if isinstance(attached, Guard) else action

    for repeat in range(arguments.repeats + warming):
        order = (False, True) if repeat % 2 else (True, False)
        seconds = {guarded: timed(lambda guarded=guarded: run(guarded), device) for guarded in order}  # type: ignore[misc]
        if repeat >= warming:
            ratios.append(seconds[True] / seconds[False])
            plain.append(seconds[False])
    return {
        "ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios), "unguarded_seconds": statistics.median(plain),
        "masked": sum(map(sum, action.mask or [])) / (arguments.size // 16) ** 2, "flagged": action.flagged,
    }  # fmt: skip


def highest(pipe: Any, guarding: UVR | None, arguments: argparse.Namespace) -> int:
    """The peak of memory during one generation, in bytes, weights included."""
    device = torch.device(arguments.device)
    reset_peak(device)
    with guard(pipe, guarding) if guarding else nullcontext():
        generate(pipe, arguments.size, arguments.steps)
    return peak(device)


def highest_apart(arguments: argparse.Namespace, arm: Sequence[str], known: Anchors) -> int:
    """The same in a process of its own: a heap that has already grown hides what comes later."""
    with tempfile.TemporaryDirectory() as folder:
        known.save(Path(folder) / "anchors.safetensors")
        options = [f"--{name}={getattr(arguments, name)}" for name in ("layers", "single", "size", "device", "dtype")]
        command = [sys.executable, __file__, *options, "--steps=2", f"--anchors={folder}/anchors.safetensors", "--measure-memory", *arm]
        return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def memory(pipe: Any, arm: Sequence[str], known: Anchors, arguments: argparse.Namespace) -> int:
    """The peak of memory of an arm: its task, and then its setting and case unless it is unguarded."""
    if arguments.device == "cpu":
        return highest_apart(arguments, arm, known)
    return highest(pipe, method(*arm, known) if len(arm) == 3 else None, arguments)  # type: ignore[misc]


def rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measures arm by arm."""
    made = pipelines(arguments)
    for task in arguments.tasks:
        known = anchors(made[task], arguments)
        unguarded = memory(made[task], [task], known, arguments) if arguments.memory else 0
        for setting, case in ((setting, case) for setting in arguments.settings for case in arguments.cases):
            row = {"task": task, "setting": setting, "case": case, "target": TARGETS[task, case]}
            row |= measure(made[task], method(task, setting, case, known), arguments)
            if row["flagged"] != (case == "unsafe"):
                raise SystemExit(f"the {case} case was {'' if row['flagged'] else 'not '}flagged; the measurement would mean nothing")
            if arguments.memory:
                guarded = memory(made[task], [task, setting, case], known, arguments)
                row |= {
                    "memory_ratio": guarded / unguarded,
                    "memory_target": MEMORY_TARGET,
                    "memory_rise_mib": (guarded - unguarded) / 2**20,
                }
            yield row


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    ratio = f"{row['ratio']:.3f}x  [{row['low']:.3f}, {row['high']:.3f}]  (target {row['target']:.2f}x)"
    held = f"   memory {row['memory_ratio']:.3f}x, {row['memory_rise_mib']:+.0f} MiB" if "memory_ratio" in row else ""
    masked = f"   {row['unguarded_seconds']:.1f} s unguarded, {row['masked']:.0%} masked"
    return f"{row['task']:<12}{row['setting']:<11}{row['case']:<8}{ratio}{held}{masked}"


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1, help="double blocks")
    parser.add_argument("--single", type=int, default=2, help="single blocks")
    parser.add_argument("--full", action="store_true", help="all 19 + 38 blocks; 24 GB in bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--size", type=int, default=512, help="height and width in pixels")
    parser.add_argument("--share", type=float, default=0.15, help="share of the image that is masked")
    parser.add_argument("--steps", type=int, help="default: 4 on a CPU, else 28")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure-memory", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--anchors", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    on_cpu = arguments.device == "cpu"
    arguments.dtype = arguments.dtype or ("float32" if on_cpu else "bfloat16")
    arguments.steps = arguments.steps or (4 if on_cpu else 28)
    if arguments.full:
        arguments.layers, arguments.single = 19, 38
    return arguments


def main() -> None:
    """Measures and prints a table."""
    arguments = parsed()
    if arguments.measure_memory:
        task, *arm = arguments.measure_memory
        guarding = method(task, *arm, Anchors.load(arguments.anchors)) if arm else None
        print(highest(pipelines(arguments)[task], guarding, arguments))
        return
    measured = []
    for row in rows(arguments):
        print(line(row), flush=True)
        measured.append(row)
    if arguments.json:
        settings = {name: getattr(arguments, name) for name in ("layers", "single", "dtype", "size", "share", "steps", "repeats")}
        versions = facts(torch.device(arguments.device)) | {"diffusers": diffusers.__version__}
        arguments.json.write_text(json.dumps(versions | settings | {"rows": measured}, indent=2) + "\n")


if __name__ == "__main__":
    main()
