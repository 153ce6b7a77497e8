"""Train the embedded transformer and text encoder: python -m scripts.train_embedded.flow STATE_DIR

Rectified flow on the shards that `latents` writes, through the program's own block loop. Times are
logit-normal and pass the timestep transform; captions are dropped for the null embedding; some
clips keep frames, as in image-to-video and extension. The first steps learn what captions tell,
alone; that, and the frames' places, are read from the blocks all along (see `Models`). What is
shipped is the moving average of the weights. Shards that appear while this runs are taken in; the
state is saved on the way. Under torchrun the ranks share each step's batches.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch import distributed as dist

from opensora_sp.base.geometry import latent_frames, patch_grid
from opensora_sp.engine.blocks import Local, Stream, run_blocks
from opensora_sp.models.stdit3 import STDiT3, STDiT3Config, patchify, unpatchify
from opensora_sp.parallel.session import Session, open_session
from opensora_sp.request.request import IMAGE_FPS
from scripts.train_embedded.architecture import DIT, T5
from scripts.train_embedded.captions import FACTS, OBJECTS
from scripts.train_embedded.latents import key_frames
from scripts.train_embedded.muon import Muon
from scripts.train_embedded.shards import Shards
from scripts.train_embedded.state import pick_device, read_state, save_state
from scripts.train_embedded.tokens import train_vocabulary
from scripts.train_embedded.vae import CLIP

SEED = 15
STEPS = 69_200  # of what is shipped
RATE, WARM_UP, COOL_DOWN = 1.5e-3, 200, 0.25
# Where a clip is continued, its own motion says what follows: were that known with a caption only,
# guidance would push it further than it goes.
DROPPED_CAPTIONS, DROPPED_CONTINUED = 0.12, 0.4
MASKED, KEPT_FRAMES = 0.65, 0.6  # batches with clips that keep frames, and those clips' share
EVEN_TIMES = 0.2  # drawn evenly instead of logit-normal, so that both ends are known too
# Small pictures are transformed toward little noise, but what they show, and where, is decided in
# much of it: so many times stay as they were drawn, and so many come from the noisy end.
UNTRANSFORMED = 0.6
NOISY_TIMES, NOISY_FROM = 0.3, 0.6
AVERAGE = 0.9985
PLACES, TOLD, STANDS = 0.3, 0.2, 0.05  # weights of what is read from the blocks' states
WORDS_ALONE, CAPTIONS = 500, 160  # first steps, which learn what captions tell, and captions in one
READERS_ALONE = 200  # steps that new readers of a restored model learn in
SAVE_EVERY = 60.0  # seconds


class Models(nn.Module):
    """The transformer and the text encoder, trained together, and readers that are not shipped.

    Two things are of no use by themselves, so that nothing of what is denoised leads there, and
    everything depends on them. Rotary embeddings tell how far apart two frames are, not where in
    the clip either one is: out of pure noise nothing could start to move. And what shifts the
    whole picture is learnt from the text at once (colours), while words that only mean something
    at some place (shapes, directions) first disturb, and are faded out for good. So layers read
    both from the blocks' states, and their errors are part of the loss. A third reading is of two
    objects, which gave each other their shapes: at every patch, which object stands there.
    """

    def __init__(self) -> None:
        from transformers import T5Config, T5EncoderModel

        super().__init__()
        torch.manual_seed(SEED)
        self.t5: Any = T5EncoderModel(T5Config(**{**T5, "dropout_rate": 0.0}))
        self.dit = STDiT3(STDiT3Config.from_dict(DIT, "architecture.py"))
        start_weights(self.dit)
        width, pairs = self.dit.config.hidden_size, self.dit.pairs
        self.places = nn.ModuleList(nn.Linear(width, 2) for _ in pairs[1:])
        self.facts = nn.ModuleList(nn.Linear(width, len(FACTS)) for _ in pairs)
        self.stands = nn.ModuleList(nn.Linear(width, len(OBJECTS)) for _ in pairs)
        self.readers = (self.places, self.facts, self.stands)
        self._seen: list[Tensor] = []
        for _, temporal in pairs:
            temporal.register_forward_hook(lambda _module, _inputs, out: self._seen.append(out))

    def read_error(self, facts: Tensor, told: list[int], stands: Tensor | None = None) -> Tensor:
        """Error of what is read from the clips that passed last; a number.

        facts: what their captions tell [B,facts]; told: the clips whose captions were not dropped.
        stands: which object stands at each patch [B,T,S], -1 for none; None: not asked.
        """
        states = [F.layer_norm(x, x.shape[-1:]) for x in self._seen]  # [B,T,S,C]
        self._seen = []
        error = states[0].new_zeros(())
        if told:
            for state, reader in zip(states, self.facts, strict=True):
                read = reader(state[told].mean((1, 2)))
                error = error + TOLD * F.binary_cross_entropy_with_logits(read, facts[told])
        if told and stands is not None and bool((there := stands[told] >= 0).any()):
            for state, reader in zip(states, self.stands, strict=True):
                read = reader(state[told][there])
                error = error + STANDS * F.cross_entropy(read, stands[told][there])
        frames = states[0].shape[1]
        if frames == 1:
            return error
        true = places_of(frames).to(error.device)[:, None]
        for state, place in zip(states[1:], self.places, strict=True):
            error = error + PLACES * (place(state) - true).pow(2).mean()
        return error


def places_of(count: int) -> Tensor:
    """What tells each latent frame's place: its time in -1..1, and 1 where a chunk begins; [T,2].

    Latent frames lie four frames apart, but the first of a chunk one frame after the last of the
    chunk before: without this, clips jumped there as far as the object moves in four frames.
    """
    chunk = latent_frames(CLIP)
    keys = torch.tensor(key_frames(count // chunk * CLIP), dtype=torch.float32)
    starts = (torch.arange(count) % chunk == 0).float()
    return torch.stack([2 * keys / keys[-1] - 1, starts], dim=1)


def start_weights(dit: STDiT3) -> None:
    """Begin where every block passes its input on: gates, cross-attention and head give zero."""
    for module in dit.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(dit.x_embedder.proj.weight.flatten(1))
    for embedder in (dit.t_embedder, dit.fps_embedder):
        for layer in embedder.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
    nn.init.zeros_(dit.t_block[1].weight)  # type: ignore[arg-type]
    nn.init.zeros_(dit.final_layer.linear.weight)
    for pair in dit.pairs:
        for block in pair:
            nn.init.normal_(block.scale_shift_table, std=0.02)
            nn.init.zeros_(block.cross_attn.proj.weight)
    nn.init.normal_(dit.y_embedder.y_embedding, std=1.0)


def encode_text(models: Models, tokens: list[list[int]], device: torch.device) -> list[Tensor]:
    """Each text's embeddings [L_i, C]."""
    longest = max(len(ids) for ids in tokens)
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in tokens], device=device)
    mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in tokens], device=device)
    states = models.t5(input_ids=ids, attention_mask=mask).last_hidden_state
    return [state[: len(row)] for state, row in zip(states, tokens, strict=True)]


