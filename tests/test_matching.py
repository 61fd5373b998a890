import argparse
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from unbackdoor.checkpoint import Checkpoint, Tree, read_checkpoint
from unbackdoor.errors import MismatchError
from unbackdoor.matching import (
    describe_match,
    flat_tree,
    match_keys,
    matched_tensors,
    replace_tensors,
    state_dicts_apart,
)
from unbackdoor.networks import small_resnet

torch.set_num_threads(1)

HEAD = ("fc.weight", "fc.bias")


def network(seed: int = 0, *, classes: int = 10, width: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    layers = nn.ModuleDict(
        {
            "conv1": nn.Conv2d(3, width, 3),
            "bn1": nn.BatchNorm2d(width),
            "fc": nn.Linear(width, classes),
        }
    )
    layers["fc"].weight.data.normal_()
    return layers


def shapes(layers: nn.Module) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in layers.state_dict().items()}


def prefixed(prefix: str, state: dict[str, Tensor]) -> Tree:
    return {prefix + key: tensor for key, tensor in state.items()}


def checkpoint(tree: Tree, *dropped: str) -> Checkpoint:
    return Checkpoint(Path("victim.pt"), "torch", tree, dropped, "0" * 64, {})


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(found[k] is expected[k] for k in found)


STYLES = [
    ((), ""),
    *(((nesting,), "") for nesting in (
        "state_dict", "model", "model_state_dict", "model_state", "net", "network", "module",
        "teacher", "student", "ema", "model_ema", "state_dict_ema", "encoder", "backbone",
        "params", "weights",
    )),
    *((("state_dict",), prefix) for prefix in (
        "module.", "backbone.", "encoder.", "encoder_q.", "module.encoder_q.", "online_network.",
        "online_encoder.", "base_encoder.", "module.base_encoder.", "student.", "teacher.",
        "model.", "net.", "features.", "_orig_mod.", "module._orig_mod.", "visual.",
        "trunk.", "resnet.", "module.backbone.", "model.backbone.net.",
    )),
    (("checkpoint", "state_dict"), "anything.at.all."),
]  # fmt: skip


@pytest.mark.parametrize(("nesting", "prefix"), STYLES)
def test_every_common_nesting_and_prefix_is_found_by_itself(nesting, prefix):
    state = network().state_dict()
    tree = {"queue": torch.zeros(7), **prefixed(prefix, state)}
    for name in reversed(nesting):
        tree = {name: tree, "epoch_losses": torch.zeros(3)}
    found = checkpoint(tree)
    match = match_keys(found, shapes(network()), head=HEAD)
    assert (match.nesting, match.prefix) == (nesting, prefix)
    assert same(matched_tensors(found, match), state)
    assert set(match.head) == set(HEAD)
    assert "queue" in match.left_over
    assert match.other == ()


