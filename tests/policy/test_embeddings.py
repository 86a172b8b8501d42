"""Quantized and host-resident tables: the numbers and gradients of the plain model with the dequantized weights."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import Quiet, digit_share, make_model
from lowvram_grpo.kernels.decode.logits import linear_logits
from lowvram_grpo.kernels.quantized import Int8Weight, NF4Weight
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from lowvram_grpo import GRPOTrainer, UserError
from lowvram_grpo.policy.checkpointing import checkpoint_activations
from lowvram_grpo.policy.embeddings import HostEmbedding, QuantizedEmbedding, QuantizedHead, place_embeddings
from lowvram_grpo.policy.head import head_of
from lowvram_grpo.training.scoring import score

CPU = torch.device("cpu")
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
WIDE = {"hidden_size": 64, "intermediate_size": 96}


def place(model, head_dtype="dense", offload=False, **settings):
    return place_embeddings(
        model.get_base_model() if hasattr(model, "peft_config") else model,
        **{"head_dtype": head_dtype, "embedding_offload": offload, "device": CPU, **settings},
    )


def adapted(seed=0, **overrides):
    model = make_model(**{**WIDE, **overrides})
    torch.manual_seed(seed)
    return get_peft_model(model, LORA)


def dense(weight):
    v, h = weight.shape
    return weight.tile(0, v, torch.empty(v, h))


def scored(model):
    prompt, completion = torch.tensor([[0, 3, 4], [5, 6, 7]]), torch.tensor([[6, 40, 8, 9], [1, 2, 3, 0]])
    prompt_mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    return score(model, prompt, prompt_mask, completion, mask, temperature=0.8, workspace_mib=1)


def gradients(model):
    out = scored(model)
    (out.logps * torch.linspace(-1, 1, 8).view(2, 4)).sum().backward()
    return out.logps.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
def test_scores_and_gradients_are_those_of_the_dequantized_weights(kind, tied, checkpointing):
    small, plain = adapted(tie_word_embeddings=tied), adapted(tie_word_embeddings=tied)
    (said,) = place(small, kind)
    assert kind in said and ("share" in said) == tied
    head = head_of(small.get_base_model())
    assert not head.dense and head.weight is head_of(small.get_base_model()).weight
    with torch.no_grad():
        original = plain.get_base_model().lm_head.weight.clone()
        plain.get_base_model().lm_head.weight.copy_(dense(head.weight))
    assert 0 < (original - dense(head.weight)).abs().max() < {"int8": 0.01, "nf4": 0.3}[kind]
    if checkpointing:
        for model in (small, plain):
            checkpoint_activations(model)
            model.train()
    logps, grads = gradients(small)
    expected, plain_grads = gradients(plain)
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-5)
    assert len(grads) == 28 and grads.keys() == plain_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, plain_grads[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_tied_table_exists_once_and_moves_but_is_never_cast_nor_saved():
    model = make_model(**WIDE).requires_grad_(False)
    place(model, "int8")
    assert model.lm_head.table is model.model.embed_tokens.table
    codes, scales = model.lm_head.quantized_weight.flatten()[0]
    model.bfloat16()
    assert model.lm_head.quantized_weight.flatten()[0][1] is scales and scales.dtype == torch.float16
    assert not any("lm_head" in name or "embed" in name for name in model.state_dict())
    model.tie_weights()
    twin = copy.deepcopy(model)
    assert twin.lm_head.table is twin.model.embed_tokens.table and twin.lm_head.table is not model.lm_head.table
    model.to("meta")
    assert model.lm_head.quantized_weight.codes.is_meta and codes.device == CPU
    assert model.lm_head.table is model.model.embed_tokens.table


def test_the_layer_itself_gives_logits_tile_by_tile(monkeypatch):
    from lowvram_grpo.kernels.decode import logits

    monkeypatch.setattr(logits, "_columns", lambda *_: 7)
    model = make_model(tie_word_embeddings=False, **WIDE).requires_grad_(False)
    model.lm_head = nn.Linear(64, 41).requires_grad_(False)
    plain = copy.deepcopy(model)
    place(model, "int8")
    plain.lm_head.weight.copy_(dense(model.lm_head.quantized_weight))
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="linear_logps"):
        model.lm_head(torch.randn(1, 64, requires_grad=True))


@pytest.mark.parametrize("kind", ["Gemma3", "Gemma2", "Cohere", "Granite"])
def test_scales_and_caps_of_real_architectures_stay_right(kind):
    import transformers as t

    config = {
        "vocab_size": 97, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "initializer_range": 0.4, **WIDE,
    }  # fmt: skip
    extra = {
        "Gemma3": {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
        "Gemma2": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
        "Cohere": {"logit_scale": 0.3},
        "Granite": {"logits_scaling": 4.0, "tie_word_embeddings": True},
    }[kind]
    torch.manual_seed(0)
    config_class = t.Gemma3TextConfig if kind == "Gemma3" else getattr(t, f"{kind}Config")
    model = getattr(t, f"{kind}ForCausalLM")(config_class(**config, **extra)).eval().requires_grad_(False)
    plain = copy.deepcopy(model)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    place(model, "int8")
    plain.lm_head.weight.copy_(dense(model.lm_head.quantized_weight))
    prompt, completion = torch.tensor([[3, 4, 5]]), torch.tensor([[6, 96, 8, 9]])
    ids = torch.cat([prompt, completion], 1)
    expected = plain(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=2e-5)
    hidden = model.model(ids).last_hidden_state[0]
    torch.testing.assert_close(linear_logits(hidden, head_of(model)), expected[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(linear_logits(hidden, head_of(plain)), expected[0], rtol=0, atol=2e-5)


def test_a_host_embedding_is_the_plain_one_and_nothing_moves_it():
    model, plain = (adapted(tie_word_embeddings=False) for _ in range(2))
    (said,) = place(model, offload=True)
    assert "host memory" in said
    (logps, grads), (expected, plain_grads) = gradients(model), gradients(plain)
    assert torch.equal(logps, expected) and all(torch.equal(g, plain_grads[n]) for n, g in grads.items())
    embedding = model.get_base_model().get_input_embeddings()
    assert isinstance(embedding, HostEmbedding) and not list(embedding.parameters()) and not list(embedding.buffers())
    model.to("meta")
    assert embedding.table.device == CPU
    rows = embedding(torch.zeros(2, 3, dtype=torch.long, device="meta"))
    assert rows.is_meta and rows.shape == (2, 3, 64)


def test_only_gathered_rows_are_page_locked(monkeypatch):
    """A pinned copy of the table would be as large as the next power of two, and nothing is copied from it."""
    model, pinned = make_model(tie_word_embeddings=False, **WIDE).requires_grad_(False), []
    weight = model.get_input_embeddings().weight
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.shape) or tensor.clone())
    monkeypatch.setattr(nn.Module, "to", lambda module, *_: module)  # there is no GPU to move the rest to
    place(model, offload=True, device=torch.device("cuda"))
    assert pinned == []
    assert model.get_input_embeddings().table.data_ptr() == weight.data_ptr()


def test_a_tied_embedding_is_not_offloaded_and_says_so():
    model = make_model(**WIDE).requires_grad_(False)
    (said,) = place(model, offload=True)
    assert "no effect" in said and model.model.embed_tokens.weight is model.lm_head.weight


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantizes_on_meta_and_from_the_host(kind):
    meta = torch.device("meta")
    with meta:
        model = make_model(tie_word_embeddings=False, **WIDE).requires_grad_(False)
    place(model, kind, offload=True, device=meta)
    assert isinstance(model.lm_head, QuantizedHead) and model.model.embed_tokens.table is None
    ids = torch.zeros(2, 5, dtype=torch.long, device=meta)
    assert model.lm_head(model.model(ids).last_hidden_state).shape == (2, 5, 41)
    streamed = make_model(tie_word_embeddings=False, **WIDE).requires_grad_(False)
    place(streamed, kind, device=meta)
    assert all(t.is_meta for t in [*streamed.lm_head.buffers(), *streamed.model.embed_tokens.parameters()])


def test_quantizing_in_row_blocks_changes_nothing(monkeypatch):
    from lowvram_grpo.kernels import quantized

    weight = torch.randn(1000, 128)
    for kind in (Int8Weight, NF4Weight):
        whole = kind.quantize(weight).flatten()
        monkeypatch.setattr(quantized, "_BLOCK_ELEMENTS", 128 * 96)
        parts = kind.quantize(weight).flatten()
        monkeypatch.undo()
        assert whole[1] == parts[1] and all(torch.equal(a, b) for a, b in zip(whole[0], parts[0]))


def test_what_cannot_be_made_smaller_is_refused_by_name():
    with pytest.raises(UserError, match="is being trained"):
        place(make_model(**WIDE), "int8")
    untied = {"tie_word_embeddings": False, **WIDE}
    with pytest.raises(UserError, match="input embedding is being trained"):
        place(make_model(**untied), offload=True)
    with pytest.raises(UserError, match="multiple of 64"):
        place(make_model().requires_grad_(False), "nf4")
    strange = make_model(**untied).requires_grad_(False)

    class Normed(nn.Embedding):
        def forward(self, ids):
            return nn.functional.normalize(super().forward(ids), dim=-1)

    strange.model.embed_tokens = Normed(41, 64).requires_grad_(False)
    with pytest.raises(UserError, match="Normed"):
        place(strange, offload=True)
    wrapped = get_peft_model(make_model(**untied), LoraConfig(target_modules=["embed_tokens", "q_proj"]))
    with pytest.raises(UserError, match="input embedding"):
        place(wrapped, offload=True)


@pytest.mark.parametrize(
    "settings",
    [{"head_dtype": "int8"}, {"head_dtype": "nf4"}, {"head_dtype": "int8", "embedding_offload": True}],
    ids=["int8", "nf4", "int8-host"],
)
def test_trains_saves_and_resumes(config, dataset, tokenizer, tmp_path, settings):
    tied = "embedding_offload" not in settings
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")

    def run(name, resume=None):
        args = config(
            output_dir=str(tmp_path / name), save_strategy="steps", save_steps=1, max_steps=3, beta=0.05,
            gradient_checkpointing=True, **settings,
        )  # fmt: skip
        trainer = GRPOTrainer(
            make_model(tie_word_embeddings=tied, **WIDE), digit_share, args, dataset, processing_class=tokenizer,
            peft_config=lora, observer=Quiet(),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run("a")
    base = whole.model.get_base_model()
    assert isinstance(base.get_output_embeddings(), QuantizedHead)
    assert isinstance(base.get_input_embeddings(), QuantizedEmbedding if tied else HostEmbedding)
    log = [row for row in whole.state.log_history if "loss" in row]
    assert log[0]["kl"] == 0 and max(row["sampling/sampling_logp_difference/max"] for row in log) < 1e-4
    saved = load_file(tmp_path / "a" / "checkpoint-3" / "adapter_model.safetensors")
    assert saved and all("lora_" in name for name in saved)
    rest = run("b", resume=str(tmp_path / "a" / "checkpoint-1"))
    theirs = dict(rest.model.named_parameters())
    assert all(torch.equal(p, theirs[n]) for n, p in whole.model.named_parameters())
