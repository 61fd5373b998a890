import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from unbackdoor.cbd import (
    EpochLosses,
    Views,
    comparison,
    learning_rate,
    loss_terms,
    purify,
    search,
    step_length,
    steps_per_epoch,
)
from unbackdoor.errors import DataError, DivergedError, SettingsError
from unbackdoor.losses import nt_xent
from unbackdoor.settings import (
    ChangeSettings,
    ProjectionSettings,
    PurifySettings,
    SearchSettings,
    ViewSettings,
    purify_preset,
)

OURS = PurifySettings(
    epochs=2, batch_size=16, changes=ChangeSettings(2, additions=1, warps=3, steps=2)
)
QUICK = replace(
    purify_preset("cifar10"),
    batch_norm="reference",
    epochs=2,
    batch_size=16,
    search=SearchSettings(kind="image", steps=2),
)


@pytest.fixture
def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 6, 3),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        ).eval()


@pytest.fixture
def images(generator):
    return torch.randint(0, 256, (40, 3, 12, 12), dtype=torch.uint8, generator=generator)


def as_unit(images):
    return images.float() / 255


def assert_equal_states(a, b):
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=0)


def test_the_terms_are_the_papers_equations_in_their_own_words(network, images):
    settings = replace(QUICK, batch_norm="frozen")
    original = copy.deepcopy(network)
    network[0].weight.data.mul_(1.1)
    i, j, k = as_unit(images[:36]).split(12)
    compare = comparison(settings, original, images)
    terms = loss_terms(network, original, Views(i, j, i, k), settings, compare)
    tau = settings.temperature
    assert terms.pull.item() == pytest.approx(
        nt_xent(network(i), network(k), temperature=tau).item()
    )
    assert terms.distill.item() == pytest.approx(
        nt_xent(network(i), original(i), temperature=tau).item()
    )
    assert terms.align.item() == pytest.approx(
        nt_xent(network(i), network(j), temperature=tau).item()
    )


def test_by_default_found_images_come_back_to_the_originals_features_of_their_own_view(
    network, images
):
    settings = replace(OURS, pull=0.5, distill=0.3, align=0.2, batch_norm="frozen")
    original = copy.deepcopy(network)
    network[0].weight.data.mul_(1.1)
    i, j, k, moved = as_unit(images).split(10)
    compare = comparison(settings, original, images)
    terms = loss_terms(network, original, Views(i, j, k, moved), settings, compare)
    variance = original(as_unit(images)).var(0).mean()

    def distance(a, b):
        return ((a - b).square().mean() / variance).item()

    assert terms.pull.item() == pytest.approx(distance(network(moved), original(k)), rel=1e-5)
    assert terms.distill.item() == pytest.approx(distance(network(i), original(i)), rel=1e-5)
    assert terms.align.item() == pytest.approx(distance(network(i), network(j)), rel=1e-5)


def test_images_that_moved_much_further_than_most_take_part_in_no_term(network, images):
    settings = replace(OURS, trim=1.2, batch_norm="frozen")
    original = copy.deepcopy(network)
    network[0].weight.data.mul_(1.1)
    plain, moved = as_unit(images[:22]).split(11)
    compare = comparison(settings, original, images)
    terms = loss_terms(network, original, Views(plain, plain, plain, moved), settings, compare)
    away = (network(plain) - original(plain)).square().sum(1)
    kept = away <= 1.2 * away.median()
    assert 6 <= kept.sum() < 11
    variance = original(as_unit(images)).var(0).mean()
    for term, found in ((terms.distill, plain), (terms.pull, moved)):
        expected = (network(found) - original(plain))[kept].square().mean() / variance
        assert term.item() == pytest.approx(expected.item(), rel=1e-5)


def test_no_image_is_left_out_while_none_has_moved(network, images):
    settings = replace(OURS, trim=1.2, batch_norm="frozen")
    plain, moved = as_unit(images[:20]).split(10)
    compare = comparison(settings, network, images)
    terms = loss_terms(network, network, Views(plain, plain, plain, moved), settings, compare)
    variance = network(as_unit(images)).var(0).mean()
    expected = (network(moved) - network(plain)).square().mean() / variance
    assert terms.pull.item() == pytest.approx(expected.item(), rel=1e-5)


