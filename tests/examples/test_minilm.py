"""The sentence encoder: examples/minilm.py, with a tiny BERT in the same files; `make minilm` runs the real one."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import minilm  # noqa: E402
from bert import checkpoint as files  # noqa: E402
from bert import plain  # noqa: E402
from bert.checkpoint import Checkpoint, CheckpointError, installed, padded  # noqa: E402
from bert.encoder import Encoder, encode  # noqa: E402

import kernelry  # noqa: E402
from kernelry.models import from_huggingface  # noqa: E402

WIDTH, HIDDEN, HEADS, LAYERS, POSITIONS = 16, 24, 2, 2, 24
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
WORDS = ("a", "cat", "dog", "house", "in", "is", "red", "sleep", "##s", "the", ".")
SENTENCES = ("The cat sleeps.", "A red dog is in the red house, the house in the house.", "Dogs.")
CONFIG = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "layer_norm_eps": 1e-3,
    "max_position_embeddings": POSITIONS,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "type_vocab_size": 2,
    "vocab_size": len(SPECIAL) + len(WORDS),
}


def tensors_of():
    """Random weights, by PyTorch's names; large enough that a wrong mask, activation or epsilon shows."""
    rng = np.random.default_rng(0)
    made = {}

    def norm(name):
        made[f"{name}.weight"] = rng.uniform(0.5, 1.5, WIDTH)
        made[f"{name}.bias"] = rng.normal(size=WIDTH) * 0.1

    def dense(name, inner, outer, scale=1.0):
        made[f"{name}.weight"] = rng.normal(size=(outer, inner)) * scale / np.sqrt(inner)
        made[f"{name}.bias"] = rng.normal(size=outer) * 0.1

    for name, number in (("word", CONFIG["vocab_size"]), ("position", POSITIONS), ("token_type", 2)):
        made[f"embeddings.{name}_embeddings.weight"] = rng.normal(size=(number, WIDTH))
    norm("embeddings.LayerNorm")
    for number in range(LAYERS):
        layer = f"encoder.layer.{number}"
        for name in ("query", "key", "value"):
            dense(f"{layer}.attention.self.{name}", WIDTH, WIDTH, scale=1.5)
        dense(f"{layer}.attention.output.dense", WIDTH, WIDTH)
        norm(f"{layer}.attention.output.LayerNorm")
        dense(f"{layer}.intermediate.dense", WIDTH, HIDDEN)
        dense(f"{layer}.output.dense", HIDDEN, WIDTH)
        norm(f"{layer}.output.LayerNorm")
    return {name: values.astype(np.float32) for name, values in made.items()}


def tokenizer_of():
    """WordPiece in lower case that pads to 8 tokens and truncates there, as a published file may."""
    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_padding(length=8)
    tokenizer.enable_truncation(8)
    return tokenizer


