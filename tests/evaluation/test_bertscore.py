"""BERTScore against a direct implementation, pair by pair, and against the package `bert-score` where it runs."""

import json

import pytest
import torch
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaTokenizer,
)

from dart_eval.bertscore import find, scores
from dart_eval.errors import UserError

CANDIDATES = [
    "the cat sat on the mat",
    "a dog runs",
    "loudly the mat dog in in in park",
    "cat",
    "",
    "a cat",
    "the " * 40,
]
REFERENCES = ["a cat sat on a mat", "in the park a dog runs loudly", "the dog", "cat", "a dog", "  ", "a dog " * 9]
SMALL = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
WORDS = sorted(set(" ".join(CANDIDATES + REFERENCES).split()))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A BERT with one token a word and a RoBERTa with byte pairs, both random and with room for 20 tokens."""
    home = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    words = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    config = BertConfig(vocab_size=len(words), max_position_embeddings=20, initializer_range=0.5, **SMALL)
    BertModel(config).eval().save_pretrained(home / "bert")
    BertTokenizer(vocab=words, model_max_length=20).save_pretrained(home / "bert")

    letters = sorted(set("".join(WORDS)) | {"Ġ"})
    merges = [("c", "a"), ("ca", "t"), ("Ġ", "cat"), ("Ġ", "t"), ("h", "e"), ("Ġt", "he")]
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *letters, *("".join(m) for m in merges)]
    # no length in its tokenizer, as in some published models: only the positions bound it
    tokenizer = RobertaTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=merges)
    config = RobertaConfig(
        vocab_size=len(pieces), max_position_embeddings=22, initializer_range=0.5, pad_token_id=1, bos_token_id=0,
        eos_token_id=2, **SMALL,
    )  # fmt: skip
    RobertaForMaskedLM(config).eval().save_pretrained(home / "roberta")
    tokenizer.save_pretrained(home / "roberta")
    return {name: str(home / name) for name in ("bert", "roberta")}


def _direct(folder, candidate, reference, layer, space):
    """The paper's formulas with loops: cosines of every two tokens, those at the ends matched but not counted."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    if not candidate.strip() or not reference.strip():
        return 0.0

    def embed(text):
        ids = tokenizer(space + text.strip())["input_ids"]
        ids = [*ids[:19], ids[-1]] if len(ids) > 20 else ids
        with torch.no_grad():
            return model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0]

    x, y = embed(candidate), embed(reference)
    cosine = [[float(torch.dot(a, b) / a.norm() / b.norm()) for b in y] for a in x]
    precision = [max(row) for row in cosine][1:-1]
    recall = [max(row[j] for row in cosine) for j in range(len(y))][1:-1]
    p, r = sum(precision) / len(precision), sum(recall) / len(recall)
    return 2 * p * r / (p + r)


@pytest.mark.parametrize("layer", [None, 1, 2])
@pytest.mark.parametrize(("family", "space"), [("bert", ""), ("roberta", " ")])
def test_scores_equal_the_formula(folders, family, space, layer):
    folder = folders[family]
    wanted = [_direct(folder, c, r, layer or 3, space) for c, r in zip(CANDIDATES, REFERENCES, strict=True)]
    assert scores(folder, CANDIDATES, REFERENCES, layer) == pytest.approx(wanted, abs=1e-5)
    assert scores(folder, CANDIDATES, REFERENCES, layer, batch_size=2) == pytest.approx(wanted, abs=1e-5)
    assert wanted[3] == pytest.approx(1)  # the same text
    assert wanted[4] == wanted[5] == 0  # an empty one
    assert len({round(w, 3) for w in wanted}) == 6  # the rest differ


def test_roberta_sees_its_first_word_as_any_other(folders):
    """` cat` and `cat` are different tokens for it; a summary's first word is the one that running text has."""
    tokenizer = AutoTokenizer.from_pretrained(folders["roberta"])
    assert tokenizer("cat")["input_ids"] != tokenizer(" cat")["input_ids"]
    (value,) = scores(folders["roberta"], ["cat"], ["the cat"])
    assert value == pytest.approx(_direct(folders["roberta"], "cat", "the cat", 3, " "), abs=1e-5)
    assert value != pytest.approx(_direct(folders["roberta"], "cat", "the cat", 3, ""), abs=1e-3)


def test_against_the_package(folders):
    """On BERT, which it still serves under transformers 5; without the empty texts, on which it fails there."""
    package = pytest.importorskip("bert_score", reason="needs the package bert-score")
    pairs = [(c, r) for c, r in zip(CANDIDATES, REFERENCES, strict=True) if c.strip() and r.strip()]
    candidates, references = map(list, zip(*pairs, strict=True))
    for layer in (2, 3):
        _, _, f1 = package.score(
            candidates, references, model_type=folders["bert"], num_layers=layer, device="cpu", idf=False
        )
        assert scores(folders["bert"], candidates, references, layer) == pytest.approx(f1.tolist(), abs=1e-5)


@pytest.mark.slow
def test_roberta_large_uses_its_seventeenth_layer(tmp_path, folders):
    config = RobertaConfig(
        vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=24, num_attention_heads=1,
        max_position_embeddings=22, pad_token_id=1,
    )  # fmt: skip
    RobertaForMaskedLM(config).save_pretrained(tmp_path / "deep")
    AutoTokenizer.from_pretrained(folders["roberta"]).save_pretrained(tmp_path / "deep")
    deep = str(tmp_path / "deep")
    pair = (["the cat"], ["a dog runs"])
    assert scores(deep, *pair) == scores(deep, *pair, layer=17) != scores(deep, *pair, layer=24)


def test_a_model_that_is_not_at_hand_is_not_fetched(folders, tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert find(folders["bert"]) == folders["bert"]
    assert find("roberta-large") is None
    assert find("no/such model:here") is None
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert find(str(tmp_path / "half")) is None  # no weights
    with pytest.raises(UserError, match=r"roberta-large is not on this machine; hf download roberta-large"):
        scores("roberta-large", ["a"], ["b"])

    snapshot = tmp_path / "hub" / "models--FacebookAI--roberta-large" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    assert find("roberta-large") is None  # its weights were never fetched
    (snapshot / "model.safetensors").write_bytes(b"")
    assert find("roberta-large") == find("FacebookAI/roberta-large") == str(snapshot)


def test_wrong_input(folders):
    with pytest.raises(UserError, match="has no layer 4; it has 1 to 3"):
        scores(folders["bert"], ["a"], ["a"], layer=4)
    with pytest.raises(ValueError, match="2 candidates, but 1 references"):
        scores(folders["bert"], ["a", "b"], ["a"])
    assert scores(folders["bert"], [], []) == []
    assert find("") is None
