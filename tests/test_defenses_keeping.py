import time
from dataclasses import replace

import pytest
import torch
from test_defenses import QUICK, defend, make_backbone, make_data
from torch import nn

from unbackdoor.backbones import Backbone, network_state
from unbackdoor.defenses import settings
from unbackdoor.defenses.keeping import Keeper
from unbackdoor.resume import write_state

TWO = settings.Tuning(epochs=2, batch_size=4)
LONGER = QUICK | {
    "fine-tuning": replace(QUICK["fine-tuning"], tuning=TWO),
    "fine-pruning": replace(QUICK["fine-pruning"], tuning=TWO),
    "nad": settings.NadSettings(teacher=TWO, tuning=TWO),
    "anp": replace(QUICK["anp"], iterations=4),
    "ibau": replace(QUICK["ibau"], rounds=3),
    "adversarial": replace(QUICK["adversarial"], tuning=TWO),
    "contrastive": replace(QUICK["contrastive"], epochs=2),
    "bcu": replace(QUICK["bcu"], tuning=TWO),
}
LOOPING = [name for name in QUICK if name != "clp"]
OF = {"images": "a"}


class Killed(BaseException):
    """Stands for a signal."""


def run(name, backbone, keep=None, *, kill_at=0):
    """Defend; returns the result, unless killed at a step, and the steps as they were told."""
    steps = []

    def on_step(step, _):
        steps.append(step)
        if step == kill_at:
            raise Killed

    try:
        result = defend(name, backbone, make_data(16), LONGER[name], on_step=on_step, keep=keep)
    except Killed:
        result = None
    return result, steps


@pytest.mark.parametrize("name", LOOPING)
def test_a_killed_defense_ends_as_if_it_had_not_been(tmp_path, name):
    backbone, path = make_backbone("cifar/wrn16_1"), tmp_path / "state.safetensors"
    whole, steps = run(name, backbone)
    assert steps == list(range(1, len(steps) + 1))
    for kill_at in (len(steps), len(steps) // 2 + 1):
        path.unlink(missing_ok=True)
        assert run(name, backbone, Keeper(path, OF, seconds=0), kill_at=kill_at)[0] is None
        rest, taken = run(name, backbone, Keeper(path, OF, seconds=0))
        assert 0 < len(taken) < len(steps)
        assert taken == steps[-len(taken) :]
        torch.testing.assert_close(
            network_state(rest.backbone), network_state(whole.backbone), rtol=0, atol=0
        )
        assert rest.log == whole.log


@pytest.mark.parametrize("name", LOOPING)
def test_a_defense_whose_loops_have_ended_takes_no_step_again(tmp_path, name):
    backbone, path = make_backbone("cifar/wrn16_1"), tmp_path / "state.safetensors"
    whole, _ = run(name, backbone, Keeper(path, OF, seconds=1e9))  # the ends of loops are kept
    again, taken = run(name, backbone, Keeper(path, OF))
    assert taken == []
    torch.testing.assert_close(
        network_state(again.backbone), network_state(whole.backbone), rtol=0, atol=0
    )


def test_what_dropout_draws_goes_on_too(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    backbone = Backbone(network, ("3",), mean=(0.5,) * 3, std=(0.5,) * 3).eval()
    path = tmp_path / "state.safetensors"
    whole, steps = run("fine-tuning", backbone)
    run("fine-tuning", backbone, Keeper(path, OF, seconds=0), kill_at=len(steps))
    rest, _ = run("fine-tuning", backbone, Keeper(path, OF, seconds=0))
    torch.testing.assert_close(
        network_state(rest.backbone), network_state(whole.backbone), rtol=0, atol=0
    )


@pytest.mark.parametrize("damage", [None, b"no state"])
def test_what_another_run_kept_and_what_is_damaged_is_written_over(tmp_path, damage):
    path = tmp_path / "state.safetensors"

    def rounds(of):
        values = {"a": torch.zeros(1)}
        kept = Keeper(path, of, seconds=0).rounds(3, {"values": values})
        for number in kept:
            values["a"] += 1
            yield number, values["a"].item()

    assert list(rounds(OF)) == [(0, 1), (1, 2), (2, 3)]
    assert list(rounds(OF)) == []
    if damage is not None:
        path.write_bytes(damage)
    other = OF if damage else {"images": "b"}
    assert list(rounds(other)) == [(0, 1), (1, 2), (2, 3)]
    assert list(rounds(other)) == []


def test_the_seconds_of_earlier_runs_are_kept_and_older_states_have_none(tmp_path):
    path, parts = tmp_path / "state.safetensors", {"values": {"a": torch.zeros(1)}}
    first = Keeper(path, OF, seconds=0)
    for _ in first.rounds(2, parts):
        time.sleep(0.2)
    assert first.earlier == 0
    second = Keeper(path, OF, seconds=0)
    assert 0.4 <= second.earlier < 60
    write_state(path, [1], {"loops": {"0.values.a": torch.ones(1)}}, OF)
    older = Keeper(path, OF)
    assert older.earlier == 0
    assert list(older.rounds(2, parts)) == [1]


def test_states_are_kept_now_and_then(tmp_path):
    path = tmp_path / "state.safetensors"
    kept = Keeper(path, OF, seconds=1e9).rounds(2, {"values": {"a": torch.zeros(1)}})
    assert next(kept) == 0
    assert next(kept) == 1
    assert not path.exists()
    assert next(kept, None) is None
    assert path.exists()
