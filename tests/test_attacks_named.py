import json

import pytest

from unbackdoor.attacks.named import ATTACKS, attack_from_record, attack_record, named_attack
from unbackdoor.attacks.triggers import BadNets, Blend, WaNet
from unbackdoor.errors import SettingsError


def named(name, **options):
    return named_attack(name, **{"size": 32, "training": "supervised", **options})


def test_the_papers_shares():
    for name in ("badnets", "blend", "sig", "wanet"):
        attack = named(name)
        assert (attack.share, attack.share_of, attack.poisons) == (0.06, "data", "others")
    for attack in (named("cla"), named("badnets", training="simclr")):
        assert (attack.share, attack.share_of, attack.poisons) == (0.6, "target", "target")
    assert all(named(name).target == 6 for name in ATTACKS)


def test_the_papers_triggers():
    assert named("badnets").trigger == named("cla").trigger == BadNets(3, 1, "top-left")
    assert named("badnets", training="simclr").trigger == BadNets(3, 1, "center")
    assert named("badnets", size=224).trigger == BadNets(32, 4, "top-left")
    assert named("blend", size=224).trigger == Blend(0.2, 224, 224)
    warped = named("wanet")
    assert (warped.trigger, warped.noise, warped.redrawn) == (WaNet(4, 0.5), 2.0, True)
    assert not named("wanet", training="simclr").redrawn
    assert [name for name in ATTACKS if named(name).adversarial] == ["cla"]


@pytest.mark.parametrize(
    ("name", "training"),
    [*((name, "supervised") for name in ATTACKS), ("badnets", "simclr"), ("wanet", "simclr")],
)
def test_an_attack_survives_its_record(name, training):
    attack = named(name, training=training, options={"target": 3}, trigger={})
    assert attack_from_record(json.loads(json.dumps(attack_record(attack)))) == attack


def test_options_of_attack_and_trigger_are_replaced_and_read_as_what_they_are():
    attack = named("badnets", options={"target": 1}, trigger={"size": "8", "position": "center"})
    assert attack.target == 1
    assert attack.trigger == BadNets(size=8, position="center")
    assert named("blend", trigger={"ratio": "0.1"}).trigger == Blend(ratio=0.1)


@pytest.mark.parametrize(
    ("name", "trigger", "message"),
    [
        ("badnet", {}, "attack 'badnet' is unknown; did you mean 'badnets'?"),
        ("zzz", {}, "there are badnets, blend, sig, wanet, cla"),
        (
            "blend",
            {"ration": "1"},
            "Blend: setting 'trigger.ration' is unknown; did you mean 'trigger.ratio'?",
        ),
        ("wanet", {"qq": "1"}, "there are trigger.points, trigger.strength, trigger.seed"),
        ("badnets", {"size": "2.5"}, "BadNets: trigger.size is a whole number, got '2.5'"),
        (
            "badnets",
            {"position": "left"},
            "trigger.position 'left' is unknown; did you mean 'top-left'?",
        ),
    ],
)
def test_unknown_names_and_wrong_values_are_refused(name, trigger, message):
    with pytest.raises(SettingsError) as refused:
        named(name, trigger=trigger)
    assert message in str(refused.value)


def test_an_unknown_option_is_refused():
    with pytest.raises(
        SettingsError, match="badnets: setting 'shares' is unknown; did you mean 's"
    ):
        named("badnets", options={"shares": 0.1})
    with pytest.raises(SettingsError, match="badnets: target is a whole number, got '1'"):
        named("badnets", options={"target": "1"})


def test_cla_has_no_form_without_labels():
    with pytest.raises(SettingsError, match="cla needs labels"):
        named("cla", training="simclr")


def test_a_record_of_other_pixels_is_refused():
    record = attack_record(named("blend"))
    record["trigger"]["sha256"] = "0" * 64
    with pytest.raises(SettingsError, match="has other pixels here"):
        attack_from_record(record)


SIG = attack_record(named("sig"))


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"trigger": {"name": "other"}},
        {"trigger": 3},
        {**SIG, "target": "6"},
        {**SIG, "target": 1.5},
        {**SIG, "target": True},
        {**SIG, "goal": "all"},
        {**SIG, "share": None},
        {**SIG, "more": 1},
        {**SIG, "trigger": {"name": "badnets", "size": 3.5}},
        {**SIG, "trigger": {**SIG["trigger"], "sha256": "0" * 64}},
    ],
)
def test_a_record_of_another_kind_is_refused(record):
    with pytest.raises(SettingsError, match="holds no attack that is known here"):
        attack_from_record(record)
