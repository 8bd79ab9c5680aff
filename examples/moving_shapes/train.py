"""Train the small LTX-Video pipeline on generated clips and save it as a diffusers folder.

python -m examples.moving_shapes.train --output checkpoint
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLLTXVideo, LTXPipeline, LTXVideoTransformer3DModel
from torch import Tensor, nn

from . import models
from .clips import FRAME_RATE, LABELS, NUM_FRAMES, SIZE, Array, Label, clips
from .linear_start import GREY, compute_vae, linear_code, to_video
from .muon import Muon

TEXT_LENGTH = 16
EMPTY_SHARE = 0.1
ANCHORED_SHARE = 0.3
FIRST_SHARE = 0.5
# Above the shift of sampling: where a shape goes is settled while the clip is still almost all noise.
SIGMA_SHIFT = 3.0
FOREGROUND_WEIGHT = 5.0
VAE_BATCH = 4
# Of the normalised latents, at most.
LATENT_NOISE = 0.2
CODE_CLIPS = 96
GRID = SIZE // models.PATCH
LATENT_FRAMES = 1 + (NUM_FRAMES - 1) // models.PATCH_FRAMES
ROPE_SCALE = (models.PATCH_FRAMES / FRAME_RATE, models.PATCH, models.PATCH)


def rate_factor(step: int, steps: int) -> float:
    """What to multiply the peak learning rate by: a short warm-up, then a cosine to nearly zero."""
    progress = step / steps
    warm_up = min(1.0, (step + 1) / (0.02 * steps + 1))
    return warm_up * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)


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


def log(record: dict[str, float | str], path: Path) -> None:
    """Print a record and append it to the log."""
    print(json.dumps(record), flush=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def train_decoder(vae: AutoencoderKLLTXVideo, args: argparse.Namespace, log_path: Path) -> None:
    """Trains the decoder on noisy latents, such as guidance makes, with the shapes weighted up."""
    in_blocks = [p for name, p in vae.decoder.named_parameters() if "resnets" in name]
    fitted = [p for name, p in vae.decoder.named_parameters() if "resnets" not in name]
    optimizer = torch.optim.Adam([{"params": in_blocks, "lr": 5e-4}, {"params": fitted, "lr": 2e-5}])
    source = clips(args.seed + 1)
    code = linear_code(vae, next_video(source, CODE_CLIPS))
    unit = vae.latents_std.view(1, -1, 1, 1, 1)
    recent = []
    for step in range(args.vae_steps):
        set_rates([optimizer], rate_factor(step, args.vae_steps))
        video = next_video(source, VAE_BATCH)
        latents, video = code.encode(video).to(vae.device), video.to(vae.device)
        noise = torch.randn_like(latents) * torch.rand(VAE_BATCH, 1, 1, 1, 1, device=vae.device)
        error = vae.decode(latents + LATENT_NOISE * unit * noise, return_dict=False)[0] - video
        # Most pixels are background; unweighted, the decoder settles on painting only that.
        is_shape = ((video - GREY).abs().amax(dim=1, keepdim=True) > 0.02).float()
        weight = 1 + (FOREGROUND_WEIGHT - 1) * is_shape
        loss = (weight * (error.abs() + error**2)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.decoder.parameters(), 0.1)
        optimizer.step()
        recent.append(error.detach().abs().mean().item())
        if (step + 1) % 50 == 0:
            log({"part": "decoder", "step": step + 1, "l1": float(np.mean(recent))}, log_path)
            recent = []


def next_video(source: Iterator[tuple[Label, Array]], count: int) -> Tensor:
    """The next clips of a generator, as the VAE's input."""
    return to_video([clip for _, clip in islice(source, count)])


@torch.no_grad()
def encode_clips(vae: AutoencoderKLLTXVideo, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Latents [clip, token, channel] in half precision, normalised, and the index of each clip's label."""
    source = clips(seed)
    code = linear_code(vae, next_video(source, CODE_CLIPS))
    mean, std = (one.cpu().view(1, 1, -1) for one in (vae.latents_mean, vae.latents_std))
    parts, indices = [], []
    for _ in range(math.ceil(count / 64)):
        labels, batch = zip(*islice(source, 64), strict=True)
        latents = code.encode(to_video(list(batch)))
        parts.append(((latents.flatten(2).transpose(1, 2) - mean) / std).half())
        indices += [LABELS.index(label) for label in labels]
    return torch.cat(parts), torch.tensor(indices)


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

    LTX-Video learns to go on from given frames, too: a frame without noise is a given one, and pictures are
    given as the first. Frames with less noise than the others teach the model to go by them.
    """
    kept = (1 - 1.5 * torch.rand(count, device=device)).clamp(min=0).sqrt()
    anchored = torch.rand(count, 1, device=device) < ANCHORED_SHARE
    chosen = torch.randint(LATENT_FRAMES, (count, 1), device=device)
    chosen = torch.where(torch.rand(count, 1, device=device) < FIRST_SHARE, 0, chosen)
    is_anchor = torch.arange(LATENT_FRAMES, device=device) == chosen
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
    ema = Ema([transformer, encoder])
    start, recent = time.monotonic(), []
    for step, (latents, labels) in enumerate(islice(batches(*data, args.batch, args.seed), args.steps)):
        set_rates(optimizers, rate_factor(step, args.steps))
        loss = flow_loss(pipe, latents.to(device), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        ema.update()
        recent.append(loss.item())
        if (step + 1) % 50 == 0:
            minutes = (time.monotonic() - start) / 60
            progress: dict[str, float | str] = {"part": "transformer", "step": step + 1, "minutes": minutes}
            log({**progress, "loss": float(np.mean(recent))}, log_path)
            recent = []
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            ema.swap()
            save(pipe, args.output)
            ema.swap()


def flow_loss(pipe: LTXPipeline, latents: Tensor, labels: list[Label]) -> Tensor:
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
    # In float32: many CPUs have to emulate bfloat16.
    pred = pipe.transformer(
        noisy,
        embeds,
        sigma * 1000,
        text.attention_mask.bool(),
        num_frames=LATENT_FRAMES,
        height=GRID,
        width=GRID,
        rope_interpolation_scale=ROPE_SCALE,
        return_dict=False,
    )[0]
    error = (pred - (noise - latents)) ** 2
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
    parser.add_argument("--vae-steps", type=int, default=500, help="for the VAE's decoder")
    parser.add_argument("--steps", type=int, default=10_000, help="for the transformer")
    parser.add_argument("--save-every", type=int, default=250, help="steps between saves")
    parser.add_argument("--clips", type=int, default=23040)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    """Compute the VAE, train its decoder, encode the clips, train the transformer and the text encoder."""
    args = parse_args()
    torch.manual_seed(args.seed)
    pipe = LTXPipeline.from_pretrained(args.resume) if args.resume else make_pipeline()
    log_path = args.output.with_name(args.output.name + ".log.jsonl")
    log_path.parent.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        compute_vae(pipe.vae, args.seed)
    pipe.to(args.device)
    if not args.resume:
        train_decoder(pipe.vae, args, log_path)
    pipe.vae.half().float().requires_grad_(False)  # as it will be after loading
    data = encode_clips(pipe.vae, args.clips, args.seed + 2)
    save(pipe, args.output)
    train_transformer(pipe, data, args, log_path)


if __name__ == "__main__":
    main()
