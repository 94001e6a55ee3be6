"""A pipeline that a test can make odd: its network's arguments, its counts, its tail.

Every argument of the network that has rows changes the rows' output, so that one that is cut
wrongly shows in the latents.
"""

from types import MappingProxyType

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

LENGTH = 6  # words that a text is padded to


def embedding(text: str, width: int = 4) -> Tensor:
    words = (text.split() + ["_"] * LENGTH)[:LENGTH]
    seeds = [sum(map(ord, word)) for word in words]
    noises = [torch.randn(width, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return torch.stack(noises)


class Cache:
    """What a network keeps of its rows between steps."""


class Mixer(torch.nn.Module):
    """Adds to each row what belongs to it; `forms` names the arguments that it takes."""

    dtype, device, config = torch.float32, torch.device("cpu"), MappingProxyType({})

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((), 0.3))
        self.rows, self.seen, self.caches = [], [], False

    def forward(self, x, t, embeds, **odd):
        if isinstance(x, list):
            self.rows.append(len(x))
            pairs = zip(x, embeds, strict=True)
            return ([row * self.weight + text.mean() for row, text in pairs],)
        self.rows.append(len(x))
        self.seen.append(odd)
        added = embeds.mean((1, 2)) + 0.1 * t.reshape(-1)[0] / 1000
        if "layers" in odd:  # (layers, rows, tokens, width)
            added = added + odd["layers"].mean((0, 2, 3))
        if "positions" in odd:  # (3, rows, tokens)
            added = added + odd["positions"].mean((0, 2)) / 10
        if "table" in odd:  # (a length that happens to be the number of rows,)
            assert len(odd["table"]) == 6
            added = added + odd["table"].mean()
        if "lengths" in odd:
            added = added + torch.tensor(odd["lengths"]) / 10
        if "nested" in odd:
            added = added + odd["nested"]["parts"][1].mean((1, 2)) + odd["nested"]["scale"]
        if "total" in odd:
            added = added + odd["total"]
        if "shifts" in odd:  # (copies,), which is (rows,) for one particle alone
            added = added + odd["shifts"]
        if "sizes" in odd:  # (copies, 3)
            added = added + odd["sizes"].mean(1)
        if "pair" in odd:  # (2,), of all rows
            height, width = odd["pair"]
            added = added + height / width
        if "packed" in odd:  # (1, rows * tokens, width)
            added = added + odd["packed"].unflatten(1, (len(x), -1)).mean((0, 2, 3))
        out = x * self.weight + added[:, None, None, None].to(x.dtype)
        return (out, Cache()) if self.caches else (out,)


class Plain(torch.nn.Module):
    """A decoder that only scales; it counts the rows of each call."""

    dtype, device, config = torch.float32, torch.device("cpu"), MappingProxyType({})

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((), 0.5))
        self.rows, self.one_a_call = [], False

    def decode(self, z, return_dict=True):
        if self.one_a_call and len(z) > 1:
            raise RuntimeError("a mask of one row")
        self.rows.append(len(z))
        return (z * self.weight,)