def files_in_the_wild(one: dict[str, Tensor], two: dict[str, Tensor]) -> dict[str, Tree]:
    trainer = {"optimizer": {"state": {0: torch.ones(2)}, "lr": 0.1}, "epoch": 3}
    return {
        "ddp": {"state_dict": prefixed("module.", one), **trainer},
        "lightning": {
            "pytorch-lightning_version": "2.0",
            "state_dict": prefixed("model.backbone.", one),
            "optimizer_states": [trainer["optimizer"]],
            "hyper_parameters": argparse.Namespace(lr=0.1),
        },
        "moco": {
            "arch": "resnet18",
            "state_dict": {
                **prefixed("module.encoder_k.", two),
                **prefixed("module.encoder_q.", one),
                "module.queue": torch.zeros(4, 8),
                "module.queue_ptr": torch.zeros(1, dtype=torch.long),
            },
            **trainer,
        },
        "dino": {
            "student": prefixed("module.backbone.", two),
            "teacher": prefixed("backbone.", one) | {"head.mlp.0.weight": torch.zeros(3, 4)},
            "args": argparse.Namespace(arch="vit"),
            **trainer,
        },
        "byol": {
            "online_network_state_dict": prefixed("online_network.", one),
            "target_network_state_dict": prefixed("target_network.", two),
        },
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("style", ["ddp", "lightning", "moco", "dino", "byol"])
def test_files_as_common_trainers_write_them_are_recovered_bit_equal(tmp_path, style, zipped):
    one, two = network(1).state_dict(), network(2).state_dict()
    content = files_in_the_wild(one, two)[style]
    torch.save(content, tmp_path / "c.pth", _use_new_zipfile_serialization=zipped)
    found = read_checkpoint(tmp_path / "c.pth")
    match = match_keys(found, shapes(network()), head=HEAD)
    tensors = matched_tensors(found, match)
    assert tensors.keys() == one.keys()
    assert all(torch.equal(tensors[key], one[key]) for key in one)
    assert len(match.other) == (style in ("moco", "dino", "byol"))
    assert any(entry.startswith("optimizer") for entry in found.dropped) == (style != "byol")


def test_the_head_may_have_any_number_of_classes_or_be_absent():
    found = checkpoint(network(classes=1000).state_dict())
    match = match_keys(found, shapes(network(classes=10)), head=HEAD)
    assert match.head == HEAD
    assert "fc.weight, fc.bias (1000 classes)" in describe_match(match, found)

    headless = {key: t for key, t in network().state_dict().items() if key not in HEAD}
    match = match_keys(checkpoint(headless), shapes(network()), head=HEAD)
    assert match.head == ()
    assert match.missing == ()
    assert "head: none found" in describe_match(match, checkpoint(headless))


def test_a_head_of_another_feature_size_is_left_over():
    state = network().state_dict() | {"fc.weight": torch.zeros(10, 99)}
    match = match_keys(checkpoint(state), shapes(network()), head=HEAD)
    assert match.head == ("fc.bias",)
    assert match.left_over == ("fc.weight",)


def test_counters_of_batch_norms_may_be_absent_and_nothing_else_of_the_body():
    state = network().state_dict()
    del state["bn1.num_batches_tracked"]
    found = checkpoint(state)
    match = match_keys(found, shapes(network()), head=HEAD)
    assert match.missing == ("bn1.num_batches_tracked",)
    assert "matched: 6 of 7 body tensors" in describe_match(match, found)
    assert "absent: 1 num_batches_tracked" in describe_match(match, found)
    del state["bn1.weight"]
    with pytest.raises(MismatchError, match=r"bn1\.weight +4 +absent"):
        match_keys(checkpoint(state), shapes(network()), head=HEAD)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("module.encoder_q.", "module.encoder_k."),
        ("teacher.", "student."),
        ("online_network.", "target_network."),
        ("backbone.", "backbone_momentum."),
        ("model.", "model_ema."),
    ],
)
def test_of_two_copies_the_documented_one_is_taken_and_the_other_is_named(first, second):
    one, two = network(1).state_dict(), network(2).state_dict()
    for halves in (
        prefixed(first, one) | prefixed(second, two),
        prefixed(second, two) | prefixed(first, one),
    ):
        found = checkpoint({"state_dict": halves})
        match = match_keys(found, shapes(network()), head=HEAD)
        assert same(matched_tensors(found, match), one)
        assert match.other == (f"state_dict.{second[:-1]}",)
        assert (
            "warning: would have fitted as well, and stays as it came, for whoever loads it: "
            f"state_dict.{second[:-1]}" in describe_match(match, found)
        )


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("teacher", "student"),
        ("model", "ema"),
        ("state_dict_ema", "state_dict"),  # as timm's loader takes them
        ("model_ema", "model"),
        ("online", "target"),
    ],
)
def test_of_two_state_dicts_the_documented_one_is_taken(first, second):
    one, two = network(1).state_dict(), network(2).state_dict()
    found = checkpoint({second: two, first: one})
    match = match_keys(found, shapes(network()), head=HEAD)
    assert (match.nesting, match.other) == ((first,), (second,))
    assert state_dicts_apart(match, found.tree) == [f"{second} (9 tensors)"]