def test_pull_moves_no_gradient_into_the_anchor(network, images):
    i, j, k = (view.requires_grad_(True) for view in as_unit(images[:36]).split(12))
    settings = replace(QUICK, batch_norm="frozen")
    compare = comparison(settings, network, images)
    terms = loss_terms(network, network, Views(i, j, j, k), settings, compare)
    of_anchor, of_found = torch.autograd.grad(terms.pull, [i, k], allow_unused=True)
    assert of_anchor is None or of_anchor.abs().max() == 0
    assert of_found.abs().max() > 0


@pytest.mark.parametrize("batch_norm", ["batch", "joint", "reference"])
def test_batch_norm_modes_differ_in_whose_statistics_they_use(batch_norm, network, images):
    i, j, k = as_unit(images[:36]).split(12)
    settings = replace(QUICK, batch_norm=batch_norm)
    compare = comparison(settings, network, images)
    terms = loss_terms(copy.deepcopy(network), network, Views(i, j, j, k), settings, compare)
    student = copy.deepcopy(network).train()
    if batch_norm == "reference":
        student(i)  # moves the running statistics
        student.eval()
        anchor, found = student(i), student(k)
    elif batch_norm == "batch":
        anchor, _, found = student(i), student(j), student(k)
    else:
        anchor, _, found = student(torch.cat([i, j, k])).split(12)
    assert terms.pull.item() == pytest.approx(nt_xent(anchor, found).item())


def test_the_search_raises_the_loss_more_than_noise_and_stays_in_the_ball(network, images):
    a, b = as_unit(images[:16]), as_unit(images[16:32])
    settings = replace(QUICK, search=SearchSettings(kind="image", epsilon=0.1, steps=10))
    found = search(network, a, b, settings, generator=torch.Generator().manual_seed(0))
    start = replace(settings, search=replace(settings.search, steps=0))
    noise = search(network, a, b, start, generator=torch.Generator().manual_seed(0))

    def loss(images):
        return nt_xent(network(a), network(images)).item()

    assert loss(found) > loss(noise) + 0.01
    assert (found - b).abs().max() <= 0.1 + 1e-6


def test_a_shared_search_adds_one_perturbation_to_all_images(network, images):
    a, b = as_unit(images[:16]), 0.25 + 0.5 * as_unit(images[16:32])
    settings = replace(QUICK, search=SearchSettings(kind="batch", epsilon=0.1, steps=3))
    shift = search(network, a, b, settings, generator=torch.Generator().manual_seed(0)) - b
    torch.testing.assert_close(shift, shift[:1].expand_as(shift), atol=1e-6, rtol=0)


def test_a_search_for_changes_changes_all_images_alike(network, images):
    a, b = as_unit(images[:16]), as_unit(images[16:32])
    settings = replace(OURS, changes=ChangeSettings(patches=1, additions=0, warps=0, steps=3))
    moved = (search(network, a, b, settings, generator=torch.Generator().manual_seed(0)) - b) != 0
    assert 0 < moved[0].any(0).sum() <= 4
    assert (moved.any(1) == moved.any(1)[:1]).float().mean() > 0.9


def test_the_search_moves_neither_weights_nor_statistics(network, images):
    before = copy.deepcopy(network)
    for batch_norm in ("running", "batch"):
        settings = replace(
            QUICK, search=SearchSettings(kind="image", steps=2, batch_norm=batch_norm)
        )
        a, b = as_unit(images[:32]).split(16)
        search(network, a, b, settings, generator=torch.Generator().manual_seed(0))
    for name, tensor in before.named_buffers():
        assert torch.equal(tensor, network.get_buffer(name)), name
    for weight in network.parameters():
        assert weight.grad is None


@pytest.mark.parametrize(
    ("unit", "length"), [("epsilon", 0.1 * 8 / 255), ("pixel", 0.1), ("level", 0.1 / 255)]
)
def test_a_step_has_its_length_in_each_unit(unit, length):
    assert step_length(SearchSettings(step_unit=unit)) == pytest.approx(length)