def write(folder, **changes):
    """Writes the files of a model; `changes` are of config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    save_file(tensors_of(), folder / "model.safetensors")
    tokenizer_of().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def checkpoint(folder):
    return Checkpoint.read(folder)


@pytest.fixture(scope="module")
def tokens(checkpoint):
    return checkpoint.tokens(SENTENCES)


@pytest.fixture(scope="module")
def model(checkpoint):
    return Encoder(checkpoint, from_huggingface(checkpoint.config))


@pytest.fixture(scope="module")
def expected(checkpoint, tokens):
    return np.stack([plain.sentence_vector(ids, checkpoint.config, checkpoint.tensors) for ids in tokens])


def test_tokens_are_those_of_the_sentence_alone(tokens):
    assert tokens[0].tolist() == [2, 13, 5, 11, 12, 14, 3]
    assert tokens[2].tolist() == [2, 6, 12, 14, 3]
    assert len(tokens[1]) > 8  # where tokenizer.json truncates


@pytest.mark.parametrize(("settings", "longest"), [({}, POSITIONS), ({"max_seq_length": 5}, 5)])
def test_what_is_too_long_is_cut(tmp_path, settings, longest):
    write(tmp_path)
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps(settings))
    read = Checkpoint.read(tmp_path)
    [ids] = read.tokens(["the cat " * POSITIONS])
    assert len(ids) == read.longest == longest
    assert ids[-1] == 3


@pytest.mark.parametrize("kernel", ["dot_product", "blockwise"])
def test_a_padded_batch_gives_what_numpy_gives(model, tokens, expected, kernel):
    with kernelry.use(kernel), kernelry.record() as resolutions:
        found = np.asarray(encode(model, *padded(tokens)))
    assert [resolution.kernel for resolution in resolutions] == [kernel] * LAYERS
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_padding_is_not_read(model, tokens, expected):
    ids, lengths = padded(tokens)
    other = np.where(np.arange(ids.shape[1])[None] < lengths[:, None], ids, 7)
    np.testing.assert_array_equal(encode(model, other, lengths), encode(model, ids, lengths))
    unmasked = np.asarray(encode(model, ids, np.full_like(lengths, ids.shape[1])))
    assert np.abs(unmasked - expected)[[0, 2]].max() > 0.05


def test_a_change_of_the_model_shows(checkpoint, tokens, expected):
    """The tiny model is sensitive to what a port gets wrong."""
    ids, config, tensors = tokens[0], checkpoint.config, checkpoint.tensors
    changed = {
        "epsilon": (config | {"layer_norm_eps": 1e-12}, tensors),
        "heads": (config | {"num_attention_heads": 1}, tensors),
        "types": (config, tensors | {"embeddings.token_type_embeddings.weight": np.zeros((2, WIDTH))}),
        "positions": (config, tensors | {"embeddings.position_embeddings.weight": np.zeros((POSITIONS, WIDTH))}),
    }
    off = {name: np.abs(plain.sentence_vector(ids, *model) - expected[0]).max() for name, model in changed.items()}
    assert min(off.values()) > 1e-5, off


def test_gelu_is_exact():
    x = np.array([-1.0, 0.0, 2.0])
    np.testing.assert_allclose(plain._gelu(x), [-0.15865525393145707, 0, 1.9544997361036416], rtol=1e-14)


def test_the_command_compares_every_sentence(folder, capsys):
    assert minilm.main(["--model", str(folder), "--kernel", "blockwise", "The [red] house.", "Dogs."]) == 0
    printed = capsys.readouterr().out
    assert "The [red] house." in printed
    assert "Vectors through blockwise, against NumPy" in printed
    assert printed.count("1.0000000000") == 2
    assert "use('blockwise') is in force" in printed


def test_the_command_fails_where_a_vector_differs(folder, monkeypatch):
    right = plain.sentence_vector
    turned = np.eye(WIDTH)[0] * 0.05  # a cosine of about 0.999
    monkeypatch.setattr(plain, "sentence_vector", lambda *arguments: right(*arguments) + turned)
    assert minilm.main(["--model", str(folder), *SENTENCES[::2]]) == minilm.DIFFERENT


def test_a_report_tells_the_nearest_sentence_and_the_smaller_cosine():
    vectors = np.array([[1.0, 0, 0], [0, 1, 0], [0.8, 0.6, 0]])
    alone = np.array([[1.0, 0, 0], [0, 1, 0], [0.6, 0.8, 0]])
    report = minilm.Report((3, 3, 3), vectors, alone, 2 * vectors, ())
    assert [number for number, _ in report.nearest] == [2, 2, 0]
    np.testing.assert_allclose(report.cosines, [1, 1, 0.96])
    np.testing.assert_allclose(report.padding, [0, 0, 0.2])
    single = dataclasses.replace(report, tokens=(3,), together=vectors[:1])
    assert single.nearest == [None]


def test_not_a_number_is_a_failure(folder, monkeypatch):
    monkeypatch.setattr(plain, "sentence_vector", lambda *_: np.full(WIDTH, np.nan))
    assert minilm.main(["--model", str(folder), *SENTENCES[::2]]) == minilm.DIFFERENT


def test_a_kernel_that_does_not_serve_is_named(folder, capsys):
    assert minilm.main(["--model", str(folder), "--kernel", "splash", *SENTENCES[::2]]) == minilm.IMPOSSIBLE
    assert "platform=cpu is not tpu" in capsys.readouterr().out


def test_the_installed_model_is_found_and_not_imported(tmp_path, monkeypatch, folder):
    package = tmp_path / "some_encoder"
    write(package / "model")
    (package / "__init__.py").write_text("raise ImportError('torch')")
    (tmp_path / "some_encoder-1.0.dist-info").mkdir()
    (tmp_path / "some_encoder-1.0.dist-info" / "METADATA").write_text("Name: some-encoder\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert installed("some-encoder") == package / "model"
    assert Checkpoint.read(installed("some-encoder")).config == CONFIG


def test_a_missing_package_is_named_with_its_installation(monkeypatch, capsys):
    monkeypatch.setattr(minilm, "installed", lambda: installed("no-such-encoder"))
    assert minilm.main([]) == minilm.IMPOSSIBLE
    printed = " ".join(capsys.readouterr().out.split())
    assert f"no-such-encoder is not installed: {files.INSTALL}, or pass --model, a folder." in printed


@pytest.mark.parametrize(("module", "library"), [("tokenizers", "tokenizers"), ("safetensors.numpy", "safetensors")])
def test_a_missing_library_is_named_with_its_installation(monkeypatch, folder, module, library):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(CheckpointError, match=rf"^{library} is not installed: pip install --no-deps .*{library}"):
        Checkpoint.read(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "roberta"}, "config.json has model_type='roberta'; this example computes 'bert' alone."),
        ({"hidden_act": "gelu_new"}, "config.json has hidden_act='gelu_new'"),
        ({"position_embedding_type": "relative_key"}, "config.json has position_embedding_type='relative_key'"),
    ],
)
def test_another_model_is_refused(tmp_path, changes, words):
    with pytest.raises(CheckpointError, match=words):
        Checkpoint.read(write(tmp_path, **changes))


def test_another_pooling_is_refused(tmp_path):
    write(tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    pooling = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    with pytest.raises(CheckpointError, match="has pooling_mode_cls_token; this example pools by the mean alone"):
        Checkpoint.read(tmp_path)


def test_what_a_file_lacks_is_named(tmp_path):
    write(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({f"bert.{name}": values for name, values in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has no embeddings\.word_embeddings\.weight"):
        Checkpoint.read(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"^model\.safetensors is not in .*: pass --model"):
        Checkpoint.read(tmp_path)
    for text, words in (
        (
            json.dumps({"model_type": "bert", "hidden_size": 3}),
            "has no vocab_size, num_hidden_layers, .*layer_norm_eps:",
        ),
        ('{"model_type": ', "is not JSON"),
        ("[]", "must be an object, got list"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=words):
            Checkpoint.read(tmp_path)
