"""denoising-diffusion-pytorch, as its Trainer uses it, and tuned for a CPU."""

import os

os.environ["TQDM_DISABLE"] = "1"

import torch
from networks import BATCH, ddpm_pytorch, ddpm_unet, size
from torch import Tensor

library = ddpm_pytorch()


class DDPMPytorch:
    """Unet, GaussianDiffusion, Adam, clipping and the Trainer's EMA; images from its ddim_sample."""

    def __init__(self, style: str, images: Tensor) -> None:
        self.images, self.channels, self.tuned = images, images.shape[1], style != "user"
        self.net = ddpm_unet(self.channels, flash_attn=self.tuned)
        if self.tuned:
            self.net.to(memory_format=torch.channels_last)
        self.diffusion = library.GaussianDiffusion(self.net, image_size=images.shape[-1], timesteps=1000)
        self.optimizer = library.Adam(self.diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99), fused=self.tuned or None)
        self.ema = library.EMA(self.diffusion, beta=0.995, update_every=10, use_foreach=self.tuned)
        if style == "compiled":
            self.net.compile()

    def size(self) -> dict[str, int]:
        """Parameters, and FLOPs forward per image."""
        return size(ddpm_unet(self.channels), self.channels)

    def train(self, steps: int) -> None:
        """Steps of the Trainer's loop. Where it opens image files, whole batches are gathered from an array here."""
        for _ in range(steps):
            chosen = torch.randint(len(self.images), (BATCH,))
            images = self.images[chosen].float().div_(255)
            if self.tuned:
                images = images.to(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.tuned):
                loss = self.diffusion(images)
            loss.item()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.diffusion.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.ema.update()

    def sample(self, evaluations: int) -> None:
        """A batch from ddim_sample, which already runs in inference mode."""
        side = self.images.shape[-1]
        self.diffusion.sampling_timesteps = evaluations
        with torch.autocast("cpu", torch.bfloat16, enabled=self.tuned):
            self.diffusion.ddim_sample((BATCH, self.channels, side, side))