@pytest.mark.parametrize(
    "settings",
    [
        OURS,
        replace(OURS, last_batch="keep", batch_size=19),
        QUICK,
        replace(OURS, batch_norm="batch", loss="contrastive"),
        replace(QUICK, batch_norm="batch"),
        replace(QUICK, batch_norm="joint", schedule="cosine"),
        replace(QUICK, batch_norm="frozen", last_batch="keep"),
        replace(QUICK, search=SearchSettings("image", "l2", epsilon=1, steps=2, start="zero")),
        replace(QUICK, search=SearchSettings(kind="batch", steps=2)),
        replace(QUICK, projection=ProjectionSettings(width=4, epochs=1)),
        replace(QUICK, pull=0, distill=1, align=0),
    ],
    ids=[
        "default",
        "fewer images than changes",
        "paper-but-reference",
        "contrastive",
        "paper",
        "joint",
        "frozen",
        "l2",
        "batch-search",
        "projection",
        "distill-only",
    ],
)
def test_purify_is_deterministic_changes_weights_and_leaves_the_victim_alone(
    settings, network, images
):
    before = copy.deepcopy(network)
    once, again = (purify(network, images, settings) for _ in range(2))
    assert_equal_states(once.backbone, again.backbone)
    assert_equal_states(network, before)
    assert not torch.equal(once.backbone[0].weight, network[0].weight)
    assert len(once.history) == 2
    assert not any(module.training for module in once.backbone.modules())


def test_bfloat16_stays_close_to_float32_and_resumes_bit_for_bit(network, images):
    states = []
    settings = replace(QUICK, epochs=3)
    exact = purify(network, images, settings)
    rounded = purify(network, images, settings, precision="bf16", on_epoch=states.append)
    rest = purify(network, images, settings, precision="bf16", state=states[0])
    assert_equal_states(rounded.backbone, rest.backbone)
    assert rounded.backbone[0].weight.dtype == torch.float32
    moved, other = (
        (clean.backbone[0].weight - network[0].weight).flatten() for clean in (exact, rounded)
    )
    assert not other.equal(moved)  # it did compute in bfloat16
    assert torch.cosine_similarity(moved, other, dim=0) > 0.9
    assert other.norm().item() == pytest.approx(moved.norm().item(), rel=0.2)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_step_has_the_rate_the_decay_and_the_clip_of_the_settings(schedule, network, images):
    usual = replace(OURS, batch_size=40, learning_rate=1e-3)
    settings = replace(usual, schedule=schedule, weight_decay=0.1)
    norms = {}
    for clip in (1e-3, 0.0):
        states = []
        purify(network, images, replace(settings, clip=clip), on_epoch=states.append)
        one, two = states  # an epoch is one step
        for name, buffer in two.momentum.items():
            expected = one.student[name] - learning_rate(settings, 0.5) * buffer
            torch.testing.assert_close(two.student[name], expected, rtol=1e-6, atol=1e-8)
        parts = [one.momentum[n] - 0.1 * w.detach() for n, w in network.named_parameters()]
        norms[clip] = torch.stack([part.norm() for part in parts]).norm().item()
    assert norms[1e-3] == pytest.approx(1e-3, rel=0.01)
    assert norms[0.0] > 0.01  # the control


def test_changes_go_on_learning_with_every_batch(network, images):
    seen = []
    network.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().clone()))
    one = ChangeSettings(1, patch_min=0.3, patch_max=0.3, additions=0, warps=0, steps=0)
    purify(network, images, replace(OURS, epochs=1, changes=one))
    first, second = (batch[16:] for batch in seen if len(batch) == 2 * 16)  # plain, then found
    window, other = ((found == found[:1]).all(0) for found in (first, second))
    assert window.sum() == 3 * 4 * 4  # the patch alone is the same on all images
    assert other.equal(window)
    assert not first[0][window].equal(second[0][window])


