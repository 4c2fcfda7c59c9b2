"""Config and tokenizer from the metadata of small .gguf files."""

import gguf
import numpy as np
import pytest
import transformers

from shoal.driver.gguf_model import config_from_gguf
from shoal.driver.gguf_tokenizer import tokenizer_from_gguf
from shoal.driver.model_config import resolve_model
from shoal.workers.loading.gguf_file import read_gguf
from shoal.workers.models.spec import ModelSpec

LLAMA = {
    "block_count": 2,
    "context_length": 256,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "rope.freq_base": 5000.0,
    "rope.dimension_count": 16,
}
SHARED = {
    "vocab_size": 40,
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}


@pytest.fixture
def write(tmp_path):
    """write(arch, metadata under its prefix, tokenizer.ggml.* and others, names of more tensors) -> path."""

    def make(arch="llama", numbers=LLAMA, more=None, tensors=None):
        writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), arch)
        for key, value in {**{f"{arch}.{k}": v for k, v in numbers.items()}, **(more or {})}.items():
            if isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            elif isinstance(value, str):
                writer.add_string(key, value)
            else:
                writer.add_array(key, value)
        rows = len((more or {}).get("tokenizer.ggml.tokens", range(40)))
        for name, values in {"token_embd.weight": np.zeros((rows, 64), np.float32), **(tensors or {})}.items():
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / "m.gguf"

    return make


def spec_of(path):
    from shoal.driver.config import make_config

    return resolve_model(make_config(model=str(path))).spec


def same_spec(path, config):
    return spec_of(path) == ModelSpec.from_hf(config)


UNTIED = {"output.weight": np.zeros((40, 64), np.float32)}
ONE = np.zeros((1,), np.float32)


def test_llama(write):
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    config = transformers.LlamaConfig(**SHARED, rope_parameters=rope, architectures=["LlamaForCausalLM"])
    assert same_spec(write(tensors=UNTIED), config)
    config.tie_word_embeddings = True
    assert same_spec(write(), config)
    config.attention_bias = config.mlp_bias = True
    assert same_spec(write(tensors={"blk.0.attn_q.bias": ONE, "blk.0.ffn_gate.bias": ONE}), config)


def test_qwen3_has_its_own_head_dim(write):
    numbers = LLAMA | {"attention.key_length": 32}
    del numbers["rope.dimension_count"]
    config = transformers.Qwen3Config(
        **SHARED,
        head_dim=32,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        architectures=["Qwen3ForCausalLM"],
    )
    assert same_spec(write("qwen3", numbers, tensors=UNTIED), config)


def test_granite_multipliers(write):
    numbers = LLAMA | {"embedding_scale": 12.0, "residual_scale": 0.22, "attention.scale": 0.015625, "logit_scale": 8.0}
    config = transformers.GraniteConfig(
        **SHARED,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        attention_multiplier=0.015625,
        logits_scaling=8.0,
        tie_word_embeddings=True,
        architectures=["GraniteForCausalLM"],
    )
    assert same_spec(write("granite", numbers), config)


def test_gpt2(write):
    numbers = {
        "block_count": 2,
        "context_length": 128,
        "embedding_length": 64,
        "feed_forward_length": 256,
        "attention.head_count": 4,
        "attention.layer_norm_epsilon": 1e-5,
    }
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=64, n_layer=2, n_head=4, n_positions=128, architectures=["GPT2LMHeadModel"],
        eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    assert same_spec(write("gpt2", numbers), config)


def test_rope_scaling(write):
    scaled = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    rope = spec_of(write(numbers=LLAMA | scaled)).rope
    assert (rope.rope_type, rope.factor, rope.theta) == ("linear", 4.0, 5000.0)
    scaled = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}
    rope = spec_of(write(numbers=LLAMA | scaled)).rope
    assert (rope.rope_type, rope.factor, rope.original_max_position_embeddings) == ("yarn", 4.0, 64)
    with pytest.raises(ValueError, match=r"rope\.scaling\.type 'longrope' is not supported"):
        spec_of(write(numbers=LLAMA | {"rope.scaling.type": "longrope"}))