def draw_times(rng: np.random.Generator, count: int, shape: tuple[int, int, int]) -> Tensor:
    """Times in 0..1000, transformed for the shape as the sampler's are; float32 [count]."""
    u = 1 / (1 + np.exp(-rng.normal(size=count)))
    even = rng.random(count) < EVEN_TIMES
    u[even] = rng.random(int(even.sum()))
    height, width, frames = shape
    temporal = 1 if frames == 1 else 5 * max(1, frames // 17)
    ratio = math.sqrt(height * width / 512**2) * math.sqrt(temporal)
    shifted = ratio * u / (1 + (ratio - 1) * u)
    t = torch.from_numpy(np.where(rng.random(count) < UNTRANSFORMED, u, shifted)).float() * 1000
    noisy = rng.random(count) < NOISY_TIMES
    high = torch.from_numpy(rng.uniform(1000 * NOISY_FROM, 1000, size=count)).float()
    t = torch.where(torch.from_numpy(noisy), high, t)
    # Runs in bfloat16 round the time; half of the samples do, so that neither surprises.
    rounded = torch.from_numpy(rng.random(count) < 0.5)
    return torch.where(rounded, t.bfloat16().float(), t)


def draw_mask(rng: np.random.Generator, clips: int, frames: int) -> Tensor | None:
    """Which latent frames are generated, bool [B,T]; None for all.

    Kept: the first frame, as a picture; the last one too; whole chunks at the start; or any frames.
    """
    if frames == 1 or rng.random() > MASKED:
        return None
    mask, chunk = torch.ones(clips, frames, dtype=torch.bool), latent_frames(CLIP)
    for i in np.flatnonzero(rng.random(clips) < KEPT_FRAMES):
        kind = rng.random()
        if frames > chunk and kind < 0.55:
            mask[i, : chunk * int(rng.integers(1, frames // chunk))] = False
        elif kind < 0.75:
            mask[i, 0] = False
            mask[i, -1] = rng.random() > 0.16
        else:
            mask[i] = torch.from_numpy(rng.random(frames) < 0.7)
            mask[i, int(rng.integers(frames))] = True
    return mask


def dropped_shares(mask: Tensor | None, clips: int) -> NDArray[np.float64]:
    """How likely each clip's caption is dropped [B]; mask [B,T] as of `draw_mask`."""
    shares = np.full(clips, DROPPED_CAPTIONS)
    if mask is not None and mask.shape[1] > (chunk := latent_frames(CLIP)):
        shares[~mask[:, :chunk].any(dim=1).numpy()] = DROPPED_CONTINUED
    return shares


def loss_of(
    models: Models, batch: dict[str, Any], rng: np.random.Generator, device: torch.device
) -> Tensor:
    """Mean squared error of the velocity over the frames that are generated, and of readings."""
    dit, shape = models.dit, batch["shape"]
    z = batch["z"].to(device)
    mask = draw_mask(rng, z.shape[0], z.shape[2])
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    noise = torch.randn(z.shape, generator=generator).to(device)
    t = draw_times(rng, z.shape[0], shape).to(device)
    level = (t / 1000).view(-1, 1, 1, 1, 1).expand(-1, 1, z.shape[2], 1, 1)
    if mask is not None:
        level = level * mask.to(device)[:, None, :, None, None]
    texts = encode_text(models, batch["tokens"], device)
    dropped = rng.random(len(texts)) < dropped_shares(mask, len(texts))
    for i in np.flatnonzero(dropped):
        texts[i] = dit.y_embedder.y_embedding[: texts[i].shape[0]]
    size = (z.shape[3], z.shape[4])
    positions = dit.positions(patch_grid(*size), shape[0], shape[1])
    fps = torch.full((z.shape[0],), float(IMAGE_FPS if shape[2] == 1 else 24))
    stream = Stream(
        x=dit.embed(patchify((1 - level) * z + level * noise), positions),
        tables=dit.tables(t, fps, mask),
        text=dit.text_kv(texts),
    )
    (out,) = run_blocks(dit, [stream], Local())
    velocity = unpatchify(dit.head(out, stream.tables), size)
    error = (velocity - (z - noise)).pow(2).mean(dim=(1, 3, 4))  # [B,T]
    made = torch.ones_like(error) if mask is None else mask.to(device)
    loss = (error * made).sum() / made.sum()
    facts, stands = batch["facts"].to(device), batch["stands"].to(device)
    return loss + models.read_error(facts, np.flatnonzero(~dropped).tolist(), stands)


def words_loss(
    models: Models, shards: Shards, rng: np.random.Generator, device: torch.device
) -> Tensor:
    """Error of what is read of many captions, each told to a scrap of noise."""
    dit = models.dit
    tokens, facts = shards.draw_captions(rng, CAPTIONS)
    noise = torch.from_numpy(rng.normal(size=(CAPTIONS, 4, 1, 4, 4))).float().to(device)
    t = torch.from_numpy(rng.uniform(0, 1000, CAPTIONS)).float().to(device)
    stream = Stream(
        x=dit.embed(patchify(noise), dit.positions(patch_grid(4, 4), 32, 32)),
        tables=dit.tables(t, torch.full((CAPTIONS,), 24.0), None),
        text=dit.text_kv(encode_text(models, tokens, device)),
    )
    run_blocks(dit, [stream], Local())
    return models.read_error(facts.to(device), list(range(CAPTIONS)))


def rate_at(step: int, steps: int, begun: int) -> float:
    """Up from step `begun`, level, and down to almost nothing over the last part of the run."""
    left = (steps - step) / (COOL_DOWN * steps)
    return RATE * min(1.0, (step - begun + 1) / WARM_UP, max(0.02, left))


def make_optimizers(models: Models) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the transformer's blocks, AdamW for everything else."""
    blocks = [
        (name, module)
        for pair in models.dit.pairs
        for b in pair
        for name, module in b.named_modules()
    ]
    # What one weight holds below one another: queries, keys and values; keys and values.
    held = {"qkv": 3, "kv_linear": 2}
    pieces = {
        module.weight: held.get(name.rpartition(".")[2], 1)
        for name, module in blocks
        if isinstance(module, nn.Linear)
    }
    others = [weight for weight in models.parameters() if weight not in pieces]
    return [
        Muon(pieces, lr=RATE, weight_decay=0.01, pieces=pieces),
        torch.optim.AdamW(others, lr=RATE, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def add_gradients(models: Models, session: Session) -> None:
    """Give every rank the sum of all ranks' gradients; zeros where none has any.

    Zeros with one rank too: the optimizer passes over weights without gradients, and which these
    are would depend on the number of ranks.
    """
    weights = list(models.parameters())
    own = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
    flat = torch.cat([gradient.flatten() for gradient in own])
    if session.control.side is not None:
        # Over the side group, in host memory: no device's backend is asked for sums.
        total = flat.cpu()
        with session.control.mark.inside("all_reduce"):
            dist.all_reduce(total, group=session.control.side)
        flat = total.to(session.device)
    parts = flat.split([weight.numel() for weight in weights])
    for weight, part in zip(weights, parts, strict=True):
        weight.grad = part.view_as(weight)


def teach_readers(models: Models, shards: Shards, first: int, session: Session) -> None:
    """Let new readers learn to read a model that was trained without them; it stays as it is."""
    readers = [w for part in models.readers for w in part.parameters()]
    optimizer = torch.optim.AdamW(readers, lr=10 * RATE, weight_decay=0.0)
    for step in range(READERS_ALONE):
        rng = np.random.default_rng([SEED, first, step])
        optimizer.zero_grad(set_to_none=True)
        batch = shards.draw(rng, shards.draw_shape(rng, first))
        loss = loss_of(models, batch, rng, session.device)
        loss.backward(inputs=readers)
        optimizer.step()
        if session.leads and (step % 50 == 0 or step + 1 == READERS_ALONE):
            print(f"readers {step + 1}/{READERS_ALONE} loss {float(loss.detach()):.4f}", flush=True)


def open_shards(directory: Path, session: Session) -> Shards:
    """The shards that are there; the vocabulary is made where there is none yet."""
    from sentencepiece import SentencePieceProcessor

    vocabulary = directory / "spiece.model"
    if session.leads and not vocabulary.exists():
        vocabulary.write_bytes(train_vocabulary())
    session.control.barrier()
    shards = Shards(directory, SentencePieceProcessor(model_proto=vocabulary.read_bytes()))
    shards.refresh()
    return shards


def train(directory: Path, steps: int, batches: int, session: Session) -> None:
    """Train up to step number `steps`, from the saved state on.

    batches: of each step, divided among the session's ranks. How many those are changes nothing
    but the time, and the order of sums.
    """
    device = session.device
    shards = open_shards(directory, session)
    models = Models().to(device)
    average = {name: value.clone() for name, value in models.state_dict().items()}
    optimizers = make_optimizers(models)
    first = begun = 0
    if state := read_state(directory / "flow.pt", device):
        models.load_state_dict(state["model"])
        average, first = state["average"], state["step"]
        if "optimizer" in state:
            for optimizer, saved_of in zip(optimizers, state["optimizer"], strict=True):
                optimizer.load_state_dict(saved_of)
            begun = state["begun"]
        else:  # of `restore`
            teach_readers(models, shards, first, session)
            begun = first
    saved, losses = time.monotonic(), []
    for step in range(first, steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step, steps, begun)
            optimizer.zero_grad(set_to_none=True)
        # All batches of a step are of one shape, and so of one length: no rank waits for another.
        shape = shards.draw_shape(np.random.default_rng([SEED, step]), step)
        for number in range(session.rank, batches, session.world_size):
            rng = np.random.default_rng([SEED, step, number])
            if step < WORDS_ALONE:
                loss = words_loss(models, shards, rng, device)
            else:
                loss = loss_of(models, shards.draw(rng, shape), rng, device)
            (loss / batches).backward()
            losses.append(float(loss.detach()))
        add_gradients(models, session)
        torch.nn.utils.clip_grad_norm_(models.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        keep = min(AVERAGE, (step + 1) / (step + 10))
        for name, value in models.state_dict().items():
            average[name].lerp_(value, 1 - keep)
        if step + 1 == steps or time.monotonic() - saved > SAVE_EVERY:
            saved = time.monotonic()
            if session.leads:
                state = {"model": models.state_dict(), "average": average, "begun": begun}
                state |= {"optimizer": [o.state_dict() for o in optimizers], "step": step + 1}
                save_state(directory / "flow.pt", state)
                mean = sum(losses) / len(losses)
                print(f"step {step + 1}/{steps} loss {mean:.4f} shards {shards.read}", flush=True)
            losses = []
            shards.refresh()


def main() -> None:
    """Train to the end, or until interrupted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path, help="where the state is kept")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batches", type=int, default=2, help="of each step, for all ranks")
    parser.add_argument("--device", default="cpu", help="cpu, or an accelerator's name in torch")
    arguments = parser.parse_args()
    with open_session(pick_device(arguments.device).type) as session:
        train(arguments.directory, arguments.steps, arguments.batches, session)


if __name__ == "__main__":
    main()