def test_what_stands_in_two_places_is_replaced_in_both():
    state = network(1).state_dict()
    places = {"conv1": "0", "bn1": "1"}  # as of nn.Sequential(conv1, bn1) beside the network
    again = {
        f"features.{places[key.split('.')[0]]}.{key.split('.')[1]}": tensor
        for key, tensor in state.items()
        if key not in HEAD
    }
    found = checkpoint({"net": {**prefixed("model.", state), **again}, "best": dict(state)})
    match = match_keys(found, shapes(network()), head=HEAD, prefix="model.")
    assert match.left_over == match.other == ()
    assert len(match.shared) == len(again) + len(state)
    told = describe_match(match, found)
    assert (
        "the same tensors under other names, changed with them: net.features (7), best.conv1"
        in told
    )
    assert "kept as it is: best" not in told
    new = replace_tensors(found, match, {"conv1.weight": torch.ones(4, 3, 3, 3)})
    for path in (
        ("net", "model.conv1.weight"),
        ("net", "features.0.weight"),
        ("best", "conv1.weight"),
    ):
        assert new[path[0]][path[1]].eq(1).all(), path
    assert new["net"]["features.0.bias"] is state["conv1.bias"]


def test_copies_that_merely_are_equal_stay():
    state = network(1).state_dict()
    found = checkpoint({"model": state, "ema": {key: t.clone() for key, t in state.items()}})
    match = match_keys(found, shapes(network()), head=HEAD)
    assert (match.shared, match.other) == ((), ("ema",))
    new = replace_tensors(found, match, {"conv1.weight": torch.ones(4, 3, 3, 3)})
    assert new["ema"] is found.tree["ema"]


def test_a_deeper_or_richer_network_is_not_taken_for_a_part_of_it():
    state = network(1).state_dict()
    more = {"conv1.2.weight": torch.ones(3), "bn1.se.fc.bias": torch.ones(2)}
    message = r"2 weights that the network lacks, .*: net\.conv1\.2, net\.bn1\.se\. .*'net\.'"
    with pytest.raises(MismatchError, match=message):
        match_keys(checkpoint(prefixed("net.", state | more)), shapes(network()), head=HEAD)
    found = checkpoint(prefixed("net.", state | more))
    assert match_keys(found, shapes(network()), head=HEAD, prefix="net.").prefix == "net."
    both = checkpoint({"large": state | more, "small": network(2).state_dict()})
    assert match_keys(both, shapes(network()), head=HEAD).nesting == ("small",)


@pytest.mark.parametrize("wrapper", ["", "net."])
def test_what_stands_beside_the_body_is_no_larger_network(wrapper):
    state = prefixed(wrapper, network(1).state_dict())
    expected = prefixed(wrapper, shapes(network()))
    head = tuple(wrapper + key for key in HEAD)
    harmless = ("fc.0.weight", "projector.0.weight", "queue", "conv1.attn_mask", "mask_token")
    unused = ("level3.project.0.weight", "bn1.aux_bn.0.weight")
    for name in (wrapper + word for word in (*harmless, *unused)):
        found = checkpoint(state | {name: torch.ones(3)})
        assert name in match_keys(found, expected, head=head).left_over
    for name in ("conv1.lora_A", "bn1.gamma", "conv1.1.bias", "register_tokens"):
        found = checkpoint(state | {wrapper + name: torch.ones(3)})
        with pytest.raises(MismatchError, match="1 weights that the network lacks"):
            match_keys(found, expected, head=head)
    headless = {key: shape for key, shape in expected.items() if key not in head}
    assert set(head) <= set(match_keys(checkpoint(state), headless).left_over)


def test_another_classifier_in_the_heads_place_is_no_larger_network():
    body = {"stem.weight": torch.ones(2), "head.norm.weight": torch.ones(2)}
    expected = {key: t.shape for key, t in body.items()} | {"head.fc.weight": torch.Size([10, 2])}
    found = checkpoint(body | {"head.fc.0.weight": torch.ones(5, 2)})
    match = match_keys(found, expected, head=("head.fc.weight",))
    assert match.left_over == ("head.fc.0.weight",)


def test_blocks_after_the_last_of_a_list_are_of_a_larger_network():
    state = {f"features.{i}.weight": torch.ones(2, 2) for i in range(3)}
    expected = {key: tensor.shape for key, tensor in state.items()}
    with pytest.raises(MismatchError, match="1 weights that the network lacks"):
        match_keys(checkpoint(state | {"features.3.weight": torch.ones(2, 2)}), expected)