def test_llama3_rope_from_its_factors(write):
    """The stored divisors are those of transformers' llama3 frequencies."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = transformers.LlamaConfig(hidden_size=256, num_attention_heads=4, rope_parameters=rope)
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** (-np.arange(0, 64, 2) / 64)
    factors = (plain / scaled.numpy()).astype(np.float32)
    assert len(set(np.round(factors, 3))) > 4
    numbers = LLAMA | {"embedding_length": 256, "rope.dimension_count": 64, "rope.freq_base": 500000.0}
    found = config_from_gguf(read_gguf(write(numbers=numbers, tensors={"rope_freqs.weight": factors})))
    assert found["rope_parameters"] == rope
    factors[3] = 2.0
    with pytest.raises(ValueError, match="are not Llama 3's"):
        config_from_gguf(read_gguf(write(numbers=numbers, tensors={"rope_freqs.weight": factors})))


def test_token_ids(write):
    more = {"tokenizer.ggml.eos_token_id": 5, "tokenizer.ggml.eot_token_id": 6, "tokenizer.ggml.bos_token_id": 0}
    spec = spec_of(write(more=more))
    assert (spec.eos_token_ids, spec.bos_token_id) == ((5, 6), 0)
    assert spec_of(write(more=more | {"tokenizer.ggml.eot_token_id": 5})).eos_token_ids == (5,)


def test_what_cannot_be_run_is_refused(write):
    with pytest.raises(ValueError, match=r"m\.gguf: GGUF architecture 'mamba' is not supported"):
        spec_of(write("mamba", {}))
    with pytest.raises(ValueError, match=r"m\.gguf does not state llama\.feed_forward_length"):
        spec_of(write(numbers={k: v for k, v in LLAMA.items() if k != "feed_forward_length"}))
    with pytest.raises(ValueError, match="mixture of experts"):
        spec_of(write(numbers=LLAMA | {"expert_count": 8}))
    with pytest.raises(ValueError, match="rotary embedding of 8 of 16 dimensions"):
        spec_of(write(numbers=LLAMA | {"rope.dimension_count": 8, "attention.key_length": 16}))
    with pytest.raises(ValueError, match=r"attention\.head_count differs between layers"):
        spec_of(write(numbers=LLAMA | {"attention.head_count": [4, 8]}))
    assert spec_of(write(numbers=LLAMA | {"attention.head_count_kv": [2, 2]})).num_kv_heads == 2


def byte_level(pre, **more):
    """A byte alphabet with a few merges, two control tokens and a user-defined one."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [*sorted(ByteLevel.alphabet()), "th", "the", "12", "123", "Ġa", "<s>", "</s>", "<think>"]
    kinds = [1] * (len(tokens) - 3) + [3, 3, 4]
    return {
        "tokenizer.ggml.model": "gpt2",
        **({"tokenizer.ggml.pre": pre} if pre else {}),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": ["t h", "th e", "1 2", "12 3", "Ġ a"],
        "tokenizer.ggml.bos_token_id": tokens.index("<s>"),
        "tokenizer.ggml.eos_token_id": tokens.index("</s>"),
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "the 123", ["the", "Ġ", "123"]),  # " 123" is one piece, whose first merge is "12"
        ("smollm", "the123", ["the", "1", "2", "3"]),
        ("refact", "the123", ["the", "1", "2", "3"]),
        ("llama-bpe", "the12345", ["<s>", "the", "123", "4", "5"]),
        ("qwen2", "the123 a", ["the", "1", "2", "3", "Ġa"]),
        ("dbrx", "the123", ["the", "123"]),
    ],
)
def test_byte_level_cuts_text_as_the_file_says(write, pre, text, pieces):
    tokenizer = tokenizer_from_gguf(read_gguf(write(more=byte_level(pre))))
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(text)) == pieces
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_special_tokens_bos_eos_and_templates(write):
    more = byte_level("gpt-2", add_bos_token=True, add_eos_token=True)
    more |= {
        "tokenizer.chat_template": "A",
        "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.chat_template.tool_use": "B",
    }
    tokenizer = tokenizer_from_gguf(read_gguf(write(more=more)))
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode("the<think></s>"))
    assert pieces == ["<s>", "the", "<think>", "</s>", "</s>"]
    assert tokenizer.decode(tokenizer.encode("the<think>"), skip_special_tokens=True) == "the<think>"
    assert tokenizer.encode("the", add_special_tokens=False) == [more["tokenizer.ggml.tokens"].index("the")]
    assert tokenizer.chat_template == {"default": "A", "tool_use": "B"}
    assert tokenizer.model_max_length == 256
    off = tokenizer_from_gguf(read_gguf(write(more=byte_level("llama-bpe", add_bos_token=False))))
    assert off.convert_ids_to_tokens(off.encode("the")) == ["the"]


def test_tokenizers_that_are_refused(write):
    with pytest.raises(ValueError, match=r"m\.gguf holds no tokenizer: give tokenizer="):
        tokenizer_from_gguf(read_gguf(write()))
    for pre in ("my-own", None):
        with pytest.raises(ValueError, match=rf"tokenizer\.ggml\.pre is {pre!r}, and how it cuts text is not known"):
            tokenizer_from_gguf(read_gguf(write(more=byte_level(pre))))
    with pytest.raises(ValueError, match="tokenizer of kind 't5'"):
        tokenizer_from_gguf(read_gguf(write(more=byte_level("gpt-2", model="t5"))))


def test_sentencepiece_is_what_sentencepiece_says(write, tmp_path):
    """A small model trained here: same ids as the library's own, through scores and byte fallback."""
    spm = pytest.importorskip("sentencepiece")
    lines = ["The theory of the other weather, there and then.", "She sells sea shells; he sees the sea."] * 20
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(tmp_path / "spm"), vocab_size=340, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    theirs = spm.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    size = theirs.get_piece_size()
    kinds = [3 if theirs.is_control(i) else 2 if theirs.is_unknown(i) else 1 for i in range(size)]
    more = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [theirs.id_to_piece(i) for i in range(size)],
        "tokenizer.ggml.scores": [float(theirs.get_score(i)) for i in range(size)],
        "tokenizer.ggml.token_type": [6 if theirs.is_byte(i) else kinds[i] for i in range(size)],
        "tokenizer.ggml.bos_token_id": theirs.bos_id(),
        "tokenizer.ggml.eos_token_id": theirs.eos_id(),
        "tokenizer.ggml.unknown_token_id": theirs.unk_id(),
    }
    ours = tokenizer_from_gguf(read_gguf(write(more=more)))
    for text in ("the other sea", "The weather there", "  two  spaces ", "shells, née 日本 🙂", "hello\nworld"):
        assert ours.encode(text) == [theirs.bos_id(), *theirs.encode(text)], text
        assert ours.decode(ours.encode(text), skip_special_tokens=True) == text
