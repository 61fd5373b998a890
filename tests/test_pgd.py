import pytest
import torch

from unbackdoor.pgd import l2_pgd, linf_pgd, shared_pgd


@pytest.fixture
def images(generator):
    return torch.rand(8, 3, 6, 6, generator=generator)


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("steps", [0, 1, 10])
def test_linf_pgd_stays_in_the_ball_and_in_the_image_range(steps, start, images, generator):
    before = images.clone()
    found = linf_pgd(
        lambda x: x.pow(2).sum(),
        images,
        epsilon=0.1,
        step_size=0.03,
        steps=steps,
        generator=generator if start else None,
    )
    assert (found - images).abs().max() <= 0.1 + 1e-6
    assert found.min() >= 0
    assert found.max() <= 1
    assert torch.equal(images, before)
    assert not found.requires_grad


@pytest.mark.parametrize("steps", [0, 1, 10])
def test_l2_pgd_stays_in_every_images_ball_and_in_the_image_range(steps, images, generator):
    found = l2_pgd(
        lambda x: x.pow(3).sum(),
        images,
        epsilon=0.5,
        step_size=0.2,
        steps=steps,
        generator=generator,
    )
    assert (found - images).flatten(1).norm(dim=1).max() <= 0.5 + 1e-5
    assert found.min() >= 0
    assert found.max() <= 1
    assert not torch.equal(found, images)


def test_linf_pgd_reaches_the_corner_that_a_linear_loss_wants(generator):
    images = torch.full((2, 3, 4, 4), 0.5)
    direction = torch.randn(images.shape, generator=generator)
    found = linf_pgd(
        lambda x: (x * direction).sum(),
        images,
        epsilon=0.1,
        step_size=0.05,
        steps=4,
        generator=generator,
    )
    torch.testing.assert_close(found, images + 0.1 * direction.sign())


def test_l2_pgd_reaches_the_point_that_a_linear_loss_wants(generator):
    images = torch.full((2, 3, 4, 4), 0.5)
    direction = torch.randn(images.shape, generator=generator)
    found = l2_pgd(
        lambda x: (x * direction).sum(),
        images,
        epsilon=0.1,
        step_size=0.1,
        steps=40,
        generator=generator,
    )
    unit = direction / direction.flatten(1).norm(dim=1)[:, None, None, None]
    torch.testing.assert_close(found, images + 0.1 * unit, atol=1e-4, rtol=0)


def test_a_search_without_start_and_steps_returns_the_images(images):
    for ascend in (linf_pgd, l2_pgd):
        found = ascend(lambda x: x.sum(), images, epsilon=0.1, step_size=1, steps=0, generator=None)
        assert torch.equal(found, images)


@pytest.mark.parametrize("steps", [1, 7])
def test_linf_pgd_equals_foolbox(steps, generator):
    foolbox = pytest.importorskip("foolbox")
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 6 * 6, 5))
    torch.nn.init.normal_(network[1].weight, generator=generator)
    images = torch.rand(8, 3, 6, 6, generator=generator)
    labels = torch.arange(8) % 5
    attack = foolbox.attacks.LinfProjectedGradientDescentAttack(
        abs_stepsize=0.02, steps=steps, random_start=False
    )
    model = foolbox.PyTorchModel(network.eval(), bounds=(0, 1), device="cpu")
    theirs = attack.run(model, images, labels, epsilon=0.05)
    ours = linf_pgd(
        lambda x: torch.nn.functional.cross_entropy(network(x), labels),
        images,
        epsilon=0.05,
        step_size=0.02,
        steps=steps,
        generator=None,
    )
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_linf_pgd_refuses_an_epsilon_in_grey_levels(images, generator):
    with pytest.raises(ValueError, match=r"for 8 levels pass 8/255"):
        linf_pgd(lambda x: x.sum(), images, epsilon=8, step_size=1, steps=1, generator=generator)


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.1), ("l2", 0.5)])
@pytest.mark.parametrize("start", [True, False])
def test_a_shared_search_finds_one_perturbation_inside_the_ball(norm, epsilon, start, generator):
    images = 0.5 + 0.1 * torch.rand(8, 3, 6, 6, generator=generator)  # so that nothing is clipped
    before = images.clone()
    found = shared_pgd(
        lambda x: x.pow(3).sum(),
        images,
        norm=norm,
        epsilon=epsilon,
        step_size=0.4 * epsilon,
        steps=5,
        generator=generator if start else None,
    )
    shifts = (found - images).flatten(1)
    torch.testing.assert_close(shifts, shifts[:1].expand(8, -1), atol=1e-6, rtol=0)
    length = shifts[0].abs().max() if norm == "linf" else shifts[0].norm()
    assert length.item() == pytest.approx(epsilon, rel=1e-4)  # the loss grows in every direction
    assert torch.equal(images, before)
    assert not found.requires_grad


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_shared_search_reaches_the_point_that_a_linear_loss_wants(norm, generator):
    images = torch.full((2, 3, 4, 4), 0.5)
    direction = torch.randn(1, 3, 4, 4, generator=generator)
    found = shared_pgd(
        lambda x: (x * direction).sum(),
        images,
        norm=norm,
        epsilon=0.1,
        step_size=0.05,
        steps=60,
        generator=generator,
    )
    best = direction.sign() if norm == "linf" else direction / direction.norm()
    torch.testing.assert_close(found, images + 0.1 * best, atol=1e-4, rtol=0)


def test_a_shared_search_stays_in_the_image_range(images, generator):
    found = shared_pgd(
        lambda x: x.sum(),
        images,
        norm="linf",
        epsilon=0.9,
        step_size=1,
        steps=2,
        generator=generator,
    )
    assert found.max() <= 1
    assert found.min() >= 0
