"""Train the small LTX-Video pipeline on generated clips and save it as a diffusers folder.

python -m examples.moving_shapes.train --output checkpoint
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLLTXVideo, LTXPipeline, LTXVideoTransformer3DModel
from torch import Tensor, nn

from . import models
from .clips import FRAME_RATE, LABELS, NUM_FRAMES, SIZE, Array, Label, clips
from .linear_start import start_linear
from .muon import Muon

TEXT_LENGTH = 16
EMPTY_SHARE = 0.1
ANCHORED_SHARE = 0.7
# Twice the shift of sampling: where a shape goes is settled while the clip is still almost all noise.
SIGMA_SHIFT = 4.0
FOREGROUND_WEIGHT = 5.0
VAE_FRAMES = 3
VAE_BATCH = 8
GRID = SIZE // models.PATCH
ROPE_SCALE = (1 / FRAME_RATE, models.PATCH, models.PATCH)


class Budget:
    """A wall-clock budget with a learning-rate factor: a short warm-up, then a cosine to nearly zero."""

    def __init__(self, minutes: float, warmup: float = 0.02) -> None:
        self.seconds = minutes * 60
        self.warmup = warmup
        self.start = time.monotonic()

    @property
    def progress(self) -> float:
        """Share of the time that is used up."""
        return min(1.0, (time.monotonic() - self.start) / self.seconds)

    @property
    def factor(self) -> float:
        """What to multiply the peak learning rate by now."""
        if self.progress < self.warmup:
            return max(0.02, self.progress / self.warmup)
        return 0.01 + 0.99 * (1 + math.cos(math.pi * self.progress)) / 2


class Ema:
    """Exponential moving average of the weights of some modules."""

    def __init__(self, modules: list[nn.Module], decay: float = 0.998) -> None:
        self.params: list[Tensor] = [param for module in modules for param in module.parameters()]
        self.average = [param.detach().clone() for param in self.params]
        self.decay = decay
        self.steps = 0

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the current weights."""
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 10))
        torch._foreach_lerp_(self.average, self.params, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the averaged and the current weights."""
        for param, average in zip(self.params, self.average, strict=True):
            kept = param.clone()
            param.copy_(average)
            average.copy_(kept)


def set_rates(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Scale every learning rate from its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("peak", group["lr"])
            group["lr"] = group["peak"] * factor


def to_video(batch: list[Array], device: str) -> Tensor:
    """Clips as the VAE's input: [batch, channels, frames, height, width] in -1..1."""
    return torch.from_numpy(np.stack(batch)).to(device).permute(0, 4, 1, 2, 3) * 2 - 1


def log(record: dict[str, float | str], path: Path) -> None:
    """Print a record and append it to the log."""
    print(json.dumps(record), flush=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def train_vae(vae: AutoencoderKLLTXVideo, minutes: float, seed: int, log_path: Path) -> None:
    """Train the VAE on its mean, with a little noise on the latents and the shapes weighted up."""
    device = str(vae.device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-4, weight_decay=0.01)
    source = clips(seed)
    budget = Budget(minutes)
    step, recent = 0, []
    while budget.progress < 1:
        set_rates([optimizer], budget.factor)
        # The convolutions see one frame before and after, so short pieces serve as well and are cheaper.
        start = step % (NUM_FRAMES - VAE_FRAMES + 1)
        video = to_video([clip[start : start + VAE_FRAMES] for _, clip in islice(source, VAE_BATCH)], device)
        latents = vae.encode(video).latent_dist.mode()
        noisy = latents + 0.02 * latents.detach().std() * torch.randn_like(latents)
        error = vae.decode(noisy, return_dict=False)[0] - video
        # Most pixels are background; unweighted, the VAE settles on painting only that.
        is_shape = (video.amax(dim=1, keepdim=True) > 0).float()
        weight = 1 + (FOREGROUND_WEIGHT - 1) * is_shape
        loss = (weight * (error.abs() + error**2)).mean() + 1e-4 * (latents**2).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        recent.append(error.detach().abs().mean().item())
        if step % 50 == 0:
            log(
                {"part": "vae", "step": step, "progress": budget.progress, "l1": float(np.mean(recent))},
                log_path,
            )
            recent = []


@torch.no_grad()
def encode_clips(vae: AutoencoderKLLTXVideo, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Latents [clip, token, channel] in half precision, normalised, and the index of each clip's label.

    The channels' mean and deviation are stored in the VAE, where LTXPipeline looks for them.
    """
    source = clips(seed)
    parts, indices = [], []
    for _ in range(math.ceil(count / 64)):
        labels, batch = zip(*islice(source, 64), strict=True)
        latents = vae.encode(to_video(list(batch), str(vae.device))).latent_dist.mode()
        parts.append(latents.flatten(2).transpose(1, 2).cpu())
        indices += [LABELS.index(label) for label in labels]
    latents = torch.cat(parts)
    mean, std = latents.mean(dim=(0, 1)), latents.std(dim=(0, 1))
    vae.latents_mean.copy_(mean)
    vae.latents_std.copy_(std)
    return ((latents - mean) / std).half(), torch.tensor(indices)


def batches(latents: Tensor, indices: Tensor, size: int, seed: int) -> Iterator[tuple[Tensor, list[Label]]]:
    """Endless shuffled batches."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.randperm(len(latents), generator=generator).split(size):
            if len(chosen) == size:
                yield latents[chosen].float(), [LABELS[index] for index in indices[chosen].tolist()]


def sample_sigmas(count: int, device: str) -> Tensor:
    """Noise levels, spread evenly over the batch and shifted towards more noise."""
    uniform = (torch.randperm(count, device=device) + torch.rand(count, device=device)) / count
    return SIGMA_SHIFT * uniform / (1 + (SIGMA_SHIFT - 1) * uniform)


def anchor_factors(count: int, device: str) -> Tensor:
    """What to multiply the noise level of a token [clip, token] by: less than 1 in one frame of some clips.

    LTX-Video learns to go on from given frames, too. Here that is what teaches the way, which hangs on three
    things: the text, which of two frames is later, and on which side it shows the shape. Where all frames are
    equally noisy, knowing two of them tells nothing, and training makes no headway. With a frame to go on
    from, only the text and the side are left. Any frame will do but the first alone: where a shape starts
    gives away which way it can go.
    """
    kept = (1 - 1.25 * torch.rand(count, device=device)).clamp(min=0).sqrt()
    anchored = torch.rand(count, 1, device=device) < ANCHORED_SHARE
    chosen = torch.randint(NUM_FRAMES, (count, 1), device=device)
    is_anchor = torch.arange(NUM_FRAMES, device=device) == chosen
    factors = torch.where(anchored & is_anchor, kept[:, None], 1.0)
    return factors.repeat_interleave(GRID * GRID, dim=1)


def make_optimizers(
    transformer: LTXVideoTransformer3DModel, encoder: nn.Module
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for all else."""
    matrices = [p for p in transformer.transformer_blocks.parameters() if p.ndim == 2 and min(p.shape) > 6]
    in_muon = {id(param) for param in matrices}
    rest = [p for p in transformer.parameters() if id(p) not in in_muon]
    text = [p for p in encoder.parameters() if p.requires_grad]
    return [
        Muon(matrices, lr=3e-3, weight_decay=0.01),
        torch.optim.AdamW(
            [{"params": rest, "weight_decay": 0.01}, {"params": text, "weight_decay": 0.0}], lr=1e-3
        ),
    ]


def train_transformer(
    pipe: LTXPipeline, data: tuple[Tensor, Tensor], args: argparse.Namespace, log_path: Path
) -> None:
    """Flow matching on the cached latents; the averaged weights are saved at intervals and at the end."""
    transformer, encoder, device = pipe.transformer, pipe.text_encoder, args.device
    models.freeze_attention(encoder)
    optimizers = make_optimizers(transformer, encoder)
    forward = torch.compile(transformer) if args.compile else transformer
    ema = Ema([transformer, encoder])
    budget = Budget(args.minutes)
    saved, recent = 0.0, []
    for step, (latents, labels) in enumerate(batches(*data, args.batch, args.seed), start=1):
        set_rates(optimizers, budget.factor)
        loss = flow_loss(pipe, forward, latents.to(device), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        ema.update()
        recent.append(loss.item())
        if step % 50 == 0:
            record = {"part": "transformer", "step": step, "minutes": budget.progress * args.minutes}
            log({**record, "loss": float(np.mean(recent))}, log_path)
            recent = []
        done = budget.progress >= 1
        if done or (budget.progress - saved) * args.minutes >= args.save_every:
            saved = budget.progress
            ema.swap()
            save(pipe, args.output)
            ema.swap()
        if done:
            return


def flow_loss(pipe: LTXPipeline, forward: Callable[..., Any], latents: Tensor, labels: list[Label]) -> Tensor:
    """Mean squared error of the predicted velocity, noise - latents, at random noise levels."""
    batch = len(latents)
    device = str(latents.device)
    prompts = ["" if torch.rand(()) < EMPTY_SHARE else label.prompt for label in labels]
    text = pipe.tokenizer(prompts, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt").to(
        device
    )
    embeds = pipe.text_encoder(text.input_ids)[0]
    factors = anchor_factors(batch, device)
    sigma = sample_sigmas(batch, device)[:, None] * factors
    noise = torch.randn_like(latents)
    noisy = torch.lerp(latents, noise, sigma[..., None])
    with torch.autocast(latents.device.type, torch.bfloat16):
        pred = forward(
            noisy,
            embeds,
            sigma * 1000,
            text.attention_mask.bool(),
            num_frames=NUM_FRAMES,
            height=GRID,
            width=GRID,
            rope_interpolation_scale=ROPE_SCALE,
            return_dict=False,
        )[0]
    error = (pred.float() - (noise - latents)) ** 2
    loss: Tensor = error[factors > 0].mean()
    return loss


def save(pipe: LTXPipeline, output: Path) -> None:
    """Write the pipeline beside its place, then move it there, so that a reader never sees half of it.

    The VAE is stored in half precision (diffusers loads it in float32), which keeps the folder below 15 MB.
    """
    fresh, old = output.with_name(output.name + ".new"), output.with_name(output.name + ".old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    pipe.vae.half()
    pipe.save_pretrained(fresh, safe_serialization=True)
    pipe.vae.float()
    # The one in use has picked up the padding of its last call.
    models.make_tokenizer().save_pretrained(fresh / "tokenizer")
    for path in fresh.rglob("*.json"):
        # diffusers notes the folder that a resumed part was loaded from, which says nothing to others.
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if '"_name_or_path"' not in line))
    if output.exists():
        output.rename(old)
    fresh.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def make_pipeline() -> LTXPipeline:
    """An untrained pipeline."""
    tokenizer = models.make_tokenizer()
    return LTXPipeline(
        tokenizer=tokenizer,
        text_encoder=models.make_text_encoder(len(tokenizer)),
        vae=models.make_vae(),
        transformer=models.make_transformer(),
        scheduler=models.make_scheduler(),
    )


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the moving-shapes pipeline.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "checkpoint")
    parser.add_argument("--resume", type=Path, help="pipeline folder to go on from")
    parser.add_argument("--vae-minutes", type=float, default=4.0, help="0 keeps the VAE")
    parser.add_argument("--minutes", type=float, default=60.0, help="for the transformer")
    parser.add_argument("--save-every", type=float, default=5.0, help="minutes between saves")
    parser.add_argument("--clips", type=int, default=12288)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile: about 1.5 times as fast on a CPU"
    )
    return parser.parse_args()


def main() -> None:
    """Train the VAE, encode the clips, train the transformer and the text encoder."""
    args = parse_args()
    torch.manual_seed(args.seed)
    pipe = LTXPipeline.from_pretrained(args.resume) if args.resume else make_pipeline()
    pipe.to(args.device)
    log_path = args.output.with_name(args.output.name + ".log.jsonl")
    log_path.parent.mkdir(parents=True, exist_ok=True)
    if args.vae_minutes:
        if not args.resume:
            start_linear(pipe.vae, args.seed)
            models.encode_without_noise(pipe.vae)
        train_vae(pipe.vae, args.vae_minutes, args.seed, log_path)
    pipe.vae.half().float().requires_grad_(False)  # as it will be after loading
    data = encode_clips(pipe.vae, args.clips, args.seed + 1)
    save(pipe, args.output)
    train_transformer(pipe, data, args, log_path)


if __name__ == "__main__":
    main()