def test_more_blocks_under_foreign_names_are_of_a_larger_network_too():
    state = network(1).state_dict()
    theirs = {key.replace("conv1", "stem").replace("bn1", "norm"): t for key, t in state.items()}

    def rename(tensors):
        return {name.replace("stem", "conv1").replace("norm", "bn1"): name for name in tensors}

    options = {"head": HEAD, "rename": rename}
    assert match_keys(checkpoint(theirs), shapes(network()), **options).left_over == ()
    found = checkpoint(theirs | {"stem.2.weight": torch.ones(3)})
    with pytest.raises(MismatchError, match=r"lacks, .*: stem\.2\.weight\. "):
        match_keys(found, shapes(network()), **options)


def test_many_long_names_cost_no_time():
    state = network(1).state_dict()
    long = {f"{i}.{'a.' * 900}weight": torch.ones(1) for i in range(200)}
    began = time.perf_counter()
    match_keys(checkpoint(state | long), shapes(network()), head=HEAD)
    assert time.perf_counter() - began < 2


def test_the_user_can_choose_the_other_copy():
    one, two = network(1).state_dict(), network(2).state_dict()
    found = checkpoint(
        {"teacher": prefixed("backbone.", one), "student": prefixed("backbone.", two)}
    )
    match = match_keys(found, shapes(network()), head=HEAD, nesting="student")
    assert same(matched_tensors(found, match), two)

    moco = checkpoint(prefixed("encoder_q.", one) | prefixed("encoder_k.", two))
    for prefix in ("encoder_k.", "encoder_k"):
        match = match_keys(moco, shapes(network()), head=HEAD, prefix=prefix)
        assert same(matched_tensors(moco, match), two)
    with pytest.raises(
        MismatchError, match="holds no tensors at --nesting 'ema', only at 'teacher', 'student'"
    ):
        match_keys(found, shapes(network()), head=HEAD, nesting="ema")


def test_of_many_state_dicts_one_has_to_be_named():
    state = network(1).state_dict()
    found = checkpoint({f"epoch{i}": {**state} for i in range(300)})
    with pytest.raises(MismatchError, match="holds 300 state dicts, such as 'epoch0' and 'epoch2"):
        match_keys(found, shapes(network()), head=HEAD)
    assert match_keys(found, shapes(network()), head=HEAD, nesting="epoch7").nesting == ("epoch7",)
    with pytest.raises(MismatchError, match=r"only at 'epoch0', .* and 288 more"):
        match_keys(found, shapes(network()), head=HEAD, nesting="epoch")


def test_what_was_not_changed_stays_bit_for_bit_whatever_reading_rounded():
    doubles = {key: tensor.double() for key, tensor in network(1).state_dict().items()}
    doubles["fc.weight"] += 1e-12
    found = checkpoint({"model": doubles})
    match = match_keys(found, shapes(network()), head=HEAD)
    state = {key: tensor.float() for key, tensor in doubles.items()}
    state["conv1.weight"] = state["conv1.weight"] + 1
    new = flat_tree(match, replace_tensors(found, match, state))
    assert new["fc.weight"] is doubles["fc.weight"]
    assert new["conv1.weight"].equal((doubles["conv1.weight"].float() + 1).double())
    assert {tensor.dtype for tensor in new.values()} == {torch.float64}


def test_a_copy_without_head_gives_way_to_one_with_head():
    state = network(1).state_dict()
    body = {key: tensor for key, tensor in network(2).state_dict().items() if key not in HEAD}
    match = match_keys(checkpoint({"a": body, "b": state}), shapes(network()), head=HEAD)
    assert match.nesting == ("b",)


@pytest.mark.parametrize("swap", [{"downsample": "shortcut"}, {"fc": "linear"},
                                  {"downsample": "shortcut", "fc": "linear"}])  # fmt: skip
@pytest.mark.parametrize("backwards", [False, True])
def test_other_spellings_of_small_resnets_fit_both_ways(swap, backwards):
    torch.manual_seed(0)
    ours = small_resnet("resnet18", classes=10).state_dict()
    theirs = {
        ".".join(swap.get(part, part) for part in key.split(".")): t for key, t in ours.items()
    }
    network, file = (theirs, ours) if backwards else (ours, theirs)
    head = tuple(key for key in network if key.startswith(("fc.", "linear.")))
    found = checkpoint({"net": prefixed("module.", file)})
    match = match_keys(found, {key: t.shape for key, t in network.items()}, head=head)
    assert match.prefix == "module."
    assert set(match.head) == set(head)
    assert match.left_over == ()
    assert same(dict(sorted(matched_tensors(found, match).items())), dict(sorted(network.items())))


