"""Another library's PGD, in that library's environment; started by run.py.

Searches once for every line it reads, and answers with the seconds and the loss it reached.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from unbackdoor.backbones import Classifier, Source, open_backbone


def art(network: nn.Module, images: Tensor, labels: Tensor, job: dict[str, Any]) -> Callable:
    """Return a search by the Adversarial Robustness Toolbox, which works on numpy arrays."""
    from art.attacks.evasion import ProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(
        network,
        nn.CrossEntropyLoss(),
        tuple(images.shape[1:]),
        job["classes"],
        clip_values=(0, 1),
        device_type="gpu" if images.is_cuda else "cpu",
    )
    attack = ProjectedGradientDescent(
        classifier,
        eps=job["epsilon"],
        eps_step=job["step"],
        max_iter=job["steps"],
        num_random_init=1,
        batch_size=len(images),
        verbose=False,
    )
    pixels, classes = images.cpu().numpy(), labels.cpu().numpy()
    return lambda: torch.from_numpy(attack.generate(pixels, classes))


def torchattacks(
    network: nn.Module, images: Tensor, labels: Tensor, job: dict[str, Any]
) -> Callable:
    """Return a search by torchattacks."""
    from torchattacks import PGD

    attack = PGD(network, eps=job["epsilon"], alpha=job["step"], steps=job["steps"])
    return lambda: attack(images, labels)


def main(job: dict[str, Any]) -> None:
    """Serve searches until the input ends."""
    torch.set_num_threads(job["threads"])
    device = torch.device(job["device"])
    loaded = open_backbone(Source(Path(job["checkpoint"]), job["arch"]))
    network = Classifier(loaded.backbone).to(device).eval()
    images = load_file(job["images"])["images"].to(device)
    with torch.no_grad():
        labels = network(images).argmax(1)
    search = {"art": art, "torchattacks": torchattacks}[job["rival"]](network, images, labels, job)
    for _ in sys.stdin:
        started = time.perf_counter()
        found = search()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        with torch.no_grad():
            loss = F.cross_entropy(network(found.to(device)), labels).item()
        print(json.dumps({"seconds": seconds, "loss": loss}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