def test_the_result_is_laid_out_as_the_victim_was(network, images):
    result = purify(network, images, replace(QUICK, epochs=1)).backbone
    assert all(value.is_contiguous() for value in result.state_dict().values())


def test_another_seed_gives_another_result(network, images):
    first, second = (purify(network, images, replace(QUICK, seed=seed)) for seed in (0, 1))
    assert not torch.equal(first.backbone[0].weight, second.backbone[0].weight)


@pytest.mark.parametrize("stop_after", [1, 2])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    stop_after, schedule, network, images
):
    settings = replace(OURS, epochs=3, schedule=schedule)
    states = []

    whole = purify(network, images, settings, on_epoch=states.append)
    rest = purify(network, images, settings, state=states[stop_after - 1])
    assert_equal_states(whole.backbone, rest.backbone)
    for one, other in zip(whole.history, rest.history, strict=True):
        assert one[:4] == other[:4]


class CachesInEval(nn.Module):
    """Keeps what it makes of a weight in eval mode, as timm's LeViT keeps attention biases."""

    def __init__(self, network, *, keeps):
        super().__init__()
        self.network, self.scale = network, nn.Parameter(torch.ones(6))
        self.keeps, self.kept = keeps, None

    def train(self, mode=True):
        self.kept = None
        return super().train(mode)

    def forward(self, images):
        if self.kept is None or not self.keeps:
            self.kept = self.scale.exp()
        return self.network(images) * self.kept


@pytest.mark.parametrize(
    "settings", [OURS, QUICK, replace(QUICK, search=replace(QUICK.search, batch_norm="batch"))]
)
def test_what_a_network_keeps_in_eval_mode_is_made_anew_at_every_step(settings, network, images):
    kept, anew = (
        purify(CachesInEval(network, keeps=keeps).eval(), images, settings).backbone
        for keeps in (True, False)
    )
    assert (kept.scale != 1).all()
    assert_equal_states(kept, anew)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks, and hides it
@pytest.mark.parametrize(
    "settings",
    [
        *(OURS, QUICK),  # of wider balls, for statistics that are not the batch's to show
        replace(QUICK, search=replace(QUICK.search, batch_norm="batch", epsilon=0.2)),
    ],
)
def test_a_search_on_a_compiled_network_ends_where_the_plain_one_does(settings, network, images):
    plain, compiled = (
        purify(network, images, settings, compiled=choice) for choice in (False, True)
    )
    for one, other in zip(plain.history, compiled.history, strict=True):
        assert one.pull == pytest.approx(other.pull, rel=1e-3)
    for name, value in compiled.backbone.state_dict().items():
        torch.testing.assert_close(value, plain.backbone.state_dict()[name], rtol=0.01, atol=1e-3)


def test_a_state_with_more_epochs_than_asked_for_is_refused(network, images):
    states = []
    purify(network, images, QUICK, on_epoch=states.append)
    with pytest.raises(SettingsError, match="the state is of 2 epochs, more than the 1 asked for"):
        purify(network, images, replace(QUICK, epochs=1), state=states[1])


def test_a_head_inside_the_module_is_carried_through_bit_equal(images):
    class WithHead(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return self.body(x)

    torch.manual_seed(0)
    network = WithHead()
    clean = purify(network, images, QUICK).backbone
    assert torch.equal(clean.head.weight, network.head.weight)
    assert not torch.equal(clean.body[0].weight, network.body[0].weight)


def test_plain_images_are_the_reference_for_changed_ones(network, images):
    seen = []
    network.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().clone()))
    purify(network, images, replace(OURS, views=ViewSettings(min_area=0.5)))
    plain = {tuple(image.flatten().tolist()) for image in as_unit(images)}
    together = [batch for batch in seen if len(batch) == 2 * OURS.batch_size]
    assert len(together) == 2 * 2
    for batch in together:
        is_plain = [tuple(image.flatten().tolist()) in plain for image in batch]
        assert is_plain == OURS.batch_size * [True] + OURS.batch_size * [False]