def test_a_network_that_uses_both_spellings_is_not_confused():
    expected = {"fc.weight": torch.Size([2, 2]), "linear.weight": torch.Size([2, 2])}
    with pytest.raises(MismatchError, match="absent"):
        match_keys(checkpoint({"linear.weight": torch.zeros(2, 2)}), expected)


def test_other_shapes_are_an_error_that_says_so():
    with pytest.raises(MismatchError) as caught:
        match_keys(
            checkpoint({"model": network(width=8).state_dict()}), shapes(network()), head=HEAD
        )
    text = str(caught.value)
    assert text.startswith(
        "victim.pt: does not fit the network; nearest is 'model', where 6 tensors"
    )
    assert "  conv1.weight      4x3x3x3  conv1.weight 8x3x3x3\n" in text
    assert "The names agree, the shapes do not" in text
    assert "RGB" not in text
    assert "--arch" in text


def test_a_network_of_other_channels_is_told_from_one_of_another_size():
    grey = network().state_dict()
    grey["conv1.weight"] = grey["conv1.weight"][:, :1]
    with pytest.raises(MismatchError, match="Of other channels than RGB, only a network of your"):
        match_keys(checkpoint(grey), shapes(network()), head=HEAD)


def test_a_mismatch_shows_a_short_table_of_the_nearest_state_dict():
    torch.manual_seed(0)
    resnet = small_resnet("resnet18", classes=10)
    head = ("fc.weight", "fc.bias")
    few = {f"module.{key}": t for key, t in list(resnet.state_dict().items())[:60]}
    few["module.stray"] = torch.zeros(5, 6)
    tree = {"far": {"x": torch.zeros(1)}, "state_dict": few}
    with pytest.raises(MismatchError) as caught:
        match_keys(checkpoint(tree), shapes(resnet), head=head)
    text = str(caught.value)
    assert "nearest is 'state_dict' with prefix 'module.'" in text
    assert text.count("absent") == 12
    assert "more\n" in text
    assert "The file has, unasked for: module.stray 5x6" in text


def test_a_network_of_other_names_is_an_error_that_says_so():
    with pytest.raises(MismatchError, match="None of the network's tensors is there"):
        match_keys(checkpoint({"model": {"blob": torch.zeros(2)}}), shapes(network()), head=HEAD)


def test_replacing_keeps_everything_else_the_same_object_and_every_dtype():
    state = {
        key: t.half() if t.is_floating_point() else t for key, t in network(1).state_dict().items()
    }
    tree: Tree = {
        "note": {"other": torch.zeros(2)},
        "state_dict": {**prefixed("module.", state), "module.queue": torch.zeros(3)},
        "student": dict(network(3).state_dict()),
    }
    found = checkpoint(tree)
    match = match_keys(found, shapes(network()), head=HEAD)
    clean = network(2).state_dict()
    body = {key: tensor for key, tensor in clean.items() if key not in HEAD}
    new = replace_tensors(found, match, body)

    assert new["note"] is tree["note"]
    assert new["student"] is tree["student"]
    assert list(new) == list(tree)
    assert list(new["state_dict"]) == list(tree["state_dict"])
    assert new["state_dict"]["module.queue"] is tree["state_dict"]["module.queue"]
    assert new["state_dict"]["module.fc.weight"] is tree["state_dict"]["module.fc.weight"]
    assert torch.equal(new["state_dict"]["module.conv1.weight"], clean["conv1.weight"].half())
    assert torch.equal(tree["state_dict"]["module.conv1.weight"], state["conv1.weight"])
    flat = flat_tree(match, new)
    assert list(flat) == list(tree["state_dict"])
    assert flat["module.conv1.weight"] is new["state_dict"]["module.conv1.weight"]


