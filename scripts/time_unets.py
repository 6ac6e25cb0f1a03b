"""Time UNets of several sizes side by side, fp32 on the CPU: the table in docs/log.md that chose tiny's size.

python scripts/time_unets.py --threads 2
"""

import time

import click
import torch
from diffusers import UNet2DConditionModel

# latent side, latent channels, block channels, attention at the first level too
CANDIDATES = (
    (8, 4, (48, 96), True),
    (8, 4, (48, 96), False),
    (4, 8, (64, 128), True),
    (4, 8, (96, 192), True),
    (4, 8, (128, 128), True),
)


def seconds(work, repeats: int = 5) -> float:
    work()
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - started) / repeats


@click.command()
@click.option("--threads", default=2, show_default=True)
def main(threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    for side, channels, blocks, attention in CANDIDATES:
        down = ("CrossAttnDownBlock2D" if attention else "DownBlock2D", "CrossAttnDownBlock2D")
        up = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D" if attention else "UpBlock2D")
        unet = UNet2DConditionModel(
            sample_size=side, in_channels=channels, out_channels=channels, block_out_channels=blocks, layers_per_block=1,
            down_block_types=down, up_block_types=up, cross_attention_dim=64, attention_head_dim=4, norm_num_groups=8,
        )  # fmt: skip
        optimizer = torch.optim.AdamW(unet.parameters(), 1e-4)
        latents, tokens = torch.randn(512, channels, side, side), torch.randn(512, 8, 64)
        timesteps = torch.randint(0, 1000, (512,))

        def step(unet=unet, optimizer=optimizer, latents=latents[:64], timesteps=timesteps[:64], tokens=tokens[:64]):
            (unet(latents, timesteps, tokens).sample - latents).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        def forward(unet=unet, latents=latents, timesteps=timesteps, tokens=tokens):
            with torch.no_grad():
                unet(latents, timesteps, tokens)

        print(
            f"{channels} x {side} x {side}, {blocks}, attention at the first level {attention}: "
            f"{unet.num_parameters() / 1e6:.1f} M, training step of 64 {seconds(step):.3f} s, "
            f"forward {seconds(forward, 3) / 512 * 1e3:.2f} ms an image"
        )


if __name__ == "__main__":
    main()
