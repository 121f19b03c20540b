"""SimCLR (Chen et al. 2020, algorithm 1) as one plain PyTorch loop, with the parts of the simclr package.

    python examples/simclr_in_70_lines.py

What `simclr pretrain` adds: packs, checkpoints and exact resume, several processes, memory strategies, precision.
"""

import argparse

import numpy as np
import torch

import simclr
from simclr.config.encoder import EncoderConfig
from simclr.config.schedule import learning_rate, peak_lr, total_steps, warmup_steps
from simclr.data.order import EndlessOrder
from simclr.data.splits import split_indices
from simclr.evaluation.knn import knn
from simclr.losses import nt_xent
from simclr.models import ProjectionHead, build_encoder
from simclr.models.inference import extract
from simclr.training.optim import build_optimizer, set_lr
from simclr.views.policy import Policy
from simclr.views.views import make_views


def main(data: str, epochs: int, batch_size: int, seed: int = 0) -> float:
    """Train an encoder and return its kNN accuracy on images that it was not compared with."""
    images = simclr.open_data(data)  # n images, (H, W, C) uint8
    size = 8 if data == "digits" else 32

    # views: two random crops with colour distortion of each image, a pure function of (seed, epoch, index)
    policy = Policy.google(size, channels=images.channels, strength=0.5, crop_area=(0.3, 1.0), flip=0.0)
    # f: image -> features h; g: features -> projections z
    encoder = build_encoder(EncoderConfig("small", channels=images.channels, size=size), seed=seed)
    head = ProjectionHead(encoder.num_features, layers=2, dim=64, seed=seed)
    network = torch.nn.Sequential(encoder, head).to(memory_format=torch.channels_last)

    # LARS with linear warm-up and cosine decay
    n, peak = len(images), peak_lr(1.0, batch_size, "linear")
    steps, warmup = total_steps(n, epochs, batch_size), warmup_steps(n, 5, batch_size)
    optimizer = build_optimizer("lars", network, lr=peak, weight_decay=1e-6, momentum=0.9)

    order = EndlessOrder(n, seed)
    for step in range(steps):
        epoch, indices = order.at(np.arange(step * batch_size, (step + 1) * batch_size))
        pixels = images.read(indices, copy=False)
        a, b = make_views(pixels, policy, seed=seed, epoch=epoch, indices=indices)  # (B, C, S, S) each
        z_a, z_b = network(torch.cat([a, b])).chunk(2)  # (B, D) each
        loss = nt_xent(z_a, z_b, temperature=0.2)
        set_lr(optimizer, learning_rate(step, peak=peak, warmup_steps=warmup, total_steps=steps))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 20 == 0 or step + 1 == steps:
            print(f"step {step + 1}/{steps}: loss {loss.item():.4f}")

    bank, queries = split_indices(images.labels, fraction=0.2, seed=seed)
    features = extract(encoder, images)  # (n, F)
    predicted = knn(features[bank], images.labels[bank], features[queries])
    accuracy = float((predicted == images.labels[queries]).mean())
    print(f"kNN accuracy {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", nargs="?", default="digits")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=256)
    args = parser.parse_args()
    main(args.data, args.epochs, args.batch_size)
