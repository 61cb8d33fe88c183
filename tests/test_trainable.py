import copy
import pickle

import pytest
import torch
from torch import nn

from mmkit.errors import ConfigError
from mmkit.trainable import freeze, set_trainable, trainable_table, unfreeze, weights_hash


def model() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "vision_tower": nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)),
            "projector": nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)),
            "language_model": nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)),
        }
    )


def test_a_frozen_module_sleeps_through_its_parents_train() -> None:
    whole = model()
    freeze(whole["vision_tower"])
    whole.train()
    assert not any(module.training for module in whole["vision_tower"].modules())
    assert not any(parameter.requires_grad for parameter in whole["vision_tower"].parameters())
    assert whole["language_model"].training


def test_sleep_survives_copy_and_pickle() -> None:
    for twin in (copy.deepcopy(freeze(model()["vision_tower"])), pickle.loads(pickle.dumps(freeze(model()["vision_tower"])))):
        twin.train()
        assert not twin.training
        assert twin.train() is twin


def test_unfreeze_wakes() -> None:
    part = unfreeze(freeze(model()["vision_tower"]))
    assert part.train()[1].training
    assert not part.eval()[1].training


def test_only_what_matches_is_trained_and_the_rest_sleeps() -> None:
    whole = model()
    assert set_trainable(whole, ["projector.*"]) == 4 * 8 + 8 + 8 * 4 + 4
    whole.train()
    assert not whole["language_model"].training
    assert whole["projector"].training
    assert set_trainable(whole, ["projector", "language_model.0.*"]) == 76 + 20
    whole.train()
    assert whole["language_model"].training
    assert not whole["vision_tower"].training


def test_a_pattern_without_match_names_the_nearest_part() -> None:
    with pytest.raises(ConfigError, match=r"'mm_projector.*' matches none of 10 parameters; nearest part: projector"):
        set_trainable(model(), ["mm_projector.*"])


def test_the_table_shows_state_size_and_origin() -> None:
    whole = model()
    set_trainable(whole, ["projector.0.*"])
    parts = {name: whole[name] for name in ("vision_tower", "projector")}
    lines = trainable_table(whole, parts, {"vision_tower": "runs/uta/encoder"}).splitlines()
    row = {line.split()[1]: line for line in lines if len(line.split()) > 2}
    assert "frozen" in row["vision_tower"]
    assert "runs/uta/encoder" in row["vision_tower"]
    assert "partly" in row["projector"]
    assert "new" in row["projector"]
    assert "(rest)" in row
    assert str(sum(parameter.numel() for parameter in whole.parameters())) in row["total"]
    assert max(len(line) for line in lines) <= 120


def test_the_hash_sees_every_bit() -> None:
    part = model()["vision_tower"]
    before = weights_hash(part)
    assert weights_hash(copy.deepcopy(part)) == before
    with torch.no_grad():
        part[0].weight[0, 0] = torch.nextafter(part[0].weight[0, 0], torch.tensor(9.0))
    assert weights_hash(part) != before
    assert weights_hash(part.to(torch.bfloat16)) != before