class OddPipeline(DiffusionPipeline):
    """Guided twice a step. `odd` are names of what its test wants of it."""

    def __init__(self, unet, vae, scheduler):
        super().__init__()
        self.register_modules(unet=unet, vae=vae, scheduler=scheduler)
        self.odd: frozenset[str] = frozenset()

    def encode_prompt(self, texts, negative, count):
        if "one text" in self.odd and len(set(texts)) > 1:
            raise RuntimeError("texts of several lengths")
        embeds = torch.stack([embedding(text) for text in texts]).repeat_interleave(count, 0)
        if "sees the longest" in self.odd:
            embeds = embeds + max(len(text.split()) for text in texts)
        if "sees it a little" in self.odd:
            embeds = embeds + 0.005 * max(len(text.split()) for text in texts)
        return embeds, torch.stack([embedding(negative)] * len(embeds))

    def prepare_latents(self, rows, generator):
        if isinstance(generator, list) and len(generator) != rows:
            raise ValueError(f"{len(generator)} generators for a batch of {rows}")
        if "one row" in self.odd and rows > 1:
            raise RuntimeError("rows of several sizes")
        each = generator if isinstance(generator, list) else [generator] * rows
        return torch.stack([torch.randn(4, 8, 8, generator=one) for one in each])

    def prepare_scale(self, rows):
        return torch.linspace(1, 2, rows)[:, None, None, None]

    def __call__(
        self,
        prompt,
        num_inference_steps=6,
        guidance_scale=4.0,
        negative_prompt="plain",
        num_images_per_prompt=1,
        image=None,
        generator=None,
        output_type="pil",
        return_dict=True,
        callback_on_step_end=None,
    ):
        odd = self.odd
        texts = [prompt] if isinstance(prompt, str) else prompt
        if "ignores count" in odd or "wants pictures" in odd:
            num_images_per_prompt = 1
        rows = len(texts) * num_images_per_prompt
        if "wants pictures" in odd and len(image if isinstance(image, list) else [image]) != rows:
            raise IndexError("a picture a row")
        if isinstance(negative_prompt, list):
            negative_prompt = negative_prompt[0]
        count = 1 if "ignores count late" in odd else num_images_per_prompt
        embeds, negative = self.encode_prompt(texts, negative_prompt, count)
        halves = [embeds, negative] if "prompt first" in odd else [negative, embeds]
        latents, scale = self.prepare_latents(rows, generator), self.prepare_scale(rows)
        runs = 2 if "twice" in odd else int("no steps" not in odd)
        for t in self._timesteps(num_inference_steps, runs):
            both = torch.cat(halves)
            if "interleaved" in odd:
                both = torch.stack(halves, 1).flatten(0, 1)
            first, second = self._asked(latents, t, both)
            cond, uncond = (first, second) if "prompt first" in odd else (second, first)
            v = uncond + guidance_scale * (cond - uncond)
            latents = self.scheduler.step(v, t, latents, return_dict=False)[0]
            if callback_on_step_end is not None:
                callback_on_step_end(self, t)
        if "unpacks" in odd:  # what it returns is not what its tail takes
            latents = latents.flatten(2) * 2.0
            if output_type == "latent":
                return (latents,)
            latents = latents.unflatten(2, (8, 8)) / 2.0
        if "averages" in odd:
            latents = latents - latents.mean()
        if output_type == "latent":
            return (latents,)
        if "no tail" in odd:
            raise RuntimeError("no picture can be made of this")
        if "mixes" in odd:
            latents = latents * scale
        images = (self.vae.decode(latents, return_dict=False)[0][:, :3] / 2 + 0.5).clamp(0, 1)
        if "frames" in odd:
            images = images[:, None] * torch.tensor([1.0, 0.2, 0.9, 0.7, 0.4])[:, None, None, None]
            if output_type == "pt":
                return (images.movedim(1, 2) if "channels first" in odd else images,)
            return ([self._pil(video) for video in images],)
        if output_type == "pt":
            return (images.permute(0, 2, 3, 1).numpy() if "arrays" in odd else images,)
        return (self._pil(images),)

    def _timesteps(self, steps, runs):
        for _ in range(runs):
            self.scheduler.set_timesteps(steps)
            yield from self.scheduler.timesteps

    def _pil(self, images):
        return VaeImageProcessor.numpy_to_pil(images.permute(0, 2, 3, 1).detach().numpy())

    def _asked(self, latents, t, both):
        odd, n = self.odd, len(latents)
        if "unguided" in odd:
            return (self.unet(latents, t, both[n:])[0],) * 2
        x = torch.cat([latents] * 2)
        if "interleaved" in odd:
            x = latents.repeat_interleave(2, 0)
        if "lists" in odd:
            (out,) = self.unet(list(x), t, list(both))
            out = torch.stack(out)
        else:
            given = {} if "late" in odd and t > 900 else self._arguments(both, n)
            out = self.unet(x, t, both, **given)[0]
        return (out[0::2], out[1::2]) if "interleaved" in odd else out.chunk(2)

    def _arguments(self, both, n):
        made = {
            "layers": lambda: torch.stack([both, both * 2, both * 3]),
            "positions": lambda: torch.stack([both.mean(2)] * 3),
            "table": lambda: torch.arange(6.0),
            "lengths": lambda: [float(row.sum()) for row in both],
            "nested": lambda: {"parts": (both[0], both * 2), "scale": 0.5},
            "total": lambda: n,
            "shifts": lambda: torch.tensor([0.1, 0.7]),
            "sizes": lambda: torch.tensor([[0.1, 0.2, 0.3], [0.7, 0.8, 0.9]]),
            "pair": lambda: torch.tensor([0.2, 0.8]),
            "packed": lambda: both.flatten(0, 1)[None],
        }
        return {name: make() for name, make in made.items() if name in self.odd}


def odd_pipeline(*odd: str) -> OddPipeline:
    pipe = OddPipeline(Mixer().eval(), Plain().eval(), FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipe.odd = frozenset(odd)
    pipe.unet.caches = "cache" in odd
    pipe.set_progress_bar_config(disable=True)
    return pipe
