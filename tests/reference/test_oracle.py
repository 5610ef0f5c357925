"""The oracle itself: hand-worked cases, and transformers' Llama and Qwen2 as a second opinion."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from tests.ranks import run_on_standing_ranks
from tests.reference import tiny
from tests.reference.neva_pre import (
    IMAGE_TOKEN,
    NO_LABEL,
    decode,
    encode_image,
    expand_sample,
    project,
    reference_step,
    sample_sums,
    split_samples,
    vision_tower,
)


def test_the_expansion_is_that_of_nevas_docstring():
    source, labels, mask = expand_sample([0, 1, IMAGE_TOKEN, 2, 3], [1, IMAGE_TOKEN, 2, 3, 4], [1.0] * 5, 1, 100)
    assert source == [("text", 0), ("text", 1), ("image", 0), ("text", 2), ("text", 3)]
    assert labels == [1, NO_LABEL, 2, 3, 4]
    assert mask == [1, 0, 0, 1, 1]


def test_two_images_of_two_tokens_and_a_cut():
    tokens, labels = [IMAGE_TOKEN, 5, IMAGE_TOKEN, 6], [5, IMAGE_TOKEN, 6, 7]
    source, out, mask = expand_sample(tokens, labels, [1.0] * 4, 2, 5)
    assert source == [("image", 0), ("image", 1), ("text", 5), ("image", 2), ("image", 3)]
    assert out == [NO_LABEL, 5, NO_LABEL, NO_LABEL, 6]
    assert mask == [0, 0, 0, 0, 0]
    assert expand_sample(tokens, labels, [1.0] * 4, 2, 100)[2] == [0, 0, 0, 0, 0, 1]


def neva_preprocess(batch, tokens_per_image, max_length):
    """On a rank: NeVA's own expansion, on embeddings that name where they come from."""
    from nemo.collections.vlm.neva.model.base import MCoreNevaModel

    rows = batch["tokens"].shape[0]
    model = SimpleNamespace(
        add_decoder=True,
        pre_process=True,
        post_process=True,
        _img_seq_len=tokens_per_image,
        _language_is_pipeline_parallel=False,
        _language_max_sequence_length=max_length,
        sequence_parallel_lm=False,
        _get_shard_factor=lambda packed: (1, 0),
    )
    text = batch["tokens"].float()[..., None]
    count = sum(batch["num_media_tiles"])
    images = -1000.0 - torch.arange(count * tokens_per_image).view(count, tokens_per_image, 1).transpose(0, 1).float()
    tiles = torch.tensor(batch["num_media_tiles"], dtype=torch.int)
    embedding, labels, mask, _ = MCoreNevaModel._preprocess_data(
        model,
        images,
        text,
        batch["tokens"],
        batch["loss_mask"],
        batch["labels"],
        False,
        IMAGE_TOKEN,
        tiles,
        None,
        None,
    )
    assert embedding.shape[1] == rows
    return embedding[..., 0].T.tolist(), labels.tolist(), mask.tolist()


