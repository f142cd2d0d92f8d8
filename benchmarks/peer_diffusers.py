"""diffusers, as its example train_unconditional.py uses it, and tuned for a CPU."""

from contextlib import AbstractContextManager, nullcontext

import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from networks import BATCH, diffusers_unet, size
from torch import Tensor
from torch.nn import functional as F


class Diffusers:
    """UNet2DModel, DDPMScheduler, AdamW, clipping and EMAModel; images from DDIMPipeline.

    Tuned is bfloat16, with fused optimiser and averages. Channels-last is left out: it takes a third off the pace of
    this network, whose group norms are slow there.
    """

    def __init__(self, style: str, images: Tensor) -> None:
        self.images, self.channels, self.tuned = images, images.shape[1], style != "user"
        self.net = diffusers_unet(self.channels)
        if style == "compiled":
            self.net.compile()
        self.noise_scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8, fused=self.tuned or None
        )
        self.lr_scheduler = get_scheduler("cosine", self.optimizer, num_warmup_steps=500, num_training_steps=100_000)
        self.ema = EMAModel(
            self.net.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75, foreach=self.tuned
        )

    def size(self) -> dict[str, int]:
        """Parameters, and FLOPs forward per image."""
        return size(diffusers_unet(self.channels), self.channels)

    def train(self, steps: int) -> None:
        """Steps of the example's loop. Where it opens image files, whole batches are gathered from an array here."""
        for _ in range(steps):
            chosen = torch.randint(len(self.images), (BATCH,))
            clean = self.images[chosen].float().div_(127.5).sub_(1)
            noise = torch.randn(clean.shape)
            timesteps = torch.randint(0, 1000, (BATCH,)).long()
            noisy = self.noise_scheduler.add_noise(clean, noise, timesteps)
            with self._precision():
                output = self.net(noisy, timesteps).sample
                loss = F.mse_loss(output.float(), noise)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
            self.optimizer.step()
            self.lr_scheduler.step()
            self.optimizer.zero_grad()
            self.ema.step(self.net.parameters())
            loss.detach().item()

    def sample(self, evaluations: int) -> None:
        """A batch from the DDIM pipeline."""
        pipeline = DDIMPipeline(self.net, DDIMScheduler(num_train_timesteps=1000, beta_schedule="linear"))
        pipeline.set_progress_bar_config(disable=True)
        with torch.inference_mode() if self.tuned else nullcontext(), self._precision():
            pipeline(batch_size=BATCH, num_inference_steps=evaluations, output_type="np")

    def _precision(self) -> AbstractContextManager[object]:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.tuned)