def test_delivered_statistics_are_those_of_plain_images(network, images):
    settings = replace(QUICK, batch_size=20)
    clean = purify(network, images, settings).backbone
    convolved = clean[0](as_unit(images))
    torch.testing.assert_close(
        clean[1].running_mean, convolved.mean((0, 2, 3)), atol=1e-5, rtol=1e-4
    )


def test_delivered_statistics_do_not_depend_on_the_order_of_classes(network, images):
    ordered = torch.cat([images // 3, 150 + images // 3])
    settings = replace(QUICK, epochs=1, batch_size=20, learning_rate=1e-9)
    clean = purify(network, ordered, settings).backbone
    whole = clean[0](as_unit(ordered)).var((0, 2, 3))
    one_class = clean[0](as_unit(ordered[:40])).var((0, 2, 3))
    assert (clean[1].running_var > 0.9 * whole).all()
    assert one_class.sum() < 0.5 * whole.sum()


def test_a_state_is_the_one_after_the_last_epoch(network, images):
    states = []
    purify(network, images, QUICK, on_epoch=states.append)
    assert [len(state.history) for state in states] == [1, 2]
    assert not states[0].student["0.weight"].equal(states[1].student["0.weight"])
    assert isinstance(states[0].history[0], EpochLosses)
    assert set(states[0].momentum) == {name for name, _ in network.named_parameters()}


def test_a_loss_that_is_not_finite_stops_the_run(network, images):
    with pytest.raises(DivergedError, match=r"epoch 1: the loss is no longer finite; start again"):
        purify(network, images, replace(QUICK, learning_rate=1e30))


def test_features_that_end_in_nan_stop_the_run(network, images):
    one_step = replace(QUICK, epochs=1, batch_size=len(images), learning_rate=1e30)
    with pytest.raises(DivergedError, match=r"features have collapsed"):
        purify(network, images, one_step)


def test_images_that_are_all_alike_are_refused(network, images):
    with pytest.raises(DataError, match="sees no difference between these images"):
        purify(network, images[:1].expand(len(images), -1, -1, -1).clone(), QUICK)


def test_collapsed_features_stop_the_run(images):
    class Fades(nn.Module):
        """Returns one and the same features once its weight has moved."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x):
            features = x.flatten(1)[:, :8]
            far = (self.weight - 1).abs() > 1e-9
            return torch.where(far, 1 + 1e-6 * features, features) * self.weight.clamp(min=0.5)

    settings = replace(QUICK, views=ViewSettings(min_area=1, flip=0, jitter=0, grey=0))
    with pytest.raises(DivergedError, match=r"features have collapsed"):
        purify(Fades(), images, settings)


@pytest.mark.parametrize(("rest", "steps"), [("drop", 2), ("keep", 3)])
def test_steps_count_the_last_batch_as_asked(rest, steps):
    assert steps_per_epoch(40, replace(QUICK, last_batch=rest)) == steps
    assert steps_per_epoch(33, replace(QUICK, last_batch=rest)) == 2  # one image has no negatives


def test_too_few_images_are_refused(network, images):
    with pytest.raises(DataError, match=r"7 images do not fill one batch of 16"):
        purify(network, images[:7], QUICK)


def test_the_learning_rate_is_constant_or_falls_to_zero():
    assert learning_rate(QUICK, 0.9) == 0.02
    cosine = replace(QUICK, schedule="cosine")
    assert learning_rate(cosine, 0) == 0.02
    assert learning_rate(cosine, 0.5) == pytest.approx(0.01)
    assert learning_rate(cosine, 1) == pytest.approx(0)


def test_a_stem_of_strided_single_pixels_is_tuned_as_in_repvgg(generator):
    network = nn.Sequential(
        nn.Conv2d(3, 48, 1, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    settings = PurifySettings(epochs=2, batch_size=14, changes=ChangeSettings(steps=1, group=2))
    raw = torch.randint(0, 256, (14, 3, 32, 32), dtype=torch.uint8, generator=generator)
    purified = purify(network.eval(), raw, settings).backbone  # in channels last, it crashes
    assert all(weight.isfinite().all() for weight in purified.parameters())
