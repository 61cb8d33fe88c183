"""The assembled LLaVA: its parts, what it learns from, what it refuses."""

import copy

import pytest
import torch
from llava_tiny import picture, stock_tower, tiny_llm, tiny_tower
from torch.testing import assert_close

from llm_stage.chat_format import ChatFormat, Turn
from llm_stage.llava import (
    build_llava,
    check_image_tokens,
    check_placeholders,
    choose_select,
    freeze_tower,
    label_tokens,
    set_stage,
    supervised_loss,
    tower_geometry,
    with_dummy_row,
)
from mmkit.errors import ConfigError, DataError, NameNotFound
from mmkit.trainable import weights_hash


def build(**changes):
    return build_llava(changes.pop("encoder", None) or tiny_tower(), changes.pop("llm", None) or tiny_llm(), **changes)


def batch_for(model, processor, chats):
    """Chats of (question, answer, colour or None) as a padded batch."""
    chat_format = ChatFormat(processor.tokenizer)
    rows, pixels = [], []
    for question, answer, colour in chats:
        text = f"<image>\n{question}" if colour else question
        rows.append(chat_format.encode([Turn("user", text), Turn("assistant", answer)], int(bool(colour)), model.config.image_seq_length))
        if colour:
            pixels.append(processor.image_processor(images=picture(colour), return_tensors="pt")["pixel_values"])
    length = max(len(row) for row in rows)
    return {
        "input_ids": torch.tensor([row.input_ids + [0] * (length - len(row)) for row in rows]),
        "labels": torch.tensor([row.labels + [-100] * (length - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),
        "pixel_values": torch.cat(pixels) if pixels else None,
    }


CHATS = [("what colour is it", "it is red", "red"), ("say it", "blue", None), ("how many pictures are there", "one and no more", "blue")]


@pytest.fixture
def parts():
    return build()


def test_the_stock_class_gives_as_many_features_as_placeholders(parts):
    model, processor = parts
    assert type(model).__module__ == "transformers.models.llava.modeling_llava"
    assert check_image_tokens(model, processor) == 16 == model.config.image_seq_length


def test_every_weight_of_the_parts_is_in_the_whole():
    tower, (llm, tokenizer) = tiny_tower(3), tiny_llm(4, tie=False)
    expected = {**{f"model.vision_tower.{k}": v for k, v in tower.state_dict().items()}, "lm_head.weight": llm.lm_head.weight}
    expected |= {f"model.language_model.{k.removeprefix('model.')}": v for k, v in llm.state_dict().items() if k.startswith("model.")}
    expected = {name: tensor.clone() for name, tensor in expected.items()}
    state = build(encoder=tower, llm=(llm, tokenizer))[0].state_dict()
    assert {name for name in state if "projector" not in name} == set(expected)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_the_first_projector_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    one = build(seed=5)[0].model.multi_modal_projector.linear_1.weight
    torch.manual_seed(2)
    assert torch.equal(one, build(seed=5)[0].model.multi_modal_projector.linear_1.weight)
    assert not torch.equal(one, build(seed=6)[0].model.multi_modal_projector.linear_1.weight)


def test_a_linear_projector_is_one_linear_layer():
    model, _ = build(projector="linear")
    projector = model.model.multi_modal_projector
    x = torch.randn(2, 16, 32)
    assert_close(projector(x), projector.linear_1(x), rtol=0, atol=0)
    set_stage(model, train_llm=False)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "model.multi_modal_projector.linear_1.weight",
        "model.multi_modal_projector.linear_1.bias",
    ]


def test_the_loss_is_the_stock_loss_and_so_are_its_gradients(parts):
    model, processor = parts
    batch = batch_for(model, processor, CHATS)
    stock = copy.deepcopy(model)
    expected = stock(**batch).loss
    expected.backward()
    loss, count = supervised_loss(model, batch)
    loss.backward()
    assert count == int(label_tokens(batch)) == int((batch["labels"] != -100).sum())
    assert_close(loss, expected, rtol=1e-6, atol=1e-6)  # float32, another order of sums
    for (name, p), (_, q) in zip(model.named_parameters(), stock.named_parameters(), strict=True):
        if q.grad is not None:
            assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_logits_exist_at_supervised_positions_only(parts):
    model, processor = parts
    batch, seen = batch_for(model, processor, CHATS), []
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    _, count = supervised_loss(model, batch)
    assert seen == [(count, 48)]


def test_a_row_with_another_rows_image_tokens_is_refused(parts):
    model, processor = parts
    batch = batch_for(model, processor, [("a", "red", "red"), ("b", "blue", "blue")])
    first = (batch["input_ids"][0] == model.config.image_token_id).nonzero()[:4]
    batch["input_ids"][0, first] = 7
    blank = (batch["input_ids"][1] != model.config.image_token_id).nonzero()[:4]
    batch["input_ids"][1, blank] = model.config.image_token_id  # the sum is right, which is all that transformers compares
    with pytest.raises(DataError, match="row 0 of the micro-batch has 12 image placeholders, not a multiple of the 16"):
        check_placeholders(model.config, batch)
    with pytest.raises(DataError, match="row 0"):
        supervised_loss(model, batch)


def test_images_without_placeholders_are_refused(parts):
    model, processor = parts
    batch = batch_for(model, processor, CHATS)
    batch["pixel_values"] = batch["pixel_values"][:1]
    with pytest.raises(DataError, match=r"placeholders for 2 image\(s\) and brings 1"):
        supervised_loss(model, batch)


def test_a_micro_batch_without_labels_is_refused(parts):
    model, processor = parts
    batch = batch_for(model, processor, CHATS)
    with pytest.raises(DataError, match="without any supervised token"):
        supervised_loss(model, {**batch, "labels": torch.full_like(batch["labels"], -100)})


def test_a_dummy_row_changes_neither_loss_nor_gradient(parts):
    model, processor = parts
    set_stage(model, train_llm=True)
    batch = batch_for(model, processor, [CHATS[1], ("say", "green and white", None)])
    whole = with_dummy_row(batch, model.config, 32, 0)
    assert whole["input_ids"].shape[0] == 3
    assert int((whole["input_ids"] == model.config.image_token_id).sum()) == 16
    losses, grads = [], []
    for given in (batch, whole):
        model.zero_grad()
        loss, count = supervised_loss(model, given)
        loss.backward()
        losses.append((float(loss.detach()), count))
        grads.append(model.model.language_model.layers[0].mlp.up_proj.weight.grad.clone())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert_close(*grads, rtol=1e-4, atol=1e-7)
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().max() == 0  # there, and zero
    assert with_dummy_row(whole, model.config, 32, 0) is whole


def test_the_tower_sleeps_three_ways(parts):
    model, processor = parts
    set_stage(model, train_llm=True)
    before = weights_hash(model.model.vision_tower)
    model.train()
    assert not any(module.training for module in model.model.vision_tower.modules())
    model.model.vision_tower.enable_input_require_grads()  # what peft and gradient checkpointing do
    out = model.model.vision_tower(torch.randn(1, 3, 32, 32), output_hidden_states=True)
    assert not out.last_hidden_state.requires_grad
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    supervised_loss(model, batch_for(model, processor, CHATS))[0].backward()
    optimizer.step()
    assert weights_hash(model.model.vision_tower) == before
    assert copy.deepcopy(model).model.vision_tower.forward.args[0] is not model.model.vision_tower


def test_stage_one_trains_the_projector_alone(parts):
    model, _ = parts
    set_stage(model, train_llm=False)
    model.train()
    assert {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad} == {"multi_modal_projector"}
    assert not model.model.language_model.layers[0].training
    freeze_tower(model)


def test_stock_towers_are_taken_as_they_are():
    model, processor = build(encoder=stock_tower())
    assert model.config.vision_config.model_type == "clip_vision_model"
    assert check_image_tokens(model, processor) == 16


def test_select_refuses_to_drop_a_patch_or_keep_registers():
    geometry = tower_geometry(tiny_tower())
    assert choose_select(geometry, "auto", "x") == "default"
    without = type(geometry)(geometry.spec, 16, 0, 8)
    assert choose_select(without, "auto", "x") == "full"
    with pytest.raises(ConfigError, match="a patch, as there is no CLS"):
        choose_select(without, "default", "siglip")
    with pytest.raises(ConfigError, match="one of 5 prefix tokens"):
        choose_select(type(geometry)(geometry.spec, 16, 5, 8), "auto", "dinov2")
    assert build(select="full")[0].config.image_seq_length == 17


def test_a_processor_that_counts_otherwise_is_refused(parts):
    model, processor = parts
    processor.num_additional_image_tokens = 0
    with pytest.raises(ConfigError, match="writes 15 image tokens, the tower gives 16"):
        check_image_tokens(model, processor)


def test_an_image_token_outside_the_embedding_is_refused():
    llm, tokenizer = tiny_llm()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    llm.resize_token_embeddings(3)
    with pytest.raises(ConfigError, match="is token 3, the LLM's embedding has 3 rows"):
        build(llm=(llm, tokenizer))


def test_an_unknown_projector_names_the_known():
    with pytest.raises(NameNotFound, match="mlp2x_gelu"):
        build(projector="mlp2x_gelo")