def test_putting_the_same_tensors_back_changes_no_bit():
    state = {
        key: t.bfloat16() if t.is_floating_point() else t
        for key, t in network().state_dict().items()
    }
    found = checkpoint({"model": state})
    match = match_keys(found, shapes(network()), head=HEAD)
    loaded = network(5)
    loaded.load_state_dict(matched_tensors(found, match))
    new = replace_tensors(found, match, loaded.state_dict())
    assert all(torch.equal(new["model"][key], state[key]) for key in state)
    assert all(new["model"][key].dtype == state[key].dtype for key in state)


def test_replacing_by_another_shape_is_refused():
    found = checkpoint(network().state_dict())
    match = match_keys(found, shapes(network()), head=HEAD)
    with pytest.raises(
        MismatchError, match=r"conv1\.weight is 1 in the network, 4x3x3x3 in victim\.pt"
    ):
        replace_tensors(found, match, {"conv1.weight": torch.zeros(1)})


def test_the_account_names_what_was_matched_left_over_and_dropped():
    state = prefixed("module.encoder_q.", network(1, classes=128).state_dict())
    state |= prefixed("module.encoder_k.", network(2, classes=128).state_dict())
    state["module.queue"] = torch.zeros(128, 16)
    found = checkpoint({"state_dict": state}, "optimizer (dict)", "epoch (int)")
    match = match_keys(found, shapes(network()), head=HEAD)
    assert describe_match(match, found).splitlines() == [
        "matched: 7 of 7 body tensors, at 'state_dict' with prefix 'module.encoder_q.'",
        "head: fc.weight, fc.bias (128 classes), kept as it is",
        "left over, kept as it is: module.encoder_k (9), module.queue",
        "warning: would have fitted as well, and stays as it came, for whoever loads it: "
        "state_dict.module.encoder_k (choose by --nesting and --prefix)",
        "dropped: optimizer (dict), epoch (int)",
    ]


@pytest.mark.parametrize("start", ["", "module."])
def test_a_network_that_only_wraps_another_fits_what_the_inner_one_was_saved_as(start):
    state = network().state_dict()
    wanted = {f"net.inner.{key}": shape for key, shape in shapes(network()).items()}
    head = tuple(f"net.inner.{key}" for key in HEAD)
    match = match_keys(checkpoint(prefixed(start, state)), wanted, head=head)
    assert match.keys == {f"net.inner.{key}": start + key for key in state}
    assert match.head == head
    whole = match_keys(checkpoint(prefixed("net.inner.", state)), wanted, head=head)
    assert (whole.prefix, whole.other) == ("", ())


# Foreign names


def test_foreign_names_are_tried_where_ours_do_not_fit():
    state = network().state_dict()
    foreign = {"stem": state.pop("conv1.weight")} | state
    tree: Tree = {"model": prefixed("module.", foreign)}
    wanted = shapes(network())
    with pytest.raises(MismatchError):
        match_keys(checkpoint(tree), wanted, head=HEAD)
    match = match_keys(
        checkpoint(tree), wanted, head=HEAD, rename=lambda tensors: {"conv1.weight": "stem"}
    )
    assert (match.nesting, match.prefix) == (("model",), "module.")
    assert match.keys["conv1.weight"] == "module.stem"
    assert set(match.keys) == set(wanted)
    assert match.left_over == ()


def test_one_name_of_a_thousand_parts_costs_no_time():
    state = {"a." * 1_000 + "a": torch.ones(1), **network().state_dict()}
    assert match_keys(checkpoint(state), shapes(network()), head=HEAD).left_over
    del state["conv1.weight"]
    asked = []
    with pytest.raises(MismatchError):
        match_keys(
            checkpoint({"a." * 1_000 + "a": torch.ones(1)}),
            shapes(network()),
            head=HEAD,
            rename=lambda tensors: asked.append(len(tensors)) or {},
        )
    assert 1 < len(asked) < 50


def test_one_tensor_is_never_two_of_the_networks():
    state = network().state_dict()
    del state["bn1.weight"]
    with pytest.raises(MismatchError, match=r"bn1\.weight +4 +absent"):
        match_keys(
            checkpoint(state),
            shapes(network()),
            head=HEAD,
            rename=lambda tensors: {"bn1.weight": "bn1.bias"},
        )