@pytest.mark.parametrize("images", [(0, 1, 2, 3), (3, 3), (2, 0), (1,)])
@pytest.mark.parametrize("max_length", [100, 17])
def test_the_expansion_agrees_with_nevas_own(images, max_length):
    batch = tiny.random_batch(images, seed=sum(images))
    batch["loss_mask"] = torch.ones_like(batch["loss_mask"])
    batch["labels"] = torch.arange(batch["labels"].numel()).view_as(batch["labels"])
    [(sources, labels, masks)] = run_on_standing_ranks(neva_preprocess, 1, batch, 4, max_length)
    first_image = 0
    for row, sample in enumerate(split_samples([{**batch, "media": list(range(sum(images)))}])):
        source, expected_labels, expected_mask = expand_sample(
            sample["tokens"], sample["labels"], sample["loss_mask"], 4, max_length
        )
        length = len(source)
        expected = [float(i) if kind == "text" else -1000.0 - 4 * first_image - i for kind, i in source]
        assert sources[row][:length] == expected
        assert masks[row][:length] == expected_mask
        assert [lab for lab, m in zip(labels[row], masks[row], strict=True) if m] == [
            lab for lab, m in zip(expected_labels, expected_mask, strict=True) if m
        ]
        assert not any(masks[row][length:])
        if length < max_length:
            assert labels[row][:length] == expected_labels
        first_image += images[row]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_decoder_gives_the_logits_of_transformers(family):
    config = tiny.tiny_config()
    state = {k: v.double() for k, v in tiny.random_state(config, qkv_bias=family == "qwen2").items()}
    shape = {
        "hidden_size": tiny.WIDTH,
        "intermediate_size": tiny.FFN,
        "num_hidden_layers": tiny.LAYERS,
        "num_attention_heads": tiny.HEADS,
        "num_key_value_heads": tiny.GROUPS,
        "vocab_size": tiny.VOCABULARY,
        "rope_theta": config.rotary_base,
        "rms_norm_eps": config.layernorm_epsilon,
        "attn_implementation": "eager",
        "torch_dtype": torch.float64,
    }
    model = (
        LlamaForCausalLM(LlamaConfig(**shape)) if family == "llama" else Qwen2ForCausalLM(Qwen2Config(**shape))
    ).double()
    lm = "language_model."
    theirs = {
        "model.embed_tokens.weight": state[f"{lm}embedding.word_embeddings.weight"],
        "model.norm.weight": state[f"{lm}decoder.final_layernorm.weight"],
        "lm_head.weight": state[f"{lm}output_layer.weight"],
    }
    head_dim, per_group = tiny.WIDTH // tiny.HEADS, tiny.HEADS // tiny.GROUPS
    for i in range(tiny.LAYERS):
        ours, at = f"{lm}decoder.layers.{i}.", f"model.layers.{i}."
        gate, up = state[f"{ours}mlp.linear_fc1.weight"].chunk(2)
        theirs |= {
            f"{at}input_layernorm.weight": state[f"{ours}input_layernorm.weight"],
            f"{at}post_attention_layernorm.weight": state[f"{ours}pre_mlp_layernorm.weight"],
            f"{at}self_attn.o_proj.weight": state[f"{ours}self_attention.linear_proj.weight"],
            f"{at}mlp.gate_proj.weight": gate,
            f"{at}mlp.up_proj.weight": up,
            f"{at}mlp.down_proj.weight": state[f"{ours}mlp.linear_fc2.weight"],
        }
        for kind in ("weight", "bias") if family == "qwen2" else ("weight",):
            qkv = state[f"{ours}self_attention.linear_qkv.{kind}"]
            qkv = qkv.view(tiny.GROUPS, per_group + 2, head_dim, *qkv.shape[1:])
            parts = {"q": qkv[:, :per_group], "k": qkv[:, per_group], "v": qkv[:, per_group + 1]}
            for letter, part in parts.items():
                theirs[f"{at}self_attn.{letter}_proj.{kind}"] = part.reshape(-1, *qkv.shape[3:])
    model.load_state_dict(theirs)
    tokens = torch.randint(0, tiny.VOCABULARY, (1, 19), generator=torch.Generator().manual_seed(1))
    expected = model(tokens, output_hidden_states=True)
    embedded = state[f"{lm}embedding.word_embeddings.weight"][tokens[0]]
    logits, hidden = decode(embedded, state, config)
    # transformers computes the rotary angles in float32: 19 positions times 1e-7
    torch.testing.assert_close(logits, expected.logits[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(hidden[2], expected.hidden_states[2][0], rtol=0, atol=1e-5)


def one_image():
    config = tiny.tiny_config(pre_layers=(2,))
    return config, tiny.random_state(config), tiny.random_batch((1,), seed=3)


def test_the_predictive_loss_is_minus_one_where_the_head_returns_its_anchor():
    """Identity decoder layers and a head that is the identity on [relu(x); relu(-x)]: f(h^l) = h^0."""
    config = tiny.tiny_config(pre_layers=(2,), head_activation="relu")
    state = tiny.random_state(config)
    for name in state:
        if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            state[name] = torch.zeros_like(state[name])
    identity = torch.eye(tiny.WIDTH)
    state["pre_heads.2.fc1.weight"] = torch.cat([identity, -identity])
    state["pre_heads.2.fc1.bias"] = torch.zeros(2 * tiny.WIDTH)
    state["pre_heads.2.fc2.weight"] = torch.cat([identity, -identity], dim=1)
    state["pre_heads.2.fc2.bias"] = torch.zeros(tiny.WIDTH)
    batch = tiny.random_batch((2, 1), seed=4)
    assert reference_step(state, config, [batch])["loss_pre"] == pytest.approx(-1.0, abs=1e-12)
    state["pre_heads.2.fc2.weight"] = -state["pre_heads.2.fc2.weight"]
    assert reference_step(state, config, [batch])["loss_pre"] == pytest.approx(1.0, abs=1e-12)


def test_one_token_worked_by_hand():
    """A single masked-in text token and no image: L_LM is its cross-entropy, L_PRe is 0 and reaches nothing."""
    config = tiny.tiny_config(pre_layers=(2,))
    state = tiny.random_state(config)
    for name in state:
        if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            state[name] = torch.zeros_like(state[name])
    batch = tiny.random_batch((0,), text_length=6, answer=1)
    token, label = batch["tokens"][0, -1], batch["labels"][0, -1]
    x = state["language_model.embedding.word_embeddings.weight"][token].double()
    normed = F.rms_norm(x, x.shape, state["language_model.decoder.final_layernorm.weight"].double(), 1e-5)
    logits = state["language_model.output_layer.weight"].double() @ normed
    step = reference_step(state, config, [batch])
    assert step["loss_lm"].item() == pytest.approx(F.cross_entropy(logits, label).item(), abs=1e-12)
    assert step["tokens"] == 1
    assert step["visual"] == 0
    assert step["loss_pre"] == 0
    assert all(not step["grads"][n].any() for n in state if n.startswith(("pre_heads", "vision")))


def test_the_language_loss_is_a_mean_over_the_global_batch_and_not_of_micro_batches():
    config, state, _ = one_image()
    first, second = tiny.random_batch((1, 0, 2), seed=5), tiny.random_batch((3,), seed=6, answer=3)
    a, b, both = (reference_step(state, config, x) for x in ([first], [second], [first, second]))
    assert a["tokens"] != b["tokens"]
    expected = (a["loss_lm"] * a["tokens"] + b["loss_lm"] * b["tokens"]) / both["tokens"]
    torch.testing.assert_close(both["loss_lm"], expected)
    expected = (a["loss_pre"] * a["visual"] + b["loss_pre"] * b["visual"]) / both["visual"]
    torch.testing.assert_close(both["loss_pre"], expected)
    assert abs(both["loss_lm"] - (a["loss_lm"] + b["loss_lm"]) / 2) > 1e-4


def test_gradients_agree_with_finite_differences_where_the_anchor_is_held_still():
    """The loss with the anchor frozen at its present value, differentiated numerically through the projector."""
    config, state, batch = one_image()
    state = {k: v.double() for k, v in state.items()}
    grads = reference_step(state, config, [batch])["grads"]
    name = "vision_projection.2.weight"
    tower = vision_tower(config).double()
    sample = split_samples([batch])[0]
    anchor = project(encode_image(sample["images"][0], tower, state, config), state)

    def loss(delta: float, row: int, column: int) -> float:
        changed = dict(state)
        changed[name] = state[name].clone()
        changed[name][row, column] += delta
        sums = sample_sums(sample, tower, changed, replace(config, pre_layers=()))
        first = next(t for t, token in enumerate(sample["tokens"]) if token == IMAGE_TOKEN)
        visual = project(encode_image(sample["images"][0], tower, changed, config), changed)
        embedding = changed["language_model.embedding.word_embeddings.weight"]
        rows = [embedding[t] for t in sample["tokens"][:first]] + list(visual)
        hidden = decode(torch.stack(rows), changed, config)[1][2][first:]
        inner = F.gelu(F.linear(hidden, changed["pre_heads.2.fc1.weight"], changed["pre_heads.2.fc1.bias"]))
        predicted = F.linear(inner, changed["pre_heads.2.fc2.weight"], changed["pre_heads.2.fc2.bias"])
        predictive = -F.cosine_similarity(predicted, anchor, dim=-1).mean()
        return float(sums["lm"] / sums["tokens"] + 0.5 * predictive)

    for row, column in [(0, 0), (7, 3), (31, 20)]:
        numeric = (loss(1e-5, row, column) - loss(-1e-5, row, column)) / 2e-5
        assert grads[name][row, column].item() == pytest.approx(numeric, rel=1e-5, abs=1e-9)


def test_the_anchor_receives_no_gradient():
    """With an anchor before the projector, and no language loss, only h^l carries gradient to the vision side."""
    config = tiny.tiny_config(pre_layers=(1,), pre_anchor="pre_projector")
    state = tiny.random_state(config)
    batch = tiny.random_batch((1,), seed=8)
    batch["loss_mask"].zero_()
    state["pre_heads.1.fc1.weight"].zero_()  # the prediction no longer depends on h^l
    grads = reference_step(state, config, [batch])["grads"]
    assert grads["pre_heads.1.fc2.bias"].any()
    assert not any(g.any() for n, g in grads.items() if n.startswith(("vision", "language")))


def test_algorithm_1_taken_literally_is_another_loss():
    config, state, batch = one_image()
    right = reference_step(state, config, [batch])
    literal = reference_step(state, replace(config, literal_algorithm_1=True), [batch])
    assert abs(right["loss_pre"] - literal["loss_pre"]) > 1e-3
    head = "pre_heads.2.fc2.weight"
    assert (right["grads"][head] - literal["grads"][head]).norm() > 1e-2 * right["grads"][head].norm()


def test_variants_and_layers_differ_as_defined():
    config, state, _ = one_image()
    batch = tiny.random_batch((2, 1), seed=9)
    pooled = reference_step(state, replace(config, pre_variant="global"), [batch])
    assert pooled["visual"] == 3
    assert reference_step(state, config, [batch])["visual"] == 12
    several = tiny.tiny_config(pre_layers=(1, 4))
    state = tiny.random_state(several)
    step = reference_step(state, several, [batch])
    assert step["loss_pre"] == pytest.approx(sum(step["loss_pre_by_layer"].values()).item() / 2)


def test_visual_tokens_cut_by_the_maximum_length_do_not_count():
    config = tiny.tiny_config(pre_layers=(2,), max_sequence_length=9)
    batch = tiny.random_batch((3,), seed=2)
    source = expand_sample(batch["tokens"][0].tolist(), [0] * 12, [0.0] * 12, 4, 9)[0]
    visible = sum(kind == "image" for kind, _ in source)
    assert visible < 12
    assert reference_step(tiny.random_state(config), config, [batch])["visual"] == visible
