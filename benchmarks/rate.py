"""Print a process's training steps a second, so that one learns how many share a GPU best.

    python benchmarks/rate.py MOMENT SECONDS [DEVICE ARCH]

It counts from a moment (seconds since the epoch) on, so that several can begin together.
"""

import sys
import time

import torch
from torch.nn import functional as F  # noqa: N812

from unbackdoor.backbones import Backbone, build
from unbackdoor.devices import deterministic, in_precision, laid_out, wait_for

if __name__ == "__main__":
    moment, seconds = (float(word) for word in sys.argv[1:3])
    device = torch.device(sys.argv[3] if len(sys.argv) > 3 else "cuda")
    net = build(sys.argv[4] if len(sys.argv) > 4 else "cifar/resnet18", classes=10)
    network = laid_out(Backbone(net.network, mean=net.mean, std=net.std).to(device)).train()
    run = in_precision(network, "bf16")
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    images = torch.rand(128, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    labels = (torch.arange(128) % 10).to(device)

    def step() -> None:
        """Train on the one batch."""
        loss = F.cross_entropy(run(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with deterministic():
        step()
        wait_for(device)
        late = time.time() > moment
        time.sleep(max(0.0, moment - time.time()))
        steps = 0
        while time.time() < moment + seconds:
            step()
            steps += 1
            if steps % 5 == 0:
                wait_for(device)
        wait_for(device)
    print(f"{steps / seconds:.1f}{' late' if late else ''}")
