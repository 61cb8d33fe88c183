import math

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from timm.scheduler import CosineLRScheduler
from torch import nn

from mmkit.errors import ConfigError
from mmkit.optim import constant_schedule, cosine_schedule, make_ema, param_groups


class Towered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, num_classes=5, embed_dim=24, num_heads=2)
        self.extra = nn.Linear(5, 3)


def lrs(model: nn.Module, groups: list[dict[str, object]]) -> dict[str, tuple[float, float]]:
    of = {id(parameter): (group["lr"], group["weight_decay"]) for group in groups for parameter in group["params"]}  # type: ignore[attr-defined]
    return {name: of[id(parameter)] for name, parameter in model.named_parameters() if id(parameter) in of}  # type: ignore[misc]


def test_every_trainable_parameter_is_in_one_group() -> None:
    model = Towered()
    model.extra.bias.requires_grad_(False)
    groups = param_groups(model, 1e-3, 0.05, layer_decay=0.5)
    ids = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(ids) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)


def test_positions_norms_and_biases_do_not_decay() -> None:
    rows = lrs(model := Towered(), param_groups(model, 1e-3, 0.05))
    assert rows["network.blocks.0.attn.qkv.weight"][1] == 0.05
    for name in ("network.pos_embed", "network.cls_token", "network.norm.weight", "network.blocks.0.attn.qkv.bias"):
        assert rows[name][1] == 0.0, name


def test_layer_decay_is_timms_but_for_the_last_norm() -> None:
    model = Towered()
    rows = lrs(model, param_groups(model, 1.0, 0.05, layer_decay=0.5))
    theirs = {id(p): group["lr_scale"] for group in param_groups_layer_decay(model.network, 0.05, layer_decay=0.5) for p in group["params"]}
    for name, parameter in model.network.named_parameters():
        if not name.startswith("norm."):
            assert rows[f"network.{name}"][0] == pytest.approx(theirs[id(parameter)]), name
    assert rows["network.norm.weight"][0] == rows["network.head.weight"][0] == rows["extra.weight"][0] == 1.0
    assert rows["network.patch_embed.proj.weight"][0] == 0.5**4


def test_patterns_set_their_own_lr() -> None:
    rows = lrs(model := Towered(), param_groups(model, 1e-3, 0.0, lr_by_pattern={"extra.*": 2e-5}))
    assert rows["extra.weight"][0] == 2e-5
    assert rows["network.head.weight"][0] == 1e-3
    with pytest.raises(ConfigError, match=r"'projector.\*' matches none"):
        param_groups(Towered(), 1e-3, 0.0, lr_by_pattern={"projector.*": 1.0})


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ConfigError, match="every parameter of the model is frozen"):
        param_groups(nn.Linear(2, 2).requires_grad_(False), 1.0, 0.0)


def test_layer_decay_needs_a_network_that_knows_its_layers() -> None:
    with pytest.raises(ConfigError, match="Linear has 0"):
        param_groups(nn.Linear(2, 2), 1.0, 0.0, layer_decay=0.5)


def test_the_cosine_is_timms_after_the_warm_up() -> None:
    steps, warmup = 50, 5
    ours = cosine_schedule(steps, warmup)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = CosineLRScheduler(
        optimizer, t_initial=steps - warmup, warmup_t=warmup, warmup_prefix=True, warmup_lr_init=0, t_in_epochs=False
    )
    for step in range(warmup, steps):
        theirs.step_update(step)
        assert ours(step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
    assert [ours(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_a_warm_up_may_be_a_share() -> None:
    assert cosine_schedule(100, 0.03)(2) == 1.0
    assert cosine_schedule(100, 0.03)(1) < 1.0
    assert cosine_schedule(10, 0, final=0.1)(10**6) == pytest.approx(0.1)
    assert constant_schedule(4)(0) == 0.25
    assert constant_schedule()(0) == constant_schedule(4)(9) == 1.0


def test_ema_follows() -> None:
    model = nn.Linear(2, 2)
    ema = make_ema(model, 0.5, warmup=False)
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1
    ema.update(model, step=5)  # timm copies before that
    assert torch.allclose(ema.module.weight, before + 0.5)
    assert math.isclose(ema.decay, 0.5)
