"""BERT, RoBERTa and DistilBERT equal transformers' with every head; mutants do not.

Random configs with a different size for every dimension and initializer_range 0.2, padded batches, two segments.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import bildung
from bildung.core.errors import ConfigError, DataError, ModelFileError
from bildung.model import heads, layers
from bildung.model.config import from_dict
from bildung.model.encoder import Encoder
from bildung.model.store import assemble, state_tensors

BERT: dict[str, Any] = dict(
    vocab_size=101,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    max_position_embeddings=30,
    type_vocab_size=2,
    initializer_range=0.2,
    num_labels=5,
)
DISTIL: dict[str, Any] = dict(
    vocab_size=101,
    dim=48,
    hidden_dim=80,
    n_layers=3,
    n_heads=6,
    max_position_embeddings=30,
    initializer_range=0.2,
    num_labels=5,
)
SHAPES = {"Bert": BERT, "Roberta": {**BERT, "type_vocab_size": 1}, "DistilBert": DISTIL}
CLASSES = [
    "BertModel",
    "BertForMaskedLM",
    "BertForPreTraining",
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "RobertaModel",
    "RobertaForMaskedLM",
    "RobertaForSequenceClassification",
    "RobertaForTokenClassification",
    "DistilBertModel",
    "DistilBertForMaskedLM",
    "DistilBertForSequenceClassification",
    "DistilBertForTokenClassification",
]
CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "untied": ("BertForPreTraining", dict(tie_word_embeddings=False)),
    "relu": ("BertForMaskedLM", dict(hidden_act="relu", layer_norm_eps=1e-3)),
    "roberta-untied": ("RobertaForMaskedLM", dict(tie_word_embeddings=False, hidden_act="relu")),
    "roberta-types": ("RobertaForMaskedLM", dict(type_vocab_size=2, pad_token_id=3)),
    "distil-untied": ("DistilBertForMaskedLM", dict(tie_word_embeddings=False, activation="relu")),
    "distil-waves": ("DistilBertForMaskedLM", dict(sinusoidal_pos_embds=True)),
}
PAD = 1


def peer_of(cls: str, changes: dict[str, Any] | None = None, **given: Any) -> Any:
    family = cls.partition("For")[0].removesuffix("Model")
    config = getattr(transformers, f"{family}Config")(**{**SHAPES[family], "pad_token_id": PAD, **(changes or {})})
    torch.manual_seed(0)
    peer = getattr(transformers, cls)(config, **given).eval()
    for key, parameter in peer.named_parameters():
        if "norm" in key.lower() or key.endswith("bias"):  # ones and zeros would hide a swap
            nn.init.normal_(parameter, 1.0 if key.endswith("weight") else 0.0, 0.3)
    return peer


def config_of(peer: Any) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads(peer.config.to_json_string(use_diff=False))
    return {**raw, "architectures": [type(peer).__name__]}


def ours_of(peer: Any) -> Encoder:
    return assemble(from_dict(config_of(peer)), {k: v.clone() for k, v in peer.state_dict().items()})


def batch(peer: Any) -> dict[str, Tensor]:
    """Two rows of other lengths, two segments each (all 0 where the family has none)."""
    tokens = torch.randint(5, 101, (2, 23), generator=torch.Generator().manual_seed(1))
    keep = torch.ones(2, 23, dtype=torch.bool)
    keep[1, 15:] = False
    tokens[~keep] = peer.config.pad_token_id
    types = torch.zeros_like(tokens)
    if getattr(peer.config, "type_vocab_size", 0) > 1:
        types[0, 9:], types[1, 4:15] = 1, 1
    return {"tokens": tokens, "keep": keep, "types": types}


def theirs(peer: Any, tokens: Tensor, keep: Tensor, types: Tensor) -> Any:
    extra = {} if "DistilBert" in type(peer).__name__ else {"token_type_ids": types}
    return peer(input_ids=tokens, attention_mask=keep.long(), output_hidden_states=True, **extra)


def differences(peer: Any, ours: Encoder) -> dict[str, float]:
    """The largest difference of everything both give, at real tokens."""
    given = batch(peer)
    keep = given["keep"]
    sites = ["layers.0.resid_pre", *(f"layers.{i}.resid_post" for i in range(3))]
    with torch.no_grad(), bildung.observe(ours, sites) as seen:
        expected = theirs(peer, **given)
        h_BLD = ours.hidden(given["tokens"], keep_BL=keep, types_BL=given["types"])
    found = {f"states {i}": (expected.hidden_states[i] - seen[site])[keep].abs().max() for i, site in enumerate(sites)}
    with torch.no_grad():
        if "mlm" in ours.config.heads:
            logits = expected.prediction_logits if "prediction_logits" in expected else expected.logits
            direct = ours(given["tokens"], keep_BL=keep, types_BL=given["types"])
            found["mlm"] = (logits - direct)[keep].abs().max()
        if "nsp" in ours.config.heads:
            logits = expected.seq_relationship_logits if "seq_relationship_logits" in expected else expected.logits
            found["nsp"] = (logits - ours.next_sentence(h_BLD)).abs().max()
        if ours.classifier is not None:
            found["classify"] = (expected.logits - ours.classify(h_BLD)).abs().max()
        if ours.tagger is not None:
            found["tag"] = (expected.logits - ours.tag(h_BLD))[keep].abs().max()
        if expected.get("pooler_output") is not None:
            found["pooled"] = (expected.pooler_output - ours.pooled(h_BLD)).abs().max()
    return {name: float(value) for name, value in found.items()}


def check(peer: Any, ours: Encoder) -> None:
    found = differences(peer, ours)
    assert max(found.values()) < 1e-5, found
    kept = state_tensors(ours)
    stored = peer.state_dict()
    assert set(kept) <= set(stored)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in kept.items())
    trained = {name for name, parameter in peer.named_parameters() if parameter.requires_grad}
    unused = {"cls.predictions.bias", "lm_head.bias"}  # dead beside an untied decoder's own bias
    if ours.config.positions == "sinusoidal":
        unused |= {name for name in trained if "position_embeddings" in name}  # waves, which transformers makes anew
    assert trained <= set(kept) | unused


@pytest.mark.parametrize("cls", CLASSES)
def test_every_head_equals_transformers(cls: str) -> None:
    peer = peer_of(cls)
    check(peer, ours_of(peer))


@pytest.mark.parametrize("name", CHANGES)
def test_other_settings_equal_transformers(name: str) -> None:
    cls, changes = CHANGES[name]
    peer = peer_of(cls, changes)
    check(peer, ours_of(peer))


@pytest.mark.parametrize("cls", ["BertModel", "RobertaModel"])
def test_a_bare_model_may_lack_its_pooler(cls: str) -> None:
    peer = peer_of(cls, add_pooling_layer=False)
    ours = ours_of(peer)
    assert ours.config.heads == () and ours.pooler is None
    check(peer, ours)


@pytest.mark.parametrize("cls", ["BertModel", "RobertaForMaskedLM", "DistilBertForSequenceClassification"])
def test_left_padding(cls: str) -> None:
    peer = peer_of(cls)
    ours = ours_of(peer)
    given = {name: tensor.flip(1) for name, tensor in batch(peer).items()}
    with torch.no_grad():
        h_BLD = ours.hidden(given["tokens"], keep_BL=given["keep"], types_BL=given["types"])
        expected = theirs(peer, **given).hidden_states[-1]
    assert float((h_BLD - expected)[given["keep"]].abs().max()) < 1e-5


# ── what files do otherwise ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_file_with_more_heads_than_it_says_keeps_them() -> None:
    """bert-base-uncased says BertForMaskedLM and holds everything of BertForPreTraining."""
    peer = peer_of("BertForPreTraining")
    raw = {**config_of(peer), "architectures": ["BertForMaskedLM"]}
    ours = assemble(from_dict(raw), {k: v.clone() for k, v in peer.state_dict().items()})
    assert ours.config.heads == ("pooler", "mlm", "nsp")
    check(peer, ours)


def test_a_pooler_beside_robertas_masked_head_stays() -> None:
    peer, bare = peer_of("RobertaForMaskedLM"), peer_of("RobertaModel")
    tensors = {k: v.clone() for k, v in peer.state_dict().items()}
    more = {f"roberta.{k}": v for k, v in bare.state_dict().items() if k.startswith("pooler.")}
    ours = assemble(from_dict(config_of(peer)), {**tensors, **more})
    assert more.keys() <= state_tensors(ours).keys()
    assert max(differences(peer, ours).values()) < 1e-5


def test_tensors_without_or_with_the_prefix() -> None:
    bare = peer_of("BertModel")
    prefixed = {f"bert.{k}": v.clone() for k, v in bare.state_dict().items()}
    check(bare, assemble(from_dict(config_of(bare)), prefixed))
    peer = peer_of("BertForSequenceClassification")
    plain = {k.removeprefix("bert."): v.clone() for k, v in peer.state_dict().items()}
    check(peer, assemble(from_dict(config_of(peer)), plain))


def test_names_of_bert_s_first_files() -> None:
    peer = peer_of("BertForPreTraining")
    tensors = {}
    for name, tensor in peer.state_dict().items():
        if "LayerNorm" in name:
            name = name.replace(".weight", ".gamma").replace(".bias", ".beta")
        tensors[name] = tensor.clone()
    del tensors["cls.predictions.bias"], tensors["cls.predictions.decoder.weight"]  # one bias, the tied matrix once
    tensors["bert.embeddings.position_ids"] = torch.arange(30)[None]
    check(peer, assemble(from_dict(config_of(peer)), tensors))


def test_an_untied_matrix_with_the_bias_under_its_old_name() -> None:
    peer = peer_of("BertForMaskedLM", dict(tie_word_embeddings=False))
    tensors = {k: v.clone() for k, v in peer.state_dict().items()}
    tensors["cls.predictions.bias"] = tensors.pop("cls.predictions.decoder.bias")
    check(peer, assemble(from_dict(config_of(peer)), tensors))


@pytest.mark.parametrize("cls", CLASSES)
def test_transformers_opens_what_is_saved(cls: str, tmp_path: Path) -> None:
    from bildung.model.store import LanguageModel
    from tests.model.tiny import tiny_lm

    peer = peer_of(cls, dict(vocab_size=260))
    ours = ours_of(peer)
    written = bildung.save(LanguageModel(ours, tiny_lm().tokenizer, ours.config), tmp_path / "saved")
    assert json.loads((written / "config.json").read_text())["architectures"] == [cls]
    reread, missing = getattr(transformers, cls).from_pretrained(written, output_loading_info=True)
    assert not missing["missing_keys"] and not missing["unexpected_keys"] and not missing["mismatched_keys"]
    assert max(differences(reread.eval(), bildung.load(written).model).values()) < 1e-5


# ── mutants ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def no_segments(ours: Encoder, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Encoder, "_types", lambda self, types_BL: None)


def causal(ours: Encoder, patch: pytest.MonkeyPatch) -> None:
    object.__setattr__(ours.config, "causal", True)


def pre_norm(ours: Encoder, patch: pytest.MonkeyPatch) -> None:
    for block in ours.model.layers:
        block.post = False


def no_embedding_norm(ours: Encoder, patch: pytest.MonkeyPatch) -> None:
    ours.model.embed_norm = None


def wrong_eps(ours: Encoder, patch: pytest.MonkeyPatch) -> None:
    for module in ours.modules():
        if isinstance(module, layers.LayerNorm):
            module.eps = 1e-2


def other_activation(ours: Encoder, patch: pytest.MonkeyPatch) -> None:
    for block in ours.model.layers:
        block.mlp.act = nn.ReLU()


def no_transform_norm(ours: Encoder, patch: pytest.MonkeyPatch) -> None:
    ours.transform.layernorm = nn.Identity()


def no_unembedding_bias(ours: Encoder, patch: pytest.MonkeyPatch) -> None:
    ours.lm_head.bias.data.zero_()


def pooler_without_tanh(ours: Encoder, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(heads.Pooler, "forward", lambda self, h_BLD: self.dense(h_BLD[:, 0]))


def pooler_of_the_mean(ours: Encoder, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(heads.Pooler, "forward", lambda self, h_BLD: torch.tanh(self.dense(h_BLD.mean(1))))


def padding_is_seen(ours: Encoder, patch: pytest.MonkeyPatch) -> None:
    hidden = Encoder.hidden
    patch.setattr(Encoder, "hidden", lambda self, tokens_BL, **kw: hidden(self, tokens_BL, types_BL=kw["types_BL"]))


@pytest.mark.parametrize(
    "mutant",
    [
        no_segments,
        causal,
        pre_norm,
        no_embedding_norm,
        wrong_eps,
        other_activation,
        no_transform_norm,
        no_unembedding_bias,
        pooler_without_tanh,
        pooler_of_the_mean,
        padding_is_seen,
    ],
)
def test_mutants_fail(mutant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = peer_of("BertForPreTraining")
    ours = ours_of(peer)
    mutant(ours, monkeypatch)
    assert max(differences(peer, ours).values()) > 1e-3


def test_roberta_mutants_fail() -> None:
    peer = peer_of("RobertaForMaskedLM", dict(hidden_act="relu"))
    ours = ours_of(peer)
    ours.transform.act = F.relu
    assert differences(peer, ours)["mlm"] > 1e-3
    ours = ours_of(peer)
    ours.model.embed_positions.offset = 0
    assert differences(peer, ours)["states 0"] > 1e-3
    peer = peer_of("RobertaForSequenceClassification")
    ours = ours_of(peer)
    ours.classifier.act = F.relu
    assert differences(peer, ours)["classify"] > 1e-3


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"is_decoder": True}, "is_decoder"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"architectures": ["BertForQuestionAnswering"]}, "known: BertModel"),
        ({"hidden_act": "gelo"}, "gelu"),
        ({"num_attention_heads": 7}, "does not divide"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label"),
        ({"hidden_sise": 3}, "hidden_sise"),
        ({"layer_norm_eps": "1e-12"}, "layer_norm_eps"),
    ],
)
def test_keys_that_would_change_the_numbers_are_refused(change: dict[str, Any], words: str) -> None:
    from bildung.model.build import make

    raw = {**config_of(peer_of("BertModel")), **change}
    with pytest.raises(ConfigError, match=words):
        make(from_dict(raw))


def test_a_file_and_its_config_that_disagree() -> None:
    peer = peer_of("BertForTokenClassification")
    tensors = {k: v.clone() for k, v in peer.state_dict().items()}
    raw = {**config_of(peer), "architectures": ["BertForSequenceClassification"]}
    with pytest.raises(ModelFileError, match=r"bert\.pooler\.dense\.weight are missing"):
        assemble(from_dict(raw), dict(tensors))
    with pytest.raises(ModelFileError, match="belong nowhere"):
        assemble(from_dict({**raw, "architectures": ["BertModel"]}), dict(tensors))
    del tensors["classifier.weight"]
    with pytest.raises(ModelFileError, match=r"classifier\.weight is missing"):
        assemble(from_dict(config_of(peer)), tensors)


def test_what_a_model_has_no_head_or_vector_for() -> None:
    ours = ours_of(peer_of("BertForMaskedLM"))
    tokens = torch.randint(5, 101, (1, 7))
    h_BLD = ours.hidden(tokens)
    for head, call in (("nsp", ours.next_sentence), ("classify", ours.classify), ("tag", ours.tag)):
        with pytest.raises(ModelFileError, match=f"no '{head}' head .its heads: mlm"):
            call(h_BLD)
    with pytest.raises(DataError, match="segments 0 to 1"):
        ours.hidden(tokens, types_BL=torch.full_like(tokens, 2))
    with pytest.raises(DataError, match="beyond the table of 30"):
        ours.hidden(torch.randint(5, 101, (1, 31)))


def test_labels_are_kept() -> None:
    names = {"0": "dull", "1": "fine", "2": "great"}
    raw = {**config_of(peer_of("BertForSequenceClassification")), "id2label": names, "problem_type": "regression"}
    config = from_dict(raw)
    assert config.num_labels == 3 and config.raw["id2label"] == names and config.raw["problem_type"] == "regression"


def test_classifiers_drop_what_transformers_drops() -> None:
    """In training, at classifier_dropout ~1 only what stands below the dropout reaches the logits: the bias."""
    for cls, key in (
        ("BertForSequenceClassification", "classifier_dropout"),
        ("RobertaForTokenClassification", "classifier_dropout"),
        ("DistilBertForSequenceClassification", "seq_classif_dropout"),
        ("DistilBertForTokenClassification", "dropout"),
    ):
        ours = ours_of(peer_of(cls, {key: 0.999999}))
        tokens = torch.randint(5, 101, (2, 7))
        h_BLD = ours.hidden(tokens)
        head = ours.classifier or ours.tagger
        ours.train()
        logits = ours.classify(h_BLD) if ours.classifier else ours.tag(h_BLD)
        assert torch.allclose(logits, head.out_proj.bias.expand_as(logits), atol=1e-6), cls
